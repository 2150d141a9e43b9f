"""A backbone with fewer layers: the lower ones, then the final norm."""

from typing import Any

from torch import nn

from vrpo.errors import ModelError


def keep_layers(backbone: Any, count: int) -> None:
    """Drop all but the `count` lowest decoder layers, in place; the model's configuration says so from then on.

    Raises:
        ModelError: the model has fewer layers, or does not keep them in one list.
    """
    config = backbone.config.get_text_config(decoder=True)
    depth = config.num_hidden_layers
    if count > depth:
        raise ModelError(
            f"critic.layers={count}, but {type(backbone).__name__} has {depth} layers; give at most {depth}, or null for all"
        )
    lists = [
        name
        for name, child in backbone.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == depth
    ]
    if len(lists) != 1:
        raise ModelError(
            f"critic.layers={count}: {type(backbone).__name__} does not keep its layers in one list; set critic.layers: null"
        )
    setattr(backbone, lists[0], getattr(backbone, lists[0])[:count])
    config.num_hidden_layers = count
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = config.layer_types[:count]
