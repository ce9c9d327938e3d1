#!/usr/bin/env python3
"""What no case can show: signals, a goal state cut at every byte, and a machine without hostnamectl.

python3 tests/machine.py [PROGRAM]... prints a line a check, in TAP. Exit status: 0 all passed or were skipped, 1.
The checks without hostnamectl write /etc/hostname: each runs in mount and UTS namespaces of its own, on a scratch /etc.
"""
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile

from host import GOOD, Answer, Host, children, loopback_only
from run import OURS, TESTS, command_line
from tap import Skipped, tell

DOCUMENT = GOOD['goalstate'][0].data


def start(program, host, *steps, stdout=subprocess.PIPE, **settings):
    environment = dict(PATH='%s:%s' % (TESTS / 'stand-ins', os.environ['PATH']), COMMANDS='/dev/null',
                       AZURE_PROVISIONING_WIRESERVER=host.wireserver, AZURE_PROVISIONING_IMDS=host.imds, **settings)
    return subprocess.Popen(command_line(program) + list(steps), env=environment, stdin=subprocess.DEVNULL,
                            stdout=stdout, stderr=subprocess.PIPE, universal_newlines=True)


def cut_at_every_byte(program):
    """A goal state cut at any byte is refused, and the whole one then taken."""
    prefixes = [DOCUMENT[:length] for length in range(DOCUMENT.rindex(b'>') + 1)]
    with Host(dict(GOOD, goalstate=[Answer('body', each) for each in prefixes + [DOCUMENT]])) as host:
        process = start(program, host, 'ready', AZURE_PROVISIONING_ATTEMPTS=str(len(prefixes) + 1),
                        AZURE_PROVISIONING_INTERVAL='0')
        _, stderr = process.communicate(timeout=300)
        posts = [request for request in host.requests if request.body]
    assert stderr == ''.join('ready: attempt %d of %d: goal state: not a goal state\n' % (number, len(prefixes) + 1)
                             for number in range(1, len(prefixes) + 1)), stderr[-500:]
    assert len(posts) == 1 and len(host.requests) == len(prefixes) + 2, len(posts)
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
    assert process.returncode in (-number, 128 + number), process.returncode  # a shell says the latter
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
        with Host(GOOD) as host:
            reader, writer = os.pipe()
            os.close(reader)  # nobody reads from it
            process = start("sh -c 'exec \"$@\" %s' sh %s" % (redirections, program), host, 'ready', stdout=writer)
            os.close(writer)
            process.communicate(timeout=30)
            assert process.returncode == 0, (redirections, process.returncode)
            assert [request.line[:4] for request in host.requests] == ['GET ', 'POST'], host.requests


def closed_stderr(program):
    """A step that fails ends the run, a bad setting is refused, though stderr is closed."""
    command = "sh -c 'exec \"$@\" 2>&-' sh %s" % program
    with Host({'computerName': [Answer('body', b'web-1')]}) as host:
        process = start(command, host, 'ready', 'hostname', AZURE_PROVISIONING_ATTEMPTS='1')
        assert process.communicate(timeout=30)[0] == 'Retrieving goal state from the Wireserver\n'
        assert process.returncode == 1 and len(host.requests) == 1, (process.returncode, host.requests)
        process = start(command, host, 'ready', AZURE_PROVISIONING_ATTEMPTS='0')
        assert process.communicate(timeout=30)[0] == ''
        assert process.returncode == 2 and len(host.requests) == 1, (process.returncode, host.requests)


def without_hostnamectl(program):
    """Without hostnamectl, /etc/hostname is replaced and the kernel's name set."""
    did = on_scratch_etc(program, 'chmod 600 /etc/hostname; umask 077')
    assert did == (0, '', 'web-1 web-1 644 hostname\n'), did


def read_only_etc(program):
    """A read-only /etc: the step fails and says so, and the names stay."""
    did = on_scratch_etc(program, '"$MOUNT" -o remount,ro /etc')
    assert did == (1, 'hostname: cannot write /etc/hostname\n', 'old old 644 hostname\n'), did


def full_etc(program):
    """A full disk: the same, and nothing half-written is left."""
    did = on_scratch_etc(program, 'head -c 9000 /dev/zero >/etc/full 2>/dev/null')
    assert did == (1, 'hostname: cannot write /etc/hostname\n', 'old old 644 full hostname\n'), did


def on_scratch_etc(program, prepare):
    """Run the hostname step where hostnamectl fails; return what came of it."""
    unshare = ['unshare', '--mount', '--uts', '--propagation', 'private'] + ['--map-root-user'] * (os.getuid() != 0)
    if subprocess.call(unshare + ['sh', '-c', 'mount -t tmpfs none /etc'], stderr=subprocess.DEVNULL) != 0:
        raise Skipped('no mount namespace can be had')
    script = """
        "$MOUNT" -t tmpfs -o size=8k none /etc && [ ! -e /etc/passwd ] || exit 99
        echo old >/etc/hostname && echo old >/proc/sys/kernel/hostname || exit 99
        %s
        "$@"
        status=$?
        read -r name </etc/hostname
        echo "$(uname -n) $name $(stat -c %%a /etc/hostname) $(cd /etc && echo *)" >"$REPORT"
        exit $status""" % prepare
    with Host(GOOD) as host, tempfile.NamedTemporaryFile('r') as report:
        words = ' '.join(map(shlex.quote, unshare + ['sh', '-c', script, 'sh']))
        process = start(words + ' ' + program, host, 'hostname',
                        FAILING='hostnamectl', REPORT=report.name, MOUNT=shutil.which('mount'))
        stdout, stderr = process.communicate(timeout=60)
        assert stdout == 'Retrieving hostname from IMDS\nHostname: web-1\n', stdout
        return process.returncode, stderr, report.read()


CHECKS = [cut_at_every_byte, sigterm, sigint, nobody_listens, closed_stderr, without_hostnamectl, read_only_etc,
          full_etc]


def main():
    loopback_only()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored, where we run in the background
    programs = sys.argv[1:] or OURS
    name = socket.gethostname()
    print('1..%d' % (len(CHECKS) * len(programs)))
    passed = [tell('%s: %s' % (program, check.__doc__), check, program) for program in programs for check in CHECKS]
    assert socket.gethostname() == name, 'the tests changed the name of this machine'
    sys.exit(0 if all(passed) else 1)


if __name__ == '__main__':
    main()
