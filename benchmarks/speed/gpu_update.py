"""An optimizer step of the policy on a GPU: log-probabilities, their gradient, AdamW; and its share of the peak.

    flops = 6 B R + 6 V d C + 12 h d_h layers A
    MFU   = flops / seconds / measured peak of a bf16 matrix product

B: parameters without the embedding; R: tokens read, a shared prompt once; V d: the head, tied to the embedding;
C: completion tokens, the only ones that meet it; A: pairs of a token and one it attends to, itself included; h d_h: width of
the queries. A product costs 2 flops a weight forward and 4 backward; attention two products. What is computed twice counts once.
Tokens a second count every token of every sequence, read or shared.
"""

import statistics
import time
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from benchmarks.speed import gpu_models
from benchmarks.speed.gpu_peaks import Peaks, seconds, wait
from vrpo.models.backbone import compile_blocks
from vrpo.train.optim import adamw
from vrpo.types import SharedPrompts

GROUP = 8
REPEATS, LIMIT = 3, 8.0
"""Timed steps of one case after the first, and seconds after which there is no further one."""


def shape(*, quick: bool) -> tuple[int, int, int, list[int]]:
    """Sequences, their tokens, of these in the prompt; micro-batches, in tokens."""
    return (16, 64, 16, [512, 1024]) if quick else (128, 512, 128, [8192, 16384])


def measure(device: torch.device, peaks: Peaks, *, quick: bool, compiled: bool) -> list[dict[str, Any]]:
    """Every case; with `compiled` all of them again as `train.compile` has it."""
    model = gpu_models.random_model(gpu_models.trained(quick=quick), device)
    policy = gpu_models.policy_of(model)
    optimizer = adamw(policy, learning_rate=1e-6, weight_decay=0.0)
    found: list[dict[str, Any]] = []
    for layers in ("as written", "compiled") if compiled else ("as written",):
        if layers == "compiled":
            compile_blocks(policy.causal_lm)
        for shared in (True, False):
            for tokens in shape(quick=quick)[3]:
                case = {"layers": layers, "shared": shared, "microbatch_tokens": tokens}
                try:
                    point = one(policy, optimizer, device, peaks, shared=shared, tokens=tokens, quick=quick)
                except torch.OutOfMemoryError as error:
                    optimizer.zero_grad(set_to_none=True)
                    torch.cuda.empty_cache()
                    point = {"failed": str(error).splitlines()[0]}
                found.append(case | point)
    return found


def one(
    policy: Any,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    peaks: Peaks,
    *,
    shared: bool,
    tokens: int,
    quick: bool,
) -> dict[str, Any]:
    """One case: seconds of the first step and of later ones, tokens a second, MFU, peak memory."""
    rows, length, prompt, _ = shape(quick=quick)
    pieces = [piece.to(device) for piece in _sequences(policy.vocabulary, rows, length, prompt, tokens)]
    mask = (torch.arange(length - 1, device=device) >= prompt - 1).expand(tokens // length, -1)
    whole = torch.ones(tokens // length, length, dtype=torch.bool, device=device)
    groups = torch.arange(tokens // length, device=device) // GROUP
    prompts = SharedPrompts.of(groups, torch.full_like(groups, prompt)) if shared else None
    completions = rows * (length - prompt)

    def step() -> None:
        for ids in pieces:
            logp, _ = policy.logprobs_and_entropy(ids, whole, mask, temperature=1.0, prompts=prompts)
            (-logp.sum() / completions).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    wait(device)
    start = time.perf_counter()
    step()
    wait(device)
    first = time.perf_counter() - start
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = seconds(step, device, repeats=REPEATS, limit=LIMIT)
    work = flops(policy.causal_lm, rows=rows, length=length, prompt=prompt, shared=shared)
    best = statistics.median(times)
    return {
        "first_step_seconds": first,
        "seconds": times,
        "tokens_per_second": rows * length / best,
        "flops": work,
        "mfu": work / best / peaks.flops,
        "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
    }


def flops(model: Any, *, rows: int, length: int, prompt: int, shared: bool) -> float:
    """Of one step; see the formula above."""
    config, (count, embedding) = model.config, gpu_models.parameters(model)
    width = config.num_hidden_layers * config.hidden_size  # h d_h is the hidden size in these shapes
    readers, new = rows // GROUP if shared else rows, length - prompt
    read = readers * prompt + rows * new
    pairs = readers * prompt * (prompt + 1) / 2 + rows * (new * prompt + new * (new + 1) / 2)
    return 6 * (count - embedding) * read + 6 * embedding * rows * new + 12 * width * pairs


def table(found: list[dict[str, Any]]) -> Table:
    """A row for each case."""
    out = Table(
        "layers", "prompts", "micro-batch", "tokens / second", "seconds", "MFU", "peak GiB", "first step, s"
    )
    for point in found:
        start = [
            point["layers"],
            "read once" if point["shared"] else "with each",
            f"{point['microbatch_tokens']:,}",
        ]
        if "failed" in point:
            out.add_row(*start, "failed: " + point["failed"][:60])
            continue
        peak = point["peak_bytes"]
        out.add_row(
            *start,
            f"{point['tokens_per_second']:,.0f}",
            f"{statistics.median(point['seconds']):.3f}",
            f"{point['mfu']:.1%}",
            "-" if peak is None else f"{peak / 2**30:.1f}",
            f"{point['first_step_seconds']:.1f}",
        )
    return out


def _sequences(vocabulary: int, rows: int, length: int, prompt: int, tokens: int) -> tuple[Tensor, ...]:
    """Random sequences, eight to a prompt, in micro-batches of so many tokens."""
    ids = torch.randint(2, vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))
    ids[:, :prompt] = ids[torch.arange(rows) // GROUP * GROUP, :prompt]
    return ids.split(tokens // length)
