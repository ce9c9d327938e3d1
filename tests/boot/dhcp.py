#!/usr/bin/env python3
"""First boots with real DHCP clients and a real server, for the step publish: python3
tests/boot/dhcp.py --tree TREE [PROGRAM]...

As boot.py. The machine's card is a veth, its other end is in a network namespace of its own, in
which dnsmasq serves a lease without an end, as Azure does. Each client gets its lease under the old
hostname, before the program begins. Prints a line a check, in TAP. Exit status: 0 all passed or
were skipped, 1. Needs root, systemd and iproute2, and in TREE dnsmasq and all five clients.
"""

import re
import signal
import subprocess
import threading

import kit_path  # noqa: F401  before the modules of the kit
from host import Answer, Azure, good
from lib import expect, main

NEEDED = [
    '/usr/sbin/dnsmasq',
    '/lib/systemd/systemd-networkd',
    '/usr/bin/nmcli',
    '/usr/sbin/dhcpcd',
    '/sbin/dhclient',
    '/usr/sbin/udhcpc',
    '/usr/bin/pgrep',
]
SERVER = """
echo waiting
read -r go
ip link set lo up
ip address add 10.0.0.1/24 dev server
ip link set server up
exec chroot "$1" dnsmasq --keep-in-foreground --log-facility=- --log-dhcp --port=0 --user=root \\
    --interface=server --bind-interfaces --dhcp-authoritative --leasefile-ro --pid-file= \\
    --dhcp-range=10.0.0.50,10.0.0.99,infinite --dhcp-option=option:router,10.0.0.1
"""
# A client as a service, which begins with the card up.
CLIENT = """[Service]
ExecStartPre=/bin/ip link set client up
{}
[Install]
WantedBy=multi-user.target
"""
NETWORK = '[Match]\nName={}\n[Network]\nDHCP=ipv4\nLinkLocalAddressing=no\nIPv6AcceptRA=no\n'
MANAGER = '[device]\nmatch-device=interface-name:*\nmanaged={}\n'
DHCLIENT = """Type=forking
ExecStart=/sbin/dhclient -4 -v -i -pf /run/dhclient.client.pid \\
    -lf /var/lib/dhcp/dhclient.client.leases -I client"""
UDHCPC = 'ExecStart=/usr/sbin/udhcpc -f -i client -x hostname:image'
DHCPCD = 'nodev\nallowinterfaces client\nnoipv6\n'  # there is no udev
MANAGER_LINE = 'nmcli has NetworkManager tell the DHCP server of client the hostname web-1'
UNTOLD = ' did not tell the DHCP server of client the hostname'
# Before the program begins there is a lease, and it has come to rest. Before and after it, outside
# of its sandbox: the address, the default route, and the processes of DHCP clients.
DROP_IN = """[Service]
ExecStartPre=+/bin/sh -c 'until ip -4 route show default | grep -q .; do sleep .1; done; sleep 2'
ExecStartPre=+/bin/sh /azure-provisioning-tests/state
ExecStopPost=+/bin/sh /azure-provisioning-tests/state
"""
STATE = """
echo "state: $(ip -4 -brief address show client) $(ip -4 route show default)" \\
    "$(pgrep -c -f '^([^ ]*/)?(dhclient|udhcpc) ')"
"""


class Server:
    """A DHCP server behind the card `client`: notes what it gave to which name."""

    def __init__(self, tree):
        self.tree, self.names, self.leases, self.silent = tree, {}, [], False

    def __enter__(self):
        command = ['unshare', '--net', 'sh', '-c', SERVER, 'sh', self.tree]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            universal_newlines=True,
        )
        assert self.process.stdout.readline() == 'waiting\n'
        ends = 'type veth peer name server netns %d' % self.process.pid
        subprocess.run(['ip', 'link', 'add', 'client', *ends.split()], check=True)
        self.process.stdin.write('go\n')
        self.process.stdin.flush()
        self.thread = threading.Thread(target=self.listen)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.thread.join()
        subprocess.run(['ip', 'link', 'delete', 'client'], stderr=subprocess.DEVNULL)

    def stop(self):
        """Have the server fall silent. If it ended, the card would go, too."""
        self.process.send_signal(signal.SIGSTOP)
        self.silent = True

    def listen(self):
        for line in self.process.stdout:
            name = re.search(r': (\d+) client provides name: (\S+)', line)
            lease = re.search(r': (\d+) DHCPACK\(server\) (\S+) ', line)
            if name:
                self.names[name.group(1)] = name.group(2)
            elif lease:
                self.leases.append((lease.group(2), self.names.get(lease.group(1), '')))


def learns(machine, client, line=''):
    """Assert that the server learns the new hostname for the same address, from this client, that
    the program says so, and that the machine's address, route and processes are what they were.
    """
    machine.write('azure-provisioning-tests/state', STATE)
    with Server(machine.tree) as server, Azure() as host:
        report = machine.boot()
    assert len(host.posts()) == 1, (report, server.leases)
    expect(report, {'enabled': 'disabled', 'kernel-hostname': 'web-1'})
    said = 'The DHCP server of client knows the hostname web-1, from ' + client
    assert (line or said) in report['journal'], (report, server.leases)
    names = [name for _, name in server.leases]
    assert names[0] in ('image', '') and names[-1] == 'web-1', server.leases
    assert len({address for address, _ in server.leases}) == 1, server.leases
    stays(report, server)


