"""`make demo`: one model in one minute. It answers, shows where it is silent, and compares dense with exact."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from turbosparse.cli import options, output
from turbosparse.cli.loading import load_engine
from turbosparse.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from turbosparse.engine import Engine

_QUESTION = "Who was Isaac Newton?"
_ANSWER_TOKENS = 96
_EVERY = 2
"""Every second window of the sample is read: all of it, in each mode, takes two cores about the minute that a demo has.
Not its first half, which is another text: the sample holds web pages first, then code, then mathematics."""
_REPEATS = 3
_MODES = ("dense", "exact")


def command(
    model: Annotated[str, typer.Option("--model", help="A sparse GGUF file.")],
    data: options.Data,
    svg: Annotated[Path | None, typer.Option("--svg", help="Save the output as a picture too.")] = None,
    threads: options.Threads = None,
) -> None:
    """Answer a question, show the sparsity, compare dense with exact."""
    from rich.console import Console

    if svg is not None and not svg.parent.is_dir():
        raise UserError(f"--svg {svg}: the folder {svg.parent} does not exist; create it first.")
    started = time.perf_counter()
    console = Console(highlight=False, record=svg is not None, width=100 if svg else None)
    engine = load_engine(model, threads)
    if "exact" not in engine.modes:
        raise UserError(f"{model} is a {engine.config.activation} model with no exact mode; give a sparse one.")
    _answer(console, engine)
    perplexity, tokens = _read_sample(console, engine, data)
    same = _compare(console, engine, perplexity, tokens)
    took = f"{time.perf_counter() - started:.0f} s in all."
    console.print(output.plain(f"{took} Next: turbosparse chat {model}   turbosparse bench {model}", "dim"))
    if svg is not None:
        console.save_svg(str(svg), title="make demo")
    if not same:
        raise typer.Exit(1)


def _answer(console: Console, engine: Engine) -> None:
    from turbosparse.engine import SamplingParams, generate

    prompt = engine.tokenizer.apply_chat_template([{"role": "user", "content": _QUESTION}])
    ids = engine.tokenizer.encode(prompt, add_bos=False, parse_special=True)
    penalty = SamplingParams(repetition_penalty=1.1)  # so that a small model does not go round in circles
    console.print(f"[bold]> {_QUESTION}[/]")
    for chunk in generate(engine, ids, penalty, _ANSWER_TOKENS, "exact"):
        console.print(chunk.text, end="", markup=False, soft_wrap=True)
    console.print("\n")


def _read_sample(console: Console, engine: Engine, data: Path) -> tuple[dict[str, float], int]:
    """Perplexity of every mode on the sample, and its tokens; the dense pass also counts what fires, for the chart."""
    from turbosparse.analyze import summarise
    from turbosparse.analyze.report import chart
    from turbosparse.evaluate.perplexity import perplexity_engine
    from turbosparse.evaluate.windows import engine_windows

    pieces = engine_windows(engine, data)[::_EVERY]
    total = sum(len(piece) - 1 for piece in pieces)
    perplexity = {}
    for mode in _MODES:
        engine.count_activations(mode == "dense")
        with output.progress(f"reading {data.name}, {mode}") as report:
            result = perplexity_engine(engine, pieces, mode, lambda done, _, report=report: report(done, total))  # type: ignore[misc]
        perplexity[mode] = result.perplexity
        if mode == "dense":
            counts = engine.counters()
            console.print(chart(summarise(counts.tokens, counts.gate, counts.up, counts.h, routed=counts.routed)))
    engine.count_activations(False)
    return perplexity, total


def _compare(console: Console, engine: Engine, perplexity: dict[str, float], tokens: int) -> bool:
    """The table; returns whether all modes wrote the same text."""
    from turbosparse.bench.compare import compare
    from turbosparse.bench.contestants import EngineMode
    from turbosparse.bench.machine import cpu_name
    from turbosparse.engine import generate

    prompt = engine.tokenizer.encode(_QUESTION)
    texts = {
        mode: [chunk.token for chunk in generate(engine, prompt, max_tokens=_ANSWER_TOKENS, mode=mode, ignore_eos=True)]
        for mode in _MODES
    }
    runs = compare([EngineMode(engine, mode) for mode in _MODES], prompt, _ANSWER_TOKENS, _REPEATS)
    table = _table(tokens, f"{cpu_name()}, {engine.threads} threads, {engine.isa}")
    for run in runs:
        table.add_row(
            run.mode,
            output.number(run.decode_tok_s),
            f"{run.decode_tok_s / runs[0].decode_tok_s:.2f} x",
            output.megabytes(run.bytes_per_token),
            f"{perplexity[run.mode]:.3f}",
            "yes" if texts[run.mode] == texts["dense"] else "NO",
        )
    console.print(table)
    return all(text == texts["dense"] for text in texts.values())


def _table(tokens: int, machine: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(
        box=box.SIMPLE_HEAD,
        title="Every neuron against the active ones",
        caption=f"{machine}\nperplexity: every second window of the sample, {tokens:,} tokens",
        pad_edge=False,
    )
    headings = ("mode", "tokens/s", "speed", "read per token", "perplexity", "same text")
    for name in headings:
        table.add_column(name, justify="left" if name == "mode" else "right")
    return table
