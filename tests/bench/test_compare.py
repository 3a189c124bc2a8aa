"""Interleaving, medians, and the machine's own figures."""

import os

import pytest

from turbosparse.bench.compare import Sample, compare, speedup
from turbosparse.bench.machine import (
    available_memory_bytes,
    busy_share,
    cpu_name,
    last_level_cache_bytes,
    peak_memory_bytes,
)


class Scripted:
    """A contestant that takes the given seconds, one entry a pass."""

    def __init__(self, mode: str, seconds: list[float], log: list[str]) -> None:
        self.mode, self._seconds, self._log = mode, iter(seconds), log

    def measure(self, prompt, decode_tokens):
        self._log.append(self.mode)
        seconds = next(self._seconds)
        return Sample(len(prompt), seconds, decode_tokens, seconds, bytes_read=100 * decode_tokens, zeros=0.5)


def test_rounds_are_interleaved_and_the_first_is_thrown_away():
    log: list[str] = []
    seen: list[tuple[int, int]] = []
    contestants = [Scripted("dense", [99, 2, 4, 3], log), Scripted("exact", [99, 1, 1, 9], log)]
    runs = compare(contestants, [1, 2], 6, 3, lambda done, total: seen.append((done, total)))
    assert log == ["dense", "exact"] * 4 and seen[-1] == (8, 8)
    dense, exact = runs
    assert (dense.decode_tok_s, exact.decode_tok_s) == (2.0, 6.0)  # medians: 3 s and 1 s
    assert dense.prefill_tok_s == pytest.approx(2 / 3) and dense.bytes_per_token == 100 and dense.sparsity == 0.5
    assert dense.gb_s == pytest.approx(200 / 1e9)
    assert speedup(runs, "exact") == 3.0 and speedup(runs, "predicted") is None


def test_a_peer_without_counters_has_no_bytes():
    class Peer:
        mode = "peer"

        def measure(self, prompt, decode_tokens):
            return Sample(len(prompt), 1.0, decode_tokens, 1.0)

    (run,) = compare([Peer()], [1], 2, 1)
    assert run.bytes_per_token is None and run.gb_s is None and run.sparsity is None


def test_the_machine_is_described(tmp_path):
    assert cpu_name() and peak_memory_bytes() > 1 << 20 and available_memory_bytes() > 1 << 20
    assert 0.0 <= busy_share(0.05) <= 1.0
    for index, size in enumerate(["32K", "2048K", "105M"]):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size + "\n")
    assert last_level_cache_bytes(tmp_path) == 105 << 20 or os.uname().sysname == "Darwin"


def test_a_container_has_less_memory_than_its_machine(tmp_path, monkeypatch):
    monkeypatch.setattr("turbosparse.bench.machine._machine_memory_bytes", lambda: 5_000_000)
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    assert available_memory_bytes(tmp_path) == 2_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory_bytes(tmp_path) == available_memory_bytes(tmp_path / "nowhere") == 5_000_000
