"""Rules for the most vulnerable layers against literal forms, published curves, and tables made by hand."""

import itertools
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

from robustnb.attacks import FGSM
from robustnb.data import DataSet
from robustnb.devices import seeded
from robustnb.lsa import LayerSustainability, compare, layer_sustainability
from robustnb.measures import MEASURES, topk_overlap
from robustnb.noises import Gaussian, matched
from robustnb.probes import Probe
from robustnb.vulnerable import RULES, Verdict, _holm, _signed_rank, most_vulnerable

PGD_A, PGD_B = (0.71, 0.80, 0.99), (0.94, 0.92, 0.81, 0.61)  # published curves: Moon and MNIST under PGD
FGSM_A, FGSM_B = (0.65, 0.75, 0.90), (0.75, 0.70, 0.62, 0.55)


def of_values(values, sizes=None, similarity=False, names=('attack', 'noise', 'other')):
    "A result with given values (layer, perturbation, sample), or (layer, perturbation) of a stream measure."
    values = np.asarray(values, float)
    count, samples = values.shape[1], values.shape[2] if values.ndim == 3 else 5
    dims = ('layer', 'perturbation', 'sample')[: values.ndim]
    size = np.ones((count, samples)) if sizes is None else np.asarray(sizes, float)
    dataset = xr.Dataset(
        {'value': (dims, values), 'input_size': (('perturbation', 'sample'), size)},
        {'layer': [f'l{i}' for i in range(len(values))], 'perturbation': list(names[:count]), 'sample': range(samples)},
    )
    return LayerSustainability(dataset, {'measure': 'relative_error', 'similarity': similarity})


def curve(values):
    "One column for a stream measure."
    return np.array(values)[:, None]


# ------------------------------------------------------------------------------------------------ the rules, literally
def mean_of(row):
    kept = [v for v in row if math.isfinite(v)]
    return sum(kept) / len(kept) if kept else math.nan


def deviation(numbers):
    centre = sum(numbers) / len(numbers)
    return math.sqrt(sum((v - centre) ** 2 for v in numbers) / len(numbers))


def literal_joint(values, eta):
    everything = [v for row in values for v in row if math.isfinite(v)]
    mu, sigma = sum(everything) / len(everything), deviation(everything)
    scores = [(mean_of(row) - mu) / sigma for row in values]
    return scores, [score > eta for score in scores]


def literal_layer_means(values, eta):
    means = [mean_of(row) for row in values]
    known = [m for m in means if math.isfinite(m)]
    mu, sigma = sum(known) / len(known), deviation(known)
    scores = [(m - mu) / sigma for m in means]
    return scores, [score > eta for score in scores]


def literal_topk(values, k):
    means, chosen = [mean_of(row) for row in values], set()
    for _ in range(k):
        best = None
        for layer, mean in enumerate(means):
            if layer not in chosen and math.isfinite(mean) and (best is None or mean > means[best]):
                best = layer
        if best is not None:
            chosen.add(best)
    return means, [layer in chosen for layer in range(len(means))]


def literal_quantile(values, q):
    means = [mean_of(row) for row in values]
    known = sorted(m for m in means if math.isfinite(m))
    place = q * (len(known) - 1)
    low, part = int(place), place - int(place)
    line = known[low] + part * (known[min(low + 1, len(known) - 1)] - known[low])
    return means, [m > line + 1e-12 for m in means]


def middle(numbers):
    numbers = sorted(numbers)
    half = len(numbers) // 2
    return numbers[half] if len(numbers) % 2 else (numbers[half - 1] + numbers[half]) / 2


def literal_mad(values, eta):
    means = [mean_of(row) for row in values]
    known = [m for m in means if math.isfinite(m)]
    centre = middle(known)
    away = [abs(m - centre) for m in known]
    unit = 1.4826 * middle(away) or 1.2533141373155 * sum(away) / len(away)
    scores = [(m - centre) / unit for m in means]
    return scores, [score > eta for score in scores]


def literal_above_noise(values, noise, margin):
    scores = [
        mean_of([a - n for a, n in zip(row, other, strict=True)]) for row, other in zip(values, noise, strict=True)
    ]
    return scores, [score > margin for score in scores]


