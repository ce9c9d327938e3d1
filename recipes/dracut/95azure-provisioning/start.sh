#!/bin/sh
# Report Ready in the background: the boot goes on while the network comes up.
export AZURE_PROVISIONING_INTERVAL=1 AZURE_PROVISIONING_ATTEMPTS=100
{
    /usr/local/sbin/azure-provisioning ready
    : >/run/azure-provisioning.done
} >/run/azure-provisioning.log 2>&1 &
