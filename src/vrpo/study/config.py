"""`STUDY.yaml`: which cells a study has."""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from vrpo.config import Config, apply_overrides, build, read_yaml
from vrpo.config.base import Strict
from vrpo.config.presets import merge, spelled_out
from vrpo.errors import ConfigError

ENTRIES = {
    "methods": "{algorithm: ppo, train: {learning_rate: 1.0e-5}}",
    "noise": "{rewards: {noise: {type: flip, false_negative: 0.3}}}",
}
"""Sections of a study with one entry a name -> what such an entry may look like."""

MAX_FOLDER_NAME = 200
"""Bytes of a cell's folder name; file systems take 255, temporary names included."""


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

    @property
    def name(self) -> str:
        """What a person calls this run."""
        return f"{self.method} · {self.noise} · seed {self.seed}"


def read_study(path: Path, overrides: list[str]) -> tuple[StudyConfig, list[Cell]]:
    """The study and its cells; every cell's configuration is validated before the first one runs.

    Args:
        path: STUDY.yaml, or a folder with a study.yaml.
        overrides: `"a.b=value"` settings on top of every cell.

    Raises:
        ConfigError: the study or one of its cells is wrong.
    """
    path = path / "study.yaml" if path.is_dir() else path
    data = read_yaml(path)
    _check_is_study(path, data)
    study = build(StudyConfig, data)
    base = read_yaml(path.parent / study.base)
    given = apply_overrides({}, overrides)  # what is no KEY=VALUE is no method's mistake
    if of_study := sorted(given.keys() & StudyConfig.model_fields.keys()):
        raise ConfigError(
            f"--set {of_study[0]}: --set changes what every run has; {of_study[0]!r} belongs in the study's file, {path}"
        )
    cells = list(_cells(study, base, overrides))
    folders = [cell.folder for cell in cells]
    longest = max(cells, key=lambda cell: len(os.fsencode(cell.folder)))
    if len(os.fsencode(longest.folder)) > MAX_FOLDER_NAME:
        raise ConfigError(
            f"method {longest.method!r:.40} and noise {longest.noise!r:.40} make a folder name of {len(os.fsencode(longest.folder))} "
            f"bytes; use names that make at most {MAX_FOLDER_NAME}"
        )
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
            make = partial(_config, base, seed, overrides)
            for method, method_settings in study.methods.items():
                try:
                    config = make(method_settings, noise_settings)
                except ConfigError as error:
                    raise ConfigError(f"{_whose(str(error), study, method, noise, make)}: {error}") from error
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


def _config(
    base: dict[str, Any], seed: int, overrides: list[str], method: dict[str, Any], noise: dict[str, Any]
) -> Config:
    for settings in (base, method, noise):
        # the seed would make a section of it, and defaults of what the base has set
        if not isinstance(train := settings.get("train", {}), dict):
            raise ConfigError(f"train={_short(train)} holds no settings; write some, or leave `train` out")
    for settings in (method, noise):
        if "seed" in settings.get("train", {}):
            raise ConfigError(
                f"train.seed={_short(settings['train']['seed'])} is the study's to set, one for each of its `seeds`; write it there"
            )
    data: dict[str, Any] = {}
    for settings in (base, method, noise, {"train": {"seed": seed}}):
        data = merge(data, spelled_out(settings))
    return build(Config, apply_overrides(data, overrides))


def _whose(
    mistake: str,
    study: StudyConfig,
    method: str,
    noise: str,
    make: Callable[[dict[str, Any], dict[str, Any]], Config],
) -> str:
    """The methods that make a cell's mistake, and its noise unless the mistake is there without it.

    Args:
        mistake: what is wrong.
        study: the study.
        method: the cell's.
        noise: the cell's.
        make: builds a cell's configuration from settings of a method and of a noise.
    """

    def has_it(method: str, noise_settings: dict[str, Any]) -> bool:
        try:
            make(study.methods[method], noise_settings)
        except ConfigError as error:
            return str(error) == mistake
        return False

    by_noise = not has_it(method, {})
    guilty = [name for name in study.methods if has_it(name, study.noise[noise] if by_noise else {})]
    named = f"method{'s' * (len(guilty) > 1)} {', '.join(guilty)}"
    if len(guilty) == len(study.methods) > 1:
        return f"noise {noise}" if by_noise else "every method"
    return f"{named}, noise {noise}" if by_noise else named


def _check_is_study(path: Path, data: Mapping[Any, Any]) -> None:
    """ConfigError for what people write in place of a study; what is wrong inside one, `build` says."""
    required = [name for name, field in StudyConfig.model_fields.items() if field.is_required()]
    missing = [name for name in required if name not in data]
    of_a_run = [name for name in (*Config.model_fields, "sft") if name in data]
    if missing == required and of_a_run:
        command = "vrpo sft" if "sft" in data else "vrpo train"
        raise ConfigError(
            f"{path} has {', '.join(of_a_run)}: this looks like the configuration of one run, for `{command}`; a study has "
            f"{', '.join(required)}, and takes such a file as its base"
        )
    if not data.get("noise"):
        missing = [name for name in required if name in missing or name == "noise"]
        raise ConfigError(
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} required; add {'it' if len(missing) == 1 else 'them'}: "
            "`noise: {as it is: {}}` takes the rewards as the base has them, a noisy one of your own too"
        )
    for section, example in ENTRIES.items():
        entries = data.get(section)
        for name, entry in entries.items() if isinstance(entries, dict) else ():
            if str(name).startswith("_"):
                raise ConfigError(
                    f"{section}.{name}: figures leave names out that begin with an underscore; rename it"
                )
            if not isinstance(entry, dict) or "type" in entry:
                label = name if isinstance(entry, dict) or entry is None else "a name"
                raise ConfigError(
                    f"{section}.{name}={_short(entry)}: an entry holds settings of a run; write it such as "
                    f"`{label}: {example}`, or `{label}: {{}}` for those of the base"
                )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def slug(name: str) -> str:
    """A name that is safe in a path: lower case letters, digits and hyphens."""
    words = "".join(c if c.isalnum() else " " for c in name.lower()).split()
    return "-".join(words) or "none"
