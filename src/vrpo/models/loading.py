"""From a configuration to tokenizer and policy; whatever is wrong with the model is said in one line."""

import copy
import importlib.resources
import json
import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from vrpo.config.run import LoraConfig, ModelConfig
from vrpo.errors import ModelError
from vrpo.models.accepted import check_model
from vrpo.models.depth import keep_layers
from vrpo.models.policy import Policy
from vrpo.rng import stream_seed

log = logging.getLogger(__name__)

PACKAGED = ("vrpo:tiny", "vrpo:chain", "vrpo:minus", "vrpo:science")
"""Names of the small character-level models that the package ships, each warm-started for a recipe."""

ADAPTER_FILE = "adapter_config.json"
TOKENIZER_FILE = "tokenizer_config.json"


def resolve_path(path: str) -> str:
    """The folder or hub name that `from_pretrained` takes.

    Raises:
        ModelError: `path` is neither a folder nor shaped like a hub name.
    """
    if path.startswith("vrpo:"):
        if path not in PACKAGED:
            raise ModelError(
                f"model.path={path!r} is not in the package; packaged models are {', '.join(PACKAGED)}"
            )
        folder = Path(str(importlib.resources.files("vrpo"))) / "assets" / path.removeprefix("vrpo:")
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"{path!r} is missing from this installation ({folder}); reinstall vrpo, or build an untrained one "
                "with `python -m vrpo.models.tiny FOLDER`"
            )
        return str(folder)
    # not `Path.expanduser`, which raises for the home of nobody
    folder = Path(os.path.expanduser(path))
    if folder.is_dir():
        if not any((folder / name).is_file() for name in ("config.json", ADAPTER_FILE)):
            mend = "the folder that holds the model's files" if path else "processing_class= beside the model"
            raise ModelError(f"{path!r} holds no config.json; give {mend}")
        return str(folder)
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path):
        raise ModelError(
            f"there is no model folder {path!r}; give an existing folder or a hub name owner/model"
        )
    return path


def resolve_device(config: ModelConfig) -> torch.device:
    """The device of `model.device`; auto is CUDA when torch sees one."""
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise ModelError("model.device=cuda, but torch sees no CUDA device; use `auto` or `cpu`")
    return torch.device("cuda" if available and config.device != "cpu" else "cpu")


def resolve_dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    """Precision of forward passes; `auto` is bfloat16 on CUDA and float32 on CPU."""
    match config.dtype:
        case "float32":
            return torch.float32
        case "bfloat16":
            return torch.bfloat16
        case "auto":
            return torch.bfloat16 if device.type == "cuda" else torch.float32


def load_tokenizer(config: ModelConfig) -> Any:
    """The model's tokenizer, with an end token, and with a padding token that is the end token if need be.

    That of an adapter folder is the one saved in it, or else its base model's.
    Sharing the two is safe here: padding is told by attention masks, never by a token id.

    Raises:
        ModelError: it cannot be loaded or has no end token.
    """
    path = resolve_path(config.path)
    if not (Path(path) / TOKENIZER_FILE).is_file():
        path = adapter_base(path) or path
    with _one_line(config.path, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=config.trust_remote_code)
    return checked_tokenizer(tokenizer, config.path)


