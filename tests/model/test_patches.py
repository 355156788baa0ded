"""Resizing and patches against transformers' own Qwen2-VL processors."""

import sys
import types

import numpy as np
import pytest
import torch
from transformers import image_processing_backends
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as pil_processing

from vidcls.model.patches import VisionGeometry, frames_to_patches

GEOMETRY = VisionGeometry()


def random_clip(frames, height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (frames, height, width, 3), dtype=torch.uint8, generator=generator)


@pytest.fixture
def video_processor(monkeypatch):
    """transformers' Qwen2VLVideoProcessor, whose module imports torchvision for resize and normalize.

    Only `normalize` is needed, since frames come in resized; it is torchvision's documented formula,
    (image - mean) / std per channel. All the rest of the arithmetic and the layout is transformers'.
    """

    def normalize(image, mean, std, inplace):
        return (image - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)

    stub = types.ModuleType("torchvision.transforms.v2.functional")
    stub.normalize = normalize
    names = ["torchvision", "torchvision.transforms", "torchvision.transforms.v2"]
    if "torchvision" not in sys.modules:
        for name in names:
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        monkeypatch.setitem(sys.modules, stub.__name__, stub)
        sys.modules["torchvision.transforms.v2"].functional = stub
        monkeypatch.setattr(image_processing_backends, "tvF", stub, raising=False)
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    # __init__ asks for the real torchvision; the class attributes hold all that _preprocess reads.
    yield object.__new__(Qwen2VLVideoProcessor)
    sys.modules.pop(Qwen2VLVideoProcessor.__module__)


def processor_patches(processor, clips):
    out = processor._preprocess(
        [clip.permute(0, 3, 1, 2) for clip in clips],
        do_resize=False,
        size=None,
        resample=None,
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=tuple(processor.image_mean),
        image_std=tuple(processor.image_std),
        patch_size=processor.patch_size,
        temporal_patch_size=processor.temporal_patch_size,
        merge_size=processor.merge_size,
        cap_pixels_per_frame=False,
    )
    # Clips of one size come back stacked, [clips, N, P].
    pixels = out["pixel_values_videos"]
    grids = tuple(tuple(grid) for grid in torch.as_tensor(out["video_grid_thw"]).view(-1, 3).tolist())
    return pixels.reshape(-1, pixels.shape[-1]), grids


@pytest.mark.parametrize(
    "shapes",
    [
        [(8, 112, 112)],
        [(4, 56, 84), (4, 56, 84), (4, 56, 84)],
        [(2, 28, 28), (6, 84, 56), (6, 84, 56), (2, 28, 28), (4, 140, 28)],
    ],
)
def test_patches_equal_the_video_processor_bit_for_bit(shapes, video_processor):
    clips = [random_clip(*shape, seed=index) for index, shape in enumerate(shapes)]
    expected, grids = processor_patches(video_processor, clips) if len(set(shapes)) == 1 else (None, None)
    if expected is None:  # the processor reorders and cannot stack clips of different sizes: one at a time
        single = [processor_patches(video_processor, [clip]) for clip in clips]
        expected, grids = torch.cat([one for one, _ in single]), tuple(grid for _, (grid,) in single)
    assert grids == tuple(GEOMETRY.grid(*shape) for shape in shapes)
    frames = torch.cat([clip.flatten() for clip in clips])
    assert torch.equal(frames_to_patches(frames, grids, GEOMETRY, torch.float32), expected)
    in_bf16 = frames_to_patches(frames, grids, GEOMETRY, torch.bfloat16)
    assert torch.equal(in_bf16, expected.bfloat16())


def test_patches_equal_the_image_processor_on_a_still():
    image = random_clip(1, 84, 112)
    processor = pil_processing.Qwen2VLImageProcessorPil(size={"shortest_edge": 1, "longest_edge": 84 * 112})
    out = processor(images=[image[0].numpy()], return_tensors="np")
    assert out["image_grid_thw"].tolist() == [[1, 6, 8]]
    found = frames_to_patches(image.repeat(2, 1, 1, 1).flatten(), ((1, 6, 8),), GEOMETRY, torch.float32)
    # Rescaling and normalising are two steps in NumPy: not the last bit.
    np.testing.assert_allclose(found.numpy(), out["pixel_values"], atol=2e-6)


def test_frames_that_do_not_fit_the_grids_are_refused():
    with pytest.raises(ValueError, match=r"4704 values of torch.uint8; the grids .* need 9408"):
        frames_to_patches(random_clip(2, 28, 28).flatten(), ((1, 2, 4),), GEOMETRY, torch.float32)
    with pytest.raises(ValueError, match=r"torch.float32"):
        frames_to_patches(random_clip(2, 28, 28).flatten().float(), ((1, 2, 2),), GEOMETRY, torch.float32)
