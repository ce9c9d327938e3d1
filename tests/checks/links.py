#!/usr/bin/env python3
"""Follow every link in the Markdown files: python3 tests/checks/links.py [FOLDER]

A link to a file or folder of the project has to lead to it, and one to an anchor to a heading. So
has a path in backticks that begins with a folder of the project. Links to other sites are not
followed, as a test needs no network; they have to be https. Prints a line for each link that leads
nowhere.
"""

import pathlib
import re
import sys

PROJECT = pathlib.Path(__file__).resolve().parents[2]
HIDDEN = re.compile(r'(^|/)\.|^(dist|out)/')  # also what is built

FENCE = re.compile(r'^```.*?^```$', re.MULTILINE | re.DOTALL)
CODE = re.compile(r'`[^`]+`')
HEADING = re.compile(r'^#+ (.*)$', re.MULTILINE)
INLINE = re.compile(r'\[(?:[^\[\]]|\[[^\[\]]*\])*\]\(([^()\s]+)\)')
REFERENCE = re.compile(r'\[[^\[\]]+\]\[([^\[\]]+)\]')
DEFINITION = re.compile(r'^\[([^\[\]]+)\]: (\S+)$', re.MULTILINE)
PATH = re.compile(r'`((?:docs|drop-ins|recipes|tests)/[^`\s…*]*)`')


def main():
    root = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else PROJECT).resolve()
    pages = [
        page
        for page in sorted(root.rglob('*.md'))
        if not HIDDEN.search(page.relative_to(root).as_posix())
    ]
    if not pages:
        sys.exit('no Markdown files')
    problems = 0
    for page in pages:
        for problem in problems_of(page, root):
            print(f'{page.relative_to(root)}: {problem}')
            problems += 1
    sys.exit(problems > 0)


def problems_of(page, root):
    """Yield what is wrong with the links of a page."""
    text = FENCE.sub('', page.read_text(encoding='utf-8'))
    for path in PATH.findall(text):
        if not (root / path).exists():
            yield f'no such file: {path}'
    text = CODE.sub('', text)
    definitions = dict(DEFINITION.findall(text))
    references = set(REFERENCE.findall(text))
    for label in sorted(references - set(definitions)):
        yield f'not defined: [{label}]'
    for label in sorted(set(definitions) - references):
        yield f'not used: [{label}]'
    for target in INLINE.findall(text) + list(definitions.values()):
        problem = problem_of(target, page, root)
        if problem:
            yield f'{problem}: {target}'


def problem_of(target, page, root):
    """Return what is wrong with a link, or None."""
    if ':' in target:
        return None if re.match(r'https://[a-z0-9.-]+\.[a-z]+(/|$)', target) else 'not https'
    path, _, anchor = target.partition('#')
    file = (page.parent / path).resolve() if path else page
    if root not in file.parents:
        return 'outside of the project'
    if not file.exists():
        return 'no such file'
    if anchor and (file.suffix != '.md' or anchor not in anchors_of(file)):
        return 'no such heading'
    return None


def anchors_of(page):
    """Return the anchors that a page has, as GitHub and its like name them."""
    anchors = set()
    for heading in HEADING.findall(FENCE.sub('', page.read_text(encoding='utf-8'))):
        heading = re.sub(r'\[([^\]]*)\]\([^)]*\)', r'\1', heading)  # the words of a link
        anchor = re.sub(r'[^\w\- ]', '', heading.strip().lower()).replace(' ', '-')
        number = 0
        while anchor + (f'-{number}' if number else '') in anchors:
            number += 1
        anchors.add(anchor + (f'-{number}' if number else ''))
    return anchors


if __name__ == '__main__':
    main()
