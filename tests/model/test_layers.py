"""Layers with our forwards against transformers' and PEFT's own, gradients included."""

import pytest
import torch
import torch.nn.functional as F

from tests.model.test_classifier import CLIPS, make_batch, make_classifier, plain_backbone
from vidcls.model.layers import _embed_patches, speed_up
from vidcls.model.patches import frames_to_patches
from vidcls.model.weights import load_backbone


def gradients(classifier, tuned=("lora_",)):
    for name, parameter in classifier.backbone.named_parameters():
        parameter.requires_grad_(any(word in name for word in tuned))
    classifier._vision_trains = any("visual" in word for word in tuned)
    inputs = make_batch()
    F.cross_entropy(classifier(*inputs), torch.tensor([0, 3, 5, 1])).backward()
    return {name: p.grad for name, p in classifier.named_parameters() if p.grad is not None}


def reference_gradients(classifier, tuned=("lora_",)):
    """Through transformers' own loops and layers, each clip alone, so that there is nothing to pack."""
    plain = plain_backbone(classifier)
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(any(word in name for word in tuned))
        parameter.grad = None
    classifier.zero_grad()
    for clip, label in zip(CLIPS, torch.tensor([0, 3, 5, 1]), strict=True):
        frames, grids, _, ids, positions, _, _ = make_batch([clip])
        video = plain.visual(
            frames_to_patches(frames, grids, classifier.geometry, torch.float32), grid_thw=torch.tensor(grids)
        ).pooler_output
        embeds = plain.language_model.embed_tokens(ids)
        embeds = embeds.masked_scatter((ids == classifier.video_token_id)[..., None], video)
        embeds = classifier.action_token(embeds, ids == classifier.action_token_id)
        hidden = plain.language_model(inputs_embeds=embeds, position_ids=positions, use_cache=False).last_hidden_state
        logits = classifier.heads["default"](hidden[:, -1])
        (F.cross_entropy(logits, label[None]) / len(CLIPS)).backward()
    prefix = "backbone.base_model.model."
    found = {f"{prefix}{name}": p.grad for name, p in plain.named_parameters() if p.grad is not None}
    rest = {name: p for name, p in classifier.named_parameters() if not name.startswith("backbone.")}
    return found | {name: p.grad for name, p in rest.items() if p.requires_grad}


@pytest.mark.parametrize("tuned", [("lora_",), ("lora_", "visual"), ("visual", "norm", "proj")])
def test_gradients_equal_those_of_transformers_layers(tuned):
    """LoRA alone; with the whole vision tower; and with whole weights, where every layer falls back on its own."""
    classifier = make_classifier()
    found = gradients(classifier, tuned)
    expected = reference_gradients(classifier, tuned)
    assert found.keys() == expected.keys()
    assert len(found) > 20
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], atol=2e-6, rtol=2e-4, msg=lambda text, n=name: f"{n}: {text}")


def test_a_patch_embedding_is_the_convolution():
    backbone = load_backbone("tiny", dtype=torch.float32)
    embed = backbone.visual.patch_embed
    patches = torch.randn(50, 3 * 2 * 14 * 14)
    torch.testing.assert_close(_embed_patches(embed, patches), type(embed).forward(embed, patches))


def test_replaced_once_and_never_over_anothers_kernel():
    backbone = load_backbone("tiny", dtype=torch.float32)
    mine = backbone.language_model.layers[0].mlp
    mine.forward = lambda x: x
    kept = mine.forward
    speed_up(backbone)
    assert mine.forward is kept
    first = backbone.language_model.layers[1].mlp.forward
    speed_up(backbone)
    assert backbone.language_model.layers[1].mlp.forward == first
    assert first.__func__.__name__ == "_mlp"


def test_checkpointing_changes_no_gradient_also_with_dropout():
    found = []
    for checkpointing in (False, True):
        classifier = make_classifier().train()
        for layer in classifier.modules():
            if hasattr(layer, "lora_dropout"):
                layer.lora_dropout["default"] = torch.nn.Dropout(0.3)
        if checkpointing:
            classifier.inner.language_model.activation_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(5)
        found.append(gradients(classifier))
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        assert torch.equal(grad, found[1][name]), name
