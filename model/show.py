"""Drawings of the vision tokens that each head of each layer kept, as a PNG (Pillow) or an HTML page.

    generation = Generation(llava, "What is this?", ["x.png"], prune="plphp", remember=True)
    "".join(generation)
    save(generation, "kept.png")     # or kept.html

Panels show the picture as the model sees it. What a head dropped is grey and hatched, whatever its colour.
"""

import base64
import contextlib
import io
import json
import re
import shlex
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from .config import InputError
from .flags import check_drawing
from .image import local_path

CLASSES = {"attentive": "#0072b2", "balanced": "#777777", "indifferent": "#d55e00"}  # Okabe and Ito
FIRST, SECOND = "#d55e00", "#0072b2"  # frames around tokens that only one of two questions keeps
SCALE = "#00224e", "#fee838", "#7d7c78"  # lowest, highest, middle: safe for colour-blind readers

# in pixels; shown at a third of this size, as on pages, the smallest letters still have 11 pixels
WIDTH, MARGIN, GAP, COLUMNS = 1640, 32, 24, 4
CELL = (WIDTH - 2 * MARGIN - (COLUMNS - 1) * GAP) // COLUMNS
HUGE, LARGE, SMALL = 52, 42, 38  # font sizes
GREY = "#555555"
FONTS = (None, "DejaVuSans.ttf", "Arial.ttf", "NotoSansCJK-Regular.ttc", "wqy-zenhei.ttc", "msyh.ttc")  # None: Pillow's


@dataclass
class Area:
    """A picture, or the joined tiles of one (LLaVA-NeXT), with its vision tokens."""

    name: str  # "" for the only picture
    image: Image.Image  # as the model sees it
    tokens: torch.Tensor  # (rows, columns) int64, indices into the vision tokens of the prompt


@dataclass
class Shown:
    """What one run kept, of V vision tokens in all.

    prompt       the question for which tokens were chosen
    keep         (L, Hkv, V) bool: True where a head of a layer keeps a token
    flags        the run.py flags that select this pruning; wanted: the requested fraction, or None
    bytes_full, bytes_held     K and V of the whole prompt, of its kept tokens
    share        fraction of the (head, vision token) pairs that is kept, None for that of keep: they differ if tokens
                 were merged, because a new token is drawn at one of those that it is made of
    gammas       per layer, the attention (0 to 1) of `rows` to pictures; filled in by tools/show_pruning.py
    thresholds   (alpha, beta) of PLPHP, if gammas are known
    """

    prompt: str
    method: str
    flags: str
    wanted: float
    areas: list
    keep: torch.Tensor
    bytes_full: float
    bytes_held: float
    gammas: list = None
    thresholds: tuple = None
    rows: str = "the last prompt row"
    share: float = None

    @classmethod
    def of(cls, generation):
        """From a Generation with `remember`, once its prompt is computed. InputError if there is nothing to show."""
        if not generation.images:
            raise InputError("there is no picture to draw on; give --image")
        if generation.masks is None:
            raise InputError("what the heads kept was not recorded; make the Generation with remember=True and run it")
        masks, prune, held = generation.masks, generation.prune, generation.bytes_held
        keep = torch.cat([masks[..., start:stop] for start, stop in generation.spans], 2)
        name, spec = (prune.name, prune.spec) if prune else ("none", "none")
        question = generation.prompt
        if generation.pruned_for != question and not keep.all():
            question = f"{generation.pruned_for} (asked later: {question})"
        whole, vision = generation.prompt_tokens, generation.vision_tokens
        kept = whole - vision + sum(generation.kept) / len(masks)  # tokens of the prompt per head, on average
        flags, full = f"--prune {shlex.quote(spec)}", held * whole / kept
        areas, wanted = list(_areas(generation)), generation.wanted
        return cls(question, name, flags, wanted, areas, keep, full, held, share=generation.retention)

    def of_area(self, area):
        """What is kept of an Area: (L, Hkv, rows, columns) bool."""
        return self.keep[:, :, area.tokens]

    @property
    def title(self):
        """One line: the method and the fraction of the vision tokens that it kept."""
        layers, heads, tokens = self.keep.shape
        if self.keep.all():
            unpruned = "unpruned" if self.method == "none" else self.method
            return f"{unpruned}: all {layers * heads} heads keep all {tokens} vision tokens"
        share = self.keep.double().mean().item() if self.share is None else self.share
        asked = "" if self.wanted is None else f", {100 * self.wanted:.1f} % asked for"
        return f"{self.method}: {100 * share:.1f} % of the vision tokens kept{asked}"

    @property
    def memory(self):
        """One line: bytes of the prompt's KV cache, in full and held."""
        full, held = self.bytes_full / 1e6, self.bytes_held / 1e6
        return f"K and V of the prompt: {full:.2f} MB, {held:.2f} MB held ({100 * held / full:.0f} %)"

    @property
    def classes(self):
        """PLPHP's class of each layer, "" for other methods."""
        return [layer_class(g, self.thresholds) if self.thresholds else "" for g in self.gammas or ()]


