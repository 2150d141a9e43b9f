"""TRL's GRPOTrainer: on-policy, beta 0, no gradient checkpointing, one optimizer step a step.

fp32, and on a GPU fp32 weights under bf16 autocast.
"""

from shared import Stopwatch, begin, even, never_ending, tokenizer_of

job = begin()

from datasets import Dataset  # noqa: E402
from transformers import AutoModelForCausalLM, TrainerCallback  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

watch, gpu = Stopwatch(job["device"]), job["device"] != "cpu"
rows = len(job["prompts"]) * job["group"]


def reward(completions, completion_ids, **columns):
    assert {len(ids) for ids in completion_ids} == {job["new_tokens"]}, "a response ended early"
    return even(completions)


class Marks(TrainerCallback):
    def on_train_begin(self, *args, **kwargs):
        watch.mark()

    def on_step_end(self, *args, **kwargs):
        watch.mark()


config = GRPOConfig(
    output_dir=job["scratch"],
    per_device_train_batch_size=rows,
    num_generations=job["group"],
    max_completion_length=job["new_tokens"],
    beta=0.0,
    temperature=1.0,
    learning_rate=1e-6,
    max_steps=job["warmup"] + job["steps"],
    bf16=gpu,
    gradient_checkpointing=False,
    use_cpu=not gpu,
    shuffle_dataset=False,
    logging_steps=10_000,
    save_strategy="no",
    report_to=[],
    disable_tqdm=True,
)
tokenizer = tokenizer_of(job)
trainer = GRPOTrainer(
    model=never_ending(AutoModelForCausalLM.from_pretrained(job["model"]), tokenizer),
    processing_class=tokenizer,
    reward_funcs=reward,
    args=config,
    train_dataset=Dataset.from_dict({"prompt": job["prompts"] * (job["warmup"] + job["steps"])}),
    callbacks=[Marks()],
)
trainer._generate = watch.timed("generate", trainer._generate)
trainer._calculate_rewards = watch.timed("score", trainer._calculate_rewards)
trainer.train()
watch.report(job, ["trl", "transformers", "torch"])
