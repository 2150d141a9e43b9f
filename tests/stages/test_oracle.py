"""The exact value of a state, against every possible way to go on."""

import numpy as np
import pytest
import torch

from tests.batches import make_batch
from tests.smoke.test_runs import run, small
from vrpo.errors import DataError
from vrpo.train.oracle import exact_values
from vrpo.types import Prompt, Rollout, ScoredRollout


def scored(batch, columns):
    """Records behind a batch; samples of a group share their prompt."""
    prompts = {
        int(g): Prompt(
            prompt_id=f"train/{int(g)}",
            prompt="?",
            token_ids=batch.input_ids[i, : int(batch.prompt_lengths[i])].numpy(),
            columns=columns,
        )
        for i, g in enumerate(batch.group_ids)
    }
    return [
        ScoredRollout(
            rollout=Rollout(
                sample_id=batch.sample_ids[i],
                prompt=prompts[int(g)],
                token_ids=np.array([1]),
                action_mask=np.array([True]),
                logprobs=np.zeros(1, np.float32),
                policy_logprobs=np.zeros(1, np.float32),
                completion="",
                stop="eos",
                policy_version=0,
            ),
            parts={},
            clean_reward=None,
            reward=None,
        )
        for i, g in enumerate(batch.group_ids)
    ]


def exact(policy, batch, columns=None, **settings):
    settings = {"column": "answer", "temperature": 1.0} | settings
    return exact_values(batch, scored(batch, columns or {"answer": "46"}), policy=policy, **settings)


@pytest.fixture
def case(make_policy):
    """A right response, one that leaves it at the second token, and one that is wrong from the start."""
    policy = make_policy("llama_tied")
    right = [*policy.tokenizer("46", add_special_tokens=False)["input_ids"], policy.tokenizer.eos_token_id]
    batch = make_batch(lengths=(3, 3, 2), scores=(0.9, 0.3, 0.1), groups=(0, 0, 0))
    ids = batch.input_ids.clone()
    ids[0, 2:5] = torch.tensor(right)
    ids[1, 2:5] = torch.tensor([right[0], right[0] + 1, right[2]])
    ids[2, 2:4] = torch.tensor([right[0] + 1, right[2]])
    return policy, batch.with_(input_ids=ids, clean_scores=torch.tensor([1.0, 0.0, 0.0]))


def chances(policy, ids, *, temperature=1.0):
    with torch.no_grad():
        logits = policy.causal_lm(input_ids=ids[None]).logits[0, :-1] / temperature
    return logits.log_softmax(-1).gather(1, ids[1:, None]).squeeze(1).exp()


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_value_is_the_chance_of_what_is_left_in_the_rewards_units(case, temperature):
    policy, batch = case
    done = exact(policy, batch, temperature=temperature)
    p = chances(policy, batch.input_ids[0], temperature=temperature)[1:4]
    low, high = 0.2, 0.9  # mean reward of the two wrong ones, and of the right one
    start, after_one, last = (low + (high - low) * float(p[k:].prod()) for k in range(3))
    expected = torch.zeros(3, 4)
    expected[0, 1:] = torch.tensor([start, after_one, last])
    expected[1, 1:] = torch.tensor([start, after_one, low])
    expected[2, 1:3] = torch.tensor([start, low])
    torch.testing.assert_close(done.values, expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(done.bootstrap, torch.zeros(3))


def test_values_are_martingales_under_the_policy(case):
    """The mean of the next state's value over all tokens is this state's: what makes its advantages right."""
    policy, batch = case
    vocabulary = policy.causal_lm.config.vocab_size
    many = make_batch(lengths=(3,) * vocabulary, scores=(1.0,) * vocabulary, groups=(0,) * vocabulary)
    ids = batch.input_ids[:1].repeat(vocabulary, 1)
    ids[:, 2] = torch.arange(vocabulary)
    clean = (torch.arange(vocabulary) == batch.input_ids[0, 2]).float()
    done = exact(policy, many.with_(input_ids=ids, clean_scores=clean, scores=clean))
    with torch.no_grad():
        first = policy.causal_lm(input_ids=ids[:1, :2]).logits[0, -1].softmax(-1)
    assert float((first * done.values[:, 2]).sum()) == pytest.approx(float(done.values[0, 1]), rel=1e-4)


def test_denoised_rewards_set_the_units_and_a_lack_of_right_ones_does_not_matter(case):
    policy, batch = case
    done = exact(policy, batch.with_(denoised=torch.tensor([0.5, 0.4, 0.4])))
    wrong_from_the_start = float(done.values[2, 2])
    assert wrong_from_the_start == pytest.approx(0.4)
    assert 0.4 < float(done.values[0, 3]) <= 0.5
    none_right = exact(policy, batch.with_(clean_scores=torch.zeros(3)))
    assert float(none_right.values.max()) <= 1.0


def test_a_row_without_the_right_response_is_named(case):
    policy, batch = case
    with pytest.raises(DataError, match=r"train/0 has no column 'work', there is .*; set critic\.oracle"):
        exact(policy, batch, column="work")


def test_a_row_without_the_right_response_is_named_before_the_run(tmp_path):
    def config(column):
        return small(algorithm="ppo", critic={"oracle": column}, train={"steps": 0, "eval_prompts": 1})

    run(config("answer"), tmp_path / "with")
    with pytest.raises(DataError, match=r"no column 'nothing', there is .*'answer'.*; set critic\.oracle"):
        run(config("nothing"), tmp_path / "without")
    assert not list((tmp_path / "without").glob("*.jsonl"))


def test_every_prompt_has_its_own_right_response(make_policy):
    policy = make_policy("llama_tied")
    batch = make_batch(lengths=(2, 2, 2, 2), scores=(1.0, 0.0, 1.0, 0.0))
    done = exact(policy, batch)
    alone = [
        exact(policy, batch.select(rows)).values for rows in (torch.tensor([0, 1]), torch.tensor([2, 3]))
    ]
    torch.testing.assert_close(done.values, torch.cat(alone), rtol=1e-4, atol=0.0)
    start = done.values[:, 1]
    assert start[0] == start[1] and start[2] == start[3] and start[0] != start[2]
