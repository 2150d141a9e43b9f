"""A model's shape, read from its config.json: what memory and time depend on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from vrpo.config import Config
from vrpo.config.learning import PpoConfig
from vrpo.errors import ModelError
from vrpo.models.lean import has_plain_layers
from vrpo.models.loading import adapter_base, resolve_path


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What memory and time depend on."""

    parameters: int
    embedding: int
    """Vocabulary x hidden size: one head's weights."""
    layers: int
    hidden: int
    feed_forward: int
    """Width of the feed-forward part."""
    vocabulary: int
    query_width: int
    """Numbers of a token's queries, per layer: heads * head size."""
    kv_width: int
    """Numbers a token adds to each of K and V, per layer."""
    tied: bool
    """Whether embedding and head are the same weights."""
    lean: bool
    """Whether its layers are ones that the lean one-token step knows."""

    def of_depth(self, layers: int | None) -> int:
        """Parameters of the backbone, without the head, when it keeps the lowest `layers` layers; None: all."""
        backbone = self.parameters - (0 if self.tied else self.embedding)
        share = 1.0 if layers is None else min(layers / self.layers, 1.0)
        return int(self.embedding + (backbone - self.embedding) * share)


def read_shape(config: Config, model_config: Path | None) -> ModelShape:
    """The model's shape from its config.json, without its weights.

    Raises:
        ModelError: the config.json cannot be read, or is of no causal language model with attention.
    """
    if model_config is None and config.model is None:
        raise ModelError("the configuration names no model; add model.path, or give --model-config FILE")
    if model_config is not None and not model_config.exists():
        # transformers would ask the hub for a model of that name
        raise ModelError(
            f"--model-config: there is no {str(model_config)!r}; give a model's config.json, or its folder"
        )
    source = str(model_config) if model_config or config.model is None else resolve_path(config.model.path)
    source = adapter_base(source) or source
    trusted = config.model is not None and config.model.trust_remote_code
    try:
        hf: Any = AutoConfig.from_pretrained(source, trust_remote_code=trusted).get_text_config()
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(hf, trust_remote_code=trusted)
        heads = hf.num_attention_heads
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(
            f"{source} does not describe an attention language model ({str(error).splitlines()[0]}); give --model-config FILE"
        ) from error
    kv_heads = getattr(hf, "num_key_value_heads", None) or heads
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // heads
    return ModelShape(
        parameters=sum(p.numel() for p in model.parameters()),
        embedding=hf.vocab_size * hf.hidden_size,
        layers=hf.num_hidden_layers,
        hidden=hf.hidden_size,
        feed_forward=getattr(hf, "intermediate_size", None) or 4 * hf.hidden_size,
        vocabulary=hf.vocab_size,
        query_width=heads * head_dim,
        kv_width=kv_heads * head_dim,
        tied=bool(getattr(hf, "tie_word_embeddings", False)),
        lean=has_plain_layers(model.base_model),
    )


def adapter_parameters(config: Config, shape: ModelShape) -> int | None:
    """Trained numbers of a low-rank adapter; None when all weights are trained."""
    lora = config.model.lora if config.model else None
    # an adapter adds rank * (in + out) to each of about seven linear layers of width ~hidden
    return None if lora is None else 14 * lora.rank * shape.hidden * shape.layers


def sampler_reads_trunk(config: Config) -> bool:
    """Whether the states the sampler chose tokens by are all the critic needs: it borrows the trunk, and no value after the last token
    is asked for."""
    borrowed = config.critic is not None and config.critic.trunk == "policy"
    return borrowed and config.algorithm.truncation != "bootstrap"


def uses_reference(config: Config) -> bool:
    """Whether the frozen initial model takes part."""
    semantic = config.critic.semantic if config.critic is not None else None
    by_critic = semantic is not None and (
        semantic.mode == "kl_ref" or (semantic.mode == "literal" and semantic.selector == "reference")
    )
    by_critic |= config.critic is not None and config.critic.features == "uncertainty"
    return config.algorithm.kl_coef > 0 or (isinstance(config.algorithm, PpoConfig) and by_critic)
