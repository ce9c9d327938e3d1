"""A run of all steps, for the checks of faults: what it finds, how it is started, what it leaves.

Its stubs are those of the kit, with fault-stub before them: it can kill the run at each command.
"""

import collections
import contextlib
import os
import pathlib
import shutil
import signal
import stat
import subprocess
import tempfile

import kit_path  # noqa: F401  before the modules of the kit
import cases
import files
import sandbox
from host import Answer, good
from run import command_line

STEPS = 'user password data hostname publish ready disable remember'
USER = 'azureuser'
VM_ID = '1d6a3c8e-0f2b-4c57-9a61-8be0c47d2f93'
STATE = '/var/lib/azure-provisioning'
UNIT_LINK = '/etc/systemd/system/multi-user.target.wants/azure-provisioning.service'
FAULT_STUB = pathlib.Path(__file__).resolve().parent / 'fault-stub'
LIMIT = 60  # seconds for one run

# What an image has: also files of an earlier VM, which are to be replaced.
IMAGE = """
/dev/sr0 660 < ovf-env.xml
/etc/hostname 644
    image
/etc/ssh/sshd_config 644
    # This file is the image's.
    Include /etc/ssh/sshd_config.d/*.conf
    PasswordAuthentication no
    UsePAM yes
{unit-link} -> /etc/systemd/system/azure-provisioning.service
{state}/ 700
{state}/user-data 600
    of an earlier VM
{state}/custom-data 600
    of an earlier VM
{state}/vm-id 600
    00000000-0000-0000-0000-000000000000
"""
# What an image has in which there is a user, and doas in place of sudo.
IMAGE_WITH_USER = """
/etc/passwd 644
    root:x:0:0:root:/root:/bin/sh
    {user}:x:{uid}:{gid}::/home/{user}:{shell}
/etc/shadow 640
    root:*:20000:0:99999:7:::
    {user}:!:20000:0:99999:7:::
/etc/doas.conf 440
    permit persist :wheel
/home/{user}/ 755
/home/{user}/.ssh/ 700
/home/{user}/.ssh/authorized_keys 600
    {second}
"""
# A program prepends the folder of the stubs to PATH, as sandbox.start puts those of the kit first.
WITH_STUBS = 'export NEXT_PATH="$PATH" PATH="$0:$PATH"; exec "$@"'

Outcome = collections.namedtuple('Outcome', 'status stdout stderr')
Entry = collections.namedtuple('Entry', 'file uid gid')  # of a root file system


def ovf(password='S3cr3t'):
    """The ovf-env.xml of a DVD, with a password or without."""
    empty = '<wa:UserPassword/>'
    document = (cases.CASES / 'data/ovf-env.xml').read_text()
    assert document.count(empty) == 1
    return document.replace(empty, '<wa:UserPassword>%s</wa:UserPassword>' % password).encode()


def image(*lines, document=None):
    """The files of an image: those above, and those that lines name."""
    common = cases.Common(cases.CASES)
    uid, gid, shell = files.new_user()
    values = {'unit-link': UNIT_LINK, 'state': STATE, 'user': USER}
    values.update(common.values, uid=str(uid), gid=str(gid), shell=shell)
    text = common.before + IMAGE + ''.join(lines)
    return files.changed({}, files.read(text, values, lambda name: document or ovf()))


def answers(**others):
    """What Azure answers to all steps, but for the others."""
    key = cases.Common(cases.CASES).values['ed25519'] + ' me@laptop'
    bodies = {
        'adminUsername': USER,
        'publicKeys': '0/',
        'keyData': key,
        'userData': 'dXNlciBkYXRhCg==',
        'disablePasswordAuthentication': 'false',
    }
    found = {name: [Answer('body', body.encode())] for name, body in bodies.items()}
    return good(**dict(found, **others))


