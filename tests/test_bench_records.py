"""Records: appended once, by whomever, and read again after a kill."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mmseg")

from ohem_mm import cli
from ohem_mm.bench import records as recs

pytestmark = pytest.mark.usefixtures("elsewhere")


def key(seed, variant="ce"):
    return {"benchmark": "tiny", "variant": variant, "seed": seed, "config_hash": "h"}


def test_a_record_is_appended_once():
    path = Path("new/records.jsonl")
    for seed in (0, 1, 0):
        recs.append_record(path, {**key(seed), "name": "é"})
    assert [record["seed"] for record in recs.read_records(path)] == [0, 1]
    assert path.read_text().count("\n") == 2


@pytest.mark.parametrize("torn", ['{"benchmark": "ti', '{"benchmark": "tiny"}', "\u00e9"[:1]])
def test_a_torn_line_is_replaced(torn):
    path = Path("records.jsonl")
    recs.append_record(path, key(0))
    with path.open("a") as file:
        file.write(torn)
    assert recs.read_records(path) == [key(0)]
    recs.append_record(path, key(1))
    assert path.read_text() == f"{json.dumps(key(0))}\n{json.dumps(key(1))}\n"


def test_a_line_that_lacks_only_its_end_counts():
    path = Path("records.jsonl")
    path.write_text(json.dumps(key(0)))
    recs.append_record(path, key(0))
    recs.append_record(path, key(1))
    assert recs.read_records(path) == [key(0), key(1)]


def test_a_broken_line_in_the_middle_is_an_error():
    path = Path("records.jsonl")
    path.write_text(f"{json.dumps(key(0))}\nnonsense\n")
    with pytest.raises(cli.UserError, match=r"records\.jsonl, line 2 is not a record"):
        recs.read_records(path)


def test_appending_from_many_processes_loses_nothing():
    code = (
        "import sys; from pathlib import Path; from ohem_mm.bench.records import append_record\n"
        "for i in range(20):\n"
        "    record = dict(benchmark='b', variant=sys.argv[1] * (i % 2), seed=i, config_hash='')\n"
        "    append_record(Path('records.jsonl'), {**record, 'x': 'y' * 5000})"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, name]) for name in ("a", "b")]
    assert [process.wait() for process in processes] == [0, 0]
    records = recs.read_records(Path("records.jsonl"))
    # The even ones are the same job in both.
    assert len(records) == 30
    assert len(set(map(recs.record_key, records))) == 30
