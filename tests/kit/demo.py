#!/usr/bin/env python3
"""Show a first boot: python3 tests/demo.py [PROGRAM]...

Starts an Azure host on loopback, runs each program against it (without one: both scripts of this project), and prints
its journal, what the host was asked, and what would have been done to the machine. Stand-ins take the place of
hostnamectl and systemctl: nothing of this machine is touched. Exit status: 0, or 1 if a program failed.
"""

import os
import subprocess
import sys
import tempfile

from host import GOOD, Answer, Host, loopback_only
from run import OURS, TESTS, command_line


def show(title, text):
    print('\n  %s' % title)
    for line in text.splitlines() or ['(nothing)']:
        print('    ' + line)


def first_boot(program):
    """Run the program as its first boot would; print what happened; return its exit status."""
    answers = dict(GOOD, computerName=[Answer('body', b'thstringnopa2')])
    with Host(answers) as host, tempfile.NamedTemporaryFile() as commands:
        environment = dict(
            os.environ,
            PATH='%s:%s' % (TESTS / 'stand-ins', os.environ['PATH']),
            COMMANDS=commands.name,
            AZURE_PROVISIONING_WIRESERVER=host.wireserver,
            AZURE_PROVISIONING_IMDS=host.imds,
        )
        environment.pop('FAILING', None)
        done = subprocess.run(
            command_line(program),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=60,
        )
        print('%s: exit status %d' % (program, done.returncode))
        show('journal', done.stdout.decode())
        for request in host.requests:
            show(
                '%s was asked'
                % {'wireserver': 'the WireServer', 'imds': 'IMDS'}.get(
                    request.server, request.server
                ),
                request.line
                + ' HTTP/1.1\n'
                + ''.join('%s: %s\n' % header for header in request.headers.items())
                + ('\n' + request.body.decode() if request.body else ''),
            )
        show('on a VM, these would have been run', commands.read().decode())
        print()
        return done.returncode


if __name__ == '__main__':
    loopback_only()
    statuses = [first_boot(program) for program in sys.argv[1:] or OURS]
    sys.exit(1 if any(statuses) else 0)
