"""Batches of texts: every text once, little padding, never more memory than the budget."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from jinaclip import ClipModel, InputError
from jinaclip.backends.cost import (
    BUDGET_BYTES,
    CPU_COST,
    GPU_COST,
    PACKED_GPU_COST,
    UNPADDED_CPU_COST,
    RunCost,
    predicted_bytes,
    require_memory,
)
from jinaclip.backends.machine import available_memory, available_threads, cgroup_quota
from jinaclip.bundle.manifest import Bundle, TowerManifest
from jinaclip.packing import pack_texts

FULL = TowerManifest("text", "input_ids", "int64", {}, layers=24, width=1024, heads=16, hidden_size=4096)


@pytest.mark.parametrize("seed", range(20))
def test_every_text_is_in_one_batch_within_the_budget(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(3.4, 1.2, rng.integers(1, 300)), 2, 8192).astype(int).tolist()
    batches = pack_texts(lengths, FULL)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[i] for i in batch)
        fits = predicted_bytes(len(batch), longest, FULL) <= BUDGET_BYTES
        assert fits or len(batch) == 1
        assert len(batch) * longest <= CPU_COST.tokens or len(batch) == 1
    for cost in (UNPADDED_CPU_COST, GPU_COST, PACKED_GPU_COST):
        assert sorted(i for batch in pack_texts(lengths, FULL, cost=cost) for i in batch) == list(range(len(lengths)))


def test_batch_size_is_an_upper_bound() -> None:
    assert [len(b) for b in pack_texts([5] * 10, FULL, batch_size=4)] == [4, 4, 2]
    assert pack_texts([], FULL) == []


def work_of(batch: list[int], lengths: list[int], cost: RunCost) -> float:
    longest = max(lengths[i] for i in batch)
    padding = min(1, cost.padding + cost.padding_growth * longest)
    return sum(lengths[i] + padding * (longest - lengths[i]) for i in batch)


def cost_of(batches: list[list[int]], lengths: list[int], cost: RunCost) -> float:
    return sum(cost.opening_tokens + work_of(batch, lengths, cost) for batch in batches)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("padding", [(1, 0), (1 / 16, 1 / 1024), (1 / 4, 1 / 64)], ids=str)
def test_no_other_way_to_part_texts_is_cheaper(seed: int, padding: tuple[float, float]) -> None:
    """Against every way to part the texts, by length, into runs that may be. Binary fractions: sums are exact."""
    rng = np.random.default_rng(seed)
    cost = RunCost(int(rng.integers(1, 40)), 200, 1, BUDGET_BYTES, True, *padding)
    lengths = np.clip(rng.lognormal(3, 0.8, 11), 2, 250).astype(int).tolist()
    order = sorted(range(11), key=lambda i: -lengths[i])
    ways = []
    for cuts in range(1 << 10):
        edges = [0, *(i + 1 for i in range(10) if cuts >> i & 1), 11]
        batches = [order[a:b] for a, b in pairwise(edges)]
        if all(len(batch) == 1 or work_of(batch, lengths, cost) <= cost.tokens for batch in batches):
            ways.append(cost_of(batches, lengths, cost))
    assert cost_of(pack_texts(lengths, FULL, cost=cost), lengths, cost) == min(ways)


@pytest.mark.parametrize(("cost", "padding", "runs"), [(CPU_COST, 1.05, 90), (GPU_COST, 1.3, 30)], ids=["cpu", "gpu"])
def test_little_is_padding(cost: RunCost, padding: float, runs: int) -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(3.4, 0.8, 500), 2, 512).astype(int).tolist()
    batches = pack_texts(lengths, FULL, cost=cost)
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    assert padded / sum(lengths) < padding and len(batches) < runs
    assert len(pack_texts([cost.tokens // 128] * 256, FULL, cost=cost)) == 2


def test_where_padding_costs_little_texts_of_unequal_length_share_a_run() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(np.log(16), 0.7, 500), 4, 128).astype(int).tolist()
    few, many = (pack_texts(lengths, FULL, cost=cost) for cost in (UNPADDED_CPU_COST, CPU_COST))
    assert len(few) < len(many) / 1.5
    for batch in few:
        assert work_of(batch, lengths, UNPADDED_CPU_COST) <= 512
        assert len(batch) * max(lengths[i] for i in batch) < 1024  # places, which memory is reckoned by


def test_some_packings() -> None:
    assert pack_texts([9, 8, 9, 90], FULL) == [[3], [0, 2, 1]]
    assert pack_texts([9, 90], FULL, batch_size=2) == [[1, 0]]  # asked for, it is given
    assert pack_texts([7], FULL) == [[0]]


def test_one_long_text_does_not_pad_the_short_ones() -> None:
    batches = pack_texts([8192] + [10] * 40, FULL)
    assert batches[0] == [0]
    assert len(batches) == 2


def test_a_text_that_cannot_fit_is_refused_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jinaclip.backends.cost.available_memory", lambda: 2 << 30)
    require_memory(64, 32, FULL)
    with pytest.raises(InputError, match=r"8192 tokens needs about 9\.\d GiB .* 2\.0 GiB are free; lower max_length"):
        require_memory(1, 8192, FULL)


def test_memory_that_is_free_is_the_smaller_of_machine_and_cgroup(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 99 kB\nMemAvailable:    4096 kB\n")
    assert available_memory(tmp_path, tmp_path) == 4096 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory(tmp_path, tmp_path) == 4096 * 1024
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    assert available_memory(tmp_path, tmp_path) == 2000000
    assert (available_memory() or 0) > 0


def test_threads_follow_the_cgroup_quota(tmp_path: Path) -> None:
    assert cgroup_quota(tmp_path) is None
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert cgroup_quota(tmp_path) is None
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert cgroup_quota(tmp_path) == 1.5
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("-1\n")
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")
    assert cgroup_quota(tmp_path) is None
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("50000\n")
    assert cgroup_quota(tmp_path) == 0.5
    assert available_threads() >= 1


def test_threads_follow_affinity(small_bundle: Path) -> None:
    import os

    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert available_threads() == 1
        with ClipModel(small_bundle, towers=("text",)) as model:
            assert model.info()["towers"]["text"]["threads"] == 1
    finally:
        os.sched_setaffinity(0, before)


def test_sizes_for_the_prediction_come_from_the_bundle(small_bundle: Path) -> None:
    tower = Bundle(small_bundle).tower("text")
    assert (tower.layers, tower.width, tower.heads, tower.hidden_size) == (3, 128, 2, 512)


def test_a_long_text_and_thousands_of_short_ones_do_not_run_together_on_a_gpu() -> None:
    """Without padding their tokens would fit into one run, but attention would start blocks for every short text as if
    it were as long as the longest.
    """
    lengths = [8192, *[3] * 2700]
    runs = pack_texts(lengths, FULL, cost=PACKED_GPU_COST)
    assert [0] in runs and sorted(i for run in runs for i in run) == list(range(len(lengths)))
    assert len(pack_texts([40] * 400, FULL, cost=PACKED_GPU_COST)) == 1
