"""What the tests of stages 1 and 3 are made of: a tokenizer of characters, prompts, rollouts."""

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vrpo.types import Prompt, Rollout, Stop

CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant'] %}{{ raise_exception('no role ' + m.role) }}"
    "{% endif %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def char_tokenizer(*, chat: bool = False) -> PreTrainedTokenizerFast:
    """One token per printable ASCII character; `tok.decode` is not needed, ids are 3 + position."""
    characters = [chr(i) for i in range(32, 127)] + ["\n"]
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<unk>", "<eos>", *characters])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>"
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def text_of(tokenizer: PreTrainedTokenizerFast, ids: np.ndarray) -> str:
    return "".join(tokenizer.convert_ids_to_tokens(ids.tolist()))


def make_rollout(
    completion: str,
    *,
    prompt_index: int = 0,
    sample: int = 0,
    step: int = 0,
    prompt=None,
    prompt_id: str | None = None,
    num_tokens: int = 2,
    stop: Stop = "eos",
    **columns,
) -> Rollout:
    """A rollout of a two-token prompt; `num_tokens` response tokens 7, 8, 9, ..."""
    length = 2 + num_tokens
    mask = np.arange(length) >= 2
    zeros = np.zeros(length, dtype=np.float32)
    return Rollout(
        sample_id=f"s{step}/p{prompt_index}/k{sample}",
        prompt=Prompt(
            prompt_id=prompt_id or f"train/{prompt_index}",
            prompt=f"question {prompt_index}" if prompt is None else prompt,
            token_ids=np.array([5, 6], dtype=np.int64),
            columns=columns,
        ),
        token_ids=np.concatenate([np.array([5, 6]), np.arange(7, 7 + num_tokens)]).astype(np.int64),
        action_mask=mask,
        logprobs=zeros,
        policy_logprobs=zeros,
        completion=completion,
        stop=stop,
        policy_version=0,
    )


def step_of(*, prompts: int, samples: int, step: int = 0) -> list[Rollout]:
    """Rollouts with answer "1" in which the first half of every group answers right."""
    return [
        make_rollout(
            "1" if k < samples // 2 else "0",
            prompt_index=p,
            sample=k,
            step=step,
            answer="1",
            num_tokens=k + 1,
        )
        for p in range(prompts)
        for k in range(samples)
    ]
