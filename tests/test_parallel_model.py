"""tools/parallel_model.py by hand, and beside a simulation of the ranks. tests/test_parallel.py counts real calls."""

import subprocess
import sys
from dataclasses import replace

import pytest

from tests.paths import ROOT
from tools import parallel_model, roofline
from tools.parallel_model import Collective, Link

SEVEN, THIRTEEN, ONEVISION = roofline.DIVIDED
H100 = roofline.GPUS["H100"]
LINK = Link("test", 100e9, 5e-6)


def sent_in_a_ring(kind, ranks, chunk):
    """Bytes that each rank sends in a ring until every one has the sum, or the parts, of all: chunk by chunk.

    chunk: bytes of 1 / ranks of the whole tensor.
    """
    # has[rank][i]: ranks whose numbers are in this rank's chunk i
    has, sent = [[{r} for _ in range(ranks)] for r in range(ranks)], [0] * ranks
    if kind == "all_gather":
        has = [[{r} if i == r else set() for i in range(ranks)] for r in range(ranks)]

    def turn(first, take):
        """Each rank sends one chunk to the next."""
        moves = [(r, (first + r) % ranks, set(has[r][(first + r) % ranks])) for r in range(ranks)]
        for r, i, numbers in moves:
            has[(r + 1) % ranks][i] = take(has[(r + 1) % ranks][i], numbers)
            sent[r] += chunk

    if kind == "all_reduce":
        for t in range(ranks - 1):
            turn(-t, set.union)
    for t in range(ranks - 1):
        turn(1 - t if kind == "all_reduce" else -t, lambda _, new: new)
    for r in range(ranks):
        assert all(has[r][i] == (set(range(ranks)) if kind == "all_reduce" else {i}) for i in range(ranks))
    assert len(set(sent)) == 1
    return sent[0]


@pytest.mark.parametrize("kind", ["all_reduce", "all_gather"])
@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_a_ring_sends_as_many_bytes_as_are_calculated(kind, ranks):
    one = Collective("x", kind, 3, 1000.0 * ranks)
    sent = sent_in_a_ring(kind, ranks, 1000)
    assert one.seconds(ranks, LINK) == pytest.approx(3 * (5e-6 + sent / 100e9))


def test_a_step_of_7b_with_two_ranks_by_hand():
    took = parallel_model.step_time(SEVEN, H100, 2, LINK, batch=4)
    layers, head = 32 * (4 * 4096**2 + 3 * 4096 * 11008), 32064 * 4096
    numbers = (65 + 1) * 4096 + (layers + head + 4 * 640 * 2 * 32 * 4096) / 2  # norms and one row are whole
    assert took.work == pytest.approx(2 * numbers / 3.35e12)
    reduced, gathered = 65 * 2 * 4 * 4096, 2 * 4 * 32064  # a ring of two: 2 * 1/2 and 1/2 of the bytes
    assert took.collectives == pytest.approx(66 * 5e-6 + (reduced + gathered / 2) / 100e9)
    assert parallel_model.step_time(SEVEN, H100, 1, None, 4).collectives == 0


def test_products_limit_a_large_batch_and_a_prefill():
    small = replace(SEVEN, vision=1, text=1)
    took = parallel_model.step_time(small, H100, 4, LINK, batch=2000)
    assert took.work == pytest.approx(small.decode_flops(2000) / 4 / 989e12)
    first = parallel_model.prefill_time(SEVEN, H100, 4, LINK)
    assert first.work == pytest.approx(SEVEN.prefill_flops() / 4 / 989e12)
    sent = 1.5 * (64 * 640 + 64) * 2 * 4096 + 1.5 * 8 + 0.75 * (2 * 32064 + 4 * 32 * 32)  # 64 rows of text, 640 in all
    assert first.collectives == pytest.approx((64 + 2 + 1 + 2) * 5e-6 + sent / 100e9)


