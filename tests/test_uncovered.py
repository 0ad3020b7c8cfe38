"""The explorer of coverage: its counts are those of `assess`, its states, its bundle, and what it refuses. No browser."""

import numpy as np
import pytest
import torch
from test_widgets import part
from torch import nn

from robustnb.coverage import KMNC, NBC, NC, SNAC, TKNC, Coverage, UnitCriterion, assess
from robustnb.data import DataSet
from robustnb.devices import seeded
from robustnb.plots import png
from robustnb.uncovered import explore, nearest


@pytest.fixture(scope='module')
def net():
    with seeded(0):
        return nn.Sequential(
            nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Conv2d(6, 8, 3), nn.ReLU(),
            nn.Flatten(), nn.Linear(128, 20), nn.Dropout(), nn.Linear(20, 4),
        )  # fmt: skip


@pytest.fixture(scope='module')
def splits():
    generator = torch.Generator().manual_seed(1)
    x, y = torch.rand(130, 1, 8, 8, generator=generator), torch.randint(0, 4, (130,), generator=generator)
    x[90:] = (1.3 * x[90:]).clamp(0, 1)
    return DataSet(x[:90], y[:90], tuple('abcd')), DataSet(x[90:], y[90:], tuple('abcd'), ids=torch.arange(90, 130))


@pytest.fixture(scope='module')
def explorer(net, splits):
    return explore(net, *splits, show_progress=False)


def view(explorer, **state):
    "What the explorer shows, before it is drawn."
    from robustnb.uncovered import _view_at

    bundle = explorer.draw.__closure__[0].cell_contents
    return _view_at(bundle, **(explorer.state | state))


def counted(explorer, **state) -> tuple[int, int]:
    shown = view(explorer, **state)
    return int((shown.counts > 0).sum()), shown.counts.size


# ---------------------------------------------------------------------------------------------------------- the counts


@pytest.mark.parametrize(
    'criterion, state',
    [
        *((NC(t), {'criterion': 'NC', 'threshold': t}) for t in (0.0, 0.5, 0.9)),
        *((KMNC(k), {'criterion': 'KMNC', 'k': k}) for k in (1, 10, 100)),
        *((NBC(s), {'criterion': 'NBC', 'sigma': s}) for s in (0.0, 0.5)),
        *((SNAC(s), {'criterion': 'SNAC', 'sigma': s}) for s in (0.0, 0.5)),
        *((TKNC(k), {'criterion': 'TKNC', 'k': k}) for k in (1, 3, 100)),
    ],
    ids=str,
)
def test_counts_are_those_of_assess(net, splits, explorer, criterion, state):
    train, data = splits
    suites = {n: data[:n] for n in (1, 7, 40)}
    table = assess(net, train, suites, criterion, show_progress=False).table()
    for n, row in zip(suites, table.itertuples(), strict=True):
        assert counted(explorer, tests=n, **state) == (row.covered, row.total)
        assert view(explorer, **state).growth[n] == pytest.approx(row.value)


@pytest.mark.parametrize('code', ['NC', 'NBC', 'TKNC', 'KMNC'])
def test_each_layer_is_that_of_the_criterion(net, splits, explorer, code):
    train, data = splits
    ours = {'KMNC': KMNC(10)}.get(code, code)
    coverage = Coverage(net, {code: ours}, show_progress=False).learn(train).update(data)
    for layer, hit in coverage.criteria[code].covered().items():
        shown = view(explorer, criterion=code, layer=layer)
        np.testing.assert_array_equal(shown.counts > 0, hit)
        assert list(shown.layers) == [layer] and shown.growth[-1] == pytest.approx(float(hit.float().mean()))
        assert len(shown.backdrop) == 41


def test_how_many_tests_reach_a_unit_is_counted_one_by_one(net, splits, explorer):
    train, data = splits
    coverage = Coverage(net, 'NBC', show_progress=False).learn(train)
    total, first = 0, None
    for i in range(12):
        coverage.reset()
        hit = coverage.update(data[i : i + 1]).criteria['NBC'].state['hit'].view(-1, 2).numpy()
        first = np.full(hit.shape, 40) if first is None else first
        first[hit & (first == 40)] = i
        total = total + hit
    shown = view(explorer, criterion='NBC', tests=12)
    np.testing.assert_array_equal(shown.counts, total)
    np.testing.assert_array_equal(np.where(shown.first < 12, shown.first, 40), first)


def test_the_rarest_come_first_and_each_test_once(explorer):
    from robustnb.uncovered import _rarest

    shown = view(explorer, criterion='NBC')
    rare, names = _rarest(shown, 6), shown.units
    assert [r.count for r in rare] == sorted(r.count for r in rare) and rare[0].count == shown.counts[
        shown.counts > 0
    ].min()
    assert len({r.test for r in rare}) == len(rare) > 1
    for r in rare:
        unit, which = names.index(r.unit), ['lower end', 'upper end'].index(r.which)
        assert shown.first[unit, which] == r.test and shown.counts[unit, which] == r.count
        assert ((shown.first == r.test) & (shown.counts == r.count)).sum() == r.more + 1


