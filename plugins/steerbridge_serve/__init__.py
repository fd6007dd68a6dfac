"""`steerbridge serve`: a steered model behind the HTTP interfaces of TGI and OpenAI.

request -> `app` (checks, limits) -> `worker` (one queue, one thread) -> `engines` (the model)
-> tokens -> `answers` (text, stop sequences, the two dialects) -> response
"""
