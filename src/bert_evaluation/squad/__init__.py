"""Question answering as SQuAD has it: data, windows, answers, scores."""

from bert_evaluation.squad.dataset import Dataset, Example, from_rows, read_squad, sample
from bert_evaluation.squad.scores import score

__all__ = ["Dataset", "Example", "from_rows", "read_squad", "sample", "score"]
