"""The swap: every family, what a folder computes and where it loads; it never loads silently as something else."""

import copy
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from factories import add_predictor, make_folder, random_predictor
from gguf import GGMLQuantizationType
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import turbosparse
from turbosparse.errors import UserError
from turbosparse.model.export import export_gguf
from turbosparse.relufy.convert import convert
from turbosparse.relufy.drelu import FAMILIES, SparseGLU, TurboSparseLlamaConfig, drelu, reglu
from turbosparse.relufy.slopes import SoftSlopeGLU
from turbosparse.relufy.source import DENSE_TYPES

_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_DENSE_TYPE = {family: config.__mro__[2].model_type for family, (config, _) in FAMILIES.items()}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny random dense folder of every family."""
    folder = tmp_path_factory.mktemp("dense")
    folders = {}
    for family, model_type in _DENSE_TYPE.items():
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **_SIZES))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        folders[family] = folder / family
        model.save_pretrained(folders[family])
    return folders


def test_what_is_said_before_torch_is_loaded_knows_every_family():
    assert set(DENSE_TYPES) == set(FAMILIES)


def _by_hand(model: torch.nn.Module, activation: str) -> None:
    """Replace the FFN of a dense model by the formula, without our module."""
    combine = {"drelu": lambda g, u: g.clamp(min=0) * u.clamp(min=0), "reglu": lambda g, u: g.clamp(min=0) * u}[
        activation
    ]
    for layer in model.model.layers:
        mlp = layer.mlp
        mlp.forward = lambda x, mlp=mlp: mlp.down_proj(combine(mlp.gate_proj(x), mlp.up_proj(x)))


@pytest.mark.parametrize("activation", ["drelu", "reglu"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_converted_folder_computes_the_formula_with_the_dense_weights(dense, tmp_path, family, activation):
    record = convert(dense[family], tmp_path / "sparse", activation)
    assert record["architecture"] == f"turbosparse_{family}" and record["activation"] == activation
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    assert type(model) is FAMILIES[family][1] and model.config.architectures == [type(model).__name__]
    assert all(isinstance(layer.mlp, SparseGLU) for layer in model.model.layers)
    reference = AutoModelForCausalLM.from_pretrained(dense[family])
    _by_hand(reference, activation)
    ids = torch.randint(3, 64, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, reference(ids).logits, rtol=1e-5, atol=1e-5)


def test_saving_a_loaded_model_keeps_its_kind_and_its_code(dense, tmp_path):
    convert(dense["llama"], tmp_path / "a")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert (config["model_type"], config["activation"], config["hidden_act"]) == ("turbosparse_llama", "drelu", "drelu")
    assert (tmp_path / "b" / "modeling_turbosparse.py").read_text() == (
        tmp_path / "a" / "modeling_turbosparse.py"
    ).read_text()
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_maths():
    gate, up = torch.tensor([-1.0, 2.0, 2.0, -1.0]), torch.tensor([3.0, 3.0, -3.0, -3.0])
    assert drelu(gate, up).tolist() == [0.0, 6.0, 0.0, 0.0]
    assert reglu(gate, up).tolist() == [0.0, 6.0, -6.0, 0.0]


_LOAD = """
import sys, torch
{imports}
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], {options})
torch.manual_seed(0)
x = torch.randn(5, 32)
mlp = model.model.layers[0].mlp
expected = mlp.down_proj(torch.relu(mlp.gate_proj(x)) * torch.relu(mlp.up_proj(x)))
assert torch.equal(mlp(x), expected), "not dReLU"
print(type(model).__name__)
"""


def _glu(activation: str, group: int) -> SparseGLU:
    """Twelve neurons, a gate for each `group` of them."""
    gate, up, down = nn.Linear(8, 12 // group), nn.Linear(8, 12), nn.Linear(12, 8)
    return SparseGLU(gate, up, down, activation, 0.05, group)


def _mirrored() -> tuple[SparseGLU, SparseGLU]:
    """Twelve neurons under three gates, two to an up, and the same block with an up for every neuron."""
    mlp = SparseGLU(nn.Linear(8, 3), nn.Linear(8, 6), nn.Linear(12, 8), "drelu", 0.05, 4, mirrored_ups=True)
    twin = copy.deepcopy(mlp)
    twin.up_proj, twin.mirrored_ups = nn.Linear(8, 12), False
    with torch.no_grad():
        for name in ("weight", "bias"):
            rows = getattr(mlp.up_proj, name)
            getattr(twin.up_proj, name).copy_(torch.stack([rows, -rows], 1).flatten(0, 1))
    return mlp, twin


@pytest.mark.parametrize("soft", [False, True])
def test_a_mirrored_up_is_that_of_one_neuron_and_less_that_of_the_next(soft):
    torch.manual_seed(0)
    pair, seen = _mirrored(), []
    for mlp in pair:
        mlp.tap = lambda *values: seen.append([value.detach() for value in values])
        if soft:
            mlp.__class__ = SoftSlopeGLU
    x, weight = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    outputs = [mlp(x) for mlp in pair]
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*seen)
    for output in outputs:
        (output * weight).sum().backward()
    mine, theirs = (mlp.up_proj.weight.grad for mlp in pair)
    torch.testing.assert_close(mine, theirs[0::2] - theirs[1::2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"neurons_per_gate": 2, "mirrored_ups": 1}, "true or false"),
        ({"neurons_per_gate": 3, "mirrored_ups": True}, "even `neurons_per_gate`"),
        ({"neurons_per_gate": 2, "mirrored_ups": True, "activation": "reglu"}, "needs dReLU"),
    ],
)
def test_ups_are_mirrored_under_an_even_number_of_neurons(changes, message):
    with pytest.raises(ValueError, match=message):
        TurboSparseLlamaConfig(**({"activation": "drelu", "intermediate_size": 96} | changes))


def _repeated(shared: SparseGLU) -> SparseGLU:
    """The same block with a copy of its gate for every neuron."""
    twin = copy.deepcopy(shared)
    twin.gate_proj, twin.neurons_per_gate = nn.Linear(8, 12), 1
    with torch.no_grad():
        for name in ("weight", "bias"):
            rows = getattr(shared.gate_proj, name).repeat_interleave(shared.neurons_per_gate, 0)
            getattr(twin.gate_proj, name).copy_(rows)
    return twin


@pytest.mark.parametrize("group", [2, 3])
@pytest.mark.parametrize("activation", ["drelu", "reglu"])
@pytest.mark.parametrize("soft", [False, True])
def test_a_shared_gate_is_that_of_each_of_its_neurons(group, activation, soft):
    torch.manual_seed(group)
    shared = _glu(activation, group)
    twin, seen = _repeated(shared), []
    for mlp in (shared, twin):
        mlp.tap = lambda *values: seen.append([value.detach() for value in values])
        if soft:
            mlp.__class__ = SoftSlopeGLU
    x, weight = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    outputs = [mlp(x) for mlp in (shared, twin)]
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*seen)  # gate, up and h of every neuron
    assert seen[0][0].shape == (2, 5, 12) and 0 < (seen[0][2] == 0).sum() < seen[0][2].numel()
    for output in outputs:
        (output * weight).sum().backward()
    for name in ("weight", "bias"):
        summed = getattr(twin.gate_proj, name).grad.unflatten(0, (-1, group)).sum(1)
        torch.testing.assert_close(getattr(shared.gate_proj, name).grad, summed)
        torch.testing.assert_close(getattr(shared.up_proj, name).grad, getattr(twin.up_proj, name).grad)


@pytest.mark.parametrize("group", [5, 0, -2, 1 << 40, "2", 2.0, True, None])
def test_gates_that_cannot_be_shared_so_are_no_config(group):
    with pytest.raises(ValueError, match="`neurons_per_gate` must be a whole number >= 1 that divides 96"):
        TurboSparseLlamaConfig(activation="drelu", intermediate_size=96, neurons_per_gate=group)


def _load_elsewhere(
    folder: Path, tmp_path: Path, imports: str = "", options: str = ""
) -> subprocess.CompletedProcess[str]:
    """Load `folder` in a new process, far from this package unless `imports` asks for it."""
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(Path(turbosparse.__file__).parents[1])
    if "turbosparse" not in imports:
        environment["PYTHONPATH"] = str(_without_turbosparse(tmp_path))
    script = _LOAD.format(imports=imports, options=options)
    command = [sys.executable, "-c", script, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, cwd=tmp_path)


def _without_turbosparse(tmp_path: Path) -> Path:
    """A folder for PYTHONPATH in which `import turbosparse` fails, even where the package is installed."""
    blocker = tmp_path / "blocker" / "turbosparse"
    blocker.mkdir(parents=True, exist_ok=True)
    (blocker / "__init__.py").write_text("raise ImportError('not installed here')\n")
    return blocker.parent


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_it_loads_as_drelu_or_not_at_all(dense, tmp_path, family):
    convert(dense[family], tmp_path / "sparse")
    name = FAMILIES[family][1].__name__
    ways = [
        {"imports": "import turbosparse"},
        {"imports": "import transformers.models.auto, turbosparse"},
        {"options": "trust_remote_code=True"},
        {"options": "trust_remote_code=False"},
    ]
    with ThreadPoolExecutor(2) as pool:  # each is a new process, which mostly imports
        *loaded, stranger = pool.map(lambda way: _load_elsewhere(tmp_path / "sparse", tmp_path, **way), ways)
    for process in loaded:
        assert (process.returncode, process.stdout.strip()) == (0, name), process.stderr
    assert stranger.returncode != 0 and "trust_remote_code" in stranger.stderr


@pytest.mark.parametrize("family", FAMILIES)
def test_the_dense_classes_of_transformers_refuse_it(dense, tmp_path, family):
    convert(dense[family], tmp_path / "sparse", "reglu")
    dense_class = FAMILIES[family][1].__mro__[2]
    with pytest.raises(Exception, match=r"reglu|turbosparse"):
        dense_class.from_pretrained(tmp_path / "sparse")


def test_a_config_whose_two_activations_disagree_is_an_error(dense, tmp_path):
    convert(dense["llama"], tmp_path / "sparse")
    path = tmp_path / "sparse" / "config.json"
    config = json.loads(path.read_text())
    for edit in ({"activation": "reglu"}, {"hidden_act": "silu"}, {"activation": None}):
        path.write_text(json.dumps(config | edit))
        with pytest.raises(ValueError, match="activation"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")


def _break(folder: Path, what: str) -> None:
    config_path = folder / "config.json"
    config = json.loads(config_path.read_text())
    if what == "no config":
        config_path.unlink()
    elif what == "not JSON":
        config_path.write_text("{")
    elif what == "a list":
        config_path.write_text("[]")
    elif what == "unsupported":
        config_path.write_text(json.dumps(config | {"model_type": "mamba"}))
    elif what == "activation":
        config_path.write_text(json.dumps(config | {"hidden_act": "tanh"}))
    elif what == "pickle only":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    elif what == "truncated":
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
    elif what == "more layers":
        config_path.write_text(json.dumps(config | {"num_hidden_layers": 3}))


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("no config", "has no config.json"),
        ("not JSON", "not a JSON object"),
        ("a list", "not a JSON object"),
        ("unsupported", "'mamba' is not supported"),
        ("activation", "'tanh'"),
        ("pickle only", "no .safetensors"),
        ("truncated", "damaged"),
        ("more layers", "model.layers.2.mlp.gate_proj.weight"),
    ],
)
def test_a_bad_source_is_one_sentence_and_leaves_nothing(dense, tmp_path, what, sentence):
    source = tmp_path / "source"
    source.mkdir()
    for file in dense["llama"].iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    _break(source, what)
    with pytest.raises(UserError, match=sentence.replace(".", r"\.")) as caught:
        convert(source, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_is_there_stays_and_what_is_sparse_is_not_converted_again(dense, tmp_path):
    convert(dense["llama"], tmp_path / "sparse")
    with pytest.raises(UserError, match="exists already"):
        convert(dense["llama"], tmp_path / "sparse")
    with pytest.raises(UserError, match="sparse model already"):
        convert(tmp_path / "sparse", tmp_path / "again")
    with pytest.raises(UserError, match="no such file"):
        convert(tmp_path / "nowhere", tmp_path / "out")


def test_mixtures_of_experts_are_not_converted(tiny_folder, tiny_gguf, tmp_path):
    with pytest.raises(UserError, match="'mixtral' is not supported"):
        convert(tiny_folder("mixtral"), tmp_path / "out")
    with pytest.raises(UserError, match="is a mixture of experts"):
        convert(tiny_gguf("mixtral"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("group", "mirrored"), [(1, False), (3, False), (4, True)])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_sparse_file_becomes_the_folder_that_it_was_made_from(family, group, mirrored, tmp_path):
    changes = {"activation_threshold": [0.25, 0.5], "neurons_per_gate": group, "mirrored_ups": mirrored}
    source = make_folder(tmp_path / "source", family, "drelu", **changes)
    export_gguf(source, tmp_path / "model.gguf", "f32")
    record = convert(tmp_path / "model.gguf", tmp_path / "out", "keep")
    assert (record["architecture"], record["activation"]) == (f"turbosparse_{family}", "drelu")
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (source, tmp_path / "out"))
    assert after.config.activation_threshold == [0.25, 0.5] and after.config.neurons_per_gate == group
    assert after.config.mirrored_ups == mirrored
    assert (after.config.bos_token_id, after.config.eos_token_id) == (
        before.config.bos_token_id,
        before.config.eos_token_id,
    )
    theirs, mine = before.state_dict(), after.state_dict()
    assert theirs.keys() == mine.keys()
    assert all(torch.equal(theirs[name], mine[name]) for name in theirs)
    ids = torch.randint(3, 64, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(before(ids).logits, after(ids).logits)
    text = "Above the sky\n 1234"
    assert AutoTokenizer.from_pretrained(source)(text) == AutoTokenizer.from_pretrained(tmp_path / "out")(text)


def test_predictors_of_a_sparse_file_are_left_out(tiny_gguf, tmp_path):
    predictor = random_predictor(2, 64, 96, 4, normed=True)
    add_predictor(tiny_gguf("llama", "drelu"), tmp_path / "with.gguf", predictor, GGMLQuantizationType.F32)
    convert(tmp_path / "with.gguf", tmp_path / "out", "keep")
    assert not any("predictor" in name for name in load_file(tmp_path / "out" / "model.safetensors"))


def test_a_sparse_file_is_not_converted_again_and_what_a_folder_cannot_say_is_refused(tiny_gguf, tmp_path):
    with pytest.raises(UserError, match="is a drelu model already; convert the dense one, or make a folder"):
        convert(tiny_gguf("llama", "drelu"), tmp_path / "out")
    with pytest.raises(UserError, match="norms after attention and FFN cannot be written into a folder yet"):
        convert(tiny_gguf("gemma2", "drelu"), tmp_path / "out", "keep")
    assert not list(tmp_path.iterdir())


def test_a_sparse_folder_is_kept_if_its_config_can_be_used(tmp_path):
    source = make_folder(tmp_path / "source", "llama", "drelu")
    assert convert(source, tmp_path / "out", "keep")["activation"] == "drelu"
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"activation_threshold": [0.5]}))
    with pytest.raises(UserError, match=r"config\.json cannot be used .*`activation_threshold` must be 2 finite"):
        convert(source, tmp_path / "again", "keep")
    (source / "config.json").write_text(json.dumps(config | {"neurons_per_gate": 5}))
    with pytest.raises(UserError, match=r"config\.json cannot be used .*`neurons_per_gate` must be a whole number"):
        convert(source, tmp_path / "again", "keep")
    assert not (tmp_path / "again").exists()
