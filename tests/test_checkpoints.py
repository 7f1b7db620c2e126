import shutil

import pytest
import torch
import transformers
from families import tiny

from bert_evaluation import builtin, load
from bert_evaluation.errors import CheckpointError


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


def test_a_hub_checkpoint_from_its_cache(tmp_path, monkeypatch):
    revision = "0" * 40
    repository = tmp_path / "models--someone--small-squad"
    shutil.copytree(builtin.CHECKPOINT, repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    monkeypatch.setattr(transformers.utils.hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert load("someone/small-squad")[0].config.hidden_size == 384
    with pytest.raises(CheckpointError, match="other-squad cannot be loaded"):
        load("someone/other-squad")
