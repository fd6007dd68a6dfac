"""Several sources into one package: each acts as it would alone."""

from __future__ import annotations

import numpy as np
import pytest
from typer.testing import CliRunner

from artifacts import ALL_LAYERS, SAMPLES, sample
from helpers import package
from steerbridge import load, reference
from steerbridge.cli.app import build
from steerbridge.errors import (
    ConversionError,
    InvalidOption,
    NotRepresentable,
    SteerbridgeError,
    WouldLose,
)
from steerbridge.fingerprint import ModelFacts
from steerbridge.reference import Action
from steerbridge.spec import LayerInput
from steerbridge_convert import convert, read

pytest.importorskip("torch", reason="needs the extra `convert`")


def after(one, depth, states):
    """States at a depth behind everything that the rules of a package apply."""
    acting = [
        Action(rule.id, one.spec.intervention(id), rule.strength.value)
        for rule in one.spec.rules
        for id in rule.interventions
    ]
    site = LayerInput(stream="layer_input", layer=depth)
    return reference.steer(acting, one.tensors, site, states)


def test_two_vectors_with_strengths_of_their_own(artifact_paths, tmp_path, tiny_weights):
    paths = [artifact_paths["repeng"], artifact_paths["svec-ibm"]]
    answers = {**ALL_LAYERS, "1:strength": "2", "2:strength": "-0.5", "2:layers": "3"}
    report = convert(paths, tmp_path / "two.gguf", answers=answers, base=tiny_weights)
    assert report.source == "repeng + svec-ibm"
    assert report.acts == (
        "add_vector 2 times at layer_output[0], layer_output[2] (all_positions)",
        "add_vector -0.5 times at layer_input[3] (all_positions)",
    )
    parts = [
        read(paths[0], answers={**ALL_LAYERS, "strength": "2"}, base=tiny_weights)[0],
        read(
            paths[1], answers={**ALL_LAYERS, "strength": "-0.5", "layers": "3"}, base=tiny_weights
        )[0],
    ]
    states = np.random.default_rng(0).normal(size=(3, 16))
    for depth in range(5):
        want = after(parts[1], depth, after(parts[0], depth, states))
        np.testing.assert_array_equal(after(load(report.path), depth, states), want)


def test_a_guard_and_a_vector(artifact_paths, tmp_path, tiny_weights):
    """The guard's rule stays its own; the vector acts on every prompt."""
    guard = artifact_paths["steerbridge"]
    paths = [guard, artifact_paths["control-vector"], guard]
    report = convert(paths, tmp_path / "all", answers=ALL_LAYERS, base=tiny_weights)
    whole, alone = load(report.path).spec, load(guard).spec
    assert [rule.id for rule in whole.rules] == ["r", "always", "r-3"]
    assert whole.rules[0] == alone.rules[0]
    assert whole.rules[1].condition is None
    assert whole.rules[2].condition.probes == ("p-3",)
    assert whole.rules[2].interventions == ("h-3",)
    tensors = load(report.path).tensors
    for name, tensor in load(guard).tensors.items():
        assert tensors[name] == tensors[f"{name}.3"] == tensor


def test_sources_for_two_models_are_refused(artifact_paths, tmp_path, tiny_weights):
    other = package(ModelFacts("llama", 16, 9, 64, name="deeper")).save(tmp_path / "other")
    with pytest.raises(NotRepresentable, match="two models"):
        convert([artifact_paths["steerbridge"], other], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_was_measured_of_the_parts_is_a_loss(artifact_paths, tmp_path):
    thresholds = {"p": 0.25}
    calibrated = {"runtime": "llama.cpp", "quantisation": "Q4_1", "thresholds": thresholds}
    guard = package(calibrations=[calibrated]).save(tmp_path / "guard")
    other = sample("glp").save(tmp_path / "glp")
    with pytest.raises(WouldLose, match="calibrations of test: was measured without the others"):
        convert([guard, other], tmp_path / "out")


def test_options_of_one_source(artifact_paths, tmp_path, tiny_weights):
    paths = [artifact_paths["repeng"], artifact_paths["svec-ibm"]]
    for name in ("3:strength", "1:applied_at", "one:strength"):
        with pytest.raises(InvalidOption, match="unknown"):
            convert(paths, tmp_path / "o", answers={**ALL_LAYERS, name: "1"}, base=tiny_weights)
    with pytest.raises(ConversionError, match="nothing to convert"):
        convert([], tmp_path / "o")


def test_the_command(artifact_paths, tmp_path, tiny_weights):
    def run(*arguments):
        words = ["convert", *map(str, arguments), "--base", str(tiny_weights)]
        for name, value in ALL_LAYERS.items():
            words += ["--set", f"{name}={value}"]
        return CliRunner().invoke(build(words), words)

    paths = [artifact_paths["repeng"], artifact_paths["control-vector"]]
    done = run(*paths, tmp_path / "two.gguf", "--combine", "--set", "2:strength=3")
    assert done.exit_code == 0, done.output
    assert [act.alpha for act in load(tmp_path / "two.gguf").spec.interventions] == [1, 3]
    again = run(*paths, tmp_path / "three.gguf")
    assert isinstance(again.exception, SteerbridgeError)
    assert "--combine" in str(again.exception)
    assert isinstance(run(paths[0]).exception, SteerbridgeError)
    assert SAMPLES["repeng"].read == ALL_LAYERS
