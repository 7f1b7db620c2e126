import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bert_evaluation.stats import Interval, against_margin, mcnemar, median, paired_difference, speedup


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=30))
def test_the_interval_holds_the_median(samples):
    found = median(samples)
    assert found.low <= found.estimate <= found.high
    assert found.estimate == pytest.approx(np.median(samples))


def test_pairing_takes_out_what_slows_a_round():
    rng = np.random.default_rng(0)
    round_speed = rng.lognormal(sigma=1, size=40)
    noise = rng.normal(1, 0.005, size=(2, 40))
    found = speedup(list(round_speed * noise[0]), list(round_speed * noise[1] / 1.1))
    assert found.verdict == "faster"
    assert found.low < 1.1 < found.high
    assert speedup(list(round_speed / 1.1), list(round_speed)).verdict == "slower"


def test_few_or_equal_samples_tell_nothing():
    assert speedup([2.0] * 5, [1.0] * 5).verdict == "cannot tell"
    assert speedup([2.0] * 6, [1.0] * 6).verdict == "faster"
    assert speedup([1.0] * 40, [1.0] * 40).verdict == "cannot tell"


def test_equal_variants_are_seldom_called_different():
    rng = np.random.default_rng(1)
    verdicts = [speedup(*rng.lognormal(sigma=0.05, size=(2, 40)), seed=run).verdict for run in range(300)]
    assert verdicts.count("cannot tell") >= 0.95 * len(verdicts)


@pytest.mark.parametrize(("base", "variant"), [([], []), ([1.0], [1.0, 2.0])])
def test_what_are_no_pairs(base, variant):
    with pytest.raises(ValueError, match="no pairs"):
        speedup(base, variant)


def naive_bootstrap(differences, seed=0):
    draws = np.random.default_rng(seed).integers(len(differences), size=(4000, len(differences)))
    return np.quantile(differences[draws].mean(axis=1), (0.025, 0.975))


def test_a_paired_difference_is_what_a_plain_bootstrap_says():
    rng = np.random.default_rng(1)
    base = rng.random(800)
    variant = np.where(rng.random(800) < 0.1, rng.random(800), base)
    found = paired_difference(base, variant)
    low, high = naive_bootstrap(variant - base)
    assert found.estimate == pytest.approx((variant - base).mean())
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-3)


def test_its_interval_covers_the_truth():
    rng = np.random.default_rng(2)
    covered = 0
    for seed in range(300):
        lost = rng.random(1000) < 0.05
        found = paired_difference(np.ones(1000), np.where(lost, 0.0, 1.0), seed=seed)
        covered += found.low <= -0.05 <= found.high
    assert covered >= 0.92 * 300


def test_one_more_loss_is_the_rule_of_three():
    found = paired_difference(np.ones(1000), np.ones(1000), one_more_loss=1.0)
    assert found.estimate == found.high == 0
    assert -4.5 / 1000 < found.low < -2 / 1000


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(-0.5, 0.3, "not worse"), (-1.5, 0.3, "cannot tell"), (-3.0, -1.5, "worse"), (-1.0, 0.0, "not worse")],
)
def test_against_a_margin(low, high, verdict):
    assert against_margin(Interval((low + high) / 2, low, high), 1.0).verdict == verdict


def test_mcnemar_is_the_exact_test():
    base, variant = np.array([1] * 10 + [0] * 2), np.array([0] * 10 + [1] * 2)
    assert mcnemar(base, variant) == pytest.approx(2 * sum(math.comb(12, k) for k in range(3)) / 2**12)
    assert mcnemar(base, base) == 1.0
