"""Pictures to pixel values, as the preprocessing of the checkpoints does it: Pillow bicubic; crop, pad or tiles.

S is the side, in pixels, of the squares that the vision tower takes.
"""

import base64
import binascii
import io
import math
import os
import re
import stat
import sys
import warnings
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import unquote, unquote_to_bytes

import torch
from PIL import Image, UnidentifiedImageError

from .config import InputError, making_sense_of, read_json

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
STRIP = 200  # pictures longer than this times their width are cut before they are resized


@dataclass(frozen=True)
class ImageSettings:
    """What preprocessor_config.json says, CLIP's values where it is silent."""

    size: int  # pixels per side of the model's input
    # "crop": centre square of the picture; "pad": the whole picture on a square canvas; "anyres": the whole picture
    # squashed, then the tiles of one that kept its details (LLaVA-NeXT)
    mode: str = "crop"
    mean: tuple = CLIP_MEAN
    std: tuple = CLIP_STD
    rescale: float = 1 / 255
    pinpoints: tuple = None  # of "anyres": sides ((a, b), ...) of the canvases to choose from
    order: str = "hf"  # what a and b are: "hf" height and width, "orig" width and height (the original code)


def read_image_settings(folder, image_size, pinpoints=None):
    """ImageSettings of a checkpoint folder; image_size and pinpoints are the config's: the file must not differ."""
    path, raw = image_processor_file(folder)
    with making_sense_of(path):
        raw = {key: value for key, value in raw.items() if value is not None}
        kind = _processor_kind(raw, pinpoints)
        mode = "anyres" if pinpoints else "pad" if raw.get("do_pad") and kind == "LlavaImageProcessor" else "crop"
        mean, std = (
            tuple(float(v) for v in raw.get(k, d)) for k, d in (("image_mean", CLIP_MEAN), ("image_std", CLIP_STD))
        )
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"mean {mean}, std {std}")
        rescale = float(raw.get("rescale_factor", 1 / 255))
        canvases = tuple(tuple(pair) for pair in raw.get("image_grid_pinpoints", pinpoints or ()))
        sizes = {*_sides(raw.get("size", image_size)), *_sides(raw.get("crop_size", image_size))}
    known = ("CLIPImageProcessor", "LlavaImageProcessor") if not pinpoints else ("LlavaNextImageProcessor",)
    if kind not in known:
        raise InputError(f"{path} is for a {kind}; only {' and '.join(known)} can be run for this model")
    if sizes != {image_size}:
        raise InputError(
            f"{path} resizes to {sorted(map(str, sizes))} but the vision tower takes {image_size}; "
            "use the files of one checkpoint"
        )
    if pinpoints and canvases != pinpoints:
        raise InputError(f"{path} and config.json have other image_grid_pinpoints; use the files of one checkpoint")
    if raw.get("resample", 3) != 3:
        raise InputError(f"{path} asks for resample {raw['resample']}; only 3 (bicubic) is implemented")
    # a picture that was padded is a square, of which nothing is cut off
    steps = ("do_resize", *(("do_center_crop",) if mode == "crop" else ()), "do_rescale", "do_normalize")
    off = [k for k in steps if raw.get(k) is False]
    size = raw.get("size")
    squashed = (
        isinstance(size, dict) and "height" in size or not isinstance(size, dict) and raw.get("default_to_square")
    )
    if off or squashed and mode != "anyres":
        what = f"{off[0]} false" if off else "a resize that does not keep the aspect"
        raise InputError(f"{path} asks for {what}; only resize, centre crop, rescale and normalise are implemented")
    return ImageSettings(image_size, mode, mean, std, rescale, pinpoints)


def image_processor_file(folder):
    """(path, settings) of the file that says how pictures are prepared; no settings if there is none.

    transformers 5 writes them into processor_config.json, and takes those if both files have some.
    """
    old, new = Path(folder) / "preprocessor_config.json", Path(folder) / "processor_config.json"
    settings, nested = read_json(old), (read_json(new) or {}).get("image_processor")
    return (old, settings or {}) if nested is None else (new, nested)


