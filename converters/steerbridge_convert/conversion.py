"""`convert`: read any format, write any other, and say what does not fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steerbridge.atomic import replacing
from steerbridge.errors import PackageError, Unanswered, WouldLose
from steerbridge.formats import Format, Given, Loss, detect, named
from steerbridge.package import SteeringPackage
from steerbridge.spec import BaseModelInfo
from steerbridge.tensors import Dtype
from steerbridge_convert import reduction
from steerbridge_convert.base import base_model
from steerbridge_convert.reduction import Truncation


@dataclass(frozen=True, slots=True)
class Report:
    """What a conversion did. `losses` were allowed; `truncations` are those of low rank."""

    source: str
    target: str
    path: Path
    losses: tuple[Loss, ...]
    truncations: tuple[Truncation, ...]

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "source": self.source,
            "target": self.target,
            "path": str(self.path),
            "losses": [{"what": x.what, "effect": x.effect} for x in self.losses],
            "truncations": [x.plain() for x in self.truncations],
        }


def read(
    source: str | Path,
    *,
    source_format: str | None = None,
    answers: Mapping[str, str] | None = None,
    base: BaseModelInfo | str | Path | None = None,
    model: str | Path | None = None,
) -> tuple[SteeringPackage, list[Loss]]:
    """An artifact of any format as a steering package, and what was lost in reading it.

    The arguments are those of `convert`.

    Raises:
        ConversionError: see `steerbridge.errors`.
    """
    format = named(source_format) if source_format else detect(Path(source))
    weights = Path(model) if model else None
    known = base_model(Path(base)) if isinstance(base, str | Path) else base
    if known is None and weights is not None:
        known = base_model(weights)
    given = Given(format.name, answers or {}, known, weights)
    return format.read(Path(source), given), given.lost


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
) -> Report:
    """Convert an artifact.

    Args:
        to: name of the target format; without one a path that ends in `.gguf` becomes a package
            of one file, and any other a package directory.
        source_format: name of the source format, where the files alone do not tell.
        answers: what the files of either format leave open, by the names of its `Ask`s.
        base: the model the artifact was made for, where its files do not say it all: a model
            directory, a GGUF model or a steering package; without it, `model`.
        model: GGUF file or directory of that model's weights, where a format needs them.
        rank, energy: keep this rank of head matrices, or the rank with this share of their
            squared singular values.
        dtype: store tensors of a steering package as this.
        allow_loss: write although the target holds less; the losses are in the report.

    Raises:
        ConversionError: see `steerbridge.errors`; nothing was written.
        PackageError: the target exists and is no artifact of the target format.
    """
    before = named(source_format) if source_format else detect(Path(source))
    after = named(to or ("steerbridge-gguf" if Path(target).suffix == ".gguf" else "steerbridge"))
    answers = dict(answers or {})
    _refuse_unknown(answers, before, after)
    package, lost = read(source, source_format=before.name, answers=answers, base=base, model=model)
    package, truncations = reduction.reduced(package, rank, energy, dtype)
    weights = Path(model) if model else None
    given = Given(after.name, answers, package.spec.base_model, weights)
    losses = [*lost, *after.losses(package, given)]
    if losses and not allow_loss:
        raise WouldLose(after.name, losses)
    write(after, package, Path(target), given)
    return Report(before.name, after.name, Path(target), tuple(losses), truncations)


def write(format: Format, package: SteeringPackage, target: Path, given: Given) -> None:
    """Write beside the target, then rename: it appears whole or not at all.

    Raises:
        PackageError: the target is there and is not of this format.
    """
    if target.exists() and not format.recognises(target):
        raise PackageError(f"exists and is no {format.title}", target)
    if format.atomic:
        format.write(package, target, given)
        return
    with replacing(target) as fresh:
        format.write(package, fresh, given)


def _refuse_unknown(answers: Mapping[str, str], before: Format, after: Format) -> None:
    known = {ask.name: ask.help for ask in (*before.asks, *after.write_asks)}
    for name in answers:
        if name not in known:
            raise Unanswered(
                before.name, name, f"nothing asks for it; asked are: {', '.join(known) or 'none'}"
            )
