"""What a file costs is known before it is read: bombs, links, pointers, numbers that are none."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest

import helpers
from artifacts import SAMPLES, read_as_package
from steerbridge.errors import InvalidOption, UnreadableSource
from steerbridge.format import check_source, detect, shown
from steerbridge_convert import convert, read

torch = pytest.importorskip("torch", reason="needs the extra `convert`")

# Prints the most memory that the process had (not `ru_maxrss`: a child inherits its parent's), and
# whether the command failed.
_MEASURED = """
import re
from pathlib import Path
from steerbridge.cli.app import main
code = 0
try:
    main()
except SystemExit as error:
    code = error.code
print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1], code)
"""


def repeated(path):
    """1.6 GB of elements over four bytes."""
    torch.save(torch.zeros(1).expand(400_000_000), path)


def deflated(path):
    """A file of torch.save that was packed again: 200 MB of zeros in 200 KB."""
    torch.save({"layer_activations": {1: torch.zeros(50_000_000)}}, path)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(f"{path}.z", "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name), zipfile.ZIP_DEFLATED)
    path.with_name(f"{path.name}.z").replace(path)


def many_numbers(path):
    """20 million numbers of two characters each."""
    numbers = "0," * 20_000_000 + "0"
    path.write_text(f'{{"model_type": "llama", "directions": {{"1": [{numbers}]}}}}')


def shared_lists(path):
    """Thirty lists, each of which holds the one before it twice: a billion when printed."""
    inner = [torch.zeros(1)]
    for _ in range(30):
        inner = [inner, inner]
    torch.save({"layer_activations": inner}, path)


def lying(path):
    """An array of numpy with four bytes and a header that says terabytes."""
    np.save(path, np.ones(1, "f4"))
    more = b"0" * 12
    path.write_bytes(path.read_bytes().replace(b"(1,), }" + b" " * 12, b"(1" + more + b",), }", 1))


BOMBS = {
    "a.pt": repeated,
    "b.pt": deflated,
    "c.svec": many_numbers,
    "d.pt": shared_lists,
    "e.npy": lying,
}


def peak(path):
    """MiB that `steerbridge inspect` of a file takes at most, and seconds of its processor time."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", _MEASURED, "inspect", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    size, code = done.stdout.splitlines()[-1].split()
    return int(size) >> 10, after.ru_utime - before.ru_utime, code, done.stdout + done.stderr


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """The cost of a sound file."""
    path = tmp_path_factory.mktemp("sound") / "v.pt"
    torch.save({"layer_activations": {1: torch.ones(16)}, "layer_type": "decoder_block"}, path)
    size, seconds, code, output = peak(path)
    assert code == "0", output
    return size, seconds


@pytest.mark.slow
@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_costs_no_more_than_a_sound_file(name, tmp_path, sound):
    BOMBS[name](tmp_path / name)
    size, seconds, code, output = peak(tmp_path / name)
    assert code not in ("0", "None"), output
    assert "Traceback" not in output
    assert size < sound[0] + 100
    assert seconds < sound[1] + 5


def test_more_elements_than_bytes_are_refused(tmp_path):
    repeated(tmp_path / "v.pt")
    with pytest.raises(UnreadableSource, match=r"expected 1600000000 bytes .* found 4"):
        detect(tmp_path / "v.pt").contents(tmp_path / "v.pt")


def test_a_compressed_record_is_refused_by_name(tmp_path, tiny_weights):
    path = tmp_path / "v.pt"
    torch.save({"layer_activations": {1: torch.ones(16)}}, path)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "new.pt", "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name), zipfile.ZIP_DEFLATED)
    with pytest.raises(UnreadableSource, match=r"data\.pkl: expected a record stored as it is"):
        read(tmp_path / "new.pt", source_format="steering-vectors", base=tiny_weights)


def test_the_layout_before_torch_1_6_is_told(tmp_path, tiny_weights):
    path = tmp_path / "v.pt"
    torch.save(torch.ones(4, 16), path, _use_new_zipfile_serialization=False)
    with pytest.raises(UnreadableSource, match=r"before torch 1\.6.*save it again"):
        read(path, source_format="hotwire", base=tiny_weights)


