"""Growth, orders and differences of test suites against literal forms, and small cases counted by hand."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from robustnb.coverage import CC, KMNC, NBC, NC, NLC, Activations, Coverage, Criterion, UnitCriterion, assess
from robustnb.data import DataSet
from robustnb.devices import seeded
from robustnb.guard import Logits
from robustnb.idc import IDC
from robustnb.results import Result
from robustnb.suites import (
    UNCERTAINTIES,
    _FirstPlaces,
    _found_at_random,
    _outlook,
    apfd,
    apfd_at_random,
    coverage_additional,
    coverage_total,
    covered_by,
    growth,
    new_items,
    prioritize,
    suite_difference,
)

CODES = ['NC', 'KMNC', 'NBC', 'SNAC', 'TKNC', 'TKNP', 'CC', 'NLC', 'LSC', 'DSC', 'MDSC']
OPEN = ['TKNP', 'CC', 'NLC']
QUIET = {'show_progress': False}


def network(seed=0):
    with seeded(seed):
        return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval()


def points(n, seed=0, wide=1.0):
    rng = np.random.default_rng(seed)
    x = torch.tensor(rng.normal(size=(n, 4)) * wide, dtype=torch.float32)
    return x, torch.tensor(rng.integers(3, size=n))


MODEL, TRAIN, TEST = network(), points(80), points(47, 1, 1.5)
CRITERIA = {code: code for code in CODES} | {'KMNC': KMNC(k=20), 'CC': CC(threshold=2.0)}


@pytest.fixture(scope='module')
def grown():
    return growth(MODEL, TRAIN, TEST, CRITERIA, sizes=[5, 20, 40], orders=4, **QUIET)


# ------------------------------------------------------------------------------------------------------------- growth
def test_growth_ends_at_the_value_of_assess(grown):
    whole = assess(MODEL, TRAIN, TEST, CRITERIA, **QUIET).dataset['value'].values[0]
    values = grown.dataset['value']
    assert values['size'].values.tolist() == [0, 5, 20, 40, 47] and values.sizes['order'] == 4
    ends = values.isel(size=-1).drop_sel(criterion='CC')  # the order matters to CC
    np.testing.assert_allclose(ends, np.repeat(np.delete(whole, CODES.index('CC'))[:, None], 4, 1), rtol=1e-6)
    assert (values.isel(size=0) == 0).all()


def test_growth_never_falls_where_sets_grow(grown):
    assert (grown.dataset['value'].drop_sel(criterion='NLC').diff('size') >= 0).all()


def test_growth_at_every_size_and_order_is_the_value_of_these_samples():
    sizes, codes = [1, 7, 30], ['NC', 'KMNC', 'TKNP', 'CC', 'NLC', 'DSC']
    criteria = {code: CRITERIA[code] for code in codes}
    values = growth(MODEL, TRAIN, TEST, criteria, sizes=sizes, orders=2, seed=3, **QUIET).dataset['value']
    from robustnb.devices import _sample_bits

    orders = _sample_bits((2,), torch.arange(47), 3, 0).argsort(dim=0).T
    coverage = Coverage(MODEL, criteria, **QUIET).learn(TRAIN)
    for number, order in enumerate(orders):
        for size in sizes:
            coverage.reset()
            some = order[:size]
            expected = coverage.update((TEST[0][some], TEST[1][some])).compute()
            found = values.sel(size=size).isel(order=number).values
            np.testing.assert_allclose(found, [*expected.values()], rtol=1e-5, atol=1e-7)


def test_growth_does_not_depend_on_the_batches(grown):
    loader = [(TEST[0][:9], TEST[1][:9]), (TEST[0][9:], TEST[1][9:])]
    for data, size in ((TEST, 7), (loader, 64), (iter(loader), 64)):
        other = growth(MODEL, TRAIN, data, CRITERIA, sizes=[5, 20, 40], orders=4, batch_size=size, **QUIET)
        np.testing.assert_allclose(other.dataset['value'], grown.dataset['value'], rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(other.dataset['next'], grown.dataset['next'], rtol=1e-6)


def test_growth_repeats_with_a_seed_and_differs_without():
    found = [
        growth(MODEL, TRAIN, TEST, KMNC(k=20), sizes=[9], orders=3, seed=seed, **QUIET).dataset['value'].values
        for seed in (1, 1, 2)
    ]
    assert (found[0] == found[1]).all() and (found[0] != found[2]).any()
    assert np.ptp(found[0][0, :, 1]) > 0  # the orders differ from each other
    more = growth(MODEL, TRAIN, TEST, KMNC(k=20), sizes=[9, 10, 11], orders=3, seed=1, **QUIET).dataset['value']
    assert (more.sel(size=9) == found[0][:, :, 1]).all()


def test_the_mean_over_many_orders_is_the_one_in_closed_form():
    result = growth(MODEL, TRAIN, TEST, KMNC(k=20), sizes=[3, 12, 30], orders=400, **QUIET)
    coverage = Coverage(MODEL, KMNC(k=20), **QUIET).learn(TRAIN)
    items = torch.cat([coverage.criteria['KMNC'].items(a) for a in coverage.walk(TEST)])
    counts = torch.bincount(items[items >= 0])
    for size in (3, 12, 30, 47):
        mean = float(result.dataset['value'].sel(size=size).mean())
        assert covered_by(counts, 47, size) / (14 * 20) == pytest.approx(mean, rel=0.01)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_covered_by_against_all_choices(data):
    n = data.draw(st.integers(1, 6))
    cover = np.array(data.draw(st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=1, max_size=5)))
    size = data.draw(st.integers(0, n))
    every = [cover[:, list(some)].any(1).sum() for some in itertools.combinations(range(n), size)]
    assert covered_by(cover.sum(1), n, size) == pytest.approx(np.mean(every), abs=1e-9)


@pytest.mark.parametrize('n', [10**5, 10**7])
@pytest.mark.parametrize(('c', 'size'), [(1, 1), (1, 1000), (3, 1), (40, 1000), (1, 99_999)])
def test_covered_by_is_exact_for_many_samples(n, c, size):
    missed = math.prod(Fraction(n - size - i, n - i) for i in range(c))
    assert covered_by([c], n, size) == pytest.approx(float(1 - missed), rel=1e-9)


def test_the_outlook_is_that_of_all_orders(grown):
    coverage = Coverage(MODEL, CRITERIA, **QUIET).learn(TRAIN)
    items = torch.cat([coverage.criteria['KMNC'].items(a) for a in coverage.walk(TEST)])
    counts = torch.bincount(items[items >= 0])
    found = growth(MODEL, TRAIN, TEST, {'KMNC': KMNC(k=20), 'NLC': 'NLC'}, sizes=[40], orders=2, ahead=7, **QUIET)
    outlook = found.outlook().set_index('criterion')
    last, coming = (outlook[name] for name in ('last 7 added', 'next 7 would add'))
    assert last['KMNC'] == pytest.approx((covered_by(counts, 47, 47) - covered_by(counts, 47, 40)) / 280)
    assert coming['KMNC'] == pytest.approx(new_items(counts, 47, 7) / 280)
    mean = found.dataset['value'].sel(criterion='NLC').mean('order').values
    assert last['NLC'] == pytest.approx(mean[-1] - mean[-2]) and np.isnan(coming['NLC'])
    rise = found.dataset['value'].sel(size=47) - found.dataset['value'].sel(size=40)
    assert (outlook.low == rise.min('order').values).all() and (outlook.high == rise.max('order').values).all()


def test_the_outlook_begins_where_it_is_asked_to():
    far = growth(MODEL, TRAIN, TEST, ['KMNC', 'NLC'], sizes=[20], orders=2, ahead=17, **QUIET)
    assert far.dataset['size'].values.tolist() == [0, 20, 30, 47] and (far.outlook().low <= far.outlook().high).all()
    with pytest.raises(ValueError, match='up to 47 more.*ahead=2000'):
        growth(MODEL, TRAIN, TEST, 'NC', ahead=2000, **QUIET)
    with pytest.raises(ValueError, match='up to 47 more'):  # of a stream the size is only known at its end
        growth(MODEL, TRAIN, (batch for batch in [TEST]), 'NC', ahead=48, **QUIET)


def test_no_more_than_all_is_foretold():
    once = Activations({'layer': torch.eye(4)})  # each of four samples has an item of its own, and there are no others
    part = _FirstPlaces(NC(0.5, None), 1)
    part.add(once, torch.arange(4)[:, None])
    assert _outlook(part, None, 4, 4)[1] == 0


def test_new_items_foretells_on_average():
    rng = np.random.default_rng(0)
    chance = rng.uniform(0, 0.05, 400)
    foretold, came = [], []
    for _ in range(200):
        first, second = (rng.random((100, 400)) < chance for _ in range(2))
        foretold.append(new_items(first.sum(0), 100, 50))
        came.append((second[:50].any(0) & ~first.any(0)).sum())
    assert np.mean(foretold) == pytest.approx(np.mean(came), rel=0.03)
    assert new_items(np.array([5, 0]), 0, 0) == 0


def test_outlook_and_table_and_figure(grown):
    outlook = grown.outlook()
    assert outlook.criterion.tolist() == CODES and outlook.columns[2] == 'last 47 added'
    assert outlook.set_index('criterion').iloc[:, -1].isna().to_dict() == {c: c in ('CC', 'NLC') for c in CODES}
    table = grown.table()
    assert (
        len(table) == len(CODES) * 5
        and (table.low <= table['mean'] + 1e-9).all()
        and (table['mean'] <= table.high + 1e-9).all()
    )
    assert all(ax.get_ylim()[0] == 0 for ax in grown.plot().axes)
    one = growth(MODEL, None, TEST, 'NC', sizes=[], orders=1, ahead=10, **QUIET)
    assert one.dataset['size'].values.tolist() == [0, 37, 47] and one.outlook().shape == (1, 6)
    one.plot()


class Signs(Criterion):
    "Somebody's own: how many different patterns of signs, without items."

    code = 'signs'

    def update(self, activations):
        self.add({'seen': (self.look(activations).values > 0).any(0)})

    def combine(self, ours, theirs):
        return {'seen': ours['seen'] | theirs['seen']}

    def compute(self):
        return float(self.state['seen'].float().mean()) if self.state else 0.0


class Corner(UnitCriterion):
    "Somebody's own, with items."

    code = 'corner'

    def mask(self, activations):
        return activations.values > 1


def test_own_criteria_grow():
    found = growth(MODEL, None, TEST, [Signs(), Corner()], sizes=[10], orders=2, **QUIET).dataset['value'].isel(size=-1)
    whole = assess(MODEL, TRAIN, TEST, [Signs(), Corner()], **QUIET).dataset['value'].values[0]
    np.testing.assert_allclose(found, np.repeat(whole[:, None], 2, 1))


@pytest.mark.parametrize('convention', ['minimum', 'width', 'overflow'])
def test_conventions_of_surprise_grow(convention):
    from robustnb.surprise import DSC

    criterion = DSC(n=20, convention=convention, width=0.1 if convention == 'width' else None)
    found = growth(MODEL, TRAIN, TEST, criterion, sizes=[10], orders=2, **QUIET).dataset['value'].isel(size=-1)
    assert found.values.tolist() == [[assess(MODEL, TRAIN, TEST, criterion, **QUIET).dataset['value'].item()] * 2]


# ----------------------------------------------------------------------------------------------------------- priorities
def literal_order(items):
    "CAM as it is told: look at all tests in every step."
    sets = [set(row) - {-1} for row in np.asarray(items).tolist()]
    left, seen, order, added = list(range(len(sets))), set(), [], [0] * len(sets)
    while left:
        best = max(left, key=lambda t: (len(sets[t] - seen), -t))
        if not sets[best] - seen:
            break
        added[best] = len(sets[best] - seen)
        seen |= sets[best]
        order.append(best)
        left.remove(best)
    return order + sorted(left, key=lambda t: (-len(sets[t]), t)), added


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 12), st.integers(1, 6), st.integers(1, 12), st.integers(0, 10**6))
def test_cam_is_the_literal_greedy(tests, width, total, seed):
    items = np.random.default_rng(seed).integers(-1, total, (tests, width))
    order, added = coverage_additional(items)
    expected, gains = literal_order(items)
    assert order.tolist() == expected and added.tolist() == gains
    assert coverage_total(items).tolist() == [len(set(row) - {-1}) for row in items.tolist()]


def test_cam_on_many_tests_is_the_literal_greedy():
    rng = np.random.default_rng(0)
    items = rng.binomial(40, 0.3, (300, 12)) + 41 * np.arange(12)
    assert coverage_additional(items)[0].tolist() == literal_order(items)[0]
    assert coverage_additional(torch.from_numpy(items))[1].tolist() == literal_order(items)[1]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 15), st.integers(0, 10**6))
def test_apfd_is_the_definition(n, seed):
    rng = np.random.default_rng(seed)
    order, faults = rng.permutation(n), rng.random(n) < 0.4
    faults[rng.integers(n)] = True
    places = [place for place, test in enumerate(order.tolist(), 1) if faults[test]]
    assert apfd(order, faults) == pytest.approx(1 - sum(places) / (n * len(places)) + 1 / (2 * n))
    assert apfd(order, np.eye(n, dtype=bool)[:, faults]) == pytest.approx(apfd(order, faults))
    assert apfd(order, faults) + apfd(order[::-1], faults) == pytest.approx(1)  # turned round
    best = apfd(np.argsort(~faults, kind='stable'), faults)
    assert best == pytest.approx(1 - faults.sum() / (2 * n)) and best >= apfd(order, faults) - 1e-12


def test_apfd_by_hand():
    assert apfd([2, 0, 1], [False, False, True]) == pytest.approx(1 - 1 / 3 + 1 / 6)
    assert apfd(torch.tensor([0, 1, 2]), torch.tensor([False, False, True])) == pytest.approx(1 - 1 + 1 / 6)
    shown = [[1, 0], [0, 1], [1, 1]]  # two faults; the third test shows both
    assert apfd([2, 0, 1], shown) == pytest.approx(1 - (1 + 1) / 6 + 1 / 6)
    assert apfd([0, 1, 2], shown) == pytest.approx(1 - (1 + 2) / 6 + 1 / 6)


def test_without_faults_apfd_is_undefined_and_says_so(caplog):
    assert math.isnan(apfd([1, 0], [0, 0])) and 'no fault among the 2' in caplog.text
    assert all(math.isnan(end) for end in apfd_at_random(5, 0))


def test_the_band_of_random_orders_against_draws():
    rng = np.random.default_rng(0)
    for n, m in ((60, 5), (60, 40)):
        faults = np.arange(n) < m
        drawn = np.array([apfd(rng.permutation(n), faults) for _ in range(4000)])
        middle, low, high = apfd_at_random(n, m)
        assert drawn.mean() == pytest.approx(middle, abs=0.01)
        assert ((drawn >= low) & (drawn <= high)).mean() == pytest.approx(0.95, abs=0.015)
    assert apfd_at_random(7, 7) == (0.5, 0.5, 0.5)


@pytest.fixture(scope='module')
def ordered():
    return prioritize(MODEL, TRAIN, TEST, criterion=KMNC(k=20), **QUIET)


def test_every_method_orders_every_test_once(ordered):
    assert ordered.methods == ['CTM', 'CAM', 'LSC', 'DSC', 'MDSC', 'gini', 'margin', 'entropy', 'random']
    for method in ordered.methods:
        assert sorted(ordered.order(method)) == list(range(47))
        if method != 'CAM':
            score = ordered.dataset['score'].sel(by=method).values[ordered.order(method)]
            assert (np.diff(np.nan_to_num(score, nan=np.inf, posinf=1e300)) <= 0).all()


def test_orders_come_from_items_scores_and_probabilities(ordered):
    coverage = Coverage(MODEL, {'KMNC': KMNC(k=20), 'DSC': 'DSC'}, **QUIET).learn(TRAIN)
    parts = [(coverage.criteria['KMNC'].items(a), coverage.criteria['DSC'].scores(a)) for a in coverage.walk(TEST)]
    items, scores = (torch.cat(column) for column in zip(*parts, strict=True))
    assert ordered.order('CAM').tolist() == literal_order(items)[0]
    assert ordered.order('CTM').tolist() == sorted(range(47), key=lambda t: (-(items[t] >= 0).sum().item(), t))
    np.testing.assert_allclose(ordered.dataset['score'].sel(by='DSC'), scores)
    with torch.no_grad():
        p = MODEL(TEST[0]).double().softmax(1)
    for name, unsure in UNCERTAINTIES.items():
        np.testing.assert_allclose(ordered.dataset['score'].sel(by=name), unsure(p), atol=1e-6)
    assert (ordered.faults() == (p.argmax(1) != TEST[1]).numpy()).all()


def test_orders_do_not_depend_on_the_batches(ordered):
    other = prioritize(MODEL, TRAIN, TEST, criterion=KMNC(k=20), batch_size=6, **QUIET)
    np.testing.assert_allclose(other.dataset['score'], ordered.dataset['score'], rtol=1e-4, atol=1e-6)
    for method in ('CTM', 'CAM', 'random'):
        assert (other.order(method) == ordered.order(method)).all()


def test_random_order_has_a_seed():
    found = [prioritize(MODEL, None, TEST, 'random', seed=seed, **QUIET).order().tolist() for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]


def test_own_scores_and_other_outputs(ordered):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x):
            return {'features': x, 'scores': self.net(x)}

    by = {'least likely': lambda p: 1 - p.amax(1), 'gini': 'gini', 'CAM': 'CAM'}
    with pytest.raises(TypeError, match='scores'):
        prioritize(MODEL, None, TEST, {'mine': Corner()}, **QUIET)
    for model, logits in ((Two(), 'scores'), (Logits(Two(), 'scores'), None)):
        found = prioritize(model, None, TEST, by, criterion='NC', logits=logits, **QUIET)
        assert (found.order('gini') == ordered.order('gini')).all() and found.methods == [*by]
        assert (found.faults() == ordered.faults()).all()


def test_names_of_methods_are_free():
    found = prioritize(MODEL, TRAIN, TEST, {'coverage': 'DSC', 'mine': 'CAM'}, **QUIET)
    both = prioritize(MODEL, TRAIN, TEST, ['DSC', 'CAM'], **QUIET)
    assert (found.order('coverage') == both.order('DSC')).all() and (found.order('mine') == both.order('CAM')).all()


def test_a_single_logit_stands_for_two_classes():
    model = nn.Sequential(nn.Linear(4, 1)).eval()
    found = prioritize(model, None, (TEST[0], (TEST[1] > 0).long()), 'margin', **QUIET)
    with torch.no_grad():
        p = model(TEST[0]).flatten().double().sigmoid()
    np.testing.assert_allclose(found.dataset['score'][0], 1 - (2 * p - 1).abs(), atol=1e-6)
    assert (found.faults() == ((p > 0.5).long() != (TEST[1] > 0)).numpy()).all()


def test_undefined_scores_come_first():
    found = prioritize(
        MODEL, None, TEST, {'odd': lambda p: torch.where(torch.arange(len(p)) == 5, torch.nan, p[:, 0])}, **QUIET
    )
    assert found.order()[0] == 5


def test_compare_and_plot(ordered):
    table = ordered.compare().set_index('method')
    for method in ordered.methods:
        row = table.loc['random, one draw' if method == 'random' else method]
        assert row.apfd == pytest.approx(apfd(ordered.order(method), ordered.faults()))
        assert row['in first 10'] == ordered.faults()[ordered.order(method)[:10]].sum()
    assert 'random' not in table.index and table.apfd['random, mean'] == 0.5 and 'in first 50' not in table
    assert table.index[0] == 'best possible' and (table.apfd <= table.apfd['best possible']).all()
    mine = np.arange(47) == ordered.order('gini')[0]
    assert ordered.compare(mine).set_index('method').half_found['gini'] == 1
    axes = ordered.plot().axes[0]
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    value = table.apfd.to_dict() | {'random': 0.5}
    assert len(axes.lines) == 9 and [value[name] for name in legend] == sorted((value[n] for n in legend), reverse=True)
    rows = ordered.table()
    assert len(rows) == 9 * 47 and rows[rows.method == 'CAM'].fault.sum() == ordered.faults().sum()
    with pytest.raises(ValueError, match='no fault'):
        ordered.plot(np.zeros(47))


@pytest.mark.parametrize('labels, words', [(torch.rand(47), 'floating-point'), (torch.eye(47).long(), 'no class index')])
def test_labels_that_are_no_classes_leave_faults_unknown(labels, words):
    found = prioritize(MODEL, None, (TEST[0], labels), 'gini', **QUIET)
    with pytest.raises(ValueError, match=f'which tests fail is not known: .*{words}'):
        found.compare()
    assert 'fault' not in found.table()


@pytest.mark.parametrize(
    'data', [TEST[0], TEST[0].numpy(), (TEST[0], None), (TEST[0], torch.where(torch.arange(47) == 40, -1, TEST[1]))]
)
def test_tests_without_labels_are_ordered_and_faults_are_asked_for(data, ordered):
    found = prioritize(MODEL, TRAIN, data, criterion=KMNC(k=20), batch_size=20, **QUIET)
    assert (found.dataset['order'] == ordered.dataset['order']).all() and 'fault' not in found.table()
    for ask in (found.faults, found.compare, found.plot):
        with pytest.raises(ValueError, match='without a label.*Give faults='):
            ask()
    assert found.compare(ordered.faults()).equals(ordered.compare())


def test_other_calls_take_suites_without_labels():
    bare = growth(MODEL, TRAIN, TEST[0], 'KMNC', orders=1, **QUIET)
    assert bare.dataset.identical(growth(MODEL, TRAIN, TEST, 'KMNC', orders=1, **QUIET).dataset)
    both = suite_difference(MODEL, TRAIN, {'a': TEST[0], 'b': (TEST[0], None)}, 'KMNC', **QUIET)
    assert both.table()[['only a', 'only b']].to_numpy().sum() == 0


def test_orders_by_position_and_by_id():
    data = DataSet(*TEST, ids=torch.arange(47).flip(0) + 800)
    found = prioritize(MODEL, None, data, 'gini', batch_size=10, **QUIET)
    assert (found.order(ids=True) == data.ids[found.order()].numpy()).all() and sorted(found.order()) == [*range(47)]
    table = found.table()
    assert (table['sample'] == found.order()).all() and (table['id'] == found.order(ids=True)).all()
    plain = prioritize(MODEL, None, TEST, 'gini', **QUIET)
    assert (plain.order(ids=True) == plain.order()).all()


@pytest.mark.parametrize('how', ['shuffle', 'sampler', 'batches'])
def test_a_loader_that_shuffles_is_named(how, caplog):
    data = torch.utils.data.TensorDataset(*TEST)
    mixed = torch.utils.data.RandomSampler(data)
    loader = {
        'shuffle': lambda: torch.utils.data.DataLoader(data, 16, shuffle=True),
        'sampler': lambda: torch.utils.data.DataLoader(data, 16, sampler=mixed),
        'batches': lambda: torch.utils.data.DataLoader(
            data, batch_sampler=torch.utils.data.BatchSampler(mixed, 16, False)
        ),
    }[how]()
    prioritize(MODEL, None, loader, ['gini', 'margin'], **QUIET)
    assert len(caplog.records) == 1 and 'shuffles' in caplog.text
    caplog.clear()
    prioritize(MODEL, None, torch.utils.data.DataLoader(data, 16), 'gini', **QUIET)
    assert not caplog.records


def test_an_order_by_ties_is_told(caplog):
    prioritize(MODEL, TRAIN, TEST, ['CTM', 'CAM'], criterion='TKNC', **QUIET)
    assert len(caplog.records) == 1 and '47 of 47 tests cover equally many items under TKNC' in caplog.text
    caplog.clear()
    prioritize(MODEL, TRAIN, TEST, 'CAM', criterion='TKNC', **QUIET)
    assert not caplog.records


def test_faults_among_the_first_by_luck_against_draws():
    rng, faults = np.random.default_rng(0), np.arange(200) < 30
    drawn = np.array([rng.permutation(faults)[:50].sum() for _ in range(4000)])
    mean, low, high = _found_at_random(200, 30, 50)
    assert drawn.mean() == pytest.approx(mean, rel=0.02)
    assert np.mean((drawn >= low) & (drawn <= high)) == pytest.approx(0.95, abs=0.025)
    half = [np.flatnonzero(rng.permutation(faults))[14] + 1 for _ in range(4000)]
    found = prioritize(MODEL, None, torch.zeros(200, 4), 'random', **QUIET).compare(faults, first=(50, 300))
    table = found.set_index('method')
    assert table.half_found['random, mean'] == pytest.approx(np.mean(half), rel=0.02)
    assert table.loc[['random, mean', 'best possible'], 'in first 50'].tolist() == [7.5, 30.0]
    assert _found_at_random(10, 8, 5)[1] >= 3 and 'in first 300' not in table
    with pytest.raises(ValueError, match='first is a whole number'):
        prioritize(MODEL, None, TEST, 'random', **QUIET).compare(first=[0.5])


# ----------------------------------------------------------------------------------------------------------- difference
def test_differences_add_up():
    a, b = TEST, points(20, 5)
    found = suite_difference(MODEL, TRAIN, {'a': a, 'b': b}, CRITERIA, **QUIET)
    table = found.table(layers=False).set_index('criterion')
    assert [*table.index] == [code for code in CODES if code not in ('CC', 'NLC')]
    known = assess(MODEL, TRAIN, {'a': a, 'b': b}, CRITERIA, **QUIET).table().set_index(['suite', 'criterion'])
    for code in table.index:
        for name in 'ab':
            assert table.loc[code, [f'only {name}', 'both']].sum() == known.covered[name, code]
        if code not in OPEN:
            assert table.loc[code].sum() == known.total['a', code]
    assert np.isnan(table.neither['TKNP'])
    values = found.at_equal_size().set_index('criterion')
    for name in 'ab':
        np.testing.assert_allclose(values[name], known.value[name][values.index])
    np.testing.assert_allclose(values['b, 20 samples'], values.b)
    assert (values['a, 20 samples'] <= values.a + 1e-12).all()


def test_differences_by_layer_are_those_of_the_criteria():
    a, b = TEST, points(20, 5)
    found = suite_difference(MODEL, TRAIN, {'a': a, 'b': b}, NBC(), batch_size=11, **QUIET)
    coverage, covered = Coverage(MODEL, NBC(), **QUIET).learn(TRAIN), {}
    for name, data in (('a', a), ('b', b)):
        coverage.reset()
        covered[name] = coverage.update(data).criteria['NBC'].covered()
    for _, row in found.table().iterrows():
        one, two = covered['a'][row.layer], covered['b'][row.layer]
        expected = [(one & ~two).sum(), (one & two).sum(), (two & ~one).sum(), (~one & ~two).sum()]
        assert row.iloc[2:].tolist() == [int(number) for number in expected]
    assert len(found.plot('NBC').axes) == len(found.plot().axes) == 1


def test_the_fair_value_is_the_mean_over_smaller_suites():
    large, small = points(8, 2), points(5, 3)
    found = suite_difference(MODEL, TRAIN, {'large': large, 'small': small}, KMNC(k=5), **QUIET).at_equal_size()
    coverage, values = Coverage(MODEL, KMNC(k=5), **QUIET).learn(TRAIN), []
    for some in itertools.combinations(range(8), 5):
        coverage.reset()
        values.append(coverage.update((large[0][list(some)], large[1][list(some)])).compute()['KMNC'])
    assert found['large, 5 samples'][0] == pytest.approx(np.mean(values))
    equal = suite_difference(MODEL, TRAIN, {'a': large, 'b': points(8, 4)}, 'KMNC', **QUIET).at_equal_size()
    assert equal.columns.tolist() == ['criterion', 'a', 'b']  # there is nothing to cut


# ---------------------------------------------------------------------------------------------------------- all of them
CALLS = {
    'growth': lambda model, data: growth(model, TRAIN, data, ['KMNC', 'NLC'], orders=1, **QUIET),
    'prioritize': lambda model, data: prioritize(model, TRAIN, data, ['CAM', 'gini'], **QUIET),
    'suite_difference': lambda model, data: suite_difference(model, TRAIN, {'a': data, 'b': TEST}, 'KMNC', **QUIET),
}


@pytest.mark.parametrize('name', CALLS)
def test_the_model_comes_back_as_it_was(name):
    model = network().train()
    model[1].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    CALLS[name](model, TEST)
    with pytest.raises(ValueError, match='NaN or infinity'):
        CALLS[name](model, (TEST[0] * torch.nan, TEST[1]))
    assert [module.training for module in model] == [True, False, True, True, True]
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert all((model.state_dict()[key] == value).all() for key, value in before.items())


@pytest.mark.parametrize('name', CALLS)
def test_an_empty_suite_is_refused(name):
    with pytest.raises(ValueError, match='empty|no samples'):
        CALLS[name](MODEL, (TEST[0][:0], TEST[1][:0]))


@pytest.mark.parametrize('name', CALLS)
def test_results_can_be_saved(name, tmp_path):
    result = CALLS[name](MODEL, TEST)
    result.save(tmp_path / 'result.safetensors')
    again = Result.load(tmp_path / 'result.safetensors')
    assert type(again).__name__ == type(result).__name__ and again.dataset.identical(result.dataset)
    assert again.table().equals(result.table())
    again.plot()
    assert again._repr_html_()


def test_settings_hold_no_addresses():
    found = growth(MODEL, None, TEST, 'NC', where=lambda name, module: isinstance(module, nn.Linear), orders=1, **QUIET)
    assert ' at 0x' not in repr(found.settings)


@pytest.mark.parametrize('orders', [0, 1.5, True])
def test_growth_refuses_other_numbers_of_orders(orders):
    with pytest.raises(ValueError, match='orders is a whole number from 1'):
        growth(MODEL, TRAIN, TEST, 'NC', orders=orders, **QUIET)


@pytest.mark.parametrize('sizes', [[-1], [48], [1.5], 7])
def test_growth_refuses_sizes_that_are_none(sizes):
    with pytest.raises(ValueError, match='from 0 to the 47'):
        growth(MODEL, TRAIN, TEST, 'NC', sizes=sizes, **QUIET)


@pytest.mark.parametrize(
    'call, error, words',
    [
        (lambda: growth(MODEL, None, TEST, 'KMNC', **QUIET), ValueError, 'train is None, but KMNC compare.*TKNP'),
        (lambda: prioritize(MODEL, None, TEST, 'DSC', **QUIET), ValueError, "train is None, but DSC.*'margin'"),
        (lambda: prioritize(MODEL, None, TEST, **QUIET), ValueError, r'LSC, DSC, MDSC, KMNC \(counted by CTM and CAM\)'),
        (
            lambda: suite_difference(MODEL, None, {'a': TEST, 'b': TEST}, 'KMNC', **QUIET),
            ValueError,
            'train is None, but KMNC',
        ),
        (lambda: prioritize(MODEL, TRAIN, TEST, 'LSA', **QUIET), ValueError, "no method 'LSA'"),
        (
            lambda: prioritize(MODEL, TRAIN, TEST, 'CAM', criterion=NLC(), **QUIET),
            ValueError,
            'covers nothing by itself',
        ),
        (lambda: prioritize(MODEL, TRAIN, TEST, [], **QUIET), ValueError, 'no method'),
        (lambda: prioritize(MODEL, None, TEST, [lambda p: p[:, 0]], **QUIET), ValueError, 'give a dictionary'),
        (lambda: prioritize(MODEL, None, TEST, lambda p: p[:, 0], **QUIET), ValueError, 'give a dictionary'),
        (lambda: prioritize(MODEL, None, TEST, {'mine': lambda p: p}, **QUIET), ValueError, 'one score for each'),
        (lambda: apfd([0, 1], [math.nan, 1]), ValueError, 'NaN'),
        (lambda: suite_difference(MODEL, TRAIN, {'a': TEST}, **QUIET), ValueError, 'two'),
        (
            lambda: suite_difference(MODEL, TRAIN, {'a': TEST, 'b': TEST}, 'NLC', **QUIET),
            ValueError,
            'nothing by itself',
        ),
        (lambda: covered_by([1], 3, 4), ValueError, 'holds none of 4'),
        (lambda: new_items([1], 3, 4), ValueError, 'up to 3'),
        (lambda: coverage_additional([0.5]), ValueError, 'whole numbers'),
        (lambda: apfd([0, 2], [True, False]), ValueError, 'once'),
        (lambda: apfd([0, 1], [[True, False], [True, False]]), ValueError, r'no test shows the faults \[1\]'),
        (lambda: apfd_at_random(3, 4), ValueError, '4 of 3'),
    ],
)
def test_errors_say_what_to_do(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_orders_are_asked_for_by_name(ordered):
    with pytest.raises(ValueError, match='several'):
        ordered.order()
    with pytest.raises(KeyError, match='no order by'):
        ordered.order('APFD')
    with pytest.raises(ValueError, match='each of 47 tests'):
        ordered.compare([True])


def test_activations_of_suites_may_not_change_their_layers():
    from robustnb.suites import _Items

    items = _Items(Corner())
    items(Activations({'a': torch.zeros(2, 3)}))
    with pytest.raises(ValueError, match='follows the layers'):
        items(Activations({'a': torch.zeros(2, 4)}))


def test_importance_driven_coverage_divides_what_two_suites_make():
    with seeded(0):
        net, x = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2)).eval(), torch.rand(90, 3)
    train, a, b = ((part, torch.zeros(30, dtype=torch.long)) for part in x.split(30))
    criterion = IDC(k=2, units={'0': [0, 2, 3, 5]})
    found = suite_difference(net, train, {'a': a, 'b': b}, [criterion, 'TKNC'], show_progress=False).table()
    one, both, two, neither = found.set_index('criterion').loc['IDC', ['only a', 'both', 'only b', 'neither']]
    made = {}
    for name, suite in (('a', a), ('b', b)):
        done = Coverage(net, criterion, show_progress=False).learn(train).update(suite).criteria['IDC']
        made[name] = {tuple(row) for row in done.covered()['0' if '0' in done.covered() else 'all layers'].tolist()}
    assert [one, both, two] == [len(made['a'] - made['b']), len(made['a'] & made['b']), len(made['b'] - made['a'])]
    assert one + both + two + neither == 16 and both > 0 < one
    curve = growth(net, train, a, [criterion], orders=3, show_progress=False).dataset['value']
    assert float(curve[0, 0, -1]) == pytest.approx(len(made['a']) / 16)
