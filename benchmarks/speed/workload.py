"""What every worker of a comparison is given: a model folder and prompts of equal length."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config

GROUP, PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 8, 8, 32, 64
WORDS = 1024


@dataclass(frozen=True, slots=True)
class Workload:
    """One comparison."""

    model: Path
    prompts: Path
    rounds: int
    steps: int
    """Timed steps of a worker in a round."""
    workers: tuple[str, ...]


def tiny(folder: Path) -> Workload:
    """A random Qwen2 of 0.92 M parameters whose tokens are the words t0000 ... t1023."""
    config = Qwen2Config(
        vocab_size=WORDS,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    names = ("trl-grpo", "vrpo-grpo", "trl-ppo", "vrpo-ppo", "vrpo-ppo-shared", "vrpo-vrpo", "hf-generate")
    return Workload(folder / "tiny", random_weights(folder / "tiny", config, prompts=PROMPTS), 5, 6, names)


def random_weights(folder: Path, config: Any, *, prompts: int) -> Path:
    """Write a random model of this configuration, whose tokens are words like t0000, and prompts of 32 of them.

    Token 0 pads and token 1 is the end token. The prompts' file lies beside the folder.
    """
    names = [f"t{i:0{len(str(config.vocab_size - 1))}}" for i in range(config.vocab_size)]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=names[1]))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=names[0], unk_token=names[1], eos_token=names[1]
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    random = np.random.default_rng(0)
    drawn = [random.integers(2, config.vocab_size, PROMPT_TOKENS) for _ in range(prompts)]
    texts = [" ".join(names[i] for i in ids) for ids in drawn]
    return _write(folder.with_suffix(".json"), texts, tokenizer)


def smollm2(folder: Path, source: Path) -> Workload:
    """SmolLM2-135M-Instruct, read where it is, and prompts of 32 of its words. TRL's PPO has four models: left out."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    words = sorted(
        w[1:] for w in tokenizer.get_vocab() if w.startswith("Ġ") and w[1:].isalpha() and w[1:].islower()
    )
    single = [w for w in words[:4000] if len(tokenizer(f" {w} {w}")["input_ids"]) == 2]
    random = np.random.default_rng(0)
    texts = ["".join(f" {w}" for w in random.choice(single, PROMPT_TOKENS)) for _ in range(PROMPTS)]
    names = ("trl-grpo", "vrpo-grpo", "vrpo-ppo", "vrpo-vrpo", "hf-generate")
    return Workload(source, _write(folder / "smollm2.json", texts, tokenizer), 2, 2, names)


def _write(path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast) -> Path:
    lengths = {len(tokenizer(text)["input_ids"]) for text in texts}
    assert lengths == {PROMPT_TOKENS}, (
        f"prompts must have {PROMPT_TOKENS} tokens, they have {sorted(lengths)}"
    )
    path.write_text(json.dumps(texts), encoding="utf-8")
    return path
