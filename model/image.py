"""Pictures to pixel values, preprocessed as for training the checkpoints: Pillow bicubic; crop, pad or tiles.

S is the side, in pixels, of the vision tower's input squares.
"""

import base64
import binascii
import errno
import io
import math
import os
import re
import stat
import sys
import threading
import warnings
from collections.abc import Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Protocol
from urllib.parse import unquote, unquote_to_bytes

import torch
from PIL import Image, UnidentifiedImageError

from .config import InputError, making_sense_of, max_tiles_of, read_json
from .layout import Layout, choose_canvas, layout_of

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)  # SigLIP's mean and standard deviation
STRIP = 200  # aspect ratio above which a picture is cropped before it is resized


@dataclass(frozen=True)
class ImageSettings:
    """The settings of preprocessor_config.json, with CLIP's values as defaults."""

    size: int  # pixels per side of the model's input
    # "crop": centre square of the picture; "pad": the whole picture on a square canvas; "squash": the whole picture
    # resized to S x S; "anyres" (LLaVA-NeXT, LLaVA-OneVision): as "squash", then tiles at a higher resolution;
    # "frame": a frame of a LLaVA-OneVision video, as "squash" with half of the tokens per side
    mode: str = "crop"
    mean: tuple = CLIP_MEAN
    std: tuple = CLIP_STD
    rescale: float = 1 / 255
    pinpoints: tuple = None  # for "anyres": sizes ((a, b), ...) of the canvases to choose from
    order: str = "hf"  # of a and b: "hf" (height, width), "orig" (width, height), as in the original code
    # LLaVA-OneVision: a map of more tiles is shrunk to about this many, and a newline ends a picture without tiles
    max_tiles: int = None


def read_image_settings(folder, config):
    """ImageSettings of the folder of a checkpoint with this LlavaConfig.

    InputError if its file disagrees with the config, is malformed or asks for steps that are not implemented.
    """
    path, raw = image_processor_file(folder)
    aspect = (read_json(Path(folder) / "processor_config.json") or {}).get("vision_aspect_ratio")
    image_size, pinpoints = config.vision_config.image_size, config.image_grid_pinpoints
    known = _processors(config)
    with making_sense_of(path):
        raw = {key: value for key, value in raw.items() if value is not None}
        kind = raw.get("image_processor_type", raw.get("feature_extractor_type", known[0]))
        kind = kind.replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")
        mode = "anyres" if pinpoints else "squash" if kind == "SiglipImageProcessor" else "crop"
        mode = "pad" if raw.get("do_pad") and kind == "LlavaImageProcessor" else mode
        usual = (HALF, HALF) if kind == "SiglipImageProcessor" else (CLIP_MEAN, CLIP_STD)
        mean, std, rescale = _numbers(raw, *usual, 1 / 255)
        canvases = tuple(tuple(pair) for pair in raw.get("image_grid_pinpoints", pinpoints or ()))
        size = raw.get("size", image_size)
        sides = {*_sides(size), *_sides(raw.get("crop_size", image_size))}
    off = _left_out(raw, mode == "crop")
    squashes = "height" in size if isinstance(size, dict) else raw.get("default_to_square")
    if mode in ("crop", "pad") and squashes:
        off.append("a resize that does not keep the aspect")
    if mode == "squash" and "size" in raw and not squashes:
        off.append("a resize that keeps the aspect")
    for wrong, what in (
        (kind not in known, f"is for a {kind}; only {' and '.join(known)} can be used for this model"),
        (
            sides != {image_size},
            f"resizes to {sorted(map(str, sides))} but the vision tower takes {image_size}; "
            "use the files of one checkpoint",
        ),
        (
            pinpoints and canvases != pinpoints,
            "and config.json have different image_grid_pinpoints; use the files of one checkpoint",
        ),
        (
            config.max_tiles and aspect and max_tiles_of(aspect) != config.max_tiles,
            f"is beside a processor_config.json with vision_aspect_ratio {aspect}, which differs from that of "
            "config.json; use the files of one checkpoint",
        ),
        (off, f"asks for {', '.join(off)}; only bicubic resize, centre crop, rescale and normalise are implemented"),
    ):
        if wrong:
            raise InputError(f"{path} {what}")
    return ImageSettings(image_size, mode, mean, std, rescale, pinpoints, max_tiles=config.max_tiles)


