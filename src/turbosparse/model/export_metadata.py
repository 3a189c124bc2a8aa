"""What an exported GGUF file says about its model: general.*, hyperparameters and tokenizer.

The keys are llama.cpp's, under the name of the architecture. A dense model's file is read by llama.cpp too, so whatever
that cannot be told stops the export; a sparse model's file is ours alone and states everything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gguf import GGUFValueType, GGUFWriter, LlamaFileType

from turbosparse.errors import UserError
from turbosparse.model.config import ModelConfig, Predictor
from turbosparse.model.config_values import periodic_windows, runtime_attention_scale
from turbosparse.model.families import ARCHITECTURE, FAMILIES, Family
from turbosparse.model.provenance import provenance

# Version of ggml's block formats.
QUANTIZATION_VERSION = 2
FILE_TYPES = {
    "q4_0": LlamaFileType.MOSTLY_Q4_0,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
    "f16": LlamaFileType.MOSTLY_F16,
    "f32": LlamaFileType.ALL_F32,
}


def architecture_of(config: ModelConfig) -> str:
    """`general.architecture` of the file: ours for a sparse model, llama.cpp's for a dense one."""
    return ARCHITECTURE if config.sparse else FAMILIES[config.family].gguf_architecture


def check_exportable(config: ModelConfig, source: str, frequency_factors: bool) -> None:
    """Check that a program that reads llama.cpp's keys computes a dense model right; sparse ones state everything.

    Args:
        config: of the model.
        source: what to call it in errors.
        frequency_factors: it has Llama 3.1's RoPE scaling.

    Raises:
        UserError: naming the property that the dense layout cannot hold.
    """
    if config.sparse:
        return
    family = FAMILIES[config.family]
    if config.activation != family.activation:
        problem = f"the activation {config.activation}"
    elif config.attention_scale != _default_scale(config, family):
        problem = f"the attention scale {config.attention_scale:g}"
    elif frequency_factors and family.gguf_architecture != "llama":
        problem = "the RoPE scaling llama3"
    elif family.runtime_windows and not _periodic(config, family):
        problem = "its order of sliding layers"
    else:
        return
    raise UserError(f"{source}: {problem} cannot be written to a dense {family.gguf_architecture} GGUF file.")


def write_metadata(writer: GGUFWriter, config: ModelConfig, quant: str, folder: Path, raw: Mapping[str, Any]) -> None:
    """Add general.* and the hyperparameters of `config` to `writer`, whose architecture is already set.

    Args:
        writer: open for keys.
        config: of the model.
        quant: key of `FILE_TYPES`.
        folder: the Hugging Face folder; gives the model's name, and its README may name the licence.
        raw: its config.json.
    """
    writer.add_name(folder.resolve().name or "model")
    licence = _licence(folder, raw)
    if licence is not None:
        writer.add_license(licence)
    write_hyperparameters(writer, config, quant)


