"""What is timed: head steps and whole training iterations, each with its value checked first."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ohem_mm.bench.heads import make_samples
from ohem_mm.bench.speed.problems import Problem, Shape, check, image_floor, make_labels, measure
from ohem_mm.bench.speed.providers import PROVIDERS, UnavailableError, need_backend, need_mmseg
from ohem_mm.bench.speed.values import backend, expected
from ohem_mm.config import config_path

NETWORKS = {
    "bisenetv2": "bisenetv2/bisenetv2_fcn_4xb4{}-160k_cityscapes-1024x1024",
    "segformer_mit-b0": "segformer/segformer_mit-b0_8xb1{}-160k_cityscapes-1024x1024",
}


class Job(NamedTuple):
    """Something to be timed: phases that run one after the other."""

    provider: str
    acc_seg: bool
    phases: list[Callable[[], object]]
    reset: Callable[[], None]  # drops what a step leaves behind


def head_job(name: str, problem: Problem, acc_seg: bool, shape: Shape) -> Job:
    """A head step in two phases, forward and backward; its value is checked first."""
    step, where = PROVIDERS[name].build(problem, acc_seg), f"{name} at {shape}"
    value, seen = step(problem.logits)
    wanted = expected(PROVIDERS[name].value, problem)
    check(f"the loss of {where}", float(value.detach()), wanted, problem.unsure)
    if seen is not None:
        check(f"acc_seg of {where}", float(seen), problem.accuracy)
    del value, seen
    losses: list[Tensor] = []

    def reset() -> None:
        losses.clear()
        problem.logits.grad = None

    phases: list[Callable[[], object]] = [
        lambda: losses.append(step(problem.logits)[0]),
        lambda: losses.pop().backward(),  # type: ignore[no-untyped-call]
    ]
    return Job(name, acc_seg, phases, reset)


def network_job(name: str, network: str, shape: Shape, device: str) -> tuple[Job, float]:
    """A training iteration of a shipped config, and the share of hard pixels in its main head."""
    provider = PROVIDERS[name]
    if provider.variant is None:
        raise UnavailableError("the network's heads cannot use it")
    if provider.backend:
        need_backend(provider.backend, torch.empty(1, 1, 1, 1, device=device))
    need_mmseg()
    from mmengine.config import Config
    from mmengine.model import revert_sync_batchnorm
    from mmengine.optim import build_optim_wrapper
    from mmseg.models.decode_heads.decode_head import BaseDecodeHead
    from mmseg.registry import MODELS

    cfg = Config.fromfile(config_path(NETWORKS[network].format(provider.variant)))
    cfg.model.data_preprocessor.size = (shape.height, shape.width)
    torch.manual_seed(0)
    model = revert_sync_batchnorm(MODELS.build(cfg.model)).to(device).train()
    heads = [head for head in model.modules() if isinstance(head, BaseDecodeHead)]
    for head in heads:
        if head.sampler is not None:
            head.sampler.min_kept = image_floor(shape.height * shape.width)
            if "top-k" in name:
                head.sampler.thresh = None
    if provider.fused:
        from ohem_mm.hooks.fused import fuse_heads

        fuse_heads(model, [])
    logging.disable()  # it would list every parameter
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    logging.disable(logging.NOTSET)
    for group in wrapper.optimizer.param_groups:
        group["lr"] = 0.0  # the work is the same, and all providers keep the same network

    generator = torch.Generator().manual_seed(0)
    _, labels = make_labels(shape, generator)
    size = (shape.n, 3, shape.height, shape.width)
    images = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator).to(device)
    labels = labels.to(device)
    data = {"inputs": list(images), "data_samples": make_samples(labels)}

    seen: list[Tensor] = []  # the small logits of each head
    hooks = [
        head.conv_seg.register_forward_hook(lambda _, __, out: seen.append(out)) for head in heads
    ]
    with backend(provider.backend), torch.no_grad():
        losses = model(**model.data_preprocessor(data, True), mode="loss")
    for hook in hooks:
        hook.remove()
    problems = [measure(logits, labels) for logits in seen]
    wanted = sum(expected(provider.value, each) for each in problems)
    value = sum(float(loss) for key, loss in losses.items() if "loss" in key)
    unsure = max(each.unsure for each in problems)
    check(f"the loss of {name} in {network}", value, wanted, unsure)

    def step() -> None:
        with backend(provider.backend):
            model.train_step(data, wrapper)

    return Job(name, True, [step], lambda: model.zero_grad(set_to_none=True)), problems[0].hard
