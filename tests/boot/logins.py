#!/usr/bin/env python3
"""First boots that make the user, and real logins: python3 tests/boot/logins.py [--tree TREE]
[PROGRAM]...

As boot.py, but with the steps that make a user with SSH keys and a password. Then the machine logs
in to itself, with the real ssh and sshd. A namespace cannot mount a DVD: here /dev/sr0 is a file
and the command mount binds a folder; vm.py has the real ones. Prints a line a check, in TAP. Exit
status: 0 all passed or were skipped, 1. Needs root, systemd, iproute2 and ssh-keygen, and in TREE
OpenSSH, sudo and useradd.
"""

import base64
import contextlib
import os
import pathlib
import re
import shutil
import socket
import struct
import subprocess
import threading

import kit_path  # noqa: F401  before the modules of the kit
from host import ENDPOINTS, Answer, Azure, good
from lib import (
    FEW,
    BLOCK,
    KEYS,
    PASSWORD,
    SILENT,
    KEY,
    USER,
    UUIDS,
    boot_and_log_in,
    expect,
    has_user,
    is_provisioned,
    let_in,
    main,
    ovf,
)
from tap import Skipped

STEPS = 'user password data hostname ready remember'
MOUNT = """#!/bin/sh
for where; do true; done
exec /bin/mount --bind /azure-provisioning-tests/dvd "$where"
"""
BAD_REQUEST = Answer('http', b'HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n')
ALL_PROMPTS = """\
PasswordAuthentication yes
KbdInteractiveAuthentication yes
ChallengeResponseAuthentication yes
"""
BUSYBOX = ['adduser', 'addgroup', 'chpasswd']
NO_RIGHT = 'user: sudo does not say that %s may do all without a password' % USER
USR_UNIT = """[Service]
ExecStartPre=
ExecStart=
ExecStart=/usr/local/sbin/sshd -D
ExecReload=
ExecReload=/bin/kill -HUP $MAINPID
"""
USR_SSHD = '#!/bin/sh\nexec /usr/sbin/sshd -f /usr/etc/ssh/sshd_config "$@"\n'
SLOW = """[Unit]
DefaultDependencies=no
[Service]
Type=oneshot
ExecStart=/bin/sleep 3
[Install]
WantedBy=multi-user.target
"""
LATE_HOME = """[Unit]
After=slow.service
Wants=slow.service
[Mount]
What=tmpfs
Where=/home
Type=tmpfs
"""
DROPBEAR = """[Service]
ExecStart=/usr/sbin/dropbear -F -R -E -p 22
[Install]
WantedBy=multi-user.target
"""
NO_IPV6 = 'LinkLocalAddressing=no\nIPv6AcceptRA=no\n'
# of a run: an endpoint that is silent; or a command that does not end, and what it does before
POINTS = [
    ('adminUsername', '', ''),
    ('keyData', '', ''),
    ('', 'useradd', ''),
    ('', 'useradd', '/usr/sbin/useradd -M -s "$3" "$4"'),
    ('', 'chpasswd', ''),
    ('', 'chown', ''),
    ('', 'visudo', ''),
    ('', 'mount', ''),
    ('', 'umount', ''),
    ('', 'chpasswd', '[ $# = 0 ] || exec /usr/sbin/chpasswd "$@"'),
    ('', 'systemctl', '[ "$1" = try-reload-or-restart ] || exec /bin/systemctl "$@"'),
    ('userData', '', ''),
    ('computerName', '', ''),
    ('health', '', ''),
]
NEEDED = [
    'ssh-keygen',
    '/usr/sbin/sshd',
    '/usr/bin/ssh',
    '/usr/bin/sudo',
    '/usr/sbin/visudo',
    '/usr/sbin/useradd',
]


def has_dvd(machine, disable='false'):
    """Give a machine what it takes for a DVD, and an id."""
    machine.write('azure-provisioning-tests/dvd/ovf-env.xml', ovf(disable))
    machine.write('usr/local/bin/mount', MOUNT, 0o755)
    machine.write('etc/tmpfiles.d/dvd.conf', 'f /dev/sr0\n')
    (machine.state / 'product_uuid').write_text(UUIDS[0])


