"""Options that the tools share, and how the values of ``--cfg-options`` are read."""

from __future__ import annotations

import argparse
import ast
from typing import Any

from mmengine.config import DictAction


def _key_value(text: str) -> str:
    """Check the form of one --cfg-options argument."""
    if not text.partition("=")[0] or "=" not in text:
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text!r}")
    return text


class ConfigOptions(DictAction):  # type: ignore[misc]
    """mmengine's ``--cfg-options``, which takes paths with blanks and dicts as well.

    mmengine removes every blank. Here only those around an element go, and a value in quotes of
    its own (``data_root="'a, b'"``) is taken as it is.
    """

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        """Parse the values of one ``--cfg-options`` and add them to those before."""
        options = dict(getattr(namespace, self.dest, None) or {})
        for pair in values or ():
            key, _, text = pair.partition("=")
            try:
                options[key] = parse_value(text)
            except ValueError as error:
                parser.error(f"--cfg-options {key}: {error}")
        setattr(namespace, self.dest, options)


def parse_value(text: str) -> Any:
    """The value that a text on the command line stands for; ValueError where it stands for none.

    A number, ``true``, ``None``, a bare word or path; ``[a,b]``, ``a,b`` or ``(a,b)``;
    ``dict(type=X,n=3)``, as configs write it, or ``{'type': 'X'}``. All may be nested.
    """
    text = text.strip()
    if len(text) > 1 and text[0] in "'\"" and text[1:].find(text[0]) == len(text) - 2:
        inner = text[1:-1].strip()
        # Some shells leave the quotes of key="[a,b]" to the program.
        return parse_value(inner) if inner.startswith(("[", "(")) else text[1:-1]
    if text.startswith("{"):
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError):
            raise ValueError(f"{text!r} is not a dict") from None
    if text.startswith("dict(") and text.endswith(")"):
        pairs = [part.partition("=") for part in _split(text[5:-1])]
        if not all(key.strip().isidentifier() and equals for key, equals, _ in pairs):
            raise ValueError(f"{text!r} is not a dict: write dict(type=NAME, key=value)")
        return {key.strip(): parse_value(value) for key, _, value in pairs}
    parts = _split(text)
    if parts == [text] and text[:1] in ("[", "("):
        if text[-1] != {"[": "]", "(": ")"}[text[0]]:
            raise ValueError(f"{text!r} opens a bracket that it does not close")
        values = [parse_value(part) for part in _split(text[1:-1])]
        return values if text[0] == "[" else tuple(values)
    if parts != [text]:
        return [parse_value(part) for part in parts]
    return DictAction._parse_int_float_bool(text)


def _split(text: str) -> list[str]:
    """The parts between the commas that lie in no brackets and no quotes."""
    parts, depth, quote, begin = [], 0, "", 0
    before = ","
    for place, char in enumerate(text):
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"" and before in ",=:([{":  # an apostrophe inside a word is none
            quote = char
        elif char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
        elif char == "," and depth == 0:
            parts.append(text[begin:place])
            begin = place + 1
        before = before if char == " " else char
    if text[begin:].strip():
        parts.append(text[begin:])
    return parts if depth == 0 and not quote else [text]


def add_config_argument(parser: argparse.ArgumentParser) -> None:
    """Add the config, as all tools that take one do."""
    parser.add_argument(
        "config",
        help="path of a config, or the name of a shipped one (quickstart/..., ohem_mm::...); "
        '"python -m ohem_mm.config --list" prints them all',
    )


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--cfg-options``, for tools that read a config and run in one process."""
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        default={},
        type=_key_value,
        action=ConfigOptions,
        metavar="KEY=VALUE",
        help="change settings of the config: model.decode_head.num_classes=12, a list as "
        'key="[a,b]" or key=a,b, an element of a list as model.auxiliary_head.0.channels=64. '
        "data_root=PATH moves every data set that lies in the data_root of the config.",
    )
    parser.set_defaults(launcher="none", local_rank=0, work_dir=None)


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that training and testing share, under mmseg's names."""
    add_config_options(parser)
    parser.add_argument(
        "--launcher",
        choices=["none", "pytorch", "slurm", "mpi"],
        help="how the processes were started (default: none, one process)",
    )
    # torch.distributed.launch passes one of these, depending on the version; torchrun neither.
    parser.add_argument("--local_rank", "--local-rank", type=int, help="set by some launchers")