def _processor_kind(raw, pinpoints):
    """Name of the image processor's class in transformers, without what tells its variants of the same arithmetic."""
    default = "LlavaNextImageProcessor" if pinpoints else "LlavaImageProcessor"
    kind = raw.get("image_processor_type", raw.get("feature_extractor_type", default))
    return kind.replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")


def _sides(size):
    """The numbers of a size: n, {"shortest_edge": n} or {"height": n, "width": n}."""
    if isinstance(size, dict) and size.keys() not in ({"shortest_edge"}, {"height", "width"}):
        raise ValueError(f"size {size}")
    return size.values() if isinstance(size, dict) else (size,)


# ---------------------------------------------------------------- reading a picture

# What Pillow may read. Some of its other readers start a program (EPS: Ghostscript) or open further files.
FORMATS = (
    "JPEG", "MPO", "PNG", "WEBP", "GIF", "TIFF", "BMP", "DIB", "AVIF", "JPEG2000", "PPM", "ICO", "PCX", "PSD", "QOI",
    "SGI", "TGA",
)  # fmt: skip
LARGEST = 2**30  # bytes of a file
ACCEPTED = 'a path, "-" (stdin), a data: URI, bytes, a binary file, a PIL image, or a uint8 array or tensor'
# What is given for a picture and is none: a pattern that its first bytes match
OTHERS = (
    (rb"%!PS|\xc5\xd0\xd3\xc6", "a PostScript drawing"),
    (rb"%PDF", "a PDF document"),
    (rb"\xff\x0a|\0\0\0\x0cJXL ", "a JPEG XL picture"),
    (rb"(?s)....ftyp(hei|hev|mif1|msf1)", "a HEIC picture"),
    (rb"(?s)....ftypavi", "an AVIF picture that cannot be read here"),
    (rb"(?s)....ftyp", "a video"),
    (rb"version https://git-lfs", "a Git LFS pointer, not the picture itself (`git lfs pull` fetches it)"),
    (rb"(?i)\s*(<!doctype html|<html)", "a web page"),
    (rb"(?is).*<svg", "an SVG drawing"),
)
# EXIF orientation -> what turns the picture upright
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
EXIF_ORIENTATION, TIFF_BITS, TIFF_PHOTOMETRIC, TIFF_SAMPLE_FORMAT = 274, 258, 262, 339  # numbers of tags


@dataclass(frozen=True)
class Picture:
    """A picture that has been read: where from, its RGB pixels, what the conversion changed (one line, or None)."""

    path: str
    image: Image.Image
    note: str = None


def as_list(images):
    """The pictures of a question as a list: one picture is a list of one, None is none."""
    if images is None:
        return []
    return list(images) if isinstance(images, list | tuple) else [images]


def read_image(source):
    """Picture from a path, "-" (stdin), a data: URI, bytes, a binary file, a PIL image, or an array or tensor.

    Arrays and tensors: uint8, (H, W) or (H, W, C) with C 1, 3 or 4; tensors also (C, H, W). Every picture is turned as
    its EXIF orientation says, and shown on white where it is transparent. InputError if it cannot be used.
    """
    if isinstance(source, Picture):
        return source
    shown = _shown(source)
    image = source if isinstance(source, Image.Image) else _from_pixels(source)
    data = _read(source, shown) if image is None else None
    with _said_in_one_line(shown), _quiet():
        rgb, note = to_rgb(_decode(data, shown) if image is None else image, shown)
    named = isinstance(source, str | os.PathLike) and not _is_uri(source)
    return Picture(str(source) if named else shown, rgb, note)


def _shown(source):
    """What notes and errors call a picture: something short, on one line."""
    if not isinstance(source, str | os.PathLike):
        return "(in memory)"
    name = " ".join(str(source).split())
    return (name or "''") if len(name) < (60 if _is_uri(source) else 200) else name[:40] + "..."


