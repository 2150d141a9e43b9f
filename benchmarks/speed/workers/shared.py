"""What every worker does the same way. Imports neither vrpo nor a peer."""

import importlib.metadata
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def begin() -> dict[str, Any]:
    """The job from the command line; call it before torch is imported, for the number of threads."""
    job = {"device": "cpu"} | json.loads(sys.argv[1])
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(job["threads"]),
    }
    import torch

    torch.set_num_threads(job["threads"])
    job["prompts"] = json.loads(Path(job["prompts"]).read_text(encoding="utf-8"))
    return job


def even(texts: list[str]) -> list[float]:
    """A reward that costs next to nothing: the share of characters with an even code.

    The same in every worker; it must differ between responses, or there is nothing to learn from.
    """
    rewards = [sum(code % 2 == 0 for code in text.encode()) / max(len(text.encode()), 1) for text in texts]
    assert len(set(rewards)) > 1 or len(texts) == 1, "the reward is the same for every response"
    return rewards


def tokenizer_of(job: dict[str, Any], *, endless: bool = True, **settings: Any) -> Any:
    """The folder's tokenizer as it is written there (AutoTokenizer would go by the type of the model).

    `endless` gives it an end token that the model does not have, so that every response has the full length.
    """
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(job["model"], **settings)
    if endless:
        tokenizer.add_special_tokens({"eos_token": "<never drawn>"})
    for prompt in job["prompts"]:
        assert len(tokenizer(prompt)["input_ids"]) == job["prompt_tokens"], "a prompt is read as other tokens"
    return tokenizer


def never_ending(model: Any, tokenizer: Any) -> Any:
    """The model, told the tokenizer's end token, which it cannot draw; its settings would name its own."""
    assert tokenizer.eos_token_id >= model.config.vocab_size, "the end token can be drawn"
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


def phase_seconds(device: str) -> Callable[[], float]:
    """What phases are timed with: the processor's seconds, or on a GPU those of the wall once it has nothing left to do."""
    if device == "cpu":
        return time.process_time
    import torch

    def seconds() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return seconds


class Stopwatch:
    """Processor and wall seconds of each step, and of phases inside."""

    def __init__(self, device: str = "cpu") -> None:
        self._device = device
        self._seconds = phase_seconds(device)
        self._marks: list[tuple[float, float, dict[str, float]]] = []
        self._phases: dict[str, float] = {}

    def mark(self, phases: dict[str, float] | None = None) -> None:
        """A step is over; `phases` are its parts, for workers that are told them."""
        self._seconds()  # a GPU is to have ended the step
        self._marks.append((time.process_time(), time.perf_counter(), self._phases | (phases or {})))
        self._phases = {}

    def timed(self, name: str, function: Any) -> Any:
        """`function`, its seconds (`phase_seconds`) counted under `name`."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            start = self._seconds()
            try:
                return function(*args, **kwargs)
            finally:
                self._phases[name] = self._phases.get(name, 0.0) + self._seconds() - start

        return wrapped

    def report(self, job: dict[str, Any], packages: list[str]) -> None:
        """One JSON line: seconds of every step after the warm-up, peak memory, versions."""
        pairs = list(zip(self._marks, self._marks[1:], strict=False))[job["warmup"] :]
        assert len(pairs) == job["steps"], f"{len(pairs)} steps were timed, {job['steps']} asked for"
        print(
            json.dumps(
                {
                    "cpu": [b[0] - a[0] for a, b in pairs],
                    "wall": [b[1] - a[1] for a, b in pairs],
                    "phases": [b[2] for _, b in pairs],
                    "tokens": len(job["prompts"]) * job["group"] * job["new_tokens"],
                    **self._peaks(),
                    "versions": {name: version(name) for name in packages},
                }
            )
        )

    def _peaks(self) -> dict[str, int]:
        """Most bytes of this process, or on a GPU of its tensors, and what was reserved for them."""
        if self._device == "cpu":
            return {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
        import torch

        return {
            "peak_bytes": torch.cuda.max_memory_allocated(),
            "peak_bytes_reserved": torch.cuda.max_memory_reserved(),
        }


def version(package: str) -> str | None:
    """A package's version; None where it is only on the search path."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
