#!/usr/bin/env python3
"""recipes/image-settings: python3 tests/boot/image_settings.py [--settings TREE] [--tree TREE]

The program that reads each file, from a Debian 13 in a TREE, has nothing to say about it, but does
about a copy with a mistake. The unit for the SSH host keys is booted, in a Debian 12. Prints a line
a check, in TAP. Exit status: 0 all passed or were skipped, 1. Needs root, systemd, iproute2 and,
without TREE, mmdebstrap.
"""

import argparse
import os
import sys

import kit_path  # noqa: F401  before the modules of the kit
import lib
import recipes
from recipes import Image, recipe
from tap import Skipped, tell

PACKAGES = 'systemd-sysv udev dbus systemd-resolved chrony openssh-server'
NETWORK = '50-azure.network', '10-azure-vf.network'
LINKS = '10-azure.link', '11-azure-vf.link'
UNITS = 'azure-entropy.service', 'azure-host-keys.service'


def setting(name):
    return recipe('image-settings/' + name)


def is_read(folder, names, commands, mistake):
    """Assert that the commands, which read files in a folder, say nothing about them, and do about
    each one with a line more.
    """
    image = Image('settings')
    for name in names:
        image.write('%s/%s' % (folder, name), setting(name))
    said = image.run(commands)
    assert said == '', said
    for name in names:
        image.write('%s/%s' % (folder, name), setting(name) + mistake + '\n')
        said = image.run(commands)
        assert name in said, said
        image.write('%s/%s' % (folder, name), setting(name))


def network():
    """systemd-networkd reads the files for the network."""
    # It goes on until it is ended; what it says of the files comes first.
    commands = """
        install -d -o systemd-network -g systemd-network /run/systemd /run/systemd/netif
        export SYSTEMD_LOG_TARGET=console SYSTEMD_LOG_LEVEL=warning
        timeout 5 /lib/systemd/systemd-networkd 2>&1 | grep -F /etc/systemd/network || :
    """
    is_read('etc/systemd/network', NETWORK, commands, 'Nonsense=1')


def links():
    """udev reads the files for the names of the cards."""
    commands = """
        export SYSTEMD_LOG_TARGET=console SYSTEMD_LOG_LEVEL=warning
        udevadm test-builtin net_setup_link /sys/class/net/lo 2>&1 |
            grep -F /etc/systemd/network || :
    """
    is_read('etc/systemd/network', LINKS, commands, 'Nonsense=1')


def rules():
    """udevadm verifies the rules."""
    commands = 'udevadm verify --no-summary /etc/udev/rules.d/60-azure.rules 2>&1 || :'
    is_read('etc/udev/rules.d', ['60-azure.rules'], commands, 'NONSENSE=="1"')


def time():
    """chronyd reads its file, which adds one reference clock to the configuration of Debian."""
    image = Image('settings')
    before = image.run('chronyd -p').splitlines()
    image.write('etc/chrony/conf.d/azure-time.conf', setting('azure-time.conf'))
    after = image.run('chronyd -p').splitlines()
    added = [line for line in after if line not in before]
    assert len(added) == 1 and added[0].startswith('refclock PHC /dev/ptp_hyperv '), added
    text = setting('azure-time.conf').replace(' dpoll ', ' nonsense ')
    image.write('etc/chrony/conf.d/azure-time.conf', text)
    said = image.run('chronyd -p 2>&1 || :')
    assert 'azure-time.conf' in said, said


def units():
    """systemd-analyze verifies the units and the drop-in."""
    folder = 'etc/systemd/system'
    commands = 'cd /etc/systemd/system; systemd-analyze verify --man=no %s 2>&1 || :'
    is_read(folder, UNITS, commands % ' '.join(UNITS), '[Service]\nNonsense=1')
    image = Image('settings')
    image.install()
    drop_in = folder + '/azure-provisioning.service.d/journal-on-console.conf'
    for text, wanted in (setting('journal-on-console.conf'), ''), ('Nonsense=1', 'Assignment'):
        image.write(drop_in, text)
        said = image.run(commands % 'azure-provisioning.service')
        assert wanted in said and bool(wanted) == bool(said), said


def console():
    """The shell reads the file for GRUB, as grub-mkconfig does, and adds to what is there."""
    image = Image('settings')
    (image.files / 'console').write_text(setting('azure-console.cfg'))
    said = image.run("""
        set -eu
        GRUB_CMDLINE_LINUX=quiet
        . ./console
        echo "$GRUB_CMDLINE_LINUX"
    """)
    assert said == 'quiet console=tty1 console=ttyS0,115200n8\n', said
    assert 'hv_utils' in setting('azure-modules.conf').splitlines()


def host_keys():
    """At the first boot the SSH host keys are made, and shown on the console; later they stay."""
    image = Image('tree')
    image.install()
    image.run('rm -f /etc/ssh/ssh_host_*')
    image.write('etc/systemd/system/azure-host-keys.service', setting('azure-host-keys.service'))
    image.mask('cloud-init.target', 'walinuxagent.service')
    image.report()
    image.write('etc/systemd/system/report.service.d/keys.conf', KEYS)
    image.enable('azure-host-keys')
    first = image.boot()
    assert first['key'] and first['key'] == first['shown'], first
    second = image.boot()
    assert second['key'] == first['key'] and second['shown'] == [], second


KEYS = """[Service]
ExecStartPost=/bin/sh -c 'journalctl --sync; \
for key in /etc/ssh/ssh_host_*_key.pub; do ssh-keygen -l -f $key; done | sed s/^/key=/; \
journalctl --boot --output=cat -u azure-host-keys | grep SHA256 | sed s/^/shown=/'
"""


def hold(check):
    if os.getuid() != 0:
        raise Skipped('not root')
    check()


CHECKS = {
    network: 'settings',
    links: 'settings',
    rules: 'settings',
    time: 'settings',
    units: 'settings',
    console: 'settings',
    host_keys: 'tree',
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--settings', type=os.path.abspath)
    parser.add_argument('--tree', type=os.path.abspath)
    parser.add_argument('--only', metavar='CHECK', help='the check of this name')
    options = lib.parse(parser)
    recipes.PACKAGES['settings'], recipes.SUITES['settings'] = PACKAGES, 'trixie'
    recipes.TREES.update(settings=options.settings, tree=options.tree)
    checks = [each for each in CHECKS if options.only in (None, each.__name__)]
    print('1..%d' % len(checks), flush=True)
    with lib.in_own_folder():
        if os.getuid() == 0:
            recipes.fetch((CHECKS[each] for each in checks), needed=())
            recipes.leave_network()
        passed = [tell(check.__doc__, hold, check) for check in checks]
    sys.exit(0 if all(passed) else 1)


if __name__ == '__main__':
    main()
