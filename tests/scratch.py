"""The files of a case's machine: put in place, looked at, and a scratch machine made of them to run a program on.

    /etc/skel/ 755              a folder
    /etc/hosts 644              a file, whose lines follow, each behind four blanks, where it is not empty
        127.0.0.1 localhost
    /etc/motd 644 < motd        a file with the bytes of another one, here `motd`
    /etc/mtab -> /proc/mounts   a symlink
    /etc/issue gone             none, where there was one
    /etc/group same             what the defaults of the case say does not count
"""
import collections
import contextlib
import ctypes
import fcntl
import functools
import os
import pathlib
import re
import shutil
import socket
import stat
import struct
import subprocess
import tempfile

LINE = re.compile(r'(?P<path>/\S*?)(?P<folder>/?) '
                  r'(?:(?P<mode>[0-7]{3,4})(?: < (?P<source>\S+))?|-> (?P<target>\S+)|(?P<word>gone|same))')
SCRATCH = ('etc', 'home', 'var/lib', 'run', 'sys', 'dev')  # folders that a program finds instead of the machine's
KEPT = ('etc/alternatives', 'etc/ld.so.cache', 'dev/null', 'dev/zero', 'dev/full', 'dev/random', 'dev/urandom',
        'dev/tty', 'dev/shm')  # but for these
LINKS = {'dev/fd': '/proc/self/fd', 'dev/stdin': 'fd/0', 'dev/stdout': 'fd/1', 'dev/stderr': 'fd/2'}
MARK = 'etc/scratch'  # the stand-ins change nothing where this is missing
ENTER = """
mount --all --fstab "$1" && [ -e /etc/scratch ] || exit 1
while read -r _ path _ options _; do
    case $path in "$2"* | /proc* | /sys* | /dev* | /run* | /etc* | /home* | /var/lib*) continue ;; esac
    mount -o "remount,bind,$(printf %s "$options" | sed 's/^rw/ro/; s/,[^,]*=[^,]*//g')" "$path" 2>/dev/null
done </proc/self/mounts
shift 2
exec "$@"
"""

File = collections.namedtuple('File', 'kind mode content')  # kind: 'file', 'folder', 'link', 'gone'


class BadFiles(Exception):
    """Lines that are not in order."""


def read(text, sources):
    """The files that such lines name, by path; sources has the bytes of other files by name."""
    found, path = {}, None
    for line in text.splitlines(True):
        if line.startswith(('    ', '\n')) and path and found[path].kind == 'file':
            found[path] = found[path]._replace(content=found[path].content + (line[4:] or '\n').encode())
            continue
        match = LINE.fullmatch(line.rstrip('\n'))
        if not match or (match.group('source') and match.group('source') not in sources):
            raise BadFiles(line.rstrip('\n'))
        path = match.group('path')
        if match.group('word'):
            found[path] = File(match.group('word'), 0, b'')
        elif match.group('target'):
            found[path] = File('link', 0, match.group('target').encode())
        else:
            found[path] = File('folder' if match.group('folder') else 'file', int(match.group('mode'), 8),
                               sources.get(match.group('source'), b''))
    return found


def changed(files, changes):
    """The files after changes."""
    files = dict(files, **{path: file for path, file in changes.items() if file.kind != 'same'})
    return {path: file for path, file in files.items() if file.kind != 'gone'}


def put(root, files):
    """Put files in place, below a new folder; what is in a home is its user's."""
    os.umask(0o022)  # what is not listed has the modes of a common machine; the program inherits it
    for folder in SCRATCH:
        (root / folder).mkdir(parents=True)
    for kept in KEPT:
        if os.path.exists('/' + kept):
            (root / kept).mkdir() if os.path.isdir('/' + kept) else (root / kept).touch()
    for link, target in LINKS.items():
        (root / link).symlink_to(target)
    (root / MARK).touch()
    for path, file in files.items():
        place = root / path[1:]
        place.parent.mkdir(parents=True, exist_ok=True)
        if file.kind == 'link':
            place.symlink_to(file.content.decode())
            continue
        if file.kind == 'folder':
            place.mkdir(exist_ok=True)
        else:
            place.write_bytes(file.content)
        place.chmod(file.mode)
    for path, (uid, gid) in homes(root).items():
        for place in [root / path[1:], *(root / path[1:]).rglob('*')]:
            if os.path.lexists(str(place)):
                os.chown(str(place), uid, gid, follow_symlinks=False)


