"""Thresholds refitted on a runtime's own scores."""

from __future__ import annotations

import json

import numpy as np
import pytest

import helpers
from steerbridge import calibration, reference
from steerbridge.data import Example
from steerbridge.errors import DataError
from steerbridge.package import load


class Runtime:
    """Every hidden state of a prompt is its number, so its score is that number."""

    facts = helpers.FACTS
    runtime = "llama.cpp"
    quantisation = "Q4_1"
    weights_sha256 = "0" * 64

    def capture(self, prompts, readings, out, progress=None):
        out[:] = [[[float(p.text)]] for p in prompts]


def package(comparator=">", threshold=0.0):
    made = helpers.package(
        probes=[helpers.linear_probe(comparator=comparator, threshold=threshold)]
    )
    weight = np.zeros(16, np.float32)
    weight[0] = 1.0
    tensors = {**made.tensors, "p.w": type(made.tensors["p.w"]).of(weight)}
    return type(made)(made.spec, tensors)


def prompts():
    """General prompts score 1..100, borderline ones 51..150, harmful ones 101..200."""
    return [
        *(Example(str(i), False, "general") for i in range(1, 101)),
        *(Example(str(i), False, "borderline") for i in range(51, 151)),
        *(Example(f"{i}.0", True, "pair") for i in range(101, 201)),
    ]


@pytest.mark.parametrize(
    ("comparator", "limit"), [(">", 145.5), (">=", 145.5), ("<", 2.5), ("<=", 2.5)]
)
def test_thresholds_hold_the_target_with_every_comparator(comparator, limit):
    """For `>` the borderline prompts 146..150 fire; for `<` the general prompts 1 and 2."""
    target = {"*": 0.02, "borderline": 0.05}
    fitted = calibration.fit(Runtime(), package(comparator), prompts(), target)
    assert fitted.thresholds["p"] == pytest.approx(limit, abs=1e-9)
    evidence = fitted.evidence["probes"]["p"]
    assert evidence["after"]["fpr"]["general"] <= 0.02
    assert evidence["after"]["fpr"]["borderline"] <= 0.05
    assert max(evidence["after"]["fpr"].values()) > 0  # the lowest that holds
    if comparator.startswith(">"):
        assert evidence["before"]["fpr"] == {"borderline": 1.0, "general": 1.0}
        assert evidence["after"]["detection"]["pair"] == 0.55


def test_a_calibration_replaces_the_older_one_and_survives_a_save(tmp_path):
    made = package()
    for target in (0.5, 0.02):
        fitted = calibration.fit(Runtime(), made, prompts(), {"*": target})
        made = calibration.with_calibration(made, fitted)
    saved = load(made.save(tmp_path / "p.gguf"))
    assert [c.thresholds for c in saved.spec.calibrations] == [{"p": 148.5}]

    def threshold(runtime, quantisation, weights):
        package = saved.calibrated(runtime, quantisation, weights)
        return package.spec.probes[0].threshold

    assert threshold("llama.cpp", "Q4_1", lambda: Runtime.weights_sha256) == 148.5
    assert threshold("llama.cpp", "Q4_1", lambda: "1" * 64) == 0.0  # another checkpoint
    assert threshold("llama.cpp", "Q4_1", None) == 0.0  # not known which one
    assert threshold("hf", "F32", lambda: Runtime.weights_sha256) == 0.0


def test_the_shift_against_a_baseline_is_reported():
    """All scores moved by ten; after refitting, every verdict equals the baseline's."""
    made = package(threshold=100.0)
    harmless = [Example(str(i), False) for i in range(1, 101)]
    old = {"p": np.arange(1, 101) - 10.0}
    fitted = calibration.fit(Runtime(), made, harmless, {"*": 0.0}, baseline=old)
    shift = fitted.evidence["probes"]["p"]["shift"]
    assert shift["score_mean"] == shift["score_max_abs"] == 10.0
    assert shift["verdicts_equal_after"] == 1.0


def test_nothing_to_calibrate_on_and_scores_without_a_value_are_refused():
    with pytest.raises(DataError, match="harmless prompts"):
        calibration.fit(Runtime(), package(), [Example("1", True)], {"*": 0.1})
    with pytest.raises(DataError, match="finite"):
        calibration.fit(Runtime(), package(), [Example("nan", False)], {"*": 0.1})


def test_scores_are_the_reference_s():
    made = helpers.package(probes=[helpers.linear_probe(), helpers.linear_probe("q")])
    scores = calibration.scores(Runtime(), made, prompts()[:3])
    x = np.repeat([[1.0], [2.0], [3.0]], 16, axis=1)
    for probe in made.spec.probes:
        assert np.allclose(scores[probe.id], reference.score(probe, made.tensors, x))


OF_ROWS = {
    "sites": [{"stream": "layer_input", "layer": 20}],
    "scope": "prompt",
    "window": 4,
    "skip": 1,
    "rows": "all",
}


@pytest.mark.parametrize(
    "fields",
    [
        {"readings": [helpers.reading("layer_input[20]")]},
        {"token_reading": OF_ROWS, "link": "sigmoid"},
    ],
)
def test_the_command_records_it(smollm2_path, tmp_path, fields):
    """With SmolLM2 in llama.cpp, the file then contains a threshold for Q4_1."""
    pytest.importorskip("llama_cpp")
    from steerbridge_llama_cpp import open_model

    model = open_model(smollm2_path, n_ctx=256)
    probe = helpers.linear_probe(**fields)
    path = helpers.package(model.facts, probes=[probe]).save(tmp_path / "p.gguf")
    lines = [{"prompt": f"Name {n} animals.", "harmful": False} for n in range(2, 12)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)))
    got = helpers.run_cli(
        "calibrate", path, "--data", tmp_path / "mine.jsonl", "--fpr", "0.2", "--json"
    )
    assert got.returncode == 0, got.stderr
    printed = json.loads(got.stdout)
    assert printed["quantisation"] == "Q4_1"
    assert printed["probes"]["p"]["after"]["fpr"] == {"general": 0.2}
    (kept,) = load(path).spec.calibrations
    assert kept.thresholds == printed["thresholds"]
    assert helpers.run_cli("calibrate", path).returncode == 1
