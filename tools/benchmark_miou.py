"""Accuracy of losses on one data set: paired training runs, records, tables and plots.

    python tools/benchmark_miou.py quickstart                  # scenes: no data, a few minutes
    python tools/benchmark_miou.py run camvid/frozen.yaml --data-root data/camvid --jobs 2
    python tools/benchmark_miou.py report camvid/frozen.yaml --plot plots

A benchmark file names configs, what each variant changes in them, and seeds. With ``tune:`` each
variant first takes its own best value of a setting on the validation split. A variant with a seed
is a job: a process that trains and tests through mmengine's Runner. Runs of one seed start
from the same weights and see the same batches in the same order. A finished job is one JSON line in
the records, and tables and plots are made from the records alone. Stop or kill it at any time: the
same command goes on from the last checkpoints and runs no finished job again.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

# As in train.py: torch's threads must not spin while other processes want the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from ohem_mm import cli
from ohem_mm.bench import plots, report
from ohem_mm.bench.files import load_benchmark
from ohem_mm.bench.jobs import run_benchmark
from ohem_mm.bench.progress import say
from ohem_mm.bench.records import read_records
from ohem_mm.bench.results import select


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in (
        ("run", "run the jobs that have no record yet, and print the report"),
        ("report", "print the report, from the records alone"),
        ("quickstart", "plain cross-entropy, mmseg's sampler and ours on generated scenes"),
    ):
        add = commands.add_parser(name, help=text, description=text).add_argument
        if name != "quickstart":
            add("benchmark", help="path of a benchmark file, or its name below configs/")
            add("--records", type=Path, help="file of the records (default: BENCHMARK.jsonl)")
            add("--plot", type=Path, metavar="DIR", help="draw plots there")
            add(
                "--at",
                type=float,
                metavar="VALUE",
                help="one value of what is tuned for all variants, instead of each one's best",
            )
        if name == "report":
            add(
                "--write",
                type=Path,
                metavar="FILE.md",
                help="put the report between its marks in this file: "
                + " and ".join(report.MARKS).format("NAME"),
            )
            continue
        jobs = min(2, os.cpu_count() or 1) if name == "quickstart" else 1
        add("--jobs", type=int, default=jobs, help=f"jobs side by side (default: {jobs})")
        add("--data-root", help="where the data set lies")
        add("--work-dir", help="folder for logs and checkpoints (default: work_dirs)")
        add("--variants", nargs="+", help="only these")
        add("--seeds", nargs="+", type=int, help="instead of the file's")
        add("--keep-checkpoints", action="store_true", help="also of jobs that have finished")
        add("--launcher", choices=["none", "pytorch", "slurm"], default="none")
        add("--gpus", type=int, default=1, help="processes of a job, with a launcher")
        add("--partition", help="of Slurm")
        add(
            "--cfg-options",
            nargs="+",
            default={},
            action=cli.ConfigOptions,
            metavar="KEY=VALUE",
            help="change the config of every job",
        )
    return parser.parse_args()


def main() -> None:
    """Run the command."""
    args = parse_args()
    if args.command == "quickstart":
        benchmark, args.at = load_benchmark("ohem_mm::quickstart/benchmark.yaml"), None
        args.plot = Path(args.work_dir or "work_dirs", benchmark.name)
        args.records = args.plot / "records.jsonl"
    else:
        benchmark = load_benchmark(args.benchmark)
    records = args.records or benchmark.path.with_suffix(".jsonl")
    if args.command != "report":
        if args.jobs < 1 or args.gpus < 1:
            raise cli.UserError("--jobs and --gpus must be 1 or more")
        args.metric = benchmark.metric
        run_benchmark(benchmark, args, records)
    results = select(benchmark, read_records(records), args.at)
    text = report.markdown(results)
    if args.command == "report" and args.write:
        report.write(args.write, results.block, text)
    else:
        print(text, end="")
    if args.plot:
        say("plots: " + ", ".join(map(str, plots.plot(results, args.plot))))


if __name__ == "__main__":
    sys.exit(cli.run(main))
