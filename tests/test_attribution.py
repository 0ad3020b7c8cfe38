"""Attribution against Captum and against literal definitions, and everything that users may bring along.

This file is also the script that two processes run, see `in_two_processes`.
"""

import copy
import importlib.util
import json
import logging
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from robustnb import attribution
from robustnb.attribution import (
    METHODS,
    SCORES,
    Conductance,
    FeatureAblation,
    GradCam,
    GradientShap,
    IntegratedGradients,
    InternalInfluence,
    Method,
    Passes,
    Relevance,
    as_method,
    relevance,
    top_units,
    unit_relevance,
)
from robustnb.devices import sample_uniform, seeded
from robustnb.distributed import joined, rank
from robustnb.guard import Logits, Normalized
from robustnb.probes import Probe
from robustnb.results import Result

OURS = [code for code, method in METHODS.items() if not isinstance(method, str)]
PATHS = 'lc', 'ii', 'lig', 'lgs'
GOLDEN = {case['id']: case for case in json.loads((Path(__file__).parent / 'golden' / 'coverage.json').read_text())['cases']}


# --- networks -------------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    "A LeNet with functional activations."

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 4, 3)
        self.fc1, self.fc2 = nn.Linear(4, 8), nn.Linear(8, 5)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(torch.tanh(self.conv2(x)), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


class Residual(nn.Module):
    "Sums around layers, batch normalisation, work in place, and a layer that runs twice."

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.act = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.twice, self.head = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 5)

    def forward(self, x):
        x = self.act(self.norm(self.stem(x)))
        for _ in range(2):
            out = self.twice(x)
            out += x
            x = F.silu(out)
        return self.head(x.mean((2, 3)))


class Tokens(nn.Module):
    "A small transformer on rows of the image."

    def __init__(self):
        super().__init__()
        self.embed, self.first = nn.Linear(8, 6), nn.Parameter(torch.randn(1, 1, 6))
        self.block, self.head = nn.TransformerEncoderLayer(6, 2, 12, 0.0, batch_first=True), nn.Linear(6, 5)

    def forward(self, x):
        x = self.embed(x[:, 0])
        x = torch.cat([self.first.expand(len(x), -1, -1), x], 1)
        return self.head(self.block(x)[:, 0])


class Awkward(nn.Module):
    "Reads the number of samples in front of a layer and uses it behind."

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, x):
        batch, x = len(x), x[:, 0]
        x = torch.tanh(self.a(x)).reshape(batch, 48).view(-1, 8, 6)
        x = torch.tanh(self.b(x)).transpose(0, 1).reshape(8, batch * 6).view(8, batch, 6)
        kept = torch.zeros_like(x)
        kept[:] = x
        return self.out(kept.mean(0))


class Writes(nn.Module):
    "Writes what comes from a layer into a tensor made before it."

    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(64, 6), nn.Linear(70, 5)

    def forward(self, x):
        x = x.flatten(1)
        all_of_it = F.pad(x, (0, 6))
        all_of_it[:, 64:] = self.a(x)
        return self.out(torch.tanh(all_of_it))


NETS = {'small': Small, 'residual': Residual, 'tokens': Tokens, 'awkward': Awkward, 'writes': Writes}


@cache
def made(name):
    "A network, images of 8 x 8, and labels."
    with seeded(1):
        net = NETS[name]()
        if name == 'residual':
            net(torch.rand(32, 1, 8, 8))  # running statistics of its own
        return net.eval(), torch.rand(6, 1, 8, 8), torch.arange(6) % 5


def close(a, b, tolerance=1e-4):
    "Whether two tensors agree, relative to the largest of the second."
    assert a.shape == b.shape
    assert float((a - b).abs().max()) <= tolerance * float(b.abs().max()) + 1e-9, float((a - b).abs().max() / b.abs().max())


def captums(code, net, layer, x, y):
    "The same by Captum."
    from captum import attr

    if code == 'la':
        return attr.LayerActivation(net, layer).attribute(x)
    kind, options = {
        'lc': (attr.LayerConductance, {'n_steps': 20}),
        'ii': (attr.InternalInfluence, {'n_steps': 20}),
        'lig': (attr.LayerIntegratedGradients, {'n_steps': 20}),
        'lgxa': (attr.LayerGradientXActivation, {}),
        'lgc': (attr.LayerGradCam, {'attr_dim_summation': False}),
    }[code]
    return kind(net, layer).attribute(x.clone(), target=y, **options)


# --- each method equals Captum's ------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['small', 'residual', 'tokens'])
@pytest.mark.parametrize('code', ['lc', 'la', 'ii', 'lgxa', 'lgc', 'lig'])
def test_equals_captum(name, code):
    net, x, y = made(name)
    method = as_method(METHODS[code](steps=20) if code in ('lc', 'ii', 'lig') else code)
    found, compared = method(net, x, y), 0
    for layer, values in found.items():
        if '#' in layer or (code == 'lgc' and values.dim() == 3):  # Captum takes the last call of two, and axis 1 for channels
            continue
        close(values, captums(code, net, net.get_submodule(layer), x, y).detach())
        compared += 1
    assert compared >= (1 if code == 'lgc' else 2)


