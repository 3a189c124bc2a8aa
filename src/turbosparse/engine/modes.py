"""The names of the modes that decode a model, beside `dense`, `exact` and `predicted`."""

from __future__ import annotations

AUTOMATIC = ("auto", "auto-predicted")
LOSSLESS = "lossless"
