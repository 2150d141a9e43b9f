"""Judged completions from files, for `vrpo diagnose`: every bad line is one clear error."""

import json
import math
from pathlib import Path
from typing import Any

from vrpo.errors import DataError
from vrpo.tasks.data import first_line, shown
from vrpo.train.diagnosis import VERDICT, Judged
from vrpo.train.transcript import ERRORS

LARGEST = 3.4e38
"""Rewards beyond fp32 are missing in a run too."""


def read_judged(path: Path) -> list[Judged]:
    """Judged completions from a JSONL file: a run's rollouts.jsonl, or rows of your own.

    A run's lines that are there only because their reward failed are left out: of the others alone is the share that failed known.
    Columns: completion (text) and reward (a number, a list of numbers for repeated scorings, or null); prompt_id or prompt;
    optional gold (0 or 1), clean_reward, tokens, parts.

    Raises:
        DataError: the file cannot be read, or a line is no object of that kind.
    """
    judged = []
    try:
        # by bytes: other characters end a line for str.splitlines than for JSON, and what is no UTF-8 is then on a known line
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    where = f"{path}, line {number}"
                    row = _object(line, where)
                    if row.get("kept_for") != ERRORS:
                        judged.append(_judged(row, where))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({first_line(error)}); give a file that can") from error
    return judged


def _judged(row: dict[str, Any], where: str) -> Judged:
    prompt = row.get("prompt") if row.get("prompt_id") is None else row["prompt_id"]
    if prompt is None:
        raise DataError(
            f"{where}: it names no prompt, and completions are compared by prompt; add prompt_id or prompt"
        )
    rewards = row["reward"] if isinstance(row["reward"], list) else [row["reward"]]
    if not rewards:
        raise DataError(
            f"{where}: reward is [], at least one number or null is needed; write null where there is none"
        )
    gold = _number(row, "gold", where)
    if gold not in (None, 0.0, 1.0):
        raise DataError(f"{where}: gold is {shown(row['gold'])}, {VERDICT}")
    tokens = _number(row, "tokens", where)
    if tokens is not None and (tokens < 0 or not tokens.is_integer()):
        raise DataError(
            f"{where}: tokens is {shown(row['tokens'])}, a count is needed; correct it or leave it out"
        )
    parts = row.get("parts")
    if parts is not None and not isinstance(parts, dict):
        raise DataError(
            f"{where}: parts is {shown(parts)}, an object of numbers is needed; correct it or leave it out"
        )
    return Judged(
        prompt_id=prompt if isinstance(prompt, str) else json.dumps(prompt),
        completion=row["completion"],
        length=int(tokens or len(row["completion"])),
        rewards=tuple(_number({"reward": x}, "reward", where) for x in rewards),
        gold=gold,
        clean_reward=_number(row, "clean_reward", where),
        parts=None if parts is None else {name: _number(parts, name, where) for name in parts},
    )


def _object(line: bytes, where: str) -> dict[str, Any]:
    """The line as an object with a completion and a reward."""
    rule = "each line is an object with completion, reward and prompt_id or prompt"
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: byte 0x{error.object[error.start]:02x} is no UTF-8, as the file must be; write it again as UTF-8"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: it is no JSON ({first_line(error)}); {rule}") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: {shown(row)} is no object; {rule}")
    if not isinstance(row.get("completion"), str):
        raise DataError(f"{where}: completion is {shown(row.get('completion'))}, text is needed; {rule}")
    if "reward" not in row:
        raise DataError(f"{where}: it has no reward; {rule}, null where a reward is missing")
    return row


def _number(row: dict[str, Any], name: str, where: str) -> float | None:
    value = row.get(name)
    try:
        number = float(value) if isinstance(value, int | float) else None
    except OverflowError:  # an integer beyond the largest float
        number = math.inf
    if value is not None and (number is None or not abs(number) <= LARGEST):
        raise DataError(
            f"{where}: {name} is {shown(value)}, a number within fp32 or null is needed; correct the line"
        )
    return number
