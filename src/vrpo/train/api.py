"""The Python interface: `vrpo.train` for a configuration, `vrpo.Trainer` for your own objects."""

from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, final

from vrpo.config import Config, load
from vrpo.config.run import ModelConfig
from vrpo.errors import ConfigError
from vrpo.models import load_policy, load_tokenizer, policy_from_model
from vrpo.rewards import NamedFunction, named
from vrpo.tasks import task_from_rows
from vrpo.train.files import storing
from vrpo.train.loop import train as run_loop
from vrpo.train.progress import Display, Terminal
from vrpo.train.run import Ingredients, Resume, Run, build_run, load_ingredients
from vrpo.types import EvalResult

RewardFunction = Callable[..., Any] | NamedFunction
"""A function with TRL's signature, or what `vrpo.rewards.named` made of one."""


def train(
    config: Config | str | Path,
    *,
    out: str | Path,
    overrides: Sequence[str] = (),
    resume: bool = False,
    checkpoint: int | None = None,
    allow_changes: bool = False,
    display: Display | None = None,
) -> dict[str, Any]:
    """Train what a configuration describes.

    Args:
        config: a `vrpo.Config`, or the path of a YAML file or recipe folder.
        out: the run folder.
        overrides: `"a.b=value"` settings on top of a file.
        resume: go on with the run in `out` from where it stopped.
        checkpoint: with `resume`, go on from this step's checkpoint instead; later ones are deleted.
        allow_changes: with `resume`, go on although the configuration or the data is another one.
        display: told about progress; a terminal bar when None.

    Returns:
        The content of summary.json.

    Raises:
        vrpo.errors.VrpoError: the input is wrong, or the numbers went bad; one line says what and how to mend it.
    """
    if isinstance(overrides, str):
        raise ConfigError(f"overrides={overrides!r} is one text; give a list such as [{overrides!r}]")
    if isinstance(config, Config) and overrides:
        raise ConfigError(
            f"overrides={list(overrides)} are for a file, and config is a vrpo.Config already; set them there"
        )
    if not isinstance(config, Config):
        if not isinstance(config, (str, Path)):
            raise ConfigError(
                f"config={config!r:.60} is no configuration; give a path, or vrpo.Config(**settings)"
            )
        config = load(Config, config, list(overrides))
    how = _resume(resume, checkpoint, allow_changes)
    run = build_run(config, load_ingredients(config), out=Path(out), resume=how)
    return run_loop(run, display or Terminal())


@final
class Trainer:
    """Train a model on your rows with your reward functions.

    Example:
        def brevity(prompts, completions, **columns):
            return [1.0 if len(c) < 80 else 0.0 for c in completions]

        trainer = vrpo.Trainer(model="Qwen/Qwen2.5-0.5B-Instruct", reward_funcs=[brevity],
                               train_dataset=rows, config=vrpo.Config(algorithm="vrpo"))
        trainer.train()

    Args:
        model: a hub name, a folder, or a loaded `transformers` causal language model (trained in place).
        reward_funcs: one function or several with TRL's signature,
            f(prompts, completions, **columns) -> list[float | None], plain or async; or what
            `vrpo.rewards.named(f, timeout=..., isolation="process", ...)` made of one.
        train_dataset: a `datasets.Dataset` or a list of dicts with a `prompt` column (text or chat messages);
            the other columns reach the reward functions by name.
        eval_dataset: held-out rows; None holds out a share of `train_dataset`.
        holdout: that share, between 0 and 1, chosen by a hash of the prompt.
        config: everything else. `model.path` gives way to `model` (and names the tokenizer of a model object);
            `task` and `rewards.functions` must be left out, since rows and functions are given here.
        processing_class: the tokenizer; None loads the one that belongs to `model`.
        reward_weights: one weight per function; None weighs each 1.
        gold_funcs: one function or several of the same kind that you trust, where you do not trust `reward_funcs`: evaluations and
            the metrics of noise go by their sum, and nothing learns from them. None: by `reward_funcs`.
        chat: put text prompts through the tokenizer's chat template; None: where it has one. False for a base model that has one.
        system_prompt: first message of prompts that go through the chat template.
        chat_template_kwargs: what the template is told besides, such as {"enable_thinking": False} for Qwen 3.
        max_prompt_tokens: rows with longer prompts are dropped and counted; None keeps all.
        output_dir: the run folder.

    Raises:
        vrpo.errors.VrpoError: what was given does not fit together; one line says what and how to mend it.
    """

    def __init__(
        self,
        model: Any,
        reward_funcs: RewardFunction | Sequence[RewardFunction],
        train_dataset: Any,
        *,
        eval_dataset: Any = None,
        holdout: float = 0.1,
        config: Config | None = None,
        processing_class: Any = None,
        reward_weights: Sequence[float] | None = None,
        gold_funcs: RewardFunction | Sequence[RewardFunction] | None = None,
        chat: bool | None = None,
        system_prompt: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        max_prompt_tokens: int | None = None,
        output_dir: str | Path = "runs/vrpo",
    ) -> None:
        config = Config() if config is None else config
        functions = _as_list(reward_funcs)
        gold = () if gold_funcs is None else _as_list(gold_funcs)
        _check_arguments(config, functions, reward_weights, gold)
        _check_holdout(holdout)
        _check_kinds(model, output_dir, max_prompt_tokens)
        weights = [1.0] * len(functions) if reward_weights is None else reward_weights
        if reward_weights is not None and any(isinstance(f, NamedFunction) for f in functions):
            raise ConfigError(
                "reward_weights are given and so are functions made by named(...), which have their own; pass weight=... there"
            )
        model = str(model) if isinstance(model, Path) else model
        name = model if isinstance(model, str) else str(getattr(model, "name_or_path", type(model).__name__))
        settings = config.model or ModelConfig(path=name)
        seed = config.train.seed
        if isinstance(model, str):
            settings = settings.model_copy(update={"path": model})
            policy = load_policy(settings, seed=seed, tokenizer=processing_class)
        else:
            tokenizer = load_tokenizer(settings) if processing_class is None else processing_class
            policy = policy_from_model(model, tokenizer, config=settings, seed=seed)
        self.config = config.model_copy(update={"model": settings})
        self._ingredients = Ingredients(
            policy=policy,
            task=task_from_rows(
                train_dataset,
                eval_dataset,
                policy.tokenizer,
                holdout=holdout,
                chat=chat,
                system_prompt=system_prompt,
                chat_template_kwargs=chat_template_kwargs,
                max_prompt_tokens=max_prompt_tokens,
            ),
            functions=[
                f if isinstance(f, NamedFunction) else named(f, weight=w)
                for f, w in zip(functions, weights, strict=True)
            ],
            gold=[f if isinstance(f, NamedFunction) else named(f) for f in gold],
        )
        self._out = Path(output_dir)
        self._run: Run | None = None

    def train(
        self,
        *,
        resume: bool = False,
        checkpoint: int | None = None,
        allow_changes: bool = False,
        display: Display | None = None,
    ) -> dict[str, Any]:
        """Train to the last step; the content of summary.json. The arguments are those of `vrpo.train`.

        Raises:
            ConfigError: this trainer has trained already: its model is no longer the initial one, which critic
                and reference are copies of.
        """
        if self._run is not None:
            raise ConfigError(
                "this Trainer has trained already; make a new one from the initial model to train or resume"
            )
        how = _resume(resume, checkpoint, allow_changes)
        self._run = build_run(self.config, self._ingredients, out=self._out, resume=how)
        return run_loop(self._run, display or Terminal())

    def evaluate(self) -> EvalResult:
        """Clean reward of the trained model on the held-out rows."""
        if self._run is None:
            raise ConfigError("evaluate comes after train; call train first")
        try:
            return self._run.evaluate()
        finally:
            self._run.close()  # an isolated reward function has started its process again

    def save_model(self, folder: str | Path) -> None:
        """The policy as an ordinary Hugging Face folder.

        Raises:
            StorageError: it cannot be written.
        """
        folder = Path(folder)
        with storing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._ingredients.policy.save_pretrained(folder)


