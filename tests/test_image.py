"""Pictures: equal to the reference on odd sizes, and one clear line for everything that cannot be used."""

import base64
import io

import pytest
import torch
from PIL import Image

from model.config import InputError
from model.image import STRIP, ImageSettings, preprocess, read_image, read_image_settings, with_mode
from tests.seeds import torch_random

SETTINGS = ImageSettings(size=56)


def noise(width, height, mode="RGB", seed=0):
    size = width * height * len(Image.new(mode, (1, 1)).getbands())
    data = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch_random(seed))
    return Image.frombytes(mode, (width, height), bytes(data.tolist()))


def full_resize_then_crop(image, settings):
    """The reference order of things: resize the whole picture, then cut out the middle."""
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
    strip = max(size) > STRIP * min(size)  # cut before it is resized: there the passes come in another order, and the
    image = noise(4, 4).resize(size) if strip else noise(*size)  # overshoots of noise are clipped at another time
    got, want = preprocess(image, SETTINGS), full_resize_then_crop(image, SETTINGS)
    off = (got - want).abs() * torch.tensor(SETTINGS.std)[:, None, None] * 255  # in steps of 8 bits
    assert off.max() < (1.01 if strip else 1e-3)


def test_extreme_strip_needs_no_extreme_memory():
    pixels = preprocess(noise(10000, 3), SETTINGS)
    assert pixels.shape == (3, 56, 56) and pixels.isfinite().all()


def test_pad_shows_the_whole_picture_on_the_mean_colour():
    image = Image.new("RGB", (112, 56), "white")
    pixels = preprocess(image, with_mode(SETTINGS, "pad"))
    grey = torch.tensor([int(255 * m) / 255 for m in SETTINGS.mean])
    margin = (grey - torch.tensor(SETTINGS.mean)) / torch.tensor(SETTINGS.std)
    torch.testing.assert_close(pixels[:, 0, 28], margin)
    torch.testing.assert_close(pixels[:, -1, 28], margin)
    assert (pixels[:, 28] > 1.5).all()  # white from edge to edge


def test_crop_shows_the_middle():
    image = Image.new("RGB", (112, 56), "black")
    image.paste("white", (28, 0, 84, 56))
    assert (preprocess(image, SETTINGS)[:, :, 4:52] > 1.5).all()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "1", "YCbCr"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("picture.tif" if mode in ("CMYK", "YCbCr", "LA") else "picture.png")
    Image.new("RGB", (20, 10), (200, 30, 30)).convert(mode).save(path)
    picture = read_image(str(path))
    assert picture.image.mode == "RGB" and picture.image.size == (20, 10)
    assert bool(picture.note) == (mode == "CMYK")


def test_alpha_is_dropped_not_blended(tmp_path):
    Image.new("RGBA", (4, 4), (10, 200, 30, 0)).save(tmp_path / "a.png")
    assert read_image(str(tmp_path / "a.png")).image.getpixel((0, 0)) == (10, 200, 30)


def test_sixteen_bits_keep_their_brightness(tmp_path):
    Image.new("I;16", (4, 4), 257 * 100).save(tmp_path / "deep.png")
    picture = read_image(str(tmp_path / "deep.png"))
    assert picture.image.getpixel((0, 0)) == (100, 100, 100) and "16-bit" in picture.note


def test_a_data_uri_is_a_picture():
    buffer = io.BytesIO()
    noise(5, 6).save(buffer, "PNG")
    uri = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    assert read_image(uri).image.tobytes() == noise(5, 6).tobytes()


def png_bytes(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


BROKEN = {
    "empty": b"",
    "text": b"this is no picture\n",
    "truncated": png_bytes(noise(64, 64))[:2000],
    "header only": png_bytes(noise(64, 64))[:40],
    "bit rot": png_bytes(noise(64, 64))[:500] + bytes(100) + png_bytes(noise(64, 64))[600:],
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_file_is_one_clear_line(tmp_path, what):
    path = tmp_path / "broken.png"
    path.write_bytes(BROKEN[what])
    with pytest.raises(InputError, match="; ") as error:
        read_image(str(path))
    assert "\n" not in str(error.value) and "broken.png" in str(error.value)


@pytest.mark.parametrize(
    "source", ["/nowhere/x.png", "http://example.com/x.png", "data:image/png,abc", "data:;base64,@@"]
)
def test_what_is_not_there_is_one_clear_line(source):
    with pytest.raises(InputError, match="; "):
        read_image(source)


def test_a_folder_is_no_picture(tmp_path):
    with pytest.raises(InputError, match="is a folder"):
        read_image(str(tmp_path))


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    noise(64, 64).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(InputError, match="far more pixels"):
        read_image(str(tmp_path / "bomb.png"))


def test_a_square_around_a_strip_is_bounded():
    with pytest.raises(InputError, match="--image-mode crop"):
        preprocess(Image.new("RGB", (40000, 1)), with_mode(SETTINGS, "pad"))


@pytest.mark.parametrize(
    ("text", "mode"),
    [
        ("{}", "crop"),
        ('{"do_pad": true}', "pad"),
        ('{"do_pad": false}', "crop"),
        ('{"size": 56, "crop_size": {"height": 56, "width": 56}}', "crop"),
    ],
)
def test_the_checkpoint_decides_the_mode(tmp_path, text, mode):
    (tmp_path / "preprocessor_config.json").write_text(text)
    assert read_image_settings(tmp_path, 56).mode == mode


@pytest.mark.parametrize(
    "text", ['{"size": {"shortest_edge": 336}}', '{"crop_size": 55}', '{"resample": 2}', "{broken"]
)
def test_settings_that_contradict_the_model_are_refused(tmp_path, text):
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(InputError, match="; "):
        read_image_settings(tmp_path, 56)
