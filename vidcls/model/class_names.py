"""What the language model knows of the class names: where a linear head may start.

Shape suffixes: C classes, D hidden.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Between "y" and "E" of ApplyEye, between "V" and "S" of TVShow.
WORD_BORDER = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
NO_WORD = re.compile(r"[\W_]+")


def class_words(name: str) -> str:
    """The name as words of running text: "ApplyEyeMakeup" and "apply_eye-makeup" are both "apply eye makeup"."""
    return NO_WORD.sub(" ", WORD_BORDER.sub(" ", name)).strip().lower()


def class_name_rows(
    names: Sequence[str],
    tokenizer: PreTrainedTokenizerFast,
    embeddings: Callable[[Sequence[int]], torch.Tensor],
) -> torch.Tensor:
    """rows_CD: for each class the mean embedding of its name's tokens, in the embeddings' dtype.

    With a tied vocabulary such a row scores the class by the mean of its words' language-model logits. Names of the
    same words in another order ("left to right", "right to left") get the same row, which training takes apart.

    Args:
        embeddings: token ids -> their rows of the embedding table, [ids, D]; called once.

    Raises:
        ValueError: a name has no word in it.
    """
    ids_of = []
    for name in names:
        # With a space in front, as inside a sentence: the tokens of a word at the start of a text are others.
        ids = tokenizer.encode(f" {class_words(name)}", add_special_tokens=False)
        if not class_words(name) or not ids:
            raise ValueError(f"class name {name!r} has no word in it; action_decoder_init class_names needs one")
        ids_of.append(ids)
    rows_ND = embeddings([i for ids in ids_of for i in ids]).detach()
    means = [part.float().mean(dim=0) for part in rows_ND.split([len(ids) for ids in ids_of])]
    return torch.stack(means).to(rows_ND.dtype)
