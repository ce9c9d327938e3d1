#!/usr/bin/env python3
"""Test the cases: each mutant of mutants.txt is caught by the case that it names.

python3 tests/checks/mutants.py [--show] [--cases-pass] [TEXT]

TEXT chooses the mutants that have it in their name or in that of their case. --show also prints
what the case finds. The script itself has to pass each of the cases, which is tested, too; not with
--cases-pass, for a run of tests in which all cases are run anyway. Prints TAP. Exit status: 0 all
are caught or skipped, 1.
"""

import argparse
import ast
import builtins
import collections
import concurrent.futures
import functools
import os
import pathlib
import re
import sys
import tempfile

import kit_path  # noqa: F401  before the modules of the kit
import cases
import files
import run
import sandbox

TABLE = pathlib.Path(__file__).resolve().parent / 'mutants.txt'
CONTRACT = run.PROJECT / 'docs/contract.md'
SCRIPT = run.OURS[0]
FEWEST = 150  # or some have been lost
LIMIT = 45  # seconds for one run: one case takes half a minute
# A mutant may try for ever what its case expects to be refused. It need not wait between attempts.
ENVIRONMENT = {'AZURE_PROVISIONING_INTERVAL': '0'}
HEAD = re.compile(
    r'(?P<name>\S+) \| (?P<rule>\w+) \| (?P<options>(?:--\w+ )*)(?P<case>\S+/\S+) \| (?P<why>.+)'
)
WITHOUT = re.compile(r'none \| (?P<rule>\w+) \| .+')
RULE = re.compile(r'^(?:\| |- )\*\*(\w+)\*\*', re.MULTILINE)  # in the contract
CHANGE = re.compile(r'    (?P<old>\S.*?) =>(?: (?P<new>.*))?')
CONTINUED = re.compile('        (?P<line>.*)')
LINE_BREAK = ' // '  # within an old text
PART_BREAK = '\n\n\n'  # between the functions of the script

Mutant = collections.namedtuple('Mutant', 'name rule options case why changes')


class BadMutant(Exception):
    """A mutant that is not in order."""


def read_table(text):
    """Return the mutants that a table has."""
    mutants = []
    for line in text.split('\n'):
        head, change, continued = (each.fullmatch(line) for each in (HEAD, CHANGE, CONTINUED))
        if head:
            name, rule, options, case, why = head.groups()
            mutants.append(Mutant(name, rule, options.split(), case, why, []))
        elif change and mutants:
            mutants[-1].changes.append((change.group('old'), change.group('new') or ''))
        elif continued and mutants and mutants[-1].changes:
            old, new = mutants[-1].changes.pop()
            mutants[-1].changes.append((old, '%s\n%s' % (new, continued.group('line'))))
        elif line and not line.startswith('#') and not WITHOUT.fullmatch(line):
            sys.exit('%s: what is %r?' % (TABLE.name, line))
    names = collections.Counter(mutant.name for mutant in mutants)
    if max(names.values()) > 1:
        sys.exit('%s: there twice: %s' % (TABLE.name, names.most_common(1)[0][0]))
    return mutants


def source_of(mutant, source):
    """Return the source of a mutant. Raise BadMutant if it cannot be made, or cannot run."""
    if not mutant.changes:
        raise BadMutant('it has no change')
    for old, new in mutant.changes:
        source = replaced(source, old, new)
    missing = undefined_names(source)
    if missing:
        raise BadMutant('nothing has the name %s' % ', '.join(sorted(missing)))
    return source


def replaced(source, old, new):
    """Return a source with a change. More lines of the new text are indented as the first one."""
    pattern = '\n *'.join(re.escape(part) for part in old.split(LINE_BREAK))
    found = list(re.finditer(pattern, source))
    if len(found) != 1:
        raise BadMutant('%d times in the script: %s' % (len(found), old))
    start, end = found[0].span()
    line = source[source.rindex('\n', 0, start) + 1 :]
    indentation = re.match(' *', line).group()
    return source[:start] + new.replace('\n', '\n' + indentation) + source[end:]


def undefined_names(source):
    """Return the names that are used and nowhere defined: a crash would be caught by any case."""
    used, defined = set(), set(dir(builtins))
    for part in source.split(PART_BREAK):
        names = names_of(part)
        used |= names[0]
        defined |= names[1]
    return used - defined


@functools.lru_cache(maxsize=None)  # a mutant differs from the script in one part or two
def names_of(part):
    """Return the names that a part of a source uses, and those that it defines."""
    try:
        tree = ast.parse(part)
    except SyntaxError as error:
        where = (error.text or '').strip()
        raise BadMutant('no Python: %s: %s' % (error.msg, where)) from error
    used, defined = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else defined).add(node.id)
        elif isinstance(node, ast.arg):
            defined.add(node.arg)
        elif isinstance(node, ast.alias):
            defined.add((node.asname or node.name).split('.')[0])
        elif hasattr(node, 'name'):
            defined.add(node.name)  # of a function, a class or an exception
    return used, defined


