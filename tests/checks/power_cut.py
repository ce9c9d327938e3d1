#!/usr/bin/env python3
"""Power cuts during a run, on ext4 and xfs: each file has its old or its whole new content.

python3 tests/checks/power_cut.py [PROGRAM]... prints a line a check, in TAP. Exit status: 0 all
passed or were skipped, 1. Needs root, loop devices, strace, mkfs.ext4 and mkfs.xfs.

The root file system of a run is on disks that are files. strace stops the run behind each system
call that changes a file or syncs it, and behind each start of a command. Then the disks are copied,
as a power cut would leave them. Each copy is mounted, which replays its journal, and looked at:

- A file that the program writes has its old or its new content, mode and owner.
- If the id of the VM is there, all the rest is. So it is if the unit is disabled.
- At the end, everything is there.

The disks are mounted so that the file system writes as late as it may. A copy counts only if
nothing was written to the disks while it was made. What happens within a single write of a disk is
the business of the file system.

The control: the same run, but its syncs do nothing. The checks have to catch that.
"""

import contextlib
import functools
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

import kit_path  # noqa: F401  before the modules of the kit
import files
import sandbox
from host import Host
from run import OURS
from tap import Skipped, measured, tell
from whole_run import (
    IMAGE_WITH_USER,
    LIMIT,
    STATE,
    UNIT_LINK,
    USER,
    Entry,
    Machine,
    answers,
    image,
    kill_group,
    show,
)

CORES = len(os.sched_getaffinity(0))
STEPS = 'user password data hostname ready remember disable'
DEFAULT_STEPS = 'ready hostname disable'
SIZES = {'ext4': '16M', 'xfs': '300M'}  # the least that mkfs takes; most of it is a hole
MKFS = {
    'ext4': ['mkfs.ext4', '-q', '-F', '-E', 'lazy_itable_init=0,lazy_journal_init=0'],
    'xfs': ['mkfs.xfs', '-q', '-f'],
}
# Nothing is written before somebody syncs. A copy has the same UUID as its original.
OPTIONS = {'ext4': 'loop,noatime,commit=300,noauto_da_alloc', 'xfs': 'loop,noatime,nouuid'}
DISKS = {  # the disks of a root file system, by name: the folder that each has, and its kind
    'ext4': {'': 'ext4'},
    'xfs': {'': 'xfs'},
    'ext4 and xfs': {'etc': 'ext4', 'home': 'xfs', 'var/lib': 'ext4'},
}
SYNCS = 'fsync,fdatasync,sync,syncfs,sync_file_range'
CHANGES = (
    'execve,write,ftruncate,mkdir,mkdirat,rmdir,rename,renameat,renameat2,link,linkat,symlink,'
    'symlinkat,unlink,unlinkat,chmod,fchmod,fchmodat,chown,lchown,fchown,fchownat'
)
STOPPED = re.compile('([0-9]+) +--- stopped by SIGSTOP ---')
SYNCED = re.compile('[0-9]+ +(%s)[(]' % SYNCS.replace(',', '|'))
OPENED = re.compile('[0-9]+ +open(at)?[(].*O_(CREAT|TRUNC)')
CHANGED = re.compile('[0-9]+ +(?!execve|open)[a-z0-9]+[(]')
RESUMED = re.compile('[0-9]+ +<[.]{3} (?!execve|open)')
ON_DISK = re.compile('[<"]/(etc|home|var/lib)[/>]')
MOUNTS = 0x00020000  # CLONE_NEWNS
QUIET_TRIES, QUIET_WAIT = 500, 0.01  # seconds from one look at a disk that is busy to the next
MOST_SHOWN = 3
CONTROL_RUNS = 3  # if a program of this machine syncs all disks again and again
VM_ID_FILE = STATE + '/vm-id'
# What the stubs change, as the commands do that they stand for. It does not have to be there whole.
OF_STUBS = ('/etc/passwd', '/etc/shadow', '/home/%s/.profile' % USER, '/dev/sr0', UNIT_LINK)


