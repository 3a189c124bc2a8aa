"""Fixtures of all tests: tiny models, each made once a session. Tests read them and write elsewhere."""

from __future__ import annotations

import gc
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest


def pytest_configure() -> None:
    """Hear Ctrl-C: a shell's background job ignores it, and so would the commands that tests interrupt."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Leave the tests and what they import out of garbage collection: Trainer asks for a full one at every turn."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """tiny_folder(family, activation="dense", group=1, mirrored=False) -> the Hugging Face folder of a tiny model.

    `group`: neurons that share a gate, in a sparse one; `mirrored`: two of these share an up.
    """

    @cache
    def make(family: str, activation: str = "dense", group: int = 1, mirrored: bool = False) -> Path:
        from factories import make_folder  # here, so that tests without a model do not wait for torch

        changes = {"neurons_per_gate": group, "mirrored_ups": mirrored} if group > 1 else {}
        return make_folder(tmp_path_factory.mktemp("tiny") / f"{family}-{activation}", family, activation, **changes)

    return make


@pytest.fixture(scope="session")
def tiny_gguf(tiny_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """tiny_gguf(family, activation="dense", quant="f32", group=1, mirrored=False) -> the same model as a GGUF file."""

    @cache
    def make(
        family: str, activation: str = "dense", quant: str = "f32", group: int = 1, mirrored: bool = False
    ) -> Path:
        from turbosparse.model.export import export_gguf

        out = tmp_path_factory.mktemp("gguf") / f"{family}-{activation}-{quant}.gguf"
        export_gguf(tiny_folder(family, activation, group, mirrored), out, quant)
        return out

    return make


@pytest.fixture(scope="session")
def benchmarks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder of `turbosparse eval` with a few items for every task."""
    from benchmark_files import write_benchmarks

    return write_benchmarks(tmp_path_factory.mktemp("benchmarks"))
