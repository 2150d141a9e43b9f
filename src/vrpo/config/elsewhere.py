"""What other libraries call a setting: whoever comes from one is told our name, not the nearest spelling."""

OUR_NAMES = {
    "beta": "algorithm.kl_coef",
    "epsilon": "algorithm.cliprange",
    "epsilon_high": "algorithm.cliprange_high",
    "init_kl_coef": "algorithm.kl_coef",
    "vf_coef": "critic.learning_rate",
    "num_iterations": "train.epochs",
    "num_ppo_epochs": "train.epochs",
    "max_steps": "train.steps",
    "max_new_tokens": "rollout.max_completion_length",
    "response_length": "rollout.max_completion_length",
    "max_prompt_length": "task.max_prompt_tokens",
    "per_device_train_batch_size": "train.microbatch",
    "generation_batch_size": "train.completions_per_step",
    "gradient_accumulation_steps": "train.minibatch",
    "scale_rewards": "algorithm.scale",
    "reward_weights": "rewards.functions.weight",
    "lora_alpha": "model.lora.alpha",
    "lora_r": "model.lora.rank",
    "gradient_checkpointing": "train.activation_checkpointing",
    "warmup_steps": "train.lr_warmup_steps",
    "lr_scheduler_type": "train.lr_schedule",
    "save_steps": "train.checkpoint_every",
    "eval_steps": "train.eval_every",
    "save_total_limit": "train.keep_checkpoints",
}
"""TRL's name (mostly) -> the setting here that does that. A test looks for each of ours, and for a line in docs/guides/coming_from_trl.md."""
