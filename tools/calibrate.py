"""Find PLPHP's thresholds and rates, G-Search's schedule or YOPO's heads for a model, from a few pictures and prompts.

    python tools/calibrate.py --model DIR --image a.png b.png --prompt "Describe the picture." --out plphp.json
    python run.py --model DIR --image x.png --prompt "..." --prune plphp --set @plphp.json
    python tools/calibrate.py --scenes 40 --retention 0.5 --out assets/demo/plphp.json    # for the demo model
    python tools/calibrate.py --rates-only ...       # leave skip, window and values as they are
    python tools/calibrate.py schedule --scenes 40 --retention 0.5 --out assets/demo/g-search.json
    python tools/calibrate.py heads --scenes 40 --retention 0.5 --out assets/demo/yopo.json

The attention that each layer pays to pictures differs between models, so no fixed alpha and beta fit all of them. This
prints its distribution, then tries some 170 settings (14 with --rates-only), including look-ahead rows where the
model has them (tools/train_lookahead.py). For each setting, r is solved so that the wanted fraction is kept on average.
The setting closest to the unpruned model (KL along the unpruned answers) is written to --out, with the share of the
budget on a grid (cover) that is best over the retentions 0.5, 0.3 and 0.15.

With `schedule` it prints how alike neighbouring layers rank the vision tokens, the premise of G-Search. It chooses the
shape of the sigmoid that is closest to the unpruned model at --retention. Then it searches the least fraction of the
tokens in each layer, from shallow to deep, with which KL stays below --tolerance. Both are written to --out.

With `heads` it measures how much each head looks at the pictures: attention to them divided by attention to the text.
--out gets for each head the ratio that it reaches in more than 40 % of the prompts, and the threshold that keeps the
wanted fraction. The KLs that it prints are for your judgement; they choose nothing.

A file plphp.json, plphp-ada.json, g-search.json or yopo.json in a model's folder sets its method's defaults.
"""

import dataclasses
import itertools
import statistics
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model import Generation, InputError, Sampling, load  # noqa: E402
from model.console import note  # noqa: E402
from model.flags import choose_device  # noqa: E402
from model.pruning import make_method  # noqa: E402
from model.pruning.plphp import Plphp  # noqa: E402
from tools import scenes  # noqa: E402
from tools.command import as_command, exit_code, flags, model_flags, number, one_of, write_json  # noqa: E402
from tools.evaluation.heads import ratios, table_of, threshold_of  # noqa: E402
from tools.evaluation.replay import Asked, asked_by, compare, gammas_of, replay  # noqa: E402
from tools.evaluation.runs import progress  # noqa: E402
from tools.evaluation.schedule import AGREE, agreements, search, shapes  # noqa: E402
from tools.train_demo import held_out_questions  # noqa: E402

QUANTILES = ((0.33, 0.67), (0.5, 0.5), (0.25, 0.5), (0.5, 0.75))  # of gamma, tried as (beta, alpha)
SPREADS = (0.1, 0.2, 0.3)  # dr
RANKINGS = {  # settings that rank tokens, for each query
    "last": [{"window": window, "values": values} for window in (1, 32) for values in (False, True)],
    "lookahead": [{"query": "lookahead", "cover": cover} for cover in (0.0, 0.5)],
}
COVERS = (0.0, 0.25, 0.5, 0.75)  # share of a budget on a grid, tried last, for the best setting
BUDGETS = (0.5, 0.3, 0.15)  # at these retentions


@dataclasses.dataclass
class Sample:
    """One prompt, its unpruned answer, and gamma of every layer for each kind of query."""

    asked: Asked
    ids: list
    gammas: dict  # {"last": [...]}, and "lookahead" if the checkpoint has look-ahead rows


def sample(checkpoint, prompt, images, longest):
    """Answer a prompt without pruning and measure gamma. None if the answer has a single token."""
    generation = Generation(checkpoint, prompt, images, Sampling(longest))
    "".join(generation)
    asked = asked_by(generation, generation.token_ids[:-1])
    gammas = {"last": gammas_of(asked)}
    if checkpoint.lookahead is not None:
        gammas["lookahead"] = gammas_of(asked, checkpoint.lookahead)
    return Sample(asked, generation.token_ids, gammas) if len(generation.token_ids) > 1 else None


