"""The demo world: seeds are reproducible, answers are true, and questions do not reveal them."""

import math

import pytest

from tests.seeds import python_random
from tools import scenes

SEEDS = range(300)


def all_questions(seeds=SEEDS, **kwargs):
    return [(s, q) for seed in seeds for s, qs in [scenes.sample(seed, **kwargs)] for q in qs]


def test_a_seed_is_a_scene_and_its_questions():
    for pair in (False, True):
        one, two = scenes.sample(5, pair=pair), scenes.sample(5, pair=pair)
        assert one == two != scenes.sample(6, pair=pair)
        assert scenes.draw_scene(one[0][0]).tobytes() == scenes.draw_scene(two[0][0]).tobytes()
    assert scenes.sample(9, ())[0] == scenes.sample(9)[0] == scenes.sample(9, ("list", "list"))[0]


def test_things_are_drawn_where_the_truth_says_in_the_colour_it_says():
    for seed in range(60):
        (scene,), _ = scenes.sample(seed, ())
        image = scenes.draw_scene(scene)
        for t in scene.things:
            x = t.x + t.radius * 0.8 * (t.shape == "ring")  # a ring is hollow; other shapes cover their centre
            pixel = image.getpixel((round(x), round(t.y)))
            nearest = min(scenes.COLOURS, key=lambda c: math.dist(scenes.COLOURS[c], pixel))
            assert nearest == t.colour, (seed, t, pixel)
            assert (int(t.y // scenes.CELL), int(t.x // scenes.CELL)) == (t.row, t.column)


def test_nothing_overlaps():
    for seed in SEEDS:
        (scene,), _ = scenes.sample(seed, ())
        assert len({(t.row, t.column) for t in scene.things}) == len(scene.things)
        assert len({(t.colour, t.shape) for t in scene.things}) == len(scene.things)
        if scene.sign:
            assert all(t.row != scene.sign.row or abs(t.x - scene.sign.x) > 53 + t.radius * 0.9 for t in scene.things)


def test_evidence_lies_on_what_is_asked():
    for (scene,), q in all_questions(range(100), tasks=("colour", "position", "read", "list")):
        if q.task == "read":
            assert set(q.evidence[0]) == set(scenes.patches_of(scene.sign))
        elif q.task == "list":
            assert set(q.evidence[0]) == {p for t in scene.things for p in scenes.patches_of(t)}
        else:
            (thing,) = (
                t for t in scene.things if t.shape in q.question and (q.task == "colour" or t.name in q.question)
            )
            assert q.evidence == (scenes.patches_of(thing),)
            row, column = divmod(q.evidence[0][len(q.evidence[0]) // 2], scenes.GRID)
            assert math.dist((column + 0.5, row + 0.5), (thing.x / 14, thing.y / 14)) < 3


def test_answers_are_true():
    """Derive each short answer again from the scene, with other code."""
    for (scene,), q in all_questions():
        names = {f"{t.colour} {t.shape}": t for t in scene.things}
        words = q.question.rstrip("?.").split()
        if q.task == "presence":
            assert (q.value == "yes") == any(name in q.question for name in names)
            assert ("not" in q.answer) == (q.value == "no")
        elif q.task == "count":
            assert scenes.NUMBERS.index(q.value) == len(scene.things)
        elif q.task == "position":
            thing = names[" ".join(q.answer.split()[1:3])]
            row, column = ("top", "middle", "bottom")[int(thing.y / 75)], ("left", "centre", "right")[int(thing.x / 75)]
            assert q.value == f"{row} {column}"
        elif q.task == "relation":
            a, b = sorted((t for n, t in names.items() if n in q.question), key=lambda t: q.question.index(t.name))
            truth = {"left": a.x < b.x, "right": a.x > b.x, "above": a.y < b.y, "below": a.y > b.y}
            assert truth[q.value] and q.value in words and f" {q.value} " in q.answer
        elif q.task == "list":
            key = (lambda t: (t.row, t.column)) if "row" in q.kind else (lambda t: (t.column, t.row))
            said = [part.split()[-2:] for part in q.answer.rstrip(".").split(",")]
            assert said == [[t.colour, t.shape] for t in sorted(scene.things, key=key)]


def test_half_of_the_long_tasks_words_come_from_the_picture():
    for _, q in all_questions():
        assert (q.dependent_words >= 6) == (q.task in scenes.LONG_TASKS), q
    for _, q in all_questions(range(50), pair=True):
        assert (q.dependent_words >= 6) == (q.task == "compare"), q


@pytest.mark.parametrize(
    ("words", "task", "question", "answer"),
    [
        (1, "colour", "What colour is the star?", "The star is red."),
        (1, "presence", "Is there a red star?", "Yes, there is a red star."),
        (6, "spell", "Spell the word.", "The sign says BAT: B, A, T."),
        (6, "list", "List the objects.", "A large red star, a small blue ring."),
    ],
)
def test_dependent_words_of_known_answers(words, task, question, answer):
    assert scenes.Question(task, "", question, answer, "", ()).dependent_words == words


def test_unseen_pairs_are_unseen_and_never_asked_about():
    unseen = {" ".join(p) for p in scenes.UNSEEN_PAIRS}
    for drawn, q in all_questions(range(200)):
        assert not any(t.name in unseen for s in drawn for t in s.things)
        assert not any(name in q.question or name in q.answer for name in unseen)
    for seed in range(50):
        drawn, _ = scenes.sample(seed, unseen=True)
        assert any(t.name in unseen for t in drawn[0].things)


@pytest.mark.parametrize(
    ("task", "most"), [("presence", 0.56), ("relation", 0.56), ("size", 0.56), ("colour", 0.25), ("position", 0.25)]
)
def test_no_answer_is_common(task, most):
    values = [q.value for _, q in all_questions(range(1500), tasks=(task,))]
    assert max(map(values.count, set(values))) / len(values) < most


def test_patches_cover_what_is_drawn():
    """Drawing the scene without a thing changes pixels only near the patches of its evidence."""
    rng = python_random(0)
    for _ in range(20):
        scene = scenes.make_scene(rng, with_sign=False)
        t = scene.things[0]
        less = scenes.Scene(scene.things[1:], None, scene.background)
        one, two = scenes.draw_scene(scene), scenes.draw_scene(less)
        for index in scenes.patches_of(t):
            row, column = divmod(index, scenes.GRID)
            box = (column * 14, row * 14, column * 14 + 14, row * 14 + 14)
            assert one.crop(box).tobytes() != two.crop(box).tobytes()
