import os
import shutil
import subprocess
import sys

import datasets
import pytest
import torch
import transformers
from families import tiny

from bert_evaluation import builtin, load
from bert_evaluation.errors import CheckpointError
from bert_evaluation.squad import Example


def test_the_built_in_checkpoint(built_in):
    model, tokenizer = built_in
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (6, 384)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not model.training
    assert tokenizer.is_fast


def test_stored_half_precision_runs_in_single(tmp_path):
    tiny("bert", vocab_size=30522).half().save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(builtin.CHECKPOINT).save_pretrained(tmp_path)
    assert load(tmp_path)[0].dtype == torch.float32


def snapshot(repository):
    """Where the hub's cache keeps the files of the main branch."""
    revision = "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    return repository / "snapshots" / revision


def test_a_hub_checkpoint_from_its_cache(tmp_path, monkeypatch):
    shutil.copytree(builtin.CHECKPOINT, snapshot(tmp_path / "models--someone--small-squad"))
    monkeypatch.setattr(transformers.utils.hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert load("someone/small-squad")[0].config.hidden_size == 384
    with pytest.raises(CheckpointError, match="other-squad cannot be loaded"):
        load("someone/other-squad")


def test_a_hub_data_set_from_its_cache(tmp_path):
    row = {"id": "q1", "title": "t", "context": "One two.", "question": "Which?"}
    files = snapshot(tmp_path / "hub" / "datasets--someone--own_squad") / "plain"
    files.mkdir(parents=True)
    table = datasets.Dataset.from_list([{**row, "answers": {"text": ["two"], "answer_start": [4]}}])
    table.to_parquet(files / "validation-00000-of-00001.parquet")
    code = "from bert_evaluation import load_dataset; print(tuple(load_dataset('someone/own_squad').examples))"
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == str((Example("q1", "Which?", "One two.", ("two",)),)), done.stderr
    assert not list(tmp_path.rglob("*.arrow"))  # no second copy