def test_arrays_of_numpy_are_read_as_tensors(tmp_path, tiny_weights):
    values = np.arange(16, dtype=">f8") / 7
    matrix = np.asfortranarray(np.arange(32, dtype=np.float32).reshape(2, 16))
    path = tmp_path / "v.pt"
    fields = {"layer_activations": {1: values, 2: matrix[1]}, "layer_type": "decoder_block"}
    torch.save(fields, path)
    got = read_as_package("steering-vectors", path, tiny_weights)
    one, two = (t.float32() for _, t in sorted(got.tensors.items()))
    assert np.array_equal(one, values.astype(np.float32))
    assert np.array_equal(two, matrix[1])


def test_an_array_whose_shape_exceeds_its_bytes_is_refused(tmp_path, tiny_weights):
    class Liar:
        def __reduce__(self):
            state = (1, (1 << 40,), np.dtype("f4"), False, b"\0" * 8)
            return np._core.multiarray._reconstruct, (np.ndarray, (0,), b"b"), state

    path = tmp_path / "v.pt"
    torch.save({"layer_activations": {1: Liar()}}, path)
    with pytest.raises(UnreadableSource, match=r"layer_activations\[1\]: expected a float tensor"):
        read(path, source_format="steering-vectors", base=tiny_weights)


def test_links_out_of_a_directory_are_refused(artifact_paths, tmp_path, tiny_weights):
    folder = tmp_path / "probe"
    folder.mkdir()
    source = artifact_paths["probe-aisteer360"]
    for name in ("probe.json", "probe.safetensors"):
        (folder / name).symlink_to(source / name)
    with pytest.raises(UnreadableSource, match="found a link out of here"):
        detect(folder)
    with pytest.raises(UnreadableSource, match="found a link out of here"):
        read(folder, source_format="probe-aisteer360", base=tiny_weights)


def test_a_snapshot_of_the_hub_may_link_to_its_blobs(artifact_paths, tmp_path):
    blobs, snapshot = tmp_path / "models--a" / "blobs", tmp_path / "models--a" / "snapshots" / "1"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for name in ("probe.json", "probe.safetensors"):
        blob = blobs / f"blob-{name}"
        blob.write_bytes((artifact_paths["probe-aisteer360"] / name).read_bytes())
        (snapshot / name).symlink_to(blob)
    assert detect(snapshot).name == "probe-aisteer360"
    (tmp_path / "named").symlink_to(artifact_paths["probe-aisteer360"])
    check_source(tmp_path / "named")  # a link that the user names


def test_a_pointer_of_git_lfs_is_told(tmp_path):
    (tmp_path / "v.gguf").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(UnreadableSource, match="git lfs pull"):
        detect(tmp_path / "v.gguf")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e39"])
@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("repeng", "strength"),
        ("autosteer", "eps"),
        ("lm-steer", "values"),
        ("cast", "threshold"),
        ("safeswitch", "threshold"),
        ("steerkit", "strength"),
    ],
)
def test_numbers_that_are_none_are_refused(
    name, option, value, artifact_paths, tmp_path, tiny_weights
):
    answers = {**SAMPLES[name].read, option: value}
    with pytest.raises(InvalidOption, match="finite"):
        convert(
            artifact_paths[name],
            tmp_path / "out",
            source_format=name,
            answers=answers,
            base=tiny_weights,
            model=tiny_weights,
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999"])
def test_numbers_in_files_are_finite(value, artifact_paths, tmp_path, tiny_weights):
    folder = tmp_path / "adapter"
    shutil.copytree(artifact_paths["peft"], folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["lora_alpha"] = "here"
    text = json.dumps(config).replace('"here"', value)
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(UnreadableSource, match="number"):
        read(folder, base=tiny_weights, model=tiny_weights)


def test_what_is_found_is_told_in_a_few_words():
    inner: list[object] = [1]
    for _ in range(40):
        inner = [inner, inner]
    assert len(shown(inner)) < 200
    assert len(shown("x" * 1000)) < 200
    assert json.loads(helpers.run_cli("formats", "--json").stdout)
