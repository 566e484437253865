"""Frames of a video and several pictures of LLaVA-OneVision: run.py, Python, files of questions, conversations."""

import json
import re

import pytest
from conftest import IMAGE_ID, PAD_ID, TOKENIZER_CONFIG, added_token, refusal, write_json
from PIL import Image
from test_batch import together
from test_chat import talk  # noqa: F401  a fixture
from test_parity import noise

from model import Generation, Sampling, load
from model.image import read_frames, read_image, with_mode
from tests.paths import DEMO

SIDE, PATCHES, SMALL = 28, 9, 4  # pixels of a square, its tokens, those of a frame
PINPOINTS = [[SIDE * rows, SIDE * columns] for rows in (1, 2, 3) for columns in (1, 2, 3)]


@pytest.fixture(scope="module")
def folder(make_checkpoint, tmp_path_factory):
    """A LLaVA-OneVision of random weights, with `<video>`, and files beside it: a.png b.png c.png clip.gif wide.png."""
    folder = tmp_path_factory.mktemp("onevision")
    text = {"model_type": "qwen2", "num_hidden_layers": 3, "max_position_embeddings": 1024}
    vision = {"model_type": "siglip_vision_model", "patch_size": 9, "num_hidden_layers": 2}
    top = {"model_type": "llava_onevision", "image_grid_pinpoints": PINPOINTS, "video_token_index": PAD_ID}
    make_checkpoint(folder, text | {"tie_word_embeddings": True}, vision, top, seed=5)
    size = {"height": SIDE, "width": SIDE}
    kind = {"image_processor_type": "LlavaOnevisionImageProcessor", "image_grid_pinpoints": PINPOINTS}
    write_json(folder / "preprocessor_config.json", {**kind, "size": size})
    added = {str(IMAGE_ID): added_token("<image>"), str(PAD_ID): added_token("<video>")}
    plain = {key: value for key, value in TOKENIZER_CONFIG.items() if key != "pad_token"}
    write_json(folder / "tokenizer_config.json", plain | {"added_tokens_decoder": added})
    return folder


