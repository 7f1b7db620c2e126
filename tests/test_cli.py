"""The command line, in a process of its own: what is printed, the exit code, and what is said of bad input."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from families import tiny

from bert_evaluation import builtin

ROOT = Path(__file__).parents[1]
OFFLINE = os.environ | {"HF_HUB_OFFLINE": "1"}


def run(*arguments, program=(sys.executable, str(ROOT / "bert-evaluation.py")), cwd=None):
    command = [*program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=OFFLINE, cwd=cwd)


def says(result, code, *parts):
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    for part in parts:
        assert part in result.stderr
    return result


def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(builtin.CHECKPOINT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint that a user might have: the built-in tokenizer, random weights."""
    path = tmp_path_factory.mktemp("checkpoint")
    tiny("distilbert", vocab_size=30522).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def test_everything_at_once(tmp_path):
    file = tmp_path / "result.json"
    options = ("--samples", 6, "--rounds", 8, "--json", file, "--device", "cpu")
    result = run("--infer", "--evaluate", "--transform", *options)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert "Question: Which zelda game is my favorite?" in result.stdout
    assert "Answer: Ocarina of time or The Wind Waker" in result.stdout
    assert "Base average inference: " in result.stdout
    assert "Base+MergeLinears average inference: " in result.stdout
    assert "6 of 6 sites; max difference" in result.stdout
    assert "Base+LintAndRecompile: no sites, the graph stays the same; not timed" in result.stdout
    assert "Base+FuseBiasInLinear: F1 " in result.stdout

    content = json.loads(file.read_text())
    rows = {row["name"]: row for row in content["rows"]}
    assert content["schema"] == 1
    assert content["model"]["name"] == "built-in"
    assert content["model"]["parameters"] > 20_000_000
    assert content["dataset"] == {"name": "built-in", "samples": 6, "seed": 42}
    assert content["machine"]["torch"] == torch.__version__
    names = ["LintAndRecompile", "MergeLinears", "FuseBiasInLinear", "ChangeTrueDivToMulByInverse", "RemoveDropout"]
    assert list(rows) == ["Base", *(f"Base+{name}" for name in names), "Base+" + "+".join(names)]
    assert all(row["quality"]["samples"] == 6 for row in rows.values())
    assert all(row["quality"]["f1"] == pytest.approx(rows["Base"]["quality"]["f1"], abs=1e-6) for row in rows.values())
    merged, lint = rows["Base+MergeLinears"], rows["Base+LintAndRecompile"]
    assert merged["recipe"] == "MergeLinears()"
    assert merged["sites"] == [{"transformation": "MergeLinears", "found": 6, "applied": 6, "refused": []}]
    assert merged["promise"]["kind"] == "reassociates"
    assert all(row["promise"]["verdict"] == "kept" for row in list(rows.values())[1:])
    assert merged["latency_ms"]["samples"] == 8
    assert merged["speedup"]["low"] <= merged["speedup"]["estimate"] <= merged["speedup"]["high"]
    assert merged["speedup"]["verdict"] in ("faster", "slower", "cannot tell")
    assert lint["latency_ms"] is lint["speedup"] is lint["samples_per_second"] is None
    assert rows["Base"]["promise"] is rows["Base"]["speedup"] is None


def test_transform_alone_times_nothing(folder):
    result = run("--transform", "--recipe", "RemoveDropout+MergeLinears", "--recipe", "MergeLinears", "--model", folder)
    assert result.returncode == 0, result.stderr
    assert "Base+RemoveDropout+MergeLinears: 6 of 6 sites; reassociates promise kept" in result.stdout
    assert "Base+MergeLinears: 2 of 2 sites" in result.stdout
    assert " ms" not in result.stdout


def test_ones_own_question_through_the_console_script(folder):
    script = Path(sys.executable).with_name("bert-evaluation")
    options = ("--infer", "--model", folder, "--question", "Who?", "--context", "Ann.", "--rounds", 2)
    result = run(*options, program=(str(script),))
    assert result.returncode == 0, result.stderr
    assert "Context: Ann.\nQuestion: Who?\nAnswer: " in result.stdout


def test_ones_own_squad_1_file(folder, tmp_path):
    qas = [{"id": "q", "question": "Who?", "answers": [{"text": "Ann", "answer_start": 0}]}]
    data = {"version": "1.1", "data": [{"title": "t", "paragraphs": [{"context": "Ann.", "qas": qas}]}]}
    (tmp_path / "own.json").write_text(json.dumps(data))
    result = run("--evaluate", "--model", folder, "--dataset", tmp_path / "own.json", "--null-threshold", "1e9")
    assert result.returncode == 0, result.stderr
    assert "Data set: own.json, 1 questions" in result.stdout
    assert "Base: F1 100.00, exact 100.00" in result.stdout


def test_quiet_prints_nothing(folder):
    result = run("--infer", "--quiet", "--model", folder, "--rounds", 1)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_help_and_the_list_of_transformations_do_not_import_torch():
    result = run("-h")
    assert result.returncode == 0
    assert all(f"--{option}" in result.stdout for option in ("device", "infer", "evaluate", "transform"))
    code = "import sys, bert_evaluation, bert_evaluation.cli; sys.exit('torch' in sys.modules)"
    assert run("-c", code, program=(sys.executable,)).returncode == 0
    assert "MergeLinears (reassociates, reversible): Linears that read the same" in run("transformations").stdout


