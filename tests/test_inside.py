"""A layer taken apart, against literal loops over samples, channels and positions."""

import copy
from collections import deque

import numpy as np
import pytest
import torch
from torch import nn

from robustnb.attacks import FGSM
from robustnb.data import DataSet
from robustnb.devices import seeded
from robustnb.inside import LayerInside, _Squares, look_inside
from robustnb.lsa import layer_sustainability
from robustnb.noises import Gaussian
from robustnb.results import Result


def brighter(model, x, y):
    return x + 0.25


def same(model, x, y):
    return x


@pytest.fixture(scope='module')
def net():
    with seeded(0):
        return nn.Sequential(nn.Conv2d(1, 5, 3), nn.ReLU(inplace=True), nn.Conv2d(5, 4, 3), nn.ReLU(), nn.Flatten(),
                             nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 3)).eval()  # fmt: skip


@pytest.fixture(scope='module')
def data():
    generator = torch.Generator().manual_seed(1)
    return DataSet(torch.rand(23, 1, 8, 8, generator=generator), torch.randint(0, 3, (23,), generator=generator))


def literal(clean, pert):
    "Lengths (sample, channel) of the clean channels and of the changes, and mean squares per position, by loops."
    clean, pert = (np.asarray(t.detach(), np.float64) for t in (clean, pert))
    n, c = clean.shape[:2]
    places = clean.shape[2:]
    lengths, change = np.zeros((n, c)), np.zeros((n, c))
    clean_map, change_map = np.zeros(places), np.zeros(places)
    for m in range(n):
        for k in range(c):
            for place in np.ndindex(*places):
                a, d = clean[m, k][place], pert[m, k][place] - clean[m, k][place]
                lengths[m, k] += a**2
                change[m, k] += d**2
                clean_map[place] += a**2 / (n * c)
                change_map[place] += d**2 / (n * c)
    return np.sqrt(lengths), np.sqrt(change), clean_map, change_map


def test_lengths_and_maps_are_those_of_a_literal_loop(net, data):
    result = look_inside(net, data, {'brighter': brighter}, '1', batch_size=7, show_progress=False)
    clean, change, clean_map, change_map = literal(net[:2](data.x), net[:2](data.x + 0.25))
    found = result.dataset
    np.testing.assert_allclose(found['clean'].values, clean, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(found['change'].values[0], change, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found['clean_map'].values, clean_map, rtol=1e-5)
    np.testing.assert_allclose(result.maps().values[0], change_map, rtol=1e-5)
    np.testing.assert_allclose(result.maps(relative=True).values[0], np.sqrt(change_map / clean_map), rtol=1e-5)
    assert found['change_map'].dims == ('perturbation', 'row', 'column') and result.layer == '1'


def test_table_is_that_of_a_literal_loop(net, data):
    result = look_inside(net, data, {'brighter': brighter}, '1', show_progress=False)
    clean, change, *_ = literal(net[:2](data.x), net[:2](data.x + 0.25))
    table = result.table().set_index('channel')
    shares, energy = np.zeros(5), np.zeros(5)
    for m in range(len(data)):
        shares += change[m] ** 2 / (change[m] ** 2).sum() / len(data)
        energy += clean[m] ** 2 / (clean[m] ** 2).sum() / len(data)
    for k in range(5):
        errors = [d / a if a else 0.0 for d, a in zip(change[:, k], clean[:, k], strict=True) if a or not d]
        row = table.loc[k]
        assert row.share == pytest.approx(shares[k], rel=1e-5) and row.energy == pytest.approx(energy[k], rel=1e-5)
        assert row.undefined == len(data) - len(errors)
        assert row.activity == pytest.approx(clean[:, k].mean() / 6, rel=1e-5)
        if errors:
            assert row.relative_error == pytest.approx(np.mean(errors), rel=1e-4)
            assert row.low <= row.relative_error <= row.high
    assert table.share.is_monotonic_decreasing


@pytest.mark.parametrize('layer', ['1', '3', '6', '7'])
def test_shares_sum_to_one_and_lengths_make_the_layers_relative_error(net, data, layer):
    perturbations = {'noise': Gaussian(0.1), 'attack': FGSM(0.1), 'brighter': brighter}
    result = look_inside(net, data, perturbations, layer, show_progress=False)
    profile = layer_sustainability(net, data, perturbations, where=layer, show_progress=False).dataset
    change, clean = result.dataset['change'].values, result.dataset['clean'].values
    whole = np.sqrt(np.square(change).sum(-1) / np.square(clean).sum(-1))
    np.testing.assert_allclose(whole, profile['value'].values[0], rtol=2e-5)
    np.testing.assert_allclose(np.sqrt(np.square(change).sum(-1)), profile['size'].values[0], rtol=2e-5)
    sums = result.table().groupby('perturbation')[['share', 'energy']].sum().to_numpy()
    np.testing.assert_allclose(sums, 1, rtol=1e-9)


@pytest.mark.parametrize('batch_size', [1, 4, 200])
def test_batch_size_does_not_matter(net, data, batch_size):
    once = look_inside(net, data, Gaussian(0.1), '3', show_progress=False).dataset
    again = look_inside(net, data, Gaussian(0.1), '3', batch_size=batch_size, show_progress=False).dataset
    for name in once:
        np.testing.assert_allclose(again[name].values, once[name].values, rtol=1e-4, atol=1e-6)


def test_accumulators_merge_to_one_over_all_data():
    generator = torch.Generator().manual_seed(0)
    clean, change = (torch.rand(10, 3, 4, generator=generator) for _ in range(2))
    whole, left, right = _Squares(), _Squares(), _Squares()
    whole.update(clean, [change])
    left.update(clean[:4], [change[:4]])
    right.update(clean[4:], [change[4:]])
    left.merge(right)
    for name in whole.state:
        torch.testing.assert_close(left.state[name], whole.state[name])


def test_no_change_and_silence(data):
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU())
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].weight[1] = 1
        net[0].weight[2] = 1
        net[0].bias.copy_(torch.tensor([0.0, 0.0, -9.5]))  # silent; always on; silent until it is much brighter
    result = look_inside(net, data, {'same': same, 'bright': lambda m, x, y: x + 1}, '1', show_progress=False)
    table = result.table().set_index(['perturbation', 'channel'])
    assert table.share['same'].isna().all() and (table.relative_error['same'] == 0).all()
    assert table.share['bright', 0] == 0 and table.relative_error['bright', 0] == 0
    assert table.undefined['bright', 2] == len(data) and np.isnan(table.relative_error['bright', 2])
    assert 0 < table.share['bright', 2] < table.share['bright', 1]
    assert (result.maps(relative=True).sel(perturbation='same') == 0).all()
    result.plot()


