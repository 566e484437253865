"""What run.py says about an answer: settings, --json, --compare, --stats; times, memory and waiting threads."""

import contextlib
import glob
import math
import sys
import time
from pathlib import Path

import torch

from .api import note_on_settings, off_budget
from .console import note, say
from .flags import DEMO


def introduce(args, generation):
    """Print to stderr the model and the settings chosen for it, then notes on its limits and files.

    generation: a Generation with these flags, before it runs.
    """
    checkpoint = generation.checkpoint
    demo = checkpoint.folder.resolve() == DEMO
    if pruning := note_on_settings(generation.prune, checkpoint.folder):
        say(pruning)
    what, dtype = "the demo model" if demo else args.model, str(checkpoint.dtype).removeprefix("torch.")
    found = checkpoint.template_note if args.template == "auto" else "asked for"
    say(f"{what}: {dtype} on {checkpoint.device}, template {generation.template} ({found}), "
        f"image mode {said_of_modes(args, generation)}, backend {generation.backend}")  # fmt: skip
    if demo:
        note("the demo model knows only drawn shapes and signs, and conversations of one or two questions as in "
             "assets/README.md; --model loads another")  # fmt: skip
    if not generation.images and args.questions is None:
        note_without_picture(checkpoint)
    for text in checkpoint.notes:
        note(text)
    if checkpoint.share.ranks > 1 and checkpoint.device.type == "cuda":
        note("steps are not captured in a CUDA graph, because no GPU has tested this with several processes; each "
             "kernel is launched from Python")  # fmt: skip
    if args.compile:
        note("the second token waits for the compiler, up to a minute the first time, a few seconds after that")


def said_of_modes(args, generation):
    """The image mode, what LLaVA-OneVision does with several pictures, and the number of frames."""
    settings, own = generation.image_settings, generation.checkpoint.image_settings
    said = settings.mode + (f" (order {settings.order})" if settings.mode == "anyres" else "")
    if own.max_tiles and args.image_mode == "auto":
        if settings.mode != own.mode:
            said += " (one square for each of several pictures; --image-mode anyres cuts them into tiles)"
        elif args.questions is not None or args.talk:
            said += ", pad for each of several pictures"
    frames = [image for image in generation.images if image["mode"] == "frame"]
    return said + (f", {_count(frames, 'frame')}" if frames else "")


def note_without_picture(checkpoint):
    """A note on questions without a picture, if the model is the demo."""
    if checkpoint.folder.resolve() == DEMO:
        note("there is no picture, and the demo model can answer only questions about pictures")


def report(generation, model, seed, meter):
    """The object of --json: settings, answer, bytes and milliseconds. generation: a Generation after its iteration."""
    checkpoint, steps = generation.checkpoint, generation.timing["steps"]
    config, prune = checkpoint.config.text_config, generation.prune
    row = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * checkpoint.dtype.itemsize
    kv_bytes = row * generation.prompt_tokens  # K and V of the whole prompt, all layers
    held, given = generation.bytes_held, prune.settings if prune else {}
    parts = {name: 1e3 * generation.timing[name] for name in ("vision", "prefill", "prune")}  # prune: part of prefill
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
            "settings": given,
            "retention_requested": prune.fraction if prune else None,
            "retention_actual": generation.retention,
            "parts": generation.parts,
            "kept_per_layer": generation.kept,
            "kv_bytes_full": kv_bytes,
            "kv_bytes_held": held,
            "kv_bytes_reserved": generation.bytes_reserved,
        },
        "timing_ms": {
            "load": 1e3 * meter.load_seconds,
            **parts,
            "decode_total": 1e3 * sum(steps),
            "decode_p50": 1e3 * percentile(steps, 0.5),
            "decode_p95": 1e3 * percentile(steps, 0.95),
        },
        "peak_memory_bytes": meter.peak(),
        # bytes that an unpruned decode step reads, divided by the bytes that this one reads
        "ceiling_speedup": step_bytes(checkpoint, kv_bytes) / step_bytes(checkpoint, held) if held else 1.0,
        "seed": seed,
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
        "device": str(checkpoint.device),
        "dtype": str(checkpoint.dtype).removeprefix("torch."),
        "kv_dtype": generation.kv_dtype,
        "backend": generation.backend,
    }


def say_outcome(args, generation, took, code):
    """Notes after an answer: what pruning did in its prefill, and if the answer was cut off. took: see `report`."""
    pruned = generation.timing["prune"] > 0  # False without pictures or in a later turn, which keeps all it adds
    off = off_budget(generation.prune, generation.retention, generation.wanted)
    if off and pruned:
        note(off)
    if code != 0 or args.lines:
        return
    say_pruned(generation, took)
    if generation.finish_reason == "length":
        context = generation.checkpoint.config.text_config.context
        full = f"the context of {context} tokens is full" + ("; /clear starts a new conversation" if args.talk else "")
        why = "--max-new-tokens allows more" if generation.limit < generation.context_left else full
        note(f"the answer was cut after {generation.limit} tokens; {why}")


