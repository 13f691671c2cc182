"""Several processes that talk by gloo."""

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_ranks(ranks, work):
    """What ``work(rank, ranks)``, a function of a module, returns on each rank."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_run, (ranks, folder, work), nprocs=ranks)
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(ranks)]


def _run(rank, ranks, folder, work):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks
    )
    torch.save(work(rank, ranks), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def averaged(loss, logits, ranks):
    """Loss and gradient as DistributedDataParallel averages them, after ``loss.backward()``.

    It averages the gradients of the parameters, so here those of the inputs.
    """
    mean = loss.detach() / ranks
    dist.all_reduce(mean)
    return mean, logits.grad / ranks
