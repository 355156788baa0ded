"""ActionClassifier against transformers' own forward, padding, and what gets a gradient."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import Qwen2_5_VLForConditionalGeneration

from tests.support.own_forwards import with_own_forwards
from vidcls.model.classifier import ActionClassifier, ActionToken
from vidcls.model.heads import ActionDecoder
from vidcls.model.language_head import LanguageHead
from vidcls.model.patches import VisionGeometry, frames_to_patches
from vidcls.model.prompt import PromptEncoder
from vidcls.model.tokens import action_token_init, load_tokenizer
from vidcls.model.tuning import TuningSettings, parameter_part, tune
from vidcls.model.weights import load_backbone, load_config
from vidcls.options import DEFAULT_PROMPT

CLIPS = (  # frames, height, width, seconds per grid step, prompt
    (8, 112, 112, 0.5, DEFAULT_PROMPT),
    (4, 56, 140, 1.3, "<video> <ACTION>"),
    (2, 140, 84, 0.1, "Watch this: <video>\nWhich of the known actions is it, would you say? <ACTION>"),
    (8, 112, 112, 2.0, "<video>?<ACTION>"),
)


def make_classifier(*, lora=True, dtype=torch.float32, classes=None, answers=False, decoder_type="mlp", dropout=0.0):
    """`classes`: by head, in place of a single one with 6."""
    backbone = load_backbone("tiny", dtype=dtype)
    tokenizer, token_id = load_tokenizer("tiny")
    token = ActionToken(action_token_init("tiny", tokenizer, dtype))
    language_head = LanguageHead(backbone.language_model.embed_tokens.weight) if answers else None
    if lora:
        backbone = tune(backbone, TuningSettings(lora_rank=4, lora_dropout=dropout), seed=0)
        generator = torch.Generator().manual_seed(0)
        for name, parameter in backbone.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.1, generator=generator)
    heads = {
        name: ActionDecoder(128, count, decoder_type, seed=seed)
        for seed, (name, count) in enumerate((classes or {"default": 6}).items())
    }
    geometry = VisionGeometry.from_config(load_config("tiny"))
    return ActionClassifier(
        backbone, heads, token, action_token_id=token_id, geometry=geometry, language_head=language_head
    ).eval()


def make_batch(clips=CLIPS):
    config, (tokenizer, _) = load_config("tiny"), load_tokenizer("tiny")
    encoder = PromptEncoder(tokenizer, VisionGeometry.from_config(config), config.video_token_id, 4096, 1, 10**6)
    grids = tuple(encoder.grid(*clip[:3]) for clip in clips)
    rows = [encoder.encode(clip[4], grid, clip[3]) for clip, grid in zip(clips, grids, strict=True)]
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), tokenizer.pad_token_id)
    positions = torch.zeros(3, len(rows), length, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.from_numpy(row.input_ids)
        positions[:, index, : len(row)] = torch.from_numpy(row.position_ids)
    # Pixels depend on the clip, not on its place in the batch.
    pixels = []
    for frames, height, width, seconds, _ in clips:
        generator = torch.Generator().manual_seed(int(seconds * 10))
        pixels.append(torch.randint(0, 256, (frames * height * width * 3,), dtype=torch.uint8, generator=generator))
    ends = torch.tensor([len(row) - 1 for row in rows])
    return (
        torch.cat(pixels),
        grids,
        tuple(map(len, rows)),
        ids,
        positions,
        ends,
        torch.zeros(len(rows), dtype=torch.long),
    )


def plain_backbone(classifier):
    """A copy with transformers' and PEFT's own layers."""
    return with_own_forwards(copy.deepcopy(classifier.inner))


def reference_logits(classifier, clips):
    """transformers' own forward over the same weights: its positions, windows, mask and scatter."""
    frames, grids, _, ids, _, ends, _ = make_batch(clips)
    config = load_config("tiny")
    whole = Qwen2_5_VLForConditionalGeneration(config).eval()
    whole.model = plain_backbone(classifier)
    with torch.no_grad():
        table = whole.model.language_model.embed_tokens.weight
        table[classifier.action_token_id] = classifier.action_token.weight
    mask = (torch.arange(ids.shape[1]) <= ends[:, None]).long()
    out = whole(
        input_ids=ids,
        attention_mask=mask,
        pixel_values_videos=frames_to_patches(frames, grids, classifier.geometry, torch.float32),
        video_grid_thw=torch.tensor(grids),
        second_per_grid_ts=torch.tensor([clip[3] for clip in clips]),
        mm_token_type_ids=(ids == config.video_token_id).int() * 2,
        output_hidden_states=True,
        use_cache=False,
    )
    return classifier.heads["default"](out.hidden_states[-1][torch.arange(len(ids)), ends])


