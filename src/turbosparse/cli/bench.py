"""`turbosparse bench`: the modes of a model side by side, and its dense twin."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from turbosparse.cli import modes, options, output
from turbosparse.cli.loading import load_engine
from turbosparse.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from turbosparse.bench.batch import Throughput
    from turbosparse.bench.compare import Contestant, Run
    from turbosparse.bench.phases import Phase
    from turbosparse.engine import Engine

_PROMPT = "The history of mathematics begins with counting, and with the need to measure land, time and trade. "
_BUSY = 0.2
_TURNS = 3  # of the phases, a repeat


class Against(StrEnum):
    """Engines to compare with; see bench/peers.py."""

    llama_cpp = "llama.cpp"
    transformers = "transformers"


def command(
    model: options.Model,
    dense_twin: Annotated[
        str | None, typer.Option("--dense-twin", metavar="FILE", help="The SwiGLU or GeGLU model of the same shape.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", min=1, help="Length of the prompt.")] = 128,
    tokens: options.MaxTokens = 128,
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="FILE", help="Take the prompt from this text, and time mode lossless too."),
    ] = None,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Rounds; one more is thrown away.")] = 5,
    audit: options.Audit = options.AUDIT,
    threads: options.Threads = None,
    against: Annotated[
        list[Against] | None, typer.Option("--against", help="Another engine, on the dense twin; repeatable.")
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option("--batch", metavar="N,N...", help="Also decode so many sequences together: 1,2,4,8,16."),
    ] = None,
    phases: Annotated[
        bool, typer.Option("--phases", help="Also time the phases of decoding, against the read limit of that moment.")
    ] = False,
    compute: options.ComputeOption = options.Compute.int8,
    isa: options.IsaOption = None,
    json: options.Json = False,
) -> None:
    """Time the modes of a model in one run: interleaved, medians."""
    from turbosparse.bench.compare import speedup
    from turbosparse.bench.contestants import EngineMode
    from turbosparse.bench.machine import busy_share, peak_memory_bytes
    from turbosparse.bench.peers import Peer
    from turbosparse.bench.twin import dense_twin_of
    from turbosparse.engine import LOSSLESS

    sizes = batch_sizes(batch)
    busy = busy_share()
    if busy > _BUSY:
        output.notice(f"warning: other work takes {output.percent(busy)} of this machine; the figures will be low.")
    engine = load_engine(model, threads, compute, isa)
    _check(engine, prompt_tokens, tokens, engine.config.vocab_size)
    ours = [(engine, mode, mode) for mode in engine.modes]
    contestants: list[Contestant] = [EngineMode(*each, audit=audit) for each in ours]
    if data is None:
        prompt = (engine.tokenizer.encode(_PROMPT) * prompt_tokens)[:prompt_tokens]
    else:  # a sentence that is repeated would flatter drafts that are looked up in the text
        prompt = first_tokens(engine, data, prompt_tokens)
        contestants.append(EngineMode(engine, LOSSLESS))
    with dense_twin_of(model, engine, dense_twin, needed=bool(against)) as twin_path, ExitStack() as peers:
        if twin_path is not None and engine.config.sparse:
            twin = load_engine(str(twin_path), threads, compute, isa)
            _check(twin, prompt_tokens, tokens, engine.config.vocab_size)
            ours.append((twin, "dense", "dense-twin"))
            contestants.append(EngineMode(*ours[-1]))
        for name in against or ():
            peer = Peer(name.value, Path(twin_path or model), engine.threads, prompt_tokens + tokens + 8)
            peers.callback(peer.close)
            if not peer.batched:
                output.notice(f"warning: this build of {name.value} reads prompts token by token only.")
            contestants.append(peer)
        phased = ours if phases else []
        runs, together, spent = _time(contestants, engine, phased, sizes, prompt, tokens, repeats)
    peak = peak_memory_bytes()  # before the read limit is measured, which takes a buffer of its own
    record = {
        "model": model,
        "machine": machine(engine.isa, engine.threads) | {"busy": busy},
        "prompt_tokens": prompt_tokens,
        "tokens": tokens,
        "repeats": repeats,
        "synthetic": engine.config.synthetic,
        "runs": [vars(run) | ({"synthetic": True} if engine.config.synthetic else {}) for run in runs],
        "batches": [vars(each) | ({"synthetic": True} if engine.config.synthetic else {}) for each in together],
        "phases": [vars(phase) for phase in spent],
        "speedup": {mode: speedup(runs, mode) for mode in ("exact", "predicted", LOSSLESS)},
        "peak_memory_bytes": peak,
    }
    if json:
        output.emit(record)
    else:
        show(record, runs)


def _time(
    contestants: list[Contestant],
    engine: Engine,
    phased: list[tuple[Engine, str, str]],
    sizes: Sequence[int],
    prompt: list[int],
    tokens: int,
    repeats: int,
) -> tuple[list[Run], list[Throughput], list[Phase]]:
    """What is measured: single sequences, `sizes` of them together, and the phases of the modes in `phased`."""
    from turbosparse.bench.batch import EngineBatch, throughput
    from turbosparse.bench.compare import compare
    from turbosparse.bench.phases import PhaseTimer, time_phases

    with output.progress("timing") as report:
        runs = compare(contestants, prompt, tokens, repeats, report)
    with output.progress("timing sequences together") as report:
        batches = [EngineBatch(engine, mode, size) for size in sizes for mode in engine.modes]
        timed = compare(batches, prompt, tokens, repeats, report) if batches else []
    with output.progress("timing phases") as report:
        timers = [PhaseTimer(each, mode, prompt, name) for each, mode, name in phased]
        spent = time_phases(timers, _TURNS * repeats, report)
    return runs, [throughput(run, each.sequences) for run, each in zip(timed, batches, strict=True)], spent


def first_tokens(engine: Engine, data: Path, count: int) -> list[int]:
    """The first tokens of a text.

    Raises:
        UserError: it has fewer.
    """
    from turbosparse.evaluate.windows import windows

    tokens = next(windows(engine.tokenizer, data, max(count, 2)))[:count]
    if len(tokens) < count:
        raise UserError(f"{data} has {len(tokens)} tokens; use a smaller --prompt-tokens or a longer text.")
    return tokens


def batch_sizes(text: str | None) -> list[int]:
    """The numbers of `--batch`.

    Raises:
        UserError: they are not whole numbers from 1 to 256.
    """
    parts = text.split(",") if text is not None else []
    if not all(part.strip().isdecimal() and 1 <= int(part) <= 256 for part in parts):
        raise UserError(f"--batch {text}: give numbers of sequences from 1 to 256, such as 1,2,4,8,16.")
    return [int(part) for part in parts]


def _check(engine: Engine, prompt_tokens: int, tokens: int, vocabulary: int) -> None:
    """Refuse, before anything is timed, what a contestant could not do."""
    if prompt_tokens + tokens > engine.config.context_length:
        raise UserError(
            f"{prompt_tokens} and {tokens} tokens do not fit a context of {engine.config.context_length}; "
            "use a smaller --prompt-tokens or -n."
        )
    if engine.config.vocab_size != vocabulary:
        raise UserError(
            f"the dense twin has {engine.config.vocab_size} tokens in its vocabulary and the model {vocabulary}; "
            "a twin reads the same tokens, so give one of the same family."
        )


def machine(isa: str, threads: int) -> dict[str, Any]:
    """CPU and its read limit in 10^9 bytes/s, from memory: the buffer is at least twice the last-level cache.

    The limit is None where that buffer would not fit into memory; a smaller one would measure the cache.
    """
    from turbosparse import _native
    from turbosparse.bench.machine import available_memory_bytes, cpu_name, last_level_cache_bytes

    wanted = max(2 * last_level_cache_bytes(), 256 << 20)
    fits = wanted <= 0.6 * available_memory_bytes()
    if not fits:
        output.notice(f"warning: no memory for a buffer of {output.megabytes(wanted)}; the read limit is not measured.")
    read = _native.read_bandwidth(wanted, threads, 3) if fits else None
    return {"cpu": cpu_name(), "isa": isa, "threads": threads, "read_gb_s": read}


def show(record: dict[str, Any], runs: list[Run]) -> None:
    """The figures as a table on stdout."""
    from rich.table import Table

    from turbosparse.bench.compare import speedup
    from turbosparse.bench.peers import PEERS

    table = Table(
        title=f"{record['machine']['cpu']}, {record['machine']['threads']} threads, {record['machine']['isa']}"
    )
    for name in ("mode", "prompt tok/s", "decode tok/s", "read per token", "GB/s", "silent neurons"):
        table.add_column(name, justify="left" if name == "mode" else "right")
    for run in runs:
        table.add_row(
            run.mode,
            output.number(run.prefill_tok_s),
            output.number(run.decode_tok_s),
            output.megabytes(run.bytes_per_token),
            output.number(run.gb_s),
            output.percent(run.sparsity),
        )
    console = output.stdout_console()
    console.print(table)
    for name in dict.fromkeys(phase["mode"] for phase in record["phases"]):
        console.print(_phases(name, [phase for phase in record["phases"] if phase["mode"] == name]))
    if record["batches"]:
        console.print(_batches(record["batches"]))
    limit = record["machine"]["read_gb_s"]
    console.print(f"this machine reads {output.number(limit)} GB/s from memory; peak memory {peak(record)}")
    for mode, times in record["speedup"].items():
        if times is not None:
            console.print(f"{mode} is {times:.2f} times as fast as dense")
    for run in runs:
        if run.lossless is not None:
            console.print(modes.drafting_line(run.lossless))
        if run.audit is not None:
            console.print(modes.audit_line(run.audit))
    for peer in PEERS:
        for run in runs:
            if (times := speedup(runs, run.mode, over=peer)) is not None and run.mode not in PEERS:
                console.print(f"{run.mode} is {times:.2f} times as fast as {peer} on the dense twin")
    if record["synthetic"]:
        console.print("synthetic weights: these figures are about speed alone")


def _batches(batches: list[dict[str, Any]]) -> Table:
    """Tokens/s of all sequences together: a row a mode, a column a number of sequences."""
    from rich.table import Table

    sizes = list(dict.fromkeys(each["sequences"] for each in batches))
    table = Table(title="decode tok/s of several sequences together")
    for name in ("mode", *map(str, sizes)):
        table.add_column(name, justify="left" if name == "mode" else "right")
    for mode in dict.fromkeys(each["mode"] for each in batches):
        table.add_row(mode, *(output.number(each["decode_tok_s"]) for each in batches if each["mode"] == mode))
    return table


def _phases(mode: str, phases: list[dict[str, Any]]) -> Table:
    """Where the tokens of a mode spend their time."""
    from rich.table import Table

    table = Table(title=f"a token in {mode} mode")
    for name in ("phase", "ms", "waiting", "read", "GB/s", "of the read limit"):
        table.add_column(name, justify="left" if name == "phase" else "right")
    for phase in phases:
        table.add_row(
            phase["phase"].replace("_", " "),
            output.number(phase["ms"], 3),
            output.number(phase["waiting_ms"], 3),
            output.megabytes(phase["bytes"] or None),
            output.number(phase["gb_s"]),
            output.percent(phase["of_limit"]),
        )
    return table


def peak(record: dict[str, Any]) -> str:
    return output.megabytes(record["peak_memory_bytes"])
