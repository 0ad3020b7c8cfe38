"""Sweeps of synaptic filters against a literal form of them, and laws that they have to keep.

This file is also the script of a sweep that is killed.
"""

import copy
import os
import signal
import subprocess
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synaptic_reference import fgsm, masks, weights
from synaptic_reference import sweep as literal
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from robustnb.attacks import FGSM, PGD
from robustnb.cuts import Cuts
from robustnb.data import DataSet, load_data
from robustnb.devices import seeded
from robustnb.filters import FILTERS, Channel, High, Low, Magnitude, Pool, Pulse, Random, drop, filtered, pools
from robustnb.fragility import scores
from robustnb.guard import Normalized
from robustnb.noises import Gaussian
from robustnb.probes import Probe
from robustnb.responses import Responses
from robustnb.results import Records, Result
from robustnb.synaptic import plan, sweep
from robustnb.training import trained

EPS = 0.1
QUIET = {'show_progress': False}


class Residual(nn.Module):
    "A block whose sum no list of layers shows."

    def __init__(self, width: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x):
        out = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        out += x  # in place, as in torchvision
        return out.relu()


@cache
def residual() -> nn.Module:
    "Batch norms with statistics of their own, a shortcut, dropout, and predictions of every class."
    with seeded(1):
        model = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), Residual(6),
                              nn.AvgPool2d(4), nn.Flatten(), nn.Dropout(0.5), nn.Linear(24, 4))
        x = images()[0]
        with torch.no_grad():
            for _ in range(20):
                model.train()(x)
            model.eval()[7].weight.mul_(8)
            model[7].bias.sub_(model(x).mean(0))
    return model.requires_grad_(True)


