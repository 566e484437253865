"""Pictures: equal to the reference at odd sizes; one clear line for everything unusable."""

import base64
import io
import os
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from pathlib import Path
from urllib.parse import quote, quote_from_bytes

import pytest
import torch
from conftest import preprocess, refusal
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers.image_transforms import convert_to_rgb

from model import image as reading
from model.image import STRIP, ImageSettings, as_list, crop_note, read_image, with_mode
from tests.seeds import torch_random

SETTINGS = ImageSettings(size=56)


def noise(width, height, mode="RGB", seed=0):
    size = width * height * len(Image.new(mode, (1, 1)).getbands())
    data = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch_random(seed))
    return Image.frombytes(mode, (width, height), bytes(data.tolist()))


def full_resize_then_crop(image, settings):
    """The order of the reference: resize the whole picture, then crop the middle."""
    size, short = settings.size, min(image.size)
    wide, high = (int(size * side / short) for side in image.size)
    image = image.resize((wide, high), Image.Resampling.BICUBIC)
    left, top = (wide - size) // 2, (high - size) // 2
    image = image.crop((left, top, left + size, top + size))
    pixels = torch.tensor(list(image.tobytes()), dtype=torch.float64).view(size, size, 3) / 255
    return ((pixels - torch.tensor(settings.mean)) / torch.tensor(settings.std)).permute(2, 0, 1)


@pytest.mark.parametrize(
    "size", [(1, 1), (56, 56), (57, 56), (55, 90), (300, 7), (7, 300), (1000, 61), (224, 448), (2, 900)]
)
def test_a_picture_is_resized_and_cropped_as_the_reference_does(size):
    strip = max(size) > STRIP * min(size)  # strips are cropped before resizing: the passes run in another order, and
    image = noise(4, 4).resize(size) if strip else noise(*size)  # overshoots of noise would be clipped at another time
    got, want = preprocess(image, SETTINGS), full_resize_then_crop(image, SETTINGS)
    off = (got - want).abs() * torch.tensor(SETTINGS.std)[:, None, None] * 255  # in steps of 8 bits
    assert off.max() < (1.01 if strip else 1e-3)


def test_extreme_strip_needs_no_extreme_memory():
    pixels = preprocess(noise(10000, 3), SETTINGS)
    assert pixels.shape == (3, 56, 56) and pixels.isfinite().all()
    assert "--image-mode crop" in refusal(preprocess, Image.new("RGB", (40000, 1)), with_mode(SETTINGS, "pad"))


def test_a_note_says_how_cmyk_is_converted():
    assert "CMYK" in read_image(packed(noise(20, 10, "CMYK"), "TIFF")).note


# ---------------------------------------------------------------- transparency