def test_gradient_shap_equals_captum_given_the_same_draws(monkeypatch):
    from captum.attr import LayerGradientShap

    net, x, y = made('small')
    method, ids = GradientShap(samples=4), torch.tensor([5, 0, 17, 3, 8, 1])
    draws = sample_uniform((4, 2), ids, 0, stream=1)[..., 0]
    monkeypatch.setattr(np.random, 'uniform', lambda low, high, size: draws.flatten().double().numpy())
    for layer, values in method(net, x, y, ids=ids).items():
        explainer = LayerGradientShap(net, net.get_submodule(layer))
        close(values, explainer.attribute(x, baselines=torch.zeros(1, 1, 8, 8), target=y, n_samples=4, stdevs=0.0).detach())


@pytest.mark.parametrize('name', ['small', 'tokens'])
@pytest.mark.parametrize('each', [False, True])
def test_feature_ablation_equals_captum(name, each):
    from captum.attr import LayerFeatureAblation

    net, x, y = made(name)
    found = FeatureAblation(each=each)(net, x, y)
    for layer in ('conv2', 'fc1') if name == 'small' else ('embed',):
        values = found[layer]
        if each:
            mask, share = None, 1
        elif values.dim() == 3:  # the features of tokens
            mask, share = torch.arange(values.shape[2]).expand(1, *values.shape[1:]), values.shape[1]
        else:
            places = values[0, 0].numel()
            mask = torch.arange(values.shape[1]).view(1, -1, *[1] * (values.dim() - 2)).expand(1, *values.shape[1:])
            share = places
        theirs = LayerFeatureAblation(net, net.get_submodule(layer)).attribute(x, target=y, layer_mask=mask)
        close(values * share, theirs.detach())


# --- and its definition, written down literally ---------------------------------------------------------------------------


def with_values(net, x, layer, values):
    "Logits with other values in one layer, one sample at a time and in one pass each."
    found = []
    for one, value in zip(x, values, strict=True):
        handle = net.get_submodule(layer).register_forward_hook(lambda module, args, out, value=value: value[None])
        found.append(net(one[None])[0])
        handle.remove()
    return torch.stack(found)


@pytest.mark.parametrize('name', ['small', 'tokens', 'awkward', 'writes'])
def test_integrated_gradients_literally(name):
    net, x, y = made(name)
    found, (places, weights) = IntegratedGradients(steps=5)(net, x, y), np.polynomial.legendre.leggauss(5)
    for layer, values in found.items():
        with torch.no_grad(), Probe(net, layer) as probe:
            net(torch.zeros_like(x))
            start = probe[layer].clone()
            net(x)
            end = probe[layer].clone()
        total = 0
        for place, weight in zip((places + 1) / 2, weights / 2, strict=True):
            point = (start + place * (end - start)).requires_grad_()
            score = with_values(net, x, layer, point).gather(1, y[:, None]).sum()
            total = total + weight * torch.autograd.grad(score, point)[0]
        close(values, total * (end - start))


@pytest.mark.parametrize('name', NETS)
def test_one_way_in_front_of_the_layer_is_enough_where_the_network_allows_it(name):
    net, x, y = made(name)
    shared = {'small': set(), 'residual': set(), 'tokens': set(), 'awkward': {'a', 'b'}, 'writes': {'a'}}[name]
    with attribution._lent(net):
        quick, slow = Passes(net, x, y), Passes(net, x, y, rows=1)  # point by point there is nothing to share
        few = IntegratedGradients(steps=4)
        for layer, values in few.attribute(quick).items():
            close(values, few.attribute(slow)[layer], 1e-5)
        assert quick._detours == shared and not slow._detours
        for layer, values in FeatureAblation().attribute(quick).items():
            close(values, FeatureAblation().attribute(slow)[layer], 1e-5)


def test_another_value_in_a_layer_that_runs_twice():
    net, x, y = made('residual')
    with attribution._lent(net), torch.no_grad():
        batch = Passes(net, x, y)
        for call in ('twice#0', 'twice#1'):
            own = batch.plain.values[call]
            close(batch.instead(call, own.clone()), batch.plain.logits, 1e-6)
            close(batch.instead(call, torch.cat([own, own])), batch.plain.logits.repeat(2, 1), 1e-6)
        moved = batch.instead('twice#0', batch.plain.values['twice#0'] + 1)
        assert not torch.equal(moved, batch.instead('twice#1', batch.plain.values['twice#1'] + 1))
        inputs = Passes(net, x, y, inputs=True)
        close(inputs.instead('inputs', x / 2), net(x / 2), 1e-6)


