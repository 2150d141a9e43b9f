"""What naming an algorithm implies for the other sections.

A preset is merged *under* the user's settings: whatever the user wrote wins, and the resolved
`config.yaml` of a run shows the outcome.
"""

from typing import Any

from pydantic import BaseModel

PRESETS: dict[str, dict[str, Any]] = {
    "ppo": {"critic": {}},
    "vrpo": {"critic": {"head": {"type": "bottleneck"}, "semantic": {"mode": "literal"}}},
    "grpo": {"critic": None},
}


def spelled_out(data: dict[str, Any]) -> dict[str, Any]:
    """`algorithm: ppo` as `algorithm: {type: ppo}`, so that settings can be merged into it."""
    algorithm = data.get("algorithm")
    return {**data, "algorithm": {"type": algorithm}} if isinstance(algorithm, str) else data


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`; mappings merge key by key, except across different `type`s."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(value, dict) and isinstance(below, dict):
            same_type = "type" not in value or value["type"] == below.get("type", value["type"])
            merged[key] = merge(below, value) if same_type else value
        else:
            merged[key] = value
    return merged


def _as_settings(value: Any) -> Any:
    """A section built in Python as the mapping its user wrote: what was set, and its type."""
    if not isinstance(value, BaseModel):
        return value
    names = value.model_fields_set | ({"type"} & set(type(value).model_fields))
    return {name: _as_settings(getattr(value, name)) for name in names}


def with_preset(data: dict[str, Any]) -> dict[str, Any]:
    """The raw configuration with the preset of its algorithm underneath."""
    data = spelled_out(data)
    algorithm = data.get("algorithm", {})
    if isinstance(algorithm, dict):
        algorithm = {"type": "vrpo", **algorithm}
    data = {key: _as_settings(value) for key, value in data.items()}
    name = algorithm["type"] if isinstance(algorithm, dict) else getattr(algorithm, "type", None)
    return merge(PRESETS.get(str(name), {}), {**data, "algorithm": algorithm})
