import json
import tracemalloc

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


def test_a_file_is_read_anew_each_time_and_never_held(tmp_path):
    data = read_squad(write(tmp_path, squad()))
    assert list(data.examples) == list(data.examples)
    paragraph = {"context": "One two. " * 500, "qas": []}
    with (tmp_path / "large.json").open("w") as file:
        file.write('{"data": [{"paragraphs": [')
        for index in range(4000):
            qas = [{"id": f"{index}-{i}", "question": "?" * 500, "answers": []} for i in range(4)]
            file.write(json.dumps({**paragraph, "qas": qas}) + ("," if index < 3999 else ""))
        file.write("]}]}")
    tracemalloc.start()
    large = read_squad(tmp_path / "large.json")
    (drawn,) = sample(large, 1).examples
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(large) == 16000
    assert len(drawn.context) == 4500
    assert (tmp_path / "large.json").stat().st_size > 25e6
    assert peak < 3e6


def test_a_byte_order_mark_is_no_part_of_the_file(tmp_path):
    (tmp_path / "data.json").write_text(json.dumps(squad()), encoding="utf-8-sig")
    assert len(read_squad(tmp_path / "data.json")) == 1


def test_the_content_hash_tells_any_difference(tmp_path):
    same = {read_squad(write(tmp_path, squad())).content_hash for _ in range(2)}
    others = [squad(context="One two!"), squad(text="tw"), squad(question="What?"), squad(id="q2")]
    assert len(same) == 1
    assert len(same | {read_squad(write(tmp_path, other)).content_hash for other in others}) == 5
    two = [Example("a", "?", "c", ()), Example("b", "?", "c", ())]
    assert (
        Dataset("x", two).content_hash == Dataset("y", tuple(two)).content_hash != Dataset("x", two[::-1]).content_hash
    )
