import socket
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from turbosparse.errors import UserError
from turbosparse.model import resolve
from turbosparse.model.resolve import bundled_models, resolve_gguf


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A folder of bundled models."""
    folder = tmp_path / "models"
    folder.mkdir()
    for name in ("TurboSparse-SmolLM2-135M-Q4_0", "Other-1B.Q8_0", "Twin-Q4_0", "Twin-Q8_0", "plain", "Half-F16"):
        (folder / f"{name}.gguf").write_bytes(b"GGUF")
    monkeypatch.setenv("TURBOSPARSE_MODELS", str(folder))
    return folder


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("TurboSparse-SmolLM2-135M", "TurboSparse-SmolLM2-135M-Q4_0"),
        ("turbosparse-smollm2-135m", "TurboSparse-SmolLM2-135M-Q4_0"),
        ("TurboSparse-SmolLM2-135M-Q4_0", "TurboSparse-SmolLM2-135M-Q4_0"),
        ("turbosparse-smollm2-135m-q4_0.gguf", "TurboSparse-SmolLM2-135M-Q4_0"),
        ("other-1b", "Other-1B.Q8_0"),
        ("twin-q8_0", "Twin-Q8_0"),
        ("Plain", "plain"),
        ("half", "Half-F16"),
    ],
)
def test_bundled_names(models, name, file):
    assert resolve_gguf(name) == models / f"{file}.gguf"


def test_a_path_goes_before_a_bundled_name(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain").write_bytes(b"x")
    assert resolve_gguf("plain") == Path("plain")
    assert resolve_gguf(str(models / "plain.gguf")) == models / "plain.gguf"


def test_a_name_that_fits_two_files(models):
    with pytest.raises(UserError, match="Twin-Q4_0, Twin-Q8_0"):
        resolve_gguf("twin")


@pytest.mark.parametrize("name", ["nonsense", "missing.gguf", "a/b/c", "./owner/name", "models/x.gguf", "", "a b/c"])
def test_what_is_nothing_lists_the_bundled_names(models, name, monkeypatch):
    if not name:
        monkeypatch.chdir(models / "..")
    with pytest.raises(UserError) as caught:
        resolve_gguf(name or "\x00")
    assert "Other-1B.Q8_0" in str(caught.value)


def test_a_hugging_face_folder_gets_the_hint_to_export(tmp_path):
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"turbosparse export .*my-model my-model\.gguf"):
        resolve_gguf(str(folder))


def test_another_folder(models, tmp_path):
    with pytest.raises(UserError, match="Other-1B"):
        resolve_gguf(str(models))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is a folder; give"):
        resolve_gguf(str(tmp_path / "empty"))


def test_without_the_variable_the_checkout_is_searched(monkeypatch):
    monkeypatch.delenv("TURBOSPARSE_MODELS", raising=False)
    checkout = Path(resolve.__file__).resolve().parents[3]
    assert {file.parent for file in bundled_models()} <= {checkout / "models"}


class Hub:
    """A hub that holds one repository."""

    def __init__(self, monkeypatch, files, error=None):
        self.files, self.error = files, error
        self.downloaded = []
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: self)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self.download)

    def list_repo_files(self, repo):
        if self.error:
            raise self.error
        return self.files

    def download(self, repo, name):
        if self.error:
            raise self.error
        self.downloaded.append(name)
        return f"/cache/{repo}/{name}"


@pytest.mark.parametrize(
    ("name", "files", "file"),
    [
        ("o/m", ["README.md", "m.gguf"], "m.gguf"),
        ("o/m:Q4_0", ["m-Q4_0.gguf", "m-Q8_0.gguf", "m-IQ4_0.gguf"], "m-Q4_0.gguf"),
        ("o/m:q8_0", ["m.Q4_0.gguf", "m.Q8_0.gguf"], "m.Q8_0.gguf"),
        ("o/m:sub/m.gguf", [], "sub/m.gguf"),
        ("o/m-GGUF:f16", ["a/m-f16.gguf", "a/m-bf16.gguf"], "a/m-f16.gguf"),
    ],
)
def test_hub_ids(monkeypatch, name, files, file):
    Hub(monkeypatch, files)
    assert resolve_gguf(name) == Path("/cache") / name.split(":")[0] / file


_PARTS = ["Q8/m-Q8_0-00001-of-00002.gguf", "Q8/m-Q8_0-00002-of-00002.gguf"]


@pytest.mark.parametrize("name", ["o/m", "o/m:Q8_0", f"o/m:{_PARTS[0]}", f"o/m:{_PARTS[1]}"])
def test_all_parts_of_a_model_are_downloaded(monkeypatch, name):
    hub = Hub(monkeypatch, [*reversed(_PARTS)])
    assert resolve_gguf(name) == Path("/cache/o/m") / _PARTS[0]
    assert hub.downloaded == _PARTS


@pytest.mark.parametrize("name", ["split-1b", "Split-1B-Q4_0", "split-1b-q4_0-00001-of-00002.gguf"])
def test_a_bundled_model_in_parts_is_its_first(models, name):
    for part in (1, 2):
        (models / f"Split-1B-Q4_0-0000{part}-of-00002.gguf").write_bytes(b"GGUF")
    assert resolve_gguf(name) == models / "Split-1B-Q4_0-00001-of-00002.gguf"
    assert not [file for file in bundled_models() if "00002-of" in file.name]


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        ("o/m", ["a.gguf", "b.gguf"], "several GGUF files; give one as o/m:FILE"),
        ("o/m", ["model.safetensors"], "no GGUF file"),
        ("o/m:Q2_K", ["m-Q4_0.gguf"], "no GGUF file Q2_K"),
    ],
)
def test_hub_repositories_without_one_choice(monkeypatch, name, files, message):
    Hub(monkeypatch, files)
    with pytest.raises(UserError, match=message):
        resolve_gguf(name)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (LocalEntryNotFoundError("offline"), "not in the cache"),
        (ConnectionError("no network"), "cannot be downloaded"),
        (socket.gaierror("no name"), "cannot be downloaded"),
        (RepositoryNotFoundError.__new__(RepositoryNotFoundError), "is not on the hub"),
        (ValueError("bad id"), "not a valid hub id"),
    ],
)
@pytest.mark.parametrize("name", ["o/m", "o/m:m.gguf"])
def test_hub_errors_are_one_sentence(monkeypatch, error, message, name):
    Hub(monkeypatch, ["m.gguf"], error)
    with pytest.raises(UserError, match=message) as caught:
        resolve_gguf(name)
    assert "\n" not in str(caught.value)