@pytest.mark.parametrize('name', ['small', 'residual'])
def test_conductance_and_influence_literally(name):
    net, x, y = made(name)
    places, weights = (np.polynomial.legendre.leggauss(6)[i] / 2 for i in (0, 1))
    points = [attribution.GradientXActivation(), attribution.Activation()]
    at = [[method(net, x * float(place + 0.5), y) for method in points] for place in places]
    slopes = [{n: v / at_[1][n] for n, v in at_[0].items()} for at_ in at]
    for layer, values in InternalInfluence(6)(net, x, y).items():
        close(values, sum(w * s[layer] for w, s in zip(weights, slopes, strict=True)).float(), 1e-3)
    for layer, values in Conductance(5)(net, x, y).items():
        close(values, sum(slopes[k][layer] * (at[k + 1][1][layer] - at[k][1][layer]) for k in range(5)), 1e-3)


def test_one_path_serves_two_methods_that_want_the_same_points(monkeypatch):
    net, x, y = made('small')
    passes = []
    monkeypatch.setattr(attribution, '_pass', lambda *args, old=attribution._pass: passes.append(len(args[1])) or old(*args))
    found = {}
    for steps in (13, 12):
        passes.clear()
        found[steps] = relevance(net, (x, y), {'lc': Conductance(12), 'ii': InternalInfluence(steps)}, show_progress=False)
        assert sum(passes) == 13 * 6 + (0 if steps == 13 else 12 * 6)
    rows = [one.dataset['signed'].values for one in found.values()]
    np.testing.assert_allclose(rows[0], rows[1], rtol=0.05, atol=0.05 * np.abs(rows[0]).max())


def test_completeness():
    "What a layer that everything passes is given adds up to the change of the logit."
    net, x, y = made('small')
    with torch.no_grad():
        change = (net(x) - net(torch.zeros_like(x))).gather(1, y[:, None])[:, 0]
    for method, tolerance in ((IntegratedGradients(200), 1e-2), (Conductance(400), 2e-2)):
        for values in method(net, x, y).values():
            close(values.flatten(1).sum(1), change, tolerance)


def test_random_and_shap_depend_on_seed_and_id_only():
    net, x, y = made('small')
    ids = torch.arange(6)
    for code in ('random', 'lgs'):
        whole, part = as_method(code)(net, x, y), as_method(code)(net, x[4:], y[4:], ids=ids[4:])
        for layer in whole:
            close(part[layer], whole[layer][4:], 1e-5)
    several = GradientShap(samples=3, baselines=torch.rand(4, 1, 8, 8))
    whole, part = several(net, x, y), several(net, x[4:], y[4:], ids=ids[4:])
    close(part['fc1'], whole['fc1'][4:], 1e-5)
    one, number = GradientShap(baselines=torch.full((1, 8, 8), 0.5))(net, x, y), GradientShap(baselines=0.5)(net, x, y)
    close(one['conv2'], number['conv2'], 1e-6)


def test_grad_cam_takes_the_units_of_tokens_from_the_last_axis():
    net, x, y = made('tokens')
    value, product = (as_method(code)(net, x, y)['embed'] for code in ('la', 'lgxa'))
    close(GradCam()(net, x, y)['embed'], value * (product / value).mean(1, keepdim=True))


@pytest.mark.filterwarnings('error')
def test_captums_own_classes_as_a_method():
    from captum.attr import LayerDeepLift

    def theirs(model, x, target, layers):
        return {name: LayerDeepLift(model, model.get_submodule(name)).attribute(x, 0 * x, target=target) for name in layers}

    with seeded(0):
        net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 8), nn.ReLU(), nn.Linear(8, 5)).eval()
    _, x, y = made('small')
    with torch.no_grad():
        found, ours = (as_method(method)(net, x, y) for method in (theirs, 'ldl'))
    for layer, values in ours.items():
        close(values, found[layer])


# --- over a data set ------------------------------------------------------------------------------------------------------


def small_data(n=13):
    "More images, and the labels."
    net, *_ = made('small')
    return net, sample_uniform((1, 8, 8), torch.arange(n), seed=3), torch.arange(n) % 5


@cache
def all_of_them():
    "All methods of this module over 13 images."
    net, x, y = small_data()
    return relevance(net, (x, y), few_steps(), by_class=True, show_progress=False)


def few_steps():
    "All methods of this module, quickly."
    return {code: METHODS[code](steps=6) if code in ('lc', 'ii', 'lig') else as_method(code) for code in OURS}


@pytest.mark.parametrize('batch_size', [1, 4])
def test_the_size_of_the_batches_does_not_matter(batch_size):
    net, x, y = small_data()
    found = relevance(net, (x, y), few_steps(), by_class=True, batch_size=batch_size, rows=8, show_progress=False)
    for name, values in all_of_them().dataset.data_vars.items():
        for ours, theirs in zip(found.dataset[name].values, values.values, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max(), err_msg=name)


