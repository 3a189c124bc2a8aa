"""Run lm-evaluation-harness on local files; needs the extra `eval`, which importing this module asks for."""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from turbosparse.errors import UserError, reason
from turbosparse.evaluate.data_folder import DataFolder
from turbosparse.evaluate.scores import TaskScore
from turbosparse.evaluate.tasks import TASKS, Choice, LocalTask, Part

# The harness draws a bar for every step, on any stderr; ours show one a task. tqdm reads this when it is imported.
os.environ.setdefault("TQDM_DISABLE", "1")

import datasets
import lm_eval.tasks
import numpy as np
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate

datasets.disable_progress_bars()
logging.getLogger("lm_eval").setLevel(logging.ERROR)

_NEW_TOKENS = 256  # the harness's default for a task that names no length
_FEWSHOT_SEED = 1234  # the harness's default, so that its published scores had the same examples


def tokens_to_write(options: Mapping[str, Any], context: int) -> int:
    """How many tokens a request may write at most, given its options and the model's context.

    Raises:
        UserError: they fill the context, so that no question fits.
    """
    wanted = int(options.get("max_gen_toks", _NEW_TOKENS))
    if wanted >= context:
        raise UserError(f"a task writes up to {wanted} tokens, and the model's context has {context}; leave it out.")
    return wanted


class Model(Protocol):
    """An `lm_eval.api.model.LM` that reports how many of its requests are answered: EngineLM or FolderLM."""

    progress: Callable[[int, int], None]


def run(
    model: Model,
    choice: Choice,
    data: DataFolder,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TaskScore:
    """Score a model on one task.

    Args:
        model: the adapter of a model.
        choice: the task and its number of examples.
        data: the tasks' files.
        limit: only about this many items, the first ones of every part of the task.
        progress: called with (requests done, requests in all).

    Raises:
        UserError: the task's files are missing or damaged, it cannot be run here, or the model gives NaN for an item.
    """
    task = TASKS[choice.task]
    if task.runs_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # asked for by the metric as soon as it is loaded
    parts = _load(task, task.parts(data), choice.shots, data)
    model.progress = progress or (lambda _done, _total: None)
    with np.errstate(invalid="ignore"):  # what is no number is said in a sentence below
        results: Any = evaluate(
            model,
            {"tasks": parts},
            limit=None if limit is None else -(-limit // len(parts)),
            bootstrap_iters=0,
            confirm_run_unsafe_code=task.runs_code,
        )
    samples = [sample for name in parts for sample in results["samples"][name] if sample["filter"] == task.filter]
    if wrong := sum(not _is_number(sample, task.metric) for sample in samples):
        raise UserError(
            f"{choice.task}: the model gives no numbers for {wrong} of its {len(samples)} items, so its weights are "
            "damaged or untrained; mend them, or leave the task out."
        )
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(f"{sample['doc_hash']} {sample['prompt_hash']} {sample['target_hash']}\n".encode())
    items = tuple(float(sample[task.metric]) for sample in samples)
    return TaskScore(choice.task, task.metric, choice.shots, digest.hexdigest(), items, task.digest(data))


def _is_number(sample: Mapping[str, Any], metric: str) -> bool:
    """Whether an item's score is a number, and so are the log-likelihoods behind it.

    Among answers with NaN the harness takes one for the best, so the score itself may look like any other.
    """
    likelihoods = [answer[0] for answer in sample["filtered_resps"] if isinstance(answer, tuple)]
    return math.isfinite(sample[metric]) and not any(map(math.isnan, likelihoods))


def _load(task: LocalTask, parts: list[Part], shots: int, data: DataFolder) -> dict[str, Task]:
    """The harness's tasks, by name, reading our rows."""
    folder = Path(lm_eval.tasks.__file__).parent / task.folder
    manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=[folder])
    specs = [_spec(part, manager, shots, data) for part in parts]
    try:
        loaded: dict[str, Task] = manager.load([{"group": "local", "task": specs}])["tasks"]
    except (ModuleNotFoundError, AssertionError) as error:
        raise UserError(f"{parts[0].name} needs more packages; pip install 'turbosparse[eval]' has them.") from error
    except OSError as error:
        if not task.runs_code:
            raise
        raise UserError(
            f"{parts[0].name} is scored by the metric code_eval, which the package evaluate takes from the Hugging "
            "Face hub when it is first used; run it once where the hub can be reached."
        ) from error
    for name, one in loaded.items():
        one.set_fewshot_seed(_FEWSHOT_SEED)
        # The harness leaves an item out of its own examples where these come from the items.
        among_items = one.fewshot_cfg.split == one.config.test_split
        if shots and len(one.sampler.df) < shots + among_items:
            raise UserError(f"{name} with {shots} examples has too few rows for them; download its files again.")
    return loaded


def _spec(part: Part, manager: Any, shots: int, data: DataFolder) -> dict[str, Any]:
    """What the harness is told to change about its task: the data, the splits that exist, the number of examples."""
    if part.name not in manager.all_tasks:
        raise UserError(f"the files name a task {part.name}, which lm-eval does not have; download them again.")
    rows = part.rows(data)
    dataset = datasets.DatasetDict({split: _table(part, split, rows[split]) for split in rows})
    splits = {f"{name}_split": name for name in ("training", "validation", "test")} | {"training_split": "train"}
    spec: dict[str, Any] = {"task": part.name, "num_fewshot": shots, "custom_dataset": lambda **_: dataset}
    return spec | {key: name if name in rows else None for key, name in splits.items()}


def _table(part: Part, split: str, rows: list[dict[str, Any]]) -> datasets.Dataset:
    if not rows:
        raise UserError(f"{part.files[split]} holds no row of {part.name}; download it again.")
    try:
        return datasets.Dataset.from_list(rows)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(
            f"{part.files[split]}: the rows do not have fields of the same types ({reason(error)})."
        ) from error
