#!/usr/bin/env python3
"""Runs that are killed: the next run ends in the state of an undisturbed one, owners and modes
included.

python3 tests/checks/kills.py [PROGRAM]... prints a line a check, in TAP. Exit status: 0 all passed
or were skipped, 1. The kills are SIGKILL: before and after each command that the program runs, at
each system call of the program itself that changes something, and inside of useradd.
"""

import concurrent.futures
import os
import re
import shutil

import kit_path  # noqa: F401  before the modules of the kit
import files
from host import Host
from programs import hold_programs
from tap import Skipped, measured
from whole_run import IMAGE_WITH_USER, USER, Machine, answers, differences, image, ovf

CORES = len(os.sched_getaffinity(0))
KILLED = (-9, 137)
MOST_SHOWN = 3  # points at which the next run went wrong
CHANGING = (  # system calls that change files, the hostname, or start a command
    'open,openat,creat,write,writev,pwrite64,ftruncate,fallocate,mkdir,mkdirat,rmdir,rename,'
    'renameat,renameat2,link,linkat,symlink,symlinkat,unlink,unlinkat,chmod,fchmod,fchmodat,'
    'chown,lchown,fchown,fchownat,utimensat,fsync,fdatasync,sync,syncfs,sethostname,vfork,fork,'
    'clone,clone3'
)
TRACED_CALL = re.compile(r'(?:[0-9]+ +)?([a-z0-9]+)\((.*)')
OWN_FILE = re.compile(r'"?/(etc|home|var/lib|run|proc/sys/kernel)/|[0-9]+</(etc|home|var/lib|run)/')
USERADD_POINTS = ('passwd', 'shadow', 'mkdir', 'chown', 'chmod', 'copy')


def killed_at_commands(program):
    """SIGKILL before and after each command: the next run ends as if nothing had been."""
    wanted, calls = undisturbed(program, image())
    hold_all(
        before_and_after(calls),
        lambda point: killed_and_again(program, image(), wanted, KILL=point),
    )


def killed_at_commands_without_home(program):
    """The same with doas, and a user who is there, locked, without a home: useradd was killed."""
    files_before = {
        path: file for path, file in image(IMAGE_WITH_USER).items() if not path.startswith('/home/')
    }
    failing = 'hostnamectl visudo'
    wanted, calls = undisturbed(program, files_before, FAILING=failing)
    hold_all(
        before_and_after(calls),
        lambda point: killed_and_again(program, files_before, wanted, KILL=point, FAILING=failing),
    )


def killed_at_system_calls(program):
    """SIGKILL at each system call of its own that changes something: the same."""
    strace = find_strace()
    wanted, _ = undisturbed(program, image())
    hold_all(
        changing_calls(program, strace),
        lambda point: killed_and_again(program, image(), wanted, tracer=killer(strace, *point)),
    )


def killed_in_useradd(program):
    """SIGKILL inside of useradd: a user without a shadow line, without a home, with root's home."""
    document = ovf(password='')  # else the step password would make the line
    wanted, _ = undisturbed(program, image(document=document))
    hold_all(
        ['useradd:' + point for point in USERADD_POINTS],
        lambda point: killed_and_again(
            program, image(document=document), wanted, without_skeleton, KILL=point
        ),
    )


CHECKS = [
    killed_at_commands,
    killed_at_commands_without_home,
    killed_at_system_calls,
    killed_in_useradd,
]


def before_and_after(calls):
    """The points before and after each of so many calls of commands."""
    return ['%d:%s' % (call, when) for call in range(1, calls + 1) for when in ('before', 'after')]


def undisturbed(program, files_before, **settings):
    """The state that an undisturbed run leaves, and how many commands it runs."""
    with Machine(files_before) as machine, Host(answers()) as host:
        outcome = machine.run(program, host, **settings)
        assert outcome.status == 0, outcome
        return machine.state(), len(os.listdir(machine.calls()))


def killed_and_again(program, files_before, wanted, but=dict, tracer=(), KILL='', **settings):
    """Kill a run, and run the program again; return what is wrong then.

    but: a function that leaves out of a state what does not count.
    """
    with Machine(files_before) as machine, Host(answers()) as host:
        outcome = machine.run(program, host, tracer=tracer, KILL=KILL, **settings)
        if outcome.status not in KILLED:
            return 'it was not killed: %s\n' % (outcome,)
        outcome = machine.run(program, host, **settings)
        found = differences(but(wanted), but(machine.state()))
        posts = b''.join(request.body for request in host.requests)
    if outcome.status != 0:
        found += 'the next run: %s\n' % (outcome,)
    if b'>Ready<' not in posts or b'>NotReady<' in posts:
        found += 'posted: %s\n' % posts
    return found


def hold_all(points, problem_at):
    """Try all points, some side by side; fail with those that have a problem."""
    assert points
    with concurrent.futures.ThreadPoolExecutor(CORES) as pool:
        problems = list(pool.map(problem_at, points))
    bad = [(point, problem) for point, problem in zip(points, problems) if problem]
    measured('%d of %d points are wrong', len(bad), len(points))
    shown = ''.join('killed at %s:\n%s' % each for each in bad[:MOST_SHOWN])
    names = ' '.join(str(point) for point, _ in bad)
    assert not bad, '%d of %d points: %s\n%s' % (len(bad), len(points), names, shown)


def without_skeleton(state):
    """A state, but for what only useradd makes: files of the skeleton, and the mode of the home.

    The user has to be able to use the home, and nobody else may write in it.
    """
    state = dict(state)
    state.pop('/home/%s/.profile' % USER, None)
    home = state.get('/home/' + USER)
    if home and home.file.mode & 0o722 == 0o700:
        state['/home/' + USER] = home._replace(file=home.file._replace(mode=0o700))
    return state


def find_strace():
    program = shutil.which('strace')
    if not program:
        raise Skipped('no strace')
    return program


def killer(strace, name, number):
    """The words that run a program, and kill it when it makes the call of that name and number."""
    inject = '--inject=%s:signal=KILL:when=%d' % (name, number)
    return [strace, '-qq', '-e', 'trace=' + name, inject, '-o', '/dev/null']


def changing_calls(program, strace):
    """The system calls of the program's own process that change something: name and number."""
    with Machine(image()) as machine, Host(answers()) as host:
        trace = os.path.join(machine.folder, 'trace')
        tracer = [strace, '-qq', '-y', '-e', 'trace=' + CHANGING, '-o', trace]
        outcome = machine.run(program, host, tracer=tracer)
        if outcome.status != 0:
            raise Skipped('strace does not work here: %s' % outcome.stderr[-200:])
        lines = files.contents(trace).decode('utf-8', 'replace').splitlines()
    counts, found = {}, []
    for line in lines:
        match = TRACED_CALL.match(line)
        if match:
            name, arguments = match.groups()
            counts[name] = counts.get(name, 0) + 1
            if changes(name, arguments):
                found.append((name, counts[name]))
    return found


def changes(name, arguments):
    """Whether a call is one that changes something."""
    if name in ('open', 'openat'):
        return re.search('O_(CREAT|TRUNC|WRONLY|RDWR)', arguments) and OWN_FILE.search(arguments)
    if name.startswith(('write', 'pwrite')):
        return OWN_FILE.match(arguments)
    return True


if __name__ == '__main__':
    hold_programs(CHECKS, with_root=True)
