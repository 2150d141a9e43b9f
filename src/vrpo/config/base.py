"""The base of every configuration section."""

from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator

LARGEST = 2**63 - 1
"""Integers beyond this do not fit the machine's: no tensor, file or random stream could take them."""


class Strict(BaseModel):
    """A frozen section: unknown keys, silent type conversions, infinity and NaN are errors.

    The docstring under a field is its description: `vrpo explain` prints it. The default in the class
    is the only default of that setting in the package.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    @field_validator("*", mode="after")
    @classmethod
    def _fits_the_machine(cls, value: Any) -> Any:
        if isinstance(value, int) and abs(value) > LARGEST:
            raise ValueError(
                f"an integer of {value.bit_length()} bits does not fit into 64; give a smaller one"
            )
        return value
