"""Augmentation: pure, the same for all frames, each operation what it says, and no setting in the way of another."""

from __future__ import annotations

import colorsys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps
from scipy import stats

from vidcls.data.augment import (
    FLIP,
    MOST_OPERATIONS,
    WORDS,
    AugmentSettings,
    Mix,
    augment_clip,
    mix_clips,
    mix_plan,
    symmetric_beta,
)
from vidcls.data.operations import MOST_BITS_LOST, OPERATIONS, jitter_colours, mean_colour
from vidcls.data.order import AUGMENT, random_words

EVERYTHING = AugmentSettings(
    horizontal_flip=0.5,
    random_resized_crop=0.3,
    color_jitter=0.4,
    random_erasing=0.5,
    rand_augment=(2, 9),
    mixup_alpha=0.8,
    cutmix_alpha=1.0,
)


def noise(*shape: int, seed: int = 0, low: int = 0, high: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, (*shape, 3), dtype=np.uint8)


def still(frames: int, height: int, width: int) -> np.ndarray:
    """Smooth colours, all frames alike."""
    rows, columns = np.mgrid[:height, :width]
    frame = np.stack([255 * rows / height, 255 * columns / width, 127 + 100 * np.sin(rows + columns)], axis=-1)
    return np.repeat(frame.astype(np.uint8)[None], frames, axis=0)


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 23), st.integers(1, 23)),
    sample=st.integers(0, 10**6),
    epoch=st.integers(0, 99),
    count=st.integers(1, MOST_OPERATIONS),
)
@settings(max_examples=60, deadline=None)
def test_any_size_is_changed_alike_in_all_frames_and_twice_the_same(
    shape: tuple[int, int, int], sample: int, epoch: int, count: int
) -> None:
    frames = noise(*shape)
    frames[:] = frames[:1]
    before = frames.copy()
    all_on = replace(EVERYTHING, horizontal_flip=1.0, random_erasing=1.0, rand_augment=(count, 10))
    changed, flipped = augment_clip(frames, all_on, 3, epoch, sample)
    np.testing.assert_array_equal(frames, before)
    assert flipped
    assert changed.dtype == np.uint8
    assert changed.flags.c_contiguous
    assert changed.flags.writeable
    assert changed.shape[0] == shape[0]
    assert 1 <= changed.shape[1] <= shape[1]
    assert 1 <= changed.shape[2] <= shape[2]
    assert (changed == changed[:1]).all()
    np.testing.assert_array_equal(augment_clip(frames, all_on, 3, epoch, sample)[0], changed)


def test_other_seeds_epochs_and_samples_give_other_pictures() -> None:
    frames = still(2, 40, 40)
    for setting in ("random_resized_crop", "color_jitter"):
        some = AugmentSettings(**{setting: 0.5})
        numbers = [(1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4), (3, 2, 1)]
        assert len({augment_clip(frames, some, *each)[0].tobytes() for each in numbers}) == len(numbers)


def test_nothing_is_done_when_all_is_off() -> None:
    frames = noise(2, 5, 7)
    changed, flipped = augment_clip(frames, AugmentSettings(), 1, 2, 3)
    assert changed is frames
    assert not flipped
    assert not AugmentSettings().on
    assert AugmentSettings(mixup_alpha=0.1).on


def test_a_flip_mirrors_and_is_as_frequent_as_asked() -> None:
    frames = noise(2, 5, 7)
    changed, flipped = augment_clip(frames, AugmentSettings(horizontal_flip=1.0), 1, 2, 3)
    np.testing.assert_array_equal(changed, np.flip(frames, axis=2))
    assert flipped
    often = [augment_clip(frames, AugmentSettings(horizontal_flip=0.3), 1, 0, sample)[1] for sample in range(2000)]
    assert 530 < sum(often) < 670  # 600, standard deviation 20


