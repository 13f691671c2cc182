"""``pool='world'``: several processes equal one process on the batches put together."""

import itertools
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ohem_mm import ohem_cross_entropy
from ohem_mm.rule import Habits

RULES = [
    {"thresh": 0.7, "min_kept": 1 / 16},
    {"thresh": 0.05, "min_kept": 0.3},
    {"thresh": None, "min_kept": 37},
    {"thresh": 0.05, "min_kept": 7, "min_kept_per": "image", "avg": "valid"},
    {"thresh": 0.05, "min_kept": 10_000, "avg": "all", "always_keep": (1,)},
    {
        "thresh": 0.3,
        "min_kept": 25,
        "weighted_mean": True,
        "class_weight": torch.tensor([0.2, 1.0, 3.0]),
    },
    # Ignored pixels take places, of which one rank may have more than another.
    {"thresh": None, "min_kept": 0.29, "habits": Habits(ignored_take_slots=True, float_share=1)},
    {"thresh": 0.3, "min_kept": 55, "habits": Habits(ignored_take_slots=True)},
    {"thresh": 0.3, "min_kept": 1 / 16, "habits": Habits(ignored_take_slots=True)},
]
# Sizes of the batches of up to three ranks, and whether the second rank has valid pixels. An empty
# batch must not leave the other ranks waiting.
SIZES = [(2, 2, 2), (1, 3, 2), (2, 0, 1)]


def problem(sizes, second_is_ignored):
    generator = torch.Generator().manual_seed(0)
    batches = []
    for rank, images in enumerate(sizes):
        logits = torch.randn(images, 3, 5, 6, generator=generator, dtype=torch.float64) * 3
        logits = logits.round()  # ties across ranks
        target = torch.randint(0, 3, (images, 5, 6), generator=generator)
        target[:, 0] = 255
        if rank == 1 and second_is_ignored:
            target[:] = 255
        batches.append((logits, target))
    return batches


def run_rank(rank, ranks, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks
    )
    results = []
    for rule, sizes, ignored in itertools.product(RULES, SIZES, [False, True]):
        logits, target = problem(sizes[:ranks], ignored)[rank]
        logits.requires_grad_()
        loss = ohem_cross_entropy(logits, target, pool="world", **rule)
        loss.backward()
        # As DistributedDataParallel averages: the parameters' gradients, so here the inputs'.
        mean = loss.detach() / ranks
        dist.all_reduce(mean)
        results.append((mean, logits.grad / ranks))
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("ranks", [2, 3])
def test_equals_one_process(ranks):
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run_rank, (ranks, folder), nprocs=ranks)
        per_rank = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(ranks)]
    cases = list(itertools.product(RULES, SIZES, [False, True]))
    assert len(cases) == len(per_rank[0])
    for index, (rule, sizes, ignored) in enumerate(cases):
        batches = problem(sizes[:ranks], ignored)
        logits = torch.cat([logits for logits, _ in batches]).requires_grad_()
        target = torch.cat([target for _, target in batches])
        expected = ohem_cross_entropy(logits, target, pool="batch", **rule)
        expected.backward()
        grads = torch.cat([results[index][1] for results in per_rank])
        for results in per_rank:
            torch.testing.assert_close(
                results[index][0], expected.detach(), rtol=1e-6, atol=1e-9, msg=f"{rule} {sizes}"
            )
        torch.testing.assert_close(grads, logits.grad, rtol=1e-6, atol=1e-9)


def test_without_a_process_group_it_is_batch():
    logits, target = problem((3,), False)[0]
    for rule in RULES:
        batch = ohem_cross_entropy(logits, target, pool="batch", **rule)
        assert torch.equal(ohem_cross_entropy(logits, target, pool="world", **rule), batch)