def test_before_anything_is_reached(net, splits):
    train, _ = splits
    none = explore(net, train, train, 'SNAC', show_progress=False)  # no training sample leaves the ranges
    assert none.describe(**none.state) == 'After 90 of 90 tests: 0 of 38 units in all layers (0.0%).'
    assert png(none.static())


# ---------------------------------------------------------------------------------------------------------- the nearest


@pytest.mark.parametrize('code', ['NC', 'NBC', 'SNAC'])
def test_the_nearest_test_by_loops(net, splits, explorer, code):
    "Every uncovered thing with the test that lacks least, in all layers and in one."
    train, data = splits
    sigma, threshold, tests = 0.5, 0.8, 25
    coverage = Coverage(net, {'NBC': NBC(sigma)}, show_progress=False).learn(train)
    facts = coverage.criteria['NBC'].train.compute()
    (found,) = coverage.walk(data)
    expected, start = {}, 0
    for layer, rows in found.layers.items():
        for unit in range(rows.shape[1]):
            low, high, std = (float(facts[name][start + unit]) for name in ('low', 'high', 'std'))
            low, high = low - sigma * std, high + sigma * std
            ways = {'': []} if code != 'NBC' else {'lower end': [], 'upper end': []}
            for row in rows[:tests]:
                least, most, value = float(row.min()), float(row.max()), float(row[unit])
                if code == 'NC':
                    ways[''].append(threshold - (value - least) / (most - least))
                    continue
                ways['upper end' if code == 'NBC' else ''].append((high - value) / (high - low))
                if code == 'NBC':
                    ways['lower end'].append((value - low) / (high - low))
            for which, lacks in ways.items():
                if min(lacks) >= 0:
                    expected[f'{layer}.{unit}', which] = 90 + int(np.argmin(lacks)), min(lacks)
        start += rows.shape[1]
    state = {'criterion': code, 'sigma': sigma, 'threshold': threshold, 'tests': tests}
    table = nearest(explorer, **state)
    assert {(row.unit, row.which): row.test for row in table.itertuples()} == {k: test for k, (test, _) in expected.items()}
    np.testing.assert_allclose(table.lacks, sorted(way for _, way in expected.values()), atol=1e-5)
    covered, total = counted(explorer, **state)
    assert len(table) == total - covered > 0
    one = nearest(explorer, layer='6', **state)
    several = table[table.unit.str.startswith('6.')].reset_index(drop=True)
    assert one.equals(several) and one.test.min() >= 90


def test_the_nearest_where_there_is_none(net, splits, explorer):
    for code in ('KMNC', 'TKNC'):
        with pytest.raises(ValueError, match='choose among NC, NBC, SNAC'):
            nearest(explorer, criterion=code)
    raw = explore(net, *splits, NC(-1e9, scale=None), show_progress=False)
    assert len(nearest(raw)) == 0 and list(nearest(raw).columns) == ['unit', 'which', 'test', 'lacks']
    high = explore(net, *splits, NC(100.0, scale=None), show_progress=False)
    assert len(nearest(high)) == 38 and nearest(high).lacks.min() > 90


def test_describe_needs_no_arguments(net, splits, explorer):
    assert explorer.describe() == explorer.describe(**explorer.state)
    assert explorer.describe(criterion='NBC', tests=7).startswith('After 7 of 40 tests: ')
    with pytest.raises(ValueError, match='tests can be one of'):
        explorer.describe(tests=41)


# ---------------------------------------------------------------------------------------------------------- the states