def images(count: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    data = load_data('digits').test[:count]
    return data.x, data.y % 4


@cache
def digits(count: int = 60) -> DataSet:
    return load_data('digits').test[:count]


@cache
def told(net: str, count: int = 60) -> tuple[nn.Module, DataSet]:
    "A network and images; those of the residual net have the labels that it gives them, but for a few."
    if net == 'digits_cnn':
        return trained(), digits(count)
    model, x = residual(), images(count)[0]
    with torch.no_grad():
        y = model(x).argmax(1)
    y[::7] = (y[::7] + 1) % 4
    return model, DataSet(x, y, tuple('abcd'))


@cache
def swept(net: str, **how) -> Responses:
    "A sweep of one of the networks, made once for all tests that ask for it."
    return run(*told(net), **how)


def run(model, data, perturbations=None, thresholds=5, **how) -> Responses:
    perturbations = {'attacked': FGSM(EPS)} if perturbations is None else perturbations
    return sweep(model, data, perturbations, thresholds=thresholds, **{'batch_size': 20} | QUIET | how)


def predictions(result: Responses, layer: str, kind: str) -> np.ndarray:
    "(threshold, response, sample), ascending."
    data = result.dataset
    steps = result.steps(layer, kind)
    steps = steps[np.argsort(data['threshold'].values[steps], kind='stable')]
    return data['prediction'].values[data['state'].values[steps]]


def same(a: Responses, b: Responses) -> None:
    "Two sweeps found the same, whatever the order in which they did it."
    assert a.layers == b.layers and a.filters == b.filters and a.responses == b.responses
    for layer in a.layers:
        for kind in a.filters:
            np.testing.assert_array_equal(predictions(a, layer, kind), predictions(b, layer, kind), err_msg=f'{layer} {kind}')
    columns = ['layer', 'filter', 'response', 'position', 'threshold', 'removed', 'n', 'accuracy']
    assert a.table()[columns].equals(b.table()[columns])


def equals_literal(result: Responses, curves: dict, names: dict | None = None) -> None:
    "Every image, at every threshold, clean and attacked."
    data = result.dataset
    right = data['prediction'].values == data['label'].values
    base = curves.pop(('', ''))
    assert (right[0] == np.stack([base.clean[0], base.attacked[0]])).all()
    assert {key[0] for key in curves} == set(result.layers)
    for (layer, kind), curve in curves.items():
        found = predictions(result, layer, (names or {}).get(kind, kind)) == data['label'].values
        rows = result.curve(layer, (names or {}).get(kind, kind)).sort_values('threshold')
        np.testing.assert_array_equal(rows['threshold'], curve.threshold)
        np.testing.assert_array_equal(rows['removed'], curve.removed)
        np.testing.assert_array_equal(found[:, 0], curve.clean, err_msg=f'{layer} {kind}, clean')
        np.testing.assert_array_equal(found[:, 1], curve.attacked, err_msg=f'{layer} {kind}, attacked')


NETS = 'digits_cnn', 'residual'


# --- filters: which weights -----------------------------------------------------------------------------------------------


def layer_of(values) -> tuple[nn.Linear, Pool]:
    layer = nn.Linear(len(values[0]), len(values))
    layer.weight.data = torch.tensor(values, dtype=torch.float32)
    return layer, Pool({'layer': layer})


def by_value(weight: torch.Tensor, name: str, steps, thresholds: int) -> list[torch.Tensor]:
    "Where the filter of this name removes weights, by their values."
    if name == 'magnitude':
        return [weight.double().abs() <= a for a in steps.threshold]
    if name == 'channel':
        return [(torch.arange(len(weight)) == row)[:, None].expand_as(weight) for row in range(len(weight))]
    return [mask for _, mask in masks(weight, name, thresholds)]


RULES = {'high': High(), 'low': Low(), 'pulse': Pulse(), 'published pulse': Pulse('published'), 'magnitude': Magnitude(),
         'channel': Channel()}
few = st.integers(-4, 4).map(lambda n: n / 4) | st.floats(-1, 1, width=32)
tables = st.tuples(st.integers(1, 4), st.integers(1, 5)).flatmap(
    lambda shape: st.lists(st.lists(few, min_size=shape[1], max_size=shape[1]), min_size=shape[0], max_size=shape[0]))


@settings(max_examples=80, deadline=None)
@given(tables, st.integers(2, 9), st.sampled_from(list(RULES)))
def test_places_in_an_order_are_rules_about_values(values, thresholds, name):
    layer, pool = layer_of(values)
    steps = RULES[name].steps(pool, thresholds)
    ranks = pool.ranks(steps.key)['layer.weight']
    expected = by_value(layer.weight.data, name, steps, thresholds)
    assert len(expected) == len(steps.start) == len(steps.position) == len(steps.threshold)
    for mask, start, stop in zip(expected, steps.start, steps.stop, strict=True):
        left = drop(layer.weight.data, ranks, int(start), int(stop))
        assert torch.equal(left, torch.where(mask, 0, layer.weight.data)) and not left.isnan().any()
        assert name == 'channel' or int(mask.sum()) == stop - start


@settings(max_examples=60, deadline=None)
@given(tables, st.integers(2, 9), st.sampled_from(['value', 'quantile', 'rank']), st.sampled_from(['high', 'low', 'magnitude']))
def test_grids_go_from_nothing_or_one_to_all(values, thresholds, grid, name):
    _, pool = layer_of(values)
    steps = RULES[name].steps(pool, thresholds, grid)
    removed = steps.removed if name != 'low' else steps.removed[::-1]
    assert (np.diff(removed) >= 0).all() and removed[-1] == pool.size
    assert removed[0] == 0 if grid == 'rank' else removed[0] >= 1
    assert (np.diff(steps.position) > 0).all() and (steps.position[0], steps.position[-1]) == (0, 1)
    assert (np.diff(steps.threshold) >= 0).all() and (steps.start <= steps.stop).all()
    if grid == 'rank':
        assert np.abs(removed / pool.size - np.linspace(0, 1, thresholds)).max() <= 0.5 / pool.size + 1e-12


@settings(max_examples=60, deadline=None)
@given(tables, st.integers(2, 9), st.sampled_from(['value', 'quantile', 'rank']))
def test_windows_that_tile_remove_each_weight_once(values, thresholds, grid):
    layer, pool = layer_of(values)
    steps = Pulse().steps(pool, thresholds, grid)
    ranks = pool.ranks('value')['layer.weight']
    gone = sum((drop(torch.ones_like(layer.weight), ranks, int(a), int(b)) == 0).int() for a, b in zip(*steps[3:], strict=True))
    assert torch.equal(gone, torch.ones_like(gone)) and len(steps.start) == thresholds
    assert (np.diff(steps.threshold) >= 0).all() and ((0 < steps.position) & (steps.position < 1)).all()


@settings(max_examples=50, deadline=None)
@given(tables, st.integers(2, 9), st.integers(0, 3))
def test_the_control_removes_as_many_by_lot(values, thresholds, seed):
    _, pool = layer_of(values)
    steps, like = Random(seed=seed).steps(pool, thresholds), High().steps(pool, thresholds)
    assert (steps.removed == like.removed).all() and (steps.threshold == like.threshold).all()
    ranks = pool.ranks(steps.key)['layer.weight']
    assert ranks.flatten().sort().values.tolist() == list(range(pool.size))
    assert torch.equal(ranks, Pool(pool.modules).ranks(steps.key)['layer.weight'])


def test_what_high_and_low_leave_adds_up():
    model = trained()
    for name, layer in weights(model).items():
        w = layer.weight.detach().clone()
        for a in np.linspace(float(w.min()), float(w.max()), 7)[1:-1].tolist() + [float(w.flatten()[3])]:
            with filtered(model, 'high', a, name):
                above = layer.weight.detach().clone()
            with filtered(model, 'low', a, name):
                below = layer.weight.detach().clone()
            assert torch.equal(above + below + w * (w.double() == a), w)
        assert torch.equal(layer.weight, w)


@pytest.mark.parametrize('kind', list(FILTERS))
def test_each_filter_is_a_block_after_which_the_network_is_as_it_was(kind):
    model, data = told('residual')
    before, output = copy.deepcopy(model.state_dict()), model(data.x)
    threshold = {'channel': 0, 'pulse': [-0.1, 0.1]}.get(kind, 0.05)
    with pytest.raises(KeyError), filtered(model, kind, threshold) as lent:
        assert lent is model and not torch.equal(model(data.x), output)
        raise KeyError
    assert torch.equal(model(data.x), output)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# --- the sweep against a literal form -------------------------------------------------------------------------------------


@pytest.mark.parametrize('against', ['original', 'filtered'])
@pytest.mark.parametrize('net', NETS)
def test_literal_form(net, against):
    model, data = told(net)
    equals_literal(swept(net, against=against), literal(model, data.x, data.y, EPS, thresholds=5, against=against))


@pytest.mark.parametrize('against', ['original', 'filtered'])
def test_literal_form_with_statistics_of_the_batch(against):
    model, data = told('residual')
    result = run(model, data, norms='batch', against=against, thresholds=3)
    equals_literal(result, literal(model, data.x, data.y, EPS, thresholds=3, against=against, norms='batch', batch=20))
    assert not np.array_equal(result.accuracy[0], swept('residual', against=against).accuracy[0])


def test_literal_form_of_the_published_windows():
    model, data = told('digits_cnn')
    result = run(model, data, filters=[Pulse('published')])
    curves = literal(model, data.x, data.y, EPS, ('published pulse',), thresholds=5)
    equals_literal(result, curves, {'published pulse': result.filters[0]})


# --- laws -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('net', NETS)
def test_ends_of_the_range(net):
    result = swept(net)
    for layer in result.layers:
        high, low = predictions(result, layer, 'high'), predictions(result, layer, 'low')
        np.testing.assert_array_equal(high[-1], low[0])
        model, data = told(net)
        with filtered(model, 'high', 1e9, layer), torch.no_grad():
            np.testing.assert_array_equal(high[-1, 0], model(data.x).argmax(1))
        removed = [result.curve(layer, kind).sort_values('threshold')['removed'].to_numpy() for kind in ('high', 'low', 'pulse')]
        assert (np.diff(removed[0]) >= 0).all() and (np.diff(removed[1]) <= 0).all() and removed[2].sum() == removed[0][-1]
        state = result.dataset['state'].values
        ends = [state[result.steps(layer, kind)] for kind in ('high', 'low')]
        assert ends[0][-1] in (ends[1][0], ends[1][-1]), 'no weights at all is one network, whatever took them'


def test_a_filter_that_removes_nothing_leaves_the_network_as_it_is():
    model, data = told('digits_cnn')
    result = run(model, data, filters=['high'], thresholds=[-100, -99.5, 0.01])
    state = result.dataset['state'].values.reshape(-1, 3)
    assert (state[:, :2] == 0).all() and (state[:, 2] > 0).all() and len(result.accuracy) == 1 + len(result.layers)


def test_what_is_the_same_network_is_evaluated_once():
    result = swept('digits_cnn')
    data = result.dataset
    count = data.sizes['step'] - len(result.layers)  # all high, all low
    assert count + 1 >= data.sizes['state'] == len(np.unique(data['state'].values)) + int((data['state'].values > 0).all())
    fine = run(*told('digits_cnn', 20), filters=['high', 'low'], thresholds=40, grid='rank', where='linear2')
    assert fine.dataset.sizes['state'] == 1 + 39 + 38


def test_difference_of_the_scores():
    found = scores(swept('residual'), resamples=100).dataset['value']
    kinds = found['kind'].values.tolist()
    assert kinds == ['clean', 'attacked', 'attacked - clean']
    clean, attacked, difference = (found.sel(kind=kind).values for kind in kinds)
    np.testing.assert_allclose(difference, attacked - clean, atol=1e-12)


@pytest.mark.parametrize('net', NETS)
def test_what_runs_only_the_end_is_the_whole_network_to_the_bit(net):
    model, data = told(net)
    cuts = Cuts(model, list(weights(model)), data.x[:2])
    assert 'none' not in cuts.how.values()
    with torch.no_grad():
        for layer in weights(model):
            rest = cuts.at(layer, data.x)
            assert torch.equal(rest(), model(data.x))
            pool = pools(model, layer)[layer]
            left = pool.without('value', 0, pool.size // 3)
            with filtered(model, 'high', pool.sorted('value')[pool.size // 3 - 1], layer):
                whole = model(data.x)
            assert torch.equal(rest(left), whole)


@pytest.mark.parametrize('how', [{'batch_size': 60}, {'batch_size': 7}, {'stack': 3}, {'stack': 64}], ids=str)
@pytest.mark.parametrize('net', NETS)
def test_neither_batches_nor_stacks_change_anything(net, how):
    same(run(*told(net), **how), swept(net))


@pytest.mark.parametrize('how', [{'batch_size': 13}, {'stack': 3}], ids=str)
def test_nor_when_each_network_is_attacked(how):
    same(run(*told('residual'), against='filtered', **how), swept('residual', against='filtered'))


def test_nor_do_stacks_with_statistics_of_the_batch():
    how = {'norms': 'batch', 'filters': ['high']}
    same(run(*told('residual'), stack=3, **how), run(*told('residual'), **how))


@pytest.mark.parametrize('net', NETS)
def test_the_untouched_network_is_attacked_alike(net):
    one, other = (swept(net, against=against).dataset['prediction'].values for against in ('original', 'filtered'))
    np.testing.assert_array_equal(one[0], other[0])
    assert not np.array_equal(one, other)


def test_noise_depends_on_the_image_alone():
    model, data = told('digits_cnn')
    noises = {'noise': Gaussian(0.2), 'strong': PGD(EPS, steps=3)}
    whole = run(model, data, noises, thresholds=3)
    same(run(model, data, noises, thresholds=3, batch_size=9), whole)
    part = run(model, data[30:50], noises, thresholds=3)
    np.testing.assert_array_equal(part.dataset['prediction'].values, whole.dataset['prediction'].values[:, :, 30:50])


def test_a_sub_sample_is_the_sweep_of_its_images():
    model, data = told('digits_cnn')
    result = run(model, data, samples=24, seed=3, thresholds=4)
    ids = result.dataset['sample'].values
    assert len(set(ids)) == 24 and set(ids) <= set(data.ids.tolist())
    place = {name: row for row, name in enumerate(data.ids.tolist())}
    rows = [place[name] for name in ids.tolist()]
    assert np.bincount(data.y.numpy()[rows]).max() <= 4, 'of each class about as many'
    whole = run(model, data, thresholds=4).dataset['prediction'].values
    np.testing.assert_array_equal(result.dataset['prediction'].values, whole[:, :, rows])
    assert run(model, data, samples=24, seed=4, thresholds=4).dataset['sample'].values.tolist() != ids.tolist()


def test_the_model_comes_back_as_it_was():
    model = copy.deepcopy(residual())
    model[1].train()
    model[0].weight.requires_grad_(False)
    model[7].weight.grad = torch.ones_like(model[7].weight)
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    addresses = [p.data_ptr() for p in model.parameters()]
    run(model, told('residual')[1], against='filtered', norms='batch', thresholds=3)
    run(model, told('residual')[1], filters=['channel', 'random'], scope='global', thresholds=3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes and [p.data_ptr() for p in model.parameters()] == addresses
    assert model[7].weight.grad.eq(1).all() and model[0].weight.grad is None and not model[0].weight.requires_grad
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# --- what is filtered -----------------------------------------------------------------------------------------------------


def by_hand(model: nn.Module, data: DataSet, change) -> np.ndarray:
    "Predictions of a copy after `change(copy)`, clean and attacked on the untouched network."
    other = copy.deepcopy(model).eval()
    x_adv = fgsm(other, data.x, data.y, EPS)
    with torch.no_grad():
        change(other)
        return np.stack([other(data.x).argmax(1).numpy(), other(x_adv).argmax(1).numpy()])


def test_channels_with_their_biases():
    model, data = told('digits_cnn')
    result = run(model, data, filters=['channel'], where=['conv1', 'linear2'])
    for layer, channels in ('conv1', 16), ('linear2', 10):
        found = predictions(result, layer, 'channel')
        assert len(found) == channels
        for number, row in enumerate(found):

            def off(net, layer=layer, number=number):
                getattr(net, layer).weight[number] = 0
                getattr(net, layer).bias[number] = 0

            np.testing.assert_array_equal(row, by_hand(model, data, off))


def test_all_layers_at_one_threshold():
    model, data = told('residual')
    result = run(model, data, filters=['high', 'low', 'magnitude'], scope='global')
    assert result.layers == ['all layers']
    everything = torch.cat([layer.weight.flatten() for layer in weights(model).values()]).detach().double()
    for kind, key in ('high', everything), ('low', everything), ('magnitude', everything.abs()):
        points = np.linspace(float(key.min()), float(key.max()), 5)
        for a, row in zip(points, predictions(result, 'all layers', kind), strict=True):

            def cut(net, a=a, kind=kind):
                for layer in weights(net).values():
                    w = layer.weight.double()
                    gone = w >= a if kind == 'low' else (w if kind == 'high' else w.abs()) <= a
                    layer.weight[gone] = 0

            np.testing.assert_array_equal(row, by_hand(model, data, cut), err_msg=f'{kind} {a}')


def test_all_layers_at_one_position():
    model, data = told('residual')
    result = run(model, data, filters=['high'], scope='together')
    rows = predictions(result, result.layers[0], 'high')
    for position, row in zip(np.linspace(0, 1, 5), rows, strict=True):

        def cut(net, position=position):
            for layer in weights(net).values():
                w = layer.weight.double()
                layer.weight[(w - w.min()) / (w.max() - w.min()) <= position] = 0

        np.testing.assert_array_equal(row, by_hand(model, data, cut))


def test_biases_and_batch_norms():
    model, data = told('residual')
    result = run(model, data, filters=['high'], where=(nn.Linear, nn.BatchNorm2d), bias=True, grid='quantile', thresholds=4)
    assert result.layers == ['1', '3.bn1', '3.bn2', '7']
    assert result.dataset['size'].values.reshape(4, 4)[:, 0].tolist() == [12, 12, 12, 100]
    for layer in result.layers:
        for a, row in zip(result.curve(layer, 'high')['threshold'], predictions(result, layer, 'high'), strict=True):

            def cut(net, layer=layer, a=a):
                for p in net.get_submodule(layer).parameters():
                    p[p.double() <= a] = 0

            np.testing.assert_array_equal(row, by_hand(model, data, cut))


@pytest.mark.parametrize('grid', ['value', 'quantile', 'rank'])
def test_every_filter_on_every_grid(grid):
    filters = ['high', 'low', 'pulse', 'magnitude', Random(), Random('magnitude', seed=2)]
    result = run(*told('digits_cnn', 20), filters=filters, grid=grid, thresholds=4, where='conv*')
    assert len(result.filters) == 6 and len(result.dataset['state']) == 2 * 6 * 4
    rows = result.table()
    assert (rows['n'] == 20).all() and not rows[['position', 'threshold', 'removed', 'accuracy']].isna().any(axis=None)
    removed = {name: part['removed'].tolist() for name, part in rows.groupby('filter')}
    assert removed['high'] == removed['random like high']


def test_several_strengths():
    result = run(*told('digits_cnn', 30), {'attacked': FGSM(EPS)}, eps=[0.0, 0.05, 0.1], thresholds=3, where='conv1')
    assert len(result.responses) == 4 and result.dataset['eps'].values.tolist() == [0, 0, 0.05, 0.1]
    found = result.dataset['prediction'].values
    np.testing.assert_array_equal(found[:, 0], found[:, 1])
    one = run(*told('digits_cnn', 30), thresholds=3, where='conv1')
    np.testing.assert_array_equal(found[:, 3], one.dataset['prediction'].values[:, 1])


# --- less work ------------------------------------------------------------------------------------------------------------


def test_stopping_early_is_the_beginning_of_the_whole_sweep():
    model, data = trained(), load_data('digits').train[:1200]
    how = {'thresholds': 7, 'batch_size': 250, 'where': ['linear1', 'linear2']}
    whole, part = run(model, data, **how), run(model, data, tolerance=0.04, **how)
    seen = part.looked_at
    assert seen[0].all() and seen.any(2).all() and 0.4 < seen.mean() < 0.9, 'something was settled'
    order = {name: place for place, name in enumerate(whole.dataset['sample'].values.tolist())}
    rows = [order[name] for name in part.dataset['sample'].values.tolist()]
    found = whole.dataset['prediction'].values[:, :, rows]
    np.testing.assert_array_equal(np.where(seen, part.dataset['prediction'].values, 0), np.where(seen, found, 0))

    def empty(net):
        net.linear1.weight.zero_()

    by_a_copy = by_hand(model, data, empty)
    np.testing.assert_array_equal(predictions(whole, 'linear1', 'high')[-1], by_a_copy)
    few, many = (one.table()['relative'].to_numpy() for one in (part, whole))
    assert np.abs(few - many).max() <= 2 * 0.04 and (np.abs(few - many) <= 0.04).mean() >= 0.9
    drawn, full = scores(part, resamples=200).dataset, scores(whole, resamples=100).dataset['value'].values
    inside = (drawn['low'].values <= full + 1e-9) & (full <= drawn['high'].values + 1e-9)
    assert inside.mean() >= 0.85


def test_a_refined_grid_is_part_of_the_whole_one():
    model, data = told('digits_cnn')
    how = {'thresholds': 33, 'where': ['conv2', 'linear2'], 'batch_size': 60}
    whole, part = run(model, data, **how), run(model, data, refine=0.1, **how)
    sizes = part.dataset.sizes, whole.dataset.sizes
    assert sizes[0]['step'] == sizes[1]['step'] and sizes[0]['state'] < sizes[1]['state']
    for layer in part.layers:
        for kind in part.filters:
            few, many = part.curve(layer, kind), whole.curve(layer, kind)
            assert 9 <= len(few) <= 33 and set(few['threshold']) <= set(many['threshold'])
            assert few['position'].iloc[[0, -1]].tolist() == many['position'].iloc[[0, -1]].tolist()
            merged = many.merge(few, on='threshold', suffixes=('', ' of few'))
            assert (merged['accuracy'] == merged['accuracy of few']).all()
            steps = np.searchsorted(many['position'], few['position'])
            for response in part.responses:
                values = part.curve(layer, kind, response)['relative'].to_numpy()
                for (a, b), (left, right) in zip(pairwise(values), pairwise(steps), strict=True):
                    assert right - left == 1 or abs(a - b) <= 0.1 + 1e-9, f'{layer} {kind}: a jump between neighbours'


def test_two_processes_are_one(tmp_path):
    model, data = told('digits_cnn')
    same(run(model, data, jobs=2, records=tmp_path / 'two'), swept('digits_cnn'))


def test_the_plan_says_what_will_be_done():
    model, data = told('digits_cnn')
    foreseen = plan(model, data, {'attacked': FGSM(EPS)}, thresholds=5, batch_size=20)
    found = swept('digits_cnn').dataset.sizes
    assert (foreseen.table()['steps'].sum(), 1 + foreseen.table()['states'].sum()) == (found['step'], found['state'])
    assert foreseen.passes == found['state'] * found['response'] * found['sample'] and foreseen.seconds > 0 < foreseen.nbytes
    assert f'{foreseen.passes:,} passes' in repr(foreseen)
    same(foreseen.run(), swept('digits_cnn'))


# --- interruptions --------------------------------------------------------------------------------------------------------


def noted_sweep(path: Path, dies_at: int = 0) -> tuple[Responses, int]:
    "A sweep, and how often it kept something; after so many times its process dies."
    kept = []

    class Noted(Records):
        def add(self, *args, **how):
            super().add(*args, **how)
            kept.append(1)
            if len(kept) == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)

    return run(trained(), digits(), records=Noted(path), thresholds=3), len(kept)


def test_a_sweep_that_is_killed_goes_on(tmp_path):
    path, before = tmp_path / 'run.jsonl', 2
    beside = {'PYTHONPATH': str(Path(__file__).parent)}  # where the literal form is, even if Python does not look beside scripts
    died = subprocess.run([sys.executable, __file__, path, str(before)], env=os.environ | beside, timeout=120)
    assert died.returncode == -signal.SIGKILL
    whole, many = noted_sweep(tmp_path / 'whole.jsonl')
    resumed, again = noted_sweep(path)
    assert again == many - before > 0, 'what was kept is not evaluated again'
    same(resumed, whole)
    known, nothing = noted_sweep(path)
    assert nothing == 0
    same(known, whole)


def test_an_interruption_keeps_what_is_done(tmp_path):
    model, data = copy.deepcopy(trained()), digits()
    calls = []

    def impatient(module, args):
        calls.append(1)
        if len(calls) == 120:
            raise KeyboardInterrupt

    handle = model.linear2.register_forward_pre_hook(impatient)
    part = run(model, data, thresholds=3, records=tmp_path / 'run.jsonl')
    handle.remove()
    assert 0 < (part.dataset['state'].values >= 0).mean() < 1
    rows = part.table()
    assert len(rows) and (rows['n'] > 0).all()
    same(run(model, data, thresholds=3, records=tmp_path / 'run.jsonl'), run(model, data, thresholds=3))


@pytest.mark.parametrize('against', ['original', 'filtered'])
def test_an_error_leaves_the_network_as_it_was(against):
    model, calls = copy.deepcopy(residual()).train(), []
    before = copy.deepcopy(model.state_dict())

    def careless(model, x, y):
        calls.append(1)
        if len(calls) > (20 if against == 'filtered' else 2):
            raise ZeroDivisionError
        return x

    with pytest.raises((RuntimeError, ZeroDivisionError), match='ZeroDivisionError' if against == 'filtered' else None):
        run(model, told('residual')[1], {'careless': careless}, against=against)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(m.training for m in model.modules())


def test_a_saved_sweep_is_read_again(tmp_path):
    swept('digits_cnn').save(tmp_path / 'sweep.safetensors')
    same(Result.load(tmp_path / 'sweep.safetensors'), swept('digits_cnn'))


# --- inputs and networks as people have them ------------------------------------------------------------------------------


def small() -> nn.Module:
    with seeded(0):
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 10)).eval()


def spoilt(**how) -> DataSet:
    data = digits(8)
    x, y = data.x.clone(), data.y.clone()
    if 'pixel' in how:
        x[3, 0, 0, 0] = how['pixel']
    if 'label' in how:
        y[2] = how['label']
    return DataSet(x, y)


def weight_normed() -> nn.Module:
    model = small()
    nn.utils.parametrizations.weight_norm(model[1])
    return model


def computed_again() -> nn.Module:
    model = small()
    with torch.no_grad():
        model[1].weight[0, 0] = torch.nan
    return model


BAD = {
    'no images': ({'data': digits(8)[:0]}, ValueError, 'no (samples|images)|empty'),
    'pixel nan': ({'data': spoilt(pixel=torch.nan)}, ValueError, 'sample 3'),
    'pixel inf': ({'data': spoilt(pixel=torch.inf)}, ValueError, 'sample 3'),
    'pixel 255': ({'data': spoilt(pixel=255)}, ValueError, 'bounds'),
    'uint8': ({'data': ((digits(8).x * 255).byte(), digits(8).y)}, TypeError, '255'),
    'label too large': ({'data': spoilt(label=10)}, ValueError, 'labels run from .* to 10'),
    'label negative': ({'data': spoilt(label=-1)}, ValueError, 'labels run from -1'),
    'too few labels': ({'data': (digits(8).x, digits(8).y[:5])}, ValueError, '5'),
    'labels float': ({'data': (digits(8).x, digits(8).y.float())}, (TypeError, ValueError), 'float|integer|whole'),
    'no weights': ({'model': nn.Sequential(nn.Flatten(), nn.ReLU())}, ValueError, 'weights'),
    'no network': ({'model': lambda x: x}, TypeError, 'torch.nn.Module'),
    'parametrised': ({'model': weight_normed()}, ValueError, 'computed from other parameters'),
    'lazy': ({'model': nn.Sequential(nn.Flatten(), nn.LazyLinear(10))}, ValueError, 'no shape yet'),
    'weight nan': ({'model': computed_again()}, ValueError, 'NaN or infinite'),
    'one threshold': ({'thresholds': 1}, ValueError, 'from 2 on'),
    'no threshold': ({'thresholds': 0}, ValueError, 'from 2 on'),
    'half a threshold': ({'thresholds': 2.5}, ValueError, 'whole number'),
    'threshold in words': ({'thresholds': 'many'}, (TypeError, ValueError), 'thresholds'),
    'thresholds nan': ({'thresholds': [0, np.nan]}, ValueError, 'finite'),
    'empty thresholds': ({'thresholds': []}, ValueError, 'thresholds'),
    'filter': ({'filters': ['hihg']}, ValueError, "no filter 'hihg'; there are high, low"),
    'filter class': ({'filters': [High]}, TypeError, r'High\(\)'),
    'no filter': ({'filters': []}, ValueError, 'filter'),
    'two of one name': ({'filters': ['high', High()]}, ValueError, "two filters are called 'high'"),
    'grid': ({'grid': 'log'}, ValueError, "'value', 'quantile', 'rank'"),
    'scope': ({'scope': 'everywhere'}, ValueError, "'local', 'global'"),
    'against': ({'against': 'both'}, ValueError, "'original'.*'filtered'"),
    'norms': ({'norms': 'train'}, ValueError, "'eval'.*'batch'"),
    'where': ({'where': 'conv9'}, ValueError, 'conv9'),
    'samples': ({'samples': 0}, ValueError, 'samples'),
    'samples negative': ({'samples': -3}, ValueError, 'samples'),
    'tolerance': ({'tolerance': -0.1}, ValueError, 'tolerance'),
    'refine': ({'refine': -0.1}, ValueError, 'refine'),
    'stack': ({'stack': 0}, ValueError, 'stack'),
    'batch size': ({'batch_size': 0}, ValueError, 'batch_size'),
}


@pytest.mark.parametrize('case', BAD)
def test_what_is_wrong_is_refused_with_a_reason(case):
    how, kind, words = BAD[case]
    with pytest.raises(kind, match=words):
        run(**{'model': small(), 'data': digits(8), 'thresholds': 3, 'filters': ['high']} | how)


def test_layers_with_nothing_to_choose_from():
    model, x = small(), images(20)[0]
    with torch.no_grad():
        model[3].weight.fill_(0.25)  # all alike
    model.append(nn.Linear(10, 10, bias=False))
    model.append(nn.Unflatten(1, (1, 10)))
    model.append(nn.Conv1d(1, 1, 1))  # a single weight
    model.append(nn.Flatten())
    with torch.no_grad():
        data = DataSet(x, model(x).argmax(1))
    result = run(model, data)
    assert '6' in result.layers
    for layer in '3', '6':
        rows = result.table().query('layer == @layer')
        assert not rows[['position', 'threshold', 'removed', 'accuracy']].isna().any(axis=None)
        assert set(rows['removed']) <= {0, rows['removed'].max()}
        size = model.get_submodule(layer).weight.numel()
        assert rows.query("filter == 'pulse' and response == 'clean'")['removed'].sum() == size
        assert (rows.query("filter == 'high'")['removed'] == size).all()
    found = scores(result, resamples=100).dataset['value'].values
    assert np.isfinite(found).all()


def test_one_weight_in_two_places():
    with seeded(0):
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64, bias=False), nn.ReLU(), nn.Linear(64, 64, bias=False), nn.ReLU(),
                              nn.Linear(64, 10)).eval()
    model[3].weight = model[1].weight
    data = digits(30)
    for against in 'original', 'filtered':
        result = run(model, data, against=against)
        curves = literal(model, data.x, data.y, EPS, thresholds=5, against=against)
        equals_literal(result, curves)


