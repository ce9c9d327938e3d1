#!/usr/bin/env python3
"""First boots of a real kernel, in QEMU: python3 tests/vm.py [--tree TREE]

Guests without a network card; Azure's host is inside each, on its lo, and tells the console what it is asked. For each
of the two scripts a Debian, TREE or one made for it (tests/tree), with its systemd as PID 1 and what `make install`
installs, and another one with a DVD; for the one in shell also a system of nothing but BusyBox, started as the README
says. The kernel is Debian's for clouds.
Prints a line a check, in TAP, and what was measured as comments. Exit status: 0 all passed or were skipped, 1.
Needs root, apt-get, qemu-system-x86_64, mke2fs and, without TREE, mmdebstrap; for the DVD ssh-keygen and genisoimage,
and OpenSSH, sudo and kmod in TREE.
"""
import argparse
import contextlib
import functools
import mmap
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

import logins
from boot import GOOD_RUN, Machine, expect, from_readme, is_provisioned, probed, read_report
from host import ENDPOINTS
from run import TESTS, Case
from tap import Skipped, measured, tell

PACKAGES = ['systemd', 'systemd-sysv', 'dbus', 'python3', 'curl', 'iproute2', 'kmod', 'openssh-server', 'sudo']
VM_ID, OTHER_ID = [uuid.strip() for uuid in logins.UUIDS]
KEY = 'ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI me'
QEMU = ['qemu-system-x86_64', '-accel', 'tcg,thread=multi', '-machine', 'q35', '-cpu', 'max', '-smp', '2', '-m', '512',
        '-nodefaults', '-no-user-config', '-nic', 'none', '-display', 'none', '-no-reboot', '-serial', 'file:console',
        '-uuid', VM_ID]
# A panic reboots, and that ends QEMU. A getty would wait for a device that nobody announces, for there is no udev.
# The check of the timer fails on a busy machine.
PARAMETERS = 'console=ttyS0 quiet mitigations=off panic=-1 no_timer_check systemd.getty_auto=no '
DISK = 'if=none,id=disk,format=raw,cache=unsafe,file=%s'
LIMIT = 300  # seconds for a boot
REQUESTS = Case(TESTS / 'cases/runs/must-default').expected[0]['requests'].splitlines()
POSTED = [line for line in GOOD_RUN if line.startswith('<Health>')]


class Guest(Machine):
    """A machine with a disk of its own, the tree and what is over it."""

    def __init__(self, program, tree, steps=''):
        super().__init__(program, argparse.Namespace(tree=tree, scratch=os.getcwd()), steps=steps)
        shutil.copytree(str(TESTS), str(self.upper / 'azure-provisioning-tests/tests'))
        self.enable('azure-host')
        self.disk = self.state / 'disk'
        self.modules = False

    def boot(self, *options):
        if not self.disk.exists():
            root, work = self.state / 'root', self.state / 'work'
            root.mkdir()
            work.mkdir()
            subprocess.run(['mount', '-t', 'overlay', '-o', 'lowerdir=%s,upperdir=%s,workdir=%s' % (
                self.tree, self.upper, work), 'none', str(root)], check=True)
            if self.modules:
                have('chroot', root, 'depmod', modules().name)
            subprocess.run(['mke2fs', '-q', '-t', 'ext4', '-O', '^has_journal', '-d', str(root), str(self.disk), '1G'],
                           check=True, stdout=subprocess.DEVNULL)
        return boot('root=/dev/nvme0n1 rw', '-drive', DISK % self.disk, '-device', 'nvme,serial=disk,drive=disk',
                    *options)

    def add_modules(self, *folders):
        """Put modules of the kernel in place, before the first boot."""
        for folder in folders:
            shutil.copytree(str(modules() / 'kernel' / folder),
                            str(self.upper / 'usr/lib/modules' / modules().name / 'kernel' / folder))
        self.modules = True