def say_pruned(generation, took, whose=""):
    """What pruning kept, if it took place in the answer's prefill. whose: words in front."""
    if generation.timing["prune"] > 0:
        held, full = (1e-6 * took["prune"][f"kv_bytes_{which}"] for which in ("held", "full"))
        stored = "" if generation.kv_dtype == "auto" else f" ({generation.kv_dtype})"
        say(f"{whose}{took['prune']['method']} kept {100 * generation.retention:.1f} % of the vision tokens: "
            f"KV cache {held:.2f} MB{stored} instead of {full:.2f} MB")  # fmt: skip


def say_comparison(generation, took):
    """Answer again without pruning; print the differences and add them to `took`. Returns the exit code."""
    if not generation.vision_tokens:
        say("there is no picture, so there is nothing to compare")
        return 0
    try:
        took["compare"] = comparison(generation)
    except KeyboardInterrupt:
        say("interrupted; the comparison is missing")
        return 130
    say(differences(took))
    return 0


def comparison(generation):
    """The `compare` object of --json: the unpruned answer, and where the pruned one departs from it.

    generation: the pruned Generation after its iteration. The unpruned one is run here.
    """
    reference = generation.again(None)
    "".join(reference)
    ended = not reference.unfed  # by the stop id; that step counts too
    fed = reference.token_ids if ended else reference.token_ids[:-1]
    never = torch.tensor(reference.checkpoint.never_ids, dtype=torch.long, device=generation.checkpoint.device)
    full, pruned = (
        logits_along(generation.again(prune), fed).index_fill(1, never, float("-inf"))
        for prune in (None, generation.prune)
    )
    ids = reference.token_ids + ([full[-1].argmax().item()] if ended else [])
    found = compare(full, pruned, ids)
    return {
        "text": reference.text,
        "token_ids": reference.token_ids,
        "same_text": reference.text == generation.text,
        "same_tokens": found["same"],  # fraction of the steps along the unpruned answer
        "first_divergence": found["diverges"],  # index of a step, None if there is none
        "kl_mean": found["kl"].mean().item(),
        "kl_max": found["kl"].max().item(),
        "steps": len(ids),
        "kv_bytes_held": reference.bytes_held,
        "timing_ms": {
            "prefill": 1e3 * reference.timing["prefill"],
            "decode_p50": 1e3 * percentile(reference.timing["steps"], 0.5),
        },
    }


@torch.inference_mode()
def logits_along(generation, fed):
    """Logits (F + 1, V) fp32 after the prompt of a new Generation and after each of the F ids in `fed`."""
    language, logits = generation.checkpoint.model.language_model, [generation.prefill()[None]]
    if fed:
        x = language.model.embed_tokens(torch.tensor(fed, device=generation.checkpoint.device))
        logits.append(language.logits(language.extend(x[None], generation.cache, answer=True)[0]))
    return torch.cat(logits).float()


def compare(full, pruned, ids):
    """Compare pruned with unpruned logits, (F + 1, V) each, at the steps of the same greedy answer.

    ids: the answer, F + 1 long. Returns a dict: same, the share of tokens that pruned logits would also choose;
    diverges, the index of the first token they would not choose, or None; kl, (F + 1,) nats, KL(unpruned || pruned).
    """
    same = pruned.argmax(-1) == torch.tensor(ids, device=full.device)
    ours, theirs = full.log_softmax(-1), pruned.log_softmax(-1)
    gap = torch.where(ours == float("-inf"), 0, ours - theirs)  # ids that are never generated do not count
    wrong = (~same).nonzero()
    return {
        "same": same.float().mean().item(),
        "diverges": wrong[0].item() if len(wrong) else None,
        "kl": (ours.exp() * gap).sum(-1).clamp(min=0),
    }


def differences(took):
    """The table of --compare. took: the object of `report` for the pruned run, with that of `comparison`."""
    found, after = took["compare"], took["timing_ms"]
    first, before = found["first_divergence"], found["timing_ms"]
    where = "never" if first is None else f"at token {first + 1} of {found['steps']}"
    held = [1e-6 * n for n in (found["kv_bytes_held"], took["prune"]["kv_bytes_held"])]
    return f"""\
unpruned {found["text"]}
pruned   {took["text"]}
differs  {where}; along the unpruned answer {100 * found["same_tokens"]:.1f} % of the tokens are the same,
         KL {found["kl_mean"]:.4f} nats on average, {found["kl_max"]:.4f} at most
KV cache {held[0]:.2f} -> {held[1]:.2f} MB held
prefill  {before["prefill"]:.1f} -> {after["prefill"]:.1f} ms (the unpruned run came second, warm)
decode   {before["decode_p50"]:.2f} -> {after["decode_p50"]:.2f} ms/token"""


