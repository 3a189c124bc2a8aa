"""To the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from turbosparse.errors import UserError, reason
from turbosparse.model.gguf_parts import files_of

# The model and what belongs to it; a stage's checkpoints and anything else that lies there stay here.
_PARTS = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.py", "README.md", "LICENSE*", "NOTICE*", "log.jsonl"]


def upload(folder: Path, ggufs: Sequence[Path], repository: str, private: bool) -> str:
    """Create the repository if need be and push a model folder and its GGUF files, all parts; returns the address.

    Raises:
        UserError: the hub refuses it or cannot be reached.
    """
    api = HfApi()
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=_PARTS)
        for file in [file for gguf in ggufs for file in files_of(gguf)]:
            api.upload_file(path_or_fileobj=file, path_in_repo=file.name, repo_id=repository)
    except LocalTokenNotFoundError:
        raise UserError(f"{repository}: nobody is logged in; run `hf auth login` first.") from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(
            f"{repository}: cannot be pushed ({reason(error)}); check the name and the connection."
        ) from None
    return str(address)
