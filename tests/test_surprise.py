"""Surprise adequacy and its coverage: against published values, other libraries, literal loops, and unpleasant data."""

import copy
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import gaussian_kde
from sklearn.covariance import OAS
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import KernelDensity
from torch import nn

from robustnb import surprise
from robustnb.coverage import Activations, Coverage, as_criterion, assess
from robustnb.results import Result
from robustnb.surprise import (
    ADEQUACIES,
    CONVENTIONS,
    DSC,
    LSC,
    MDSC,
    Adequacy,
    DistanceSurprise,
    Fitted,
    LikelihoodSurprise,
    MahalanobisSurprise,
    Moments,
    SurpriseCriterion,
    Traces,
    surprise_adequacy,
)

CASES = {case['id']: case for case in json.loads((Path(__file__).parent / 'golden' / 'coverage.json').read_text())['cases']}
ALL = [LikelihoodSurprise(), LikelihoodSurprise(bandwidth=0.5), LikelihoodSurprise('silverman'), DistanceSurprise(),
       DistanceSurprise('test'), MahalanobisSurprise(), MahalanobisSurprise(0),
       MahalanobisSurprise(0.3, shared=True, squared=True)]
settled = settings(max_examples=8, deadline=None)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def classes_of(n, classes=3, seed=0):
    return torch.randint(classes, (n,), generator=torch.Generator().manual_seed(seed))


def toy(n=120, units=5, classes=3, seed=0):
    "Traces of some classes, and their classes."
    y = classes_of(n, classes, seed)
    return normal(n, units, seed=seed + 1) @ normal(units, units, seed=seed + 2) + 2 * normal(classes, units, seed=seed + 3)[y], y


def batches_of(rows, classes, sizes, ids=None):
    "The data as activations, in batches of these sizes."
    ids = torch.arange(len(rows)) if ids is None else ids
    for part in torch.arange(len(rows)).split(sizes):
        yield Activations({'fc': rows[part]}, prediction=classes[part], ids=ids[part])


def filled(accumulator, rows, classes, sizes=1000, ids=None):
    for batch in batches_of(rows, classes, sizes, ids):
        accumulator.update(batch)
    return accumulator


# Published values


def golden(name):
    inputs, expected = CASES[name]['inputs'], CASES[name]['expected']
    train, test = torch.tensor(inputs['train']), torch.tensor(inputs['test'])
    y = torch.tensor(inputs.get('train_labels', [0] * len(train)))
    return (train, y), (test, torch.tensor(inputs.get('test_labels', [0] * len(test)))), expected, CASES[name]['tol']


@pytest.mark.parametrize(('name', 'adequacy', 'tool'), [
    ('lsa_gaussian_kde', LikelihoodSurprise(), 'dnn-tip'),
    ('lsa_gaussian_kde', LikelihoodSurprise(), 'NeuraL-Coverage (num_class<=1)'),
    ('lsa_sklearn_kde_per_class', LikelihoodSurprise(bandwidth=0.2), 'NeuraL-Coverage (num_class>1)'),
    ('dsa_agree', DistanceSurprise(), 'dnn-tip'),
    ('dsa_agree', DistanceSurprise('test'), 'NeuraL-Coverage (read back through 1e-4 buckets)'),
    ('dsa_differ', DistanceSurprise(), 'dnn-tip'),
    ('dsa_differ', DistanceSurprise('test'), 'NeuraL-Coverage (read back through 1e-4 buckets)'),
    ('mdsa_per_class', MahalanobisSurprise(shrinkage=0), 'NeuraL-Coverage'),
    ('mdsa_per_class', MahalanobisSurprise(shrinkage=0), 'dnn-tip (square root taken)'),
])
def test_golden_scores(name, adequacy, tool):
    train, test, expected, tolerance = golden(name)
    np.testing.assert_allclose(adequacy.fit(train)(*test), expected[tool], atol=tolerance)


def test_golden_buckets():
    train, test, expected, _ = golden('lsc_buckets')
    params = CASES['lsc_buckets']['params']
    wide = LSC(convention='width', width=params['bucket_width'], train=filled(Traces(), *train))
    bounded = LSC(n=params['sections'], upper=params['upper'], train=wide.train)
    for criterion in (wide, bounded):
        filled(criterion, *test)
    assert [wide.compute(), bounded.counts()[0]] == list(expected.values())
    assert bounded.counts() == (2, 20) and bounded.compute() == 0.1 and wide.counts() == (2, None)


@dataclass(frozen=True)
class Plain(Adequacy):
    "The trace is the score, and a trace of 999 is an infinite one."

    def fit(self, train):
        return Fitted({0: lambda rows: torch.where(rows[:, 0].abs() == 999, rows[:, 0] * math.inf, rows[:, 0])}, units=1)


def plain(scores, n=4, upper=2.0, **how):
    criterion = SurpriseCriterion(n, upper, Plain(), by=None, **how)
    criterion.train = criterion.learns()
    criterion.train.update({'fc': torch.zeros(1, 1)})
    if len(scores):
        traces = torch.tensor(scores, dtype=torch.float64)[:, None]
        criterion.update({'fc': torch.where(traces.isinf(), traces.sign() * 999, traces)})
    return criterion


