"""What the first boots share: systems to boot, what they report, the user and the password of
logins, guests in QEMU.

A Machine boots in namespaces (container), a Guest in QEMU. Azure's host has the addresses that it
has in Azure, on the lo of a network namespace without a link, or of a guest without a network card.
"""

import argparse
import collections
import contextlib
import functools
import os
import pathlib
import re
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import textwrap
import time
from xml.sax.saxutils import escape

from kit_path import KIT
import cases
from host import Answer, children, good, network
from run import PROJECT
from tap import Skipped, measured, tell

HERE = pathlib.Path(__file__).resolve().parent


def good_run():
    """What a first boot prints, and what it asks for."""
    found, _ = cases.find('runs/must-default')
    return found[0].expected[0]


SILENT = [Answer('fault', 'silent')]
FEW = '[Service]\nEnvironment=AZURE_PROVISIONING_ATTEMPTS=3\n'  # attempts, not 450
BLOCK = """#!/bin/bash
exec 3<>/dev/tcp/168.63.129.16/80
printf "GET /in-%s-$1 HTTP/1.1\\r\\n\\r\\n" >&3
exec sleep 60
"""  # in the place of a command: tells the host that it is reached, and does not end
PROBE = """[Unit]
After=azure-host.service
[Service]
Type=oneshot
ExecStart=/bin/sh /azure-provisioning-tests/probe {} {}
SyslogIdentifier=probe
{}
[Install]
WantedBy=multi-user.target
"""
GOOD_RUN = good_run()['stdout'].splitlines()
LIMIT = 60  # seconds for a boot
UNSHARE = ['unshare', '--net', '--mount', '--propagation', 'private']
USER = 'azureuser'
KEY = 'ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI me'
PASSWORD = 'it\'s <a> & "b" $HOME \\n %s:x'
OVF = """<?xml version="1.0" encoding="utf-8"?>
<ns0:Environment xmlns:ns0="http://schemas.dmtf.org/ovf/environment/1"
    xmlns:ns1="http://schemas.microsoft.com/windowsazure">
  <ns1:ProvisioningSection>
    <ns1:Version>1.0</ns1:Version>
    <ns1:LinuxProvisioningConfigurationSet>
      <ns1:ConfigurationSetType>LinuxProvisioningConfiguration</ns1:ConfigurationSetType>
      <ns1:HostName>web-1</ns1:HostName>
      <ns1:UserName>{}</ns1:UserName>
      <ns1:UserPassword>{}</ns1:UserPassword>
      <ns1:DisableSshPasswordAuthentication>{}</ns1:DisableSshPasswordAuthentication>
      <ns1:SSH><ns1:PublicKeys>{}</ns1:PublicKeys></ns1:SSH>
      <ns1:CustomData>Y3VzdG9tIGRhdGEK</ns1:CustomData>
    </ns1:LinuxProvisioningConfigurationSet>
  </ns1:ProvisioningSection>
</ns0:Environment>
"""
OVF_KEY = '<ns1:PublicKey><ns1:Value>{}</ns1:Value></ns1:PublicKey>'
UUIDS = ['11111111-2222-3333-4444-%012d\n' % number for number in range(2)]
KEYS = {
    'id_rsa': ['rsa'],
    'id_ed25519': ['ed25519'],
    'id_ecdsa256': ['ecdsa', '-b', '256'],
    'id_ecdsa384': ['ecdsa', '-b', '384'],
    'id_ecdsa521': ['ecdsa', '-b', '521'],
}
PACKAGES = [
    'systemd',
    'systemd-sysv',
    'dbus',
    'python3',
    'curl',
    'iproute2',
    'kmod',
    'openssh-server',
    'sudo',
]
VM_ID, OTHER_ID = [uuid.strip() for uuid in UUIDS]
QEMU = [
    'qemu-system-x86_64',
    '-accel',
    'tcg,thread=multi',
    '-machine',
    'q35',
    '-cpu',
    'max',
    '-smp',
    '2',
    '-m',
    '512',
    '-nodefaults',
    '-no-user-config',
    '-nic',
    'none',
    '-display',
    'none',
    '-no-reboot',
    '-serial',
    'file:console',
    '-uuid',
    VM_ID,
]
# A panic reboots, and that ends QEMU. A getty would wait for a device that nobody announces, for
# there is no udev. The check of the timer fails on a busy machine.
PARAMETERS = 'console=ttyS0 quiet mitigations=off panic=-1 no_timer_check systemd.getty_auto=no '
DISK = 'if=none,id=disk,format=raw,cache=unsafe,file=%s'
GUEST_LIMIT = 300  # seconds for a boot of a guest
REQUESTS = good_run()['requests'].splitlines()
POSTED = [line for line in GOOD_RUN if line.startswith('<Health>')]


