"""How many cases a property gets, and the values that all properties draw from.

`VRPO_FUZZ_CASES` is the number of cases of all properties together; `make fuzz N=10000` sets it. By default
the cases are few and the same in every run; when it is set they are new in every run.
"""

import os
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

DEFAULT = 800
"""Cases of all properties together in an ordinary test run."""
TOTAL = int(os.environ.get("VRPO_FUZZ_CASES", DEFAULT))


def fuzz(percent: int) -> Callable[..., Any]:
    """Settings of a property that gets this share of all cases."""
    return settings(
        max_examples=max(1, -(-TOTAL * percent // 100)),
        deadline=None,
        derandomize="VRPO_FUZZ_CASES" not in os.environ,
        database=None,  # a failing case is printed whole; nothing is left in the folder
        print_blob=True,
        # whole configurations are large, and what is refused is a case like any other
        suppress_health_check=[
            HealthCheck.too_slow,
            HealthCheck.data_too_large,
            HealthCheck.large_base_example,
        ],
    )


def one_line(message: str) -> bool:
    """Whether a message is a single line that says something, however a line may be broken."""
    return bool(message.strip()) and len(message.splitlines()) == 1


def nested(depth: int) -> Any:
    """A list in a list in a list ..."""
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


SURROGATES = st.text(st.characters(categories=["Cs", "Lu", "Cc", "Zl", "Zp"]), min_size=1, max_size=4)
TEXTS = st.one_of(
    st.text(max_size=12),
    SURROGATES,
    st.sampled_from(
        ["", " ", "\x00", "\n", "{", "{problem}", "[red]", ":smile:", "~", ".", "/", "null", "x" * 5000]
    ),
)
INTEGERS = st.one_of(
    st.integers(-3, 40),
    st.sampled_from([2**31, 2**53 + 1, 2**63 - 1, 2**63, -(2**63) - 1, 10**19, 10**400, -(10**400)]),
)
FLOATS = st.one_of(
    st.floats(-2.0, 2.0),
    st.sampled_from([5e-324, 1e-300, 1e300, 3.5e38, float("inf"), float("-inf"), float("nan"), -0.0]),
)
SCALARS = st.one_of(st.none(), st.booleans(), INTEGERS, FLOATS, TEXTS)
KEYS = st.one_of(
    TEXTS, st.sampled_from(["type", "prompt", "steps"]), st.integers(-2, 3), st.booleans(), st.none()
)
VALUES = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=3),
    st.dictionaries(KEYS, SCALARS, max_size=3),
    st.recursive(
        SCALARS,
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(KEYS, inner, max_size=2),
        max_leaves=6,
    ),
)
