"""The cells of the tables of edge cases: those on record, and those of packages as installed."""

import json
from pathlib import Path

import pytest

from ohem_mm.bench.edge_cases import ohem as edge_cases

DOCS = (Path(__file__).parents[1] / "docs" / "presets.md").read_text()


def test_paddleseg_restated_in_the_edge_cases():
    recorded = json.loads(edge_cases.RECORD.read_text())["cells"]
    assert list(recorded) == list(edge_cases.cases())
    for name, case in edge_cases.cases().items():
        if recorded[name].startswith("raises"):
            assert name in ("out_channels=1", "fp16 saturation")  # errors of Paddle's kernels
        else:
            assert edge_cases.cell(edge_cases.restated("paddleseg"), case) == recorded[name], name


def test_nnunet_itself_in_the_edge_cases():
    pytest.importorskip("nnunetv2.training.loss.robust_ce_loss")
    for name, case in edge_cases.cases().items():
        (row,) = (line for line in DOCS.splitlines() if line.startswith(f"| {name} | "))
        assert row.strip("| ").split(" | ")[-1] == edge_cases.cell(edge_cases.nnunet, case), name
