"""Records of the benchmarks: files to which finished runs are only ever appended.

Of the accuracy benchmark: JSON lines, one for a finished run of one variant with one seed. A kill
may tear the last line; it then does not count. Of the others: CSV.
"""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ohem_mm.disk import extend
from ohem_mm.errors import UserError


def record_key(record: dict[str, Any]) -> tuple[Any, ...]:
    """What makes two records the same job."""
    return tuple(record[key] for key in ("benchmark", "variant", "seed", "config_hash"))


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read a file of records; a last line that a kill has torn does not count."""
    return _parse(path.read_bytes(), path)[0] if path.is_file() else []


def _parse(content: bytes, path: Path) -> tuple[list[dict[str, Any]], int]:
    """The records, and how many bytes at the end belong to a torn one."""
    records: list[dict[str, Any]] = []
    lines = content.splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            record_key(record)
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines) and not line.endswith(b"\n"):
                return records, len(line)
            raise UserError(f"{path}, line {number} is not a record of this tool") from error
        records.append(record)
    return records, 0


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Append a record on a line of its own, unless the file has it already."""

    def more(content: bytes) -> tuple[bytes, int]:
        records, torn = _parse(content, path)
        if record_key(record) in map(record_key, records):
            return b"", 0
        return (json.dumps(record, ensure_ascii=False) + "\n").encode(), torn

    extend(path, more)


@dataclass(frozen=True)
class Rows:
    """CSV files of records with these columns."""

    columns: list[str]

    def read(self, path: Path) -> list[dict[str, str]]:
        """All rows of a file."""
        if not path.is_file():
            raise UserError(f"no records at {str(path)!r}; run without --report first")
        return self._parse(path.read_bytes(), path)

    def append(self, path: Path, rows: list[dict[str, Any]]) -> None:
        """Append rows to a file, which is made if need be."""

        def more(content: bytes) -> tuple[bytes, int]:
            self._parse(content, path)
            text = io.StringIO()
            writer = csv.DictWriter(text, self.columns, lineterminator="\n")
            if not content:
                writer.writeheader()
            writer.writerows(rows)
            return text.getvalue().encode(), 0

        extend(path, more)

    def _parse(self, content: bytes, path: Path) -> list[dict[str, str]]:
        reader = csv.DictReader(io.StringIO(content.decode(), newline=""))
        if content and reader.fieldnames != self.columns:
            raise UserError(f"the columns of {str(path)!r} are not {', '.join(self.columns)}")
        return list(reader)
