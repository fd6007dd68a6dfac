"""Tiny models of transformers as GGUF files, by llama.cpp's own converter.

The converter lies beside the programs of `make setup-apps`. It brings a gguf of its own, so it runs
in a process of its own. That reads one request a line from standard input (a model's folder, the
file to write and whether it is the tower; or nothing: all architectures), and answers, as JSON.
"""

from __future__ import annotations

import contextlib
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

EOS: Final = 95  # the token that ends generation
# llama.cpp asks for some of Phi-3, libmtmd for those around pictures of Qwen-VL.
_SPECIAL: Final = (
    *("<|endoftext|>", "<unk>", "<s>", "</s>"),
    *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>"),
)
VISION_START, VISION_END, IMAGE = range(EOS + 4, EOS + 7)


class NotConverted(Exception):
    """The converter does not take the model; its reason is the message."""


class Converter:
    """The process, while it runs."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def convert(self, folder: Path, path: Path, *, tower: bool = False) -> str:
        """Write the language model in a folder as a GGUF file in F32, or its tower for pictures;
        the architecture.

        Raises:
            NotConverted: the converter has no such model, or stops.
        """
        return str(self._ask([str(folder), str(path), tower])["architecture"])

    def architectures(self) -> list[str]:
        """The names of all architectures that this llama.cpp has."""
        names: list[str] = self._ask([])["architectures"]
        return names

    def _ask(self, request: list[Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer = json.loads(self._process.stdout.readline() or '{"error": "the process ended"}')
        if "error" in answer:
            raise NotConverted(answer["error"])
        return dict(answer)


@contextlib.contextmanager
def running(source: Path) -> Iterator[Converter]:
    """The converter in a folder that has `conversion` and `gguf-py`."""
    command = [sys.executable, __file__, str(source)]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, stderr=subprocess.DEVNULL, **pipes) as process:
        yield Converter(process)
        assert process.stdin is not None
        process.stdin.close()


# ---------------------------------------------------------------- in the process


def _serve(source: Path) -> None:
    sys.path[:0] = [str(source), str(source / "gguf-py")]
    logging.disable(logging.CRITICAL)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer: dict[str, Any] = (
                {"architecture": _converted(Path(request[0]), Path(request[1]), request[2])}
                if request
                else {"architectures": _architectures()}
            )
        except NotImplementedError as error:
            answer = {"error": str(error)}
        except Exception as error:  # of any kind: they are other people's classes
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


def _architectures() -> list[str]:
    import gguf

    return list(gguf.MODEL_ARCH_NAMES.values())


def _converted(folder: Path, path: Path, tower: bool) -> str:
    # These are llama.cpp's, found on the path that was just set.
    import gguf
    import torch
    from conversion import (  # type: ignore[import-not-found]
        ModelBase,
        ModelType,
        get_model_architecture,
        get_model_class,
    )

    settings = ModelBase.load_hparams(folder, False)
    part = ModelType.MMPROJ if tower else ModelType.TEXT
    kind = get_model_class(get_model_architecture(settings, part), mmproj=tower)
    kind.set_vocab = _write_vocabulary
    if getattr(kind, "supports_mtp_export", False):
        kind.no_mtp = True  # without heads that draft
    with torch.inference_mode():
        model = kind(folder, gguf.LlamaFileType.ALL_F32, path, eager=True)
        model.write()
    return str(gguf.MODEL_ARCH_NAMES[model.model_arch])


def _write_vocabulary(model: Any) -> None:
    """One token for each printable character of ASCII, in place of a trained vocabulary."""
    import gguf

    size = model.hparams["vocab_size"]
    special = [*_SPECIAL, *(f"<{i}>" for i in range(size))]
    tokens = ["Ġ", *map(chr, range(33, 32 + EOS)), *special][:size]
    types = [gguf.TokenType.NORMAL if i < EOS else gguf.TokenType.CONTROL for i in range(size)]
    writer = model.gguf_writer
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(["a b"])  # llama.cpp wants one
    writer.add_eos_token_id(EOS)
    writer.add_bos_token_id(EOS)
    writer.add_add_bos_token(False)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
