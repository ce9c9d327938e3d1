#!/usr/bin/env python3
"""Measure what a first boot costs, beside the least it could cost: python3 tests/bench/bench.py

Prints tables in Markdown, the targets last, in five minutes; agents.py measures whole boots. On a
busy machine figures are noise: each is the median over rounds in which everything is run once, in
turn, and a ratio is the median of the rounds' ratios. Exit status: 0, or 1 if a target that is a
gate is missed.
"""

import collections
import concurrent.futures
import os
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import kit_path  # noqa: F401  before the modules of the kit
import cases
import sandbox
from host import Answer, Host, endpoint_of, good
from run import OURS, Run as CaseRun

HERE = pathlib.Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / 'checks'))
from bounds import documents  # noqa: E402

ROUNDS, SIZE_ROUNDS, STEPS_ROUNDS = 15, 3, 5
WORST = 5  # shapes that are shown
REFUSED, SILENT = 100, 5  # attempts
AGENTS = 500
PATIENCE = 120  # seconds, for whatever is started
KIB = 1024
PYTHON, SHELL = OURS
SHELLS = [shell for shell in ('dash', 'bash', 'busybox ash') if shutil.which(shell.split()[0])]
PROGRAMS = dict(
    [('azure-provisioning.py', [PYTHON])]
    + [('azure-provisioning.sh, %s' % shell, shell.split() + [SHELL]) for shell in SHELLS]
)
BASELINES = {name: str(HERE / 'baselines' / name) for name in ('plain.py', 'plain.sh', 'curl.sh')}
INTERPRETER = '/usr/bin/python3'  # as in the first line of azure-provisioning.py
PLAIN, CURL = 'two requests, plain Python', 'three curl, nothing else'
# what is measured -> its command line, and what it is compared with
MEASURED = {
    "python3 -IS -c ''": ([INTERPRETER, '-IS', '-c', ''], PLAIN),
    PLAIN: ([INTERPRETER, BASELINES['plain.py']], PLAIN),
    'the same, python3 -IS': ([INTERPRETER, '-IS', BASELINES['plain.py']], PLAIN),
    "sh -c ''": (['sh', '-c', ''], CURL),
    CURL: (['sh', BASELINES['curl.sh']], CURL),
    'two requests, plain shell': (['sh', BASELINES['plain.sh']], CURL),
}
MEASURED.update(
    (name, (command, PLAIN if command == [PYTHON] else CURL)) for name, command in PROGRAMS.items()
)

# A process inherits the peak memory of the one it was forked from, so a small one starts what is
# measured. First on its PATH is the folder COMMANDS_THAT_COST_NOTHING, if there is one.
GAUGE = [
    sys.executable,
    '-IS',
    '-c',
    """
import os, sys, time
cheap = os.environ.pop('COMMANDS_THAT_COST_NOTHING', '')
os.environ['PATH'] = cheap + ':' + os.environ['PATH'] if cheap else os.environ['PATH']
start = time.monotonic()
_, status, usage = os.wait4(os.spawnvp(os.P_NOWAIT, sys.argv[1], sys.argv[1:]), 0)
print()
print(status, (usage.ru_utime + usage.ru_stime) * 1e3, (time.monotonic() - start) * 1e3,
usage.ru_maxrss / 1024)
""",
]
# A PID namespace numbers its processes from 1, this shell, without a gap. No file can be written to
# in it.
COUNT = [
    'unshare',
    '--pid',
    '--fork',
    'sh',
    '-c',
    'ulimit -f 0; "$@" >/dev/null; status=$?; : & echo "$status $(($! - 2))"',
    'sh',
]

DOCUMENT = good()['goalstate'][0].data
Run = collections.namedtuple('Run', 'status cpu wall memory said requests connections sent wrote')
targets = []


class Meter(Host):
    """A host that counts its connections, and the bytes of its replies."""

    connections = sent = 0

    def serve(self, connection, server):
        with self.lock:
            self.connections += 1
        super().serve(connection, server)

    def message(self, answer):
        message = super().message(answer)
        with self.lock:
            self.sent += len(message)
        return message


