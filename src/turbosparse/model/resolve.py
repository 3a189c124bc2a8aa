"""What a user calls MODEL: a GGUF file, the name of a model that comes with the project, or a repository of the hub."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from turbosparse.errors import UserError
from turbosparse.model.gguf_parts import part_names, whole_name

MODELS_VARIABLE = "TURBOSPARSE_MODELS"
_SUFFIX = ".gguf"
_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?::(?P<choice>[\w./-]+))?")
# A quantisation at the end of a file's name, which a user may leave out.
_QUANT = re.compile(r"[._-](i?q\d\w*|b?f(16|32))$", re.IGNORECASE)


def resolve_gguf(model: str | Path) -> Path:
    """The GGUF file behind MODEL.

    Tried in this order: a path; a bundled name such as `TurboSparse-SmolLM2-135M` (any case, with or without the
    quantisation) of the folder in TURBOSPARSE_MODELS or of `models/` in a source checkout; a hub id
    `owner/name[:file.gguf or quantisation]`, which is downloaded into huggingface_hub's cache. Of a model in several
    files it is the first, and all are downloaded.

    Raises:
        UserError: nothing is found, several files would do, or MODEL is a Hugging Face folder.
    """
    name = str(model)
    path = Path(name)
    if path.is_dir():
        _refuse_folder(path)
    if path.is_file():
        return path
    bundled = bundled_models()
    found = _match(name, bundled)
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{name} may be any of {_names(found)}; give the whole name.")
    hub_id = _HUB_ID.fullmatch(name)
    if hub_id and not name.startswith((".", "/", "~")) and not (path.suffix == _SUFFIX and ":" not in name):
        return _download(hub_id["repo"], hub_id["choice"])
    known = _names(bundled) or "none"
    raise UserError(
        f"{name!r} is not a GGUF file, a bundled model ({known}) or a hub id owner/name; check the path or the name."
    )


def bundled_models() -> list[Path]:
    """GGUF files of the folder in TURBOSPARSE_MODELS and of the source checkout, sorted by name."""
    folders = [Path(__file__).resolve().parents[3] / "models"]
    if os.environ.get(MODELS_VARIABLE):
        folders.insert(0, Path(os.environ[MODELS_VARIABLE]))
    by_name: dict[str, Path] = {}
    for folder in folders:
        for file in folder.glob(f"*{_SUFFIX}"):
            if _begins(file.name):
                by_name.setdefault(file.name.lower(), file)
    return [by_name[name] for name in sorted(by_name)]


def _match(name: str, files: Iterable[Path]) -> list[Path]:
    """Files of this name: the whole name if there is one, else those that differ in the quantisation alone."""
    wanted = name.lower().removesuffix(_SUFFIX)
    files = list(files)
    stems = {file: whole_name(file.name.lower()).removesuffix(_SUFFIX) for file in files}
    exact = [file for file in files if wanted in (stems[file], file.stem.lower())]
    return exact or [file for file in files if _QUANT.sub("", stems[file]) == wanted]


def _begins(name: str) -> bool:
    """Whether a file is a whole model, or the first part of one."""
    return part_names(name)[0] == name


def _names(files: Iterable[Path]) -> str:
    return ", ".join(file.stem for file in files)


def _refuse_folder(path: Path) -> None:
    if (path / "config.json").is_file():
        raise UserError(
            f"{path} is a Hugging Face folder; the engine runs one file: "
            f"`turbosparse export {path} {path.name or 'model'}{_SUFFIX}`."
        )
    files = sorted(path.glob(f"*{_SUFFIX}"))
    inside = f"; it holds {_names(files[:5])}" if files else ""
    raise UserError(f"{path} is a folder{inside}; give the path of one GGUF file.")


def _download(repo: str, choice: str | None) -> Path:
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        if not (choice and choice.lower().endswith(_SUFFIX)):
            files = [name for name in HfApi().list_repo_files(repo) if name.lower().endswith(_SUFFIX)]
            choice = _choose(repo, files, choice)
        first, *_ = [Path(hf_hub_download(repo, name)) for name in part_names(choice)]
        return first
    except LocalEntryNotFoundError as error:
        raise UserError(f"{repo} cannot be reached and is not in the cache; check the connection.") from error
    except HfHubHTTPError as error:
        raise UserError(f"{repo} is not on the hub, or needs a login, or lacks {choice or 'files'}.") from error
    except ValueError as error:
        raise UserError(f"{repo} is not a valid hub id (owner/name); check the name.") from error
    except Exception as error:  # the HTTP client's own errors: no network, no name server, time-out
        if isinstance(error, UserError):
            raise
        raise UserError(f"{repo} cannot be downloaded ({type(error).__name__}); check the connection.") from error


def _choose(repo: str, files: list[str], choice: str | None) -> str:
    """The one file that is meant, the first of its parts; quantisations are told by the end of the name."""
    files = [name for name in files if _begins(name)]
    if choice:
        end = re.compile(rf"(^|[._-]){re.escape(choice)}{re.escape(_SUFFIX)}$", re.IGNORECASE)
        files = [name for name in files if end.search(whole_name(name))]
    if len(files) == 1:
        return files[0]
    if not files:
        raise UserError(f"{repo} has no GGUF file{f' {choice}' if choice else ''}; give another repository.")
    shown = ", ".join(files[:8])
    raise UserError(f"{repo} has several GGUF files; give one as {repo}:FILE ({shown}).")