def _is_uri(source):
    return str(source)[:5].lower() == "data:"


def _read(source, shown):
    """The bytes of a picture file, wherever they are."""
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source)
    if hasattr(source, "read"):
        return _read_open(source)
    path = os.fspath(source) if isinstance(source, str | os.PathLike) else None
    if not isinstance(path, str):
        raise InputError(f"{type(source).__name__} is no picture; give {ACCEPTED}, or a list of these")
    if path == "-":
        return _read_stdin()
    if _is_uri(path):
        return _from_uri(path)
    return _read_file(local_path(path), shown)


def _read_stdin():
    """All bytes on stdin."""
    stdin = getattr(sys.stdin, "buffer", None)
    if stdin is None:  # closed, or a notebook's
        raise InputError("there is no stdin to read a picture from; give the path of a picture")
    try:
        return _bounded(stdin, "the picture on stdin")
    except OSError as refused:
        raise InputError(f"stdin cannot be read ({refused.strerror}); give the path of a picture") from refused


def local_path(source):
    """The path, as text, that a picture's address means: file:// is taken off and ~ expanded; the rest as it is.

    InputError for an address of another machine, and for what can be no path.
    """
    source = str(source)
    if "\0" in source:
        raise InputError(f"no picture at {source[:100]!r}, which has a NUL character in it; check the path")
    scheme = re.match(r"([a-z][a-z0-9+.-]+):/", source, re.IGNORECASE)  # two letters at least: C:/ is a drive
    if scheme and scheme[1].lower() == "file":
        path = source[5:]
        if path.startswith("//"):
            host, slash, path = path[2:].partition("/")
            if host.lower() not in ("", "localhost"):
                raise InputError(f"{source[:100]} is on another machine; give the path of a picture on this one")
            path = slash + path
        return unquote(path, errors="surrogateescape")
    if scheme:
        raise InputError(
            f"{source[:100]} is a web address; nothing is downloaded here: save the picture and give its path"
        )
    if source.startswith("~") and not os.path.exists(source):
        return os.path.expanduser(source)
    return source


def _read_open(file):
    """The bytes of a binary file that the caller has opened, from its start."""
    try:
        if file.seekable():
            file.seek(0)
        data = _bounded(file, "the open file")
    except InputError:
        raise
    except (OSError, ValueError) as broken:  # closed, or opened for writing
        raise InputError(f"the open file cannot be read ({broken}); open it with mode 'rb'") from broken
    if not isinstance(data, bytes):
        raise InputError("a picture was opened as text; open it with mode 'rb'")
    return data


def _read_file(path, shown):
    """The bytes of a regular file, or of a pipe that somebody writes to."""
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            mode = os.fstat(file.fileno()).st_mode
            if stat.S_ISFIFO(mode):
                os.set_blocking(file.fileno(), True)
            elif not stat.S_ISREG(mode):
                raise InputError(f"{shown} is a device; give a picture file")
            return _bounded(file, shown)
    except InputError:
        raise
    except FileNotFoundError as missing:
        raise InputError(f"no picture at {shown}; check the path") from missing
    except IsADirectoryError as folder:
        raise InputError(f"{shown} is a folder; give a picture file") from folder
    except (OSError, ValueError) as refused:  # ValueError: letters that no path has
        why = getattr(refused, "strerror", None) or refused
        raise InputError(f"{shown} cannot be read ({why}); check the path and its permissions") from refused


