"""YAML and overrides to a validated configuration; every mistake is one line with value, rule and fix."""

import difflib
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from vrpo.config.base import Strict
from vrpo.config.elsewhere import OUR_NAMES
from vrpo.errors import ConfigError

ConfigT = TypeVar("ConfigT", bound=Strict)

_NOT_A_VALUE = (ValueError, LookupError, ArithmeticError, AttributeError, TypeError, RecursionError)
"""What PyYAML lets out for dates and numbers that are none, tags on nothing, and brackets without end."""


def read_yaml(path: str | Path) -> dict[Any, Any]:
    """The mapping in a YAML file."""
    path = Path(path)
    try:
        path = path / "config.yaml" if path.is_dir() else path
        found = path.is_file()
    except (OSError, ValueError):  # a name that no file can have: too long, or with a NUL in it
        found = False
    if not found:
        raise ConfigError(
            f"no configuration file at {_short(str(path), limit=300)}; give the path of a YAML file or of a folder with a config.yaml"
        )
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" at line {where.line + 1}" if where else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise ConfigError(f"{path} is not valid YAML{line}: {problem}; fix that line") from error
    except _NOT_A_VALUE as error:
        raise ConfigError(
            f"{path} holds a value that cannot be read: {error}; quote it, or correct it"
        ) from error
    if not isinstance(data, dict):
        raise ConfigError(
            f"{path} holds {type(data).__name__}, not a mapping; a configuration starts with keys such as `model:`"
        )
    return data


def apply_overrides(data: dict[Any, Any], overrides: list[str]) -> dict[str, Any]:
    """`a.b=value` on top of `data`; the value is read as YAML."""
    _check_keys(data, (), ())
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not all(key.split(".")):
            raise ConfigError(
                f"--set {_short(item)} is not KEY=VALUE; write for example --set train.steps=100"
            )
        try:
            value = yaml.load(text, Loader=_Loader)
        except (yaml.YAMLError, *_NOT_A_VALUE) as error:
            raise ConfigError(f"--set {_short(item)}: the value is not valid YAML; quote it") from error
        if _has_comment(text):
            raise ConfigError(
                f"--set {_short(item)}: YAML takes what follows a # for a comment and drops it; quote the value, --set '{key}=\"...\"'"
            )
        _check_keys(value, tuple(key.split(".")), ())
        data = _set(data, key.split("."), value, key)
    return data


def _has_comment(text: str) -> bool:
    """Whether YAML drops part of a value: a # that lies between tokens, not in one."""
    tokens = list(yaml.scan(text, Loader=_Loader)) if "#" in text else []
    return any("#" in text[a.end_mark.index : b.start_mark.index] for a, b in pairwise(tokens))


def build(schema: type[ConfigT], data: dict[str, Any]) -> ConfigT:
    """The validated configuration."""
    _check_keys(data, (), ())
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        raise ConfigError(explain_validation(schema, error)) from error


def load(schema: type[ConfigT], path: str | Path, overrides: list[str] | None = None) -> ConfigT:
    """Read, override and validate a configuration file."""
    return build(schema, apply_overrides(read_yaml(path), overrides or []))


def to_yaml(config: Strict) -> str:
    """The resolved configuration: every key, in the order of the schema."""
    return yaml.dump(
        config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110
    )


def filled_in(schema: type[Strict], written: Mapping[str, Any]) -> dict[str, Any]:
    """What `to_yaml` wrote, maybe in an earlier version: settings that it did not have yet are at their defaults. A configuration that
    cannot be read any more comes back as it is."""
    try:
        return build(schema, dict(written)).model_dump(mode="json")
    except ConfigError:
        return dict(written)


def _check_keys(value: object, path: tuple[str, ...], around: tuple[int, ...]) -> None:
    """ConfigError unless every key is text: YAML reads `on:` as true and `1:` as a number."""
    if not isinstance(value, (dict, list, tuple)) or id(value) in around:  # a YAML alias may hold itself
        return
    around = (*around, id(value))
    if not isinstance(value, dict):
        for inner in value:
            _check_keys(inner, path, around)
        return
    for key, inner in value.items():
        if not isinstance(key, str):
            where = f" under {'.'.join(path)!r}" if path else ""
            raise ConfigError(
                f"key {_short(key)}{where} is {type(key).__name__}, and keys are text; quote it if it is meant"
            )
        _check_keys(inner, (*path, key), around)


