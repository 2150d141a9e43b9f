"""Files that are whole or absent, also when the process is killed, the power fails or the disk is full."""

import errno
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from vrpo.errors import CheckpointError, ConfigError, StorageError

WRONG_PLACE = frozenset(
    {errno.EACCES, errno.EEXIST, errno.EISDIR, errno.ENOENT, errno.ENOTDIR, errno.EPERM, errno.EROFS}
)
"""Errors of a path, not of a disk."""


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """Turn what writing `path` raises into one line.

    Raises:
        StorageError: the disk is full, read-only or broken.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        if getattr(error, "errno", None) in WRONG_PLACE:
            mend = "choose a place that can be written"
        else:
            mend = "what was there before is whole: make room, then go on with --resume"
        raise StorageError(f"cannot write {path}: {reason}; {mend}") from error


def replace_file(path: Path, text: str) -> None:
    """Write `text` to `path` through a temporary file beside it and a rename: a reader sees old or new, never half.

    Raises:
        StorageError: it cannot be written; the old file is untouched.
    """
    temporary = path.with_name(path.name + ".tmp")
    with storing(path):
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
    flush_folder(path.parent)


def check_output_file(option: str, path: Path) -> None:
    """What can be said before the work that a file is for.

    Raises:
        ConfigError: `path` can be no file, or its folder does not exist.
    """
    if path.is_dir():  # also of "", such as of a variable that is not set
        raise ConfigError(f"{option}: {str(path)!r} is a folder; give a file in it")
    if not path.parent.is_dir():
        raise ConfigError(f"{option}: there is no folder {str(path.parent)!r}; make it first")


def read_json(path: Path) -> Any:
    """What a JSON file of a run folder holds.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is missing or damaged ({error}); remove its folder and run it anew"
        ) from error


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Add one JSON line in one write; NaN becomes null. A line that does not fit on the disk is taken back.

    Raises:
        StorageError: it cannot be written; the lines before are whole.
    """
    line = (json.dumps(finite(record), ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
    with storing(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            before = os.fstat(descriptor).st_size
            try:
                written = os.write(descriptor, line)
                while written < len(line):
                    written += os.write(descriptor, line[written:])
            except OSError:
                if os.path.isfile(path):
                    os.ftruncate(descriptor, before)
                raise
        finally:
            os.close(descriptor)


def read_lines(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Complete lines of a JSONL file, parsed and raw; a last line without its newline was torn off and is skipped.

    Raises:
        CheckpointError: a line in the middle is no JSON object with a `step`.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.endswith(b"\n"):
                return
            try:
                line = raw.decode("utf-8")
                record = json.loads(line)
                record["step"]
            except (ValueError, TypeError, KeyError) as error:
                raise CheckpointError(
                    f"line {number} of {path} is damaged; remove that line, or start the run again in another --out"
                ) from error
            yield record, line


def flush_file(path: Path) -> None:
    """Wait until the disk has a file's content."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def flush_folder(path: Path) -> None:
    """Wait until the disk has a folder's list of names: a rename is only then safe from a power cut."""
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def finite(value: Any) -> Any:
    """JSON has no NaN: null instead."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return value
