"""Where programs under test run: in namespaces in which nothing of this machine can be changed or
reached.

`enter` moves this process, and so all that it starts, to a network without a link, a hostname of
its own, and mounts that are read-only, but for a new tmpfs for temporary files. Where a machine
refuses that, nothing is run. `start` is the one function that starts a program: with the stubs
first on PATH and base URLs on loopback; if it is given a root, with the folders of that in the
place of the machine's.
"""

import concurrent.futures
import contextlib
import ctypes
import fcntl
import functools
import os
import pathlib
import signal
import socket
import struct
import subprocess
import tempfile

import files
from host import is_loopback, leads_out

STUBS = str(pathlib.Path(__file__).resolve().parent / 'stubs')
MOUNTS, NETWORK, NAME, IPC = 0x00020000, 0x40000000, 0x04000000, 0x08000000  # namespaces
USERS = 0x10000000
READ_ONLY, REMOUNT, BIND, RECURSIVE, PRIVATE = 1, 32, 4096, 16384, 1 << 18
STRICT_TIMES = 1 << 24
UP, REJECT = 1, 0x200  # flags of a route
FLAGS = {1: 1, 2: 2, 4: 4, 8: 8, 1024: 1024, 2048: 2048, 4096: 1 << 21}  # of statvfs -> of mount
WRITABLE = (
    '/dev/shm',
    '/mnt',
    '/tmp',
)  # the first that is there becomes the folder for temporary files
SERVICES = ('/run/dbus', '/run/systemd')  # whose sockets lead to what runs on this machine
HOSTNAME = '/proc/sys/kernel/hostname'
MACHINE_NAME = 'sandbox'  # the hostname in the sandbox
HIDDEN = ('home', 'var/lib')  # of the folders that are replaced, those in which a program may be

entered = []  # the folder for temporary files, once this process is in its namespaces


class Refused(Exception):
    """This machine refuses something, or a program is not to be started; says what, and why."""


def enter():
    """Go on in namespaces; this process may have no other threads."""
    hear_interrupts()
    if entered:
        return
    user, group, here = os.getuid(), os.getgid(), os.getcwd()
    system_call('unshare', 'namespaces', MOUNTS | NETWORK | NAME | IPC | (USERS if user else 0))
    if user:
        write_map('setgroups', 'deny')
        write_map('uid_map', '0 %d 1' % user)
        write_map('gid_map', '0 %d 1' % group)
    for path in set(mounts()):
        mount(None, path, PRIVATE)
    if '/' not in mounts():  # in a chroot: what is no mount cannot be made read-only
        mount('/', '/sys', BIND | RECURSIVE)
        os.chroot('/sys')
        os.chdir(here)
    protect()
    socket.sethostname(MACHINE_NAME)
    lo_up()


