#!/usr/bin/env python3
"""Measure this program beside cloud-init and waagent, in the same boots: tests/bench/agents.py

Makes trees of Debian 12 and 13 with each agent, boots them in turn with a real systemd, and prints
tables in Markdown: of VMs whose host is there, and of VMs whose WireServer is away for a minute.
Can draw a picture of the first ones. Needs root, mmdebstrap and a mirror of Debian, and about an
hour on a machine that is otherwise idle. Exit status: 0, 1 if a boot failed, 3 if nothing could be
run.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import io
import json
import os
import pathlib
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date

import boot_path  # noqa: F401  before the modules of the kit and of the boots
import picture
from host import network
from lib import UNSHARE, why_not
from azure_vm import HERE, KEY, OURS, STUBBED, UNITS, VM

BOOTS = 5
AWAY = 60  # seconds
APART = 20  # seconds between the starts of VMs whose WireServer is away: they wait side by side
BEGIN, END = '<!-- make bench-agents: begin -->\n', '<!-- make bench-agents: end -->\n'
PATIENCE = 300  # seconds, for a boot and all around it
BASE = 'systemd systemd-sysv dbus udev openssh-server sudo iproute2 ca-certificates ifupdown'
CLIENTS = {'bookworm': 'isc-dhcp-client', 'trixie': 'dhcpcd-base'}
RELEASES = {'bookworm': 'Debian 12', 'trixie': 'Debian 13'}
PULLED_IN = {
    'none': [],
    'py': ['python3'],
    'sh': ['curl'],
    'cloud-init': ['cloud-init'],
    'waagent': ['waagent'],
}
USER_STEPS = 'user hostname ready disable'
# subject -> its agent and its steps; cloud-init and waagent always make the user, too
SUBJECTS = {
    'no agent': ('none', ''),
    '.py': ('py', ''),
    '.sh': ('sh', ''),
    '.py, user and key': ('py', USER_STEPS),
    '.sh, user and key': ('sh', USER_STEPS),
    'cloud-init': ('cloud-init', ''),
    'waagent': ('waagent', ''),
}
OUR_SUBJECTS, PEERS = ['.py', '.sh'], ['cloud-init', 'waagent']
COMPARED = OUR_SUBJECTS + PEERS  # in the picture, and without a WireServer
TARGETS = [  # a figure, what it is, whose it is compared with, and how many times that has to be
    ('extra_cpu', 'extra CPU of the boot', 'cloud-init', 15),
    ('extra_cpu', 'extra CPU of the boot', 'waagent', 7),
    ('cpu_to_ready', 'CPU until Ready', 'cloud-init', 6),
    ('memory', 'largest process', 'cloud-init', 3),
]
ROWS = [  # what a table shows of a boot, its key, and a format
    ('start of systemd → Ready, s', 'ready', '%.2f'),
    ('start of its first unit → Ready, s', 'from_unit', '%.2f'),
    ('network → Ready, s', 'from_network', '%.2f'),
    ('WireServer → Ready, s', 'from_wireserver', '%.2f'),
    ('start of systemd → all started, s', 'finished', '%.2f'),
    ('CPU of its units until Ready, ms', 'cpu_to_ready', '%.0f'),
    ('CPU of its units, ms', 'cpu', '%.0f'),
    ('of that, new SSH host keys, ms', 'keys_cpu', '%.0f'),
    ('extra CPU of the whole boot, ms', 'extra_cpu', '%.0f'),
    ('largest process, MiB', 'memory', '%.1f'),
    ('processes until Ready', 'processes_to_ready', '%.0f'),
    ('processes', 'processes', '%.0f'),
    ('journal lines', 'lines', '%.0f'),
]


def tree_of(trees, release, agent):
    """A tree with an agent's packages, made if it is not there."""
    path = trees / ('%s-%s' % (release, agent))
    if not path.exists():
        print('making %s ...' % path.name, file=sys.stderr, flush=True)
        packages = BASE.split() + [CLIENTS[release]] + PULLED_IN[agent]
        made = path.with_suffix('.new')
        subprocess.run(
            [str(HERE.parent / 'boot/tree'), release, str(made), *packages],
            check=True,
        )
        made.rename(path)
    return path


