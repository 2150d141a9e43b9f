"""Tokens per second of sampling, passes and updates against batch, length and model size, each beside its roofline.

    python -m benchmarks.speed.scaling [--json benchmarks/results/scaling.json] [--figure docs/figures/speed_scaling.png]

Random-weight Qwen2 models, one thread. The rooflines: a token of sampling costs 2 flops a parameter and reads its
share of weights and cache; a token of a pass 2, of an update 6. Peaks of matrix product and memory are measured first.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from vrpo.config.run import RolloutConfig
from vrpo.functional import gae
from vrpo.models import Policy
from vrpo.rollout import TorchEngine
from vrpo.types import Prompt, SharedPrompts

WORDS, PROMPT, NEW, GROUP = 1024, 32, 64, 8
SIZES = {"0.1 M": (48, 2), "0.9 M": (128, 4), "10.6 M": (320, 8)}
"""Name -> hidden size, layers."""
BATCHES = (8, 32, 128, 256)
LENGTHS = (128, 512, 2048, 8192, 32768)
TOO_LONG = 20.0
"""Seconds after which no longer sequence is tried."""


class Words:
    """As much of a tokenizer as sampling asks for."""

    eos_token_id, pad_token_id = 2**40, 0

    def decode(self, ids: Any, **settings: Any) -> str:
        """The ids, written out."""
        return " ".join(map(str, ids))


def policy_of(size: str) -> Policy:
    """A random model whose responses never end early."""
    hidden, layers = SIZES[size]
    config = Qwen2Config(
        vocab_size=WORDS,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max(LENGTHS),
        tie_word_embeddings=True,
        eos_token_id=None,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    return Policy(
        AutoModelForCausalLM.from_config(config), Words(), compute_dtype=torch.float32, adapter=False
    )


def seconds(work: Callable[[], object], repeats: int = 3) -> float:
    """The least processor time of a few calls, the first left out where it is short."""
    times = []
    for _ in range(repeats + 1):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
        if times[-1] > 5.0:
            break
    return min(times[1:] or times)


def sampling(policy: Policy, rows: int) -> float:
    """Completion tokens per second of `rows` responses, eight to a prompt."""
    settings = RolloutConfig(num_generations=GROUP, max_completion_length=NEW, batch_size=rows)
    engine = TorchEngine(policy, policy.tokenizer, settings, seed=0)
    random = np.random.default_rng(0)
    prompts = [
        Prompt(prompt_id=f"train/{i}", prompt="-", token_ids=random.integers(1, WORDS, PROMPT), columns={})
        for i in range(rows // GROUP)
    ]
    work = lambda: engine.generate(prompts, num_generations=GROUP, step=1, policy_version=0)  # noqa: E731
    return rows * NEW / seconds(work)


def updating(policy: Policy, rows: int) -> float:
    """Completion tokens per second of log-probabilities and their gradient."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, WORDS, (rows, PROMPT + NEW), generator=generator)
    groups = torch.arange(rows) // GROUP
    ids[:, :PROMPT] = ids[groups * GROUP, :PROMPT]
    mask = (torch.arange(PROMPT + NEW - 1) >= PROMPT - 1).expand(rows, -1)
    prompts = SharedPrompts.of(groups, torch.full((rows,), PROMPT))

    def work() -> None:
        policy.zero_grad()
        whole = torch.ones_like(ids, dtype=torch.bool)
        policy.logprobs_and_entropy(ids, whole, mask, temperature=1.0, prompts=prompts)[0].sum().backward()

    return rows * NEW / seconds(work)


def passing(policy: Policy, length: int) -> float:
    """Tokens per second of one log-probability pass over one sequence."""
    ids = torch.randint(1, WORDS, (1, length), generator=torch.Generator().manual_seed(0))
    whole = torch.ones_like(ids, dtype=torch.bool)

    def work() -> None:
        with torch.no_grad():
            policy.logprobs_and_entropy(ids, whole, whole[:, 1:], temperature=1.0)

    return length / seconds(work)


