"""What can be said of prompts and tokenizers before transformers is imported."""

from __future__ import annotations

import json
from pathlib import Path

from vidcls.options import ACTION_TOKEN, VIDEO_TAG


class PromptError(ValueError):
    """A prompt that cannot be encoded."""


def check_prompt(prompt: str, action_token: str = ACTION_TOKEN) -> None:
    """Raise PromptError unless there is exactly one <video> and, behind it, exactly one <ACTION>."""
    videos, actions = prompt.count(VIDEO_TAG), prompt.count(action_token)
    if videos != 1 or actions != 1:
        raise PromptError(
            f"prompt {prompt!r} has {videos} {VIDEO_TAG} and {actions} {action_token}; it must have exactly one of each"
        )
    if prompt.index(action_token) < prompt.index(VIDEO_TAG):
        raise PromptError(
            f"prompt {prompt!r} has {action_token} before {VIDEO_TAG}; it must come after, "
            "because a token sees only what is before it"
        )


def with_action_token(prompt: str, action_token: str) -> str:
    """A prompt as the tokenizer sees it: <ACTION> in recipes and shards stands for whatever the token is called."""
    return prompt if action_token in prompt else prompt.replace(ACTION_TOKEN, action_token)


def has_own_tokenizer(folder: Path) -> bool:
    """Whether a model's folder brings code for its tokenizer; without it transformers takes another class silently."""
    try:
        stored = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        return "AutoTokenizer" in stored.get("auto_map", {})
    except (OSError, ValueError, AttributeError):
        return False  # no such file, or one that is refused when it is loaded