def _open_at_once(path, flags):
    """os.open, but a pipe that nobody writes to is empty instead of waiting for a writer."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # Windows has none


def _bounded(file, shown):
    """What the file holds, up to the size of a large picture."""
    data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise InputError(f"{shown} has more than {LARGEST >> 20} MiB; give a smaller picture")
    return data


def _from_uri(uri):
    """The bytes in a data: URI, base64 in either alphabet (with line breaks, without padding) or percent-encoded."""
    header, comma, data = uri.partition(",")
    data = unquote_to_bytes(data)
    packed = b"".join(data.split()).rstrip(b"=").translate(bytes.maketrans(b"-_", b"+/"))
    # some leave ";base64" out; no picture consists of these characters alone
    if not header.lower().rstrip().endswith(";base64") and re.search(rb"[^A-Za-z0-9+/]", packed):
        return data
    try:
        if not comma:
            raise ValueError("no comma")
        return base64.b64decode(packed + b"=" * (-len(packed) % 4), validate=True)
    except (binascii.Error, ValueError) as broken:
        raise InputError(
            f"a data: URI cannot be decoded ({broken}); give data:image/png;base64,... or a file"
        ) from broken


def _from_pixels(source):
    """PIL image of an array or a tensor; None for anything else. Floats have no known range and are refused."""
    tensor = isinstance(source, torch.Tensor)
    text = isinstance(source, str | bytes)  # also NumPy's own, which are arrays as well
    if text or not tensor and not hasattr(source, "__array_interface__"):
        return None
    shape, kind = tuple(source.shape), str(source.dtype).removeprefix("torch.")
    wanted = "give uint8 of shape (height, width, 3), or a list of such pictures"
    if kind != "uint8":
        raise InputError(f"what is black and white in a picture of {kind} is not known; {wanted}")
    last, first = (len(shape) == 3 and shape[i] in (1, 3, 4) for i in (2, 0))  # where the channels may be
    if len(shape) != 2 and not last and not (first and tensor):
        raise InputError(f"a picture cannot have the shape {shape}; {wanted}")
    if tensor and first and last:
        raise InputError(f"a picture of shape {shape} can be read in two ways; give a numpy array or a PIL image")
    if tensor and first:
        source, shape = source.permute(1, 2, 0), (*shape[1:], shape[0])
    if min(shape) < 1:
        raise InputError(f"a picture of shape {shape} has no pixels; give another picture")
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[shape[2] if len(shape) == 3 else 1]
    return Image.frombytes(mode, (shape[1], shape[0]), _to_bytes(source) if tensor else source.tobytes())


def _to_bytes(values):
    """Numbers 0..255 of a tensor, row by row."""
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
        raise InputError(f"{shown} is {found}; convert it to PNG or JPEG") from unknown


@contextmanager
def _said_in_one_line(shown):
    """What goes wrong with a picture, as an InputError."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Image.DecompressionBombError as bomb:
        raise InputError(
            f"{shown} unpacks to far more pixels than a photograph has ({bomb}); scale it down first"
        ) from bomb
    except Exception as broken:  # Pillow's readers raise a dozen kinds for broken files
        why = " ".join(str(broken).split())
        raise InputError(f"{shown} is truncated or broken ({why}); save it again") from broken


@contextmanager
def _quiet():
    """Without the warnings and log lines of Pillow: what matters in them is said here, in a note or an error."""
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _quiet_libtiff():
    """Without what libtiff, a C library, writes to stderr by itself."""
    try:
        stderr = os.dup(2)
    except OSError:  # there is none
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(nowhere)
        os.close(stderr)


# ---------------------------------------------------------------- to RGB


