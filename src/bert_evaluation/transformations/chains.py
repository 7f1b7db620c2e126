"""Linears in a row as one operator."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from bert_evaluation import kernels
from bert_evaluation.graph import GraphModule, Node
from bert_evaluation.promise import Bitwise
from bert_evaluation.transformation import ReversibleTransformation, Site
from bert_evaluation.transformations.linear import tensor_of, written_between
from bert_evaluation.transformations.tiles import ending

NOTHING, GIVEN = -1, 0  # what a linear of a chain adds; above that, the result of the first, the second...


class ChainLinears(ReversibleTransformation):
    """Linears in tiles each of which alone reads the one before it become one operator.

        y = bert_evaluation.linear(a, W, s, b, n, "none", r, g, c, e)
        h = bert_evaluation.linear(y, V, t, d, m, "gelu")
        z = bert_evaluation.linear(h, U, u, f, n, "none", y, i, j, e)
                becomes
        z = bert_evaluation.linears(a, [W, s, b, g, c, V, ...], [n, m, n], "none gelu none", r, [0, -1, 1], [e, 0, e])

    Here, all that a layer of an encoder does behind its attention. A block of rows goes through all of them while it
    is in the cache, so that what is in between, the widest tensor of a layer among it, is never written to memory; and
    of a short text, threads are gathered once. Each number is computed as before. A linear may add what an earlier one
    of the chain has made; from outside, all of them may add one tensor. For `TileLinears` and `QuantizeLinears`, behind
    what puts activations, residuals and LayerNorms into them.
    """

    promise = Bitwise()

    def sites(self, graph: GraphModule) -> Iterable[Site]:
        """Every linear in tiles whose result another one multiplies, last first."""
        found = (node for node in reversed(graph.graph.nodes) if node.target is kernels.LINEAR)
        return [Site(node) for node in found if any(_multiplies(user, node) for user in node.users)]

    def why_not(self, site: Site) -> str | None:
        """Refuse what others read too, weights of another kind, a second tensor from outside, and writing in place."""
        node = site.node
        reader = next(user for user in node.users if _multiplies(user, node))
        if outside := next((user for user in node.users if user is not reader), None):
            return f"{node.name} is also read by {outside.name}."
        own, behind = _chain_of(node), _chain_of(reader)
        kinds = [
            (weight.dtype, weight.dim()) for weight in (tensor_of(each.links[0].tensors[0]) for each in (own, behind))
        ]
        if kinds[0] != kinds[1] or node.meta["val"].dtype is not reader.meta["val"].dtype:
            return f"The weights of {node.name} and of {reader.name} are of different kinds."
        if own.residual is not None and behind.residual not in (None, node, own.residual):
            return f"{node.name} and {reader.name} add different tensors, neither of which is made in between."
        if any(node in link.tensors for link in behind.links):
            return f"{reader.name} multiplies {node.name} with itself."
        if writer := written_between(node, reader):
            return f"{writer.name} writes in place between them."
        return None

    def rewrite(self, graph: GraphModule, site: Site) -> None:
        """Let one operator compute both."""
        node = site.node
        (reader,) = node.users
        chain = _joined(_chain_of(node), _chain_of(reader), node)
        with graph.graph.inserting_before(reader):
            fused = graph.graph.call_function(kernels.LINEARS, chain.arguments())
        fused.meta["val"] = reader.meta["val"]
        reader.replace_all_uses_with(fused)
        graph.graph.erase_node(reader)
        graph.graph.erase_node(node)


@dataclass(frozen=True)
class _Link:
    """One linear of a chain: weight, scales, bias, weight and bias of LayerNorm; and what it ends with."""

    tensors: tuple[Any, ...]
    outputs: int
    activation: str
    added: int
    eps: float


@dataclass(frozen=True)
class _Chain:
    """What a chain reads, and its linears, first to last."""

    x: Any
    residual: Any
    links: tuple[_Link, ...]

    def arguments(self) -> tuple[Any, ...]:
        """Those of the operator."""
        tensors = [tensor for link in self.links for tensor in link.tensors]
        activations = " ".join(link.activation for link in self.links)
        outputs, added, eps = ([getattr(link, name) for link in self.links] for name in ("outputs", "added", "eps"))
        return self.x, tensors, outputs, activations, self.residual, added, eps


def _chain_of(node: Node) -> _Chain:
    """A chain, or a linear as a chain of one."""
    if node.target is kernels.LINEAR:
        x, weight, scales, bias, outputs = node.args[:5]
        end = ending(node)
        tensors = (weight, scales, bias, end["norm_weight"], end["norm_bias"])
        added = NOTHING if end["residual"] is None else GIVEN
        assert isinstance(outputs, int)
        return _Chain(x, end["residual"], (_Link(tensors, outputs, end["activation"], added, end["eps"]),))
    arguments: Any = node.args
    x, tensors, outputs, activations, residual, added, eps = arguments
    each = (tuple(tensors[start : start + kernels.OF_EACH]) for start in range(0, len(tensors), kernels.OF_EACH))
    parts = zip(each, outputs, activations.split(" "), added, eps, strict=True)
    return _Chain(x, residual, tuple(_Link(*part) for part in parts))


def _joined(first: _Chain, rest: _Chain, between: Node) -> _Chain:
    """One chain of two, the second of which reads what the first one makes, `between`, and may add that."""
    count = len(first.links)
    given = count if rest.residual is between else GIVEN
    places = {NOTHING: NOTHING, GIVEN: given}
    links = tuple(replace(link, added=places.get(link.added, link.added + count)) for link in rest.links)
    residual = first.residual if first.residual is not None or rest.residual is between else rest.residual
    return _Chain(first.x, residual, (*first.links, *links))


def _multiplies(reader: Node, node: Node) -> bool:
    return reader.target in (kernels.LINEAR, kernels.LINEARS) and reader.args[0] is node
