"""llama-cpp-python as its users use it. Knows nothing of Steerbridge.

    python ask.py SHAPE MODEL PROMPT...

Prints a JSON list: the text of each answer.
"""

import json
import sys

from llama_cpp import Llama, LlamaGrammar, LlamaRAMCache
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

shape, path, *prompts = sys.argv[1:]
options = {
    "logits_all": {"logits_all": True},
    "chunks": {"n_batch": 8},
    "drafts": {"draft_model": LlamaPromptLookupDecoding(num_pred_tokens=3)},
}.get(shape, {})
llm = Llama(path, n_ctx=512, n_threads=1, type_k=0, type_v=0, verbose=False, **options)
if shape == "cache":
    llm.set_cache(LlamaRAMCache())
    prompts = [*prompts, *prompts]


def complete(prompt, **more):
    answer = llm.create_completion(prompt, max_tokens=8, temperature=0, **more)
    return answer["choices"][0]["text"]


def ask(prompt):
    if shape == "stream":
        chunks = llm.create_completion(prompt, max_tokens=8, temperature=0, stream=True)
        return "".join(chunk["choices"][0]["text"] for chunk in chunks)
    if shape == "logits_all":
        return complete(prompt, logprobs=2)
    if shape == "echo":
        return complete(prompt, echo=True)[len(prompt) :]
    if shape == "grammar":
        return complete(prompt, grammar=LlamaGrammar.from_string("root ::= [a-z]+", verbose=False))
    if shape == "state":
        llm.reset()
        llm.eval(llm.tokenize(prompt.encode(), add_bos=False)[:-1])
        state = llm.save_state()
        llm.eval(llm.tokenize(b"something else", add_bos=False))
        llm.load_state(state)
    if shape == "beside":  # another one in the process, which answers between
        other = Llama(path, n_ctx=512, n_threads=1, type_k=0, type_v=0, verbose=False)
        stream = llm.create_completion(prompt, max_tokens=8, temperature=0, stream=True)
        text = next(stream)["choices"][0]["text"]
        other.create_completion(prompts[0], max_tokens=8, temperature=0)
        other.close()
        return text + "".join(chunk["choices"][0]["text"] for chunk in stream)
    return complete(prompt)


print(json.dumps([ask(prompt) for prompt in prompts]))
