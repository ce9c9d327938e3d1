#!/usr/bin/env python3
"""What a run may cost at most: failed attempts leak nothing, and no document takes long.

python3 tests/checks/bounds.py [PROGRAM]... prints a line a check, in TAP. Exit status: 0 all passed
or were skipped, 1. A shell script is run by dash, where there is dash.
"""

import collections
import concurrent.futures
import contextlib
import os
import re
import shutil
import signal
import subprocess
import threading

import kit_path  # noqa: F401  before the modules of the kit
import sandbox
from host import Answer, Host, children, good
from programs import hold_programs
from run import command_line
from tap import measured

CORES = len(os.sched_getaffinity(0))
# Attempts that a run says: powers of two.
REFUSED_FIRST, REFUSED_LAST = 256, 2048
# So many more that the run goes on while it is looked at: a pipe holds 1,100 lines of it.
REFUSED_ATTEMPTS = 2400
SILENT_RUNS, SILENT_ATTEMPTS, SILENT_FIRST, SILENT_LAST = 4, 15, 2, 8
MOST_SECONDS = 2  # of CPU, for one document
LIMIT = 600  # seconds, for one run on a machine that is busy
SIZE = 65536  # bytes of a document

Usage = collections.namedtuple('Usage', 'threads descriptors children kilobytes')
# A run is looked at wherever it is in an attempt. Python's memory is that of two threads or of one.
ALLOWED = Usage(threads=2, descriptors=3, children=2, kilobytes=512)


def start(program, host, attempts, timeout, urls=None, **options):
    """Start the step ready."""
    return sandbox.start(
        words_of(program) + ['ready'],
        urls or (host.wireserver, host.imds),
        {
            'PATH': os.environ['PATH'],
            'COMMANDS': '/dev/null',
            'AZURE_PROVISIONING_ATTEMPTS': str(attempts),
            'AZURE_PROVISIONING_INTERVAL': '0',
            'AZURE_PROVISIONING_TIMEOUT': str(timeout),
        },
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        **options,
    )


def words_of(program):
    """The words of a program's command line; dash, where there is one, runs a shell script."""
    words = command_line(program)
    dash = shutil.which('dash')
    return [dash, *words] if dash and words[0].endswith('.sh') else words


