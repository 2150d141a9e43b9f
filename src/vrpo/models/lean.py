"""One token of a Llama-like model in about twenty tensor operations a layer, on the live weights.

    x ──norm──> q, k, v ──rotate──> keys and values into the cache ──attention──> x + o ──norm──> x + down(silu(gate) up)

On a small model most of a step of `transformers` is spent between the matrix products: modules, masks, copies.
The sampler reads the prompts with the model itself and takes
this for the tokens after them, where `is_lean` knows the architecture.
"""

from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import LlamaModel, Qwen2Model, Qwen3Model

ARCHITECTURES = (LlamaModel, Qwen2Model, Qwen3Model)
"""Backbones whose layers are the ones drawn above; SmolLM is a Llama."""


def has_plain_layers(backbone: Any) -> bool:
    """Whether a backbone's layers are the ones drawn above: its architecture, its activation, and no window on what they see."""
    if type(backbone) not in ARCHITECTURES:
        return False
    config = backbone.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return config.hidden_act == "silu" and kinds <= {"full_attention"}


def is_lean(backbone: Any) -> bool:
    """Whether `LeanModel` can run this backbone: layers it knows, with nothing wrapped around them."""
    return has_plain_layers(backbone) and all(
        type(module) is nn.Linear
        for layer in backbone.layers
        for name, module in layer.named_modules()
        if name.endswith("_proj")
    )


@final
class LeanModel:
    """The backbone, one token a row at a time.

    Args:
        backbone: one that `is_lean` accepts.
    """

    def __init__(self, backbone: Any) -> None:
        self._backbone = backbone
        config = backbone.config
        self._heads = config.num_attention_heads
        self._kv_heads = config.num_key_value_heads

    def __call__(
        self, tokens: Int[Tensor, " A"], positions: Int[Tensor, " A"], past: Any
    ) -> Float[Tensor, "A d"]:
        """States after the final norm.

        Args:
            tokens: the last token of each row.
            positions: its position among the row's real tokens.
            past: what the rows have read so far (`LookBack`); the token is added to it.
        """
        backbone = self._backbone
        x = backbone.embed_tokens(tokens)
        cos, sin = backbone.rotary_emb(x[:, None], positions[:, None])
        # x cos + rotate_half(x) sin, with rotate_half a roll by half the width and the sign moved into the sine
        half = sin.shape[-1] // 2
        turn = cos, torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
        for number, layer in enumerate(backbone.layers):
            attention, norm = layer.self_attn, layer.input_layernorm
            read = self._attend(attention, _rms_norm(x, norm), turn, past, number)
            x = x + attention.o_proj(read)
            h, mlp = _rms_norm(x, layer.post_attention_layernorm), layer.mlp
            x = x + mlp.down_proj(F.silu(mlp.gate_proj(h)) * mlp.up_proj(h))
        return _rms_norm(x, backbone.norm)

    def _attend(
        self, attention: Any, h: Tensor, turn: tuple[Tensor, Tensor], past: Any, number: int
    ) -> Float[Tensor, "A hd"]:
        rows, cos, sin = len(h), *turn
        query = attention.q_proj(h).view(rows, self._heads, -1)
        key = attention.k_proj(h).view(rows, self._kv_heads, -1)
        if (norm := getattr(attention, "q_norm", None)) is not None:
            query, key = _rms_norm(query, norm), _rms_norm(key, attention.k_norm)
        both = torch.cat([query, key], dim=1)
        both = (both * cos).addcmul_(both.roll(cos.shape[-1] // 2, dims=-1), sin)
        query, key = both.split([self._heads, self._kv_heads], dim=1)
        value = attention.v_proj(h).view(rows, self._kv_heads, -1)
        grouped = query.reshape(rows, self._kv_heads, -1, query.shape[-1])
        out = past.attend(number, grouped, key.to(value.dtype), value, scale=attention.scaling)
        return out.reshape(rows, -1)


def _rms_norm(x: Tensor, norm: Any) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)
