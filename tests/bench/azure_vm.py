"""VMs of the benchmark: a tree with an agent, booted beside an Azure host that any agent can use.

As in Azure, the VM has one network card, reaches the host only once it has a lease, and has a DVD.
"""

import json
import pathlib
import re
import shutil
import socket
import subprocess
import tempfile
import time

import boot_path  # noqa: F401  before the modules of the kit and of the boots
from host import ADDRESSES, Answer, Azure, children, good
from lib import VM_ID, Machine
from logins import DHCP

HERE = pathlib.Path(__file__).resolve().parent
OURS = ('py', 'sh')
UNITS = {  # those of each agent, on any release
    'none': [],
    'py': ['azure-provisioning.service'],
    'sh': ['azure-provisioning.service'],
    'cloud-init': [
        'cloud-init-main.service',
        'cloud-init-local.service',
        'cloud-init.service',
        'cloud-init-network.service',
        'cloud-config.service',
        'cloud-final.service',
    ],
    'waagent': ['walinuxagent.service', 'waagent.service'],
}
NOISE = ['apt-daily', 'apt-daily-upgrade', 'dpkg-db-backup', 'e2scrub_all', 'fstrim']  # timers
STUBBED = """\
- systemd runs as PID 1 in namespaces, on this machine's kernel. Azure's host is a fake one. The
  DHCP lease has the routes and the options that Azure's has.
- For all: DMI says that this is a VM of Azure; timers and consoles are masked; the machine-id is
  there; ifupdown with the release's DHCP client brings the network up. dhcpcd, on Debian 13, does
  not begin with a random wait (`nodelay`), nor ask for seconds who else has its address (`noarp`).
- For cloud-init and waagent alone: `systemd-detect-virt` says microsoft, as they refuse containers;
  the DVD is a folder, bound by a stub of `mount`; `eject` is a stub.
- cloud-init: `datasource_list: [Azure]`; `locale: false`, or it would generate a locale.
- waagent: `Provisioning.Agent=waagent`; its unit's `ConditionVirtualization` is taken away. The VM
  is to have an agent (`ProvisionGuestAgent`), so that it goes on to handle extensions, of which
  there are none.
"""
DMI = {
    'chassis_asset_tag': '7783-7084-3265-9085-8269-3286-77',
    'sys_vendor': 'Microsoft Corporation',
    'product_name': 'Virtual Machine',
    'product_serial': '0000-0000-0000-0000',
    'product_uuid': VM_ID,
}
CARD = '00:0d:3a:00:00:04'
HOST_PLUGIN = 32526  # a port that waagent asks
SETTLED = 10  # seconds after Ready, and after the last unit was started, that still count as boot
INSTANCE = json.loads((HERE / 'azure/instance.json').read_text())
KEY = INSTANCE['compute']['publicKeys'][0]['keyData']


def document(name):
    return Answer('body', (HERE / 'azure' / name).read_bytes())


def not_found():
    return Answer('http', b'HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n')


def leases():
    """The options of Azure's leases: routes to the host, and where the WireServer is."""
    router, wireserver = socket.inet_aton('10.0.0.1'), socket.inet_aton(ADDRESSES['wireserver'])
    routes = b'\0' + router
    for server in 'wireserver', 'imds':
        routes += b'\x20' + socket.inet_aton(ADDRESSES[server]) + router
    return [(121, routes), (245, wireserver)]


