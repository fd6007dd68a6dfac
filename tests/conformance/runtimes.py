"""The runtimes that the kit is run on, their pins, and the page that shows them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from steerbridge.testing import Driver, Files, Ground, TinyModel
from steerbridge.testing import pins as pinned

ROOT: Final = Path(__file__).resolve().parent.parent.parent
PINS: Final = Path(__file__).with_name("pins.json")
PAGE: Final = ROOT / "docs" / "runtimes.md"


def _draft(ground: Ground) -> Files:
    """The same model with other weights, as a model that drafts."""
    return Files(TinyModel(seed=1), ground.folder / "draft")


def _transformers(ground: Ground) -> Driver:
    from hf_driver import HfDriver

    return HfDriver(_draft(ground).transformers)


def _llama_cpp(_ground: Ground) -> Driver:
    from llama_cpp_driver import LlamaCppDriver

    return LlamaCppDriver()


def _llama_server(ground: Ground) -> Driver:
    from run_driver import llama_server_driver

    return llama_server_driver(_draft(ground))


def _python_script(ground: Ground) -> Driver:
    from run_driver import python_script_driver

    return python_script_driver(_draft(ground))


def _node(ground: Ground) -> Driver:
    from run_driver import node_script_driver

    return node_script_driver(_draft(ground))


def _serve(_ground: Ground) -> Driver:
    from serve_driver import ServeDriver

    return ServeDriver()


def _tgi(_ground: Ground) -> Driver:
    from tgi_driver import TgiDriver

    return TgiDriver()


DRIVERS: Final[dict[str, Callable[[Ground], Driver]]] = {  # those that take longest first
    "node-llama-cpp": _node,
    "serve": _serve,
    "llama-server": _llama_server,
    "python-script": _python_script,
    "tgi": _tgi,
    "transformers": _transformers,
    "llama.cpp": _llama_cpp,
}
INTRODUCTION: Final = """\
# What each runtime does

Generated from the pins of the conformance kit by `make conformance UPDATE=1`; do not edit.

Each row is a shape of request, tried on a tiny model and compared with an oracle in numpy:

- *right*: verdicts and tokens are the oracle's;
- *refused*: a typed error before the first token;
- `-`: the runtime has no such thing, or its driver cannot ask for it;
- **WRONG**: a known fault, listed below the table.

A *simulator* stands in for a runtime that cannot run on the project's machines. The kit is public
(`steerbridge.testing`); [Extending](extending.md) shows it with a runtime of another package.

"""
IN_PROCESS: Final = ("transformers", "llama.cpp")


def page() -> Iterator[str]:
    """docs/runtimes.md as lines."""
    yield from INTRODUCTION.splitlines()
    yield from pinned.table(pinned.read(PINS))