@pytest.mark.parametrize("setting", ["horizontal_flip", "random_resized_crop", "color_jitter", "random_erasing"])
def test_one_setting_leaves_what_the_others_do(setting: str) -> None:
    # Where the crop lies, and whether there is a flip, is read off pixels that tell where they come from.
    rows, columns = np.mgrid[:60, :60]
    frames = np.stack([4 * rows, 4 * columns, np.full_like(rows, 90)], axis=-1).astype(np.uint8)[None]
    for sample in range(20):
        alone = replace(AugmentSettings(), **{setting: getattr(EVERYTHING, setting)})
        first, first_flipped = augment_clip(frames, alone, 1, 2, sample)
        geometric = AugmentSettings(horizontal_flip=0.5, random_resized_crop=0.3)
        both, flipped = augment_clip(
            frames, replace(geometric, **{setting: getattr(EVERYTHING, setting)}), 1, 2, sample
        )
        plain, plain_flipped = augment_clip(frames, geometric, 1, 2, sample)
        assert both.shape == plain.shape
        assert flipped == plain_flipped
        if setting == "horizontal_flip":
            assert first_flipped == flipped
        if setting == "random_resized_crop":
            np.testing.assert_array_equal(first, both[:, :, ::-1] if flipped else both)


def test_words_of_a_clip_are_pinned() -> None:
    # A release that changes these goes on differently with the runs of an older one.
    flips = [augment_clip(noise(1, 2, 2), AugmentSettings(horizontal_flip=0.5), 7, 0, sample)[1] for sample in range(8)]
    by_hand = [int(random_words(7, 0, WORDS, purpose=AUGMENT, item=sample)[FLIP]) < 2**63 for sample in range(8)]
    assert flips == by_hand == [True, True, False, True, True, True, True, False]
    frames = still(1, 50, 90)
    crops = [augment_clip(frames, AugmentSettings(random_resized_crop=0.3), 7, 0, i)[0].shape[1:3] for i in range(3)]
    assert crops == [(50, 83), (36, 71), (37, 56)]
    # Mixing has words of its own; its share, from logarithm and cosine, may differ in the last bit.
    plan = mix_plan(AugmentSettings(mixup_alpha=0.5, cutmix_alpha=0.5), 7, 0, 3, 3, 1000)
    assert (plan.partner, plan.kind, round(plan.share, 9)) == (164, "mixup", 0.081009989)
    names = [*OPERATIONS]
    assert names[:3] + names[-1:] == ["identity", "auto_contrast", "equalize", "translate_y"]
    assert len(names) == 14


def test_crops_keep_the_share_and_the_stretch_asked_for_and_lie_anywhere() -> None:
    rows, columns = np.mgrid[:100, :200]
    frames = np.stack([rows, columns, 0 * rows], axis=-1).astype(np.uint8)[None]
    shares, stretches, tops = [], [], []
    for sample in range(1000):
        crop, _ = augment_clip(frames, AugmentSettings(random_resized_crop=0.4), 1, 0, sample)
        height, width = crop.shape[1:3]
        shares.append(height * width / 20000)
        stretches.append((width / 200) / (height / 100))
        top, left = crop[0, 0, 0, :2].tolist()
        np.testing.assert_array_equal(crop, frames[:, top : top + height, left : left + width])
        tops.append(top / (100 - height) if height < 100 else 0.5)
    assert 0.39 < min(shares) < 0.42 < 0.98 < max(shares) <= 1
    assert stats.kstest(shares, stats.uniform(0.4, 0.6).cdf).pvalue > 0.001
    assert 0.74 < min(stretches) < 0.78 < 1.28 < max(stretches) < 1.35
    assert abs(np.log(stretches).mean()) < 0.03, "as often wide as tall"
    assert (min(tops), max(tops)) == (0, 1)
    assert 0.45 < np.mean(tops) < 0.55


