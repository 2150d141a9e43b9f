"""The supervised warm start: imitate a column of the task until accuracy leaves room for RL."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from vrpo.config import SftConfig
from vrpo.errors import CheckpointError, DataError, NumericsError
from vrpo.models import Policy, load_policy
from vrpo.rewards import build_rewards
from vrpo.rollout import TorchEngine
from vrpo.tasks import build_task
from vrpo.train.evaluate import evaluate
from vrpo.train.files import replace_file, storing
from vrpo.train.fit import check_fit
from vrpo.train.optim import adamw, set_learning_rate
from vrpo.types import Prompt


def sft(config: SftConfig, *, out: str | Path, console: Console | None = None) -> dict[str, Any]:
    """Minimise the mean negative log-likelihood of target + EOS given the prompt; save the model to `out`.

    The learning rate decays linearly to a tenth over `sft.steps`; training stops early once the held-out
    greedy accuracy reaches `sft.stop_accuracy`. The model is saved at every evaluation, and sft.json says of which step it is.

    Returns:
        steps made, last loss (nats a token), and the held-out accuracy.

    Raises:
        CheckpointError: `out` already holds a model.
        DataError: a row has no target text.
        NumericsError: the loss is not finite.
        StorageError: `out` cannot be written.
    """
    out, console, settings = Path(out), console or Console(), config.sft
    if any((out / name).exists() for name in ("config.json", "adapter_config.json")):
        raise CheckpointError(f"{out} already holds a model; choose another --out")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    policy = load_policy(config.model, seed=config.seed)
    tokenizer = policy.tokenizer
    task = build_task(config.task, tokenizer)
    rewards = build_rewards(config.rewards.model_copy(update={"noise": ()}), seed=config.seed)
    check_fit(task, policy, rewards, max_completion_length=config.rollout.max_completion_length)
    engine = TorchEngine(policy, tokenizer, config.rollout, seed=config.seed)
    held_out = task.eval_prompts(settings.eval_prompts)
    limit = config.rollout.max_completion_length
    lengths = [
        int(encode_examples([prompt], policy, settings.target_column)[2].sum())
        for prompt in task.checked_train_prompts()
    ]
    if (cut := sum(length > limit for length in lengths)) > 0:
        console.print(
            f"{cut} of {len(lengths)} targets have more than rollout.max_completion_length={limit} tokens (the longest {max(lengths)}): "
            "what is learned of them is cut in evaluations; raise it"
        )
    with storing(out):  # before anything is trained that could not be kept
        out.mkdir(parents=True, exist_ok=True)
        replace_file(out / "sft.json", json.dumps({"steps": 0}) + "\n")
    optimizer = adamw(policy, learning_rate=settings.learning_rate, weight_decay=settings.weight_decay)
    result: dict[str, Any] = {}
    before = evaluate(engine, rewards, held_out, samples=1, step=0, policy_version=0)
    console.print(
        f"sft step 0/{settings.steps}  held-out accuracy: greedy {before.greedy:.3f}, sampled {before.sampled:.3f}"
    )
    for step in range(1, settings.steps + 1):
        prompts = task.draw(seed=config.seed, step=step - 1, count=settings.batch)
        set_learning_rate(optimizer, settings.learning_rate * (1.0 - 0.9 * (step - 1) / settings.steps))
        loss = _sft_step(policy, optimizer, prompts, tokenizer, settings.target_column)
        if step % settings.eval_every == 0 or step == settings.steps:
            try:
                accuracy = evaluate(engine, rewards, held_out, samples=1, step=step, policy_version=step)
            except NumericsError as error:
                raise NumericsError(
                    f"the weights have diverged by step {step} (loss {loss:.3g}); lower sft.learning_rate"
                ) from error
            console.print(
                f"sft step {step}/{settings.steps}  loss {loss:.3f}  held-out accuracy: greedy {accuracy.greedy:.3f}, sampled {accuracy.sampled:.3f}"
            )
            result = {
                "steps": step,
                "loss": loss,
                "greedy": accuracy.greedy,
                "sampled": accuracy.sampled,
                "greedy_before": before.greedy,
            }
            with storing(out):
                policy.save_pretrained(out)
            replace_file(out / "sft.json", json.dumps(result, indent=2) + "\n")
            if settings.stop_accuracy is not None and accuracy.greedy >= settings.stop_accuracy:
                break
    return result


def _sft_step(
    policy: Policy, optimizer: torch.optim.Optimizer, prompts: list[Prompt], tokenizer: Any, column: str
) -> float:
    """One optimizer step on the targets of `prompts`; the mean loss in nats a token."""
    ids, attention, mask = (x.to(policy.device) for x in encode_examples(prompts, policy, column))
    optimizer.zero_grad(set_to_none=True)
    logp, _ = policy.logprobs_and_entropy(ids, attention, mask, temperature=1.0)
    loss = -logp.sum() / mask.sum()
    if not torch.isfinite(loss):
        raise NumericsError(f"the warm start's loss is {loss.item()}; lower sft.learning_rate")
    loss.backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    return float(loss.detach())


def target_of(prompt: Prompt, column: str, *, setting: str = "sft.target_column") -> str:
    """The right response to a prompt.

    Raises:
        DataError: the row has no text in `column`, which `setting` names.
    """
    if column not in prompt.columns:
        there = ", ".join(map(repr, prompt.columns)) or "none"
        raise DataError(
            f"row {prompt.prompt_id} has no column {column!r}, there is {there}; set {setting} to the one with the right response"
        )
    target = prompt.columns[column]
    target = str(target) if type(target) is int else target
    if not isinstance(target, str) or not target:
        raise DataError(
            f"row {prompt.prompt_id} has no text in column {column!r}, but {target!r:.60}; write it out, or set {setting} to the column "
            "with the right response"
        )
    return target


def encode_examples(
    prompts: list[Prompt], policy: Policy, column: str, *, setting: str = "sft.target_column"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Input ids [B, L], attention mask [B, L] and loss mask [B, L - 1], True on target and EOS.

    Raises:
        DataError: a row has no text in `column`, which `setting` names, or one that is too long for the model.
    """
    tokenizer, limit = policy.tokenizer, policy.context_length
    rows, starts = [], []
    for prompt in prompts:
        target = target_of(prompt, column, setting=setting)
        target_ids = tokenizer(target, add_special_tokens=False)["input_ids"]
        rows.append(np.concatenate([prompt.token_ids, target_ids, [tokenizer.eos_token_id]]).astype(np.int64))
        starts.append(len(prompt.token_ids))
        if limit is not None and len(rows[-1]) > limit:
            raise DataError(
                f"row {prompt.prompt_id} has {len(rows[-1])} tokens with its text in column {column!r}, which {setting} names, and that is "
                f"more than the model's context of {limit}; shorten or remove it"
            )
    length = max(map(len, rows))
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    attention = torch.zeros(len(rows), length, dtype=torch.bool)
    mask = torch.zeros(len(rows), length - 1, dtype=torch.bool)
    for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
        ids[i, : len(row)] = torch.from_numpy(row)
        attention[i, : len(row)] = True
        mask[i, start - 1 : len(row) - 1] = True
    return ids, attention, mask