def literal_p(differences):
    "One-sided p-value of the signed-rank test, by counting all patterns of signs."
    used = [d for d in differences if math.isfinite(d) and d != 0]
    ranks = [sum(abs(e) < abs(d) for e in used) + (sum(abs(e) == abs(d) for e in used) + 1) / 2 for d in used]
    seen = sum(rank for rank, d in zip(ranks, used, strict=True) if d > 0)
    patterns = itertools.product((0, 1), repeat=len(used))
    sums = [sum(rank for rank, plus in zip(ranks, signs, strict=True) if plus) for signs in patterns]
    return sum(total >= seen for total in sums) / len(sums)


def literal_holm(ps):
    order = sorted((p, i) for i, p in enumerate(ps) if not math.isnan(p))
    adjusted, largest = [math.nan] * len(ps), 0.0
    for step, (p, i) in enumerate(order):
        largest = max(largest, min(1.0, p * (len(order) - step)))
        adjusted[i] = largest
    return adjusted


def literal_significance(values, alpha, noise=None):
    differences = []
    for layer, row in enumerate(values):
        differences.append([])
        for sample, value in enumerate(row):
            others = [values[k][sample] for k in range(len(values)) if k != layer and math.isfinite(values[k][sample])]
            balance = sum(value > other for other in others) - sum(value < other for other in others)
            alone = not others or not math.isfinite(value)
            differences[-1].append(value - noise[layer][sample] if noise is not None else math.nan if alone else balance)
    defined = [any(math.isfinite(v) for v in row) for row in values]
    ps = [literal_p(row) if known else math.nan for row, known in zip(differences, defined, strict=True)]
    adjusted = literal_holm(ps)
    return [math.nan if math.isnan(p) else -math.log10(p) for p in adjusted], [p < alpha for p in adjusted]


LITERAL = {
    'joint': (literal_joint, {'eta': 0.3}),
    'layer_means': (literal_layer_means, {'eta': 0.8}),
    'topk': (literal_topk, {'k': 2}),
    'quantile': (literal_quantile, {'q': 0.6}),
    'mad': (literal_mad, {'eta': 0.7}),
    'above_noise': (literal_above_noise, {'margin': 0.1}),
    'significance': (literal_significance, {'alpha': 0.2}),
}


def random_values(seed, undefined):
    "Damage (layer, sample) of five layers, with ties, and on request with holes and a layer that is undefined."
    rng = np.random.default_rng(seed)
    values = (rng.random((5, 9)) + 0.15 * rng.permutation(5)[:, None]).round(2)
    if undefined:
        values[rng.random(values.shape) < 0.15] = np.inf
        values[rng.integers(5)] = np.nan
    return values


@pytest.mark.parametrize('undefined', [False, True], ids=['defined', 'with holes'])
@pytest.mark.parametrize('rule', RULES)
def test_a_rule_is_its_formula(rule, undefined):
    literal, given_settings = LITERAL[rule]
    for seed in range(6):
        values = random_values(seed, undefined)
        more = {'noise': random_values(seed + 100, undefined)} if rule == 'above_noise' else {}
        found = RULES[rule](values, **given_settings, **more)
        scores, chosen = literal(values.tolist(), **given_settings, **{k: v.tolist() for k, v in more.items()})
        np.testing.assert_allclose(found.score, scores, rtol=1e-9, atol=1e-9)
        assert found.chosen.tolist() == chosen
        assert isinstance(found, Verdict) and found.words


def test_significance_against_a_noise_is_its_formula():
    for seed in range(6):
        values, noise = random_values(seed, seed % 2), random_values(seed + 50, False)
        found = RULES['significance'](values, noise=noise, alpha=0.3)
        scores, chosen = literal_significance(values.tolist(), 0.3, noise.tolist())
        np.testing.assert_allclose(found.score, scores, rtol=1e-9, atol=1e-9)
        assert found.chosen.tolist() == chosen


def test_every_rule_has_a_literal_form():
    assert LITERAL.keys() == RULES.keys()


# ------------------------------------------------------------------------------------------------- published curves
@pytest.mark.parametrize(
    'means, scores',
    [
        (PGD_A, (-1.06, -0.29, 1.34)),
        (FGSM_A, (-1.14, -0.16, 1.30)),
        (PGD_B, (0.92, 0.76, -0.08, -1.60)),
        (FGSM_B, (1.24, 0.59, -0.46, -1.38)),
    ],
)
def test_scores_of_the_published_curves(means, scores):
    np.testing.assert_allclose(RULES['layer_means'](curve(means)).score, scores, atol=0.0051)