class Machine:
    """A system with a program installed; what one boot changes is there at the next."""

    limit = LIMIT

    def __init__(self, program, options, drop_in='', steps=''):
        self.made_of = program, options, drop_in, steps
        self.program = program
        self.tree = options.tree
        self.state = pathlib.Path(tempfile.mkdtemp(dir=options.folder))
        self.upper = self.state / 'upper'
        self.units = self.upper / 'etc/systemd/system'
        self.units.mkdir(parents=True)
        for own in (
            self.units,
            self.upper / 'etc/init.d',
            self.upper / 'etc/runlevels',
        ):  # hide those of the tree
            own.mkdir(exist_ok=True)
            os.setxattr(str(own), 'trusted.overlay.opaque', b'y')
        for link in (
            'dbus.service',
            'sockets.target.wants/dbus.socket',
        ):  # but not which D-Bus daemon it has
            original = pathlib.Path(self.tree, 'etc/systemd/system', link)
            if original.is_symlink():
                (self.units / link).parent.mkdir(exist_ok=True)
                (self.units / link).symlink_to(os.readlink(str(original)))
        self.write('etc/machine-id', '')
        self.write('etc/hostname', 'image\n')
        self.write('etc/systemd/journald.conf.d/tests.conf', '[Journal]\nStorage=volatile\n')
        self.install(program, steps)
        shutil.copytree(str(HERE / 'image'), str(self.upper / 'azure-provisioning-tests'))
        for unit in self.upper.glob('azure-provisioning-tests/*.service'):
            unit.rename(self.units / unit.name)
        if drop_in:
            self.write('etc/systemd/system/azure-provisioning.service.d/tests.conf', drop_in)
        self.enable('azure-provisioning', 'report', 'never')

    def install(self, program, steps):
        arguments = ['IMPL=' + program, 'STEPS=' + steps, 'DESTDIR=%s' % self.upper]
        installed = subprocess.run(
            ['make', '-s', 'install', *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            universal_newlines=True,
            cwd=str(PROJECT),
        )
        assert installed.returncode == 0, installed.stdout

    def write(self, path, text, mode=0o644):
        path = self.upper / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)

    def link(self, path, target):
        (self.upper / path).parent.mkdir(parents=True, exist_ok=True)
        (self.upper / path).symlink_to(target)

    def hide(self, path):
        """Have a file of the tree be missing."""
        (self.upper / path).parent.mkdir(parents=True, exist_ok=True)
        os.mknod(str(self.upper / path), 0o600 | stat.S_IFCHR, os.makedev(0, 0))

    def enable(self, *units):
        subprocess.run(
            ['systemctl', '-q', '--root=%s' % self.upper, 'enable']
            + [unit + '.service' for unit in units],
            check=True,
        )

    def disable(self):
        """Disable the unit before the boot."""
        (self.units / 'multi-user.target.wants/azure-provisioning.service').unlink()

    def mask(self, *units):
        subprocess.run(
            ['systemctl', '-q', '--root=%s' % self.upper, '--force', 'mask'] + list(units),
            check=True,
        )

    def enabled(self):
        return (self.units / 'multi-user.target.wants/azure-provisioning.service').is_symlink()

    def cost(self):
        """The CPU time of the last boot, all of it, in milliseconds."""
        said = (self.state / 'cpu.stat').read_text()
        return int(re.search('^usage_usec (.+)', said, re.MULTILINE).group(1)) / 1000

    def start(self, *before):
        """Start systemd, by way of a command if there is one before."""
        return subprocess.Popen(
            [*before, str(HERE / 'container'), self.tree, str(self.state)],
            stdin=subprocess.PIPE if before else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            universal_newlines=True,
        )

    def boot(self, meanwhile=lambda up: False):
        """Boot, and wait for the power to go off; return the report, a list a name.

        What is to be done meanwhile is called again and again with the seconds since the system was
        up, with multi-user.target; once it returns True, the power is cut.
        """
        console = self.state / 'console'
        console.write_text('')
        process = self.start()
        self.began, was_up, self.cut = time.monotonic(), None, False
        try:
            end = self.began + self.limit
            while process.poll() is None and not self.cut and time.monotonic() < end:
                if was_up is None and 'up=yes' in console.read_text(errors='replace'):
                    was_up = time.monotonic()
                self.cut = meanwhile(time.monotonic() - was_up if was_up else 0)
                time.sleep(0.002)
        finally:
            if process.poll() is None:
                os.kill(children(process.pid)[1], 9)  # systemd, below the script and unshare
            said = process.communicate()[0]
        report = read_report(console.read_text(errors='replace'))
        assert self.cut or 'reported' in report, 'the boot did not come to its end: %s%s' % (
            said,
            report,
        )
        return report


