"""What a pruning method sees of a picture before the language model, and how its choice is applied.

n squares (the picture and its tiles), P patch tokens, H heads of the vision tower, D channels per head, C features.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from .llava import maps_of

ROWS = 128  # patches whose attention is computed together


class PictureView:
    """One picture of a prompt. Everything is measured when a method first asks for it. All tensors are copies: a method
    may write into them.

    tokens       P: the patch tokens that the language model gets if none is dropped, in its order: the square of the
                 whole picture row by row, then, if there are tiles, their joined map without the canvas border, row by
                 row. Newlines and CLS are not among them. After a `merge`: the merged tokens, square by square. If
                 LLaVA-OneVision shrinks a map, each of its tokens stands for the patch nearest to its centre: `keys`
                 and attention are that patch's, and `features` are interpolated as the tokens are
    number       index of the picture in the prompt, from 0
    squares      n: 1, and the number of tiles
    num_layers   layers of the vision tower
    read_layer   the one whose output the projector reads, counted from 0; the last one if it reads several
    device       of all tensors, except those on the CPU
    side         patches per side of a square
    grid         (rows, columns) of the tiles, or None
    shapes       [(rows, columns)] of the whole picture's tokens and, with tiles, of their map; before a merge
    """

    def __init__(self, picture, number, model, features, states, merged=None):
        """picture: a `model.image.Prepared`; model: the `Llava`; features (n, 1 + m, C): what the projector reads, with
        CLS in front; states: {layer: its input (n, 1 + m, C)}.

        merged: (layer, matrix (n, m, S * S)) if m sums of each square's S * S patches replaced them after that layer.
        """
        self.picture, self.number, self.layout = picture, number, picture.layout
        self.side, self.grid = self.layout.side, self.layout.grid
        self.device, self._model, self._features, self._states = features.device, model, features, states
        self._layers = model.vision_tower.vision_model.encoder.layers
        self.num_layers, self.squares, self.merged = len(self._layers), len(features), merged
        self.read_layer = _read_layer(model.config)
        m = self.side**2 if merged is None else merged[1].shape[1]
        self._cls = features.shape[1] - m  # 1, or 0 in a tower without CLS
        # (P,) each: the index among the squares' m tokens, and among the picture's tokens in the prompt
        index, self.origin = _unmerged(self.layout) if merged is None else _merged(self.layout, merged[1].cpu())
        self.tokens, self._index = len(index), index.to(self.device)
        self._tile, self._cell = self._index // m, self._index % m + self._cls  # _cell: row in the square's states
        self.shapes = [self.layout.square, *([self.layout.map] if self.grid else [])]

    @property
    def has_cls(self):
        """True if the tower has a CLS token."""
        return self._cls == 1

    @property
    def tile(self):
        """(P,) int64: the square of each token: 0 the whole picture, then the tiles row by row."""
        return self._tile.clone()

    @property
    def places(self):
        """(P, 2) int64 on the CPU: row and column of each token, as in `model.layout.Layout.places`."""
        return self.layout.places[self.origin]

    @property
    def features(self):
        """(P, C): the vision features that the projector reads."""
        if self.merged:
            return self._of_tokens(self._features)
        maps = maps_of(self._features[:, self._cls :], self.layout)
        return torch.cat([tokens.flatten(0, 1) for tokens in maps if tokens is not None])

    @property
    def cls_features(self):
        """(n, C): the features of each square's CLS token. ValueError in a tower without CLS."""
        self._check_cls("cls_features")
        return self._features[:, 0].clone()

    @property
    def projected(self):
        """(P, C_text): the projector's output."""
        return self.project(self.features) if self.merged else self.prompt_tokens[self.origin.to(self.device)]

    @cached_property
    def prompt_tokens(self):
        """(N, C_text): the tokens of the unpicked picture, newlines and CLS included."""
        return self._model.join(self._model.project(self._features), self.layout)

    def project(self, features):
        """(P', C) -> (P', C_text): the projector."""
        return self._model.multi_modal_projector(features)

    def keys(self, layer):
        """(H, P, D): the keys of a layer of the tower, counted from 0. The method's `layers` must name the layer,
        unless it is `read_layer`."""
        k = self._heads(layer, "k_proj", self._state(layer))  # (n, H, 1 + m, D)
        return self._of_tokens(k.transpose(1, 2)).transpose(0, 1)

    def cls_attention(self, layer):
        """(H, P) fp32: the attention of each square's CLS token to the square's tokens. Softmax is over CLS and all
        patches of the square. ValueError in a tower without CLS."""
        self._check_cls("cls_attention")
        x = self._state(layer)
        rows = self._softmax(layer, x[:, :1], x)[:, :, 0]  # (n, H, 1 + m)
        return self._of_tokens(rows.transpose(1, 2)).T.contiguous()

    def patch_attention(self, layer):
        """(H, P) fp32: the attention that each token gets from the patches of its square, mean over all of them. A
        tower without CLS has this in the place of `cls_attention`."""
        x, total = self._state(layer), 0.0
        for rows in x[:, self._cls :].split(ROWS, 1):
            total = total + self._softmax(layer, rows, x).sum(2)  # (n, H, 1 + m)
        return self._of_tokens(total.transpose(1, 2) / (x.shape[1] - self._cls)).T.contiguous()

    def attention(self, layer, first, last):
        """(H, last - first, P) fp32: the attention of the tokens first to last - 1 to all tokens; 0 between squares.

        Softmax is over CLS and all patches of the square. Ask for a few hundred rows at a time.
        """
        x, tile, cell = self._state(layer), self._tile[first:last], self._cell[first:last]
        heads = self._layers[layer].self_attn.heads
        out = torch.zeros(heads, len(tile), self.tokens, dtype=torch.float32, device=self.device)
        for square in tile.unique().tolist():
            rows, columns = (tile == square).nonzero()[:, 0], (self._tile == square).nonzero()[:, 0]
            of_square = x[square : square + 1]
            found = self._softmax(layer, of_square[:, cell[rows]], of_square)[0]  # (H, R, 1 + m)
            out[:, rows[:, None], columns] = found[:, :, self._cell[columns]]
        return out

    def with_newlines(self, chosen):
        """Indices of tokens (P',), or None for all -> indices among the tokens of the unpicked picture, on the CPU."""
        stays = torch.ones(self.layout.tokens, dtype=torch.bool, device="cpu")
        if chosen is not None:
            stays[self.origin] = False
            stays[self.origin[chosen.cpu()]] = True
            rows = self.layout.places[:, 0]
            stays &= (self.layout.patches >= 0) | ~torch.isin(rows, rows[~stays])
        return stays.nonzero()[:, 0]

    def heaviest(self, matrix):
        """The token of the unpicked picture that each row of a matrix (P', P or P + n) stands for, on the CPU: that of
        its heaviest column, the first if equal; -1 for a CLS token that the prompt does not have."""
        cls = 0 if self.layout.cls else -1
        origin = torch.cat((self.origin, self.origin.new_full((matrix.shape[1] - self.tokens,), cls)))
        return origin[matrix.cpu().argmax(1)]

    def _softmax(self, layer, rows, x):
        """(n, H, R, 1 + m) fp32: attention from rows (n, R, C) to x (n, 1 + m, C)."""
        q, k = self._heads(layer, "q_proj", rows).float(), self._heads(layer, "k_proj", x).float()
        return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)

    def _heads(self, layer, name, x):
        """x (n, R, C) -> queries or keys (n, H, R, D)."""
        module = self._layers[layer]
        y = getattr(module.self_attn, name)(module.layer_norm1(x))
        return y.unflatten(-1, (module.self_attn.heads, -1)).transpose(1, 2)

    def _state(self, layer):
        """(n, 1 + m, C): a layer's input. ValueError if it was not named, or if its tokens were merged later."""
        if layer not in self._states:
            raise ValueError(f"layer {layer!r} of the vision tower was not named; return it from layers(num_layers)")
        if self.merged and layer <= self.merged[0]:
            raise ValueError(f"layer {layer} is before the merge; ask for a layer above {self.merged[0]}")
        return self._states[layer]

    def _of_tokens(self, x):
        """(n, 1 + m, ...), CLS in front -> (P, ...)."""
        return x[:, self._cls :].flatten(0, 1)[self._index]

    def _check_cls(self, what):
        if not self._cls:
            raise ValueError(f"{what} needs the CLS token of the vision tower, and this tower has none")


