"""Under torch.compile, torch.export and without values: the fused losses stay one operator."""

import copy
import itertools

import pytest
import torch
from marks import slow
from problems import assert_compiled_equals, value_and_grad
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from ohem_mm import OhemCrossEntropyLoss, RegionLoss, ohem_cross_entropy, ops
from ohem_mm.joint import joint_losses
from ohem_mm.ops import compiled, compiled_region

pytestmark = pytest.mark.skipif(
    torch.__version__.startswith("2.4."), reason="torch 2.4 cannot trace reads of os.environ"
)

OPERATOR = "ohem_mm.pixel_cross_entropy.default"
SUMS = ["ohem_mm.class_sums.default", "ohem_mm.class_sums_backward.default"]


class Pair(torch.nn.Module):
    """A cross-entropy and an overlap loss, as a head has them."""

    def __init__(self, pixels=None, region=None):
        super().__init__()
        losses = [OhemCrossEntropyLoss(**(pixels or {})), RegionLoss(**(region or {}))]
        self.losses = torch.nn.ModuleList(losses)

    def forward(self, pred, target, stats=None):
        first, second = joint_losses(self.losses, pred, target, stats=stats)
        return first + 2 * second


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    monkeypatch.delenv("OHEM_MM_BACKEND", raising=False)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def batch(shape=(2, 5, 6, 7), size=(23, 29), dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    target = torch.randint(0, max(2, shape[1]), (shape[0], *size), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.2] = 255
    return logits.to(dtype), target


class Graphs:
    """A backend that runs what it is given, and keeps the forward and backward graphs."""

    def __init__(self):
        self.graphs = []

    def __call__(self, module, inputs):
        from functorch.compile import make_boxed_func
        from torch._dynamo.backends.common import aot_autograd

        def keep(graph, _):
            self.graphs.append(graph)
            return make_boxed_func(graph.forward)

        return aot_autograd(fw_compiler=keep, bw_compiler=keep)(module, inputs)

    @property
    def nodes(self):
        return [node for graph in self.graphs for node in graph.graph.nodes]

    @property
    def operators(self):
        return [str(node.target) for node in self.nodes if "ohem_mm" in str(node.target)]

    @property
    def largest(self):
        """Elements of the largest tensor in any graph."""
        values = (node.meta.get("val") for node in self.nodes)
        leaves = torch.utils._pytree.tree_leaves(list(values))
        return max(leaf.numel() for leaf in leaves if isinstance(leaf, torch.Tensor))


RULES = [
    {},
    {"min_kept": 0, "reduction": "sum"},
    {"thresh": None, "min_kept": 0.3, "pool": "image", "class_weight": [1, 2, 3, 4, 5]},
    {"thresh": 0.3, "min_kept": 400, "pool": "class", "always_keep": [1], "avg": "valid"},
    {"use_sigmoid": True, "label_smoothing": 0.1, "align_corners": True, "reduction": "none"},
    {"label_smoothing": 0.2, "class_weight": [1, 2, 3, 4, 5], "weighted_mean": True},
    {"preset": "detectron2"},
]


@pytest.mark.parametrize(("rule", "weighted"), [*zip(RULES, itertools.cycle((False, True)))])
def test_equals_eager_mode_and_keeps_no_full_resolution_logits(rule, weighted):
    logits, target = batch(size=(46, 58))
    weight = None
    if weighted:
        weight = torch.rand(target.shape, generator=torch.Generator().manual_seed(1))
    loss = OhemCrossEntropyLoss(**rule)
    stats = {"kept": None} if weighted else {}
    graphs = Graphs()
    assert_compiled_equals(loss, graphs, logits, target, weight, stats=stats)
    assert graphs.operators == [OPERATOR, "ohem_mm.pixel_cross_entropy_backward.default"]
    histograms = 2048 * {"class": 5, "image": 2}.get(loss.pool, 1)
    assert graphs.largest <= max(target.numel(), histograms) < logits.shape[1] * target.numel()


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        ("channels_last", torch.float16),
        ("full size", torch.bfloat16),
        ("full size", torch.float64),
        ("1-D", torch.float64),
        ("eager", torch.float32),
    ],
)
def test_dtypes_and_shapes(monkeypatch, dtype, layout):
    shapes = {"full size": {"size": (6, 7)}, "1-D": {"shape": (2, 5, 7), "size": (29,)}}
    logits, target = batch(**shapes.get(layout, {}), dtype=dtype)
    if layout == "channels_last":
        logits = logits.contiguous(memory_format=torch.channels_last)
    if layout == "eager":
        monkeypatch.setenv("OHEM_MM_BACKEND", "eager")
    loss = OhemCrossEntropyLoss(thresh=0.3)
    expected = value_and_grad(loss, logits, target)
    graphs = Graphs()
    result = value_and_grad(torch.compile(loss, fullgraph=True, backend=graphs), logits, target)
    torch.testing.assert_close(result, expected)
    assert (OPERATOR in graphs.operators) == (layout in ("channels_last", "full size"))


