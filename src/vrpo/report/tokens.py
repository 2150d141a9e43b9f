"""What the critic saw: responses of a few steps, each token coloured by the value before it, or without a critic by its advantage."""

import html
from collections.abc import Sequence
from typing import Any

from vrpo.report.read import Line, Record

PROMPT_END = 160
"""Characters of a prompt's end that are shown."""
HIGH, LOW = "11, 110, 153", "217, 115, 13"
"""Colours of much and of little."""
STYLE = """
.tokens td { text-align: left; white-space: pre-wrap; vertical-align: top; max-width: 40rem } .tokens span { border-radius: 2px; padding: 0 1px }
.tokens .prompt { color: #666; max-width: 22rem }
"""


def transcripts(record: Record) -> list[str]:
    """A heading, a table for each step that is shown, and how to read them; nothing for runs of an earlier version."""
    lines = record.responses
    if not lines:
        return []
    column = "value" if any("value" in line["by_token"] for line in lines) else "advantage"
    numbers = [x for line in lines for x in line["by_token"].get(column, ())]
    scale = _Scale(numbers)
    tables = [
        _table(step, [line for line in lines if line["step"] == step], column, scale)
        for step in sorted({line["step"] for line in lines})
    ]
    what = "the critic's value before it" if column == "value" else "its advantage"
    caption = (
        f"Each token is coloured by {what}, from {scale.low:.2f} (orange) over {scale.middle:.2f} (white) to {scale.high:.2f} (blue); point "
        "at one for its numbers. seen: the reward of the function with noise; clean: the verdict that is trusted; learned: what a denoiser "
        "made of the seen reward."
    )
    heading = "What the critic saw" if column == "value" else "What was learned from"
    return [
        f"<h2>{heading}, {html.escape(record.name)}</h2>\n<p class=caption>{html.escape(caption)}</p>",
        *tables,
    ]


class _Scale:
    """From a number to a background: white in the middle of the numbers, full colour at their 2nd and 98th percentile."""

    def __init__(self, numbers: Sequence[float]) -> None:
        ordered = sorted(numbers)
        self.low, self.middle, self.high = (ordered[round(q * (len(ordered) - 1))] for q in (0.02, 0.5, 0.98))

    def css(self, number: float) -> str:
        """The style of a token."""
        colour, width = (
            (HIGH, self.high - self.middle) if number >= self.middle else (LOW, self.middle - self.low)
        )
        strength = min(abs(number - self.middle) / width, 1.0) if width > 0 else 0.0
        return f"background: rgba({colour}, {0.75 * strength:.2f})"


def _table(step: int, lines: Sequence[Line], column: str, scale: _Scale) -> str:
    learned = any("denoised" in line["by_token"] for line in lines)
    headings = ("prompt", "response", "seen", "clean", *["learned"] * learned)
    head = "".join(f"<th>{heading}</th>" for heading in headings)
    rows = "\n".join(_row(line, column, scale, learned=learned) for line in lines)
    return f"<h3>step {step}</h3>\n<div class=wide><table class=tokens><thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>"


def _row(line: Line, column: str, scale: _Scale, *, learned: bool) -> str:
    by_token = line["by_token"]
    numbers = [line["reward"], line["clean_reward"], *[by_token.get("denoised")] * learned]
    cells = "".join(f"<td>{'-' if x is None else f'{x:.2f}'}</td>" for x in numbers)
    tokens = "".join(_token(by_token, place, column, scale) for place in range(len(by_token["text"])))
    return f"<tr><td class=prompt>{html.escape(_end_of(line['prompt']))}</td><td>{tokens}</td>{cells}</tr>"


def _token(by_token: dict[str, Any], place: int, column: str, scale: _Scale) -> str:
    known = [
        f"{name} {by_token[name][place]:+.3f}"
        for name in ("value", "advantage", "surprisal")
        if name in by_token
    ]
    css = scale.css(by_token[column][place]) if column in by_token else ""
    text = html.escape(by_token["text"][place]).replace("\n", "↵\n")
    return f'<span style="{css}" title="{", ".join(known)}">{text}</span>'


def _end_of(prompt: Any) -> str:
    text = prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
    return text if len(text) <= PROMPT_END else f"... {text[-PROMPT_END:]}"
