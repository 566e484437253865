"""Benchmark decoding end to end, pruned and unpruned, against transformers' generate(). Wrong results are not timed.

    python tools/bench_decode.py                             # the demo model, on this machine
    python tools/bench_decode.py --model DIR --image x.png   # any checkpoint
    python tools/bench_decode.py --shape llava-1.5-7b        # random weights, created on the device
    python tools/bench_decode.py --shape llava-1.5-7b --workloads one-b32 4x576,576+64 --prune plphp:dr=0@0.3
    python tools/bench_decode.py --growth --plot growth.png  # decode time over kept tokens, prefill memory over T
    python tools/bench_decode.py --smoke                     # run everything once on tiny prompts

Every engine runs in its own process. If all of them fit in memory (CPU only), their rounds alternate, so that a machine
that slows down affects all equally; otherwise they run one after another. A round is one answer. `TTFT` is the prefill
of all sequences, pruning included, until their first ids are known. `ms/token` is one step of all sequences until the
ids are read: median, 20th and 80th percentile over all steps of all rounds.

The workload `picture` is a real picture and question through model.Generation, vision tower included, compared with
transformers' class for the checkpoint. The others feed an embedded prompt directly to the language model, compared with
LlamaForCausalLM: random text, and pictures of random numbers scaled like the embeddings. BxP,P+T is a workload of your
own: B sequences, each with pictures of P tokens and T text tokens. Prompts beyond the context run and are marked.

Checks before timing: greedy ids equal those of transformers (fp32), or the first logits are close (bf16, fp16); step
logits match one long prefill of the same tokens; a pruned run starts with the same token, and its step logits match
dense attention under a mask; compiling changes no greedy id (fp32). `roofline` is the time to read the weights and the
held K and V at the measured bandwidth, `ceiling` the largest speed-up by bytes. --prune SPEC@F means --prune SPEC
--retention F of run.py. dr=0 prunes every layer equally, so that exactly F is kept: with random weights, all layers
attend to pictures alike.
"""

import argparse
import contextlib
import csv
import json
import math
import os
import re
import shlex
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model import Generation, InputError, Sampling, load, open_checkpoint  # noqa: E402
from model.cache import RaggedCache  # noqa: E402
from model.config import TextConfig  # noqa: E402
from model.console import as_command, one_line  # noqa: E402
from model.fast import FastStep, arrange  # noqa: E402
from model.flags import Parser, choose_device, number  # noqa: E402
from model.pruning import make_method  # noqa: E402
from model.report import percentile  # noqa: E402
from model.view import Layout, Pruner  # noqa: E402
from tools import roofline  # noqa: E402
from tools.bench_kernels import DTYPES, cpu_name, memory_bandwidth, random_language, version  # noqa: E402
from tools.compare_hf import AnonymousMemory, hf_inputs  # noqa: E402
from tools.hf import import_transformers  # noqa: E402

SHAPES = {  # decoder, context and rope_theta of random weights
    "llava-1.5-7b": (roofline.SHAPES[0], 4096, 1e4),
    "llava-1.5-13b": (roofline.SHAPES[1], 4096, 1e4),
    "next-mistral-7b": (roofline.SHAPES[4], 32768, 1e6),
    "demo": (roofline.SHAPES[5], 2048, 1e4),
}
USUAL = ("one", "one-b8", "one-b32", "tiles", "eight-images", "long")  # default workloads; `long` on GPUs only
OURS = ("ours", "ours-compile")
ENGINES = (*OURS, "hf-eager", "hf-sdpa", "hf-static")
# Largest RMS error of logits, relative to their RMS, at which two computations count as equal. Measured over 16 to 32
# random layers: 1e-6, 0.002, 0.013; for the 7B shape in bf16: 0.015 over 4 layers, 0.047 over 32. A position off by one
# gives 0.17 at width 1024.
TOLERANCE = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 8e-2}
WATCHED = 8  # number of tokens compared


def parser():
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    # fmt: off
    p.add_argument("--model", metavar="DIR|ID", help="a checkpoint (default: the demo model)")
    p.add_argument("--shape", choices=SHAPES, help="random weights of this shape instead")
    p.add_argument("--image", metavar="PATH", help="picture of the workload `picture` (demo default: assets/demo.png)")
    p.add_argument("--prompt", default="Describe the picture.", help="question of the workload `picture`")
    p.add_argument("--workloads", nargs="+", metavar="NAME|BxP,P+T",
                   help=f"picture, {', '.join(USUAL)} or your own (default: all; on a CPU all but long)")
    p.add_argument("--prune", nargs="+", default=["none", "plphp:dr=0@0.5", "plphp:dr=0@0.2"], metavar="SPEC[@F]")
    p.add_argument("--engines", nargs="+", choices=ENGINES, metavar="ENGINE",
                   help=f"from {', '.join(ENGINES)} (default: all on CUDA; ours, hf-eager and hf-sdpa on a CPU)")
    p.add_argument("--new-tokens", type=number(int, 2), default=32, metavar="N", help="tokens per answer (default 32)")
    p.add_argument("--rounds", type=number(int, 1), default=5, help="timed answers after a checked one (default 5)")
    p.add_argument("--dtype", choices=DTYPES, help="default: bf16; fp32 on a CPU if it fits in half of memory")
    p.add_argument("--device", default="auto", metavar="auto|cpu|cuda[:i]")
    p.add_argument("--backend", default="auto", choices=("auto", "triton", "torch"))
    p.add_argument("--seed", type=number(int, 0), default=0, help="seed of weights and prompts")
    p.add_argument("--json", metavar="FILE")
    p.add_argument("--csv", metavar="FILE")
    p.add_argument("--smoke", action="store_true", help="quick test: tiny prompts, few tokens, one round")
    p.add_argument("--growth", action="store_true", help="decode time and prefill memory of a small model over tokens")
    p.add_argument("--tokens", nargs="+", type=number(int, 2), metavar="T", help="token counts for --growth")
    p.add_argument("--plot", metavar="FILE.png", help="plot of --growth")
    p.add_argument("--worker", help=argparse.SUPPRESS)  # the child processes
    # fmt: on
    return p


