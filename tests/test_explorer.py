"""The explorer of layer sustainability: its states, its words, and what it refuses."""

import pytest
import torch
from torch import nn

from robustnb.attacks import FGSM
from robustnb.data import DataSet
from robustnb.devices import seeded
from robustnb.explorer import explore
from robustnb.lsa import compare
from robustnb.noises import Gaussian, matched


@pytest.fixture(scope='module')
def net():
    with seeded(0):
        return nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.ReLU(inplace=True), nn.Conv2d(8, 4, 3), nn.ReLU(),
            nn.Flatten(), nn.Linear(64, 16), nn.ELU(), nn.Linear(16, 4),
        ).eval()  # fmt: skip


@pytest.fixture(scope='module')
def data():
    generator = torch.Generator().manual_seed(1)
    return DataSet(
        torch.rand(30, 1, 8, 8, generator=generator), torch.randint(0, 4, (30,), generator=generator), tuple('abcd')
    )


def test_explorer_states(net, data):
    explorer = explore(net, data, [Gaussian(0.1), FGSM(0.1)], factors=[0.5, 1.0], samples=20, show_progress=False)
    assert explorer.bundle_bytes < 2e6
    for state in (
        {'perturbation': 'FGSM', 'strength': 0.5},
        {'label': 'c', 'layer': '6'},
        {'measure': 'cosine_distance'},
    ):
        explorer.update(**state)
        assert state.items() <= explorer.state.items()
        assert explorer.static() is not None
        assert 'largest in' in explorer.describe(**explorer.state)


def test_explorer_of_a_class_without_samples(net, data):
    few = data[data.y != 2]
    explorer = explore(net, few, FGSM(0.1), factors=[1.0], samples=10, show_progress=False)
    assert 'There are no samples of class c' in explorer.describe(**(explorer.state | {'label': 'c'}))
    assert explorer.static(label='c') is not None


def test_explorer_edges(net, data):
    def mirror(model, x, y):
        return x.flip(-1)

    explorer = explore(net, data, {'mirror': mirror}, factors=[0.5, 1.0], samples=8, show_progress=False)
    assert 'times its strength' not in explorer.static().axes[0].get_title()
    with pytest.raises(ValueError, match='no value per sample'):
        explore(net, data, FGSM(), measures=['energy_relative_error'], show_progress=False)
    with pytest.raises(ValueError, match='empty'):
        explore(net, (data.x[:0], data.y[:0]), FGSM(), show_progress=False)
    few_names = DataSet(data.x[:8], data.y[:8].clamp(max=1), ('cat', '$x'))  # four outputs, two names, one a formula
    explore(net, few_names, FGSM(0.3), factors=[1.0], show_progress=False).static()


def test_the_explorer_knows_similarities_and_perturbations_without_a_strength(net, data):
    def mirror(model, x, y):
        return x.flip(-1)

    several = [Gaussian(0.1), matched(Gaussian(), mirror), matched(Gaussian(), FGSM(0.1))]
    explorer = explore(net, data, several, factors=[1.0, 2.0], measures='topk_overlap', samples=12, show_progress=False)
    assert 'smallest in' in explorer.describe(**explorer.state)
    assert 'times its strength' not in explorer.static(perturbation='Gaussian as mirror').axes[0].get_title()
    bundle_sizes = {name: explorer.describe(**(explorer.state | {'perturbation': name, 'strength': 2.0})) for name in
                    ('Gaussian as mirror', 'Gaussian as FGSM')}
    assert len(set(bundle_sizes.values())) == 2


def test_a_result_says_where_to_go(net, data):
    with pytest.raises(TypeError, match=r'robustnb\.explorer\.explore\(model, data, perturbations\)'):
        compare(net, data.x, data.x.flip(-1)).explore()
