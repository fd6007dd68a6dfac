"""Prompts read from files of every type, and what is wrong in a file told by its place."""

from __future__ import annotations

import bz2
import contextlib
import csv
import gzip
import json
import lzma

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from steerbridge import read_examples
from steerbridge.data import Example
from steerbridge.datasets import reading
from steerbridge.errors import DataError

WANTED = [
    Example("How do bees make honey?", False, "general"),
    Example("Say how to pick this lock.", True, "locks", None, group="g"),
]
ROWS = [
    {"prompt": WANTED[0].text, "harmful": False},
    {"prompt": WANTED[1].text, "harmful": True, "kind": "locks", "group": "g"},
]
PAIRS = [{"harmful": "Break it.", "harmless": "Mend it."}]
TABLE = f"prompt,harmful,kind,group\n{WANTED[0].text},False,,\n{WANTED[1].text},Yes,locks,g\n"
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
ARRAY = json.dumps(ROWS)


def test_a_file_is_what_its_bytes_say(tmp_path):
    for i, text in enumerate(
        (TABLE, TABLE.replace(",", "\t"), TABLE.replace(",", ";"), LINES, ARRAY)
    ):
        for name in ("a.csv", "A.CSV", "a.json", "a.data", "a"):
            path = tmp_path / f"{i}{name}"
            path.write_text(text, "utf-8")
            assert read_examples(path) == WANTED


@pytest.mark.parametrize("text", [TABLE, LINES, ARRAY, json.dumps(ROWS, indent=1)])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_says_the_encoding(tmp_path, text, encoding):
    path = tmp_path / "a.jsonl"
    path.write_bytes(text.encode(encoding))
    assert read_examples(path) == WANTED


def test_an_encoding_that_no_mark_says_is_said_by_the_user(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes("prompt,harmful\nOne,no\nWho\u2019s this?,no\n".encode("cp1252"))
    with pytest.raises(DataError, match=r"a\.csv: file: expected text in utf-8 .*0x92 in line 3"):
        read_examples(path)
    assert [e.text for e in read_examples(path, encoding="cp1252")] == ["One", "Who\u2019s this?"]
    with pytest.raises(DataError, match="encoding: expected one that Python knows"):
        read_examples(path, encoding="klingon")
    path.write_bytes(TABLE.encode("utf-16-le"))
    with pytest.raises(DataError, match="say --encoding utf-16-le"):
        read_examples(path)
    assert read_examples(path, encoding="utf-16-le") == WANTED


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_files(tmp_path, pack):
    path = tmp_path / "a.jsonl.xyz"
    for text in (TABLE, LINES):
        whole = pack(text.encode())
        path.write_bytes(whole)
        assert read_examples(path) == WANTED
        path.write_bytes(whole[:-9])
        with pytest.raises(DataError, match="expected a whole compressed file"):
            read_examples(path)


def test_parts_of_a_json_file(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"train": ROWS, "dev": ROWS[:1]}))
    with pytest.raises(DataError, match=r"one of its parts: a\.json#train, a\.json#dev"):
        read_examples(path)
    assert read_examples(tmp_path / "a.json#train") == WANTED
    assert read_examples(f"{path}#dev") == WANTED[:1]
    path.write_text(json.dumps({"0": ROWS[0], "1": ROWS[1]}))
    assert read_examples(path) == WANTED
    path.write_text(json.dumps(ROWS[1], indent=1))
    assert read_examples(path) == WANTED[1:]


