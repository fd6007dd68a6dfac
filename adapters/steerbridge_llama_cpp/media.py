"""Prompts with images: libmtmd decodes them itself, so its calls are reported to the tracker.

A chat handler of llama_cpp turns a prompt into chunks (`mtmd_tokenize`), evaluates chunks of
text through `Llama.eval` and has libmtmd decode the embeddings of images directly on the
context (`mtmd_helper_eval_chunk_single`). `WatchedMtmd` is the module `llama_cpp.mtmd_cpp` with
these two calls reported to the request tracker; `MediaPrompts` evaluates prompts without a
handler's sampling.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from steerbridge.errors import DataError, Problem, UnsupportedFeature
from steerbridge.serving import Picture
from steerbridge_llama_cpp._tracker import RequestTracker
from steerbridge_llama_cpp.native import RUNTIME

PART_TYPES = ("text", "image_url")


class WatchedMtmd:
    """All of `llama_cpp.mtmd_cpp`, with two calls reported to a request tracker."""

    def __init__(self, module: Any, tracker: RequestTracker) -> None:
        self._module = module
        self._tracker = tracker

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def mtmd_tokenize(self, context: Any, chunks: Any, *rest: Any) -> int:
        """See libmtmd; the rows of all chunks are the next prompt."""
        code: int = self._module.mtmd_tokenize(context, chunks, *rest)
        if code == 0:
            self._tracker.announce(sum(map(self._rows, each_chunk(self._module, chunks))))
        return code

    def mtmd_helper_eval_chunk_single(
        self, context: Any, llama_context: Any, chunk: Any, *rest: Any
    ) -> int:
        """See libmtmd; the rows are counted, and pass through the hook."""
        module = self._module
        return self._tracker.decode_media(
            self._rows(chunk),
            int(module.mtmd_input_chunk_get_n_pos(chunk)),
            lambda: int(module.mtmd_helper_eval_chunk_single(context, llama_context, chunk, *rest)),
        )

    def _rows(self, chunk: Any) -> int:
        module = self._module
        if module.mtmd_input_chunk_get_type(chunk) == module.MTMD_INPUT_CHUNK_TYPE_AUDIO:
            raise UnsupportedFeature(RUNTIME, "sound: guards read text and images")
        return int(module.mtmd_input_chunk_get_n_tokens(chunk))


def each_chunk(mtmd: Any, chunks: Any) -> Iterator[Any]:
    """The chunks of a prompt, in order."""
    for i in range(mtmd.mtmd_input_chunks_size(chunks)):
        yield mtmd.mtmd_input_chunks_get(chunks, i)


def is_media_handler(handler: Any) -> bool:
    """True for llama_cpp's handlers of images: `MTMDChatHandler`, `Llava15ChatHandler`, ..."""
    return hasattr(handler, "_mtmd_cpp")


@contextlib.contextmanager
def watched(handler: Any, tracker: RequestTracker) -> Iterator[None]:
    """Within this context, the tracker is told what `handler` has libmtmd decode."""
    module = handler._mtmd_cpp
    handler._mtmd_cpp = WatchedMtmd(module, tracker)
    try:
        with tracker.media():
            yield
    finally:
        handler._mtmd_cpp = module


def check_parts(messages: Sequence[Any], handler: Any) -> None:
    """Raise UnsupportedFeature for a part of a message that would not reach the model."""
    known: tuple[str, ...] = PART_TYPES
    hint = ""
    if not is_media_handler(handler):
        known, hint = PART_TYPES[:1], "a chat handler for images"
    for message in messages:
        parts = message.get("content")
        for part in parts if isinstance(parts, list) else []:
            if part.get("type") not in known:
                raise UnsupportedFeature(
                    RUNTIME, f"message parts of type {part.get('type')!r}", hint
                )


