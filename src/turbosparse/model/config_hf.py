"""A model as its Hugging Face config.json describes it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from turbosparse.errors import UserError
from turbosparse.model import published
from turbosparse.model.config import SPARSE_ACTIVATIONS, ModelConfig
from turbosparse.model.config_values import (
    CONTEXT,
    EPSILON,
    FFN,
    HEAD_DIM,
    HEADS,
    LAYERS,
    POSITIVE,
    VOCAB,
    WIDTH,
    activation_thresholds,
    checked,
    default_head_dim,
    embedding_scale,
    experts,
    mirrored_ups,
    neurons_per_gate,
    periodic_windows,
    softcap,
)
from turbosparse.model.families import BY_HF_TYPE, FAMILIES, HF_PREFIX, Family
from turbosparse.model.fields import Fields
from turbosparse.model.rope import rope_from_hf

_EXPERT_COUNTS = ("num_local_experts", "num_experts")
# Hugging Face names of the gate's function, and the gated unit that it makes.
_ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu", "relu": "reglu"}


def config_from_hf(values: Mapping[str, object], source: str) -> ModelConfig:
    """`ModelConfig.from_hf`."""
    outer_type = values.get("model_type")
    text = text_config(values)
    family = {**BY_HF_TYPE, **published.BY_TYPE}.get(outer_type) if isinstance(outer_type, str) else None
    if family is None:
        raise UserError(
            f"{source}: the model type {str(outer_type)[:60]!r} is not supported; {', '.join(FAMILIES)} models are."
        )
    # An explicit null wins over the default: Gemma 2 without soft caps says so with it.
    fields = Fields(source, {**family.hf_defaults, **text})
    _refuse_variants(fields, family)
    hidden = fields.integer("hidden_size", WIDTH)
    n_heads = fields.integer("num_attention_heads", HEADS)
    n_layers = fields.integer("num_hidden_layers", LAYERS)
    head_dim = fields.integer("head_dim", HEAD_DIM, default_head_dim(fields, hidden, n_heads))
    rope = rope_from_hf({**family.hf_defaults, **text}, source, family.rope_theta_local)
    sliding_window, sliding_layers = _windows(fields, family, n_layers)
    activation, gate_threshold = _activation(fields, str(outer_type))
    ours = str(outer_type).startswith(HF_PREFIX)
    names = family.experts
    n_experts, used = (0, 0) if names is None else experts(fields, _expert_count(fields), "num_experts_per_tok")
    config = ModelConfig(
        family=family.name,
        activation=activation,
        n_layers=n_layers,
        hidden_size=hidden,
        ffn_size=fields.integer("intermediate_size" if names is None else names.size, FFN),
        n_heads=n_heads,
        n_kv_heads=fields.integer("num_key_value_heads", HEADS, n_heads),
        head_dim=head_dim,
        vocab_size=fields.integer("vocab_size", VOCAB),
        context_length=fields.integer("max_position_embeddings", CONTEXT),
        norm_eps=fields.number("rms_norm_eps", EPSILON),
        rope_theta=rope.theta,
        rope_theta_local=rope.theta_local,
        rope_scale=rope.scale,
        rope_interleaved=family.rope_interleaved,
        attention_scale=_attention_scale(fields, head_dim),
        embedding_scale=embedding_scale(family, hidden),
        sliding_window=sliding_window,
        sliding_layers=sliding_layers,
        attention_softcap=softcap(fields, "attn_logit_softcapping", None),
        logit_softcap=softcap(fields, "final_logit_softcapping", None),
        # The outer config decides, because the outer model class ties the weights.
        tied_embeddings=Fields(source, values).flag("tie_word_embeddings", fields.flag("tie_word_embeddings")),
        attention_bias=family.attention_bias,
        qk_norm=family.qk_norm,
        post_norms=family.post_norms,
        experts=n_experts,
        experts_used=used,
        activation_thresholds=activation_thresholds(fields, n_layers) if ours else None,
        gate_threshold=gate_threshold,
        neurons_per_gate=neurons_per_gate(fields) if ours else 1,
        mirrored_ups=ours and mirrored_ups(fields),
    )
    return checked(config, fields)


def text_config(values: Mapping[str, object]) -> Mapping[str, object]:
    """The part of a config.json that describes the language model: `text_config` where there is one (Gemma 3)."""
    inner = values.get("text_config")
    return inner if isinstance(inner, dict) else values


def _expert_count(fields: Fields) -> str:
    """The key that says how many experts a layer has: some families have been given another one."""
    return next((key for key in _EXPERT_COUNTS if fields.has(key)), _EXPERT_COUNTS[0])


def _refuse_variants(fields: Fields, family: Family) -> None:
    """Options of the config classes that change the arithmetic in ways that the engine does not follow."""
    if family.experts is None:
        for key in (*_EXPERT_COUNTS, "n_routed_experts"):
            if fields.has(key) and fields.integer(key, (0, 1 << 16)) > 0:
                fields.fail(f"a {family.name} model that is a mixture of experts ({key}) is not supported")
    else:
        # Weights that do not add up to one; layers with one FFN among those with experts.
        for key, plain in (("norm_topk_prob", True), ("decoder_sparse_step", 1), ("mlp_only_layers", [])):
            if fields.has(key) and fields.get(key) != plain:
                fields.fail(f"{key} is {str(fields.get(key))[:60]}, which is not supported; {plain} is")
    if not family.attention_bias and fields.flag("attention_bias", False):
        fields.fail(f"attention_bias in a {family.name} model is not supported")
    if fields.has("quantization_config"):
        fields.fail("the checkpoint is already quantised; convert the unquantised one")
    for key in ("mlp_bias", "use_bidirectional_attention"):
        if fields.flag(key, False):
            fields.fail(f"{key} is not supported")


def _activation(fields: Fields, model_type: str) -> tuple[str, float]:
    """The activation of the FFN and its gate's threshold: our own folders name it, others the function of the gate."""
    if model_type in published.BY_TYPE:
        return published.published_activation(fields, model_type)
    if model_type.startswith(HF_PREFIX):
        activation = fields.text("activation")
        if activation not in SPARSE_ACTIVATIONS:
            fields.fail(f"activation is {activation[:60]!r}, not drelu or reglu")
        return activation, 0.0
    name = fields.text("hidden_activation") if fields.has("hidden_activation") else fields.text("hidden_act", "silu")
    if name not in _ACTIVATIONS:
        fields.fail(f"the activation {name[:60]!r} is not supported; {', '.join(_ACTIVATIONS)} are")
    return _ACTIVATIONS[name], 0.0


