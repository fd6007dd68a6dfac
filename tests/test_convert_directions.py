"""Bare directions, payloads and features of autoencoders: what they say, and what is asked for."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from artifacts import ALL_LAYERS, SAMPLES, autoencoder
from steerbridge.errors import (
    InvalidOption,
    MissingOption,
    NotRepresentable,
    UnknownFormat,
    UnreadableSource,
)
from steerbridge.format import detect, get_format
from steerbridge.reference import apply
from steerbridge.spec import LayerInput, LayerOutput
from steerbridge_convert import read

torch = pytest.importorskip("torch", reason="needs the extra `convert`")
HIDDEN, LAYERS = 16, 4
ROW = np.arange(1, HIDDEN + 1, dtype=np.float32)
SCOPE = {**ALL_LAYERS, "act": "add", "site": "layer_input"}


def placed(package):
    """Site -> vector."""
    (act,) = package.spec.interventions
    return {str(t.site): package.tensors[t.vector].float32().tolist() for t in act.targets}


def stacked(rows):
    """A different vector for each row."""
    return np.stack([ROW * (k + 1) for k in range(rows)])


@pytest.mark.parametrize("kind", ["npy", "npy-f2", "npy-f8", "safetensors", "pt"])
def test_a_row_for_each_layer(kind, tmp_path, tiny_weights):
    path = tmp_path / f"v.{kind.partition('-')[0]}"
    rows = stacked(LAYERS)
    if kind.startswith("npy"):
        np.save(path, rows.astype(kind.partition("-")[2] or "f4"))
    elif kind == "safetensors":
        save_file({"vectors": rows}, path)
    else:
        torch.save(torch.from_numpy(rows), path)
    if kind != "pt":  # which looks like hotwire's
        assert detect(path).name == "directions"
    for site in ("layer_input", "layer_output"):
        answers = {**SCOPE, "site": site, "layers": "1-2", "strength": "1:2,2:3"}
        package, losses = read(path, source_format="directions", answers=answers, base=tiny_weights)
        assert not losses
        strengths = {a.targets[0].site.layer: a.alpha for a in package.spec.interventions}
        assert strengths == {1: 2.0, 2: 3.0}
        assert {a.targets[0].site.stream for a in package.spec.interventions} == {site}


def test_hidden_states_of_transformers_have_a_row_more(tmp_path, tiny_weights):
    """Persona vectors: row k enters block k, and the last one leaves the last block."""
    np.save(tmp_path / "v.npy", stacked(LAYERS + 1))
    package, _ = read(tmp_path / "v.npy", answers=SCOPE, base=tiny_weights)
    wanted = {f"layer_input[{k}]": (ROW * (k + 1)).tolist() for k in range(LAYERS)}
    assert placed(package) == {**wanted, "layer_output[3]": (ROW * 5).tolist()}
    with pytest.raises(NotRepresentable, match="5 rows at layer_output for 4 blocks"):
        read(tmp_path / "v.npy", answers={**SCOPE, "site": "layer_output"}, base=tiny_weights)
    torch.save(torch.from_numpy(stacked(LAYERS + 1)), tmp_path / "v.pt")
    with pytest.raises(NotRepresentable, match="--from directions"):
        read(tmp_path / "v.pt", answers=ALL_LAYERS, base=tiny_weights)


def test_nothing_is_assumed(tmp_path, tiny_weights):
    np.save(tmp_path / "v.npy", ROW)
    for name in SCOPE:
        answers = {k: v for k, v in SCOPE.items() if k != name}
        with pytest.raises(MissingOption, match=name):
            read(tmp_path / "v.npy", answers=answers, base=tiny_weights)


def test_a_direction_that_is_taken_out_is_a_unit_vector(tmp_path, tiny_weights):
    np.save(tmp_path / "v.npy", ROW)
    answers = {**SCOPE, "layers": "2", "act": "project_out"}
    package, _ = read(tmp_path / "v.npy", answers=answers, base=tiny_weights)
    (act,) = package.spec.interventions
    states = np.random.default_rng(0).normal(size=(3, HIDDEN))
    after = apply(act, package.tensors, LayerInput(stream="layer_input", layer=2), states)
    np.testing.assert_allclose(after @ ROW, 0, atol=1e-4)
    np.save(tmp_path / "zero.npy", ROW * 0)
    with pytest.raises(NotRepresentable, match="a vector of zeros has no direction"):
        read(tmp_path / "zero.npy", answers=answers, base=tiny_weights)


def test_the_direction_of_refusal_direction_says_its_layer(tmp_path, tiny_weights):
    torch.save(torch.from_numpy(ROW).double(), tmp_path / "direction.pt")
    about = tmp_path / "direction_metadata.json"
    about.write_text(json.dumps({"pos": -2, "layer": 3}))
    answers = {"act": "add", "strength": "-1", "positions": "all_positions"}
    for path in (tmp_path, tmp_path / "direction.pt"):
        assert detect(path).name == "directions"
        package, losses = read(path, answers=answers, base=tiny_weights)
        assert placed(package) == {"layer_input[3]": ROW.tolist()}
        assert not losses
    everywhere = {**answers, "act": "project_out", "strength": "1", "layers": "all"}
    package, losses = read(tmp_path, answers=everywhere, base=tiny_weights)
    assert len(package.spec.interventions[0].targets) == LAYERS
    assert "the attention and the MLP of each block" in str(losses[0])
    about.write_text(json.dumps({"pos": -2, "layer": 3, "coeff": 2}))
    with pytest.raises(NotRepresentable, match="coeff: unknown"):
        read(tmp_path, source_format="directions", answers=answers, base=tiny_weights)
    about.write_text(json.dumps({"pos": -2, "layer": "3"}))
    with pytest.raises(UnreadableSource, match="layer"):
        read(tmp_path, source_format="directions", answers=answers, base=tiny_weights)


@pytest.mark.parametrize(
    "array",
    [np.ones((2, 2, HIDDEN)), np.ones(HIDDEN, int), np.array([np.nan] * HIDDEN), np.ones(0)],
    ids=["three dimensions", "integers", "not finite", "empty"],
)
def test_arrays_that_are_none(array, tmp_path, tiny_weights):
    np.save(tmp_path / "v.npy", array)
    with pytest.raises(UnreadableSource, match="array"):
        read(tmp_path / "v.npy", answers=SCOPE, base=tiny_weights)


def test_a_pickle_in_a_numpy_file_is_not_run(tmp_path, tiny_weights):
    np.save(tmp_path / "v.npy", np.array([print], object), allow_pickle=True)
    with pytest.raises(UnreadableSource, match="an array of numpy"):
        read(tmp_path / "v.npy", answers=SCOPE, base=tiny_weights)


@pytest.mark.parametrize("name", ["v.pt", "v.gguf", "v.npy", "v.safetensors", "v.svec"])
def test_what_is_wrong_with_a_malformed_file_is_told(name, tmp_path):
    (tmp_path / name).write_bytes(b"cut off")
    with pytest.raises(UnreadableSource, match=name):
        get_format(detect(tmp_path / name).name).contents(tmp_path / name)


def test_malformed_headers_and_vectors_are_told(tmp_path, tiny_weights):
    np.save(tmp_path / "v.npy", ROW)
    raw = (tmp_path / "v.npy").read_bytes()
    (tmp_path / "v.npy").write_bytes(raw.replace(b"'shape': (", b"'shape': [(((", 1))
    with pytest.raises(UnreadableSource, match="an array of numpy"):
        read(tmp_path / "v.npy", answers=SCOPE, base=tiny_weights)
    ragged = {"model_type": "llama", "directions": {"1": [[1.0], [1.0, 2.0]]}}
    (tmp_path / "v.svec").write_text(json.dumps(ragged))
    with pytest.raises(UnreadableSource, match="a vector of numbers"):
        get_format("svec-ibm").contents(tmp_path / "v.svec")


def test_a_safetensors_file_of_several_tensors_is_none(tmp_path, tiny_weights):
    save_file({"a": ROW, "b": ROW}, tmp_path / "v.safetensors")
    with pytest.raises(UnknownFormat):
        detect(tmp_path / "v.safetensors")
    save_file({"a": ROW}, tmp_path / "w.safetensors", {"scale": "3"})
    with pytest.raises(NotRepresentable, match="scale: unknown"):
        read(
            tmp_path / "w.safetensors",
            source_format="directions",
            answers=SCOPE,
            base=tiny_weights,
        )


# ------------------------------------------------------------ vLLM-Hook


def hooked(folder, dir=ROW, avg_proj=None, **steering):
    """Files of vLLM-Hook; its vectors are arrays of numpy, its projections tensors."""
    folder.mkdir(exist_ok=True)
    stored = {"dir": dir} if avg_proj is None else {"dir": dir, "avg_proj": torch.tensor(avg_proj)}
    torch.save(stored, folder / "v.pt")
    said = {"method": "add_vector", "coefficient": 4, "optimal_layer": 2, "vector_path": "v.pt"}
    (folder / "phi3.json").write_text(json.dumps({"steering": {**said, **steering}}))
    return folder / "phi3.json"


def test_a_vector_of_vllm_hook(tmp_path, tiny_weights):
    path = hooked(tmp_path, optimal_layer=[1, 2])
    assert detect(path).name == "vllm-hook"
    package, losses = read(path, base=tiny_weights)
    (act,) = package.spec.interventions
    assert (act.alpha, act.position) == (4.0, "all_positions")
    assert placed(package) == dict.fromkeys(("layer_output[1]", "layer_output[2]"), ROW.tolist())
    assert not losses
    everywhere, _ = read(hooked(tmp_path, optimal_layer="all"), base=tiny_weights)
    assert len(everywhere.spec.interventions[0].targets) == LAYERS
    after, _ = read(hooked(tmp_path, positions="last_token"), base=tiny_weights)
    assert after.spec.interventions[0].position == "from_prompt_end"
    with pytest.raises(NotRepresentable, match="which releases read differently"):
        read(hooked(tmp_path, apply_at_all_positions=False), base=tiny_weights)
    with pytest.raises(UnreadableSource, match="optimal_layer"):
        read(hooked(tmp_path, optimal_layer=[1, 1]), base=tiny_weights)
    for wrong in ([], "v\0.pt", 3):
        with pytest.raises(UnreadableSource, match="vector_path"):
            read(hooked(tmp_path, vector_path=wrong), base=tiny_weights)
    with pytest.raises(NotRepresentable, match="positions"):
        read(hooked(tmp_path, positions=["all_tokens"]), base=tiny_weights)
    with pytest.raises(UnreadableSource, match="coefficient"):
        read(hooked(tmp_path, coefficient=True), base=tiny_weights)


def test_a_projection_that_vllm_hook_moves(tmp_path, tiny_weights):
    unit = ROW / np.linalg.norm(ROW)
    path = hooked(tmp_path, unit, 2.5, method="adjust_rs")
    package, losses = read(path, base=tiny_weights)
    assert "measures the projection behind the block's MLP" in str(losses[0])
    states = np.random.default_rng(0).normal(size=(3, HIDDEN))
    site, after = LayerOutput(stream="layer_output", layer=2), states
    for act in package.spec.interventions:
        after = apply(act, package.tensors, site, after)
    want = states + (2.5 - states @ unit)[:, None] * unit
    np.testing.assert_allclose(after, want, atol=1e-6)


def test_a_vector_elsewhere_is_named_by_the_user(tmp_path, tiny_weights):
    path = hooked(tmp_path / "configs", vector_path="../v.pt")
    (tmp_path / "configs" / "v.pt").rename(tmp_path / "v.pt")
    with pytest.raises(NotRepresentable, match="leads out of the folder"):
        read(path, base=tiny_weights)
    package, _ = read(path, answers={"vector": str(tmp_path / "v.pt")}, base=tiny_weights)
    assert placed(package) == {"layer_output[2]": ROW.tolist()}


# ------------------------------------------------------------ EasySteer, SAELens


def test_a_payload_that_was_changed_is_refused(artifact_paths, tmp_path, tiny_weights):
    path = artifact_paths["easysteer-payload"]
    content = json.loads(path.read_text())
    name = next(iter(content["tensors"]))
    content["tensors"][name]["data"] = content["tensors"][name]["data"][::-1].lstrip("=") + "=="
    changed = tmp_path / "v.json"
    changed.write_text(json.dumps(content))
    with pytest.raises(UnreadableSource):
        read(changed, answers=SAMPLES["easysteer-payload"].read, base=tiny_weights)
    erased = {**SAMPLES["easysteer-payload"].read, "act": "project_out"}
    package, _ = read(path, answers=erased, base=tiny_weights)
    assert {act.type for act in package.spec.interventions} == {"project_out"}


def test_features_of_an_autoencoder(tmp_path, tiny_weights):
    folder = autoencoder(tmp_path / "sae", ROW)
    answers = {"feature": "3", "strength": "5", "positions": "all_positions"}
    package, _ = read(folder, answers=answers, base=tiny_weights)
    assert placed(package) == {"layer_output[2]": ROW.tolist()}
    assert package.spec.interventions[0].alpha == 5
    with pytest.raises(InvalidOption, match=r"features are 0\.\.4"):
        read(folder, answers={**answers, "feature": "5"}, base=tiny_weights)
    old = autoencoder(tmp_path / "old", ROW)  # before SAELens 6: its training options beside
    about = {"hook_point": "blocks.1.hook_resid_pre", "hook_point_layer": 1, "l1_coefficient": 8e-5}
    (old / "cfg.json").write_text(json.dumps(about | {"normalize_activations": False}))
    package, _ = read(old, answers=answers, base=tiny_weights)
    assert placed(package) == {"layer_input[1]": ROW.tolist()}
    (old / "cfg.json").write_text(json.dumps(about | {"hook_point": "blocks.1.hook_mlp_out"}))
    with pytest.raises(NotRepresentable, match="only the residual stream"):
        read(old, answers=answers, base=tiny_weights)