class MediaPrompts:
    """Evaluates prompts with images on a `Llama`; its `generate` then continues from there.

    Args:
        llama: an open model; steered or not.
        handler: an `MTMDChatHandler` or one like it, for the vision model it loads.
    """

    def __init__(self, llama: Any, handler: Any) -> None:
        self.llama, self.handler = llama, handler
        handler._init_mtmd_context(llama)
        self.marker: str = handler._mtmd_cpp.mtmd_default_marker().decode()

    def evaluate(self, text: str, images: Sequence[Path | Picture]) -> list[int]:
        """Clear the cache and evaluate a rendered prompt, whose markers stand for the images
        (files, or decoded ones).

        Returns its token ids (0 for each position that an image takes: as many as it has rows, or
        fewer with M-RoPE). Given these, `Llama.generate` continues without evaluating anything
        again.

        Raises:
            DataError: an image that cannot be read, a number of markers other than that of
                images, a prompt that does not fit the context.
        """
        tracker = self.llama.__dict__.get("_steering_tracker")
        with contextlib.ExitStack() as stack:
            if tracker is not None:
                stack.enter_context(watched(self.handler, tracker))
            chunks = self._chunks(text, images, stack)
            self.llama.reset()
            self.llama._ctx.kv_cache_clear()
            for chunk in each_chunk(self.handler._mtmd_cpp, chunks):
                self._evaluate(chunk)
        return list(map(int, self.llama.input_ids[: self.llama.n_tokens]))

    def tokens(self, text: str, images: Sequence[Path | Picture]) -> list[int]:
        """The token ids that `evaluate` returns, without evaluating anything.

        Raises:
            DataError: as `evaluate`.
        """
        mtmd = self.handler._mtmd_cpp
        with contextlib.ExitStack() as stack:
            chunks = self._chunks(text, images, stack)
            return [id for chunk in each_chunk(mtmd, chunks) for id in self._ids(chunk)]

    def _bitmap(self, mtmd: Any, image: Path | Picture, stack: contextlib.ExitStack) -> Any:
        if isinstance(image, Picture):
            pixels = (ctypes.c_uint8 * len(image.rgb)).from_buffer_copy(image.rgb)
            bitmap = mtmd.mtmd_bitmap_init(image.width, image.height, pixels)
        else:
            try:
                bitmap = self.handler._create_bitmap_from_bytes(image.read_bytes())
            except ValueError as error:
                problem = Problem("image", "one that libmtmd reads", str(error))
                raise DataError(problem, image) from None
        stack.callback(mtmd.mtmd_bitmap_free, bitmap)
        return bitmap

    def _chunks(
        self, text: str, images: Sequence[Path | Picture], stack: contextlib.ExitStack
    ) -> Any:
        mtmd = self.handler._mtmd_cpp
        bitmaps = [self._bitmap(mtmd, image, stack) for image in images]
        raw = text.encode()
        prompt = mtmd.mtmd_input_text()
        prompt.text, prompt.text_len = raw, len(raw)
        prompt.add_special = prompt.parse_special = True
        chunks = mtmd.mtmd_input_chunks_init()
        stack.callback(mtmd.mtmd_input_chunks_free, chunks)
        array = (mtmd.mtmd_bitmap_p_ctypes * len(bitmaps))(*bitmaps)
        code = mtmd.mtmd_tokenize(
            self.handler.mtmd_ctx, chunks, ctypes.byref(prompt), array, len(bitmaps)
        )
        if code:
            markers = f"{text.count(self.marker)} markers (libmtmd: {code})"
            raise DataError(Problem("prompt", f"{len(bitmaps)} image markers", markers))
        rows = mtmd.mtmd_helper_get_n_tokens(chunks)
        if rows > self.llama.n_ctx():
            raise DataError(Problem("prompt", f"{self.llama.n_ctx()} tokens at most", str(rows)))
        return chunks

    def _ids(self, chunk: Any) -> list[int]:
        """The token ids of a chunk; 0 for each position of an image."""
        mtmd = self.handler._mtmd_cpp
        if mtmd.mtmd_input_chunk_get_type(chunk) != mtmd.MTMD_INPUT_CHUNK_TYPE_TEXT:
            return [0] * int(mtmd.mtmd_input_chunk_get_n_pos(chunk))
        count = ctypes.c_size_t()
        ids = mtmd.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(count))
        return [int(ids[i]) for i in range(count.value)]

    def _evaluate(self, chunk: Any) -> None:
        llama, mtmd = self.llama, self.handler._mtmd_cpp
        ids = self._ids(chunk)
        if mtmd.mtmd_input_chunk_get_type(chunk) == mtmd.MTMD_INPUT_CHUNK_TYPE_TEXT:
            llama.eval(ids)
            return
        past, after = llama.n_tokens, ctypes.c_int32()
        code = mtmd.mtmd_helper_eval_chunk_single(
            self.handler.mtmd_ctx,
            llama._ctx.ctx,
            chunk,
            ctypes.c_int32(past),
            ctypes.c_int32(0),
            llama.n_batch,
            False,
            ctypes.byref(after),
        )
        if code:
            raise RuntimeError(f"libmtmd could not decode an image: {code}")
        llama.input_ids[past : past + len(ids)] = ids
        llama.n_tokens = after.value
