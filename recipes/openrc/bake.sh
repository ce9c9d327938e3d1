#!/bin/sh
# Make an image of this Alpine, in which /usr/local/sbin/azure-provisioning and
# /etc/init.d/azure-provisioning are installed. Run it as root, in the base VM or in a chroot.

set -eu

for file in /usr/local/sbin/azure-provisioning /etc/init.d/azure-provisioning; do
    if [ ! -x "$file" ]; then
        echo "bake.sh: install $file first, with mode 755" >&2
        exit 1
    fi
done

# Two agents would configure the VM at once.
agents=$(apk info | grep -E '^(cloud-init|tiny-cloud)' || :)
if [ -n "$agents" ]; then
    # shellcheck disable=SC2086 # words
    apk del $agents
fi

printf '%s\n' 'auto lo eth0' 'iface lo inet loopback' 'iface eth0 inet dhcp' \
    >/etc/network/interfaces
rc-update add networking boot
rc-update add azure-provisioning default

# sshd makes its host keys when it starts.
rm -f /etc/ssh/ssh_host_*_key* /etc/machine-id
rm -rf /var/lib/azure-provisioning
find /var/log -type f -exec rm {} +
