"""The gallery of the hardest images, through ``tools/show_hard_pixels.py``."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("mmseg")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

import torch
from loading import load_tool
from marks import slow
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from PIL import Image

from ohem_mm import cli
from ohem_mm.config import config_path
from ohem_mm.visualization import MINED

pytestmark = pytest.mark.usefixtures("elsewhere")

OHEM = "quickstart/unet-tiny_1xb4-ohem-1k_scenes-96x192"
CE = "quickstart/unet-tiny_1xb4-1k_scenes-96x192"
SMALL = [
    f"{split}_dataloader.{setting}"
    for split in ("train", "val", "test")
    for setting in ("dataset.num_scenes=5", "num_workers=0", "persistent_workers=False")
]
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Weights that a few steps of training could have made: random, but not all zero."""
    torch.manual_seed(0)
    config = Config.fromfile(config_path(CE))
    init_default_scope("mmseg")
    model = MODELS.build(config.model)
    model.init_weights()
    torch.nn.init.normal_(model.decode_head.conv_seg.weight, std=0.5)
    path = tmp_path_factory.mktemp("weights") / "x.pth"
    torch.save({"state_dict": model.state_dict(), "meta": {}}, path)
    return str(path)


@pytest.fixture
def tool(monkeypatch, capsys):
    """Run the tool in this process; return its exit code and what it wrote."""

    def call(*arguments, options=()):
        options = ["--cfg-options", *SMALL, *options]
        monkeypatch.setattr(sys, "argv", ["show_hard_pixels", *map(str, arguments), *options])
        code = cli.run(load_tool("show_hard_pixels").main)
        return code, *capsys.readouterr()

    return call


def cards(page):
    """What the page says of each image: hardness, mined share, name."""
    found = re.findall(r'data-hardness="(.*?)" data-kept="(.*?)" data-name="(.*?)"', page)
    return [(float(hardness), float(kept), name) for hardness, kept, name in found]


def test_gallery(tool, tmp_path, checkpoint):
    code, out, _ = tool(OHEM, checkpoint, "--out-dir", tmp_path / "out", "--num-images", 3)
    assert code == 0
    assert "Mined as by the loss of decode_head: thresh 0.7, min_kept 0.0625, pool batch." in out
    page = (tmp_path / "out" / "index.html").read_text()
    assert "5 images" in page
    shown = cards(page)
    assert len(shown) == 3
    assert shown == sorted(shown, reverse=True)
    # The hardest of all five images, not the first three.
    tool(OHEM, checkpoint, "--out-dir", tmp_path / "all", "--num-images", 9)
    everything = cards((tmp_path / "all" / "index.html").read_text())
    assert len(everything) == 5
    assert everything[:3] == shown
    assert [name for *_, name in everything] != sorted(name for *_, name in everything)

    files = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert files == [f"{i:03d}_{name}" for i, (*_, name) in enumerate(shown, 1)]
    for file in files:
        picture = np.asarray(Image.open(tmp_path / "out" / file))
        assert (picture == MINED).all(2).sum() > 1000
    assert page.count('<img src="data:image/webp;base64,') == 3 * 5 + 1
    assert not re.search(r"(src|href)=\"(?!data:|\d{3}_)", page)
    assert "http" not in page.replace("http-equiv", "")


def test_class_shares_add_up(tool, tmp_path, checkpoint):
    _, out, _ = tool(OHEM, checkpoint, "--out-dir", tmp_path)
    rows = re.findall(r"│ (\w+) +│ +([\d.]+)% │ +([\d.]+)% │ +([\d.]+)% │", out)
    assert len(rows) > 5
    pixels, mined, of_class = np.array([row[1:] for row in rows], float).T
    assert pixels.sum() == pytest.approx(100, abs=0.6)
    assert mined.sum() == pytest.approx(100, abs=0.6)
    assert list(of_class) == sorted(of_class, reverse=True)
    share = float(
        re.search(r"([\d.]+) % of their labelled", (tmp_path / "index.html").read_text())[1]
    )
    np.testing.assert_allclose(of_class * pixels / share, mined, rtol=0.1, atol=0.3)


def test_no_images_leaves_out_the_data(tool, tmp_path, checkpoint):
    tool(OHEM, checkpoint, "--out-dir", tmp_path, "--no-images", "--first", 2, "--split", "test")
    page = (tmp_path / "index.html").read_text()
    assert len(cards(page)) == 2
    assert set(re.findall(r"<figcaption>(.*?)</figcaption>", page)) == {
        "prediction",
        "loss",
        "mined pixels",
    }
    assert "Photographs and labels are left out" in page


def test_nothing_of_an_earlier_run_remains(tool, tmp_path, checkpoint):
    folder = tmp_path / "out"
    folder.mkdir()
    for name in ("001_holiday.png", "mine.png"):  # not ours: no page lies beside it
        (folder / name).write_bytes(b"x")
    tool(OHEM, checkpoint, "--out-dir", folder, "--num-images", 3)
    assert len(list(folder.glob("*.png"))) == 5
    (folder / "001_holiday.png").unlink()
    tool(OHEM, checkpoint, "--out-dir", folder, "--no-images", "--num-images", 1)
    (picture,) = folder.glob("0*.png")
    page = (folder / "index.html").read_text()
    assert picture.name in page
    assert (folder / "mine.png").exists()


