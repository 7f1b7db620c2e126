import json

import datasets
import pytest

from bert_evaluation import builtin, load_dataset
from bert_evaluation.errors import DatasetError, UsageError
from bert_evaluation.squad import Dataset, Example, from_rows, read_squad, sample


def squad(context="One two.", text="two", start=4, **more):
    question = {"id": "q1", "question": "Which?", "answers": [{"text": text, "answer_start": start}], **more}
    return {"version": "v2.0", "data": [{"title": "t", "paragraphs": [{"context": context, "qas": [question]}]}]}


def write(tmp_path, content):
    file = tmp_path / "data.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


@pytest.mark.parametrize("more", [{}, {"is_impossible": False}])
def test_reads_both_versions(tmp_path, more):
    assert tuple(read_squad(write(tmp_path, squad(**more))).examples) == (
        Example("q1", "Which?", "One two.", ("two",)),
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("", "not JSON"),
        ("[1]", "not SQuAD"),
        ({"data": [{"paragraphs": 3}]}, "not SQuAD"),
        ({"data": [{"paragraphs": [{"qas": [3]}]}]}, "not SQuAD"),
        ({"rows": []}, "not SQuAD"),
        ({"data": []}, "no questions"),
        (squad(start=5), r"'two' of question q1 does not stand at 5 .* there is 'wo.'"),
    ],
)
def test_says_what_is_wrong_with_a_file(tmp_path, content, message):
    with pytest.raises(DatasetError, match=message):
        read_squad(write(tmp_path, content))


def test_refuses_an_id_used_twice(tmp_path):
    content = squad()
    content["data"] *= 2
    with pytest.raises(DatasetError, match="more than one question with the id q1"):
        read_squad(write(tmp_path, content))


def test_reads_rows_of_a_hub_data_set(tmp_path):
    row = {"id": "q1", "title": "t", "context": "One two.", "question": "Which?"}
    rows = [{**row, "answers": {"text": ["two"], "answer_start": [4]}}]
    (example,) = from_rows("x", rows).examples
    assert example.answers == ("two",)
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "validation-00000-of-00001.parquet")
    assert list(load_dataset(tmp_path).examples) == [example]
    with pytest.raises(DatasetError, match="needs the columns"):
        from_rows("x", [{"id": "q1"}])


@pytest.mark.parametrize("seed", [42, 7])
def test_samples_as_datasets_does(seed):
    data = Dataset("many", tuple(Example(str(i), "?", "c", ()) for i in range(333)))
    theirs = (
        datasets.Dataset.from_dict({"id": [each.id for each in data.examples]}).shuffle(seed=seed).select(range(50))
    )
    assert [each.id for each in sample(data, 50, seed).examples] == theirs["id"][:]


@pytest.mark.parametrize("number", [0, -1, 217])
def test_refuses_samples_that_there_are_not(number):
    with pytest.raises(UsageError, match="1 to 216"):
        sample(load_dataset(), number)


def test_built_in_questions_are_what_was_promised(built_in):
    data = load_dataset()
    contexts = {each.context for each in data.examples}
    tokenizer = built_in[1]
    long = [text for text in contexts if len(tokenizer(text, verbose=False)["input_ids"]) > 512]
    unanswerable = [each for each in data.examples if not each.answers]
    assert len(data) >= 150
    assert len(contexts) >= 30
    assert len(long) >= 3
    assert len(unanswerable) >= len(data) / 3
    assert any(len(set(each.answers)) > 1 for each in data.examples)
    assert json.loads(builtin.QUESTIONS.read_text(encoding="utf-8"))["version"] == "v2.0"