def test_golden_conventions():
    case = CASES['sc_mapper']
    how = [{}, {'convention': 'overflow'}, {'convention': 'width', 'width': 0.5}, {'convention': 'minimum'}]
    worth = [plain(case['inputs'], **one).compute() for one in how]
    assert worth == list(case['expected'].values())
    assert plain(case['inputs']).outside() == {'samples': 6, 'underflow': 1, 'overflow': 2, 'undefined': 0}


# Other libraries, and literal loops


@pytest.mark.parametrize('rule', ['scott', 'silverman'])
@pytest.mark.parametrize('units', [1, 2, 6])
def test_likelihood_is_that_of_scipy(units, rule):
    rows, y = toy(90, units)
    test, z = toy(40, units, seed=9)
    scores = LikelihoodSurprise(rule).fit((rows, y))(test, z)
    for number in range(3):
        density = gaussian_kde(rows[y == number].double().numpy().T, rule)
        expected = -density.logpdf(test[z == number].double().numpy().T)
        np.testing.assert_allclose(scores[z == number], expected, rtol=1e-9, atol=1e-9)


def test_fixed_width_is_that_of_sklearn():
    rows, y = toy()
    test, z = toy(40, seed=9)
    scores = LikelihoodSurprise(bandwidth=0.2).fit((rows, y))(test, z)
    for number in range(3):
        density = KernelDensity(bandwidth=0.2).fit(rows[y == number].double().numpy())
        np.testing.assert_allclose(scores[z == number], -density.score_samples(test[z == number].double().numpy()), rtol=1e-6)


def test_likelihood_never_underflows():
    rows, y = toy(classes=1)
    far = LikelihoodSurprise().fit((rows, y))(rows[:1] + torch.tensor([[1e2], [1e4], [1e6]]), torch.zeros(3))
    assert far.isfinite().all() and far[0] < far[1] < far[2]
    with np.errstate(divide='ignore'):
        assert np.isinf(-np.log(gaussian_kde(rows.double().numpy().T)((rows[0] + 1e4).double().numpy()))).all()


def literal_distances(rows, y, test, z, second='train'):
    "The definition, one sample and one trace at a time."
    rows, test, found = rows.double(), test.double(), []
    for a, c in zip(test, z, strict=True):
        near, other = min((float((a - r).norm()), i) for i, r in enumerate(rows) if y[i] == c)
        origin = rows[other] if second == 'train' else a
        found.append(near / min(float((origin - r).norm()) for i, r in enumerate(rows) if y[i] != c))
    return found


@pytest.mark.parametrize('second', ['train', 'test'])
@pytest.mark.parametrize('offset', [0, 1e4])
def test_distance_is_a_literal_loop(second, offset):
    rows, y = toy(60)
    test, z = toy(25, seed=5)
    rows, test = rows + offset, test + offset
    found = DistanceSurprise(second).fit((rows, y))
    for _ in range(2):  # the second time from what was kept
        np.testing.assert_allclose(found(test, z), literal_distances(rows, y, test, z, second), rtol=1e-6)


def test_distance_in_blocks(monkeypatch):
    rows, y = toy(80)
    test, z = toy(50, seed=5)
    whole = DistanceSurprise().fit((rows, y))(test, z)
    monkeypatch.setattr(surprise, '_CELLS', 100)
    assert torch.equal(DistanceSurprise().fit((rows, y))(test, z), whole)
    torch.testing.assert_close(LikelihoodSurprise().fit((rows, y))(test, z).isfinite(), torch.ones(50, dtype=torch.bool))


def test_equally_near_traces_are_decided_by_the_first():
    grid = torch.cartesian_prod(torch.arange(5.0), torch.arange(5.0))  # full of ties
    y = (grid[:, 0] > 2).long()
    test, z = torch.cartesian_prod(torch.arange(4) + 0.5, torch.arange(4) + 0.5), torch.zeros(16, dtype=torch.int64)
    np.testing.assert_allclose(DistanceSurprise().fit((grid, y))(test, z), literal_distances(grid, y, test, z), rtol=1e-12)


def test_distance_of_coinciding_traces():
    rows, y = torch.tensor([[0.0], [0.0], [1.0], [5.0]]), torch.tensor([0, 1, 1, 0])
    scores = DistanceSurprise().fit((rows, y))(torch.tensor([[0.0], [0.5], [4.0]]), torch.tensor([0, 0, 0]))
    assert scores.tolist() == [0, math.inf, 0.25]


