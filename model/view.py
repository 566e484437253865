"""What pruning methods can use of the pictures: each token's place, and how far its colour is from the usual one."""

import torch


def places_of(side, tokens, cut=None):
    """(n, 2) int64 on the CPU: row and column of each of a picture's n tokens, in the model's order.

    side: tokens per side of a square; tokens: n; cut: for LLaVA-NeXT, `kept_of_tiles`: that part of the joined tiles
    is placed below the square of the whole picture and has a newline after each row's last column. A CLS token is
    placed above the square.
    """
    square = _cells(side, side)
    if cut is not None:
        rows, columns = (part.stop - part.start for part in cut)
        return torch.cat((square, _cells(rows, columns + 1) + square.new_tensor([side, 0])))
    return torch.cat((square.new_tensor([[-1, 0]] * (tokens - len(square))).view(-1, 2), square))


def _cells(rows, columns):
    """(rows * columns, 2) int64 on the CPU: row and column of each cell of a table, row by row."""
    return torch.cartesian_prod(torch.arange(rows, device="cpu"), torch.arange(columns, device="cpu"))


def contrast_of(squares, side, tokens, cut=None, grid=None):
    """(n,) fp32: distance of the pixels of each of a picture's n tokens from the picture's usual colour.

    squares (1 + tiles, 3, S, S) fp32: its pixel values; side, tokens, cut: as in `places_of`; grid: (rows, columns) of
    tiles. The usual colour is the median over the patches' means. The distance is the root mean square over a patch's
    pixels; it is 0 for tokens without pixels (newlines and CLS).
    """
    patch = squares.shape[-1] // side
    pixels = squares[..., : side * patch, : side * patch].unflatten(-1, (side, patch)).unflatten(-3, (side, patch))
    usual = pixels[0].mean((-3, -1)).flatten(1).median(1).values  # (3,)
    far = (pixels - usual[:, None, None, None, None]).square().sum(1).mean((-3, -1)).sqrt()  # (1 + tiles, side, side)
    whole = far[0].flatten()
    if grid is None:
        return torch.cat((whole.new_zeros(tokens - len(whole)), whole))
    joined = far[1:].unflatten(0, grid).transpose(1, 2).flatten(2, 3).flatten(0, 1)[cut]
    newlines = joined.new_zeros(len(joined), 1)
    return torch.cat((whole, torch.cat((joined, newlines), 1).flatten()))
