"""A feature of a sparse autoencoder: a row of the decoder that SAELens saved, added to the stream.

`cfg.json` and `sae_weights.safetensors` with `W_dec` [d_sae, d_in] (sae_lens/saes/sae.py of SAELens
6). `hook_name` is where the autoencoder was trained: `blocks.K.hook_resid_pre` is the input of
block K, `hook_resid_post` its output. SAELens steers by `h + strength W_dec[feature]` there. Its
loader of files from before version 6 drops every key that it does not name, and so does this one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np

from steerbridge.errors import InvalidOption, NotRepresentable
from steerbridge.format import (
    Answers,
    Format,
    Holds,
    Option,
    block,
    require_known,
    shown,
    unreadable,
)
from steerbridge.package import SteeringPackage
from steerbridge.tensors import Tensor
from steerbridge_convert import files, vectors
from steerbridge_convert.scope import POSITIONS, STRENGTH

CONFIG: Final = "cfg.json"
WEIGHTS: Final = "sae_weights.safetensors"
_FEATURE: Final = Option("feature", block, "which feature: a row of W_dec")
_HOOK: Final = re.compile(r"^blocks\.(\d{1,5})\.hook_resid_(pre|post)$")
_OLD: Final = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index"}
# What a configuration of version 6 says at its top, of any architecture. All of it is about
# encoding, but for those that are checked.
_ENCODES: Final = frozenset(
    {
        *("architecture", "d_in", "d_sae", "dtype", "device", "metadata", "apply_b_dec_to_input"),
        *("k", "rescale_acts_by_decoder_norm", "use_sparse_activations", "jumprelu_bandwidth"),
    }
)
# Values with which a row of W_dec is a vector of the stream, as it is.
_CHECKED: Final[dict[str, tuple[Any, ...]]] = {
    "normalize_activations": ("none", None, False),
    "reshape_activations": ("none", None),
    "hook_head_index": (None,),
    "hook_name_out": (None,),
    "finetuning_scaling_factor": (False, None),
}


class SaeLens(Format):
    """Read only: an autoencoder is trained, not converted to."""

    name = "sae-lens"
    title = "SAELens feature (directory)"
    holds = Holds(
        interventions=frozenset({"add_vector"}),
        sites="input or output of one block",
        strength="the tool sets it when it steers",
    )
    options = (_FEATURE, POSITIONS, STRENGTH)
    writable: ClassVar[bool] = False
    exact: ClassVar[bool] = False  # nothing is written

    def recognises(self, path: Path) -> bool:
        return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()

    def contents(self, path: Path) -> dict[str, Any]:
        config = _config(path)
        return {"hook_name": shown(config.get("hook_name")), "W_dec": list(_decoder(path).shape)}

    def read(self, path: Path, answers: Answers) -> SteeringPackage:
        config, decoder = _config(path), _decoder(path)
        for key, allowed in _CHECKED.items():
            if key in config and config[key] not in allowed:
                raise NotRepresentable(self.name, f"{key} = {shown(config[key])}")
        hook = config.get("hook_name")
        where = _HOOK.match(hook) if isinstance(hook, str) else None
        if where is None:
            raise NotRepresentable(self.name, f"hook_name {shown(hook)}: only the residual stream")
        base = answers.base_model()
        if (feature := answers.get(_FEATURE)) >= decoder.shape[0]:
            last = decoder.shape[0] - 1
            raise InvalidOption(self.name, _FEATURE.name, f"{feature}: features are 0..{last}")
        row = Tensor(decoder.dtype, np.ascontiguousarray(decoder.array[feature]))
        if not row.finite():
            raise unreadable(path / WEIGHTS, f"W_dec[{feature}]", "finite values", "others")
        layer = int(where[1])
        vectors.checked({layer: row}, base, self.name)
        place = vectors.inputs if where[2] == "pre" else vectors.outputs
        return vectors.package(
            f"{path.name}-{feature}",
            base,
            place({layer: row}),
            answers.get(STRENGTH),
            answers.get(POSITIONS),
        )

    def write(self, package: SteeringPackage, path: Path, answers: Answers) -> None:
        raise NotRepresentable(self.name, "an autoencoder, which is trained")


def _config(path: Path) -> Mapping[str, Any]:
    """What says how to use the decoder, under its names of version 6."""
    stored = files.json_object(path / CONFIG)
    if "metadata" not in stored:
        return {_OLD.get(key, key): value for key, value in stored.items()}
    metadata = stored["metadata"]
    if not isinstance(metadata, dict):
        raise unreadable(path / CONFIG, "metadata", "an object", shown(metadata))
    require_known("sae-lens", CONFIG, stored, _ENCODES | set(_CHECKED))
    architecture = stored.get("architecture")
    if not isinstance(architecture, str) or "transcoder" in architecture:
        raise NotRepresentable(
            "sae-lens", f"architecture {shown(architecture)}: it writes elsewhere"
        )
    return {**metadata, **stored}


def _decoder(path: Path) -> Tensor:
    tensors = files.safetensors(path / WEIGHTS)
    decoder = tensors.get("W_dec")
    if decoder is None or len(decoder.shape) != 2:
        raise unreadable(path / WEIGHTS, "W_dec", "a matrix [d_sae, d_in]", "none")
    scale = tensors.get("scaling_factor")
    if scale is not None and not np.allclose(scale.float32(), 1):
        raise NotRepresentable("sae-lens", "a scaling_factor other than 1")
    return decoder
