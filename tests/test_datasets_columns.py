"""Labels and fields: found in the file, or said by the user; never by default."""

from __future__ import annotations

import json

import pytest

import helpers
from steerbridge import read_examples
from steerbridge.datasets.options import Prompts
from steerbridge.errors import DataError


def write(path, text):
    path.write_text(text if isinstance(text, str) else json.dumps(text), "utf-8")
    return path


def labels(path, **said):
    return [(e.text, e.harmful) for e in read_examples(path, **said)]


@pytest.mark.parametrize("word", ["true", "True", "TRUE", "1", "1.0", "yes", " Yes "])
def test_words_of_a_label(tmp_path, word):
    path = write(tmp_path / "a.csv", f"Prompt,Harmful\nOne,{word}\nTwo,no\n")
    assert labels(path) == [("One", True), ("Two", False)]


def test_labels_in_json_may_be_numbers_but_nothing_else(tmp_path):
    rows = [{"prompt": "One", "harmful": 1}, {"prompt": "Two", "harmful": 0.0}]
    assert labels(write(tmp_path / "a.json", rows)) == [("One", True), ("Two", False)]
    for value in (2, "unsafe", None, [], {}, "maybe"):
        path = write(
            tmp_path / "a.json",
            [{"prompt": "One", "harmful": True}, {"prompt": "Two", "harmful": value}],
        )
        with pytest.raises(DataError, match=r"row 2\.harmful: expected true or false"):
            read_examples(path)


def test_without_a_label_the_columns_are_named_and_what_to_say(tmp_path):
    path = write(tmp_path / "a.csv", "id,prompt,verdict\n1,One,unsafe\n2,Two,safe\n")
    with pytest.raises(DataError, match=r"--map harmful=COLUMN:VALUE, found id, prompt, verdict"):
        read_examples(path)
    with pytest.raises(DataError, match=r"a column prompt, or --map prompt=COLUMN, found id, text"):
        read_examples(write(tmp_path / "b.csv", "id,text\n1,One\n"))
    assert labels(path, label=False) == [("One", False), ("Two", False)]
    want = [("One", True), ("Two", False)]
    assert labels(path, columns={"harmful": "verdict:unsafe"}) == want
    assert labels(path, columns={"harmless": "verdict:safe"}) == want
    assert labels(path, columns={"harmful": "verdict:Unsafe", "harmless": "verdict:safe"}) == want


def test_an_empty_label_is_an_error(tmp_path):
    path = write(tmp_path / "a.csv", "prompt,harmful\nOne,yes\nTwo,\n")
    with pytest.raises(DataError, match=r"line 3\.harmful: expected true or false"):
        read_examples(path)
    path = write(tmp_path / "b.csv", "prompt,verdict\nOne,unsafe\nTwo,\n")
    with pytest.raises(DataError, match=r"line 3\.verdict: expected a label, found none"):
        read_examples(path, columns={"harmful": "verdict:unsafe"})


def test_a_third_value_is_on_no_side_by_chance(tmp_path):
    path = write(tmp_path / "a.csv", "prompt,verdict\nOne,unsafe\nTwo,safe\nThree,unsure\n")
    with pytest.raises(DataError, match=r"every value of verdict on one side .* also safe, unsure"):
        read_examples(path, columns={"harmful": "verdict:unsafe"})
    said = {"harmful": "verdict:unsafe,unsure", "harmless": "verdict:safe"}
    assert labels(path, columns=said) == [("One", True), ("Two", False), ("Three", True)]
    said = {"harmful": "verdict:unsafe", "harmless": "verdict:safe"}
    with pytest.raises(DataError, match="also unsure"):
        read_examples(path, columns=said)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (
            {"columns": {"prompt": "goal"}},
            "--map prompt: expected one of the columns prompt, verdict",
        ),
        ({"columns": {"prompt": "prompt:x"}}, "only harmful and harmless have values"),
        ({"columns": {"colour": "prompt"}}, "--map colour: expected one of prompt, harmful"),
        ({"columns": {"harmful": "verdict:bad"}}, "values of the column verdict: safe, unsafe"),
        ({"columns": {"harmful": "verdict:safe", "harmless": "verdict:safe"}}, "each value on one"),
        (
            {"columns": {"harmful": "verdict:safe", "harmless": "prompt:One"}},
            "values of one column",
        ),
        ({"columns": {"harmful": "verdict"}, "label": True}, "a column verdict as well"),
        ({"columns": {"harmful": "verdict"}}, r"line 2\.verdict: expected true or false"),
    ],
)
def test_what_was_said_must_fit_the_file(tmp_path, said, reason):
    path = write(tmp_path / "a.csv", "prompt,verdict\nOne,unsafe\nTwo,safe\n")
    with pytest.raises(DataError, match=reason):
        read_examples(path, **said)


