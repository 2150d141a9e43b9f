"""What the user wrote -> the token ids that the model reads."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vrpo.errors import DataError
from vrpo.tasks.data import first_line, shown
from vrpo.types import Message


def encode(
    prompt: str | Sequence[Message],
    tokenizer: Any,
    *,
    chat: bool | None,
    system_prompt: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> np.ndarray:
    """Token ids [P] int64 of one prompt, special tokens and the opening of the answer's turn included.

    Text is tokenised as it is, or with `chat` wrapped as one user message. Text that begins with the BOS token
    has its special tokens already, as a chat template writes them, and gets no more. Messages always need a chat
    template. `system_prompt` becomes the first message unless the messages bring their own.

    Args:
        prompt: text or chat messages.
        tokenizer: a Hugging Face tokenizer.
        chat: use the chat template; None decides by whether there is one.
        system_prompt: first message of a chat prompt.
        chat_template_kwargs: variables of the chat template, such as {"enable_thinking": False}.

    Raises:
        DataError: an empty prompt, or a combination that cannot be encoded.
    """
    if not len(prompt):
        raise DataError("the prompt is empty; give at least one character or message, or remove the row")
    texts = [prompt] if isinstance(prompt, str) else [text for message in prompt for text in message.values()]
    for text in (*texts, system_prompt or ""):
        _check_unicode(text)
    if isinstance(prompt, str) and not (tokenizer.chat_template is not None if chat is None else chat):
        for name, given in (("system_prompt", system_prompt), ("chat_template_kwargs", chat_template_kwargs)):
            if given:
                raise DataError(
                    f"{name} needs a chat prompt, but chat is off; set chat to true (task.chat in a file) or remove {name}"
                )
        bos = tokenizer.bos_token
        rendered = bool(bos) and prompt.startswith(bos)
        ids = tokenizer(prompt, add_special_tokens=not rendered, verbose=False)["input_ids"]
        if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and not prompt.endswith(tokenizer.eos_token):
            raise DataError(
                f"the tokenizer ends the prompt with {tokenizer.eos_token!r}, after which there is nothing to say; set add_eos_token: false "
                "in its tokenizer_config.json (tokenizer.add_eos_token = False in Python)"
            )
    else:
        if chat is False:
            raise DataError(
                "the prompt is chat messages, but chat=False; remove task.chat or write prompts as text"
            )
        if tokenizer.chat_template is None:
            raise DataError(
                "the prompt is a chat, but the tokenizer has no chat template; use an instruct model, or text prompts with "
                "task.chat: false"
            )
        messages = (
            [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
        )
        if system_prompt is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system_prompt})
        ids = _apply_template(messages, tokenizer, chat_template_kwargs or {})
    if not len(ids):
        raise DataError(f"the prompt {prompt!r:.60} has no tokens; write something the tokenizer knows")
    return np.asarray(ids, dtype=np.int64)


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"the prompt has half a character ({error.object[error.start]!a}) at place {error.start}, no tokenizer reads "
            "that; correct or remove the row"
        ) from error


def _apply_template(
    messages: list[dict[str, Any]], tokenizer: Any, variables: Mapping[str, Any]
) -> list[int]:
    # a chat that ends with the assistant's own words is gone on with: it has begun to answer
    begun = messages[-1]["role"] == "assistant"
    ours = {"add_generation_prompt": not begun, "continue_final_message": begun}
    ours |= {"tokenize": True, "return_dict": False}
    for name in variables:  # a template ignores what it does not know
        if name in ours or name not in str(tokenizer.chat_template):
            raise DataError(
                f"chat_template_kwargs holds {name!r}, which "
                + ("is set already" if name in ours else "this model's chat template does not read")
                + "; remove it, or correct its name"
            )
    try:
        return tokenizer.apply_chat_template(messages, **ours, **variables)
    # A template is a program: it refuses a conversation with jinja2's TemplateError, and may fail in any other way.
    except Exception as error:
        roles = [message["role"] for message in messages]
        raise DataError(
            f"the chat template refuses messages with roles {shown(roles)}: {first_line(error)}; reorder or remove messages"
        ) from error
