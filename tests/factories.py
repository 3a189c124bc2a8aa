"""Tiny random models of every family, dense and sparse, with a real tokenizer: everything but the size is as in life.

`make_folder` writes a Hugging Face folder with a byte-level BPE tokenizer that was trained on a few lines, and a chat
template. tests/conftest.py offers them as session fixtures, so that each is made once.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf_files import copy_metadata
from tokenizers import Tokenizer, decoders, models, trainers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoConfig, AutoModelForCausalLM

from turbosparse.model.gguf import GGUFFile
from turbosparse.model.pretokenizers import PRE_TOKENIZERS
from turbosparse.relufy.drelu import FAMILIES as SPARSE
from turbosparse.relufy.rounded import settle_rounded
from turbosparse.relufy.ternary import use_ternary_gates

DENSE = "dense"
ACTIVATIONS = (DENSE, "drelu", "reglu")
# Family to the model type of its text model.
MODEL_TYPES = {key.removesuffix("_text"): key for key in SPARSE}
FAMILY_NAMES = tuple(MODEL_TYPES)
# Mixtures of experts, which are run but not converted.
MIXTURES = {"mixtral": "mixtral", "qwen3moe": "qwen3_moe"}

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = [
    "The quick brown fox jumps over the lazy dog, and it's 12345 times quicker than I'll ever be!",
    "def read(path):\n    with open(path) as file:\n        return file.read()\n\n# über façade",
    "日本語のテキスト, emoji 😀 and   runs   of    spaces\t\ttabs. If x + y = 7 and x = 3, then y = 4.",
] * 4
VOCAB_SIZE = 448

_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_OWN_HEADS = {"head_dim": 32}  # not hidden_size / heads, as these families allow
_GEMMA = {**_OWN_HEADS, "query_pre_attn_scalar": 32, "sliding_window": 8}
_FAMILY_SIZES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": None, "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0}},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {**_OWN_HEADS, "rms_norm_eps": 1e-5},
    "gemma2": {**_GEMMA, "num_hidden_layers": 3},
    # Six layers that slide by five, and one more.
    "gemma3": {**_GEMMA, "num_hidden_layers": 7},
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2},
    "qwen3moe": {
        **_OWN_HEADS,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
    },
}


def make_folder(folder: Path, family: str, activation: str = DENSE, seed: int = 0, **changes: Any) -> Path:
    """Write a tiny random model.

    Args:
        folder: to write; made if it is missing.
        family: one of `FAMILY_NAMES` or `MIXTURES`.
        activation: one of `ACTIVATIONS`.
        seed: of the weights.
        changes: to the values of its config.

    Returns:
        `folder`.
    """
    model_type = (MODEL_TYPES | MIXTURES)[family]
    values = {**_SIZES, **_FAMILY_SIZES[family], **changes}
    if activation == DENSE or family in MIXTURES:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **values))
    else:
        config_class, model_class = SPARSE[model_type]
        model = model_class(config_class(activation=activation, **values))
    _randomise(model, seed)
    model.float().save_pretrained(folder)
    if activation != DENSE and family in MIXTURES:  # no model class computes these: the dense folder by another name
        config = folder / "config.json"
        sparse = {"model_type": f"turbosparse_{model_type}", "activation": activation}
        config.write_text(json.dumps(json.loads(config.read_text()) | sparse))
    write_tokenizer(folder)
    return folder


def make_ternary_folder(folder: Path, **changes: Any) -> Path:
    """Write a tiny random dReLU Llama whose gates have three values a row; returns `folder`."""
    model = AutoModelForCausalLM.from_pretrained(make_folder(folder, "llama", "drelu", **changes), dtype=torch.float32)
    use_ternary_gates(model)
    settle_rounded(model)
    model.save_pretrained(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """Add the tokenizer and the chat template to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(_tokenizer_json(), encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[0],
        "eos_token": SPECIAL_TOKENS[2],
        "pad_token": SPECIAL_TOKENS[0],
        "add_bos_token": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


@cache
def _tokenizer_json() -> str:
    cuts = PRE_TOKENIZERS["smollm"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = cuts.build()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 8,  # so that the model has a few ids without a token, as real ones do
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer.to_str()


def _randomise(model: torch.nn.Module, seed: int) -> None:
    """Every parameter random, norms and biases too: what starts as ones or zeros would hide a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)


@dataclass(frozen=True)
class TinyPredictor:
    """Predictors: fc1 [rank, hidden], fc2 [ffn, rank] and a threshold a layer; None for a layer without one.

    Of experts: fc1 [experts, rank, hidden], fc2 [experts, ffn, rank] and thresholds [experts]. `recall` is what every
    layer promises to keep, or, as early files said it, all of them.
    """

    layers: list[tuple[np.ndarray, np.ndarray, float | np.ndarray] | None]
    normed: bool
    recall: float | list[float] | None = None


def add_predictor(source: Path, out: Path, predictor: TinyPredictor, kind: gguf.GGMLQuantizationType) -> Path:
    """Write the sparse file `source` again with predictors, stored as `kind`."""
    with GGUFFile.open(source) as file:
        writer = gguf.GGUFWriter(out, "turbosparse")
        copy_metadata(file, writer)
        ranks = [0 if layer is None else layer[0].shape[-2] for layer in predictor.layers]
        writer.add_array("turbosparse.predictor.rank", ranks)
        experts = file.metadata.get("turbosparse.expert_count", 1)
        thresholds = [np.broadcast_to(0.0 if layer is None else layer[2], experts) for layer in predictor.layers]
        writer.add_array("turbosparse.predictor.threshold", np.concatenate(thresholds).tolist())
        writer.add_string("turbosparse.predictor.input", "normed" if predictor.normed else "residual")
        if isinstance(predictor.recall, list):
            writer.add_array("turbosparse.predictor.recall", predictor.recall)
        elif predictor.recall is not None:
            writer.add_float32("turbosparse.predictor.recall", predictor.recall)
        for name, tensor in file.tensors.items():
            rows = tensor.data.reshape(*tensor.shape[:-1], -1)
            writer.add_tensor(name, rows if tensor.type != 0 else rows.view(np.float32), raw_dtype=tensor.type)
        for index, layer in enumerate(predictor.layers):
            for name, matrix in zip(("fc1", "fc2"), layer[:2] if layer else (), strict=False):
                stored = gguf.quants.quantize(matrix.astype(np.float32), kind)
                ending = "_exps" if matrix.ndim == 3 else ""
                writer.add_tensor(f"blk.{index}.{name}{ending}.weight", stored, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return out


def random_predictor(layers: int, hidden: int, ffn: int, rank: int, normed: bool, without: int = -1) -> TinyPredictor:
    """Predictors that know nothing and select about a half of the neurons; layer `without` has none."""
    rng = np.random.default_rng(rank)
    made: list[tuple[np.ndarray, np.ndarray, float] | None] = []
    for index in range(layers):
        fc1 = rng.standard_normal((rank, hidden)) / hidden**0.5
        fc2 = rng.standard_normal((ffn, rank)) / rank**0.5
        made.append(None if index == without else (fc1, fc2, 0.05 * (index + 1)))
    return TinyPredictor(made, normed)
