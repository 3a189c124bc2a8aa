"""Compare kinds of predictors on one model: bytes, what they find, what they select, and what the model's output loses.

python benchmarks/predictor_kinds.py MODEL.gguf TRAIN.jsonl HELD_OUT.jsonl OUT.json [--trained PREDICTORS.gguf ...]

Every kind gives scores; all are then treated alike: neurons that make attention sinks are always selected, and
thresholds follow one price for all layers, so that the layers keep the asked share of |h| on average
(turbosparse.predict). The whole model then runs with what each kind selects, its own errors in the inputs of later
layers included.

`--trained` are files of `turbosparse train-predictors`. The two fits that this script makes itself, on the FFN's input
and on the stream before attention, are short ones, to be compared with each other.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor
from torch.nn import functional

from turbosparse.bench.machine import cpu_name
from turbosparse.evaluate.windows import windows
from turbosparse.model.config import ModelConfig
from turbosparse.model.gguf import GGUFFile
from turbosparse.model.quantize import dequantize
from turbosparse.model.tokenizer import Tokenizer
from turbosparse.predict.calibrate import price_for
from turbosparse.predict.decoder import Decoder, embed, logits
from turbosparse.predict.fit import Tokens, fit, nats, whitening
from turbosparse.predict.measure import Curve
from turbosparse.predict.sensitivity import sensitivities

CPU = torch.device("cpu")
LENGTH = 512
TUNED = 3  # windows that set thresholds
BINS = 1024
BITS = 4.5  # of a weight in Q4_0, its share of the scale included
SCALE = 0.5  # of these, the scale
PLANES = 2  # of the four of a weight in Q4_0
DECAY = 0.8  # of what the last tokens fired
QUICK_STEPS = 150
QUICK_RANK = 64


@dataclass(frozen=True)
class Seen:
    """What a layer of some windows offers to a predictor, float32 [windows, tokens, ...].

    Attributes:
        x: the FFN's input.
        before: the stream before the layer's attention, normed without weights.
        last: decaying sum of what each neuron did at earlier tokens, in root nats.
        h: what it does now.
    """

    x: Tensor
    before: Tensor
    last: Tensor
    h: Tensor


@dataclass(frozen=True)
class Kind:
    """A kind of predictor: its bytes over those of the dense FFNs, and scores [windows, tokens, ffn] of a layer."""

    name: str
    share: float
    score: Callable[[int, Seen], Tensor]


class Model:
    """The whole model in memory, with its sensitivities."""

    def __init__(self, path: Path, train: Path, tokens: int) -> None:
        self.file = GGUFFile.open(path)
        self.config = ModelConfig.from_gguf(self.file)
        self.layers = [Decoder(self.file, self.config, layer, CPU) for layer in range(self.config.n_layers)]
        self.logits = logits(self.file, self.config, CPU)
        self.text = self.windows(train, tokens)
        self.worth = sensitivities(self.file, self.config, self.text[:8], CPU, lambda part: None)
        self.steady = [torch.zeros(self.config.ffn_size, dtype=torch.bool) for _ in self.layers]

    def windows(self, path: Path, tokens: int) -> list[list[int]]:
        """Whole windows of a text."""
        pieces = windows(Tokenizer.from_gguf(self.file), path, LENGTH, tokens)
        return [piece for piece in pieces if len(piece) == LENGTH]

    def weights(self, layer: int, name: str) -> Tensor:
        """A matrix of a layer, float32."""
        tensor = self.file.tensors[f"blk.{layer}.{name}.weight"]
        return torch.from_numpy(dequantize(tensor.data, tensor.type, tensor.shape))

    def run(self, pieces: list[list[int]], select: Callable[[int, Seen], Tensor] | None) -> Tensor:
        """The last stream; h becomes zero where `select` gives False."""
        stream = torch.stack([embed(self.file, self.config, piece) for piece in pieces])
        for layer, decoder in enumerate(self.layers):
            before = functional.rms_norm(stream, stream.shape[-1:])

            def keep(x: Tensor, h: Tensor, layer: int = layer, before: Tensor = before) -> Tensor:
                if select is None:
                    return h
                seen = Seen(x, before, earlier(h.abs() * self.worth[layer].sqrt()), h)
                return torch.where(select(layer, seen), h, 0.0)

            stream, _ = decoder(stream, keep)
        return stream


def earlier(effect: Tensor) -> Tensor:
    """Decaying sum over the tokens before each."""
    total, sums = torch.zeros_like(effect[:, 0]), []
    for token in effect.unbind(1):
        sums.append(total)
        total = DECAY * total + (1 - DECAY) * token
    return torch.stack(sums, 1)


def collect(model: Model) -> list[Seen]:
    """What every layer sees in the training text; sets which neurons are always selected, too."""
    seen: list[Seen] = []

    def note(layer: int, what: Seen) -> Tensor:
        seen.append(what)
        model.steady[layer] = nats(what.h.abs().amax((0, 1)), model.worth[layer]) >= 1.0
        return torch.ones_like(what.h, dtype=torch.bool)

    model.run(model.text, note)
    return seen


def scores(model: Model, kind: Kind, layer: int, seen: Seen) -> Tensor:
    """Those of the kind, and a very high one for neurons that are always selected."""
    return torch.where(model.steady[layer], 1e30, kind.score(layer, seen))


def curve(model: Model, kind: Kind, layer: int, seen: Seen) -> Curve:
    """As turbosparse.predict.measure.curve, from any scores, on a part of the text."""
    seen = Seen(*(part[:TUNED] for part in (seen.x, seen.before, seen.last, seen.h)))
    score, h = scores(model, kind, layer, seen).flatten().numpy(), seen.h.abs()
    tried = np.unique(np.append(np.quantile(score[::7], np.linspace(0, 1, BINS), method="lower"), score.min()))
    bins = np.searchsorted(tried, score, "right") - 1
    each = (torch.ones_like(h), (h > 0).float(), h, nats(h, model.worth[layer]))
    sums = np.stack([np.bincount(bins, part.flatten().numpy(), len(tried)) for part in each])
    sums = sums[:, ::-1].cumsum(1)[:, ::-1] / (h.shape[0] * h.shape[1])
    return Curve(tried.astype(np.float32), sums, sums[:, 0])


class Counter:
    """Selects neurons, and counts what is selected, found, kept and read."""

    def __init__(self, model: Model, kind: Kind, thresholds: list[float]) -> None:
        self._model, self._kind, self._thresholds = model, kind, thresholds
        self._sums = torch.zeros(len(model.layers), 8, dtype=torch.float64)

    def __call__(self, layer: int, seen: Seen) -> Tensor:
        chosen = scores(self._model, self._kind, layer, seen) >= self._thresholds[layer]
        gate = seen.x @ self._model.weights(layer, "ffn_gate").T > 0
        fires, mass = seen.h != 0, seen.h.abs()
        counted = (chosen, fires, chosen & fires, mass, mass * chosen, chosen & gate, gate, torch.ones_like(mass))
        self._sums[layer] = torch.tensor([float(part.sum(dtype=torch.float64)) for part in counted])
        return chosen

    def figures(self) -> dict[str, float]:
        """Means over layers, and the bytes of the FFNs that a token reads over those of dense ones."""
        selected, fires, hit, mass, kept, opened, gate, neurons = self._sums.T
        rows = (selected + opened + hit).sum() / (3 * neurons.sum())
        return {
            "selected_over_active": float((selected / fires).mean()),
            "selected_over_active_in_all": float(selected.sum() / fires.sum()),
            "recall": float((hit / fires).mean()),
            "mass_kept": float((kept / mass).mean()),
            "bytes_read": self._kind.share + float(rows),
            "exact_bytes_read": float((neurons + gate + fires).sum() / (3 * neurons.sum())),
        }


def compare(model: Model, ours: Tensor, exact: Tensor, pieces: list[list[int]]) -> dict[str, float]:
    """KL(exact || ours) and the difference of cross-entropies, means over tokens in nats."""
    divergence, more, count = 0.0, 0.0, 0
    for ours_of, exact_of, piece in zip(ours, exact, pieces, strict=True):
        p, q = (torch.log_softmax(model.logits(stream), -1) for stream in (exact_of, ours_of))
        divergence += float((p.exp() * (p - q)).sum())
        following = torch.tensor(piece[1:])[:, None]
        more += float((p[:-1].gather(1, following) - q[:-1].gather(1, following)).sum())
        count += len(piece)
    return {"kl": divergence / count, "cross_entropy_change": more / (count - len(pieces))}


def low_bits(w: Tensor, bits: int) -> Tensor:
    """A copy of a matrix with `bits` bits a weight and a scale for each block of 32, of least squares."""
    blocks = w.unflatten(-1, (-1, 32))
    levels = torch.arange(2**bits) - (2**bits - 1) / 2
    best, error = blocks, torch.full(blocks.shape[:-1], torch.inf)
    for factor in np.linspace(0.5, 1.1, 13) if bits > 1 else [1.0]:
        step = blocks.abs().amax(-1, keepdim=True) * factor / float(levels[-1])
        if bits == 1:
            step = 2 * blocks.abs().mean(-1, keepdim=True)
        near = ((blocks / step.clamp_min(1e-12) - 0.5).round() + 0.5).clamp(levels[0], levels[-1]) * step
        worse = (near - blocks).square().sum(-1)
        best, error = torch.where((worse < error)[..., None], near, best), torch.minimum(worse, error)
    return best.flatten(-2)


def plane(model: Model, layer: int, name: str, bits: int) -> Tensor:
    """The upper bits of each weight of a Q4_0 matrix, the others at the middle of what they can be."""
    w = model.weights(layer, name).unflatten(-1, (-1, 32))
    blocks = model.file.tensors[f"blk.{layer}.{name}.weight"].data.reshape(-1, 18)[:, :2].copy().view(np.float16)
    step = torch.from_numpy(blocks.astype(np.float32)).reshape(*w.shape[:-1], 1)
    whole = torch.where(step != 0, w / step + 8, 8.0).round()
    width = 2 ** (4 - bits)
    return (((whole / width).floor() * width + (width - 1) / 2 - 8) * step).flatten(-2)


def smaller(gate: Tensor, up: Tensor) -> Tensor:
    """Both must be positive: the smaller of the two, each over its standard deviation."""
    return torch.minimum(gate / gate.std((0, 1)).clamp_min(1e-9), up / up.std((0, 1)).clamp_min(1e-9))


def copies(model: Model, bits: int, what: str) -> Kind:
    """Products with copies of gate, or of gate and up, of few bits."""
    matrices = [
        [low_bits(model.weights(layer, name), bits) for name in (f"ffn_{part}" for part in what.split(" and "))]
        for layer in range(len(model.layers))
    ]
    share = len(matrices[0]) * (bits + SCALE) / BITS / 3
    return Kind(f"{bits}-bit copies of {what}", share, lambda layer, seen: products(seen.x, matrices[layer]))


def products(x: Tensor, matrices: list[Tensor]) -> Tensor:
    """A score of one matrix, or of two."""
    found = [x @ matrix.T for matrix in matrices]
    return smaller(*found) if len(found) == 2 else found[0] / found[0].std((0, 1)).clamp_min(1e-9)


def kinds(model: Model, seen: list[Seen], trained: list[Path]) -> Iterator[Kind]:
    """All of them, one at a time, since some take memory."""
    layers = range(len(model.layers))
    rates = [(part.h.abs() * worth.sqrt()).mean((0, 1)) for part, worth in zip(seen, model.worth, strict=True)]
    yield Kind("hot neurons", 0.0, lambda layer, now: rates[layer].expand_as(now.h))
    yield Kind("last tokens", 0.0, lambda layer, now: now.last + 0.1 * rates[layer])
    for bits in (1, 2, 3):
        yield copies(model, bits, "gate and up")
    yield copies(model, 2, "gate")
    planes = [[plane(model, layer, name, PLANES) for name in ("ffn_gate", "ffn_up")] for layer in layers]
    share = 2 * (PLANES + SCALE) / BITS / 3
    yield Kind(f"{PLANES} upper bits of gate and up", share, lambda layer, now: products(now.x, planes[layer]))
    signs = [[model.weights(layer, name).sign() for name in ("ffn_gate", "ffn_up")] for layer in layers]
    yield Kind("signs of x, gate and up", 2 / BITS / 3, lambda layer, now: products(now.x.sign(), signs[layer]))
    yield by_svd(model, seen, QUICK_RANK)
    for path in trained:
        low_rank = of_file(path, model)
        yield low_rank
        yield Kind(f"{low_rank.name} and last tokens", low_rank.share, with_last(model, seen, low_rank))
    yield quick(model, seen, "x")
    yield quick(model, seen, "before")


def of_file(path: Path, model: Model) -> Kind:
    """The predictors of a file."""
    with GGUFFile.open(path) as file:
        found = [
            [
                dequantize(t.data, t.type, t.shape)
                for t in (file.tensors[f"blk.{layer}.{fc}.weight"] for fc in ("fc1", "fc2"))
            ]
            for layer in range(len(model.layers))
        ]
        taken = sum(t.data.nbytes for name, t in file.tensors.items() if ".fc" in name)
    matrices = [[torch.from_numpy(matrix) for matrix in layer] for layer in found]
    share = taken / ffn_bytes(model)
    return Kind(f"low rank, trained, {share:.1%}", share, lambda layer, now: network(now.x, *matrices[layer]))


def ffn_bytes(model: Model) -> int:
    """Of all dense FFNs."""
    return sum(
        tensor.data.nbytes for name, tensor in model.file.tensors.items() if ".ffn_" in name and "norm" not in name
    )


def network(x: Tensor, fc1: Tensor, fc2: Tensor) -> Tensor:
    """The score of a low-rank predictor."""
    return torch.relu(x @ fc1.T) @ fc2.T


def rank_share(model: Model, rank: int, outputs: int) -> float:
    """Bytes of matrices [rank, hidden] and `outputs` times [ffn, rank] at Q4_0, over the FFN's."""
    hidden, ffn = model.config.hidden_size, model.config.ffn_size
    return rank * (hidden + outputs * ffn) / (3 * hidden * ffn)


