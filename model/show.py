"""Drawings of the vision tokens that each head of each layer kept, as a PNG (Pillow) or an HTML page.

    generation = Generation(llava, "What is this?", ["x.png"], prune="plphp", remember=True)
    "".join(generation)
    save(generation, "kept.png")     # or kept.html

Panels show the picture as the model sees it. What a head dropped is grey and hatched, whatever its colour.
"""

import base64
import io
import json
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from .config import InputError
from .image import local_path

FORMATS = (".png", ".html")
CLASSES = {"attentive": "#0072b2", "balanced": "#777777", "indifferent": "#d55e00"}  # Okabe and Ito
FIRST, SECOND = "#d55e00", "#0072b2"  # frames around tokens that only one of two questions keeps

# in pixels; pages show the picture at a third of its size or more, where the smallest letters have 11 pixels
WIDTH, MARGIN, GAP, COLUMNS = 1640, 32, 24, 4
CELL = (WIDTH - 2 * MARGIN - (COLUMNS - 1) * GAP) // COLUMNS
HUGE, LARGE, SMALL = 52, 42, 38  # font sizes
GREY = "#555555"
FONTS = (None, "DejaVuSans.ttf", "Arial.ttf", "NotoSansCJK-Regular.ttc", "wqy-zenhei.ttc", "msyh.ttc")  # None: Pillow's


@dataclass
class View:
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
    gammas       per layer, the attention (0 to 1) of `rows` to pictures; filled in by tools/show_pruning.py
    thresholds   (alpha, beta) of PLPHP, if gammas are known
    """

    prompt: str
    method: str
    flags: str
    wanted: float
    views: list
    keep: torch.Tensor
    bytes_full: float
    bytes_held: float
    gammas: list = None
    thresholds: tuple = None
    rows: str = "the last prompt row"

    @classmethod
    def of(cls, generation):
        """From a Generation with `remember`, once its prompt is computed. InputError if there is nothing to show."""
        if not generation.images:
            raise InputError("there is no picture to draw on; give --image")
        if generation.masks is None:
            raise InputError("what the heads kept was not recorded; make the Generation with remember=True and run it")
        masks, prune = generation.masks, generation.prune
        full = generation.bytes_held * masks.numel() / masks.sum().item()
        keep = torch.cat([masks[..., start:stop] for start, stop in generation.spans], 2)
        name, spec = (prune.name, prune.spec) if prune else ("none", "none")
        flags, views = f"--prune {shlex.quote(spec)}", list(_views(generation))
        question = generation.prompt
        if generation.pruned_for != question and not keep.all():
            question = f"{generation.pruned_for} (asked later: {question})"
        return cls(question, name, flags, generation.wanted, views, keep, full, generation.bytes_held)

    def of_view(self, view):
        """What is kept of a View: (L, Hkv, rows, columns) bool."""
        return self.keep[:, :, view.tokens]

    @property
    def title(self):
        """One line: the method and the fraction of the vision tokens that it kept."""
        layers, heads, tokens = self.keep.shape
        if self.keep.all():
            unpruned = "unpruned" if self.method == "none" else self.method
            return f"{unpruned}: all {layers * heads} heads keep all {tokens} vision tokens"
        asked = "" if self.wanted is None else f", {100 * self.wanted:.1f} % asked for"
        return f"{self.method}: {100 * self.keep.double().mean():.1f} % of the vision tokens kept{asked}"

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

    generation: made with `remember`, after its prefill. InputError if there is nothing to draw, for another suffix, or
    if the path is a file that the run reads; OSError, in one line, if it cannot be written.
    """
    check_path(path, generation)
    try:
        write(path, Shown.of(generation))
    except OSError as broken:
        raise OSError(f"{path} cannot be written ({broken.strerror}); give another name") from broken
    return f"{path}: which vision tokens each head kept"


def check_path(path, generation):
    """InputError if the path has another suffix, or is one of the pictures or a file of the checkpoint."""
    _ending(path)
    pictures = [image["path"] for image in generation.images]
    pictures = [local_path(name) for name in pictures if name[:5].lower() != "data:"]
    for file in (*pictures, *generation.checkpoint.folder.iterdir()):
        if os.path.exists(path) and os.path.exists(file) and os.path.samefile(path, file):
            raise InputError(f"the drawing would replace {file}, which this run reads; give another name")


