"""A small fast tokenizer of each family's own class, and complete tiny checkpoints.

The vocabularies are made here, of a few words and all single characters; the special tokens and their places, the pair
template, the normalisation and the token types are those of the published checkpoints, but for the map of characters
that ALBERT, CamemBERT and XLM-RoBERTa carry in their SentencePiece files. Nothing is trained, since trainers may number
their pieces differently in each process.
"""

import re
import string
from itertools import accumulate

import tokenizers
import transformers as t
from families import tiny

WORDS = re.findall(r"\w+", "the of and in was is to who when what where city king river year built won by first")
ENDINGS = ["ed", "ing", "er", "ly"]
LETTERS = string.digits + string.ascii_letters + string.punctuation + "éü–“”"
LOWER = [letter for letter in LETTERS if letter == letter.lower() and letter not in "éü"]  # their accents are stripped


def numbered(*pieces):
    return {piece: number for number, piece in enumerate(pieces)}


def word_pieces(first, last=()):
    return numbered(*first, *WORDS, *LOWER, *("##" + piece for piece in (*LOWER, *ENDINGS)), *last)


def sentence_pieces(first, letters=LETTERS, last=()):
    """Pieces with log probabilities, so that one long piece beats many short ones."""
    words = [*("▁" + word for word in WORDS), *ENDINGS]
    scored = [*((word, -4.0) for word in words), *((letter, -8.0) for letter in ("▁", *letters))]
    return [*((piece, 0.0) for piece in first), *scored, *((piece, 0.0) for piece in last)]


def byte_pairs(first, last):
    """Every byte, and the words, each grown letter by letter."""
    grown = dict.fromkeys(piece for word in WORDS for piece in accumulate("Ġ" + word) if len(piece) > 1)
    single = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = [(piece[:-1], piece[-1]) for piece in grown]
    return {"vocab": numbered(*first, *single, *grown, *last), "merges": merges}


def of_modernbert():
    """ModernBERT has no class of its own: its file holds the whole pipeline, which leaves blanks in the offsets."""
    special = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]
    made = tokenizers.Tokenizer(tokenizers.models.BPE(**byte_pairs(["<|padding|>", "<|endoftext|>"], special)))
    made.normalizer = tokenizers.normalizers.NFC()
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[(token, made.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    names = {f"{token.strip('[]').lower()}_token": token for token in special}
    return {"tokenizer_object": made, "model_input_names": ["input_ids", "attention_mask"], **names}


BERT = {"vocab": word_pieces(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])}
FAIRSEQ = ["<s>", "<pad>", "</s>", "<unk>"]
NOT_USED = ["<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>", "<unk>NOTUSED", "<s>", "</s>"]

MADE_OF = {
    "bert": (t.BertTokenizerFast, BERT),
    "roberta": (t.RobertaTokenizerFast, byte_pairs(FAIRSEQ, ["<mask>"])),
    "distilbert": (t.DistilBertTokenizerFast, BERT),
    "electra": (t.ElectraTokenizerFast, BERT),
    "albert": (t.AlbertTokenizer, {"vocab": sentence_pieces(["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"], LOWER)}),
    "mpnet": (t.MPNetTokenizer, {"vocab": word_pieces([*FAIRSEQ, "[UNK]"], ["<mask>"])}),
    "camembert": (t.CamembertTokenizer, {"vocab": sentence_pieces(NOT_USED, last=["<mask>"])}),
    "xlm-roberta": (t.XLMRobertaTokenizer, {"vocab": sentence_pieces(FAIRSEQ, last=["<mask>"])}),
    "deberta-v2": (
        t.DebertaV2Tokenizer,
        {"vocab": sentence_pieces(["[PAD]", "[CLS]", "[SEP]", "[UNK]"], last=["[MASK]"])},
    ),
    "modernbert": (t.PreTrainedTokenizerFast, of_modernbert()),
    "mobilebert": (t.MobileBertTokenizerFast, BERT),
}


def tokenizer(name, **more):
    """The family's tokenizer; 512 tokens are the most that every tiny model has positions for."""
    made, arguments = MADE_OF[name]
    return made(**({"model_max_length": 512} | arguments | more))


def checkpoint(name, folder, **more):
    """A tiny model and its tokenizer (which takes `more`), written as a checkpoint that `load` reads."""
    made = tokenizer(name, **more)
    special = {f"{role}_token_id": getattr(made, f"{role}_token_id") for role in ("pad", "cls", "sep", "bos", "eos")}
    tiny(name, vocab_size=len(made), **special).save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


def left_padded(folder):
    """A checkpoint whose tokenizer pads in front."""
    return checkpoint("bert", folder, padding_side="left")
