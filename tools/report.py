"""What an answer took: the object of `run.py --json` and the table of `run.py --stats`."""

import contextlib
import glob
import math
import sys
import time
from pathlib import Path

import torch


def report(generation, model, seed, load_seconds, device):
    """The object of --json: what was asked, what was said, bytes and milliseconds. generation must be over."""
    checkpoint, steps = generation.checkpoint, sorted(generation.timing["steps"])
    config, cache, prune = checkpoint.config.text_config, generation.cache, generation.prune
    row = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * checkpoint.dtype.itemsize
    kv_bytes = row * generation.prompt_tokens  # K and V of the whole prompt, all layers
    held = generation.bytes_held
    return {
        "text": generation.text,
        "token_ids": generation.token_ids,
        "finish_reason": generation.finish_reason,
        "model": str(model),
        "template": generation.template,
        "image_mode": generation.image_settings.mode,
        "images": generation.images,
        "prompt_tokens": generation.prompt_tokens,
        "vision_tokens": generation.vision_tokens,
        "new_tokens": len(generation.token_ids),
        "prune": {
            "method": prune.name if prune else "none",
            "settings": prune.settings if prune else {},
            "retention_requested": requested(prune),
            "retention_actual": generation.retention,
            "kept_per_layer": generation.kept,
            "kv_bytes_full": kv_bytes,
            "kv_bytes_held": held,
            "kv_bytes_reserved": cache.nbytes_reserved if cache else 0,
        },
        "timing_ms": {
            "load": 1e3 * load_seconds,
            "vision": 1e3 * generation.timing["vision"],
            "prefill": 1e3 * generation.timing["prefill"],
            "prune": 1e3 * generation.timing["prune"],  # a part of prefill
            "decode_total": 1e3 * sum(steps),
            "decode_p50": 1e3 * percentile(steps, 0.5),
            "decode_p95": 1e3 * percentile(steps, 0.95),
        },
        "peak_memory_bytes": peak_memory(device),
        # unpruned bytes per decode step over the bytes it really reads
        "ceiling_speedup": step_bytes(checkpoint, kv_bytes) / step_bytes(checkpoint, held) if held else 1.0,
        "seed": seed,
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
        "device": str(device),
        "dtype": str(checkpoint.dtype).removeprefix("torch."),
        "backend": generation.way,
    }


def comparison(generation, reference, found):
    """The `compare` object of --json: the unpruned answer, and where the pruned one (`generation`) leaves it."""
    return {
        "text": reference.text,
        "token_ids": reference.token_ids,
        "same_text": reference.text == generation.text,
        "same_tokens": found["same"],  # of the steps along the unpruned answer
        "first_divergence": found["diverges"],  # index of a step, None if there is none
        "kl_mean": found["kl"].mean().item(),
        "kl_max": found["kl"].max().item(),
        "steps": found["steps"],
        "kv_bytes_held": reference.bytes_held,
        "timing_ms": {
            "prefill": 1e3 * reference.timing["prefill"],
            "decode_p50": 1e3 * percentile(sorted(reference.timing["steps"]), 0.5),
        },
    }


def differences(found, took):
    """The table of run.py --compare, from that and the pruned run's own object."""
    first, steps = found["first_divergence"], found["steps"]
    where = "never" if first is None else f"at token {first + 1} of {steps}"
    before, after = found["timing_ms"], took["timing_ms"]
    held = [1e-6 * n for n in (found["kv_bytes_held"], took["prune"]["kv_bytes_held"])]
    lines = [
        f"unpruned {found['text']}",
        f"pruned   {took['text']}",
        f"differs  {where}; along the unpruned answer {100 * found['same_tokens']:.1f} % of the tokens are the same,",
        f"         KL {found['kl_mean']:.4f} nats on average, {found['kl_max']:.4f} at most",
        f"KV cache {held[0]:.2f} -> {held[1]:.2f} MB held",
        f"prefill  {before['prefill']:.1f} -> {after['prefill']:.1f} ms (the unpruned run came second, warm)",
        f"decode   {before['decode_p50']:.2f} -> {after['decode_p50']:.2f} ms/token",
    ]
    return "\n".join(lines)


def requested(prune):
    """The fraction that was asked for; None without pruning or where the budget is a number of tokens."""
    if prune is None or prune.settings.get("keep_tokens") is not None:
        return None
    return prune.settings.get("retention")


def percentile(values, q):
    """Nearest rank in a sorted list; 0 if it is empty."""
    return values[math.ceil(q * len(values)) - 1] if values else 0.0


def peak_memory(device):
    """Bytes: of the allocator on CUDA since loading, of the whole process (mapped weights included) on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0  # not to be had from the standard library
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def free_memory(device):
    """Bytes that a device, or this machine, has free. Where the system does not say: 2 GB."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    table = Path("/proc/meminfo")
    lines = table.read_text().splitlines() if table.exists() else ()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), 2 * 10**9)


