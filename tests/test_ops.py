"""The choice of an implementation, from facts alone and as the loss makes it."""

import logging
from itertools import product

import pytest
import torch

from ohem_mm import OhemCrossEntropyLoss, ohem_cross_entropy, ops
from ohem_mm.ops import Facts, Overlap, choose_backend, decide
from ohem_mm.rule import OhemRule

GPU = Facts(on_gpu=True, verdict="")


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        (Facts(), ("portable", None)),
        (Facts(maps=False), ("eager", None)),
        (Facts(transformed=True), ("eager", None)),
        (Facts(wanted="eager"), ("eager", None)),
        (Facts(wanted="portable", on_gpu=True, verdict=""), ("portable", None)),
        (Facts(wanted="triton", refusal="cannot"), ("portable", "cannot")),
        (Facts(wanted="triton", refusal="cannot", maps=False), ("eager", None)),
        (GPU, ("triton", None)),
        (GPU._replace(transformed=True), ("eager", None)),
        (GPU._replace(capturing=True), ("triton", None)),
        (GPU._replace(refusal="counts in 32 bits"), ("portable", "counts in 32 bits")),
        (GPU._replace(verdict="is wrong"), ("portable", "is wrong")),
        (GPU._replace(verdict="is wrong", capturing=True), ("portable", "is wrong")),
        (GPU._replace(verdict=None, can_try=True), ("trial", None)),
        (GPU._replace(verdict=None), ("portable", None)),  # no values, or undecided
    ],
)
def test_decisions(facts, expected):
    assert decide(facts) == expected


def test_an_untried_kernel_is_not_captured():
    backend, line = decide(GPU._replace(verdict=None, capturing=True))
    assert backend == "portable"
    assert "run a step before" in line


def test_triton_is_never_used_against_a_fact():
    choices = product(
        (None, *ops.BACKENDS),
        *[(False, True)] * 3,
        (None, "cannot"),
        (None, "", "is wrong"),
        *[(False, True)] * 2,
    )
    used = 0
    for facts in map(Facts._make, choices):
        backend, _ = decide(facts)
        assert backend in (*ops.BACKENDS, "trial")
        if backend in ("triton", "trial"):
            used += 1
            assert facts.maps
            assert not facts.transformed
            assert not facts.refusal
            assert facts.verdict == ("" if backend == "triton" else None)
            assert facts.wanted in (None, "triton")
    assert used


class OnGpu(torch.Tensor):
    """Says that it lies on a GPU."""

    is_cuda = True
    device = torch.device("cuda", 1)

    def __repr__(self):
        return "logits"


@pytest.fixture
def gpu(monkeypatch, caplog):
    """A machine whose GPU Triton compiles for, as far as the dispatcher asks; yields its state."""
    state = {"capturing": False, "trouble": None, "asked": [], "trials": []}
    state |= {"sums_trouble": None, "sums_trials": []}

    class Device:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            state["asked"].append(self.device)

        def __exit__(self, *_):
            pass

    def trial(*kind):
        state["trials"].append(kind)
        if isinstance(state["trouble"], Exception):
            raise state["trouble"]
        return state["trouble"]

    def sums_trial(*kind):
        state["sums_trials"].append(kind)
        return state["sums_trouble"]

    monkeypatch.delenv("OHEM_MM_BACKEND", raising=False)
    monkeypatch.setattr(ops, "_VERDICTS", {})
    monkeypatch.setattr(ops, "_SAID", set())
    monkeypatch.setattr(ops.triton, "available", lambda logits: True)
    monkeypatch.setattr(ops.triton, "trial", trial)
    monkeypatch.setattr(ops.triton, "sums_trial", sums_trial)
    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["capturing"])
    caplog.set_level(logging.WARNING)
    return state


def logits_on_gpu(*shape):
    return torch.zeros(shape or (1, 7, 2, 2)).as_subclass(OnGpu)