class Platform(Azure):
    """An Azure host with all that the agents ask for, and what each request was about."""

    def __init__(self, away=0):
        super().__init__(good(), ['wireserver'] if away else [])
        self.asked_for = []
        self.ready = None
        self.at_ready = lambda: None

    def come(self):
        """Have the WireServer listen, if it was away."""
        if 'wireserver' in self.away:
            self.listen('wireserver', (ADDRESSES['wireserver'], 80))
        self.listen('plugin', (ADDRESSES['wireserver'], HOST_PLUGIN))

    def answer(self, request):
        path, _, query = request.line.partition(' ')[2].partition('?')
        if request.server == 'imds':
            name, answer = imds(path, query)
        else:
            name, answer = self.wireserver_answer(path, query, request)
        with self.lock:
            self.asked_for.append((request.time, name))
        if b'<State>Ready<' in request.body and self.ready is None:
            self.at_ready()
            self.ready = request.time
        return answer

    def wireserver_answer(self, path, query, request):
        wanted = dict(each.partition('=')[::2] for each in query.split('&'))
        name = wanted.get('type') or wanted.get('comp') or path
        if (HERE / 'azure' / (name + '.xml')).exists():
            return name, document(name + '.xml')
        if name in ('goalstate', 'health'):
            return name, good()[name][0]
        if name in ('telemetrydata', 'roleProperties'):
            return name, good()['health'][0]
        return name, not_found()


def imds(path, query):
    """What a path of IMDS is called, and the answer: JSON, or a leaf as text."""
    words = path.split('/')[3:]
    name = 'IMDS ' + (words or ['instance'])[-1]
    found = INSTANCE
    for word in words:
        try:
            found = found[int(word) if isinstance(found, list) else word]
        except (KeyError, ValueError, IndexError):
            return name, not_found()
    if 'format=text' in query:
        if isinstance(found, list):
            found = '\n'.join('%d/' % number for number in range(len(found)))
        return name, Answer('body', found.encode())
    return name, Answer('body', json.dumps(found).encode())