def test_a_layer_that_is_used_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.again, self.last = nn.Linear(64, 32), nn.Linear(32, 32), nn.Linear(32, 10)

        def forward(self, x):
            x = self.first(x.flatten(1)).relu()
            return self.last(self.again(self.again(x).relu()).relu())

    with seeded(0):
        model = Twice().eval()
    data = digits(30)
    for against in 'original', 'filtered':
        result = run(model, data, against=against, thresholds=4)
        equals_literal(result, literal(model, data.x, data.y, EPS, thresholds=4, against=against))


def test_a_network_that_no_tracer_reads():
    class Capricious(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(64, 32), nn.Linear(32, 10)

        def forward(self, x):
            x = self.first(x.flatten(1))
            return self.last(x.relu() if float(x.detach().sum()) > 1e9 else x.tanh())

    with seeded(0):
        model = Capricious().eval()
    data = digits(30)
    result = run(model, data, thresholds=4)
    equals_literal(result, literal(model, data.x, data.y, EPS, thresholds=4))


def test_normalisation_inside():
    model, data = Normalized(trained(), 0.25, 0.5), digits(30)
    literal_curves = literal(model, data.x, data.y, EPS, thresholds=4, against='filtered')
    curves = {(layer.removeprefix('model.'), kind): curve for (layer, kind), curve in literal_curves.items()}
    equals_literal(run(model, data, thresholds=4, against='filtered'), curves)


def test_outputs_of_other_kinds():
    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = trained()

        def forward(self, x):
            return {'features': x, 'scores': self.net(x)}

    data = digits(30)
    plain = run(trained(), data, thresholds=3, where='linear2')
    for against in 'original', 'filtered':
        found = run(Several(), data, thresholds=3, where='net.linear2', logits='scores', against=against)
        assert found.layers == ['net.linear2'] and np.array_equal(found.accuracy[:, 0], plain.accuracy[:, 0])
    with seeded(0):
        single = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 1))
    halves = DataSet(data.x, (data.y > 4).long())
    result = run(single, halves, thresholds=3)
    assert set(np.unique(result.dataset['prediction'].values)) <= {0, 1}
    np.testing.assert_array_equal(predictions(result, '3', 'high')[-1, 0], int(single[3].bias > 0))


