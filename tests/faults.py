"""Transformations that are sound at all of their sites but one: faults for the verification to find.

`at` is the number of the site that the fault is planted in.
"""

import torch

from bert_evaluation import graph as graphs
from bert_evaluation.promise import Bitwise, Reassociates
from bert_evaluation.transformation import Site, Transformation
from bert_evaluation.transformations import MergeLinears
from bert_evaluation.transformations.linear import tensor_of, weight_and_bias, why_not_ours

aten = torch.ops.aten


class Planted(Transformation):
    """Remembers which of its sites is the guilty one."""

    _guilty = ""

    def __init__(self, at=1):
        self.at = at

    def sites(self, graph):
        found = list(super().sites(graph))
        self._guilty = str(found[self.at])
        return found

    def guilty_in(self, graph):
        self.sites(graph)
        return self._guilty

    def is_guilty(self, site):
        return str(site) == self._guilty


class Calls(Transformation):
    """Its sites are the calls of one operator; each is copied."""

    promise = Bitwise()
    operator = aten.linear.default

    def sites(self, graph):
        return [Site(node) for node in graphs.calls(graph, self.operator)]

    def rewrite(self, graph, site):
        with graph.graph.inserting_before(site.node):
            new = graph.graph.node_copy(site.node)
            if self.is_guilty(site):
                new = self.spoil(graph, new)
        site.node.replace_all_uses_with(new)
        graph.graph.erase_node(site.node)

    def spoil(self, graph, node):
        """Change the copy of the node; return what stands for it."""
        raise NotImplementedError


def call(graph, target, *arguments):
    return graph.graph.call_function(target, arguments)


class WrongSlice(Planted, MergeLinears):
    """A merge that takes the slice of the key for that of the query."""

    def rewrite(self, graph, site):
        memo = super().rewrite(graph, site)
        if self.is_guilty(site):
            stored = next(node for node in graph.graph.nodes if node.op == "get_attr" and node.target == memo[0][0])
            (merged,) = stored.users
            (split,) = merged.users
            query, key, _ = split.users
            query.args, key.args = key.args, query.args
        return memo


class DroppedMask(Planted, Calls):
    """Attention without its mask."""

    operator = aten.scaled_dot_product_attention.default

    def spoil(self, graph, node):
        node.args = node.args[:3]
        return node


class SwappedBias(Planted, Calls):
    """A linear with the bias of another one."""

    def spoil(self, graph, node):
        bias = weight_and_bias(node)[1]
        others = (weight_and_bias(linear)[1] for linear in graphs.calls(graph, aten.linear.default))
        like = tensor_of(bias).shape
        node.update_arg(2, next(o for o in others if o.target != bias.target and tensor_of(o).shape == like))
        return node


class ChangedEps(Planted, Calls):
    """A layer norm with RoBERTa's epsilon for BERT's."""

    promise = Reassociates()
    operator = aten.layer_norm.default

    def spoil(self, graph, node):
        node.update_arg(4, 1e-5)
        return node


class ScaledTwice(Planted, Calls):
    """Attention of queries that are scaled already."""

    promise = Reassociates()
    operator = aten.scaled_dot_product_attention.default

    def spoil(self, graph, node):
        with graph.graph.inserting_before(node):
            node.update_arg(0, call(graph, aten.mul.Tensor, node.args[0], node.kwargs["scale"]))
        return node


class TransposedHeads(Planted, Calls):
    """Features of heads where there should be heads of features."""

    operator = aten.transpose.int

    def spoil(self, graph, node):
        split = node.args[0]
        with graph.graph.inserting_before(node):
            turned = call(graph, aten.transpose.int, split, 2, 3)
            node.update_arg(0, call(graph, aten.reshape.default, turned, split.args[1]))
        return node


class Cast(Planted, Calls):
    """A linear that hands its result on in bfloat16."""

    promise = Reassociates()

    def spoil(self, graph, node):
        small = call(graph, aten.to.dtype, node, torch.bfloat16)
        return call(graph, aten.to.dtype, small, torch.float32)


class SharedParameter(Planted, Calls):
    """Doubles the weights of a linear and halves its result, where others read the same weights too."""

    def why_not(self, site):
        return None if self.is_guilty(site) else why_not_ours([site.node])

    def rewrite(self, graph, site):
        node = site.node
        for parameter in weight_and_bias(node):
            tensor = tensor_of(parameter)
            graphs.set_tensor(graph, parameter.target, graphs.like(2 * tensor, tensor))
        with graph.graph.inserting_after(node):
            half = call(graph, aten.mul.Tensor, node, 0.5)
        node.replace_all_uses_with(half, delete_user_cb=lambda user: user is not half)


class FixedBatch(Planted, Calls):
    """A view that takes the batch for 1."""

    operator = aten.view.default

    def spoil(self, graph, node):
        node.update_arg(1, [1, *node.args[1][1:]])
        return node


class ForgottenStride(Planted, Calls):
    """An embedding that reads the ids as if they lay side by side."""

    operator = aten.embedding.default

    def spoil(self, graph, node):
        ids = node.args[1]
        with graph.graph.inserting_before(node):
            batch, length = (call(graph, aten.sym_size.int, ids, i) for i in range(2))
            node.update_arg(1, call(graph, aten.as_strided.default, ids, [batch, length], [length, 1], 0))
        return node


class LastIdMissing(Planted, Calls):
    """An embedding that does not reach the last row of its table."""

    operator = aten.embedding.default

    def spoil(self, graph, node):
        rows = tensor_of(node.args[0]).shape[0]
        with graph.graph.inserting_before(node):
            node.update_arg(1, call(graph, aten.clamp.default, node.args[1], 0, rows - 2))
        return node


class ApproximateGelu(Planted, Calls):
    """The other GELU."""

    promise = Reassociates()
    operator = aten.gelu.default

    def spoil(self, graph, node):
        node.kwargs = {"approximate": "tanh"}
        return node


class FewKeys(Planted, Calls):
    """Attention to the first tokens only."""

    promise = Reassociates()
    operator = aten.scaled_dot_product_attention.default
    KEYS = 20

    def spoil(self, graph, node):
        query, key, value, mask = node.args
        with graph.graph.inserting_before(node):
            cut = (call(graph, aten.slice.Tensor, each, 2, 0, self.KEYS) for each in (key, value))
            node.args = (query, *cut, call(graph, aten.slice.Tensor, mask, 3, 0, self.KEYS))
        return node


class OfTheWholeGraph(Transformation):
    """A transformation without sites, in optimum.fx's manner, that turns the outputs' sign."""

    promise = Bitwise()

    def transform(self, graph_module):
        last = list(graphs.calls(graph_module, aten.linear.default))[-1]
        with graph_module.graph.inserting_after(last):
            turned = graph_module.graph.call_function(aten.neg.default, (last,))
        last.replace_all_uses_with(turned, delete_user_cb=lambda user: user is not turned)
        return graph_module
