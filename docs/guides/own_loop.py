"""GRPO in your own training loop, from the building blocks: a model of transformers, torch, and `vrpo.functional`.

    python docs/guides/own_loop.py

A few seconds on a CPU; nothing is downloaded. A fifth of the rewards is flipped. What is learned from is the posterior of the
verdict given all verdicts on a prompt's responses, with the policy's own probability of a response as the prior.
"""

import torch

import vrpo.functional as F
from vrpo.config.run import ModelConfig
from vrpo.models import load_policy

GROUP, PROMPTS, NEW_TOKENS, FLIPS = 8, 16, 4, 0.2

policy = load_policy(ModelConfig(path="vrpo:tiny", device="cpu"))
model, tokenizer = (
    policy.causal_lm,
    policy.tokenizer,
)  # or your own: only transformers' interface is used below
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
random = torch.Generator().manual_seed(0)


@torch.no_grad()
def sample(input_ids):
    """Tokens [B, T], their log-probabilities [B, T], and a mask that is True up to the end token."""
    tokens, logps, masks = [], [], []
    running = torch.ones(len(input_ids), dtype=torch.bool)
    for _ in range(NEW_TOKENS):
        logits = model(input_ids).logits[:, -1]
        drawn = F.sample_tokens(
            logits, torch.rand(len(logits), generator=random), temperature=1.0, top_k=0, top_p=1.0
        )
        chosen = torch.where(running, drawn.token_ids, tokenizer.pad_token_id)
        tokens, logps, masks = [*tokens, chosen], [*logps, drawn.policy_logprobs], [*masks, running]
        running = running & (chosen != tokenizer.eos_token_id)
        input_ids = torch.cat([input_ids, chosen[:, None]], dim=1)
    return torch.stack(tokens, 1), torch.stack(logps, 1), torch.stack(masks, 1)


for step in range(1, 11):
    pairs = torch.randint(10, 100, (PROMPTS, 2), generator=random).tolist()
    group_ids = torch.arange(PROMPTS).repeat_interleave(GROUP)
    questions = [f"{a}+{b}=" for a, b in pairs]  # all of one length: nothing is padded
    prompts = tokenizer(questions, return_tensors="pt").input_ids.repeat_interleave(GROUP, dim=0)
    responses, old_logp, mask = sample(prompts)

    texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
    right = [str(a + b) for a, b in pairs for _ in range(GROUP)]
    clean = torch.tensor([float(text == answer) for text, answer in zip(texts, right, strict=True)])
    uniforms = torch.rand(len(clean), generator=random)
    seen = F.flip_rewards(clean, false_positive=FLIPS, false_negative=FLIPS, uniforms=uniforms)

    # log P(seen | right), log P(seen | wrong); equal responses share their verdicts, and one of a prompt is right at most
    rate = torch.tensor(FLIPS)
    if_right, if_wrong = F.flip_log_likelihoods(seen, false_positive=rate, false_negative=rate)
    belief = torch.where(mask, old_logp, 0.0).sum(1).exp().clamp(1e-4, 1 - 1e-4)
    ids = torch.cat([prompts, responses], dim=1)
    actions = torch.cat([torch.zeros_like(prompts[:, 1:], dtype=torch.bool), mask], dim=1)
    answers = F.equal_responses(ids, actions, group_ids)
    denoised = F.joint_posterior_rewards(
        belief, if_right, if_wrong, answers=answers, group_ids=group_ids, least=1e-3
    )

    # one advantage a response, the same for each of its tokens: [B] -> [B, T]
    advantages = F.group_advantages(denoised, group_ids, scale="std")[:, None].expand_as(old_logp)
    # the logits at a position choose the token after it
    logits = model(ids).logits[:, prompts.shape[1] - 1 : -1]
    logp = F.token_logprobs(logits, responses, temperature=1.0)
    loss = F.ppo_clip_loss(
        logp, old_logp, advantages, mask, clip_low=0.2, clip_high=0.28, num_tokens=int(mask.sum())
    )
    optimizer.zero_grad()
    loss.loss.backward()
    optimizer.step()

    seen_right, learned_right = (float(((x > 0.5) == (clean > 0.5)).float().mean()) for x in (seen, denoised))
    print(
        f"step {step}  right {clean.mean():.2f}  verdicts right: seen {seen_right:.2f}, learned from {learned_right:.2f}"
    )
