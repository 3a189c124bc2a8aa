"""Models and tokenizers of Hugging Face folders, for training; what is wrong with one is said in a sentence."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from turbosparse.errors import UserError


def load_model(folder: str, dtype: torch.dtype) -> Any:
    """The causal language model of a folder, its weights in `dtype`.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"{folder}: cannot load the model ({first}); make one with `turbosparse convert`") from None


def load_tokenizer(folder: str) -> Any:
    """The tokenizer of a folder.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"{folder}: cannot load the tokenizer ({first}); put its tokenizer.json beside the model"
        ) from None
