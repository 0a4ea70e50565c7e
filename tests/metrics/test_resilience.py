"""R, Q and their mean by hand."""

import pytest

from fedunlearn.metrics.resilience import casting, relearning, robustness


@pytest.mark.parametrize(
    ("before", "after", "oracle", "r"),
    [
        (0.2, 0.6, (0.2, 0.3), 0.25),
        (0.2, 0.3, (0.2, 0.6), 1.0),  # gains less than the oracle
        (0.2, 0.2, (0.2, 0.3), 1.0),
        (0.2, 0.1, (0.2, 0.1), 1.0),
        (0.2, 0.6, (0.3, 0.2), 0.0),  # the oracle loses, this model gains
    ],
)
def test_relearning(before, after, oracle, r):
    assert relearning(before, after, *oracle) == pytest.approx(r)


@pytest.mark.parametrize(
    ("before", "after", "q"), [(0.2, 0.5, 0.4), (0.2, 0.2, 1.0), (0.2, 0.1, 1.0), (0.0, 0.0, 1.0), (0.0, 0.1, 0.0)]
)
def test_casting(before, after, q):
    assert casting(before, after) == pytest.approx(q)


@pytest.mark.parametrize(("r", "q", "hm"), [(0.25, 1.0, 0.4), (1.0, 1.0, 1.0), (0.0, 1.0, 0.0), (0.0, 0.0, 0.0)])
def test_robustness(r, q, hm):
    assert robustness(r, q) == pytest.approx(hm)
