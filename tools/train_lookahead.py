"""Train look-ahead rows for a checkpoint: the query is learned, the model stays frozen.

    python tools/train_lookahead.py --model DIR --questions q.jsonl --image-folder pictures
    python tools/train_lookahead.py                     # the demo, on fresh scenes of its world
    python tools/train_lookahead.py --model DIR --plan  # memory and time on one GPU, from arithmetic

The frozen model runs once over each prompt followed by its own greedy answer, without gradients. The target is the
attention of the answer's rows, per layer and KV head: a distribution over the vision tokens plus one bin for everything
else. The m look-ahead rows appended to the prompt learn the same attention. The loss is KL(target || rows), averaged
over layers, heads and prompts. Runs resume from --run; --out is the file that `--prune plphp` uses.
"""

import hashlib
import json
import random
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model import Generation, InputError, Sampling, load, open_checkpoint  # noqa: E402
from model.flags import DEMO, choose_device  # noqa: E402
from model.llama import rope_table  # noqa: E402
from model.lookahead import FILE, Lookahead, describe_model, weights_sample  # noqa: E402
from model.questions import read_questions  # noqa: E402
from tools import scenes  # noqa: E402
from tools.command import as_command, exit_code, flags, model_flags, number  # noqa: E402
from tools.evaluate import conversation, encode_scenes  # noqa: E402
from tools.evaluation.runs import Lines, progress  # noqa: E402
from tools.train_demo import HELD_OUT, Run, precision, rate_at  # noqa: E402

SCENES = HELD_OUT // 2  # first scene; the demo's training and the tables use none from here on
BUDGETS = (0.5, 0.15)  # fractions kept for which recall is reported


@dataclass
class Example:
    """A prompt of T embedded tokens with spans of vision tokens, followed by the model's own answer."""

    x: torch.Tensor  # (T + F, C): the prompt, and all answer tokens but the last
    prompt: int  # T
    spans: list  # [(start, stop)] of the vision tokens
    answer: list  # F + 1 ids
    opening: int = 0  # tokens up to the end of the pictures; computed once for all questions about them
    pictures: object = None  # key of the pictures; None: the opening is not shared
    evidence: list | None = None  # rows of x that show what the answer is about; None: unknown
    own: bool = False  # the answer is known to be the model's own; else `freeze` checks


@dataclass
class Frozen:
    """What the frozen model computed for B examples; no gradients.

    Columns: P of the longest opening, then M of the longest rest; padding is masked.

    k, v       per layer (B, Hkv, N, D), N = P + M
    target     per layer (B, Hkv, N + 1): the answer's attention to each vision token, and to everything else (last bin)
    seen       (B, N) bool: the prompt's tokens
    vision     (B, N) bool: the prompt's vision tokens
    evidence   (B, N) bool: the tokens that show what the answer is about; all False where unknown
    length     (B, 1): T
    own        share of the given answers that the model itself gives
    """

    k: list
    v: list
    target: list
    seen: torch.Tensor
    vision: torch.Tensor
    evidence: torch.Tensor
    length: torch.Tensor
    own: float


@torch.no_grad()
def freeze(language, examples):
    """Run the frozen model over examples. Returns Frozen of those whose answer equals the model's greedy answer."""
    device = examples[0].x.device
    keys = [i if e.pictures is None else (e.pictures, e.opening) for i, e in enumerate(examples)]
    openings = {key: e.x[: e.opening] for key, e in zip(keys, examples, strict=True)}
    which = [list(openings).index(key) for key in keys]
    first = padded(openings.values())  # (n, P, C); no row attends to the padding at the end
    past = []

    def listen(layer, q, k, v, *_):
        past.append((k[which], v[which]))
        return None, None

    language.prefill(first, prune=listen)
    rest = padded([e.x[e.opening :] for e in examples])  # (B, M, C)

    start = torch.tensor([[e.opening] for e in examples], device=device)
    length = torch.tensor([[e.prompt] for e in examples], device=device)
    end = torch.tensor([[len(e.x)] for e in examples], device=device)
    here = torch.arange(rest.shape[1], device=device).expand(len(examples), -1)
    before = torch.arange(first.shape[1], device=device).expand(len(examples), -1)
    # positions in the prompt, (B, N); -1: padding
    position = torch.cat((before.where(before < start, -1), (start + here).where(start + here < end, -1)), 1)
    seen, fed = (position >= 0) & (position < length), (position >= length)[:, first.shape[1] :]
    vision = sum_of_spans(position, [e.spans for e in examples])
    evidence = sum_of_spans(position, [[(row, row + 1) for row in e.evidence or ()] for e in examples])
    causal = torch.ones(rest.shape[1], rest.shape[1], dtype=torch.bool, device=device).tril()
    allowed = torch.cat(((before < start)[:, None].expand(-1, len(causal), -1), causal.expand(len(which), -1, -1)), 2)

    layers = []

    def look(q, k, v):  # q is freed after each layer
        layers.append((k, v, answer_attention(q, k, fed, vision, allowed)))

    hidden = behind(language, rest, start + here, allowed, past, look)
    own = _own(language, hidden, examples)
    k, v, target = ([t[own] for t in parts] for parts in zip(*layers, strict=True))
    return Frozen(k, v, target, seen[own], vision[own], evidence[own], length[own], own.float().mean().item())


