"""Every key that a tool writes is understood, refused or reported; none is passed over."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from gguf import GGUFWriter

from artifacts import ALL_LAYERS, FORMAT_NAMES, SAMPLES, read_as_package
from foreign_keys import KEYS, WITHOUT_KEYS, verdict
from steerbridge import gguf_file
from steerbridge.errors import (
    InvalidOption,
    MissingOption,
    NotRepresentable,
    UnreadableSource,
    WouldLose,
)
from steerbridge_convert import convert, publishing, read

torch = pytest.importorskip("torch", reason="needs the extra `convert`")

CASES = [(name, key) for name, keys in KEYS.items() for key in keys]


@pytest.mark.parametrize(("name", "key"), CASES)
def test_a_key_is_understood_refused_or_reported(name, key, artifact_paths, tmp_path, tiny_weights):
    value, expected = KEYS[name][key]
    found = verdict(name, key, value, artifact_paths[name], tmp_path / "changed", tiny_weights)
    assert found == expected


def test_every_format_has_its_keys():
    packages = {"steerbridge", "steerbridge-gguf"}
    assert {*KEYS, *WITHOUT_KEYS, *packages} == set(FORMAT_NAMES)


def test_every_option_of_peft_is_known():
    peft = pytest.importorskip("peft")
    options = set(peft.LoraConfig(r=1, target_modules=["lm_head"]).to_dict())
    assert options <= {*KEYS["peft"], "peft_type", "r", "target_modules"}


def test_two_directions_of_one_layer_are_refused(tmp_path, tiny_weights):
    def fill(writer: GGUFWriter) -> None:
        for name in ("direction.1", "direction.01"):
            writer.add_tensor(name, np.ones(16, "f4"))

    gguf_file.write(tmp_path / "v.gguf", "controlvector", fill)
    with pytest.raises(UnreadableSource, match="one direction a layer"):
        read(tmp_path / "v.gguf", answers=ALL_LAYERS, base=tiny_weights)


def test_a_dict_of_layers_is_not_one_vector(tmp_path, tiny_weights):
    path = tmp_path / "v.pt"
    torch.save({1: torch.ones(16), 2: torch.ones(16)}, path)
    with pytest.raises(NotRepresentable, match="2 entries: the tool takes the first"):
        read(path, source_format="hotwire", answers=SAMPLES["hotwire"].read, base=tiny_weights)


def test_the_layers_that_a_probe_uses_are_read(artifact_paths, tmp_path, tiny_weights):
    folder = tmp_path / "probe"
    shutil.copytree(artifact_paths["probe-aisteer360"], folder)
    info = json.loads((folder / "probe.json").read_text()) | {"layer_ids": [3]}
    (folder / "probe.json").write_text(json.dumps(info))
    (probe,) = read_as_package("probe-aisteer360", folder, tiny_weights).spec.probes
    assert [r.site.layer for r in probe.readings] == [3]


def test_a_prober_of_a_block_reads_there(artifact_paths, tmp_path, tiny_weights):
    folder = tmp_path / "prober"
    shutil.copytree(artifact_paths["safeswitch"], folder)
    args = json.loads((folder / "args.json").read_text()) | {"layer_id": 2}
    (folder / "args.json").write_text(json.dumps(args))
    (probe,) = read_as_package("safeswitch", folder, tiny_weights).spec.probes
    assert str(probe.readings[0].site) == "layer_input[2]"


def test_a_prober_without_a_head_is_told(artifact_paths, tmp_path, tiny_weights):
    folder = tmp_path / "prober"
    shutil.copytree(artifact_paths["safeswitch"], folder)
    (folder / "lm_head.pth").rename(folder / "refusal_head.pth")
    assert read_as_package("safeswitch", folder, tiny_weights).spec.rules
    (folder / "refusal_head.pth").unlink()
    with pytest.raises(WouldLose, match="the prober changes nothing"):
        convert(folder, tmp_path / "out", base=tiny_weights)


def test_a_missing_shard_with_the_head_is_told(artifact_paths, tmp_path, tiny_weights):
    model = tmp_path / "model"
    shutil.copytree(tiny_weights, model)
    from safetensors.numpy import load_file, save_file

    (file,) = model.glob("*.safetensors")
    rest = {k: v for k, v in load_file(file).items() if k != "lm_head.weight"}
    save_file(rest, file)
    with pytest.raises(UnreadableSource, match="a shard of it is missing"):
        read(artifact_paths["peft"], base=tiny_weights, model=model)


def test_one_of_several_vectors_of_a_layer_is_asked_for(artifact_paths, tmp_path, tiny_weights):
    """STA of EasyEdit2 writes one vector for each mode and share that it trims."""
    folder = tmp_path / "sta"
    shutil.copytree(artifact_paths["easyedit"], folder)
    (folder / publishing.LIST).unlink()
    trimmed = torch.arange(16.0)
    torch.save(trimmed, folder / "layer_1_act_trim0.65.pt")
    torch.save(trimmed, folder / "layer_2_act_trim0.65.pt")
    with pytest.raises(MissingOption, match=r"plain, act_trim0\.65"):
        read(folder, answers=ALL_LAYERS, base=tiny_weights)
    with pytest.raises(InvalidOption, match=r"the directory has plain, act_trim0\.65"):
        read(folder, answers={**ALL_LAYERS, "variant": "sum"}, base=tiny_weights)
    answers = {**ALL_LAYERS, "variant": "act_trim0.65"}
    package, losses = read(folder, answers=answers, base=tiny_weights)
    assert not losses
    assert [t.float32().tolist() for t in package.tensors.values()] == 2 * [trimmed.tolist()]
    for name in list(folder.iterdir()):  # a vector that `merge` wrote
        name.unlink()
    torch.save(trimmed, folder / "layer_2_merged_vector.pt")
    package, _ = read(folder, answers=ALL_LAYERS, base=tiny_weights)
    assert [str(t.site) for t in package.spec.interventions[0].targets] == ["layer_output[2]"]
    torch.save(trimmed, folder / "metadata.pt")
    with pytest.raises(NotRepresentable, match=r"metadata\.pt: unknown"):
        read(folder, answers=ALL_LAYERS, base=tiny_weights)


def test_a_checkpoint_of_lm_steer_has_its_epsilon(tmp_path, tiny_weights):
    """The original saves the options of its command line beside the projectors."""
    from argparse import Namespace

    projectors = {key: torch.ones(1, 16, 2) for key in ("projector1", "projector2")}
    options = {"adaptor_class": "multiply", "adapted_component": "final_layer", "epsilon": 0.02}
    path = tmp_path / "gpt2.pt"

    def head(answers=(), state=projectors, **changes):
        torch.save([Namespace(**{**options, **changes}), state, 1000], path)
        answers = {"values": "1", **dict(answers)}
        return read(path, answers=answers, base=tiny_weights)[0].spec.interventions[0]

    assert head().eps == 0.02
    assert head({"epsilon": "0.5"}).eps == 0.5
    with pytest.raises(NotRepresentable, match="adapted_component"):
        head(adapted_component="input_embedding")
    with pytest.raises(NotRepresentable, match="add_vec"):
        head(state={"add_vec": torch.ones(1, 16)})
    for wrong in ("much", float("inf"), 1e39, True):
        with pytest.raises(UnreadableSource, match="epsilon"):
            head(epsilon=wrong)
