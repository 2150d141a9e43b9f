"""A value head on disk: `value_head.safetensors`, its weights, and `value_head.json`, what they are weights of.

    {"type": "bottleneck", "hidden_size": 128, "latent_dim": 16, "regression": "mse", "layers": 4, "units": [50.2, 49.8]}

`layers` is how many of the backbone the head reads, `units` what `functional.reward_units` found, null before it has.
"""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vrpo.errors import ModelError
from vrpo.functional import RewardUnits
from vrpo.models.heads import BottleneckHead, InformedHead, ScalarHead, ValueHead

HEAD_WEIGHTS, HEAD_SETTINGS = "value_head.safetensors", "value_head.json"


def save_head(head: ValueHead, folder: Path, *, units: RewardUnits | None, layers: int | None) -> None:
    """Write both files.

    Args:
        head: the head.
        folder: exists.
        units: of the head's outputs; None while they are not known.
        layers: of the critic's own backbone; None where it has none.
    """
    save_file({k: v.detach().cpu().contiguous() for k, v in head.state_dict().items()}, folder / HEAD_WEIGHTS)
    settings: dict[str, Any] = _settings(head)
    if layers is not None:
        settings["layers"] = layers
    settings["units"] = units
    (folder / HEAD_SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def load_head(head: ValueHead, folder: Path) -> RewardUnits | None:
    """Fill `head` with the weights saved in `folder`, which must be of the same kind and size; the units of its outputs.

    Raises:
        ModelError: they are of another head, or cannot be read.
    """
    saved, wanted = saved_settings(folder), _settings(head)
    saved.pop("layers", None)
    if "features" in saved and "source" in wanted:  # not written by earlier versions
        saved.setdefault("source", wanted["source"])
    try:
        units = saved.pop("units", RewardUnits())  # earlier versions had none
        units = None if units is None else RewardUnits(*map(float, units))
        weights = load_file(folder / HEAD_WEIGHTS)
    except (OSError, SafetensorError, TypeError, ValueError) as error:
        raise _unreadable(folder, error) from error
    if saved != wanted:
        raise ModelError(
            f"the value head in {str(folder)!r} is {saved}, but critic.head and the backbone ask for {wanted}; make "
            "critic.head agree, or delete the value_head files to start with a fresh head"
        )
    head.load_state_dict(weights)
    return units


def saved_settings(folder: Path) -> dict[str, Any]:
    """What `save_head` wrote of a head and its backbone.

    Raises:
        ModelError: it cannot be read.
    """
    try:
        saved = json.loads((folder / HEAD_SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unreadable(folder, error) from error
    if not isinstance(saved, dict):
        raise _unreadable(folder, f"{HEAD_SETTINGS} is no object")
    return saved


def _settings(head: ValueHead) -> dict[str, str | int]:
    match head:
        case InformedHead():
            return {
                **_settings(head.head),
                "features": head.branch.inner.in_features,
                "source": head.source,
            }
        case ScalarHead():
            kind = "scalar"
        case BottleneckHead():
            kind = "bottleneck"
    return {
        "type": kind,
        "hidden_size": head.hidden_size,
        "latent_dim": head.latent_dim,
        "regression": head.regression,
    }


def _unreadable(folder: Path, why: object) -> ModelError:
    return ModelError(
        f"the value head in {str(folder)!r} cannot be read: {why}; save the critic again, or give another folder"
    )
