"""The whole training path on a tiny dReLU model: stages, log, resume at the very next sample, safe folders."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import make_folder
from transformers import AutoModelForCausalLM

from turbosparse.errors import UserError
from turbosparse.model.quantize import Type, dequantize, quantize
from turbosparse.relufy import trainer as trainer_module
from turbosparse.relufy.convert import convert
from turbosparse.relufy.trainer import RecoveryTrainer, train_from_recipe

_STAGES = """
 - {name: warm, objective: layerwise, teacher: dense, tokens: 2048, batch_tokens: 64, device_windows: 4,
    learning_rate: 1.0e-3, sides: best, width: 1.5, sparsity: {target_rate: 0.2, weight: 0.5}, save_every: 16}
 - {name: recover, objective: cross_entropy, tokens: 640, batch_tokens: 64, device_windows: 2, learning_rate: 1.0e-2,
    distillation: {teacher: dense, share: 0.5}, soft_slopes: true, ffn_lr: 2, predictability: {selected: 1.2},
    sparsity: {target_rate: 0.1, weight: 1.0, threshold: 0.2}, eval_every: 5, save_every: 3}
"""


def _recipe(folder: Path, output: str, model: str = "drelu", stages: str = _STAGES) -> Path:
    path = folder / f"{output}.yaml"
    path.write_text(f"""
model: {model}
output: {output}
data:
  context: 16
  cache: cache
  sources: [{{domain: a, path: a.jsonl}}, {{domain: b, path: b.jsonl, weight: 2}}]
  validation: [{{domain: a, path: a.jsonl}}, {{domain: b, path: b.jsonl}}]