def read_report(console):
    """What image/report said on the console: the values of each name."""
    report = collections.defaultdict(list)
    for line in console.splitlines():
        name, _, value = line.strip().partition('=')
        report[name].append(value)
    return report


def from_page(page, words):
    """The example in a page of the project that has these words."""
    examples = re.findall('(?:^    .*\n|^\n(?=    ))+', (PROJECT / page).read_text(), re.MULTILINE)
    (example,) = [each for each in examples if words in each]
    return textwrap.dedent(example).strip() + '\n'


def is_provisioned(report, posts):
    """Assert that Azure was told once, the hostname is set, the unit disabled and ended well."""
    expect(report, {'enabled': 'disabled', 'kernel-hostname': 'web-1', 'static-hostname': 'web-1'})
    assert re.search('Deactivated successfully|Succeeded', ' '.join(report['systemd'])), report
    assert len(posts) == 1, posts


def expect(report, values):
    assert all(report[name] == [value] for name, value in values.items()), report


def probed(machine):
    """Boot a machine that tries what the sandbox is for: without it, in all of it, and in each
    directive alone.
    """
    machine.write('usr/lib/modules/probe', '')
    machine.write('etc/tmpfiles.d/probe.conf', 'f /tmp/probe\n')
    lines = [
        line
        for line in (machine.units / 'azure-provisioning.service')
        .read_text()
        .partition('# The sandbox')[2]
        .partition('[Install]')[0]
        .splitlines()
        if re.match('[A-Z][A-Za-z]*=', line)
    ]
    scopes = {'without': [], 'whole': lines}
    probes = [
        line.split()[0]
        for line in (HERE / 'image/probes').read_text().splitlines()
        if line[0] != '#'
    ]
    names = {each.strip('+').partition(',')[0] for each in probes}
    assert names == {line.partition('=')[0] for line in lines}, names
    for probe in probes:
        scopes[probe] = [
            line for line in lines if line.partition('=')[0] in probe.strip('+').split(',')
        ]
    for number, (scope, lines) in enumerate(scopes.items()):
        machine.write(
            'etc/systemd/system/probe-%d.service' % number,
            PROBE.format(scope, scope if scope in probes else '', '\n'.join(lines)),
        )
    machine.enable(*['probe-%d' % number for number in range(len(scopes))])
    report = machine.boot()
    hidden = [probe for probe in probes if report['without:' + probe] != ['allowed']]
    measured('not shown here, as it is refused anyway: %s', hidden)
    assert set(hidden) <= {'ProtectClock', 'SystemCallArchitectures'}, (
        hidden
    )  # by a namespace, by some kernels
    for probe in probes:
        wanted = 'allowed' if probe[0] == '+' else 'refused'
        expect(report, {'whole:' + probe: wanted, '%s:%s' % (probe, probe): wanted})


