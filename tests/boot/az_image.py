#!/usr/bin/env python3
"""recipes/az-image/az-image.sh with stubs of az and ssh: python3 tests/boot/az_image.py

Compares each command and its arguments with what is expected, and looks at what is cleaned up after
a failure of each command. Nothing leaves this machine. Prints a line a check, in TAP. Exit status:
0 all passed or were skipped, 1. Needs make and tar.
"""

import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile

import kit_path  # noqa: F401  before the modules of the kit
from run import PROJECT
from tap import Skipped, tell

SCRIPT = PROJECT / 'recipes/az-image/az-image.sh'
BAKE = PROJECT / 'recipes/debian/bake.sh'
STUB = r"""#!/bin/sh
name=${0##*/}
if [ "$name" = ssh-keygen ]; then
    for file; do :; done # the last argument
    : >"$file"
    : >"$file.pub"
    exit
fi
arguments="$name $*"
printf '%s\n' "$arguments" >>"$FOLDER/calls"
number=$(wc -l <"$FOLDER/calls")
if [ "$name" = ssh ]; then
    cat >"$FOLDER/stdin-$number"
fi
if [ "$number" -eq "${KILL_AT:-0}" ]; then
    kill -TERM "$(cat "$FOLDER/pid")"
fi
if [ "$number" -eq "${FAIL_AT:-0}" ]; then
    exit 1
fi
case $arguments in
${FAIL:-nothing}) exit 1 ;;
*"group exists"*) echo "${GROUP_EXISTS:-false}" ;;
*"image list"*) printf '%s\n' other "$IMAGES" ;;
*"group show"*) echo northeurope ;;
*"disk show"*) echo V2 ;;
*managedDisk.id*) echo /the-disk ;;
*"vm show"*"--query id "*) echo /the-vm ;;
*"image show"*) echo /the-image ;;
*"--name base "*publicIps*) echo 192.0.2.1 ;;
*publicIps*) echo 192.0.2.2 ;;
*'uname -n') echo "${HOSTNAME_OF_VM:-image-test}" ;;
esac
"""
SSH = (
    'ssh -i FOLDER/key -o IdentitiesOnly=yes -o BatchMode=yes -o ConnectTimeout=10 '
    '-o StrictHostKeyChecking=accept-new -o UserKnownHostsFile=FOLDER/known_hosts '
)
ON_BASE = SSH + 'baker@192.0.2.1 '
ON_TEST = SSH + 'tester@192.0.2.2 '
PREPARED = [
    'az group show --name images --query location --output tsv',
    'az group exists --name GROUP',
    'az image list --resource-group images --query [].name --output tsv',
]
MADE = [
    'az group create --name GROUP --location northeurope --output none',
    'az vm create --resource-group GROUP --name base --image Debian:debian-12:12-gen2:latest '
    '--size Standard_B2s --security-type Standard --admin-username baker '
    '--ssh-key-values FOLDER/key.pub --output none',
    'az vm show --resource-group GROUP --name base --show-details --query publicIps --output tsv',
    ON_BASE + 'true',
    ON_BASE + 'sudo tar -C / -x --no-same-owner --no-overwrite-dir',
    ON_BASE + 'sudo AZURE_PROVISIONING_ATTEMPTS=1 /usr/local/sbin/azure-provisioning --dry-run '
    'user hostname ready remember ',
    ON_BASE + 'sudo sh -s baker',
    'az vm deallocate --resource-group GROUP --name base --output none',
    'az vm generalize --resource-group GROUP --name base --output none',
    'az vm show --resource-group GROUP --name base --query id --output tsv',
    'az vm show --resource-group GROUP --name base --query storageProfile.osDisk.managedDisk.id '
    '--output tsv',
    'az disk show --ids /the-disk --query hyperVGeneration --output tsv',
]
IMAGE_MADE = [
    'az image create --resource-group images --name new --source /the-vm --location northeurope '
    '--os-type Linux --hyper-v-generation V2 --output none',
    'az image show --resource-group images --name new --query id --output tsv',
    'az vm create --resource-group GROUP --name image-test --image /the-image --size Standard_B2s '
    '--security-type Standard --enable-agent false --admin-username tester '
    '--ssh-key-values FOLDER/key.pub --output none',
    'az vm show --resource-group GROUP --name image-test --show-details --query publicIps '
    '--output tsv',
    ON_TEST + 'true',
    ON_TEST + 'sudo -n journalctl --no-pager --output=cat -u azure-provisioning',
    ON_TEST + 'uname -n',
]
ALL = PREPARED + MADE + IMAGE_MADE
DELETE_IMAGE = 'az image delete --resource-group images --name new'
DELETE_GROUP = 'az group delete --name GROUP --yes --no-wait'


