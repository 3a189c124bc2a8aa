"""Models with random weights that are as sparse as asked: for the speed of shapes that nobody has trained.

A random projection is positive half of the time. To make it positive at another rate, one channel in 32 of the residual
stream, the first of every quantisation block, holds the same constant for every token, and the weights that meet it put
an offset on the neuron's input: -theta standard deviations, where a normal variable exceeds theta at that rate. Gate
and up are independent, so h is non-zero at the product of their rates; which neurons fire depends on the token alone.
What attention and FFN add to the stream is small but for the last layer, which decides the next token.

Quantised weights are drawn as levels, uniformly, and never quantised: as much work to read as real ones, and a
7B model is written in a minute, one tensor in memory at a time.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFWriter
from tokenizers.pre_tokenizers import ByteLevel

from turbosparse.errors import UserError
from turbosparse.model.config import SYNTHETIC_KEY, ModelConfig
from turbosparse.model.export import QUANTS, replacing, storage_type
from turbosparse.model.export_metadata import architecture_of, write_hyperparameters, write_tokenizer
from turbosparse.model.gguf import GGUFFile, nbytes_of
from turbosparse.model.layout import EMBEDDING, TensorSpec, tensor_specs
from turbosparse.model.quantize import dequantize_rows
from turbosparse.model.vocabulary import CONTROL, NORMAL, UNUSED

Type = GGMLQuantizationType

_BLOCK = 32
_CONSTANT = 1.5  # of the constant channels, in standard deviations of the others; Q8_0 levels reach 1.7
_SMALL = 0.01  # root mean square of what a layer adds to the stream
_DECISIVE = 32.0  # of what the last layer adds: more than the token's own row of a tied output projection weighs
# Highest level and standard deviation of the random levels: of Q4_0's 16, the lowest is drawn as a second zero.
_LEVELS = {Type.Q4_0: (7, math.sqrt(2 * 140 / 16)), Type.Q8_0: (127, math.sqrt((255**2 - 1) / 12))}


@dataclass(frozen=True)
class Rates:
    """Shares of positive gates, positive ups and non-zero h, 0..1."""

    gate: float
    up: float
    h: float


def rates_for(sparsity: float, gate_rate: float) -> Rates:
    """The rates of a model with this sparsity of h whose gate is positive at `gate_rate`.

    Raises:
        UserError: no such model exists: h is zero wherever the gate is.
    """
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
) -> int:
    """Write a model with random weights as GGUF, replacing a file that is there.

    Args:
        out: the file.
        name: its `general.name`, behind "synthetic".
        config: of a dReLU model, or a SwiGLU one for the dense twin; `rates` are then those of gate and up alone.
        rates: see `rates_for`.
        quant: q4_0, q8_0 or f16, as in `export_gguf`.
        progress: called with (weights done, weights in all).

    Returns:
        the size of the file in bytes.

    Raises:
        UserError: the file cannot be written. Nothing is left then.
    """
    if quant not in QUANTS:
        raise UserError(f"--quant {quant[:40]}: choose one of {', '.join(QUANTS)}.")
    rng = np.random.Generator(np.random.SFC64(seed))
    specs = tensor_specs(config)
    with replacing(out) as partial:
        writer = GGUFWriter(partial, architecture_of(config))
        try:
            writer.add_name(f"synthetic {name}")
            writer.add_bool(SYNTHETIC_KEY, True)
            write_hyperparameters(writer, config, quant)
            write_tokenizer(writer, _tokenizer(config.vocab_size))
            for spec in specs:
                kind = storage_type(spec, quant)
                writer.add_tensor_info(
                    spec.name, spec.shape, np.dtype(np.float32), nbytes_of(kind, spec.shape), raw_dtype=kind
                )
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            done, total = 0, sum(math.prod(spec.shape) for spec in specs)
            for spec in specs:
                writer.write_tensor_data(_tensor(rng, spec, config, rates, storage_type(spec, quant)))
                done += math.prod(spec.shape)
                if progress is not None:
                    progress(done, total)
        finally:
            writer.close()
        return partial.stat().st_size


def measure_rates(path: str | os.PathLike[str], tokens: int = 64, neurons: int = 2048) -> Rates:
    """What the rates of a written file are: the first `neurons` of its first and last layer on random tokens."""
    with GGUFFile.open(path) as file:
        config = ModelConfig.from_gguf(file)
        ids = np.random.default_rng(1).integers(config.vocab_size, size=tokens)
        x = np.concatenate([dequantize_rows(file.tensors[EMBEDDING], int(i), int(i) + 1) for i in ids])
        x /= np.sqrt(np.square(x).mean(axis=1, keepdims=True))
        found = []
        for layer in (0, config.n_layers - 1):
            gate, up = (
                x @ dequantize_rows(file.tensors[f"blk.{layer}.ffn_{part}.weight"], 0, min(neurons, config.ffn_size)).T
                > 0
                for part in ("gate", "up")
            )
            found.append([gate.mean(), up.mean(), (gate & up).mean()])
    gate_rate, up_rate, h_rate = np.mean(found, axis=0).tolist()
    return Rates(gate_rate, up_rate, h_rate)


def _tensor(
    rng: np.random.Generator, spec: TensorSpec, config: ModelConfig, rates: Rates, kind: Type
) -> npt.NDArray[Any]:
    """One tensor as it is stored: float32 for norms and biases, uint8 [rows, bytes of a row] otherwise."""
    if spec.role == "norm":
        return np.ones(spec.shape, np.float32)
    if spec.role == "bias":
        return np.zeros(spec.shape, np.float32)
    spread, offset = _statistics(spec, config, rates)
    return random_rows(rng, spec.shape, kind, spread, offset)


def _statistics(spec: TensorSpec, config: ModelConfig, rates: Rates) -> tuple[float, float]:
    """Standard deviation of a matrix's weights, and the value of those that meet the constant channels."""
    hidden = config.hidden_size
    layer, part = spec.name.split(".")[1:3] if spec.name.startswith("blk.") else ("", "")
    if spec.name == EMBEDDING:
        return 1.0, _CONSTANT
    if part in ("ffn_gate", "ffn_up"):
        rate = rates.gate if part == "ffn_gate" else rates.up
        constants = hidden // _BLOCK
        theta = NormalDist().inv_cdf(1.0 - min(max(rate, 1e-6), 1.0 - 1e-6))
        spread = 1.0 / math.sqrt(hidden)
        return spread, -theta * spread * math.sqrt(hidden - constants) / (constants * _CONSTANT)
    if spec.role == "down":
        size = _DECISIVE if int(layer) == config.n_layers - 1 else _SMALL
        return size / math.sqrt(config.ffn_size * max(rates.h, 1e-3)), 0.0
    if part == "attn_output":
        return _SMALL / math.sqrt(spec.shape[1]), 0.0
    return 1.0 / math.sqrt(spec.shape[1]), 0.0


