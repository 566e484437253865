"""Where the tokens of a picture come from: the canvas of its tiles, and the patch and the place of each token.

P patches per square, n tokens.
"""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a picture come from. Their order in the prompt: CLS, the square of the whole picture row by
    row, a newline; then the joined map of the tiles row by row, with a newline after each row.

    A map of tokens that was shrunk has fewer tokens than patches. Each token then stands for the patch nearest to its
    centre.
    """

    side: int  # patches per side of a square
    cls: int  # tokens without patches before the square: 0 or 1 (CLS)
    square: tuple  # (rows, columns) of the square's tokens, (side, side) unless shrunk
    newline: bool = False  # a newline ends the square
    grid: tuple | None = None  # (rows, columns) of tiles
    cut: tuple | None = None  # the part of the tiles' patches that shows the picture: two slices, of rows and columns
    map: tuple | None = None  # (rows, columns) of the tokens of that part

    @property
    def tokens(self):
        """Their number."""
        return sum(self.parts)

    @property
    def parts(self):
        """The number of the square's, with CLS and its newline; with tiles also that of their map."""
        square = self.cls + self.square[0] * self.square[1] + self.newline
        return (square, self.map[0] * (self.map[1] + 1)) if self.map else (square,)

    @property
    def second(self):
        """The row of `places` where the map of the tiles begins, None if there is none."""
        return self.square[0] if self.map else None

    @property
    def places(self):
        """(n, 2) int64 on the CPU: row and column of each token. The map of the tiles is placed below the square, CLS
        above it, and newlines after the last column of their row."""
        rows, columns = self.square
        pieces = [torch.tensor([[-1, 0]], device="cpu")[: self.cls], cells(rows, columns)]
        if self.newline:
            pieces.append(torch.tensor([[rows - 1, columns]], device="cpu"))
        if self.map:
            pieces.append(cells(self.map[0], self.map[1] + 1) + torch.tensor([rows, 0], device="cpu"))
        return torch.cat(pieces)

    @property
    def patches(self):
        """(n,) int64 on the CPU: the patch of each token, counted through the squares; -1 for newlines and CLS."""
        side, none = self.side, torch.full((1,), -1, device="cpu")
        whole = torch.arange(side * side, device="cpu").view(side, side)
        pieces = [none[: self.cls], nearest(whole, self.square).flatten(), none[: self.newline]]
        if self.grid:
            tiles = side * side + torch.arange(self.grid[0] * self.grid[1] * side * side, device="cpu")
            tiles = nearest(join_maps(tiles.view(-1, side, side), self.grid)[self.cut], self.map)
            pieces.append(torch.cat((tiles, none.expand(len(tiles), 1)), 1).flatten())
        return torch.cat(pieces)

    def contrast(self, squares):
        """(n,) fp32: distance of the pixels of each token's patch from the picture's usual colour.

        squares (1 + tiles, 3, S, S) fp32: the pixel values. The usual colour is the median over the patches' means. The
        distance is the root mean square over a patch's pixels; it is 0 for tokens without a patch.
        """
        side, patch = self.side, squares.shape[-1] // self.side
        pixels = squares[..., : side * patch, : side * patch].unflatten(-1, (side, patch)).unflatten(-3, (side, patch))
        usual = pixels[0].mean((-3, -1)).flatten(1).median(1).values  # (3,)
        far = (pixels - usual[:, None, None, None, None]).square().sum(1).mean((-3, -1)).sqrt()  # (squares, side, side)
        patches = self.patches
        return far.flatten()[patches.clamp(min=0)].masked_fill(patches < 0, 0)


def layout_of(size, settings, side, cls, last=True):
    """The Layout of a picture with this (width, height). cls: number of CLS tokens; last: it is the last frame."""
    if settings.mode != "anyres":
        half = -(-side // 2)
        square = (half, half) if settings.mode == "frame" else (side, side)
        return Layout(side, cls, square, newline=bool(settings.max_tiles and last))
    wide, high = choose_canvas(size, settings.pinpoints, settings.order)
    grid = high // settings.size, wide // settings.size
    cut = kept_of_tiles(grid, side, size, settings.order)
    rows, columns = (part.stop - part.start for part in cut)
    return Layout(side, cls, (side, side), False, grid, cut, shrunk(rows, columns, side, settings.max_tiles))


def join_maps(tiles, grid):
    """Maps of tiles (rows * columns, side, side, ...), row by row -> one map (rows * side, columns * side, ...)."""
    return tiles.unflatten(0, grid).transpose(1, 2).flatten(2, 3).flatten(0, 1)


def nearest(values, shape):
    """A map (H, W, ...) -> (h, w, ...): for each cell of the smaller map the value nearest to its centre.

    Of two equally near ones the later. Either map may be empty, as that of the tiles of a very thin picture.
    """
    rows, columns = (
        (2 * torch.arange(n, device=values.device) + 1) * of // (2 * n)
        for n, of in zip(shape, values.shape, strict=False)
    )
    return values[rows[:, None], columns]


def cells(rows, columns):
    """(rows * columns, 2) int64 on the CPU: row and column of each cell of a table, row by row."""
    return torch.cartesian_prod(torch.arange(rows, device="cpu"), torch.arange(columns, device="cpu"))


# ---------------------------------------------------------------- tiles


def choose_canvas(size, pinpoints, order):
    """(width, height) of the canvas that preserves the most pixels of a picture; among equals, the least border.

    size: (width, height) of the picture. A tie goes to the first canvas in the list, so the orders "hf" and "orig"
    differ if the list has both (a, b) and (b, a) and the picture is smaller than either.
    """
    wide, high = size

    def merit(canvas):
        scale = min(canvas[0] / wide, canvas[1] / high)
        shown = min(int(wide * scale) * int(high * scale), wide * high)
        return shown, -(canvas[0] * canvas[1] - shown)

    return max((pair[::-1] if order == "hf" else pair for pair in pinpoints), key=merit)  # first of equals


def kept_of_tiles(grid, patches, size, order):
    """(rows, columns), two slices: the part of a canvas's token map that shows the picture, without the black border.

    grid: (rows, columns) of tiles; patches: per side of a tile; size: (width, height) of the picture.
    """
    high, wide = grid[0] * patches, grid[1] * patches

    def inner(long, scaled):  # HF rounds before truncating, the original code does not
        border = (long - int(round(scaled, 7) if order == "hf" else scaled)) // 2
        return slice(border, long - border)

    if size[0] / size[1] > wide / high:
        return inner(high, size[1] * (wide / size[0])), slice(0, wide)
    return slice(0, high), inner(wide, size[0] * (high / size[1]))


def shrunk(rows, columns, patches, max_tiles):
    """(rows, columns) of a map of tile tokens after LLaVA-OneVision's shrinking, which starts at 1.1 times the side of
    max_tiles tiles; the same if max_tiles is None. patches: per side of a tile."""
    ratio = math.sqrt(rows * columns / (max_tiles * patches**2)) if max_tiles else 0
    return (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else (rows, columns)