def by_svd(model: Model, seen: list[Seen], rank: int) -> Kind:
    """Gate and up by the rank that loses least of their products with the text's inputs, nothing trained."""
    halves = []
    for layer, part in enumerate(seen):
        white = whitening(part.x.flatten(0, 1))
        both = torch.cat([model.weights(layer, name) for name in ("ffn_gate", "ffn_up")])
        left, values, right = torch.linalg.svd(both @ torch.linalg.inv(white).T, full_matrices=False)
        halves.append((right[:rank] @ white.T, left[:, :rank] * values[:rank]))

    def score(layer: int, now: Seen) -> Tensor:
        first, second = halves[layer]
        return smaller(*(now.x @ first.T @ second.T).chunk(2, -1))

    return Kind(f"low rank of gate and up, {rank}, not trained", rank_share(model, rank, 2), score)


def quick(model: Model, seen: list[Seen], which: str) -> Kind:
    """A short fit on one of the inputs."""
    matrices = []
    for layer, part in enumerate(seen):
        inputs = getattr(part, which).flatten(0, 1)
        tokens = Tokens(inputs.half().numpy(), part.h.abs().flatten(0, 1).clamp_max(65504).half().numpy())
        others = torch.where(model.steady[layer], 0.0, model.worth[layer])
        with torch.enable_grad():
            matrices.append(fit(tokens, others, QUICK_RANK, Type.F32, QUICK_STEPS, layer, CPU))
    name = {"x": "the FFN's input", "before": "the stream before attention"}[which]
    share = rank_share(model, QUICK_RANK, 1)
    return Kind(f"low rank, short fit, on {name}", share, lambda at, now: network(getattr(now, which), *matrices[at]))


