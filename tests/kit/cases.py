"""The cases: cases/FAMILY/, a folder of tables, conversations and documents; tests/README.md tells
how they are written.

What a case says comes in layers, each on top of those before: `family`, which all of a folder
share; the head of its file; the case itself. In each, what stands before a heading holds for all,
what is behind [must] for such cases alone.
"""

import pathlib
import re

import files
import text
from host import ENDPOINTS, FAULTS, Answer, endpoint_of, leads_out
from sandbox import MACHINE_NAME

CASES = pathlib.Path(__file__).resolve().parent / 'cases'
SUFFIXES = ('.cases', '.case')
NAME = re.compile('(must-not|must|either)-.+')
FIELD = re.compile(r'(\S+?):(?: (.*))?')
HEADING = re.compile(r'\[(must|must-not|either|cases)\]')
BLOCK = re.compile('== (.+)')
ANSWER = re.compile('(%s)(-[0-9]+)?' % '|'.join(ENDPOINTS))
EXPECTED = (
    'exit',
    'requests',
    'posted',
    'commands',
    'files',
    'hostname',
    'waits',
    'stdout',
    'stderr',
)
TEXTS = EXPECTED + (
    'why',
    'arguments',
    'curlrc',
    'before',
    'network',
    'failing',
    'missing',
    'umask',
    'output',
    'signal',
    'kernel',
    'traced',
)
TABLES = ('values', 'settings', 'answers')  # of names; those of a case are added to the common ones
OUTPUTS = ('full', 'gone')  # what cannot be written to
NETWORKS = ('none', 'changes')
ADDED = ('before', 'files')  # so are the lines of these
REPLY = re.compile(r'HTTP ([^\["]*?)((?: \[.*?\])*)(?: (".*"))?', re.DOTALL)
CELL = re.compile(r'(?:"(?:[^"\\]|\\.)*"|[^" ]| (?! ))+')
WORD = re.compile(r'"(?:[^"\\]|\\.)*"|\S+')


class BadCase(Exception):
    """A case that is not in order."""


class Layer:
    """Fields: texts by name, and tables of names."""

    def __init__(self):
        self.texts = {}
        self.tables = {table: {} for table in TABLES}

    def add(self, name, value):
        """Take a field, of which the value is a line or a list of them."""
        if name in TABLES:
            for each, content in entries(name, value):
                self.tables[name][each] = content
        elif name in TEXTS:
            self.texts[name] = block(value)
        else:
            raise BadCase('what is %s?' % name)

    def over(self, lower):
        """This one on top of another."""
        layer = Layer()
        layer.texts = dict(lower.texts, **self.texts)
        for name in ADDED:
            if name in lower.texts and name in self.texts:
                layer.texts[name] = lower.texts[name] + self.texts[name]
        layer.tables = {name: dict(lower.tables[name], **self.tables[name]) for name in TABLES}
        return layer


def block(value):
    """A field's text: that of its line, or that of its lines, each with its line feed."""
    if isinstance(value, list):
        return ''.join(line + '\n' for line in value)
    return value + '\n' if value else ''


def entries(table, value):
    """The names of a table with what they stand for."""
    if table == 'settings':
        for line in value if isinstance(value, list) else [value]:
            name, equals, setting = line.partition('=')
            yield name, setting if equals else None
    else:
        for name, content in fields(value if isinstance(value, list) else [value]):
            yield name, '\n'.join(content) if isinstance(content, list) else content


def fields(lines):
    """The fields that lines have: each with its line, or with the lines behind it that are set in
    by four blanks.
    """
    found = []
    for line in lines:
        match = FIELD.fullmatch(line)
        if line.startswith('    ') or (not line and found and isinstance(found[-1][1], list)):
            if not found or not isinstance(found[-1][1], list):
                raise BadCase('whose line is %r?' % line)
            found[-1][1].append(line[4:])
        elif match:
            value = match.group(2)
            found.append((match.group(1), [] if value is None else value))
        elif line and not line.startswith('#'):
            raise BadCase('what is %r?' % line)
    return [(name, without_end(value)) for name, value in found]


def without_end(value):
    """Lines without the empty ones at their end."""
    while isinstance(value, list) and value and not value[-1]:
        value.pop()
    return value


