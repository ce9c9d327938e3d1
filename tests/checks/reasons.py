#!/usr/bin/env python3
"""Print every reason for a failure that a script can give, a line each: python3
tests/checks/reasons.py SCRIPT

They are read from its source: what `fail`, `Failed`, `complain` and `usage_error` are given, and
the problems of an exchange, behind whose label they are said. What varies is written `…`.
project.bats holds the README's table against them.
"""

import ast
import re
import sys

PYTHON_CALLS = ('Failed', 'complain', 'usage_error')
SHELL_REASON = re.compile(
    r"""(?:(?:fail|complain|usage_error) |reason=)(?:"([^"\n]+)"|'([^'\n]+)')"""
)
SHELL_PROBLEM = re.compile(r"""(?:echo |problem=)'([^']*)'""")
SHELL_VARIABLE = re.compile(r'\$\{[^}]*\}|\$\w+')
# A reason that is handed on, and words in front of one.
NO_REASON = re.compile('(azure-provisioning: |…: |…)*|…: attempt … of …: …')


def python_reasons(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and getattr(node.func, 'id', '') in PYTHON_CALLS:
            yield text_of(node.args[0])
        elif isinstance(node, ast.keyword) and node.arg == 'problem':
            yield f'…: {text_of(node.value)}'
        elif isinstance(node, ast.Assign) and getattr(node.targets[0], 'attr', '') == 'problem':
            yield from problems_of(node.value)
        elif isinstance(node, ast.FunctionDef) and node.name == 'read_body':
            for each in ast.walk(node):
                if isinstance(each, ast.Return):
                    yield from problems_of(each.value)


def problems_of(node):
    """Yield the texts in an expression that is a problem of an exchange."""
    branches = [node.body, node.orelse] if isinstance(node, ast.IfExp) else [node]
    for branch in branches:
        yield f'…: {text_of(branch)}'


def text_of(node):
    """Return what an expression is, as far as it is written there."""
    if isinstance(node, ast.JoinedStr):
        return ''.join(text_of(part) for part in node.values)
    value = node.s if type(node).__name__ == 'Str' else getattr(node, 'value', None)
    return value if isinstance(value, str) else '…'


def shell_reasons(source):
    source = re.sub('^ *#.*', '', source, flags=re.MULTILINE)  # comments
    for match in SHELL_REASON.finditer(source):
        yield SHELL_VARIABLE.sub('…', match.group(1) or match.group(2))
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