def checked_tokenizer(tokenizer: Any, name: str) -> Any:
    """The tokenizer itself, if a response can end in it; its padding token is set where it has none."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ModelError(
            f"the tokenizer of {name!r} is a {type(tokenizer).__name__}, one of transformers is needed; load it with "
            "AutoTokenizer.from_pretrained"
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of {name!r} has no EOS token, so no response could end; set `eos_token` in its "
            "tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_policy(config: ModelConfig, *, seed: int = 0, tokenizer: Any = None) -> Policy:
    """The model of `config` with fp32 weights on its device, ready to be trained.

    A folder written by a LoRA run (with adapter_config.json) opens as its base model with that adapter, which is
    trained further; `lora` must then be unset, or of its rank and alpha.

    Args:
        config: the model section.
        seed: root of the stream from which a fresh adapter's weights are drawn; not read without `lora`.
        tokenizer: in place of the model's own.

    Raises:
        ModelError: it cannot be loaded, lacks weights, or does not fit its tokenizer.
    """
    path = resolve_path(config.path)
    base = adapter_base(path)
    tokenizer = load_tokenizer(config) if tokenizer is None else tokenizer
    model = load_pretrained(
        AutoModelForCausalLM, base or path, name=config.path, trust_remote_code=config.trust_remote_code
    )
    if base is not None:
        model = open_adapter(model, path)
    return policy_from_model(model, tokenizer, config=config, seed=seed)


def policy_from_model(model: Any, tokenizer: Any, *, config: ModelConfig, seed: int = 0) -> Policy:
    """A policy around a model object. The object itself is trained: moved to the device and to fp32 weights.

    Args:
        model: a causal language model of `transformers`, or a `peft` model around one with a LoRA adapter, which
            is trained further; `config.lora` must then be unset, or of its rank and alpha.
        tokenizer: its tokenizer.
        config: device, dtype and LoRA settings; `path` is only a name for messages.
        seed: as in `load_policy`.
    """
    from peft import PeftModel

    tokenizer = checked_tokenizer(tokenizer, config.path)
    check_model(model, tokenizer, config.path)
    if isinstance(model, PeftModel):
        _check_adapter(model, config)
    model = model.float()
    fresh = None if isinstance(model, PeftModel) else config.lora
    if fresh is not None:
        model = add_adapter(model, fresh, task_type="CAUSAL_LM", seed=stream_seed(seed, "policy-adapter"))
    device = resolve_device(config)
    return Policy(
        model.to(device),
        tokenizer,
        compute_dtype=resolve_dtype(config, device),
        adapter=isinstance(model, PeftModel),
        base_is_initial=fresh is not None,
    )


def load_pretrained(
    auto_class: Any, path: str, *, name: str, trust_remote_code: bool, config: Any = None
) -> Any:
    """`auto_class.from_pretrained` with fp32 weights from safetensors, complete or not at all.

    Args:
        auto_class: what opens it.
        path: folder or hub name.
        name: the same as the user wrote it.
        trust_remote_code: run Python files of the model's folder.
        config: the model's configuration; None reads that of `path`.
    """
    options: dict[str, Any] = {} if config is None else {"config": config}
    options |= {
        "dtype": torch.float32,
        "use_safetensors": True,
        "trust_remote_code": trust_remote_code,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # told below, with the names
    }
    with _one_line(name, "model"), seeded(0), _no_report():
        try:
            model, info = auto_class.from_pretrained(path, attn_implementation="sdpa", **options)
        except ValueError as error:
            if "scaled_dot_product_attention" not in str(error):
                raise
            log.info("%s does not support SDPA attention; using its own implementation", name)
            model, info = auto_class.from_pretrained(path, **options)
    if info["mismatched_keys"]:
        key, stored, wanted = min(info["mismatched_keys"])
        raise ModelError(
            f"{name!r} stores {key!r} as {list(stored)}, its config.json asks for {list(wanted)}; give a folder whose "
            "config.json belongs to its weights"
        )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ModelError(
            f"{name!r} lacks {len(missing)} weights of a {type(model).__name__}, such as {missing[0]!r}; give a "
            "folder saved from a causal language model"
        )
    return model


def load_backbone(path: str, *, trust_remote_code: bool, layers: int | None = None) -> tuple[Any, bool]:
    """The backbone (no language-model head) of a folder or hub model, and whether it carries an adapter.

    Args:
        path: the folder or hub name.
        trust_remote_code: run Python files of the model's folder.
        layers: how many of an adapter's base model it was made for; None: all.
    """
    resolved = resolve_path(path)
    base = adapter_base(resolved)
    backbone = load_pretrained(AutoModel, base or resolved, name=path, trust_remote_code=trust_remote_code)
    if base is None:
        return backbone, False
    if layers is not None:
        keep_layers(backbone, layers)
    return open_adapter(backbone, resolved), True


def add_adapter(model: Any, lora: LoraConfig, *, task_type: str, seed: int) -> nn.Module:
    """The model with a fresh LoRA adapter (its output is unchanged until the adapter learns)."""
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    settings = PeftLoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, lora_dropout=0.0, task_type=task_type
    )
    try:
        with seeded(seed), peft_warnings():
            return get_peft_model(model, settings)
    except ValueError as error:
        raise ModelError(
            f"model.lora.target_modules={targets!r} does not fit {type(model).__name__}: {_first_line(error)}; name "
            "linear layers of the model or use all-linear"
        ) from error


def open_adapter(model: Any, folder: str) -> nn.Module:
    """The model with the adapter saved in `folder`, trainable."""
    from peft import PeftModel

    with _one_line(folder, "adapter"), seeded(0), peft_warnings():
        # a policy's adapter does not fit a backbone: peft would warn and go on with a fresh one
        warnings.filterwarnings("error", message="Found missing adapter keys")
        return PeftModel.from_pretrained(model, folder, is_trainable=True)


def copy_adapter(backbone: nn.Module, model: Any) -> nn.Module:
    """`backbone` with a trainable copy of the adapter of `model`: same settings, same weights.

    Args:
        backbone: the model below the language-model head, without adapter.
        model: a `PeftModel` around the same layers and a language-model head.

    Raises:
        ModelError: the adapter names its layers by their place below the head's model.
    """
    from peft import get_peft_model

    settings = copy.deepcopy(model.active_peft_config)
    settings.task_type, settings.inference_mode = "FEATURE_EXTRACTION", False
    settings.base_model_name_or_path = None  # set anew from the backbone
    if not isinstance(
        settings.target_modules, str
    ):  # whole names, as peft writes "all-linear" on a model of few layers
        prefix = f"{model.get_base_model().base_model_prefix}."
        settings.target_modules = {name.removeprefix(prefix) for name in settings.target_modules}
    try:
        with seeded(0), peft_warnings():
            copied = get_peft_model(backbone, settings)
        copied.get_base_model().load_state_dict(model.get_base_model().base_model.state_dict())
    except (ValueError, RuntimeError) as error:
        raise ModelError(
            f"the critic cannot take over the policy's adapter on {settings.target_modules!r:.80}: "
            f"{_first_line(error)}; merge the adapter into the policy (merge_and_unload) and set model.lora"
        ) from error
    return copied


def _check_adapter(model: Any, config: ModelConfig) -> None:
    """One LoRA adapter, the one asked for, under peft's usual name: what is saved in one folder, and what a critic can copy."""
    found = {name: str(settings.peft_type.value) for name, settings in model.peft_config.items()}
    if found != {"default": "LORA"}:
        raise ModelError(
            f"the model carries the adapters {found}, one LoRA adapter named 'default' is needed; merge them "
            "(merge_and_unload) and set model.lora"
        )
    check_rank(model, config.lora, config.path)


