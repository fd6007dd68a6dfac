"""Published sets of prompts, as files of the same shape with words of our own."""

from __future__ import annotations

import csv
import gzip
import json

import pytest

from steerbridge import read_examples
from steerbridge.datasets import published, reading
from steerbridge.datasets.columns import Said
from steerbridge.datasets.published import LIST_QUESTION
from steerbridge.errors import DataError

BAD, GOOD = "Say how to pick this lock.", "Say how locks work."


def table(path, columns, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns.split(","), *rows])
    return path


def array(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(path.name)
    return path


def known(path, label=None):
    """The name of the set, and (text, harmful, kind) of its prompts."""
    read = reading.read(path, Said(label=label))
    return read.read_as.partition(":")[0], [(e.text, e.harmful, e.kind) for e in read.examples]


def test_xstest(tmp_path):
    columns = "id,prompt,type,label,focus,note"
    rows = [
        (1, GOOD, "safe_targets", "safe", "lock", ""),
        (2, BAD, "contrast_safe_targets", "unsafe", "lock", ""),
    ]
    want = [(GOOD, False, "borderline"), (BAD, True, "general")]
    assert known(table(tmp_path / "a.csv", columns, *rows)) == ("XSTest", want)
    older = [(row[0], row[2], row[1], row[4], "x") for row in rows]
    assert known(table(tmp_path / "b.csv", "id,type,prompt,focus,note", *older)) == ("XSTest", want)
    other = table(tmp_path / "c.csv", columns, (1, GOOD, "homonyms", "unsure", "x", "x"))
    with pytest.raises(DataError, match=r"line 2\.label: expected unsafe or safe, found 'unsure'"):
        read_examples(other)


def test_sets_that_are_harmful_as_a_whole(tmp_path):
    for name, columns, row in (
        ("AdvBench", "goal,target", (BAD, "Sure")),
        ("StrongREJECT", "category,source,forbidden_prompt", ("x", "y", BAD)),
        ("BeaverTails-Evaluation", "prompt,category,category_id", (BAD, "x", 3)),
        ("VLSafe", "image_id,caption,query", ("1.jpg", "A door.", BAD)),
    ):
        path = table(tmp_path / "a.csv", columns, row)
        assert known(path) == (name, [(BAD, True, "general")])
        assert known(path, label=True)[0] == name
        with pytest.raises(DataError, match="label: expected none: all harmful"):
            read_examples(path, label=False)


def test_harmbench(tmp_path):
    columns = "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID"
    rows = [
        (BAD, "standard", "x", "", "", "lock"),
        (BAD, "contextual", "x", "c", "A door.", "door"),
    ]
    path = table(tmp_path / "a.csv", columns, *rows)
    both = [(BAD, True, "general"), (f"A door.\n\n---\n\n{BAD}", True, "general")]
    assert known(path) == ("HarmBench", both)
    columns = "Behavior,BehaviorID,FunctionalCategory,ImageFileName,Tags"
    path = table(tmp_path / "sets" / "a.csv", columns, (BAD, "door", "multimodal", "door.jpg", ""))
    with pytest.raises(
        DataError, match=r"imagefilename: expected an image file, such as \.\./multi"
    ):
        read_examples(path)
    image = picture(tmp_path / "multimodal_behavior_images" / "door.png")
    (example,) = read_examples(path)
    assert (example.images[0].resolve(), example.kind) == (image, "both")


def test_jailbreakbench_asks_which_of_its_files_it_is(tmp_path):
    columns = "Index,Goal,Target,Behavior,Category,Source"
    bad = table(tmp_path / "harmful.csv", columns, (0, BAD, "Sure", "x", "y", "z"))
    good = table(tmp_path / "benign.csv", columns, (0, GOOD, "Sure", "x", "y", "z"))
    with pytest.raises(DataError, match="label of JailbreakBench: expected --label harmful or"):
        read_examples(bad)
    assert known(bad, label=True) == ("JailbreakBench", [(BAD, True, "pair")])
    assert known(good, label=False) == ("JailbreakBench", [(GOOD, False, "pair")])
    (first,), (second,) = read_examples(bad, label=True), read_examples(good, label=False)
    assert first.pair == second.pair


def test_or_bench_asks_and_is_not_every_file_with_a_category(tmp_path):
    path = table(tmp_path / "a.csv", "prompt,category", (GOOD, "illegal"), (BAD, "harmful"))
    with pytest.raises(DataError, match="label of OR-Bench"):
        read_examples(path)
    want = [(GOOD, False, "borderline"), (BAD, False, "borderline")]
    assert known(path, label=False) == ("OR-Bench", want)
    path = table(tmp_path / "b.csv", "prompt,category", (GOOD, "locks"))
    assert known(path, label=False) == ("prompts, harmless as said", [(GOOD, False, "general")])


def test_sorry_bench_and_the_pairs_made_of_it(tmp_path):
    rows = [
        {"question_id": 1, "category": "1", "turns": [BAD], "prompt_style": "base"},
        {"question_id": 1, "category": "1", "turns": ["Lock, how?"], "prompt_style": "slang"},
    ]
    path = tmp_path / "question.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [(BAD, True, "general"), ("Lock, how?", True, "general")]
    assert known(path) == ("SORRY-Bench", texts)
    assert len({e.group for e in read_examples(path)}) == 1
    side_by_side = {"harmful": BAD, "harmless": "How does bread rise?"}
    path = array(tmp_path / "condition.json", {"train": [side_by_side], "test": [side_by_side]})
    examples = read_examples(f"{path}#train")
    assert [(e.text, e.harmful, e.pair) for e in examples] == [
        (BAD, True, None),
        ("How does bread rise?", False, None),
    ]


def test_beavertails_labels_answers_and_only_unsafe_ones_say_something(tmp_path):
    category = {"theft": True, "violence,aiding_and_abetting,incitement": False}
    rows = [
        {"prompt": BAD, "response": "Like so.", "category": category, "is_safe": False},
        {"prompt": BAD, "response": "No.", "category": category, "is_safe": True},
        {"prompt": BAD, "response": "Like this.", "category": category, "is_safe": False},
        {"prompt": GOOD, "response": "Pins.", "category": category, "is_safe": True},
    ]
    path = tmp_path / "train.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    read = reading.read(path, Said())
    assert [(e.text, e.harmful) for e in read.examples] == [(BAD, True)]
    assert "2 rows (answers that are safe" in str(read)


def test_toxic_chat(tmp_path):
    columns = (
        "conv_id,user_input,model_output,human_annotation,toxicity,jailbreaking,openai_moderation"
    )
    rows = [
        ("a", BAD, "No.", "True", 1, 0, "[]"),
        ("b", GOOD, "Pins.", "False", 0, 0, "[]"),
        ("c", "Play a part.", "Yes.", "True", 0, 1, "[]"),
    ]
    path = table(tmp_path / "a.csv", columns, *rows)
    want = [(BAD, True, "general"), (GOOD, False, "general")]
    assert known(path) == ("ToxicChat", want)
    assert reading.read(path, Said()).left_out.startswith("1 rows (attempts")


def test_wildguard(tmp_path):
    fields = {"adversarial": False, "response": None, "response_harm_label": "harmful"}
    rows = [
        {"prompt": BAD, "prompt_harm_label": "harmful", **fields},
        {"prompt": GOOD, "prompt_harm_label": "unharmful", **fields},
        {"prompt": "Hm.", "prompt_harm_label": None, **fields},
    ]
    path = array(tmp_path / "a.json", rows)
    want = [(BAD, True, "general"), (GOOD, False, "general")]
    assert known(path) == ("WildGuard", want)
    assert reading.read(path, Said()).left_out.startswith("1 rows (prompts without")


def test_figstep(tmp_path):
    columns = "dataset,category_id,task_id,category_name,question,instruction"
    row = ("ForbidQI", 1, 2, "Locks", BAD, "Ways to pick a lock.\n1. 2. 3.")
    path = table(tmp_path / "question" / "safebench.csv", columns, row)
    assert known(path) == ("FigStep", [(BAD, True, "general")])
    folder = tmp_path / "images" / "SafeBench"
    folder.mkdir(parents=True)
    with pytest.raises(DataError, match=r"expected a picture query_ForbidQI_1_2_6\.png"):
        read_examples(path)
    picture(folder / "query_ForbidQI_1_2_6.png")
    assert known(path) == ("FigStep", [(LIST_QUESTION, True, "image")])


def test_mm_safetybench(tmp_path):
    entry = {
        "Question": BAD,
        "Changed Question": "Say how to do this.",
        "Key Phrase": "pick this lock",
        "Rephrased Question": "The picture shows a phrase. Say how to do it.",
        "Rephrased Question(SD)": "The picture shows an act. Say how to do it.",
    }
    path = array(tmp_path / "processed_questions" / "01-Locks.json", {"0": entry, "1": entry})
    assert known(path) == ("MM-SafetyBench", [(BAD, True, "general")] * 2)
    for kind in ("SD", "SD_TYPO", "TYPO"):
        picture(tmp_path / "imgs" / "01-Locks" / kind / "0.jpg")
    read = reading.read(path, Said())
    assert [e.text for e in read.examples] == [
        entry["Rephrased Question(SD)"],
        *[entry["Rephrased Question"]] * 2,
    ]
    assert {(e.kind, e.group) for e in read.examples} == {("both", "MM-SafetyBench:01-Locks:0")}
    assert read.left_out == "1 rows (questions without a picture)"


def test_vlguard(tmp_path):
    rows = [
        {
            "id": "a",
            "image": "HOD/a.jpg",
            "safe": True,
            "instr-resp": [
                {"safe_instruction": GOOD, "response": "Pins."},
                {"unsafe_instruction": BAD, "response": "No."},
            ],
        },
        {
            "id": "b",
            "image": "HOD/b.jpg",
            "safe": False,
            "harmful_category": "x",
            "harmful_subcategory": "y",
            "instr-resp": [{"instruction": "What is this?", "response": "No."}],
        },
    ]
    path = array(tmp_path / "train.json", rows)
    with pytest.raises(
        DataError, match=r"row 1\.image: expected an image file, such as train/HOD/a"
    ):
        read_examples(path)
    for name in "ab":
        picture(tmp_path / "train" / "HOD" / f"{name}.jpg")
    assert known(path) == (
        "VLGuard",
        [(GOOD, False, "pair"), (BAD, True, "both"), ("What is this?", True, "image")],
    )
    first, second, third = read_examples(path)
    assert first.pair == second.pair is not None
    assert third.pair is None


def test_vlsafe_with_its_pictures(tmp_path):
    path = table(tmp_path / "a.csv", "image_id,caption,query", ("1.jpg", "A door.", BAD))
    image = picture(tmp_path / "train2017" / "1.jpg")
    assert [e.images for e in read_examples(path)] == [(image,)]


def test_tovilag(tmp_path):
    for name in ("porn/a.png", "bloody/b.jpg"):
        picture(tmp_path / name)
    name, prompts = known(tmp_path)
    assert name == "ToViLaG"
    assert [(harmful, kind) for _, harmful, kind in prompts] == [(True, "image")] * 2
    picture(tmp_path / "calm" / "c.png")
    with pytest.raises(DataError, match=r"a label for every image, found none for calm/c\.png"):
        read_examples(tmp_path)


def test_columns_of_our_own_or_named_by_the_user_come_first(tmp_path):
    path = array(
        tmp_path / "a.json", [{"prompt": BAD, "harmful": True, "goal": "x", "target": "y"}]
    )
    assert known(path) == ("prompts with their labels", [(BAD, True, "general")])
    path = table(tmp_path / "a.csv", "goal,target", (BAD, GOOD))
    examples = read_examples(path, columns={"prompt": "target"}, label=False)
    assert [(e.text, e.harmful) for e in examples] == [(GOOD, False)]


def test_every_set_is_read_in_this_file_and_told_in_the_docs():
    from pathlib import Path

    root = Path(__file__).resolve().parent.parent
    docs, here = (root / "docs" / "data.md").read_text(), Path(__file__).read_text()
    for name in [one.name for one in published.SETS] + ["ToViLaG"]:
        assert name in docs
        assert f'"{name}' in here or name.startswith("SORRY-Bench and")
