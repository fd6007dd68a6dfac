"""The `hf` runtime: open a model, answer prompts, capture hidden states."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    LogitsProcessor,
    LogitsProcessorList,
)

from steerbridge import reference
from steerbridge.data import Example
from steerbridge.errors import DataError, Problem, UnsupportedFeature
from steerbridge.fingerprint import ModelFacts
from steerbridge.package import SteeringPackage
from steerbridge.reference import AnySite
from steerbridge.runtime import Captured, Generation, Outcome, OutputHead, Progress, Trace
from steerbridge.serving import templated, token_ids
from steerbridge.spec import (
    HeadInput,
    ImageMean,
    LayerInput,
    LayerOutput,
    PromptEnd,
    Reading,
    sites_read,
)
from steerbridge.tensors import Float32
from steerbridge_hf.adapter import steer
from steerbridge_hf.sites import RUNTIME, facts, has_vision, image_rows, locate, ordinary_tokens
from steerbridge_torch import quantisation, rounded, weights_sha256

TOKENS_PER_BATCH = 2048
ROWS_PER_BATCH = 32
IMAGE_ROWS_PER_BATCH = 16


def open_model(
    model: str | Path,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    batch_size: int = ROWS_PER_BATCH,
    **options: Any,
) -> HfModel:
    """Open a model from a directory, a hub id, or a GGUF file of a text model.

    A model with a vision tower is opened with its processor, for prompts with images.

    Args:
        dtype: a torch dtype by name; GGUF weights are dequantised to it.
        batch_size: prompts at once at most (long ones and images are fewer).
        options: passed on to `from_pretrained` of the model.

    Raises:
        FileNotFoundError: a path to a GGUF file that does not exist.
        UnsupportedFeature: the option `mmproj` of llama.cpp.
    """
    if "mmproj" in options:  # the vision tower is part of the model here
        raise UnsupportedFeature(RUNTIME, "option mmproj")
    path = Path(model)
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(model)}
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(path)
        where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    kind: Any = AutoModelForCausalLM
    processor = None
    if "gguf_file" not in where and has_vision(AutoConfig.from_pretrained(str(model))):
        kind, processor = AutoModelForImageTextToText, _processor(str(model))
    tokenizer = processor.tokenizer if processor else AutoTokenizer.from_pretrained(**where)
    loaded: Any = kind.from_pretrained(**where, dtype=getattr(torch, dtype), **options)
    if path.exists():
        loaded.config.name_or_path = path.stem if path.is_file() else path.name
    loaded.to(device=torch.device(device))
    return HfModel(loaded.eval(), tokenizer, processor, batch_size=batch_size)


def _processor(model: str) -> Any:
    loader: Any = AutoProcessor
    return loader.from_pretrained(model)


class HfModel:
    """A transformers model and its tokenizer as a runtime (see `steerbridge.runtime`).

    Args:
        processor: the processor of a vision-language model; None: no prompts with images.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        processor: Any = None,
        *,
        batch_size: int = ROWS_PER_BATCH,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.processor = processor
        self._batch_size = batch_size
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token

    @property
    def runtime(self) -> str:
        return RUNTIME

    @property
    def facts(self) -> ModelFacts:
        return facts(self.model, self.tokenizer)

    @property
    def quantisation(self) -> str:
        return quantisation(self.model.dtype, self.model.config)

    @property
    def weights_sha256(self) -> str:
        return weights_sha256(self.model)

    # -------------------------------------------------------- prompts

    def render(self, prompt: Example) -> list[int]:
        """Token ids of a prompt: the chat template with its generation prompt, if there is one.

        Raises:
            UnsupportedFeature: a prompt with images, for a model without a processor, or with no
                template around it; a system message or earlier turns without a template.
        """
        if prompt.images:
            ids: list[int] = self._processed([prompt])["input_ids"][0].tolist()
            return ids
        return token_ids(self.tokenizer, prompt, RUNTIME)

    def _processed(self, prompts: Sequence[Example]) -> dict[str, Tensor]:
        """Left-padded model inputs of prompts that all have images, by the model's processor."""
        if self.processor is None:
            raise UnsupportedFeature(RUNTIME, "prompts with images: this model has no processor")
        texts, pictures = [], []
        for prompt in prompts:
            if prompt.raw:
                raise UnsupportedFeature(RUNTIME, "a picture beside a text without a template")
            parts = [
                *[{"type": "image"}] * len(prompt.images),
                {"type": "text", "text": prompt.text},
            ]
            texts.append(templated(self.processor, prompt, parts))
            pictures.append([_picture(path) for path in prompt.images])
        inputs = self.processor(
            text=texts,
            images=pictures,
            padding=True,
            padding_side="left",
            add_special_tokens=False,
            return_tensors="pt",
        )
        return dict(inputs.to(self.model.device))

    def _batches(
        self, prompts: Sequence[Example], behind: Sequence[int] = ()
    ) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """Left-padded batches (indices, tensors) of bounded size, short prompts first.

        Args:
            behind: tokens behind every prompt.
        """
        rows = {i: [*self.render(p), *behind] for i, p in enumerate(prompts) if not p.images}
        order = sorted(rows, key=lambda i: len(rows[i]))
        at = 0
        while at < len(order):
            size = 1
            while (
                at + size < len(order)
                and size < self._batch_size
                and len(rows[order[at + size]]) * (size + 1) <= TOKENS_PER_BATCH
            ):
                size += 1
            index = order[at : at + size]
            yield index, self._pad([rows[i] for i in index])
            at += size
        with_images = [i for i, p in enumerate(prompts) if p.images]
        with_images.sort(key=lambda i: (len(prompts[i].images), len(prompts[i].text)))
        together = min(self._batch_size, IMAGE_ROWS_PER_BATCH)
        for at in range(0, len(with_images), together):
            index = with_images[at : at + together]
            yield index, _extended(self._processed([prompts[i] for i in index]), behind)

    def _pad(self, rows: Sequence[list[int]]) -> dict[str, Tensor]:
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), self.tokenizer.pad_token_id)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, width - len(row) :] = torch.tensor(row)
            mask[i, width - len(row) :] = 1
        device = self.model.device
        return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}

    # -------------------------------------------------------- answers

    def generate(
        self,
        prompts: Sequence[Example],
        package: SteeringPackage | None,
        *,
        max_new_tokens: int,
        ignore: Sequence[str] = (),
        progress: Progress | None = None,
    ) -> list[Generation]:
        """Greedy answers, in the order of the prompts."""
        answers: dict[int, Generation] = {}
        attached = self._attached(package, ignore)
        with attached as session, torch.inference_mode():
            for index, batch in self._batches(prompts):
                output = self.model.generate(
                    **batch,
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    pad_token_id=self.tokenizer.pad_token_id,
                )
                outcomes = [None] * len(index) if session is None else session.outcomes
                new = output[:, batch["input_ids"].shape[1] :].tolist()
                for i, tokens, outcome in zip(index, new, outcomes, strict=True):
                    answers[i] = self._generation(tokens, outcome)
                if progress:
                    progress("generate", len(answers), len(prompts))
        return [answers[i] for i in range(len(prompts))]

    def _attached(self, package: SteeringPackage | None, ignore: Sequence[str]) -> Any:
        if package is None:
            return nullcontext()
        return steer(self.model, package, tokenizer=self.tokenizer, ignore=ignore)

    def log_likelihoods(
        self,
        prompts: Sequence[Example],
        answer: str,
        package: SteeringPackage | None,
        ignore: Sequence[str] = (),
    ) -> NDArray[np.float64]:
        """Log-probability [N, T] of each token of a forced answer (nats), probed and steered
        exactly as if it were generated.

        Raises:
            DataError: the answer has no tokens.
        """
        target = self._tokens_of(answer, "answer")
        likelihoods = np.empty((len(prompts), len(target)))
        wanted = torch.tensor(target, device=self.model.device)
        with self._attached(package, ignore), torch.inference_mode():
            for index, batch in self._batches(prompts):
                output = self.model.generate(
                    **batch,
                    max_new_tokens=len(target),
                    do_sample=False,
                    pad_token_id=self.tokenizer.pad_token_id,
                    logits_processor=LogitsProcessorList([_Forced(target)]),
                    output_logits=True,  # those of the model, before any processor
                    return_dict_in_generate=True,
                )
                logits = torch.stack(output.logits, 1).double().log_softmax(-1)  # [B, T, V]
                chosen = logits.gather(2, wanted.expand(len(index), -1)[..., None])[..., 0]
                likelihoods[index] = chosen.cpu().numpy()
        return likelihoods

    def _tokens_of(self, answer: str, what: str) -> list[int]:
        tokens: list[int] = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        if not tokens:
            raise DataError(Problem(what, "a text with tokens", repr(answer)))
        return tokens

    def _generation(self, tokens: list[int], outcome: Outcome | None) -> Generation:
        stops = self.stop_tokens()
        end = next((i for i, t in enumerate(tokens) if t in stops), None)
        kept = tokens if end is None else tokens[:end]
        text = self.tokenizer.decode(kept, skip_special_tokens=True)
        whole = tokens if end is None else tokens[: end + 1]
        return Generation(text, tuple(whole), "length" if end is None else "stop", outcome)

    def stop_tokens(self) -> set[int]:
        """Tokens with which generation ends."""
        eos = self.model.generation_config.eos_token_id
        eos = self.tokenizer.eos_token_id if eos is None else eos
        return set(eos) if isinstance(eos, list | tuple) else {eos}

    def end_of_turn(self) -> int:
        """The stop token that the chat template puts behind an answer; the end of sequence for a
        model without a template."""
        stops = self.stop_tokens()
        if self.tokenizer.chat_template is not None:
            said = "[answer]"
            turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": said}]
            text = self.tokenizer.apply_chat_template(turns, tokenize=False)
            behind = self.tokenizer(text.rpartition(said)[2], add_special_tokens=False)
            for token in behind["input_ids"]:
                if token in stops:
                    return int(token)
        eos = self.tokenizer.eos_token_id
        return int(eos) if eos in stops else min(stops)

    def answer_tokens(self, answer: str) -> list[int]:
        """See `TrainableModel`."""
        said = self._tokens_of(answer, "sentence")
        if self.tokenizer.chat_template is not None:
            asked = Example("?", harmful=False)
            whole = self.tokenizer.apply_chat_template(
                [*asked.messages("?"), {"role": "assistant", "content": answer}], tokenize=False
            )
            before = templated(self.tokenizer, asked, "?")
            if not whole.startswith(before + answer):
                what = "a sentence where the chat template answers otherwise than it asks"
                raise UnsupportedFeature(RUNTIME, what)
            ids = self.tokenizer(whole, add_special_tokens=False)["input_ids"]
            prompt, end = self.render(asked), self.end_of_turn()
            if ids[: len(prompt)] == prompt and end in ids[len(prompt) :]:
                said = ids[len(prompt) : ids.index(end, len(prompt))]
        return [*said, self.end_of_turn()]

    # -------------------------------------------------------- capture

    def capture(
        self,
        prompts: Sequence[Example],
        readings: Sequence[Reading],
        out: NDArray[np.float32],
        progress: Progress | None = None,
    ) -> None:
        """Fill out[i, k] with reading k of prompt i ([N, K, D]); NaN where there is no image."""
        for done, captured in enumerate(self.states(prompts, readings, ()), 1):
            out[captured.index] = captured.readings
            if progress:
                progress("capture", done, len(prompts))

    def states(
        self,
        prompts: Sequence[Example],
        readings: Sequence[Reading],
        sites: Sequence[LayerInput],
        *,
        exact: bool = True,
    ) -> Iterator[Captured]:
        """See `TrainableModel`."""
        places = [*readings, *map(_at_end, sites)]
        for index, batch in self._batches(prompts):
            mask, images = batch["attention_mask"], image_rows(self.model, batch["input_ids"])
            with self._states(batch, places, keep=1, exact=exact) as states:
                taken = [_take(r, states, mask, images).cpu().numpy() for r in readings]
                rows = [states[site.layer].float().cpu() for site in sites]
            for b, i in enumerate(index):
                real = mask[b].bool().cpu()
                mine = [h[b][real].numpy() for h in rows]
                yield Captured(i, self._stacked([x[b] for x in taken], 0), self._stacked(mine, 1))

    def _stacked(self, parts: Sequence[Float32], axis: int) -> Float32:
        """Arrays along a new axis, which is of size 0 if there are none."""
        width = locate(self.model).config.hidden_size
        return np.stack(parts, axis) if parts else np.empty((0, 0, width)[-2 - axis :], np.float32)

    def trace(self, prompt: Example, package: SteeringPackage) -> Trace:
        """See `LoadedModel`."""
        if prompt.images:
            raise UnsupportedFeature(RUNTIME, "rows of a prompt with images")
        probes = [p for p in package.spec.probes if p.token_reading is not None]
        ids = self.render(prompt)
        tokens = tuple(self.tokenizer.decode([id]) for id in ids)
        readings = [_at_end(site) for p in probes for site in sites_read(p)]
        logits = {}
        with self._states(self._pad([ids]), readings, keep=1) as states:
            rows = {depth: h[0].float().cpu().numpy() for depth, h in states.items()}
            for probe in probes:
                assert probe.token_reading is not None
                x = reference.row_inputs(probe.token_reading, lambda s: rows[package.spec.depth(s)])
                logits[probe.id] = reference.row_logits(probe, package.tensors, x)
        return Trace(tokens, logits)

    @contextmanager
    def _states(
        self, batch: dict[str, Tensor], readings: Sequence[Reading], keep: int, exact: bool = True
    ) -> Iterator[dict[int, Tensor]]:
        """Hidden states by depth of one forward pass ([B, Q, D]; the head's [B, keep, D]), which
        ends at the deepest of them."""
        sites = locate(self.model)
        states: dict[int, Tensor] = {}
        depths = {_depth(r, len(sites.blocks)) for r in readings}
        with ExitStack() as hooks:
            for depth in depths:
                handle = sites.watch(depth, partial(_keep, states, depth, max(depths)))
                hooks.callback(handle.remove)
            with torch.inference_mode(), suppress(_Enough), rounded(self.model.device, not exact):
                self.model(**self._positioned(batch), use_cache=False, logits_to_keep=keep)
        yield states

    def _positioned(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch with position ids that skip padding, as `generate` makes them. A bare call
        counts padding, which changes results with learned positions (GPT-2, OPT)."""
        takes = inspect.signature(self.model.forward).parameters
        if "position_ids" not in takes or has_vision(self.model.config):
            return batch
        positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        return {**batch, "position_ids": positions}

    def answer_states(
        self, prompts: Sequence[Example], answer: str, progress: Progress | None = None
    ) -> tuple[Float32, NDArray[np.int64]]:
        """`head_input` [N, T, D] that predicts each token of `answer` and the end of the turn.

        Raises:
            DataError: the answer has no tokens.
        """
        target = [*self._tokens_of(answer, "refusal"), self.end_of_turn()]
        reading = _at_end(HeadInput(stream="head_input"))
        states = np.empty(
            (len(prompts), len(target), locate(self.model).config.hidden_size), np.float32
        )
        done = 0
        for index, batch in self._batches(prompts, behind=target[:-1]):
            with self._states(batch, [reading], keep=len(target), exact=False) as captured:
                (h,) = captured.values()
                states[index] = h.float().cpu().numpy()
            done += len(index)
            if progress:
                progress("refusal states", done, len(prompts))
        return states, np.asarray(target)

    def output_head(self) -> OutputHead:
        """Weight and bias of the output embedding, and what the model does to its results.

        Raises:
            UnsupportedFeature: the logits are no multiple of them, nor a soft cap of one.
        """
        head: Any = locate(self.model).head
        bias = getattr(head, "bias", None)
        config = self.model.config.get_text_config()
        softcap = getattr(config, "final_logit_softcapping", None)
        return OutputHead(
            head.weight.detach().float().cpu().numpy(),
            None if bias is None else bias.detach().float().cpu().numpy(),
            softcap,
            self._logit_scale(head, softcap),
        )

    def _logit_scale(self, head: Any, softcap: float | None) -> float:
        """What the model multiplies the results of its output embedding with, by one pass."""
        results: list[Tensor] = []
        handle = head.register_forward_hook(lambda _m, _a, output: results.append(output))
        ids = ordinary_tokens(self.model, 8)
        try:
            with torch.inference_mode():
                logits = self.model(input_ids=ids).logits.double().flatten()
        finally:
            handle.remove()
        before = results[0].double().flatten()
        if softcap:
            logits = torch.atanh((logits / softcap).clamp(-1 + 1e-9, 1 - 1e-9)) * softcap
        scale = float((logits @ before) / (before @ before))
        close = (logits - scale * before).norm() <= 0.01 * logits.norm()
        if not bool(close):
            name = type(self.model).__name__
            raise UnsupportedFeature(RUNTIME, f"a head for the logits of {name}")
        return 1.0 if abs(scale - 1) < 1e-3 else scale


class _Forced(LogitsProcessor):
    """Forces the same tokens in every row."""

    def __init__(self, target: Sequence[int]) -> None:
        self._left = iter(target)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, next(self._left)] = 0
        return forced


def _at_end(site: AnySite) -> Reading:
    return Reading(site=site, position=PromptEnd(type="prompt_end"))


def _depth(reading: Reading, blocks: int) -> int:
    if isinstance(reading.site, HeadInput):
        return blocks + 1
    return reading.site.layer + isinstance(reading.site, LayerOutput)


class _Enough(Exception):
    """Ends a forward pass whose deepest state is known."""


def _keep(states: dict[int, Tensor], depth: int, deepest: int, module: Any, h: Tensor) -> None:
    states[depth] = h
    if depth == deepest:
        raise _Enough


def _take(reading: Reading, states: dict[int, Tensor], mask: Tensor, images: Tensor) -> Tensor:
    """One reading [B, D] of a left-padded batch; NaN for an image where there is none."""
    # The head is the deepest site, whatever the number of blocks.
    h = states[max(states) if isinstance(reading.site, HeadInput) else _depth(reading, 0)]
    if isinstance(reading.position, PromptEnd):
        offset = reading.position.offset
        if int(mask.sum(dim=1).min()) + offset < 1:
            raise DataError(Problem("prompt", f"{1 - offset} tokens or more", "a shorter one"))
        return h[:, -1 + offset].float()
    rows = images if isinstance(reading.position, ImageMean) else mask
    sums = torch.bmm(rows[:, None].float(), h.float())[:, 0]
    return sums / rows.sum(1)[:, None]


def _picture(path: Path) -> Image.Image:
    """An image file, RGB.

    Raises:
        DataError: Pillow cannot read it.
    """
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise DataError(Problem("image", "one that Pillow reads", str(error)), path) from error


def _extended(batch: dict[str, Tensor], behind: Sequence[int]) -> dict[str, Tensor]:
    """The batch with the same tokens behind every prompt."""
    if not behind:
        return batch
    ids = batch["input_ids"]
    more = {"input_ids": torch.tensor(behind), "attention_mask": torch.ones(len(behind))}

    def longer(name: str, tensor: Tensor) -> Tensor:
        if tensor.shape != ids.shape:
            return tensor  # pixels and the like
        tail = more.get(name, torch.zeros(len(behind)))
        return torch.cat([tensor, tail.to(tensor).expand(len(ids), -1)], dim=1)

    return {name: longer(name, tensor) for name, tensor in batch.items()}