def percentile(values, q):
    """The q-quantile (0 to 1) of a list by nearest rank; 0 if it is empty."""
    return sorted(values)[math.ceil(q * len(values)) - 1] if values else 0.0


def free_memory(device):
    """Free memory in bytes, of a CUDA device or of this machine; 2 GB if the system does not report it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    table = Path("/proc/meminfo")
    lines = table.read_text().splitlines() if table.exists() else ()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), 2 * 10**9)


class Meter:
    """Memory bandwidth in bytes per second, and peak memory in bytes, without that measurement."""

    def __init__(self, device, load_seconds):
        """Start when the model is loaded, which took load_seconds."""
        self.device, self.load_seconds, self.before, self.rate = device, load_seconds, 0, None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def peak(self):
        """Peak so far: on CUDA of the allocator since loading, on a CPU of the process with its mapped weights."""
        if self.device.type == "cuda":
            return max(self.before, torch.cuda.max_memory_allocated(self.device))
        if sys.platform == "win32":
            return 0  # the standard library has no way to read it
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return max(self.before, peak if sys.platform == "darwin" else peak * 1024)

    def bandwidth(self):
        """Measured at the first call."""
        if self.rate is None:
            self.before, self.rate = self.peak(), measure_bandwidth(self.device)
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # Linux: resets the peak
        return self.rate


class CoreWait:
    """Measures how long this process's threads, ready to run, wait for cores that other processes use.

    Linux counts this for every thread, in nanoseconds. On other systems, and on a GPU, nothing is measured or printed.
    """

    def __init__(self, device):
        """Start measuring. device: a torch.device."""
        self.known, self.warned = device.type == "cpu" and sys.platform == "linux", False
        self.start, self.before = time.perf_counter(), _waited()

    def note(self):
        """One line if torch uses several threads and they wait a lot, else None."""
        if not self.known:
            return None
        waited, threads = _waited() - self.before, torch.get_num_threads()
        share = waited / (threads * (time.perf_counter() - self.start))
        if threads == 1 or share < 0.2 or waited < 0.1:  # seconds; too short to judge
            return None
        return (
            f"{threads} threads spent {100 * share:.0f} % of the time waiting for cores that other processes use; "
            "--threads 1 may be much faster"
        )

    def warn(self):
        """Print the note, once."""
        if not self.warned and (text := self.note()):
            note(text)
            self.warned = True


def _waited():
    """Seconds that the threads of this process have waited for a core; 0 if the system does not report it."""
    total = 0
    for path in glob.glob("/proc/self/task/*/schedstat"):
        with contextlib.suppress(OSError), open(path, encoding="ascii") as file:  # a thread may have ended
            total += int(file.read().split()[1])  # time on a core, time waiting for one, number of time slices
    return 1e-9 * total


def measure_bandwidth(device):
    """Memory bandwidth of a device in bytes per second: the better of a copy and a read-only sum, best of five runs.

    Allocates two tensors, at most half of the free memory. Returns 0 if that is too little to measure.
    """
    size = 2**28 if device.type == "cuda" else 2**26  # 1 GiB or 256 MiB: beyond caches; launch time is negligible
    size = min(size, free_memory(device) // 16)  # fp32 numbers, 4 bytes each
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
    """Bytes that a decode step has to read: the decoder's weights (one row of the embedding) and kv_bytes of cache. In
    all processes together."""
    language, share = checkpoint.model.language_model, checkpoint.share
    named = language.named_parameters("language_model")
    weights = sum(p.element_size() * share.size(name, p) for name, p in named)
    row = language.model.embed_tokens.weight[0]
    rest = 0 if language.lm_head is None else (language.config.vocab_size - 1) * row.nbytes
    return weights - rest + kv_bytes


def stats(r, bandwidth, generation):
    """The table of --stats. r: the --json object; bandwidth: bytes per second, 0 if unknown."""
    t, prune, new = r["timing_ms"], r["prune"], generation.prefilled
    # tokens in the cache already, in a later turn of a conversation
    known = 0 if r["prompt_tokens"] == new + generation.absent else r["prompt_tokens"] - new
    spans = generation.spans  # none after Ctrl-C in the vision tower
    seen = [image for image, (start, _) in zip(r["images"], spans, strict=False) if start >= known]
    lines = [_line("load", t["load"], "")]
    pictures, frames = ([image for image in seen if (image["mode"] == "frame") is kind] for kind in (False, True))
    if seen:
        counts = [_count(some, name) for some, name in ((pictures, "picture"), (frames, "frame")) if some]
        tokens = sum(image["tokens"] for image in seen)
        lines.append(_line("vision", t["vision"], f"{', '.join(counts)}, {tokens} vision tokens"))
    if len(seen) > 1 or r["image_mode"] == "anyres":
        frames = [frames[0] | {"path": counts[-1], "tokens": sum(f["tokens"] for f in frames)}] if frames else []
        lines += [_of_picture(image, r) for image in pictures + frames]
    of = (
        f"{new} new of " if known else f"{new} of " if generation.absent else ""
    ) + f"{r['prompt_tokens']} prompt tokens"
    if generation.prune and generation.prune.looks_ahead and t["prune"]:
        of += f" and {generation.checkpoint.lookahead.rows} look-ahead rows"
    lines.append(_line("prefill", t["prefill"], f"{of}; time to first token {t['vision'] + t['prefill']:.1f} ms"))
    if t["prune"]:  # 0 if nothing could be dropped: no method, no pictures, or a later turn
        share, per_head = 100 * prune["retention_actual"], sum(generation.kept) / len(generation.kept)
        text = f"of the prefill; {prune['method']} kept {share:.1f} % of the vision tokens, {per_head:.1f} per KV head"
        bound = f"upper bound on the decoding speed-up, from the bytes read: {r['ceiling_speedup']:.2f}x"
        parts = [f"{'':25}{said_of_parts(generation)}"] if len(generation.parts) > 1 else []
        lines += [_line("pruning", t["prune"], text), *parts, f"{'':25}{bound}"]
    if generation.timing["steps"]:
        lines += _decoded(r, bandwidth, generation)
    whose = " of process 0" if generation.checkpoint.share.ranks > 1 else ""
    lines.append(f"memory     {1e-6 * r['peak_memory_bytes']:9.0f} MB  peak{whose}")
    held, full, reserved = (1e-6 * prune[f"kv_bytes_{which}"] for which in ("held", "full", "reserved"))
    if held:
        coded = "" if r["kv_dtype"] == "auto" else f" in {r['dtype']}"
        unpruned = f" ({full:.2f} MB unpruned{coded})" if held < full else ""
        text = f"for the prompt{unpruned}; {reserved:.2f} MB with the slots for new tokens"
        lines.append(f"KV cache   {held:9.2f} MB  {text}")
    return "\n".join(lines)


def said_of_parts(generation):
    """What each part of a composition kept."""
    first, second = generation.parts
    return (
        f"{first['method']} kept {100 * first['actual']:.1f} % of the vision tokens, {second['method']} "
        f"{100 * second['actual']:.1f} % of these"
    )


def _line(name, milliseconds, text):
    return f"{name:<11}{milliseconds:9.1f} ms  {text}".rstrip()


def _count(things, name):
    return f"1 {name}" if len(things) == 1 else f"{len(things)} {name}s"


def _of_picture(image, r):
    """A picture's line: its size, tiles and tokens, and their share of the KV cache before pruning."""
    cost = 1e-6 * r["prune"]["kv_bytes_full"] * image["tokens"] / r["prompt_tokens"]
    name = image["path"] if len(image["path"]) < 40 else "..." + image["path"][-37:]
    width, height = image["size"]
    tiles = "" if image["tiles"] == 1 else f", {image['tiles']} tiles"
    return f"{'':25}{name}: {width} x {height} pixels{tiles}, {image['tokens']} tokens, {cost:.2f} MB of KV cache"


def _decoded(r, bandwidth, generation):
    """Lines on the decode steps, and on the least time that reading a step's bytes takes."""
    t, steps = r["timing_ms"], generation.timing["steps"]
    rate = f"{1e3 * len(steps) / t['decode_total']:.1f} tokens/s; finish reason: {r['finish_reason']}"
    lines = [_line("decode", t["decode_total"], f"{_count(steps, 'step')} of one token, {rate}")]
    if len(steps) > 1:
        lines.append(f"  per token{t['decode_p50']:9.2f} ms  median; 95th percentile {t['decode_p95']:.2f} ms")
    if not bandwidth:
        return [*lines, "  limit                  not measured: too little memory is free"]
    checkpoint = generation.checkpoint
    ranks = checkpoint.share.ranks
    size = step_bytes(checkpoint, ranks * generation.cache.nbytes_held) / ranks
    each = f" in each of {ranks} processes" if ranks > 1 else ""
    read = f"to read {1e-6 * size:.1f} MB of weights and KV cache{each} at {1e-9 * bandwidth:.1f} GB/s (measured)"
    return [*lines, f"  limit    {1e3 * size / bandwidth:9.2f} ms  {read}"]
