"""Shapes rounded up: how far, and for which graphs."""

import pytest
import torch
from families import FAMILIES, tiny
from torch import nn

from bert_evaluation import capture
from bert_evaluation.buckets import bucket, paddable, rounded
from bert_evaluation.capturing import DYNAMIC, read, save
from bert_evaluation.signature import BATCH, LENGTH, MASK, UNLIMITED, Signature
from bert_evaluation.transformations import PRESETS, REGISTRY, parse_recipe


def test_sizes_are_rounded_up_by_less_than_a_quarter():
    for size in range(1, 2000):
        found = rounded(size)
        assert size <= found < 1.25 * size
        assert rounded(found) == found
        assert found <= rounded(size + 1)
    assert [rounded(size) for size in (1, 7, 8, 9, 11, 15, 17, 33, 65)] == [1, 7, 8, 10, 12, 16, 20, 40, 80]
    assert len({rounded(size) for size in range(1, 129)}) == 24


def test_lengths_are_rounded_up_to_what_kernels_like_and_never_beyond_what_is_read():
    found = sorted({rounded(length, 32, 500) for length in range(1, 501)})
    assert found == [32, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 500]
    assert all(rounded(length, 32) - length < max(32, length / 4) for length in range(1, 5000))
    # More than that is the caller's to ask for.
    assert rounded(501, 32, 500) == 501


def test_a_bucket_rounds_up_what_has_a_limit():
    sizes = {BATCH: 9, LENGTH: 100, "s7": 9}
    assert bucket(sizes, {BATCH: UNLIMITED, LENGTH: 512}) == {BATCH: 10, LENGTH: 128, "s7": 9}
    assert bucket(sizes, {BATCH: UNLIMITED}) == {BATCH: 10, LENGTH: 100, "s7": 9}
    assert bucket(sizes, {}) == sizes


@pytest.mark.parametrize("recipe", ["LintAndRecompile", "exact"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_may_be_padded_but_mobilebert_whose_tokens_see_their_neighbours(family, recipe):
    graph = parse_recipe(recipe, REGISTRY, PRESETS)(capture(tiny(family)))
    signature = Signature(graph)
    unknown = ("roberta", "mpnet", "camembert", "xlm-roberta", "modernbert")
    known = UNLIMITED if family in unknown else 512 if family == "distilbert" else 530
    assert signature.longest == {BATCH: UNLIMITED, LENGTH: known}

    def found(longest=None):
        return paddable(graph, signature, longest)

    if family == "mobilebert":
        assert found() == found(520) == {BATCH: UNLIMITED}
    else:
        assert found(520) == {BATCH: UNLIMITED, LENGTH: min(known, 520)}
        # A table of positions is not read where nobody knows that it goes so far.
        assert found() == {BATCH: UNLIMITED} | ({} if known == UNLIMITED else {LENGTH: known})


class Model(nn.Module):
    """Embeddings, and something done with them and the mask."""

    def __init__(self, kind, rows=9):
        super().__init__()
        self.kind = kind
        self.embedding = nn.Embedding(rows, 8)

    def forward(self, input_ids, attention_mask):
        x, real = self.embedding(input_ids), attention_mask[:, :, None]
        match self.kind:
            case "attention":
                return nn.functional.scaled_dot_product_attention(x, x, x, attention_mask[:, None, :].bool())
            case "attention to all":
                return nn.functional.scaled_dot_product_attention(x, x, x) * real
            case "mean":
                return x.mean(dim=1) * real[:, 0]
            case "mean of what is real":
                return (x * real).sum(dim=1) / real.sum(dim=1)
            case "differences between rows":
                return (x - x.mean(dim=0)) * real
            case "length in front":
                return (x * real).transpose(0, 1)
            case "without the mask":
                return x


@pytest.mark.parametrize(
    ("kind", "sizes"),
    {
        "attention": {BATCH, LENGTH},
        "attention to all": {BATCH},
        "mean": {BATCH},
        "mean of what is real": {BATCH, LENGTH},
        "differences between rows": set(),
        "length in front": set(),
        "without the mask": {BATCH, LENGTH},
    }.items(),
)
def test_what_is_padded_is_what_the_mask_hides(kind, sizes):
    assert set(paddable(*captured(Model(kind)), 100)) == sizes


def test_nothing_is_tried_that_a_table_does_not_have():
    """On CUDA an index out of range ends the process."""
    assert paddable(*captured(Model("attention", rows=1)), 100) == {}


def test_without_a_mask_nothing_is_padded():
    module = nn.Linear(4, 2)
    graph = capture(module, {"input": torch.ones(2, 4)})
    assert paddable(graph, Signature(graph), 100) == {}


def captured(module):
    ids = torch.zeros(2, 5, dtype=torch.int64)
    dynamic = {name: {0: DYNAMIC, 1: DYNAMIC} for name in ("input_ids", MASK)}
    graph = capture(module.eval(), {"input_ids": ids, MASK: torch.ones_like(ids)}, dynamic)
    return graph, Signature(graph)


def test_a_signature_has_one_batch_and_one_length_even_after_reading_a_file(tmp_path, bert_graph):
    """Export leaves it open whether the mask's are those of the ids."""
    save(bert_graph, tmp_path / "graph.pt2")
    for graph in (bert_graph, read(tmp_path / "graph.pt2")):
        signature = Signature(graph)
        assert {each.sizes for each in signature.inputs} == {(BATCH, LENGTH)}
        assert signature.outputs == ((BATCH, LENGTH),) * 2
        assert signature.longest[LENGTH] == 530
        # Of the intermediate layer; of the mask, with one row for each token, which is not stored.
        assert signature.elements({BATCH: 3, LENGTH: 5}) == 3 * 5 * 64
        assert signature.elements({BATCH: 3, LENGTH: 100}) == 3 * 100 * 100