def candidates(samples, retention, wide=True):
    """Settings of PLPHP that keep the wanted fraction of these samples, or as close to it as any r gets.

    Each has alpha, beta, r and dr; if wide, also skip, and either window and values or query and cover. The thresholds
    of the first are not fitted.
    """
    layers = len(samples[0].asked.layers)
    usual = 1 if layers < 12 else 2
    for query, skip in itertools.product(samples[0].gammas, (usual, 0)) if wide else [("last", usual)]:
        gammas = [s.gammas[query][skip:] for s in samples]
        ordered = sorted(g for row in gammas for g in row)
        at = {p: round(ordered[int(p * (len(ordered) - 1))], 4) for pair in QUANTILES for p in pair}
        tried = [(Plphp.alpha, Plphp.beta, Plphp.dr), (at[0.67], at[0.33], 0.0)]  # dr 0: thresholds have no effect
        tried += [(at[high], at[low], dr) for low, high in QUANTILES for dr in SPREADS]
        for alpha, beta, dr in tried:
            r = solve(gammas, skip, layers, alpha, beta, dr, retention)
            found = {"r": r, "dr": dr, "alpha": alpha, "beta": beta}
            if not wide:
                yield found
                continue
            for ranking in RANKINGS[query]:
                yield found | {"skip": skip} | ranking


def solve(gammas, skip, layers, alpha, beta, dr, retention):
    """Find by bisection the r whose clamped rates, unpruned layers included, have the mean `retention`."""

    def kept(r):
        method = make_method(f"plphp:r={r},dr={dr},alpha={alpha},beta={beta}").rule
        rates = [method.rate(g) for row in gammas for g in row]
        return (skip + (layers - skip) * statistics.mean(rates)) / layers

    low, high = 0.0, 1.0
    for _ in range(20):
        r = (low + high) / 2
        low, high = (r, high) if kept(r) < retention else (low, r)
    return round(high, 4)


@torch.inference_mode()
def judge(samples, method_name, tried, batch=32, what=None):
    """For each of the settings: (KL to the unpruned model, mean over steps; fraction kept; error).

    The first step counts only for methods that can change it. error: standard error of the fraction kept, over the
    samples. what: the title of the progress.
    """
    sums, kept, steps = [0.0] * len(tried), [[] for _ in tried], 0
    methods = [make_method(method_name, settings=settings) for settings in tried]
    first = 0 if methods[0].narrows else 1
    for s in progress(samples, f"{what or f'{len(tried)} settings'}, prompts"):
        for start in range(0, len(methods), batch):
            logits, shares, _ = replay(s.asked, methods[start : start + batch])
            for i, (pruned, share) in enumerate(zip(logits, shares, strict=True), start):
                sums[i] += compare(s.asked.logits[first:], pruned[first:], s.ids[first:])["kl"].sum().item()
                kept[i].append(share)
        steps += len(s.ids) - first
    error = [statistics.pstdev(shares) / len(shares) ** 0.5 for shares in kept]
    return [(total / steps, statistics.mean(k), e) for total, k, e in zip(sums, kept, error, strict=True)]


def distribution(samples):
    """Table: minimum, quartiles and maximum of each layer's gamma over the samples."""
    lines = [
        "gamma: attention of the prompt's last row to pictures",
        "layer     min     25 %  median     75 %     max",
    ]
    for layer in range(len(samples[0].asked.layers)):
        values = sorted(s.gammas["last"][layer] for s in samples)
        cut = [values[round(p * (len(values) - 1))] for p in (0, 0.25, 0.5, 0.75, 1)]
        lines.append(f"{layer:5d}" + "".join(f"  {v:6.3f}" for v in cut))
    return "\n".join(lines)


def samples_of(args, checkpoint):
    """Samples from the given pictures and prompts, or from scenes of the demo world that the tables do not use."""
    if args.scenes:
        asked = []
        for number in range(args.scenes):
            drawn, questions = held_out_questions(number, False, False, 0)
            asked += [(q.question, [scenes.draw_scene(s) for s in drawn]) for q in questions]
    else:
        asked = [(prompt, [image]) for image in args.image for prompt in args.prompt]
    with torch.inference_mode():
        found = [sample(checkpoint, *one, args.max_new_tokens) for one in progress(asked, "unpruned answers")]
    if not any(found):
        raise InputError("every answer has one token and pruning cannot change it; give prompts with longer answers")
    return list(filter(None, found))


