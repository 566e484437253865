"""The demo world: scenes drawn with Pillow, questions about them, exact answers and the patches that show them.

A scene has 2 to 5 flat objects on a jittered 3x3 grid, and sometimes a sign with a 3-letter word. Every question has
an answer sentence and the patches that hold its evidence, so a pruning method can be judged by its answers and by
whether the heads kept the evidence.

    python tools/scenes.py --seed 3 --out scene.png     # draw one scene and print its questions
"""

import colorsys
import math
import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools.command import as_command, flags  # noqa: E402

SIZE = 224  # pixels per side of the model's input
PATCH = 14  # pixels per side of one vision token
GRID = SIZE // PATCH  # 16 x 16 = 256 patches
CELL = SIZE / 3  # the 3x3 grid that objects sit on
BIG = 2  # drawn at twice the size, then averaged down: anti-aliased edges

COLOURS = {
    "red": (214, 45, 48), "orange": (240, 135, 30), "yellow": (244, 212, 50), "green": (42, 157, 78),
    "blue": (42, 98, 214), "purple": (138, 68, 188), "black": (44, 44, 50),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = ("small", "large")
RADIUS = {"small": (15, 17), "large": (26, 29)}  # pixels, at SIZE
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
NUMBERS = ("zero", "one", "two", "three", "four", "five")
CONSONANTS, VOWELS = "BDKLMNPRST", "AEIOU"
LETTERS = "".join(sorted(CONSONANTS + VOWELS))

# Never drawn in training; they test whether the model learnt colours and shapes rather than pairs
UNSEEN_PAIRS = (
    ("red", "star"), ("orange", "ring"), ("yellow", "cross"), ("green", "circle"), ("blue", "triangle"),
    ("purple", "square"),
)  # fmt: skip

LONG_TASKS = ("list", "describe", "spell", "compare")  # answers with at least 6 image-dependent words
ATTRIBUTE_WORDS = frozenset(
    (*COLOURS, *SHAPES, *SIZES, *ROWS, *COLUMNS, *NUMBERS[1:], "yes", "no", "first", "second", "both")
)


@dataclass(frozen=True)
class Thing:
    """One object: its attributes, its cell (row, column in 0..2) and its centre x, y."""

    colour: str
    shape: str
    size: str
    row: int
    column: int
    x: float  # pixels, at SIZE
    y: float
    radius: float
    angle: float  # radians
    rgb: tuple

    @property
    def name(self):
        return f"{self.colour} {self.shape}"

    @property
    def full_name(self):
        return f"{self.size} {self.colour} {self.shape}"

    @property
    def place(self):
        return f"{ROWS[self.row]} {COLUMNS[self.column]}"


@dataclass(frozen=True)
class Sign:
    """A white plate with a 3-letter word, two cells wide."""

    word: str
    row: int
    x: float  # centre, pixels at SIZE
    y: float


@dataclass(frozen=True)
class Scene:
    things: tuple  # in reading order: row by row, left to right
    sign: Sign | None
    background: tuple  # two rgb colours, top and bottom


@dataclass(frozen=True)
class Question:
    """One question about one or two pictures.

    value: the part of the answer that depends on the picture; kind: group of questions with the same possible values,
    for the majority baseline; evidence[i]: indices (row * 16 + column) of the patches of picture i that the answer
    needs.
    """

    task: str
    kind: str
    question: str
    answer: str
    value: str
    evidence: tuple

    @property
    def dependent_words(self):
        """Number of words of the answer that only the picture determines; each spelled letter counts."""
        words = re.sub("[,.:]", " ", self.answer).split()
        letters = sum(len(w) for w in words if w.isupper() and len(w) in (1, 3))
        if self.task != "spell":
            letters -= words.count("A")  # the article is not a spelled letter
        given = set(re.sub("[?,]", " ", self.question.lower()).split())
        return letters + sum(w.lower() in ATTRIBUTE_WORDS and w.lower() not in given for w in words)


# ---------------------------------------------------------------- scenes


def make_scene(rng, unseen=False, count=None, with_sign=None, alike=False):
    """A random scene. unseen=True adds a held-out colour x shape pair.

    alike=True uses few colours and shapes, so that telling things apart needs both.
    """
    with_sign = rng.random() < 0.5 if with_sign is None else with_sign
    count = rng.randint(2, 5) if count is None else count
    cells = [(r, c) for r in range(3) for c in range(3)]
    sign = None
    if with_sign:
        row, left = rng.randrange(3), rng.randrange(2)
        cells = [cell for cell in cells if cell not in ((row, left), (row, left + 1))]
        word = rng.choice(CONSONANTS) + rng.choice(VOWELS) + rng.choice(CONSONANTS)
        sign = Sign(word, row, (left + 1) * CELL + rng.uniform(-8, 8), (row + 0.5) * CELL + rng.uniform(-8, 8))
    seen_pairs = [(c, s) for c in COLOURS for s in SHAPES if (c, s) not in UNSEEN_PAIRS]
    if alike:
        few = rng.sample(tuple(COLOURS), 3), rng.sample(SHAPES, 3)
        seen_pairs = [(c, s) for c, s in seen_pairs if c in few[0] and s in few[1]]
    pairs = rng.sample(seen_pairs, count)  # distinct, so "the red circle" names one object
    if unseen:
        pairs[rng.randrange(count)] = rng.choice(UNSEEN_PAIRS)
    places = sorted(rng.sample(cells, count))
    things = tuple(_make_thing(rng, *pair, *place) for pair, place in zip(pairs, places, strict=True))
    return Scene(things, sign, _pastels(rng))


def _make_thing(rng, colour, shape, row, column):
    size = rng.choice(SIZES)
    radius = rng.uniform(*RADIUS[size])
    play = CELL / 2 - radius - 3  # stay in the cell, 3 px from its border
    x, y = ((i + 0.5) * CELL + rng.uniform(-play, play) for i in (column, row))
    rgb = tuple(min(255, max(0, v + rng.randint(-10, 10))) for v in COLOURS[colour])
    return Thing(colour, shape, size, row, column, x, y, radius, rng.uniform(-0.2, 0.2), rgb)


def _pastels(rng):
    hue = rng.random()
    return tuple(
        tuple(int(255 * v) for v in colorsys.hsv_to_rgb((hue + shift) % 1, 0.12, value))
        for shift, value in ((0, 0.97), (0.08, 0.86))
    )


# ---------------------------------------------------------------- drawing


def _outline(thing):
    """Corners of a polygon shape of radius 1 around (0, 0)."""

    def turn(degrees, r=1.0):
        return (r * math.sin(math.radians(degrees)), -r * math.cos(math.radians(degrees)))

    if thing.shape == "square":
        return [turn(d, 1.1) for d in (45, 135, 225, 315)]
    if thing.shape == "triangle":
        return [turn(d, 1.12) for d in (0, 120, 240)]
    if thing.shape == "star":
        return [turn(36 * i, 1.1 if i % 2 == 0 else 0.48) for i in range(10)]
    a, b = 0.36, 1.0  # a plus sign: half width and half length of its bars
    return [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)]