def homes(root):
    """The homes of the accounts, as far as they can be on a scratch machine, with the user's and the group's number."""
    accounts = [line.split(':') for line in (root / 'etc/passwd').read_text().splitlines()]
    return {each[5]: (int(each[2]), int(each[3])) for each in accounts if each[5].startswith(('/home/', '/var/lib/'))}


def look(root):
    """The files that are there, by path; of /run, where folders are nobody's concern, without these."""
    found = {}
    for folder in SCRATCH:
        for place in sorted((root / folder).rglob('*')):
            path, state = '/%s' % place.relative_to(root), os.lstat(str(place))
            if stat.S_ISLNK(state.st_mode):
                found[path] = File('link', 0, os.readlink(str(place)).encode())
            elif stat.S_ISDIR(state.st_mode) and folder != 'run':
                found[path] = File('folder', stat.S_IMODE(state.st_mode), b'')
            elif stat.S_ISREG(state.st_mode):
                found[path] = File('file', stat.S_IMODE(state.st_mode), place.read_bytes())
    return found


def wrong_owners(root):
    """What does not belong to the user in whose home it is, or elsewhere to root."""
    owners = homes(root)
    for folder in SCRATCH:
        for place in sorted((root / folder).rglob('*')):
            path, state = '/%s' % place.relative_to(root), os.lstat(str(place))
            wanted = next((ids for home, ids in owners.items() if (path + '/').startswith(home + '/')), (0, 0))
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
    shown = ''.join('    %s\n' % line for line in lines) + ('    %s (and no line feed)\n' % end if end else '')
    return '%s%s %03o\n%s' % (path, '/' * (file.kind == 'folder'), file.mode,
                              shown if len(shown) < 2000 else '    (%d bytes)\n' % len(file.content))


def enter(root, without_network):
    """The words that run a command on the scratch machine; beside it, what is in the folder around root is writable."""
    around = root.parent
    mounts = [(around, around)] + [('/' + kept, root / kept) for kept in KEPT if os.path.exists('/' + kept)]
    mounts += [(root / folder, '/' + folder) for folder in SCRATCH]
    (around / 'fstab').write_text(''.join('%s %s none rbind 0 0\n' % mount for mount in mounts))
    namespaces = ['--mount', '--uts'] + ['--net'] * without_network
    return [shutil.which('unshare')] + namespaces + ['sh', '-c', ENTER, 'sh', str(around / 'fstab'), str(around)]


@functools.lru_cache(maxsize=None)
def impossible():
    """Why no scratch machine can be had here, or nothing."""
    if os.environ.get('LOOPBACK_ONLY') != 'tried':
        return 'no network namespace can be had'
    with tempfile.TemporaryDirectory() as folder:
        put(pathlib.Path(folder, 'root'), {'/etc/passwd': File('file', 0o644, b'')})
        words = enter(pathlib.Path(folder, 'root'), True) + ['test', '-e', '/' + MARK]
        return 'no mount namespace can be had' if subprocess.call(words, stderr=subprocess.DEVNULL) else ''


@functools.lru_cache(maxsize=None)
def new_user():
    """The numbers of a new user and its group, those of root where a user namespace has no others; and the shell."""
    shell = '/bin/bash' if os.access('/bin/bash', os.X_OK) else '/bin/sh'
    with tempfile.NamedTemporaryFile() as file:
        try:
            os.chown(file.name, 1000, 100)
        except OSError:
            return 0, 0, shell
        return 1000, 100, shell


@functools.lru_cache(maxsize=None)
def default_route():
    """Have a default route, by lo, in this network namespace: what /proc says of routes cannot be a scratch file."""
    device = ctypes.create_string_buffer(b'lo')
    anywhere = struct.pack('H14x', socket.AF_INET)
    route = struct.pack('L16s16s16sHhLPhPLLH', 0, anywhere, bytes(16), anywhere, 1, 0, 0, 0, 0,  # 1: RTF_UP
                        ctypes.addressof(device), 0, 0, 0)
    with socket.socket() as control, contextlib.suppress(FileExistsError):
        fcntl.ioctl(control, 0x890B, route)  # SIOCADDRT
