"""The speed benchmark, through ``tools/benchmark_loss.py``: values, records, tables."""

import csv
import importlib.util
import json
import subprocess
import sys

import pytest
import torch
from loading import load_tool

from ohem_mm.bench.speed import meter, problems, providers, report
from ohem_mm.config import config_path
from ohem_mm.errors import UserError

pytest.importorskip("mmseg")
pytest.importorskip("rich")

SHAPE = "2x5x32x48/8"
CHOSEN = ["fused", "portable", "eager", "sampler", "OhemCrossEntropy", "plain CE"]
QUICK = ["--device", "cpu", "--warmup", "1", "--repeats", "2"]


@pytest.fixture(scope="module")
def tool():
    return load_tool("benchmark_loss")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "records" / "loss.csv"


def config(row):
    return json.loads(row["config"])


def cells(text):
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line[2:-2].split(" | ")] for line in lines]
    return [row for row in rows if not row[0].startswith("---")]


def test_overlap_losses_have_the_values_that_their_formulas_say(tool, out, capsys):
    """A step is measured only after its value was checked in float64."""
    words = ["Dice", "Lovasz"]
    tool.main(["--shapes", SHAPE, "--providers", *words, *QUICK, "--out", str(out)])
    printed = capsys.readouterr()
    with out.open(newline="") as file:
        measured = {row["provider"] for row in csv.DictReader(file)}
    chosen = set(providers.choose_providers(words))
    assert len(chosen) == 7
    assert chosen.isdisjoint(providers.choose_providers(None))
    if importlib.util.find_spec("segmentation_models_pytorch") is None:
        chosen -= {"CE + smp DiceLoss"}
        left_out = "CE + smp DiceLoss is left out: it needs segmentation_models_pytorch"
        assert left_out in " ".join(printed.err.split())
    assert measured == chosen | {report.FLOOR}