class CoreWait:
    """How much of the time the threads of this process wait, ready to run, for a core that something else uses.

    Linux counts it for every thread, in nanoseconds; elsewhere, and where a GPU computes, nothing is known or said.
    """

    def __init__(self, device):
        """Begin now."""
        self.known = device.type == "cpu" and sys.platform == "linux"
        self.start, self.before = time.perf_counter(), _waited()

    def share(self):
        """Of the time of all threads since the beginning, 0 to 1."""
        seconds = time.perf_counter() - self.start
        return (_waited() - self.before) / (torch.get_num_threads() * seconds) if self.known else 0.0

    def note(self):
        """One line if products are computed by several threads and these wait a lot, else None."""
        share, threads = self.share(), torch.get_num_threads()
        if threads == 1 or share < 0.2 or _waited() - self.before < 0.1:  # seconds; a short answer says little
            return None
        return (
            f"note: {threads} threads spent {100 * share:.0f} % of the time waiting for cores that something else "
            "uses; --threads 1 may be much faster"
        )


def _waited():
    """Seconds that the threads of this process have waited for a core; 0 where the system does not say."""
    total = 0
    for path in glob.glob("/proc/self/task/*/schedstat"):
        with contextlib.suppress(OSError), open(path, encoding="ascii") as file:  # a thread may have ended
            total += int(file.read().split()[1])  # time on a core, waiting for one, number of turns
    return 1e-9 * total


def measure_bandwidth(device):
    """Bytes per second of this machine's memory: the better of a copy and a read-only sum, best of five.

    It takes at most half of what is free, for two tensors. 0 where that is next to nothing.
    """
    size = 2**28 if device.type == "cuda" else 2**26  # 1 GiB or 256 MiB: beyond caches, and the launch does not count
    size = min(size, free_memory(device) // 16)  # numbers of 4 bytes
    if size < 2**20:
        return 0.0
    x = torch.ones(size, dtype=torch.float32, device=device)
    y = torch.empty_like(x)
    best = 0.0
    for work, moved in ((lambda: y.copy_(x), 2 * x.nbytes), (x.sum, x.nbytes)):
        for _ in range(5):
            start = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = max(best, moved / (time.perf_counter() - start))
    return best


def step_bytes(checkpoint, kv_bytes):
    """Bytes that one decode step has to read: the decoder's weights (of the embedding one row) and the KV cache."""
    language = checkpoint.model.language_model
    weights = sum(p.nbytes for p in language.parameters())
    table = language.model.embed_tokens.weight
    return weights - (table.nbytes - table[0].nbytes if language.lm_head is not None else 0) + kv_bytes


def stats(r, bandwidth, generation):
    """The table of --stats, from the --json object."""
    t, kv = r["timing_ms"], r["prune"]
    steps = len(generation.timing["steps"])
    lines = [
        f"load     {t['load']:8.1f} ms",
        f"vision   {t['vision']:8.1f} ms        {r['vision_tokens']} image tokens of {len(r['images'])} pictures",
        f"prefill  {t['prefill']:8.1f} ms        {r['prompt_tokens']} prompt tokens; time to first token "
        f"{t['vision'] + t['prefill']:.1f} ms",
    ]
    for image in r["images"] if len(r["images"]) > 1 or r["image_mode"] == "anyres" else ():
        cost = 1e-6 * kv["kv_bytes_full"] * image["tokens"] / r["prompt_tokens"]
        name = image["path"] if len(image["path"]) < 40 else "..." + image["path"][-37:]
        lines.append(
            f"         {name}: {image['size'][0]} x {image['size'][1]} pixels, {image['tiles']} squares, "
            f"{image['tokens']} tokens, {cost:.2f} MB of KV cache"
        )
    if steps:
        speed = 1e3 * steps / t["decode_total"]
        held = generation.cache.nbytes_held
        needed = step_bytes(generation.checkpoint, held)
        lines.append(
            f"decode   {t['decode_p50']:8.2f} ms/token  p95 {t['decode_p95']:.2f}; {speed:.0f} tokens/s over "
            f"{steps} steps, {r['new_tokens']} tokens, ended by {r['finish_reason']}"
        )
        floor = 1e3 * needed / bandwidth if bandwidth else 0.0
        lines.append(
            f"ceiling  {floor:8.2f} ms/token  {needed / 1e6:.1f} MB per token at {bandwidth / 1e9:.1f} GB/s "
            f"(measured); {100 * floor / t['decode_p50']:.0f} % of it reached"
            if bandwidth
            else "ceiling  not measured: no memory is free for it"
        )
    lines.append(
        f"memory   {r['peak_memory_bytes'] / 1e6:8.0f} MB peak    KV cache: {kv['kv_bytes_full'] / 1e6:.2f} MB "
        f"full, {kv['kv_bytes_held'] / 1e6:.2f} MB held, "
        f"{kv['kv_bytes_reserved'] / 1e6:.2f} MB reserved"
    )
    kept = sum(kv["kept_per_layer"]) / max(1, len(kv["kept_per_layer"]))
    lines.append(
        f"pruning  {t['prune']:8.1f} ms        {kv['method']}: {100 * kv['retention_actual']:.1f} % of the vision "
        f"tokens kept, {kept:.1f} per KV head; decode at most {r['ceiling_speedup']:.2f}x faster"
    )
    return "\n".join(lines)
