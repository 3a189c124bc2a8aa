"""The tensors of a model: their names in GGUF and Hugging Face, and their shapes.

GGUF names are llama.cpp's; `ffn_down_t` (the down projection by neuron), `fc1` and `fc2` (the predictor) are
PowerInfer's.
"""

from __future__ import annotations

from dataclasses import dataclass

from turbosparse.errors import UserError
from turbosparse.model.config import ModelConfig
from turbosparse.model.gguf import GGUFFile

EMBEDDING = "token_embd.weight"
OUTPUT = "output.weight"
OUTPUT_NORM = "output_norm.weight"
# Llama 3.1's frequency divisors. A tensor because llama.cpp has one; Hugging Face has parameters instead.
ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class TensorSpec:
    """One tensor that a model must have.

    Attributes:
        name: in the GGUF file.
        hf_name: in a Hugging Face folder, behind the prefix of the text model.
        shape: in the GGUF file, numpy order.
        role: what it is for whoever converts it: "norm", "bias", "q", "k", "down", "embedding", "matrix" or
            "predictor".
    """

    name: str
    hf_name: str
    shape: tuple[int, ...]
    role: str


def tensor_specs(config: ModelConfig) -> list[TensorSpec]:
    """All tensors that a file of this model has, in the order in which they are written; `ROPE_FACTORS` aside."""
    hidden, vocab = config.hidden_size, config.vocab_size
    specs = [TensorSpec(EMBEDDING, "embed_tokens.weight", (vocab, hidden), "embedding")]
    for layer in range(config.n_layers):
        specs += _block_specs(config, layer)
    specs.append(TensorSpec(OUTPUT_NORM, "norm.weight", (hidden,), "norm"))
    if not config.tied_embeddings:
        specs.append(TensorSpec(OUTPUT, "lm_head.weight", (vocab, hidden), "embedding"))
    return specs


def _block_specs(config: ModelConfig, layer: int) -> list[TensorSpec]:
    hidden, ffn = config.hidden_size, config.ffn_size
    q_rows, kv_rows = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    down = ("ffn_down_t", (ffn, hidden)) if config.sparse else ("ffn_down", (hidden, ffn))
    ffn_norm = "pre_feedforward_layernorm" if config.post_norms else "post_attention_layernorm"
    rows: list[tuple[str, str, tuple[int, ...], str]] = [
        ("attn_norm.weight", "input_layernorm.weight", (hidden,), "norm"),
        ("attn_q.weight", "self_attn.q_proj.weight", (q_rows, hidden), "q"),
        ("attn_k.weight", "self_attn.k_proj.weight", (kv_rows, hidden), "k"),
        ("attn_v.weight", "self_attn.v_proj.weight", (kv_rows, hidden), "matrix"),
        ("attn_output.weight", "self_attn.o_proj.weight", (hidden, q_rows), "matrix"),
        ("ffn_norm.weight", f"{ffn_norm}.weight", (hidden,), "norm"),
        ("ffn_gate.weight", "mlp.gate_proj.weight", (ffn, hidden), "matrix"),
        ("ffn_up.weight", "mlp.up_proj.weight", (ffn, hidden), "matrix"),
        (f"{down[0]}.weight", "mlp.down_proj.weight", down[1], "down"),
    ]
    if config.attention_bias:
        rows += [
            ("attn_q.bias", "self_attn.q_proj.bias", (q_rows,), "bias"),
            ("attn_k.bias", "self_attn.k_proj.bias", (kv_rows,), "bias"),
            ("attn_v.bias", "self_attn.v_proj.bias", (kv_rows,), "bias"),
        ]
    if config.qk_norm:
        rows += [
            ("attn_q_norm.weight", "self_attn.q_norm.weight", (config.head_dim,), "norm"),
            ("attn_k_norm.weight", "self_attn.k_norm.weight", (config.head_dim,), "norm"),
        ]
    if config.post_norms:
        rows += [
            ("post_attention_norm.weight", "post_attention_layernorm.weight", (hidden,), "norm"),
            ("post_ffw_norm.weight", "post_feedforward_layernorm.weight", (hidden,), "norm"),
        ]
    if config.predictor is not None and (rank := config.predictor.ranks[layer]) > 0:
        rows += [
            ("fc1.weight", "mlp.predictor.fc1.weight", (rank, hidden), "predictor"),
            ("fc2.weight", "mlp.predictor.fc2.weight", (ffn, rank), "predictor"),
        ]
    return [TensorSpec(f"blk.{layer}.{name}", f"layers.{layer}.{hf}", shape, role) for name, hf, shape, role in rows]


def check_tensors(file: GGUFFile, config: ModelConfig) -> None:
    """Check that a file holds the tensors of its model, no others, in their shapes.

    A tensor too many is an error too: it is a part of the model (a bias, a scale) that would silently be left out.

    Raises:
        UserError: naming the first tensor that differs.
    """
    expected = {spec.name: spec.shape for spec in tensor_specs(config)}
    if ROPE_FACTORS in file.tensors:
        expected[ROPE_FACTORS] = (config.head_dim // 2,)
    for name, shape in expected.items():
        if name not in file.tensors:
            raise UserError(f"{file.path} has no tensor {name!r}, which a {config.family} model needs.")
        if file.tensors[name].shape != shape:
            found = file.tensors[name].shape
            raise UserError(f"{file.path}: tensor {name!r} has the shape {found}, but its metadata say {shape}.")
    for name in file.tensors:
        if name not in expected:
            raise UserError(f"{file.path} has a tensor {name[:80]!r} that no known {config.family} model has.")
