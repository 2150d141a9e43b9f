"""One token a row of a Llama-like model with shapes that do not change, so that a CUDA graph can replay it.

    x ──norm──> q k v ──rotate──> one column of the keys and values ──attention──> x + o ──norm──> x + down(silu(gate) up)

Decoding on a GPU is bound by launching kernels and by reading weights. Against both: products that share their input
are one product, what lies between products is compiled into one kernel each, and the products read copies of the live
weights in the compute dtype, which `refresh` makes again before every batch (a thousandth of the batch's time).
Norms, the embedding and the residual stream stay fp32, as in the trainer's pass under autocast.
"""

from collections.abc import Sequence
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from vrpo.functional.fused import fused
from vrpo.models.lean import ARCHITECTURES
from vrpo.models.lm_head import LmHead

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose angles depend on the position alone."""

PRODUCTS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""Products of a layer, and the linear layers whose outputs each gives side by side."""


def is_static(backbone: Any) -> bool:
    """Whether `StaticModel` can run this backbone: Llama, Qwen 2 or 3 with plain or LoRA layers, nothing windowed."""
    if type(backbone) not in ARCHITECTURES:
        return False
    config = backbone.config
    return (
        config.hidden_act == "silu"
        and {"full_attention"} >= set(getattr(config, "layer_types", None) or ["full_attention"])
        and getattr(backbone.rotary_emb, "rope_type", None) in ROPE_TYPES
        and all(
            type(module) is nn.Linear or _is_lora(module)
            for layer in backbone.layers
            for names in PRODUCTS.values()
            for module in map(layer.get_submodule, names)
        )
    )


@final
class Product:
    """x W^T + b of linear layers that share their input, in the compute dtype; W and b are copies of theirs.

    Args:
        layers: linear layers, plain or with a LoRA adapter, which is merged into the copy.
        dtype: of the copies.
    """

    def __init__(self, layers: Sequence[Any], dtype: torch.dtype) -> None:
        self._layers = layers
        weights = [_base(layer).weight for layer in layers]
        self.weight = torch.empty(
            sum(len(w) for w in weights), weights[0].shape[1], dtype=dtype, device=weights[0].device
        )
        biased = _base(layers[0]).bias is not None
        self.bias = self.weight.new_empty(len(self.weight)) if biased else None

    def refresh(self) -> None:
        """Copy the live weights."""
        start = 0
        for layer in self._layers:
            base = _base(layer)
            here = slice(start, start + len(base.weight))
            self.weight[here] = base.weight
            for name in getattr(layer, "active_adapters", ()):
                self.weight[here] += layer.get_delta_weight(name)
            if self.bias is not None:
                self.bias[here] = base.bias
            start = here.stop

    def __call__(self, x: Float[Tensor, "R i"]) -> Float[Tensor, "R o"]:
        """The product."""
        return F.linear(x, self.weight, self.bias)