def frame_settings(folder, settings):
    """ImageSettings of the frames of a video; settings: of the folder's pictures. InputError as for those.

    They differ only in the mode, unless a file for videos has other numbers.
    """
    folder = Path(folder)
    path = folder / "processor_config.json"
    raw = (read_json(path) or {}).get("video_processor")
    if raw is None:
        path = folder / "video_preprocessor_config.json"
        raw = read_json(path) or {}
    with making_sense_of(path):
        raw = {key: value for key, value in raw.items() if value is not None}
        mean, std, rescale = _numbers(raw, settings.mean, settings.std, settings.rescale)
        off = _left_out(raw, crops=False)
        if {*_sides(raw.get("size", settings.size))} != {settings.size}:
            off.append(f"frames of size {raw['size']} instead of {settings.size}")
    if off:
        raise InputError(f"{path} asks for {', '.join(off)} in videos; use the files of one checkpoint")
    return replace(settings, mode="frame", mean=mean, std=std, rescale=rescale)


def _left_out(raw, crops):
    """Words for the settings in a file that change pixels and are not implemented. crops: the centre is cropped; that
    has no effect on a square picture."""
    steps = ("do_resize", *(("do_center_crop",) if crops else ()), "do_rescale", "do_normalize")
    off = [f"{step} false" for step in steps if raw.get(step) is False]
    return off + ([f"resample {raw['resample']}"] if raw.get("resample", 3) != 3 else [])


def _numbers(raw, mean, std, rescale):
    """(mean, std, rescale factor) in a file, by default these. ValueError if they are malformed."""
    mean, std = (tuple(map(float, raw.get(key, own))) for key, own in (("image_mean", mean), ("image_std", std)))
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"mean {mean}, std {std}")
    return mean, std, float(raw.get("rescale_factor", rescale))


def _processors(config):
    """Names of the image processors that fit a LlavaConfig; the first is the default."""
    if config.max_tiles:
        return ("LlavaOnevisionImageProcessor",)
    if config.image_grid_pinpoints:
        return ("LlavaNextImageProcessor",)
    if not config.vision_config.has_cls:
        return ("SiglipImageProcessor",)
    return "LlavaImageProcessor", "CLIPImageProcessor"


def image_processor_file(folder):
    """(path, settings) of the file with the preprocessing settings; {} if there is none.

    transformers 5 writes them to processor_config.json, which takes precedence if both files have settings.
    """
    old, new = Path(folder) / "preprocessor_config.json", Path(folder) / "processor_config.json"
    settings, nested = read_json(old), (read_json(new) or {}).get("image_processor")
    return (old, settings or {}) if nested is None else (new, nested)


def _sides(size):
    """The side lengths in a size: n, {"shortest_edge": n} or {"height": n, "width": n}."""
    if isinstance(size, dict) and size.keys() not in ({"shortest_edge"}, {"height", "width"}):
        raise ValueError(f"size {size}")
    return size.values() if isinstance(size, dict) else (size,)


# ---------------------------------------------------------------- reading a picture

# Formats that Pillow may read. Some of its other readers start a program (EPS: Ghostscript) or open further files.
FORMATS = (
    "JPEG", "MPO", "PNG", "WEBP", "GIF", "TIFF", "BMP", "DIB", "AVIF", "JPEG2000", "PPM", "ICO", "PCX", "PSD", "QOI",
    "SGI", "TGA",
)  # fmt: skip
ANIMATED = "GIF", "PNG", "WEBP", "TIFF", "AVIF"  # those of them that hold several pictures: frames or pages
LARGEST = 2**30  # bytes of a file
ACCEPTED = 'a path, "-" (stdin), a data: URI, bytes, a binary file, a PIL image, or a uint8 array or tensor'
# Files that are often given but cannot be read: a pattern for the first bytes, and what the error calls them
OTHERS = (
    (rb"%!PS|\xc5\xd0\xd3\xc6", "a PostScript drawing"),
    (rb"%PDF", "a PDF document"),
    (rb"\xff\x0a|\0\0\0\x0cJXL ", "a JPEG XL picture"),
    (rb"(?s)....ftyp(hei|hev|mif1|msf1)", "a HEIC picture"),
    (rb"(?s)....ftypavi", "an AVIF picture that cannot be read here"),
    (rb"(?s)....ftyp|\x1a\x45\xdf\xa3|RIFF....AVI ", "a video, of which only frames saved as pictures can be read"),
    (rb"version https://git-lfs", "a Git LFS pointer, not the picture itself (`git lfs pull` fetches it)"),
    (rb"(?i)\s*(<!doctype html|<html)", "a web page"),
    (rb"(?is).*<svg", "an SVG drawing"),
)
# EXIF orientation -> the transpose that turns the picture upright
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
EXIF_ORIENTATION, TIFF_BITS, TIFF_PHOTOMETRIC, TIFF_SAMPLE_FORMAT = 274, 258, 262, 339  # tag numbers


