"""What `--show` draws: the right tokens under the veil, and a page that a real browser steps through."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from model import Checkpoint, Generation, InputError, Sampling, load
from model import show as module
from model.show import CELL, GAP, MARGIN, Area, Shown, draw, layer_class, page, panel, save
from tests.paths import DEMO, DEMO_PICTURE, ROOT
from tests.seeds import torch_random
from tools import make_checkpoint
from tools.evaluation.replay import asked_by

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
BROWSER = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-component-update",
    "--disable-background-networking", "--disable-sync", "--virtual-time-budget=3000",
]  # fmt: skip
PAIR = [ROOT / "assets" / "pair-a.png", ROOT / "assets" / "pair-b.png"]


def hand_made(prompt="What?", seed=0, pictures=2):
    """2 layers, 3 heads, pictures of 4 x 4 tokens, each head keeping others."""
    keep = torch.rand(2, 3, 16 * pictures, generator=torch_random(seed)) < 0.5
    areas = [
        Area(f"picture {i + 1}", Image.new("RGB", (40, 40), colour), torch.arange(16 * i, 16 * i + 16).view(4, 4))
        for i, colour in enumerate([(200, 30, 30), (20, 60, 220)][:pictures])
    ]
    flags = "--prune plphp:r=0.4"
    return Shown(prompt, "plphp", flags, 0.4, areas, keep, 2e6, 1e6, [0.3, 0.05], (0.25, 0.1))


def answered(prune, images=(DEMO_PICTURE,), prompt="Count the objects.", folder=DEMO):
    """A Generation that remembers, one token long."""
    generation = Generation(load(folder, "fp32"), prompt, list(images), Sampling(1), prune=prune, remember=True)
    "".join(generation)
    return generation


def pixels_of(picture):
    """(H, W, 3) int32."""
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.view(picture.height, picture.width, 3).int()


def data_of(html):
    return json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', html, flags=re.S)[1])


# ---------------------------------------------------------------- the figure


@pytest.mark.parametrize("colour", ["white", "black", (185, 185, 185), (135, 135, 135), "red"])
def test_the_veil_shows_on_dropped_tokens_of_every_colour_and_on_no_other(colour):
    area = Area("", Image.new("RGB", (60, 40), colour), torch.arange(24).view(4, 6))
    kept = torch.rand(4, 6, generator=torch_random(3)) < 0.5
    picture = panel(area, kept)
    step, clear = CELL // 6, pixels_of(area.image)[0, 0]
    assert picture.size == (6 * step, 4 * step)
    pixels = pixels_of(picture)
    for row, column in torch.cartesian_prod(torch.arange(4), torch.arange(6)).tolist():
        part = pixels[row * step : (row + 1) * step, column * step : (column + 1) * step]
        if kept[row, column]:
            assert (part == clear).all()
        else:  # where the grey is the picture's own, the hatch still differs
            far = (part - clear).abs().amax(2)
            assert (far > 30).float().mean() > 0.1 and (part - part.float().mean(2, keepdim=True)).abs().max() < 60


def test_tokens_that_only_one_question_keeps_are_framed():
    area = Area("", Image.new("RGB", (20, 20), "white"), torch.arange(4).view(2, 2))
    pixels = pixels_of(panel(area, torch.tensor([[1, 1], [0, 0]]).bool(), torch.tensor([[1, 0], [1, 0]]).bool()))
    step = CELL // 2
    corners = [pixels[y * step + 1, x * step + 1].tolist() for y in (0, 1) for x in (0, 1)]
    orange, blue = [0xD5, 0x5E, 0x00], [0x00, 0x72, 0xB2]
    assert corners[0] == [255] * 3 and corners[1] == orange and corners[2] == blue
    assert corners[3] not in (orange, blue, [255] * 3)


def find(sheet, column, wanted):
    """The rows of a figure at which this panel stands in this column of cells. Its frame is not looked at."""
    inner = pixels_of(wanted)[1:-1, 1:-1]
    high, wide, _ = inner.shape
    left = MARGIN + column * (CELL + GAP) + 1
    strip = sheet[:, left : left + wide]
    starts = (strip[: len(strip) - high] == inner[0]).flatten(1).all(1).nonzero().flatten().tolist()
    return [y for y in starts if torch.equal(strip[y : y + high], inner)]


def last_rows(generation):
    """In plain PyTorch, what the prompt's last row attends to in each layer: (L, Hq, T) float64; spans of pictures."""
    asked = asked_by(generation, [])
    rows = []
    for q, k, *_ in asked.layers:
        k = k[0].repeat_interleave(q.shape[1] // k.shape[1], 0)
        rows.append((q[0, :, -1:].double() @ k.double().mT * q.shape[3] ** -0.5).softmax(-1)[:, 0])
    return torch.stack(rows), asked.spans


def by_last_row(generation, retention):
    """(L, Hkv, V) bool: of each picture what the last row attends to most, as many in every head."""
    rows, spans = last_rows(generation)
    heads = rows.view(len(rows), 4, -1, rows.shape[2]).mean(2)
    pictures = [heads[..., start:stop] for start, stop in spans]
    best = [part.topk(int(retention * part.shape[2] + 0.5)).indices for part in pictures]
    kept = [torch.zeros_like(part).scatter(2, i, 1).bool() for part, i in zip(pictures, best, strict=True)]
    return torch.cat(kept, 2)


def test_the_drawn_tokens_are_those_that_the_method_keeps(tmp_path):
    generation = answered("topk:retention=0.3", PAIR, "Compare the two pictures.")
    expected = by_last_row(generation, 0.3)
    shown = Shown.of(generation)
    assert torch.equal(shown.keep, expected)
    save(generation, tmp_path / "a.png")
    sheet = pixels_of(Image.open(tmp_path / "a.png"))
    rows = []
    for layer in (1, 3, 5):
        for column, (head, number) in enumerate([(0, 0), (0, 1), (3, 0), (3, 1)]):
            kept = expected[layer, head, 256 * number : 256 * number + 256].view(16, 16)
            area = Area("", generation.pictures[number].squares[0], None)
            (row,) = find(sheet, column, panel(area, kept))
            rows.append(row)
    assert rows == sorted(rows) and len(set(rows)) == 3
    save(generation, tmp_path / "a.html")
    data = data_of((tmp_path / "a.html").read_text())
    bits = [["".join(areas) for areas in layer] for layer in data["questions"][0]["keep"]]
    assert bits == [["".join("01"[t] for t in head) for head in layer] for layer in expected.int().tolist()]
    assert data["questions"][0]["counts"] == expected.sum(2).tolist()


def test_a_map_has_the_colour_of_the_number_of_heads():
    counts = torch.tensor([[0, 6, 12]])
    pixels = pixels_of(module.heat(counts, 12, 90, 30))
    assert pixels.shape == (30, 90, 3)
    assert [pixels[15, x].tolist() for x in (10, 45, 80)] == [[0, 34, 78], [125, 124, 120], [254, 232, 56]]


def test_a_number_that_all_heads_share_is_written_once(monkeypatch):
    said, drawn = [], module._lines
    monkeypatch.setattr(module, "_lines", lambda text, *rest, **more: said.append(text) or drawn(text, *rest, **more))
    draw(Shown.of(answered("topk:retention=0.3")))
    assert sum("77 of 256" in text for text in said) == 1
    assert "Layers 1, 3, 5 of 6, KV heads 0, 1, 2, 3 of 4 (numbered from 0):" in said
    assert not any("by layer (down)" in text for text in said)
    said.clear()
    draw(Shown.of(answered("plphp-ada")))
    assert any("by layer (down)" in text for text in said) and not any("Every head" in text for text in said)


def test_fastv_drops_for_all_later_layers_and_the_last_row_goes_on():
    generation = answered("fastv:layer=3,retention=0.25")
    keep = Shown.of(generation).keep
    assert keep[:3].all() and [k.sum().item() for k in keep[3:].flatten(0, 1)] == [64] * 12
    assert (keep[3:] == keep[3, 0]).all()
    rows, ((start, stop),) = last_rows(generation)
    row = rows[2].mean(0)[start:stop]
    assert keep[3, 0].nonzero().flatten().tolist() == sorted(row.topk(64).indices.tolist())
    assert generation.kept == pytest.approx(keep.sum(2).double().mean(1).tolist())


def test_what_is_remembered_agrees_with_the_cache_and_costs_nothing_otherwise():
    generation = answered("plphp-ada:r=0.3,dr=0.1", PAIR, "Compare the two pictures.")
    held = generation.masks.sum(2).flatten(1)
    assert torch.equal(held, generation.cache.kv_len.long()) and held.unique().numel() > 6
    assert Shown.of(generation).bytes_held == generation.bytes_held
    row = 2 * 32 * 4  # bytes of a token in one head: K and V, fp32
    assert Shown.of(generation).bytes_full == pytest.approx(6 * 4 * generation.prompt_tokens * row)
    plain = Generation(generation.checkpoint, "What?", [DEMO_PICTURE], Sampling(1), prune="random")
    "".join(plain)
    assert plain.masks is None
    with pytest.raises(InputError, match="remember=True"):
        save(plain, "kept.png")
    with pytest.raises(InputError, match="no picture"):
        save(answered(None, ()), "kept.png")


def test_an_unpruned_answer_says_that_all_is_kept(tmp_path):
    generation = answered(None)
    shown = Shown.of(generation)
    assert shown.title == "unpruned: all 24 heads keep all 256 vision tokens" and shown.flags == "--prune none"
    figure, pruned = draw(shown), draw(Shown.of(answered("random")))
    assert figure.width == pruned.width and figure.height < pruned.height / 2  # the picture alone
    (_,) = find(pixels_of(figure), 0, panel(shown.areas[0], torch.ones(16, 16).bool()))


def test_titles_name_method_settings_and_what_was_asked_for_and_kept():
    shown = Shown.of(answered("topk:retention=0.3"))
    assert shown.title == "topk: 30.1 % of the vision tokens kept, 30.0 % asked for"
    assert shown.flags.startswith("--prune topk:") and "retention=0.3" in shown.flags
    quoted = Shown.of(answered("topk:rates=[1,1,0.5,0.5,0.5,0.5]"))
    assert "'topk:rates=[1, 1, 0.5, 0.5, 0.5, 0.5]" in quoted.flags  # a shell would split it
    assert quoted.title == "topk: 66.7 % of the vision tokens kept"


@pytest.fixture(scope="module")
def in_tiles(tmp_path_factory):
    """A LLaVA-NeXT whose tiles have 56 x 56 pixels and 4 x 4 tokens."""
    folder = tmp_path_factory.mktemp("next")
    make_checkpoint.main([str(folder), "--shape", "tiny-next"])
    return folder


def test_the_page_and_the_figure_show_the_tiles_of_llava_next(in_tiles):
    wide = Image.new("RGB", (300, 90), (10, 200, 30))
    generation = answered("grid:retention=0.5", (wide,), "What?", in_tiles)
    shown = Shown.of(generation)
    whole, tiles = shown.areas
    assert (whole.name, tiles.name) == ("whole", "tiles") and whole.tokens.flatten().tolist() == list(range(16))
    places = generation.places[0]  # of each token; those below the whole picture are the tiles'
    numbers = places[tiles.tokens.flatten()]
    rows, columns = tiles.tokens.shape
    assert numbers.tolist() == [[4 + r, c] for r in range(rows) for c in range(columns)]
    newlines = set(range(16, generation.vision_tokens)) - set(tiles.tokens.flatten().tolist())
    assert len(newlines) == rows and all(places[n, 1] == columns for n in newlines)
    assert tiles.image.width == 14 * columns and tiles.image.height == 14 * rows
    green = pixels_of(tiles.image)[7:-7]  # a border of the canvas may fill a part of the outermost patches
    assert (green - torch.tensor([10, 200, 30])).abs().max() < 3
    assert draw(shown).width == module.WIDTH
    assert [area["shape"] for area in data_of(page(shown))["areas"]] == [[4, 4], [rows, columns]]


def test_a_picture_in_four_parts_is_joined_in_its_order(in_tiles):
    """Each quarter of a square picture has another colour."""
    picture = Image.new("RGB", (112, 112))
    for i, colour in enumerate([(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0)]):
        picture.paste(colour, (i % 2 * 56, i // 2 * 56, i % 2 * 56 + 56, i // 2 * 56 + 56))
    _, tiles = Shown.of(answered("random", (picture,), "What?", in_tiles)).areas
    assert tiles.tokens.shape == (8, 8) and tiles.image.tobytes() == picture.tobytes()
    assert tiles.tokens[1, 0] == 16 + 9


@pytest.mark.parametrize("size", [(3000, 2), (1, 900)])
@pytest.mark.parametrize("method", ["grid", "downsample", "hired"])
def test_tiles_that_show_nothing_of_a_very_thin_picture_are_not_drawn(in_tiles, method, size):
    generation = answered(f"{method}:retention=0.5", (Image.new("RGB", size),), "What?", in_tiles)
    assert len(generation.pictures[0].squares) > 1 and generation.wanted == 0.5
    shown = Shown.of(generation)
    assert [area.name for area in shown.areas] == ["whole"] and draw(shown).width == module.WIDTH
    assert [area["shape"] for area in data_of(page(shown))["areas"]] == [[4, 4]]


def test_the_committed_figure_is_current_and_readable_where_it_is_shown():
    shown = Shown.of(answered("plphp:retention=0.3", prompt="Describe the picture."))
    drawn, committed = draw(shown), Image.open(ROOT / "assets" / "kept.png").convert("RGB")
    assert drawn.size == committed.size
    assert (pixels_of(drawn) - pixels_of(committed)).abs().float().mean() < 3  # other versions draw letters differently
    width = int(re.search(r'assets/kept.png" width="(\d+)"', (ROOT / "README.md").read_text())[1])
    assert module.SMALL * width / module.WIDTH > 11


@pytest.mark.parametrize("text", ["short", "many words " * 200, "x" * 3000, "a\nb\n\nc\nd\ne", "é 你 \u202e", ""])
def test_a_title_of_any_length_and_letters_fits(text):
    lines = module._lines(text, 28)
    assert lines.width == module.WIDTH - 2 * MARGIN and lines.height <= 4 * 35
    pixels = pixels_of(lines)
    assert (pixels[:, -1] == 255).all() and bool((pixels < 128).any()) == bool(text)


def test_classes_have_plphps_borders():
    assert [layer_class(g, (0.25, 0.1)) for g in (0.25, 0.2499, 0.1, 0.0999)] == [
        "attentive", "balanced", "balanced", "indifferent",
    ]  # fmt: skip


# ---------------------------------------------------------------- the page


@pytest.mark.skipif(CHROMIUM is None, reason="needs a browser")
def test_dropped_tokens_of_the_page_are_grey_and_hatched_on_every_colour(tmp_path):
    image = Image.new("RGB", (240, 120), (185, 185, 185))
    image.paste((220, 20, 20), (0, 0, 120, 120))
    keep = torch.arange(18).view(1, 1, 18) % 2 == 0
    shown = Shown("What?", "topk", "", 0.5, [Area("", image, torch.arange(18).view(3, 6))], keep, 1e6, 5e5)
    (tmp_path / "a.html").write_text(page(shown))
    shot = [f"--screenshot={tmp_path}/a.png", f"file://{tmp_path}/a.html"]
    subprocess.run([CHROMIUM, *BROWSER, *shot], capture_output=True, check=True, timeout=60)
    pixels = pixels_of(Image.open(tmp_path / "a.png").convert("RGB")).int()
    red = (pixels - torch.tensor([220, 20, 20])).abs().amax(2) < 3
    rows, columns = red.any(1).nonzero().flatten(), red.any(0).nonzero().flatten()
    top, bottom, left, step = rows[0] + 2, rows[-1] - 2, columns[0], (columns[-1] - columns[0] + 1) // 3
    for place in (1, 3, 5):  # columns of dropped tokens
        part = pixels[top:bottom, left + place * step + 4 : left + (place + 1) * step - 4]
        assert (part.amax(2) - part.amin(2)).max() < 5 and part.max() > 245 and part.min() < 80


def dom(tmp_path, html, fragment, script=""):
    """The page's tree after its script ran, in a real browser; script runs behind it."""
    if CHROMIUM is None:
        pytest.skip("no chromium here: `apt-get install chromium`")
    path = tmp_path / "page.html"
    path.write_text(html.replace("</html>", f"<script>{script}</script></html>"), encoding="utf-8")
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    url = f"{path.as_uri()}#{fragment}"
    done = subprocess.run([CHROMIUM, *BROWSER, profile, "--dump-dom", url], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def drawn(tree):
    """Classes of the tokens of each picture, in order."""
    pictures = re.findall(r'<svg class="area".*?</svg>', tree, flags=re.S)
    return [re.findall(r'<rect[^>]*class="([\w ]+)"', svg) for svg in pictures]


def expected_classes(kept):
    """kept (V,) of pictures of 16 tokens."""
    return [["kept" if k else "dropped" for k in picture] for picture in kept.view(-1, 16).tolist()]


def test_a_question_cannot_end_the_script_that_holds_it():
    wanted, html = page(hand_made("What?")).count("<"), page(hand_made("</script><b>What?"))
    assert html.count("<") == wanted and "What?" in html


def test_the_page_steps_through_layers_and_heads(tmp_path):
    shown = hand_made()
    html = page(shown)
    assert drawn(dom(tmp_path, html, "")) == expected_classes(shown.keep[0, 0])
    assert drawn(dom(tmp_path, html, "layer=1&head=2")) == expected_classes(shown.keep[1, 2])
    press = "for (const key of ['ArrowDown', 'ArrowLeft']) document.dispatchEvent(new KeyboardEvent('keydown', {key}));"
    tree = dom(tmp_path, html, "", press)
    assert drawn(tree) == expected_classes(shown.keep[1, 2]) and "layer 1, KV head 2" in tree
    click = "document.querySelectorAll('td.count')[4].click();"  # layer 1, head 1
    tree = dom(tmp_path, html, "", click)
    assert drawn(tree) == expected_classes(shown.keep[1, 1])
    counts = [int(n) for n in re.findall(r'<td class="count[^>]*>(\d+)</td>', tree)]
    assert counts == shown.keep.sum(2).flatten().tolist()
    assert "1.00 MB held (50 %)" in tree and "0.050 indifferent" in tree and "0.300 attentive" in tree
    assert "--prune plphp:r=0.4" in tree and shown.title in tree


def test_the_page_shows_which_heads_keep_a_token_and_how_many(tmp_path):
    shown = hand_made()
    point = "document.querySelectorAll('svg.area rect')[21].dispatchEvent(new Event('mouseenter'));"  # of the second
    tree = dom(tmp_path, page(shown), "layer=1&head=0&mode=1", point)
    framed = ["keeps" in words for words in re.findall(r'<td class="(count[^"]*)"', tree)]
    assert framed == shown.keep[:, :, 21].flatten().tolist()
    assert f"by {sum(framed)} of all 6 heads" in tree and "token 5 (row 1, column 1)" in tree
    shades = re.findall(r"<rect[^>]*fill: (rgb\([^)]*\))", tree)
    counts = shown.keep.sum((0, 1)).tolist()
    assert len(shades) == 32 and len(set(zip(shades, counts, strict=True))) == len(set(shades)) == len(set(counts))


def test_the_page_shows_the_difference_of_two_questions(tmp_path):
    first, second = hand_made(), hand_made("</script><!--<script><b>Else?", seed=1)
    html = page(first, second)
    point = "document.querySelector('svg.area rect').dispatchEvent(new MouseEvent('mouseenter'));"
    tree = dom(tmp_path, html, "layer=1&head=0&mode=2", point)
    names = {(1, 1): "kept", (0, 0): "dropped", (1, 0): "first", (0, 1): "second dropped"}
    pairs = torch.stack((first.keep[1, 0], second.keep[1, 0]), 1).int().view(-1, 16, 2).tolist()
    assert drawn(tree) == [[names[tuple(p)] for p in picture] for picture in pairs]
    assert drawn(dom(tmp_path, html, "layer=1&head=0&mode=1")) == expected_classes(second.keep[1, 0])
    keepers = [h for h in range(3) if second.keep[1, h, 0]]
    words = "heads " + ", ".join(map(str, keepers)) if keepers else "no head"
    assert f"token 0 (row 0, column 0): kept in layer 1 by {words}; by {int(second.keep[:, :, 0].sum())} of" in tree


def test_the_page_needs_nothing_from_outside():
    html = page(hand_made())
    assert not re.search(r'(?:src|href)="(?!data:)|@import|url\((?!#)', html)
    assert "http" not in html.replace("http://www.w3.org/2000/svg", "")


# ---------------------------------------------------------------- the flag


def asked(*flags):
    return ["--image", DEMO_PICTURE, "--prompt", "How many objects are there?", *flags]


def test_the_flag_draws_beside_the_answer(tmp_path, cli):
    out = tmp_path / "kept.PNG"
    out.write_text("an older file")
    code, answer, err = cli(*asked("--prune", "plphp", "--retention", "0.3", "--show", out))
    assert (code, answer) == (0, "The picture has four objects.\n") and err.splitlines()[-1].startswith(str(out))
    assert Image.open(out).width == module.WIDTH
    assert cli(*asked("--show", tmp_path / "kept.html", "--no-stream"))[0] == 0
    data = data_of((tmp_path / "kept.html").read_text())
    assert data["questions"][0]["title"].startswith("unpruned") and "0" not in data["questions"][0]["keep"][0][0][0]


def test_a_disk_that_is_full_ends_in_one_line_after_the_answer(tmp_path, failing, cli):
    failing(Path, "write_bytes", OSError(28, "No space left on device"))
    code, answer, err = cli(*asked("--show", tmp_path / "a.png"))
    assert (code, answer) == (1, "The picture has four objects.\n")
    assert err.splitlines()[-1].startswith(f"error: {tmp_path}/a.png cannot be written (No space left")


REFUSED = {  # words of the error: flags
    ".png or .html": ["--show kept.jpg", "--show kept", "--show="],
    "/nowhere": ["--show /nowhere/kept.png"],
    "cannot be written": ["--show {folder}/a.png"],  # a folder
    "would replace": ["--show {folder}/demo.png", "--show {folder}/link.png"],
    "--questions": ["--show kept.png --questions q.jsonl --answers a.jsonl"],
}


def test_what_cannot_be_drawn_is_refused_at_once(tmp_path):
    """In one line, and before torch is imported."""
    picture = shutil.copy(DEMO_PICTURE, tmp_path)
    (tmp_path / "link.png").symlink_to(picture)
    (tmp_path / "a.png").mkdir()
    given = [["--prompt", "What?", "--show", "kept.html"]]  # no picture
    for flags in (flags.format(folder=tmp_path).split() for several in REFUSED.values() for flags in several):
        given.append(["--image", picture, *flags, *([] if "--questions" in flags else ["--prompt", "What?"])])
    code = (
        "import contextlib, json, sys, run\n"
        "for flags in json.loads(sys.argv[1]):\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        sys.exit(run.main(flags))\n"
        "    assert 'torch' not in sys.modules, flags\n"
    )
    done = subprocess.run([sys.executable, "-c", code, json.dumps(given)], cwd=ROOT, capture_output=True, text=True)
    lines = done.stderr.splitlines()
    assert done.returncode == 0 and not done.stdout and len(lines) == len(given), done.stderr
    for line, words in zip(
        lines, ["give --image", *(w for w, several in REFUSED.items() for _ in several)], strict=True
    ):
        assert line.startswith("error: ") and words in line
    assert Path(picture).read_bytes() == DEMO_PICTURE.read_bytes()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch, refused):
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(tmp_path))
    assert "cannot be written" in refused(*asked("--show", tmp_path / "a.png"))


def test_files_of_the_checkpoint_and_pictures_by_other_names_stay(tmp_path, failing, refused):
    failing(Checkpoint, "read_weights", AssertionError("weights were read"))
    link, picture = tmp_path / "kept.png", shutil.copy(DEMO_PICTURE, tmp_path / "x.png")
    link.symlink_to(DEMO / "config.json")
    assert "config.json, which this run reads" in refused(*asked("--show", link))
    assert "which this run reads" in refused("--image", picture.as_uri(), "--prompt", "What?", "--show", picture)
    assert picture.read_bytes() == DEMO_PICTURE.read_bytes()
