"""Where a recipe pays: every shape once, under its own number of threads, as far as it is not known."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bert_evaluation.errors import UsageError
from bert_evaluation.measurement import Plan
from bert_evaluation.regime import Grid, Shape, regime

QUICK = Plan(rounds=6, warm_up=1)


class Watched(nn.Module):
    """Notes the shape of its input and the threads it may use."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def forward(self, x):
        self.seen.add(Shape(*x.shape, torch.get_num_threads()))
        return x + 1


def inputs(batch, length):
    return {"x": torch.zeros(batch, length)}


def test_every_shape_under_its_own_threads_and_threads_put_back():
    before, seen = torch.get_num_threads(), set()
    grid = Grid((1, 2), (3, 5), (1, 2))
    cells = regime({"Base": Watched(seen), "A": Watched(set())}, inputs, grid, QUICK)
    assert torch.get_num_threads() == before
    assert seen == set(grid.shapes)
    assert list(cells) == ["A"]
    assert [Shape(cell.batch, cell.length, cell.threads) for cell in cells["A"]] == grid.shapes
    assert all(cell.base_ms > 0 and cell.row_ms > 0 for cell in cells["A"])


def test_threads_are_put_back_after_an_error():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        regime({"Base": nn.Identity(), "A": nn.Identity()}, lambda *_: 1 / 0, Grid((1,), (1,), (before + 1,)), QUICK)
    assert torch.get_num_threads() == before


def test_what_is_known_is_not_measured():
    known, done, grid = {}, [], Grid((1, 2), (3,), (1,))

    def kept(shape, find):
        if shape not in known:
            known[shape] = find()
        return known[shape]

    variants = {"Base": Watched(set()), "A": Watched(set())}
    first = regime(variants, inputs, grid, QUICK, kept, done.append)
    seen = set()
    again = regime({"Base": Watched(seen), "A": Watched(seen)}, inputs, grid, QUICK, kept)
    assert first == again
    assert not seen
    assert sorted(done) == grid.shapes


@given(*[st.lists(st.integers(1, 600), min_size=1, max_size=4).map(tuple)] * 3)
def test_a_grid_has_each_combination_once(batches, lengths, threads):
    shapes = Grid(batches, lengths, threads).shapes
    assert len(shapes) == len(set(shapes)) == len(set(batches)) * len(set(lengths)) * len(set(threads))


@pytest.mark.parametrize("numbers", [(), (0,), (4, -1)])
def test_refuses_what_is_no_shape(numbers):
    with pytest.raises(UsageError, match=r"lengths of 1 or more"):
        Grid(lengths=numbers)