class VM(Machine):
    """A tree as its packages left it, with an agent or none."""

    def __init__(self, agent, steps, tree, folder, away):
        self.agent, self.tree, self.away = agent, tree, away
        self.limit = 90 + away
        self.state = pathlib.Path(tempfile.mkdtemp(dir=folder))
        self.upper = self.state / 'upper'
        self.units = self.upper / 'etc/systemd/system'
        self.units.mkdir(parents=True)
        self.write('etc/machine-id', '0123456789abcdef0123456789abcdef\n')
        self.write('etc/hostname', 'image\n')
        self.write('etc/hosts', '127.0.0.1 localhost\n')
        self.write('etc/systemd/journald.conf.d/tests.conf', '[Journal]\nStorage=volatile\n')
        self.mask('console-getty.service', *['%s.timer' % name for name in NOISE])
        (self.state / 'vm').mkdir()
        for name, value in DMI.items():
            (self.state / 'vm' / name).write_text(value + '\n')
        shutil.copytree(str(HERE / 'image'), str(self.upper / 'azure-provisioning-tests'))
        for unit in self.upper.glob('azure-provisioning-tests/*.[sp]*'):
            unit.rename(self.units / unit.name)
        self.write(
            'etc/systemd/system/report.service.d/units.conf',
            '[Service]\nEnvironment="UNITS=%s"\n' % ' '.join(UNITS[agent]),
        )
        for unit in 'report.path', 'up.service':
            link = self.units / 'multi-user.target.wants' / unit
            link.parent.mkdir(exist_ok=True)
            link.symlink_to('/etc/systemd/system/' + unit)
        dhcpcd = pathlib.Path(tree, 'etc/dhcpcd.conf')
        if dhcpcd.exists():
            self.write('etc/dhcpcd.conf', dhcpcd.read_text() + 'noarp\nnodelay\n')
        if agent != 'cloud-init':  # which writes that itself
            self.write('etc/network/interfaces.d/eth0', 'auto eth0\niface eth0 inet dhcp\n')
        if agent in OURS:
            self.install(agent, steps)
            self.enable('azure-provisioning')
        elif agent != 'none':
            self.help()

    def help(self):
        """What cloud-init and waagent need to run here."""
        for name, folder in ('systemd-detect-virt', 'bin'), ('mount', 'sbin'), ('eject', 'bin'):
            text = (HERE / 'stubs' / name).read_text()
            self.write('usr/local/%s/%s' % (folder, name), text, 0o755)
        dvd = (HERE / 'azure/ovf-env.xml').read_text()
        self.write('azure-provisioning-tests/dvd/ovf-env.xml', dvd)
        self.write(
            'etc/cloud/cloud.cfg.d/95_benchmark.cfg', 'datasource_list: [ Azure ]\nlocale: false\n'
        )
        if self.agent == 'waagent':
            text = pathlib.Path(self.tree, 'etc/waagent.conf').read_text()
            text = re.sub('(?m)^Provisioning.Agent=.*$', 'Provisioning.Agent=waagent', text)
            self.write('etc/waagent.conf', text)
            for unit in UNITS['waagent']:
                drop_in = 'etc/systemd/system/%s.d/benchmark.conf' % unit
                self.write(drop_in, '[Unit]\nConditionVirtualization=\n')

    def start(self):
        """Start systemd in a network of its own, and move the card there."""
        wait = 'echo; read -r _; exec "$@" </dev/null'
        process = super().start('unshare', '--net', 'sh', '-c', wait, 'sh')
        process.stdout.readline()
        run('ip link set eth0 netns %d' % process.pid)
        process.stdin.close()  # it reads the end
        process.stdin = None
        self.process = process
        return process

    def measured_boot(self):
        """Boot, and return the report and what was measured from outside."""
        self.pid = self.network = self.came = self.figures = None
        run('ip link add az0 type veth peer name eth0 address ' + CARD)
        run('ip address add 10.0.0.1/24 dev az0')
        run('ip link set az0 up')
        with Platform(self.away) as self.host, DHCP('az0', leases()):
            self.host.at_ready = self.note_ready
            if not self.away:
                self.host.come()
            report = self.boot(self.look)
        assert self.figures, 'the boot ended before it was measured: %s' % report
        return report

    def look(self, up):
        """Called again and again while the system boots."""
        now = time.monotonic()
        if self.pid is None:
            self.pid = self.systemd()
        elif self.network is None and has_default_route(self.pid):
            self.network = now
        if self.away and self.came is None and now > self.began + self.away:
            self.host.come()
            self.came = now
        ready = 0 if self.agent == 'none' else self.host.ready
        is_over = up > SETTLED and ready is not None and now > ready + SETTLED
        if is_over and self.figures is None:
            self.measure()
        return False

    def systemd(self):
        """The pid of systemd, once it runs; its control group is then known, too."""
        for pid in children(self.process.pid):
            if read('/proc/%d/comm' % pid) == 'systemd\n':
                self.place = re.search('(?m)^0::(/[^/\n]+)', read('/proc/%d/cgroup' % pid)).group(1)
                return pid
        return None

    def used(self, unit=None):
        """The CPU time, in ms, of a unit's control group, or of the whole boot."""
        folder = '%s/cgroup%s' % (self.state, self.place)
        text = read(folder + ('/system.slice/%s' % unit if unit else '') + '/cpu.stat')
        return int((re.search('usage_usec ([0-9]+)', text) or [0, 0])[1]) / 1e3

    def note_ready(self):
        self.cpu_at_ready = sum(self.used(unit) for unit in UNITS[self.agent])

    def measure(self):
        """Note what the boot has cost until now, and have the system report and power off."""
        peaks = [0]
        for unit in UNITS[self.agent]:
            folder = '%s/cgroup%s/system.slice/%s' % (self.state, self.place, unit)
            for pid in read(folder + '/cgroup.procs').split():
                peak = re.search('VmHWM:\\s+([0-9]+)', read('/proc/%s/status' % pid))
                peaks.append(int(peak.group(1)) / 1024 if peak else 0)
        self.figures = {'boot_cpu': self.used(), 'living_memory': max(peaks)}
        pathlib.Path('/proc/%d/root/run/azure-provisioning-measured' % self.pid).touch()


def run(command):
    subprocess.run(command.split(), check=True)


def read(path):
    try:
        with open(path) as file:
            return file.read()
    except OSError:  # it is gone
        return ''


def has_default_route(pid):
    routes = [line.split() for line in read('/proc/%d/net/route' % pid).splitlines()]
    return any(route[1] == route[7] == '00000000' for route in routes)
