"""What the compiler makes of the GPU kernels, and the time that a model gives them. No GPU needed.

Every kernel is compiled ahead of time for each machine, at both shapes of the GPU benchmark; the
machine code gives registers, spills, fences and instructions. Appends to benchmarks/kernels.csv.

    python tools/kernel_report.py                         # all machines, all shapes
    python tools/kernel_report.py --capabilities 90
    python tools/kernel_report.py --report                # tables from the records alone
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ohem_mm.bench.kernels import append, read, records, tables
from ohem_mm.errors import UserError, need
from ohem_mm.ops.triton.report import ASSUMPTIONS, MACHINES, missing, report

RECORDS = Path(__file__).resolve().parent / "benchmarks" / "kernels.csv"


def main(argv: Sequence[str]) -> None:
    """Compile, or read the records, and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--capabilities", nargs="+", type=int, choices=MACHINES, default=list(MACHINES)
    )
    parser.add_argument("--out", type=Path, default=RECORDS, help="records to append to")
    parser.add_argument("--report", action="store_true", help="compile nothing; read the records")
    args = parser.parse_args(argv)
    print(ASSUMPTIONS + "\n")
    if args.report:
        print(tables(read(args.out)))
        return
    need("triton", "test")
    for line in missing():
        print(line, file=sys.stderr)
    rows = records(report(args.capabilities), "python tools/kernel_report.py " + " ".join(argv))
    append(args.out, rows)
    print(tables(rows))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
