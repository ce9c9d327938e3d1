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

# When seedrng ends, it writes a seed, which all VMs of the image would have. It must not run to the
# end of this system.
if [ -x /etc/init.d/seedrng ]; then
    rc-service --ifstarted seedrng stop || :
fi
# The services of sshd and dropbear make host keys when they start.
rm -f /etc/ssh/ssh_host_*_key* /etc/dropbear/dropbear_*_host_key /etc/machine-id
rm -rf /var/lib/azure-provisioning /var/lib/seedrng
rm -f /root/.ssh/authorized_keys /root/.ash_history
find /var/log -type f -exec rm {} +
if [ -n "${1-}" ] && grep -q "^$1:" /etc/passwd; then
    deluser --remove-home "$1"
fi
rm -f /etc/passwd- /etc/shadow- /etc/group- # they still have the account

warn() {
    echo "bake.sh: warning: $1" >&2
}
if ! command -v wget >/dev/null && ! command -v curl >/dev/null; then
    warn 'there is neither wget nor curl: the agent cannot run'
fi
if ! command -v doas >/dev/null && ! command -v sudo >/dev/null; then
    warn 'there is neither doas nor sudo: the user cannot become root'
fi
if [ ! -e /etc/runlevels/default/sshd ] && [ ! -e /etc/runlevels/default/dropbear ]; then
    warn 'neither sshd nor dropbear is in the runlevel default: nobody can log in'
fi
echo 'bake.sh: done. Do not start this system again before it is an image.'