def packages(tree):
    """The packages of a tree: name -> version and KiB."""
    found = {}
    for block in (tree / 'var/lib/dpkg/status').read_text().split('\n\n'):
        fields = dict(re.findall('(?m)^(Package|Version|Installed-Size): (.*)$', block))
        if fields:
            found[fields['Package']] = fields['Version'], int(fields.get('Installed-Size', 0))
    return found


def inside(options):
    """Boot one VM, in namespaces of our own, and print what it cost, as JSON."""
    agent, steps = SUBJECTS[options.subject]
    subprocess.run(['mount', '-t', 'tmpfs', 'tmpfs', options.folder], check=True)
    network('add')
    tree = str(tree_of(options.trees, options.inside, agent))
    vm = VM(agent, steps, tree, options.folder, options.away)
    print(json.dumps(figures(vm, vm.measured_boot())))


def figures(vm, report):
    """What a boot cost, after a look whether it did what it is for."""

    def moment(name):
        return int(report[name][0] or 0) / 1e6

    began = moment('UserspaceTimestampMonotonic')
    found = {
        'place': vm.place,
        'boot_cpu': vm.figures['boot_cpu'],
        'finished': moment('FinishTimestampMonotonic') - began,
    }
    assert not report['failed'], report
    if vm.agent == 'none':
        return found
    assert report['hostname'] == ['web-1'], report
    has_user = vm.agent not in OURS or (vm.upper / 'home/azureuser').exists()
    assert not has_user or report['keys'] == [KEY], report
    units = UNITS[vm.agent]
    starts = [moment(unit + ':ExecMainStartTimestampMonotonic') for unit in units]
    cpu = [report[unit + ':CPUUsageNSec'][0] for unit in units]
    ready = vm.host.ready
    found.update(
        has_user=has_user,
        ready_at=ready,
        ready=ready - began,
        from_unit=ready - min(start for start in starts if start),
        from_network=ready - vm.network,
        cpu=sum(int(each) for each in cpu if each.isdigit()) / 1e6,
        cpu_to_ready=vm.cpu_at_ready,
        living_memory=vm.figures['living_memory'],
        lines=int(report['lines'][0]),
        requests=collections.Counter(name for _, name in vm.host.asked_for),
        requests_to_ready=sum(at <= ready for at, _ in vm.host.asked_for),
    )
    if vm.came:
        found['from_wireserver'] = ready - vm.came
    return found


def boot(subject, release, options, away=0, delay=0):
    """Boot one VM while its processes are watched; return what it cost, or None if it failed."""
    time.sleep(delay)
    watch = subprocess.Popen(
        [sys.executable, str(HERE / 'watch.py')], stdout=subprocess.PIPE, universal_newlines=True
    )
    watch.stdout.readline()
    command = [sys.executable, __file__, '--inside', release, '--subject', subject]
    command += ['--away', str(away), '--trees', str(options.trees)]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            ['timeout', '-s', 'KILL', str(PATIENCE), *UNSHARE, *command, '--folder', folder],
            stdout=subprocess.PIPE,
            universal_newlines=True,
        )
    watch.terminate()
    watched = json.loads(watch.communicate()[0])
    said = '%s, %s%s: ' % (RELEASES[release], subject, ', WireServer away' if away else '')
    if done.returncode or watched['lost']:
        said += 'FAILED, exit status %s, %s lost' % (done.returncode, watched['lost'])
        print(said, file=sys.stderr, flush=True)
        return None
    found = json.loads(done.stdout.splitlines()[-1])
    add_processes(found, UNITS[SUBJECTS[subject][0]], watched['processes'])
    said += 'Ready after %.2f s, CPU of the boot %.0f ms' % (
        found.get('ready', 0),
        found['boot_cpu'],
    )
    print(said, file=sys.stderr, flush=True)
    return dict(found, subject=subject, release=release, away=away, date=str(date.today()))


def add_processes(found, units, processes):
    """Add what the processes of the units were, if there are any units."""
    if not units:
        return
    place = re.compile('%s/system.slice/(%s)(/|$)' % (found['place'], '|'.join(units)))
    own = [process for process in processes if place.match(process['place'])]
    memory = [process.get('memory', 0) for process in own]
    found.update(
        processes=len(own),
        processes_to_ready=sum(process['began'] < found.get('ready_at', 0) for process in own),
        keys_cpu=sum(each['cpu'] for each in own if each.get('command') == 'ssh-keygen'),
        memory=max([found.get('living_memory', 0)] + memory),
    )


