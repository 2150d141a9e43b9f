"""What can go wrong, as types.

    VrpoError
    ├── ConfigError     the configuration is wrong: unknown key, bad value, impossible combination
    ├── DataError       the data set is wrong: missing file, missing column, no rows, prompt too long
    ├── ModelError      the model or tokenizer cannot be used: missing folder, no EOS token
    ├── RewardError     a reward function broke its contract for the whole step
    ├── CheckpointError a run folder or checkpoint is incomplete, damaged or of another run
    ├── NumericsError   loss, gradient or value is not finite
    └── StorageError    the disk is full, or cannot be written

The first five are the user's input: the command line prints the message alone and exits with status 2.
The last two are a failed run: exit status 1. Every message is one line and states the value, the rule
and the fix. To add an error, subclass the nearest one here; callers catch the base classes.
"""

from typing import Any


class VrpoError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(VrpoError, ValueError):
    """The configuration is wrong."""


class DataError(VrpoError, ValueError):
    """The data set is wrong."""


class ModelError(VrpoError, ValueError):
    """The model or its tokenizer cannot be used."""


class RewardError(VrpoError, ValueError):
    """A reward function broke its contract for the whole step."""


class CheckpointError(VrpoError, ValueError):
    """A run folder or checkpoint cannot be used."""


class NumericsError(VrpoError, ArithmeticError):
    """A loss, gradient or value is not finite."""

    def __init__(self, message: str, *, batch: Any = None) -> None:
        """Say what is not finite.

        Args:
            message: one line.
            batch: the `vrpo.types.Batch` it was found in, whose worst tokens are worth writing down; None: unknown.
        """
        super().__init__(message)
        self.batch = batch


class StorageError(VrpoError, OSError):
    """A file of the run folder could not be written; what was there before is whole."""


INPUT_ERRORS = (ConfigError, DataError, ModelError, RewardError, CheckpointError)
"""Errors the user can fix: exit status 2, one line, no traceback."""
