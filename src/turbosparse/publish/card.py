"""The model card: every figure in it comes from a file that a command of ours wrote."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from turbosparse.errors import UserError
from turbosparse.evaluate.scores import points
from turbosparse.model.provenance import Provenance
from turbosparse.publish.run import Metrics, Run, Stage
from turbosparse.publish.swap import Swap


@dataclass(frozen=True)
class Evidence:
    """What the card is made from; everything but `run` may be missing.

    Attributes:
        swap: the activation that the model was given; None: it is dense.
        scores: the JSON of `turbosparse eval`, with or without a control.
        bench: the JSON of `turbosparse bench`.
        ggufs: names of the GGUF files that go along.
    """

    run: Run
    swap: Swap | None = None
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


def _domains(metrics: Metrics) -> list[str]:
    """The domains of "eval_<domain>_ce"; "eval_ce" is their mean."""
    return [match[1] for key in metrics if (match := re.fullmatch(r"eval_(.+)_ce", key))]


def _summary(origin: Provenance, swap: Swap | None, zeros: float | None) -> str:
    base = (
        f"[{origin.base_model}](https://huggingface.co/{origin.base_model})" if origin.base_model else "a dense model"
    )
    if swap is None:
        return f"Made from {base} by training it further, with the activation that it had: it is a dense model."
    how = f"[{swap.name}]({swap.paper}), `{swap.formula}`, and training it back"
    exact = f": {_percent(zeros)} of its FFN neurons are exactly zero for a token, and need not be computed"
    return f"Made from {base} by swapping the activation of its feed-forward blocks for {how}{exact if zeros else ''}."


def _use(name: str, swap: Swap | None, ggufs: Sequence[str]) -> list[str]:
    ours = "import turbosparse  # or trust_remote_code=True: the code of the model is one file of this folder"
    code = [
        *([ours] if swap else []),
        "from transformers import AutoModelForCausalLM",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{name}")',
    ]
    return [
        "## Use",
        "",
        "    pip install turbosparse",
        *[f"    turbosparse run {file} -p 'Once upon a time'" for file in ggufs],
        "",
        "With transformers, in Python:",
        "",
        *[f"    {line}".rstrip() for line in code],
    ]


def _sparsity(metrics: Metrics) -> list[str]:
    if "eval_sparsity_h" not in metrics:
        return []

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


@contextmanager
def _printed(command: str, option: str) -> Iterator[None]:
    """What the block reads out of a JSON file is there, and is what `command` prints.

    Raises:
        UserError: it is not; the file is that of `option`.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        reason = f"{type(error).__name__}: {error}"[:100]
        raise UserError(
            f"{option}: is not what `turbosparse {command} --json` prints ({reason}); give the file as it was printed."
        ) from None


def _results(scores: Mapping[str, Any] | None) -> list[EvalResult]:
    """The same scores for the hub, which shows them beside the card."""
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=str(task["task"]),
            dataset_name=str(task["task"]),
            metric_type=str(task["metric"]),
            metric_value=round(100 * task["value"], 2),
        )
        for task in (scores["tasks"] if scores is not None else [])
    ]


def _scores(scores: Mapping[str, Any] | None) -> list[str]:
    if scores is None:
        return []
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


def _speed(bench: Mapping[str, Any] | None) -> list[str]:
    if bench is None:
        return []
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
    teacher = settings.distillation.teacher if settings.distillation else settings.teacher
    return [
        settings.name,
        settings.objective.replace("_", " "),
        _millions(stage.tokens),
        f"{settings.learning_rate:g}",
        _percent(1 - settings.sparsity.target_rate) if settings.sparsity else "-",
        PurePath(teacher).parent.name or teacher if teacher else "-",
    ]


def _training(run: Run) -> list[str]:
    head = ["stage", "objective", "tokens", "peak learning rate", "zeros aimed at", "teacher"]
    lines = ["## Training", "", *_table(head, (_stage(stage) for stage in run.stages)), "", "Text, by weight:", ""]
    sources = run.data.sources
    total = sum(source.weight for source in sources)
    for source in sources:
        lines.append(f"- {source.domain}: {_percent(source.weight / total)}, {source.dataset or 'local files'}")
    return lines


def _front_matter(name: str, origin: Provenance, swap: Swap | None, results: list[EvalResult]) -> str:
    data = ModelCardData(
        license=origin.license,
        base_model=origin.base_model,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["turbosparse", *([swap.tag, "activation-sparsity"] if swap else [])],
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
        UserError: a JSON file is of another command.
    """
    run, swap = evidence.run, evidence.swap
    with _printed("eval", "--scores"):
        results, scores = _results(evidence.scores), _scores(evidence.scores)
    with _printed("bench", "--bench"):
        speed = _speed(evidence.bench)
    summary = _summary(origin, swap, run.metrics.get("eval_sparsity_h"))
    licence = ["## Licence", "", f"{origin.license}, as the model that it was made from."]
    sections = [
        [_front_matter(name, origin, swap, results), f"# {name.rpartition('/')[2]}", "", summary],
        _use(name, swap, evidence.ggufs),
        _sparsity(run.metrics),
        _quality(run, evidence.control),
        scores,
        speed,
        _training(run),
        licence if origin.license else [],
    ]
    return "\n\n".join("\n".join(section) for section in sections if section) + "\n"
