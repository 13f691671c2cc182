"""Find the configs and tools that ship with ohem_mm, in a checkout or in a wheel.

``python -m ohem_mm.config --list`` prints the name of every config, and
``python -m ohem_mm.config NAME`` prints where one lies. The name of a tool
works too: ``python "$(python -m ohem_mm.config tools/train.py)" CONFIG``.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["UnknownConfigError", "config_path", "list_configs"]


class UnknownConfigError(FileNotFoundError):
    """No config or tool has the name that was asked for."""


def _root() -> Path:
    """The folder that holds ``configs/`` and ``tools/``."""
    package = Path(__file__).resolve().parent
    # A wheel carries both folders inside the package; in a checkout they lie beside it.
    return package / ".mim" if (package / ".mim" / "configs").is_dir() else package.parent


def list_configs() -> list[str]:
    """Names of all shipped configs, sorted, each relative to ``configs/`` and without ``.py``.

    The fragments under ``configs/_base_`` are left out: they are no runnable configs.
    """
    configs = _root() / "configs"
    names = (path.relative_to(configs).with_suffix("") for path in configs.rglob("*.py"))
    return sorted(name.as_posix() for name in names if name.parts[0] != "_base_")


def _list_tools() -> list[str]:
    """Names of all shipped tools; what the others share begins with an underscore."""
    root = _root()
    return sorted(
        path.relative_to(root).as_posix()
        for path in (root / "tools").rglob("*")
        if path.suffix in (".py", ".sh") and not path.name.startswith("_")
    )


def config_path(name: str) -> Path:
    """Resolve the name of a config (or shipped tool) to a file, from any working directory.

    Args:
        name: One of: the path of an existing file; a name relative to ``configs/``, with or
            without ``.py`` (``'quickstart/...'``, also ``'configs/quickstart/...'``); either of
            these behind ``ohem_mm::``; a shipped tool (``'tools/train.py'``).

    Returns:
        The absolute path of the file. A file that exists relative to the working directory
        wins over a shipped one of the same name.

    Raises:
        UnknownConfigError: Nothing has this name. The message lists the nearest names.
    """
    shipped = name.removeprefix("ohem_mm::")
    if shipped == name and Path(name).expanduser().is_file():
        return Path(name).expanduser().resolve()

    root = _root()
    is_tool = shipped.startswith("tools/")
    relative = shipped if is_tool else f"configs/{shipped.removeprefix('configs/')}"
    candidates = [root / relative] if is_tool else [root / relative, root / f"{relative}.py"]
    for candidate in candidates:
        if candidate.is_file():
            return candidate

    kind, known = ("tool", _list_tools()) if is_tool else ("config", list_configs())
    nearest = _nearest(shipped.removeprefix("configs/").removesuffix(".py"), known)
    hint = f"the nearest names are: {', '.join(nearest)}" if nearest else "no name is close to it"
    raise UnknownConfigError(
        f"no {kind} is called {name!r}; {hint} (python -m ohem_mm.config --list prints all configs)"
    )


def _nearest(name: str, known: Sequence[str], count: int = 3) -> list[str]:
    """The ``count`` known names closest to ``name``, by whole name, file name or a part of it."""
    base = name.rpartition("/")[2]

    def ratio(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, name, candidate).ratio()
        file = difflib.SequenceMatcher(None, base, candidate.rpartition("/")[2]).ratio()
        return max(whole, file, 0.5 * (name in candidate))

    close = [candidate for candidate in known if ratio(candidate) >= 0.5]
    return sorted(close, key=ratio, reverse=True)[:count]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: print all names, or the path of one. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m ohem_mm.config",
        description="Print where a shipped config or tool lies.",
    )
    parser.add_argument("name", nargs="?", help="a config (quickstart/...) or tool (tools/...)")
    parser.add_argument("--list", action="store_true", help="print the names of all configs")
    args = parser.parse_args(argv)
    if args.list == (args.name is not None):
        parser.error("give either a name or --list")
    if args.list:
        print("\n".join(list_configs()))
        return 0
    try:
        print(config_path(args.name))
    except UnknownConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
