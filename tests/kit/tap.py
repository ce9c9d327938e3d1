"""Checks that tell what came of them in TAP, the Test Anything Protocol."""

import traceback


class Skipped(Exception):
    """A check that this machine does not allow; says why."""


def tell(what, check, *arguments):
    """Run a check of what it is to show, and print its line; return whether it passed or was
    skipped.
    """
    what = ' '.join(what.split())  # on one line
    try:
        check(*arguments)
    except Skipped as reason:
        what += ' # skip %s' % reason
    except Exception:  # whatever went wrong, the other checks are to run
        print(
            'not ok %s\n# %s' % (what, traceback.format_exc().strip().replace('\n', '\n# ')),
            flush=True,
        )
        return False
    print('ok ' + what, flush=True)
    return True


def measured(text, *values):
    """Print what a check measured."""
    print('# ' + text % values, flush=True)