class Tokens(nn.Module):
    "Outputs (batch, tokens, features), channels-last images, and plain numbers, for the choice of axes."

    def __init__(self):
        super().__init__()
        self.tokens, self.last, self.number = nn.Identity(), nn.Identity(), nn.Identity()

    def forward(self, x):
        maps = self.last(x.permute(0, 2, 3, 1) * torch.tensor([1.0, 2.0]))
        return self.number(self.tokens(maps.flatten(1, 2) + 1).sum((1, 2)))


def test_axes_of_tokens_channels_last_and_scalars():
    x, model = torch.rand(6, 2, 3, 4, generator=torch.Generator().manual_seed(0)), Tokens()
    pair = DataSet(x, torch.zeros(6, dtype=torch.long), bounds=None)
    tokens = look_inside(model, pair, brighter, 'tokens', show_progress=False)
    assert dict(tokens.dataset.sizes) == {'sample': 6, 'channel': 2, 'perturbation': 1, 'position': 12}
    turned = look_inside(model, pair, brighter, 'tokens', channel_axis=1, show_progress=False)
    assert dict(turned.dataset.sizes) == {'sample': 6, 'channel': 12, 'perturbation': 1, 'position': 2}
    last = look_inside(model, pair, brighter, 'last', channel_axis=-1, show_progress=False)
    assert last.dataset['change_map'].shape == (1, 3, 4)
    np.testing.assert_allclose(last.table().set_index('channel').share.to_numpy(), [0.8, 0.2], rtol=1e-5)
    assert look_inside(model, pair, brighter, 'number', show_progress=False).table().share.tolist() == [1.0]
    for result in (tokens, turned, last):
        result.plot(top=3)
    for axis in (0, 3, -3):
        with pytest.raises(ValueError, match='not an axis of an output'):
            look_inside(model, pair, brighter, 'tokens', channel_axis=axis, show_progress=False)


