"""Layer sustainability against literal forms, the published package's definition, and a table of known values."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from robustnb import lsa
from robustnb.attacks import FGSM, PGD
from robustnb.data import DataSet, mnist
from robustnb.devices import seeded
from robustnb.lsa import RULES, compare, layer_sustainability
from robustnb.measures import MEASURES, Measure, topk_overlap
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
    assert np.isnan(all_undefined.table()['mean'][0]) and not all_undefined.most_vulnerable().layers


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


def test_rules_by_hand():
    values = np.array([[1.0, 3.0], [2.0, 2.0], [6.0, 4.0]])  # layer means 2, 2, 5; mean 3; variance (4+0+1+1+9+1)/6
    score, chosen, _ = RULES['joint'](values, eta=1.0)
    np.testing.assert_allclose(score, np.array([-1, -1, 2]) / np.sqrt(16 / 6))
    assert chosen.tolist() == [False, False, True]
    assert RULES['joint'](values, eta=2 / np.sqrt(16 / 6))[1].tolist() == [False] * 3, 'the inequality is strict'
    assert RULES['topk'](values, k=2)[1].tolist() == [True, False, True], 'the earlier layer wins a tie'
    assert RULES['joint'](np.ones((3, 4)))[0].tolist() == [0, 0, 0], 'no spread, no scores'
    gaps = np.array([[np.inf, 1.0], [np.inf, np.inf]])
    assert RULES['topk'](gaps, k=2)[1].tolist() == [True, False], 'an undefined layer is never chosen'


def test_an_empty_choice_says_why(net, data):
    result = layer_sustainability(net, data, [FGSM(0.1), Gaussian(0.1)], show_progress=False)
    nothing = result.most_vulnerable('joint', 'FGSM', eta=50)
    assert nothing.layers == [] and 'no layer is, the nearest is' in nothing.reason and 'none' in repr(nothing)
    assert list(nothing.ranking.score) == sorted(nothing.ranking.score, reverse=True) and len(nothing.ranking) == 3
    assert '<table' in nothing._repr_html_()
    with pytest.raises(KeyError, match='no perturbation'):
        result.most_vulnerable(perturbation='PGD')


def test_saved_and_loaded(net, data, tmp_path):
    result = layer_sustainability(net, data, [FGSM(0.1), Gaussian(0.1)], show_progress=False)
    result.save(tmp_path / 'profile.safetensors')
    loaded = lsa.LayerSustainability.load(tmp_path / 'profile.safetensors')
    assert loaded.dataset.identical(result.dataset) and loaded.settings == result.settings
    assert loaded.table().equals(result.table())
    assert loaded.most_vulnerable().layers == result.most_vulnerable().layers


def test_explorer_states(net, data):
    explorer = lsa.explore(net, data, [Gaussian(0.1), FGSM(0.1)], factors=[0.5, 1.0], samples=20, show_progress=False)
    assert explorer.bundle_bytes < 2e6
    for state in (
        {'perturbation': 'FGSM', 'strength': 0.5},
        {'label': 'c', 'layer': '7'},
        {'measure': 'cosine_distance'},
    ):
        explorer.update(**state)
        assert state.items() <= explorer.state.items()
        assert explorer.static() is not None
        assert 'largest in' in explorer.describe(**explorer.state)


def test_explorer_of_a_class_without_samples(net, data):
    few = data[data.y != 2]
    explorer = lsa.explore(net, few, FGSM(0.1), factors=[1.0], samples=10, show_progress=False)
    assert 'There are no samples of class c' in explorer.describe(**(explorer.state | {'label': 'c'}))
    assert explorer.static(label='c') is not None


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
    from dataclasses import dataclass

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


def test_explorer_edges(net, data):
    def mirror(model, x, y):
        return x.flip(-1)

    explorer = lsa.explore(net, data, {'mirror': mirror}, factors=[0.5, 1.0], samples=8, show_progress=False)
    assert 'times its strength' not in explorer.static().axes[0].get_title()
    with pytest.raises(ValueError, match='no value per sample'):
        lsa.explore(net, data, FGSM(), measures=['energy_relative_error'], show_progress=False)
    with pytest.raises(ValueError, match='empty'):
        lsa.explore(net, (data.x[:0], data.y[:0]), FGSM(), show_progress=False)
    few_names = DataSet(data.x[:8], data.y[:8].clamp(max=1), ('cat', '$x'))  # four outputs, two names, one a formula
    lsa.explore(net, few_names, FGSM(0.3), factors=[1.0], show_progress=False).static()


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


@pytest.mark.parametrize('measure', [name for name, m in MEASURES.items() if m.similarity])
def test_most_vulnerable_by_a_similarity_is_the_least_similar(net, data, measure):
    result = layer_sustainability(net, data, FGSM(0.2), measure=measure, batch_size=16, show_progress=False)
    table, found = result.table(), result.most_vulnerable()
    assert found.layers == [table.layer[table['mean'].argmin()]] and '1 - value' in found.reason
    ranking = result.most_vulnerable(k=3).ranking
    assert ranking['mean'].is_monotonic_increasing and ranking.score.is_monotonic_decreasing
    np.testing.assert_allclose(table.gain[1:], (1 - table['mean'][1:].values) / (1 - table['mean'][:-1].values), rtol=1e-5)


def test_other_settings_of_a_similarity_rank_the_same_way(net, data):
    class Wide(MEASURES['linear_cka'].fn):
        width = 2000

    class AsIs(MEASURES['linear_cka'].fn):
        pass

    for own, known in ((AsIs, 'linear_cka'), (partial(topk_overlap, k=4), 'topk_overlap'), (Wide, None)):
        result = layer_sustainability(net, data, FGSM(0.2), measure=own, show_progress=False)
        assert result.settings['similarity'] and '1 - value' in result.most_vulnerable().reason
        if known == 'linear_cka':
            same = layer_sustainability(net, data, FGSM(0.2), measure=known, show_progress=False)
            assert result.most_vulnerable(k=3).ranking.equals(same.most_vulnerable(k=3).ranking)


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


def test_the_explorer_knows_similarities_and_perturbations_without_a_strength(net, data):
    def mirror(model, x, y):
        return x.flip(-1)

    several = [Gaussian(0.1), matched(Gaussian(), mirror), matched(Gaussian(), FGSM(0.1))]
    explorer = lsa.explore(net, data, several, factors=[1.0, 2.0], measures='topk_overlap', samples=12, show_progress=False)
    assert 'smallest in' in explorer.describe(**explorer.state)
    assert 'times its strength' not in explorer.static(perturbation='Gaussian as mirror').axes[0].get_title()
    bundle_sizes = {name: explorer.describe(**(explorer.state | {'perturbation': name, 'strength': 2.0})) for name in
                    ('Gaussian as mirror', 'Gaussian as FGSM')}
    assert len(set(bundle_sizes.values())) == 2