def test_a_plan_for_a_network_in_training():
    model = copy.deepcopy(residual()).train()
    plan(model, told('residual')[1], FGSM(EPS), thresholds=2, where='7', batch_size=20)
    assert all(m.training for m in model.modules())


def test_data_as_people_have_them():
    data = digits(50)
    plain = run(trained(), data, thresholds=3, where='linear2')
    pair = run(trained(), (data.x, data.y), thresholds=3, where='linear2')
    loader = run(trained(), DataLoader(TensorDataset(data.x, data.y), 11), thresholds=3, where='linear2')
    for other in pair, loader:
        np.testing.assert_array_equal(other.dataset['prediction'].values, plain.dataset['prediction'].values)


def test_a_perturbation_that_looks_into_the_network():
    seen = []

    def looking(model, x, y):
        with Probe(model, 'relu3') as probe:
            model(x)
        seen.append(float(probe['relu3'].mean()))
        return x

    run(trained(), digits(20), {'looking': looking}, thresholds=3, where='linear1', filters='high', against='filtered')
    assert len(set(seen)) == 4 and seen[-1] >= 0


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16], ids=str)
def test_other_precisions(dtype):
    model = copy.deepcopy(trained()).to(dtype)
    result = run(model, digits(40), thresholds=4, where=['conv2', 'linear2'])
    assert result.accuracy[0, 0] > 0.8 and result.dataset['prediction'].dtype == np.uint8
    for layer in 'conv2', 'linear2':
        w = model.get_submodule(layer).weight.detach().double()
        expected = [int((w <= a).sum()) for a in result.curve(layer, 'high')['threshold']]
        assert result.curve(layer, 'high')['removed'].tolist() == expected
    anew = run(model, digits(40), thresholds=2, where='linear2', against='filtered').dataset['prediction'].values
    np.testing.assert_array_equal(anew[0], result.dataset['prediction'].values[0], err_msg='the untouched network, attacked anew')
    if dtype == torch.float64:
        single = run(trained(), digits(40), thresholds=4, where=['conv2', 'linear2'])
        assert (result.dataset['removed'].values == single.dataset['removed'].values).all()


def test_only_clean_images():
    model, data = told('digits_cnn')
    result = sweep(model, data, thresholds=5, **QUIET)
    assert result.responses == ['clean']
    found, whole = (one.dataset['prediction'].values[:, 0] for one in (result, swept('digits_cnn')))
    np.testing.assert_array_equal(found, whole)


if __name__ == '__main__':
    torch.set_num_threads(1)
    noted_sweep(Path(sys.argv[1]), int(sys.argv[2]))
