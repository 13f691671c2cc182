"""The counts of hard pixels and ``tools/choose_thresh.py``, against direct computations."""

from __future__ import annotations

import csv
import math
import sys
from collections import OrderedDict

import pytest
import torch
from loading import load_tool
from tiny import CE, OPTIONS, save_checkpoint, tiny
from torch import nn
from torch.nn import functional as F

from ohem_mm.mining import keep_pixels
from ohem_mm.rule import OhemRule

pytest.importorskip("mmseg")
pytest.importorskip("rich")

from mmengine.registry import MODELS, DefaultScope, init_default_scope
from mmengine.runner import Runner, set_random_seed
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample

from ohem_mm import cli
from ohem_mm.cli import thresholds

pytestmark = pytest.mark.filterwarnings("ignore:Default ``avg_non_ignore``")
OHEM = "quickstart/unet-tiny_1xb4-ohem-1k_scenes-96x192"
SAMPLER = "quickstart/unet-tiny_1xb4-sampler-1k_scenes-96x192"


@pytest.fixture(scope="module")
def choose():
    return load_tool("choose_thresh")


@pytest.fixture
def call(choose, monkeypatch, capsys, tmp_path):
    """Run the tool in this process; return its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments, options=()):
        # A process of its own begins without a scope; tests before this one leave theirs.
        monkeypatch.setattr(DefaultScope, "_instance_dict", OrderedDict())
        arguments = [*map(str, arguments), "--cfg-options", *OPTIONS, *options]
        monkeypatch.setattr(sys, "argv", ["choose_thresh", *arguments])
        code = cli.run(choose.main)
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def direct(checkpoint, split, batches, seed=0):
    """Probability of the true class at every pixel, and the labels, batch by batch."""
    cfg, model = tiny(CE)
    model.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
    model.eval()
    loader = cfg.train_dataloader
    if split == "val":
        loader.dataset.split = "val"
    loader.dataset.num_scenes = 12 if split == "train" else 6
    loader.update(num_workers=0, persistent_workers=False, batch_size=2)
    set_random_seed(seed)
    found = []
    for data, _ in zip(Runner.build_dataloader(loader, seed=seed), range(batches), strict=False):
        data = model.data_preprocessor(data, True)
        with torch.no_grad():
            logits = model.decode_head(model.extract_feat(data["inputs"]))
        labels = torch.stack([sample.gt_sem_seg.data[0] for sample in data["data_samples"]])
        logits = F.interpolate(logits, labels.shape[1:], mode="bilinear")
        valid = labels != 255
        prob = logits.softmax(1).gather(1, torch.where(valid, labels, 0)[:, None])[:, 0]
        found.append((prob.double(), valid))
    return found


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("config", [CE, OHEM, SAMPLER])
def test_numbers_are_those_of_a_direct_computation(call, checkpoint, config, split):
    settings = ["--thresh", "0.05", "0.12", "--min-kept", "1/2", "9000", "--csv", "x.csv"]
    code, out, _ = call(config, checkpoint, "--num-batches", 3, "--split", split, *settings)
    assert code == 0
    assert f"6 images of {split} in batches of 2" in out
    batches = direct(checkpoint, split, 3)
    with open("x.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["thresh"], row["min_kept"]) for row in rows] == [
        (thresh, kept) for thresh in ("0.05", "0.12") for kept in ("0.5", "9000")
    ]
    for row in rows:
        assert (row["head"], row["pool"]) == ("decode_head", "batch")
        thresh = float(row["thresh"])
        valid = torch.tensor([int(v.sum()) for _, v in batches])
        hard = torch.tensor([int((p[v] < thresh).sum()) for p, v in batches])
        floor = valid // 2 if "." in row["min_kept"] else valid.clamp(max=int(row["min_kept"]))
        kept = torch.maximum(hard, floor).sum() / valid.sum()
        shares = (hard / valid).sort().values
        close = {"abs": 3 / int(valid.min())}  # a pixel at the threshold may fall to either side
        assert float(row["hard_share"]) == pytest.approx(float(hard.sum() / valid.sum()), **close)
        assert float(row["hard_p50"]) == pytest.approx(float(shares[1]), **close)
        assert float(row["binds_share"]) == pytest.approx((hard < floor).float().mean().item())
        assert float(row["kept_share"]) == pytest.approx(float(kept), **close)
    # The test would not see much if nothing or everything were hard.
    assert 0.05 < float(rows[0]["hard_share"]) < float(rows[-1]["hard_share"]) < 0.95


def test_the_heads_own_settings_are_reported(call, checkpoint):
    _, out, _ = call(CE, checkpoint, "--num-batches", 1)
    assert "decode_head does not mine." in out
    assert "not whether mining pays" in out
    thresh = ["model.decode_head.loss_decode.thresh=0.1234"]
    _, out, _ = call(OHEM, checkpoint, "--num-batches", 2, options=thresh)
    probs = [p[v] for p, v in direct(checkpoint, "train", 2)]
    hard = 100 * float((torch.cat(probs) < 0.1234).double().mean())
    assert f"decode_head: at thresh 0.1234, {hard:.1f} % of the valid pixels are hard" in out
    assert "min_kept=1/16 binds on 0.0 % of the batches" in out
    _, out, _ = call(SAMPLER, checkpoint, "--num-batches", 1)
    ((_, valid),) = direct(checkpoint, "train", 1)
    floor = 100 * 2 * 1152 / int(valid.sum())  # per image, and there are two
    assert f"min_kept=1,152 per image ({floor:.1f} % of the valid pixels)" in out


@pytest.mark.parametrize("pool", ["batch", "image", "class"])
@pytest.mark.parametrize("min_kept", [0, 7, 40, 0.25, 1.0])
@pytest.mark.parametrize("thresh", [None, 0.3, 0.7])
def test_floor_agrees_with_the_loss(pool, min_kept, thresh):
    torch.manual_seed(1)
    counts = thresholds.Counts(None, [0.3, 0.7], pool)
    kept = pools = short = valid_pixels = 0
    for _ in range(3):
        loss = torch.rand(3, 5, 6) * 3
        target = torch.randint(0, 4, (3, 5, 6))
        target[0] = 1
        target[2, :2] = 255
        valid = target != 255
        counts.add(loss, valid, torch.where(valid, target, 0), 5)  # class 4 is absent
        settings = {"thresh": thresh, "min_kept": min_kept, "pool": pool}
        mask, hard = (
            keep_pixels(loss, target, valid, OhemRule(**{**settings, **other}), 5).mask
            for other in ({}, {"min_kept": 0})
        )
        kept += int(mask.sum())
        valid_pixels += int(valid.sum())
        image = torch.arange(3)[:, None, None].expand(3, 5, 6)
        group = {"batch": torch.zeros_like(image), "image": image, "class": target}[pool]
        for number in group[valid].unique():
            mine = valid & (group == number)
            pools += 1
            short += int(mask[mine].sum() > hard[mine].sum())
    assert counts.finish()
    binds, share = counts.binds(thresh, min_kept)
    assert binds == pytest.approx(short / pools)
    assert share == pytest.approx(kept / valid_pixels)


def test_not_a_number_is_hard():
    counts = thresholds.Counts(None, [0.5, 1.0], None)
    loss = torch.tensor([[math.nan, math.inf, 0.1, 0.0]])
    counts.add(loss, torch.ones_like(loss, dtype=torch.bool), torch.zeros(1, 4).long(), 2)
    assert counts.finish()
    assert counts.hard.tolist() == [[2, 3]]


class Segmentor(nn.Module):
    """As much of a segmentor as the tool needs around a head: logits come from a parameter."""

    def __init__(self, head):
        super().__init__()
        self.decode_head = head

    def data_preprocessor(self, data, training):
        assert training
        return data

    def forward(self, inputs, data_samples, mode):
        assert mode == "loss"
        return self.decode_head.loss(inputs, data_samples, None)


def run_head(settings, inputs, labels, heads=None):
    init_default_scope("mmseg")
    torch.manual_seed(0)
    model = Segmentor(MODELS.build(dict(settings, in_channels=4, channels=4)))
    samples = []
    for label in labels:
        samples.append(SegDataSample(gt_sem_seg=PixelData(data=label[None])))
    watch = thresholds.Watch(model, heads, [0.5], None)
    model.train()
    assert watch.run(model, [{"inputs": inputs, "data_samples": samples}]) == len(labels)
    return model, watch.counts


@pytest.mark.parametrize("kind", ["ohem_mm.OhemCrossEntropyLoss", "mmseg.OhemCrossEntropy"])
def test_a_head_that_calls_losses_by_place(kind):
    """DDRHead has logits of two branches; each loss has a curve of its own."""
    loss = dict(type=kind, min_kept=5)
    settings = dict(type="mmseg.DDRHead", num_classes=3, dropout_ratio=0.0, loss_decode=[loss] * 2)
    inputs = (torch.randn(2, 2, 8, 8), torch.randn(2, 4, 8, 8))
    labels = torch.randint(0, 3, (2, 16, 16))
    labels[0, :4] = 255
    model, counts = run_head(settings, inputs, labels)
    assert list(counts) == ["decode_head, loss 0", "decode_head, loss 1"]
    with torch.no_grad():
        both = model.decode_head(inputs)
    for found, logits in zip(counts.values(), both, strict=True):
        wide = F.interpolate(logits, (16, 16), mode="bilinear")
        prob = wide.softmax(1).gather(1, labels.clamp(max=2)[:, None])[:, 0][labels != 255]
        assert found.rule == OhemRule(0.7, 5)
        assert int(found.valid) == prob.numel()
        assert found.hard_share(0.5) == pytest.approx((prob < 0.5).double().mean().item(), abs=0.01)


def test_a_head_that_leaves_its_loss_to_another():
    """K-Net, whose heads need far more settings than what counts here."""
    from mmseg.models.decode_heads.knet_head import IterativeDecodeHead

    init_default_scope("mmseg")
    outer = IterativeDecodeHead.__new__(IterativeDecodeHead)
    nn.Module.__init__(outer)
    outer.kernel_generate_head = MODELS.build(
        dict(type="FCNHead", in_channels=4, channels=4, num_classes=3)
    )
    watch = thresholds.Watch(nn.ModuleDict({"decode_head": outer}), None, [], None)
    assert list(watch.counts) == ["decode_head.kernel_generate_head"]


def test_one_channel_and_a_second_loss_on_the_same_logits():
    losses = [dict(type="CrossEntropyLoss", use_sigmoid=True), dict(type="DiceLoss")]
    settings = dict(
        type="mmseg.FCNHead",
        num_classes=2,
        out_channels=1,
        threshold=0.5,
        num_convs=0,
        concat_input=False,
        dropout_ratio=0.0,
        loss_decode=losses,
    )
    inputs, labels = [3 * torch.randn(2, 4, 8, 8)], torch.randint(0, 2, (2, 8, 8))
    model, counts = run_head(settings, inputs, labels)
    nn.init.normal_(model.decode_head.conv_seg.weight)
    assert list(counts) == ["decode_head, loss 0"]
    assert counts["decode_head, loss 0"].rule is None
    model, counts = run_head(settings, inputs, labels)
    with torch.no_grad():
        prob = model.decode_head(inputs).sigmoid()[:, 0]
    hard = torch.where(labels == 1, prob, 1 - prob) < 0.5
    assert int(counts["decode_head, loss 0"].hard_share(0.5) * 128 + 0.5) == int(hard.sum())


def test_markdown_and_plot(call, checkpoint):
    code, out, _ = call(OHEM, checkpoint, "--num-batches", 1, "--markdown", "--plot", "x.png")
    assert code == 0
    table = [line for line in out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 5
    assert len({line.count("|") for line in table}) == 1
    assert "min_kept=1/16 binds on" in table[0]
    with open("x.png", "rb") as file:
        assert file.read(8) == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--head", "auxiliary_head"], "no head 'auxiliary_head'; heads: decode_head"),
        (["--num-batches", "0"], "--num-batches must be at least 1, got 0"),
        (["--plot", "nowhere/x.png"], "the folder of 'nowhere/x.png' does not exist"),
    ],
)
def test_mistakes_end_in_one_sentence(call, checkpoint, arguments, message):
    code, _, err = call(OHEM, checkpoint, *arguments)
    assert code == 2
    assert f"error: {message}" in err or f"error: there is {message}" in err


def test_a_checkpoint_that_does_not_fit(call, tmp_path):
    torch.save({"state_dict": {"backbone.x": torch.zeros(1)}}, tmp_path / "other.pth")
    code, _, err = call(OHEM, tmp_path / "other.pth")
    assert code == 2
    assert "does not fit the model" in err
    code, _, err = call(OHEM, tmp_path / "none.pth")
    assert code == 2
    assert "there is no checkpoint" in err


@pytest.mark.parametrize("setting", [("--thresh", "0"), ("--thresh", "7"), ("--min-kept", "1.5")])
def test_bad_numbers_are_refused(call, checkpoint, setting):
    with pytest.raises(SystemExit) as stop:
        call(OHEM, checkpoint, *setting)
    assert stop.value.code == 2