def test_records_and_report(tool, out, capsys):
    command = ["--shapes", SHAPE, "--modes", "step", "backward", "--providers", *CHOSEN, *QUICK]
    tool.main([*command, "--out", str(out)])
    printed = capsys.readouterr()
    with out.open(newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    assert reader.fieldnames == report.COLUMNS
    chosen = providers.choose_providers(CHOSEN)
    assert len(chosen) == 7
    measured = {(r["provider"], r["mode"], r["metric"], config(r)["acc_seg"]) for r in rows}
    kinds = [("step", "time"), ("step", "memory"), ("backward", "time")]
    expected = {(p, *kind, acc) for p in chosen for kind in kinds for acc in (True, False)}
    expected -= {("ohem_mm fused hook", *kind, False) for kind in kinds}
    assert measured == expected | {(report.FLOOR, "step", "time", True)}
    assert len(rows) == len(measured)
    for row in rows:
        assert 0 < float(row["p20"]) <= float(row["p50"]) <= float(row["p80"])
        assert int(row["x"]) == 2 * 32 * 48
        assert config(row)["shape"] == SHAPE
        assert row["threads"] == str(torch.get_num_threads())
        assert row["command"].startswith("python tools/benchmark_loss.py --shapes")
    assert "fused hook is left out: a fused head always counts acc_seg" in " ".join(
        printed.err.split()
    )

    # The table is made from the records, those of the last run.
    assert printed.out.strip() == report.tables(rows)
    assert all(provider in printed.out for provider in chosen)
    later = [{**row, "timestamp": "2999", "p50": "1234"} for row in rows]
    report.append(out, later)
    assert report.read(out) == rows + later
    tool.main(["--report", "--out", str(out)])
    assert capsys.readouterr().out.strip() == report.tables(later)


def test_ratios(tool):
    def row(provider, metric, p50, shape="a", sweep="shape"):
        about = {"sweep": sweep, "shape": shape, "hard": 0.2, "acc_seg": True}
        row = dict.fromkeys(report.COLUMNS, "") | {"provider": provider, "metric": metric}
        return row | {"mode": "step", "p50": p50, "p20": 1, "p80": 300, "config": json.dumps(about)}

    rows = [
        row(providers.BASELINE, "time", 200.0),
        row(providers.BASELINE, "memory", 30),
        row("ours", "time", 8.0),
        row("ours", "memory", 3),
        row("ours", "time", 7.0, shape="b"),
    ]
    first, second = (cells(table) for table in report.tables(rows).split("\n\n**"))
    assert ["ours", "8 (1 to 300)", "25.00", "3", "10.00"] in first
    assert ["ours", "7 (1 to 300)", ""] in second
    assert report.tables(rows).count("20 % of the pixels hard") == 2


@pytest.mark.parametrize("what", ["loss", "acc_seg"])
@pytest.mark.parametrize("name", ["ohem_mm portable", "mmseg sampler top-k", "plain CE"])
def test_a_wrong_value_is_an_error(tool, out, monkeypatch, name, what):
    honest = providers.PROVIDERS[name]

    def build(problem, acc_seg):
        step = honest.build(problem, acc_seg)

        def wrong(logits):
            loss, seen = step(logits)
            return (loss * 1.001, seen) if what == "loss" else (loss, seen * 1.001)

        return wrong

    monkeypatch.setitem(providers.PROVIDERS, name, honest._replace(build=build))
    with pytest.raises(
        problems.WrongValueError, match=rf"{what}.* of {name} .* is \S+, but .* be \d"
    ):
        tool.main(["--shapes", SHAPE, "--providers", name, *QUICK, "--out", str(out)])
    assert not out.exists()


def test_nan_is_a_wrong_value(tool):
    with pytest.raises(problems.WrongValueError):
        problems.check("it", float("nan"), 1.0)


def test_a_backend_that_is_missing_is_left_out(tool, out, capsys):
    arguments = ["--shapes", SHAPE, "--providers", "triton", *QUICK, "--out", str(out)]
    tool.main(arguments)
    assert "ohem_mm triton is left out" in capsys.readouterr().err
    assert {row["provider"] for row in report.read(out)} == {report.FLOOR}


def test_peak_memory_of_known_tensors(tool):
    held = torch.zeros(1000)

    def run():
        first = torch.empty(2**18)
        second = torch.empty(2**17)
        del first
        third = torch.empty(2**16)
        return held, second, third

    assert meter.cpu_peak(run) == 4 * (2**18 + 2**17)


@pytest.mark.parametrize("shape", ["2x19x128x256/8", "2x4x64x64/1", "1x40x128x128/4"])
@pytest.mark.parametrize("hard", [0.1, 0.3])
def test_share_of_hard_pixels(tool, shape, hard):
    shape = problems.parse_shape(shape)
    problem = problems.make_problem(shape, "cpu", hard)
    assert problem.hard == pytest.approx(hard, abs=0.03)
    assert problem.logits.shape == (shape.n, shape.c, *shape.small)
    assert problem.labels.shape == (shape.n, shape.height, shape.width)


def test_sweeps_and_plots(tool, out, capsys):
    pytest.importorskip("matplotlib")
    arguments = ["--shapes", "1x5x64x128/8", "--sweep", "pixels", "kept", "--providers", "portable"]
    tool.main([*arguments, *QUICK, "--out", str(out), "--plot"])
    rows = [row for row in report.read(out) if row["provider"] == "ohem_mm portable"]
    pixels = [int(r["x"]) for r in rows if config(r)["sweep"] == "pixels" and r["metric"] == "time"]
    assert pixels == [64 * 128 // 4, 64 * 128]
    kept = [float(r["x"]) for r in rows if config(r)["sweep"] == "kept" and r["metric"] == "time"]
    assert kept == pytest.approx([0.02, 0.05, 0.1, 0.2, 0.5, 0.95], abs=0.02)
    plots = sorted(out.parent.glob("*.png"))
    assert [plot.name.split("-")[1] for plot in plots] == ["kept", "pixels"]
    assert all(plot.read_bytes().startswith(b"\x89PNG") for plot in plots)
    printed = capsys.readouterr().out
    assert ["pixels", "ohem_mm portable", "byte floor"] in cells(printed)
    assert all(plot.name in printed for plot in plots)


def test_iterations(tool, out):
    arguments = ["--modes", "iteration", "--networks", "segformer_mit-b0", "--image", "1x64x64"]
    words = ["--providers", "plain CE", "fused", "top-k"]
    tool.main([*arguments, *words, *QUICK, "--out", str(out)])
    rows = report.read(out)
    assert {(r["kernel"], r["mode"], r["metric"]) for r in rows} == {
        ("segformer_mit-b0", "iteration", metric) for metric in ("time", "memory")
    }
    chosen = {"plain CE", "ohem_mm fused hook", "mmseg sampler top-k"}
    assert {r["provider"] for r in rows} == chosen
    assert {config(r)["shape"] for r in rows} == {"1x64x64"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "2x19x64"], "expected NxCxHxW/stride or one of cityscapes-s8"),
        (["--shapes", "2x1x64x64/8"], "2 to 254 classes"),
        (["--image", "64x64"], "expected NxHxW"),
        (["--device", "tpu"], "--device must be cpu or cuda, but got 'tpu'"),
        (["--repeats", "0"], "must be at least 1"),
        (["--providers", "nobody"], "no provider is called 'nobody'; there are ohem_mm"),
        (["--report", "--out", "nowhere.csv"], "no records at 'nowhere.csv'"),
    ],
)
def test_mistakes_end_in_one_sentence(tool, capsys, arguments, message):
    with pytest.raises((SystemExit, UserError)) as error:
        tool.main(arguments)
    assert message in f"{error.value} {capsys.readouterr().err}"


def test_records_of_another_form_are_refused(tool, out):
    out.parent.mkdir()
    out.write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="the columns of"):
        report.append(out, [])
    assert out.read_text() == "a,b\n1,2\n"


def test_the_committed_records_make_the_table_of_the_pages():
    root = config_path("tools/train.py").parents[1]
    pages = [root / "README.md", *root.glob("docs/**/*.md")]
    shown = [row for page in pages for row in cells(page.read_text())]
    text = report.tables(report.read(root / "tools" / "benchmarks" / "loss.csv"))
    (made,) = (t for t in text.split("\n\n**") if "head_step, step, 2x19x512x1024/8" in t)
    step = [row for row in cells(made) if row[0] not in ("provider", report.FLOOR)]
    assert len(step) >= 9
    assert all(row in shown for row in step)


def test_without_openmmlab_what_needs_it_is_left_out(out):
    arguments = ["--shapes", SHAPE, "--providers", "portable", "plain CE", *QUICK]
    code = (
        "import runpy, sys; sys.modules['mmengine'] = sys.modules['mmseg'] = None; "
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", code, config_path("tools/benchmark_loss.py"), *arguments]
    command += ["--out", out]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "plain CE is left out: it needs mmseg" in " ".join(done.stderr.split())
    assert [row[0] for row in cells(done.stdout)] == ["provider", "ohem_mm portable", "byte floor"]
