"""The critic: where values are read, what never moves, and what comes back from disk."""

import json
import warnings

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, Gemma4TextConfig, OPTConfig, RecurrentGemmaConfig

from tests.conftest import build_model
from vrpo.config.learning import BottleneckHead, CriticConfig, ScalarHead, SemanticConfig
from vrpo.config.run import LoraConfig, ModelConfig
from vrpo.errors import ModelError
from vrpo.functional import linear_logprobs_and_entropy, uncertainty_features
from vrpo.models import Critic, load_policy, policy_from_model
from vrpo.models.depth import keep_layers
from vrpo.models.loading import peft_warnings, seeded

FULL = CriticConfig(head=BottleneckHead(latent_dim=4), semantic=SemanticConfig(mode="literal"))
PLAIN = CriticConfig(head=ScalarHead())
INPUT_IDS = torch.tensor([[9, 4, 8, 11, 30, 2], [7, 5, 60, 2, 0, 0]])
ATTENTION = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]).bool()


@torch.no_grad()
def values(critic, input_ids, attention_mask):
    """Mean-z values at every position; 0 at padding."""
    found = critic.values_of(critic.hidden(input_ids, attention_mask))
    return torch.where(attention_mask, found, 0.0)


def train_once(critic):
    """One step on values and on the frozen head's entropy."""
    optimizer = torch.optim.AdamW([p for p in critic.parameters() if p.requires_grad], lr=1e-2)
    hidden = critic.hidden(INPUT_IDS, ATTENTION)[:, :-1][ATTENTION[:, 1:]]
    noise = torch.ones(len(hidden), critic.latent_dim) if critic.latent_dim else None
    out = critic.forward_tokens(hidden, noise)
    loss = (out.values - 1).square().sum() + 0.01 * out.kl.sum()
    if critic._lm_head is not None:
        ids = INPUT_IDS[:, 1:][ATTENTION[:, 1:]]
        loss = loss + linear_logprobs_and_entropy(hidden, critic.frozen_head, ids, temperature=1.0)[1].sum()
    loss.backward()
    optimizer.step()


@pytest.mark.parametrize("config", [FULL, PLAIN])
def test_values_do_not_depend_on_padding_or_micro_batches(make_policy, config):
    critic = Critic.from_policy(make_policy("llama"), config, seed=0)
    together = values(critic, INPUT_IDS, ATTENTION)
    one_by_one = torch.cat([values(critic, INPUT_IDS[i : i + 1], ATTENTION[i : i + 1]) for i in range(2)])
    alone = values(critic, INPUT_IDS[1:, :4], ATTENTION[1:, :4])
    torch.testing.assert_close(together, one_by_one, atol=1e-5, rtol=0)
    torch.testing.assert_close(together[1:, :4], alone, atol=1e-5, rtol=0)
    assert (critic.hidden(INPUT_IDS, ATTENTION)[1, 4:] == 0).all()
    assert together.dtype == torch.float32


def test_a_value_is_read_before_its_token_exists(make_policy):
    critic = Critic.from_policy(make_policy("llama"), FULL, seed=0)
    changed = INPUT_IDS.clone()
    changed[0, 3] = 77
    before, after = (values(critic, ids, ATTENTION)[0] for ids in (INPUT_IDS, changed))
    # column t reads tokens 0..t: only columns 3, 4, 5 may see token 3
    assert (before != after).tolist() == [False, False, False, True, True, True]


def test_garbage_in_the_padding_changes_no_bit(make_policy):
    critic = Critic.from_policy(make_policy("llama"), FULL, seed=0)
    dirty = torch.where(ATTENTION, INPUT_IDS, 55)
    clean_values, dirty_values = (values(critic, ids, ATTENTION) for ids in (INPUT_IDS, dirty))
    assert torch.equal(clean_values, dirty_values)


