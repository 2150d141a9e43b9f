"""Tokens per CPU-second of sampling, passes and updates against batch, length and model size, beside rooflines.

Random-weight Qwen2 models and SmolLM2 where it is at hand, fp32, one thread by default. The rooflines: sampling reads the
weights once a step and the cache once a token, and does 2 flops a parameter and token; a token of a pass costs 2 flops a
parameter and its share of attention, a token of an update 6. The peaks of matrix product and memory are measured, again
before every panel, and the best counts.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from benchmarks.speed.compare import ROOT, provenance
from vrpo.config.learning import CriticConfig
from vrpo.config.run import RolloutConfig
from vrpo.functional import gae
from vrpo.models import Policy
from vrpo.models.critic import Critic
from vrpo.rollout import TorchEngine
from vrpo.types import Prompt, SharedPrompts

WORDS, PROMPT, NEW, GROUP = 1024, 32, 64, 8
SIZES = {"0.1 M": (48, 2), "0.9 M": (128, 4), "10.2 M": (320, 8)}
"""Name -> hidden size, layers."""
BATCHES = (8, 16, 32, 64, 128, 256)
LENGTHS = (128, 512, 2048, 8192, 32768)
TITLES = {
    "batch": "sequences at once (0.9 M parameters)",
    "length": "length of a sequence (0.9 M parameters)",
    "size": "parameters (64 sequences)",
}
COLOURS = {
    "sampling": "#0b6e99",
    "update": "#d9730d",
    "log-prob pass": "#d9730d",
    "value pass": "#0f7b6c",
    "GAE": "#6b6b6b",
}
TOO_LONG = 20.0
"""Seconds after which no longer sequence is tried."""


class Words:
    """As much of a tokenizer as sampling asks for."""

    eos_token_id, pad_token_id = 2**40, 0
    all_special_tokens = all_special_ids = ()
    added_tokens_decoder = MappingProxyType[int, Any]({})

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
    return wrapped(AutoModelForCausalLM.from_config(config))


def wrapped(model: Any) -> Policy:
    """The model as a policy that no token stops."""
    model.generation_config.eos_token_id = None
    return Policy(model, Words(), compute_dtype=torch.float32, adapter=False)


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

    def work() -> None:
        drawn = engine.generate(prompts, num_generations=GROUP, step=1, policy_version=0)
        assert {rollout.num_actions for rollout in drawn} == {NEW}, "a response ended early"

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


def valuing(policy: Policy, length: int) -> float:
    """Tokens per second of one value pass over one sequence."""
    critic = Critic.from_policy(policy, CriticConfig(), seed=0)
    ids = torch.randint(1, WORDS, (1, length), generator=torch.Generator().manual_seed(0))
    whole = torch.ones_like(ids, dtype=torch.bool)

    def work() -> None:
        with torch.no_grad():
            critic.forward_tokens(critic.states_at(ids, whole, whole), None)

    return length / seconds(work)


def estimating(length: int, rows: int = 8) -> float:
    """Tokens per second of GAE."""
    values = torch.randn(rows, length, generator=torch.Generator().manual_seed(0))
    whole = torch.ones_like(values, dtype=torch.bool)
    return rows * length / seconds(lambda: gae(values, values, values[:, 0], whole, gamma=1.0, lam=0.95))


class Peaks:
    """The machine's best so far: measured again before each panel, since others may share it."""

    flops = bytes_per_second = 0.0

    def measure(self) -> None:
        """Matrix products of three sizes; adding two arrays that no cache holds."""
        for size in (512, 1024, 2048):
            a = torch.ones(size, size)
            best = seconds(lambda a=a: a @ a, repeats=10)
            self.flops = max(self.flops, 2 * size**3 / best)
        a = torch.ones(2**26)
        b = torch.ones_like(a)
        best = seconds(lambda: torch.add(a, b, out=b), repeats=5)
        self.bytes_per_second = max(self.bytes_per_second, 3 * a.numel() * 4 / best)


def sizes(policy: Policy) -> tuple[int, int]:
    """Parameters, and those of them in the embedding, which is also the head."""
    count = sum(p.numel() for p in policy.parameters())
    return count, policy.causal_lm.get_input_embeddings().weight.numel()


def sampling_bound(policy: Policy, rows: int, peaks: Peaks) -> float:
    """The slower of arithmetic and of reading weights and cache."""
    count, _ = sizes(policy)
    config = policy.causal_lm.config
    width = config.hidden_size // config.num_attention_heads
    kept = 2 * config.num_hidden_layers * config.num_key_value_heads * width
    read = 4 * (count + rows * kept * (PROMPT + NEW / 2))
    return rows / max(2.0 * count * rows / peaks.flops, read / peaks.bytes_per_second)


