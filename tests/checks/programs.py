"""Hold programs against checks, in the sandbox, and tell in TAP what came of it.

hold_programs is what a module with such checks ends with.
"""

import sys

import kit_path  # noqa: F401  before the modules of the kit
import sandbox
from run import OURS
from tap import Skipped, tell


def hold_programs(checks, with_root=False):
    """Hold the programs of the command line, or else both scripts, against each check; end this
    process, with 1 if a check failed.

    checks: functions of a program. with_root: they give it a root of its own, and a default route.
    """
    refused = sandbox.refusal()
    programs = sys.argv[1:] or OURS
    print('1..%d' % (len(checks) * len(programs)), flush=True)
    passed = [
        tell('%s: %s' % (program, each.__doc__), hold, each, program, refused, with_root)
        for program in programs
        for each in checks
    ]
    sys.exit(0 if all(passed) else 1)


def hold(check, program, refused, with_root):
    """Hold a program against a check, where there is a sandbox to run it in."""
    if with_root and not refused:
        refused = sandbox.without_roots()
    if refused:
        raise Skipped(refused)
    if with_root:
        sandbox.default_route()
    check(program)
