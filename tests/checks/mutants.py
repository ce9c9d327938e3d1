#!/usr/bin/env python3
"""Test the kit: every known-bad port of mutants/ is caught by the case that it names. Prints TAP.

A mutant says what is wrong with it, by which case it is caught, and which lines of azure-provisioning.py are changed
for it. Its case passes without the change. Exit status: 0 all are caught, 1.
"""
import concurrent.futures
import re
import sys
import tempfile

import run
from host import loopback_only

MUTANT = re.compile('(?P<why>.*)\ncaught by (?P<case>.*)\n(?P<changes>--- before\n(?:.|\n)*)')
CHANGE = re.compile('--- before\n((?:.|\n)*?)\n[+]{3} after\n((?:.|\n)*?)\n(?=--- before|$)')


def mutant(path):
    """The case that is to catch a mutant, what is wrong with it, and its source."""
    match = MUTANT.fullmatch(path.read_text())
    source = (run.TESTS.parent / 'azure-provisioning.py').read_text()
    for before, after in CHANGE.findall(match.group('changes')):
        assert source.count(before) == 1, '%s: not once in the script: %s' % (path.name, before)
        source = source.replace(before, after)
    return run.Case(run.TESTS / 'cases' / match.group('case')), match.group('why'), source


def caught(path):
    """Whether the mutant's case catches it, and passes without the change; the case, the fault, and a skip."""
    case, why, source = mutant(path)
    if run.impossible(case):
        return True, case.name, why, ' # skip %s' % run.impossible(case)
    with tempfile.NamedTemporaryFile('w', suffix='.py') as program:
        program.write(source)
        program.flush()
        differences = run.verdict(case, '%s -IS %s' % (sys.executable, program.name), strict=False)
    return bool(differences) and not run.verdict(case, run.OURS[0], strict=False), case.name, why, ''


def main():
    loopback_only()
    run.LIMIT = 20  # seconds: the cases named here take ten at most
    mutants = sorted((run.TESTS / 'mutants').iterdir())
    failed = len(mutants) < 15
    print('1..%d' % len(mutants))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for number, (path, (good, case, why, skip)) in enumerate(zip(mutants, pool.map(caught, mutants)), 1):
            failed = failed or not good
            print('%s %d caught: %s: %s (%s)%s' % ('ok' if good else 'not ok', number, path.name, why, case, skip),
                  flush=True)
    sys.exit(1 if failed else 0)


if __name__ == '__main__':
    main()
