"""The `vllm` runtime: an engine in this process that answers prompts and shows hidden states, for
`steerbridge calibrate`, `eval`, `generate` and `score`. Servers are started with `steerbridge run`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from steerbridge import capture
from steerbridge.data import Example
from steerbridge.errors import DataError, Problem, UnsupportedFeature
from steerbridge.fingerprint import ModelFacts
from steerbridge.package import SteeringPackage
from steerbridge.runtime import Generation, Outcome, Progress, Trace
from steerbridge.serving import token_ids
from steerbridge.spec import ImageMean, Reading
from steerbridge.tensors import Float32
from steerbridge_torch import quantisation
from steerbridge_vllm import attach, sites
from steerbridge_vllm.gates import Gates, State
from steerbridge_vllm.rows import Part
from steerbridge_vllm.sites import RUNTIME
from vllm import LLM, SamplingParams, TokensPrompt

AT_ONCE: Final = 256  # prompts that are sent together, between two reports of progress
# Steered requests follow plain ones in one engine: nothing compiled, nothing cached.
SETTINGS: Final[dict[str, Any]] = {
    "enforce_eager": True,
    "enable_prefix_caching": False,
    "async_scheduling": False,
    "disable_log_stats": True,
}


def open_model(model: str | Path, **options: Any) -> VllmModel:
    """Open a model that vLLM can load.

    Args:
        options: of `vllm.LLM`, such as `quantization` or `max_model_len`.

    Raises:
        UnsupportedFeature: `mmproj`, a package that this process attaches to every model, or an
            engine whose workers are other processes.
    """
    if "mmproj" in options:
        raise UnsupportedFeature(RUNTIME, "option mmproj")
    if os.environ.get("STEERBRIDGE_PACKAGE"):
        what = "a package for every model of this process (STEERBRIDGE_PACKAGE)"
        raise UnsupportedFeature(RUNTIME, what, "no STEERBRIDGE_PACKAGE")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return VllmModel(LLM(str(model), **{**SETTINGS, **options}))


class VllmModel:
    """A `vllm.LLM` as a runtime (see `steerbridge.runtime`), for prompts without images."""

    def __init__(self, llm: Any) -> None:
        self.llm: Any = llm
        executor = llm.llm_engine.model_executor
        if not hasattr(executor, "driver_worker"):
            raise UnsupportedFeature(
                RUNTIME, "an engine of several processes", "tensor_parallel_size=1"
            )
        self._worker = executor.driver_worker.worker
        self._config = llm.llm_engine.vllm_config
        self._tokenizer = llm.get_tokenizer()

    @property
    def runtime(self) -> str:
        return RUNTIME

    @functools.cached_property
    def facts(self) -> ModelFacts:
        return sites.facts(self._config.model_config)

    @property
    def quantisation(self) -> str:
        config = self._config.model_config
        return quantisation(config.dtype, config.hf_config)

    @functools.cached_property
    def weights_sha256(self) -> str:
        """See `LoadedModel`.

        Raises:
            UnsupportedFeature: the checkpoint's files are not on this machine.
        """
        if found := sites.weights_sha256(self._config.model_config):
            return found
        raise UnsupportedFeature(RUNTIME, "a checkpoint whose files are not on this machine")

    def render(self, prompt: Example) -> list[int]:
        """Token ids of a prompt: the chat template with its generation prompt, if there is one.

        Raises:
            UnsupportedFeature: a prompt with images; a system message or turns without a template.
        """
        if prompt.images:
            raise UnsupportedFeature(RUNTIME, "prompts with images")
        return token_ids(self._tokenizer, prompt, RUNTIME)

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
        """Greedy answers, in the order of the prompts.

        Raises:
            DataError: a prompt does not fit the context.
            ModelMismatch: the package was made for another model.
            UnsupportedFeature: the package, or the settings of the engine.
        """
        if package is None:
            answered = self._answered(prompts, max_new_tokens, "generate", progress)
            return [self._generation(output, None) for output in answered]
        package.check(self.facts, ignore)
        weights = functools.partial(sites.weights_sha256, self._config.model_config)
        package = package.calibrated(RUNTIME, self.quantisation, weights)
        with self.attached(package) as outcomes:
            answered = self._answered(prompts, max_new_tokens, "generate", progress)
            return [self._generation(o, outcomes[o.request_id]) for o in answered]

    def _answered(
        self, prompts: Sequence[Example], new: int, step: str, progress: Progress | None
    ) -> Iterator[Any]:
        """What vLLM says of each prompt."""
        params = SamplingParams(temperature=0.0, max_tokens=new, detokenize=False)
        room = self._config.model_config.max_model_len - new
        for start in range(0, len(prompts), AT_ONCE):
            ids = [self.render(prompt) for prompt in prompts[start : start + AT_ONCE]]
            for tokens in ids:
                if len(tokens) > room:
                    raise DataError(Problem("prompt", f"{room} tokens at most", str(len(tokens))))
            asked = [TokensPrompt(prompt_token_ids=tokens) for tokens in ids]
            yield from self.llm.generate(asked, params, use_tqdm=False)
            if progress:
                progress(step, start + len(ids), len(prompts))

    def _generation(self, output: Any, outcome: Outcome | None) -> Generation:
        [answer] = output.outputs
        tokens, finish = tuple(answer.token_ids), str(answer.finish_reason)
        kept = list(tokens[:-1] if finish == "stop" else tokens)
        text = self._tokenizer.decode(kept, skip_special_tokens=True)
        return Generation(text, tokens, finish, outcome)

    @contextmanager
    def attached(self, package: SteeringPackage) -> Iterator[dict[str, Outcome]]:
        """Steer what `llm` generates; outcomes by the name of the request.

        Raises:
            UnsupportedFeature: the package, or the settings of the engine.
        """
        with self._attached(package, Gates) as (_, outcomes):
            yield outcomes

    @contextmanager
    def _attached(
        self, package: SteeringPackage, make: type[Gates]
    ) -> Iterator[tuple[Any, dict[str, Outcome]]]:
        """The gates of a package, for as long as they are attached, and outcomes by request."""
        attach.check(package, self._config)
        name, told = package.spec.name, _Told()
        gates = attach.gates_of(self._worker, {name: package}, make)
        detach = attach.attach(self._worker, gates, told)
        try:
            yield gates.gates[name], told.outcomes
        finally:
            detach()

    def log_likelihoods(self, *_: Any, **__: Any) -> NDArray[np.float64]:
        """Not here: vLLM takes no tokens in place of those that it samples.

        Raises:
            UnsupportedFeature: always.
        """
        raise UnsupportedFeature(RUNTIME, "likelihoods of a given answer")

    # -------------------------------------------------------- capture

    def capture(
        self,
        prompts: Sequence[Example],
        readings: Sequence[Reading],
        out: NDArray[np.float32],
        progress: Progress | None = None,
    ) -> None:
        """Fill out[i, k] with reading k of prompt i ([N, K, D]); NaN where there is no image."""
        of_image = [isinstance(r.position, ImageMean) for r in readings]
        package = capture.of_readings(self.facts, readings)
        with self._attached(package, _Recorder) as (recorder, _):
            for i, output in enumerate(self._answered(prompts, 1, "capture", progress)):
                out[i] = np.concatenate(recorder.read.pop(output.request_id))
                out[i, of_image] = np.nan

    def trace(self, prompt: Example, package: SteeringPackage) -> Trace:
        """See `LoadedModel`."""
        reader = capture.of_rows(package)
        words = tuple(self._tokenizer.decode([id]) for id in self.render(prompt))
        names = [probe.id for probe in reader.spec.probes]
        if not names:
            return Trace(words, {})
        with self._attached(reader, _Recorder) as (recorder, _):
            [output] = self._answered([prompt], 1, "trace", None)
            found = recorder.read[output.request_id]
        return Trace(words, dict(zip(names, found, strict=True)))


class _Told:
    """Outcomes by the name that a request has outside the engine."""

    def __init__(self) -> None:
        self.outcomes: dict[str, Outcome] = {}

    def verdict(self, request: str, outcome: Outcome) -> None:
        """See `runners.Told`."""
        self.outcomes[_outside(request)] = outcome


def _outside(request: str) -> str:
    """vLLM's name of a request without what it makes of it inside: `7-0f3a99c1`."""
    return request.partition("-")[0]


class _Recorder(Gates):
    """Gates that keep what each probe reads of a prompt, by request: readings [K, D], or the logits
    of rows [P]."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.read: dict[str, list[Float32]] = {}

    def _judge(self, index: int, ending: Sequence[tuple[Part, State]]) -> None:
        count = len(self._package.spec.probes[index].readings)
        for part, state in ending:
            read = torch.stack([self._value(index, k, part, state) for k in range(count)])
            self._add(part, index, read.cpu().numpy())
        super()._judge(index, ending)

    def _judge_rows(self, index: int, ending: Sequence[tuple[Part, State]]) -> None:
        assert self.tables is not None
        for part, _ in ending:
            slots = self.tables.slots(part.blocks, 0, part.prompt)
            self._add(part, index, self.tables.logits(index, slots).cpu().numpy())
        super()._judge_rows(index, ending)

    def _add(self, part: Part, index: int, read: Float32) -> None:
        """Probes are judged in any order."""
        known = self.read.setdefault(_outside(part.request), [])
        known += [np.empty(0, np.float32)] * (index + 1 - len(known))
        known[index] = read
