"""TGI's old client, `text-generation`, in its own environment: prints what it brought as JSON.

python text_generation_client.py URL < JSON    {"prompts": [...], "chats": [...], "new": 8}
"""

import json
import sys

from text_generation import Client
from text_generation.errors import ValidationError
from text_generation.types import Message

url, asked = sys.argv[1], json.load(sys.stdin)
client = Client(url, timeout=120)
answers = {"generate": [], "stream": [], "chat": [], "chat_stream": []}
for prompt in asked["prompts"]:
    answer = client.generate(prompt, max_new_tokens=asked["new"])
    answers["generate"].append([answer.generated_text, [t.id for t in answer.details.tokens]])
    events = list(client.generate_stream(prompt, max_new_tokens=asked["new"]))
    answers["stream"].append([events[-1].generated_text, [e.token.id for e in events]])
for chat in asked["chats"]:
    options = {
        "messages": [Message(role="user", content=chat)],
        "max_tokens": asked["new"],
        "temperature": 0.0,
    }
    answers["chat"].append(client.chat(**options).choices[0].message.content)
    text = ""
    try:
        for chunk in client.chat(**options, stream=True):
            text += chunk.choices[0].delta.content or ""
    except json.JSONDecodeError:
        pass  # it takes the end of a stream, `[DONE]`, for a chunk: TGI's own too
    answers["chat_stream"].append(text)
try:
    client.generate("x", max_new_tokens=100_000)
except ValidationError as error:
    answers["error"] = str(error)
print(json.dumps(answers))
