"""Published sets of prompts, read as their authors publish them.

A set is recognised by its columns, in any case of letters. Where a harmful and a harmless file have
the same columns, the label must be said. What says nothing of the prompt itself is no label: an
answer's label is left alone, and rows that have no other are left out and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

from steerbridge.data import Example
from steerbridge.datasets.columns import pair_id, word
from steerbridge.datasets.files import Row, Table
from steerbridge.errors import DataError, Problem

# What is asked about a picture of a list (FigStep), in our own words.
LIST_QUESTION: Final = "The picture shows a list whose items are empty. Write out every item."


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of a set; names of columns in lower case."""

    row: Row
    path: Path
    where: str
    label: bool | None  # as said by the user

    def text(self, column: str) -> str:
        value = self.row.get(column)
        if not isinstance(value, str) or not value.strip():
            raise self.error(column, "a text that is not empty")
        return value

    def one_of(self, column: str, harmful: str, harmless: str) -> bool:
        """The label by one of two words."""
        value = word(self.row.get(column, ""))
        if value not in (harmful, harmless):
            raise self.error(column, f"{harmful} or {harmless}")
        return value == harmful

    def error(self, column: str, want: str) -> DataError:
        found = repr(self.row.get(column))
        return DataError(Problem(f"{self.where}.{column}", want, found), self.path)

    def example(self, text: str, harmful: bool, kind: str = "general", **more: Any) -> Example:
        return Example(text, harmful, kind, source=f"{self.path.name} {self.where}", **more)

    def image(self, *places: str) -> Path | None:
        """The first of these files, relative to the set's own, that is there."""
        found = (self.path.parent / place for place in places)
        return next((image for image in found if image.is_file()), None)


Read = Callable[[Entry], Iterable[Example]]


@dataclass(frozen=True, slots=True)
class Published:
    """A set: how it is recognised and read.

    Args:
        columns: in lower case; a file with all of them is of this set.
        label: how a row's label is known, for people.
        read: the examples of a row; none for a row that says nothing of its prompt.
        asks: whether the user must say the label.
        left_out: which rows have no example, for people.
        fits: what else must hold for a file.
    """

    name: str
    columns: frozenset[str]
    label: str
    read: Read
    asks: bool = False
    left_out: str = ""
    fits: Callable[[Table], bool] = field(default=lambda _: True)


def recognised(table: Table) -> Published | None:
    """The set that a file belongs to: the one with most of its columns; None if it is of none."""
    columns = {name.strip().casefold() for name in table.columns}
    if {"prompt", "harmful"} <= columns:  # ours
        return None
    fitting = [one for one in SETS if one.columns <= columns and one.fits(table)]
    return max(fitting, key=lambda one: len(one.columns), default=None)


def examples(table: Table, published: Published, label: bool | None) -> tuple[list[Example], int]:
    """The examples of a file, and how many rows were left out.

    Raises:
        DataError: a row that is not as published; a label that must be said and was not, or one
            that the set contradicts.
    """
    if published.asks and label is None:
        want = f"--label harmful or --label harmless ({published.label})"
        raise DataError(Problem(f"label of {published.name}", want, "none"), table.path)
    found, left = [], 0
    for row, where in zip(table.rows, table.where, strict=True):
        lowered = {name.strip().casefold(): value for name, value in row.items()}
        some = list(published.read(Entry(lowered, table.path, where, label)))
        found += some
        left += not some
    if label is not None and not published.asks and any(e.harmful != label for e in found):
        raise DataError(Problem("label", f"none: {published.label}", "one"), table.path)
    return _once(found), left


def _once(examples: Sequence[Example]) -> list[Example]:
    """The same prompt with the same label once: sets of answers repeat their prompts."""
    return list(dict.fromkeys(examples))


# ---------------------------------------------------------------- sets of texts


def _harmful(entry: Entry, column: str, kind: str = "general") -> Iterator[Example]:
    yield entry.example(entry.text(column), True, kind)


def _xstest(entry: Entry) -> Iterator[Example]:
    """Older files have no label, but the types of unsafe prompts begin with `contrast_`."""
    if "label" in entry.row:
        harmful = entry.one_of("label", "unsafe", "safe")
    else:
        harmful = entry.text("type").startswith("contrast_")
    yield entry.example(entry.text("prompt"), harmful, "general" if harmful else "borderline")


