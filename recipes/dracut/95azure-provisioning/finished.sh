#!/bin/sh
# dracut leaves the initramfs only if this succeeds.
[ -e /run/azure-provisioning.done ]
