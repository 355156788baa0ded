"""Prompts are judged before anything that could encode them is imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

from vidcls.prompts import PromptError, check_prompt


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("What is it? <ACTION>", "0 <video> and 1 <ACTION>"),
        ("<video> What is it?", "1 <video> and 0 <ACTION>"),
        ("<video><video><ACTION>", "2 <video> and 1 <ACTION>"),
        ("<video><ACTION> or <ACTION>", "1 <video> and 2 <ACTION>"),
        ("<ACTION> of <video>", "<ACTION> before <video>"),
    ],
)
def test_a_prompt_without_exactly_one_video_then_one_action_is_refused(prompt: str, reason: str) -> None:
    with pytest.raises(PromptError, match=reason) as caught:
        check_prompt(prompt)
    assert repr(prompt) in str(caught.value)


def test_checking_a_prompt_loads_nothing_heavy() -> None:
    code = (
        "import sys; from vidcls.prompts import check_prompt; from vidcls.options import DEFAULT_PROMPT;"
        "check_prompt(DEFAULT_PROMPT);"
        "sys.exit(bool({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
