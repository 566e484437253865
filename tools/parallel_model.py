"""What tensor parallelism costs and gains, from bytes, flops and collectives. Needs neither torch nor a GPU.

`roofline.py --tp N` prints it. With N ranks, each reads and multiplies 1/N of the language model's matrices and of K
and V (Megatron-LM, arXiv 1909.08053; model/parallel.py). Norms, tower and projector are whole in each; the pictures'
squares are divided. A ring all-reduce of b bytes sends 2 (N - 1) / N b from each rank, an all-gather of b bytes in all
(N - 1) / N b (Patarasuk and Yuan, 2009). A collective takes its latency plus its bytes / link, and nothing overlaps
with it.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    """Between ranks: bytes/s of each rank in one direction, and seconds that a collective of no bytes takes."""

    name: str
    bandwidth: float
    latency: float


# NVLink 4 has 450 GB/s in each direction (NVIDIA's data sheet of the H100: 900 in both), of which a ring of NCCL
# reaches 370 (a maintainer in NVIDIA/nccl-tests issue 212). DGX H100 has one ConnectX-7 of 400 Gb/s for each GPU (its
# user guide); with a ring through each of the 8, a node sends 400 GB/s. Latencies are assumptions: small all-reduces
# took 6 us with 2 GPUs of an HGX H100 in a CUDA graph (NVIDIA/nccl issue 1259), 34 us with 8 A100 in one ring
# (nccl-tests issue 123), and 1 to 4 MB took 120 us with two nodes of 8 H20 (nccl issue 1244).
NODE = 8
NVLINK = Link("NVLink", 370e9, 10e-6)
INFINIBAND = Link("InfiniBand", 400e9, 40e-6)


@dataclass(frozen=True)
class Collective:
    """count equal calls; bytes: of the whole tensor, for each."""

    what: str
    kind: str  # "all_reduce" or "all_gather", as PyTorch calls them
    count: int
    bytes: float

    def seconds(self, ranks, link):
        """Of all calls together."""
        passes = (2 if self.kind == "all_reduce" else 1) * (ranks - 1) / ranks
        return self.count * (link.latency + passes * self.bytes / link.bandwidth)


def step(config, batch=1, size=2):
    """The Collectives of a decode step. config: as `roofline.Shape.config`; size: bytes per number."""
    row = size * batch * config.hidden_size
    yield Collective("embedding", "all_reduce", 1, row)
    yield Collective("attention and MLP", "all_reduce", 2 * config.num_hidden_layers, row)
    yield Collective("logits", "all_gather", 1, size * batch * config.vocab_size)


def prefill(config, tokens, text, runs, measured=0, vision=0, size=2):
    """The Collectives of a prompt's prefill.

    tokens, text: in all, and of them text, in so many runs between pictures; measured: bytes of all heads that a method
    measures in each layer, 0 for none; vision: tokens of all squares, 0 for a single square, which all ranks encode.
    """
    row = size * config.hidden_size
    if vision:
        yield Collective("vision tokens", "all_gather", 1, row * vision)
    yield Collective("embedding", "all_reduce", runs, row * text / runs)
    yield Collective("attention and MLP", "all_reduce", 2 * config.num_hidden_layers, row * tokens)
    yield Collective("logits", "all_gather", 1, size * config.vocab_size)
    if measured:
        yield Collective("method", "all_gather", config.num_hidden_layers, measured)
    yield Collective("kept tokens", "all_gather", 1, 4 * config.num_hidden_layers * config.num_key_value_heads)
    yield Collective("bytes held", "all_reduce", 1, 8)


def counts(collectives):
    """{kind: number of calls}."""
    found = {}
    for one in collectives:
        found[one.kind] = found.get(one.kind, 0) + one.count
    return found


def fits(config, ranks):
    """Can the heads and neurons be divided among so many ranks?"""
    return config.num_key_value_heads % ranks == 0 and config.intermediate_size % ranks == 0


def divided(shape):
    """Numbers of a shape's weights that are divided: matrices and biases of the layers, embedding and head."""
    return shape.layer_numbers + shape.bias_numbers + shape.head_numbers * (1 if shape.tied else 2)


def weight_bytes(shape, ranks, size=2):
    """Bytes of the weights that each rank holds, those of tower and projector included."""
    return size * (shape.resident_numbers - divided(shape) * (1 - 1 / ranks))


@dataclass(frozen=True)
class Time:
    """Seconds of a stage in each rank: bytes and products, the larger of both; collectives."""

    work: float
    collectives: float

    @property
    def total(self):
        return self.work + self.collectives


