"""Learning rate over a stage, as a share of its peak."""

from __future__ import annotations

import math

from turbosparse.relufy.recipes import Stage

_DECAY_SHARE = 0.3  # of the stage, for warmup_stable_decay


def learning_rate_share(stage: Stage, progress: float) -> float:
    """Share of the peak learning rate, 0..1, at `progress` 0..1 through the stage."""
    if progress < stage.warmup:
        return progress / stage.warmup
    low = stage.final_lr_share
    after_warmup = min(1.0, (progress - stage.warmup) / (1 - stage.warmup))
    if stage.schedule == "constant":
        return 1.0
    if stage.schedule == "linear":
        return 1.0 - (1.0 - low) * after_warmup
    if stage.schedule == "warmup_stable_decay":
        decayed = max(0.0, progress - (1 - _DECAY_SHARE)) / _DECAY_SHARE
        return 1.0 - (1.0 - low) * min(1.0, decayed)
    return low + (1.0 - low) * 0.5 * (1.0 + math.cos(math.pi * after_warmup))
