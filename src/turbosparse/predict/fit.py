"""Fit one predictor: which neurons of an FFN are worth computing for an input.

Score s = fc2 relu(fc1 x). Computing a neuron costs the same whatever it gives, and leaving it out loses what it does to
the model's output; so those with the largest expected effect should be selected. The loss of a token and neuron is a
weighted cross-entropy,

    m softplus(-s) + c softplus(s),    m = |h| sqrt(worth) over its mean in the layer,

whose best s is log(E[m | x] / c): it orders neurons by the effect that is expected of them, and one threshold for all
neurons of a layer selects best. `worth` is nats over h^2 (sensitivity.py), so m is in root nats: its square orders a
little better where few neurons are selected and no better at the thresholds that are used, and is harder to learn from.
`c` is about the m at which a neuron stops to be worth it.

The form has no bias (PowerInfer's has none), but inputs have a mean: one row of fc1 starts as the direction that comes
nearest to 1 on every token, and its column of fc2 as the neurons' own rates. The other rows start in the subspace that
explains most of the firing and fc2 at zero. fc1 is trained in whitened coordinates, for inputs of language models have
a few dimensions that are far larger than the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from turbosparse.relufy.quantized import q4_0, q8_0
from turbosparse.relufy.rounded import straight_through

BATCH = 512
RATE = 1e-2
COST = 0.1
LARGEST = 1000.0  # of m: a few are hundreds of times the mean, and would be all that a batch learns from
MOST_NATS = 1.0  # a neuron can cost: beyond, the sensitivities say nothing
_QUIET = 1e-2  # of the median eigenvalue: directions that vary less are left out
_LARGEST_HALF = torch.finfo(torch.float16).max
_STORED = {Type.Q4_0: q4_0, Type.Q8_0: q8_0}
_BIAS = 8.0  # the constant unit is this large, so that its column of fc2 is not much larger than the others


@dataclass(frozen=True)
class Tokens:
    """Tokens of one layer: x, float16 [tokens, hidden], its input, and mass, float16 [tokens, ffn], its |h|.

    They lie in files, or on the device that computes with them.
    """

    x: npt.NDArray[np.float16] | Tensor
    mass: npt.NDArray[np.float16] | Tensor

    def near(self, device: torch.device) -> Tokens:
        """In a GPU's memory where they, and copies of parts, take half of what is free there at most; else as they are.

        Batches are drawn from them at random, some thousand times: from a file that takes longer than a GPU's own part.
        """
        if device.type != "cuda" or 4 * (self.x.nbytes + self.mass.nbytes) > torch.cuda.mem_get_info(device)[0]:
            return self
        return Tokens(*(torch.as_tensor(array).to(device) for array in (self.x, self.mass)))

    def largest(self, device: torch.device) -> Tensor:
        """The largest |h| of every neuron, float32 [ffn]."""
        return torch.as_tensor(self.mass).amax(0).to(device).float()

    def where(self, chosen: npt.NDArray[np.bool_]) -> Tokens:
        """Those of the tokens for which `chosen` [tokens] is true."""
        x, mass = (
            array[torch.from_numpy(chosen)] if isinstance(array, Tensor) else array[chosen]
            for array in (self.x, self.mass)
        )
        return Tokens(x, mass)

    def batch(self, chosen: npt.NDArray[np.int64] | slice, device: torch.device) -> tuple[Tensor, Tensor]:
        """Some of them in float32."""
        x, mass = (torch.as_tensor(array[chosen]).to(device).float() for array in (self.x, self.mass))
        return x, mass


def half(values: Tensor) -> Tensor:
    """As Tokens hold them: float16, without infinities."""
    return values.half().clamp_(-_LARGEST_HALF, _LARGEST_HALF)


def nats(mass: Tensor, worth: Tensor) -> Tensor:
    """What leaving neurons out costs, each by itself; mass [..., ffn], worth [ffn]."""
    return (mass.square() * worth).clamp_max(MOST_NATS)


def root_nats(mass: Tensor, worth: Tensor) -> Tensor:
    """What |h| is multiplied by to be m, [ffn]; mass [tokens, ffn], worth [ffn]."""
    effect = worth.sqrt()
    return effect / (mass * effect).mean().clamp_min(1e-12)


def by_score(score: Tensor, m: Tensor) -> Tensor:
    """The gradient of the loss above by the scores, float32; both of one shape, summed over nothing."""
    return torch.sigmoid(score.float()).mul_(m + COST).sub_(m)


def fit(
    tokens: Tokens,
    worth: Tensor,
    rank: int,
    kind: Type,
    steps: int,
    seed: int,
    device: torch.device,
    progress: Callable[[float], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """fc1 [rank, hidden] and fc2 [ffn, rank], float32, to be stored as `kind`, which the second half trains for.

    Args:
        tokens: to learn from.
        worth: nats over h^2 of every neuron, float32 [ffn]; 0 for those that are not to be learned.
        rank, kind: the form.
        steps, seed: of the optimiser.
        device: where to compute.
        progress: called with the share that is done.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    count = len(tokens.x)
    sample = tokens.batch(np.sort(rng.permutation(count)[: 16 * 1024]), device)
    scale = root_nats(sample[1], worth.to(device))
    white = whitening(sample[0])
    rows, columns = start(sample[0], sample[1] * scale, white, rank)
    parameters = [rows.requires_grad_(), columns.requires_grad_()]
    optimizer = torch.optim.Adam(parameters, lr=RATE, betas=(0.9, 0.98), fused=device.type == "cuda")
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps, pct_start=0.1)
    for step in range(steps):
        x, mass = tokens.batch(rng.integers(count, size=min(BATCH, count)), device)
        mass = (mass * scale).clamp_max(LARGEST)
        fc1, fc2 = rows @ white.T, columns
        if 2 * step >= steps:
            fc1, fc2 = rounded(fc1, kind), rounded(fc2, kind)
        score = torch.relu(x @ fc1.T) @ fc2.T
        gradient = by_score(score.detach(), mass)  # the loss itself is never needed
        optimizer.zero_grad()
        score.backward(gradient / len(x))
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress((step + 1) / steps)
    with torch.no_grad():
        return rows @ white.T, columns.detach()


