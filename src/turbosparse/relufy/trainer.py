"""Recovery training: `transformers.Trainer` with our objective, data order, sparsity log and safe checkpoints.

A run is a list of stages; each stage starts from the folder that the one before it left and leaves a Hugging Face
checkpoint folder of its own. What is on disk says how far a run has come: a stage whose folder exists is done, and a
stage that was interrupted goes on from its last complete checkpoint, at the very next sample.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import default_collate
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from turbosparse.errors import UserError
from turbosparse.folders import load_model, load_tokenizer
from turbosparse.model.provenance import carry_licence
from turbosparse.relufy.allot import allot_neurons
from turbosparse.relufy.callbacks import PredictorsStep, TimeLimit
from turbosparse.relufy.data import Mixture, build_mixture, check_sources, validation_windows
from turbosparse.relufy.drelu import SparseGLU
from turbosparse.relufy.objective import Layerwise, NextToken, Objective, ffns
from turbosparse.relufy.optimizer import make_adamw
from turbosparse.relufy.predictable import Predictors
from turbosparse.relufy.processes import is_shared, share, shared_loss, this_process
from turbosparse.relufy.progress import ProgressLog
from turbosparse.relufy.prune import prune_gates
from turbosparse.relufy.quantized import BLOCK, fits_q4_0, use_q4_0
from turbosparse.relufy.recipes import Recipe, Stage, load_recipe
from turbosparse.relufy.roles import settle_roles
from turbosparse.relufy.rounded import settle_rounded
from turbosparse.relufy.schedule import learning_rate_share
from turbosparse.relufy.slopes import use_soft_slopes
from turbosparse.relufy.ternary import use_ternary_gates
from turbosparse.relufy.threshold import set_thresholds
from turbosparse.relufy.validate import mean_over_domains, validate

_COMPLETE = "COMPLETE"  # written last into a checkpoint: one without it was interrupted and is never read
_PREDICTORS = "predictability.pt"  # of a checkpoint
_PROBE_WINDOWS = 32  # to look at a model's activations before it trains
# In this order where a GPU has several: on an H100 cuDNN's took half the time of flash forward, two thirds backward.
_ATTENTION = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


class RecoveryTrainer(Trainer):
    """A Trainer whose loss is an `Objective` and whose evaluation is `validate` over the recipe's domains."""

    def __init__(
        self,
        *,
        objective: Objective,
        stage: Stage,
        windows: dict[str, Tensor],
        domains: list[str],
        progress_log: ProgressLog,
        dtype: torch.dtype | None,
        predictors: Predictors | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        # All windows have the same number of tokens, so the mean over micro-batches is the mean over tokens.
        self.model_accepts_loss_kwargs = False
        self.objective, self.stage, self.windows, self.domains = objective, stage, windows, domains
        self.progress_log, self.compute_dtype, self.predictors = progress_log, dtype, predictors
        if predictors is not None:
            self.add_callback(PredictorsStep(predictors, stage))
        self.remove_callback(PrinterCallback)

    def _progress(self) -> float:
        return float(self.state.global_step) / max(1, self.state.max_steps)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        with torch.autocast(self.args.device.type, dtype=self.compute_dtype, enabled=self.compute_dtype is not None):
            loss = (shared_loss if is_shared() else self.objective)(model, inputs, self._progress())
        self.progress_log.add(loss.metrics)
        return loss.total

    def _wrap_model(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        return share(model, self.objective, self.args.device) if is_shared() else model

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        if self.stage.ffn_lr != 1:
            self.optimizer = make_adamw(self.model, self.stage)
            return self.optimizer
        return super().create_optimizer(*args, **kwargs)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Our own schedule: a stage's learning rate is a share of its peak, see schedule.py."""
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer or self.optimizer, lambda step: learning_rate_share(self.stage, step / num_training_steps)
        )
        return self.lr_scheduler

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Write one line to the stage's log and to the terminal."""
        super().log(logs, start_time)
        if "loss" in logs:
            self.progress_log.write(self.state.global_step, logs, self.domains)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Loss and sparsity of every validation domain; also into the log."""
        if self.is_in_train and self.state.global_step == self.state.max_steps:
            return {}  # validated after training, when every neuron's roles are settled
        layers = self.predictors.layers if self.predictors is not None else None
        results = validate(self.model, self.windows, self.args.device, self.compute_dtype, layers)
        mean = mean_over_domains(results)
        self.progress_log.write_validation(self.state.global_step, results, mean)
        metrics = {f"eval_{domain}_{key}": value for domain, result in results.items() for key, value in result.items()}
        metrics |= {f"eval_{key}": value for key, value in mean.items()}
        return metrics

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.predictors is not None and this_process().is_main_process:
            self.predictors.save(folder / _PREDICTORS)
        this_process().wait_for_everyone()  # each writes its own random state
        (folder / _COMPLETE).touch()


def _last_checkpoint(folder: Path) -> Path | None:
    complete = [path.parent for path in folder.glob(f"checkpoint-*/{_COMPLETE}")]
    return max(complete, key=lambda path: int(path.name.rsplit("-", 1)[1]), default=None)


def _arguments(recipe: Recipe, stage: Stage, folder: Path) -> TrainingArguments:
    batch_windows, processes = max(1, stage.batch_tokens // recipe.data.context), this_process().num_processes
    device_windows = min(stage.device_windows, max(1, batch_windows // processes))
    if batch_windows % (device_windows * processes):
        raise UserError(
            f"stage {stage.name}: a batch of {batch_windows} windows does not divide into device_windows = "
            f"{device_windows} for each of {processes} GPUs; choose a divisor"
        )
    steps = max(1, stage.tokens // (batch_windows * recipe.data.context))
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=device_windows,
        gradient_accumulation_steps=batch_windows // (device_windows * processes),
        learning_rate=stage.learning_rate,
        weight_decay=stage.weight_decay,
        adam_beta1=stage.betas[0],
        adam_beta2=stage.betas[1],
        max_grad_norm=stage.max_grad_norm,
        optim="adamw_torch_fused" if torch.cuda.is_available() else "adamw_torch",
        seed=recipe.seed,
        train_sampling_strategy="sequential",  # the mixture is shuffled already, by sample index
        dataloader_num_workers=recipe.workers,
        dataloader_drop_last=True,
        remove_unused_columns=False,
        logging_steps=recipe.log_every,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if stage.eval_every else "no",
        eval_steps=stage.eval_every,
        save_strategy="steps",
        save_steps=stage.save_every,
        save_total_limit=2,
        disable_tqdm=True,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
    )


def _compile(blocks: list[nn.Module]) -> None:
    """Compile block by block: all layers share one compiled graph, which takes seconds instead of minutes."""
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.optimize_ddp = False  # may cut blocks where DDP's buckets end; they overlap anyway
    for block in blocks:
        block.compile()


def _teacher(stage: Stage, model: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    """The stage's teacher, frozen, or None."""
    folder = stage.teacher or (stage.distillation.teacher if stage.distillation else None)
    if folder is None:
        return None
    teacher = load_model(folder, dtype or torch.float32).to(device).eval().requires_grad_(False)
    if teacher.config.vocab_size != model.config.vocab_size:
        raise UserError(f"{folder}: the teacher's vocabulary differs from the model's; use one of its family")
    return teacher


def _probes(mixture: Mixture, device: torch.device) -> list[Tensor]:
    return [mixture[index]["input_ids"][None].to(device) for index in range(min(_PROBE_WINDOWS, len(mixture)))]


def _mirrored(stage: Stage, model: Any) -> bool:
    return stage.sides == "mirrored" or (stage.sides is None and any(mlp.mirrored_ups for mlp in ffns(model)))


def _check_fit(stage: Stage, model: Any) -> None:
    """Refuse what would be ignored, or break the model, with these feed-forward blocks."""
    kinds = {mlp.activation if isinstance(mlp, SparseGLU) else "dense" for mlp in ffns(model)}
    if stage.sparsity is not None and "dense" in kinds:
        raise UserError(
            f"stage {stage.name}: `sparsity` is for sparse models; convert the model first, or leave it out"
        )
    if stage.ternary_gates and "dense" in kinds:
        raise UserError(
            f"stage {stage.name}: `ternary_gates` is for sparse models; convert the model first, or leave it out"
        )
    if stage.prune is not None and "dense" in kinds:
        raise UserError(f"stage {stage.name}: `prune` is for sparse models; convert the model first, or leave it out")
    if stage.sparsity is not None and stage.sparsity.idle is not None and kinds != {"drelu"}:
        raise UserError(
            f"stage {stage.name}: `sparsity.idle` is for dReLU models, whose gate can be open for nothing; leave it out"
        )
    if stage.sparsity is not None and stage.sparsity.idle is not None and _mirrored(stage, model):
        raise UserError(f"stage {stage.name}: `sparsity.idle`: of mirrored ups one of two is always idle; leave it out")
    if stage.quant is not None and not fits_q4_0(model):
        raise UserError(
            f"stage {stage.name}: `quant: q4_0` needs rows of whole blocks of {BLOCK} weights; leave it out"
        )
    if stage.sides and kinds != {"drelu"}:
        raise UserError(f"stage {stage.name}: `sides` is for dReLU models; leave it out, or convert with dReLU")


def _prepare(stage: Stage, model: Any, teacher: Any, probes: list[Tensor], dtype: torch.dtype | None) -> None:
    """What a stage does to the student before training, by a look at the first windows that it will train on."""
    device = probes[0].device
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        if stage.sides:
            unused = allot_neurons(model, teacher, probes, dtype, stage.sides, stage.width)
            this_process().print(f"allot neurons: {unused:.1%} of the dense ones are left out", file=sys.stderr)
        if stage.prune is not None:
            _prune(stage.name, model, stage.prune, probes, dtype)
        if stage.sparsity is not None and stage.sparsity.threshold is not None:
            set_thresholds(model, stage.sparsity.threshold, probes, dtype)


def _prune(stage: str, model: Any, share: float, probes: list[Tensor], dtype: torch.dtype | None) -> None:
    try:
        lost = prune_gates(model, share, probes, dtype)
    except ValueError as error:
        raise UserError(f"stage {stage}: `prune`: {error}; make it smaller") from None
    kept = model.config.gate_rows()
    this_process().print(f"prune: {kept} gates a layer stay, {lost:.1%} of the output's energy went", file=sys.stderr)


def _predictors(
    stage: Stage, model: Any, probes: list[Tensor], seed: int, checkpoint: Path | None, dtype: torch.dtype | None
) -> Predictors | None:
    """The predictors that learn beside the model, as a checkpoint left them or new."""
    if stage.predictability is None:
        return None
    predictors = Predictors(model, stage.predictability)
    if checkpoint is not None:
        predictors.load(checkpoint / _PREDICTORS)
        return predictors
    device = probes[0].device
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        predictors.begin(probes, seed, dtype)
    return predictors


def _shares(recipe: Recipe, stage: Stage, device: torch.device) -> Tensor | None:
    """What a stage takes from its teacher, 0..1, for each source of text."""
    if stage.distillation is None:
        return None
    share, taught = stage.distillation.share, stage.distillation.sources
    known = [taught is None or source.domain in taught for source in recipe.data.sources]
    return torch.tensor([share if knows else 0.0 for knows in known], device=device)


def _objective(
    recipe: Recipe,
    stage: Stage,
    model: Any,
    teacher: Any,
    device: torch.device,
    dtype: torch.dtype | None,
    predictors: Predictors | None,
) -> Objective:
    compiled = recipe.compile and device.type == "cuda"
    if stage.soft_slopes:
        use_soft_slopes(model)
    if stage.ternary_gates:
        use_ternary_gates(model)
    if stage.quant is not None:
        use_q4_0(model)  # of what is not ternary
    if stage.objective == "layerwise":
        model.requires_grad_(False)
        for mlp in ffns(model):
            mlp.requires_grad_(True)
        if compiled:
            _compile(ffns(model))
        return Layerwise(model, teacher, stage.sparsity, dtype)
    if compiled:
        _compile(list(model.model.layers))
        if teacher is not None:
            _compile(list(teacher.model.layers))
    shares = _shares(recipe, stage, device)
    return NextToken(model, stage.sparsity, teacher, shares, dtype, compiled, predictors)


def _mixture(recipe: Recipe, tokenizer: Any, arguments: TrainingArguments, stage_index: int) -> Mixture:
    device_windows = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    windows = device_windows * arguments.world_size * arguments.max_steps
    data = recipe.data
    return build_mixture(data.sources, tokenizer, Path(data.cache), data.context, windows, recipe.seed + stage_index)


def _run_stage(
    recipe: Recipe, index: int, source: str, folder: Path, resume: bool, deadline: float | None
) -> dict[str, float] | None:
    """Train one stage from `source` into `folder`; returns its last validation, or None if it stopped early."""
    stage = recipe.stages[index]
    partial, process = folder.with_name(folder.name + ".partial"), this_process()
    checkpoint = _last_checkpoint(partial) if resume else None
    process.wait_for_everyone()
    if checkpoint is None and process.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True, exist_ok=True)

    arguments = _arguments(recipe, stage, partial)
    device = arguments.device
    dtype = torch.bfloat16 if device.type == "cuda" else None  # fp32 master weights, bf16 matrix products
    model = load_model(checkpoint or source)  # the checkpoint's config may hold thresholds
    _check_fit(stage, model)
    tokenizer = load_tokenizer(source)
    cache = Path(recipe.data.cache)
    with process.main_process_first():  # the others find the text tokenised
        mixture = _mixture(recipe, tokenizer, arguments, index)
        windows = {
            held.domain: validation_windows(held, tokenizer, cache, recipe.data.context)
            for held in recipe.data.validation
        }
    teacher = _teacher(stage, model.to(device), device, dtype)
    probes = _probes(mixture, device)
    if checkpoint is None:
        _prepare(stage, model, teacher, probes, dtype)
    predictors = _predictors(stage, model, probes, recipe.seed, checkpoint, dtype)
    objective = _objective(recipe, stage, model, teacher, device, dtype, predictors)
    trainer = RecoveryTrainer(
        model=model,
        args=arguments,
        train_dataset=mixture,
        eval_dataset=windows,
        data_collator=default_collate,  # windows have one length: nothing to pad
        objective=objective,
        stage=stage,
        windows=windows,
        domains=[held.domain for held in recipe.data.sources],
        progress_log=ProgressLog(partial / "log.jsonl", stage, arguments.max_steps, recipe.data.context),
        dtype=dtype,
        predictors=predictors,
        callbacks=[TimeLimit(deadline)],
    )
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.state.global_step < arguments.max_steps:
        return None
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        settle_rounded(model)
        if not stage.ternary_gates:  # what is cheap to read stays the gate
            settle_roles(model, probes, dtype)
    metrics = trainer.evaluate()
    if process.is_main_process:
        _finish(partial, folder, model, tokenizer, Path(source), metrics)
    process.wait_for_everyone()
    return metrics