def write_hyperparameters(writer: GGUFWriter, config: ModelConfig, quant: str | None) -> None:
    """Add what a reader must know to compute: sizes, activation, positions, file type unless `quant` is None."""
    if quant is not None:
        writer.add_file_type(FILE_TYPES[quant])
    writer.add_quantization_version(QUANTIZATION_VERSION)
    architecture = architecture_of(config)
    if config.sparse:
        writer.add_string(f"{architecture}.base", config.family)
        writer.add_string(f"{architecture}.activation", config.activation)
        thresholds, gate = config.activation_thresholds, config.gate_threshold
        # The oldest version that says it all, so that older releases read what they can.
        needs = {5: config.mirrored_ups, 4: config.neurons_per_gate > 1, 3: gate > 0, 2: thresholds is not None}
        writer.add_uint32(f"{architecture}.format_version", max((v for v, there in needs.items() if there), default=1))
        if thresholds is not None:
            _write_floats(writer, f"{architecture}.activation_threshold", thresholds)
        if gate:
            writer.add_float32(f"{architecture}.gate_threshold", gate)
        if config.neurons_per_gate > 1:
            writer.add_uint32(f"{architecture}.neurons_per_gate", config.neurons_per_gate)
        if config.mirrored_ups:
            writer.add_bool(f"{architecture}.mirrored_ups", True)
    writer.add_block_count(config.n_layers)
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.ffn_size)
    if config.experts > 0:
        writer.add_expert_count(config.experts)
        writer.add_expert_used_count(config.experts_used)
        writer.add_expert_feed_forward_length(config.ffn_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    _write_positions(writer, config, architecture)
    if config.predictor is not None:
        write_predictor(writer, config.predictor, architecture)
    if config.attention_softcap is not None:
        writer.add_attn_logit_softcapping(config.attention_softcap)
    if config.logit_softcap is not None:
        writer.add_final_logit_softcapping(config.logit_softcap)
    family = FAMILIES[config.family]
    if config.sparse and config.attention_scale != _default_scale(config, family):
        writer.add_float32(f"{architecture}.attention.scale", config.attention_scale)
    if config.sparse or family.runtime_windows or config.sliding_window is not None:
        _write_windows(writer, config, family, architecture)


def write_tokenizer(writer: GGUFWriter, metadata: Mapping[str, Any]) -> None:
    """Add the keys of `tokenizer_metadata`: ids as uint32, scores as float32, token types as int32."""
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif key.endswith(".scores"):
            _write_floats(writer, key, value)
        else:
            writer.add_array(key, value)


def _write_positions(writer: GGUFWriter, config: ModelConfig, architecture: str) -> None:
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    if config.rope_theta_local is not None:
        writer.add_float32(f"{architecture}.rope.freq_base_swa", config.rope_theta_local)
    if config.rope_scale != 1.0:
        writer.add_string(f"{architecture}.rope.scaling.type", "linear")
        writer.add_float32(f"{architecture}.rope.scaling.factor", config.rope_scale)


def write_predictor(writer: GGUFWriter, predictor: Predictor, architecture: str) -> None:
    writer.add_string(f"{architecture}.predictor.input", predictor.input)
    ranks = list(predictor.ranks)
    writer.add_key_value(f"{architecture}.predictor.rank", ranks, GGUFValueType.ARRAY, GGUFValueType.UINT32)
    _write_floats(writer, f"{architecture}.predictor.threshold", predictor.thresholds)
    if predictor.recall is not None:
        _write_floats(writer, f"{architecture}.predictor.recall", predictor.recall)


def _write_floats(writer: GGUFWriter, key: str, values: Sequence[float]) -> None:
    """As float32, stated, because a list of whole numbers would become integers."""
    writer.add_key_value(key, list(values), GGUFValueType.ARRAY, GGUFValueType.FLOAT32)


def _write_windows(writer: GGUFWriter, config: ModelConfig, family: Family, architecture: str) -> None:
    """The sliding window, and which layers slide unless the family's period says so."""
    writer.add_sliding_window(config.sliding_window or 0)
    if config.sliding_window is not None and not _periodic(config, family):
        writer.add_array(f"{architecture}.attention.sliding_window_pattern", list(config.sliding_layers))


def _periodic(config: ModelConfig, family: Family) -> bool:
    """Whether a reader finds the sliding layers without being told."""
    if family.window_period is None:
        return all(config.sliding_layers)
    return config.sliding_layers == periodic_windows(config.n_layers, family.window_period)


def _default_scale(config: ModelConfig, family: Family) -> float:
    return runtime_attention_scale(family, config.hidden_size, config.n_heads, config.n_layers, config.head_dim)


def _licence(folder: Path, raw: Mapping[str, Any]) -> str | None:
    """What config.json or the front matter of README.md calls the licence."""
    stated = raw.get("license")
    if isinstance(stated, str) and 0 < len(stated) <= 64:
        return stated
    return provenance(folder).license
