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
_BOTH: Final[dict[str, tuple[str, ...]]] = {
    "sample_tokens": ("grammar_output",),
    "initialize_kv_cache": ("kv_cache_config", "is_profiling", "kv_cache_allocation_context"),
    "get_model": (),
}
_PASS: Final = ("scheduler_output", "intermediate_tensors")
_TRIALS: Final = (
    *("dummy_run", "skip_attn_for_dummy_run", "is_profile", "context_len"),
    *("valid_dummy_state_slots", "randomize_inputs"),
)
# By generation of the model runner: its class, and the arguments of its methods.
RUNNERS: Final[dict[int, tuple[str, dict[str, tuple[str, ...]]]]] = {
    1: (
        "vllm.v1.worker.gpu_model_runner",
        {
            **_BOTH,
            "execute_model": _PASS,
            "_prepare_inputs": ("scheduler_output", "num_scheduled_tokens"),
            "_model_forward": (
                *("input_ids", "positions", "intermediate_tensors", "inputs_embeds"),
                "model_kwargs",
            ),
            "_sample": ("logits", "spec_decode_metadata"),
        },
    ),
    2: (
        "vllm.v1.worker.gpu.model_runner",
        {
            **_BOTH,
            "execute_model": (*_PASS, *_TRIALS),
            "prepare_inputs": (
                *("scheduler_output", "batch_req_state", "batch_desc"),
                "num_active_loras",
            ),
            "sample": ("hidden_states", "input_batch", "grammar_output"),
        },
    ),
}


def check(second: bool) -> None:
    """Refuse a version that is not known.

    Args:
        second: whether its runner is of the second generation.

    Raises:
        UnsupportedFeature: naming what differs.
    """
    version = str(import_module("vllm").__version__)
    if not version.startswith(TRIED):
        known = ", ".join(f"{start}*" for start in TRIED)
        raise UnsupportedFeature("vllm", f"version {version}", f"one of {known}")
    path, needed = RUNNERS[2 if second else 1]
    runner = import_module(path).GPUModelRunner
    for name, arguments in needed.items():
        found = getattr(runner, name, None)
        names = tuple(inspect.signature(found).parameters)[1:] if callable(found) else None
        if names != arguments:
            what = f"{path}.{name} with the arguments {names}: expected {arguments}"
            raise UnsupportedFeature("vllm", what)