@pytest.mark.parametrize("trouble", [None, "finds another gradient than portable"])
@pytest.mark.parametrize("wanted", [None, "triton"])
def test_one_trial_decides_for_the_process(monkeypatch, caplog, gpu, trouble, wanted):
    if wanted:
        monkeypatch.setenv("OHEM_MM_BACKEND", wanted)
    gpu["trouble"] = trouble
    expected = "portable" if trouble else "triton"
    for capturing in (False, False, True):
        gpu["capturing"] = capturing
        assert choose_backend(logits_on_gpu()) == expected
    assert gpu["trials"] == [(torch.device("cuda", 1), torch.float32, 7, False)]
    assert caplog.messages == ([f"triton {trouble}; using portable."] if trouble else [])
    assert set(gpu["asked"]) == {torch.device("cuda", 1)}  # the device of the logits


def test_no_trial_while_capturing(caplog, gpu):
    gpu["capturing"] = True
    assert choose_backend(logits_on_gpu()) == "portable"
    assert gpu["trials"] == []
    assert "run a step before" in caplog.text
    gpu["capturing"] = False
    assert choose_backend(logits_on_gpu()) == "triton"


def test_no_memory_is_no_verdict(caplog, gpu):
    gpu["trouble"] = ops.triton.UndecidedError("could not be tried on cuda:1: out of memory")
    assert choose_backend(logits_on_gpu()) == "portable"
    assert "using portable for now" in caplog.text
    gpu["trouble"] = None
    assert choose_backend(logits_on_gpu()) == "triton"
    assert len(gpu["trials"]) == 2


def test_tensors_without_values_hold_no_trial(gpu):
    logits = torch.zeros(1, 7, 2, 2, device="meta").as_subclass(OnGpu)
    assert choose_backend(logits) == "portable"
    gpu["trouble"] = "is wrong"
    assert choose_backend(logits_on_gpu()) == "portable"
    gpu["trouble"] = None
    assert choose_backend(logits) == "portable"
    assert len(gpu["trials"]) == 1


@pytest.mark.parametrize("name", ["weight", "class_weight", "avg_factor"])
def test_gradients_that_triton_has_not_are_portables(caplog, gpu, name):
    values = {"weight": torch.ones(1, 2, 2), "class_weight": torch.ones(7), "avg_factor": 2.0}
    assert choose_backend(logits_on_gpu(), constants=tuple(values.values())) == "triton"
    values[name] = torch.ones((), requires_grad=True)
    assert choose_backend(logits_on_gpu(), constants=tuple(values.values())) == "portable"
    assert "gradient of weights" in caplog.text


@pytest.mark.parametrize("rule", [{"pool": "world"}, {"habits": (True,)}])
def test_rules_that_triton_does_not_know(gpu, rule):
    assert choose_backend(logits_on_gpu(), rule=OhemRule(**rule)) == "portable"
    assert gpu["trials"] == []


@pytest.mark.parametrize(
    ("trouble", "sums_trouble"), [(None, "finds another predicted"), ("is wrong", None)]
)
def test_sums_have_a_verdict_of_their_own(caplog, gpu, trouble, sums_trouble):
    gpu.update(trouble=trouble, sums_trouble=sums_trouble)
    for _ in range(2):
        assert choose_backend(logits_on_gpu()) == ("portable" if trouble else "triton")
        found = choose_backend(logits_on_gpu(), sums=Overlap(squared=True))
        assert found == ("portable" if sums_trouble else "triton")
    assert gpu["trials"] == [(torch.device("cuda", 1), torch.float32, 7, False)]
    assert gpu["sums_trials"] == [(torch.device("cuda", 1), torch.float32, 7)]
    assert caplog.messages == [f"triton {trouble or sums_trouble}; using portable."]


def test_sums_are_not_tried_while_capturing(caplog, gpu):
    assert choose_backend(logits_on_gpu()) == "triton"
    gpu["capturing"] = True  # the other kernels were tried, these were not
    assert choose_backend(logits_on_gpu(), sums=Overlap()) == "portable"
    assert "run a step before" in caplog.text
    assert gpu["sums_trials"] == []