def is_ready(report, host):
    """Assert that Azure was told Ready, once, and the unit ended well."""
    assert [b'<State>Ready</State>' in post.body for post in host.posts()] == [True], report
    expect(
        report, {'kernel-hostname': 'web-1', 'azure-provisioning.service:ActiveState': 'inactive'}
    )


def nothing_amiss(report):
    """Assert that no step said that something is otherwise than it should be."""
    said = [line for line in report['journal'] if line.startswith(('user: ', 'password: '))]
    assert not said, said


def files(machine, *folders):
    """What a machine's boots wrote below folders: mode, owner and content of each path."""
    found = {}
    for path in [path for folder in folders for path in (machine.upper / folder).rglob('*')]:
        status, content = path.lstat(), b''
        if path.is_symlink():
            content = os.fsencode(os.readlink(str(path)))
        elif path.is_file():
            content = path.read_bytes()
        found[str(path.relative_to(machine.upper))] = (
            oct(status.st_mode),
            status.st_uid,
            status.st_gid,
            content,
        )
    return found


def end_state(machine):
    """What the steps are to leave, but for the salt of the password, the copies that its commands
    keep, and what only useradd makes of a home: its mode, and what is in /etc/skel.
    """
    state = files(machine, 'etc', 'home', 'var/lib/azure-provisioning')
    skel = {
        'home/%s/%s' % (USER, path.name)
        for path in pathlib.Path(machine.tree, 'etc/skel').iterdir()
    }
    state = {
        path: what
        for path, what in state.items()
        if path[-1] != '-'
        and path not in skel
        and path != 'etc/machine-id'
        and not path.startswith('etc/systemd')
    }
    state['home/' + USER] = state['home/' + USER][1:3]
    state['etc/shadow'] = state['etc/shadow'][:3] + (
        re.sub(rb':\$[^:]+:\d+:', b':HASH:DAY:', state['etc/shadow'][3]),
    )
    return state


def is_readable_by(machine, wanted):
    """Assert modes and owners of paths in a machine: 0 is root, 1 the user."""
    passwd = (machine.upper / 'etc/passwd').read_text()
    users = [
        (0, 0),
        tuple(map(int, re.search('(?m)^%s:[^:]*:([0-9]+):([0-9]+):' % USER, passwd).groups())),
    ]
    for path, (mode, owner) in wanted.items():
        status = (machine.upper / path).lstat()
        found = oct(status.st_mode)[-3:], (status.st_uid, status.st_gid)
        assert found == (mode, users[owner]), (path, found)


def on_token(key):
    """The public key as if its private one were on a FIDO token: another type, and an application
    in the end.
    """
    kind, blob, comment = key.split(' ', 2)
    other = kind.replace('ecdsa-', 'sk-ecdsa-').replace('ssh-', 'sk-ssh-') + '@openssh.com'
    blob = base64.b64decode(blob)[4 + len(kind) :] + struct.pack('>I4s', 4, b'ssh:')
    blob = struct.pack('>I', len(other)) + other.encode() + blob
    return ' '.join([other, base64.b64encode(blob).decode(), comment])


def keys(machine):
    """The user is made; each of its SSH keys lets in, with PAM and without, and sudo there asks for
    no password.
    """
    answers = has_user(machine, *KEYS)
    by_name = dict(zip(KEYS, answers['keyData']))
    for name in 'id_ed25519', 'id_ecdsa256':  # there is no token here to log in with
        answers['keyData'].append(Answer('body', on_token(by_name[name].data.decode()).encode()))
    answers['publicKeys'] = [Answer('body', b'0/\n1/\n2/\n3/\n4/\n5/\n6/')]
    with Azure(answers) as host:
        report = boot_and_log_in(machine)
        is_provisioned(report, host.posts())
    nothing_amiss(report)
    let_in(report, *KEYS)
    is_readable_by(
        machine,
        {
            'home/azureuser/.ssh': ('700', 1),
            'home/azureuser/.ssh/authorized_keys': ('600', 1),
            'etc/sudoers.d/zz-azure-provisioning': ('440', 0),
        },
    )
    known = subprocess.run(
        ['ssh-keygen', '-l', '-f', str(machine.upper / 'home/azureuser/.ssh/authorized_keys')],
        stdout=subprocess.PIPE,
        universal_newlines=True,
        check=True,
    ).stdout
    kinds = re.findall(r'\((.*)\)$', known, re.MULTILINE)
    assert kinds == ['RSA', 'ED25519', 'ECDSA', 'ECDSA', 'ECDSA', 'ED25519-SK', 'ECDSA-SK'], known


