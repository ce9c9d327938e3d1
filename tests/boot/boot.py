#!/usr/bin/env python3
"""First boots with a real systemd: python3 tests/boot/boot.py [--tree TREE [--openrc]] [PROGRAM]...

Each check boots a system in which `make install` has put a PROGRAM, py or sh; without one, both are
held. systemd runs as PID 1 in namespaces (container), on an overlay over TREE, without one over
this machine's own /. The Azure host has the addresses it has in Azure, on the lo of a network
namespace without a link. Prints a line a check, in TAP, and what was measured as comments. Exit
status: 0 all passed or were skipped, 1. Needs root, systemd and iproute2.
"""

import time

import kit_path  # noqa: F401  before the modules of the kit
from host import ADDRESSES, Azure, good, network
from lib import (
    BLOCK,
    FEW,
    GOOD_RUN,
    SILENT,
    Machine,
    expect,
    from_page,
    is_provisioned,
    lease,
    main,
    probed,
)
from run import PROJECT
from tap import Skipped, measured

SLOW = """[Unit]
Before=network.target
[Service]
Type=oneshot
ExecStart=/bin/sleep 2
[Install]
WantedBy=network.target
"""  # a network card that gets its lease late, as ifupdown waits for one
REDIRECT = """[Unit]
DefaultDependencies=no
Wants=network-pre.target
Before=network-pre.target sysinit.target
[Service]
Type=oneshot
ExecStart=/usr/bin/python3 /azure-provisioning-tests/redirect %s
StandardOutput=append:/dev/console
[Install]
WantedBy=multi-user.target
"""  # at the time at which the Guest Proxy Agent starts
READ_ONLY_ETC = """[Unit]
DefaultDependencies=no
Before=sysinit.target
[Service]
Type=oneshot
ExecStart=/bin/mount --bind /etc /etc
ExecStart=/bin/mount -o remount,bind,ro /etc
[Install]
WantedBy=sysinit.target
"""
IDLE = """#!/bin/sh
sleep 5
echo "enabled=$(systemctl is-enabled azure-provisioning)"
echo "reloads=$(journalctl --boot --output=cat _PID=1 | grep -c '^Reloading')"
echo 'reported=yes'
"""  # a report that does not ask again and again, which costs something, too
DROP_IN = 'etc/systemd/system/azure-provisioning.service.d/tests.conf'
NO_LOOPBACK = """[Service]
IPAddressAllow=
IPAddressAllow=168.63.129.16 169.254.169.254
Environment=AZURE_PROVISIONING_ATTEMPTS=1 AZURE_PROVISIONING_TIMEOUT=1
"""


def has_failed(report, *parts):
    """Assert that the unit failed, with these parts of a reason in the last line, stays enabled,
    and left the hostname alone.
    """
    expect(
        report,
        {
            'enabled': 'enabled',
            'kernel-hostname': 'image',
            'static-hostname': 'image',
            'azure-provisioning.service:ActiveState': 'failed',
        },
    )
    assert all(part in report['journal'][-1] for part in parts), report['journal']


def boots_again(machine):
    """Assert that another boot asks nothing and keeps the hostname."""
    with Azure() as host:
        report = machine.boot()
        assert not host.requests, host.requests
    assert report['kernel-hostname'] == report['static-hostname'] == ['web-1'], report


def first_boot(machine):
    """The first boot reports Ready, sets the hostname, disables the unit, and says so; the second
    asks nothing.
    """
    machine.write('etc/systemd/system/slow.service', SLOW)
    machine.enable('slow')
    with Azure() as host:
        report = machine.boot()
        is_provisioned(report, host.posts())
    ready = host.posts()[0].time
    assert 0 < ready < moment(report, 'network.target'), report
    measured('%s: Ready %.2f s after systemd was started', machine.program, ready - machine.began)
    said = [line for line in report['journal'] if not line.startswith('Removed ')]  # by systemctl
    assert said == GOOD_RUN, said
    boots_again(machine)


def cost(machine):
    """The unit costs little: the CPU time of a whole boot with it, and of one without it. It does
    not have systemd reload.
    """
    without = Machine(*machine.made_of)
    without.disable()
    costs = []
    for each in without, machine:
        each.write('azure-provisioning-tests/report', IDLE, 0o755)
        with Azure() as host:
            report = each.boot()
        expect(report, {'reloads': '0', 'enabled': 'disabled'})
        costs.append(each.cost())
    assert len(host.posts()) == 1, host.requests
    more = costs[1] - costs[0]
    measured(
        '%s: CPU of a boot %.0f ms, with the unit %.0f ms more', machine.program, costs[0], more
    )
    assert more < 250, costs  # on an idle machine 100 to 160


