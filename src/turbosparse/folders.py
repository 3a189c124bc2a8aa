"""Hugging Face folders: load a model or its tokenizer; what is wrong with one is said in a sentence. Needs torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from turbosparse.errors import UserError, reason

CONFIG = "config.json"


def check_folder(folder: Path, name: str | None = None) -> None:
    """Check that a folder holds a model at all, before torch is loaded, which takes seconds.

    Raises:
        UserError: it has no config.json; `name` is what the user calls it.
    """
    if not (folder / CONFIG).is_file():
        raise UserError(f"{name or folder}: has no {CONFIG}; give the folder of a Hugging Face checkpoint.")


def load_model(folder: str | Path, dtype: Any = "float32") -> Any:
    """The causal language model of a folder or hub id, sparse or dense, from safetensors.

    Args:
        folder: where it is.
        dtype: of the weights, a torch dtype or its name.

    Raises:
        UserError: torch is not installed, or there is no such model, or it cannot be read.
    """
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise UserError("Hugging Face folders need torch; install turbosparse[train], or export to GGUF.") from None
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True)
    except Exception as error:  # damaged weights and impossible configs make the library raise many kinds
        raise UserError(
            f"{folder}: cannot load the model ({reason(error)}); give the folder of a causal language model, or make "
            "one with `turbosparse convert`."
        ) from None
    if getattr(model.config, "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")  # the library's fast ones leave out Gemma 2's softcap
    return model


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a folder or hub id.

    Raises:
        UserError: transformers is not installed, or there is none, or it cannot be read.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise UserError("Hugging Face folders need torch; install turbosparse[train], or export to GGUF.") from None
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # as above; a damaged tokenizer.json even plain ones
        raise UserError(
            f"{folder}: cannot load the tokenizer ({reason(error)}); put its tokenizer.json beside the model."
        ) from None


def load_folder(folder: str | Path, dtype: str = "float32") -> tuple[Any, Any]:
    """(tokenizer, model) of a folder, ready to be read, on the GPU if there is one.

    Raises:
        UserError: as `check_folder`, `load_tokenizer` and `load_model`.
    """
    check_folder(Path(folder))
    tokenizer, model = load_tokenizer(folder), load_model(folder, dtype)
    import torch

    return tokenizer, model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


class PlainTokenizer:
    """A folder's tokenizer as `evaluate.windows.windows` wants it: text is text, whatever it quotes."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.eos_id: int | None = tokenizer.eos_token_id

    def encode(self, text: str, add_bos: bool | None = None) -> list[int]:
        # Without `split_special_tokens` a text that quotes "<eos>" would hold a control token.
        # Not verbose: a document may be longer than a context, since windows are cut from it.
        return list(self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True, verbose=False))
