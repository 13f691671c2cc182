"""One of two processes that train over gloo, of which one leaves late: ``exits.py`` starts it.

``late_rank.py plain SECONDS`` ends as torch's tutorials do, ``late_rank.py ours SECONDS`` as the
tools of this package do.
"""

import sys
import time

import torch
import torch.distributed as dist


def main() -> None:
    """Train a little, and stay for some seconds."""
    dist.init_process_group("gloo")
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
    for _ in range(3):
        model(torch.randn(2, 4)).sum().backward()
    dist.broadcast(torch.zeros(3), 0)
    time.sleep(float(sys.argv[2]))
    print(f"rank {dist.get_rank()} is done", flush=True)


if sys.argv[1] == "plain":
    main()
    dist.destroy_process_group()
else:
    from ohem_mm import cli

    sys.exit(cli.run(main))
