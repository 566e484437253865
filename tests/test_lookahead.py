"""Look-ahead rows: what they compute, that they change nothing else, and how they are trained."""

import copy
import csv
import dataclasses
import json
import random
from types import SimpleNamespace

import pytest
import torch
from conftest import TEXT, refusal
from oracle import small_llama
from PIL import Image
from safetensors.torch import load_file, save_file

from kernels import window_scores
from model import Batch, Generation, Sampling, load
from model.cache import RaggedCache
from model.llama import rope_table
from model.lookahead import Lookahead, describe_model, fill_lookahead, open_lookahead
from model.pruning import make_method
from model.pruning.budget import grid_phase
from tests.given import given_view
from tools import train_lookahead
from tools.evaluation.replay import asked_with
from tools.train_lookahead import Example, divergence, freeze, predict

ROWS = 3
RANKING = ("plphp", "plphp-ada", "topk", "shared", "snapkv", "adakv")


def random_lookahead(language, rows=ROWS, rank=4, seed=0):
    """Look-ahead rows with adapters that are not zero."""
    torch.manual_seed(seed)
    lookahead = Lookahead(language, rows, rank).requires_grad_(False)
    for name, p in lookahead.named_parameters():
        torch.nn.init.normal_(p, std=0.3 if name.endswith("lora_B") else 0.5)
    return lookahead


def looked(language, x, lookahead=None):
    """Final hidden states of a prefill, its cache, and q, k, v of each layer."""
    cache, layers = RaggedCache(len(language.model.layers), backend="torch"), []

    def look(layer, q, k, v, *_):
        layers.append((q, k, v))
        return None, None

    hidden = language.prefill(x, cache, prune=look, lookahead=lookahead)
    return hidden, cache, layers


def taken(cache):
    """All occupied rows of K and V in one tensor."""
    arenas = [(i, arena) for arenas in (cache.k, cache.v) for i, arena in enumerate(arenas)]
    places = [zip(cache.kv_start[i].tolist(), cache.kv_len[i].tolist(), strict=True) for i, _ in arenas]
    return torch.cat([a[s : s + n] for (_, a), place in zip(arenas, places, strict=True) for s, n in place])


def rows_of(language, x, lookahead):
    """Per layer (Hq, T + m): attention of the look-ahead rows."""
    m = lookahead.rows
    _, _, layers = looked(language, x, lookahead)
    return [window_scores(q[0, :, -m:], k[0], group="none", backend="torch") for q, k, _ in layers]


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (4, 1)])
def test_the_prompt_and_its_cache_do_not_see_the_rows(heads, kv_heads):
    """Nor do the tokens that are decoded later."""
    language = small_llama(heads, kv_heads)
    x, new = torch.randn(1, 11, 32), torch.randn(4, 1, 32)
    hidden, cache, layers = looked(language, x)
    with_rows, cache_with, layers_with = looked(language, x, random_lookahead(language))
    torch.testing.assert_close(with_rows, hidden, rtol=1e-5, atol=1e-5)
    assert torch.equal(cache_with.kv_len, cache.kv_len) and torch.equal(cache_with.pos, cache.pos)
    torch.testing.assert_close(taken(cache_with), taken(cache), rtol=1e-5, atol=1e-5)
    assert all(b[1].shape[2] == a[1].shape[2] + ROWS for a, b in zip(layers, layers_with, strict=True))
    answers = [torch.stack([language.decode(token, c) for token in new]) for c in (cache, cache_with)]
    torch.testing.assert_close(answers[1], answers[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["mha", "gqa", "biased"])
def test_scores_are_those_of_a_second_transformers_model_with_the_adapters_merged(case):
    """The unmerged model fills a cache with the prompt; the merged one runs the m rows over it."""
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle of these tests")
    bias = case == "biased"
    language = small_llama(kv_heads={"mha": 4, "gqa": 2, "biased": 1}[case], bias=bias)
    c = language.config
    frozen = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
            num_hidden_layers=c.num_hidden_layers, num_attention_heads=c.num_attention_heads, head_dim=c.head_dim,
            num_key_value_heads=c.num_key_value_heads, rms_norm_eps=c.rms_norm_eps, attention_bias=bias, mlp_bias=bias,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta}, attn_implementation="eager",
        )
    ).eval()  # fmt: skip
    frozen.load_state_dict(language.state_dict(), strict=True)
    lookahead, merged = random_lookahead(language), copy.deepcopy(frozen)
    for layer, adapter in zip(merged.model.layers, lookahead.layers, strict=True):
        for name, lora in adapter.named_children():
            linear = getattr(layer.mlp if hasattr(layer.mlp, name) else layer.self_attn, name)
            linear.weight.data += lora.lora_B @ lora.lora_A
    x = torch.randn(1, 13, c.hidden_size)
    with torch.no_grad():
        cache = frozen(inputs_embeds=x, use_cache=True).past_key_values
        rows = lookahead.embeddings[None]
        out = merged(inputs_embeds=rows, past_key_values=cache, output_attentions=True)
    shape = 13, 4, c.num_key_value_heads, c.num_hidden_layers
    for i, (ours, theirs) in enumerate(zip(rows_of(language, x, lookahead), out.attentions, strict=True)):
        theirs = theirs[0].mean(1)  # (Hq, T + m): over the m rows
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
        for spec in (name + ":query=lookahead" for name in RANKING):
            views = [given_view([(2, 11)], *shape, i, scores[:, :13]) for scores in (ours, theirs)]
            kept = [make_method(spec, 0.5).keep(view) for view in views]
            assert kept[0] is None or kept[0].equal(kept[1])


