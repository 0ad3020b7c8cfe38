"""The explorer of filtered networks: what it shows is what the filtered network does; its states, its bundle, what it refuses."""

import numpy as np
import pytest
import torch
from test_widgets import part
from torch import nn

from robustnb.attacks import FGSM
from robustnb.combinations import _Page
from robustnb.data import DataSet
from robustnb.devices import seeded
from robustnb.filters import Pulse, as_filter, filtered, pools
from robustnb.links import _MOST, _classes_shown, _headings, _read, _step_at, _table, _taken, _view_at, explore
from robustnb.noises import Gaussian
from robustnb.plots import png
from robustnb.stats import wilson

FILTERS = ['high', 'low', 'pulse', 'magnitude', 'channel', 'random']


@pytest.fixture(scope='module')
def net():
    with seeded(0):
        return nn.Sequential(
            nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(),
            nn.Linear(216, 12), nn.Dropout(), nn.ReLU(), nn.Linear(12, 4),
        ).eval()  # fmt: skip


@pytest.fixture(scope='module')
def data():
    generator = torch.Generator().manual_seed(1)
    x, y = torch.rand(50, 1, 8, 8, generator=generator), torch.randint(0, 4, (50,), generator=generator)
    return DataSet(x, y, tuple('abcd'), ids=torch.arange(100, 150))


@pytest.fixture(scope='module')
def explorer(net, data):
    return explore(net, data, [FGSM(0.1), Gaussian(0.3)], FILTERS, thresholds=9, samples=40, show_progress=False)


def view(explorer, **state):
    return _view_at(explorer.bundle, **(explorer.state | state))


def near(explorer, along):
    "The place of the slider that is nearest."
    return min(explorer.controls['threshold'].choices, key=lambda place: abs(place - along))


# ------------------------------------------------------------------------------------------ what is shown is what happens


@pytest.mark.parametrize('name', ['high', 'low', 'magnitude', 'channel'])
@pytest.mark.parametrize('layer', ['0', '4', '7'])
def test_confusion_and_flips_are_those_of_the_filtered_network(net, data, explorer, layer, name):
    shown = view(explorer, layer=layer, filter=name, threshold=near(explorer, 0.4))
    threshold = shown.sweep.threshold[shown.step]
    x, y = data.x[:40], data.y[:40].tolist()
    with torch.no_grad():
        before = net(x).argmax(1).tolist()
        with filtered(net, name, threshold, where=[layer]):
            now = net(x).argmax(1).tolist()
    pairs = list(zip(y, now, strict=True))
    counted = [[pairs.count((row, column)) for column in range(4)] for row in range(4)]
    table, names = _table(explorer.bundle, shown, change=False)
    assert table.tolist() == counted and names == list('abcd')
    lost = [i for i in range(40) if before[i] == y[i] != now[i]]
    gained = [i for i in range(40) if before[i] != y[i] == now[i]]
    assert (shown.lost.tolist(), shown.gained.tolist()) == (lost, gained)
    change, _ = _table(explorer.bundle, shown, change=True)
    assert change.trace() == len(gained) - len(lost) and not change.sum(1).any()


def test_attacked_images_are_those_of_the_untouched_network(net, data, explorer):
    x_adv = FGSM(0.1)(net, data.x[:40], data.y[:40], ids=data.ids[:40])
    shown = view(explorer, layer='4', filter='high', threshold=near(explorer, 0.4), response='FGSM')
    with torch.no_grad():
        assert net(x_adv).argmax(1).tolist() == shown.before.tolist()
        with filtered(net, 'high', shown.sweep.threshold[shown.step], where=['4']):
            assert net(x_adv).argmax(1).tolist() == shown.now.tolist()
    expected = (255 * x_adv).round().to(torch.uint8).numpy()
    np.testing.assert_array_equal(explorer.bundle.pictures[1], expected)
    assert explorer.bundle.pictures.shape == (3, 40, 1, 8, 8)


@pytest.mark.parametrize('name', FILTERS)
def test_the_shaded_part_is_what_is_removed(net, explorer, name):
    "Of each bin, at each step, counted from the weights that a filter sets to zero."
    pool = pools(net)['0']
    counts, ends = explorer.bundle.weights['0']
    steps, values = as_filter(name).steps(pool, 9), pool.values
    shown = explorer.bundle.sweeps['0', as_filter(name).name]
    assert counts.sum() == pool.size and len(shown.taken) == len(steps.start)
    for number, (start, stop) in enumerate(zip(steps.start, steps.stop, strict=True)):
        weight = pool.without(steps.key, int(start), int(stop))['0.weight']
        gone = values[(weight.flatten() == 0).numpy()]
        np.testing.assert_array_equal(shown.taken[number], np.histogram(gone, len(counts), ends)[0])
    assert (shown.taken <= counts).all()


