"""Tiny vision-language models with M-RoPE in transformers and in llama.cpp: `make parity-models`.

Towers differ by design: GELU is a table of F16 in llama.cpp, and pictures may be resized. So both
get the image embeddings of llama.cpp's tower (`mtmd_encode_chunk`), and what is compared is the
language model: rows, positions, deep-stacked features, verdicts and tokens. Then Gemma 3 270M, on
text (`gemma.py`). The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import logging
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import torch
import transformers
from llama_cpp.llama_chat_format import MTMDChatHandler

sys.path.append(str(Path(__file__).resolve().parent.parent))  # what tests share
import converting
import gemma
import helpers
import programs
from llama_models import greedy, opened
from model_oracle import Greedy, acting, agree, best, guard, judged, same, steered
from steerbridge.package import SteeringPackage
from steerbridge.reference import Verdict
from steerbridge.serving import Picture
from steerbridge_llama_cpp import steer
from steerbridge_llama_cpp.media import MediaPrompts, each_chunk

PROMPTS: Final = 50
NEW: Final = 6  # tokens of an answer
LAYERS: Final = 4
EPS: Final = 8.0  # of the guard's head: it changes answers
VOCABULARY: Final = 104
PATCH: Final = 4  # pixels; an image token is two by two of them
CONTEXT: Final = 512
MARKER: Final = "<__media__>"  # stands for a picture in a prompt
_TEXT: Final = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-6,  # as released; llama.cpp does not read that of Qwen2-VL, and takes 0
    "tie_word_embeddings": False,
    "bos_token_id": converting.EOS,
    "eos_token_id": converting.EOS,
}
_ROPE: Final = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
_TOWER: Final = {
    "depth": 4,
    "num_heads": 2,
    "patch_size": PATCH,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "in_channels": 3,
}
_TOKENS: Final = {
    "vision_start_token_id": converting.VISION_START,
    "vision_end_token_id": converting.VISION_END,
    "image_token_id": converting.IMAGE,
    "video_token_id": VOCABULARY - 1,
}
# Family -> transformers' name of its classes, of its text's rope, and of its tower.
FAMILIES: Final[dict[str, tuple[str, dict[str, Any], dict[str, Any]]]] = {
    "qwen2_vl": ("Qwen2VL", _ROPE, {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}),
    "qwen2_5_vl": (
        "Qwen2_5_VL",
        _ROPE,
        {
            "hidden_size": 16,
            "out_hidden_size": 32,
            "intermediate_size": 32,
            "window_size": 16,
            "fullatt_block_indexes": [1, 3],
        },
    ),
    "qwen3_vl": (
        "Qwen3VL",
        {**_ROPE, "mrope_interleaved": True},
        {
            "hidden_size": 16,
            "out_hidden_size": 32,
            "intermediate_size": 32,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
    ),
}


# ---------------------------------------------------------------- the models


def built(family: str) -> Any:
    """A random model of a family, in float32."""
    name, rope, tower = FAMILIES[family]
    text = {**_TEXT, "rope_parameters": rope}
    config = getattr(transformers, f"{name}Config")(
        text_config=text, vision_config={**_TOWER, **tower}, **_TOKENS
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).float().eval()
    for weight, p in model.named_parameters():  # larger than the default: answers that differ
        torch.nn.init.normal_(p, std=0.05 if weight.endswith("bias") else 0.2)
    model.generation_config.eos_token_id = None
    return model


def saved(model: Any, folder: Path) -> Path:
    """The model as a folder that llama.cpp's converter reads."""
    place = folder / "model"
    model.save_pretrained(place)
    pixels = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (place / "preprocessor_config.json").write_text(json.dumps(pixels), "utf-8")
    return place


@dataclass(frozen=True)
class Prompt:
    """A prompt as llama.cpp has it, and what stands for its pictures in transformers.

    Attributes:
        ids: of all rows; those of pictures have one id.
        features: of each picture, [rows, width]: what its rows are before the first block.
        added: of each picture, [blocks, rows, width]: what is added behind early blocks.
        grids: of each picture, its patches: [1, height, width].
    """

    text: str
    pictures: list[Picture]
    ids: list[int]
    features: list[torch.Tensor]
    added: list[torch.Tensor]
    grids: list[list[int]]


