"""The trial of the kernels: it passes where they are right and finds what is planted in them."""

import importlib

import pytest
import torch
from interpreter import DEVICE as PLACE
from interpreter import INTERPRETED, runs
from marks import slow
from planted import plant
from torch._subclasses.fake_tensor import FakeTensorMode

triton = pytest.importorskip("triton", reason="needs Triton")
kernels = pytest.importorskip("ohem_mm.ops.triton")
trials = importlib.import_module("ohem_mm.ops.triton.trial")
inner = importlib.import_module("ohem_mm.ops.triton.inner")

DEVICE = torch.device(PLACE)


@pytest.fixture
def small(monkeypatch):
    """The same trial with fewer pixels and smaller tiles: the interpreter is slow."""
    monkeypatch.setattr(trials, "LOW", (3, 6))
    monkeypatch.setattr(trials, "SIZE", (9, 18))
    tiling = trials.Tiling(tile=32, cells=4, classes=2, block=64, walk=2, programs=4)
    monkeypatch.setattr(trials, "TILING", tiling)


@runs
@pytest.mark.parametrize(
    ("dtype", "channels", "use_sigmoid"),
    [
        (torch.float32, 3, False),
        slow(torch.float16, 1, True),
        slow(torch.bfloat16, 4, False),
        slow(torch.float32, 2, True),
    ],
)
def test_it_passes(small, dtype, channels, use_sigmoid):
    assert kernels.trial(DEVICE, dtype, channels, use_sigmoid) is None


@runs
def test_it_passes_at_its_own_sizes(monkeypatch):
    monkeypatch.setattr(trials, "_CASES", trials._CASES[:1])
    assert kernels.trial(DEVICE, torch.float32, 2, False) is None


# Name of the kernel, what to replace in its source, and by what.
FAULTS = {
    "last row of a forward block": ("forward", "y < y_end)", "y < y_end - 1)"),
    "last column of a forward block": ("forward", "x < high_w\n", "x < high_w - 1\n"),
    "wrong row below": ("forward", "tl.minimum(block_y + 1, low_h - 1)", "block_y"),
    "hits of all pixels": ("forward", "true_z >= best", "true_z <= best"),
    "wrong floor": (
        "floor",
        "tl.maximum(floor, share), valid)",
        "tl.maximum(floor, share) - 9, valid)",
    ),
    "pixels of the first program alone": (
        "floor",
        "start + every < share_programs",
        "start + every < 1",
    ),
    "floor that is never needed": (
        "floor",
        "tl.sum(hard, 0) < k, 0, -1",
        "tl.sum(hard, 0) < k, -1, -1",
    ),
    "wrong histogram digit": ("floor", "digit = (bits >> shift)", "digit = (bits >> (shift + 1))"),
    "other digits counted": (
        "floor",
        "alive &= (bits >> (shift + 10)) == prefix",
        "alive &= bits >= 0",
    ),
    "last block of a histogram": (
        "floor",
        "mask=place < pixels, other",
        "mask=place < pixels - block, other",
    ),
    "blocks after the first": (
        "floor",
        "range(part * block, end, tl",
        "range(part * block, part * block + 1, tl",
    ),
    "wrong digit chosen": ("floor", "rank).to(tl.int32), 0) - 1", "rank).to(tl.int32), 0) - 2"),
    "rank not carried on": ("floor", "rank -= tl.sum(", "rank += 0 * tl.sum("),
    "wrong class's floor": ("mining", "at = 3 * groups + label", "at = 3 * groups + 0 * label"),
    "hard pixels of a class": (
        "floor",
        "tl.load(hard + group) < sought",
        "tl.load(hard + group) >= sought",
    ),
    "ties weigh 1": ("mining", "bits == kth, share", "bits == kth, 1.0"),
    "ties weigh nothing": ("mining", "bits == kth, share", "bits == kth, 0.0"),
    "last block of the choice": (
        "mining",
        "inside = start + tl.arange(0, block) < pixels",
        "inside = start + tl.arange(0, block) < pixels - 1",
    ),
    "a program's sum lost": ("mining", "slot = image * parts + part", "slot = image * parts"),
    "a block of sums lost": ("mining", "mask = at < programs", "mask = at < programs - 1"),
    "dropped row carry": ("backward", "value = carry + ", "value = 0 * carry + "),
    "wrong neighbour": ("backward", "tl.maximum(lane - 1, 0)[None", "tl.maximum(lane - 2, 0)[None"),
    "no neighbour": ("backward", "+ _from_left(upper_right, shift, first)", ""),
    "overlap not left out": (
        "backward",
        "cell = block_x * (cells - 1) - 1 + lane",
        "cell = block_x * (cells - 1) + lane",
    ),
    "last row of a walk": ("backward", "range(walk + 1)", "range(walk)"),
    "last pixel of a cell": ("backward", "range(width)", "range(width - 1)"),
    "wrong weight of a row": (
        "backward",
        "tl.fma(weight_y, line_right",
        "tl.fma(1 - weight_y, line_right",
    ),
    "last column at full size": ("backward", "(x < high_w)[None", "(x < high_w - 1)[None"),
    "wrong true class": ("backward", "label == c, sharp", "label == c + 1, sharp"),
}


