"""Attach a package to a worker's model: checks, hooks, and wrappers that record which rows a pass
holds. Only these objects are changed, no class of vLLM.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from steerbridge import imports, reference
from steerbridge.errors import UnsupportedFeature
from steerbridge.events import Events
from steerbridge.package import SteeringPackage
from steerbridge.spec import HeadMatrix, ImageMean, Say
from steerbridge_torch import quantisation
from steerbridge_vllm import given, ops, rows, sites, transport, versions
from steerbridge_vllm.gates import Gates, Share
from steerbridge_vllm.sites import RUNTIME, Stream

_WRAPPED: Final = (
    "initialize_kv_cache",
    "execute_model",
    "_prepare_inputs",
    "_model_forward",
    "_sample",
    "sample_tokens",
)
LOG: Final = logging.getLogger("vllm.steerbridge")


def before_loading(worker: Any) -> SteeringPackage:
    """Load the package, refuse settings under which it could not act on every request, and change
    those of the compiler.

    Raises:
        UnsupportedFeature: with the setting to change, if there is one; or the version of vLLM.
    """
    versions.check()
    package = given.package()
    config = worker.vllm_config
    _check_settings(config)
    _check_package(package, config)
    _divide(config, package)
    return package


def after_loading(worker: Any, package: SteeringPackage) -> Gates:
    """Attach the package to a worker whose weights were loaded; nothing was compiled yet.

    Raises:
        ModelMismatch: the package was made for another model.
        UnsupportedFeature: the model's class, or the kind of worker.
    """
    runner, config = worker.model_runner, worker.vllm_config
    known = sites.facts(config.model_config)
    package.check(known, imports.ignored())
    kind = quantisation(config.model_config.dtype, config.model_config.hf_config)
    gates = Gates(
        package.calibrated(RUNTIME, kind),
        torch.device(runner.device),
        _share(config),
        functools.partial(_images, runner),
        cached=bool(config.cache_config.enable_prefix_caching),
    )
    _hook(gates, runner.get_model(), known.num_layers)
    events = Events(LOG.error)
    Wrapped(gates, runner, events if worker.rank == 0 else None).install()
    events.active(known, package.spec.is_calibrated(RUNTIME, kind))
    LOG.info("Steerbridge steers %s (%s, rank %d)", known.name, kind, worker.rank)
    return gates


# ---------------------------------------------------------------- checks


def _check_settings(config: Any) -> None:
    parallel, model = config.parallel_config, config.model_config
    scheduling = config.scheduler_config
    refused = [
        (model.runner_type != "generate", "models that do not generate", ""),
        (model.is_encoder_decoder, "models with an encoder", ""),
        (
            parallel.pipeline_parallel_size > 1,
            "pipeline parallelism: a stage sees some of the layers",
            "--pipeline-parallel-size 1",
        ),
        (
            parallel.decode_context_parallel_size > 1
            or getattr(parallel, "prefill_context_parallel_size", 1) > 1,
            "context parallelism: a rank sees some of the rows",
            "--decode-context-parallel-size 1",
        ),
        (parallel.use_ubatching, "passes that are divided (DBO)", "--no-enable-dbo"),
        (
            config.kv_transfer_config is not None,
            "KV connectors: blocks come without what was read of their rows",
            "no --kv-transfer-config",
        ),
        (
            config.lora_config is not None,
            "LoRA adapters, of which each request may choose one: they move what probes read",
            "merge the adapter into the model, and train the package for that",
        ),
        (
            config.speculative_config is not None and bool(scheduling.async_scheduling),
            "guesses of a pass that is not finished: rows are not known on the host",
            "--no-async-scheduling",
        ),
        (
            bool(getattr(config.cache_config, "kv_sharing_fast_prefill", False)),
            "a prefill that skips rows of later layers",
            "no --kv-sharing-fast-prefill",
        ),
        (
            bool(config.use_v2_model_runner),
            "the second model runner",
            "VLLM_USE_V2_MODEL_RUNNER=0",
        ),
    ]
    for holds, what, setting in refused:
        if holds:
            raise UnsupportedFeature(RUNTIME, what, setting)


def _check_package(package: SteeringPackage, config: Any) -> None:
    spec = package.spec
    for x in spec.interventions:
        if isinstance(x, Say) and x.reasoning is not None:
            raise UnsupportedFeature(RUNTIME, f"{x.id}: a sentence behind a block of reasoning")
    conditional = {id for rule in spec.rules if rule.condition for id in rule.interventions}
    for x in spec.interventions:
        if x.position == "all_positions" and x.id in conditional:
            what = f"{x.id}: acts on all positions under a condition; a prompt comes in parts"
            raise UnsupportedFeature(RUNTIME, what)
    layers = [x.id for x in spec.interventions if not isinstance(x, HeadMatrix | Say)]
    if layers and config.cache_config.enable_prefix_caching:
        raise UnsupportedFeature(
            RUNTIME,
            f"{layers[0]}: writes before the head would stay in the prefix cache",
            "--no-enable-prefix-caching",
        )
    of_images = [
        probe.id
        for probe in spec.probes
        if any(isinstance(r.position, ImageMean) for r in probe.readings)
        or (probe.token_reading is not None and probe.token_reading.rows != "all")
    ]
    if of_images and config.model_config.enable_prompt_embeds:
        what = f"{of_images[0]}: which rows of given embeddings are an image's is not known"
        raise UnsupportedFeature(RUNTIME, what, "no --enable-prompt-embeds")


def _divide(config: Any, package: SteeringPackage) -> None:
    """Let graphs end where the package is called, and give compiled code a name of its own."""
    from vllm.config import CUDAGraphMode

    compilation = config.compilation_config
    if compilation.splitting_ops is not None and ops.SPLITTING not in compilation.splitting_ops:
        compilation.splitting_ops.append(ops.SPLITTING)
    if compilation.cudagraph_mode.has_full_cudagraphs():
        whole = not compilation.splitting_ops
        compilation.cudagraph_mode = CUDAGraphMode.NONE if whole else CUDAGraphMode.PIECEWISE
        LOG.info("Steerbridge: CUDA graphs are %s", compilation.cudagraph_mode.name)
    config.additional_config["steerbridge"] = package.sha256


def _share(config: Any) -> Share:
    """Broadcast from rank 0, so that rounding cannot make ranks decide differently."""
    if config.parallel_config.tensor_parallel_size == 1:
        return lambda values: values
    from vllm.distributed import get_tp_group

    return lambda values: get_tp_group().broadcast(values.contiguous(), 0)


def _images(runner: Any, request: str, prompt: int) -> Any:
    return rows.image_rows(runner.requests[request].mm_features, prompt)


# ---------------------------------------------------------------- hooks and wrappers


def _hook(gates: Gates, model: nn.Module, layers: int) -> None:
    modules = sites.at_depths(model, layers)
    for depth in gates.depths:
        module = modules[depth]
        module.register_forward_pre_hook(
            functools.partial(_at_site, depth, Stream(module)), prepend=True, with_kwargs=True
        )


def _at_site(
    depth: int,
    stream: Stream,
    module: Any,  # noqa: ARG001 - as torch calls it
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    hidden, residual = stream.of(args, kwargs)
    ops.visit(hidden, residual, depth)


class Wrapped:
    """A model runner of the first generation whose passes are announced to the gates.

    Args:
        events: where verdicts are written; None: another rank writes them.
    """

    def __init__(self, gates: Gates, runner: Any, events: Events | None) -> None:
        self._gates, self._runner, self._events = gates, runner, events
        self._group = 0
        self._real: dict[str, Any] = {name: getattr(runner, name) for name in _WRAPPED}
        self._real_compute_logits = runner.get_model().compute_logits

    def install(self) -> None:
        """Put the wrappers in place."""
        for name in _WRAPPED:
            setattr(self._runner, name, getattr(self, "_" + name.lstrip("_")))
        self._runner.get_model().compute_logits = self._compute_logits

    def _initialize_kv_cache(self, kv_cache_config: Any, *args: Any, **kwargs: Any) -> Any:
        result = self._real["initialize_kv_cache"](kv_cache_config, *args, **kwargs)
        if self._gates.keeps_rows:
            self._group = _full_attention(kv_cache_config.kv_cache_groups)
            table = self._runner.input_batch.block_table.block_tables[self._group]
            size = kv_cache_config.kv_cache_groups[self._group].kv_cache_spec.block_size
            blocks = kv_cache_config.num_blocks * size // table.block_size
            self._gates.allocate(blocks, table.block_size)
        return result

    def _prepare_inputs(self, scheduled: Any, counts: Any, *args: Any, **kwargs: Any) -> Any:
        result = self._real["_prepare_inputs"](scheduled, counts, *args, **kwargs)
        self._gates.begin(rows.of_batch(self._runner, scheduled, counts, self._group))
        return result

    def _model_forward(self, *args: Any, **kwargs: Any) -> Any:
        with ops.visiting(self._gates):
            result = self._real["_model_forward"](*args, **kwargs)
        self._gates.finish(result[0] if isinstance(result, tuple) else result)
        return result

    def _compute_logits(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self._real_compute_logits(self._gates.at_head(hidden), *args, **kwargs)

    def _sample(self, logits: Tensor, guesses: Any, *args: Any, **kwargs: Any) -> Any:
        said = self._gates.said()
        if said:
            at = torch.tensor(list(said), device=logits.device)
            words = torch.tensor(list(said.values()), device=logits.device)
            logits[at] = reference.UNSAID
            logits[at, words] = 0
        output = self._real["_sample"](logits, guesses, *args, **kwargs)
        if said:  # whatever a request wanted of its sampler
            _say(output.sampled_token_ids, said, guesses)
        return output

    def _execute_model(self, scheduled: Any, *args: Any, **kwargs: Any) -> Any:
        self._gates.forget(scheduled.finished_req_ids)
        try:
            return self._real["execute_model"](scheduled, *args, **kwargs)
        except BaseException:
            self._gates.drop()
            raise

    def _sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        sampled = self._runner.execute_model_state is not None
        output = self._real["sample_tokens"](*args, **kwargs)
        if not sampled:
            return output
        told = self._gates.end(_accepted(output) if self._runner.speculative_config else {})
        if self._events is not None:
            for request, outcome in told.items():
                self._events.verdict(request, outcome)
        return transport.attached(output, told)


def _full_attention(groups: Sequence[Any]) -> int:
    """The group of KV caches that holds every row of a sequence.

    Raises:
        UnsupportedFeature: there is none.
    """
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    for index, group in enumerate(groups):
        if isinstance(group.kv_cache_spec, FullAttentionSpec):
            return index
    raise UnsupportedFeature(RUNTIME, "a model without full attention: no cache has every row")


def _accepted(output: Any) -> dict[str, int]:
    """Guesses that were taken, by request."""
    tokens = output.sampled_token_ids
    return {r: max(0, len(tokens[i]) - 1) for r, i in output.req_id_to_index.items()}


def _say(sampled: Tensor, said: dict[int, int], guesses: Any) -> None:
    """Write the tokens that must be said over those that were sampled [B, 1 + guesses]."""
    if guesses is None:
        at = torch.tensor(list(said), device=sampled.device)
        words = torch.tensor(list(said.values()), dtype=sampled.dtype, device=sampled.device)
        sampled[at, 0] = words
        return
    drafts, first, row = guesses.draft_token_ids.tolist(), 0, 0
    for request, count in enumerate(guesses.num_draft_tokens):
        guessed = drafts[first : first + count]
        if any(row + k in said for k in range(count + 1)):
            old, line = sampled[request].tolist(), []
            for k in range(count + 1):
                word = said.get(row + k, old[k])
                if word == transport.NOTHING:
                    break
                line.append(word)
                if k < count and word != guessed[k]:
                    break
            line += [transport.NOTHING] * (len(old) - len(line))
            sampled[request] = torch.tensor(line, dtype=sampled.dtype, device=sampled.device)
        first, row = first + count, row + count + 1