def save(generation, path):
    """Draw what each head kept for an answer into a .png or .html file -> one line about it. Replaces an existing file.

    generation: made with `remember`, after its prefill. InputError if there is nothing to draw or as in `check_path`;
    OSError, in one line, if the file cannot be written.
    """
    check_path(path, generation)
    try:
        write(path, Shown.of(generation))
    except OSError as broken:
        raise OSError(f"{path} cannot be written ({broken.strerror}); give another name") from broken
    return f"{path}: which vision tokens each head kept"


def check_path(path, generation):
    """InputError if a drawing cannot be written there, or would replace a picture or a file of the checkpoint."""
    pictures = [image["path"] for image in generation.images]
    pictures = [local_path(name) for name in pictures if name[:5].lower() != "data:"]
    check_drawing(path, (*pictures, *generation.checkpoint.folder.iterdir()))


def write(path, shown, second=None, layers=None, heads=None):
    """Write the figure or the page of one or two Shown to path; see `draw` and `page`.

    InputError for a suffix other than .png and .html; OSError.
    """
    check_drawing(path, ())
    as_page = Path(path).suffix.lower() == ".html"
    Path(path).write_bytes(page(shown, second).encode() if as_page else _png(draw(shown, second, layers, heads)))


def _areas(generation):
    """Yield one Area per picture, two for a picture in tiles that show part of it."""
    first, patch, seen = 0, generation.checkpoint.config.vision_config.patch_size, Counter()
    for picture in generation.pictures:
        kind, layout = "frame" if picture.settings.mode == "frame" else "picture", picture.layout
        seen[kind] += 1
        name = f"{kind} {seen[kind]}" if len(generation.pictures) > 1 else ""
        used = layout.side * patch  # pixels per side of a square; a few at its right and bottom may be in no patch
        squares = [square.crop((0, 0, used, used)) for square in picture.squares]
        start = first + layout.cls
        last = start + layout.square[0] * layout.square[1]
        whole = ", ".join(word for word in (name, "whole" if layout.grid else "") if word)
        yield Area(whole, squares[0], torch.arange(start, last).view(layout.square))
        if layout.grid and all(layout.map):  # the map of a very thin picture is empty
            (high, wide), (rows, columns) = layout.grid, layout.cut
            joined = Image.new("RGB", (wide * used, high * used))
            for i, tile in enumerate(squares[1:]):
                joined.paste(tile, (i % wide * used, i // wide * used))
            box = [patch * n for n in (columns.start, rows.start, columns.stop, rows.stop)]
            tokens = torch.arange(last, first + layout.tokens).view(layout.map[0], -1)[:, :-1]  # without newlines
            yield Area(f"{name}, tiles" if name else "tiles", joined.crop(box), tokens)
        first += layout.tokens


def layer_class(gamma, thresholds):
    """The name of a layer's class in PLPHP. gamma: 0 to 1; thresholds: (alpha, beta)."""
    alpha, beta = thresholds
    return "attentive" if gamma >= alpha else "indifferent" if gamma < beta else "balanced"


# ---------------------------------------------------------------- the figure


def draw(shown, second=None, layers=None, heads=None):
    """PIL image, `WIDTH` pixels wide, of what was kept. layers, heads: which get a panel; None chooses a few.

    second: what another question about the same pictures keeps; panels then frame the tokens that only one keeps.
    """
    number, width, tokens = shown.keep.shape
    rows = [_lines(shown.title, HUGE), _lines(shown.flags, SMALL, GREY), _lines(f"“{shown.prompt}”", LARGE)]
    if second:
        said = f"Framed in orange: kept only for this question. In blue: only for “{second.prompt}”"
        rows.append(_lines(said, LARGE))
    cells = []
    for area in shown.areas:
        count, title = shown.of_area(area).sum((0, 1)), (area.name or "the picture") + " as\nthe model sees it"
        cells.append(_titled(title, _framed(panel(area, count >= 0))))
        drawn = _framed(heat(count, number * width, *_size(count)))
        cells.append(_titled("how many heads\nkeep each token", drawn, _scale(number * width)))
    if shown.keep.all() and (not second or second.keep.all()):
        return _page(rows + _in_rows(cells[::2]))
    equal = _equal(shown.keep)
    each = f"Every head keeps {shown.keep[0, 0].sum()} of {tokens} tokens. " if equal else ""
    rows.append(_lines(f"Hatched: dropped. {each}{shown.memory}.", SMALL, GREY))
    if shown.gammas and shown.thresholds:
        words = "Attentive: gamma is alpha or more, the layer keeps more. Indifferent: below beta, it keeps less. "
        rows.append(_lines(words + "Balanced: between them.", SMALL, GREY))
    if shown.gammas or not equal:
        cells.append(_counts(shown))
    rows += _in_rows(cells)
    layers = sorted({min(1, number - 1), number // 2, number - 1}) if layers is None else layers
    some = max(1, COLUMNS // len(shown.areas))
    heads = sorted({i * (width - 1) // max(1, some - 1) for i in range(min(some, width))}) if heads is None else heads
    which = ", ".join(map(str, layers)), ", ".join(map(str, heads))
    rows.append(_lines(f"Layers {which[0]} of {number}, KV heads {which[1]} of {width} (numbered from 0):", LARGE))
    for layer in layers:
        rows += _in_rows([_cell(shown, second, area, layer, head) for head in heads for area in shown.areas])
    return _page(rows)


def _cell(shown, second, area, layer, head):
    """The titled panel of an area for one head."""
    kept = shown.of_area(area)[layer, head]
    other = second and second.of_area(area)[layer, head]
    count = "" if _equal(shown.of_area(area)) else f": {int(kept.sum())} of {kept.numel()}"
    title = f"layer {layer}, head {head}\n{area.name or (count and 'kept')}{count}".rstrip()
    return _titled(title, _framed(panel(area, kept, other)))


def _size(tokens):
    """(width, height) in pixels of a map of tokens (rows, columns) in a cell of the figure; tokens are squares."""
    rows, columns = tokens.shape
    pixels = max(1, CELL // max(rows, columns))
    return columns * pixels, rows * pixels


def panel(area, kept, other=None):
    """An area in a cell of the figure; tokens where kept (rows, columns) bool is False are grey and hatched.

    other: kept for a second question. Tokens that only one of the two keeps are framed.
    """
    picture = area.image.resize(_size(kept), Image.Resampling.BICUBIC)
    picture = Image.composite(picture, veiled(picture), _grey(255 * kept, *picture.size))
    pen, pixels = ImageDraw.Draw(picture), picture.width // kept.shape[1]  # pixels per token
    for row, column in [] if other is None else (kept ^ other).nonzero().tolist():
        x, y, ink = column * pixels, row * pixels, FIRST if kept[row, column] else SECOND
        pen.rectangle((x + 1, y + 1, x + pixels - 2, y + pixels - 2), outline=ink, width=2)
    return picture


def _grey(values, width, height):
    """A grey image of width x height pixels from values (rows, columns), 0 to 255."""
    rows, columns = values.shape
    image = Image.frombytes("L", (columns, rows), bytes(values.byte().flatten().tolist()))
    return image.resize((width, height), Image.Resampling.NEAREST)


def veiled(picture):
    """An RGB picture in light grey and hatched, so that it differs from any original, white and black ones included."""
    grey = Image.blend(picture.convert("L").convert("RGB"), Image.new("RGB", picture.size, (185, 185, 185)), 0.75)
    pen = ImageDraw.Draw(grey)
    for x in range(-picture.height, picture.width, 8):
        pen.line((x, picture.height, x + picture.height, 0), fill=(135, 135, 135))
    return grey


def heat(counts, most, width, height, written=False):
    """counts (rows, columns), integers from 0 to most -> a coloured image of width x height pixels.

    written: also write the numbers, if they fit.
    """
    image = ImageOps.colorize(_grey(255 * counts / most, width, height), *SCALE)
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(SMALL)
    wide, high = width / counts.shape[1], height / counts.shape[0]
    if written and wide > font.getlength(str(most)) + 8 and high > SMALL:
        for row, column in torch.cartesian_prod(*map(torch.arange, counts.shape)).tolist():
            count = counts[row, column].item()
            ink = "black" if count > 0.6 * most else "white"
            pen.text(((column + 0.5) * wide, (row + 0.5) * high), str(count), ink, font, anchor="mm")
    return image


def _equal(keep):
    """Whether all heads keep the same number of tokens, which is then written once. keep: (L, Hkv, ...) bool."""
    return keep.flatten(2).sum(2).unique().numel() == 1


def _counts(shown):
    """shown -> an image, two cells wide: kept tokens per layer and head; if known, gamma per layer to the right."""
    counts, most = shown.keep.sum(2), shown.keep.shape[2]
    font = ImageFont.load_default(SMALL)
    left, below = 2 * SMALL, SMALL + 12  # space for layer and head numbers
    width = (CELL if shown.gammas else 2 * CELL + GAP) - left
    table = heat(counts, most, width, CELL - below, written=not _equal(shown.keep))
    block = Image.new("RGB", (2 * CELL + GAP, CELL), "white")
    block.paste(table, (left, 0))
    pen = ImageDraw.Draw(block)
    layers, heads = counts.shape
    high, wide = table.height / layers, table.width / heads
    for layer in range(0, layers, 1 + int(SMALL / high)):
        pen.text((left - 8, (layer + 0.5) * high), str(layer), "black", font, anchor="rm")
    for head in range(0, heads, 1 + int(1.5 * SMALL / wide)):
        pen.text((left + (head + 0.5) * wide, table.height + 4), str(head), "black", font, anchor="ma")
    title = "tokens kept, by layer (down)\nand KV head (across)"
    if shown.gammas:
        _bars(pen, shown, CELL + GAP, high, table.height)
        title += f". Bars: gamma, attention of {shown.rows} to pictures, 0 to 1"
        if shown.thresholds:
            title += ". Lines: beta {1:g}, alpha {0:g}".format(*shown.thresholds)
    return _titled(title, block, _scale(most))


def _bars(pen, shown, left, high, bottom):
    """Draw each layer's gamma, 0 to 1, as a bar coloured by its class, and lines at PLPHP's thresholds."""
    font = ImageFont.load_default(SMALL)
    pen.rectangle((left, 0, left + CELL - 1, bottom - 1), outline="#999999")
    for layer, gamma in enumerate(shown.gammas):
        fill = CLASSES[shown.classes[layer] or "balanced"]
        pen.rectangle((left, layer * high + 0.2 * high, left + gamma * CELL, layer * high + 0.8 * high), fill=fill)
        if high > SMALL:
            text, end = f"{gamma:.2f} {shown.classes[layer]}", gamma * CELL
            long = font.getlength(text)
            x, ink = (6, "white") if long + 12 < end else (min(end + 6, CELL - long - 6), "black")
            y = (layer + 0.5) * high
            edge = 2 if ink == "black" else 0  # white, because the label may overlap its bar
            pen.text((left + x, y), text, ink, font, anchor="lm", stroke_width=edge, stroke_fill="white")
    for value in shown.thresholds or ():
        pen.line((left + value * CELL, 0, left + value * CELL, bottom), fill="black", width=2)


def _scale(most):
    """The colour scale, from 0 to most, as wide as a cell."""
    bar, middle, font = Image.new("RGB", (CELL, SMALL + 10), "white"), SMALL // 2 + 5, ImageFont.load_default(SMALL)
    pen, right = ImageDraw.Draw(bar), int(CELL - font.getlength(str(most)) - 10)
    bar.paste(heat(torch.arange(256)[None], 255, right - SMALL, 21), (SMALL, middle - 10))
    pen.text((0, middle), "0", "black", font, anchor="lm")
    pen.text((CELL, middle), str(most), "black", font, anchor="rm")
    return bar


def _lines(text, size, fill="black", width=WIDTH - 2 * MARGIN, most=4):
    """Text as an image, broken into lines of at most `width` pixels; text beyond `most` lines is cut off."""
    font, lines = _font(text, size), []
    for paragraph in text.split("\n"):
        line = ""
        for word in re.findall(r"[^\s,]+,?\s?|\s|,", paragraph):
            for piece in [word] if font.getlength(word) <= width else word:
                if font.getlength((line + piece).rstrip()) > width:
                    lines.append(line)
                    line = ""
                line += piece
        lines.append(line)
    if len(lines) > most:
        lines = [*lines[: most - 1], lines[most - 1].rstrip()[:-2] + " …"]
    image = Image.new("RGB", (width, round(1.25 * size * len(lines))), "white")
    pen = ImageDraw.Draw(image)
    for i, line in enumerate(lines):
        pen.text((0, round(1.25 * size * i)), line, fill, font)
    return image


def _font(text, size):
    """The first font, Pillow's or a system font, with all letters of the text; else the one that lacks the fewest."""
    found, letters = {}, {letter for letter in text if not letter.isspace()}
    for name in FONTS:
        with contextlib.suppress(OSError):  # the system does not have this font
            font = ImageFont.truetype(name, size) if name else ImageFont.load_default(size)
            absent = bytes(font.getmask("\uffff"))
            lacks = sum(bytes(font.getmask(letter)) == absent for letter in letters)
            found.setdefault(lacks, font)
            if lacks == 0:
                break
    return found[min(found)]


def _titled(title, *images):
    """Images stacked vertically, with a title above."""
    width = max(CELL, *(image.width for image in images))
    return _stack([_lines(title, SMALL, width=width), *images], 4)


def _framed(image):
    """Draw a line around an image, so that a white one has an edge."""
    ImageDraw.Draw(image).rectangle((0, 0, image.width - 1, image.height - 1), outline="#999999")
    return image


def _in_rows(cells):
    """Images, one or two cells wide -> sheets of the full width with as many of them side by side as fit."""
    rows, right = [], WIDTH
    for cell in cells:
        if right + cell.width > WIDTH - 2 * MARGIN:
            rows.append([])
            right = 0
        rows[-1].append((right, cell))
        right += cell.width + GAP
    sheets = [Image.new("RGB", (WIDTH - 2 * MARGIN, max(cell.height for _, cell in row)), "white") for row in rows]
    for sheet, row in zip(sheets, rows, strict=True):
        for left, cell in row:
            sheet.paste(cell, (left, 0))
    return sheets


def _stack(images, gap):
    sheet = Image.new("RGB", (max(i.width for i in images), sum(i.height + gap for i in images) - gap), "white")
    y = 0
    for image in images:
        sheet.paste(image, (0, y))
        y += image.height + gap
    return sheet


def _page(rows):
    return ImageOps.expand(_stack(rows, GAP), MARGIN, "white")


# ---------------------------------------------------------------- the page


def page(shown, second=None):
    """The HTML of a self-contained page: no network, no framework. second: as in `draw`."""
    data = {
        "tokens": shown.keep.shape[2],
        "areas": [{"name": a.name, "url": _data_url(a.image), "shape": list(a.tokens.shape)} for a in shown.areas],
        "questions": [_question(s) for s in (shown, second) if s is not None],
    }
    html = (Path(__file__).parent / "show.html").read_text(encoding="utf-8")
    return html.replace("@@DATA@@", json.dumps(data).replace("<", "\\u003c"))


def _question(shown):
    layers, heads, _ = shown.keep.shape
    of_areas = [shown.of_area(area).flatten(2).int().tolist() for area in shown.areas]
    return {
        "prompt": shown.prompt,
        "title": shown.title,
        "flags": shown.flags,
        "memory": shown.memory,
        "keep": [[["".join(map(str, bits[i][j])) for bits in of_areas] for j in range(heads)] for i in range(layers)],
        "counts": shown.keep.sum(2).tolist(),
        "gammas": [round(g, 4) for g in shown.gammas or ()],
        "rows": shown.rows,
        "classes": shown.classes,
    }


def _data_url(image):
    return "data:image/png;base64," + base64.b64encode(_png(image)).decode()


def _png(image):
    """The bytes of a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
