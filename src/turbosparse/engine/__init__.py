"""Run a GGUF file on the CPU: numpy and the native module, never torch."""

from turbosparse.errors import UserError

try:
    import turbosparse._native  # noqa: F401
except ImportError as error:
    raise UserError(
        f"the native module of turbosparse is missing or broken ({error}); install turbosparse with pip."
    ) from None

from turbosparse.engine.engine import ActivationCounts, Engine, PhaseTime, Session, Traffic
from turbosparse.engine.generate import Chunk, generate
from turbosparse.engine.sampler import SamplingParams

__all__ = ["ActivationCounts", "Chunk", "Engine", "PhaseTime", "SamplingParams", "Session", "Traffic", "generate"]