def with_last(model: Model, seen: list[Seen], kind: Kind) -> Callable[[int, Seen], Tensor]:
    """Its scores plus as much of the logarithm of what the last tokens did as loses the fewest nats, in each layer."""
    factors = []
    for layer, part in enumerate(seen):
        base = kind.score(layer, part)
        recent = recency(part, model.worth[layer])
        count = int(1.5 * float((part.h != 0).float().mean()) * base.numel())
        cost = nats(part.h.abs(), model.worth[layer]).flatten()
        kept = {
            a: float(cost[(base + a * recent).flatten().topk(count).indices].sum()) for a in (0, 0.1, 0.2, 0.4, 0.8)
        }
        factors.append(max(kept, key=lambda a: kept[a]))
    return lambda layer, now: kind.score(layer, now) + factors[layer] * recency(now, model.worth[layer])


def recency(seen: Seen, worth: Tensor) -> Tensor:
    """The logarithm of what a neuron did at the last tokens, over the mean of all neurons."""
    mean = (seen.h.abs() * worth.sqrt()).mean().clamp_min(1e-12)
    return (seen.last / mean + 0.1).log()


def main() -> None:
    """Measure every kind that OUT does not have yet, and write after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "train", "held_out", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--trained", type=Path, nargs="*", default=[])
    parser.add_argument("--recall", type=float, nargs="*", default=[0.98])
    parser.add_argument("--tokens", type=int, default=8192, help="of the training text")
    parser.add_argument("--held-out-tokens", type=int, default=4096)
    options = parser.parse_args()
    model = Model(options.model, options.train, options.tokens)
    pieces = model.windows(options.held_out, options.held_out_tokens)
    record = {"date": time.strftime("%Y-%m-%d"), "machine": cpu_name(), "model": options.model.name, "kinds": []}
    if options.out.exists():
        record = json.loads(options.out.read_text())
    done = {(found["kind"], found["wanted_mass"]) for found in record["kinds"]}
    with torch.inference_mode(False), torch.no_grad():
        exact, seen = model.run(pieces, None), collect(model)
        for kind in kinds(model, seen, options.trained):
            wanted = [recall for recall in options.recall if (kind.name, recall) not in done]
            curves = [curve(model, kind, layer, part) for layer, part in enumerate(seen)] if wanted else []
            for recall in wanted:
                price = price_for(curves, recall)
                counter = Counter(model, kind, [float(found.score[found.best(price)]) for found in curves])
                loss = compare(model, model.run(pieces, counter), exact, pieces)
                found = {"kind": kind.name, "bytes": kind.share, "wanted_mass": recall, **counter.figures(), **loss}
                record["kinds"].append(found)
                print(json.dumps(found), flush=True)
                options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