@pytest.mark.parametrize("sums", [Overlap(use_sigmoid=True), Overlap(smoothing=0.1)])
def test_sums_that_triton_has_not_are_portables(caplog, gpu, sums):
    assert choose_backend(logits_on_gpu(), sums.use_sigmoid, sums=sums) == "portable"
    assert "sums of softmax and hard labels alone" in caplog.text
    assert gpu["sums_trials"] == []


def large(images=1, low=(4, 4)):
    """Logits of a size that is only said, for memory has no room for it."""
    return torch.zeros(()).expand(images, 7, *low).as_subclass(OnGpu)


@pytest.mark.parametrize(
    ("logits", "size"),
    [
        (large(low=(2**15, 4)), (2**15, 8)),
        (large(low=(4, 2**15)), (8, 2**15)),
        (large(images=2**11), (2**10, 2**10)),
    ],
)
def test_sizes_beyond_32_bits(caplog, gpu, logits, size):
    for _ in range(2):
        assert choose_backend(logits, size=torch.Size(size)) == "portable"
    assert len(caplog.messages) == 1
    assert gpu["trials"] == []
    smaller = torch.Size(length // 2 for length in size)
    assert choose_backend(logits, size=smaller) == "triton"


def test_strides_beyond_32_bits(gpu):
    with torch.device("meta"):
        far, near = (
            torch.empty_strided((1, 7, 4, 4), (0, 0, 0, step)).as_subclass(OnGpu)
            for step in (2**27, 2**20)
        )
    assert "strides pass 32 bits" in ops.triton.refusal(far, torch.Size((8, 8)))
    assert ops.triton.refusal(near, torch.Size((8, 8))) is None


def test_backend_by_hand(monkeypatch, caplog):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 6, 5, generator=generator)
    target = torch.randint(0, 4, (2, 6, 5), generator=generator)
    expected = ohem_cross_entropy(logits, target)
    monkeypatch.setattr(ops.triton, "available", lambda logits: False)
    monkeypatch.setattr(ops, "_SAID", set())
    monkeypatch.setenv("OHEM_MM_BACKEND", "triton")
    for _ in range(2):
        assert torch.equal(ohem_cross_entropy(logits, target), expected)
    assert len(caplog.messages) == 1
    assert "triton cannot take torch.float32 on cpu; using portable" in caplog.messages[0]
    monkeypatch.setenv("OHEM_MM_BACKEND", "cuda")
    with pytest.raises(ValueError, match="one of portable, triton, eager, but got 'cuda'"):
        ohem_cross_entropy(logits, target)


@pytest.mark.parametrize("name", ["weight", "class_weight"])
def test_weights_on_another_device(monkeypatch, name):
    """They are moved to the logits before either path sees them; 'meta' is the other device."""
    seen = {}

    def ohem(logits, target, weight, *, class_weight, **_):
        seen.update(weight=weight, class_weight=class_weight)
        return logits.sum(), None, None

    monkeypatch.setattr("ohem_mm.loss.choose_backend", lambda *_, **__: "triton")
    monkeypatch.setattr(ops.triton, "ohem", ohem)
    logits = torch.zeros(1, 3, 2, 2, device="meta")
    target = torch.zeros(1, 2, 2, dtype=torch.long, device="meta")
    value = torch.ones(3) if name == "class_weight" else torch.ones(1, 2, 2)
    ohem_cross_entropy(logits, target, **{name: value})
    assert seen[name].device == logits.device
    assert seen[name].shape == value.shape


def test_module_works_on_tensors_without_values():
    loss = OhemCrossEntropyLoss(min_kept=0.5, class_weight=[1.0, 2, 3]).to("meta")
    logits = torch.empty(2, 3, 4, 5, device="meta", requires_grad=True)
    value = loss(logits, torch.empty(2, 16, 20, device="meta", dtype=torch.long))
    value.backward()
    assert value.shape == ()
    assert logits.grad.shape == logits.shape