@pytest.mark.parametrize('shared', [False, True])
@pytest.mark.parametrize('units', [1, 4])
def test_mahalanobis_is_the_pseudo_inverse(shared, units):
    rows, y = toy(90, units)
    rows = torch.cat([rows, rows[:, :1] * 2, torch.zeros(90, 1)], dim=1)  # dependent, and constant
    test, z = normal(30, units + 2, seed=4), classes_of(30, seed=6)
    plain, square = (MahalanobisSurprise(0, shared, squared).fit((rows, y))(test, z) for squared in (False, True))
    parts = [rows[y == c].double().numpy() for c in range(3)]
    within = sum(len(p) * np.cov(p.T, bias=True) for p in parts) / 90
    for i, c in enumerate(z.tolist()):
        gap = test[i].double().numpy() - parts[c].mean(0)
        inverse = np.linalg.pinv(within if shared else np.cov(parts[c].T, bias=True), rcond=1e-10, hermitian=True)
        assert float(square[i]) == pytest.approx(gap @ inverse @ gap, rel=1e-6)
    torch.testing.assert_close(plain.square(), square)


@pytest.mark.parametrize(('n', 'units'), [(200, 3), (40, 20), (10, 30)])
def test_shrinkage_is_that_of_sklearn(n, units):
    rows = toy(n, units, classes=1)[0].double()
    oas = OAS().fit(rows.numpy())
    covariance = torch.from_numpy(np.cov(rows.numpy().T, bias=True))
    share = surprise._oas(covariance, n)
    assert share == pytest.approx(oas.shrinkage_)
    np.testing.assert_allclose(surprise._shrunk(covariance, share), oas.covariance_, rtol=1e-9)
    scores = MahalanobisSurprise().fit((rows, torch.zeros(n).long()))(rows, torch.zeros(n))
    np.testing.assert_allclose(scores.square(), oas.mahalanobis(rows.numpy()), rtol=1e-7)


@pytest.mark.parametrize('adequacy', [MahalanobisSurprise(0), MahalanobisSurprise(), MahalanobisSurprise(0.5, shared=True),
                                      MahalanobisSurprise(squared=True)])
def test_reach_is_four_times_the_root_mean_square(adequacy):
    rows, y = toy()
    fitted = adequacy.fit((rows, y))
    scores = fitted(rows, y)
    square = scores.mean() if adequacy.squared else scores.square().mean()
    assert fitted.reach == pytest.approx(float(16 * square) if adequacy.squared else 4 * float(square) ** 0.5)


# Neither the batch size nor the order matter


@settled
@given(st.integers(1, 40), st.integers(0, 1000), st.integers(0, len(ALL) - 1))
def test_batches_and_order_of_training_and_test_data_do_not_matter(size, seed, which):
    adequacy = ALL[which]
    rows, y = toy(60)
    test, z = toy(20, seed=5)
    order, turned = (torch.from_numpy(np.random.default_rng(seed).permutation(n)) for n in (60, 20))
    whole = adequacy.fit(filled(adequacy.learner(), rows, y))(test, z)
    parts = adequacy.fit(filled(adequacy.learner(), rows[order], y[order], size, order))
    found = torch.cat([parts(test[part], z[part]) for part in turned.split(size)])
    torch.testing.assert_close(found, whole[turned], rtol=1e-9, atol=1e-9)


@settled
@given(st.integers(1, 40), st.integers(0, 1000), st.one_of(st.none(), st.integers(1, 70)))
def test_traces_merge_exactly(size, seed, limit):
    rows, y = toy(60)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(60))
    whole = filled(Traces(limit=limit, seed=3), rows, y)
    left = filled(Traces(limit=limit, seed=3), rows[order[:25]], y[order[:25]], size, order[:25])
    right = filled(Traces(limit=limit, seed=3), rows[order[25:]], y[order[25:]], size, order[25:])
    left.merge(right)
    assert left.state.keys() == {'rows', 'classes', 'ids'} and len(left.state['ids']) == min(limit or 60, 60)
    assert all(torch.equal(left.state[name], value) for name, value in whole.state.items())


def test_the_draw_is_even():
    rows, y = torch.arange(40.0)[:, None], torch.zeros(40).long()
    drawn = torch.zeros(40)
    for seed in range(300):
        drawn[filled(Traces(limit=10, seed=seed), rows, y).state['ids']] += 1
    assert drawn.sum() == 3000 and 45 < drawn.min() and drawn.max() < 105  # 75 expected, with a standard deviation of 7.5


def test_memory_of_a_draw_is_bounded():
    traces = Traces(limit=5)
    for batch in batches_of(normal(400, 2), torch.zeros(400).long(), 10):
        traces.update(batch)
        assert sum(len(part['ids']) for part in (traces._kept, *traces._new)) <= 5 + 5


@settled
@given(st.integers(1, 40), st.integers(0, 1000), st.integers(1, 59))
def test_moments_are_those_of_all_data(size, seed, cut):
    rows, y = toy(60)
    order = np.random.default_rng(seed).permutation(60)
    rows, y = rows[order] + 100, y[order]
    left, right = filled(Moments(), rows[:cut], y[:cut], size), filled(Moments(), rows[cut:], y[cut:], size)
    left.merge(right)
    for c in range(3):
        facts = {name: value[c] for name, value in left.compute().items()}
        part = rows[y == c].double().numpy()
        assert facts['count'] == len(part)
        np.testing.assert_allclose(facts['mean'], part.mean(0), rtol=1e-12)
        np.testing.assert_allclose(facts['covariance'], np.cov(part.T, bias=True), rtol=1e-9, atol=1e-10)