def test_only_the_rows_are_adapted():
    """Adapters on other rows would change the prompt itself."""
    language = small_llama()
    lookahead = random_lookahead(language)
    x, y = torch.randn(2, 7, 32), torch.randn(2, 7, 32)
    adapted = lookahead.layers[0].q_proj.add(x, y.clone())
    assert torch.equal(adapted[:, :-ROWS], y[:, :-ROWS])
    assert (adapted[:, -ROWS:] - y[:, -ROWS:]).abs().min() > 0


# ---------------------------------------------------------------- the file


def read_lookahead(path, language):
    lookahead = open_lookahead(path, language)
    fill_lookahead(lookahead, path, language)
    return lookahead


def saved(path, language, lookahead, **about):
    save_file(dict(lookahead.state_dict()), path, describe_model(language) | about)
    return path


@pytest.mark.parametrize("trained", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loaded", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_fit_the_same_weights_in_other_dtypes(trained, loaded, tmp_path):
    """Weights of all sizes; those that fp16 rounds to zero are not compared."""
    language = small_llama()
    for i, p in enumerate(language.parameters()):
        p.data *= 10.0 ** -(i % 7)
    path = saved(tmp_path / "lookahead.safetensors", copy.deepcopy(language).to(trained), random_lookahead(language))
    found = read_lookahead(path, copy.deepcopy(language).to(loaded))
    assert {p.dtype for p in found.parameters()} == {loaded} and not any(p.requires_grad for p in found.parameters())
    same = zip(found.parameters(), random_lookahead(language).parameters(), strict=True)
    assert found.rows == ROWS and all(torch.equal(a, b.to(loaded)) for a, b in same)


def test_rows_do_not_fit_other_weights_with_the_same_norms(tmp_path):
    """A model that was fine-tuned in one kind of layer alone."""
    language = small_llama()
    path = saved(tmp_path / "lookahead.safetensors", language, random_lookahead(language))
    for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"):
        tuned = copy.deepcopy(language)
        tuned.get_submodule(f"model.layers.0.{name}").weight.data *= 1.02
        assert "other weights" in refusal(read_lookahead, path, tuned)
    tuned = copy.deepcopy(language)
    tuned.lm_head.weight.data *= 1.001  # less than rounding to bf16
    read_lookahead(path, tuned)


def test_a_file_of_something_else_is_refused(tmp_path):
    language, path = small_llama(), tmp_path / "lookahead.safetensors"
    tensors = dict(random_lookahead(language).state_dict())
    rows = tensors["embeddings"]
    for said, changed in (
        ("for another model", random_lookahead(small_llama(kv_heads=4)).state_dict()),
        ("for another model", tensors | {"extra": torch.zeros(1)}),
        ("for another model", {k: v for k, v in tensors.items() if k != "layers.2.up_proj.lora_B"}),
        ("no readable look-ahead rows", {k: v for k, v in tensors.items() if k != "embeddings"}),
        ("of type I8", {k: v.to(torch.int8) for k, v in tensors.items()}),
        ("of type BOOL", {k: v.to(torch.bool) for k, v in tensors.items()}),
        ("NaN or infinity", tensors | {"embeddings": rows * float("nan")}),
        ("3 look-ahead rows of rank 0", random_lookahead(language, rank=0).state_dict()),
        ("rows of zeros", tensors | {"embeddings": rows * torch.tensor([[1], [0], [1]])}),
    ):
        save_file(dict(changed), path, describe_model(language))
        assert said in refusal(read_lookahead, path, language)
    for text in ("c9b6d8507dfa36f5", "", "[1]", '{"weights": 3}', "null"):  # of another program
        save_file(tensors, path, {"about": text})
        assert "other weights" in refusal(read_lookahead, path, language)
    path.write_bytes(b"no safetensors")
    assert "no readable look-ahead rows" in refusal(read_lookahead, path, language)


def test_a_run_goes_on_only_with_its_own_settings(tmp_path):
    language = small_llama()
    (tmp_path / "q1").write_text("one")
    (tmp_path / "q2").write_text("two")

    def settings(*flags, model=language, questions="q1"):
        args = train_lookahead.parser().parse_args([*flags, "--questions", str(tmp_path / questions)])
        return train_lookahead.settings_of(model, args)

    other = small_llama()
    other.model.norm.weight.data *= 1.5
    train_lookahead.same_settings(tmp_path / "run", settings("--steps", "9"))
    train_lookahead.same_settings(tmp_path / "run", settings("--steps", "9", "--report", "3"))  # the same rows
    for changed, before in (
        (settings("--steps", "8"), "--steps 9"), (settings("--steps", "9", "--rank", "2"), "--rank 16"),
        (settings("--steps", "9", "--leave-out", "list", "spell"), "--leave-out (none)"),
        (settings("--steps", "9", questions="q2"), "other questions"),
        (settings("--steps", "9", model=other), "another model"),
    ):  # fmt: skip
        assert f"was started with {before};" in refusal(train_lookahead.same_settings, tmp_path / "run", changed)


# ---------------------------------------------------------------- training


def own_answer(language, x, length):
    """Greedy ids after a prompt x (T, C)."""
    ids, embed = [], language.model.embed_tokens.weight
    for _ in range(length):
        ids.append(language.logits(language.prefill(x[None])[0, -1]).argmax().item())
        x = torch.cat((x, embed[ids[-1:]]))
    return ids, x[:-1]


def examples(language, count=4, seed=0):
    """Prompts of different lengths, the first two about the same pictures, and the model's own answers."""
    torch.manual_seed(seed)
    found, opening = [], torch.randn(9, 32)
    for i in range(count):
        start = opening if i < 2 else torch.randn(8 + i, 32)
        prompt = torch.cat((start, torch.randn(3 + 2 * i, 32)))
        answer, x = own_answer(language, prompt, 3 + i)
        found.append(Example(x, len(prompt), [(1, 5), (6, 8)], answer, len(start), "same" if i < 2 else None))
    return found


def test_targets_are_the_answers_attention_whatever_the_padding():
    """Compared with a prefill of each example alone and the reference of window_scores."""
    language = small_llama()
    made = examples(language)
    frozen = freeze(language.requires_grad_(True), made)
    assert frozen.own == 1.0 and not any(t.requires_grad for t in (*frozen.target, *frozen.k, *frozen.v))
    language.requires_grad_(False)
    for b, e in enumerate(made):
        _, _, layers = looked(language, e.x[None])
        for target, (q, k, _) in zip(frozen.target, layers, strict=True):
            p = window_scores(q[0, :, e.prompt :], k[0], group="mean", backend="torch")  # (Hkv, T + F)
            vision = torch.zeros(p.shape[1], dtype=torch.bool)
            for start, stop in e.spans:
                vision[start:stop] = True
            torch.testing.assert_close(target[b, :, : e.opening], (p * vision)[:, : e.opening], rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(target[b].sum(-1), torch.ones(2), rtol=1e-5, atol=0)
            torch.testing.assert_close(target[b, :, -1], (p * ~vision).sum(-1), rtol=1e-4, atol=1e-6)
            assert target[b, :, e.opening : -1].abs().max() == 0  # padding, the question and the answer: the last bin


def test_what_training_predicts_is_what_prefill_computes():
    language = small_llama()
    lookahead, made = random_lookahead(language), examples(language)
    frozen = freeze(language, made)
    found = predict(language, lookahead, frozen)
    for b, e in enumerate(made):
        for predicted, scores in zip(found, rows_of(language, e.x[None, : e.prompt], lookahead), strict=True):
            by_head = scores.view(2, 2, -1).mean(1)
            for start, stop in e.spans:
                torch.testing.assert_close(predicted[b, :, start:stop], by_head[:, start:stop], rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(predicted[b].sum(-1), torch.ones(2), rtol=1e-5, atol=0)


def test_an_answer_that_is_not_the_models_own_teaches_nothing():
    language = small_llama()
    made = examples(language)
    made[1].answer[1] = (made[1].answer[1] + 1) % 97
    frozen = freeze(language, made)
    assert frozen.own == pytest.approx(3 / 4) and len(frozen.seen) == 3
    assert frozen.target[0].shape[0] == frozen.k[0].shape[0] == 3


def test_the_rest_bin_counts():
    """Two predictions with equal vision parts but different rest mass have different losses."""
    target = torch.tensor([[[0.2, 0.2, 0.6]]])
    good, bad = torch.tensor([[[0.2, 0.2, 0.6]]]), torch.tensor([[[0.45, 0.45, 0.1]]])
    assert divergence(target, good).item() == pytest.approx(0, abs=1e-6)
    expected = 0.4 * torch.tensor(0.2 / 0.45).log() + 0.6 * torch.tensor(6.0).log()
    assert divergence(target, bad).item() == pytest.approx(expected.item(), rel=1e-5)


def options(folder, **more):
    """Arguments of `train`."""
    own = {"rows": 2, "rank": 2, "seed": 0, "held_out": 1, "run": folder, "out": folder / "lookahead.safetensors"}
    return SimpleNamespace(**own | more)


def test_training_leaves_the_model_alone_and_resumes_to_the_same_rows(tmp_path, monkeypatch):
    language = small_llama()
    before, pool = {name: p.clone() for name, p in language.named_parameters()}, examples(language, 6)

    class Source:
        def batch(self, step):
            return pool[:2] if step < 0 else [pool[2 + step % 4], pool[2 + (step + 1) % 4]]

    def run(folder, *steps):
        for number in steps:
            train_lookahead.train(language, Source(), options(folder, steps=number, report=4))
        return load_file(folder / "lookahead.safetensors"), (folder / "lookahead.csv").read_text().splitlines()

    monkeypatch.setattr(train_lookahead, "rate_at", lambda step, steps, peak, **_: 10 * peak)
    whole, curve = run(tmp_path / "whole", 12)
    parts, again = run(tmp_path / "parts", 8, 12)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    column = curve[0].split(",").index("kl")
    losses = [float(line.split(",")[column]) for line in curve[1:]]
    assert losses[-1] < 0.6 * losses[0], losses
    assert [line.split(",")[column] for line in again[1:]] == [line.split(",")[column] for line in curve[1:]]
    assert all(torch.equal(p, before[name]) for name, p in language.named_parameters())
    assert read_lookahead(tmp_path / "whole" / "lookahead.safetensors", language).rows == 2


def asking_file(folder, count):
    """A file of questions about `count` pictures, one each."""
    lines = []
    for i in range(count):
        Image.frombytes("RGB", (40, 40), random.Random(i).randbytes(4800)).save(folder / f"{i}.png")
        lines.append(json.dumps({"question_id": i, "image": f"{i}.png", "text": "what is this?"}))
    (folder / "q.jsonl").write_text("\n".join(lines))
    return str(folder / "q.jsonl")


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_a_few_questions_are_enough(checkpoint, tmp_path, capsys, dtype, monkeypatch):
    """Held-out batches that stay empty are left out; own answers teach whatever the precision of training. fp16: on a
    CPU without bf16 instructions, where fp32 weights train in fp32."""
    if dtype == "fp16":
        monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    flags = ["--model", str(checkpoint.folder), "--questions", asking_file(tmp_path, 12), "--max-new-tokens", "4"]
    flags += ["--steps", "4", "--report", "2", "--batch", "2", "--rank", "2", "--dtype", dtype]
    files = []
    for name in ("one", "two"):
        run = tmp_path / f"run {name}"
        assert train_lookahead.main([*flags, "--run", str(run), "--out", str(run / "rows.safetensors")]) == 0
        files.append((run / "rows.safetensors").read_bytes())
        curve = list(csv.DictReader((run / "lookahead.csv").read_text().splitlines()))
        assert [float(row["own"]) for row in curve] == [1.0, 1.0]
        assert all(float(row["held-out kl"]) >= 0 for row in curve)
    assert files[0] == files[1]
    language = load(checkpoint.folder, dtype).model.language_model
    assert read_lookahead(tmp_path / "run one" / "rows.safetensors", language).rows == 8
    for more, said in (
        (["--run", str(tmp_path / "run one"), "--rank", "3"], "was started with --rank 2; give the same"),
        (["--run", str(tmp_path / "three"), "--leave-out", "describe"], "--leave-out is for the built-in scenes"),
    ):
        assert train_lookahead.main([*flags, *more]) == 2 and said in capsys.readouterr().err.splitlines()[-1]


def test_rows_that_learned_nothing_are_not_written(tmp_path):
    """No answer is the model's own."""
    language = small_llama()
    made = examples(language)
    for one in made:
        one.answer[1] = (one.answer[1] + 1) % 97
    source = SimpleNamespace(batch=lambda step: made)
    args = options(tmp_path, steps=3, report=2)
    assert "nothing was learned" in refusal(train_lookahead.train, language, source, args) and not args.out.exists()


@torch.inference_mode()
def test_own_answers_go_on_after_a_line_that_was_cut_off(checkpoint, tmp_path, monkeypatch):
    picture = tmp_path / "x.png"
    Image.frombytes("RGB", (40, 40), random.Random(0).randbytes(4800)).save(picture)
    asked = [(SimpleNamespace(text=text), [picture]) for text in ("what?", "where?", "who is it?")]
    path = tmp_path / "answers.jsonl"
    answers = train_lookahead.own_answers(checkpoint, asked, path, 5)
    whole = path.read_bytes()
    assert len(answers) == 3
    for length in (0, 1, len(whole) - 1, len(whole)):
        path.write_bytes(whole[:length])
        assert train_lookahead.own_answers(checkpoint, asked, path, 5) == answers and path.read_bytes() == whole


def test_the_plan_counts_the_weights(make_checkpoint, tmp_path, capsys):
    large = {"hidden_size": 2560, "vocab_size": 8192}  # GB are printed with two decimals
    tensors = make_checkpoint(tmp_path / "model", TEXT | large, {"hidden_size": 1600, "intermediate_size": 6400})
    assert train_lookahead.main(["--plan", "--model", str(tmp_path / "model"), "--rank", "2", "--rows", "4"]) == 0
    shown = capsys.readouterr().out
    language = [v.numel() for k, v in tensors.items() if k.startswith("language_model")]
    others = [v.numel() for k, v in tensors.items() if not k.startswith("language_model")]
    assert f"{2 * sum(language) / 1e9:.2f} GB  frozen weights" in shown
    assert f"{2 * sum(others) / 1e9:.2f} GB  vision tower and projector" in shown
    assert "GB  total" in shown and "1,000 questions first" in shown


# ---------------------------------------------------------------- in an answer


NEXT = {"model_type": "llava_next", "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]]}  # LLaVA-NeXT, with tiles


@pytest.fixture(params=["LLaVA"])
def checkpoint(make_checkpoint, tmp_path, request):
    """A small checkpoint with look-ahead rows in its folder."""
    make_checkpoint(tmp_path / "model", TEXT | {"num_hidden_layers": 3}, top={"LLaVA": {}, "NeXT": NEXT}[request.param])
    language = load(tmp_path / "model", "fp32").model.language_model
    saved(tmp_path / "model" / "lookahead.safetensors", language, random_lookahead(language))
    return load(tmp_path / "model", "fp32")


def asking(checkpoint, spec="none", retention=None, pictures=1, tokens=6):
    prune = make_method(spec, retention)
    images = [Image.frombytes("RGB", (40, 40), random.Random(i).randbytes(4800)) for i in range(pictures)]
    return Generation(checkpoint, "what is in this picture?", images, Sampling(tokens), prune=prune)


@pytest.mark.parametrize("checkpoint", ["LLaVA", "NeXT"], indirect=True)
def test_a_batch_ranks_by_the_rows_of_each_question(checkpoint):
    """With two pictures, tiled by NeXT, and with none: each answer is the one that its question gets alone."""

    def questions():
        spec = "topk:query=lookahead,cover=0.5"
        return [asking(checkpoint, spec, 0.3, pictures=count, tokens=9) for count in (2, 0, 1)]

    together, batch = questions(), Batch()
    for one in together:
        batch.add(one)
    while batch:
        batch.advance()
    assert [one.text for one in together] == ["".join(one) for one in questions()]
    assert [one.retention for one in together] == pytest.approx([0.3, 1, 0.3], abs=0.1)
    tiled = checkpoint.config.image_grid_pinpoints is not None
    assert (together[2].vision_tokens > checkpoint.config.image_tokens) == tiled


@pytest.mark.parametrize("spec", ["none", "topk", "random"])
def test_rows_that_do_not_rank_are_not_touched(checkpoint, spec):
    """The answer is the same to the bit, whether there are rows, none, or some that cannot be used."""

    class Untouchable:
        def __getattr__(self, name):
            raise AssertionError(name)

    others = [dataclasses.replace(checkpoint, lookahead=rows) for rows in (Untouchable(), None)]
    with torch.inference_mode():
        logits = [asking(each, spec).prefill() for each in (checkpoint, *others)]
    assert logits[0].equal(logits[1]) and logits[0].equal(logits[2])
    assert "".join(asking(others[0], spec)) == "".join(asking(checkpoint, spec))


@pytest.mark.parametrize("checkpoint", ["LLaVA", "NeXT"], indirect=True)
@pytest.mark.parametrize("name", RANKING)
def test_methods_rank_by_the_rows(checkpoint, name):
    """Each head keeps the best by the rows' scores, measured separately; the cache and positions contain no rows."""
    generation = asking(checkpoint, f"{name}:query=lookahead", 0.5, pictures=2)
    with torch.inference_mode():
        logits = generation.prefill()
        plain = asking(checkpoint, pictures=2)
        torch.testing.assert_close(logits, plain.prefill(), rtol=1e-4, atol=1e-5)
        x, spans = checkpoint.model.splice(generation.ids, generation.encode_images())
        scores = rows_of(checkpoint.model.language_model, x[None], checkpoint.lookahead)
    for layer in range(3):
        given = scores[layer][:, : len(x)]
        view = given_view(spans, len(x), 4, 2, 3, layer, given, generation.places)
        keep = generation.prune.keep(view)
        count = torch.full((2,), len(x)) if keep is None else keep.sum(1)
        assert generation.cache.kv_len[layer].tolist() == count.tolist()
        if keep is not None:
            k = plain.cache.k[layer].view(2, -1, plain.cache.k[layer].shape[1])[:, : len(x)]
            held = [
                generation.cache.k[layer][start : start + n]
                for start, n in zip(generation.cache.kv_start[layer].tolist(), count.tolist(), strict=True)
            ]
            torch.testing.assert_close(torch.cat(held), k[keep], rtol=1e-4, atol=1e-5)
    assert generation.cache.pos.tolist() == [len(x)]


def test_replaying_a_prompt_keeps_what_the_answer_kept(checkpoint):
    generation = asking(checkpoint, "plphp-ada:query=lookahead,cover=0.5", 0.4)
    "".join(generation)
    asked = asked_with(
        checkpoint, generation.ids, generation.encode_images(), generation.token_ids[:-1], places=generation.places
    )
    with torch.inference_mode():
        cache, _, _ = asked.cache(generation.prune)
    steps = len(generation.token_ids) - 1
    assert torch.equal(cache.kv_len, generation.cache.kv_len - steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Half:
    """From `layer` on, the better half of the vision tokens; or all of them, from layer 1 on or without `narrow`."""

    layer: int = 1
    query: str = "lookahead"
    every: int = 2
    seen = []

    def narrow(self, view):
        if view.layer != self.layer - 1:
            return None
        scores = view.attention(query=self.query)
        self.seen.append(scores)
        worth = scores.mean(0).masked_fill(view.text, float("inf"))
        count = view.tokens - int(view.text.logical_not().sum()) * (self.every - 1) // self.every
        return torch.zeros(view.tokens, dtype=torch.bool).scatter(0, worth.topk(count).indices, True)


def keep_all(view, *, query="lookahead"):
    return None


@torch.inference_mode()
def test_the_rows_follow_a_prompt_that_is_narrowed(checkpoint):
    """If all tokens stay, nothing changes to the bit; tokens are ranked by the rows, in an answer and in a replay."""
    language, Half.seen[:] = checkpoint.model.language_model, []
    plain, same = (asking(checkpoint, made) for made in (keep_all, make_method(Half, settings={"every": 1})))
    logits = plain.prefill()
    assert same.prefill().equal(logits) and taken(same.cache).equal(taken(plain.cache))
    x, spans = checkpoint.model.splice(plain.ids, plain.encode_images())
    asked = asked_with(checkpoint, plain.ids, plain.encode_images(), [])
    for every in (1, 2):
        generation = asking(checkpoint, make_method(Half, settings={"every": every}))
        logits = generation.prefill()
        cache, _, again = asked.cache(generation.prune)
        assert again[0].equal(logits) and taken(cache).equal(taken(generation.cache))
    scores = rows_of(language, x[None], checkpoint.lookahead)[0][:, : len(x)]
    assert all(seen.equal(scores) for seen in Half.seen) and len(Half.seen) == 5
    worth = scores.mean(0)[slice(*spans[0])]
    stays = torch.cat((torch.arange(spans[0][0]), spans[0][0] + worth.topk(2).indices.sort().values,
                       torch.arange(spans[0][1], len(x))))  # fmt: skip
    rows, ends = checkpoint.lookahead, torch.arange(len(x), len(x) + ROWS)
    y = torch.cat((x, rows.embeddings))[None]
    for i, layer in enumerate(language.model.layers):
        places = torch.arange(len(x) + ROWS) if i == 0 else torch.cat((stays, ends))
        y = y if i != 1 else y[:, places]
        y, *_ = layer.prefill(y, rope_table(places, language.config, y.dtype), None, rows.layers[i])
    torch.testing.assert_close(language.logits(language.model.norm(y[0, -ROWS - 1])), logits, rtol=1e-5, atol=1e-5)


def test_weights_of_another_name_are_found_beside_the_file(checkpoint):
    (checkpoint.folder / "model.safetensors").rename(checkpoint.folder / "weights.safetensors")
    assert "".join(asking(load(checkpoint.folder, "fp32"))) == "".join(asking(checkpoint))


def test_look_ahead_without_a_file_is_refused(checkpoint, tmp_path):
    plain = dataclasses.replace(checkpoint, lookahead=None)
    assert "train_lookahead.py" in refusal(asking, plain, "plphp:query=lookahead", 0.5)
    (tmp_path / "model" / "lookahead.safetensors").write_bytes(b"{}")
    refusal(load, tmp_path / "model", "fp32")
    for wrong in ("query=first", "cover=1.5", "cover=-0.1", "cover=true"):
        with pytest.raises(ValueError, match=wrong.partition("=")[0]):
            make_method(f"topk:{wrong}", 0.5)


# ---------------------------------------------------------------- cover: a share on the grid


@pytest.mark.parametrize("name", RANKING)
@pytest.mark.parametrize("scope", ["image", "vision"])
def test_cover_puts_a_share_on_the_grid_and_keeps_the_number(name, scope):
    torch.manual_seed(3)
    view = given_view([(2, 27), (30, 55)], 60, layer=3, scores=torch.rand(4, 60).softmax(-1))
    kept = {c: make_method(f"{name}:cover={c},scope={scope}", 0.4).keep(view) for c in (0, 0.5, 1)}
    phase = grid_phase(view)
    phase = phase[:1].expand_as(phase) if name == "shared" else phase
    for columns in [list(range(2, 27)), list(range(30, 55))] if scope == "image" else [[*range(2, 27), *range(30, 55)]]:
        counts = {c: k[:, columns].sum(1) for c, k in kept.items()}
        assert torch.equal(counts[0], counts[0.5]) and torch.equal(counts[0], counts[1])
        order = phase[:, columns].sort(stable=True).indices
        for h, count in enumerate(counts[0].tolist()):
            first = kept[0.5][h, columns][order[h]]
            assert first[: count // 2].all() and not first[: count + 1].all()
            assert kept[1][h, columns][order[h]][:count].all()
            plain, mixed = (kept[c][h, columns] for c in (0, 0.5))
            assert (plain & mixed).sum() >= count - count // 2 - 1  # the best by score stay as far as the budget allows
