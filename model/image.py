"""Pictures to pixel values, as the preprocessing of the checkpoints does it: Pillow bicubic; crop, pad or tiles.

S is the side, in pixels, of the squares that the vision tower takes.
"""

import base64
import io
import math
import os
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import unquote

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


@dataclass(frozen=True)
class Picture:
    """A picture that has been read: where from, its RGB pixels, what the conversion lost (or None)."""

    path: str
    image: Image.Image
    note: str = None


def read_image(source):
    """Picture from a path, "-" (bytes on stdin), a data: URI or a PIL image; InputError if it cannot be used."""
    if isinstance(source, Picture):
        return source
    if isinstance(source, Image.Image):
        return to_rgb(source, "(in memory)")
    source = local_path(source)
    shown = source if len(source) < 100 else source[:40] + "..."
    try:
        image = Image.open(_open(source))
        image.load()
    except FileNotFoundError as missing:
        raise InputError(f"no picture at {shown}; check the path") from missing
    except IsADirectoryError as folder:
        raise InputError(f"{shown} is a folder; give a picture file") from folder
    except UnidentifiedImageError as unknown:
        raise InputError(
            f"{shown} is empty or not a picture that Pillow can read; convert it to PNG or JPEG"
        ) from unknown
    except Image.DecompressionBombError as bomb:
        raise InputError(
            f"{shown} unpacks to far more pixels than a photograph has ({bomb}); scale it down first"
        ) from bomb
    except MemoryError:
        raise
    except Exception as broken:  # Pillow's readers raise a dozen kinds for broken files
        raise InputError(f"{shown} is truncated or broken ({broken}); save it again") from broken
    return to_rgb(image, shown)


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


def _open(source):
    source = str(source)
    if source == "-":
        return io.BytesIO(sys.stdin.buffer.read())
    if source.startswith("data:"):
        header, _, data = source.partition(",")
        if not header.endswith(";base64"):
            raise InputError("a data: URI must be base64; give data:image/png;base64,...")
        return io.BytesIO(base64.b64decode(data, validate=True))
    return source


def to_rgb(image, path):
    """Picture of a PIL image. Transparency is dropped, as LLaVA itself does (transformers 5 paints it white)."""
    if min(image.size) < 1:
        raise InputError(f"{path} has no pixels ({image.width} x {image.height}); give another picture")
    if image.mode == "F":
        raise InputError(f"{path} holds floating point numbers of unknown range; save it with 8 bits per channel")
    if image.mode.startswith("I"):
        # Pillow would clip to 255, which turns a 16-bit picture white
        grey = image.convert("I").point(lambda v: v * (1 / 257)).convert("L")
        return Picture(path, grey.convert("RGB"), f"{path}: 16-bit grey reduced to 8 bits")
    note = f"{path}: CMYK converted to RGB without a colour profile" if image.mode == "CMYK" else None
    return Picture(path, image.convert("RGB"), note)


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
    mean, std = torch.tensor(settings.mean), torch.tensor(settings.std)
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
