"""Attention over pieces of a row against torch's own, piece by piece."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from vidcls.model import attention
from vidcls.model.attention import attend, pieces_of

CPU = torch.device("cpu")
LENGTHS = [(5,), (4, 4, 4), (3, 7, 3, 1, 7), (2, 2, 6)]


def make_qkv(lengths, heads=4, shared=2):
    generator = torch.Generator().manual_seed(len(lengths))
    return [
        torch.randn(sum(lengths), count, 8, generator=generator, requires_grad=True)
        for count in (heads, shared, shared)
    ]


def one_by_one(qkv, lengths, causal):
    outputs = []
    for q, k, v in zip(*(t.split(lengths) for t in qkv), strict=True):
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))
        k, v = (t.repeat_interleave(q.shape[0] // t.shape[0], 0) for t in (k, v))
        outputs.append(F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=0.3).transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_equals_each_piece_alone(lengths, causal, implementation):
    module = SimpleNamespace(config=SimpleNamespace(_attn_implementation=implementation), scaling=0.3)
    qkv, pieces = make_qkv(lengths), pieces_of(lengths, CPU)
    out, expected = attend(module, *qkv, pieces, causal=causal), one_by_one(qkv, lengths, causal)
    torch.testing.assert_close(out, expected)
    seed = torch.randn_like(out)
    grads = torch.autograd.grad(out, qkv, seed)
    for grad, wanted in zip(grads, torch.autograd.grad(expected, qkv, seed), strict=True):
        torch.testing.assert_close(grad, wanted)
    with torch.no_grad():  # the fused kernel, where there is no backward
        torch.testing.assert_close(attend(module, *qkv, pieces, causal=causal), expected)
    lasts = attend(module, qkv[0][pieces.lasts], *qkv[1:], pieces, causal=causal, lasts_only=True)
    torch.testing.assert_close(lasts, expected[pieces.lasts])


def prefixed(lengths, prefix):
    """Queries, keys and values of pieces that begin alike: the row that has this once, and the one with all pieces."""
    generator = torch.Generator().manual_seed(prefix)
    rows, whole = [], []
    for heads in (4, 2, 2):
        first, *owns = (
            torch.randn(count, heads, 8, generator=generator, requires_grad=True)
            for count in (prefix, *(length - prefix for length in lengths))
        )
        rows.append([first, *owns])
        whole.append(torch.cat([torch.cat([first, own]) for own in owns]))
    return rows, whole


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("lengths", [(5, 5, 5), (3, 7, 3, 4, 7), (4, 3)])
def test_a_shared_prefix_is_in_the_row_once_and_seen_by_every_piece(lengths, implementation):
    module = SimpleNamespace(config=SimpleNamespace(_attn_implementation=implementation), scaling=0.3)
    prefix, pieces = 2, pieces_of(lengths, CPU, 2)
    rows, whole = prefixed(lengths, prefix)
    qkv = [torch.cat(row) for row in rows]
    expected = one_by_one(whole, lengths, True)
    starts = expected.split(lengths)
    wanted = torch.cat([starts[0][:prefix], *(piece[prefix:] for piece in starts)])
    assert pieces.lasts.tolist() == [sum(lengths[: n + 1]) - n * prefix - 1 for n in range(len(lengths))]
    leaves = [leaf for row in rows for leaf in row]
    out = attend(module, *qkv, pieces, causal=True)
    torch.testing.assert_close(out, wanted)
    seed = torch.randn_like(out)
    grads = torch.autograd.grad(out, leaves, seed, retain_graph=True)
    for grad, reference in zip(grads, torch.autograd.grad(wanted, leaves, seed, retain_graph=True), strict=True):
        torch.testing.assert_close(grad, reference)
    lasts = attend(module, qkv[0][pieces.lasts], *qkv[1:], pieces, causal=True, lasts_only=True)
    torch.testing.assert_close(lasts, wanted[pieces.lasts])


def test_flash_attention_gets_the_bounds_of_the_pieces(monkeypatch):
    seen = []

    def interface(module, q, k, v, **options):
        seen.append((q.shape, k.shape, options))
        return q.transpose(1, 2), None

    monkeypatch.setitem(attention.ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", interface)
    module = SimpleNamespace(config=SimpleNamespace(_attn_implementation="flash_attention_2"), scaling=0.3)
    qkv, pieces = make_qkv((3, 7, 2)), pieces_of((3, 7, 2), CPU)
    assert torch.equal(attend(module, *qkv, pieces, causal=True), qkv[0])
    lasts = attend(module, qkv[0][pieces.lasts], *qkv[1:], pieces, causal=True, lasts_only=True)
    assert lasts.shape == (3, 4, 8)
    (q, k, whole), (last_q, _, last) = seen
    assert (q, k, last_q) == ((1, 4, 12, 8), (1, 2, 12, 8), (1, 4, 3, 8))
    assert whole["cu_seq_lens_q"].tolist() == whole["cu_seq_lens_k"].tolist() == [0, 3, 10, 12]
    assert (whole["max_length_q"], whole["max_length_k"], whole["is_causal"]) == (7, 7, True)
    assert (last["cu_seq_lens_q"].tolist(), last["max_length_q"]) == ([0, 1, 2, 3], 1)

    again, _ = prefixed((3, 7, 2), 1)
    row = [torch.cat(parts) for parts in again]
    assert torch.equal(attend(module, *row, pieces_of((3, 7, 2), CPU, 1), causal=True), row[0])
    assert [seen[-1][0][2], seen[-1][1][2]] == [12, 12]
    attend(module, row[0][:3], *row[1:], pieces_of((3, 7, 2), CPU, 1), causal=True, lasts_only=True)
    assert [seen[-1][0][2], seen[-1][1][2]] == [3, 12]
    *_, whole, last = (options for *_, options in seen)
    assert whole["cu_seq_lens_q"].tolist() == whole["cu_seq_lens_k"].tolist() == [0, 3, 10, 12]
    assert (last["cu_seq_lens_q"].tolist(), last["cu_seq_lens_k"].tolist()) == ([0, 1, 2, 3], [0, 3, 10, 12])