@pytest.fixture(scope="module")
def tiny(folder):
    return load(folder, "fp32")


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Pictures a, b and c of 40 x 30 pixels, clip.gif and pages.tiff with all three, still.gif; the working folder."""
    monkeypatch.chdir(tmp_path)
    frames = [noise(40, 30, seed=i) for i in range(3)]
    for name, frame in zip("abc", frames, strict=True):
        frame.copy().save(f"{name}.png")  # a copy, because Pillow notes the encoder's settings in it
    for name in ("pages.tiff", "clip.gif"):
        frames[0].save(name, save_all=True, append_images=frames[1:])
    frames[0].save("still.gif")
    noise(90, 20).save("wide.png")
    return tmp_path


NAMES = ["a.png", "b.png", "c.png"]


def answered(checkpoint, prompt, *args, limit=5, **options):
    generation = Generation(checkpoint, prompt, *args, Sampling(limit), **options)
    "".join(generation)
    return generation


# ---------------------------------------------------------------- reading frames


def test_a_file_of_several_pictures_gives_all_of_them(files):
    pages = read_frames("pages.tiff")
    assert [page.path for page in pages] == ["pages.tiff"] * 3 and [page.note for page in pages] == [None] * 3
    assert [page.image.tobytes() for page in pages] == [read_image(name).image.tobytes() for name in NAMES]
    with Image.open("clip.gif") as clip:
        wanted = []
        for number in range(3):
            clip.seek(number)
            wanted.append(clip.convert("RGB").tobytes())
        assert [frame.image.tobytes() for frame in read_frames(clip)] == wanted and clip.tell() == 0
    assert [frame.image.tobytes() for frame in read_frames(["clip.gif"])] == wanted
    assert [frame.path for frame in read_frames(["clip.gif", "a.png"])] == ["clip.gif", "a.png"]  # its first frame
    assert len(read_frames("still.gif")) == len(read_frames(noise(4, 4))) == 1 and read_frames(None) == []


def test_a_change_to_all_frames_is_noted_once(files):
    see_through = [Image.new("RGBA", (8, 8), (200, 10, 10, 100 + i)) for i in range(3)]
    see_through[0].save("clip.webp", save_all=True, append_images=see_through[1:], lossless=True)
    notes = [frame.note for frame in read_frames("clip.webp")]
    assert notes == ["clip.webp: transparent pixels are shown on white", None, None]


def test_a_file_with_too_many_or_broken_frames_is_refused(files, monkeypatch):
    data = (files / "pages.tiff").read_bytes()
    (files / "cut.tiff").write_bytes(data[: len(data) // 2])
    assert "cut.tiff is truncated or broken" in refusal(read_frames, "cut.tiff")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3 * 40 * 30 // 2 - 1)
    assert refusal(read_frames, "clip.gif") == ("clip.gif has 3 frames of 40 x 30 pixels; give fewer or smaller frames")
    videos = {"x.mp4": b"\0\0\0\x18ftypisom", "x.webm": b"\x1aE\xdf\xa3", "x.avi": b"RIFF\1\1\1\1AVI "}
    for name, data in videos.items():
        (files / name).write_bytes(data + bytes(50))
        assert f"{name} is a video, of which only frames saved as pictures" in refusal(read_frames, name)


# ---------------------------------------------------------------- modes of pictures


def test_only_the_only_picture_is_cut_into_tiles(tiny, files):
    """A video is no picture. A later picture is one square, and the first one keeps its tiles."""

    def modes(generation):
        return [image["mode"] for image in generation.images]

    assert modes(Generation(tiny, "what?", "a.png")) == ["anyres"]
    assert modes(Generation(tiny, "what?", ["a.png", "b.png"])) == ["pad", "pad"]
    assert modes(Generation(tiny, "what?", ["a.png", "b.png"], image_mode="anyres")) == ["anyres"] * 2
    assert modes(Generation(tiny, "what?", "a.png", frames=NAMES)) == ["anyres", "frame", "frame", "frame"]
    first = answered(tiny, "what?", "a.png", frames=["a.png"])
    later = Generation(tiny, "what?", "b.png", before=first)
    assert modes(later) == ["anyres", "frame", "pad"] and [i["tokens"] for i in later.images[1:]] == [5, 10]
    watched = answered(tiny, "what?", (), frames=NAMES)
    assert modes(Generation(tiny, "what?", "b.png", before=watched)) == ["frame"] * 3 + ["anyres"]


def test_an_order_of_tiles_does_not_stop_a_second_picture(tiny):
    assert with_mode(tiny.image_settings, "auto", "orig", several=True).mode == "pad"
    assert with_mode(tiny.image_settings, "auto", "orig").order == "orig"
    assert "leave it out" in refusal(with_mode, tiny.image_settings, "pad", "orig")


# ---------------------------------------------------------------- from Python


def test_frames_from_python_are_those_of_run_py(tiny, folder, files, cli):
    wanted = answered(tiny, "what?", "a.png", frames=NAMES).text
    options = {"frames": NAMES, "max_new_tokens": 5}
    assert tiny.ask("what?", "a.png", **options) == "".join(tiny.stream("what?", "a.png", **options)) == wanted
    assert tiny.ask("what?", "a.png", max_new_tokens=5) != wanted != tiny.ask("what?", **options)
    questions = [("what?", "a.png", NAMES), ("what?", "a.png"), "what?", ("what?", (), NAMES), ("what?", "a.png", ())]
    alone = [wanted, tiny.ask("what?", "a.png", max_new_tokens=5), tiny.ask("what?", max_new_tokens=5)]
    alone += [tiny.ask("what?", **options), alone[1]]
    *answers, wrong = tiny.ask_many([*questions, ("what?", "a.png", NAMES, 3)], max_new_tokens=5)
    assert answers == alone and len({*alone}) == 4 and "or a triple (text, pictures, frames)" in str(wrong)
    code, out, err = cli("--model", folder, "--image", "a.png", "--frames", *NAMES, "-n", 5, "--prompt", "what?")
    assert code == 0 and out == wanted + "\n" and "image mode anyres (order hf), 3 frames, backend" in err


@pytest.mark.parametrize("spec", [None, "plphp:retention=0.5", "divprune:retention=0.5"])
def test_a_batch_of_all_kinds_says_what_each_would_say_alone(tiny, files, spec):
    """Tiles, several pictures, frames, frames and a picture, and no picture."""

    def mixed():
        asked = [("wide.png", ()), (NAMES, ()), ((), NAMES), ("a.png", "clip.gif"), ((), ()), ("c.png", NAMES[:1])]
        return [
            Generation(tiny, "what?", images, Sampling(3 + 2 * i), frames=frames, prune=spec)
            for i, (images, frames) in enumerate(asked)
        ]

    alone = mixed()
    for generation in alone:
        "".join(generation)
    for size in (None, 2):
        mates = together(mixed(), size)
        for name in ("token_ids", "text", "bytes_held", "spans"):
            assert [getattr(g, name) for g in mates] == [getattr(g, name) for g in alone], name
    assert len({g.text for g in alone}) == 6 and [len(g.images) for g in alone] == [1, 3, 3, 4, 0, 2]


# ---------------------------------------------------------------- run.py


def test_json_stats_and_the_first_line_say_what_became_of_each(folder, files, cli, monkeypatch):
    monkeypatch.setattr("model.report.measure_bandwidth", lambda device: 1e9)

    def asked(*flags):
        code, out, err = cli("--model", folder, "-n", 2, "--prompt", "what?", "--json", "--stats", *flags)
        assert code == 0, err
        return [(i["path"], i["mode"], i["tiles"], i["tokens"]) for i in json.loads(out)["images"]], err

    images, err = asked("--image", "a.png", "--frames", "clip.gif")
    frames = [("clip.gif", "frame", 1, 4), ("clip.gif", "frame", 1, 4), ("clip.gif", "frame", 1, 5)]
    assert images[0][:3] == ("a.png", "anyres", 5) and images[1:] == frames
    assert f"1 picture, 3 frames, {images[0][3] + 13} vision tokens" in err
    assert re.search(r"^ +3 frames: 40 x 30 pixels, 13 tokens, \d", err, re.M) and err.count("40 x 30") == 2
    images, err = asked("--frames", "a.png")
    assert images == [("a.png", "frame", 1, 5)] and ", 1 frame, backend" in err and "1 frame, 5 vision tokens" in err
    images, err = asked("--image", "a.png", "b.png")
    assert images == [("a.png", "pad", 1, 10), ("b.png", "pad", 1, 10)]
    assert "image mode pad (one square for each of several pictures; --image-mode anyres cuts them into tiles)," in err
    images, err = asked("--image", "a.png", "b.png", "--image-mode", "squash")
    assert [image[1] for image in images] == ["squash"] * 2 and "image mode squash, backend" in err


def test_several_lines_ask_about_one_video(folder, files, cli, stdin):
    stdin(b"what?\nwhat? <video>\n")
    code, out, _ = cli("--model", folder, "-n", 3, "--frames", *NAMES, "--json")
    first, second = map(json.loads, out.splitlines())
    assert code == 0 and first["vision_tokens"] == second["vision_tokens"] == 13
    assert first["token_ids"] != second["token_ids"]


BAD = {  # words of the error: flags
    "only one thing can be read from stdin": "--frames - --image -",
    "no picture at nope.png; check the path": "--frames a.png nope.png",
    "--image-mode is for pictures, and --frames have a mode of their own": "--frames a.png --image-mode pad",
    "--frames needs a value": "--frames",
    "different sizes (40 x 30 and 90 x 20)": "--frames a.png wide.png",
    "only LLaVA-OneVision takes the frames of a video; give them as pictures": "--frames a.png --model DEMO",
    "give its frames with --frames (in a chat: /frames)": "--prompt <video>?",
    "2 <video>": "--frames a.png --prompt <video><video>",
    "the system text contains <video>": "--frames a.png --system <video>",
    "pictures and frames, and the model's context is 1024; use fewer frames": "--frames long.tiff",
    "the drawing would replace a.png": "--frames a.png --show a.png",
    ". cannot be read (Is a directory)": "--frames .",
}


@pytest.mark.parametrize("words", BAD)
def test_bad_frames_are_refused_in_one_line(refused, folder, files, words):
    many = [Image.new("RGB", (2, 2), (i, 0, 0)) for i in range(256)]
    many[0].save("long.tiff", save_all=True, append_images=many[1:])
    flags = BAD[words].replace("DEMO", str(DEMO)).split()
    prompt = [] if "--prompt" in flags else ["--prompt", "what?"]
    assert words in refused("--model", folder, *prompt, *flags)


# ---------------------------------------------------------------- files of questions


@pytest.fixture
def questions(folder, files, cli):
    """Function (questions, flags, expected exit code) -> (lines of the answers, stderr); the answers stay."""

    def ask(asked, *flags, code=0):
        lines = [json.dumps({"question_id": i, "text": "what?"} | question) for i, question in enumerate(asked)]
        (files / "q.jsonl").write_text("\n".join(lines))
        flags = "--questions", "q.jsonl", "--answers", "a.jsonl", "-n", 4, *flags
        ended, out, err = cli("--model", folder, *flags)
        assert (ended, out) == (code, ""), err
        answers = files / "a.jsonl"
        return [json.loads(line) for line in answers.read_text().splitlines()] if answers.exists() else [], err

    return ask


ASKED = [
    {"image": "a.png"}, {"image": NAMES}, {"frames": NAMES}, {"frames": "clip.gif", "image": "a.png"}, {"frames": []},
    {"frames": [*NAMES, "wide.png"]},
]  # fmt: skip


def test_frames_in_a_file_of_questions(tiny, questions):
    lines, err = questions(ASKED, "--batch", 3)
    alone = [
        answered(tiny, "what?", images, limit=4, frames=frames)
        for images, frames in (("a.png", ()), (NAMES, ()), ((), NAMES), ("a.png", "clip.gif"), ((), ()))
    ]
    assert [line["text"] for line in lines[:5]] == [one.text for one in alone]
    assert [line["metadata"]["vision_tokens"] for line in lines[:5]] == [one.vision_tokens for one in alone]
    assert "different sizes" in lines[5]["metadata"]["error"] and "1 could not be answered" in err
    assert "image mode anyres (order hf), pad for each of several pictures, backend" in err
    named = [None, None, NAMES, ["clip.gif"], None, [*NAMES, "wide.png"]]
    assert [line["metadata"].get("frames") for line in lines] == named


def test_other_frames_are_another_question_and_are_not_answered_twice(questions):
    questions(ASKED[:4])
    lines, err = questions(ASKED[:4])
    assert len(lines) == 4 and "0 questions in" in err
    swapped = {"frames": NAMES[::-1]}
    lines, err = questions([*ASKED[:2], swapped, ASKED[3]])
    assert len(lines) == 5 and "1 question in" in err and "belong to no question" in err
    assert [line["metadata"]["frames"] for line in lines if line["question_id"] == 2] == [NAMES[::-1], NAMES]


def test_the_mode_of_several_pictures_is_recorded(questions):
    """Tiles for all of them are another setting than tiles for the only one."""
    lines, _ = questions(ASKED[:2])
    assert {line["metadata"]["settings"]["image_mode"] for line in lines} == {"anyres or pad"}
    _, err = questions(ASKED[:2], "--image-mode", "anyres", code=2)
    assert "was answered with image_mode 'anyres or pad', not 'anyres'" in err
    lines, err = questions(ASKED[:3], "--image-mode", "auto")
    assert len(lines) == 3 and "1 question in" in err


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ({"frames": 3}, "the frames in line 1 of q.jsonl is neither a file name nor a list of them; fix it"),
        ({"frames": [3]}, "the frames in line 1"),
        ({"video": "x"}, "has 'video' and no \"image\""),
        ({"clip": "x.mp4"}, "has 'clip' and no \"image\""),
        ({"clip": "x.webm"}, "has 'clip' and no \"image\""),
    ],
)
def test_what_names_no_frames_is_refused(questions, question, words):
    assert words in questions([question], code=2)[1]


# ---------------------------------------------------------------- conversations


def test_a_conversation_about_frames(talk, folder, files):  # noqa: F811
    lines = [
        "what?",
        "/frames b.png",
        "/frames b.png c.png",
        "/frames -",
        "/frames 'clip.gif'",
        "/image a.png",
        "what <image><video>?",
    ]
    lines += ["/stats", "/clear", "what?", "/clear all", "/frames -", "<video>?", "/frames", "/frames - a.png"]
    flags = "--model", folder, "-n", 3, "--frames", *NAMES, "--prune", "random:retention=0.5"
    code, out, err = talk(lines, *flags)
    assert code == 0 and out.count("\n") == 3, err
    said = [
        "Ask a question about 3 frames of a video; ",
        "frames for the next question: 1\n", "frames for the next question: 2\n",
        "frames for the next question: none\n",
        "frames for the next question: 3\n", "pictures for the next question: a.png\n",
        "so that random can prune the new pictures", "1 picture, 6 frames, ",
        "new conversation about a.png, 3 frames of a video\n", "new conversation, without pictures",
        "error: no frames wait for the next question; /frames PATH ... adds them\n",
        "error: the prompt has a <video>, and there is no video; give its frames with --frames (in a chat: /frames)\n",
        "error: /frames needs a path; give /frames PATH\n", "error: a frame cannot be read from the terminal; ",
    ]  # fmt: skip
    places = [err.find(words) for words in said]
    assert -1 not in places and places == sorted(places), [w for w, at in zip(said, places, strict=True) if at < 0]


def test_new_frames_alone_are_pruned_too(talk, folder, files):  # noqa: F811
    lines = ["what?", "/frames b.png", "what?", "what?"]
    _, _, err = talk(lines, "--model", folder, "-n", 3, "--prune", "random")
    assert "so that random can prune the new pictures" in err and err.count("processed again") == 1


def test_a_later_picture_of_a_conversation_is_said_to_be_one_square(talk, folder, files):  # noqa: F811
    lines, said = ["what?", "/image b.png", "what?", "what?"], "is one padded square; "
    _, _, err = talk(lines, "--model", folder, "-n", 3, "--image", "a.png")
    assert err.count(said) == 1 and f"note: the first picture stays in tiles, a later one {said}" in err
    assert "image mode anyres (order hf), pad for each of several pictures," in err
    for mode in ("anyres", "pad"):
        assert said not in talk(lines, "--model", folder, "-n", 3, "--image", "a.png", "--image-mode", mode)[2]


def test_pictures_of_which_none_is_in_tiles_are_said_to_be_squares(talk, folder, files):  # noqa: F811
    """Two that come after a question without any; one that comes after two."""
    for lines, flags in ((["what?", "/image a.png b.png"], ()), (["what?", "/image c.png"], ("a.png", "b.png"))):
        _, _, err = talk([*lines, "what?"], "--model", folder, "-n", 3, *(("--image", *flags) if flags else ()))
        assert "note: each of several pictures is one padded square; --image-mode anyres cuts every picture" in err


def test_frames_for_another_model_are_refused_in_a_conversation(talk, files):  # noqa: F811
    _, _, err = talk(["/frames a.png"])
    assert "error: only LLaVA-OneVision takes the frames of a video; give them as pictures with /image\n" in err