def test_moments_do_not_share_memory_with_what_was_merged_or_stored():
    rows, y = toy(60)
    one, other = Moments(), filled(Moments(), rows, y)
    one.merge(other)
    stored, before = one.state_dict(), {name: value.clone() for name, value in other.state.items()}
    filled(one, rows, y)
    assert all(torch.equal(other.state[name], value) and torch.equal(stored[name], value) for name, value in before.items())


def test_classes_may_come_one_after_the_other():
    rows, y = toy(200, classes=37)
    order = y.argsort()
    late, early = filled(Moments(), rows[order], y[order], 3), filled(Moments(), rows, y)
    assert late.state['count'].tolist() == torch.bincount(y).tolist()
    torch.testing.assert_close(late.state, early.state)


@pytest.mark.parametrize('make', [LSC, DSC, MDSC])
@pytest.mark.parametrize('convention', CONVENTIONS)
@settled
@given(st.integers(1, 30), st.integers(1, 39), st.integers(0, 1000))
def test_merged_coverage_is_that_of_both_suites(make, convention, size, cut, seed):
    how = {'convention': convention, 'width': 0.1 if convention == 'width' else None}
    criterion = make(n=50, train=make(**how).learns(), **how)
    filled(criterion.train, *toy(60))
    test, z = toy(40, seed=5)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(40))
    whole, left, right = (criterion.fresh() for _ in range(3))
    filled(whole, test, z)
    filled(left, test[order[:cut]], z[order[:cut]], size)
    filled(right, test[order[cut:]], z[order[cut:]], size)
    left.merge(right)
    assert left.compute() == whole.compute() and left.counts() == whole.counts() and left.outside() == whole.outside()
    if convention != 'minimum':
        items = whole.items(Activations({'fc': test}, prediction=z))
        assert items.shape == (40, 1) and items.dtype == torch.int64
        assert sorted(set(items.flatten().tolist()) - {-1}) == whole.state['sections'].tolist()
        whole.merge(left)
        assert whole.compute() == left.compute()


@pytest.mark.parametrize('make', [LSC, DSC, MDSC])
@pytest.mark.parametrize('convention', ['bounded', 'minimum'])
def test_states_go_through_json(make, convention):
    criterion = make(n=50, convention=convention)
    criterion.train = filled(criterion.learns(), *toy(60))
    filled(criterion, *toy(30, seed=5))
    text = json.dumps({name: {k: v.tolist() for k, v in part.state_dict().items()}
                       for name, part in (('test', criterion), ('train', criterion.train))})
    again = criterion.fresh()
    again.load_state_dict(json.loads(text)['test'])
    again.train = criterion.learns()
    again.train.load_state_dict(json.loads(text)['train'])
    assert again.compute() == criterion.compute() and again.outside() == criterion.outside()
    batch = next(batches_of(*toy(30, seed=7), 30))
    torch.testing.assert_close(again.scores(batch), criterion.scores(batch))


def test_fitting_is_done_once_and_again_when_there_are_more_data():
    criterion = DSC(train=filled(Traces(), *toy(60)))
    other, third = criterion.fresh(), copy.copy(criterion)
    assert criterion.fitted() is other.fitted() is third.fitted() is LSC(adequacy=DistanceSurprise(), train=other.train).fitted()
    before = criterion.fitted()
    filled(criterion.train, *toy(5, seed=8))
    assert other.fitted() is not before


def test_silence_before_the_first_batch():
    for convention in CONVENTIONS:
        criterion = plain([], convention=convention, width=1.0 if convention == 'width' else None)
        assert criterion.compute() == 0 and criterion.counts()[0] == 0 and set(criterion.outside().values()) == {0}
        criterion.update({'fc': torch.zeros(0, 1)})
        assert criterion.compute() == 0 and criterion.outside()['samples'] == 0


@settled
@given(st.lists(st.one_of(st.integers(-700, 700).map(lambda n: n / 128), st.sampled_from([math.nan, math.inf, -math.inf, -0.0]))))
def test_sections_of_any_scores(scores):
    real = [s for s in scores if not math.isnan(s)]
    inside, over = {int(s * 4) for s in real if 0 <= s < 2}, any(s >= 2 for s in real)
    bounded, overflow = plain(scores, 8), plain(scores, 9, convention='overflow')
    assert bounded.counts() == (len(inside), 8) and overflow.counts() == (len(inside) + over, 9)
    assert bounded.outside() == {'samples': len(scores), 'underflow': sum(s < 0 for s in real),
                                 'overflow': sum(s >= 2 for s in real), 'undefined': len(scores) - len(real)}
    assert plain(scores, convention='width', width=0.25).compute() == len({int(s / 0.25) for s in real if math.isfinite(s)})
    assert plain(scores, 8, convention='minimum').counts()[0] <= 8


