"""Labelled prompts: their chat, their hash."""

from __future__ import annotations

from dataclasses import replace

from steerbridge import data
from steerbridge.data import Example


def test_the_chat_of_an_example():
    first, second = Example("Hello", False, system="Be kind."), Example("Hello", False)
    assert [m["role"] for m in first.messages("Hello")] == ["system", "user"]
    assert second.messages("Hello") == [{"role": "user", "content": "Hello"}]
    parts = [{"type": "image"}, {"type": "text", "text": "Hello"}]
    assert first.messages(parts)[0]["content"] == [{"type": "text", "text": "Be kind."}]


def test_the_hash_holds_what_training_uses(tmp_path):
    image = tmp_path / "a.png"
    image.write_bytes(b"a")
    plain = Example("Hello", False)
    changed = [
        replace(plain, text="Hullo"),
        replace(plain, harmful=True),
        replace(plain, kind="other"),
        replace(plain, pair="p"),
        replace(plain, group="p"),
        replace(plain, system="p"),
        replace(plain, images=(image,)),
    ]
    assert len({data.sha256([one]) for one in [plain, *changed]}) == 1 + len(changed)
    assert data.sha256([plain]) == data.sha256([replace(plain, source="a.csv line 2")])
