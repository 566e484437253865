"""Peak memory of each stage of an answer, counted from the tensors that the code holds. Needs neither torch nor a GPU.

`roofline.py --stages` prints it. A stage holds the weights, K and V of the layers that are done, and activations. It
peaks at one of a few moments, whose tensors `tower`, `projector`, `joined`, `prefill`, `choice`, `pack` and `norm` list
in the order of the code; the largest moment counts. T tokens, C channels of the decoder, F of its MLP, q and kv:
channels of its queries, and of its keys and values together; n squares of P patches with C_v channels.

Not counted: the picture's pixels outside the tower, workspaces of products and convolutions (16-bit pixels are copied
once), other scores than attention of CHOSEN rows, and states that a method reads in the tower. A CPU computes 16-bit
norms on copies in fp32. They are counted in the final norm, where they can be the peak; a GPU makes none.
"""

from dataclasses import dataclass

ROWS = 2048  # model.llama.ROWS
SQUARES = 8  # model.clip.SQUARES
CHOSEN = 64  # model.view.ROWS: rows whose attention to all tokens is computed together
SLACK = 64  # free slots per head after the prefill
SIZES = (2, 4, 6, 8, 12, 16, 24, 32, 40, 48, 64, 80, 96, 141, 192)  # GB of usual machines and GPUs


@dataclass(frozen=True)
class Need:
    """Bytes that a stage needs at its peak; at: the moment of the peak and its tensors."""

    name: str
    weights: float
    kv: float
    activations: float
    at: str

    @property
    def total(self):
        return self.weights + self.kv + self.activations