def behind(language, x, positions, allowed, past, look, adapters=None):
    """Run rows x (B, M, C) after the keys and values in `past` -> final hidden states (B, M, C).

    positions (B, M); allowed (B, M, N) bool over the past columns and the new ones; past: per layer k and v
    (B, Hkv, P, D); look(q, k, v) is called after each layer with all N rows of k and v; adapters: one per layer.
    """
    rope = rope_table(positions, language.config, x.dtype)
    for i, (layer, pair) in enumerate(zip(language.model.layers, past, strict=True)):
        x, q, k, v = layer.prefill(x, rope, allowed[:, None], adapters and adapters[i], pair)
        look(q, k, v)
    return language.model.norm(x)


def padded(rows):
    """(n, C) each -> (B, longest, C)."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


def sum_of_spans(position, spans):
    """(B, N) bool: positions within the spans [(start, stop), ...] of each example."""
    masks = [sum(((row >= a) & (row < b) for a, b in own), row < -1) for row, own in zip(position, spans, strict=True)]
    return torch.stack(masks)


def _own(language, hidden, examples):
    """(B,) bool: is each token of the answer the model's most likely one, so that greedy decoding gives this answer?"""
    rows = [hidden[i, e.prompt - 1 - e.opening : len(e.x) - e.opening] for i, e in enumerate(examples)]
    said = language.logits(torch.cat(rows)).argmax(-1).split([len(r) for r in rows])
    own = [e.own or s.tolist() == e.answer for s, e in zip(said, examples, strict=True)]
    return torch.tensor(own, device=hidden.device)


def answer_attention(q, k, fed, vision, allowed):
    """Attention of answer rows, mean over rows and group: (B, Hkv, N + 1) fp32; last bin: all but vision tokens.

    q (B, Hq, M, D), k (B, Hkv, N, D); fed (B, M) bool: the answer's rows; vision (B, N) bool; allowed (B, M, N) bool.
    """
    count = int(fed.sum(1).max())
    rows = fed.float().topk(count, dim=1).indices  # (B, W); filled with other rows where the answer is shorter
    real = fed.gather(1, rows)  # (B, W)
    q = q.gather(2, rows[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))
    allowed = allowed.gather(1, rows[..., None].expand(-1, -1, allowed.shape[2]))
    return to_bins(attention(q, k, allowed), real, vision)


def attention(q, k, allowed):
    """Softmax over keys: q (B, Hq, W, D), k (B, Hkv, N, D), allowed (B, W, N) bool -> (B, Hkv, G, W, N) fp32."""
    with torch.autocast(q.device.type, enabled=False):  # bf16 is too coarse for a target
        q = q.unflatten(1, (k.shape[1], -1)).float()
        scores = torch.einsum("bhgwd,bhnd->bhgwn", q, k.float()) * q.shape[-1] ** -0.5
        return scores.masked_fill(~allowed[:, None, None], float("-inf")).softmax(-1)


def to_bins(p, real, vision):
    """p (B, Hkv, G, W, N'), mean over the group and the rows where `real` (B, W) is True -> (B, Hkv, N + 1).

    The first N columns are 0 where `vision` (B, N) is False; the last is the mass of all other keys.
    """
    weight = real.float() / real.sum(1, keepdim=True)
    p = (p.mean(2) * weight[:, None, :, None]).sum(2)
    shown = p[..., : vision.shape[1]] * vision[:, None]
    return torch.cat((shown, 1 - shown.sum(-1, keepdim=True)), -1)