def all_boots(options):
    """Boot everything, in turn; return the boots, None for each that failed."""
    boots = []
    if options.results:
        options.results.write_text('')

    def keep(found):
        boots.append(found)
        if options.results:
            with options.results.open('a') as file:
                file.write(json.dumps(found) + '\n')

    for _ in range(options.boots):
        for release in RELEASES:
            for subject in SUBJECTS:
                keep(boot(subject, release, options))
    with concurrent.futures.ThreadPoolExecutor(len(COMPARED)) as pool:
        for _ in range(options.away_boots):
            for release in RELEASES:
                started = [
                    pool.submit(boot, subject, release, options, AWAY, APART * number)
                    for number, subject in enumerate(COMPARED)
                ]
                for each in started:
                    keep(each.result())
    return boots


class Results:
    """The boots of a release and a situation, in their order, by subject."""

    def __init__(self, boots, release, away):
        self.boots = collections.defaultdict(list)
        for each in boots:
            if each['release'] == release and bool(each['away']) == away:
                self.boots[each['subject']].append(each)
        without = [each['boot_cpu'] for each in self.boots.get('no agent', [])]
        for subject in self.boots:
            if without and subject != 'no agent':
                for each in self.boots[subject]:
                    each['extra_cpu'] = each['boot_cpu'] - statistics.median(without)

    def values(self, subject, key):
        return [each[key] for each in self.boots[subject] if key in each]

    def median(self, subject, key):
        return statistics.median(self.values(subject, key))

    def cell(self, subject, key, form):
        """The median, and the range."""
        values = self.values(subject, key)
        if not values:
            return '–'
        shown = [form % each for each in (statistics.median(values), min(values), max(values))]
        return '%s (%s–%s)' % tuple(shown) if len(set(shown)) > 1 else shown[0]

    def table(self, title, sizes):
        subjects = [each for each in SUBJECTS if each in self.boots]
        rows = [
            [text] + [self.cell(subject, key, form) for subject in subjects]
            for text, key, form in ROWS
            if any(self.values(subject, key) for subject in subjects)
        ]
        rows.append(['requests until Ready'] + [self.to_ready(subject) for subject in subjects])
        rows.append(['requests'] + [self.requests(subject) for subject in subjects])
        rows.append(['installed, KiB'] + [sizes[SUBJECTS[subject][0]] for subject in subjects])
        table(title, [''] + subjects, *rows)

    def to_ready(self, subject):
        return self.cell(subject, 'requests_to_ready', '%.0f')

    def requests(self, subject):
        """The endpoints that were asked, with the median of how often."""
        counted = self.values(subject, 'requests')
        names = sorted({name for each in counted for name in each})
        often = [statistics.median(each.get(name, 0) for each in counted) for name in names]
        return ', '.join('%s %g' % each for each in zip(names, often)) or '–'


def table(title, *rows):
    print('\n### %s\n' % title)
    for number, row in enumerate(rows):
        print('| %s |' % ' | '.join(map(str, row)))
        if number == 0:
            print('|---' * len(row) + '|')
    sys.stdout.flush()


def installed(trees, release):
    """By agent, its own KiB, and those of the packages that come with it."""
    base = packages(tree_of(trees, release, 'none'))
    sizes = {'none': '–'}
    for agent in UNITS:
        found = packages(tree_of(trees, release, agent))
        new = {name: size for name, (_, size) in found.items() if name not in base}
        own = new.pop(agent, 0)
        if agent in OURS:
            files = ['azure-provisioning.' + agent, 'azure-provisioning.service']
            own = sum((HERE.parents[1] / name).stat().st_size for name in files) // 1024 + 1
        if agent != 'none':
            sizes[agent] = '{:,} + {:,}'.format(own, sum(new.values()))
    return sizes