def wrong_rules(mutants, table):
    """Return what is wrong with the rules that the table names, in lines."""
    known = RULE.findall(CONTRACT.read_text(encoding='utf-8'))
    named = {mutant.rule for mutant in mutants}
    without = {match.group('rule') for match in map(WITHOUT.fullmatch, table.split('\n')) if match}
    yield from ('%s has no mutant' % rule for rule in known if rule not in named | without)
    yield from ('%s has a mutant, and a line "none"' % rule for rule in sorted(named & without))
    yield from ('there is no rule %s' % rule for rule in sorted((named | without) - set(known)))


class Checker:
    """Runs cases for mutants and for the script itself: those that wait side by side."""

    def __init__(self, folder, refused, cases_pass):
        self.folder, self.refused, self.cases_pass = folder, refused, cases_pass
        self.known = {case.name: case for case in cases.find()[0]}
        self.source = pathlib.Path(SCRIPT).read_text(encoding='utf-8')
        self.busy = concurrent.futures.ThreadPoolExecutor(run.BUSY)
        self.waiting = concurrent.futures.ThreadPoolExecutor(run.WAITING)

    def reason_to_skip(self, mutant):
        """Return why this machine cannot run a mutant, or ''."""
        if self.refused:
            return self.refused
        if '--root' in mutant.options and files.new_user()[0] == 0:
            return "only root's run has users with other numbers than 0"
        case = self.known.get(mutant.case)
        return run.impossible(case) if case else ''

    def make(self, mutant):
        """Write the program of a mutant; return its path. Raise BadMutant if that cannot be."""
        if mutant.case not in self.known:
            raise BadMutant('there is no case %s' % mutant.case)
        source = source_of(mutant, self.source)
        program = os.path.join(self.folder, mutant.name + '.py')
        with open(program, 'w', encoding='utf-8') as file:
            file.write(source)
        return program

    def run(self, mutant, program):
        """Run a program for the case of a mutant, as soon as there is room for it."""
        case, strict = self.known[mutant.case], '--strict' in mutant.options
        command = '%s -IS %s' % (sys.executable, program)
        waits = run.waits(case) or '--waits' in mutant.options
        pool = self.waiting if waits else self.busy
        return pool.submit(lambda: run.verdict(case, command, strict, ENVIRONMENT)[0])

    def try_all(self, mutants):
        """Yield each mutant with what is wrong with it, if anything, and what its case finds."""
        runs, originals = [], {}
        for mutant in mutants:
            try:
                changed = self.run(mutant, self.make(mutant))
            except BadMutant as error:
                yield mutant, str(error), []
                continue
            key = mutant.case, '--strict' in mutant.options
            if key not in originals and not self.cases_pass:
                originals[key] = self.run(mutant, SCRIPT)
            runs.append((mutant, originals.get(key), changed))
        for mutant, original, changed in runs:
            found = original.result() if original else []
            yield (mutant, *self.outcome(found, changed.result()))

    @staticmethod
    def outcome(original, changed):
        if original:
            return 'the script itself fails the case', original
        return '' if changed else 'the case passes', changed


class Report:
    """Prints TAP, a line a mutant."""

    def __init__(self, count, show):
        print('1..%d' % count, flush=True)
        self.number, self.show, self.good = 0, show, True

    def tell(self, what, problem, details=()):
        self.number += 1
        self.good = self.good and not problem
        lines = ['%s %d %s' % ('not ok' if problem else 'ok', self.number, what)]
        details = list(details) if problem or self.show else []
        for detail in [problem] * bool(problem) + details:
            lines += ['# ' + line for line in detail.split('\n')]
        print('\n'.join(lines), flush=True)

    def tell_mutant(self, mutant, problem, found):
        what = '%s: %s (%s: %s)' % (mutant.name, mutant.why, mutant.rule, mutant.case)
        self.tell(what, problem, found)


def check(mutants, report, cases_pass=False):
    """Run the mutants, and print what came of them."""
    run.LIMIT = LIMIT
    refused = sandbox.refusal()  # before the folder: it is in the sandbox
    with tempfile.TemporaryDirectory() as folder:
        checker = Checker(folder, refused, cases_pass)
        possible, again = [], []
        for mutant in mutants:
            reason = checker.reason_to_skip(mutant)
            if reason:
                report.tell('%s # skip %s' % (mutant.name, reason), '')
            else:
                possible.append(mutant)
        for mutant, problem, found in checker.try_all(possible):
            if problem:
                again.append(mutant)  # the machine may have been too busy to keep the time limits
            else:
                report.tell_mutant(mutant, problem, found)
        for mutant in again:
            for result in checker.try_all([mutant]):
                report.tell_mutant(*result)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--show', action='store_true')
    parser.add_argument('--cases-pass', action='store_true')
    parser.add_argument('text', nargs='?', default='', metavar='TEXT')
    options = parser.parse_args()
    table = TABLE.read_text(encoding='utf-8')
    mutants = read_table(table)
    if len(mutants) < FEWEST:
        sys.exit('%s: %d mutants; there were %d' % (TABLE.name, len(mutants), FEWEST))
    chosen = [each for each in mutants if options.text in '%s %s' % (each.name, each.case)]
    report = Report(len(chosen) + 1, options.show)
    check(chosen, report, options.cases_pass)
    wrong = list(wrong_rules(mutants, table))
    report.tell('each rule of the contract has its mutant', ', '.join(wrong))
    sys.exit(0 if report.good else 1)


if __name__ == '__main__':
    main()
