"""Sampling on a GPU: our engine beside `generate` of transformers, and how near it is to reading the memory once.

    bound = rows / (bytes of a step / bytes a second)
    bytes of a step = 2 parameters + 2 rows (prompt + new / 2) * 2 layers kv_heads head_dim

Weights and cache in bf16, the cache at its mean length. Not in it: activations, logits, copies of anything.
"""

import copy
import statistics
from typing import Any

import numpy as np
import torch
from rich.table import Table

from benchmarks.speed import gpu_models
from benchmarks.speed.gpu_peaks import Peaks, seconds
from vrpo.config.run import RolloutConfig
from vrpo.rollout import TorchEngine
from vrpo.types import Prompt

GROUP = 8
REPEATS, LIMIT = 3, 6.0
"""Timed calls of one case after the first, and seconds after which there is no further one."""


def cases(*, quick: bool) -> list[tuple[int, int, int]]:
    """Rows, prompt tokens, new tokens."""
    return [(16, 8, 8), (16, 16, 32)] if quick else [(256, 32, 64), (256, 512, 128)]


def measure(device: torch.device, peaks: Peaks, *, quick: bool) -> list[dict[str, Any]]:
    """Every case: ours as CUDA graphs, ours without where that is short, and `generate`."""
    model = gpu_models.random_model(gpu_models.sampled(quick=quick), device)
    policy = gpu_models.policy_of(model)
    peer = copy.deepcopy(model).to(torch.bfloat16).eval()
    found: list[dict[str, Any]] = []
    for rows, prompt, new in cases(quick=quick):
        shape = {"rows": rows, "prompt_tokens": prompt, "new_tokens": new}
        point: dict[str, Any] = {**shape, "vrpo": ours(policy, **shape, graphs=True)}
        if not found:
            point["vrpo without graphs"] = ours(policy, **shape, graphs=False)
        point["generate"] = theirs(peer, **shape, device=device)
        point["bound_tokens_per_second"] = bound(model, **shape, peaks=peaks)
        found.append(point)
    return found


def ids_of(rows: int, prompt_tokens: int, vocabulary: int) -> np.ndarray:
    """Random prompts [rows / GROUP, prompt_tokens], the same for all."""
    return np.random.default_rng(0).integers(2, vocabulary, (rows // GROUP, prompt_tokens))


def ours(policy: Any, *, rows: int, prompt_tokens: int, new_tokens: int, graphs: bool) -> dict[str, Any]:
    """Seconds of the first call, which compiles and captures, and of later ones; log-probabilities included."""
    settings = RolloutConfig(
        num_generations=GROUP, max_completion_length=new_tokens, batch_size=rows, cuda_graphs=graphs
    )
    engine = TorchEngine(policy, policy.tokenizer, settings, seed=0)
    prompts = [
        Prompt(prompt_id=f"train/{i}", prompt="-", token_ids=ids, columns={})
        for i, ids in enumerate(ids_of(rows, prompt_tokens, policy.vocabulary))
    ]

    def work() -> None:
        drawn = engine.generate(prompts, num_generations=GROUP, step=1, policy_version=0)
        assert len(drawn) == rows and {r.num_actions for r in drawn} == {new_tokens}, "a response ended early"

    first = seconds(work, policy.device, repeats=1, limit=0.0)[0]
    later = seconds(work, policy.device, repeats=REPEATS, limit=LIMIT)
    return _speed(later, rows * new_tokens) | {"first_call_seconds": first}


def theirs(
    model: Any, *, rows: int, prompt_tokens: int, new_tokens: int, device: torch.device
) -> dict[str, Any]:
    """Seconds of `generate` after a call for four tokens: bf16 weights, a cache, no log-probabilities kept."""
    ids = ids_of(rows, prompt_tokens, model.config.vocab_size).repeat(GROUP, axis=0)
    inputs = torch.from_numpy(ids).to(device)

    def work(tokens: int = new_tokens) -> None:
        out = model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            use_cache=True,
            max_new_tokens=tokens,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert out.shape == (rows, prompt_tokens + tokens), "a response ended early"
        assert model.generation_config.eos_token_id is None, "a token can end a response"

    work(4)
    return _speed(seconds(work, device, repeats=REPEATS, limit=LIMIT / 2), rows * new_tokens)


def bound(model: Any, *, rows: int, prompt_tokens: int, new_tokens: int, peaks: Peaks) -> float:
    """Tokens a second where reading weights and cache is all the time; see above."""
    config = model.config
    width = config.hidden_size // config.num_attention_heads
    kept = 2 * config.num_hidden_layers * config.num_key_value_heads * width
    read = 2 * gpu_models.parameters(model)[0] + 2 * rows * kept * (prompt_tokens + new_tokens / 2)
    return rows * peaks.bytes_per_second / read


def table(found: list[dict[str, Any]]) -> Table:
    """A row for each sampler and case."""
    out = Table("tokens", "sampler", "tokens / second", "ms a token", "of the bound", "first call, s")
    for point in found:
        for name in ("vrpo", "vrpo without graphs", "generate"):
            if name not in point:
                continue
            speed, first = point[name]["tokens_per_second"], point[name].get("first_call_seconds")
            out.add_row(
                "{rows} x ({prompt_tokens} + {new_tokens})".format(**point),
                name,
                f"{speed:,.0f}",
                f"{1e3 * point['rows'] / speed:.2f}",
                f"{speed / point['bound_tokens_per_second']:.1%}",
                "-" if first is None else f"{first:.1f}",
            )
    return out


def _speed(times: list[float], tokens: int) -> dict[str, Any]:
    return {"seconds": times, "tokens_per_second": tokens / statistics.median(times)}