keys.steps = 'user hostname ready disable'


def password(machine):
    """The password on the DVD lets in, too, and stands nowhere; what else is on the DVD is for root
    alone.
    """
    has_dvd(machine)
    with Azure(has_user(machine, 'id_ed25519')) as host:
        report = boot_and_log_in(machine)
        is_ready(report, host)
    nothing_amiss(report)
    let_in(report, 'id_ed25519', 'password')
    everything = files(machine, '.')
    found = [path for path, what in everything.items() if PASSWORD.encode() in what[3]] + report[
        'password-in'
    ]
    assert set(found) == {'azure-provisioning-tests/logins.d/password'}, found
    is_readable_by(
        machine,
        {
            'home/azureuser/.ssh/authorized_keys': ('600', 1),
            'var/lib/azure-provisioning': ('700', 0),
            'var/lib/azure-provisioning/user-data': ('600', 0),
            'var/lib/azure-provisioning/custom-data': ('600', 0),
            'var/lib/azure-provisioning/vm-id': ('600', 0),
        },
    )
    for name in 'user', 'custom':
        assert (
            everything['var/lib/azure-provisioning/%s-data' % name][3]
            == b'%s data\n' % name.encode()
        )


def no_passwords(machine):
    """Where the DVD says that sshd is to take no password, it takes none, though one is set."""
    has_dvd(machine, disable='true')
    with Azure(has_user(machine, 'id_ed25519')) as host:
        report = boot_and_log_in(machine)
        is_ready(report, host)
    let_in(report, 'id_ed25519')
    assert re.search(USER + r':\$', (machine.upper / 'etc/shadow').read_text())


def cloud_init(machine):
    """A drop-in of cloud-init's lets sshd take passwords, and the DVD forbids it: it takes none."""
    machine.write('etc/ssh/sshd_config.d/50-cloud-init.conf', ALL_PROMPTS)
    no_passwords(machine)
    assert not (machine.upper / 'etc/ssh/sshd_config').exists(), 'sshd_config has been changed'


def first_lines(machine):
    """An sshd_config without drop-ins, as before OpenSSH 8.2, lets in by each prompt: none does."""
    machine.write('etc/ssh/sshd_config', 'UsePAM yes\n' + ALL_PROMPTS, 0o600)
    no_passwords(machine)
    assert oct((machine.upper / 'etc/ssh/sshd_config').stat().st_mode)[-3:] == '600'


def default_prompts(machine):
    """The same with an sshd_config that says nothing of prompts, and has their defaults."""
    machine.write('etc/ssh/sshd_config', 'UsePAM yes\n')
    no_passwords(machine)


def all_prompts(machine):
    """A drop-in forbids passwords, and the DVD has one without a word on sshd: it lets in."""
    machine.write('etc/ssh/sshd_config.d/50-image.conf', ALL_PROMPTS.replace('yes', 'no'))
    has_dvd(machine, disable='')
    with Azure(has_user(machine, 'id_ed25519')) as host:
        report = boot_and_log_in(machine)
        is_ready(report, host)
    nothing_amiss(report)
    let_in(report, 'id_ed25519', 'password')


def match(machine):
    """A Match lets this user in with a password, though the DVD forbids it: NotReady says so."""
    machine.write('etc/ssh/sshd_config', 'Match User %s\nPasswordAuthentication yes\n' % USER)
    has_dvd(machine, disable='true')
    is_refused(machine, 'password: sshd still accepts passwords from %s' % USER)


