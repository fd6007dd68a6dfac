"""Load, check and save packages in both encodings, including untrusted files."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest

import helpers
from steerbridge import encodings, gguf_file
from steerbridge.errors import (
    BrokenPackage,
    InvalidSpec,
    ModelMismatch,
    PackageError,
    UnsupportedVersion,
)
from steerbridge.fingerprint import ModelFacts
from steerbridge.package import SteeringPackage, load, parse
from steerbridge.spec import SteeringSpec
from steerbridge.tensors import Tensor

MEAN_AT_HEAD = helpers.reading("head_input", helpers.MEAN)


def test_both_encodings_hold_the_same_package(tmp_path):
    package = helpers.package(extra_field={"kept": [1, "x", None]})
    one = load(package.save(tmp_path / "dir"))
    two = load(package.save(tmp_path / "one.gguf"))
    assert one == two == package
    assert one.spec.model_extra == {"extra_field": {"kept": [1, "x", None]}}


def test_saving_what_was_loaded_gives_the_same_bytes(tmp_path):
    package = helpers.package()
    package.save(tmp_path / "a.gguf")
    load(load(tmp_path / "a.gguf").save(tmp_path / "dir")).save(tmp_path / "b.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_tensors_are_mapped_not_read(tmp_path):
    loaded = load(helpers.package().save(tmp_path / "one.gguf"))
    base = loaded.tensors["h.W"].array
    while getattr(base, "base", None) is not None and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap)


def test_saving_over_a_package_keeps_other_files_and_leaves_nothing_behind(tmp_path):
    target = helpers.package().save(tmp_path / "dir")
    (target / "README.md").write_text("card")
    helpers.package(seed=1).save(target)
    assert (target / "README.md").read_text() == "card"
    assert load(target) == helpers.package(seed=1)
    assert [p.name for p in tmp_path.iterdir()] == ["dir"]


def test_a_directory_of_something_else_is_not_overwritten(tmp_path):
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir" / "thesis.txt").write_text("years of work")
    with pytest.raises(PackageError, match="not a steering package"):
        helpers.package().save(tmp_path / "dir")
    assert (tmp_path / "dir" / "thesis.txt").read_text() == "years of work"


def test_a_failed_save_leaves_the_old_package(tmp_path, monkeypatch):
    target = helpers.package().save(tmp_path / "one.gguf")
    monkeypatch.setattr(encodings, "write_gguf", lambda *a: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        helpers.package(seed=1).save(target)
    assert load(target) == helpers.package()
    assert [p.name for p in tmp_path.iterdir()] == ["one.gguf"]


@pytest.mark.parametrize("missing", ["comparator", "threshold", "link", "weight"])
def test_a_field_that_decides_has_no_default(missing):
    probe = helpers.linear_probe()
    del probe[missing]
    with pytest.raises(InvalidSpec, match=rf"probes\[0\].*{missing}: expected this field"):
        parse(helpers.raw_spec(probes=[probe]))


def test_a_rule_without_a_condition_says_so():
    rule = helpers.rule(["p"], ["h"])
    del rule["condition"]
    with pytest.raises(InvalidSpec, match=r"rules\[0\]\.condition"):
        parse(helpers.raw_spec(rules=[rule]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"probes": [helpers.linear_probe(threshold=float("nan"))]}, "JSON values"),
        ({"rules": [helpers.rule(["q"], ["h"])]}, "id of a probe"),
        ({"rules": [helpers.rule(["p"], ["x"])]}, "an intervention"),
        ({"probes": [helpers.linear_probe(), helpers.linear_probe()]}, "unique id"),
        (
            {"probes": [helpers.linear_probe(readings=[helpers.reading("layer_input[5]")])]},
            "layer in 0..4",
        ),
        (
            {
                "probes": [
                    helpers.linear_probe(readings=[helpers.reading("head_input", helpers.MEAN)])
                ]
            },
            "prompt_end at head_input",
        ),
        ({"interventions": [helpers.head(position="all_positions")]}, "from_prompt_end"),
    ],
)
def test_unsound_specs_name_the_field(fields, message):
    with pytest.raises(InvalidSpec, match=message):
        helpers.package(**fields)


def test_an_intervention_before_its_probe_is_refused():
    rules = [helpers.rule(["p"], ["v"])]
    with pytest.raises(InvalidSpec, match="at or after"):
        helpers.package(interventions=[helpers.add_vector(0, alpha=1.0)], rules=rules)
    # The output of layer 1 is the input of layer 2, which the probe reads.
    helpers.package(interventions=[helpers.add_vector(1, alpha=1.0)], rules=rules)


def test_wrong_tensors_are_listed():
    good = helpers.package()
    bad = {
        "p.w": Tensor.of(np.zeros(15)),
        "h.W": Tensor.of(np.full((16, 16), np.inf)),
    }
    with pytest.raises(InvalidSpec) as error:
        SteeringPackage(good.spec, bad)
    assert [p.field for p in error.value.problems] == ["probes[0].weight ('p.w')", "tensor 'h.W'"]


def test_a_newer_major_version_is_another_error_than_a_broken_file(tmp_path):
    with pytest.raises(UnsupportedVersion, match=r"2\.0"):
        parse(helpers.raw_spec(spec_version="2.0", probes="not even a list"))
    parse(helpers.raw_spec(spec_version="1.7"))
    (tmp_path / "x.gguf").write_bytes(b"GGUX" + bytes(40))
    with pytest.raises(BrokenPackage, match="magic"):
        load(tmp_path / "x.gguf")


def test_model_check_names_every_difference():
    other = ModelFacts("qwen2", hidden_size=16, num_layers=5, vocab_size=None)
    with pytest.raises(ModelMismatch) as error:
        helpers.package().check(other)
    assert [p.field for p in error.value.problems] == ["model_type", "num_layers"]
    left = helpers.package().check(other, ignore=["model_type", "num_layers"])
    assert left == ("vocab_size", "tokenizer_sha256", "chat_template_sha256")


def test_blanks_of_sentencepiece_count_as_spaces():
    """Gemma's runs of blanks: spaces in its GGUF, the blank's character in transformers."""
    from steerbridge.fingerprint import tokenizer_sha256

    blank = "\u2581"
    assert tokenizer_sha256([blank * 2, f"{blank}a"]) == tokenizer_sha256(["  ", " a"])
    assert tokenizer_sha256(["a b"]) != tokenizer_sha256(["a", "b"])


@pytest.mark.parametrize("name", ["dir", "one.gguf"])
def test_every_truncation_ends_in_a_typed_error(tmp_path, name):
    target = helpers.package().save(tmp_path / name)
    file = target / "steering.safetensors" if target.is_dir() else target
    whole = file.read_bytes()
    for size in {0, 1, 7, 8, 9, 23, 24, 100, len(whole) // 2, len(whole) - 1}:
        file.write_bytes(whole[:size])
        with pytest.raises(PackageError):
            load(target)


def test_hostile_counts_do_not_allocate(tmp_path):
    path = tmp_path / "x.gguf"
    header = struct.pack("<4sIQQ", b"GGUF", 3, 0, 1)
    key = struct.pack("<Q", 1) + b"k"
    bombs = {
        "metadata count": struct.pack("<4sIQQ", b"GGUF", 3, 0, 1 << 60),
        "tensor count": struct.pack("<4sIQQ", b"GGUF", 3, 1 << 60, 0),
        "array": header + key + struct.pack("<IIQ", 9, 4, 1 << 60),
        "array of strings": header + key + struct.pack("<IIQ", 9, 8, 1 << 23),
        "string": header + key + struct.pack("<IQ", 8, 1 << 62),
        "nested array": header + key + struct.pack("<IIQ", 9, 9, 1),
        "value type": header + key + struct.pack("<I", 99),
    }
    for data in bombs.values():
        path.write_bytes(data + bytes(16))
        with pytest.raises(BrokenPackage):
            gguf_file.read(path)


@pytest.mark.parametrize(
    "text",
    [
        '{"spec_version": "1.0", "spec_version": "1.0"}',
        '{"a": NaN}',
        '{"a": "\\ud800"}',
        "[" * 100_000,
        '"\xff"',
        "",
        "[]",
        "null",
    ],
)
def test_hostile_json_is_refused(tmp_path, text):
    target = helpers.package().save(tmp_path / "dir")
    (target / "steering_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(PackageError):
        load(target)


def test_calibrated_thresholds_replace_the_probe_s(tmp_path):
    fitted = {"runtime": "hf", "quantisation": "BF16", "thresholds": {"p": 0.25}}
    package = load(helpers.package(calibrations=[fitted]).save(tmp_path / "d"))
    assert package.calibrated("hf", "BF16").spec.probes[0].threshold == 0.25
    assert package.calibrated("hf", "F32") == package


def test_safetensors_file_is_readable_by_the_library(tmp_path):
    from safetensors.numpy import load_file

    package = helpers.package()
    target = package.save(tmp_path / "dir")
    stored = load_file(target / "steering.safetensors")
    assert stored.keys() == package.tensors.keys()
    for name, tensor in package.tensors.items():
        assert np.array_equal(stored[name], tensor.array)
    assert json.loads((target / "steering_config.json").read_bytes())["name"] == "test"


def test_gguf_file_is_readable_by_the_gguf_package(tmp_path):
    from gguf import GGUFReader

    reader = GGUFReader(helpers.package().save(tmp_path / "one.gguf"))
    assert reader.get_field("general.architecture").contents() == "steering"
    assert {t.name for t in reader.tensors} == {"p.w", "h.W"}


def test_both_encodings_of_a_package_have_one_hash(tmp_path):
    package = helpers.package()
    saved = [load(package.save(tmp_path / name)).sha256 for name in ("p.gguf", "dir")]
    assert saved == [package.sha256] * 2
    assert package.sha256 != helpers.package(seed=1).sha256
    assert package.sha256 != package.scaled(2.0).sha256


def test_rules_name_an_id_once_and_act_on_a_bounded_number_of_targets():
    with pytest.raises(InvalidSpec, match="each id once"):
        helpers.package(rules=[helpers.rule(["p"], ["h", "h"])])
    vector = helpers.add_vector(*[2] * 600, alpha=1.0)
    rules = [{**helpers.rule(["p"], ["v"]), "id": f"r{i}"} for i in range(200)]
    with pytest.raises(InvalidSpec, match="targets at most"):
        helpers.package(interventions=[vector], rules=rules)


def test_many_rules_about_many_targets_are_checked_in_linear_time(monkeypatch):
    """Every rule looks at every target once: rules times targets would be 4 million."""
    target = {"site": helpers.site("layer_output[3]"), "vector": "v"}
    vector = {**helpers.add_vector(3, alpha=1.0), "targets": [target] * 2000}
    rules = [{**helpers.rule(["p"], ["v"]), "id": f"r{i}"} for i in range(2000)]
    looked = []
    depth = SteeringSpec.depth

    def counted(self, site):
        looked.append(site)
        return depth(self, site)

    monkeypatch.setattr(SteeringSpec, "depth", counted)
    with pytest.raises(InvalidSpec, match="targets at most"):
        helpers.package(interventions=[vector], rules=rules)
    assert len(looked) < 10_000
