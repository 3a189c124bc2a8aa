"""One description of a model, whether it comes from a Hugging Face config.json or from the metadata of a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from turbosparse.model.gguf import GGUFFile

SPARSE_ACTIVATIONS = frozenset({"drelu", "reglu"})


@dataclass(frozen=True)
class Predictor:
    """The predictors of a sparse model: score = fc2 relu(fc1 x), and a neuron is selected where it reaches a threshold.

    Attributes:
        ranks: rows of fc1 in each layer; 0 where a layer has no predictor.
        thresholds: of the scores in each layer, and with experts in each expert of it.
        input: what x is: "normed", the input of the FFN, or "residual", the stream before the FFN's norm, as in
            PowerInfer. Or "gate": there are no matrices, all ranks are 0, and the score is the gate itself.
        recall: share of the sum of |h| that the thresholds keep in each layer, below 1 and 0 for a layer of which
            nothing is said; None where the file says nothing.
    """

    ranks: tuple[int, ...]
    thresholds: tuple[float, ...]
    input: str
    recall: tuple[float, ...] | None = None


def rank_at(share: float, hidden: int, neurons: int, per_gate: int, per_up: int = 1) -> float:
    """The rank of a predictor that has `share` of the weights of its dense FFN, not yet a whole number.

    The FFN has a down for each of its neurons, a gate for every `per_gate` and an up for every `per_up` of them.
    """
    rows = (1 + 1 / per_up + 1 / per_gate) * neurons
    return share * rows * hidden / (hidden + neurons)


@dataclass(frozen=True)
class ModelConfig:
    """What a model is. Sizes are counts; floats are what float32 holds of them.

    Attributes:
        family: key of `families.FAMILIES`.
        activation: drelu, reglu, swiglu or geglu.
        n_layers, hidden_size, ffn_size, n_heads, n_kv_heads, head_dim, vocab_size: dimensions; ffn_size counts neurons.
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
        gate_threshold: relu(gate) is zero below it too (FATReLU); 0.0: below zero alone.
        neurons_per_gate: neurons next to each other that share a gate; divides ffn_size. More than 1 only in a sparse
            model without experts.
        mirrored_ups: neurons 2 j and 2 j + 1, which have one gate, share row j of the up, which the second one has with
            the other sign. Only in a dReLU model whose neurons_per_gate is even.
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
    gate_threshold: float = 0.0
    neurons_per_gate: int = 1
    mirrored_ups: bool = False

    @property
    def sparse(self) -> bool:
        """The activation makes exact zeros, so the model has our architecture and a transposed down projection."""
        return self.activation in SPARSE_ACTIVATIONS

    @property
    def gate_rows(self) -> int:
        """Rows of the gate of an FFN."""
        return self.ffn_size // self.neurons_per_gate

    @property
    def neurons_per_up(self) -> int:
        """Neurons next to each other that share a row of the up."""
        return 2 if self.mirrored_ups else 1

    @property
    def up_rows(self) -> int:
        """Rows of the up of an FFN."""
        return self.ffn_size // self.neurons_per_up

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
        from turbosparse.model.config_hf import config_from_hf

        return config_from_hf(values, source)

    @classmethod
    def from_gguf(cls, file: GGUFFile) -> ModelConfig:
        """Read the metadata of a GGUF file and check that its tensors are those that the metadata promise.

        Raises:
            UserError: as `from_hf`, or a tensor that is missing, unexpected or of another shape.
        """
        from turbosparse.model.config_gguf import config_from_gguf
        from turbosparse.model.layout import check_tensors

        config = config_from_gguf(file)
        check_tensors(file, config)
        return config
