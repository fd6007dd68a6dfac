"""xllamacpp as its users use it: llama-server's code inside Python. Knows nothing of Steerbridge.

    python ask_xllamacpp.py SHAPE MODEL PROMPT...

Prints a JSON list: the text of each answer.
"""

import json
import sys

import xllamacpp

shape, path, *prompts = sys.argv[1:]
params = xllamacpp.CommonParams()
params.model.path = path
params.n_ctx, params.n_parallel, params.warmup = 512, 2, False
params.cpuparams.n_threads = 1
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
server = xllamacpp.Server(params)


def ask(prompt):
    body = {"prompt": prompt, "max_tokens": 8, "temperature": 0}
    if shape == "stream":
        chunks = []
        server.handle_completions({**body, "stream": True}, lambda chunk: chunks.append(chunk))
        flat = [c for chunk in chunks for c in (chunk if isinstance(chunk, list) else [chunk])]
        return "".join(c["choices"][0]["text"] for c in flat)
    if shape == "chat":
        del body["prompt"]
        body["messages"] = [{"role": "user", "content": prompt}]
        return server.handle_chat_completions(body)["choices"][0]["message"]["content"]
    return server.handle_completions(body)["choices"][0]["text"]


print(json.dumps([ask(prompt) for prompt in prompts]))