def write(path, shown, second=None, layers=None, heads=None):
    """Write the figure or the page of one or two Shown to path; see `draw` and `page`. OSError if that fails."""
    if _ending(path) == ".html":
        data = page(shown, second).encode()
    else:
        file = io.BytesIO()
        draw(shown, second, layers, heads).save(file, "PNG")
        data = file.getvalue()
    Path(path).write_bytes(data)


def _ending(path):
    """The path's suffix in lower case. InputError if it is not in FORMATS."""
    ending = Path(path).suffix.lower()
    if ending not in FORMATS:
        raise InputError(f"cannot draw {path}; give a name that ends in {' or '.join(FORMATS)}")
    return ending


def _views(generation):
    """Yield one View per picture, two for a picture in tiles."""
    tower, first = generation.checkpoint.config.vision_config, 0
    patch, side = tower.patch_size, tower.image_size // tower.patch_size
    for number, picture in enumerate(generation.pictures, 1):
        name, grid = f"picture {number}" if len(generation.pictures) > 1 else "", picture.grid
        last = first + picture.tokens
        seen = [square.crop((0, 0, side * patch, side * patch)) for square in picture.squares]
        if grid is None:  # a CLS token, if the model keeps it, is the first
            yield View(name, seen[0], torch.arange(last - side**2, last).view(side, side))
        else:
            name = name and name + ", "
            split = first + side**2
            yield View(name + "whole", seen[0], torch.arange(first, split).view(side, side))
            rows, columns = picture.cut
            joined = Image.new("RGB", (grid[1] * side * patch, grid[0] * side * patch))
            for i, tile in enumerate(seen[1:]):
                joined.paste(tile, (i % grid[1] * side * patch, i // grid[1] * side * patch))
            box = [patch * n for n in (columns.start, rows.start, columns.stop, rows.stop)]
            tokens = torch.arange(split, last).view(rows.stop - rows.start, -1)[:, :-1]  # without newlines
            yield View(name + "tiles", joined.crop(box), tokens)
        first = last


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
    total, cells = number * width, []
    for view in shown.views:
        count = shown.of_view(view).sum((0, 1))
        cells += [
            _titled((view.name or "the picture") + " as\nthe model sees it", _framed(panel(view, count >= 0))),
            _titled("how many heads\nkeep each token", _framed(heat(count, total, CELL, CELL)), _scale(total, CELL)),
        ]
    rows = [_lines(shown.title, HUGE), _lines(shown.flags, SMALL, GREY), _lines(f"“{shown.prompt}”", LARGE)]
    if second is not None:
        rows.append(
            _lines(f"Framed in orange: kept only for this question. In blue: only for “{second.prompt}”", LARGE)
        )
    if shown.keep.all() and (second is None or second.keep.all()):
        rows += _in_rows(cells[::2])
        return _page(rows)
    equal = _equal(shown.keep)
    each = f"Every head keeps {shown.keep[0, 0].sum()} of {tokens} tokens. " if equal else ""
    rows += [_lines(f"Hatched: dropped. {each}{shown.memory}.", SMALL, GREY)]
    if shown.gammas and shown.thresholds:
        words = "Attentive: gamma is alpha or more, the layer keeps more. Indifferent: below beta, it keeps less. "
        rows.append(_lines(words + "Balanced: between them.", SMALL, GREY))
    rows += _in_rows(cells, [] if equal and not shown.gammas else [_counts(shown)])
    layers = sorted({min(1, number - 1), number // 2, number - 1}) if layers is None else layers
    some = max(1, COLUMNS // len(shown.views))
    heads = sorted({i * (width - 1) // max(1, some - 1) for i in range(min(some, width))}) if heads is None else heads
    which = ", ".join(map(str, layers)), ", ".join(map(str, heads))
    rows.append(_lines(f"Layers {which[0]} of {number}, KV heads {which[1]} of {width} (numbered from 0):", LARGE))
    for layer in layers:
        cells = []
        for head in heads:
            for view in shown.views:
                kept = shown.of_view(view)[layer, head]
                other = None if second is None else second.of_view(view)[layer, head]
                count = "" if _equal(shown.of_view(view)) else f": {int(kept.sum())} of {kept.numel()}"
                title = f"layer {layer}, head {head}\n{view.name or (count and 'kept')}{count}".rstrip()
                cells.append(_titled(title, _framed(panel(view, kept, other))))
        rows += _in_rows(cells)
    return _page(rows)


def panel(view, kept, other=None):
    """A view in a cell of the figure; tokens where kept (rows, columns) bool is False are grey and hatched.

    other: kept for a second question. Tokens that only one of the two keeps are framed.
    """
    rows, columns = kept.shape
    step = max(1, CELL // max(rows, columns))  # pixels per token
    picture = view.image.resize((columns * step, rows * step), Image.Resampling.BICUBIC)
    clear = Image.frombytes("L", (columns, rows), bytes((255 * kept.byte()).flatten().tolist()))
    picture = Image.composite(picture, veiled(picture), clear.resize(picture.size, Image.Resampling.NEAREST))
    pen = ImageDraw.Draw(picture)
    for row, column in [] if other is None else (kept ^ other).nonzero().tolist():
        x, y, ink = column * step, row * step, FIRST if kept[row, column] else SECOND
        pen.rectangle((x + 1, y + 1, x + step - 2, y + step - 2), outline=ink, width=2)
    return picture


def veiled(picture):
    """An RGB picture in light grey and hatched, so that it differs from any original, white and black ones included."""
    grey = Image.blend(picture.convert("L").convert("RGB"), Image.new("RGB", picture.size, (185, 185, 185)), 0.75)
    pen = ImageDraw.Draw(grey)
    for x in range(-picture.height, picture.width, 8):
        pen.line((x, picture.height, x + picture.height, 0), fill=(135, 135, 135))
    return grey


def heat(counts, most, width, height, written=False):
    """counts (rows, columns), integers from 0 to most -> a coloured image of width x height pixels.

    If width equals height, it is the largest size of the image, whose cells are then squares.
    written: also write the numbers, if they fit.
    """
    rows, columns = counts.shape
    if width == height:
        width = height = max(1, width // max(rows, columns))  # pixels per token
        width, height = columns * width, rows * height
    image = Image.new("RGB", (width, height))
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(SMALL)
    for row, line in enumerate(counts.tolist()):
        for column, count in enumerate(line):
            x, y = column * width // columns, row * height // rows
            right, below = (column + 1) * width // columns, (row + 1) * height // rows
            pen.rectangle((x, y, right - 1, below - 1), fill=colour(count / most))
            if written and right - x > font.getlength(str(most)) + 8 and below - y > SMALL:
                ink = "black" if count > 0.6 * most else "white"
                pen.text(((x + right) / 2, (y + below) / 2), str(count), ink, font, anchor="mm")
    return image


def colour(share):
    """0 to 1 -> RGB from dark blue through grey to yellow, a scale that is safe for colour-blind readers."""
    low, middle, high = (0, 34, 78), (125, 124, 120), (254, 232, 56)
    a, b, t = (low, middle, 2 * share) if share < 0.5 else (middle, high, 2 * share - 1)
    return tuple(round(x + (y - x) * t) for x, y in zip(a, b, strict=True))


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
    return _titled(title, block, _scale(most, CELL))


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
            edge = 2 if ink == "black" else 0  # a white one, where the label reaches into its bar
            pen.text((left + x, y), text, ink, font, anchor="lm", stroke_width=edge, stroke_fill="white")
    for value in shown.thresholds or ():
        pen.line((left + value * CELL, 0, left + value * CELL, bottom), fill="black", width=2)


def _scale(most, width):
    """The colour scale, from 0 to most."""
    font = ImageFont.load_default(SMALL)
    bar, middle = Image.new("RGB", (width, SMALL + 10), "white"), SMALL // 2 + 5
    pen = ImageDraw.Draw(bar)
    right = width - font.getlength(str(most)) - 10
    for x in range(SMALL, int(right)):
        pen.line((x, middle - 10, x, middle + 10), fill=colour((x - SMALL) / (right - SMALL - 1)))
    pen.text((0, middle), "0", "black", font, anchor="lm")
    pen.text((width, middle), str(most), "black", font, anchor="rm")
    return bar


def _lines(text, size, fill="black", width=WIDTH - 2 * MARGIN, most=4):
    """Text as an image, broken into lines of at most `width` pixels; text beyond `most` lines is cut off."""
    font = _font(text, size)
    lines = []
    for paragraph in text.split("\n"):
        line = ""
        for word in re.findall(r"[^\s,]+,?\s?|\s|,", paragraph):
            for piece in [word] if font.getlength(word) <= width else word:
                if font.getlength((line + piece).rstrip()) > width:
                    lines, line = [*lines, line], ""
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
    found, letters = [], {letter for letter in text if not letter.isspace()}
    for name in FONTS:
        try:
            font = ImageFont.truetype(name, size) if name else ImageFont.load_default(size)
        except OSError:  # the system does not have this font
            continue
        absent = bytes(font.getmask("\uffff"))
        found.append((sum(bytes(font.getmask(letter)) == absent for letter in letters), len(found), font))
        if found[-1][0] == 0:
            break
    return min(found)[2]


def _titled(title, *images):
    """Images stacked vertically, with a title above."""
    width = max(CELL, *(image.width for image in images))
    return _stack([_lines(title, SMALL, width=width), *images], 4)


def _framed(image):
    """Draw a line around an image, so that a white one has an edge."""
    ImageDraw.Draw(image).rectangle((0, 0, image.width - 1, image.height - 1), outline="#999999")
    return image


def _in_rows(cells, last=()):
    """cells, each one column wide -> rows with COLUMNS cells side by side.

    last: a list with at most one cell, two columns wide; it is put into the last row if it fits, else into its own row.
    """
    rows = [cells[i : i + COLUMNS] for i in range(0, len(cells), COLUMNS)]
    if len(rows[-1]) <= COLUMNS - 2:
        rows[-1] = [*rows[-1], *last]
    elif last:
        rows.append(list(last))
    return [_beside(row) for row in rows]


def _beside(images):
    sheet = Image.new("RGB", (WIDTH - 2 * MARGIN, max(image.height for image in images)), "white")
    x = 0
    for image in images:
        sheet.paste(image, (x, 0))
        x += max(CELL, image.width) + GAP
    return sheet


def _stack(images, gap):
    sheet = Image.new("RGB", (max(i.width for i in images), sum(i.height + gap for i in images) - gap), "white")
    y = 0
    for image in images:
        sheet.paste(image, (0, y))
        y += image.height + gap
    return sheet


def _page(rows):
    body = _stack(rows, GAP)
    sheet = Image.new("RGB", (WIDTH, body.height + 2 * MARGIN), "white")
    sheet.paste(body, (MARGIN, MARGIN))
    return sheet


# ---------------------------------------------------------------- the page


def page(shown, second=None):
    """The HTML of a self-contained page: no network, no framework. second: as in `draw`."""
    data = {
        "tokens": shown.keep.shape[2],
        "views": [{"name": v.name, "url": _data_url(v.image), "shape": list(v.tokens.shape)} for v in shown.views],
        "questions": [_question(s) for s in (shown, second) if s is not None],
    }
    html = (Path(__file__).parent / "show.html").read_text(encoding="utf-8")
    return html.replace("@@DATA@@", json.dumps(data).replace("<", "\\u003c"))


def _question(shown):
    layers, heads, _ = shown.keep.shape
    of_views = [shown.of_view(view).flatten(2).int().tolist() for view in shown.views]
    return {
        "prompt": shown.prompt,
        "title": shown.title,
        "flags": shown.flags,
        "memory": shown.memory,
        "keep": [[["".join(map(str, bits[i][j])) for bits in of_views] for j in range(heads)] for i in range(layers)],
        "counts": shown.keep.sum(2).tolist(),
        "gammas": [round(g, 4) for g in shown.gammas or ()],
        "rows": shown.rows,
        "classes": shown.classes,
    }


def _data_url(picture):
    file = io.BytesIO()
    picture.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
