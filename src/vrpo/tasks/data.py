"""Rows from files and the hub: reading, renaming, naming, splitting. Knows no tokenizer."""

import csv
import gzip
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vrpo.config.tasks import FILE_SUFFIXES
from vrpo.errors import DataError
from vrpo.rng import stream_seed

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
LONGEST_NUMBER = 1024
"""Bits of an integer that is still read: as many as a float's largest; Python writes none with 4,300 digits."""


def shown(value: Any) -> str:
    """The start of a value for a message, on one line whatever it is."""
    try:
        text = " ".join(repr(value).split())
    # repr may be the user's code; and Python writes no number of 4,300 digits, and no list nested 1,000 deep
    except Exception as error:
        text = f"a {type(value).__name__} that cannot be written ({type(error).__name__})"
    return text if len(text) <= 60 else text[:57] + "..."


@dataclass(frozen=True, slots=True)
class Row:
    """One row with its name.

    Example: Row(row_id="gsm8k-17", values={"id": "gsm8k-17", "question": "...", "answer": "18"})
    """

    row_id: str
    values: Mapping[str, Any]

    def text(self, column: str) -> str:
        """The text in `column`; numbers are written out, without exponent; anything else is a DataError."""
        value = self.values.get(column)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if isinstance(value, int) and value.bit_length() > LONGEST_NUMBER:
                raise self.error(column, value, f"text or a number of at most {LONGEST_NUMBER} bits")
            if math.isfinite(value):
                text = str(value)
                # 0.00001 is 1e-05 to Python, which nobody wrote and no answer equals
                return np.format_float_positional(value, trim="-") if "e" in text else text
        if not isinstance(value, str) or not value.strip():
            raise self.error(column, value, "text")
        return value

    def has_answer(self) -> bool:
        """Whether column `answer` holds more than null, which is no answer; a row without the column is a DataError."""
        if "answer" not in self.values:
            raise DataError(
                f"{self.label}: no column 'answer'; write null where a row has no answer, or remove the row"
            )
        return self.values["answer"] is not None

    def error(self, column: str, value: Any, needed: str) -> DataError:
        """The error for a bad cell."""
        return DataError(
            f"{self.label}: column {column!r} holds {shown(value)}, {needed} is needed; correct or remove the row"
        )

    @property
    def label(self) -> str:
        """How a message names the row, on one line whatever its id is."""
        return f"row {self.row_id if self.row_id.isprintable() else shown(self.row_id):.60}"


def is_file(source: str) -> bool:
    """Whether `source` names a data file rather than a data set on the hub."""
    return source.lower().endswith(FILE_SUFFIXES)


def existing_file(source: str) -> Path | None:
    """The file of that name, `~` being the home folder; None where there is none."""
    try:
        path = Path(source).expanduser()
        return path if path.is_file() else None
    except (OSError, ValueError, RuntimeError):  # too long for a name, with a NUL in it, the home of nobody
        return None


def read_rows(source: str, *, subset: str | None = None, split: str = "train") -> list[dict[str, Any]]:
    """All rows of a file or of one split of a hub data set.

    Args:
        source: path of a .jsonl, .jsonl.gz, .json, .csv or .parquet file (`~` is the home folder), or a hub
            name. Cells of a CSV file are text, empty ones are None.
        subset: configuration of a hub data set.
        split: split of a hub data set.

    Raises:
        DataError: missing, unreadable or empty.
    """
    if is_file(source):
        path = existing_file(source)
        if path is None:
            raise DataError(
                f"{shown(source) if len(source) > 300 or not source.isprintable() else source}: no such file; correct the path (it is relative to the working directory)"
            )
        try:
            rows = _read_file(path)
        except csv.Error as error:
            raise DataError(
                f"{source}: no CSV ({first_line(error)}); close every quote, and double those inside a quoted cell"
            ) from error
        except (OSError, UnicodeDecodeError, EOFError) as error:
            raise DataError(
                f"{source}: cannot be read ({first_line(error)}); write it again as UTF-8"
            ) from error
    elif HUB_NAME.fullmatch(source) and not Path(source).exists():
        rows = _read_hub(source, subset, split)
    else:
        raise DataError(
            f"{source}: neither a data file nor a hub name; give a file that ends in {', '.join(FILE_SUFFIXES)}"
        )
    if not rows:
        raise DataError(f"{source}: no rows, at least 2 are needed; give a file with data")
    return rows


