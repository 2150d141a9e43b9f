"""When a response ends: an end token, a stop text, or the length limit."""

from collections.abc import Sequence
from typing import Any, final

from vrpo.errors import ConfigError

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What a decoder writes for bytes that are no character."""


def end_tokens(tokenizer: Any, texts: Sequence[str]) -> dict[str, int]:
    """Of stop texts, those that are a special token (`<|im_end|>`): text -> token id. Such a token ends a response as EOS does, since
    no decoded text shows it.

    Raises:
        ConfigError: a stop text holds a special token among other text, where nothing would ever find it.
    """
    special = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    special |= {
        str(token): number for number, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    for text in texts:
        held = next((token for token in special if token in text), None)
        if held is not None and text not in special:
            raise ConfigError(
                f"rollout.stop holds {text!r}, in which {held!r} is a special token that no text shows; give {held!r} by itself, or text "
                "without it"
            )
    return {text: special[text] for text in texts if text in special}


@final
class StopStrings:
    """Finds stop texts in the tokens sampled so far.

    Args:
        tokenizer: turns tokens into text.
        texts: what ends a response; none is the usual case and costs nothing.
    """

    def __init__(self, tokenizer: Any, texts: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._texts = tuple(texts)
        # a token is at least one byte of text, so a stop text that has just ended lies in this many last tokens;
        # a few more, since a token may be special and give no text
        self.tail = max((len(text.encode()) for text in self._texts), default=0) + 4

    def __bool__(self) -> bool:
        return bool(self._texts)

    def may_end(self, last: Sequence[int]) -> bool:
        """Whether a response may contain a stop text since its last token; `found` confirms it.

        A tail can decode to other text than the whole (a leading space, half a character). Where it begins in the middle of a
        character some tokenizers read the characters after it as broken too, so that only the whole can say.

        Args:
            last: its last `tail` tokens, or all if it has fewer.
        """
        text = self.decode(last)
        return REPLACEMENT in text or any(stop in text for stop in self._texts)

    def found(self, token_ids: Sequence[int]) -> bool:
        """Whether the text of a response contains a stop text."""
        return self.cut(self.decode(token_ids)) is not None

    def cut(self, text: str) -> str | None:
        """`text` up to the first stop text; None when there is none."""
        starts = [start for stop in self._texts if (start := text.find(stop)) >= 0]
        return text[: min(starts)] if starts else None

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text without special tokens, nothing tidied."""
        return str(
            self._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )
