"""Floating-point operations of a training step, counted: GRPO, PPO, and PPO with the policy's trunk.

    python -m benchmarks.flops

The tiny workload of `benchmarks.speed`. torch's counter sees matrix products; of attention on a CPU those of the sampler alone are among them.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedTokenizerFast

import vrpo
from benchmarks.speed import workload
from vrpo.models import Policy
from vrpo.train.progress import Quiet

CASES: dict[str, tuple[str, dict[str, Any] | None]] = {
    "GRPO": ("grpo", None),
    "PPO": ("ppo", {"warmup_steps": 0}),
    "PPO, the policy's trunk": ("ppo", {"warmup_steps": 0, "trunk": "policy"}),
}


def reward(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """Something that differs between responses."""
    return [sum(code % 2 for code in text.encode()) / max(len(text), 1) for text in completions]


class Counted(Quiet):
    """The counter's total after the evaluation that comes first, and after the step."""

    def __init__(self, counter: FlopCounterMode) -> None:
        self.counter, self.before, self.after = counter, 0, 0

    def evaluation(self, step: int, result: Any) -> None:
        if step == 0:
            self.before = self.counter.get_total_flops()

    def step(self, step: int, metrics: dict[str, float]) -> None:
        self.after = self.counter.get_total_flops()


def count(work: workload.Workload, algorithm: str, critic: dict[str, Any] | None, folder: Path) -> float:
    """GFLOP of one step."""
    prompts = json.loads(work.prompts.read_text(encoding="utf-8"))
    rows = len(prompts) * workload.GROUP
    train = {"steps": 1, "completions_per_step": rows, "minibatch": rows, "microbatch": rows}
    config = vrpo.Config(
        model={"path": str(work.model), "device": "cpu"},
        algorithm=algorithm,
        critic=critic,
        rollout={"num_generations": workload.GROUP, "max_completion_length": workload.NEW_TOKENS},
        train=train | {"eval_every": 0, "eval_prompts": 1, "checkpoint_every": 0},
    )
    trainer = vrpo.Trainer(
        str(work.model),
        reward,
        [{"prompt": prompt} for prompt in prompts],
        eval_dataset=[{"prompt": prompts[0]}],
        config=config,
        processing_class=PreTrainedTokenizerFast.from_pretrained(work.model),
        output_dir=folder,
    )
    with FlopCounterMode(display=False) as counter:
        seen = Counted(counter)
        trainer.train(display=seen)
    return (seen.after - seen.before) / 1e9


def main() -> None:
    """Count every case."""
    torch.set_num_threads(1)
    Policy.eos_token_ids = property(lambda self: frozenset([2**40]))  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as scratch:
        work = workload.tiny(Path(scratch))
        for name, (algorithm, critic) in CASES.items():
            print(f"{name}: {count(work, algorithm, critic, Path(scratch) / name):.1f} GFLOP")


if __name__ == "__main__":
    main()