class Disk:
    """A disk that is a file, mounted at a folder."""

    def __init__(self, path, kind, folder):
        """Make the disk, with what the folder has in it, and mount it there."""
        self.path, self.kind, self.folder = path, kind, folder
        call('truncate', '-s', SIZES[kind], path)
        call(*MKFS[kind], path)
        new = path + '.new'
        os.mkdir(new)
        with mounted(path, kind, new):
            call('cp', '-a', folder + '/.', new)
        call('fallocate', '--dig-holes', path)
        call('mount', '-o', OPTIONS[kind], path, folder)
        self.device = os.path.realpath('/sys/dev/block/%s' % device_number(folder))

    def written(self):
        """How much was written so far; it is not certain while something is being written."""
        with open(self.device + '/stat') as file:
            fields = file.read().split()
        writes, in_flight = fields[4], int(fields[8])
        return writes, in_flight

    def sync_another_file(self):
        """Have another program sync a file of its own. The journal then has all changes so far."""
        with open(os.path.join(self.folder, 'another-file'), 'ab') as file:
            file.write(b'x')
            file.flush()
            os.fsync(file.fileno())


class Disks:
    """The disks of a machine, in the place of folders of its root file system."""

    def __init__(self, machine, kinds):
        self.machine, self.disks = machine, []
        self.copied = None
        for number, (folder, kind) in enumerate(kinds.items()):
            path = os.path.join(machine.folder, 'disk-%d' % number)
            disk = Disk(path, kind, os.path.join(machine.root, folder).rstrip('/'))
            self.disks.append(disk)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for disk in self.disks:
            call('umount', disk.folder)

    def written(self):
        return [disk.written() for disk in self.disks]

    def is_busy(self):
        return any(in_flight for _, in_flight in self.written())

    def copy(self):
        """Copy the disks at one moment. Return whether there was something new to copy."""
        for _ in range(QUIET_TRIES):
            before = self.written()
            if before == self.copied:
                return False
            if not self.is_busy():
                for disk in self.disks:
                    copy_data(disk.path, disk.path + '.copy')
                if self.written() == before:
                    self.copied = before
                    return True
            time.sleep(QUIET_WAIT)
        raise AssertionError('the disks are always busy')

    def look_at_copy(self, paths):
        """Mount the copies; return the entries of these paths."""
        top = os.path.join(self.machine.folder, 'copy')
        with contextlib.ExitStack() as stack:
            for disk in self.disks:
                folder = top + disk.folder[len(self.machine.root) :]
                os.makedirs(folder, exist_ok=True)
                stack.enter_context(mounted(disk.path + '.copy', disk.kind, folder))
            return look_at(top, paths)


def call(*words):
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)


@contextlib.contextmanager
def mounted(path, kind, folder):
    """Mount a disk as long as the block runs."""
    call('mount', '-o', OPTIONS[kind], path, folder)
    try:
        yield
    finally:
        call('umount', folder)


def device_number(folder):
    number = os.stat(folder).st_dev
    return '%d:%d' % (os.major(number), os.minor(number))


def copy_data(source, target):
    """Copy a file, and leave its holes out. The copy is a new file."""
    with contextlib.suppress(FileNotFoundError):
        os.remove(target)
    with open(source, 'rb') as old, open(target, 'xb') as new:
        size = os.fstat(old.fileno()).st_size
        new.truncate(size)
        end = 0
        while end < size:
            try:
                start = os.lseek(old.fileno(), end, os.SEEK_DATA)
            except OSError:  # there is no more data
                return
            end = os.lseek(old.fileno(), start, os.SEEK_HOLE)
            os.pwrite(new.fileno(), os.pread(old.fileno(), end - start, start), start)


def look_at(root, paths):
    """The entries of these paths, None for what is not there."""
    found = {}
    for path in paths:
        found[path] = None
        with contextlib.suppress(FileNotFoundError):
            status = os.lstat(root + path)
            file = files.file_of(root, path, status)
            found[path] = Entry(file, status.st_uid, status.st_gid)
    return found