def random_rows(
    rng: np.random.Generator, shape: tuple[int, ...], kind: Type, spread: float, offset: float
) -> npt.NDArray[np.uint8]:
    """Random weights in the storage of `kind`, uint8 [rows, bytes of a row].

    Args:
        shape: (rows, columns); columns are whole blocks of 32 unless `kind` is F16 or F32.
        spread: standard deviation of the weights.
        offset: mean of the first weight of every block of 32 columns, where it is not 0; those weights are it, rounded
            up or down to a level at random.
    """
    rows, columns = shape
    if kind not in _LEVELS:
        values = rng.uniform(-math.sqrt(3), math.sqrt(3), shape).astype(np.float32) * np.float32(spread)
        if offset:
            values[:, ::_BLOCK] = offset
        stored = values.astype({Type.F16: np.float16, Type.F32: np.float32}[kind])
        return stored.view(np.uint8).reshape(rows, -1)
    highest, deviation = _LEVELS[kind]
    blocks = rows * columns // _BLOCK
    step = spread / deviation
    constant = None
    if offset:
        level = np.floor(offset / step + rng.random(blocks, np.float32))
        constant = np.clip(level, -highest, highest).astype(np.int8)
    out = np.empty((blocks, 2 + (16 if kind is Type.Q4_0 else 32)), np.uint8)
    out[:, :2] = np.frombuffer(np.float16(step).tobytes(), np.uint8)
    payload = out[:, 2:]
    if kind is Type.Q4_0:
        payload[:] = _Q4_0_BYTES[rng.integers(256, size=payload.shape, dtype=np.uint8)]
        if constant is not None:  # element 0 is the low half of byte 0
            payload[:, 0] = (payload[:, 0] & 0xF0) | (constant + 8).astype(np.uint8)
    else:
        levels = rng.integers(-highest, highest + 1, size=payload.shape, dtype=np.int8)
        if constant is not None:
            levels[:, 0] = constant
        payload[:] = levels.view(np.uint8)
    return out.reshape(rows, -1)


# Any byte to one without the level -8, which has no positive counterpart: it becomes 0.
_Q4_0_BYTES = np.array([(low or 8) | (high or 8) << 4 for high in range(16) for low in range(16)], np.uint8)


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
