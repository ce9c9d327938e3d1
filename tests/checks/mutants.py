#!/usr/bin/env python3
"""Test the cases: each mutant of mutants.txt is caught by the case that it names.

python3 tests/checks/mutants.py [--show] [TEXT]

TEXT chooses the mutants that have it in their name or in that of their case. --show also prints
what the case finds. Prints TAP. Exit status: 0 all are caught or skipped, 1.
"""

import argparse
import ast
import builtins
import collections
import concurrent.futures
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
SCRIPT = run.OURS[0]
FEWEST = 150  # or some have been lost
LIMIT = 15  # seconds for one run: the cases that are named take ten at most
# A mutant may try for ever what its case expects to be refused. It need not wait between attempts.
ENVIRONMENT = {'AZURE_PROVISIONING_INTERVAL': '0'}
HEAD = re.compile(r'(?P<name>\S+) +\| (?P<options>(?:--\w+ )*)(?P<case>\S+) +\| (?P<why>.+)')
CHANGE = re.compile(r'    (?P<old>\S.*?) =>(?: (?P<new>.*))?')
CONTINUED = re.compile('        (?P<line>.*)')
LINE_BREAK = ' // '  # within an old text

Mutant = collections.namedtuple('Mutant', 'name options case why changes')


class BadMutant(Exception):
    """A mutant that is not in order."""


def read_table(text):
    """Return the mutants that a table has."""
    mutants = []
    for line in text.split('\n'):
        head, change, continued = (each.fullmatch(line) for each in (HEAD, CHANGE, CONTINUED))
        if head:
            name, options, case, why = head.group('name', 'options', 'case', 'why')
            mutants.append(Mutant(name, options.split(), case, why, []))
        elif change and mutants:
            mutants[-1].changes.append((change.group('old'), change.group('new') or ''))
        elif continued and mutants and mutants[-1].changes:
            old, new = mutants[-1].changes.pop()
            mutants[-1].changes.append((old, '%s\n%s' % (new, continued.group('line'))))
        elif line and not line.startswith('#'):
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
    try:
        missing = undefined_names(ast.parse(source))
    except SyntaxError as error:
        raise BadMutant('no Python: %s' % error) from error
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


def undefined_names(tree):
    """Return the names that are used and nowhere defined: a crash would be caught by any case."""
    used, defined = set(), set(dir(builtins))
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else defined).add(node.id)
        elif isinstance(node, ast.arg):
            defined.add(node.arg)
        elif isinstance(node, ast.alias):
            defined.add((node.asname or node.name).split('.')[0])
        elif hasattr(node, 'name'):
            defined.add(node.name)  # of a function, a class or an exception
    return used - defined


class Checker:
    """Runs the mutants, and the script itself: those that wait side by side."""

    def __init__(self, folder):
        self.folder = folder
        self.known = {case.name: case for case in cases.find()[0]}
        self.source = pathlib.Path(SCRIPT).read_text(encoding='utf-8')
        self.busy = concurrent.futures.ThreadPoolExecutor(run.BUSY)
        self.waiting = concurrent.futures.ThreadPoolExecutor(run.WAITING)
        self.originals = {}

    def start(self, mutant):
        """Start the runs for a mutant. Return a function that waits for them.

        It returns the differences that the case finds. It raises BadMutant if the mutant is not in
        order, or if the case also finds something without the change.
        """
        case, strict = self.known.get(mutant.case), '--strict' in mutant.options
        if not case:
            return self.bad('there is no case %s' % mutant.case)
        try:
            source = source_of(mutant, self.source)
        except BadMutant as error:
            return self.bad(str(error))
        program = os.path.join(self.folder, mutant.name + '.py')
        with open(program, 'w', encoding='utf-8') as file:
            file.write(source)
        key = case.name, strict
        if key not in self.originals:
            self.originals[key] = self.submit(case, SCRIPT, strict)
        original, changed = self.originals[key], self.submit(case, program, strict)

        def result():
            if original.result():
                raise BadMutant('the script itself fails the case')
            return changed.result()

        return result

    @staticmethod
    def bad(reason):
        def result():
            raise BadMutant(reason)

        return result

    def submit(self, case, program, strict):
        """Run a program for a case as soon as there is room for it."""
        pool = self.waiting if run.waits(case) else self.busy
        return pool.submit(self.differences, case, program, strict)

    @staticmethod
    def differences(case, program, strict):
        command = '%s -IS %s' % (sys.executable, program)
        return run.verdict(case, command, strict, ENVIRONMENT)[0]

    def reason_to_skip(self, mutant, refused):
        """Return why this machine cannot run a mutant, or ''."""
        if refused:
            return refused
        if '--root' in mutant.options and files.new_user()[0] == 0:
            return 'only root can tell owners apart'
        case = self.known.get(mutant.case)
        return run.impossible(case) if case else ''


def tell(number, mutant, result, show):
    """Print what came of a mutant; return whether it is caught."""
    told = '%d %s: %s (%s)' % (number, mutant.name, mutant.why, mutant.case)
    try:
        found = result()
        problem = '' if found else 'the case passes'
    except BadMutant as error:
        found, problem = [], str(error)
    print('%s %s' % ('not ok' if problem else 'ok', told), flush=True)
    for line in [problem] * bool(problem) + found * show:
        print('# ' + line.replace('\n', '\n# '), flush=True)
    return not problem


def check(mutants, show):
    """Run the mutants, and print what came of them; return whether all are caught or skipped."""
    refused = sandbox.refusal()
    run.LIMIT = LIMIT
    with tempfile.TemporaryDirectory() as folder:
        checker = Checker(folder)
        skipped = [checker.reason_to_skip(mutant, refused) for mutant in mutants]
        results = [
            None if reason else checker.start(mutant) for mutant, reason in zip(mutants, skipped)
        ]
        good = True
        for number, (mutant, reason, result) in enumerate(zip(mutants, skipped, results), 1):
            if reason:
                print('ok %d %s # skip %s' % (number, mutant.name, reason), flush=True)
            elif not tell(number, mutant, result, show):
                good = False
    return good


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--show', action='store_true')
    parser.add_argument('text', nargs='?', default='', metavar='TEXT')
    options = parser.parse_args()
    mutants = read_table(TABLE.read_text(encoding='utf-8'))
    if len(mutants) < FEWEST:
        sys.exit('%s: %d mutants; there were %d' % (TABLE.name, len(mutants), FEWEST))
    mutants = [each for each in mutants if options.text in each.name + ' ' + each.case]
    print('1..%d' % len(mutants), flush=True)
    sys.exit(0 if check(mutants, options.show) else 1)


if __name__ == '__main__':
    main()