def _paint(draw, thing, scale, fill, shift=0.0):
    """Draw the silhouette of a thing, shifted by `shift` pixels to the lower right."""
    x, y, r = (thing.x + shift) * scale, (thing.y + shift) * scale, thing.radius * scale
    box = x - r, y - r, x + r, y + r
    if thing.shape == "circle":
        draw.ellipse(box, fill)
    elif thing.shape == "ring":
        draw.ellipse(box, outline=fill, width=round(0.42 * r))
    else:
        cos, sin = math.cos(thing.angle), math.sin(thing.angle)
        draw.polygon([(x + r * (a * cos - b * sin), y + r * (a * sin + b * cos)) for a, b in _outline(thing)], fill)


def _letter_boxes(sign, scale=1.0):
    """The box of each letter in pixels; each has a third of the plate."""
    edges = [(sign.x - 48 + 32 * i, sign.y - 17, sign.x - 16 + 32 * i, sign.y + 17) for i in range(3)]
    return [tuple(v * scale for v in box) for box in edges]


def draw_scene(scene, size=SIZE):
    """The scene as an RGB picture of size x size pixels."""
    big = size * BIG
    scale = big / SIZE
    ramp = Image.linear_gradient("L").resize((big, big))
    image = ImageOps.colorize(ramp, *scene.background)
    draw = ImageDraw.Draw(image)
    shade = tuple(int(v * 0.84) for v in scene.background[1])
    for thing in scene.things:
        _paint(draw, thing, scale, shade, shift=2.5)  # drop shadow
        _paint(draw, thing, scale, thing.rgb)
    if scene.sign:
        s = scene.sign
        plate = [v * scale for v in (s.x - 53, s.y - 22, s.x + 53, s.y + 22)]
        draw.rounded_rectangle([v + 2.5 * scale for v in plate], 6 * scale, fill=shade)
        draw.rounded_rectangle(plate, 6 * scale, fill="white", outline=(120, 120, 130), width=round(1.5 * scale))
        font = ImageFont.load_default(33 * scale)
        for letter, (x0, y0, x1, y1) in zip(s.word, _letter_boxes(s, scale), strict=True):
            centre = (x0 + x1) / 2, (y0 + y1) / 2
            draw.text(centre, letter, (30, 30, 36), font, anchor="mm", stroke_width=0.6 * scale)
    return image.reduce(BIG)


