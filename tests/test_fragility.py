"""Fragility against slow literal versions of it, curves whose truth is known, and what a sweep may leave undone."""

import logging
import math

import numpy as np
import pandas as pd
import pytest
from scipy.integrate import simpson

from robustnb import fragility
from robustnb.fragility import LABELS, Scores, agreement, knees, labels, plot_labels, published_scores, scores
from robustnb.responses import _responses
from robustnb.results import Result

GRID = np.linspace(0, 1, 25)


def made(curves, samples=1000, seed=0, untouched=0.9, names=('FGSM',), grid=GRID, even=False, size=100):
    """Responses with known relative accuracies: (layer, filter) -> function of what is gone -> one number, or one for
    each response. With `even` the difficulties are evenly spread, so that accuracies are exact to one image."""
    rng, steps, rows = np.random.default_rng(seed), [], [np.full(1 + len(names), untouched)]
    for (layer, filter), curve in curves.items():
        for x in grid:
            gone = 1 - x if filter == 'low' else x
            removed = 4 if filter == 'pulse' else round(size * gone)
            steps.append(
                {'layer': layer, 'filter': filter, 'position': x, 'threshold': 2 * x - 1, 'state': len(rows)}
                | {'removed': removed, 'size': size}
            )
            rows.append(untouched * np.broadcast_to(curve(gone), 1 + len(names)))
    shape = 1 + len(names), samples
    hard = np.broadcast_to((np.arange(samples) + 0.5) / samples, shape) if even else rng.uniform(size=shape)
    label = rng.integers(10, size=samples)
    right = np.array(rows)[:, :, None] > hard
    return _responses(steps, np.where(right, label, (label + 1) % 10).astype('uint8'), label, names=names)


