#!/usr/bin/env python3
"""Hold both scripts against an XML library over random goal states: python3 tests/checks/fuzz.py
[SEED [COUNT]]

Half of the documents are legal layouts of a goal state: both scripts must take them, with the
library's values. The other half are damaged: reference.py says what may come of them. A divergence
is printed with its seed and document; make it a case. Exit status: 0 none, 1 some, 3 nothing can be
run here.
"""

import contextlib
import random
import re
import signal
import subprocess
import sys

import kit_path  # noqa: F401  before the modules of the kit
import sandbox
from host import Answer, Host, good
from reference import REFUSALS, allowed, outcome
from run import OURS

SETTINGS = {
    'COMMANDS': '/dev/null',
    'AZURE_PROVISIONING_INTERVAL': '0',
    'AZURE_PROVISIONING_ATTEMPTS': '999999',
    'AZURE_PROVISIONING_TIMEOUT': '60',
}
BATCH = 400  # documents for one run of a script
ID = [chr(code) for code in range(33, 127) if chr(code) not in '<>&"\'']
WORDS = [
    'x',
    ' ',
    '\n',
    '\t',
    '"',
    "'",
    '>',
    '-',
    '=',
    '/',
    '/>',
    '&amp;',
    '&lt;Incarnation&gt;',
    'Incarnation',
    '99',
    ']',
    '[',
    'é',
]
MARKUP = [
    '<',
    '</GoalState>',
    '<Incarnation>99</Incarnation>',
    '<ContainerId>no</ContainerId>',
    '<InstanceId>no',
    '<!',
    '&',
]
OURS_ELSEWHERE = ['Incarnation', 'ContainerId', 'InstanceId', 'Container', 'RoleInstance']
OTHERS = ['Machine', 'Version', 'Incarnation-1', 'PackageIncarnation', 'State', 'Role', 'E', '_e.1']
DEBRIS = [word.encode() for word in WORDS + MARKUP] + [b'\0', b'\x08', b'<!--', b'-->', b'<?']
INSTRUCTIONS = [
    b'<?xml version="1.0"?>',
    b'<?XML 1?>',
    b'<?xml?>',
    b'<?a?>',
    b'<!--a-->',
    b' ',
    b'\xef\xbb\xbf',
]


IN_BYTES = ['cut', 'drop', 'repeat', 'swap', 'flip', 'insert']
IN_TAGS = ['rename', 'instruct', 'lose a tag']
OTHER_TAGS = [b'<Incarnation', b'</Container', b'<InstanceId', b'<GoalState']


class Layout:
    """One way to write a goal state down.

    is_plain: without that of the legal ones which may be refused.
    """

    def __init__(self, dice, is_plain):
        self.dice = dice
        self.is_plain = is_plain
        self.newline = dice.choice(['', '\n', '\r\n'])
        self.indent = dice.choice(['', '  ', '\t'])
        self.busy = dice.choice([0, 0, 0.1, 0.4])

    def some(self, choices, most):
        return ''.join(self.dice.choice(choices) for _ in range(self.dice.randint(0, most)))

    def space(self, least=0):
        return self.some(' \t\r\n', 3) if self.dice.random() < self.busy else ' ' * least

    def attributes(self):
        names = self.dice.sample(
            ['a', 'b-c', 'xml:d', '_e', 'f.g', 'xsi1'], self.dice.randint(0, 3)
        )
        written = ''
        for name in names if self.dice.random() < self.busy else ():
            quote = self.dice.choice('"\'')
            value = self.some(WORDS, 5).replace(quote, '').replace('&', '&amp;')
            if self.is_plain:
                value = re.sub(r'/+(?=\s)', '', value.replace('>', ''))
            before = self.dice.choice(' \n\t') + self.space()
            written += before + name + self.space() + '=' + self.space() + quote + value + quote
        return written

    def between(self):
        """What may stand between two elements."""
        written = self.newline + self.indent
        while self.dice.random() < self.busy:
            kind, inside = self.dice.random(), self.some(WORDS + MARKUP, 6)
            if kind < 0.4:
                written += '<!--%s-->' % re.sub('--+', '-', inside + ' ')
            elif kind < 0.6:
                written += '<?%s %s?>' % (
                    self.dice.choice(['a', 'php', 'xml-x']),
                    inside.replace('?>', ''),
                )
            else:
                written += self.space()
        return written

    def element(self, name, content):
        if not content and self.dice.random() < 0.5:
            return '<%s%s%s/>' % (name, self.attributes(), self.space())
        return '<%s%s%s>%s</%s%s>' % (
            name,
            self.attributes(),
            self.space(),
            content,
            name,
            self.space(),
        )

    def value(self, name, value):
        return self.element(name, self.space() + value + self.space())

    def other(self, depth=0):
        """An element that does not matter, with elements of our names at other places inside."""
        inside = ''
        for _ in range(self.dice.randint(0, 3) if depth < 4 else 0):
            inside += self.dice.choice(
                [
                    lambda: (
                        self.some(WORDS, 4).replace('&', '').replace('amp;', '').replace(']', '')
                    ),
                    self.between,
                    lambda: self.other(depth + 1),
                    lambda: self.value(self.dice.choice(OURS_ELSEWHERE), 'no'),
                ]
            )()
        return self.element(self.dice.choice(OTHERS), inside)

    def fill(self, *needed):
        """Elements in any order, with others among them."""
        needed = list(needed)
        self.dice.shuffle(needed)
        written = self.between()
        for each in needed:
            while self.dice.random() < max(self.busy, 0.1):
                written += self.other() + self.between()
            written += each + self.between()
        return written

    def an_id(self):
        return ''.join(self.dice.choice(ID) for _ in range(self.dice.randint(1, 40)))

    def document(self):
        roles = [
            self.element('RoleInstance', self.fill(self.value('InstanceId', self.an_id())))
            for _ in range(self.dice.choice([1, 1, 1, 2, 3]))
        ]
        container = self.element(
            'Container',
            self.fill(
                self.value('ContainerId', self.an_id()),
                self.element('RoleInstanceList', self.between().join([''] + roles + [''])),
            ),
        )
        root = self.element(
            'GoalState',
            self.fill(
                self.value('Incarnation', '%d' % self.dice.choice([0, 1, 16, 10**20])), container
            ),
        )
        declaration = '<?xml version="1.0" encoding="utf-8"?>' if self.dice.random() < 0.5 else ''
        bom = b'\xef\xbb\xbf' if self.dice.random() < 0.2 else b''
        end = self.between()
        start = self.between() if declaration or self.busy else ''
        return bom + (declaration + start + root + end).encode()


