"""Training steps of vrpo, with the settings the job gives."""

import tempfile
from types import SimpleNamespace

from shared import Stopwatch, begin, even, phase_seconds, tokenizer_of

job = begin()

import vrpo  # noqa: E402
from vrpo.models import Policy  # noqa: E402
from vrpo.train import clock  # noqa: E402
from vrpo.train.progress import Quiet  # noqa: E402

clock.time = SimpleNamespace(perf_counter=phase_seconds(job["device"]))  # as in the peers

# no token ends a response: as in the peers, whose tokenizers get an end token that the model lacks
Policy.eos_token_ids = property(lambda self: frozenset([2**40]))
watch = Stopwatch(job["device"])
count, steps = len(job["prompts"]) * job["group"], job["warmup"] + job["steps"]


def reward(prompts, completions, **columns):
    return even(completions)


class Marks(Quiet):
    def start(self, *args, **kwargs):
        watch.mark()

    def step(self, step, metrics):
        lengths = {metrics["completions/mean_length"], metrics["completions/max_length"]}
        assert lengths == {job["new_tokens"]}, "a response ended early"
        assert metrics["policy/grad_norm"] > 0, "the policy has nothing to learn from"
        watch.mark({k.removeprefix("time/"): v for k, v in metrics.items() if k.startswith("time/")})


def settings() -> dict:
    """A configuration, the job's `--set` values last."""
    grpo = job["algorithm"] == "grpo"
    base = {
        "model": {"path": job["model"], "device": job["device"]},
        "algorithm": job["algorithm"],
        "critic": None if grpo else {"warmup_steps": 0},
        "rollout": {"num_generations": job["group"], "max_completion_length": job["new_tokens"]},
        "train": {
            "steps": steps,
            "completions_per_step": count,
            "minibatch": count,
            "microbatch": count,
            "eval_every": 0,
            "eval_prompts": 1,
            "checkpoint_every": 0,
            "threads": job["threads"],
        },
    }
    for key, value in job.get("settings", {}).items():
        section, _, name = key.rpartition(".")
        if not (grpo and section.startswith("critic")):
            place = base
            for part in section.split("."):
                place = place.setdefault(part, {})
            place[name] = value
    return base


with tempfile.TemporaryDirectory(dir=job["scratch"]) as folder:
    trainer = vrpo.Trainer(
        model=job["model"],
        processing_class=tokenizer_of(job, endless=False),
        reward_funcs=reward,
        train_dataset=[{"prompt": prompt} for prompt in job["prompts"]],
        eval_dataset=[{"prompt": job["prompts"][0]}],
        config=vrpo.Config(**settings()),
        output_dir=folder,
    )
    trainer.train(display=Marks())
watch.report(job, ["vrpo", "transformers", "torch"])
