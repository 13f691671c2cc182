"""The Triton kernels against the float64 oracle, and what can be known of them without a GPU.

Without a GPU ``test_interpreter.py`` runs this file in Triton's interpreter.
"""

import os
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interpreter import DEVICE, INTERPRETED, runs
from marks import slow

from ohem_mm import OhemCrossEntropyLoss, ohem_cross_entropy, reference
from ohem_mm.ops import choose_backend
from ohem_mm.rule import SETTINGS, Habits, OhemRule

triton = pytest.importorskip("triton", reason="needs Triton")
kernels = pytest.importorskip("ohem_mm.ops.triton")
geometry = pytest.importorskip("ohem_mm.ops.triton.geometry")

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float32: 1e-5}
DEFAULTS = {
    "thresh": 0.7,
    "min_kept": 1 / 16,
    "pool": "batch",
    "min_kept_per": "batch",
    "always_keep": (),
    "avg": "kept",
    "weighted_mean": False,
    "avg_factor": None,
    "ignore_index": 255,
    "use_sigmoid": False,
    "class_weight": None,
    "label_smoothing": 0.0,
    "align_corners": False,
    "reduction": "mean",
}


def kernel_arguments(rule):
    """The keywords of ``kernels.ohem``, which takes what decides as one object."""
    rule = DEFAULTS | rule
    decides = {name: rule.pop(name) for name in SETTINGS if name in rule}
    return {"rule": OhemRule(**decides), **rule}


# Several programs, tiles and overlaps even on tiny maps.
SMALL = geometry.Tiling(tile=32, cells=4, classes=4, block=64, programs=4)
tiling = geometry.TILING


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "tiling", SMALL)


def ours(logits, target, weight=None, **rule):
    """The loss, its gradient, and the numbers of hits and of valid pixels."""
    logits = logits.detach().to(DEVICE, copy=True).requires_grad_()
    rule = DEFAULTS | rule
    weight = None if weight is None else weight.to(DEVICE)
    if rule["class_weight"] is not None:
        rule["class_weight"] = rule["class_weight"].to(DEVICE)
    loss, hits, valid = kernels.ohem(
        logits,
        target.to(DEVICE),
        weight,
        size=tuple(target.shape[1:]),
        with_hits=True,
        tiling=tiling,
        **kernel_arguments(rule),
    )
    (loss * 2).backward()
    return loss.detach().cpu(), logits.grad.cpu() / 2, int(hits), int(valid)


def oracle(logits, target, weight=None, **rule):
    logits = logits.detach().clone().requires_grad_()
    loss = reference.ohem_cross_entropy(logits, target, weight, **DEFAULTS | rule)
    loss.backward()
    return loss.detach(), logits.grad


def check(logits, target, weight=None, **rule):
    loss, grad, hits, valid = ours(logits, target, weight, **rule)
    expected_loss, expected_grad = oracle(logits, target, weight, **rule)
    torch.testing.assert_close(loss.double(), expected_loss.double(), rtol=1e-5, atol=1e-7)
    scale = float(expected_grad.double().abs().max())
    torch.testing.assert_close(
        grad, expected_grad, rtol=0, atol=TOLERANCE[logits.dtype] * scale + 1e-12
    )
    ignore_index = rule.get("ignore_index", 255)
    assert valid == int((target != ignore_index).sum())
    z = logits.double()
    if z.shape[2:] != target.shape[1:]:
        corners = rule.get("align_corners", False)
        z = torch.nn.functional.interpolate(
            z, size=target.shape[1:], mode="bilinear", align_corners=corners
        )
    assert hits == int(((z.argmax(1) == target) & (target != ignore_index)).sum())


def batch(seed, shape, size, dtype=torch.float32, ignored=0.2, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(shape, generator=generator) * scale).to(dtype)
    target = torch.randint(0, max(2, shape[1]), (shape[0], *size), generator=generator)
    target[torch.rand(target.shape, generator=generator) < ignored] = 255
    return logits, target