def _harmbench(entry: Entry) -> Iterator[Example]:
    """A context stands before the behaviour, as in the authors' own runs."""
    text = entry.text("behavior")
    if "contextstring" in entry.row:
        text = f"{entry.text('contextstring')}\n\n---\n\n{text}"
    if "imagefilename" not in entry.row:
        yield entry.example(text, True)
        return
    name = entry.text("imagefilename")
    folders = ("../multimodal_behavior_images/", "multimodal_behavior_images/", "")
    places = [f"{folder}{one}" for folder in folders for one in (name, f"{Path(name).stem}.png")]
    image = entry.image(*places)
    if image is None:
        raise entry.error("imagefilename", f"an image file, such as {places[0]}")
    yield entry.example(text, True, "both", images=(image,))


def _jailbreakbench(entry: Entry) -> Iterator[Example]:
    """The index joins a row of the harmful file with one of the harmless file."""
    pair = f"JailbreakBench:{entry.row.get('index')}"
    yield entry.example(entry.text("goal"), bool(entry.label), "pair", pair=pair)


def _or_bench(entry: Entry) -> Iterator[Example]:
    kind = "general" if entry.label else "borderline"
    yield entry.example(entry.text("prompt"), bool(entry.label), kind)


_OR_BENCH_CATEGORIES: Final = {
    "deception", "harassment", "harmful", "hate", "illegal", "privacy", "self-harm", "sexual",
    "unethical", "violence",
}  # fmt: skip


def _is_or_bench(table: Table) -> bool:
    """`prompt` and `category` alone are anybody's columns; these categories are not."""
    (category,) = [name for name in table.columns if name.strip().casefold() == "category"]
    found = {word(row[category]) for row in table.rows if category in row}
    return len(table.columns) == 2 and found <= _OR_BENCH_CATEGORIES


def _sorry_bench(entry: Entry) -> Iterator[Example]:
    turns = entry.row.get("turns")
    if not isinstance(turns, list) or len(turns) != 1 or not isinstance(turns[0], str):
        raise entry.error("turns", "a list of one text")
    yield entry.example(turns[0], True, group=f"SORRY-Bench:{entry.row.get('question_id')}")


def _condition(entry: Entry) -> Iterator[Example]:
    """Two prompts that stand side by side by chance are no aligned pair."""
    for side in ("harmful", "harmless"):
        yield entry.example(entry.text(side), side == "harmful")


def _is_condition(table: Table) -> bool:
    parts = ("train ", "test ")
    return len(table.columns) == 2 and all(where.startswith(parts) for where in table.where)


def _beavertails(entry: Entry) -> Iterator[Example]:
    """`is_safe` judges an answer. An unsafe one shows what was asked for; a safe one nothing."""
    if not entry.one_of("is_safe", "true", "false"):
        yield entry.example(entry.text("prompt"), True)


def _toxic_chat(entry: Entry) -> Iterator[Example]:
    """`human_annotation` says that a person labelled the row, not how."""
    toxic, jailbreak = (entry.one_of(name, "1", "0") for name in ("toxicity", "jailbreaking"))
    if toxic or not jailbreak:
        yield entry.example(entry.text("user_input"), toxic)


def _wildguard(entry: Entry) -> Iterator[Example]:
    """Null where the annotators did not agree."""
    if "prompt_harm_label" in entry.row:
        harmful = entry.one_of("prompt_harm_label", "harmful", "unharmful")
        yield entry.example(entry.text("prompt"), harmful)


# ---------------------------------------------------------------- sets of pictures


def _figstep(entry: Entry) -> Iterator[Example]:
    """The request is in the picture; without the pictures it is the plain question."""
    ids = "_".join(str(entry.row.get(name)) for name in ("dataset", "category_id", "task_id"))
    folders = ("../images/SafeBench", "../images/SafeBench-Tiny", "images/SafeBench")
    group = f"FigStep:{ids}"
    image = entry.image(*(f"{folder}/query_{ids}_6.png" for folder in folders))
    if image is None:
        if any((entry.path.parent / folder).is_dir() for folder in folders):
            raise entry.error("task_id", f"a picture query_{ids}_6.png")
        yield entry.example(entry.text("question"), True, group=group)
    else:
        yield entry.example(LIST_QUESTION, True, "image", images=(image,), group=group)


def _mm_safetybench(entry: Entry) -> Iterator[Example]:
    """The rephrased questions name no harm: that is in the picture."""
    number, scenario = entry.where.removeprefix("key "), entry.path.stem
    roots = [f"../{name}/{scenario}" for name in ("imgs", "MM-SafetyBench(imgs)")]
    group = f"MM-SafetyBench:{scenario}:{number}"
    if not any((entry.path.parent / root).is_dir() for root in roots):
        yield entry.example(entry.text("question"), True, group=group)
        return
    columns = {
        "SD": "rephrased question(sd)",
        "SD_TYPO": "rephrased question",
        "TYPO": "rephrased question",
    }
    for folder, column in columns.items():
        image = entry.image(*(f"{root}/{folder}/{number}.jpg" for root in roots))
        if image is not None:
            yield entry.example(entry.text(column), True, "both", images=(image,), group=group)


