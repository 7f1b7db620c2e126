"""The question-answering pipeline of transformers 4, one question at a time: `python original_pipeline.py CHECKPOINT`.

Reads lines of JSON, each a list of questions (id, question, context), and answers each with a line: answers by id. As
`evaluate`'s evaluator called it for SQuAD 2.0: an answer may be impossible. It runs in an environment of its own.
"""

import json
import sys

import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, pipeline

model = AutoModelForQuestionAnswering.from_pretrained(sys.argv[1], torch_dtype=torch.float32).eval()
answer = pipeline("question-answering", model=model, tokenizer=AutoTokenizer.from_pretrained(sys.argv[1]), device="cpu")
for line in sys.stdin:
    found = {}
    for each in json.loads(line):
        options = {"handle_impossible_answer": True, "max_answer_len": 30, "doc_stride": 128, "max_seq_len": 384}
        found[each["id"]] = answer(question=each["question"], context=each["context"], **options)["answer"]
    print(json.dumps(found), flush=True)