def check_rank(model: Any, asked: LoraConfig | None, path: str) -> None:
    """Refuse to go on with an adapter of another rank or alpha than the one asked for, if one is."""
    has = model.peft_config["default"]
    if asked is not None and (has.r, has.lora_alpha) != (asked.rank, asked.alpha):
        raise ModelError(
            f"model.lora asks for rank {asked.rank} and alpha {asked.alpha}, but {path!r} has an adapter of rank {has.r} and "
            f"alpha {has.lora_alpha}, which is trained further; leave model.lora out, or merge the adapter"
        )
    wanted = None if asked is None else asked.target_modules
    if wanted not in (None, LoraConfig().target_modules) and _names(wanted) != _names(has.target_modules):
        raise ModelError(
            f"model.lora.target_modules={wanted!r:.80}, but {path!r} has an adapter on {sorted(_names(has.target_modules))!r:.80}, which is "
            "trained further; leave model.lora out, or merge the adapter"
        )


def _names(targets: Any) -> set[str]:
    return {targets} if isinstance(targets, str) else set(targets or ())


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run initialisers that read torch's global CPU generator, and leave that generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@contextmanager
def _no_report() -> Iterator[None]:
    """Hide the table of missing and mismatched weights: `load_pretrained` says it in one line."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


@contextmanager
def peft_warnings() -> Iterator[None]:
    """Hide one message that no user of this package can act on: peft reads a name that transformers renamed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        yield


def adapter_base(path: str) -> str | None:
    """The base model that an adapter folder names; None for any other folder or a hub name."""
    file = Path(path) / ADAPTER_FILE
    if not file.is_file():
        return None
    try:
        base = json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{file} does not name a base model; save the adapter again with peft") from error
    if not isinstance(base, str):
        raise ModelError(f"{file} names {base!r:.60} as its base model; save the adapter again with peft")
    return resolve_path(base)


@contextmanager
def _one_line(name: str, what: str) -> Iterator[None]:
    """Turn the errors of `from_pretrained` into one line."""
    try:
        yield
    # A damaged folder raises whatever its reader stumbles over: OSError, KeyError, TypeError, SafetensorError, ...
    except Exception as error:
        raise ModelError(
            f"cannot load the {what} of {name!r}: {_first_line(error)}; give a folder with config.json, tokenizer and "
            ".safetensors files, or a hub name that is reachable or downloaded"
        ) from error


def _first_line(error: Exception) -> str:
    # some libraries put their own class on the first line and the reason below it
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:300].rstrip(".;:") or type(error).__name__