def test_means_over_images_and_classes():
    net, x, y = small_data()
    found = all_of_them()
    for number, code in enumerate(found.dataset['method'].values.tolist()):
        rows = torch.cat([*unit_relevance(net, few_steps()[code](net, x, y)).values()], 1).double().numpy()
        one = found.dataset.isel(method=number)
        for name, values in (('signed', rows.mean(0)), ('absolute', np.abs(rows).mean(0)), ('spread', rows.std(0))):
            np.testing.assert_allclose(one[name], values, rtol=1e-3, atol=1e-5 * np.abs(values).max(), err_msg=f'{code} {name}')
        np.testing.assert_allclose(one['class_signed'][3], rows[y == 3].mean(0), rtol=1e-3, atol=1e-5 * np.abs(rows).max())
        assert one['members'].values.tolist() == [3, 3, 3, 2, 2]


def test_loaders_and_generators_give_the_same():
    net, x, y = small_data()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=5)
    for data in (loader, ((x[i : i + 3], y[i : i + 3]) for i in range(0, 13, 3))):
        found = relevance(net, data, ['lgxa', 'random'], show_progress=False)
        for ours, code in zip(found.dataset['signed'].values, ('lgxa', 'random'), strict=True):
            theirs = all_of_them().dataset['signed'].values[OURS.index(code)]
            np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize('target', ['prediction', 2, np.int64(2)])
def test_targets(target):
    net, x, y = small_data()
    found = relevance(net, (x, y), 'lgxa', target=target, show_progress=False)
    classes = net(x).argmax(1) if target == 'prediction' else torch.full((13,), 2)
    other = relevance(net, (x, classes), 'lgxa', show_progress=False)
    np.testing.assert_allclose(found.dataset['signed'], other.dataset['signed'], atol=1e-9)


def test_only_images_that_are_classified_correctly():
    net, x, _ = small_data()
    y = net(x).argmax(1)
    wrong = torch.where(torch.arange(13) < 9, y, (y + 1) % 5)
    found = relevance(net, (x, wrong), ['lgxa', 'lc'], correct_only=True, show_progress=False)
    other = relevance(net, (x[:9], y[:9]), ['lgxa', 'lc'], show_progress=False)
    np.testing.assert_allclose(found.dataset['signed'], other.dataset['signed'], rtol=1e-4, atol=1e-7)
    assert found.settings['images'] == 9
    with pytest.raises(ValueError, match='no image is classified correctly'):
        relevance(net, (x, (y + 1) % 5), 'lgxa', correct_only=True, show_progress=False)


def test_every_place_a_unit():
    net, x, y = small_data()
    found = relevance(net, (x, y), ['la', 'lfa', 'lgc'], reduce='all', show_progress=False)
    assert found.layers == {'conv1': 192, 'conv2': 16, 'fc1': 8, 'fc2': 5}
    for whole, places in zip([OURS.index(c) for c in ('la', 'lfa', 'lgc')], found.dataset['signed'].values, strict=True):
        np.testing.assert_allclose(
            places[:192].reshape(3, 64).sum(1), all_of_them().dataset['signed'].values[whole][:3], atol=1e-5
        )


def test_an_interrupted_run_keeps_what_is_done(caplog):
    net, x, y = small_data()
    before = copy.deepcopy(net.state_dict())

    def stream(stop):
        for i in range(0, 12, 4):
            if i == stop:
                raise KeyboardInterrupt
            yield x[i : i + 4], y[i : i + 4]

    found = relevance(net, stream(8), ['lgxa', 'lc'], show_progress=False)
    other = relevance(net, (x[:8], y[:8]), ['lgxa', 'lc'], show_progress=False)
    assert 'the result holds the 8 images that were done' in caplog.text and found.settings['images'] == 8
    np.testing.assert_allclose(found.dataset['signed'], other.dataset['signed'], atol=1e-7)
    with pytest.raises(KeyboardInterrupt):
        relevance(net, stream(0), 'lgxa', show_progress=False)
    calls = []

    def tired(model, x, target, layers):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return {'fc1': torch.ones(len(x), 8), 'fc2': torch.ones(len(x), 5)}

    found = relevance(net, (x, y), {'lgxa': 'lgxa', 'own': tired}, where=['fc1', 'fc2'], batch_size=4, show_progress=False)
    assert found.settings['images'] == 4, 'a batch counts for all methods, or for none'
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))
    assert not any(module._forward_hooks for module in net.modules()) and all(p.requires_grad for p in net.parameters())


# --- whatever users bring along -------------------------------------------------------------------------------------------


@pytest.mark.parametrize('code', OURS)
@pytest.mark.parametrize('kind', ['float64', 'bfloat16', 'one logit', 'no grad mode', 'frozen', 'normalized', 'training mode'])
def test_kinds_of_models(code, kind):
    net, x, y = small_data(5)
    net, method = copy.deepcopy(net), few_steps()[code]
    rows = relevance(net, (x, y), {code: method}, target=1, show_progress=False).dataset['signed'].values
    if kind == 'one logit':
        last, net = net, copy.deepcopy(net)
        net.fc2 = nn.Linear(8, 1)
        net.fc2.weight.data, net.fc2.bias.data = last.fc2.weight.data[1:2], last.fc2.bias.data[1:2]
    if kind == 'normalized':
        net = Normalized(net, (0.0,), (1.0,))
    if kind == 'frozen':
        net.requires_grad_(False)
    net = net.to(getattr(torch, kind, torch.float32)).train(kind == 'training mode')
    with torch.set_grad_enabled(kind != 'no grad mode'):
        found = relevance(net, (x, y.clamp(max=1)), {code: method}, target=1, show_progress=False).dataset['signed'].values
    shared = 15 if kind == 'one logit' else 20  # units of conv1, conv2 and fc1; the last layer is another one
    tolerance = 0.1 if kind == 'bfloat16' else 1e-4
    np.testing.assert_allclose(found[0, :shared], rows[0, :shared], atol=tolerance * np.abs(rows).max())