def _unmerged(layout):
    """-> for each patch token of the prompt, its index among the squares' patches, and among the picture's tokens."""
    origin = (layout.patches >= 0).nonzero()[:, 0]
    return layout.patches[origin], origin


def _merged(layout, matrix):
    """`_unmerged` after a merge, matrix (n, m, S * S). A merged token exists if one of its members does, and stands for
    the heaviest of those, the first if equal."""
    patches, origin = _unmerged(layout)
    of_patch = origin.new_full((matrix.shape[0] * matrix.shape[2],), -1).index_copy_(0, patches, origin)
    of_patch = of_patch.view(len(matrix), 1, -1)  # index among the picture's tokens, -1 on the canvas border
    weights = matrix.masked_fill(of_patch < 0, 0)
    heaviest = of_patch.expand_as(matrix).gather(2, weights.argmax(2, keepdim=True)).flatten()
    exists = weights.any(2).flatten().nonzero()[:, 0]
    return exists, heaviest[exists]


@dataclass
class Picked:
    """Which tokens the P' vision tokens of a picture are that the language model gets.

    origin      (P',) int64 on the CPU: the token of the unpicked picture that each stands for; -1 for a CLS token
    protected   (P',) bool on the CPU: tokens that later stages may not drop
    """

    origin: torch.Tensor
    protected: torch.Tensor

    @classmethod
    def all(cls, tokens):
        """Of a picture that keeps all its tokens, this number."""
        return cls(torch.arange(tokens, device="cpu"), torch.zeros(tokens, dtype=torch.bool, device="cpu"))

    def of(self, values, absent):
        """values (N, ...), one per token of the unpicked picture -> (P', ...); `absent` for a token without origin."""
        found = values[self.origin.clamp(min=0)]
        found[self.origin < 0] = absent
        return found


