"""The files of a case's root file system: read from lines, put in place, looked at, shown.

/etc/skel/ 755              a folder
/etc/hosts 644              a file, whose lines follow, each behind four blanks, where it is not
empty
    127.0.0.1 localhost
/etc/motd 644 < motd        a file with the bytes of another one, here `motd`
/etc/issue 644 = "no end"   a file with just these bytes
/home/other/ 755 by 4242    a folder or a file that belongs to the user of this number, 0 is root
/etc/mtab -> /proc/mounts   a symlink; `by NUMBER` may follow
/etc/queue fifo             a FIFO, which nobody reads or writes
/etc/issue gone             none, where there was one
/etc/group same             what the defaults of the case say does not count
"""

import collections
import functools
import os
import re
import stat
import tempfile

import text

LINE = re.compile(
    r'(?P<path>/\S*?)(?P<folder>/?) '
    r'(?:(?P<mode>[0-7]{3,4})(?: by (?P<owner>[0-9]+))?(?: < (?P<source>\S+))?'
    r'|-> (?P<target>\S+)(?: by (?P<link_owner>[0-9]+))?|(?P<word>gone|same|fifo))'
)
REPLACED = (
    'etc',
    'home',
    'var/lib',
    'run',
    'sys',
    'dev',
)  # what a program finds instead of the machine's
KEPT = (  # but for these
    'etc/alternatives',
    'etc/ld.so.cache',
    'dev/null',
    'dev/zero',
    'dev/full',
    'dev/random',
    'dev/urandom',
    'dev/tty',
    'dev/shm',
)
LINKS = {
    'dev/fd': '/proc/self/fd',
    'dev/stdin': 'fd/0',
    'dev/stdout': 'fd/1',
    'dev/stderr': 'fd/2',
}
MOST_SHOWN = 2000  # characters of a file
MARK = 'etc/sandbox'  # the stubs change nothing where this is missing

# kind: 'file', 'folder', 'link', 'fifo', 'gone', 'same'; owner: only where one is given
File = collections.namedtuple('File', 'kind mode content owner')
File.__new__.__defaults__ = (None,)


class BadFiles(Exception):
    """Lines that are not in order."""


def read(lines, values, source):
    """The files that such lines name, by path; source(NAME) has the bytes of another file."""
    found, path = {}, None
    for line in text.lines_of(lines):
        if line.startswith(('    ', '\n')) and path and found[path].kind == 'file':
            more = text.encoded(text.filled(line[4:] or '\n', values))
            found[path] = found[path]._replace(content=found[path].content + more)
        else:
            path, file = one(line.rstrip('\n'), values, source)
            found[path] = file
    return found


def one(line, values, source):
    """The path and the file that a line names."""
    head, equals, content = line.partition(' = ')
    match = LINE.fullmatch(text.filled(head, values))
    if not match or (equals and not match.group('mode')):
        raise BadFiles(line)
    path, mode = match.group('path'), int(match.group('mode') or '0', 8)
    if match.group('word'):
        return path, File(match.group('word'), 0, b'')
    owner = match.group('owner') or match.group('link_owner')
    owner = owner and int(owner)
    if match.group('target'):
        return path, File('link', 0, text.encoded(match.group('target')), owner)
    data = text.encoded(text.filled(text.unquoted(content), values))
    if match.group('source'):
        data = source(match.group('source'))
    return path, File('folder' if match.group('folder') else 'file', mode, data, owner)


def changed(files, changes):
    """The files after changes."""
    files = dict(files, **{path: file for path, file in changes.items() if file.kind != 'same'})
    return {path: file for path, file in files.items() if file.kind != 'gone'}


def put(root, files):
    """Put files in place, below a new folder; what is in a home is its user's."""
    os.umask(0o022)  # what is not listed has the modes of a common system; the program inherits it
    put_common(root)
    for path, file in files.items():
        put_one(root + path, file)
    for home, (uid, gid) in homes(root).items():
        for path, _ in walk(root, home):
            os.chown(root + path, uid, gid, follow_symlinks=False)
    for path, file in files.items():
        if file.owner is not None:
            os.chown(root + path, file.owner, file.owner, follow_symlinks=False)


