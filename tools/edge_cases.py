"""Print the table of edge cases: what each implementation does where most of them break.

python tools/edge_cases.py           # OHEM; needs mmseg
python tools/edge_cases.py region    # overlap losses; those that are not installed are left out
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ohem_mm.bench.edge_cases import ohem, region
from ohem_mm.errors import UserError, need


def main(argv: Sequence[str]) -> None:
    """Run every implementation on every case and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("losses", nargs="?", choices=("ohem", "region"), default="ohem")
    losses = parser.parse_args(argv).losses
    if losses == "ohem":
        need("mmseg", "mmseg")
    print((ohem if losses == "ohem" else region).table())


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
