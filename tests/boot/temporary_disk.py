#!/usr/bin/env python3
"""recipes/temporary-disk, in QEMU: python3 tests/boot/temporary_disk.py [--disks TREE]

A Debian 12 in TREE, or one made for it, has disks that look like the temporary disks of Azure, and
decoys: disks that almost do, which must be left alone, byte for byte. SCSI disks have the vendor
and the model that Azure's have. NVMe disks, too: they are served by the guest's own kernel, over
TCP on its lo, because QEMU's cannot be given a model. Prints a line a check, in TAP. Exit status: 0
all passed or were skipped, 1. Needs root, qemu-system-x86_64, mke2fs and, without TREE, mmdebstrap.
"""

import argparse
import collections
import functools
import os
import pathlib
import struct
import sys
import zlib

import kit_path  # noqa: F401  before the modules of the kit
import lib
import recipes
from tap import Skipped, measured, tell

PACKAGES = 'systemd-sysv dbus python3 curl iproute2 kmod ntfs-3g'
MODULES = 'drivers/virtio drivers/scsi drivers/block drivers/nvme fs/fuse fs/configfs lib crypto'
SIZE = 16 << 20
LABEL = 'Temporary Storage'
MODEL = 'Microsoft NVMe Direct Disk'
WARNING = 'DATALOSS_WARNING_README.txt'
FORMATTED = 'ext4 azure-temporary rw,nosuid,nodev,relatime'

# how: 'scsi' or 'nvme'; model: VENDOR/PRODUCT, or the model; content: of the disk; before: shell to
# run in the guest before the program, where {} is the name of the disk
Disk = collections.namedtuple('Disk', 'how model content before read_only')

