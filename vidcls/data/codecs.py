"""Frames <-> the bytes they are stored as: jpg, webp, png, or raw (npy).

Shapes: T frames, H height, W width; frames are uint8 RGB [T, H, W, 3].

Reading is strict: only what encode_frames writes is taken, and sizes are checked in the header, before anything is
decoded, so that a small file cannot ask for much memory. Damage is noticed as far as the format can tell: png has
checksums, in jpg most of it breaks the bit stream, webp and raw notice only wrong headers and wrong lengths.
"""

import io
import struct
import zlib
from collections.abc import Callable, Sequence

import numpy as np
import simplejpeg
from numpy.lib import format as npy
from PIL import Image

from vidcls.data.settings import MAX_PIXELS, SUFFIXES, DecodeSettings

PNG_LEVEL = 6  # of zlib: 9 takes several times as long for about a percent
WEBP_METHOD = 4  # effort, 0 to 6; 4 is libwebp's own choice
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_RGB = (8, 2, 0, 0, 0)  # bits, colour type RGB, compression, filter, not interlaced
JPEG_END = b"\xff\xd9"


class FrameError(ValueError):
    """A stored frame that is not what it should be, or a frame that cannot be stored."""


def encode_frames(frames: np.ndarray, settings: DecodeSettings) -> list[bytes]:
    """The bytes of each frame of [T, H, W, 3] in settings.codec; the same frames give the same bytes.

    FrameError names the frame that the codec does not take (webp: sides of at most 16383 pixels).
    """
    assert frames.dtype == np.uint8, frames.dtype
    assert frames.ndim == 4, frames.shape
    assert frames.shape[3] == 3, frames.shape
    encode = _ENCODERS[settings.codec]
    stored = []
    for index, frame in enumerate(frames):
        try:
            stored.append(encode(np.ascontiguousarray(frame), settings.quality))
        except (ValueError, OSError) as error:
            raise FrameError(f"frame {index}: {_first_line(error)}") from error
    return stored


def decode_frames(
    stored: Sequence[bytes], codec: str, height: int, width: int, out: np.ndarray | None = None
) -> np.ndarray:
    """uint8 [T, height, width, 3]. FrameError names the frame that is damaged, of another size or another format.

    out: contiguous uint8 [T, height, width, 3] to decode into; its contents are undefined after an error.
    """
    _check_codec(codec)
    if not stored:
        raise FrameError("no frames")
    for index, data in enumerate(stored):
        try:
            found = frame_size(data, codec)
        except FrameError as error:
            raise FrameError(f"frame {index}: {error}") from error
        if found != (height, width):
            raise FrameError(f"frame {index}: is {found[1]}x{found[0]} pixels, must be {width}x{height}")
    decode = _DECODERS[codec]
    frames = np.empty((len(stored), height, width, 3), dtype=np.uint8) if out is None else out
    assert frames.shape == (len(stored), height, width, 3), frames.shape
    for index, data in enumerate(stored):
        try:
            decode(data, frames[index])
        except (ValueError, OSError, SyntaxError) as error:  # Pillow's PNG reader raises SyntaxError
            raise FrameError(f"frame {index}: {_first_line(error)}") from error
    return frames