def test_names_may_be_numbers(tmp_path):
    rows = [{"prompt": "One", "harmful": False, "kind": 3, "group": 7, "pair": 0}]
    (example,) = read_examples(write(tmp_path / "a.json", rows))
    assert (example.kind, example.group, example.pair) == ("3", "7", "0")
    rows[0]["kind"] = 3.5
    with pytest.raises(DataError, match=r"row 1\.kind: expected a text, found 3\.5"):
        read_examples(write(tmp_path / "a.json", rows))


def test_pairs_of_two_files_of_one_name_do_not_collide(tmp_path):
    for folder, word in (("a", "Break"), ("b", "Burn")):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "p.jsonl", {"harmful": f"{word} it.", "harmless": "Mend it."})
    first, second = (read_examples(tmp_path / folder / "p.jsonl") for folder in "ab")
    assert first[0].pair == first[1].pair != second[0].pair == second[1].pair
    assert [e.source for e in first] == ["p.jsonl line 1"] * 2
    (tmp_path / "c").mkdir()
    copy = write(tmp_path / "c" / "q.jsonl", {"harmful": "Break it.", "harmless": "Mend it."})
    assert read_examples(copy) == first


def test_pairs_in_columns_of_other_names(tmp_path):
    path = write(tmp_path / "a.csv", "bad,good,system\nBreak it.,Mend it.,Be kind.\n")
    said = {"harmful": "bad", "harmless": "good"}
    assert labels(path, columns=said) == [("Break it.", True), ("Mend it.", False)]
    assert {e.system for e in read_examples(path, columns=said)} == {"Be kind."}
    with pytest.raises(DataError, match="pairs have both"):
        read_examples(path, columns=said, label=True)


def test_images_of_a_table(tmp_path):
    for name in ("x.png", "y.png", "z;w.png"):
        (tmp_path / name).touch()
    path = write(
        tmp_path / "a.csv", "prompt,images,harmful\nWhat?,x.png;y.png,no\nAnd?,z;w.png,no\n"
    )
    assert [[p.name for p in e.images] for e in read_examples(path)] == [
        ["x.png", "y.png"],
        ["z;w.png"],
    ]
    path = write(tmp_path / "b.csv", "prompt,image,harmful\nWhat?,v.png,no\n")
    with pytest.raises(DataError, match=r"line 2\.image: expected an image file"):
        read_examples(path)
    path = write(tmp_path / "c.json", [{"prompt": "a", "harmful": False, "images": 3}])
    with pytest.raises(DataError, match=r"row 1\.images: expected paths, found 3"):
        read_examples(path)


# ---------------------------------------------------------------- the options of the commands


def test_what_is_said_of_one_file_or_of_all(tmp_path, capsys):
    bad = write(tmp_path / "bad.csv", "goal\nOne\n")
    good = write(tmp_path / "good.csv", "prompt\nTwo\n")
    prompts = Prompts([bad, good], ["harmless", "bad.csv=harmful"], ["bad.csv=prompt=goal"]).read(
        "to test"
    )
    assert [(e.text, e.harmful) for e in prompts] == [("One", True), ("Two", False)]
    told = capsys.readouterr().err
    assert f"{bad}: 1 prompts, read as prompts, harmful as said" in told


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"labels": ["bad"]}, "--label: expected harmful or harmless"),
        ({"labels": ["b.csv=harmful"]}, "--label b.csv: expected a file of --data"),
        ({"maps": ["b.csv=prompt=goal"]}, "--map b.csv: expected a file of --data"),
        ({"maps": ["goal"]}, "--map: expected FIELD=COLUMN"),
        ({"maps": ["colour=goal"]}, "--map: expected FIELD=COLUMN"),
    ],
)
def test_options_that_would_do_nothing_are_refused(tmp_path, options, reason):
    path = write(tmp_path / "a.csv", "prompt,harmful\nOne,no\n")
    with pytest.raises(DataError, match=reason):
        Prompts([path], **options).read("to test")
    with pytest.raises(DataError, match="--data: expected the files"):
        Prompts([], ["harmful"]).read("to test")


@pytest.mark.parametrize("command", ["train", "calibrate", "eval"])
def test_no_command_opens_a_model_before_it_has_read_its_prompts(tmp_path, command):
    path = write(tmp_path / "a.csv", "prompt\nOne\n")
    package = helpers.package().save(tmp_path / "p.gguf")
    target = tmp_path / "out" if command == "train" else package
    done = helpers.run_cli(command, target, "--data", path, "--model", tmp_path / "none")
    assert done.returncode == 1
    assert "--label harmful" in done.stderr
    assert "opening" not in done.stderr