@contextlib.contextmanager
def limited(process):
    """Kill a run that takes too long, and what is left of it at the end of the block."""

    def kill():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(LIMIT, kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        kill()


def usage_of(pid):
    """What a process has open, while it is stopped."""
    os.kill(pid, signal.SIGSTOP)
    try:
        with open('/proc/%d/status' % pid) as file:
            status = dict(line.split(':', 1) for line in file)
        return Usage(
            threads=int(status['Threads']),
            descriptors=len(os.listdir('/proc/%d/fd' % pid)),
            children=len(children(pid)),
            kilobytes=int(status['VmRSS'].split()[0]),
        )
    finally:
        os.kill(pid, signal.SIGCONT)


def growth(process, first, last):
    """Read what a run says; return how much more it uses at the last attempt than at the first."""
    usages = {}
    for line in process.stderr:
        match = re.search('attempt ([0-9]+) of', line)
        if match and int(match.group(1)) in (first, last):
            usages[int(match.group(1))] = usage_of(process.pid)
    assert set(usages) == {first, last}, usages
    assert process.wait() == 1, process.returncode
    return Usage(*[after - before for before, after in zip(usages[first], usages[last])])


def assert_no_growth(grown):
    measured('more than at first: %s', grown)
    assert all(more <= allowed for more, allowed in zip(grown, ALLOWED)), grown


def refused_attempts(program):
    """2,400 attempts that are refused leak no threads, descriptors, processes or memory."""
    with Host({}) as host:
        urls = (host.refused, host.refused)
        process = start(
            program,
            host,
            REFUSED_ATTEMPTS,
            5,
            urls,
            stderr=subprocess.PIPE,
            universal_newlines=True,
        )
        with limited(process), process.stderr:
            assert_no_growth(growth(process, REFUSED_FIRST, REFUSED_LAST))


def silent_attempts(program):
    """60 attempts that time out, in four runs at once, leak nothing either."""

    def run(_):
        process = start(
            program, host, SILENT_ATTEMPTS, 1, stderr=subprocess.PIPE, universal_newlines=True
        )
        with limited(process), process.stderr:
            return growth(process, SILENT_FIRST, SILENT_LAST)

    pool = concurrent.futures.ThreadPoolExecutor(SILENT_RUNS)
    with Host({'goalstate': [Answer('fault', 'silent')]}) as host, pool:
        found = list(pool.map(run, range(SILENT_RUNS)))
    for grown in found:
        assert_no_growth(grown)


def whole(middle='', attributes='', incarnation='16', instance='i'):
    """A goal state, with something between its elements."""
    return (
        '<GoalState%s>%s<Incarnation>%s</Incarnation><Container><ContainerId>c</ContainerId>'
        '<RoleInstanceList><RoleInstance><InstanceId>%s</InstanceId></RoleInstance>'
        '</RoleInstanceList></Container></GoalState>' % (attributes, middle, incarnation, instance)
    )


def filled(piece, **others):
    """A goal state of nearly 64 KiB, with a piece again and again between its elements."""
    room = SIZE - len(whole(**others))
    return whole(piece * (room // len(piece)), **others)


def filled_at(name, piece, before='', after=''):
    """The same, with the piece in one of the values."""
    room = SIZE - len(whole(**{name: before + after}))
    return whole(**{name: before + piece * (room // len(piece)) + after})


def nested(name, depth, inner):
    """Elements in one another, and in the innermost ones as many more as there is room for."""
    opened, closed = ('<%s>' % name) * depth, ('</%s>' % name) * depth
    room = SIZE - len(whole(opened + closed))
    return whole(opened + inner * (room // len(inner)) + closed)


def documents():
    """Documents of 64 KiB at most, of the worst shapes, by name."""
    longest = 990  # bytes of a tag that the shell script reads
    many = ' '.join('a%d=""' % number for number in range(longest // 8))
    return {
        'quotes': filled('"'),
        'apostrophes and quotes': filled('\'"'),
        'quotes in one tag': filled_at('attributes', '""', ' a='),
        'open quotes in one tag': filled_at('attributes', '"', ' a='),
        'one long attribute': filled_at('attributes', 'x', ' a="', '"'),
        'attributes in one tag': filled_at('attributes', ' a=""'),
        'many tags with attributes': filled('<a %s/>' % many),
        'many tags with quotes': filled('<a %s/>' % ('""' * (longest // 2))),
        'many tags with quotes in quotes': filled("<a b='%s'/>" % ('"' * longest)),
        'long end tags': filled('<a></a%s>' % (' ' * longest)),
        'long names': filled('<%s/>' % ('a' * longest)),
        'long prefixes': filled('<%s:a/>' % ('a' * longest)),
        'colons': filled('<%sa/>' % (':' * longest)),
        'slashes': filled('<a%s>' % ('/' * longest)),
        'white space in tags': filled('<a%s/>' % (' ' * longest)),
        'depth': nested('a', 8000, 'x'),
        'depth, unclosed': '<GoalState>' + '<a>' * 21800,
        'depth of 2400 and siblings': nested('a', 2400, '<b/>'),
        'depth of 1200 and siblings': nested('abc', 1200, '<b/>'),
        'depth of 500 and siblings with attributes': nested('abcdefgh', 500, '<b c="d"/>'),
        'depth of 800 and texts': nested('a', 800, '<b>c</b>'),
        'one long comment': filled_at('middle', '-', '<!-- ', ' -->'),
        'a comment of <': filled_at('middle', '<', '<!-- ', ' -->'),
        'many comments': filled('<!---->'),
        'an open comment': filled_at('middle', '->', '<!--'),
        'many instructions': filled('<?a?>'),
        'an instruction of <': filled_at('middle', '<', '<?a ', '?>'),
        'one long tag': '<' + 'a' * (SIZE - 2) + '>',
        'a tag without an end': '<GoalState><' + 'a' * (SIZE - 20),
        'many <': '<' * SIZE,
        'many < between elements': filled('<'),
        'many >': filled('>'),
        'empty elements': filled('<a/>'),
        'elements with a text': filled('<a>b</a>'),
        'white space between elements': filled(' \n'),
        'CR between elements': filled('\r'),
        'white space before the root': ' ' * 60000 + whole(),
        'white space behind the root': whole() + '\n' * 60000,
        'white space in a value': filled_at('instance', ' ', 'a', 'b'),
        'words in a value': filled_at('instance', 'a '),
        'CR in a value': filled_at('instance', '\r', 'a', 'b'),
        'entities in a value': filled_at('instance', '&amp;'),
        'references in a value': filled_at('instance', '&#65;'),
        'a long value': filled_at('instance', 'i'),
        'a long number': filled_at('incarnation', '9'),
        'many values': filled('<Incarnation>1</Incarnation>'),
        'many containers': filled('<Container><ContainerId/></Container>'),
        'CDATA': filled_at('middle', ']', '<![CDATA[', ']]>'),
        'many CDATA': filled('<![CDATA[]]>'),
        'a document type': '<!DOCTYPE a [' + '<!ENTITY a "b">' * 4000 + ']>' + whole(),
        'other bytes than ASCII': filled('\u00e9'.encode().decode('latin-1')),
        'not a byte of XML': '\x01' * SIZE,
        'ampersands': filled('&'),
    }


def seconds(program, document):
    """The seconds of CPU that a program takes for a goal state."""
    body = document.encode('latin-1')
    assert len(body) <= SIZE, len(body)
    with Host(good(goalstate=[Answer('body', body)])) as host:
        process = start(program, host, 1, 100, stderr=subprocess.DEVNULL)
        with limited(process):
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.WEXITSTATUS(status) if os.WIFEXITED(status) else -status
    assert process.returncode in (0, 1), process.returncode
    return used.ru_utime + used.ru_stime


def documents_of_64_kib(program):
    """A goal state of 64 KiB takes at most 2 seconds of CPU, whatever is in it."""
    found = documents()
    with concurrent.futures.ThreadPoolExecutor(CORES) as pool:
        taken = list(pool.map(lambda document: seconds(program, document), found.values()))
    slowest = sorted(zip(taken, found), reverse=True)
    shown = ', '.join('%s %.2f s' % (name, took) for took, name in slowest[:5])
    measured('%d documents; %s', len(found), shown)
    slow = ['%s: %.1f s' % (name, took) for took, name in slowest if took > MOST_SECONDS]
    assert not slow, '\n'.join(slow)


CHECKS = [refused_attempts, silent_attempts, documents_of_64_kib]


if __name__ == '__main__':
    hold_programs(CHECKS)