def test_compiled_and_wrapped_models():
    net, x, y = small_data(5)
    rows = relevance(net, (x, y), ['lig', 'lgxa'], show_progress=False).dataset['signed'].values
    for other, logits in ((torch.compile(net, backend='eager'), None), (Logits(net), None), (Several(net), 'answer')):
        found = relevance(other, (x, y), ['lig', 'lgxa'], logits=logits, show_progress=False)
        np.testing.assert_allclose(found.dataset['signed'].values, rows, atol=1e-6)


class Several(nn.Module):
    "A network that gives a dictionary."

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return {'other': x, 'answer': self.net(x)}


def test_functional_activations():
    net, x, y = small_data(5)
    found = relevance(net, (x, y), few_steps(), where='activations', show_progress=False)
    assert found.layers == {'relu()#0': 3, 'tanh()': 4, 'relu()#1': 8}
    for code, values in few_steps().items():
        if code not in ('random',):
            assert values(net, x, y, where='activations')['relu()#1'].shape == (5, 8), code


def test_numbers_of_words():
    with seeded(0):
        net = nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 3)).eval()
    x, y = torch.arange(12).reshape(4, 3) % 10, torch.arange(4) % 3
    methods = ['la', 'lgxa', 'lgc', 'lig', 'lfa', 'random']
    found = relevance(net, (x, y), methods, where=['0', '2', '4'], show_progress=False)
    assert found.layers == {'0': 4, '2': 6, '4': 3} and np.isfinite(found.dataset['signed'].values).all()
    for code in ('lc', 'ii', 'lgs'):
        with pytest.raises(TypeError, match='whole numbers there'):
            relevance(net, (x, y), code, show_progress=False)


def test_inputs_as_a_layer():
    net, x, y = made('small')
    for code, method in few_steps().items():
        found = method(net, x, y, inputs=True)
        assert [*found][0] == 'inputs' and found['inputs'].shape == x.shape, code


class OwnWay(nn.Module):
    "A network that does something unusual."

    def __init__(self, way):
        super().__init__()
        self.way, self.a, self.b, self.spare = way, nn.Linear(64, 6), nn.Linear(6, 5), nn.Linear(6, 5)

    def forward(self, x):
        hidden = self.a(x.flatten(1))
        if self.way == 'in place':
            hidden.neg_()
        elif self.way == 'part in place':
            hidden[:, 0] = 0
        elif self.way == 'time first':
            return self.b(torch.relu(self.a(x.flatten(1)[None].expand(3, -1, -1)))).mean(0)
        elif self.way == 'no grad':
            with torch.no_grad():
                return self.b(torch.relu(hidden))
        elif self.way == 'detach':
            hidden = hidden.detach()
        elif self.way == 'nan':
            hidden = hidden * float('nan')
        elif self.way == 'maps':
            return x.expand(-1, 5, -1, -1) * self.b(hidden)[:, :, None, None]
        elif self.way == 'boxes':
            return [{'boxes': one, 'scores': one} for one in self.b(hidden)]
        return self.b(torch.relu(hidden))


@pytest.mark.parametrize('way, error, words', [
    ('in place', ValueError, 'what an operation in place leaves behind'),
    ('part in place', ValueError, 'the network writes into what a returned'),
    ('time first', ValueError, 'samples have to come first, and for a batch of .* a#1 gives .3, '),
    ('boxes', ValueError, 'for a batch of 6 this model gives .5,'),
    ('maps', ValueError, 'logits of shape'),
])  # fmt: skip
def test_models_that_cannot_be_explained_say_why(way, error, words):
    _, x, y = made('small')
    for code in ('lgxa', 'lc'):
        with pytest.raises(error, match=words):
            relevance(OwnWay(way).eval(), (x, y), code, show_progress=False)


