"""A chat program on llama-cpp-python, as users write them: it knows nothing of Steerbridge.

The first argument is JSON: `model`, `mmproj`, `context`, `batch`, `drafts`. Each line of standard
input is a request (`id`, `ids` or the `content` of a chat message, `new`, `temperature`,
`cancel_after`), and each line of standard output its answer: `tokens` and the `logits` of the first
one, or `refused`, or `error`. One `Llama` lives as long as the program, with its cache.
"""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

F32 = 0  # GGML_TYPE_F32


def main() -> None:
    settings = json.loads(sys.argv[1])
    llama = llama_cpp.Llama(
        settings["model"],
        n_ctx=settings["context"],
        n_batch=settings["batch"],
        n_ubatch=settings["batch"],
        n_threads=1,
        type_k=F32,
        type_v=F32,
        flash_attn=False,
        verbose=False,
        chat_handler=handler(settings["mmproj"]) if settings["mmproj"] else None,
        draft_model=LlamaPromptLookupDecoding(2, 4) if settings["drafts"] else None,
    )
    tell({"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        tell({"id": request["id"], **answer(llama, request)})


def handler(mmproj: str) -> Any:
    from llama_cpp.llama_chat_format import MTMDChatHandler

    return MTMDChatHandler(mmproj, verbose=False)


def chat(llama: llama_cpp.Llama, request: dict[str, Any]) -> dict[str, Any]:
    """An answer to a message with pictures; its characters are its tokens."""
    try:
        reply: Any = llama.create_chat_completion(
            [{"role": "user", "content": request["content"]}],
            max_tokens=request["new"],
            temperature=request["temperature"],
            repeat_penalty=1.0,
        )
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "tokens": []}
    return {"tokens": list(reply["choices"][0]["message"]["content"].encode())}


def answer(llama: llama_cpp.Llama, request: dict[str, Any]) -> dict[str, Any]:
    if "content" in request:
        return chat(llama, request)
    if len(request["ids"]) + request["new"] > llama.n_ctx():
        return {"refused": f"{len(request['ids'])} tokens in a context of {llama.n_ctx()}"}
    tokens: list[int] = []
    first: list[list[float]] = []

    def keep(_: Any, scores: Any) -> Any:
        if not first:
            first.append(np.array(scores, np.float32).tolist())
        return scores

    stream = llama.generate(
        request["ids"],
        temp=request["temperature"],
        repeat_penalty=1.0,
        logits_processor=llama_cpp.LogitsProcessorList([keep]),
    )
    try:
        with contextlib.closing(stream):
            for token in stream:
                tokens.append(int(token))
                if len(tokens) == (request["cancel_after"] or request["new"]):
                    break
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "tokens": tokens}
    return {"tokens": tokens, "logits": first[0]}


def tell(content: dict[str, Any]) -> None:
    print(json.dumps(content), flush=True)


if __name__ == "__main__":
    main()
