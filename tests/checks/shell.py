"""A small reader of shell code that shfmt has laid out: a command a line, `then` and `do` behind
their condition. It knows no here-documents.
"""

import re


class Reader:
    """Takes code apart into lines, whose quoted texts are empty, and whose comments are gone.

    A line that goes on behind a backslash, `&&`, `||` or `|` is one line. Code in $(…) is read like
    other code, as lines of their own.
    """

    def __init__(self, source):
        self.source, self.position, self.number = source, 0, 1
        self.lines = []  # the number of the first line, and the text

    def read(self):
        self.read_code('')
        return sorted(self.lines)

    def add(self, number, text):
        text = re.sub(' +', ' ', text).strip()
        if text:
            self.lines.append((number, text))

    def take(self, count=1):
        """Return the next characters, and go behind them."""
        taken = self.source[self.position : self.position + count]
        self.position += count
        self.number += taken.count('\n')
        return taken

    def next_is(self, text):
        return self.source.startswith(text, self.position)

    def read_code(self, end):
        """Read lines up to a character, or to the end of the source."""
        text, start = '', self.number
        while self.position < len(self.source) and not (end and self.next_is(end)):
            if self.next_is('\n') and not text.rstrip().endswith(('&&', '|')):
                self.add(start, text)
                self.take()
                text, start = '', self.number
            elif self.next_is('#') and text[-1:] in ('', ' '):
                self.take(self.source.find('\n', self.position) - self.position)
            else:
                text += self.read_part()
        self.take(len(end))
        self.add(start, text)

    def read_part(self):
        """Read a character or a quoted text; return what stands for it in a line."""
        if self.next_is('\\\n'):
            self.take(2)
            return ' '
        if self.next_is('\\'):
            self.take(2)
            return '_'
        if self.next_is("'"):
            self.take(self.source.index("'", self.position + 1) + 1 - self.position)
            return "''"
        if self.next_is('"'):
            self.take()
            self.read_quoted('"')
            return '""'
        if self.next_is('$'):
            return self.read_expansion()
        return self.take().replace('\n', ' ')

    def read_quoted(self, end):
        """Read up to a character, but for what is nested."""
        while not self.next_is(end):
            if self.next_is('"') and end != '"':
                self.take()
                self.read_quoted('"')
            elif self.next_is("'") and end != '"':
                self.take(self.source.index("'", self.position + 1) + 1 - self.position)
            elif self.next_is('\\'):
                self.take(2)
            elif self.next_is('$'):
                self.read_expansion()
            else:
                self.take()
        self.take(len(end))

    def read_expansion(self):
        """Read what begins with a dollar."""
        if self.next_is('$(('):
            self.take(3)
            self.read_quoted('))')
        elif self.next_is('$('):
            self.take(2)
            self.read_code(')')
        elif self.next_is('${'):
            self.take(2)
            self.read_quoted('}')
        else:
            return self.take()
        return '$_'


def lines_of(source):
    """Return the lines of code, each as the number of its first line and its text."""
    return Reader(source).read()
