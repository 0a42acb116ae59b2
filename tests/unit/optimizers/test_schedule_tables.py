# SPDX-License-Identifier: Apache-2.0
"""Schedules from files, and the files that a run's gradient norms ask for (arXiv 2310.07831)."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import pytest
import torch

from ds_blockwise import BlockwiseLR
from ds_blockwise.optimizers.schedules.refine import refine, running_median
from ds_blockwise.optimizers.schedules.table import Table, read_table, write_table

PEAK, FLOOR = 1e-3, 1e-4


def rates(path: Path, total: int, warmup: int = 0, begin: int = 0) -> list[float]:
    """Every rate of a run, which may have been resumed at an update."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=PEAK)
    schedule = BlockwiseLR(optimizer, total, warmup, FLOOR, shape="table", table=str(path))
    if begin:
        schedule.load_state_dict({"last_batch_iteration": begin - 1})
    found = []
    for _ in range(begin, total + 1):
        found += schedule.get_last_lr()
        schedule.step()
    return found


def test_a_table_is_followed_from_the_end_of_the_warm_up_to_the_end_of_the_run(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("fraction,factor\n0,0.5\n0.25,1\n1,0.2\n")
    heights = [0.5, 0.75, 1.0, *(1 - 0.8 * k / 6 for k in range(1, 6))]
    expected = [0.0, PEAK / 2, *(FLOOR + height * (PEAK - FLOOR) for height in heights), FLOOR]
    assert rates(path, 10, 2) == pytest.approx(expected, rel=1e-12)
    assert rates(path, 10, 2, begin=5) == rates(path, 10, 2)[5:]


def test_a_written_table_reads_as_the_same_numbers(tmp_path: Path) -> None:
    table = Table((0.0, 1 / 3, 1.0), (1.0, 0.1 + 0.2, 0.0))
    write_table(tmp_path / "table.csv", table)
    assert read_table(tmp_path / "table.csv") == table
    assert [table.at(x) for x in table.fractions] == list(table.factors)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot be read: .*No such file"),
        ("", "line 1 is '' instead of 'fraction,factor'"),
        ("step,lr\n0,1\n1,0\n", "line 1 is 'step,lr' instead"),
        ("fraction,factor\n0,1\n0.5,x\n1,0\n", "line 3 is '0.5,x' instead of two numbers from 0 to 1"),
        ("fraction,factor\n0,1\n0.5\n1,0\n", "line 3 is '0.5' instead"),
        ("fraction,factor\n0,1\n0.5,1.5\n1,0\n", "line 3 is '0.5,1.5' instead"),
        ("fraction,factor\n0,1\n0.5,nan\n1,0\n", "line 3 is '0.5,nan' instead"),
        ("fraction,factor\n0,1\n0.5,1\n0.5,0\n1,0\n", "line 4 has fraction 0.5, which is not above"),
        ("fraction,factor\n0.1,1\n1,0\n", "must go from 0 to 1"),
        ("fraction,factor\n0,1\n0.9,0\n", "must go from 0 to 1"),
        ("fraction,factor\n0,1\n", "must go from 0 to 1"),
        (b"\xff\xfe\x00", "cannot be read: .*utf-8"),
    ],
)
def test_a_file_that_is_no_table_is_refused(tmp_path: Path, text: str | bytes | None, words: str) -> None:
    path = tmp_path / "table.csv"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=f"(?s)table.csv.*{words}"):
        rates(path, 10)


def test_a_table_that_is_no_path_is_refused() -> None:
    with pytest.raises(TypeError, match="must be the path of a CSV file"):
        read_table([[0, 1], [1, 0]])


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("steps", [range(1, 101), range(10, 1001, 10), [1, *range(50, 1001, 50), 1007]])
def test_constant_norms_give_the_linear_decay_to_zero(norm: str, steps: list[int]) -> None:
    """Also where not every update was read, or not all at the same distance."""
    table = refine(dict.fromkeys(steps, 0.37), norm=norm)  # type: ignore[arg-type]
    assert table.fractions[0] == 0.0 and table.fractions[-1] == 1.0
    assert table.factors == pytest.approx([1 - x for x in table.fractions], rel=1e-12, abs=1e-12)
    assert table.factors[-1] == 0.0


@pytest.mark.parametrize(("norm", "power"), [("l2", 2), ("l1", 1)])
def test_geometric_norms_give_their_closed_form(norm: str, power: int) -> None:
    """With w_t = q^t the sum behind t is geometric: eta_t = q^t (q^(t+1) - q^(T+1)) / (1 - q)."""
    q, last = 1.02, 60
    norms = {t: q ** (-t / power) for t in range(1, last + 1)}
    eta = [q**t * (q ** (t + 1) - q ** (last + 1)) / (1 - q) for t in norms]
    table = refine(norms, norm=norm, tau=0.0)  # type: ignore[arg-type]
    assert table.factors == pytest.approx([value / max(eta) for value in eta], rel=1e-10, abs=1e-12)
    assert 0 < table.factors.index(1.0) < last - 1, "norms that fall so fast ask for a warm-up"


def test_the_definition_on_norms_of_a_run_that_has_a_spike() -> None:
    """Algorithm 1 by hand: filter, weights, sums behind."""
    norms = [3 / (1 + 0.05 * t) + (20 if t == 40 else 0.01 * math.sin(7 * t)) for t in range(80)]
    half = 4  # the width is 9, the odd number next to 0.1 * 80
    padded = [norms[0]] * half + norms + norms[-2 : -2 - half : -1]
    smooth = [statistics.median(padded[t : t + 2 * half + 1]) for t in range(80)]
    weights = [value**-2 for value in smooth]
    eta = [weights[t] * sum(weights[t + 1 :]) for t in range(80)]
    table = refine(dict(enumerate(norms, start=1)))
    assert running_median(norms, 0.1) == smooth and max(smooth) < 4
    assert table.factors == pytest.approx([value / max(eta) for value in eta], rel=1e-10, abs=1e-12)


def test_the_running_median_mirrors_the_end_and_holds_the_start() -> None:
    """By hand, width 3: (10, 11, 10) at the end, where a repeated last value would give 11; (1, 1, 2) at the start."""
    values = [float(k) for k in range(1, 12)]
    assert running_median(values, 0.3) == [*values[:10], 10.0]
    assert running_median(values, 0.0) == values


@pytest.mark.parametrize(
    ("norms", "tau", "words"),
    [
        (dict.fromkeys(range(9), 1.0), 0.1, "too few gradient norms to refine a schedule: 9,"),
        ({**dict.fromkeys(range(20), 1.0), 7: 0.0}, 0.1, "update 7 is 0.0"),
        ({**dict.fromkeys(range(20), 1.0), 7: math.nan}, 0.1, "update 7 is nan"),
        (dict.fromkeys(range(20), 1.0), 1.0, "tau must be >= 0 and < 1"),
    ],
)
def test_norms_that_give_no_schedule_are_refused(norms: dict[int, float], tau: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        refine(norms, tau=tau)
