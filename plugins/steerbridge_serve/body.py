"""Request bodies: each field is honoured, harmless to ignore and listed so, or refused by name."""

from __future__ import annotations

import base64
import binascii
import difflib
import json
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Final

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from steerbridge.errors import DataError, Problem

SERVER: Final = "steerbridge run -- llama-server"
"""What guards a server that does more than this one."""

Probability = Annotated[float, Field(gt=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Seed = Annotated[int, Field(ge=0, lt=2**32 - 1)]  # llama.cpp: the last one means a random seed
Repetition = Annotated[float, Field(ge=0.01, le=100)]
Stops = Annotated[
    list[Annotated[str, StringConstraints(min_length=1, max_length=256)]], Field(max_length=16)
]


@dataclass(frozen=True, slots=True)
class Refusal:
    """A field that asks for what is not done here, unless its value is null or idle."""

    idle: tuple[Any, ...] = ()
    instead: str = SERVER


class Body(BaseModel):
    """A JSON object of a request. A field that is not declared is an error; null is as absent."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    HARMLESS: ClassVar[Mapping[str, str]] = {}
    """Fields that are ignored, and why that is harmless."""
    REFUSED: ClassVar[Mapping[str, Refusal]] = {}

    @model_validator(mode="before")
    @classmethod
    def _known(cls, content: Any) -> Any:
        if not isinstance(content, dict):
            return content
        return {name: value for name, value in content.items() if cls._is_honoured(name, value)}

    @classmethod
    def honoured(cls) -> list[str]:
        """The fields that have an effect, as they are called in a request."""
        return [field.alias or name for name, field in cls.model_fields.items()]

    @classmethod
    def _is_honoured(cls, name: str, value: Any) -> bool:
        """False for a field that may be ignored."""
        if name in cls.HARMLESS:
            return False
        if name in cls.honoured():
            return value is not None
        refusal = cls.REFUSED.get(name)
        if refusal is None:
            near = difflib.get_close_matches(name, [*cls.honoured(), *cls.REFUSED], 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            title = cls.title()
            raise _error(name, f"not a field of {title[0].lower()}{title[1:]}{hint}")
        if value is None or any(value == idle for idle in refusal.idle):
            return False
        want = f"{json.dumps(refusal.idle[0])} or nothing" if refusal.idle else "nothing"
        instead = f"; {refusal.instead}" if refusal.instead else ""
        raise _error(name, f"expected {want}, found {reprlib.repr(value)}{instead}")

    @classmethod
    def title(cls) -> str:
        """What it is, for people."""
        return (cls.__doc__ or cls.__name__).partition("\n")[0].rstrip(".")


def _error(field: str, text: str) -> PydanticCustomError:
    return PydanticCustomError("field", "{field}: {text}", {"field": field, "text": text})


class Sampled(Body):
    """The fields of sampling that all dialects call alike."""

    top_k: int | None = Field(None, ge=-1, description="0 and -1: all")
    top_p: Probability | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    typical_p: Probability | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    seed: Seed | None = None

    def sampled(self, **defaults: Any) -> dict[str, Any]:
        """Arguments of `Sampling` for the fields that were sent."""
        names = Sampled.model_fields
        sent = {n: getattr(self, n) for n in names if getattr(self, n) is not None}
        whole = {**defaults, **sent}
        return whole | {"top_k": max(whole.get("top_k", 0), 0)}


COLD: Final = 0.01
"""A temperature below it is 0: logits divided by less overflow."""


def cooled(temperature: float) -> float:
    """A temperature at which tokens can be drawn, or 0."""
    return temperature if temperature >= COLD else 0.0


def from_base64(text: str, field: str) -> bytes:
    """The bytes of a picture file.

    Raises:
        DataError: it is not base64.
    """
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(Problem(field, "a picture file in base64", str(error))) from error


def from_data_url(url: str) -> bytes:
    """The bytes of a picture in a `data:` URL.

    Raises:
        DataError: another URL (nothing is fetched), no picture, or not base64.
    """
    head, comma, content = url.partition(",")
    if not comma or not head.startswith("data:image/") or not head.endswith(";base64"):
        want = "a URL `data:image/...;base64,...` (nothing is fetched)"
        raise DataError(Problem("image_url", want, repr(url[:40])))
    return from_base64(content, "image_url")