REGION_RULES = [
    {"kind": "tversky", "gamma": 2.0, "pool": "image", "class_weight": [1, 2, 3, 4, 5]},
    {"use_sigmoid": True, "squared": True, "classes": "all", "smooth": 1.0, "align_corners": True},
    {"label_smoothing": 0.1, "pool": "world"},
]


@pytest.mark.parametrize(
    ("rule", "weighted"), [*zip(REGION_RULES, (True, False, True), strict=True)]
)
def test_region_loss_equals_eager_mode_and_keeps_one_operator(rule, weighted):
    channels = 1 if "use_sigmoid" in rule else 5
    logits, target = batch((2, channels, 6, 7), (46, 58))
    weight = None
    if weighted:
        weight = torch.rand(target.shape, generator=torch.Generator().manual_seed(1))
    loss = RegionLoss(**rule)
    graphs = Graphs()
    assert_compiled_equals(loss, graphs, logits, target, weight, stats={})
    assert graphs.operators == SUMS
    assert graphs.largest <= target.numel()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_pair_is_one_operator(smoothing):
    logits, target = batch(size=(46, 58))
    loss = Pair({"label_smoothing": smoothing, "thresh": 0.3}, {"kind": "jaccard"})
    stats, compiled_stats = {}, {}
    expected = value_and_grad(loss, logits, target, stats=stats)
    graphs = Graphs()
    function = torch.compile(loss, fullgraph=True, backend=graphs)
    result = value_and_grad(function, logits, target, stats=compiled_stats)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(compiled_stats, stats)
    assert graphs.operators == SUMS
    assert graphs.largest <= target.numel()


@pytest.mark.parametrize("layout", ["1-D", "eager"])
def test_region_loss_without_bands(monkeypatch, layout):
    """Where logits are upsampled in eager mode, they are in a compiled model, without operators."""
    shapes = {"shape": (2, 5, 7), "size": (29,)} if layout == "1-D" else {}
    if layout == "eager":
        monkeypatch.setenv("OHEM_MM_BACKEND", "eager")
    logits, target = batch(**shapes, dtype=torch.float64)
    loss = Pair()
    expected = value_and_grad(loss, logits, target)
    graphs = Graphs()
    result = value_and_grad(torch.compile(loss, fullgraph=True, backend=graphs), logits, target)
    torch.testing.assert_close(result, expected)
    assert graphs.operators == []


@pytest.mark.parametrize("loss", [OhemCrossEntropyLoss(), Pair()])
def test_non_finite_logits_show(loss):
    logits, target = batch()
    logits[0, 1, 2, 3] = torch.nan
    expected = value_and_grad(loss, logits, target)
    result = value_and_grad(
        torch.compile(loss, fullgraph=True, backend="aot_eager"), logits, target
    )
    assert expected[0].isnan()
    torch.testing.assert_close(result, expected, equal_nan=True)


@pytest.mark.parametrize(
    "loss",
    [
        *(
            slow(OhemCrossEntropyLoss(min_kept=0.5, pool=pool))
            for pool in ("batch", "image", "class")
        ),
        Pair({"min_kept": 0.5}, {"pool": "image", "label_smoothing": 0.1}),
    ],
)
def test_shapes_that_vary_are_compiled_once(loss):
    graphs = Graphs()
    function = torch.compile(loss, fullgraph=True, backend=graphs, dynamic=True)
    for images, low, high in ((2, (6, 7), (23, 29)), (3, (5, 9), (40, 31)), (4, (8, 8), (64, 64))):
        logits, target = batch((images, 5, *low), high)
        expected = value_and_grad(loss, logits, target)
        torch.testing.assert_close(value_and_grad(function, logits, target), expected)
    assert len(graphs.graphs) == 2  # forward and backward


