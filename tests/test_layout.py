"""The shape of the code: sizes, and no algorithm's name outside its own module."""

import ast
from pathlib import Path

import pytest

SRC = Path(__file__).parent.parent / "src" / "vrpo"
FILES = sorted(SRC.rglob("*.py"))
LIMITS = {"functional": (250, 50), "algorithms": (300, 60), "train/loop.py": (220, 80), "": (400, 60)}
"""Folder -> most lines of a file, most lines of a function without its docstring."""


def limits(path: Path) -> tuple[int, int]:
    name = str(path.relative_to(SRC))
    return next(LIMITS[prefix] for prefix in LIMITS if name.startswith(prefix))


def body_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    doc = ast.get_docstring(node) or ""
    return node.end_lineno - node.lineno + 1 - (doc.count("\n") + 1 if doc else 0)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_sizes(path):
    text = path.read_text()
    most_file, most_function = limits(path)
    assert text.count("\n") <= most_file
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert body_lines(node) <= most_function, node.name


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_every_module_says_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text()))


@pytest.mark.parametrize("path", sorted((SRC / "train").glob("*.py")), ids=lambda p: p.name)
def test_the_trainer_compares_no_algorithm_by_name(path):
    compared = [
        constant.value
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Compare | ast.MatchValue | ast.Subscript)
        for constant in ast.walk(node)
        if isinstance(constant, ast.Constant)
    ]
    assert not {"ppo", "vrpo", "grpo"}.intersection(v for v in compared if isinstance(v, str))


def test_public_names_are_importable():
    import vrpo

    assert [name for name in vrpo.__all__ if not hasattr(vrpo, name)] == []
    for module in ("config", "rewards", "models", "tasks", "functional", "errors", "types", "train"):
        assert (
            vrpo.__getattr__(module).__name__ == f"vrpo.{module}"
        )  # whether or not something has imported it
    with pytest.raises(AttributeError):
        vrpo.no_such_name  # noqa: B018
