"""Steerbridge: train a safety guard once, run the same steering package in every runtime.

A guard is a steering package: probes that read a model's hidden states at the end of a prompt,
interventions that change what the model says, and rules that join them. If no probe fires,
logits are bit-identical to those of the model alone.

Train a guard, save it, measure it:

    import steerbridge

    model = steerbridge.open_model("hf", "smollm2")
    examples = steerbridge.read_examples("prompts.jsonl")
    package = steerbridge.train(model, examples)
    package.save("guard.gguf")
    steerbridge.evaluate(model, package, steerbridge.corpus_examples("test")).summary

Attach it to a model of your own with `steerbridge_hf.steer` (transformers) or
`steerbridge_llama_cpp.SteeredLlama` (llama.cpp), convert it with `steerbridge.convert`.

Importing this package imports no runtime, and neither torch nor numpy: each name is imported
when it is first used. What needs an extra that is missing raises `RuntimeMissing`, whose
`command` installs it.
"""

from typing import TYPE_CHECKING

from steerbridge.registry import lazy as _lazy

if TYPE_CHECKING:
    from steerbridge._version import __version__
    from steerbridge.conversion import ConversionReport, convert
    from steerbridge.data import Example, corpus_examples
    from steerbridge.datasets.reading import read_examples
    from steerbridge.errors import (
        BrokenPackage,
        ConversionError,
        DataError,
        EndpointFailed,
        HookLost,
        InvalidOption,
        InvalidSpec,
        MissingOption,
        ModelMismatch,
        NotReadBack,
        NotRepresentable,
        PackageError,
        Problem,
        RowMappingLost,
        RuntimeMissing,
        SteerbridgeError,
        SteeredCache,
        SteeringFailed,
        UnknownFormat,
        UnreadableSource,
        UnsupportedFeature,
        UnsupportedVersion,
        WouldLose,
    )
    from steerbridge.evaluation.evaluate import evaluate
    from steerbridge.evaluation.record import Evaluation
    from steerbridge.format import formats
    from steerbridge.package import SteeringPackage, load
    from steerbridge.reference import Verdict
    from steerbridge.registry import runtimes
    from steerbridge.runtime import Generation, Outcome, Progress, open_model, smollm2
    from steerbridge.sheet import describe
    from steerbridge.spec import SteeringSpec
    from steerbridge.training.settings import TrainSettings
    from steerbridge.training.train import train

_HOMES = {
    "steerbridge._version": ("__version__",),
    "steerbridge.conversion": ("ConversionReport", "convert"),
    "steerbridge.data": ("Example", "corpus_examples"),
    "steerbridge.datasets.reading": ("read_examples",),
    "steerbridge.errors": (
        "BrokenPackage",
        "ConversionError",
        "DataError",
        "EndpointFailed",
        "HookLost",
        "InvalidOption",
        "InvalidSpec",
        "MissingOption",
        "ModelMismatch",
        "NotReadBack",
        "NotRepresentable",
        "PackageError",
        "Problem",
        "RowMappingLost",
        "RuntimeMissing",
        "SteerbridgeError",
        "SteeredCache",
        "SteeringFailed",
        "UnknownFormat",
        "UnreadableSource",
        "UnsupportedFeature",
        "UnsupportedVersion",
        "WouldLose",
    ),
    "steerbridge.evaluation.evaluate": ("evaluate",),
    "steerbridge.evaluation.record": ("Evaluation",),
    "steerbridge.format": ("formats",),
    "steerbridge.package": ("SteeringPackage", "load"),
    "steerbridge.reference": ("Verdict",),
    "steerbridge.registry": ("runtimes",),
    "steerbridge.runtime": ("Generation", "Outcome", "Progress", "open_model", "smollm2"),
    "steerbridge.sheet": ("describe",),
    "steerbridge.spec": ("SteeringSpec",),
    "steerbridge.training.settings": ("TrainSettings",),
    "steerbridge.training.train": ("train",),
}

__all__ = [
    "BrokenPackage",
    "ConversionError",
    "ConversionReport",
    "DataError",
    "EndpointFailed",
    "Evaluation",
    "Example",
    "Generation",
    "HookLost",
    "InvalidOption",
    "InvalidSpec",
    "MissingOption",
    "ModelMismatch",
    "NotReadBack",
    "NotRepresentable",
    "Outcome",
    "PackageError",
    "Problem",
    "Progress",
    "RowMappingLost",
    "RuntimeMissing",
    "SteerbridgeError",
    "SteeredCache",
    "SteeringFailed",
    "SteeringPackage",
    "SteeringSpec",
    "TrainSettings",
    "UnknownFormat",
    "UnreadableSource",
    "UnsupportedFeature",
    "UnsupportedVersion",
    "Verdict",
    "WouldLose",
    "__version__",
    "convert",
    "corpus_examples",
    "describe",
    "evaluate",
    "formats",
    "load",
    "open_model",
    "read_examples",
    "runtimes",
    "smollm2",
    "train",
]

__getattr__ = _lazy(__name__, {name: home for home, names in _HOMES.items() for name in names})


def __dir__() -> list[str]:
    return [*__all__]
