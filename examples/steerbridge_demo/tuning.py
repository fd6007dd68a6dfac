"""Stage two: questions and answers through the frozen language model.

Gradients reach the tower, the connector and the embeddings of the eight image tokens. Two
savings make it fit a small machine: the system prompt is read once and its keys and values are
shared, and a picture is read once for several questions, each of which sees the prompt and the
picture but not its neighbours (a block mask, positions that start again). Shapes: B pictures,
T tokens a row, P tokens of the shared prompt.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache

from steerbridge.runtime import Progress
from steerbridge_demo.alignment import Aligner, pool_of, rate
from steerbridge_demo.drawings import Scene, sample
from steerbridge_demo.layout import IMAGE_TOKENS, TOKENS_PER_TILE
from steerbridge_demo.optimisers import Optimisers
from steerbridge_demo.questions import ask, stems
from steerbridge_demo.vocabulary import ORDINARY, TRAIN_PAIRS, phrase

IGNORED: Final = -100
_TEACHER_TOKENS: Final = 20


@dataclass(frozen=True, slots=True)
class Exchange:
    """One question and the tokens of its answer."""

    text: str
    answer: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Settings:
    """How long and how fast stage two learns."""

    steps: int
    pictures: int = 10
    questions: int = 3
    peak: float = 5e-4
    peak_embeddings: float = 2e-3
    alignment: float = 1.0
    how_to: float = 0.2


# ------------------------------------------------------------ what is asked


@torch.inference_mode()
def teach(model: Any, processor: Any, per_object: int, seed: int) -> dict[tuple[str, str], Any]:
    """What SmolLM2 itself says, in words, about making ordinary things: opening tokens by pair.

    The picture of a thing shall work as its name does, so these are the answers to 'How do I
    make this?'. Only ordinary things are asked about.
    """
    rng = random.Random(seed)
    tokenizer = processor.tokenizer
    pairs = [
        pair
        for name in ORDINARY
        for pair in rng.sample([p for p in TRAIN_PAIRS if p[1] == name], per_object)
    ]
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": f"How do I make {phrase(*pair)}?"}],
            tokenize=False,
            add_generation_prompt=True,
        )
        for pair in pairs
    ]
    said: dict[tuple[str, str], Any] = {}
    for at in range(0, len(prompts), 16):
        batch = tokenizer(prompts[at : at + 16], return_tensors="pt", padding=True)
        new = model.generate(**batch, max_new_tokens=_TEACHER_TOKENS, do_sample=False)
        answers = new[:, batch["input_ids"].shape[1] :].tolist()
        said.update(zip(pairs[at : at + 16], map(tuple, answers), strict=True))
    return said


def exchanges(
    scene: Scene, taught: dict[tuple[str, str], Any], count: int, tokenizer: Any, rng: random.Random
) -> list[Exchange]:
    """Questions about a scene; a scene that was taught how to make gets one such question."""
    exchanges: list[Exchange] = []
    answer = taught.get((scene.thing.colour, scene.thing.name))
    if answer is not None:
        exchanges.append(Exchange(rng.choice(stems("make", "train")), answer))
    while len(exchanges) < count:
        question = ask(scene, rng)
        ids = tokenizer.encode(question.answer, add_special_tokens=False)
        exchanges.append(Exchange(question.text, (*ids, tokenizer.eos_token_id)))
    return exchanges


# ------------------------------------------------------------ rows


@dataclass(frozen=True, slots=True)
class Batch:
    """Token ids, labels (the token that follows; IGNORED elsewhere) and positions [B, T],
    and which of P + T keys each token sees [B, 1, T, P + T]."""

    ids: Tensor
    labels: Tensor
    positions: Tensor
    sees: Tensor


def lay_out(
    picture: list[int], asked: Sequence[list[tuple[list[int], Exchange]]], prefix: int
) -> Batch:
    """Rows of a picture and its questions (token ids with the chat markup, and the exchange)."""
    rows = []
    for questions in asked:
        ids, labels, segment = list(picture), [IGNORED] * len(picture), [0] * len(picture)
        positions = list(range(prefix, prefix + len(picture)))
        for number, (question, exchange) in enumerate(questions, 1):
            answer = list(exchange.answer)
            ids += question + answer[:-1]
            labels += [IGNORED] * (len(question) - 1) + answer
            length = len(question) + len(answer) - 1
            segment += [number] * length
            start = prefix + len(picture)
            positions += range(start, start + length)
        rows.append((ids, labels, segment, positions))
    width = max(len(row[0]) for row in rows)

    def padded(index: int, fill: int) -> Tensor:
        return torch.tensor([row[index] + [fill] * (width - len(row[index])) for row in rows])

    segment_BT = padded(2, -1)
    same = segment_BT[:, :, None] == segment_BT[:, None, :]
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    own = (same | (segment_BT == 0)[:, None, :]) & causal
    shared = torch.ones(len(rows), width, prefix, dtype=torch.bool)
    sees = torch.cat([shared, own], -1)[:, None]
    return Batch(padded(0, 0), padded(1, IGNORED), padded(3, prefix), sees)


class Tuner:
    """The loss of stage two for a model."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.tokenizer = model, processor.tokenizer
        self.aligner = Aligner(model, processor.tokenizer)
        table = model.get_input_embeddings().weight.detach()
        self.old_VD = table[: -len(IMAGE_TOKENS)]
        self.new_ND = torch.nn.Parameter(table[-len(IMAGE_TOKENS) :].clone())
        self.image_id = int(model.config.image_token_id)
        before, picture, self.after = self._markup(processor)
        self.picture = picture
        self.prefix = len(before)
        with torch.inference_mode():
            cache: Any = DynamicCache()
            self._read(cache, input_ids=torch.tensor([before]))
        self.shared = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]

    def _read(self, cache: DynamicCache, **inputs: Any) -> Tensor:
        """Last hidden states [B, T, D] of the text model; the keys and values go to `cache`."""
        text = self.model.model.text_model
        new = "cache" in inspect.signature(text.forward).parameters  # renamed in transformers 5.24
        named = {"cache" if new else "past_key_values": cache}
        states: Tensor = text(**inputs, **named, use_cache=True).last_hidden_state
        return states

    def _markup(self, processor: Any) -> tuple[list[int], list[int], list[int]]:
        """Ids before the picture, of a picture of five tiles, and after the question."""
        parts = [{"type": "image"}, {"type": "text", "text": "\0"}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": parts}], add_generation_prompt=True
        )
        before, _, rest = text.partition("<image>")
        after = rest.partition("\0")[2]
        slot = "<image>" * TOKENS_PER_TILE
        fake, overview = IMAGE_TOKENS[0], IMAGE_TOKENS[3]
        rows = ["".join(f"{fake}<row_{r}_col_{c}>{slot}" for c in (1, 2)) + "\n" for r in (1, 2)]
        picture = "".join(rows) + f"\n{fake}{overview}{slot}{fake}"
        encode = self.tokenizer.encode
        ids = (encode(t, add_special_tokens=False) for t in (before, picture, after))
        return next(ids), next(ids), next(ids)

    def batch(self, asked: Sequence[Sequence[Exchange]]) -> Batch:
        """Rows for the questions about each picture."""
        encode = self.tokenizer.encode
        return lay_out(
            self.picture,
            [
                [(encode(e.text, add_special_tokens=False) + self.after, e) for e in questions]
                for questions in asked
            ],
            self.prefix,
        )

    def loss(self, batch: Batch, features: Tensor) -> Tensor:
        """Cross-entropy of the answers; `features` [B * 5, 4, D] are the image tokens."""
        known = batch.ids.clamp(max=len(self.old_VD) - 1)
        embeds = functional.embedding(known, self.old_VD)
        added = batch.ids >= len(self.old_VD)
        rows = self.new_ND[batch.ids[added] - len(self.old_VD)]
        embeds = embeds.masked_scatter(added[..., None], rows)
        slots = (batch.ids == self.image_id)[..., None]
        embeds = embeds.masked_scatter(slots, features.reshape(-1, features.shape[-1]))
        cache = DynamicCache()
        count = len(batch.ids)
        for index, (keys, values) in enumerate(self.shared):
            cache.update(keys.expand(count, -1, -1, -1), values.expand(count, -1, -1, -1), index)
        hidden = self._read(
            cache,
            inputs_embeds=embeds,
            attention_mask=batch.sees,
            position_ids=batch.positions,
        )
        asked = batch.labels != IGNORED
        hidden = hidden[asked]
        logits = torch.cat([hidden @ self.old_VD.T, hidden @ self.new_ND.T], -1)
        return functional.cross_entropy(logits, batch.labels[asked])