def explain_validation(schema: type[BaseModel], error: ValidationError) -> str:
    """The first mistake in one line; the number of further ones, if any."""
    # a misspelt key may be the one that seems to be missing
    mistakes = sorted(error.errors(), key=lambda mistake: mistake["type"] != "extra_forbidden")
    first = mistakes[0]
    # pydantic puts the tag of a discriminated union into the location; a user's key path has none
    path = _user_path(schema, first["loc"])
    key = ".".join(path)
    value = _short(first["input"])
    match first["type"]:
        case "extra_forbidden":
            # the last part is what the user wrote, whatever it looks like
            key = ".".join([*_user_path(schema, first["loc"][:-1]), str(first["loc"][-1])])
            line = f"unknown key {key!r}{_nearest(schema, first['loc'])}"
            if key == "base" and "algorithm" in schema.model_fields:
                line = "key 'base' belongs to a study; give this file to `vrpo study`"
        case "missing":
            line = f"{key} is required; add it"
        case "union_tag_invalid" | "union_tag_not_found":
            tags = ", ".join(repr(tag) for s in _sections_at(schema, first["loc"]) for tag in _tags(s))
            line = f"{key or 'config'}={value}: `type` must be one of {tags}"
        case "value_error":
            line = str(first["msg"]).removeprefix("Value error, ")
            line = f"{key}: {line}" if key else line
        case _:
            # only keys of a training configuration are explained, not those of a study or a warm start
            explained = "algorithm" in schema.model_fields
            fix = f"`vrpo explain {key}` says what it takes" if explained else "correct it"
            line = f"{key}={value}: {_in_yaml_words(first['msg'])}; {fix}"
    more = f" (and {len(mistakes) - 1} more)" if len(mistakes) > 1 else ""
    return " ".join(line.split()) + more


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The section classes named anywhere in a field's type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in getattr(annotation, "__args__", ()) for section in sections_in(part)]


def _user_path(schema: type[BaseModel], loc: tuple[str | int, ...]) -> list[str]:
    """The location without union tags."""
    path: list[str] = []
    sections = [schema]
    for part in loc:
        if isinstance(part, int):
            path.append(str(part))
            continue
        if _UNION_BRANCH.fullmatch(part):
            continue
        inside = [
            f
            for s in sections
            if part in s.model_fields
            for f in sections_in(s.model_fields[part].annotation)
        ]
        known = any(part in s.model_fields for s in sections)
        tags = [s for s in sections if part in _tags(s)]
        if not known and tags:
            sections = tags
            continue
        path.append(part)
        sections = inside or sections
    return path


def _sections_at(schema: type[BaseModel], loc: tuple[str | int, ...]) -> list[type[BaseModel]]:
    """The sections, one per `type`, that may stand at a location."""
    sections = [schema]
    for part in loc:
        inside = [
            f
            for s in sections
            if part in s.model_fields
            for f in sections_in(s.model_fields[str(part)].annotation)
        ]
        sections = inside or sections
    return sections


def _tags(section: type[BaseModel]) -> tuple[str, ...]:
    field = section.model_fields.get("type")
    return () if field is None else tuple(getattr(field.annotation, "__args__", ()))


def _nearest(schema: type[BaseModel], loc: tuple[str | int, ...]) -> str:
    """What the misspelt last part of `loc` was probably meant to be."""
    sections = [schema]
    for part in loc[:-1]:
        if isinstance(part, int):
            continue
        tagged = [s for s in sections if part in _tags(s)]
        inside = [
            f
            for s in sections
            if part in s.model_fields
            for f in sections_in(s.model_fields[part].annotation)
        ]
        sections = inside or tagged or sections
    names = [name for section in sections for name in section.model_fields]
    near = difflib.get_close_matches(str(loc[-1]), names, n=1, cutoff=0.7)
    elsewhere = sorted(_find_keys(schema, str(loc[-1])), key=lambda home: home != "train")
    other_types = [
        tag for s in _sections_at(schema, loc[:-1]) if loc[-1] in s.model_fields for tag in _tags(s)
    ]
    if other_types:
        return f"; only `type: {' or '.join(dict.fromkeys(other_types))}` has it"
    if near and near[0].replace("_", "").lower() == str(loc[-1]).replace("_", "").lower():
        return f"; did you mean {near[0]!r}?"
    below = any(
        home.partition(".")[0] == loc[0] for home in elsewhere
    )  # the head of a critic has a `beta` too
    if not below and (ours := OUR_NAMES.get(str(loc[-1]))):
        return f"; here that is {ours!r}"
    if elsewhere:
        return f"; it belongs under {' or '.join(map(repr, elsewhere))}"
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known keys here: {', '.join(dict.fromkeys(names))}"