def packed(image, kind="PNG", **options):
    """Bytes of a picture file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_transparent_pixels_are_shown_on_white():
    image = Image.new("RGBA", (4, 4), (10, 200, 30, 0))
    image.putpixel((1, 0), (0, 100, 255, 51))  # 20 % opaque
    image.putpixel((2, 0), (10, 200, 30, 255))
    picture = read_image(packed(image))
    assert [picture.image.getpixel((x, 0)) for x in range(3)] == [(255, 255, 255), (204, 224, 255), (10, 200, 30)]
    assert "transparent" in picture.note and "white" in picture.note
    assert "everywhere" in read_image(Image.new("RGBA", (4, 4), (10, 200, 30, 0))).note


TRANSPARENT = {
    "RGBA": lambda: packed(noise(13, 9, "RGBA")),
    "LA": lambda: packed(noise(13, 9, "LA")),
    "PA": lambda: packed(noise(13, 9, "RGBA").convert("PA"), "TIFF"),
    "RGBA tiff": lambda: packed(noise(13, 9, "RGBA"), "TIFF"),
    "RGBA webp": lambda: packed(noise(13, 9, "RGBA"), "WEBP", lossless=True),
    "P, a level each": lambda: packed(noise(13, 9).convert("P"), transparency=bytes(range(255))),
    "P, one colour": lambda: packed(Image.linear_gradient("L").convert("P"), transparency=3),
    "L, one level": lambda: packed(Image.linear_gradient("L"), transparency=5),
    "RGB, one colour": lambda: packed(Image.new("RGB", (13, 9), (1, 2, 3)), transparency=(1, 2, 3)),
    "GIF": lambda: packed(Image.new("P", (13, 9), 3), "GIF", transparency=3),
}


@pytest.mark.parametrize("what", TRANSPARENT)
def test_transparency_of_every_kind_is_that_of_transformers(what):
    data = TRANSPARENT[what]()
    picture, want = read_image(data), convert_to_rgb(Image.open(io.BytesIO(data)), return_numpy=True)
    assert picture.image.tobytes() == want.tobytes() and "white" in picture.note


def png_of(kind, bits, rows, transparent):
    """PNG of packed rows of bytes, as wide as their pixels; Pillow cannot write such files."""
    channels, tail = {0: 1, 2: 3}[kind], b"".join(struct.pack(">H", v) for v in transparent)
    head = struct.pack(">IIBBBBB", len(rows[0]) * 8 // bits // channels, len(rows), bits, kind, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = [(b"IHDR", head), *([(b"tRNS", tail)] if tail else []), (b"IDAT", data), (b"IEND", b"")]
    packed_chunks = [
        struct.pack(">I", len(d)) + name + d + struct.pack(">I", zlib.crc32(name + d)) for name, d in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed_chunks)


@pytest.mark.parametrize(
    ("bits", "row", "clear", "wanted"),
    [(1, 0b01000000, 0, [255] * 8), (1, 0b01000000, 1, [0, 255] + [0] * 6), (2, 0b00011011, 1, [0, 255, 170, 255]),
     (2, 0b00011011, 2, [0, 85, 255, 255]), (4, 0x5A, 5, [255, 170]), (4, 0x5A, 10, [85, 255]), (8, 5, 5, [255])],
)  # fmt: skip
def test_a_transparent_level_of_few_bits_is_white(bits, row, clear, wanted):
    data = png_of(0, bits, [bytes([row])], [clear])
    image = Image.open(io.BytesIO(data))
    for source in (data, image, image):  # reading again gives the same
        picture = read_image(source)
        assert list(picture.image.getchannel("R").tobytes()) == wanted and "white" in picture.note


def test_colours_of_16_bits_are_noted_and_refused_with_a_transparent_one():
    row = struct.pack(">6H", 256, 512, 768, 257, 513, 769)
    sgi = struct.pack(">hBBHHHH", 474, 0, 2, 3, 2, 1, 3).ljust(512, b"\0")  # stored by channel
    files = {"PNG": png_of(2, 16, [row], []), "SGI": sgi + struct.pack(">6H", 256, 257, 512, 513, 768, 769)}
    for kind, data in files.items():
        picture = read_image(data)
        assert list(picture.image.tobytes()) == [1, 2, 3, 1, 2, 3], kind
        assert "more than 8 bits reduced to 8" in picture.note, kind
    for largest, noted in ((1000, True), (100, False)):
        assert bool(read_image(b"P3 1 1 %d\n1 2 3\n" % largest).note) == noted
    data = png_of(2, 16, [row], [256, 512, 768])
    loaded = Image.open(io.BytesIO(data))
    loaded.load()
    for source in (data, loaded, png_of(2, 16, [row], [1, 2, 3])):
        assert "transparent colour of 16 bits" in refusal(read_image, source)


@pytest.mark.parametrize("kind", ["LA", "RGBA"])
def test_colours_times_alpha_are_shown_on_white_too(kind):
    image = Image.new(kind, (2, 1), 128 if kind == "LA" else (128, 128, 128, 51))
    image.putalpha(51)
    got = read_image(image.convert({"LA": "La", "RGBA": "RGBa"}[kind])).image.getpixel((0, 0))
    assert all(abs(v - 230) <= 1 for v in got)  # 0.2 * 128 + 0.8 * 255, rounded twice


@pytest.mark.parametrize("kind", ["RGBA", "LA"])
def test_opaque_alpha_is_not_worth_a_note(kind):
    image = noise(5, 6, kind)
    image.putalpha(255)
    picture = read_image(packed(image))
    assert picture.note is None and picture.image.tobytes() == image.convert("RGB").tobytes()


# ---------------------------------------------------------------- more than 8 bits


RAMP = bytes(range(256))  # the 8-bit values, 16 x 16


def grey(values, mode="I"):
    """16 x 16 picture from 256 numbers."""
    order, kind = (">" if mode == "I;16B" else "<"), ("i" if mode == "I" else "H")
    return Image.frombytes(mode, (16, 16), struct.pack(f"{order}256{kind}", *values))


def with_tag(data, tag, value):
    """TIFF file (little-endian) with one tag, a short number, replaced."""
    place = data.index(struct.pack("<HHI", tag, 3, 1)) + 8
    return data[:place] + struct.pack("<H", value) + data[place + 2 :]


DEEP = {  # each shows RAMP
    "16-bit png": lambda: packed(grey([257 * v for v in RAMP], "I;16")),
    "16-bit tiff": lambda: packed(grey([257 * v for v in RAMP], "I;16"), "TIFF"),
    "16-bit tiff, high byte first": lambda: packed(grey([257 * v for v in RAMP], "I;16B"), "TIFF"),
    "16-bit tiff, packed": lambda: packed(grey([257 * v for v in RAMP], "I;16"), "TIFF", compression="tiff_lzw"),
    "16-bit tiff, 0 is white": lambda: with_tag(packed(grey([257 * (255 - v) for v in RAMP], "I;16"), "TIFF"), 262, 0),
    "16-bit in memory": lambda: grey([257 * v for v in RAMP], "I;16"),
    "16-bit in memory, high byte first": lambda: grey([257 * v for v in RAMP], "I;16B"),
    "16-bit pgm": lambda: b"P5 16 16 65535\n" + struct.pack(">256H", *(257 * v for v in RAMP)),
    "12-bit pgm": lambda: b"P5 16 16 4095\n" + struct.pack(">256H", *(v * 4095 // 255 for v in RAMP)),
    "16-bit jpeg 2000": lambda: packed(grey([257 * v for v in RAMP], "I;16"), "JPEG2000"),
}


@pytest.mark.parametrize("what", DEEP)
def test_deep_grey_is_what_8_bits_would_show(what):
    picture = read_image(DEEP[what]())
    got = picture.image.getchannel("R").tobytes()
    assert max(abs(a - b) for a, b in zip(got, RAMP, strict=True)) <= 1 and "-bit grey reduced" in picture.note


def test_12_bits_of_a_tiff_are_not_taken_for_16():
    """Pillow reads such files but cannot write them: 4 numbers of 12 bits, 0 half full full."""
    tags = [(256, 4), (257, 1), (258, 12), (259, 1), (262, 1), (273, 134), (277, 1), (278, 1), (279, 6)]
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    data = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    data = data.ljust(134, b"\0") + bytes([0x00, 0x08, 0x00, 0xFF, 0xFF, 0xFF])
    picture = read_image(data)
    assert picture.image.getchannel("R").tobytes() == bytes([0, 128, 255, 255]) and "12-bit" in picture.note


def test_a_transparent_level_of_16_bits_is_white():
    picture = read_image(packed(grey([257 * v for v in RAMP], "I;16"), transparency=257 * 7))
    assert list(picture.image.getchannel("R").tobytes()[5:10]) == [5, 6, 255, 8, 9]


def test_a_16_bit_picture_that_comes_out_black_says_so():
    assert "nearly black" in read_image(packed(grey([v * 4095 // 255 for v in RAMP], "I;16"), "TIFF")).note


SIGNED = with_tag(packed(Image.frombytes("L", (2, 1), bytes([1, 255])), "TIFF", tiffinfo={339: 1}), 339, 2)
UNKNOWN = {
    "floats": Image.new("F", (4, 4), 0.5),
    "tiff of floats": packed(Image.new("F", (4, 4), 0.5), "TIFF"),
    "32-bit": grey(RAMP),
    "32-bit tiff": packed(grey(RAMP), "TIFF"),
    "unsigned 32-bit tiff": with_tag(packed(grey(RAMP), "TIFF"), 339, 1),
    "signed 8-bit tiff": SIGNED,
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_numbers_of_unknown_range_are_refused(what):
    assert "unknown range" in refusal(read_image, UNKNOWN[what])


# ---------------------------------------------------------------- orientation, frames


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "MPO"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_its_exif_orientation_says(kind, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    data = packed(noise(12, 7), kind, exif=exif)
    want = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    in_memory = Image.open(io.BytesIO(data))
    for picture in (read_image(data), read_image(in_memory)):
        assert picture.image.size == ((7, 12) if orientation > 4 else (12, 7))
        assert picture.image.tobytes() == want.tobytes()
        assert ("turned upright" in (picture.note or "")) == (orientation > 1)


def test_a_transparent_picture_is_turned_too():
    exif = Image.Exif()
    exif[274] = 6
    image = Image.new("RGBA", (3, 2), (255, 0, 0, 255))
    image.putpixel((0, 0), (0, 0, 0, 0))
    picture = read_image(packed(image, exif=exif))
    assert picture.image.size == (2, 3) and picture.image.getpixel((1, 0)) == (255, 255, 255)
    assert "turned" in picture.note and "white" in picture.note and "\n" not in picture.note


@pytest.mark.parametrize("orientation", [b"II*\0garbage", b"MM\0*" + bytes(4), b"II*\0\x08\0\0\0\xff\xff\x12\x01"])
def test_exif_data_that_cannot_be_read_leave_the_picture_as_it_is(capfd, orientation):
    data, exif = packed(noise(12, 7), "JPEG"), b"Exif\0\0" + orientation
    picture = read_image(data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:])
    assert picture.image.size == (12, 7) and picture.note is None
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_several_frames_the_first_is_used_and_said_to_be(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    picture = read_image(packed(frames[0], kind, save_all=True, append_images=frames[1:]))
    red, green, blue = picture.image.getpixel((4, 4))
    assert red > 240 and green < 20 and blue < 20 and "frame 1 of 3" in picture.note


def test_the_previews_in_an_mpo_are_no_frames():
    data = packed(noise(12, 7), "MPO", save_all=True, append_images=[noise(12, 7, seed=1)])
    assert read_image(data).note is None


# ---------------------------------------------------------------- sources of pictures


DATA = packed(noise(5, 6))
TEXT = base64.b64encode(DATA).decode()
URIS = {
    "plain": "data:image/png;base64," + TEXT,
    "upper case": "DATA:IMAGE/PNG;BASE64," + TEXT,
    "line breaks": "data:image/png;base64,\n" + "\r\n ".join(TEXT[i : i + 60] for i in range(0, len(TEXT), 60)),
    "other alphabet": "data:;base64," + TEXT.replace("+", "-").replace("/", "_"),
    "no padding": "data:;base64," + TEXT.rstrip("="),
    "percent": "data:image/png;base64," + quote(TEXT, safe=""),
    "no base64": "data:image/png," + quote_from_bytes(DATA),
    "base64 unsaid": "data:image/png," + TEXT,
    "parameters": "data:image/png;charset=utf-8;name=x.png;base64," + TEXT,
}


@pytest.mark.parametrize("what", URIS)
def test_a_data_uri_is_a_picture(what):
    assert "+" in TEXT and "/" in TEXT and TEXT.endswith("=")
    assert read_image(URIS[what]).image.tobytes() == noise(5, 6).tobytes()


class Array:
    """The parts of NumPy's array that a picture needs."""

    def __init__(self, shape, data, dtype="uint8"):
        self.shape, self.data, self.dtype, self.__array_interface__ = shape, data, dtype, {}

    def tobytes(self):
        return self.data