class Machine:
    """A machine of a first boot: a root file system of its own, in a folder that goes with it.

    stubs: the commands that fault-stub stands before; all, if none are named.
    """

    def __init__(self, image_files, stubs=None):
        self.folder = tempfile.mkdtemp()
        self.root = os.path.join(self.folder, 'root')
        files.put(self.root, image_files)
        files.write(os.path.join(self.folder, 'commands'), b'')
        self.stubs = link_stubs(os.path.join(self.folder, 'stubs'), stubs or commands())
        self.runs = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        shutil.rmtree(self.folder)

    def start(self, program, host, steps=STEPS, tracer=(), before=(), **others):
        """Start a run, in a process group of its own.

        tracer: words before the program. before: words before the stubs and the tracer.
        others: settings, and options of subprocess.Popen in lower case.
        """
        self.runs += 1
        calls = self.calls()
        os.mkdir(calls)
        settings = {name: value for name, value in others.items() if name.isupper()}
        options = {name: value for name, value in others.items() if name.islower()}
        uid, gid, _ = files.new_user()
        environment = {
            'PATH': os.environ['PATH'],
            'HOME': self.folder,
            'TMPDIR': self.folder,
            'COMMANDS': os.path.join(self.folder, 'commands'),
            'CALLS': calls,
            'UNIT_LINK': UNIT_LINK,
            'FAILING': 'hostnamectl',
            'NEW_UID': str(uid),
            'NEW_GID': str(gid),
            'AZURE_PROVISIONING_ATTEMPTS': '3',
            'AZURE_PROVISIONING_INTERVAL': '0',
            'AZURE_PROVISIONING_TIMEOUT': '20',
        }
        words = [*before, 'sh', '-c', WITH_STUBS, self.stubs, *tracer, *command_line(program)]
        return sandbox.start(
            words + steps.split(),
            (host.wireserver, host.imds),
            dict(environment, **settings),
            self.root,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            universal_newlines=True,
            start_new_session=True,
            **options,
        )

    def run(self, program, host, *arguments, **others):
        """Run a program to its end; return its outcome."""
        return end(self.start(program, host, *arguments, **others))

    def calls(self):
        """The folder with a file for each call of a command in the last run."""
        return os.path.join(self.folder, 'calls-%d' % self.runs)

    def state(self):
        """All files, but for folders in /run, by path."""
        return {
            path: entry
            for path, entry in entries(self.root, files.REPLACED).items()
            if not (path.startswith('/run/') and entry.file.kind == 'folder')
        }


def commands():
    """The names of all commands on PATH, and of those that the kit has stubs for."""
    found = set(os.listdir(sandbox.STUBS))
    for folder in filter(os.path.isdir, os.environ['PATH'].split(':')):
        found.update(os.listdir(folder))
    return found


def link_stubs(folder, names):
    """Fill a folder with links to fault-stub; return it."""
    os.mkdir(folder)
    for name in names:
        os.symlink(sandbox.reachable(str(FAULT_STUB)), os.path.join(folder, name))
    return folder


def end(process):
    """Wait for a run, and kill it if it takes too long; return its outcome."""
    try:
        stdout, stderr = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        kill_group(process)
        stdout, stderr = process.communicate()
        stderr += 'still running after %d seconds' % LIMIT
    return Outcome(process.returncode, stdout, stderr)


def kill_group(process):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def entries(root, folders):
    """All that is in folders of a root file system, by path."""
    found = {}
    for folder in folders:
        for path, status in files.walk(root, '/' + folder):
            file = files.file_of(root, path, status)
            kind = stat.S_IFMT(status.st_mode)
            file = file or files.File('special', kind, b'')
            found[path] = Entry(file, status.st_uid, status.st_gid)
    return found


def show(path, entry):
    """An entry in lines."""
    if entry is None:
        return path + ' gone\n'
    return '%s, of %d:%d\n' % (files.show(path, entry.file).rstrip('\n'), entry.uid, entry.gid)


def differences(wanted, got):
    """Lines that show the paths that differ."""
    return ''.join(
        'expected %sgot      %s' % (show(path, wanted.get(path)), show(path, got.get(path)))
        for path in sorted(set(wanted) | set(got))
        if wanted.get(path) != got.get(path)
    )