def test_layers_without_a_word_to_say(caplog):
    _, x, y = made('small')
    for way in ('detach', 'no grad'):
        caplog.clear()
        found = relevance(OwnWay(way).eval(), (x, y), 'lgxa', where=['a', 'b'], show_progress=False)
        assert 'lgxa: the relevance of all units of a is 0' in caplog.text and found.layers == {'a': 6, 'b': 5}
    with pytest.raises(ValueError, match='no derivative'):
        relevance(OwnWay('no grad').eval(), (x, y), 'lgxa', where='a', show_progress=False)
    caplog.clear()
    relevance(OwnWay('nan').eval(), (x, y), 'lgxa', where=['a', 'b'], show_progress=False)
    assert 'the relevance is not a number for 6 units of a, 5 units of b' in caplog.text
    caplog.clear()
    relevance(OwnWay('plain').eval(), (x, y), 'lgxa', show_progress=False)
    assert 'spare' in caplog.text and 'does not run' in caplog.text
    with pytest.raises(ValueError, match='chooses no layer'):
        relevance(OwnWay('plain').eval(), (x, y), 'lgxa', where='spare', show_progress=False)


@pytest.mark.parametrize('change, words', [
    ({'target': 'mine'}, "target is 'label', 'prediction'"),
    ({'target': 5}, "target is 'label', 'prediction', or the number of a class, 0 to 4"),
    ({'target': True}, "target is 'label'"),
    ({'reduce': 'mean'}, "reduce is 'sum' or 'all'"),
    ({'methods': []}, 'no method'),
    ({'methods': ['lc', 'lc']}, 'the same one twice'),
    ({'where': 'nothing'}, 'chooses no layer'),
    ({'data': (torch.rand(0, 1, 8, 8), torch.zeros(0).long())}, 'empty'),
    ({'data': []}, 'empty'),
    ({'data': (torch.rand(2, 1, 8, 8), torch.tensor([0, 5]))}, 'the model knows 0 to 4'),
    ({'data': (torch.rand(2, 1, 8, 8), torch.tensor([-1, -1]))}, "Without labels, .* target='prediction'"),
    ({'data': (torch.full((2, 1, 8, 8), torch.nan), torch.tensor([0, 4]))}, 'NaN or infinity'),
    ({'methods': Conductance(baseline=torch.zeros(3))}, 'the baseline has shape'),
])  # fmt: skip
def test_bad_input(change, words):
    net, x, y = made('small')
    given = {'data': (x, y), 'methods': 'lgxa', 'show_progress': False} | change
    with pytest.raises(ValueError, match=words):
        relevance(net, **given)


