"""LLaVA (arXiv 2304.08485, 2310.03744): a vision tower and a two-layer projector turn pictures into embeddings for a
decoder.

LLaVA-NeXT (1.6, "anyres") cuts a picture into several squares and joins their tokens after the projector.
LLaVA-OneVision (arXiv 2408.03326) also shrinks the tokens of many tiles, and those of the frames of a video.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .clip import VisionTower
from .config import InputError
from .layout import join_maps
from .llama import Llama


class Projector(nn.Module):
    """Vision features (..., C_vision * number of feature layers) -> vision tokens (..., C_text), in the same dtype."""

    def __init__(self, config):
        super().__init__()
        wide, c = config.vision_config.hidden_size * len(config.feature_layers), config.text_config.hidden_size
        self.linear_1 = nn.Linear(wide, c, bias=config.multimodal_projector_bias)
        self.linear_2 = nn.Linear(c, c, bias=config.multimodal_projector_bias)

    def forward(self, x):
        return self.linear_2(F.gelu(self.linear_1(x)))  # the exact GELU


class Llava(nn.Module):
    """Vision tower, projector and decoder. Module names are the checkpoint's keys."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vision_tower = VisionTower(config.vision_config)
        self.multi_modal_projector = Projector(config)
        self.language_model = Llama(config.text_config, tied=config.tie_word_embeddings)
        if config.image_grid_pinpoints:  # NeXT, OneVision: a learned token at the end of each row of the tiles' tokens
            self.image_newline = nn.Parameter(torch.zeros(config.text_config.hidden_size))

    def encode_images(self, pixel_values):
        """pixel_values (n, 3, S, S) -> vision tokens (n, P, C); P includes CLS only if the config says "full"."""
        return self.project(self.see(pixel_values)[0])

    def see(self, pixel_values, layers=(), after=None):
        """-> features that the projector reads, (n, 1 + P, C) with CLS in front (SigLIP: P), and {layer: input of that
        layer of the tower} for `layers`, counted from 0. after: see `VisionTransformer`."""
        wanted = self.config.feature_layers
        states = self.vision_tower(pixel_values, [*wanted, *layers], after)
        return torch.cat(states[: len(wanted)], -1), dict(zip(layers, states[len(wanted) :], strict=True))

    def project(self, features):
        """Features of `see` -> vision tokens (n, P, C)."""
        first = 1 if self.config.vision_feature_select_strategy == "default" else 0
        return self.multi_modal_projector(features[:, first:].contiguous())

    def join(self, tokens, layout):
        """Vision tokens of a picture's squares (1 + tiles, P, C) -> (P', C), in the order of its `model.layout.Layout`.

        The tiles' tokens form one map, without tokens of the canvas border; `image_newline` ends each row.
        """
        square, tiles = maps_of(tokens[:, layout.cls :], layout)
        newline = self.image_newline.to(tokens.dtype) if layout.newline or layout.grid else None
        pieces = [tokens[0, : layout.cls], square.flatten(0, 1)]
        if layout.newline:
            pieces.append(newline[None])
        if layout.grid:
            pieces.append(torch.cat((tiles, newline.expand(len(tiles), 1, -1)), 1).flatten(0, 1))
        return torch.cat(pieces)

    def splice(self, ids, image_tokens):
        """Embed token ids and replace each image placeholder by its picture's vision tokens.

        ids: list of token ids with one `image_token_index` per picture; image_tokens: (P, C) per picture. Returns x
        (T, C) in the embedding's dtype and the pictures' spans in x, [(start, stop), ...]. InputError if counts differ.
        """
        where = [i for i, token in enumerate(ids) if token == self.config.image_token_index]
        if len(where) != len(image_tokens):
            raise InputError(f"{len(where)} image placeholders for {len(image_tokens)} images; give one for each")
        embed = self.language_model.model.embed_tokens
        pieces, spans, length, start = [], [], 0, 0
        for place, tokens in zip([*where, len(ids)], [*image_tokens, None], strict=True):
            text = embed(torch.tensor(ids[start:place], dtype=torch.long, device=embed.weight.device))
            pieces.append(text)
            length, start = length + len(text), place + 1
            if tokens is not None:
                pieces.append(tokens.to(text.dtype))
                spans.append((length, length + len(tokens)))
                length += len(tokens)
        return torch.cat(pieces), spans


def maps_of(tokens, layout):
    """Tokens of a picture's patches (1 + tiles, side * side, C) -> the map of its square and that of its tiles or None,
    each (rows, columns, C)."""
    squares = tokens.unflatten(1, (layout.side, layout.side))
    tiles = shrink(join_maps(squares[1:], layout.grid)[layout.cut], layout.map) if layout.grid else None
    return shrink(squares[0], layout.square), tiles


def shrink(tokens, shape):
    """A map of tokens (H, W, C) -> (h, w, C), by bilinear interpolation; the same if it has that shape."""
    if tokens.shape[:2] == shape:
        return tokens
    return F.interpolate(tokens.permute(2, 0, 1)[None], shape, mode="bilinear")[0].permute(1, 2, 0)
