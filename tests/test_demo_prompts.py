"""Prompts of the demo model's guard: labels, pairs, splits."""

from __future__ import annotations

import pytest

from steerbridge import read_examples
from steerbridge.errors import DataError

Image = pytest.importorskip("PIL.Image", reason="needs the extra `demo`")
torch = pytest.importorskip("torch", reason="needs the extra `demo`")
transformers = pytest.importorskip("transformers", reason="needs the extra `demo`")
from steerbridge_demo import drawings, guard  # noqa: E402
from steerbridge_demo import vocabulary as words  # noqa: E402

pytestmark = pytest.mark.hf


def test_guard_prompts_are_labelled_aligned_and_apart(tmp_path):
    prompts_of = {s: guard.guard_prompts(tmp_path, s, per_kind=10, seed=5) for s in guard.SPLITS}
    for split, prompts in prompts_of.items():
        examples = [p.example for p in prompts]
        assert [e.kind for e in examples].count("general") == 10
        for kind in ("text", "image", "both"):
            mine = [e for e in examples if e.kind == kind]
            assert len(mine) == 20
            assert all(
                a.harmful and not b.harmful and a.pair == b.pair
                for a, b in zip(mine[::2], mine[1::2], strict=True)
            )
        for p in prompts:
            assert all(path.is_file() for path in p.example.images)
            assert p.example.group == p.stem
            hazards = {p.object} & {*words.REFUSED, *words.DUAL}
            if p.example.kind == "image":
                assert p.example.harmful == bool(hazards & set(words.REFUSED))
            if not p.example.harmful:
                assert not hazards & set(words.REFUSED)
        assert all((p.style == drawings.UNSEEN_STYLE) == (split == "unseen_style") for p in prompts)
    known = {
        p.stem
        for s in ("train", "validation")
        for p in prompts_of[s]
        if p.example.kind != "general"
    }
    new = {p.stem for p in prompts_of["unseen_stems"] if p.example.kind in ("image", "both")}
    assert not known & new
    texts = {s: {p.example.text for p in prompts_of[s] if p.stem is None} for s in guard.SPLITS}
    assert not texts["train"] & texts["test"]
    assert not texts["train"] & texts["validation"]


def test_guard_prompts_are_the_same_again_and_read_back(tmp_path):
    first = guard.write_jsonl(tmp_path / "a", "validation", per_kind=3)
    second = guard.write_jsonl(tmp_path / "b", "validation", per_kind=3)
    assert first.read_bytes() == second.read_bytes()
    pairs = zip(read_examples(first), read_examples(second), strict=True)
    for one, other in pairs:
        assert one.images[0].read_bytes() == other.images[0].read_bytes()
        assert (one.text, one.harmful, one.kind) == (other.text, other.harmful, other.kind)
    with pytest.raises(DataError):
        guard.guard_prompts(tmp_path, "dev")
    with pytest.raises(DataError):
        guard.guard_prompts(tmp_path, "train", kinds=("audio",))
