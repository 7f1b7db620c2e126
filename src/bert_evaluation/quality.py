"""Did quality hold? One evaluation against Base's on the same questions."""

from collections.abc import Iterator, Sequence, Set
from dataclasses import replace

from bert_evaluation.evaluation import Evaluation
from bert_evaluation.promise import Approximates
from bert_evaluation.rows import Change, Quality
from bert_evaluation.squad.scores import Column
from bert_evaluation.stats import Difference, against_margin, mcnemar, paired_difference
from bert_evaluation.verification import Verification


def quality(found: Evaluation, margin: float, base: Evaluation | None = None, wary: bool = False) -> Quality:
    """The scores, compared with those of `base`, of which the share `margin` has to be kept.

    `wary` where nothing but these questions speaks for the quality: for an `Approximates` promise, not for one of the
    same function that was checked. See `stats.paired_difference`.
    """
    scores = found.scores
    alone = Quality(
        exact=found.exact,
        f1=found.f1,
        has_answer_exact=scores.get("HasAns_exact"),
        has_answer_f1=scores.get("HasAns_f1"),
        no_answer_exact=scores.get("NoAns_exact"),
        no_answer_f1=scores.get("NoAns_f1"),
        best_exact=scores["best_exact"],
        best_exact_threshold=scores["best_exact_thresh"],
        best_f1=scores["best_f1"],
        best_f1_threshold=scores["best_f1_thresh"],
        samples=len(found.details),
        margin=margin,
    )
    if base is None:
        return alone
    (exact, f1), (base_exact, base_f1) = found.by_question, base.by_question
    changes = tuple(_changes(found, base))
    return replace(
        alone,
        f1_difference=difference(base_f1, f1, margin, wary),
        exact_difference=difference(base_exact, exact, margin, wary),
        mcnemar_p=mcnemar(base_exact, exact),
        changed_answers=len(changes),
        changes=changes,
    )


def f1_difference(found: Evaluation, base: Evaluation, margin: float) -> Difference:
    """The difference of F1 in percentage points, question by question; of the F1 of `base` a share is to be kept."""
    return difference(base.by_question[1], found.by_question[1], margin, wary=False)


def difference(base: Column, variant: Column, margin: float, wary: bool) -> Difference:
    """The difference of two columns of scores (0 to 1), in percentage points, against the loss that `margin` allows."""
    found = paired_difference(100 * base, 100 * variant, 100 if wary else None)
    return against_margin(found, (1 - margin) * 100 * float(base.mean()))


def _changes(found: Evaluation, base: Evaluation) -> Iterator[Change]:
    for question, before in base.details.items():
        after = found.details[question]
        if after.text != before.text:
            yield Change(question, before.text, after.text, before.margin, after.margin)


def alarm(found: Quality, check: Verification | None) -> str | None:
    """A sentence if answers changed though the recipe promises the same function, with the clearest of them."""
    if check is None or check.promise == Approximates.kind or not found.changes:
        return None
    clearest = max(found.changes, key=lambda change: change.margin_before)
    return (
        f"{len(found.changes)} {'answer' if len(found.changes) == 1 else 'answers'} changed though the promise is"
        f" {check.promise}: the clearest, of question {clearest.question}, was decided by"
        f" {clearest.margin_before:.1e} logits; on the probes outputs differ by up to {check.max_abs_error:.1e}"
    )


def calibrated_on(found: Evaluation, steps: Sequence[str], questions: Set[str]) -> str | None:
    """A sentence if questions that are scored are among those that these steps of a recipe were calibrated on."""
    both = len(questions & found.details.keys())
    if not steps or not both:
        return None
    return (
        f"{' and '.join(steps)} {'was' if len(steps) == 1 else 'were'} calibrated on {both} of these"
        f" {len(found.details)} questions: on others quality may be lower"
    )
