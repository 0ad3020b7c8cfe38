"""The explorer of importance-driven coverage: its counts are those of `IDC`, its states, its bundle, what it refuses."""

import numpy as np
import pytest
import torch
from test_widgets import part
from torch import nn

from robustnb.attribution import relevance
from robustnb.combinations import (
    _INK,
    _Box,
    _draw_relevance,
    _histogram,
    _Page,
    _rounded,
    _shared,
    _view_at,
    _write,
    combination_table,
    explore,
)
from robustnb.coverage import Coverage
from robustnb.data import DataSet
from robustnb.devices import seeded
from robustnb.idc import IDC, Clustering, Clusters
from robustnb.plots import Picture, png


@pytest.fixture(scope='module')
def net():
    with seeded(0):
        return nn.Sequential(
            nn.Conv2d(1, 6, 3), nn.ReLU(inplace=True), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Flatten(),
            nn.Linear(128, 20), nn.Dropout(), nn.ReLU(), nn.Linear(20, 4),
        ).eval()  # fmt: skip


@pytest.fixture(scope='module')
def splits():
    generator = torch.Generator().manual_seed(1)
    x, y = torch.rand(200, 1, 8, 8, generator=generator), torch.randint(0, 4, (200,), generator=generator)
    x[140:] = (1.3 * x[140:]).clamp(0, 1)
    return DataSet(x[:140], y[:140], tuple('abcd')), DataSet(x[140:], y[140:], tuple('abcd'), ids=torch.arange(140, 200))


@pytest.fixture(scope='module')
def explorer(net, splits):
    return explore(net, *splits, by='label', show_progress=False)


def view(explorer, **state):
    return _view_at(explorer.bundle, **(explorer.state | state))


# ---------------------------------------------------------------------------------------------------------- the counts


@pytest.mark.parametrize(
    'state, how',
    [
        ({}, {}),
        ({'m': 3, 'k': 3}, {'m': 3, 'k': 3}),
        ({'layer': '2', 'm': 4}, {'m': 4, 'per': 'layer', 'skip': ['0', '5', '8']}),
        ({'score': 'absolute', 'method': 'random', 'm': 5, 'k': 2}, {'m': 5, 'k': 2, 'how': 'absolute', 'units': 'random'}),
        ({'label': 'c', 'm': 4}, {'m': 4, 'by': 'label'}),
        ({'label': 'a', 'layer': '5', 'm': 2}, {'m': 2, 'by': 'label', 'per': 'layer', 'skip': ['0', '2', '8']}),
    ],
    ids=str,
)  # fmt: skip
def test_counts_are_those_of_idc(net, splits, explorer, state, how):
    train, tests = splits
    how = {'m': 6} | how
    found = relevance(net, train, how.pop('units', 'lrp'), target='label', by_class=True, show_progress=False)
    coverage = Coverage(net, {'IDC': IDC(units=found, **how)}, show_progress=False).learn(train).update(tests)
    idc = coverage.criteria['IDC']
    label = 'abcd'.index(state['label']) if 'label' in state else None
    (number,) = [i for i, group in enumerate(idc.fitted().groups) if group.label == label]
    group, clusters = idc.fitted().groups[number], idc.fitted().clusters[number]
    shown = view(explorer, **state)
    assert list(group.units) == shown.units and clusters.total == shown.clusters.total
    for ours, theirs in zip(shown.clusters.centres, clusters.centres, strict=True):
        np.testing.assert_allclose(ours, theirs)
    made = {tuple(row) for row in idc.covered()[group.name].tolist()}
    assert made == {tuple(row) for row, count in zip(shown.table.tolist(), shown.tests, strict=True) if count}
    training = idc.fitted().training
    keys = training[training[:, 0] == number][:, 1 : 1 + len(clusters.words)]
    known = {tuple(row) for row in clusters.codes(keys).tolist()}
    assert known == {tuple(row) for row, count in zip(shown.table.tolist(), shown.train, strict=True) if count}


