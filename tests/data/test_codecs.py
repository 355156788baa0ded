import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from tests.support.clips import sequential_decode, video
from vidcls.data import codecs
from vidcls.data.codecs import FrameError, decode_frames, encode_frames, frame_size
from vidcls.data.settings import SUFFIXES, DecodeSettings


def settings(codec: str) -> DecodeSettings:
    return DecodeSettings(codec=codec, quality=90 if codec in ("jpg", "webp") else None)


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """[3, 64, 46, 3]: smooth, as pictures are."""
    shown, _ = sequential_decode(video(tmp_path_factory.mktemp("codecs") / "c.mp4", 3))
    return np.ascontiguousarray(shown[:, :, 5:51])


def independent(codec: str, data: bytes) -> np.ndarray:
    if codec == "raw":
        return np.load(io.BytesIO(data), allow_pickle=False)
    image = Image.open(io.BytesIO(data))
    assert image.format == {"jpg": "JPEG", "webp": "WEBP", "png": "PNG"}[codec]
    return np.asarray(image)


@pytest.mark.parametrize("codec", SUFFIXES)
def test_frames_come_back_and_any_reader_takes_them(frames: np.ndarray, codec: str) -> None:
    stored = encode_frames(frames, settings(codec))
    assert stored == encode_frames(frames.copy(), settings(codec))
    decoded = decode_frames(stored, codec, 64, 46)
    assert decoded.shape == frames.shape
    assert decoded.dtype == np.uint8
    for frame, data, ours in zip(frames, stored, decoded, strict=True):
        assert frame_size(data, codec) == (64, 46)
        theirs = independent(codec, data)
        assert theirs.shape == frame.shape
        assert np.abs(theirs.astype(int) - ours).max() <= 2  # two JPEG decoders round the chroma otherwise
        if codec in ("png", "raw"):
            np.testing.assert_array_equal(ours, frame)
        else:
            assert np.abs(frame.astype(int) - ours).mean() < 8


@pytest.mark.parametrize("codec", ["jpg", "webp"])
def test_quality_is_passed_on(frames: np.ndarray, codec: str) -> None:
    sizes = [len(encode_frames(frames[:1], DecodeSettings(codec=codec, quality=q))[0]) for q in (10, 50, 95)]
    assert sizes[0] < sizes[1] < sizes[2]


def test_frames_that_are_views_are_stored_as_they_look(frames: np.ndarray) -> None:
    for codec in SUFFIXES:
        turned = encode_frames(frames[:, ::-1, ::-1], settings(codec))
        assert turned == encode_frames(np.ascontiguousarray(frames[:, ::-1, ::-1]), settings(codec))


@pytest.mark.parametrize("codec", SUFFIXES)
def test_wrong_frames_are_named_with_the_reason(frames: np.ndarray, codec: str) -> None:
    good = encode_frames(frames, settings(codec))
    wide = encode_frames(np.zeros((1, 32, 48, 3), np.uint8), settings(codec))[0]
    wrong = {
        "cut": good[1][:-20],
        "longer": good[1] + b"\0" * 8,
        "empty": b"",
        "text": b"this is not a picture\n" * 20,
        "start alone": good[1][:30],
    }
    for name, data in wrong.items():
        with pytest.raises(FrameError, match=r"^frame 1: "):
            pytest.fail(f"{codec}: {name}: {decode_frames([good[0], data, good[2]], codec, 64, 46).shape}")
    with pytest.raises(FrameError, match=r"^frame 2: is 48x32 pixels, must be 46x64"):
        decode_frames([good[0], good[1], wide], codec, 64, 46)
    with pytest.raises(FrameError, match="no frames"):
        decode_frames([], codec, 64, 46)
    for other in SUFFIXES:
        if other != codec:
            with pytest.raises(FrameError, match=f"^frame 0: {other}: "):
                decode_frames(good, other, 64, 46)


def test_unknown_codec_is_an_error() -> None:
    for call in (lambda: decode_frames([b""], "gif", 1, 1), lambda: frame_size(b"", "gif")):
        with pytest.raises(ValueError, match="codec = 'gif': must be one of jpg, webp, png, raw"):
            call()


def bomb(codec: str, good: bytes, height: int, width: int) -> bytes:
    """A small file whose header promises height x width pixels."""
    data = bytearray(good)
    if codec == "png":
        data[16:24] = struct.pack(">II", width, height)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    elif codec == "webp":
        data[26:30] = struct.pack("<HH", width, height)
    elif codec == "jpg":
        start = data.index(b"\xff\xc0")
        data[start + 5 : start + 9] = struct.pack(">HH", height, width)
    else:
        shape = b"(64, 46, 3), }"
        at = data.index(shape)
        new = f"({height}, {width}, 3), }}".encode()
        data[at : at + len(new)] = new
    return bytes(data)