def test_an_erased_box_has_the_mean_colour_and_a_legal_size() -> None:
    frames = noise(2, 60, 80, low=0, high=100)
    frames[:, 0, 0] = 255
    areas = []
    for sample in range(200):
        changed, _ = augment_clip(frames, AugmentSettings(random_erasing=1.0), 1, 0, sample)
        where = (changed != frames).any(axis=(0, 3))
        rows, columns = np.flatnonzero(where.any(axis=1)), np.flatnonzero(where.any(axis=0))
        box = changed[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert (box == np.rint(frames.reshape(-1, 3).mean(axis=0))).all()
        areas.append(box.shape[1] * box.shape[2] / 4800)
    assert 0.015 < min(areas) < 0.05 < 0.28 < max(areas) < 0.35
    rarely = [
        augment_clip(frames, AugmentSettings(random_erasing=0.25), 1, 0, sample)[0] is not frames
        for sample in range(800)
    ]
    assert 150 < sum(rarely) < 250  # 200, standard deviation 12


# One frame, and a clip whose frames differ: what Pillow does to the one, or to all of them as one picture.
PILLOW: dict[str, Any] = {
    "identity": lambda image, level: image,
    "auto_contrast": lambda image, level: ImageOps.autocontrast(image),
    "equalize": lambda image, level: ImageOps.equalize(image),
    "rotate": lambda image, level: image.rotate(
        30 * level,
        Image.Resampling.BILINEAR,
        fillcolor=tuple(np.rint(np.asarray(image).reshape(-1, 3).mean(0)).astype(int)),
    ),
    "solarize": lambda image, level: ImageOps.solarize(image, round(256 - 256 * abs(level))),
    "color": lambda image, level: ImageEnhance.Color(image).enhance(1 + 0.9 * level),
    "posterize": lambda image, level: ImageOps.posterize(image, 8 - round(MOST_BITS_LOST * abs(level))),
    "contrast": lambda image, level: ImageEnhance.Contrast(image).enhance(1 + 0.9 * level),
    "brightness": lambda image, level: ImageEnhance.Brightness(image).enhance(1 + 0.9 * level),
    "sharpness": lambda image, level: ImageEnhance.Sharpness(image).enhance(1 + 0.9 * level),
}


@pytest.mark.parametrize("level", [-1.0, -0.3, 0.5, 1.0])
@pytest.mark.parametrize("name", PILLOW)
def test_operations_do_to_one_frame_what_pillow_does(name: str, level: float) -> None:
    frame = noise(1, 31, 43, low=20, high=200)
    expected = np.asarray(PILLOW[name](Image.fromarray(frame[0]), level))
    np.testing.assert_array_equal(OPERATIONS[name](frame, level)[0], expected)


@pytest.mark.parametrize("name", ["auto_contrast", "equalize", "contrast"])
def test_statistics_are_those_of_the_whole_clip(name: str) -> None:
    dark, bright = noise(1, 40, 9, low=10, high=60), noise(1, 40, 9, low=150, high=220, seed=1)
    changed = OPERATIONS[name](np.concatenate([dark, bright]), 0.5)
    together = np.asarray(PILLOW[name](Image.fromarray(np.concatenate([dark, bright]).reshape(80, 9, 3)), 0.5))
    np.testing.assert_array_equal(changed.reshape(80, 9, 3), together)
    assert not np.array_equal(changed[:1], OPERATIONS[name](dark, 0.5)), "or it would be done frame by frame"


def test_frames_do_not_run_into_each_other() -> None:
    black_and_white = np.zeros((2, 9, 9, 3), dtype=np.uint8)
    black_and_white[1] = 255
    np.testing.assert_array_equal(OPERATIONS["sharpness"](black_and_white, -1.0), black_and_white)


def test_shears_and_translations_by_hand() -> None:
    frames = noise(1, 20, 40)
    fill = np.rint(frames.reshape(-1, 3).mean(axis=0)).astype(np.uint8)
    right = OPERATIONS["translate_x"](frames, -1.0)  # 0.45 * 40 = 18 pixels
    np.testing.assert_array_equal(right[:, :, 18:], frames[:, :, :22])
    assert (right[:, :, :18] == fill).all()
    up = OPERATIONS["translate_y"](frames, 1.0)  # 9 pixels
    np.testing.assert_array_equal(up[:, :11], frames[:, 9:])
    assert (up[:, 11:] == fill).all()
    # A row that is d below the middle comes from 0.3 d further right.
    sheared = OPERATIONS["shear_x"](still(1, 20, 40), 1.0).astype(float)
    columns = still(1, 20, 40)[0, 0, :, 1].astype(float)  # a ramp: position by colour
    places = np.interp(sheared[0, :, 20, 1], columns, np.arange(40))
    np.testing.assert_allclose(places, 20 + 0.3 * (np.arange(20) - 9.5), atol=0.25)
    turned = OPERATIONS["shear_y"](frames.transpose(0, 2, 1, 3), 0.7).transpose(0, 2, 1, 3)
    np.testing.assert_allclose(turned, OPERATIONS["shear_x"](frames, 0.7), atol=1)


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in ("auto_contrast", "equalize")])
def test_magnitude_0_changes_nothing(name: str) -> None:
    frames = noise(2, 12, 17)
    np.testing.assert_array_equal(OPERATIONS[name](frames, 0.0), frames)


