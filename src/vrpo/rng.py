"""Named random streams: every random draw in the package starts from `stream_seed(root, *labels)`.

A draw is named by what it is for ("sample", "s12/p7/k3"), not by when it happens, so it does not
depend on batch splits, worker counts or the step a run was resumed at, and the global random state
of the user's process is never touched.
"""

import hashlib

import numpy as np


def stream_seed(root: int, *labels: str | int) -> int:
    """Seed of the stream named by `labels` under the run's `root` seed: 63 bits, stable across machines."""
    text = "\x1f".join([str(root), *map(str, labels)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def stream(root: int, *labels: str | int) -> np.random.Generator:
    """A fresh generator for the stream named by `labels`."""
    return np.random.Generator(np.random.Philox(key=stream_seed(root, *labels)))


def stream_uniform(root: int, *labels: str | int) -> float:
    """One draw from U[0, 1) of the stream named by `labels`."""
    return float(stream(root, *labels).random())
