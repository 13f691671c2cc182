"""The losses as modules among PyTorch's tools: copies, pickles, checkpoints, replicas."""

import copy
import io
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from ohem_mm import OhemCrossEntropyLoss, RegionLoss

LOSSES = [
    (OhemCrossEntropyLoss, {}),
    (
        OhemCrossEntropyLoss,
        {"thresh": None, "min_kept": 20, "pool": "class", "class_weight": [1.0, 2.0, 0.5]},
    ),
    (
        OhemCrossEntropyLoss,
        {"preset": "hrnet", "min_kept": 9, "ignore_index": 1, "label_smoothing": 0.1},
    ),
    (
        OhemCrossEntropyLoss,
        {"thresh": 0.9, "min_kept_per": "image", "min_kept": 30, "loss_name": "loss_hard"},
    ),
    (RegionLoss, {"class_weight": [1.0, 2.0, 0.5], "ignore_index": 1}),
]
every_loss = pytest.mark.parametrize(("kind", "settings"), LOSSES)


def problem():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 5, generator=generator)
    return logits, torch.randint(0, 3, (2, 8, 10), generator=generator)


def through_pickle(loss):
    return pickle.loads(pickle.dumps(loss))


def through_a_file(loss):
    file = io.BytesIO()
    torch.save(loss, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@every_loss
@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, through_pickle, through_a_file])
def test_copies_are_the_same_loss(kind, settings, copied):
    loss = kind(**settings)
    other = copied(loss)
    assert repr(other) == repr(loss)
    assert (other.rule, other.loss_name) == (loss.rule, loss.loss_name)
    logits, target = problem()
    assert torch.equal(other(logits, target), loss(logits, target))
    other.ignore_index = 2  # a copy is of its own
    assert loss.ignore_index != 2


def test_a_deep_copy_has_class_weights_of_its_own():
    loss = OhemCrossEntropyLoss(class_weight=[1.0, 2.0, 0.5])
    copy.deepcopy(loss).class_weight.zero_()
    assert loss.class_weight.tolist() == [1.0, 2.0, 0.5]


def test_a_whole_module_is_refused_by_a_load_of_weights_alone():
    """As every class outside torch is; `torch.load` says what to do."""
    file = io.BytesIO()
    torch.save(OhemCrossEntropyLoss(), file)
    file.seek(0)
    with pytest.raises(pickle.UnpicklingError, match="OhemCrossEntropyLoss|OhemRule"):
        torch.load(file, weights_only=True)


def network(loss):
    torch.manual_seed(0)
    return nn.ModuleDict({"net": nn.Conv2d(3, 3, 1), "loss": loss})


@every_loss
def test_checkpoints_fit_networks_with_any_loss(kind, settings):
    ours = network(kind(**settings))
    plain = network(nn.CrossEntropyLoss())
    assert list(ours.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(plain.state_dict(), strict=True)
    ours.load_state_dict(network(OhemCrossEntropyLoss()).state_dict(), strict=True)


class Step(nn.Module):
    """A network that returns its loss, as DataParallel wants it."""

    def __init__(self, loss):
        super().__init__()
        self.net = nn.Conv2d(3, 3, 1)
        self.loss = loss

    def forward(self, images, target):
        return self.loss(self.net(images), target)[None]


@every_loss
def test_data_parallel(kind, settings):
    loss = kind(**settings)
    # What DataParallel makes for each GPU: a shallow copy that shares the tables of the module.
    replica = loss._replicate_for_data_parallel()
    logits, target = problem()
    assert torch.equal(replica(logits, target), loss(logits, target))
    assert replica.rule == loss.rule
    model = Step(loss)
    value = nn.DataParallel(model)(logits, target)  # without GPUs it calls the model itself
    assert torch.equal(value, model(logits, target))
    if torch.cuda.is_available():
        value = nn.DataParallel(copy.deepcopy(model).cuda())(logits.cuda(), target.cuda())
        assert value.isfinite().all()


@pytest.mark.skipif(
    torch.__version__.startswith("2.4."), reason="torch 2.4 cannot trace reads of os.environ"
)
@every_loss
def test_export(kind, settings):
    model = Step(kind(**settings))
    example = problem()
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, example), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    # Other values of the same shapes: nothing was frozen into the program.
    images, target = example[0].flip(0) * 2, example[1].flip(1)
    torch.testing.assert_close(loaded(images, target), model(images, target))


def test_compiled_with_graph_breaks_it_is_the_same():
    """What old releases fall back to."""
    model = Step(OhemCrossEntropyLoss(min_kept=0.5))
    images, target = problem()
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(images, target), model(images, target))


def test_class_weights_move_with_the_module():
    loss = OhemCrossEntropyLoss(class_weight=[1.0, 2.0, 0.5])
    assert loss.to("meta").class_weight.device.type == "meta"


def test_the_page_on_pytorch_runs_as_it_stands():
    page = (Path(__file__).parents[1] / "docs" / "pytorch.md").read_text()
    (snippet,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    names = {}
    exec(snippet, names)
    assert names["logits"].grad.abs().sum() > 0