class Expected:
    """What may be found after a power cut, by the states before and after an undisturbed run."""

    def __init__(self, before, after):
        self.before, self.after = before, after
        changed = [path for path in after if before.get(path) != after[path]]
        self.whole = [path for path in changed if path not in OF_STUBS]
        self.written = [path for path in self.whole if after[path].file.kind == 'file']
        self.paths = self.whole + [UNIT_LINK]

    def problems(self, found, is_end):
        """Lines that say what is wrong with the entries that are found."""
        problem = ''
        for path in self.written:
            if found[path] not in (self.before.get(path), self.after[path]):
                problem += 'neither old nor new: ' + show(path, found[path])
        rest = [path for path in self.whole if path != VM_ID_FILE]
        has_id = VM_ID_FILE in self.whole and self.is_new(VM_ID_FILE, found)
        for is_over, why, paths in (
            (is_end, 'after the end', self.whole),
            (not found[UNIT_LINK], 'the unit is disabled, but', self.whole),
            (has_id, 'there is vm-id, but', rest),
        ):
            old = [path for path in paths if not self.is_new(path, found)]
            if is_over and old:
                problem += '%s not new: %s\n' % (why, ' '.join(old))
        return problem

    def is_new(self, path, found):
        return found[path] == self.after[path]


class Run:
    """A run with power cuts."""

    def __init__(self, program, disks, steps, another_syncs, without_syncs=False):
        self.disks, self.another_syncs = disks, another_syncs
        self.stops = self.looks = self.syncs = 0
        self.problems = []
        self.settings = {'steps': steps}
        files_before = image()
        if disks == 'xfs':
            files_before = image(IMAGE_WITH_USER)
            self.settings['FAILING'] = 'hostnamectl visudo'
        self.expected = expected(program, files_before, self.settings)
        with contextlib.ExitStack() as stack:
            machine = stack.enter_context(Machine(files_before, os.listdir(sandbox.STUBS)))
            self.disks = stack.enter_context(Disks(machine, DISKS[disks]))
            self.run(machine, program, without_syncs)

    def run(self, machine, program, without_syncs):
        """Run the program, with a cut at each stop and at the end."""
        reader, writer = os.pipe()
        with Host(answers()) as host:
            process = machine.start(
                program,
                host,
                tracer=tracer('/proc/self/fd/%d' % writer, without_syncs),
                pass_fds=(writer,),
                **self.settings,
            )
            os.close(writer)
            timer = threading.Timer(LIMIT, kill_group, [process])
            timer.start()
            try:
                with open(reader, errors='replace') as lines:
                    self.follow(lines)
                stdout, stderr = process.communicate()
            finally:
                timer.cancel()
                kill_group(process)
        assert process.returncode == 0, (process.returncode, stdout, stderr)
        self.cut('the end', is_end=True)

    def follow(self, lines):
        """Read what strace says, and cut at each stop that has a change before it."""
        change = ''
        for line in lines:
            stopped = STOPPED.match(line)
            if stopped and change:
                self.cut(change)
                change = ''
            elif has_change(line):
                change = line.strip()
            if stopped:
                self.stops += 1
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(stopped.group(1)), signal.SIGCONT)
            elif SYNCED.match(line):
                self.syncs += 1

    def cut(self, moment, is_end=False):
        """Copy the disks, and look at the copy."""
        if self.another_syncs:
            for disk in self.disks.disks:
                disk.sync_another_file()
        if not self.disks.copy() and not is_end:
            return
        self.looks += 1
        problem = self.expected.problems(self.disks.look_at_copy(self.expected.paths), is_end)
        if problem:
            self.problems.append('cut at %.100s:\n%s' % (moment, problem))


def has_change(line):
    """Whether strace tells of a change on a disk, or of a sync."""
    if SYNCED.match(line) or RESUMED.match(line):
        return True
    return bool((CHANGED.match(line) or OPENED.match(line)) and ON_DISK.search(line))


def tracer(output, without_syncs):
    """The words that run a program, and stop it at each change and each sync."""
    strace = shutil.which('strace')
    if not strace:
        raise Skipped('no strace')
    calls = CHANGES + ',' + SYNCS
    traced = calls + ',open,openat'
    words = [strace, '-f', '-qq', '-y', '-e', 'trace=' + traced, '-o', output]
    if without_syncs:
        stop = '--inject=%s:retval=0:signal=STOP' % SYNCS
        return words + ['--inject=%s:signal=STOP' % CHANGES, stop]
    return words + ['--inject=%s:signal=STOP' % calls]