def _per_patch(draw_on):
    """Coverage of each patch by what draw_on(draw) draws at SIZE: 256 numbers in 0..255, row by row."""
    mask = Image.new("L", (SIZE, SIZE))
    draw_on(ImageDraw.Draw(mask))
    return list(mask.reduce(PATCH).tobytes())


def coverage(thing):
    """Coverage of each patch by the thing: 256 numbers in 0..255."""
    return _per_patch(lambda draw: _paint(draw, thing, 1.0, 255))


def letter_coverage(sign):
    """Coverage of each patch by each letter: three lists of 256 numbers in 0..255."""
    return [_per_patch(lambda draw, box=box: draw.rectangle(box, fill=255)) for box in _letter_boxes(sign)]


def patches_of(item):
    """Indices of the patches of which a thing, or a letter of a sign, covers at least an eighth."""
    covers = [coverage(item)] if isinstance(item, Thing) else letter_coverage(item)
    return tuple(i for i, shares in enumerate(zip(*covers, strict=True)) if max(shares) >= 32)


# ---------------------------------------------------------------- questions about one scene

WORDINGS = {
    "colour": ("What colour is the {}?", "What color is the {}?", "Which colour does the {} have?"),
    "shape": ("What shape is the {} object?", "Which shape is {}?", "What is the {} object?"),
    "size": ("How big is the {}?", "Is the {} small or large?", "What size is the {}?"),
    "count": ("How many objects are there?", "How many objects are in the picture?", "Count the objects."),
    "position": ("Where is the {}?", "Where in the picture is the {}?"),
    "presence": ("Is there {}?", "Is there {} in the picture?", "Can you see {}?"),
    "read": ("What does the sign say?", "What is written on the sign?", "Read the sign."),
    "spell": ("Spell the word on the sign.", "How is the word on the sign spelled?", "Spell the word."),
    "list": ("List the objects {}.", "Name all objects {}.", "List all objects {}."),
    "describe": (
        "Describe the picture.", "Describe the scene.", "Describe the image.", "What is in the picture?",
        "What do you see?",
    ),
    "compare": ("Compare the two pictures.", "Compare the pictures object by object.", "What is in each picture?"),
}  # fmt: skip