class Fleet(Host):
    """A host for many agents, told apart by their base URLs, that turns away as many requests as it
    will grant.

    Of ten requests, one is reset. Each goal state has a new incarnation; only a report with the
    latest is taken.
    """

    def __init__(self, agents):
        super().__init__({})
        self.busy = 3 * agents
        self.incarnations = collections.Counter()
        self.asked_by = collections.Counter()
        self.ready = collections.defaultdict(list)

    def answer(self, request):
        agent = int(re.search('/agent/([0-9]+)/', request.line).group(1))
        endpoint = endpoint_of(request.line)
        with self.lock:
            turn = sum(self.asked.values())
            self.asked[endpoint] += 1
            self.asked_by[agent] += 1
            if turn % 10 == 9:
                return Answer('fault', 'reset')
            if turn < self.busy:
                return refusal('429 Too Many Requests' if turn % 2 else '503 Service Unavailable')
            if endpoint == 'goalstate':
                self.incarnations[agent] += 1
                return Answer('body', self.goal_state(agent))
            if endpoint in ('computerName', 'name'):  # to the latter after five resets in a row
                return Answer('body', b'vm-%d' % agent)
            wanted = re.findall(b'>([^<>]+)<', self.goal_state(agent)) + [b'Ready']
            if re.findall(b'>([^<>]+)<', request.body) != wanted:
                return refusal('410 Gone')
            self.ready[agent].append(request.time)
            return good()['health'][0]

    def goal_state(self, agent):
        return (
            b'<GoalState><Incarnation>%d</Incarnation><Container><ContainerId>c-%d</ContainerId>'
            b'<RoleInstanceList><RoleInstance><InstanceId>i-%d</InstanceId></RoleInstance>'
            b'</RoleInstanceList></Container></GoalState>'
        ) % (self.incarnations[agent], agent, agent)


def refusal(status):
    return Answer('http', b'HTTP/1.1 %s\r\nContent-Length: 0\r\n\r\n' % status.encode())


def environment(home, **settings):
    return dict(PATH=os.environ['PATH'], COMMANDS='/dev/null', HOME=home, TMPDIR=home, **settings)


