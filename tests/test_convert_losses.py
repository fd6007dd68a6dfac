"""What a target cannot represent: reported as losses and refused unless allowed."""

from __future__ import annotations

import pytest

import artifacts
import helpers
from artifacts import ALL_LAYERS, SAMPLES, WRITABLE, mlp, sample, vector
from helpers import head, package, rule
from steerbridge import gguf_file
from steerbridge.errors import NotRepresentable, WouldLose
from steerbridge.format import get_format
from steerbridge_convert import convert
from steerbridge_convert.combining import combined


def test_losses_are_reported_and_refused(tmp_path):
    both = package(
        probes=[helpers.linear_probe()],
        interventions=[head(), {**vector("layer_output[2]"), "position": "from_prompt_end"}],
        rules=[rule(["p"], ["h", "v"])],
    )
    both.save(tmp_path / "guard.gguf")
    with pytest.raises(WouldLose) as caught:
        convert(tmp_path / "guard.gguf", tmp_path / "v.gguf", to="control-vector")
    losses = [str(loss) for loss in caught.value.losses]
    assert losses == [
        "probe p (linear): is dropped",
        "intervention h (head_matrix): is dropped: it will never act",
        "intervention v: also acts on the tokens of the prompt, not only from its end on",
        "rule r: is dropped: v will act on every prompt",
    ]
    assert not (tmp_path / "v.gguf").exists()
    report = convert(
        tmp_path / "guard.gguf", tmp_path / "v.gguf", to="control-vector", allow_loss=True
    )
    assert [str(loss) for loss in report.losses] == losses


def test_a_score_that_sets_the_strength_is_a_loss(tmp_path):
    follows = package(
        interventions=[vector("layer_output[2]") | {"position": "from_prompt_end"}],
        rules=[rule(["p"], ["v"], strength={"type": "score", "probe": "p", "scale": 2.0})],
    )
    follows.save(tmp_path / "p.gguf")
    with pytest.raises(WouldLose, match="no longer follows a score: v will act at full strength"):
        convert(tmp_path / "p.gguf", tmp_path / "v.gguf", to="repeng")


def test_a_second_prober_is_a_loss(tmp_path):
    second = {**mlp(artifacts.AT_OFFSET), "id": "q"}
    package(free=64, probes=[mlp(artifacts.AT_OFFSET), second]).save(tmp_path / "two")
    answers = SAMPLES["autosteer"].write
    with pytest.raises(
        WouldLose, match=r"probe q \(mlp\): is dropped: only one prober is supported"
    ):
        convert(tmp_path / "two", tmp_path / "out", to="autosteer", answers=answers)
    package(
        free=64, probes=[mlp(artifacts.AT_OFFSET), second], rules=[rule(["p", "q"], ["h"])]
    ).save(tmp_path / "any")
    with pytest.raises(NotRepresentable, match="a rule with 2 probes"):
        convert(tmp_path / "any", tmp_path / "out", to="autosteer", answers=answers)


def test_a_threshold_without_a_finite_bias_is_refused(tmp_path):
    certain = helpers.linear_probe(link="sigmoid", threshold=1.0, comparator=">=")
    package(probes=[certain]).save(tmp_path / "p")
    with pytest.raises(NotRepresentable, match=r"a threshold of 1.0 on a probability"):
        convert(tmp_path / "p", tmp_path / "q", to="probe-aisteer360", allow_loss=True)


def test_a_conversion_that_keeps_nothing_is_refused(tmp_path):
    package().save(tmp_path / "head.gguf")
    with pytest.raises(NotRepresentable, match=r"no part of this package: p \(linear\), h"):
        convert(tmp_path / "head.gguf", tmp_path / "v.gguf", to="repeng", allow_loss=True)


def test_block_0_is_dropped_for_llama_cpp_and_only_if_allowed(
    tmp_path, artifact_paths, tiny_weights
):
    options = {"to": "control-vector", "answers": ALL_LAYERS, "base": tiny_weights}
    with pytest.raises(WouldLose, match="the vector after block 0: is dropped"):
        convert(artifact_paths["repeng"], tmp_path / "v.gguf", **options)
    convert(artifact_paths["repeng"], tmp_path / "v.gguf", **options, allow_loss=True)
    assert set(gguf_file.read(tmp_path / "v.gguf").tensors) == {"direction.2"}


def test_an_intervention_that_only_acts_after_block_0_is_dropped_for_llama_cpp(tmp_path):
    first, second = vector("layer_output[0]"), vector("layer_output[2]")
    second = {**second, "id": "w", "targets": [{**second["targets"][0], "vector": "w0"}]}
    steering = package(probes=[], interventions=[first, second], rules=[rule(None, ["v", "w"])])
    path = steering.save(tmp_path / "p.gguf")
    convert(path, tmp_path / "v.gguf", to="control-vector", allow_loss=True)
    assert set(gguf_file.read(tmp_path / "v.gguf").tensors) == {"direction.2"}
    path = package(probes=[], interventions=[first], rules=[rule(None, ["v"])]).save(tmp_path / "q")
    with pytest.raises(NotRepresentable, match="at the output of a block it steers"):
        convert(path, tmp_path / "w.gguf", to="control-vector", allow_loss=True)


@pytest.mark.parametrize("name", [n for n in WRITABLE if not get_format(n).holds.token_readings])
def test_token_readings_and_sentences_are_never_dropped_in_silence(name, tmp_path, tiny_weights):
    """Beside all that the format holds: a probe that reads every row, and a sentence."""
    whole = sample(name)
    sites = [helpers.site("layer_input[2]")]
    reading = {"sites": sites, "scope": "both", "window": 4, "skip": 0, "rows": "all"}
    more = package(
        probes=[
            helpers.linear_probe(
                "rows", token_reading=reading, comparator=">=", threshold=0.5, link="sigmoid"
            )
        ],
        interventions=[{"id": "words", "type": "say", "text": "No.", "tokens": [3]}],
        rules=[rule(["rows"], ["words"])],
    )
    both, _ = combined([whole, more], "both")
    source = both.save(tmp_path / "both.gguf")
    with pytest.raises((WouldLose, NotRepresentable)) as caught:
        convert(source, tmp_path / "out", to=name, answers=SAMPLES[name].write, model=tiny_weights)
    told = str(caught.value)
    assert "rows" in told
    assert "words" in told or isinstance(caught.value, NotRepresentable)
    assert not (tmp_path / "out").exists()
