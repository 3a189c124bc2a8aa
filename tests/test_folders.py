"""What training reads: safetensors, never a pickle."""

import pytest
import torch
from factories import make_folder
from safetensors.torch import load_file

from turbosparse.errors import UserError
from turbosparse.folders import load_model, load_tokenizer


def test_a_folder_of_pickles_is_one_sentence(tmp_path):
    folder = make_folder(tmp_path / "hf", "llama", "drelu")
    assert load_model(folder).dtype is torch.float32
    weights = folder / "model.safetensors"
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(UserError, match="cannot load the model"):
        load_model(folder)


def test_a_folder_without_a_tokenizer_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="cannot load the tokenizer"):
        load_tokenizer(tmp_path)
