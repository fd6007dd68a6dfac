"""The runtimes that the kit is run on, their pins, and the page that shows them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from steerbridge.testing import Driver, Files, Ground, TinyModel
from steerbridge.testing import pins as pinned
from steerbridge.testing.model import HEADS, WIDTH

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


def _vllm(ground: Ground, name: str, **options: bool) -> Driver:
    from vllm_driver import VllmDriver

    return VllmDriver(name, ground.folder / name, **options)


@dataclass(frozen=True)
class Runtime:
    """How the kit comes to a runtime.

    Attributes:
        driver: makes its driver.
        head: width of the heads of its models, where it does not take the usual ones.
        apart: it is only tried where its name is given; its environment is a large one.
    """

    driver: Callable[[Ground], Driver]
    head: int = WIDTH // HEADS
    apart: bool = False


def _of_vllm(name: str, **options: bool) -> Runtime:
    """vLLM has no code for heads narrower than 32 on a CPU."""
    return Runtime(lambda ground: _vllm(ground, name, **options), head=32, apart=True)


RUNTIMES: Final[dict[str, Runtime]] = {  # those that take longest first
    "vllm": _of_vllm("vllm"),
    "vllm-compiled": _of_vllm("vllm-compiled", compiled=True),
    "vllm-v2": _of_vllm("vllm-v2", second=True),
    "node-llama-cpp": Runtime(_node),
    "serve": Runtime(_serve),
    "llama-server": Runtime(_llama_server),
    "python-script": Runtime(_python_script),
    "tgi": Runtime(_tgi),
    "transformers": Runtime(_transformers),
    "llama.cpp": Runtime(_llama_cpp),
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
