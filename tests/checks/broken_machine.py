#!/usr/bin/env python3
"""What a machine may lack: commands that die or are missing, a resolver that never answers.

python3 tests/checks/broken_machine.py [PROGRAM]... prints a line a check, in TAP. Exit status: 0
all passed or were skipped, 1. A port has to print the same lines here.
"""

import concurrent.futures
import contextlib
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
from host import Answer, Host, good
from programs import hold_programs
from run import command_line
from tap import Skipped

# They could read a file, or take part in replacing one.
COMMANDS = ['awk', 'cat', 'cp', 'cut', 'grep', 'head', 'ls', 'mv', 'readlink', 'sed', 'sync', 'tr']
AT_ONCE = 'kill -KILL $$'
HALF_WAY = '{real} "$@" | {head} -c 30; kill -KILL $$'
DYING_COMMAND = """#!/bin/sh
# A stub that dies where it reads the file $DYING_AT.
case "$({readlink} /proc/$$/fd/0) $*" in
*"$DYING_AT"*) {death} ;;
esac
exec {real} "$@"
"""
KEY = 'ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAz0bO4p4sKJ8e2pJ9dJ5o0K8c4o0q1l9wQ7m3nq5e1a'
BEFORE = {
    '/etc/passwd': """\
root:x:0:0:root:/root:/bin/sh
azureuser:x:{uid}:{gid}::/home/azureuser:/bin/sh
""",
    '/etc/login.defs': '# Below this number, an account is for no person.\nUID_MIN {uid}\n',
    '/etc/shadow': 'root:*:20000:0:99999:7:::\nazureuser:$6$salt$hash:20000:0:99999:7:::\n',
    '/etc/doas.conf': '# The first rule.\npermit persist :wheel\npermit persist :operator\n',
    '/etc/ssh/sshd_config': '# The first line.\nPort 22\nUsePAM yes\nPermitRootLogin no\n',
    '/home/azureuser/.ssh/authorized_keys': '# The first key.\n%s 1\n' % KEY.replace('ed25', 'x'),
    '/dev/sr0': """\
<Environment><ProvisioningSection><LinuxProvisioningConfigurationSet>
<UserName>azureuser</UserName><DisableSshPasswordAuthentication>true</DisableSshPasswordAuthentication>
</LinuxProvisioningConfigurationSet></ProvisioningSection></Environment>
""",
}
RESOLVER = {'/etc/nsswitch.conf': 'hosts: dns\n', '/etc/resolv.conf': 'nameserver 127.0.0.1\n'}
NO_ADDRESS = 'http://127.256.256.256'  # it may be asked for here, and only a resolver could know it


def start(program, urls, steps, root=None, **environment):
    """Start a program with steps; return the process."""
    environment = dict(dict(PATH=os.environ['PATH'], COMMANDS='/dev/null'), **environment)
    return sandbox.start(
        command_line(program) + steps,
        urls,
        environment,
        root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        universal_newlines=True,
        start_new_session=True,
    )


def outcome(process, seconds):
    """Return the exit status and what is said on stderr; end a program that takes longer."""
    try:
        _, stderr = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise AssertionError('still running after %d seconds' % seconds) from None
    return process.returncode, stderr


@contextlib.contextmanager
def root_file_system(contents):
    """Give the path of a root file system with these texts in it, and a folder beside it."""
    if sandbox.without_roots():
        raise Skipped(sandbox.without_roots())
    uid, gid, _ = files.new_user()
    with tempfile.TemporaryDirectory() as folder:
        root = os.path.join(folder, 'root')
        filled = {
            path: files.File('file', 0o644, text.format(uid=uid, gid=gid).encode())
            for path, text in contents.items()
        }
        files.put(root, filled)
        yield root, folder


def dying_commands(folder, death):
    """Fill a folder with commands that die, and return its path."""
    folder = os.path.join(folder, 'dying')
    os.mkdir(folder)
    words = {name: shlex.quote(shutil.which(name)) for name in ('readlink', 'head')}
    for name in filter(shutil.which, COMMANDS):
        words['real'] = shlex.quote(shutil.which(name))
        path = os.path.join(folder, name)
        text = DYING_COMMAND.format(death=death.format(**words), **words)
        files.write(path, text.encode())
        os.chmod(path, 0o755)
    return folder


