"""What a model object must be to be trained here: said in one line before anything is moved or copied."""

import tempfile
from typing import Any

from transformers import PreTrainedModel

from vrpo.errors import ModelError


def check_model(model: Any, tokenizer: Any, name: str) -> None:
    """Refuse what cannot be trained, sampled from or saved.

    Args:
        model: a causal language model of `transformers`, or a `peft` model around one.
        tokenizer: its tokenizer.
        name: what the user calls the model.

    Raises:
        ModelError: the first thing that is wrong.
    """
    from peft import PeftModel

    fits = isinstance(model, (PreTrainedModel, PeftModel)) and model.can_generate()
    if not fits or model.config.is_encoder_decoder:
        raise ModelError(
            f"the model is a {type(model).__name__}, a causal language model of transformers is needed; load it with "
            "AutoModelForCausalLM.from_pretrained"
        )
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ModelError(
            f"the tokenizer of {name!r} knows {len(tokenizer)} tokens but the model embeds {rows}; use the "
            "tokenizer that belongs to the model"
        )
    if getattr(model, "is_quantized", False):
        raise ModelError(
            f"{name!r} is quantised, and weights are trained in fp32; load it unquantised, and set model.lora if memory is short"
        )
    _check_generation_config(model, name)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        if getattr(model, "_hf_peft_config_loaded", False):
            raise ModelError(
                f"{name!r} is an adapter that transformers opened itself, frozen; download it and give its folder, or open it with "
                "peft.AutoPeftModelForCausalLM.from_pretrained(..., is_trainable=True)"
            )
        raise ModelError(f"no weight of {name!r} may be trained; set requires_grad on those to train")


def _check_generation_config(model: Any, name: str) -> None:
    """End tokens are numbers, and the settings can be written: else the first checkpoint would fail."""
    settings = model.generation_config
    listed = settings.eos_token_id
    wrong = [t for t in (listed if isinstance(listed, list) else [listed or 0]) if not isinstance(t, int)]
    if wrong:
        raise ModelError(
            f"generation_config.json of {name!r}: eos_token_id holds {wrong[0]!r:.60}, token numbers are needed; correct it"
        )
    with tempfile.TemporaryDirectory() as folder:
        try:
            settings.save_pretrained(folder)
        except ValueError as error:
            reason = " ".join(str(error).split())[:200]
            raise ModelError(
                f"the generation_config of {name!r} cannot be saved ({reason}); correct it, such as by do_sample=True"
            ) from error
