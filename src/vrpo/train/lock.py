"""One process a run folder: two that append to the same files would ruin both.

The operating system holds the lock (`filelock`, flock) and lets go of it when its owner dies, however it dies: a
lock cannot be stale. The file beside it only says who the owner is. A network file system must pass flock between
machines (NFS 4, Lustre with `flock`); otherwise two machines cannot see each other.
"""

import json
import os
import socket
import time
from pathlib import Path
from typing import final

from filelock import FileLock, Timeout

from vrpo.errors import CheckpointError
from vrpo.train.files import replace_file, storing

LOCK_FILE, OWNER_FILE = ".lock", "owner.json"


@final
class RunLock:
    """Holds a run folder until `release`."""

    def __init__(self, folder: Path) -> None:
        """Take the folder.

        Args:
            folder: an existing run folder.

        Raises:
            CheckpointError: another process works in it; says which.
            StorageError: the folder cannot be written.
        """
        self._owner = folder / OWNER_FILE
        self._lock = FileLock(folder / LOCK_FILE)
        with storing(folder / LOCK_FILE):
            try:
                self._lock.acquire(timeout=0)
            except Timeout as error:
                raise CheckpointError(
                    f"{folder} is in use by {_describe(_read(self._owner))}; wait until it ends, or choose another --out"
                ) from error
        owner = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        replace_file(self._owner, json.dumps(owner) + "\n")

    def release(self) -> None:
        """Give the folder back; again is no error."""
        if self._lock.is_locked:
            self._owner.unlink(missing_ok=True)
            self._lock.release()


def _read(path: Path) -> dict[str, object]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # absent, or its owner died while writing it
        return {}


def _describe(owner: dict[str, object]) -> str:
    if not owner:
        return "another process"
    return f"process {owner.get('pid')} on {owner.get('host')} since {owner.get('since')}"