def test_sections_of_width_end_where_whole_numbers_do():
    numbers = surprise._sections_of_width(torch.tensor([1e30, -1e30, 1.0, math.inf]).double(), 2**-20)
    assert numbers.tolist() == [2**62, 2**62 - 1, 2**21, -1]


# Unpleasant data


def test_a_class_that_was_never_seen_is_undefined_and_told_once(caplog):
    rows, y = toy()
    for adequacy in ALL:
        fitted = adequacy.fit((rows, y))
        caplog.clear()
        for _ in range(3):
            scores = fitted(rows[:4], torch.tensor([0, 7, 1, -1]))
            assert scores.isnan().tolist() == [False, True, False, True]
        assert len(caplog.records) == 1 and 'class -1, 7 is undefined' in caplog.text
    criterion = MDSC(train=filled(Moments(), rows, y))
    criterion.update(Activations({'fc': rows[:4]}, prediction=torch.tensor([0, 7, 1, -1])))
    assert criterion.outside()['undefined'] == 2 and criterion.counts()[0] <= 2


def test_a_gap_in_the_classes_changes_nothing():
    rows, y = toy()
    test, z = toy(20, seed=5)
    for adequacy in ALL:
        torch.testing.assert_close(adequacy.fit((rows, 5 * y + 2))(test, 5 * z + 2), adequacy.fit((rows, y))(test, z))


@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_values_that_are_not_finite(bad):
    rows, y = toy()
    test = rows[:3].clone()
    test[1, 2] = bad
    for adequacy in ALL:
        assert adequacy.fit((rows, y))(test, y[:3]).isnan().tolist() == [False, True, False]
        with pytest.raises(ValueError, match='NaN or infinity'):
            adequacy.fit((torch.cat([rows, test]), torch.cat([y, y[:3]])))


def test_constant_units_are_left_out_of_the_likelihood():
    rows, y = toy()
    more = torch.cat([rows[:, :2], torch.full((120, 1), 4.0), rows[:, 2:]], dim=1)
    fitted, plain_one = LikelihoodSurprise().fit((more, y)), LikelihoodSurprise().fit((rows, y))
    torch.testing.assert_close(fitted(more, y), plain_one(rows, y))
    assert not fitted.notes
    with pytest.raises(ValueError, match='no unit varies'):
        LikelihoodSurprise().fit((torch.ones(9, 3), classes_of(9)))
    with pytest.raises(ValueError, match='no class has training traces'):
        MahalanobisSurprise().fit((torch.ones(9, 3), classes_of(9)))


def test_the_units_that_vary_most_are_kept():
    rows, y = toy(units=6)
    rows = rows * torch.tensor([1, 9, 1, 8, 1, 7.0])
    fitted = LikelihoodSurprise(max_units=3).fit((rows, y))
    variance = sum(rows[y == c].var(0, correction=0) * (y == c).sum() for c in range(3))
    kept = variance.argsort(descending=True)[:3].sort().values
    torch.testing.assert_close(fitted(rows, y), LikelihoodSurprise().fit((rows[:, kept], y))(rows[:, kept], y))


def test_fewer_samples_than_units_are_told(caplog):
    rows, y = toy(30, 40)
    for adequacy in (LikelihoodSurprise(), MahalanobisSurprise(0)):
        caplog.clear()
        fitted = adequacy.fit((rows, y))
        sizes = torch.bincount(y).tolist()
        assert {number: note.startswith(f'{n} samples vary in {n - 1} of 40 directions') for number, (n, note)
                in enumerate(zip(sizes, fitted.notes.values(), strict=True))} == {0: True, 1: True, 2: True}
        assert len(caplog.records) == 1 and 'in 3 classes' in caplog.text and 'settings["notes"]' in caplog.text
        assert fitted(normal(5, 40, seed=3), y[:5]).isfinite().all()
    assert not MahalanobisSurprise().fit((rows, y)).notes


def test_linear_dependence_is_told_and_survived():
    rows, y = toy(classes=1)
    more = torch.cat([rows, 3 * rows[:, :1] - rows[:, 1:2]], dim=1)
    fitted = LikelihoodSurprise().fit((more, y))
    assert 'vary in 5 of 6 directions' in fitted.notes[0]
    broken = more[:2] + torch.tensor([0, 0, 0, 0, 0, 3.0])  # leaves the plane in which all samples lie
    assert (fitted(broken, y[:2]) > fitted(more[:2], y[:2])).all()


def test_one_sample_per_class():
    rows, y = normal(4, 3), torch.arange(4)
    test = normal(6, 3, seed=2)
    np.testing.assert_allclose(DistanceSurprise().fit((rows, y))(test, y[:1].expand(6)),
                               literal_distances(rows, y, test, y[:1].expand(6)), rtol=1e-9)
    assert MahalanobisSurprise(shared=True).fit((torch.cat([rows, rows + 1]), y.repeat(2)))(test, torch.zeros(6)).isfinite().all()
    for adequacy in (MahalanobisSurprise(), LikelihoodSurprise(min_variance=0)):
        with pytest.raises(ValueError, match='no class has training traces'):
            adequacy.fit((rows, y))
    some = MahalanobisSurprise().fit((torch.cat([rows, rows[:1] + 1]), torch.tensor([0, 1, 2, 3, 0])))
    assert some(test[:2], torch.tensor([0, 1])).isnan().tolist() == [False, True] and some.notes.keys() == {1, 2, 3}
    assert LikelihoodSurprise(bandwidth=1.0, min_variance=0).fit((rows, y))(test, torch.zeros(6)).isfinite().all()