@dataclass(frozen=True)
class Picture:
    """A picture that has been read: its source, its RGB pixels, and one line on how they were changed, or None."""

    path: str
    image: Image.Image
    note: str | None = None


class PixelArray(Protocol):
    """An array of NumPy, or of another library with NumPy's array interface."""

    @property
    def __array_interface__(self) -> dict[str, Any]: ...


# A picture as `read_image` accepts it: a path, "-" (stdin) or a data: URI; the bytes of a file; an open binary file; a
# PIL image; a uint8 tensor or array, (H, W) or (H, W, C) with C 1, 3 or 4, tensors also (C, H, W)
PictureFile = str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO
PictureLike = PictureFile | Image.Image | torch.Tensor | PixelArray | Picture
Pictures = PictureLike | Sequence[PictureLike] | None  # the pictures of a question, in the order of their `<image>`


def as_list(images: Pictures) -> list[PictureLike]:
    """The pictures of a question as a list: [] for None, a list of one for a single picture."""
    if images is None:
        return []
    return list(images) if isinstance(images, list | tuple) else [images]


def read_image(source: PictureLike) -> Picture:
    """Read a picture from any of the sources in `PictureLike`.

    The EXIF orientation is applied, and transparent pixels are shown on white. InputError if it cannot be used.
    """
    if isinstance(source, Picture):
        return source
    with _opening(source) as (image, name, shown):
        return Picture(name, *to_rgb(image, shown))


def read_frames(sources: Pictures) -> list[Picture]:
    """Read the frames of a video: a picture for each, or one file of several pictures (GIF, PNG, WebP, TIFF, AVIF).

    Errors as in `read_image`, and for a file whose pictures have more pixels together than Pillow allows in one.
    """
    sources = as_list(sources)
    if len(sources) != 1 or isinstance(sources[0], Picture):
        return [read_image(source) for source in sources]
    with _opening(sources[0]) as (image, name, shown):
        count, (wide, high) = image.n_frames if image.format in ANIMATED else 1, image.size
        if count == 1:
            return [Picture(name, *to_rgb(image, shown))]
        if count * wide * high > 2 * Image.MAX_IMAGE_PIXELS:
            raise InputError(f"{shown} has {count} frames of {wide} x {high} pixels; give fewer or smaller frames")
        found = []
        for number in range(count):
            image.seek(number)
            rgb, note = to_rgb(image, shown, every=True)
            found.append(Picture(name, rgb, None if note in [frame.note for frame in found] else note))
        image.seek(0)
        return found


@contextmanager
def _opening(source):
    """Open a picture -> (PIL image, its name, the short name for notes and errors). Errors as in `read_image`."""
    shown = _shown(source)
    image = source if isinstance(source, Image.Image) else _from_pixels(source)
    data = _read(source, shown) if image is None else None
    named = isinstance(source, str | os.PathLike) and not _is_uri(source)
    with _quiet(), _one_line_errors(shown):
        yield _decode(data, shown) if image is None else image, str(source) if named else shown, shown


def _shown(source):
    """A short name for a picture, on one line, for notes and errors."""
    if not isinstance(source, str | os.PathLike):
        return "(in memory)"
    name = "stdin" if source == "-" else " ".join(str(source).split())
    return (name or "''") if len(name) < (60 if _is_uri(source) else 200) else name[:40] + "..."


def _is_uri(source):
    return str(source)[:5].lower() == "data:"


