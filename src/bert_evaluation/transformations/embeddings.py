"""Tables of embeddings in half of their memory."""

from collections.abc import Iterable

import torch
from torch import Tensor

from bert_evaluation import graph as graphs
from bert_evaluation.graph import GraphModule, Node
from bert_evaluation.promise import Approximates
from bert_evaluation.transformation import ReversibleTransformation, Site
from bert_evaluation.transformations.casts import CAST, EMBEDDING, HIGH, lower_stored
from bert_evaluation.transformations.linear import readers, tensor_of

LOW = torch.float16  # eight times as near as bfloat16, and as small; nothing is computed in it
LARGEST = torch.finfo(LOW).max


class CastEmbeddings(ReversibleTransformation):
    """Tables of embeddings are stored in float16, and what is looked up becomes float32 at once.

        e = embedding(W, ids)          becomes          e = to(embedding(W', ids), float32)

    So each number is rounded once, by 1 part in 2,048 at most (below 6e-5, by 3e-8), and sums and LayerNorms are those
    of before; a checkpoint that was kept in float16 loses nothing. In a small encoder the table of words is half of all
    weights, of which a call reads a few rows. A table that others read too is refused, since they would keep the old
    copy, and so is one with a number beyond 65504.
    """

    promise = Approximates()

    def sites(self, graph: GraphModule) -> Iterable[Site]:
        """Every lookup in a table."""
        return [Site(node) for node in graphs.calls(graph, EMBEDDING)]

    def why_not(self, site: Site) -> str | None:
        """Refuse a table that the graph computes, that others read too, or that float16 does not hold."""
        node, table = site.node, site.node.args[0]
        assert isinstance(table, Node)
        if table.op != "get_attr":
            return f"{node.name} reads {table.name}, which the graph computes: it is no stored parameter."
        if reader := next((user for user in readers(table) if user.target is not EMBEDDING), None):
            return f"{table.target} is also read by {reader.name}, which would keep the old copy."
        tensor = tensor_of(table)
        if tensor.dtype is not HIGH:
            return f"{table.target} is in {tensor.dtype}, not in float32."
        largest = tensor.detach().abs().max().item() if tensor.numel() else 0.0
        if not largest <= LARGEST:
            return f"{table.target} has a number of size {largest:g}, and float16 none beyond {LARGEST:g}."
        return None

    def rewrite(self, graph: GraphModule, site: Site) -> list[tuple[str, Tensor]]:
        """Look up in float16, and let all read that in float32."""
        node = site.node
        replaced = lower_stored(node, LOW)
        with graph.graph.inserting_after(node):
            wide = graph.graph.call_function(CAST, (node, HIGH))
        wide.meta["val"], node.meta["val"] = node.meta["val"], node.meta["val"].to(LOW)
        node.replace_all_uses_with(wide, delete_user_cb=lambda user: user is not wide)
        self.mark_as_transformed(node)
        return replaced

    def undo(self, graph: GraphModule, memo: list[tuple[str, Tensor]]) -> None:
        """Put the tables themselves back."""
        for name, tensor in memo:
            graphs.set_tensor(graph, name, tensor)
