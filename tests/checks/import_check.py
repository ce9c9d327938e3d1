#!/usr/bin/env python3
"""Check that nothing happens when the Python script is imported: python3
tests/checks/import_check.py SCRIPT

Prints what has changed, a line each. Exit status: 0 nothing, 1. Only its imports count, and that
sys.modules['ssl'] is None afterwards.
"""

import ast
import importlib
import importlib.machinery
import importlib.util
import os
import signal
import sys
import threading


def state():
    """Return what an import could change, by name."""
    umask = os.umask(0o077)
    os.umask(umask)
    return {
        'umask': umask,
        'signals': [signal.getsignal(number) for number in range(1, signal.NSIG)],
        'arguments': list(sys.argv),
        'environment': dict(os.environ),
        'folder': os.getcwd(),
        'module path': list(sys.path),
        'threads': threading.active_count(),
        'open files': len(os.listdir('/proc/self/fd')),
        'hooks': (sys.excepthook, sys.displayhook, sys.stdout, sys.stderr),
        'modules': set(sys.modules),
    }


def import_what_it_imports(path):
    """Import what the script imports. Its own import without ssl has to come first."""
    with open(path, encoding='utf-8') as file:
        tree = ast.parse(file.read())
    sys.modules['ssl'] = None
    for node in tree.body:
        if isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom):
            importlib.import_module(node.module)
            for alias in node.names:
                importlib.import_module(f'{node.module}.{alias.name}')


def import_script(path):
    loader = importlib.machinery.SourceFileLoader('azure_provisioning', path)
    module = importlib.util.module_from_spec(
        importlib.util.spec_from_loader('azure_provisioning', loader)
    )
    loader.exec_module(module)
    return module


def main():
    sys.dont_write_bytecode = True
    path = sys.argv[1]
    import_what_it_imports(path)
    before = state()
    module = import_script(path)
    after = state()
    changed = [name for name in before if before[name] != after[name]]
    for name in changed:
        print(f'the import changes: {name}')
    if not callable(getattr(module, 'main', None)):
        print('it has no main')
        changed.append('main')
    sys.exit(1 if changed else 0)


if __name__ == '__main__':
    main()
