"""A graph in two: what it computes up to a node, and the rest, which is called with what it needs of that."""

from torch import Tensor, fx

from bert_evaluation.graph import GraphModule, Node


def cut(graph: GraphModule, node: Node) -> tuple[GraphModule, GraphModule]:
    """A graph that returns `node`, and whatever tensors else the rest reads, by name; and the rest, which takes those.

    Both are called by keyword, the rest with the inputs too, and both have the parameters of the whole.
    """
    needed = {node}
    for each in reversed(graph.graph.nodes):
        if each in needed:
            needed.update(each.all_input_nodes)
    crossing, again = set[Node](), set[Node]()  # what the rest is given; parameters and sizes, which it reads again
    for each in reversed(graph.graph.nodes):
        if each in needed and any(user not in needed or user in again for user in each.users):
            is_computed = each.op == "call_function" and isinstance(each.meta.get("val"), Tensor)
            (crossing if is_computed else again).add(each)
    first, rest = fx.Graph(), fx.Graph()
    early, late = dict[Node, Node](), dict[Node, Node]()
    for each in graph.graph.nodes:
        if each in needed or each.op == "placeholder":
            early[each] = first.node_copy(each, early.__getitem__)
        if each in crossing:
            late[each] = rest.placeholder(each.name)
            late[each].meta = dict(each.meta)
        elif each not in needed or each in again or each.op == "placeholder":
            late[each] = rest.node_copy(each, late.__getitem__)
    first.output({each.name: early[each] for each in graph.graph.nodes if each in crossing})
    return GraphModule(graph, first), GraphModule(graph, rest)
