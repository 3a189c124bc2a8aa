"""Write a sparse model as a file that PowerInfer's own program runs.

Its program computes what the architecture says and knows no options, so what it cannot be told stops the export. Its
kernel for the down projection reads Q4_0 and takes everything else for F16. Every neuron has a gate and an up of its
own there: what several share is written once for each, with its sign. See powerinfer.py for the source.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

from gguf import GGMLQuantizationType, GGUFWriter

from turbosparse.errors import UserError
from turbosparse.model.config import ModelConfig
from turbosparse.model.config_gguf import SYNTHETIC_KEY
from turbosparse.model.config_values import runtime_attention_scale
from turbosparse.model.export import ExportReport, Progress, export_gguf, refuse_own_file, replacing
from turbosparse.model.families import FAMILIES
from turbosparse.model.gguf import MAGIC, POWERINFER_MAGIC, GGUFFile
from turbosparse.model.gguf_copy import Copy, copy_key, copy_tensor, mirror_rows, repeat_rows, write_copies
from turbosparse.model.layout import EMBEDDING, OUTPUT, ROPE_FACTORS
from turbosparse.model.powerinfer import THRESHOLD_KEY
from turbosparse.model.powerinfer_predictor import common_threshold, predictor_copies
from turbosparse.model.quantize import NEGATABLE

Type = GGMLQuantizationType

_ARCHITECTURES = {"drelu": "bamboo", "reglu": "llama"}
# Below that many neurons its program takes another kernel, which reads the scores of other neurons.
_LEAST_NEURONS = 1001
# The types of ggml when the program was written.
_READ = frozenset(
    {Type.F32, Type.F16, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0}
    | {Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K}
)


def export_powerinfer(source: Path, out: Path, quant: str, progress: Progress | None = None) -> ExportReport:
    """Write a sparse Hugging Face folder or GGUF file in PowerInfer's format, replacing a file that is there.

    Args:
        source: a folder, or a file of ours, whose weights stay in their types wherever the program reads them.
        out: the file to write.
        quant: of a folder's matrices, as in `export_gguf`.
        progress: called with (weights done, weights in all).

    Raises:
        UserError: the model has a property that PowerInfer does not know, or the file cannot be written or is read.
    """
    refuse_own_file(source, out)
    with replacing(out) as partial:
        if not source.is_dir():
            return _rewrite(source, source, partial, out, progress)
        with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
            ours = Path(folder) / "model.gguf"
            export_gguf(source, ours, quant)
            return _rewrite(source, ours, partial, out, progress)


def _rewrite(shown: Path, ours: Path, partial: Path, out: Path, progress: Progress | None) -> ExportReport:
    """Write the file `ours`, which errors call `shown`, as `partial`."""
    with GGUFFile.open(ours) as file:
        config = ModelConfig.from_gguf(file)
        _check(shown, file, config)
        threshold = common_threshold(config, str(shown))
        architecture = _ARCHITECTURES[config.activation]
        tensors = _tensors(file, config, threshold)
        writer = GGUFWriter(partial, architecture)
        try:
            _write_keys(writer, file, config, architecture)
            writer.add_float32(THRESHOLD_KEY, threshold)
            write_copies(writer, tensors, progress)
        finally:
            writer.close()
    with partial.open("r+b") as stream:
        stream.write(POWERINFER_MAGIC)
    types: Counter[str] = Counter()
    for tensor in tensors:
        types[tensor.kind.name.lower()] += math.prod(tensor.shape)
    return ExportReport(out, sum(types.values()), partial.stat().st_size, types.most_common(1)[0][0], architecture)


def _check(shown: Path, file: GGUFFile, config: ModelConfig) -> None:
    family = FAMILIES[config.family]
    problem = None
    if file.magic != MAGIC:
        problem = "it is a PowerInfer file already"
    elif not config.sparse:
        problem = f"its activation is {config.activation}, and the format is for drelu and reglu"
    elif config.experts:
        problem = "it is a mixture of experts, which its program does not run"
    elif family.gguf_architecture != "llama" or ROPE_FACTORS in file.tensors:
        what = f"a {config.family} model" if family.gguf_architecture != "llama" else "the RoPE scaling llama3"
        problem = f"{what} is nothing that its program computes"
    elif config.head_dim * config.n_heads != config.hidden_size:
        problem = f"its heads of {config.head_dim} are not hidden size / heads wide"
    elif config.attention_scale != runtime_attention_scale(
        family, config.hidden_size, config.n_heads, config.n_layers, config.head_dim
    ):
        problem = f"its attention scale {config.attention_scale:g} is not that of its program"
    elif config.activation_thresholds is not None or config.gate_threshold:
        problem = "its activation has thresholds, which its program does not apply"
    elif config.ffn_size < _LEAST_NEURONS:
        problem = f"its program needs an FFN of at least {_LEAST_NEURONS} neurons, not {config.ffn_size}"
    if problem is not None:
        raise UserError(f"{shown} cannot be written for PowerInfer: {problem}.")


def _tensors(file: GGUFFile, config: ModelConfig, threshold: float) -> list[Copy]:
    tensors = []
    for name, tensor in file.tensors.items():
        if name.endswith((".fc1.weight", ".fc2.weight")):
            continue
        mirrored = config.mirrored_ups and name.endswith(".ffn_up.weight")
        readable = frozenset({Type.Q4_0, Type.F16}) if name.endswith(".ffn_down_t.weight") else _READ
        readable &= NEGATABLE if mirrored else readable
        copy = copy_tensor(tensor, tensor.type if tensor.type in readable else Type.F16)
        if name.endswith(".ffn_gate.weight"):
            copy = repeat_rows(copy, config.neurons_per_gate)
        tensors.append(mirror_rows(copy) if mirrored else copy)
    if config.tied_embeddings:
        tensors.append(copy_tensor(file.tensors[EMBEDDING], name=OUTPUT))
    return tensors + predictor_copies(file, config, threshold)


def _write_keys(writer: GGUFWriter, file: GGUFFile, config: ModelConfig, architecture: str) -> None:
    for key in file.metadata:
        general = key.startswith("general.") and key not in ("general.architecture", "general.alignment")
        if general or key.startswith("tokenizer.") or key == SYNTHETIC_KEY:
            copy_key(file, key, writer)
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.ffn_size)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    if config.rope_scale != 1.0:
        writer.add_string(f"{architecture}.rope.scaling.type", "linear")
        writer.add_float32(f"{architecture}.rope.scaling.factor", config.rope_scale)