def damage(dice, data):
    """Something happens to a document."""
    for _ in range(dice.choice([1, 1, 1, 2, 4])):
        at, length = dice.randrange(len(data) + 1), dice.choice([1, 1, 2, 5, 30])
        names = [match.span() for match in re.finditer(rb'</?[A-Za-z]+', data)]
        kind = dice.choice(IN_BYTES + IN_TAGS)
        if kind in IN_BYTES:
            data = damaged_bytes(dice, kind, data, at, length)
        elif names:
            data = damaged_tag(dice, kind, data, *dice.choice(names))
        data = data or b' '
    return data


def damaged_bytes(dice, kind, data, at, length):
    before, behind = data[:at], data[at + length :]
    if kind == 'cut':
        return before
    if kind == 'drop':
        return before + behind
    if kind == 'repeat':
        return data[: at + length] + data[at:]
    if kind == 'swap':
        return before + behind[:length] + data[at : at + length] + behind[length:]
    if kind == 'insert':
        return before + dice.choice(DEBRIS) + data[at:]
    if at < len(data):  # flip
        return before + bytes([data[at] ^ 1 << dice.randrange(8)]) + data[at + 1 :]
    return data


def damaged_tag(dice, kind, data, start, end):
    if kind == 'rename':
        return data[:start] + dice.choice(OTHER_TAGS) + data[end:]
    if kind == 'instruct':
        return data[:start] + dice.choice(INSTRUCTIONS) + data[start:]
    return data[:start] + data[(data.find(b'>', end) + 1) or end :]  # lose it


def took(script, documents):
    """What the script posted for each of the documents: its three values, or None."""
    outcomes = [None] * len(documents)
    goal_states = [Answer('body', data) for data in documents] + [Answer('fault', 'silent')]
    with Host({'goalstate': goal_states, 'health': good()['health']}) as host:
        process = sandbox.start(
            [script] + ['ready'] * len(documents),
            (host.wireserver, host.imds),
            SETTINGS,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        # The script goes on to the next document by itself. Behind the last one is silence.
        while process.poll() is None and host.asked['goalstate'] <= len(documents):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        current = -1
        for request in host.requests:
            if request.body:
                outcomes[current] = posted_values(request.body.decode('latin-1'))
            else:
                current += 1
    assert current == len(documents), 'the script ended early'
    return outcomes


def posted_values(report):
    """The three values in a report, as the text that reference.py has for them."""
    return ' '.join(re.findall('<(?:GoalStateIncarnation|ContainerId|InstanceId)>([^<]*)', report))


def make_document(seed, number):
    """A document, legal if its number is even, damaged if it is odd."""
    dice = random.Random('%d/%d' % (seed, number))
    is_legal = number % 2 == 0
    data = Layout(dice, is_legal).document()
    if not is_legal:
        return damage(dice, data)
    assert allowed(data) == {outcome(data)}, 'the generator wrote what may be refused: %r' % data
    assert outcome(data) not in REFUSALS, 'the generator wrote no goal state: %r' % data
    return data


def hold(seed, numbers):
    """Hold both scripts against some documents; return how many both took, and the divergences."""
    documents = [make_document(seed, number) for number in numbers]
    posted = [took(script, documents) for script in OURS]
    diverged = 0
    for number, data, *outcomes in zip(numbers, documents, *posted):
        expected = allowed(data)
        for script, values in zip(OURS, outcomes):
            is_allowed = values in expected if values else bool(expected & REFUSALS)
            if not is_allowed:
                diverged += 1
                said = (seed, number, script.rpartition('/')[2], values, outcome(data), data)
                print(
                    'seed %d, document %d: %s posted %s, the library: %s\n  %r' % said, flush=True
                )
    return sum(map(all, zip(*posted))), diverged


def main():
    refused = sandbox.refusal()
    if refused:
        print('nothing was run: %s' % refused)
        sys.exit(3)
    seed, count = [int(word) for word in sys.argv[1:] + ['1', '400'][len(sys.argv) - 1 :]]
    taken = diverged = 0
    for start in range(0, count, BATCH):
        result = hold(seed, range(start, min(start + BATCH, count)))
        taken += result[0]
        diverged += result[1]
    said = (count, seed, taken, diverged)
    print('%d documents from seed %d: %d taken by both, %d divergences' % said)
    sys.exit(1 if diverged else 0)


if __name__ == '__main__':
    main()
