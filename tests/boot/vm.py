#!/usr/bin/env python3
"""First boots of a real kernel, in QEMU: python3 tests/boot/vm.py [--tree TREE]

Guests without a network card; Azure's host is inside each, on its lo, and tells the console what it
is asked. For each of the two scripts a Debian, TREE or one made for it (tree), with its systemd as
PID 1 and what `make install` installs, and others with a DVD: there in time, or late, or all that
there is, where IMDS has nothing. For the one in shell also a system of nothing but BusyBox, started
as the recipe says. The kernel is Debian's for clouds. Prints a line a check, in TAP, and what was
measured as comments. Exit status: 0 all passed or were skipped, 1. Needs root, apt-get,
qemu-system-x86_64, mke2fs and, without TREE, mmdebstrap; for the DVD ssh-keygen and genisoimage,
and OpenSSH, sudo and kmod in TREE.
"""

import argparse
import contextlib
import json
import mmap
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading

import kit_path  # noqa: F401  before the modules of the kit
from host import ENDPOINTS, Answer
from lib import (
    FEW,
    KEY,
    GOOD_RUN,
    OTHER_ID,
    PASSWORD,
    POSTED,
    QEMU,
    VM_ID,
    Guest,
    boot_and_log_in,
    boot_guest,
    busybox_tree,
    debian_tree,
    expect,
    has_user,
    have,
    in_own_folder,
    is_provisioned,
    let_in,
    ovf,
    parse,
    probed,
    was_asked,
)
from run import PROJECT
from tap import Skipped, tell

DRIVER = 'ata_piix\n'  # the drive's, which udev would load
LATE_DRIVE = """[Service]
ExecStart=/bin/sh /azure-provisioning-tests/late-drive
StandardOutput=append:/dev/console
RuntimeMaxSec=200
[Install]
WantedBy=multi-user.target
"""
BAD_REQUEST = Answer('http', b'HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n')


def debian(program, tree):
    """A Debian reports Ready on its first boot, sets the hostname, disables the unit; the second
    asks nothing.
    """
    guest = Guest(program, tree or debian_tree())
    report = guest.boot()
    is_provisioned(report, report['posted'])
    was_asked(report)
    said = [line for line in report['journal'] if not line.startswith('Removed ')]  # by systemctl
    assert said == GOOD_RUN, said
    report = guest.boot()
    expect(
        report,
        {
            'host': 'listens',
            'enabled': 'disabled',
            'kernel-hostname': 'web-1',
            'static-hostname': 'web-1',
        },
    )
    assert 'request' not in report, report


def sandbox(program, tree):
    """A real kernel refuses what each directive of the unit's sandbox is there for."""
    probed(Guest(program, tree or debian_tree()))


def dvd_udf(program, tree):
    """The user logs in with the password on a real DVD, UDF; the next boot asks nothing; an image
    without DVD fails.
    """
    guest = dvd_guest(program, tree, 'udf', 'user data password hostname ready remember')
    guest.write('etc/modules-load.d/dvd.conf', DRIVER)
    guest.answer(has_user(guest, 'id_ed25519'))
    dvd = burnt_dvd()
    used_dvd(guest, boot_and_log_in(guest, *drive(dvd)))

    report = guest.boot(*drive(dvd))
    assert 'request' not in report, report
    report = guest.boot('-uuid', OTHER_ID)
    (posted,) = report['posted']
    assert '|reason=password: gave up after 30 attempts: ovf-env.xml: no DVD|' in posted, posted
    assert 'userData: /var/lib/azure-provisioning/user-data' in report['journal'], report


def dvd_iso9660(program, tree):
    """So it is with a kernel that does not know UDF, but ISO 9660; and where first the drive and
    then the medium in it are late.
    """
    guest = dvd_guest(program, tree, 'isofs', 'user data password hostname ready remember')
    guest.write('etc/systemd/system/late-drive.service', LATE_DRIVE)
    guest.enable('late-drive')
    guest.answer(has_user(guest, 'id_ed25519'))
    with insertion(burnt_dvd()):
        report = boot_and_log_in(guest, '-qmp', 'unix:qmp,server=on,wait=off', *drive())
    assert 'data: attempt 8 of 30: ovf-env.xml: no DVD' in report['journal'], report
    used_dvd(guest, report)


