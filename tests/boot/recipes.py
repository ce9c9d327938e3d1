#!/usr/bin/env python3
"""The README's recipes: python3 tests/boot/recipes.py [--tree TREE] [--openrc TREE]

Each check runs a recipe's own lines in a tree of Debian, and boots what comes of it: in namespaces,
as boot.py does, or in QEMU, as vm.py, which also has the recipe for BusyBox. A TREE is made where
it is not given, of PACKAGES. Prints a line a check, in TAP, and what was measured as comments. Exit
status: 0 all passed or were skipped, 1. Needs root, apt-get, qemu-system-x86_64, systemd, iproute2,
shellcheck and, without TREE, mmdebstrap.
"""

import argparse
import contextlib
import ctypes
import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import tempfile

import kit_path  # noqa: F401  before the modules of the kit
import lib
from host import Azure, network
from lib import HERE, GOOD_RUN, Machine, expect, from_readme, is_provisioned
from run import PROJECT
from tap import Skipped, measured, tell

PACKAGES = {
    'tree': 'systemd-sysv dbus curl iproute2 openssh-server cloud-init waagent dracut-core '
    'dracut-network nix-bin',
    'openrc': 'openrc iproute2',
}
TREES = {}
# A command in an overlay over a tree, as root, in namespaces from which it reaches nothing of this
# machine.
CHROOT = """
cd "$2/root" && mount -t overlay -o "lowerdir=$1,upperdir=$2/upper,workdir=$2/work" none . &&
cd "$2/root" && mount -t proc proc proc && mount -t sysfs -o ro sysfs sys &&
mount -t tmpfs none run && mount --bind "$2/files" mnt &&
exec env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    DEBIAN_FRONTEND=noninteractive \
    chroot . sh -euc 'cd /mnt; eval "$1"' sh "$3"
"""
HOST = '#!/bin/sh\n/busybox/busybox --install -s /busybox\nPATH=/busybox:$PATH /azure-host start\n'
ENDED = """#!/bin/sh
{
    sed 's/^/journal=/' /run/azure-provisioning.log
    echo reported=yes
} >/dev/console
/busybox/poweroff -f
"""
EVALUATE = """nix-instantiate --eval --strict --json --expr '
    let files = name: environment: text: builtins.seq text "/files"; in
    (import ./azure.nix { pkgs = {
        runCommand = files; curl = "/curl"; hostname = "/hostname";
    }; }).systemd'"""