@pytest.mark.slow
@runs
@pytest.mark.skipif(not INTERPRETED, reason="each fault would be compiled")
@pytest.mark.parametrize("name", FAULTS)
def test_it_finds_a_planted_fault(small, monkeypatch, tmp_path, name):
    plant(monkeypatch, tmp_path, *FAULTS[name])
    trouble = kernels.trial(DEVICE, torch.float32, 2, False)
    assert trouble is not None
    assert "fails" not in trouble


@pytest.mark.slow
@runs
def test_what_it_says(small, monkeypatch):
    def trial(change):
        original = kernels.ohem

        def changed(*args, **kwargs):
            return change(*original(*args, **kwargs))

        return trials.trial(changed, DEVICE, torch.float32, 3, False)

    def fail(*_):
        raise RuntimeError("PassManager::run failed\nat length")

    assert "finds a loss of" in trial(lambda loss, *rest: (loss * 1.01, *rest))
    assert "(floor of a batch, (3, 6) to (9, 18))" in trial(
        lambda loss, *rest: (loss * 1.01, *rest)
    )
    bent = lambda loss, *rest: (loss + (loss - loss.detach()), *rest)  # noqa: E731
    assert "finds another gradient" in trial(bent)
    assert "correct pixels instead of" in trial(lambda loss, hits, valid: (loss, hits + 2, valid))
    assert "valid pixels instead of" in trial(lambda loss, hits, valid: (loss, hits, valid + 1))
    assert trial(fail) == f"fails on {DEVICE} (RuntimeError: PassManager::run failed)"


def test_what_is_not_decided():
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(kernels.UndecidedError, match="tried on cpu: CUDA out of memory"):
        trials.trial(full, torch.device("cpu"), torch.float32, 3, False)
    with (
        FakeTensorMode(),
        pytest.raises(kernels.UndecidedError, match="are FakeTensor here"),
    ):
        trials.trial(full, torch.device("cpu"), torch.float32, 3, False)


def test_the_default_device_does_not_matter():
    seen = []

    def note(logits, *args, **kwargs):
        seen.append(logits.device)
        raise RuntimeError("enough")

    with torch.device("meta"):
        trouble = trials.trial(note, torch.device("cpu"), torch.float32, 3, False)
    assert trouble == "fails on cpu (RuntimeError: enough)"
    assert seen == [torch.device("cpu")]


@pytest.mark.parametrize("channels", [2, 19, 150])
@pytest.mark.parametrize("case", trials._CASES, ids=str)
def test_its_rules_have_what_they_are_for(channels, case):
    low = trials.SIZE if case.full else trials.LOW
    logits, target = trials.make_problem(channels, False, low)
    valid = target != 255
    mined, *_ = trials.banded_cross_entropy(logits.double(), target, valid)
    rule = trials.make_rule(mined, target, valid, channels, case)
    kept = trials.keep_pixels(mined.float(), target, valid, rule, channels).weights(torch.float32)
    hard = valid & (mined > -torch.tensor(rule.thresh).log())
    assert hard.any()
    if not case.binds:
        assert torch.equal(kept == 1, hard)
        return
    assert ((kept > 0) & (kept < 1)).sum() > 100
    assert (kept == 1).sum() > hard.sum()