def peak(run):
    """Peak bytes above the start in torch's allocator, and the largest single allocation."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    sizes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    most = now = 0
    for _, size in sorted(sizes):
        now += size
        most = max(most, now)
    return most, max(size for _, size in sizes)


@pytest.mark.parametrize("loss", [OhemCrossEntropyLoss(), Pair()])
def test_peak_memory_of_a_compiled_step(monkeypatch, loss):
    """Measured, in a whole step with inductor: far below one tensor of upsampled logits."""
    logits, target = batch((2, 40, 16, 24), (256, 192))
    full = 4 * 40 * target.numel()

    def step(function):
        return lambda: value_and_grad(function, logits, target)

    function = torch.compile(loss, fullgraph=True)
    expected = step(loss)()
    try:
        result = step(function)()
    except torch._inductor.exc.InductorError as error:  # no C++ compiler on this machine
        pytest.skip(str(error)[:200])
    torch.testing.assert_close(result, expected)
    most, largest = peak(step(function))
    assert most < full / 2
    assert largest <= max(4 * 2**18, 8 * target.numel())  # a band, or a map of int64
    monkeypatch.setenv("OHEM_MM_BACKEND", "eager")
    assert peak(step(loss))[0] > 2 * full  # what is measured would show


def test_a_compiled_head_with_both_losses_holds_no_upsampled_logits():
    pytest.importorskip("mmseg.models")
    from mmengine.registry import init_default_scope

    from ohem_mm.bench.heads import bare_head, make_samples
    from ohem_mm.hooks.fused import fuse_heads

    init_default_scope("mmseg")
    ours = [{"type": "ohem_mm.OhemCrossEntropyLoss"}, {"type": "ohem_mm.RegionLoss"}]
    head = bare_head(5, ours)
    assert fuse_heads(torch.nn.Sequential(head), []) == [("0 (FCNHead)", "fused")]
    logits, target = batch(size=(46, 58))
    data = make_samples(target)

    def step(logits):
        losses = head.loss_by_feat(logits, data)
        return torch.stack([losses[f"loss_{name}"] for name in ("ohem", "region")])

    expected = value_and_grad(step, logits)
    graphs = Graphs()
    result = value_and_grad(torch.compile(step, fullgraph=True, backend=graphs), logits)
    torch.testing.assert_close(result, expected)
    assert graphs.operators == SUMS
    assert graphs.largest <= target.numel()


def test_a_compiled_network_trains_as_it_does_uncompiled():
    torch.manual_seed(0)
    network = torch.nn.Conv2d(3, 5, 3, stride=4, padding=1)
    images, (_, target) = torch.randn(2, 3, 24, 32), batch(size=(24, 32))
    criterion = OhemCrossEntropyLoss(thresh=0.9)
    found = []
    for compile_it in (False, True):
        model = copy.deepcopy(network)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)

        def step(images, target, model=model):
            return criterion(model(images), target)

        if compile_it:
            step = torch.compile(step, fullgraph=True, backend="aot_eager")
        for _ in range(3):
            optimizer.zero_grad()
            step(images, target).backward()
            optimizer.step()
        found.append(list(model.parameters()))
    torch.testing.assert_close(*found)


def test_transforms_of_torch_func_within_a_compiled_function():
    logits, target = batch(dtype=torch.float64)

    def one(z, labels):
        return ohem_cross_entropy(z[None], labels[None], thresh=0.4, min_kept=0.4)

    gradients = torch.func.vmap(torch.func.grad(one))
    function = torch.compile(gradients, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(function(logits, target), gradients(logits, target))


@pytest.mark.parametrize(
    ("dtype", "smoothing", "use_sigmoid"),
    [(torch.bfloat16, 0.1, False), (torch.float32, 0.0, True), (torch.float64, 0.1, True)],
)
def test_operators_keep_their_promises(dtype, smoothing, use_sigmoid):
    """Schema, fake kernel and autograd, as torch checks them."""
    logits, target = batch((2, 3, 4, 3), (9, 7), dtype)
    options = (use_sigmoid, smoothing, True, True)
    inputs = (logits, target, target != 255, *options)
    torch.library.opcheck(compiled._forward, inputs)
    torch.library.opcheck(compiled._forward, (logits.requires_grad_(), *inputs[1:]))
    loss, _, _ = compiled._forward(*inputs)
    grad = torch.rand_like(loss)
    inputs = (grad, logits.detach(), *inputs[1:3], loss.detach(), *options)
    torch.library.opcheck(compiled._backward, inputs)


@pytest.mark.parametrize(
    ("dtype", "channels", "options", "weighted"),
    [
        (torch.bfloat16, 3, (False, False, 0.1, None, True, False), True),
        (torch.float32, 1, (True, False, 0.0, 0.0, False, True), False),
        (torch.float64, 3, (False, True, 0.0, 0.1, True, True), False),
    ],
)
def test_region_operators_keep_their_promises(dtype, channels, options, weighted):
    logits, target = batch((2, channels, 4, 3), (9, 7), dtype)
    weight = torch.rand(target.shape) if weighted else None
    inputs = (logits, target, target != 255, weight, *options)
    torch.library.opcheck(compiled_region._forward, inputs)
    torch.library.opcheck(compiled_region._forward, (logits.requires_grad_(), *inputs[1:]))
    intersection, predicted, _, _, loss, _ = compiled_region._forward(*inputs)
    pair = options[3] is not None
    grads = [torch.rand_like(intersection), torch.rand_like(predicted) if pair else None]
    grads.append(torch.rand_like(loss) if pair else None)
    inputs = (*grads, logits.detach(), *inputs[1:4], loss.detach(), *options)
    torch.library.opcheck(compiled_region._backward, inputs)


def test_a_second_derivative_of_the_operator_is_refused():
    logits, target = batch(dtype=torch.float64)
    logits.requires_grad_()
    loss, _, _ = compiled._forward(logits, target, target != 255, False, 0.0, False, False)
    (grad,) = torch.autograd.grad(loss.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.square().sum().backward()


def test_a_second_derivative_of_the_region_operator_is_refused():
    logits, target = batch(dtype=torch.float64)
    logits.requires_grad_()
    options = (False, False, 0.0, None, False, False)
    predicted = compiled_region._forward(logits, target, target != 255, None, *options)[1]
    (grad,) = torch.autograd.grad(predicted[0, 0], logits, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.square().sum().backward()


@pytest.mark.parametrize(
    ("loss", "operator", "strict"),
    [
        (OhemCrossEntropyLoss(min_kept=0.5, pool="class"), OPERATOR, False),
        (OhemCrossEntropyLoss(min_kept=0.5, pool="class"), OPERATOR, True),
        (Pair({"min_kept": 0.5}, {"kind": "tversky"}), SUMS[0], True),
    ],
)
def test_export(loss, operator, strict):
    images, h, w = (torch.export.Dim(name, min=2) for name in ("images", "h", "w"))
    shapes = {"pred": {0: images, 2: h, 3: w}, "target": {0: images, 1: 4 * h, 2: 4 * w}}
    logits, target = batch((2, 5, 6, 7), (24, 28))
    program = torch.export.export(loss, (logits, target), dynamic_shapes=shapes, strict=strict)
    operators = [str(node.target) for node in program.graph.nodes if "ohem_mm" in str(node.target)]
    assert operators == [operator]
    for shape in ((2, 5, 6, 7), (3, 5, 4, 9)):
        logits, target = batch(shape, (4 * shape[2], 4 * shape[3]))
        expected = value_and_grad(loss, logits, target)
        torch.testing.assert_close(value_and_grad(program.module(), logits, target), expected)


@pytest.mark.parametrize(
    "loss",
    [
        *(OhemCrossEntropyLoss(min_kept=0.5, pool=pool) for pool in ("batch", "image", "class")),
        RegionLoss(pool="image", use_sigmoid=True),
        Pair(),
    ],
)
def test_tensors_without_values(loss):
    logits, target = batch()
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(logits.requires_grad_())
        value = loss(fake, mode.from_tensor(target))
        (grad,) = torch.autograd.grad(value, fake)
    assert value.shape == ()
    assert grad.shape == logits.shape


def test_eager_mode_does_without_the_operators(monkeypatch):
    """A custom operator costs more per call than a function, and imports the compiler."""

    def refuse(*_):
        raise AssertionError("an operator was called")

    for module in (compiled, compiled_region):
        monkeypatch.setattr(module, "_forward", refuse)
        monkeypatch.setattr(module, "_backward", refuse)
    assert ops.kept_cross_entropy is compiled.kept_cross_entropy
    assert ops.kept_pair is compiled_region.kept_pair
    for loss in (OhemCrossEntropyLoss(), RegionLoss(), Pair()):
        value_and_grad(loss, *batch())
