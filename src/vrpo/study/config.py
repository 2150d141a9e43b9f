"""`STUDY.yaml`: which cells a study has."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from vrpo.config import Config, apply_overrides, build, read_yaml
from vrpo.config.base import Strict
from vrpo.config.presets import merge
from vrpo.errors import ConfigError


class StudyConfig(Strict):
    """A grid of runs over one base configuration."""

    base: str
    """Training configuration all cells start from; relative to the study's file."""
    methods: dict[str, dict[str, Any]] = Field(min_length=1)
    """Method name -> settings on top of the base."""
    noise: dict[str, dict[str, Any]] = Field(min_length=1)
    """Noise name -> settings on top of that."""
    seeds: tuple[int, ...] = Field(min_length=1, strict=False)
    """One run per seed."""
    jobs: int = Field(1, ge=1)
    """Runs at a time, each its own process."""
    temperatures: tuple[Annotated[float, Field(gt=0.0)], ...] = Field((), strict=False)
    """Final policies are sampled at these too, to tell what a policy knows from how sharp it is; none: they are not."""
    keep_checkpoints: bool = True
    """false: a finished cell's checkpoints, gigabytes for a large model, are removed once its final policy has been sampled at
    `temperatures`. Its numbers and records stay; `vrpo eval` has nothing to load then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One run of a study.

    Example: Cell(method="VRPO", noise="flip 30 %", seed=0, folder="vrpo_flip-30_s0", config=...)
    """

    method: str
    noise: str
    seed: int
    folder: str
    config: Config


def read_study(path: Path, overrides: list[str]) -> tuple[StudyConfig, list[Cell]]:
    """The study and its cells; every cell's configuration is validated before the first one runs.

    Args:
        path: STUDY.yaml, or a folder with a study.yaml.
        overrides: `"a.b=value"` settings on top of every cell.

    Raises:
        ConfigError: the study or one of its cells is wrong.
    """
    path = path / "study.yaml" if path.is_dir() else path
    study = build(StudyConfig, read_yaml(path))
    base = read_yaml(path.parent / study.base)
    cells = list(_cells(study, base, overrides))
    folders = [cell.folder for cell in cells]
    twice = {name for name in folders if folders.count(name) > 1}
    if twice:
        raise ConfigError(
            f"two cells of the study share the folder name {min(twice)!r}; rename a method or noise, or drop a repeated seed"
        )
    return study, cells


def _cells(study: StudyConfig, base: dict[str, Any], overrides: list[str]) -> Iterator[Cell]:
    for noise, noise_settings in study.noise.items():
        # seeds before methods: a study that is stopped has whole seeds, which is what methods are compared on
        for seed in study.seeds:
            for method, method_settings in study.methods.items():
                data = merge(merge(base, method_settings), noise_settings)
                data = apply_overrides(merge(data, {"train": {"seed": seed}}), overrides)
                config = build(Config, data)
                if config.train.seed != seed and len(study.seeds) > 1:
                    raise ConfigError(
                        f"train.seed={config.train.seed} would give all {len(study.seeds)} seeds of the study the same runs; "
                        "set the study's `seeds` instead"
                    )
                yield Cell(
                    method=method,
                    noise=noise,
                    seed=config.train.seed,
                    folder=f"{slug(method)}_{slug(noise)}_s{config.train.seed}",
                    config=config,
                )


def slug(name: str) -> str:
    """A name that is safe in a path: lower case letters, digits and hyphens."""
    words = "".join(c if c.isalnum() else " " for c in name.lower()).split()
    return "-".join(words) or "none"
