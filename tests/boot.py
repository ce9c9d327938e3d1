#!/usr/bin/env python3
"""First boots with a real systemd: python3 tests/boot.py [--tree TREE] [--drop-in FILE] [PROGRAM]...

Each check boots a system in which `make install` has put a PROGRAM, py or sh, without one first the one, then the
other. systemd runs as PID 1 in namespaces (tests/container), on an overlay over TREE, this machine's own / without
--tree; the Azure host has the addresses it has in Azure, on the lo of a network namespace without a link.
Prints a line a check, in TAP, and what was measured as comments. Exit status: 0 all passed or were skipped, 1.
Needs root, systemd and iproute2.
"""
import argparse
import collections
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback

from host import Answer, Host, children
from run import TESTS, Case

AZURE = {'wireserver': '168.63.129.16', 'imds': '169.254.169.254'}
GOOD = {
    'goalstate': [Answer('body', (TESTS / 'cases/goal-states/must-platform/goalstate.body').read_bytes())],
    'health': [Answer('http', b'HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n')],
    'computerName': [Answer('body', b'web-1')],
    'name': [Answer('body', b'vm_0')],
}
SILENT = [Answer('fault', 'silent')]
FEW = '[Service]\nEnvironment=AZURE_PROVISIONING_ATTEMPTS=3\n'  # attempts, so that a failure does not take 20 minutes
BLOCK = '#!/bin/sh\nexec sleep 60\n'  # in the place of a command
SLOW = """[Unit]
Before=network.target
[Service]
Type=oneshot
ExecStart=/bin/sleep 2
[Install]
WantedBy=network.target
"""  # a network card that gets its lease late, as ifupdown waits for one
GOOD_RUN = Case(TESTS / 'cases/runs/must-default').expected[0]['stdout'].splitlines()
LIMIT = 60  # seconds for a boot


class Azure(Host):
    """The host, at the addresses that it has in Azure, as far as they are on this machine's lo."""

    def __init__(self, answers=GOOD, away=()):
        super().__init__(answers)
        self.away = away

    def __enter__(self):
        for server in AZURE:
            if server not in self.away:
                self.listen(server, (AZURE[server], 80))
        return self

    def posts(self):
        return [request for request in self.requests if request.body]


def network(change):
    """Put Azure's addresses on lo, or take them away: 'add', 'del'."""
    for address in AZURE.values():
        subprocess.run(['ip', 'address', change, address + '/32', 'dev', 'lo'], check=change == 'add',
                       stderr=subprocess.DEVNULL)