@pytest.mark.parametrize("level", [-0.4, 0.4])
@pytest.mark.parametrize("name", OPERATIONS)
def test_no_operation_mirrors(name: str, level: float) -> None:
    columns = np.mgrid[:48, :48][1]
    frames = np.repeat((3 * (47 - columns))[None, :, :, None], 3, axis=3).astype(np.uint8)  # brighter to the left
    middle = OPERATIONS[name](frames, level)[0, 16:32, 16:32, 0].astype(float)
    assert np.polyfit(np.arange(16), middle.mean(axis=0), 1)[0] < -1


def test_rand_augment_draws_all_operations_alike_and_both_directions() -> None:
    frames = still(1, 30, 30)
    results = {OPERATIONS[name](frames, level).tobytes(): (name, level) for name in OPERATIONS for level in (0.9, -0.9)}
    drawn = [
        results[augment_clip(frames, AugmentSettings(rand_augment=(1, 9)), 1, 0, sample)[0].tobytes()]
        for sample in range(1400)
    ]
    counts = [sum(name == each for each, _ in drawn) for name in OPERATIONS]
    assert sum((count - 100) ** 2 / 100 for count in counts) < 34.5  # chi-squared, 13 degrees of freedom, p = 0.001
    directions = [level > 0 for name, level in drawn if name in ("rotate", "shear_x", "brightness")]
    assert 0.4 < np.mean(directions) < 0.6


def test_operations_of_a_clip_follow_one_another() -> None:
    frames = still(1, 30, 30)
    for sample in range(10):
        once, _ = augment_clip(frames, AugmentSettings(rand_augment=(1, 5)), 1, 0, sample)
        twice, _ = augment_clip(frames, AugmentSettings(rand_augment=(2, 5)), 1, 0, sample)
        followers = [OPERATIONS[name](once, level) for name in OPERATIONS for level in (0.5, -0.5)]
        assert any(np.array_equal(twice, each) for each in followers)


def test_colours_agree_with_pillow_where_nothing_is_clipped() -> None:
    frames = noise(3, 9, 11, low=100, high=150)
    tall = Image.fromarray(frames.reshape(27, 11, 3))
    for enhance, factors in [
        (ImageEnhance.Brightness, (1.3, 1, 1)),
        (ImageEnhance.Contrast, (1, 0.6, 1)),
        (ImageEnhance.Color, (1, 1, 1.5)),
    ]:
        factor = next(value for value in factors if value != 1)
        expected = np.asarray(enhance(tall).enhance(factor)).reshape(frames.shape).astype(int)
        assert abs(jitter_colours(frames, *factors, turn=0.0) - expected).max() <= 2  # Pillow cuts fractions off
    np.testing.assert_array_equal(jitter_colours(frames, 1, 1, 1, 0.0), frames)
    np.testing.assert_array_equal(jitter_colours(frames, 1, 1, 1, 1.0), frames)


def test_hue_turns_and_keeps_luma_and_greys() -> None:
    frames = noise(1, 6, 6, low=100, high=150)
    grey = np.full((1, 2, 2, 3), 77, dtype=np.uint8)
    np.testing.assert_array_equal(jitter_colours(grey, 1, 1, 2.0, 0.3), grey)
    turned = jitter_colours(frames, 1, 1, 1, 0.25)
    for before, after in zip(frames.reshape(-1, 3) / 255, turned.reshape(-1, 3) / 255, strict=True):
        luma, in_phase, quadrature = colorsys.rgb_to_yiq(*before)
        new_luma, new_in_phase, new_quadrature = colorsys.rgb_to_yiq(*after)
        # colorsys rounds its coefficients to two digits.
        np.testing.assert_allclose([new_luma, new_in_phase, new_quadrature], [luma, -quadrature, in_phase], atol=0.012)


def test_jitter_stays_within_its_range() -> None:
    grey = np.full((1, 4, 4, 3), 100, dtype=np.uint8)  # only brightness can change it
    values = [
        int(augment_clip(grey, AugmentSettings(color_jitter=0.4), 1, 0, sample)[0][0, 0, 0, 0]) for sample in range(500)
    ]
    assert 60 <= min(values) < 65 < 135 < max(values) <= 140
    assert abs(np.mean(values) - 100) < 4


