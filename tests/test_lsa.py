"""Layer sustainability against literal forms, the published package's definition, and a table of known values."""

import copy
import pickle
from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from robustnb import lsa
from robustnb.attacks import FGSM, PGD
from robustnb.data import DataSet, mnist
from robustnb.devices import seeded
from robustnb.lsa import Comparison, compare, layer_sustainability, surface
from robustnb.measures import MEASURES, Measure
from robustnb.models import build
from robustnb.noises import Gaussian, Pepper, Salt, Speckle, matched
from robustnb.stats import rank_agreement
from robustnb.training import fit


@pytest.fixture(scope='module')
def net():
    with seeded(0):
        return nn.Sequential(
            nn.Conv2d(1, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
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
    return DataSet(
        torch.rand(30, 1, 8, 8, generator=generator), torch.randint(0, 4, (30,), generator=generator), tuple('abcd')
    )


def representations(net, x):
    "Outputs of the activations of a plain Sequential, in float64 NumPy: the long way."
    found = []
    for module in net:
        x = module(x.clone())
        if isinstance(module, nn.ReLU | nn.ELU):
            found.append(x.detach().double().numpy().copy())
    return found


def literal_relative_error(net, x, x_pert):
    "The published measure for each sample, (layer, sample)."
    rows = []
    for a, b in zip(representations(net, x), representations(net, x_pert), strict=True):
        rows.append([np.linalg.norm(a[m] - b[m]) / np.linalg.norm(a[m]) for m in range(len(a))])
    return np.array(rows)


def test_equals_the_literal_form(net, data):
    result = layer_sustainability(net, data, [Gaussian(0.2), FGSM(0.1)], show_progress=False)
    assert result.layers == ['2', '4', '7'] and result.perturbations == ['Gaussian', 'FGSM']
    for p, perturbation in enumerate([Gaussian(0.2), FGSM(0.1)]):
        expected = literal_relative_error(net, data.x, perturbation(net, data.x, data.y))
        np.testing.assert_allclose(result.dataset['value'].values[:, p], expected, rtol=2e-5)
        rows = result.table().query(f'perturbation == "{perturbation.name}"')
        np.testing.assert_allclose(rows['mean'], expected.mean(1), rtol=1e-5)
        assert (rows.low < rows['mean']).all() and (rows['mean'] < rows.high).all() and (rows.n == 30).all()


def test_energy_weighted_equals_the_published_definition(net, data):
    "numpy.linalg.norm over the whole array, as in the published package: one number for a batch."
    x_pert = Gaussian(0.2)(net, data.x)
    expected = [
        np.linalg.norm(a - b) / np.linalg.norm(a)
        for a, b in zip(representations(net, data.x), representations(net, x_pert), strict=True)
    ]
    for batch_size in (2, 7, 1000):
        found = compare(net, data.x, x_pert, measure='energy_relative_error', batch_size=batch_size).table()
        np.testing.assert_allclose(found['mean'], expected, rtol=1e-6)
        assert found.low.isna().all()


@pytest.mark.parametrize('batch_size', [1, 4, 13, 64])
def test_batch_size_does_not_matter(net, data, batch_size):
    def analyse(n):
        return layer_sustainability(net, data, [Salt(0.1), PGD(0.1, steps=3)], batch_size=n, show_progress=False)

    expected, found = analyse(1000), analyse(batch_size)
    np.testing.assert_allclose(found.dataset['value'], expected.dataset['value'], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.table()['mean'], expected.table()['mean'], atol=1e-5)
    assert (found.dataset['prediction'] == expected.dataset['prediction']).all()


def test_order_does_not_matter(net, data):
    order = torch.randperm(30, generator=torch.Generator().manual_seed(3))
    one = layer_sustainability(net, data, Gaussian(0.2), show_progress=False).dataset
    other = layer_sustainability(net, data[order], Gaussian(0.2), show_progress=False).dataset.sel(sample=np.arange(30))
    np.testing.assert_allclose(one['value'], other['value'], rtol=1e-5)


def test_forward_passes(net, data):
    "K + 1 passes over the samples for K perturbations, and none for noises themselves."
    rows = []
    handle = net.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    layer_sustainability(
        net,
        data,
        [Gaussian(0.1), Salt(0.1), Pepper(0.1), Speckle(0.1), Gaussian(0.2), Gaussian(0.3)],
        batch_size=16,
        show_progress=False,
    )
    handle.remove()
    assert sum(rows) == 30 * 7 and max(rows) <= 16


def test_identical_inputs_and_scaled_layers(net, data):
    zero = compare(net, data.x, data.x.clone(), measure='relative_error')
    assert (zero.dataset['value'] == 0).all() and (zero.dataset['input_change'] == 0).all()
    with seeded(0):
        small = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 4))
    loud = copy.deepcopy(small)
    with torch.no_grad():
        loud[1].weight.mul_(50)
        loud[1].bias.mul_(50)
    a, b = (compare(m, data.x, data.x.flip(-1)).table()['mean'] for m in (small, loud))
    np.testing.assert_allclose(a, b, rtol=1e-5)