def _resume(resume: bool, checkpoint: int | None, allow_changes: bool) -> Resume | None:
    if not resume and (checkpoint is not None or allow_changes):
        raise ConfigError("a checkpoint or allowed changes are for a run that goes on; add --resume")
    return Resume(step=checkpoint, allow_changes=allow_changes) if resume else None


def _as_list(functions: Any) -> Any:
    """One function as a list of it; whatever else it is, `_check_arguments` looks at."""
    return [functions] if callable(functions) or isinstance(functions, NamedFunction) else functions


def _check_kinds(model: object, output_dir: object, max_prompt_tokens: object) -> None:
    if model is None or isinstance(model, type):
        raise ConfigError(f"model={model!r:.60} is no model; give a hub name, a folder or a loaded model")
    if not isinstance(output_dir, (str, Path)) or not str(output_dir):
        raise ConfigError(f'output_dir={output_dir!r:.60} names no folder; give one, or "." for this one')
    if max_prompt_tokens is not None and (type(max_prompt_tokens) is not int or max_prompt_tokens < 1):
        raise ConfigError(
            f"max_prompt_tokens={max_prompt_tokens!r:.60} is no number of tokens; give a whole one from 1, or None to keep all rows"
        )


def _check_holdout(holdout: float) -> None:
    if not isinstance(holdout, Real) or not 0.0 < holdout < 1.0:
        raise ConfigError(f"holdout={holdout!r} is no share between 0 and 1; give one, or an eval_dataset")


def _check_arguments(config: object, functions: object, weights: object, gold: object = ()) -> None:
    """Raise ConfigError for what a signature does not catch."""
    if not isinstance(config, Config):
        raise ConfigError(
            f"config={config!r:.60} is no vrpo.Config; pass vrpo.Config(...), or use vrpo.train for a file"
        )
    for name, given in (("reward_funcs", functions), ("gold_funcs", gold)):
        if not isinstance(given, Sequence) or not all(
            callable(f) or isinstance(f, NamedFunction) for f in given
        ):
            raise ConfigError(f"{name}={given!r:.60} holds no functions; pass one function or a list of them")
    if not functions:
        raise ConfigError("reward_funcs=[] holds no functions; pass one function or a list of them")
    assert isinstance(functions, Sequence)
    if weights is not None and not isinstance(weights, Sequence):
        raise ConfigError(
            f"reward_weights={weights!r:.60} of type {type(weights).__name__}; give a list of one weight per function"
        )
    if weights is not None and len(weights) != len(functions):
        raise ConfigError(
            f"reward_weights={weights!r:.60} for {len(functions)} reward_funcs; give a list of one weight each"
        )
    if config.task is not None or config.rewards.functions:
        name = "task" if config.task is not None else "rewards.functions"
        raise ConfigError(
            f"vrpo.Trainer is given rows and reward functions; remove `{name}` from its config, or use vrpo.train"
        )
