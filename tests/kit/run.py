#!/usr/bin/env python3
"""Hold provisioning agents against the cases: python3 tests/kit/run.py [--strict] [--only TEXT]
[PROGRAM]...

A PROGRAM is a command line, './my-port --flag' say; without one, the two scripts of this project
are run, py and sh. --strict also compares what only these two promise: every header, every byte
printed, nothing written anywhere. Exit status: 0 all passed, 1 some failed, 2 the cases themselves
are not in order, 3 nothing can be run here.
"""

import argparse
import concurrent.futures
import functools
import itertools
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import cases
import compare
import files
import sandbox
from host import Host

PROJECT = pathlib.Path(__file__).resolve().parents[2]
OURS = [str(PROJECT / 'azure-provisioning.py'), str(PROJECT / 'azure-provisioning.sh')]
LIMIT = 40  # seconds for one run
SECRET = 'S3cr3t'  # what each password in the cases has in it
BUSY = 4 * len(
    os.sched_getaffinity(0)
)  # runs at once that take the processor; more would make some time out
WAITING = 32  # runs at once that wait
NOTHING = 3  # exit status where nothing was run
FEW = 10  # runs that are tried once more
OFTEN = 5  # seconds from one word of progress to the next
# Runs a program with a umask, and tells the hostname that the machine has afterwards.
OBSERVED = """
umask "$1"
file=$2
shift 2
"$@"
code=$?
read -r name </proc/sys/kernel/hostname && echo "$name" >"$file"
exit "$code"
"""
# Takes away what a program needs to set the hostname of the kernel, and runs it.
FIXED = """
"$1" -o remount,bind,ro /proc/sys/kernel/hostname
setpriv=$2
shift 2
exec "$setpriv" --bounding-set -sys_admin "$@"
"""
SMALL = b'\xff\0\0\0'  # the mask of a route that nobody needs
METRICS = itertools.count(100)


def command_line(program):
    """The words of a program's command line, `py` and `sh` for ours; those that name files do so
    from any folder.
    """
    program = {'py': OURS[0], 'sh': OURS[1]}.get(program, program)
    words = [
        os.path.abspath(word) if os.path.isfile(word) else word for word in shlex.split(program)
    ]
    if not words or not shutil.which(words[0]):
        sys.exit('cannot be started: %s' % program)
    return words


