import functools
import pickle
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from tests.support.clips import sequential_decode, text_as_video, truncated, video
from vidcls.data.codecs import resize_frames
from vidcls.data.settings import DecodeSettings
from vidcls.sharding import decode
from vidcls.sharding.decode import DecodeError, decode_clip

shown_frames = functools.lru_cache(maxsize=1)(sequential_decode)  # for tests that compare one file several times
FPS = DecodeSettings(frames=None, fps=4, max_frames=64)


@pytest.fixture(autouse=True)
def seeking_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """decord reads what it can be trusted with, however short the clips of these tests are."""
    monkeypatch.setattr(decode, "SEEK_GAP", 0)


def sixteen(frames: int = 16) -> DecodeSettings:
    """The size of the synthetic clips: nothing is resized."""
    return DecodeSettings(frames=frames, short_side=64)


def assert_same_as_sequential(
    path: Path,
    settings: DecodeSettings,
    decoder: str | None = None,
    start: float | None = None,
    end: float | None = None,
) -> None:
    """decode_clip against one plain pass. Two grey levels apart: decord's MPEG-4 rounds its IDCT otherwise."""
    clip = decode_clip(path, settings, start, end)
    shown, times = shown_frames(path)
    inside = np.flatnonzero((times >= (start or 0)) & (times < (end or np.inf)))
    frames = settings.frames
    if frames is None:
        interval = times[-1] / (len(times) - 1)
        seconds = times[inside[-1]] - times[inside[0]] + interval
        frames = max(2, 2 * min(round(seconds * settings.fps / 2), min(settings.max_frames, len(inside)) // 2))
    wanted = inside[np.floor((np.arange(frames) + 0.5) * len(inside) / frames).astype(int)]
    height, width = shown.shape[1:3]
    size = settings.target_size(height, width)
    assert clip.frames.shape == (frames, *size, 3), path
    expected = [np.asarray(Image.fromarray(shown[i]).resize(size[::-1], Image.Resampling.BICUBIC)) for i in wanted]
    difference = np.abs(np.stack(expected).astype(int) - clip.frames).max()
    assert difference <= 2, (path, clip.decoder, difference)
    np.testing.assert_allclose(clip.times, times[wanted], atol=1e-3)
    assert clip.original_size == (width, height)
    assert decoder in (None, clip.decoder), path


@pytest.mark.parametrize(("name", "codec"), [("c.mp4", "libx264"), ("c.avi", "mpeg4"), ("c.mkv", "libx264")])
@pytest.mark.parametrize("settings", [sixteen(1), sixteen(7), sixteen(), FPS, DecodeSettings(frames=5, short_side=32)])
def test_frames_and_times_are_those_of_a_sequential_decode(
    tmp_path: Path, name: str, codec: str, settings: DecodeSettings
) -> None:
    assert_same_as_sequential(video(tmp_path / name, 48, codec=codec), settings, "decord")


def test_decord_seeks_only_where_that_pays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    path = video(tmp_path / "c.mp4", 120)
    assert_same_as_sequential(path, sixteen(2), "decord")  # frames 30 and 90
    assert_same_as_sequential(path, sixteen(4), "decord", start=1.0)
    assert_same_as_sequential(path, sixteen(5), "pyav")


def test_clip_too_large_to_be_held_goes_to_pyav(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = video(tmp_path / "c.mp4", 48)
    monkeypatch.setattr(decode, "DECORD_BYTES", 16 * 64 * 64 * 3)
    assert_same_as_sequential(path, sixteen(16), "decord")
    assert_same_as_sequential(path, sixteen(17), "pyav")


def test_decord_is_never_asked_for_the_last_frame(tmp_path: Path) -> None:
    path = video(tmp_path / "c.mp4", 24)  # 12 frames a second
    assert_same_as_sequential(path, sixteen(), "pyav")
    assert_same_as_sequential(path, sixteen(), "decord", end=1.5)
    assert_same_as_sequential(path, sixteen(), "pyav", start=1.5)


def encoded(path: Path, frames: int, codec: str, options: dict[str, str], size: int = 64, rate: int = 25) -> Path:
    """`frames` frames with B-frames and key frames between them: what decord gets wrong when it seeks."""
    source = video(path.with_name("plain.mp4"), 60)
    with av.open(str(source)) as plain:
        pictures = [frame.reformat(size, size) for frame in plain.decode(video=0)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = size, size, "yuv420p"
        stream.codec_context.gop_size, stream.codec_context.max_b_frames = 12, 2
        for number in range(frames):
            frame = pictures[number % 60]
            planes = frame.to_ndarray()  # and a grey that tells the rounds of 60 from each other
            planes[:8] = number // 60 * 10 % 200
            frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, rate)
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
    path = encoded(tmp_path / name, 60, codec, options)
    assert_same_as_sequential(path, sixteen(), "pyav")
    assert_same_as_sequential(path, FPS, "pyav")
    assert_same_as_sequential(path, sixteen(), "pyav", start=0.5, end=1.7)


@pytest.mark.parametrize(
    ("name", "codec", "options", "decoder"),
    [
        ("closed.mp4", "libx264", {"x264-params": "keyint=48:min-keyint=48:scenecut=0:bframes=3"}, "pyav"),
        ("open.mp4", "libx264", {"x264-params": "open-gop=1:keyint=12:bframes=3:b-adapt=0:scenecut=0"}, "pyav"),
        ("open.mkv", "libx264", {"x264-params": "open-gop=1:keyint=30:bframes=3:b-adapt=0"}, "pyav"),
        ("plain.mov", "libx264", {"x264-params": "keyint=48:bframes=0"}, "decord"),
        ("b.mp4", "mpeg4", {}, "pyav"),
        ("vp9.webm", "libvpx-vp9", {"g": "40", "deadline": "realtime", "cpu-used": "8"}, None),
    ],
)
def test_segments_far_into_a_video_are_found_by_seeking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, codec: str, options: dict, decoder: str | None
) -> None:
    path = encoded(tmp_path / f"long-{name}", 1200, codec, options, size=32)  # 48 seconds
    settings = DecodeSettings(frames=6, short_side=32)
    segments = [(30.5, 33.0), (36.04, 36.5), (40.0, 40.04), (44.0, None)]
    sequential = decode._pick

    def no_pass_from_the_start(*arguments: object) -> None:
        raise AssertionError("decoded from the start")

    monkeypatch.setattr(decode, "_pick", no_pass_from_the_start)
    for start, end in segments:
        assert_same_as_sequential(path, settings, decoder, start, end)
    assert_same_as_sequential(path, FPS, decoder, 31.0, 35.0)
    if decoder == "pyav":
        with pytest.raises(DecodeError, match="from the start"):  # near enough to decode up to it
            decode_clip(path, settings, 10.0, 12.0)
    monkeypatch.setattr(decode, "_pick", sequential)
    assert_same_as_sequential(path, settings, decoder, 10.0, 12.0)


@pytest.mark.parametrize("landing", [1, 500])
def test_seek_that_lands_elsewhere_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, landing: int
) -> None:
    """Key frames in the wrong places, as a damaged index gives: the pass from the start takes over."""
    path = encoded(tmp_path / "long.mp4", 1000, "libx264", {"x264-params": "keyint=50:bframes=3"}, size=32)
    probe = decode._probe

    def misled(name: str) -> decode._Video:
        found = probe(name)
        return replace(found, keys=(0, *(key + landing for key in found.keys)))

    monkeypatch.setattr(decode, "_probe", misled)
    assert_same_as_sequential(path, DecodeSettings(frames=6, short_side=32), "pyav", 33.0, 36.0)


def test_file_that_changed_is_looked_at_again(tmp_path: Path) -> None:
    path = video(tmp_path / "c.mp4", 48)
    assert decode_clip(path, sixteen(8)).times[-1] > 3
    video(path, 24)
    assert decode_clip(path, sixteen(8)).times[-1] < 2


def test_decoding_ends_behind_the_segment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = encoded(tmp_path / "c.mp4", 60, "libx264", {"x264-params": "keyint=12:bframes=2"})
    seen = []
    frame_time = decode._frame_time
    monkeypatch.setattr(decode, "_frame_time", lambda *given: seen.append(given[1]) or frame_time(*given))
    assert_same_as_sequential(path, sixteen(4), "pyav", 0.4, 0.8)
    assert seen == list(range(max(seen) + 1))
    assert 18 <= max(seen) < 20


def test_segment_that_the_video_cannot_give(tmp_path: Path) -> None:
    for path in (
        video(tmp_path / "c.mp4", 48),  # 4 seconds, 12 frames a second
        encoded(tmp_path / "b.avi", 48, "mpeg4", {}, rate=12),
    ):
        with pytest.raises(DecodeError, match=r"segment from 5 to 9 s: the video lasts 4\.00 s"):
            decode_clip(path, sixteen(), 5, 9)
        with pytest.raises(DecodeError, match=r"no frame is shown in it, frames are 0\.083 s apart"):
            decode_clip(path, sixteen(), 1.01, 1.05)
        for end, damage in ((4.0, None), (4.08, None), (4.5, "the segment ends at 4.5 s, the video at 4.00 s")):
            clip = decode_clip(path, sixteen(), 3, end)
            assert clip.damage == damage
            assert 3 <= clip.times.min() <= clip.times.max() < 4
    for start, end in ((-1, 2), (2, 2), (3, 1), (float("nan"), 2), (1, float("nan"))):
        with pytest.raises(ValueError, match="0 <= start < end"):
            decode_clip(path, sixteen(), start, end)


def test_frames_a_second_follow_the_segment(tmp_path: Path) -> None:
    path = video(tmp_path / "c.mp4", 48)
    assert len(decode_clip(path, FPS).frames) == 16
    assert len(decode_clip(path, FPS, 1, 2).frames) == 4
    assert len(decode_clip(path, FPS, 1, 1.3).frames) == 2


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_short_clips_repeat_frames(tmp_path: Path, frames: int) -> None:
    path = video(tmp_path / "c.mp4", frames)
    clip = decode_clip(path, sixteen(8))
    assert len(clip.frames) == 8
    assert len(np.unique(clip.times)) == frames
    assert_same_as_sequential(path, sixteen(8))


@pytest.mark.parametrize("suffix", [".avi", ".mkv"])
@pytest.mark.parametrize("share", [0.4, 0.6, 1.0])
def test_truncated_file_gives_its_beginning_and_says_so(tmp_path: Path, suffix: str, share: float) -> None:
    whole = video(tmp_path / f"whole{suffix}", 60, codec="mpeg4")
    cut = truncated(tmp_path / f"cut{suffix}", whole, share)
    clip = decode_clip(cut, sixteen(8))
    assert clip.frames.shape == (8, 64, 64, 3)
    assert clip.times[-1] < 5 * share
    assert (clip.damage is not None) == (share < 1)
    assert clip.damage is None or clip.damage.startswith(("the file ends after", "decoding stops after"))
    assert decode_clip(cut, sixteen(8), 0.0, 1.0).damage is None  # all of this part is there


def test_file_without_frames_is_an_error_with_path_and_reason(tmp_path: Path) -> None:
    for path in (
        text_as_video(tmp_path / "text.mp4"),
        truncated(tmp_path / "cut.mp4", video(tmp_path / "whole.mp4"), 0.6),
        tmp_path / "missing.mp4",
        tmp_path,
    ):
        with pytest.raises(DecodeError, match="PyAV: ") as caught:
            decode_clip(path, sixteen(8))
        assert str(path) in str(caught.value)
        again = pickle.loads(pickle.dumps(caught.value))  # worker processes send it so
        assert str(again) == str(caught.value)


def test_file_that_both_decoders_refuse_names_both_reasons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("no")

    path = video(tmp_path / "c.mp4", 48)
    monkeypatch.setattr("vidcls.sharding.decode.decord.VideoReader", lambda *_, **__: refuse())
    assert_same_as_sequential(path, sixteen(8), "pyav")
    monkeypatch.setattr("vidcls.sharding.decode._pick", refuse)
    with pytest.raises(DecodeError, match=r"decord: no; PyAV: no"):
        decode_clip(path, sixteen(8))


def test_sound_without_pictures_is_an_error(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "sound.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        stream.layout = "mono"
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    with pytest.raises(DecodeError, match="no video stream"):
        decode_clip(tmp_path / "sound.mkv", sixteen(8))


def small_file_with_large_frames(path: Path, codec: str) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 16384, 8192, "yuv420p" if codec == "libx264" else "yuvj420p"
        container.start_encoding()
        packet = av.Packet(bytes(100))
        packet.stream, packet.pts, packet.dts, packet.time_base = stream, 0, 0, Fraction(1, 10)
        container.mux(packet)
    return path


def test_frames_too_large_to_decode_or_to_store_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, codec in (("a.mp4", "libx264"), ("b.mkv", "mjpeg")):
        with pytest.raises(DecodeError, match=rf"{name}: .*frames of .*more than 67108864 pixels"):
            decode_clip(small_file_with_large_frames(tmp_path / name, codec), sixteen())
    plain = video(tmp_path / "c.mp4", 48)
    monkeypatch.setattr(decode, "MAX_VIDEO_PIXELS", 64 * 64 - 1)
    with pytest.raises(DecodeError, match="frames of 64x64 are more than 4095 pixels"):
        decode_clip(plain, sixteen())
    monkeypatch.setattr(decode, "MAX_VIDEO_PIXELS", 64 * 64)
    monkeypatch.setattr(decode, "MAX_PIXELS", 64 * 64 - 1)
    with pytest.raises(DecodeError, match="would be stored as 64x64"):
        decode_clip(plain, sixteen())


def test_only_one_frame_is_held_at_its_original_size(tmp_path: Path) -> None:
    """40 frames of 1920x1080 are 249 MB; a fresh process decodes them to 64x36 within much less."""
    path = tmp_path / "wide.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 1920, 1080, "yuv420p"
        for number in range(64):
            frame = av.VideoFrame.from_ndarray(np.full((1620, 1920), number, np.uint8), format="yuv420p")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    code = (
        "import resource, sys; from vidcls.sharding.decode import decode_clip as d; from vidcls.data.settings import "
        "DecodeSettings as S; peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024; "
        "before = peak(); print(d(sys.argv[1], S(frames=40, short_side=36)).decoder, peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True, timeout=60)
    decoder, megabytes = done.stdout.split()
    assert decoder == "pyav"
    assert int(megabytes) < 120


def odd_clips(real_data: Path) -> list[Path]:
    folders = (real_data / "ssv2" / "videos", real_data / "clips")
    found = [path for folder in folders for path in sorted(folder.iterdir()) if "corrupt" not in path.name]
    assert len(found) == 18
    return found


@pytest.mark.real
def test_every_real_clip_is_decoded_as_a_sequential_pass_does(real_data: Path) -> None:
    ucf101 = sorted((real_data / "ucf101" / "videos").glob("*/*"))[::8]
    assert len(ucf101) == 19
    for path in ucf101 + odd_clips(real_data):
        assert_same_as_sequential(path, DecodeSettings())


@pytest.mark.real
def test_every_container_at_a_frame_rate_and_in_segments(real_data: Path) -> None:
    settings = DecodeSettings(frames=None, fps=4, max_frames=64, short_side=None, max_pixels=128 * 28 * 28)
    for path in odd_clips(real_data):
        assert_same_as_sequential(path, settings)
        if "video_90" not in path.name:  # 3 frames
            assert_same_as_sequential(path, DecodeSettings(frames=5), start=0.5, end=1.25)


@pytest.mark.real
def test_seeking_in_real_clips(real_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if they were long; where there are too few key frames the pass from the start is what answers."""
    monkeypatch.setattr(decode, "SEEK_AFTER", 0.5)
    sought = []
    seek = decode._pick_by_seeking
    monkeypatch.setattr(decode, "_pick_by_seeking", lambda *given: sought.append(seek(*given)) or sought[-1])
    monkeypatch.setattr("vidcls.sharding.decode.decord.VideoReader", None)
    for name in ("abseiling_k400.mp4", "flipping_a_pancake.mkv", "decord_video_90.mov"):
        for start in (1.0, 3.0, 6.0, 8.0):
            with av.open(str(real_data / "clips" / name)) as container:
                lasts = float(container.duration / av.time_base)
            if start + 1 < lasts:
                assert_same_as_sequential(
                    real_data / "clips" / name, DecodeSettings(frames=4), "pyav", start, start + 1
                )
    assert sum(picked is not None for picked in sought) >= 2


@pytest.mark.real
def test_real_odd_files(real_data: Path) -> None:
    clips = real_data / "clips"
    corrupted = decode_clip(clips / "decord_corrupted.mp4", DecodeSettings())
    assert corrupted.decoder == "pyav"
    assert corrupted.damage
    assert corrupted.damage.startswith("decoding stops after 28 frames")
    with pytest.raises(DecodeError, match=r"the video lasts .*; decoding stops after 28 frames"):
        decode_clip(clips / "decord_corrupted.mp4", DecodeSettings(), start=corrupted.times[-1] + 2)
    rotated = decode_clip(clips / "decord_video_90.mov", DecodeSettings(frames=3))
    assert rotated.decoder == "pyav"
    assert rotated.original_size == (320, 568)  # stored as 568x320
    assert rotated.frames.shape == (3, 228, 128, 3)


def test_resize_is_pillows_bicubic() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 20, 30, 3), dtype=np.uint8)
    assert resize_frames(frames, (20, 30)) is frames
    resized = resize_frames(frames, (10, 16))
    expected = Image.fromarray(frames[1]).resize((16, 10), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(resized[1], np.asarray(expected))


def test_workers_do_not_pay_for_torch() -> None:
    code = "import sys, vidcls.data.codecs, vidcls.sharding.decode; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "False"
