"""Take <ACTION> into the tokenizer, and give it a place to start among real embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerFast

from vidcls.model.shapes import TINY
from vidcls.model.tiny import SPECIAL_TOKENS, tiny_tokenizer
from vidcls.model.weights import load_config, load_token_embeddings
from vidcls.options import ACTION_TOKEN
from vidcls.prompts import has_own_tokenizer

# The embedding of <ACTION> starts at the mean of what these words mean to the model.
ACTION_WORDS = (" action", " activity", " movement", " doing")


def load_tokenizer(
    name_or_path: str, action_token: str = ACTION_TOKEN, *, trust_remote_code: bool = False
) -> tuple[PreTrainedTokenizerFast, int]:
    """The tokenizer with `action_token` as one special token, and that token's id.

    The token takes a spare row of the embedding table: Qwen2.5-VL has 151,936 rows for 151,665 tokens. The
    table is never resized (resizing it to the tokenizer's length would shrink it). A folder whose tokenizer
    already has the token keeps its id. `trust_remote_code` lets a tokenizer class of the folder's own run.

    Raises:
        ValueError: there is no row left, the token is one of the prompt's layout or an ordinary word of the
            vocabulary, or the tokenizer needs code of the folder that is not to be trusted.
    """
    if action_token in SPECIAL_TOKENS:
        raise ValueError(f"action_token: {action_token!r} has another meaning in prompts; take one of your own")
    text_config: Any = load_config(name_or_path).text_config
    rows = text_config.vocab_size
    tokenizer: Any
    if name_or_path == TINY:
        tokenizer = tiny_tokenizer()
    else:
        if not trust_remote_code and has_own_tokenizer(Path(name_or_path)):
            # transformers would take a class of its own without a word.
            raise ValueError(
                f"trust_remote_code: false, but the tokenizer of {name_or_path} is Python code in that folder"
            )
        tokenizer = AutoTokenizer.from_pretrained(
            name_or_path, local_files_only=True, trust_remote_code=trust_remote_code
        )
    if action_token in tokenizer.get_vocab() and action_token not in tokenizer.get_added_vocab():
        # It would take the word's row, and be meant wherever a text has that word.
        raise ValueError(
            f"action_token: {action_token!r} is an ordinary word of the vocabulary of {name_or_path}; "
            f"take one that is none, such as {ACTION_TOKEN!r}"
        )
    tokenizer.add_tokens([AddedToken(action_token, special=True, normalized=False)], special_tokens=True)
    token_id = tokenizer.convert_tokens_to_ids(action_token)
    if token_id >= rows:
        raise ValueError(
            f"{name_or_path}: {action_token} gets id {token_id}, the embedding table has {rows} rows; "
            "the model needs one spare row"
        )
    return tokenizer, token_id


def action_token_init(name_or_path: str, tokenizer: PreTrainedTokenizerFast, dtype: torch.dtype) -> torch.Tensor:
    """Where the embedding of <ACTION> starts, [D] in `dtype`: the mean over `ACTION_WORDS`, read from the weights.

    The token's own row in the table was never trained and is not used: a mean of real embeddings has their
    scale and a related meaning.
    """
    ids = [i for word in ACTION_WORDS for i in tokenizer.encode(word, add_special_tokens=False)]
    return load_token_embeddings(name_or_path, ids, dtype=dtype).float().mean(dim=0).to(dtype)
