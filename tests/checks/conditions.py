#!/usr/bin/env python3
"""What no case can show: signals, outputs that go nowhere, a goal state cut at every byte, /etc
full or read-only.

python3 tests/checks/conditions.py [PROGRAM]... prints a line a check, in TAP. Exit status: 0 all
passed or were skipped, 1. A port has to print the same lines here.
"""

import os
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time

import kit_path  # noqa: F401  before the modules of the kit
import files
import sandbox
from host import Answer, Host, children, good
from programs import hold_programs
from run import command_line
from tap import Skipped

WITHOUT_HOSTNAMECTL = """
"$MOUNT" -t tmpfs -o size=8k none /etc && [ ! -e /etc/passwd ] || exit 99
echo old >/etc/hostname && echo old >/proc/sys/kernel/hostname || exit 99
%s
"$@"
status=$?
read -r name </etc/hostname
echo "$(uname -n) $name $(stat -c %%a /etc/hostname) $(cd /etc && echo *)" >"$REPORT"
exit $status
"""
NOT_STORED = """\
hostname: hostnamectl failed; cannot write /etc/hostname, so web-1 lasts until the next boot
"""


def start(program, host, *steps, root=None, stdout=subprocess.PIPE, **settings):
    """Start a program with steps and settings, on the base URLs of a host, or on one of them."""
    urls = (host, host) if isinstance(host, str) else (host.wireserver, host.imds)
    return sandbox.start(
        command_line(program) + list(steps),
        urls,
        dict(PATH=os.environ['PATH'], COMMANDS='/dev/null', **settings),
        root,
        stdout=stdout,
        stderr=subprocess.PIPE,
        universal_newlines=True,
    )


def cut_at_every_byte(program):
    """A goal state cut at any byte is refused, and the whole one then taken."""
    document = good()['goalstate'][0].data
    prefixes = [document[:length] for length in range(document.rindex(b'>') + 1)]
    answers = [Answer('body', each) for each in prefixes + [document]]
    attempts = len(prefixes) + 1
    with Host(good(goalstate=answers)) as host:
        process = start(
            program,
            host,
            'ready',
            AZURE_PROVISIONING_ATTEMPTS=str(attempts),
            AZURE_PROVISIONING_INTERVAL='0',
        )
        _, stderr = process.communicate(timeout=300)
        posts = [request for request in host.requests if request.body]
    line = 'ready: attempt %d of %d: goal state: not a goal state\n'
    # The same failure is said less and less often.
    numbers = [2**power for power in range(attempts.bit_length()) if 2**power < attempts]
    said = ''.join(line % (number, attempts) for number in numbers)
    assert stderr == said, stderr[-500:]
    assert len(posts) == 1 and len(host.requests) == attempts + 1, len(posts)
    assert process.returncode == 0, process.returncode


def ended_by(number, program):
    """A signal ends the run while it waits for an answer, without another word."""
    with Host({'goalstate': [Answer('fault', 'silent')]}) as host:
        process = start(program, host, 'ready')
        while not host.requests:
            assert process.poll() is None, process.communicate()
        # to the program and the client it may have started, as systemd and a terminal do
        for pid in [process.pid] + children(process.pid):
            os.kill(pid, number)
        stdout, stderr = process.communicate(timeout=20)
    assert process.returncode in (-number, 128 + number), process.returncode  # a shell says this
    assert (stdout, stderr) == ('Retrieving goal state from the Wireserver\n', ''), (stdout, stderr)


def sigterm(program):
    """SIGTERM ends the run while it waits for an answer, without another word."""
    ended_by(signal.SIGTERM, program)


def sigint(program):
    """SIGINT ends the run while it waits for an answer, without another word."""
    ended_by(signal.SIGINT, program)


def nobody_listens(program):
    """Ready is reported though nothing that is printed gets anywhere."""
    for redirections in ('>/dev/full 2>/dev/full', '<&- >&- 2>&-', '2>&1'):
        with Host(good()) as host:
            reader, writer = os.pipe()
            os.close(reader)  # nobody reads from it
            command = 'sh -c \'exec "$@" %s\' sh %s' % (redirections, program)
            process = start(command, host, 'ready', stdout=writer)
            os.close(writer)
            process.communicate(timeout=30)
            asked = [request.line[:4] for request in host.requests]
            assert process.returncode == 0, (redirections, process.returncode)
            assert asked == ['GET ', 'POST'], host.requests