def test_states(explorer):
    start = explorer.state
    assert start == {'criterion': 'NC', 'layer': 'all', 'threshold': 0.5, 'k': 10, 'sigma': 0.0, 'tests': 40}
    explorer.update(criterion='KMNC', k=5, layer='3', tests=7)
    assert explorer.state == start | {'criterion': 'KMNC', 'k': 5, 'layer': '3', 'tests': 7}
    assert explorer.describe(**explorer.state).startswith('After 7 of 40 tests: ')
    for wrong in ({'criterion': 'NLC'}, {'layer': '2'}, {'threshold': 0.55}, {'k': 4}, {'tests': 41}, {'classes': 3}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            explorer.update(**wrong)
    assert explorer.state['tests'] == 7
    explorer.update(**start)


@pytest.mark.parametrize(
    'code, own', [('NC', 'threshold'), ('KMNC', 'k'), ('TKNC', 'k'), ('NBC', 'sigma'), ('SNAC', 'sigma')]
)
def test_a_slider_moves_only_those_who_listen(explorer, code, own):
    other_values = {'threshold': 0.9, 'k': 1, 'sigma': 2.0}
    before = counted(explorer, criterion=code)
    for name, value in other_values.items():
        assert (counted(explorer, criterion=code, **{name: value}) == before) == (name != own)
    assert code in explorer.controls[own].label


def test_only_sliders_that_somebody_needs(net, splits):
    few = explore(net, *splits, criteria=['TKNC', NC(0.3, scale=None)], ks=[2, 4], show_progress=False)
    assert list(few.controls) == ['criterion', 'layer', 'k', 'tests'] and few.state['k'] == 4
    by_hand = 'NC(threshold=0.3, scale=None)'
    assert few.controls['criterion'].choices == ['TKNC', by_hand]
    table = assess(net, *splits, NC(0.3, scale=None), show_progress=False).table()
    assert counted(few, criterion=by_hand) == (table.covered[0], table.total[0])


def test_the_widget_follows_the_state_and_a_hand(net, splits):
    live = explore(net, *splits, criteria=['NC', 'NBC'], show_progress=False)
    before = (live.widget and part(live, 'rnb-picture')).value
    live.update(tests=3)
    assert part(live, 'rnb-picture').value != before and 'After 3 of 40' in part(live, 'rnb-words').value
    part(live, 'rnb-criterion').value = 1
    assert live.state['criterion'] == 'NBC' and 'ends of ranges' in part(live, 'rnb-words').value
    part(live, 'rnb-sigma').value = 4
    assert live.state['sigma'] == 2.0 and part(live, 'rnb-picture').layout.visibility == 'visible'


def test_pictures_have_one_size(explorer):
    states = (
        {},
        {'criterion': 'KMNC', 'k': 100},
        {'criterion': 'NBC', 'layer': '8', 'tests': 1},
        {'criterion': 'TKNC', 'k': 1},
    )
    assert {tuple(explorer.static(**state).get_size_inches() * 80) for state in states} == {(600, 566)}


# ---------------------------------------------------------------------------------------------------------- the bundle


def test_bundle_holds_activations_images_and_ranges(explorer):
    units = 6 + 8 + 20 + 4
    assert explorer.bundle_bytes == 40 * units * 4 + 40 * 64 * 2 + 8 + units * (4 + 4 + 8 + 8)


def test_too_large_a_bundle_is_refused_before_the_training_data_are_read(splits):
    def never():
        raise AssertionError('the training data were read')
        yield

    with seeded(0):
        wide = nn.Sequential(nn.Flatten(), nn.Linear(64, 60_000))
    many = splits[1].x.repeat(3, 1, 1, 1), splits[1].y.repeat(3)
    with pytest.raises(ValueError, match=r'120 tests of 60000 units take 29 MB.*samples=83'):
        explore(wide, never(), many, show_progress=False)
    with seeded(0):
        short = nn.Sequential(nn.Flatten(), nn.Linear(64, 600))
    assert (
        explore(short, None, many, ['NC', 'TKNC'], show_progress=False).bundle_bytes < 1e6
    )  # these need no training data


def test_the_model_is_untouched(net, splits):
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net.train()
    net[1].eval()
    explore(net, *splits, show_progress=False)
    assert net.training and not net[1].training and net[7].training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(m._forward_hooks for m in net.modules())
    net.eval()


def test_a_criterion_that_was_given_is_not_changed(net, splits):
    train, data = splits
    given = Coverage(net, SNAC(), show_progress=False).learn(train).update(data).criteria['SNAC']
    learned, seen = given.train, given.state['hit'].clone()
    assert counted(explore(net, None, data, given, show_progress=False)) == given.counts()
    assert given.train is learned and torch.equal(given.state['hit'], seen)


# ---------------------------------------------------------------------------------------------------------- inputs


def test_fewer_data_than_samples_and_fewer_samples_than_data(net, splits):
    train, data = splits
    assert explore(net, train, data[:3], show_progress=False).controls['tests'].choices == [1, 2, 3]
    some = explore(net, train, data, samples=20, show_progress=False)
    assert some.state['tests'] == 20
    table = assess(net, train, data[:20], NBC(), show_progress=False).table()
    assert counted(some, criterion='NBC') == (table.covered[0], table.total[0])
    with pytest.raises(ValueError, match='empty'):
        explore(net, train, data[:0], show_progress=False)


def test_batches_of_a_loader_and_the_ids_of_a_data_set(net, splits):
    train, data = splits
    loader = [(data.x[i : i + 9], data.y[i : i + 9]) for i in range(0, 40, 9)]
    one, two = explore(net, train, iter(loader), show_progress=False), explore(net, train, data, show_progress=False)
    assert counted(one, criterion='NBC') == counted(two, criterion='NBC')
    numbers = [
        int(e.describe(**(e.state | {'criterion': 'NBC'})).split('only test ')[1].rstrip('.')) for e in (one, two)
    ]
    assert numbers[1] - numbers[0] == 90


def test_vectors_and_one_layer():
    with seeded(0):
        mlp = nn.Sequential(nn.Linear(5, 30), nn.ReLU(), nn.Linear(30, 3))
        x, y = torch.randn(50, 5), torch.zeros(50, dtype=torch.int64)
    one = explore(mlp, (x, y), (3 * x[:9], y[:9]), where='0', show_progress=False)
    assert one.controls['layer'].choices == ['all', '0']
    assert counted(one) == counted(one, layer='0') and '30 units in 0' in one.describe(**one.state)
    for state in ({}, {'layer': '0'}, {'criterion': 'KMNC', 'k': 100}, {'criterion': 'NBC', 'tests': 1}):
        assert tuple(one.static(**state).get_size_inches() * 80) == (600, 496)
    assert png(one.static(criterion='NBC')) != png(one.static(criterion='SNAC'))


def test_images_of_any_shape_and_logits_that_are_a_part(splits):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, x):
            return x, self.head(self.conv(x).mean((2, 3)))

    with seeded(0):
        model, x = Two(), torch.rand(6, 3, 150, 40)
    wide = explore(model, (x, torch.zeros(6).long()), (x - 3, torch.zeros(6).long()), logits=1, show_progress=False)
    assert wide.bundle_bytes < 6 * (3 * 50 * 13 * 2 + 6 * 4) + 1000
    assert png(wide.static(criterion='NBC'))