def test_biases_are_removed_and_not_in_the_histogram(explorer):
    shown = explorer.bundle.sweeps['0', 'channel']
    assert shown.size == 60 and (shown.removed == 10).all() and (shown.taken.sum(1) == 9).all()
    assert 'channel 3 removes 10 of 60 weights' in explorer.describe(filter='channel', threshold=near(explorer, 0.6))


def test_a_step_that_removes_nothing_or_everything():
    values = np.sort(np.random.default_rng(0).normal(size=100))
    ends = values[0], values[-1]
    taken = _taken(values, np.array([0, 0, 100]), np.array([0, 100, 100]), ends)
    assert taken.sum(1).tolist() == [0, 100, 0]


# ------------------------------------------------------------------------------------------------------------ the states


def test_states_and_words(explorer):
    start = explorer.state
    assert list(start) == ['layer', 'filter', 'threshold', 'response', 'change'] and start['threshold'] == near(
        explorer, 0.5
    )
    for state in (
        {'layer': '4'},
        {'filter': 'random like high'},
        {'threshold': 1.0},
        {'response': 'FGSM'},
        {'change': True},
    ):
        before = png(explorer.static())
        explorer.update(**state)
        assert state.items() <= explorer.state.items() and png(explorer.static()) != before
    shown = view(explorer)
    assert explorer.describe() == explorer.describe(**explorer.state)
    right = [wilson(count, 40) for count in shown.right]
    words = explorer.describe()
    assert (
        words.startswith('4: random like high at ')
        and 'removes 2,592 of 2,592 weights (100.0%), step 9 of 9. FGSM: ' in words
    )
    assert all(f'{value:.1%} {when} ({low:.1%} to {high:.1%})' in words
               for (value, low, high), when in zip(right, ('right before', 'now'), strict=True))  # fmt: skip
    assert f'{len(shown.lost)} flip to wrong and {len(shown.gained)} to right' in words
    for wrong in ({'layer': '2'}, {'filter': 'random'}, {'threshold': 0.33}, {'response': 'PGD'}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            explorer.update(**wrong)
    explorer.update(**start)


def test_labels_are_those_of_fragility(explorer):
    from robustnb.fragility import labels

    table = labels(explorer.responses)
    for (layer, name), sweep in explorer.bundle.sweeps.items():
        for number, response in enumerate(explorer.bundle.responses):
            rows = table[(table.layer == layer) & (table['filter'] == name) & (table.response == response)]
            assert rows.sort_values('position').label.tolist() == sweep.label[number].tolist()
    shown = view(explorer, layer='4', threshold=near(explorer, 1))
    word = shown.sweep.label[0][-1]
    assert word in ('fragile', 'robust', 'antifragile') and f'they are {word}.' in explorer.describe(
        layer='4', threshold=1.0
    )
    assert any(words.endswith(f', {word}') for _, _, words in _headings(explorer.bundle, shown, False, 0))


def test_sweeps_of_different_length_share_a_slider(net, data):
    "Every step of the shorter ones can be reached, and the ends are the ends."
    ragged = explore(net, data, None, ['channel', Pulse(), 'high'], thresholds=13, samples=8, show_progress=False)
    assert ragged.bundle.responses == ['clean']
    places = ragged.controls['threshold'].choices
    assert len(places) == 13 and places[0] == 0 and places[-1] == 1
    for (layer, name), sweep in ragged.bundle.sweeps.items():
        steps = [view(ragged, layer=layer, filter=name, threshold=place).step for place in places]
        assert set(steps) == set(range(len(sweep.state))) and steps == sorted(steps)
    assert {len(sweep.state) for sweep in ragged.bundle.sweeps.values()} == {4, 6, 12, 13}


def test_many_channels_do_not_stretch_the_slider(data):
    with seeded(0):
        wide = nn.Sequential(nn.Flatten(), nn.Linear(64, 70), nn.ReLU(), nn.Linear(70, 4))
    both = explore(wide, data, None, ['high', 'channel'], 5, samples=4, where=['1'], show_progress=False)
    alone = explore(wide, data, None, 'channel', samples=4, where=['1'], show_progress=False)
    assert [len(one.controls['threshold'].choices) for one in (both, alone)] == [5, 70]
    assert [view(both, filter='channel', threshold=place).step for place in (0, 0.25, 0.5, 1)] == [0, 17, 35, 69]
    assert [_step_at(70, place) for place in alone.controls['threshold'].choices] == list(range(70))


def test_the_widget_follows_the_state_and_a_hand(net, data):
    "Runs on ipywidgets 7.7 as on 8: values are positions, and nothing newer is used."
    live = explore(net, data, FGSM(0.1), 'high', thresholds=5, samples=20, show_progress=False)
    before = (live.widget and part(live, 'rnb-picture')).value
    part(live, 'rnb-threshold').value = 4
    assert live.state['threshold'] == 1 and part(live, 'rnb-picture').value != before
    part(live, 'rnb-layer').value = 2
    part(live, 'rnb-response').value = 1
    part(live, 'rnb-change').value = True
    assert live.state == {'layer': '7', 'filter': 'high', 'threshold': 1.0, 'response': 'FGSM', 'change': True}
    assert (
        part(live, 'rnb-picture').layout.visibility == 'visible' and 'removes 48 of 48' in part(live, 'rnb-words').value
    )
    for name in live.controls:
        assert part(live, f'rnb-{name}') is not None


def test_pictures_have_one_size_and_words_do_not_leave_the_page(explorer):
    for state in (
        {},
        {'filter': 'channel', 'layer': '7'},
        {'threshold': 1.0, 'change': True},
        {'response': 'Gaussian'},
    ):
        figure = explorer.static(**state)
        assert tuple(figure.get_size_inches() * 80) == (600, 578)
        (page,) = figure.axes
        corners = np.concatenate([corners for parts in page.words.values() for corners, _ in parts])
        assert isinstance(page, _Page) and (corners >= 0).all() and (corners <= [600, 578]).all()


# -------------------------------------------------------------------------------------------------------- other inputs


def test_points_have_no_images(data):
    with seeded(0):
        small, x = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(30, 2)
    cloud = DataSet(x, (x[:, 0] > 0).long(), bounds=None)
    points = explore(small, cloud, Gaussian(0.5), thresholds=5, show_progress=False)
    assert points.bundle.pictures.shape == (2, 30, 2) and points.bundle.pictures.dtype == np.float16
    assert png(points.static()) != png(points.static(threshold=1.0)) and 'Of 30 samples' in points.describe()
    with seeded(0):
        signals = nn.Sequential(nn.Conv1d(1, 3, 3), nn.Flatten(), nn.Linear(3 * 98, 2))
    lines = explore(
        signals, (torch.randn(9, 1, 100), torch.zeros(9).long()), None, 'high', thresholds=3, show_progress=False
    )
    assert lines.bundle.pictures.shape == (1, 9, 64) and png(lines.static())


def test_long_names_and_formulas(net, data):
    named = DataSet(data.x, data.y, ('an airplane', '$x_1$', 'cat', 'a very long name of a class'))
    long = explore(net, named, FGSM(0.3), 'high', thresholds=5, samples=30, show_progress=False)
    figure = long.static(response='FGSM', threshold=0.75)
    (page,) = figure.axes
    assert figure.get_size_inches()[1] * 80 == 626
    assert np.concatenate([corners for parts in page.words.values() for corners, _ in parts]).min() >= 0


def test_many_classes_share_a_row():
    generator = torch.Generator().manual_seed(0)
    with seeded(0):
        wide = nn.Sequential(nn.Flatten(), nn.Linear(64, 300))
    x, y = torch.rand(60, 1, 8, 8, generator=generator), torch.randint(0, 300, (60,), generator=generator)
    many = explore(wide, (x, y), None, 'high', thresholds=5, show_progress=False)
    table, names = _table(many.bundle, view(many), change=False)
    assert many.bundle.prediction.dtype == np.int16 and len(many.bundle.classes) > 290
    assert table.shape == (_MOST, _MOST) and table.sum() == 60 and names[-1] == 'others' and png(many.static())
    prediction = np.full((1, 1, 50), 24, np.uint8)
    assert 24 in _classes_shown(prediction, np.arange(50) % 25, 25)


def test_samples_that_a_sweep_did_not_look_at_are_not_counted(explorer):
    "`Responses` of a sweep that stops early hold the largest number of their type there."
    from dataclasses import replace

    prediction = explorer.bundle.prediction.copy()
    prediction[1:, :, 25:] = 255
    some = replace(explorer.bundle, prediction=prediction)
    shown = _view_at(some, **explorer.state)
    assert len(shown.samples) == 25 and (_read(some, [1], 0)[0, 25:] == -1).all()
    assert _table(some, shown, change=False)[0].sum() == 25


# ------------------------------------------------------------------------------------------------ bundle, model, errors


def test_bundle_holds_predictions_pictures_and_histograms(explorer):
    bundle, steps = explorer.bundle, sum(len(one.state) for one in explorer.bundle.sweeps.values())
    assert bundle.prediction.nbytes == len(bundle.prediction) * 3 * 40 and bundle.pictures.nbytes == 3 * 40 * 64
    taken = 60 * 4 * steps
    rest = explorer.bundle_bytes - bundle.prediction.nbytes - bundle.pictures.nbytes - taken
    assert 0 < rest < 20_000 and explorer.bundle_bytes < 20e6
    assert np.shares_memory(bundle.prediction, explorer.responses.dataset['prediction'].values)


def test_too_large_a_bundle_is_refused_before_the_sweep(net):
    x, y = torch.rand(9000, 1, 8, 8), torch.zeros(9000).long()
    with pytest.raises(ValueError, match=r'take \d+ MB, and an explorer holds 20 MB: take fewer samples'):
        explore(net, (x, y), FGSM(0.1), FILTERS, thresholds=200, samples=9000, show_progress=False)


def test_the_images_that_are_shown_are_those_that_were_asked_about(net, data):
    "A perturbation is made once: an attack is dear, and a function may answer otherwise the next time."
    calls, generator = [], torch.Generator().manual_seed(0)

    def restless(model, x, y):
        calls.append(len(x))
        return torch.rand(x.shape, generator=generator)

    one = explore(net, data, {'a': restless, 'b': Gaussian(0.3)}, 'high', 3, samples=40, show_progress=False)
    assert calls == [40]
    x = torch.rand((40, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    assert np.array_equal(one.bundle.pictures[1], (255 * x).round().to(torch.uint8).numpy())
    with torch.no_grad():
        assert net(x).argmax(1).tolist() == one.bundle.prediction[0, 1].tolist()
    assert np.array_equal(one.responses.dataset['eps'], [0, np.nan, 0.3], equal_nan=True)
    assert 'Gaussian' in str(one.responses.settings['perturbations']) and '_Watched' not in str(one.responses.settings)


def test_nothing_right_to_begin_with(net, data):
    "No label can be given, and the rest is shown."
    with torch.no_grad():
        wrong = (net(data.x).argmax(1) + 1) % 4

    def luck(model, x, y):
        return x.flip(0)

    one = explore(net, (data.x, wrong), luck, 'high', 3, samples=40, show_progress=False)
    assert one.responses.accuracy[0, 0] == 0 and {*one.bundle.sweeps['0', 'high'].label.ravel()} == {''}
    assert png(one.static()) and 'they are' not in one.describe()


def test_an_interrupted_sweep_is_no_explorer(net, data, monkeypatch):
    from robustnb import synaptic

    calls, asked = [], synaptic._Study.__call__

    def stops(self, *args, **how):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return asked(self, *args, **how)

    monkeypatch.setattr(synaptic._Study, '__call__', stops)
    with pytest.raises(KeyboardInterrupt):
        explore(net, data, None, ['high', 'low'], 3, samples=10, show_progress=False)
    assert len(calls) == 3


def test_the_model_is_untouched(net, data):
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net.train()
    explore(net, data, FGSM(0.1), FILTERS, thresholds=3, samples=10, show_progress=False)
    assert net.training and all(p.requires_grad and p.grad is None for p in net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(m._forward_hooks for m in net.modules())
    net.eval()


def test_all_layers_at_once_and_logits_that_are_a_part(data):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4, 4)

        def forward(self, x):
            return x, self.head(self.conv(x).mean((2, 3)))

    with seeded(0):
        model = Two()
    whole = explore(
        model, data, FGSM(0.1), 'magnitude', thresholds=5, scope='global', logits=1, samples=10, show_progress=False
    )
    assert whole.controls['layer'].choices == ['all layers'] and whole.bundle.weights['all layers'][0].sum() == 36 + 16
    assert png(whole.static())


def test_constant_weights():
    with seeded(0):
        flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    with torch.no_grad():
        flat[1].weight.fill_(0.25)
    data = torch.rand(6, 1, 8, 8), torch.zeros(6).long()
    same = explore(flat, data, None, ['high', 'channel'], thresholds=3, show_progress=False)
    assert png(same.static()) and png(same.static(filter='channel')) and 'high at 0.25' in same.describe()


def test_what_is_refused(net, data):
    for how, words in (({'filters': 'medium'}, 'no filter'), ({'grid': 'log'}, 'grid'), ({'thresholds': 1}, 'thresholds'),
                       ({'filters': []}, 'at least one filter'), ({'filters': ['high', 'high']}, 'two filters')):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            explore(net, data, None, **how, show_progress=False)
    with pytest.raises(ValueError, match='empty'):
        explore(net, data[:0], show_progress=False)
