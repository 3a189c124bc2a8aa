"""Load a Hugging Face folder to evaluate it; needs torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from turbosparse.errors import UserError


def load_folder(folder: str | Path, dtype: str = "float32") -> tuple[Any, Any]:
    """(tokenizer, model) of a folder, sparse or dense, on the GPU if there is one.

    Raises:
        UserError: torch is not installed, or the folder is not a causal language model.
    """
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise UserError("Hugging Face folders need torch; install turbosparse[train], or export to GGUF.") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), use_safetensors=True)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"{folder} cannot be loaded with transformers ({reason}).") from error
    return tokenizer, model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