class Pair:
    """The two models, and a guard for both."""

    def __init__(self, family: str, folder: Path, converter: converting.Converter) -> None:
        self.model = built(family)
        place = saved(self.model, folder)
        self.path, self.tower = folder / "text.gguf", folder / "tower.gguf"
        self.architecture = converter.convert(place, self.path)
        converter.convert(place, self.tower, tower=True)
        tower = {"clip_model_path": str(self.tower), "verbose": False, "use_gpu": False}
        self.handler = MTMDChatHandler(**tower)
        self.llama = opened(self.path, n_ctx=CONTEXT, chat_handler=self.handler)
        self.media = MediaPrompts(self.llama, self.handler)

    def prompt(self, text: str, pictures: list[Picture]) -> Prompt:
        """A prompt, with what llama.cpp's tower makes of its pictures."""
        mtmd = self.handler._mtmd_cpp
        ids: list[int] = []
        features, added, grids = [], [], []
        with contextlib.ExitStack() as stack:
            chunks = self.media._chunks(text, pictures, stack)
            for chunk in each_chunk(mtmd, chunks):
                if mtmd.mtmd_input_chunk_get_type(chunk) == mtmd.MTMD_INPUT_CHUNK_TYPE_TEXT:
                    ids += self.media._ids(chunk)
                    continue
                rows = int(mtmd.mtmd_input_chunk_get_n_tokens(chunk))
                whole = self._encoded(mtmd, chunk, rows)
                features.append(whole[:, 0])
                added.append(whole[:, 1:].transpose(0, 1))
                tokens = mtmd.mtmd_input_chunk_get_tokens_image(chunk)
                size = mtmd.mtmd_image_tokens_get_ny(tokens), mtmd.mtmd_image_tokens_get_nx(tokens)
                grids.append([1, 2 * int(size[0]), 2 * int(size[1])])
                ids += [converting.IMAGE] * rows
        return Prompt(text, pictures, ids, features, added, grids)

    def _encoded(self, mtmd: Any, chunk: Any, rows: int) -> torch.Tensor:
        """[rows, 1 + blocks that get more, width]."""
        if code := mtmd.mtmd_encode_chunk(self.handler.mtmd_ctx, chunk):
            raise RuntimeError(f"libmtmd could not encode a picture: {code}")
        width = _TEXT["hidden_size"]
        parts = 1 + len(getattr(self.model.config.vision_config, "deepstack_visual_indexes", []))
        values = mtmd.mtmd_get_output_embd(self.handler.mtmd_ctx)
        flat = ctypes.cast(values, ctypes.POINTER(ctypes.c_float * (rows * parts * width))).contents
        return torch.from_numpy(np.array(flat, np.float32)).view(rows, parts, width)

    # -------------------------------------------------------- transformers

    def forward(self, prompt: Prompt, new: Sequence[int] = ()) -> Any:
        """The unsteered model on a prompt and tokens behind it; steered by hooks around it."""
        ids = torch.tensor([[*prompt.ids, *new]])
        given: dict[str, Any] = {"mm_token_type_ids": (ids == converting.IMAGE).int()}
        if prompt.pictures:
            grids = torch.tensor(prompt.grids)
            given |= {"image_grid_thw": grids, "pixel_values": torch.zeros(1)}
        seen = SimpleNamespace(
            pooler_output=prompt.features,
            deepstack_features=[list(part) for part in zip(*prompt.added, strict=True)],
            to_tuple=tuple,
        )
        self.model.model.get_image_features = lambda *_args, **_more: seen
        with torch.no_grad():
            return self.model(input_ids=ids, use_cache=False, **given)

    def states(self, prompt: Prompt) -> list[np.ndarray]:
        """Hidden states [T, D] before each block: what blocks are given. What they return is not
        yet what the next one reads, where features are added behind early blocks."""
        seen: list[np.ndarray] = []

        def keep(module: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            given = args[0] if args else named["hidden_states"]
            seen.append(given[0].double().numpy().copy())

        with contextlib.ExitStack() as hooks:
            for block in self.model.model.language_model.layers:
                hooks.callback(block.register_forward_pre_hook(keep, with_kwargs=True).remove)
            self.forward(prompt)
        return seen

    def greedy(self, prompt: Prompt, package: SteeringPackage, actions: Any) -> list[Greedy]:
        """Greedy tokens; the actions steer the rows from the prompt end on."""
        answer: list[Greedy] = []
        with steered(self.model, [actions], package, first=len(prompt.ids) - 1):
            for _ in range(NEW):
                logits = self.forward(prompt, [g.token for g in answer]).logits
                answer.append(best(logits[0, -1]))
        return answer

    # -------------------------------------------------------- the guard

    def fitted(self, prompts: Sequence[Prompt]) -> SteeringPackage:
        """A guard that fires on half of the prompts."""
        pictures = [helpers.reading("layer_input[3]", helpers.IMAGE)]
        always = guard(self.model, eps=EPS, more=pictures)
        scores = sorted(self.judged(always, prompt).score for prompt in prompts)
        half = len(scores) // 2
        return guard(self.model, (scores[half - 1] + scores[half]) / 2, EPS, more=pictures)

    def judged(self, package: SteeringPackage, prompt: Prompt) -> Verdict:
        """The verdict on a prompt, by the numpy reference."""
        of_pictures = np.asarray(prompt.ids) == converting.IMAGE
        return judged(package, self.states(prompt), of_pictures)


def drawn(count: int, seed: int = 0) -> Iterator[tuple[str, list[Picture]]]:
    """Prompts: letters, and one, two or three pictures of noise among them."""
    rng = random.Random(seed)
    letter = partial(rng.choice, "CDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
    for i in range(count):
        pictures, text = [], ""
        for _ in range(1 + i % 3):
            text += "".join(letter() for _ in range(rng.randrange(4))) + MARKER
            width, height = (2 * PATCH * rng.randrange(2, 7) for _ in range(2))
            pictures.append(Picture(width, height, rng.randbytes(3 * width * height)))
        text += "".join(letter() for _ in range(rng.randrange(1, 9)))
        yield text, pictures


def compared(family: str, folder: Path, converter: converting.Converter, count: int) -> list[str]:
    """What differs on so many prompts, a line each."""
    pair = Pair(family, folder, converter)
    prompts = [pair.prompt(text, pictures) for text, pictures in drawn(count)]
    package = pair.fitted(prompts)
    wrong = []
    with steer(pair.llama, package) as session:
        for i, prompt in enumerate(prompts):
            want = pair.judged(package, prompt)
            expected = pair.greedy(prompt, package, acting(package, want))
            ids = pair.media.evaluate(prompt.text, prompt.pictures)
            answer = greedy(pair.llama, ids, NEW)
            got = session.outcomes[0].verdicts[0]
            if not same(got, want):
                wrong.append(f"{family} {i}: score {got.score:.6g}, expected {want.score:.6g}")
            elif not agree(answer, expected[: len(answer)]):
                wrong.append(f"{family} {i}: tokens {answer}, expected {expected}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", nargs="*", default=list(FAMILIES))
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    parser.add_argument("--no-gemma", action="store_true", help="Leave Gemma 3 out.")
    options = parser.parse_args()
    start = time.monotonic()
    logging.disable(logging.WARNING)
    wrong: dict[str, list[str]] = {}
    with converting.running(programs.converter()) as converter:
        for family in options.families:
            with tempfile.TemporaryDirectory() as folder:
                wrong[family] = compared(family, Path(folder), converter, options.prompts)
            print(*wrong[family], sep="\n", file=sys.stderr)
    told: dict[str, Any] = {"prompts": options.prompts}
    told["wrong"] = {family: len(lines) for family, lines in wrong.items()}
    failed = any(told["wrong"].values())
    if not options.no_gemma:
        with tempfile.TemporaryDirectory() as folder:
            told["gemma3"] = gemma.compared(Path(folder))
        # A guard that never fires would show nothing.
        failed |= bool(told["gemma3"]["other_verdicts"]) or not told["gemma3"]["fired"]
    print(json.dumps({**told, "seconds": round(time.monotonic() - start)}))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
