"""What a run did otherwise than its case expects, in lines that show what to fix."""

import datetime
import re
import xml.etree.ElementTree

import files
import text
from cases import EXPECTED
from host import endpoint_of

WIRESERVER = {'x-ms-version': '2012-11-30', 'x-ms-agent-name': 'custom-provisioning'}
HEADERS = {  # the other requests go to IMDS
    'goalstate': WIRESERVER,
    'health': dict(WIRESERVER, **{'Content-Type': 'text/xml;charset=utf-8'}),
}
OUR_HEADERS = {
    'User-Agent': 'azure-provisioning/',
    'Accept': '*/*',
    'Accept-Encoding': 'identity',
    'Connection': 'close',
}
FORBIDDEN = ('cookie',)
USAGE = re.compile('^usage: .*', re.MULTILINE | re.DOTALL)
WIDTH = 110  # of a line that is shown whole
MOST = 12  # lines that are shown
EARLY, LATE = 0.2, 0.9  # seconds that a wait may differ
NOW = datetime.timedelta(seconds=90)  # how far from now a time of now may be


def differences(expected, did, strict):
    """What differs from what is expected, a text of some lines each."""
    for name in EXPECTED:
        if name not in expected or (name in ('stdout', 'stderr') and not strict):
            continue
        wanted, got = expected[name], did[name]
        if name == 'files':
            yield from different_files(files.changed(did['before'], wanted), got)
        elif name == 'waits':
            yield from different_waits([float(each) for each in wanted.split()], got)
        elif name == 'posted' and not strict and same_xml(wanted, got):
            continue
        elif wanted != with_any(wanted, got):
            yield different_text(name, wanted, with_any(wanted, got))


def with_any(wanted, got):
    """What was got, with {any} in the place of each line that may be any."""
    lines = got.split('\n')
    for number, line in enumerate(wanted.split('\n')[: len(lines)]):
        if line == '{any}':
            lines[number] = line
    return '\n'.join(lines)


def different_files(wanted, got):
    for path in sorted(set(wanted) | set(got)):
        if wanted.get(path) != got.get(path):
            shown = [files.show(path, each.get(path)) for each in (wanted, got)]
            yield different_text('files: ' + path, *shown)


def different_waits(wanted, got):
    close = [wait - EARLY <= took <= wait + LATE for wait, took in zip(wanted, got)]
    if len(wanted) != len(got) or not all(close):
        yield 'waits, in seconds: expected %s, got %s' % (
            ' '.join('%.0f' % wait for wait in wanted),
            ' '.join('%.1f' % took for took in got),
        )


def different_text(name, wanted, got):
    """The lines from the first one that differs, with a mark below the first column that does."""
    wanted, got = wanted.split('\n')[:-1], got.split('\n')[:-1]
    same = 0
    while wanted[same : same + 1] == got[same : same + 1] and same < len(wanted):
        same += 1
    shown = [name if not same else '%s, from line %d:' % (name, same + 1)]
    wanted, got = wanted[same:], got[same:]
    if wanted and got:
        shown += marked(wanted.pop(0), got.pop(0))
    shown += listed('expected', wanted, not got and len(shown) == 1)
    shown += listed('got     ', got, len(shown) == 1)
    return '\n'.join(shown + ([] if len(shown) > 1 else ['    got      (nothing more)']))


def marked(wanted, got):
    """Two lines that differ, and a mark below the first column that does."""
    column = len([1 for count in range(1, len(wanted) + 1) if wanted[:count] == got[:count]])
    start = max(0, column - WIDTH // 2) if max(len(wanted), len(got)) > WIDTH else 0
    wanted, got = ('…' * bool(start) + each[start : start + WIDTH] for each in (wanted, got))
    return [
        '    expected ' + wanted,
        '    got      ' + got,
        '             ' + ' ' * (column - start + bool(start)) + '^',
    ]


def listed(mark, lines, nothing):
    """Lines behind a mark; if there are none, that is said where nothing else is."""
    shown = ['    %s %s' % (mark, line[:WIDTH]) for line in lines[:MOST]]
    if len(lines) > MOST:
        shown.append('    %s … %d lines more' % (mark, len(lines) - MOST))
    return shown or (['    %s (nothing)' % mark] if nothing else [])


def with_placeholders(did, strict):
    """What a run did, with {timestamp}, {version} and {usage} in the place of the program's own;
    and its usage.
    """
    did, usage = dict(did), None
    for name in ('posted', 'stdout', 'stderr'):
        content = re.sub(
            'timestamp=(\\d{4}-\\d\\d-\\d\\dT\\d\\d:\\d\\d:\\d\\d)Z', time_of_now, did[name]
        )
        agent = 'agent=azure-provisioning/[^|<]+' if strict else 'agent=[^|<]+'
        did[name] = re.sub(agent, 'agent=azure-provisioning/{version}', content)
        found = USAGE.search(did[name]) if name != 'posted' else None
        if found:
            usage, did[name] = found.group(), USAGE.sub('{usage}\n', did[name])
    return did, usage


def time_of_now(match):
    then = datetime.datetime.strptime(match.group(1) + '+0000', '%Y-%m-%dT%H:%M:%S%z')
    now = datetime.datetime.now(datetime.timezone.utc)
    return 'timestamp={timestamp}' if abs(then - now) < NOW else match.group()


def same_xml(*texts):
    """Whether lines of XML say the same."""

    def tree(element):
        texts = [(each or '').strip() for each in (element.text, element.tail)]
        return element.tag, element.attrib, texts, [tree(child) for child in element]

    try:
        one, other = (
            [tree(xml.etree.ElementTree.fromstring(line)) for line in text.lines_of(each)]
            for each in texts
        )
    except xml.etree.ElementTree.ParseError:
        return False
    return one == other


def wrong_headers(requests, strict):
    """What is wrong with the headers that were sent."""
    for request in requests:
        endpoint = endpoint_of(request.line)
        if endpoint is None:
            continue  # the requests differ anyway
        sent = {name.lower(): value for name, value in request.headers.items()}
        wanted = dict(HEADERS.get(endpoint, {'Metadata': 'true'}))
        if strict:
            wanted.update(OUR_HEADERS, Host=sent.get('host', 'none'))
            wanted['User-Agent'] += sent.get('user-agent', '').rpartition('/')[2]
            if request.body:
                wanted['Content-Length'] = str(len(request.body))
        wanted = {name.lower(): value for name, value in wanted.items()}
        kept = {
            name: value
            for name, value in sent.items()
            if strict or name in wanted or name in FORBIDDEN
        }
        if kept != wanted:
            shown = [
                ''.join('%s: %s\n' % header for header in sorted(headers.items()))
                for headers in (wanted, kept)
            ]
            yield different_text('headers of %s' % request.line, *shown)
