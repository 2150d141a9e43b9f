"""A backbone with fewer layers: the lower ones, then the final norm."""

from typing import Any

import torch
from torch import nn

from vrpo.errors import ModelError


def keep_layers(backbone: Any, count: int) -> None:
    """Drop all but the `count` lowest decoder layers, in place; the model's configuration says so from then on.

    Raises:
        ModelError: the model has fewer layers, does not keep them in one list, or cannot do without the others.
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
    if getattr(config, "num_kv_shared_layers", None):
        # counted from the top: saved with fewer layers, other ones would share when it is loaded again
        raise ModelError(
            f"critic.layers={count}: upper layers of {type(backbone).__name__} read the keys of lower ones; set critic.layers: null"
        )
    setattr(backbone, lists[0], getattr(backbone, lists[0])[:count])
    try:
        config.num_hidden_layers = count
        if vars(config).get("layer_types") is not None:  # in other families it follows from the number
            config.layer_types = config.layer_types[:count]
        with torch.no_grad():
            backbone(input_ids=torch.zeros((1, 1), dtype=torch.long, device=backbone.device), use_cache=False)
    except Exception as error:  # each family fails in its own way
        reason = " ".join(str(error).split())[:100]
        raise ModelError(
            f"critic.layers={count}: {type(backbone).__name__} does not run with fewer layers ({type(error).__name__}: {reason}); set "
            "critic.layers: null"
        ) from error
