"""LayersSustainabilityAnalysis 1.0.4, the published package, and robustnb give the same numbers.

That is, where the package reads a network right: see tests/test_lsa_defects.py for where it does not.

Run by `make parity`, in .venv-bench. The package reads flat Sequentials with ReLU, ELU or LeakyReLU modules right, and has one
number for a whole batch: the relative error weighted by energy.
"""

import copy
from functools import partial
from importlib.metadata import version

import numpy as np
import pytest
import torch
from LayerSustainabilityAnalysis import LayerSustainabilityAnalysis
from torch import nn

from robustnb.devices import seeded
from robustnb.lsa import compare, layer_sustainability
from robustnb.models import build
from robustnb.noises import Gaussian

SHAPES = {'moons': (2,), 'digits': (1, 8, 8), 'MNIST': (1, 28, 28), 'colours': (3, 16, 16)}


def points(act=nn.ELU) -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 40), act(), nn.Linear(40, 20), act(), nn.Linear(20, 2))


def digits(act=nn.ReLU) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), act(), nn.Conv2d(8, 8, 3), act(), nn.Flatten(), nn.Linear(128, 16), act(), nn.Linear(16, 4)
    )


def colours(act=nn.LeakyReLU) -> nn.Sequential:
    "With batch normalisation that has seen data, dropout and pooling."
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), act(), nn.MaxPool2d(2), nn.Dropout(0.5),
        nn.Conv2d(8, 16, 3), act(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 12), act(), nn.Linear(12, 4),
    )  # fmt: skip


NETWORKS = {
    'moons': points,
    'digits': digits,
    'digits, ELU': partial(digits, nn.ELU),
    'colours': colours,
    'MNIST': lambda: build('lsa_model_b'),
}


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def network(name: str, seed: int) -> nn.Sequential:
    "A network with weights of its own; batch normalisation has statistics of data."
    with seeded(seed):
        model = NETWORKS[name]()
        model.train()(torch.rand(64, *SHAPES[name.split(',')[0]]))
    return model.eval()


def pair(name: str, n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    "Images, and the same with uniform noise."
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, *SHAPES[name.split(',')[0]], generator=generator)
    return x, (x + 0.2 * torch.rand(x.shape, generator=generator) - 0.1).clamp(0, 1)


def published(model: nn.Module, x: torch.Tensor, x_pert: torch.Tensor) -> np.ndarray:
    "What the package says, on a copy: it leaves its hooks behind."
    analysis = LayerSustainabilityAnalysis(copy.deepcopy(model))
    return np.array(analysis.representation_comparisons(x, x_pert, verbose=False))


def test_it_is_the_version_that_is_meant():
    assert version('LayersSustainabilityAnalysis') == '1.0.4'


@pytest.mark.parametrize('seed', [0, 1, 313])
@pytest.mark.parametrize('name', NETWORKS)
def test_the_numbers_are_the_same(name, seed):
    "For the package's own batch, however ours is cut into pieces."
    model, (x, x_pert) = network(name, seed), pair(name, 50, seed)
    expected = published(model, x, x_pert)
    for batch_size in (2, 9, 1000):
        found = compare(model, x, x_pert, measure='energy_relative_error', batch_size=batch_size)
        np.testing.assert_allclose(found.dataset['value'].values[:, 0], expected, rtol=0, atol=1e-6)
        np.testing.assert_allclose(found.table()['mean'], expected, rtol=0, atol=1e-6)
    assert len(expected) == sum(isinstance(m, nn.ReLU | nn.ELU | nn.LeakyReLU) for m in model)


@pytest.mark.parametrize('n', [1, 2, 7, 200])
@pytest.mark.parametrize('name', ['digits', 'MNIST'])
def test_of_any_number_of_images(name, n):
    model, (x, x_pert) = network(name, 5), pair(name, n, n)
    found = compare(model, x, x_pert, measure='energy_relative_error').dataset['value'].values[:, 0]
    np.testing.assert_allclose(found, published(model, x, x_pert), rtol=0, atol=1e-6)


@pytest.mark.parametrize('name', NETWORKS)
def test_one_image_at_a_time_is_our_default_measure(name):
    "For one image the weights by energy weigh nothing, so the package then says what we say per sample in one call."
    model, (x, x_pert) = network(name, 2), pair(name, 8, 2)
    expected = [published(model, x[i : i + 1], x_pert[i : i + 1]) for i in range(8)]
    found = compare(model, x, x_pert).dataset['value'].values[:, 0]
    np.testing.assert_allclose(found.T, expected, rtol=0, atol=1e-6)


def test_several_perturbations_share_the_clean_pass():
    "Six calls of the package, one of ours."
    model, (x, _) = network('MNIST', 3), pair('MNIST', 40, 3)
    perts = {f'{k}': (x + 0.02 * k).clamp(0, 1) for k in range(1, 7)}
    found = compare(model, x, perts, measure='energy_relative_error').dataset['value'].values
    np.testing.assert_allclose(found.T, [published(model, x, pert) for pert in perts.values()], rtol=0, atol=1e-6)


def test_over_a_data_set():
    "Over batches the energies are added up, which is the package's number for all of them as one batch."
    model, (x, _) = network('digits', 4), pair('digits', 100, 4)
    noise, y = Gaussian(0.1), torch.zeros(100, dtype=torch.long)
    found = layer_sustainability(
        model, (x, y), noise, measure='energy_relative_error', batch_size=16, show_progress=False
    )
    expected = published(model, x, noise(model, x))
    np.testing.assert_allclose(found.dataset['value'].values[:, 0], expected, rtol=0, atol=1e-6)
