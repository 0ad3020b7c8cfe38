"""Synaptic filtering written down a second time, slowly and in plain PyTorch: nothing of it comes from the library's sweep.

`sweep` says which images every filtered network gets right. `naive` has the structure of the published notebooks, a copy of the
network for each threshold, and is what the benchmark is held against.
"""

import copy
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

FILTERS = ('high', 'low', 'pulse')


class Curve(NamedTuple):
    "One filter on one layer: as many rows as thresholds, ascending."

    threshold: np.ndarray
    removed: np.ndarray
    clean: np.ndarray  # (threshold, image) bool: right or not; or (threshold,), how many, from `naive`
    attacked: np.ndarray


def weights(model: nn.Module) -> dict[str, nn.Module]:
    "The layers that are filtered: every convolution of images and every linear layer inside the model."
    return {name: layer for name, layer in model.named_modules() if name and isinstance(layer, nn.Conv2d | nn.Linear)}


def masks(weight: Tensor, kind: str, thresholds: int = 25) -> list[tuple[float, Tensor]]:
    "Each threshold, ascending, and where the weights are that it sets to zero."
    w = weight.detach().double()
    low, high = float(w.min()), float(w.max())
    points = np.linspace(low, high, thresholds)
    if kind == 'high':
        return [(a, w <= a) for a in points]
    if kind == 'low':
        return [(a, w >= a) for a in points]
    if kind == 'published pulse':
        half = (high - low) / thresholds / 2
        return [(a, (a - half <= w) & (w < a + half)) for a in points]
    edges = np.linspace(low, high, thresholds + 1)
    inside = [(w >= a) & (w < b) for a, b in zip(edges, edges[1:], strict=False)]
    inside[-1] |= w == high
    return list(zip((edges[:-1] + edges[1:]) / 2, inside, strict=True))


def prepared(model: nn.Module, norms: str) -> nn.Module:
    "A copy in evaluation mode, in which batch norms may look at the batch."
    model = copy.deepcopy(model).eval()
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.train(norms == 'batch')
    return model


def fgsm(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
    "One step along the sign of the gradient of the cross entropy, kept between 0 and 1."
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), y), x)
    return (x + eps * gradient.sign()).clamp(0, 1).detach()


@torch.no_grad()
def right(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return model(x).argmax(1) == y


def responses(model: nn.Module, parts: list, eps: float, fixed: list | None) -> tuple[np.ndarray, np.ndarray]:
    "Which clean and which attacked images are told right."
    clean = [right(model, x, y) for x, y in parts]
    attacked = fixed or [fgsm(model, x, y, eps) for x, y in parts]
    broken = [right(model, x_adv, y) for x_adv, (_, y) in zip(attacked, parts, strict=True)]
    return torch.cat(clean).numpy(), torch.cat(broken).numpy()


def sweep(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    filters: tuple[str, ...] = FILTERS,
    thresholds: int = 25,
    against: str = 'original',
    norms: str = 'eval',
    batch: int = 100,
) -> dict[tuple[str, str], Curve]:
    "Every layer, filter and threshold; and, as ('', ''), the network as it is."
    model = prepared(model, norms)
    parts = list(zip(x.split(batch), y.split(batch), strict=True))
    fixed = [fgsm(model, *part, eps) for part in parts] if against == 'original' else None
    clean, attacked = responses(model, parts, eps, fixed)
    found = {('', ''): Curve(np.array([np.nan]), np.array([0]), clean[None], attacked[None])}
    for name, layer in weights(model).items():
        before = layer.weight.data
        for kind in filters:
            points, gone = zip(*masks(before, kind, thresholds), strict=True)
            rows = []
            for removed in gone:
                layer.weight.data = torch.where(removed, 0, before)
                rows.append(responses(model, parts, eps, fixed))
            removed = np.array([int(mask.sum()) for mask in gone])
            found[name, kind] = Curve(np.array(points), removed, *(np.stack(one) for one in zip(*rows, strict=True)))
        layer.weight.data = before
    return found


def naive(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    filters: tuple[str, ...] = FILTERS,
    thresholds: int = 25,
    against: str = 'filtered',
    batch: int = 100,
) -> dict[tuple[str, str], Curve]:
    """The same with the structure of the notebooks: a copy of the network for each threshold, batches of 100, gradients of all
    parameters, a graph also where nobody asks for a gradient, three numbers read for each batch. Where the attack is made once,
    no gradient is left to take: both passes go without a graph.
    """
    model = copy.deepcopy(model).eval()
    parts = list(zip(x.split(batch), y.split(batch), strict=True))
    fixed = [fgsm(model, *part, eps) for part in parts] if against == 'original' else [None] * len(parts)
    found = {}
    for name, layer in weights(model).items():
        for kind in filters:
            rows = []
            for point, removed in masks(layer.weight, kind, thresholds):
                clone, state = copy.deepcopy(model), copy.deepcopy(model.state_dict())
                state[f'{name}.weight'] = torch.where(removed, 0, layer.weight.detach())
                clone.load_state_dict(state)
                clean = attacked = 0
                for part, x_adv in zip(parts, fixed, strict=True):
                    told, broken = told_right(clone, *part, eps, x_adv)
                    clean, attacked = clean + told, attacked + broken
                rows.append((point, int(removed.sum()), clean, attacked))
            found[name, kind] = Curve(*(np.array(one) for one in zip(*rows, strict=True)))
    return found


def told_right(model: nn.Module, x: Tensor, y: Tensor, eps: float, x_adv: Tensor | None) -> tuple[int, int]:
    "How many images of a batch are told right, clean and attacked; without `x_adv` it is made against this very network."
    if x_adv is not None:
        return right(model, x, y).sum().item(), right(model, x_adv, y).sum().item()
    x = x.clone().requires_grad_()
    output = model(x)
    loss = F.cross_entropy(output, y)
    loss.backward()
    x_adv = (x + eps * x.grad.sign()).clamp(0, 1).detach()
    attacked = model(x_adv)
    loss.item()
    return (output.argmax(1) == y).sum().item(), (attacked.argmax(1) == y).sum().item()
