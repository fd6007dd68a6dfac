"""`python -m steerbridge.corpus`: how many prompts there are, as one JSON object."""

import json
from collections import Counter

from steerbridge import corpus

counts: dict[str, dict[str, dict[str, int]]] = {}
for kind in corpus.KINDS:
    prompts = corpus.prompts(kind=kind)
    counts[kind] = {
        "split": dict(Counter(p.split for p in prompts)),
        "category": dict(sorted(Counter(p.category for p in prompts).items())),
        "label": dict(Counter("harmful" if p.harmful else "harmless" for p in prompts)),
    }
print(json.dumps(counts, indent=2))
