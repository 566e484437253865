"""The figures of tools/evaluate.py, witness.py and train_demo.py, and how all figures look.

`python tools/tables.py --figures DIR` redraws the committed ones.
"""

import csv
import re
import textwrap

WIDTH = 7  # inches; a page shows a figure with about 800 pixels, where letters of 10 points then have 16, a phone 480
LETTERS = 10  # points
INKS = (  # dark enough for text; colour-blind readers can tell them apart by lightness, marker and dash
    ("#D55E00", "D", "-"), ("#0072B2", "s", "-"), ("#000000", "o", "--"), ("#00795A", "*", ":"), ("#B8509B", "v", "--"),
    ("#A06E00", "P", "-."), ("#882255", "^", "-"), ("#666666", "X", "-."),
)  # fmt: skip


def new(columns, height, **shared):
    """(figure, list of its axes side by side); height: of the figure in inches."""
    from matplotlib.figure import Figure  # a figure of its own: nothing global changes, nothing has to be closed

    figure = Figure(figsize=(WIDTH, height), dpi=180, layout="constrained")
    panels = figure.subplots(1, columns, squeeze=False, **shared)[0]
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        axes.title.set_size(LETTERS + 1)
    return figure, panels


# ---------------------------------------------------------------- what pruning costs


def costs(axes, lines, labelled):
    """Draw what is kept, from much to little, against what it costs.

    lines: {name: [(kept in %, cost, low, high)]}. labelled: {name: (label, ink)}; these lines have intervals, and their
    label at the end. The others are grey.
    """
    for name, points in lines.items():
        x, y, low, high = zip(*sorted(points, reverse=True), strict=True)
        if name not in labelled:
            axes.plot(x, y, color="0.75", linewidth=1, zorder=1)
            continue
        label, (colour, marker, dash) = labelled[name]
        spread = [[a - b for a, b in zip(y, low, strict=True)], [b - a for a, b in zip(y, high, strict=True)]]
        axes.errorbar(x, y, spread, color=colour, marker=marker, linestyle=dash, capsize=2, label=label)
    axes.invert_xaxis()
    axes.set_ylim(bottom=0)
    label_ends(axes, [(*min(lines[name])[:2], label, ink[0]) for name, (label, ink) in labelled.items()])
    grey = "; thin grey: the other rows of the table" if lines.keys() - labelled.keys() else ""
    axes.set_title(f"bars: 95 % intervals{grey}", fontsize=LETTERS, color="0.4")


def label_ends(axes, ends):
    """Write labels to the right of the axes, each at the height of its line's end or below the label above it.

    ends: [(x, y, label, colour)] of the last points of the lines.
    """
    to_share = axes.transData + axes.transAxes.inverted()
    line = 1.3 * LETTERS / 72 / (0.8 * axes.figure.get_figheight())  # height of a line of text, as a share of the axes
    free = 1.05
    for x, y, label, colour in sorted(ends, key=lambda end: -end[1]):
        text = textwrap.fill(label.replace(",", ", "), 30).replace(", ", ",")
        half = line * (1 + text.count("\n")) / 2
        middle = min(to_share.transform((x, y))[1], free - half)
        free = middle - half
        axes.annotate(
            text, (x, y), (1.05, middle), textcoords="axes fraction", color=colour, va="center", fontsize=LETTERS,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "relpos": (0, 0.5)},
        )  # fmt: skip


PRUNING = (  # conditions of tools/evaluate.py with a label, besides those of --methods
    "plphp as shipped", "topk ahead", "grid", "hindsight", "plphp ahead+grid", "random", "plphp", "none",
)  # fmt: skip


