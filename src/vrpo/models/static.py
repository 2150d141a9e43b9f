"""A Llama-like model in few kernels: prompts, and then one token a row in shapes that do not change, for CUDA graphs.

    x ──norm──> q k v ──rotate──> one column of the keys and values ──attention──> x + o ──norm──> x + down(silu(gate) up)

Decoding on a GPU is bound by launching kernels and by reading weights. Against both: products that share their input
are one product, what lies between products is compiled into one kernel each, and the products read copies of the live
weights in the compute dtype, which `refresh` makes again before every batch (a thousandth of the batch's time).
Norms, the embedding and the residual stream stay fp32, as in the trainer's pass under autocast.
"""

from collections.abc import Callable, Sequence
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vrpo.functional.fused import fused
from vrpo.models.lean import has_plain_layers
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
    return (
        has_plain_layers(backbone)
        # an adapter around the embedding adds what its weight alone does not show
        and type(backbone.embed_tokens) is nn.Embedding
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

    def read(
        self,
        ids: Int[Tensor, "P W"],
        mask: Bool[Tensor, "P W"] | None,
        turn: tuple[Float[Tensor, "P W d"], Float[Tensor, "P W d"]],
    ) -> tuple[Float[Tensor, "P D"], list[Float[Tensor, "P kv2 W d"]]]:
        """States after the last tokens of prompts, and of each layer keys and then values of the heads.

        Args:
            ids: padded on the left.
            mask: True on real tokens; None: all are.
            turn: `angles` at their positions.
        """
        prompts, width = ids.shape
        visible = None
        if mask is not None:
            causal = torch.ones(width, width, dtype=torch.bool, device=ids.device).tril()
            # padding sees itself, for a softmax over nothing is NaN
            visible = (mask[:, None] & causal | torch.eye(width, dtype=torch.bool, device=ids.device))[
                :, None
            ]
        kept: list[Tensor] = []

        def attend(parts: Tensor, scale: float) -> Tensor:
            parts = parts.view(prompts, width, -1, self.head_dim).transpose(1, 2)
            kept.append(parts[:, self.heads :])
            shared = self.heads // self.kv_heads
            keys, values = (x.repeat_interleave(shared, dim=1) for x in kept[-1].split(self.kv_heads, dim=1))
            out = F.scaled_dot_product_attention(
                parts[:, : self.heads], keys, values, attn_mask=visible, is_causal=mask is None, scale=scale
            )
            return out.transpose(1, 2).flatten(0, 1)

        states = self._layers(ids.flatten(), (turn[0].flatten(0, 1), turn[1].flatten(0, 1)), attend)
        return states.view(prompts, width, -1)[:, -1], kept

    def states(
        self,
        tokens: Int[Tensor, " R"],
        turn: tuple[Float[Tensor, "R d"], Float[Tensor, "R d"]],
        slot: Int[Tensor, "1"],
        cache: Sequence[Float[Tensor, "R kv2 S d"]],
        bias: Float[Tensor, "R S"],
    ) -> Float[Tensor, "R D"]:
        """States after the last token of each row, whose keys and values are written into the cache.

        Args:
            tokens: the last token of each row.
            turn: `angles` at its position.
            slot: the column of the cache it takes.
            cache: of each layer, keys and then values of the heads.
            bias: 0 where a column may be seen, the one in `slot` included, -inf elsewhere; in the compute dtype.
        """
        visible = bias[:, None, None].expand(-1, self.kv_heads, self.heads // self.kv_heads, -1)
        memories = iter(cache)

        def attend(parts: Tensor, scale: float) -> Tensor:
            memory = next(memories)
            memory.index_copy_(2, slot, parts[:, self.heads :, None])
            # the heads that share keys stand where more queries would
            query = parts[:, : self.heads].reshape(len(parts), self.kv_heads, -1, self.head_dim)
            keys, values = memory.split(self.kv_heads, dim=1)
            return F.scaled_dot_product_attention(query, keys, values, attn_mask=visible, scale=scale)

        return self._layers(tokens, turn, attend)

    def logits(self, states: Float[Tensor, "R D"]) -> Float[Tensor, "R V"]:
        """fp32 logits of the next token."""
        head = self._head
        return LmHead(self._head_weight, head.bias, head.softcap, head.logit_scale).logits(states)

    def _layers(
        self,
        tokens: Int[Tensor, " R"],
        turn: tuple[Tensor, Tensor],
        attend: Callable[[Tensor, float], Tensor],
    ) -> Float[Tensor, "R D"]:
        """States after the final norm; `attend` maps rotated queries, keys and values and a scale to what is read."""
        backbone, turned = self._backbone, self.heads + self.kv_heads
        x = F.embedding(tokens, backbone.embed_tokens.weight)
        delta = torch.zeros_like(x, dtype=self.dtype)
        for layer, products in zip(backbone.layers, self._products, strict=True):
            attention, norm = layer.self_attn, layer.input_layernorm
            x, h = _add_norm(x, delta, norm.weight, norm.variance_epsilon)
            parts = products["qkv"](h).view(len(h), -1, self.head_dim)
            if (norm := getattr(attention, "q_norm", None)) is not None:
                parts = _norm_heads(
                    parts, norm.weight, attention.k_norm.weight, norm.variance_epsilon, self.heads
                )
            read = attend(_rotate(parts, *turn, turned), attention.scaling).reshape(len(x), -1)
            norm = layer.post_attention_layernorm
            x, h = _add_norm(x, products["out"](read), norm.weight, norm.variance_epsilon)
            delta = products["down"](_gated(products["gate_up"](h)))
        norm = backbone.norm
        return _add_norm(x, delta, norm.weight, norm.variance_epsilon)[1]


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
    """Whether a layer adds the product of two matrices to a plain one and nothing else: DoRA and its like, or a bias of B, do."""
    return (
        hasattr(module, "get_delta_weight")
        and type(_base(module)) is nn.Linear
        and not getattr(module, "lora_variant", None)
        and not any(getattr(module, "lora_bias", {}).values())
    )


def _base(layer: Any) -> Any:
    """The plain linear layer below a LoRA layer; a plain one itself."""
    return getattr(layer, "base_layer", layer)
