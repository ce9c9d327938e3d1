#!/usr/bin/env python3
"""The files of recipes/: python3 tests/boot/recipes.py [--tree TREE] [--openrc TREE]

Each check runs a recipe's own lines in a tree of Debian, and boots what comes of it: in namespaces,
as boot.py does, or in QEMU, as vm.py, which also has the recipe for BusyBox. A TREE is made where
it is not given, of PACKAGES. Prints a line a check, in TAP, and what was measured as comments. Exit
status: 0 all passed or were skipped, 1. Needs root, apt-get, qemu-system-x86_64, systemd, iproute2,
shellcheck and, without TREE, mmdebstrap.
"""

import argparse
import base64
import contextlib
import ctypes
import functools
import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import tempfile

import kit_path  # noqa: F401  before the modules of the kit
import lib
from host import Azure, network
from lib import HERE, GOOD_RUN, Machine, expect, is_provisioned
from run import PROJECT
from tap import Skipped, measured, tell

PACKAGES = {
    'tree': 'systemd-sysv dbus curl iproute2 openssh-server cloud-init waagent dracut-core '
    'dracut-network nix-bin',
    'openrc': 'openrc iproute2',
    'mkosi': 'mkosi',
    'packer': 'packer',
}
SUITES = {'mkosi': 'trixie'}  # of the trees that are not bookworm
TREES = {}
# A command in an overlay over a tree, as root, in namespaces from which it reaches nothing of this
# machine.
CHROOT = """
cd "$2/root" && mount -t overlay -o "lowerdir=$1,upperdir=$2/upper,workdir=$2/work" none . &&
cd "$2/root" && mount -t proc proc proc && mount -t sysfs -o ro sysfs sys &&
mount -t tmpfs none run && mount --bind "$2/files" mnt &&
exec env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    DEBIAN_FRONTEND=noninteractive \
    chroot . sh -euc 'cd /mnt; eval "$1"' sh "$3"
"""
HOST = '#!/bin/sh\n/busybox/busybox --install -s /busybox\nPATH=/busybox:$PATH /azure-host start\n'
ENDED = """#!/bin/sh
{
    sed 's/^/journal=/' /run/azure-provisioning.log
    echo reported=yes
} >/dev/console
/busybox/poweroff -f
"""
EVALUATE = """nix-instantiate --eval --strict --json --expr '
    let files = name: environment: text: builtins.seq text "/files"; in
    (import ./recipes/nixos/azure-provisioning.nix { pkgs = {
        runCommand = files; curl = "/curl"; hostname = "/hostname";
    }; }).systemd'"""


RECIPES = PROJECT / 'recipes'
CLOUD_INIT_MOUNT = (
    '/dev/disk/cloud/azure_resource-part1 /mnt auto defaults,nofail,'
    'x-systemd.requires=cloud-init.service,_netdev,comment=cloudconfig 0 2\n'
)
BAKE = """[Unit]
After=multi-user.target
SuccessAction=poweroff
FailureAction=poweroff-force
[Service]
Type=oneshot
ExecStart=/bin/sh /bake.sh admin
ExecStartPost=/bin/sh -c 'echo baked=yes'
ExecStopPost=/bin/sh -c 'echo reported=yes'
StandardOutput=append:/dev/console
StandardError=append:/dev/console
TimeoutStartSec=50
[Install]
WantedBy=multi-user.target
"""
APK = """#!/bin/sh
case $1 in
info) printf '%s\\n' alpine-base cloud-init openssh tiny-cloud-azure ;;
*) echo "$@" >>/removed ;;
esac
"""
SLOW_PROGRAM = """#!/bin/sh
echo "steps: $*"
[ "$1" != bad ] || exit 1
[ "$1" != slow ] || exec sh -c 'read -r _ </azure-provisioning-fifo'
"""  # in the place of the program
SERVICE = r"""
mkfifo /azure-provisioning-fifo
rc-update -q del azure-provisioning default
openrc sysinit >/dev/null 2>&1
openrc default >/dev/null 2>&1
service() {
    rc-service azure-provisioning "$1" 2>&1 || echo "exit $?"
}
until_ended() {
    for _ in $(seq 100); do
        [ ! -e /run/azure-provisioning.exit ] || return 0
        usleep 100000
    done
    false
}
service status
service start
service status
service stop
service status
[ "$(cat /run/azure-provisioning.exit)" -gt 128 ] && echo ended
grep steps: /var/log/azure-provisioning.log
echo 'steps=good' >/etc/conf.d/azure-provisioning
service start
until_ended
service status
service stop
echo 'steps=bad' >/etc/conf.d/azure-provisioning
service start
until_ended
service status
"""
SERVICE_SAYS = [
    'status: stopped',
    'exit 3',
    'Starting azure-provisioning ... [ ok ]',
    'status: started',
    'Stopping azure-provisioning ... [ ok ]',
    'status: stopped',
    'exit 3',
    'ended',
    'steps: slow --dry-run',
    'Starting azure-provisioning ... [ ok ]',
    'status: started, and all steps are done',
    'Stopping azure-provisioning ... [ ok ]',
    'Starting azure-provisioning ... [ ok ]',
    'status: failed, see /var/log/azure-provisioning.log',
    'exit 1',
]

