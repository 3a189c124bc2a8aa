"""What can be said against a conversion before torch is loaded, which takes seconds."""

from __future__ import annotations

import json
import re
from pathlib import Path

from turbosparse.errors import UserError
from turbosparse.folders import CONFIG, check_folder
from turbosparse.model.families import HF_PREFIX

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
DENSE_TYPES = ("llama", "mistral", "gemma2", "gemma3_text", "qwen2", "qwen3")  # those of drelu.FAMILIES


def check_source(source: str, out: Path, keep: bool) -> None:
    """Check where a conversion reads and writes, as far as file names and config.json tell.

    Args:
        source: a Hugging Face folder, a hub id or a GGUF file.
        out: the folder to write.
        keep: a sparse checkpoint will do too.

    Raises:
        UserError: `out` exists, or there is no checkpoint at `source` that can be converted.
    """
    if out.exists():
        raise UserError(f"{out}: exists already; choose another folder or remove it.")
    path = Path(source)
    if path.is_dir():
        check_checkpoint(path, source, keep)
    elif not path.is_file() and not HUB_ID.fullmatch(source):
        raise UserError(f"{source}: no such file or folder, and no hub id (owner/name); check the name.")


def check_checkpoint(folder: Path, source: str, keep: bool) -> bool:
    """Check that a folder holds weights and the config of a family that can be converted.

    Args:
        folder: where it lies.
        source: what the user calls it.
        keep: a sparse checkpoint will do too.

    Returns:
        whether it is sparse.

    Raises:
        UserError: it does not.
    """
    check_folder(folder, source)
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{source}: has no .safetensors file; pickled weights are not loaded, save it as safetensors.")
    try:
        model_type = str(json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("model_type"))
    except (ValueError, AttributeError, RecursionError):
        raise UserError(f"{source}: {CONFIG} is not a JSON object; the checkpoint is damaged.") from None
    sparse = model_type.startswith(HF_PREFIX)
    if sparse and not keep:
        raise UserError(f"{source}: is a sparse model already ({model_type}); convert the dense one.")
    if not sparse and model_type not in DENSE_TYPES:
        raise UserError(f"{source}: the model type {model_type[:60]!r} is not supported; {', '.join(DENSE_TYPES)} are.")
    return sparse
