"""A graph as a shared library, by AOTInductor: a call of it is one call from Python, with nothing but the inputs.

torch.compile asks at each call whether its code fits, and hands over every parameter: a tenth of a millisecond, in
which a small model could have answered. A library knows where the parameters of its graph lie.
"""

import os
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._inductor import aoti_compile_and_package  # documented, under this name
from torch.export import Dim

from bert_evaluation import extension, kernels
from bert_evaluation import graph as graphs
from bert_evaluation.graph import GraphModule

SOURCES = ("aot_inductor.cpp", "aot_inductor_shims.cpp")
# How a C function takes what an operator takes.
IN_C = {
    "Tensor": "AtenTensorHandle",
    "Optional[Tensor]": "AtenTensorHandle*",
    "int": "int64_t",
    "str": "const char*",
    "float": "double",
}


@cache
def why_not_built() -> str | None:
    """Compile and load what libraries need, unless that is done; why that failed, if it did (see `extension`)."""
    return extension.why_not_loaded("libraries", Path(__file__).parent, SOURCES, ["-O2", "-std=c++20"])


def config() -> dict[str, Any]:
    """Parameters stay where they are, and our operators are called as the C functions in `aot_inductor_shims.cpp`."""
    shims = {operator: [_declaration(operator)] for operator in kernels.TWINS}
    return {"aot_inductor.package_constants_in_so": False, "aot_inductor.custom_ops_to_c_shims": shims}


def _declaration(operator: torch._ops.OpOverload) -> str:
    taken = [f"{IN_C[str(each.type)]} {each.name}" for each in operator._schema.arguments]
    name = operator._schema.name.rpartition("::")[2]
    return f"AOTITorchError aoti_torch_cpu_{name}({', '.join(taken)}, AtenTensorHandle* result)"


def library(
    graph: GraphModule, examples: Mapping[str, Tensor], dynamic: Mapping[str, list[int]], options: Mapping[str, Any]
) -> Callable[[Mapping[str, Tensor]], list[Tensor]]:
    """What returns the tensors that a graph returns, one after the other; Inductor gets these options.

    `examples` are inputs, and `dynamic` says which of their dimensions may have other sizes. Inputs are read as they
    lie: contiguous, and of the types of the examples. The tensors that the graph has now are read at every call, but
    for the smallest, up to 8 numbers, which Inductor may write into its code.

    Raises RuntimeError without a compiler, and what torch raises, as if a dimension has to be as it is in the examples.
    """
    if (reason := why_not_built()) is not None:
        raise RuntimeError(reason)
    shapes = {name: dict.fromkeys(dynamic[name], Dim.DYNAMIC) for name in examples}
    exported = torch.export.export(graph, (), dict(examples), dynamic_shapes=shapes)
    tensors = {**exported.constants, **graphs.tensors(graph)}  # what is exported may be copies
    # What is loaded is unpacked into a folder of its own, which goes with it.
    with tempfile.TemporaryDirectory() as folder:
        package = aoti_compile_and_package(
            exported, package_path=str(Path(folder, "graph.pt2")), inductor_configs={**config(), **options}
        )
        made = torch.classes.bert_evaluation.Library(package, os.cpu_count())
    made.read({name: tensors[name] for name in made.names()})
    return lambda inputs: made.run([inputs[name] for name in examples])