INIT = r"""#!/bin/sh
# PID 1 of a guest without systemd: prepare the disks, try the program, and power off.
PATH=/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mount -t tmpfs run /run
exec >/dev/console 2>&1
echo 1 >/proc/sys/kernel/printk # the kernel is not to write into our lines
ip link set lo up
for module in virtio_pci virtio_scsi virtio_blk sd_mod fuse configfs nvmet nvmet-tcp nvme-tcp; do
    modprobe -q $module
done
mount -t configfs configfs /sys/kernel/config

until_true() { # COMMAND...: for 60 s at most
    for _ in $(seq 600); do
        ! "$@" || return 0
        sleep .1
    done
    echo "never: $*"
    end
}

end() {
    sync
    echo reported=yes
    echo o >/proc/sysrq-trigger
    sleep 60
}

exists() { # PATH...
    [ -e "$1" ]
}

scsi() { # LUN: set $disk to its name
    until_true eval "exists /sys/bus/scsi/devices/*:$1/block/*"
    disk=$(basename /sys/bus/scsi/devices/*:"$1"/block/*)
    until_true exists "/dev/$disk"
}

nvme() { # SERIAL MODEL: serve a virtio disk as an NVMe disk, and set $disk to the name of that
    until_true grep -qsx "$1" /sys/block/vd*/serial
    served=$(grep -lx "$1" /sys/block/vd*/serial)
    served=/dev/$(basename "${served%/serial}")
    target=/sys/kernel/config/nvmet
    subsystem=$target/subsystems/$1
    port=$target/ports/1
    mkdir "$subsystem"
    mkdir "$subsystem/namespaces/1"
    echo 1 >"$subsystem/attr_allow_any_host"
    printf %s "$2" >"$subsystem/attr_model"
    printf %s "$served" >"$subsystem/namespaces/1/device_path"
    echo 1 >"$subsystem/namespaces/1/enable"
    if [ ! -e "$port" ]; then
        mkdir "$port"
        echo tcp >"$port/addr_trtype"
        echo ipv4 >"$port/addr_adrfam"
        echo 127.0.0.1 >"$port/addr_traddr"
        echo 4420 >"$port/addr_trsvcid"
    fi
    ln -s "$subsystem" "$port/subsystems/"
    known=$(echo /sys/block/nvme*n1)
    printf %s "transport=tcp,traddr=127.0.0.1,trsvcid=4420,nqn=$1" >/dev/nvme-fabrics
    until_true is_new
    for path in /sys/block/nvme*n1; do
        case " $known " in
        *" $path "*) ;;
        *) disk=${path##*/} ;;
        esac
    done
    until_true exists "/dev/$disk"
}

is_new() {
    [ "$(echo /sys/block/nvme*n1)" != "$known" ]
}

try() { # NAME [MOUNT_POINT]: run the program, and report what it says and mounts as NAME
    name=$1
    shift
    azure-temporary-disk "$@" 2>&1 | sed "s/^/$name=/"
    echo "$name-mounts=$(findmnt --noheadings --output FSTYPE,LABEL,OPTIONS /mnt | tr -s ' ')"
}

try_twice() { # NAME: as at two boots
    try "$1"
    echo data >/mnt/data
    umount /mnt
    try "$1-again"
    ls /mnt | sed "s/^/$1-file=/"
    umount /mnt
}

until_true exists /dev/vda
tr -d '\0' </dev/vda >/run/script
. /run/script
end
"""
MAKE_DISK = """
mount -t overlay -o "lowerdir=$1,upperdir=$2,workdir=$3" none "$4"
chroot "$4" depmod "$5"
mke2fs -q -t ext4 -O ^has_journal -d "$4" "$6" 1G
umount "$4"
"""
# A SCSI disk that is deleted is found again when its bus is scanned.
WITH_DECOYS = """
{scsi}
echo 1 >/sys/block/$disk/device/delete
try decoys
{nvme}
try_twice nvme
echo '- - -' | tee /sys/class/scsi_host/host*/scan >/dev/null
{scsi}
try_twice scsi
"""
OTHERS = """
{scsi}
fresh=$disk
echo 'tmpfs /mnt tmpfs noauto' >/etc/fstab
try fstab
printf '%s\\n' 'LABEL=Temporary\\040Storage /data ntfs nofail' >/etc/fstab
try labelled
: >/etc/fstab
mkdir /run/full
: >/run/full/file
try full /run/full
echo "fresh=$(blkid -p -o value -s LABEL /dev/${fresh}1)"
mv /sbin/mount.ntfs-3g /sbin/mount.ntfs-3g.off
try label
mv /sbin/mount.ntfs-3g.off /sbin/mount.ntfs-3g
umount /mnt
echo 1 >/sys/block/$fresh/device/delete
{first}
{second}
try v2
try mounted
"""
REPORT = """[Service]
ExecStartPost=/bin/sh -c 'findmnt --noheadings --output FSTYPE,LABEL /mnt | tr -s " " | \
sed s/^/mounted=/; systemctl is-active azure-temporary-disk | sed s/^/active=/'
TimeoutStartSec=250
"""
WAIT = """[Service]
ExecStartPre=/bin/sh -c 'for _ in $(seq 600); do [ ! -b /dev/sda1 ] || exit 0; sleep .1; done'
"""  # in the place of udev, which is not in this tree


def scsi(content, before='', model='Msft/Virtual Disk', read_only=False):
    return Disk('scsi', model, content, before, read_only)


def nvme(content, before='', model=MODEL):
    return Disk('nvme', model, content, before, False)


class Maker:
    """Makes the contents of disks, with the programs of the tree."""

    def __init__(self):
        self.image = recipes.Image('disks')
        self.made = 0

    def run(self, commands, size=SIZE - (1 << 20)):
        """Run commands on a file of zeros, and return what it is then."""
        file = self.image.files / 'file'
        with file.open('wb') as new:
            new.truncate(size)
        self.image.run('exec >/dev/null; ' + commands)
        return file.read_bytes()

    def ntfs(self, label=LABEL, names=(WARNING,)):
        copy = ''
        for name in names:
            (self.image.files / name).write_text('text')
            copy += "; ntfscp -f file '%s' '%s'" % (name, name)
        made = self.run("mkfs.ntfs -q -Q -F -p 2048 -H 16 -S 63 -L '%s' file%s" % (label, copy))
        self.made += 1  # a UUID of its own, although it is made in the same second as another one
        return made[:72] + struct.pack('<Q', 0x1122334455667700 + self.made) + made[80:]

    def ext4(self, label):
        return self.run("mke2fs -q -t ext4 -L '%s' file" % label)


def partitioned(*contents):
    """A disk with a partition table of the old kind, and a partition for each content."""
    table, disk, start = b'', b'', 2048
    for content in contents:
        sectors = len(content) // 512
        table += struct.pack('<B3sB3sII', 0, b'\0\0\0', 7, b'\0\0\0', start, sectors)
        disk += content
        start += sectors
    head = (b'\0' * 446 + table).ljust(510, b'\0') + b'\x55\xaa'
    return head.ljust(1 << 20, b'\0') + disk


