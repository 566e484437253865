"""tools/witness.py with a small random Llama and words as tokens; needs no downloaded weights."""

import csv
import json
import zlib
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import refusal
from safetensors.torch import load_file

from model.config import TextConfig
from model.llama import Llama
from model.pruning import make_method
from tests.oracle import small_llama
from tools import train_lookahead, witness
from tools.calibrate import gammas_of
from tools.replay import Asked
from tools.witness import KINDS, LEFT_OUT, RETENTIONS, UNSEEN, Words, conditions, greedy, numbered, passage


class Stub:
    """A tokenizer with one token per word, 97 in all."""

    stop = 5

    def prompt(self, text, question):
        before, inside, behind = (
            ["user"],
            text.split()[::4],
            [*question.split(), "assistant"],
        )  # short, for speed
        ids = [6 + zlib.crc32(word.encode()) % 90 for word in (*before, *inside, *behind)]
        return ids, (1, 1 + len(inside))


class Characters:
    """Stands in for transformers' tokenizer: a token per three characters, ignoring where the passage ends."""

    eos_token_id = 2

    def apply_chat_template(self, messages, add_generation_prompt, tokenize):
        return f"<user>{messages[0]['content']}<assistant>"

    def __call__(self, text, add_special_tokens, return_offsets_mapping):
        pieces = [(i, min(i + 3, len(text))) for i in range(0, len(text), 3)]
        return {"input_ids": [a % 97 for a, _ in pieces], "offset_mapping": pieces}


def arguments(folder, *more):
    flags = ["--passages", "6", "--prompts", "20", "--steps", "3", "--rows", "2", "--rank", "2", "--report", "2"]
    return witness.parser().parse_args([*flags, "--run", str(folder), *more])


def test_passages_hold_their_facts():
    one = passage(3)
    assert one == passage(3) and one.text != passage(4).text and len(one.facts) == 8
    for fact in one.facts:
        assert "{name} keeps a {colour} {thing} in the {place}.".format(**fact) in one.text
    assert len(one.text.split(". ")) == 11 and {one.question(kind) for kind in KINDS} != {passage(4).question("list")}
    assert all("{" not in one.question(kind) for kind in KINDS)
    training, unseen = numbered(600, 0), numbered(250, UNSEEN)
    assert not {n for n, _ in training} & {n for n, _ in unseen}
    assert [kind for _, kind in unseen].count(LEFT_OUT) == 50


def test_the_span_is_the_passage():
    ids, (start, stop) = Words(Characters()).prompt("One fact. Two facts.", "Which?")
    inside = "<user>One fact. Two facts.\nWhich?<assistant>"[ids[start] : ids[stop]]
    assert inside in "One fact. Two facts." and len(inside) > len("One fact. Two facts.") - 5


@torch.inference_mode()
def test_answers_are_greedy_and_end_with_the_stop():
    language = small_llama()
    prompts = [torch.randn(n, 32) for n in (7, 12, 9)]
    answers = greedy(language, prompts, stop=-1, longest=9)
    for x, answer in zip(prompts, answers, strict=True):
        whole = torch.cat((x, language.model.embed_tokens(torch.tensor(answer[:-1]))))
        logits = language.logits(language.prefill(whole[None]))[0, len(x) - 1 :]
        assert len(answer) == 9 and logits.argmax(-1).tolist() == answer
    stop = answers[1][3]
    ended = greedy(language, prompts, stop=stop, longest=9)
    assert ended == [a[: a.index(stop) + 1] if stop in a else a for a in answers]


