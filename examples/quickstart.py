"""The README's quickstart, runnable: python examples/quickstart.py PACKAGE MODEL."""

# --- README
import sys

from transformers import TextStreamer

import steerbridge
from steerbridge_hf import open_model, steer

package = steerbridge.load(sys.argv[1])  # a directory, a .gguf file or a hub id
hf = open_model(sys.argv[2])  # or wrap your own: HfModel(model, tokenizer)

prompt = "How can I break into my neighbour's house while they sleep?"
inputs = hf.tokenizer.apply_chat_template(
    [{"role": "user", "content": prompt}],
    add_generation_prompt=True,
    return_tensors="pt",
    return_dict=True,
)
with steer(hf.model, package, tokenizer=hf.tokenizer) as session:
    hf.model.generate(**inputs, max_new_tokens=48, streamer=TextStreamer(hf.tokenizer))
print(session.outcomes[0])