def hear_interrupts():
    """Let programs end by SIGINT: a shell has what it starts in the background ignore that."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def system_call(name, what, *arguments):
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        raise Refused('this machine refuses %s: %s' % (what, os.strerror(ctypes.get_errno())))


def mount(source, target, flags, kind=None, options=None):
    words = [each and os.fsencode(each) for each in (source, target, kind)]
    what = 'to mount %s' % target
    system_call('mount', what, *words, ctypes.c_ulong(flags), options and options.encode())


def write_map(name, content):
    try:
        with open('/proc/self/' + name, 'w') as file:
            file.write(content)
    except OSError as error:
        raise Refused('this machine refuses user namespaces: %s' % error) from None


def mounts():
    """The paths of all mounts."""
    with open('/proc/self/mountinfo', 'rb') as file:
        paths = [line.split()[4] for line in file]
    return [
        path.decode('unicode_escape').encode('latin-1').decode('utf-8', 'surrogateescape')
        for path in paths
    ]


def protect():
    """Make all mounts read-only, and mount a folder for temporary files."""
    with contextlib.suppress(Refused):
        mount(HOSTNAME, HOSTNAME, BIND)  # which is that of the namespace
    for path in set(mounts()) - {HOSTNAME}:
        with contextlib.suppress(
            OSError, Refused
        ):  # what is hidden or gone; the rest is seen below
            mount(None, path, REMOUNT | BIND | READ_ONLY | flags_of(path))
    for path in mounts():
        if path != HOSTNAME and is_writable(path):
            raise Refused('this machine refuses to make %s read-only' % path)
    for path in filter(os.path.isdir, SERVICES):
        mount('tmpfs', path, READ_ONLY, 'tmpfs')
    folder = next((path for path in WRITABLE if os.path.isdir(path)), None)
    if not folder:
        raise Refused('there is none of the folders ' + ' '.join(WRITABLE))
    mount('tmpfs', folder, 0, 'tmpfs', 'mode=755')
    os.environ['TMPDIR'] = tempfile.tempdir = folder
    for hidden in HIDDEN:
        os.makedirs(os.path.join(folder, 'outside', hidden))
        if os.path.isdir('/' + hidden):
            mount('/' + hidden, os.path.join(folder, 'outside', hidden), BIND | RECURSIVE)
    entered.append(folder)


def flags_of(path):
    """The flags that a mount has, which may have to stay."""
    found = os.statvfs(path).f_flag
    times = 0 if found & (1024 | 4096) else STRICT_TIMES
    return times | sum(flag for known, flag in FLAGS.items() if found & known)


def is_writable(path):
    try:
        return not os.statvfs(path).f_flag & os.ST_RDONLY
    except OSError:
        return False


def lo_up():
    """Have the loopback interface up, if it is not."""
    with socket.socket() as control:
        flags = fcntl.ioctl(control, 0x8913, struct.pack('16s16x', b'lo'))  # SIOCGIFFLAGS
        up = struct.unpack('16xH', flags[:18])[0] | 1
        fcntl.ioctl(control, 0x8914, struct.pack('16sH14x', b'lo', up))  # SIOCSIFFLAGS


def start(words, urls, environment, root=None, namespaces=0, **options):
    """Start a program: its words, base URLs of the WireServer and IMDS, and its environment but for
    these and the stubs.

    PATH is this process's, where the environment has none. The program has a hostname of its own,
    and with a root mounts of its own; it may have more namespaces. Options are those of
    subprocess.Popen.
    """
    check(urls, environment)
    reach = reachable if root else str
    path = [reach(each) for each in environment.get('PATH', os.environ['PATH']).split(':')]
    names = ('AZURE_PROVISIONING_WIRESERVER', 'AZURE_PROVISIONING_IMDS')
    environment = dict(zip(names, urls), **environment)
    environment['PATH'] = ':'.join([reach(STUBS)] + path)
    if environment.get('MISSING'):
        environment['PATH'] = path_without(environment['MISSING'], environment['PATH'])
    words = [reach(word) if os.path.isfile(word) else word for word in words]
    options.update(env=environment, stdin=subprocess.DEVNULL)
    if root:
        return in_root(root, namespaces, lambda: subprocess.Popen(words, **options))
    return in_namespaces(NAME | namespaces, lambda: subprocess.Popen(words, **options))


def check(urls, environment):
    """Refuse to start a program where it could change or reach something of this machine."""
    if not entered or is_writable('/etc') or is_writable('/'):
        raise Refused('not in the sandbox')
    if not os.access(os.path.join(STUBS, 'hostnamectl'), os.X_OK):
        raise Refused('the stubs are missing')
    named = [environment[name] for name in environment if name.startswith('AZURE_PROVISIONING_')]
    if not all(map(is_loopback, urls)) or any(map(leads_out, named)):
        raise Refused('a base URL that is not on loopback')


@functools.lru_cache(maxsize=None)
def path_without(missing, path):
    """Make a folder with links to all commands of a path but those that are to be missing; return
    it.
    """
    folder = os.path.join(tempfile.mkdtemp(), 'path')
    os.mkdir(folder)
    linked = set(missing.split())
    for each in filter(os.path.isdir, path.split(':')):
        for name in os.listdir(each):
            if name not in linked:
                linked.add(name)
                os.symlink(os.path.join(os.path.abspath(each), name), os.path.join(folder, name))
    return folder


def reachable(path):
    """Where a path of this machine is found while a root is in place."""
    if path.startswith(tuple('/%s/' % hidden for hidden in HIDDEN)):
        return entered[0] + '/outside' + path
    return path


def in_network(action):
    """Act in another network without a link; return what that returns."""

    def act():
        lo_up()
        return action()

    return in_namespaces(NETWORK, act)


def in_namespaces(namespaces, action):
    """Act in new namespaces; return what that returns.

    A thread can have namespaces of its own. To start commands in them for each run would cost more.
    """

    def act():
        system_call('unshare', 'namespaces', namespaces)
        return action()

    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(act).result()


def in_root(root, namespaces, action):
    """Act with the folders of a root in the place of the machine's; return what that returns."""

    def act():
        put_in_place(root)
        return action()

    return in_namespaces(MOUNTS | NAME | namespaces, act)


def put_in_place(root):
    """Mount the folders of a root over those of this machine, in the namespace of this thread."""
    kept = [each for each in files.KEPT if os.path.exists('/' + each)]
    binds = [('/' + each, root + '/' + each) for each in kept]
    binds += [(root + '/' + folder, '/' + folder) for folder in files.REPLACED]
    for source, target in binds:
        mount(source, target, BIND | RECURSIVE)
    if not os.path.exists('/' + files.MARK):
        raise Refused('this machine does not show what was mounted')


@functools.lru_cache(maxsize=None)
def without_roots():
    """Why no root can be put in place here, or nothing; a real try tells."""
    root = os.path.join(tempfile.mkdtemp(), 'root')
    files.put(root, {'/etc/passwd': files.File('file', 0o644, b'')})
    try:
        in_root(root, NETWORK, lambda: subprocess.check_call(['true']))
    except Refused as reason:
        return str(reason)
    return ''


def default_route():
    """Have a default route, by lo: what /proc says of routes cannot be a file of a root.

    Of the others, which lead nowhere, none is the first default route: one of half of all addresses
    stands before it, and a default route with a greater metric behind it.
    """
    add_route(UP, device=b'lo')
    add_route(UP | REJECT, mask=b'\x80\0\0\0')
    add_route(UP | REJECT, metric=9)


def add_route(flags, mask=b'\0\0\0\0', metric=0, device=b''):
    """Add a route to 0.0.0.0 with a mask."""
    name = ctypes.create_string_buffer(device)
    anywhere, mask = (struct.pack('H2x4s8x', socket.AF_INET, each) for each in (bytes(4), mask))
    route = struct.pack(
        'L16s16s16sHhLPhPLLH',
        *(0, anywhere, bytes(16), mask, flags, 0, 0, 0, metric),
        *(ctypes.addressof(name) if device else 0, 0, 0, 0),
    )
    with socket.socket() as control, contextlib.suppress(FileExistsError):
        fcntl.ioctl(control, 0x890B, route)  # SIOCADDRT


def refusal():
    """Enter the sandbox; return why not, or nothing."""
    try:
        enter()
    except Refused as reason:
        return str(reason)
    return ''
