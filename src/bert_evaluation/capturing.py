"""A module becomes a graph of ATen operators: dynamic batch and length, original names, its parameters shared."""

import importlib
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bert_evaluation import kernels, onednn
from bert_evaluation.errors import CaptureError
from bert_evaluation.graph import GraphModule, Node

aten = torch.ops.aten
DYNAMIC = torch.export.Dim.DYNAMIC
CHECKPOINT = "bert_evaluation.checkpoint"  # key in GraphModule.meta: the name of the model's, and its longest input


def capture(
    module: nn.Module,
    example_inputs: Mapping[str, Tensor] | None = None,
    dynamic_shapes: Mapping[str, Any] | None = None,
) -> GraphModule:
    """Export `module`, as it computes in eval mode, to a graph that is called by keyword and returns what it returns.

    `example_inputs` may be left out for a transformers encoder. The first dimension of each input is dynamic (for a
    transformers encoder the length too), sizes of 1 included, unless `dynamic_shapes` (as `torch.export` takes it)
    says otherwise. The graph shares the module's parameters under their names; the module itself is left as it is.
    Raises CaptureError if the module cannot be exported so.
    """
    if example_inputs is None:
        example_inputs = text_inputs(module)
        dynamic_shapes = dynamic_shapes or {name: {0: DYNAMIC, 1: DYNAMIC} for name in example_inputs}
    elif dynamic_shapes is None:
        example_inputs = {name: _at_least_two_rows(tensor) for name, tensor in example_inputs.items()}
        dynamic_shapes = {name: {0: DYNAMIC} if tensor.dim() else {} for name, tensor in example_inputs.items()}
    with eval_mode(module), torch.no_grad():
        graph = _plain(_export(module, example_inputs, dynamic_shapes))
    if name := getattr(getattr(module, "config", None), "name_or_path", None):
        graph.meta[CHECKPOINT] = (name, longest_input(module))
    return graph


def save(graph: GraphModule, file: str | Path) -> None:
    """Write a graph, transformed or not, as an archive of `torch.export` (`.pt2`): operators, parameters, shapes.

    Its history does not travel: what was transformed before cannot be undone after. What is fused and packed for a
    processor is written in plain operators, for any. Raises CaptureError.
    """
    graph = onednn.expand(graph)
    with torch.no_grad():
        torch.export.save(_export(graph, example_inputs(graph), dynamic_dimensions(graph)), file)


def read(file: str | Path) -> GraphModule:
    """The graph that `save` wrote. Raises CaptureError for a file that is not there or is something else."""
    if not Path(file).is_file():
        raise CaptureError(f"There is no file {file}.")
    importlib.import_module("transformers.modeling_outputs")  # makes the types of outputs known to torch
    try:
        return kernels.prepare(_plain(torch.export.load(file)))
    except Exception as error:
        raise CaptureError(f"{file} is not an archive of torch.export: {error}") from error


def text_inputs(module: nn.Module, batch: int = 2, length: int = 16) -> dict[str, Tensor]:
    """Inputs of a transformers encoder: ids, mask and, where it has types of token, those; (batch, length), int64."""
    config: Any = getattr(module, "config", None)
    vocabulary = getattr(config, "vocab_size", None)
    if vocabulary is None:
        raise CaptureError(
            f"{type(module).__name__} is no transformers encoder: say what it is called with, as in"
            ' capture(module, example_inputs={"x": tensor}).'
        )
    device = next(module.parameters()).device
    ids = (torch.arange(batch * length, device=device) % vocabulary).reshape(batch, length)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    takes_types = "token_type_ids" in inspect.signature(module.forward).parameters
    if takes_types and getattr(config, "type_vocab_size", 0) > 1:
        inputs["token_type_ids"] = torch.zeros_like(ids)
    return inputs


def longest_input(module: nn.Module) -> int:
    """The tokens that a transformers encoder reads at most; 512 for one that does not say."""
    positions = int(getattr(module.config, "max_position_embeddings", 512))
    # RoBERTa and its kin number positions from behind the padding token's id.
    table = next((part for name, part in module.named_modules() if name.endswith("position_embeddings")), None)
    padding = getattr(table, "padding_idx", None)
    return positions - (padding + 1 if padding is not None and padding > 0 else 0)


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Switch a module to eval mode, and each of its parts back to what it was."""
    training = {part for part in module.modules() if part.training}
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _at_least_two_rows(tensor: Tensor) -> Tensor:
    # Export takes a size of 1 in its example for a constant.
    return torch.cat([tensor, tensor]) if tensor.dim() and tensor.shape[0] == 1 else tensor


def _export(module: nn.Module, inputs: Mapping[str, Tensor], shapes: Mapping[str, Any]) -> torch.export.ExportedProgram:
    try:
        # Not strict: the module runs as it is, without Dynamo, in a tenth of the time.
        return torch.export.export(module, (), dict(inputs), dynamic_shapes=dict(shapes), strict=False)
    except Exception as error:
        raise CaptureError(f"{type(module).__name__} cannot be exported with these dynamic sizes: {error}") from error


def _plain(exported: torch.export.ExportedProgram) -> GraphModule:
    # Without guards, since those would refuse sizes of 1, which every operator handles.
    unlifted = exported.module(check_guards=False)
    # A tensor that the model makes of a number is a fresh copy, of which autograd is told that it is one: to no effect,
    # but as a call that writes in place it would never be dead.
    for node in unlifted.graph.find_nodes(op="call_function", target=aten.detach_.default):
        made = node.args[0]
        if isinstance(made, Node) and made.target is aten.lift_fresh_copy.default:
            node.replace_all_uses_with(made)
            unlifted.graph.erase_node(node)
    unlifted.graph.eliminate_dead_code()
    return GraphModule(unlifted, unlifted.graph, "Captured").eval()


def dynamic_dimensions(graph: GraphModule) -> dict[str, dict[int, Any]]:
    """Which dimensions of each input are dynamic, as `torch.export` takes them."""
    return {
        str(node.target): {i: DYNAMIC for i, size in enumerate(node.meta["val"].shape) if not isinstance(size, int)}
        for node in graph.graph.find_nodes(op="placeholder")
    }


def example_inputs(graph: GraphModule, smallest: int = 2) -> dict[str, Tensor]:
    """Inputs that a graph takes: normal floats, zeros of other types. Equal dynamic sizes stay equal.

    The first dynamic size (the batch) is `smallest`, each further one 3 more. Raises CaptureError for a graph that
    does not know its shapes.
    """
    random, sizes, inputs = torch.Generator().manual_seed(0), dict[str, int](), dict[str, Tensor]()
    for node in graph.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            raise CaptureError(f"The graph does not know the shape of its input {node.target}; make it with capture.")
        shape = [
            size if isinstance(size, int) else sizes.setdefault(str(size), smallest + 3 * len(sizes))
            for size in value.shape
        ]
        tensor = torch.randn(shape, generator=random) if value.is_floating_point() else torch.zeros(shape)
        inputs[str(node.target)] = tensor.to(value.device, value.dtype)
    return inputs
