"""Targets that exist: nothing foreign is lost, and a killed conversion leaves one of them whole."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from artifacts import SAMPLES, WRITABLE, sample
from steerbridge import load
from steerbridge.errors import ConversionError, NotRepresentable, PackageError
from steerbridge.format import get_format
from steerbridge_convert import convert, publishing

FOREIGN = {"README.md": "mine", "checkpoint-500/optimizer.bin": "mine", "model_weights.txt": "mine"}


def options(name, weights):
    loss = {"allow_loss": name == "cast"}
    return {"to": name, "answers": SAMPLES[name].write, "model": weights, **loss}


def place(name, folder):
    return folder / f"{SAMPLES[name].name}{SAMPLES[name].suffix}"


def texts(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


@pytest.mark.parametrize("name", WRITABLE)
def test_nothing_foreign_is_lost(name, tmp_path, tiny_weights):
    pytest.importorskip("torch")
    source = sample(name).save(tmp_path / "source")
    target = place(name, tmp_path)
    convert(source, target, **options(name, tiny_weights))
    with pytest.raises(PackageError, match="--overwrite"):
        convert(source, target, **options(name, tiny_weights))
    if target.is_dir():
        for path, text in FOREIGN.items():
            (target / path).parent.mkdir(exist_ok=True)
            (target / path).write_text(text)
        (target / "empty").mkdir()
        (target / "elsewhere").symlink_to(tmp_path / "source", target_is_directory=True)
    before = texts(target) if target.is_dir() else {}
    convert(source, target, overwrite=True, **options(name, tiny_weights))
    after = texts(target) if target.is_dir() else {}
    assert after.keys() == before.keys()
    assert all(after[path] == b"mine" for path in FOREIGN if target.is_dir())
    if target.is_dir():
        assert (target / "empty").is_dir()
        assert (target / "elsewhere").readlink() == tmp_path / "source"
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(f".{target.name}.")]


@pytest.mark.parametrize("name", [n for n in WRITABLE if not get_format(n).atomic])
def test_what_a_tool_wrote_is_left_alone(name, tmp_path, tiny_weights):
    pytest.importorskip("torch")
    source = sample(name).save(tmp_path / "source")
    target = place(name, tmp_path)
    if SAMPLES[name].suffix:
        target.write_text("a file of another kind")
        match = "exists and is not a"
    else:
        convert(source, target, **options(name, tiny_weights))
        (target / publishing.LIST).unlink()  # as if the tool had written it
        match = "was not written by Steerbridge"
    before = texts(tmp_path)
    with pytest.raises(PackageError, match=match):
        convert(source, target, overwrite=True, **options(name, tiny_weights))
    assert texts(tmp_path) == before


def test_a_file_of_somebody_else_in_the_way_is_told(tmp_path, tiny_weights):
    pytest.importorskip("torch")
    source = sample("easyedit").save(tmp_path / "source")
    convert(source, tmp_path / "out", **options("easyedit", tiny_weights))
    listed = tmp_path / "out" / publishing.LIST
    names = json.loads(listed.read_text())["files"]
    listed.write_text(json.dumps({"files": names[1:]}))
    before = texts(tmp_path)
    with pytest.raises(PackageError, match=f"{names[0]} is there"):
        convert(source, tmp_path / "out", overwrite=True, **options("easyedit", tiny_weights))
    listed.write_text("{")
    with pytest.raises(PackageError, match="is no list"):
        convert(source, tmp_path / "out", overwrite=True, **options("easyedit", tiny_weights))
    listed.write_text(json.dumps({"files": names[1:]}))
    assert texts(tmp_path) == before


def test_names_and_encodings_of_packages_agree(tmp_path):
    source = sample("steerbridge").save(tmp_path / "source")
    with pytest.raises(PackageError, match=r"a name that ends in \.gguf"):
        convert(source, tmp_path / "out", to="steerbridge-gguf")
    with pytest.raises(PackageError, match="one that does not"):
        convert(source, tmp_path / "out.gguf", to="steerbridge")
    assert {p.name for p in tmp_path.iterdir()} == {"source"}


def test_options_without_their_object_are_refused(tmp_path, tiny_weights):
    from steerbridge.fingerprint import ModelFacts

    vectors = sample("control-vector").save(tmp_path / "vectors")
    with pytest.raises(ConversionError, match="the package has none"):
        convert(vectors, tmp_path / "out", rank=2)
    other = sample("steerbridge", ModelFacts("llama", 8, 4, 64, name="narrow")).save(tmp_path / "o")
    with pytest.raises(NotRepresentable, match="not made for narrow: hidden_size"):
        convert(vectors, tmp_path / "out", base=other)


# Two packages, in turn, onto one directory with a foreign file, until the process is killed.
_FOREVER = """
import os, random, signal, sys, time
from pathlib import Path
from steerbridge_convert import convert

a, b, target, times = *map(Path, sys.argv[1:4]), int(sys.argv[4])
draw = random.Random(0)
for _ in range(times):
    child = os.fork()
    if not child:
        while True:
            for source in (a, b):
                convert(source, target, to=sys.argv[5], overwrite=True)
    time.sleep(draw.uniform(0.001, 0.08))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print(sorted((p.name, p.stat().st_size) for p in target.iterdir()), flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="two directories change places on Linux")
@pytest.mark.parametrize("name", ["steerbridge", "probe-aisteer360"])
def test_a_killed_conversion_leaves_the_old_or_the_new_one(name, tmp_path):
    package = sample(name)
    sources = [package.save(tmp_path / "a"), package.replace(name="b" * 3000).save(tmp_path / "b")]
    target = tmp_path / "target"
    wholes = []
    for source in sources:
        convert(source, target, to=name, overwrite=True)
        (target / "README.md").write_text("mine")
        wholes.append(sorted((p.name, p.stat().st_size) for p in target.iterdir()))
    command = [sys.executable, "-c", _FOREVER, *map(str, (*sources, target)), "50", name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seen = done.stdout.splitlines()
    assert len(seen) == 50
    assert set(seen) <= set(map(str, wholes))
    if name == "steerbridge":
        assert load(target).spec.name in (package.spec.name, "b" * 3000)
