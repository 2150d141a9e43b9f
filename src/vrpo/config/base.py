"""The base of every configuration section."""

from pydantic import BaseModel, ConfigDict


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
