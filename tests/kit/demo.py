#!/usr/bin/env python3
"""Show a first boot: python3 tests/kit/demo.py [PROGRAM]...

Starts a fake Azure host on loopback, runs each program against it (without one: both scripts of
this project), and prints its journal, what the host was asked, and what would have been done to the
VM. Stubs take the place of hostnamectl and systemctl, and it runs in a sandbox: nothing of this
machine is touched. Exit status: 0, 1 if a program failed, 3 where there is no sandbox.
"""

import os
import subprocess
import sys
import tempfile

import sandbox
from host import Answer, Host, good
from run import OURS, command_line

SERVERS = {'wireserver': 'the WireServer', 'imds': 'IMDS'}
LIMIT = 60  # seconds


def show(title, text):
    print('\n  %s' % title)
    for line in text.splitlines() or ['(nothing)']:
        print('    ' + line)


def shown(request):
    """A request as HTTP writes it."""
    headers = ''.join('%s: %s\n' % header for header in request.headers.items())
    body = '\n' + request.body.decode() if request.body else ''
    return '%s HTTP/1.1\n%s%s' % (request.line, headers, body)


def first_boot(program):
    """Run the program as its first boot would; print what happened; return its exit status."""
    answers = good(computerName=[Answer('body', b'thstringnopa2')])
    environment = {
        name: value for name, value in os.environ.items() if name not in ('FAILING', 'MISSING')
    }
    with Host(answers) as host, tempfile.NamedTemporaryFile() as commands:
        process = sandbox.start(
            command_line(program),
            (host.wireserver, host.imds),
            dict(environment, COMMANDS=commands.name),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        journal, _ = process.communicate(timeout=LIMIT)
        print('%s: exit status %d' % (program, process.returncode))
        show('journal', journal.decode())
        for request in host.requests:
            show('%s was asked' % SERVERS.get(request.server, request.server), shown(request))
        show('on a VM, these would have been run', commands.read().decode())
        print(flush=True)
        return process.returncode


def main():
    refused = sandbox.refusal()
    if refused:
        print('nothing was run: %s' % refused)
        sys.exit(3)
    statuses = [first_boot(program) for program in sys.argv[1:] or OURS]
    sys.exit(1 if any(statuses) else 0)


if __name__ == '__main__':
    main()
