#!/bin/sh
# Make an image of this Alpine, in which /usr/local/sbin/azure-provisioning and
# /etc/init.d/azure-provisioning are installed:
#
#     sh bake.sh [USER]
#
# Run it as root, in the system or in a chroot of it. USER is the account that you log in with; it is
# removed at the end.

set -eu

if [ "$(id -u)" -ne 0 ]; then
    echo 'bake.sh: run me as root' >&2
    exit 1
fi
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

# ifupdown-ng reads one name after each auto.
printf '%s\n' 'auto lo' 'iface lo inet loopback' '' 'auto eth0' 'iface eth0 inet dhcp' \
    >/etc/network/interfaces
rc-update add networking boot
rc-update add azure-provisioning default

# The services of sshd and dropbear make host keys when they start.
rm -f /etc/ssh/ssh_host_*_key* /etc/dropbear/dropbear_*_host_key /etc/machine-id
rm -rf /var/lib/azure-provisioning /var/lib/seedrng
rm -f /root/.ssh/authorized_keys /root/.ash_history
find /var/log -type f -exec rm {} +
if [ -n "${1-}" ] && grep -q "^$1:" /etc/passwd; then
    deluser --remove-home "$1"
fi
rm -f /etc/passwd- /etc/shadow- /etc/group- # they still have the account
echo 'bake.sh: done. Do not start this system again before it is an image.'