@pytest.mark.parametrize('make, error, words', [
    (lambda: Conductance(steps=0), ValueError, 'steps'),
    (lambda: IntegratedGradients(steps=2.5), ValueError, 'steps'),
    (lambda: GradientShap(samples=True), ValueError, 'samples'),
    (lambda: as_method('lime'), KeyError, 'no method'),
    (lambda: as_method(3), TypeError, 'a method is a code'),
    (lambda: Method().attribute(None), TypeError, 'base class'),
    (lambda: as_method('la')(*made('small')[:2], target=7), ValueError, 'labels run from 7 to 7'),
    (lambda: as_method(lambda *a: {})(*made('small')), ValueError, 'got nothing'),
    (lambda: as_method(lambda m, x, y, layers: {n: torch.ones(2, 2) for n in layers})(*made('small')), ValueError, 'got .2, 2'),
])  # fmt: skip
def test_bad_methods(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_other_layers_for_other_images():
    class Fickle(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.out = nn.Linear(64, 4), nn.Linear(64, 4), nn.Linear(4, 5)

        def forward(self, x):
            return self.out((self.a if x[0, 0, 0, 0] < 0.5 else self.b)(x.flatten(1)))

    x = torch.tensor([0.1, 0.9])[:, None, None, None].expand(2, 1, 8, 8).clone()
    with pytest.raises(ValueError, match='Choose layers that always run'):
        relevance(Fickle().eval(), (x, torch.tensor([0, 1])), 'lgxa', batch_size=1, show_progress=False)


# --- the result -----------------------------------------------------------------------------------------------------------


def test_golden_choice():
    case = GOLDEN['select_top_all']
    expected = case['expected']['WISDOM']
    assert top_units(case['inputs'], case['params']['m']) == expected
    assert top_units(case['inputs'], case['params']['m'], skip=[case['params']['filter_layer']]) == expected


def test_top_units(caplog):
    scores = {'a': [3.0, 1.0, 2.0], 'b': [2.5, float('nan')], 'c': [9.0]}
    assert top_units(scores, 2) == {'a': [0], 'b': [0]} and top_units(scores, 1, skip=0) == {'c': [0]}
    assert top_units(scores, 2, per='layer') == {'a': [0, 2], 'b': [0, 1]}
    assert top_units(scores, 3, per='layer', skip=['b', 'c']) == {'a': [0, 2, 1]}
    for bad, words in (({'m': 0}, 'at least 1'), ({'m': 9}, 'have 5 units'), ({'m': 1, 'per': 'x'}, "'net' or 'layer'"),
                       ({'m': 1, 'skip': 3}, 'no layer is left'), ({'m': 1, 'skip': ['z']}, "no layer 'z'")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            top_units(scores, **bad)
    caplog.clear()
    attribution._say_once.cache_clear()
    for _ in range(2):
        assert top_units({'a': [1.0, 2.0, 1.0, 1.0], 'b': [0.0]}, 2) == {'a': [1, 0]}
    assert caplog.text.count('3 units of the network have the same score as number 2 of the best') == 1
    assert top_units({'a': [1.0, float('nan')]}, 2, skip=0) == {'a': [0, 1]} and 'a score that is a number' in caplog.text
    assert top_units({'a': [1.0], 'b': [1.0]}, 2, per='layer') == {'a': [0]} and 'fewer than m=2' in caplog.text


def test_words_of_scores():
    signed, absolute = np.array([-1.0, 2.0, 0.0, 1.0]), np.array([3.0, 2.0, 0.0, 3.0])
    found = {how: score(signed, absolute).tolist() for how, score in SCORES.items()}
    assert found == {'signed': [-1, 2, 0, 1], 'absolute': [3, 2, 0, 3], 'share': [-0.125, 0.25, 0, 0.125],
                     'relative': [-0.5, 1, 0, 0.5], 'rank': [0.25, 1, 0.5, 0.75]}  # fmt: skip
    holes = np.array([np.nan, 1.0, 3.0])
    assert SCORES['share'](holes, holes)[1:].tolist() == [0.25, 0.75]
    assert np.isnan(SCORES['rank'](holes, holes)[0]) and SCORES['rank'](holes, holes)[2] == pytest.approx(2 / 3)
    assert SCORES['share'](np.zeros(2), np.zeros(2)).tolist() == [0, 0]


def test_table_and_files(tmp_path):
    found = all_of_them()
    table = found.table()
    assert [*table] == ['method', 'layer', 'index', 'signed', 'absolute', 'spread', 'share', 'relative', 'rank']
    assert len(table) == len(OURS) * 20
    sums = table.groupby(['method', 'layer'])[['signed', 'absolute', 'share']].sum()
    np.testing.assert_allclose(sums['share'], sums['signed'] / sums['absolute'])
    np.testing.assert_allclose(table['relative'], table['share'] * table['layer'].map(SIZES))
    row = table[(table.method == 'lc') & (table.layer == 'fc1') & (table['index'] == 3)].iloc[0]
    assert row['relative'] == found.scores(method='lc')['fc1'][3] and row['signed'] == found.scores('signed', 'lc')['fc1'][3]
    found.save(tmp_path / 'relevance.safetensors')
    for other in (Relevance.load(tmp_path / 'relevance.safetensors'), Result.load(tmp_path / 'relevance.safetensors')):
        assert type(other).__name__ == 'Relevance' and other.table().equals(table) and other.layers == found.layers
        assert other.settings == found.settings and other.top(3, label=2, method='ii') == found.top(3, label=2, method='ii')
    assert 'conv1' in found._repr_html_() and 'Conductance(steps=6' in str(found.settings['methods'])


def test_which_units_methods_agree_about():
    found = all_of_them()
    whole, top = found.agreement(), found.agreement(4)
    for table in (whole, top):
        assert table.shape == (len(OURS),) * 2 and np.allclose(table, table.T) and np.allclose(np.diag(table), 1)
    assert whole.loc['lc', 'lig'] > 0.8 and top.to_numpy().min() >= 0 and set(np.unique(top * 4) % 1) == {0}
    same = relevance(*data_of(3), {'a': 'lgxa', 'b': 'lgxa'}, show_progress=False)
    assert all((values == 0).all() for values in same.variance().values()) and same.agreement().to_numpy().min() == 1
    spread = found.variance()
    rows = np.stack([found.scores('rank', code)['fc1'] for code in OURS if code != 'random'])
    np.testing.assert_allclose(spread['fc1'], rows.var(0))
    assert spread['fc1'].shape == (8,) and found.variance(methods=['lc', 'random'])['fc1'].max() <= 0.25
    with pytest.raises(ValueError, match='needs at least two'):
        relevance(*data_of(3), 'lgxa', show_progress=False).variance()
    flat = relevance(*data_of(3), {'a': lambda m, x, y, n: {k: torch.ones(len(x), u) for k, u in SIZES.items()}, 'b': 'lgxa'},
                     show_progress=False).agreement()  # fmt: skip
    assert np.isnan(flat.loc['a', 'b']), 'a method that tells no difference agrees with nothing'


SIZES = {'conv1': 3, 'conv2': 4, 'fc1': 8, 'fc2': 5}


def data_of(n):
    "Network and data."
    net, x, y = small_data(n)
    return net, (x, y)


def test_pictures():
    found = all_of_them()
    for figure in (found.plot(), found.plot(4, 'lfa', label=1, skip=0, title='mine'), found.plot(500, 'random')):
        figure.canvas.draw()
        assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [*SCORES, 'by chance']


def test_asking_for_what_is_not_there():
    found = all_of_them()
    few = relevance(*data_of(3), 'lgxa', by_class=True, show_progress=False)
    for ask, error, words in (
        (lambda: found.scores('size'), ValueError, "how='size'"),
        (lambda: found.scores(method='lrp'), KeyError, "no method 'lrp' here"),
        (lambda: few.scores(label=4), ValueError, 'class 4 never occurs among the 3 images'),
        (lambda: few.scores(label=9), ValueError, 'class 9 never occurs'),
        (lambda: relevance(*data_of(3), 'lgxa', show_progress=False).top(1, label=1), ValueError, 'by_class=True'),
        (lambda: found.top(99), ValueError, 'm=99'),
    ):
        with pytest.raises(error, match=words):
            ask()
    assert found.scores(lambda signed, absolute: -signed)['fc1'][0] == -found.scores('signed')['fc1'][0]


# --- two processes --------------------------------------------------------------------------------------------------------

CASES = {'uneven': 13, 'one sample': 1}


def over_two(case):
    "Relevance with batches of 4, of which each process takes every other one."
    net, x, y = small_data(CASES[case])
    found = relevance(net, (x, y), few_steps(), by_class=True, batch_size=4, show_progress=False)
    return {name: values.values.tolist() for name, values in found.dataset.data_vars.items()} | {'settings': found.settings}


def work(folder):
    "What each of the two processes does."
    torch.set_num_threads(1)
    with joined('cpu', timeout=60):
        (folder / f'found{rank()}.json').write_text(json.dumps({case: over_two(case) for case in CASES}))


@pytest.mark.parametrize('case', CASES)
def test_two_processes_equal_one(case, in_two_processes):
    one, both = over_two(case), [json.loads((in_two_processes / f'found{n}.json').read_text())[case] for n in (0, 1)]
    assert both[0] == both[1] and both[0]['settings'] == json.loads(json.dumps(one['settings']))
    for name in one:
        if name != 'settings':
            for ours, theirs in zip(both[0][name], one[name], strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max(), err_msg=name)


# --- XLA ------------------------------------------------------------------------------------------------------------------

SCRIPT = """
import copy, json, sys
import torch_xla, torch
sys.path.insert(0, sys.argv[1])
from test_attribution import Residual, few_steps, made
from robustnb.attribution import relevance
from robustnb.devices import compile_count, pick_device

net, x, y = made('residual')
x, y, methods = torch.cat([x, x[:2]]), torch.cat([y, y[:2]]), few_steps()
there, seen, found = copy.deepcopy(net).to(pick_device('xla')), [], []
for other in (net, there):
    found.append(relevance(other, (x, y), methods, ['stem', 'head'], by_class=True, batch_size=4, show_progress=False).dataset)
apart = {name: float(abs(values - found[1][name]).max() / abs(values).max()) for name, values in found[0].data_vars.items()}
for seed in (1, 2, 3, 4):
    relevance(there, (x, y), methods, ['stem', 'head'], batch_size=4, seed=seed, show_progress=False)
    seen.append(compile_count())
print(json.dumps([apart, seen]))
"""


@pytest.mark.skipif(importlib.util.find_spec('torch_xla') is None, reason='torch_xla is not installed')
def test_xla_equals_the_cpu_and_compiles_once(tmp_path):
    ran = subprocess.run([sys.executable, '-c', SCRIPT, str(Path(__file__).parent)], capture_output=True, text=True, timeout=600,
                         cwd=tmp_path, env=os.environ | {'PJRT_DEVICE': 'CPU'})  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    apart, seen = json.loads(ran.stdout.splitlines()[-1])
    assert max(apart.values()) < 1e-4, apart
    # On a busy machine something may still be on its way when a program is cut off, and makes one more of it, once. A program
    # that knew its seed would be compiled for each of the seeds and methods.
    assert seen[-1] - seen[0] <= 1, f'compiled again for another seed: {seen}'


if __name__ == '__main__':
    logging.disable()
    work(Path(sys.argv[1]))


@pytest.mark.parametrize('code', METHODS)
def test_a_batch_without_samples(code, caplog):
    "It is an error where it is all there is, and is passed over among others."
    with seeded(0):
        net, x, y = Small().eval(), torch.rand(4, 1, 8, 8), torch.arange(4)
    with pytest.raises(ValueError, match='the batch is empty'):
        as_method(code)(net, x[:0])
    some = relevance(net, [(x[:0], y[:0]), (x, y), (x[:0], y[:0])], code, show_progress=False)
    assert some.settings['images'] == 4
    np.testing.assert_array_equal(some.dataset['signed'], relevance(net, [(x, y)], code, show_progress=False).dataset['signed'])
    with pytest.raises(ValueError, match='the data set is empty'):
        relevance(net, [(x[:0], y[:0])], code, show_progress=False)


@pytest.mark.parametrize('code', [code for code in METHODS if code not in ('lc', 'ii')])
def test_half_precision(code):
    with seeded(0):
        net, x, y = Small().eval(), torch.rand(4, 1, 8, 8), torch.arange(4)
    whole, half = (relevance(net.to(kind), (x.to(kind), y), code, show_progress=False).dataset['absolute'].values
                   for kind in (torch.float32, torch.float16))
    assert np.isfinite(half).all() and np.abs(half - whole).max() < 0.03 * whole.max()