PIXELS = torch.frombuffer(bytearray(noise(5, 6).tobytes()), dtype=torch.uint8).view(6, 5, 3)
SOURCES = {
    "bytes": lambda path: DATA,
    "bytearray": lambda path: bytearray(DATA),
    "memoryview": lambda path: memoryview(DATA),
    "path": lambda path: path,
    "name": str,
    "file address": lambda path: path.as_uri(),
    "file": lambda path: open(path, "rb"),  # noqa: SIM115
    "buffer at its end": lambda path: (buffer := io.BytesIO(DATA)).seek(0, 2) and buffer,
    "picture": lambda path: Image.open(path),
    "array": lambda path: Array((6, 5, 3), noise(5, 6).tobytes()),
    "tensor": lambda path: PIXELS,
    "tensor, channels first": lambda path: PIXELS.permute(2, 0, 1),
    "tensor with alpha": lambda path: torch.cat((PIXELS, torch.full((6, 5, 1), 255, dtype=torch.uint8)), 2),
}


@pytest.mark.parametrize("what", SOURCES)
def test_a_picture_may_come_as_any_of_these(tmp_path, what):
    (tmp_path / "ü  x.png").write_bytes(DATA)
    source = SOURCES[what](tmp_path / "ü  x.png")
    picture = read_image(source)
    assert picture.path == (str(source) if isinstance(source, str | Path) else "(in memory)")
    assert picture.image.tobytes() == noise(5, 6).tobytes() and picture.note is None


