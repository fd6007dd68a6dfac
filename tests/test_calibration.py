"""Thresholds fitted again on a runtime's own scores."""

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
    """Hidden states that are a prompt's number in every place: the score is that number."""

    facts = helpers.FACTS
    quantisation = "Q4_1"

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
    """General prompts 1..100, borderline ones 51..150, harmful ones 101..200."""
    return [
        *(Example(str(i), False, "general") for i in range(1, 101)),
        *(Example(str(i), False, "borderline") for i in range(51, 151)),
        *(Example(str(i), True, "pair") for i in range(101, 201)),
    ]


@pytest.mark.parametrize(
    ("comparator", "limit"), [(">", 145), (">=", np.nextafter(145, 999)), ("<", 3), ("<=", 3)]
)
def test_thresholds_hold_the_target_with_every_comparator(comparator, limit):
    """5 % of each kind: of the high scorers 146..150 fire; of the low ones general 1 and 2."""
    target = {"*": 0.02, "borderline": 0.05}
    fitted = calibration.fit(Runtime(), "llama.cpp", package(comparator), prompts(), target)
    assert fitted.thresholds["p"] == pytest.approx(limit, abs=1e-9)
    found = fitted.evidence["probes"]["p"]
    assert found["after"]["fpr"]["general"] <= 0.02
    assert found["after"]["fpr"]["borderline"] <= 0.05
    assert max(found["after"]["fpr"].values()) > 0  # the lowest that holds
    if comparator.startswith(">"):
        assert found["before"]["fpr"] == {"borderline": 1.0, "general": 1.0}
        assert found["after"]["detection"]["pair"] == 0.55


def test_a_calibration_replaces_the_older_one_and_survives_a_save(tmp_path):
    made = package()
    for target in (0.5, 0.02):
        fitted = calibration.fit(Runtime(), "llama.cpp", made, prompts(), {"*": target})
        made = calibration.with_calibration(made, fitted)
    saved = load(made.save(tmp_path / "p.gguf"))
    assert [c.thresholds for c in saved.spec.calibrations] == [{"p": 148.0}]
    assert saved.calibrated("llama.cpp", "Q4_1").spec.probes[0].threshold == 148.0
    assert saved.calibrated("hf", "F32").spec.probes[0].threshold == 0.0


def test_the_shift_against_a_baseline_is_reported():
    """Scores that moved by ten: half of the verdicts near the threshold change, then none."""
    made = package(threshold=100.0)
    harmless = [Example(str(i), False) for i in range(1, 101)]
    old = {"p": np.arange(1, 101) - 10.0}
    fitted = calibration.fit(Runtime(), "llama.cpp", made, harmless, {"*": 0.0}, baseline=old)
    shift = fitted.evidence["probes"]["p"]["shift"]
    assert shift["score_mean"] == shift["score_max_abs"] == 10.0
    assert shift["verdicts_equal_after"] == 1.0


def test_nothing_to_calibrate_on_and_scores_without_a_value_are_refused():
    with pytest.raises(DataError, match="harmless prompts"):
        calibration.fit(Runtime(), "hf", package(), [Example("1", True)], {"*": 0.1})
    with pytest.raises(DataError, match="finite"):
        calibration.fit(Runtime(), "hf", package(), [Example("nan", False)], {"*": 0.1})


def test_scores_are_the_reference_s():
    made = helpers.package(probes=[helpers.linear_probe(), helpers.linear_probe("q")])
    found = calibration.scores(Runtime(), made, prompts()[:3])
    x = np.repeat([[1.0], [2.0], [3.0]], 16, axis=1)
    for probe in made.spec.probes:
        assert np.allclose(found[probe.id], reference.score(probe, made.tensors, x))


def test_the_command_records_it(smollm2_path, tmp_path):
    """SmolLM2 in llama.cpp: the file then holds a threshold for Q4_1 and says what it did."""
    pytest.importorskip("llama_cpp")
    from steerbridge_llama_cpp import open_model
    from test_cli import run

    model = open_model(smollm2_path, n_ctx=256)
    probe = helpers.linear_probe(readings=[helpers.reading("layer_input[20]")])
    path = helpers.package(model.facts, probes=[probe]).save(tmp_path / "p.gguf")
    lines = [{"prompt": f"Name {n} animals."} for n in range(2, 12)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)))
    got = run("calibrate", path, "--data", tmp_path / "mine.jsonl", "--fpr", "0.2", "--json")
    assert got.returncode == 0, got.stderr
    found = json.loads(got.stdout)
    assert found["quantisation"] == "Q4_1"
    assert found["probes"]["p"]["after"]["fpr"] == {"general": 0.2}
    (kept,) = load(path).spec.calibrations
    assert kept.thresholds == found["thresholds"]
    assert run("calibrate", path).returncode == 1
