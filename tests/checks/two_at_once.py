#!/usr/bin/env python3
"""Two copies of a program at once: both end well, or one says why; none reports NotReady.

python3 tests/checks/two_at_once.py [PROGRAM]... prints a line a check, in TAP. Exit status: 0 all
passed or were skipped, 1. In most rounds, the fake server makes both wait for one another at a
request, so that they do at the same time what comes after it. In some, strace delays each system
call that replaces a file, so that the other copy comes in between.
"""

import concurrent.futures
import contextlib
import os
import shutil
import threading

import kit_path  # noqa: F401  before the modules of the kit
import files
from host import Host, endpoint_of
from programs import hold_programs
from tap import measured
from whole_run import Machine, answers, differences, image

CORES = len(os.sched_getaffinity(0))
MEETINGS = (  # the requests at which both wait for one another
    'adminUsername',
    'publicKeys',
    'keyData',
    'userData',
    'computerName',
    'goalstate',
    'health',
)
ROUNDS = [(meeting, is_slow) for is_slow in (False, True) for meeting in (*MEETINGS, '', '', '')]
SLOW_CALLS = 'write,chmod,fchmod,fchmodat,rename,renameat,renameat2'
DELAY = 10000  # microseconds
MOST_SHOWN = 3  # rounds that went wrong
PATIENCE = 10  # seconds that a request waits for that of the other copy
BOTH = """
"$@" >"$TMPDIR/1.out" 2>"$TMPDIR/1.err" &
first=$!
"$@" >"$TMPDIR/2.out" 2>"$TMPDIR/2.err" &
second=$!
wait "$first"
echo "$?"
wait "$second"
echo "$?"
"""


class MeetingHost(Host):
    """A host that answers a certain request only when both copies have sent it."""

    def __init__(self, meeting):
        super().__init__(answers())
        self.meeting = meeting
        self.barrier = threading.Barrier(2)

    def answer(self, request):
        if endpoint_of(request.line) == self.meeting:
            with contextlib.suppress(threading.BrokenBarrierError):
                self.barrier.wait(PATIENCE)
        return super().answer(request)


def both_end_well(program):
    """Two copies at once, 20 times: both end well, or one says why; none reports NotReady."""
    with Machine(image()) as machine, Host(answers()) as host:
        outcome = machine.run(program, host)
        assert outcome.status == 0, outcome
        wanted = machine.state()
    with concurrent.futures.ThreadPoolExecutor(CORES) as pool:
        problems = list(pool.map(lambda each: problem_of(program, *each, wanted), ROUNDS))
    bad = [problem for problem in problems if problem]
    measured('%d of %d rounds are wrong', len(bad), len(ROUNDS))
    assert not bad, ''.join(bad[:MOST_SHOWN])


def slowly():
    """The words that slow a program down where it replaces files; none without strace."""
    strace = shutil.which('strace')
    if not strace:
        return []
    delay = '--inject=%s:delay_enter=%d' % (SLOW_CALLS, DELAY)
    return [strace, '-f', '-qq', '-e', 'trace=' + SLOW_CALLS, delay, '-o', '/dev/null']


def problem_of(program, meeting, is_slow, wanted):
    """Run two copies at once; return what is wrong then."""
    words = (slowly() if is_slow else []) + ['/bin/sh', '-c', BOTH, 'sh']
    with Machine(image()) as machine, MeetingHost(meeting) as host:
        outcome = machine.run(program, host, tracer=words, AZURE_PROVISIONING_INTERVAL='1')
        statuses = outcome.stdout.split()
        said = [
            files.contents(os.path.join(machine.folder, name)).decode('utf-8', 'replace')
            for name in ('1.err', '2.err')
        ]
        problem = differences(wanted, machine.state())
        posts = b''.join(request.body for request in host.requests)
    if '0' not in statuses or set(statuses) - {'0', '1'}:
        problem += 'exit statuses: %s%s\n' % (outcome.stdout, outcome.stderr)
    for status, lines in zip(statuses, said):
        if status != '0' and not lines:
            problem += 'one fails without a word\n'
    if b'>NotReady<' in posts or b'>Ready<' not in posts:
        problem += 'posted: %s\n' % posts.decode('latin-1')
    if not problem:
        return ''
    slowed = ', slowed down' * is_slow
    return 'both at %s%s:\n%s%s\n' % (meeting or 'any time', slowed, problem, '\n'.join(said))


if __name__ == '__main__':
    hold_programs([both_end_well], with_root=True)
