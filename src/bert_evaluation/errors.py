"""What went wrong, in one sentence that says what to do: the only exceptions a user is meant to see."""


class BertEvaluationError(Exception):
    """Something the user can mend. Its text is the whole message; the command line exits with 1."""


class UsageError(BertEvaluationError):
    """The request itself is off: an unknown name, a number out of range. The command line exits with 2."""


class CaptureError(BertEvaluationError):
    """A module that cannot be turned into a graph with a dynamic batch."""


class CheckpointError(BertEvaluationError):
    """A checkpoint that is not there, or that cannot answer questions."""


class DatasetError(BertEvaluationError):
    """A data set that is not there, or that is not SQuAD."""


class CalibrationError(BertEvaluationError):
    """A graph for which there are no inputs to calibrate with."""


class TransformationError(BertEvaluationError):
    """A transformation that failed or cannot be undone. The graph is as it was before the call."""


class StoreError(BertEvaluationError):
    """Results that cannot be kept or found: a full disk, a read-only folder, a file of another program or version."""


class InterruptedRunError(BertEvaluationError):
    """Ctrl-C. Its text says what is kept; the command line exits with 130."""