def pruning(rows, second=False):
    """Figure of the long answers that are wrong. rows: as in the CSV of tools/evaluate.py."""
    names = {row["method"]: row["label"].replace("`", "") for row in rows if row["label"]}
    lines = {name: [] for name in names}
    for row in rows:
        if row["method"] in names:
            wrong = [100 - float(row[column]) for column in ("long", "long high", "long low")]
            lines[row["method"]].append((float(row["kept"]), *wrong))
    kept = [float(row["kept"]) for row in rows if row["label"] and row["method"] != "none"] or [100]
    lines["none"] = [(x, *3 * [lines["none"][0][1]]) for x in (max(kept), min(kept))]  # a level line
    figure, (axes,) = new(1, 5)
    axes.set_yscale("symlog", linthresh=1, linscale=0.25)
    axes.set_ylim(top=120)
    axes.set_yticks([0, 1, 3, 10, 30, 100], ["0", "1", "3", "10", "30", "100"])
    axes.set(xlabel="vision KV bytes kept, %", ylabel="wrong long answers, % (log scale from 1 on)")
    given = [name for name in names if name.startswith("given: ")]
    inks = dict(zip(PRUNING, INKS, strict=True)) | {name: (f"C{i % 10}", "x", "-") for i, name in enumerate(given)}
    costs(axes, lines, {name: (names[name], ink) for name, ink in inks.items() if name in names})
    title = "Pruned for one question, asked another" if second else "What pruning costs the demo"
    figure.suptitle(title, fontsize=LETTERS + 1)
    return figure


WITNESS = (  # names of tools/witness.py, without PLPHP's fitted alpha and beta, with a label
    "plphp-ada:query=lookahead", "topk:query=lookahead", "random", "oracle: what the answer attends to",
    "plphp:query=lookahead", "shared:query=lookahead", "plphp", "topk:window=32,values=true",
)  # fmt: skip


def witness(rows):
    """Figure of the KL from the unpruned model. rows: as in the CSV of tools/witness.py."""
    lines, named = {}, {}
    for row in rows:
        if row["questions"] == "all kinds":
            name = row["ranked by"]
            named[re.sub(r"[:,]alpha=.*", "", name)] = name
            kl = [float(row[column]) for column in ("kl", "kl low", "kl high")]
            lines.setdefault(name, []).append((100 * float(row["kept"]), *kl))
    figure, (axes,) = new(1, 4.8)
    axes.set(xlabel="passage tokens kept, %", ylabel="KL from unpruned, nats")
    costs(axes, lines, {named[name]: (named[name], ink) for name, ink in zip(WITNESS, INKS, strict=True)})
    figure.suptitle("What pruning a passage costs SmolLM2-135M", fontsize=LETTERS + 1)
    return figure


# ---------------------------------------------------------------- the demo's training

STAGES = {"tower": "vision tower: labels of patches", "decoder": "text decoder: answers"}


def training(folder):
    """Figure of both stages of tools/train_demo.py: a row per kind of label or question, the earliest learned above.

    folder: of tower.csv and decoder.csv. White: not asked.
    """
    figure, panels = new(2, 3.4)
    for axes, (stage, title) in zip(panels, STAGES.items(), strict=True):
        with open(folder / f"{stage}.csv", newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        kinds = [name for name in rows[0] if name not in ("step", "seconds", "loss")]
        strips = {name: [100 * float(row[name] or "nan") for row in rows] for name in kinds}  # % correct, by step
        names = sorted(strips, key=lambda name: sum(share > 90 for share in strips[name]), reverse=True)
        last = float(rows[-1]["step"])
        shown = axes.imshow(
            [strips[name] for name in names], aspect="auto", cmap="cividis", vmin=0, vmax=100, interpolation="none",
            extent=(0, last, len(names), 0),
        )  # fmt: skip
        axes.set_yticks([i + 0.5 for i in range(len(names))], names)
        axes.grid(visible=False)
        axes.hlines(range(1, len(names)), 0, last, color="white", linewidth=1.5)
        axes.set(xlabel="training step", title=title)
    figure.colorbar(shown, ax=panels, ticks=[0, 25, 50, 75, 100], label="correct on new scenes, %", aspect=30)
    return figure
