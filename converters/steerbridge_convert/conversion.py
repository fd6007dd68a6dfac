"""`convert`: read any format, write any other, and report what the target cannot represent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from steerbridge.conversion import ConversionReport
from steerbridge.errors import ConversionError, InvalidOption, NotRepresentable, WouldLose
from steerbridge.format import Answers, Format, Loss, check_source, detect, get_format
from steerbridge.package import SteeringPackage
from steerbridge.spec import BaseModelInfo
from steerbridge.tensors import Dtype
from steerbridge_convert import combining, publishing, reduction, rereading, vectors
from steerbridge_convert.base import base_model


def read(
    source: str | Path,
    *,
    source_format: str | None = None,
    answers: Mapping[str, str] | None = None,
    base: BaseModelInfo | str | Path | None = None,
    model: str | Path | None = None,
) -> tuple[SteeringPackage, list[Loss]]:
    """Read an artifact of any format as a steering package; also return what reading lost.

    The arguments are those of `convert`.

    Raises:
        ConversionError: see `steerbridge.errors`.
    """
    return _read(_format(Path(source), source_format), Path(source), answers, base, model)


def _format(source: Path, name: str | None) -> Format:
    """The format of the source, by name or by what it is."""
    if name is None:
        return detect(source)
    check_source(source)
    return get_format(name)


def _read(
    format: Format,
    source: Path,
    answers: Mapping[str, str] | None,
    base: BaseModelInfo | str | Path | None,
    model: str | Path | None,
) -> tuple[SteeringPackage, list[Loss]]:
    weights = Path(model) if model else None
    base_info = base_model(Path(base)) if isinstance(base, str | Path) else base
    if base_info is None and weights is not None:
        base_info = base_model(weights)
    supplied = Answers(format.name, answers or {}, base_info, weights)
    return format.read(source, supplied), supplied.losses


def convert(
    source: str | Path | Sequence[str | Path],
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
    """Convert an artifact, or several into one.

    Args:
        source: of several, each acts as it would alone, in this order.
        to: name of the target format; by default a steering package: one file if `target` ends in
            `.gguf`, otherwise a directory.
        source_format: name of the source format; by default it is detected from the files.
        answers: values of options of either format, by name (see `steerbridge formats`). Of
            several sources, `2:strength` is the option of the second, `strength` that of all.
        base: the model the artifact was made for, if its files do not fully describe it: a model
            directory, a GGUF model or a steering package; `model` by default.
        model: GGUF file or directory with that model's weights, if a format needs them.
        rank, energy: reduce head matrices to this rank, or to the lowest rank that keeps this
            share of their squared singular values.
        dtype: storage type for the tensors of a steering package.
        allow_loss: write even if the target cannot represent everything.
        overwrite: replace what Steerbridge wrote to `target` before; other files stay.

    Raises:
        ConversionError: see `steerbridge.errors`; nothing was written.
        PackageError: the target exists, and is not to be overwritten or not Steerbridge's.
    """
    sources = [Path(source)] if isinstance(source, str | Path) else [Path(one) for one in source]
    if not sources:
        raise ConversionError("nothing to convert")
    befores = [_format(one, source_format) for one in sources]
    own = "steerbridge-gguf" if Path(target).suffix == ".gguf" else "steerbridge"
    after = get_format(to or own)
    if not after.writable:
        raise NotRepresentable(after.name, "the format is read only")
    publishing.require_free(after, Path(target), overwrite)
    answers = dict(answers or {})
    _refuse_unknown(answers, befores, after)
    packages, losses = [], []
    for number, (before, one) in enumerate(zip(befores, sources, strict=True), 1):
        package, lost = _read(before, one, _of(answers, number), base, model)
        packages.append(package)
        losses += lost
    if len(packages) > 1:
        package, lost = combining.combined(packages, Path(target).stem)
        losses += lost
    package, truncations, rounded = reduction.reduced(package, rank, energy, dtype)
    weights = Path(model) if model else None
    supplied = Answers(after.name, answers, package.spec.base_model, weights)
    losses = [*losses, *rounded, *after.losses(package, supplied)]
    if losses and not allow_loss:
        raise WouldLose(after.name, losses)
    write(after, package, Path(target), supplied, losses)
    names = " + ".join(before.name for before in befores)
    acts = vectors.told(package)
    return ConversionReport(names, after.name, Path(target), tuple(losses), truncations, acts)


def _of(answers: Mapping[str, str], number: int) -> dict[str, str]:
    """The answers of one of several sources."""
    own = f"{number}:"
    for_all = {name: value for name, value in answers.items() if ":" not in name}
    return for_all | {
        name.removeprefix(own): value for name, value in answers.items() if name.startswith(own)
    }


def write(
    format: Format,
    package: SteeringPackage,
    target: Path,
    answers: Answers,
    losses: Sequence[Loss] = (),
) -> None:
    """Write beside the target, read that back, then put it into place: a target that is partial or
    wrong never appears.

    Raises:
        NotReadBack: what was written acts differently, beyond the losses.
        PackageError: a file that Steerbridge did not write is in the way.
    """
    if format.atomic:
        format.write(package, target, answers)
        return
    with publishing.published(target) as fresh:
        format.write(package, fresh, answers)
        rereading.check(format, package, fresh, answers, losses)


def _refuse_unknown(answers: Mapping[str, str], befores: Sequence[Format], after: Format) -> None:
    known = {option.name for format in befores for option in format.options}
    known |= {option.name for option in after.write_options}
    if len(befores) > 1:
        known |= {
            f"{number}:{option.name}"
            for number, format in enumerate(befores, 1)
            for option in format.options
        }
    for name in answers:
        if name not in known:
            names = ", ".join(sorted(known)) or "none"
            raise InvalidOption(befores[0].name, name, f"unknown; known options: {names}")