def random_responses(seed=0, samples=40, missing=True):
    "A ragged sweep: grids of different lengths, shared states, steps left out, images not shown."
    rng, steps, states = np.random.default_rng(seed), [], 14
    for layer, filter, points in (
        ('a', 'high', 7),
        ('a', 'low', 5),
        ('b', 'high', 4),
        ('b', 'pulse', 3),
        ('c', 'high', 6),
    ):
        removed = np.sort(rng.integers(1, 50, points))
        for position, gone in zip(np.sort(rng.uniform(size=points)), removed, strict=True):
            state = int(rng.integers(-1, states))
            gone = {'low': 50 - gone, 'pulse': 5}.get(filter, gone)
            steps.append(
                {'layer': layer, 'filter': filter, 'position': position, 'threshold': 3 * position, 'state': state}
                | {'removed': int(gone), 'size': 50}
            )
    label = rng.integers(5, size=samples)
    wrong = rng.uniform(size=(states, 3, samples)) < rng.uniform(0.1, 0.7, size=(states, 3, 1))
    prediction = np.where(wrong, (label + 1) % 5, label).astype('uint8')
    if missing:
        last = rng.integers(samples // 2, samples + 1, size=(states, 3, 1))
        last[0] = samples
        prediction[np.arange(samples) >= last] = 255
        prediction[5, 1, 3] = 255
    rng.shuffle(steps)
    return _responses(steps, prediction, label, names=('FGSM', 'noise'))


def changed(responses, **steps):
    "The same responses with other values for each step."
    return type(responses)(
        responses.dataset.assign({name: ('step', v) for name, v in steps.items()}), responses.settings
    )


# ------------------------------------------------------------------------------------------ literal re-implementation


def literal_p(responses, state, r, drawn):
    "Right answers of a state over those of state 0, image by image."
    prediction, label = responses.dataset['prediction'].values, responses.dataset['label'].values
    top = bottom = 0
    for image in drawn:
        if prediction[state, r, image] != 255:
            top += prediction[state, r, image] == label[image]
            bottom += prediction[0, r, image] == label[image]
    return top / bottom if bottom else math.nan


def literal_curve(responses, layer, filter):
    "(position, state, removed) of the evaluated steps, by position."
    data = responses.dataset
    rows = [
        (float(x), int(s), int(gone))
        for one, other, x, s, gone in zip(
            *(data[name].values for name in ('layer', 'filter', 'position', 'state', 'removed')), strict=True
        )
        if one == layer and other == filter and s >= 0
    ]
    return sorted(rows)


def literal_score(responses, layer, filter, r, drawn, baseline):
    "Trapezoids, one after the other."
    points = []
    for x, state, removed in literal_curve(responses, layer, filter):
        b = {'flat': 1, 'density': 1 - removed / 50}.get(baseline)
        points.append((x, literal_p(responses, state, r, drawn) - (baseline(x) if b is None else b)))
    if len(points) < 2:
        return math.nan
    return sum((x2 - x1) * (f1 + f2) / 2 for (x1, f1), (x2, f2) in zip(points, points[1:], strict=False))


def literal_more(responses, r, *curves):
    "Variance of two more images in a weighted sum of curves (layer, filter, factor), image by image."
    prediction, label = responses.dataset['prediction'].values[:, r], responses.dataset['label'].values
    seen = prediction != 255
    worth, most = np.zeros(len(label)), 0.0
    for layer, filter, factor in curves:
        points = literal_curve(responses, layer, filter)
        for i, (x, state, _) in enumerate(points):
            if state == 0:
                continue
            share = ((x - points[i - 1][0]) if i else 0) / 2 + (
                (points[i + 1][0] - x) if i + 1 < len(points) else 0
            ) / 2
            share *= factor / sum(s for a, b, s in zip(prediction[0], label, seen[state], strict=True) if a == b)
            most += share
            for image in np.flatnonzero(seen[state]):
                change = int(prediction[state, image] == label[image]) - int(prediction[0, image] == label[image])
                worth[image] += share * change
    changed = abs(worth) > 1e-6 * most
    return 2 * ((worth**2).sum() + most**2) / (changed.sum() + 1)


def word(value, tolerance):
    if math.isnan(value):
        return 'unknown'
    tolerance += 1e-6
    return 'fragile' if value < -tolerance else 'antifragile' if value > tolerance else 'robust'


def redraws(resamples, samples, seed=0):
    return np.random.default_rng(seed).integers(samples, size=(resamples, samples))


@pytest.mark.parametrize('missing', [False, True])
@pytest.mark.parametrize('baseline', ['flat', 'density', lambda x: 1 - x / 3], ids=['flat', 'density', 'function'])
def test_scores_are_the_literal_ones(baseline, missing):
    responses, resamples = random_responses(missing=missing), 50
    samples = responses.dataset.sizes['sample']
    found = scores(responses, baseline, resamples=resamples, seed=3).dataset
    draws = redraws(resamples, samples, 3)
    for layer, filter in (('a', 'high'), ('a', 'low'), ('b', 'high'), ('b', 'pulse'), ('c', 'high')):
        several = {}
        for r, kind in enumerate(responses.responses):
            args = responses, layer, filter, r
            several[kind] = (
                literal_score(*args, range(samples), baseline),
                np.array([literal_score(*args, d, baseline) for d in draws]),
                literal_more(responses, r, (layer, filter, 1)),
            )
            if r:
                (value, drawn, more), clean = several[kind], several['clean']
                several[f'{kind} - clean'] = value - clean[0], drawn - clean[1], more + clean[2]
        for kind, (value, drawn, more) in several.items():
            one = found.sel(layer=layer, filter=filter, kind=kind)
            assert one['value'].item() == pytest.approx(value, abs=1e-12, nan_ok=True)
            se = math.sqrt(drawn.var(ddof=1) + more)
            ends = value - 1.959964 * se, value + 1.959964 * se
            assert [one['low'].item(), one['high'].item()] == pytest.approx(ends, abs=1e-6, nan_ok=True)
            assert one['se'].item() == pytest.approx(se, rel=1e-6, nan_ok=True)
            tolerance = max(0.01, 2 * se) if not math.isnan(value) else 0.01
            assert one['tolerance'].item() == pytest.approx(tolerance, rel=1e-6)
            assert one['label'].item() == word(value, tolerance)
            same = np.mean([word(d, tolerance) == word(value, tolerance) for d in drawn])
            assert one['stability'].item() == pytest.approx(math.nan if math.isnan(value) else same, nan_ok=True)


def test_rows_of_the_table_are_those_of_the_sweep():
    responses = random_responses()
    table = scores(responses).table()
    assert list(table.columns) == [
        *('layer', 'filter', 'kind', 'value', 'low', 'high', 'se', 'tolerance', 'label', 'stability'),
        *('points', 'span', 'size'),
    ]
    pairs = set(zip(responses.dataset['layer'].values, responses.dataset['filter'].values, strict=True))
    assert len(table) == 5 * len(pairs)
    assert set(zip(table.layer, table['filter'], strict=True)) == pairs
    row = table[(table.layer == 'a') & (table['filter'] == 'high')].iloc[0]
    points = literal_curve(responses, 'a', 'high')
    assert row.points == len(points)
    assert row.span == pytest.approx(points[-1][0] - points[0][0])
    assert row['size'] == 50


def test_totals_are_weighted_means():
    responses = random_responses(missing=False)
    sizes = {'a': 50, 'b': 300, 'c': 7}
    responses = changed(responses, size=[sizes[layer] for layer in responses.dataset['layer'].values])
    found = scores(responses, resamples=60)
    for kind in found.kinds:
        one = found.dataset.sel(filter='high', kind=kind)
        expected = sum(sizes[name] * one['value'].sel(layer=name).item() for name in sizes) / sum(sizes.values())
        assert one['total'].item() == pytest.approx(expected)
    draws = redraws(60, 40)
    totals = [
        sum(n * literal_score(responses, name, 'high', 1, d, 'flat') for name, n in sizes.items()) / 357 for d in draws
    ]
    one = found.dataset.sel(filter='high', kind='FGSM')
    more = literal_more(responses, 1, *((name, 'high', n / 357) for name, n in sizes.items()))
    assert one['total_se'].item() == pytest.approx(math.sqrt(np.var(totals, ddof=1) + more))
    assert one['total_low'].item() == pytest.approx(one['total'].item() - 1.959964 * one['total_se'].item())
    table = found.totals()
    assert list(table.columns) == ['filter', 'kind', 'value', 'low', 'high', 'se']
    assert len(table) == len(found.filters) * len(found.kinds)


def test_blocks_do_not_matter(monkeypatch):
    responses = random_responses()
    whole = [
        scores(responses, resamples=100).table(),
        labels(responses, resamples=100),
        knees(responses, resamples=100),
    ]
    monkeypatch.setattr(fragility, '_BLOCK', 130)
    parts = [
        scores(responses, resamples=100).table(),
        labels(responses, resamples=100),
        knees(responses, resamples=100),
    ]
    for one, other in zip(whole, parts, strict=True):
        pd.testing.assert_frame_equal(one, other)


# -------------------------------------------------------------------------------------------------------- known truth


def test_triangle():
    "p = 1 - x: the area below 1 is a triangle of 1/2; against the density, which is the same line, nothing is left."
    responses = made({('a', 'high'): lambda x: 1 - x, ('a', 'low'): lambda x: 1 - x}, 9000, even=True, names=())
    for filter in ('high', 'low'):
        pick = {'layer': 'a', 'filter': filter, 'kind': 'clean'}
        assert scores(responses).dataset['value'].sel(pick).item() == pytest.approx(-0.5, abs=1e-3)
        assert scores(responses, 'density').dataset['value'].sel(pick).item() == pytest.approx(0, abs=1e-3)


def test_grids_that_are_not_even():
    "The integral of a straight line does not depend on where it was evaluated."
    for grid in ([0, 1], [0, 0.03, 0.04, 0.9, 1], np.r_[0, np.geomspace(0.01, 1, 9)]):
        responses = made({('a', 'high'): lambda x: 1 - x / 2}, 8000, even=True, grid=grid)
        assert scores(responses).dataset['value'].values.ravel() == pytest.approx([-0.25, -0.25, 0], abs=1e-3)


def test_labels_of_known_curves():
    curves = {
        ('fragile', 'high'): lambda x: 1 - x,
        ('robust', 'high'): lambda x: 1.0,
        ('antifragile', 'high'): lambda x: 1 + 0.1 * x,
        ('mixed', 'high'): lambda x: [1 - x, 1 + 0.1 * x],
    }
    found = scores(made(curves, 4000))
    label = found.dataset['label'].sel(filter='high')
    for layer in LABELS:
        assert label.sel(layer=layer, kind='clean') == layer
        assert label.sel(layer=layer, kind='FGSM') == layer
    assert label.sel(layer='mixed').values.tolist() == ['fragile', 'antifragile', 'antifragile']
    assert (found.dataset['stability'].sel(layer=list(LABELS), kind='clean') > 0.95).all()
    assert found.chosen('fragile', 'high') == ['fragile', 'mixed']
    assert found.chosen(('robust', 'antifragile'), 'high') == ['robust', 'antifragile']
    wide = scores(made(curves, 4000), tolerance=0.9)
    assert (wide.dataset['label'] == 'robust').all()
    assert (wide.dataset['stability'] == 1).all()


def test_stability_is_half_on_the_border():
    responses = made({('a', 'high'): lambda x: 1 - x / 2}, 1000, even=True, names=())
    border = -scores(responses).dataset['value'].item()
    assert 0.4 < scores(responses, tolerance=border).dataset['stability'].item() < 0.6


@pytest.mark.parametrize('baseline', ['flat', 'density'])
def test_difference_is_exact(baseline):
    responses = random_responses()
    value = scores(responses, baseline).dataset['value']
    for name in ('FGSM', 'noise'):
        difference = value.sel(kind=name).values - value.sel(kind='clean').values
        assert np.array_equal(value.sel(kind=f'{name} - clean').values, difference, equal_nan=True)
    flat = scores(responses).dataset['value'].sel(kind='FGSM - clean')
    assert value.sel(kind='FGSM - clean').values == pytest.approx(flat.values, nan_ok=True)


def test_intervals_hold_the_truth():
    "120 sets of 250 images: the 95 % interval of each kind misses the truth in about 6 of them."
    curve = {('a', 'high'): lambda x: [1 - x / 2, 1 - x**2]}
    adv = -np.trapezoid(GRID**2, GRID)
    truth, missed = np.array([-0.25, adv, adv + 0.25]), np.zeros(3)
    for seed in range(120):
        found = scores(made(curve, 250, seed), resamples=200).dataset
        low, high = (found[end].values.ravel() for end in ('low', 'high'))
        missed += (truth < low) | (truth > high)
    assert (missed >= 1).all()
    assert (missed <= 13).all()


def rare(n, rate, layers=200, right=0.9, seed=0):
    "Each of many layers turns some answers over, each from a threshold of its own on; and its true score."
    rng = np.random.default_rng(seed)
    first, turned = rng.uniform(size=n) < right, rng.uniform(size=(layers, n)) < rate
    since = np.where(turned, rng.uniform(size=turned.shape), 2)
    later = first ^ (since[:, None] <= np.linspace(0, 1, 5)[:, None]).reshape(-1, n)
    label = rng.integers(10, size=n)
    prediction = np.where(np.r_[first[None], later], label, (label + 1) % 10)[:, None].astype('uint8')
    steps = [
        {'layer': f'{k // 5}', 'filter': 'high', 'position': k % 5 / 4, 'threshold': k, 'state': k + 1}
        | {'removed': k % 5, 'size': 4}
        for k in range(5 * layers)
    ]
    return _responses(steps, prediction, label), -rate * (2 * right - 1) / right


@pytest.mark.parametrize('n', [300, 1000])
@pytest.mark.parametrize('rate', [0.005, 0.01, 0.02])
def test_intervals_of_rare_changes_hold_the_truth(n, rate):
    "Of 200 layers, where percentiles of the resamples hold it in as few as two thirds."
    responses, effect = rare(n, rate, seed=n)
    found = scores(responses, resamples=200).dataset
    assert ((found['low'] <= effect / 2) & (effect / 2 <= found['high'])).mean() >= 0.92
    rows = labels(responses, resamples=200).query('position == 1')
    assert ((rows.low <= effect) & (effect <= rows.high)).mean() >= 0.92


def test_one_threshold_is_the_interval_of_bonett_and_price():
    "Their variance for paired proportions, p12 + p21 - (p12 - p21)^2 over n + 2 with one more of each, up to higher orders."
    lost, won, n = 9, 4, 600
    label, prediction = np.zeros(n, int), np.zeros((2, 1, n), 'uint8')
    prediction[0, 0, :won] = 1
    prediction[1, 0, won : won + lost] = 1
    step = {'layer': 'a', 'filter': 'high', 'position': 0.5, 'threshold': 0, 'state': 1, 'removed': 1, 'size': 2}
    row = labels(_responses([step], prediction, label), resamples=20000).iloc[0]
    p, q = (lost + 1) / (n + 2), (won + 1) / (n + 2)
    theirs = math.sqrt((p + q - (p - q) ** 2) / (n + 2)) * n / (n - won)
    assert row.se == pytest.approx(theirs, rel=0.03)
    assert (row.low, row.high) == pytest.approx((row.effect - 1.96 * row.se, row.effect + 1.96 * row.se), abs=1e-4)


def test_no_change_is_no_proof():
    "No change among n images leaves the two more; state 0 is sure of itself, and so is a layer of which nothing goes."
    for n in (30, 300):
        responses = made({('a', 'high'): lambda x: 1.0}, n, names=(), grid=[0, 1])
        m = responses._counts[3][1, 0].item()
        row = scores(responses).table().iloc[0]
        assert (row.value, row.se) == (0, pytest.approx(math.sqrt(2) / m))
        assert (row.low, row.high) == pytest.approx((-1.959964 * row.se, 1.959964 * row.se), abs=1e-9)
        assert row.stability == 1
        nothing = changed(responses, state=[0, 0])
        for table in (scores(nothing).table(), labels(nothing)):
            assert (table[['low', 'high', 'se']] == 0).all(axis=None)
        assert scores(nothing).dataset['tolerance'].item() == 0.01
        assert (labels(made({('a', 'high'): lambda x: 0.0}, n, names=(), grid=[0, 1])).low == -1).all()


def test_levels_and_differences_of_intervals():
    responses = made({('a', 'high'): lambda x: [1 - x / 9, 1.0]}, 300)
    wide, narrow = (scores(responses, level=level).dataset.squeeze() for level in (0.99, 0.8))
    width = (wide['high'] - wide['low']) / (narrow['high'] - narrow['low'])
    assert width.values == pytest.approx([2.5758 / 1.2816] * 3, abs=1e-3)
    assert (wide['low'] + wide['high']).values / 2 == pytest.approx(wide['value'].values)


def test_a_value_on_the_border_is_robust():
    "98 of 100 are left: 0.98 - 1 is a little below -0.02 in the arithmetic of computers, and 0.9 below 1 - 0.1."
    for lost, tolerance in ((2, 0.02), (10, 0.1), (30, 0.3)):
        prediction = np.zeros((2, 1, 100), 'uint8')
        prediction[1, 0, :lost] = 1
        step = {'layer': 'a', 'filter': 'high', 'threshold': 0, 'state': 1, 'removed': 1, 'size': 2}
        responses = _responses([step | {'position': x} for x in (0, 1)], prediction, np.zeros(100, int))
        assert set(labels(responses, tolerance=tolerance).label) == {'robust'}
        assert scores(responses, tolerance=tolerance).dataset['label'].item() == 'robust'
        assert knees(responses, tolerance=tolerance).share.isna().all()
        less = tolerance - 0.005
        assert set(labels(responses, tolerance=less).label) == {'fragile'}
        assert scores(responses, tolerance=less).dataset['label'].item() == 'fragile'
        assert knees(responses, tolerance=less).share.tolist() == [0.5]


def test_images_not_shown_are_left_out_of_both_sides():
    "The first half is easy, and only it was shown to a network that answers as the untouched one does."
    label = np.zeros(100, int)
    whole = np.r_[np.zeros(50), np.ones(25), np.zeros(25)].astype('uint8')
    part = np.r_[whole[:50], np.full(50, 255)].astype('uint8')
    prediction = np.stack([whole, part, part])[:, None]
    steps = [
        {'layer': 'a', 'filter': 'high', 'position': x, 'threshold': x, 'state': 1 + x, 'removed': x, 'size': 1}
        for x in (0, 1)
    ]
    found = scores(_responses(steps, prediction, label), tolerance=0).dataset
    assert found['value'].item() == 0
    assert found['se'].item() == pytest.approx(math.sqrt(2) / 50)  # as if nothing else had been there


# ------------------------------------------------------------------------------------------------ thresholds and knees


def test_labels_are_the_literal_ones():
    responses, resamples = random_responses(), 50
    samples, draws = responses.dataset.sizes['sample'], redraws(50, 40, 7)
    table = labels(responses, resamples=resamples, seed=7)
    assert len(table) == 3 * int((responses.dataset['state'].values >= 0).sum())
    steps = literal_curve(responses, 'a', 'high')
    for r, name in enumerate(responses.responses):
        rows = table[(table.layer == 'a') & (table['filter'] == 'high') & (table.response == name)]
        for row, (position, state, removed) in zip(rows.itertuples(), steps, strict=True):
            effect = literal_p(responses, state, r, range(samples)) - 1
            drawn = np.array([literal_p(responses, state, r, d) - 1 for d in draws])
            first = responses.dataset['prediction'].values[0, r] == responses.dataset['label'].values
            m = (first & (responses.dataset['prediction'].values[state, r] != 255)).sum()
            se = math.sqrt(drawn.var(ddof=1) + (2 / m**2 if state else 0))
            tolerance = max(0.01, 2 * se)
            assert (row.position, row.removed, row.share) == (position, removed, removed / 50)
            assert row.threshold == pytest.approx(3 * position)
            assert row.n == (responses.dataset['prediction'].values[state, r] != 255).sum()
            assert row.effect == pytest.approx(effect, abs=1e-12)
            ends = max(-1, effect - 1.959964 * se), effect + 1.959964 * se
            assert (row.low, row.high) == pytest.approx(ends, abs=1e-6)
            assert row.tolerance == pytest.approx(tolerance, abs=1e-6)
            assert row.label == word(effect, tolerance)
            assert row.per_weight == pytest.approx(effect / removed)


def test_bands():
    curve = {('a', 'pulse'): lambda x: 1 - 0.3 * (abs(x - 0.5) < 0.1) + 0.1 * (x > 0.9)}
    table = labels(made(curve, 4000, names=()))
    assert table.label.tolist() == ['robust'] * 10 + ['fragile'] * 5 + ['robust'] * 7 + ['antifragile'] * 3
    assert labels(made(curve, 4000, names=()), tolerance=0.2).label.tolist().count('antifragile') == 0
    nothing_removed = made({('a', 'high'): lambda x: 1.0}, names=())
    assert math.isnan(labels(nothing_removed).per_weight[0])  # nothing is gone at the first position


def test_knees_of_steps():
    "A layer that breaks when more than half is gone: from the bottom for high, from the top for low."
    step = lambda x: float(x < 0.5)  # noqa: E731
    curves = {('a', 'high'): step, ('a', 'low'): step, ('b', 'high'): lambda x: 1.0, ('b', 'low'): lambda x: 1.0}
    curves |= {('a', 'pulse'): lambda x: 0.0}
    table = knees(made(curves, 500, names=())).set_index(['filter', 'layer'])
    assert set(table.index.get_level_values(0)) == {'high', 'low'}
    for filter in ('high', 'low'):
        row = table.loc[filter, 'a']
        assert (row.position, row.threshold, row.removed, row.share) == (0.5, 0, 50, 0.5)
        assert (row.low, row.high, row.reached) == (0.5, 0.5, 1)
        assert table.loc[filter, 'b'][['position', 'share', 'low', 'high']].isna().all()
        assert table.loc[filter, 'b'].reached == 0
        assert table.loc[filter, 'network (weighted mean)'].share == pytest.approx(0.75)
    assert table.loc['low', 'a'].position == 0.5


def test_knees_are_the_literal_ones():
    responses, resamples = random_responses(4), 60
    samples, draws = responses.dataset.sizes['sample'], redraws(60, 40)
    table = knees(responses, tolerance=0.2, resamples=resamples)
    for layer, filter in (('a', 'high'), ('a', 'low'), ('b', 'high'), ('c', 'high')):
        curve = sorted(literal_curve(responses, layer, filter), key=lambda row: row[2])
        for r, name in enumerate(responses.responses):
            row = table[(table.layer == layer) & (table['filter'] == filter) & (table.response == name)].iloc[0]
            found = []
            for drawn in (range(samples), *draws):
                below = [gone / 50 for _, state, gone in curve if literal_p(responses, state, r, drawn) < 0.8]
                found.append(below[0] if below else math.inf)
            assert row.share == pytest.approx(math.nan if math.isinf(found[0]) else found[0], nan_ok=True)
            assert row.reached == pytest.approx(np.mean(np.isfinite(found[1:])))
            ends = np.sort(found[1:])[[math.ceil(0.025 * 60) - 1, math.ceil(0.975 * 60) - 1]]
            ends[np.isinf(ends)] = math.nan
            assert (row.low, row.high) == pytest.approx(tuple(ends), nan_ok=True)


def test_a_network_of_one_layer_has_no_total_knee():
    table = knees(made({('all layers', 'high'): lambda x: 1 - x}, names=()))
    assert table.layer.tolist() == ['all layers']


# ---------------------------------------------------------------------------------------------------------- agreement


def linear(slopes, seed=0, samples=2000):
    "Scores of a network whose layers have the given slopes."
    return scores(
        made({(name, 'high'): lambda x, s=s: 1 - s * x for name, s in slopes.items()}, samples, seed, even=True)
    )


def test_agreement_of_known_orders():
    one = linear({'a': 0.1, 'b': 0.4, 'c': 0.8})
    other = linear({'c': 0.1, 'b': 0.4, 'a': 0.8})
    found = agreement({'one': one, 'same': one, 'other': other}, kinds='clean')
    assert found.pairs['spearman'].tolist() == pytest.approx([1, -1, -1])
    assert found.pairs[['first', 'second']].values.tolist() == [['one', 'same'], ['one', 'other'], ['same', 'other']]
    assert found.means[['pairs', 'spearman', 'lowest']].values.tolist() == [pytest.approx([3, -1 / 3, -1])]
    assert (found.pairs['layers'] == 3).all()


def test_agreement_of_labels_is_shown_beside_chance():
    one = linear({'a': 0.0, 'b': 0.5, 'c': 0.6, 'd': 0.7})
    other = linear({'a': 0.5, 'b': 0.0, 'c': 0.6, 'd': 0.7})
    row = agreement({'one': one, 'other': other}, 'clean').pairs.iloc[0]
    assert row.same_label == 0.5
    assert row.by_chance == pytest.approx(0.75**2 + 0.25**2)


def test_agreement_by_depth():
    shallow = linear({'x': 0.1, 'y': 0.8})
    deep = linear({'1': 0.1, '2': 0.2, '3': 0.7, '4': 0.9})
    with pytest.raises(ValueError, match="by='depth'"):
        agreement({'shallow': shallow, 'deep': deep})
    pairs = agreement({'shallow': shallow, 'deep': deep}, 'clean', by='depth').pairs
    assert pairs[['layers', 'spearman']].values.tolist() == [[2, 1]]


def test_agreement_where_there_is_no_order():
    same = linear({'a': 0.0, 'b': 0.0, 'c': 0.0})
    other = linear({'a': 0.1, 'b': 0.5, 'c': 0.8})
    found = agreement({'same': same, 'other': other}, 'clean')
    assert found.pairs['spearman'].isna().all()
    assert found.means['pairs'].tolist() == [0]
    assert math.isnan(found.means['spearman'][0])


def test_agreement_leaves_unknown_scores_out(caplog):
    grid = {('a', 'high'): lambda x: 1 - x, ('b', 'high'): lambda x: 1 - x / 2, ('c', 'high'): lambda x: 1.0}
    responses = made(grid)
    state = responses.dataset['state'].values
    responses = changed(responses, state=np.where(np.arange(len(state)) < 24, -1, state))
    with caplog.at_level(logging.WARNING):
        one = scores(responses)
    assert 'a (high)' in caplog.text
    assert one.dataset['label'].sel(layer='a').values.tolist() == [['unknown'] * 3]
    assert np.isnan(one.dataset['stability'].sel(layer='a')).all()
    assert one.chosen('unknown', 'high') == ['a']
    total = one.dataset['total'].sel(kind='clean').item()
    assert total == pytest.approx(one.dataset['value'].sel(layer=['b', 'c'], kind='clean').mean().item())
    pairs = agreement({'one': one, 'whole': scores(made(grid))}, 'clean').pairs
    assert pairs[['layers', 'spearman']].values.tolist() == [[2, 1]]


# ----------------------------------------------------------------------------------------------------- published form


def test_published_form_is_the_literal_one():
    "The steps of the notebooks, in the order of their sweep, where low goes down; its integrals come out negative there."
    curves = {(layer, f): lambda x, k=k: [1 - 0.7 * x**k, 1 - 0.5 * x] for k, layer in ((1, 'a'), (3, 'b'))
              for f in ('high', 'low', 'pulse')}  # fmt: skip
    responses = made(curves, 700, grid=np.linspace(0.02, 1, 24))
    table = published_scores(responses)
    assert len(table) == 6
    for row in table.itertuples():
        frames = {name: responses.curve(row.layer, row.filter, name) for name in ('clean', 'FGSM')}
        down = row.filter == 'low'
        clean, adv = (list(f['accuracy'])[:: -1 if down else 1] for f in frames.values())
        thresholds = list(frames['clean']['threshold'])[:: -1 if down else 1]
        density = [1 - share for share in list(frames['clean']['share'])[:: -1 if down else 1]]
        x = [(a - min(thresholds)) / (max(thresholds) - min(thresholds)) for a in thresholds]
        c, v = ([value / values[0] for value in values] for values in (clean, adv))
        sign = -1 if down else 1
        expected = [
            sign * simpson([first - second for first, second in zip(*pair, strict=True)], x=x)
            for pair in ((c, density), (v, density), (v, c))
        ]
        assert [row.S_clean, row.S_adv, row.S_diff] == pytest.approx(expected, abs=1e-9)


def test_published_form_without_what_it_needs():
    with pytest.raises(ValueError, match='need a perturbation'):
        published_scores(made({('a', 'high'): lambda x: 1 - x}, names=()))
    flat = made({('a', 'high'): lambda x: 1 - x}, grid=[0.5])
    assert published_scores(flat)[['S_clean', 'S_adv', 'S_diff']].isna().all(axis=None)


# ---------------------------------------------------------------------------------------------------- what may be wrong


def test_nothing_right():
    lost = made({('a', 'high'): lambda x: [1 - x, 0.0]}, names=('FGSM',))
    prediction = lost.dataset['prediction'].values.copy()
    prediction[0, 1] = (lost.dataset['label'].values + 1) % 10
    lost = type(lost)(lost.dataset.assign(prediction=(('state', 'response', 'sample'), prediction)), lost.settings)
    for function in (scores, labels, knees):
        with pytest.raises(ValueError, match='no FGSM image right'):
            function(lost)
    assert scores(lost, perturbations=()).kinds == ['clean']
    assert set(labels(lost, perturbations=()).response) == set(knees(lost, perturbations=()).response) == {'clean'}


def test_some_draws_without_anything_right():
    "One right answer of twenty: a third of the resamples has none, and is left out."
    label = np.zeros(20, int)
    prediction = np.ones((3, 1, 20), 'uint8')
    prediction[:2, :, 0] = 0
    steps = [
        {'layer': 'a', 'filter': 'high', 'position': x, 'threshold': x, 'state': 1 + x, 'removed': x, 'size': 1}
        for x in (0, 1)
    ]
    found = scores(_responses(steps, prediction, label)).dataset
    assert found['value'].item() == -0.5
    assert found['stability'].item() == 1
    c, most = 0.5, 1.0  # of the one image that changed, and of one that would at both thresholds
    assert found['se'].item() == pytest.approx(math.sqrt(2 * (c**2 + most**2) / 2))
    table = labels(_responses(steps, prediction, label))
    assert table['se'].tolist() == pytest.approx([math.sqrt(2)] * 2)
    assert table['low'].tolist() == [-1, -1]


def test_one_threshold_is_no_curve():
    single = made({('a', 'high'): lambda x: 0.5}, grid=[0.5])
    with pytest.raises(ValueError, match='no layer has two'):
        scores(single)
    assert labels(single).label.tolist() == ['fragile'] * 2
    assert knees(single).share.tolist() == [0.5, 0.5]


def test_nothing_was_evaluated():
    responses = changed(made({('a', 'high'): lambda x: 1 - x}), state=np.full(25, -1))
    with pytest.raises(ValueError, match='no layer has two'):
        scores(responses)


def test_accuracy_below_chance_is_a_warning(caplog):
    weak = made({('a', 'high'): lambda x: [1 - x, 1 + x]}, untouched=0.06)
    with caplog.at_level(logging.WARNING):
        scores(weak)
    assert 'FGSM: the untouched network has' in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        scores(made({('a', 'high'): lambda x: 1 - x}))
    assert not caplog.text


def test_density_says_nothing_about_windows(caplog):
    harmless = made({(name, 'pulse'): lambda x: 1.0 for name in 'ab'})
    with caplog.at_level(logging.WARNING):
        found = scores(harmless, 'density')
    assert "use baseline='flat'" in caplog.text
    assert found.dataset['value'].sel(kind='clean').values.ravel() == pytest.approx([1 / 25] * 2)


@pytest.mark.parametrize(
    ('kwargs', 'error', 'words'),
    [
        ({'baseline': 'zero'}, ValueError, 'flat, density'),
        ({'baseline': lambda x: x[:2]}, ValueError, 'one number for each position'),
        ({'tolerance': -0.1}, ValueError, 'a number from 0'),
        ({'tolerance': math.nan}, ValueError, 'a number from 0'),
        ({'tolerance': True}, ValueError, 'a number from 0'),
        ({'level': 95}, ValueError, 'fraction'),
        ({'resamples': 10}, ValueError, 'too few'),
        ({'perturbations': 'PGD'}, KeyError, 'clean, FGSM'),
    ],
)
def test_settings_are_checked(kwargs, error, words):
    with pytest.raises(error, match=words):
        scores(made({('a', 'high'): lambda x: 1 - x}, 50), **kwargs)


def test_other_mistakes():
    responses = made({('a', 'high'): lambda x: 1 - x, ('a', 'pulse'): lambda x: 1.0}, 50)
    found = scores(responses)
    with pytest.raises(TypeError, match='responses of a sweep, got Scores'):
        scores(found)
    with pytest.raises(KeyError, match='fragile, robust, antifragile'):
        found.chosen('weak', 'high')
    with pytest.raises(KeyError, match='no filter'):
        found.plot('low')
    with pytest.raises(KeyError, match='no kind'):
        found.plot_map('PGD')
    with pytest.raises(KeyError, match='no filter'):
        plot_labels(labels(responses), 'low')
    with pytest.raises(ValueError, match='remove more and more'):
        knees(made({('a', 'pulse'): lambda x: 1.0}))
    for networks in ({'one': found}, [found, found]):
        with pytest.raises(ValueError, match='two or more networks'):
            agreement(networks)
    with pytest.raises(ValueError, match="'name' or by relative 'depth'"):
        agreement({'one': found, 'other': found}, by='size')
    with pytest.raises(KeyError, match='no kind'):
        agreement({'one': found, 'other': found}, 'PGD')
    with pytest.raises(ValueError, match='no filter in common'):
        agreement({'one': found, 'other': scores(made({('a', 'low'): lambda x: 1 - x}, 50))})


# ------------------------------------------------------------------------------------------------- results and figures


def test_result_survives_its_file(tmp_path):
    found = scores(random_responses(), tolerance=0.05)
    found.save(tmp_path / 'scores.safetensors')
    again = Result.load(tmp_path / 'scores.safetensors')
    assert isinstance(again, Scores)
    assert again.table().equals(found.table())
    assert again.totals().equals(found.totals())
    assert again.settings == found.settings
    assert {'baseline', 'tolerance', 'level', 'resamples', 'seed', 'samples', 'sweep'} == set(again.settings)
    assert 'Scores' in found._repr_html_()


def test_same_numbers_each_time_and_nothing_else_changes():
    responses = random_responses()
    before, state = responses.dataset.copy(deep=True), np.random.get_state()[1].copy()
    first = [scores(responses, seed=5).table(), labels(responses, seed=5), knees(responses, seed=5)]
    second = [scores(responses, seed=5).table(), labels(responses, seed=5), knees(responses, seed=5)]
    assert all(one.equals(other) for one, other in zip(first, second, strict=True))
    assert responses.dataset.identical(before)
    assert (np.random.get_state()[1] == state).all()


def test_perturbations_can_be_chosen():
    responses = random_responses()
    whole, part = scores(responses), scores(responses, perturbations='noise')
    assert whole.kinds == ['clean', 'FGSM', 'FGSM - clean', 'noise', 'noise - clean']
    assert part.kinds == ['clean', 'noise', 'noise - clean']
    table = whole.table()
    same = table[table['kind'].isin(part.kinds)].reset_index(drop=True)
    pd.testing.assert_frame_equal(same, part.table())
    for function in (labels, knees):
        table = function(responses)
        same = table[table['response'] != 'FGSM'].reset_index(drop=True)
        pd.testing.assert_frame_equal(same, function(responses, perturbations='noise'))


@pytest.mark.parametrize('layers', [1, 45])
def test_figures(layers, tmp_path):
    curves = {(f'block{i}.conv.with.a.long.name', f): lambda x, i=i: 1 - x / (1 + i) for i in range(layers)
              for f in ('high', 'low')}  # fmt: skip
    responses = made(curves, 100, grid=np.linspace(0, 1, 5))
    found = scores(responses, resamples=40)
    for number, fig in enumerate([
        found.plot(save=tmp_path / '0.png'),
        found.plot('low', kinds='FGSM', save=tmp_path / '1.png'),
        found.plot_map(save=tmp_path / '2.png'),
        plot_labels(labels(responses, resamples=40), 'high', 'FGSM', save=tmp_path / '3.png'),
    ]):  # fmt: skip
        assert fig.axes
        assert (tmp_path / f'{number}.png').stat().st_size > 2000