class Image(Machine):
    """A tree in which commands are run, with the script and the unit beside them; it boots as any
    other machine.
    """

    def __init__(self, which):
        self.tree = tree(which)
        self.state = pathlib.Path(tempfile.mkdtemp(dir=os.getcwd()))
        self.upper, self.files = self.state / 'upper', self.state / 'files'
        self.units = self.upper / 'etc/systemd/system'
        for folder in self.upper, self.files, self.state / 'root', self.state / 'work':
            folder.mkdir()
        for name in 'azure-provisioning.sh', 'azure-provisioning.service':
            shutil.copy(str(PROJECT / name), str(self.files))

    def run(self, commands):
        """Run commands in the image, and return what they print."""
        done = subprocess.run(
            [
                'unshare',
                '--net',
                '--mount',
                '--pid',
                '--fork',
                '--kill-child',
                'sh',
                '-c',
                CHROOT,
                'sh',
                self.tree,
                str(self.state),
                commands,
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            universal_newlines=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def report(self):
        """Have the next boots tell how they went."""
        self.write('etc/hostname', 'image\n')
        self.write('etc/systemd/journald.conf.d/tests.conf', '[Journal]\nStorage=volatile\n')
        self.write('etc/systemd/system/report.service', (HERE / 'image/report.service').read_text())
        shutil.copytree(str(HERE / 'image'), str(self.upper / 'azure-provisioning-tests'))
        self.enable('report')


def debian():
    """Debian: without cloud-init and waagent it is provisioned, with SSH host keys and a machine-id
    of its own.
    """
    image = Image('tree')
    keys = host_keys(image)
    image.run(from_readme('apt-get purge'))
    left = image.run(
        'ls /etc/ssh/ssh_host_* /lib/systemd/system/cloud-* /lib/systemd/system/*agent* '
        '2>/dev/null || :; '
        'cat /etc/machine-id; find /var/log -type f'
    )
    assert left == '', left
    image.report()
    with Azure() as host:
        is_provisioned(image.boot(), host.posts())
    own = host_keys(image)
    assert len(own) == len(keys) and not own & keys, own
    assert re.match('[0-9a-f]{32}\n', image.run('cat /etc/machine-id'))


def host_keys(image):
    return {line.split()[1] for line in image.run('cat /etc/ssh/ssh_host_*_key.pub').splitlines()}


def alpine():
    """OpenRC and BusyBox: with its shell and its wget, Ready is reported, the hostname set, the
    service removed.
    """
    image = Image('openrc')
    for own in 'etc/init.d', 'etc/runlevels':  # in the place of Debian's
        (image.upper / own).mkdir(parents=True)
        os.setxattr(str(image.upper / own), 'trusted.overlay.opaque', b'y')
    shutil.copy(str(busybox()), str(image.files))
    image.run(
        'cp busybox /usr/local/bin && rm -f /usr/bin/curl && '
        'ln -sf /usr/local/bin/busybox /bin/sh && '
        '/bin/sh -c "/usr/local/bin/busybox --install -s /usr/local/bin" &&'
        'mkdir -p /etc/network /etc/runlevels/sysinit /etc/runlevels/boot /etc/runlevels/default'
    )
    image.write('usr/local/bin/apk', '#!/bin/sh\n', 0o755)
    image.write('etc/init.d/networking', '#!/sbin/openrc-run\nstart() { :; }\n', 0o755)
    image.write('etc/init.d/azure-provisioning', from_readme('openrc-run'), 0o755)
    image.run(from_readme('apk del'))
    image.run('! command -v curl')
    image.report()
    with Azure() as host:
        report = image.boot()
        assert len(host.posts()) == 1, host.requests
    expect(report, {'enabled': '0', 'kernel-hostname': 'web-1', 'static-hostname': 'web-1'})
    assert [line for line in report['journal'] if line in GOOD_RUN] == GOOD_RUN, report


def dracut():
    """dracut: its initramfs reports Ready, before a root that never comes."""
    image = Image('tree')
    module = 'usr/lib/dracut/modules.d/95azure-provisioning/'
    for name, words in (
        ('module-setup.sh', 'inst_multiple'),
        ('start.sh', '.done; }'),
        ('finished.sh', '[ -e /run'),
    ):
        image.write(module + name, from_readme(words), 0o755)
    image.run('install -m 755 azure-provisioning.sh /usr/local/sbin/azure-provisioning')
    include = image.files / 'include'
    hooks = include / 'lib/dracut/hooks'
    for path, text in (('pre-trigger/10-host.sh', HOST), ('initqueue/finished/90-ended.sh', ENDED)):
        (hooks / path).parent.mkdir(parents=True)
        (hooks / path).write_text(text)
        (hooks / path).chmod(0o755)
    (include / 'busybox').mkdir()
    shutil.copy(str(busybox()), str(include / 'busybox'))
    shutil.copy(str(HERE / 'busybox/azure-host'), str(include))
    shutil.copytree(str(lib.busybox_tree() / 'answers'), str(include / 'answers'))
    image.run('dracut --force --no-hostonly --no-kernel --include include / initramfs none')
    measured(
        'an initramfs of %d MiB, without kernel modules',
        (image.files / 'initramfs').stat().st_size >> 20,
    )
    report = lib.boot_guest('root=LABEL=none', '-initrd', str(image.files / 'initramfs'))
    assert report['posted'] == lib.POSTED and report['request'] == lib.REQUESTS[:2], report
    assert report['journal'] == GOOD_RUN[: GOOD_RUN.index('Response: 200') + 1], report


def nixos():
    """NixOS: the module evaluates; its unit provisions where hostnamectl is refused, and remembers
    the VM.
    """
    image = Image('tree')
    (image.files / 'azure.nix').write_text(from_readme('pkgs.runCommand'))
    systemd = json.loads(image.run(EVALUATE))
    service = systemd['services']['azure-provisioning']
    assert systemd['packages'] == ['/files'] and service['path'] == ['/curl', '/hostname'], systemd
    guest = lib.Guest('sh', tree('tree'))  # a Debian has to do, with what NixOS makes of the module
    guest.write('usr/local/sbin/hostnamectl', '#!/bin/sh\nexit 1\n', 0o755)
    guest.write(
        'files/bin/azure-provisioning', (PROJECT / 'azure-provisioning.sh').read_text(), 0o755
    )
    guest.write(
        'etc/systemd/system/azure-provisioning.service.d/overrides.conf',
        '[Service]\n'
        + ''.join(
            '%s=%s\n' % (name, each)
            for name, value in service['serviceConfig'].items()
            for each in (value if isinstance(value, list) else [value])
        ),
    )
    report = guest.boot()
    lib.was_asked(report)
    expect(report, {'enabled': 'enabled', 'kernel-hostname': 'web-1', 'static-hostname': 'web-1'})
    assert report['journal'] == GOOD_RUN[:-1] + ['Remembered: ' + lib.VM_ID], report
    report = guest.boot()
    assert report['journal'] == ['Already provisioned: ' + lib.VM_ID] and 'request' not in report, (
        report
    )


def shell():
    """The shell of the recipes is clean."""
    if not shutil.which('shellcheck'):
        raise Skipped('no shellcheck')
    for words in (
        'apt-get purge',
        'apk del',
        '"$1" != start',
        'inst_multiple',
        '.done; }',
        '[ -e /run',
        'systemd-resolved.service azure',
    ):
        script = from_readme(words)
        check = ['shellcheck', '--exclude=SC2154', '-'] + ['--shell=sh'] * (
            script[:2] != '#!'
        )  # $moddir is dracut's
        done = subprocess.run(check, input=script, stdout=subprocess.PIPE, universal_newlines=True)
        assert done.returncode == 0, done.stdout


def busybox():
    return lib.busybox_tree() / 'bin/busybox'


def tree(which):
    """A tree of Debian, given or made."""
    if not TREES.get(which):
        folder = os.path.abspath(which)
        lib.have(HERE / 'tree', 'bookworm', folder, *PACKAGES[which].split())
        TREES[which] = folder
    return TREES[which]


def leave_network():
    """Go on in a network namespace without a link: the checks have Azure's addresses on its lo."""
    assert ctypes.CDLL(None).unshare(0x40000000) == 0, 'no network namespace'  # CLONE_NEWNET
    assert {name for _, name in socket.if_nameindex()} == {'lo'}, 'a network with a link'


def hold(check):
    """Hold a recipe against a check, with Azure's addresses there."""
    if os.getuid() != 0:
        raise Skipped('not root')
    lib.have(lib.QEMU[0], '--version')
    network('del')
    network('add')
    check()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for which in PACKAGES:
        parser.add_argument('--' + which, type=os.path.abspath)
    options = lib.parse(parser)
    TREES.update({which: getattr(options, which) for which in PACKAGES})
    checks = [debian, alpine, dracut, nixos, shell]
    print('1..%d' % len(checks), flush=True)
    with lib.in_own_folder():
        if os.getuid() == 0:
            for fetch in lib.kernel, busybox, lambda: tree('tree'), lambda: tree('openrc'):
                with contextlib.suppress(Skipped):  # whoever needs it asks again, and is skipped
                    fetch()
            leave_network()
        passed = [tell(check.__doc__, hold, check) for check in checks]
    sys.exit(0 if all(passed) else 1)


if __name__ == '__main__':
    main()
