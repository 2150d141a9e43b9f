"""Checkpoints: complete or absent, and nothing that unpickles.

    checkpoints/step-N/
      policy/                        an ordinary Hugging Face folder with the tokenizer
      critic/                        an ordinary folder of the backbone, plus value_head.safetensors
      policy_optimizer.safetensors   AdamW moments by parameter number
      critic_optimizer.safetensors
      denoiser/                      where there is one: model/, an ordinary folder, and state.safetensors
      state.json                     step, policy version, critic state, controllers
      manifest.json                  SHA-256 of every other file; its presence says that the folder is whole
    checkpoints/paused/              the same after N steps and a part of the next, with that step's data

A checkpoint is written under a temporary name, flushed and renamed; every file is checked against the manifest
before it is read. One that is no longer wanted is renamed first, then deleted.
"""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vrpo.algorithms.critic_objective import CriticState
from vrpo.errors import CheckpointError, VrpoError
from vrpo.models.critic import Critic
from vrpo.models.policy import Policy
from vrpo.models.weights import load_critic_weights, load_policy_weights
from vrpo.train.denoising import Denoiser
from vrpo.train.files import flush_file, flush_folder, replace_file, storing
from vrpo.train.optim import load_optimizer_tensors, optimizer_tensors
from vrpo.train.prepared import Prepared, load_prepared

FORMAT = 5
"""Version of the layout above. 1 had no paused steps and no controllers; in 2 a paused batch had no prompt lengths, in 3 no
features and no denoised rewards; in 4 the denoiser's channel was two rates."""

PAUSED, DENOISER = "paused", "denoiser"
SCRATCH = ".scratch-"
"""Start of the names of folders that are being written or deleted."""


@dataclass(slots=True, kw_only=True)
class Learner:
    """Everything that learning changes. `step` and the two models are what a checkpoint is about."""

    policy: Policy
    policy_optimizer: torch.optim.Optimizer
    critic: Critic | None
    critic_optimizer: torch.optim.Optimizer | None
    critic_state: CriticState
    kl_coef: float
    """Weight of the KL to the reference in force; moves under an adaptive controller only."""
    kl_coef_set: float
    """The weight that the configuration sets."""
    denoiser: Denoiser | None = None
    step: int = 0
    """Steps completed."""
    policy_version: int = 0
    """Steps in which the policy's weights moved."""
    skipped_in_a_row: dict[str, int] = field(
        default_factory=lambda: {"critic": 0, "denoiser": 0, "policy": 0}
    )
    """Optimizer steps skipped since the last one made."""


def save(checkpoints: Path, learner: Learner, *, paused: Prepared | None = None) -> Path:
    """Write `step-N`, or `paused` in the middle of a step, and return its path.

    Raises:
        StorageError: it cannot be written; older checkpoints are untouched.
    """
    target = checkpoints / (f"step-{learner.step}" if paused is None else PAUSED)
    temporary = checkpoints / f"{SCRATCH}new-{target.name}"
    clean_up(checkpoints)
    with storing(target):
        try:
            _write(temporary, learner, paused)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        if target.exists():  # a damaged one of an earlier attempt, or an older pause
            _remove(target)
        temporary.rename(target)
        flush_folder(checkpoints)
        if paused is None and (checkpoints / PAUSED).exists():
            _remove(checkpoints / PAUSED)
    return target


