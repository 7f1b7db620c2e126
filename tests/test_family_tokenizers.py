"""The tokenizers behave as their families' published ones do, and as what reads them expects."""

import pytest
import torch
from families import FAMILIES
from family_tokenizers import checkpoint, left_padded, tokenizer

from bert_evaluation import load

QUESTION = "when was the Café built?"
PASSAGE = "It was built in 1899 by the king’s brother,  who won “the river”\nand is the first ﬁne Café in a city. " * 3

# What stands around question and passage, and whose template gives the passage a token type of its own.
ENDS = dict.fromkeys(FAMILIES, ("[CLS]", "[SEP]", "[SEP]")) | dict.fromkeys(
    ("roberta", "mpnet", "camembert", "xlm-roberta"), ("<s>", "</s></s>", "</s>")
)
HAVE_TYPES = {"bert", "distilbert", "electra", "albert", "deberta-v2", "mobilebert"}
ASKS_FOR_TYPES = {"bert", "electra", "deberta-v2", "mobilebert"}  # not distilbert and albert, whose templates have them
BLANKS_IN_OFFSETS = {"deberta-v2", "modernbert"}  # a word's token begins at the blank before the word


def encode(made):
    return made(
        QUESTION,
        PASSAGE,
        truncation="only_second",
        max_length=32,
        stride=8,
        padding="max_length",
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        return_token_type_ids=True,
    )


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request, tmp_path_factory):
    return request.param, *load(checkpoint(request.param, tmp_path_factory.mktemp(request.param)))


def test_what_is_saved_comes_back(loaded):
    name, _, read = loaded
    made = tokenizer(name)
    assert read.is_fast
    assert type(read) is type(made)
    assert len(read) == len(made) <= 400
    assert encode(read).data == encode(made).data
    assert read.model_input_names == made.model_input_names
    assert read.special_tokens_map == made.special_tokens_map


def test_template_and_types(loaded):
    name, _, read = loaded
    first, middle, last = ENDS[name]
    ids = read(QUESTION, "the city", return_token_type_ids=True)
    tokens = read.convert_ids_to_tokens(ids["input_ids"])
    special = [token if part is None else "." for token, part in zip(tokens, ids.sequence_ids(), strict=True)]
    assert "".join(special).replace(".", "") == first + middle + last
    assert set(ids["token_type_ids"]) == ({0, 1} if name in HAVE_TYPES else {0})
    assert ("token_type_ids" in read.model_input_names) == (name in ASKS_FOR_TYPES)


def test_offsets_lead_back_to_the_text(loaded):
    name, _, read = loaded
    encoded = encode(read)
    seen, blanks = set(), 0
    for window in range(len(encoded["input_ids"])):
        for part, (start, end) in zip(encoded.sequence_ids(window), encoded["offset_mapping"][window], strict=True):
            if part is None:
                assert start == end == 0
                continue
            text = (QUESTION, PASSAGE)[part]
            assert 0 <= start <= end <= len(text)
            blanks += len(text[start:end].lstrip()) not in (0, end - start)
            if part == 1:
                seen.update(range(start, end))
    assert len(encoded["input_ids"]) > 3
    assert seen.issuperset(index for index, letter in enumerate(PASSAGE) if not letter.isspace())
    assert bool(blanks) == (name in BLANKS_IN_OFFSETS)


def test_a_word_is_found_where_it_stands(loaded):
    _, _, read = loaded
    encoded = read(QUESTION, PASSAGE, return_offsets_mapping=True)
    start = PASSAGE.index("river")
    token = encoded.char_to_token(start, sequence_index=1)
    first, last = encoded["offset_mapping"][token]
    assert PASSAGE[first:last].strip() == "river"


def test_the_model_reads_them(loaded):
    name, model, read = loaded
    encoded = encode(read)
    ids, mask = torch.tensor(encoded["input_ids"]), torch.tensor(encoded["attention_mask"])
    assert ids.max() < model.config.vocab_size == len(read)
    assert model.config.pad_token_id == read.pad_token_id
    inputs = {"token_type_ids": torch.tensor(encoded["token_type_ids"])} if name in ASKS_FOR_TYPES else {}
    with torch.inference_mode():
        output = model(input_ids=ids, attention_mask=mask, **inputs)
    assert output.start_logits.shape == output.end_logits.shape == ids.shape
    assert output.start_logits.isfinite().all()


def test_padding_in_front(tmp_path):
    _, read = load(left_padded(tmp_path))
    ids = read("who", padding="max_length", max_length=8)["input_ids"]
    assert ids[:5] == [read.pad_token_id] * 5
    assert ids[5] == read.cls_token_id
