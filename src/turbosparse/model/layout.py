"""The tensors of a model: their names in GGUF and Hugging Face, and their shapes.

GGUF names are llama.cpp's; `ffn_down_t` (the down projection by neuron), `fc1` and `fc2` (the predictor) are
PowerInfer's. Matrices of experts have llama.cpp's ending `_exps`.
"""

from __future__ import annotations

from dataclasses import dataclass

from turbosparse.errors import UserError
from turbosparse.model.config import ModelConfig
from turbosparse.model.families import FAMILIES
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
        hf_name: in a Hugging Face folder, behind the prefix of the text model. There every expert has a tensor of its
            own, whose name has its number where this one has "*".
        shape: in the GGUF file, numpy order; matrices of experts are [experts, rows, columns].
        role: what it is for whoever converts it: "norm", "bias", "q", "k", "down", "embedding", "matrix", "router" or
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
    hidden = config.hidden_size
    q_rows, kv_rows = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    ffn_norm = "pre_feedforward_layernorm" if config.post_norms else "post_attention_layernorm"
    rows: list[tuple[str, str, tuple[int, ...], str]] = [
        ("attn_norm.weight", "input_layernorm.weight", (hidden,), "norm"),
        ("attn_q.weight", "self_attn.q_proj.weight", (q_rows, hidden), "q"),
        ("attn_k.weight", "self_attn.k_proj.weight", (kv_rows, hidden), "k"),
        ("attn_v.weight", "self_attn.v_proj.weight", (kv_rows, hidden), "matrix"),
        ("attn_output.weight", "self_attn.o_proj.weight", (hidden, q_rows), "matrix"),
        ("ffn_norm.weight", f"{ffn_norm}.weight", (hidden,), "norm"),
        *_ffn_rows(config, layer),
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
    return [TensorSpec(f"blk.{layer}.{name}", f"layers.{layer}.{hf}", shape, role) for name, hf, shape, role in rows]


def _ffn_rows(config: ModelConfig, layer: int) -> list[tuple[str, str, tuple[int, ...], str]]:
    """The matrices of a layer's FFN: of one, or of all experts together and the router between them."""
    hidden, ffn = config.hidden_size, config.ffn_size
    down, shape = ("ffn_down_t", (ffn, hidden)) if config.sparse else ("ffn_down", (hidden, ffn))
    names = FAMILIES[config.family].experts
    block, *matrices = ("mlp", "gate_proj", "up_proj", "down_proj")
    if names is not None:
        block, matrices = f"{names.block}.experts.*", [names.gate, names.up, names.down]
    parts = [
        ("ffn_gate", matrices[0], (config.gate_rows, hidden), "matrix"),
        ("ffn_up", matrices[1], (config.up_rows, hidden), "matrix"),
        (down, matrices[2], shape, "down"),
    ]
    if config.predictor is not None and (rank := config.predictor.ranks[layer]) > 0:
        parts += [
            ("fc1", "predictor.fc1", (rank, hidden), "predictor"),
            ("fc2", "predictor.fc2", (ffn, rank), "predictor"),
        ]
    if names is None:
        return [(f"{name}.weight", f"{block}.{hf}.weight", size, role) for name, hf, size, role in parts]
    router = ("ffn_gate_inp.weight", f"{names.block}.gate.weight", (config.experts, hidden), "router")
    experts = (
        (f"{name}_exps.weight", f"{block}.{hf}.weight", (config.experts, *size), role) for name, hf, size, role in parts
    )
    return [router, *experts]


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