def _read(source, shown):
    """The bytes of a picture from any kind of source. InputError if they cannot be read or are more than `LARGEST`."""
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source)
    if _is_uri(source):
        return _from_uri(str(source))
    if not hasattr(source, "read") and not isinstance(source, str | os.PathLike):
        raise InputError(f"{type(source).__name__} is not a picture; give {ACCEPTED}, or a list of these")
    try:
        with _opened(source) as file:
            data = file.read(LARGEST + 1)
    except InputError:
        raise
    except FileNotFoundError as missing:
        raise InputError(f"no picture at {shown}; check the path") from missing
    except (OSError, ValueError) as refused:  # ValueError: a closed file, characters that no path can have
        why = getattr(refused, "strerror", None) or refused
        raise InputError(f"{shown} cannot be read ({why}); give a readable picture file, not a folder") from refused
    if not isinstance(data, bytes):
        raise InputError("a picture was opened as text; open it with mode 'rb'")
    if len(data) > LARGEST:
        raise InputError(f"{shown} is larger than {LARGEST >> 20} MiB; give a smaller picture")
    return data


def _opened(source):
    """A context manager of a binary file: of a path, stdin for "-", or the source itself, at its start."""
    if source == "-":
        source = getattr(sys.stdin, "buffer", None)
        if source is None:  # closed, or in a notebook
            raise InputError("there is no stdin to read a picture from; give the path of a picture")
    elif not hasattr(source, "read"):
        return open(local_path(source), "rb", opener=_open_at_once)
    elif source.seekable():
        source.seek(0)
    return nullcontext(source)


def _open_at_once(path, flags):
    """os.open, but a device is refused, and a named pipe without a writer is empty instead of blocking."""
    if stat.S_ISCHR(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "it is a device")
    file = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # not on Windows
    if hasattr(os, "O_NONBLOCK"):
        os.set_blocking(file, True)  # a writer may still be at work
    return file


def local_path(source):
    """The local path of a picture's address: file:// is removed and ~ expanded; anything else is returned unchanged.

    InputError for an address on another machine, and for text that cannot be a path.
    """
    source = str(source)
    if "\0" in source:
        raise InputError(f"no picture at {source[:100]!r}: the path contains a NUL character; check the path")
    local = re.match(r"file:(?:(?!//)|//(?:localhost)?)(/.*)", source, re.IGNORECASE | re.DOTALL)
    if local:
        return unquote(local[1], errors="surrogateescape")
    if source[:7].lower() == "file://":
        raise InputError(f"{source[:100]} names another machine; for a file of this one, write file:///FOLDER/FILE")
    if re.match(r"[a-z][a-z0-9+.-]+:/", source, re.IGNORECASE):  # at least two letters, because C:/ is a drive
        raise InputError(f"{source[:100]} is an address, and nothing is downloaded; download it and give its new path")
    if source.startswith("~") and not os.path.exists(source):
        return os.path.expanduser(source)
    return source


def _from_uri(uri):
    """The bytes in a data: URI, base64 in either alphabet (with line breaks, without padding) or percent-encoded."""
    header, _, data = uri.partition(",")
    data = unquote_to_bytes(data)
    packed = b"".join(data.split()).rstrip(b"=").translate(bytes.maketrans(b"-_", b"+/"))
    # some URIs omit ";base64"; no picture file consists of base64 characters alone
    if not header.lower().rstrip().endswith(";base64") and re.search(rb"[^A-Za-z0-9+/]", packed):
        return data
    try:
        return base64.b64decode(packed + b"=" * (-len(packed) % 4), validate=True)
    except binascii.Error as broken:
        raise InputError(
            f"a data: URI cannot be decoded ({broken}); give data:image/png;base64,... or a file"
        ) from broken


def _from_pixels(source):
    """PIL image of an array or a tensor; None for anything else. InputError for floats: their range is unknown."""
    tensor = isinstance(source, torch.Tensor)
    text = isinstance(source, str | bytes)  # includes NumPy's strings, which have an array interface too
    if text or not tensor and not hasattr(source, "__array_interface__"):
        return None
    shape, kind = tuple(source.shape), str(source.dtype).removeprefix("torch.")
    last, first = (len(shape) == 3 and shape[i] in (1, 3, 4) for i in (2, 0))  # can this be the channels' dimension?
    if kind != "uint8" or not (len(shape) == 2 or last or first and tensor) or min(shape) < 1:
        raise InputError(
            f"{kind} of shape {shape} is not a picture; give uint8 (0 to 255) of shape (height, width, 3), or a list "
            "of such pictures"
        )
    if tensor and first and last:
        raise InputError(f"a picture of shape {shape} is ambiguous; give a numpy array or a PIL image")
    if tensor and first:
        source, shape = source.permute(1, 2, 0), (*shape[1:], shape[0])
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[shape[2] if len(shape) == 3 else 1]
    return Image.frombytes(mode, (shape[1], shape[0]), _to_bytes(source) if tensor else source.tobytes())