def test_the_whole_goes_on_where_it_was_cut_off(tmp_path, monkeypatch, capsys):
    language, args = small_llama(), arguments(tmp_path)
    witness.witness(language, Stub(), args)
    table = (tmp_path / "witness.md").read_text()
    assert (
        "3 steps over 20 prompts" in table
        and table in capsys.readouterr().out
        and (tmp_path / "witness.png").stat().st_size > 10_000
    )
    with open(tmp_path / "witness.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    names = list(dict.fromkeys(row["ranked by"] for row in rows))
    assert len(names) == 17 and len(rows) == 2 * 17 * 3
    lines = (tmp_path / "fidelity.jsonl").read_text().splitlines()
    assert len(lines) == 6
    partial_line = json.loads(lines[3])
    del partial_line["results"]["grid@0.3"]  # of an earlier version, without this method
    kept = [*lines[:3], json.dumps(partial_line)]
    (tmp_path / "fidelity.jsonl").write_text("\n".join(kept) + "\n" + lines[4][:50])  # killed while writing
    for name in ("greedy", "train_lookahead"):  # these stages are complete
        monkeypatch.setattr(witness, name, None)
    witness.witness(language, Stub(), args)
    assert (tmp_path / "witness.md").read_text() == table
    again = map(json.loads, (tmp_path / "fidelity.jsonl").read_text().splitlines())
    again = {line["passage"]: line for line in again}  # the last line of each counts
    assert [again[line["passage"]] for line in map(json.loads, lines)] == [json.loads(line) for line in lines]


def test_a_run_with_other_settings_is_another_run(tmp_path):
    """Rows trained with other settings must not be reused."""

    def same(args):
        return train_lookahead.same_settings(args.run, witness.settings_of(args))

    same(arguments(tmp_path))
    same(arguments(tmp_path, "--passages", "9"))  # does not affect the rows
    for more in (["--steps", "4"], ["--prompts", "21"], ["--rank", "3"], ["--seed", "1"]):
        assert "--prompts 20 --steps 3 --rows 2 --rank 2" in refusal(same, arguments(tmp_path, *more))


@torch.inference_mode()
def test_what_is_compared_is_pruned_as_said(tmp_path):
    """Text outside the passage stays; 'told' finds more of the answer's attention than any other method."""
    language = small_llama()
    prompt, span = witness.embedded(language, Stub(), 7, "colour")
    answer = greedy(language, [prompt], stop=-1, longest=6)[0]
    x = torch.cat((prompt, language.model.embed_tokens(torch.tensor(answer[:-1]))))
    rows, other = (witness.train_lookahead.Lookahead(language, 2, 2).requires_grad_(False) for _ in range(2))
    asked = Asked(language, x, len(prompt), [span], rows)
    attention, inside = [asked.attention_of_fed(i)[:, slice(*span)] for i in range(3)], span[1] - span[0]
    made = conditions({"last": (0.5, 0.4), "lookahead": (0.5, 0.4)}, other)
    found = {}
    for name, make in made.items():
        for f in RETENTIONS:
            method = make(asked, f, 1)
            _, keeps, _ = asked.cache(method)
            assert all(keep[:, : span[0]].all() and keep[:, span[1] :].all() for keep in keeps)
            if name.startswith("plphp"):  # a rate per layer
                continue
            count = {int(keep[:, slice(*span)].sum()) for keep in keeps}
            assert count == {2 * max(1, int(f * inside + 0.5))}, name
            held = [(a * k[:, slice(*span)]).sum() / a.sum() for a, k in zip(attention, keeps, strict=True)]
            found[name, f] = float(sum(held))
    for f in RETENTIONS:
        told = found.pop((witness.ORACLE, f))
        assert all(told >= other for (_, retention), other in found.items() if retention == f)

    def keeps(method):
        return torch.stack(asked.cache(method)[1])

    ranked = {name: keeps(made[name](asked, 0.3, 0)) for name in ("topk", witness.OWN, witness.OTHER)}
    assert ranked["topk"].equal(keeps(make_method("topk", 0.3)))
    asked.lookahead = other
    assert ranked[witness.OTHER].equal(keeps(make_method(witness.OWN, 0.3)))
    assert not ranked[witness.OWN].equal(ranked[witness.OTHER])


@torch.inference_mode()
def test_fitted_thresholds_make_as_many_layers_keep_more_as_less():
    language = small_llama()
    rows, keys = witness.train_lookahead.Lookahead(language, 2, 2), numbered(20, 0)
    for query, (alpha, beta) in witness.fit(language, Stub(), keys, rows).items():
        asked = [witness.asked_of(language, Stub(), key, [0], rows) for key in keys]
        gammas = torch.tensor([gammas_of(one, rows if query == "lookahead" else None) for one in asked])
        assert (gammas >= alpha).float().mean() == pytest.approx(1 / 3, abs=0.05)
        assert (gammas < beta).float().mean() == pytest.approx(1 / 3, abs=0.05)


@pytest.mark.parametrize(
    ("flags", "naming"),
    [(["--passages", "0"], "--passages"), (["--prompts", "19"], "--prompts"), (["--steps", "0"], "--steps")],
)
def test_mistakes_are_one_line(flags, naming, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        witness.main([*flags, "--run", str(tmp_path)])
    (line,) = capsys.readouterr().err.splitlines()
    assert left.value.code == 2 and line.startswith("error: ") and naming in line and "; " in line


def test_it_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(witness, "PACKAGE", "no_such_package")
    with pytest.raises(SystemExit) as left:
        witness.main(["--run", str(tmp_path)])
    (line,) = capsys.readouterr().err.splitlines()
    assert left.value.code == 2 and "no_such_package" in line and "requirements-witness.txt" in line


@pytest.mark.parametrize("off", [0.0, 0.01])
def test_logits_that_are_not_those_of_transformers_are_refused(tmp_path, off):
    """With a stand-in for transformers whose logits equal ours, or almost."""
    fields = {
        "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
    }  # fmt: skip
    ours = Llama(TextConfig(**fields, rope_theta=5e4), tied=True)

    class Theirs:
        config = SimpleNamespace(**fields, rope_parameters={"rope_theta": 5e4})
        from_pretrained = classmethod(lambda cls, folder, gguf_file, dtype: cls())
        eval = lambda self: self  # noqa: E731
        state_dict = staticmethod(ours.state_dict)

        def __call__(self, input_ids):
            return SimpleNamespace(logits=ours.logits(ours.prefill(ours.model.embed_tokens(input_ids))) + off)

    files = tmp_path / "weights.safetensors", tmp_path / "config.json"
    convert = partial(witness.convert, SimpleNamespace(AutoModelForCausalLM=Theirs), tmp_path, Characters(), *files)
    if off:
        assert "differ from transformers by 1.0e-02" in refusal(convert)
        assert not any(path.exists() for path in files)
        return
    convert()
    config = TextConfig(**json.loads(files[1].read_text()))
    assert config == ours.config and load_file(files[0]).keys() == dict(ours.named_parameters()).keys()
