"""Who imports whom in the shipped packages and the demo: read from the source, nothing imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHELVES = (".", "adapters", "converters", "plugins", "examples")


@cache
def modules() -> dict[str, Path]:
    """Every module of the packages, by its full name."""
    files = {}
    for shelf in SHELVES:
        for package in (ROOT / shelf).glob("steerbridge*"):
            for path in package.rglob("*.py"):
                parts = path.relative_to(ROOT / shelf).with_suffix("").parts
                files[".".join(parts).removesuffix(".__init__")] = path
    return files


def room(module: str) -> str:
    """A package of a shelf, or a folder of the core; the core's own modules are `steerbridge`."""
    top, _, rest = module.partition(".")
    inner = f"{top}.{rest.partition('.')[0]}"
    is_folder = inner in modules() and modules()[inner].name == "__init__.py"
    return inner if top == "steerbridge" and rest and is_folder else top


def names_imported(path: Path) -> Iterator[str]:
    """Full names that a file imports when it runs (not those under `if TYPE_CHECKING`)."""
    tree = ast.parse(path.read_text("utf-8"))
    unseen = {inner for block in _type_checking(tree) for inner in ast.walk(block)}
    for node in ast.walk(tree):
        if node in unseen:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def type_checking_names(path: Path) -> list[str]:
    """What a package imports for type checkers alone: its lazy names."""
    blocks = _type_checking(ast.parse(path.read_text("utf-8")))
    imports = [n for block in blocks for n in ast.walk(block) if isinstance(n, ast.ImportFrom)]
    return [alias.name for node in imports for alias in node.names]


def _type_checking(tree: ast.Module) -> list[ast.If]:
    return [n for n in tree.body if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test)]


@cache
def imports() -> dict[str, frozenset[str]]:
    """Module -> modules of ours that it imports, wherever in the file."""
    return {
        module: frozenset(
            target
            for name in names_imported(path)
            if (target := name if name in modules() else name.rpartition(".")[0]) in modules()
            and target != module
        )
        for module, path in modules().items()
    }


def foreign_imports() -> dict[str, set[str]]:
    """Module -> packages of others that it imports."""
    return {
        module: {n.partition(".")[0] for n in names_imported(path) if not n.startswith("steerb")}
        for module, path in modules().items()
    }


def circles(graph: dict[str, frozenset[str]]) -> list[str]:
    """The modules of a circle of imports; empty if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []
