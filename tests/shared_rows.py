"""Files whose neurons share rows of a matrix, and beside each the same model with every row written out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agreement import TOKENS
from factories import add_predictor, make_folder, make_ternary_folder, random_predictor
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter

from turbosparse.engine import Engine
from turbosparse.engine.measures import Traffic
from turbosparse.model.config import ModelConfig
from turbosparse.model.export import export_gguf
from turbosparse.model.gguf import GGUFFile
from turbosparse.model.gguf_copy import copy_key, copy_tensor, mirror_rows, repeat_rows, write_copies
from turbosparse.predict.write import StoredPredictor, write_predictors

LAYERS, HIDDEN, FFN = 2, 64, 96  # of the tiny Llama, whose blocks have 32 neurons: no multiple of 3
BLOCK = 32
ROW = {"f32": HIDDEN * 4, "q8_0": HIDDEN // 32 * 34, "q4_0": HIDDEN // 32 * 18}
KINDS = {"f32": Type.F32, "q8_0": Type.Q8_0, "q4_0": Type.Q4_0}


@dataclass(frozen=True)
class Pair:
    """A file whose neurons share rows, the folder that it is of, and a file whose neurons have a copy each."""

    folder: Path
    shared: Path
    repeated: Path

    def engines(self, **options: Any) -> tuple[Engine, Engine]:
        shared, repeated = (Engine.load(path, **options) for path in (self.shared, self.repeated))
        return shared, repeated


def make_pair(
    folder: Path,
    quant: str = "q8_0",
    activation: str = "drelu",
    predictor: str | None = None,
    ternary: bool = False,
    rank: int = 32,
    **changes: Any,
) -> Pair:
    """Write both files of a tiny random Llama into a new folder.

    Args:
        folder: to write into.
        quant: of the files.
        activation: "drelu" or "reglu".
        predictor: "low rank", "gate" or None.
        ternary: its gates have three values a row.
        rank: of a predictor of low rank.
        changes: to the values of its config: neurons_per_gate, mirrored_ups and others.
    """
    if ternary:
        make_ternary_folder(folder / "shared", **changes)
    else:
        make_folder(folder / "shared", "llama", activation, **changes)
    path = folder / "shared.gguf"
    export_gguf(folder / "shared", path, quant)
    if predictor is not None:
        path = _with_predictor(path, predictor, quant, changes.get("intermediate_size", FFN), rank)
    return Pair(folder / "shared", path, write_out(path, folder / "repeated.gguf"))


def write_out(source: Path, out: Path, gates: bool = True) -> Path:
    """Write a file again, with an up of its own for every neuron, and a gate of its own unless `gates` is False.

    Where a row has blocks, the other sign is that of their scales: not every kernel gives the exact opposite for
    opposite levels.
    """
    shared = {"turbosparse.mirrored_ups"} | ({"turbosparse.neurons_per_gate"} if gates else set())
    writer = GGUFWriter(out, "turbosparse")
    with GGUFFile.open(source) as file:
        config = ModelConfig.from_gguf(file)
        for key in file.metadata.keys() - shared - {"general.architecture"}:
            copy_key(file, key, writer)
        copies = [copy_tensor(tensor) for tensor in file.tensors.values()]
        for index, copy in enumerate(copies):
            if gates and copy.name.endswith(".ffn_gate.weight"):
                copies[index] = repeat_rows(copy, config.neurons_per_gate)
            if copy.name.endswith(".ffn_up.weight") and config.mirrored_ups:
                copies[index] = mirror_rows(copy)
        write_copies(writer, copies, None)
        writer.close()
    return out


def traffic_of(engine: Engine, mode: str, tokens: list[int] = TOKENS[:4]) -> Traffic:
    session = engine.session()
    session.prefill(TOKENS[4:9], "exact")
    engine.traffic(reset=True)
    for token in tokens:
        session.decode(token, mode)
    return engine.traffic(reset=True)


def _with_predictor(path: Path, kind: str, quant: str, ffn: int, rank: int) -> Path:
    out = path.with_stem(f"{path.stem}-predicting")
    if kind == "low rank":
        return add_predictor(path, out, random_predictor(LAYERS, HIDDEN, ffn, rank, True), KINDS[quant])
    with GGUFFile.open(path) as file:
        write_predictors(file, out, [StoredPredictor.of_gate(0.2, 0.99)] * LAYERS)
    return out