def resize_frames(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[T, H, W, 3] -> [T, *size, 3], size = (height, width), bicubic; the input itself where it fits already."""
    if frames.shape[1:3] == size:
        return frames
    height, width = size
    resized = [Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC) for frame in frames]
    return np.stack([np.asarray(image) for image in resized])


def frame_size(stored: bytes, codec: str) -> tuple[int, int]:
    """(height, width) from the header; nothing is decoded.

    FrameError if this is not a frame as encode_frames writes it, is not all there, or has more than MAX_PIXELS pixels.
    """
    _check_codec(codec)
    try:
        height, width = _HEADERS[codec](stored)
    except FrameError as error:
        raise FrameError(f"{codec}: {error}") from error
    except (ValueError, struct.error) as error:  # what simplejpeg, NumPy and short data raise
        raise FrameError(f"{codec}: damaged header: {_first_line(error)}") from error
    if height < 1 or width < 1 or height * width > MAX_PIXELS:
        raise FrameError(f"{codec}: is {width}x{height} pixels, must be at least 1 and at most {MAX_PIXELS} in all")
    return height, width


def _check_codec(codec: str) -> None:
    if codec not in SUFFIXES:
        raise ValueError(f"codec = {codec!r}: must be one of {', '.join(SUFFIXES)}")


def _encode_jpeg(frame: np.ndarray, quality: int | None) -> bytes:
    return simplejpeg.encode_jpeg(frame, quality=quality, colorspace="RGB", colorsubsampling="420")


def _jpeg_size(stored: bytes) -> tuple[int, int]:
    height, width, colours, _ = simplejpeg.decode_jpeg_header(stored, strict=True)
    if colours != "YCbCr":
        raise FrameError(f"colours are {colours}, must be YCbCr")
    if not stored.endswith(JPEG_END):
        raise FrameError("is cut short, or something follows its end")
    return height, width


def _decode_jpeg(stored: bytes, out: np.ndarray) -> None:
    simplejpeg.decode_jpeg(stored, colorspace="RGB", strict=True, buffer=out)


def _encode_webp(frame: np.ndarray, quality: int | None) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "WEBP", quality=quality, method=WEBP_METHOD)
    return buffer.getvalue()


def _webp_size(stored: bytes) -> tuple[int, int]:
    """Of a plain lossy file: one VP8 chunk. Animation, transparency and metadata need other chunks."""
    riff, length, kind, chunk, size = struct.unpack_from("<4sI4s4sI", stored)
    if (riff, kind) != (b"RIFF", b"WEBP"):
        raise FrameError("is another format")
    if chunk != b"VP8 ":
        raise FrameError(f"holds {chunk!r}, must be one plain lossy picture")
    if length != len(stored) - 8 or size + size % 2 != len(stored) - 20:
        raise FrameError("is cut short, or something follows its end")
    tag, start, width, height = struct.unpack_from("<3s3sHH", stored, 20)
    if tag[0] & 1 or start != b"\x9d\x01\x2a":
        raise FrameError("does not begin with a key frame")
    return height & 0x3FFF, width & 0x3FFF  # the two upper bits ask for upscaling, which decoders ignore


def _encode_png(frame: np.ndarray, quality: int | None) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "PNG", compress_level=PNG_LEVEL)
    return buffer.getvalue()


def _png_size(stored: bytes) -> tuple[int, int]:
    """Walks the chunks: IHDR, IDAT..., IEND and nothing else (no text, no animation), each with its checksum.

    Pillow skips the checksums of IDAT, the pixels.
    """
    if not stored.startswith(PNG_SIGNATURE):
        raise FrameError("is another format")
    kinds, position = [], len(PNG_SIGNATURE)
    while position < len(stored):
        length, kind = struct.unpack_from(">I4s", stored, position)
        end = position + 8 + length
        (checksum,) = struct.unpack_from(">I", stored, end)
        if zlib.crc32(stored[position + 4 : end]) != checksum:
            raise FrameError(f"chunk {kind!r} at byte {position} is damaged")
        kinds.append(kind)
        position = end + 4
    if len(kinds) < 3 or kinds != [b"IHDR", *[b"IDAT"] * (len(kinds) - 2), b"IEND"]:
        raise FrameError("must be made of the chunks IHDR, IDAT, IEND alone")
    width, height, *form = struct.unpack_from(">IIBBBBB", stored, 16)
    if tuple(form) != PNG_RGB:
        raise FrameError("must be RGB of 8 bits, not interlaced")
    return height, width


def _decode_with_pillow(stored: bytes, out: np.ndarray) -> None:
    with Image.open(io.BytesIO(stored), formats=("WEBP", "PNG")) as image:
        if image.mode != "RGB" or image.size != (out.shape[1], out.shape[0]):
            raise FrameError(f"decodes to {image.mode} of {image.width}x{image.height}")
        out[:] = np.asarray(image)


def _encode_raw(frame: np.ndarray, quality: int | None) -> bytes:
    buffer = io.BytesIO()
    npy.write_array(buffer, frame, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def _raw_size(stored: bytes) -> tuple[int, int]:
    buffer = io.BytesIO(stored)
    version = npy.read_magic(buffer)
    if version != (1, 0):
        raise FrameError(f"is npy version {version[0]}.{version[1]}, must be 1.0")
    try:
        shape, fortran, dtype = npy.read_array_header_1_0(buffer)
    except Exception as error:  # NumPy reads the header as a Python literal: a damaged one raises what the parser likes
        raise FrameError(f"has no npy header: {_first_line(error)}") from error
    if fortran or dtype != np.uint8 or len(shape) != 3 or shape[2] != 3:
        order = "Fortran" if fortran else "C"
        raise FrameError(f"holds {dtype} {list(shape)} in {order} order, must be uint8 [H, W, 3] in C order")
    if len(stored) - buffer.tell() != shape[0] * shape[1] * 3:
        raise FrameError(f"has {len(stored) - buffer.tell()} bytes of pixels, needs {shape[0] * shape[1] * 3}")
    return shape[0], shape[1]


def _decode_raw(stored: bytes, out: np.ndarray) -> None:
    out[:] = np.frombuffer(stored, dtype=np.uint8, offset=len(stored) - out.size).reshape(out.shape)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


_ENCODERS: dict[str, Callable[[np.ndarray, int | None], bytes]] = {
    "jpg": _encode_jpeg,
    "webp": _encode_webp,
    "png": _encode_png,
    "raw": _encode_raw,
}
_HEADERS: dict[str, Callable[[bytes], tuple[int, int]]] = {
    "jpg": _jpeg_size,
    "webp": _webp_size,
    "png": _png_size,
    "raw": _raw_size,
}
_DECODERS: dict[str, Callable[[bytes, np.ndarray], None]] = {
    "jpg": _decode_jpeg,
    "webp": _decode_with_pillow,
    "png": _decode_with_pillow,
    "raw": _decode_raw,
}
