#!/usr/bin/env python3
"""Run the formatters and linters: python3 tests/checks/lint.py [CHECK]...

A CHECK is one of ruff-format, ruff-check, shfmt and shellcheck; without one, all run. `format`
applies the formatters. `make lint` and `make format` first install the tools into .venv; a tool
that is not there is taken from PATH. Exit status: 0 there is nothing to say, 1 there is, 3 a tool
cannot be had.
"""

import os
import pathlib
import shutil
import subprocess
import sys

PROJECT = pathlib.Path(__file__).resolve().parents[2]
VENV = PROJECT / '.venv/bin'
SHEBANGS = {b'#!/bin/sh': 'sh', b'#!/bin/bash': 'bash', b'#!/usr/bin/env bash': 'bash'}
DIALECTS = {'sh': ['sh'], 'dash': ['sh'], 'bash': ['sh', 'bash'], 'bats': ['bats']}
UNAVAILABLE = 3  # exit status


def find_tool(name):
    """Return the path of a tool; end the program if it cannot be had."""
    tool = shutil.which(name, path=f'{VENV}:{os.environ["PATH"]}')
    if not tool:
        print(f'{name} cannot be had')
        sys.exit(UNAVAILABLE)
    return tool


def run(*command):
    """Run a command in the project's folder; return whether it has nothing to say."""
    return subprocess.run(command, cwd=PROJECT).returncode == 0


def shell_files():
    """Return the shell programs of the project, with the language of each."""
    found = {}
    for path in sorted(PROJECT.rglob('*')):
        name = str(path.relative_to(PROJECT))
        if path.is_symlink() or not path.is_file() or name.startswith(('.git/', '.venv/')):
            continue
        with path.open('rb') as file:
            first_line = file.readline(80).strip()
        if path.suffix == '.bats':
            found[name] = 'bats'
        elif first_line in SHEBANGS:
            found[name] = SHEBANGS[first_line]
    return found


def ruff_format():
    return run(find_tool('ruff'), 'format', '--quiet', '--diff', '.')


def ruff_check():
    return run(find_tool('ruff'), 'check', '--quiet', '.')


def shfmt():
    return run(find_tool('shfmt'), '-i', '4', '-d', *shell_files())


def shellcheck():
    """What is written for sh has to be clean for dash and Bash, too."""
    passed = True
    for dialect, languages in DIALECTS.items():
        names = [name for name, language in shell_files().items() if language in languages]
        if names and not run(find_tool('shellcheck'), f'--shell={dialect}', *names):
            passed = False
    return passed


def apply_formatters():
    formatters = [
        [find_tool('ruff'), 'format', '--quiet', '.'],
        [find_tool('shfmt'), '-i', '4', '-w', *shell_files()],
    ]
    return all([run(*command) for command in formatters])


CHECKS = {
    'ruff-format': ruff_format,
    'ruff-check': ruff_check,
    'shfmt': shfmt,
    'shellcheck': shellcheck,
}


def main():
    if sys.argv[1:] == ['format']:
        sys.exit(0 if apply_formatters() else 1)
    passed = [CHECKS[name]() for name in sys.argv[1:] or CHECKS]
    sys.exit(0 if all(passed) else 1)


if __name__ == '__main__':
    main()
