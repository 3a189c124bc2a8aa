"""The model card: every figure in it comes from a file that a command of ours wrote."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from turbosparse.evaluate.scores import points
from turbosparse.model.provenance import Provenance
from turbosparse.publish.run import Run, Stage

_ABOUT = "https://arxiv.org/abs/2406.05955"


@dataclass(frozen=True)
class Evidence:
    """What the card is made from; everything but `run` may be missing.

    Attributes:
        scores: the JSON of `turbosparse eval`, with or without a control.
        bench: the JSON of `turbosparse bench`.
        ggufs: names of the GGUF files that go along.
    """

    run: Run
    control: Run | None = None
    scores: Mapping[str, Any] | None = None
    bench: Mapping[str, Any] | None = None
    ggufs: Sequence[str] = ()


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _millions(tokens: int) -> str:
    return f"{tokens / 1e6:.1f}M"


def _domains(metrics: Mapping[str, float]) -> list[str]:
    """The domains of "eval_<domain>_ce"; "eval_ce" is their mean."""
    return [match[1] for key in metrics if (match := re.fullmatch(r"eval_(.+)_ce", key))]


def _use(name: str, ggufs: Sequence[str]) -> list[str]:
    lines = [
        "## Use",
        "",
        "    pip install turbosparse",
        *[f"    turbosparse run {file} -p 'Once upon a time'" for file in ggufs],
        "",
        "With transformers, in Python:",
        "",
        "    import turbosparse  # or trust_remote_code=True: the code of the model is one file of this folder",
        "    from transformers import AutoModelForCausalLM",
        "",
        f'    model = AutoModelForCausalLM.from_pretrained("{name}")',
    ]
    return lines


def _sparsity(metrics: Mapping[str, float]) -> list[str]:
    def row(label: str, prefix: str) -> list[str]:
        keys = ("sparsity_h", "sparsity_gate", "sparsity_up", "min_layer_sparsity_h")
        return [label, *(_percent(metrics.get(f"{prefix}{key}")) for key in keys)]

    rows = [row(domain, f"eval_{domain}_") for domain in _domains(metrics)] + [row("mean", "eval_")]
    head = ["held-out text", "zeros in h", "gate closed", "up closed", "zeros, least sparse layer"]
    return ["## Sparsity", "", *_table(head, rows)]


def _quality(run: Run, control: Run | None) -> list[str]:
    models = [("this model", run)] + ([("SwiGLU control, same code and text", control)] if control else [])
    domains = _domains(run.metrics)

    def row(label: str, made: Run) -> list[str]:
        losses = [made.metrics.get(key) for key in (*(f"eval_{domain}_ce" for domain in domains), "eval_ce")]
        shown = ("-" if loss is None else f"{loss:.4f}" for loss in losses)
        return [label, _millions(made.tokens), f"`{made.start}`", *shown]

    head = ["cross-entropy, nats per token", "tokens trained on here", "counted from", *domains, "mean"]
    return ["## Quality on held-out text", "", *_table(head, (row(label, made) for label, made in models))]


def _scores(scores: Mapping[str, Any]) -> list[str]:
    compared = "difference" in scores
    head = ["task", "metric", "shots", "score"] + (["control", "difference"] if compared else [])

    def versus(row: Mapping[str, Any]) -> list[str]:
        if not compared:
            return []
        return [f"{100 * row['against']:.2f}", points(row["difference"], row["difference_stderr"])]

    rows = [
        [task["task"], task["metric"], str(task["shots"]), points(task["value"], task["stderr"]), *versus(task)]
        for task in scores["tasks"]
    ]
    rows.append(["average", "", "", points(scores["average"], scores["average_stderr"]), *versus(scores)])
    note = "Percent, with standard errors; that of a difference is paired, over the same questions."
    return ["## Benchmarks", "", note, "", *_table(head, rows)]


def _speed(bench: Mapping[str, Any]) -> list[str]:
    machine = bench["machine"]
    rows = [
        [
            run["mode"],
            f"{run['decode_tok_s']:.1f}",
            "-" if run.get("bytes_per_token") is None else f"{run['bytes_per_token'] / 1e6:.1f} MB",
        ]
        for run in bench["runs"]
    ]
    head = ["mode", "decoded tokens/s", "weights read per token"]
    note = f"{machine['cpu']}, {machine['threads']} threads, {machine['isa']}; one run, medians."
    return ["## Speed", "", note, "", *_table(head, rows)]


def _stage(stage: Stage) -> list[str]:
    settings = stage.settings
    sparsity, distillation = settings.get("sparsity") or {}, settings.get("distillation") or {}
    teacher = settings.get("teacher") or distillation.get("teacher")
    return [
        str(settings["name"]),
        str(settings["objective"]).replace("_", " "),
        _millions(stage.tokens),
        f"{settings['learning_rate']:g}",
        _percent(1 - sparsity["target_rate"]) if sparsity else "-",
        PurePath(str(teacher)).parent.name or str(teacher) if teacher else "-",
    ]


def _training(run: Run) -> list[str]:
    head = ["stage", "objective", "tokens", "peak learning rate", "zeros aimed at", "teacher"]
    lines = ["## Training", "", *_table(head, (_stage(stage) for stage in run.stages)), "", "Text, by weight:", ""]
    sources = run.data["sources"]
    total = sum(float(source.get("weight", 1.0)) for source in sources)
    for source in sources:
        origin = source.get("dataset") or "local files"
        lines.append(f"- {source['domain']}: {_percent(float(source.get('weight', 1.0)) / total)}, {origin}")
    return lines


def _front_matter(name: str, origin: Provenance, scores: Mapping[str, Any] | None) -> str:
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=task["task"],
            dataset_name=task["task"],
            metric_type=task["metric"],
            metric_value=round(100 * task["value"], 2),
        )
        for task in (scores["tasks"] if scores is not None else [])
    ]
    data = ModelCardData(
        license=origin.license,
        base_model=origin.base_model,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["turbosparse", "drelu", "activation-sparsity"],
        model_name=name if results else None,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---"


def model_card(name: str, origin: Provenance, evidence: Evidence) -> str:
    """README.md of a model folder.

    Args:
        name: of the model, a hub id where it goes to the hub.
        origin: licence and base model; both are carried over.
        evidence: what the run and the commands measured.

    Raises:
        KeyError, TypeError: a JSON file is of another command.
    """
    run = evidence.run
    base = (
        f"[{origin.base_model}](https://huggingface.co/{origin.base_model})" if origin.base_model else "a dense model"
    )
    zeros = run.metrics.get("eval_sparsity_h")
    what = (
        f"Made from {base} by swapping the activation of its feed-forward blocks for "
        f"[dReLU]({_ABOUT}), `relu(gate) * relu(up)`, and training it back"
        + (
            f": {_percent(zeros)} of its FFN neurons are exactly zero for a token, and need not be computed."
            if zeros
            else "."
        )
    )
    sections = [[_front_matter(name, origin, evidence.scores), f"# {name.rpartition('/')[2]}", "", what]]
    sections.append(_use(name, evidence.ggufs))
    if zeros is not None:
        sections.append(_sparsity(run.metrics))
    sections.append(_quality(run, evidence.control))
    if evidence.scores is not None:
        sections.append(_scores(evidence.scores))
    if evidence.bench is not None:
        sections.append(_speed(evidence.bench))
    sections.append(_training(run))
    if origin.license:
        sections.append(["## Licence", "", f"{origin.license}, as the model that it was made from."])
    return "\n\n".join("\n".join(section) for section in sections) + "\n"
