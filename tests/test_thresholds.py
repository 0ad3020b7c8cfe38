"""A threshold on the masks: what is left, counted and computed by hand; and the explorer of it."""

import copy
import logging

import numpy as np
import pytest
import torch
from test_slimming import Odd, conv, live
from test_widgets import part
from torch import nn

from robustnb.attacks import FGSM, PGD
from robustnb.data import DataSet
from robustnb.devices import seeded
from robustnb.dropout import insert_masks, mask_mode
from robustnb.evaluation import accuracy, evaluate
from robustnb.noises import Gaussian
from robustnb.plots import png
from robustnb.results import Result
from robustnb.slimming import slim
from robustnb.stats import wilson
from robustnb.suppression import vulnerability
from robustnb.thresholds import THRESHOLDS, ThresholdSweep, explore, threshold_sweep

QUIET = {'show_progress': False}
LEVELS = [0.001, 0.01, 0.1, 0.3, 0.5]


def raw(keep):
    "The parameter of a mask, with b at its start, for which the mean keep-probability is this."
    keep = torch.as_tensor(keep, dtype=torch.float64)
    return torch.log(torch.expm1(keep / (1 - keep)))


def masked_net(seed=0):
    "Two convolutions and two linear layers, with keep-probabilities from 0.0002 to 0.98."
    with seeded(seed):
        dense = nn.Sequential(
            nn.Conv2d(1, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 5, 2), nn.ReLU(), nn.Flatten(), nn.Linear(20, 9),
            nn.ReLU(), nn.Linear(9, 4),
        ).eval()  # fmt: skip
        masked = insert_masks(dense, torch.rand(2, 1, 8, 8))
        with torch.no_grad():
            for host in ('1', '4', '7'):
                mask = masked.get_submodule(host).mask
                units = len(mask.a_raw)
                mask.a_raw[:] = raw(torch.logspace(-3.7, -0.01, units)[torch.randperm(units)])
            logits = masked.eval()(torch.rand(500, 1, 8, 8))  # else one class has all
            for net in (dense, masked):
                net[8].bias -= logits.mean(0)
    return dense, masked.eval()


@pytest.fixture(scope='module')
def nets():
    return masked_net()


@pytest.fixture(scope='module')
def data(nets):
    "Images, and labels that the masked network gets right more often than not."
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(60, 1, 8, 8, generator=generator)
    with torch.no_grad():
        y = nets[1](x).argmax(1)
    y[::5] = (y[::5] + 1) % 4
    return DataSet(x, y, tuple('abcd'))


def by_hand(masked, x, threshold, hard=False):
    "The classes of the network, with masks computed in NumPy."
    z = {}
    for host in ('1', '4', '7'):
        a = np.log1p(np.exp(masked.get_submodule(host).mask.a_raw.detach().double().numpy()))
        keep = a / (1 + a)  # the mean of Kumaraswamy(a, 1)
        z[host] = torch.from_numpy(np.where(keep > threshold, 1.0 if hard else keep, 0.0))
    net = copy.deepcopy(masked).double()
    x = x.double()
    for name, module in net.named_children():
        module._forward_hooks.clear()
        x = module(x)
        if name in z:
            x = x * z[name].view(1, -1, *[1] * (x.dim() - 2))
    return x.argmax(1), {host: int((part > 0).sum()) for host, part in z.items()}


# --------------------------------------------------------------------------------------------------------------- the sweep


@pytest.mark.parametrize('mode', ['mean', 'hard'])
def test_units_sizes_and_accuracy_are_those_counted_by_hand(nets, data, mode):
    found = threshold_sweep(nets[1], data, LEVELS, mode=mode, **QUIET)
    table, layers = found.table(), found.by_layer()
    assert table.attack.tolist() == ['clean'] * 5 and table.threshold.tolist() == LEVELS
    for row in table.itertuples():
        read, alive = by_hand(nets[1], data.x, row.threshold, mode == 'hard')
        right = int((read == data.y).sum())
        assert (row.accuracy, row.low, row.high) == pytest.approx(tuple(wilson(right, 60))) and row.n == 60
        assert row.kept == sum(alive.values()) and row.sparsity == pytest.approx(1 - row.kept / 20)
        assert dict(layers[layers.threshold == row.threshold][['layer', 'kept']].to_numpy()) == alive
        a, b, c = alive.values()
        assert row.parameters == 10 * a + (4 * a + 1) * b + (4 * b + 1) * c + (c + 1) * 4
        assert row.operations == 2 * (36 * 9 * a + 4 * 4 * a * b + 4 * b * c + 4 * c)
    assert layers.sparsity.tolist() == pytest.approx((1 - layers.kept / layers.units).tolist())
    assert found.settings['full'] == {'parameters': 60 + 125 + 189 + 40, 'operations': 2 * (36 * 54 + 480 + 180 + 36)}
    assert found.undecided == pytest.approx((table.kept.iloc[0] - table.kept.iloc[-1]) / 20)