def run(command, answers=None, reach=True, **settings):
    """Run a command against a host of its own, or with nobody to reach, and measure it.

    The commands of the default run are /bin/true: what they cost is not the program's.
    """
    with Meter(answers or good()) as host, tempfile.TemporaryDirectory() as home:
        for name in 'hostnamectl', 'systemctl':
            os.symlink('/bin/true', os.path.join(home, name))
        before = os.stat(home).st_mtime_ns
        process = sandbox.start(
            GAUGE + command,
            (host.wireserver, host.imds) if reach else (host.refused, host.refused),
            environment(home, COMMANDS_THAT_COST_NOTHING=home, **settings),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        printed, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, 'the gauge ended with status %d' % process.returncode
        said, status, costs = gauged(printed.decode())
        return Run(
            status,
            *costs,
            said,
            len(host.requests),
            host.connections,
            host.sent,
            os.stat(home).st_mtime_ns != before,
        )


def gauged(printed):
    """What was said, the exit status, and the gauge's figures."""
    said, _, measured = printed.strip().rpartition('\n')
    status, *costs = map(float, measured.split())
    return said.strip(), int(status), costs


def succeeded(did):
    assert did.status == 0, 'a run failed: %s' % (did,)
    return did


def rounds(number, subjects):
    """Run all the subjects, by name, that often; the first round is for warmth. Return the runs by
    name.
    """
    turns = [
        {name: succeeded(run(*subject)) for name, subject in subjects.items()}
        for _ in range(number + 1)
    ]
    return {name: [turn[name] for turn in turns[1:]] for name in subjects}


def median(runs, what):
    return statistics.median(getattr(each, what) for each in runs)


def ratio(runs, others, what='cpu'):
    return statistics.median(
        getattr(run, what) / getattr(other, what) for run, other in zip(runs, others)
    )


def table(title, *rows):
    print('\n### %s\n' % title)
    for number, row in enumerate(rows):
        print('| %s |' % ' | '.join(map(str, row)))
        if number == 0:
            print('|---' * len(row) + '|')
    sys.stdout.flush()


def target(text, got, met, gate=True):
    """A target; one that is no gate is noisy, or was not measured, and only printed."""
    targets.append((text, got, 'yes' if met else '**no**', 'gate' if gate else ''))


def first_boot():
    """What a run costs; return the runs by name."""
    runs = rounds(ROUNDS, {name: (command,) for name, (command, _) in MEASURED.items()})
    rows, counts = [], {}
    for name, (command, baseline) in MEASURED.items():
        counted = run(COUNT + command)
        status, counts[name] = (
            map(int, counted.said.split()) if counted.said else (0, 'not measured')
        )
        wrote = status != 0 or counted.wrote or any(each.wrote for each in runs[name])
        rows.append(
            [name]
            + [
                '%.1f (%.2f)' % (median(runs[name], what), ratio(runs[name], runs[baseline], what))
                for what in ('cpu', 'wall', 'memory')
            ]
            + [counts[name]]
            + [getattr(runs[name][0], what) for what in ('requests', 'connections', 'sent')]
            + ['some' if wrote else 'none']
        )
        if name in PROGRAMS and command != [PYTHON]:
            target('%s: no temporary file' % name, rows[-1][-1], not wrote)
            target(
                '%s: at most 12 processes' % name,
                counts[name],
                counted.said and counts[name] <= 12,
                gate=bool(counted.said),
            )
            cpu = ratio(runs[name], runs[CURL])
            target(
                '%s: CPU at most 1.5 times the three curl calls' % name,
                '%.2f' % cpu,
                cpu <= 1.5,
                gate=False,
            )
        elif name in PROGRAMS:
            cpu, memory = (ratio(runs[name], runs[PLAIN], what) for what in ('cpu', 'memory'))
            target('%s: no more CPU than the plain script' % name, '%.2f' % cpu, cpu <= 1, False)
            target('%s: CPU at most 1.1 times the plain script' % name, '%.2f' % cpu, cpu <= 1.1)
            target('%s: peak memory at most 5 %% above it' % name, '%.2f' % memory, memory <= 1.05)
    table(
        'A first boot: median of %d rounds, in parentheses the ratio to the row 1.00' % ROUNDS,
        [
            '',
            'CPU, ms',
            'wall, ms',
            'memory, MiB',
            'processes',
            'requests',
            'connections',
            'bytes read',
            'files written',
        ],
        *rows,
    )
    print(
        "\nProcesses are counted with the first; of memory, what sh -c '' shows is the gauge's own."
    )
    return {name: runs[name] for name in PROGRAMS}


def repeated(each, room):
    """A text with a number in it, again and again, cut where it ends in the same character."""
    text = ''.join(each % number for number in range(room // len(each)))
    return text[: text.rindex(each[-1], 0, room) + 1]


def tags_with_attributes(room):
    """A tag of more than 1,000 bytes need not be taken."""
    tag = '<E%s/>' % ''.join(' a%02d="x"' % number for number in range(100))
    return tag * (room // len(tag))


def deep_elements(room):
    """An element that is nested more deeply than 1,000 levels need not be taken."""
    element = '<E>' * 1000 + '</E>' * 1000
    return element * (room // len(element))


SHAPES = {  # what may fill a goal state, by the bytes that there is room for
    'elements': lambda room: repeated('<E><F>%d</F></E>\n', room),
    'one long text': lambda room: '<E>%s</E>' % repeated('text %d ', room - len('<E></E>')),
    'many short lines': lambda room: '<E>%s</E>' % repeated('%d\n', room - len('<E></E>')),
    'attributes': tags_with_attributes,
    'depth': deep_elements,
}


def grown(shape, size):
    """The platform's goal state, with more in it, so that it has that many bytes."""
    room = size - len(DOCUMENT)
    filling = SHAPES[shape](room).ljust(room)
    return DOCUMENT.replace(b'<Machine>', filling.encode() + b'<Machine>', 1)


def large_goal_states():
    """How the cost of a run grows with the goal state, by what fills it."""
    sizes = (32 * KIB, 64 * KIB)
    subjects = {name: (command,) for name, command in PROGRAMS.items()}
    for shape in SHAPES:
        for size in sizes:
            document = grown(shape, size)
            assert len(document) == size
            subjects.update(
                ((name, shape, size), (command, good(goalstate=[Answer('body', document)])))
                for name, command in PROGRAMS.items()
            )
    runs = rounds(SIZE_ROUNDS, subjects)
    rows = []
    for name in PROGRAMS:
        ratios = {
            shape: [ratio(runs[name, shape, size], runs[name]) for size in sizes]
            for shape in SHAPES
        }
        rows.append([name] + ['%.2f, %.2f' % tuple(pair) for pair in ratios.values()])
        dear = ['%s %.2f' % (shape, whole) for shape, (_, whole) in ratios.items() if whole > 1.5]
        target(
            '%s: a goal state of 64 KiB costs at most 1.5 runs' % name,
            ', '.join(dear) or 'all do',
            not dear,
            gate=name == 'azure-provisioning.py',
        )  # each tag costs a shell twenty commands
        # Twice the bytes cost twice as much, or four times where it is quadratic; a fifth of a run
        # may be noise.
        steep = [
            '%s %.1f' % (shape, (whole - 1) / max(half - 1, 0.01))
            for shape, (half, whole) in ratios.items()
            if whole - 1 > max(0.2, 3 * (half - 1))
        ]
        target(
            '%s: its cost grows linearly at most' % name,
            ', '.join(steep) or 'all do',
            not steep,
            gate=False,
        )
    table(
        'CPU of a run with a goal state of 32 and of 64 KiB, as a ratio to one of 2 KiB',
        [''] + list(SHAPES),
        *rows,
    )


def worst_shapes(normal):
    """What a goal state of 64 KiB costs in the worst shapes, also if it is refused."""
    found = {name: Answer('body', text.encode('latin-1')) for name, text in documents().items()}
    rows = []
    for name, command in PROGRAMS.items():
        cost = {
            shape: run(
                command + ['ready'], good(goalstate=[body]), AZURE_PROVISIONING_ATTEMPTS='1'
            ).cpu
            for shape, body in found.items()
        }
        worst = sorted(cost, key=cost.get, reverse=True)[:WORST]
        rows.append(
            [name, '%.0f' % median(normal[name], 'cpu')]
            + ['%s: %.0f' % (shape, cost[shape]) for shape in worst]
        )
    title = 'CPU of the step ready, ms, with the %d worst of %d goal states of 64 KiB'
    head = ['', 'a normal run'] + ['%d.' % (place + 1) for place in range(WORST)]
    table(title % (WORST, len(found)), head, *rows)


class StepsRun(CaseRun):
    """A run for a case, with the gauge in the place of strace."""

    def tracer(self):
        return GAUGE


def user_and_password(normal):
    """What a run costs that makes a user with a key and a password, with stubs for commands."""
    (case,), _ = cases.find('users/must-default')
    (other,), _ = cases.find('passwords/must-default')
    case.before.update((path, other.before[path]) for path in ('/dev/sr0', '/etc/ssh/sshd_config'))
    case.arguments = ['user', 'password', 'hostname', 'ready', 'disable']
    case.answers.update(good())
    title = 'A run with `%s`, median of %d rounds' % (' '.join(case.arguments), STEPS_ROUNDS)
    runs = collections.defaultdict(list)
    for _ in range(STEPS_ROUNDS + 1):
        for name, command in PROGRAMS.items():
            did = StepsRun(case, ' '.join(command), {})
            _, status, costs = gauged(did.did['stdout'])
            assert status == 0, did.did
            runs[name].append([*costs, len(did.requests)])
    rows = []
    for name in PROGRAMS:
        cpu, wall, memory, requests = map(statistics.median, zip(*runs[name][1:]))
        share = cpu / median(normal[name], 'cpu')
        rows.append([name, '%.1f (%.2f)' % (cpu, share), '%.1f' % wall, '%.1f' % memory, requests])
    head = ['', 'CPU, ms (as a ratio to the default run)', 'wall, ms', 'memory, MiB', 'requests']
    table(title, head, *rows)


def attempts():
    """What an attempt costs while nobody listens, and while nobody answers."""

    def cost(command, number, silent):
        settings = {
            'AZURE_PROVISIONING_ATTEMPTS': str(number),
            'AZURE_PROVISIONING_INTERVAL': '0',
            'AZURE_PROVISIONING_TIMEOUT': '1',
        }
        answers = {'goalstate': [Answer('fault', 'silent')]}
        return run(command + ['ready'], answers, reach=silent, **settings).cpu

    rows = []
    for name, command in PROGRAMS.items():
        row = [name]
        for number, silent in (REFUSED, False), (SILENT, True):
            each = (cost(command, number + 1, silent) - cost(command, 1, silent)) / number
            row.append('%.2f' % each)
        rows.append(row)
    head = ['', 'nobody listens, %d attempts' % REFUSED, 'no answer, %d attempts' % SILENT]
    table('CPU of a failed attempt, ms', head, *rows)


def endless(normal):
    """How much memory a run takes where a body has no end, or is announced with 1 GiB."""
    faults = ('endless', 'endless-lines', 'endless-chunks', 'gigabyte')
    with concurrent.futures.ThreadPoolExecutor(len(PROGRAMS) * len(faults)) as pool:
        runs = {
            (name, fault): pool.submit(
                run,
                command + ['ready'],
                {'goalstate': [Answer('fault', fault)]},
                AZURE_PROVISIONING_ATTEMPTS='1',
            )
            for name, command in PROGRAMS.items()
            for fault in faults
        }
    rows = []
    for name in PROGRAMS:
        usual = median(normal[name], 'memory')
        peaks = [runs[name, fault].result().memory for fault in faults]
        rows.append(
            [name, '%.1f' % usual] + ['%.1f (%.2f)' % (peak, peak / usual) for peak in peaks]
        )
        target(
            '%s: memory of an endless body at most 1.5 times that of a normal one' % name,
            '%.2f' % (max(peaks) / usual),
            max(peaks) <= 1.5 * usual,
        )
    table('Memory where the goal state does not end, MiB', ['', 'normal'] + list(faults), *rows)


def spread(values):
    values = sorted(values)
    return '%.3g / %.3g / %.3g / %.3g' % (
        values[0],
        statistics.median(values),
        values[len(values) * 9 // 10],
        values[-1],
    )


def fleet():
    """Many agents at once, half of them of each script, on a host that throttles."""
    with open('/proc/meminfo') as file:
        available = int(re.search('MemAvailable: *([0-9]+)', file.read()).group(1)) // KIB
    agents = min(AGENTS, available // 16)  # MiB that an agent takes
    before = os.times()
    with Fleet(agents) as host, tempfile.TemporaryDirectory() as home:
        started, processes = [], []
        for agent in range(agents):
            url = '%s/agent/%d' % (host.wireserver, agent)
            started.append(time.monotonic())
            with open(os.path.join(home, str(agent)), 'w') as errors:
                processes.append(
                    sandbox.start(
                        [OURS[agent % 2]],
                        (url, url),
                        environment(home),
                        stdout=subprocess.DEVNULL,
                        stderr=errors,
                    )
                )
        deadline = time.monotonic() + PATIENCE
        for agent, process in enumerate(processes):
            try:
                process.wait(max(0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.returncode != 0:
                with open(os.path.join(home, str(agent))) as errors:
                    print(
                        '\nAgent %d ended with status %d:\n%s'
                        % (agent, process.returncode, errors.read())
                    )
        done = sum(process.returncode == 0 for process in processes)
        once = sum(len(host.ready[agent]) == 1 for agent in range(agents))
        mean = sum(host.asked_by.values()) / agents
        rows = []
        for script in range(2):
            ours = range(script, agents, 2)
            rows.append(
                [
                    OURS[script].rpartition('/')[2],
                    len(ours),
                    spread(host.asked_by[agent] for agent in ours),
                    spread(
                        host.ready[agent][0] - started[agent] for agent in ours if host.ready[agent]
                    ),
                ]
            )
    table(
        '%d agents at once: the first %d requests get 429 or 503, every tenth is reset'
        % (agents, 3 * agents),
        [
            '',
            'agents',
            'requests of an agent: min / median / 90 % / max',
            'seconds to Ready: min / median / 90 % / max',
        ],
        *rows,
    )
    print(
        '\nThe agents took %.0f s of CPU time together, on %d processors.%s'
        % (
            sum(os.times()[2:4]) - sum(before[2:4]),
            os.cpu_count(),
            ' There was memory for no more of them.' if agents < AGENTS else '',
        )
    )
    target('fleet: every agent ends well', '%d of %d' % (done, agents), done == agents)
    target(
        'fleet: exactly one report of each is taken', '%d of %d' % (once, agents), once == agents
    )
    target('fleet: at most 8 requests of an agent on average', '%.1f' % mean, mean <= 8)


def main():
    subprocess.run([sys.executable, str(HERE / 'unit.py')], check=True)  # before the sandbox
    refused = sandbox.refusal()
    if refused:
        print('nothing was run: %s' % refused)
        sys.exit(3)
    normal = first_boot()
    large_goal_states()
    worst_shapes(normal)
    user_and_password(normal)
    attempts()
    endless(normal)
    fleet()
    table('Targets', ['target', 'got', 'met?', ''], *targets)
    sys.exit(any(met != 'yes' and gate for _, _, met, gate in targets))


if __name__ == '__main__':
    main()
