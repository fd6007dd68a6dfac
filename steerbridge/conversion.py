"""`steerbridge.convert`: the converters, which register themselves as an entry point."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steerbridge import registry
from steerbridge.errors import RuntimeMissing
from steerbridge.format import Loss
from steerbridge.registry import Deferred
from steerbridge.spec import BaseModelInfo
from steerbridge.tensors import Dtype


@dataclass(frozen=True, slots=True)
class Truncation:
    """A head matrix reduced to a lower rank; `error` is the relative Frobenius norm of the rest."""

    intervention: str
    rank: int
    error: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"intervention": self.intervention, "rank": self.rank, "error": self.error}


@dataclass(frozen=True, slots=True)
class ConversionReport:
    """The result of a conversion: formats, the path written, allowed losses, reduced matrices, and
    where and how strongly the vectors act that were read."""

    source: str
    target: str
    path: Path
    losses: tuple[Loss, ...]
    truncations: tuple[Truncation, ...]
    acts: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "source": self.source,
            "target": self.target,
            "path": str(self.path),
            "losses": [{"what": x.what, "effect": x.effect} for x in self.losses],
            "truncations": [x.to_json() for x in self.truncations],
            "acts": list(self.acts),
        }


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: str | None = None,
    source_format: str | None = None,
    answers: Mapping[str, str] | None = None,
    base: BaseModelInfo | str | Path | None = None,
    model: str | Path | None = None,
    rank: int | None = None,
    energy: float | None = None,
    dtype: Dtype | None = None,
    allow_loss: bool = False,
    overwrite: bool = False,
) -> ConversionReport:
    """Convert a steering artifact from one format to another.

    Args:
        source: file or directory to read.
        target: file or directory to write.
        to: name of the target's format (`formats()` lists them); None: a steering package, as
            one GGUF file if the name ends in `.gguf`.
        source_format: name of the source's format; None: recognised from the files.
        answers: options of the formats that the files leave open, by name.
        base: the model that it was made for: directory, GGUF file or steering package.
        model: weights of that model, for formats that need them.
        rank, energy: reduce head matrices to this rank, or to the lowest rank with this share of
            the squared singular values.
        dtype: store tensors as F32, F16 or BF16.
        allow_loss: write although the target holds less than the source.
        overwrite: replace what Steerbridge wrote to `target` before; other files of a directory
            stay.

    Raises:
        ConversionError: the artifact cannot be read, or the target cannot hold all of it.
        PackageError: the target exists, and is not to be overwritten or not Steerbridge's.
        RuntimeMissing: the converters, or torch for files of `torch.save`, are not installed.
    """
    known = registry.entries("functions")
    if "convert" not in known:
        raise RuntimeMissing("steerbridge_convert", extra="convert")
    function: Deferred = known["convert"].load()
    report: ConversionReport = function.load()(
        source,
        target,
        to=to,
        source_format=source_format,
        answers=answers,
        base=base,
        model=model,
        rank=rank,
        energy=energy,
        dtype=dtype,
        allow_loss=allow_loss,
        overwrite=overwrite,
    )
    return report
