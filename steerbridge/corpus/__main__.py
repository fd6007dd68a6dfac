"""`python -m steerbridge.corpus`: how many prompts there are, as one JSON object."""

import json
from collections import Counter

from steerbridge import corpus

counts: dict[str, dict[str, dict[str, int]]] = {}
for kind in corpus.KINDS:
    found = corpus.prompts(kind=kind)
    counts[kind] = {
        "split": dict(Counter(p.split for p in found)),
        "category": dict(sorted(Counter(p.category for p in found).items())),
        "label": dict(Counter("harmful" if p.harmful else "harmless" for p in found)),
    }
print(json.dumps(counts, indent=2))