def in_usr(machine):
    """sshd has its default in /usr/etc alone, as on openSUSE: a drop-in, and nothing hides it."""
    default = machine.tree + '/etc/ssh/sshd_config'
    machine.write('usr/etc/ssh/sshd_config', pathlib.Path(default).read_text())
    machine.hide('etc/ssh/sshd_config')
    machine.write('usr/local/sbin/sshd', USR_SSHD, 0o755)
    machine.write('etc/systemd/system/ssh.service.d/usr.conf', USR_UNIT)
    has_dvd(machine, disable='true')
    with Azure(has_user(machine, 'id_ed25519')) as host:
        report = machine.boot()
        is_ready(report, host)
    nothing_amiss(report)
    assert 'PasswordAuthentication: no' in report['journal'], report['journal']
    assert files(machine, 'etc/ssh/sshd_config.d'), 'no drop-in'


def in_usr_alone(machine):
    """The same where that default reads no drop-ins: NotReady says so."""
    machine.write('usr/etc/ssh/sshd_config', 'UsePAM yes\n')
    machine.hide('etc/ssh/sshd_config')
    has_dvd(machine, disable='true')
    is_refused(machine, 'password: /usr/etc/ssh/sshd_config: no Include ')


def keys_elsewhere(machine):
    """sshd looks for keys elsewhere: they are there, and let in."""
    machine.write('etc/ssh/sshd_config.d/50-image.conf', 'AuthorizedKeysFile /etc/keys/%u\n')
    with Azure(has_user(machine, 'id_ed25519')) as host:
        report = boot_and_log_in(machine)
        is_provisioned(report, host.posts())
    nothing_amiss(report)
    let_in(report, 'id_ed25519')
    assert set(files(machine, 'etc/keys')) == {'etc/keys/' + USER}


def late_home(machine):
    """/home is mounted seconds later than all else: the keys are there, and not below it."""
    machine.write('etc/systemd/system/slow.service', SLOW)
    machine.write('etc/systemd/system/home.mount', LATE_HOME)
    machine.enable('slow')
    with Azure(has_user(machine, 'id_ed25519')) as host:
        report = boot_and_log_in(machine)
        is_provisioned(report, host.posts())
    let_in(report, 'id_ed25519')
    assert not files(machine, 'home'), 'the home is below the mount'


def left_home(machine):
    """A home of another user, which the image has left, is not taken: NotReady says so."""
    machine.write('home/%s/.ssh/authorized_keys' % USER, KEY + '\n')
    subprocess.run(['chown', '-R', '4242:4242', str(machine.upper / 'home' / USER)], check=True)
    is_refused(machine, 'user: /home/%s: belongs to another user' % USER)


def pam_refuses(machine):
    """PAM refuses the password: NotReady says so."""
    machine.write('etc/pam.d/chpasswd', 'password requisite pam_deny.so\n')
    has_dvd(machine)
    is_refused(machine, 'password: chpasswd failed')


def is_refused(machine, reason):
    """Boot a machine, and assert that Azure was told NotReady, once, and this is the reason."""
    with Azure(has_user(machine, 'id_ed25519')) as host:
        report = machine.boot()
        posts = [post.body.decode() for post in host.posts()]
    assert len(posts) == 1 and 'result=error|reason=%s' % reason in posts[0], (posts, report)
    assert any(line.startswith(reason) for line in report['journal']), report['journal']


def groups(machine):
    """A group of the user's name is there, and more are named: it is in all that there are."""
    group = pathlib.Path(machine.tree, 'etc/group').read_text() + USER + ':x:5000:\n'
    machine.write('etc/group', group)
    with Azure(has_user(machine, 'id_ed25519')) as host:
        report = boot_and_log_in(machine)
        is_provisioned(report, host.posts())
    let_in(report, 'id_ed25519')
    assert 'user: there is no group nobodys' in report['journal'], report['journal']
    group = (machine.upper / 'etc/group').read_text()
    assert re.findall('(.*):x:[0-9]*:%s\n' % USER, group) == ['adm', 'users'], group
    passwd = (machine.upper / 'etc/passwd').read_text()
    assert re.search('%s:x:[0-9]+:5000:' % USER, passwd), passwd


