"""Keep lists: what a change of precision leaves in float32, by words in the paths of layers."""

import re
from collections.abc import Iterable

import torch

from bert_evaluation import graph as graphs
from bert_evaluation import varlen
from bert_evaluation.graph import Node
from bert_evaluation.transformations.positions import LINEARS

ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
ATTENTIONS = (ATTENTION, varlen.ATTENTION)


def words(keep: Iterable[str]) -> tuple[str, ...]:
    """A keep list as it was given, or the one word. Raises TypeError for anything else."""
    found = (keep,) if isinstance(keep, str) else tuple(keep)
    if not all(isinstance(word, str) for word in found):
        raise TypeError(f"A keep list has words, not {found}.")
    return found


def why_kept(node: Node, keep: Iterable[str]) -> str | None:
    """Why the keep list leaves a node as it is, if it does."""
    for word in keep:
        if word == "logits":
            if node.target in LINEARS and _makes_outputs(node):
                return "The keep list has 'logits', and this makes an output."
        elif any(_is_in(_plain(word), _plain(name)) for name in (graphs.layer(node), str(node.target))):
            return f"The keep list has {word!r}."
    return None


def _plain(name: str) -> str:
    return name.lower().replace("_", "")


def _is_in(word: str, name: str) -> bool:
    """Whether the name has the word; numbers in it are whole ones: `layer.1` is not in `layer.10`."""
    within_a_number = r"(?<=\d)(?=\d)"
    return re.search(rf"(?!{within_a_number}){re.escape(word)}(?!{within_a_number})", name) is not None


def _makes_outputs(node: Node) -> bool:
    """Whether the result reaches an output by no other linear and no attention."""
    return any(
        user.op == "output" or (user.target not in (*LINEARS, *ATTENTIONS) and _makes_outputs(user))
        for user in node.users
    )