def to_rgb(image, path):
    """(RGB image, note or None): upright, transparent pixels on white, grey of more than 8 bits reduced."""
    if image.format is not None and image.format not in FORMATS:  # None: made in memory
        raise InputError(f"{path} is of the format {image.format}, which is not read here; convert it to PNG or JPEG")
    if min(image.size) < 1:
        raise InputError(f"{path} has no pixels ({image.width} x {image.height}); give another picture")
    notes, tiff = [], image.format == "TIFF"
    turned = tiff and _orientation(image) in UPRIGHT  # by `load`; of others this would hide what `load` raises
    clear = image.info.get("transparency")
    if isinstance(clear, tuple) and (_has_deep_colours(image) or max(clear) > 255):
        raise InputError(f"{path} has a transparent colour of 16 bits per channel; save it with 8 bits per channel")
    if _has_deep_colours(image):
        notes.append("colours of more than 8 bits reduced to 8")
    _scale_transparent_level(image)
    with _quiet_libtiff() if tiff else nullcontext():
        image.load()
    turn = UPRIGHT.get(_orientation(image))
    if turned or turn is not None:
        notes.append("turned upright, as its EXIF orientation says")
    rgb = _without_alpha(_in_8_bits(image, path, notes), notes).convert("RGB")
    frames = _frames(image)  # last: it may read on in the file
    if frames > 1:
        notes.append(f"frame {image.tell() + 1} of {frames} is used")
    rgb = rgb if turn is None else rgb.transpose(turn)
    return rgb, f"{path}: {'; '.join(notes)}" if notes else None


def _first_tile(image):
    """(decoder, its arguments, a tuple) of a file that is not loaded yet; ("", ()) once it is, or without a file."""
    for decoder, _, _, given in getattr(image, "tile", ()):
        return decoder, given if isinstance(given, tuple) else (given,)
    return "", ()


def _stored(image):
    """How the file holds a pixel, in Pillow's words ("RGB;16B"); "" where nothing is said."""
    return next((word for word in _first_tile(image)[1] if isinstance(word, str)), "")


def _has_deep_colours(image):
    """Has the file colours of more than 8 bits, of which Pillow keeps 8? Of JPEG 2000 and AVIF it does not say."""
    decoder, given = _first_tile(image)
    deep = ";16" in _stored(image) or decoder == "SGI16"
    deep |= decoder.startswith("ppm") and isinstance(given[-1], int) and given[-1] > 255
    return deep and not image.mode.startswith("I")


