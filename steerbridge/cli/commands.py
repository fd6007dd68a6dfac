"""The core's own commands, as other packages register theirs: entry points name these."""

from typing import Final

from steerbridge.registry import Command

DATA: Final = Command(
    target="steerbridge.cli.data:data",
    summary="Show what files of prompts hold, and how they are read.",
)
TRAIN: Final = Command(
    target="steerbridge.cli.train:train",
    summary="Train a package on labelled prompts.",
    extra="hf",
)
INSPECT: Final = Command(
    target="steerbridge.cli.inspect:inspect",
    summary="Show what a package or another tool's artifact holds.",
)
GENERATE: Final = Command(
    target="steerbridge.cli.generate:generate",
    summary="Answer prompts with and without a package.",
    opens_model=True,
)
EVAL: Final = Command(
    target="steerbridge.cli.evaluate:evaluate",
    summary="Measure what a guard stops and what it disturbs.",
    extra="eval",
    opens_model=True,
)
CALIBRATE: Final = Command(
    target="steerbridge.cli.calibrate:calibrate",
    summary="Fit a package's thresholds to a runtime and quantisation.",
    opens_model=True,
)
REPORT: Final = Command(
    target="steerbridge.cli.report:write",
    summary="Write evaluations as one HTML or Markdown file.",
    extra="report",
)
SCHEMA: Final = Command(
    target="steerbridge.cli.schema:schema",
    summary="Print the JSON Schema of steering_config.json.",
)
SCORE: Final = Command(
    target="steerbridge.cli.score:score",
    summary="Show what a package's probes say of every token of a text.",
    opens_model=True,
)
