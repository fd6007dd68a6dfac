"""GLP: directions that are projected out, in and out."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from gguf import GGUFWriter

import helpers
from artifacts import sample, vector
from steerbridge import gguf_file
from steerbridge.errors import MissingOption, NotRepresentable, UnreadableSource
from steerbridge.format import detect
from steerbridge_convert import convert, read

ALWAYS = {"probes": [], "rules": [helpers.rule(None, ["v"])]}


def theirs(path, mode="project", directions=(1, 2), prefix="glp", **keys):
    """A file as the tool's exporter writes it: unit directions."""
    draw = np.random.default_rng(0)
    rows = {n: draw.normal(size=16) for n in directions}
    units = {n: (v / np.linalg.norm(v)).astype("<f4") for n, v in rows.items()}
    digest = hashlib.sha256(b"".join(v.tobytes() for v in units.values())).hexdigest()
    said = {"mode": mode, "hook_point": "residual_stream_post_layer", "content_sha256": digest}

    def fill(writer: GGUFWriter) -> None:
        for key, value in {**said, **keys}.items():
            add = writer.add_float32 if isinstance(value, float) else writer.add_string
            add(f"{prefix}.{key}", value)
        for number, values in units.items():
            writer.add_tensor(f"direction.{number}", values)

    gguf_file.write(path, "controlvector", fill)
    return units


@pytest.mark.parametrize("prefix", ["glp", "dspark"])
@pytest.mark.parametrize(("mode", "kind"), [("project", "project_out"), ("add", "add_vector")])
def test_a_file_of_the_tool_is_read_as_it_acts(mode, kind, prefix, tmp_path, tiny_weights):
    path = tmp_path / "v.gguf"
    units = theirs(path, mode, prefix=prefix, alpha_default=1.5, layer_ids_zero_based="1,2")
    assert detect(path).name == "glp"
    package, losses = read(path, base=tiny_weights)
    (act,) = package.spec.interventions
    assert (act.type, act.alpha, act.position, losses) == (kind, 1.5, "all_positions", [])
    sites = [str(target.site) for target in act.targets]
    assert sites == ["layer_output[1]", "layer_output[2]"]
    for target, values in zip(act.targets, units.values(), strict=True):
        assert np.array_equal(package.tensors[target.vector].float32(), values)


def test_a_strength_is_asked_for_where_the_file_has_none(tmp_path, tiny_weights):
    theirs(tmp_path / "v.gguf")
    with pytest.raises(MissingOption, match=r"no glp\.alpha_default"):
        read(tmp_path / "v.gguf", base=tiny_weights)
    package, _ = read(tmp_path / "v.gguf", base=tiny_weights, answers={"strength": "0.5"})
    assert package.spec.interventions[0].alpha == 0.5


def test_a_stack_that_is_shifted_by_a_layer_is_refused(tmp_path, tiny_weights):
    theirs(tmp_path / "v.gguf", directions=(2, 3), alpha_default=1.0, layer_ids_zero_based="1,2")
    with pytest.raises(UnreadableSource, match="layer_ids_zero_based: expected 2,3"):
        read(tmp_path / "v.gguf", base=tiny_weights)


def test_what_one_strength_cannot_say_is_refused(tmp_path):
    out = vector("layer_output[1]", "layer_output[2]") | {"type": "project_out"}
    ours = helpers.package(**ALWAYS, interventions=[out]).save(tmp_path / "ours")
    with pytest.raises(NotRepresentable, match="strengths that differ by layer"):
        convert(ours, tmp_path / "a.gguf", to="glp")
    first = vector("layer_output[0]") | {"type": "project_out"}
    ours = helpers.package(**ALWAYS, interventions=[first]).save(tmp_path / "first")
    with pytest.raises(NotRepresentable, match=r"intervention v at layer_output\[0\]"):
        convert(ours, tmp_path / "a.gguf", to="glp")


def test_a_long_vector_keeps_what_it_does(tmp_path):
    """alpha (v . h) v of a v that is no unit vector is alpha |v|^2 (d . h) d."""
    one = vector("layer_output[1]", alpha=0.5) | {"type": "project_out"}
    package = helpers.package(**ALWAYS, interventions=[one])
    package.save(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "v.gguf", to="glp")
    back, _ = read(tmp_path / "v.gguf", base=package.spec.base_model)
    v, d = (next(iter(p.tensors.values())).float32() for p in (package, back))
    assert np.allclose(np.linalg.norm(d), 1)
    h = np.random.default_rng(1).normal(size=16).astype(np.float32)
    expected = h - 0.5 * (v @ h) * v
    assert np.allclose(h - back.spec.interventions[0].alpha * (d @ h) * d, expected, atol=1e-5)


def test_directions_that_no_rule_applies_are_told(tmp_path):
    sample("glp").replace(rules=()).save(tmp_path / "p")
    with pytest.raises(NotRepresentable, match="no rule projects anything out"):
        convert(tmp_path / "p", tmp_path / "v.gguf", to="glp")
