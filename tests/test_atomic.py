"""Atomic writes of files and directories: replacing older ones, and after an error."""

from __future__ import annotations

import pytest

from steerbridge.atomic import replacing


def write(path, kind, text):
    if kind == "directory":
        path.mkdir()
        path = path / "inside"
    path.write_text(text)


def broken(target, kind):
    with replacing(target) as fresh:
        write(fresh, kind, "third")
        _ = 1 / 0


def content(path):
    return (path / "inside" if path.is_dir() else path).read_text()


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_a_target_appears_whole_or_not_at_all(kind, tmp_path):
    target = tmp_path / "new" / "target"
    for text in ("first", "second"):
        with replacing(target) as fresh:
            write(fresh, kind, text)
            assert not target.exists() or content(target) == "first"
        assert content(target) == text
    with pytest.raises(ZeroDivisionError):
        broken(target, kind)
    with pytest.raises(FileNotFoundError), replacing(target):
        pass  # nothing was written
    assert content(target) == "second"
    assert [p.name for p in target.parent.iterdir()] == ["target"]


def test_a_file_does_not_replace_a_directory(tmp_path):
    (tmp_path / "target").mkdir()
    with pytest.raises(OSError, match="directory"), replacing(tmp_path / "target") as fresh:
        fresh.write_text("x")
    assert (tmp_path / "target").is_dir()


def test_files_have_the_permissions_of_the_process(tmp_path):
    (tmp_path / "plain").write_text("x")
    with replacing(tmp_path / "target") as fresh:
        fresh.write_text("x")
    assert (tmp_path / "target").stat().st_mode == (tmp_path / "plain").stat().st_mode
