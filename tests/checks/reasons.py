#!/usr/bin/env python3
"""Print every reason for a failure that a script can give, a line each: python3
tests/checks/reasons.py SCRIPT

They are read from its source: what `fail`, `Failed`, `complain` and `usage_error` are given, and
the problems of an exchange, behind whose label they are said. What varies is written `…`. Some
reasons are put together from the texts of a few variables (PARTS): each text is a line of its own.
project.bats compares them with the table of docs/troubleshooting.md.
"""

import ast
import re
import sys

PYTHON_CALLS = ('Failed', 'complain', 'usage_error')
SHELL_REASON = re.compile(
    r"""(?:(?:fail|complain|usage_error) |reason=)(?:"([^"\n]+)"|'([^'\n]+)')"""
)
SHELL_PROBLEM = re.compile(r"""(?:echo |problem=)'([^']*)'""")
PARTS = ('problems', 'question', 'until')
SHELL_PART = re.compile(rf"""\b(?:{'|'.join(PARTS)})=(?:"([^"\n]+)"|'([^'\n]+)')""")
SHELL_PART_USED = re.compile(rf'\$(?:{{(?:{"|".join(PARTS)})[^}}]*}}|(?:{"|".join(PARTS)})\b)')
SHELL_CONSTANT = re.compile(r"^([A-Z_]+)='([^'\n]*)'$", re.MULTILINE)
SHELL_VARIABLE = re.compile(r'\$\{[^}]*\}|\$\w+')
# A reason that is handed on, and words in front of one.
NO_REASON = re.compile('(azure-provisioning: |user: |…: |…)*|…: attempt … of …: …')


def python_reasons(source):
    tree = ast.parse(source)
    constants = constants_of(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield from reasons_of_call(node, constants)
        elif isinstance(node, ast.keyword) and node.arg == 'problem':
            yield f'…: {text_of(node.value)}'
        elif isinstance(node, (ast.Assign, ast.AugAssign)):
            yield from reasons_of_assignment(node)
        elif isinstance(node, ast.FunctionDef) and node.name == 'read_body':
            for each in ast.walk(node):
                if isinstance(each, ast.Return):
                    yield from problems_of(each.value)


def reasons_of_call(node, constants):
    """Yield the reasons that a call is given."""
    if getattr(node.func, 'id', '') in PYTHON_CALLS:
        yield text_of(node.args[0], constants)
    elif getattr(node.func, 'attr', '') == 'append' and getattr(node.func.value, 'id', '') in PARTS:
        yield from split(text_of(node.args[0]))


def reasons_of_assignment(node):
    """Yield the reasons that a variable is given."""
    target = node.target if isinstance(node, ast.AugAssign) else node.targets[0]
    if getattr(target, 'attr', '') == 'problem':
        yield from problems_of(node.value)
    elif getattr(target, 'id', '') in PARTS:
        yield from split(text_of(node.value))


def constants_of(tree):
    """Return the constants of a module that are texts: their names and values."""
    return {
        node.targets[0].id: text_of(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and text_of(node.value) != '…'
    }


def problems_of(node):
    """Yield the texts in an expression that is a problem of an exchange."""
    branches = [node.body, node.orelse] if isinstance(node, ast.IfExp) else [node]
    for branch in branches:
        yield f'…: {text_of(branch)}'


def split(text):
    """Yield the parts of reasons in a text."""
    for part in text.split(';'):
        part = part.strip(' ,')
        if part:
            yield part


def text_of(node, constants=None):
    """Return what an expression is, as far as it is written there."""
    if isinstance(node, ast.JoinedStr):
        return ''.join(text_of(part, constants) for part in node.values)
    if isinstance(node, ast.FormattedValue) and getattr(node.value, 'id', '') in PARTS:
        return ''
    if isinstance(node, ast.Name) and constants:
        return constants.get(node.id, '…')
    value = node.s if type(node).__name__ == 'Str' else getattr(node, 'value', None)
    return value if isinstance(value, str) else '…'


def shell_reasons(source):
    source = re.sub('^ *#.*', '', source, flags=re.MULTILINE)  # comments
    constants = dict(SHELL_CONSTANT.findall(source))
    for match in SHELL_PART.finditer(source):
        text = SHELL_PART_USED.sub('', match.group(1) or match.group(2))
        yield from split(SHELL_VARIABLE.sub('…', text))
    for match in SHELL_REASON.finditer(source):
        text = SHELL_PART_USED.sub('', match.group(1) or match.group(2))
        if text[1:] in constants:  # "$CONSTANT"
            text = constants[text[1:]]
        yield SHELL_VARIABLE.sub('…', text)
    for match in SHELL_PROBLEM.finditer(source):
        yield f'…: {match.group(1)}'


def main():
    with open(sys.argv[1], encoding='utf-8') as file:
        source = file.read()
    reasons = python_reasons if sys.argv[1].endswith('.py') else shell_reasons
    found = {reason for reason in reasons(source) if not NO_REASON.fullmatch(reason)}
    print('\n'.join(sorted(found)))


if __name__ == '__main__':
    main()
