import io
import pickle
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from tests.support.clips import sequential_decode, text_as_video, truncated, video
from vidcls.data.decode import (
    DecodeError,
    DecodeSettings,
    JpegError,
    decode_clip,
    decode_jpegs,
    encode_jpegs,
    resize_frames,
    segment_midpoints,
    target_size,
)


def assert_same_as_sequential(path: Path, frames: int, decoder: str | None = None) -> None:
    """decode_clip against one plain pass. Two grey levels apart: decord's MPEG-4 rounds its IDCT otherwise."""
    clip = decode_clip(path, frames)
    shown, times = sequential_decode(path)
    wanted = np.floor((np.arange(frames) + 0.5) * len(shown) / frames).astype(int)
    difference = np.abs(shown[wanted].astype(int) - clip.frames).max()
    assert difference <= 2, (path, clip.decoder, difference)
    np.testing.assert_allclose(clip.times, times[wanted], atol=1e-3)
    assert clip.original_size == (shown.shape[2], shown.shape[1])
    assert decoder in (None, clip.decoder)


@pytest.mark.parametrize(("name", "codec"), [("c.mp4", "libx264"), ("c.avi", "mpeg4"), ("c.mkv", "libx264")])
@pytest.mark.parametrize("frames", [1, 7, 16])
def test_frames_and_times_are_those_of_a_sequential_decode(tmp_path: Path, name: str, codec: str, frames: int) -> None:
    path = video(tmp_path / name, 48, codec=codec)
    assert_same_as_sequential(path, frames, "decord")


def test_decord_is_never_asked_for_the_last_frame(tmp_path: Path) -> None:
    assert_same_as_sequential(video(tmp_path / "c.mp4", 24), 16, "pyav")


def reordered(path: Path, codec: str, options: dict[str, str]) -> Path:
    """60 frames with B-frames and key frames between them: what decord gets wrong when it seeks."""
    source = video(path.with_name("plain.mp4"), 60)
    with av.open(str(source)) as plain, av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)  # MPEG-1 knows no 12
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        stream.codec_context.gop_size, stream.codec_context.max_b_frames = 12, 2
        for number, frame in enumerate(plain.decode(video=0)):
            frame.pict_type = 0  # the encoder chooses
            frame.pts, frame.time_base = number, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("c.avi", "libx264", {"x264-params": "keyint=12:bframes=2"}),
        ("c.mp4", "libx264", {"x264-params": "open-gop=1:keyint=12:bframes=2:b-adapt=0"}),
        ("c.avi", "mpeg4", {}),
        ("c.mp4", "mpeg4", {}),
        ("c.mpg", "mpeg1video", {}),
        ("c.ts", "libx264", {"x264-params": "keyint=12:bframes=2"}),
    ],
)
def test_formats_that_decord_gets_wrong_go_to_pyav(tmp_path: Path, name: str, codec: str, options: dict) -> None:
    assert_same_as_sequential(reordered(tmp_path / name, codec, options), 16, "pyav")


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_short_clips_repeat_frames(tmp_path: Path, frames: int) -> None:
    path = video(tmp_path / "c.mp4", frames)
    clip = decode_clip(path, 8)
    assert len(clip.frames) == 8
    assert len(np.unique(clip.times)) == frames
    assert_same_as_sequential(path, 8)


@pytest.mark.parametrize("suffix", [".avi", ".mkv"])
@pytest.mark.parametrize("share", [0.4, 0.6, 1.0])
def test_truncated_file_gives_its_beginning_and_says_so(tmp_path: Path, suffix: str, share: float) -> None:
    whole = video(tmp_path / f"whole{suffix}", 60, codec="mpeg4")
    clip = decode_clip(truncated(tmp_path / f"cut{suffix}", whole, share), 8)
    assert clip.frames.shape == (8, 64, 64, 3)
    assert clip.times[-1] < 5 * share
    assert (clip.damage is not None) == (share < 1)
    assert clip.damage is None or clip.damage.startswith(("the file ends after", "decoding stops after"))


def test_file_without_frames_is_an_error_with_path_and_reason(tmp_path: Path) -> None:
    for path in (
        text_as_video(tmp_path / "text.mp4"),
        truncated(tmp_path / "cut.mp4", video(tmp_path / "whole.mp4"), 0.6),
        tmp_path / "missing.mp4",
        tmp_path,
    ):
        with pytest.raises(DecodeError, match="PyAV: ") as caught:
            decode_clip(path, 8)
        assert str(path) in str(caught.value)
        again = pickle.loads(pickle.dumps(caught.value))  # worker processes send it so
        assert str(again) == str(caught.value)


