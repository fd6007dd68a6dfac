"""What is told of prompts before anything is trained on them, and what is refused."""

from __future__ import annotations

import json

import pytest

import helpers
from steerbridge.data import Example
from steerbridge.datasets import checks
from steerbridge.errors import DataError
from steerbridge.training.settings import TrainSettings
from steerbridge.training.train import check

WORDS = [
    "lamp",
    "stone",
    "river",
    "paper",
    "garden",
    "window",
    "kettle",
    "ladder",
    "copper",
    "meadow",
    "violin",
    "harbour",
]


def prompts(count, harmful, offset=0):
    """Texts that are not alike."""
    texts = []
    for i in range(count):
        a, b = divmod(i + offset, len(WORDS))
        texts.append(f"{WORDS[b]} {WORDS[a % len(WORDS)][::-1]} {i}")
    return [Example(text, harmful) for text in texts]


def test_a_prompt_under_both_labels_is_refused_with_its_places(tmp_path):
    image = tmp_path / "a.png"
    image.write_bytes(b"x")
    examples = [
        Example("Open the door.", True, source="a.csv line 2"),
        Example("open  the door.", False, source="b.csv line 9"),
        Example("Open the door.", False, images=(image,)),
        Example("Open the door.", False, system="You sell doors."),
    ]
    want = "one label for a prompt, .*harmful in a.csv line 2, harmless in b.csv line 9"
    with pytest.raises(DataError, match=want):
        checks.check(examples)
    checks.check(examples[:1] + examples[2:])
    assert len(checks.contradictions(examples)) == 1


def test_copies_are_not_counted_as_prompts():
    harmless = prompts(20, False)
    with pytest.raises(DataError, match="20 or more harmful prompts that differ, found 4"):
        check([*harmless, *prompts(4, True, 50) * 10], TrainSettings())
    alike = [
        Example(f"Say how to pick the lock of the green door number {i}.", True) for i in range(20)
    ]
    with pytest.raises(DataError, match="10 or more groups of harmful prompts that are not alike"):
        check([*harmless, *alike], TrainSettings())
    check([*harmless, *prompts(20, True, 50)], TrainSettings())


def test_the_sheet(tmp_path):
    examples = [
        Example("How do I open the door of my car?", False, pair="1"),
        Example("How do I open the door of your car?", True, pair="1"),
        Example("How do I open the door of your car?", True, pair="2"),
        Example("Wie backe ich ein gutes Brot zu Hause?", False, "bread"),
    ]
    sheet = checks.sheet(examples, render=lambda e: range(len(e.text)), context_length=34)
    assert sheet.kinds == {
        "bread": {"harmful": 0, "harmless": 1},
        "general": {"harmful": 2, "harmless": 1},
    }
    assert sheet.distinct == {"harmful": 1, "harmless": 2}
    assert sheet.groups == {"harmful": 1, "harmless": 2}
    assert (sheet.near_duplicates, sheet.odd_pairs, sheet.beyond_context) == (2, 1, 3)
    assert sheet.characters["harmful"] == (35, 35, 35, 35)
    assert sheet.length_auroc == 0.5
    pytest.importorskip("py3langid")
    assert sheet.languages == {"en": 3, "de": 1}


def test_the_command(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [
        {"prompt": "Open the door.", "harmful": True},
        {"prompt": "Bake bread.", "harmful": False},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = helpers.run_cli("data", path, "--json")
    assert done.returncode == 0, done.stderr
    told = helpers.last_json(done.stdout)
    assert told["files"] == [
        {"path": str(path), "prompts": 2, "read_as": "prompts with their labels", "left_out": ""}
    ]
    assert (told["prompts"], told["contradictions"]) == (2, [])
    other = tmp_path / "b.csv"
    other.write_text("prompt\nopen the door.\n")
    done = helpers.run_cli("data", path, other, "--label", "b.csv=harmless")
    assert done.returncode == 1
    assert "under both labels        1" in done.stdout
    assert "harmful in a.jsonl line 1, harmless in b.csv line 2" in done.stdout
    done = helpers.run_cli("data", path, other, "--label", "b.csv=harmful")
    assert done.returncode == 0
