"""Attach a package to a worker's model: checks, hooks, and the wrappers of its runner."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from steerbridge import imports
from steerbridge.errors import UnsupportedFeature
from steerbridge.events import Events
from steerbridge.package import SteeringPackage
from steerbridge.spec import HeadMatrix, ImageMean, Say
from steerbridge_torch import quantisation
from steerbridge_vllm import given, ops, rows, runners, sites, versions
from steerbridge_vllm.gates import Gates, Mine, Share
from steerbridge_vllm.runners import Told
from steerbridge_vllm.several import Several
from steerbridge_vllm.sites import RUNTIME, Stream

LOG: Final = logging.getLogger("vllm.steerbridge")


def before_loading(worker: Any) -> Mapping[str, SteeringPackage]:
    """Load the packages, refuse settings under which one could not act on every request, and change
    those of the compiler.

    Raises:
        UnsupportedFeature: with the setting to change, if there is one; or the version of vLLM.
    """
    packages = given.packages()
    for package in packages.values():
        check(package, worker.vllm_config)
    _divide(worker.vllm_config, packages.values())
    return packages


def check(package: SteeringPackage, config: Any) -> None:
    """Refuse settings under which a package could not act on every request.

    Raises:
        UnsupportedFeature: with the setting to change, if there is one; or the version of vLLM.
    """
    versions.check(bool(config.use_v2_model_runner))
    _check_settings(config)
    _check_package(package, config)


def after_loading(worker: Any, packages: Mapping[str, SteeringPackage]) -> Several:
    """Attach packages to a worker whose weights were loaded; nothing was compiled yet.

    Raises:
        ModelMismatch: a package was made for another model.
        UnsupportedFeature: the model's class, or the kind of worker.
    """
    config = worker.model_runner.model_config
    known = sites.facts(config)
    events, weights = Events(LOG.error), functools.partial(sites.weights_sha256, config)
    kind = quantisation(config.dtype, config.hf_config)
    fitting = {}
    for name, package in packages.items():
        package.check(known, imports.ignored())
        fitting[name] = package.calibrated(RUNTIME, kind, weights)
    gates = gates_of(worker, fitting, Gates)
    attach(worker, gates, events if worker.rank == 0 else None)
    calibrated = [p.spec.is_calibrated(RUNTIME, kind, weights) for p in packages.values()]
    events.active(known, all(calibrated))
    LOG.info("Steerbridge steers %s (%s, rank %d)", known.name, kind, worker.rank)
    return gates


def gates_of(
    worker: Any, packages: Mapping[str, SteeringPackage], make: Callable[..., Gates]
) -> Several:
    """The gates of packages on a worker."""
    runner, config = worker.model_runner, worker.vllm_config

    def made(package: SteeringPackage) -> Callable[[Mine], Gates]:
        return lambda mine: make(
            package,
            torch.device(runner.device),
            _share(config),
            functools.partial(rows.images_of, runner),
            cached=bool(config.cache_config.enable_prefix_caching),
            mine=mine,
        )

    return Several({name: made(package) for name, package in packages.items()})


def attach(worker: Any, gates: Several, told: Told | None) -> Callable[[], None]:
    """Hook the gates into a worker's model and runner; returns what takes them away again.

    Args:
        told: where verdicts are written; None: another rank writes them.
    """
    runner, config = worker.model_runner, worker.vllm_config
    kind = runners.Second if config.use_v2_model_runner else runners.First
    hooks = _hook(gates, runner.get_model(), config.model_config.hf_text_config.num_hidden_layers)
    announced = kind(gates, runner, told)
    announced.install()

    def detach() -> None:
        announced.remove()
        for hook in hooks:
            hook.remove()

    return detach


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


def _divide(config: Any, packages: Iterable[SteeringPackage]) -> None:
    """Let graphs end where the package is called, and give compiled code a name of its own."""
    from vllm.config import CUDAGraphMode

    compilation = config.compilation_config
    if compilation.splitting_ops is not None and ops.SPLITTING not in compilation.splitting_ops:
        compilation.splitting_ops.append(ops.SPLITTING)
    if compilation.cudagraph_mode.has_full_cudagraphs():
        whole = not compilation.splitting_ops
        compilation.cudagraph_mode = CUDAGraphMode.NONE if whole else CUDAGraphMode.PIECEWISE
        LOG.info("Steerbridge: CUDA graphs are %s", compilation.cudagraph_mode.name)
    config.additional_config["steerbridge"] = " ".join(package.sha256 for package in packages)


def _share(config: Any) -> Share:
    """Broadcast from rank 0, so that rounding cannot make ranks decide differently."""
    if config.parallel_config.tensor_parallel_size == 1:
        return lambda values: values
    from vllm.distributed import get_tp_group

    return lambda values: get_tp_group().broadcast(values.contiguous(), 0)


# ---------------------------------------------------------------- hooks


def _hook(gates: Several, model: nn.Module, layers: int) -> list[RemovableHandle]:
    modules = sites.at_depths(model, layers)
    return [
        modules[depth].register_forward_pre_hook(
            functools.partial(_at_site, depth, Stream(modules[depth])),
            prepend=True,
            with_kwargs=True,
        )
        for depth in gates.depths
    ]


def _at_site(
    depth: int,
    stream: Stream,
    module: Any,  # noqa: ARG001 - as torch calls it
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    hidden, residual = stream.of(args, kwargs)
    ops.visit(hidden, residual, depth)