def test_each_network_is_attacked_for_itself(nets, data):
    found = threshold_sweep(nets[1], data, LEVELS, [FGSM(0.1), PGD(0.05, steps=3)], batch_size=25, **QUIET)
    table = found.table()
    assert list(dict.fromkeys(table.attack)) == ['clean', 'FGSM', 'PGD-3']
    for threshold in LEVELS:
        twin = copy.deepcopy(nets[1])
        for host in (twin[1], twin[4], twin[7]):
            host.mask.threshold = threshold
        expected = evaluate(twin, data, [FGSM(0.1), PGD(0.05, steps=3)], batch_size=25, **QUIET)
        rows = found.dataset['correct'].sel(threshold=threshold).values
        np.testing.assert_array_equal(rows, expected.dataset['correct'].values)
    small = threshold_sweep(nets[1], data, [0.1], FGSM(0.1), **QUIET).table()
    with_threshold = copy.deepcopy(nets[1])
    for host in (with_threshold[1], with_threshold[4], with_threshold[7]):
        host.mask.threshold = 0.1
    assert small.accuracy[0] == accuracy(slim(with_threshold), data)


def test_equal_networks_are_measured_once(nets, data):
    calls = []

    def counted(model, x, y):
        calls.append(model[1].mask.threshold)
        return x

    same = [0.0005, 0.3, 0.30001, 0.30002, 0.3]
    found = threshold_sweep(nets[1], data, same, counted, **QUIET)
    assert calls == [0.0005, 0.3]
    assert found.dataset['threshold'].values.tolist() == [0.0005, 0.3, 0.30001, 0.30002]
    assert found.dataset['state'].values.tolist() == [0, 1, 1, 1]
    for name in ('kept', 'correct', 'parameters'):
        values = found.dataset[name].values
        assert (values[1] == values[2]).all() and (values[1] == values[3]).all()


def test_changes_are_paired(nets, data):
    found = threshold_sweep(nets[1], data, LEVELS, **QUIET)
    correct = found.dataset['correct'].values[:, 0].astype(float)
    changes = found.changes()
    gap = np.concatenate([correct[4] - correct[0], [-1, 1]])
    reach = 1.96 * gap.std() / np.sqrt(62)
    last = changes.iloc[-1]
    assert last.change == pytest.approx((correct[4] - correct[0]).mean())
    assert (last.low, last.high) == pytest.approx((gap.mean() - reach, gap.mean() + reach))
    assert changes.change[0] == 0 and last.change < 0


def test_results_are_kept_in_a_file(nets, data, tmp_path):
    found = threshold_sweep(nets[1], data, LEVELS, {'mine': FGSM(0.1)}, **QUIET)
    found.save(tmp_path / 'sweep.safetensors')
    again = Result.load(tmp_path / 'sweep.safetensors')
    assert type(again) is ThresholdSweep and again.dataset.identical(found.dataset)
    assert again.table().equals(found.table()) and again.settings == found.settings
    assert png(again.plot()) == png(found.plot()) and png(threshold_sweep(nets[1], data, [0, 0.5], **QUIET).plot('mine'))