class Source:
    """A file of cases: its head, by verdict; the layers of its cases, by name."""

    def __init__(self, path):
        self.path = path
        try:
            self.read(text.decoded(path.read_bytes()).split('\n'))
        except (BadCase, text.BadText) as error:
            raise BadCase('%s/%s: %s' % (path.parent.name, path.name, error)) from error

    def read(self, lines):
        self.head = {'all': [], 'must': [], 'must-not': [], 'either': []}
        self.blocks, self.table = {}, []
        self.divide(lines)
        self.head = {verdict: layer_of(lines) for verdict, lines in self.head.items()}
        self.cases = {name: layer_of(lines) for name, lines in self.blocks.items()}
        self.cases.update(self.rows([line for line in self.table if line and line[0] != '#']))

    def divide(self, lines):
        """Give each line to the part that it is of."""
        part = self.head['all']
        if self.path.suffix == '.case':
            part = self.blocks[self.path.stem] = []
        for line in lines:
            heading, case = HEADING.fullmatch(line), BLOCK.fullmatch(line)
            if heading:
                part = self.table if heading.group(1) == 'cases' else self.head[heading.group(1)]
            elif case:
                if case.group(1) in self.blocks:
                    raise BadCase('%s is there twice' % case.group(1))
                part = self.blocks[case.group(1)] = []
            else:
                part.append(line)

    def rows(self, lines):
        """The layer of each case in a table, whose first line names the columns."""
        columns = lines[0].split() if lines else []
        for line in lines[1:]:
            cells = cells_of(line, len(columns))
            row = dict(zip(columns, cells))
            layer, before = Layer(), ''
            for column, cell in zip(columns[2:], cells[2:]):
                cell = before if cell == '=' else cell
                if cell != '-':
                    put_cell(layer, column, cell)
                before = cell
            name = '%s-%s' % (row['verdict'], row['case'])
            if name in self.blocks:
                raise BadCase('%s is there twice' % name)
            self.blocks[name] = line
            yield name, layer


def layer_of(lines):
    layer = Layer()
    for name, value in fields(lines):
        layer.add(name, value)
    return layer


def cells_of(line, count):
    """The cells of a row, two blanks or more apart; the last one is what remains."""
    cells, rest = [], line
    while len(cells) < count - 1:
        match = CELL.match(rest)
        if not match:
            raise BadCase('not %d cells: %r' % (count, line))
        cells.append(match.group())
        rest = rest[match.end() :].lstrip(' ')
    if not rest:
        raise BadCase('not %d cells: %r' % (count, line))
    return cells + [rest]


def put_cell(layer, column, cell):
    """Take a cell: of an answer, of a {value}, or of a field."""
    if ANSWER.fullmatch(column):
        layer.tables['answers'][column] = cell
    elif column[0] == '{':
        layer.tables['values'][column.strip('{}')] = cell
    elif column in ('why', 'arguments', 'requests'):
        layer.add(column, cell)
    elif column == 'settings':
        layer.add(column, text.unquoted(cell))
    else:
        layer.add(column, text.unquoted(cell).rstrip('\n'))


class Family:
    """A folder of cases."""

    def __init__(self, folder, common):
        self.folder, self.common, self.used = folder, common, {'family'}
        self.head = Source(folder / 'family') if (folder / 'family').is_file() else None
        self.sources = [self.head] if self.head else []
        for path in sorted(folder.iterdir()):
            if path.suffix in SUFFIXES:
                self.sources.append(Source(path))
                self.used.add(path.name)

    def layers(self, source, verdict):
        """What a source's cases with a verdict share."""
        layer = Layer()
        for each in [self.head, source] if source is not self.head else [self.head]:
            if each:
                layer = each.head[verdict].over(each.head['all'].over(layer))
        return layer

    def cases(self):
        """The cases, in order of their names."""
        found = {}
        for source in self.sources:
            for name in source.cases:
                if name in found:
                    raise BadCase('%s/%s: there twice' % (self.folder.name, name))
                found[name] = source
        return [self.case(found[name], name) for name in sorted(found)]

    def case(self, source, name):
        try:
            return Case(self, source, name)
        except (BadCase, text.BadText, files.BadFiles, OSError, ValueError) as error:
            raise BadCase('%s/%s: %s' % (self.folder.name, name, error)) from error

    def bytes_of(self, name):
        """What is in a file beside the cases."""
        self.used.add(name)
        return (self.folder / name).read_bytes()

    def unused(self):
        return [path.name for path in sorted(self.folder.iterdir()) if path.name not in self.used]


