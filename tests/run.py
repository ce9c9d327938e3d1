#!/usr/bin/env python3
"""Hold provisioning agents against the cases: python3 tests/run.py [--strict] [--only TEXT] [PROGRAM]...

A PROGRAM is a command line, './my-port --flag' say; without one, the two scripts of this project are run, py and sh.
--strict also compares what only these two promise: every header, every byte printed, nothing written anywhere.
Exit status: 0 all passed, 1 some failed, 2 the cases themselves are not in order. tests/README.md tells the rest.
"""
import argparse
import concurrent.futures
import datetime
import functools
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree

import scratch
from host import ENDPOINTS, FAULTS, Answer, Host, endpoint_of, is_loopback, loopback_only

TESTS = pathlib.Path(__file__).resolve().parent
OURS = [str(TESTS.parent / 'azure-provisioning.py'), str(TESTS.parent / 'azure-provisioning.sh')]
LIMIT = 40  # seconds for one run
ANSWER = re.compile('(%s)(?:-([0-9]+))?[.](body|http|reset|fault)' % '|'.join(ENDPOINTS))
EXPECTED = ('exit', 'requests', 'posted', 'commands', 'files', 'waits', 'stdout', 'stderr')
OTHERS = ('why', 'values', 'arguments', 'settings', 'curlrc', 'before', 'network')
ADDED = ('values', 'before', 'files')  # own lines of these are added to the common ones
SECRET = 'S3cr3t'  # what each password in the cases has in it
WIRESERVER = {'x-ms-version': '2012-11-30', 'x-ms-agent-name': 'custom-provisioning'}
HEADERS = {  # the other requests go to IMDS
    'goalstate': WIRESERVER,
    'health': dict(WIRESERVER, **{'Content-Type': 'text/xml;charset=utf-8'}),
}
OUR_HEADERS = {'User-Agent': 'azure-provisioning/', 'Accept': '*/*', 'Accept-Encoding': 'identity',
               'Connection': 'close'}


class BadCase(Exception):
    """A case that is not in order."""


class Case:
    """A directory of the cases: GROUP/VERDICT-SUBJECT; what is not in it stands in GROUP/VERDICT."""

    def __init__(self, path):
        self.path = path
        self.name = '%s/%s' % (path.parent.name, path.name)
        match = re.fullmatch('(must-not|must|either)-.+', path.name)
        if not match:
            raise BadCase('%s: the name has no verdict' % self.name)
        self.verdict = match.group(1)
        self.files = {}
        for folder in (path.parent / self.verdict, path):
            own = {each.name: each.read_bytes() for each in folder.iterdir()}
            for name in list(self.files):  # an own answer stands for the common one of that number, whatever its kind
                if ANSWER.fullmatch(name) and any(ANSWER.fullmatch(each) and each.rpartition('.')[0] ==
                                                  name.rpartition('.')[0] for each in own):
                    del self.files[name]
            added = {name: self.files.get(name, b'') + own.get(name, b'') for name in ADDED
                     if name in self.files or name in own}
            self.files.update(own, **added)
        sources = re.findall('^/.* < (.*)$', self.text('before') + self.text('files'), re.MULTILINE)
        for name in self.files:
            if name not in EXPECTED + OTHERS and not ANSWER.fullmatch(name) and name not in sources:
                raise BadCase('%s: what is %s?' % (self.name, name))
        if not self.text('why').strip() or not (path / 'why').is_file():
            raise BadCase('%s: no why' % self.name)
        for line in self.text('settings').splitlines():
            name, _, url = line.lower().partition('=')
            if name.endswith(('_wireserver', '_imds')) and re.match('[a-z]+://[^/:]*[0-9a-z]', url) and \
                    not is_loopback(url):
                raise BadCase('%s: %s is not on loopback' % (self.name, url))
        self.values = dict(zip(('uid', 'gid', 'shell'), map(str, scratch.new_user())))
        self.values.update(line.split('=', 1) for line in self.text('values').splitlines())
        self.before = None
        if 'before' in self.files or 'files' in self.files:
            before = (TESTS / 'cases/before').read_text() + self.text('before')
            self.before = scratch.changed({}, self.machine(before))
        if self.verdict != 'either':
            self.expected = [self.outcome(self.files)]
        else:
            self.expected = [self.outcome({each.name: each.read_bytes() for each in (path.parent / verdict).iterdir()})
                             for verdict in ('must', 'must-not')]
        for outcome in self.expected:
            if 'exit' not in outcome or 'requests' not in outcome:
                raise BadCase('%s: no exit, or no requests' % self.name)
            for endpoint, line in ENDPOINTS.items():
                if line + '\n' in outcome['requests'] and not self.answers()[endpoint]:
                    raise BadCase('%s: no answer to %s' % (self.name, line))

    def text(self, name):
        return self.files.get(name, b'').decode()

    def outcome(self, files):
        """What is expected, by file, with the values put in."""
        expected = {name: self.filled(files[name].decode()) for name in EXPECTED if name in files}
        if self.before is not None:
            expected['files'] = self.machine(expected.get('files', ''))
        return expected

    def filled(self, text):
        return re.sub('{([A-Za-z]+)}', lambda match: self.values.get(match.group(1), match.group()), text)

    def machine(self, text):
        """The files that lines of `before` or `files` name."""
        try:
            return scratch.read(self.filled(text), self.files)
        except scratch.BadFiles as error:
            raise BadCase('%s: what is %s?' % (self.name, error))

    def answers(self):
        answers = {endpoint: [] for endpoint in ENDPOINTS}
        for name in sorted(self.files, key=lambda name: [int(part) if part.isdigit() else part
                                                         for part in re.split('([0-9]+)', name)]):
            match = ANSWER.fullmatch(name)
            if match:
                data = self.files[name]
                if match.group(3) == 'fault':
                    data = data.decode().strip()
                    if data not in FAULTS:
                        raise BadCase('%s: no such fault: %s' % (self.name, data))
                answers[match.group(1)].append(Answer(match.group(3), data))
        return answers


