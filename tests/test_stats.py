"""Intervals, agreement, groups on a line and evenness against SciPy, scikit-learn, all partitions, and their own promises."""
import json
import math
import warnings
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats as scipy_stats
from sklearn.cluster import KMeans
from sklearn.metrics import silhouette_score

from robustnb import stats
from robustnb.stats import (
    Interval,
    bootstrap_mean,
    choose_k,
    kmeans_1d,
    mean_of_runs,
    nearest_1d,
    pearson,
    pielou,
    rank_agreement,
    silhouette_1d,
    wilson,
)

finite = st.floats(-1e6, 1e6, allow_subnormal=False)
GOLDEN = {case['id']: case for case in json.loads((Path(__file__).parent / 'golden' / 'coverage.json').read_text())['cases']}


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


# pearson

@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(finite, finite), min_size=3, max_size=30), st.integers(0, 9))
def test_pearson_equals_scipy(pairs, seed):
    x, y = (np.array(column) for column in zip(*pairs, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        r, low, high = pearson(x, y, resamples=50, seed=seed)
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert np.isnan([r, low, high]).all()
        return
    assert -1 <= low <= r <= high <= 1
    assert r == pearson(y, x, resamples=50).value
    assert pearson(-x, y, resamples=50).value == pytest.approx(-r, abs=1e-9)
    shift = np.ptp(x) > 1e-6 * np.abs(x).max() and np.ptp(y) > 1e-6 * np.abs(y).max()
    if shift:  # SciPy itself warns of constant input beyond that
        assert r == pytest.approx(scipy_stats.pearsonr(x, y).statistic, abs=1e-7)


def test_pearson_equals_slow_loops():
    x, y = np.random.default_rng(0).integers(0, 3, size=(2, 6)).astype(float)  # many draws leave one of them constant
    drawn = np.random.default_rng(4).integers(6, size=(300, 6))
    slow = [scipy_stats.pearsonr(x[d], y[d]).statistic for d in drawn if np.ptp(x[d]) and np.ptp(y[d])]
    assert 100 < len(slow) < 300
    interval = pearson(x, y, level=0.8, resamples=300, seed=4)
    np.testing.assert_allclose(interval[1:], np.quantile(slow, [0.1, 0.9]), atol=1e-12)


def test_pearson_draws_in_chunks():
    x, y = np.random.default_rng(0).normal(size=(2, 2**19))
    whole = stats._resampled_correlations(x, y, 5, 0)
    drawn = np.random.default_rng(0).integers(len(x), size=(5, len(x)))
    np.testing.assert_allclose(whole, [np.corrcoef(x[d], y[d])[0, 1] for d in drawn], atol=1e-12)


def test_pearson_covers_what_it_claims():
    rng, count = np.random.default_rng(3), 0
    for _ in range(300):
        x, noise = rng.normal(size=(2, 60))
        _, low, high = pearson(x, 0.6 * x + 0.8 * noise, resamples=300)
        count += low <= 0.6 <= high
    assert 0.89 < count / 300 < 0.98


def test_pearson_at_the_ends():
    assert pearson([0, 1, 2, 5], [3, 5, 7, 13]) == (1, 1, 1)
    assert pearson([0, 1, 2], [3, 2, 1]) == (-1, -1, -1)
    two = pearson([1, 2], [5, 3])
    assert two.value == -1 and np.isnan(two[1:]).all()
    for scale in (1e-300, 1e150):
        assert pearson(np.array([1, 2, 4]) * scale, [1, 3, 2]).value == pytest.approx(pearson([1, 2, 4], [1, 3, 2]).value)
    assert [type(v) for v in pearson([1, 2, 3], [1, 3, 2])] == [float] * 3
    constant = pearson(torch.full((7,), 0.1), range(7))
    assert [type(v) for v in constant] == [float] * 3 and np.isnan(constant).all()


def test_pearson_inputs():
    for x, y in (([1], [1]), ([1, 2], [1, 2, 3]), ([[1, 2]], [[1, 2]]), (1, 2)):
        with pytest.raises(ValueError, match='same things, at least 2'):
            pearson(x, y)
    with pytest.raises(ValueError, match=r'\[0, 2\]'):
        pearson([np.nan, 1, 2], [1, 2, np.inf])
    with pytest.raises(ValueError, match='at least 40, better 2000'):
        pearson([1, 2], [1, 2], resamples=39)
    with pytest.raises(ValueError, match='such as 0.95'):
        pearson([1, 2], [1, 2], level=95)


# kmeans_1d and nearest_1d

def squared_distance(values, centres):
    return np.sum((values - centres[nearest_1d(values, centres)])**2)


def least_squared_distance(values, k):
    "Over all partitions of the sorted values into `k` neighbouring groups."
    cuts = ((0, *inner, len(values)) for inner in combinations(range(1, len(values)), k - 1))
    groups = ([np.sort(values)[a:b] for a, b in pairwise(cut)] for cut in cuts)
    return min(sum(((group - group.mean())**2).sum() for group in way) for way in groups)


small = st.one_of(
    arrays(np.float64, st.integers(1, 8), elements=finite),
    arrays(np.float64, st.integers(1, 8), elements=st.integers(0, 5)),  # duplicates
)


@settings(max_examples=150, deadline=None)
@given(small, st.integers(1, 5))
def test_kmeans_finds_the_best_of_all_partitions(values, k):
    centres, distinct = kmeans_1d(values, k), len(np.unique(values))
    assert len(centres) == min(k, distinct)
    assert (np.diff(centres) > 0).all()
    assert set(nearest_1d(values, centres)) == set(range(len(centres))), 'every centre has values'
    least = least_squared_distance(values, len(centres))
    assert squared_distance(values, centres) <= least + 1e-12 * (1 + np.ptp(values)**2)


@settings(max_examples=100, deadline=None)
@given(arrays(np.float64, st.integers(1, 60), elements=st.floats(-100, 100, width=32)), st.integers(1, 9), st.data())
def test_kmeans_does_not_mind_order_scale_shift_and_copies(values, k, data):
    centres = kmeans_1d(values, k)
    np.testing.assert_array_equal(kmeans_1d(data.draw(st.permutations(values)), k), centres)
    np.testing.assert_allclose(kmeans_1d(values * 1024, k), centres * 1024, rtol=1e-12)  # a power of two rounds nothing
    distance, slack = squared_distance(values, centres), 1e-12 * len(values) * (1 + np.ptp(values)**2)
    copied = squared_distance(values, kmeans_1d(np.tile(values, 3), k))
    assert copied == pytest.approx(distance, rel=1e-9, abs=slack)
    for scale, shift in ((-1, 0), (3, 0), (1, 1000)):  # equal optima may swap, but none gets worse
        moved = (np.sort(kmeans_1d(values * scale + shift, k) - shift) / scale)[::1 if scale > 0 else -1]
        assert squared_distance(values, moved) == pytest.approx(distance, rel=1e-9, abs=slack)
    apart = np.diff(np.unique(values)).min(initial=np.inf) > 1e-6 * (1 + np.ptp(values))  # so that rounding can tell them apart
    for i, centre in enumerate(centres):  # each centre is the mean of what is nearest to it
        near = values[nearest_1d(values, centres) == i]
        assert near.mean() == pytest.approx(centre, abs=1e-9 if apart else slack**0.5)


@pytest.mark.parametrize('draw', ['normal', 'lognormal', 'uniform', 'standard_cauchy'])
def test_kmeans_is_never_worse_than_scikit_learn(draw):
    values = getattr(np.random.default_rng(2), draw)(size=2000)
    last = np.inf
    for k in range(2, 10):
        distance = squared_distance(values, kmeans_1d(values, k))
        theirs = KMeans(k, n_init=3, random_state=0).fit(values[:, None]).inertia_
        assert distance <= theirs * (1 + 1e-9)
        assert distance < last
        last = distance


def test_one_run_holds_the_answers_of_all():
    values, counts = np.unique(np.random.default_rng(0).normal(size=300).round(2), return_counts=True)
    for k, edges in enumerate(stats._best_edges(values, counts, 12), 1):
        assert (np.diff(edges) > 0).all() and len(edges) == k + 1 and (edges[0], edges[-1]) == (0, len(values))
        np.testing.assert_array_equal(edges, stats._best_edges(values, counts, k)[-1])
    assert len(stats._best_edges(values[:5], counts[:5], 12)) == 5


def test_kmeans_with_a_group_per_value():
    values = np.random.default_rng(0).permutation(33).astype(float)
    for k in (32, 33, 34):
        assert len(kmeans_1d(values, k)) == min(k, 33)
    np.testing.assert_array_equal(kmeans_1d(values, 40), np.arange(33))


def test_kmeans_keeps_its_digits():
    offsets = np.array([1, 2, 9, 11, 50])
    for shift in (1e12, -1e12):
        np.testing.assert_array_equal(kmeans_1d(shift + offsets, 3) - shift, [1.5, 10, 50])
    for scale in (1e-300, 1e290):
        np.testing.assert_allclose(kmeans_1d(offsets * scale, 3), np.array([1.5, 10, 50]) * scale, rtol=1e-14)
    np.testing.assert_array_equal(kmeans_1d([0, 5e-324], 2), [0, 5e-324])
    inner = np.random.default_rng(0).normal(size=400)
    far = kmeans_1d(np.append(inner, 1e6), 4)                # an outlier takes a centre, the others stay exact
    np.testing.assert_allclose(far, [*kmeans_1d(inner, 3), 1e6], rtol=1e-12)


def test_nearest_at_the_borders():
    np.testing.assert_array_equal(nearest_1d([-np.inf, 0, 1, 1.0000001, 2, np.inf], [0, 2]), [0, 0, 0, 1, 1, 1])
    low, high = 1.0, np.nextafter(1.0, 2)
    for a, b in ((low, high), (high, np.nextafter(high, 2)), (0, 5e-324), (-5e-324, 0)):
        np.testing.assert_array_equal(nearest_1d([a, b], [a, b]), [0, 1])
    values, centres = np.random.default_rng(0).normal(size=(40, 5)), np.array([-1, 0.2, 0.3, 2])
    nearest = nearest_1d(torch.tensor(values), torch.tensor(centres))
    np.testing.assert_array_equal(nearest, np.abs(values[..., None] - centres).argmin(-1))
    assert nearest_1d(3.0, [0, 2]) == 1 and nearest_1d([4, 5], [9]).tolist() == [0, 0]


def test_group_inputs():
    for values in ([], 3.0, np.zeros((4, 2))):
        for function in (lambda v: kmeans_1d(v, 2), lambda v: silhouette_1d(v, [0, 1]), choose_k):
            with pytest.raises(ValueError, match='at least one number'):
                function(values)
    for bad in (np.nan, np.inf, -np.inf, 1e301):
        for function in (lambda v: kmeans_1d(v, 2), lambda v: silhouette_1d(v, [0, 1]), choose_k):
            with pytest.raises(ValueError, match='1 of 3 values are nan'):
                function([0, bad, 1])
    for k in (0, -1, 2.5):
        with pytest.raises(ValueError, match='1 or more'):
            kmeans_1d([1, 2], k)
    for centres in ([], [[1, 2]], [2, 1], [1, 1], [0, np.nan], [0, np.inf]):
        with pytest.raises(ValueError, match='increase from one'):
            nearest_1d([1, 2], centres)
    with pytest.raises(ValueError, match='1 of 2 values are nan'):
        nearest_1d([1, np.nan], [0, 1])
    for ks in ([], [1, 2], [2.5]):
        with pytest.raises(ValueError, match='each 2 or more'):
            choose_k([1, 2, 3], ks)
    values = torch.tensor([3.0, 1, 2, 2], requires_grad=True)
    assert kmeans_1d(values.bfloat16(), 2).dtype == np.float64 and choose_k(values).k in (2, 3)
    assert values.tolist() == [3, 1, 2, 2]


# silhouette_1d and choose_k

@settings(max_examples=100, deadline=None)
@given(arrays(np.float64, st.integers(3, 80), elements=st.floats(-100, 100, width=32)), st.integers(2, 9))
def test_silhouette_equals_scikit_learn(values, k):
    centres = kmeans_1d(values, k)
    if len(centres) < 2:
        with pytest.raises(ValueError, match='at least two groups'):
            silhouette_1d(values, centres)
        return
    silhouette = silhouette_1d(values, centres)
    assert -1 <= silhouette <= 1
    if len(centres) < len(values):  # theirs refuses one group per value
        theirs = silhouette_score(values[:, None].astype(float), nearest_1d(values, centres))
        assert silhouette == pytest.approx(theirs, abs=1e-6)  # theirs loses digits in squares of distances


@pytest.mark.parametrize('draw', ['normal', 'lognormal', 'uniform'])
def test_silhouette_equals_scikit_learn_closely(draw):
    values = getattr(np.random.default_rng(2), draw)(size=1500)
    values[200:600] = np.maximum(values[200:600], 0.3)  # duplicates, as ReLU makes them
    for k in range(2, 10):
        centres = kmeans_1d(values, k)
        theirs = silhouette_score(values[:, None], nearest_1d(values, centres), metric='manhattan')
        assert silhouette_1d(values, centres) == pytest.approx(theirs, abs=1e-12)


def test_silhouette_of_any_centres():
    values = np.array([0, 0, 1, 4, 9.0])
    ours = silhouette_1d(values, [-50, -1, 2, 8.5, 70])  # the outer two have no values
    assert ours == pytest.approx(silhouette_score(values[:, None], [0, 0, 1, 1, 2]), abs=1e-12)
    assert silhouette_1d([3, 8], [3, 8]) == 0 and silhouette_1d([3, 3, 8, 8], [3, 8]) == 1
    assert silhouette_1d(values + 1e9, np.array([-1, 2, 8.5]) + 1e9) == pytest.approx(ours, abs=1e-12)


def test_choose_k_golden():
    case = GOLDEN['idc_silhouette_k']
    values = case['inputs']['activations']
    groups = choose_k(values)
    assert {groups.k} == set(case['expected'].values())
    np.testing.assert_allclose([groups.silhouettes[k] for k in (2, 3, 4)], [0.70829, 0.97802, 0.78032], atol=case['tol'])
    assert list(groups.silhouettes) == list(range(2, 10))
    np.testing.assert_allclose(groups.centres, [0.0875, 5.0875, 10.0125])
    again = choose_k(values, range(2, 5))
    np.testing.assert_array_equal(again.centres, groups.centres)


@settings(max_examples=60, deadline=None)
@given(arrays(np.float64, st.integers(1, 40), elements=st.floats(-8, 8, width=16)))
def test_choose_k_is_made_of_its_parts(values):
    groups, distinct = choose_k(values), len(np.unique(values))
    assert list(groups.silhouettes) == list(range(2, min(distinct, 9) + 1))
    for k, silhouette in groups.silhouettes.items():
        assert silhouette == pytest.approx(silhouette_1d(values, kmeans_1d(values, k)), abs=1e-12)
    if distinct <= 2:
        np.testing.assert_array_equal(groups.centres, np.unique(values))
        return
    best = max(groups.silhouettes.values())
    assert groups.k == min(k for k, v in groups.silhouettes.items() if v >= best - 1e-12)
    np.testing.assert_array_equal(groups.centres, kmeans_1d(values, groups.k))


def test_choose_k_with_few_values_and_ties(monkeypatch):
    assert (choose_k([7.0]).k, choose_k([7, 7]).silhouettes) == (1, {})
    assert choose_k([0, 1, 2], ks=[5, 4]).centres.tolist() == [0, 1, 2]
    assert list(choose_k(range(20), ks=[5, 3, 5, 30]).silhouettes) == [3, 5]
    monkeypatch.setattr(stats, '_mean_silhouette', lambda values, counts, edges: 0.5 + 1e-15 * len(edges))
    assert choose_k(range(20)).k == 2


# pielou

@pytest.mark.parametrize('name', ['pielou_0', 'pielou_1', 'pielou_2'])
def test_pielou_golden(name):
    case = GOLDEN[name]
    labels, classes, expected = case['inputs'], case['params']['classes'], case['expected']
    assert pielou(labels, classes) == pytest.approx(
        expected['README / Harel-Canada (log of all classes)'], abs=case['tol'])
    assert pielou(torch.tensor(labels), classes, present_only=True) == pytest.approx(
        expected['WISDOM code (log of classes present)'], abs=case['tol'])


@given(st.lists(st.integers(0, 6), min_size=1, max_size=50), st.integers(7, 1000))
def test_pielou_is_an_evenness(labels, classes):
    evenness = pielou(labels, classes)
    entropy = scipy_stats.entropy(np.bincount(labels))
    assert evenness == pytest.approx(entropy / np.log(classes), abs=1e-12)
    assert 0 <= evenness <= pielou(labels, classes, present_only=True) <= 1 + 1e-12
    assert pielou(labels * 3, classes) == pytest.approx(evenness, abs=1e-12)
    assert pielou([classes - 1 - label for label in labels], classes) == pytest.approx(evenness, abs=1e-12)


def test_pielou_inputs():
    assert pielou([0, 0], 1) == 0 == pielou([0], 1, present_only=True)
    assert pielou(np.arange(1000), 1000) == pytest.approx(1)
    for labels in ([], 3, torch.zeros(4, 10)):
        with pytest.raises(ValueError, match='take the argmax'):
            pielou(labels, 10)
    for labels in ([0, 10], [-1, 2], [0.5], [np.nan]):
        with pytest.raises(ValueError, match='whole numbers from 0 to 9'):
            pielou(labels, 10)


def test_interval_reads_and_unpacks():
    value, low, high = interval = Interval(0.5, 0.4, 0.6)
    assert (value, low, high) == (interval.value, interval.low, interval.high)
    assert repr(interval) == 'Interval(value=0.5, low=0.4, high=0.6)'


def test_mean_of_runs_is_that_of_student():
    mean, low, high = mean_of_runs([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3 and high - mean == pytest.approx(2.7764 * math.sqrt(2.5 / 5), abs=1e-4)
    assert mean - low == pytest.approx(high - mean)
    mean, low, high = mean_of_runs(np.array([[1.0, 4.0]]))
    assert mean.tolist() == [1, 4] and np.isnan(low).all() and np.isnan(high).all(), 'one run has no interval'
    rows = np.random.default_rng(0).normal(size=(2000, 5, 1))
    held = [found.low[0] <= 0 <= found.high[0] for found in map(mean_of_runs, rows)]
    assert 0.93 < np.mean(held) < 0.97, 'it holds the truth as often as it says'
    with pytest.raises(ValueError, match='one row per run'):
        mean_of_runs([])
