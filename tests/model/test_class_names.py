"""Names as words, and the rows made from them."""

import pytest
import torch

from vidcls.model.class_names import class_name_rows, class_words
from vidcls.model.tiny import tiny_tokenizer


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ApplyEyeMakeup", "apply eye makeup"),
        ("apply_eye-makeup", "apply eye makeup"),
        ("YoYo", "yo yo"),
        ("WatchTVShow", "watch tv show"),
        ("PlayingTabla2Hands", "playing tabla2 hands"),
        ("Pushing [something] from left to right", "pushing something from left to right"),
        ("跳绳", "跳绳"),
    ],
)
def test_names_become_words(name, words):
    assert class_words(name) == words


def test_rows_are_the_mean_embeddings_of_the_words():
    tokenizer = tiny_tokenizer()
    table = torch.randn(len(tokenizer), 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    rows_CD = class_name_rows(["ApplyEyeMakeup", "jump"], tokenizer, lambda ids: table.requires_grad_()[ids])
    assert rows_CD.dtype == torch.bfloat16
    assert not rows_CD.requires_grad
    for row_D, text in zip(rows_CD, (" apply eye makeup", " jump"), strict=True):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        expected = sum(table[i].float() for i in ids) / len(ids)
        torch.testing.assert_close(row_D, expected.bfloat16())


def test_a_name_without_words_is_refused():
    with pytest.raises(ValueError, match=r"class name '\?\?' has no word in it"):
        class_name_rows(["jump", "??"], tiny_tokenizer(), lambda ids: torch.zeros(len(ids), 4))
