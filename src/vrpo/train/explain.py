"""`vrpo explain`: a setting or a metric, in words."""

import difflib

from vrpo.config.describe import all_keys, describe, sft_keys
from vrpo.config.elsewhere import OUR_NAMES
from vrpo.errors import ConfigError
from vrpo.train.catalogue import EVALUATIONS, METRICS, explain_metric


def explain(name: str) -> str:
    """What a setting takes (of a section: each of its settings), or how a metric is computed and read.

    Raises:
        ConfigError: it is neither; the nearest name is in the message.
    """
    found = explain_metric(name)
    if found is not None:
        metric, doc = found
        return f"{metric}\n  formula  {doc.formula}\n  healthy  {doc.healthy}\n  smell    {doc.smell}"
    key = ".".join(part for part in name.split(".") if not part.isdigit())
    docs = describe(key) or [doc for doc in (*all_keys(), *sft_keys()) if doc.key.startswith(f"{key}.")]
    if not docs:
        raise ConfigError(f"{name!r} is neither a setting nor a metric{_nearest(name)}")
    entries = []
    for entry in docs:
        where = f" (type: {entry.section})" if entry.section else ""
        bounds = f", {entry.bounds}" if entry.bounds else ""
        entries.append(
            f"{entry.key}{where}\n  {entry.doc}\n  takes    {entry.type}{bounds}\n  default  {entry.default}"
        )
    return "\n".join(entries)


def _nearest(name: str) -> str:
    if name in OUR_NAMES:
        return f"; here that is {OUR_NAMES[name]!r}"
    known = [*dict.fromkeys(doc.key for doc in (*all_keys(), *sft_keys())), *METRICS, *EVALUATIONS]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    guess = [key for key in known if key.split(".")[-1] == name] or near
    if not guess:
        return "; docs/metrics.md and docs/config.md list them all"
    return f"; did you mean {' or '.join(map(repr, guess))}?"