def test_the_published_choices_and_the_constant_that_chooses_nothing():
    for means, layer in ((PGD_A, 2), (PGD_B, 0)):
        result = of_values(np.array(means)[:, None])
        assert most_vulnerable(result).layers == [f'l{layer}']
        assert most_vulnerable(result, 'layer_means', eta=0.9).layers == [f'l{layer}']
        for eta in (math.sqrt(len(means) - 1), 2.0):
            nothing = most_vulnerable(result, 'layer_means', eta=eta)
            assert nothing.layers == [] and 'impossible' in nothing.reason and f'l{layer}' in nothing.reason


@pytest.mark.parametrize('layers', [2, 3, 4, 7, 50])
def test_no_score_over_layer_means_exceeds_the_root(layers):
    extreme = np.zeros((layers, 1))
    extreme[1] = 0.1
    assert np.isclose(RULES['layer_means'](extreme).score.max(), math.sqrt(layers - 1))
    assert not RULES['layer_means'](extreme, eta=math.sqrt(layers - 1)).chosen.any(), 'whatever the rounding'
    rng = np.random.default_rng(layers)
    for _ in range(50):
        assert RULES['layer_means'](rng.exponential(size=(layers, 1)) ** 3).score.max() <= math.sqrt(layers - 1) + 1e-12


def test_the_joint_score_is_smaller_than_that_over_layer_means():
    values = np.random.default_rng(0).random((6, 40)) + np.arange(6)[:, None] / 5
    assert (np.abs(RULES['joint'](values).score) < np.abs(RULES['layer_means'](values).score)).all()
    same = values.mean(1, keepdims=True)
    np.testing.assert_allclose(RULES['joint'](same).score, RULES['layer_means'](same).score)


# ------------------------------------------------------------------------------------------------------------ by hand
def test_rules_by_hand():
    values = np.array([[1.0, 3.0], [2.0, 2.0], [6.0, 4.0]])  # layer means 2, 2, 5; mean 3; variance (4+0+1+1+9+1)/6
    score, chosen, line, _ = RULES['joint'](values, eta=1.0)
    np.testing.assert_allclose(score, np.array([-1, -1, 2]) / np.sqrt(16 / 6))
    assert chosen.tolist() == [False, False, True] and line == 1.0
    assert not RULES['joint'](values, eta=2 / np.sqrt(16 / 6)).chosen.any(), 'the inequality is strict'
    assert RULES['topk'](values, k=2).chosen.tolist() == [True, False, True], 'the earlier layer wins a tie'
    assert RULES['topk'](values, k=9).chosen.all() and math.isnan(RULES['topk'](values, k=9).line)
    gaps = np.array([[np.inf, 1.0], [np.inf, np.inf]])
    assert RULES['topk'](gaps, k=2).chosen.tolist() == [True, False], 'an undefined layer is never chosen'


@pytest.mark.parametrize('rule', ['joint', 'layer_means', 'quantile', 'mad', 'significance'])
def test_equal_layers_do_not_stand_out(rule):
    for value in (0.0, 0.1, 1 / 3):
        found = RULES[rule](np.full((4, 7), value))
        assert not found.chosen.any()
        assert most_vulnerable(of_values(np.full((4, 1, 7), value)), rule).reason.endswith('all of them score the same')


def test_rounding_is_no_difference():
    third = np.full((4, 30), 1 / 3) + np.linspace(0, 1, 30)
    third[2] = third[2] * 3 / 3 * (1 + 2e-16)
    assert not RULES['significance'](third).chosen.any() and not RULES['significance'](third, third[::-1]).chosen.any()
    assert not RULES['layer_means'](third, eta=0.1).chosen.any()


@pytest.mark.parametrize('power', [-200, 60, 200])
@pytest.mark.parametrize('rule', RULES)
def test_very_small_and_very_large_units(rule, power):
    values = np.random.default_rng(0).random((4, 30)) + np.arange(4)[:, None]
    assert (choose(rule, values * 2.0**power) == choose(rule, values)).all() and choose(rule, values).any() == (rule != 'mad')