def test_one_class():
    rows, y = toy(classes=1)
    with pytest.raises(ValueError, match='at least two classes'):
        DistanceSurprise().fit((rows, y))
    for adequacy in (LikelihoodSurprise(), MahalanobisSurprise()):
        assert adequacy.fit((rows, y))(rows, y).isfinite().all()


def test_nothing_to_learn_from():
    for adequacy in ALL:
        for train in (adequacy.learner(), (torch.zeros(0, 3), torch.zeros(0).long())):
            with pytest.raises(ValueError, match='has seen no training sample'):
                adequacy.fit(train)
    with pytest.raises(ValueError, match='give it Moments that were updated'):
        MDSC(train=Moments()).update(Activations({'fc': torch.zeros(1, 2)}, prediction=torch.zeros(1).long()))
    with pytest.raises(ValueError, match='give it Traces that were updated'):
        DSC().update(Activations({'fc': torch.zeros(1, 2)}, prediction=torch.zeros(1).long()))
    assert DistanceSurprise().fit(toy())(torch.zeros(0, 5), torch.zeros(0)).shape == (0,)


@pytest.mark.parametrize(('make', 'words'), [
    (lambda: Traces(by='labels'), "by is 'prediction'"), (lambda: Traces(limit=0), 'at least 1'),
    (lambda: LikelihoodSurprise('scot'), "'silverman' or a number"), (lambda: LikelihoodSurprise(0), 'above 0'),
    (lambda: LikelihoodSurprise(max_units=0), 'at least 1'), (lambda: DistanceSurprise('both'), "'train' or 'test'"),
    (lambda: MahalanobisSurprise('lw'), "'oas' or a number"), (lambda: MahalanobisSurprise(2), 'from 0 to 1'),
    (lambda: LSC(n=0), 'at least 1'), (lambda: LSC(convention='width'), 'width is given'),
    (lambda: DSC(width=1.0), 'width is given'),
    (lambda: DSC(upper=-1), 'finite numbers above 0'), (lambda: DSC(upper=math.inf), 'finite'),
    (lambda: DSC(convention='x'), 'one of'),
    (lambda: LSC(n=1, convention='overflow'), 'at least 2'),
    (lambda: LSC(upper=None, train=filled(Traces(), *toy())).top(), 'give upper='),
    (lambda: plain([1], convention='minimum').items({'fc': torch.zeros(1, 1)}), 'whole suite'),
    (lambda: DistanceSurprise().fit(toy())(torch.zeros(2, 4), torch.zeros(2)), 'same layers'),
    (lambda: Traces().update({'fc': torch.zeros(2, 3)}), "by='prediction'"),
    (lambda: Traces().update(Activations({'fc': torch.zeros(2, 3)}, prediction=torch.zeros(2))), 'one whole number'),
    (lambda: Traces('x').update(Activations({'fc': torch.zeros(2, 3)}, prediction=torch.zeros(2).long())), "no layer 'x'"),
    (lambda: LikelihoodSurprise().fit(filled(Moments(), *toy())), 'needs the traces themselves'),
    (lambda: surprise_adequacy(Net(), toy(), toy(), []), 'no adequacy'),
    (lambda: Traces(by=None).update(Activations({'fc': torch.zeros(2, 3)}, ids=torch.arange(3))), 'one id for each'),
    (lambda: Traces(-5).update(Activations({'fc': torch.zeros(2, 3)}, prediction=torch.zeros(2).long())), 'there are 1 layers'),
    (lambda: Traces(3).update(Activations({'fc': torch.zeros(2, 3)}, prediction=torch.zeros(2).long())), 'there are 1 layers'),
    (lambda: filled(filled(Moments(), *toy()), *toy(units=4)), 'layers of the first batch'),
    (lambda: filled(Moments(), *toy(), ).update(Activations({'fc': torch.zeros(1, 5)}, prediction=torch.tensor([-1]))), 'from 0'),
])
def test_errors_teach(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_settings_that_differ_do_not_merge():
    train = filled(Traces(), *toy())
    with pytest.raises(ValueError, match='settings differ'):
        DSC(train=train).merge(DSC(upper=3.0, train=train))
    with pytest.raises(ValueError, match='settings differ'):
        DSC(train=train).merge(DSC(adequacy=DistanceSurprise('test'), train=train))


# With a model


class Net(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.one, self.two, self.three = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, classes)

    def forward(self, x):
        return self.three(torch.tanh(self.two(torch.tanh(self.one(x)))))


@pytest.fixture(scope='module')
def world():
    model, x = Net(), normal(300, 4)
    y = model(x).argmax(1)
    return model, (x, y), {'same': (normal(80, 4, seed=5), classes_of(80)), 'far': (6 * normal(50, 4, seed=6), classes_of(50))}


def test_layers_and_classes_that_are_compared(world):
    model, (x, y), _ = world
    with torch.no_grad():
        hidden = model.two(torch.tanh(model.one(x)))
    coverage = Coverage(model, [DSC(), LSC(layer=None, by='label'), MDSC(by=None)], show_progress=False).learn((x, 2 - y))
    dsc, lsc, mdsc = coverage.criteria.values()
    torch.testing.assert_close(dsc.train.state['rows'], hidden)
    assert torch.equal(dsc.train.state['classes'], y) and dsc.train.layers == {'one': 8, 'two': 6, 'three': 3}
    assert lsc.train.state['rows'].shape == (300, 17) and torch.equal(lsc.train.state['classes'], 2 - y)
    assert mdsc.train.state['count'].tolist() == [300]


def test_criteria_with_the_same_wishes_share_what_they_learn(world):
    coverage = Coverage(world[0], [DSC(), LSC(), MDSC(), DSC(limit=50)], show_progress=False).learn(world[1])
    first, second, _, drawn = (c.train for c in coverage.criteria.values())
    assert first is second and len(first.state['ids']) == 300 and len(drawn.state['ids']) == 50


def test_scores_of_suites(world, tmp_path):
    model, train, suites = world
    result = surprise_adequacy(model, train, suites, show_progress=False)
    small = surprise_adequacy(model, train, suites, batch_size=7, show_progress=False)
    assert result.dataset['score'].dims == ('sample', 'adequacy') and result.dataset['score'].shape == (130, 3)
    np.testing.assert_allclose(result.dataset['score'], small.dataset['score'], rtol=1e-4)
    criterion = next(iter(Coverage(model, ['DSC'], show_progress=False).learn(train).criteria.values()))
    batch = next(Coverage(model, ['DSC'], show_progress=False).walk(suites['far']))
    np.testing.assert_allclose(result.of('far', 'distance'), criterion.scores(batch), rtol=1e-5)
    assert np.array_equal(result.dataset['label'].values[:80], suites['same'][1])
    table = result.table().set_index(['adequacy', 'suite'])
    for name in ADEQUACIES:
        both = np.concatenate([result.of('same', name), result.of('far', name)])
        assert table.auroc[name, 'far'] == pytest.approx(roc_auc_score(np.arange(130) >= 80, both))
        assert table.low[name, 'far'] <= table.auroc[name, 'far'] <= table.high[name, 'far']
        assert table.auroc[name, 'same'] == 0.5 and table['mean'][name, 'far'] == pytest.approx(result.of('far', name).mean())
    assert table.n.tolist() == [80, 50] * 3 and table.undefined.sum() == 0
    result.save(tmp_path / 'scores.safetensors')
    again = Result.load(tmp_path / 'scores.safetensors')
    assert type(again).__name__ == 'SurpriseScores' and again.table().equals(result.table())
    assert len(again.plot('two suites').axes) == 3


def test_undefined_scores_are_counted_not_averaged(world):
    model, (x, _), suites = world
    small = x[model(x).argmax(1) != model(suites['same'][0]).argmax(1).mode().values]
    result = surprise_adequacy(model, (small, torch.zeros(len(small))), suites, 'mahalanobis', show_progress=False)
    table = result.table().set_index('suite')
    unseen = (model(suites['same'][0]).argmax(1) == model(suites['same'][0]).argmax(1).mode().values).sum()
    assert table.undefined['same'] == unseen > 0 and np.isfinite(table['mean']).all() and np.isfinite(table.auroc).all()
    assert result.plot().axes


def test_the_interval_holds_what_it_says():
    rng, truth, held = np.random.default_rng(0), 0.7602499389065233, 0  # P(N(1, 1) > N(0, 1))
    for _ in range(300):
        found = surprise._auroc(rng.normal(size=40), rng.normal(size=60) + 1)
        held += found.low <= truth <= found.high
    assert 0.92 <= held / 300 <= 0.99
    apart = surprise._auroc(np.arange(30), np.arange(30) + 100)
    assert apart.value == apart.high == 1 > apart.low > 0.8
    assert math.isnan(surprise._auroc(np.zeros(0), np.ones(3)).value)
    assert surprise._auroc(np.array([0.0]), np.array([math.inf, 0.0])).value == 0.75


def test_adequacies_by_name(world):
    assert list(surprise._adequacies('all')) == list(ADEQUACIES)
    assert surprise._adequacies({'mine': 'distance', 'other': MahalanobisSurprise(0)}) == {
        'mine': DistanceSurprise(), 'other': MahalanobisSurprise(0)}
    with pytest.raises(KeyError, match='there are likelihood, distance, mahalanobis'):
        surprise._adequacies('lsa')
    assert isinstance(as_criterion('MDSC'), MDSC)
    values = assess(*world, ['LSC', 'DSC', 'MDSC'], show_progress=False).table().value
    assert len(values) == 6 and values.between(0, 1).all()


def test_rounding_of_single_precision_is_no_direction():
    rows = normal(200, 5) + 1000
    rows, y = torch.cat([rows, 3 * rows[:, :1] - rows[:, 1:2]], dim=1), torch.zeros(200).long()
    moved = rows[:20] + torch.tensor([0, 0, 0, 0, 0, 0.01])  # leaves the plane by less than anybody could see
    for adequacy in (LikelihoodSurprise(), MahalanobisSurprise(0)):
        fitted = adequacy.fit((rows, y))
        assert fitted.notes[0].startswith('200 samples vary in 5 of 6 directions')
        torch.testing.assert_close(fitted(moved, y[:20]), fitted(rows[:20], y[:20]), rtol=0.01, atol=0.01)
    noise = torch.full((200, 3), 1000.0) + normal(200, 3) * 1e-5  # nothing but rounding
    for adequacy in (LikelihoodSurprise(min_variance=0), MahalanobisSurprise(), MahalanobisSurprise(0)):
        with pytest.raises(ValueError, match='without any spread'):
            adequacy.fit((noise, y))


def test_a_shrinkage_too_small_to_help_is_none_at_all():
    rows, y = normal(5, 20), torch.zeros(5).long()
    for share in (1e-300, 1e-18):
        fitted = MahalanobisSurprise(share).fit((rows, y))
        torch.testing.assert_close(fitted(rows, y), MahalanobisSurprise(0).fit((rows, y))(rows, y))
        assert 'vary in 4 of 20 directions' in fitted.notes[0]


def test_what_was_learned_in_inference_mode_goes_on_outside():
    rows, y = toy(60)
    for adequacy in ALL:
        with torch.inference_mode():
            train = filled(adequacy.learner(), rows, y)
            fitted = adequacy.fit(train)
        scores = fitted(rows + 0.1, y)
        torch.testing.assert_close(scores, adequacy.fit((rows, y))(rows + 0.1, y))
        filled(train, rows, y, ids=torch.arange(60, 120))
        assert int(train.compute()['count'].sum() if 'count' in train.state else len(train.state['ids'])) == 120


def test_a_draw_without_ids_is_even_too():
    drawn = torch.zeros(40)
    for seed in range(300):
        traces = Traces(limit=5, seed=seed, by=None)
        for part in torch.arange(40.0).split(5):
            traces.update({'fc': part[:, None]})
        assert len(set(traces.state['ids'].tolist())) == 5
        drawn[traces.state['rows'][:, 0].long()] += 1
    assert drawn.sum() == 1500 and 18 < drawn.min() and drawn.max() < 60  # 37.5 expected, with a standard deviation of 5.7
    traces.merge(filled(Traces(limit=5, by=None), torch.zeros(3, 1), torch.zeros(3).long(), ids=torch.arange(40, 43)))
    traces.update({'fc': torch.zeros(2, 1)})
    assert traces._samples == 45


def test_moments_from_one_stored_state_are_each_others_strangers():
    rows, y = toy(60)
    state = filled(Moments(), rows, y).state_dict()
    one, other = Moments(), Moments()
    one.load_state_dict(state)
    other.load_state_dict(state)
    filled(one, rows, y)
    assert other.state['count'].sum() == state['count'].sum() == 60 and one.state['count'].sum() == 120


def test_a_suite_against_itself_has_no_interval(world):
    model, train, suites = world
    table = surprise_adequacy(model, train, suites, 'distance', show_progress=False).table().set_index('suite')
    assert table.auroc['same'] == 0.5 and table.loc['same', ['low', 'high']].isna().all()
    assert table.loc['far', ['low', 'high']].notna().all()


def test_infinite_scores_are_not_called_undefined():
    row = surprise._suite_row(np.array([1.0, math.inf, math.nan, 3.0]), np.array([0.0, 2.0]), False)
    assert row['undefined'] == 1 and row['infinite'] == 1 and row['mean'] == 2 and row['n'] == 4
    assert row['auroc'] == pytest.approx((0.5 + 1 + 1) / 3)


def test_settings_of_scores_hold_no_addresses(world):
    result = surprise_adequacy(*world, 'distance', where=lambda name, module: isinstance(module, nn.Linear), show_progress=False)
    assert ' at 0x' not in json.dumps(result.settings)


def test_an_empty_suite_is_no_suite(world):
    model, train, _ = world
    with pytest.raises(ValueError, match='empty'):
        surprise_adequacy(model, train, (torch.zeros(0, 4), torch.zeros(0).long()), show_progress=False)


def test_states_of_a_coverage_go_on_elsewhere(world):
    model, train, suites = world
    criteria = ['LSC', 'DSC', 'MDSC']
    one = Coverage(model, criteria, show_progress=False).learn(train).update(suites['same'])
    other = Coverage(model, criteria, show_progress=False)
    other.load_state_dict(one.state_dict())
    for coverage in (one, other):
        coverage.update(suites['far'])
    assert one.compute() == other.compute() and one.criteria['DSC'].outside() == other.criteria['DSC'].outside()