def look(method, model, picture, number, pixels):
    """Run the vision tower on a picture -> its PictureView.

    method: a `model.pruning.Method`, whose stage `merge` may join patches on the way; model: the `Llava`; picture: a
    `model.image.Prepared`; number: its index in the prompt; pixels (n, 3, S, S). ValueError from the method.
    """
    config, merged = model.config, []
    layers = sorted({*method.layers(config.vision_config.num_hidden_layers), _read_layer(config)})
    run = max([*config.feature_layers, *layers])  # number of layers that run
    if method.merge_after is not None and not 0 <= method.merge_after < run:
        raise ValueError(f"merge_after of {method.name} is {method.merge_after}; give a layer from 0 to {run - 1}")

    def merge(layer, x):
        """Called by the tower after each layer: x (n, 1 + S * S, C) -> x, with merged patches after `merge_after`."""
        if layer != method.merge_after:
            return x
        side = picture.layout.side
        first = x.shape[1] - side**2  # 1: CLS
        matrix = method.merge(x[:, first:].unflatten(1, (side, side)).clone())
        if matrix is None:
            return x
        if min(config.feature_layers) <= layer or picture.layout.cls:
            raise ValueError("merged patches need features of later layers, without a CLS token; use another method")
        merged.append((layer, matrix))
        return torch.cat((x[:, :first], (matrix @ x[:, first:].float()).to(x.dtype)), 1)

    features, states = model.see(pixels, layers, merge)
    return PictureView(picture, number, model, features, states, merged[0] if merged else None)


