"""Training in several processes, one a GPU, as torchrun starts them; without torchrun there is one.

Every process holds the whole model and sees its share of each batch; DistributedDataParallel averages the gradients
while they are being computed. The samples of a batch do not depend on how many processes share it.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from turbosparse.relufy.objective import Loss, Objective


def this_process() -> PartialState:
    """Which of the processes this one is; connects them on the first call."""
    return PartialState(cpu=not torch.cuda.is_available())


def is_shared() -> bool:
    """Whether torchrun started this process, be it as the only one: on a CPU accelerate wraps the model then too."""
    return torch.distributed.is_initialized()


class _LossOf(nn.Module):
    """A student and its objective as one module: DistributedDataParallel wants to see the forward pass of the loss."""

    def __init__(self, student: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.student = student
        self._objective = objective

    def forward(self, batch: dict[str, Tensor], progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        loss = self._objective(self.student, batch, progress)
        return loss.total, loss.metrics


def shared_loss(model: nn.Module, batch: dict[str, Tensor], progress: float) -> Loss:
    """The loss of a model that `share` wrapped; the metrics are those of this process's share of the batch."""
    return Loss(*model(batch, progress))


def share(student: nn.Module, objective: Objective, device: torch.device) -> nn.Module:
    """The student as DistributedDataParallel trains it, with the weights of process 0 in every process."""
    devices: dict[str, Any] = {"device_ids": [device.index]} if device.type == "cuda" else {}
    return DistributedDataParallel(_LossOf(student, objective), gradient_as_bucket_view=True, **devices)


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether `flag` holds in any process; all of them must ask."""
    if this_process().num_processes == 1:
        return flag
    shared = torch.tensor(float(flag), device=device)
    torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
    return bool(shared.item())
