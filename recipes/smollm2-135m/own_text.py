"""Let a dense model write the text that a corpus lacks: the sparse model then learns from it what the dense one knows.

    python own_text.py MODEL OUT.jsonl --tokens 30_000_000 [--seconds S] [--seed N]

A model pre-trained on far more text than anybody has at hand still holds its distribution; samples of it are broad text
for distillation (data-free, as in LLM-QAT, arXiv 2305.17888). MODEL: a Hugging Face folder of a Llama that was tuned to
chat. Three rows of four begin with an end of text and go on with whatever comes, documents one after the other; the
fourth begins with a user's turn, and the model writes both sides (Magpie, arXiv 2406.08464). Half of the rows are
sampled at temperature 0.75, half at 0.9: at 1 a model of this size writes little that makes sense. OUT gets records
{"text"} as `turbosparse train` reads them.

All rows of a batch stand at the same position, so a step is one token for each of them: a plain forward pass over a
key-value cache, large enough (4096 rows) to keep a GPU busy without captured graphs.

Shapes: B rows, T positions, D hidden, H key-value heads, G query heads of each, K head size, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, AutoTokenizer

_TEMPERATURES = (0.75, 0.9)
# Not cuDNN's, which would plan anew for every length.
_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_FREE_START = 4  # tokens of every row drawn at temperature 1, for beginnings of many kinds
_END_OF_TEXT = "<|endoftext|>"


class Decoder:
    """The forward pass of a Llama for one token of each row, all rows at one position."""

    def __init__(self, model: Any, rows: int, length: int) -> None:
        config = model.config
        self.head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.kv_heads, self.eps = config.num_key_value_heads, config.rms_norm_eps
        self.groups = config.num_attention_heads // self.kv_heads
        self.embeddings, self.output = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        self.last_norm = model.model.norm.weight
        self.layers = [self._fused(layer) for layer in model.model.layers]
        cos, sin = model.model.rotary_emb(self.embeddings[:1], torch.arange(length, device=model.device)[None])
        self.cos_TK, self.sin_TK = cos[0], sin[0]
        shape = (len(self.layers), 2, rows, length, self.kv_heads, self.head)
        self.cache = torch.empty(shape, dtype=self.embeddings.dtype, device=model.device)

    def _fused(self, layer: Any) -> tuple[Tensor, ...]:
        attention, mlp = layer.self_attn, layer.mlp
        qkv = torch.cat([p.weight for p in (attention.q_proj, attention.k_proj, attention.v_proj)])
        gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
        norms = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        return (norms[0], qkv, attention.o_proj.weight, norms[1], gate_up, mlp.down_proj.weight)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.eps)

    def _attend(self, index: int, qkv_BN: Tensor, position: int) -> Tensor:
        rows, queries = qkv_BN.shape[0], self.kv_heads * self.groups
        heads = qkv_BN.view(rows, -1, self.head)
        turned = heads[:, : queries + self.kv_heads]
        left, right = turned.chunk(2, dim=-1)
        turned = turned * self.cos_TK[position] + torch.cat([-right, left], dim=-1) * self.sin_TK[position]
        self.cache[index, 0, :, position] = turned[:, queries:]
        self.cache[index, 1, :, position] = heads[:, queries + self.kv_heads :]
        keys, values = self.cache[index, :, :, : position + 1].transpose(2, 3)
        # The query heads of a key head stand as so many queries: keys and values are read once for all of them.
        query = turned[:, :queries].view(rows, self.kv_heads, self.groups, self.head)
        return F.scaled_dot_product_attention(query, keys, values).reshape(rows, -1)

    def __call__(self, ids_B: Tensor, position: int) -> Tensor:
        """Logits [B, V] of the tokens that follow `ids_B` at `position`; positions come in order from 0."""
        x = F.embedding(ids_B, self.embeddings)
        for index, (norm, qkv, out, mlp_norm, gate_up, down) in enumerate(self.layers):
            x = x + self._attend(index, self._norm(x, norm) @ qkv.T, position) @ out.T
            gate, up = (self._norm(x, mlp_norm) @ gate_up.T).chunk(2, dim=-1)
            x = x + (F.silu(gate) * up) @ down.T
        return self._norm(x, self.last_norm) @ self.output.T


def draw(logits_BV: Tensor, temperature_B1: Tensor) -> Tensor:
    """One token a row at its temperature, [B]: the winner of a race of exponentials, which needs no softmax."""
    race = torch.empty_like(logits_BV, dtype=torch.float32).exponential_().log_()
    return (logits_BV.float() / temperature_B1 - race).argmax(-1)


@torch.inference_mode()
@sdpa_kernel(_ATTENTION)
def write_rows(decoder: Decoder, starts_BP: Tensor, length: int, temperature_B1: Tensor) -> Tensor:
    """Sample rows of `length` tokens, int64 [B, length]; where `starts_BP` is not -1 it is taken instead."""
    rows, given = starts_BP.shape
    ids_BT = torch.empty((rows, length), dtype=torch.int64, device=starts_BP.device)
    ids_BT[:, 0] = starts_BP[:, 0]
    for position in range(length - 1):
        free = position < given + _FREE_START
        logits_BV = decoder(ids_BT[:, position], position)
        drawn = draw(logits_BV, torch.ones_like(temperature_B1) if free else temperature_B1)
        if position + 1 < given:
            drawn = torch.where(starts_BP[:, position + 1] < 0, drawn, starts_BP[:, position + 1])
        ids_BT[:, position + 1] = drawn
    return ids_BT


def records(text: str) -> Iterator[dict[str, Any]]:
    """What a row's text holds, one document after the other; conversations keep the marks of their turns, as text.

    What the row's end cuts off stays: dropping it would leave out a third of all tokens.
    """
    for document in text.split(_END_OF_TEXT):
        if document.strip():
            yield {"text": document, "source": "own"}


def _starts(tokenizer: Any, rows: int, device: torch.device) -> Tensor:
    """Given beginnings [B, P], -1 where the model writes: every fourth row a conversation, the others a text."""
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "@"}], tokenize=False).split("@")[0]
    prefix = tokenizer.encode(chat, add_special_tokens=False)
    starts = torch.full((rows, len(prefix)), -1, device=device)
    starts[:, 0] = tokenizer.convert_tokens_to_ids(_END_OF_TEXT)
    starts[::4] = torch.tensor(prefix, device=device)
    return starts


def _is_known(config: Path) -> bool:
    """Whether Decoder computes this model: SiLU, no biases."""
    if not config.is_file():
        return False
    stated = {"hidden_act": "silu"} | json.loads(config.read_text())
    biased = stated.get("attention_bias") or stated.get("mlp_bias")
    return stated.get("model_type") == "llama" and stated["hidden_act"] == "silu" and not biased


def _write(
    options: argparse.Namespace,
    decoder: Decoder,
    tokenizer: Any,
    starts_BP: Tensor,
    temperature_B1: Tensor,
    begin: float,
) -> int:
    """Write the records of one batch of rows after the other; returns how many tokens that were."""
    partial, written = options.out.with_name(options.out.name + ".partial"), 0

    def save(rows: list[list[int]]) -> None:
        for text in tokenizer.batch_decode(rows, skip_special_tokens=False):
            for record in records(text.removeprefix(_END_OF_TEXT)):
                out.write(json.dumps(record, ensure_ascii=False) + "\n")

    try:
        with partial.open("w", encoding="utf-8") as out, ThreadPoolExecutor(1) as writer:
            saves = []
            while written < options.tokens and time.monotonic() - begin < options.seconds:
                ids_BT = write_rows(decoder, starts_BP, options.length, temperature_B1)
                saves.append(writer.submit(save, ids_BT.tolist()))  # while the next batch is being written
                written += ids_BT.numel()
                speed = written / (time.monotonic() - begin)
                print(f"{written / 1e6:.1f}M tokens, {speed:.0f} tokens/s", flush=True)
            for finished in saves:
                finished.result()
        os.replace(partial, options.out)
    finally:
        partial.unlink(missing_ok=True)
    return written


def main() -> None:
    """Write OUT, one batch of rows after the other, until there are enough tokens or the time is up."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=30_000_000)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no further batch after this long")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--length", type=int, default=640, help="tokens of a row")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if not _is_known(options.model / "config.json"):
        parser.error(f"{options.model}: is not the folder of a dense Llama without biases; this script knows no other")
    begin = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).to(device).eval()
    with torch.inference_mode():
        decoder = Decoder(model, options.rows, options.length)
    starts_BP = _starts(tokenizer, options.rows, device)
    halves = torch.arange(options.rows, device=device)[:, None] // 4 % 2
    temperature_B1 = torch.tensor(_TEMPERATURES, device=device)[halves]

    written = _write(options, decoder, tokenizer, starts_BP, temperature_B1, begin)
    print(f"{options.out}: {written / 1e6:.1f}M tokens; name it as a source of a recipe")


if __name__ == "__main__":
    main()