def lvm():
    """A physical volume of LVM: a label in the second sector, with the checksum that LVM wants."""
    rest = (struct.pack('<I8s', 32, b'LVM2 001') + b'a' * 32).ljust(492, b'\0')
    checksum = zlib.crc32(rest, 0xF597A6CF ^ 0xFFFFFFFF) ^ 0xFFFFFFFF
    label = struct.pack('<8sQI', b'LABELONE', 1, checksum) + rest
    return (b'\0' * 512 + label).ljust(SIZE, b'\0')


def damaged(ntfs):
    """An NTFS with its label, whose root folder cannot be read."""
    cluster = ntfs[13] * 512
    table = int.from_bytes(ntfs[48:56], 'little') * cluster
    root = table + 5 * 1024
    return ntfs[:root] + b'\0' * 1024 + ntfs[root + 1024 :]


def decoys(make):
    """Disks that must be left alone, by what is wrong with them."""
    fresh = partitioned(make.ntfs())
    empty = b'\0' * SIZE
    mount = 'mkdir /run/look; mount -t ntfs-3g -o ro /dev/{}1 /run/look'
    add_uuid = 'echo "UUID=$(blkid -p -o value -s UUID /dev/{}1) /a ntfs nofail" >>/etc/fstab'
    add_link = 'ln -s /dev/{}1 /dev/link; echo "/dev/link /b ntfs nofail" >>/etc/fstab'
    add_nvme = 'echo "/dev/{} /c ext4 nofail" >>/etc/fstab'
    return {
        'NTFS with a file': scsi(partitioned(make.ntfs(names=[WARNING, 'data']))),
        'NTFS with a hidden file': scsi(partitioned(make.ntfs(names=['.data']))),
        'NTFS with another label': scsi(partitioned(make.ntfs('Temporary storage'))),
        'NTFS that is damaged': scsi(partitioned(damaged(make.ntfs()))),
        'NTFS without a partition': scsi(make.ntfs()),
        'two partitions': scsi(partitioned(make.ntfs(), b'\0' * (1 << 20))),
        'ext4 with the label of the NTFS': scsi(partitioned(make.ext4(LABEL[:16]))),
        'another vendor': scsi(fresh, model='QEMU/Virtual Disk'),
        'another product': scsi(fresh, model='Msft/Virtual HD'),
        'an empty data disk': scsi(empty),
        'a data disk with an empty partition': scsi(partitioned(b'\0' * (15 << 20))),
        'a disk that is read-only': scsi(fresh, read_only=True),
        'a disk that is mounted': scsi(fresh, mount),
        'in fstab by its UUID': scsi(partitioned(make.ntfs()), add_uuid),
        'in fstab by a symlink': scsi(fresh, add_link),
        'a remote NVMe': nvme(empty, model='MSFT NVMe Accelerator v1.0'),
        'a later NVMe': nvme(empty, model=MODEL + ' v3'),
        'NVMe with ext4': nvme(make.ext4('')),
        'NVMe with another label': nvme(make.ext4('azure-temporary2')),
        'NVMe with a partition': nvme(partitioned(b'\0' * (15 << 20))),
        'NVMe with an empty partition table': nvme(partitioned().ljust(SIZE, b'\0')),
        'NVMe with an NTFS': nvme(make.ntfs()),
        'NVMe with LVM': nvme(lvm()),
        'NVMe with LUKS': nvme(b'LUKS\xba\xbe\0\2'.ljust(SIZE, b'\0')),
        'NVMe that is swap': nvme(make.run('mkswap file'), 'swapon /dev/{}'),
        'NVMe in fstab': nvme(empty, add_nvme),
    }