def test_mad_without_a_median_deviation():
    found = RULES['mad'](curve([0.0, 0.0, 0.0, 0.6]))  # mean absolute deviation 0.15
    np.testing.assert_allclose(found.score, [0, 0, 0, 0.6 / (1.2533141373155 * 0.15)])
    assert 'median one is 0' in found.words and found.chosen.tolist() == [False, False, False, True]
    assert 'median one is 0' not in RULES['mad'](curve([0.0, 0.1, 0.2, 0.6])).words


def test_a_quantile_between_layers_and_at_a_layer():
    assert RULES['quantile'](curve(range(101)), q=0.29).chosen.sum() == 71  # 0.29 * 100 is 28.999999999999996
    assert RULES['quantile'](curve([1, 2, 2, 3]), q=0.5).chosen.tolist() == [False, False, False, True]
    assert RULES['quantile'](curve([1, 2, 2, 3]), q=0.3).chosen.tolist() == [False, True, True, True]


# --------------------------------------------------------------------------------------------------------- significance
@pytest.mark.parametrize('n', [1, 4, 9, 25])
def test_exact_p_values_are_those_of_scipy(n):
    for seed in range(5):
        d = np.random.default_rng(seed).normal(0.3, 1, n)
        expected = scipy.stats.wilcoxon(d, alternative='greater', method='exact').pvalue
        np.testing.assert_allclose(np.exp(_signed_rank(d[None])), expected, rtol=1e-12)


def test_normal_p_values_are_those_of_scipy_also_with_ties_and_zeros():
    rng = np.random.default_rng(0)
    for d in (rng.normal(0.1, 1, 400), rng.integers(-3, 5, 300).astype(float), rng.integers(-3, 3, 60).astype(float)):
        expected = scipy.stats.wilcoxon(d, alternative='greater', method='approx', correction=False).pvalue
        np.testing.assert_allclose(np.exp(_signed_rank(d[None])), expected, rtol=1e-9)


def test_p_values_of_rows_with_holes_are_those_of_the_rows_without():
    rng = np.random.default_rng(3)
    rows = [rng.normal(0.2, 1, n) for n in (3, 12, 40)]
    table = np.full((3, 45), np.nan)
    for row, own in zip(table, rows, strict=True):
        row[rng.permutation(45)[: len(own)]] = own
    np.testing.assert_allclose(_signed_rank(table), np.concatenate([_signed_rank(own[None]) for own in rows]))
    assert np.exp(_signed_rank(np.array([[0.0, np.nan]]))) == 1, 'nothing to rank'


def test_a_very_small_p_value_is_still_a_score():
    values = np.concatenate(
        [np.random.default_rng(0).random((2, 5000)), 5 + np.random.default_rng(1).random((1, 5000))]
    )
    score = RULES['significance'](values).score
    assert np.isfinite(score).all() and score[2] > 320, 'beyond the smallest number in double precision'