def why_not(options, needed):
    """Why no boot can be tried here, or ''."""
    if os.getuid() != 0:
        return 'not root'
    init = '/sbin/openrc' if options.openrc else '/lib/systemd/systemd'
    for each in ('unshare', 'setpriv', 'ip', 'systemctl', init, *needed):
        if not shutil.which(
            options.tree.rstrip('/') + each if each[0] == '/' else each
        ):  # a path is one in the tree
            return 'no ' + each
    with tempfile.TemporaryDirectory() as folder:
        mounts = """
            mount -t tmpfs none "$1" && cd "$1" && mkdir a b c &&
            mount -t cgroup2 none a && mkdir a/$$ && rmdir a/$$ &&
            mount -t overlay -o "lowerdir=$2,upperdir=b,workdir=c" none b"""
        tried = subprocess.run(
            UNSHARE + ['sh', '-c', mounts, 'sh', folder, options.tree],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            universal_newlines=True,
        )
        return 'no namespaces: ' + tried.stdout.replace('\n', ' ') if tried.returncode else ''


def inside(program, options):
    """Run the checks for a program, in a network of our own; return the exit status."""
    assert {name for _, name in socket.if_nameindex()} == {'lo'}, 'a network with a link'
    subprocess.run(
        ['mount', '-t', 'tmpfs', 'tmpfs', options.folder], check=True
    )  # an overlay wants it so
    passed = [
        tell('%s: %s' % (program, check.__doc__), hold, check, program, options)
        for check in options.checks
    ]
    return 0 if all(passed) else 1


LEASE = """address {0} 10.0.0.4/24 dev lo
route {0} 10.0.0.0/24 dev lo
route {0} default via 10.0.0.1 dev lo
"""  # as from a DHCP server; what is sent to the gateway gets lost


def lease(change):
    """Have a DHCP client's address and routes come or go: 'add', 'del'. Azure's addresses are on lo
    whether or not there is a route.
    """
    subprocess.run(
        ['ip', '-force', '-batch', '-'],
        input=LEASE.format(change),
        universal_newlines=True,
        check=change == 'add',
        stderr=subprocess.DEVNULL,
    )


def hold(check, program, options):
    """Hold a new machine with the program against a check, with the network there."""
    lease('del')
    network('del')
    network('add')
    check(Machine(program, options, getattr(check, 'drop_in', ''), getattr(check, 'steps', '')))


def main(about, checks, needed=(), with_openrc=()):
    """Hold the programs against the checks, where this machine has the commands and the tree the
    paths needed.
    """
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--tree', default='/')
    parser.add_argument(
        '--openrc', action='store_true', help='TREE has OpenRC in the place of systemd'
    )
    parser.add_argument('--only', metavar='CHECK', help='the check of this name')
    parser.add_argument('--inside', dest='folder', help=argparse.SUPPRESS)
    parser.add_argument('programs', nargs='*', default=['py', 'sh'], metavar='PROGRAM')
    options = parser.parse_args()
    options.checks = list(with_openrc) if options.openrc else checks
    options.checks = [each for each in options.checks if options.only in (None, each.__name__)]
    if options.folder:
        sys.exit(inside(options.programs[0], options))
    print('1..%d' % (len(options.checks) * len(options.programs)), flush=True)
    reason = why_not(options, needed)
    if reason:
        for program in options.programs:
            for check in options.checks:
                print('ok %s: %s # skip %s' % (program, check.__doc__, reason))
        return
    with tempfile.TemporaryDirectory() as folder:
        again = UNSHARE + [sys.executable, sys.argv[0], '--tree', options.tree, '--inside', folder]
        again += ['--openrc'] * options.openrc
        again += ['--only', options.only] if options.only else []
        # side by side, as most of the time is spent waiting; each line is shown as it comes
        runs = [subprocess.Popen(again + [program]) for program in options.programs]
        for run in runs:
            run.wait()
    sys.exit(1 if any(run.returncode for run in runs) else 0)


