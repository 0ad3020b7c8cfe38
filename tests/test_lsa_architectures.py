"""Architectures that differ in what their layers return, through all of layer sustainability analysis, without special cases."""

import copy
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from robustnb.amplification import decompose
from robustnb.attacks import FGSM, PGD
from robustnb.data import Batch
from robustnb.devices import seeded
from robustnb.guard import first_tensor, unwrap
from robustnb.inside import look_inside
from robustnb.layerwise import LayerRegularizer
from robustnb.lsa import compare, layer_sustainability
from robustnb.models import build
from robustnb.noises import Gaussian
from robustnb.vulnerable import most_vulnerable


class Classifier(nn.Module):
    "Reads the rows of an image as a sequence; its LSTM returns tuples, and it returns a dictionary."

    def __init__(self):
        super().__init__()
        self.lstm, self.act, self.head = nn.LSTM(28, 24, num_layers=2, batch_first=True), nn.Tanh(), nn.Linear(24, 5)

    def forward(self, x):
        states, (hidden, _) = self.lstm(x[:, 0])
        return {'states': states, 'logits': self.head(self.act(hidden[-1]))}


def transformer() -> nn.Module:
    from torchvision.models import VisionTransformer

    model = VisionTransformer(
        image_size=32, patch_size=8, num_layers=3, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=5
    )
    nn.init.normal_(
        model.heads.head.weight, std=0.2
    )  # torchvision starts it at zero, which leaves an attack no gradient
    return model


def detector() -> nn.Module:
    from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_fpn

    return fasterrcnn_mobilenet_v3_large_fpn(
        weights=None, weights_backbone=None, num_classes=5, min_size=64, max_size=64, rpn_post_nms_top_n_test=20
    )


def one_logit() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 16), nn.ELU(), nn.Linear(16, 8), nn.ELU(), nn.Linear(8, 1))


def scores(output: list[dict]) -> torch.Tensor:
    "How sure a detector is of what it finds, one number for each image."
    return torch.stack([found['scores'].sum() for found in output])