CUSTOM_DATA_SCRIPT = """#!/bin/sh
echo "I am $(id -un) in $PWD with $HOME"
journalctl --output=cat -u azure-provisioning | grep -q 'Response: 200' && echo 'Azure was told'
mkdir /custom-data-was-here && echo 'the file system can be written'
"""
CUSTOM_DATA_REPORT = """
unit=azure-custom-data.service
until systemctl show --property=ActiveState azure-provisioning | grep -q '=inactive' &&
    [ "$(systemctl show --property=ExecMainExitTimestampMonotonic $unit)" != \\
        ExecMainExitTimestampMonotonic=0 ]; do
    sleep .1
done
journalctl --sync
journalctl --boot --output=cat _SYSTEMD_UNIT=$unit | sed 's/^/custom=/'
"""
CUSTOM_DATA_RUNS = r"""
data=/var/lib/azure-provisioning/custom-data
mkdir -p /var/lib/azure-provisioning
run() {
    azure-custom-data || echo "exit $?"
}
run
printf 'echo wrong' >$data
run
cat $data
echo
printf '#!/bin/sh\necho script\nexit 7\n' >$data
run
run
printf '#!/bin/sh\r\necho windows\r\n' >$data
run
: >$data
run
"""
CUSTOM_DATA_NONE = 'There is no custom data that is a script'
CUSTOM_DATA_SAYS = [
    CUSTOM_DATA_NONE,
    CUSTOM_DATA_NONE,
    'echo wrong',
    'Running the custom data',
    'script',
    'exit 7',
    CUSTOM_DATA_NONE,
    'Running the custom data',
    'windows',
    CUSTOM_DATA_NONE,
]


