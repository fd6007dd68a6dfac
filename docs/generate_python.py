"""Print docs/python.md: the public Python names with their docstrings (`make schema`)."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType
from typing import Any, Final

PACKAGES: Final = (
    "steerbridge",
    "steerbridge_hf",
    "steerbridge_llama_cpp",
    "steerbridge_convert",
    "steerbridge.testing",
)
SECTIONS: Final = ("Args", "Returns", "Raises")
WIDTH: Final = 80
_NAMELESS: Final = re.compile(r"<factory>|<\w.*? at 0x\w+>")  # values with no text of their own


def page() -> Iterator[str]:
    """The page as lines."""
    yield "# Python"
    yield ""
    yield "Generated from the docstrings by `make schema`; do not edit."
    for name in PACKAGES:
        module = import_module(name)
        yield from ["", f"## {name}", "", *text(module.__doc__ or "")]
        for title, members in grouped(module):
            yield from ["", f"### {title}"]
            for member in members:
                yield from entry(member, inspect.unwrap(getattr(module, member)))


def grouped(module: ModuleType) -> Iterator[tuple[str, list[str]]]:
    """The public names by what they are; groups without one are left out."""
    groups: dict[str, list[str]] = {"Functions": [], "Classes": [], "Errors": [], "Types": []}
    for name in module.__all__:
        value = inspect.unwrap(getattr(module, name))
        if inspect.isclass(value):
            groups["Errors" if issubclass(value, Exception) else "Classes"].append(name)
        elif inspect.isfunction(value):
            groups["Functions"].append(name)
        elif not name.startswith("_"):
            groups["Types"].append(name)
    return ((title, names) for title, names in groups.items() if names)


def entry(name: str, value: Any) -> Iterator[str]:
    """One name: signature, docstring and, for a class, its public methods."""
    if not (inspect.isclass(value) or inspect.isfunction(value)):
        yield from ["", f"#### {name}", "", f"`{typing_text(value)}`"]
        return
    is_error = inspect.isclass(value) and issubclass(value, Exception)
    yield from ["", f"#### {name}", ""]
    if hasattr(value, "model_fields"):
        yield from [f"Fields: [reference](reference.md#{name.lower()}).", ""]
    elif not is_error:
        yield from ["```py", f"{name}{signature(value)}", "```", ""]
    yield from text(inspect.getdoc(value) or "")
    if inspect.isclass(value) and not is_error:
        yield from methods(value)


def methods(cls: type) -> Iterator[str]:
    """The public methods and properties that a class defines itself."""
    for name, member in vars(cls).items():
        if name.startswith("_") or name == "model_config":
            continue
        function = member.fget if isinstance(member, property) else member
        function = getattr(function, "__func__", function)
        if not inspect.isfunction(function) or not function.__doc__:
            continue
        shown = "" if isinstance(member, property) else signature(function)
        shown = f"{name}{shown}"
        yield from ["", "```py", shown, "```", "", *text(inspect.getdoc(function) or "")]


class _Bare(str):
    """An annotation that is shown without quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def signature(value: Any) -> str:
    """The signature without `self`, one parameter per line where one line would be long."""
    whole = inspect.signature(value)
    parameters = [
        p.replace(annotation=_Bare(p.annotation) if isinstance(p.annotation, str) else p.annotation)
        for p in whole.parameters.values()
        if p.name not in ("self", "cls")
    ]
    returned = whole.return_annotation
    arrow = f" -> {returned}" if isinstance(returned, str) and returned != "None" else ""
    bare = str(whole.replace(parameters=parameters, return_annotation=inspect.Signature.empty))
    bare = _NAMELESS.sub("...", bare)
    if len(bare) + len(arrow) <= WIDTH:
        return bare + arrow
    lines = []
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and "    *," not in lines:
            lines.append("    *,")
        lines.append(_NAMELESS.sub("...", f"    {parameter},"))
    return "\n".join(["(", *lines, ")"]) + arrow


def typing_text(value: Any) -> str:
    """A type alias as text; of another value its type."""
    if isinstance(value, tuple):
        return f"tuple of {type(value[0]).__name__}, {len(value)} long"
    return re.sub(r"\b(collections\.abc|typing)\.", "", str(value))


def text(doc: str) -> Iterator[str]:
    """A docstring as Markdown: sections become lists, indented lines stay code."""
    lines = inspect.cleandoc(doc).splitlines()
    section = ""
    for line in lines:
        if line.rstrip(":") in SECTIONS and line.endswith(":"):
            section = line.rstrip(":")
            yield from [f"*{line}*", ""]
        elif section and line.startswith("     "):
            yield f"  {line.strip()}"
        elif section and line.startswith("    "):
            names, colon, rest = line.strip().partition(": ")
            if section == "Returns" or not colon:
                yield line.strip()
            else:
                yield f"- `{names}`: {rest}"
        else:
            section = section if not line else ""
            yield line


if __name__ == "__main__":
    print("\n".join(page()))
