"""The training tool: packing is exact, runs resume, and its one-pass evaluation matches generation."""

import csv
import json
import shutil

import pytest
import torch

from model import Generation, load
from tests.paths import DEMO
from tests.seeds import python_random
from tools import scenes, train_demo


@pytest.fixture(scope="module")
def demo():
    return load(DEMO, "fp32")


def test_packing_puts_every_conversation_where_it_would_be_alone(demo):
    tokenizer = demo.tokenizer
    _, questions = scenes.sample(3)
    packed = train_demo.pack(tokenizer, [[questions[0]], [questions[1], questions[2]]], 1, 256)
    assert len(packed.position) == len(packed.block) == len(packed.target)
    for number, conversation in ((1, questions[:1]), (2, questions[1:3])):
        text = f"USER: <image>\n{conversation[0].question} ASSISTANT: {conversation[0].answer}</s>"
        if len(conversation) > 1:
            text += f"USER: {conversation[1].question} ASSISTANT: {conversation[1].answer}</s>"
        alone = tokenizer.encode(text)
        rows = [i for i, b in enumerate(packed.block) if b == number]
        ids = [packed.ids[i - 255] for i in rows]  # the placeholder became 256 tokens
        start = alone.index(demo.config.image_token_index) + 1
        assert ids == alone[start:]
        assert [packed.position[i] for i in rows] == list(range(start + 255, len(alone) + 255))
    for q, first, stop in packed.answers:
        assert tokenizer.decode(packed.target[first:stop]) == q.answer and packed.target[stop - 1] == tokenizer.eos_id


def test_the_mask_shows_pictures_and_own_past_only():
    mask = train_demo.mask_of(torch.tensor([[0, 0, 1, 1, 2, 2, -1]]))[0, 0].int().tolist()
    assert mask == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0],
        [1, 1, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 1],
    ]


def test_patch_labels_agree_with_the_scene():
    (scene,), _ = scenes.sample(1000000003, ())
    labels = dict(zip(train_demo.LABELS, train_demo.patch_labels(scene), strict=True))
    by_column = sorted(scene.things, key=lambda t: (t.column, t.row))
    for rank, t in enumerate(scene.things, 1):
        centre = int(t.y // 14) * 16 + int((t.x + (0.8 * t.radius if t.shape == "ring" else 0)) // 14)
        found = {name: label[centre] for name, label in labels.items()}
        assert [*scenes.COLOURS][found["colour"] - 1] == t.colour and scenes.SHAPES[found["shape"] - 1] == t.shape
        assert found["row rank"] == rank and by_column[found["column rank"] - 1] == t
        assert found["place"] == t.row * 3 + t.column + 1 and scenes.SIZES[found["size"] - 1] == t.size
    assert (labels["letter"] > 0).any() == (scene.sign is not None)


@pytest.mark.parametrize(("pair", "count"), [(False, 6), (True, 2)])
def test_one_pass_evaluation_is_greedy_generation(demo, pair, count):
    """Exact match in the table, per question, against Generation on the same pictures."""
    seeds = range(train_demo.HELD_OUT, train_demo.HELD_OUT + count)
    rows, right = train_demo.evaluate_batch(demo, seeds, pair, False, 0), []
    for seed in seeds:
        drawn, questions = train_demo.held_out_questions(seed, pair, False, 0)
        pictures = [scenes.draw_scene(s) for s in drawn]
        right += [int("".join(Generation(demo, q.question, pictures)) == q.answer) for q in questions]
    assert [r["normal"] for r in rows] == right and len(rows) >= (4 if pair else 5)


def test_the_committed_table_is_of_these_tasks_and_large_enough():
    with open(DEMO.parent / "demo-accuracy.csv", newline="") as f:
        table = {row["task"]: row for row in csv.DictReader(f)}
    assert set(train_demo.TASKS) < set(table) and int(table["all"]["questions"]) >= 4000
    assert float(table["all"]["exact match"]) >= 90
    long = table["long answers (6+ image words)"]
    assert int(long["questions"]) * 2 >= int(table["all"]["questions"])
    assert float(long["exact match"]) - float(long["vision dropped after token 1"]) >= 20
    for task in train_demo.TASKS:
        assert float(table[task]["blind"]) <= float(table[task]["majority"]) + 3, task


def test_the_demo_folder_is_small_and_complete():
    sizes = {f.name: f.stat().st_size for f in DEMO.iterdir()}
    assert sizes.pop("lookahead.safetensors") <= 2e6 and sum(sizes.values()) <= 12e6
    config = json.loads((DEMO / "config.json").read_text())
    text = config["text_config"]
    assert text["num_hidden_layers"] >= 6 and (text["num_attention_heads"], text["num_key_value_heads"]) == (8, 4)
    assert "hidden_act" not in text  # as sparse as published configs


@pytest.mark.parametrize("stage", ["tower", pytest.param("decoder", marks=pytest.mark.thorough)])
def test_a_run_that_is_cut_off_goes_on_where_it_was(tmp_path, stage, capsys):
    """Two steps in a row equal one step, a resume and another step."""

    def train(folder, steps, stage):
        train_demo.main([stage, "--run", str(folder), "--steps", str(steps), "--batch", "2", "--device", "cpu"])
        return capsys.readouterr().err

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    if stage == "decoder":
        train(whole, 1, "tower")
        shutil.copytree(whole, parts)
    train(whole, 2, stage)
    train(parts, 1, stage)
    assert "resumed at step 1" in train(parts, 2, stage)
    one, two = (torch.load(folder / f"{stage}.pt", weights_only=True) for folder in (whole, parts))
    assert one["step"] == two["step"] == 2
    torch.testing.assert_close(one["modules"], two["modules"], atol=1e-4, rtol=1e-5)


def test_talks_keep_every_question():
    _, questions = scenes.sample(11)
    talks = train_demo.talks(questions, python_random(0))
    assert sorted(q.question for t in talks for q in t) == sorted(q.question for q in questions)
    assert {len(t) for t in talks} <= {1, 2}


@pytest.mark.parametrize("flags", ["export --steps 3", "evaluate --batch 8", "tower --out x", "decoder --scenes 9"])
def test_a_flag_that_a_stage_has_no_use_for_is_refused(flags, capsys):
    with pytest.raises(SystemExit) as left:
        train_demo.main(flags.split())
    assert left.value.code == 2 and f"does not use {flags.split()[1]}" in capsys.readouterr().err
