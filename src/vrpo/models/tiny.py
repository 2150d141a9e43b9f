"""A random-weight character-level Llama of 0.34 M parameters, small enough for tests and laptops.

    python -m vrpo.models.tiny FOLDER

The folder is an ordinary one: `AutoModelForCausalLM` and `AutoTokenizer` open it. Every printable ASCII character
is one token; a warm start (`vrpo sft`) teaches it something. `vrpo:tiny` is such a model after a warm start.
"""

import argparse
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from vrpo.models.loading import seeded
from vrpo.rng import stream_seed

PAD, BOS, EOS, UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"
CHARACTERS = "\n" + "".join(map(chr, range(ord(" "), ord("~") + 1)))
"""Newline and the 95 printable ASCII characters."""

MAX_POSITIONS = 128


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, none added; decoding gives the text back exactly."""
    vocabulary = {token: i for i, token in enumerate([PAD, BOS, EOS, UNKNOWN, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITIONS,
    )


def tiny_config(tokenizer: Any) -> LlamaConfig:
    """Three layers of width 96 with tied embeddings: 0.34 M parameters, 1.4 MB in fp32."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def build_tiny(folder: str | Path, *, seed: int) -> Path:
    """Write the model with weights drawn from the stream (seed, "tiny") and its tokenizer."""
    tokenizer = tiny_tokenizer()
    with seeded(stream_seed(seed, "tiny")):
        model = LlamaForCausalLM(tiny_config(tokenizer))
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return Path(folder)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m vrpo.models.tiny", description="Build a tiny untrained model."
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(f"wrote {build_tiny(arguments.folder, seed=arguments.seed)}")


if __name__ == "__main__":
    main()
