"""Fingerprints of a base model, and the check of a package against the model in hand."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from steerbridge.errors import ModelMismatch, Problem
from steerbridge.spec import BaseModelInfo, SteeringSpec

CHECKED: Final = (
    "model_type",
    "hidden_size",
    "num_layers",
    "vocab_size",
    "tokenizer_sha256",
    "chat_template_sha256",
)


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a runtime knows about its language model; None where it cannot tell. `context_length` is
    in tokens, as the model was trained; it is not compared."""

    model_type: str | None
    hidden_size: int
    num_layers: int
    vocab_size: int | None
    name: str = ""
    architecture: str | None = None
    tokenizer_sha256: str | None = None
    chat_template_sha256: str | None = None
    context_length: int | None = None

    def info(self) -> BaseModelInfo:
        """The facts as the `base_model` of a spec."""
        if self.model_type is None or self.vocab_size is None:
            raise ValueError("a package needs the model type and the vocabulary size")
        known = {
            key: value
            for key in ("architecture", "tokenizer_sha256", "chat_template_sha256")
            if (value := getattr(self, key)) is not None
        }
        return BaseModelInfo(
            name=self.name,
            model_type=self.model_type,
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            vocab_size=self.vocab_size,
            **known,
        )


_BLANK: Final = "\u2581"


def tokenizer_sha256(tokens: Iterable[str]) -> str:
    """Hash of the vocabulary in id order, each token preceded by its length in UTF-8 bytes.

    The same for a Hugging Face tokenizer and for `tokenizer.ggml.tokens` of a GGUF file. The blank
    of SentencePiece counts as a space: converters write it so in tokens that a user defined
    (Gemma's runs of blanks), and not in others.
    """
    digest = hashlib.sha256()
    for token in tokens:
        raw = token.replace(_BLANK, " ").encode("utf-8", "surrogatepass")
        digest.update(len(raw).to_bytes(4, "little") + raw)
    return digest.hexdigest()


def tokenizer_facts(tokenizer: Any) -> dict[str, Any]:
    """Hashes of vocabulary and chat template of a Hugging Face tokenizer, as fields of
    `ModelFacts`; none for None."""
    if tokenizer is None:
        return {}
    by_id = sorted((id, token) for token, id in tokenizer.get_vocab().items())
    template = getattr(tokenizer, "chat_template", None)
    return {
        "tokenizer_sha256": tokenizer_sha256(token for _, token in by_id),
        "chat_template_sha256": text_sha256(template) if isinstance(template, str) else None,
    }


_BLOCK: Final = 4096  # bytes


def weights_sha256(
    sizes: Mapping[str, int], read: Callable[[str, int, int], bytes], blocks: int
) -> str:
    """Hash of samples of a model's weights as they are stored: another checkpoint of the same
    shape, or the same one quantised otherwise, has another. A few changed values may be missed.

    Args:
        sizes: bytes of every part, by name: tensors, or one file.
        read: the bytes of a part from an offset on, so many or what there is.
        blocks: how many are read of each part, evenly spaced.
    """
    digest = hashlib.sha256()
    for name, size in sorted(sizes.items()):
        digest.update(f"{name}\0{size}\0".encode())
        last = max(0, size - _BLOCK)
        for at in sorted({last * i // max(1, blocks - 1) for i in range(blocks)}):
            digest.update(read(name, at, min(_BLOCK, size)))
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """The same of a file that holds all weights."""
    return files_sha256([path])


def files_sha256(paths: Sequence[Path]) -> str:
    """The same of files that hold all weights together, in this order, whatever their names."""
    names = ["", *map(str, range(1, len(paths)))]
    files = dict(zip(names, paths, strict=True))

    def read(name: str, at: int, count: int) -> bytes:
        with files[name].open("rb") as file:
            file.seek(at)
            return file.read(count)

    sizes = {name: path.stat().st_size for name, path in files.items()}
    return weights_sha256(sizes, read, blocks=1024)


def text_sha256(text: str) -> str:
    """Hash of a chat template, byte for byte."""
    return hashlib.sha256(text.encode()).hexdigest()


def check_said(
    spec: SteeringSpec, text_of: Callable[[list[int]], str], ignore: Collection[str] = ()
) -> None:
    """Compare the texts of forced answers with what a tokenizer makes of their ids.

    Args:
        text_of: the text of token ids, without special ones.
        ignore: nothing is compared if `tokenizer_sha256` is in it.

    Raises:
        ModelMismatch: lists every one that differs.
    """
    if "tokenizer_sha256" in ignore:
        return
    found = {
        say.id: (say.text, text_of(list(say.tokens)))
        for say in spec.interventions
        if say.type == "say"
    }
    problems = [
        Problem(f"intervention {id}", repr(want), repr(got))
        for id, (want, got) in found.items()
        if want.strip() != got.strip()
    ]
    if problems:
        raise ModelMismatch(problems)


def check_template(expected: str | None, text: str | None) -> None:
    """Compare a chat template that was given on a command line with that of a package.

    Args:
        expected: the package's hash; None: any template will do.
        text: None: none was given.

    Raises:
        ModelMismatch: it is another.
    """
    if expected is None or text is None:
        return
    # A file may end in a line feed that the model's own text does not have.
    if expected not in map(text_sha256, (text, text.removesuffix("\n"))):
        found = f"another, given on the command line: {text[:60]!r}"
        raise ModelMismatch([Problem("chat_template_sha256", repr(expected), found)])


def check(want: BaseModelInfo, got: ModelFacts, ignore: Collection[str] = ()) -> tuple[str, ...]:
    """Compare a package's base model with the model in hand.

    Fields that one side does not know cannot disagree; their names are returned so that the
    caller can say what was not checked. `ignore` names fields to leave out on purpose.

    Raises:
        ModelMismatch: lists every field that differs.
        ValueError: `ignore` names an unknown field.
    """
    if unknown := set(ignore) - set(CHECKED):
        raise ValueError(f"cannot ignore {sorted(unknown)}; fields are {CHECKED}")
    unchecked: list[str] = []
    problems: list[Problem] = []
    for field in CHECKED:
        if field in ignore:
            continue
        expected, actual = getattr(want, field), getattr(got, field)
        if expected is None or actual is None:
            unchecked.append(field)
        elif expected != actual:
            problems.append(Problem(field, repr(expected), repr(actual)))
    if problems:
        raise ModelMismatch(problems)
    return tuple(unchecked)