def ovf(disable, *keys):
    """What is on the DVD."""
    password = escape(PASSWORD, {'"': '&quot;', "'": '&apos;'})
    keys = ''.join(OVF_KEY.format(escape(key)) for key in keys)
    return OVF.format(USER, password, disable, keys)


def has_user(machine, *keys):
    """Prepare a machine for a user with keys, and return the answers of its Azure host."""
    machine.write('azure-provisioning-tests/logins.d/user', USER)
    machine.write('azure-provisioning-tests/logins.d/password', PASSWORD)
    machine.write('etc/hosts', '127.0.0.1 localhost web-1\n')  # for sudo
    for link in 'sshd.service', 'multi-user.target.wants/ssh.service':  # as its package has it
        (machine.units / link).symlink_to('/lib/systemd/system/ssh.service')
    return answers([make_key(machine, name) for name in keys])


def make_key(machine, name):
    """Make a key pair, the private one for the logins; return the public one."""
    private = machine.upper / 'azure-provisioning-tests/logins.d' / name
    subprocess.run(
        [
            'ssh-keygen',
            '-q',
            '-t',
            *KEYS[name],
            '-N',
            '',
            '-C',
            'me and ' + name,
            '-f',
            str(private),
        ],
        check=True,
    )
    public = private.parent / (name + '.pub')
    line = public.read_text().strip()
    public.unlink()
    return line


def answers(keys):
    """Those of an Azure host that knows a user with these keys."""
    leaves = {
        'adminUsername': USER,
        'publicKeys': ''.join('%d/\n' % number for number, _ in enumerate(keys)),
        'disablePasswordAuthentication': 'false',
        'userData': 'dXNlciBkYXRhCg==',
    }
    leaves = {leaf: [Answer('body', value.encode())] for leaf, value in leaves.items()}
    return good(keyData=[Answer('body', key.encode()) for key in keys], **leaves)


def boot_and_log_in(machine, *options):
    """Boot a machine that logs in to itself in the end; return the report."""
    machine.write(
        'etc/systemd/system/report.service.d/logins.conf',
        '[Service]\nExecStartPost=/azure-provisioning-tests/logins\nTimeoutStartSec=290\n',
    )
    return machine.boot(*options)


def let_in(report, *ways):
    """Assert that these ways to log in lead in, and with sudo to root, with PAM and without; and no
    other does. The second prompt for a password is one of PAM.
    """
    said = {name: value for name, (value, *_) in report.items() if name.startswith('login:')}
    second = {'login:keyboard-interactive:with-PAM'} if 'password' in ways else set()
    ways = {'login:%s:%s' % (way, pam) for way in ways for pam in ('with-PAM', 'without-PAM')}
    ways |= second
    assert ways <= set(said), said
    for way, value in said.items():
        assert value == USER + ' root' if way in ways else 'Permission denied' in value, said


