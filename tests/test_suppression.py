"""Vulnerability of features against a literal form of it, laws that it has to keep, and its term in training."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from robustnb.attacks import FGSM, PGD
from robustnb.data import Batch, DataSet
from robustnb.devices import seeded
from robustnb.dropout import insert_masks
from robustnb.guard import Normalized
from robustnb.noises import Gaussian
from robustnb.results import Result
from robustnb.suppression import FORMS, Vulnerability, suppress, vulnerability
from robustnb.training import Adversarial, fit

QUIET = {'show_progress': False}
LAYERS = ['1', '3', '6']


def make_net():
    with seeded(0):
        return nn.Sequential(
            nn.Conv2d(1, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 9), nn.ReLU(inplace=True),
            nn.Dropout(0.4), nn.Linear(9, 4),
        ).eval()  # fmt: skip


@pytest.fixture(scope='module')
def net():
    return make_net()


@pytest.fixture(scope='module')
def data():
    generator = torch.Generator().manual_seed(1)
    x, y = torch.rand(70, 1, 8, 8, generator=generator), torch.randint(0, 4, (70,), generator=generator)
    return DataSet(x, y, tuple('abcd'), ids=torch.arange(100, 170))


def literal(net, data, attack, p):
    "For each layer |change|^p and |z|^p of all samples, (sample, *features) in double precision."
    versions, found = (data.x, attack(net, data.x, data.y, data.ids)), []
    for x in versions:
        z, layers = x, {}
        with torch.no_grad():
            for number, layer in enumerate(net):
                z = layer(z)
                if str(number) in LAYERS:
                    layers[str(number)] = z.double().clone()
        found.append(layers)
    clean, pert = found
    return {name: ((pert[name] - clean[name]).abs() ** p, clean[name].abs() ** p) for name in LAYERS}


@pytest.mark.parametrize('p', [1, 2])
@pytest.mark.parametrize('attack', [FGSM(0.1), PGD(0.1, steps=4), Gaussian(0.2)], ids=['FGSM', 'PGD', 'noise'])
def test_equals_the_literal_form(net, data, attack, p):
    found, expected = vulnerability(net, data, attack, p=p, **QUIET), literal(net, data, attack, p)
    assert found.layers == LAYERS and len(found.perturbations) == 1
    table = found.table().set_index('layer')
    for name, (moved, size) in expected.items():
        features = moved[0].numel()
        assert table.loc[name, 'features'] == features
        assert table.loc[name, 'mean'] == pytest.approx(moved.mean().item() ** (1 / p), rel=1e-5)
        assert table.loc[name, 'sum'] == pytest.approx(moved.mean(0).sum().item() ** (1 / p), rel=1e-5)
        assert table.loc[name, 'relative'] == pytest.approx((moved.sum() / size.sum()).item() ** (1 / p), rel=1e-5)
        assert table.loc[name, 'low'] < table.loc[name, 'mean'] < table.loc[name, 'high']
        assert table.loc[name, 'relative_low'] < table.loc[name, 'relative'] < table.loc[name, 'relative_high']
        single = moved.mean(0) ** (1 / p)
        np.testing.assert_allclose(found.features(name), single.numpy(), rtol=1e-4, atol=1e-6)
        share = single / (size.mean(0) ** (1 / p)).mean()
        np.testing.assert_allclose(found.features(name, relative=True), share.numpy(), rtol=1e-4, atol=1e-6)
    whole = found.network().iloc[0]
    assert whole['layers'] == 3 and whole['low'] < whole['mean'] < whole['high']
    for form in FORMS:
        assert whole[form] == pytest.approx(table[form].mean(), rel=1e-6)
    one = found.network(layers=['3']).iloc[0]
    assert one['mean'] == pytest.approx(table.loc['3', 'mean'], rel=1e-9) and one['layers'] == 1


def test_batches_and_kinds_of_data_do_not_matter(net, data):
    whole = vulnerability(net, data, {'a': FGSM(0.1), 'b': Gaussian(0.1)}, **QUIET)
    for again in (
        vulnerability(net, data, {'a': FGSM(0.1), 'b': Gaussian(0.1)}, batch_size=9, **QUIET),
        vulnerability(net, data[torch.randperm(70)], {'a': FGSM(0.1), 'b': Gaussian(0.1)}, **QUIET),
    ):
        assert np.allclose(whole.table().iloc[:, 2:], again.table().iloc[:, 2:], rtol=2e-2)
        exact = [name for name in whole.table() if 'low' not in name and 'high' not in name and name != 'layer'][1:]
        assert np.allclose(whole.table()[exact], again.table()[exact], rtol=1e-4)
    loader = DataLoader(TensorDataset(data.x, data.y), batch_size=13)
    again = vulnerability(net, loader, {'a': FGSM(0.1)}, **QUIET).table()
    rows = whole.table()[whole.table().perturbation == 'a']
    assert np.allclose(again['mean'], rows['mean'], rtol=1e-5)


def test_an_attack_that_does_nothing(net, data):
    found = vulnerability(net, data, lambda model, x, y: x, **QUIET)
    assert (found.table()[['mean', 'sum', 'relative', 'low', 'high']] == 0).all(axis=None)
    assert found.network()['mean'].item() == 0


def test_silent_layers_have_no_relative_form(data):
    net = make_net()
    with torch.no_grad():
        net[0].weight.zero_(), net[0].bias.fill_(-1)
    found = vulnerability(net, data, lambda model, x, y: 1 - x, **QUIET)
    table = found.table().set_index('layer')
    assert np.isnan(table.loc['1', 'relative']) and table.loc['1', 'mean'] == 0
    assert np.isfinite(found.network()['relative'].item())
    found.plot()


def test_scale(net, data):
    scaled = copy.deepcopy(net)
    with torch.no_grad():
        scaled[0].weight *= 8
        scaled[0].bias *= 8
        scaled[2].weight /= 8
    one, two = (vulnerability(m, data, FGSM(0.1), **QUIET).table() for m in (net, scaled))
    assert two['mean'][0] == pytest.approx(8 * one['mean'][0], rel=1e-4)
    np.testing.assert_allclose(one['relative'], two['relative'], rtol=1e-4)
    np.testing.assert_allclose(one['relative_low'], two['relative_low'], rtol=1e-3)


@pytest.mark.parametrize('p', [1, 2])
def test_intervals_hold_what_they_promise(net, p):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(4000, 1, 8, 8, generator=generator), torch.randint(0, 4, (4000,), generator=generator)
    x *= torch.rand(4000, 1, 1, 1, generator=generator)  # images of very different contrast

    def noise(model, x, y):
        return (x * 1.3).clamp(0, 1)

    true = vulnerability(net, (x, y), noise, p=p, features=False, **QUIET)
    true, whole = true.table(), true.network()['mean'].item()
    hits, each = [], 80
    for start in range(0, 4000, each):
        part = vulnerability(net, (x[start : start + each], y[start : start + each]), noise, p=p, features=False, **QUIET)
        table, row = part.table(), part.network().iloc[0]
        hits.append([*((table.low <= true['mean']) & (true['mean'] <= table.high)),
                     *((table.relative_low <= true.relative) & (true.relative <= table.relative_high)),
                     row['low'] <= whole <= row['high']])  # fmt: skip
    assert (np.mean(hits, axis=0) > 0.84).all(), np.mean(hits, axis=0)  # 95 % of 50, less three standard errors


def test_saved_and_read(net, data, tmp_path):
    found = vulnerability(net, data, {'a': FGSM(0.1), 'b': Gaussian(0.1)}, **QUIET)
    found.save(tmp_path / 'found.safetensors')
    again = Result.load(tmp_path / 'found.safetensors')
    assert type(again).__name__ == Vulnerability.__name__ and again.table().equals(found.table())
    np.testing.assert_array_equal(again.features('3', 'b'), found.features('3', 'b'))
    assert '3 layer' in repr(found) or 'layer' in repr(found)


def test_the_most_vulnerable_features(net, data):
    found = vulnerability(net, data, FGSM(0.1), **QUIET)
    top, values = found.top('1', 7), found.features('1')
    assert list(top) == ['channel', 'row', 'column', 'vulnerability', 'size'] and len(top) == 7
    assert top['vulnerability'].is_monotonic_decreasing and top['vulnerability'][0] == values.max()
    row = top.iloc[3]
    assert values[int(row.channel), int(row.row), int(row.column)] == row.vulnerability
    assert list(found.top('6', 2)) == ['unit', 'vulnerability', 'size'] and len(found.top('6', 99)) == 9
    for form in FORMS:
        found.plot(form)
    found.plot_features('1'), found.plot_features('6', top=3)


def test_other_mistakes(net, data):
    found = vulnerability(net, data, {'a': FGSM(0.1), 'b': Gaussian(0.1)}, features=False, **QUIET)
    with pytest.raises(ValueError, match='whole layers only'):
        found.features('1', 'a')
    with pytest.raises(KeyError, match='there are a, b'):
        found.features('1')
    with pytest.raises(KeyError, match='there are 1, 3, 6'):
        found.top('2', 3, 'a')
    with pytest.raises(KeyError, match='no layer'):
        found.network(['9'])
    with pytest.raises(ValueError, match='mean, sum, relative'):
        found.plot('max')
    with pytest.raises(ValueError, match='mean, sum, relative'):
        suppress(form='max')
    for p in (0, 3, 'one'):
        with pytest.raises(ValueError, match='p is 1'):
            vulnerability(net, data, FGSM(0.1), p=p, **QUIET)
    with pytest.raises(ValueError, match='empty'):
        vulnerability(net, (data.x[:0], data.y[:0]), FGSM(0.1), **QUIET)
    with pytest.raises(ValueError, match='chooses no layer'):
        vulnerability(net, data, FGSM(0.1), where='conv*', **QUIET)

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.act, self.fc = nn.ReLU(), nn.Linear(8, 4)

        def forward(self, x):
            return self.fc(self.act(x.transpose(0, 1))).mean(0)

    with pytest.raises(ValueError, match='first dimension is the batch'):
        vulnerability(Tokens(), (torch.rand(6, 5, 8), data.y[:6]), Gaussian(0.1), **QUIET)


def test_an_interruption_keeps_what_is_done(net, data):
    calls = []

    def impatient(model, x, y):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return 1 - x

    found = vulnerability(net, data, impatient, batch_size=20, **QUIET)
    assert found.dataset.sizes['sample'] == 40
    expected = vulnerability(net, data[:40], lambda model, x, y: 1 - x, **QUIET).table()
    assert np.allclose(found.table()['mean'], expected['mean'])


@pytest.mark.parametrize('form', FORMS)
def test_the_term_is_the_vulnerability(net, data, form):
    model, attack = Normalized(net, [0.3], [0.5]), FGSM(0.1)
    batch = Batch(data.x, data.y, data.ids)
    x_adv = attack(model, *batch)
    found = suppress(0.7, form)(model, batch, x_adv, 0).item()
    if form == 'relative':  # of each sample, and then the mean
        rows = vulnerability(model, data, attack, **QUIET).dataset
        value = (rows['change'][0] / rows['clean']).mean().item()
    else:
        value = vulnerability(model, data, attack, **QUIET).network()[form].item()
    assert found == pytest.approx(0.7 * value, rel=1e-4)


def test_the_same_image_twice_has_not_moved(net, data):
    masked = insert_masks(net, data.x[:2]).train()
    batch = Batch(data.x, data.y, data.ids)
    assert suppress()(masked, batch, data.x.clone(), 0).item() == 0, 'both passes see the same masks and the same dropout'
    with torch.no_grad():
        assert (masked(data.x) - masked(data.x)).abs().max() > 0.01


def test_training_lowers_what_it_is_asked_to_lower(net, data):
    how, attack = {'epochs': 8, 'batch_size': 20, 'seed': 0, 'show_progress': False}, FGSM(0.1)
    found = {}
    for weight in (0.0, 3.0):
        terms = suppress(weight, 'relative') if weight else ()
        trained = fit(net, data, Adversarial(attack, regularizers=terms), **how).model
        found[weight] = vulnerability(trained, data, attack, **QUIET).network()['relative'].item()
    assert found[3.0] < 0.9 * found[0.0]


def test_one_layer_has_the_interval_of_the_network(net):
    x, y = torch.rand(40, 1, 8, 8), torch.zeros(40, dtype=torch.long)

    def one_moves(model, x, y):
        return torch.cat([1 - x[:1], x[1:]])

    for p in (1, 2):
        found = vulnerability(net, (x, y), one_moves, where='3', p=p, **QUIET)
        row, whole = found.table().iloc[0], found.network().iloc[0]
        assert row[['mean', 'low', 'high']].tolist() == pytest.approx(whole[['mean', 'low', 'high']].tolist(), rel=1e-9)