def azure_stack(program, tree):
    """Where IMDS has nothing and says 400 for ever, as on Azure Stack, the user, the key and the
    hostname come from the DVD.
    """
    guest = dvd_guest(program, tree, 'udf', 'user data hostname ready remember')
    guest.write('etc/modules-load.d/dvd.conf', DRIVER)
    guest.write('etc/systemd/system/azure-provisioning.service.d/tests.conf', FEW)
    [key] = has_user(guest, 'id_ed25519')['keyData']
    guest.answer(dict.fromkeys(set(ENDPOINTS) - {'goalstate', 'health'}, [BAD_REQUEST]))
    report = boot_and_log_in(guest, *drive(burnt_dvd(key.data.decode())))
    expect(report, {'kernel-hostname': 'web-1', 'static-hostname': 'web-1'})
    assert report['posted'] == POSTED, report
    let_in(report, 'id_ed25519')


def dvd_guest(program, tree, file_system, steps):
    """A guest that can read a DVD with this file system."""
    for command in 'ssh-keygen', 'debugfs', 'genisoimage':
        if not shutil.which(command):
            raise Skipped('no ' + command)
    guest = Guest(program, tree or debian_tree(), steps)
    guest.add_modules(
        'drivers/ata', 'drivers/scsi', 'drivers/cdrom', 'lib', 'fs/nls', 'fs/' + file_system
    )
    return guest


def used_dvd(guest, report):
    """Assert that a first boot took what is on the DVD, and the password is nowhere else."""
    assert report['posted'] == POSTED, report
    let_in(report, 'id_ed25519', 'password')
    assert 'password-in' not in report, report['password-in']
    for name in 'user', 'custom':
        read = have('debugfs', '-R', 'cat /var/lib/azure-provisioning/%s-data' % name, guest.disk)
        assert '\n%s data\n' % name in read, read
    with open(str(guest.disk), 'rb') as disk, mmap.mmap(
        disk.fileno(), 0, access=mmap.ACCESS_READ
    ) as content:
        assert (
            len(re.findall(re.escape(PASSWORD.encode()), content)) == 1
        )  # in logins.d/password, for the login


@contextlib.contextmanager
def insertion(dvd):
    """Put a DVD into the drive of the guest that boots meanwhile, once it says that it waits."""
    pathlib.Path('console').write_text('')
    ended = threading.Event()
    thread = threading.Thread(target=insert, args=(dvd, ended))
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def insert(dvd, ended):
    """Do the work of insertion, over the QEMU Machine Protocol."""
    while 'drive=empty' not in pathlib.Path('console').read_text(errors='replace'):
        if ended.wait(0.1):
            return
    change = {'id': 'drive', 'filename': os.path.abspath(dvd), 'format': 'raw'}
    with socket.socket(socket.AF_UNIX) as qmp:
        qmp.connect('qmp')
        lines = qmp.makefile('rw')
        for command, arguments in ('qmp_capabilities', {}), ('blockdev-change-medium', change):
            lines.write(json.dumps({'execute': command, 'arguments': arguments}) + '\n')
            lines.flush()
            while not re.match('{"(return|error)"', lines.readline()):
                pass  # a greeting, or an event


def drive(dvd=''):
    """Options of QEMU: a drive, and a DVD in it."""
    ide = ['-device', 'piix3-ide,id=ide', '-device', 'ide-cd,id=drive,bus=ide.0']
    if not dvd:
        return ide
    ide[-1] += ',drive=dvd'
    return [*ide, '-drive', 'if=none,id=dvd,media=cdrom,format=raw,readonly=on,file=' + dvd]


