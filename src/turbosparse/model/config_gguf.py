"""A model as the metadata of its GGUF file describe it (docs/format.md)."""

from __future__ import annotations

from turbosparse.model import powerinfer
from turbosparse.model.config import SPARSE_ACTIVATIONS, ModelConfig, Predictor
from turbosparse.model.config_values import (
    CONTEXT,
    EPSILON,
    EXPERTS,
    FFN,
    HEAD_DIM,
    HEADS,
    LAYERS,
    POSITIVE,
    THRESHOLD,
    VOCAB,
    WIDTH,
    activation_thresholds,
    checked,
    default_head_dim,
    embedding_scale,
    experts,
    mirrored_ups,
    neurons_per_gate,
    numbers,
    periodic_windows,
    runtime_attention_scale,
    softcap,
)
from turbosparse.model.families import ARCHITECTURE, BY_ARCHITECTURE, FAMILIES, MIXTURES_BY_ARCHITECTURE, Family
from turbosparse.model.fields import Fields
from turbosparse.model.gguf import POWERINFER_MAGIC, GGUFFile
from turbosparse.model.rope import FACTOR_BOUNDS, THETA_BOUNDS

# The newest that is read; 2 has activation thresholds, 3 a gate threshold, 4 shared gates, 5 mirrored ups.
FORMAT_VERSION = 5
PREDICTOR_INPUTS = ("normed", "residual", "gate")
SYNTHETIC_KEY = "turbosparse.synthetic"  # also in the files of dense models


def config_from_gguf(file: GGUFFile) -> ModelConfig:
    """`ModelConfig.from_gguf` without the tensors' check."""
    source = str(file.path)
    general = Fields(source, file.metadata)
    architecture = general.text("general.architecture")
    fields = Fields(source, file.metadata, architecture + ".")
    foreign, ours = file.magic == POWERINFER_MAGIC, architecture == ARCHITECTURE
    family, activation = (powerinfer.identity if foreign else _identity)(fields, architecture)
    n_experts, used = (0, 0) if family.experts is None else experts(fields, "expert_count", "expert_used_count")
    hidden = fields.integer("embedding_length", WIDTH)
    n_heads = fields.integer("attention.head_count", HEADS)
    n_layers = fields.integer("block_count", LAYERS)
    head_dim = fields.integer("attention.key_length", HEAD_DIM, default_head_dim(fields, hidden, n_heads))
    for key in ("attention.value_length", "rope.dimension_count"):
        if fields.integer(key, (1, 1 << 16), head_dim) != head_dim:
            fields.fail(f"{architecture}.{key} is not the head size {head_dim}, which is not supported")
    sliding_window, sliding_layers = _windows(fields, family, n_layers)
    local = family.rope_theta_local
    predictor = powerinfer.predictor(file, n_layers) if foreign else None
    if ours:
        predictor = _predictor(fields, n_layers, max(n_experts, 1))
    config = ModelConfig(
        family=family.name,
        activation=activation,
        n_layers=n_layers,
        hidden_size=hidden,
        ffn_size=_ffn_size(fields, family),
        n_heads=n_heads,
        n_kv_heads=fields.integer("attention.head_count_kv", HEADS, n_heads),
        head_dim=head_dim,
        vocab_size=_vocab(file, fields),
        context_length=fields.integer("context_length", CONTEXT),
        norm_eps=fields.number("attention.layer_norm_rms_epsilon", EPSILON),
        rope_theta=fields.number("rope.freq_base", THETA_BOUNDS, 10000.0),
        rope_theta_local=None if local is None else fields.number("rope.freq_base_swa", THETA_BOUNDS, local),
        rope_scale=_rope_scale(fields),
        rope_interleaved=family.rope_interleaved,
        attention_scale=_attention_scale(fields, family, hidden, n_heads, n_layers, head_dim),
        embedding_scale=embedding_scale(family, hidden),
        sliding_window=sliding_window,
        sliding_layers=sliding_layers,
        attention_softcap=softcap(fields, "attn_logit_softcapping", family.gguf_attention_softcap),
        logit_softcap=softcap(fields, "final_logit_softcapping", family.gguf_logit_softcap),
        tied_embeddings="output.weight" not in file.tensors,
        attention_bias=family.attention_bias,
        qk_norm=family.qk_norm,
        post_norms=family.post_norms,
        experts=n_experts,
        experts_used=used,
        synthetic=general.flag(SYNTHETIC_KEY, False),
        predictor=predictor,
        activation_thresholds=activation_thresholds(fields, n_layers) if ours else None,
        gate_threshold=fields.number("gate_threshold", THRESHOLD, 0.0) if ours else 0.0,
        neurons_per_gate=neurons_per_gate(fields) if ours else 1,
        mirrored_ups=ours and mirrored_ups(fields),
    )
    return checked(config, fields)


