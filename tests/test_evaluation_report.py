"""Records and reports of an evaluation."""

from __future__ import annotations

import json
import math

import pytest

import helpers
from scripted import REFUSAL, answer, row
from steerbridge.errors import DataError
from steerbridge.evaluation import record, report


def test_reports_are_of_what_was_measured(tmp_path):
    rows = [
        row(True, answer("<b>Sure</b>", 1), answer(REFUSAL, 2, score=0.9), "a|b"),
        row(False, answer("Hi", 1), answer("Hi", 1, score=0.1)),
        row(False, answer("Hi", 1), answer("Hi", 1, score=math.nan)),
    ]
    package = helpers.package()
    common = {"runtime": "hf", "model": "tiny", "quantisation": "F32", "judge": "matcher"}
    made = record.Evaluation(rows=rows, package=package, max_new_tokens=4, **common).to_json()
    path = tmp_path / "record.json"
    record.write(made, path)
    kept_record = record.read(path)
    assert kept_record["rows"][2]["verdicts"][0]["score"] is None
    for name in ("r.html", "r.md"):
        text = report.write([kept_record], package, tmp_path / name).read_text()
        assert "not finite" in text or name == "r.md"
        assert "<b>Sure" not in text
    assert "a\\|b" in text
    with pytest.raises(DataError, match="a record of test"):
        report.write([kept_record], helpers.package(seed=1), tmp_path / "r.html")
    with pytest.raises(DataError, match=r"\.html or \.md"):
        report.write([kept_record], package, tmp_path / "r.pdf")
    path.write_text(json.dumps({**made, "version": 99}))
    with pytest.raises(DataError, match="steerbridge-evaluation 99"):
        record.read(path)
    path.write_text("{}")
    with pytest.raises(DataError, match="a record of"):
        record.read(path)