def step_time(shape, machine, ranks, link, batch=1, kept=1.0, size=2):
    """The Time of a decode step of `batch` sequences that hold the fraction `kept` of their vision tokens."""
    kv = batch * (shape.text + kept * shape.vision) * shape.kv_numbers
    return _time(
        shape, machine, ranks, link, kv, shape.decode_flops(batch, kept), step(shape.config, batch, size), size
    )


def prefill_time(shape, machine, ranks, link, size=2):
    """The Time of one sequence's prefill in the language model, with a method that measures nothing."""
    tokens = shape.vision + shape.text
    vision = shape.squares * shape.tower.patches if shape.tower and shape.squares > 1 else 0
    found = prefill(shape.config, tokens, shape.text, 2, vision=vision, size=size)
    return _time(shape, machine, ranks, link, tokens * shape.kv_numbers, shape.prefill_flops(), found, size)


def tower_time(shape, machine, ranks, size=2):
    """Seconds of tower and projector for the pictures of one prompt, whose squares the ranks divide."""
    tower, wide, squares = shape.tower, shape.config.hidden_size, -(-shape.squares // ranks)
    flops = tower.tower_flops(squares) + tower.projector_flops(squares, wide)
    return max(size * (tower.tower_numbers + tower.projector_numbers(wide)) / machine.bandwidth, flops / machine.flops)


def _time(shape, machine, ranks, link, kv, flops, collectives, size):
    """kv, flops: numbers of K and V, and flops, of all ranks together."""
    matrices = shape.layer_numbers + shape.bias_numbers + shape.head_numbers
    numbers = shape.weight_numbers - matrices + (matrices + kv) / ranks  # norms and a row of the embedding are whole
    work = max(size * numbers / machine.bandwidth, flops / ranks / machine.flops)
    return Time(work, sum(one.seconds(ranks, link) for one in collectives) if ranks > 1 else 0.0)


HEAD = ["batch", "ranks", "link", "weights GB per rank", "KV GB per rank", "step ms", "collectives ms", "speed-up",
        "speed-up / ranks", "prefill ms", "tower ms"]  # fmt: skip


def link_of(ranks, bandwidth=None, latency=None):
    """The Link of so many ranks: NVLink within a node, else InfiniBand. bandwidth, latency: others than theirs."""
    usual = NVLINK if ranks <= NODE else INFINIBAND
    return Link(
        usual.name if bandwidth is None else f"{1e-9 * bandwidth:g} GB/s",
        usual.bandwidth if bandwidth is None else bandwidth, usual.latency if latency is None else latency,
    )  # fmt: skip


def rows(shape, machine, numbers, batch, links=link_of, size=2):
    """Yields a row for `HEAD` for each number of ranks. links: ranks -> Link."""
    one = step_time(shape, machine, 1, None, batch, size=size).total
    for ranks in numbers:
        if not fits(shape.config, ranks):
            yield [str(batch), str(ranks), "heads or neurons cannot be divided", *[""] * (len(HEAD) - 3)]
            continue
        link, kv = links(ranks), size * batch * (shape.text + shape.vision) * shape.kv_numbers / ranks
        took, first = (
            time(shape, machine, ranks, link, *more, size=size)
            for time, more in ((step_time, [batch]), (prefill_time, []))
        )
        yield [
            str(batch), str(ranks), link.name if ranks > 1 else "", f"{1e-9 * weight_bytes(shape, ranks, size):.2f}",
            f"{1e-9 * kv:.2f}", f"{1e3 * took.total:.2f}", f"{1e3 * took.collectives:.2f}",
            f"{one / took.total:.2f}x", f"{one / took.total / ranks:.2f}", f"{1e3 * first.total:.1f}",
            f"{1e3 * tower_time(shape, machine, ranks, size):.1f}" if shape.tower else "",
        ]  # fmt: skip


def verdict(shape, machine, numbers, batch, links=link_of, size=2):
    """(ranks of the fastest step, the most ranks of which each does at least half of what one alone does)."""
    times = {1: step_time(shape, machine, 1, None, batch, size=size).total}
    times |= {n: step_time(shape, machine, n, links(n), batch, size=size).total for n in numbers if n > 1}
    times = {ranks: seconds for ranks, seconds in times.items() if fits(shape.config, ranks)}
    return min(times, key=times.get), max(n for n, seconds in times.items() if times[1] / seconds >= n / 2)
