"""The value model: its own copy of the backbone, a value head, and the frozen language-model head.

    V(s_t) = Head(Backbone(x_<=t))        read at the position before token t exists

With `trunk: policy` the backbone is the policy's own, detached, and only the head belongs to the critic.

The frozen head turns the value features into token distributions for the semantic losses; it is a buffer,
never a parameter, so no optimizer can move it. On disk a critic is an ordinary backbone folder with two more files,
`value_head.safetensors` and `value_head.json`.
"""

import copy
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vrpo.config.learning import CriticConfig
from vrpo.config.run import LoraConfig
from vrpo.errors import ModelError
from vrpo.functional import RewardUnits, reward_units
from vrpo.models.backbone import context_length, shared_limit, spread, states_at, within
from vrpo.models.depth import keep_layers
from vrpo.models.head_files import HEAD_SETTINGS, load_head, save_head, saved_settings
from vrpo.models.heads import HeadOutput, InformedHead, ValueHead, build_head
from vrpo.models.loading import add_adapter, check_rank, copy_adapter, load_backbone, resolve_path
from vrpo.models.policy import Policy, frozen_head
from vrpo.rng import stream_seed
from vrpo.types import SharedPrompts


@final
class Critic(nn.Module):
    """Hidden states to values. Like the policy's model, the backbone always stays in eval mode (no dropout).

    Args:
        backbone: a `transformers` model without language-model head, or a `peft` model around one; fp32.
        head: the value head.
        lm_head: [V, d] frozen clone of the policy's initial head; None when no semantic loss reads it.
        compute_dtype: precision of the backbone's forward pass; head and values are fp32.
        adapter: `backbone` is a `PeftModel`; then only its adapter and the head are trained and saved.
        borrowed: `backbone` belongs to the policy: read without gradient, not trained and not saved.
    """

    def __init__(
        self,
        backbone: Any,
        head: ValueHead,
        lm_head: Tensor | None,
        *,
        compute_dtype: torch.dtype,
        adapter: bool,
        borrowed: bool = False,
    ) -> None:
        super().__init__()
        self.backbone: Any = None if borrowed else backbone
        self._lender = (
            (backbone,) if borrowed else ()
        )  # in a tuple, which hides its weights from parameters()
        self.head = head
        self.units: RewardUnits | None = None
        """Of what the head gives; None, until rewards are known: as they are."""
        self.compute_dtype = compute_dtype
        self.adapter = adapter
        # not persistent: it is the initial policy's, which every run can load again
        self.register_buffer("_lm_head", lm_head, persistent=False)
        self.train(False)
        vocabulary = self.features.get_input_embeddings().weight.shape[0]
        self.shared_limit = shared_limit(self.features, vocabulary=vocabulary)

    @property
    def features(self) -> Any:
        """The `transformers` model that is read; its layers carry the adapter, where there is one."""
        if self._lender:
            return self._lender[0]
        return self.backbone.get_base_model() if self.adapter else self.backbone

    @classmethod
    def from_policy(
        cls,
        policy: Policy,
        config: CriticConfig,
        *,
        seed: int,
        lora: LoraConfig | None = None,
        trust_remote_code: bool = False,
    ) -> "Critic":
        """A new critic: the policy's backbone, or that of `config.path`, and a fresh or saved head.

        Call it before the policy is trained: backbone and frozen head are copies of its weights as they are now.
        Below a fresh adapter that is the base model, and the critic gets a fresh adapter of its own; an adapter
        that was trained before goes on in the critic as a copy.

        Args:
            policy: the initial policy.
            config: the critic section.
            seed: root of the streams "critic-head" and "critic-adapter".
            lora: settings of a fresh adapter (the model section's); None trains all of a backbone from
                `config.path`. Where that has an adapter to go on with, it must have this rank and alpha.
            trust_remote_code: as in the model section, for `config.path`.

        Raises:
            ModelError: `config.path` cannot be loaded, or does not fit the policy or `config.head`; a semantic
                loss is asked for and the policy has no plain linear head; or a fresh adapter lacks settings.
        """
        if config.semantic.mode != "off" and not policy.runs_head_alone:
            raise ModelError(
                f"critic.semantic.mode={config.semantic.mode} reads the language-model head as one matrix, which that of "
                f"{type(policy.causal_lm).__name__} is not; set `critic.semantic.mode: off`"
            )
        if config.trunk == "policy":
            return cls._borrowing(policy, config, seed)
        folder = None if config.path is None else Path(resolve_path(config.path))
        saved = folder if folder is not None and (folder / HEAD_SETTINGS).is_file() else None
        layers = None if saved is None else saved_settings(saved).get("layers")
        if None not in (layers, config.layers) and layers != config.layers:
            raise ModelError(
                f"critic.layers={config.layers}, but the head in {str(saved)!r} was trained on the states of layer {layers}; set "
                f"critic.layers: {layers} or null"
            )
        if config.path is not None:
            backbone, adapter = load_backbone(config.path, trust_remote_code=trust_remote_code, layers=layers)
            if adapter:
                check_rank(backbone, lora, config.path)
        elif policy.base_is_initial and lora is None:
            raise ModelError(
                "the policy has a fresh adapter and the critic's has no settings; give lora=, those of model.lora"
            )
        else:
            backbone, adapter = _copy_of_backbone(policy)
        if config.layers not in (None, backbone.config.get_text_config(decoder=True).num_hidden_layers):
            if adapter:
                raise ModelError(
                    f"critic.layers={config.layers} cannot shorten a model that has a trained adapter; set critic.layers: null, "
                    "or start from a model with the adapter merged"
                )
            keep_layers(backbone, config.layers)
        if lora is not None and not adapter:
            backbone = add_adapter(
                backbone, lora, task_type="FEATURE_EXTRACTION", seed=stream_seed(seed, "critic-adapter")
            )
            adapter = True
        width = _hidden_size(backbone)
        head = _fresh_head(config, width, seed)
        units = None if saved is None else load_head(head, saved)
        lm_head = None if config.semantic.mode == "off" else frozen_head(policy)
        _check_fit(config, policy, backbone, width, lm_head)
        critic = cls(backbone, head, lm_head, compute_dtype=policy.compute_dtype, adapter=adapter)
        critic.units = units
        return critic.to(policy.device)

    @classmethod
    def _borrowing(cls, policy: Policy, config: CriticConfig, seed: int) -> "Critic":
        """A head on the live policy's hidden states."""
        head = _fresh_head(config, _hidden_size(policy.backbone), seed)
        critic = cls(
            policy.backbone, head, None, compute_dtype=policy.compute_dtype, adapter=False, borrowed=True
        )
        return critic.to(policy.device)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, policy: Policy, config: CriticConfig, *, trust_remote_code: bool = False
    ) -> "Critic":
        """The critic saved in `folder`, bit for bit.

        Args:
            folder: written by `save_pretrained`.
            policy: the *initial* policy: the frozen head is taken from it. With `trunk: policy` the policy saved beside it, whose states
                the head reads.
            config: the critic section; `path` is not read.
            trust_remote_code: as in the model section.

        Raises:
            ModelError: the folder holds no value head, or another one than `config.head`.
        """
        if not (Path(folder).expanduser() / HEAD_SETTINGS).is_file():
            raise ModelError(f"{str(folder)!r} holds no {HEAD_SETTINGS}; give a folder written by a critic")
        if config.trunk == "policy":
            critic = cls._borrowing(policy, config, 0)
            critic.units = load_head(critic.head, Path(folder).expanduser())
            return critic
        config = config.model_copy(update={"path": str(folder)})
        # the seed draws a head that the saved one then replaces
        return cls.from_policy(policy, config, seed=0, trust_remote_code=trust_remote_code)

    def train(self, mode: bool = True) -> "Critic":
        """Set the flag of this module; the backbone stays in eval mode."""
        super().train(mode)
        if self.backbone is not None:
            self.backbone.eval()
        return self

    @property
    def borrowed(self) -> bool:
        """Whether the backbone is the policy's."""
        return bool(self._lender)

    @property
    def context_length(self) -> int | None:
        """Longest sequence the backbone may read; see `vrpo.models.backbone.context_length`."""
        return context_length(self.features)

    @property
    def latent_dim(self) -> int:
        """K, dimensions of the latent code; 0 for the scalar head."""
        return self.head.latent_dim

    @property
    def frozen_head(self) -> Float[Tensor, "V d"]:
        """Language-model head of the initial policy; only with a semantic loss."""
        assert isinstance(self._lm_head, Tensor), (
            "the frozen head is kept only when critic.semantic.mode is not off"
        )
        return self._lm_head

    def hidden(
        self, input_ids: Int[Tensor, "B L"], attention_mask: Bool[Tensor, "B L"] | Int[Tensor, "B L"]
    ) -> Float[Tensor, "B L d"]:
        """Value features of right-padded sequences; 0 at padding."""
        real = attention_mask.bool()  # tokenizers return integers
        return spread(self.states_at(input_ids, real, real), real)

    def states_at(
        self,
        input_ids: Int[Tensor, "B L"],
        attention_mask: Bool[Tensor, "B L"],
        at: Bool[Tensor, "B L"],
        prompts: SharedPrompts | None = None,
    ) -> Float[Tensor, "N d"]:
        """Value features where `at` is True; see `vrpo.models.backbone.states_at`."""
        with torch.no_grad() if self.borrowed else nullcontext():
            return states_at(
                self.features,
                input_ids,
                attention_mask,
                at,
                compute_dtype=self.compute_dtype,
                prompts=within(prompts, attention_mask, self.shared_limit),
            )

    @property
    def scale(self) -> float:
        """Of the head's units in reward units, 1 until rewards are known."""
        return 1.0 if self.units is None else self.units.scale

    def choose_units(self, rewards: Float[Tensor, " N"]) -> None:
        """Take the units of the head from the first rewards that differ (`functional.reward_units`); a cross-entropy has its own.

        Where later ones are far from these, the last layer is changed with the units, so that the values stay.
        """
        if self.head.regression != "mse" or (units := reward_units(rewards)) is None:
            return
        if self.units is not None and not units.far_from(self.units):
            return
        if self.units is not None:
            shift = (self.units.offset - units.offset) / units.scale
            self.head.rescale(self.units.scale / units.scale, shift)
        self.units = units

    def forward_tokens(
        self, hidden: Float[Tensor, "N d"], noise: Tensor | None, features: Tensor | None = None
    ) -> HeadOutput:
        """Values, reward units, and bottleneck KL of chosen tokens.

        Args:
            hidden: value features, from `states_at`.
            noise: [N, K], standard normal; None takes the mean of z.
            features: [N, F] uncertainty features of the same states; not read with `critic.features: none`.
        """
        output = self.head(hidden, noise, features)
        if self.units is None:
            return output
        return replace(output, values=self.units.offset + self.units.scale * output.values)

    def values_of(
        self, hidden: Float[Tensor, "B L d"], features: Float[Tensor, "B L F"] | None = None
    ) -> Float[Tensor, "B L"]:
        """Mean-z values at every position, reward units, fp32.

        Args:
            hidden: value features.
            features: `functional.uncertainty_features` of the same states; with `critic.features: uncertainty` or `belief` alone.

        Raises:
            ModelError: the head reads such features and there are none.
        """
        if features is None and isinstance(self.head, InformedHead):
            raise ModelError(
                "this critic reads a language model's uncertainty beside its own states (critic.features), and features is None; pass "
                "vrpo.functional.uncertainty_features of the sequences"
            )
        flat = None if features is None else features.flatten(0, 1)
        return self.forward_tokens(hidden.flatten(0, 1), None, flat).values.view(hidden.shape[:2])

    def save_pretrained(self, folder: str | Path) -> None:
        """The backbone as an ordinary folder for `AutoModel.from_pretrained`, and the value head.

        With an adapter the folder holds the adapter in place of the backbone, as `peft` writes it; with a borrowed
        backbone the head alone.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.backbone is None:
            pass
        elif self.adapter:
            self.backbone.save_pretrained(str(folder), save_embedding_layers=False)
        else:
            self.backbone.save_pretrained(str(folder))
        # an adapter's folder names a base model, and that may have more layers
        own = self.backbone is not None
        layers = self.features.config.get_text_config(decoder=True).num_hidden_layers if own else None
        save_head(self.head, folder, units=self.units, layers=layers)


def _copy_of_backbone(policy: Policy) -> tuple[nn.Module, bool]:
    """The policy's features as they are now, and whether they come from an adapter.

    A trained adapter stays one instead of being merged: on disk an adapter names its base model by path, and a
    merged base has none.
    """
    if not policy.adapter:
        return copy.deepcopy(policy.backbone), False
    base = copy.deepcopy(policy.model).unload().base_model.requires_grad_(True)
    return (base, False) if policy.base_is_initial else (copy_adapter(base, policy.model), True)


def _fresh_head(config: CriticConfig, width: int, seed: int) -> ValueHead:
    generator = torch.Generator().manual_seed(stream_seed(seed, "critic-head"))
    return build_head(config, width, generator=generator)


def _hidden_size(backbone: Any) -> int:
    """Width of the states that a head reads; OPT's smaller models project theirs to that of the embedding."""
    config = backbone.config.get_text_config()
    return int(getattr(config, "word_embed_proj_dim", config.hidden_size))


def _check_fit(
    config: CriticConfig, policy: Policy, backbone: Any, width: int, lm_head: Tensor | None
) -> None:
    """The critic reads the policy's tokens, and the frozen head reads the critic's features."""
    words = policy.causal_lm.get_input_embeddings().weight.shape[0]
    rows = backbone.get_input_embeddings().weight.shape[0]
    if rows < words:
        raise ModelError(
            f"critic.path={config.path!r} embeds {rows} tokens, the policy {words}; use a critic that shares the "
            "policy's tokenizer"
        )
    if lm_head is not None and width != lm_head.shape[1]:
        raise ModelError(
            f"critic.path={config.path!r} has hidden size {width}, the policy's language-model head {lm_head.shape[1]}; "
            "use a critic of the policy's size, or critic.semantic.mode: off"
        )
