"""Attention and fused kernels: what this machine gives of what was asked for, and what is used instead."""

from __future__ import annotations

import importlib.util

from transformers import Qwen2_5_VLModel

from vidcls import distributed

# transformers' names; None leaves the choice to it (sdpa).
ATTENTION = {"auto": None, "sdpa": "sdpa", "eager": "eager", "disabled": "eager", "fa2": "flash_attention_2"}


def resolve_attention(flash_attn: str) -> tuple[str | None, str | None]:
    """transformers' attn_implementation for the option flash_attn, and a line for the user where it is another one.

    Raises ValueError for a value that is none.
    """
    if flash_attn not in ATTENTION:
        raise ValueError(f"flash_attn is {flash_attn!r}; it must be one of {', '.join(ATTENTION)}")
    if flash_attn == "fa2" and (lacking := _lacking("flash_attn", "flash-attn")):
        return "sdpa", f"flash_attn: fa2 needs {lacking}; torch's sdpa is used"
    return ATTENTION[flash_attn], None


def resolve_liger(wanted: bool) -> str | None:
    """A line for the user when Liger's kernels are wanted and cannot be had; None when all is as asked."""
    if wanted and (lacking := _lacking("liger_kernel", "liger-kernel")):
        return f"enable_liger_kernel: needs {lacking}; transformers' own RMSNorm and SwiGLU are used"
    return None


def apply_liger(backbone: Qwen2_5_VLModel, wanted: bool) -> None:
    """Give the backbone's norms and the language model's MLPs Liger's fused forward, where `resolve_liger` has no
    objection. Parameters and their names stay. Call it before `tune`: Liger knows the plain model only.
    """
    if not wanted or resolve_liger(wanted):
        return
    from liger_kernel.transformers import apply_liger_kernel_to_qwen2_5_vl

    # No vocabulary loss: there are no vocabulary logits. No rope: Liger (0.8) replaces a function that transformers 5
    # no longer has, since it merges the three position axes before its layers.
    apply_liger_kernel_to_qwen2_5_vl(
        rope=False, cross_entropy=False, fused_linear_cross_entropy=False, rms_norm=True, swiglu=True, model=backbone
    )


def compile_layers(backbone: Qwen2_5_VLModel) -> None:
    """Have torch.compile take over the forward of every language layer, in place: no name changes.

    Layer by layer, because they are all alike: one is compiled and the others find it done. It happens in the first
    forward, and once more when the shapes change for the first time and in the first evaluation. Not the vision
    blocks, whose loop over a clip's windows would be unrolled for every new clip size.
    """
    for layer in backbone.language_model.layers:
        layer.compile()


def _lacking(module: str, package: str) -> str:
    """What of a GPU and a package is not here, in words; "" when both are."""
    device = distributed.accelerator_name()
    found = {
        f"a GPU (here: {device})": device != "cpu",
        f"the package {package}": importlib.util.find_spec(module) is not None,
    }
    return " and ".join(what for what, is_here in found.items() if not is_here)
