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
from turbosparse.engine.engine import LOSSLESS, ActivationCounts, Engine, PhaseTime, Session, Traffic
from turbosparse.engine.generate import Chunk, draw_tokens, generate
from turbosparse.engine.sampler import SamplingParams

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
