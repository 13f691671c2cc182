"""The whole loss as an operator under torch.compile, and its second derivatives."""

import pytest
import torch
from interpreter import DEVICE, runs
from marks import slow
from problems import assert_compiled_equals, value_and_grad
from torch._subclasses.fake_tensor import FakeTensorMode

from ohem_mm import OhemCrossEntropyLoss, ohem_cross_entropy, ops

triton = pytest.importorskip("triton", reason="needs Triton")
operator = pytest.importorskip("ohem_mm.ops.triton.operator")

pytestmark = pytest.mark.skipif(
    torch.__version__.startswith("2.4."), reason="torch 2.4 cannot trace reads of os.environ"
)


class Trials(dict):
    """Verdicts: every trial has been passed. test_ops_triton_trial.py holds them."""

    def __init__(self):
        super().__init__()
        self.asked = set()

    def __contains__(self, kind):
        self.asked.add(kind)
        return True

    def __getitem__(self, kind):
        return ""

    def get(self, kind):
        self.asked.add(kind)
        return ""


@pytest.fixture(autouse=True)
def trials(monkeypatch):
    monkeypatch.setenv("OHEM_MM_BACKEND", "triton")
    verdicts = Trials()
    monkeypatch.setattr(ops, "_VERDICTS", verdicts)
    torch._dynamo.reset()
    yield verdicts
    torch._dynamo.reset()


def batch(shape=(2, 3, 2, 3), size=(8, 12), dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=generator).to(DEVICE, dtype)
    target = torch.randint(0, max(2, shape[1]), (shape[0], *size), generator=generator)
    target[0, :2] = 255
    return logits, target.to(DEVICE)


class Graphs(list):
    def __call__(self, graph, _):
        self.append(graph)
        return graph.forward

    @property
    def operators(self):
        nodes = [str(node.target) for graph in self for node in graph.graph.nodes]
        return [name for name in nodes if "ohem_mm" in name]


@runs
@pytest.mark.parametrize(
    "rule",
    [
        {"thresh": 0.3, "min_kept": 0.9, "pool": "class", "class_weight": [1.0, 2.0, 3.0]},
        slow({"use_sigmoid": True, "label_smoothing": 0.1, "align_corners": True, "pool": "image"}),
        slow({"label_smoothing": 0.2, "min_kept": 7, "reduction": "sum", "always_keep": [1]}),
    ],
)
def test_compiled_equals_eager_mode(rule, trials):
    logits, target = batch()
    loss = OhemCrossEntropyLoss(**rule).to(DEVICE)
    weight = torch.rand(target.shape, device=DEVICE)
    graphs = Graphs()
    assert_compiled_equals(loss, graphs, logits, target, weight, stats={})
    assert graphs.operators == ["ohem_mm.ohem.default"]
    assert {kind[1:3] for kind in trials.asked} == {(torch.float32, 3)}


@pytest.mark.slow
@runs
def test_through_aot_autograd_with_a_divisor_given_by_hand():
    logits, target = batch((1, 1, 2, 3), (4, 6), torch.bfloat16)
    loss = OhemCrossEntropyLoss(use_sigmoid=True)
    function = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for divisor in (7.0, torch.tensor(7.0), None):
        expected = value_and_grad(loss, logits, target, avg_factor=divisor)
        result = value_and_grad(function, logits, target, avg_factor=divisor)
        torch.testing.assert_close(result, expected)


@pytest.mark.slow
@runs
def test_shapes_that_vary():
    loss = OhemCrossEntropyLoss(min_kept=0.5, pool="image")
    graphs = Graphs()
    function = torch.compile(loss, fullgraph=True, backend=graphs, dynamic=True)
    for images, h, w in ((2, 3, 5), (3, 4, 6), (4, 5, 7)):
        logits, target = batch((images, 3, h, w), (4 * h, 4 * w))
        expected = value_and_grad(loss, logits, target)
        torch.testing.assert_close(value_and_grad(function, logits, target), expected)
    assert len(graphs) <= 2


@runs
def test_a_kernel_that_fails_its_trial_is_not_compiled_in(monkeypatch):
    monkeypatch.setattr(ops, "_VERDICTS", {})
    monkeypatch.setattr(ops, "_SAID", set())
    monkeypatch.setattr(ops.triton, "trial", lambda *_: "is wrong")
    logits, target = batch()
    loss = OhemCrossEntropyLoss()
    graphs = Graphs()
    result = value_and_grad(torch.compile(loss, fullgraph=True, backend=graphs), logits, target)
    torch.testing.assert_close(result, value_and_grad(loss, logits, target))
    assert graphs.operators == ["ohem_mm.pixel_cross_entropy.default"]
    assert list(ops._VERDICTS.values()) == ["is wrong"]
    assert list(ops._SAID) == ["triton is wrong; using portable."]


@pytest.mark.slow
@runs
@pytest.mark.parametrize("use_sigmoid", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_operators_keep_their_promises(use_sigmoid, channels):
    """Schema, fake kernel and autograd, as torch checks them."""
    logits, target = batch((2, max(channels, 2 - use_sigmoid), 2, 3), (4, 6))
    weights = torch.ones(max(2, logits.shape[1]), device=DEVICE)
    rule = (0.7, 0.3, "class", "batch", [1], "kept", True)
    shared = (False, use_sigmoid, 0.1)
    rest = (target, None, weights, None, None, *rule, *shared, 255, "mean", True)
    torch.library.opcheck(operator._forward, (logits, *rest))
    torch.library.opcheck(operator._forward, (logits.clone().requires_grad_(), *rest))
    saved = operator._forward(logits, *rest)[3:]
    grad = torch.ones((), device=DEVICE)
    torch.library.opcheck(operator._backward, (grad, logits, *saved, *shared))


@runs
@pytest.mark.parametrize("use_sigmoid", [False, True])
@pytest.mark.parametrize("size", [(2, 3), (8, 12)])
def test_second_derivatives_are_those_of_the_eager_path(monkeypatch, use_sigmoid, size):
    logits, target = batch(size=size)
    weight = torch.rand(target.shape, device=DEVICE)
    rule = {"thresh": 0.4, "min_kept": 0.5, "use_sigmoid": use_sigmoid, "label_smoothing": 0.1}

    def penalty(logits):
        leaf = logits.detach().requires_grad_()
        loss = ohem_cross_entropy(leaf, target, weight, **rule)
        (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
        (loss + 100 * grad.square().sum()).backward()
        return grad.detach(), leaf.grad

    found = penalty(logits)
    monkeypatch.setenv("OHEM_MM_BACKEND", "eager")
    torch.testing.assert_close(found, penalty(logits), rtol=1e-4, atol=1e-5)


@runs
def test_tensors_without_values_run_no_kernel(monkeypatch):
    monkeypatch.setattr(ops, "_VERDICTS", {})
    monkeypatch.setattr(ops.triton, "trial", lambda *_: pytest.fail("a trial was held"))
    for verdict in (None, ""):
        if verdict is not None:
            monkeypatch.setattr(ops, "_VERDICTS", Trials())
        with FakeTensorMode() as mode:
            logits, target = (mode.from_tensor(value) for value in batch())
            loss = ohem_cross_entropy(logits.requires_grad_(), target)
            (grad,) = torch.autograd.grad(loss, logits)
        assert loss.shape == ()
        assert grad.shape == logits.shape