class Case:
    """One case: what a program is given, and what it is expected to do."""

    def __init__(self, family, source, name):
        match = NAME.fullmatch(name)
        if not match:
            raise BadCase('the name has no verdict')
        self.name, self.verdict, self.family = (
            '%s/%s' % (family.folder.name, name),
            match.group(1),
            family,
        )
        own = source.cases[name]
        if not own.texts.get('why', '').strip():
            raise BadCase('no why')
        layer = own.over(family.layers(source, self.verdict))
        self.take(layer, name)
        outcomes = [layer]
        if self.verdict == 'either':
            outcomes = [family.layers(source, verdict) for verdict in ('must', 'must-not')]
        self.expected = [self.outcome(each) for each in outcomes]
        for outcome in self.expected:
            self.check(outcome)

    def take(self, layer, name):
        """Take what the program is given."""
        uid, gid, shell = files.new_user()
        self.values = dict(
            self.family.common.values, uid=str(uid), gid=str(gid), shell=shell, case=name
        )
        self.values.update(
            (each, text.unquoted(value)) for each, value in layer.tables['values'].items()
        )
        self.why = layer.texts['why'].strip()
        self.arguments = words(layer.texts.get('arguments', ''))
        self.settings = {
            each: self.filled(value)
            for each, value in layer.tables['settings'].items()
            if value is not None
        }
        for each in ('failing', 'missing'):
            if layer.texts.get(each, '').strip():
                self.settings[each.upper()] = layer.texts[each].strip()
        self.curlrc = layer.texts.get('curlrc')
        self.network = layer.texts.get('network', '').strip()
        self.fixed_hostname = 'kernel' in layer.texts
        self.traced = 'traced' in layer.texts
        self.output = layer.texts.get('output', '').strip()
        self.signal = layer.texts.get('signal', '').strip()
        self.umask = layer.texts.get('umask', '022').strip()
        self.answers = self.answers_of(layer)
        self.before = None
        if self.output not in ('', *OUTPUTS):
            raise BadCase('no such output: %s' % self.output)
        if self.network not in ('', *NETWORKS):
            raise BadCase('no such network: %s' % self.network)
        if 'umask' in layer.texts and 'files' not in layer.texts:
            raise BadCase('an umask is looked at with files only')
        if 'before' in layer.texts or 'files' in layer.texts:
            before = self.family.common.before + layer.texts.get('before', '')
            self.before = files.changed({}, self.listing(before))

    def filled(self, value):
        return text.filled(value, self.values)

    def listing(self, lines):
        return files.read(lines, self.values, self.family.bytes_of)

    def answers_of(self, layer):
        """The answers to each request, in order."""
        answers = {endpoint: [] for endpoint in ENDPOINTS}
        given = layer.tables['answers']
        for name in sorted(given, key=lambda name: int((name + '-0').split('-')[1]) or LAST):
            match = ANSWER.fullmatch(name)
            if not match:
                raise BadCase('what is asked for with %s?' % name)
            answers[match.group(1)].append(self.answer(given[name]))
        for endpoint, given in conversation(layer.texts.get('requests', '')).items():
            last = [self.answer(each) if each else None for each in given]
            for number, answer in enumerate(last):
                common = answers[endpoint][min(number, len(answers[endpoint]) - 1) :][:1]
                last[number] = answer or (last[number - 1] if number else (common or [None])[0])
            answers[endpoint] = last
        return answers

    def answer(self, written):
        """The answer that is written so."""
        kind, _, rest = written.partition(' ')
        if kind == 'HTTP':
            return Answer('http', self.reply(written))
        if kind == 'fault':
            if rest not in FAULTS:
                raise BadCase('no such fault: %s' % rest)
            return Answer('fault', rest)
        if kind == 'file':
            return Answer('body', self.family.bytes_of(self.filled(rest)))
        if kind == 'slow':
            seconds, _, rest = rest.partition(' ')
            return Answer('slow', (float(seconds), self.bytes_of(rest)))
        kind = {'reply': 'http', 'reset': 'reset'}.get(kind, 'body')
        return Answer(kind, self.bytes_of(written if kind == 'body' else rest))

    def bytes_of(self, written):
        """The bytes that are written so."""
        return text.encoded(text.whole(text.unquoted(written), self.values))

    def reply(self, written):
        """The bytes of a reply that is written as HTTP STATUS [HEADER]... "BODY"."""
        status, headers, body = REPLY.fullmatch(written).groups()
        body = self.bytes_of(body or '')
        lines = (
            [status]
            + re.findall(r'\[(.*?)\]', headers)
            + ['Content-Length: %d' % len(body), '', '']
        )
        return text.encoded(self.filled('HTTP/1.1 ' + '\r\n'.join(lines))) + body

    def outcome(self, layer):
        """What is expected, by field, with the values put in."""
        expected = {
            name: text.whole(layer.texts[name], self.values)
            for name in EXPECTED
            if name in layer.texts and name not in ('requests', 'files')
        }
        if 'requests' in layer.texts:
            expected['requests'] = ''.join(
                line + '\n' for line, _ in requests(layer.texts['requests'])
            )
        if self.before is not None:
            expected['files'] = self.listing(layer.texts.get('files', ''))
            expected.setdefault('hostname', MACHINE_NAME + '\n')
        return expected

    def check(self, outcome):
        """See that nothing is missing, and nothing leads out."""
        if 'exit' not in outcome or 'requests' not in outcome:
            raise BadCase('no exit, or no requests')
        for endpoint, line in ENDPOINTS.items():
            if line + '\n' in outcome['requests'] and not self.answers[endpoint]:
                raise BadCase('no answer to %s' % endpoint)
        for name, url in self.settings.items():
            if name.lower().endswith(('_wireserver', '_imds')) and leads_out(url):
                raise BadCase('%s is not on loopback' % url)