def sudo_rs(machine):
    """The same with sudo-rs."""
    for name in 'sudo', 'visudo':
        has(machine, 'usr/bin/%s-rs' % name)
        machine.link('usr/local/bin/' + name, '/usr/bin/%s-rs' % name)
    becomes_root(machine)


def real_sudo(machine):
    """The user becomes root with sudo, and loses that to a later file, and that is said."""
    becomes_root(machine)


def becomes_root(machine):
    """Boot a machine twice: the user becomes root, and then a file of sudoers.d forbids it."""
    answers = has_user(machine, 'id_ed25519')
    for file, wanted in ('90-cloud-init-users', []), ('zzz', [NO_RIGHT]):
        machine.write('etc/sudoers.d/' + file, USER + ' ALL=(ALL) ALL\n', 0o440)
        with Azure(answers) as host:
            report = boot_and_log_in(machine)
            assert len(host.posts()) == 1, host.requests
        said = [line for line in report['journal'] if line.startswith('user: ')]
        assert said == wanted, (said, report)
        if not wanted:
            let_in(report, 'id_ed25519')


def doas(machine):
    """With doas in the place of sudo, the user becomes root."""
    has(machine, 'usr/bin/doas')
    machine.hide('usr/bin/sudo')
    machine.hide('usr/sbin/visudo')
    machine.write('usr/local/bin/sudo', '#!/bin/sh\nexec doas "$@"\n', 0o755)
    with Azure(has_user(machine, 'id_ed25519')) as host:
        report = boot_and_log_in(machine)
        is_provisioned(report, host.posts())
    nothing_amiss(report)
    let_in(report, 'id_ed25519')


def dropbear(machine):
    """With dropbear in the place of sshd, the key lets in, and so does the password, as is said."""
    has(machine, 'usr/sbin/dropbear')
    machine.hide('usr/sbin/sshd')
    machine.hide('etc/ssh/sshd_config')
    has_dvd(machine, disable='true')
    answers = has_user(machine, 'id_ed25519')
    machine.write('etc/dropbear/README', '')
    machine.write('etc/systemd/system/dropbear.service', DROPBEAR)
    machine.enable('dropbear')
    with Azure(answers) as host:
        report = boot_and_log_in(machine)
        is_ready(report, host)
    assert 'password: dropbear still accepts passwords' in report['journal'], report['journal']
    expect(report, {'login:id_ed25519:dropbear': USER + ' root'})
    expect(report, {'login:password:dropbear': USER + ' root'})


def busybox(machine):
    """BusyBox makes the user, adds it to a group, and stores a hash that counts all characters."""
    binary = shutil.which('busybox')
    if not binary:
        raise Skipped('no busybox')
    applets = subprocess.run([binary, '--list'], stdout=subprocess.PIPE).stdout.decode().split()
    missing = [name for name in BUSYBOX if name not in applets]
    if missing:
        raise Skipped('the BusyBox of this machine has no ' + ', '.join(missing))
    machine.write('usr/local/bin/busybox', '', 0o755)
    shutil.copy(binary, str(machine.upper / 'usr/local/bin/busybox'))
    for name in BUSYBOX:
        machine.link('usr/local/sbin/' + name, '/usr/local/bin/busybox')
    for name in 'useradd', 'usermod', 'chpasswd':
        machine.hide('usr/sbin/' + name)
    has_dvd(machine)
    with Azure(has_user(machine, 'id_ed25519')) as host:
        report = boot_and_log_in(machine)
        is_ready(report, host)
    let_in(report, 'id_ed25519', 'password')
    assert re.search('users:x:[0-9]*:%s\n' % USER, (machine.upper / 'etc/group').read_text())
    assert re.search(USER + r':\$[56]\$', (machine.upper / 'etc/shadow').read_text())


def has(machine, path):
    """Skip a check if the tree does not have this."""
    if not pathlib.Path(machine.tree, path).exists():
        raise Skipped('no /%s in the tree' % path)


