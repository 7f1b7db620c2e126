import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bert_evaluation.stats import median, speedup


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