def _find_keys(schema: type[BaseModel], name: str, prefix: str = "") -> list[str]:
    """The sections that have a key of this name."""
    homes: list[str] = []
    for field, info in schema.model_fields.items():
        for section in sections_in(info.annotation):
            homes += [f"{prefix}{field}"] if name in section.model_fields else []
            homes += _find_keys(section, name, f"{prefix}{field}.")
    return list(dict.fromkeys(homes))


def _set(data: dict[str, Any], keys: list[str], value: Any, whole: str) -> dict[str, Any]:
    """`value` at the place that `keys` name; an item of a list is named by its number, from 0."""
    key, rest = keys[0], keys[1:]
    if not rest:
        return {**data, key: value}
    below = data.get(key)
    if below is None and rest[0].isdigit():
        raise ConfigError(f"--set {whole}: there is no list {key!r} yet; set it as a whole")
    if below is None:
        below = {}
    if isinstance(below, str) and key == "algorithm":
        below = {"type": below}
    if isinstance(below, list):
        return {**data, key: _set_item(below, key, rest, value, whole)}
    if not isinstance(below, dict):
        raise ConfigError(
            f"--set {whole}: {key!r} holds {_short(below)}, which has no keys; set {key!r} as a whole"
        )
    return {**data, key: _set(below, rest, value, whole)}


def _set_item(items: list[Any], name: str, keys: list[str], value: Any, whole: str) -> list[Any]:
    number = keys[0]
    there = {str(i): item for i, item in enumerate(items)}
    if number not in there:
        numbers = f"its items are {name}.0 to {name}.{len(items) - 1}" if items else "it is empty"
        raise ConfigError(f"--set {whole}: {name!r} is a list and {number!r} none of its items; {numbers}")
    return list(_set(there, keys, value, whole).values())


_UNION_BRANCH = re.compile(r"[\w-]+\[.*\]")
"""pydantic's name for one branch of a plain union, such as `tuple[str, ...]`."""


def _short(value: object, *, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _in_yaml_words(message: str) -> str:
    """Pydantic speaks of Python's types; a YAML file has lists and sections."""
    message = (
        message.replace("a valid tuple", "a list")
        .replace("tuple should", "list should")
        .replace("Tuple should", "list should")
        .replace("dictionary should", "section should")
    )
    message = message.replace(" after validation", "").replace(" or object to extract fields from", "")
    message = re.sub(r"a valid dictionary( or instance of \w+)?", "a section", message)
    return message[:1].lower() + message[1:]


OTHER_NUMBERS = {
    "tag:yaml.org,2002:int": re.compile(r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+)$"),
    "tag:yaml.org,2002:float": re.compile(
        r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+][0-9]+)?$"
    ),
}
"""YAML tag -> how its numbers look here."""


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-6` as text, `010` as 8, `1:30` as 90 and repeats of a key as the last one; here these are a number, text, which
    no number may be, and an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # `<<: *defaults`
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (list, dict)) or key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} stands twice or is no name", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes text that `_Loader` would read as a number, such as '1e5'."""


# the resolvers of YAML 1.1 for what begins like a number, without octal and base 60
_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, OTHER_NUMBERS.get(tag, pattern)) if first in "-+0123456789" else (tag, pattern)
        for tag, pattern in resolvers
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


# text is quoted if any reader takes it for something else, ours or one of YAML 1.1
for _first, _resolvers in _Loader.yaml_implicit_resolvers.items():
    for _tag, _pattern in _resolvers:
        _Dumper.add_implicit_resolver(_tag, _pattern, [_first])

for _style in (_Loader, _Dumper):
    _style.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
        list("-+0123456789."),
    )
