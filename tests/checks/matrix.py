#!/usr/bin/env python3
"""Hold the two scripts against the cases everywhere: python3 tests/matrix.py [TEXT]

A cell is an interpreter, a set of programs on PATH, or a world to run in; TEXT chooses those that have it in their
name. What a cell cannot do stands in limits, and why; whatever else fails, fails the cell.
Prints a line a cell, in TAP; one whose interpreter or program is not on this machine is skipped. Exit status: 0, 1.
"""
import concurrent.futures
import fnmatch
import glob
import os
import shutil
import subprocess
import sys
import tempfile

import run
from host import loopback_only
from tap import Skipped, tell

PY, SH = run.OURS
BASICS = ['sleep', 'mv', 'rm', 'printf', 'mkdir', 'chmod', 'cat']  # what each shell needs, where it is not built in
STEPS = ['awk', 'base64', 'chown', 'date', 'grep', 'head', 'sed', 'tr']  # what user, password and data need beside that
ROGUE = """echo rogue
alias command=false printf=false sleep=false curl=false
exit 99
"""
LOCALES = ['tr_TR.UTF-8', 'ja_JP.EUC-JP', 'de_DE.ISO-8859-1']
ALL = ['*']
SOME = ['runs/*', 'hostnames/*', 'command-line/*']  # where the interpreter is that of another cell


def need(program):
    """The path of a program."""
    found = shutil.which(program)
    if not found:
        raise Skipped('no %s here' % program)
    return found


def python(minor):
    """A Python 3 and its script."""
    name = 'python3.%d' % minor
    for command in [name] + glob.glob(os.path.expanduser('~/.pyenv/versions/3.%d.*/bin/%s' % (minor, name))):
        if shutil.which(command) and subprocess.call([command, '-c', ''], stderr=subprocess.DEVNULL) == 0:
            return [shutil.which(command) + ' ' + PY], {}
    raise Skipped('no %s here' % name)


def shell(command, *options, path=None):
    """A shell and its script, with nothing else on PATH than what is named, if anything is."""
    world = {'PATH': folder_of(path)} if path else {}
    return [' '.join((need(command),) + options + (SH,))], world


def folder_of(programs):
    """A folder with these programs; `applets` stands for all of BusyBox's."""
    folder = tempfile.mkdtemp(dir=scratch)
    for program in programs:
        if program == 'applets':
            for applet in subprocess.check_output([need('busybox'), '--list'], universal_newlines=True).split():
                os.symlink(need('busybox'), os.path.join(folder, applet))
        else:
            os.symlink(os.path.realpath(need(program)), os.path.join(folder, program))
    return folder


def started(script, world=None):
    """Both scripts, started by a piece of shell."""
    return ["sh -c '%s' sh %s" % (script, program) for program in run.OURS], world or {}


def no_stdin():
    return started('exec "$@" <&-')


def relative_path():
    return ["sh -c 'cd %s && exec ./%s \"$@\"' sh" % os.path.split(program) for program in run.OURS], {}


def other_name():
    return [shutil.copy(program, os.path.join(tempfile.mkdtemp(dir=scratch), 'agent')) for program in run.OURS], {}


def read_only_root():
    if not os.path.ismount(tempfile.gettempdir()):
        raise Skipped('nothing could be written')
    if subprocess.call(['unshare', '--mount', 'mount', '-o', 'remount,bind,ro', '/'], stderr=subprocess.DEVNULL) != 0:
        raise Skipped('no mount namespace can be had')
    # the real mount: a stand-in is first on the PATH of a case
    return started('exec unshare --mount sh -c "%s -o remount,bind,ro / && exec \\"\\$@\\"" sh "$@"' % need('mount'))