def test_nothing_asked_for():
    says(run(), 2, "--infer", "--evaluate", "--transform")


@pytest.mark.parametrize(
    ("options", "code", "parts"),
    [
        (("--transform", "--recipe", "MergeLinear"), 2, ("MergeLinear", "did you mean MergeLinears")),
        (("--transform", "--recipe", "RemoveDropout+"), 2, ("not a recipe",)),
        (("--transform", "--recipe", "MergeLinears(x=1)"), 2, ("does not take", "x")),
        (("--infer", "--device", "cpuu"), 2, ("cpuu", "did you mean cpu")),
        (("--infer", "--device", "tpu:0"), 2, ("tpu",)),
        (("--evaluate", "--samples", "0"), 2, ("0 samples", "1 to 216")),
        (("--evaluate", "--samples", "-4"), 2, ("-4 samples",)),
        (("--evaluate", "--samples", "217"), 2, ("217 samples", "1 to 216")),
        (("--infer", "--rounds", "0"), 2, ("round",)),
        (("--evaluate", "--batch-size", "0"), 2, ("batch size",)),
        (("--infer", "--json", "/nowhere/at/all.json"), 1, ("no folder /nowhere/at",)),
        (("--infer", "--model", "./absent"), 1, ("no checkpoint folder ./absent",)),
        (("--infer", "--model", "someone/not-in-the-cache"), 1, ("someone/not-in-the-cache", "give a folder")),
        (("--evaluate", "--dataset", "someone/not-in-the-cache"), 1, ("someone/not-in-the-cache", "cannot be had")),
        (("--evaluate", "--dataset", "absent.json"), 1, ("no data set file absent.json",)),
    ],
)
def test_bad_requests(options, code, parts):
    says(run(*options), code, *parts)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there():
    says(run("--infer", "--device", "cuda"), 1, "no device cuda", "it has cpu")


def test_an_unknown_option_is_named():
    result = run("--infre")
    assert result.returncode == 2
    assert "--infre" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("content", "part"),
    [("{nope", "not JSON"), ('{"a": 1}', "not SQuAD"), ('{"data": []}', "no questions")],
)
def test_bad_data_sets(tmp_path, content, part):
    (tmp_path / "bad.json").write_text(content)
    says(run("--evaluate", "--dataset", tmp_path / "bad.json"), 1, part)


def test_an_answer_that_is_elsewhere(tmp_path):
    content = json.loads(builtin.QUESTIONS.read_text(encoding="utf-8"))
    question = content["data"][0]["paragraphs"][0]["qas"][0]
    question["answers"][0]["answer_start"] += 1
    (tmp_path / "off.json").write_text(json.dumps(content))
    says(run("--evaluate", "--dataset", tmp_path / "off.json"), 1, question["id"], "does not stand at", "answer_start")


def without_weights(path):
    tiny("bert").config.save_pretrained(path)


def pickled(path):
    without_weights(path)
    torch.save({}, path / "pytorch_model.bin")


def without_head(path):
    config = transformers.BertConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=1, intermediate_size=8)
    transformers.BertForMaskedLM(config).save_pretrained(path)
    tokenizer().save_pretrained(path)


def of_no_question_answering_kind(path):
    config = transformers.ViTConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=1, intermediate_size=8)
    transformers.ViTModel(config).save_pretrained(path)


def damaged(path):
    tiny("bert").save_pretrained(path)
    (path / "model.safetensors").write_bytes(b"rubbish")


def without_tokenizer(path):
    tiny("bert").save_pretrained(path)


def with_broken_config(path):
    tiny("bert").save_pretrained(path)
    (path / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda path: None, "no config.json"),
        (without_weights, "has no weights"),
        (pickled, "pickled weights (pytorch_model.bin)"),
        (without_head, "no question-answering head: it is a BertForMaskedLM without the weights qa_outputs.bias"),
        (of_no_question_answering_kind, "no question-answering head"),
        (damaged, "damaged"),
        (without_tokenizer, "tokenizer"),
        (with_broken_config, "cannot be loaded"),
    ],
)
def test_bad_checkpoints(tmp_path, make, part):
    make(tmp_path)
    says(run("--infer", "--model", tmp_path), 1, part)


def test_ctrl_c_is_one_sentence(folder):
    command = [sys.executable, str(ROOT / "bert-evaluation.py"), "--infer", "--transform", "--model", str(folder)]
    command += ["--rounds", "1000000", "--recipe", "MergeLinears"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=OFFLINE) as process:
        assert process.stdout.readline() == "Transformations\n"  # timing has begun or is about to
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
    assert process.returncode == 130
    assert errors.startswith("bert-evaluation: Interrupted: ")
    assert len(errors.splitlines()) == 1


def test_debug_shows_the_traceback():
    result = run("--infer", "--model", "./absent", "--debug")
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "no checkpoint folder" in result.stderr
