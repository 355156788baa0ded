"""Loading and freezing the backbone, LoRA on one side, the tokenizer's spare row."""

import json

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from vidcls.model.backbone import (
    ACTION_WORDS,
    LoraSettings,
    action_token_init,
    add_lora,
    load_backbone,
    load_config,
    load_tokenizer,
    lora_counts,
)
from vidcls.model.tiny import tiny_backbone, tiny_config, tiny_tokenizer


def equal_weights(one, other):
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_tiny_is_the_same_model_whatever_the_seed_and_moves_no_global_state():
    torch.manual_seed(1)
    one = tiny_backbone()
    drawn = torch.rand(3)
    torch.manual_seed(2)
    assert equal_weights(one, tiny_backbone())
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3), drawn)


def test_tiny_tokenizer_spells_any_text_in_bytes():
    tokenizer = tiny_tokenizer()
    text = "Ünïcode 你好\n <|im_start|>"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == len("Ünïcode 你好\n ".encode()) + 1
    assert tokenizer.decode(ids) == text
    config = tiny_config()
    assert tokenizer.convert_tokens_to_ids("<|video_pad|>") == config.video_token_id
    assert tokenizer.convert_tokens_to_ids("<|image_pad|>") == config.image_token_id
    assert len(tokenizer) < config.text_config.vocab_size


def test_the_action_token_takes_a_spare_row():
    tokenizer, token_id = load_tokenizer("tiny")
    assert tokenizer.encode("a<ACTION>b", add_special_tokens=False)[1] == token_id == 263
    assert tokenizer.convert_ids_to_tokens(token_id) == "<ACTION>"


@pytest.mark.real
def test_the_real_tokenizer_and_table(real_data):
    folder = str(real_data / "qwen2_5_vl_3b")
    tokenizer, token_id = load_tokenizer(folder)
    assert token_id == 151665 < load_config(folder).text_config.vocab_size == 151936
    assert tokenizer.encode("<ACTION>", add_special_tokens=False) == [token_id]
    for word in ACTION_WORDS:
        assert len(tokenizer.encode(word, add_special_tokens=False)) == 1


def save_folder(folder, model):
    model.save_pretrained(folder)
    load_tokenizer("tiny")[0].save_pretrained(folder)
    return str(folder)


def test_a_local_folder_loads_to_the_same_weights(tmp_path):
    tiny = load_backbone("tiny", dtype=torch.float32)
    whole = Qwen2_5_VLForConditionalGeneration(tiny_config())
    whole.model.load_state_dict(tiny.state_dict())
    for name, model in (("inner", tiny), ("whole", whole)):
        folder = save_folder(tmp_path / name, model)
        loaded = load_backbone(folder, dtype=torch.float32)
        assert type(loaded) is type(tiny)
        assert equal_weights(loaded, tiny)
        # <ACTION> is in the saved tokenizer already and keeps its id.
        assert load_tokenizer(folder)[1] == 263


def test_an_untied_vocabulary_head_is_ignored(tmp_path):
    config = tiny_config()
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    whole = Qwen2_5_VLForConditionalGeneration(config)
    folder = save_folder(tmp_path, whole)
    assert equal_weights(load_backbone(folder, dtype=torch.float32), whole.model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("local", [False, True])
def test_the_backbone_is_frozen_and_only_parameters_are_cast(dtype, local, tmp_path):
    name = save_folder(tmp_path, load_backbone("tiny", dtype=torch.float32)) if local else "tiny"
    model = load_backbone(name, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    for key, buffer in model.named_buffers():
        assert torch.equal(buffer, dict(tiny_backbone().named_buffers())[key])


def test_names_that_are_no_model_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"model is 'Qwen/Qwen2.5-VL-3B-Instruct'; it must be 'tiny' or a local folder"
    ):
        load_config("Qwen/Qwen2.5-VL-3B-Instruct")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match=r"config.json: model_type is 'llama'; it must be 'qwen2_5_vl'"):
        load_config(str(tmp_path))


def test_weights_that_do_not_fit_are_refused(tmp_path):
    model = tiny_backbone()
    state = {key: tensor for key, tensor in model.state_dict().items() if "layers.1.mlp.up_proj" not in key}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"1 missing \['language_model.layers.1.mlp.up_proj.weight'\]"):
        load_backbone(str(tmp_path), dtype=torch.float32)


def test_a_full_embedding_table_is_refused(tmp_path):
    config = tiny_config()
    config.text_config.vocab_size = 263
    config.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="gets id 263, the embedding table has 263 rows"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_is_on_the_language_model_only_and_follows_its_seed(dtype):
    settings = LoraSettings(rank=4, alpha=8, dropout=0.1)
    models = []
    for global_seed, seed in ((1, 5), (2, 5), (2, 6)):
        torch.manual_seed(global_seed)
        models.append(add_lora(load_backbone("tiny", dtype=dtype), settings, seed=seed))
    one, same, other = models
    assert lora_counts(one) == {"language": 2 * 7, "vision": 0}
    assert equal_weights(one, same)
    assert not equal_weights(one, other)
    trained = {name: parameter for name, parameter in one.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 2 * 7
    assert all(".lora_" in name and parameter.dtype == dtype for name, parameter in trained.items())


@pytest.mark.parametrize(
    ("settings", "reason"), [((0, 8, 0.0), "rank is 0"), ((4, 0, 0.0), "alpha is 0"), ((4, 8, 1.0), "dropout is 1.0")]
)
def test_lora_settings_check_themselves(settings, reason):
    with pytest.raises(ValueError, match=reason):
        LoraSettings(*settings)


def test_the_action_embedding_starts_among_real_embeddings():
    model, (tokenizer, token_id) = load_backbone("tiny", dtype=torch.bfloat16), load_tokenizer("tiny")
    initial = action_token_init(model, tokenizer)
    assert initial.shape == (128,)
    assert initial.dtype == torch.bfloat16
    table = model.language_model.embed_tokens.weight
    assert not torch.equal(initial, table[token_id])
    ids = [i for word in ACTION_WORDS for i in tokenizer.encode(word)]
    assert torch.allclose(initial.float(), table[ids].float().mean(0), atol=1e-3)