def test_file_that_both_decoders_refuse_names_both_reasons(tmp_path: Path, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("no")

    path = video(tmp_path / "c.mp4", 48)
    monkeypatch.setattr("vidcls.data.decode.decord.VideoReader", lambda *_, **__: refuse())
    assert_same_as_sequential(path, 8, "pyav")
    monkeypatch.setattr("vidcls.data.decode._pick", refuse)
    with pytest.raises(DecodeError, match=r"decord: no; PyAV: no"):
        decode_clip(path, 8)


def test_sound_without_pictures_is_an_error(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "sound.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        stream.layout = "mono"
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    with pytest.raises(DecodeError, match="no video stream"):
        decode_clip(tmp_path / "sound.mkv", 8)


@pytest.mark.real
def test_every_real_clip_is_decoded_as_a_sequential_pass_does(real_data: Path) -> None:
    ucf101 = sorted((real_data / "ucf101" / "videos").glob("*/*"))[::3]
    others = [*sorted((real_data / "ssv2" / "videos").glob("*")), *sorted((real_data / "clips").glob("*"))]
    checked = [path for path in ucf101 + others if "corrupt" not in path.name]
    assert len(checked) > 60
    for path in checked:
        assert_same_as_sequential(path, 16)


@pytest.mark.real
def test_real_odd_files(real_data: Path) -> None:
    clips = real_data / "clips"
    corrupted = decode_clip(clips / "decord_corrupted.mp4", 16)
    assert corrupted.decoder == "pyav"
    assert corrupted.damage
    assert corrupted.damage.startswith("decoding stops after 28 frames")
    rotated = decode_clip(clips / "decord_video_90.mov", 3)
    assert rotated.decoder == "pyav"
    assert rotated.original_size == (320, 568)  # stored as 568x320


def test_segment_midpoints() -> None:
    for total in (1, 2, 15, 16, 17, 250, 99991):
        for frames in (1, 2, 8, 16):
            expected = np.floor((np.arange(frames) + 0.5) * total / frames)
            assert segment_midpoints(total, frames) == expected.tolist()


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(240, 320, (128, 170)), (320, 240, (170, 128)), (240, 427, (128, 228)), (64, 64, (128, 128))],
)
def test_target_size(height: int, width: int, expected: tuple[int, int]) -> None:
    assert target_size(height, width, 128) == expected


def test_resize_is_pillows_bicubic() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 20, 30, 3), dtype=np.uint8)
    assert resize_frames(frames, (20, 30)) is frames
    resized = resize_frames(frames, (10, 16))
    expected = Image.fromarray(frames[1]).resize((16, 10), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(resized[1], np.asarray(expected))


def test_jpegs_agree_with_pillow(tmp_path: Path) -> None:
    frames, _ = sequential_decode(video(tmp_path / "c.mp4", 3))
    jpegs = encode_jpegs(frames, 90)
    decoded = decode_jpegs(jpegs)
    assert decoded.shape == frames.shape
    for frame, jpeg, ours in zip(frames, jpegs, decoded, strict=True):
        pillow = np.asarray(Image.open(io.BytesIO(jpeg))).astype(int)
        assert np.abs(pillow - ours).max() <= 2
        assert np.abs(frame.astype(int) - ours).mean() < 8


def test_damaged_jpegs_are_named() -> None:
    jpegs = encode_jpegs(np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8), 90)
    wide = encode_jpegs(np.zeros((1, 32, 48, 3), np.uint8), 90)
    large = encode_jpegs(np.zeros((1, 4098, 4098, 3), np.uint8), 5)
    flipped = bytearray(jpegs[1])
    flipped[len(flipped) // 2 : len(flipped) // 2 + 2] = b"\xff\xd8"
    for second, message in [
        (jpegs[1][:-100], "frame 1: "),
        (bytes(flipped), "frame 1: "),
        (b"", "frame 1: "),
        (b"no jpeg", "frame 1: "),
        (wide[0], "frame 1: 48x32, frame 0 is 32x32"),
        (large[0], "frame 1: 4098x4098 is more than"),
    ]:
        with pytest.raises(JpegError, match=message):
            decode_jpegs([jpegs[0], second])
    with pytest.raises(JpegError, match="no frames"):
        decode_jpegs([])


@pytest.mark.parametrize(
    "wrong",
    [{"frames": 0}, {"frames": 1000}, {"frames": 8.0}, {"frames": True}, {"short_side": 127}, {"quality": 101}],
)
def test_settings_check_themselves(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DecodeSettings(**wrong)


def test_settings_survive_storing() -> None:
    settings = DecodeSettings(8, 112, 85)
    assert DecodeSettings.from_dict(settings.to_dict()) == settings
    with pytest.raises(ValueError, match="exactly the fields"):
        DecodeSettings.from_dict({"frames": 8})


def test_workers_do_not_pay_for_torch() -> None:
    code = "import sys, vidcls.data.packing; print([m for m in ('torch', 'webdataset') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
