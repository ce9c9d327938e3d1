#!/usr/bin/env python3
"""Check that the two scripts are one program: python3 tests/checks/alike.py [PYTHON SHELL]

They have the same sections under the same headings in the same order, and in each section the same
functions in the same order. The default run's part ends in the same place. Version, settings,
defaults and usage are the same. Prints what differs. Exit status: 0 nothing, 1.
"""

import ast
import difflib
import re
import sys

SCRIPTS = ['azure-provisioning.py', 'azure-provisioning.sh']

# What only one language has, each with its reason.
ONLY_PYTHON = {
    'print_lines': 'the shell has >&2',
    'Failed': 'the shell has $reason, and fail',
    'end_program': 'the shell has exit',
    'run_even_dry': 'the shell runs a command by its name',
    'remove_file': 'the shell has rm -f',
    'hang_up': 'curl or wget does it',
    'do_exchange': 'curl or wget does it',
    'read_body': 'curl or wget does it',
    'StrictResponse': 'curl or wget does it',
    'to_path': 'the shell has bytes',
    'text_of': 'read_xml of the shell keeps the texts',
    'last_part': 'the shell has ${leaf##*/}',
    'split_words': 'the shell has IFS',
}
ONLY_SHELL = {
    'fail': 'Python has raise Failed',
    'has_word': 'Python has in',
    'send_with_curl': 'Python has do_exchange',
    'send_with_wget': 'Python has do_exchange',
    'split_reply': 'Python is given status and body apart',
    'is_status': 'the same',
    'skip_markup': 'Python has an XML parser',
    'read_piece': 'Python has an XML parser',
    'has_valid_attributes': 'Python has an XML parser',
    'open_element': 'Python has an XML parser',
    'close_element': 'Python has an XML parser',
    'is_blank': 'Python has an XML parser',
    'has_line': 'Python has in',
    'remove_white_space': 'Python has join',
    'replace_underscores': 'Python has str.replace',
    'find_owner': 'Python has os.stat',
    'find_character': 'an XML library does it',
    'decode_entities': 'Python has an XML parser',
    'print_secret': 'Python gives a command its input',
    'drop_our_lines': 'Python has del',
    'resolve_symlink': 'Python has os.path.realpath',
    'decode_base64': 'Python has base64',
}
# The same function with two names, Python's first, each with its reason.
PAIRS = {
    ('read_settings', 'check_settings'): 'the shell reads the environment above its functions',
    ('read_url', 'check_url'): 'the same',
    ('read_number', 'check_number'): 'the same',
    ('read_groups', 'check_groups'): 'the same',
    ('find_fields', 'find_line'): 'the shell splits the line where it needs the fields',
}

HEADING = re.compile('# ---- (.*?) -+|# (The default run ends here.*)')
PYTHON_FUNCTION = re.compile(r'(?:def|class) (\w+)')
SHELL_FUNCTION = re.compile(r'(\w+)\(\)')
PYTHON_VERSION = re.compile("^VERSION = '(.*)'$", re.MULTILINE)
SHELL_VERSION = re.compile('^VERSION=(.*)$', re.MULTILINE)
PYTHON_USAGE = re.compile(r'^USAGE = """\\\n(.*?)"""', re.MULTILINE | re.DOTALL)
SHELL_USAGE = re.compile("^USAGE='(.*?)'", re.MULTILINE | re.DOTALL)
READ = re.compile(r"settings\.(\w+) = read_\w+\('(\w+)', settings\.(\w+)")
SHELL_DEFAULT = re.compile(r'^\w+=\$\{(AZURE_\w+)-(.*?)\}', re.MULTILINE)


def outline(source, function):
    """Return the headings and what each section has, in order."""
    found = []
    for line in source.split('\n'):
        heading, name = HEADING.match(line), function.match(line)
        if heading:
            found.append(f'# {heading.group(1) or heading.group(2)}')
        elif name:
            found.append(name.group(1))
    return found


def without(names, only):
    """Return names but for those that only this language has."""
    return [name for name in names if name not in only]


def check_lists(python, shell):
    """Yield what is in the lists above, and not, or no longer, as they say."""
    for names, others, only in ((python, shell, ONLY_PYTHON), (shell, python, ONLY_SHELL)):
        for name in only:
            if name not in names or name in others:
                yield f'{name} is not in one language only'
    for one, other in PAIRS:
        if one not in python or other not in shell:
            yield f'{one} and {other} are no pair'


def check_outlines(python_source, shell_source):
    """Yield what differs in sections and functions."""
    python = outline(python_source, PYTHON_FUNCTION)
    shell = outline(shell_source, SHELL_FUNCTION)
    yield from check_lists(python, shell)
    shell_names = dict(PAIRS.keys())
    python = [shell_names.get(name, name) for name in without(python, ONLY_PYTHON)]
    yield from difference(python, without(shell, ONLY_SHELL))
    if not any(name.startswith('# The default run ends here') for name in shell):
        yield 'nothing says where the default run ends'


def difference(python, shell):
    """Return the lines of a comparison, none if there is no difference."""
    return list(difflib.unified_diff(python, shell, *SCRIPTS, n=1, lineterm=''))


def python_defaults(source):
    """Return the settings from the environment with their defaults, a line each."""
    values = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', '') == 'settings':
            for keyword in node.value.keywords:
                values[keyword.arg] = ast.literal_eval(keyword.value)
    return [f'{name} {values[default]}' for _, name, default in READ.findall(source)]


def shell_defaults(source):
    return [f'{name} {value}' for name, value in SHELL_DEFAULT.findall(source)]


def check(python, shell):
    """Yield what differs between the two sources."""
    yield from check_outlines(python, shell)
    yield from difference(PYTHON_VERSION.findall(python), SHELL_VERSION.findall(shell))
    yield from difference(python_defaults(python), shell_defaults(shell))
    usages = PYTHON_USAGE.findall(python), SHELL_USAGE.findall(shell)
    yield from difference(*(''.join(usage).split('\n') for usage in usages))
    if len(shell_defaults(shell)) != 6 or len(usages[1]) != 1:
        yield 'six settings and one usage were expected'


def main():
    sources = []
    for name in sys.argv[1:] or SCRIPTS:
        with open(name, encoding='utf-8') as file:
            sources.append(file.read())
    wrong = list(check(*sources))
    for line in wrong:
        print(line)
    sys.exit(1 if wrong else 0)


if __name__ == '__main__':
    main()