def start(x: Tensor, mass: Tensor, white: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """fc1 in whitened coordinates, [rank, hidden], and fc2, [ffn, rank], before training."""
    z = x @ white
    directions = telling(z, mass > 0)
    wide = directions[:, : min(2 * rank, directions.shape[1])]
    rows = (torch.randn(rank, wide.shape[1], device=x.device) / wide.shape[1] ** 0.5) @ wide.T
    rows[0] = _BIAS * z.mean(0) / z.mean(0).square().sum().clamp_min(1e-6)
    columns = torch.zeros(mass.shape[1], rank, device=x.device)
    columns[:, 0] = (mass.mean(0) / COST).clamp(1e-4).log() / _BIAS
    return rows, columns


def whitening(x: Tensor) -> Tensor:
    """W with E[(x W)^T (x W)] about one, float32 [hidden, hidden]; x are inputs [tokens, hidden], not centred.

    Directions that hardly vary are made smaller, not larger. Norms silence a dimension of the stream that is always
    large; enlarged to what others are, it would have the largest weights of fc1 without a use, and the others that
    share a block with it, and the block's scale, would be stored as zeros.
    """
    moments = (x.T @ x / len(x)).double()
    values, vectors = torch.linalg.eigh(moments)
    values = values.clamp_min(0.0)
    usual = values[-len(x) :].median()  # fewer inputs than dimensions say nothing about the others
    return (vectors * (values.sqrt() / (values + _QUIET * usual))).float()


def telling(z: Tensor, fires: Tensor) -> Tensor:
    """Directions of whitened inputs z [tokens, hidden], the one that explains most of `fires` [tokens, ffn] first.

    What linear maps of some rank can explain is known in closed form (reduced-rank regression: Izenman, J. Multivariate
    Analysis 5, 1975). Returns columns, [hidden, hidden].
    """
    cross = z.T @ (fires.float() - fires.float().mean(0)) / len(z)
    return torch.linalg.eigh(cross @ cross.T)[1].flip(1)


def rounded(matrix: Tensor, kind: Type) -> Tensor:
    """The matrix, float32 [..., columns], as `kind` would store it; gradients pass as if it were not rounded."""
    stored = _STORED.get(kind)
    return matrix if stored is None else straight_through(matrix, stored(matrix.detach()))
