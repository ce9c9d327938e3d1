#!/bin/bash
# A module of dracut: the initramfs reports Ready to Azure. dracut calls these functions.

depends() {
    echo network
}

installkernel() {
    instmods hv_vmbus hv_netvsc
}

install() {
    inst_multiple sh curl sleep /usr/local/sbin/azure-provisioning
    # shellcheck disable=SC2154 # dracut sets $moddir
    inst_hook pre-trigger 50 "$moddir/start.sh"
    inst_hook initqueue/finished 50 "$moddir/finished.sh"
}
