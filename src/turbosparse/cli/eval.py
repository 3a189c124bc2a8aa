"""`turbosparse eval`: benchmarks of lm-evaluation-harness, from local files."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from turbosparse.cli import options, output
from turbosparse.cli.extras import extra
from turbosparse.cli.loading import load_engine, reading_mode
from turbosparse.errors import UserError
from turbosparse.folders import check_folder
from turbosparse.model.gguf_parts import files_of

if TYPE_CHECKING:
    from turbosparse.evaluate.data_folder import DataFolder
    from turbosparse.evaluate.scores import Comparison, Scores
    from turbosparse.evaluate.tasks import Choice


class Dtype(StrEnum):
    """Arithmetic of a Hugging Face folder."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


_FOLDER = "Hugging Face folder"

_Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A GGUF file, a Hugging Face folder, or saved scores (.json).")
]
_Tasks = Annotated[
    str | None,
    typer.Option("--tasks", metavar="A,B", help="Tasks and groups: core (default), commonsense, leaderboard."),
]
_DataDir = Annotated[
    Path | None,
    typer.Option("--data-dir", metavar="DIR", envvar="TURBOSPARSE_EVAL_DATA", help="Where the tasks' files are."),
]
_Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Only the first items of every task.")]
_Against = Annotated[
    str | None, typer.Option("--against", metavar="CONTROL", help="Compare item by item with this one.")
]
_Output = Annotated[
    Path | None, typer.Option("--output", metavar="FILE", help="Keep every item's score; goes on by task if stopped.")
]
_AllowCode = Annotated[
    bool, typer.Option("--allow-code", help="Run code that the model writes: humaneval, mbpp. Only in a sandbox.")
]
_Batch = Annotated[
    int | None, typer.Option("--batch", min=1, rich_help_panel=_FOLDER, help="Sequences at once. Default: 8.")
]
_Dtype = Annotated[Dtype | None, typer.Option("--dtype", rich_help_panel=_FOLDER, help="Default: float32.")]


def command(
    model: _Model,
    tasks: _Tasks = None,
    data_dir: _DataDir = None,
    limit: _Limit = None,
    against: _Against = None,
    saved: _Output = None,
    allow_code: _AllowCode = False,
    mode: options.ModeOption = options.Mode.auto,
    threads: options.Threads = None,
    compute: options.ComputeOption = options.Compute.int8,
    isa: options.IsaOption = None,
    batch: _Batch = None,
    dtype: _Dtype = None,
    json: options.Json = False,
) -> None:
    """Score a model on benchmarks, with standard errors."""
    if saved is not None and not saved.absolute().parent.is_dir():
        raise UserError(f"--output {saved}: the folder {saved.parent} does not exist; create it first.")
    if saved is not None and saved.suffix != ".json":
        raise UserError(f"--output {saved}: give it a name that ends in .json.")
    how = _How(data_dir, limit, mode, threads, compute, isa, batch, dtype)
    how.check([name for name in (model, against) if name is not None], saved)
    from turbosparse.evaluate.scores import compare
    from turbosparse.evaluate.tasks import TASKS, choose

    choices = None if tasks is None and _is_saved(model) else choose(tasks or "core", allow_code)
    if any(TASKS[choice.task].runs_code for choice in choices or ()):
        output.notice("warning: what the model writes will be run as Python, with your files and your network.")
    scores = how.scores(model, choices, saved)
    comparison = None
    if against is not None:
        beside = None if saved is None else saved.with_suffix(".against.json")
        comparison = compare(scores, how.scores(against, [score.choice for score in scores.tasks], beside))
    if json:
        output.emit(comparison.add_to(scores.to_json()) if comparison else scores.to_json())
    else:
        _show(scores, comparison)


def _is_saved(name: str) -> bool:
    return name.endswith(".json") and Path(name).is_file()


