"""TGI's Python server with its flash classes in float32: `python float32.py serve MODEL ...`.

In bfloat16, which they take on a CPU, a batch rounds otherwise than a prompt alone, steered or not.
"""

import os
from functools import wraps

if os.environ.get("STEERBRIDGE_PACKAGE"):
    from steerbridge_tgi import hook

    hook.install()

import torch
from text_generation_server.models.flash_causal_lm import FlashCausalLM

made = FlashCausalLM.__init__


@wraps(made)
def in_float32(self, *args, **options):
    """The same, with weights and cache in float32."""
    types = {"dtype": torch.float32, "kv_cache_dtype": torch.float32}
    made(self, *args, **options | types)


FlashCausalLM.__init__ = in_float32

from text_generation_server.cli import app  # noqa: E402 - after the class was changed

app()