def needs(shape, batch=1, kept=1.0, size=2):
    """The Need of each stage of `batch` answers to the shape's prompt, prefilled one by one. size: bytes per number."""
    c, tokens = shape.config, shape.vision + shape.text
    weights, layers = size * shape.resident_numbers, c.num_hidden_layers
    cache = size * shape.kv_numbers * (shape.text + kept * shape.vision + SLACK)
    others = (batch - 1) * cache

    def need(name, kv, moments):
        at, count = max(moments, key=lambda moment: moment[1])
        return Need(name, weights, kv, size * count, at)

    largest = max((c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim, 2 * c.intermediate_size)
    yield need("loading", 0, [("one layer's weights side by side", largest * c.hidden_size)])
    if shape.tower:
        yield need("vision tower", 0, tower(shape.tower, shape.squares))
        yield need("projector", 0, projector(shape.tower, shape.squares, c.hidden_size))
        yield need("joined map", 0, joined(shape.tower, shape.squares, shape.vision, c.hidden_size))
    done = (layers - 1) / layers * cache
    yield need("prefill, last layer", others + done, prefill(shape, tokens))
    yield need("choice, last layer", others + done, choice(shape, tokens, size))
    yield need("pack, last layer", others + cache, pack(shape, tokens, kept, size))
    yield need("final norm", others + cache, norm(shape, tokens, size))
    yield need("decode step", batch * cache, [("logits", batch * c.vocab_size)])


def tower(vision, squares):
    """(words, numbers) of the moments of a vision tower with this many squares."""
    c, rows, pixels = vision.hidden, vision.patches + vision.cls, squares * 3 * vision.side**2
    whole, inner = squares * rows * c, (3 if vision.sigmoid else 2) * vision.intermediate
    for start in range(0, squares, SQUARES):
        group = min(SQUARES, squares - start) * rows
        words = f"MLP: pixels, n P C_v, squares done, {SQUARES} P (2 C_v + {inner // vision.intermediate} F_v)"
        yield words, pixels + whole + start * rows * c + group * (2 * c + inner)
    yield "joined squares: pixels, 3 n P C_v", pixels + (3 if squares > SQUARES else 2) * whole


def projector(vision, squares, wide):
    patches = squares * vision.patches
    features = squares * (vision.patches + vision.cls) * vision.hidden + vision.cls * patches * vision.hidden
    return [("pixels, features, 2 n P C", squares * 3 * vision.side**2 + features + 2 * patches * wide)]


def joined(vision, squares, tokens, wide):
    """With tiles: the tokens of all squares, the map of the tiles, its rows with newlines, all of the picture. Then the
    prompt is put together."""
    if squares > 1:
        yield "(2 n - 1) P C, 2 T C", ((2 * squares - 1) * vision.patches + 2 * tokens - vision.patches) * wide
    yield "2 T C", 2 * tokens * wide


def channels(config):
    """C, q, kv and the width of RoPE's cos and sin."""
    d = config.head_dim
    return config.hidden_size, config.num_attention_heads * d, 2 * config.num_key_value_heads * d, 2 * d


def prefill(shape, tokens):
    """One layer of the decoder. The prompt is held throughout."""
    (c, q, kv, rope), f = channels(shape.config), shape.config.intermediate_size
    blocks = max(1, tokens // ROWS)
    block = -(-tokens // blocks)
    held = tokens * (c + rope)  # the prompt, cos and sin
    yield "rotation: T (3 C + 3 q + kv)", held + tokens * (2 * c + 3 * q + kv)
    yield "output projection: T (4 C + 2 q + kv)", held + tokens * (3 * c + 2 * q + kv)
    rows = tokens * (2 * c + q + kv) + (tokens - block) * c + block * (c + 3 * f)
    yield f"MLP: T (4 C + q + kv), {block} rows of 3 F", held + rows
    if blocks > 1:
        yield "blocks of the MLP: T (5 C + q + kv)", held + tokens * (4 * c + q + kv)


def choice(shape, tokens, size):
    """Attention of CHOSEN rows, fp32: before and after the softmax, and the keys."""
    c, q, kv, rope = channels(shape.config)
    scores = 2 * shape.config.num_attention_heads * min(CHOSEN, tokens) * tokens + tokens * kv // 2
    yield f"T (2 C + q + kv), fp32: 2 Hq {CHOSEN} T, keys", tokens * (2 * c + q + kv + rope) + scores * 4 / size


def pack(shape, tokens, kept, size):
    """The dense layer and, if some are dropped, the kept rows of K or V and their indices, int64."""
    c, q, kv, rope = channels(shape.config)
    rows = (shape.text + kept * shape.vision) * (kept < 1)
    indices = 2 * shape.config.num_key_value_heads * rows * 8 / size
    yield "T (2 C + q + kv), kept rows", tokens * (2 * c + q + kv + rope) + rows * kv / 2 + indices


def norm(shape, tokens, size):
    """The norm after the last layer, in fp32. The prompt, cos and sin are still held."""
    c, *_, rope = channels(shape.config)
    copies = 3 if size < 4 else 2
    yield f"T 2 C, fp32: {copies} T C", tokens * (2 * c + rope + copies * c * 4 / size)


def table(shape, batch, size):
    """(head, rows of cells): megabytes of each stage, everything kept."""
    head = ["memory", "weights MB", "K and V MB", "activations MB", "together MB", "activations consist of"]
    found = needs(shape, batch, size=size)
    return head, [
        [n.name, *(f"{1e-6 * x:,.1f}" for x in (n.weights, n.kv, n.activations, n.total)), n.at] for n in found
    ]


def peak(shape, batch, kept, size):
    """In words: the stage that needs most memory, how much, and what it fits in."""
    found = list(needs(shape, batch, kept, size))
    most = max(found, key=lambda need: need.total)
    fits = next((f"it fits in {gb} GB" for gb in SIZES if most.total <= 1e9 * gb), f"it exceeds {SIZES[-1]} GB")
    over = 1e-6 * (most.total - most.weights - found[-1].kv)
    return (
        f"the peak is {1e-9 * most.total:.2f} GB, in the stage {most.name!r}, {over:,.1f} MB more than the weights and "
        f"the final K and V; {fits}"
    )
