"""The error that ends a tool in one sentence."""

import importlib.util


class UserError(Exception):
    """A mistake that the user can mend; its message is one sentence that says how."""


def need(package: str, extra: str = "bench") -> None:
    """Check that a package that only some tools need is installed.

    Raises:
        UserError: It is not; the message names the command that installs it.
    """
    if importlib.util.find_spec(package) is None:
        raise UserError(f"this needs {package}; install it with: pip install 'ohem-mm[{extra}]'")