class Run:
    """One run of a program for a case: what it did, by the names of EXPECTED, its requests, and
    faults that were seen.
    """

    def __init__(self, case, program, environment):
        self.case, self.program, self.faults = case, program, []
        with Host(case.answers) as self.host, tempfile.TemporaryDirectory() as folder:
            self.folder = folder
            self.home, self.root = os.path.join(folder, 'home'), os.path.join(folder, 'root')
            self.trace, self.commands, self.hostname = (
                os.path.join(folder, name) for name in ('trace', 'commands', 'hostname')
            )
            self.prepare()
            self.did = self.start(environment)
            self.requests = list(self.host.requests)
            self.look()

    def prepare(self):
        """Put in place what the case has."""
        os.mkdir(self.home)
        files.write(self.commands, b'')
        files.write(self.hostname, b'')
        if self.case.curlrc is not None:
            curlrc = self.case.curlrc.replace('{elsewhere}', self.host.elsewhere)
            files.write(os.path.join(self.home, '.curlrc'), curlrc.encode())
        self.home_before = sorted(os.listdir(self.home))
        if self.case.before is not None:
            files.put(self.root, self.case.before)
            self.before, _ = files.look(self.root)
            if self.case.network != 'none':
                sandbox.default_route()

    def environment(self, common):
        """The environment of the program: the common one, what the stubs need, and the settings of
        the case.
        """
        user, group, _ = files.new_user()
        found = dict(common, HOME=self.home, TMPDIR=self.home, COMMANDS=self.commands)
        found.update(NEW_UID=str(user), NEW_GID=str(group))
        for name, value in self.case.settings.items():
            for server in ('elsewhere', 'refused', 'unanswered', 'wireserver', 'imds'):
                value = value.replace('{%s}' % server, getattr(self.host, server))
            found[name] = value
        return found

    def start(self, common):
        """Run the program, and return what it did."""
        words = command_line(self.program) + self.case.arguments
        root = self.root if self.case.before is not None else None
        if root:
            observed = [shutil.which('sh'), '-c', OBSERVED, 'sh', self.case.umask, self.hostname]
            words = observed + self.kernel() + self.tracer() + words
        outputs = self.outputs()
        started = time.monotonic()
        process = sandbox.start(
            words,
            (self.host.wireserver, self.host.imds),
            self.environment(common),
            root,
            sandbox.NETWORK if self.case.network == 'none' else 0,
            cwd=self.home,
            start_new_session=True,
            **outputs,
        )
        if self.case.output:
            os.close(outputs['stdout'])
        try:
            if self.case.signal or self.case.network == 'changes':
                self.disturb(process)
            stdout, stderr = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            stdout, stderr = process.communicate()
            self.faults.append('still running after %d seconds' % LIMIT)
        requests = list(self.host.requests)
        moments = [request.time for request in requests] or [started]
        moments.append(time.monotonic())
        return {
            'exit': '%d\n' % exit_status(process.returncode),
            'requests': ''.join(request.line + '\n' for request in requests),
            'posted': ''.join(each.body.decode('latin-1') + '\n' for each in requests if each.body),
            'commands': as_text(files.contents(self.commands)),
            'hostname': as_text(files.contents(self.hostname)),
            'waits': [later - sooner for sooner, later in zip(moments, moments[1:])],
            'stdout': as_text(stdout or b''),
            'stderr': as_text(stderr or b''),
        }

    def outputs(self):
        """Where the program prints to."""
        if self.case.output == 'full':
            output = os.open('/dev/full', os.O_WRONLY)
        elif self.case.output == 'gone':
            reader, output = os.pipe()
            os.close(reader)
        else:
            return {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE}
        return {'stdout': output, 'stderr': output}

    def disturb(self, process):
        """Send the program a signal, or change the kernel's routes, once it has sent a request,
        unless it ends before.
        """
        end = time.monotonic() + LIMIT
        while process.poll() is None and time.monotonic() < end:
            if self.host.requested.wait(0.1):
                if self.case.signal:
                    process.send_signal(getattr(signal, 'SIG' + self.case.signal))
                else:
                    sandbox.add_route(sandbox.UP | sandbox.REJECT, SMALL, next(METRICS))
                return

    def look(self):
        """See what became of the files, and whether something happened that must not."""
        if any(request.server == 'elsewhere' for request in self.requests):
            self.faults.append(
                'a request went elsewhere: a redirect was followed, or a proxy obeyed'
            )
        self.written = sorted(os.listdir(self.home)) != self.home_before
        if self.case.before is not None:
            self.did['before'] = self.before
            self.did['files'], wrong = files.look(self.root)
            self.faults += wrong + self.leaks()

    def tracer(self):
        """The words that have strace note all command lines in a file, in a case with that."""
        if self.case.traced:
            return [word.replace('TRACE', self.trace) for word in strace()]
        return []

    def kernel(self):
        """The words that keep a program from setting the kernel's hostname, in a case with that."""
        if not self.case.fixed_hostname:
            return []
        return [
            shutil.which('sh'),
            '-c',
            FIXED,
            'sh',
            shutil.which('mount'),
            shutil.which('setpriv'),
        ]

    def leaks(self):
        """Where a password is to be seen, but for the DVD and the standard input of chpasswd."""
        texts = {name: self.did[name] for name in ('requests', 'posted', 'stdout', 'stderr')}
        texts['commands'] = re.sub(' < .*', '', self.did['commands'])
        if os.path.exists(self.trace):
            texts['command lines'] = as_text(files.contents(self.trace))
        for folder, _, names in os.walk(self.home):
            for name in names:
                texts[name] = as_text(files.contents(os.path.join(folder, name)))
        for path, file in self.did['files'].items():
            if file != self.before.get(path):
                texts[path] = path + as_text(file.content)
        return [
            'the password is to be seen: %s' % name
            for name, said in texts.items()
            if SECRET in said
        ]


def exit_status(code):
    """The exit status as a shell says it: 128 and more for a signal."""
    return 128 - code if code < 0 else code


def as_text(printed):
    return printed.decode('utf-8', 'backslashreplace')


@functools.lru_cache(maxsize=None)
def strace():
    """How to trace command lines into TRACE, by a real try; nothing, where it cannot be had."""
    program = shutil.which('strace')
    for options in (['--seccomp-bpf'], []) if program else ():
        words = [program, '-f', '-qq', *options, '-e', 'trace=execve', '-s', '9999', '-o']
        if subprocess.call(words + ['/dev/null', 'true'], stderr=subprocess.DEVNULL) == 0:
            return words + ['TRACE']
    return []


def verdict(case, program, strict, environment=None):
    """Run one case; return the differences, none if it passed, and the usage that was printed, if
    any.
    """
    run = in_network_of(case, lambda: Run(case, program, environment or {}))
    did, usage = compare.with_placeholders(run.did, strict)
    faults = list(run.faults)
    if strict and run.written:
        faults.append('files were written in HOME')
    ours = strict and case.verdict != 'either'
    outcomes = [list(compare.differences(expected, did, ours)) for expected in case.expected]
    faults += compare.wrong_headers(run.requests, strict)
    return faults + min(outcomes, key=len), usage if ours else None


def in_network_of(case, action):
    """Return what an action returns; where a case changes the network, it gets one of its own."""
    return sandbox.in_network(action) if case.network == 'changes' else action()