def _finish(partial: Path, folder: Path, model: Any, tokenizer: Any, source: Path, metrics: dict[str, float]) -> None:
    """Turn the folder of a stage in training into that of a finished one."""
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    carry_licence(source, partial)
    (partial / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    os.replace(partial, folder)
    for leftover in folder.glob("checkpoint-*"):  # until here the stage could have gone on from them
        shutil.rmtree(leftover)


def _prepare_output(output: Path, recipe_path: Path, resume: bool) -> None:
    kept = output / "recipe.yaml"
    if kept.exists():
        if not resume:
            raise UserError(f"{output}: holds a run already; add --resume to go on with it, or choose another `output`")
        if kept.read_bytes() != recipe_path.read_bytes():
            raise UserError(f"{output}: was made with another recipe than {recipe_path}; choose another `output`")
    output.mkdir(parents=True, exist_ok=True)
    kept.write_bytes(recipe_path.read_bytes())


def train_from_recipe(path: Path, resume: bool = False, max_seconds: float | None = None) -> dict[str, Any]:
    """Run every stage of a recipe that is not done yet.

    Args:
        path: the YAML recipe, see recipes.Recipe.
        resume: go on with a run that was interrupted; without it an output folder that holds a run is an error.
        max_seconds: stop, with a checkpoint, after this long.

    Returns:
        {"output": folder of the last stage or None if it is not done, "done": bool, "stages": {name: metrics}}, metrics
        as "eval_<domain>_ce" in nats per token and "eval_<domain>_sparsity_h" in 0..1.

    Raises:
        UserError: the recipe, a model folder or a text file is not usable.
    """
    deadline = None if max_seconds is None else time.monotonic() + max_seconds
    recipe = load_recipe(path)
    check_sources(recipe.data)
    output, process = Path(recipe.output), this_process()
    if process.is_main_process:
        _prepare_output(output, path, resume)
    stages: dict[str, Any] = {}
    source = recipe.model
    for index, stage in enumerate(recipe.stages):
        folder = output / f"{index + 1}-{stage.name}"
        process.wait_for_everyone()
        if not folder.exists():
            process.print(f"stage {stage.name}: {source} -> {folder}", file=sys.stderr)
            with sdpa_kernel(_ATTENTION, set_priority=True):
                metrics = _run_stage(recipe, index, source, folder, resume, deadline)
            if metrics is None:
                return {"output": None, "done": False, "stages": stages}
        stages[stage.name] = json.loads((folder / "metrics.json").read_text())
        source = str(folder)
    return {"output": source, "done": True, "stages": stages}
