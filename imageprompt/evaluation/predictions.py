"""The answers of a run, in a file that grows with them, so that a stopped run goes on where it was.

The first line says what the answers depend on: task, model, data, decoding, versions. Each further line is a row's
record. A run with other settings does not go on with the file.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..provenance import differences

Record = dict[str, Any]


class Predictions:
    """Records in a JSON lines file.

    Args:
        path: of the file; made if it is not there.
        about: what the answers depend on; JSON.
        batch_size: records that come together. Those of a batch that is not complete are dropped: their rows are
            answered again, beside the same neighbours.
        total: how many records there are to be.
        restart: begin anew, whatever the file holds.

    Raises:
        ValueError: if the file holds answers of another run, or is none of this kind.
    """

    def __init__(self, path: Path, about: dict[str, Any], *, batch_size: int, total: int, restart: bool = False):
        self.path = path
        self.records: list[Record] = []
        heading = _line(about)
        if restart or not path.exists() or not path.stat().st_size:
            path.write_text(heading, encoding="utf-8")
            return
        # What stands behind the last line's end was being written when the run was stopped.
        lines = path.read_bytes().split(b"\n")[:-1]
        try:
            found, *records = [json.loads(line) for line in lines]
            in_order = [record["row"] for record in records] == list(range(len(records)))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no file of predictions: {error}. {_MEND}") from error
        if not in_order:
            raise ValueError(f"{path} does not hold the rows one after the other. {_MEND}")
        different = differences(found, json.loads(heading))
        if different and not records:
            path.write_text(heading, encoding="utf-8")
            return
        if different:
            raise ValueError(f"{path} holds the answers of another run, with {'; '.join(different)}. {_MEND}")
        if len(records) < total:
            records = records[: len(records) - len(records) % batch_size]
        self.records = records
        with path.open("r+b") as file:
            file.truncate(sum(len(line) + 1 for line in lines[: 1 + len(records)]))

    def add(self, records: Sequence[Record]) -> None:
        """Write the records of a batch."""
        self.records += records
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(map(_line, records)))


_MEND = "Choose another `--output`, or pass `--restart` to begin anew."


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, sort_keys=True) + "\n"