def impossible(case):
    """Why the case cannot be run on this machine, or nothing."""
    if case.before is None:
        return ''
    if files.new_user()[0] == 0 and any(file.owner is not None for file in case.before.values()):
        return 'only root can give a file to another user'
    return sandbox.without_roots()


def waits(case):
    """Whether most of the case's time is waiting."""
    answers = [answer for given in case.answers.values() for answer in given]
    return (
        any(answer.kind == 'slow' for answer in answers)
        or any(answer.data in ('silent', 'drip', 'drip-head') for answer in answers)
        or any('waits' in each for each in case.expected)
    )


class Runner:
    """All cases for all programs: those that wait side by side, beside those that take the
    processor.
    """

    def __init__(self, found, common, programs, strict, environment=None):
        self.cases, self.common, self.programs = found, common, programs
        self.strict, self.environment = strict, environment
        self.passed = self.failed = self.done = 0
        self.spoke = time.monotonic()
        self.usages = {program: {} for program in programs}

    def results(self):
        """What came of each case, as it comes: the program, the case, the differences."""
        jobs = [(program, case) for case in self.cases for program in self.programs]
        late = []
        for program, case, found, usage in self.side_by_side(jobs):
            if found and waits(case) and len(late) < FEW * len(self.programs):
                late.append((program, case))
            else:
                yield program, case, self.count(program, case, found, usage, len(jobs))
        # The machine may have been too busy to keep the times.
        for program, case, found, usage in self.side_by_side(late):
            yield program, case, self.count(program, case, found, usage, len(jobs))

    def side_by_side(self, jobs):
        """Run cases, and yield what came of each: the program, the case, and its verdict."""
        with concurrent.futures.ThreadPoolExecutor(
            BUSY
        ) as busy, concurrent.futures.ThreadPoolExecutor(WAITING) as waiting:
            runs = {
                (waiting if waits(case) else busy).submit(
                    verdict, case, program, self.strict, self.environment
                ): (program, case)
                for program, case in jobs
            }
            for run in concurrent.futures.as_completed(runs):
                yield (*runs[run], *run.result())

    def count(self, program, case, found, usage, jobs):
        """Count a run, and return what it found."""
        if usage is not None:
            self.usages[program].setdefault(usage, case.name)
        self.passed, self.failed = self.passed + (not found), self.failed + bool(found)
        self.done += 1
        self.progress(jobs)
        return found

    def progress(self, count):
        """Say how far it is: on a terminal in place, elsewhere now and then."""
        if sys.stderr.isatty():
            end = '\n' if self.done == count else ''
            sys.stderr.write('\r%d of %d, %d failed%s' % (self.done, count, self.failed, end))
        elif time.monotonic() > self.spoke + OFTEN:
            self.spoke = time.monotonic()
            sys.stderr.write('  %d of %d, %d failed\n' % (self.done, count, self.failed))
        sys.stderr.flush()

    def run(self):
        """Run all, and print what failed."""
        for program, case, found in self.results():
            if found:
                self.tell(program, case.name, case.why, found)
        for program in self.programs:
            for name, found in self.other_usages(program):
                self.failed += 1
                self.tell(program, name, 'The usage, which cases/values has as {usage}.', found)

    def other_usages(self, *programs):
        """What programs print as their usage, if it is another one: once, with a case in which they
        do.
        """
        for program in programs or self.programs:
            for usage, name in self.usages[program].items():
                if usage != self.common.usage:
                    yield name, [compare.different_text('usage', self.common.usage, usage)]

    @staticmethod
    def tell(program, name, why, found):
        lines = ''.join('  %s\n' % line for part in found for line in part.split('\n'))
        clear = '\r' if sys.stderr.isatty() else ''
        why = why.replace('\n', '\n  ')
        print('%sFAILED %s: %s\n  %s\n%s' % (clear, program, name, why, lines), end='', flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--strict', action='store_true')
    parser.add_argument('--only', default='', metavar='TEXT', help='cases with this in FAMILY/NAME')
    parser.add_argument('programs', nargs='*', default=OURS, metavar='PROGRAM')
    options = parser.parse_args()
    try:
        sandbox.enter()
        found, common = cases.find(options.only)
    except sandbox.Refused as reason:
        print('nothing was run: %s' % reason)
        sys.exit(NOTHING)
    except cases.BadCase as error:
        print('the cases are not in order: %s' % error)
        sys.exit(2)
    for program in options.programs:
        command_line(program)
    skipped = [case for case in found if impossible(case)]
    found = [case for case in found if not impossible(case)]
    runner = Runner(found, common, options.programs, options.strict)
    runner.run()
    if skipped:
        print('%d skipped: %s' % (len(skipped) * len(options.programs), impossible(skipped[0])))
    print('%d passed, %d failed' % (runner.passed, runner.failed))
    if not runner.done:
        sys.exit(NOTHING)
    sys.exit(1 if runner.failed else 0)


if __name__ == '__main__':
    main()