def test_a_grey_array_is_a_grey_picture():
    data = bytes(range(6))
    tensor = torch.tensor(list(data), dtype=torch.uint8).view(2, 3)
    for source in (Array((2, 3), data), Array((2, 3, 1), data), tensor):
        assert read_image(source).image.tobytes() == bytes(v for v in data for _ in range(3))


def test_numpy_arrays_with_any_strides_and_numpy_texts(tmp_path):
    numpy = pytest.importorskip("numpy")
    pixels = numpy.asarray(noise(10, 12))
    for array in (pixels, pixels[::2, ::-1]):
        assert read_image(array).image.tobytes() == Image.fromarray(numpy.ascontiguousarray(array)).tobytes()
    (tmp_path / "x.png").write_bytes(DATA)
    for source in (numpy.str_(tmp_path / "x.png"), numpy.bytes_(DATA)):
        assert read_image(source).image.tobytes() == read_image(DATA).image.tobytes()


def test_one_picture_is_a_list_of_one():
    image = noise(5, 6)
    for one in ("x.png", Path("x.png"), image, DATA):
        assert as_list(one) == [one]
    assert as_list(None) == [] and as_list(("a", image)) == ["a", image] and as_list(PIXELS)[0] is PIXELS


# ---------------------------------------------------------------- refused sources