class Machine:
    """A system with a program installed; what one boot changes is there at the next."""

    def __init__(self, program, options, drop_in=''):
        self.tree = options.tree
        self.state = pathlib.Path(tempfile.mkdtemp(dir=options.scratch))
        self.upper = self.state / 'upper'
        self.units = self.upper / 'etc/systemd/system'
        self.units.mkdir(parents=True)
        for own in (self.units, self.upper / 'etc/init.d'):  # the system's own do not show through
            own.mkdir(exist_ok=True)
            os.setxattr(str(own), 'trusted.overlay.opaque', b'y')
        self.write('etc/machine-id', '')
        self.write('etc/hostname', 'image\n')
        self.write('etc/systemd/journald.conf.d/tests.conf', '[Journal]\nStorage=volatile\n')
        subprocess.run(['make', '-s', 'install', 'IMPL=' + program, 'DESTDIR=%s' % self.upper], check=True,
                       cwd=str(TESTS.parent))
        shutil.copytree(str(TESTS / 'image'), str(self.upper / 'azure-provisioning-tests'))
        for unit in self.upper.glob('azure-provisioning-tests/*.service'):
            unit.rename(self.units / unit.name)
        for name, text in (('given', options.drop_in), ('check', drop_in)):
            if text:
                self.write('etc/systemd/system/azure-provisioning.service.d/%s.conf' % name, text)
        self.enable('azure-provisioning', 'report', 'never')

    def write(self, path, text, mode=0o644):
        path = self.upper / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)

    def enable(self, *units):
        subprocess.run(['systemctl', '-q', '--root=%s' % self.upper, 'enable'] + [unit + '.service' for unit in units],
                       check=True)

    def enabled(self):
        return (self.units / 'multi-user.target.wants/azure-provisioning.service').is_symlink()

    def hostname(self):
        return (self.upper / 'etc/hostname').read_text().strip()

    def boot(self, cut=None):
        """Boot, and wait for the power to go off, or cut it once cut() is true; return the report, a list a name."""
        process = subprocess.Popen([str(TESTS / 'container'), self.tree, str(self.state)], stdin=subprocess.DEVNULL,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
        deadline = time.monotonic() + LIMIT
        while process.poll() is None:
            if time.monotonic() > deadline or (cut and cut()):
                os.kill(children(process.pid)[1], 9)  # systemd, below the script and unshare
                break
            time.sleep(.002)
        said = process.communicate()[0]
        report = read_report((self.state / 'console').read_text(errors='replace'))
        assert cut or 'reported' in report, 'the boot did not come to its end: %s%s' % (said, report)
        return report


def read_report(console):
    """What image/report said on the console: the values of each name."""
    report = collections.defaultdict(list)
    for line in console.splitlines():
        name, _, value = line.strip().partition('=')
        report[name].append(value)
    return report


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
    start = float(re.search('[0-9.]+', report['systemd'][0]).group())
    measure('Ready %.2f s after the start of the unit', ready - start)
    assert ready - start < 2
    said = [line for line in report['journal'] if not line.startswith('Removed ')]  # by systemctl
    assert said == GOOD_RUN, said
    boots_again(machine)


def late_network(machine):
    """The network is there after 5 seconds: so is Ready. No NIC is waited for, and the login waits for neither."""
    network('del')
    came = []

    def come():
        network('add')
        came.append(time.monotonic())
    with Azure() as host:
        threading.Timer(5.5, come).start()
        report = machine.boot()
        is_provisioned(report, host.posts())
        late = host.posts()[0].time - came[0]
    measure('Ready %.2f s after the network', late)
    assert late < 2, late
    expect(report, {'network-online.target:ActiveState': 'inactive', 'getty.target:ActiveState': 'active'})
    assert 0 < moment(report, 'multi-user.target') < came[0], report


def late_wireserver(machine):
    """The WireServer comes after 15 seconds: Ready is reported then, without a second boot."""
    came = []

    def come():
        host.listen('wireserver', (AZURE['wireserver'], 80))
        came.append(time.monotonic())
    with Azure(away=['wireserver']) as host:
        threading.Timer(15.5, come).start()
        report = machine.boot()
        is_provisioned(report, host.posts())
        late = host.posts()[0].time - came[0]
    measure('Ready %.2f s after the WireServer', late)
    assert late < 2, late
    boots_again(machine)


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


def power_cut(machine):
    """The power is cut at each point between Ready and disabled: the next boot ends well."""
    def asked(endpoint):
        return lambda: any(endpoint in request.line for request in host.requests)
    for answers, blocked, cut, again in (
            (dict(GOOD, health=SILENT), '', lambda: host.posts(), True),
            (dict(GOOD, computerName=SILENT), '', asked('computerName'), True),
            (GOOD, 'hostnamectl', asked('computerName'), True),
            (GOOD, 'systemctl', lambda: machine.hostname() == 'web-1', True),
            (GOOD, '', lambda: not machine.enabled(), False)):
        stub = machine.upper / 'usr/local/sbin' / (blocked or 'none')
        with Azure(answers) as host:
            machine.write(str(stub.relative_to(machine.upper)), BLOCK, 0o755)
            machine.boot(cut)
            assert len(host.posts()) == 1, host.requests
        stub.unlink()
        assert machine.enabled() == again
        if again:
            with Azure() as host:
                is_provisioned(machine.boot(), host.posts())
        boots_again(machine)
        machine.write('etc/hostname', 'image\n')
        machine.enable('azure-provisioning')


def moment(report, unit):
    """When a unit became active, as time.monotonic() tells the time; 0 if it did not."""
    return int(report[unit + ':ActiveEnterTimestampMonotonic'][0]) / 1e6


def measure(text, value):
    print('# ' + text % value)


CHECKS = [first_boot, late_network, late_wireserver, no_wireserver, no_imds, power_cut]


class Skipped(Exception):
    """A check that this machine does not allow."""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--tree', default='/')
    parser.add_argument('--drop-in', type=lambda path: pathlib.Path(path).read_text())
    parser.add_argument('--only', default='')
    parser.add_argument('programs', nargs='*', metavar='PROGRAM')
    options = parser.parse_args()
    if os.environ.get('BOOT_INSIDE') != 'yes':
        os.environ['BOOT_INSIDE'] = 'yes'
        os.execvp('unshare', ['unshare', '--net', '--mount', '--propagation', 'private', sys.executable] + sys.argv)
    options.scratch = tempfile.mkdtemp()
    subprocess.run(['mount', '-t', 'tmpfs', 'tmpfs', options.scratch], check=True)
    for program in options.programs or ['py', 'sh']:
        for check in CHECKS:
            if options.only not in check.__name__: continue
            network('del')
            network('add')
            try:
                t = time.monotonic()
                check(Machine(program, options, getattr(check, 'drop_in', '')))
                print('ok %s: %s %.1f' % (program, check.__doc__, time.monotonic() - t))
            except Exception:
                print('not ok %s: %s' % (program, check.__doc__))
                print('# ' + traceback.format_exc().strip().replace('\n', '\n# '))
            sys.stdout.flush()


if __name__ == '__main__':
    main()
