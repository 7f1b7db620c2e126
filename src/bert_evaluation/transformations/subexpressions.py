"""The same call with the same arguments is made once."""

from collections.abc import Iterable

from bert_evaluation import graph as graphs
from bert_evaluation import hashes
from bert_evaluation.graph import GraphModule, Node
from bert_evaluation.promise import Bitwise
from bert_evaluation.transformation import ReversibleTransformation, Site


class EliminateCommonSubexpressions(ReversibleTransformation):
    """Equal calls with equal arguments become one, the first; so do reads of one stored tensor.

        a = arange(length)                  a = arange(length)
        b = arange(length)    becomes       y = f(a)
        y = f(a)                            z = g(a)
        z = g(b)

    A site is the later of two such nodes. Arguments are equal if they are the same nodes, once earlier sites are
    rewritten, and the same literals: 1 is not 1.0. What is merged is kept until its last reader has read it.
    """

    promise = Bitwise()

    def sites(self, graph: GraphModule) -> Iterable[Site]:
        """Every node that does what an earlier one did."""
        number, first, sites = dict[Node, int](), dict[str, Node](), []
        for node in graph.graph.nodes:
            number[node] = len(number)
            if node.op not in ("call_function", "get_attr"):
                continue
            same = first.setdefault(hashes.description(node, number, graph), node)
            if same is not node:
                sites.append(Site(node, (same,)))
                if _why_not_one(same, node) is None:
                    number[node] = number[same]
        return sites

    def why_not(self, site: Site) -> str | None:
        """Refuse random and impure calls, writes in place, and results that both leave the graph."""
        node, (first,) = site.node, site.nodes
        if (node.args, node.kwargs) != (first.args, first.kwargs):
            return f"{node.name} and {first.name} read nodes that were not merged."
        return _why_not_one(first, node)

    def rewrite(self, graph: GraphModule, site: Site) -> None:
        """Let the readers of the later node read the earlier one."""
        site.node.replace_all_uses_with(site.nodes[0])
        graph.graph.erase_node(site.node)
        self.mark_as_transformed(site.nodes[0])


def _why_not_one(first: Node, node: Node) -> str | None:
    if node.op == "call_function":
        if graphs.is_random(node):
            return f"{node.name} draws random numbers: two draws are not one."
        if not graphs.is_pure(node):
            return f"{node.name} does more than return what its arguments determine."
    read, results = {graphs.memory(source) for source in node.all_input_nodes}, {*map(graphs.memory, (first, node))}
    other = first.next
    while other.op != "root":  # where the list of nodes ends
        written = graphs.writes(other)
        if written & results:
            return f"{other.name} writes into {first.name} or {node.name}, which would change both."
        if written & read and other < node:
            return f"{other.name} writes in place into what {node.name} reads, between it and {first.name}."
        other = other.next
    outputs = {graphs.memory(leaf) for leaf in node.graph.output_node().all_input_nodes}
    if len(results) > 1 and results <= outputs:
        return f"{first.name} and {node.name} are both outputs of the graph; as one they would share memory."
    return None
