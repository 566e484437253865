"""tools/witness.py with a small random Llama and words as tokens; needs no downloaded weights."""

import csv
import json
import zlib
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import exit_code_of, refusal
from safetensors.torch import load_file

from model.config import TextConfig
from model.llama import Llama
from model.lookahead import Lookahead
from model.pruning import make_method
from tests.oracle import small_llama
from tools import train_lookahead, witness
from tools.evaluation.replay import gammas_of
from tools.witness import KINDS, LEFT_OUT, RETENTIONS, UNSEEN, Words, conditions, greedy, numbered, passage


class Stub:
    """A tokenizer with one token per word, 97 in all. Of a passage it takes every fourth word, for speed."""

    stop = 5

    def prompt(self, text, question):
        inside = text.split()[::4]
        ids = [6 + zlib.crc32(word.encode()) % 90 for word in ("user", *inside, *question.split(), "assistant")]
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
    assert "3 steps over 20 prompts" in table and table in capsys.readouterr().out
    assert (tmp_path / "witness.png").stat().st_size > 10_000
    with open(tmp_path / "witness.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({row["ranked by"] for row in rows}) == 17 and len(rows) == 2 * 17 * 3
    lines = (tmp_path / "fidelity.jsonl").read_text().splitlines()
    assert len(lines) == 6
    old = json.loads(lines[3])
    del old["results"]["grid@0.3"]  # of an earlier version, without this method
    kept = [*lines[:3], json.dumps(old)]
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

    def same(*more):
        args = arguments(tmp_path, *more)
        return train_lookahead.same_settings(args.run, witness.settings_of(args))

    same()
    same("--passages", "9")  # does not affect the rows
    for more, before in (
        (("--steps", "4"), "--steps 3"), (("--prompts", "21"), "--prompts 20"), (("--rank", "3"), "--rank 2"),
        (("--seed", "1"), "--seed 0"),
    ):  # fmt: skip
        assert f"was started with {before};" in refusal(same, *more)


@torch.inference_mode()
def test_what_is_compared_is_pruned_as_said():
    """Text outside the passage stays; the oracle finds more of the answer's attention than any other method."""
    language = small_llama()
    prompt, span = witness.embedded(language, Stub(), 7, "colour")
    answer = greedy(language, [prompt], stop=-1, longest=6)[0]
    rows, other = (Lookahead(language, 2, 2).requires_grad_(False) for _ in range(2))
    asked = witness.asked_of(language, Stub(), (7, "colour"), answer, rows)
    attention, inside = [asked.attention_of_fed(i)[:, slice(*span)] for i in range(3)], span[1] - span[0]
    made, found = conditions({"last": (0.5, 0.4), "lookahead": (0.5, 0.4)}, other), {}

    def keeps(method):
        return torch.stack(asked.cache(method)[1])

    for name, f in ((name, f) for name in made for f in RETENTIONS):
        keep = keeps(made[name](asked, f, 1))
        assert keep[..., : span[0]].all() and keep[..., span[1] :].all()
        keep = keep[..., slice(*span)]
        if not name.startswith("plphp"):  # which has a rate per layer
            assert (keep.sum((1, 2)) == 2 * max(1, int(f * inside + 0.5))).all(), name
            found[name, f] = sum(float((a * k).sum() / a.sum()) for a, k in zip(attention, keep, strict=True))
    assert all(found[witness.ORACLE, f] >= share for (_, f), share in found.items())
    own, without = (keeps(made[name](asked, 0.3, 0)) for name in (witness.OWN, witness.OTHER))
    assert keeps(made["topk"](asked, 0.3, 0)).equal(keeps(make_method("topk", 0.3))) and not own.equal(without)
    asked.lookahead = other
    assert without.equal(keeps(make_method(witness.OWN, 0.3)))


@torch.inference_mode()
def test_fitted_thresholds_make_as_many_layers_keep_more_as_less():
    language = small_llama()
    rows, keys = Lookahead(language, 2, 2), numbered(20, 0)
    for query, (alpha, beta) in witness.fit(language, Stub(), keys, rows).items():
        asked = [witness.asked_of(language, Stub(), key, [0], rows) for key in keys]
        gammas = torch.tensor([gammas_of(one, rows if query == "lookahead" else None) for one in asked])
        assert (gammas >= alpha).float().mean() == pytest.approx(1 / 3, abs=0.05)
        assert (gammas < beta).float().mean() == pytest.approx(1 / 3, abs=0.05)


def test_mistakes_are_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(witness, "PACKAGE", "no_such_package")
    for flags, words in (
        (["--passages", "0"], "--passages"), (["--prompts", "19"], "--prompts"), ([], "no_such_package"),
    ):  # fmt: skip
        assert exit_code_of(witness.main, [*flags, "--run", str(tmp_path)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and words in line and "; " in line


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
