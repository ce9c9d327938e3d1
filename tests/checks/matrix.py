#!/usr/bin/env python3
"""Hold the two scripts against the cases everywhere: python3 tests/checks/matrix.py [TEXT]

A configuration is an interpreter, a set of programs on PATH, or an environment; TEXT chooses those
that have it in their name. What fails in one for a reason stands in expected-failures; whatever
else fails, fails the configuration. Prints a line for each, in TAP; one whose interpreter or
program is not on this machine is skipped. Exit status: 0, 1.
"""

import fnmatch
import glob
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import kit_path  # noqa: F401  before the modules of the kit
import cases
import run
import sandbox
from tap import Skipped, tell

PY, SH = run.OURS
EXPECTED_FAILURES = pathlib.Path(__file__).resolve().parent / 'expected-failures'
SHOWN = 3  # failures that are shown with what differs
# what each shell needs, where it is not built in
BASICS = ['sleep', 'mv', 'rm', 'printf', 'mkdir', 'chmod', 'cat']
# what user, password and data need beside that
STEPS = ['awk', 'base64', 'chown', 'date', 'grep', 'head', 'sed', 'tr']
ROGUE = """echo rogue
alias command=false printf=false sleep=false curl=false
exit 99
"""
LOCALES = ['tr_TR.UTF-8', 'ja_JP.EUC-JP', 'de_DE.ISO-8859-1']
ALL = ['*']
SOME = [
    'runs/*',
    'hostnames/*',
    'command-line/*',
]  # where the interpreter is that of another configuration


def need(program):
    """The path of a program."""
    found = shutil.which(program)
    if not found:
        raise Skipped('no %s here' % program)
    return found


def python(minor):
    """A Python 3 and its script."""
    name = 'python3.%d' % minor
    for command in [name] + glob.glob(
        os.path.expanduser('~/.pyenv/versions/3.%d.*/bin/%s' % (minor, name))
    ):
        if (
            shutil.which(command)
            and subprocess.call([command, '-c', ''], stderr=subprocess.DEVNULL) == 0
        ):
            return [shutil.which(command) + ' ' + PY], {}
    raise Skipped('no %s here' % name)


def shell(command, *options, path=None):
    """A shell and its script, with nothing else on PATH than what is named, if anything is."""
    environment = {'PATH': folder_of(path)} if path else {}
    return [' '.join((need(command),) + options + (SH,))], environment


def folder_of(programs):
    """A folder with these programs; `applets` stands for all of BusyBox's."""
    folder = tempfile.mkdtemp()
    for program in programs:
        if program == 'applets':
            for applet in subprocess.check_output(
                [need('busybox'), '--list'], universal_newlines=True
            ).split():
                os.symlink(need('busybox'), os.path.join(folder, applet))
        else:
            os.symlink(os.path.realpath(need(program)), os.path.join(folder, program))
    return folder


def started(script, environment=None):
    """Both scripts, started by a piece of shell."""
    return ["sh -c '%s' sh %s" % (script, program) for program in run.OURS], environment or {}


def no_stdin():
    return started('exec "$@" <&-')


def relative_path():
    return [
        'sh -c \'cd %s && exec ./%s "$@"\' sh' % os.path.split(program) for program in run.OURS
    ], {}


def other_name():
    return [
        shutil.copy(program, os.path.join(tempfile.mkdtemp(), 'agent')) for program in run.OURS
    ], {}


def hostile_environment():
    folder = tempfile.mkdtemp()
    rogue = os.path.join(folder, 'rogue')
    for name in 'rogue', 'http.py', 're.py', 'usercustomize.py':
        with open(os.path.join(folder, name), 'w') as file:
            file.write(ROGUE if name == 'rogue' else 'raise SystemExit(99)\n')
    with open(os.path.join(folder, '.curlrc'), 'w') as file:
        file.write('proxy = http://192.0.2.1\n')
    return run.OURS, {
        'PYTHONPATH': folder,
        'PYTHONSTARTUP': rogue,
        'PYTHONHOME': folder,
        'BASH_ENV': rogue,
        'ENV': rogue,
        'IFS': '/:. ',
        'CDPATH': '/',
        'GREP_OPTIONS': '-v',
        'POSIXLY_CORRECT': '1',
        'http_proxy': 'http://192.0.2.1',
        'WGETRC': rogue,
        'CURL_HOME': folder,
        'TZ': '../rogue',
        'LD_BIND_NOW': '1',
        'COLUMNS': '1',
        'PS4': '$(exit 99)',
    }


def locale(name):
    need('localedef')
    folder = tempfile.mkdtemp()
    language, _, charset = name.partition('.')
    if (
        subprocess.call(
            ['localedef', '-i', language, '-f', charset, os.path.join(folder, name)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        > 1
    ):  # 1: warnings
        raise Skipped('no locale %s can be made' % name)
    return run.OURS, {'LOCPATH': folder, 'LANG': name, 'LC_ALL': name}


CONFIGURATIONS = (
    [('Python 3.%d' % minor, ALL, python, [minor], {}) for minor in range(6, 14)]
    + [
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
        ('a hostile environment', SOME, hostile_environment, [], {}),
    ]
    + [(name, SOME, locale, [name], {}) for name in LOCALES]
)


def expected_failures(name):
    """The cases that fail in a configuration, for the reason that stands there."""
    lines = EXPECTED_FAILURES.read_text().splitlines()
    entries = [line.split(': ', 1) for line in lines if line and not line.startswith('#')]
    return {case for configuration, case in entries if configuration == name}


def hold(name, part, make, arguments, options):
    """Hold what a configuration makes against its part of the cases."""
    programs, environment = make(*arguments, **options)
    found, common = cases.find()
    found = [case for case in found if any(fnmatch.fnmatch(case.name, each) for each in part)]
    expected = expected_failures(name)
    assert expected <= {case.name for case in found}, 'no such cases in expected-failures'
    found = [case for case in found if not run.impossible(case)]
    runner = run.Runner(found, common, programs, True, environment)
    failed = {
        case.name: lines
        for _, case, lines in runner.results()
        if lines and case.name not in expected
    }
    failed.update(runner.other_usages())
    shown = [
        case + ('\n' + '\n'.join(lines) if number < SHOWN else '')
        for number, (case, lines) in enumerate(sorted(failed.items()))
    ]
    assert found and not failed, '\n'.join([''] + shown)


def main():
    chosen = [each for each in CONFIGURATIONS if ''.join(sys.argv[1:]) in each[0]]
    print('1..%d' % len(chosen), flush=True)
    refused = sandbox.refusal()
    if refused:
        for name, *_ in chosen:
            print('ok %s # skip %s' % (name, refused))
        return
    skipped = [case for case in cases.find()[0] if run.impossible(case)]
    if skipped:
        print('# without %d cases: %s' % (len(skipped), run.impossible(skipped[0])))
    passed = [tell(each[0], hold, *each) for each in chosen]
    sys.exit(0 if all(passed) else 1)


if __name__ == '__main__':
    main()
