"""`make demo`: one model in one minute. It answers, shows where it is silent, and compares dense with exact."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from turbosparse.cli import options, output
from turbosparse.cli.loading import load_engine

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from turbosparse.engine import Engine

_QUESTION = "What is photosynthesis?"
_ANSWER_TOKENS = 96
_ANALYZED_TOKENS = 2048
_REPEATS = 3


def command(
    model: Annotated[str, typer.Option("--model", help="A sparse GGUF file.")],
    data: options.Data,
    svg: Annotated[Path | None, typer.Option("--svg", help="Save the output as a picture too.")] = None,
    threads: options.Threads = None,
) -> None:
    """Answer a question, show the sparsity, compare dense with exact."""
    from rich.console import Console

    started = time.perf_counter()
    console = Console(highlight=False, record=svg is not None, width=100 if svg else None)
    engine = load_engine(model, threads)
    _answer(console, engine)
    _sparsity(console, engine, data)
    _comparison(console, engine, data)
    console.print(
        f"[dim]{time.perf_counter() - started:.0f} s in all. Next: turbosparse chat {model}   "
        f"turbosparse bench {model}[/]"
    )
    if svg is not None:
        console.save_svg(str(svg), title="make demo")


def _answer(console: Console, engine: Engine) -> None:
    from turbosparse.engine import SamplingParams, generate

    prompt = engine.tokenizer.apply_chat_template([{"role": "user", "content": _QUESTION}])
    ids = engine.tokenizer.encode(prompt, add_bos=False, parse_special=True)
    penalty = SamplingParams(repetition_penalty=1.1)  # so that a small model does not go round in circles
    console.print(f"[bold]> {_QUESTION}[/]")
    for chunk in generate(engine, ids, penalty, _ANSWER_TOKENS, "exact"):
        console.print(chunk.text, end="", markup=False, soft_wrap=True)
    console.print("\n")


def _sparsity(console: Console, engine: Engine, data: Path) -> None:
    from turbosparse.analyze.capture import capture_engine
    from turbosparse.analyze.report import chart
    from turbosparse.evaluate.windows import windows

    report = capture_engine(engine, list(windows(engine.tokenizer, data, limit=_ANALYZED_TOKENS)))
    console.print(chart(report))


def _comparison(console: Console, engine: Engine, data: Path) -> None:
    from turbosparse.bench.compare import compare
    from turbosparse.bench.contestants import EngineMode
    from turbosparse.engine import generate
    from turbosparse.evaluate.perplexity import perplexity_engine
    from turbosparse.evaluate.windows import windows

    prompt = engine.tokenizer.encode(_QUESTION)
    texts = {
        mode: [chunk.token for chunk in generate(engine, prompt, max_tokens=_ANSWER_TOKENS, mode=mode, ignore_eos=True)]
        for mode in engine.modes
    }
    pieces = list(windows(engine.tokenizer, data))
    perplexity = {mode: perplexity_engine(engine, pieces, mode).perplexity for mode in engine.modes}
    runs = compare([EngineMode(engine, mode) for mode in engine.modes], prompt, _ANSWER_TOKENS, _REPEATS)
    table = _table(sum(map(len, pieces)))
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


def _table(tokens: int) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title="Every neuron against the active ones", pad_edge=False)
    headings = ("mode", "tokens/s", "speed", "read per token", f"perplexity ({tokens:,} tokens)", "same text")
    for name in headings:
        table.add_column(name, justify="left" if name == "mode" else "right")
    return table
