"""Whether two ways to run a model agree: bit for bit, or within a relative error."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from turbosparse.engine import Engine

TOKENS = [int(token) for token in np.random.default_rng(3).integers(3, 300, size=101)]  # a block and an odd rest


def equal_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two float32 arrays hold the same bits (unlike ==, NaN and the sign of zero count)."""
    return np.array_equal(a.view(np.uint32), b.view(np.uint32))


def logits_error(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Relative error of each row [..., vocab] of logits, in the Euclidean norm."""
    return np.linalg.norm(ours - theirs, axis=-1) / np.linalg.norm(theirs, axis=-1)


def check_same_bits(path: Path, isa: str, threads: Sequence[int]) -> None:
    """Dense and exact mode, every number of threads, a prompt in blocks and token by token: the same logits."""
    reference = None
    for count in threads:
        engine = Engine.load(path, threads=count, isa=isa)
        assert (engine.isa, engine.threads) == (isa, count)
        for mode in ("dense", "exact"):
            blocks = engine.session().logits(TOKENS, mode)
            session = engine.session()
            single = np.stack([session.decode(token, mode) for token in TOKENS])
            reference = blocks if reference is None else reference
            assert equal_bits(blocks, reference) and equal_bits(single, reference), (count, mode)