def run_step(program, step, death=None, **environment):
    """Run a step on a machine with the files above; see what it makes of a command that fails.

    Where the step fails, each file is as it was. Otherwise each line of it is still there.
    """
    answers = {
        'adminUsername': [Answer('body', b'azureuser')],
        'publicKeys': [Answer('body', b'0/')],
        'keyData': [Answer('body', KEY.encode())],
    }
    with root_file_system(BEFORE) as (root, folder), Host(answers) as host:
        before = {path: files.contents(root + path).decode() for path in BEFORE}
        if death:
            path = [dying_commands(folder, death), os.environ['PATH']]
            environment['PATH'] = ':'.join(path)
        urls = host.wireserver, host.imds
        settings = {'AZURE_PROVISIONING_ATTEMPTS': '2', 'AZURE_PROVISIONING_INTERVAL': '0'}
        environment.update(settings, FAILING='visudo')
        status, stderr = outcome(start(program, urls, [step], root, **environment), 40)
        after = {path: files.contents(root + path).decode() for path in BEFORE}
    said = (step, environment.get('DYING_AT'), environment.get('MISSING'), status, stderr)
    assert status in (0, 1), said
    assert (status == 1) == ('\n%s: ' % step in '\n' + stderr), said
    for path in before:
        kept = [line for line in after[path].split('\n') if line in before[path].split('\n')]
        assert '\n'.join(kept) == before[path], (path, after[path], said)
    return status


def all_of(runs):
    """Make several runs side by side; the first that fails tells."""
    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return [each.result() for each in [pool.submit(*run) for run in runs]]


def nothing_wrong(program):
    """On the machine of these checks, both steps end well while nothing is wrong."""
    assert run_step(program, 'user') == 0
    assert run_step(program, 'password') == 0


def dying(program, death):
    jobs = [
        ('user', '/etc/passwd'),
        ('user', '/etc/login.defs'),
        ('user', '/etc/shadow'),
        ('user', '/home/azureuser'),
        ('user', '/home/azureuser/.ssh/authorized_keys'),
        ('user', '/etc/doas.conf'),
        ('password', '/run/azure-provisioning/dvd/ovf-env.xml'),
        ('password', '/etc/ssh/sshd_config'),
    ]

    def run(step, path):
        return run_step(program, step, death, DYING_AT=path)

    all_of([(run, *job) for job in jobs])


def dying_at_once(program):
    """A command that is killed while it reads a file makes no empty file of it."""
    dying(program, AT_ONCE)


def dying_half_way(program):
    """A command that is killed in the middle of a file makes no shorter file of it."""
    dying(program, HALF_WAY)


def missing_commands(program):
    """A command that is missing makes no empty file of any."""

    def run(step, name):
        return run_step(program, step, MISSING=name)

    all_of([(run, step, name) for step in ('user', 'password') for name in COMMANDS])


def silent_resolver(program):
    """A base URL whose name nobody resolves takes no longer than TIMEOUT."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as resolver:
        resolver.bind(('127.0.0.1', 53))  # of the sandbox's network
        with root_file_system(dict(BEFORE, **RESOLVER)) as (root, _):
            settings = {
                'AZURE_PROVISIONING_ATTEMPTS': '2',
                'AZURE_PROVISIONING_INTERVAL': '0',
                'AZURE_PROVISIONING_TIMEOUT': '1',
            }
            began = time.monotonic()
            process = start(program, (NO_ADDRESS, NO_ADDRESS), ['ready'], root, **settings)
            status, stderr = outcome(process, 40)
            took = time.monotonic() - began
        resolver.setblocking(False)
        assert resolver.recv(1000), 'the resolver was not asked'
    lines = ['ready: attempt %d of 2: goal state: timed out\n' % number for number in (1, 2)]
    last = 'ready: gave up after 2 attempts: goal state: timed out; is this a VM on Azure?\n'
    assert stderr == ''.join(lines) + last, stderr
    assert status == 1 and took < 5, (status, took)


def no_client(program):
    """Without curl and wget, a program that needs one says so, and does no step."""
    with Host(good()) as host:
        urls = host.wireserver, host.imds
        status, stderr = outcome(start(program, urls, ['ready'], MISSING='curl wget'), 40)
        if host.requests:
            raise Skipped('it needs neither')
    assert (status, stderr) == (1, 'azure-provisioning: no curl or wget\n'), (status, stderr)


CHECKS = [
    nothing_wrong,
    dying_at_once,
    dying_half_way,
    missing_commands,
    silent_resolver,
    no_client,
]


if __name__ == '__main__':
    hold_programs(CHECKS)
