#!/usr/bin/env python3
"""Test the kit: every known-bad port of mutants/ is caught by the case that it names. Prints TAP.

A mutant says what is wrong with it, by which case it is caught, and which lines of azure-
provisioning.py are changed for it. Its case passes without the change. Exit status: 0 all are
caught or skipped, 1.
"""

import concurrent.futures
import pathlib
import re
import sys
import tempfile

import kit_path  # noqa: F401  before the modules of the kit
import cases
import run
import sandbox

MUTANTS = pathlib.Path(__file__).resolve().parent / 'mutants'
MUTANT = re.compile('(?P<why>.*)\ncaught by (?P<case>.*)\n(?P<changes>--- before\n(?:.|\n)*)')
CHANGE = re.compile('--- before\n((?:.|\n)*?)\n[+]{3} after\n((?:.|\n)*?)\n(?=--- before|$)')
FEWEST = 15  # or some have been lost


def mutant(path, known):
    """The case that is to catch a mutant, what is wrong with it, and its source."""
    match = MUTANT.fullmatch(path.read_text())
    source = pathlib.Path(run.OURS[0]).read_text()
    for before, after in CHANGE.findall(match.group('changes')):
        assert source.count(before) == 1, '%s: not once in the script: %s' % (path.name, before)
        source = source.replace(before, after)
    return known[match.group('case')], match.group('why'), source


def caught(path, known, refused):
    """Whether the mutant's case catches it, and passes without the change; what to print of it."""
    case, why, source = mutant(path, known)
    said = '%s: %s (%s)' % (path.name, why, case.name)
    skipped = refused or run.impossible(case)
    if skipped:
        return True, said + ' # skip ' + skipped
    with tempfile.NamedTemporaryFile('w', suffix='.py') as program:
        program.write(source)
        program.flush()
        found, _ = run.verdict(case, '%s -IS %s' % (sys.executable, program.name), strict=False)
    return bool(found) and not run.verdict(case, run.OURS[0], strict=False)[0], said


def main():
    refused = sandbox.refusal()
    run.LIMIT = 20  # seconds: the cases named here take ten at most
    known = {case.name: case for case in cases.find()[0]}
    mutants = sorted(MUTANTS.iterdir())
    failed = len(mutants) < FEWEST
    print('1..%d' % len(mutants), flush=True)
    with concurrent.futures.ThreadPoolExecutor(run.BUSY) as pool:
        held = pool.map(lambda path: caught(path, known, refused), mutants)
        for number, (good, said) in enumerate(held, 1):
            failed = failed or not good
            print('%s %d caught: %s' % ('ok' if good else 'not ok', number, said), flush=True)
    sys.exit(1 if failed else 0)


if __name__ == '__main__':
    main()
