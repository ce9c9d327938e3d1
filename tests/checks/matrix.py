#!/usr/bin/env python3
"""Run the cases with other interpreters, programs and environments: python3 tests/checks/matrix.py
[TEXT]

Each of these is a configuration. TEXT selects those that have it in their name. A case that fails
in one for a reason stands in expected-failures, with the reason. What else fails, and what passes
though it stands there, fails the configuration. Prints TAP, a line for each; a configuration whose
interpreter or program is not on this machine is skipped. Exit status: 0 none failed, 1 some did.
"""

import collections
import glob
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

import kit_path  # noqa: F401  before the modules of the kit
import cases
import run
import sandbox
from tap import Skipped, measured, tell

PY, SH = run.OURS
EXPECTED_FAILURES = pathlib.Path(__file__).resolve().parent / 'expected-failures'
ENTRY = re.compile('(?P<configuration>[^:]+): (?P<case>[^ ]+)(?P<sometimes> sometimes)?')
SHOWN = 3  # failures that are shown with what differs
# What the shell script has to find on PATH, beside curl or wget
DEFAULT_STEPS = ['chmod', 'mkdir', 'mv', 'rm', 'sleep', 'sync', 'tr']
OTHER_STEPS = [
    'base64',
    'cat',
    'chown',
    'cp',
    'date',
    'grep',
    'ls',
    'readlink',
    'sed',
    'uname',
]
WGET = ['wget', 'head', 'timeout']
ROGUE = """echo rogue
alias command=false printf=false sleep=false curl=false
exit 99
"""
BUSYBOX = ['busybox', 'ash']
LOCALES = ['tr_TR.UTF-8', 'ja_JP.EUC-JP', 'de_DE.ISO-8859-1']
FAMILIES = sorted(path.name for path in cases.CASES.iterdir() if path.is_dir())
SOME = ['command-line', 'hostnames', 'runs']  # where the interpreter is that of other ones


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


def shell(words, programs=None):
    """A shell and its script, with nothing else on PATH than these programs, if any are named."""
    environment = {'PATH': folder_of(programs)} if programs else {}
    return [' '.join([need(words[0])] + words[1:] + [SH])], environment


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


# name: what is in the expected failures, and in the output
# families: of cases
# make, arguments: a function that returns the programs and an environment
# at_once: how many runs are started at once
Configuration = collections.namedtuple('Configuration', 'name families make arguments at_once')


def configuration(name, families, make, *arguments, at_once=run.BUSY):
    return Configuration(name, families, make, arguments, at_once)


def python_configurations():
    """The oldest and the newest Python run all families, each of those between a third of them."""
    found = [configuration('Python 3.%d' % minor, FAMILIES, python, minor) for minor in (6, 13)]
    for minor in range(7, 13):
        found.append(configuration('Python 3.%d' % minor, FAMILIES[minor % 3 :: 3], python, minor))
    return found


CONFIGURATIONS = [
    *python_configurations(),
    configuration('bash', FAMILIES, shell, ['bash']),
    configuration('bash --posix', SOME, shell, ['bash', '--posix']),
    configuration('dash', FAMILIES, shell, ['dash']),
    configuration('mksh', FAMILIES, shell, ['mksh']),
    configuration('yash', FAMILIES, shell, ['yash']),
    configuration('zsh as sh', FAMILIES, shell, ['zsh', '--emulate', 'sh']),
    configuration('BusyBox and curl', FAMILIES, shell, BUSYBOX, ['applets', 'curl']),
    # BusyBox's timeout waits for up to a second.
    configuration('BusyBox alone', FAMILIES, shell, BUSYBOX, ['applets'], at_once=run.WAITING),
    configuration('GNU wget', FAMILIES, shell, ['dash'], DEFAULT_STEPS + OTHER_STEPS + WGET),
    configuration('curl and little else', SOME, shell, ['dash'], DEFAULT_STEPS + ['curl']),
    configuration('a closed stdin', SOME, no_stdin),
    configuration('a relative path', SOME, relative_path),
    configuration('another name', SOME, other_name),
    configuration('a hostile environment', SOME, hostile_environment),
    *(configuration(name, SOME, locale, name) for name in LOCALES),
]


def expected_failures():
    """Return the entries of expected-failures: configuration, case, and whether it may pass."""
    found = {}
    has_reason = False
    for line in EXPECTED_FAILURES.read_text().splitlines():
        if not line or line.startswith('#'):
            has_reason = bool(line)
            continue
        entry = ENTRY.fullmatch(line)
        assert entry and has_reason, 'expected-failures: not in order: %s' % line
        found[entry.group('configuration'), entry.group('case')] = bool(entry.group('sometimes'))
    return found


def check_expected_failures(found):
    """Each entry has a reason, and names a configuration and a case that are there."""
    names = {case.name for case in found}
    for name, case in expected_failures():
        families = [each.families for each in CONFIGURATIONS if each.name == name]
        assert families, 'expected-failures: no such configuration: %s' % name
        is_known = case in names and case.split('/')[0] in families[0]
        assert is_known, 'expected-failures: no such case: %s: %s' % (name, case)


def hold(configuration, found, common):
    """Run the cases in a configuration."""
    programs, environment = configuration.make(*configuration.arguments)
    entries = expected_failures()
    run.BUSY = configuration.at_once
    runner = run.Runner(found, common, programs, True, environment)
    failed = {}
    for _, case, differences in runner.results():
        is_expected = (configuration.name, case.name) in entries
        if differences and not is_expected:
            failed[case.name] = differences
        elif is_expected and not differences and not entries[configuration.name, case.name]:
            failed[case.name] = ['passed, though it stands in expected-failures']
    failed.update(runner.other_usages())
    shown = [
        case + ('\n' + '\n'.join(lines) if number < SHOWN else '')
        for number, (case, lines) in enumerate(sorted(failed.items()))
    ]
    assert found and not failed, '\n'.join([''] + shown)


def main():
    chosen = [each for each in CONFIGURATIONS if ''.join(sys.argv[1:]) in each.name]
    print('1..%d' % (1 + len(chosen)), flush=True)
    found, common = cases.find()
    passed = [tell('each expected failure is one', check_expected_failures, found)]
    refused = sandbox.refusal()
    if refused:
        for each in chosen:
            print('ok %s # skip %s' % (each.name, refused))
        sys.exit(0 if all(passed) else 1)
    skipped = [case for case in found if run.impossible(case)]
    if skipped:
        print('# without %d cases: %s' % (len(skipped), run.impossible(skipped[0])))
    for each in chosen:
        part = [case for case in found if case.name.split('/')[0] in each.families]
        part = [case for case in part if not run.impossible(case)]
        started = time.monotonic()
        passed.append(tell(each.name, hold, each, part, common))
        measured('%d cases, %.0f s', len(part), time.monotonic() - started)
    sys.exit(0 if all(passed) else 1)


if __name__ == '__main__':
    main()
