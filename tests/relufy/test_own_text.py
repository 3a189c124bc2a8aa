"""recipes/smollm2-135m/own_text.py: its decoder against transformers, what it gives and draws, what it keeps."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from factories import make_folder
from transformers import AutoModelForCausalLM

_SCRIPT = Path(__file__).parents[2] / "recipes" / "smollm2-135m" / "own_text.py"


@pytest.fixture(scope="module")
def own_text() -> ModuleType:
    spec = importlib.util.spec_from_file_location("own_text", _SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory):
    folder = make_folder(tmp_path_factory.mktemp("own"), "llama")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_logits_are_those_of_transformers(own_text: ModuleType, model) -> None:
    ids = torch.randint(0, model.config.vocab_size, (3, 9), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        decoder = own_text.Decoder(model, rows=3, length=9)
        mine = torch.stack([decoder(ids[:, position], position) for position in range(9)], dim=1)
        torch.testing.assert_close(mine, model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", [{}, {"attention_bias": True}, {"mlp_bias": True}, {"hidden_act": "gelu"}])
def test_only_models_that_the_decoder_computes_are_taken(own_text: ModuleType, tmp_path: Path, change: dict) -> None:
    folder = make_folder(tmp_path / "hf", "llama")
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    assert own_text._is_known(folder / "config.json") is not bool(change)


def test_rows_begin_as_they_are_told_and_go_on_freely(own_text: ModuleType, model) -> None:
    starts = torch.tensor([[3, 4, 5], [3, -1, -1]])
    with torch.inference_mode():
        decoder = own_text.Decoder(model, rows=2, length=12)
    torch.manual_seed(1)
    first = own_text.write_rows(decoder, starts, 12, torch.full((2, 1), 0.8))
    second = own_text.write_rows(decoder, starts, 12, torch.full((2, 1), 0.8))
    assert first[0, :3].tolist() == [3, 4, 5] and first[1, 0] == 3
    assert first.tolist() != second.tolist()
    assert first.min() >= 0 and first.max() < model.config.vocab_size


def test_draws_have_the_probabilities_of_the_temperature(own_text: ModuleType) -> None:
    torch.manual_seed(0)
    logits = torch.tensor([0.0, 1.0, 2.0]).expand(60_000, 3)
    temperature = torch.tensor([[0.5], [2.0]]).repeat(30_000, 1)
    drawn = own_text.draw(logits, temperature)
    for row, heat in enumerate((0.5, 2.0)):
        shares = torch.bincount(drawn[row::2], minlength=3) / 30_000
        torch.testing.assert_close(shares, torch.softmax(torch.tensor([0.0, 1.0, 2.0]) / heat, 0), rtol=0, atol=0.012)


def test_records_are_documents_and_conversations_as_they_were_written(own_text: ModuleType) -> None:
    chat = "<|im_start|>user\nTwo and\ntwo?<|im_end|>\n<|im_start|>assistant\nFo"
    row = f"One.<|endoftext|> \n<|endoftext|>{chat}<|endoftext|>Th"
    assert [record["text"] for record in own_text.records(row)] == ["One.", chat, "Th"]