@pytest.mark.parametrize("lora", [False, True])
@torch.no_grad()
def test_logits_equal_the_conditional_generation_model(lora):
    classifier = make_classifier(lora=lora)
    logits_BC = classifier(*make_batch())
    assert logits_BC.std() > 1e-3
    torch.testing.assert_close(logits_BC, reference_logits(classifier, CLIPS), atol=2e-6, rtol=1e-5)
    if lora:
        for parameter in classifier.backbone.parameters():
            if parameter.requires_grad:
                parameter.zero_()
        assert not torch.allclose(classifier(*make_batch()), logits_BC, atol=1e-4)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_padding_changes_nothing(implementation):
    classifier = make_classifier()
    classifier.inner.set_attn_implementation(implementation)
    together_BC = classifier(*make_batch())
    alone_BC = torch.cat([classifier(*make_batch([clip])) for clip in CLIPS])
    torch.testing.assert_close(together_BC, alone_BC, atol=2e-6, rtol=1e-5)


@torch.no_grad()
def test_order_time_and_prompt_all_reach_the_logits():
    classifier = make_classifier()
    frames, height, width, seconds, prompt = CLIPS[0]
    base = classifier(*make_batch([CLIPS[0]]))
    pixels, *rest = make_batch([CLIPS[0]])
    variants = {
        "frames": classifier(pixels.view(frames, -1).flip(0).flatten(), *rest),
        "prompt": classifier(*make_batch([(frames, height, width, seconds, "<video> Well? <ACTION>")])),
    }
    slower = make_batch([(frames, height, width, seconds * 4, prompt)])
    variants["time"] = classifier(pixels, *slower[1:])
    for name, logits in variants.items():
        assert not torch.allclose(logits, base, atol=1e-5), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_reach_lora_token_and_head_and_nothing_else(dtype):
    classifier = make_classifier(dtype=dtype).train()
    logits_BC = classifier(*make_batch(CLIPS[:2]))
    assert logits_BC.dtype == torch.float32
    F.cross_entropy(logits_BC, torch.tensor([1, 2])).backward()
    kinds = {"lora": 0, "action_token": 0, "head": 0, "frozen": 0}
    for name, parameter in classifier.named_parameters():
        part = parameter_part(name)
        kind = part if part in kinds else "lora" if ".lora_" in name else "frozen"
        kinds[kind] += 1
        assert parameter.dtype == dtype
        assert parameter.requires_grad == (kind != "frozen"), name
        assert (parameter.grad is not None and bool(parameter.grad.any())) == (kind != "frozen"), name
    assert kinds["lora"] == 28
    assert kinds["action_token"] == 1
    assert kinds["head"] == 4
    assert kinds["frozen"] > 0


def test_checkpointing_the_language_model_keeps_gradients():
    grads = []
    for checkpointing in (False, True):
        classifier = make_classifier().train()
        if checkpointing:
            classifier.inner.language_model.activation_checkpointing_enable({"use_reentrant": False})
        classifier(*make_batch(CLIPS[:2])).square().sum().backward()
        grads.append({name: p.grad for name, p in classifier.named_parameters() if p.requires_grad})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=name)


def shared_prefix(lengths, ids):
    """How many ids the rows begin with before the first video token of one."""
    stops = [(row == load_config("tiny").video_token_id).nonzero()[0] for row in ids]
    differs = (ids[:, : min(lengths)] != ids[0, : min(lengths)]).any(0).nonzero()[:1, 0]
    return int(min([*stops, *differs]))


def answers_of(ids):
    """Learn to say what stands in the row, in front of <ACTION>."""
    labels = torch.full_like(ids, -100)
    labels[:, -6:-2] = ids[:, -5:-1]
    return labels