def find_cases(only=''):
    """All cases, in order."""
    cases = [Case(path) for path in sorted((TESTS / 'cases').glob('*/*'))
             if path.name not in ('must', 'must-not', 'either') and only in '%s/%s' % (path.parent.name, path.name)]
    if not cases:
        raise BadCase('no case found')
    return cases


def command_line(program):
    """The words of a program's command line, `py` and `sh` for ours; those that name files do so from any folder."""
    program = {'py': OURS[0], 'sh': OURS[1]}.get(program, program)
    words = [os.path.abspath(word) if os.path.isfile(word) else word for word in shlex.split(program)]
    if not words or not shutil.which(words[0]):
        sys.exit('cannot be started: %s' % program)
    return words


def run(case, program, world):
    """Run the program in the case's world; return what it did, by the names of EXPECTED, and the trouble seen.

    The world is what the environment has but for the case; PATH is this process's, where the world has none.
    """
    with Host(case.answers()) as host, tempfile.TemporaryDirectory() as folder:
        home, root, commands, trace = (pathlib.Path(folder, name) for name in ('home', 'root', 'commands', 'trace'))
        home.mkdir()
        if 'curlrc' in case.files:
            (home / '.curlrc').write_text(case.text('curlrc').replace('{elsewhere}', host.elsewhere))
        before = sorted(home.rglob('*'))
        commands.touch()
        path = world.get('PATH', os.environ['PATH'])
        environment = dict(world, PATH='%s:%s' % (TESTS / 'stand-ins', path), HOME=str(home), TMPDIR=str(home),
                           COMMANDS=str(commands), AZURE_PROVISIONING_WIRESERVER=host.wireserver,
                           AZURE_PROVISIONING_IMDS=host.imds)
        for line in case.text('settings').splitlines():
            name, value = line.split('=', 1)
            for server in ('elsewhere', 'refused', 'wireserver', 'imds'):
                value = value.replace('{%s}' % server, getattr(host, server))
            environment[name] = value
        if 'MISSING' in environment:
            environment['PATH'] = path_without(environment['MISSING'].split(), environment['PATH'], folder + '/path')
        words = command_line(program) + case.text('arguments').splitlines()
        machine = {}
        if case.before is not None:
            if 'network' not in case.files:
                scratch.default_route()
            environment.update(zip(('NEW_UID', 'NEW_GID'), map(str, scratch.new_user())))
            scratch.put(root, case.before)
            machine = scratch.look(root)
            words = tracer(case, trace) + words
            words = scratch.enter(root, 'network' in case.files) + [
                shutil.which('env'), '-i', *('%s=%s' % each for each in environment.items())] + words
            environment = None  # of the commands that make the machine
        process = subprocess.Popen(words, cwd=str(home), env=environment, stdin=subprocess.DEVNULL,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
        trouble = []
        try:
            stdout, stderr = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            stdout, stderr = process.communicate()
            trouble.append('still running after %d seconds' % LIMIT)
        requests = list(host.requests)
        moments = [request.time for request in requests] + [time.monotonic()]
        if [request for request in requests if request.server == 'elsewhere']:
            trouble.append('a request went elsewhere: a redirect was followed, or a proxy obeyed')
        if sorted(home.rglob('*')) != before:
            trouble.append('files were written: %s' % sorted(home.rglob('*')))
        did = {
            'exit': '%d\n' % process.returncode,
            'requests': ''.join(request.line + '\n' for request in requests),
            'posted': ''.join(request.body.decode('latin-1') + '\n' for request in requests if request.body),
            'commands': as_text(commands.read_bytes()),
            'waits': [later - sooner for sooner, later in zip(moments, moments[1:])],
            'stdout': as_text(stdout),
            'stderr': as_text(stderr),
        }
        if case.before is not None:
            did['before'], did['files'] = machine, scratch.look(root)
            trouble += scratch.wrong_owners(root)
            trouble += leaks(did, home, trace)
        return did, requests, trouble


def path_without(missing, path, folder):
    """Fill a folder with links to all commands of a path but those that are to be missing; return it."""
    os.mkdir(folder)
    for each in filter(os.path.isdir, path.split(':')):
        for name in set(os.listdir(each)) - set(missing) - set(os.listdir(folder)):
            os.symlink(os.path.join(os.path.abspath(each), name), os.path.join(folder, name))
    return folder


def as_text(printed):
    return printed.decode('utf-8', 'backslashreplace')


def tracer(case, trace):
    """The words that have strace note all command lines in a file, where there is a secret, and strace."""
    words = [shutil.which('strace') or 'strace', '-f', '-qq', '-e', 'trace=execve', '-s', '9999', '-o', str(trace)]
    secret = any(SECRET.encode() in file.content for file in case.before.values())
    return words if secret and works(*words[:-1], '/dev/null', 'true') else []


@functools.lru_cache(maxsize=None)
def works(*words):
    """Whether there is such a command, and it succeeds."""
    return shutil.which(words[0]) is not None and subprocess.call(words, stderr=subprocess.DEVNULL) == 0


def leaks(did, home, trace):
    """Where a password is to be seen, but for the DVD and the standard input of chpasswd."""
    texts = {name: did[name] for name in ('requests', 'posted', 'stdout', 'stderr')}
    texts['commands'] = re.sub(' < .*', '', did['commands'])
    texts['command lines'] = trace.read_text() if trace.exists() else ''
    for place in home.rglob('*'):
        if place.is_file():
            texts[place.name] = place.read_bytes().decode('latin-1')
    texts.update((path, path + file.content.decode('latin-1')) for path, file in did['files'].items()
                 if file != did['before'].get(path))
    return ['the password is to be seen: %s' % name for name, text in texts.items() if SECRET in text]


def differences(expected, did, strict):
    """What a run did otherwise than expected, one line or more each."""
    for name in EXPECTED:
        if name not in expected or (name in ('stdout', 'stderr') and not strict):
            continue
        wanted, got = expected[name], did[name]
        if name in ('posted', 'stdout'):
            got = with_placeholders(got, strict)
        if name == 'files':
            lines = list(different_files(scratch.changed(did['before'], wanted), got))
            if lines:
                yield 'files:\n' + '\n'.join(lines)
        elif name == 'waits':
            wanted = [float(seconds) for seconds in wanted.split()]
            if len(wanted) != len(got) or any(not wait - .2 <= took <= wait + .9 for wait, took in zip(wanted, got)):
                yield 'waits: %s expected, %s taken' % (wanted, ['%.1f' % seconds for seconds in got])
        elif name == 'posted' and not strict and same_xml(wanted, got):
            continue
        elif wanted != got:
            yield '%s:\n%s' % (name, ''.join(
                '    %s %s\n' % (mark, line) for mark, lines in (('expected', wanted), ('got     ', got))
                for line in lines.splitlines() or ['(nothing)']).rstrip('\n'))


def different_files(wanted, got):
    """How the files of a machine differ from those expected, in lines."""
    for path in sorted(set(wanted) | set(got)):
        if wanted.get(path) != got.get(path):
            for mark, files in (('expected', wanted), ('got     ', got)):
                for line in scratch.show(path, files.get(path)).splitlines():
                    yield '    %s %s' % (mark, line)


def with_placeholders(text, strict):
    """With {timestamp} for a time of now, and {version} for that of the program, whose name is its own."""
    def time_of_now(match):
        then = datetime.datetime.strptime(match.group(1), '%Y-%m-%dT%H:%M:%S')
        now = abs(then - datetime.datetime.utcnow()) < datetime.timedelta(seconds=2 * LIMIT)
        return 'timestamp={timestamp}' if now else match.group()
    text = re.sub('timestamp=(\\d{4}-\\d\\d-\\d\\dT\\d\\d:\\d\\d:\\d\\d)Z', time_of_now, text)
    return re.sub('agent=azure-provisioning/[^|<]+' if strict else 'agent=[^|<]+',
                  'agent=azure-provisioning/{version}', text)


def same_xml(*texts):
    """Whether lines of XML say the same."""
    def tree(element):
        return element.tag, (element.text or '').strip(), [tree(child) for child in element]
    try:
        one, other = ([tree(xml.etree.ElementTree.fromstring(line)) for line in text.splitlines()] for text in texts)
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
        if {name: value for name, value in sent.items() if strict or name in wanted} != wanted:
            yield '%s: headers:\n    expected %s\n    got      %s' % (request.line, sorted(wanted.items()),
                                                                    sorted(sent.items()))


def impossible(case):
    """Why the case cannot be run on this machine, or nothing."""
    return scratch.impossible() if case.before is not None else ''


def verdict(case, program, strict, world={}):
    """Run one case; return the differences, none if it passed."""
    did, requests, trouble = run(case, program, world)
    if not strict:
        trouble = [line for line in trouble if not line.startswith('files')]
    ours = strict and case.verdict != 'either'
    outcomes = [list(differences(expected, did, ours)) for expected in case.expected]
    return trouble + list(wrong_headers(requests, strict)) + min(outcomes, key=len)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--strict', action='store_true')
    parser.add_argument('--only', default='', metavar='TEXT', help='cases with this in GROUP/NAME')
    parser.add_argument('programs', nargs='*', default=OURS, metavar='PROGRAM')
    arguments = parser.parse_args()
    loopback_only()
    for program in arguments.programs:
        command_line(program)
    try:
        cases = find_cases(arguments.only)
    except (BadCase, OSError, ValueError) as error:
        print('the cases are not in order: %s' % error)
        sys.exit(2)
    skipped = [case for case in cases if impossible(case)]
    cases = [case for case in cases if not impossible(case)]
    passed = failed = 0
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for program in arguments.programs:
            for case, found in zip(cases, pool.map(lambda case: verdict(case, program, arguments.strict), cases)):
                passed, failed = passed + (not found), failed + bool(found)
                if found:
                    print('FAILED %s: %s\n  %s' % (program, case.name, case.text('why').strip().replace('\n', '\n  ')))
                    print(''.join('  %s\n' % line for line in found), end='', flush=True)
            print('%s: %d cases' % (program, len(cases)), flush=True)
    if skipped:
        print('%d skipped: %s' % (len(skipped) * len(arguments.programs), impossible(skipped[0])))
    print('%d passed, %d failed' % (passed, failed))
    sys.exit(1 if failed else 0)


if __name__ == '__main__':
    main()