def test_three_dimensional_maps():
    model, x = nn.Sequential(nn.Conv3d(1, 2, 2), nn.ReLU()), torch.rand(4, 1, 3, 4, 5)
    result = look_inside(model, (x, torch.zeros(4, dtype=torch.long)), Gaussian(0.1), '0', show_progress=False)
    assert result.dataset['change_map'].dims == ('perturbation', 'position_0', 'position_1', 'position_2')
    result.plot()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(net, data, dtype):
    model, data = copy.deepcopy(net).to(dtype), DataSet(data.x[:6], data.y[:6])
    result = look_inside(model, data, {'brighter': brighter}, '3', show_progress=False)
    single = look_inside(net, data, {'brighter': brighter}, '3', show_progress=False)
    loose = {torch.float16: 0.01, torch.bfloat16: 0.1, torch.float64: 1e-4}[dtype]
    np.testing.assert_allclose(result.dataset['clean'].values, single.dataset['clean'].values, rtol=loose, atol=loose)
    assert result.table().share.sum() == pytest.approx(1)


def test_large_values_of_half_precision_do_not_overflow():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU()).half()
    with torch.no_grad():
        model[0].weight.fill_(3e4)
    result = look_inside(
        model, (torch.full((2, 2), 0.5), torch.tensor([0, 1])), lambda m, x, y: x * 0.5, '1', show_progress=False
    )
    np.testing.assert_allclose(result.table().share.to_numpy(), 1 / 3, rtol=1e-3)


def test_choices_of_layers(net, data):
    for layer, words in (('*', 'stands for 8 layers or calls'), ('nowhere', 'chooses no layer')):
        with pytest.raises(ValueError, match=words):
            look_inside(net, data, brighter, layer, show_progress=False)
    shared = nn.ReLU()
    twice = nn.Sequential(nn.Linear(4, 4), shared, nn.Linear(4, 4), shared)
    pair = (torch.rand(5, 4), torch.zeros(5, dtype=torch.long))
    with pytest.raises(ValueError, match='1#0, 1#1'):
        look_inside(twice, pair, brighter, '1', show_progress=False)
    assert look_inside(twice, pair, brighter, '1#1', show_progress=False).layer == '1#1'
    with pytest.raises(ValueError, match='the data are empty'):
        look_inside(net, [], brighter, '1', show_progress=False)


@pytest.mark.parametrize('axis', [None, 1])
def test_outputs_of_different_sizes_have_no_common_table(axis):
    net, sizes = nn.Sequential(nn.Linear(6, 8), nn.ReLU()), (5, 5, 7)
    loader = [(torch.rand(4, size, 6), torch.zeros(4, dtype=torch.long)) for size in sizes]
    with pytest.raises(ValueError, match='1 returns outputs of 2 sizes'):
        look_inside(net, loader, same, '1', channel_axis=axis, show_progress=False)


@pytest.mark.parametrize('top', [1, 16, 60])
def test_the_figure_names_the_channels_where_there_is_room(top):
    net = nn.Sequential(nn.Linear(3, 200), nn.ReLU())
    result = look_inside(net, (torch.rand(5, 3), torch.zeros(5, dtype=torch.long)), brighter, '1', show_progress=False)
    bars = result.plot(top).axes[1]
    assert len(bars.patches) == top and len(bars.get_xticks()) <= 14
    assert int(bars.get_xticklabels()[0].get_text()) == result.table().channel[0]


def test_functional_activations_and_other_batch_axes():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.lstm = nn.Linear(4, 6), nn.LSTM(4, 3)

        def forward(self, x):
            self.lstm(x[None])  # (time, batch, features)
            return torch.relu(self.fc(x))

    pair = (torch.rand(5, 4), torch.zeros(5, dtype=torch.long))
    assert look_inside(Net(), pair, brighter, 'relu()', show_progress=False).table().shape[0] == 6
    with pytest.raises(ValueError, match='whose first dimension is not the batch'):
        look_inside(Net(), pair, brighter, 'lstm', show_progress=False)


def test_an_interruption_keeps_what_is_done(net, data):
    calls = deque()

    def interrupted(model, x, y):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return x + 0.1

    result = look_inside(net, data, interrupted, '1', batch_size=5, show_progress=False)
    assert result.dataset.sizes['sample'] == 10


def test_round_trip_and_ids(net, data, tmp_path):
    rows = torch.tensor([7, 3, 11])
    result = look_inside(net, data[rows], Gaussian(0.1), '1', show_progress=False)
    assert result.dataset['sample'].values.tolist() == [7, 3, 11]
    result.save(tmp_path / 'inside.safetensors')
    again = Result.load(tmp_path / 'inside.safetensors')
    assert isinstance(again, LayerInside) and again.table().equals(result.table()) and '1' in again._repr_html_()
    again.plot()