def expected(program, files_before, settings):
    """What may be found: by an undisturbed run, without disks."""
    with Machine(files_before, os.listdir(sandbox.STUBS)) as machine, Host(answers()) as host:
        before = machine.state()
        outcome = machine.run(program, host, **settings)
        assert outcome.status == 0, outcome
        return Expected(before, machine.state())


@functools.lru_cache(maxsize=None)
def without_disks(kind):
    """Why this machine can have no such disk, or nothing; a real try tells."""
    if os.getuid() != 0:
        return 'only root can mount disks'
    if not shutil.which(MKFS[kind][0]):
        return 'no ' + MKFS[kind][0]
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'disk')
        os.mkdir(path + '.folder')
        os.mkdir(path + '.empty')
        for words in (
            ['truncate', '-s', SIZES[kind], path],
            [*MKFS[kind], path],
            ['mount', '-o', OPTIONS[kind], path, path + '.folder'],
            ['umount', path + '.folder'],
        ):
            done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            if done.returncode != 0:
                said = done.stdout.decode('utf-8', 'replace').strip().replace('\n', ' ')
                return 'no disk with %s here: %s' % (kind, said)
    return ''


def holds(program, disks, steps, another_syncs):
    """Each file has its old or its whole new content after a cut."""
    run = Run(program, disks, steps, another_syncs)
    measured(
        '%s, %s, %s: %d stops, %d disks looked at, %d wrong, %d syncs',
        *(program, disks, 'another syncs' if another_syncs else 'nobody else syncs'),
        *(run.stops, run.looks, len(run.problems), run.syncs),
    )
    shown = ''.join(run.problems[:MOST_SHOWN])
    assert not run.problems, '%d of %d:\n%s' % (len(run.problems), run.looks, shown)


def control(program, disks, steps, another_syncs):
    """A run whose syncs do nothing is caught."""
    for _ in range(CONTROL_RUNS):
        run = Run(program, disks, steps, another_syncs, without_syncs=True)
        measured('%s, %s, control: %d of %d wrong', program, disks, len(run.problems), run.looks)
        if run.problems:
            return
    raise AssertionError('%d runs are not caught' % CONTROL_RUNS)


CHECKS = [
    (holds, disks, steps, another_syncs)
    for another_syncs in (False, True)
    for disks, steps in [(disks, STEPS) for disks in DISKS] + [('ext4', DEFAULT_STEPS)]
]
# When another file is synced, a file without content is there at once. Without that, a program of
# this machine that syncs all disks can hide it.
CHECKS += [(control, disks, STEPS, True) for disks in DISKS]


def hold(refused, program, check, disks, *others):
    """Hold a program against a check, where the disks can be had."""
    reasons = [refused or sandbox.without_roots()]
    reasons += [without_disks(kind) for kind in sorted(set(DISKS[disks].values())) if not refused]
    for reason in filter(None, reasons):
        raise Skipped(reason)
    check(program, disks, *others)


def tell_of(job):
    """Hold a program against a check, and print its line."""
    refused, program, check, disks, steps, another_syncs = job
    if not refused:  # or a disk stays in use as long as a run of another check goes on
        sandbox.system_call('unshare', 'a namespace for mounts', MOUNTS)
    what = '%s: %s: %s; %s' % (program, check.__doc__.rstrip('.'), disks, steps)
    return tell(what + '; another file is synced' * another_syncs, hold, *job)


def main():
    refused = sandbox.refusal()
    programs = sys.argv[1:] or OURS
    jobs = [(refused, program, *check) for program in programs for check in CHECKS]
    print('1..%d' % len(jobs), flush=True)
    # Processes: among threads, one would start commands with the open files of another.
    with multiprocessing.get_context('fork').Pool(CORES) as pool:
        passed = list(pool.imap_unordered(tell_of, jobs))
    sys.exit(0 if all(passed) else 1)


if __name__ == '__main__':
    main()