def test_masks_come_back_with_their_own_thresholds(nets, data):
    net = copy.deepcopy(nets[1])
    net[4].mask.threshold = 0.2
    net.train()
    net[1].mask.mode = 'off'

    def fails(model, x, y):
        assert model[4].mask.threshold == 0.3 and model[1].mask.mode == 'mean'
        raise KeyboardInterrupt

    before = {name: value.clone() for name, value in net.state_dict().items()}
    for attack in (None, fails):
        for use in (threshold_sweep, explore):
            if attack is None and use is explore:
                continue
            try:
                use(net, data, [0.3], attack, **QUIET) if use is threshold_sweep else use(net, data, attack, [0.3], **QUIET)
            except (KeyboardInterrupt, AssertionError):
                pass
            masks = [net[place].mask for place in (1, 4, 7)]
            assert [mask.threshold for mask in masks] == [0.001, 0.2, 0.001] and net.training
            assert [mask.mode for mask in masks] == ['off', None, None] and all(mask.held is None for mask in masks)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_masks_behind_a_sum_have_accuracies_and_no_sizes(caplog):
    with seeded(0):
        net = live(Odd(lambda m, x: m.d(m.act(m.a(x) + m.b(x)).mean((2, 3))), a=conv(1, 6), b=conv(1, 6), act=nn.ReLU(),
                       d=nn.Linear(6, 3)))  # fmt: skip
        masked, x = insert_masks(net, torch.rand(2, 1, 6, 6), where='act'), torch.rand(20, 1, 6, 6).double()
    with torch.no_grad():
        masked.act.mask.a_raw[:] = raw([0.0005, 0.05, 0.2, 0.4, 0.8, 0.9])
    data = x, masked.eval()(x).argmax(1)
    with caplog.at_level(logging.WARNING, 'robustnb.thresholds'):
        found = threshold_sweep(masked, data, LEVELS, **QUIET)
    assert 'cannot be slimmed: the mask after act' in caplog.text and len(caplog.records) == 1
    table = found.table()
    assert table.parameters.isna().all() and table.kept.tolist() == [5, 5, 4, 3, 2] and table.accuracy[0] == 1
    assert png(found.plot()) and 'parameters' not in explore(masked, data, Gaussian(0.1), LEVELS, **QUIET).describe()


def test_logits_that_are_a_part(nets, data):
    class Two(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            return x, self.net(x)

    plain, part_of = threshold_sweep(nets[1], data, LEVELS, FGSM(0.1), **QUIET), Two(nets[1])
    found = threshold_sweep(part_of, data, LEVELS, FGSM(0.1), logits=1, **QUIET)
    np.testing.assert_array_equal(found.dataset['correct'].values, plain.dataset['correct'].values)
    one = explore(part_of, data, FGSM(0.1), LEVELS, logits=1, before=Two(nets[0]), **QUIET)
    other = explore(nets[1], data, FGSM(0.1), LEVELS, before=nets[0], **QUIET)
    assert one.describe(layer='net.4', threshold=0.1).replace('net.4', '4') == other.describe(layer='4', threshold=0.1)


def test_a_loader_is_walked_over_again_and_a_generator_is_refused(nets, data):
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(data.x, data.y), batch_size=16)
    whole = threshold_sweep(nets[1], data, LEVELS, **QUIET)
    assert threshold_sweep(nets[1], loader, LEVELS, **QUIET).table().equals(whole.table())
    with pytest.raises(TypeError, match='walked over once'):
        threshold_sweep(nets[1], iter(loader), LEVELS, **QUIET)


def test_what_is_refused(nets, data):
    for levels in ([], [1.0], [-0.1, 0.5], [0.1, float('nan'), 0.2]):
        with pytest.raises(ValueError, match='thresholds are keep-probabilities'):
            threshold_sweep(nets[1], data, levels, **QUIET)
    for mode in ('off', 'sample', None):
        with pytest.raises(ValueError, match='mode is'):
            threshold_sweep(nets[1], data, mode=mode, **QUIET)
    for use in (lambda net: threshold_sweep(net, data, **QUIET), lambda net: explore(net, data, FGSM(0.1), **QUIET)):
        with pytest.raises(ValueError, match='has no masks'):
            use(nets[0])
    for use in (lambda few: threshold_sweep(nets[1], few, **QUIET), lambda few: explore(nets[1], few, FGSM(0.1), **QUIET)):
        with pytest.raises(ValueError, match='empty'):
            use(data[:0])
    with pytest.raises(ValueError, match='before= has no module 1'):
        explore(nets[1], data, FGSM(0.1), before=nn.Sequential(nn.Flatten()), **QUIET)
    with pytest.raises(ValueError, match="name 'clean'"):
        explore(nets[1], data, {}, **QUIET)


# ------------------------------------------------------------------------------------------------------------ the explorer


@pytest.fixture(scope='module')
def explorer(nets, data):
    return explore(nets[1], data, [FGSM(0.2), Gaussian(0.1)], LEVELS, before=nets[0], samples=40, **QUIET)