def recapture(machine):
    """The second boot of a VM asks nothing; an image of it, which is another VM, provisions."""
    has_dvd(machine)
    answers = has_user(machine, 'id_ed25519')
    for uuid, posts in (UUIDS[0], 1), (UUIDS[0], 0), (UUIDS[1], 1):
        machine.write('etc/hostname', 'image\n')
        (machine.state / 'product_uuid').write_text(uuid)
        with Azure(answers) as host:
            report = machine.boot()
            assert len(host.posts()) == posts and bool(host.requests) == bool(posts), host.requests
        expect(report, {'enabled': 'enabled', 'static-hostname': 'web-1' if posts else 'image'})
        assert (machine.upper / 'var/lib/azure-provisioning/vm-id').read_text() == uuid
    assert report['journal'][-1] == 'Remembered: ' + uuid.strip(), report


def again(machine):
    """A second run changes nothing."""
    has_dvd(machine)
    answers = has_user(machine, 'id_rsa', 'id_ed25519')
    states = []
    for _ in range(2):
        with Azure(answers) as host:
            is_ready(machine.boot(), host)
        states.append(end_state(machine))
    is_same(*states)


def power_cut(machine):
    """Everything is killed at each point of a run: the next boot ends as if nothing had been."""
    has_dvd(machine)
    answers = has_user(machine, 'id_ed25519')
    image = machine.state / 'image'
    subprocess.run(['cp', '-a', str(machine.upper), str(image)], check=True)
    with Azure(answers) as host:
        is_ready(machine.boot(), host)
    whole = end_state(machine)
    for silent, blocked, before in POINTS:
        subprocess.run(['rm', '-rf', str(machine.upper)], check=True)
        subprocess.run(['cp', '-a', str(image), str(machine.upper)], check=True)
        wanted = 'GET /in-%s-' % blocked if blocked else ENDPOINTS[silent].replace('/N/', '/0/')
        if blocked:
            machine.write(
                'usr/local/sbin/' + blocked,
                BLOCK.replace('\n', '\n%s\n' % before, 1) % blocked,
                0o755,
            )
        with Azure(dict(answers, **{silent: SILENT})) as host:
            machine.boot(lambda up, host=host, wanted=wanted: is_asked(host, wanted))
        assert machine.cut, (silent, blocked, host.requests)
        if blocked:
            (machine.upper / 'usr/local/sbin' / blocked).unlink()
        with Azure(answers) as host:
            is_ready(machine.boot(), host)
        is_same(end_state(machine), whole)


def is_asked(host, wanted):
    return any(wanted in request.line for request in host.requests)


def is_same(state, other):
    differ = [
        '%s: %.200s, %.200s' % (path, state.get(path), other.get(path))
        for path in sorted(set(state) | set(other))
        if state.get(path) != other.get(path)
    ]
    assert not differ, '\n'.join(differ)


def not_ready(machine):
    """Where IMDS can name no user, Azure is told NotReady, once, and the unit fails and stays
    enabled.
    """
    with Azure(good(adminUsername=[BAD_REQUEST])) as host:
        report = machine.boot()
        posts = host.posts()
    assert len(posts) == 1 and b'<State>NotReady</State>' in posts[0].body, posts
    assert b'|reason=user: gave up after 3 attempts: adminUsername: HTTP 400|' in posts[0].body, (
        posts
    )
    expect(
        report,
        {
            'enabled': 'enabled',
            'kernel-hostname': 'image',
            'azure-provisioning.service:ActiveState': 'failed',
        },
    )


not_ready.drop_in = FEW


