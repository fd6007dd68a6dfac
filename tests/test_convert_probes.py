"""Probes of other tools decide as the tool itself does."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

import artifacts
from artifacts import SAMPLES, mlp, read_as_package
from helpers import package, reading
from steerbridge import load, reference
from steerbridge.errors import MissingOption, WouldLose
from steerbridge_convert import convert

torch = pytest.importorskip("torch", reason="needs the extra `convert`")
pytest.importorskip("transformers", reason="needs the extra `hf`")

from steerbridge_hf import steer  # noqa: E402
from tiny_logits import TOKENS, assert_alike, logits, passed  # noqa: E402


@torch.no_grad()
def test_autosteer_s_prober_and_matrix(artifact_paths, tiny_weights, tiny_llama):
    """E (h + eps S h) where softmax(prober)[0] > 0.5, computed from the authors' files alone."""
    path = artifact_paths["autosteer"]
    matrix = torch.load(path / "Epoch_0.pt")
    state = torch.load(path / "layer2" / "epoch_0.pt")
    net = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
    net.load_state_dict({k.removeprefix("layers."): v for k, v in state.items()})
    guard = read_as_package("autosteer", path, tiny_weights)
    for seed in range(6):
        ids = torch.randint(3, 64, (1, 6), generator=torch.Generator().manual_seed(seed))
        hidden = tiny_llama(ids, output_hidden_states=True).hidden_states
        toxic = net(hidden[2][0, -2]).softmax(-1)[0]
        h = tiny_llama.model(ids).last_hidden_state[0, -1]
        expected = tiny_llama.lm_head(h + 0.5 * matrix @ h if toxic > 0.5 else h)
        with steer(tiny_llama, guard) as session:
            actual = passed(session, tiny_llama, ids)[0, -1]
            assert abs(session.outcomes[0].verdicts[0].score - float(toxic)) < 1e-5
        assert_alike(actual, expected)


@pytest.mark.parametrize("harmful", ["bad", "good"])
@pytest.mark.parametrize("name", ["autosteer", "safeswitch"])
def test_class_orders_thresholds_and_scales_are_converted(name, harmful, tmp_path, tiny_weights):
    """Reversed classes, another threshold and normalisation do not change decisions."""
    at = artifacts.AT_OFFSET if name == "autosteer" else reading("head_input")
    output = {"type": "softmax", "classes": ["bad", "good"], "harmful": harmful}
    probe = mlp(at, output=output, threshold=0.3, input_mean="m", input_scale="s", comparator=">")
    ours = package(free=64, probes=[probe])
    ours.save(tmp_path / "ours")
    convert(
        tmp_path / "ours",
        tmp_path / "theirs",
        to=name,
        answers=SAMPLES[name].write,
        model=tiny_weights,
        allow_loss=name == "safeswitch",
    )
    theirs = read_as_package(name, tmp_path / "theirs", tiny_weights)
    x = np.random.default_rng(1).normal(size=(500, 16)) * 2
    before = reference.score(ours.spec.probes[0], ours.tensors, x) > 0.3
    after = reference.score(theirs.spec.probes[0], theirs.tensors, x) > 0.5
    assert 50 < before.sum() < 450
    assert (before == after).all()


@torch.no_grad()
def test_aisteer360_s_probe(artifact_paths, tiny_weights, tiny_llama):
    """Fires if the sum of w . mean(x) over layers plus the bias is at least 0."""
    path = artifact_paths["probe-aisteer360"]
    info = json.loads((path / "probe.json").read_text())
    weight = load_file(path / "probe.safetensors")
    hidden = tiny_llama(TOKENS, output_hidden_states=True).hidden_states
    expected = info["bias"] + sum(
        float(weight[f"weights.{k}"] @ hidden[k][0].mean(0).numpy())
        for k in info["weight_layer_ids"]
    )
    with steer(tiny_llama, read_as_package("probe-aisteer360", path, tiny_weights)) as session:
        passed(session, tiny_llama, TOKENS)
    verdict = session.outcomes[0].verdicts[0]
    assert abs(verdict.score - expected) < 1e-4 * abs(expected)
    assert verdict.fired == (expected >= 0)


@torch.no_grad()
def test_cast_s_condition_and_behaviour(artifact_paths, tiny_weights, tiny_llama, tmp_path):
    """cos(h, tanh(P h)) of the mean input of block 2; IBM's vector acts under this condition."""
    c = torch.tensor(json.loads(artifact_paths["cast"].read_text())["directions"]["2"])
    h = tiny_llama(TOKENS, output_hidden_states=True).hidden_states[2][0].mean(0)
    projected = torch.tanh((h @ c) / (c @ c) * c)
    expected = torch.nn.functional.cosine_similarity(h, projected, dim=0)
    answers = {
        **SAMPLES["cast"].read,
        "threshold": str(float(expected) - 1e-3),
        "behaviour": str(artifact_paths["svec-ibm"]),
        "behaviour_layers": "2,3",
        "strength": "2",
    }
    options = {"source_format": "cast", "base": tiny_weights}
    with pytest.raises(WouldLose, match="also changes the prompt's own tokens"):
        convert(artifact_paths["cast"], tmp_path / "cast", answers=answers, **options)
    convert(artifact_paths["cast"], tmp_path / "cast", answers=answers, allow_loss=True, **options)
    with steer(tiny_llama, load(tmp_path / "cast")) as session:
        steered = passed(session, tiny_llama, TOKENS)[0]
    assert abs(session.outcomes[0].verdicts[0].score - float(expected)) < 1e-5
    assert session.outcomes[0].fired
    plain = logits(tiny_llama)
    assert torch.equal(steered[:-1], plain[:-1])  # the prompt's own tokens are not changed
    assert (steered[-1] - plain[-1]).abs().max() > 0.1
    answers["strength"] = "0"
    with pytest.raises(MissingOption, match="strength"):
        convert(artifact_paths["cast"], tmp_path / "x", answers=answers, **options)
