"""Record what PaddleSeg's own OhemCrossEntropyLoss gives, for tests that run without Paddle.

In an environment of its own, from the root of the repository: ``pip install torch
paddlepaddle==3.3.1``, a clone of PaddleSeg at the commit named below with what it imports, then
``PYTHONPATH=.:tests:CLONE python tests/record_paddleseg.py``. The last release on PyPI,
2.8.0, raises a TypeError under Paddle 3; the OHEM loss has taken ``weight=`` since 2.9.1.

It writes ``tests/paddleseg.json``, loss and gradient on the draws of ``test_reference.py``, and the
cells of the table that ``tools/edge_cases.py`` prints.
"""

import json
import warnings
from pathlib import Path

import paddle
import paddleseg
import torch
from draws import draw, fingerprint
from paddleseg.models.losses import OhemCrossEntropyLoss

from ohem_mm.bench.edge_cases import ohem as edge_cases

COMMIT = "d7975e7cb3b9102eae4eabcef5afb81b878473aa"
DRAWS = 400


class Paddle(torch.autograd.Function):
    """PaddleSeg's loss as a function of PyTorch."""

    @staticmethod
    def forward(ctx, logits, target, settings):
        theirs = paddle.to_tensor(logits.detach().numpy())
        theirs.stop_gradient = False
        loss = OhemCrossEntropyLoss(**settings)(theirs, paddle.to_tensor(target.numpy()))
        loss.backward()
        ctx.save_for_backward(torch.from_numpy(theirs.grad.numpy()))
        return logits.new_tensor(float(loss))

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0], None, None


def original(logits, target, **rule):
    if rule.get("class_weight") is not None:
        rule["weight"] = list(map(float, rule["class_weight"]))
    rule.pop("class_weight", None)
    return Paddle.apply(logits, target, rule)


def main():
    warnings.simplefilter("ignore")
    versions = {
        "paddlepaddle": paddle.__version__,
        "paddleseg": f"{paddleseg.__version__} at {COMMIT}",
        "torch": torch.__version__,
    }
    draws = {}
    for dtype in (torch.float64, torch.float32):
        draws[str(dtype)] = []
        for seed in range(DRAWS):
            problem = draw(seed, "paddleseg", dtype)
            logits = problem.logits.clone().requires_grad_()
            loss = original(logits, problem.target, **problem.settings)
            loss.backward()
            row = [loss.item(), *fingerprint(logits.grad)]
            draws[str(dtype)].append([float(f"{value:.9g}") for value in row])
    cells = {name: edge_cases.cell(original, case) for name, case in edge_cases.cases().items()}
    files = {
        Path(__file__).with_name("paddleseg.json"): {"versions": versions, "draws": draws},
        edge_cases.RECORD: {"versions": versions, "cells": cells},
    }
    for path, record in files.items():
        path.write_text(json.dumps(record, indent=1).replace(",\n   ", ",") + "\n")


if __name__ == "__main__":
    main()