def test_squares_are_divided_among_the_ranks():
    """5 squares: at most 3, 2 and 1 in a rank. The vision tokens of all are gathered before the prefill."""
    one, two, four, eight = (parallel_model.tower_time(ONEVISION, H100, ranks) for ranks in (1, 2, 4, 8))
    squares = ONEVISION.squares
    for took, ranks in ((two, 2), (four, 4), (eight, 8)):
        assert took / one == pytest.approx(-(-squares // ranks) / squares)
    assert parallel_model.tower_time(SEVEN, H100, 8) == parallel_model.tower_time(SEVEN, H100, 1)
    gathered = 2 * 3584 * 729 * squares
    plain = parallel_model.prefill(ONEVISION.config, ONEVISION.vision + ONEVISION.text, ONEVISION.text, 2)
    wanted = sum(one.seconds(2, LINK) for one in plain) + 5e-6 + gathered / 2 / 100e9
    assert parallel_model.prefill_time(ONEVISION, H100, 2, LINK).collectives == pytest.approx(wanted)


@pytest.mark.parametrize("shape", roofline.DIVIDED, ids=lambda shape: shape.name)
def test_what_each_rank_holds(shape):
    one, two, four = (parallel_model.weight_bytes(shape, ranks) for ranks in (1, 2, 4))
    assert one == 2 * shape.resident_numbers and one - two == pytest.approx(2 * (two - four))
    tower = shape.tower.tower_numbers + shape.tower.projector_numbers(shape.config.hidden_size)
    whole = 2 * two - one  # of each rank
    assert 2 * tower < whole < 2 * tower + 0.02 * one


def test_where_heads_cannot_be_divided_and_where_more_gpus_stop_to_pay():
    assert [n for n in range(1, 41) if parallel_model.fits(ONEVISION.config, n)] == [1, 2, 4]
    assert [n for n in range(1, 41) if parallel_model.fits(THIRTEEN.config, n)] == [1, 2, 4, 8]
    numbers = 1, 2, 4, 8, 16, 32
    free = lambda ranks: Link("free", 1e18, 0.0)  # noqa: E731
    assert parallel_model.verdict(SEVEN, H100, numbers, 1, free) == (32, 32)
    assert parallel_model.verdict(SEVEN, H100, numbers, 1, lambda ranks: Link("slow", 1e18, 1e-3)) == (1, 1)
    assert parallel_model.verdict(ONEVISION, H100, numbers, 1, free) == (4, 4)
    assert [parallel_model.link_of(n).name for n in (2, 8, 16)] == ["NVLink", "NVLink", "InfiniBand"]


def test_the_command_prints_links_and_bytes():
    command = [sys.executable, ROOT / "tools" / "roofline.py", "--tp", "1", "8", "--batch", "32", "--shape", "13b"]
    told = subprocess.run([*command, "--link", "25", "--latency", "20"], capture_output=True, text=True, check=True)
    assert "25 GB/s: 25.0 GB/s, 20 us per collective" in told.stdout
    alone, eight = (line.split("|")[1:-1] for line in told.stdout.splitlines()[6:8])
    assert [cell.strip() for cell in alone[:6]] == ["32", "1", "", "26.70", "16.78", "12.68"]
    assert [cell.strip() for cell in eight[:5]] == ["32", "8", "25 GB/s", "3.92", "2.10"]
    expected = parallel_model.step_time(THIRTEEN, H100, 8, Link("", 25e9, 20e-6), 32)
    assert eight[5].strip() == f"{1e3 * expected.total:.2f}"
    for wrong in (["--link", "3"], ["--tp", "2", "--dtype", "fp32"], ["--tp", "2", "--gpu", "H100", "A100"]):
        failed = subprocess.run([*command[:2], *wrong], capture_output=True, text=True)
        assert failed.returncode == 2 and len(failed.stderr.splitlines()) == 1 and "; " in failed.stderr