class DiskGuest(lib.Guest):
    """A Debian with the recipe; systemd is its PID 1 at the first boot alone."""

    def __init__(self):
        super().__init__('sh', recipes.tree('disks'))
        self.add_modules(*MODULES.split())
        name = 'temporary-disk/azure-temporary-disk'
        self.write('usr/local/sbin/azure-temporary-disk', recipes.recipe(name), 0o755)
        unit = 'etc/systemd/system/azure-temporary-disk.service'
        self.write(unit, recipes.recipe(name + '.service'))
        self.write(unit + '.d/wait.conf', WAIT)
        self.write('etc/systemd/system/report.service.d/disk.conf', REPORT)
        self.write('etc/modules-load.d/disk.conf', 'virtio_pci\nvirtio_scsi\nsd_mod\nfuse\n')
        self.write('etc/fstab', '')
        self.write('azure-provisioning-tests/init', INIT, 0o755)
        self.enable('azure-temporary-disk')

    def make_disk(self):
        """Make the disk, before the first boot."""
        if not self.disk.exists():
            root, work = self.state / 'root', self.state / 'work'
            root.mkdir()
            work.mkdir()
            kernel = lib.modules().name
            paths = [self.tree, self.upper, work, root, kernel, self.disk]
            lib.have('sh', '-euc', MAKE_DISK, 'sh', *paths)

    def try_disks(self, disks, script):
        """Boot with disks, a file for each name; run a script in which {NAME} stands for the shell
        that prepares a disk. Return the report.
        """
        devices = []
        for number, (name, disk) in enumerate(disks.items()):
            pathlib.Path(name).write_bytes(disk.content)
            drive = 'if=none,id=d%d,format=raw,cache=unsafe,file=%s' % (number, name)
            devices += ['-drive', drive + ',readonly=on' * disk.read_only]
            if disk.how == 'scsi':
                vendor, _, product = disk.model.partition('/')
                device = 'scsi-hd,bus=scsi.0,scsi-id=0,lun=%d,drive=d%d,vendor=%s,product=%s'
                devices += ['-device', device % (number, number, vendor, product)]
                setup = 'scsi %d\n' % number
            else:
                devices += ['-device', 'virtio-blk-pci,serial=d%d,drive=d%d' % (number, number)]
                setup = 'nvme d%d "%s"\n' % (number, disk.model)
            setup += disk.before.replace('{}', '${disk}') + '\n'
            script = script.replace('{%s}' % name, setup)
        pathlib.Path('script').write_bytes(script.encode().ljust(65536, b'\0'))
        report = lib.boot_guest(
            'root=/dev/nvme0n1 rw init=/azure-provisioning-tests/init',
            '-drive',
            lib.DISK % self.disk,
            '-device',
            'nvme,serial=disk,drive=disk',
            '-drive',
            'if=none,id=script,format=raw,file=script',
            '-device',
            'virtio-blk-pci,drive=script',
            '-device',
            'virtio-scsi-pci,id=scsi',
            *devices,
        )
        assert not [line for line in report if line.startswith('never')], report
        return report


class Fleet:
    """The guest, the decoys, and a fresh SCSI disk, made once, and what came of the boots."""

    def __init__(self):
        make = Maker()
        self.fresh = partitioned(make.ntfs())
        self.decoys = decoys(make)
        self.guest = DiskGuest()


@functools.lru_cache(maxsize=None)
def boot_systemd(fleet):
    """Boot with systemd and a fresh SCSI disk."""
    fleet.guest.make_disk()
    pathlib.Path('unit').write_bytes(fleet.fresh)
    return fleet.guest.boot(
        '-device',
        'virtio-scsi-pci,id=scsi',
        '-drive',
        'if=none,id=unit,format=raw,cache=unsafe,file=unit',
        '-device',
        'scsi-hd,bus=scsi.0,drive=unit,vendor=Msft,product=Virtual Disk',
    )


@functools.lru_cache(maxsize=None)
def boot_with_decoys(fleet):
    """Boot with all decoys; first they are alone, then come a fresh NVMe disk and a fresh SCSI
    disk.
    """
    fleet.guest.make_disk()
    disks = {'decoy-%d' % number: disk for number, disk in enumerate(fleet.decoys.values())}
    script = ': >/etc/fstab\n' + ''.join('{%s}' % name for name in disks) + WITH_DECOYS
    disks.update(scsi=scsi(fleet.fresh), nvme=nvme(b'\0' * SIZE))
    return fleet.guest.try_disks(disks, script)


@functools.lru_cache(maxsize=None)
def boot_others(fleet):
    """Boot with other disks that are fresh."""
    fleet.guest.make_disk()
    second = nvme(b'\0' * SIZE, model=MODEL + ' v2')
    disks = {'scsi': scsi(fleet.fresh), 'first': second, 'second': second}
    return fleet.guest.try_disks(disks, OTHERS)


