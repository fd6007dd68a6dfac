"""Request bodies in the two dialects, and their conversion to questions.

Fields without effect here are ignored; fields that request unsupported behaviour are errors, never
silently dropped.
"""

from __future__ import annotations

import base64
import binascii
import io
from typing import Annotated, Any, Literal

from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, Field, model_validator

from steerbridge.errors import DataError, Problem
from steerbridge.serving import Message, Part, Question, Sampling

DEFAULT_NEW_TOKENS = 100  # TGI's

Probability = Annotated[float, Field(gt=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


def refuse(body: BaseModel, **idle: tuple[Any, ...]) -> None:
    """Raise ValueError for a field that requests unsupported behaviour."""
    for name, values in idle.items():
        value = getattr(body, name)
        if value is not None and value not in values:
            want = f"{values[0]!r} or nothing" if values else "nothing"
            raise ValueError(f"{name}: expected {want}, found {value!r}")


class Parameters(BaseModel):
    """`parameters` of TGI's /generate."""

    max_new_tokens: int | None = Field(None, ge=1)
    do_sample: bool = False
    temperature: float | None = Field(None, gt=0)
    top_k: int | None = Field(None, ge=1)
    top_p: Probability | None = None
    repetition_penalty: float | None = Field(None, gt=0)
    seed: Seed | None = None
    stop: list[str] | None = None
    return_full_text: bool | None = None
    details: bool = False
    typical_p: float | None = None
    frequency_penalty: float | None = None
    best_of: int | None = None
    top_n_tokens: int | None = None
    truncate: int | None = None
    watermark: bool | None = None
    decoder_input_details: bool | None = None
    grammar: Any = None
    adapter_id: str | None = None

    @model_validator(mode="after")
    def _known(self) -> Parameters:
        refuse(
            self,
            typical_p=(1,),
            frequency_penalty=(0,),
            best_of=(1,),
            top_n_tokens=(0,),
            truncate=(),
            watermark=(False,),
            decoder_input_details=(False,),
            grammar=(),
            adapter_id=(),
        )
        return self

    @property
    def sampling(self) -> Sampling:
        """As in TGI, any sampling parameter turns sampling on."""
        warm = self.do_sample or any(
            value is not None for value in (self.temperature, self.top_k, self.top_p)
        )
        return Sampling(
            max_new_tokens=self.max_new_tokens or DEFAULT_NEW_TOKENS,
            temperature=(self.temperature or 1.0) if warm else 0.0,
            top_k=self.top_k or 0,
            top_p=self.top_p or 1.0,
            repetition_penalty=self.repetition_penalty or 1.0,
            seed=self.seed,
            logprobs=True,
        )


class Generate(BaseModel):
    """The body of TGI's /generate, /generate_stream and /."""

    inputs: str = Field(min_length=1)
    parameters: Parameters = Field(default_factory=Parameters)
    stream: bool = False

    @property
    def question(self) -> Question:
        return Question(prompt=self.inputs)


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class ImageUrl(BaseModel):
    url: str


class ImagePart(BaseModel):
    type: Literal["image_url"]
    image_url: ImageUrl


class ChatMessage(BaseModel):
    role: Literal["system", "user", "assistant"]
    content: str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]


class StreamOptions(BaseModel):
    include_usage: bool = False


class ChatCompletion(BaseModel):
    """The body of /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: Probability | None = None
    seed: Seed | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int | None = None
    repetition_penalty: float | None = Field(None, gt=0)
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    logit_bias: dict[str, float] | None = None
    response_format: Any = None
    tools: Any = None
    tool_choice: Any = None
    steering: bool = True  # false: without the package, where the server allows it

    @model_validator(mode="after")
    def _known(self) -> ChatCompletion:
        refuse(
            self,
            n=(1,),
            frequency_penalty=(0,),
            presence_penalty=(0,),
            logprobs=(False,),
            top_logprobs=(0,),
            logit_bias=({},),
            response_format=({"type": "text"},),
            tools=([],),
            tool_choice=("none", "auto"),
        )
        return self

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def sampling(self) -> Sampling:
        """As in OpenAI's API, the temperature is 1 unless given."""
        return Sampling(
            max_new_tokens=self.max_completion_tokens or self.max_tokens or DEFAULT_NEW_TOKENS,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=self.top_p or 1.0,
            repetition_penalty=self.repetition_penalty or 1.0,
            seed=self.seed,
        )

    def question(self, max_pixels: int) -> Question:
        """The messages, images decoded.

        Raises:
            DataError: an image that is no `data:` URL, cannot be read or is too large.
        """
        messages = tuple(Message(m.role, _parts(m.content, max_pixels)) for m in self.messages)
        return Question(messages, steered=self.steering)


def _parts(content: str | list[TextPart | ImagePart], max_pixels: int) -> tuple[Part, ...]:
    if isinstance(content, str):
        return (Part(text=content),)
    return tuple(
        Part(text=part.text)
        if isinstance(part, TextPart)
        else Part(image=_image(part.image_url.url, max_pixels))
        for part in content
    )


def _image(url: str, max_pixels: int) -> bytes:
    """The bytes of an image, checked before they reach the model."""
    head, comma, body = url.partition(",")
    if not comma or not head.startswith("data:image/") or not head.endswith(";base64"):
        want = "a URL `data:image/...;base64,...` (nothing is fetched)"
        raise DataError(Problem("image_url", want, repr(url[:40])))
    try:
        content = base64.b64decode(body, validate=True)
        with Image.open(io.BytesIO(content)) as picture:
            pixels = picture.width * picture.height
            if pixels > max_pixels:
                raise DataError(Problem("image_url", f"{max_pixels} pixels at most", str(pixels)))
            picture.load()
    except (binascii.Error, UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise DataError(Problem("image_url", "an image that Pillow reads", str(error))) from error
    return content
