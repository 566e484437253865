"""What bench_decode.py times: a whole answer by one engine, checked once. Each engine has a process of its own."""

import contextlib
import os
import re
import statistics
import time
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate, pairwise
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import Generation, InputError, Sampling, load, open_checkpoint
from model.batch import join
from model.cache import KV_DTYPES, RaggedCache
from model.checkpoint import DTYPES
from model.config import TextConfig
from model.fast import FastStep
from model.pruning import make_method

from . import harness
from .hf import hf_inputs, import_transformers
from .shapes import SHAPES, TIED

OURS = ("ours", "ours-compile")
ENGINES = (*OURS, "hf-eager", "hf-sdpa", "hf-static")
WATCHED = 8  # number of tokens compared


# ---------------------------------------------------------------- tasks


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
        return list(pairwise(accumulate(self.pictures, initial=self.text // 4)))


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
    kv_dtype: str  # of K and V in our cache: auto, int8 or fp8


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


# ---------------------------------------------------------------- answers


def prepare(task):
    """(facts, function that answers) for any task."""
    if task.engine not in OURS:
        return prepare_hf(task)
    return prepare_picture(task) if task.image else prepare_ours(task)


def language_of(task):
    """The Llama of a task and its look-ahead rows, or None."""
    if task.shape:
        config = TextConfig(**SHAPES[task.shape][0])
        tied = task.shape in TIED
        return harness.random_language(config, DTYPES[task.dtype], task.device, task.seed, tied), None
    checkpoint = load(task.model, task.dtype, task.device)
    return checkpoint.model.language_model, checkpoint.lookahead


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
def answer(
    language, x, spans, method, backend, new_tokens, lookahead=None, watched=0, compile=False, kv_dtype="auto"
):  # fmt: skip
    """Greedy ids for the prompts x (B, T, C), prefilled one by one and decoded together -> Answer."""
    start = time.perf_counter()
    caches, last = [], []
    for sequence in x:
        cache = RaggedCache(language.config.num_hidden_layers, min(new_tokens, 64), backend, kv_dtype)
        hidden = harness.prefill(language, sequence[None], cache, method, spans, backend, lookahead)
        last.append(hidden[0, -1].clone())  # the rest is freed
        caches.append(cache)
        del hidden
    cache = caches[0] if len(caches) == 1 else join(caches)
    logits = language.logits(torch.stack(last))
    ids = logits.argmax(-1)
    said = [ids.tolist()]  # waits for the device
    first, seen, steps = time.perf_counter() - start, [logits[0].clone()], []
    held, vision = cache.nbytes_held, sum(b - a for a, b in spans)
    # read now: a single sequence's cache is the one that decoding extends
    text = x.shape[1] - vision
    kept = [(n - text) / vision for c in caches for n in c.kv_len.double().mean(1).tolist()] if method else []
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
    language, lookahead = language_of(task)
    method, spans = method_of(task.prune, task.model), task.workload.spans
    x = prompts(task, language)
    compile = task.engine == "ours-compile"
    given = language, x, spans, method, task.backend, task.new_tokens, lookahead
    run = partial(answer, *given, compile=compile, kv_dtype=task.kv_dtype)
    checked = run(watched=WATCHED)
    facts = {
        "ids": [list(ids) for ids in zip(*checked.ids[:WATCHED], strict=True)],
        "logits": [row.tolist() for row in checked.logits[:2]],
        "finite": all(bool(row.isfinite().all()) for row in checked.logits),
        "kept": checked.kept,
        "kv_bytes_held": checked.bytes_held,
        "step": step_cost(checked.step, checked.cache),
        "error": error_of_steps(language, x[0], spans, method, lookahead, checked, KV_DTYPES[task.kv_dtype]),
    }

    def again():
        a = run()
        return a.first, a.steps

    return facts, again


@torch.inference_mode()
def error_of_steps(language, x, spans, method, lookahead, checked, codes=None):
    """Largest error of the step logits that follow prompt x (T, C): against a single prefill of the prompt and the
    generated tokens or, if it was pruned or K and V are in 8 bits, against steps with a masked `DenseCache`."""
    said = torch.tensor([ids[0] for ids in checked.ids[: len(checked.logits) - 1]], device=x.device)
    tokens = language.model.embed_tokens(said)
    if method is None and codes is None:
        wanted = language.logits(language.prefill(torch.cat((x, tokens))[None])[0, len(x) - 1 :])
    else:
        cache = harness.DenseCache(language.config.num_hidden_layers, len(x) + len(tokens), codes)
        harness.prefill(language, x[None], cache, method, spans, lookahead=lookahead)
        wanted = [language.logits(language.decode(token[None], cache))[0] for token in tokens]
    errors = [error(a, b) for a, b in zip(checked.logits[-len(wanted) :], wanted, strict=True)]
    return float(torch.tensor(errors).max())  # NaN if one of them is


def prepare_picture(task):
    """As `prepare_ours`, for a picture and a question through model.Generation."""
    checkpoint = load(task.model, task.dtype, task.device)
    method = method_of(task.prune, checkpoint.folder)
    sampling = Sampling(max_new_tokens=task.new_tokens)
    generation = Generation(
        checkpoint, task.prompt, [task.image], sampling, prune=method, backend=task.backend,
        compile=task.engine == "ours-compile", timed=True, kv_dtype=task.kv_dtype,
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
        told, start = [], time.perf_counter()  # when each token's ids can be read
        clock = SimpleNamespace(put=lambda ids: told.append(time.perf_counter()), end=lambda: None)
        ids = model.generate(**inputs, **options, streamer=clock)
        new = ids.shape[1] - (inputs["input_ids"].shape[1] if task.image else 0)
        times = told[-new:]  # the streamer gets the prompt first
        return times[0] - start, [b - a for a, b in pairwise(times)]

    checked = model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
    said = checked.sequences[:, -len(checked.logits) :].tolist()
    facts = {
        "ids": [[i for i in ids if i not in stop_ids][:WATCHED] for ids in said],
        "logits": [] if task.image else [row[0].tolist() for row in checked.logits[:2]],
    }
    return facts, again


def hf_llama(task, attention):
    """(transformers' Llama or Qwen2 with our decoder's weights, arguments of generate(), stop ids)."""
    transformers = import_transformers()
    language, _ = language_of(task)
    fields = asdict(language.config)
    weights = {name: w.contiguous() for name, w in language.state_dict().items()}  # undo the layout of `arrange`
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])  # if tied
    rope = {"rope_type": "default", "rope_theta": fields.pop("rope_theta")}
    del fields["sliding_window"]  # None, or longer than the prompt
    kind, causal = transformers.LlamaConfig, transformers.LlamaForCausalLM
    if language.config.model_type == "qwen2":  # its attention always has the bias
        kind, causal = transformers.Qwen2Config, transformers.Qwen2ForCausalLM
        del fields["attention_bias"], fields["mlp_bias"]
    config = kind(
        **fields, rope_parameters=rope, tie_word_embeddings=language.lm_head is None,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):
        model = causal(config).eval().requires_grad_(False)
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


def error(got, wanted):
    """RMS of the difference of two rows of numbers, relative to the RMS of `wanted`."""
    got, wanted = (torch.as_tensor(row, dtype=torch.float64, device="cpu") for row in (got, wanted))
    return float((got - wanted).norm() / wanted.norm())


# ---------------------------------------------------------------- cost of a step


@torch.inference_mode()
def step_cost(step, cache, steps=4):
    """Launches, syncs and allocations of a step; on CUDA also kernels. Choosing and reading ids is not counted.

    On a CPU, a launch is an outermost PyTorch call that computes or writes; views do not count.
    """
    if step.func.compiles_whole:
        return {}  # counting would break up a compiled layer
    for _ in range(cache.room + 3):  # run until the next repack, and until a graph is captured again
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


# ---------------------------------------------------------------- the process


def serve(task, pipe):
    """Work on a task in a process of its own: send the facts, then a reply for every message that arrives."""
    os.dup2(2, 1)  # what a method prints must not mix with the tables
    with contextlib.suppress(OSError):  # the parent has ended
        for reply in replies(task, iter(pipe.recv, None)):
            pipe.send(reply)


def replies(task, asked):
    """{"facts"}, then {"first", "steps", "peak"} in seconds and bytes for each of `asked`; {"why"} after a failure."""
    device = torch.device(task.device)
    if device.index is not None:
        torch.cuda.set_device(device)  # streams, graphs and statistics use the current device
    try:
        facts, again = prepare(task)
        yield {"facts": facts}
        harness.reset_peak(device)  # do not count preparation and checks
        for _ in asked:
            first, steps = again()
            yield {"first": first, "steps": steps, "peak": harness.peak_memory(device)}
    except ImportError as missing:
        yield {"why": f"{missing}; see requirements-test.txt"}
    except Exception as broken:  # from transformers or the device; reported in the table
        yield {"why": harness.said(broken)}