def test_lines_of_a_text_file_take_a_label_that_is_said(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("One, two.\n\n{Three}\n")
    assert [e.text for e in read_examples(path, label=False)] == ["One, two.", "{Three}"]


def test_long_cells_quotes_and_lines_within_a_cell(tmp_path):
    path = tmp_path / "a.csv"
    long = "word " * 50_000
    path.write_text(f'prompt,harmful\n"{long}",no\n"He said ""so"",\nand left.",no\n', "utf-8")
    assert [e.text for e in read_examples(path)] == [long, 'He said "so",\nand left.']


def test_a_first_column_that_counts_rows(tmp_path):
    """As pandas writes it."""
    path = tmp_path / "a.csv"
    path.write_text(",prompt,harmful\n0,One,no\n1,Two,no\n")
    assert [e.text for e in read_examples(path)] == ["One", "Two"]


def test_a_line_separator_of_unicode_ends_no_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a\u2028b\u0085c", "harmful": false}\n', "utf-8")
    assert [e.text for e in read_examples(path)] == ["a\u2028b\u0085c"]


def test_parquet_and_saved_datasets(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    for rows, want in ((ROWS, WANTED), (PAIRS, None)):
        table = arrow.Table.from_pylist(rows, arrow.schema(_columns(arrow, rows)))
        parquet.write_table(table, tmp_path / "a.bin")
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
        for path in (tmp_path / "a.bin", folder):
            examples = read_examples(path)
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
        ("a.csv", "prompt,harmful\nOne, two,no\n", "line 2: expected 2 cells, .* found 3"),
        ("a.csv", "prompt,harmful\nOne\n", "line 2: expected 2 cells, .* found 1"),
        ("a.csv", 'prompt,harmful\nOne,no\n"Two,no\nThree,no\n', "line 3: expected closed quotes"),
        ("a.csv", 'prompt,harmful\n"Two" he said,no\n', "line 2: expected closed quotes"),
        ("a.csv", "prompt,,harmful\nOne,x,no\n", "header: expected a name for every column"),
        ("a.csv", ",prompt,harmful\nx,One,no\n", "header: expected a name for every column"),
        ("a.csv", " , \nOne,no\n", "header: expected a name for every column"),
        ("a.csv", "prompt,harmful,prompt\nOne,no,x\n", "header: expected every name once"),
        ("a.csv", "prompt\n", "expected at least one example"),
        ("a.csv", "", "expected at least one example"),
        ("a.csv", "prompt,harmful\nOne,no\nTw\0o,no\n", "NUL in line 3"),
        ("a.jsonl", '{"prompt": "a", "harmful": true}\n{"prompt"\n', "line 2: expected JSON"),
        ("a.jsonl", '{"prompt": "a", "harmful": true}\n["b"]\n', "line 2: expected a JSON object"),
        ("a.json", '["b"]', "row 1: expected a JSON object, found str"),
        ("a.json", '[{"prompt": "a"}', "file: expected JSON"),
        ("a.parquet", "PAR1 no parquet", "expected a Parquet file"),
        ("a.feather", "ARROW1\0\0\x81\x82", "expected JSON, .*found a binary file"),
        ("a.xlsx", "PK\x03\x04....", r"a spreadsheet \(save it as CSV\)"),
        ("d/state.json", "{}", "state.json: expected a saved dataset"),
        ("d/state.json", "{", "state.json"),
        ("d/dataset_dict.json", "{}", "the folder of one of its splits"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, reason):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=reason):
        read_examples(path if path.parent == tmp_path else path.parent)


TEXTS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0\r"), min_size=1)


@given(
    st.lists(st.tuples(TEXTS.filter(str.strip), st.booleans()), min_size=1, max_size=5),
    st.sampled_from(",\t;"),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
def test_whatever_a_table_holds_is_read_back(tmp_path_factory, rows, delimiter, quoting):
    path = tmp_path_factory.mktemp("t") / "a.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter, quoting=quoting)
        writer.writerows([("prompt", "harmful"), *rows])
    assert [(e.text, e.harmful) for e in read_examples(path)] == rows


@given(st.one_of(st.binary(max_size=60), st.text("{[\"',]}\n:ptruefals0e1 \t;").map(str.encode)))
@example(b"[]")
@example(b"{}")
@example(b'{"a": []}')
@example(b'{"a": {}}')
def test_whatever_a_file_holds_an_error_is_typed(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("t") / "a"
    path.write_bytes(content)
    with contextlib.suppress(DataError):
        assert read_examples(path)


def test_a_file_that_is_not_there(tmp_path):
    for name in ("a.csv", "a.parquet", "a.jsonl", "a.json#train"):
        with pytest.raises(FileNotFoundError):
            read_examples(tmp_path / name)


def test_images_in_folders_are_examples(tmp_path):
    with pytest.raises(DataError, match="harmful and harmless, or --label"):
        read_examples(tmp_path)
    for name in ("harmful/b.png", "harmful/x/a.JPG", "harmless/c.png", "harmless/notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    examples = read_examples(tmp_path)
    assert [(e.images[0].name, e.harmful) for e in examples] == [
        ("b.png", True),
        ("a.JPG", True),
        ("c.png", False),
    ]
    assert {e.kind for e in examples} == {"image"}
    assert all(e.text for e in examples)
    (tmp_path / "other.png").touch()
    with pytest.raises(DataError, match=r"a label for every image, found none for other\.png"):
        read_examples(tmp_path)
    (tmp_path / "other.png").unlink()
    with pytest.raises(DataError, match="a folder harmful as well"):
        read_examples(tmp_path, label=False)
    said = reading.read(tmp_path / "harmless", reading.Said(label=False))
    assert {e.harmful for e in said.examples} == {False}
    assert "harmless as said" in str(said)
