"""The answers' loss against F.cross_entropy on all logits, its memory, and its weight under ZeRO-3."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from tests.model.zero3_heads import SmallModel, train_plainly
from tests.support import launch
from vidcls.model.language_head import NO_ANSWER, LanguageHead

ROWS, LENGTH, WIDTH, VOCABULARY = 4, 9, 6, 31


def answer_labels() -> torch.Tensor:
    """Rows with 3, 1, 0 and 8 answer tokens, one id twice."""
    labels_BL = torch.full((ROWS, LENGTH), NO_ANSWER)
    labels_BL[0, 4:7] = torch.tensor([5, 5, 30])
    labels_BL[1, 0] = 0
    labels_BL[3, 1:] = torch.randint(VOCABULARY, (8,), generator=torch.Generator().manual_seed(3))
    return labels_BL


def plain_losses(hidden_BLD: torch.Tensor, weight_VD: torch.Tensor, labels_BL: torch.Tensor) -> torch.Tensor:
    logits_BLV = hidden_BLD @ weight_VD.T
    losses_BL = F.cross_entropy(logits_BLV.flatten(0, 1), labels_BL.flatten(), reduction="none").view(labels_BL.shape)
    return losses_BL.sum(1) / (labels_BL != NO_ANSWER).sum(1).clamp(min=1)


def random_inputs(dtype: torch.dtype) -> tuple[torch.Tensor, nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    hidden_BLD = torch.randn(ROWS, LENGTH, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight_VD = torch.randn(VOCABULARY, WIDTH, generator=generator).to(dtype)
    return hidden_BLD, nn.Parameter(weight_VD, requires_grad=False)


@pytest.mark.parametrize("chunk", [1, 5, 12, None])
def test_losses_and_gradients_are_those_of_whole_logits(chunk):
    labels_BL, upstream_B = answer_labels(), torch.tensor([0.3, -2.0, 5.0, 1.0], dtype=torch.float64)
    hidden_BLD, weight = random_inputs(torch.float64)
    losses_B = LanguageHead(weight, chunk)(hidden_BLD, labels_BL)
    losses_B.backward(upstream_B)
    expected_BLD, expected_weight = random_inputs(torch.float64)
    expected_B = plain_losses(expected_BLD, expected_weight, labels_BL)
    expected_B.backward(upstream_B)
    torch.testing.assert_close(losses_B, expected_B, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(hidden_BLD.grad, expected_BLD.grad, rtol=1e-12, atol=1e-12)
    assert losses_B[2] == 0


def test_bf16_is_close_to_float32():
    """Inputs are such that bf16 holds the logits exactly: all that is rounded is the gradient (2^-9), at its end."""
    labels_BL = answer_labels()
    hidden_BLD, weight = random_inputs(torch.bfloat16)
    with torch.no_grad():
        for tensor in (hidden_BLD, weight):
            tensor.copy_((2 * tensor).round() / 2)
    losses_B = LanguageHead(weight, 5)(hidden_BLD, labels_BL)
    assert losses_B.dtype == torch.float32
    losses_B.sum().backward()
    exact_BLD = hidden_BLD.detach().float().requires_grad_()
    expected_B = plain_losses(exact_BLD, weight.detach().float(), labels_BL)
    expected_B.sum().backward()
    torch.testing.assert_close(losses_B, expected_B, rtol=1e-6, atol=1e-6)
    assert (hidden_BLD.grad.float() - exact_BLD.grad).norm() < 2**-8 * exact_BLD.grad.norm()


def test_a_batch_without_answers_still_has_a_graph():
    hidden_BLD, weight = random_inputs(torch.float32)
    losses_B = LanguageHead(weight)(hidden_BLD, torch.full((ROWS, LENGTH), NO_ANSWER))
    assert losses_B.tolist() == [0] * ROWS
    losses_B.sum().backward()
    assert hidden_BLD.grad is not None
    assert not hidden_BLD.grad.any()


def test_without_gradients_only_the_losses_are_computed():
    hidden_BLD, weight = random_inputs(torch.float64)
    with torch.no_grad():
        losses_B = LanguageHead(weight, 5)(hidden_BLD, answer_labels())
    assert not losses_B.requires_grad
    torch.testing.assert_close(losses_B, plain_losses(hidden_BLD, weight, answer_labels()).detach())


def test_wrong_arguments_are_named():
    weight = nn.Parameter(torch.zeros(3, 2), requires_grad=False)
    with pytest.raises(ValueError, match="weight requires grad; the vocabulary must be frozen"):
        LanguageHead(nn.Parameter(torch.zeros(3, 2)))
    with pytest.raises(ValueError, match="weight is a Tensor; it must be the vocabulary's"):
        LanguageHead(weight.detach())
    with pytest.raises(ValueError, match="chunk is 0; it must be at least 1"):
        LanguageHead(weight, 0)


MEMORY_PROGRAM = """
import torch
from torch import nn
from vidcls.model.language_head import LanguageHead
head = LanguageHead(nn.Parameter(torch.randn(151_936, 64), requires_grad=False))
labels_BL = torch.randint(151_936, (2, 110))
for length in (1, 110):  # the first for what libraries need once
    head(torch.randn(2, length, 64, requires_grad=True), labels_BL[:, :length]).sum().backward()
    status = open("/proc/self/status").read()  # not getrusage, whose peak counts the process that started this one
    print(int(status.split("VmHWM:")[1].split()[0]) / 2**10)
"""


@pytest.mark.launch
def test_memory_is_that_of_a_chunk():
    """220 tokens have 128 MiB of float32 logits, and 383 MiB with their log-softmax and their gradient.

    Ours are the logits and log-softmax of 110 tokens, 128 MiB.
    """
    words = [sys.executable, "-c", MEMORY_PROGRAM]
    done = subprocess.run(words, cwd=launch.ROOT, capture_output=True, text=True, check=True)
    # Peak against peak: what is resident just now shrinks when the machine is short of memory.
    before, after = map(float, done.stdout.split())
    assert 64 < after - before < 128 + 32, done.stdout


@pytest.mark.launch
def test_zero3_trains_the_heads_as_a_plain_loop_does(tmp_path: Path):
    """The vocabulary is the frozen table, gathered around both modules; one rank has no answers at all."""
    done = launch.deepspeed(2, "tests/model/zero3_heads.py", tmp_path, log=tmp_path / "log")
    assert done.code == 0, done.output[-4000:]
    found, expected, initial = (
        load_file(tmp_path / "zero3.safetensors"),
        train_plainly(),
        dict(SmallModel().named_parameters()),
    )
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        # By how far it moved; measured: 3e-6.
        assert (found[name] - tensor).norm() <= 3e-5 * (tensor - initial[name]).norm(), name