def rank(tried, results, retention):
    """Indices of the settings that reliably keep the wanted fraction, best first. results: of `judge`.

    KLs that are equal to three digits differ by chance. Among those the smallest dr comes first, then the smallest
    skip: only if all layers keep the same fraction is another --retention followed exactly.
    """
    judged = enumerate(results[: len(tried)])
    near = [i for i, (_, kept, error) in judged if abs(kept - retention) < 0.02 and error < 0.01]
    return sorted(near, key=lambda i: (round(results[i][0], 3), tried[i]["dr"], tried[i].get("skip", 0), results[i][0]))


def choose_cover(samples, method_name, found):
    """The share of each budget that goes to a grid: of COVERS the smallest whose KL, mean over BUDGETS, is within 0.001
    of the least. Prints all KLs.

    found: the other settings. A small retention decides, because a large one loses little whatever is dropped.
    """
    rest = {name: value for name, value in found.items() if name != "r"}  # --retention replaces r
    tried = [rest | {"retention": budget, "cover": cover} for budget in BUDGETS for cover in COVERS]
    kls = [kl for kl, _, _ in judge(samples, method_name, tried)]
    by_budget = [kls[i : i + len(COVERS)] for i in range(0, len(kls), len(COVERS))]
    print("\nKL by share of the budget on a grid\nretention" + "".join(f"  cover {cover:<4}" for cover in COVERS))
    for budget, row in zip(BUDGETS, by_budget, strict=True):
        print(f"{budget:9}" + "".join(f"  {kl:10.4f}" for kl in row))
    means = [statistics.mean(column) for column in zip(*by_budget, strict=True)]
    return next(cover for cover, mean in zip(COVERS, means, strict=True) if mean <= min(means) + 0.001)


def find_heads(args, samples):
    """The settings of `model.pruning.yopo.Yopo`: a table of heads and a threshold. Prints the table, and KLs at the
    retention and at BUDGETS."""
    found = table_of(torch.stack([ratios(s.asked) for s in samples]))
    heads = [[float(f"{ratio:.4g}") for ratio in row] for row in found.tolist()]
    skip = 1 if len(heads) < 12 else 2
    table, kv_heads = torch.tensor(heads, dtype=torch.float64), samples[0].asked.kv_heads
    threshold = round(threshold_of(table, kv_heads, skip, args.retention), 6)
    print("attention to pictures / attention to text, by query head; YOPO prunes the smallest\nlayer")
    for layer, row in enumerate(heads):
        print(f"{layer:5d}" + "".join(f" {ratio:8.3g}" for ratio in row))
    tried = [{"threshold": threshold}, *({"retention": budget} for budget in BUDGETS)]
    tried = [one | more for one in tried for more in ({}, {"prefill": False})]
    results = judge(samples, "yopo", [{"heads": heads} | settings for settings in tried])
    print("\n     KL    kept  settings")
    for settings, (kl, kept, _) in zip(tried, results, strict=True):
        print(f"{kl:7.4f}  {100 * kept:4.1f} %  {settings}")
    return {"heads": heads, "threshold": threshold}


def find_rates(args, samples):
    """PLPHP's settings for these samples. Prints what was tried. InputError if none keeps the wanted fraction."""
    print(distribution(samples), end="\n\n")
    tried = list(candidates(samples, args.retention, not args.rates_only))
    fixed = {"retention": args.retention}
    results = judge(samples, args.method, [*tried, fixed])
    ranked = rank(tried, results, args.retention)
    if not ranked:
        raise InputError(
            f"no setting keeps {args.retention} of these prompts; give another --retention or more prompts"
        )
    print("     KL    kept  settings")
    for i in [*ranked[:5], 0, len(tried)]:
        what = f"{tried[i]}" if i < len(tried) else f"--retention {args.retention} without calibration"
        print(
            f"{results[i][0]:7.4f}  {100 * results[i][1]:4.1f} %  {what}{' (thresholds not fitted)' if i == 0 else ''}"
        )
    found = tried[ranked[0]]
    if not args.rates_only:
        found = found | {"cover": choose_cover(samples, args.method, found)}
    print(f"\nchosen: {found}")
    return found