def late_network(machine):
    """The network comes when the login is there: so does Ready. Neither waits for the other, nor
    for another NIC.
    """
    network('del')
    came = []

    def meanwhile(up):
        if up > 2.5 and not came:
            network('add')
            came.append(time.monotonic())
            lease('add')

    with Azure() as host:
        report = machine.boot(meanwhile)
        is_provisioned(report, host.posts())
    is_prompt(machine, host, came, 'the network', 1)
    expect(
        report,
        {'network-online.target:ActiveState': 'inactive', 'getty.target:ActiveState': 'active'},
    )


# The waits are long here, so that it can only be the network that ends one.
late_network.drop_in = '[Service]\nEnvironment=AZURE_PROVISIONING_INTERVAL=60\n'


def mended_route(machine):
    """The default route leads nowhere at first, and packets get lost: Ready is reported some
    seconds after it leads to Azure.
    """
    network('del')
    lease('add')
    came = []

    def meanwhile(up):
        if up > 6 and not came:
            came.append(time.monotonic())
            network('add')

    with Azure() as host:
        report = machine.boot(meanwhile)
        is_provisioned(report, host.posts())
    assert 'ready: attempt 1 of 2400: goal state: timed out' in report['journal'], report
    is_prompt(machine, host, came, 'a route is mended', 5)


def late_wireserver(machine):
    """The WireServer comes after 15 seconds: Ready is reported then, without a second boot."""
    came = []

    def meanwhile(up):
        if time.monotonic() > machine.began + 15 and not came:
            host.listen('wireserver', (ADDRESSES['wireserver'], 80))
            came.append(time.monotonic())

    with Azure(away=['wireserver']) as host:
        is_provisioned(machine.boot(meanwhile), host.posts())
    is_prompt(machine, host, came, 'the WireServer', 2)
    boots_again(machine)


def is_prompt(machine, host, came, what, limit):
    """Assert that Ready was reported within so many seconds of something."""
    late = host.posts()[0].time - came[0]
    measured('%s: Ready %.2f s after %s', machine.program, late, what)
    assert 0 < late < limit, late


def proxy_agent(machine):
    """The Guest Proxy Agent redirects connections to both addresses to 127.0.0.1: the VM is Ready.
    Without loopback in the unit's IPAddressAllow= it would not be: "timed out".
    """
    network('del')
    with Azure(away=ADDRESSES) as host:
        port = host.listen('proxy', ('127.0.0.1', 0)).rpartition(':')[2]
        machine.write('etc/systemd/system/redirect.service', REDIRECT % port)
        machine.enable('redirect')
        machine.write(DROP_IN, NO_LOOPBACK)
        report = machine.boot()
        if report['redirect'] != ['on']:
            raise Skipped('no eBPF: %s' % report['redirect'])
        assert not host.requests, host.requests
        assert 'ready: attempt 1 of 1: goal state: timed out' in report['journal'], report
        machine.write(DROP_IN, '')
        is_provisioned(machine.boot(), host.posts())
    asked = {request.headers['Host'] for request in host.requests}
    assert asked == {ADDRESSES['wireserver'], ADDRESSES['imds']}, asked


def no_wireserver(machine):
    """Without a WireServer the unit fails and stays enabled; the next boot provisions."""
    with Azure(away=['wireserver']) as host:
        report = machine.boot()
        assert not host.requests, host.requests
    has_failed(report, 'ready: gave up after 3 attempts: ', '; is this a VM on Azure?')
    with Azure() as host:
        is_provisioned(machine.boot(), host.posts())


def no_imds(machine):
    """Without IMDS Ready is reported, the unit fails and stays enabled; another boot provisions."""
    with Azure(away=['imds']) as host:
        report = machine.boot()
        assert len(host.posts()) == 1, host.requests
    has_failed(report, 'hostname: gave up after 3 attempts: computerName: ')
    with Azure() as host:
        is_provisioned(machine.boot(), host.posts())


no_wireserver.drop_in = no_imds.drop_in = FEW


def time_limit(machine):
    """A run that does not end is ended: the unit fails and stays enabled."""
    with Azure(good(goalstate=SILENT)):
        expect(
            machine.boot(),
            {'enabled': 'enabled', 'azure-provisioning.service:ActiveState': 'failed'},
        )


time_limit.drop_in = '[Service]\nRuntimeMaxSec=3\n'


def power_cut(machine):
    """Everything is killed at each point between Ready and disabled: the next boot ends well."""

    def asked(what):
        return lambda up: any(what in request.line for request in host.requests)

    for answers, blocked, cut, again in (
        (good(health=SILENT), 'none', asked('health'), True),
        (good(computerName=SILENT), 'none', asked('computerName'), True),
        (good(), 'hostnamectl', asked('in-hostnamectl-set-hostname'), True),
        (good(), 'systemctl', asked('in-systemctl---no-reload'), True),
        (good(), 'none', lambda up: not machine.enabled(), False),
    ):
        machine.write('usr/local/sbin/' + blocked, BLOCK % blocked, 0o755)
        with Azure(answers) as host:
            machine.boot(cut)
            assert machine.cut and len(host.posts()) == 1, host.requests
        (machine.upper / 'usr/local/sbin' / blocked).unlink()
        assert machine.enabled() == again
        if again:
            with Azure() as host:
                is_provisioned(machine.boot(), host.posts())
        boots_again(machine)
        machine.write('etc/hostname', 'image\n')
        machine.enable('azure-provisioning')