def hostile_environment():
    folder = tempfile.mkdtemp(dir=scratch)
    rogue = os.path.join(folder, 'rogue')
    for name in 'rogue', 'http.py', 're.py', 'usercustomize.py':
        with open(os.path.join(folder, name), 'w') as file:
            file.write(ROGUE if name == 'rogue' else 'raise SystemExit(99)\n')
    with open(os.path.join(folder, '.curlrc'), 'w') as file:
        file.write('proxy = http://192.0.2.1\n')
    return run.OURS, {
        'PYTHONPATH': folder, 'PYTHONSTARTUP': rogue, 'PYTHONHOME': folder, 'BASH_ENV': rogue, 'ENV': rogue,
        'IFS': '/:. ', 'CDPATH': '/', 'GREP_OPTIONS': '-v', 'POSIXLY_CORRECT': '1', 'http_proxy': 'http://192.0.2.1',
        'WGETRC': rogue, 'CURL_HOME': folder, 'TZ': '../rogue', 'LD_BIND_NOW': '1', 'COLUMNS': '1', 'PS4': '$(exit 99)'}


def locale(name):
    need('localedef')
    folder = tempfile.mkdtemp(dir=scratch)
    language, _, charset = name.partition('.')
    if subprocess.call(['localedef', '-i', language, '-f', charset, os.path.join(folder, name)],
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) > 1:  # 1: warnings
        raise Skipped('no locale %s can be made' % name)
    return run.OURS, {'LOCPATH': folder, 'LANG': name, 'LC_ALL': name}


CELLS = [('Python 3.%d' % minor, ALL, python, [minor], {}) for minor in range(6, 14)] + [
    ('bash', ALL, shell, ['bash'], {}),
    ('bash --posix', ALL, shell, ['bash', '--posix'], {}),
    ('dash', ALL, shell, ['dash'], {}),
    ('mksh', ALL, shell, ['mksh'], {}),
    ('yash', ALL, shell, ['yash'], {}),
    ('zsh as sh', ALL, shell, ['zsh', '--emulate', 'sh'], {}),
    ('BusyBox and curl', ALL, shell, ['busybox', 'ash'], {'path': ['applets', 'curl']}),
    ('BusyBox alone', ALL, shell, ['busybox', 'ash'], {'path': ['applets']}),
    ('GNU wget', ALL, shell, ['dash'], {'path': BASICS + STEPS + ['wget', 'timeout']}),
    ('curl and the basics', SOME, shell, ['dash'], {'path': BASICS + ['curl']}),
    ('a closed stdin', SOME, no_stdin, [], {}),
    ('a relative path', SOME, relative_path, [], {}),
    ('another name', SOME, other_name, [], {}),
    ('a read-only root', SOME, read_only_root, [], {}),
    ('a hostile environment', SOME, hostile_environment, [], {}),
] + [(name, SOME, locale, [name], {}) for name in LOCALES]


def limits():
    """What a cell cannot do: the patterns of its cases, by cell."""
    lines = (run.TESTS / 'limits').read_text().splitlines()
    return [line.split(': ', 1) for line in lines if line and not line.startswith('#')]


def hold(cell, part, make, arguments, options):
    """Hold what a cell makes against its part of the cases."""
    programs, world = make(*arguments, **options)
    cases = [case for case in run.find_cases() if any(fnmatch.fnmatch(case.name, each) for each in part)]
    beyond = [case for name, case in limits() if name == cell]
    assert set(beyond) <= {case.name for case in cases}, 'no such cases in limits'
    cases = [case for case in cases if not run.impossible(case)]
    failed = []
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for program in programs:
            for case, found in zip(cases, pool.map(lambda case: run.verdict(case, program, True, world), cases)):
                if found and case.name not in beyond:
                    failed.append('%s%s' % (case.name, '\n' + '\n'.join(found) if len(failed) < 3 else ''))
    assert cases and not failed, '\n'.join([''] + failed)


def main():
    cells = [cell for cell in CELLS if ''.join(sys.argv[1:]) in cell[0]]
    print('1..%d' % len(cells), flush=True)
    skipped = [case for case in run.find_cases() if run.impossible(case)]
    if skipped:
        print('# without %d cases: %s' % (len(skipped), run.impossible(skipped[0])))
    passed = [tell(cell[0], hold, *cell) for cell in cells]
    sys.exit(0 if all(passed) else 1)


if __name__ == '__main__':
    loopback_only()
    if os.path.ismount('/dev/shm'):
        tempfile.tempdir = '/dev/shm'  # for the read-only root
    with tempfile.TemporaryDirectory() as scratch:
        main()
