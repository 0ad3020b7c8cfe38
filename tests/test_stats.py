"""Intervals and rank agreement against SciPy, slow re-implementations, and their own promises."""
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats as scipy_stats

from robustnb import stats
from robustnb.stats import Interval, bootstrap_mean, rank_agreement, wilson

finite = st.floats(-1e6, 1e6, allow_subnormal=False)


# wilson

@pytest.mark.parametrize('level', [0.5, 0.9, 0.95, 0.999])
@pytest.mark.parametrize('n', [1, 2, 7, 50, 1000, 50_000])
def test_wilson_equals_scipy(n, level):
    for successes in {0, 1, n // 3, n // 2, n - 1, n}:
        expected = scipy_stats.binomtest(successes, n).proportion_ci(level, method='wilson')
        value, low, high = wilson(successes, n, level)
        assert value == successes / n
        np.testing.assert_allclose([low, high], [expected.low, expected.high], atol=1e-12)


@given(st.integers(0, 2000), st.integers(0, 2000), st.floats(0.01, 0.9999))
def test_wilson_is_an_interval_inside_the_possible(a, b, level):
    successes, n = min(a, b), max(a, b)
    value, low, high = wilson(successes, n, level)
    assert 0 <= low <= high <= 1
    assert n == 0 or low <= value <= high, 'error bars must not be negative'
    assert low < high
    mirrored = wilson(n - successes, n, level)
    np.testing.assert_allclose([low, high], [1 - mirrored.high, 1 - mirrored.low], atol=1e-12)


def test_wilson_shapes_and_kinds():
    assert [type(v) for v in wilson(3, 4)] == [float] * 3
    assert [type(v) for v in wilson(torch.tensor(3), np.int64(4))] == [float] * 3
    table = wilson(np.arange(6).reshape(2, 3), [[10], [20]])
    assert [v.shape for v in table] == [(2, 3)] * 3
    assert table.high[1, 2] == wilson(5, 20).high
    np.testing.assert_array_equal(wilson(torch.tensor([1, 2]), 9).low, wilson([1, 2], [9, 9]).low)


def test_wilson_without_any_sample_knows_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        value, low, high = wilson([0, 2], [0, 4])
    assert np.isnan(value[0]) and (low[0], high[0]) == (0, 1)
    assert value[1] == 0.5


@pytest.mark.parametrize('successes, n', [
    (-1, 5), (6, 5), (0.5, 1), (1, 1.5), (np.nan, 5), (1, np.nan), (1, np.inf), ([1, 9], 5),
])
def test_wilson_refuses_what_is_not_a_count(successes, n):
    with pytest.raises(ValueError, match='number of correct samples'):
        wilson(successes, n)


@pytest.mark.parametrize('level', [0, 1, 95, -0.1, np.nan])
def test_levels_are_fractions(level):
    with pytest.raises(ValueError, match='such as 0.95'):
        wilson(1, 2, level)
    with pytest.raises(ValueError, match='such as 0.95'):
        bootstrap_mean([1, 2, 3], level)


@pytest.mark.parametrize('n, p', [(20, 0.9), (50, 0.5), (50, 0.97), (300, 0.8)])
def test_wilson_covers_what_it_claims(n, p):
    holds = np.random.default_rng(1).binomial(n, p, size=20_000)
    _, low, high = wilson(holds, n)
    share = np.mean((low <= p) & (p <= high))
    assert 0.92 < share < 0.985, share


# bootstrap_mean

def slow_bootstrap(values, level, resamples, seed):
    "One resample at a time, one column at a time, with the draws of the library."
    counts = stats._drawn_counts(np.random.default_rng(seed), resamples, len(values))
    ends = []
    for column in values.T:
        means = []
        for row in counts:
            redrawn = np.repeat(column, row)
            redrawn = redrawn[np.isfinite(redrawn)]
            if len(redrawn):
                means.append(redrawn.mean())
        defined = column[np.isfinite(column)]
        low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2]) if len(defined) > 1 else (np.nan, np.nan)
        ends.append((defined.mean() if len(defined) else np.nan, low, high))
    return np.array(ends).T


