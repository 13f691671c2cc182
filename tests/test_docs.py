"""README.md and docs/: their Python runs, their tables are what the tools print, their commands
exist, and their links lead somewhere."""

import ast
import contextlib
import doctest
import inspect
import io
import re
import runpy
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from ohem_mm import OhemCrossEntropyLoss
from ohem_mm.config import config_path
from ohem_mm.presets import PRESETS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
CONFIGS = ROOT / "configs"
README = (ROOT / "README.md").read_text()
PAGES = {
    str(page.relative_to(ROOT)): page.read_text()
    for page in [
        *(ROOT / "README.md", ROOT / ".github" / "CONTRIBUTING.md"),
        *sorted(DOCS.glob("*.md")),
        *sorted(CONFIGS.rglob("*.md")),
    ]
}
every_page = pytest.mark.parametrize("page", PAGES)


def blocks(language, text):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def rows(text):
    """Cells of the rows of tables, without the lines under their heads."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if set("".join(row)) - set("-: ")]


# --- Python ------------------------------------------------------------------------------------


@every_page
def test_examples_give_what_they_show(page):
    test = doctest.DocTestParser().get_doctest(PAGES[page], {}, page, page, 0)
    runner = doctest.DocTestRunner()
    runner.run(test)
    assert runner.failures == 0
    if page in ("README.md", "docs/region.md"):
        assert runner.tries > 5


@every_page
def test_python_is_python(page):
    for block in blocks("python", PAGES[page]):
        if ">>>" not in block:
            ast.parse(block)


def test_plain_torch_example_runs():
    (example,) = (block for block in blocks("python", README) if "criterion" in block)
    names = {}
    exec(example, names)
    assert names["logits"].grad.abs().sum() > 0


def test_config_example_builds(tmp_path):
    mmengine = pytest.importorskip("mmengine")
    (example,) = (block for block in blocks("python", README) if "custom_imports" in block)
    base = config_path("quickstart/unet-tiny_1xb4-sampler-1k_scenes-96x192")
    path = tmp_path / "config.py"
    path.write_text(f"_base_ = {str(base)!r}\n{example}")
    assert mmengine.Config.fromfile(base).model.decode_head.sampler.type == "OHEMPixelSampler"
    head = mmengine.Config.fromfile(path).model.decode_head
    assert head.loss_decode == {
        "type": "OhemCrossEntropyLoss",
        "thresh": 0.7,
        "min_kept": 1 / 16,
    }
    assert head.sampler is None
    (other,) = (block for block in blocks("python", README) if block.startswith("loss_decode"))
    names = {}
    exec(other, names)
    shipped = config_path("quickstart/unet-tiny_1xb4-region-1k_scenes-96x192")
    head = mmengine.Config.fromfile(shipped).model.decode_head
    assert head.loss_decode == names["loss_decode"]


@every_page
def test_hooks_of_the_examples_build(page):
    pytest.importorskip("mmseg")
    from mmengine.registry import HOOKS

    for block in blocks("python", PAGES[page]):
        if "custom_hooks" in block and ">>>" not in block:
            names = {}
            exec(block.replace("_base_", "base"), names)
            assert names["custom_hooks"]
            for hook in names["custom_hooks"]:
                HOOKS.build(hook)


def test_a_config_for_ones_own_data(tmp_path, monkeypatch):
    pytest.importorskip("mmseg")
    from mmengine.config import Config
    from mmengine.dataset import pseudo_collate
    from mmengine.registry import DATASETS, MODELS, init_default_scope
    from PIL import Image

    from ohem_mm import cli
    from ohem_mm.cli.inspection import Inspector
    from ohem_mm.cli.labels import check_labels

    monkeypatch.chdir(tmp_path)
    (snippet,) = blocks("python", PAGES["docs/own_data.md"])
    (base,) = re.findall(r"ohem_mm\.config (\S+)", snippet)
    Path("mine_1xb4.py").write_text(snippet.replace("BASE", str(config_path(base))))
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for folder, suffix in (("images", "jpg"), ("labels", "png")):
            Path("data/mine", folder, split).mkdir(parents=True)
            shape = (300, 400, 3) if suffix == "jpg" else (300, 400)
            pixels = rng.integers(0, 3, shape, np.uint8)
            Image.fromarray(pixels).save(f"data/mine/{folder}/{split}/a.{suffix}")
    cfg = Config.fromfile("mine_1xb4.py")
    report = Inspector(cfg)
    assert [one for one in report.findings if one.severity != "note"] == []
    assert {(row.mines, row.rule) for row in report.rows} == {("yes", "OhemCrossEntropyLoss")}
    assert report.batch.pixels() == 4 * 256 * 256
    cli.check_datasets(cfg, ("train", "val", "test"))
    check_labels(cfg)
    init_default_scope("mmseg")
    sample = DATASETS.build(cfg.train_dataloader.dataset)[0]
    batch = MODELS.build(cfg.model.data_preprocessor)(pseudo_collate([sample]), training=True)
    assert batch["inputs"].shape == (1, 3, 256, 256)  # what the crop left smaller is padded
    sample = DATASETS.build(cfg.test_dataloader.dataset)[0]
    assert sample["data_samples"].gt_sem_seg.shape == (300, 400)


def test_the_sampler_is_taken_out_by_none():
    mmseg = pytest.importorskip("mmseg")
    from mmengine.config import Config

    from ohem_mm import cli
    from ohem_mm.cli.inspection import Inspector

    stdc = Path(mmseg.__file__).parent / ".mim/configs/stdc/stdc1_4xb12-80k_cityscapes-512x1024.py"
    if not stdc.is_file():
        pytest.skip("this mmseg does not ship its configs")
    cfg = Config.fromfile(stdc)
    ours = {"model.decode_head.loss_decode.type": "ohem_mm.OhemCrossEntropyLoss"}
    cli.apply_options(cfg, ours)
    assert "sampler-beside-loss" in {one.code for one in Inspector(cfg).findings}
    cli.apply_options(cfg, {"model.decode_head.sampler": cli.parse_value("None")})
    assert "sampler-beside-loss" not in {one.code for one in Inspector(cfg).findings}


# --- tables ------------------------------------------------------------------------------------


def printed_edge_table(capsys, *arguments):
    """The lines that the tool prints."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["edge_cases.py", *arguments])
        runpy.run_path(str(ROOT / "tools" / "edge_cases.py"), run_name="__main__")
    return capsys.readouterr().out.splitlines()