def _attention_scale(fields: Fields, head_dim: int) -> float:
    return float(np.float32(fields.number("query_pre_attn_scalar", POSITIVE, float(head_dim)) ** -0.5))


def _windows(fields: Fields, family: Family, n_layers: int) -> tuple[int | None, tuple[bool, ...]]:
    if not fields.has("sliding_window") or not fields.flag("use_sliding_window", True):
        return None, (False,) * n_layers
    window = fields.integer("sliding_window", CONTEXT)
    kinds = fields.get("layer_types")
    if kinds is not None:
        known = {"sliding_attention": True, "full_attention": False}
        if (
            not isinstance(kinds, list)
            or len(kinds) != n_layers
            or not all(isinstance(kind, str) and kind in known for kind in kinds)
        ):
            fields.fail(f"layer_types is not a list of {n_layers} times full_attention or sliding_attention")
        layers = tuple(known[kind] for kind in kinds)
    elif family.window_period is not None:
        period = fields.integer("sliding_window_pattern", (1, 1024), family.window_period)
        layers = periodic_windows(n_layers, period)
    else:
        first = fields.integer("max_window_layers", (0, 1 << 16), 0)
        layers = tuple(layer >= first for layer in range(n_layers))
    return (window, layers) if any(layers) else (None, layers)