def estimating(length: int, rows: int = 8) -> float:
    """Tokens per second of GAE."""
    values = torch.randn(rows, length, generator=torch.Generator().manual_seed(0))
    whole = torch.ones_like(values, dtype=torch.bool)
    return rows * length / seconds(lambda: gae(values, values, values[:, 0], whole, gamma=1.0, lam=0.95))


def matmul_peak(size: int = 1024) -> float:
    """Floating-point operations per second of a matrix product."""
    a = torch.ones(size, size)
    return 2 * size**3 / seconds(lambda: a @ a, repeats=20)


def bandwidth() -> float:
    """Bytes per second of adding two arrays that no cache holds."""
    a = torch.ones(2**26)
    b = torch.ones_like(a)
    return 3 * a.numel() * 4 / seconds(lambda: torch.add(a, b, out=b))


def decode_bound(policy: Policy, rows: int, flops: float, bytes_per_second: float) -> float:
    """Most tokens per second of sampling: the slower of arithmetic and of reading weights and cache."""
    count = sum(p.numel() for p in policy.parameters())
    config = policy.causal_lm.config
    kept = 2 * config.num_hidden_layers * config.num_key_value_heads * (config.hidden_size // 4)
    read = 4 * (count + rows * kept * (PROMPT + NEW / 2))
    return rows / max(2.0 * count * rows / flops, read / bytes_per_second)


def measure() -> dict[str, Any]:
    """Every point and every bound."""
    flops, speed = matmul_peak(), bandwidth()
    tiny = policy_of("0.9 M")
    count = sum(p.numel() for p in tiny.parameters())
    found: dict[str, Any] = {"flops": flops, "bytes_per_second": speed, "batch": {}, "length": {}, "size": {}}
    for rows in BATCHES:
        found["batch"][rows] = {
            "sampling": sampling(tiny, rows),
            "sampling bound": decode_bound(tiny, rows, flops, speed),
            "update": updating(tiny, rows),
            "update bound": flops / (6 * count * (1 + PROMPT / NEW / GROUP)),
        }
    for length in LENGTHS:
        found["length"][length] = {
            "GAE": estimating(length),
            "log-prob pass": passing(tiny, length),
            "pass bound": flops
            / (2 * (count + 128 * 4 * length)),  # attention: 2 L d a layer, half of it masked
        }
        if length / found["length"][length]["log-prob pass"] > TOO_LONG:
            break
    for size in SIZES:
        policy = policy_of(size)
        count = sum(p.numel() for p in policy.parameters())
        found["size"][count] = {
            "sampling": sampling(policy, 64),
            "sampling bound": decode_bound(policy, 64, flops, speed),
            "update": updating(policy, 64),
            "update bound": flops / (6 * count * (1 + PROMPT / NEW / GROUP)),
        }
    return found


def draw(found: dict[str, Any], path: Path) -> None:
    """Three panels, bounds dashed in the colour of what they bound."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    titles = {
        "batch": "sequences at once (0.9 M)",
        "length": "length of a sequence (0.9 M)",
        "size": "parameters (64 sequences)",
    }
    colours = {
        "sampling": "#0b6e99",
        "update": "#d9730d",
        "log-prob pass": "#d9730d",
        "pass": "#d9730d",
        "GAE": "#6b6b6b",
    }
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        for name in next(iter(found[key].values())):
            bound = name.endswith(" bound")
            colour = colours[name.removesuffix(" bound")]
            x, y = list(found[key]), [point[name] for point in found[key].values()]
            axis.loglog(
                x, y, "--" if bound else "o-", color=colour, label=f"{name[:-6]}: roofline" if bound else name
            )
        axis.set(xlabel=title, ylabel="tokens per second")
        axis.grid(alpha=0.2)
        axis.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, draw, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = measure()
    print(json.dumps(found, indent=1))
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if arguments.figure is not None:
        draw(found, arguments.figure)


if __name__ == "__main__":
    main()
