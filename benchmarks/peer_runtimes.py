"""The runtimes that `peers.py` times, each made ready at its best settings for one model."""

import copy
import json
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bert_evaluation import graph as graphs
from bert_evaluation.capturing import text_inputs
from bert_evaluation.measurement import timed

CPU = torch.device("cpu")
ORIGINAL = Path(__file__).with_name("original_fx.py")
LARGEST_BATCH, OPSET, CALIBRATION = 64, 18, 8
# Threads of the runtime before go on waiting for work for a while, on the cores that the next one needs.
PAUSE = 0.02  # seconds
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Subject:
    """The model that every peer gets, a folder for what they make of it, and how many threads they may use.

    With `streams` a peer is called by so many threads at once, among which those are shared out; with `many_sizes` it
    is not made for each size of its inputs anew.
    """

    model: nn.Module
    folder: Path
    threads: int
    streams: int = 1
    many_sizes: bool = False

    @property
    def threads_each(self) -> int:
        """Threads of one stream."""
        return max(1, self.threads // self.streams)

    @cached_property
    def onnx(self) -> Path:
        """The model as an ONNX file with dynamic batch and length; each peer that reads it starts from the same one."""
        file, inputs = self.folder / "model.onnx", text_inputs(self.model, 2, 64)
        batch = torch.export.Dim("batch", min=1, max=LARGEST_BATCH)
        length = torch.export.Dim("length", min=2, max=512)
        torch.onnx.export(
            self.model,
            (),
            file,
            kwargs=inputs,
            dynamo=True,
            dynamic_shapes={name: {0: batch, 1: length} for name in inputs},
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=["start", "end"],
            verbose=False,
        )
        return file

    @cached_property
    def fused(self) -> Path:
        """The ONNX file after ONNX Runtime's optimizer for BERT: normalisation and GELU fused, attention if found."""
        from onnxruntime.transformers.optimizer import optimize_model

        config, file = self.model.config, self.folder / "fused.onnx"
        sizes = {"num_heads": config.num_attention_heads, "hidden_size": config.hidden_size}
        optimize_model(str(self.onnx), model_type="bert", opt_level=1, **sizes).save_model_to_file(str(file))
        return file


class Peer:
    """A way to run the model: its precision, and a call that returns seconds and the outputs."""

    is_ours = False

    def __init__(self, run: Callable[[Inputs], Any], precision: str) -> None:
        self.run, self.precision = run, precision

    def call(self, inputs: Inputs) -> tuple[float, list[Tensor]]:
        """One forward pass."""
        time.sleep(PAUSE)
        seconds, outputs = timed(lambda: self.run(inputs), CPU)
        return seconds, [torch.as_tensor(each) for each in outputs]


class Graph(Peer):
    """A captured graph, transformed or not."""

    is_ours = True

    def __init__(self, graph: graphs.GraphModule, precision: str) -> None:
        super().__init__(lambda inputs: graphs.output_tensors(graph(**inputs)), precision)


def _eager(subject: Subject, precision: str) -> Peer:
    model = copy.deepcopy(subject.model).to(torch.bfloat16 if precision == "bf16" else torch.float32)
    return Peer(lambda inputs: graphs.output_tensors(model(**inputs)), precision)


def _compiled(subject: Subject, precision: str) -> Peer:
    import torch._dynamo.config as dynamo
    import torch._inductor.config as inductor

    # One compilation a shape is faster than one for all, but not where there are many.
    inductor.freezing, dynamo.recompile_limit = not subject.many_sizes, 64
    inductor.cpp.threads = subject.threads_each
    model = copy.deepcopy(subject.model).to(torch.bfloat16 if precision == "bf16" else torch.float32)
    compiled = torch.compile(model, dynamic=subject.many_sizes)
    return Peer(lambda inputs: graphs.output_tensors(compiled(**inputs)), precision)


def _onnxruntime(file: Path, subject: Subject, precision: str) -> Peer:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = subject.threads_each, 3
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return Peer(lambda inputs: session.run(None, _arrays(inputs)), precision)


def _quantized_onnxruntime(subject: Subject, precision: str) -> Peer:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    file = subject.folder / "int8.onnx"
    quantize_dynamic(subject.fused, file, weight_type=QuantType.QInt8, per_channel=True)
    return _onnxruntime(file, subject, precision)


def _openvino(subject: Subject, precision: str) -> Peer:
    import openvino

    core = openvino.Core()
    model = core.read_model(subject.onnx)
    hint = "LATENCY" if subject.streams == 1 else "THROUGHPUT"
    settings = {"INFERENCE_NUM_THREADS": subject.threads, "PERFORMANCE_HINT": hint, "NUM_STREAMS": subject.streams}
    if precision == "int8":
        model = _quantized_openvino(model, subject)
    else:
        settings["INFERENCE_PRECISION_HINT"] = {"fp32": "f32", "bf16": "bf16"}[precision]
    compiled = core.compile_model(model, "CPU", settings)
    request = threading.local()  # a request takes one call at a time

    def run(inputs: Inputs) -> list[Any]:
        if not hasattr(request, "own"):
            request.own = compiled.create_infer_request()
        return list(request.own.infer(_arrays(inputs)).values())

    return Peer(run, precision)


def _quantized_openvino(model: Any, subject: Subject) -> Any:
    """By NNCF, calibrated on random tokens: the speed is that of any calibration, the quality is not."""
    import nncf

    random, vocabulary = torch.Generator().manual_seed(2), subject.model.config.vocab_size
    samples = [
        _arrays(
            text_inputs(subject.model, 1, 128) | {"input_ids": torch.randint(vocabulary, (1, 128), generator=random)}
        )
        for _ in range(CALIBRATION)
    ]
    transformer = nncf.ModelType.TRANSFORMER
    return nncf.quantize(model, nncf.Dataset(samples), model_type=transformer, subset_size=CALIBRATION)


def _arrays(inputs: Inputs) -> dict[str, Any]:
    return {name: tensor.numpy() for name, tensor in inputs.items()}


class OriginalStack(Peer):
    """`optimum.fx` on a model of transformers 4, in a process of its own environment, which times itself."""

    def __init__(self, python: Path, subject: Subject) -> None:
        self.precision = "fp32"
        checkpoint = subject.folder / "checkpoint"
        subject.model.save_pretrained(checkpoint)
        command = [str(python), str(ORIGINAL), str(checkpoint), str(subject.threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # noqa: S603

    def call(self, inputs: Inputs) -> tuple[float, list[Tensor]]:
        """One forward pass there; the way to and from it is not timed."""
        time.sleep(PAUSE)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(
            json.dumps({name: tensor.tolist() for name, tensor in inputs.items()}), file=self.process.stdin, flush=True
        )
        seconds, outputs = json.loads(self.process.stdout.readline())
        return seconds, [torch.tensor(each) for each in outputs]


# By name: precision, package, and what makes it ready.
PEERS: Mapping[str, tuple[str, str, Callable[[Subject, str], Peer]]] = {
    "eager fp32": ("fp32", "torch", _eager),
    "eager bf16": ("bf16", "torch", _eager),
    "torch.compile fp32": ("fp32", "torch", _compiled),
    "torch.compile bf16": ("bf16", "torch", _compiled),
    "onnxruntime": ("fp32", "onnxruntime", lambda subject, of: _onnxruntime(subject.onnx, subject, of)),
    "onnxruntime fused": ("fp32", "onnxruntime", lambda subject, of: _onnxruntime(subject.fused, subject, of)),
    "onnxruntime int8": ("int8", "onnxruntime", _quantized_onnxruntime),
    "openvino fp32": ("fp32", "openvino", _openvino),
    "openvino bf16": ("bf16", "openvino", _openvino),
    "openvino int8": ("int8", "nncf", _openvino),
}
