"""Arguments and options that several stages share, so that one name means one thing everywhere."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Mode(StrEnum):
    """Which neurons are computed. `auto`: each layer dense or exact, whichever costs less; the result is the same.

    `lossless`: that of exact mode too, from drafts which exact passes over several tokens verify.
    """

    auto = "auto"
    dense = "dense"
    exact = "exact"
    predicted = "predicted"
    auto_predicted = "auto-predicted"
    lossless = "lossless"


class Compute(StrEnum):
    """Arithmetic of the matrix products: int8 activations (fast) or everything in fp32 (the yardstick)."""

    int8 = "int8"
    f32 = "f32"


class KvCache(StrEnum):
    """How keys and values are kept: q8_0 takes 17/32 of f16."""

    f16 = "f16"
    q8_0 = "q8_0"


class Isa(StrEnum):
    """Instruction sets of the native kernels."""

    generic = "generic"
    neon = "neon"
    avx2 = "avx2"
    avxvnni = "avxvnni"
    avx512 = "avx512"


_ENGINE, _SAMPLING = "Engine", "Sampling"

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A GGUF file, a bundled name or a hub id.")]
AnyModel = Annotated[str, typer.Argument(metavar="MODEL", help="A GGUF file or a Hugging Face folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Data = Annotated[
    Path, typer.Option("--data", metavar="FILE", help="Text: .txt, .jsonl (field `text`), or either with .zst.")
]
ModeOption = Annotated[
    Mode, typer.Option("--mode", rich_help_panel=_ENGINE, help="Which neurons are computed; see docs/usage.md.")
]
Audit = Annotated[
    float,
    typer.Option(
        "--audit",
        metavar="SHARE",
        rich_help_panel=_ENGINE,
        help="Of the tokens in predicted mode, computed exactly too to see what is missed; 0: none.",
    ),
]
AUDIT = 0.005
"""An audited token costs about 1.7 times a predicted one more, so this costs less than 1 %."""
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, max=1024, rich_help_panel=_ENGINE, help="Default: all cores.")
]
ContextLength = Annotated[
    int | None,
    typer.Option(
        "--ctx", min=1, rich_help_panel=_ENGINE, help="Context in tokens. Default: the model's, at most 4096."
    ),
]
KvCacheOption = Annotated[
    KvCache | None,
    typer.Option(
        "--kv-cache",
        rich_help_panel=_ENGINE,
        help="Storage of keys and values. Default: f16; f32 with --compute f32.",
    ),
]
ComputeOption = Annotated[
    Compute,
    typer.Option("--compute", rich_help_panel=_ENGINE, help="int8: fast. f32: weights and activations in fp32."),
]
IsaOption = Annotated[
    Isa | None, typer.Option("--isa", rich_help_panel=_ENGINE, help="Default: the best that this CPU has.")
]
MaxTokens = Annotated[int, typer.Option("--tokens", "-n", min=1, help="How many tokens to generate at most.")]
Temperature = Annotated[
    float, typer.Option("--temperature", min=0.0, rich_help_panel=_SAMPLING, help="0: always the likeliest token.")
]
TopK = Annotated[int, typer.Option("--top-k", min=0, rich_help_panel=_SAMPLING, help="Keep the k likeliest; 0: all.")]
TopP = Annotated[
    float,
    typer.Option("--top-p", min=0.0, max=1.0, rich_help_panel=_SAMPLING, help="Keep the likeliest up to this mass."),
]
MinP = Annotated[
    float,
    typer.Option(
        "--min-p", min=0.0, max=1.0, rich_help_panel=_SAMPLING, help="Drop below this share of the likeliest."
    ),
]
RepetitionPenalty = Annotated[
    float, typer.Option("--repetition-penalty", min=1e-6, rich_help_panel=_SAMPLING, help="Over 1: repeat less.")
]
Seed = Annotated[int, typer.Option("--seed", min=0, rich_help_panel=_SAMPLING, help="Same seed, same text.")]
Stop = Annotated[
    list[str] | None, typer.Option("--stop", rich_help_panel=_SAMPLING, help="End before this text; may be repeated.")
]
IgnoreEos = Annotated[
    bool, typer.Option("--ignore-eos", rich_help_panel=_SAMPLING, help="Go on after the end-of-text token.")
]