def _to_bytes(values):
    """A tensor of values 0..255 as bytes, row by row."""
    data = bytearray(values.numel())
    torch.frombuffer(data, dtype=torch.uint8).copy_(values.flatten())
    return bytes(data)


def _decode(data, shown):
    """PIL image of a file's bytes."""
    if not data:
        raise InputError(f"{shown} is empty; give a picture file")
    Image.init()
    try:
        return Image.open(io.BytesIO(data), formats=[name for name in FORMATS if name in Image.OPEN])
    except UnidentifiedImageError as unknown:
        kinds = [what for pattern, what in OTHERS if re.match(pattern, data[:4096])]
        found = kinds[0] if kinds else "truncated, or not a picture that can be read"
        raise InputError(f"{shown} is {found}; give a complete PNG or JPEG file") from unknown


@contextmanager
def _one_line_errors(shown):
    """Turn any error about a picture into a one-line InputError."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as broken:  # Pillow's readers raise a dozen different exceptions for broken files
        what, cure = "is truncated or broken", "fetch or save it again"
        if isinstance(broken, Image.DecompressionBombError):
            what, cure = "has too many pixels", "make it smaller"
        raise InputError(f"{shown} {what} ({' '.join(str(broken).split())}); {cure}") from broken


ONE_AT_A_TIME = threading.Lock()  # because what `_quiet` redirects belongs to the whole process


@contextmanager
def _quiet():
    """Suppress Pillow's warnings and log lines; our notes and errors report what matters."""
    with ONE_AT_A_TIME, warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _quiet_libtiff():
    """Suppress what libtiff, a C library, writes directly to file descriptor 2."""
    try:
        stderr = os.dup(2)
    except OSError:  # stderr is closed
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


# ---------------------------------------------------------------- to RGB


def to_rgb(image, path, every=False):
    """PIL image -> (RGB image, note or None): upright, transparent pixels on white, grey of over 8 bits reduced to 8.

    path: the picture's name in notes and errors; every: the file's other frames are used too. InputError if the picture
    cannot be converted.
    """
    if image.format is not None and image.format not in FORMATS:  # None: made in memory
        raise InputError(f"{path} has the format {image.format}, which is not supported; convert it to PNG or JPEG")
    if min(image.size) < 1:
        raise InputError(f"{path} has no pixels ({image.width} x {image.height}); give another picture")
    notes, clear = [], image.info.get("transparency")
    tiles = getattr(image, "tile", [])  # how a file's pixels are stored; empty once they are loaded
    stored = str(tiles)
    deep = re.search(";16|SGI16", stored) or ("'ppm" in stored and tiles[0][3][-1] > 255)  # its largest value
    deep = deep and not image.mode.startswith("I")
    if isinstance(clear, tuple) and (deep or max(clear) > 255):
        raise InputError(f"{path} has a transparent colour of 16 bits per channel; save it with 8 bits per channel")
    if deep:
        notes.append("colours of more than 8 bits reduced to 8")
    if image.format == "PNG" and isinstance(clear, int):  # Pillow scales 2- and 4-bit pixels to 8 bits, but not this
        image.info["transparency"] = clear * (85 if "'L;2'" in stored else 17 if "'L;4'" in stored else 1)
    # `load` itself rotates a TIFF; in other formats, reading EXIF first would hide errors of `load`
    turned = image.format == "TIFF" and _orientation(image) in UPRIGHT
    with _quiet_libtiff() if image.format == "TIFF" else nullcontext():
        image.load()
    turn = UPRIGHT.get(_orientation(image))
    if turned or turn is not None:
        notes.append("turned upright by its EXIF orientation")
    rgb = _without_alpha(_in_8_bits(image, path, notes), notes).convert("RGB")
    frames = 1 if every else _frames(image)  # last, because it may read further into the file
    if frames > 1:
        notes.append(f"frame {image.tell() + 1} of {frames} is used")
    rgb = rgb if turn is None else rgb.transpose(turn)
    return rgb, f"{path}: {'; '.join(notes)}" if notes else None