def test_each_image_is_counted_where_a_loop_finds_it(explorer):
    shown = view(explorer, m=3, k=3)
    columns = [explorer.bundle.units[unit] for unit in shown.units]
    counts: dict = {}
    for side, values in enumerate((explorer.bundle.train.values, explorer.bundle.tests.values)):
        for row in values[:, columns].double().tolist():
            made = tuple(min(range(len(c)), key=lambda i, c=c, v=v: abs(v - c[i]))
                         for v, c in zip(row, shown.clusters.centres, strict=True))  # fmt: skip
            counts.setdefault(made, [0, 0])[side] += 1
    table = combination_table(explorer, m=3, k=3)
    assert {tuple(row[:3] - 1): [row[3], row[4]] for row in table.to_numpy()} == counts
    assert table.train.is_monotonic_decreasing and table.train.sum() == 140 and table.tests.sum() == 60
    assert list(table.columns) == [f'{name}.{unit}' for name, unit in shown.units] + ['train', 'tests']


def test_covered_missing_and_new_share_out_all(explorer):
    everything = view(explorer, m=8)
    for kind, which in everything.kinds.items():
        listed = view(explorer, m=8, show=kind).shown
        np.testing.assert_array_equal(listed, np.flatnonzero(which)[:12])
    covered, missing, new = everything.kinds.values()
    assert missing.any() and new.any() and not (covered & missing).any() and (covered | missing).all() and (covered >= new).all()


def test_classes_and_their_units(net, splits, explorer):
    units, table = _shared(explorer.bundle, 'all', 'lrp', 'relative', 4)
    found = relevance(net, splits[0], 'lrp', by_class=True, show_progress=False)
    for label in range(4):
        expected = {(name, unit) for name, several in found.top(4, label=label).items() for unit in several}
        assert {unit for unit, marked in zip(units, table[label + 1], strict=True) if marked} == expected
    assert table.any(0).all() and (table.sum(1) == 4).all()


def test_every_setting_finds_its_units(explorer):
    "What the controls can choose is in the bundle."
    for method in explorer.controls['method'].choices:
        for score in explorer.controls['score'].choices:
            for label in explorer.controls['label'].choices:
                for layer in explorer.controls['layer'].choices:
                    assert view(explorer, method=method, score=score, label=label, layer=layer, m=12, k=2) is not None


# ---------------------------------------------------------------------------------------------------------- the states