def closed(file):
    file.close()
    return file


PNG = packed(noise(64, 64))
WRONG = {  # (source, words of the error)
    "floats": (torch.rand(6, 5, 3), "float32 of shape (6, 5, 3)"),
    "16 bits": (Array((6, 5, 3), b"", "uint16"), "uint16"),
    "channels first": (Array((3, 6, 5), b""), "(3, 6, 5)"),
    "a batch": (Array((1, 6, 5, 3), b""), "(1, 6, 5, 3)"),
    "no pixels": (Array((0, 5, 3), b""), "(0, 5, 3)"),
    "an empty image": (Image.new("RGB", (0, 5)), "no pixels"),
    "two readings": (torch.zeros(3, 5, 3, dtype=torch.uint8), "ambiguous"),
    "None": (None, "NoneType"),
    "a number": (3, "int"),
    "a list": (["x.png"], "list"),
    "a class": (Path, "type"),
    "an open text": (io.StringIO("x"), "opened as text"),
    "a closed file": (closed(io.BytesIO(DATA)), "closed"),
    "a closed image": (closed(Image.open(io.BytesIO(DATA))), "closed"),
    "empty": (b"", "empty"),
    "text": (b"this is no picture\n", "not a picture that can be read; give a complete PNG"),
    "truncated": (PNG[:2000], "); fetch or save it again"),
    "header only": (PNG[:40], "truncated"),
    "bit rot": (PNG[:500] + bytes(100) + PNG[600:], "broken"),
    "no file": ("/nowhere/x.png", "no picture at /nowhere/x.png"),
    "no file at home": ("~/nowhere/x.png", "no picture at"),
    "no file at an address": ("file:///nowhere/x.png", "no picture at"),
    "no name": ("", "no picture at ''"),
    "a folder": ("/", "/ cannot be read (Is a directory)"),
    "NUL": ("a\0b", "NUL"),
    "NUL in an address": ("file:///a%00b", "null byte"),
    "surrogate": ("\ud800", "cannot be read"),
    "a long name": ("x" * 5000, "name too long"),
    "web": ("http://example.com/x.png", "nothing is downloaded; download it"),
    "WEB": ("HTTPS://example.com/x.png", "nothing is downloaded"),
    "another machine": ("file://example/x.png", "names another machine; for a file of this one, write file:///"),
    "uri of base64 alone": ("data:image/png,abc", "not a picture"),
    "uri of other characters": ("data:;base64,@@", "cannot be decoded"),
    "uri without data": ("data:image/png;base64", "empty"),
    "uri of nothing": ("data:,", "empty"),
    "uri cut off": (URIS["plain"][:90], "truncated"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_used_is_one_clear_line(what):
    source, words = WRONG[what]
    assert words in refusal(read_image, source)


@pytest.mark.skipif(not os.path.exists("/dev/fd"), reason="no /dev/fd on this system")
def test_a_pipe_is_read_and_a_stream_without_end_is_cut(monkeypatch):
    reader, writer = os.pipe()
    os.write(writer, DATA)
    os.close(writer)
    assert read_image(f"/dev/fd/{reader}").image.size == (5, 6)  # like a shell's <(...)
    os.close(reader)
    monkeypatch.setattr("model.image.LARGEST", 1000)
    monkeypatch.setattr(sys, "stdin", type("Stdin", (), {"buffer": io.BytesIO(bytes(2000))}))
    for source in ("-", io.BytesIO(bytes(2000))):
        assert "larger than" in refusal(read_image, source)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_pipe_without_a_writer_and_a_device_do_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    late = threading.Timer(30, (tmp_path / "pipe").write_bytes, [b"so that a fault fails instead of hanging"])
    late.start()
    assert "is empty" in refusal(read_image, tmp_path / "pipe")
    late.cancel()
    assert "/dev/zero cannot be read (it is a device)" in refusal(read_image, "/dev/zero")
    with subprocess.Popen(["sh", "-c", 'sleep 1; cat "$0"', tmp_path / "x.png"], stdout=subprocess.PIPE) as slow:
        (tmp_path / "x.png").write_bytes(DATA)
        assert read_image(f"/dev/fd/{slow.stdout.fileno()}").image.size == (5, 6)


def test_what_may_not_be_read_is_one_clear_line(tmp_path, monkeypatch):
    def refuse(path, flags):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("model.image._open_at_once", refuse)  # because root can read everything
    assert "x.png cannot be read (Permission denied)" in refusal(read_image, tmp_path / "x.png")


def test_a_picture_may_come_through_stdin(monkeypatch):
    monkeypatch.setattr(sys, "stdin", type("Stdin", (), {"buffer": io.BytesIO(DATA)}))
    assert read_image("-").image.tobytes() == noise(5, 6).tobytes()
    assert "stdin is empty" in refusal(read_image, "-")
    monkeypatch.setattr(sys, "stdin", None)
    assert "no stdin" in refusal(read_image, "-")


# ---------------------------------------------------------------- side effects of Pillow

OTHER_FILES = {
    "a PostScript drawing": packed(noise(8, 8), "EPS"),
    "a JPEG XL picture": b"\xff\x0a" + bytes(20),
    "a PDF document": packed(noise(8, 8), "PDF"),
    "an SVG drawing": b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>',
    "a HEIC picture": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    "an AVIF picture": b"\0\0\0\x18ftypavif\0\0\0\0mif1avif",
    "a video": b"\0\0\0\x18ftypisom",
    "a web page": b"\n<!DOCTYPE html><html><svg>",
    "Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
    "not a picture": packed(noise(8, 8), "DDS"),
}


@pytest.mark.parametrize("what", OTHER_FILES)
def test_other_files_are_named_and_start_no_program(tmp_path, monkeypatch, what):
    def started(*args, **kwargs):
        raise AssertionError(f"{args} was started")

    monkeypatch.setattr(subprocess, "Popen", started)
    monkeypatch.setattr(os, "system", started)
    (tmp_path / "x.png").write_bytes(OTHER_FILES[what])
    assert what in refusal(read_image, tmp_path / "x.png")
    try:
        image = Image.open(tmp_path / "x.png")  # a PIL image gets the same checks: its pixels are loaded here
    except UnidentifiedImageError:
        return
    with image:
        assert f"has the format {image.format}" in refusal(read_image, image)


def broken_tiff():
    """A file for which libtiff prints a warning."""
    data = bytearray(packed(Image.new("RGB", (40, 40), "red"), "TIFF", compression="tiff_lzw"))
    data[8:20] = b"\xff" * 12
    return bytes(data)


def test_what_pillow_and_libtiff_say_does_not_reach_stderr(capfd, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow warns at 1600 pixels and fails at 2001
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert read_image(packed(noise(40, 40))).image.size == (40, 40)
        assert "broken" in refusal(read_image, broken_tiff())
        assert "too many pixels" in refusal(read_image, PNG)
    assert not caught and capfd.readouterr().err == ""
    os.write(2, b"as before")
    assert capfd.readouterr().err == "as before"


def test_threads_that_read_pictures_leave_stderr_as_it_was():
    """A second thread must not redirect stderr while the first one does: it would restore what the first one set."""
    before, second_is_in, leave = sys.stderr, threading.Event(), threading.Event()

    def second():
        with reading._quiet():
            second_is_in.set()
            leave.wait(60)

    thread = threading.Thread(target=second)
    with reading._quiet():
        thread.start()
        second_is_in.wait(0.5)  # without a lock, it is in by now
    leave.set()
    thread.join()
    assert second_is_in.is_set() and sys.stderr is before


@pytest.mark.parametrize(
    ("size", "mode", "lost"),
    [((100, 91), "crop", None), ((100, 90), "crop", None), ((100, 89), "crop", "11 %"), ((50, 100), "crop", "50 %"),
     ((50, 100), "pad", None), ((50, 100), "anyres", None)],
)  # fmt: skip
def test_a_crop_that_drops_more_than_a_tenth_says_so(size, mode, lost):
    note = crop_note(read_image(Image.new("RGB", size)), ImageSettings(56, mode))
    assert (note is None) == (lost is None)
    assert note is None or (lost in note and "--image-mode pad" in note and "\n" not in note)
