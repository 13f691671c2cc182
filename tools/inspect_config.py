"""What a config mines, head by head, and what is wrong with it. Needs neither data nor a GPU.

    python tools/inspect_config.py CONFIG
    python tools/inspect_config.py CONFIG --json

It reads the config and builds no model. The exit status is 1 when there are errors or warnings, 0
when there are none (notes do not count), and 2 when the config cannot be read.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import logging
import sys
import warnings

from ohem_mm import cli

try:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from ohem_mm.cli.inspection import Inspector, sentence
except ImportError as error:
    print(f"error: {error}; install it with: pip install 'ohem-mm[mmseg,bench]'", file=sys.stderr)
    raise SystemExit(2) from None

COLOURS = {"error": "bold red", "warning": "bold yellow", "note": "bold blue"}


def _show(report: Inspector, console: Console) -> None:
    batch, pixels = report.batch, report.batch.pixels()
    gpus = f"{batch.gpus} GPUs, each with " if (batch.gpus or 1) > 1 else ""
    size = f"{batch.height}x{batch.width}" if batch.height else "unknown size"
    total = f" ({pixels:,} pixels)" if pixels else ""
    console.print(f"{report.name}: {gpus}{batch.images or '?'} images of {size}{total}")
    table = Table()
    for column in ("head", "loss", "mines", "thresh", "min_kept", "pixels", "share", "divided by"):
        right = column in ("thresh", "min_kept", "pixels", "share")
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    table.add_column("ignores", justify="right")
    table.add_column("fused")
    for row in report.rows:
        head, _, place = row.where.partition(".loss")
        number = place.rpartition(".")[2]
        table.add_row(
            head + (f", loss {number}" if number.isdigit() else "") + f"\n{row.head_type}",
            row.loss + ("" if row.rule in ("", row.loss) else f"\nwith {row.rule}"),
            row.mines,
            "" if not row.unit else "none" if row.thresh is None else f"{row.thresh:g}",
            ""
            if not row.unit
            else f"{_number(row.min_kept)}\nper {row.unit}"
            if row.unit != "valid"
            else f"{row.min_kept:g}\nof valid",
            _number(row.pixels),
            "" if row.share is None else f"{100 * row.share:.1f} %",
            row.divisor.replace(" pixels", "\npixels"),
            _number(row.ignore_index),
            {None: "", True: "yes", False: "no"}[row.fused],
        )
    console.print(table)
    for severity, code, where, what, remedy in report.findings:
        console.print(
            f"[{COLOURS[severity]}]{severity}[/] {code}: {escape(where)}: {escape(sentence(what))} "
            f"[italic]Remedy: {escape(sentence(remedy))}[/]",
            highlight=False,
        )
    if not report.findings:
        console.print("Nothing to find fault with.")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,}"


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description="Say what a config mines, head by head, and what is wrong with it.",
        epilog="Exit status: 0 nothing wrong (notes do not count), 1 errors or warnings, 2 the "
        "config cannot be read.",
    )
    cli.add_config_argument(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    cli.add_config_options(parser)
    return parser.parse_args()


def main() -> None:
    """Inspect one config."""
    args = parse_args()
    # Packages tell what they lack as they are imported; nobody asked this tool for it.
    logging.getLogger("mmengine").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = Inspector(cli.load_config(args))
    if args.json:
        whole = {
            "config": report.name,
            "batch": report.batch._asdict() | {"pixels": report.batch.pixels()},
            "losses": [dataclasses.asdict(row) for row in report.rows],
            "findings": [finding._asdict() for finding in report.findings],
        }
        print(json.dumps(whole, indent=2))
    else:
        console = Console()
        # Nothing is cut off in a file or a pipe: the table takes the width that it needs.
        _show(report, console if console.is_terminal else Console(width=1000))
    if any(finding.severity != "note" for finding in report.findings):
        raise SystemExit(1)


if __name__ == "__main__":
    sys.exit(cli.run(main))