# --- values and gradients ------------------------------------------------------------------------

SIZES = {
    "same": ((5, 7), (5, 7)),
    "twice": ((3, 5), (6, 10)),
    "eight": ((2, 2), (16, 16)),
    "fractional": ((3, 5), (8, 14)),
    "rows only": ((2, 6), (5, 6)),
    "barely": ((4, 5), (5, 6)),
    "one cell": ((1, 1), (4, 3)),
    "to one row": ((1, 3), (1, 8)),
}


@runs
@pytest.mark.parametrize("align_corners", [False, slow(True)])
@pytest.mark.parametrize("name", SIZES)
def test_every_scale_agrees_with_the_oracle(small_tiles, name, align_corners):
    low, size = SIZES[name]
    logits, target = batch(0, (1, 3, *low), size)
    check(logits, target, align_corners=align_corners)


@runs
@pytest.mark.parametrize("use_sigmoid", [False, True])
@pytest.mark.parametrize("channels", [1, 2, slow(19), 33])
@pytest.mark.parametrize("size", [(4, 5), slow((3, 4))])
def test_any_number_of_classes(channels, use_sigmoid, size):
    if channels == 1 and not use_sigmoid:
        pytest.skip("softmax over one class is always 1")
    logits, target = batch(1, (1, channels, 3, 4), size)
    check(logits, target, use_sigmoid=use_sigmoid)


@runs
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", [torch.uint8, slow(torch.int16), slow(torch.int32), torch.int64])
def test_types(dtype, kind):
    logits, target = batch(2, (2, 3, 2, 3), (5, 6), dtype=dtype)
    check(logits, target.to(kind))


@runs
def test_negative_ignore_index():
    logits, target = batch(2, (2, 3, 2, 3), (5, 6))
    check(logits, torch.where(target == 255, -100, target), ignore_index=-100)


@runs
@pytest.mark.parametrize("walk", [slow(1), 2, slow(4), 7])
def test_rows_that_a_program_walks_down(small_tiles, monkeypatch, walk):
    monkeypatch.setattr(sys.modules[__name__], "tiling", SMALL._replace(walk=walk))
    logits, target = batch(3, (1, 6, 5, 5), (11, 9))
    check(logits, target, thresh=0.9)


@runs
@pytest.mark.parametrize("size", [(4, 6), (7, 9)])
def test_strides(size):
    logits, target = batch(4, (2, 5, 4, 6), size)
    check(logits.to(memory_format=torch.channels_last), target)
    wide = torch.cat([logits, logits], dim=1)
    check(wide[:, 1:-4], target)
    check(logits[:1].expand(2, -1, -1, -1), target)


RULES = {
    "top-k": {"thresh": None, "min_kept": 7},
    "threshold alone": {"thresh": 0.3, "min_kept": 0},
    "every loss is hard": {"thresh": 1.0},
    "share": {"thresh": 0.01, "min_kept": 0.29},
    "all of them": {"thresh": 0.01, "min_kept": 1.0},
    "more than there are": {"thresh": 0.01, "min_kept": 10**12},
    "per image": {"thresh": 0.01, "min_kept": 9, "min_kept_per": "image"},
    "image pool": {"thresh": 0.01, "min_kept": 11, "pool": "image"},
    "image pool, share": {"thresh": 0.1, "min_kept": 0.2, "pool": "image"},
    "class pool": {"thresh": 0.01, "min_kept": 5, "pool": "class"},
    "class pool, share": {"thresh": 0.2, "min_kept": 0.3, "pool": "class"},
    "always": {"always_keep": (0, 2), "thresh": 0.05},
    "valid": {"avg": "valid"},
    "all": {"avg": "all"},
    "factor": {"avg_factor": 7.5},
    "factor tensor": {"avg_factor": torch.tensor(3.0)},
    "sum": {"reduction": "sum"},
    "smooth": {"label_smoothing": 0.1, "thresh": 0.3},
    "smooth sigmoid": {"label_smoothing": 0.1, "use_sigmoid": True},
}