def test_silent_layers_are_counted_and_left_out():
    class Picky(nn.Module):
        "Silent for dark images."

        def __init__(self):
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, x):
            return self.act(x.flatten(1).mean(1, keepdim=True) - 0.5)

    x = torch.tensor([0.2, 0.8, 0.2]).view(3, 1, 1, 1)
    x_pert = torch.tensor([0.9, 0.9, 0.3]).view(3, 1, 1, 1)
    row = compare(Picky(), x, x_pert).table().iloc[0]
    assert row.undefined == 1 and np.isclose(row['mean'], (1 / 3 + 0) / 2, atol=1e-6) and row.n == 3
    all_undefined = compare(Picky(), x[:1], x_pert[:1])
    assert np.isnan(all_undefined.table()['mean'][0])


def test_reused_and_functional_activations(data):
    class Styles(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.act = nn.Linear(64, 8), nn.Linear(8, 8), nn.ReLU()

        def forward(self, x):
            return torch.tanh(self.b(self.act(self.act(self.a(x.flatten(1))) - 0.1)))

    result = compare(Styles(), data.x, data.x.flip(-1), measure='energy_relative_error')
    assert result.layers == ['act#0', 'act#1', 'tanh()']


def test_own_measure_and_where(net, data):
    def largest(clean, pert):
        return (clean - pert).flatten(1).abs().amax(1)

    result = layer_sustainability(net, data, FGSM(0.1), where='weights', measure=largest, show_progress=False)
    assert result.layers == ['0', '3', '6', '8'] and result.settings['measure'] == 'largest'
    assert result.dataset['value'].min() > 0


def test_bad_input_is_named(net, data):
    with pytest.raises(ValueError, match='empty'):
        layer_sustainability(net, (data.x[:0], data.y[:0]), FGSM(), show_progress=False)
    with pytest.raises(ValueError, match='chooses no layer'):
        layer_sustainability(net, data, FGSM(), where=nn.LSTM, show_progress=False)
    with pytest.raises(KeyError, match='relative_error'):
        layer_sustainability(net, data, FGSM(), measure='l3', show_progress=False)

    class TimeFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(8, 4)

        def forward(self, x):
            return self.lstm(x[:, 0].transpose(0, 1))[0][-1]

    with pytest.raises(ValueError, match='lstm returns shape .* first dimension is not the batch'):
        compare(TimeFirst(), data.x[:5], data.x[:5].flip(-1), where='lstm')


def test_saved_and_loaded(net, data, tmp_path):
    result = layer_sustainability(net, data, [FGSM(0.1), Gaussian(0.1)], show_progress=False)
    result.save(tmp_path / 'profile.safetensors')
    loaded = lsa.LayerSustainability.load(tmp_path / 'profile.safetensors')
    assert loaded.dataset.identical(result.dataset) and loaded.settings == result.settings
    assert loaded.table().equals(result.table())


# Known values of the mean relative error at the four activations of model B (one earlier run with other software):
# seed 313, 6,000 MNIST training images, Adam 1e-3, batch 128, 2 epochs, 512 test images.
KNOWN = {
    'Gaussian': (0.284, 0.195, 0.165, 0.133),
    'Salt': (0.341, 0.197, 0.144, 0.091),
    'Pepper': (0.127, 0.084, 0.087, 0.066),
    'Speckle': (0.097, 0.069, 0.073, 0.062),
    'FGSM': (0.560, 0.569, 0.596, 0.529),
    'PGD-40': (0.532, 0.554, 0.583, 0.561),
}


@pytest.mark.data
def test_model_b_on_mnist_agrees_with_known_values(data_root):
    train, test = mnist(data_root, download=False)
    perturbations = [Gaussian(0.2), Salt(0.05), Pepper(0.05), Speckle(0.2), FGSM(0.3), PGD(0.3, steps=40, step=0.01)]
    profiles = []
    for seed in (313, 314, 315):
        model = fit(build('lsa_model_b', seed), train[:6000], epochs=2, seed=seed, show_progress=False).model
        result = layer_sustainability(model, test[:512], perturbations, show_progress=False)
        profiles.append(result.table().set_index(['perturbation', 'layer'])['mean'])
    mean = sum(profiles) / len(profiles)
    found = np.concatenate([mean[name].to_numpy() for name in KNOWN])
    expected = np.concatenate(list(KNOWN.values()))
    table = '\n'.join(
        f'{name:10} ' + ' '.join(f'{a:.3f}/{b:.3f}' for a, b in zip(mean[name], KNOWN[name], strict=True))
        for name in KNOWN
    )
    assert len(found) == 24 and np.abs(found - expected).max() <= 0.10, table
    assert rank_agreement(found, expected) >= 0.9, table


def test_undefined_values_of_a_stream_measure_are_left_out():
    class TwoLayers(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.ReLU(), nn.ReLU()

        def forward(self, x):
            return self.b(x + 1 + 0 * self.a(x - 0.5))

    x = torch.full((3, 2), 0.2)
    table = compare(TwoLayers(), x, x + 0.6, measure='energy_relative_error').table()
    assert table.undefined.tolist() == [1, 0] and np.isnan(table['mean'][0]) and table['mean'][1] > 0


def test_predictions_are_those_of_the_logits(net, data):
    @dataclass
    class Out:
        hidden: torch.Tensor
        logits: torch.Tensor

    class Model(nn.Module):
        def forward(self, x):
            return Out(x.flatten(1), net(x))

    model = Model()
    model.net = net
    plain, wrapped = (compare(m, data.x, data.x.flip(-1)).sizes() for m in (net, model))
    assert plain.flipped.equals(wrapped.flipped)
    answers = compare(model, data.x, data.x.flip(-1)).dataset['clean_prediction'].values
    assert answers.tolist() == net(data.x).argmax(1).tolist()
    silent = compare(net[:3], data.x, data.x.flip(-1))
    assert silent.sizes().flipped.isna().all(), 'feature maps are no predictions'


def test_an_interruption_keeps_what_is_done(net, data):
    calls = []

    def impatient(model, x, y):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return x

    result = layer_sustainability(net, data, impatient, batch_size=10, show_progress=False)
    assert result.dataset.sizes['sample'] == 20


def test_arrays_and_logits_may_be_compared(net, data):
    pair = data.x.numpy(), data.x.flip(-1).numpy()
    assert compare(net, *pair).table().equals(compare(net, data.x, data.x.flip(-1)).table())
    assert compare(net, data.x, data.x.flip(-1), logits=lambda out: out).layers == ['2', '4', '7']
    with pytest.raises(ValueError, match='nothing to compare'):
        compare(net, data.x, {})


def test_gain_and_lipschitz_by_hand(net, data):
    x_pert = Gaussian(0.2)(net, data.x)
    table = compare(net, data.x, x_pert).table()
    means = literal_relative_error(net, data.x, x_pert).mean(1)
    change, length = ((data.x - x_pert).flatten(1).norm(dim=1), data.x.flatten(1).norm(dim=1))
    np.testing.assert_allclose(table.gain, means / np.r_[(change / length).mean(), means[:-1]], rtol=1e-4)
    for row, (a, b) in enumerate(zip(representations(net, data.x), representations(net, x_pert), strict=True)):
        ratios = [np.linalg.norm(a[m] - b[m]) / change[m].item() for m in range(len(a))]
        np.testing.assert_allclose(table.lipschitz[row], max(ratios), rtol=1e-4)


def test_lipschitz_leaves_out_samples_that_did_not_change(net, data):
    x_pert = data.x.clone()
    x_pert[:10] += 0.1
    whole, some = compare(net, data.x, x_pert), compare(net, data.x[:10], x_pert[:10])
    np.testing.assert_allclose(whole.table().lipschitz, some.table().lipschitz, rtol=1e-5)
    assert (compare(net, data.x, data.x).table().lipschitz == 0).all()
    assert compare(net, data.x, x_pert, measure='mse').table().gain.isna().tolist() == [True, False, False]


@pytest.mark.parametrize('measure', [name for name, m in MEASURES.items() if m.stream])
def test_stream_measures_do_not_depend_on_the_batch_size(net, data, measure):
    def analyse(n):
        found = layer_sustainability(net, data, [Salt(0.1), FGSM(0.1)], measure=measure, batch_size=n, show_progress=False)
        assert found.dataset['value'].dims == ('layer', 'perturbation') and found.dataset['size'].shape == (3, 2, 30)
        return found.table()['mean']

    np.testing.assert_allclose(analyse(4), analyse(1000), rtol=1e-5)


def test_accumulators_are_merged_at_once(net, data):
    "One per layer and perturbation at any time, and not one per batch: linear CKA keeps megabytes in each."
    import weakref

    alive = weakref.WeakSet()

    class Counting(MEASURES['linear_cka'].fn):
        def __init__(self):
            super().__init__()
            alive.add(self)
            assert len(alive) <= 2 * 3, "those merged, and those of one piece"

    layer_sustainability(net, data, FGSM(0.1), measure=Measure('cka', Counting), batch_size=4, show_progress=False)


def test_the_change_at_the_input_is_the_one_the_network_sees(net, data):
    "In half precision a part of a small change is rounded away, and a ratio to the other part would be none."
    x, half = data.x, copy.deepcopy(net).half()

    def slightly(model, x, y):
        return x + 1e-5

    result = layer_sustainability(half, (x, data.y), slightly, show_progress=False)
    seen = ((x + 1e-5).half().float() - x.half().float()).flatten(1).norm(dim=1)
    np.testing.assert_allclose(result.dataset['input_size'][0], seen, rtol=1e-4)
    assert np.isfinite(result.table().lipschitz).all()


def test_a_network_that_works_on_its_input_in_place(net, data):
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x.mul_(0.5))

    x_pert = Gaussian(0.2)(net, data.x)
    halves, expected = compare(InPlace(), data.x, x_pert), compare(net, 0.5 * data.x, 0.5 * x_pert)
    np.testing.assert_allclose(halves.dataset['value'], expected.dataset['value'], rtol=1e-5)
    np.testing.assert_allclose(halves.dataset['input_size'], 2 * expected.dataset['input_size'], rtol=1e-5)
    np.testing.assert_allclose(halves.table().lipschitz, expected.table().lipschitz / 2, rtol=1e-5)


def literal_rows(result, perturbation, keep):
    "Mean, count and undefined of each layer over the samples in `keep`, with loops."
    data, rows = result.dataset.sel(perturbation=perturbation), []
    for layer in result.layers:
        values = [float(v) for v, k in zip(data['value'].sel(layer=layer).values, keep, strict=True) if k]
        finite = [v for v in values if np.isfinite(v)]
        rows.append((sum(finite) / len(finite), len(values), len(values) - len(finite)))
    return rows


def test_table_by_class_equals_the_literal_form(net, data):
    result = layer_sustainability(net, data, [Gaussian(0.2), FGSM(0.1)], batch_size=16, show_progress=False)
    table = result.table('class')
    assert table['class'].unique().tolist() == [data.classes[c] for c in sorted(set(data.y.tolist()))]
    assert table.groupby(['perturbation', 'layer']).n.sum().eq(30).all()
    for (name, c), rows in table.groupby(['perturbation', 'class'], sort=False):
        expected = literal_rows(result, name, [data.classes[label] == c for label in data.y.tolist()])
        np.testing.assert_allclose(rows[['mean', 'n', 'undefined']].to_numpy(), expected, rtol=1e-5)
        assert (rows.low <= rows['mean']).all() and (rows['mean'] <= rows.high).all()
        one = data.classes.index(c)
        alone = layer_sustainability(net, data[data.y == one], FGSM(0.1), show_progress=False).table()
        if name == 'FGSM':
            np.testing.assert_allclose(rows[['gain', 'lipschitz']], alone[['gain', 'lipschitz']], rtol=1e-4)


def test_table_by_outcome_equals_the_literal_form(net, data):
    net = copy.deepcopy(net)
    with torch.no_grad():
        net[8].bias.sub_(net(data.x).mean(0))  # so that it does not always answer the same
        clean = net(data.x).argmax(1)
    labels = torch.where(torch.arange(30) < 20, clean, (clean + 1) % 4)  # twenty are right
    mirrored = data.x.flip(-1)
    with torch.no_grad():
        same = net(mirrored).argmax(1) == clean
    assert 0 < same[:20].sum() < 20
    known = compare(net, data.x, mirrored, labels)
    for result, asked in ((known, clean == labels), (compare(net, data.x, mirrored), clean == clean)):
        table = result.table('outcome')
        for outcome, keep in (('kept', asked & same), ('flipped', asked & ~same)):
            rows = table[table.outcome == outcome]
            expected = literal_rows(result, 'perturbed', keep.tolist())
            np.testing.assert_allclose(rows[['mean', 'n', 'undefined']].to_numpy(), expected, rtol=1e-5)
        assert result.plot(by='outcome') is not None
    np.testing.assert_allclose(known.table('class').groupby('class').n.first().sum(), 30)
    assert compare(net, data.x, data.x).table('outcome').outcome.unique().tolist() == ['kept'], 'nothing flipped: no rows'


def test_views_that_are_not_there_say_why(net, data):
    mirrored = data.x.flip(-1)
    plain = compare(net, data.x, mirrored)
    with pytest.raises(ValueError, match='labels are not known'):
        plain.table('class')
    with pytest.raises(ValueError, match="by='digit'"):
        plain.plot(by='digit')
    with pytest.raises(ValueError, match='one number for all samples'):
        compare(net, data.x, mirrored, data.y, measure='linear_cka').table('outcome')
    with pytest.raises(ValueError, match='not one of a classifier'):
        compare(net[:3], data.x, mirrored).table('outcome')
    with torch.no_grad():
        wrong = (net(data.x).argmax(1) + 1) % 4
    with pytest.raises(ValueError, match='no sample was classified correctly'):
        compare(net, data.x, mirrored, wrong).table('outcome')
    with pytest.raises(ValueError, match='labels have shape'):
        compare(net, data.x, mirrored, data.y[:3])


@pytest.mark.parametrize('measure', ['relative_error', 'topk_overlap', 'energy_relative_error'])
def test_a_surface_is_a_profile_at_each_strength(net, data, measure):
    perturbations, eps = [Gaussian(), PGD(steps=3)], (0.2, 0.0, 0.05)
    found = surface(net, data, perturbations, eps, measure=measure, batch_size=20, show_progress=False)
    assert found.eps == [0.0, 0.05, 0.2] and found.dataset['value'].dims[:3] == ('eps', 'layer', 'perturbation')
    assert found.dataset['size'].shape == (3, 3, 2, 30)
    for e in (0.05, 0.2):
        alone = layer_sustainability(net, data, [p.at(e) for p in perturbations], measure=measure, show_progress=False)
        at = found.at(e)
        assert at.perturbations == alone.perturbations and at.layers == alone.layers
        for name in alone.dataset.data_vars:
            assert at.dataset[name].dims == alone.dataset[name].dims
            np.testing.assert_allclose(at.dataset[name], alone.dataset[name], rtol=2e-4, atol=1e-6)
        rows = found.table().query(f'eps == {e}')
        np.testing.assert_allclose(rows['mean'], alone.table()['mean'], rtol=1e-4, atol=1e-6)
    zero = found.at(0)
    assert (zero.dataset['value'] == (1 if measure == 'topk_overlap' else 0)).all() and (zero.dataset['size'] == 0).all()
    assert found.plot() is not None


def test_a_surface_is_saved_and_loaded(net, data, tmp_path):
    found = surface(net, data, {'noise': Gaussian()}, (0, 0.1), show_progress=False)
    found.save(tmp_path / 'surface.safetensors')
    loaded = lsa.SustainabilitySurface.load(tmp_path / 'surface.safetensors')
    assert loaded.dataset.identical(found.dataset) and loaded.table().equals(found.table())
    assert loaded.at(0.1).table('class').equals(found.at(0.1).table('class'))
    with pytest.raises(KeyError, match='no strength 0.3; there are 0, 0.1'):
        loaded.at(0.3)


def test_a_surface_needs_strengths(net, data):
    for perturbation in (lambda model, x, y: x, matched(Gaussian(), lambda model, x, y: x)):
        with pytest.raises(ValueError, match='no strength that could be set'):
            surface(net, data, {'mine': perturbation}, show_progress=False)
    for eps in ((), (-0.1,), (float('nan'),)):
        with pytest.raises(ValueError, match='one or more strengths'):
            surface(net, data, FGSM(), eps, show_progress=False)


def test_an_interrupted_surface_keeps_what_is_done(net, data):
    calls = deque()

    @dataclass(frozen=True)
    class Impatient(Gaussian):
        def __call__(self, model, x, y=None, ids=None):
            calls.append(1)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return super().__call__(model, x, y, ids)

    found = surface(net, data, Impatient(), (0.1, 0.2), batch_size=10, show_progress=False)
    assert found.dataset.sizes['sample'] == 10 and found.eps == [0.1, 0.2]


def test_difference_equals_the_literal_form(net, data):
    other = copy.deepcopy(net)
    with torch.no_grad():
        other[3].weight.mul_(0.3)
    noise, order = Gaussian(0.2), torch.randperm(30, generator=torch.Generator().manual_seed(5))
    before = layer_sustainability(net, data, noise, show_progress=False)
    after = layer_sustainability(other, data[order], noise, show_progress=False)  # the same samples in another order
    table = lsa.difference(before, after)
    x_pert = noise(net, data.x)
    first, second = (literal_relative_error(m, data.x, x_pert) for m in (net, other))
    np.testing.assert_allclose(table.before, first.mean(1), rtol=1e-5)
    np.testing.assert_allclose(table.after, second.mean(1), rtol=1e-5)
    np.testing.assert_allclose(table.difference, (second - first).mean(1), rtol=1e-4, atol=1e-7)
    generator, means = np.random.default_rng(7), []
    for _ in range(2000):
        drawn = generator.integers(30, size=30)
        means.append([sum(second[layer, i] - first[layer, i] for i in drawn) / 30 for layer in range(3)])
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    width = high - low
    assert (np.abs(table.low - low) <= 0.1 * width + 1e-7).all() and (np.abs(table.high - high) <= 0.1 * width + 1e-7).all()
    back = lsa.difference(after, before)
    np.testing.assert_allclose(back.difference, -table.difference, rtol=1e-6)
    assert (lsa.difference(before, before)[['difference', 'low', 'high']] == 0).all(axis=None)


def test_side_by_side_and_what_cannot_be_compared(net, data):
    def profile(some=data, where='activations', measure='relative_error', by=(Gaussian(0.2), FGSM(0.1))):
        return layer_sustainability(net, some, list(by), where, measure, show_progress=False)

    one = profile()
    figure = lsa.side_by_side({'one': one, 'again': profile(data[:20])}, 'FGSM')
    lines = [line for line in figure.axes[0].get_lines() if len(line.get_ydata()) == 4]  # the input and three layers
    means = one.table().query('perturbation == "FGSM"')['mean']
    np.testing.assert_allclose(lines[0].get_ydata(), np.r_[one.sizes().input_change[1], means])
    for call in (lsa.side_by_side, lambda pair, p: lsa.difference(*pair.values(), p)):
        for other, words in ((profile(where='weights'), 'layers differ'), (profile(measure='mse'), 'measures differ'),
                             (profile(by=[Gaussian(0.2)]), 'choose one that all results have: Gaussian')):
            with pytest.raises(ValueError, match=words):
                call({'a': one, 'b': other}, 'FGSM')
    with pytest.raises(ValueError, match='not of the same samples'):
        lsa.difference(one, profile(data[:20]), 'FGSM')
    with pytest.raises(ValueError, match='has no pairs'):
        lsa.difference(*[profile(measure='linear_cka')] * 2, 'FGSM')
    with pytest.raises(ValueError, match='no result'):
        lsa.side_by_side({})


@pytest.mark.parametrize('name', [name for name, m in MEASURES.items() if not m.stream])
def test_every_sample_measure_is_taken_as_it_is(net, data, name):
    "The relative error is made from lengths; all of them are what the measure itself says of the representations."
    x_pert, x_other = Gaussian(0.2)(net, data.x), data.x.flip(-1)
    found = compare(net, data.x, {'noise': x_pert, 'mirror': x_other}, measure=name, batch_size=16).dataset['value'].values
    clean, *others = (representations(net, x) for x in (data.x, x_pert, x_other))
    for layer, a in enumerate(clean):
        for p, b in enumerate(others):
            expected = MEASURES[name](*(torch.from_numpy(v[layer] if v is not a else v).float() for v in (a, b)))
            np.testing.assert_allclose(found[layer, p], expected, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(net, data, dtype):
    "Half precision overflows when it is squared; the lengths are taken in single precision."
    loud = nn.Sequential(nn.Flatten(), nn.Linear(64, 8, bias=False), nn.ReLU(), nn.Linear(8, 4))
    with torch.no_grad():
        loud[1].weight.copy_(torch.linspace(1, 900, 512).view(8, 64))
    found = compare(loud.to(dtype), data.x, data.x.flip(-1)).dataset['value']
    expected = compare(loud.float(), data.x, data.x.flip(-1)).dataset['value']
    assert np.isfinite(found).all() and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6 if dtype == torch.float64 else 0.02)


@pytest.mark.parametrize('fails', [False, True])
def test_no_hook_is_left(net, data, fails):
    class Moody(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            out = self.net(x)
            if fails:
                raise RuntimeError('no')
            return out

    model, mirrored = Moody().train(), data.x.flip(-1)
    calls = [lambda: compare(model, data.x, mirrored),
             lambda: layer_sustainability(model, data, Gaussian(0.1), show_progress=False),
             lambda: surface(model, data, Gaussian(), (0, 0.1), show_progress=False)]
    for call in calls:
        with pytest.raises(RuntimeError, match='no') if fails else nullcontext():
            call()
        assert all(not m._forward_hooks and not m._forward_pre_hooks and m.training for m in model.modules())
    model.eval()


def test_the_dataset_is_made_when_it_is_asked_for(net, data):
    "So that a single image costs little more than its forward pass; and such a result can be sent and saved unopened."
    result = compare(net, data.x, data.x.flip(-1))
    assert pickle.dumps(result) and callable(result._dataset)
    assert copy.deepcopy(result).dataset.identical(result.dataset)
    assert result.dataset is result.dataset


def in_chunks(comparison, n, x, perts, y=None):
    "Update with `n` samples at a time, through one buffer for each input that is used again and again."
    hooks, buffers = deque(), {}
    for start in range(0, len(x), n):
        here = slice(start, start + n)
        parts = {'x': x[here]} | {name: pert[here] for name, pert in perts.items()}
        for name, part in parts.items():
            buffers.setdefault(name, torch.empty_like(part))[:len(part)].copy_(part)
        clean, *others = (buffers[name][:len(part)] for name, part in parts.items())
        comparison.update(clean, dict(zip(perts, others, strict=True)), None if y is None else y[here])
        hooks.append(sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in comparison._settings[0].modules()))
        for buffer in buffers.values():
            buffer.fill_(float('nan'))
    assert not any(hooks)
    return comparison.compute()


@pytest.mark.parametrize('measure', ['relative_error', 'topk_overlap', 'energy_relative_error', 'linear_cka'])
@pytest.mark.parametrize('chunk', [1, 3, 7, 300])
def test_pairs_one_by_one_equal_one_comparison(net, data, chunk, measure):
    x, y = data.x.repeat(10, 1, 1, 1), data.y.repeat(10)
    x = x * torch.linspace(0.5, 1, 300).view(-1, 1, 1, 1)
    perts = {'noise': Gaussian(0.2)(net, x), 'mirror': x.flip(-1)}
    net.train()  # and it stays so
    expected = compare(net, x, perts, y, measure=measure, batch_size=50)
    found = in_chunks(Comparison(net, measure=measure, batch_size=50), chunk, x, perts, y)
    assert all(m.training for m in net.modules())
    net.eval()
    assert found.dataset.identical(expected.dataset) and found.settings == expected.settings


def test_a_comparison_may_go_on_after_compute_and_begin_again(net, data):
    x_pert = data.x.flip(-1)
    for measure in ('relative_error', 'linear_cka'):
        comparison = Comparison(net, measure=measure, batch_size=16)
        comparison.update(data.x[:13], x_pert[:13], data.y[:13])
        some, again = comparison.compute(), comparison.compute()
        assert some.dataset.identical(again.dataset)
        at_once = compare(net, data.x[:13], x_pert[:13], measure=measure).dataset
        np.testing.assert_allclose(some.dataset['value'], at_once['value'], rtol=1e-5)
        before = some.dataset.copy(deep=True)
        comparison.update(data.x[13:], x_pert[13:], data.y[13:])
        whole = compare(net, data.x, x_pert, data.y, measure=measure).dataset
        for name, values in comparison.compute().dataset.data_vars.items():
            np.testing.assert_allclose(values, whole[name], rtol=1e-5, atol=1e-7)
        assert some.dataset.identical(before), 'a result does not change when more comes'
        comparison.reset()
        with pytest.raises(ValueError, match='no pairs have come yet'):
            comparison.compute()
        comparison.update(data.x[:4], {'other': x_pert[:4]})  # of any kind
        assert comparison.compute().perturbations == ['other']


def test_passes_are_full_batches(net, data):
    rows, comparison = deque(), Comparison(net, batch_size=20)
    handle = net.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    for x in data.x:
        comparison.update(x[None], {'a': x[None], 'b': x[None].flip(-1)})
    assert list(rows) == [18] * 5, 'six samples, three versions of each'
    comparison.compute()
    handle.remove()
    assert list(rows) == [18] * 5, 'nothing waited'


def test_pairs_of_another_kind_are_refused(net, data):
    x = data.x[:3]
    comparison = Comparison(net)
    comparison.update(x, {'a': x, 'b': x.flip(-1)}, data.y[:3])
    for arguments, words in (
        ((x, x, data.y[:3]), 'of another kind: perturbations'),
        ((x, {'a': x, 'b': x}), 'of another kind: pairs with labels, and now without labels'),
        ((x[..., :6], {'a': x[..., :6], 'b': x[..., :6]}, data.y[:3]), 'of another kind: samples of shape'),
        ((x, {'a': x, 'b': x[:2]}, data.y[:3]), 'b has shape'),
        ((x[:0], {'a': x[:0], 'b': x[:0]}, data.y[:0]), 'nothing to compare'),
        ((x, {'a': x, 'b': x}, data.y[:2]), 'labels have shape'),
    ):
        with pytest.raises(ValueError, match=words):
            comparison.update(*arguments)
    comparison.update(x.numpy(), {'b': x.numpy(), 'a': x.flip(-1).numpy()}, data.y[:3].numpy())  # by name, in any order
    found = comparison.compute().dataset
    assert found.sizes['sample'] == 6 and found['label'].values.tolist() == data.y[:3].tolist() * 2
    np.testing.assert_allclose(found['value'][:, 0, 3:], found['value'][:, 1, :3], rtol=1e-5)


def test_what_waited_is_still_there_after_an_error(net, data):
    calls = deque()

    class Moody(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            calls.append(1)
            if len(calls) == 2:
                raise RuntimeError('no')
            return self.net(x)

    comparison = Comparison(Moody(), batch_size=8)
    comparison.update(data.x[:6], data.x[:6].flip(-1))  # four go, two wait
    with pytest.raises(RuntimeError, match='no'):
        comparison.update(data.x[6:12], data.x[6:12].flip(-1))
    comparison.update(data.x[6:12], data.x[6:12].flip(-1))
    expected = compare(net, data.x[:12], data.x[:12].flip(-1), batch_size=8)
    np.testing.assert_allclose(comparison.compute().dataset['value'], expected.dataset['value'], rtol=1e-6)


def test_an_interruption_within_a_batch(net, data):
    "The pieces that went through are kept, with their labels and numbers."
    calls = deque()

    class Impatient(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            calls.append(1)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return self.net(x)

    result = layer_sustainability(Impatient(), data, lambda model, x, y: x.flip(-1), batch_size=10, show_progress=False)
    found = result.dataset
    assert found['sample'].values.tolist() == list(range(15)) and found['label'].values.tolist() == data.y[:15].tolist()


def test_panels_show_all_their_lines(net, data):
    "A small profile in the first panel does not cut off a large one in another."
    result = layer_sustainability(net, data, [Gaussian(0.01), PGD(0.3, steps=2)], show_progress=False)
    figure = result.plot(by='outcome')
    drawn = [line.get_ydata().max() for ax in figure.axes for line in ax.get_lines()]
    assert drawn and all(max(drawn) <= ax.get_ylim()[1] for ax in figure.axes)