def _scale_transparent_level(image):
    """Give the transparent grey level of a PNG of 2 or 4 bits the scale of its pixels, which Pillow makes 8 bits."""
    scale = {"L;2": 255 // 3, "L;4": 255 // 15}.get(_stored(image))
    if image.format == "PNG" and scale and isinstance(image.info.get("transparency"), int):
        image.info["transparency"] *= scale


def _orientation(image):
    """EXIF orientation, 1 to 8; 1 where the EXIF data cannot be read: the pixels may still be good."""
    try:
        return image.getexif().get(EXIF_ORIENTATION, 1)
    except Exception:  # as many kinds as there are ways to break it
        return 1


def _frames(image):
    """Frames of an animation or pages of a file. An MPO's further pictures are depth maps and previews."""
    if image.format not in ("GIF", "PNG", "WEBP", "TIFF", "AVIF"):
        return 1
    try:
        return image.n_frames
    except Exception:  # a later frame is broken
        return 1


def _in_8_bits(image, path, notes):
    """The picture with 8 bits per channel, and what was done for that in notes. InputError for unknown ranges.

    Grey of 16 bits is shown as it is, 65535 as white. What 32 bits stand for is not said in a file: white is the end
    of the narrowest of the usual ranges that holds all of it, or else the brightest pixel.
    """
    if image.mode == "F":
        raise InputError(f"{path} holds floating point numbers of unknown range; save it with 8 bits per channel")
    if image.mode == "CMYK":
        notes.append("CMYK converted to RGB without a colour profile")
    tags = getattr(image, "tag_v2", {})
    if image.mode == "L" and tags.get(TIFF_SAMPLE_FORMAT) == (2,) and image.getextrema()[1] > 127:  # signed
        raise InputError(f"{path} holds negative numbers of unknown range; save it with 8 bits per channel")
    if not image.mode.startswith("I"):
        return image
    values = torch.frombuffer(bytearray(image.convert("I").tobytes()), dtype=torch.int32).float()
    if tags.get(TIFF_BITS) == (32,) and tags.get(TIFF_SAMPLE_FORMAT, (1,)) == (1,):
        values += 2.0**32 * (values < 0)  # unsigned, but Pillow knows signed ones only
    low, high = (int(v) for v in values.aminmax())
    if low < 0:
        raise InputError(f"{path} holds negative numbers of unknown range; save it with 8 bits per channel")
    if image.mode == "I" and image.format not in ("PNG", "PPM"):
        white = next((2**n - 1 for n in (8, 10, 12, 14, 16) if high < 2**n), high)
        notes.append(f"32-bit grey reduced to 8 bits, {white} as white")
    else:
        bits = 12 if tags.get(TIFF_BITS) == (12,) else 16
        white = 2**bits - 1
        notes.append(f"{bits}-bit grey reduced to 8 bits")
    shade = values * (255 / white)
    if tags.get(TIFF_PHOTOMETRIC) == 0:  # 0 is white, which Pillow heeds with up to 8 bits only
        shade = 255 - shade
    if 0 < shade.max() < 16:  # 12 bits in a file of 16, for example
        notes.append(
            f"nearly black, its brightest pixel is {shade.max():.0f} of 255: stretch its range if that is wrong"
        )
    grey = Image.frombytes("L", image.size, _to_bytes(shade.round()))
    clear = image.info.get("transparency")
    if isinstance(clear, int):  # the grey level that is transparent
        grey.putalpha(Image.frombytes("L", image.size, _to_bytes(255 * (values != clear))))
    return grey


def _without_alpha(image, notes):
    """The picture on white where it is transparent, as transformers 5 paints it."""
    if image.mode in ("La", "RGBa"):  # colours times alpha, which only their own kind can undo
        image = image.convert(image.mode.upper())
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    least, most = image.getchannel("A").getextrema()
    if least < 255:
        notes.append(
            "transparent pixels are shown on white" if most else "it is transparent everywhere, shown as white"
        )
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def crop_note(picture, settings):
    """One line about a picture that loses more than a tenth to the centre crop; None for others."""
    lost = 1 - min(picture.image.size) / max(picture.image.size)
    if settings.mode != "crop" or lost <= 0.1:
        return None
    return f"{picture.path}: the centre crop drops {100 * lost:.0f} % of it; --image-mode pad keeps all of it"


# ---------------------------------------------------------------- pixel values


def preprocess(image, settings):
    """RGB picture -> pixel values (3, S, S) fp32; of "anyres" (1 + tiles, 3, S, S)."""
    if settings.mode == "anyres":
        return torch.stack([normalise(square, settings) for square in to_tiles(image, settings)[0]])
    return normalise(to_square(image, settings), settings)


# ---------------------------------------------------------------- LLaVA-NeXT: tiles


def to_tiles(image, settings):
    """RGB picture -> (squares, grid): the whole picture squashed to S x S, then its tiles row by row; (rows, columns).

    The tiles are those of the picture in the middle of a black canvas, as large as fits.
    """
    size, (wide, high) = settings.size, image.size
    canvas_wide, canvas_high = choose_canvas(image.size, settings.pinpoints, settings.order)
    if canvas_wide / wide < canvas_high / high:
        fitted = canvas_wide, min(math.ceil(high * (canvas_wide / wide)), canvas_high)
    else:
        fitted = min(math.ceil(wide * (canvas_high / high)), canvas_wide), canvas_high
    canvas = Image.new("RGB", (canvas_wide, canvas_high))
    left, top = (canvas_wide - fitted[0]) // 2, (canvas_high - fitted[1]) // 2
    canvas.paste(image.resize(fitted, Image.Resampling.BICUBIC), (left, top))
    grid = canvas_high // size, canvas_wide // size
    corners = [(column * size, row * size) for row in range(grid[0]) for column in range(grid[1])]
    tiles = [canvas.crop((x, y, x + size, y + size)) for x, y in corners]
    return [image.resize((size, size), Image.Resampling.BICUBIC), *tiles], grid


def choose_canvas(size, pinpoints, order):
    """(width, height) of the canvas that shows most of a picture's pixels, among equals with the least left empty.

    size: (width, height) of the picture. The two dialects differ where the list has both (a, b) and (b, a) and a
    picture is smaller than either: the first in the list is taken, which is the wide one here and the tall one there.
    """
    wide, high = size

    def merit(canvas):
        scale = min(canvas[0] / wide, canvas[1] / high)
        shown = min(int(wide * scale) * int(high * scale), wide * high)
        return shown, -(canvas[0] * canvas[1] - shown)

    return max((pair[::-1] if order == "hf" else pair for pair in pinpoints), key=merit)  # the first of the best


def kept_of_tiles(grid, patches, size, order):
    """(rows, columns), two slices: what of a canvas' (grid * patches) tokens is picture and not black border.

    grid: (rows, columns) of tiles; patches: per side of a tile; size: (width, height) of the picture.
    """
    high, wide = grid[0] * patches, grid[1] * patches

    def inner(long, scaled):  # HF rounds before it truncates, the original does not
        border = (long - int(round(scaled, 7) if order == "hf" else scaled)) // 2
        return slice(border, long - border)

    if size[0] / size[1] > wide / high:
        return inner(high, size[1] * (wide / size[0])), slice(0, wide)
    return slice(0, high), inner(wide, size[0] * (high / size[1]))


def tile_tokens(grid, patches, size, order):
    """Tokens of a picture in tiles: the whole one's, the kept ones of the tiles, one more behind each row of those."""
    rows, columns = (part.stop - part.start for part in kept_of_tiles(grid, patches, size, order))
    return patches**2 + rows * (columns + 1)


# ---------------------------------------------------------------- squares


def to_square(image, settings):
    """RGB picture -> the S x S pixels that the model looks at.

    Shortest edge to S (the longest to int(S * long / short)), centre crop S x S with offsets rounded down.
    """
    if settings.mode == "pad":
        image = pad_to_square(image, settings.mean)
    size, short = settings.size, min(image.size)
    wide, high = (int(size * side / short) for side in image.size)  # after the resize, before the crop
    left, top = (wide - size) // 2, (high - size) // 2
    if max(wide, high) <= STRIP * size:
        return image.resize((wide, high), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    # only the part that survives the crop, so that 10000 x 3 does not become a million pixels wide on the way; the
    # order of Pillow's two passes may change with it, and with the order the clipping of overshoots
    fx, fy = image.width / wide, image.height / high  # source pixels per resized pixel
    box = (left * fx, top * fy, min((left + size) * fx, image.width), min((top + size) * fy, image.height))
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box)


def normalise(square, settings):
    """S x S picture -> (3, S, S) fp32: times rescale, minus mean, over std."""
    pixels = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).view(settings.size, settings.size, 3)
    mean, std = (torch.tensor(t, device="cpu") for t in (settings.mean, settings.std))
    return ((pixels * settings.rescale - mean) / std).permute(2, 0, 1).contiguous()


def pad_to_square(image, mean):
    """The picture in the middle of a square canvas of the mean colour, as LLaVA-1.5 was trained."""
    side = max(image.size)
    if side * side > 2 * Image.MAX_IMAGE_PIXELS:
        raise InputError(
            f"a square around {image.width} x {image.height} pixels is too large; use --image-mode crop or a "
            "smaller picture"
        )
    canvas = Image.new("RGB", (side, side), tuple(int(255 * m) for m in mean))
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas


def with_mode(settings, mode, order="auto"):
    """settings with another mode and order of the tiles; "auto" leaves the checkpoint's own."""
    mode = settings.mode if mode == "auto" else mode
    if mode == "anyres" and not settings.pinpoints:
        raise InputError("the checkpoint knows no tiles (it is no LLaVA-NeXT); use --image-mode pad or crop")
    if order != "auto" and mode != "anyres":
        raise InputError(f"--anyres-order is about tiles, and the image mode is {mode}; leave it out")
    return replace(settings, mode=mode, order=settings.order if order == "auto" else order)