class Run:
    """A run of the script with the stubs: its exit status, its calls, and what it printed."""

    def __init__(self, *arguments, shell='sh', **environment):
        with tempfile.TemporaryDirectory() as name:
            self.folder = pathlib.Path(name)
            for stub in 'az', 'ssh', 'ssh-keygen', 'sleep':
                (self.folder / stub).write_text(STUB)
                (self.folder / stub).chmod(0o755)
            temporary = self.folder / 'tmp'
            temporary.mkdir()
            done = subprocess.run(
                ['sh', '-c', 'echo $$ >"$FOLDER/pid"; exec "$@"', 'sh']
                + [*shell.split(), str(SCRIPT), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                universal_newlines=True,
                timeout=120,
                env=dict(
                    environment,
                    FOLDER=name,
                    TMPDIR=str(temporary),
                    PATH='%s:%s' % (name, os.environ['PATH']),
                    IMAGES=environment.get('IMAGES', ''),
                ),
            )
            self.status, self.said = done.returncode, done.stdout
            self.left = [path.name for path in temporary.iterdir()]
            self.calls = self.read_calls(temporary)
            self.sent = [self.read_stdin(number) for number in range(1, len(self.calls) + 1)]

    def read_calls(self, temporary):
        path = self.folder / 'calls'
        text = path.read_text() if path.exists() else ''
        text = re.sub(re.escape(str(temporary)) + r'/[^/ ]+', 'FOLDER', text)
        return re.sub(r'\bnew-[0-9]{14}\b', 'GROUP', text).splitlines()

    def read_stdin(self, number):
        path = self.folder / ('stdin-%d' % number)
        return path.read_bytes() if path.exists() else b''

    def expect(self, status, calls):
        assert self.calls == calls, '\n'.join(self.calls) + '\n' + self.said
        assert self.status == status, self.said


def makes_an_image():
    """Each command and its arguments are as expected, in each shell; nothing temporary is left."""
    shells = [each for each in ('sh', 'bash', 'busybox sh') if shutil.which(each.split()[0])]
    for shell in shells:
        run = Run('new', shell=shell)
        run.expect(0, ALL + [DELETE_GROUP])
        assert run.left == [], run.left
        assert 'The image is ready: /the-image' in run.said, run.said


def sends_files():
    """The base VM gets what `make install` installs for the steps, and then bake.sh."""
    run = Run('-i', 'py', 'new', 'password', 'ready', 'remember')
    assert run.status == 0, run.said
    sent = dict(zip(run.calls, run.sent))
    assert sent[ON_BASE + 'sudo sh -s baker'] == BAKE.read_bytes()
    with tempfile.TemporaryFile() as file:
        file.write(sent[ON_BASE + 'sudo tar -C / -x --no-same-owner --no-overwrite-dir'])
        file.seek(0)
        with tarfile.open(fileobj=file) as tar:
            program = tar.extractfile('./usr/local/sbin/azure-provisioning').read()
            steps = tar.extractfile(
                './etc/systemd/system/azure-provisioning.service.d/steps.conf'
            ).read()
            names = tar.getnames()
    assert program == (PROJECT / 'azure-provisioning.py').read_bytes()
    assert b'azure-provisioning password ready remember\n' in steps, steps
    assert './etc/systemd/system/azure-provisioning.service' in names, names
    assert './etc/systemd/system/azure-provisioning.service.d/password.conf' in names, names
    dry_run = [call for call in run.calls if '--dry-run' in call]
    assert dry_run[0].endswith('--dry-run ready remember '), dry_run


def without_user():
    """Without the step user, the VM has to become Ready, and nobody tries to log in."""
    run = Run('-b', 'x:y:z:1', '-l', 'here', '-s', 'Large', '-g', 'my', 'new', 'hostname', 'ready')
    assert run.status == 0, run.said
    assert not [call for call in run.calls if 'tester@' in call], run.calls
    made = [call for call in run.calls if 'vm create' in call]
    assert len(made) == 2 and all('--size Large ' in call for call in made), made
    assert '--image x:y:z:1 ' in made[0], made
    assert 'az group create --name GROUP --location here --output none' in run.calls, run.calls
    assert [call for call in run.calls if 'image create --resource-group my ' in call], run.calls


def cleans_up():
    """Whichever command fails: what was made is deleted, and nothing else; the status is 1."""
    for at in range(1, len(ALL) + 1):
        if ALL[at - 1].endswith(' true'):
            continue  # is tried again
        run = Run('new', FAIL_AT=str(at))
        run.expect(1, ALL[:at] + deleted_after(at))
        assert run.left == [], run.left


def deleted_after(at):
    """What has to be deleted if the script ends with this call."""
    deleted = [DELETE_IMAGE] if at > len(PREPARED + MADE) else []
    return deleted + ([DELETE_GROUP] if at > len(PREPARED) else [])


def is_ended():
    """Whenever it is ended by a signal: the same."""
    for at in range(1, len(ALL) + 1):
        run = Run('new', KILL_AT=str(at))
        run.expect(1, ALL[:at] + deleted_after(at))
        assert run.left == [], run.left


def waits_for_ssh():
    """A login is tried for five minutes, then it fails; a failure before it is none."""
    at = ALL.index(ON_BASE + 'true') + 1
    run = Run('new', FAIL_AT=str(at))
    run.expect(0, ALL[:at] + ['sleep 10'] + ALL[at - 1 :] + [DELETE_GROUP])
    run = Run('new', FAIL='*baker@*true')
    tries = [ALL[at - 1], 'sleep 10'] * 29 + [ALL[at - 1]]
    run.expect(1, ALL[: at - 1] + tries + [DELETE_GROUP])
    assert 'baker cannot log in' in run.said, run.said


def wrong_hostname():
    """A VM with another hostname fails, and the image is deleted."""
    run = Run('new', HOSTNAME_OF_VM='base')
    run.expect(1, ALL + [DELETE_IMAGE, DELETE_GROUP])
    assert 'the hostname is base' in run.said, run.said


def keeps():
    """With -k, a failure deletes nothing and says what is left; a success cleans up."""
    run = Run('-k', 'new', HOSTNAME_OF_VM='base')
    run.expect(1, ALL)
    assert 'Kept: the resource group new-' in run.said and len(run.left) == 1, run.said
    Run('-k', 'new').expect(0, ALL + [DELETE_GROUP])


def spares_what_is_there():
    """An image or a group that is there is not touched; a wrong command line asks nothing."""
    Run('new', IMAGES='New').expect(1, PREPARED)
    Run('new', GROUP_EXISTS='true').expect(1, PREPARED[:2])
    for arguments in ['new', 'no-such-step'], ['-i', 'perl', 'new'], ['-new'], ['*']:
        run = Run(*arguments)
        assert run.status and run.calls == [], run.calls
    for arguments, status in ([], 2), (['-x', 'new'], 2), (['-h'], 0):
        run = Run(*arguments)
        run.expect(status, [])
        assert run.said.count('usage: az-image.sh') == 1, run.said


def names_what_is_left():
    """What cannot be deleted is named."""
    run = Run('new', FAIL='*delete*', HOSTNAME_OF_VM='base')
    run.expect(1, ALL + [DELETE_IMAGE, DELETE_GROUP])
    assert 'DELETE IT YOURSELF: the image new in images' in run.said, run.said
    assert 'DELETE IT YOURSELF: the resource group new-' in run.said, run.said


def hold(check):
    for command in 'make', 'tar':
        if not shutil.which(command):
            raise Skipped('no ' + command)
    check()


def main():
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # it is inherited
    checks = [
        makes_an_image,
        sends_files,
        without_user,
        cleans_up,
        is_ended,
        waits_for_ssh,
        wrong_hostname,
        keeps,
        spares_what_is_there,
        names_what_is_left,
    ]
    print('1..%d' % len(checks), flush=True)
    passed = [tell(check.__doc__, hold, check) for check in checks]
    sys.exit(0 if all(passed) else 1)


if __name__ == '__main__':
    main()