def sandbox(machine):
    """Each directive of the unit's sandbox refuses, alone, what it is there for, and together they
    refuse all of it.
    """
    with Azure():
        probed(machine)


def no_bus(machine):
    """Without D-Bus the hostname cannot be set: the unit fails and says so."""
    machine.mask('dbus.socket', 'dbus.service')
    with Azure():
        has_failed(
            machine.boot(),
            "hostname: hostnamectl failed; cannot set the kernel's hostname"
            '; cannot write /etc/hostname',
        )


def no_bus_drop_in(machine):
    """Without D-Bus, the drop-in of docs/unit.md has the hostname set, and the unit disabled."""
    machine.mask('dbus.socket', 'dbus.service')
    with Azure() as host:
        is_provisioned(machine.boot(), host.posts())


no_bus_drop_in.drop_in = from_page('docs/unit.md', 'CapabilityBoundingSet=')


def read_only_etc(machine):
    """With a read-only /etc, the same drop-in has the kernel's hostname set on each boot. The unit
    fails, and says why.
    """
    machine.write('etc/systemd/system/read-only-etc.service', READ_ONLY_ETC)
    machine.enable('read-only-etc')
    for _ in 'first boot', 'second boot':
        with Azure() as host:
            report = machine.boot()
            assert len(host.posts()) == 1, host.requests
        expect(report, {'kernel-hostname': 'web-1', 'static-hostname': 'image'})
        expect(report, {'enabled': 'enabled', 'azure-provisioning.service:ActiveState': 'failed'})
        # hostnamectl of systemd 247 says the second time that it is done.
        assert report['journal'][-1] in (
            'hostname: hostnamectl failed; cannot write /etc/hostname'
            ', so web-1 lasts until the next boot',
            'disable: neither systemctl nor rc-update disabled azure-provisioning',
        ), report['journal']


read_only_etc.drop_in = no_bus_drop_in.drop_in


def elsewhere(machine):
    """With the drop-in of docs/unit.md, nothing is asked where the firmware is not Azure's, and the
    unit stays enabled, for a boot on Azure.
    """
    tag = machine.state / 'chassis_asset_tag'
    tag.write_text('No Asset Tag\n')
    with Azure() as host:
        report = machine.boot()
        assert not host.requests, host.requests
    expect(report, {'enabled': 'enabled', 'azure-provisioning.service:ActiveState': 'inactive'})
    tag.write_text('7783-7084-3265-9085-8269-3286-77\n')
    with Azure() as host:
        is_provisioned(machine.boot(), host.posts())


elsewhere.drop_in = from_page('docs/unit.md', 'ExecCondition=')


def other_steps(machine):
    """The drop-in of docs/unit.md for other steps has just these run."""
    with Azure() as host:
        report = machine.boot()
        assert len(host.requests) == 2, host.requests
    expect(report, {'enabled': 'disabled', 'static-hostname': 'image'})


other_steps.drop_in = from_page('docs/unit.md', 'ready disable')


def moment(report, unit):
    """When a unit became active, as time.monotonic() tells the time; 0 if it did not."""
    return int(report[unit + ':ActiveEnterTimestampMonotonic'][0]) / 1e6


def openrc(machine):
    """With OpenRC and the recipe's service, Ready is reported, the hostname set, the service taken
    from default.
    """
    service = (PROJECT / 'recipes/openrc/azure-provisioning').read_text()
    machine.write('etc/init.d/azure-provisioning', service, 0o755)
    for runlevel in 'sysinit', 'boot', 'default':
        (machine.upper / 'etc/runlevels' / runlevel).mkdir()
    (machine.upper / 'etc/runlevels/default/azure-provisioning').symlink_to(
        '/etc/init.d/azure-provisioning'
    )
    with Azure() as host:
        report = machine.boot()
        assert len(host.posts()) == 1, host.requests
    expect(report, {'enabled': '0', 'kernel-hostname': 'web-1', 'static-hostname': 'web-1'})
    assert [line for line in report['journal'] if line in GOOD_RUN] == GOOD_RUN, report
    with Azure() as host:
        expect(machine.boot(), {'static-hostname': 'web-1'})
        assert not host.requests, host.requests


CHECKS = [
    first_boot,
    cost,
    late_network,
    mended_route,
    late_wireserver,
    proxy_agent,
    no_wireserver,
    no_imds,
    time_limit,
    power_cut,
    sandbox,
    no_bus,
    no_bus_drop_in,
    read_only_etc,
    elsewhere,
    other_steps,
]
if __name__ == '__main__':
    main(__doc__, CHECKS, with_openrc=[openrc])