def unit(fleet):
    """At a boot with systemd, the unit formats and mounts a fresh SCSI disk."""
    report = boot_systemd(fleet)
    assert report['mounted'] == ['ext4 azure-temporary'], report
    assert report['active'] == ['active'], report


def only_decoys(fleet):
    """Disks that almost look like temporary disks are left alone, and the reasons are said."""
    report = boot_with_decoys(fleet)
    assert report['decoys-mounts'] == [''], report
    assert report['decoys'][-1] == 'There is no temporary disk that can be used', report
    for reason, count in (
        ('is in use, or in /etc/fstab', 6),
        ('has files', 2),
        ('cannot be looked into', 1),
        ('is not fresh', 9),
    ):
        lines = [line for line in report['decoys'] if reason in line]
        assert len(lines) == count, (reason, lines, report)


def decoys_are_same(fleet):
    """The decoys are as they were, byte for byte, also after other disks were formatted."""
    boot_with_decoys(fleet)
    measured('%d decoys', len(fleet.decoys))
    changed = [
        name
        for number, (name, disk) in enumerate(fleet.decoys.items())
        if pathlib.Path('decoy-%d' % number).read_bytes() != disk.content
    ]
    assert not changed, changed


def fresh_nvme(fleet):
    """Beside them, a fresh NVMe disk is formatted once, and then kept."""
    is_kept(boot_with_decoys(fleet), 'nvme')


def fresh_scsi(fleet):
    """Beside them, a fresh SCSI disk is formatted once, and then kept."""
    is_kept(boot_with_decoys(fleet), 'scsi')


def is_kept(report, name):
    """Assert that a disk was formatted, and mounted as it was the next time."""
    assert report[name + '-mounts'] == report[name + '-again-mounts'] == [FORMATTED], report
    assert [line for line in report[name] if 'Formatting' in line], report
    assert not [line for line in report[name + '-again'] if 'Formatting' in line], report
    assert report[name + '-file'] == [WARNING, 'data', 'lost+found'], report


def second_model(fleet):
    """So is an NVMe disk of the second model; of two, the other one is left alone."""
    report = boot_others(fleet)
    assert report['v2-mounts'] == report['mounted-mounts'] == [FORMATTED], report
    assert report['mounted'] == ['Something is mounted on /mnt: nothing to do'], report
    changed = [any(pathlib.Path(name).read_bytes()) for name in ('first', 'second')]
    assert sorted(changed) == [False, True], changed


def without_ntfs(fleet):
    """Where no NTFS can be read, the label has to do."""
    report = boot_others(fleet)
    assert report['label-mounts'] == [FORMATTED], report


def mount_point(fleet):
    """A mount point that is in fstab or has files is left alone, and so is the disk."""
    report = boot_others(fleet)
    assert report['fstab'] == ['/mnt is in /etc/fstab: nothing to do'], report
    assert 'is in use, or in /etc/fstab' in report['labelled'][0], report
    assert report['full'] == ['azure-temporary-disk: /run/full is not empty'], report
    assert report['fresh'] == ['Temporary Storage'], report


def hold(check, fleet):
    if os.getuid() != 0:
        raise Skipped('not root')
    lib.have(lib.QEMU[0], '--version')
    if not fleet:
        fleet.append(Fleet())
    check(fleet[0])


CHECKS = [
    only_decoys,
    decoys_are_same,
    fresh_nvme,
    fresh_scsi,
    second_model,
    mount_point,
    without_ntfs,
    unit,
]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--disks', type=os.path.abspath)
    parser.add_argument('--only', metavar='CHECK', help='the check of this name')
    options = lib.parse(parser)
    recipes.PACKAGES['disks'] = PACKAGES
    recipes.TREES['disks'] = options.disks
    checks = [each for each in CHECKS if options.only in (None, each.__name__)]
    print('1..%d' % len(checks), flush=True)
    fleet = []
    lib.GUEST_LIMIT = 900  # the disks of a guest take their time on a busy machine
    with lib.in_own_folder():
        passed = [tell(check.__doc__, hold, check, fleet) for check in checks]
    sys.exit(0 if all(passed) else 1)


if __name__ == '__main__':
    main()