def stays(report, server):
    """Assert that address, route and processes are the same before and after the run."""
    states = [each for each in report['journal'] if each.startswith('state: ')]
    assert len(states) == 2 and len(set(states)) == 1, (report, server.leases)
    assert ' 10.0.0.' in states[0] and ' via 10.0.0.1 ' in states[0], report


def fails(machine, reason, silent=False):
    """Assert that the step fails with this reason, and that Azure is told; return what the boot
    reports, and the server. silent: the server answers no longer once the first lease is there.
    """
    machine.write('azure-provisioning-tests/state', STATE)
    # The hostname comes a second later, and the server has gone meanwhile.
    late = [
        Answer('http', b'HTTP/1.1 503 Wait\r\nContent-Length: 0\r\n\r\n'),
        Answer('body', b'web-1'),
    ]
    with Server(machine.tree) as server, Azure(good(computerName=late)) as host:

        def meanwhile(_):
            if silent and host.requests and not server.silent:
                server.stop()
            return False

        report = machine.boot(meanwhile)
    assert 'publish: ' + reason in report['journal'], (report, server.leases)
    assert [b'NotReady' in post.body for post in host.posts()] == [True], report
    assert 'web-1' not in [name for _, name in server.leases], server.leases
    return report, server


def is_run(machine, unit):
    """Have the machine run a unit that its tree has."""
    wants = machine.units / 'multi-user.target.wants'
    wants.mkdir(exist_ok=True)
    (wants / unit).symlink_to('/lib/systemd/system/' + unit)


def has_networkd(machine, card='client'):
    machine.write('etc/systemd/network/card.network', NETWORK.format(card))
    is_run(machine, 'systemd-networkd.service')


def has_manager(machine, managed='1'):
    machine.write('etc/NetworkManager/conf.d/tests.conf', MANAGER.format(managed))
    is_run(machine, 'NetworkManager.service')


def has_client(machine, service):
    machine.write('etc/systemd/system/client.service', CLIENT.format(service))
    machine.enable('client')


def networkd(machine):
    """The server learns the hostname from systemd-networkd."""
    has_networkd(machine)
    learns(machine, 'networkctl')


def manager(machine):
    """The server learns the hostname from NetworkManager."""
    has_manager(machine)
    learns(machine, 'nmcli', MANAGER_LINE)


def dhcpcd(machine):
    """The server learns the hostname from dhcpcd."""
    machine.write('etc/dhcpcd.conf', DHCPCD)
    is_run(machine, 'dhcpcd.service')
    learns(machine, 'dhcpcd')


def dhclient(machine):
    """The server learns the hostname from dhclient."""
    has_client(machine, DHCLIENT)
    learns(machine, 'dhclient')


def udhcpc(machine):
    """The server learns the hostname from BusyBox's udhcpc, though it was started with another."""
    has_client(machine, UDHCPC)
    learns(machine, 'udhcpc')


def networkd_of_two(machine):
    """systemd-networkd has the card, NetworkManager runs: systemd-networkd is asked."""
    has_networkd(machine)
    has_manager(machine, '0')
    machine.write('var/lib/dhcpcd/client.lease', 'of another machine')
    learns(machine, 'networkctl')


def manager_of_two(machine):
    """NetworkManager has the card, systemd-networkd another: NetworkManager is asked."""
    has_manager(machine)
    has_networkd(machine, 'other')
    learns(machine, 'nmcli', MANAGER_LINE)


def dhclient_of_two(machine):
    """dhclient has the card, systemd-networkd another: dhclient is asked."""
    has_client(machine, DHCLIENT)
    has_networkd(machine, 'other')
    learns(machine, 'dhclient')


def udhcpc_of_two(machine):
    """udhcpc has the card, NetworkManager runs: udhcpc is asked."""
    has_client(machine, UDHCPC)
    has_manager(machine, '0')
    learns(machine, 'udhcpc')


def single_dhcpcd(machine):
    """A dhcpcd for a single interface takes no hostname: the step fails, and nothing changes."""
    machine.write('etc/dhcpcd.conf', DHCPCD)
    has_client(machine, 'Type=forking\nExecStart=/usr/sbin/dhcpcd -q -b client')
    stays(*fails(machine, 'no known DHCP client has client'))


def silent_networkd(machine):
    """The server falls silent: the step says that systemd-networkd did not tell it."""
    has_networkd(machine)
    fails(machine, 'networkctl' + UNTOLD, silent=True)


def silent_dhclient(machine):
    """The server falls silent: the second dhclient does not take the lease for an answer."""
    machine.write('etc/dhcp/dhclient.conf', 'timeout 3;\nsend host-name = gethostname();\n')
    has_client(machine, DHCLIENT)
    stays(*fails(machine, 'dhclient' + UNTOLD, silent=True))


def silent_udhcpc(machine):
    """The server falls silent: the step says that udhcpc did not tell it."""
    has_client(machine, UDHCPC)
    stays(*fails(machine, 'udhcpc' + UNTOLD, silent=True))


CHECKS = [
    networkd,
    manager,
    dhcpcd,
    dhclient,
    udhcpc,
    networkd_of_two,
    manager_of_two,
    dhclient_of_two,
    udhcpc_of_two,
    single_dhcpcd,
    silent_networkd,
    silent_dhclient,
    silent_udhcpc,
]
for check in CHECKS:
    check.drop_in = DROP_IN
    check.steps = 'hostname publish ready disable'
if __name__ == '__main__':
    main(__doc__, CHECKS, NEEDED)