def test_states(explorer):
    start = explorer.state
    assert start == {'layer': 'all', 'method': 'lrp', 'score': 'relative', 'm': 6, 'k': 'silhouette', 'label': 'all',
                     'test': 140, 'show': 'all', 'combination': 0}  # fmt: skip
    explorer.update(layer='5', m=12, k=4, test=150, label='b')
    assert explorer.state == start | {'layer': '5', 'm': 12, 'k': 4, 'test': 150, 'label': 'b'}
    assert explorer.describe().startswith('12 units of layer 5, class b: ') and 'Test 150' in explorer.describe()
    for wrong in ({'layer': '8'}, {'m': 7}, {'k': 6}, {'test': 60}, {'label': 'e'}, {'score': 'best'}, {'combination': 13}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            explorer.update(**wrong)
    explorer.update(**start)
    assert explorer.describe() == explorer.describe(**explorer.state)


def test_the_widget_follows_the_state_and_a_hand(net, splits):
    "Runs on ipywidgets 7.7 as on 8: values are positions, and nothing newer is used."
    live = explore(net, *splits, methods=('lrp', 'random'), show_progress=False)
    before = (live.widget and part(live, 'rnb-picture')).value
    live.update(m=3)
    assert part(live, 'rnb-picture').value != before and part(live, 'rnb-words').value.count('3 units of all layers') == 1
    part(live, 'rnb-method').value = 1
    part(live, 'rnb-label').value = 2
    part(live, 'rnb-combination').value = 3
    assert live.state['method'] == 'random' and live.state['label'] == 'b' and live.state['combination'] == 3
    assert part(live, 'rnb-picture').layout.visibility == 'visible'
    for name in live.controls:
        assert part(live, f'rnb-{name}') is not None


def test_pictures_have_one_size(explorer):
    states = ({}, {'m': 12}, {'m': 2, 'layer': '2'}, {'label': 'd', 'test': 199}, {'show': 'new', 'combination': 12})
    assert {tuple(explorer.static(**state).get_size_inches() * 80) for state in states} == {(600, 706)}


def test_a_missing_combination_shows_training_images(explorer):
    from robustnb.combinations import _makers

    shown = view(explorer, m=8, show='missing', combination=2)
    side, places = _makers(explorer.bundle, shown)
    assert side is explorer.bundle.train and len(places) == shown.train[shown.selected] and not shown.tests[shown.selected]
    assert (shown.of_train[places] == shown.selected).all()
    own = view(explorer, m=8)
    side, places = _makers(explorer.bundle, own)
    assert side is explorer.bundle.tests and own.test in places
    assert view(explorer, m=2, k=2, show='missing', combination=12).selected >= 0  # beyond the list: the last, or the test's own


# ---------------------------------------------------------------------------------------------------------- the bundle


def test_bundle_holds_values_pictures_and_relevance(explorer):
    units, classes, methods = 34, 4, 3
    scores = methods * (38 * 3 + classes + 2 * classes * 38) * 8
    known = [array.values.nbytes for array in explorer.bundle.relevance.dataset.data_vars.values()]
    assert sum(known) >= scores and len(explorer.bundle.units) <= units
    sides = (140 + 60) * (4 * len(explorer.bundle.units) + 64 + 16) + 60 * 64 * 2
    assert explorer.bundle_bytes == sum(known) + sides


def test_too_large_a_bundle_is_refused_before_the_second_pass(splits):
    with seeded(0):
        wide = nn.Sequential(nn.Flatten(), nn.Linear(64, 30_000), nn.ReLU(), nn.Linear(30_000, 2))
    with pytest.raises(ValueError, match=r'takes 2\d MB, and an explorer holds 20 MB: take train_samples=\d+'):
        explore(wide, *splits, methods='la', ms=[30_000], by=None, show_progress=False)


def test_the_model_is_untouched(net, splits):
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net.train()
    explore(net, *splits, methods='lrp', show_progress=False)
    assert net.training and all(p.requires_grad and p.grad is None for p in net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(m._forward_hooks for m in net.modules())
    net.eval()


# ---------------------------------------------------------------------------------------------------------- inputs


def test_vectors_and_one_layer():
    "Bars in place of pictures; the only layer stays; m beyond its units is left out."
    with seeded(0):
        mlp, x = nn.Sequential(nn.Linear(5, 3)), torch.randn(50, 5)
    one = explore(mlp, (x, torch.zeros(50).long()), (3 * x[:9], torch.zeros(9).long()), by='label', show_progress=False)
    assert one.controls['layer'].choices == ['0']
    assert one.controls['m'].choices == [2, 3] and one.bundle.tests.pictures.shape == (9, 5)
    assert one.bundle.tests.heat.shape == (9, 5) and png(one.static()) != png(one.static(test=3))
    assert one.describe(label='1') == 'No training image has the label 1.' and png(one.static(label='1'))
    assert len(combination_table(one, label='1')) == 0


def test_m_beyond_a_layer_takes_all_of_it(explorer):
    shown = view(explorer, layer='0', m=12)
    assert len(shown.units) == 6 and png(explorer.static(layer='0', m=12))


def test_constant_units_and_units_that_say_nan():
    class Odd(nn.Linear):
        def forward(self, x):
            out = super().forward(x) * torch.tensor([1.0, 0.0, 1.0, 1.0])
            return out + torch.where(x > 1, float('nan'), 0.0).sum(1, keepdim=True)

    with seeded(0):
        model, x = nn.Sequential(Odd(5, 4), nn.ReLU(), nn.Linear(4, 3)), torch.rand(40, 5)
    tests = x[:6].clone()
    tests[2] = 2
    odd = explore(model, (x, torch.zeros(40).long()), (tests, torch.zeros(6).long()), ms=[4], heat=None, show_progress=False)
    shown = view(odd, test=2)
    assert 1 in shown.clusters.sizes and shown.of_test.tolist().count(-1) == 1 and shown.selected == -1
    assert 'makes no combination here' in odd.describe(test=2)
    assert png(odd.static(test=2)) and png(odd.static(test=1))


def test_more_combinations_than_a_float_can_say():
    with seeded(0):
        wide, x = nn.Sequential(nn.Linear(5, 400), nn.ReLU(), nn.Linear(400, 2)), torch.randn(60, 5)
    y = torch.zeros(60).long()
    many = explore(wide, (x, y), (x[:5], y[:5]), ms=[400], ks=[9], by=None, heat=None, show_progress=False)
    assert view(many).clusters.total > 10**330 and 'of about 1e+382 combinations (0.0%)' in many.describe()
    assert png(many.static()) and len(combination_table(many).columns) == 402


def test_units_that_are_constant_but_for_rounding():
    "The mean of equal numbers may be another one, in the last bit; a histogram of such a range has no room for its bins."
    with seeded(0):
        model, x = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)).double(), torch.rand(49, 5).double()
        with torch.no_grad():
            model[0].weight[1] = 0
            model[0].bias[1] = 1.1
    explorer = explore(model, (x, torch.zeros(49).long()), (x[:3], torch.zeros(3).long()), ms=[4], show_progress=False)
    shown = view(explorer)
    number = shown.units.index(('0', 1))
    centres = [np.nextafter(c, 9) if i == number else c for i, c in enumerate(shown.clusters.centres)]
    part = _histogram(_Box(0, 0, 100, 50), shown._replace(clusters=Clusters(centres)), number)
    assert (part.low, part.high, part.cluster) == ('0.6', '1.6', '1 of 1')
    assert png(explorer.static())