@final
class StaticModel:
    """Backbone and head, one token a row at a time, over key-value buffers that the caller owns.

    Args:
        backbone: one that `is_static` accepts.
        head: its language-model head.
        dtype: of the products and the keys and values.
    """

    def __init__(self, backbone: Any, head: LmHead, dtype: torch.dtype) -> None:
        self._backbone = backbone
        self._head = head
        self._head_weight = torch.empty_like(head.weight, dtype=dtype, requires_grad=False)
        config = backbone.config
        self.dtype = dtype
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = int(backbone.layers[0].self_attn.head_dim)
        self.num_layers = len(backbone.layers)
        self._products = [
            {name: Product([*map(layer.get_submodule, names)], dtype) for name, names in PRODUCTS.items()}
            for layer in backbone.layers
        ]

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the live weights; call it before every batch of responses."""
        for products in self._products:
            for product in products.values():
                product.refresh()
        self._head_weight.copy_(self._head.weight)

    def angles(self, length: int) -> tuple[Float[Tensor, "S d"], Float[Tensor, "S d"]]:
        """Cosines and signed sines of the rotary embedding at positions 0 ... length - 1.

        x cos + rotate_half(x) sin, with rotate_half a roll by half the width and the sign moved into the sine.
        """
        norm = self._backbone.norm.weight
        positions = torch.arange(length, device=norm.device)[None]
        cos, sin = self._backbone.rotary_emb(norm.new_zeros(1, 1, 1), positions)
        half = sin.shape[-1] // 2
        return cos[0], torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=-1)

    def states(
        self,
        tokens: Int[Tensor, " R"],
        turn: tuple[Float[Tensor, "R d"], Float[Tensor, "R d"]],
        slot: Int[Tensor, "1"],
        cache: Sequence[Float[Tensor, "R kv2 S d"]],
        bias: Float[Tensor, "R S"],
    ) -> Float[Tensor, "R D"]:
        """States after the final norm; the token's keys and values are written into the cache.

        Args:
            tokens: the last token of each row.
            turn: `angles` at its position.
            slot: the column of the cache it takes.
            cache: of each layer, keys and then values of the heads.
            bias: 0 where a column may be seen, the one in `slot` included, -inf elsewhere; in the compute dtype.
        """
        backbone = self._backbone
        x = F.embedding(tokens, backbone.embed_tokens.weight)
        visible = bias[:, None, None].expand(-1, self.kv_heads, self.heads // self.kv_heads, -1)
        delta = torch.zeros_like(x, dtype=self.dtype)
        for layer, products, memory in zip(backbone.layers, self._products, cache, strict=True):
            norm = layer.input_layernorm
            x, h = _add_norm(x, delta, norm.weight, norm.variance_epsilon)
            read = self._attend(layer.self_attn, products["qkv"](h), turn, (memory, slot), visible)
            norm = layer.post_attention_layernorm
            x, h = _add_norm(x, products["out"](read), norm.weight, norm.variance_epsilon)
            delta = products["down"](_gated(products["gate_up"](h)))
        norm = backbone.norm
        return _add_norm(x, delta, norm.weight, norm.variance_epsilon)[1]

    def logits(self, states: Float[Tensor, "R D"]) -> Float[Tensor, "R V"]:
        """fp32 logits of the next token."""
        head = self._head
        return LmHead(self._head_weight, head.bias, head.softcap, head.logit_scale).logits(states)

    def _attend(
        self,
        attention: Any,
        qkv: Tensor,
        turn: tuple[Tensor, Tensor],
        place: tuple[Tensor, Tensor],
        visible: Tensor,
    ) -> Float[Tensor, "R hd"]:
        parts = qkv.view(len(qkv), -1, self.head_dim)
        turned = self.heads + self.kv_heads
        if (norm := getattr(attention, "q_norm", None)) is not None:
            parts = _norm_heads(
                parts, norm.weight, attention.k_norm.weight, norm.variance_epsilon, self.heads
            )
        parts = _rotate(parts, *turn, turned)
        memory, slot = place
        memory.index_copy_(2, slot, parts[:, self.heads :, None])
        # the heads that share keys stand where more queries would
        query = parts[:, : self.heads].reshape(len(parts), self.kv_heads, -1, self.head_dim)
        keys, values = memory[:, : self.kv_heads], memory[:, self.kv_heads :]
        out = F.scaled_dot_product_attention(query, keys, values, attn_mask=visible, scale=attention.scaling)
        return out.reshape(len(parts), -1)


@fused
def _add_norm(x: Tensor, delta: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """x + delta in fp32, and its RMS norm in the dtype of delta."""
    x = x + delta
    return x, F.rms_norm(x, x.shape[-1:], weight, epsilon).to(delta.dtype)


@fused
def _norm_heads(parts: Tensor, query: Tensor, key: Tensor, epsilon: float, heads: int) -> Tensor:
    """The RMS norms of Qwen 3 on queries and keys; values stay."""
    width, keys = parts.shape[-1:], (parts.shape[1] - heads) // 2
    wide = parts.float()
    q = F.rms_norm(wide[:, :heads], width, query, epsilon)
    k = F.rms_norm(wide[:, heads : heads + keys], width, key, epsilon)
    return torch.cat([q, k, wide[:, heads + keys :]], dim=1).to(parts.dtype)


@fused
def _rotate(parts: Tensor, cos: Tensor, sin: Tensor, turned: int) -> Tensor:
    """Rotary embedding of the first `turned` heads (queries and keys), in fp32; the others (values) stay."""
    x = parts[:, :turned].float()
    x = x * cos[:, None] + x.roll(x.shape[-1] // 2, dims=-1) * sin[:, None]
    return torch.cat([x.to(parts.dtype), parts[:, turned:]], dim=1)


@fused
def _gated(gate_up: Tensor) -> Tensor:
    """silu(gate) up."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _is_lora(module: Any) -> bool:
    return hasattr(module, "get_delta_weight") and type(_base(module)) is nn.Linear


def _base(layer: Any) -> Any:
    """The plain linear layer below a LoRA layer; a plain one itself."""
    return getattr(layer, "base_layer", layer)
