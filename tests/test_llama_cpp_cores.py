"""Threads for llama.cpp: cores, not processors, and no more than there is time for."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("llama_cpp")
from steerbridge_llama_cpp import cores


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Four processors, two threads on each of two cores; the process may use some of them."""

    def made(*usable, quota=""):
        for number in range(4):
            topology = tmp_path / f"cpu{number}" / "topology"
            topology.mkdir(parents=True, exist_ok=True)
            (topology / "physical_package_id").write_text("0\n")
            (topology / "core_id").write_text(f"{number % 2}\n")
        (tmp_path / "cpu.max").write_text(quota)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(usable), raising=False)
        return cores.physical_cores(tmp_path, tmp_path / "cpu.max")

    return made


def test_threads_of_one_core_count_once(machine):
    assert machine(0, 1, 2, 3) == 2
    assert machine(0, 2) == 1
    assert machine(1) == 1


@pytest.mark.parametrize(
    ("quota", "want"), [("max 100000", 2), ("100000 100000", 1), ("150000 100000", 2), ("1 2", 1)]
)
def test_a_quota_of_the_control_group_holds(machine, quota, want):
    assert machine(0, 1, 2, 3, quota=quota) == want


def test_what_cannot_be_seen_is_left_to_llama_cpp(tmp_path, machine, monkeypatch):
    assert machine(0, 7) is None
    assert cores.physical_cores(tmp_path / "none") is None
    monkeypatch.delattr(os, "sched_getaffinity")
    assert cores.physical_cores() is None


def test_a_model_is_opened_with_them(smollm2_path):
    from steerbridge_llama_cpp import open_model

    wanted = cores.physical_cores()
    if wanted is None:
        pytest.skip("the cores of this machine cannot be seen")
    assert open_model(smollm2_path, n_ctx=32).llama.n_threads == wanted
    assert open_model(smollm2_path, n_ctx=32, n_threads=1).llama.n_threads == 1
