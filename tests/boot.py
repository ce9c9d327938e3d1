#!/usr/bin/env python3
"""First boots with a real systemd: python3 tests/boot.py [--tree TREE [--openrc]] [PROGRAM]...

Each check boots a system in which `make install` has put a PROGRAM, py or sh; without one, both are held. systemd
runs as PID 1 in namespaces (tests/container), on an overlay over TREE, without one over this machine's own /. The Azure
host has the addresses it has in Azure, on the lo of a network namespace without a link.
Prints a line a check, in TAP, and what was measured as comments. Exit status: 0 all passed or were skipped, 1.
Needs root, systemd and iproute2.
"""
import argparse
import collections
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
import time

from host import ADDRESSES, GOOD, Answer, Azure, children, network
from run import TESTS, Case
from tap import measured, tell

SILENT = [Answer('fault', 'silent')]
FEW = '[Service]\nEnvironment=AZURE_PROVISIONING_ATTEMPTS=3\n'  # attempts, so that a failure does not take 40 minutes
BLOCK = """#!/bin/bash
exec 3<>/dev/tcp/168.63.129.16/80
printf "GET /in-%s-$1 HTTP/1.1\\r\\n\\r\\n" >&3
exec sleep 60
"""  # in the place of a command: tells the host that it is reached, and does not end
SLOW = """[Unit]
Before=network.target
[Service]
Type=oneshot
ExecStart=/bin/sleep 2
[Install]
WantedBy=network.target
"""  # a network card that gets its lease late, as ifupdown waits for one
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
GOOD_RUN = Case(TESTS / 'cases/runs/must-default').expected[0]['stdout'].splitlines()
LIMIT = 60  # seconds for a boot
UNSHARE = ['unshare', '--net', '--mount', '--propagation', 'private']


