"""Models with random weights that are as sparse as asked: for the speed of shapes that nobody has trained.

A random projection is positive half of the time. To make it positive at another rate, one channel in 32 of the residual
stream, the first of every quantisation block, holds the same constant for every token, and the weights that meet it put
an offset on the neuron's input: -theta standard deviations, where a normal variable exceeds theta at that rate. Gate
and up are independent, so h is non-zero at the product of their rates; which neurons fire depends on the token alone.
What attention and FFN add to the stream is small but for the last layer, which decides the next token.

With a predictor (synthetic_predictor.py), gates and ups are not independent of each other: neurons share directions.

Quantised weights are drawn as levels, uniformly, and never quantised: as much work to read as real ones, and a
7B model is written in a minute, some rows in memory at a time.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFWriter
from tokenizers.pre_tokenizers import ByteLevel

from turbosparse.errors import UserError
from turbosparse.model.config import ModelConfig, Predictor
from turbosparse.model.config_gguf import SYNTHETIC_KEY
from turbosparse.model.export import QUANTS, TensorStream, replacing, storage_type
from turbosparse.model.export_metadata import architecture_of, write_hyperparameters, write_tokenizer
from turbosparse.model.gguf import GGUFFile, nbytes_of
from turbosparse.model.layout import EMBEDDING, TensorSpec, tensor_specs
from turbosparse.model.quantize import dequantize_rows
from turbosparse.model.synthetic_predictor import Directions, Prediction, predictor_ranks, probes
from turbosparse.model.synthetic_rows import BLOCK, Rows, random_rows
from turbosparse.model.vocabulary import CONTROL, NORMAL, UNUSED

Type = GGMLQuantizationType

_CONSTANT = 1.5  # of the constant channels, in standard deviations of the others; Q8_0 levels reach 1.7
_SMALL = 0.01  # root mean square of what a layer adds to the stream
_DECISIVE = 32.0  # of what the last layer adds: more than the token's own row of a tied output projection weighs
_CHUNK = 1 << 20  # weights in memory at a time
_SPARSITY, _GATE_RATE = 0.9, 0.25  # unless others are asked for


@dataclass(frozen=True)
class Rates:
    """Shares of positive gates, positive ups and non-zero h, 0..1.

    Where they were measured on a file with predictors: `selected`, the neurons that these select over those that fire,
    and `recall`, the share of those that fire that is selected.
    """

    gate: float
    up: float
    h: float
    selected: float | None = None
    recall: float | None = None


def rates_for(sparsity: float | None, gate_rate: float | None, mirrored_ups: bool = False) -> Rates:
    """The rates of a model with this sparsity of h whose gate is positive at `gate_rate`; None: 0.9 and 0.25.

    Of mirrored ups a half is positive, so there each of the two follows from the other.

    Raises:
        UserError: no such model exists: h is zero wherever the gate is.
    """
    if not mirrored_ups:
        sparsity = _SPARSITY if sparsity is None else sparsity
        gate_rate = _GATE_RATE if gate_rate is None else gate_rate
    elif sparsity is None:
        sparsity = _SPARSITY if gate_rate is None else 1.0 - gate_rate / 2
    gate_rate = 2 * (1.0 - sparsity) if gate_rate is None else gate_rate
    if mirrored_ups and not math.isclose(gate_rate, 2 * (1.0 - sparsity), abs_tol=1e-6):
        raise UserError(
            f"--mirrored-ups with --sparsity {sparsity:g} and --gate-rate {gate_rate:g}: of the neurons whose gate is "
            "positive a half fires; give one of the two."
        )
    active = 1.0 - sparsity
    if not 0.0 < active <= gate_rate <= 1.0:
        raise UserError(
            f"--sparsity {sparsity:g} with --gate-rate {gate_rate:g}: of the neurons whose gate is positive some must "
            "fire and no others; give 0 < 1 - sparsity <= gate rate <= 1."
        )
    return Rates(gate_rate, active / gate_rate, active)


def write_synthetic(
    out: Path,
    name: str,
    config: ModelConfig,
    rates: Rates,
    quant: str,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    prediction: Prediction | None = None,
    ternary_gates: bool = False,
) -> int:
    """Write a model with random weights as GGUF, replacing a file that is there.

    Args:
        out: the file.
        name: its `general.name`, behind "synthetic".
        config: of a dReLU model, or a SwiGLU one for the dense twin; `rates` are then those of gate and up alone.
        rates: see `rates_for`.
        quant: q4_0, q8_0 or f16, as in `export_gguf`.
        seed: of the weights.
        progress: called with (weights done, weights in all).
        prediction: of the predictors; None: the file holds none.
        ternary_gates: gates of three values, as relufy/ternary.py trains them; not beside predictors.

    Returns:
        the size of the file in bytes.

    Raises:
        UserError: the file cannot be written. Nothing is left then.
    """
    if quant not in QUANTS:
        raise UserError(f"--quant {quant[:40]}: choose one of {', '.join(QUANTS)}.")
    if ternary_gates and prediction is not None:
        raise UserError("--ternary-gates needs no predictors: add --predictor-share 0.")
    model = _Model(config, rates, quant, seed, prediction, ternary_gates)
    with replacing(out) as partial:
        writer = GGUFWriter(partial, architecture_of(config))
        try:
            writer.add_name(f"synthetic {name}")
            writer.add_bool(SYNTHETIC_KEY, True)
            write_hyperparameters(writer, model.config, quant)
            write_tokenizer(writer, _tokenizer(config.vocab_size))
            _write_tensors(writer, model, progress)
        finally:
            writer.close()
        return partial.stat().st_size


def measure_rates(path: str | os.PathLike[str], tokens: int = 256, neurons: int = 2048) -> Rates:
    """What the rates of a written file are: the first `neurons` of its first and last FFN on random tokens."""
    with GGUFFile.open(path) as file:
        config = ModelConfig.from_gguf(file)
        group = config.neurons_per_gate
        neurons = min(neurons, config.ffn_size) // group * group
        ids = np.random.default_rng(1).integers(config.vocab_size, size=tokens)
        x = np.concatenate([dequantize_rows(file.tensors[EMBEDDING], int(i), int(i) + 1) for i in ids])
        x /= np.sqrt(np.square(x).mean(axis=1, keepdims=True))
        ending = "_exps.weight" if config.experts else ".weight"
        found = []
        for layer, expert in ((0, 0), (config.n_layers - 1, config.ffns - 1)):

            def product(
                part: str, inputs: npt.NDArray[np.float32], layer: int = layer, expert: int = expert
            ) -> npt.NDArray[np.float32]:
                tensor = file.tensors[f"blk.{layer}.{part}{ending}"]
                few = {
                    "fc1": tensor.shape[-2],
                    "ffn_gate": neurons // group,
                    "ffn_up": neurons // config.neurons_per_up,
                }
                rows = few.get(part, neurons)
                start = expert * tensor.shape[-2]
                outputs: npt.NDArray[np.float32] = inputs @ dequantize_rows(tensor, start, start + rows).T
                return outputs

            gate, ups = (product("ffn_gate", x) > 0).repeat(group, axis=1), product("ffn_up", x)
            up = np.stack([ups > 0, ups < 0], axis=2).reshape(gate.shape) if config.mirrored_ups else ups > 0
            fires, selected = gate & up, np.ones_like(gate)
            if config.predictor is not None:
                thresholds = np.reshape(config.predictor.thresholds, (config.n_layers, config.ffns))
                selected = product("fc2", np.maximum(product("fc1", x), 0)) >= thresholds[layer, expert]
            found.append([each.mean() for each in (gate, up, fires, selected, selected & fires)])
    gate_rate, up_rate, h_rate, selected_rate, hit_rate = np.mean(found, axis=0).tolist()
    if config.predictor is None or h_rate == 0:
        return Rates(gate_rate, up_rate, h_rate)
    return Rates(gate_rate, up_rate, h_rate, selected_rate / h_rate, hit_rate / h_rate)


class _Model:
    """The weights, drawn tensor by tensor and in each a few rows at a time."""

    def __init__(
        self,
        config: ModelConfig,
        rates: Rates,
        quant: str,
        seed: int,
        prediction: Prediction | None,
        ternary_gates: bool,
    ) -> None:
        self._rates, self._quant, self._seed, self._ternary_gates = rates, quant, seed, ternary_gates
        self._rng = np.random.Generator(np.random.SFC64(seed))
        self.config = config
        self._directions: tuple[int, list[Directions]] | None = None  # the last layer's that was asked for
        if prediction is not None:
            ranks = predictor_ranks(config, prediction.share)
            self.config = dataclasses.replace(config, predictor=Predictor(ranks, (0.0,) * len(ranks), "normed"))
            thresholds = self._thresholds(prediction.selected)
            self.config = dataclasses.replace(config, predictor=Predictor(ranks, thresholds, "normed"))
        self.specs = tensor_specs(self.config)

    def kind(self, spec: TensorSpec) -> Type:
        return storage_type(spec, self._quant)

    def rows(self, spec: TensorSpec) -> Iterator[npt.NDArray[Any]]:
        """The tensor as it is stored, in parts: float32 of norms and biases, else uint8 [rows, bytes of a row]."""
        if spec.role in ("norm", "bias"):
            yield np.full(spec.shape, 1.0 if spec.role == "norm" else 0.0, np.float32)
            return
        *experts, rows, columns = spec.shape
        step = max(1, _CHUNK // columns)
        for expert in range(math.prod(experts)):
            for start in range(0, rows, step):
                yield self._part(spec, expert, start, min(start + step, rows))

    def _part(self, spec: TensorSpec, expert: int, start: int, stop: int) -> npt.NDArray[np.uint8]:
        kind = self.kind(spec)
        layer, part = _place(spec)
        if self.config.predictor is not None and part in ("ffn_gate", "ffn_up", "fc1", "fc2"):
            directions = self._directions_of(layer)[expert]
            if part == "fc1":
                return directions.fc1()[start:stop]
            if part == "fc2":
                return directions.fc2(start, stop, kind)
            return directions.matrix(part.removeprefix("ffn_"), start, stop)
        statistics = _statistics(spec, self.config, self._rates)
        if self._ternary_gates and part == "ffn_gate":
            statistics = dataclasses.replace(statistics, ternary=True)
        return random_rows(self._rng, (stop - start, spec.shape[-1]), kind, statistics)

    def _directions_of(self, layer: int) -> list[Directions]:
        """Of its FFNs. Made anew for each layer, from seeds of its own: all together are as large as the predictors."""
        if self._directions is None or self._directions[0] != layer:
            assert self.config.predictor is not None
            specs = {_place(spec): spec for spec in tensor_specs(self.config)}
            gate, up = specs[layer, "ffn_gate"], specs[layer, "ffn_up"]
            made = [
                Directions(
                    (self._seed, layer, expert) if self.config.experts else (self._seed, layer),
                    self.config.predictor.ranks[layer],
                    self.config.hidden_size,
                    self.kind(gate),
                    _statistics(gate, self.config, self._rates),
                    _statistics(up, self.config, self._rates),
                    self.config.ffn_size,
                    self.config.neurons_per_gate,
                    self.config.mirrored_ups,
                )
                for expert in range(self.config.ffns)
            ]
            self._directions = layer, made
        return self._directions[1]

    def _thresholds(self, selected: float) -> tuple[float, ...]:
        embedding = tensor_specs(self.config)[0]
        rng = np.random.Generator(np.random.SFC64((self._seed, 1 << 16)))
        rows = _statistics(embedding, self.config, self._rates)
        x = probes(rng, self.config.hidden_size, self.kind(embedding), rows)
        layers = range(self.config.n_layers)
        thresholds = tuple(each.threshold(x, selected) for layer in layers for each in self._directions_of(layer))
        self._directions = None  # their generators have been used
        return thresholds


def _write_tensors(writer: GGUFWriter, model: _Model, progress: Callable[[int, int], None] | None) -> None:
    sizes = {spec.name: nbytes_of(model.kind(spec), spec.shape) for spec in model.specs}
    for spec in model.specs:
        writer.add_tensor_info(
            spec.name, spec.shape, np.dtype(np.float32), sizes[spec.name], raw_dtype=model.kind(spec)
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    done, total = 0, sum(math.prod(spec.shape) for spec in model.specs)
    for spec in model.specs:
        stream: Any = TensorStream(model.rows(spec), sizes[spec.name])  # all that the writer asks of an array
        writer.write_tensor_data(stream)
        done += math.prod(spec.shape)
        if progress is not None:
            progress(done, total)


def _statistics(spec: TensorSpec, config: ModelConfig, rates: Rates) -> Rows:
    """A matrix's weights; its offsets meet the constant channels."""
    hidden = config.hidden_size
    layer, part = _place(spec)
    if spec.name == EMBEDDING:
        return Rows(1.0, _CONSTANT)
    if part in ("ffn_gate", "ffn_up"):
        rate = rates.gate if part == "ffn_gate" else rates.up
        constants = hidden // BLOCK
        theta = NormalDist().inv_cdf(1.0 - min(max(rate, 1e-6), 1.0 - 1e-6))
        spread = 1.0 / math.sqrt(hidden)
        return Rows(spread, -theta * spread * math.sqrt(hidden - constants) / (constants * _CONSTANT))
    if spec.role == "down":
        size = _DECISIVE if layer == config.n_layers - 1 else _SMALL
        return Rows(size / math.sqrt(config.ffn_size * max(rates.h, 1e-3)))
    if spec.role == "router":
        return Rows(1.0 / math.sqrt(hidden), 0.0)  # blind to the constants, which would favour some experts
    if part == "attn_output":
        return Rows(_SMALL / math.sqrt(spec.shape[-1]))
    return Rows(1.0 / math.sqrt(spec.shape[-1]))


def _place(spec: TensorSpec) -> tuple[int, str]:
    """Layer and part: (3, "ffn_gate") of that matrix, alone or of all experts; (-1, "") outside of layers."""
    if not spec.name.startswith("blk."):
        return -1, ""
    _, layer, part, *_ = spec.name.split(".")
    return int(layer), part.removesuffix("_exps")


def _tokenizer(vocab_size: int) -> dict[str, Any]:
    """A byte-level tokenizer of `vocab_size` tokens: the bytes, two spaces, an end of text, and names of no text."""
    bytes_ = sorted(ByteLevel.alphabet())
    tokens = [*bytes_, "\u0120\u0120", "<|end|>"]  # U+0120 is how a space is written
    end = len(tokens) - 1
    tokens += [f"<|{index}|>" for index in range(len(tokens), vocab_size)]
    types = [NORMAL] * end + [CONTROL] + [UNUSED] * (vocab_size - end - 1)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": ["\u0120 \u0120"],
        "tokenizer.ggml.eos_token_id": end,
        "tokenizer.ggml.add_bos_token": False,
    }