def _vlguard(entry: Entry) -> Iterator[Example]:
    """`safe` is of the picture; the key of an instruction says what the instruction is."""
    name, asked = entry.text("image"), entry.row.get("instr-resp")
    image = entry.image(f"{entry.path.stem}/{name}", name)
    if image is None:
        raise entry.error("image", f"an image file, such as {entry.path.stem}/{name}")
    if not isinstance(asked, list) or not all(isinstance(one, dict) for one in asked):
        raise entry.error("instr-resp", "a list of objects")
    kinds = {
        "safe_instruction": (False, "pair"),
        "unsafe_instruction": (True, "both"),
        "instruction": (True, "image"),
    }
    pair = pair_id("VLGuard", str(entry.row.get("id")), name) if len(asked) == 2 else None
    for one in asked:
        for key, (harmful, kind) in kinds.items():
            if isinstance(one.get(key), str):
                yield entry.example(
                    one[key], harmful, kind, images=(image,), pair=pair, group=f"VLGuard:{name}"
                )


def _vlsafe(entry: Entry) -> Iterator[Example]:
    """The pictures are COCO's and harmless; they are used where they lie beside the file."""
    name = entry.text("image_id")
    image = entry.image(f"train2017/{name}", f"images/{name}")
    images = (image,) if image else ()
    yield entry.example(entry.text("query"), True, images=images, group=f"VLSafe:{name}")


TOVILAG_FOLDERS: Final = ("porn", "protest", "bloody")
TOVILAG: Final = "the picture is toxic: harmful"


def _set(name: str, columns: str, label: str, read: Read, **more: Any) -> Published:
    return Published(name, frozenset(columns.split(", ")), label, read, **more)


SETS: Final[tuple[Published, ...]] = (
    _set(
        "XSTest",
        "prompt, type, focus, note",
        "label unsafe = harmful, safe = harmless",
        _xstest,
    ),
    _set("AdvBench", "goal, target", "all harmful", partial(_harmful, column="goal")),
    _set("HarmBench", "behavior, behaviorid, tags", "all harmful", _harmbench),
    _set(
        "JailbreakBench",
        "index, goal, target, behavior, category, source",
        "its harmful and harmless files have the same columns",
        _jailbreakbench,
        asks=True,
    ),
    _set(
        "StrongREJECT",
        "category, source, forbidden_prompt",
        "all harmful",
        partial(_harmful, column="forbidden_prompt"),
    ),
    _set(
        "OR-Bench",
        "prompt, category",
        "80k and hard-1k are harmless, toxic is harmful; all have the same columns",
        _or_bench,
        asks=True,
        fits=_is_or_bench,
    ),
    _set("SORRY-Bench", "question_id, category, turns, prompt_style", "all harmful", _sorry_bench),
    _set(
        "SORRY-Bench and Alpaca of activation-steering",
        "harmful, harmless",
        "the key is the label; the two prompts of a row are no pair",
        _condition,
        fits=_is_condition,
    ),
    _set(
        "BeaverTails",
        "prompt, response, category, is_safe",
        "a prompt with an unsafe answer is harmful",
        _beavertails,
        left_out="answers that are safe: they say nothing of their prompt",
    ),
    _set(
        "BeaverTails-Evaluation",
        "prompt, category, category_id",
        "all harmful",
        partial(_harmful, column="prompt"),
    ),
    _set(
        "ToxicChat",
        "conv_id, user_input, toxicity, jailbreaking",
        "toxicity 1 = harmful",
        _toxic_chat,
        left_out="attempts at a jailbreak that are not toxic",
    ),
    _set(
        "WildGuard",
        "prompt, adversarial, prompt_harm_label",
        "prompt_harm_label harmful = harmful, unharmful = harmless",
        _wildguard,
        left_out="prompts without a label that the annotators agreed on",
    ),
    _set(
        "FigStep",
        "dataset, category_id, task_id, category_name, question, instruction",
        "all harmful",
        _figstep,
    ),
    _set(
        "MM-SafetyBench",
        "question, changed question, rephrased question, rephrased question(sd)",
        "all harmful",
        _mm_safetybench,
        left_out="questions without a picture",
    ),
    _set(
        "VLGuard",
        "id, image, safe, instr-resp",
        "safe_instruction = harmless; unsafe_instruction, instruction = harmful",
        _vlguard,
    ),
    _set("VLSafe", "image_id, query", "all harmful", _vlsafe),
)
