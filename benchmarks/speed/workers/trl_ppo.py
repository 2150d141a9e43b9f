"""TRL's last PPOTrainer: four models, one epoch, one minibatch, no gradient checkpointing, fp32."""

from shared import Stopwatch, begin, never_ending, tokenizer_of

job = begin()

from datasets import Dataset  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    TrainerCallback,
)
from trl.experimental import ppo  # noqa: E402

watch, rows = Stopwatch(), len(job["prompts"]) * job["group"]
steps = job["warmup"] + job["steps"]


class Marks(TrainerCallback):
    def on_train_begin(self, *args, **kwargs):
        watch.mark()

    def on_step_end(self, *args, **kwargs):
        watch.mark()


def causal():
    return never_ending(AutoModelForCausalLM.from_pretrained(job["model"]), tokenizer)


def scorer():
    return AutoModelForSequenceClassification.from_pretrained(job["model"], num_labels=1)


tokenizer = tokenizer_of(job, padding_side="left")
ids = [tokenizer(prompt)["input_ids"] for prompt in job["prompts"] for _ in range(job["group"])]
data = Dataset.from_dict({"input_ids": ids * (steps + 1)})
config = ppo.PPOConfig(
    output_dir=job["scratch"],
    per_device_train_batch_size=rows,
    gradient_accumulation_steps=1,
    local_rollout_forward_batch_size=rows,
    num_mini_batches=1,
    num_ppo_epochs=1,
    response_length=job["new_tokens"],
    total_episodes=rows * steps,
    temperature=1.0,
    stop_token=None,
    num_sample_generations=0,
    bf16=False,
    gradient_checkpointing=False,
    use_cpu=True,
    logging_steps=10_000,
    save_strategy="no",
    report_to=[],
    disable_tqdm=True,
)
generate = ppo.ppo_trainer.batch_generation


def checked(*args, **kwargs):
    responses, logits = generate(*args, **kwargs)
    assert logits.shape[1] == job["new_tokens"], "a response ended early"
    return responses, logits


ppo.ppo_trainer.get_reward = watch.timed("values and score", ppo.ppo_trainer.get_reward)
ppo.ppo_trainer.batch_generation = watch.timed("generate", checked)
trainer = ppo.PPOTrainer(
    args=config,
    processing_class=tokenizer,
    model=causal(),
    ref_model=causal(),
    reward_model=scorer(),
    value_model=scorer(),
    train_dataset=data,
    eval_dataset=data.select(range(rows)),
    callbacks=[Marks()],
)
trainer.train()
watch.report(job, ["trl", "transformers", "torch"])
