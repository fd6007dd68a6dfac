"""The shapes of requests that a runtime is tried on: the contract as a table."""

from typing import Final

from steerbridge.testing.kit import Shape
from steerbridge.testing.shapes import (
    batches,
    conversations,
    failures,
    generation,
    packages,
    pictures,
    prompts,
    tokens,
)

SHAPES: Final[tuple[Shape, ...]] = (
    *prompts.TABLE,
    *batches.TABLE,
    *conversations.TABLE,
    *generation.TABLE,
    *pictures.TABLE,
    *packages.TABLE,
    *tokens.TABLE,
    *failures.TABLE,
)