def _identity(fields: Fields, architecture: str) -> tuple[Family, str]:
    """Family and activation of a file."""
    mixture = fields.integer("expert_count", EXPERTS, 0) > 0
    if architecture != ARCHITECTURE:
        families = MIXTURES_BY_ARCHITECTURE if mixture else BY_ARCHITECTURE
        family = families.get(architecture)
        if family is None:
            known = ", ".join([*families, ARCHITECTURE])
            kind = "of a mixture of experts is" if mixture else "is"
            fields.fail(f"the architecture {architecture[:60]!r} {kind} not supported; {known} are")
        return family, family.activation
    version = fields.integer("format_version", (0, 1 << 31))
    if not 1 <= version <= FORMAT_VERSION:
        fields.fail(
            f"its format version is {version} but this release reads 1 to {FORMAT_VERSION}; upgrade turbosparse"
        )
    base, activation = fields.text("base"), fields.text("activation")
    if base not in FAMILIES:
        fields.fail(f"the base family {base[:60]!r} is not supported; {', '.join(FAMILIES)} are")
    if mixture and FAMILIES[base].experts is None:
        fields.fail(f"a {base} model that is a mixture of experts (expert_count) is not supported")
    if activation not in SPARSE_ACTIVATIONS:
        fields.fail(f"the activation {activation[:60]!r} is not drelu or reglu")
    return FAMILIES[base], activation


def _ffn_size(fields: Fields, family: Family) -> int:
    if family.experts is None or not fields.has("expert_feed_forward_length"):
        return fields.integer("feed_forward_length", FFN)
    return fields.integer("expert_feed_forward_length", FFN)


def _vocab(file: GGUFFile, fields: Fields) -> int:
    """Rows of the embedding, one for each token; many files do not state the size of the vocabulary."""
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        fields.fail("it has no tensor 'token_embd.weight' of two dimensions")
    rows, tokens = embedding.shape[0], file.metadata.get("tokenizer.ggml.tokens")
    # A token without a row cannot be read, and one without a text may be drawn: llama.cpp refuses both, too.
    if isinstance(tokens, list) and len(tokens) != rows:
        fields.fail(
            f"it has {len(tokens)} tokens (tokenizer.ggml.tokens), but token_embd.weight has {rows} rows; "
            "export the model again, with its own tokenizer"
        )
    return fields.integer("vocab_size", VOCAB, rows)


def _predictor(fields: Fields, n_layers: int, ffns: int) -> Predictor | None:
    if not fields.has("predictor.rank"):
        return None
    ranks = tuple(numbers(fields, "predictor.rank", int, n_layers))
    thresholds = tuple(numbers(fields, "predictor.threshold", float, n_layers * ffns))
    source = fields.text("predictor.input")
    if source not in PREDICTOR_INPUTS:
        fields.fail(f"the predictor's input {source[:60]!r} is not one of {', '.join(PREDICTOR_INPUTS)}")
    if not 0 <= min(ranks) <= max(ranks) <= WIDTH[1] or (max(ranks) == 0) != (source == "gate"):
        fields.fail("predictor.rank holds impossible sizes")
    return Predictor(ranks, thresholds, source, _promised(fields, n_layers))


def _promised(fields: Fields, n_layers: int) -> tuple[float, ...] | None:
    """The share of |h| that the predictor of each layer keeps; early files state one for all."""
    key = "predictor.recall"
    if not fields.has(key):
        return None
    if isinstance(fields.get(key), list):
        recall = numbers(fields, key, float, n_layers)
    else:
        recall = [fields.number(key, (0.0, 1.0))] * n_layers
    if not 0.0 <= min(recall) <= max(recall) < 1.0 or max(recall) == 0.0:
        fields.fail(f"{key} is from {min(recall):g} to {max(recall):g}, which is not between 0 and 1")
    return tuple(recall)


def _rope_scale(fields: Fields) -> float:
    kind = fields.text("rope.scaling.type", "none")
    if kind == "none":
        # Files from before scaling.type state a linear factor alone.
        return fields.number("rope.scale_linear", FACTOR_BOUNDS, 1.0)
    if kind != "linear":
        fields.fail(f"the RoPE scaling {kind[:60]!r} is not supported; none and linear are")
    return fields.number("rope.scaling.factor", FACTOR_BOUNDS)


def _attention_scale(fields: Fields, family: Family, hidden: int, n_heads: int, n_layers: int, head_dim: int) -> float:
    if fields.has("attention.scale"):
        return fields.number("attention.scale", POSITIVE)
    return runtime_attention_scale(family, hidden, n_heads, n_layers, head_dim)


def _windows(fields: Fields, family: Family, n_layers: int) -> tuple[int | None, tuple[bool, ...]]:
    if not fields.has("attention.sliding_window") and family.gguf_window is None:
        return None, (False,) * n_layers
    window = fields.integer("attention.sliding_window", (0, CONTEXT[1]), family.gguf_window)
    pattern = fields.get("attention.sliding_window_pattern")
    if isinstance(pattern, list):
        if len(pattern) != n_layers or not all(isinstance(entry, bool) for entry in pattern):
            fields.fail(f"attention.sliding_window_pattern is not a list of {n_layers} booleans")
        layers = tuple(bool(entry) for entry in pattern)
    elif family.window_period is not None or pattern is not None:
        period = fields.integer("attention.sliding_window_pattern", (1, 1024), family.window_period)
        layers = periodic_windows(n_layers, period)
    else:
        layers = (True,) * n_layers
    return (window, layers) if window and any(layers) else (None, (False,) * n_layers)