def test_words_keep_their_place_and_their_signs(explorer):
    "But for the headings, all words of one colour are one shape, and they stand where a text would stand."
    from matplotlib.patches import PathPatch

    (page,) = explorer.static(m=12).axes
    shapes = [one for one in page.get_children() if isinstance(one, PathPatch)]
    assert len(page.texts) == 7 and len(shapes) == len(page.words) <= 5 and sum(map(len, page.words.values())) > 60
    page.words.clear()
    for ha in 'left', 'center', 'right':
        _write(page, 200, 100, 'Hg: $5_', ha)
    left, middle, right = (corners for corners, _ in page.words[_INK])
    figure_text = page.text(200, 100, 'Hg: \\$5_', va='center', fontsize=9)
    box = figure_text.get_window_extent(page.figure._get_renderer())
    width = np.ptp(left[:, 0])
    assert left[:, 0].min() >= 199 and abs(width - box.width) < 4 and abs(left[:, 1].mean() - 100) < 3
    assert left[0, 0] - middle[0, 0] == pytest.approx(middle[0, 0] - right[0, 0], abs=1)
    assert right[:, 0].max() == pytest.approx(200, abs=0.51)
    assert _rounded(-0.0001, 0.5) == '0.00' and _rounded(-0.12, 0.5) == '-0.12'


def test_scores_below_zero_fill_their_panel(splits):
    "Where no score is above zero, the scale ends at zero, not at one."
    with seeded(0):
        page = Picture(figsize=(7.5, 7.5), dpi=80).add_axes((0, 0, 1, 1), axes_class=_Page)
    _draw_relevance(page, _Box(50, 56, 404, 132), {'a': np.array([-2e-6, -1e-6, 0])}, [('a', 2)])
    bars = page.collections[0].get_paths()[0].vertices
    assert bars[:, 1].max() == 132 and bars[:, 1].min() == 56


