"""What an XML library finds in a goal state, and where a program may find something else.

The outcome for a document is the text of its three values, or the reason why it was refused, as the
scripts print it. The contract leaves it open (X8) whether some documents are taken, as Azure does
not send them. A wrong value must never be taken.
"""

import re
from xml.etree import ElementTree

SPACE = ' \t\r\n'
NO_GOAL_STATE = 'goal state: not a goal state'
ID = '[!#-%(-;=?-~]+'
VALUES = (  # path, what is valid there, and the reason if it is not
    ('Incarnation', '[0-9]+', 'goal state: no Incarnation'),
    ('Container/ContainerId', ID, 'goal state: no ContainerId'),
    ('Container/RoleInstanceList/RoleInstance/InstanceId', ID, 'goal state: no InstanceId'),
)
REFUSALS = {NO_GOAL_STATE} | {reason for _, _, reason in VALUES}

MARKUP = re.compile(r'<!--.*?-->|<\?.*?\?>', re.DOTALL)  # comments and instructions
QUOTED = r'"[^"<]*"|\'[^\'<]*\''
# A tag with attributes in quotes, and one whose quotes mean nothing: TAG>, wherever the first > is
TAG = re.compile(r'<(/?)([^%s<>/"\'=]+)((?:[^<>"\']|%s)*?)(/?)>' % (SPACE, QUOTED))
SHORTEST_TAG = re.compile(r'<(/?)([^%s<>/]+)([^<>]*?)(/?)>' % SPACE)
LONGEST_TAG = 1000  # bytes that a program has to take
IN_VALUE = re.compile(
    r'<(?:Incarnation|ContainerId|InstanceId)(?=[%s>])[^>]*>[^<]*(?:<!|&)' % SPACE
)
FAULT_IN_TEXT = re.compile(r'\]\]>|&[^;<>]*;?|[\0-\x08\x0b\x0c\x0e-\x1f]')
OTHER_ENTITY = re.compile('&(?!(?:amp|lt|gt|quot|apos);)')


def outcome(data):
    """Return what the library finds in a document."""
    if '<!DOCTYPE' in MARKUP.sub('', data.decode('latin-1')):
        return NO_GOAL_STATE
    try:
        root = ElementTree.fromstring(data)
    except (ElementTree.ParseError, ValueError, LookupError):
        return NO_GOAL_STATE
    if root.tag != 'GoalState':
        return NO_GOAL_STATE
    values = []
    for path, valid, reason in VALUES:
        element = root.find(path)
        if element is None or len(element) > 0:
            return reason
        values.append((element.text or '').strip(SPACE))
        if not re.fullmatch(valid, values[-1]):
            return reason
    return ' '.join(values)


def allowed(data):
    """Return all outcomes that the contract allows for a document."""
    right = outcome(data)
    others = REFUSALS if may_be_refused(data) else set()
    if right in REFUSALS:
        others = others.union(map(outcome, repaired(data)))
    return {right} | others


def may_be_refused(data):
    """Whether a document has something that a program need not take."""
    whole = data.decode('latin-1')
    text = MARKUP.sub('<!>', whole)
    return (
        '<!DOCTYPE' in whole  # in a comment; elsewhere it must be refused
        or '<![CDATA[' in text
        or 'xmlns' in text
        or OTHER_ENTITY.search(text) is not None
        or IN_VALUE.search(text) is not None
        or any(map(is_odd, TAG.finditer(text)))
    )


def is_odd(tag):
    """Whether a tag is one that a program need not take, though it is legal."""
    attributes = tag.group(3)
    is_long = len(tag.group()) > LONGEST_TAG
    return is_long or '>' in attributes or re.search('/[%s]' % SPACE, attributes) is not None


def repaired(data):
    """Return a document, in both readings of its quotes, without the faults that may be overlooked.

    A repair never makes a value of a text that was none: DEL, which no value may have, takes the
    place of what is removed from a text.
    """
    text = data.decode('latin-1').replace('\xef\xbb\xbf', '', 1)
    text = without_markup(text)
    texts = [tag.sub(plain_tag, text) for tag in (TAG, SHORTEST_TAG)]
    return [FAULT_IN_TEXT.sub('\x7f', each).encode('utf-8') for each in texts]


def without_markup(text):
    """Return a document without comments and instructions, and without the text behind those that
    stand outside of the root.
    """
    pieces = MARKUP.split(text)
    while len(pieces) > 1 and not pieces[0].strip(SPACE):
        del pieces[0]
        pieces[0] = re.sub('^[^<]*', '', pieces[0])
    while len(pieces) > 1 and '<' not in pieces[-1]:
        del pieces[-1]
    return '\x7f'.join(pieces)


def plain_tag(tag):
    """Return a tag without attributes and prefix, with a name that is legal."""
    start, name, _, end = tag.groups()
    name = re.sub('^[0-9.-]|[^A-Za-z0-9_.-]', '_', name.split(':')[-1])
    return '<%s%s%s>' % (start, name, '' if start else end)