log_every: 1
workers: 0
stages:{stages}""")
    return path


@pytest.fixture(scope="module")
def whole_run(folder: Path) -> Path:
    assert train_from_recipe(_recipe(folder, "whole"))["done"]
    return folder / "whole"


def _log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_stages_learn_and_log_loss_and_sparsity_per_domain(whole_run):
    warm = [record for record in _log(whole_run / "1-warm") if "loss" in record]
    assert warm[-1]["relative_error"] < warm[0]["relative_error"]
    assert warm[-1]["sparsity_h"] > warm[0]["sparsity_h"]
    recover = _log(whole_run / "2-recover")
    steps = [record for record in recover if "loss" in record]
    assert len(steps) == 10 and steps[-1]["tokens"] == 640
    assert {"ce", "ce_a", "ce_b", "mixed_ce", "penalty", "missed", "sparsity_h", "learning_rate"} <= steps[-1].keys()
    checks = [record for record in recover if "validation" in record]
    assert [record["step"] for record in checks] == [5, 10]
    assert checks[-1]["mean"]["ce"] < checks[0]["mean"]["ce"]
    assert 0 < checks[-1]["validation"]["a"]["sparsity_h"] < 1
    assert 0 < checks[-1]["validation"]["a"]["selected_98"] <= checks[-1]["validation"]["a"]["max_layer_selected_98"]
    metrics = json.loads((whole_run / "2-recover" / "metrics.json").read_text())
    assert metrics["eval_a_ce"] == checks[-1]["validation"]["a"]["ce"]
    config = json.loads((whole_run / "2-recover" / "config.json").read_text())
    assert len(config["activation_threshold"]) == 2 and min(config["activation_threshold"]) > 0
    assert config["intermediate_size"] == 128  # 1.5 times 96, in whole blocks


def _assert_metrics_are_those_of_a_forward_pass(folder: Path, run: Path) -> None:
    """The reported cross-entropy and zeros, computed again through the model's own loss and a hook on h."""
    from transformers import AutoTokenizer

    from turbosparse.relufy.data import validation_windows
    from turbosparse.relufy.recipes import TextSource

    model = AutoModelForCausalLM.from_pretrained(run, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(run)
    windows = validation_windows(TextSource(domain="a", path=str(folder / "a.jsonl")), tokenizer, folder / "cache", 16)
    zeros, closed = [], []
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_hook(lambda _m, inputs, _o: zeros.append((inputs[0] == 0).float().mean()))
        layer.mlp.gate_proj.register_forward_hook(lambda _m, _i, gate: closed.append((gate <= 0).float().mean()))
    with torch.no_grad():
        loss = model(windows, labels=windows).loss.item()
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["eval_a_ce"] == pytest.approx(loss, rel=1e-5)
    assert metrics["eval_a_sparsity_h"] == pytest.approx(torch.stack(zeros).mean().item(), abs=1e-6)
    assert metrics["eval_a_sparsity_gate"] == pytest.approx(torch.stack(closed).mean().item(), abs=1e-6)


def test_validation_equals_a_plain_forward_pass(folder, whole_run):
    _assert_metrics_are_those_of_a_forward_pass(folder, whole_run / "2-recover")


@pytest.mark.parametrize(
    ("stage", "interrupted_step", "left"),
    [("recover", 2, 2 * 10), ("recover", 7, 2 * 4), ("warm", 20, 16 + 2 * 10)],  # micro-batches, from the checkpoint on
)
def test_an_interrupted_run_resumes_to_the_same_weights(folder, whole_run, monkeypatch, stage, interrupted_step, left):
    recipe = _recipe(folder, f"interrupted{interrupted_step}")
    seen: list[torch.Tensor] = []
    original = RecoveryTrainer.compute_loss

    def interrupting(self, model, inputs, *args, **kwargs):
        if self.stage.name == stage and self.state.global_step == interrupted_step:
            raise KeyboardInterrupt
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(RecoveryTrainer, "compute_loss", interrupting)
    with pytest.raises(KeyboardInterrupt):
        train_from_recipe(recipe)
    assert not (folder / f"interrupted{interrupted_step}" / "2-recover").exists()

    def recording(self, model, inputs, *args, **kwargs):
        seen.append(inputs["input_ids"].clone())
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(RecoveryTrainer, "compute_loss", recording)
    with pytest.raises(UserError, match="--resume"):
        train_from_recipe(recipe)
    assert train_from_recipe(recipe, resume=True)["done"]
    assert len(seen) == left
    resumed = AutoModelForCausalLM.from_pretrained(folder / f"interrupted{interrupted_step}" / "2-recover")
    expected = AutoModelForCausalLM.from_pretrained(whole_run / "2-recover")
    for (name, tensor), reference in zip(resumed.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(tensor, reference), name


def test_a_half_written_checkpoint_is_not_resumed(folder, monkeypatch):
    recipe = _recipe(folder, "half", stages=_STAGES.replace("eval_every: 5, save_every: 3", "save_every: 4"))
    original = RecoveryTrainer._save_optimizer_and_scheduler

    def interrupted(self, output_dir):
        if self.state.global_step == 8:
            raise KeyboardInterrupt
        return original(self, output_dir)

    monkeypatch.setattr(RecoveryTrainer, "_save_optimizer_and_scheduler", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_from_recipe(recipe)
    partial = folder / "half" / "2-recover.partial"
    assert (partial / "checkpoint-8").exists()
    assert trainer_module._last_checkpoint(partial) == partial / "checkpoint-4"


def test_a_model_that_could_not_be_written_costs_no_training(folder, monkeypatch):
    recipe = _recipe(folder, "full-disk")
    original = RecoveryTrainer.compute_loss
    monkeypatch.setattr(trainer_module, "carry_licence", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        train_from_recipe(recipe)
    monkeypatch.undo()

    def not_again(self, *args, **kwargs):
        assert self.stage.name == "recover"  # the first stage was trained, and not the second
        return original(self, *args, **kwargs)

    monkeypatch.setattr(RecoveryTrainer, "compute_loss", not_again)
    assert train_from_recipe(recipe, resume=True)["done"]
    assert not list((folder / "full-disk" / "1-warm").glob("checkpoint-*"))


def test_a_run_stops_in_time_and_goes_on(folder, whole_run):
    recipe = _recipe(folder, "in-time")
    for step in (1, 2):
        assert train_from_recipe(recipe, resume=True, max_seconds=0) == {"output": None, "done": False, "stages": {}}
        assert (folder / "in-time" / "1-warm.partial" / f"checkpoint-{step}").exists()
    assert train_from_recipe(recipe, resume=True)["done"]
    stopped, expected = (
        AutoModelForCausalLM.from_pretrained(run / "2-recover") for run in (folder / "in-time", whole_run)
    )
    for (name, tensor), reference in zip(stopped.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(tensor, reference), name


def test_another_recipe_cannot_resume_a_run(folder, whole_run):
    (folder / "other").mkdir()
    recipe = _recipe(folder, "whole")
    recipe.write_text(recipe.read_text() + "\nseed: 7\n")
    with pytest.raises(UserError, match="another recipe"):
        train_from_recipe(recipe, resume=True)


def test_a_dense_control_trains_with_the_same_code(folder):
    sizes = "tokens: 320, batch_tokens: 64, device_windows: 2, learning_rate: 1.0e-2"
    stages = f"\n - {{name: adapt, objective: cross_entropy, {sizes}}}"
    result = train_from_recipe(_recipe(folder, "control", model="dense", stages=stages))
    assert result["stages"]["adapt"]["eval_ce"] < np.log(64)
    assert "eval_sparsity_h" not in result["stages"]["adapt"]


def test_ternary_gates_are_for_sparse_models(folder):
    sizes = "tokens: 320, batch_tokens: 64, device_windows: 2, learning_rate: 1.0e-2"
    stages = f"\n - {{name: gates, objective: cross_entropy, {sizes}, ternary_gates: true}}"
    with pytest.raises(UserError, match="`ternary_gates` is for sparse models"):
        train_from_recipe(_recipe(folder, "dense-gates", model="dense", stages=stages))


def test_idle_gates_are_refused_where_there_are_none_and_closed_where_there_are(folder):
    sizes = "tokens: 2560, batch_tokens: 64, device_windows: 2, learning_rate: 1.0e-2, eval_every: 1"
    idle = "{target_rate: 0.02, start_rate: 0.02, weight: 20}"
    stages = f"""
 - {{name: close, objective: cross_entropy, {sizes}, sparsity: {{target_rate: 0.3, start_rate: 0.3, idle: {idle}}}}}"""
    for model in ("dense", "reglu"):
        with pytest.raises(UserError, match=r"is for (sparse|dReLU) models"):
            train_from_recipe(_recipe(folder, f"idle-{model}", model=model, stages=stages))
    output = Path(train_from_recipe(_recipe(folder, "idle", stages=stages))["output"])
    means = [record["mean"] for record in map(json.loads, (output / "log.jsonl").open()) if "mean" in record]
    mirrored = stages.replace("cross_entropy", "layerwise").replace(
        "sparsity", "teacher: dense, sides: mirrored, sparsity"
    )
    with pytest.raises(UserError, match="of mirrored ups one of two is always idle"):
        train_from_recipe(_recipe(folder, "idle-mirrored", stages=mirrored))
    idle_rates = [mean["sparsity_h"] - mean["sparsity_gate"] for mean in means]
    assert idle_rates[-1] < idle_rates[0] / 2


def test_ternary_gates_are_those_of_the_model_that_is_validated_and_saved(folder):
    sizes = "tokens: 320, batch_tokens: 64, device_windows: 2, learning_rate: 1.0e-2"
    stages = f"\n - {{name: gates, objective: cross_entropy, {sizes}, ternary_gates: true, soft_slopes: true}}"
    output = Path(train_from_recipe(_recipe(folder, "ternary", stages=stages))["output"])
    model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    for layer in model.model.layers:
        for row in layer.mlp.gate_proj.weight:
            assert len(row[row != 0].abs().unique()) == 1
    _assert_metrics_are_those_of_a_forward_pass(folder, output)


@pytest.mark.parametrize(("sides", "ups"), [("pairs", 128), ("mirrored", 64)])
def test_pairs_that_share_gates_go_through_every_stage(folder, sides, ups):
    """Layerwise, recovery with soft slopes, predictability and a threshold, and ternary gates in the end."""
    last = """ - {name: gates, objective: cross_entropy, tokens: 320, batch_tokens: 64, device_windows: 2,
    learning_rate: 1.0e-2, ternary_gates: true, quant: q4_0, soft_slopes: true}
"""
    stages = _STAGES.replace("sides: best", f"sides: {sides}") + last
    output = Path(train_from_recipe(_recipe(folder, sides, stages=stages))["output"])
    warm = [record for record in _log(folder / sides / "1-warm") if "loss" in record]
    assert warm[-1]["relative_error"] < warm[0]["relative_error"]
    for stage in ("1-warm", "2-recover", "3-gates"):
        config = json.loads((folder / sides / stage / "config.json").read_text())
        assert (config["intermediate_size"], config["neurons_per_gate"]) == (128, 2)
    model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    for layer in model.model.layers:
        assert layer.mlp.gate_proj.weight.shape == (64, 32) and layer.mlp.up_proj.weight.shape == (ups, 32)
        for row in layer.mlp.gate_proj.weight:
            assert len(row[row != 0].abs().unique()) == 1
    _assert_metrics_are_those_of_a_forward_pass(folder, output)


def test_a_stage_that_prunes_can_be_interrupted(folder, monkeypatch):
    """Its checkpoint has the pruned shape, which is not pruned again."""
    last = """ - {name: less, objective: cross_entropy, tokens: 320, batch_tokens: 64, device_windows: 2, save_every: 2,
    learning_rate: 1.0e-2, prune: 0.3, sparsity: {target_rate: 0.2, threshold: 0.3}}
"""
    stages = _STAGES.replace("sides: best", "sides: pairs") + last
    recipe = _recipe(folder, "pruned", stages=stages)
    original = RecoveryTrainer.compute_loss

    def interrupting(self, *args, **kwargs):
        if self.stage.name == "less" and self.state.global_step == 3:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(RecoveryTrainer, "compute_loss", interrupting)
    with pytest.raises(KeyboardInterrupt):
        train_from_recipe(recipe)
    monkeypatch.setattr(RecoveryTrainer, "compute_loss", original)
    output = Path(train_from_recipe(recipe, resume=True)["output"])
    config = json.loads((output / "config.json").read_text())
    assert (config["intermediate_size"], config["neurons_per_gate"]) == (64, 2)  # 0.7 of 128, in whole blocks
    _assert_metrics_are_those_of_a_forward_pass(folder, output)


@pytest.mark.parametrize(("model", "share", "word"), [("dense", 0.3, "sparse models"), ("drelu", 0.9, "leaves none")])
def test_what_cannot_be_pruned(folder, model, share, word):
    sizes = "tokens: 320, batch_tokens: 64, device_windows: 2, learning_rate: 1.0e-2"
    stages = f"\n - {{name: less, objective: cross_entropy, {sizes}, prune: {share}}}"
    with pytest.raises(UserError, match=f"stage less: `prune`.*{word}"):
        train_from_recipe(_recipe(folder, f"unpruned-{model}", model=model, stages=stages))


def test_a_model_trained_for_q4_0_loses_nothing_to_it(folder):
    sizes = "tokens: 320, batch_tokens: 64, device_windows: 2, learning_rate: 1.0e-2"
    stages = f"\n - {{name: bits, objective: cross_entropy, {sizes}, quant: q4_0, soft_slopes: true}}"
    output = Path(train_from_recipe(_recipe(folder, "bits", stages=stages))["output"])
    _assert_metrics_are_those_of_a_forward_pass(folder, output)
    model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    for name, weight in model.model.layers.named_parameters():
        if name.endswith("proj.weight"):
            stored = dequantize(
                quantize(weight.detach().numpy(), Type.Q4_0).reshape(-1), Type.Q4_0, tuple(weight.shape)
            )
            assert torch.equal(torch.from_numpy(stored), weight), name


def test_training_for_q4_0_needs_rows_of_whole_blocks(folder):
    make_folder(folder / "odd", "llama", "drelu", hidden_size=48)
    sizes = "tokens: 320, batch_tokens: 64, device_windows: 2, learning_rate: 1.0e-2"
    stages = f"\n - {{name: bits, objective: cross_entropy, {sizes}, quant: q4_0}}"
    for tokenizer in (folder / "dense").glob("tokenizer*"):
        shutil.copy(tokenizer, folder / "odd")
    with pytest.raises(UserError, match="`quant: q4_0` needs rows of whole blocks of 32"):
        train_from_recipe(_recipe(folder, "odd-rows", model="odd", stages=stages))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (("model: drelu", "model: absent"), "absent"),
        (("device_windows: 4", "device_windows: 3"), "divisor"),
        (("model: drelu", "model: dense"), "sparse models"),
        (("model: drelu", "model: reglu"), "dReLU models"),
    ],
)
def test_what_the_user_got_wrong(folder, change, word):
    recipe = _recipe(folder, f"wrong-{word}")
    recipe.write_text(recipe.read_text().replace(*change))
    with pytest.raises(UserError, match=word):
        train_from_recipe(recipe)


def test_text_that_is_missing_stops_a_run_before_it_spends_time(folder):
    recipe = _recipe(folder, "no-text")
    recipe.write_text(recipe.read_text().replace("path: b.jsonl}]", "path: absent.jsonl}]"))
    with pytest.raises(UserError, match=r"absent\.jsonl"):
        train_from_recipe(recipe)
    assert not (folder / "no-text").exists()


def test_a_run_can_be_described_and_keeps_its_licence(folder):
    """The licence goes from the dense folder through the swap and every stage; the card finds what the run wrote."""
    from turbosparse.model.provenance import provenance
    from turbosparse.publish.card import Evidence, model_card
    from turbosparse.publish.run import read_run

    (folder / "licensed").mkdir()
    for file in (folder / "dense").iterdir():
        (folder / "licensed" / file.name).write_bytes(file.read_bytes())
    (folder / "licensed" / "README.md").write_text("---\nlicense: mit\nbase_model: a/b\n---\n")
    (folder / "licensed" / "LICENSE").write_text("the text of it")
    convert(folder / "licensed", folder / "licensed-drelu")
    stages = "\n - {name: recover, objective: cross_entropy, tokens: 128, batch_tokens: 64, learning_rate: 1.0e-2}"
    result = train_from_recipe(_recipe(folder, "described", model="licensed-drelu", stages=stages))
    stage = folder / "described" / "1-recover"
    assert (stage / "LICENSE").read_text() == "the text of it"
    origin = provenance(stage)
    assert (origin.license, origin.base_model) == ("mit", "a/b")
    run = read_run(stage)
    assert run.tokens == 128
    assert f"{result['stages']['recover']['eval_ce']:.4f}" in model_card("name", origin, Evidence(run))
