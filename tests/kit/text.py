"""The notation of the cases: quotes, placeholders, repetitions. Bytes that are no UTF-8 are kept
(surrogateescape).

{name}          the value of that name; one that nobody has stays as it is
{a*63}          63 times what is before the star
line {1..5}     the line once for each number
line {1,2,4}    the same
line {*5}       the line five times
"\\r\\n\\x00\\""    in quotes, escapes are read; outside of them nothing is
"""

import re

ESCAPE = re.compile(r'\\(?:x([0-9a-f]{2})|(.))', re.DOTALL)
ESCAPES = {'n': '\n', 'r': '\r', 't': '\t', '\\': '\\', '"': '"'}
NAME = re.compile(r'\{([A-Za-z][A-Za-z0-9-]*)\}')
REPEATED = re.compile(r'\{([^{}]+)\*([0-9]+)\}')
RANGE = re.compile(r'\{([0-9]+)\.\.([0-9]+)\}')
NUMBERS = re.compile(r'\{([0-9]+(?:,[0-9]+)+)\}')
TIMES = re.compile(r' ?\{\*([0-9]+)\}(?=\n?$)')
DEPTH = 5  # of values that hold placeholders


class BadText(Exception):
    """A text that is not in order."""


def decoded(data):
    return data.decode('utf-8', 'surrogateescape')


def encoded(text):
    return text.encode('utf-8', 'surrogateescape')


def lines_of(text):
    """The lines with their ends; nothing but a line feed ends one."""
    return re.findall('[^\n]*\n|[^\n]+$', text)


def unquoted(text):
    """What a text in quotes stands for; another one stands for itself."""
    if not (len(text) > 1 and text[0] == text[-1] == '"'):
        return text

    def byte(match):
        if match.group(1):
            return bytes([int(match.group(1), 16)])
        if match.group(2) not in ESCAPES:
            raise BadText('no such escape: %s' % match.group())
        return ESCAPES[match.group(2)].encode()

    data, end = b'', 0
    for match in ESCAPE.finditer(text[1:-1]):
        data += encoded(text[1:-1][end : match.start()]) + byte(match)
        end = match.end()
    return decoded(data + encoded(text[1:-1][end:]))


def filled(text, values):
    """The text with the values in the place of their names, and what is repeated repeated."""
    for _ in range(DEPTH):
        text, before = NAME.sub(lambda match: values.get(match.group(1), match.group()), text), text
        if text == before:
            break
    return REPEATED.sub(lambda match: match.group(1) * int(match.group(2)), text)


def expanded(text):
    """The text with the lines that stand for several."""
    return ''.join(each for line in lines_of(text) for each in several(line))


def several(line):
    """The lines that a line stands for."""
    found, numbers, times = RANGE.search(line), NUMBERS.search(line), TIMES.search(line)
    if found:
        first, last = map(int, found.groups())
        return [line.replace(found.group(), str(each)) for each in range(first, last + 1)]
    if numbers:
        return [line.replace(numbers.group(), each) for each in numbers.group(1).split(',')]
    if times:
        return [TIMES.sub('', line)] * int(times.group(1))
    return [line]


def whole(text, values):
    """What a text stands for: with its lines expanded, and its placeholders filled."""
    return filled(expanded(text), values)
