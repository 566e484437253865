"""Run decode steps of the demo, compiled and plain, for test_compile.py. Takes a seed; prints JSON on stdout."""

import json
import sys

import torch
import torch.nn.functional as F

from model import Generation, Sampling, load
from model.cache import RaggedCache
from model.fast import FastStep, matvec
from tests.oracle import poison
from tests.paths import DEMO, DEMO_PICTURE


def cache_of(language, x, prune):
    """A prompt's cache with 2 free slots per segment, filled with NaN."""
    cache = RaggedCache(language.config.num_hidden_layers, slack=2, backend="torch")
    language.prefill(x, cache, prune=prune)
    poison(cache)
    return cache


def halves(layer, q, k, v, *_):
    """Keep every second token of each head, and every third in odd layers, so that layers differ."""
    return (torch.arange(k.shape[2]) % (2 + layer % 2) == 0).expand(k.shape[0] * k.shape[1], -1), None


def uneven(layer, q, k, v, *_):
    """Keep a different number of tokens in each head."""
    heads = k.shape[0] * k.shape[1]
    return torch.arange(k.shape[2]) < 5 + torch.arange(heads)[:, None], None


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@torch.inference_mode()
def steps(language, twin, x, prune):
    """Compare 6 steps: largest difference of logits, largest logit, whether the caches agree, number of new graphs.

    twin: a model with the same weights that runs uncompiled.
    """
    before, caches = graphs(), [cache_of(language, x, prune) for _ in "ab"]
    ways = FastStep(twin, caches[0]), FastStep(language, caches[1], compile=True)
    off = size = 0.0
    for i in range(6):  # enough for a repack
        ids = torch.arange(len(x)) + 7 * i
        plain, compiled = (way(ids) for way in ways)
        off, size = max(off, float((plain - compiled).abs().max())), max(size, float(plain.abs().max()))
        if i == 2:
            for cache in caches:
                poison(cache)
    a, b = caches
    same = all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("kv_len", "kv_cap", "pos"))
    whole = ways[1].compiles_whole
    return {"off": off, "size": size, "same": same, "graphs": graphs() - before, "whole": whole}


@torch.inference_mode()
def work_of_a_step(language, x):
    """(compiled calls, allocations) of one step, from the profiler."""
    step, ids = FastStep(language, cache_of(language, x, None), compile=True), torch.tensor([3])
    step(ids)
    with torch.profiler.profile(profile_memory=True) as profile:
        step(ids)
    names = [event.name for event in profile.events()]
    return sum(name.startswith("Torch-Compiled Region") for name in names), names.count("[memory]")


@torch.inference_mode()
def products():
    """{dtype: [error of the compiled matvec, error of F.linear]}: largest errors against float64."""
    once, errors = torch.compile(matvec, dynamic=False), {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight, bias, x = (torch.randn(s).to(dtype) for s in ((70, 300), (70,), (1, 300)))
        exact = F.linear(x.double(), weight.double(), bias.double())
        errors[str(dtype)] = [float((f(x, weight, bias) - exact).abs().max()) for f in (once, F.linear)]
        assert once(x, weight, bias).dtype == dtype
    return errors


def main(seed):
    torch.manual_seed(seed)
    question = "Describe the picture.", [str(DEMO_PICTURE)], Sampling(24)
    texts = ["".join(Generation(load(DEMO, "fp32"), *question, compile=compile)) for compile in (False, True)]
    found = {"texts": texts, "answer_graphs": graphs()}
    language, twin = (load(DEMO, "fp32").model.language_model for _ in "ab")
    x = torch.randn(2, 40, language.config.hidden_size) * language.model.embed_tokens.weight.std()
    cases = {"all": (x[:1], None), "halves": (x[:1], halves), "uneven": (x[:1], uneven), "batch": (x, None)}
    found["steps"] = {name: steps(language, twin, *case) for name, case in cases.items()}
    found["calls"], found["allocations"] = work_of_a_step(language, x[:1])
    print(json.dumps(found | {"products": products()}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
