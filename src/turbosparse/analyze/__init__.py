"""See where a model is sparse: per layer and per neuron, from a Hugging Face folder or from the engine's counters."""

from turbosparse.analyze.statistics import LayerSparsity, SparsityReport, summarise

__all__ = ["LayerSparsity", "SparsityReport", "summarise"]
