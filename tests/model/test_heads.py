"""The head's construction, its files and what it refuses."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from vidcls.model.attentive_classifier import AttentiveClassifier
from vidcls.model.heads import CONFIG_NAME, WEIGHTS_NAME, ActionDecoder


def head_inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """State, tokens and mask for 4 rows of 7 tokens of 16; one row reads a single token."""
    generator = torch.Generator().manual_seed(5)
    hidden_BD, tokens_BLD = torch.randn(4, 16, generator=generator), torch.randn(4, 7, 16, generator=generator)
    mask_BL = torch.rand(4, 7, generator=generator) < 0.5
    mask_BL[:, 6] = True
    mask_BL[3, :6] = False
    return hidden_BD.to(dtype), tokens_BLD.to(dtype), mask_BL


@pytest.mark.parametrize("kind", [("linear",), ("mlp",), ("mlp", 24), ("attention",), ("attention", 6, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_give_the_same_logits(kind, dtype, tmp_path):
    head = ActionDecoder(16, 5, *kind, seed=3).to(dtype)
    head.save_pretrained(tmp_path / "head")
    loaded = ActionDecoder.load_pretrained(tmp_path / "head")
    inputs = head_inputs(dtype)
    assert head(*inputs).dtype == dtype
    assert torch.equal(loaded(*inputs), head(*inputs))
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
    with pytest.raises(ValueError, match=r"state: 1 tensor differs .* layers.bias: stored not at all, needed \(3,\)"):
        head.save_pretrained(tmp_path, {"layers.weight": head.layers.weight})


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((16, 5, "conv"), r"decoder_type is 'conv'; it must be one of \['attention', 'linear', 'mlp'\]"),
        ((16, 0), "num_classes is 0"),
        ((0, 5), "hidden_size is 0"),
        ((16, 5, "mlp", -1), "mlp_hidden_size is -1"),
        ((16, 5, "linear", 8), "mlp_hidden_size is 8; with decoder_type 'linear'"),
        ((16, 5.0), "num_classes is 5.0"),
        ((16, 5, "mlp", 8, 2), "num_heads is 2; with decoder_type 'mlp' leave it out"),
        ((16, 5, "attention", 8, 3), "num_heads is 3; it must divide the inner width, which is 8"),
        ((20, 5, "attention"), "num_heads is 8; it must divide the inner width, which is 20"),
        ((16, 5, "attention", 8, 0), "num_heads is 0"),
    ],
)
def test_wrong_arguments_are_named(arguments, reason):
    with pytest.raises(ValueError, match=reason):
        ActionDecoder(*arguments)
    with pytest.raises(ValueError, match=r"init is 'ones'; it must be one of \['normal', 'zeros'\]"):
        ActionDecoder(16, 5, init="ones")


def test_attention_is_written_out():
    """Against the same weights with the softmax over the readable tokens computed row by row."""
    head = ActionDecoder(16, 5, "attention", 6, 3, seed=1).double()
    for parameter in head.parameters():  # norms and biases too, so that none is trivial
        torch.nn.init.normal_(parameter, std=0.5)
    hidden_BD, tokens_BLD, mask_BL = (t.double() if t.is_floating_point() else t for t in head_inputs())
    layers = head.layers
    assert isinstance(layers, AttentiveClassifier)
    for row in range(4):
        readable_LD = layers.token_norm(tokens_BLD[row][mask_BL[row]])
        query_W = layers.to_query(layers.state_norm(hidden_BD[row]))
        key_LW, value_LW = layers.to_key(readable_LD), layers.to_value(readable_LD)
        found = []
        for part in (slice(0, 2), slice(2, 4), slice(4, 6)):
            shares_L = (key_LW[:, part] @ query_W[part] / 2**0.5).softmax(0)
            found.append(shares_L @ value_LW[:, part])
        expected_C = layers.classifier(layers.output_norm(query_W + layers.to_output(torch.cat(found))))
        torch.testing.assert_close(head(hidden_BD, tokens_BLD, mask_BL)[row], expected_C)


def test_attention_reads_where_the_mask_says_and_always_the_state():
    head = ActionDecoder(16, 5, "attention", seed=1)
    hidden_BD, tokens_BLD, mask_BL = head_inputs()
    logits_BC = head(hidden_BD, tokens_BLD, mask_BL)
    noise_BLD = torch.where(mask_BL[..., None], 0.0, 1e4)
    assert torch.equal(head(hidden_BD, tokens_BLD + noise_BLD, mask_BL), logits_BC)
    reads = head(hidden_BD, tokens_BLD.flip(2), mask_BL)
    assert (reads != logits_BC).any(dim=1).all()
    # Of 500 tokens the state still counts for as much as all of them: a tenth of it would be noise.
    many_BLD, all_BL = torch.randn(4, 500, 16), torch.ones(4, 500, dtype=torch.bool)
    by_state = (head(hidden_BD, many_BLD, all_BL) - head(-hidden_BD, many_BLD, all_BL)).norm()
    by_tokens = (head(hidden_BD, many_BLD, all_BL) - head(hidden_BD, -many_BLD, all_BL)).norm()
    assert by_state > by_tokens


def test_every_parameter_of_every_head_gets_a_gradient():
    for kind in ("linear", "mlp", "attention"):
        head = ActionDecoder(16, 5, kind, seed=1).bfloat16()
        F.cross_entropy(head(*head_inputs(torch.bfloat16)).float(), torch.tensor([0, 1, 2, 3])).backward()
        missing = [name for name, p in head.named_parameters() if p.grad is None or not p.grad.any()]
        assert missing == [], kind


@pytest.mark.parametrize("kind", ["linear", "mlp", "attention"])
def test_zeros_are_the_classes_layer_alone(kind):
    zero, normal = ActionDecoder(16, 5, kind, init="zeros", seed=1), ActionDecoder(16, 5, kind, seed=1)
    assert not zero(*head_inputs()).any()
    assert normal(*head_inputs()).any()
    differing = [
        name for name, tensor in zero.state_dict().items() if not torch.equal(tensor, normal.state_dict()[name])
    ]
    assert differing == {"linear": ["layers.weight"], "mlp": ["layers.2.weight"]}.get(
        kind, ["layers.classifier.weight"]
    )


def test_class_rows_become_the_linear_heads_weight():
    rows_CD = torch.randn(5, 16)
    head = ActionDecoder(16, 5, seed=0).bfloat16()
    head.set_class_rows(rows_CD)
    hidden_BD = head_inputs(torch.bfloat16)[0]
    assert torch.equal(head(hidden_BD), hidden_BD @ rows_CD.bfloat16().T)
    assert all(parameter.requires_grad for parameter in head.parameters())
    with pytest.raises(ValueError, match=r"rows have shape \(5, 8\); the head needs \(5, 16\)"):
        head.set_class_rows(rows_CD[:, :8])
    with pytest.raises(ValueError, match="decoder_type is 'mlp'; only a linear head"):
        ActionDecoder(16, 5, "mlp").set_class_rows(rows_CD)


def test_a_head_that_reads_tokens_asks_for_them():
    assert not ActionDecoder(16, 5).reads_tokens
    assert ActionDecoder(16, 5, "attention").reads_tokens
    with pytest.raises(ValueError, match="needs tokens_BLD and mask_BL"):
        ActionDecoder(16, 5, "attention")(torch.zeros(2, 16))


def test_the_files_format(tmp_path):
    """Also of heads saved before there was an attention head."""
    fields = {"hidden_size": 16, "num_classes": 5, "decoder_type": "mlp", "mlp_hidden_size": 24}
    assert ActionDecoder(16, 5, "mlp", 24).config() == fields
    assert ActionDecoder(16, 5).config() == fields | {"decoder_type": "linear", "mlp_hidden_size": None}
    fields |= {"decoder_type": "attention", "mlp_hidden_size": 16, "num_heads": 8}
    assert ActionDecoder(16, 5, "attention").config() == fields
    assert ActionDecoder(2048, 5, "attention").mlp_hidden_size == 512
    ActionDecoder(16, 5, "mlp", 24).save_pretrained(tmp_path)
    shapes = {key: tuple(tensor.shape) for key, tensor in load_file(tmp_path / WEIGHTS_NAME).items()}
    assert shapes == {
        "layers.0.weight": (24, 16),
        "layers.0.bias": (24,),
        "layers.2.weight": (5, 24),
        "layers.2.bias": (5,),
    }


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    with pytest.raises(ValueError, match=CONFIG_NAME):
        ActionDecoder.load_pretrained(tmp_path)
    ActionDecoder(16, 5).save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG_NAME).read_text())
    (tmp_path / CONFIG_NAME).write_text(json.dumps(config | {"num_classes": 6}))
    reason = r"2 tensors differ .* first is layers.bias: stored \(5,\), needed \(6,\)"
    with pytest.raises(ValueError, match=f"{WEIGHTS_NAME}: {reason}"):
        ActionDecoder.load_pretrained(tmp_path)
    (tmp_path / CONFIG_NAME).write_text(json.dumps(config | {"colour": 6}))
    with pytest.raises(ValueError, match="colour"):
        ActionDecoder.load_pretrained(tmp_path)
    (tmp_path / CONFIG_NAME).write_text(json.dumps(config))
    save_file(load_file(tmp_path / WEIGHTS_NAME) | {"extra": torch.zeros(1)}, tmp_path / WEIGHTS_NAME)
    with pytest.raises(ValueError, match=r"extra: stored \(1,\), needed not at all"):
        ActionDecoder.load_pretrained(tmp_path)
    (tmp_path / WEIGHTS_NAME).write_bytes((tmp_path / WEIGHTS_NAME).read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{WEIGHTS_NAME} cannot be read"):
        ActionDecoder.load_pretrained(tmp_path)
