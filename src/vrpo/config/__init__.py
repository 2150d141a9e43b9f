"""The configuration of a run: schema, presets, loading. Imports no torch."""

from vrpo.config.load import apply_overrides, build, filled_in, load, read_yaml, to_yaml
from vrpo.config.run import Config, SftConfig

__all__ = ["Config", "SftConfig", "apply_overrides", "build", "filled_in", "load", "read_yaml", "to_yaml"]
