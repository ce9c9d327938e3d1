#!/usr/bin/env python3
"""Put every sequence of tokens through both parsers: python3 tests/checks/exhaustive.py [LENGTH
[SHELL]]

A sequence of up to LENGTH tokens (6) stands in a goal state, at one of several places. The document
is given to request_goal_state of both scripts, in one process each and without a request. Both must
come to the outcome that an XML library comes to, but for what the contract leaves open. Exit
status: 0 they do, 1 they do not, 3 nothing can be run here.
"""

import collections
import importlib.util
import itertools
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import time
from xml.parsers import expat

import kit_path  # noqa: F401  before the modules of the kit
import sandbox
from reference import NO_GOAL_STATE, REFUSALS, allowed, outcome
from run import OURS

NOWHERE = 'http://127.0.0.1:9'
OFTEN = 5  # seconds from one word of progress to the next
SHOWN = 20  # disagreements of a process

INCARNATION = b'<Incarnation>1</Incarnation>'
CONTAINER_ID = b'<ContainerId>c</ContainerId>'
ROLES = (
    b'<RoleInstanceList><RoleInstance><InstanceId>i</InstanceId></RoleInstance></RoleInstanceList>'
)
CONTAINER = b'<Container>' + CONTAINER_ID + ROLES + b'</Container>'
GOAL_STATE = b'<GoalState>' + INCARNATION + CONTAINER + b'</GoalState>'

DOCUMENT = [
    b'<GoalState>',
    b'</GoalState>',
    b'<E>',
    b'</E>',
    INCARNATION + CONTAINER,
    b'<!--<E>-->',
    b'\xef\xbb\xbf',
    b'7',
    b' ',
]
ELEMENTS = [
    b'<GoalState>',
    b'</GoalState>',
    b'<Incarnation>',
    b'</Incarnation>',
    b'<Container>',
    b'</Container>',
    b'<ContainerId>',
    b'</ContainerId>',
    b'<Incarnation/>',
    b'<!--<E>-->',
    b'<?e <E>?>',
    b'7',
    b' ',
    b'<',
    b'>',
]
IDS = [
    b'<RoleInstanceList><RoleInstance>',
    b'</RoleInstance></RoleInstanceList>',
    b'</RoleInstance>',
    b'<RoleInstance>',
    b'<InstanceId>',
    b'</InstanceId>',
    b'<ContainerId>',
    b'</ContainerId>',
    b'<ContainerId/>',
    b'</Container>',
    b'<Container>',
    b'7',
    b'\r\n',
]
MARKUP = [
    b'<!--',
    b'-->',
    b'<?',
    b'?>',
    b'<?xml version="1.0"?>',
    b'<!DOCTYPE GoalState>',
    b'<![CDATA[',
    b']]>',
    b'<E>',
    b'</E>',
    b'<',
    b'&',
    b'7',
    b' ',
]
ATTRIBUTES = [b' ', b'a', b'=', b'"', b"'", b'/', b'>', b'<', b':', b'&', b' b="c"', b'-->']

Place = collections.namedtuple('Place', 'name start end tokens longest')
PLACES = [
    Place('alone', b'', b'', DOCUMENT, 5),
    Place('first in the root', b'<GoalState>', GOAL_STATE[11:], ELEMENTS, 6),
    Place(
        'among the ids',
        b'<GoalState>' + INCARNATION + b'<Container>',
        CONTAINER[11:] + b'</GoalState>',
        IDS,
        5,
    ),
    Place('before the root', b'', GOAL_STATE, MARKUP, 5),
    Place('behind the root', GOAL_STATE, b'', MARKUP, 5),
    Place('in the root', b'<GoalState>' + INCARNATION, CONTAINER + b'</GoalState>', MARKUP, 5),
    Place(
        'in a value',
        b'<GoalState><Incarnation>1',
        b'2</Incarnation>' + CONTAINER + b'</GoalState>',
        MARKUP,
        5,
    ),
    Place('in a start tag', b'<GoalState><Incarnation', GOAL_STATE[23:], ATTRIBUTES, 5),
    Place(
        'in an end tag',
        b'<GoalState>' + INCARNATION[:-1],
        b'>' + CONTAINER + b'</GoalState>',
        ATTRIBUTES,
        5,
    ),
]

# It follows the shell script, whose last line is left out. The arguments are START, END, the first
# tokens, how many more there may be, and all tokens. It prints the outcome for each document, the
# shorter ones before the longer ones that begin as they do.
DRIVER = """
set -u
set -f
LC_ALL=C
exchange() {
    :
}
say() {
    :
}
run() {
    exit 99
}
try() { # TEXT MORE TOKEN...
    local text="$1" more="$2" token
    shift 2
    body=$START$text$END
    if request_goal_state; then
        echo "$incarnation $container_id $instance_id"
    else
        echo "$reason"
    fi
    if [ "$more" -gt 0 ]; then
        for token; do
            try "$text$token" $((more - 1)) "$@"
        done
    fi
}
START=$1
END=$2
shift 2
try "$@"
"""

Job = collections.namedtuple('Job', 'place text more')


