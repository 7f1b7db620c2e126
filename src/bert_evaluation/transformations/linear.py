"""Transformations of linear layers."""

import operator
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from bert_evaluation import graph as graphs
from bert_evaluation import onednn
from bert_evaluation.graph import GraphModule, Node
from bert_evaluation.promise import Reassociates
from bert_evaluation.transformation import ReversibleTransformation, Site

aten = torch.ops.aten
PAD = aten.constant_pad_nd.default
ONE_MORE = ([0, 1], 1.0)  # a one at the end of every row


def weight_and_bias(linear: Node) -> tuple[Node, Node | None]:
    """The nodes that give a linear (or a convolution) its weight and its bias."""
    arguments = dict(zip(("input", "weight", "bias"), linear.args, strict=False)) | linear.kwargs
    weight, bias = arguments["weight"], arguments.get("bias")
    assert isinstance(weight, Node)
    return weight, bias if isinstance(bias, Node) else None


def parameters(linear: Node) -> list[Node]:
    """The weight's node and, where there is one, the bias's."""
    weight, bias = weight_and_bias(linear)
    return [weight] if bias is None else [weight, bias]


def why_not_ours(linears: Iterable[Node]) -> str | None:
    """Why the parameters of these nodes cannot be replaced: computed in the graph, or read by others too."""
    ours = dict.fromkeys(linears)  # in order: the first reason found is told
    for linear in ours:
        for parameter in parameters(linear):
            if parameter.op != "get_attr":
                return f"{linear.name} reads {parameter.name}, which the graph computes: it is no stored parameter."
            for node in linear.graph.nodes:
                if node.op == "get_attr" and node.target == parameter.target:
                    for reader in node.users:
                        if reader not in ours:
                            return f"{parameter.target} is also read by {reader.name}, which would keep the old copy."
    return None


def readers(stored: Node) -> list[Node]:
    """Every node that reads the stored tensor which this one names."""
    named = [node for node in stored.graph.nodes if node.op == "get_attr" and node.target == stored.target]
    return [user for node in named for user in node.users]


def sites_by_weight(graph: GraphModule) -> list[Site]:
    """Every linear, plain or oneDNN's, those that share their weight together."""
    sites: dict[object, list[Node]] = {}
    for node in graph.graph.nodes:
        if onednn.is_linear(node):
            weight = onednn.weight_of(node)
            sites.setdefault(weight.target if weight.op == "get_attr" else weight, []).append(node)
    return [Site(linears[0], tuple(linears)) for linears in sites.values()]


def written_between(first: Node, last: Node) -> Node | None:
    """A node between these two that writes into a tensor in place, if there is one."""
    node = first
    while node is not last:
        if graphs.is_mutable(node):
            return node
        node = node.next
    return None


def tensor_of(node: Node) -> Tensor:
    """The stored tensor that a `get_attr` node reads."""
    graph = node.graph.owning_module
    tensor = graphs.get_tensor(graph, str(node.target)) if graph is not None else None
    assert tensor is not None
    return tensor


def free_name(graph: GraphModule, module: str, leaf: str) -> str:
    """A name `module.leaf` that no tensor or module of the graph has, made longer until that is so."""
    while graphs.get_tensor(graph, f"{module}.{leaf}") is not None or _is_taken(graph, module):
        module += "_fused"
    return f"{module}.{leaf}"


def _is_taken(graph: GraphModule, module: str) -> bool:
    parent, _, child = module.rpartition(".")
    owner = dict(graph.named_modules(remove_duplicate=False)).get(parent)
    return owner is not None and hasattr(owner, child)


def stem(parameter: Node) -> str:
    """The module that a parameter belongs to, by its name: `query` of `query.weight`."""
    return str(parameter.target).removesuffix(".weight")


def common_module(names: list[str]) -> str:
    """One name for several modules: `self.query_key_value` for `self.query`, `self.key` and `self.value`."""
    paths = [name.split(".") for name in names]
    shared = 0
    while all(len(path) > shared + 1 for path in paths) and len({path[shared] for path in paths}) == 1:
        shared += 1
    return ".".join([*paths[0][:shared], "_".join("_".join(path[shared:]) for path in paths)])