def targets(results, release):
    """What was to be reached, and what was got: a row each."""
    rows = []

    def add(text, got, wanted, met):
        rows.append((RELEASES[release], text, got, wanted, 'yes' if met else '**no**'))

    for ours in OUR_SUBJECTS:
        for key, what, peer, least in TARGETS:
            times = results.median(peer, key) / results.median(ours, key)
            text = '%s: %s, by which %s is higher' % (ours, what, peer)
            add(text, '%.1f times' % times, 'at least %d' % least, times >= least)
        latest = max(results.values(ours, 'ready'))
        earliest = min(min(results.values(peer, 'ready')) for peer in PEERS)
        text = '%s: latest Ready, and the earliest of the others, s' % ours
        add(text, '%.2f' % latest, 'before %.2f' % earliest, latest < earliest)
        after = results.median(ours, 'from_network')
        add(ours + ': network → Ready, s', '%.2f' % after, 'at most 0.3', after <= 0.3)
    return rows


def versions(trees):
    """What was measured, as a sentence a release."""
    for release in RELEASES:
        found = {}
        for agent in UNITS:
            found.update(packages(tree_of(trees, release, agent)))
        names = ['systemd', 'python3', 'curl', 'dash', 'cloud-init', 'waagent']
        said = ['%s %s' % (name, found[name][0]) for name in names]
        print('- %s: %s' % (RELEASES[release], ', '.join(said)))


def show(boots, options):
    """Print all tables, and put them in the page and the picture in its file, if they are named."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        shown = tables(boots, options)
    print(text.getvalue(), end='')
    if options.svg and shown:
        options.svg.write_text(picture.draw(shown, COMPARED))
    if options.page:
        before, begin, rest = options.page.read_text().partition(BEGIN)
        _, end, after = rest.partition(END)
        assert end, '%s has no place for the tables' % options.page
        options.page.write_text(before + begin + text.getvalue() + '\n' + end + after)


def tables(boots, options):
    """Print all tables; return the results of the first ones, by release."""
    good = [each for each in boots if each]
    days = ' and '.join(sorted({each['date'] for each in good}))
    print('Measured on %s, Linux %s, %d cores.\n' % (days, platform.release(), os.cpu_count()))
    versions(options.trees)
    print('\nHow the systems were booted:\n\n' + STUBBED, end='')
    rows, shown = [], {}
    for away in False, True:
        for release in RELEASES:
            results = Results(good, release, away)
            if not results.boots:
                continue
            title = '%s%s: medians of %d boots, and ranges' % (
                RELEASES[release],
                ', WireServer away for %d s' % AWAY if away else '',
                max(map(len, results.boots.values())),
            )
            results.table(title, installed(options.trees, release))
            if not away and all(results.boots[subject] for subject in SUBJECTS):
                shown[RELEASES[release]] = results
                rows += targets(results, release)
    table('Targets', ['', 'target', 'got', 'wanted', 'met?'], *rows)
    if len(good) < len(boots):
        print('\n%d boots failed, and are not in the tables.' % (len(boots) - len(good)))
    return shown


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--boots', type=int, default=BOOTS, metavar='N', help='of each')
    parser.add_argument('--away-boots', type=int, default=BOOTS, metavar='N', help='of those')
    parser.add_argument('--trees', type=pathlib.Path, help='a folder where the trees are kept')
    parser.add_argument('--svg', type=pathlib.Path, metavar='FILE', help='the picture')
    parser.add_argument('--page', type=pathlib.Path, metavar='FILE', help='where the tables go')
    parser.add_argument('--results', type=pathlib.Path, metavar='FILE', help='a JSON line a boot')
    parser.add_argument('--again', action='store_true', help='show those of FILE; boot nothing')
    for own in '--inside', '--subject', '--folder':
        parser.add_argument(own, help=argparse.SUPPRESS)
    parser.add_argument('--away', type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        inside(options)
        return
    options.tree, options.openrc = '/', False
    refused = why_not(options, ['mmdebstrap'])
    if refused:
        print('nothing was run: %s' % refused)
        sys.exit(3)
    with tempfile.TemporaryDirectory(dir='/var/tmp') as folder:
        options.trees = (options.trees or pathlib.Path(folder)).resolve()
        for release in RELEASES:
            for agent in UNITS:
                tree_of(options.trees, release, agent)
        if options.again:
            boots = [json.loads(line) for line in options.results.read_text().splitlines()]
        else:
            boots = all_boots(options)
        show(boots, options)
    sys.exit(0 if all(boots) else 1)


if __name__ == '__main__':
    main()