@runs
@pytest.mark.parametrize("name", RULES)
def test_every_rule_agrees_with_the_oracle(small_tiles, name):
    logits, target = batch(5, (3, 4, 6, 11), (6, 11))
    check(logits, target, **RULES[name])


@runs
@pytest.mark.parametrize("rule", [{"use_sigmoid": False}, {"use_sigmoid": True}])
def test_smoothing_and_interpolation(rule):
    logits, target = batch(5, (2, 3, 3, 4), (5, 6))
    check(logits, target, label_smoothing=0.1, **rule)


@runs
@pytest.mark.parametrize("avg", ["kept", slow("valid"), "all"])
@pytest.mark.parametrize("weighted_mean", [slow(False), True])
def test_weights(avg, weighted_mean):
    logits, target = batch(6, (2, 3, 5, 7), (5, 7))
    class_weight = torch.tensor([0.5, 2.0, 0.0])
    weight = torch.rand(target.shape, generator=torch.Generator().manual_seed(0))
    rule = {"avg": avg, "weighted_mean": weighted_mean}
    check(logits, target, class_weight=class_weight, **rule)
    check(logits, target, weight, **rule)
    check(logits[:, :, :3, :4], target, weight, class_weight=class_weight, **rule)


TIES = {
    "some": {"thresh": 0.01, "min_kept": 20},
    "all": {"thresh": None, "min_kept": 1000},
    "none": {"thresh": 0.5, "min_kept": 0},
    "per image": {"thresh": 0.01, "min_kept": 9, "min_kept_per": "image"},
    "share": {"thresh": 0.01, "min_kept": 0.7},
    "always": {"thresh": 0.01, "min_kept": 20, "always_keep": (1,)},
}


@runs
@pytest.mark.parametrize("avg", ["kept", slow("valid")])
@pytest.mark.parametrize("pool", ["batch", slow("image"), "class"])
@pytest.mark.parametrize(
    "name", ["some", "none", "share", *map(slow, ("all", "per image", "always"))]
)
def test_ties_share_the_places_that_are_left(small_tiles, name, pool, avg):
    logits = torch.tensor([2.0, 0.0, -1.0]).view(1, 3, 1, 1).expand(2, 3, 3, 4).contiguous()
    target = torch.zeros(2, 6, 8, dtype=torch.long)
    target[:, 3:] = 1
    target[0, 0, :5] = 255
    check(logits, target, **TIES[name], pool=pool, avg=avg)


@runs
@pytest.mark.parametrize("pool", ["batch", "class"])
def test_ties_with_weights_and_at_zero(small_tiles, pool):
    # Losses of exactly 0: the pixels that the textbook's top-k would choose among by their order.
    logits = torch.tensor([90.0, 0.0, -90.0]).view(1, 3, 1, 1).expand(2, 3, 4, 5).contiguous()
    logits[0, :, 0] = 0
    target = torch.zeros(2, 4, 5, dtype=torch.long)
    weight = torch.rand(target.shape, generator=torch.Generator().manual_seed(0)) + 0.5
    rule = {"thresh": 0.1, "min_kept": 0.5, "pool": pool, "weighted_mean": True}
    check(logits, target, weight, class_weight=torch.tensor([0.5, 2.0, 1.0]), **rule)


