"""YOPO in transformers: eager attention with a mask for each head, written from the paper's rules in plain loops.

Imports nothing from model/.
"""

import math

import pytest
import torch
from oracle import expanded, hf_kind, hf_pictures


def cells_of(generation):
    """[(picture, square, row, column)] of the vision tokens of a prompt, in their order.

    LLaVA: one square. LLaVA-NeXT: the square of the whole picture, then the map of its tiles without the border, with
    a newline after each row. LLaVA-OneVision: the map of more than about 9 tiles is shrunk; without tiles a newline
    ends the square, of the frames only the last one, which have half of the rows and columns.
    """
    config, found = generation.checkpoint.config, []
    side = config.vision_config.image_size // config.vision_config.patch_size
    for picture, image in enumerate(generation.images):
        square = math.ceil(side / 2) if image["mode"] == "frame" else side
        found += [(picture, 0, row, column) for row in range(square) for column in range(square)]
        last = not any(later["mode"] == "frame" for later in generation.images[picture + 1 :])
        if config.max_tiles and (image["mode"] == "pad" or image["mode"] == "frame" and last):
            found.append((picture, 0, square - 1, square))
        if image["mode"] == "anyres":
            from transformers.models.llava_next import modeling_llava_next as theirs

            size, pinpoints = image["size"][::-1], [list(pair) for pair in config.image_grid_pinpoints]
            grid = theirs.get_anyres_image_grid_shape(size, pinpoints, config.vision_config.image_size)
            _, rows, columns = theirs.unpad_image(torch.empty(1, grid[0] * side, grid[1] * side), size).shape
            excess = math.sqrt(rows * columns / (9 * side**2)) if config.max_tiles else 1  # anyres_max_9
            rows, columns = (int(n // excess) if excess > 1.1 else n for n in (rows, columns))
            found += [(picture, 1, row, column) for row in range(rows) for column in range(columns + 1)]
    return found


def near_mask(cells, radius):
    """(n, n) bool: tokens of one square at most radius rows and columns apart."""
    return torch.tensor(
        [[a[:2] == b[:2] and abs(a[2] - b[2]) <= radius and abs(a[3] - b[3]) <= radius for b in cells] for a in cells]
    )


def attention_by_hand(query, key, value, scaling, vision, blind, near=None, renormalise=True, last=False):
    """query (B, Hq, T, D), key and value (B, Hkv, T, D) of a prefill -> (B, Hq, T, D), with whole matrices.

    vision (T,) bool; blind (Hkv,) bool: heads that do not see vision; near (n, n) bool: what vision tokens see of each
    other, None for causal; last: after the layer cut, no token sees vision but a vision token itself.
    """
    heads, t = query.shape[1], query.shape[2]
    group = heads // key.shape[1]
    scores = query @ key.repeat_interleave(group, 1).transpose(2, 3) * scaling
    allowed = torch.ones(t, t, dtype=torch.bool).tril()
    at = vision.nonzero()[:, 0]
    if near is not None:
        allowed[at[:, None], at] = near
    if last:
        allowed[:, at] = False
        allowed[at, at] = True
    allowed = allowed.repeat(heads, 1, 1)
    lost, silent = torch.zeros(heads, t, t, dtype=torch.bool), torch.zeros(heads, t, dtype=torch.bool)
    for head in range(heads):
        if blind[head // group] and not last:
            silent[head, at] = True
            if renormalise:
                allowed[head][:, at] = False
            else:
                allowed[head] = torch.ones(t, t, dtype=torch.bool).tril()
                lost[head][:, at] = True
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1).masked_fill(lost, 0.0)
    out = weights.nan_to_num(0.0) @ value.repeat_interleave(group, 1)
    return out.masked_fill(silent[..., None], 0.0)


def yopo_ids(folder, generation, active, last, count, radius=None, neurons=1.0, prefill=True, renormalise=True):
    """Greedy ids of transformers. active: per layer a list of bool per KV head; last: the number of layers that process
    vision tokens; the rest as the settings of `yopo`. Returns (ids, [keep (Hkv, T) of each layer], logits (V,) of the
    first id)."""
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle of these tests")
    prompt = expanded(generation)
    config = generation.checkpoint.config
    vision = torch.tensor([token in (config.image_token_index, config.video_token_index) for token in prompt])
    near = None if radius is None else near_mask(cells_of(generation), radius)
    active = torch.tensor(active)
    keep = [~vision | (active[i][:, None] & (i < last)) for i in range(len(active))]

    def attend(module, query, key, value, mask, scaling, **_):
        layer = module.layer_idx
        if query.shape[2] > 1:
            blind = ~active[layer] & prefill
            out = attention_by_hand(query, key, value, scaling, vision, blind, near, renormalise, layer >= last)
        else:
            group, new = query.shape[1] // key.shape[1], key.shape[2] - len(prompt)
            seen = torch.nn.functional.pad(keep[layer], (0, new), value=True).repeat_interleave(group, 0)[:, None]
            scores = query @ key.repeat_interleave(group, 1).transpose(2, 3) * scaling
            out = scores.masked_fill(~seen, float("-inf")).softmax(-1) @ value.repeat_interleave(group, 1)
        return out.transpose(1, 2).contiguous(), None

    def fewer(mlp, inputs, output):
        (x,) = inputs
        if x.shape[1] > 1:
            used = torch.arange(mlp.gate_proj.out_features) < int(neurons * mlp.gate_proj.out_features)
            hidden = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
            return torch.where(vision[:, None], mlp.down_proj(hidden * used), output)

    transformers.AttentionInterface.register("yopo", attend)
    with torch.device("cpu"):
        model = getattr(transformers, hf_kind(config) + "ForConditionalGeneration")
        model = model.from_pretrained(folder, dtype=torch.float32).eval()
        model.model.language_model.set_attn_implementation("yopo")
        for layer in model.model.language_model.layers[:last]:
            layer.mlp.register_forward_hook(fewer)
        out = model.generate(
            input_ids=torch.tensor([prompt]), **hf_pictures([generation]), max_new_tokens=count, do_sample=False,
            eos_token_id=None, suppress_tokens=generation.checkpoint.never_ids, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    return out.sequences[0, len(prompt) :].tolist(), keep, out.logits[0][0]
