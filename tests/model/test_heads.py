"""The head's construction, its files and what it refuses."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from vidcls.model.heads import CONFIG_NAME, WEIGHTS_NAME, ActionDecoder


@pytest.mark.parametrize("kind", [("linear", None), ("mlp", None), ("mlp", 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_give_the_same_logits(kind, dtype, tmp_path):
    head = ActionDecoder(16, 5, *kind, seed=3).to(dtype)
    head.save_pretrained(tmp_path / "head")
    loaded = ActionDecoder.load_pretrained(tmp_path / "head")
    hidden_BD = torch.randn(4, 16, dtype=dtype)
    assert torch.equal(loaded(hidden_BD), head(hidden_BD))
    assert loaded.config() == head.config()
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_a_seed_fixes_the_weights_and_leaves_the_global_generator_alone():
    torch.manual_seed(1)
    one = ActionDecoder(64, 10, "mlp", 32, seed=7)
    torch.manual_seed(2)
    other = ActionDecoder(64, 10, "mlp", 32, seed=7)
    for key, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[key])
    assert one.layers[0].weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not one.layers[0].bias.any()


def test_weights_can_be_saved_from_another_state(tmp_path):
    head = ActionDecoder(4, 3, seed=0)
    state = {key: tensor + 1 for key, tensor in head.state_dict().items()}
    head.save_pretrained(tmp_path, state)
    assert torch.equal(ActionDecoder.load_pretrained(tmp_path).layers.weight, head.layers.weight + 1)
    with pytest.raises(ValueError, match=r"state: layers.bias has shape missing"):
        head.save_pretrained(tmp_path, {"layers.weight": head.layers.weight})


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((16, 5, "conv"), r"decoder_type is 'conv'; it must be one of \['linear', 'mlp'\]"),
        ((16, 0), "num_classes is 0"),
        ((0, 5), "hidden_size is 0"),
        ((16, 5, "mlp", -1), "mlp_hidden_size is -1"),
        ((16, 5, "linear", 8), "mlp_hidden_size is 8; with decoder_type 'linear'"),
        ((16, 5.0), "num_classes is 5.0"),
    ],
)
def test_wrong_arguments_are_named(arguments, reason):
    with pytest.raises(ValueError, match=reason):
        ActionDecoder(*arguments)


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    with pytest.raises(ValueError, match=CONFIG_NAME):
        ActionDecoder.load_pretrained(tmp_path)
    ActionDecoder(16, 5).save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG_NAME).read_text())
    (tmp_path / CONFIG_NAME).write_text(json.dumps(config | {"num_classes": 6}))
    with pytest.raises(ValueError, match=rf"{WEIGHTS_NAME}: layers.bias has shape \(5,\); the config asks for \(6,\)"):
        ActionDecoder.load_pretrained(tmp_path)
    (tmp_path / CONFIG_NAME).write_text(json.dumps(config | {"colour": 6}))
    with pytest.raises(ValueError, match="colour"):
        ActionDecoder.load_pretrained(tmp_path)
    (tmp_path / CONFIG_NAME).write_text(json.dumps(config))
    save_file(load_file(tmp_path / WEIGHTS_NAME) | {"extra": torch.zeros(1)}, tmp_path / WEIGHTS_NAME)
    with pytest.raises(ValueError, match=r"extra has shape \(1,\); the config asks for no such tensor"):
        ActionDecoder.load_pretrained(tmp_path)