@st.composite
def problems(draw):
    use_sigmoid = draw(st.booleans())
    channels = draw(st.integers(1 if use_sigmoid else 2, 4))
    # Not 1: interpolating between a value and itself makes ties, and the oracle's rounding breaks
    # them.
    low = (draw(st.integers(2, 4)), draw(st.integers(2, 5)))
    size = (low[0] + draw(st.integers(0, 5)), low[1] + draw(st.integers(0, 5)))
    logits, target = batch(
        draw(st.integers(0, 10**6)),
        (draw(st.integers(1, 2)), channels, *low),
        size,
        ignored=draw(st.sampled_from([0.0, 0.3, 1.0])),
        scale=draw(st.sampled_from([0.1, 3.0])),
    )
    weight, class_weight = None, None
    if draw(st.booleans()):
        weight = torch.rand(target.shape, generator=torch.Generator().manual_seed(1)) + 0.1
    if draw(st.booleans()):
        class_weight = torch.arange(1.0, max(2, channels) + 1)
    rule = {
        "thresh": draw(st.sampled_from([None, 0.3, 0.7, 0.99])),
        "min_kept": draw(st.sampled_from([0, 1, 3, 50, 1 / 16, 0.5, 1.0])),
        "pool": draw(st.sampled_from(["batch", "image", "class"])),
        "min_kept_per": draw(st.sampled_from(["batch", "image"])),
        "always_keep": draw(st.sampled_from([(), (1,)])),
        "avg": draw(st.sampled_from(["kept", "valid", "all"])),
        "weighted_mean": draw(st.booleans()),
        "use_sigmoid": use_sigmoid,
        "class_weight": class_weight,
        "label_smoothing": draw(st.sampled_from([0.0, 0.1])),
        "align_corners": draw(st.booleans()),
    }
    return logits, target, weight, rule


