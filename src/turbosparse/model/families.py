"""The model families, as data: what differs between them and nothing else.

A family is a decoder of pre-normed blocks, grouped-query attention with rotary positions and a gated FFN. Everything
else in `model/` reads these fields instead of asking for names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

# The architecture that our own files carry, so that no other program runs them with the wrong activation.
ARCHITECTURE = "turbosparse"
# Hugging Face model types of converted folders are this and the family's name.
HF_PREFIX = "turbosparse_"


@dataclass(frozen=True)
class ExpertNames:
    """How a family of mixtures of experts calls in Hugging Face what GGUF files have one name for.

    Attributes:
        size: config.json's key of the neurons of an expert.
        block: what stands before the tensors of router and experts within a layer.
        gate, up, down: the matrices of an expert.
    """

    size: str
    block: str
    gate: str
    up: str
    down: str


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        name: key of `FAMILIES`, and the value of `turbosparse.base`.
        hf_types: `model_type` of its Hugging Face configs.
        gguf_architecture: `general.architecture` of its files in llama.cpp's layout.
        activation: of the dense model, swiglu or geglu.
        rope_interleaved: GGUF files hold the rows of Q and K so that a rotation pairs neighbours (2i, 2i+1) instead of
            the two halves of a head.
        norm_offset: Hugging Face stores the norm's weight w - 1 (GGUF files store w).
        scaled_embedding: embeddings are multiplied by sqrt(hidden_size).
        attention_bias: Q, K and V have a bias.
        qk_norm: Q and K are RMS-normed per head.
        post_norms: the outputs of attention and FFN are normed too.
        window_period: all but every `window_period`-th layer attend to a sliding window; None: not by itself.
        gguf_window: the window of files that do not state one.
        runtime_windows: llama.cpp applies the family's sliding windows.
        rope_theta_local: RoPE base of sliding layers.
        gguf_attention_softcap, gguf_logit_softcap: soft caps of files that do not state them.
        experts: of a mixture of experts, whose router weighs those that it chooses by the softmax over them.
        width_scaled_layers: with this many layers, llama.cpp scales attention scores by (hidden_size / n_heads)**-0.5
            instead of head_dim**-0.5; files do not state it (Gemma's 27B models).
        hf_defaults: config.json keys that real checkpoints leave out, with the value of their config class.
    """

    name: str
    hf_types: tuple[str, ...]
    gguf_architecture: str
    activation: str
    rope_interleaved: bool = False
    norm_offset: bool = False
    scaled_embedding: bool = False
    attention_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    window_period: int | None = None
    gguf_window: int | None = None
    runtime_windows: bool = False
    rope_theta_local: float | None = None
    gguf_attention_softcap: float | None = None
    gguf_logit_softcap: float | None = None
    width_scaled_layers: int | None = None
    experts: ExpertNames | None = None
    hf_defaults: Mapping[str, object] = field(default_factory=dict)


_COMMON_DEFAULTS = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False}
# These classes slide only when told to, whatever window the file states.
_FULL_ATTENTION_DEFAULTS = {**_COMMON_DEFAULTS, "use_sliding_window": False}
_GEMMA_DEFAULTS = {"rms_norm_eps": 1e-6, "tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh"}
# Checkpoints of Gemma 3 with a vision tower state only what differs from these.
_GEMMA3_DEFAULTS = {
    **_GEMMA_DEFAULTS,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "query_pre_attn_scalar": 256,
    "rope_theta": 1e6,
}

_ALL = (
    Family("llama", ("llama",), "llama", "swiglu", rope_interleaved=True, hf_defaults=_FULL_ATTENTION_DEFAULTS),
    Family("mistral", ("mistral",), "llama", "swiglu", rope_interleaved=True, hf_defaults=_COMMON_DEFAULTS),
    Family("qwen2", ("qwen2",), "qwen2", "swiglu", attention_bias=True, hf_defaults=_FULL_ATTENTION_DEFAULTS),
    Family("qwen3", ("qwen3",), "qwen3", "swiglu", qk_norm=True, hf_defaults=_FULL_ATTENTION_DEFAULTS),
    Family(
        "mixtral",
        ("mixtral",),
        "llama",
        "swiglu",
        rope_interleaved=True,
        experts=ExpertNames("intermediate_size", "block_sparse_moe", "w1", "w3", "w2"),
        hf_defaults={**_COMMON_DEFAULTS, "rms_norm_eps": 1e-5, "num_experts_per_tok": 2},
    ),
    Family(
        "qwen3moe",
        ("qwen3_moe",),
        "qwen3moe",
        "swiglu",
        qk_norm=True,
        experts=ExpertNames("moe_intermediate_size", "mlp", "gate_proj", "up_proj", "down_proj"),
        hf_defaults={**_FULL_ATTENTION_DEFAULTS, "num_experts_per_tok": 8, "norm_topk_prob": False},
    ),
    Family(
        "gemma2",
        ("gemma2",),
        "gemma2",
        "geglu",
        norm_offset=True,
        scaled_embedding=True,
        post_norms=True,
        window_period=2,
        gguf_window=4096,
        runtime_windows=True,
        gguf_attention_softcap=50.0,
        gguf_logit_softcap=30.0,
        width_scaled_layers=46,
        hf_defaults={
            **_GEMMA_DEFAULTS,
            "sliding_window": 4096,
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    Family(
        "gemma3",
        ("gemma3", "gemma3_text"),
        "gemma3",
        "geglu",
        norm_offset=True,
        scaled_embedding=True,
        qk_norm=True,
        post_norms=True,
        window_period=6,
        runtime_windows=True,
        rope_theta_local=10000.0,
        width_scaled_layers=62,
        hf_defaults=_GEMMA3_DEFAULTS,
    ),
)

FAMILIES: Mapping[str, Family] = MappingProxyType({family.name: family for family in _ALL})
BY_HF_TYPE: Mapping[str, Family] = MappingProxyType(
    {kind: family for family in _ALL for kind in (*family.hf_types, *(HF_PREFIX + kind for kind in family.hf_types))}
)
# The first family of an architecture: a Mistral file in llama.cpp's layout is a Llama file.
BY_ARCHITECTURE: Mapping[str, Family] = MappingProxyType(
    {family.gguf_architecture: family for family in reversed(_ALL)}
)
# Of files with experts: that one of a Mixtral is a Llama file too.
MIXTURES_BY_ARCHITECTURE: Mapping[str, Family] = MappingProxyType(
    {family.gguf_architecture: family for family in _ALL if family.experts is not None}
)