def ignored_sigchld(program):
    """A command that fails is seen to fail, though whoever starts the program ignores SIGCHLD."""
    command = 'sh -c \'trap "" CHLD; exec "$@"\' sh %s' % program
    with Host(good()) as host:
        process = start(command, host, 'disable', FAILING='systemctl rc-update')
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == 1, process.returncode
    assert stderr == 'disable: neither systemctl nor rc-update disabled azure-provisioning\n', (
        stderr
    )


def closed_stderr(program):
    """A step that fails ends the run, a bad setting is refused, though stderr is closed."""
    command = 'sh -c \'exec "$@" 2>&-\' sh %s' % program
    with Host({'computerName': [Answer('body', b'web-1')]}) as host:
        for attempts, steps, said, status in (
            ('1', ['ready', 'hostname'], 'Retrieving goal state from the Wireserver\n', 1),
            ('0', ['ready'], '', 2),
        ):
            process = start(command, host, *steps, AZURE_PROVISIONING_ATTEMPTS=attempts)
            assert process.communicate(timeout=30)[0] == said
            assert process.returncode == status, process.returncode
            assert len(host.requests) == 1, host.requests


def network_comes(program):
    """While nobody answers, a wait ends as soon as the kernel has another route."""
    with socket.socket() as server:
        server.bind(('127.0.0.1', 0))
        port = server.getsockname()[1]
        url = 'http://127.0.0.1:%d' % port
        process = start(program, url, 'ready', AZURE_PROVISIONING_INTERVAL='9')
        while 'attempt 2 of' not in process.stderr.readline():  # two seconds to the next one
            assert process.poll() is None
        server.listen(1)
        server.settimeout(20)
        begin = time.monotonic()
        sandbox.add_route(sandbox.UP | sandbox.REJECT, mask=b'\xff\0\0\0', metric=port % 32768)
        server.accept()[0].close()
        seconds = time.monotonic() - begin
        process.kill()
        process.communicate()
    assert seconds < 0.7, seconds


def without_hostnamectl(program):
    """Without hostnamectl, /etc/hostname is replaced and the kernel's name set."""
    did = in_small_etc(program, 'chmod 600 /etc/hostname; umask 077')
    assert did == (0, '', 'web-1 web-1 644 hostname\n'), did


def read_only_etc(program):
    """A read-only /etc: the step fails and says so; the kernel has the name until the next boot."""
    did = in_small_etc(program, '"$MOUNT" -o remount,ro /etc')
    assert did == (1, NOT_STORED, 'web-1 old 644 hostname\n'), did


def full_etc(program):
    """A full disk: the same, and nothing half-written is left."""
    did = in_small_etc(program, 'head -c 9000 /dev/zero >/etc/full 2>/dev/null')
    assert did == (1, NOT_STORED, 'web-1 old 644 full hostname\n'), did


def in_small_etc(program, prepare):
    """Run the hostname step where hostnamectl fails and /etc has two pages; return the outcome."""
    if sandbox.without_roots():
        raise Skipped(sandbox.without_roots())
    with Host(good()) as host, tempfile.TemporaryDirectory() as folder:
        root, report = os.path.join(folder, 'root'), os.path.join(folder, 'report')
        files.put(root, {'/etc/passwd': files.File('file', 0o644, b'')})
        words = ['sh', '-c', WITHOUT_HOSTNAMECTL % prepare, 'sh']
        process = start(
            ' '.join(map(shlex.quote, words)) + ' ' + program,
            host,
            'hostname',
            root=root,
            FAILING='hostnamectl',
            REPORT=report,
            MOUNT=shutil.which('mount'),
        )
        stdout, stderr = process.communicate(timeout=60)
        assert stdout == 'Retrieving hostname from IMDS\nHostname: web-1\n', (stdout, stderr)
        return process.returncode, stderr, files.contents(report).decode()


CHECKS = [
    cut_at_every_byte,
    sigterm,
    sigint,
    nobody_listens,
    ignored_sigchld,
    closed_stderr,
    network_comes,
    without_hostnamectl,
    read_only_etc,
    full_etc,
]


if __name__ == '__main__':
    hold_programs(CHECKS)
