"""What no input has a say in is computed once and stored."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from bert_evaluation import graph as graphs
from bert_evaluation.graph import GraphModule, Node
from bert_evaluation.promise import Bitwise
from bert_evaluation.transformation import ReversibleTransformation, Site
from bert_evaluation.transformations.linear import free_name, leaves, tensor_of

# A stored result may be this many bytes larger than what it is computed from. It has room for a table of 512 × 512
# positions; above it, reading the result from memory costs more than most operators that make one.
LARGEST_GROWTH = 2**22


class FoldConstants(ReversibleTransformation):
    """What is computed from stored tensors and literals alone is computed once and stored.

        d = sqrt(mul(scale, 3))        becomes        d = stored
        y = div(x, d)                                 y = div(x, d)

    A site is the last node of such a computation. Nothing that depends on an input or on its sizes is one, so dynamic
    sizes stay dynamic. A call that returns its stored argument itself, such as `to` the type that it has, goes without
    a trace; so do assertions about what is folded, which are made once more as it is.

    Results are those of the same operators on this device with as many threads as now; with another number of threads
    a stored matrix product may differ in its last bit from one computed then.
    """

    promise = Bitwise()

    def sites(self, graph: GraphModule) -> Iterable[Site]:
        """The last nodes that read only constants; among them those that must not be folded."""
        constants, sites = _constants(graph), []
        for node in graph.graph.nodes:
            candidate = node.op == "call_function" and constants.issuperset(node.all_input_nodes)
            last = node not in constants or not constants.issuperset(node.users)
            if candidate and last and isinstance(node.meta.get("val"), Tensor):
                sites.append(Site(node, tuple(_computation(node))))
        return sites

    def why_not(self, site: Site) -> str | None:
        """Refuse what is random or written into, what leaves the graph, large results, and mere views."""
        node = site.node
        if graphs.is_random(node):
            return f"{node.name} draws random numbers, anew in each call."
        if not graphs.is_pure(node):
            return f"{node.name} does more than return what its arguments determine."
        if writer := graphs.writer(node):
            return f"{writer.name} writes into {node.name}, and so would write into what is stored."
        if leaves(node):
            return f"{node.name} is an output of the graph; stored, what a caller does to it would be seen by the next."
        stored = {str(each.target): tensor_of(each) for each in _stored(site.nodes)}
        size = _bytes(node.meta["val"])
        if size - sum(map(_bytes, stored.values())) > LARGEST_GROWTH:
            return f"{node.name} would take {size / 2**20:.1f} MiB, far more than what it is computed from."
        value = _values(site.nodes)[node]
        for name, tensor in stored.items():
            if value is not tensor and value.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr():
                return f"{node.name} is a view of {name}: it costs nothing, and stored it would share that memory."
        return None

    def rewrite(self, graph: GraphModule, site: Site) -> tuple[str, dict[str, Tensor]]:
        """Compute the result, and read it instead."""
        node, values, stored = site.node, _values(site.nodes), _stored(site.nodes)
        for check in _assertions(site.nodes):
            _call(check, values)
            graph.graph.erase_node(check)
        constant = next((each for each in stored if values[each] is values[node]), None)
        if constant is None:
            name = free_name(graph, ".".join(filter(None, (graphs.layer(node), node.name))), "constant")
            graphs.set_tensor(graph, name, values[node].detach())
            with graph.graph.inserting_before(node):
                constant = graph.graph.get_attr(name)
        node.replace_all_uses_with(constant)
        self.mark_as_transformed(constant)
        return str(constant.target), {str(each.target): values[each] for each in stored}

    def undo(self, graph: GraphModule, memo: tuple[str, dict[str, Tensor]]) -> None:
        """Put back the tensors that nothing read any more."""
        name, stored = memo
        constant = graphs.get_tensor(graph, name)
        assert constant is not None
        for each, tensor in stored.items():
            if graphs.get_tensor(graph, each) is None:
                moved = tensor if tensor.device == constant.device else graphs.like(tensor.to(constant.device), tensor)
                graphs.set_tensor(graph, each, moved)


def _constants(graph: GraphModule) -> set[Node]:
    """The nodes whose results are the same in every call: stored tensors, and what is computed from such alone."""
    written = {each for node in graph.graph.nodes for each in graphs.writes(node)}
    found = set[Node]()
    for node in graph.graph.nodes:
        stored = node.op == "get_attr" and graphs.get_tensor(graph, str(node.target)) is not None
        computed = node.op == "call_function" and graphs.is_pure(node) and found.issuperset(node.all_input_nodes)
        if (stored or computed) and graphs.memory(node) not in written:
            found.add(node)
    return found


def _computation(node: Node) -> Sequence[Node]:
    """The node and all that it is computed from, in program order."""
    needed, waiting = {node}, [node]
    while waiting:
        new = [source for source in waiting.pop().all_input_nodes if source not in needed]
        needed.update(new)
        waiting.extend(new)
    return sorted(needed)


def _stored(nodes: Iterable[Node]) -> list[Node]:
    return [node for node in nodes if node.op == "get_attr"]


def _assertions(nodes: Sequence[Node]) -> list[Node]:
    """The checks, which return nothing, of these nodes alone."""
    users = dict.fromkeys(user for node in nodes for user in node.users)
    return [
        user
        for user in users
        if user.op == "call_function"
        and not user.users
        and set(nodes).issuperset(user.all_input_nodes)
        and _asserts(user)
    ]


def _asserts(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and not schema.returns and graphs.is_pure(node)


def _values(nodes: Sequence[Node]) -> dict[Node, Any]:
    """What each of these returns; they are in program order and read no others."""
    values = dict[Node, Any]()
    with torch.no_grad():
        for node in nodes:
            values[node] = tensor_of(node) if node.op == "get_attr" else _call(node, values)
    return values


def _call(node: Node, values: dict[Node, Any]) -> Any:
    assert callable(node.target)
    args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
    return node.target(*args, **kwargs)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
