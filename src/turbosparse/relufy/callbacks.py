"""What happens after a step of training beside the model's own."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback

from turbosparse.relufy.predictable import Predictors
from turbosparse.relufy.processes import any_process, this_process
from turbosparse.relufy.recipes import Stage
from turbosparse.relufy.schedule import learning_rate_share


class PredictorsStep(TrainerCallback):
    """Lets the predictors learn when the model has."""

    def __init__(self, predictors: Predictors, stage: Stage) -> None:
        self._predictors, self._stage = predictors, stage

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._predictors.step(learning_rate_share(self._stage, state.global_step / state.max_steps))


class TimeLimit(TrainerCallback):
    """Stops a stage, with a checkpoint to resume from, once its time is up."""

    def __init__(self, deadline: float | None) -> None:
        """Deadline: by `time.monotonic`; None: there is none."""
        self._deadline = deadline

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._deadline is None or state.global_step == state.max_steps:
            return
        if this_process().num_processes > 1 and state.global_step % state.logging_steps:
            return  # asking the others makes the GPUs wait; where a line is logged they do so anyway
        if any_process(time.monotonic() > self._deadline, args.device):
            control.should_save = control.should_training_stop = True