LAST = 10**6  # the answer without a number comes behind those with one


def words(line):
    """The words of a command line; one with a blank stands in quotes."""
    return [text.unquoted(word) for word in WORD.findall(line)]


def requests(lines):
    """The request lines that are expected, each with the answer written behind it, if any."""
    lines = text.lines_of(lines)
    if len(lines) == 1 and not re.match('(GET|POST) |.* -> ', lines[0]):
        lines = [word + '\n' for word in lines[0].split()]
    for line in lines:
        names, _, answer = line.rstrip('\n').partition(' -> ')
        for name in text.several(names):
            yield request_line(name), answer


def request_line(name):
    """The line of the request that has that short name."""
    if name.startswith(('GET ', 'POST ')):
        return name
    number = re.fullmatch('publicKeys/([0-9]+)/keyData', name)
    line = ENDPOINTS.get('keyData' if number else name)
    if not line:
        raise BadCase('what is asked for with %s?' % name)
    return line.replace('/N/', '/%s/' % number.group(1)) if number else line


def conversation(lines):
    """The answers that are written behind requests, by what is asked for; None for what the one
    before says.
    """
    found = {}
    for line, answer in requests(lines):
        found.setdefault(endpoint_of(line), []).append(answer or None)
    return {endpoint: given for endpoint, given in found.items() if endpoint and any(given)}


class Common:
    """What all families share: values, and the files of the root file system."""

    def __init__(self, folder):
        values = Layer()
        values.add('values', text.decoded((folder / 'values').read_bytes()).split('\n'))
        self.values = {
            name: text.unquoted(value) for name, value in values.tables['values'].items()
        }
        self.usage = self.values.pop('usage', '') + '\n'
        self.before = text.decoded((folder / 'before').read_bytes())


def find(only='', folder=CASES):
    """All cases, in order, and what they share."""
    common, cases = Common(folder), []
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            family = Family(path, common)
            cases += family.cases()
            if family.unused():
                raise BadCase('%s: what is %s?' % (path.name, ', '.join(family.unused())))
    cases = [case for case in cases if only in case.name]
    if not cases:
        raise BadCase('no case found')
    return cases, common
