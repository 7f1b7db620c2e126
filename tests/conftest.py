import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach a hub
os.environ["BERT_EVALUATION_STORE"] = ":memory:"  # nor keep anything among the results of who runs it
os.environ["BERT_EVALUATION_DEVICE"] = "cpu"  # nor does any depend on a GPU that happens to be there
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # processes that tests start find what this one does

import pytest
import torch
from families import FAMILIES, tiny

from bert_evaluation import capture, load
from bert_evaluation.squad import read_squad

SHARED = Path(os.environ.get("SQUAD_FOLDER", Path(__file__).parents[2] / "shared" / "squad"))


@pytest.fixture(scope="session")
def built_in():
    return load()


@pytest.fixture(scope="session")
def base(built_in):
    return capture(built_in[0])


@pytest.fixture(scope="session", params=FAMILIES)
def family(request):
    """A tiny model of each family, and its graph."""
    model = tiny(request.param)
    return model, capture(model)


@pytest.fixture(scope="session")
def bert():
    return tiny("bert")


@pytest.fixture(scope="session")
def bert_graph(bert):
    return capture(bert)


@pytest.fixture(scope="session")
def half_a():
    """Half of the SQuAD 2.0 dev set, which users do not have."""
    file = SHARED / "squad2-dev-a.json"
    if not file.is_file():
        pytest.skip(f"{file} is absent")
    return read_squad(file)


@pytest.fixture(scope="session")
def golden():
    """Predictions and what the official scorer makes of them."""
    file = SHARED / "golden-scores-a.json"
    if not file.is_file():
        pytest.skip(f"{file} is absent")
    return json.loads(file.read_text())


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
