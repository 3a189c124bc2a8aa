"""What training reads: safetensors, never a pickle."""

import json

import pytest
import torch
from factories import make_folder
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

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


def _cut(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def _change(folder, **values):
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | values))


@pytest.mark.parametrize(
    "damage",
    [
        _cut,
        lambda folder: (folder / "model.safetensors").write_bytes(b"nothing of the kind"),
        lambda folder: _change(folder, intermediate_size=48),
        lambda folder: _change(folder, hidden_size="abc"),
    ],
)
def test_a_damaged_folder_is_one_sentence(tmp_path, damage):
    folder = make_folder(tmp_path / "hf", "llama", "drelu")
    damage(folder)
    with pytest.raises(UserError, match="cannot load the model"):
        load_model(folder)


def test_gemma_2_keeps_the_softcap_of_its_attention(tmp_path):
    folder = make_folder(tmp_path / "hf", "gemma2", attn_logit_softcapping=0.5)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        mine = load_model(folder)(ids).logits
        eager = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")(
            ids
        ).logits
        without = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")(
            ids
        ).logits
    torch.testing.assert_close(mine, eager)
    assert (without - eager).abs().max() > 1e-2 * eager.abs().max()


def test_a_folder_without_a_tokenizer_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="cannot load the tokenizer"):
        load_tokenizer(tmp_path)
