"""llama.cpp with pictures, as thin as can be: what tests compare Hugging Face with."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np


class Mtmd:
    """A text GGUF and its mmproj through libmtmd: F32 KV cache, no flash attention, two threads.

    After `evaluate`, `tokens` holds the ids of the prompt (-1 for an image token), `embeddings`
    [n, 576] the image tokens, `hidden` {layer: [rows, 576]} the streams asked for, and
    `logits` [V] those of the last token.
    """

    def __init__(self, text: Path, mmproj: Path, layers: tuple[int, ...] = ()) -> None:
        import llama_cpp
        from llama_cpp import mtmd_cpp

        self.c, self.m = llama_cpp, mtmd_cpp
        llama_cpp.llama_backend_init()
        quiet = llama_cpp.llama_log_callback(lambda *_: None)
        self._quiet = quiet
        llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
        mtmd_cpp.mtmd_log_set(quiet, ctypes.c_void_p(0))
        mtmd_cpp.mtmd_helper_log_set(quiet, ctypes.c_void_p(0))
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(str(text).encode(), params)
        assert self.model
        context = llama_cpp.llama_context_default_params()
        context.n_ctx = 1024
        context.n_batch = context.n_ubatch = 512
        context.n_threads = context.n_threads_batch = 2
        context.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        context.type_k = context.type_v = llama_cpp.GGML_TYPE_F32
        self.wanted = {f"l_out-{layer - 1}": layer for layer in layers}
        self.rows: dict[int, list[np.ndarray]] = {}
        self._callback = llama_cpp.ggml_backend_sched_eval_callback(self._seen)
        if layers:
            context.cb_eval = self._callback
        self.context = llama_cpp.llama_init_from_model(self.model, context)
        assert self.context
        vision = mtmd_cpp.mtmd_context_params_default()
        vision.use_gpu = False
        vision.print_timings = False
        vision.n_threads = 2
        vision.warmup = False
        vision.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.vision = mtmd_cpp.mtmd_init_from_file(str(mmproj).encode(), self.model, vision)
        assert self.vision
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(self.vocab)
        base = Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"
        self.ggml = ctypes.CDLL(str(base))
        self.ggml.ggml_get_name.restype = ctypes.c_char_p
        self.ggml.ggml_get_name.argtypes = [ctypes.c_void_p]
        self.ggml.ggml_nbytes.restype = ctypes.c_size_t
        self.ggml.ggml_nbytes.argtypes = [ctypes.c_void_p]
        self.ggml.ggml_backend_tensor_get.restype = None
        self.ggml.ggml_backend_tensor_get.argtypes = [
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_size_t,
            ctypes.c_size_t,
        ]

    def _seen(self, tensor, ask, _):
        layer = self.wanted.get(self.ggml.ggml_get_name(tensor).decode())
        if ask or layer is None:
            return layer is not None or not ask
        data = np.empty(self.ggml.ggml_nbytes(tensor) // 4, np.float32)
        self.ggml.ggml_backend_tensor_get(tensor, data.ctypes.data, 0, data.nbytes)
        self.rows.setdefault(layer, []).append(data.reshape(-1, 576))
        return True

    def close(self) -> None:
        self.m.mtmd_free(self.vision)
        self.c.llama_free(self.context)
        self.c.llama_model_free(self.model)

    def evaluate(self, text: str, pictures) -> None:
        """Read a rendered prompt whose `<image>` stand for pictures (PIL, RGB)."""
        m, c = self.m, self.c
        marker = m.mtmd_default_marker()
        raw = text.replace("<image>", marker.decode()).encode()
        prompt = m.mtmd_input_text()
        prompt.text, prompt.text_len = raw, len(raw)
        prompt.add_special = prompt.parse_special = True
        bitmaps = []
        for picture in pictures:
            data = np.ascontiguousarray(picture.convert("RGB"))
            pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
            bitmaps.append(m.mtmd_bitmap_init(picture.width, picture.height, pointer))
        chunks = m.mtmd_input_chunks_init()
        array = (m.mtmd_bitmap_p_ctypes * max(1, len(bitmaps)))(*bitmaps)
        assert m.mtmd_tokenize(self.vision, chunks, ctypes.byref(prompt), array, len(bitmaps)) == 0
        c.llama_memory_clear(c.llama_get_memory(self.context), True)
        self.tokens, embeddings, self.rows = [], [], {}
        past = c.llama_pos(0)
        count = m.mtmd_input_chunks_size(chunks)
        for i in range(count):
            chunk = m.mtmd_input_chunks_get(chunks, i)
            size = m.mtmd_input_chunk_get_n_tokens(chunk)
            if m.mtmd_input_chunk_get_type(chunk) == m.MTMD_INPUT_CHUNK_TYPE_TEXT:
                length = ctypes.c_size_t()
                ids = m.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(length))
                self.tokens += [ids[j] for j in range(length.value)]
            else:
                self.tokens += [-1] * size
            code = m.mtmd_helper_eval_chunk_single(
                self.vision,
                self.context,
                chunk,
                past,
                c.llama_seq_id(0),
                512,
                i == count - 1,
                ctypes.byref(past),
            )
            assert code == 0
            if self.tokens[-1] == -1:
                pointer = m.mtmd_get_output_embd(self.vision)
                embeddings.append(np.ctypeslib.as_array(pointer, (size, 576)).copy())
        m.mtmd_input_chunks_free(chunks)
        for bitmap in bitmaps:
            m.mtmd_bitmap_free(bitmap)
        self.past = past.value
        self.embeddings = np.concatenate(embeddings) if embeddings else np.empty((0, 576))
        self.hidden = {layer: np.concatenate(rows) for layer, rows in self.rows.items()}
        self.logits = self._logits()

    def _logits(self) -> np.ndarray:
        pointer = self.c.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(pointer, (self.n_vocab,)).copy()

    def greedy(self, count: int) -> list[int]:
        """The next tokens, up to and without the end of the turn."""
        c, chosen = self.c, []
        while len(chosen) < count:
            token = int(self.logits.argmax())
            if c.llama_vocab_is_eog(self.vocab, token):
                break
            chosen.append(token)
            one = (c.llama_token * 1)(token)
            assert c.llama_decode(self.context, c.llama_batch_get_one(one, 1)) == 0
            self.logits = self._logits()
        return chosen
