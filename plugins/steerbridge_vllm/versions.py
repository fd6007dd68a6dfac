"""The versions of vLLM that were tried, and what is relied upon in them.

Names that begin with an underscore may change with any release. Each is looked at before a model is
loaded: one that is not there, or takes other arguments, is refused.
"""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Final

from steerbridge.errors import UnsupportedFeature

TRIED: Final = ("0.32.",)
_RUNNER: Final = "vllm.v1.worker.gpu_model_runner:GPUModelRunner."
_ONE: Final = ("self",)
NEEDED: Final[dict[str, tuple[str, ...]]] = {
    _RUNNER + "_prepare_inputs": ("self", "scheduler_output", "num_scheduled_tokens"),
    _RUNNER + "_model_forward": (
        "self",
        "input_ids",
        "positions",
        "intermediate_tensors",
        "inputs_embeds",
        "model_kwargs",
    ),
    _RUNNER + "_sample": ("self", "logits", "spec_decode_metadata"),
    _RUNNER + "execute_model": ("self", "scheduler_output", "intermediate_tensors"),
    _RUNNER + "sample_tokens": ("self", "grammar_output"),
    _RUNNER + "initialize_kv_cache": (
        "self",
        "kv_cache_config",
        "is_profiling",
        "kv_cache_allocation_context",
    ),
    _RUNNER + "get_model": _ONE,
}


def check() -> None:
    """Refuse a version that is not known.

    Raises:
        UnsupportedFeature: naming what differs.
    """
    version = str(import_module("vllm").__version__)
    if not version.startswith(TRIED):
        known = ", ".join(f"{start}*" for start in TRIED)
        raise UnsupportedFeature("vllm", f"version {version}", f"one of {known}")
    for path, expected in NEEDED.items():
        module, _, name = path.partition(":")
        found = import_module(module)
        for part in name.split("."):
            found = getattr(found, part, None)  # type: ignore[assignment]
        names = tuple(inspect.signature(found).parameters) if callable(found) else ()
        if names != expected:
            what = f"{name} with the arguments {list(names)}: expected {list(expected)}"
            raise UnsupportedFeature("vllm", what)
