"""Milliseconds a token of 64 responses to 8 prompts, on one thread: prompts kept once, and a copy in front of every response.

    python -m benchmarks.long_prompts [--quick]

Random weights in fp32: the 0.9 M Qwen 2 of `benchmarks.speed` and SmolLM2-135M's shape. A token's time is that of 1 + NEW tokens less that of
one, so reading the prompts is left out; the better of two tries, CPU time. The cache is the most that is kept of keys and values.
"""

import argparse
import time

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from benchmarks.speed import gpu_models, scaling
from vrpo.config.run import RolloutConfig
from vrpo.models import Policy
from vrpo.rollout import TorchEngine, lookback
from vrpo.types import Prompt

PROMPTS, SAMPLES, NEW, TRIES = 8, 8, 16, 2
WIDTHS = (32, 128, 512)


def seconds(policy: Policy, width: int, new: int, *, tries: int) -> float:
    """CPU seconds to sample `new` tokens of every response."""
    settings = RolloutConfig(num_generations=SAMPLES, max_completion_length=new, batch_size=PROMPTS * SAMPLES)
    engine = TorchEngine(policy, policy.tokenizer, settings, seed=0)
    ids = np.random.default_rng(0).integers(2, policy.vocabulary, (PROMPTS, width))
    prompts = [
        Prompt(prompt_id=f"train/{i}", prompt="-", token_ids=row, columns={}) for i, row in enumerate(ids)
    ]
    best = float("inf")
    for _ in range(tries):
        started = time.process_time()
        drawn = engine.generate(prompts, num_generations=SAMPLES, step=1, policy_version=0)
        best = min(best, time.process_time() - started)
        assert {r.num_actions for r in drawn} == {new}, "a response ended early"
    return best


def cache_mib(policy: Policy, columns: int) -> float:
    """MiB of keys and values of so many tokens, in all layers."""
    config = policy.causal_lm.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return columns * 2 * config.num_hidden_layers * config.num_key_value_heads * head * 4 / 2**20


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Sampling after long prompts, kept once and repeated.")
    parser.add_argument(
        "--quick", action="store_true", help="a small model and the shortest prompts: a trial"
    )
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    torch.manual_seed(0)
    smollm2 = AutoModelForCausalLM.from_config(gpu_models.sampled(quick=quick)).eval()
    models = {
        "0.9 M": scaling.policy_of("0.9 M"),
        "SmolLM2" if not quick else "small": Policy(
            smollm2, scaling.Words(), compute_dtype=torch.float32, adapter=False
        ),
    }
    forms = {"once": lookback.FEWEST_ROWS, "repeated": PROMPTS * SAMPLES + 1}
    rows = PROMPTS * SAMPLES
    print("model    prompt   " + "   ".join(f"{form:>20}" for form in forms))
    for name, policy in models.items():
        for width in WIDTHS[:1] if quick else WIDTHS:
            found = []
            for form, fewest_rows in forms.items():
                lookback.FEWEST_ROWS = fewest_rows
                one, more = (seconds(policy, width, n, tries=TRIES) for n in (1, 1 + NEW))
                kept = cache_mib(policy, (PROMPTS if form == "once" else rows) * width + rows * (1 + NEW))
                found.append(f"{1e3 * (more - one) / NEW:8.2f} ms {kept:6.0f} MiB")
            print(f"{name:8} {width:6}   " + "   ".join(found), flush=True)
    lookback.FEWEST_ROWS = forms["once"]


if __name__ == "__main__":
    main()
