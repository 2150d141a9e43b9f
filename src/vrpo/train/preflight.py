"""What can be checked about a configuration's files without loading a model. Imports no torch."""

from importlib.resources import files
from pathlib import Path

from vrpo.config import Config
from vrpo.config.rewards import FunctionReward
from vrpo.config.tasks import FILE_SUFFIXES, DataTask
from vrpo.errors import ConfigError, DataError, ModelError


def check_files(config: Config) -> None:
    """Every local file a configuration names exists; hub names are taken on trust.

    Raises:
        ConfigError, DataError, ModelError: the first thing that is missing.
    """
    if config.model is None or config.task is None or not config.rewards.functions:
        lacking = "model" if config.model is None else "task" if config.task is None else "rewards.functions"
        raise ConfigError(
            f"{lacking} is required; add it to the configuration (a run started from Python goes on with its Trainer)"
        )
    critic_path = config.critic.path if config.critic is not None else None
    for key, path in (("model.path", config.model.path), ("critic.path", critic_path)):
        if path is not None and path.startswith("vrpo:") and path not in _packaged():
            raise ModelError(
                f"{key}={path!r} is not in the package; packaged models are {', '.join(_packaged())}"
            )
        if path is not None and looks_local(path) and not _is_dir(path):
            raise ModelError(f"{key}={path!r}: there is no such folder; give a model folder or a hub name")
    if not config.model.path:
        raise ModelError("model.path is empty; give a model folder or a hub name")
    for function in (*config.rewards.functions, *config.rewards.gold):
        if isinstance(function, FunctionReward) and not _is_file(function.file):
            raise ConfigError(
                f"reward file {function.file!r} does not exist; the path is relative to the working directory"
            )
    if isinstance(config.task, DataTask):
        for key, name in (("task.data", config.task.data), ("task.eval_data", config.task.eval_data)):
            if name is not None and name.lower().endswith(FILE_SUFFIXES) and not _is_file(name, home=True):
                raise DataError(
                    f"{key}={name!r}: there is no such file; the path is relative to the working directory"
                )


def _packaged() -> list[str]:
    return sorted(f"vrpo:{entry.name}" for entry in (files("vrpo") / "assets").iterdir())


def looks_local(path: str) -> bool:
    """Whether a model path means a folder rather than a hub name: hub names are `name` or `owner/name`."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or _is_dir(path)


def _is_dir(path: str) -> bool:
    try:
        return Path(path).expanduser().is_dir()
    except _NO_NAME:
        return False


def _is_file(path: str, *, home: bool = False) -> bool:
    try:
        return (Path(path).expanduser() if home else Path(path)).is_file()
    except _NO_NAME:
        return False


_NO_NAME = (OSError, ValueError, RuntimeError)
"""What Python raises for a name that no file can have: too long, with a NUL in it, in the home of nobody."""
