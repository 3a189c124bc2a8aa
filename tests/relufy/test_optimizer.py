"""AdamW with two learning rates."""

from transformers import LlamaConfig, LlamaForCausalLM

from turbosparse.relufy.optimizer import make_adamw
from turbosparse.relufy.recipes import Stage


def test_ffns_learn_at_a_rate_of_their_own():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 40}
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, num_key_value_heads=1, **sizes))
    stage = Stage(name="train", objective="cross_entropy", tokens=1, learning_rate=1e-3, ffn_lr=2.0, weight_decay=0.1)
    settings = {id(p): group for group in make_adamw(model, stage).param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        assert settings[id(p)]["lr"] == (2e-3 if ".mlp." in name else 1e-3), name
        assert settings[id(p)]["weight_decay"] == (0.0 if "norm" in name else 0.1), name
