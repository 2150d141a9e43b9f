"""Sampling with the live policy module: what is trained is what samples, on any device, with no second copy."""

from collections.abc import Sequence
from typing import Any, final

import numpy as np
import torch

from vrpo import rng
from vrpo.config.run import RolloutConfig
from vrpo.errors import ConfigError, DataError
from vrpo.rollout.decoding import Decoded, decode
from vrpo.rollout.engine import LivePolicy
from vrpo.rollout.responses import EOS, STOP_STRING, Sampling
from vrpo.rollout.steps import steps_for
from vrpo.rollout.stopping import StopStrings, end_tokens
from vrpo.types import Prompt, Rollout, Stop

Piece = tuple[int, range]
"""A prompt's index and which of its samples."""


@final
class TorchEngine:
    """An `Engine` on the live model: CUDA graphs where there is a GPU, else `transformers` and a key-value cache.

    Each sample's uniform draws come from the stream (seed, stream, sample_id), and a token is the inverse CDF
    of its draw: a completion is the same however prompts are split into batches (up to the rounding of the
    logits, which can move a draw across an edge of the CDF about once in a million tokens).

    Args:
        policy: the live policy.
        tokenizer: turns tokens into text.
        config: how to sample.
        seed: root of the random streams.
    """

    def __init__(self, policy: LivePolicy, tokenizer: Any, config: RolloutConfig, *, seed: int) -> None:
        self.policy = policy
        self.config = config
        self.seed = seed
        self._steps = steps_for(policy, cuda_graphs=config.cuda_graphs)
        ends = end_tokens(tokenizer, config.stop)
        eos_token_ids = sorted(policy.eos_token_ids | set(ends.values()))
        self._sampling = Sampling(
            max_tokens=config.max_completion_length,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            eos_token_ids=torch.tensor(eos_token_ids, device=policy.device),
            stops=StopStrings(tokenizer, [text for text in config.stop if text not in ends]),
        )

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        num_generations: int,
        step: int,
        policy_version: int,
        greedy: bool = False,
        stream: str = "sample",
        keep_states: bool = False,
    ) -> list[Rollout]:
        """See `Engine.generate`.

        Raises:
            DataError: a prompt is empty.
            ConfigError: prompt and longest response do not fit the model's context.
        """
        self._check(prompts)
        # on a GPU they would cross to the CPU and back, for a pass that is cheap there; graphs hold no room for them either
        keep_states = keep_states and self.policy.device.type == "cpu"
        lengths = [len(prompt.token_ids) for prompt in prompts]
        results: dict[tuple[int, int], Rollout] = {}
        for pieces in plan_batches(
            lengths, num_generations=num_generations, batch_size=self.config.batch_size
        ):
            names = [(p, k, f"s{step}/p{p}/k{k}") for p, samples in pieces for k in samples]
            uniforms = None if greedy else self._uniforms(stream, [sample_id for _, _, sample_id in names])
            steps = self._steps(
                self.policy, [prompts[p].token_ids for p, _ in pieces], max_tokens=self._sampling.max_tokens
            )
            repeats = [len(samples) for _, samples in pieces]
            decoded = decode(steps, repeats, uniforms, self._sampling, keep_states=keep_states)
            for row, (p, k, sample_id) in enumerate(names):
                results[p, k] = self._rollout(prompts[p], sample_id, decoded, row, policy_version)
        return [results[p, k] for p in range(len(prompts)) for k in range(num_generations)]

    def _check(self, prompts: Sequence[Prompt]) -> None:
        context = self.policy.context_length
        for prompt in prompts:
            length = len(prompt.token_ids)
            if length == 0:
                raise DataError(f"prompt {prompt.prompt_id!r} has no tokens; give every prompt some text")
            if context is not None and length + self.config.max_completion_length > context:
                lower = f"lower it to {context - length}, or " if context > length else ""
                raise ConfigError(
                    f"rollout.max_completion_length={self.config.max_completion_length} after prompt "
                    f"{prompt.prompt_id!r} of {length} tokens exceeds the model's context of {context}; {lower}"
                    "drop long prompts with task.max_prompt_tokens"
                )

    def _uniforms(self, stream: str, sample_ids: Sequence[str]) -> torch.Tensor:
        """[N, M] draws; row i belongs to sample i alone."""
        length = self.config.max_completion_length
        draws = [rng.stream(self.seed, stream, sample_id).random(length) for sample_id in sample_ids]
        return torch.from_numpy(np.stack(draws)).to(self.policy.device)

    def _rollout(self, prompt: Prompt, sample_id: str, decoded: Decoded, row: int, version: int) -> Rollout:
        length, ending = int(decoded.lengths[row]), int(decoded.endings[row])
        chosen = decoded.token_ids[row, :length].numpy()
        stops = self._sampling.stops
        # a token that ends a response need not be one that decoding skips
        text = stops.decode(chosen[:-1].tolist() if ending == EOS else chosen.tolist())
        stop: Stop = "length"
        if ending == EOS:
            stop = "eos"
        elif ending == STOP_STRING:
            stop, text = "stop_string", stops.cut(text) or ""
        before = np.zeros(len(prompt.token_ids), dtype=np.float32)
        return Rollout(
            sample_id=sample_id,
            prompt=prompt,
            token_ids=np.concatenate([prompt.token_ids, chosen]),
            action_mask=np.concatenate([before != 0, np.ones(length, dtype=bool)]),
            logprobs=np.concatenate([before, decoded.logprobs[row, :length].numpy()]),
            policy_logprobs=np.concatenate([before, decoded.policy_logprobs[row, :length].numpy()]),
            completion=text,
            stop=stop,
            policy_version=version,
            states=None if decoded.states is None else decoded.states[row, :length].numpy(),
        )


def plan_batches(lengths: Sequence[int], *, num_generations: int, batch_size: int) -> list[list[Piece]]:
    """Split prompts x samples into batches of at most `batch_size` rows, prompts of similar length together.

    A prompt's samples share one pass over the prompt, so they stay together unless there are more than a batch.

    Example: plan_batches([5, 3], num_generations=2, batch_size=3) == [[(1, range(0, 2))], [(0, range(0, 2))]]
    """
    pieces = [
        (p, range(first, min(first + batch_size, num_generations)))
        for p in sorted(range(len(lengths)), key=lengths.__getitem__)
        for first in range(0, num_generations, batch_size)
    ]
    batches: list[list[Piece]] = []
    room = 0
    for piece in pieces:
        if len(piece[1]) > room:
            batches.append([])
            room = batch_size
        batches[-1].append(piece)
        room -= len(piece[1])
    return batches