class Machine:
    """A system with a program installed; what one boot changes is there at the next."""

    def __init__(self, program, options, drop_in='', steps=''):
        self.tree = options.tree
        self.state = pathlib.Path(tempfile.mkdtemp(dir=options.scratch))
        self.upper = self.state / 'upper'
        self.units = self.upper / 'etc/systemd/system'
        self.units.mkdir(parents=True)
        for own in self.units, self.upper / 'etc/init.d', self.upper / 'etc/runlevels':  # hide those of the tree
            own.mkdir(exist_ok=True)
            os.setxattr(str(own), 'trusted.overlay.opaque', b'y')
        for link in 'dbus.service', 'sockets.target.wants/dbus.socket':  # but not which D-Bus daemon it has
            original = pathlib.Path(self.tree, 'etc/systemd/system', link)
            if original.is_symlink():
                (self.units / link).parent.mkdir(exist_ok=True)
                (self.units / link).symlink_to(os.readlink(str(original)))
        self.write('etc/machine-id', '')
        self.write('etc/hostname', 'image\n')
        self.write('etc/systemd/journald.conf.d/tests.conf', '[Journal]\nStorage=volatile\n')
        arguments = ['IMPL=' + program, 'STEPS=' + steps, 'DESTDIR=%s' % self.upper]
        installed = subprocess.run(['make', '-s', 'install', *arguments], stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT, universal_newlines=True, cwd=str(TESTS.parent))
        assert installed.returncode == 0, installed.stdout
        shutil.copytree(str(TESTS / 'image'), str(self.upper / 'azure-provisioning-tests'))
        for unit in self.upper.glob('azure-provisioning-tests/*.service'):
            unit.rename(self.units / unit.name)
        if drop_in:
            self.write('etc/systemd/system/azure-provisioning.service.d/tests.conf', drop_in)
        self.enable('azure-provisioning', 'report', 'never')

    def write(self, path, text, mode=0o644):
        path = self.upper / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)

    def enable(self, *units):
        subprocess.run(['systemctl', '-q', '--root=%s' % self.upper, 'enable'] + [unit + '.service' for unit in units],
                       check=True)

    def mask(self, *units):
        subprocess.run(['systemctl', '-q', '--root=%s' % self.upper, '--force', 'mask'] + list(units), check=True)

    def enabled(self):
        return (self.units / 'multi-user.target.wants/azure-provisioning.service').is_symlink()

    def boot(self, meanwhile=lambda up: False):
        """Boot, and wait for the power to go off; return the report, a list a name.

        What is to be done meanwhile is called again and again with the seconds since the system was up, with
        multi-user.target; once it returns True, the power is cut.
        """
        console = self.state / 'console'
        console.write_text('')
        process = subprocess.Popen([str(TESTS / 'container'), self.tree, str(self.state)], stdin=subprocess.DEVNULL,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
        self.began, was_up, self.cut = time.monotonic(), None, False
        try:
            while process.poll() is None and not self.cut and time.monotonic() < self.began + LIMIT:
                if was_up is None and 'up=yes' in console.read_text(errors='replace'):
                    was_up = time.monotonic()
                self.cut = meanwhile(time.monotonic() - was_up if was_up else 0)
                time.sleep(.002)
        finally:
            if process.poll() is None:
                os.kill(children(process.pid)[1], 9)  # systemd, below the script and unshare
            said = process.communicate()[0]
        report = read_report(console.read_text(errors='replace'))
        assert self.cut or 'reported' in report, 'the boot did not come to its end: %s%s' % (said, report)
        return report


def read_report(console):
    """What image/report said on the console: the values of each name."""
    report = collections.defaultdict(list)
    for line in console.splitlines():
        name, _, value = line.strip().partition('=')
        report[name].append(value)
    return report


def from_readme(words):
    """The example in the README that has these words."""
    examples = re.findall('(?:^    .*\n|^\n(?=    ))+', (TESTS.parent / 'README.md').read_text(), re.MULTILINE)
    example, = [each for each in examples if words in each]
    return textwrap.dedent(example).strip() + '\n'


def is_provisioned(report, posts):
    """Assert that Azure was told once, the hostname is set, and the unit disabled and ended well."""
    expect(report, {'enabled': 'disabled', 'kernel-hostname': 'web-1', 'static-hostname': 'web-1'})
    assert re.search('Deactivated successfully|Succeeded', ' '.join(report['systemd'])), report
    assert len(posts) == 1, posts


def has_failed(report, line):
    """Assert that the unit failed with this line, stays enabled, and left the hostname alone."""
    expect(report, {'enabled': 'enabled', 'kernel-hostname': 'image', 'static-hostname': 'image',
                    'azure-provisioning.service:ActiveState': 'failed'})
    assert report['journal'][-1] == line, report['journal']


def expect(report, values):
    assert all(report[name] == [value] for name, value in values.items()), report


def boots_again(machine):
    """Assert that another boot asks nothing and keeps the hostname."""
    with Azure() as host:
        report = machine.boot()
        assert not host.requests, host.requests
    assert report['kernel-hostname'] == report['static-hostname'] == ['web-1'], report


def first_boot(machine):
    """The first boot reports Ready, sets the hostname, disables the unit, and says so; the second asks nothing."""
    machine.write('etc/systemd/system/slow.service', SLOW)
    machine.enable('slow')
    with Azure() as host:
        report = machine.boot()
        is_provisioned(report, host.posts())
    ready = host.posts()[0].time
    assert 0 < ready < moment(report, 'network.target'), report
    measured('Ready %.2f s after systemd was started', ready - machine.began)
    said = [line for line in report['journal'] if not line.startswith('Removed ')]  # by systemctl
    assert said == GOOD_RUN, said
    boots_again(machine)


def late_network(machine):
    """The network comes when the login is there: so does Ready. Neither waits for the other, nor for another NIC."""
    network('del')
    came = []

    def meanwhile(up):
        if up > 2.5 and not came:
            network('add')
            came.append(time.monotonic())
    with Azure() as host:
        report = machine.boot(meanwhile)
        is_provisioned(report, host.posts())
    is_prompt(host, came, 'the network')
    expect(report, {'network-online.target:ActiveState': 'inactive', 'getty.target:ActiveState': 'active'})


def late_wireserver(machine):
    """The WireServer comes after 15 seconds: Ready is reported then, without a second boot."""
    came = []

    def meanwhile(up):
        if time.monotonic() > machine.began + 15 and not came:
            host.listen('wireserver', (ADDRESSES['wireserver'], 80))
            came.append(time.monotonic())
    with Azure(away=['wireserver']) as host:
        is_provisioned(machine.boot(meanwhile), host.posts())
    is_prompt(host, came, 'the WireServer')
    boots_again(machine)


def is_prompt(host, came, what):
    """Assert that Ready was reported within two seconds of something."""
    late = host.posts()[0].time - came[0]
    measured('Ready %.2f s after %s', late, what)
    assert 0 < late < 2, late


def no_wireserver(machine):
    """Without a WireServer the unit fails and stays enabled; the next boot provisions."""
    with Azure(away=['wireserver']) as host:
        report = machine.boot()
        assert not host.requests, host.requests
    has_failed(report, 'ready: gave up after 3 attempts')
    with Azure() as host:
        is_provisioned(machine.boot(), host.posts())


def no_imds(machine):
    """Without IMDS Ready is reported, the unit fails and stays enabled; the next boot provisions."""
    with Azure(away=['imds']) as host:
        report = machine.boot()
        assert len(host.posts()) == 1, host.requests
    has_failed(report, 'hostname: gave up after 3 attempts')
    with Azure() as host:
        is_provisioned(machine.boot(), host.posts())


no_wireserver.drop_in = no_imds.drop_in = FEW


def time_limit(machine):
    """A run that does not end is ended: the unit fails and stays enabled."""
    with Azure(dict(GOOD, goalstate=SILENT)):
        expect(machine.boot(), {'enabled': 'enabled', 'azure-provisioning.service:ActiveState': 'failed'})


time_limit.drop_in = '[Service]\nRuntimeMaxSec=3\n'


def power_cut(machine):
    """Everything is killed at each point between Ready and disabled: the next boot ends well."""
    def asked(what):
        return lambda up: any(what in request.line for request in host.requests)
    for answers, blocked, cut, again in (
            (dict(GOOD, health=SILENT), 'none', asked('health'), True),
            (dict(GOOD, computerName=SILENT), 'none', asked('computerName'), True),
            (GOOD, 'hostnamectl', asked('in-hostnamectl-set-hostname'), True),
            (GOOD, 'systemctl', asked('in-systemctl-disable'), True),
            (GOOD, 'none', lambda up: not machine.enabled(), False)):
        machine.write('usr/local/sbin/' + blocked, BLOCK % blocked, 0o755)
        with Azure(answers) as host:
            machine.boot(cut)
            assert machine.cut and len(host.posts()) == 1, host.requests
        (machine.upper / 'usr/local/sbin' / blocked).unlink()
        assert machine.enabled() == again
        if again:
            with Azure() as host:
                is_provisioned(machine.boot(), host.posts())
        boots_again(machine)
        machine.write('etc/hostname', 'image\n')
        machine.enable('azure-provisioning')


def sandbox(machine):
    """Each directive of the unit's sandbox refuses, alone, what it is there for, and together they refuse all of it."""
    with Azure():
        probed(machine)


def probed(machine):
    """Boot a machine that tries what the sandbox is for: without it, in all of it, and in each directive alone."""
    machine.write('usr/lib/modules/probe', '')
    machine.write('etc/tmpfiles.d/probe.conf', 'f /tmp/probe\n')
    lines = [line for line in (machine.units / 'azure-provisioning.service').read_text().partition('# The sandbox')[2]
             .partition('[Install]')[0].splitlines() if re.match('[A-Z][A-Za-z]*=', line)]
    scopes = {'without': [], 'whole': lines}
    probes = [line.split()[0] for line in (TESTS / 'image/probes').read_text().splitlines() if line[0] != '#']
    names = {each.strip('+').partition(',')[0] for each in probes}
    assert names == {line.partition('=')[0] for line in lines}, names
    for probe in probes:
        scopes[probe] = [line for line in lines if line.partition('=')[0] in probe.strip('+').split(',')]
    for number, (scope, lines) in enumerate(scopes.items()):
        machine.write('etc/systemd/system/probe-%d.service' % number, PROBE.format(
            scope, scope if scope in probes else '', '\n'.join(lines)))
    machine.enable(*['probe-%d' % number for number in range(len(scopes))])
    report = machine.boot()
    hidden = [probe for probe in probes if report['without:' + probe] != ['allowed']]
    measured('not shown here, as it is refused anyway: %s', hidden)
    assert set(hidden) <= {'ProtectClock', 'SystemCallArchitectures'}, hidden  # by a namespace, by some kernels
    for probe in probes:
        wanted = 'allowed' if probe[0] == '+' else 'refused'
        expect(report, {'whole:' + probe: wanted, '%s:%s' % (probe, probe): wanted})


def no_bus(machine):
    """Without D-Bus the hostname cannot be set: the unit fails and says so."""
    machine.mask('dbus.socket', 'dbus.service')
    with Azure():
        has_failed(machine.boot(), 'hostname: cannot write /etc/hostname')


def no_bus_drop_in(machine):
    """Without D-Bus, the README's drop-in has the hostname set, and the unit disabled."""
    machine.mask('dbus.socket', 'dbus.service')
    with Azure() as host:
        is_provisioned(machine.boot(), host.posts())


no_bus_drop_in.drop_in = from_readme('CapabilityBoundingSet=')


def other_steps(machine):
    """The README's drop-in for other steps has just these run."""
    with Azure() as host:
        report = machine.boot()
        assert len(host.requests) == 2, host.requests
    expect(report, {'enabled': 'disabled', 'static-hostname': 'image'})


other_steps.drop_in = from_readme('ready disable')


def moment(report, unit):
    """When a unit became active, as time.monotonic() tells the time; 0 if it did not."""
    return int(report[unit + ':ActiveEnterTimestampMonotonic'][0]) / 1e6


def openrc(machine):
    """With OpenRC and the README's service, Ready is reported, the hostname set, the service taken from default."""
    machine.write('etc/init.d/azure-provisioning', from_readme('openrc-run'), 0o755)
    for runlevel in 'sysinit', 'boot', 'default':
        (machine.upper / 'etc/runlevels' / runlevel).mkdir()
    (machine.upper / 'etc/runlevels/default/azure-provisioning').symlink_to('/etc/init.d/azure-provisioning')
    with Azure() as host:
        report = machine.boot()
        assert len(host.posts()) == 1, host.requests
    expect(report, {'enabled': '0', 'kernel-hostname': 'web-1', 'static-hostname': 'web-1'})
    assert [line for line in report['journal'] if line in GOOD_RUN] == GOOD_RUN, report
    with Azure() as host:
        expect(machine.boot(), {'static-hostname': 'web-1'})
        assert not host.requests, host.requests


CHECKS = [first_boot, late_network, late_wireserver, no_wireserver, no_imds, time_limit, power_cut, sandbox, no_bus,
          no_bus_drop_in, other_steps]


def why_not(options, needed):
    """Why no boot can be tried here, or ''."""
    if os.getuid() != 0:
        return 'not root'
    init = '/sbin/openrc' if options.openrc else '/lib/systemd/systemd'
    for each in ('unshare', 'setpriv', 'ip', 'systemctl', init, *needed):
        if not shutil.which(options.tree.rstrip('/') + each if each[0] == '/' else each):  # a path is one in the tree
            return 'no ' + each
    with tempfile.TemporaryDirectory() as scratch:
        mounts = """
            mount -t tmpfs none "$1" && cd "$1" && mkdir a b c && mount -t cgroup2 none a && mkdir a/$$ && rmdir a/$$ &&
            mount -t overlay -o "lowerdir=$2,upperdir=b,workdir=c" none b"""
        tried = subprocess.run(UNSHARE + ['sh', '-c', mounts, 'sh', scratch, options.tree], stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, universal_newlines=True)
        return 'no namespaces: ' + tried.stdout.replace('\n', ' ') if tried.returncode else ''


def inside(program, options):
    """Run the checks for a program, in a network of our own; return the exit status."""
    assert {name for _, name in socket.if_nameindex()} == {'lo'}, 'a network with a link'
    subprocess.run(['mount', '-t', 'tmpfs', 'tmpfs', options.scratch], check=True)  # an overlay wants it so
    passed = [tell('%s: %s' % (program, check.__doc__), hold, check, program, options) for check in options.checks]
    return 0 if all(passed) else 1


def hold(check, program, options):
    """Hold a new machine with the program against a check, with the network there."""
    network('del')
    network('add')
    check(Machine(program, options, getattr(check, 'drop_in', ''), getattr(check, 'steps', '')))


def main(about, checks, needed=()):
    """Hold the programs against the checks, where this machine has the commands and the tree the paths needed."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--tree', default='/')
    parser.add_argument('--openrc', action='store_true', help='TREE has OpenRC in the place of systemd')
    parser.add_argument('--inside', dest='scratch', help=argparse.SUPPRESS)
    parser.add_argument('programs', nargs='*', default=['py', 'sh'], metavar='PROGRAM')
    options = parser.parse_args()
    options.checks = [openrc] if options.openrc else checks
    if options.scratch:
        sys.exit(inside(options.programs[0], options))
    print('1..%d' % (len(options.checks) * len(options.programs)), flush=True)
    reason = why_not(options, needed)
    if reason:
        for program in options.programs:
            for check in options.checks:
                print('ok %s: %s # skip %s' % (program, check.__doc__, reason))
        return
    with tempfile.TemporaryDirectory() as scratch:
        again = UNSHARE + [sys.executable, sys.argv[0], '--tree', options.tree, '--inside', scratch]
        again += ['--openrc'] * options.openrc
        runs = [subprocess.Popen(again + [program], stdout=subprocess.PIPE, universal_newlines=True)
                for program in options.programs]  # side by side, as most of the time is spent waiting
        for run in runs:
            print(run.communicate()[0], end='')
    sys.exit(1 if any(run.returncode for run in runs) else 0)


if __name__ == '__main__':
    main(__doc__, CHECKS)
