"""The built-in model and tokenizer, and <ACTION> in a spare row of any."""

import json

import pytest
import torch

from vidcls.model.tiny import tiny_backbone, tiny_config, tiny_tokenizer
from vidcls.model.tokens import ACTION_WORDS, action_token_init, load_tokenizer
from vidcls.model.weights import load_backbone, load_config


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


def test_a_saved_token_keeps_its_id(tmp_path):
    assert load_tokenizer(save_folder(tmp_path, load_backbone("tiny", dtype=torch.float32)))[1] == 263


def test_the_token_can_be_called_otherwise_but_not_like_a_part_of_the_layout():
    tokenizer, token_id = load_tokenizer("tiny", "<WHAT>")
    assert tokenizer.encode("a<WHAT>", add_special_tokens=False)[1] == token_id
    with pytest.raises(ValueError, match=r"action_token: '<\|im_end\|>' has another meaning"):
        load_tokenizer("tiny", "<|im_end|>")
    with pytest.raises(ValueError, match=r"action_token: 'a' is an ordinary word of the vocabulary of tiny"):
        load_tokenizer("tiny", "a")


def test_a_tokenizer_that_is_code_is_not_replaced_by_another_in_silence(tmp_path):
    folder = save_folder(tmp_path, load_backbone("tiny", dtype=torch.float32))
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": {"AutoTokenizer": ["own.Own", None]}}))
    with pytest.raises(ValueError, match=r"the tokenizer of .* is Python code in that folder"):
        load_tokenizer(folder)


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


def test_a_full_embedding_table_is_refused(tmp_path):
    config = tiny_config()
    config.text_config.vocab_size = 263
    config.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="gets id 263, the embedding table has 263 rows"):
        load_tokenizer(str(tmp_path))


def test_the_action_embedding_starts_among_real_embeddings():
    model, (tokenizer, token_id) = load_backbone("tiny", dtype=torch.bfloat16), load_tokenizer("tiny")
    initial = action_token_init("tiny", tokenizer, torch.bfloat16)
    assert initial.shape == (128,)
    assert initial.dtype == torch.bfloat16
    table = model.language_model.embed_tokens.weight
    assert not torch.equal(initial, table[token_id])
    ids = [i for word in ACTION_WORDS for i in tokenizer.encode(word)]
    assert torch.allclose(initial.float(), table[ids].float().mean(0), atol=1e-3)
