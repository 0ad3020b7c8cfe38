"""Networks as they are used: at 224 pixels, with random weights, through layer sustainability analysis."""

import numpy as np
import pytest
import torch
from torch import nn

from robustnb import models
from robustnb.attacks import FGSM
from robustnb.devices import seeded
from robustnb.guard import first_tensor
from robustnb.lsa import layer_sustainability
from robustnb.noises import Gaussian

PERTURBATIONS = [Gaussian(0.05), FGSM(2 / 255)]


def pictures(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(2, *shape, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 7])


class Reader(nn.Module):
    "Reads the rows of a picture as a sequence, and returns its logits beside its states."

    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(224, 64, num_layers=2, batch_first=True), nn.Linear(64, 10)

    def forward(self, x):
        states, (hidden, cell) = self.lstm(x)
        return {'states': states, 'logits': self.head(hidden[-1])}


def by_plain_hooks(model: nn.Module, layer: str, x: torch.Tensor, x_pert: torch.Tensor) -> np.ndarray:
    "The relative error of each sample at one layer, from two forward passes."
    kept = []
    handle = model.get_submodule(layer).register_forward_hook(
        lambda module, args, output: kept.append(first_tensor(output).double().flatten(1).numpy().copy())
    )
    with torch.no_grad():
        model(x), model(x_pert)
    handle.remove()
    clean, pert = kept
    return np.linalg.norm(pert - clean, axis=1) / np.linalg.norm(clean, axis=1)


def assert_goes_through(model: nn.Module, data: tuple, where, layers: int) -> None:
    model.eval()
    versions = [p._version for p in model.parameters()]
    result = layer_sustainability(model, data, PERTURBATIONS, where=where, show_progress=False)
    table = result.table()
    assert len(result.layers) == layers and (table['mean'] > 0).all() and np.isfinite(table['mean']).all()
    assert [p._version for p in model.parameters()] == versions
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    for number in (0, layers // 2, layers - 1):
        x_pert = PERTURBATIONS[0](None, data[0])
        expected = by_plain_hooks(model, result.layers[number], data[0], x_pert)
        found = result.dataset['value'].sel(perturbation='Gaussian').values[number]
        np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize(
    'arch, where, layers',
    [
        ('vgg16', 'activations', 15),  # 13 convolutions and 2 hidden linear layers
        ('convnext_tiny', 'activations', 18),  # a GELU in each of 3 + 3 + 9 + 3 blocks
        ('mobilenet_v3_large', 'blocks', 17),
        ('vit_b_16', 'blocks', 12),
    ],
)
def test_a_network_at_224_pixels_goes_through(arch, where, layers):
    model = models.build('torchvision', arch=arch, classes=10)
    with seeded(0):  # torchvision starts the head of its transformers at zero, which leaves an attack no gradient
        list(model.parameters())[-2].data.normal_(std=0.02)
    assert_goes_through(model, pictures((3, 224, 224)), where, layers)


def test_an_lstm_goes_through():
    with seeded(0):
        model = Reader()
    assert_goes_through(model, pictures((224, 224)), ['lstm', 'head'], 2)
