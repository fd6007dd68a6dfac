"""The kit's driver for Hugging Face transformers."""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    DynamicCache,
)
from transformers.utils import logging

from steerbridge.package import SteeringPackage
from steerbridge.testing import vision
from steerbridge.testing.driver import Ability, Files, How, Reply
from steerbridge.testing.model import CONTEXT, PAD, VOCAB, TinyModel
from steerbridge_hf import steer


class Stopped(Exception):
    """Raised by a streamer: the client has gone."""


class Counter:
    """A streamer that counts tokens, and leaves after some."""

    def __init__(self, leave_after: int) -> None:
        self.left, self.tokens, self.prompt = leave_after, list[int](), True

    def put(self, value: Any) -> None:
        if self.prompt:
            self.prompt = False
            return
        self.tokens.append(int(value.reshape(-1)[0]))
        if len(self.tokens) == self.left:
            raise Stopped

    def end(self) -> None:
        pass


class Running:
    """A model with a package; calls share a KV cache, as a chat program keeps it.

    Args:
        processor: makes pixels of pictures; None for a model that sees none.
    """

    def __init__(self, model: Any, session: Any, draft: Path, processor: Any = None) -> None:
        self.model, self.session, self._draft = model, session, draft
        self._processor = processor
        self._cached: list[int] = []
        self._cache: Any = None
        self.broken = False

    def ask(self, prompts: Sequence[str], new: int, how: How) -> list[Reply]:
        rows = [TinyModel.encode(p) for p in prompts]
        if how.threads:
            return self._in_threads(rows, new)
        if how.cancel_after:
            return [self._cancelled(rows[0], new, how.cancel_after)]
        if how.keep:
            return [self._in_conversation(prompts[0], new)]
        return self._generate(rows, new, how, **self._pixels(prompts))

    def _pixels(self, prompts: Sequence[str]) -> dict[str, Any]:
        """What the model takes beside token ids: the pixels of all pictures."""
        shown = [[opened_picture(file) for file in vision.pictures(p)] for p in prompts]
        if not any(shown):
            return {}
        inputs = self._processor.image_processor(images=shown, return_tensors="pt")
        return {"pixel_values": inputs["pixel_values"]}

    def _tokens(self, row: list[int]) -> Any:
        """Ids as the model takes them: all rows of pictures have the same."""
        image = getattr(self.model.config, "image_token_id", None)
        return torch.tensor([image if i >= VOCAB else i for i in row])

    def _generate(self, rows: Sequence[list[int]], new: int, how: How, **more: Any) -> list[Reply]:
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), PAD)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            at = slice(0, len(row)) if how.padding == "right" else slice(width - len(row), width)
            ids[i, at], mask[i, at] = self._tokens(row), 1
        return self._replies(ids, mask, new, how, **more)

    def _replies(self, ids: Any, mask: Any, new: int, how: How, **more: Any) -> list[Reply]:
        options: dict[str, Any] = {"do_sample": how.temperature > 0, "num_beams": how.beams}
        if how.temperature:
            options |= {"temperature": how.temperature, "num_return_sequences": how.samples}
        if how.drafts == "ngram":
            options["prompt_lookup_num_tokens"] = 4
        if how.drafts == "model":
            options["assistant_model"] = opened(self._draft)
        if how.stream:
            options["streamer"] = Counter(0)
        out = self.model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=new,
            pad_token_id=PAD,
            output_logits=how.beams == 1,
            return_dict_in_generate=True,
            **options,
            **more,
        )
        outcomes = self.session.outcomes if self.session else ()
        if len(outcomes) == len(ids) != len(out.sequences):
            outcomes = [o for o in outcomes for _ in range(how.samples)]
        answers = out.sequences[:, ids.shape[1] :].tolist()
        logits = out.logits[0].numpy() if how.beams == 1 else [None] * len(answers)
        return [
            Reply(tuple(tokens), outcomes[i] if outcomes else None, logits[i])
            for i, tokens in enumerate(answers)
        ]

    def _in_conversation(self, prompt: str, new: int) -> Reply:
        """One prompt on the kept cache: what it shares with the last one is not evaluated again.

        Pixels are given of the pictures behind that; no picture is cut in two.
        """
        row, shared = TinyModel.encode(prompt), 0
        for a, b in zip(row[:-1], self._cached, strict=False):
            if a != b:
                break
            shared += 1
        known = prompt
        while len(TinyModel.encode(known)) > shared:
            known = known[:-1]
        shared = len(TinyModel.encode(known))
        if self._cache is None or shared == 0:
            self._cache = DynamicCache(config=self.model.config)
        elif shared < len(self._cached):
            self._cache.crop(shared - len(self._cached))
        ids = self._tokens(row)[None]
        more = {**self._pixels([prompt[len(known) :]]), "cache": self._cache}
        try:
            [reply] = self._replies(ids, torch.ones_like(ids), new, How(), **more)
        except Exception:
            self._cache, self._cached = None, []
            raise
        assert reply.tokens is not None
        self._cached = [*row, *reply.tokens[:-1]]
        return reply

    def _cancelled(self, row: list[int], new: int, after: int) -> Reply:
        streamer, ids = Counter(after), torch.tensor([row])
        with contextlib.suppress(Stopped):
            self.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, pad_token_id=PAD,
                do_sample=False, streamer=streamer,
            )  # fmt: skip
        return Reply(tuple(streamer.tokens), None)

    def _in_threads(self, rows: Sequence[list[int]], new: int) -> list[Reply]:
        replies: dict[int, Reply] = {}
        errors: list[BaseException] = []

        def one(i: int) -> None:
            try:
                [replies[i]] = self._generate([rows[i]], new, How())
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=one, args=(i,)) for i in range(len(rows))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return [replies[i] for i in range(len(rows))]

    def break_hook(self) -> None:
        """Clear every hook, as code that cleans a model up does."""
        self.broken = True
        for module in self.model.modules():
            module._forward_pre_hooks.clear()
            module._forward_hooks.clear()


def opened(folder: Path) -> Any:
    logging.disable_progress_bar()
    sees = (folder / "processor_config.json").exists()
    kind: Any = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    return kind.from_pretrained(folder, dtype=torch.float32).eval()


def opened_picture(file: bytes) -> Image.Image:
    return Image.open(io.BytesIO(file)).convert("RGB")


class HfDriver:
    """transformers on the CPU, in F32."""

    name = "transformers"
    against = "real"
    abilities = frozenset(Ability) - {Ability.SEQUENCES}
    batch = 16
    context = CONTEXT
    tolerance = 1e-4
    margin = 1e-3
    tells_the_end = True
    kept_open = 0

    def __init__(self, draft: Path) -> None:
        self._draft = draft
        self._models: dict[Path, Any] = {}  # a session leaves no trace, so models are used again

    @contextmanager
    def open(self, files: Files, package: SteeringPackage | None) -> Iterator[Running]:
        folder = files.transformers
        model = self._models.pop(folder, None) or opened(folder)
        processor = AutoProcessor.from_pretrained(folder) if files.model.tower else None
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the model is tiny
        try:
            if package is None:
                running = Running(model, None, self._draft, processor)
                yield running
            else:
                tokenizer = AutoTokenizer.from_pretrained(folder)
                with steer(model, package, tokenizer=tokenizer) as session:
                    running = Running(model, session, self._draft, processor)
                    yield running
        finally:
            torch.set_num_threads(threads)
        if not running.broken:
            self._models[folder] = model