def _read_file(path: Path) -> list[dict[str, Any]]:
    name = path.name.lower()
    if name.endswith(".parquet"):
        return _read_parquet(path)
    if name.endswith(".csv"):
        return _read_csv(path)
    open_text = gzip.open if name.endswith(".gz") else open
    with open_text(path, "rt", encoding="utf-8-sig") as file:
        if name.endswith(".json"):
            return _parse_json(path, file.read())
        lines = enumerate(file, start=1)
        return [_parse_line(path, number, line) for number, line in lines if line.strip()]


LONGEST_CELL = 2**31 - 1
"""Characters of a CSV cell. Python's own limit of 131,072 is less than a long document has; a C long holds this everywhere."""
_LACKING: Any = object()
"""In place of cells that a row of a CSV file does not have."""


def _read_csv(path: Path) -> list[dict[str, Any]]:
    before = csv.field_size_limit(LONGEST_CELL)
    try:
        return _csv_rows(path)
    finally:
        csv.field_size_limit(before)


def _csv_rows(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        # strict: else a quote that nobody closes takes every row up to the next one, or to the end, into its cell
        reader = csv.DictReader(file, strict=True, restval=_LACKING)
        names = reader.fieldnames or []
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise DataError(f"{path}: column {twice[0]!r} stands twice in the header; rename one")
        rows = []
        for row in reader:
            if None in row:
                raise DataError(
                    f"{path} line {reader.line_num}: more cells than the header has; quote text that contains commas"
                )
            if _LACKING in row.values():
                raise DataError(
                    f"{path} line {reader.line_num}: fewer cells than the header has; write a comma for each, also where a cell is empty"
                )
            # a cell of CSV can say null in no other way, and pandas and `datasets` read it so
            rows.append({name: cell or None for name, cell in row.items()})
    return rows


def _parse_line(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line, object_pairs_hook=_no_key_twice)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path} line {number}: not JSON ({_json_problem(error)}); write one JSON object per line"
        ) from error
    if not isinstance(row, dict):
        raise DataError(
            f"{path} line {number}: {shown(row)} is not an object; write one JSON object per line"
        )
    return row


def _parse_json(path: Path, text: str) -> list[dict[str, Any]]:
    try:
        rows = json.loads(text, object_pairs_hook=_no_key_twice)
    except (ValueError, RecursionError) as error:
        where = f" line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(f"{path}{where}: not JSON ({_json_problem(error)}); correct the file") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: not a list of objects; write [{{...}}, {{...}}] or use .jsonl")
    return rows


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Python keeps the last one; which one was meant cannot be known.
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {shown(next(n for n in names if names.count(n) > 1))} stands twice")
    return found


def _json_problem(error: ValueError | RecursionError) -> str:
    # Besides malformed text there are numbers too long, and lists nested too deep, for Python to read.
    return error.msg if isinstance(error, json.JSONDecodeError) else first_line(error)


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    # Straight from pyarrow, which `datasets` brings: no second copy of the file in a cache.
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path}: not a parquet file ({first_line(error)}); write it again") from error


