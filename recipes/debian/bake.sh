#!/bin/sh
# Make an image of this Debian or Ubuntu, in which azure-provisioning is installed:
#
#     sh bake.sh [USER]
#
# Run it as root, in the base VM or in a chroot of the image. It needs no package lists. USER is the
# account that you log in with; it is removed at the end.

set -eu

PROGRAM=/usr/local/sbin/azure-provisioning
UNIT=azure-provisioning.service

# All of the script is read before it starts, so that it can also come on stdin.
main() {
    check
    remove_other_agents
    set_up_network
    make_host_keys_at_boot
    systemctl enable "$UNIT"
    clean
    if [ -n "${1-}" ]; then
        userdel -f -r "$1" 2>/dev/null || : # -f: even though it is logged in, which is an error
        ! id "$1" >/dev/null 2>&1 || fail "cannot remove $1"
    fi
    rm -f /etc/passwd- /etc/shadow- /etc/group- /etc/gshadow- # they still have the account
    echo 'bake.sh: done. Do not start this system again, and do not run apt autoremove in it.'
}

fail() {
    echo "bake.sh: $1" >&2
    exit 1
}

check() {
    [ "$(id -u)" -eq 0 ] || fail 'run me as root'
    [ -x "$PROGRAM" ] || fail "install $PROGRAM first"
    [ -e "/etc/systemd/system/$UNIT" ] || fail "install $UNIT first"
    if head -n 1 "$PROGRAM" | grep -q python; then
        [ -x /usr/bin/python3 ] || fail 'there is no python3: install it, or the program in shell'
    else
        command -v curl >/dev/null || command -v wget >/dev/null || fail 'install curl first'
    fi
}

# Two agents would report to Azure at once. The package of cloud-init has a second part in newer
# releases; waagent is called walinuxagent on Ubuntu.
remove_other_agents() {
    # dpkg-query fails because some of them are unknown.
    # shellcheck disable=SC2016 # its own ${...}
    packages=$(dpkg-query --show --showformat '${db:Status-Status} ${Package}\n' \
        cloud-init cloud-init-base waagent walinuxagent 2>/dev/null |
        sed -n 's/^\(installed\|config-files\) //p')
    if [ -n "$packages" ]; then
        # shellcheck disable=SC2086 # words
        DEBIAN_FRONTEND=noninteractive \
            apt-get -o DPkg::Lock::Timeout=300 purge -y $packages </dev/null
    fi
    rm -rf /etc/cloud /var/lib/cloud /var/lib/waagent /etc/waagent.conf
    rm -f /etc/sudoers.d/90-cloud-init-users /etc/sudoers.d/waagent
    rm -f /etc/ssh/sshd_config.d/50-cloud-init.conf
    # cloud-init mounts the temporary disk. Its line refers to a unit that is gone.
    if [ -e /etc/fstab ]; then
        sed -i '/comment=cloudconfig/d' /etc/fstab
    fi
}

# cloud-init configured the network for the MAC address of the base VM.
set_up_network() {
    rm -f /etc/netplan/50-cloud-init.yaml /etc/network/interfaces.d/50-cloud-init
    rm -f /etc/systemd/network/10-cloud-init-*.network
    if grep -Eqrs '^[[:space:]]*iface[[:space:]]+e' /etc/network/interfaces \
        /etc/network/interfaces.d; then
        echo 'bake.sh: ifupdown configures the network: left as it is'
        return
    fi
    printf '%s\n' '[Match]' 'Driver=hv_netvsc' '' '[Network]' 'DHCP=yes' \
        >/etc/systemd/network/50-azure.network
    systemctl enable systemd-networkd.service
    if [ -e /lib/systemd/system/systemd-resolved.service ]; then
        systemctl enable systemd-resolved.service
    else
        echo 'bake.sh: there is no systemd-resolved: see that /etc/resolv.conf names a server' >&2
    fi
}

# The host keys of the base VM are removed below, and cloud-init no longer makes new ones.
make_host_keys_at_boot() {
    if [ ! -e /usr/sbin/sshd ]; then
        echo 'bake.sh: there is no sshd: nobody will be able to log in over the network' >&2
        return
    fi
    mkdir -p /etc/systemd/system/ssh.service.d
    printf '%s\n' '[Service]' ExecStartPre= ExecStartPre='/usr/bin/ssh-keygen -A' \
        ExecStartPre='/usr/sbin/sshd -t' >/etc/systemd/system/ssh.service.d/host-keys.conf
}

# What each VM must have for itself, and what tells of the base VM.
clean() {
    rm -f /etc/ssh/ssh_host_*_key* /var/lib/dbus/machine-id
    rm -f /var/lib/systemd/random-seed /var/lib/systemd/credential.secret
    rm -rf /var/lib/azure-provisioning
    : >/etc/machine-id
    # cloud-init also gives root the key of the user, with a command that sends the caller away.
    rm -f /root/.ssh/authorized_keys /root/.bash_history
    if [ -e /etc/hosts ]; then
        sed -i '/^127\.0\.1\.1[[:space:]]/d' /etc/hosts # the name of the base VM
    fi
    apt-get clean
    find /var/log -type f -delete
}

main "$@"