@dataclass(frozen=True)
class _Part:
    """Where one parameter went: rows of the merged one, or all but its last column."""

    name: str
    size: int
    requires_grad: bool


def _part(node: Node) -> _Part:
    tensor = tensor_of(node)
    return _Part(str(node.target), tensor.shape[0], tensor.requires_grad)


def _restore(graph: GraphModule, part: _Part, tensor: Tensor) -> None:
    parameter = torch.nn.Parameter(tensor.detach().clone(), requires_grad=part.requires_grad)
    graphs.set_tensor(graph, part.name, parameter)


class MergeLinears(ReversibleTransformation):
    """Linears that read the same tensor become one.

        q = linear(x, Wq, bq)                  y = linear(x, [Wq; Wk; Wv], [bq; bk; bv])
        k = linear(x, Wk, bk)      becomes     q, k, v = split(y, sizes)
        v = linear(x, Wv, bv)

    A site is a set of linears with the same parameters wherever they are called, so that layers which share their
    weights (ALBERT) share the merged ones too. The parts are slices: a `view` of one becomes a `reshape`.
    """

    promise = Reassociates()

    def sites(self, graph: GraphModule) -> Iterable[Site]:
        """Every set of two or more linears that read one tensor."""
        sites: dict[tuple[Node | None, ...], list[Node]] = {}
        for linears in _by_input(graphs.calls(graph, aten.linear.default)):
            if len(linears) > 1:
                sites.setdefault(tuple(node for linear in linears for node in weight_and_bias(linear)), []).extend(
                    linears
                )
        return [Site(linears[0], tuple(linears)) for linears in sites.values()]

    def why_not(self, site: Site) -> str | None:
        """Refuse mixed or shared parameters, writes in between, and results that leave the graph."""
        if reason := why_not_ours(site.nodes):
            return reason
        for linears in _by_input(site.nodes):
            weights = [weight_and_bias(linear)[0] for linear in linears]
            if len({weight.target for weight in weights}) < len(weights):
                return f"{weights[0].target} is applied to the same tensor twice; merging it with itself gains nothing."
            bare = [linear.name for linear in linears if weight_and_bias(linear)[1] is None]
            if 0 < len(bare) < len(linears):
                return f"{', '.join(bare)} has no bias and the others do; merged, it would be given one."
            if len({(tensor_of(node).dtype, tensor_of(node).device) for node in weights}) > 1:
                return "Their weights differ in type or device."
            if writer := written_between(linears[0], linears[-1]):
                return f"{writer.name} writes in place between them."
            if leaving := next((linear.name for linear in linears if leaves(linear)), None):
                return f"{leaving} is an output of the graph; as a slice it would share memory with the others."
        return None

    def rewrite(self, graph: GraphModule, site: Site) -> tuple[list[str], list[list[_Part]]]:
        """Concatenate the parameters, and replace each set of linears by one and a split."""
        first = _by_input(site.nodes)[0]
        module = common_module([stem(weight_and_bias(linear)[0]) for linear in first])
        sources = list(zip(*(parameters(linear) for linear in first), strict=True))
        names = [free_name(graph, module, "weight")]
        names += [names[0].removesuffix("weight") + "bias"] if len(sources) > 1 else []
        for name, nodes in zip(names, sources, strict=True):
            merged = torch.cat([tensor_of(node).detach() for node in nodes])
            trained = any(tensor_of(node).requires_grad for node in nodes)
            graphs.set_tensor(graph, name, torch.nn.Parameter(merged, requires_grad=trained))
        memo = (names, [[_part(node) for node in nodes] for nodes in sources])
        for linears in _by_input(site.nodes):
            with graph.graph.inserting_before(linears[0]):
                stored = [graph.graph.get_attr(name) for name in names]
                merged_linear = graph.graph.call_function(aten.linear.default, (linears[0].args[0], *stored))
                sizes = [part.size for part in memo[1][0]]
                parts = graph.graph.call_function(aten.split_with_sizes.default, (merged_linear, sizes, -1))
                slices = [graph.graph.call_function(operator.getitem, (parts, index)) for index in range(len(sizes))]
            for linear, piece in zip(linears, slices, strict=True):
                linear.replace_all_uses_with(piece)
                graph.graph.erase_node(linear)
                _reshape_views(piece)
        return memo

    def undo(self, graph: GraphModule, memo: tuple[list[str], list[list[_Part]]]) -> None:
        """Cut the merged parameters into those that they were made of."""
        for name, parts in zip(*memo, strict=True):
            merged = graphs.get_tensor(graph, name)
            assert merged is not None
            pieces = torch.split(merged, [part.size for part in parts])
            for part, piece in zip(parts, pieces, strict=True):
                _restore(graph, part, piece)