@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_the_frozen_head_never_moves(make_policy, name):
    policy = make_policy(name)
    critic = Critic.from_policy(policy, FULL, seed=0)
    before = critic.frozen_head.clone()
    embedding = critic.backbone.get_input_embeddings().weight.detach().clone()
    for _ in range(3):
        train_once(critic)
    assert torch.equal(critic.frozen_head, before)
    assert critic.frozen_head.grad is None
    assert not critic.frozen_head.requires_grad
    assert all(p is not critic.frozen_head for p in critic.parameters())
    # the embedding, which shares its values with a tied head, does move: the test would notice shared memory
    assert not torch.equal(critic.backbone.get_input_embeddings().weight, embedding)
    assert torch.equal(policy.head.weight, before)


def test_without_a_semantic_loss_there_is_no_frozen_head(make_policy):
    critic = Critic.from_policy(make_policy("llama"), PLAIN, seed=0)
    assert critic._lm_head is None
    assert not [name for name, _ in critic.named_buffers() if "lm_head" in name]
    with pytest.raises(AssertionError, match="semantic"):
        _ = critic.frozen_head


def test_the_fresh_head_is_named_by_the_seed(make_policy):
    policy = make_policy("llama")
    first, again, other = (Critic.from_policy(policy, FULL, seed=s).head.encoder.weight for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("config", [FULL, PLAIN])
@pytest.mark.parametrize("name", ["llama_tied", "gpt2"])
def test_save_and_load_are_bitwise(make_policy, tmp_path, config, name):
    policy = make_policy(name)
    critic = Critic.from_policy(policy, config, seed=0)
    train_once(critic)
    critic.save_pretrained(tmp_path)
    again = Critic.from_pretrained(tmp_path, policy, config)
    assert torch.equal(values(again, INPUT_IDS, ATTENTION), values(critic, INPUT_IDS, ATTENTION))
    saved, restored = critic.state_dict(), again.state_dict()
    assert saved.keys() == restored.keys()
    assert all(torch.equal(saved[k], restored[k]) for k in saved)
    backbone = AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        states = backbone(input_ids=INPUT_IDS).last_hidden_state
    assert torch.equal(states[ATTENTION], critic.hidden(INPUT_IDS, ATTENTION)[ATTENTION])
    from_path = Critic.from_policy(policy, config.model_copy(update={"path": str(tmp_path)}), seed=9)
    assert torch.equal(from_path.head.output.weight, critic.head.output.weight)


@pytest.mark.parametrize("trunk", ["own", "policy"])
def test_units_are_chosen_and_come_back(make_policy, tmp_path, trunk):
    policy, config = make_policy("llama"), CriticConfig(trunk=trunk)
    critic = Critic.from_policy(policy, config, seed=0)
    raw = values(critic, INPUT_IDS, ATTENTION)[ATTENTION]
    critic.choose_units(torch.tensor([7.0, 7.0]))  # all equal: nothing is known of their scale
    critic.save_pretrained(tmp_path / "unknown")
    assert Critic.from_pretrained(tmp_path / "unknown", policy, config).units is None
    critic.choose_units(torch.tensor([0.0, 100.0]))
    critic.choose_units(torch.tensor([0.0, 60.0]))  # not far off
    seen = values(critic, INPUT_IDS, ATTENTION)[ATTENTION]
    torch.testing.assert_close(seen, 50 + 50 * raw)
    critic.save_pretrained(tmp_path / "known")
    again = Critic.from_pretrained(tmp_path / "known", policy, config)
    assert torch.equal(values(again, INPUT_IDS, ATTENTION)[ATTENTION], seen)
    settings = tmp_path / "known" / "value_head.json"
    saved = json.loads(settings.read_text())
    del saved["units"]  # as earlier versions wrote it, whose heads gave rewards as they are
    settings.write_text(json.dumps(saved))
    assert Critic.from_pretrained(tmp_path / "known", policy, config).units == (0.0, 1.0)
    settings.write_text(json.dumps({**saved, "units": "dollars"}))
    with pytest.raises(ModelError, match="cannot be read"):
        Critic.from_pretrained(tmp_path / "known", policy, config)


@pytest.mark.parametrize("config", [FULL, PLAIN, PLAIN.model_copy(update={"features": "uncertainty"})])
def test_units_that_are_far_off_are_renewed_and_the_values_stay(make_policy, config):
    """Nothing right at first, then 0 to 100; a step of outliers, then 0 and 1 again."""
    critic = Critic.from_policy(make_policy("llama"), config, seed=0)
    hidden, features = torch.randn(5, 16), torch.randn(5, 7) if config.features != "none" else None
    if features is not None:
        torch.nn.init.normal_(critic.head.branch.output.weight)
    critic.choose_units(torch.tensor([0.0, -0.002]))
    before = critic.forward_tokens(hidden, None, features)
    for rewards, units in (([0.0, 100.0], (50.0, 50.0)), ([0.0, 1.0], (0.0, 1.0))):
        critic.choose_units(torch.tensor(rewards))
        assert critic.units == units
        after = critic.forward_tokens(hidden, None, features)
        torch.testing.assert_close(after.values, before.values, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(after.kl, before.kl)


def test_a_cross_entropy_has_units_of_its_own(make_policy):
    critic = Critic.from_policy(make_policy("llama"), CriticConfig(regression="hl_gauss"), seed=0)
    critic.choose_units(torch.tensor([0.0, 100.0]))
    assert critic.scale == 1.0


def test_lora_critic_trains_adapter_and_head_and_comes_back(tokenizer, tmp_path):
    base = tmp_path / "base"
    build_model("llama").save_pretrained(base)
    tokenizer.save_pretrained(base)
    config = ModelConfig(path=str(base), device="cpu", lora=LoraConfig(rank=2))
    policy = load_policy(config)
    critic = Critic.from_policy(policy, FULL, seed=0, lora=config.lora)
    trainable = [name for name, p in critic.named_parameters() if p.requires_grad]
    assert all("lora_" in name or name.startswith("head.") for name in trainable)
    assert any("lora_" in name for name in trainable)
    for _ in range(2):
        train_once(critic)
    critic.save_pretrained(tmp_path / "critic")
    again = Critic.from_pretrained(tmp_path / "critic", policy, FULL)
    assert again.adapter
    assert torch.equal(values(again, INPUT_IDS, ATTENTION), values(critic, INPUT_IDS, ATTENTION))
    train_once(again)  # still trainable
    assert not torch.equal(again.head.output.weight, critic.head.output.weight)


def with_lora(tokenizer, **settings):
    """A policy around a user's own `PeftModel` whose adapter has been trained: it is not the base model."""
    import peft

    defaults = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    with seeded(5), peft_warnings():
        model = peft.get_peft_model(build_model("llama"), peft.LoraConfig(**defaults | settings))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    return policy_from_model(model, tokenizer, config=ModelConfig(path="x", device="cpu"))


def test_an_adapter_on_whole_names_is_taken_over(tokenizer):
    policy = with_lora(tokenizer, target_modules="all-linear")
    assert any(name.startswith("model.") for name in policy.model.peft_config["default"].target_modules)
    critic = Critic.from_policy(policy, FULL, seed=0)
    assert torch.equal(critic.hidden(INPUT_IDS, ATTENTION), policy.hidden(INPUT_IDS, ATTENTION).detach())


def test_the_critic_goes_on_with_a_trained_adapter(tokenizer):
    policy = with_lora(tokenizer)
    critic = Critic.from_policy(policy, FULL, seed=0)
    features = policy.hidden(INPUT_IDS, ATTENTION).detach()
    assert torch.equal(critic.hidden(INPUT_IDS, ATTENTION), features)
    with policy.model.disable_adapter():  # the mutant: the bare base model
        assert (policy.hidden(INPUT_IDS, ATTENTION) - features).abs().max() > 0.1
    settings = critic.backbone.active_peft_config
    assert (settings.r, settings.lora_alpha) == (3, 5)
    assert set(settings.target_modules) == {"q_proj", "down_proj"}
    trainable = {name for name, p in critic.backbone.named_parameters() if p.requires_grad}
    # 2 layers * 2 modules * (A, B)
    assert len(trainable) == 8
    assert all("lora_" in name for name in trainable)
    train_once(critic)
    assert not torch.equal(critic.hidden(INPUT_IDS, ATTENTION), features)
    assert torch.equal(policy.hidden(INPUT_IDS, ATTENTION), features)


def test_a_critic_with_a_trained_adapter_comes_back(tokenizer, tmp_path):
    build_model("llama").save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    policy = with_lora(tokenizer)
    policy.causal_lm.name_or_path = policy.backbone.name_or_path = str(tmp_path / "base")
    policy.model.active_peft_config.base_model_name_or_path = str(tmp_path / "base")
    policy.save_pretrained(tmp_path / "sft")
    # a run that goes on from the folder of an earlier one
    warm = load_policy(ModelConfig(path=str(tmp_path / "sft"), device="cpu"))
    critic = Critic.from_policy(warm, FULL, seed=0)
    assert torch.equal(critic.hidden(INPUT_IDS, ATTENTION), policy.hidden(INPUT_IDS, ATTENTION))
    train_once(critic)
    critic.save_pretrained(tmp_path / "critic")
    again = Critic.from_pretrained(tmp_path / "critic", warm, FULL)
    assert torch.equal(values(again, INPUT_IDS, ATTENTION), values(critic, INPUT_IDS, ATTENTION))


def test_adapters_the_critic_cannot_copy_are_refused(tokenizer):
    import peft

    policy = with_lora(tokenizer, target_modules=r"model\.layers\.0\.self_attn\.q_proj")
    with pytest.raises(ModelError, match=r"cannot take over.*merge_and_unload.*model\.lora") as error:
        Critic.from_policy(policy, FULL, seed=0)
    assert "\n" not in str(error.value)
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with seeded(0), peft_warnings():
        model = peft.get_peft_model(build_model("llama"), prompts)
    with pytest.raises(ModelError, match=r"'PROMPT_TUNING'.*one LoRA adapter.*merge_and_unload"):
        policy_from_model(model, tokenizer, config=ModelConfig(path="x", device="cpu"))


def test_a_fresh_adapter_of_the_policy_needs_settings_for_the_critics(tokenizer):
    config = ModelConfig(path="x", device="cpu", lora=LoraConfig(rank=2))
    policy = policy_from_model(build_model("llama"), tokenizer, config=config)
    with pytest.raises(ModelError, match=r"no settings.*model\.lora"):
        Critic.from_policy(policy, FULL, seed=0)
    critic = Critic.from_policy(policy, FULL, seed=0, lora=config.lora)
    assert critic.adapter
    assert torch.equal(critic.hidden(INPUT_IDS, ATTENTION), policy.hidden(INPUT_IDS, ATTENTION))


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
def test_a_policy_adapter_is_no_critic(tokenizer, tmp_path, task_type):
    """Its weights are named for the model with a head: opened around a backbone it would be a fresh one."""
    build_model("llama").save_pretrained(tmp_path / "base")
    policy = with_lora(tokenizer, task_type=task_type)
    policy.model.active_peft_config.base_model_name_or_path = str(tmp_path / "base")
    policy.save_pretrained(tmp_path / "sft")
    with (
        warnings.catch_warnings(),
        pytest.raises(ModelError, match="cannot load the adapter") as error,
    ):
        warnings.simplefilter("default")  # as outside of tests
        Critic.from_policy(policy, PLAIN.model_copy(update={"path": str(tmp_path / "sft")}), seed=0)
    assert "\n" not in str(error.value)


def test_the_home_folder_is_expanded_for_the_head_too(make_policy, tmp_path, monkeypatch):
    policy = make_policy("llama")
    critic = Critic.from_policy(policy, FULL, seed=0)
    train_once(critic)
    (tmp_path / "critic").mkdir()
    critic.save_pretrained(tmp_path / "critic")
    monkeypatch.setenv("HOME", str(tmp_path))
    opened = [
        Critic.from_policy(policy, FULL.model_copy(update={"path": "~/critic"}), seed=9),
        Critic.from_pretrained("~/critic", policy, FULL),
    ]
    for again in opened:
        assert torch.equal(values(again, INPUT_IDS, ATTENTION), values(critic, INPUT_IDS, ATTENTION))


def test_a_semantic_loss_needs_a_plain_head(make_policy):
    policy = make_policy("llama")
    policy.runs_head_alone = False
    with pytest.raises(ModelError, match=r"LlamaForCausalLM.*set `critic\.semantic\.mode: off`") as error:
        Critic.from_policy(policy, FULL, seed=0)
    assert "\n" not in str(error.value)
    assert Critic.from_policy(policy, PLAIN, seed=0)._lm_head is None


def saved_critic(policy, tmp_path, config=FULL):
    Critic.from_policy(policy, config, seed=0).save_pretrained(tmp_path)
    return tmp_path


def test_another_head_is_refused(make_policy, tmp_path):
    policy = make_policy("llama")
    folder = saved_critic(policy, tmp_path)
    with pytest.raises(ModelError, match=r"'type': 'bottleneck'.*'type': 'scalar'.*make critic\.head agree"):
        Critic.from_pretrained(folder, policy, PLAIN)
    with pytest.raises(ModelError, match=r"'latent_dim': 4.*'latent_dim': 5"):
        Critic.from_pretrained(folder, policy, FULL.model_copy(update={"head": BottleneckHead(latent_dim=5)}))


def test_another_hidden_size_is_refused(make_policy, tiny_folder, tmp_path):
    policy = make_policy("llama")
    with pytest.raises(ModelError, match="hidden size 96, the policy's language-model head 16"):
        Critic.from_policy(policy, FULL.model_copy(update={"path": str(tiny_folder)}), seed=0)
    folder = saved_critic(policy, tmp_path)
    settings = json.loads((folder / "value_head.json").read_text())
    (folder / "value_head.json").write_text(json.dumps(settings | {"hidden_size": 32}))
    with pytest.raises(ModelError, match=r"'hidden_size': 32.*'hidden_size': 16"):
        Critic.from_pretrained(folder, policy, FULL)
    # without a semantic loss a critic may be of another size
    larger = Critic.from_policy(policy, PLAIN.model_copy(update={"path": str(tiny_folder)}), seed=0)
    assert values(larger, INPUT_IDS, ATTENTION).shape == (2, 6)


def test_a_smaller_vocabulary_is_refused(make_policy, tokenizer, tmp_path):
    small = build_model("llama")
    small.resize_token_embeddings(50)
    small.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="embeds 50 tokens, the policy 100"):
        Critic.from_policy(make_policy("llama"), PLAIN.model_copy(update={"path": str(tmp_path)}), seed=0)


def test_a_folder_without_head_is_refused_and_a_damaged_head_too(make_policy, tiny_folder, tmp_path):
    policy = make_policy("llama")
    with pytest.raises(ModelError, match=r"holds no value_head\.json"):
        Critic.from_pretrained(tiny_folder, policy, FULL)
    folder = saved_critic(policy, tmp_path)
    (folder / "value_head.safetensors").write_bytes(b"12345")
    with pytest.raises(ModelError, match="cannot be read"):
        Critic.from_pretrained(folder, policy, FULL)


def test_policy_with_bf16_gives_fp32_values(tokenizer):
    critics = [
        Critic.from_policy(
            policy_from_model(
                build_model("llama"), tokenizer, config=ModelConfig(path="x", device="cpu", dtype=dtype)
            ),
            FULL,
            seed=0,
        )
        for dtype in ("float32", "bfloat16")
    ]
    exact, rounded = (values(critic, INPUT_IDS, ATTENTION) for critic in critics)
    assert rounded.dtype == torch.float32
    assert {p.dtype for p in critics[1].parameters()} == {torch.float32}
    difference = (exact - rounded).abs().max()
    assert 0 < difference < 0.05 * exact.abs().max()


def test_a_critic_of_fewer_layers_is_the_lower_part_and_comes_back(make_policy, tmp_path):
    policy = make_policy("qwen3")
    config = PLAIN.model_copy(update={"layers": 1})
    critic = Critic.from_policy(policy, config, seed=0)
    seen = []
    policy.backbone.layers[0].register_forward_hook(lambda _, __, out: seen.append(out))
    policy.backbone(input_ids=INPUT_IDS, use_cache=False)
    lower = policy.backbone.norm(seen[0])
    torch.testing.assert_close(critic.hidden(INPUT_IDS, ATTENTION)[ATTENTION], lower[ATTENTION])
    assert len(policy.backbone.layers) == 2
    assert policy.causal_lm.config.num_hidden_layers == 2
    train_once(critic)
    critic.save_pretrained(tmp_path)
    again = Critic.from_pretrained(tmp_path, policy, config)
    assert torch.equal(values(again, INPUT_IDS, ATTENTION), values(critic, INPUT_IDS, ATTENTION))


def lora_critic(tokenizer, folder, config, *, rank=2):
    """The critic of a LoRA policy, trained a little, and that policy."""
    build_model("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model = ModelConfig(path=str(folder), device="cpu", lora=LoraConfig(rank=rank))
    policy = load_policy(model)
    critic = Critic.from_policy(policy, config, seed=0, lora=model.lora)
    train_once(critic)
    return critic, policy


def test_an_adapter_on_fewer_layers_comes_back_on_as_many(tokenizer, tmp_path):
    config = PLAIN.model_copy(update={"layers": 1})
    critic, policy = lora_critic(tokenizer, tmp_path / "base", config)
    critic.save_pretrained(tmp_path / "critic")
    for told in (config, PLAIN):  # the folder knows
        again = Critic.from_pretrained(tmp_path / "critic", policy, told)
        assert len(again.features.layers) == 1
        assert torch.equal(values(again, INPUT_IDS, ATTENTION), values(critic, INPUT_IDS, ATTENTION))
    with pytest.raises(
        ModelError, match=r"critic\.layers=2, but the head in .* of layer 1; set critic\.layers: 1 or null"
    ):
        Critic.from_pretrained(tmp_path / "critic", policy, PLAIN.model_copy(update={"layers": 2}))


def test_a_saved_adapter_is_not_trained_in_place_of_the_one_asked_for(tokenizer, tmp_path):
    critic, policy = lora_critic(tokenizer, tmp_path / "base", PLAIN)
    critic.save_pretrained(tmp_path / "critic")
    config = PLAIN.model_copy(update={"path": str(tmp_path / "critic")})
    assert Critic.from_policy(policy, config, seed=0, lora=LoraConfig(rank=2)).adapter
    with pytest.raises(ModelError, match=r"rank 8 and alpha 32.*rank 2 and alpha 32"):
        Critic.from_policy(policy, config, seed=0, lora=LoraConfig(rank=8))


def test_a_head_says_whose_features_it_reads(make_policy, tmp_path):
    policy = make_policy("llama")
    belief = PLAIN.model_copy(update={"features": "belief"})
    Critic.from_policy(policy, belief, seed=0).save_pretrained(tmp_path)
    Critic.from_pretrained(tmp_path, policy, belief)
    with pytest.raises(ModelError, match=r"'source': 'belief'.*'source': 'uncertainty'"):
        Critic.from_pretrained(tmp_path, policy, PLAIN.model_copy(update={"features": "uncertainty"}))
    written = json.loads((tmp_path / "value_head.json").read_text())
    del written["source"], written["layers"]  # as earlier versions wrote it
    (tmp_path / "value_head.json").write_text(json.dumps(written))
    Critic.from_pretrained(tmp_path, policy, belief)
    (tmp_path / "value_head.json").write_text("[]")
    with pytest.raises(ModelError, match="is no object"):
        Critic.from_pretrained(tmp_path, policy, belief)


def test_more_layers_than_there_are_is_refused(make_policy):
    with pytest.raises(ModelError, match=r"layers=3.*has 2 layers"):
        Critic.from_policy(make_policy("llama"), PLAIN.model_copy(update={"layers": 3}), seed=0)


LAYERS = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 64}


def test_layers_whose_kinds_follow_from_their_number_are_cut(tmp_path):
    blocks = ["recurrent", "recurrent", "attention"]
    config = RecurrentGemmaConfig(
        **LAYERS, lru_width=16, num_key_value_heads=1, head_dim=8, block_types=blocks
    )
    model = AutoModel.from_config(config).eval()
    keep_layers(model, 2)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        states = [m(input_ids=INPUT_IDS % 64, use_cache=False).last_hidden_state for m in (model, AutoModel.from_pretrained(tmp_path).eval())]  # fmt: skip
    assert torch.equal(*states)


@pytest.mark.parametrize(
    ("config", "part"),
    [
        (
            Gemma4TextConfig(
                **LAYERS, num_kv_shared_layers=1, layer_types=["sliding_attention", *["full_attention"] * 2]
            ),
            "upper layers of Gemma4TextModel read the keys of lower ones",
        ),
        (
            Gemma4TextConfig(**LAYERS, num_kv_shared_layers=0, vocab_size_per_layer_input=64),
            "does not run with fewer layers",
        ),
    ],
)
def test_layers_that_need_the_others_are_refused_in_one_line(config, part):
    with pytest.raises(ModelError, match=f"critic.layers=2.*{part}.*critic.layers: null"):
        keep_layers(AutoModel.from_config(config), 2)


def test_a_head_reads_states_that_are_projected_to_the_embeddings_width(tokenizer):
    config = OPTConfig(**(LAYERS | {"vocab_size": len(tokenizer)}), word_embed_proj_dim=8, ffn_dim=16)
    policy = policy_from_model(
        AutoModelForCausalLM.from_config(config), tokenizer, config=ModelConfig(path="opt", device="cpu")
    )
    critic = Critic.from_policy(policy, FULL, seed=0)
    assert critic.head.hidden_size == 8
    assert values(critic, INPUT_IDS, ATTENTION).shape == INPUT_IDS.shape


def test_a_borrowed_trunk_follows_the_policy_and_is_never_trained(make_policy, tmp_path):
    policy = make_policy("llama")
    config = CriticConfig(trunk="policy", head=BottleneckHead(latent_dim=4))
    critic = Critic.from_policy(policy, config, seed=0)
    assert {name.split(".")[0] for name, _ in critic.named_parameters()} == {"head"}
    before = {name: p.clone() for name, p in policy.named_parameters()}
    train_once(critic)
    assert all(p.grad is None for p in policy.parameters())
    assert all(torch.equal(p, before[name]) for name, p in policy.named_parameters())
    critic.save_pretrained(tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["value_head.json", "value_head.safetensors"]
    first = values(critic, INPUT_IDS, ATTENTION)
    assert torch.equal(values(Critic.from_pretrained(tmp_path, policy, config), INPUT_IDS, ATTENTION), first)
    with torch.no_grad():
        policy.backbone.norm.weight.mul_(1.5)
    assert not torch.equal(values(critic, INPUT_IDS, ATTENTION), first)


@pytest.mark.parametrize("setting", [{"layers": 1}, {"path": "x"}, {"semantic": {"mode": "literal"}}])
def test_a_borrowed_trunk_takes_no_settings_of_its_own(setting):
    with pytest.raises(ValueError, match="trunk=policy has none"):
        CriticConfig.model_validate({"trunk": "policy", **setting})


def test_values_of_a_critic_that_reads_uncertainty_need_it(make_policy):
    policy = make_policy("llama_tied")
    critic = Critic.from_policy(policy, PLAIN.model_copy(update={"features": "uncertainty"}), seed=0)
    hidden = critic.hidden(INPUT_IDS, ATTENTION.long())  # as tokenizers return it
    assert torch.equal(hidden, critic.hidden(INPUT_IDS, ATTENTION))
    with pytest.raises(ModelError, match=r"critic\.features.* pass vrpo\.functional\.uncertainty_features"):
        critic.values_of(hidden)
    logp, entropy = policy.logprobs_and_entropy(INPUT_IDS, ATTENTION, ATTENTION[:, 1:], temperature=1.0)
    features = uncertainty_features(entropy, -logp, ATTENTION[:, 1:])
    with torch.no_grad():
        found = critic.values_of(hidden, features)[ATTENTION]
        expected = critic.forward_tokens(hidden[ATTENTION], None, features[ATTENTION]).values
    torch.testing.assert_close(found, expected)