def find_schedule(args, samples):
    """The settings of `model.pruning.gsearch.GSearch`. Prints the premise, sigmoids and the least fractions."""
    layers = len(samples[0].asked.layers)
    print("Kendall's tau of the rankings of neighbouring layers, mean over prompts and pictures")
    taus = [statistics.mean(column) for column in zip(*(agreements(s.asked) for s in samples), strict=True)]
    print("layers  " + "  ".join(f"{i}-{i + 1}: {tau:.2f}" for i, tau in enumerate(taus)))
    low = [f"{i}-{i + 1}" for i, tau in enumerate(taus) if i and tau < AGREE]
    if low:
        note(f"the layers {', '.join(low)} agree less than {AGREE}, so tokens that a later layer needs may be dropped")

    tried = list(shapes(layers, args.retention, samples[0].gammas))
    judged = judge(samples, "g-search", [found | {"retention": args.retention} for found in tried])
    order = sorted(range(len(tried)), key=lambda i: judged[i][0])
    flat = [i for i, found in enumerate(tried) if not found["steepness"]]
    print(f"\n     KL    kept  sigmoid with a retention of {args.retention}")
    for i in dict.fromkeys([*order[:5], *flat]):
        print(f"{judged[i][0]:7.4f}  {100 * judged[i][1]:4.1f} %  {tried[i]}")
    shape = tried[order[0]]

    def loss(fractions):
        layer = max(i for i, fraction in enumerate(fractions) if i == 0 or fraction < fractions[i - 1])
        what = f"layer {layer} of {layers - 1} with {fractions[layer]:.3f}"
        return judge(samples, "g-search", [{"schedule": fractions, "query": shape["query"]}], what=what)[0][0]

    schedule = search(loss, layers, args.tolerance)
    mean, found = statistics.mean(schedule), {"schedule": schedule, "query": shape["query"]}
    (kl, *_), (other, *_) = judge(samples, "g-search", [found, shape | {"retention": mean}])
    print(f"\nleast fractions with a KL of {args.tolerance} or less: {schedule}")
    print(f"They keep {100 * mean:.1f} % with a KL of {kl:.4f}; the sigmoid with this retention has {other:.4f}.")
    return found | shape


STAGES = {"plphp": find_rates, "schedule": find_schedule, "heads": find_heads}
OUT = {"plphp": "plphp.json", "schedule": "g-search.json", "heads": "yopo.json"}


@torch.inference_mode()
def calibrate(args):
    found = STAGES[args.stage](args, samples_of(args, load(args.model, args.dtype, choose_device(args.device))))
    write_json(args.out, found)
    print(f"wrote {args.out}", file=sys.stderr)


def main(argv=None):
    p = model_flags(flags(__doc__))
    # fmt: off
    p.add_argument("stage", nargs="?", choices=STAGES, default="plphp", help="what to find (default plphp)")
    p.add_argument("--image", nargs="+", default=[], metavar="PATH", help="pictures; each gets every prompt")
    p.add_argument("--prompt", nargs="+", metavar="TEXT", help="questions (default: Describe the picture.)")
    p.add_argument("--scenes", type=number(int, 1), metavar="N", help="use N scenes of the demo world instead")
    p.add_argument("--retention", type=number(float, 0, 1, open_low=True), default=0.5, metavar="F",
                   help="fraction to keep (default 0.5)")
    p.add_argument("--rates-only", action="store_true", help="fit only alpha, beta, r and dr")
    p.add_argument("--method", default="plphp", type=one_of("plphp", "plphp-ada"), metavar="NAME",
                   help="%(type)s (default plphp)")
    p.add_argument("--tolerance", type=number(float, 0, 100, open_low=True), metavar="KL",
                   help="schedule: nats per token that the least fractions may lose (default 0.02)")
    p.add_argument("--out", metavar="FILE", help=f"(default {' or '.join(OUT.values())})")
    p.add_argument("--max-new-tokens", type=number(int, 2), default=64, metavar="N", help="(default 64)")
    # fmt: on
    args = p.parse_args(argv)
    if bool(args.image) == bool(args.scenes) or (args.scenes and args.prompt):
        p.error("give either --image with --prompt, or --scenes")
    if args.stage != "plphp" and (args.rates_only or args.method != "plphp"):
        p.error(f"{args.stage} finds the settings of {OUT[args.stage][:-5]}; leave out --rates-only and --method")
    if args.stage != "schedule" and args.tolerance is not None:
        p.error("--tolerance is of the stage schedule; leave it out")
    args.tolerance, args.out = args.tolerance or 0.02, args.out or OUT[args.stage]
    args.prompt = args.prompt or ["Describe the picture."]
    return exit_code(calibrate, args, interrupted="interrupted; nothing was written")


if __name__ == "__main__":
    sys.exit(as_command(main))
