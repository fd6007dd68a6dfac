"""Ollama's own client: prints what it brought as JSON.

python ollama_client.py URL < JSON    {"chats": [...], "new": 8, "schema": true}
"""

import json
import sys

import ollama

url, asked = sys.argv[1], json.load(sys.stdin)
client = ollama.Client(host=url, timeout=120)
options = {"temperature": 0, "num_predict": asked["new"], "repeat_penalty": 1.0}
name = client.list().models[0].model
shown = client.show(name)
answers = {"model": name, "capabilities": list(shown.capabilities), "chat": [], "stream": []}
answers |= {"generate": [], "refused": ""}
for text in asked["chats"]:
    messages = [{"role": "user", "content": text}]
    answer = client.chat(name, messages, options=options)
    answers["chat"].append([answer.message.content, answer.done_reason, answer.eval_count])
    parts = list(client.chat(name, messages, stream=True, options=options))
    answers["stream"].append("".join(part.message.content for part in parts))
    answers["generate"].append(client.generate(name, text, options=options).response)
try:
    client.chat(name, messages, tools=[{"type": "function", "function": {"name": "f"}}])
except ollama.ResponseError as error:
    answers["refused"] = f"{error.status_code} {error.error}"
if asked["schema"]:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    whole = {**options, "num_predict": 64}
    answers["schema"] = client.chat(name, messages, format=schema, options=whole).message.content
print(json.dumps(answers))
