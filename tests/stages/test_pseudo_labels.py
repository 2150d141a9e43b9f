"""Votes of the model on its own prompts."""

from tests.stages.data.samples import char_tokenizer, make_rollout
from vrpo.config.rewards import ExactReward, MajorityNoise, RewardsConfig
from vrpo.config.tasks import ArithmeticTask
from vrpo.tasks import build_task
from vrpo.train.folder import RunFolder
from vrpo.train.pseudo_labels import majority_labels


class Engine:
    """Answers 7 to every prompt, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def generate(self, prompts, *, num_generations, step, policy_version, greedy=False, stream="sample"):
        self.asked += [prompt.prompt_id for prompt in prompts]
        return [make_rollout("7") for _ in range(len(prompts) * num_generations)]


def test_a_prompt_that_the_task_has_several_times_is_voted_on_once(tmp_path):
    task = build_task(
        ArithmeticTask(type="arithmetic", operations=("add",), min_digits=1, max_digits=1, size=2000),
        char_tokenizer(),
    )
    ids = [prompt.prompt_id for prompt in task.train_prompts()]
    assert len(set(ids)) < len(ids) == 2000
    config = RewardsConfig(functions=(ExactReward(),), noise=(MajorityNoise(votes=2),))
    engine = Engine()
    labels = majority_labels(config, engine, task, RunFolder(tmp_path))
    assert len(engine.asked) == len(set(ids)) and labels == dict.fromkeys(ids, "7")
    engine.asked.clear()
    assert majority_labels(config, engine, task, RunFolder(tmp_path)) == labels and not engine.asked  # kept