def _by_input(linears: Iterable[Node]) -> list[list[Node]]:
    groups: dict[object, list[Node]] = {}
    for linear in linears:
        groups.setdefault(linear.args[0], []).append(linear)
    return list(groups.values())


def leaves(node: Node) -> bool:
    """Whether the node, or a view of it, is an output of the graph."""
    return any(user.op == "output" or (graphs.is_alias(user) and leaves(user)) for user in node.users)


def _reshape_views(node: Node) -> None:
    """Let what views this slice copy where it must: a slice is not contiguous, so not every view of it exists."""
    for user in node.users:
        if user.target is aten.view.default:
            user.target = aten.reshape.default
        if graphs.is_alias(user):
            _reshape_views(user)


class FuseBiasInLinear(ReversibleTransformation):
    """The bias becomes one more column of the weight, read by a one appended to every input row.

        y = linear(x, W, b)        becomes        x1 = pad(x, [0, 1], 1.0)
                                                  y  = linear(x1, [W | b])

    Linears that read the same tensor read the same padded one. A site is one weight and bias, wherever applied.
    """

    promise = Reassociates()

    def sites(self, graph: GraphModule) -> Iterable[Site]:
        """Every linear, those that share their parameters together."""
        sites: dict[tuple[Node | None, ...], list[Node]] = {}
        for linear in graphs.calls(graph, aten.linear.default):
            sites.setdefault(weight_and_bias(linear), []).append(linear)
        return [Site(linears[0], tuple(linears)) for linears in sites.values()]

    def why_not(self, site: Site) -> str | None:
        """Refuse a linear without a bias, and parameters that others read too."""
        if weight_and_bias(site.node)[1] is None:
            return f"{site.node.name} has no bias."
        return why_not_ours(site.nodes)

    def rewrite(self, graph: GraphModule, site: Site) -> tuple[str, list[_Part]]:
        """Append the bias to the weight, and ones to the inputs."""
        weight, bias = parameters(site.node)
        fused = torch.cat([tensor_of(weight).detach(), tensor_of(bias).detach().unsqueeze(1)], dim=1)
        trained = tensor_of(weight).requires_grad or tensor_of(bias).requires_grad
        name = free_name(graph, stem(weight) + "_and_bias", "weight")
        graphs.set_tensor(graph, name, torch.nn.Parameter(fused, requires_grad=trained))
        memo = (name, [_part(weight), _part(bias)])
        for linear in site.nodes:
            source = linear.args[0]
            assert isinstance(source, Node)
            with graph.graph.inserting_before(linear):
                padded = _padded(source, linear) or graph.graph.call_function(PAD, (source, *ONE_MORE))
                stored = graph.graph.get_attr(name)
                fused_linear = graph.graph.call_function(aten.linear.default, (padded, stored))
            linear.replace_all_uses_with(fused_linear)
            graph.graph.erase_node(linear)
        return memo

    def undo(self, graph: GraphModule, memo: tuple[str, list[_Part]]) -> None:
        """Cut the last column off."""
        name, (weight, bias) = memo
        fused = graphs.get_tensor(graph, name)
        assert fused is not None
        _restore(graph, weight, fused[:, :-1])
        _restore(graph, bias, fused[:, -1])


def _padded(source: Node, reader: Node) -> Node | None:
    """The tensor with ones appended, if an earlier site made it already and nothing was written since."""
    for user in source.users:
        same = user.target is PAD and user.args == (source, *ONE_MORE)
        if same and user < reader and not written_between(user, reader):
            return user
    return None
