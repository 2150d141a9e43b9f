"""Sampler against trainer, and the device against the CPU, on the same tokens."""

import pytest
import torch

from tests.gpu.device import DENOISED, DEVICE, ON_THE_DEVICE, on_device
from tests.smoke.test_runs import lines, run
from vrpo.config.run import ModelConfig, RolloutConfig
from vrpo.models import load_policy
from vrpo.models.backbone import compile_blocks
from vrpo.rollout import TorchEngine, collate
from vrpo.types import Batch, ScoredRollout, to_device

pytestmark = ON_THE_DEVICE

TEXTS = [f"{a}+{b}=" for a, b in ((1, 2), (34, 5), (67, 89), (10, 23), (4, 56), (98, 76))]
LOSSES = ("loss/", "objective/", "val/mean", "val/grad_norm", "policy/grad_norm", "denoiser/grad_norm")


def sampled(policy, make_prompts, *, greedy: bool) -> Batch:
    """Responses to prompts of different length, so that padding is on both sides, with the sampler's log-probabilities."""
    engine = TorchEngine(policy, policy.tokenizer, RolloutConfig(max_completion_length=12), seed=0)
    rollouts = engine.generate(
        make_prompts(*TEXTS), num_generations=32, step=1, policy_version=0, greedy=greedy
    )
    scored = [ScoredRollout(rollout=r, parts={}, clean_reward=1.0, reward=1.0) for r in rollouts]
    batch = collate(scored, pad_id=policy.tokenizer.pad_token_id, truncation="terminal")
    return to_device(batch, policy.device)


@pytest.mark.parametrize("greedy", [False, True], ids=["sampled", "greedy"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.no_grad()
def test_the_sampler_says_what_a_full_forward_pass_says(make_prompts, dtype, greedy):
    assert torch.get_float32_matmul_precision() == "highest"  # TF32 keeps ten bits
    policy = load_policy(ModelConfig(path="vrpo:tiny", device=DEVICE, dtype=dtype))
    batch = sampled(policy, make_prompts, greedy=greedy)
    for name, prompts in (("every row whole", None), ("prompts shared", batch.shared_prompts)):
        logp, _ = policy.logprobs_and_entropy(
            batch.input_ids, batch.attention_mask, batch.mask, temperature=1.0, prompts=prompts
        )
        apart = (logp - batch.old_logp)[batch.mask].abs()
        print(f"{dtype}, {name}: log-probabilities differ by {apart.mean():.1e}, at most {apart.max():.1e}")
        if (
            dtype == "float32"
        ):  # one unlikely token may be off by more than the rest; TF32 would be off by 1e-3
            assert apart.mean() < 1e-5 and apart.max() < 1e-4
        assert apart.mean() < 0.05


@pytest.mark.parametrize(
    "settings",
    [
        {"algorithm": {"type": "grpo", "kl_coef": 0.05}, "critic": None},
        DENOISED | {"critic": {"features": "belief", "warmup_steps": 0}},
    ],
    ids=["grpo", "vrpo, denoiser"],
)
def test_a_step_has_the_losses_it_has_on_a_cpu(tmp_path, monkeypatch, settings):
    """Both runs learn from the rollouts that the CPU sampled."""
    generate, said = TorchEngine.generate, []

    def recording(self, *args, **kwargs):
        said.append(generate(self, *args, **kwargs))
        return said[-1]

    config = on_device(settings, dtype="float32", steps=1)
    cpu = config.model_copy(update={"model": config.model.model_copy(update={"device": "cpu"})})
    monkeypatch.setattr(TorchEngine, "generate", recording)
    run(cpu, tmp_path / "cpu")
    heard = iter(said)
    monkeypatch.setattr(TorchEngine, "generate", lambda self, *args, **kwargs: next(heard))
    run(config, tmp_path / "device")
    (wanted,), (found,) = lines(tmp_path / "cpu"), lines(tmp_path / "device")
    names = [name for name in wanted if name.startswith(LOSSES)]
    assert len(names) > 8
    assert {n: found[n] for n in names} == pytest.approx({n: wanted[n] for n in names}, rel=1e-3, abs=1e-3)


def test_graphs_outlive_larger_batches_and_new_weights(make_prompts):
    """Few prompts, many, few again: buffers grow and graphs are captured anew. Then other weights, by the graphs there are."""
    policy = load_policy(ModelConfig(path="vrpo:tiny", device=DEVICE, dtype="float32"))
    made = {
        graphs: TorchEngine(
            policy, policy.tokenizer, RolloutConfig(max_completion_length=12, cuda_graphs=graphs), seed=0
        )
        for graphs in (True, False)
    }
    for texts, samples, change in (
        (TEXTS[:1], 2, 1.0),
        (TEXTS, 32, 1.0),
        (TEXTS[:2], 4, 1.0),
        (TEXTS, 16, 1.02),
    ):
        with torch.no_grad():
            policy.causal_lm.get_input_embeddings().weight.mul_(change)
        for greedy in (False, True):
            drawn = [
                engine.generate(
                    make_prompts(*texts), num_generations=samples, step=1, policy_version=0, greedy=greedy
                )
                for engine in made.values()
            ]
            same = [a.completion == b.completion for a, b in zip(*drawn, strict=True)]
            # a draw may lie at the edge between two tokens
            assert sum(same) >= len(same) - 1


@pytest.mark.parametrize("shared", [False, True], ids=["every row whole", "prompts shared"])
def test_compiled_blocks_compute_what_they_did(make_prompts, shared):
    policy = load_policy(ModelConfig(path="vrpo:tiny", device=DEVICE, dtype="float32"))
    batch = sampled(policy, make_prompts, greedy=False)

    def learned() -> tuple[torch.Tensor, torch.Tensor]:
        policy.zero_grad()
        logp, _ = policy.logprobs_and_entropy(
            batch.input_ids,
            batch.attention_mask,
            batch.mask,
            temperature=1.0,
            prompts=batch.shared_prompts if shared else None,
        )
        logp.sum().backward()
        return logp.detach(), torch.cat([p.grad.flatten() for p in policy.parameters()])

    before = learned()
    compile_blocks(policy.causal_lm)
    for a, b in zip(learned(), before, strict=True):
        assert (a - b).abs().max() < 1e-4 * b.abs().max()