@pytest.mark.slow
@runs
@settings(
    max_examples=int(os.environ.get("OHEM_MM_EXAMPLES", "30")),
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(problems())
def test_settings_in_any_combination(problem):
    logits, target, weight, rule = problem
    check(logits, target, weight, **rule)


# --- edges ---------------------------------------------------------------------------------------


@runs
@pytest.mark.parametrize("size", [(3, 4), (5, 6)])
@pytest.mark.parametrize("pool", ["batch", "class"])
def test_all_ignored_is_a_zero_with_zero_gradients(size, pool):
    logits, target = batch(7, (2, 3, 3, 4), size, ignored=2.0)
    logits[0, 0, 0, 0] = torch.nan
    loss, grad, hits, valid = ours(logits, target, pool=pool)
    assert (float(loss), hits, valid) == (0.0, 0, 0)
    assert not grad.any()


@runs
def test_nothing_kept_and_no_pixels_at_all():
    easy = torch.tensor([9.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 3, 3)
    target = torch.zeros(1, 6, 6, dtype=torch.long)
    loss, grad, *_ = ours(easy.contiguous(), target, min_kept=0)
    assert float(loss) == 0
    assert not grad.any()
    loss, grad, *_ = ours(torch.zeros(0, 2, 3, 3), torch.zeros(0, 6, 6, dtype=torch.long))
    assert float(loss) == 0
    assert grad.shape == (0, 2, 3, 3)


@runs
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("size", [(4, 4), slow((8, 8))])
def test_not_finite_is_kept_where_valid_and_unseen_where_ignored(bad, size):
    logits, target = batch(8, (2, 3, 4, 4), size, ignored=0.0)
    target[0, 0, 0] = 1
    logits[0, 1, 0, 0] = bad
    loss, grad, *_ = ours(logits, target, thresh=0.01, min_kept=1)
    assert not loss.isfinite()
    assert grad[0, :, 0, 0].isnan().all()
    assert grad[1].isfinite().all()

    target[0] = 255
    check(torch.where(logits.isfinite(), logits, 0), target)
    clean, dirty = ours(torch.where(logits.isfinite(), logits, 0), target), ours(logits, target)
    assert torch.equal(clean[0], dirty[0])
    assert torch.equal(clean[1], dirty[1])


@runs
@pytest.mark.parametrize("use_sigmoid", [False, True])
@pytest.mark.parametrize("pool", ["batch", "class"])
def test_a_label_that_is_no_class_is_loud_and_stays_in_bounds(use_sigmoid, pool):
    logits, target = batch(9, (1, 3, 3, 3), (5, 5))
    target[0, 2, 2] = 7
    rule = {"class_weight": torch.ones(3), "use_sigmoid": use_sigmoid, "pool": pool}
    assert ours(logits, target, **rule)[0].isnan()


@runs
def test_small_losses_of_a_sigmoid_keep_their_digits():
    logits = torch.tensor([12.0, -12.0]).view(1, 2, 1, 1).expand(1, 2, 3, 3)
    target = torch.zeros(1, 6, 6, dtype=torch.long)
    rule = {"thresh": None, "min_kept": 5, "use_sigmoid": True}
    loss, expected = ours(logits, target, **rule)[0], oracle(logits, target, **rule)[0]
    torch.testing.assert_close(loss.double(), expected.double(), rtol=1e-5, atol=0)


@runs
def test_easy_pixels_tie_as_in_the_portable_path(monkeypatch):
    # From a gap of 17 a softmax loss is 0 in float32: all of these share the floor's four places.
    logits = torch.zeros(1, 2, 4, 4)
    logits[0, 0] = torch.linspace(18, 22, 16).view(4, 4)
    target = torch.zeros(1, 4, 4, dtype=torch.long)
    _, grad, *_ = ours(logits, target, thresh=None, min_kept=4)
    monkeypatch.setenv("OHEM_MM_BACKEND", "portable")
    leaf = logits.clone().requires_grad_()
    ohem_cross_entropy(leaf, target, thresh=None, min_kept=4).backward()
    assert (leaf.grad[:, 1] != 0).all()
    torch.testing.assert_close(grad[:, 1], leaf.grad[:, 1], rtol=1e-3, atol=0)


@runs
def test_two_runs_give_the_same_bits(small_tiles):
    logits, target = batch(10, (2, 4, 3, 4), (6, 7))
    first, second = (ours(logits, target, min_kept=0.5, pool="class") for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@runs
def test_the_loss_uses_it_on_request(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 5, generator=generator).to(DEVICE)
    target = torch.randint(0, 3, (2, 8, 10), generator=generator).to(DEVICE)
    target[0, :2] = 255
    assert choose_backend(logits) == "portable" or DEVICE == "cuda"
    monkeypatch.setenv("OHEM_MM_BACKEND", "triton")
    assert choose_backend(logits) == "triton"  # and has tried it
    calls = []
    original = kernels.ohem
    monkeypatch.setattr(
        kernels, "ohem", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs)
    )
    results = {}
    for backend in ("portable", "triton"):
        monkeypatch.setenv("OHEM_MM_BACKEND", backend)
        leaf, stats = logits.clone().requires_grad_(), {}
        weight = torch.full((2, 1, 8, 10), 0.5, device=DEVICE)
        loss = OhemCrossEntropyLoss(min_kept=0.3, class_weight=[1.0, 2.0, 3.0]).to(DEVICE)
        value = loss(leaf, target, weight, stats=stats)
        value.backward()
        counts = stats["hits"].cpu(), stats["num_valid"].cpu()
        results[backend] = value.detach(), leaf.grad, *counts
    assert len(calls) == 1
    torch.testing.assert_close(results["triton"], results["portable"])
    stats = {"kept": None}
    OhemCrossEntropyLoss()(logits, target, stats=stats)
    assert len(calls) == 1, "the maps were wanted, which the kernels do not have"
    assert stats["kept"].shape == target.shape


def test_available():
    logits = torch.zeros(1, 2, 3, 3, device=DEVICE)
    assert kernels.available(logits) == (DEVICE == "cuda" or INTERPRETED)
    assert not kernels.available(logits.double())
    assert not kernels.available(logits[0])


# --- what is left to other paths ------------------------------------------------------------------


@runs
def test_class_weight_may_lie_elsewhere():
    logits, target = batch(14, (1, 3, 3, 3), (5, 5))
    weight = torch.tensor([0.5, 2.0, 1.0])
    options = kernel_arguments({"class_weight": weight})
    loss, *_ = kernels.ohem(logits.to(DEVICE), target.to(DEVICE), None, size=(5, 5), **options)
    expected, _ = oracle(logits, target, class_weight=weight)
    torch.testing.assert_close(loss.cpu().double(), expected.double())


@runs
@pytest.mark.parametrize("name", ["weight", "class_weight", "avg_factor"])
def test_gradients_that_the_kernels_do_not_have(name):
    logits, target = batch(14, (1, 3, 3, 3), (5, 5))
    given = {"class_weight": torch.ones(3), "avg_factor": torch.tensor(2.0)}
    given["weight"] = torch.ones(target.shape)
    given = {key: value.to(DEVICE) for key, value in given.items()}
    logits, target = logits.to(DEVICE), target.to(DEVICE)
    assert kernels.refusal(logits, (5, 5), given.values()) is None
    given[name].requires_grad_()
    reason = kernels.refusal(logits, (5, 5), given.values())
    assert reason == "has no gradient of weights, class weights and avg_factor"
    weight = given.pop("weight")
    with pytest.raises(ValueError, match=reason):
        kernels.ohem(logits, target, weight, size=(5, 5), **kernel_arguments(given))


@runs
@pytest.mark.parametrize("name", ["weight", "class_weight", "avg_factor"])
def test_the_loss_takes_them_from_portable(monkeypatch, name):
    logits, target = batch(14, (1, 3, 3, 3), (5, 5))
    found = {}
    for backend in ("portable", "triton"):
        monkeypatch.setenv("OHEM_MM_BACKEND", backend)
        leaf = {"weight": torch.ones(target.shape), "class_weight": torch.ones(3)}
        leaf = leaf.get(name, torch.tensor(2.0)).to(DEVICE).requires_grad_()
        loss = ohem_cross_entropy(logits.to(DEVICE), target.to(DEVICE), **{name: leaf})
        (found[backend],) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(found["triton"], found["portable"])


@runs
def test_vmap_takes_portable(monkeypatch):
    logits, target = batch(14, (2, 3, 3, 3), (5, 5), ignored=0.0)
    logits, target = logits.to(DEVICE), target.to(DEVICE)
    seen = []

    def one(logits):
        seen.append(kernels.refusal(logits[None], (5, 5)))
        return logits.sum()

    torch.func.vmap(one)(logits)
    assert seen == ["cannot be transformed by torch.func"]
    assert kernels.refusal(logits, (5, 5)) is None


@runs
def test_rules_of_others():
    logits = torch.zeros(1, 2, 3, 3, device=DEVICE)
    for rule in (OhemRule(pool="world"), OhemRule(habits=Habits(one_less=True))):
        assert kernels.refusal(logits, (3, 3), (), rule) == "does not know this rule"
        options = kernel_arguments({}) | {"rule": rule}
        with pytest.raises(ValueError, match="does not know this rule"):
            kernels.ohem(
                logits, torch.zeros(1, 3, 3).long().to(DEVICE), None, size=(3, 3), **options
            )


@runs
def test_sizes_that_pass_32_bits_are_refused_before_anything_is_launched():
    logits = torch.empty(1, 2, 1, 1, device=DEVICE).expand(1, 2, 40_000, 2)
    assert "positions pass 32 bits" in kernels.refusal(logits, (40_000, 2))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_the_host_never_waits_and_a_graph_can_be_captured():
    logits, target = batch(12, (2, 19, 16, 16), (128, 128))
    logits, target = logits.cuda().requires_grad_(), target.cuda()
    expected = ours(logits.detach(), target)

    def step():
        loss, *_ = kernels.ohem(logits, target, None, size=(128, 128), **kernel_arguments({}))
        return loss, torch.autograd.grad(loss, logits)[0]

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, grad = step()
    graph.replay()
    assert torch.equal(loss.cpu(), expected[0])
    torch.testing.assert_close(grad.cpu(), expected[1])
