#!/usr/bin/env python3
"""First boots of a real kernel, in QEMU: python3 tests/vm.py [--tree TREE]

Guests without a network card; Azure's host is inside each, on its lo, and tells the console what it is asked. For each
of the two scripts a Debian, TREE or one made for it (tests/tree), with its systemd as PID 1 and what `make install`
installs; for the one in shell also a system of nothing but BusyBox. The kernel is Debian's for clouds.
Prints a line a check, in TAP, and what was measured as comments. Exit status: 0 all passed or were skipped, 1.
Needs root, apt-get, qemu-system-x86_64, mke2fs and, without TREE, mmdebstrap.
"""
import argparse
import contextlib
import functools
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

from boot import GOOD_RUN, RECIPES, Machine, expect, from_readme, is_provisioned, probed, read_report
from host import GOOD
from run import TESTS, Case
from tap import Skipped, measured, tell

VM_ID = '00112233-4455-6677-8899-aabbccddeeff'
PACKAGES = ['systemd', 'systemd-sysv', 'dbus', 'python3', 'curl', 'iproute2']
QEMU = ['qemu-system-x86_64', '-accel', 'tcg,thread=multi', '-machine', 'q35', '-cpu', 'max', '-smp', '2', '-m', '512',
        '-nodefaults', '-no-user-config', '-nic', 'none', '-display', 'none', '-no-reboot', '-serial', 'file:console',
        '-uuid', VM_ID]
# A panic reboots, and that ends QEMU. A getty would wait for a device that nobody announces, for there is no udev.
# The check of the timer fails on a busy machine.
PARAMETERS = 'console=ttyS0 quiet mitigations=off panic=-1 no_timer_check systemd.getty_auto=no '
DISK = 'if=none,id=disk,format=raw,cache=unsafe,file=%s'
LIMIT = 180  # seconds for a boot
REQUESTS = Case(TESTS / 'cases/runs/must-default').expected[0]['requests'].splitlines()
POSTED = [line for line in GOOD_RUN if line.startswith('<Health>')]


class Guest(Machine):
    """A machine with a disk of its own, the tree and what is over it."""

    def __init__(self, program, tree):
        super().__init__(program, argparse.Namespace(tree=tree, scratch=os.getcwd()))
        shutil.copytree(str(TESTS), str(self.upper / 'azure-provisioning-tests/tests'))
        self.enable('azure-host')
        self.disk = self.state / 'disk'

    def boot(self):
        if not self.disk.exists():
            root = self.state / 'root'
            root.mkdir()
            subprocess.run(['mount', '-t', 'overlay', '-o', 'lowerdir=%s:%s' % (self.upper, self.tree), 'none',
                            str(root)], check=True)
            subprocess.run(['mke2fs', '-q', '-t', 'ext4', '-O', '^has_journal', '-d', str(root), str(self.disk), '1G'],
                           check=True, stdout=subprocess.DEVNULL)
        return boot('root=/dev/nvme0n1 rw', '-drive', DISK % self.disk, '-device', 'nvme,serial=disk,drive=disk')