def _read_hub(name: str, subset: str | None, split: str) -> list[dict[str, Any]]:
    import datasets

    try:
        return list(datasets.load_dataset(name, subset, split=split))
    # The hub client raises more kinds than it documents (connection, permission, missing subset or split).
    except Exception as error:
        raise DataError(
            f"{name}: cannot load split {split!r} from the hub ({type(error).__name__}: {first_line(error)}); check the "
            "name and the network, or give a file"
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of what an error says, cut to a length that fits a message."""
    return (str(error).splitlines() or [""])[0][:200]


def name_rows(rows: Any, *, columns: Mapping[str, str], required: Sequence[str], source: str) -> list[Row]:
    """Rows with our column names and with ids: column `id` where it is unique, else the row number.

    Args:
        rows: as they were read; anything but mappings is refused.
        columns: our name -> the data set's name.
        required: our names of the columns the task reads; each must exist in the first row.
        source: where the rows come from, for messages.
    """
    given, rows = rows, list(rows) if isinstance(rows, Iterable) else []
    if not rows or not all(isinstance(row, Mapping) for row in rows):
        raise DataError(
            f"{source}: a list of dicts is needed, at least one, and this is {_kind(given, rows)}; give rows such as {{'prompt': ...}} (of a "
            "DataFrame df.to_dict('records'), of a DatasetDict one split)"
        )
    unnamed = next((name for row in rows for name in row if not isinstance(name, str)), "")
    if not isinstance(unnamed, str):
        raise DataError(
            f"{source}: column {shown(unnamed)} has no name, but reward functions get columns by name; name columns with text"
        )
    theirs = set(columns.values())
    existing = list(dict.fromkeys(name for row in rows for name in row))
    for ours in (*columns, *required):
        name = columns.get(ours, ours)
        if name not in existing and ours in columns:
            raise DataError(
                f"{source}: task.columns: {{{ours}: {name}}} names no column; there is {_names(existing)}"
            )
        if name not in existing:
            raise DataError(
                f"{source}: no column {name!r}, there is {_names(existing)}; rename the one that is "
                f"meant, or say which it is with task.columns: {{{ours}: <name>}} (in a file)"
            )
        if ours not in columns and ours in theirs:
            taker = next(new for new, old in columns.items() if old == ours)
            raise DataError(
                f"{source}: task.columns: {{{taker}: {ours}}} renames column {ours!r}, which the task needs under that name; remove "
                f"that entry, or add which column is {ours!r}: {{{ours}: <name>}}"
            )
    values = [
        # a row without the renamed column lacks it under the new name too, whatever else stood there
        {
            key: _plain(value)
            for key, value in row.items()
            if key not in theirs and columns.get(key, key) in row
        }
        | {ours: _plain(row[name]) for ours, name in columns.items() if name in row}
        for row in rows
    ]
    ids = [row.get("id") for row in values]
    unique = all(map(_names_a_row, ids)) and len({str(i) for i in ids}) == len(ids)
    return [
        Row(str(i) if unique else str(number), row)
        for number, (i, row) in enumerate(zip(ids, values, strict=True))
    ]


def _plain(value: Any) -> Any:
    """Numbers of numpy as Python's, arrays of objects (how pandas reads chats) as lists, what pandas has not as None."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) and value.dtype == object:
        return value.tolist()
    return None if type(value).__name__ in ("NAType", "NaTType") else value


def _kind(given: Any, rows: list[Any]) -> str:
    """What was given in place of rows."""
    name = type(given).__name__
    if not rows:
        return f"{name} without any" if isinstance(given, Iterable) else name
    return f"{name} of {next(type(row).__name__ for row in rows if not isinstance(row, Mapping))}"


def _names(existing: list[str], *, limit: int = 300) -> str:
    text = repr(existing)
    return text if len(text) <= limit else f"{text[:limit]}... ({len(existing)} columns)"


def _names_a_row(value: Any) -> bool:
    # an id names random streams and stands in files, which take no half a character
    if isinstance(value, str):
        return not any("\ud800" <= character <= "\udfff" for character in value)
    return isinstance(value, int) and value.bit_length() <= LONGEST_NUMBER


def hold_out(rows: Sequence[Row], *, holdout: float, key: str, source: str) -> tuple[list[Row], list[Row]]:
    """Split into (train, held out) by a hash of column `key`, so that equal questions stay together.

    About `holdout` of the rows are held out, and at least one distinct question lands on either side.
    """
    hashes = {row.row_id: stream_seed(0, "holdout", _written(row, key)) for row in rows}
    order = sorted(set(hashes.values()))
    if len(order) < 2:
        raise DataError(
            f"{source}: {len(order)} distinct row, at least 2 are needed to hold one out; give more rows or held-out ones (eval_dataset; task.eval_data in a file)"
        )
    threshold = min(max(int(holdout * 2.0**63), order[0] + 1), order[-1])
    train = [row for row in rows if hashes[row.row_id] >= threshold]
    return train, [row for row in rows if hashes[row.row_id] < threshold]


def _written(row: Row, key: str) -> str:
    value = row.values.get(key)
    try:
        return repr(value)
    except (ValueError, RecursionError) as error:
        raise row.error(key, value, "text") from error