@pytest.mark.parametrize('seed', [0, 7])
def test_bootstrap_equals_slow_loops(seed):
    values = np.random.default_rng(seed).lognormal(size=(9, 6))
    values[[0, 3, 4], 1] = [np.nan, np.inf, -np.inf]
    values[:7, 2] = np.nan           # two defined entries: many draws meet none of them
    values[1:, 3] = np.nan           # one defined entry
    values[:, 4] = np.inf            # none
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        fast = bootstrap_mean(values, level=0.9, resamples=200, seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        slow = slow_bootstrap(values, 0.9, 200, seed)
    np.testing.assert_allclose(np.array(fast), slow, rtol=1e-12)
    assert fast.value[3] == values[0, 3] and np.isnan(fast.low[3])
    assert np.isnan([fast.value[4], fast.low[4], fast.high[4]]).all()


def test_bootstrap_agrees_with_scipy():
    values = np.random.default_rng(3).exponential(size=200)
    rng = np.random.default_rng(1)
    theirs = scipy_stats.bootstrap((values,), np.mean, n_resamples=20_000, method='percentile', rng=rng)
    theirs = theirs.confidence_interval
    ours = bootstrap_mean(values, resamples=20_000)
    width = ours.high - ours.low
    assert ours.value == pytest.approx(values.mean(), rel=1e-12)
    assert ours.low == pytest.approx(theirs.low, abs=0.03 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.03 * width)


def test_bootstrap_covers_what_it_claims():
    for draw, truth, lowest in (('normal', 0, 0.93), ('exponential', 1, 0.92)):
        values = getattr(np.random.default_rng(5), draw)(size=(100, 2000))
        _, low, high = bootstrap_mean(values)
        share = np.mean((low <= truth) & (truth <= high))
        assert lowest < share < 0.965, (draw, share)


def test_bootstrap_columns_are_independent_of_their_neighbours():
    values = np.random.default_rng(0).normal(size=(50, 3))
    together = bootstrap_mean(values)
    for column in range(3):
        np.testing.assert_allclose(bootstrap_mean(values[:, column]), np.array(together)[:, column], rtol=1e-12)


def test_bootstrap_draws_in_chunks(monkeypatch):
    original, pieces = stats._drawn_counts, []
    rng = np.random.default_rng(4)
    in_two = np.vstack([original(rng, 3, 11), original(rng, 4, 11)])
    np.testing.assert_array_equal(in_two, original(np.random.default_rng(4), 7, 11))

    def counting(rng, resamples, n):
        pieces.append(resamples)
        return original(rng, resamples, n)
    monkeypatch.setattr(stats, '_drawn_counts', counting)
    bootstrap_mean(np.ones((2**20 // 300, 1)), resamples=700)
    assert pieces == [300, 300, 100]


def test_bootstrap_keeps_samples_paired():
    rng = np.random.default_rng(0)
    first = rng.normal(size=(80, 1))
    pair = np.hstack([first, first + 0.01])
    low, high = np.array(bootstrap_mean(pair))[1:]
    np.testing.assert_allclose(low[1] - low[0], 0.01)
    np.testing.assert_allclose(high[1] - high[0], 0.01)


@settings(max_examples=40, deadline=None)
@given(arrays(np.float64, st.tuples(st.integers(1, 12), st.integers(0, 3)), elements=finite), st.integers(0, 9))
def test_bootstrap_brackets_a_possible_mean(values, seed):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        value, low, high = bootstrap_mean(values, resamples=50, seed=seed)
    assert value.shape == values.shape[1:]
    if len(values) == 1:
        assert np.isnan(low).all() and np.isnan(high).all()
        return
    slack = 1e-9 * (1 + np.abs(values).max(initial=0))
    assert (low >= values.min(0, initial=np.inf) - slack).all()
    assert (high <= values.max(0, initial=-np.inf) + slack).all()
    assert (low <= high).all()


def test_bootstrap_inputs():
    values = torch.rand(6, 2, 3, dtype=torch.bfloat16, requires_grad=True)
    assert bootstrap_mean(values).low.shape == (2, 3)
    assert [type(v) for v in bootstrap_mean([1, 2, 3])] == [float] * 3
    assert bootstrap_mean([2, 2, 2]) == (2, 2, 2)
    assert bootstrap_mean([True, False, True, True]).value == 0.75
    before = values.detach().clone()
    state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()
    bootstrap_mean(values)
    assert torch.equal(values, before)
    assert (np.random.get_state()[1] == state).all() and torch.equal(torch.get_rng_state(), torch_state)
    for bad in (3.0, [], np.zeros((0, 4))):
        with pytest.raises(ValueError, match='one row per sample'):
            bootstrap_mean(bad)
    with pytest.raises(ValueError, match='at least 40, better 2000'):
        bootstrap_mean([1, 2], resamples=39)
    bootstrap_mean([1, 2], resamples=40)
    with pytest.raises(ValueError, match='at least 2000'):
        bootstrap_mean([1, 2], level=0.999, resamples=1000)


# rank_agreement

def slow_ranks(values):
    "The rank of a value: those below it, half of its equals, and one half more."
    return [sum(w < v for w in values) + (sum(w == v for w in values) + 1) / 2 for v in values]


@given(st.lists(st.tuples(st.integers(0, 5), finite), min_size=2, max_size=40))
def test_rank_agreement_equals_scipy_and_the_definition(pairs):
    a, b = (np.array(column, dtype=float) for column in zip(*pairs, strict=True))
    if len(set(a)) == 1 or len(set(b)) == 1:
        with pytest.raises(ValueError, match='no order'):
            rank_agreement(a, b)
        return
    rho = rank_agreement(a, b)
    assert -1 - 1e-12 <= rho <= 1 + 1e-12
    assert rho == pytest.approx(scipy_stats.spearmanr(a, b).statistic, abs=1e-12)
    assert rho == pytest.approx(np.corrcoef(slow_ranks(a), slow_ranks(b))[0, 1], abs=1e-12)
    assert rho == rank_agreement(b, a)
    assert rank_agreement(a, -b) == pytest.approx(-rho, abs=1e-12)
    assert rank_agreement(a, a) == 1.0


def test_rank_agreement_inputs():
    assert rank_agreement(torch.tensor([1.0, 2, 3]), [10, 20, 15]) == pytest.approx(0.5)
    assert type(rank_agreement([1, 2], [1, 2])) is float
    assert rank_agreement([0, np.inf, 1], [1, 3, 2]) == 1.0
    for a, b in (([1], [1]), ([1, 2], [1, 2, 3]), ([[1, 2]], [[1, 2]]), (1, 2)):
        with pytest.raises(ValueError, match='same things, at least 2'):
            rank_agreement(a, b)
    with pytest.raises(ValueError, match=r'\[0, 2\]'):
        rank_agreement([np.nan, 1, 2], [1, 2, np.nan])
    with pytest.raises(ValueError, match='values of `a` are equal'):
        rank_agreement([2, 2], [1, 2])


def test_interval_reads_and_unpacks():
    value, low, high = interval = Interval(0.5, 0.4, 0.6)
    assert (value, low, high) == (interval.value, interval.low, interval.high)
    assert repr(interval) == 'Interval(value=0.5, low=0.4, high=0.6)'