# ---------------------------------------------------------------- workloads and tasks


@dataclass(frozen=True)
class Workload:
    """`batch` sequences, each with `text` text tokens and pictures of the listed numbers of tokens."""

    name: str
    batch: int
    pictures: tuple
    text: int

    @property
    def tokens(self):
        return sum(self.pictures) + self.text

    @property
    def spans(self):
        """[(start, stop)] of the pictures; a quarter of the text precedes them."""
        ends = [self.text // 4 + sum(self.pictures[:i]) for i in range(len(self.pictures) + 1)]
        return list(zip(ends, ends[1:], strict=False))


@dataclass(frozen=True)
class Task:
    """The work of one process. shape None: use the checkpoint `model`; image: only for the workload `picture`."""

    engine: str
    prune: str
    workload: Workload
    model: str | None
    shape: str | None
    image: str | None
    prompt: str
    dtype: str
    device: str
    backend: str
    new_tokens: int
    seed: int


def workloads(names, picture, asked):
    """The Workloads of --workloads. picture: tokens of one picture; asked: the workload `picture`, or None."""
    known = {
        "one": (1, (picture,), 64),
        "one-b8": (8, (picture,), 64),
        "one-b32": (32, (picture,), 64),
        "tiles": (1, (2880,), 64),
        "eight-images": (1, 8 * (picture,), 64),
        "long": (1, (10000 - 64,), 64),
    }
    for name in names:
        own = re.fullmatch(r"([1-9]\d*)x([1-9]\d*(?:,[1-9]\d*)*)\+([1-9]\d*)", name)
        if name == "picture" and asked:
            yield asked
        elif own:
            yield Workload(name, int(own[1]), tuple(map(int, own[2].split(","))), int(own[3]))
        elif name in known:
            yield Workload(name, *known[name])
        else:
            need = "needs a checkpoint and --image" if name == "picture" else "is unknown"
            raise InputError(f"workload {name!r} {need}; use {', '.join(known)} or your own such as 4x576,576+64")


def method_of(spec, folder=None, config=None):
    """The Method of SPEC[@F], None for "none"; InputError if it does not exist or does not fit this config."""
    name, _, kept = spec.rpartition("@")
    try:
        method = make_method(name, float(kept), folder=folder) if name else make_method(spec, folder=folder)
        if method and config:
            method.check(config.num_hidden_layers, config.num_key_value_heads)
    except ValueError as wrong:
        raise InputError(f"--prune {spec}: {wrong}") from wrong
    return method


def text_config(name):
    """TextConfig of a shape."""
    s, context, theta = SHAPES[name]
    return TextConfig(
        vocab_size=s.vocabulary, hidden_size=s.hidden, intermediate_size=s.intermediate, num_hidden_layers=s.layers,
        num_attention_heads=s.q_heads, num_key_value_heads=s.kv_heads, head_dim=s.head_dim,
        max_position_embeddings=context, rms_norm_eps=1e-5, rope_theta=theta,
    )  # fmt: skip


# ---------------------------------------------------------------- one engine in its process


def language_of(task):
    """The Llama of a task."""
    if task.shape:
        return random_language(text_config(task.shape), DTYPES[task.dtype], task.device, task.seed)
    return load(task.model, task.dtype, task.device).model.language_model


def prompts(task, language):
    """Embedded prompts x (B, T, C): random ids as text, and random numbers scaled like the embeddings as pictures."""
    w, table = task.workload, language.model.embed_tokens.weight
    generator = torch.Generator(table.device).manual_seed(task.seed + 1)
    x = torch.randn(w.batch, w.tokens, table.shape[1], generator=generator, device=table.device, dtype=table.dtype)
    x *= table[: min(len(table), 1024)].float().std()
    ids = torch.randint(3, len(table), (w.batch, w.text), generator=generator, device=table.device)
    before = w.text // 4
    x[:, :before], x[:, w.tokens - w.text + before :] = table[ids[:, :before]], table[ids[:, before:]]
    return x


@dataclass
class Answer:
    """first, steps: seconds; ids: B per token; logits: (V,) of the first sequence for each watched token."""

    first: float
    steps: list
    ids: list
    logits: list
    kept: float  # fraction of the vision tokens, over all heads and sequences
    bytes_held: int  # K and V after prefill
    step: object  # function () that runs one more step
    cache: RaggedCache


@torch.inference_mode()
def answer(language, x, spans, method, backend, new_tokens, watched=0, compile=False):
    """Greedy ids for the prompts x (B, T, C), prefilled one by one and decoded together -> Answer."""
    start, config = time.perf_counter(), language.config
    layers, heads = config.num_hidden_layers, (config.num_attention_heads, config.num_key_value_heads)
    layout = Layout(layers, *heads, x.shape[1], spans, x.device)
    caches, pruners, last = [], [], []
    for sequence in x:
        cache = RaggedCache(layers, slack=min(new_tokens, 64), backend=backend)
        pruner = Pruner(method, layout, backend) if method else None
        asked = {"choose": pruner.choose, "narrow": pruner.narrow} if pruner else {}
        last.append(language.prefill(sequence[None], cache, **asked)[0, -1].clone())  # the rest is freed
        caches.append(cache)
        pruners.append(pruner)
    cache = caches[0] if len(caches) == 1 else RaggedCache.join(caches)
    logits = language.logits(torch.stack(last))
    ids = logits.argmax(-1)
    said = [ids.tolist()]  # waits for the device
    first, seen, steps = time.perf_counter() - start, [logits[0].clone()], []
    held, vision = cache.nbytes_held, sum(b - a for a, b in spans)
    # read now: a single sequence's cache is the one that decoding extends
    kept = [n / vision for p, c in zip(pruners, caches, strict=True) if p for n in p.kept(c)]
    step = FastStep(language, cache, compile)
    for i in range(1, new_tokens):
        start = time.perf_counter()
        logits = step(ids)
        ids = logits.argmax(-1)
        said.append(ids.tolist())
        steps.append(time.perf_counter() - start)
        if i < watched:
            seen.append(logits[0].clone())
    return Answer(first, steps, said, seen, statistics.fmean(kept or [1.0]), held, partial(step, ids), cache)


def prepare_ours(task):
    """(facts for the checks, function that answers -> (seconds to the first token, seconds of each step))."""
    language = language_of(task)
    if task.shape:
        arrange(language)  # as `load` does for weights that are not memory-mapped
    method, spans = method_of(task.prune, task.model), task.workload.spans
    x = prompts(task, language)
    compile = task.engine == "ours-compile"
    run = partial(answer, language, x, spans, method, task.backend, task.new_tokens, compile=compile)
    checked = run(watched=WATCHED)
    facts = {
        "ids": [list(ids) for ids in zip(*checked.ids[:WATCHED], strict=True)],
        "logits": [row.tolist() for row in checked.logits[:2]],
        "finite": all(bool(row.isfinite().all()) for row in checked.logits),
        "kept": checked.kept,
        "kv_bytes_held": checked.bytes_held,
        "step": step_cost(checked.step, checked.cache),
    }
    if method is None:
        facts["error"] = error_of_steps(language, x[0], checked)
    else:
        facts["error"] = error_of_pruned_steps(language, x[0], spans, method, checked)
    del checked

    def again():
        a = run()
        return a.first, a.steps

    return facts, again


@torch.inference_mode()
def error_of_steps(language, x, checked):
    """Largest error of the step logits against a single prefill of prompt x (T, C) and the generated tokens."""
    steps = len(checked.logits)
    said = torch.tensor([ids[0] for ids in checked.ids[: steps - 1]], dtype=torch.long, device=x.device)
    whole = torch.cat((x, language.model.embed_tokens(said)))[None]
    wanted = language.logits(language.prefill(whole)[0, -steps:])
    return max(error(a.tolist(), b.tolist()) for a, b in zip(checked.logits, wanted, strict=True))


class MaskedCache:
    """Reference for a pruned cache of one sequence: keeps every row and masks the dropped ones."""

    fused = False  # q and k arrive with RoPE applied

    def __init__(self, num_layers):
        self.k, self.v, self.seen = [None] * num_layers, [None] * num_layers, [None] * num_layers
        self.pos = None

    def pack(self, layer, k, v, keep=None):
        self.k[layer], self.v[layer] = k[0], v[0]  # (Hkv, T, D)
        self.seen[layer] = torch.ones_like(k[0, ..., 0], dtype=torch.bool) if keep is None else keep
        if self.pos is None:
            self.pos = torch.tensor([k.shape[2]], device=k.device)

    def grow(self):
        self.pos = self.pos + 1

    def append_attend(self, layer, q, k, v, rope):
        new = k.transpose(0, 1), v.transpose(0, 1), torch.ones_like(k[0, :, :1], dtype=torch.bool)
        for rows, row in zip((self.k, self.v, self.seen), new, strict=True):
            rows[layer] = torch.cat((rows[layer], row), 1)
        group = q.shape[1] // k.shape[1]
        keys, values, seen = (x[layer].repeat_interleave(group, 0) for x in (self.k, self.v, self.seen))  # (Hq, T, ...)
        scores = (keys.float() @ q[0, :, :, None].float())[..., 0] * q.shape[2] ** -0.5  # (Hq, T)
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        return (weights[:, None] @ values.float()).transpose(0, 1).to(q.dtype)


@torch.inference_mode()
def error_of_pruned_steps(language, x, spans, method, checked):
    """Largest error of the step logits against steps with a `MaskedCache` of prompt x (T, C)."""
    config = language.config
    layers, heads = config.num_hidden_layers, (config.num_attention_heads, config.num_key_value_heads)
    pruner, cache = Pruner(method, Layout(layers, *heads, len(x), spans, x.device)), MaskedCache(layers)
    language.prefill(x[None], cache, choose=pruner.choose, narrow=pruner.narrow)
    errors = []
    for ids, got in zip(checked.ids, checked.logits[1:], strict=False):
        token = language.model.embed_tokens(torch.tensor(ids[:1], device=x.device))
        errors.append(error(got.tolist(), language.logits(language.decode(token, cache))[0].tolist()))
    return max(errors)


def prepare_picture(task):
    """As `prepare_ours`, for a picture and a question through model.Generation."""
    checkpoint = load(task.model, task.dtype, task.device)
    method = method_of(task.prune, checkpoint.folder)
    sampling = Sampling(max_new_tokens=task.new_tokens)
    generation = Generation(
        checkpoint, task.prompt, [task.image], sampling, prune=method, backend=task.backend,
        compile=task.engine == "ours-compile", timed=True,
    )  # fmt: skip

    def again():
        "".join(generation)
        t = generation.timing
        return t["vision"] + t["prefill"], list(t["steps"])

    again()
    ids = torch.ones(1, dtype=torch.long, device=checkpoint.device)
    step = partial(FastStep(checkpoint.model.language_model, generation.cache, generation.compile), ids)
    facts = {
        "ids": [generation.token_ids[:WATCHED]],
        "finite": True,  # Generation raises an error otherwise
        "kept": statistics.fmean(generation.kept) / generation.vision_tokens,
        "kv_bytes_held": generation.bytes_held,
        "step": step_cost(step, generation.cache),
    }
    return facts, again


def prepare_hf(task):
    """As `prepare_ours`, for transformers: generate() with a dynamic cache, or a static cache and torch.compile."""
    transformers = import_transformers()

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    options = {"max_new_tokens": task.new_tokens, "do_sample": False}
    if task.engine == "hf-static":
        compile_config = transformers.CompileConfig()
        compile_config._compile_all_devices = True  # by default generate() does not compile on a CPU
        options |= {"cache_implementation": "static", "compile_config": compile_config}
    attention = "eager" if task.engine == "hf-eager" else "sdpa"
    model, inputs, stop_ids = (hf_llava if task.image else hf_llama)(task, attention)

    def again():
        clock, start = Clock(), time.perf_counter()
        ids = model.generate(**inputs, **options, streamer=clock)
        new = ids.shape[1] - (inputs["input_ids"].shape[1] if task.image else 0)
        times = clock.times[-new:]  # the streamer gets the prompt first
        return times[0] - start, [b - a for a, b in zip(times, times[1:], strict=False)]

    checked = model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
    said = checked.sequences[:, -len(checked.logits) :].tolist()
    facts = {
        "ids": [[i for i in ids if i not in stop_ids][:WATCHED] for ids in said],
        "logits": [] if task.image else [row[0].tolist() for row in checked.logits[:2]],
    }
    del checked
    return facts, again


def hf_llama(task, attention):
    """(transformers' LlamaForCausalLM with our Llama's weights, arguments of generate(), stop ids)."""
    transformers = import_transformers()

    language = language_of(task)
    fields = asdict(language.config)
    weights = {name: w.contiguous() for name, w in language.state_dict().items()}  # undo the layout of `arrange`
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])  # if tied
    rope = {"rope_type": "default", "rope_theta": fields.pop("rope_theta")}
    del fields["sliding_window"]  # not a field of LlamaConfig
    config = transformers.LlamaConfig(
        **fields, rope_parameters=rope, tie_word_embeddings=language.lm_head is None,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    model.load_state_dict(weights, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(task.device)  # not in the state dict
    model.set_attn_implementation(attention)
    x = prompts(task, language)
    mask = torch.ones(x.shape[:2], dtype=torch.long, device=x.device)
    return model, {"inputs_embeds": x, "attention_mask": mask}, ()


def hf_llava(task, attention):
    """As `hf_llama`, for LLaVA's or LLaVA-NeXT's class with a picture and a question."""
    transformers = import_transformers()

    asked = Generation(open_checkpoint(task.model), task.prompt, [task.image])  # for ids and pixels only
    checkpoint, dtype = asked.checkpoint, DTYPES[task.dtype]
    llava = transformers.AutoModelForImageTextToText
    model = llava.from_pretrained(checkpoint.folder, dtype=dtype, attn_implementation=attention).to(task.device).eval()
    return model, hf_inputs(asked, dtype, task.device), checkpoint.stop_ids


class Clock:
    """A streamer for generate() that records when each token's ids can be read."""

    def __init__(self):
        self.times = []

    def put(self, ids):
        self.times.append(time.perf_counter())

    def end(self):
        pass


# ---------------------------------------------------------------- cost of a step


@torch.inference_mode()
def step_cost(step, cache, steps=4):
    """Launches, syncs and allocations of a step; on CUDA also kernels. Choosing and reading ids is not counted.

    On a CPU, a launch is an outermost PyTorch call that computes or writes; views do not count.
    """
    if step.func.compiles_whole:
        return {}  # counting would break up a compiled layer
    cache.slack = 64  # the next repack leaves free slots for all steps below
    for _ in range(cache.room + 3):  # run until that repack, and until a graph is captured again
        step()
    if not cache.pos.is_cuda:
        with Calls() as calls:
            step()
        return {"launches": calls.launches, "syncs": 0, "allocations": calls.new, "allocated_bytes": calls.bytes}
    more, fewer = device_work(step, 2 * steps), device_work(step, steps)
    return {name: (more[name] - fewer[name]) / steps for name in more}  # cancels the profiler's own work


def device_work(step, times):
    """Counts for this number of steps on CUDA, from the profiler and the allocator."""
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    with torch.profiler.profile() as profile:
        for _ in range(times):
            step()
    allocations = torch.cuda.memory_stats()["allocation.all.allocated"] - before
    kinds = torch.autograd.DeviceType
    calls = [e.name for e in profile.events() if e.device_type == kinds.CPU]
    return {
        "launches": sum(bool(re.match(r"cu(da)?(Launch|GraphLaunch|Memcpy|Memset)", name)) for name in calls),
        "syncs": sum(bool(re.match(r"cu(da)?\w+Synchronize", name)) for name in calls),
        "allocations": allocations,
        "mallocs": sum(bool(re.match(r"cu(da)?(Malloc|MemAlloc|MemCreate)", name)) for name in calls),
        "kernels": sum(e.device_type == kinds.CUDA for e in profile.events()),
    }


class Calls(TorchDispatchMode):
    """Counts PyTorch calls that compute or write, and the storages they create."""

    def __init__(self):
        super().__init__()
        self.launches = self.new = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before, out = self.storages((args, kwargs)), func(*args, **(kwargs or {}))
        new = {at: size for at, size in self.storages(out).items() if at not in before}
        self.launches += bool(new) or func._schema.is_mutable
        self.new += len(new)
        self.bytes += sum(new.values())
        return out

    def storages(self, tree):
        """{address: bytes} of all tensors."""
        found = [t.untyped_storage() for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]
        return {s.data_ptr(): s.nbytes() for s in found}


# ---------------------------------------------------------------- alternating processes


def worker(task):
    """Child process: write the facts, then a reply for each line of stdin, as JSON on stdout."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # other prints must not mix with the JSON
    for reply in replies(task, sys.stdin):
        print(json.dumps(reply), file=channel, flush=True)
    return 0


def replies(task, asked):
    """{"facts"}, then {"first", "steps", "peak"} in seconds and bytes for each of `asked`; {"why"} after a failure."""
    device, memory = torch.device(task.device), AnonymousMemory()
    cuda, linux = device.type == "cuda", sys.platform == "linux"
    if device.index is not None:
        torch.cuda.set_device(device)  # streams, graphs and statistics use the current device
    if linux and not cuda:
        memory.start()
    try:
        facts, again = prepare(task)
        yield {"facts": facts}
        memory.peak = 0  # do not count preparation and checks
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        for _ in asked:
            first, steps = again()
            time.sleep(0.03 if linux and not cuda else 0)  # it samples every 20 ms
            yield {"first": first, "steps": steps, "peak": torch.cuda.max_memory_allocated() if cuda else memory.peak}
    except ImportError as missing:
        yield {"why": f"{missing}; see requirements-test.txt"}
    except Exception as broken:  # from transformers or the device; reported in the table
        yield {"why": f"{type(broken).__name__}: {one_line(broken)[:200]}"}


def prepare(task):
    """(facts, function that answers) for any task."""
    if task.engine not in OURS:
        return prepare_hf(task)
    return prepare_picture(task) if task.image else prepare_ours(task)


class Child:
    """A process that works on a task."""

    def __init__(self, task):
        words = [sys.executable, __file__, "--worker", json.dumps(asdict(task))]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(words, start_new_session=True, **pipes)  # only the parent gets Ctrl-C

    def reply(self):
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"why": f"its process exited with {self.process.wait()}"}

    def ask(self):
        with contextlib.suppress(BrokenPipeError):  # the process has ended; `reply` reports its exit code
            print(file=self.process.stdin, flush=True)
        return self.reply()

    def close(self):
        self.process.kill()
        self.process.communicate()


def take_turns(tasks, rounds, start):
    """Run all tasks, alternating rounds -> {task: {"facts", "rounds", "why"}}. start: function task -> Child."""
    found, running = {}, {}
    try:
        for task in tasks:
            say(f"{task.workload.name}: {task.engine}, {task.prune}")
            running[task] = start(task)
        for task, child in running.items():
            found[task] = {"facts": {}, "rounds": [], "why": None} | child.reply()
        for _ in range(rounds):
            for task, child in running.items():
                if not found[task]["why"]:
                    reply = child.ask()
                    found[task]["why"] = reply.get("why")
                    found[task]["rounds"] += [reply] if "first" in reply else []
    finally:
        for child in running.values():
            child.close()
    return found


def say(text):
    print(text, file=sys.stderr, flush=True)


# ---------------------------------------------------------------- checks and speeds


def error(got, wanted):
    """RMS of the difference of two rows of numbers, relative to the RMS of `wanted`."""
    size = math.fsum(b * b for b in wanted)
    return math.sqrt(math.fsum((a - b) ** 2 for a, b in zip(got, wanted, strict=True)) / size) if size else math.inf


def is_wrong(task, facts, unpruned, reference, plain=None):
    """The first fault in a task's answers, or None.

    reference: (name, facts) of transformers, or None; plain: facts of the same task without the compiler, or None.
    """
    allowed = TOLERANCE[task.dtype]
    if not facts.get("finite", True):
        return "logits are not finite"
    if not facts.get("error", 0.0) <= allowed:
        of = "one long prefill" if task.prune == "none" else "dense attention with the kept tokens' mask"
        return f"step logits differ from {of} by {facts['error']:.2g} (relative RMS)"
    if plain and task.dtype == "fp32" and plain["ids"] != facts["ids"]:
        return f"greedy ids {facts['ids']} differ from those without the compiler, {plain['ids']}"
    if task.prune != "none":  # prefill equals the unpruned one, except for methods that drop tokens during prefill
        same = not unpruned or [ids[:1] for ids in facts["ids"]] == [ids[:1] for ids in unpruned["ids"]]
        return None if same or method_of(task.prune).layer else "the first token differs from the unpruned run"
    if reference is None or reference[1] is facts:
        return None
    name, wanted = reference
    exact = WATCHED if task.dtype == "fp32" else 0 if facts.get("logits") else 1  # in 16 bits, two close ids may swap
    if any(a[:exact] != b[:exact] for a, b in zip(facts["ids"], wanted["ids"], strict=True)):
        return f"greedy ids {facts['ids']} differ from those of {name}, {wanted['ids']}"
    alike = 2 if facts["ids"][0][:1] == wanted["ids"][0][:1] else 1  # the second logits depend on the first id
    off = [error(*pair) for pair in zip(facts.get("logits", [])[:alike], wanted.get("logits", []), strict=False)]
    return next((f"logits differ from {name} by {e:.2g} (relative RMS)" for e in off if not e <= allowed), None)


def make_rows(found, context, shape, itemsize, bandwidth):
    """A row for each task. found: {task: {"facts", "rounds", "why"}}, unpruned first; shape: a roofline.Shape."""
    unpruned = next((r["facts"] for t, r in found.items() if t.engine in OURS and t.prune == "none"), {})
    hf = [(t.engine, r["facts"]) for t, r in found.items() if t.engine not in OURS and r["facts"]]
    rows = []
    for task, result in found.items():
        w, facts, why = task.workload, result["facts"], result["why"]
        row = {
            "engine": task.engine, "prune": task.prune, "workload": w.name, "batch": w.batch,
            "vision_tokens": sum(w.pictures), "text_tokens": w.text,
            "beyond_context": w.tokens + task.new_tokens > context, "right": None, "why": why,
        }  # fmt: skip
        if why is None:
            twin = found.get(replace(task, engine="ours")) if task.engine == "ours-compile" else None
            row["why"] = is_wrong(task, facts, unpruned, hf[0] if hf else None, twin and twin["facts"])
            same = next((r for r in rows if (r["engine"], r["prune"]) == (task.engine, "none")), {})
            if task.prune != "none" and same.get("right") is False:  # the same code, unpruned
                row["why"] = row["why"] or "the unpruned run is wrong"
            row["right"] = row["why"] is None
        elif task.engine in OURS and not re.search(r"[Oo]ut ?[Oo]f ?[Mm]emory|can't allocate|exited with -9", why):
            row["right"] = False  # a fault of this project
        if row["right"] and not any(r["steps"] for r in result["rounds"]):
            row["right"], row["why"] = None, "the answer has a single token"
        if row["right"]:
            row |= speeds(w.batch, facts, result["rounds"], shape, itemsize, bandwidth)
        rows.append(row)
    compare(rows)
    return rows


def speeds(batch, facts, rounds, shape, itemsize, bandwidth):
    """The measured columns of a correct row. K and V are those of the prompt after prefill."""
    steps = sorted(1e3 * s for r in rounds for s in r["steps"])
    full = itemsize * batch * (shape.vision + shape.text) * shape.kv_numbers
    held, weights = facts.get("kv_bytes_held", full), itemsize * shape.weight_numbers
    floor, median = 1e3 * (weights + held) / bandwidth, statistics.median(steps)
    return {
        "kept": facts.get("kept", 1.0), "ttft_ms": 1e3 * statistics.median(r["first"] for r in rounds),
        "ms_per_token": median, "ms_p20": percentile(steps, 0.2), "ms_p80": percentile(steps, 0.8),
        "tokens_per_s": 1e3 * batch / median, "kv_bytes_held": held, "kv_bytes_full": full,
        "peak_bytes": max(r["peak"] for r in rounds), "bytes_per_step": weights + held, "roofline_ms": floor,
        "roofline_reached": floor / median, "ceiling_speedup": (weights + full) / (weights + held),
    } | {f"step_{name}": n for name, n in facts.get("step", {}).items()}  # fmt: skip


def compare(rows):
    """Add to our rows the speed-up over the unpruned run and over transformers."""
    timed = {(row["engine"], row["prune"]): row for row in rows if row["right"]}
    for (engine, _), row in timed.items():
        if engine not in OURS:
            continue
        if base := timed.get((engine, "none")):
            row["speedup"] = base["ms_per_token"] / row["ms_per_token"]
            row["ceiling_reached"] = row["speedup"] / row["ceiling_speedup"]
        for (other, prune), theirs in timed.items():
            if other not in OURS or (other != engine and prune == row["prune"]):
                row[f"decode_x_{other}"] = theirs["ms_per_token"] / row["ms_per_token"]
                row[f"ttft_x_{other}"] = theirs["ttft_ms"] / row["ttft_ms"]


HEAD = (
    f"  {'engine':14}{'prune':22}{'kept':>7}{'TTFT ms':>10}{'ms/token':>10}{'p20':>9}{'p80':>9}{'tokens/s':>10}"
    f"{'KV MB':>10}{'peak MB':>10}{'roofline ms':>13}{'reached':>9}{'ceiling':>9}{'speed-up':>10}"
)


def show(rows):
    """Lines of a workload's table."""
    first = rows[0]
    beyond = ", LONGER THAN THE MODEL'S CONTEXT" if first["beyond_context"] else ""
    prompt = f"{first['batch']} x ({first['vision_tokens']} vision + {first['text_tokens']} text) tokens"
    yield f"{first['workload']}: {prompt}{beyond}"
    yield HEAD
    for row in rows:
        name = f"  {row['engine']:14}{row['prune']:22}"
        if not row["right"]:
            yield f"{name}{'not timed: ' + row['why'] if row['right'] is None else 'WRONG, not timed: ' + row['why']}"
            continue
        times = f"{row['ttft_ms']:10.2f}{row['ms_per_token']:10.3f}{row['ms_p20']:9.3f}{row['ms_p80']:9.3f}"
        sizes = f"{row['kv_bytes_held'] / 1e6:10.2f}{row['peak_bytes'] / 1e6:10.0f}"
        floor = f"{row['roofline_ms']:13.3f}{100 * row['roofline_reached']:7.1f} %"
        gain = f"{row['ceiling_speedup']:8.2f}x{row['speedup']:9.2f}x" if "speedup" in row else ""
        yield f"{name}{100 * row['kept']:5.1f} %{times}{row['tokens_per_s']:10.1f}{sizes}{floor}{gain}"
        if "step_launches" in row:
            counts = ", ".join(f"{n:,g} {k[5:].replace('_', ' ')}" for k, n in row.items() if k.startswith("step_"))
            yield f"    per step: {counts}"
        than = sorted({k.split("_x_")[1] for k in row if "_x_" in k})
        if than:
            said = (f"{e} {row[f'decode_x_{e}']:.2f} (first token {row[f'ttft_x_{e}']:.2f})" for e in than)
            yield f"    speed-up over {', '.join(said)}"


# ---------------------------------------------------------------- the whole run


def bench(args):
    """Run all workloads -> exit code."""
    device, (text, picture, asked) = choose_device(args.device, args.backend), chosen_model(args)
    cuda, wide = device.type == "cuda", 4 * roofline.shape_of(text, 0, 0).weight_numbers
    dtype = args.dtype or ("fp32" if not cuda and fits(wide, "SC_PHYS_PAGES") else "bf16")
    engines = args.engines or (ENGINES if cuda else ("ours", "hf-eager", "hf-sdpa"))
    prunes = ["none", *(spec for spec in args.prune if spec != "none")]
    for spec in prunes[1:]:
        method_of(spec, args.model, text)
    usual = USUAL[: None if cuda else -1]
    if args.smoke:
        usual, args.new_tokens, args.rounds = ["2x24,8+8"], min(args.new_tokens, 3), 1
    work = list(workloads(args.workloads or [*(["picture"] if asked else []), *usual], picture, asked))
    touch(args.json, args.csv)
    about = about_run(args, device, dtype, args.shape or Path(args.model).name)
    print(", ".join(f"{k} {v}" for k, v in about.items()), flush=True)
    save(args, about, [])
    rows, itemsize = [], DTYPES[dtype].itemsize
    for w in work:
        ours = Task(
            "ours", "none", w, args.model, args.shape, args.image if w is asked else None, args.prompt, dtype,
            str(device), args.backend, args.new_tokens, args.seed,
        )  # fmt: skip
        tasks = [replace(ours, engine=e, prune=prune) for e in OURS if e in engines for prune in prunes]
        tasks += [replace(ours, engine=e) for e in engines if e not in OURS]
        shape = roofline.shape_of(text, sum(w.pictures), w.text)
        size = itemsize * (shape.weight_numbers + 2 * w.batch * w.tokens * shape.kv_numbers) + 2**29  # of one process
        found, known = {}, []
        together = not cuda and fits(len(tasks) * size, "SC_AVPHYS_PAGES")  # on a GPU times hardly vary
        for group in [tasks] if together else [[task] for task in tasks]:
            found |= take_turns(group, args.rounds, Child)
            known = make_rows(found, text.max_position_embeddings, shape, itemsize, 1e9 * about["bandwidth_GBps"])
            save(args, about, rows + known)  # keep partial results of an interrupted run
        rows += known
        print("", *show(known), sep="\n", flush=True)
    return 1 if any(row["right"] is False for row in rows) else 0


def chosen_model(args):
    """(TextConfig, tokens of a picture, the workload `picture` or None); InputError if the model does not exist."""
    if args.shape:
        if args.model or args.image:
            raise InputError("--shape uses random weights without a vision tower; leave out --model and --image")
        return text_config(args.shape), SHAPES[args.shape][0].tower.patches, None
    if args.model is None:
        args.model, args.image = ROOT / "assets" / "demo", args.image or str(ROOT / "assets" / "demo.png")
    checkpoint = open_checkpoint(args.model)
    args.model, config, asked = str(checkpoint.folder), checkpoint.config, None
    if args.image:
        generation = Generation(checkpoint, args.prompt, [args.image])
        vision = generation.vision_tokens
        asked = Workload("picture", 1, (vision,), generation.prompt_tokens - vision)
    return config.text_config, config.image_tokens, asked


def fits(size, pages, share=0.5):
    """Are `size` bytes at most `share` of memory? pages: SC_PHYS_PAGES for all, SC_AVPHYS_PAGES for free memory."""
    known = pages in getattr(os, "sysconf_names", ())  # otherwise assume 16 GB
    return size <= share * (os.sysconf("SC_PAGE_SIZE") * os.sysconf(pages) if known else 16e9)


def touch(*paths):
    """Create the output files before measuring; InputError if that fails."""
    try:
        for path in filter(None, paths):
            open(path, "a").close()
    except OSError as wrong:
        raise InputError(f"{wrong}; name another file") from wrong


def about_run(args, device, dtype, model):
    """Model, machine, versions and settings of this run. Measures the bandwidth."""
    bandwidth = memory_bandwidth(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the child processes need the memory
    return {
        "model": model, "weights": "random" if args.shape or args.growth else "of the checkpoint",
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(), "device": str(device),
        "threads": torch.get_num_threads(), "torch": torch.__version__, "triton": version("triton"),
        "transformers": version("transformers"), "dtype": dtype, "backend": args.backend,
        "bandwidth_GBps": round(bandwidth / 1e9, 1), "new_tokens": args.new_tokens, "rounds": args.rounds,
        "date": time.strftime("%Y-%m-%d"), "command": shlex.join(["python", "tools/bench_decode.py", *args.words]),
    }  # fmt: skip


def save(args, about, rows):
    """Write the files of --json and --csv."""
    if args.json:
        Path(args.json).write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(k for row in [*rows, about] for k in row)))
            writer.writeheader()
            writer.writerows(row | about for row in rows)


# ---------------------------------------------------------------- growth


def growth(args):
    """Measure a small model: decode step time over kept tokens, prefill memory over prompt tokens -> exit code."""
    device = choose_device(args.device)
    if device.type == "cpu" and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        # allocate and free large blocks directly with the system, so that process size equals live memory
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
        return subprocess.run([sys.executable, __file__, *args.words], env=environment).returncode
    if device.type == "cpu" and sys.platform != "linux":
        raise InputError("--growth on a CPU reads process memory from Linux; give --device cuda or run it on Linux")
    touch(args.json, args.plot)
    dtype = args.dtype or ("bf16" if device.type == "cuda" else "fp32")
    tokens = args.tokens or ([64, 128, 192] if args.smoke else [1024, 2048, 4096, 8192, 16384])
    if len(set(tokens)) < 2:
        raise InputError("--tokens needs at least two different numbers to fit a line; give more")
    thin = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    language = random_language(TextConfig(vocab_size=512, **thin), DTYPES[dtype], device, args.seed)
    measured = {
        "decode ms": [1e3 * s for s in decode_seconds(language, tokens, 3 if args.smoke else 30)],
        "prefill MB": [1e-6 * prefill_peak(language, n) for n in tokens],
    }
    lines = {what: fitted(tokens, values) for what, values in measured.items()}
    for what, fit in lines.items():
        values = ", ".join(f"{n}: {v:.3f}" for n, v in zip(tokens, fit["values"], strict=True))
        found = f"{fit['intercept']:.3f} + {1e3 * fit['slope']:.3f} per 1000 tokens, R^2 {fit['r2']:.4f}"
        print(f"{what:12}{found}    ({values})")
    about = about_run(args, device, dtype, "2 layers, 256 wide, 4 heads")
    if args.json:
        Path(args.json).write_text(json.dumps({"about": about, "tokens": tokens, **lines}, indent=1) + "\n")
    if args.plot:
        plot(about, tokens, lines, args.plot)
    return 0


@torch.inference_mode()
def decode_seconds(language, lengths, rounds):
    """Median seconds of a decode step of one sequence for each kept length; heads keep different tokens."""
    config, table, steps = language.config, language.model.embed_tokens.weight, []
    heads, tokens = config.num_key_value_heads, 2 * max(lengths)  # before pruning
    for kept in lengths:
        cache = RaggedCache(config.num_hidden_layers)
        for layer in range(config.num_hidden_layers):
            k, v = (
                torch.randn(1, heads, tokens, config.head_dim, dtype=table.dtype, device=table.device) for _ in "kv"
            )
            cache.pack(layer, k, v, torch.rand(heads, tokens, device=table.device).argsort(1) < kept)
        steps.append(FastStep(language, cache))
    times, ids = [[] for _ in lengths], torch.ones(1, dtype=torch.long, device=table.device)
    for _ in range(rounds + 3):
        for step, seconds in zip(steps, times, strict=True):
            start = time.perf_counter()
            step(ids).argmax(-1).tolist()  # waits for the device
            seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds[3:]) for seconds in times]  # the first three warm up and capture


