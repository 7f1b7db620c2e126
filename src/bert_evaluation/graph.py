"""What we ask of an FX graph: its tensors by name, its layers, a copy that shares parameters."""

import copy
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher  # no public name for how torch.export finds shapes
from torch.utils import _pytree as pytree  # no public name for what export and transformers register outputs with

GraphModule = fx.GraphModule
Node = fx.Node
aten = torch.ops.aten

OFF_AT_EVAL = (aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default)
# They may return an argument itself, and their schemas do not say so.
SILENT_ALIASES = (*OFF_AT_EVAL, aten.type_as.default)
# They return whatever lay in the memory.
UNDEFINED = (aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided)


def calls(graph: GraphModule, *targets: Any) -> Iterator[Node]:
    """The nodes that call one of `targets` (operator overloads), in program order."""
    for node in graph.graph.nodes:
        if node.op == "call_function" and node.target in targets:
            yield node


def input_names(graph: GraphModule) -> tuple[str, ...]:
    """The names of the graph's inputs, by which it is called."""
    return tuple(str(node.target) for node in graph.graph.nodes if node.op == "placeholder")


def layer(node: Node) -> str:
    """The path of the module that made this node, such as `bert.encoder.layer.0.attention.self.query`."""
    stack = node.meta.get("nn_module_stack") or {}
    path = str(list(stack.values())[-1][0]) if stack else ""
    if not path:
        read = node if node.op == "get_attr" else next((n for n in node.all_input_nodes if n.op == "get_attr"), None)
        path = str(read.target).rpartition(".")[0] if read is not None else ""
    return path


def tensors(graph: GraphModule) -> dict[str, Tensor]:
    """Every parameter and buffer of the graph under its own name (a shared one under each of its names)."""
    found = dict(graph.named_parameters(remove_duplicate=False))
    return found | dict(graph.named_buffers(remove_duplicate=False))


def get_tensor(graph: GraphModule, name: str) -> Tensor | None:
    """The parameter or buffer called `name`, or None where there is none."""
    owner: Any = graph
    for part in name.split("."):
        owner = getattr(owner, part, None)
    return owner if isinstance(owner, Tensor) else None


def set_tensor(graph: GraphModule, name: str, tensor: Tensor) -> None:
    """Put `tensor` under `name`, as a parameter if it is one, making the modules on the way."""
    path, _, leaf = name.rpartition(".")
    owner: nn.Module = graph
    for part in path.split(".") if path else ():
        if not isinstance(getattr(owner, part, None), nn.Module):
            owner.add_module(part, nn.Module())
        owner = getattr(owner, part)
    if hasattr(owner, leaf):
        delattr(owner, leaf)
    if isinstance(tensor, nn.Parameter):
        owner.register_parameter(leaf, tensor)
    else:
        owner.register_buffer(leaf, tensor)


def like(tensor: Tensor, source: Tensor) -> Tensor:
    """`tensor` as what `source` is: a parameter with the same `requires_grad`, or a plain tensor (a buffer)."""
    if isinstance(source, nn.Parameter):
        return nn.Parameter(tensor.detach(), requires_grad=source.requires_grad)
    return tensor


def read_names(graph: GraphModule) -> set[str]:
    """The names of the parameters and buffers that some node of the graph reads."""
    return {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}


def drop(graph: GraphModule, names: set[str]) -> None:
    """Remove these parameters and buffers, and the modules that are empty without them."""
    for name in sorted(names):
        path, _, leaf = name.rpartition(".")
        delattr(graph.get_submodule(path), leaf)
        while path and _is_empty(graph.get_submodule(path)):
            path, _, child = path.rpartition(".")
            delattr(graph.get_submodule(path), child)


def _is_empty(module: nn.Module) -> bool:
    return next(module.children(), None) is None and next(iter(module.state_dict()), None) is None


def fork(graph: GraphModule) -> GraphModule:
    """A graph of its own over the same parameters: editing one never changes the other, nor costs its memory."""
    twin = GraphModule(graph, copy.deepcopy(graph.graph))
    twin.meta = copy.copy(graph.meta)
    twin.train(graph.training)
    set_stand_in(twin, stand_in(graph))
    return twin


def stand_in(graph: GraphModule) -> Callable[..., Any] | None:
    """What a call of the graph goes to in the place of its nodes, if there is such."""
    found: Callable[..., Any] | None = graph.__dict__.get("forward")
    return found


def set_stand_in(graph: GraphModule, call: Callable[..., Any] | None) -> None:
    """Let a call of the graph go to `call`, which computes what the nodes do; to the nodes again with None.

    The nodes stay, for all that reads them. `repr(call)` is part of the graph's hash.
    """
    graph.__dict__.pop("forward", None)
    if call is not None:
        graph.__dict__["forward"] = call


def is_mutable(node: Node) -> bool:
    """Whether the node writes into a tensor that already exists."""
    schema = getattr(node.target, "_schema", None)  # OpOverload has no public name for its schema
    return bool(schema is not None and schema.is_mutable)