def test_brightness_contrast_saturation_and_hue_are_drawn_apart() -> None:
    # Dark and bright grey tell brightness and contrast, the length and angle of a faint colour the other two.
    dark, bright, faint = (100, 100, 100), (140, 140, 140), (130, 118, 112)
    frames = np.array([dark, bright, faint, faint], dtype=np.uint8).reshape(1, 2, 2, 3)
    drawn = []
    for sample in range(300):
        some = AugmentSettings(color_jitter=0.4)
        grey, light, colour, _ = augment_clip(frames, some, 1, 0, sample)[0].reshape(-1, 3).astype(float)
        _, in_phase, quadrature = colorsys.rgb_to_yiq(*colour)
        scale = (light[0] - grey[0]) / 40
        middle = float(np.dot((0.299, 0.587, 0.114), frames.reshape(-1, 3).mean(axis=0)))
        brightness = (grey[0] - scale * (100 - middle)) / middle
        chroma = np.hypot(in_phase, quadrature) / scale
        drawn.append((brightness, scale / brightness, chroma, np.arctan2(quadrature, in_phase)))
    brightness, contrast, chroma, angle = np.array(drawn).T
    assert 0.58 < brightness.min() < 0.63 < 1.37 < brightness.max() < 1.42
    assert 0.5 < contrast.min() < 0.65 < 1.35 < contrast.max() < 1.5
    assert chroma.max() > 1.8 * chroma.min()
    assert 1.1 < np.ptp(angle) < 1.5  # 0.4 * 0.25 turns to either side: 1.26
    correlations = np.corrcoef([brightness, contrast, chroma, angle])
    assert abs(correlations - np.eye(4)).max() < 0.2  # standard deviation 0.06


def test_mean_colour_is_that_of_all_frames() -> None:
    frames = noise(5, 13, 7)
    assert mean_colour(frames) == tuple(np.rint(frames.reshape(-1, 3).mean(axis=0)).astype(int).tolist())


@pytest.mark.parametrize("alpha", [0.15, 0.5, 1.0, 3.0, 200.0])
def test_shares_have_the_beta_distribution(alpha: float) -> None:
    uniforms = np.random.default_rng(3).random((4000, 2)).tolist()
    drawn = np.array([symmetric_beta(alpha, *pair) for pair in uniforms])
    assert ((drawn >= 0) & (drawn <= 1)).all()
    assert stats.kstest(drawn, stats.beta(alpha, alpha).cdf).pvalue > 0.001


@given(
    alpha=st.floats(0, 1e9, exclude_min=True),
    first=st.floats(0, 1, exclude_max=True),
    second=st.floats(0, 1, exclude_max=True),
)
def test_shares_are_shares_for_any_alpha(alpha: float, first: float, second: float) -> None:
    assert 0 <= symmetric_beta(alpha, first, second) <= 1


def test_partners_are_all_the_others_alike() -> None:
    some = AugmentSettings(mixup_alpha=0.4)
    partners = np.bincount([mix_plan(some, 1, epoch, 3, 3, 11).partner for epoch in range(2000)], minlength=11)
    assert partners[3] == 0
    assert ((np.delete(partners, 3) - 200) ** 2 / 200).sum() < 27.9  # chi-squared, 9 degrees of freedom, p = 0.001
    assert {mix_plan(some, 1, epoch, sample, sample, 2).partner for epoch in range(9) for sample in (0,)} == {1}
    assert mix_plan(some, 1, 2, 0, 0, 1) is None
    assert mix_plan(AugmentSettings(horizontal_flip=1.0), 1, 2, 3, 3, 11) is None
    assert mix_plan(some, 1, 2, 3, 3, 11) == mix_plan(replace(some, color_jitter=1.0), 1, 2, 3, 3, 11)
    assert len({mix_plan(some, *each, 3, 11) for each in ((1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 14))}) == 4


def test_clips_of_equal_place_in_several_groups_are_mixed_apart() -> None:
    some = AugmentSettings(mixup_alpha=0.4, cutmix_alpha=1.0)
    plans = {mix_plan(some, 1, 0, sample, sample % 100, 100) for sample in range(5000)}
    assert len({(plan.kind, plan.share, plan.middle) for plan in plans}) == 5000
    assert all(mix_plan(some, 1, 0, sample, sample % 100, 100).partner != sample % 100 for sample in range(500))


def test_kinds_and_shares_follow_the_alphas() -> None:
    both = AugmentSettings(mixup_alpha=0.2, cutmix_alpha=3.0)
    plans = [mix_plan(both, 1, 0, sample, sample, 2000) for sample in range(2000)]
    mixed = [plan.share for plan in plans if plan.kind == "mixup"]
    cut = [plan.share for plan in plans if plan.kind == "cutmix"]
    assert 900 < len(mixed) < 1100
    assert stats.kstest(mixed, stats.beta(0.2, 0.2).cdf).pvalue > 0.001
    assert stats.kstest(cut, stats.beta(3, 3).cdf).pvalue > 0.001
    only = AugmentSettings(cutmix_alpha=1.0)
    assert {mix_plan(only, 1, 0, sample, sample, 9).kind for sample in range(9)} == {"cutmix"}