def test_the_sweep_inside_is_that_of_the_samples(nets, data, explorer):
    expected = threshold_sweep(nets[1], data[:40], LEVELS, [FGSM(0.2), Gaussian(0.1)], batch_size=128, **QUIET)
    assert explorer.sweep.dataset.identical(expected.dataset)


@pytest.mark.parametrize('layer', ['1', '4', '7'])
def test_features_are_those_of_each_network(nets, data, explorer, layer):
    twin = copy.deepcopy(nets[1])
    for number, threshold in enumerate(LEVELS):
        for host in (twin[1], twin[4], twin[7]):
            host.mask.threshold = threshold
        for name, attack in (('FGSM', FGSM(0.2)), ('Gaussian', Gaussian(0.1))):
            shown = explorer.bundle.shown[layer, name]
            for net, kept, means in ((nets[0], shown.before, shown.means[0]),
                                     (twin, shown.after[_state(explorer, number)], shown.means[1 + _state(explorer, number)])):
                found = vulnerability(net, data[:40], attack, [layer], **QUIET)
                size, change = found.dataset[f'{layer} clean'].values, found.features(layer)
                np.testing.assert_allclose(kept[1], change[shown.numbers], rtol=2e-3, atol=1e-6)
                np.testing.assert_allclose(kept[0], size[shown.numbers], rtol=2e-3, atol=1e-6)
                assert means == pytest.approx([size.mean(), change.mean()], rel=1e-5)


def _state(explorer, number):
    return int(explorer.sweep.dataset['state'].values[number])


def test_features_that_move_most_are_shown(nets, data, explorer):
    dense = vulnerability(nets[0], data[:40], FGSM(0.2), ['1', '7'], **QUIET)
    order = np.argsort(-dense.features('1').mean((1, 2)))
    assert explorer.bundle.shown['1', 'FGSM'].numbers.tolist() == order.tolist()
    assert explorer.bundle.shown['7', 'FGSM'].numbers.tolist() == list(range(9))
    few = explore(nets[1], data, FGSM(0.2), [0.1], before=nets[0], samples=40, top=2, **QUIET)
    assert few.bundle.shown['1', 'FGSM'].numbers.tolist() == order[:2].tolist()
    assert list(few.controls) == ['layer', 'threshold'] and 'FGSM moves features' in few.describe()


def test_without_a_dense_network_the_masks_are_off(nets, data, explorer):
    own = explore(nets[1], data, [FGSM(0.2), Gaussian(0.1)], LEVELS, samples=40, **QUIET)
    for key, shown in own.bundle.shown.items():  # masks went in, and no weight was changed
        np.testing.assert_array_equal(shown.before, explorer.bundle.shown[key].before)


def test_an_attack_is_made_once_for_each_network(nets, data):
    calls = []

    def counted(model, x, y):
        calls.append(len(x))
        return x + 0.1

    one = explore(nets[1], data, counted, [0.001, 0.3, 0.30001], samples=40, **QUIET)
    assert calls == [40] * 3 and len(one.bundle.shown['1', 'counted'].after) == 2


