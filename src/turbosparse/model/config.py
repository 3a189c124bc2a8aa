"""One description of a model, whether it comes from a Hugging Face config.json or from the metadata of a GGUF file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from turbosparse.errors import UserError
from turbosparse.model.families import (
    ARCHITECTURE,
    BY_ARCHITECTURE,
    BY_HF_TYPE,
    FAMILIES,
    HF_PREFIX,
    MIXTURES_BY_ARCHITECTURE,
    Family,
)
from turbosparse.model.fields import Bounds, Fields
from turbosparse.model.gguf import GGUFFile
from turbosparse.model.rope import FACTOR_BOUNDS, THETA_BOUNDS, rope_from_hf

FORMAT_VERSION = 2  # the newest that is read; 2 has activation thresholds
SPARSE_ACTIVATIONS = frozenset({"drelu", "reglu"})
PREDICTOR_INPUTS = ("normed", "residual")
# Hugging Face names of the gate's function, and the gated unit that it makes.
SYNTHETIC_KEY = "turbosparse.synthetic"  # also in the files of dense models
_HF_EXPERT_COUNTS = ("num_local_experts", "num_experts")
_HF_ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu", "relu": "reglu"}

_Number = TypeVar("_Number", int, float)

# Far above every known model, and low enough that no product of two of them is more than a large allocation.
_LAYERS: Bounds = (1, 1024)
_WIDTH: Bounds = (1, 1 << 17)
_FFN: Bounds = (1, 1 << 20)
_HEADS: Bounds = (1, 4096)
_HEAD_DIM: Bounds = (2, 1024)
_VOCAB: Bounds = (1, 1 << 22)
_CONTEXT: Bounds = (1, 1 << 26)
_EXPERTS: Bounds = (0, 1024)
_EPSILON: Bounds = (0.0, 1.0)
_POSITIVE: Bounds = (1e-6, 1e6)
_MOST_THRESHOLD = 1e6


@dataclass(frozen=True)
class Predictor:
    """The predictors of a sparse model: score = fc2 relu(fc1 x), and a neuron is selected where it reaches a threshold.

    Attributes:
        ranks: rows of fc1 in each layer; 0 where a layer has no predictor.
        thresholds: of the scores in each layer, and with experts in each expert of it.
        normed: x is the input of the FFN; else the residual stream before the FFN's norm, as in PowerInfer.
        recall: share of the sum of |h| that the thresholds were set to keep in every layer, if the file says so.
    """

    ranks: tuple[int, ...]
    thresholds: tuple[float, ...]
    normed: bool
    recall: float | None = None


@dataclass(frozen=True)
class ModelConfig:
    """What a model is. Sizes are counts; floats are what float32 holds of them.

    Attributes:
        family: key of `families.FAMILIES`.
        activation: drelu, reglu, swiglu or geglu.
        n_layers, hidden_size, ffn_size, n_heads, n_kv_heads, head_dim, vocab_size: dimensions.
        context_length: in tokens, as trained.
        norm_eps: of every RMS norm.
        rope_theta: base of the rotary frequencies.
        rope_theta_local: base in sliding layers, None where it is the same.
        rope_scale: positions are divided by it, in layers that do not slide.
        rope_interleaved: in a GGUF file the rows of Q and K pair as (2i, 2i+1); False: as halves of a head. Hugging
            Face folders always hold halves.
        attention_scale: scores are Q K^T times it.
        embedding_scale: factor of the embedding.
        sliding_window: keys that a sliding layer sees, its own position included; None without such layers.
        sliding_layers: for each layer, whether it slides.
        attention_softcap, logit_softcap: c in c tanh(x / c), or None.
        tied_embeddings: the output projection is the embedding.
        attention_bias: Q, K and V have a bias.
        qk_norm: Q and K are normed per head.
        post_norms: the outputs of attention and FFN are normed.
        experts: FFNs of a layer that a router chooses from, each with ffn_size neurons; 0: one FFN without a router.
        experts_used: how many a token takes.
        synthetic: the weights are random (synthetic.py).
        predictor: what guesses which neurons fire, if the file holds it.
        activation_thresholds: for each layer, an |h| below it becomes zero; None: the activation alone makes zeros.
    """

    family: str
    activation: str
    n_layers: int
    hidden_size: int
    ffn_size: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    norm_eps: float
    rope_theta: float
    attention_scale: float
    embedding_scale: float
    rope_theta_local: float | None
    rope_scale: float
    rope_interleaved: bool
    sliding_window: int | None
    sliding_layers: tuple[bool, ...]
    attention_softcap: float | None
    logit_softcap: float | None
    tied_embeddings: bool
    attention_bias: bool
    qk_norm: bool
    post_norms: bool
    experts: int = 0
    experts_used: int = 0
    synthetic: bool = False
    predictor: Predictor | None = None
    activation_thresholds: tuple[float, ...] | None = None

    @property
    def sparse(self) -> bool:
        """The activation makes exact zeros, so the model has our architecture and a transposed down projection."""
        return self.activation in SPARSE_ACTIVATIONS

    @property
    def ffns(self) -> int:
        """FFNs of a layer: one, or the experts."""
        return max(self.experts, 1)

    @property
    def ffns_used(self) -> int:
        """FFNs of a layer that a token takes."""
        return max(self.experts_used, 1)

    @classmethod
    def from_hf(cls, values: Mapping[str, object], source: str = "config.json") -> ModelConfig:
        """Read a parsed config.json.

        Args:
            values: the JSON object.
            source: what to call the file in errors.

        Raises:
            UserError: an unsupported architecture, or values that are missing, impossible or unknown to the engine.
        """
        return _from_hf(values, source)

    @classmethod
    def from_gguf(cls, file: GGUFFile) -> ModelConfig:
        """Read the metadata of a GGUF file and check that its tensors are those that the metadata promise.

        Raises:
            UserError: as `from_hf`, or a tensor that is missing, unexpected or of another shape.
        """
        from turbosparse.model.layout import check_tensors

        config = _from_gguf(file)
        check_tensors(file, config)
        return config


def text_config(values: Mapping[str, object]) -> Mapping[str, object]:
    """The part of a config.json that describes the language model: `text_config` where there is one (Gemma 3)."""
    inner = values.get("text_config")
    return inner if isinstance(inner, dict) else values


def _from_hf(values: Mapping[str, object], source: str) -> ModelConfig:
    outer_type = values.get("model_type")
    text = text_config(values)
    family = BY_HF_TYPE.get(outer_type) if isinstance(outer_type, str) else None
    if family is None:
        raise UserError(
            f"{source}: the model type {str(outer_type)[:60]!r} is not supported; {', '.join(FAMILIES)} models are."
        )
    # An explicit null wins over the default: Gemma 2 without soft caps says so with it.
    fields = Fields(source, {**family.hf_defaults, **text})
    _refuse_hf_variants(fields, family)
    hidden = fields.integer("hidden_size", _WIDTH)
    n_heads = fields.integer("num_attention_heads", _HEADS)
    n_layers = fields.integer("num_hidden_layers", _LAYERS)
    head_dim = fields.integer("head_dim", _HEAD_DIM, _default_head_dim(fields, hidden, n_heads))
    rope = rope_from_hf({**family.hf_defaults, **text}, source, family.rope_theta_local)
    sliding_window, sliding_layers = _hf_windows(fields, family, n_layers)
    names = family.experts
    experts, used = (0, 0) if names is None else _experts(fields, _hf_expert_count(fields), "num_experts_per_tok")
    config = ModelConfig(
        family=family.name,
        activation=_hf_activation(fields, str(outer_type)),
        n_layers=n_layers,
        hidden_size=hidden,
        ffn_size=fields.integer("intermediate_size" if names is None else names.size, _FFN),
        n_heads=n_heads,
        n_kv_heads=fields.integer("num_key_value_heads", _HEADS, n_heads),
        head_dim=head_dim,
        vocab_size=fields.integer("vocab_size", _VOCAB),
        context_length=fields.integer("max_position_embeddings", _CONTEXT),
        norm_eps=fields.number("rms_norm_eps", _EPSILON),
        rope_theta=rope.theta,
        rope_theta_local=rope.theta_local,
        rope_scale=rope.scale,
        rope_interleaved=family.rope_interleaved,
        attention_scale=_hf_attention_scale(fields, head_dim),
        embedding_scale=_embedding_scale(family, hidden),
        sliding_window=sliding_window,
        sliding_layers=sliding_layers,
        attention_softcap=_softcap(fields, "attn_logit_softcapping", None),
        logit_softcap=_softcap(fields, "final_logit_softcapping", None),
        # The outer config decides, because the outer model class ties the weights.
        tied_embeddings=Fields(source, values).flag("tie_word_embeddings", fields.flag("tie_word_embeddings")),
        attention_bias=family.attention_bias,
        qk_norm=family.qk_norm,
        post_norms=family.post_norms,
        experts=experts,
        experts_used=used,
        activation_thresholds=_hf_thresholds(fields, str(outer_type), n_layers),
    )
    return _checked(config, fields)


def _hf_expert_count(fields: Fields) -> str:
    """The key that says how many experts a layer has: some families have been given another one."""
    return next((key for key in _HF_EXPERT_COUNTS if fields.has(key)), _HF_EXPERT_COUNTS[0])


def _experts(fields: Fields, count: str, used: str) -> tuple[int, int]:
    """Experts of a layer, and those that a token takes."""
    experts = fields.integer(count, (1, _EXPERTS[1]))
    return experts, fields.integer(used, (1, experts))


def _refuse_hf_variants(fields: Fields, family: Family) -> None:
    """Options of the config classes that change the arithmetic in ways that the engine does not follow."""
    if family.experts is None:
        for key in (*_HF_EXPERT_COUNTS, "n_routed_experts"):
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


def _hf_activation(fields: Fields, model_type: str) -> str:
    """The activation of the FFN: our own folders name it, others name the function of the gate."""
    if model_type.startswith(HF_PREFIX):
        activation = fields.text("activation")
        if activation not in SPARSE_ACTIVATIONS:
            fields.fail(f"activation is {activation[:60]!r}, not drelu or reglu")
        return activation
    name = fields.text("hidden_activation") if fields.has("hidden_activation") else fields.text("hidden_act", "silu")
    if name not in _HF_ACTIVATIONS:
        fields.fail(f"the activation {name[:60]!r} is not supported; {', '.join(_HF_ACTIVATIONS)} are")
    return _HF_ACTIVATIONS[name]


def _hf_thresholds(fields: Fields, model_type: str, n_layers: int) -> tuple[float, ...] | None:
    return _activation_thresholds(fields, n_layers) if model_type.startswith(HF_PREFIX) else None


def _hf_attention_scale(fields: Fields, head_dim: int) -> float:
    return float(np.float32(fields.number("query_pre_attn_scalar", _POSITIVE, float(head_dim)) ** -0.5))


def _hf_windows(fields: Fields, family: Family, n_layers: int) -> tuple[int | None, tuple[bool, ...]]:
    if not fields.has("sliding_window") or not fields.flag("use_sliding_window", True):
        return None, (False,) * n_layers
    window = fields.integer("sliding_window", _CONTEXT)
    kinds = fields.get("layer_types")
    if kinds is not None:
        known = {"sliding_attention": True, "full_attention": False}
        if not isinstance(kinds, list) or len(kinds) != n_layers or not all(kind in known for kind in kinds):
            fields.fail(f"layer_types is not a list of {n_layers} times full_attention or sliding_attention")
        layers = tuple(known[kind] for kind in kinds)
    elif family.window_period is not None:
        period = fields.integer("sliding_window_pattern", (1, 1024), family.window_period)
        layers = periodic_windows(n_layers, period)
    else:
        first = fields.integer("max_window_layers", (0, 1 << 16), 0)
        layers = tuple(layer >= first for layer in range(n_layers))
    return (window, layers) if any(layers) else (None, layers)


def periodic_windows(n_layers: int, period: int) -> tuple[bool, ...]:
    """Every `period`-th layer attends to everything, the others slide."""
    return tuple((layer + 1) % period != 0 for layer in range(n_layers))


def _from_gguf(file: GGUFFile) -> ModelConfig:
    source = str(file.path)
    general = Fields(source, file.metadata)
    architecture = general.text("general.architecture")
    fields = Fields(source, file.metadata, architecture + ".")
    family, activation = _gguf_identity(fields, architecture)
    experts, used = (0, 0) if family.experts is None else _experts(fields, "expert_count", "expert_used_count")
    hidden = fields.integer("embedding_length", _WIDTH)
    n_heads = fields.integer("attention.head_count", _HEADS)
    n_layers = fields.integer("block_count", _LAYERS)
    head_dim = fields.integer("attention.key_length", _HEAD_DIM, _default_head_dim(fields, hidden, n_heads))
    for key in ("attention.value_length", "rope.dimension_count"):
        if fields.integer(key, (1, 1 << 16), head_dim) != head_dim:
            fields.fail(f"{architecture}.{key} is not the head size {head_dim}, which is not supported")
    sliding_window, sliding_layers = _gguf_windows(fields, family, n_layers)
    local = family.rope_theta_local
    config = ModelConfig(
        family=family.name,
        activation=activation,
        n_layers=n_layers,
        hidden_size=hidden,
        ffn_size=_gguf_ffn_size(fields, family),
        n_heads=n_heads,
        n_kv_heads=fields.integer("attention.head_count_kv", _HEADS, n_heads),
        head_dim=head_dim,
        vocab_size=_gguf_vocab(file, fields),
        context_length=fields.integer("context_length", _CONTEXT),
        norm_eps=fields.number("attention.layer_norm_rms_epsilon", _EPSILON),
        rope_theta=fields.number("rope.freq_base", THETA_BOUNDS, 10000.0),
        rope_theta_local=None if local is None else fields.number("rope.freq_base_swa", THETA_BOUNDS, local),
        rope_scale=_gguf_rope_scale(fields),
        rope_interleaved=family.rope_interleaved,
        attention_scale=_gguf_attention_scale(fields, family, hidden, n_heads, n_layers, head_dim),
        embedding_scale=_embedding_scale(family, hidden),
        sliding_window=sliding_window,
        sliding_layers=sliding_layers,
        attention_softcap=_softcap(fields, "attn_logit_softcapping", family.gguf_attention_softcap),
        logit_softcap=_softcap(fields, "final_logit_softcapping", family.gguf_logit_softcap),
        tied_embeddings="output.weight" not in file.tensors,
        attention_bias=family.attention_bias,
        qk_norm=family.qk_norm,
        post_norms=family.post_norms,
        experts=experts,
        experts_used=used,
        synthetic=general.flag(SYNTHETIC_KEY, False),
        predictor=_gguf_predictor(fields, n_layers, max(experts, 1)) if architecture == ARCHITECTURE else None,
        activation_thresholds=_activation_thresholds(fields, n_layers) if architecture == ARCHITECTURE else None,
    )
    return _checked(config, fields)


def _gguf_identity(fields: Fields, architecture: str) -> tuple[Family, str]:
    """Family and activation of a file."""
    mixture = fields.integer("expert_count", _EXPERTS, 0) > 0
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


def _gguf_ffn_size(fields: Fields, family: Family) -> int:
    if family.experts is None or not fields.has("expert_feed_forward_length"):
        return fields.integer("feed_forward_length", _FFN)
    return fields.integer("expert_feed_forward_length", _FFN)


def _gguf_vocab(file: GGUFFile, fields: Fields) -> int:
    """Rows of the embedding; many files do not state the size of the vocabulary."""
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        fields.fail("it has no tensor 'token_embd.weight' of two dimensions")
    return fields.integer("vocab_size", _VOCAB, embedding.shape[0])


def _gguf_predictor(fields: Fields, n_layers: int, ffns: int) -> Predictor | None:
    if not fields.has("predictor.rank"):
        return None
    ranks = tuple(_numbers(fields, "predictor.rank", int, n_layers))
    thresholds = tuple(_numbers(fields, "predictor.threshold", float, n_layers * ffns))
    if not 0 <= min(ranks) <= max(ranks) <= _WIDTH[1] or max(ranks) == 0:
        fields.fail("predictor.rank holds impossible sizes")
    source = fields.text("predictor.input")
    if source not in PREDICTOR_INPUTS:
        fields.fail(f"the predictor's input {source[:60]!r} is not one of {', '.join(PREDICTOR_INPUTS)}")
    recall = fields.number("predictor.recall", (0.0, 1.0)) if fields.has("predictor.recall") else None
    if recall is not None and not 0.0 < recall < 1.0:
        fields.fail(f"predictor.recall is {recall:g}, which is not between 0 and 1")
    return Predictor(ranks, thresholds, normed=source == "normed", recall=recall)


def _numbers(fields: Fields, key: str, kind: type[_Number], count: int) -> list[_Number]:
    values = fields.get(key)
    numbers = [value for value in values if type(value) is kind] if isinstance(values, list) else []
    whole = isinstance(values, list) and len(numbers) == len(values) == count
    if not whole or not all(map(math.isfinite, numbers)):
        fields.fail(f"{key} is not a list of {count} numbers")
    return numbers


def _activation_thresholds(fields: Fields, n_layers: int) -> tuple[float, ...] | None:
    key = "activation_threshold"
    if not fields.has(key):
        return None
    values = [float(np.float32(value)) for value in _numbers(fields, key, float, n_layers)]
    if not all(0 <= value <= _MOST_THRESHOLD for value in values):
        fields.fail(f"{key} holds a number that is not from 0 to {_MOST_THRESHOLD:g}")
    return tuple(values)


def _gguf_rope_scale(fields: Fields) -> float:
    kind = fields.text("rope.scaling.type", "none")
    if kind == "none":
        # Files from before scaling.type state a linear factor alone.
        return fields.number("rope.scale_linear", FACTOR_BOUNDS, 1.0)
    if kind != "linear":
        fields.fail(f"the RoPE scaling {kind[:60]!r} is not supported; none and linear are")
    return fields.number("rope.scaling.factor", FACTOR_BOUNDS)


def _gguf_attention_scale(
    fields: Fields, family: Family, hidden: int, n_heads: int, n_layers: int, head_dim: int
) -> float:
    if fields.has("attention.scale"):
        return fields.number("attention.scale", _POSITIVE)
    return runtime_attention_scale(family, hidden, n_heads, n_layers, head_dim)


def runtime_attention_scale(family: Family, hidden: int, n_heads: int, n_layers: int, head_dim: int) -> float:
    """What llama.cpp multiplies the scores of such a model with; its files do not state it."""
    width = hidden / n_heads if n_layers == family.width_scaled_layers else head_dim
    return float(np.float32(width**-0.5))


def _gguf_windows(fields: Fields, family: Family, n_layers: int) -> tuple[int | None, tuple[bool, ...]]:
    if not fields.has("attention.sliding_window") and family.gguf_window is None:
        return None, (False,) * n_layers
    window = fields.integer("attention.sliding_window", (0, _CONTEXT[1]), family.gguf_window)
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


def _default_head_dim(fields: Fields, hidden: int, n_heads: int) -> int:
    """hidden / heads, or an impossible size where that is no whole number (it matters only if none is stated)."""
    return hidden // n_heads if hidden % n_heads == 0 else 0


def _embedding_scale(family: Family, hidden: int) -> float:
    return math.sqrt(hidden) if family.scaled_embedding else 1.0


def _softcap(fields: Fields, key: str, default: float | None) -> float | None:
    if not fields.has(key):
        return default
    return fields.number(key, _POSITIVE)


def _checked(config: ModelConfig, fields: Fields) -> ModelConfig:
    """Relations between the values; each on its own is within bounds already."""
    if config.n_heads % config.n_kv_heads:
        fields.fail(f"{config.n_heads} attention heads cannot share {config.n_kv_heads} key-value heads evenly")
    if config.head_dim % 2:
        fields.fail(f"the head size {config.head_dim} is odd, so rotary positions cannot pair its dimensions")
    return config
