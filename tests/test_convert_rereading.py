"""A writer whose file does not act as the package writes nothing: it is read again before it is put
into place."""

from __future__ import annotations

import numpy as np
import pytest

from artifacts import SAMPLES, WRITABLE
from steerbridge.errors import NotReadBack, NotRepresentable, PackageError
from steerbridge.format import get_format
from steerbridge.package import load
from steerbridge.spec import AddVector, ProjectOut
from steerbridge.tensors import Tensor
from steerbridge_convert import convert

pytest.importorskip("torch", reason="needs the extra `convert`")
FOREIGN = [name for name in WRITABLE if not name.startswith("steerbridge")]


def mistakes(package):
    """Packages that differ from this one as a mistake of a writer would make them."""
    for name, tensor in package.tensors.items():
        wrong = Tensor(tensor.dtype, np.ascontiguousarray(np.roll(tensor.array, 1, axis=-1)))
        if wrong != tensor:
            yield f"{name} rolled", package.replace(tensors={**package.tensors, name: wrong})
    if package.spec.rules:
        yield "stronger", package.scaled(1.01)
    for field in ("probes", "interventions"):
        parts = getattr(package.spec, field)
        moved = tuple(map(elsewhere, parts))
        if moved != parts:
            yield f"{field} at another block", package.replace(**{field: moved})


def elsewhere(part):
    """A probe that reads, or vectors that act, one block earlier, and at block 1 instead of 0."""

    def beside(place):
        layer = getattr(place.site, "layer", None)
        if layer is None:
            return place
        return place.replace(site=place.site.replace(layer=layer - 1 if layer else 1))

    if isinstance(part, AddVector | ProjectOut):
        return part.replace(targets=tuple(map(beside, part.targets)))
    readings = getattr(part, "readings", ())
    return part.replace(readings=tuple(map(beside, readings))) if readings else part


@pytest.mark.parametrize("name", FOREIGN)
def test_a_mistake_of_a_writer_is_seen(name, artifact_paths, tiny_weights, tmp_path, monkeypatch):
    source = artifact_paths[name].parent / "source"
    format = type(get_format(name))
    write = format.write
    target = tmp_path / f"{SAMPLES[name].name}{SAMPLES[name].suffix}"
    options = {"to": name, "answers": SAMPLES[name].write, "model": tiny_weights}
    wrongs = list(mistakes(load(source)))
    assert wrongs
    for what, wrong in wrongs:
        monkeypatch.setattr(
            format,
            "write",
            lambda self, package, path, answers, wrong=wrong: write(self, wrong, path, answers),
        )
        with pytest.raises((NotReadBack, NotRepresentable), match=name):
            print(what, convert(source, target, **options, allow_loss=name == "cast"))
        assert not list(tmp_path.iterdir())


def test_numbers_that_leave_float32_are_not_written(artifact_paths, tmp_path):
    """The product of a strength and a vector, each finite."""
    huge = load(artifact_paths["repeng"].parent / "source").scaled(3e38)
    tensors = {k: Tensor.of(100 * v.float32()) for k, v in huge.tensors.items()}
    huge = huge.replace(tensors=tensors).save(tmp_path / "huge")
    with pytest.raises(NotReadBack, match="finite"):
        convert(huge, tmp_path / "out.gguf", to="repeng")
    assert not (tmp_path / "out.gguf").exists()


def test_a_package_is_compared_by_its_bits(artifact_paths, tmp_path, monkeypatch):
    from steerbridge import encodings

    write = encodings.write_gguf

    def without_one(path, spec, tensors):
        write(path, spec, dict(list(tensors.items())[1:]))

    monkeypatch.setattr(encodings, "write_gguf", without_one)
    with pytest.raises(PackageError, match="what was saved"):
        convert(artifact_paths["steerbridge"], tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()
