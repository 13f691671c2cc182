"""What tools say to the user: warnings, and the error that ends them in one sentence."""

import importlib.util
import os
import sys


class UserError(Exception):
    """A mistake that the user can mend; its message is one sentence that says how."""


def is_first_rank() -> bool:
    """Whether this is the first of all processes, known before they have met."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0))) == 0


def warn(text: str, kind: str = "warning") -> None:
    """Say something on stderr, once for all processes."""
    if is_first_rank():
        print(f"{kind}: {text}", file=sys.stderr)


def need(package: str, extra: str = "bench") -> None:
    """Check that a package that only some tools need is installed.

    Raises:
        UserError: It is not; the message names the command that installs it.
    """
    if importlib.util.find_spec(package) is None:
        raise UserError(f"this needs {package}; install it with: pip install 'ohem-mm[{extra}]'")
