"""Pictures to pixel values, as the CLIP preprocessing of the checkpoints does it: Pillow bicubic, crop or pad."""

import base64
import io
import sys
from dataclasses import dataclass, replace
from pathlib import Path

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
    mode: str = "crop"  # "crop": centre square of the picture; "pad": the whole picture on a square canvas
    mean: tuple = CLIP_MEAN
    std: tuple = CLIP_STD
    rescale: float = 1 / 255


def read_image_settings(folder, image_size):
    """ImageSettings of a checkpoint folder; image_size is the config's, which the file must not contradict."""
    path = Path(folder) / "preprocessor_config.json"
    raw = read_json(path)
    if raw is None:  # transformers 5 writes the same thing into another file
        path = Path(folder) / "processor_config.json"
        raw = (read_json(path) or {}).get("image_processor")
    with making_sense_of(path):
        raw = {key: value for key, value in (raw or {}).items() if value is not None}
        # a number, {"shortest_edge": n} or {"height": n, "width": n}
        parts = (raw.get("size", image_size), raw.get("crop_size", image_size))
        sizes = {v for part in parts for v in (part.values() if isinstance(part, dict) else (part,))}
        mean, std = (
            tuple(float(v) for v in raw.get(k, d)) for k, d in (("image_mean", CLIP_MEAN), ("image_std", CLIP_STD))
        )
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"mean {mean}, std {std}")
        rescale = float(raw.get("rescale_factor", 1 / 255))
    if sizes != {image_size}:
        raise InputError(
            f"preprocessor_config.json resizes to {sorted(map(str, sizes))} but the vision tower takes {image_size}; "
            "use the files of one checkpoint"
        )
    if raw.get("resample", 3) != 3:
        raise InputError(
            f"preprocessor_config.json asks for resample {raw['resample']}; only 3 (bicubic) is implemented"
        )
    off = [k for k in ("do_resize", "do_center_crop", "do_rescale", "do_normalize") if raw.get(k) is False]
    if off or (isinstance(raw.get("size"), dict) and "height" in raw["size"]):
        what = f"{off[0]} false" if off else "a resize that does not keep the aspect"
        raise InputError(f"{path} asks for {what}; only resize, centre crop, rescale and normalise are implemented")
    pad = raw.get("do_pad") or raw.get("image_aspect_ratio") == "pad"
    return ImageSettings(image_size, "pad" if pad else "crop", mean, std, rescale)


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
    shown = source if len(str(source)) < 100 else str(source)[:40] + "..."
    if str(source).startswith(("http://", "https://")):
        raise InputError(f"{shown} is a web address; nothing is downloaded here: save the picture and give its path")
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
    """RGB picture -> pixel values (3, S, S) fp32."""
    return normalise(to_square(image, settings), settings)


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


def with_mode(settings, mode):
    """settings with another mode; "auto" leaves the checkpoint's own."""
    return settings if mode == "auto" else replace(settings, mode=mode)
