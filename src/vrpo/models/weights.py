"""Saved weights back into live models: what resuming a run needs. Bit for bit, and nothing that unpickles."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vrpo.errors import ModelError
from vrpo.models.critic import Critic
from vrpo.models.head_files import load_head
from vrpo.models.loading import load_pretrained
from vrpo.models.policy import Policy

WHOLE, INDEX, ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"


def load_policy_weights(policy: Policy, folder: Path) -> None:
    """Put the weights that `policy.save_pretrained(folder)` wrote back into `policy`.

    Raises:
        ModelError: the folder lacks weights the policy has.
    """
    if policy.adapter:
        _load_adapter(policy.model, folder)
    else:
        _load_whole(policy.model, folder)


def load_critic_weights(critic: Critic, folder: Path) -> None:
    """Put the weights that `critic.save_pretrained(folder)` wrote back into `critic`.

    Raises:
        ModelError: the folder lacks weights the critic has.
    """
    if critic.backbone is None:
        pass  # the policy's
    elif critic.adapter:
        _load_adapter(critic.backbone, folder)
    else:
        _load_whole(critic.backbone, folder)
    critic.units = load_head(critic.head, folder)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder's safetensors files, sharded or not."""
    if (folder / WHOLE).is_file():
        return load_file(folder / WHOLE)
    if not (folder / INDEX).is_file():
        raise ModelError(
            f"{folder} holds neither {WHOLE} nor {INDEX}; give a folder written by save_pretrained"
        )
    shards = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    return {name: tensor for shard in sorted(shards) for name, tensor in load_file(folder / shard).items()}


@torch.no_grad()
def _load_whole(model: nn.Module, folder: Path) -> None:
    saved = read_tensors(folder)
    # with duplicates: of tied weights only one name is saved, and which one is the model's business
    live = dict(model.named_parameters(remove_duplicate=False))
    if _lost(live, saved):
        saved = _converted(model, folder) or saved
    for name in sorted(live.keys() & saved.keys()):
        if live[name].shape != saved[name].shape:  # copy_ would broadcast, or raise
            raise ModelError(
                f"{folder} holds {name} as {list(saved[name].shape)}, the model has {list(live[name].shape)}; it is a "
                "checkpoint of another model"
            )
        live[name].copy_(saved[name])
    if lost := _lost(live, saved):
        raise ModelError(
            f"{folder} lacks {len(lost)} weights such as {lost[0]}; it is a checkpoint of another model"
        )


def _lost(live: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> list[str]:
    """Names of live weights of which the folder has none of the names."""
    restored = {live[name].data_ptr() for name in live.keys() & saved.keys()}
    return sorted(name for name, weight in live.items() if weight.data_ptr() not in restored)


def _converted(model: Any, folder: Path) -> dict[str, Tensor] | None:
    """The folder read by `transformers`, which knows where a model's weights are stored in another layout than they are used
    in (a mixture's experts: one matrix each in the folder, one tensor of all in the model); None if it lacks weights then too."""
    try:
        # with the live model's configuration: a folder of another model may ask for one of any size
        read = load_pretrained(
            type(model), str(folder), name=str(folder), trust_remote_code=False, config=model.config
        )
    except ModelError:
        return None
    return dict(read.named_parameters(remove_duplicate=False))


def _load_adapter(model: nn.Module, folder: Path) -> None:
    from peft import set_peft_model_state_dict

    if not (folder / ADAPTER).is_file():
        raise ModelError(
            f"{folder} holds no {ADAPTER}; resume with the model.lora settings the run was started with"
        )
    try:
        result = set_peft_model_state_dict(model, load_file(folder / ADAPTER))
    except RuntimeError as error:  # how load_state_dict says that shapes differ
        raise ModelError(
            f"{folder} holds an adapter of another shape; resume with the model.lora settings the run was started with"
        ) from error
    if result.unexpected_keys:
        raise ModelError(
            f"{folder} has an adapter for {result.unexpected_keys[0]}, which the model lacks; use the run's own settings"
        )