def _question(rng, task, answer, value, *shown, about="", kind=None):
    """A Question in a random wording. shown: for each picture, the things and signs that are the evidence.

    about: fills the gap in the wording; kind: default the task.
    """
    wording = rng.choice(WORDINGS[task]).format(about)
    return Question(task, kind or task, wording, answer, value, _evidence(*shown))


def _evidence(*shown):
    return tuple(tuple(sorted({p for item in items for p in patches_of(item)})) for items in shown)


def _one_of(items, key):
    """The items with a unique key."""
    keys = [key(i) for i in items]
    return [i for i in items if keys.count(key(i)) == 1]


def ask_colour(scene, rng):
    if options := _one_of(scene.things, lambda t: t.shape):
        t = rng.choice(options)
        return _question(rng, "colour", f"The {t.shape} is {t.colour}.", t.colour, [t], about=t.shape)


def ask_shape(scene, rng):
    if options := _one_of(scene.things, lambda t: t.colour):
        t = rng.choice(options)
        return _question(rng, "shape", f"The {t.colour} object is a {t.shape}.", t.shape, [t], about=t.colour)


def ask_size(scene, rng):
    t = rng.choice(scene.things)
    return _question(rng, "size", f"The {t.name} is {t.size}.", t.size, [t], about=t.name)


def ask_count(scene, rng):
    n = NUMBERS[len(scene.things)]
    return _question(rng, "count", f"The picture has {n} objects.", n, scene.things)


def ask_position(scene, rng):
    t = rng.choice(scene.things)
    return _question(rng, "position", f"The {t.name} is {t.place}.", t.place, [t], about=t.name)


def ask_relation(scene, rng):
    """Left of / right of / above / below, for two things in different columns or rows."""
    pairs = [(a, b) for a in scene.things for b in scene.things if a is not b]
    axes = [(a, b, axis) for a, b in pairs for axis in ("column", "row") if getattr(a, axis) != getattr(b, axis)]
    if not axes:
        return None
    a, b, axis = rng.choice(axes)
    words, of = (("left", "right"), " of") if axis == "column" else (("above", "below"), "")
    truth = words[getattr(a, axis) > getattr(b, axis)]
    one, two = rng.sample(words, 2)
    question = f"Is the {a.name} {one} or {two}{of} the {b.name}?"
    answer = f"The {a.name} is {truth}{of} the {b.name}."
    return Question("relation", f"relation {axis}", question, answer, truth, _evidence([a, b]))


def ask_presence(scene, rng):
    """As many yes as no; the answer repeats the name first, so that its first token reveals nothing.

    Most "no" questions combine a colour and a shape that occur on different objects; in the others one of the two does
    not occur.
    """
    present = {(t.colour, t.shape) for t in scene.things}
    absent = {(c, s) for c in COLOURS for s in SHAPES} - set(UNSEEN_PAIRS) - present
    colours, shapes = {c for c, _ in present}, {s for _, s in present}
    hard = sorted((c, s) for c, s in absent if c in colours and s in shapes)
    easy = sorted((c, s) for c, s in absent if (c in colours) != (s in shapes))
    if rng.random() < 0.5:
        value, (colour, shape) = "no", rng.choice(hard if hard and rng.random() < 0.65 else easy)
        found = [t for t in scene.things if colour == t.colour or shape == t.shape]
    else:
        found = [rng.choice(scene.things)]
        value, colour, shape = "yes", found[0].colour, found[0].shape
    name = f"{'an' if colour == 'orange' else 'a'} {colour} {shape}"
    answer = f"{_capital(name)} is {'not ' if value == 'no' else ''}in the picture."
    return _question(rng, "presence", answer, value, found, about=name)


def _capital(text):
    return text[0].upper() + text[1:]


def ask_read(scene, rng):
    if sign := scene.sign:
        return _question(rng, "read", f"The sign says {sign.word}.", sign.word, [sign])


def ask_spell(scene, rng):
    if sign := scene.sign:
        return _question(rng, "spell", f"The sign says {sign.word}: {', '.join(sign.word)}.", sign.word, [sign])


def _listing(things):
    return ", ".join(f"a {t.full_name}" for t in things)