def update_bound(policy: Policy, peaks: Peaks) -> float:
    """6 flops a parameter and token; a prompt is read once for its responses, and needs no head."""
    count, head = sizes(policy)
    return peaks.flops / (6 * (count + (count - head) * PROMPT / NEW / GROUP))


def pass_bound(policy: Policy, length: int, peaks: Peaks, *, head: bool) -> float:
    """2 flops a parameter and token, and attention: 2 L d a layer, half of it being masked."""
    count, embedding = sizes(policy)
    config = policy.causal_lm.config
    attention = config.hidden_size * config.num_hidden_layers * length
    return peaks.flops / (2 * (count - (0 if head else embedding) + attention))


def by_batch(policy: Policy, rows: int) -> dict[str, float]:
    """Sampling and update of `rows` sequences."""
    return {"sampling": sampling(policy, rows), "update": updating(policy, rows)}


def by_length(policy: Policy, length: int) -> dict[str, float]:
    """Passes over one sequence, and GAE over eight."""
    return {
        "GAE": estimating(length),
        "log-prob pass": passing(policy, length),
        "value pass": valuing(policy, length),
    }


def bounds(policy: Policy, panel: str, x: int, peaks: Peaks) -> dict[str, float]:
    """Rooflines of a panel's point."""
    if panel == "length":
        return {
            "log-prob pass": pass_bound(policy, x, peaks, head=True),
            "value pass": pass_bound(policy, x, peaks, head=False),
        }
    rows = x if panel == "batch" else 64
    return {"sampling": sampling_bound(policy, rows, peaks), "update": update_bound(policy, peaks)}


def measure(smollm2: Path) -> dict[str, Any]:
    """Every point and every bound."""
    peaks, points = Peaks(), []
    peaks.measure()
    tiny = policy_of("0.9 M")
    for rows in BATCHES:
        points.append(("batch", rows, tiny, by_batch(tiny, rows)))
    peaks.measure()
    for length in LENGTHS:
        points.append(("length", length, tiny, by_length(tiny, length)))
        if length / min(points[-1][3].values()) > TOO_LONG:
            break
    makers = [lambda size=size: policy_of(size) for size in SIZES]
    if smollm2.exists():
        makers.append(lambda: wrapped(AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)))
    for make in makers:
        peaks.measure()
        policy = make()
        points.append(("size", sizes(policy)[0], policy, by_batch(policy, 64)))
    found: dict[str, Any] = {"batch": {}, "length": {}, "size": {}}
    for panel, x, policy, measured in points:
        found[panel][x] = {"measured": measured, "roofline": bounds(policy, panel, x, peaks)}
    return {"flops": peaks.flops, "bytes_per_second": peaks.bytes_per_second, **found}


def draw(found: dict[str, Any], folder: Path) -> None:
    """One figure a panel, rooflines dashed in the colour of what they bound."""
    for panel, title in TITLES.items():
        figure, axis = plt.subplots(figsize=(5.5, 4), layout="constrained")
        x, points = list(found[panel]), list(found[panel].values())
        for name in points[0]["measured"]:
            axis.loglog(x, [p["measured"][name] for p in points], "o-", color=COLOURS[name], label=name)
        for name in points[0]["roofline"]:
            line = [p["roofline"][name] for p in points]
            axis.loglog(x, line, "--", color=COLOURS[name], label=f"{name}: roofline")
        axis.set(xlabel=title, ylabel="tokens per CPU-second")
        axis.grid(alpha=0.2)
        axis.legend(frameon=False, fontsize=8)
        figure.savefig(folder / f"speed_{panel}.png", dpi=120)
        plt.close(figure)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `scaling`."""
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "SmolLM2-135M-Instruct")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--figures", type=Path, default=ROOT / "docs" / "figures", help="folder of the figures"
    )


def scaling(arguments: argparse.Namespace) -> None:
    """Measure, draw, and write the numbers beside the figures."""
    torch.set_num_threads(arguments.threads)
    found = measure(arguments.model)
    for panel in TITLES:
        for x, point in found[panel].items():
            shares = {
                name: f"{point['measured'][name] / bound:.0%}" for name, bound in point["roofline"].items()
            }
            print(panel, x, {k: round(v) for k, v in point["measured"].items()}, "of the roofline:", shares)
    arguments.figures.mkdir(parents=True, exist_ok=True)
    draw(found, arguments.figures)
    record = {**provenance(), "torch": torch.__version__, "threads": arguments.threads, **found}
    text = json.dumps(record, indent=1) + "\n"
    (arguments.figures / "speed_scaling.json").write_text(text, encoding="utf-8")
