"""What a user would pick instead: a classifier of words and characters, without a language model.

Words (one and two) and characters (three to five), weighted by TF-IDF, with logistic regression, on
the very prompts that the guard is trained on, at the same promised rate on the same traffic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline, make_union

from steerbridge import Example, thresholds
from steerbridge.training.parts import Parts
from steerbridge.training.settings import TrainSettings


def verdicts(
    parts: Parts, settings: TrainSettings, sets: Mapping[str, Sequence[Example]]
) -> dict[str, NDArray[np.bool_]]:
    """Whether the classifier fires on each prompt, by set."""
    model = make_pipeline(
        make_union(
            TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True),
            TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), min_df=3, sublinear_tf=True),
        ),
        LogisticRegression(C=10, max_iter=2000, class_weight="balanced"),
    )
    train, held = parts.of("train"), parts.of("calibrate")
    model.fit([text(parts.examples[i]) for i in train], parts.harmful[train])

    def scores(prompts: Sequence[Example]) -> Any:
        return model.decision_function([text(e) for e in prompts])

    traffic = scores([parts.examples[i] for i in held if parts.traffic[i]])
    rate = {"*": settings.target_fpr}
    fire = thresholds.allowed({"traffic": len(traffic)}, rate, settings.confidence)
    limit = thresholds.choose({"traffic": traffic}, fire)
    return {name: scores(prompts) > limit for name, prompts in sets.items()}


def text(e: Example) -> str:
    """All that a program would show such a classifier."""
    before = [e.system or "", *(content for _, content in e.turns)]
    return "\n".join([*filter(None, before), e.text, e.prefill]).strip()
