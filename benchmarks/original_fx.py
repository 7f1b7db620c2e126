"""The original's transformations on the original's stack: `python original_fx.py CHECKPOINT THREADS`.

Reads lines of JSON, each the inputs of one forward pass, and answers each with a line: its seconds and its outputs.
It runs in an environment of its own, with transformers 4 and optimum 1.
"""

import json
import sys
import time

import torch
from optimum.fx.optimization import ChangeTrueDivToMulByInverse, MergeLinears, compose
from transformers import AutoModelForQuestionAnswering
from transformers.utils.fx import symbolic_trace

torch.set_num_threads(int(sys.argv[2]))
model = AutoModelForQuestionAnswering.from_pretrained(sys.argv[1], torch_dtype=torch.float32).eval()
transform, graph = compose(MergeLinears(), ChangeTrueDivToMulByInverse()), None
for line in sys.stdin:
    inputs = {name: torch.tensor(rows) for name, rows in json.loads(line).items()}
    if graph is None:
        graph = transform(symbolic_trace(model, input_names=list(inputs)))
    with torch.inference_mode():
        start = time.perf_counter()
        found = graph(**inputs)
        seconds = time.perf_counter() - start
    outputs = [found["start_logits"].tolist(), found["end_logits"].tolist()]
    print(json.dumps([seconds, outputs]), flush=True)