def predict(language, lookahead, frozen):
    """Attention of the look-ahead rows: per layer (B, Hkv, N + 1), same layout as the targets. With gradients."""
    (b, m), device = (len(frozen.seen), lookahead.rows), frozen.seen.device
    own = torch.ones(m, m, dtype=torch.bool, device=device).tril().expand(b, -1, -1)
    allowed = torch.cat((frozen.seen[:, None].expand(-1, m, -1), own), 2)  # (B, m, N + m)
    real, found = torch.ones(b, m, dtype=torch.bool, device=device), []
    x, positions = lookahead.embeddings.expand(b, -1, -1), frozen.length + torch.arange(m, device=device)
    past = list(zip(frozen.k, frozen.v, strict=True))

    def look(q, k, v):
        found.append(to_bins(attention(q, k, allowed), real, frozen.vision))

    behind(language, x, positions, allowed, past, look, lookahead.layers)
    return found


def divergence(target, predicted):
    """KL(target || predicted), (B, Hkv) nats; both (B, Hkv, N + 1)."""
    tiny = torch.finfo(torch.float32).tiny
    return (target * (target.clamp(min=tiny).log() - predicted.clamp(min=tiny).log())).sum(-1)


def loss_of(language, lookahead, frozen):
    """Mean KL over prompts, layers and heads, with gradients, and the predictions, detached."""
    predicted = predict(language, lookahead, frozen)
    pairs = zip(frozen.target, predicted, strict=True)
    return sum(divergence(t, p).mean() for t, p in pairs) / len(predicted), [p.detach() for p in predicted]


def recalls(frozen, predicted):
    """What top-k by the prediction keeps: {name: fraction}, means over prompts, layers and heads.

    attention: of the answer's attention to vision tokens; best: the most any top-k can keep of it; evidence: of the
    evidence, None where it is unknown.
    """
    found = {}
    for budget in BUDGETS:
        kept, best, shown = [], [], []
        for target, score in zip(frozen.target, predicted, strict=True):
            attended, order = target[..., :-1], score[..., :-1].masked_fill(~frozen.vision[:, None], -1)
            count = (budget * frozen.vision.sum(1) + 0.5).long().clamp(min=1)[:, None, None]
            first = torch.arange(attended.shape[-1], device=attended.device) < count  # (B, 1, N)
            whole = attended.sum(-1)
            best.append((attended.sort(-1, descending=True).values * first).sum(-1) / whole)
            rank = order.sort(dim=-1, descending=True, stable=True).indices
            kept.append((attended.gather(-1, rank) * first).sum(-1) / whole)
            evidence = frozen.evidence[:, None].expand_as(rank)
            known = frozen.evidence.any(1)
            shown.append(((evidence.gather(-1, rank) & first).sum(-1) / evidence.sum(-1).clamp(min=1))[known])
        found |= {
            f"attention@{budget}": torch.stack(kept).mean().item(),
            f"best@{budget}": torch.stack(best).mean().item(),
        }
        found[f"evidence@{budget}"] = torch.stack(shown).mean().item() if shown[0].numel() else None
    return found


# ---------------------------------------------------------------- sources of prompts


def example(checkpoint, ids, image_tokens, answer, pictures, evidence=None):
    """Example from token ids, image tokens (P, C) of each picture, the answer's ids, and patches per picture."""
    with torch.no_grad():
        x, spans = checkpoint.model.splice([*ids, *answer[:-1]], image_tokens)
    rows = None
    if evidence is not None:
        rows = [start + patch for (start, _), patches in zip(spans, evidence, strict=True) for patch in patches]
    return Example(x, len(x) - len(answer) + 1, spans, answer, spans[-1][1], pictures, rows)


