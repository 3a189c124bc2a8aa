"""Run a GGUF file on the CPU: numpy and the native module, never torch."""

from turbosparse.errors import UserError

try:
    import turbosparse._native  # noqa: F401
except ImportError as error:
    raise UserError(
        f"the native module of turbosparse is missing or broken ({error}); install turbosparse with pip."
    ) from None

from turbosparse.engine.audit import AuditReport
from turbosparse.engine.drafting import Drafting
from turbosparse.engine.engine import Engine
from turbosparse.engine.generate import Chunk, draw_tokens, generate
from turbosparse.engine.measures import ActivationCounts, PhaseTime, Traffic
from turbosparse.engine.modes import LOSSLESS
from turbosparse.engine.sampler import SamplingParams
from turbosparse.engine.session import Session

__all__ = [
    "LOSSLESS",
    "ActivationCounts",
    "AuditReport",
    "Chunk",
    "Drafting",
    "Engine",
    "PhaseTime",
    "SamplingParams",
    "Session",
    "Traffic",
    "draw_tokens",
    "generate",
]
