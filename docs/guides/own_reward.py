"""Train a model on your own rows with your own reward function.

    python docs/guides/own_reward.py

Under half a minute on a CPU; nothing is downloaded. The model is the small arithmetic one in the package. The
rows are sums of two numbers, and for some of them nobody has checked the answer.
"""

import vrpo

rows = [
    {"prompt": f"{a}+{b}=", "answer": str(a + b), "checked": (a + b) % 10 != 0}
    for a in range(10, 100, 3)
    for b in range(11, 100, 3)
]


def right_sum(prompts, completions, answer, checked, **columns):
    """1 for the right sum, 0 for a wrong one, None where the answer was never checked."""
    return [
        float(completion.strip() == right) if known else None
        for completion, right, known in zip(completions, answer, checked, strict=True)
    ]


config = vrpo.Config(
    algorithm="vrpo",
    rollout={"num_generations": 8, "max_completion_length": 6},
    critic={"warmup_steps": 5, "epochs": 2, "learning_rate": 5e-4},
    train={
        "steps": 20,
        "completions_per_step": 128,
        "minibatch": 64,
        "microbatch": 64,
        "learning_rate": 1e-4,
        "lr_warmup_steps": 3,
        "eval_every": 0,
        "checkpoint_every": 0,
        "threads": 1,
    },
)

trainer = vrpo.Trainer(
    model="vrpo:tiny",
    reward_funcs=right_sum,
    train_dataset=rows,
    config=config,
    output_dir="runs/own_reward",
)
summary = trainer.train()
first, final = summary["clean_accuracy"]["first"], summary["clean_accuracy"]["final"]
print(f"{len(rows)} rows; {summary['rewards_missing']:.0f} of {20 * 128} responses had no reward")
print(f"clean accuracy on held-out rows: first {first['greedy']:.3f}, final {final['greedy']:.3f}")
