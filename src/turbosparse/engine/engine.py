"""A model in memory, ready to run, and the sequences that it works on."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Type

from turbosparse import _native
from turbosparse.engine.audit import AuditReport, Move
from turbosparse.engine.drafting import Drafting
from turbosparse.engine.sampler import SamplingParams, sample
from turbosparse.errors import UserError
from turbosparse.model.config import ModelConfig
from turbosparse.model.gguf import GGUFFile, GGUFTensor
from turbosparse.model.quantize import dequantize, quantize
from turbosparse.model.tokenizer import Tokenizer

Progress = Callable[[int, int], None]
Floats = npt.NDArray[np.float32]
Counts = npt.NDArray[np.int64]
Masses = npt.NDArray[np.float64]

_NATIVE_TYPES = frozenset({Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0})
_DEFAULT_CONTEXT = 4096
_CACHES = {"f16": Type.F16, "q8_0": Type.Q8_0}
_AUTOMATIC = ("auto", "auto-predicted")
LOSSLESS = "lossless"


@dataclass(frozen=True)
class ActivationCounts:
    """On how many of `tokens` tokens each neuron fired: int64 [layers, ffn], with experts [layers, experts, ffn].

    Attributes:
        tokens: that were read.
        gate, up, h: gate > 0, up > 0 and h != 0.
        selected, hit: selected by the predictor, and both selected and h != 0; None for a file without one. The recall
            of a layer is hit.sum() / h.sum().
        mass, missed: the sum of a neuron's |h|, and of that where the predictor did not select it, float64 in the same
            shape; None for a file without one.
        routed: how many tokens each expert computed, int64 [layers, experts]; None without experts.
    """

    tokens: int
    gate: Counts
    up: Counts
    h: Counts
    selected: Counts | None = None
    hit: Counts | None = None
    mass: Masses | None = None
    missed: Masses | None = None
    routed: Counts | None = None


@dataclass(frozen=True)
class Traffic:
    """What decoding cost: tokens, bytes of weights read for them, and shares of neurons (0..1, None without tokens).

    `active` is the share of neurons with h != 0 and `open` that with a positive gate, of those that were computed; both
    are None for a dense model. `selected` is the share that predictors selected, None where none did. What several
    sequences need together is read once and counts once.
    """

    tokens: int
    bytes: int
    active: float | None
    open: float | None
    selected: float | None = None

    @property
    def sparsity(self) -> float | None:
        """Share of exact zeros in h, and of neurons that a predictor took for silent."""
        return None if self.active is None else 1.0 - self.active


@dataclass(frozen=True)
class PhaseTime:
    """What a phase of decoding took (phases.h names them), summed over tokens.

    Attributes:
        seconds: on the wall, the mean of the threads.
        waited: those of them that were spent at barriers: threads that were done before others.
        bytes: of weights, and in attention of keys and values, that all threads read.
    """

    seconds: float
    waited: float
    bytes: int


class Session:
    """One sequence: a KV cache and the position in it. Made by `Engine.session`."""

    def __init__(self, engine: Engine, context: int, cache: Type) -> None:
        self._engine = engine
        self._native = _native.Session(engine._model, context, int(cache))
        self._speculation: _native.Speculation | None = None
        self._audited = 0.0
        self._last: Floats | None = None

    @property
    def position(self) -> int:
        """Tokens in the cache."""
        return self._native.position

    @property
    def context(self) -> int:
        """Tokens that fit."""
        return self._native.context

    @property
    def cache_bytes(self) -> int:
        """Bytes that its keys and values take when the context is full; memory is taken as it fills."""
        return self._native.cache_bytes

    def used(self, mode: str) -> str:
        """What `mode` came to in the last decoded token: itself, or for an automatic one the mode of all layers.

        Where the layers differ it is `mode` still, and while the rates are counted it is exact.
        """
        if mode == LOSSLESS:
            return mode
        mode = self._engine.native_mode(mode)
        chosen = set(self.choices)
        return chosen.pop() if mode in _AUTOMATIC and len(chosen) == 1 else mode

    @property
    def choices(self) -> tuple[str, ...]:
        """How the automatic modes compute each layer; exact while they still count, which is for 16 tokens."""
        return tuple(self._native.choices)

    def reset(self) -> None:
        """Forget everything."""
        self.truncate(0)

    def truncate(self, position: int) -> int:
        """Forget all tokens from `position` on; what is kept has the bits that it had.

        A layer that slides keeps little beyond its window: where it no longer holds what the next token would see,
        everything is forgotten. Returns the position reached, `position` or 0.
        """
        self._last = None
        return self._native.truncate(position)

    def keep_prefix(self, tokens: Sequence[int]) -> int:
        """Forget all but the tokens that `tokens` begins with too, and return how many these are.

        The last of `tokens` is not among them: it is what the next logits come from, so it has to be read.
        """
        pairs = zip(self._native.tokens, tokens[:-1], strict=False)
        kept = next((index for index, (ours, theirs) in enumerate(pairs) if ours != theirs), None)
        return self.truncate(min(self.position, len(tokens) - 1) if kept is None else kept)

    def prefill(self, tokens: Sequence[int], mode: str = "dense") -> Floats:
        """Read a prompt; returns the logits after its last token, float32 [vocab].

        In mode "predicted", and in the automatic ones, a prompt is computed exactly: together its tokens need most
        neurons anyway.

        Raises:
            UserError: it does not fit the context, or the mode is not one of the engine's.
        """
        self._check(tokens, mode)
        for start in range(0, len(tokens), _native.PREFILL_BLOCK):  # a call each, so that Ctrl-C is heard in between
            exactly = mode if mode == "dense" else self._engine.native_mode(LOSSLESS)
            self._last = self._read(tokens[start : start + _native.PREFILL_BLOCK], exactly)
        assert self._last is not None
        return self._last

    def logits(self, tokens: Sequence[int], mode: str = "dense") -> Floats:
        """Read tokens; returns the logits after each, as `decode` gives them: float32 [n, vocab]. Errors as there.

        Not in mode "auto-predicted", which chooses by what was decoded before.
        """
        if mode in _AUTOMATIC[1:]:
            raise UserError(f"mode {mode} is for decoding; use predicted.")
        self._check(tokens, mode)
        flat = self._read(tokens, self._engine.native_mode(mode), all_logits=True)
        rows = flat.reshape(len(tokens), self._engine.config.vocab_size)
        self._last = rows[-1]
        return rows

    def decode(self, token: int, mode: str = "dense") -> Floats:
        """Read one token in one native call; returns the logits after it, float32 [vocab]. Errors as in `prefill`."""
        self._engine.decode_batch((self,), (token,), mode)
        assert self._last is not None
        return self._last

    def sample(self, params: SamplingParams) -> int:
        """Draw the next token from the last logits; it still has to be decoded."""
        if self._last is None:
            raise ValueError("nothing to sample from: prefill first")
        history = self._native.tokens if params.repetition_penalty != 1.0 else []
        return sample(self._last, params, history, self.position)

    def decode_ahead(
        self, token: int, params: SamplingParams, most: int, ends: Collection[int] = frozenset()
    ) -> list[int]:
        """Read one token, and as many of those that follow as drafts foresee: mode lossless, in one native call.

        Args:
            token: to read, as in `decode`.
            params: how tokens are drawn.
            most: tokens to return at most.
            ends: tokens after which none is drawn.

        Returns:
            What `decode` in mode exact and `sample` give one by one, at least one token. All of them but the last have
            been read too.

        Raises:
            UserError: as `prefill`.
        """
        self._check((token,), LOSSLESS)
        out = np.empty(self._engine.config.vocab_size, np.float32)
        drawn = self._ahead.next(
            token,
            most,
            list(ends),
            params.temperature,
            params.top_k,
            params.top_p,
            params.min_p,
            params.repetition_penalty,
            params.seed,
            out,
        )
        self._last = out
        return drawn

    def audit(self, share: float, seed: int = 0) -> None:
        """Audit this share of the tokens that are decoded in predicted mode, drawn by `seed`; 0, none, costs nothing.

        Thresholds that no longer keep what the file promises are moved in this session; `audit_report` tells.

        Raises:
            UserError: it is no share.
        """
        if not 0 <= share <= 1:
            raise UserError(f"--audit {share:g}: give a share of the tokens from 0 to 1; 0 audits none.")
        self._audited = share
        self._native.begin_audit(share, seed, self._promised or [0.0] * self._engine.config.n_layers)

    @property
    def audit_report(self) -> AuditReport:
        """What the audit found so far."""
        verdicts, sums, moves = self._native.audit
        moved = tuple(Move(*each) for each in moves)
        return AuditReport(self._audited, self._promised, tuple(verdicts), tuple(sums), moved)

    @property
    def _promised(self) -> tuple[float, ...] | None:
        predictor = self._engine.config.predictor
        return predictor.recall if predictor is not None else None

    def follow(self, tokens: Sequence[int], agrees: Sequence[bool]) -> None:
        """For benchmarks: `decode_ahead` draws this text, whatever the logits say; both [tokens], by position.

        `agrees` says whether a predicted draft of a token is right. So the speed of a shape that nobody has trained can
        be timed at the acceptance of a model that somebody has.
        """
        self._ahead.follow(list(tokens), [int(each) for each in agrees])

    @property
    def drafting(self) -> Drafting:
        """What mode lossless did in this session."""
        return Drafting(*self._ahead.drafting)

    @property
    def _ahead(self) -> _native.Speculation:
        if self._speculation is None:
            engine = self._engine
            predicts, dense = "predicted" in engine.modes, not engine.config.sparse
            self._speculation = _native.Speculation(engine._forward, self._native, engine._costs, predicts, dense)
        return self._speculation

    def _check(self, tokens: Sequence[int], mode: str) -> None:
        if not tokens:
            raise UserError("the prompt holds no tokens; give it some text.")
        if len(tokens) > self.context - self.position:
            raise UserError(
                f"{len(tokens)} tokens do not fit the context of {self.context}, {self.position} of it used; use --ctx."
            )
        if mode not in (*self._engine.modes, *self._engine.automatic_modes, LOSSLESS):
            known = ", ".join(self._engine.modes)
            activation = self._engine.config.activation
            raise UserError(f"mode {mode} is not possible with this {activation} model; use {known}.")

    def _read(self, tokens: Sequence[int], mode: str, all_logits: bool = False) -> Floats:
        rows = len(tokens) if all_logits else 1
        out = np.empty(rows * self._engine.config.vocab_size, np.float32)
        self._engine._forward.read(self._native, np.asarray(tokens, np.int32), mode, all_logits, out)
        return out


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
        self.automatic_modes = _AUTOMATIC if config.predictor is not None else _AUTOMATIC[:1]
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
            _load_tensors(file, model, compute == "f32", progress)
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
        return "dense" if mode in _AUTOMATIC and not self.config.sparse else mode

    @property
    def weight_bytes(self) -> int:
        """Bytes that the packed weights take in memory."""
        return self._model.weight_bytes

    def count_activations(self, on: bool = True) -> None:
        """Start counting which neurons fire, from zero, or stop. Costs time while it is on."""
        self._model.count(on)

    def counters(self, reset: bool = False) -> ActivationCounts:
        """What was counted since `count_activations`, in prompts and in decoding, or since the last reset."""
        config = self.config
        ffns = config.n_layers * config.ffns
        routed = np.empty(ffns, np.int64)
        gate, up, h, selected, hit = (np.empty(ffns * config.ffn_size, np.int64) for _ in range(5))
        mass, missed = (np.empty(ffns * config.ffn_size, np.float64) for _ in range(2))
        tokens = self._model.read_counts(routed, gate, up, h, selected, hit, mass, missed, reset)
        shape = (config.n_layers, *((config.experts,) if config.experts else ()))
        gate, up, h, selected, hit = (array.reshape(*shape, config.ffn_size) for array in (gate, up, h, selected, hit))
        mass, missed = (array.reshape(*shape, config.ffn_size) for array in (mass, missed))
        counts = ActivationCounts(tokens, gate, up, h, routed=routed.reshape(shape) if config.experts else None)
        if config.predictor is None:
            return counts
        return dataclasses.replace(counts, selected=selected, hit=hit, mass=mass, missed=missed)

    def traffic(self, reset: bool = False) -> Traffic:
        """What decoding cost since the engine was made or since the last reset; prompts are not in it."""
        tokens, read, *counted = self._model.read_traffic(reset)
        neurons = tokens * self.config.n_layers * self.config.ffns_used * self.config.ffn_size
        if not (self.config.sparse and neurons > 0):
            return Traffic(tokens, read, None, None)
        active, opened, selected = (count / neurons for count in counted)
        return Traffic(tokens, read, active, opened, selected or None)

    def time_phases(self, on: bool = True) -> None:
        """Start or stop timing the phases of decoding. Costs some 25 ns a phase and thread while it is on."""
        self._model.time_phases(on)

    def phases(self, reset: bool = False) -> dict[str, PhaseTime]:
        """What each phase of decoding took while it was timed, or since the last reset."""
        phases = self._model.read_phases(reset)
        return {name: PhaseTime(seconds, waited, read) for name, seconds, waited, read in phases}

    def read_rate(self) -> float:
        """10^9 bytes/s at which the threads that decode read all weights once, doing nothing else with them."""
        return self._model.read_rate()


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _load_tensors(file: GGUFFile, model: _native.Model, exact: bool, progress: Progress | None) -> None:
    total = sum(tensor.data.size for tensor in file.tensors.values())
    done = 0
    model.after_piece(file.release_pages)  # the packed copy is enough: two of a large model may not fit
    for name, tensor in file.tensors.items():
        if len(tensor.shape) == 1:
            model.set_vector(name, dequantize(tensor.data, tensor.type, tensor.shape))
        for expert, matrix in enumerate(_matrices(tensor)):
            rows, columns = matrix.shape
            kind, data = _packable(matrix, exact)
            model.set_matrix(name, expert, int(kind), rows, columns, data)
        done += tensor.data.size
        if progress is not None:
            progress(done, total)
    model.finish()


def _matrices(tensor: GGUFTensor) -> Iterator[GGUFTensor]:
    """The matrix that a tensor is, or those of the experts that it holds; nothing of a vector."""
    if len(tensor.shape) == 2:
        yield tensor
    if len(tensor.shape) == 3:
        for data in tensor.data.reshape(tensor.shape[0], -1):
            yield dataclasses.replace(tensor, shape=tensor.shape[1:], data=data)


def _packable(tensor: GGUFTensor, exact: bool) -> tuple[Type, npt.NDArray[np.uint8]]:
    """A matrix in a type that has kernels; what has none is converted, to fp32 where results must be exact."""
    if tensor.type in _NATIVE_TYPES:
        return tensor.type, tensor.data
    columns = tensor.shape[1]
    values = dequantize(tensor.data, tensor.type, tensor.shape)
    if exact:
        return Type.F32, values.reshape(-1).view(np.uint8)
    kind = Type.F16 if columns % 32 else Type.Q8_0
    return kind, quantize(values, kind).reshape(-1)