def _write(folder: Path, learner: Learner, paused: Prepared | None) -> None:
    """Everything, flushed to the disk, with the manifest last."""
    folder.mkdir(parents=True)
    learner.policy.save_pretrained(folder / "policy")
    save_file(optimizer_tensors(learner.policy_optimizer), folder / "policy_optimizer.safetensors")
    if learner.critic is not None and learner.critic_optimizer is not None:
        learner.critic.save_pretrained(folder / "critic")
        save_file(optimizer_tensors(learner.critic_optimizer), folder / "critic_optimizer.safetensors")
    if learner.denoiser is not None:
        learner.denoiser.save(folder / DENOISER)
    if paused is not None:
        paused.save(folder)
    state = {
        "format": FORMAT,
        "step": learner.step,
        "policy_version": learner.policy_version,
        "kl_coef": learner.kl_coef,
        "kl_coef_set": learner.kl_coef_set,
        "skipped_in_a_row": learner.skipped_in_a_row,
        "critic_state": dataclasses.asdict(learner.critic_state),
    }
    (folder / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    for path in files:
        flush_file(path)
    for path in {p.parent for p in files}:
        flush_folder(path)
    manifest = {str(p.relative_to(folder)): _sha256(p) for p in files}
    replace_file(folder / "manifest.json", json.dumps(manifest, indent=2))


def prune(checkpoints: Path, *, keep: int | None, accuracy: Mapping[int, float]) -> None:
    """Delete all but the newest `keep` (None: delete none) and the best.

    Args:
        checkpoints: the folder.
        keep: how many of the newest stay.
        accuracy: step -> clean accuracy, where it is known.
    """
    if keep is None:
        return
    steps = steps_in(checkpoints)
    best = best_of(steps, accuracy)
    for step in steps[:-keep]:
        if step != best:
            _remove(checkpoints / f"step-{step}")


def best_of(steps: list[int], accuracy: Mapping[int, float]) -> int | None:
    """The step of highest accuracy among those where it is known; of equals, the first."""
    known = [step for step in steps if step in accuracy]
    return max(known, key=lambda step: (accuracy[step], -step), default=None)


def clean_up(checkpoints: Path) -> None:
    """Delete what a killed process left half written or half deleted."""
    for leftover in checkpoints.glob(f"{SCRATCH}*"):
        shutil.rmtree(leftover)


def forget_after(checkpoints: Path, step: int) -> None:
    """Delete checkpoints beyond `step`: a run that goes on from an older one makes its own."""
    for later in steps_in(checkpoints):
        if later > step:
            _remove(checkpoints / f"step-{later}")
    paused = checkpoints / PAUSED
    if paused.exists():
        _remove(paused)


def restore(path: Path, learner: Learner) -> Prepared | None:
    """Put a checkpoint's weights, optimizer moments and counters into `learner`.

    Returns:
        The data of the step that a pause interrupted, if it did.

    Raises:
        CheckpointError: the folder is incomplete, damaged, or of a run with other models.
    """
    verify(path)
    for model, name in ((learner.critic, "critic"), (learner.denoiser, DENOISER)):
        if (model is not None) != (path / name).is_dir():
            has = "a" if (path / name).is_dir() else "no"
            raise CheckpointError(
                f"{path} has {has} {name}, the configuration says otherwise; resume with the run's own config.yaml"
            )
    try:
        state = read_state(path)
        load_policy_weights(learner.policy, path / "policy")
        load_optimizer_tensors(learner.policy_optimizer, load_file(path / "policy_optimizer.safetensors"))
        if learner.critic is not None and learner.critic_optimizer is not None:
            load_critic_weights(learner.critic, path / "critic")
            load_optimizer_tensors(learner.critic_optimizer, load_file(path / "critic_optimizer.safetensors"))
        if learner.denoiser is not None:
            learner.denoiser.load(path / DENOISER)
        learner.step = state["step"]
        learner.policy_version = state["policy_version"]
        if state.get("kl_coef_set", learner.kl_coef_set) == learner.kl_coef_set:  # else it was set anew
            learner.kl_coef = state["kl_coef"]
        learner.skipped_in_a_row = dict(state["skipped_in_a_row"])
        learner.critic_state = CriticState(**state["critic_state"])
        return load_prepared(path, learner.critic_state) if path.name == PAUSED else None
    except (KeyError, TypeError, ValueError, OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, VrpoError):
            raise
        # the manifest agrees and the content is still none of ours: written by other software, or forged
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{path} cannot be read ({type(error).__name__}: {reason}); it is no checkpoint of this run"
        ) from error


def read_state(path: Path) -> dict[str, Any]:
    """state.json of this version's format.

    Raises:
        CheckpointError: another version wrote it.
    """
    state = dict(json.loads((path / "state.json").read_text(encoding="utf-8")))
    if state.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has checkpoint format {state.get('format')}, this version reads {FORMAT}; use the version of vrpo that wrote it"
        )
    return state


def verify(path: Path) -> None:
    """Compare every file with the manifest.

    Raises:
        CheckpointError: names the first file that is missing or changed, and the newest good checkpoint beside it.
    """
    problem = _problem(path)
    if problem is None:
        return
    steps = [s for s in steps_in(path.parent) if path.name != f"step-{s}"]
    good = next((s for s in reversed(steps) if _problem(path.parent / f"step-{s}") is None), None)
    offer = (
        f"--checkpoint {good} is the newest that is good"
        if good is not None
        else "there is no other, start again in another --out"
    )
    raise CheckpointError(f"{problem}, the checkpoint is damaged; {offer}")


def steps_in(checkpoints: Path) -> list[int]:
    """Steps with a complete checkpoint, ascending."""
    whole = [
        p.name.removeprefix("step-") for p in checkpoints.glob("step-*") if (p / "manifest.json").is_file()
    ]
    return sorted(int(step) for step in whole if step.isdigit())


def latest(checkpoints: Path) -> Path | None:
    """Where to go on from: the pause, unless a whole step beyond it exists; else the newest complete checkpoint.

    Raises:
        CheckpointError: the pause is damaged.
    """
    steps = steps_in(checkpoints)
    paused = checkpoints / PAUSED
    if (paused / "manifest.json").is_file():
        verify(paused)
        if not steps or read_state(paused)["step"] >= steps[-1]:
            return paused
    return checkpoints / f"step-{steps[-1]}" if steps else None


def _problem(path: Path) -> str | None:
    """What is wrong with a checkpoint's files; None when nothing is."""
    manifest_path = path / "manifest.json"
    if not manifest_path.is_file():
        return f"{path} has no manifest.json"
    try:
        manifest = {str(name): str(digest) for name, digest in json.loads(manifest_path.read_text()).items()}
    except (ValueError, TypeError, AttributeError):
        return f"{manifest_path} cannot be read"
    for name, digest in manifest.items():
        if not (path / name).is_file():
            return f"{path} lacks {name}"
        if _sha256(path / name) != digest:
            return f"{path / name} differs from its manifest"
    return None


def _remove(path: Path) -> None:
    """Delete a folder so that a kill in between never leaves half of it under its name."""
    aside = path.with_name(f"{SCRATCH}old-{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    shutil.rmtree(aside)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