def test_images_of_any_shape_and_logits_that_are_a_part():
    class Two(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.conv, self.head = nn.Conv2d(channels, 4, 3), nn.Linear(4, 2)

        def forward(self, x):
            return x, self.head(self.conv(x).mean((2, 3)))

    y = torch.zeros(6).long()
    for channels, shape in ((3, (6, 3, 50, 14)), (5, (6, 1, 50, 14))):
        with seeded(0):
            model, x = Two(channels), torch.rand(6, channels, 150, 40)
        wide = explore(model, (x, y), [(x - 3, y)], logits=1, by=None, show_progress=False)
        assert wide.bundle.tests.pictures.shape == shape and wide.bundle.tests.heat.shape == (6, 30, 8)
        assert 'label' not in wide.controls and png(wide.static())


def test_images_of_several_sizes_and_tokens():
    with seeded(0):
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        loader = [(torch.rand(3, 1, side, side), torch.zeros(3).long()) for side in (8, 6, 12)]
        tokens = nn.Sequential(nn.Embedding(9, 6), nn.Flatten(), nn.Linear(24, 5), nn.ReLU(), nn.Linear(5, 2))
        words = torch.randint(0, 9, (20, 4)), torch.zeros(20).long()
    assert png(explore(model, loader, iter(loader), show_progress=False).static(test=7))
    text = explore(tokens, words, words, show_progress=False)
    assert text.bundle.tests.heat is None and png(text.static())


def test_names_of_classes(net, splits):
    train, tests = splits
    odd = DataSet(train.x, train.y, ('all', 'cat', 'cat'))
    named = explore(net, odd, odd[:5], methods='lrp', show_progress=False)
    assert named.controls['label'].choices == ['all', 'all (0)', 'cat (1)', 'cat (2)', '3']
    twice = DataSet(tests.x[:4], tests.y[:4], ids=torch.zeros(4).long())
    assert explore(net, train, twice, methods='lrp', show_progress=False).controls['test'].choices == [0, 1, 2, 3]


@pytest.mark.parametrize(
    'how, words',
    [
        ({'by': 'class'}, 'by is'), ({'ms': []}, 'at least one'), ({'ms': [0]}, 'at least 1'), ({'ks': []}, 'at least one'),
        ({'ks': ['many']}, 'k is a number'), ({'methods': 'xyz'}, 'no method'), ({'skip': ['9']}, "no layer '9'"),
    ],
)  # fmt: skip
def test_what_is_refused(net, splits, how, words):
    with pytest.raises((ValueError, KeyError), match=words):
        explore(net, *splits, show_progress=False, **how)


def test_empty_data_and_data_that_are_used_up(net, splits):
    train, tests = splits
    with pytest.raises(ValueError, match='empty'):
        explore(net, train, tests[:0], show_progress=False)
    with pytest.raises(ValueError, match='empty'):
        explore(net, train[:0], tests, show_progress=False)
    with pytest.raises(ValueError, match='twice'):
        explore(net, iter([(train.x, train.y)]), tests, show_progress=False)


def test_only_the_first_samples_count(net, splits):
    train, tests = splits
    some = explore(net, train, tests, samples=7, train_samples=50, methods='lrp', by='label', show_progress=False)
    assert len(some.bundle.train) == 50 and some.controls['test'].choices == list(range(140, 147))
    same = explore(net, train[:50], tests[:7], methods='lrp', by='label', show_progress=False)
    assert combination_table(some).equals(combination_table(same))


def test_the_clusters_are_those_of_the_chosen_class(explorer):
    shown = view(explorer, label='b', m=2)
    rows = explorer.bundle.train.values[torch.from_numpy(explorer.bundle.train.labels == 1)]
    columns = [explorer.bundle.units[unit] for unit in shown.units]
    expected = Clusters([Clustering().centres(values.double().numpy()) for values in rows[:, columns].T])
    assert all(map(np.array_equal, shown.clusters.centres, expected.centres)) and len(shown.values) == len(rows)