def boot(parameters, *options):
    """Boot a guest, wait for the power to go off, and return its report, a list a name."""
    done = subprocess.run(['timeout', '--foreground', str(LIMIT)] + QEMU + list(options) +
                          ['-kernel', str(kernel()), '-append', PARAMETERS + parameters], stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
    console = pathlib.Path('console').read_text(errors='replace')
    report = read_report(console)
    assert 'reported' in report, 'the boot did not come to its end: %s%s' % (done.stdout, console)
    return report


def debian(program, tree):
    """A Debian reports Ready on its first boot, sets the hostname, disables the unit; the second asks nothing."""
    guest = Guest(program, tree or debian_tree())
    report = guest.boot()
    is_provisioned(report, report['posted'])
    was_asked(report)
    said = [line for line in report['journal'] if not line.startswith('Removed ')]  # by systemctl
    assert said == GOOD_RUN, said
    report = guest.boot()
    expect(report, {'host': 'listens', 'enabled': 'disabled', 'kernel-hostname': 'web-1', 'static-hostname': 'web-1'})
    assert 'request' not in report, report


def sandbox(program, tree):
    """A real kernel refuses what each directive of the unit's sandbox is there for."""
    probed(Guest(program, tree or debian_tree()))


def busybox(program, _):
    """A system of BusyBox alone, as the README has it, reports Ready, with its wget, and sets the hostname."""
    own = from_readme('::once:', RECIPES)
    for line in '::wait:/etc/init.d/S50azure-provisioning start\n', own:  # as Buildroot's rcS does, or without it
        root = pathlib.Path(tempfile.mkdtemp(dir=os.getcwd()))
        for source, target in (TESTS / 'busybox', root), (busybox_tree(), root):
            subprocess.run(['cp', '-a', '%s/.' % source, str(target)], check=True)
        shutil.copy('%s.%s' % (TESTS.parent / 'azure-provisioning', program), str(root / 'usr/sbin/azure-provisioning'))
        script = root / 'etc/init.d/S50azure-provisioning'
        script.parent.mkdir()
        script.write_text(from_readme('"$1" != start', RECIPES))
        script.chmod(0o755)
        with (root / 'etc/inittab').open('a') as inittab:
            inittab.write(line)
        report = boot('rdinit=/sbin/init', '-initrd', pack(root))
        was_asked(report)
        expect(report, {'kernel-hostname': 'web-1', 'static-hostname': 'web-1'})
        assert report['journal'] == GOOD_RUN[:-1] + ['Remembered: ' + VM_ID], report


@functools.lru_cache(maxsize=None)
def busybox_tree():
    """BusyBox as every command it can be, and what Azure's host is to answer."""
    binary = (package('busybox-static') / 'bin/busybox').resolve()
    root = pathlib.Path(tempfile.mkdtemp(dir=os.getcwd()))
    for applet in have(binary, '--list-full').split():
        (root / applet).parent.mkdir(parents=True, exist_ok=True)
        (root / applet).symlink_to('/bin/busybox')
    (root / 'bin/busybox').unlink()
    shutil.copy(str(binary), str(root / 'bin'))
    for endpoint in 'goalstate', 'computerName':
        (root / endpoint).write_bytes(GOOD[endpoint][0].data)
    for folder in 'proc', 'sys', 'var/log':
        (root / folder).mkdir(parents=True)
    return root


def pack(root):
    """An initramfs of a folder."""
    names = '\n'.join(sorted(str(path.relative_to(root)) for path in root.rglob('*')))
    with open('initrd', 'wb') as initrd:
        subprocess.run([str(busybox_tree() / 'bin/busybox'), 'cpio', '-o', '-H', 'newc'], input=names.encode(),
                       stdout=initrd, check=True, stderr=subprocess.DEVNULL, cwd=str(root))
    return 'initrd'


def was_asked(report):
    """Assert that Azure's host was asked what it is to be asked, and told what it is to be told."""
    assert report['request'] == REQUESTS and report['posted'] == POSTED, report
    measured('Ready %s s after the start of the kernel', report['posted-time'][0])


def have(*command, **options):
    """Run a command, and return what it says; where it fails, something cannot be had here."""
    command = [str(word) for word in command]
    if not shutil.which(command[0]):
        raise Skipped('no ' + command[0])
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          universal_newlines=True, timeout=600, **options)
    if done.returncode:
        raise Skipped('%s: %s' % (os.path.basename(command[0]), done.stdout.strip().rpartition('\n')[2]))
    return done.stdout


@functools.lru_cache(maxsize=None)
def debian_tree():
    tree = os.path.abspath('bookworm')
    have(TESTS / 'tree', 'bookworm', tree, *PACKAGES)
    return tree


@functools.lru_cache(maxsize=None)
def package(name):
    """The files of a Debian package."""
    folder = pathlib.Path(tempfile.mkdtemp(dir=os.getcwd()))
    have('apt-get', 'download', name, cwd=str(folder))
    have('dpkg', '-x', *folder.glob('*.deb'), folder)
    return folder


@functools.lru_cache(maxsize=None)
def kernel():
    name = re.search('Depends: (.+)', have('apt-cache', 'depends', 'linux-image-cloud-amd64')).group(1)
    return next(package(name).glob('boot/vmlinuz-*'))


@contextlib.contextmanager
def in_scratch():
    """Work in a folder, in memory where that is possible."""
    with tempfile.TemporaryDirectory() as folder:
        if os.getuid() == 0:
            subprocess.run(['mount', '-t', 'tmpfs', 'none', folder], check=True)
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir('/')
            if os.getuid() == 0:
                subprocess.run(['umount', '--recursive', folder], check=True)


def hold(check, program, tree):
    """Hold a guest with the program against a check."""
    if os.getuid() != 0:
        raise Skipped('not root')
    have(QEMU[0], '--version')
    check(program, tree)


def parse(parser):
    """The options; root goes on in a namespace, with which what is mounted here goes."""
    parser.add_argument('--inside', action='store_true', help=argparse.SUPPRESS)
    options = parser.parse_args()
    if os.getuid() == 0 and not options.inside:
        os.execvp('unshare', ['unshare', '--mount', sys.executable] + sys.argv + ['--inside'])
    return options


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--tree', type=os.path.abspath)
    options = parse(parser)
    checks = [('py', debian), ('sh', debian), ('sh', sandbox), ('sh', busybox)]
    print('1..%d' % len(checks))
    with in_scratch():
        passed = [tell('%s: %s' % (program, check.__doc__), hold, check, program, options.tree)
                  for program, check in checks]
    sys.exit(0 if all(passed) else 1)


if __name__ == '__main__':
    main()