@pytest.mark.parametrize("clips", [CLIPS[:1] * 3, CLIPS], ids=["equal", "of every size"])
@pytest.mark.parametrize("reads", ["state", "tokens", "answers", "state, checkpointed"])
def test_a_shared_prefix_is_computed_once_for_the_same_logits_and_gradients(clips, reads):
    classifier = make_classifier(answers=reads == "answers", decoder_type="attention" if reads == "tokens" else "mlp")
    if "checkpointed" in reads:
        classifier.inner.language_model.activation_checkpointing_enable({"use_reentrant": False})
        classifier.train()
    rows = []
    classifier.inner.language_model.layers[0].mlp.register_forward_pre_hook(lambda _, x: rows.append(x[0].shape[1]))
    batch = make_batch(clips)
    lengths, ids = batch[2], batch[3]
    labels = answers_of(ids) if reads == "answers" else None
    prefix = shared_prefix(lengths, ids)
    assert prefix > 40
    trained = {name: p for name, p in classifier.named_parameters() if p.requires_grad}
    outputs, grads = [], []
    for count in (0, prefix):
        out = classifier(*batch, answer_labels_BL=labels, prefix=count)
        outputs.append(torch.cat([part.flatten() for part in out]) if labels is not None else out.flatten())
        grads.append(torch.autograd.grad(outputs[-1].square().sum(), [*trained.values()]))
    assert sorted({*rows}) == [sum(lengths) - (len(clips) - 1) * prefix, sum(lengths)]
    torch.testing.assert_close(outputs[1], outputs[0], atol=2e-6, rtol=1e-5)
    for name, plain, shared in zip(trained, *grads, strict=True):
        torch.testing.assert_close(shared, plain, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    # Unless it is left alone, or there are no gradients: then a row is computed as if it were alone.
    rows.clear()
    classifier.share_prefix = False
    classifier(*batch, answer_labels_BL=labels, prefix=prefix)
    classifier.share_prefix = True
    with torch.no_grad():
        without = [classifier(*batch, answer_labels_BL=labels, prefix=count) for count in (0, prefix)]
    assert {*rows} == {sum(lengths)}
    torch.testing.assert_close(*without, atol=0, rtol=0)


def test_a_shared_prefix_in_bf16_is_as_far_from_float32_as_separate_clips_are():
    batch = make_batch(CLIPS[:1] * 4)
    prefix, grads = shared_prefix(batch[2], batch[3]), []
    for dtype, count in ((torch.float32, 0), (torch.bfloat16, 0), (torch.bfloat16, prefix)):
        classifier = make_classifier(dtype=dtype)
        classifier(*batch, prefix=count).square().sum().backward()
        grads.append(torch.cat([p.grad.float().flatten() for p in classifier.parameters() if p.requires_grad]))
    exact, separate, shared = grads
    apart = (separate - exact).norm() / exact.norm()
    assert 1e-3 < apart < 0.1
    assert (shared - exact).norm() / exact.norm() < 1.5 * apart


def test_dropout_masks_of_a_shared_prefix_are_those_of_its_tokens_and_come_again_when_recomputed():
    batch = make_batch(CLIPS[:1] * 3)
    prefix, results = shared_prefix(batch[2], batch[3]), []
    for checkpointing in (False, True):
        classifier = make_classifier(dropout=0.3).train()
        if checkpointing:
            classifier.inner.language_model.activation_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(3)
        logits_BC = classifier(*batch, prefix=prefix)
        logits_BC.square().sum().backward()
        results.append([logits_BC.detach(), *(p.grad for p in classifier.parameters() if p.requires_grad)])
    for plain, again in zip(*results, strict=True):
        torch.testing.assert_close(plain, again)
    first, second, _ = results[0][0]
    assert not torch.allclose(first, second, atol=1e-4)  # equal clips, each with masks of its own behind the prefix


def test_each_row_gets_the_logits_of_its_own_head_and_no_class_beyond():
    classifier = make_classifier(classes={"few": 3, "many": 6})
    *batch, _ = make_batch()
    heads_B = torch.tensor([1, 0, 0, 1])
    logits_BC = classifier(*batch, heads_B)
    alone = [classifier(*batch, torch.full((4,), head)) for head in (0, 1)]
    for row, head in enumerate(heads_B.tolist()):
        assert torch.equal(logits_BC[row], alone[head][row])
    assert torch.isinf(logits_BC[[1, 2], 3:]).all()
    assert torch.isfinite(logits_BC[[0, 3]]).all()
    F.cross_entropy(logits_BC[[1, 2]], torch.tensor([0, 2])).backward()
    assert all(not p.grad.any() for p in classifier.heads["many"].parameters())
    assert all(p.grad.any() for p in classifier.heads["few"].parameters())


@torch.no_grad()
def test_an_attention_head_reads_the_clips_tokens_and_nothing_else():
    classifier = make_classifier(decoder_type="attention")
    seen = {}
    classifier.heads["default"].register_forward_pre_hook(
        lambda module, inputs, read: seen.update(read), with_kwargs=True
    )
    frames, grids, lengths, ids, *rest = make_batch()
    together_BC = classifier(frames, grids, lengths, ids, *rest)
    read = torch.tensor([load_config("tiny").video_token_id, classifier.action_token_id])
    assert torch.equal(seen["mask_BL"], torch.isin(ids, read))
    alone_BC = torch.cat([classifier(*make_batch([clip])) for clip in CLIPS])
    torch.testing.assert_close(together_BC, alone_BC, atol=2e-6, rtol=1e-5)


@torch.no_grad()
def test_answers_change_no_logit_and_cost_what_the_language_model_says():
    """Against transformers' own loss over its own vocabulary logits."""
    classifier = make_classifier(answers=True)
    config, (tokenizer, _) = load_config("tiny"), load_tokenizer("tiny")
    encoder = PromptEncoder(tokenizer, VisionGeometry.from_config(config), config.video_token_id, 4096, 1, 10**6)
    frames, grids, *_, heads_B = make_batch(CLIPS[:1])
    row = encoder.encode(CLIPS[0][4], grids[0], CLIPS[0][3], answer="Pushing it left")
    ids, positions = torch.from_numpy(row.input_ids)[None], torch.from_numpy(row.position_ids)[:, None]
    assert tokenizer.decode(ids[0, row.action_position :]) == (
        "<ACTION><|im_end|>\n<|im_start|>assistant\nPushing it left<|im_end|>"
    )
    answer_labels = torch.full_like(ids, -100)
    answer_labels[0, row.answer_start - 1 : -1] = ids[0, row.answer_start :]
    where = torch.tensor([row.action_position])
    logits_BC, losses_B = classifier(frames, grids, (ids.shape[1],), ids, positions, where, heads_B, answer_labels)
    plain_BC = classifier(*make_batch(CLIPS[:1]))
    torch.testing.assert_close(logits_BC, plain_BC, atol=2e-6, rtol=1e-5)

    whole = Qwen2_5_VLForConditionalGeneration(config).eval()
    whole.model = plain_backbone(classifier)
    whole.model.language_model.embed_tokens.weight[classifier.action_token_id] = classifier.action_token.weight
    # A matrix of its own: the row of <ACTION> is another one in the loss.
    whole.lm_head.weight = copy.deepcopy(classifier.inner.language_model.embed_tokens.weight)
    labels = ids.clone()
    labels[0, : row.answer_start] = -100
    expected = whole(
        input_ids=ids,
        pixel_values_videos=frames_to_patches(frames, grids, classifier.geometry, torch.float32),
        video_grid_thw=torch.tensor(grids),
        second_per_grid_ts=torch.tensor([CLIPS[0][3]]),
        mm_token_type_ids=(ids == config.video_token_id).int() * 2,
        labels=labels,
        use_cache=False,
    ).loss
    assert losses_B.item() == pytest.approx(expected.item(), rel=1e-5)


def test_layouts_built_in_evaluation_serve_a_training_vision_tower():
    classifier = make_classifier().train()
    classifier.inner.visual.requires_grad_(True)
    classifier._vision_trains = True
    batch = make_batch(CLIPS[:1])
    with torch.inference_mode():
        classifier(*batch)
    classifier(*batch).sum().backward()
    assert classifier.inner.visual.patch_embed.proj.weight.grad.any()


def test_mistakes_are_named():
    backbone = load_backbone("tiny", dtype=torch.float32)
    good = {"action_token_id": 263, "geometry": VisionGeometry()}
    with pytest.raises(ValueError, match="head h has hidden size 64; the backbone's is 128"):
        ActionClassifier(backbone, {"h": ActionDecoder(64, 6)}, ActionToken(torch.zeros(128)), **good)
    with pytest.raises(ValueError, match="action_token has hidden size 64"):
        ActionClassifier(backbone, {"h": ActionDecoder(128, 6)}, ActionToken(torch.zeros(64)), **good)
    frames, grids, *rest = make_batch(CLIPS[:2])
    with pytest.raises(ValueError, match="grid_thw has 1 clips, lengths 2, input_ids 2 rows"):
        make_classifier()(frames, grids[:1], *rest)