@given(share=st.floats(0, 1), shape=st.tuples(*[st.integers(1, 9)] * 3))
@settings(deadline=None)
def test_mixup_is_the_weighted_sum(share: float, shape: tuple[int, int, int]) -> None:
    frames, partner = noise(*shape), noise(*shape, seed=1)
    before, partner_before = frames.copy(), partner.copy()
    mixed, real = mix_clips(frames, partner, Mix(1, "mixup", share, (0.5, 0.5)))
    assert mixed is frames
    assert abs(real - share) <= 1 / 512
    np.testing.assert_array_equal(mixed, np.floor((1 - real) * before + real * partner + 0.5))
    np.testing.assert_array_equal(partner, partner_before)


@given(
    share=st.floats(0, 1),
    shape=st.tuples(*[st.integers(1, 30)] * 3),
    middle=st.tuples(*[st.floats(0, 1, exclude_max=True)] * 2),
)
@settings(deadline=None)
def test_cutmix_puts_in_one_box_and_counts_its_pixels(
    share: float, shape: tuple[int, int, int], middle: tuple[float, float]
) -> None:
    frames, partner = np.zeros((*shape, 3), dtype=np.uint8), np.full((*shape, 3), 255, dtype=np.uint8)
    mixed, real = mix_clips(frames, partner, Mix(1, "cutmix", share, middle))
    assert mixed is frames
    assert (mixed == mixed[:1]).all()
    where = mixed[0, :, :, 0] == 255
    assert real == where.mean()
    assert real <= share
    rows, columns = np.flatnonzero(where.any(axis=1)), np.flatnonzero(where.any(axis=0))
    assert where.sum() == len(rows) * len(columns), "a box"
    assert (np.diff(rows) == 1).all()
    assert (np.diff(columns) == 1).all()


def test_a_cutmix_box_by_hand() -> None:
    frames, partner = np.zeros((2, 20, 40, 3), dtype=np.uint8), np.full((2, 20, 40, 3), 9, dtype=np.uint8)
    inside, share = mix_clips(frames.copy(), partner, Mix(1, "cutmix", 0.25, (0.5, 0.5)))  # sides 10 and 20
    assert share == 0.25
    assert (inside[:, 5:15, 10:30] == 9).all()
    corner, share = mix_clips(
        frames.copy(), partner, Mix(1, "cutmix", 0.25, (0.0, 0.95))
    )  # of rows -5 to 4, columns 28 to 47
    assert share == 5 * 12 / 800
    assert (corner[:, :5, 28:] == 9).all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"horizontal_flip": 1.5}, "horizontal_flip: 1.5, legal: 0 to 1"),
        ({"horizontal_flip": True}, "horizontal_flip: True, legal"),
        ({"color_jitter": -0.1}, "color_jitter: -0.1, legal: 0 to 1"),
        ({"color_jitter": "x"}, "color_jitter: 'x'"),
        ({"random_erasing": float("nan")}, "random_erasing: nan"),
        ({"random_resized_crop": 0}, "random_resized_crop: 0, legal: above 0 and at most 1"),
        ({"rand_augment": 2}, r"rand_augment: 2, legal: two numbers, like \[2, 9\]"),
        ({"rand_augment": (0, 5)}, r"rand_augment: \[0, 5\], legal: .* 1 to 16, then a magnitude from 0 to 10"),
        ({"rand_augment": (1.5, 5)}, r"rand_augment: \[1.5, 5\]"),
        ({"rand_augment": (2, 11)}, r"rand_augment: \[2, 11\]"),
        ({"rand_augment": [2]}, r"rand_augment: \[2\], legal: two numbers, like \[2, 9\]"),
        ({"mixup_alpha": -1}, "mixup_alpha: -1, legal: at least 0"),
        ({"cutmix_alpha": float("inf")}, "cutmix_alpha: inf, legal"),
    ],
)
def test_settings_that_cannot_be(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AugmentSettings(**values)


def test_lists_as_in_a_recipe_are_taken() -> None:
    assert AugmentSettings(rand_augment=[2, 9]) == AugmentSettings(rand_augment=(2, 9))  # type: ignore[arg-type]