def _orientation(image):
    """EXIF orientation, 1 to 8; 1 if the EXIF data cannot be read, since the pixels may still be good."""
    try:
        return image.getexif().get(EXIF_ORIENTATION, 1)
    except Exception:  # broken EXIF data raises many different exceptions
        return 1


def _frames(image):
    """Number of frames or pages. 1 for MPO, whose other pictures are depth maps and previews."""
    if image.format not in ANIMATED:
        return 1
    try:
        return image.n_frames
    except Exception:  # a later frame is broken
        return 1


def _in_8_bits(image, path, notes):
    """The picture with 8 bits per channel; adds one line per change to notes. InputError if the range is unknown.

    The range of grey levels of 16 bits (12 in a TIFF that says so) is 0 to their maximum.
    """
    tags = getattr(image, "tag_v2", {})
    wide = image.mode == "I" and image.format not in ("PNG", "PPM")
    if image.mode == "F" or wide or 2 in tags.get(TIFF_SAMPLE_FORMAT, ()):  # 2: signed
        raise InputError(
            f"{path} holds numbers of unknown range (of 32 bits, negative or floating point); save it with 8 bits per "
            "channel"
        )
    if image.mode == "CMYK":
        notes.append("CMYK converted to RGB without a colour profile")
    if not image.mode.startswith("I"):
        return image
    bits = 12 if tags.get(TIFF_BITS) == (12,) else 16
    notes.append(f"{bits}-bit grey reduced to 8 bits")
    values = torch.frombuffer(bytearray(image.convert("I").tobytes()), dtype=torch.int32).float()
    shade = values * (255 / (2**bits - 1))
    if tags.get(TIFF_PHOTOMETRIC) == 0:  # 0 is white; Pillow inverts up to 8 bits only
        shade = 255 - shade
    if 0 < shade.max() < 16:  # for example 12-bit data in a 16-bit file
        notes.append(f"nearly black: the brightest pixel is {shade.max():.0f} of 255, stretch its range if needed")
    grey = Image.frombytes("L", image.size, _to_bytes(shade.round()))
    clear = image.info.get("transparency")
    if isinstance(clear, int):  # the transparent grey level
        grey.putalpha(Image.frombytes("L", image.size, _to_bytes(255 * (values != clear))))
    return grey


def _without_alpha(image, notes):
    """The picture composed on white, as in transformers 5."""
    if image.mode in ("La", "RGBa"):  # premultiplied alpha converts only to LA and RGBA
        image = image.convert(image.mode.upper())
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    least, most = image.getchannel("A").getextrema()
    if least < 255:
        notes.append("transparent pixels are shown on white" if most else "transparent everywhere, shown as white")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def crop_note(picture, settings):
    """One line if the centre crop removes more than 10 % of the picture, else None."""
    lost = 1 - min(picture.image.size) / max(picture.image.size)
    if settings.mode != "crop" or lost <= 0.1:
        return None
    return f"{picture.path}: the centre crop removes {100 * lost:.0f} % of it; --image-mode pad keeps all of it"


# ---------------------------------------------------------------- LLaVA-NeXT and LLaVA-OneVision: tiles


def to_tiles(image, settings):
    """RGB picture -> its S x S tiles, row by row. They are cut from a black canvas, on which the picture is centred,
    scaled to fit."""
    size, (wide, high) = settings.size, image.size
    canvas_wide, canvas_high = choose_canvas(image.size, settings.pinpoints, settings.order)
    if canvas_wide / wide < canvas_high / high:
        fitted = canvas_wide, min(math.ceil(high * (canvas_wide / wide)), canvas_high)
    else:
        fitted = min(math.ceil(wide * (canvas_high / high)), canvas_wide), canvas_high
    canvas = Image.new("RGB", (canvas_wide, canvas_high))
    left, top = (canvas_wide - fitted[0]) // 2, (canvas_high - fitted[1]) // 2
    canvas.paste(image.resize(fitted, Image.Resampling.BICUBIC), (left, top))
    corners = [(x, y) for y in range(0, canvas_high, size) for x in range(0, canvas_wide, size)]
    return [canvas.crop((x, y, x + size, y + size)) for x, y in corners]


# ---------------------------------------------------------------- squares


