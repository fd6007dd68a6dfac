"""Smaller packages: lower rank, other data types."""

from __future__ import annotations

import numpy as np
import pytest

from artifacts import sample
from steerbridge import load
from steerbridge.errors import ConversionError, WouldLose
from steerbridge.tensors import Tensor
from steerbridge_convert import convert


def test_rank_and_energy(tmp_path):
    ours = sample("steerbridge")
    ours.save(tmp_path / "dense")
    report = convert(tmp_path / "dense", tmp_path / "low.gguf", rank=4)
    matrix = ours.tensors["h.W"].float32()
    low = load(tmp_path / "low.gguf")
    approximated = low.tensors["h.u"].float32() @ low.tensors["h.v"].float32()
    error = np.linalg.norm(matrix - approximated) / np.linalg.norm(matrix)
    assert report.truncations[0].rank == 4
    assert abs(report.truncations[0].error - error) < 1e-5
    kept = convert(tmp_path / "dense", tmp_path / "most.gguf", energy=0.9).truncations[0]
    values = np.linalg.svd(matrix, compute_uv=False) ** 2
    assert values[: kept.rank].sum() >= 0.9 * values.sum() > values[: kept.rank - 1].sum()
    again = convert(tmp_path / "low.gguf", tmp_path / "same.gguf", rank=4).truncations[0]
    assert again.error < 1e-6
    for wrong in ({"rank": 0}, {"rank": 17}, {"energy": 0.0}, {"rank": 2, "energy": 0.5}):
        with pytest.raises(ConversionError):
            convert(tmp_path / "dense", tmp_path / "x.gguf", **wrong)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_dtypes(dtype, tmp_path):
    ours = sample("steerbridge")
    ours.save(tmp_path / "p")
    convert(tmp_path / "p", tmp_path / "q.gguf", dtype=dtype)
    for name, tensor in load(tmp_path / "q.gguf").tensors.items():
        assert tensor.dtype == dtype
        assert np.allclose(tensor.float32(), ours.tensors[name].float32(), rtol=1e-2, atol=1e-2)


def test_values_that_are_too_small_for_a_type_are_a_loss(tmp_path):
    ours = sample("steerbridge")
    small = {n: Tensor.of(1e-7 * t.float32()) for n, t in ours.tensors.items() if n == "h.W"}
    ours.replace(tensors={**ours.tensors, **small}).save(tmp_path / "p")
    with pytest.raises(WouldLose, match=r"tensor h\.W in F16: values too small"):
        convert(tmp_path / "p", tmp_path / "q.gguf", dtype="F16")
    assert not convert(tmp_path / "p", tmp_path / "q.gguf", dtype="BF16").losses
    large = {n: Tensor.of(1e7 * t.float32()) for n, t in ours.tensors.items() if n == "h.W"}
    ours.replace(tensors={**ours.tensors, **large}).save(tmp_path / "large")
    with pytest.raises(ConversionError, match=r"tensor h\.W: a value is too large for F16"):
        convert(tmp_path / "large", tmp_path / "r.gguf", dtype="F16")