class Guest(Machine):
    """A machine with a disk of its own, the tree and what is over it."""

    def __init__(self, program, tree, steps=''):
        super().__init__(program, argparse.Namespace(tree=tree, folder=os.getcwd()), steps=steps)
        shutil.copytree(str(KIT), str(self.upper / 'azure-provisioning-tests/kit'))
        self.enable('azure-host')
        self.disk = self.state / 'disk'
        self.modules = False

    def boot(self, *options):
        if not self.disk.exists():
            root, work = self.state / 'root', self.state / 'work'
            root.mkdir()
            work.mkdir()
            subprocess.run(
                [
                    'mount',
                    '-t',
                    'overlay',
                    '-o',
                    'lowerdir=%s,upperdir=%s,workdir=%s' % (self.tree, self.upper, work),
                    'none',
                    str(root),
                ],
                check=True,
            )
            if self.modules:
                have('chroot', root, 'depmod', modules().name)
            subprocess.run(
                [
                    'mke2fs',
                    '-q',
                    '-t',
                    'ext4',
                    '-O',
                    '^has_journal',
                    '-d',
                    str(root),
                    str(self.disk),
                    '1G',
                ],
                check=True,
                stdout=subprocess.DEVNULL,
            )
        return boot_guest(
            'root=/dev/nvme0n1 rw',
            '-drive',
            DISK % self.disk,
            '-device',
            'nvme,serial=disk,drive=disk',
            *options,
        )

    def answer(self, answers):
        """Say what Azure's host in this guest answers."""
        for endpoint, [answer] in answers.items():
            name = endpoint + '.http' * (answer.kind == 'http')
            self.write('azure-provisioning-tests/answers/' + name, answer.data.decode('latin-1'))

    def add_modules(self, *folders):
        """Put modules of the kernel in place, before the first boot."""
        for folder in folders:
            shutil.copytree(
                str(modules() / 'kernel' / folder),
                str(self.upper / 'usr/lib/modules' / modules().name / 'kernel' / folder),
            )
        self.modules = True


def boot_guest(parameters, *options):
    """Boot a guest, wait for the power to go off, and return its report, a list a name."""
    done = subprocess.run(
        ['timeout', '--foreground', str(GUEST_LIMIT)]
        + QEMU
        + list(options)
        + ['-kernel', str(kernel()), '-append', PARAMETERS + parameters],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        universal_newlines=True,
    )
    console = pathlib.Path('console').read_text(errors='replace')
    report = read_report(console)
    ended = done.returncode == 0 and 'reported' in report
    assert ended, 'the boot did not come to its end: %s%s' % (done.stdout, console)
    return report


@functools.lru_cache(maxsize=None)
def busybox_tree():
    """BusyBox as every command it can be, and Azure's host, with what it is to answer."""
    binary = (package('busybox-static') / 'bin/busybox').resolve()
    root = pathlib.Path(tempfile.mkdtemp(dir=os.getcwd())) / 'busybox'
    shutil.copytree(str(HERE / 'busybox'), str(root))
    applets = have(binary, '--list-full').split()
    for applet in applets:
        (root / applet).parent.mkdir(parents=True, exist_ok=True)
        (root / applet).symlink_to('/bin/busybox')
    (root / 'bin/busybox').unlink()
    shutil.copy(str(binary), str(root / 'bin'))
    for folder in 'proc', 'sys', 'answers', 'home', 'var/log':
        (root / folder).mkdir(parents=True)
    for endpoint, [answer] in answers([KEY]).items():
        (root / 'answers' / endpoint).write_bytes(answer.data)
    if 'usr/sbin/adduser' not in applets:  # Debian's has none: a run that was cut off has left this
        with open(str(root / 'etc/passwd'), 'a') as passwd, open(
            str(root / 'etc/shadow'), 'a'
        ) as shadow:
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
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        universal_newlines=True,
        timeout=600,
        **options,
    )
    if done.returncode:
        raise Skipped(
            '%s: %s' % (os.path.basename(command[0]), done.stdout.strip().rpartition('\n')[2])
        )
    return done.stdout


@functools.lru_cache(maxsize=None)
def debian_tree():
    tree = os.path.abspath('bookworm')
    have(HERE / 'tree', 'bookworm', tree, *PACKAGES)
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
    name = re.search(
        'Depends: (.+)', have('apt-cache', 'depends', 'linux-image-cloud-amd64')
    ).group(1)
    return next(package(name).glob('boot/vmlinuz-*'))


def modules():
    """The kernel's folder of modules."""
    return next(kernel().parent.parent.glob('lib/modules/*'))


@contextlib.contextmanager
def in_own_folder():
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


def parse(parser):
    """The options; root goes on in a namespace, with which what is mounted here goes."""
    parser.add_argument('--inside', action='store_true', help=argparse.SUPPRESS)
    options = parser.parse_args()
    if os.getuid() == 0 and not options.inside:
        os.execvp('unshare', ['unshare', '--mount', sys.executable] + sys.argv + ['--inside'])
    return options