def to_square(image, settings):
    """RGB picture -> the S x S picture that the model gets. Modes "squash" and "frame" resize it. Mode "pad" first pads
    it to a square.

    The shortest edge is resized to S (the longest to int(S * long / short)); then the centre is cropped, with offsets
    rounded down. Errors: `pad_to_square`.
    """
    size, short = settings.size, min(image.size)
    if settings.mode in ("squash", "frame"):
        return image.resize((size, size), Image.Resampling.BICUBIC)
    if settings.mode == "pad":
        image = pad_to_square(image, settings.mean)
        short = min(image.size)
    wide, high = (int(size * side / short) for side in image.size)  # after the resize, before the crop
    left, top = (wide - size) // 2, (high - size) // 2
    if max(wide, high) <= STRIP * size:
        return image.resize((wide, high), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    # resize only the part inside the crop, so that 10000 x 3 does not become a million pixels wide; this may change the
    # order of Pillow's two passes and therefore how overshoots are clipped
    fx, fy = image.width / wide, image.height / high  # source pixels per resized pixel
    box = (left * fx, top * fy, min((left + size) * fx, image.width), min((top + size) * fy, image.height))
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box)


def normalise(square, settings):
    """S x S picture -> (3, S, S) fp32: (pixels * rescale - mean) / std."""
    pixels = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).view(settings.size, settings.size, 3)
    mean, std = (torch.tensor(t, device="cpu") for t in (settings.mean, settings.std))
    return ((pixels * settings.rescale - mean) / std).permute(2, 0, 1).contiguous()


def pad_to_square(image, mean):
    """The picture centred on a square canvas of the mean colour (0 to 1 each), as in LLaVA-1.5's training.

    InputError if the square is too large.
    """
    side = max(image.size)
    if side * side > 2 * Image.MAX_IMAGE_PIXELS:
        raise InputError(
            f"a square around {image.width} x {image.height} pixels is too large; use --image-mode crop or a "
            "smaller picture"
        )
    canvas = Image.new("RGB", (side, side), tuple(int(255 * m) for m in mean))
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas


def with_mode(settings, mode, order="auto", several=False):
    """ImageSettings with another mode and order; "auto" keeps the checkpoint's. InputError if they do not fit.

    several: the conversation has several pictures. LLaVA-OneVision sees each of these as one padded square.
    """
    square = mode == "auto" and several and settings.max_tiles
    mode = settings.mode if mode == "auto" else mode
    if mode == "anyres" and not settings.pinpoints:
        raise InputError(
            "the checkpoint has no tiles (it is not LLaVA-NeXT or LLaVA-OneVision); use --image-mode pad or crop"
        )
    if order != "auto" and mode != "anyres":
        raise InputError(f"--anyres-order applies to tiles, but the image mode is {mode}; leave it out")
    return replace(settings, mode="pad" if square else mode, order=settings.order if order == "auto" else order)


# ---------------------------------------------------------------- what the model gets of a picture


@dataclass(frozen=True)
class Prepared:
    """A picture as the model gets it: squares of S x S pixels, and where each of its tokens is."""

    path: str
    size: tuple  # (width, height) of the picture
    squares: list  # PIL images: the picture, then its tiles if it has any
    layout: Layout
    settings: ImageSettings

    @property
    def tokens(self):
        return self.layout.tokens

    @property
    def about(self):
        """Path, size, mode, number of squares and number of tokens, as in the output of `run.py --json`."""
        return {
            "path": self.path, "size": list(self.size), "mode": self.settings.mode, "tiles": len(self.squares),
            "tokens": self.tokens,
        }  # fmt: skip

    @property
    def pixels(self):
        """Pixel values (1 + tiles, 3, S, S) fp32; computed per call, so that no tensor is kept alive."""
        return torch.stack([normalise(square, self.settings) for square in self.squares])

    @property
    def contrast(self):
        return self.layout.contrast(self.pixels)


def prepare(picture, settings, side, cls, last=True):
    """A `Picture` -> Prepared. Arguments as in `layout_of`."""
    layout = layout_of(picture.image.size, settings, side, cls, last)
    whole = replace(settings, mode="squash") if settings.mode == "anyres" else settings
    squares = [to_square(picture.image, whole), *(to_tiles(picture.image, settings) if layout.grid else ())]
    return Prepared(picture.path, picture.image.size, squares, layout, settings)
