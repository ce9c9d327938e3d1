#!/usr/bin/env python3
"""Measure what the unit's sandbox takes of a first boot: python3 tests/bench/unit.py

Boots this machine's own system, below an overlay, with each script in its unit. Then systemd starts
/bin/true, again and again, in a plain unit and in the sandbox; the difference is what the sandbox
costs. All figures are systemd's CPUUsageNSec. Prints a table in Markdown. Exit status: 0, also if
it says that nothing could be run.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile

import boot_path  # noqa: F401  before the modules of the kit and of the boots
from host import Azure, network
from lib import UNSHARE, Machine, why_not

BOOTS, STARTS = 3, 20
PROGRAMS = ('py', 'sh')
DROP_IN = '[Service]\nExecStartPost=/bin/sh /azure-provisioning-tests/share\n'
# Without RemainAfterExit=, systemd forgets a unit that has ended, and its CPU time.
PLAIN = '[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/true\n'
SHARE = """\
systemctl show --property=CPUUsageNSec azure-provisioning.service | sed 's/^/unit:/'
for _ in $(seq %d); do
    for kind in plain sandboxed; do
        systemctl restart $kind.service
        systemctl show --property=CPUUsageNSec $kind.service | sed "s/^/$kind:/"
    done
done
""" % (STARTS + 1)  # the first one is for warmth


def boot(program, options):
    """Boot, and return the CPU, in ms, of the unit, and of /bin/true without and with a sandbox."""
    machine = Machine(program, options)
    text = (machine.units / 'azure-provisioning.service').read_text()
    sandbox = text.partition('# The sandbox')[2].partition('[Install]')[0]
    machine.write('etc/systemd/system/plain.service', PLAIN)
    machine.write('etc/systemd/system/sandboxed.service', PLAIN + '#' + sandbox)
    machine.write('etc/systemd/system/report.service.d/share.conf', DROP_IN)
    machine.write('azure-provisioning-tests/share', SHARE)
    with Azure():
        report = machine.boot()
    found = {
        kind: [int(value) / 1e6 for value in report[kind + ':CPUUsageNSec']]
        for kind in ('unit', 'plain', 'sandboxed')
    }
    assert len(found['sandboxed']) == STARTS + 1, report
    plain, sandboxed = (statistics.median(found[kind][1:]) for kind in ('plain', 'sandboxed'))
    return found['unit'][0], plain, sandboxed


def inside(options):
    subprocess.run(['mount', '-t', 'tmpfs', 'tmpfs', options.folder], check=True)
    network('add')
    print('\n### The unit, median of %d boots\n' % BOOTS)
    print('| | CPU of the unit, ms | /bin/true in the sandbox | in a plain unit | sandbox |')
    print('|---|---|---|---|---|')
    boots = {program: [] for program in PROGRAMS}
    for _ in range(BOOTS):
        for program in PROGRAMS:
            boots[program].append(boot(program, options))
    for program in PROGRAMS:
        unit, plain, sandboxed = map(statistics.median, zip(*boots[program]))
        share = sandboxed - plain
        print(
            '| .%s | %.0f | %.0f | %.0f | %.0f, %.0f %% of the unit |'
            % (program, unit, sandboxed, plain, share, 100 * share / unit)
        )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--inside', dest='folder')
    options = parser.parse_args()
    options.tree, options.openrc = '/', False
    if options.folder:
        inside(options)
        return
    refused = why_not(options, [])
    if refused:
        print('\nThe sandbox was not measured: %s.' % refused)
        return
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([*UNSHARE, sys.executable, __file__, '--inside', folder], check=True)


if __name__ == '__main__':
    main()
