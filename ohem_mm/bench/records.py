"""Records of a benchmark: one JSON object on a line, one finished run of one variant with one seed.

Lines are only ever appended. A kill may tear the last one; it then does not count.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ohem_mm.disk import extend
from ohem_mm.errors import UserError


def record_key(record: dict[str, Any]) -> tuple[Any, ...]:
    """What makes two records the same job."""
    return tuple(record[key] for key in ("benchmark", "variant", "seed", "config_hash"))


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read a file of records; a last line that a kill has torn does not count.

    Raises:
        UserError: Another line is not a record.
    """
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