@dataclass(frozen=True)
class _How:
    """The options that say how a model is evaluated, the same for both models of a comparison."""

    data_dir: Path | None
    limit: int | None
    mode: options.Mode
    threads: int | None
    compute: options.Compute
    isa: options.Isa | None
    batch: int | None
    dtype: Dtype | None

    def check(self, models: list[str], saved: Path | None) -> None:
        """Refuse scores that are not there, a folder that holds no model, and an option that no model has a use for."""
        named = " and ".join(models)
        folders = [Path(name).is_dir() for name in models]
        for name in models:
            if name.endswith(".json") and not Path(name).exists():
                raise UserError(f"{name} does not exist; give scores that `turbosparse eval --output` wrote.")
            if Path(name).is_dir():
                check_folder(Path(name))
        if all(map(_is_saved, models)):
            self._refuse_all(named, saved)
        if self.mode is not options.Mode.auto and all(folders):
            raise UserError(
                f"--mode {self.mode.value}: modes are the engine's, and {named} is a folder; export it first."
            )
        for option, value in (("--batch", self.batch), ("--dtype", self.dtype)):
            if value is not None and not any(folders):
                raise UserError(f"{option} is for Hugging Face folders, and {named} is none; leave it out.")

    def _refuse_all(self, named: str, saved: Path | None) -> None:
        """Refuse what says how a model is evaluated, where none is."""
        given = {
            "--limit": self.limit is not None,
            "--output": saved is not None,
            "--mode": self.mode is not options.Mode.auto,
            "--threads": self.threads is not None,
            "--compute": self.compute is not options.Compute.int8,
            "--isa": self.isa is not None,
        }
        if useless := [option for option in given if given[option]]:
            raise UserError(f"{useless[0]} is for evaluating a model, and {named} holds scores already; leave it out.")

    def scores(self, name: str, choices: list[Choice] | None, saved: Path | None) -> Scores:
        """The scores on these tasks (None: on all that the file `name` holds), kept in `saved` as they come."""
        from turbosparse.evaluate.data_folder import DataFolder
        from turbosparse.evaluate.scores import Scores
        from turbosparse.evaluate.tasks import check

        if _is_saved(name):
            scores = Scores.load(Path(name))
            return scores if choices is None else scores.only(choices)
        assert choices is not None
        with extra("eval"):
            import turbosparse.evaluate.harness  # noqa: F401  here, so that a missing package is said first
        data = DataFolder(self.data_dir)
        check(choices, data)
        lm, scores = self._load(name)
        scores = _resumed(scores, saved, choices, data)
        for choice in choices:
            if scores.find(choice) is None:
                scores.tasks.append(_score(lm, choice, data, self.limit))
                if saved is not None:
                    scores.save(saved)
        return scores.only(choices)

    def _load(self, name: str) -> tuple[Any, Scores]:
        """The harness's view of a model, and its scores before the first task."""
        from turbosparse.evaluate.scores import Scores

        if Path(name).is_dir():
            with extra("train"):
                from turbosparse.evaluate.folder_lm import FolderLM
            dtype = (self.dtype or Dtype.float32).value
            settings = {"limit": self.limit, "dtype": dtype, "files": _stamp(Path(name))}
            return FolderLM(name, dtype, self.batch or 8), Scores(name, "hf", settings)
        from turbosparse.evaluate.engine_lm import EngineLM
        from turbosparse.model.resolve import resolve_gguf

        engine = load_engine(name, self.threads, self.compute, self.isa)
        mode = reading_mode(engine, self.mode)
        settings = {"limit": self.limit, "compute": self.compute.value, "files": _stamp(resolve_gguf(name))}
        return EngineLM(engine, mode), Scores(name, mode, settings)


def _stamp(path: Path) -> dict[str, list[int]]:
    """Sizes and dates of the files of a model, which tell it from another one under the same name."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else files_of(path)
    return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}


def _resumed(scores: Scores, saved: Path | None, choices: list[Choice], data: DataFolder) -> Scores:
    """The scores of an earlier run that was stopped, if it was one of the same model, way and files of the tasks."""
    from turbosparse.evaluate.scores import Scores
    from turbosparse.evaluate.tasks import TASKS

    if saved is None or not saved.exists():
        return scores
    earlier = Scores.load(saved)
    if (earlier.model, earlier.mode, earlier.settings) != (scores.model, scores.mode, scores.settings):
        raise UserError(f"--output {saved} holds scores of another model, file or --limit; name a new file.")
    for score in earlier.tasks:
        if score.choice in choices and score.data not in (None, TASKS[score.task].digest(data)):
            raise UserError(f"--output {saved} holds scores of {score.task} on other files; name a new file.")
    tasks = ", ".join(score.task for score in earlier.tasks)
    output.notice(f"{saved} has {output.printable(tasks)} already")
    return earlier


def _score(lm: Any, choice: Choice, data: DataFolder, limit: int | None) -> Any:
    from turbosparse.evaluate.harness import run

    with output.progress(choice.task) as report:
        return run(lm, choice, data, limit, report)


def _show(scores: Scores, comparison: Comparison | None) -> None:
    """The table, in percent: scores and what they may be off by, one standard error."""
    from rich import box
    from rich.table import Table

    from turbosparse.evaluate.scores import points

    record = scores.to_json()
    names = ["task", "metric", "shots", "items", "score"]
    title = output.plain(f"{scores.model}, {scores.mode}", "table.title")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    if comparison is not None:
        record = comparison.add_to(record)
        names += ["control", "difference"]
        control = comparison.control
        table.caption = output.plain(f"control: {control.model}, {control.mode}", "table.caption")
        table.caption_justify = "left"
    for name in names:
        table.add_column(name, justify="left" if name in ("task", "metric") else "right", no_wrap=True)
    for task in record["tasks"]:
        score = points(task["value"], task["stderr"])
        named = output.plain(task["task"]), output.plain(task["metric"])
        table.add_row(*named, str(task["shots"]), f"{task['n']:,}", score, *_compared(task))
    table.add_section()
    mean = points(record["average"], record["average_stderr"])
    table.add_row("average", "", "", "", mean, *_compared(record))
    output.stdout_console().print(table)


def _compared(row: dict[str, Any]) -> list[str]:
    if "against" not in row:
        return []
    from turbosparse.evaluate.scores import points

    return [f"{100 * row['against']:.2f}", points(row["difference"], row["difference_stderr"], "+")]