def put_common(root):
    """Put in place what each root file system has."""
    for folder in REPLACED:
        os.makedirs(os.path.join(root, folder))
    for kept in KEPT:
        if os.path.isdir('/' + kept):
            os.makedirs(os.path.join(root, kept))
        elif os.path.exists('/' + kept):
            write(os.path.join(root, kept), b'')
    for link, target in LINKS.items():
        os.symlink(target, os.path.join(root, link))
    write(os.path.join(root, MARK), b'')


def put_one(place, file):
    os.makedirs(os.path.dirname(place), exist_ok=True)
    if file.kind == 'link':
        return os.symlink(file.content, os.fsencode(place))
    if file.kind == 'fifo':
        return os.mkfifo(place, 0o600)
    if file.kind == 'folder':
        os.makedirs(place, exist_ok=True)
    else:
        write(place, file.content)
    return os.chmod(place, file.mode)


def write(place, content):
    with open(place, 'wb') as file:
        file.write(content)


def contents(place):
    with open(place, 'rb') as file:
        return file.read()


def homes(root):
    """The homes of the accounts, as far as they can be in a sandbox, with the numbers of user and
    group.
    """
    lines = (
        contents(os.path.join(root, 'etc/passwd')).decode('utf-8', 'surrogateescape').splitlines()
    )
    accounts = [line.split(':') for line in lines if line.count(':') >= 6]  # not those cut off
    return {
        each[5]: (int(each[2]), int(each[3]))
        for each in accounts
        if each[5].startswith(('/home/', '/var/lib/'))
    }


def walk(root, folder):
    """All that is there, by path, with its state: a folder, and what is below it."""
    try:
        state = os.lstat(root + folder)
    except OSError:
        return
    yield folder, state
    if stat.S_ISDIR(state.st_mode):
        for name in sorted(os.listdir(root + folder)):
            yield from walk(root, folder + '/' + name)


def look(root):
    """The files that are there, by path, and what belongs to somebody it should not belong to.

    Folders in /run are nobody's concern.
    """
    found, wrong, owners = {}, [], homes(root)
    for folder in REPLACED:
        for path, state in walk(root, '/' + folder):
            if path != '/' + folder:
                wrong += wrong_owner(path, state, owners)
                file = file_of(root, path, state)
                if file and not (file.kind == 'folder' and folder == 'run'):
                    found[path] = file
    return found, wrong


def file_of(root, path, state):
    mode = stat.S_IMODE(state.st_mode)
    if stat.S_ISLNK(state.st_mode):
        return File('link', 0, os.readlink(os.fsencode(root + path)))
    if stat.S_ISDIR(state.st_mode):
        return File('folder', mode, b'')
    if stat.S_ISREG(state.st_mode):
        return File('file', mode, contents(root + path))
    return None


def wrong_owner(path, state, owners):
    """A line, if it does not belong to the user in whose home it is, or elsewhere to root.

    A symlink in the place of a home may be anybody's.
    """
    if path in owners and stat.S_ISLNK(state.st_mode):
        return
    wanted = (0, 0)
    for home, numbers in owners.items():
        if (path + '/').startswith(home + '/'):
            wanted = numbers
    if (state.st_uid, state.st_gid) != wanted:
        yield '%s belongs to %d:%d, not to %d:%d' % ((path, state.st_uid, state.st_gid) + wanted)


def show(path, file):
    """A file as lines say it."""
    if file is None:
        return path + ' gone\n'
    if file.kind == 'link':
        return '%s -> %s\n' % (path, file.content.decode())
    lines = file.content.decode('utf-8', 'backslashreplace').split('\n')
    end = lines.pop()
    shown = ''.join('    %s\n' % line for line in lines)
    if end:
        shown += '    %s (and no line feed)\n' % end
    if len(shown) > MOST_SHOWN:
        shown = '    (%d bytes)\n' % len(file.content)
    return '%s%s %03o\n%s' % (path, '/' * (file.kind == 'folder'), file.mode, shown)


@functools.lru_cache(maxsize=None)
def new_user():
    """The numbers of a new user and its group, those of root where a user namespace has no others;
    and the shell.
    """
    shell = '/bin/bash' if os.access('/bin/bash', os.X_OK) else '/bin/sh'
    with tempfile.NamedTemporaryFile() as file:
        try:
            os.chown(file.name, 1000, 100)
        except OSError:
            return 0, 0, shell
        return 1000, 100, shell