def test_states_and_words(explorer):
    start, seen = explorer.state, set()
    assert start == {'layer': '1', 'threshold': 0.001, 'perturbation': 'FGSM'}
    table = explorer.sweep.table()
    for state in ({}, {'layer': '7'}, {'threshold': 0.3}, {'layer': '4', 'threshold': 0.5}, {'perturbation': 'Gaussian'}):
        explorer.update(**state)
        picture, words = png(explorer.static()), explorer.describe(**explorer.state)
        assert picture not in seen and words == explorer.describe()
        seen.add(picture)
        name = explorer.state['perturbation']
        rows = table[table.threshold == explorer.state['threshold']].set_index('attack')
        assert words.startswith(f'Threshold {explorer.state["threshold"]:g}: {int(rows.kept.iloc[0])} of 20 units stay, ')
        assert f'{int(rows.parameters.iloc[0])} of 414 parameters' in words
        assert f'{name} {rows.accuracy[name]:.1%} right ({rows.low[name]:.1%} to {rows.high[name]:.1%})' in words
    for wrong in ({'layer': '2'}, {'threshold': 0.33}, {'perturbation': 'PGD'}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            explorer.update(**wrong)
    explorer.update(**start)


def test_the_widget_follows_the_state_and_a_hand(nets, data):
    "Runs on ipywidgets 7.7 as on 8: values are positions, and nothing newer is used."
    live = explore(nets[1], data, [FGSM(0.2), Gaussian(0.1)], LEVELS, samples=20, **QUIET)
    before = (live.widget and part(live, 'rnb-picture')).value
    part(live, 'rnb-threshold').value = 4
    assert live.state['threshold'] == 0.5 and part(live, 'rnb-picture').value != before
    part(live, 'rnb-layer').value = 2
    part(live, 'rnb-perturbation').value = 1
    assert live.state == {'layer': '7', 'threshold': 0.5, 'perturbation': 'Gaussian'}
    assert part(live, 'rnb-picture').layout.visibility == 'visible' and 'Threshold 0.5' in part(live, 'rnb-words').value
    for name in live.controls:
        assert part(live, f'rnb-{name}') is not None


def test_tokens_and_signals():
    with seeded(0):
        tokens = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)).eval()
        signals = nn.Sequential(nn.Conv1d(2, 7, 3), nn.ReLU(), nn.Flatten(), nn.Linear(42, 3)).eval()
    for net, shape, units in ((tokens, (4, 5), {'1': 8}), (signals, (2, 8), {'1': 7})):
        x = torch.rand(30, *shape, generator=torch.Generator().manual_seed(0))
        masked = insert_masks(net, x[:2])
        one = explore(masked, (x, torch.zeros(30).long()), Gaussian(0.1), LEVELS, before=net, **QUIET)
        assert {layer: len(keep) for layer, keep in one.bundle.keep.items()} == units
        found = vulnerability(net, (x, torch.zeros(30).long()), Gaussian(0.1), ['1'], **QUIET).features('1')
        expected = found.mean(0 if net is tokens else 1)
        np.testing.assert_allclose(one.bundle.shown['1', 'Gaussian'].before[1], expected, rtol=2e-3, atol=1e-6)
        assert png(one.static())


def test_large_maps_are_made_small_and_too_much_is_refused(data):
    with seeded(0):
        net = nn.Sequential(nn.Conv2d(1, 40, 3, padding=1), nn.ReLU(), nn.Conv2d(40, 2, 3), nn.Flatten(), nn.LazyLinear(2))
        x = torch.rand(4, 1, 70, 70)
    net(x)
    masked, y = insert_masks(net.eval(), x[:2]), torch.zeros(4).long()
    with torch.no_grad():
        masked[1].mask.a_raw[:] = raw(torch.linspace(0.01, 0.99, 40))
    one = explore(masked, (x, y), Gaussian(0.1), [0.1, 0.5], **QUIET)
    shown = one.bundle.shown['1', 'Gaussian']
    assert shown.after.shape == (2, 2, 8, 24, 24) and shown.after.dtype == np.float16 and png(one.static())
    assert shown.before.nbytes + shown.after.nbytes == 3 * 2 * 8 * 24 * 24 * 2 < one.bundle_bytes < 1e5
    calls = []

    def counted(model, x, y):
        calls.append(1)
        return x

    with pytest.raises(ValueError, match=r'leave \d+ MB of feature maps, and an explorer holds 20 MB'):
        explore(masked, (x, y), {str(i): counted for i in range(10)}, torch.linspace(0, 0.98, 39), top=40, **QUIET)
    assert len(calls) == 10  # for the dense network, and for no other


def test_all_units_off_and_default_thresholds(nets, data):
    net = copy.deepcopy(nets[1])
    with torch.no_grad():
        net[4].mask.a_raw[:] = raw(0.3)
    found = threshold_sweep(net, data, **QUIET)
    layers = found.by_layer()
    assert found.dataset['threshold'].values.tolist() == list(THRESHOLDS)
    assert layers[(layers.layer == '4') & (layers.threshold > 0.31)].kept.eq(0).all()
    assert found.table().parameters.iloc[-1] > 0  # one unit stays in any case, as `slim` has it
    assert png(explore(net, data, Gaussian(0.1), [0.1, 0.5], **QUIET).static(layer='4', threshold=0.5))
    with mask_mode(net, 'hard'):
        assert threshold_sweep(net, data, [0.1], **QUIET).table().equals(threshold_sweep(net, data, [0.1], **QUIET).table())
