"""One real training step in this process: what `vrpo plan` foretold, and the peak it took.

    python -m benchmarks.memory --model models/SmolLM2-135M-Instruct

VRPO with a critic of its own and a reference (kl_coef .01) on 64 x (32 + 480) tokens, micro-batches of 1,024 tokens, fp32, one
thread. No token ends a response, so that all have full length. About twenty minutes on one core.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch

import vrpo
from benchmarks.speed import workload
from vrpo.models import Policy
from vrpo.train.memory import memory_plan, peak_bytes
from vrpo.train.progress import Quiet
from vrpo.train.shape import read_shape


def reward(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """Something that differs between responses."""
    return [sum(code % 2 for code in text.encode()) / max(len(text), 1) for text in completions]


def main() -> None:
    """Train one step, print both numbers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--new-tokens", type=int, default=480)
    parser.add_argument("--microbatch-tokens", type=int, default=1024)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    Policy.eos_token_ids = property(lambda self: frozenset([2**40]))  # type: ignore[assignment]
    config = vrpo.Config(
        model={"path": arguments.model, "device": "cpu"},
        algorithm={"type": "vrpo", "kl_coef": 0.01},
        critic={"warmup_steps": 0},
        rollout={"num_generations": 8, "max_completion_length": arguments.new_tokens},
        train={
            "steps": 1,
            "completions_per_step": 64,
            "minibatch": 64,
            "microbatch": 64,
            "max_tokens_per_microbatch": arguments.microbatch_tokens,
            "eval_every": 0,
            "eval_prompts": 1,
            "checkpoint_every": 0,
        },
    )
    plan = memory_plan(
        config, read_shape(config, None), prompt_tokens=workload.PROMPT_TOKENS, device=torch.device("cpu")
    )
    with tempfile.TemporaryDirectory() as folder:
        written = workload.smollm2(Path(folder), Path(arguments.model)).prompts
        rows = [{"prompt": text} for text in json.loads(written.read_text(encoding="utf-8"))]
        trainer = vrpo.Trainer(
            arguments.model,
            reward,
            rows,
            eval_dataset=rows[:1],
            config=config,
            output_dir=Path(folder) / "run",
        )
        trainer.train(display=Quiet())
    peak = peak_bytes(torch.device("cpu"))
    print(f"planned {plan.peak / 2**30:.2f} GiB, took {peak / 2**30:.2f} GiB, ratio {plan.peak / peak:.2f}")


if __name__ == "__main__":
    main()
