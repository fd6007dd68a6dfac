"""Names and numbers of the demo model that every part shares: sizes, tokens, chat template.

Needs neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from steerbridge.errors import DataError, Problem
from steerbridge_demo.pictures import TILE

NAME: Final = "steerbridge-demo-vlm"
PATCH: Final = 8
SCALE_FACTOR: Final = 4
TOKENS_PER_TILE: Final = (TILE // PATCH // SCALE_FACTOR) ** 2
IMAGE_MEAN: Final = 127.5 / 255
IMAGE_STD: Final = 128 / 255
VISION: Final[Mapping[str, Any]] = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": TILE,
    "patch_size": PATCH,
    "hidden_act": "silu",
    "layer_norm_eps": 1e-6,
}

IMAGE_TOKENS: Final = (
    "<fake_token_around_image>",
    "<image>",
    "<end_of_utterance>",
    "<global-img>",
    *(f"<row_{r}_col_{c}>" for r in (1, 2) for c in (1, 2)),
)

_CONTENT: Final = " + message['content'] + "
_PARTS: Final = (
    " }}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% elif part['type'] in ['image', 'image_url'] %}{{ '<image>' }}"
    "{% else %}{{ raise_exception('content parts are text and image, not ' + part['type']) }}"
    "{% endif %}{% endfor %}{% endif %}{{ "
)


def chat_template(shipped: str) -> str:
    """SmolLM2's own template, whose content may also be a list of text and image parts.

    A message whose content is a string renders byte for byte as the shipped template does.

    Raises:
        DataError: the shipped template is not the one this was written for.
    """
    if shipped.count(_CONTENT) != 1:
        raise DataError(Problem("chat template", f"one {_CONTENT!r}", shipped[:80]))
    return shipped.replace(_CONTENT, _PARTS)
