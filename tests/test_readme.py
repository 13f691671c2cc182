"""README.md: its Python runs, its table is what the tool prints, its commands exist."""

import doctest
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ohem_mm.config import config_path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_worked_example():
    examples = [block for block in blocks("python") if ">>>" in block]
    assert examples
    for example in examples:
        parsed = doctest.DocTestParser().get_doctest(example, {}, "README", "README.md", 0)
        runner = doctest.DocTestRunner()
        runner.run(parsed)
        assert runner.failures == 0
        assert runner.tries > 5


def test_plain_torch_example_runs():
    (example,) = (block for block in blocks("python") if "criterion" in block)
    names = {}
    exec(example, names)
    assert names["logits"].grad.abs().sum() > 0


def test_config_example_builds(tmp_path):
    mmengine = pytest.importorskip("mmengine")
    (example,) = (block for block in blocks("python") if "custom_imports" in block)
    base = config_path("quickstart/unet-tiny_1xb4-1k_scenes-96x192")
    path = tmp_path / "config.py"
    path.write_text(f"_base_ = {str(base)!r}\n{example}")
    loss = mmengine.Config.fromfile(path).model.decode_head.loss_decode
    assert loss == {"type": "OhemCrossEntropyLoss", "thresh": 0.7, "min_kept": 1 / 16}


def test_edge_table_is_what_the_tool_prints():
    pytest.importorskip("mmseg.models")
    spec = importlib.util.spec_from_file_location("edge_cases", ROOT / "tools" / "edge_cases.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    printed = tool.table().splitlines()
    shown = [line for line in README.splitlines() if line in printed]
    # mmseg 1.2.2 and its continuation differ in one row.
    differing = [line for line in printed if line not in shown]
    assert all(line.startswith("| class_weight + ignore |") for line in differing)
    assert len(shown) >= len(printed) - 1


def test_every_setting_and_preset_is_documented():
    import inspect

    from ohem_mm import OhemCrossEntropyLoss
    from ohem_mm.presets import PRESETS

    table = README.split("## What the settings mean")[1].split("**A worked example.**")[0]
    for name in inspect.signature(OhemCrossEntropyLoss.__init__).parameters:
        if name not in ("self", "settings", "habits"):
            assert f"`{name}`" in table, name
    for name in PRESETS:
        assert f"'{name}'" in README or name == "textbook", name


def test_accuracy_tables_are_taken_from_the_reports():
    def rows(text):
        lines = [line for line in text.splitlines() if line.startswith("| ")]
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]

    shown = rows(README.split("## Accuracy")[1].split("\n## ")[0])
    first, rate, chase = (i for i, row in enumerate(shown) if row[0] == "variant")
    assert (first, rate, chase, len(shown)) == (0, 6, 9, 13)
    camvid = shown[1:rate] + shown[rate + 1 : chase]
    for folder, table in (("camvid", camvid), ("chase_db1", shown[chase + 1 :])):
        reported = rows((ROOT / "configs" / folder / "README.md").read_text())
        for row in table:
            assert row in [other[: len(row)] for other in reported], row


def test_commands_name_files_and_configs_that_exist():
    for block in blocks("bash"):
        for file in re.findall(r"\b(?:tools|tests|configs)/[\w/.-]+\.(?:py|sh)\b", block):
            assert (ROOT / file).is_file(), file
        for config in re.findall(r"\bquickstart/[\w.-]+", block):
            assert config_path(config).is_file()


def test_help_of_the_tools():
    pytest.importorskip("mmseg")
    tools = [
        *("train.py", "test.py", "dataset_converters/camvid.py", "benchmark_miou.py"),
        *("inspect_config.py", "choose_thresh.py", "show_hard_pixels.py"),
    ]
    for tool in tools:
        result = subprocess.run(
            [sys.executable, "-W", "ignore", str(ROOT / "tools" / tool), "--help"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        assert "usage:" in result.stdout