def test_edge_table_of_ohem_is_what_the_tool_prints(capsys):
    pytest.importorskip("mmseg.models")
    printed = printed_edge_table(capsys)
    shown = [line for line in PAGES["docs/presets.md"].splitlines() if line in printed]
    # mmseg 1.2.2 and its continuation differ in one row.
    differing = [line for line in printed if line not in shown]
    assert all(line.startswith("| class_weight + ignore |") for line in differing)
    assert len(shown) >= len(printed) - 1


def test_edge_table_of_overlap_losses_is_what_the_tool_prints(capsys):
    """Whole where all packages are installed; their columns are missing where they are not."""
    printed = printed_edge_table(capsys, "region")
    missing = [line for line in printed if line and not line.startswith("|")]
    assert all(line.startswith("Not installed: ") for line in missing)
    shown = PAGES["docs/region.md"].split("## Edge rules")[1].split("## Presets")[0]
    if not missing:
        assert "\n".join(printed) in shown
    columns = {cells[0]: cells[1:] for cells in zip(*rows(shown), strict=True)}
    printed_columns = list(zip(*rows("\n".join(printed)), strict=True))
    assert {cells[0]: cells[1:] for cells in printed_columns}.items() <= columns.items()
    assert len(printed_columns) + len(missing) == len(columns)


def test_every_setting_and_preset_is_documented():
    settings = README.split("## What the settings mean")[1].split("**A worked example.**")[0]
    for name in inspect.signature(OhemCrossEntropyLoss.__init__).parameters:
        if name not in ("self", "settings", "habits"):
            assert f"`{name}`" in settings, name
    for name in PRESETS:
        assert f"'{name}'" in PAGES["docs/presets.md"] or name == "textbook", name


@every_page
def test_accuracy_tables_are_taken_from_the_reports(page):
    own = re.sub(r"<!-- report: .*?<!-- end of report -->", "", PAGES[page], flags=re.DOTALL)
    marked = re.findall(r"^<!-- from: (\w+) -->\n((?:\|.*\n)+)", own, re.MULTILINE)
    assert own.count("\n| variant ") == len(marked), "a table without <!-- from: FOLDER -->"
    for folder, table in marked:
        reported = rows(PAGES[f"configs/{folder}/README.md"])
        head, *body = rows(table)
        assert head[0] == "variant"
        assert body
        for row in body:
            assert row in [other[: len(row)] for other in reported], row
    if page in ("README.md", "docs/accuracy.md"):
        assert len(marked) >= 2


def test_the_page_on_losses_shows_what_the_grid_reports():
    report = PAGES["configs/quickstart/README.md"].partition("<!-- report: when-it-pays -->")[2]
    tables = re.findall(r"^(.+), channels (\d+):\n\n((?:\|.*\n)+)", report, re.MULTILINE)
    cells = {}
    for title, channels, table in tables:
        (_, *iterations), *body = rows(table)
        for rare, *values in body:
            for name, value in zip(iterations, values, strict=True):
                cells[title, rare, channels, name.removeprefix("iterations ")] = value
    head, *body = rows(PAGES["docs/which_loss.md"])
    assert head[0] == "rare objects"
    assert len(body) == 8
    names = (
        "rare-class mIoU, plain CE",
        "mIoU, OHEM minus plain CE",
        "mIoU, CE + Dice minus plain CE",
    )
    for *cell, ce, ours, region in body:
        assert [ce, ours, region] == [cells[(name, *cell)] for name in names]