@torch.inference_mode()
def prefill_peak(language, tokens):
    """Peak bytes of a pruned prefill of `tokens` tokens, excluding the model and its input."""
    config, table = language.config, language.model.embed_tokens.weight
    heads = config.num_attention_heads, config.num_key_value_heads
    layout = Layout(config.num_hidden_layers, *heads, tokens, [(1, tokens - tokens // 8)], table.device)
    x = torch.randn(1, tokens, config.hidden_size, dtype=table.dtype, device=table.device)

    def prefill():
        choose = Pruner(method_of("plphp:dr=0@0.5"), layout).choose
        return language.prefill(x, RaggedCache(config.num_hidden_layers), choose=choose)

    prefill()  # one-time allocations
    before = peak_from_now(x.device)
    prefill()
    return peak(x.device) - before


def peak_from_now(device):
    """Reset the peak -> bytes in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")
    return peak(device)


def peak(device):
    """Peak bytes since the reset: of the allocator on CUDA, of the process on a CPU (Linux)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def fitted(x, y):
    """Least-squares line through the points, and its R^2."""
    slope, intercept = statistics.linear_regression(x, y)
    r2 = statistics.correlation(x, y) ** 2 if len(set(y)) > 1 else 1.0  # a constant lies on its line
    return {"values": y, "slope": slope, "intercept": intercept, "r2": r2}


def plot(about, tokens, lines, path):
    """Plot both curves with their fitted lines, in Okabe and Ito's colours."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    page, panels = pyplot.subplots(1, 2, figsize=(9, 4.3), layout="constrained")
    labels = (
        ("decode ms", "time of a decode step, ms", "tokens that each head keeps", "#D55E00"),
        ("prefill MB", "peak memory of a prefill, MB", "tokens of the prompt", "#0072B2"),
    )
    for axes, (what, value, label, colour) in zip(panels, labels, strict=True):
        fit = lines[what]
        axes.plot(tokens, [fit["intercept"] + fit["slope"] * n for n in tokens], color="#000000", linestyle=":")
        axes.plot(tokens, fit["values"], color=colour, marker="o", linestyle="")
        axes.set(xlabel=label, ylabel=value, ylim=(0, None))
        axes.set_title(f"dotted: least-squares line, R² {fit['r2']:.4f}", fontsize=10)
        axes.locator_params(axis="x", nbins=6)
        axes.grid(alpha=0.3)
    page.suptitle(f"{about['model']}, {about['dtype']}, {about['machine']}", fontsize=11)
    page.savefig(path, dpi=200)


def check_growth(args):
    """InputError for a flag that this mode would ignore."""
    own, both = {"tokens", "plot"}, {"growth", "smoke", "device", "dtype", "seed", "json", "worker", "words"}
    for name, value in vars(args).items():
        unused = name not in own | both if args.growth else name in own
        if unused and value != parser().get_default(name):
            flag = f"--{name.replace('_', '-')}"
            raise InputError(f"{flag} works only {'without' if args.growth else 'with'} --growth; see -h")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    args.words = argv
    try:
        if args.worker:
            task = json.loads(args.worker)
            return worker(Task(**task | {"workload": Workload(**task["workload"])}))
        check_growth(args)
        return growth(args) if args.growth else bench(args)
    except InputError as wrong:
        say(f"error: {one_line(wrong)}")
        return 2
    except KeyboardInterrupt:
        kept = " and ".join(filter(None, (args.json, args.csv)))
        say(f"interrupted; {f'the results so far are in {kept}' if kept else 'use --json to keep partial results'}")
        return 130


if __name__ == "__main__":
    sys.exit(as_command(main))
