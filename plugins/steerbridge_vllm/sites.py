"""The sites of a spec in vLLM's models, and what identifies a loaded model."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, Final

from torch import Tensor, nn

from steerbridge.errors import UnsupportedFeature
from steerbridge.fingerprint import ModelFacts, files_sha256, tokenizer_facts
from steerbridge_torch import decoder

RUNTIME: Final = "vllm"
_HIDDEN: Final = ("hidden_states", "x", "input")  # of blocks, of vLLM's norms, of torch's


def at_depths(model: nn.Module, layers: int) -> tuple[nn.Module, ...]:
    """The modules whose inputs are the sites before the head, by depth (`SteeringSpec.depth`).

    Raises:
        UnsupportedFeature: they cannot be located.
    """
    blocks, norm = decoder(model, layers, RUNTIME)
    return (*blocks, norm)


class Stream:
    """Where the arguments of a module hold the residual stream: in one tensor, or in two that its
    first norm adds up."""

    def __init__(self, module: nn.Module) -> None:
        names = list(inspect.signature(module.forward).parameters)
        if names[:2] == ["args", "kwargs"]:  # vLLM's norms choose their code when they run
            names = ["x", "residual"]
        hidden = next((name for name in _HIDDEN if name in names), None)
        if hidden is None:
            raise UnsupportedFeature(RUNTIME, f"{type(module).__name__} takes no hidden states")
        self._hidden = names.index(hidden), hidden
        known = "residual" in names
        self._residual = (names.index("residual"), "residual") if known else None

    def of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """The two tensors of a call; the second is None in the first block."""
        return _argument(self._hidden, args, kwargs), _argument(self._residual, args, kwargs)


def _argument(place: tuple[int, str] | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if place is None:
        return None
    index, name = place
    return args[index] if index < len(args) else kwargs.get(name)


def facts(model_config: Any) -> ModelFacts:
    """Fingerprint of a loaded model and of its tokenizer."""
    from vllm.tokenizers import cached_tokenizer_from_config

    text = model_config.hf_text_config
    return ModelFacts(
        model_type=text.model_type,
        hidden_size=text.hidden_size,
        num_layers=text.num_hidden_layers,
        vocab_size=text.vocab_size,
        name=str(model_config.model),
        **tokenizer_facts(cached_tokenizer_from_config(model_config)),
    )


def weights_sha256(model_config: Any) -> str:
    """Hash of samples of the checkpoint's files, which every rank sees alike; empty where they are
    not on this machine."""
    files = _weights(model_config)
    return files_sha256(files) if files else ""


def _weights(model_config: Any) -> list[Path]:
    path = Path(model_config.model)
    if not path.exists():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            revision = model_config.revision
            found = snapshot_download(str(path), revision=revision, local_files_only=True)
        except (LocalEntryNotFoundError, ValueError):
            return []
        path = Path(found)
    if path.is_file():
        return [path]
    return sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
