#!/usr/bin/env python3
"""Check what no formatter or linter does: python3 tests/checks/style.py SCRIPT...

All is ASCII, as some shells read nothing else in the locale C. No function has over 40 lines, no
line over 100 columns but the usage's, which have 80. There is one statement a line. Python: an
expression is no statement, unless it is a call. Shell: no condition acts, see check_list. Prints
what is wrong, a line each. Exit status: 0 nothing, 1.
"""

import ast
import re
import sys

import shell

LONGEST_FUNCTION = 40  # lines
LONGEST_LINE = 100  # columns
LONGEST_LINE_OF_USAGE = 80


def check_lines(source):
    """Yield each line that is too long, or not ASCII: its number, and what is wrong."""
    usage = usage_lines(source)
    for number, line in enumerate(source.split('\n'), 1):
        longest = LONGEST_LINE_OF_USAGE if number in usage else LONGEST_LINE
        if len(line) > longest:
            yield number, f'{len(line)} columns'
        if not re.fullmatch('[ -~]*', line):
            yield number, 'what is not ASCII'


def usage_lines(source):
    """Return the numbers of the lines of the usage, in either language."""
    match = re.search(r'^USAGE(?: = """\\\n|=\')([^\'"]*)', source, re.MULTILINE)
    if not match:
        return range(0)
    first = source.count('\n', 0, match.start(1)) + 1
    return range(first, first + match.group(1).count('\n') + 1)


# ---- Python ------------------------------------------------------------------------------------


def check_python(source):
    """Yield what is wrong in Python code: a line's number, and what it is."""
    nodes = list(ast.walk(ast.parse(source)))
    statements = {}
    for node in nodes:
        if isinstance(node, ast.stmt):
            if node.lineno in statements:
                yield node.lineno, 'two statements in a line'
            statements[node.lineno] = node
        if is_long_function(node):
            yield node.lineno, f'{node.name} has over {LONGEST_FUNCTION} lines'
        if isinstance(node, ast.Expr) and not is_statement(node.value):
            yield node.lineno, 'an expression as a statement'


def is_long_function(node):
    if not isinstance(node, ast.FunctionDef):
        return False
    last = max(getattr(each, 'end_lineno', None) or each.lineno for each in node.body)
    return last - node.lineno >= LONGEST_FUNCTION


def is_statement(node):
    """Whether an expression may stand alone: a call, a yield or a docstring."""
    is_text = isinstance(getattr(node, 'value', None), str) or type(node).__name__ == 'Str'
    return is_text or isinstance(node, (ast.Call, ast.Yield, ast.YieldFrom))


# ---- Shell -------------------------------------------------------------------------------------


CONDITIONS = ('if ', 'elif ', 'while ', 'until ')
FUNCTION = re.compile(r'(\w+)\(\) *(.*)')
TEST = re.compile(r'(! )?(\[|:$|(is|has)_\w+)')  # a command that only answers a question
ENDING = re.compile(r'(return|exit|break|continue|fail|usage_error|:)( |$)')


def check_shell(source):
    """Yield what is wrong in shell code: a line's number, and what it is."""
    yield from check_functions(source)
    in_case = []  # for each case that is open, whether a pattern comes next
    for number, line in shell.lines_of(source):
        if line == 'esac' or line.startswith('esac '):
            in_case.pop()
        if in_case and in_case[-1]:
            line = line.partition(')')[2].strip()
            in_case[-1] = False
        if line.endswith(';;'):
            line = line[:-2].strip()
            in_case[-1] = True
        if line.startswith('case ') and line.endswith(' in'):
            in_case.append(True)
        else:
            yield from ((number, wrong) for wrong in check_line(line))


def check_functions(source):
    name, lines = '', source.split('\n')
    for number, line in enumerate(lines, 1):
        match = FUNCTION.match(line)
        if match:
            name, first = match.group(1), number
            if match.group(2) != '{':
                yield number, f'{name} is in one line'
        if line == '}' and number - first >= LONGEST_FUNCTION:
            yield first, f'{name} has over {LONGEST_FUNCTION} lines'
        if line == '}' and lines[number]:
            yield number, f'no empty line behind {name}'


def check_line(line):
    """Yield what is wrong with a line without patterns of a case."""
    code = re.sub(r'; (then|do|\}|\))', r' \1', line)
    if ';' in code:
        yield 'two statements in a line'
    if not code.startswith(CONDITIONS):
        yield from check_list(code)


def check_list(code):
    """Yield what is wrong with commands that are joined by && and ||.

    Behind && may stand a test only, as in `[ -f "$1" ] && [ -r "$1" ]`, the answer of a function.
    Behind a test and || may only stand what ends something, such as return or fail.
    """
    before, *rest = re.split(r' (&&|\|\|) ', re.sub(r'[{}] ', '', code))
    for operator, command in zip(rest[::2], rest[1::2]):
        if operator == '&&' and not TEST.match(command):
            yield f'what stands behind && acts: {command}'
        if operator == '||' and TEST.match(before) and not ENDING.match(command):
            yield f'what stands behind a test and || acts: {command}'
        before = command


def main():
    wrong = False
    for name in sys.argv[1:]:
        with open(name, encoding='utf-8') as file:
            source = file.read()
        check = check_python if name.endswith('.py') else check_shell
        for number, message in sorted([*check_lines(source), *check(source)]):
            print(f'{name}:{number}: {message}')
            wrong = True
    sys.exit(1 if wrong else 0)


if __name__ == '__main__':
    main()