def boot(parameters, *options):
    """Boot a guest, wait for the power to go off, and return its report, a list a name."""
    done = subprocess.run(['timeout', '--foreground', str(LIMIT)] + QEMU + list(options) +
                          ['-kernel', str(kernel()), '-append', PARAMETERS + parameters], stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
    console = pathlib.Path('console').read_text(errors='replace')
    report = read_report(console)
    ended = done.returncode == 0 and 'reported' in report
    assert ended, 'the boot did not come to its end: %s%s' % (done.stdout, console)
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


def dvd_udf(program, tree):
    """The user logs in with the password on a real DVD, UDF; the next boot asks nothing; an image without DVD fails."""
    dvd(program, tree, 'udf')


def dvd_iso9660(program, tree):
    """So it is with a kernel that does not know UDF, but ISO 9660."""
    dvd(program, tree, 'isofs')


def dvd(program, tree, file_system):
    for command in 'ssh-keygen', 'debugfs', 'genisoimage':
        if not shutil.which(command):
            raise Skipped('no ' + command)
    guest = Guest(program, tree or debian_tree(), 'user data password hostname ready remember')
    guest.add_modules('drivers/ata', 'drivers/scsi', 'drivers/cdrom', 'lib', 'fs/nls', 'fs/' + file_system)
    guest.write('etc/modules-load.d/dvd.conf', 'ata_piix\n')  # the drive's, which udev would load
    for endpoint, [answer] in logins.has_user(guest, 'id_ed25519').items():
        guest.write('azure-provisioning-tests/answers/' + endpoint, answer.data.decode('latin-1'))

    drive = ['-device', 'piix3-ide,id=ide', '-device', 'ide-cd,bus=ide.0,drive=dvd',
             '-drive', 'if=none,id=dvd,media=cdrom,format=raw,readonly=on,file=' + burnt_dvd()]
    report = logins.boot_and_log_in(guest, *drive)
    assert report['posted'] == POSTED, report
    logins.let_in(report, 'id_ed25519', 'password')
    assert 'password-in' not in report, report['password-in']
    for name in 'user', 'custom':
        read = have('debugfs', '-R', 'cat /var/lib/azure-provisioning/%s-data' % name, guest.disk)
        assert '\n%s data\n' % name in read, read
    with open(str(guest.disk), 'rb') as disk, mmap.mmap(disk.fileno(), 0, access=mmap.ACCESS_READ) as content:
        assert len(re.findall(re.escape(logins.PASSWORD.encode()), content)) == 1  # in logins.d/password, for the login

    report = guest.boot(*drive)
    assert 'request' not in report, report
    report = guest.boot('-uuid', OTHER_ID)
    posted, = report['posted']
    assert '|reason=password: gave up after 5 attempts: ovf-env.xml: no DVD|' in posted, posted
    assert 'userData: /var/lib/azure-provisioning/user-data' in report['journal'], report


def burnt_dvd():
    """A DVD that can be read as UDF and as ISO 9660, as Azure's can."""
    os.mkdir('dvd')
    pathlib.Path('dvd/ovf-env.xml').write_text(logins.ovf('false'))
    have('genisoimage', '-udf', '-R', '-o', 'dvd.iso', 'dvd')
    shutil.rmtree('dvd')
    return 'dvd.iso'


def busybox(program, _):
    """A system of BusyBox alone reports Ready, with its wget, and sets the hostname: the README's script for init.d."""
    report = boot_busybox(program, '::wait:/etc/init.d/S50azure-provisioning start\n')  # as Buildroot's rcS does
    was_asked(report)
    assert report['journal'] == GOOD_RUN[:-1] + ['Remembered: ' + VM_ID], report


def busybox_user(program, _):
    """So it does with the README's line for inittab; and it lets a user in, where that step is named, too."""
    line = from_readme('::once:')
    with_user = line.replace(' ready ', ' user ready ')
    assert with_user != line, line
    report = boot_busybox(program, with_user)
    was_asked(report, [ENDPOINTS['adminUsername'], ENDPOINTS['publicKeys'], ENDPOINTS['keyData'].replace('/N/', '/0/')])
    expect(report, {'key': KEY})
    assert report['file'] == ['700 1000 .ssh', '600 1000 .ssh/authorized_keys'], report
    assert report['password'][0].startswith('*:'), report
    assert report['journal'][-len(GOOD_RUN):] == GOOD_RUN[:-1] + ['Remembered: ' + VM_ID], report


def boot_busybox(program, line):
    """Boot a system of BusyBox alone that has the README's script for init.d, and one more line in its inittab."""
    root = pathlib.Path(tempfile.mkdtemp(dir=os.getcwd())) / 'root'
    shutil.copytree(str(busybox_tree()), str(root), symlinks=True)
    shutil.copy('%s.%s' % (TESTS.parent / 'azure-provisioning', program), str(root / 'usr/sbin/azure-provisioning'))
    script = root / 'etc/init.d/S50azure-provisioning'
    script.parent.mkdir()
    script.write_text(from_readme('"$1" != start'))
    script.chmod(0o755)
    with (root / 'etc/inittab').open('a') as inittab:
        inittab.write(line)
    names = '\n'.join(sorted(str(path.relative_to(root)) for path in root.rglob('*')))
    with open('initrd', 'wb') as initrd:
        subprocess.run([str(root / 'bin/busybox'), 'cpio', '-o', '-H', 'newc'], input=names.encode(), stdout=initrd,
                       check=True, stderr=subprocess.DEVNULL, cwd=str(root))
    report = boot('rdinit=/sbin/init', '-initrd', 'initrd')
    expect(report, {'kernel-hostname': 'web-1', 'static-hostname': 'web-1'})
    return report


@functools.lru_cache(maxsize=None)
def busybox_tree():
    """BusyBox as every command it can be, and Azure's host, with what it is to answer."""
    binary = (package('busybox-static') / 'bin/busybox').resolve()
    root = pathlib.Path(tempfile.mkdtemp(dir=os.getcwd())) / 'busybox'
    shutil.copytree(str(TESTS / 'busybox'), str(root))
    applets = have(binary, '--list-full').split()
    for applet in applets:
        (root / applet).parent.mkdir(parents=True, exist_ok=True)
        (root / applet).symlink_to('/bin/busybox')
    (root / 'bin/busybox').unlink()
    shutil.copy(str(binary), str(root / 'bin'))
    for folder in 'proc', 'sys', 'answers', 'home', 'var/log':
        (root / folder).mkdir(parents=True)
    for endpoint, [answer] in logins.answers([KEY]).items():
        (root / 'answers' / endpoint).write_bytes(answer.data)
    if 'usr/sbin/adduser' not in applets:  # Debian's has none: a run that was cut off has left this
        with open(str(root / 'etc/passwd'), 'a') as passwd, open(str(root / 'etc/shadow'), 'a') as shadow:
            passwd.write('azureuser:x:1000:1000::/home/azureuser:/bin/sh\n')
            shadow.write('azureuser:*:1::::::\n')
    return root


def was_asked(report, before=()):
    """Assert that Azure's host was asked what it is to be asked, and told what it is to be told."""
    assert report['request'] == [*before, *REQUESTS] and report['posted'] == POSTED, report
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


def modules():
    """The kernel's folder of modules."""
    return next(kernel().parent.parent.glob('lib/modules/*'))


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
    checks = [('py', debian), ('sh', debian), ('sh', sandbox), ('py', dvd_udf), ('sh', dvd_iso9660), ('sh', busybox),
              ('sh', busybox_user)]
    print('1..%d' % len(checks))
    with in_scratch():
        passed = [tell('%s: %s' % (program, check.__doc__), hold, check, program, options.tree)
                  for program, check in checks]
    sys.exit(0 if all(passed) else 1)


if __name__ == '__main__':
    main()