def ask_list(scene, rng):
    if rng.random() < 0.5:
        order, things = "row by row", scene.things
    else:
        order, things = "column by column", sorted(scene.things, key=lambda t: (t.column, t.row))
        if len({t.column for t in things}) == len(things):
            order = rng.choice((order, "from left to right"))
    value = _listing(things)
    return _question(rng, "list", f"{_capital(value)}.", value, scene.things, about=order, kind=order)


def ask_describe(scene, rng):
    items, parts = list(scene.things), [f"There are {NUMBERS[len(scene.things)]} objects."]
    parts += [f"A {t.full_name} is at the {t.place}." for t in scene.things]
    if scene.sign:
        items.append(scene.sign)
        parts.append(f"The sign in the {ROWS[scene.sign.row]} row says {scene.sign.word}.")
    answer = " ".join(parts)
    return _question(rng, "describe", answer, answer, items)


ASKERS = {
    "colour": ask_colour, "shape": ask_shape, "size": ask_size, "count": ask_count, "position": ask_position,
    "relation": ask_relation, "presence": ask_presence, "read": ask_read, "spell": ask_spell, "list": ask_list,
    "describe": ask_describe,
}  # fmt: skip


# ---------------------------------------------------------------- questions about two scenes


def ask_compare(scenes, rng):
    answer = " ".join(f"{n} picture: {_listing(s.things)}." for n, s in zip(("First", "Second"), scenes, strict=True))
    return _question(rng, "compare", answer, answer, *(s.things for s in scenes))


def ask_pair(scenes, rng):
    """A short question about one of the two pictures, or about both."""
    if rng.random() < 0.4:
        first, second = (len(s.things) for s in scenes)
        which = "both" if first == second else "first" if first > second else "second"
        answer = f"The {which} picture has more objects."
        if which == "both":
            answer = "Both pictures have the same number of objects."
        evidence = _evidence(*(s.things for s in scenes))
        return Question("pair", "pair count", "Which picture has more objects?", answer, which, evidence)
    index = rng.randrange(2)
    if options := _one_of(scenes[index].things, lambda t: t.shape):
        t, which = rng.choice(options), ("first", "second")[index]
        question = f"What colour is the {t.shape} in the {which} picture?"
        answer = f"The {t.shape} in the {which} picture is {t.colour}."
        evidence = _evidence(*([t] if i == index else [] for i in range(2)))
        return Question("pair", "pair colour", question, answer, t.colour, evidence)


PAIR_ASKERS = {"compare": ask_compare, "pair": ask_pair}


# ---------------------------------------------------------------- samples


def sample(seed, tasks=None, pair=False, unseen=False, alike=False):
    """(scenes, questions) of a seed. The same seed gives the same pictures and words on every machine.

    tasks: names of ASKERS, or of PAIR_ASKERS with pair=True, which makes two scenes; default: each once. A name may be
    repeated. Questions that do not fit the scene, such as reading a missing sign, are left out.
    """
    rng = random.Random(f"scene {seed} {pair} {unseen}")
    askers = PAIR_ASKERS if pair else ASKERS
    if pair:  # of 2 or 3 objects each, without signs
        scenes = tuple(make_scene(rng, unseen, count=rng.randint(2, 3), with_sign=False) for _ in range(2))
    else:
        scenes = (make_scene(rng, unseen, alike=alike),)
    asked = [askers[task](scenes if pair else scenes[0], rng) for task in (askers if tasks is None else tasks)]
    return scenes, [q for q in asked if q is not None]


def main(argv=None):
    parser = flags(__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=448, help="pixels per side (default 448)")
    parser.add_argument("--out", default="scene.png")
    args = parser.parse_args(argv)
    scenes, questions = sample(args.seed)
    draw_scene(scenes[0], args.size).save(args.out)
    for q in questions:
        print(f"{q.task:9} {q.question}  ->  {q.answer}")


if __name__ == "__main__":
    sys.exit(as_command(main))