class Image(Machine):
    """A tree in which commands are run, with the script and the unit beside them; it boots as any
    other machine.
    """

    def __init__(self, which):
        self.tree = tree(which)
        self.state = pathlib.Path(tempfile.mkdtemp(dir=os.getcwd()))
        self.upper, self.files = self.state / 'upper', self.state / 'files'
        self.units = self.upper / 'etc/systemd/system'
        for folder in self.upper, self.files, self.state / 'root', self.state / 'work':
            folder.mkdir()
        for name in 'azure-provisioning.sh', 'azure-provisioning.service':
            shutil.copy(str(PROJECT / name), str(self.files))

    def install(self, steps=''):
        """Have `make install` install the program and the unit."""
        subprocess.run(
            ['make', '-s', 'install', 'IMPL=sh', 'STEPS=' + steps, 'DESTDIR=%s' % self.upper],
            check=True,
            stdout=subprocess.DEVNULL,
            cwd=str(PROJECT),
        )

    def run(self, commands):
        """Run commands in the image, and return what they print."""
        done = subprocess.run(
            [
                'unshare',
                '--net',
                '--mount',
                '--pid',
                '--fork',
                '--kill-child',
                'sh',
                '-c',
                CHROOT,
                'sh',
                self.tree,
                str(self.state),
                commands,
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            universal_newlines=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def report(self):
        """Have the next boots tell how they went."""
        self.write('etc/hostname', 'image\n')
        self.write('etc/systemd/journald.conf.d/tests.conf', '[Journal]\nStorage=volatile\n')
        self.write('etc/systemd/system/report.service', (HERE / 'image/report.service').read_text())
        shutil.copytree(str(HERE / 'image'), str(self.upper / 'azure-provisioning-tests'))
        self.enable('report')


def debian():
    """Debian, baked in a chroot: without cloud-init and waagent it is provisioned, with SSH host
    keys and a machine-id of its own.
    """
    image = Image('tree')
    keys = prepare_debian(image)
    image.run('sh bake.sh admin')
    is_baked(image, keys)


def debian_vm():
    """Debian, baked while it is up: so it is."""
    image = Image('tree')
    keys = prepare_debian(image)
    image.write('bake.sh', recipe('debian/bake.sh'))
    image.write('etc/systemd/system/bake.service', BAKE)
    generators = image.upper / 'etc/systemd/system-generators'
    generators.mkdir()
    (generators / 'cloud-init-generator').symlink_to('/dev/null')  # it is not to run before
    image.enable('bake')
    report = image.boot()
    assert report['baked'] == ['yes'], report
    (image.units / 'bake.service').unlink()
    (image.units / 'multi-user.target.wants/bake.service').unlink()
    is_baked(image, keys)


def prepare_debian(image):
    """Make an image look like a base VM; return its SSH host keys."""
    image.install()
    image.write('etc/fstab', '/dev/sda1 / ext4 defaults 0 1\n' + CLOUD_INIT_MOUNT)
    shutil.copy(str(RECIPES / 'debian/bake.sh'), str(image.files))
    image.run('useradd --create-home admin; rm -rf /var/lib/apt/lists')
    image.run('mkdir -p /var/lib/azure-provisioning; : >/var/log/old.log')
    image.write('etc/hosts', '127.0.0.1 localhost\n127.0.1.1 base.internal base\n')
    image.write('root/.ssh/authorized_keys', 'command="exit 142" ssh-ed25519 AAAA admin\n', 0o600)
    return host_keys(image)


def is_baked(image, keys):
    """Assert that nothing of the base VM is left, and that the image is provisioned."""
    left = image.run(
        'ls /etc/ssh/ssh_host_* /lib/systemd/system/cloud-* /lib/systemd/system/*agent* '
        '/var/lib/azure-provisioning /home/admin 2>/dev/null || :; '
        'grep admin /etc/passwd || :; cat /etc/machine-id; ls /var/log/old.log 2>/dev/null || :; '
        'ls /root/.ssh/authorized_keys 2>/dev/null || :; cat /etc/hosts /etc/fstab'
    )
    assert left == '127.0.0.1 localhost\n/dev/sda1 / ext4 defaults 0 1\n', left
    image.report()
    with Azure() as host:
        is_provisioned(image.boot(), host.posts())
    own = host_keys(image)
    assert len(own) == len(keys) and not own & keys, own
    assert re.match('[0-9a-f]{32}\n', image.run('cat /etc/machine-id'))


def debian_refuses():
    """bake.sh refuses an image without the program or without curl, and changes nothing."""
    image = Image('tree')
    shutil.copy(str(RECIPES / 'debian/bake.sh'), str(image.files))
    packages = image.run('dpkg-query -W cloud-init waagent')
    said = image.run('sh bake.sh 2>&1 || :')
    assert said == 'bake.sh: install /usr/local/sbin/azure-provisioning first\n', said
    image.install()
    said = image.run('rm -f /usr/bin/curl /usr/bin/wget; sh bake.sh 2>&1 || :')
    assert said == 'bake.sh: install curl first\n', said
    assert image.run('dpkg-query -W cloud-init waagent') == packages
    assert host_keys(image)


def host_keys(image):
    return {line.split()[1] for line in image.run('cat /etc/ssh/ssh_host_*_key.pub').splitlines()}


def alpine():
    """OpenRC and BusyBox: with its shell and its wget, Ready is reported, the hostname set, the
    service removed.
    """
    image = openrc_image()
    image.report()
    with Azure() as host:
        report = image.boot()
        assert len(host.posts()) == 1, host.requests
    expect(report, {'enabled': '0', 'kernel-hostname': 'web-1', 'static-hostname': 'web-1'})
    assert [line for line in report['journal'] if line in GOOD_RUN] == GOOD_RUN, report
    assert '/var/log/old.log' not in image.run('ls /var/log/*')


def openrc_service():
    """The service for OpenRC takes its steps from conf.d, stops, and says how it is."""
    image = openrc_image()
    image.write('etc/conf.d/azure-provisioning', 'steps="slow --dry-run"\n')
    image.write('usr/local/sbin/azure-provisioning', SLOW_PROGRAM, 0o755)
    said = image.run(SERVICE)
    lines = re.sub(r'\x1b\[[^m]*m| \* ', '', said).splitlines()
    lines = [line for line in lines if 'Caching' not in line]  # it does so now and then
    assert lines == SERVICE_SAYS, said


def openrc_image():
    """An image with OpenRC, where the shell and the commands are BusyBox's, baked."""
    image = Image('openrc')
    for own in 'etc/init.d', 'etc/runlevels':  # in the place of Debian's
        (image.upper / own).mkdir(parents=True)
        os.setxattr(str(image.upper / own), 'trusted.overlay.opaque', b'y')
    shutil.copy(str(busybox()), str(image.files))
    image.run(
        'cp busybox /usr/local/bin && rm -f /usr/bin/curl && '
        'ln -sf /usr/local/bin/busybox /bin/sh && '
        '/bin/sh -c "/usr/local/bin/busybox --install -s /usr/local/bin" &&'
        'mkdir -p /etc/network /etc/runlevels/sysinit /etc/runlevels/boot /etc/runlevels/default'
    )
    image.write('usr/local/bin/apk', APK, 0o755)
    image.write('etc/init.d/networking', '#!/sbin/openrc-run\nstart() { :; }\n', 0o755)
    image.write('usr/local/bin/deluser', '#!/bin/sh\necho "$*" >>/removed\n', 0o755)
    image.write('root/.ssh/authorized_keys', 'ssh-ed25519 AAAA builder\n', 0o600)
    image.run('echo builder:x:1000:1000::/home/builder:/bin/sh >>/etc/passwd; : >/etc/shadow-')
    image.write('etc/dropbear/dropbear_ed25519_host_key', 'of the base VM')
    image.write('var/log/old.log', '')
    shutil.copy(str(RECIPES / 'openrc/bake.sh'), str(image.files))
    shutil.copy(str(RECIPES / 'openrc/azure-provisioning'), str(image.files))
    said = image.run('sh bake.sh 2>&1 || :')
    assert 'install /usr/local/sbin/azure-provisioning first' in said, said
    image.run(
        'install -D -m 755 azure-provisioning.sh /usr/local/sbin/azure-provisioning; '
        'install -m 755 azure-provisioning /etc/init.d; sh bake.sh builder'
    )
    removed = 'del cloud-init tiny-cloud-azure\n--remove-home builder\n'
    assert image.run('cat /removed') == removed
    left = image.run('ls /root/.ssh/authorized_keys /etc/dropbear/* /etc/*- 2>/dev/null || :')
    assert left == '', left
    interfaces = image.run('cat /etc/network/interfaces')
    # ifupdown-ng, which is Alpine's, reads one name after each auto.
    assert re.findall('(?m)^auto (.*)$', interfaces) == ['lo', 'eth0'], interfaces
    image.run('! command -v curl')
    return image


def dracut():
    """dracut: its initramfs reports Ready, before a root that never comes."""
    image = Image('tree')
    module = '95azure-provisioning'
    shutil.copytree(
        str(RECIPES / 'dracut' / module), str(image.upper / 'usr/lib/dracut/modules.d' / module)
    )
    image.run('install -m 755 azure-provisioning.sh /usr/local/sbin/azure-provisioning')
    include = image.files / 'include'
    hooks = include / 'lib/dracut/hooks'
    for path, text in (('pre-trigger/10-host.sh', HOST), ('initqueue/finished/90-ended.sh', ENDED)):
        (hooks / path).parent.mkdir(parents=True)
        (hooks / path).write_text(text)
        (hooks / path).chmod(0o755)
    (include / 'busybox').mkdir()
    shutil.copy(str(busybox()), str(include / 'busybox'))
    shutil.copy(str(HERE / 'busybox/azure-host'), str(include))
    shutil.copytree(str(lib.busybox_tree() / 'answers'), str(include / 'answers'))
    image.run('dracut --force --no-hostonly --no-kernel --include include / initramfs none')
    measured(
        'an initramfs of %d MiB, without kernel modules',
        (image.files / 'initramfs').stat().st_size >> 20,
    )
    report = lib.boot_guest('root=LABEL=none', '-initrd', str(image.files / 'initramfs'))
    assert report['posted'] == lib.POSTED and report['request'] == lib.REQUESTS[:2], report
    assert report['journal'] == GOOD_RUN[: GOOD_RUN.index('Response: 200') + 1], report


def nixos():
    """NixOS: the module evaluates; its unit provisions where hostnamectl is refused, and remembers
    the VM.
    """
    image = Image('tree')
    shutil.copytree(str(RECIPES / 'nixos'), str(image.files / 'recipes/nixos'))
    systemd = json.loads(image.run(EVALUATE))
    service = systemd['services']['azure-provisioning']
    assert systemd['packages'] == ['/files'] and service['path'] == ['/curl', '/hostname'], systemd
    guest = debian_guest()  # a Debian has to do, with what NixOS makes of the module
    guest.write('usr/local/sbin/hostnamectl', '#!/bin/sh\nexit 1\n', 0o755)
    guest.write(
        'files/bin/azure-provisioning', (PROJECT / 'azure-provisioning.sh').read_text(), 0o755
    )
    guest.write(
        'etc/systemd/system/azure-provisioning.service.d/overrides.conf',
        '[Service]\n'
        + ''.join(
            '%s=%s\n' % (name, each)
            for name, value in service['serviceConfig'].items()
            for each in (value if isinstance(value, list) else [value])
        ),
    )
    report = guest.boot()
    lib.was_asked(report)
    expect(report, {'enabled': 'enabled', 'kernel-hostname': 'web-1', 'static-hostname': 'web-1'})
    assert report['journal'] == GOOD_RUN[:-1] + ['Remembered: ' + lib.VM_ID], report
    report = guest.boot()
    assert report['journal'] == ['Already provisioned: ' + lib.VM_ID] and 'request' not in report, (
        report
    )


def mkosi():
    """mkosi reads its configuration, and finds what it is to copy."""
    image = Image('mkosi')
    shutil.copytree(str(RECIPES / 'mkosi'), str(image.files / 'recipes/mkosi'))
    summary = image.run('mkosi --directory recipes/mkosi summary')
    for words in (
        'Distribution: debian',
        'Release: trixie',
        'systemd-resolved',
        '/mnt/recipes/mkosi/mkosi.postinst.chroot',
    ):
        assert words in summary, summary
    for line in recipe('mkosi/mkosi.conf').splitlines():
        if ':/' in line:
            source, _, target = line.split()[-1].replace('ExtraTrees=', '').partition(':')
            source = (image.files / 'recipes/mkosi' / source).resolve()
            assert source.is_file(), source
            assert '/mnt/%s:%s' % (source.relative_to(image.files.resolve()), target) in summary, (
                summary
            )


def packer():
    """Packer finds its template valid, but for the first block, which is newer than Debian's."""
    image = Image('packer')
    shutil.copytree(str(RECIPES / 'packer'), str(image.files / 'recipes/packer'))
    shutil.copytree(str(RECIPES / 'debian'), str(image.files / 'recipes/debian'))
    template, blocks = re.subn(r'(?ms)^packer \{.*?^\}', '', recipe('packer/debian.pkr.hcl'))
    assert blocks == 1
    (image.files / 'recipes/packer/debian.pkr.hcl').write_text(template)
    image.run('tar -cf recipes/packer/azure-provisioning.tar azure-provisioning.sh')
    image.run('cd recipes/packer; HOME=/tmp packer validate debian.pkr.hcl')
    (image.files / 'recipes/debian/bake.sh').unlink()
    image.run('cd recipes/packer; ! HOME=/tmp packer validate debian.pkr.hcl')


def custom_data():
    """Custom data on a DVD that begins with #! runs once, as root, after Ready, without a sandbox;
    its output is in the journal.
    """
    guest = debian_guest('data hostname ready remember')
    guest.add_modules('drivers/ata', 'drivers/scsi', 'drivers/cdrom', 'lib', 'fs/nls', 'fs/isofs')
    guest.write('etc/modules-load.d/dvd.conf', 'ata_piix\n')
    install_custom_data(guest)
    guest.write(
        'etc/systemd/system/report.service.d/custom-data.conf',
        '[Service]\nExecStartPre=/bin/sh /azure-provisioning-tests/custom-data\n',
    )
    guest.write('azure-provisioning-tests/custom-data', CUSTOM_DATA_REPORT)
    drive = dvd(CUSTOM_DATA_SCRIPT)
    report = guest.boot(*drive)
    assert report['posted'] == lib.POSTED, report
    assert report['custom'] == [
        'Running the custom data',
        'I am root in / with /root',
        'Azure was told',
        'the file system can be written',
    ], report
    report = guest.boot(*drive)  # a reboot
    assert report['journal'] == ['Already provisioned: ' + lib.VM_ID], report
    assert report['custom'] == ['There is no custom data that is a script'], report


def custom_data_program():
    """What is no script is left alone; a script does not run twice, fails as it fails, and may have
    the line ends of Windows.
    """
    image = Image('tree')
    install_custom_data(image)
    assert image.run(CUSTOM_DATA_RUNS).splitlines() == CUSTOM_DATA_SAYS


def debian_guest(steps=''):
    """A Debian to boot in QEMU, which may be slow on a busy machine."""
    guest = lib.Guest('sh', tree('tree'), steps)
    guest.write('etc/systemd/system/report.service.d/slow.conf', '[Service]\nTimeoutStartSec=250\n')
    return guest


def install_custom_data(machine):
    for name, path, mode in (
        ('azure-custom-data', 'usr/local/sbin/azure-custom-data', 0o755),
        ('azure-custom-data.service', 'etc/systemd/system/azure-custom-data.service', 0o644),
        (
            'custom-data.conf',
            'etc/systemd/system/azure-provisioning.service.d/custom-data.conf',
            0o644,
        ),
    ):
        machine.write(path, recipe('custom-data/' + name), mode)


def dvd(script):
    """The options for QEMU of a DVD with custom data."""
    folder = pathlib.Path(tempfile.mkdtemp(dir=os.getcwd()))
    encoded = base64.b64encode(script.encode()).decode()
    text = re.sub(
        '(<ns1:CustomData>).*(</ns1:CustomData>)',
        lambda match: match.group(1) + encoded + match.group(2),
        lib.ovf('true'),
    )
    assert encoded in text
    (folder / 'dvd').mkdir()
    (folder / 'dvd/ovf-env.xml').write_text(text)
    lib.have('genisoimage', '-R', '-o', folder / 'dvd.iso', folder / 'dvd')
    drive = 'if=none,id=dvd,media=cdrom,format=raw,readonly=on,file=%s' % (folder / 'dvd.iso')
    devices = ['-device', 'piix3-ide,id=ide', '-device', 'ide-cd,bus=ide.0,drive=dvd']
    return [*devices, '-drive', drive]


def shell():
    """The shell of the files that have no shebang of a shell is clean, too."""
    for name in 'openrc/azure-provisioning', 'mkosi/mkosi.postinst.chroot':
        clean = have_clean(str(RECIPES / name))
        assert clean == '', clean


def have_clean(path):
    """What shellcheck and shfmt say of a file; the variables of OpenRC are used by others."""
    if not shutil.which('shellcheck'):
        raise Skipped('no shellcheck')
    commands = [['shellcheck', '--shell=sh', '--exclude=SC2034', path]]
    commands += [['shfmt', '-i', '4', '-ln', 'posix', '-d', path]] * bool(shutil.which('shfmt'))
    said = ''
    for command in commands:
        said += subprocess.run(command, stdout=subprocess.PIPE, universal_newlines=True).stdout
    return said


def recipe(name):
    """The text of a file in recipes/."""
    return (RECIPES / name).read_text()


def busybox():
    return lib.busybox_tree() / 'bin/busybox'


def tree(which):
    """A tree of Debian, given or made."""
    if which and not TREES.get(which):
        folder = os.path.abspath(which)
        lib.have(HERE / 'tree', SUITES.get(which, 'bookworm'), folder, *PACKAGES[which].split())
        TREES[which] = folder
    return TREES.get(which)


def leave_network():
    """Go on in a network namespace without a link: the checks have Azure's addresses on its lo."""
    assert ctypes.CDLL(None).unshare(0x40000000) == 0, 'no network namespace'  # CLONE_NEWNET
    assert {name for _, name in socket.if_nameindex()} == {'lo'}, 'a network with a link'


def hold(check):
    """Hold a recipe against a check, with Azure's addresses there."""
    if os.getuid() != 0:
        raise Skipped('not root')
    lib.have(lib.QEMU[0], '--version')
    network('del')
    network('add')
    check()


CHECKS = {  # and the tree of each
    debian: 'tree',
    debian_vm: 'tree',
    debian_refuses: 'tree',
    alpine: 'openrc',
    openrc_service: 'openrc',
    dracut: 'tree',
    nixos: 'tree',
    mkosi: 'mkosi',
    packer: 'packer',
    custom_data: 'tree',
    custom_data_program: 'tree',
    shell: '',
}


GUESTS = {dracut, nixos, custom_data}  # those in QEMU


def fetch(trees, needed):
    """Fetch what the checks need, while there is a network."""
    for each in [*needed, *[functools.partial(tree, which) for which in sorted(set(trees))]]:
        with contextlib.suppress(Skipped):  # whoever needs it asks again, and is skipped
            each()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for which in PACKAGES:
        parser.add_argument('--' + which, type=os.path.abspath)
    parser.add_argument('--only', metavar='CHECK', help='the check of this name')
    options = lib.parse(parser)
    TREES.update({which: getattr(options, which) for which in PACKAGES})
    checks = [each for each in CHECKS if options.only in (None, each.__name__)]
    print('1..%d' % len(checks), flush=True)
    with lib.in_own_folder():
        if os.getuid() == 0:
            kernel = [lib.kernel] * bool(GUESTS & set(checks))
            fetch((CHECKS[each] for each in checks), [*kernel, busybox])
            leave_network()
        passed = [tell(check.__doc__, hold, check) for check in checks]
    sys.exit(0 if all(passed) else 1)


if __name__ == '__main__':
    main()