def test_holm_by_hand():
    np.testing.assert_allclose(np.exp(_holm(np.log([0.01, 0.04, 0.03, 0.005]))), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(np.exp(_holm(np.log([0.5, np.nan, 0.6]))), [1, np.nan, 1])


def test_false_choices_are_as_rare_as_promised():
    rng = np.random.default_rng(0)
    any_chosen = [RULES['significance'](rng.normal(size=(6, 40)), alpha=0.2).chosen.any() for _ in range(300)]
    assert np.mean(any_chosen) < 0.26  # 0.2 plus three standard deviations of 300 draws
    pairs = ((rng.normal(size=(6, 40)), rng.normal(size=(6, 40))) for _ in range(300))
    any_chosen = [RULES['significance'](values, noise, alpha=0.2).chosen.any() for values, noise in pairs]
    assert 0.1 < np.mean(any_chosen) < 0.26


@pytest.mark.parametrize('tail', [1, -1])
@pytest.mark.parametrize('layers', [2, 3, 6])
def test_skewed_damage_is_no_evidence(layers, tail):
    "The distances of such values to the mean of the other layers are skewed, and would be found significant."
    rng = np.random.default_rng(layers)
    tables = (9 + tail * rng.exponential(size=(layers, 200)) for _ in range(150))
    any_chosen = [RULES['significance'](values, alpha=0.1).chosen.any() for values in tables]
    assert 0.02 < np.mean(any_chosen) < 0.18  # 0.1 plus three standard deviations of 150 draws


def test_too_few_samples_for_a_test_are_said():
    values = np.stack([np.full(7, float(layer)) + np.arange(7) / 100 for layer in range(3)])
    assert RULES['significance'](values).chosen.tolist() == [False, False, True]
    nothing = RULES['significance'](values[:, :5])  # 3 / 2 ** 5 is more than 0.05
    assert not nothing.chosen.any() and 'impossible with 5 samples: it takes 6' in nothing.words


# ----------------------------------------------------------------------------------------------- what must not matter
tables = hnp.arrays(
    float, st.tuples(st.integers(2, 6), st.integers(1, 8)), elements=st.integers(0, 40).map(lambda v: v / 8)
)


def choose(rule, values):
    more = {'noise': np.roll(values, 1)} if rule == 'above_noise' else {}
    return RULES[rule](values, **more).chosen


@pytest.mark.parametrize('rule', RULES)
@settings(max_examples=20, deadline=None)
@given(values=tables, power=st.integers(-20, 20), data=st.data())
def test_neither_the_unit_nor_the_order_matters(rule, values, power, data):
    chosen = choose(rule, values)
    assert (choose(rule, values * 2.0**power) == chosen).all(), 'another unit'
    assert (choose(rule, values * 3) == chosen).all() or rule == 'significance'  # rounding makes or breaks ties of ranks
    samples = data.draw(st.permutations(range(values.shape[1])))
    if rule == 'above_noise':
        noise = np.roll(values, 1)
        assert (RULES[rule](values[:, samples], noise[:, samples]).chosen == chosen).all()
    else:
        assert (choose(rule, values[:, samples]) == chosen).all(), 'another order of the samples'


@pytest.mark.parametrize('rule', RULES)
@settings(max_examples=20, deadline=None)
@given(values=tables, data=st.data())
def test_the_order_of_layers_goes_with_the_choice(rule, values, data):
    order = data.draw(st.permutations(range(len(values))))
    if rule == 'topk':
        values = values + np.arange(len(values))[:, None] / 1024  # of equal layers the earlier is taken
    noise = {'noise': np.roll(values, 1)} if rule == 'above_noise' else {}
    moved = {'noise': noise['noise'][order]} if noise else {}
    assert (RULES[rule](values[order], **moved).chosen == RULES[rule](values, **noise).chosen[order]).all()


@settings(max_examples=20, deadline=None)
@given(values=tables)
def test_a_layer_without_values_changes_nothing(values):
    for rule in RULES:
        silent = np.vstack([values, np.full((1, values.shape[1]), np.inf)])
        noise = np.roll(values, 1)
        more = ({'noise': noise}, {'noise': np.vstack([noise, noise[:1]])}) if rule == 'above_noise' else ({}, {})
        with_it, without = RULES[rule](silent, **more[1]), RULES[rule](values, **more[0])
        assert (with_it.chosen == [*without.chosen, False]).all()
        np.testing.assert_allclose(with_it.score, [*without.score, np.nan], atol=1e-12)


# -------------------------------------------------------------------------------------------------------- resampling
@pytest.mark.parametrize('rule', RULES)
def test_how_often_is_a_count_over_the_same_draws(rule):
    values = np.random.default_rng(5).random((4, 2, 12))
    noise = {'noise': 'noise'} if rule == 'above_noise' else {}
    found = most_vulnerable(of_values(values), rule, 'attack', **noise, resamples=30, seed=7)
    rng, counts = np.random.default_rng(7), np.zeros(4)
    for _ in range(30):
        drawn = rng.integers(12, size=12)
        table = [[values[layer, 0, sample] for sample in drawn] for layer in range(4)]
        other = {'noise': np.array([[values[layer, 1, s] for s in drawn] for layer in range(4)])} if noise else {}
        counts += RULES[rule](np.array(table), **other).chosen
    often = found.ranking.set_index('layer').how_often
    np.testing.assert_array_equal([often[f'l{layer}'] for layer in range(4)], counts / 30)


def test_resampling_is_private_and_repeatable():
    result = of_values(np.random.default_rng(0).random((5, 1, 20)))
    before = np.random.get_state()[1].tolist(), torch.get_rng_state()
    first, again, other = (most_vulnerable(result, resamples=40, seed=seed).ranking for seed in (0, 0, 1))
    assert np.random.get_state()[1].tolist() == before[0] and torch.equal(torch.get_rng_state(), before[1])
    assert first.equals(again) and not first.how_often.equals(other.how_often)
    assert first.how_often.sum() == pytest.approx(1), 'one layer in each resample'
    assert most_vulnerable(result, resamples=0).ranking.how_often.isna().all()


def test_all_perturbations_of_a_sample_are_drawn_together():
    "With one perturbation the negative of the other, their mean over any draw is 1 in every layer: nothing stands out."
    part = np.random.default_rng(0).integers(-8, 8, (3, 16)) / 8
    result = of_values(np.stack([1 + part, 1 - part], axis=1))
    assert (most_vulnerable(result, 'layer_means', eta=0.1).ranking.how_often == 0).all()


# -------------------------------------------------------------------------------------------- from a result to an answer
def test_several_perturbations_are_averaged_for_each_sample():
    values = np.random.default_rng(1).random((4, 3, 10))
    for names in (['attack', 'other'], None):
        kept = [0, 2] if names else [0, 1, 2]
        found = most_vulnerable(of_values(values), 'joint', names)
        expected = RULES['joint'](values[:, kept].mean(1)).score
        np.testing.assert_allclose(found.ranking.set_index('layer').score[[f'l{i}' for i in range(4)]], expected)
    against = most_vulnerable(of_values(values), 'above_noise', noise='noise')
    assert 'over attack, other against noise' in against.reason, 'all but the noise'


def test_the_ranking_is_whole_and_in_order():
    values = np.random.default_rng(1).random((6, 1, 10))
    values[2] = np.inf
    found = most_vulnerable(of_values(values), k=3)
    assert list(found.ranking) == ['layer', 'mean', 'score', 'chosen', 'how_often']
    assert sorted(found.ranking.layer) == found.network == [f'l{i}' for i in range(6)]
    assert found.ranking.layer.iloc[-1] == 'l2' and found.ranking.score[:-1].is_monotonic_decreasing
    assert found.layers == sorted(found.ranking.layer[:3]), 'chosen layers stand in the order of the network'
    assert '10 of 60 values are undefined' in found.reason and '<table' in found._repr_html_()
    assert found.rule == 'topk' and found.line == found.ranking.score[3]


def test_an_empty_choice_says_why():
    values = np.random.default_rng(0).random((3, 1, 30))
    nothing = most_vulnerable(of_values(values), 'joint', eta=50)
    nearest = nothing.ranking.iloc[0]
    assert nothing.layers == [] and 'none' in repr(nothing)
    assert (
        f'the nearest is {nearest.layer} with a score of {nearest.score:.3g}, and it needs more than 50'
        in nothing.reason
    )


@pytest.mark.parametrize('rule', RULES)
def test_degenerate_results_are_answered(rule):
    noise = {'noise': 'noise'} if rule == 'above_noise' else {}
    rng = np.random.default_rng(0)
    undefined = most_vulnerable(of_values(np.full((3, 2, 4), np.nan)), rule, 'attack', **noise)
    assert undefined.layers == [] and 'undefined in every layer' in undefined.reason
    single = most_vulnerable(of_values(rng.random((1, 2, 30)) + [[[1], [0]]]), rule, 'attack', **noise)
    assert single.layers == (['l0'] if rule in ('topk', 'above_noise') else [])
    assert bool(single.layers) or 'no other layer' in single.reason
    assert 'impossible with 0' not in single.reason
    one = most_vulnerable(of_values(rng.random((3, 2, 1))), rule, 'attack', **noise)
    assert one.ranking.how_often.isna().all() and 'nothing can be redrawn' in one.reason
    dead = rng.random((4, 2, 30))
    dead[1] = 0
    assert 'l1' not in most_vulnerable(of_values(dead), rule, 'attack', **noise).layers


@pytest.mark.parametrize('rule', ['above_noise', 'significance'])
def test_a_single_layer_against_a_noise_has_something_to_compare_with(rule):
    weaker = most_vulnerable(of_values([[np.zeros(30), np.ones(30)]]), rule, 'attack', noise='noise')
    assert weaker.layers == [] and 'the nearest is l0' in weaker.reason and 'no other layer' not in weaker.reason
    stronger = most_vulnerable(of_values([[np.ones(30), np.zeros(30)]]), rule, 'attack', noise='noise')
    assert stronger.layers == ['l0']


def test_the_mean_is_that_of_the_samples_also_with_holes():
    values = np.array([[[1.0, 2.0], [3.0, np.inf]], [[1.0, 1.0], [1.0, 1.0]]])
    ranking = most_vulnerable(of_values(values)).ranking
    assert ranking['mean'].tolist() == ranking.score.tolist() == [2.0, 1.0]  # (1 + 3) / 2 and 2, in the mean


def test_stream_measures():
    result = of_values(np.random.default_rng(0).random((4, 2)))
    for rule in RULES:
        noise = {'noise': 'noise'} if rule == 'above_noise' else {}
        if rule in ('joint', 'significance'):
            with pytest.raises(ValueError, match='needs a value for each sample, .* layer_means'):
                most_vulnerable(result, rule, 'attack')
        else:
            found = most_vulnerable(result, rule, 'attack', **noise)
            assert len(found.ranking) == 4 and found.ranking.how_often.isna().all()


def test_noise_of_another_size_is_said():
    values, sizes = np.random.default_rng(0).random((3, 2, 8)), np.ones((2, 8))
    for rule in ('above_noise', 'significance'):
        assert 'beware' not in most_vulnerable(of_values(values, sizes), rule, 'attack', noise='noise').reason
        other = most_vulnerable(of_values(values, sizes * [[1], [0.75]]), rule, 'attack', noise='noise')
        assert 'differ in size by 25%' in other.reason
    shuffled = sizes * [[1], [1]] + [[0.5, -0.5] * 4, [-0.5, 0.5] * 4]  # equal on average, and for no sample
    assert 'beware' in most_vulnerable(of_values(values, shuffled), 'above_noise', 'attack', noise='noise').reason


def test_bad_questions_are_answered():
    result = of_values(np.random.default_rng(0).random((3, 2, 6)))
    for error, words, ask in (
        (KeyError, 'there are joint', lambda: most_vulnerable(result, 'top')),
        (KeyError, "did you mean perturbation='attack'", lambda: most_vulnerable(result, 'attack')),
        (KeyError, "no perturbation 'PGD'", lambda: most_vulnerable(result, perturbation='PGD')),
        (KeyError, "no perturbation 'silence'", lambda: most_vulnerable(result, 'above_noise', noise='silence')),
        (ValueError, 'no perturbation was given', lambda: most_vulnerable(result, perturbation=[])),
        (TypeError, "no setting 'eta'; it has k; eta is a setting of", lambda: most_vulnerable(result, eta=1)),
        (TypeError, "no setting 'noise'", lambda: most_vulnerable(result, 'topk', noise='noise')),
        (ValueError, 'matched', lambda: most_vulnerable(result, 'above_noise')),
        (ValueError, 'cannot be the noise', lambda: most_vulnerable(result, 'above_noise', 'noise', noise='noise')),
        (ValueError, 'eta is a number finite|eta is a number', lambda: most_vulnerable(result, 'joint', eta='1')),
        (ValueError, 'eta is a number', lambda: most_vulnerable(result, 'mad', eta=math.nan)),
        (ValueError, 'whole number from 1', lambda: most_vulnerable(result, k=1.5)),
        (ValueError, 'such as 0.8', lambda: most_vulnerable(result, 'quantile', q=1)),
        (ValueError, 'such as 0.05', lambda: most_vulnerable(result, 'significance', alpha=5)),
        (ValueError, 'resamples', lambda: most_vulnerable(result, resamples=-1)),
        (TypeError, 'works on the result', lambda: most_vulnerable(nn.ReLU())),
        (TypeError, 'four things', lambda: most_vulnerable(result, lambda values: values.mean(1))),
        (ValueError, 'each of the 3 layers', lambda: most_vulnerable(result, lambda v: (v[0], v[0] > 0, 0, ''))),
    ):
        with pytest.raises(error, match=words):
            ask()


def test_an_own_rule():
    def spread(values, least=0.1):
        score = values.std(1)
        return score, score > least, least, 'a wide spread'

    values = np.random.default_rng(0).random((3, 1, 6)) * [[[0.01]], [[1]], [[0.02]]]
    found = most_vulnerable(of_values(values), spread)
    assert found.layers == ['l1'] and found.rule == 'spread' and found.reason == 'a wide spread, over attack'
    assert most_vulnerable(of_values(values), partial(RULES['topk'], k=2)).layers == ['l1', 'l2']
    assert most_vulnerable(of_values(values), lambda v, **more: RULES['topk'](v, **more), k=2).layers == ['l1', 'l2']


# ---------------------------------------------------------------------------------------------------- with a network
@pytest.fixture(scope='module')
def net():
    with seeded(0):
        return nn.Sequential(
            nn.Conv2d(1, 8, 3),
            nn.ReLU(),
            nn.Conv2d(8, 4, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64, 16),
            nn.ELU(),
            nn.Linear(16, 4),
        ).eval()


@pytest.fixture(scope='module')
def data():
    generator = torch.Generator().manual_seed(1)
    x, y = torch.rand(30, 1, 8, 8, generator=generator), torch.randint(0, 4, (30,), generator=generator)
    return DataSet(x, y, tuple('abcd'))


def test_layers_are_names_for_where(net, data):
    result = layer_sustainability(net, data, FGSM(0.1), show_progress=False)
    for k in (1, 2):
        found = most_vulnerable(result, k=k)
        with Probe(net, where=found.layers) as probe:
            net(data.x[:2])
        assert list(probe) == found.layers and len(found.layers) == k


def test_a_matched_noise_and_a_saved_result(net, data, tmp_path: Path):
    attack = FGSM(0.1)
    result = layer_sustainability(net, data, [matched(Gaussian(), attack), attack], show_progress=False)
    result.save(tmp_path / 'profile.safetensors')
    loaded = LayerSustainability.load(tmp_path / 'profile.safetensors')
    for rule in RULES:
        noise = 'Gaussian as FGSM' if rule == 'above_noise' else None
        one, other = (most_vulnerable(r, rule, 'FGSM', noise=noise) for r in (result, loaded))
        assert one.ranking.equals(other.ranking) and one.reason == other.reason and 'beware' not in one.reason


@pytest.mark.parametrize('measure', [name for name, m in MEASURES.items() if m.similarity])
def test_by_a_similarity_the_least_similar_is_worst(net, data, measure):
    result = layer_sustainability(net, data, FGSM(0.2), measure=measure, batch_size=16, show_progress=False)
    table, found = result.table(), most_vulnerable(result)
    assert found.layers == [table.layer[table['mean'].argmin()]] and '1 - value' in found.reason
    ranking = most_vulnerable(result, k=3).ranking
    assert ranking['mean'].is_monotonic_increasing and ranking.score.is_monotonic_decreasing


def test_other_settings_of_a_similarity_rank_the_same_way(net, data):
    class AsIs(MEASURES['linear_cka'].fn):
        pass

    for own in (AsIs, partial(topk_overlap, k=4)):
        result = layer_sustainability(net, data, FGSM(0.2), measure=own, show_progress=False)
        assert '1 - value' in most_vulnerable(result).reason
        if own is AsIs:
            same = layer_sustainability(net, data, FGSM(0.2), measure='linear_cka', show_progress=False)
            assert most_vulnerable(result, k=3).ranking.equals(most_vulnerable(same, k=3).ranking)


def test_pairs_made_elsewhere(net, data):
    pairs = {'mirror': data.x.flip(-1), 'noise': Gaussian(0.1)(net, data.x, data.y)}
    found = most_vulnerable(compare(net, data.x, pairs))
    assert 'over mirror, noise' in found.reason


# --------------------------------------------------------------------------------------------------------------- figure
@pytest.mark.parametrize(
    'values', [np.full((3, 1, 4), np.nan), np.ones((1, 1, 1)), np.random.default_rng(0).random((4, 1))]
)
def test_there_is_a_figure_of_everything(values):
    found = most_vulnerable(of_values(values), 'layer_means')
    assert len(found.plot().axes) == (2 if values.shape[-1] == 4 else 1)


@pytest.mark.parametrize('layers', [1, 3, 60])
def test_the_figure(layers):
    values = np.random.default_rng(0).random((layers, 1, 12))
    found = most_vulnerable(of_values(values), 'joint', eta=0.2)
    fig = found.plot()
    scores, shares = fig.axes
    assert [bar.get_height() for bar in shares.patches] == found.ranking.set_index('layer').how_often[
        found.network
    ].tolist()
    drawn = {line.get_label(): line for line in scores.get_lines()}
    assert len(drawn['chosen'].get_xdata()) == len(found.layers)
    assert drawn['line of the rule'].get_ydata()[0] == 0.2
    assert found.plot('My title').axes[0].get_title(loc='left') == 'My title'