class Pair:
    """Both scripts, which are given the same documents, and what came of them."""

    def __init__(self, shell, program):
        self.shell, self.program = shell, program
        self.source = shell_source()
        self.counts = {place.name: collections.Counter() for place in PLACES}
        self.shown = 0

    def hold(self, job):
        """Hold both scripts against the library, for all documents of a job."""
        place = PLACES[job.place]
        words = self.shell + ['-c', self.source, 'sh', place.start, place.end, job.text]
        process = sandbox.start(
            words + ['%d' % job.more] + place.tokens,
            (NOWHERE, NOWHERE),
            {'PATH': os.environ['PATH'], 'COMMANDS': '/dev/null'},
            stdout=subprocess.PIPE,
        )
        with process.stdout:
            self.compare(place, job.text, job.more, process.stdout, False)
            rest = process.stdout.read()
        assert process.wait() == 0 and not rest, 'the shell ended otherwise than it should'

    def compare(self, place, text, more, lines, refused):
        """Compare the outcomes for a sequence, and for all that begin with it.

        refused: whether the library has refused what the sequence begins with.
        """
        document = place.start + text + place.end
        outcomes = self.outcome_in_python(document), lines.readline().decode('latin-1')[:-1]
        right = NO_GOAL_STATE if refused else outcome(document)
        counts = self.counts[place.name]
        counts['documents'] += 1
        if outcomes != (right, right):
            self.judge(place, document, right, outcomes)
        elif right not in REFUSALS:
            counts['taken'] += 1
        if more > 0:
            refused = refused or is_refused(place.start + text)
            for token in place.tokens:
                self.compare(place, text + token, more - 1, lines, refused)

    def outcome_in_python(self, document):
        """What the Python script makes of a document."""
        self.program.exchange = lambda *_: (200, document)
        try:
            return ' '.join(self.program.request_goal_state())
        except self.program.Failed as failure:
            return str(failure)

    def judge(self, place, document, right, outcomes):
        """Count a document for which a script comes to another outcome than the library."""
        counts = self.counts[place.name]
        if allowed(document).issuperset(outcomes):
            counts['open'] += 1
            return
        counts['disagreements'] += 1
        self.shown += 1
        if self.shown <= SHOWN:
            said = (place.name, document, right) + outcomes
            print('%s: %r\n  library: %s\n  Python:  %s\n  shell:   %s' % said, flush=True)


def is_refused(beginning):
    """Whether the library refuses all documents that begin so."""
    try:
        expat.ParserCreate().Parse(beginning, False)
    except expat.ExpatError:
        return True
    return False


def shell_source():
    """The shell script without its last line, which would run it, and the driver behind it."""
    source = pathlib.Path(OURS[1]).read_text(encoding='utf-8')
    functions, last = source.rstrip('\n').rsplit('\n', 1)
    assert last == 'main "$@"', 'the last line of the shell script is another one: %s' % last
    return functions + DRIVER


def load_python():
    """The Python script as a module that can request nothing."""
    sys.dont_write_bytecode = True
    spec = importlib.util.spec_from_file_location('azure_provisioning', OURS[0])
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    program.say = lambda *_: None
    program.do_exchange = program.run = program.run_even_dry = None
    program.settings.wireserver = program.settings.imds = NOWHERE
    return program


def all_jobs(length):
    """All documents, in jobs of some ten thousands, in an order that spreads the work."""
    jobs = []
    for number, place in enumerate(PLACES):
        longest = min(length, place.longest)
        fixed = min(longest, max(1, longest - 4))  # tokens that all documents of a job begin with
        jobs.append(Job(number, b'', fixed - 1))
        for tokens in itertools.product(place.tokens, repeat=fixed):
            jobs.append(Job(number, b''.join(tokens), longest - fixed))
    random.Random(1).shuffle(jobs)
    return jobs


def work(pair, jobs, show_progress):
    """Do all jobs, and return the counts."""
    spoke = time.monotonic()
    for done, job in enumerate(jobs):
        pair.hold(job)
        if show_progress and time.monotonic() > spoke + OFTEN:
            spoke = time.monotonic()
            print('  %d %%' % (100 * (done + 1) / len(jobs)), file=sys.stderr, flush=True)
    return pair.counts


def fork_worker(pair, jobs, show_progress):
    """Do the jobs in a new process; return its pid, and a file that it writes its counts to."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        return pid, open(reader)
    status = 1
    try:
        os.close(reader)
        with open(writer, 'w') as file:
            json.dump(work(pair, jobs, show_progress), file)
        status = 0
    finally:
        sys.stdout.flush()
        os._exit(status)


def hold_all(pair, jobs):
    """Do all jobs, in a process for each processor; return the counts for each place."""
    number = len(os.sched_getaffinity(0))
    workers = [fork_worker(pair, jobs[first::number], first == 0) for first in range(number)]
    total = {place.name: collections.Counter() for place in PLACES}
    for pid, file in workers:
        with file:
            counted = file.read()
        if os.waitpid(pid, 0)[1] != 0:
            sys.exit('a process did not come to its end')
        for name, counts in json.loads(counted).items():
            total[name].update(counts)
    return total


def main():
    length = int(sys.argv[1]) if len(sys.argv) > 1 else 6
    shell = sys.argv[2].split() if len(sys.argv) > 2 else ['sh']
    refused = sandbox.refusal()
    if refused or not shutil.which(shell[0]):
        print('nothing was run: %s' % (refused or 'no %s here' % shell[0]))
        sys.exit(3)
    total = hold_all(Pair(shell, load_python()), all_jobs(length))
    line = '%-18s %10s %10s %10s %14s'
    columns = ('documents', 'taken', 'open', 'disagreements')
    print(line % (('place',) + columns))
    for name, counts in total.items():
        print(line % ((name,) + tuple(counts[column] for column in columns)))
    whole = sum(total.values(), collections.Counter())
    print(line % (('all',) + tuple(whole[column] for column in columns)))
    is_empty = any(counts['taken'] == 0 for counts in total.values())  # then a place tests nothing
    sys.exit(1 if whole['disagreements'] or is_empty else 0)


if __name__ == '__main__':
    main()
