"""Methods before the language model, computed again: attention from transformers' tower, the rules in NumPy and loops.

Nothing here imports the model. n squares (the picture and its tiles), S * S patches a square, P tokens in the language
model's order without newlines, H heads.
"""

import math
from fractions import Fraction

import numpy as np
import torch


class Seen:
    """A picture as transformers' vision tower sees it.

    side: S; grid: (rows, columns) of tiles or None; map: (rows, columns) of the tiles' tokens without border, before
    they shrink; patch (P,): index among the squares' tokens; tile (P,); cls: 1 or, in SigLIP, 0; read: the layer whose
    output the projector gets; attention[layer] (n, H, cls + m, cls + m) float64; features (n, cls + m, C) fp32
    """

    @classmethod
    def of_picture(cls, hf, picture, join=None):
        """picture: what a prompt has of one, with `pixels`, `size`, `settings` and `layout`."""
        frame = ("last" if picture.layout.newline else "frame") if picture.settings.mode == "frame" else None
        return cls(hf, picture.pixels, picture.size, join, frame)

    def __init__(self, hf, pixels, size, join=None, frame=None):
        """pixels (n, 3, S, S); size: (width, height); join: function patches (n, S, S, C) -> matrix (n, m, S * S).

        frame: None, "frame" or "last", the last one of a video.
        """
        tower = hf.model.vision_tower
        pinpoints = getattr(hf.config, "image_grid_pinpoints", None) if len(pixels) > 1 else None
        tower.set_attn_implementation("eager")
        self.hf, self.joined, self.onevision = hf, None, hf.config.model_type == "llava_onevision"
        self.cls = 0 if self.onevision else 1
        self.newline = self.onevision and not pinpoints and frame != "frame"
        self.layers = next(module for name, module in tower.named_modules() if name.endswith("encoder.layers"))
        config = tower.config
        self.side, edge = config.image_size // config.patch_size, config.image_size
        hook = self.layers[0].register_forward_hook(lambda _, __, x: self.merge(x, join)) if join else None
        out = tower(pixels, output_attentions=True, output_hidden_states=True)
        if hook:
            hook.remove()
        self.states, self.features = out.hidden_states, out.hidden_states[hf.config.vision_feature_layer]
        self.attention = [a.double().numpy() for a in out.attentions]
        self.depth, self.squares = len(self.attention), len(pixels)
        self.read = self.depth + hf.config.vision_feature_layer
        per_square = self.side**2
        self.grid, self.map = None, None
        self.maps = [np.arange(per_square).reshape(self.side, self.side)]
        self.shapes = [((self.side + 1) // 2,) * 2 if frame else (self.side, self.side)]
        if pinpoints:
            from transformers.models.llava_next import modeling_llava_next as theirs

            self.grid = theirs.get_anyres_image_grid_shape(size[::-1], pinpoints, edge)
            cut = theirs.unpad_image(torch.from_numpy(map_of(self.side, self.grid))[None], size[::-1])[0]
            self.map = tuple(cut.shape)
            excess = math.sqrt(cut.numel() / (9 * per_square)) if self.onevision else 0  # anyres_max_9
            self.maps.append(cut.numpy())
            self.shapes.append(tuple(int(n // excess) for n in self.map) if excess > 1.1 else self.map)
        self.patch = np.concatenate([nearest(*pair).ravel() for pair in zip(self.maps, self.shapes, strict=True)])
        if join:
            alive = np.isin(np.arange(self.squares * per_square), self.patch).reshape(self.squares, per_square)
            exists = [(alive[i] & (row > 0)).any() for i, rows in enumerate(self.joined) for row in rows]
            self.patch = np.flatnonzero(exists)
        self.per_square = self.features.shape[1] - self.cls
        self.tile, self.cell = self.patch // self.per_square, self.patch % self.per_square
        self.count = len(self.patch)

    def merge(self, x, join):
        x, first = x[0] if isinstance(x, tuple) else x, self.cls
        self.joined = join(x[:, first:].unflatten(1, (self.side, self.side)).double().numpy())
        return torch.cat((x[:, :first], torch.from_numpy(self.joined).float() @ x[:, first:]), 1)

    def looked_at(self, layer):
        """(P,): attention of CLS of each square to its tokens, without CLS of all its patches; mean over heads."""
        rows = slice(0, 1) if self.cls else slice(None)
        return self.attention[layer][self.tile, :, rows, self.cls + self.cell].mean((1, 2))

    def of(self, square):
        return np.flatnonzero(self.tile == square)

    def tokens(self, chosen):
        """Token embeddings of the language model for what a rule chose. Newlines stay at the end of complete rows."""
        patches, project = self.features[:, self.cls :].flatten(0, 1), self.hf.model.multi_modal_projector
        if isinstance(chosen, np.ndarray) and chosen.ndim == 2:
            sources = torch.cat((self.resized(patches), self.features[:, 0]))[: chosen.shape[1]]
            return project((torch.from_numpy(chosen).float() @ sources)[None])[0]
        if self.joined is not None:
            return project(patches[self.patch][None])[0][sorted(range(self.count) if chosen is None else chosen)]
        projected, place, pieces = self.resized(project(patches[None])[0]), self.origin(), []
        for index in self.kept(chosen):
            pieces.append(self.hf.model.image_newline if place[index] < 0 else projected[place[index]])
        return torch.stack(pieces)

    def resized(self, tokens):
        """(n * S * S, C) -> (P, C): the square's, then those of the tiles' map, shrunk as in `pack_image_features`."""
        parts = []
        for index, shape in zip(self.maps, self.shapes, strict=True):
            part = tokens[torch.from_numpy(index)].permute(2, 0, 1)[None]
            if index.shape != shape:
                part = torch.nn.functional.interpolate(part, shape, mode="bilinear")
            parts.append(part[0].flatten(1).T)
        return torch.cat(parts)

    def rows(self):
        """The picture's tokens in the prompt, row by row: indices among the P, -1 for a newline."""
        (high, wide), *tiles = self.shapes
        found = np.arange(high * wide).reshape(high, wide).tolist()
        found[-1] += [-1] if self.newline else []
        for shape in tiles:
            found += [[*row, -1] for row in np.arange(high * wide, self.count).reshape(shape).tolist()]
        return found

    def origin(self):
        return sum(self.rows(), [])

    def kept(self, chosen):
        """Indices among the picture's tokens in the prompt of what a rule chose, newlines included."""
        chosen = set(range(self.count) if chosen is None else chosen)
        whole = [(i, chosen >= {*row} - {-1}) for row in self.rows() for i in row]
        return [index for index, (i, complete) in enumerate(whole) if (complete if i < 0 else i in chosen)]


def nearest(values, shape):
    """For each cell of a smaller map the value of the cell in which its centre lies; on a border the later one."""
    rows, columns = ([(2 * i + 1) * of // (2 * n) for i in range(n)] for n, of in zip(shape, values.shape, strict=True))
    return values[np.ix_(rows, columns)]


def map_of(side, grid):
    """(rows * S, columns * S): the patches of all tiles beside and below each other, counted through the squares."""
    tiles = side**2 + np.arange(math.prod(grid) * side**2).reshape(*grid, side, side)
    return np.concatenate([np.concatenate(list(row), 1) for row in tiles])


def answer(hf, ids, image_id, pictures, count, never):
    """transformers' logits after a prompt whose pictures are these tokens (each (P', C)), and its greedy ids."""
    embed, pieces, pictures = hf.get_input_embeddings(), [], iter(pictures)
    for i in ids:
        pieces.append(next(pictures) if i == image_id else embed(torch.tensor([i])))
    x = torch.cat(pieces)[None]
    given = {"inputs_embeds": x, "attention_mask": torch.ones(x.shape[:2], dtype=torch.long)}
    greedy = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None, "suppress_tokens": never}
    return hf(**given).logits[0, -1], hf.generate(**given, **greedy)[0].tolist()


# ---------------------------------------------------------------- parts of the rules


def amount(tokens, rate):
    return max(1, min(tokens, math.floor(rate * tokens + 0.5)))


NEAR = 1e-5  # scores this close to each other, relative to the largest, may be in another order in fp32


def ranked(scores, count, ours=()):
    """Indices of the highest scores, in descending order; of equal ones the lower index first.

    ours: indices that are preferred among those with nearly the score of the last one.
    """
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    if not count or not len(ours):
        return order[:count]
    cut, off = scores[order[count - 1]], NEAR * max(map(abs, scores))
    sure = [i for i in order if scores[i] > cut + off]
    near = [i for i in order if abs(scores[i] - cut) <= off]
    return sure + sorted(near, key=lambda i: i not in ours)[: count - len(sure)]


def shares(total, weights, room):
    """Floors of the proportions, then one token at a time to whom most is owed."""
    ideal = [Fraction(total * w, max(1, sum(weights))) for w in weights]
    given = [min(math.floor(x), r) for x, r in zip(ideal, room, strict=True)]
    while sum(given) < min(total, sum(room)):
        owed = [x - g if g < r else -math.inf for x, g, r in zip(ideal, given, room, strict=True)]
        given[owed.index(max(owed))] += 1
    return given


# ---------------------------------------------------------------- the rules; ours: see `ranked`


def hired(seen, rate=0.2, whole=0.5, ours=()):
    late, total = seen.looked_at(seen.read), amount(seen.count, rate)
    room = [len(seen.of(square)) for square in range(seen.squares)]
    counts = [total]
    if seen.grid:
        first = max(min(math.floor(whole * total), room[0]), total - sum(room[1:]))
        side, (rows, columns) = seen.side, seen.grid
        # the whole picture fills the canvas of the tiles except for equal borders on two sides
        border = [(n * side - kept) // 2 for n, kept in zip(seen.grid, seen.map, strict=True)]
        marks = [0] * (rows * columns)
        for i in ranked(seen.looked_at(0)[: side**2], math.floor(side**2 * (1 - whole))):
            y, x = (
                border[axis] + Fraction(2 * part + 1, 2 * side) * seen.map[axis]
                for axis, part in enumerate(divmod(i, side))
            )
            marks[math.floor(y / side) * columns + math.floor(x / side)] += 1
        counts = [first, *shares(total - first, marks, room[1:])]
    chosen = []
    for square, count in enumerate(counts):
        own = seen.of(square)
        chosen += own[ranked(late[own], count, np.flatnonzero(np.isin(own, ours)))].tolist() if count else []
    return sorted(chosen), counts


def vtc_cls(seen, rate=0.0625, first=None, ours=()):
    first = min(math.floor(2 * seen.depth / 3 + 0.5), seen.depth - 2) if first is None else first
    total = np.sum([seen.looked_at(layer) for layer in range(first, seen.depth - 1)], axis=0)
    return sorted(ranked(total, amount(seen.count, rate), ours))


def fopru_scores(seen):
    """The two candidates, received and given (P,)."""
    received, given = np.zeros((2, seen.count))
    for square in range(seen.squares):
        own = seen.of(square)
        if len(own):
            at = seen.cls + seen.cell[own]
            mean = seen.attention[seen.read][square].mean(0)[at][:, at]  # no CLS
            received[own], given[own] = mean.mean(0), mean.mean(1)
    return received, given


def fopru(seen, rate=0.25, form="rank", ours=()):
    scores, count = max(fopru_scores(seen), key=np.var), amount(seen.count, rate)
    if form == "rank":
        return sorted(ranked(scores, count, ours))
    rows, chosen = [[i for i in row if i >= 0] for row in seen.rows()], []
    for i in ranked([scores[row].mean() for row in rows], len(rows)):
        if len(chosen) < count:
            chosen += rows[i]
    return sorted(chosen)


def visionzip(seen, rate=0.1111, contextual=10 / 64, ours=None):
    total, matrix = amount(seen.count, rate), []
    room = [len(seen.of(square)) for square in range(seen.squares)]
    layer, cls = seen.layers[seen.read], seen.cls
    keys = layer.self_attn.k_proj(layer.layer_norm1(seen.states[seen.read])).double().numpy()
    keys = keys.reshape(*keys.shape[:2], seen.attention[0].shape[1], -1).mean(2)[:, cls:]  # mean over heads, no CLS
    for square, count in enumerate(shares(total, room, room)):
        if not count:
            continue
        columns = seen.count + cls * seen.squares
        row = np.zeros(columns)
        row[cls * (seen.count + square)] = 1
        matrix += [row] * cls
        own, sums = seen.of(square), min(math.floor(contextual * count + 0.5), count - cls)
        count -= cls
        mine = np.zeros((count, seen.count)) if ours is None else ours[len(matrix) :][:count]
        alone, joined = mine[: count - sums, own], mine[count - sums :]
        dominant = sorted(ranked(seen.looked_at(seen.read)[own], count - sums, np.flatnonzero(alone.any(0))))
        matrix += list(np.eye(seen.count, columns)[own[dominant]])
        rest = [i for i in own if i not in set(own[dominant])]
        targets = rest[:: max(1, len(rest) // sums)][:sums] if sums else []
        unit = {i: v / np.linalg.norm(v) for i, v in zip(rest, keys[square][seen.cell[rest]], strict=True)}
        groups = {t: [] for t in targets}
        for i in rest if targets else []:
            if i not in groups:
                likeness = [unit[i] @ unit[t] for t in targets]
                near = np.flatnonzero(np.array(likeness) >= max(likeness) - NEAR)
                near = [k for k in near if joined[k, i]] or [int(np.argmax(likeness))]
                groups[targets[near[0]]].append(i)
        for target, others in groups.items():
            row = np.zeros(columns)
            row[others] = 1 / max(1, len(others))
            row[target] += 1
            matrix.append(row)
    return np.array(matrix)


def divprune(seen, rate=0.098, ours=()):
    features = seen.resized(seen.hf.model.multi_modal_projector(seen.features[:, seen.cls :].flatten(0, 1)[None])[0])
    unit = features.double().numpy()
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    distance = 1 - unit @ unit.T
    alone = distance + np.diag(np.full(seen.count, np.inf))
    chosen, nearest = [], alone.min(1)
    while len(chosen) < amount(seen.count, rate):
        best = [i for i in np.flatnonzero(nearest >= nearest.max() - NEAR) if i in ours] or [nearest.argmax()]
        chosen.append(int(max(best, key=lambda i: nearest[i])))
        nearest = distance[chosen].min(0) if len(chosen) == 1 else np.minimum(nearest, distance[chosen[-1]])
        nearest[chosen] = -np.inf
    return sorted(chosen)


def likeness(patches, block):
    """patches (n, S, S, C) -> windows of patches, row by row, and (n, W) the mean cosine of two different ones."""
    squares, side = patches.shape[:2]
    windows = [
        [y * side + x for y in range(top, top + block) for x in range(left, left + block)]
        for top in range(0, side - block + 1, block)
        for left in range(0, side - block + 1, block)
    ]
    flat = patches.reshape(squares, side**2, -1)
    unit = flat / np.linalg.norm(flat, axis=2, keepdims=True)
    pairs = block**2 * (block**2 - 1)
    alike = [[sum(p[i] @ p[j] for i in w for j in w if i != j) / pairs for w in windows] for p in unit]
    return windows, np.array(alike)


def in_order(alike, count, windows, ours):
    """The windows with the highest likeness, in descending order; nearly equal ones in the order of the matrix ours."""
    if ours is None:
        return ranked(alike, count)
    left, place = alike.copy(), [int(np.argmax(ours[:, window[0]])) for window in windows]
    chosen = []
    while len(chosen) < count:
        chosen.append(min(np.flatnonzero(left >= left.max() - NEAR), key=lambda i: place[i]))
        left[chosen[-1]] = -np.inf
    return chosen


def mustdrop1(patches, threshold=0.8, block=3, rate=None, ours=None):
    """patches (n, S, S, C) -> matrix (n, m, S * S)."""
    squares, side = patches.shape[:2]
    windows, alike = likeness(patches, block)
    count = min((row >= threshold).sum() for row in alike)
    if rate is not None:  # the fewest windows that leave no more than asked for
        left = amount(squares * side**2, rate)
        enough = (k for k in range(len(windows)) if squares * (side**2 - k * (block**2 - 1)) <= left)
        count = next(enough, len(windows))
    matrix = np.zeros((squares, side**2 - count * (block**2 - 1), side**2))
    for square in range(squares):
        best = [windows[i] for i in in_order(alike[square], count, windows, ours if ours is None else ours[square])]
        for row, window in enumerate(best):
            matrix[square, row, window] = 1 / len(window)
        rest = sorted({*range(side**2)} - {i for window in best for i in window})
        matrix[square, np.arange(count, count + len(rest)), rest] = 1
    return matrix


def mustdrop1_keys(seen, share=0.08):
    """The tokens that later stages may not drop."""
    return sorted(ranked(seen.looked_at(seen.depth - 1), math.ceil(share * seen.count)))
