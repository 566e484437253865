"""Pictures of kept tokens: the right tokens are veiled, and the page works in a real browser."""

import re
import shutil
import subprocess

import pytest
import torch
from PIL import Image

from model import load
from model.pruning import make_method
from tests.paths import DEMO, DEMO_PICTURE
from tests.seeds import torch_random
from tools import show_pruning
from tools.show_pruning import Shown, layer_class, look, page, veiled

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
BROWSER = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-component-update",
    "--disable-background-networking", "--disable-sync", "--virtual-time-budget=3000",
]  # fmt: skip


def hand_made(prompt="What?", seed=0, pictures=2):
    """2 layers, 3 heads, pictures of 4 x 4 tokens; heads keep different tokens."""
    keep = torch.rand(2, 3, pictures, 16, generator=torch_random(seed)) < 0.5
    squares = [Image.new("RGB", (40, 40), colour) for colour in ((200, 30, 30), (20, 60, 220))[:pictures]]
    return Shown(prompt, "plphp", squares, keep, [0.3, 0.05], (0.25, 0.1), 2_000_000, 1_000_000)


def test_the_veil_lies_on_dropped_tokens_and_on_no_other():
    shown = hand_made()
    for picture in range(2):
        kept = shown.keep[1, 2, picture]
        pixels = veiled(shown.pictures[picture], kept)
        clear = torch.tensor(shown.pictures[picture].getpixel((0, 0))) / 255
        for token in range(16):
            part = pixels[token // 4 * 10 : token // 4 * 10 + 10, token % 4 * 10 : token % 4 * 10 + 10]
            if kept[token]:
                assert torch.equal(part, clear.expand(10, 10, 3))
            else:  # pale and grey
                assert (part > 0.8).all() and part.std(dim=2).max() < 1e-6
    odd = veiled(Image.new("RGB", (7, 7)), torch.tensor([True, False, False, True]))  # 2 x 2 tokens of 3.5 pixels
    assert (odd[..., 0] == 0).sum() == 4 * 4 + 3 * 3


def test_a_figure_has_a_panel_for_each_layer_head_and_picture(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    first, second = hand_made(), hand_made("Else?", seed=1)
    show_pruning.draw(first, second, [0, 1], [0, 2], tmp_path / "a.png")
    panels = [axis for axis in figures[0].axes if axis.get_title().startswith("layer")]
    assert len(panels) == 2 * 2 * 2
    for axis in panels:
        layer, head, picture, count = map(int, re.findall(r"\d+", axis.get_title())[:4])
        kept = first.keep[layer, head, picture - 1]
        assert count == kept.sum() and len(axis.patches) == (kept ^ second.keep[layer, head, picture - 1]).sum()
    written = {int(text.get_text()) for axis in figures[0].axes for text in axis.texts if text.get_text().isdigit()}
    assert written == set(first.keep.sum((2, 3)).flatten().tolist())
    assert Image.open(tmp_path / "a.png").width > 900


def test_classes_have_plphps_borders():
    assert [layer_class(g, (0.25, 0.1)) for g in (0.25, 0.2499, 0.1, 0.0999)] == [
        "attentive", "balanced", "balanced", "indifferent",
    ]  # fmt: skip


def test_what_is_shown_is_what_run_py_keeps():
    demo, method = load(DEMO, "fp32"), make_method("plphp-ada:r=0.3,dr=0.1")
    shown = look(demo, "Count the objects.", [DEMO_PICTURE], method)
    from model import Generation, Sampling

    generation = Generation(demo, "Count the objects.", [DEMO_PICTURE], Sampling(1), prune=method)
    "".join(generation)
    assert shown.keep.shape == (6, 4, 1, 256)
    assert [k.sum().item() / 4 for k in shown.keep] == pytest.approx(generation.kept)
    assert shown.bytes_held == generation.bytes_held and shown.keep[2].sum((1, 2)).unique().numel() > 1


# ---------------------------------------------------------------- the page


def dom(tmp_path, html, fragment, script=""):
    """The page's DOM in a real browser after its own script and then `script`."""
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
    """CSS classes of the tokens of each picture, in order."""
    pictures = re.findall(r"<svg.*?</svg>", tree, flags=re.S)
    return [re.findall(r'<rect[^>]*class="(\w+)"', svg) for svg in pictures]


def expected(kept):
    return [["kept" if k else "dropped" for k in picture] for picture in kept.tolist()]


def test_the_page_steps_through_layers_and_heads(tmp_path):
    shown = hand_made()
    html = page(shown)
    assert drawn(dom(tmp_path, html, "")) == expected(shown.keep[0, 0])
    assert drawn(dom(tmp_path, html, "layer=1&head=2")) == expected(shown.keep[1, 2])
    press = "for (const key of ['ArrowDown', 'ArrowLeft']) document.dispatchEvent(new KeyboardEvent('keydown', {key}));"
    tree = dom(tmp_path, html, "", press)
    assert drawn(tree) == expected(shown.keep[1, 2]) and "layer 1, KV head 2" in tree
    click = "document.querySelectorAll('td.count')[4].click();"  # layer 1, head 1
    tree = dom(tmp_path, html, "", click)
    assert drawn(tree) == expected(shown.keep[1, 1])
    counts = [int(n) for n in re.findall(r'<td class="count[^>]*>(\d+)</td>', tree)]
    assert counts == shown.keep.sum((2, 3)).flatten().tolist()
    assert "1.00 MB held (50 %)" in tree and "0.050 indifferent" in tree and "0.300 attentive" in tree


def test_the_page_shows_the_difference_of_two_questions(tmp_path):
    first, second = hand_made(), hand_made("</script><b>Else?", seed=1)
    html = page(first, second)
    point = "document.querySelector('rect').dispatchEvent(new MouseEvent('mouseenter'));"
    tree = dom(tmp_path, html, "layer=1&head=0&mode=2", point)
    names = {(True, True): "kept", (False, False): "dropped", (True, False): "first", (False, True): "second"}
    pairs = zip(first.keep[1, 0].tolist(), second.keep[1, 0].tolist(), strict=True)
    assert drawn(tree) == [[names[p] for p in zip(a, b, strict=True)] for a, b in pairs]
    assert drawn(dom(tmp_path, html, "layer=1&head=0&mode=1")) == expected(second.keep[1, 0])
    keepers = [h for h in range(3) if second.keep[1, h, 0, 0]]
    words = "heads " + ", ".join(map(str, keepers)) if keepers else "no head"
    assert f"token 0 (row 0, column 0): kept in layer 1 by {words}; by {int(second.keep[:, :, 0, 0].sum())} of" in tree


def test_the_page_needs_nothing_from_outside():
    html = page(hand_made())
    assert not re.search(r'(?:src|href)="(?!data:)|@import|url\(', html)
    assert "http" not in html.replace("http://www.w3.org/2000/svg", "")


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ([], "--image"),
        (["--image", str(DEMO_PICTURE), "--prompt", ""], "the question is empty"),
        (["--image", str(DEMO_PICTURE), "--second", ""], "--second is empty"),
        (["--image", str(DEMO_PICTURE), "--second", " \n"], "--second is empty"),
        (["--image", "/nowhere.png"], "/nowhere.png"),
        (["--image", str(DEMO_PICTURE), "--layers", "6"], "--layers"),
        (["--image", str(DEMO_PICTURE), "--heads", "-1"], "--heads"),
        (["--image", str(DEMO_PICTURE), "--prune", "none"], "none"),
        (["--image", str(DEMO_PICTURE), "--prune", "plphd"], "plphd"),
        (["--image", str(DEMO_PICTURE), "--retention", "2"], "2"),
        (["--image", str(DEMO_PICTURE), "--out", "/nowhere/a.png"], "/nowhere"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(flags, word, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        show_pruning.main(["--prompt", "What?", "--out", str(tmp_path / "a.png"), *flags])
    (line,) = capsys.readouterr().err.splitlines()
    assert left.value.code == 2 and line.startswith("error: ") and word in line


def test_picture_and_page_are_written(tmp_path, capsys):
    out, html = tmp_path / "a.png", tmp_path / "a.html"
    asked = ["--image", str(DEMO_PICTURE), "--prompt", "What?", "--second", "Why?", "--prune", "random"]
    show_pruning.main([*asked, "--out", str(out), "--html", str(html)])
    assert Image.open(out).size[0] > 900 and "Why?" in html.read_text()
    assert capsys.readouterr().err.split() == [str(out), str(html)]
