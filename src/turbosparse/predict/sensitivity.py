"""What it costs to leave a neuron out, in nats of the model's own output.

Leaving out h of a neuron moves the output distribution by a KL divergence of about F h^2 / 2, where F is the mean
square of the gradient by h of the log-probability of a token that is drawn from the model: the diagonal of the Fisher
information. So neurons of all layers are measured in one unit, and their losses add up. The gradient goes back through
the model one layer at a time, from the streams that the forward pass has left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from turbosparse.errors import UserError
from turbosparse.model.config import ModelConfig
from turbosparse.model.gguf import GGUFFile
from turbosparse.predict.decoder import Decoder, embed, logits


def sensitivities(
    file: GGUFFile,
    config: ModelConfig,
    windows: Sequence[list[int]],
    device: torch.device,
    progress: Callable[[float], None],
) -> list[Tensor]:
    """F / 2 of every neuron, float32 [ffn] a layer: nats over the square of the h that is left out.

    The streams of all windows before all layers are in memory: windows * length * hidden * layers floats.

    Raises:
        UserError: the model computes what is not a number.
    """
    streams = [torch.stack([embed(file, config, window) for window in windows])]
    with torch.no_grad():
        for layer in range(config.n_layers):
            streams.append(Decoder(file, config, layer, device)(streams[-1].to(device))[0].cpu())
            progress((layer + 1) / (3 * config.n_layers))
    gradient = _gradient(file, config, streams.pop(), device)
    found = []
    for layer in reversed(range(config.n_layers)):
        decoder = Decoder(file, config, layer, device)
        total = torch.zeros(config.ffn_size, device=device)
        for index, window in enumerate(streams.pop()):
            before = window[None].to(device).requires_grad_()
            after, fired = decoder(before)
            by_stream, by_h = torch.autograd.grad(after, (before, fired.h), gradient[index : index + 1].to(device))
            total += by_h[0].square().sum(0)
            gradient[index] = by_stream[0].cpu()
        found.append((total / (2 * len(windows) * len(windows[0]))).cpu())
        progress(1 - 2 * layer / (3 * config.n_layers))
    return found[::-1]


def _gradient(file: GGUFFile, config: ModelConfig, streams: Tensor, device: torch.device) -> Tensor:
    """By the last stream, of the log-probabilities of tokens that the model draws; [windows, tokens, hidden]."""
    gradients = []
    generator = torch.Generator(device).manual_seed(0)
    to_logits = logits(file, config, device)
    for window in streams:
        stream = window.to(device).requires_grad_()
        log_p = torch.log_softmax(to_logits(stream), -1)
        if log_p.isnan().any():
            raise UserError(f"{file.path}: the model gives logits that are not numbers; the file is damaged.")
        drawn = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
        gradients.append(torch.autograd.grad(log_p.gather(1, drawn).sum(), stream)[0].cpu())
    return torch.stack(gradients)