def test_train_split_is_read_without_augmentation(tool, tmp_path, checkpoint):
    pages = []
    for _ in range(2):
        code, *_ = tool(OHEM, checkpoint, "--out-dir", tmp_path, "--split", "train")
        assert code == 0
        pages.append(cards((tmp_path / "index.html").read_text()))
    assert len(pages[0]) == 5
    assert pages[0] == pages[1]


def test_other_losses_are_mined_by_the_defaults(tool, tmp_path, checkpoint):
    code, out, _ = tool(CE, checkpoint, "--first", 1)
    assert code == 0
    assert "The config has no OhemCrossEntropyLoss; mined by its defaults: thresh 0.7" in out
    assert (tmp_path / "work_dirs" / CE.split("/")[1] / "hard_pixels" / "index.html").is_file()


def test_floor_in_pixels_is_divided_by_the_batch_size(tool, tmp_path, checkpoint):
    options = ["model.decode_head.loss_decode.min_kept=8000"]
    _, out, _ = tool(OHEM, checkpoint, "--first", 1, options=options)
    assert "its min_kept is that of a batch of 4 divided: 2000." in out


def test_mistakes_end_in_one_sentence(tool, tmp_path, checkpoint):
    for arguments, message in (
        ((OHEM, "no.pth"), "there is no checkpoint 'no.pth'"),
        ((OHEM, checkpoint, "--num-images", 0), "--num-images must be at least 1, but got 0"),
        ((OHEM, checkpoint, "--first", -1), "--first must be at least 1, but got -1"),
    ):
        code, _, err = tool(*arguments)
        assert code == 2
        assert err.startswith("error: ")
        assert message in err

    state = torch.load(checkpoint)["state_dict"]
    name = "decode_head.conv_seg.weight"
    for changed, message in (
        ({key: value for key, value in state.items() if key != name}, f"it has no {name}"),
        ({**state, name: state[name][:4]}, f"size mismatch for {name}"),
    ):
        torch.save(changed, tmp_path / "bad.pth")
        code, _, err = tool(OHEM, "bad.pth")
        assert code == 2
        assert err.splitlines()[-1].startswith("error: the checkpoint 'bad.pth' does not fit")
        assert message in err


PROBE = """
<pre id="probe"></pre>
<script>
  const report = {}, read = () => [...document.querySelectorAll("article")];
  const names = () => read().filter((card) => !card.hidden).map((card) => card.dataset.name);
  const set = (id, value) => {
    const box = document.getElementById(id);
    box.value = value;
    box.dispatchEvent(new Event("input", { bubbles: true }));
  };
  addEventListener("load", () => {
    const images = [...document.images];
    report.images = images.length;
    report.broken = images.filter((image) => !image.naturalWidth).map((image) => image.alt);
    report.wide = document.documentElement.scrollWidth - innerWidth;
    report.hardness = read().map((card) => Number(card.dataset.hardness));
    set("sort", "name");
    report.byName = names();
    set("sort", "kept");
    report.kept = read().map((card) => Number(card.dataset.kept));
    set("find", read()[1].dataset.name);
    report.found = names();
    set("find", "no such thing");
    report.none = names();
    set("find", "");
    report.background = getComputedStyle(document.body).backgroundColor;
    console.log("probe ran");
    document.getElementById("probe").textContent = JSON.stringify(report);
  });
</script>
"""


def browse(page, *options):
    """Open a page in a browser without a window; return its DOM and what it logged."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"needs one of these on the PATH: {', '.join(BROWSERS)}")
    result = subprocess.run(
        [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--enable-logging=stderr",
            "--virtual-time-budget=10000",
            f"--user-data-dir={page.parent / 'profile'}",
            *options,
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    return result.stdout, [line for line in result.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.parametrize(("width", "light"), [(1400, True), slow(500, False)])
def test_gallery_in_a_browser(tool, tmp_path, checkpoint, width, light):
    tool(OHEM, checkpoint, "--out-dir", tmp_path)
    page = tmp_path / "index.html"
    text = page.read_text()
    shown = cards(text)
    probe = tmp_path / "probe.html"
    probe.write_text(text.replace("</body>", PROBE + "</body>"))
    options = [f"--window-size={width},2600", f"--blink-settings=preferredColorScheme={light:d}"]
    dom, console = browse(probe, *options, "--dump-dom")
    # The browser's log is heard, and holds what the probe says but no error or refused request.
    assert len(console) == 1
    assert "probe ran" in console[0]
    report = json.loads(re.search(r'<pre id="probe">(.+?)</pre>', dom)[1])
    assert report["images"] == 5 * 5 + 1
    assert report["broken"] == []
    assert report["wide"] <= 0
    assert report["hardness"] == sorted((hardness for hardness, *_ in shown), reverse=True)
    assert report["byName"] == sorted(name for *_, name in shown)
    assert report["kept"] == sorted((kept for _, kept, _ in shown), reverse=True)
    assert len(report["found"]) == 1
    assert report["none"] == []
    assert report["background"] == ("rgb(255, 255, 255)" if light else "rgb(22, 22, 22)")

    picture = tmp_path / "screen.png"
    browse(page, *options, f"--screenshot={picture}")
    pixels = np.asarray(Image.open(picture).convert("RGB")).reshape(-1, 3).astype(int)
    assert (abs(pixels - MINED).max(1) < 8).sum() > 1000
    bright = (pixels.mean(1) > 200).mean()
    assert bright > 0.5 if light else bright < 0.3
