"""A training recipe: one YAML file that reproduces one run.

Unknown keys are errors, so that a misspelt option never trains something else. Relative paths are taken from the
recipe's own folder, and `${NAME}` is replaced from the environment, so that a recipe names no machine.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from turbosparse.errors import UserError, reason

_SUFFIXES = {"k": 10**3, "m": 10**6, "b": 10**9}


def _count(value: Any) -> Any:
    """Read "200M" as 200_000_000; leave everything else to pydantic."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d+)?)\s*([kKmMbB])", value.strip()) if isinstance(value, str) else None
    return round(float(match[1]) * _SUFFIXES[match[2].lower()]) if match else value


Tokens = Annotated[int, BeforeValidator(_count), Field(gt=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TextSource(_Strict):
    """Text of one domain: local files (`path`, a glob of .jsonl, .jsonl.zst, .txt) or a `datasets` set (`dataset`)."""

    domain: str
    path: str | None = None
    dataset: str | None = None
    subset: str | None = None
    split: str = "train"
    text_field: str = "text"
    weight: float = Field(default=1.0, gt=0)
    max_tokens: Tokens | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> TextSource:
        if (self.path is None) == (self.dataset is None):
            raise ValueError("give either `path` or `dataset`")
        if self.dataset is not None and self.max_tokens is None:
            raise ValueError("a `dataset` needs `max_tokens`")
        return self


class Data(_Strict):
    """What is read. `context` is the length of a training window in tokens."""

    sources: list[TextSource] = Field(min_length=1)
    validation: list[TextSource] = Field(min_length=1)
    context: int = Field(default=1024, ge=8)
    cache: str = ".cache/tokens"

    @model_validator(mode="after")
    def _domains_differ(self) -> Data:
        for name, texts in (("sources", self.sources), ("validation", self.validation)):
            domains = [text.domain for text in texts]
            if twice := next((domain for domain in domains if domains.count(domain) > 1), None):
                raise ValueError(f"`{name}` has the domain {twice} twice; give every entry its own, or one `path`")
        return self


class Pressure(_Strict):
    """A penalty that brings a share of the neurons, 0..1, down to a target (see sparsity.py)."""

    target_rate: float = Field(gt=0, lt=1)
    start_rate: float = Field(default=0.5, gt=0, le=1)
    ramp: float = Field(default=0.3, ge=0, le=1, description="share of the stage over which the target falls")
    weight: float = Field(default=1.0, ge=0)
    width: float = Field(default=0.02, gt=0, description="excess of the rate at which the full weight is reached")


class Sparsity(Pressure):
    """The penalty that keeps neurons quiet; the rates of its own keys are shares of active neurons."""

    penalty: Literal["count", "l1"] = Field(default="count", description="what is pushed down: see sparsity.py")
    threshold: float | None = Field(
        default=None, ge=0, le=2, description="of |h|, in root mean squares of each layer's h, set as the stage begins"
    )
    idle: Pressure | None = Field(
        default=None, description="of a dReLU model: on neurons whose gate is open and which do not fire"
    )


class Distillation(_Strict):
    """Learn from a teacher's token probabilities, mixed with the text: `share` * teacher + (1 - share) * text."""

    teacher: str
    share: float = Field(default=0.9, ge=0, le=1)
    sources: list[str] | None = Field(
        default=None, min_length=1, description="domains that the teacher knows; what it does not know is text alone"
    )


class Predictability(_Strict):
    """Small networks learn beside the model which neurons fire, and the model to agree with them (predictable.py)."""

    weight: float = Field(default=1.0, ge=0, description="of the share of |h| that is not expected; 0 only watches")
    share: float = Field(default=0.1, gt=0, lt=1, description="weights of the networks over those of the FFNs")
    selected: float = Field(default=1.5, gt=0, description="neurons that are expected to fire, over those that do")
    ramp: float = Field(default=0.2, ge=0, le=1, description="share of the stage over which the weight rises from 0")
    learning_rate: float = Field(default=1e-2, gt=0, description="of the networks; has the stage's schedule")
    stride: int = Field(default=8, gt=0, description="tokens between those that are looked at")


class Stage(_Strict):
    """One pass of training with one objective.

    `layerwise`: every FFN learns, by itself, what the `teacher` FFN computes on the teacher's own hidden states.
    `cross_entropy`: next-token prediction, with a teacher's probabilities mixed in where `distillation` is given.
    """

    name: str = Field(pattern=r"^[a-z0-9_-]+$")
    objective: Literal["layerwise", "cross_entropy"]
    tokens: Tokens
    learning_rate: float = Field(gt=0)
    batch_tokens: Tokens = 131072
    device_windows: int = Field(default=64, gt=0, description="windows in one forward pass")
    warmup: float = Field(default=0.02, ge=0, lt=1)
    ffn_lr: float = Field(default=1.0, gt=0, description="learning rate of the FFNs, times that of the rest")
    schedule: Literal["cosine", "linear", "constant", "warmup_stable_decay"] = "cosine"
    final_lr_share: float = Field(default=0.05, ge=0, le=1)
    weight_decay: float = Field(default=0.01, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = Field(default=1.0, gt=0)
    sparsity: Sparsity | None = None
    teacher: str | None = None
    sides: Literal["best", "pairs", "mirrored", "one"] | None = Field(
        default=None, description="for a fresh dReLU swap: see allot.py"
    )
    width: float = Field(default=1.0, ge=1, le=4, description="other than with one: neurons over the dense model's")
    prune: float | None = Field(
        default=None, gt=0, lt=1, description="of a sparse model: share of its gates that go as it begins, see prune.py"
    )
    soft_slopes: bool = Field(default=False, description="of a sparse model: neurons that are off learn, see slopes.py")
    ternary_gates: bool = Field(default=False, description="of a sparse model: 2 bits a weight, see ternary.py")
    quant: Literal["q4_0"] | None = Field(default=None, description="weights as an export of it has them: quantized.py")
    predictability: Predictability | None = None
    distillation: Distillation | None = None
    eval_every: int | None = Field(default=None, gt=0, description="steps")
    save_every: int = Field(default=1000, gt=0, description="steps from one checkpoint to the next")

    @model_validator(mode="after")
    def _options_fit(self) -> Stage:
        if (self.objective == "layerwise") != (self.teacher is not None):
            raise ValueError("`teacher` belongs to the layerwise objective, which needs it")
        if self.objective != "layerwise" and self.sides:
            raise ValueError("`sides` belongs to the layerwise objective")
        if self.width != 1 and self.sides in (None, "one"):
            raise ValueError(
                "`width` chooses among all sides: add `sides: best`, `pairs` or `mirrored`, or leave it out"
            )
        if self.prune is not None and self.sides:
            raise ValueError("`prune` drops of what `sides` has just chosen: make `width` smaller instead")
        if self.objective == "layerwise" and self.distillation is not None:
            raise ValueError("`distillation` belongs to the cross_entropy objective")
        if self.objective == "layerwise" and self.predictability is not None:
            raise ValueError("`predictability` belongs to the cross_entropy objective")
        return self


class Recipe(_Strict):
    """The whole run: `model` (a folder made by `turbosparse convert`, or a dense one for a control), data, stages."""

    model: str
    output: str
    seed: int = 0
    data: Data
    stages: list[Stage] = Field(min_length=1)
    compile: bool = True
    workers: int = Field(default=2, ge=0)
    log_every: int = Field(default=10, gt=0)

    @model_validator(mode="after")
    def _taught_sources_exist(self) -> Recipe:
        domains = {source.domain for source in self.data.sources}
        for stage in self.stages:
            taught = (stage.distillation.sources if stage.distillation else None) or []
            if unknown := [name for name in taught if name not in domains]:
                raise ValueError(f"stage {stage.name}: distillation.sources: {unknown[0]} is no domain of data.sources")
        return self


_PATH_KEYS = {"model", "output", "path", "cache", "teacher"}


def _resolve_paths(node: Any, folder: Path, output: Path | None = None) -> Any:
    """The recipe with its paths made absolute; `output` is where its own stages will lie."""
    if isinstance(node, list):
        return [_resolve_paths(item, folder, output) for item in node]
    if not isinstance(node, dict):
        return node
    if isinstance(node.get("output"), str):
        output = folder / os.path.expandvars(node["output"])
    resolved = {}
    for key, value in node.items():
        if key in _PATH_KEYS and isinstance(value, str):
            resolved[key] = _resolved(key, value, folder, output)
        else:
            resolved[key] = _resolve_paths(value, folder, output)
    return resolved


def _resolved(key: str, value: str, folder: Path, output: Path | None) -> str:
    expanded = os.path.expandvars(value)
    if "$" in expanded:
        raise UserError(f"recipe: {key}: {value} names an environment variable that is not set; set it")
    local = folder / expanded
    # Owner and name on the hub, unless a folder of that name lies beside the recipe or is one that it makes.
    is_here = local.exists() or (output is not None and local.is_relative_to(output))
    named_like_hub = key in {"model", "teacher"} and re.fullmatch(r"[\w.-]+/[\w.-]+", expanded)
    return expanded if named_like_hub and not is_here else str(local)


def load_recipe(path: Path) -> Recipe:
    """Read and check a recipe.

    Raises:
        UserError: the file is missing, is not YAML, or holds an unknown or impossible key; the message names the key.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read the recipe ({error.strerror}); give the path of a YAML file") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, or a date that is none
        raise UserError(f"{path}: not a YAML file ({reason(error)}); see recipes/ for examples") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: a recipe is a YAML mapping with model, output, data and stages; see recipes/")
    try:
        return Recipe.model_validate(_resolve_paths(raw, path.resolve().parent))
    except RecursionError:
        raise UserError(f"{path}: holds itself (an alias inside of its anchor); write it out") from None
    except ValidationError as error:
        errors = error.errors()
        # A misspelt key is also a missing one: name what the user wrote.
        first_error = next((entry for entry in errors if entry["type"] == "extra_forbidden"), errors[0])
        key = ".".join(str(part) for part in first_error["loc"]) or "recipe"
        problem = "unknown key; remove it" if first_error["type"] == "extra_forbidden" else first_error["msg"]
        problem = problem.removeprefix("Value error, ")  # pydantic's word for what our own checks say
        raise UserError(f"{path}: {key}: {problem}") from None
