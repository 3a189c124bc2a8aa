"""What several tests of training start from."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from turbosparse.relufy.convert import convert


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense tiny Llama, its dReLU conversion, and two small domains."""
    folder = tmp_path_factory.mktemp("train")
    words = {"<eos>": 0, "<unk>": 1} | {f"w{i}": i + 2 for i in range(50)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 64}
    config = LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder / "dense")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", unk_token="<unk>")
    tokenizer.save_pretrained(folder / "dense")
    convert(folder / "dense", folder / "drelu")
    convert(folder / "dense", folder / "reglu", activation="reglu")
    rng = np.random.default_rng(0)
    for name in "ab":
        documents = ({"text": " ".join(f"w{j}" for j in rng.integers(50, size=40))} for _ in range(60))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    return folder