@every_page
def test_tables_of_time_and_memory_are_taken_from_the_records(page):
    pytest.importorskip("rich")
    from ohem_mm.bench.speed import report

    tables = re.findall(r"^\| (?:network \| )?provider .*\n(?:\|.*\n)+", PAGES[page], re.MULTILINE)
    if page in ("README.md", "docs/speed.md"):
        assert tables
    made = rows(report.tables(report.read(ROOT / "tools" / "benchmarks" / "loss.csv")))
    for table in tables:
        head, *body = rows(table)
        for row in body:
            row = row[head.index("provider") :]
            assert row in [other[: len(row)] for other in made], row


# --- commands ----------------------------------------------------------------------------------


@cache
def usage(tool, *subcommand):
    """What a tool prints when it is asked for help, in this process: imports take seconds."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", [str(ROOT / tool), *subcommand, "--help"])
        patch.setattr(sys, "path", [str((ROOT / tool).parent), *sys.path])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / tool), run_name="__main__")
    assert ended.value.code in (0, None)
    assert "usage:" in printed.getvalue()
    return printed.getvalue()


@every_page
def test_commands_name_files_and_configs_that_exist(page):
    for block in blocks("bash", PAGES[page]):
        for file in re.findall(r"\b(?:tools|tests|configs)/[\w/.-]+\.(?:py|sh)\b", block):
            assert (ROOT / file).is_file(), file
        folders = "|".join(folder.name for folder in CONFIGS.iterdir() if folder.is_dir())
        for name in re.findall(rf"(?<![\w/])(?:{folders})/[\w.-]+", block):
            assert (CONFIGS / name).is_file() or config_path(name).is_file(), name
        for start, names, end in re.findall(r"\b(tests/\w+)\{([\w,]+)\}(\*?\.py)", block):
            for name in names.split(","):
                assert list(ROOT.glob(f"{start}{name}{end}")), name


def test_the_tools_know_the_options_of_the_commands():
    pytest.importorskip("mmseg")
    for tool in (ROOT / "tools").rglob("*.py"):
        usage(str(tool.relative_to(ROOT)))
    code = [block for text in PAGES.values() for block in blocks("bash", text)]
    code += [line for text in PAGES.values() for line in re.findall(r"(?<!`)`(python[^`]+)`", text)]
    found = 0
    for line in "\n".join(code).replace("\\\n", " ").splitlines():
        for tool, rest in re.findall(r"python (tools/[\w/]+\.py)([^#&|;]*)", line):
            subcommand = re.findall(r"^ (run|report)\b", rest)
            for option in re.findall(r"(?<!\S)\[?(--[a-z][\w-]*)", rest):
                assert re.search(rf"{option}\b", usage(tool, *subcommand)), (tool, option)
                found += 1
    assert found > 30


def test_the_first_two_commands_stand_in_the_readme():
    assert re.findall(r"<!-- ci: (\w+) -->", README) == ["quickstart", "test"]


def test_every_lane_has_its_block():
    marks = [
        mark for text in PAGES.values() for mark in re.findall(r"<!-- ci: (\w+) -->\n```bash", text)
    ]
    assert len(marks) == len(set(marks))
    lanes = re.findall(r"^lane \w+ ([^#\n]*)", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert sorted(marks) == sorted(" ".join(lanes).split())


# --- links -------------------------------------------------------------------------------------


def anchors(text):
    """The anchors of a page's headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@cache
def shown():
    """The files that the built pages hold, by the list in docs/pages.py."""
    module = ast.parse((DOCS / "pages.py").read_text())
    assigned = {n.targets[0].id: n.value for n in module.body if isinstance(n, ast.Assign)}
    patterns = [n.value for n in ast.walk(assigned["SHOWN"]) if isinstance(n, ast.Constant)]
    return {path for pattern in patterns for path in ROOT.glob(pattern)}


@every_page
def test_links_lead_somewhere(page):
    files = shown()
    assert ROOT / page in files
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", PAGES[page]):
        file, _, anchor = target.partition("#")
        path = ((ROOT / page).parent / file).resolve() if file else ROOT / page
        assert path in files, f"{target}: not among the files of docs/pages.py"
        if anchor:
            assert anchor in anchors(path.read_text()), target


def test_every_page_of_the_docs_is_in_the_navigation_and_says_what_to_read_next():
    navigation = (DOCS / "mkdocs.yml").read_text()
    for page in DOCS.glob("*.md"):
        assert f"docs/{page.name}\n" in navigation, page.name
        assert "**Read next:**" in page.read_text().strip().splitlines()[-1] or (
            "**Read next:**" in "\n".join(page.read_text().strip().splitlines()[-3:])
        ), page.name


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 250
    assert len(README.split()) <= 1500
