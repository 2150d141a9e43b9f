"""AdamW and learning-rate schedules."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from vrpo.config.run import TrainConfig
from vrpo.errors import CheckpointError


def adamw(module: nn.Module, *, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW (betas 0.9, 0.999; fused) over the trainable parameters; decay on matrices only.

    Norms, biases and other vectors are not decayed: pulling a gain towards 0 is no regulariser.
    """
    trainable = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.999), eps=1e-8, fused=True)


def schedule(config: TrainConfig, *, step: int, start: int = 0) -> float:
    """Factor on the peak learning rate at `step`, for a model that learns from step `start` on.

    warm-up: (s + 1) / warmup        for s = step - start < lr_warmup_steps
    then     constant 1 | linear 1 - x | cosine (1 + cos(pi x)) / 2,   x = share of the rest already made
    """
    since = step - start
    if since < config.lr_warmup_steps:
        return (since + 1) / config.lr_warmup_steps
    rest = config.steps - start - config.lr_warmup_steps
    x = (since - config.lr_warmup_steps) / max(rest, 1)
    match config.lr_schedule:
        case "constant":
            return 1.0
        case "linear":
            return 1.0 - x
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * x))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def parameters_of(optimizer: torch.optim.Optimizer) -> Iterable[nn.Parameter]:
    """The parameters an optimizer moves, in its order."""
    for group in optimizer.param_groups:
        yield from group["params"]


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The moments as "<parameter number>.<name>" -> copy on the CPU: what a safetensors file takes."""
    state = optimizer.state_dict()["state"]
    return {
        f"{number}.{name}": torch.as_tensor(value).detach().cpu().contiguous().clone()
        for number, moments in state.items()
        for name, value in moments.items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """What `optimizer_tensors` gave, back into the optimizer.

    Raises:
        CheckpointError: they are moments of other parameters: torch would take them and read past the end of some.
    """
    parameters = list(parameters_of(optimizer))
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, name = key.split(".")
        trained = list(parameters[int(number)].shape) if int(number) < len(parameters) else None
        if value.dim() and list(value.shape) != trained:
            raise CheckpointError(
                f"the optimizer's state is of other weights than those trained now (number {number} has shape {list(value.shape)}, not "
                f"{trained}); train the same ones, or start a new run from the model in the checkpoint"
            )
        state.setdefault(int(number), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