def is_random(node: Node) -> bool:
    """Whether the node may draw random numbers. Dropout that is switched off draws none."""
    off = node.target in OFF_AT_EVAL and node.args[2:] == (False,)
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) and not off


def is_pure(node: Node) -> bool:
    """Whether all that the node does is to return what its arguments determine."""
    known = hasattr(node.target, "_schema") or getattr(node.target, "__module__", None) in ("_operator", "math")
    undefined = getattr(node.target, "overloadpacket", None) in UNDEFINED
    return known and not undefined and not is_mutable(node) and not is_random(node)


def memory(node: Node) -> Node | str:
    """Whose memory a node's result may share: the node that made it, or the name of the stored tensor."""
    root = _root(node)
    return str(root.target) if root.op == "get_attr" else root


def writes(node: Node) -> set[Node | str]:
    """The memory (see `memory`) that a node may write into."""
    written = set[Node | str]()
    if not is_mutable(node):
        return written
    for index, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
            fx.map_arg(value, lambda source: written.add(memory(source)))
    return written


def writer(node: Node) -> Node | None:
    """A node that writes in place into what this one returns, or shares the memory of; None if there is none."""
    own = memory(node)
    return next((each for each in node.graph.nodes if own in writes(each)), None)


def propagate(node: Node) -> None:
    """Give a new node the fake value (`meta["val"]`: shape, type, device) that its operator makes of its inputs'.

    Dynamic sizes stay dynamic.
    """
    if node.op == "get_attr":
        graph = node.graph.owning_module
        tensor = get_tensor(graph, str(node.target)) if graph is not None else None
        near = next((n.meta["val"] for n in node.graph.nodes if isinstance(n.meta.get("val"), Tensor)), None)
        if near is not None and tensor is not None:
            node.meta["val"] = near.new_empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    elif callable(node.target) and all("val" in source.meta for source in node.all_input_nodes):
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: source.meta["val"])
        # As torch.export runs operators: by itself an operator made of others (a linear without a bias, a pad) may ask
        # for its sizes as numbers, which fixes dynamic ones or, in torch 2.11, raises.
        with enable_python_dispatcher():
            node.meta["val"] = node.target(*args, **kwargs)


def _root(node: Node) -> Node:
    """The node whose memory this one's result may share: itself, unless it is a view or passes its input on."""
    while node.op == "call_function" and node.args and (node.target is operator.getitem or is_alias(node)):
        if not isinstance(source := node.args[0], Node):
            break
        node = source
    return node


def is_alias(node: Node) -> bool:
    """Whether the operator may return its first argument, or a view of it, rather than new memory."""
    schema = getattr(node.target, "_schema", None)
    if node.target in SILENT_ALIASES:
        return True
    return schema is not None and any(result.alias_info is not None for result in schema.returns)


def shared_outputs(graph: GraphModule) -> set[tuple[int, str]]:
    """Which outputs share memory with which earlier output (`output 0`), input or parameter."""
    leaves: list[Node] = []
    fx.map_arg(graph.graph.output_node().args, leaves.append)
    held = [memory(leaf) for leaf in leaves]
    shared = {(i, f"output {held.index(each)}") for i, each in enumerate(held) if held.index(each) < i}
    return shared | {(i, str(each)) for i, each in enumerate(held) if isinstance(each, str) or each.op == "placeholder"}


def output_tensors(output: Any) -> list[Tensor]:
    """The tensors in what a model returned, in its order."""
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def taken_apart(output: Any) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """What is in what a model returned, tensors and others, in its order; and what makes its like of other such."""
    parts, structure = pytree.tree_flatten(output)
    return parts, structure.unflatten


def longest(size: torch.SymInt) -> int | None:
    """The most that a dynamic size may be, by what `torch.export` found out; None if there is no limit."""
    most = size.node.shape_env.bound_sympy(size.node.expr).upper
    return int(most) if most.is_Integer else None


def evaluated(size: torch.SymInt, known: Mapping[str, int]) -> int | None:
    """What a dynamic size is where the symbols that it is made of are these; None if one of them is not known."""
    found = size.node.expr.subs({symbol: known.get(str(symbol), symbol) for symbol in size.node.expr.free_symbols})
    return int(found) if found.is_Integer else None


def in_double(graph: GraphModule) -> GraphModule:
    """A copy of the graph that computes in float64 what the graph computes in any type of float."""
    twin = copy.deepcopy(graph).double()
    set_stand_in(twin, None)
    for node in list(twin.graph.nodes):
        if node.target is aten._assert_tensor_metadata.default:
            twin.graph.erase_node(node)
            continue
        node.args, node.kwargs = _doubled(node.args), _doubled(node.kwargs)
    twin.recompile()
    return twin


def _doubled(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_doubled(item) for item in value)
    if isinstance(value, dict):
        return {key: _doubled(item) for key, item in value.items()}
    return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value
