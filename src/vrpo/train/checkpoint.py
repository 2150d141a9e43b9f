"""Checkpoints: complete or absent, and nothing that unpickles.

    checkpoints/step-N/
      policy/                        an ordinary Hugging Face folder with the tokenizer
      critic/                        an ordinary folder of the backbone, plus value_head.safetensors
      policy_optimizer.safetensors   AdamW moments by parameter number
      critic_optimizer.safetensors
      state.json                     step, policy version, critic state
      manifest.json                  SHA-256 of every other file; its presence says that the folder is whole

A checkpoint is written under a temporary name and renamed; every file is checked against the manifest
before it is read.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from vrpo.algorithms.critic_objective import CriticState
from vrpo.errors import CheckpointError
from vrpo.models.critic import Critic
from vrpo.models.policy import Policy
from vrpo.models.weights import load_critic_weights, load_policy_weights
from vrpo.train.folder import replace_file

FORMAT = 1
"""Version of the layout above."""


@dataclass(slots=True, kw_only=True)
class Learner:
    """Everything that learning changes. `step` and the two models are what a checkpoint is about."""

    policy: Policy
    policy_optimizer: torch.optim.Optimizer
    critic: Critic | None
    critic_optimizer: torch.optim.Optimizer | None
    critic_state: CriticState
    step: int = 0
    """Steps completed."""
    policy_version: int = 0
    """Steps in which the policy's weights moved."""


def save(checkpoints: Path, learner: Learner, *, keep: int | None) -> Path:
    """Write `step-N` and return its path; then delete all but the newest `keep` (None: delete none)."""
    target = checkpoints / f"step-{learner.step}"
    temporary = checkpoints / f".writing-step-{learner.step}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    learner.policy.save_pretrained(temporary / "policy")
    save_file(_optimizer_tensors(learner.policy_optimizer), temporary / "policy_optimizer.safetensors")
    if learner.critic is not None and learner.critic_optimizer is not None:
        learner.critic.save_pretrained(temporary / "critic")
        save_file(_optimizer_tensors(learner.critic_optimizer), temporary / "critic_optimizer.safetensors")
    state = {
        "format": FORMAT,
        "step": learner.step,
        "policy_version": learner.policy_version,
        "critic_state": dataclasses.asdict(learner.critic_state),
    }
    replace_file(temporary / "state.json", json.dumps(state, indent=2))
    files = sorted(p for p in temporary.rglob("*") if p.is_file())
    for path in files:
        _flush_to_disk(path)
    manifest = {str(p.relative_to(temporary)): _sha256(p) for p in files}
    replace_file(temporary / "manifest.json", json.dumps(manifest, indent=2))
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    for step in [] if keep is None else steps_in(checkpoints)[:-keep]:
        shutil.rmtree(checkpoints / f"step-{step}")
    return target


def restore(path: Path, learner: Learner) -> None:
    """Put a checkpoint's weights, optimizer moments and counters into `learner`.

    Raises:
        CheckpointError: the folder is incomplete, damaged, or of a run with other models.
    """
    verify(path)
    state = json.loads((path / "state.json").read_text())
    if state["format"] != FORMAT:
        raise CheckpointError(
            f"{path} has checkpoint format {state['format']}, this version reads {FORMAT}; use the version of vrpo that wrote it"
        )
    if (learner.critic is not None) != (path / "critic").is_dir():
        has = "a" if (path / "critic").is_dir() else "no"
        raise CheckpointError(
            f"{path} has {has} critic, the configuration says otherwise; resume with the run's own config.yaml"
        )
    load_policy_weights(learner.policy, path / "policy")
    _restore_optimizer(learner.policy_optimizer, path / "policy_optimizer.safetensors")
    if learner.critic is not None and learner.critic_optimizer is not None:
        load_critic_weights(learner.critic, path / "critic")
        _restore_optimizer(learner.critic_optimizer, path / "critic_optimizer.safetensors")
    learner.step = state["step"]
    learner.policy_version = state["policy_version"]
    learner.critic_state = CriticState(**state["critic_state"])


def verify(path: Path) -> None:
    """Compare every file with the manifest.

    Raises:
        CheckpointError: names the first file that is missing or changed.
    """
    manifest_path = path / "manifest.json"
    if not manifest_path.is_file():
        raise CheckpointError(
            f"{path} has no manifest.json, so it is not a complete checkpoint; remove its folder to go on from an older one"
        )
    try:
        manifest = dict(json.loads(manifest_path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"{manifest_path} cannot be read; the checkpoint is damaged, remove its folder to go on from an older one"
        ) from error
    for name, digest in manifest.items():
        if not (path / name).is_file():
            raise CheckpointError(
                f"{path} lacks {name}; the checkpoint is damaged, remove its folder to go on from an older one"
            )
        if _sha256(path / name) != digest:
            raise CheckpointError(
                f"{path / name} differs from its manifest; the checkpoint is damaged, remove its folder to go on from an older one"
            )


def steps_in(checkpoints: Path) -> list[int]:
    """Steps with a complete checkpoint, ascending."""
    whole = [
        p.name.removeprefix("step-") for p in checkpoints.glob("step-*") if (p / "manifest.json").is_file()
    ]
    return sorted(int(step) for step in whole if step.isdigit())


def latest(checkpoints: Path) -> Path | None:
    """The newest complete checkpoint."""
    steps = steps_in(checkpoints)
    return checkpoints / f"step-{steps[-1]}" if steps else None


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    state = optimizer.state_dict()["state"]
    return {
        f"{number}.{name}": torch.as_tensor(value).detach().cpu().contiguous().clone()
        for number, moments in state.items()
        for name, value in moments.items()
    }


def _restore_optimizer(optimizer: torch.optim.Optimizer, path: Path) -> None:
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in load_file(path).items():
        number, name = key.split(".")
        state.setdefault(int(number), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _flush_to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
