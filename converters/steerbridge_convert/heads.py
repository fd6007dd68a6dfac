"""Head matrices in a package, and their equivalents in other tools.

h <- h + eps W h before the output embedding E gives logits E h + eps E W h. A tool that stores
the change D = E' - E of the embedding itself is equivalent if D = eps E W. So W is the least
squares solution, and the part of D outside the column span of E is lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from gguf.quants import dequantize
from numpy.typing import NDArray
from safetensors import safe_open

from steerbridge.errors import MissingOption, NotRepresentable
from steerbridge.format import Answers, unreadable
from steerbridge.package import SteeringPackage
from steerbridge.spec import (
    BaseModelInfo,
    Condition,
    ConstantStrength,
    DenseMatrix,
    HeadMatrix,
    LowRankMatrix,
    Probe,
    Rule,
    SteeringSpec,
)
from steerbridge.tensors import Float32, Tensor
from steerbridge_convert import files, vectors

Float64 = NDArray[np.float64]
_ROWS: Final = 8192  # rows of the output embedding processed at once


@dataclass(frozen=True, slots=True)
class Head:
    """eps W, with W = matrix, or W = matrix v if `v` is not None."""

    eps: float
    matrix: Tensor
    v: Tensor | None = None


def package(
    name: str,
    base: BaseModelInfo,
    head: Head | None,
    probes: tuple[Probe, ...] = (),
    tensors: dict[str, Tensor] | None = None,
) -> SteeringPackage:
    """A package whose head acts if any of the probes fires, or on every prompt without probes."""
    tensors = dict(tensors or {})
    interventions: tuple[HeadMatrix, ...] = ()
    rules: tuple[Rule, ...] = ()
    if head is not None:
        weight: DenseMatrix | LowRankMatrix = DenseMatrix(form="dense", matrix="head.matrix")
        tensors["head.matrix"] = head.matrix
        if head.v is not None:
            weight = LowRankMatrix(form="low_rank", u="head.u", v="head.v")
            del tensors["head.matrix"]
            tensors |= {"head.u": head.matrix, "head.v": head.v}
        interventions = (
            HeadMatrix(
                id="head",
                type="head_matrix",
                position="from_prompt_end",
                eps=head.eps,
                weight=weight,
            ),
        )
        rules = (
            Rule(
                id="refuse",
                condition=Condition(type="any", probes=tuple(p.id for p in probes))
                if probes
                else None,
                interventions=("head",),
                strength=ConstantStrength(type="constant", value=1.0),
            ),
        )
    spec = SteeringSpec(
        spec_version="1.0",
        name=name,
        base_model=base,
        probes=probes,
        interventions=interventions,
        rules=rules,
    )
    return SteeringPackage(spec, tensors)


def only(package: SteeringPackage, format: str) -> tuple[Rule, Head]:
    """The only head matrix that a rule applies, its eps times the strength of the rule.

    Raises:
        NotRepresentable: there is none, or there are several.
    """
    acting = [
        (rule, head)
        for rule in package.spec.rules
        for id in rule.interventions
        if isinstance(head := package.spec.intervention(id), HeadMatrix)
    ]
    if len(acting) != 1:
        raise NotRepresentable(format, f"{len(acting)} head matrices act; it supports one")
    rule, head = acting[0]
    eps = head.eps * vectors.strength(rule)
    if isinstance(head.weight, DenseMatrix):
        return rule, Head(eps, package.tensors[head.weight.matrix])
    return rule, Head(eps, package.tensors[head.weight.u], package.tensors[head.weight.v])


def dense(head: Head) -> Tensor:
    """W [D, D] of a head in either form; a stored matrix is returned unchanged."""
    if head.v is None:
        return head.matrix
    return Tensor.of(head.matrix.float32() @ head.v.float32())


# ---------------------------------------------------------------- the output embedding


@dataclass(frozen=True, slots=True)
class Embedding:
    """The output embedding [V, D] of a model file; `tied` if it is also the input embedding."""

    stored: Any
    shape: tuple[int, int]
    tied: bool
    name: str

    def rows(self) -> Iterator[tuple[slice, Float32]]:
        """The embedding in groups of rows, dequantised."""
        for start in range(0, self.shape[0], _ROWS):
            part = slice(start, min(start + _ROWS, self.shape[0]))
            yield part, self.stored(part)


def output_embedding(answers: Answers) -> Embedding:
    """The output embedding of the given model (GGUF file or directory of safetensors files).

    Raises:
        MissingOption: no model was given.
        UnreadableSource: the model's files do not contain one.
    """
    if answers.model is None:
        raise MissingOption(
            answers.format, "model", "GGUF file or directory with the weights of the base model"
        )
    read = _gguf_embedding if answers.model.is_file() else _directory_embedding
    return read(answers.model)


def _gguf_embedding(path: Path) -> Embedding:
    tensors = files.gguf(path).tensors
    tensor = tensors.get("output.weight") or tensors.get("token_embd.weight")
    if tensor is None or len(tensor.shape) != 2:
        raise unreadable(path, "tensors", "output.weight or token_embd.weight", "none")
    rows = tensor.data.reshape(tensor.shape[0], -1)

    def piece(part: slice) -> Float32:
        return np.asarray(dequantize(rows[part], tensor.type), np.float32)

    tied = tensor.name == "token_embd.weight"
    return Embedding(piece, (tensor.shape[0], tensor.shape[1]), tied, tensor.name)


# Names of the output embedding in the files of transformers' models, and of the input embedding
# that a tied one is.
_HEADS: Final = ("lm_head.weight", "language_model.lm_head.weight", "embed_out.weight")
_INPUTS: Final = (
    *("model.embed_tokens.weight", "model.language_model.embed_tokens.weight"),
    *("language_model.model.embed_tokens.weight", "model.text_model.embed_tokens.weight"),
    *("transformer.wte.weight", "wte.weight"),
)


def _directory_embedding(path: Path) -> Embedding:
    where: dict[str, Path] = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "numpy") as opened:
            where |= dict.fromkeys(opened.keys(), file)
    name = next((n for n in (*_HEADS, *_INPUTS) if n in where), None)
    if name is None:
        names = ", ".join((*_HEADS, *_INPUTS))
        raise unreadable(path, "*.safetensors", f"one of {names}", "none of them")
    if name in _INPUTS and _has_head_of_its_own(path):
        want = "lm_head.weight, which this model has (a shard of it is missing)"
        raise unreadable(path, "*.safetensors", want, "none")
    stored = files.safetensors(where[name])[name]

    def piece(part: slice) -> Float32:
        return Tensor(stored.dtype, stored.array[part]).float32()

    return Embedding(piece, stored.shape, name in _INPUTS, name)  # type: ignore[arg-type]


def _has_head_of_its_own(path: Path) -> bool:
    """True if the model's files say that its output embedding is not the input's."""
    index, config = path / "model.safetensors.index.json", path / "config.json"
    listed = files.json_object(index).get("weight_map", {}) if index.is_file() else {}
    stated = files.json_object(config) if config.is_file() else {}
    tied = {**stated, **(stated.get("text_config") or {})}.get("tie_word_embeddings")
    return not set(_HEADS).isdisjoint(listed) or tied is False


# ---------------------------------------------------------------- from a change of logits


def fitted(embedding: Embedding, change: Any) -> tuple[Float32, float]:
    """X [D, R] such that E X is nearest to a change [V, R], and the relative residual.

    Args:
        change: returns the rows of the change for a slice.
    """
    d = embedding.shape[1]
    gram: Float64 = np.zeros((d, d))
    right: Float64 = np.zeros((d, 0))
    total = 0.0
    for part, rows in embedding.rows():
        e, delta = rows.astype(np.float64), np.asarray(change(part), np.float64)
        gram += e.T @ e
        right = e.T @ delta + (right if right.size else 0)
        total += float((delta**2).sum())
    x = np.linalg.lstsq(gram, right, rcond=None)[0]
    left = sum(
        float(((np.asarray(change(part), np.float64) - rows.astype(np.float64) @ x) ** 2).sum())
        for part, rows in embedding.rows()
    )
    return x.astype(np.float32), float(np.sqrt(left / max(total, 1e-300)))