@pytest.mark.parametrize("codec", SUFFIXES)
def test_sizes_are_refused_before_anything_is_decoded(
    frames: np.ndarray, codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = encode_frames(frames, settings(codec))[0]
    huge = bomb(codec, good, 16000, 16000)
    larger = bomb(codec, good, 64, 48)

    def decoded(*_: object) -> None:
        raise AssertionError("was decoded")

    monkeypatch.setitem(codecs._DECODERS, codec, decoded)
    with pytest.raises(FrameError, match="16000x16000 pixels" if codec != "raw" else "bytes of pixels, needs"):
        decode_frames([huge], codec, 16000, 16000)
    with pytest.raises(FrameError, match="is 48x64 pixels, must be 46x64" if codec != "raw" else "bytes of pixels"):
        decode_frames([larger], codec, 64, 46)
    with pytest.raises(AssertionError, match="was decoded"):
        decode_frames([good], codec, 64, 46)


@pytest.mark.parametrize("codec", ["jpg", "webp", "png"])
def test_header_that_promises_more_than_there_is(frames: np.ndarray, codec: str) -> None:
    lying = bomb(codec, encode_frames(frames, settings(codec))[0], 640, 460)
    assert frame_size(lying, codec) == (640, 460)
    with pytest.raises(FrameError, match=r"^frame 0: "):
        decode_frames([lying], codec, 640, 460)


def saved(kind: str, image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_pictures_of_another_kind_are_refused(frames: np.ndarray) -> None:
    plain = Image.fromarray(frames[0])
    notes = PngImagePlugin.PngInfo()
    notes.add_text("comment", "x" * 100, zip=True)
    animation: dict = {"save_all": True, "append_images": [Image.fromarray(frames[1])]}
    for codec, reason, data in [
        ("png", "8 bits", saved("PNG", plain.convert("L"))),
        ("png", "8 bits", saved("PNG", plain.convert("RGBA"))),
        ("png", "IHDR, IDAT, IEND", saved("PNG", plain.convert("P"))),
        ("png", "IHDR, IDAT, IEND", saved("PNG", plain, pnginfo=notes)),
        ("png", "IHDR, IDAT, IEND", saved("PNG", plain, **animation)),
        ("webp", "plain lossy", saved("WEBP", plain, **animation)),
        ("webp", "plain lossy", saved("WEBP", plain, lossless=True)),
        ("webp", "plain lossy", saved("WEBP", plain, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0")),
        ("webp", "plain lossy", saved("WEBP", Image.fromarray(np.full((64, 46, 4), 9, np.uint8), "RGBA"))),
        ("jpg", "colours are Gray", saved("JPEG", plain.convert("L"))),
        ("jpg", "colours are CMYK", saved("JPEG", plain.convert("CMYK"))),
    ]:
        with pytest.raises(FrameError, match=f"frame 0: {codec}: .*{reason}"):
            decode_frames([data], codec, 64, 46)


class Trap:
    """Unpickled, it would raise."""

    def __reduce__(self) -> tuple:
        return pytest.fail, ("was unpickled",)


def npy(array: np.ndarray, version: tuple[int, int] | None = None) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=version)
    return buffer.getvalue()


def test_arrays_of_another_kind_are_refused(frames: np.ndarray) -> None:
    frame = frames[0]
    for reason, data in [
        ("holds object", npy(np.array([[[Trap()] * 3]], dtype=object))),
        ("holds float32", npy(frame.astype(np.float32))),
        ("holds int8", npy(frame.astype(np.int8))),
        (r"holds uint8 \[64, 46\]", npy(frame[:, :, 0].copy())),
        (r"holds uint8 \[64, 46, 4\]", npy(np.zeros((64, 46, 4), np.uint8))),
        (r"holds uint8 \[3, 64, 46, 3\]", npy(frames)),
        ("in Fortran order", npy(np.asfortranarray(frame))),
        ("npy version 2.0", npy(frame, (2, 0))),
        ("has no npy header", npy(frame).replace(b"'descr'", b"__impo'")),
        ("bytes of pixels", npy(frame).replace(b"(64, 46, 3)", b"(-4, 46, 3)")),
    ]:
        with pytest.raises(FrameError, match=f"frame 0: raw: .*{reason}"):
            decode_frames([data], "raw", 64, 46)


def test_flipped_bytes_of_png_never_pass(frames: np.ndarray) -> None:
    good = encode_frames(frames[:1], settings("png"))[0]
    for position in range(0, len(good), 7):
        flipped = bytearray(good)
        flipped[position] ^= 0x10
        with pytest.raises(FrameError):
            pytest.fail(f"byte {position}: {decode_frames([bytes(flipped)], 'png', 64, 46).shape}")


def test_end_marker_within_a_jpeg_is_noticed(frames: np.ndarray) -> None:
    good = encode_frames(frames[:1], settings("jpg"))[0]
    middle = len(good) * 2 // 3
    with pytest.raises(FrameError, match=r"^frame 0: "):
        decode_frames([good[:middle] + b"\xff\xd9" + good[middle + 2 :]], "jpg", 64, 46)


@pytest.mark.parametrize("codec", SUFFIXES)
@budget(max_examples=150, deadline=None)
@given(damage=st.lists(st.tuples(st.integers(0, 400), st.binary(min_size=1, max_size=3)), min_size=1, max_size=3))
def test_damage_is_a_frame_error_or_frames_of_the_size(codec: str, damage: list[tuple[int, bytes]]) -> None:
    """Whatever is written over the first bytes, where headers are: never another exception, never another shape."""
    data = bytearray(encode_frames(np.arange(16 * 16 * 3, dtype=np.uint8).reshape(1, 16, 16, 3), settings(codec))[0])
    for position, replacement in damage:
        at = position % len(data)
        data[at : at + len(replacement)] = replacement
    with contextlib.suppress(FrameError):
        assert decode_frames([bytes(data)], codec, 16, 16).shape == (1, 16, 16, 3)


def test_frame_that_the_codec_cannot_hold_is_named() -> None:
    with pytest.raises(FrameError, match="frame 0: "):
        encode_frames(np.zeros((1, 2, 16384, 3), np.uint8), settings("webp"))
