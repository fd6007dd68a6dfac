"""The commands `convert`, `formats` and `inspect`."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from artifacts import FORMAT_NAMES
from steerbridge import load
from steerbridge.cli.app import build
from steerbridge.errors import SteerbridgeError, UnknownFormat, WouldLose
from steerbridge.format import detect, formats

torch = pytest.importorskip("torch", reason="needs the extra `convert`")


def run(*arguments):
    words = [str(a) for a in arguments]
    return CliRunner().invoke(build(words), words)


def test_the_command_line(tmp_path, artifact_paths, tiny_weights):
    done = run(
        "convert", artifact_paths["repeng"], tmp_path / "p.gguf", "--base", tiny_weights,
        "--set", "strength=4", "--set", "layers=all", "--set", "positions=all_positions", "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["target"] == "steerbridge-gguf"
    assert told["acts"] == [
        "add_vector 4 times at layer_output[0], layer_output[2] (all_positions)"
    ]
    assert load(tmp_path / "p.gguf").spec.interventions[0].alpha == 4
    lossy = (
        "convert",
        artifact_paths["steerbridge"],
        tmp_path / "l.pt",
        "--to",
        "lm-steer",
        "--base",
        tiny_weights,
    )
    refused = run(*lossy)
    assert isinstance(refused.exception, WouldLose)
    written = run(*lossy, "--allow-loss")
    assert "lost       rule r: is dropped: h will act on every prompt" in written.stdout
    cut = run("convert", artifact_paths["steerbridge"], tmp_path / "low.gguf", "--rank", 2)
    assert "rank       h: 2, relative error" in cut.stdout
    (tmp_path / "l.pt").rename(tmp_path / "renamed.pt")  # detected by its contents
    assert detect(tmp_path / "renamed.pt").name == "lm-steer"
    torch.save({"weights": 1}, tmp_path / "other.pt")
    assert isinstance(run("inspect", tmp_path / "other.pt").exception, UnknownFormat)
    assert "strength of the matrix" in run("formats").stdout
    assert set(json.loads(run("formats", "--json").stdout)) == set(FORMAT_NAMES)
    for wrong in (("--set", "x"), ("--dtype", "F64"), ("--data", artifact_paths["cast"])):
        assert isinstance(
            run("convert", artifact_paths["steerbridge"], tmp_path / "no", *wrong).exception,
            SteerbridgeError,
        )


@pytest.mark.parametrize("name", [n for n in FORMAT_NAMES if n != "cast"])
def test_inspect_reads_every_format(name, artifact_paths):
    shown = run("inspect", artifact_paths[name])
    assert shown.exit_code == 0, shown.output
    assert (formats()[name].title in shown.stdout) or name.startswith("steerbridge")
    assert json.loads(run("inspect", artifact_paths[name], "--json").stdout)