def _read_layer(config):
    return max(0, max(config.feature_layers) - 1)


def pick(method, view):
    """The tokens of a picture that a method's stages `pick` and `protect` choose, (P', C_text), and their Picked.

    ValueError from the method.
    If none is dropped, the tokens are those of an unpruned prompt, bit for bit. Indices: a token without a patch (a
    newline at the end of a row, a CLS token) stays if no patch of its row is dropped.
    """
    chosen, protected = method.pick(view), method.protect(view)
    if view.merged:
        tokens, origin = view.projected, view.origin
    elif chosen is None or chosen.ndim == 1:
        origin = view.with_newlines(chosen)
        tokens = view.prompt_tokens[origin.to(view.device)]
    else:
        sources = torch.cat((view.features, view.cls_features)) if chosen.shape[1] > view.tokens else view.features
        tokens = view.project((chosen @ sources.float()).to(sources.dtype))
        origin = view.heaviest(chosen)
    picked = Picked(origin, torch.zeros(len(tokens), dtype=torch.bool, device="cpu"))
    if protected is not None:
        mask = torch.zeros(view.layout.tokens, dtype=torch.bool, device="cpu")
        mask[view.origin[protected.cpu()]] = True
        picked.protected = picked.of(mask, False)
    return tokens, picked


# ---------------------------------------------------------------- the prompt with the tokens that were picked


def spans_of(ids, image_id, tokens):
    """[(start, stop)] of each picture in a prompt with these ids and numbers of tokens."""
    spans, shift = [], 0
    for place, count in zip([i for i, token in enumerate(ids) if token == image_id], tokens, strict=True):
        spans.append((place + shift, place + shift + count))
        shift += count - 1
    return spans


def after_picking(picked, places, contrast):
    """Lists of `Picked` and of places, function that returns the list of contrasts -> both for the picked tokens.

    A CLS token without origin is placed above the picture, and its contrast is 0."""
    above = torch.tensor([-1, 0], device="cpu")
    chosen = [of_one.of(all_places, above) for of_one, all_places in zip(picked, places, strict=True)]
    return chosen, lambda: [of_one.of(far, 0) for of_one, far in zip(picked, contrast(), strict=True)]


def protected_of(picked, spans, x):
    """(T,) bool on the device of x (T, C): the tokens that later stages may not drop; None if there are none."""
    mask = torch.zeros(len(x), dtype=torch.bool, device="cpu")
    for of_one, (start, stop) in zip(picked, spans, strict=True):
        mask[start:stop] = of_one.protected
    return mask.to(x.device) if mask.any() else None


def origins(picked, spans, tokens):
    """(T,) int64 on the CPU: which token of the unpicked prompt each token of the prompt stands for; -1 for a CLS token
    without origin. spans, tokens: of the pictures in the unpicked prompt, and its length."""
    every, pieces, end = torch.arange(tokens, device="cpu"), [], 0
    for of_one, (start, stop) in zip(picked, spans, strict=True):
        pieces += [every[end:start], of_one.of(every[start:stop], -1)]
        end = stop
    return torch.cat([*pieces, every[end:]])


def original_positions(origin):
    """Rotary positions (T,) of the tokens with this origin: those of the unpicked prompt; a CLS token without origin
    has the one after all tokens before it."""
    return torch.where(origin < 0, origin.cummax(0).values + 1, origin)


def unpicked(masks, origin, tokens):
    """masks (L, Hkv, T) bool on the CPU of a prompt with picked tokens -> (L, Hkv, tokens) of the unpicked prompt.

    origin (T,): see `origins`. True where a token is kept that stands for this one.
    """
    counted = masks.new_zeros(*masks.shape[:2], tokens, dtype=torch.int32)
    return counted.index_add_(2, origin[origin >= 0], masks[..., origin >= 0].int()) > 0
