"""LLaVA (arXiv 2304.08485, 2310.03744): CLIP and a two-layer projector turn pictures into embeddings for a Llama.

LLaVA-NeXT (1.6, "anyres") cuts a picture into several squares and joins their tokens after the projector.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .clip import VisionTower
from .config import InputError
from .image import kept_of_tiles
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
        if config.image_grid_pinpoints:  # LLaVA-NeXT: a learned token at the end of each row of tokens
            self.image_newline = nn.Parameter(torch.zeros(config.text_config.hidden_size))

    def encode_images(self, pixel_values):
        """pixel_values (n, 3, S, S) -> vision tokens (n, P, C); P includes CLS only if the config says "full"."""
        return self.project(self.see(pixel_values)[0])

    def see(self, pixel_values, layers=(), after=None):
        """-> features that the projector reads, (n, 1 + P, C) with CLS in front, and {layer: input of that layer of the
        tower} for `layers`, counted from 0. after: see `VisionTransformer`."""
        wanted = self.config.feature_layers
        states = self.vision_tower(pixel_values, [*wanted, *layers], after)
        return torch.cat(states[: len(wanted)], -1), dict(zip(layers, states[len(wanted) :], strict=True))

    def project(self, features):
        """Features of `see` -> vision tokens (n, P, C)."""
        first = 1 if self.config.vision_feature_select_strategy == "default" else 0
        return self.multi_modal_projector(features[:, first:].contiguous())

    def join(self, tokens, picture):
        """Vision tokens (n, P, C) of a `model.image.Prepared` -> (P', C), in the order of the prompt."""
        if picture.grid is None:
            return tokens[0]
        return self.join_tiles(tokens, picture.grid, picture.size, picture.settings.order)

    def join_tiles(self, tokens, grid, size, order="hf"):
        """Vision tokens of a picture's squares (1 + rows * columns, P, C) -> (P', C): whole picture, then tiles.

        The tiles' tokens form one map, without tokens of the canvas border; `image_newline` ends each row.
        grid: (rows, columns) of tiles; size: (width, height) of the picture; order: see ImageSettings.
        """
        side = round(tokens.shape[1] ** 0.5)
        tiles = tokens[1:].unflatten(1, (side, side)).unflatten(0, grid)  # (rows, columns, side, side, C)
        rows, columns = kept_of_tiles(grid, side, size, order)
        seen = tiles.transpose(1, 2).flatten(2, 3).flatten(0, 1)[rows, columns]
        newline = self.image_newline.to(tokens.dtype).expand(len(seen), 1, -1)
        return torch.cat((tokens[0], torch.cat((seen, newline), 1).flatten(0, 1)))

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
