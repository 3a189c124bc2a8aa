"""A model in memory, ready to run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as Type

from turbosparse import _native
from turbosparse.engine.measures import ActivationCounts, PhaseTime, Traffic, read_counts, read_phases, read_traffic
from turbosparse.engine.modes import AUTOMATIC, LOSSLESS
from turbosparse.engine.session import Floats, Session
from turbosparse.engine.weights import Progress, load_tensors
from turbosparse.errors import UserError
from turbosparse.model.config import ModelConfig
from turbosparse.model.gguf import GGUFFile
from turbosparse.model.tokenizer import Tokenizer

_DEFAULT_CONTEXT = 4096
_CACHES = {"f16": Type.F16, "q8_0": Type.Q8_0}


class Engine:
    """A model in memory. Sessions share it; one runs at a time.

    Attributes:
        config: what the model is.
        tokenizer: its tokenizer.
        isa: instruction set of the kernels.
        threads: threads that compute, the caller's included.
        modes: "dense"; "exact" too for a ReLU-gated model, and "predicted" where its file holds predictors.
            Every model decodes in mode "lossless" too (`Session.decode_ahead`).
        automatic_modes: "auto", which computes each layer dense or exact, whichever costs less at the rates of a
            sequence's first tokens; and with predictors "auto-predicted", which may choose these too.
    """

    def __init__(
        self, config: ModelConfig, tokenizer: Tokenizer, model: _native.Model, threads: int, exact: bool
    ) -> None:
        self._exact = exact  # everything in fp32
        self.config, self.tokenizer, self.threads = config, tokenizer, threads
        self.isa = model.isa
        self.modes: tuple[str, ...] = ("dense", "exact") if config.sparse else ("dense",)
        if config.predictor is not None:
            self.modes += ("predicted",)
        self.automatic_modes = AUTOMATIC if config.predictor is not None else AUTOMATIC[:1]
        self._model = model
        self._forward = _native.Forward(model)
        self._costs = _native.Costs()  # of mode lossless

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        threads: int | None = None,
        compute: str = "int8",
        isa: str | None = None,
        progress: Progress | None = None,
    ) -> Engine:
        """Load a GGUF file.

        Args:
            path: the file.
            threads: default: every core that this process may use.
            compute: "int8" quantises activations for quantised weights; "f32" computes everything in fp32, on weights
                dequantised exactly: the yardstick.
            isa: "generic", "neon", "avx2", "avxvnni" or "avx512"; default: the best that this machine has.
            progress: called with (bytes done, bytes in all).

        Raises:
            UserError: the file or an option cannot be used.
        """
        if compute not in ("int8", "f32"):
            raise UserError(f"--compute {compute}: choose int8 or f32.")
        if isa is not None and isa not in _native.isas():
            raise UserError(f"--isa {isa}: this machine runs {', '.join(_native.isas())}.")
        threads = threads or _usable_cores()
        with GGUFFile.open(Path(path)) as file:
            config = ModelConfig.from_gguf(file)
            tokenizer = Tokenizer.from_gguf(file)
            model = _native.Model(config, isa or "", compute == "f32", threads)
            load_tensors(file, model, compute == "f32", progress)
        return cls(config, tokenizer, model, threads, compute == "f32")

    def session(self, context: int | None = None, cache: str | None = None) -> Session:
        """A new empty sequence.

        Args:
            context: room in tokens; default: the model's own context, at most 4096.
            cache: how keys and values are kept, "f16" or "q8_0"; default: f16, or f32 where all is computed in it.

        Raises:
            UserError: the model cannot have such a context or cache.
        """
        if context is None:
            context = min(self.config.context_length, _DEFAULT_CONTEXT)
        if not 1 <= context <= self.config.context_length:
            raise UserError(f"--ctx {context}: this model was trained on at most {self.config.context_length} tokens.")
        if cache not in (None, *_CACHES):
            raise UserError(f"--kv-cache {cache}: choose {' or '.join(_CACHES)}.")
        if cache == "q8_0" and self.config.head_dim % 32:
            raise UserError(f"--kv-cache q8_0: heads of {self.config.head_dim} are not whole blocks of 32; use f16.")
        default = Type.F32 if self._exact else Type.F16
        return Session(self, context, default if cache is None else _CACHES[cache])

    def decode_batch(self, sessions: Sequence[Session], tokens: Sequence[int], mode: str = "dense") -> Floats:
        """Read one token in each of several sessions, in one native call that reads every weight at most once.

        Args:
            sessions: of this engine, each once; at any positions.
            tokens: one for each.
            mode: of all of them.

        Returns:
            float32 [n, vocab], the logits after each token: bit for bit what `Session.decode` gives.

        Raises:
            UserError: as `Session.prefill`. Nothing is read then.
            ValueError: not one token a session, or a session that is given twice or belongs to another engine.
        """
        for session, token in zip(sessions, tokens, strict=True):
            session._check((token,), mode)
        out = np.empty((len(sessions), self.config.vocab_size), np.float32)
        native = [session._native for session in sessions]
        self._forward.decode(native, np.asarray(tokens, np.int32), self.native_mode(mode), out.reshape(-1))
        for session, logits in zip(sessions, out, strict=True):
            session._last = logits
        return out

    def native_mode(self, mode: str) -> str:
        """`mode`, or dense where an automatic one has no choice; of single tokens lossless is exact, or dense too."""
        if mode == LOSSLESS:
            return self.modes[:2][-1]
        return "dense" if mode in AUTOMATIC and not self.config.sparse else mode

    @property
    def weight_bytes(self) -> int:
        """Bytes that the packed weights take in memory."""
        return self._model.weight_bytes

    def count_activations(self, on: bool = True) -> None:
        """Start counting which neurons fire, from zero, or stop. Costs time while it is on."""
        self._model.count(on)

    def counters(self, reset: bool = False) -> ActivationCounts:
        """What was counted since `count_activations`, in prompts and in decoding, or since the last reset."""
        return read_counts(self._model, self.config, reset)

    def traffic(self, reset: bool = False) -> Traffic:
        """What decoding cost since the engine was made or since the last reset; prompts are not in it."""
        return read_traffic(self._model, self.config, reset)

    def time_phases(self, on: bool = True) -> None:
        """Start or stop timing the phases of decoding. Costs some 25 ns a phase and thread while it is on."""
        self._model.time_phases(on)

    def phases(self, reset: bool = False) -> dict[str, PhaseTime]:
        """What each phase of decoding took while it was timed, or since the last reset."""
        return read_phases(self._model, reset)

    def read_rate(self) -> float:
        """10^9 bytes/s at which the threads that decode read all weights once, doing nothing else with them."""
        return self._model.read_rate()


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