def test_images_of_several_sizes():
    "A strip has one size of picture, so there is none; the map and the line are the same."
    with seeded(0):
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        sizes = [torch.rand(3, 1, side, side) for side in (8, 8, 12)]
    loader = [(x, torch.zeros(len(x)).long()) for x in sizes]
    found = explore(model, loader, loader, ['NC', 'NBC'], show_progress=False)
    assert tuple(found.static().get_size_inches() * 80) == (600, 496)
    assert counted(found, criterion='NBC')[0] == 0


def test_units_that_say_nan_are_not_reached(net, splits):
    x = torch.full((4, 5), 0.5)
    x[3] = 2

    class Explodes(nn.Linear):
        def forward(self, x):
            return super().forward(x) + torch.where(x > 1, float('nan'), 0.0).sum(1, keepdim=True)

    with seeded(0):
        model = nn.Sequential(Explodes(5, 6), nn.ReLU(), nn.Linear(6, 3))
    pair, calm = (x, torch.zeros(4).long()), (x[:3], torch.zeros(3).long())
    found = explore(model, calm, pair, show_progress=False)
    for code in ('NC', 'KMNC', 'NBC', 'SNAC', 'TKNC'):
        assert counted(found, criterion=code, tests=4) == counted(found, criterion=code, tests=3), code
        assert png(found.static(criterion=code))


def test_criteria_of_ones_own(net, splits):
    class Thirds(UnitCriterion):
        "Which third of -1 to 2 a value lies in."

        code, per_unit = 'thirds', 3

        def mask(self, activations):
            return torch.stack([(activations.values.floor() == i) for i in (-1, 0, 1)], dim=2).flatten(1)

    own = explore(net, *splits, criteria=[Thirds, 'SNAC'], show_progress=False)
    table = assess(net, *splits, Thirds(), show_progress=False).table()
    assert own.controls['criterion'].choices == ['thirds', 'SNAC'] and counted(own) == (
        table.covered[0],
        table.total[0],
    )
    assert 'parts of units' in own.describe(**own.state) and png(own.static())
    named = explore(net, *splits, criteria={'mine': Thirds()}, show_progress=False)
    assert named.state['criterion'] == 'mine' and list(named.controls) == ['criterion', 'layer', 'tests']


@pytest.mark.parametrize(
    'criteria, words',
    [
        ('TKNP', 'has no map'),
        ('LSC', 'LSC does not count'),
        (['NC', 'NLC'], 'NLC does not count'), ('XYZ', 'no criterion'), ([], 'one or several'),
        (['NC', 'NC'], 'different'),
    ],
)  # fmt: skip
def test_what_has_no_map(net, splits, criteria, words):
    with pytest.raises((ValueError, KeyError), match=words):
        explore(net, *splits, criteria=criteria, show_progress=False)


def test_settings_are_checked_at_once(net, splits):
    with pytest.raises(ValueError, match='threshold'):
        explore(net, *splits, 'NC', thresholds=[0.5, 1.5], show_progress=False)
    with pytest.raises(ValueError, match='NC has no threshold to choose from'):
        explore(net, *splits, 'NC', thresholds=[], show_progress=False)