def burnt_dvd(*keys):
    """A DVD that can be read as UDF and as ISO 9660, as Azure's can."""
    os.mkdir('dvd')
    pathlib.Path('dvd/ovf-env.xml').write_text(ovf('false', *keys))
    have('genisoimage', '-udf', '-R', '-o', 'dvd.iso', 'dvd')
    shutil.rmtree('dvd')
    return 'dvd.iso'


def busybox(program, _):
    """A system of BusyBox alone reports Ready, with its wget, and sets the hostname: the
    recipe's script for init.d.
    """
    report = boot_busybox(
        program, '::wait:/etc/init.d/S50azure-provisioning start\n'
    )  # as Buildroot's rcS does
    was_asked(report)
    assert report['journal'] == GOOD_RUN[:-1] + ['Remembered: ' + VM_ID], report


def busybox_user(program, _):
    """So it does with the recipe's line for inittab; and it lets a user in, where that step is
    named, too.
    """
    line = (PROJECT / 'recipes/busybox/inittab').read_text()
    with_user = line.replace(' ready ', ' user ready ')
    assert with_user != line, line
    report = boot_busybox(program, with_user)
    was_asked(
        report,
        [
            ENDPOINTS['adminUsername'],
            ENDPOINTS['publicKeys'],
            ENDPOINTS['keyData'].replace('/N/', '/0/'),
        ],
    )
    expect(report, {'key': KEY})
    assert report['file'] == ['700 1000 .ssh', '600 1000 .ssh/authorized_keys'], report
    assert report['password'][0].startswith('*:'), report
    assert report['journal'][-len(GOOD_RUN) :] == GOOD_RUN[:-1] + ['Remembered: ' + VM_ID], report


def boot_busybox(program, line):
    """Boot a system of BusyBox alone that has the recipe's script for init.d, and one more line in
    its inittab.
    """
    root = pathlib.Path(tempfile.mkdtemp(dir=os.getcwd())) / 'root'
    shutil.copytree(str(busybox_tree()), str(root), symlinks=True)
    shutil.copy(
        '%s.%s' % (PROJECT / 'azure-provisioning', program),
        str(root / 'usr/sbin/azure-provisioning'),
    )
    script = root / 'etc/init.d/S50azure-provisioning'
    script.parent.mkdir()
    shutil.copy(str(PROJECT / 'recipes/busybox/S50azure-provisioning'), str(script))
    script.chmod(0o755)
    with (root / 'etc/inittab').open('a') as inittab:
        inittab.write(line)
    names = '\n'.join(sorted(str(path.relative_to(root)) for path in root.rglob('*')))
    with open('initrd', 'wb') as initrd:
        subprocess.run(
            [str(root / 'bin/busybox'), 'cpio', '-o', '-H', 'newc'],
            input=names.encode(),
            stdout=initrd,
            check=True,
            stderr=subprocess.DEVNULL,
            cwd=str(root),
        )
    report = boot_guest('rdinit=/sbin/init', '-initrd', 'initrd')
    expect(report, {'kernel-hostname': 'web-1', 'static-hostname': 'web-1'})
    return report


def hold(check, program, tree):
    """Hold a guest with the program against a check."""
    if os.getuid() != 0:
        raise Skipped('not root')
    have(QEMU[0], '--version')
    check(program, tree)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--tree', type=os.path.abspath)
    options = parse(parser)
    checks = [
        ('py', debian),
        ('sh', debian),
        ('sh', sandbox),
        ('py', dvd_udf),
        ('sh', dvd_iso9660),
        ('sh', azure_stack),
        ('sh', busybox),
        ('sh', busybox_user),
    ]
    print('1..%d' % len(checks))
    with in_own_folder():
        passed = [
            tell('%s: %s' % (program, check.__doc__), hold, check, program, options.tree)
            for program, check in checks
        ]
    sys.exit(0 if all(passed) else 1)


if __name__ == '__main__':
    main()