def vanish(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    "A loss that is large when nothing is found."
    return -logits


def blind(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    "An attack of one's own, on the feature pyramid rather than on the output: one step that makes the features small."
    start = x.clone().requires_grad_()
    features = unwrap(model).backbone(start)  # `logits=` wraps the model
    (gradient,) = torch.autograd.grad(sum(f.square().sum() for f in features.values()), start)
    return (x - 0.05 * gradient.sign()).clamp(0, 1)


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]  # of an input
    attacks: dict
    where: object
    layers: int  # how many `where` chooses
    one: int  # the number of the one that is looked into and held still
    classes: int = 5
    more: dict = {}


CASES = {
    'ViT': Case(transformer, (3, 32, 32), {'FGSM': FGSM(0.05)}, 'blocks', 3, 1),
    'ViT, activations': Case(transformer, (3, 32, 32), {'FGSM': FGSM(0.05)}, 'activations', 3, 0),
    'ResNet-18': Case(partial(build, 'resnet18', classes=5), (3, 16, 16), {'FGSM': FGSM(0.05)}, 'activations', 17, 3),
    'LSTM': Case(Classifier, (1, 28, 28), {'PGD': PGD(0.1, steps=2)}, ['lstm', 'act'], 2, 0),
    'one logit': Case(one_logit, (2,), {'PGD': PGD(0.1, steps=2)}, 'activations', 2, 1, classes=2),
    'detector': Case(
        detector,
        (3, 64, 64),
        {'own': blind, 'vanish': FGSM(0.05, loss=vanish)},
        'blocks',
        24,
        2,
        more={'logits': scores},
    ),
}


@cache
def network(name: str) -> nn.Module:
    "Random weights."
    with seeded(0):
        model = CASES[name].make()
    return model.eval()


def data(name: str, n: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.rand(n, *CASES[name].shape, generator=torch.Generator().manual_seed(0))
    return x, torch.arange(n) % CASES[name].classes


@cache
def profile(name: str):
    "The result that all tests look at, of the attacks and of a noise."
    case = CASES[name]
    perturbations = {'noise': Gaussian(0.1), **case.attacks}
    return layer_sustainability(
        network(name), data(name), perturbations, where=case.where, show_progress=False, **case.more
    )


def representation(name: str, layer: str, x: torch.Tensor) -> torch.Tensor:
    "What a layer returns for a batch, by a plain hook; the call that the name means, if the layer runs several times."
    module, _, call = layer.partition('#')
    kept = []
    handle = (
        network(name)
        .get_submodule(module)
        .register_forward_hook(
            lambda module, args, output: kept.append(first_tensor(output).double().flatten(1).clone())
        )
    )
    with torch.no_grad():
        network(name)(x)
    handle.remove()
    return kept[int(call or 0)]


def state(model: nn.Module) -> list:
    "Modes, hooks, gradients, and how often each parameter was written into."
    return [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] + [
        (p.requires_grad, p.grad, p._version) for p in model.parameters()
    ]


@pytest.mark.parametrize('name', CASES)
def test_a_profile(name):
    result, table = profile(name), profile(name).table()
    assert len(result.layers) == CASES[name].layers
    assert (table['mean'] > 0).all() and np.isfinite(table['mean']).all()
    assert (table.undefined == 0).all() and (table.n == 3).all()
    (x, y), noise = data(name), Gaussian(0.1)
    for layer in (result.layers[0], result.layers[-1]):
        if layer.endswith(')'):  # a function: no hook reaches it
            continue
        clean, pert = (representation(name, layer, v) for v in (x, noise(network(name), x, y)))
        expected = (pert - clean).norm(dim=1) / clean.norm(dim=1)
        found = result.dataset['value'].sel(layer=layer, perturbation='noise').values
        np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize('name', CASES)
def test_pairs_made_elsewhere(name):
    x, y = data(name)
    before = state(network(name))
    found = compare(
        network(name), x, Gaussian(0.1)(network(name), x, y), where=CASES[name].where, batch_size=4, **CASES[name].more
    )
    assert state(network(name)) == before
    expected = profile(name).dataset['value'].sel(perturbation='noise')
    np.testing.assert_allclose(found.dataset['value'].values[:, 0], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('name', CASES)
def test_the_most_vulnerable_layers(name):
    result = profile(name)
    attack = result.perturbations[1]
    found = most_vulnerable(result, 'topk', attack, k=1, resamples=20)
    means = result.table().query('perturbation == @attack')
    assert found.layers == [means.layer.iloc[means['mean'].argmax()]] and len(found.ranking) == len(result.layers)
    above = most_vulnerable(result, 'above_noise', attack, noise='noise', resamples=0)
    assert sorted(above.ranking.layer) == sorted(result.layers)


@pytest.mark.parametrize('name', CASES)
def test_inside_a_layer(name):
    layer = profile(name).layers[CASES[name].one]
    found = look_inside(network(name), data(name), Gaussian(0.1), layer, show_progress=False, **CASES[name].more)
    table = found.table()
    assert found.layer == layer and table.share.sum() == pytest.approx(1, abs=1e-3)
    length = np.sqrt((found.dataset['change'].values.astype(float) ** 2).sum(-1)).squeeze()
    np.testing.assert_allclose(length, profile(name).dataset['size'].sel(layer=layer, perturbation='noise'), rtol=2e-3)


@pytest.mark.parametrize('name', CASES)
def test_inherited_and_created(name):
    table = decompose(profile(name)).table()
    assert set(profile(name).layers) <= set(table.iloc[:, :3].to_numpy().ravel().tolist())


@pytest.mark.parametrize('name', CASES)
def test_a_regularizer(name):
    "It has a gradient at the weights before the layer, and a small step against it lowers what is measured."
    model, (x, y) = copy.deepcopy(network(name)), data(name)
    layer, x_adv = profile(name).layers[CASES[name].one], Gaussian(0.1)(model, x, y)
    regularizer = LayerRegularizer(layer)
    batch = Batch(x, y, torch.arange(len(x)))
    value = regularizer(model, batch, x_adv, 0)
    expected = profile(name).dataset['value'].sel(layer=layer, perturbation='noise').mean()
    assert value.item() == pytest.approx(float(expected), rel=2e-3)
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(value, parameters, allow_unused=True)  # later layers have none
    used, gradients = zip(*((p, g) for p, g in zip(parameters, gradients, strict=True) if g is not None), strict=True)
    length = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
    assert gradients and length.isfinite() and length > 0
    with torch.no_grad():
        for p, g in zip(used, gradients, strict=True):
            p -= 1e-3 * value / length**2 * g  # by a thousandth of the value, to first order
    assert regularizer(model, batch, x_adv, 0) < value
