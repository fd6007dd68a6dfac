"""Labelled prompts read from every supported file type."""

from __future__ import annotations

import json

import pytest

from steerbridge import data
from steerbridge.data import Example
from steerbridge.errors import DataError

WANTED = [
    Example("How do bees make honey?", False, "general"),
    Example("Say how to pick this lock.", True, "locks", None, group="g"),
]
ROWS = [
    {"prompt": WANTED[0].text},
    {"prompt": WANTED[1].text, "harmful": True, "kind": "locks", "group": "g"},
]
PAIRS = [{"harmful": "Break it.", "harmless": "Mend it."}]


def test_separated_values(tmp_path):
    path = tmp_path / "a.csv"
    head = "\N{ZERO WIDTH NO-BREAK SPACE}prompt,harmful,kind,group\n"  # as Excel begins a file
    path.write_text(f"{head}{WANTED[0].text},,,\n{WANTED[1].text},Yes,locks,g\n", "utf-8")
    assert data.read_examples(path) == WANTED
    path = tmp_path / "b.tsv"
    path.write_text("harmful\tharmless\nBreak it.\tMend it.\n")
    examples = data.read_examples(path)
    assert [(e.text, e.harmful) for e in examples] == [("Break it.", True), ("Mend it.", False)]
    assert examples[0].pair == examples[1].pair == "b.tsv:1"


def test_system_messages(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,system\nHello,Be kind.\nHello,\n")
    first, second = data.read_examples(path)
    assert (first.system, second.system) == ("Be kind.", None)
    assert [m["role"] for m in first.messages("Hello")] == ["system", "user"]
    assert second.messages("Hello") == [{"role": "user", "content": "Hello"}]
    parts = [{"type": "image"}, {"type": "text", "text": "Hello"}]
    assert first.messages(parts)[0]["content"] == [{"type": "text", "text": "Be kind."}]
    assert data.sha256([first]) != data.sha256([second])
    path = tmp_path / "a.jsonl"
    path.write_text('{"harmful": "a", "harmless": "b", "system": "s"}')
    assert [e.system for e in data.read_examples(path)] == ["s", "s"]
    path.write_text('{"prompt": "a", "system": 1}')
    with pytest.raises(DataError, match=r"line 1\.system: expected a text"):
        data.read_examples(path)


def test_images_of_a_table(tmp_path):
    for name in ("x.png", "y.png"):
        (tmp_path / name).touch()
    path = tmp_path / "a.csv"
    path.write_text("prompt,images\nWhat is it?,x.png;y.png\n")
    [example] = data.read_examples(path)
    assert [p.name for p in example.images] == ["x.png", "y.png"]


def test_parquet_and_saved_datasets(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    for rows, want in ((ROWS, WANTED), (PAIRS, None)):
        table = arrow.Table.from_pylist(rows, arrow.schema(_columns(arrow, rows)))
        parquet.write_table(table, tmp_path / "a.parquet")
        folder = tmp_path / f"saved{len(rows)}"
        folder.mkdir()
        half = len(rows) // 2
        parts = {"data-0.arrow": table.slice(0, half), "data-1.arrow": table.slice(half)}
        for name, part in parts.items():
            with (
                arrow.OSFile(str(folder / name), "wb") as sink,
                arrow.ipc.new_stream(sink, table.schema) as writer,
            ):
                writer.write_table(part)
        names = [{"filename": name} for name in parts]
        (folder / "state.json").write_text(json.dumps({"_data_files": names}))
        for path in (tmp_path / "a.parquet", folder):
            examples = data.read_examples(path)
            if want is not None:
                assert examples == want
            else:
                assert [(e.text, e.harmful) for e in examples] == [
                    ("Break it.", True),
                    ("Mend it.", False),
                ]


def _columns(arrow, rows):
    kinds = {bool: arrow.bool_(), str: arrow.string()}
    return {name: kinds[type(value)] for row in rows for name, value in row.items()}


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.csv", "prompt,harmful\nx,maybe\n", "row 1.harmful: expected true or false"),
        ("a.csv", "question\nx\n", "row 1.prompt: expected a text"),
        ("a.csv", "prompt\n", "expected at least one example"),
        ("a.parquet", "no parquet", "expected a Parquet file"),
        ("d/state.json", "{}", "state.json: expected a saved dataset"),
        ("d/state.json", "{", "state.json"),
        ("d/dataset_dict.json", "{}", "the folder of one of its splits"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, reason):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    with pytest.raises(DataError, match=reason):
        data.read_examples(path if path.parent == tmp_path else path.parent)


def test_a_file_that_is_not_there(tmp_path):
    for name in ("a.csv", "a.parquet", "a.jsonl"):
        with pytest.raises(FileNotFoundError):
            data.read_examples(tmp_path / name)


def test_folds_keep_pairs_together_and_do_not_depend_on_the_order():
    examples = [Example(f"t{i}", bool(i % 2), pair=f"p{i // 2}") for i in range(100)]
    fold = data.folds(examples, 5, seed=0)
    assert fold[::2] == fold[1::2]
    assert set(fold) == set(range(5))
    assert data.folds(examples[::-1], 5, seed=0) == fold[::-1]


def test_folds_hold_out_a_group_whole():
    """A question about many pictures is used either for training or for measuring."""
    asked = [("q", "a"), ("q", "b"), ("r", "a"), ("r", "c")]
    examples = [
        Example(text, True, pair=f"{picture}{i}", group=text)
        for i in range(10)
        for text, picture in asked
    ]
    fold = data.folds(examples, 5, seed=0)
    assert len({f for f, e in zip(fold, examples, strict=True) if e.text == "q"}) == 1
    assert len({f for f, e in zip(fold, examples, strict=True) if e.text == "r"}) == 1


def test_images_in_folders_are_examples(tmp_path):
    with pytest.raises(DataError, match="harmful and harmless"):
        data.read_images(tmp_path)
    for name in ("harmful/b.png", "harmful/a.JPG", "harmless/c.png", "harmless/notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    examples = data.read_images(tmp_path)
    assert [(e.images[0].name, e.harmful) for e in examples] == [
        ("a.JPG", True),
        ("b.png", True),
        ("c.png", False),
    ]
    assert {e.kind for e in examples} == {"image"}
    assert all(e.text for e in examples)
