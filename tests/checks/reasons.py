#!/usr/bin/env python3
"""Print every reason for a failure that a script can give, a line each: python3
tests/checks/reasons.py SCRIPT

They are read from its source: in shell what is given to `reason=`, `complain` and `misused`, in
Python to `need`, `Failed` and the like. What varies is written `…`. project.bats holds the README's
table against them.
"""

import ast
import re
import sys

CALLS = ('need', 'Failed', 'complain', 'misused', 'parse')
IN_SHELL = r"""(?:reason=|complain |misused )(?:"([^"]*)"|'([^']*)')|reason:-([^}]*)}"""
NO_REASON = '(azure-provisioning: |goal state: |…: |…)*|…: attempt … of …: …'  # by itself


def of_python(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and getattr(node.func, 'id', '') in CALLS:
            yield text(node.args[-1])
        elif isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', '') == 'reason':
            yield text(node.value)


def text(node):
    """What an expression is, as far as it is written there."""
    if isinstance(node, ast.BinOp):
        return text(node.left) + ('' if isinstance(node.op, ast.Mod) else text(node.right))
    value = getattr(node, 'value', None) or getattr(node, 's', None)  # the latter before Python 3.8
    return re.sub('%[sd]', '…', value) if isinstance(value, str) else '…'


def of_shell(source):
    for match in re.finditer(IN_SHELL, source):
        yield re.sub(r'\$\{[^}]*\}|\$[A-Za-z]+|\$[0-9]', '…', ''.join(filter(None, match.groups())))


def main():
    with open(sys.argv[1], encoding='utf-8') as script:
        found = (of_python if sys.argv[1].endswith('.py') else of_shell)(script.read())
    print('\n'.join(sorted({line for line in found if not re.fullmatch(NO_REASON, line)})))


if __name__ == '__main__':
    main()
