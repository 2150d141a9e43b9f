"""What `vrpo plan` foretells against what a process of its own really took."""

import json
import subprocess
import sys

import pytest
import transformers

from tests.conftest import tiny_tokenizer
from vrpo.models.loading import seeded

RUN = """
import json, sys
import torch
torch.set_num_threads(1)
import vrpo
from vrpo.train.memory import memory_plan, peak_bytes
from vrpo.train.progress import Quiet
from vrpo.train.shape import read_shape

folder, out, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
config = vrpo.Config(**settings)
plan = memory_plan(config, read_shape(config, None), prompt_tokens=32)
rows = [{"prompt": f"{i:032}"} for i in range(12)]
trainer = vrpo.Trainer(folder, lambda prompts, completions, **columns: [float(len(c) % 2) for c in completions],
                       rows, config=config, output_dir=out)
trainer.train(display=Quiet())
print(json.dumps({"plan": plan.peak, "peak": peak_bytes(torch.device("cpu"))}))
"""

SETTINGS = {
    "vrpo": {"algorithm": {"type": "vrpo", "kl_coef": 0.01}},
    "grpo": {"algorithm": "grpo", "critic": None},
    "small pieces": {"algorithm": "vrpo", "train": {"max_tokens_per_microbatch": 400}},
    "activations computed again": {"algorithm": "vrpo", "train": {"activation_checkpointing": True}},
    "borrowed": {"algorithm": "ppo", "critic": {"trunk": "policy", "warmup_steps": 0}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Llama of 21 M parameters, whose activations and weights outweigh the libraries."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = tiny_tokenizer()
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with seeded(0):
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize(
    "name",
    [
        "vrpo",
        "grpo",
        pytest.param("small pieces", marks=pytest.mark.slow),
        "activations computed again",
        pytest.param("borrowed", marks=pytest.mark.slow),
    ],
)
def test_the_plan_is_within_a_fifth_of_the_peak(folder, tmp_path, name):
    chosen = dict(SETTINGS[name])
    train = {
        "steps": 1,
        "completions_per_step": 32,
        "minibatch": 32,
        "microbatch": 32,
        "eval_every": 0,
        "eval_prompts": 1,
        "checkpoint_every": 0,
    } | chosen.pop("train", {})
    settings = {
        "model": {"path": str(folder), "device": "cpu"},
        "rollout": {"num_generations": 8, "max_completion_length": 40},
        "critic": {"warmup_steps": 0},
        "train": train,
    } | chosen
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(folder), str(tmp_path / "run"), json.dumps(settings)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["plan"] == pytest.approx(found["peak"], rel=0.2), {k: v / 2**30 for k, v in found.items()}