def tune(
    tuner: Tuner,
    taught: dict[tuple[str, str], Any],
    settings: Settings,
    seed: int,
    progress: Progress,
) -> list[dict[str, float]]:
    """Train through the language model; returns a log of losses."""
    tokens = {"params": [tuner.new_ND], "lr": settings.peak_embeddings, "weight_decay": 0.0}
    optimisers = Optimisers(tuner.model, settings.peak, [tokens])
    rng = random.Random(f"tune {seed}")
    log: list[dict[str, float]] = []
    recent: list[float] = []
    for step in range(settings.steps):
        scenes = [_scene(rng, taught, settings) for _ in range(settings.pictures)]
        pool = pool_of(scenes)
        asked = [
            exchanges(scene, taught, settings.questions, tuner.tokenizer, rng) for scene in scenes
        ]
        features = tuner.aligner.features(pool.tiles.reshape(-1, *pool.tiles.shape[2:]))
        answers = tuner.loss(tuner.batch(asked), features)
        words, _ = tuner.aligner.loss(features, pool.words.reshape(-1, TOKENS_PER_TILE))
        optimisers.step(answers + settings.alignment * words, rate(step, settings.steps, warmup=10))
        progress("tuning", step + 1, settings.steps)
        recent.append(float(answers.detach()))
        if step % 10 == 9 or step + 1 == settings.steps:
            log.append(
                {
                    "step": step + 1,
                    "answers": float(np.mean(recent)),
                    "words": float(words.detach()),
                }
            )
            recent.clear()
    with torch.no_grad():
        tuner.model.get_input_embeddings().weight[-len(IMAGE_TOKENS) :] = tuner.new_ND
    return log


def _scene(rng: random.Random, taught: dict[tuple[str, str], Any], settings: Settings) -> Scene:
    if taught and rng.random() < settings.how_to:
        return sample(rng, pairs=list(taught))
    return sample(rng)