class SceneSource:
    """New scenes of the demo world for every step; every fifth step has pairs of pictures.

    The answers come from the world; `freeze` drops those that the model would not give.
    """

    def __init__(self, checkpoint, pictures, seed, leave_out=()):
        self.checkpoint, self.pictures, self.seed, self.leave_out = checkpoint, pictures, seed, leave_out

    def batch(self, step):
        """The examples of a step; negative steps are held out."""
        pair, examples = step % 5 == 4, []
        for i in range(self.pictures // 2 if pair else self.pictures):
            scene = SCENES + (self.seed * 1_000_000 + step) * self.pictures + i
            drawn, questions = scenes.sample(scene, self._tasks(random.Random(scene), pair), pair)
            tokens = encode_scenes(self.checkpoint, drawn)
            for q in {q.question: q for q in questions}.values():
                ids, _, answer = conversation(self.checkpoint, q, None, len(drawn))
                examples.append(example(self.checkpoint, ids, tokens, answer, scene, q.evidence))
        return examples

    def _tasks(self, rng, pair):
        """Tasks for one picture: every one with long answers, and five of the others."""
        if pair:
            return "compare", "pair", "pair"
        always = [t for t in ("describe", "list", "spell") if t not in self.leave_out]
        return (*always, *rng.sample([t for t in scenes.ASKERS if t not in (*always, *self.leave_out)], 5))


class Prompts:
    """Prompts for training, in another order in each pass over them, and others that are held out."""

    def __init__(self, train, held, batch, seed, example):
        """train, held: lists; example: function of one of their items -> Example; batch: prompts in a step."""
        self.train, self.held, self.batch_size, self.seed, self.example = train, held, batch, seed, example

    def batch(self, step):
        """The examples of a step; negative steps are held out, and may have none."""
        if step < 0:
            items = self.held[(-1 - step) * self.batch_size :][: self.batch_size]
        else:
            count = min(self.batch_size, len(self.train))
            items = [self._item(step * self.batch_size + i) for i in range(count)]
        return [self.example(item) for item in items]

    def _item(self, position):
        """The item at a position in endless passes over the training items."""
        order, place = divmod(position, len(self.train))
        shuffled = [*self.train]
        random.Random(f"{self.seed} {order}").shuffle(shuffled)
        return shuffled[place]


def prompts_of_file(checkpoint, args):
    """Prompts from a file of questions, with the model's own greedy answers, computed first and stored in args.run."""
    folder = args.image_folder or Path(args.questions).parent
    asked = [(q, [folder / name for name in q.images]) for q in read_questions(args.questions) if q.images]
    if len(asked) < 10:
        raise InputError(f"{len(asked)} questions have pictures; give at least 10, preferably hundreds")
    answers = own_answers(checkpoint, asked, args.run / "answers.jsonl", args.max_new_tokens)
    usable = [i for i, ids in enumerate(answers) if len(ids) > 1]
    pictures = sorted({str(asked[i][1]) for i in usable})
    random.Random(args.seed).shuffle(pictures)
    held = set(pictures[: max(1, len(pictures) // 10)])  # split by picture: all its questions are held out
    train, rest = ([i for i in usable if (str(asked[i][1]) in held) == out] for out in (False, True))
    if not train:
        raise InputError("all questions are about one picture; give several, because some are held out")

    def example_of(i):
        question, images = asked[i]
        generation = Generation(checkpoint, question.text, images)
        # text before the pictures may differ between questions; then the opening is not shared
        place = generation.ids.index(checkpoint.config.image_token_index)
        same = *map(str, images), *generation.ids[:place]
        made = example(checkpoint, generation.ids, generation.encode_images(), answers[i], same)
        return replace(made, own=True)

    return Prompts(train, rest, args.batch, args.seed, example_of)


def own_answers(checkpoint, asked, path, longest):
    """The model's greedy answers as ids, the stop id included. `path` gets a line per answer; a rerun resumes there."""
    lines = Lines(path)
    for question, images in progress(asked[len(lines.values) :], "own answers"):
        generation = Generation(checkpoint, question.text, images, Sampling(longest))
        "".join(generation)
        stop = list(checkpoint.stop_ids[:1]) if generation.finish_reason == "stop" else []
        lines.add(generation.token_ids + stop)
    return lines.values


# ---------------------------------------------------------------- training


def same_settings(folder, settings):
    """Store the settings of a new run in its folder; InputError if a resumed run has other settings."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "settings.json"
    begun = json.loads(path.read_text(encoding="utf-8")) if path.exists() else settings
    other = {name: value for name, value in begun.items() if value != settings.get(name)}
    if other:
        files = {"model": "another model", "questions": "other questions"}  # these are stored as hashes
        words = (files.get(name) or f"--{name} {_words(value)}" for name, value in other.items())
        raise InputError(f"{folder} was started with {', '.join(words)}; give the same, or another --run")
    path.write_text(json.dumps(settings), encoding="utf-8")
    return settings


def _words(value):
    return " ".join(value) or "(none)" if isinstance(value, list) else value


def settings_of(language, args):
    """What the rows depend on, by flag; the model and the file of questions by hashes."""
    names = ("rows", "rank", "steps", "batch", "seed", "leave_out", "max_new_tokens")
    model = _hash(weights_sample(language).encode())
    questions = args.questions and _hash(Path(args.questions).read_bytes())
    given = {name.replace("_", "-"): getattr(args, name) for name in names}
    return {"model": model, "questions": questions} | given


def _hash(data):
    return hashlib.sha256(data).hexdigest()[:16]


def train(language, source, args):
    """Train rows for a `Llama`, resuming from args.run, and write args.out."""
    device = language.model.norm.weight.device
    torch.manual_seed(args.seed)
    lookahead = Lookahead(language, args.rows, args.rank).to(device)
    lookahead.embeddings.data += language.model.embed_tokens.weight.float().mean(0)  # start at the mean embedding
    groups = [
        {"params": [lookahead.embeddings], "peak": 3e-3},
        {"params": list(lookahead.layers.parameters()), "peak": 1e-3},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
    run = Run(args.run, "lookahead", args.steps, lookahead, optimizer)
    held = [batch for batch in (source.batch(-1 - i) for i in range(args.held_out)) if batch]
    learned = False  # since the last report
    while run.step < args.steps:
        loss, own = step(language, lookahead, source.batch(run.step), run)
        learned = learned or own > 0
        if run.step % args.report == 0 or run.step == args.steps:
            if not learned:
                raise InputError("no answer was the model's own, so nothing was learned; use --dtype fp32")
            learned = False
            run.save()
            run.log({"kl": loss, "own": own, **measure(language, lookahead, held)})
    write(lookahead, language, args)


def step(language, lookahead, examples, run):
    """One optimizer step -> (loss, share of answers that the model itself gives). Without such answers, no step."""
    with precision(examples[0].x.device, language.model.embed_tokens.weight.dtype):
        frozen = freeze(language, examples)
        if not frozen.own:
            run.step += 1
            return float("nan"), 0.0
        loss, _ = loss_of(language, lookahead, frozen)
    for group in run.optimizer.param_groups:
        group["lr"] = rate_at(run.step, run.steps, group["peak"], warmup=20, decay=0.6)
    run.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(lookahead.parameters(), 1.0)
    run.optimizer.step()
    run.step += 1
    return loss.item(), frozen.own


@torch.no_grad()
def measure(language, lookahead, held):
    """KL and recalls on held-out batches, means over batches."""
    rows = []
    for examples in held:
        with precision(examples[0].x.device, language.model.embed_tokens.weight.dtype):
            frozen = freeze(language, examples)
            if not frozen.own:
                continue
            loss, predicted = loss_of(language, lookahead, frozen)
        rows.append({"held-out kl": loss.item(), **recalls(frozen, predicted)})
    names = rows[0] if rows else ("held-out kl",)
    return {k: sum(r[k] for r in rows) / len(rows) if rows and rows[0][k] is not None else None for k in names}


def write(lookahead, language, args):
    """Write the file for a checkpoint's folder: fp32 tensors, and metadata that names the model."""
    about = describe_model(language, steps=args.steps, seed=args.seed)
    tensors = {name: t.detach().cpu().contiguous() for name, t in lookahead.state_dict().items()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, args.out, about)
    print(f"wrote {args.out}: {args.rows} rows, rank {args.rank}", file=sys.stderr)


def plan(checkpoint, args):
    """Memory and time of training on one GPU, computed from shapes, as text; the weights need not be loaded."""
    t, n, m, batch = checkpoint.config.text_config, args.tokens, args.rows, args.batch
    c, f, layers = t.hidden_size, t.intermediate_size, t.num_hidden_layers
    q, kv = t.num_attention_heads * t.head_dim, t.num_key_value_heads * t.head_dim
    weights = sum(p.numel() for p in checkpoint.model.language_model.parameters())
    pictures = sum(p.numel() for p in checkpoint.model.parameters()) - weights
    trained = m * c + layers * args.rank * (4 * c + 2 * q + 2 * kv + 3 * (c + f))
    held = 2 * 2 * layers * kv * n  # K and V in bf16: of the pictures, of the rest, and of the answers that teach
    graph = layers * m * (8 * t.num_attention_heads * n + 2 * (10 * c + 4 * f))
    rows = [
        ("frozen weights, bf16", 2 * weights),
        ("vision tower and projector, bf16", 2 * pictures),
        (f"look-ahead rows with Adam, fp32, {trained / 1e6:.1f} M numbers", 16 * trained),
        (f"K and V of {batch} prompts of {n} tokens, three times", 3 * held * batch),
        ("activations of the rows", graph * batch),
    ]
    flop = 2 * weights * n + 6 * weights * m + 2 * pictures * checkpoint.config.vision_config.num_patches
    hours = args.steps * batch * flop / (args.tflops * 1e12) / 3600
    answer = args.max_new_tokens * 2 * weights / (args.gbps * 1e9)  # each token reads all weights
    rows.append(("total", sum(size for _, size in rows)))
    lines = [f"{size / 1e9:9.2f} GB  {what}" for what, size in rows]
    lines.append(f"{hours:9.2f} h   {args.steps} steps at a sustained {args.tflops:g} TFLOP/s")
    lines.append(
        f"{1000 * answer / 3600:9.2f} h   to answer 1,000 questions first, {args.max_new_tokens} tokens each, at a "
        f"sustained {args.gbps:g} GB/s"
    )
    return "\n".join(lines)


def parser():
    p, whole, positive = model_flags(flags(__doc__)), number(int, 1), number(float, 0, open_low=True)
    # fmt: off
    p.add_argument("--questions", metavar="FILE.jsonl", help="question_id, image, text in each line")
    p.add_argument("--image-folder", type=Path, metavar="DIR", help="of the pictures (default: that of FILE)")
    p.add_argument("--rows", type=whole, default=8, metavar="N", help="look-ahead rows m (default 8)")
    p.add_argument("--rank", type=whole, default=16, metavar="N", help="rank of the adapters (default 16)")
    p.add_argument("--steps", type=whole, default=2000, metavar="N", help="(default 2000)")
    p.add_argument("--batch", type=whole, default=8, metavar="N",
                   help="pictures, or prompts of a file, per step (default 8)")
    p.add_argument("--held-out", type=whole, default=4, metavar="N", help="held-out batches to measure (default 4)")
    p.add_argument("--report", type=whole, default=50, metavar="N", help="steps per row of the curve (default 50)")
    p.add_argument("--leave-out", nargs="+", default=[], choices=tuple(scenes.ASKERS), metavar="TASK",
                   help=f"tasks to leave out: {', '.join(scenes.ASKERS)}")
    p.add_argument("--max-new-tokens", type=whole, default=64, metavar="N", help="longest answer to a question in FILE")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--run", type=Path, default=ROOT / "runs" / "lookahead", help="folder of checkpoint and curve")
    p.add_argument("--out", type=Path, help=f"(default: {FILE} in --run; copy it into the checkpoint's folder)")
    p.add_argument("--plan", action="store_true", help="print memory and time of a run on one GPU and exit")
    p.add_argument("--tokens", type=whole, default=700, help="for --plan: tokens of a prompt and its answer")
    p.add_argument("--tflops", type=positive, default=200.0, help="for --plan: sustained TFLOP/s (default 200)")
    p.add_argument("--gbps", type=positive, default=2000.0, help="for --plan: sustained GB/s (default 2000)")
    # fmt: on
    return p


def main(argv=None):
    args = parser().parse_args(argv)
    args.out = args.out or args.run / FILE
    done = f"interrupted; {args.run} holds what is done so far, the same command resumes"
    return exit_code(train_or_plan, args, interrupted=done)


def train_or_plan(args):
    if args.plan:
        print(plan(open_checkpoint(args.model), args))
        return
    checkpoint = load(args.model, args.dtype, choose_device(args.device))
    language = checkpoint.model.language_model
    same_settings(args.run, settings_of(language, args))
    train(language, source_of(checkpoint, args), args)


def source_of(checkpoint, args):
    """The Prompts or the SceneSource that the flags ask for."""
    if args.questions and args.leave_out:
        raise InputError("--leave-out is for the built-in scenes; leave those questions out of the file")
    if args.questions:
        return prompts_of_file(checkpoint, args)
    if checkpoint.folder.resolve() != DEMO.resolve():
        raise InputError("the built-in scenes fit only the demo model; give --questions FILE.jsonl")
    return SceneSource(checkpoint, args.batch, args.seed, args.leave_out)


if __name__ == "__main__":
    sys.exit(as_command(main))
