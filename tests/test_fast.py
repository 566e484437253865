"""model/fast.py: the fast decode step computes what the plain one does, however weights lie in memory."""

import copy
import dataclasses

import pytest
import torch
from oracle import assert_as_exact, assert_within, small_llama

from model import Generation, InputError, fast, load
from model.cache import RaggedCache
from model.fast import FastLayer, FastStep, Product, arrange
from model.generate import plain_step
from tests.paths import DEMO, DEMO_PICTURE


def prompted(model, batch=1, slack=2, keep=None):
    """A cache with a prompt of 7 tokens, the same for every call."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(batch, 7, model.config.hidden_size, generator=generator)
    cache = RaggedCache(model.config.num_hidden_layers, slack=slack)
    model.prefill(x.to(model.model.norm.weight.dtype), cache, prune=None if keep is None else lambda *_: (keep, None))
    return cache


def logits_of(model, make, steps=6, batch=1, keep=None):
    """Logits of several decode steps (steps, B, V); few free slots, so that the cache is repacked on the way."""
    step = make(model, prompted(model, batch, keep=keep))
    return torch.stack([step(torch.arange(batch) + 7 * i).clone() for i in range(steps)])


@pytest.mark.parametrize("arranged", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("kv_heads", "bias", "dtype"), [
    (4, False, torch.float32), (2, True, torch.float32), (1, False, torch.float32), (2, False, torch.bfloat16),
])  # fmt: skip
@torch.no_grad()
def test_the_fast_step_is_the_plain_step(kv_heads, bias, dtype, batch, arranged):
    model = small_llama(kv_heads=kv_heads, bias=bias).to(dtype)
    exact = logits_of(copy.deepcopy(model).double(), plain_step, batch=batch)
    plain = logits_of(model, plain_step, batch=batch)
    if arranged:
        arrange(model)
    assert_as_exact(logits_of(model, FastStep, batch=batch), plain, exact, dtype)


@torch.no_grad()
def test_the_fast_step_reads_a_ragged_cache():
    model = small_llama(kv_heads=2)
    keep = torch.tensor([[1, 0, 1, 1, 0, 1, 1], [0, 0, 0, 1, 0, 0, 1]], dtype=torch.bool)
    plain = logits_of(model, plain_step, keep=keep)
    arrange(model)
    torch.testing.assert_close(logits_of(model, FastStep, keep=keep), plain, rtol=1e-4, atol=1e-5)
    assert (plain - logits_of(model, plain_step)).abs().max() > 1e-3  # otherwise the test could not fail


@pytest.mark.parametrize(("dtype", "bias"), [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)])
def test_arranged_weights_keep_names_and_values(dtype, bias):
    model = small_llama(bias=bias).to(dtype)
    before = {name: w.clone() for name, w in model.state_dict().items()}
    arrange(model)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[n], w) for n, w in before.items())
    layer = FastLayer(model.model.layers[1])
    assert layer.qkv.weight is not None and layer.gate_up.weight is not None


def test_weights_that_do_not_lie_side_by_side_are_not_joined():
    whole = torch.randn(10, 4)
    layers = [torch.nn.Linear(4, n, bias=False) for n in (3, 2, 5)]
    for layer, part in zip(layers, whole.split([3, 2, 5]), strict=True):
        layer.weight = torch.nn.Parameter(part)
    assert torch.equal(fast.joined(layers), whole) and torch.equal(fast.joined(layers[1:]), whole[3:])
    assert fast.joined(layers[::2]) is None and fast.joined(layers[::-1]) is None
    for replaced in (0, 1):  # by the same numbers elsewhere
        others = copy.deepcopy(layers)
        fast.lay(others)
        assert fast.joined(others) is not None
        others[replaced].weight = torch.nn.Parameter(others[replaced].weight.detach().clone())
        assert fast.joined(others) is None
    some = torch.nn.Linear(4, 3), torch.nn.Linear(4, 5, bias=False)
    fast.lay(some)
    assert fast.Product(*some).weight is None  # only one has a bias


@pytest.mark.parametrize("name", ["self_attn.v_proj", "mlp.up_proj", "mlp.down_proj"])
@torch.no_grad()
def test_a_weight_that_is_replaced_or_written_counts(name):
    model = small_llama()
    arrange(model)
    layer = model.model.layers[1].get_submodule(name)
    layer.weight.mul_(3)  # in-place change
    for changed in (model, copy.deepcopy(model)):  # a copy, whose weights are separate again
        other = logits_of(small_llama(), plain_step)
        written = logits_of(changed, FastStep)
        torch.testing.assert_close(written, logits_of(changed, plain_step), rtol=1e-4, atol=1e-5)
        assert (written - other).abs().max() > 1e-3
        layer = changed.model.layers[1].get_submodule(name)
        layer.weight = torch.nn.Parameter(layer.weight / 3, requires_grad=False)
        torch.testing.assert_close(logits_of(changed, FastStep), other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_what_a_compiler_reads_is_the_same(bias, batch, monkeypatch):
    """The functions written for the compiler, run uncompiled; test_compile.py compiles them."""
    model = small_llama(bias=bias)
    plain = logits_of(model, plain_step, batch=batch)
    arrange(model)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    found = logits_of(model, lambda *given: FastStep(*given, compile=True), batch=batch)
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)


def test_mapped_weights_stay_mapped():
    """Copying them would take memory; casting copies them in any case."""
    mapped, cast = (load(DEMO, dtype).model.language_model.model.layers for dtype in ("bf16", "fp32"))
    assert all(FastLayer(layer).qkv.weight is None for layer in mapped)
    assert all(FastLayer(layer).qkv.weight is not None for layer in cast)


@pytest.mark.parametrize("rows", [(7,), (300, 212), (400, 400)])
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
@torch.inference_mode()
def test_products_are_those_of_the_layers(rows, together, batch):
    """Sums may be in any order."""
    layers = [torch.nn.Linear(96, n, bias=False) for n in rows]
    x = torch.randn(batch, 96)
    exact = [x.double() @ layer.weight.double().T for layer in layers]
    if together:
        fast.lay(layers)
    product = Product(*layers)
    assert (product.weight is None) == (len(rows) > 1 and not together)
    terms = [x.double().abs() @ layer.weight.double().abs().T for layer in layers]
    for got, true, sums in zip(product(x), exact, terms, strict=True):
        assert_within(got, true, sums, 96)
    first, y = torch.randn(batch, rows[0]), layers[0]
    assert_within(Product(y).add(first.clone(), x), first + exact[0], first.abs() + terms[0], 97)


def test_the_model_is_right_without_it():
    checkpoint = load(DEMO, "fp32")
    plain = dataclasses.replace(checkpoint, step=plain_step)
    texts = ["".join(Generation(c, "How many objects are there?", DEMO_PICTURE)) for c in (checkpoint, plain)]
    assert texts == 2 * ["The picture has four objects."]
    with pytest.raises(InputError, match="FastStep"):
        "".join(Generation(plain, "How many?", DEMO_PICTURE, compile=True))