def publish(machine):
    """A DHCP server learns the hostname, of systemd-networkd, though the lease was there before it
    was set.
    """
    if not pathlib.Path(machine.tree, 'lib/systemd/systemd-networkd').exists():
        raise Skipped('no systemd-networkd')
    machine.write(
        'etc/systemd/network/client.network',
        '[Match]\nName=client\n[Network]\nDHCP=ipv4\n' + NO_IPV6,
    )
    machine.write(
        'etc/systemd/network/server.network',
        '[Match]\nName=server\n[Network]\nAddress=10.0.0.1/24\n' + NO_IPV6,
    )
    wanted = machine.units / 'multi-user.target.wants/systemd-networkd.service'
    wanted.symlink_to('/lib/systemd/system/systemd-networkd.service')
    subprocess.run(
        ['ip', 'link', 'add', 'server', 'type', 'veth', 'peer', 'name', 'client'], check=True
    )
    try:
        with Azure() as host, DHCP('server') as dhcp:
            machine.boot(lambda up: dhcp.names[-1:] == ['web-1'] and not machine.enabled())
            assert machine.cut and len(host.posts()) == 1, (dhcp.names, host.requests)
        assert dhcp.names[0] == 'image', dhcp.names
    finally:
        subprocess.run(['ip', 'link', 'delete', 'server'], check=True)


class DHCP:
    """A DHCP server on an interface, for a single client: notes the hostnames that it is asked for
    an address with. It may be given more options to send.
    """

    def __init__(self, interface, more=()):
        self.names = []
        self.more = more
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode())
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        self.socket.bind(('', 67))

    def __enter__(self):
        threading.Thread(target=self.serve, daemon=True).start()
        return self

    def __exit__(self, *_):
        with contextlib.suppress(OSError):  # it is not connected, but this ends the recv
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()

    def serve(self):
        while True:
            try:
                request = self.socket.recv(4096)
            except OSError:
                return
            options, position = {}, 240  # behind the fixed part and the magic number
            while position < len(request) and request[position] not in (0, 255):
                code, length = request[position : position + 2]
                options[code] = request[position + 2 : position + 2 + length]
                position += 2 + length
            answer = {b'\1': b'\2', b'\3': b'\5'}.get(
                options.get(53)
            )  # DISCOVER: OFFER; REQUEST: ACK
            if answer is None:
                continue
            if answer == b'\5':
                self.names.append(options.get(12, b'').decode())
            us = socket.inet_aton('10.0.0.1')
            reply = b'\2' + request[1:16] + socket.inet_aton('10.0.0.2') + us + request[24:240]
            for code, value in (
                (53, answer),
                (54, us),
                (51, b'\0\0\x0e\x10'),
                (1, b'\xff\xff\xff\0'),
                (3, socket.inet_aton('10.0.0.254')),
                *self.more,
            ):
                reply += bytes([code, len(value)]) + value
            self.socket.sendto((reply + b'\xff').ljust(300, b'\0'), ('255.255.255.255', 68))


publish.drop_in = """[Service]
ExecStartPre=/bin/sh -c 'until cut -f 2 /proc/self/net/route | grep -q 00000000; do sleep .1; done'
"""  # a lease, as no other network is to be waited for
publish.steps = 'hostname publish ready disable'
password.steps = no_passwords.steps = recapture.steps = STEPS
again.steps = power_cut.steps = 'user password data hostname ready'
not_ready.steps = left_home.steps = 'user hostname ready'
for check in cloud_init, first_lines, default_prompts, all_prompts, match, pam_refuses:
    check.steps = STEPS
for check in in_usr, in_usr_alone, dropbear, busybox:
    check.steps = STEPS
for check in keys_elsewhere, late_home, groups, doas:
    check.steps = 'user hostname ready disable'
for check in sudo_rs, real_sudo:
    check.steps = 'user hostname ready'
busybox.drop_in = '[Service]\nEnvironment=AZURE_PROVISIONING_GROUPS=users\n'
groups.drop_in = '[Service]\nEnvironment=AZURE_PROVISIONING_GROUPS=adm,nobodys,users\n'
CHECKS = [
    *(keys, password, no_passwords, cloud_init, first_lines, default_prompts, all_prompts, match),
    *(in_usr, in_usr_alone, keys_elsewhere, late_home, left_home, pam_refuses, groups),
    *(real_sudo, sudo_rs, doas, dropbear, busybox),
    *(recapture, again, power_cut, not_ready, publish),
]
if __name__ == '__main__':
    main(__doc__, CHECKS, NEEDED)
