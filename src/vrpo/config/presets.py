"""What naming an algorithm implies for the other sections.

A preset is merged *under* the user's settings: whatever the user wrote wins, and the resolved
`config.yaml` of a run shows the outcome.
"""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "ppo": {"critic": {}},
    "vrpo": {"critic": {"head": {"type": "bottleneck"}, "semantic": {"mode": "literal"}}},
    "grpo": {"critic": None},
}


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


def with_preset(data: dict[str, Any]) -> dict[str, Any]:
    """The raw configuration with the preset of its algorithm underneath."""
    algorithm = data.get("algorithm", "vrpo")
    if isinstance(algorithm, str):
        algorithm = {"type": algorithm}
    elif isinstance(algorithm, dict):
        algorithm = {"type": "vrpo", **algorithm}
    name = algorithm["type"] if isinstance(algorithm, dict) else getattr(algorithm, "type", None)
    return merge(PRESETS.get(str(name), {}), {**data, "algorithm": algorithm})
