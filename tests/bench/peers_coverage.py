"""dnn-tip 0.1.1 on the activations that robustnb takes from a network: NumPy arrays of float, in whole or in batches."""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from dnn_tip import neuron_coverage as peer
from torch import Tensor, nn

from robustnb.coverage import KMNC, NBC, NC, SNAC, TKNC, Coverage, Criterion, Ranges

BATCH = 256  # samples at once, for both


@dataclass(frozen=True)
class Seen:
    "What the layers with weights say to some images, (images, units) each, and the predicted classes."

    layers: dict[str, Tensor]
    classes: Tensor

    def __len__(self) -> int:
        return len(self.classes)

    def double(self) -> 'Seen':
        "The same numbers in double precision."
        return Seen({name: rows.double() for name, rows in self.layers.items()}, self.classes)

    def batches(self, size: int = BATCH) -> list[dict[str, Tensor]]:
        "Layer by layer, so many images at once."
        parts = {name: rows.split(size) for name, rows in self.layers.items()}
        return [dict(zip(parts, rows, strict=True)) for rows in zip(*parts.values(), strict=True)]

    def all(self) -> np.ndarray:
        "All layers side by side."
        return torch.cat([*self.layers.values()], dim=1).numpy()


def look(model: nn.Module, x: Tensor) -> Seen:
    "What the network says to these images."
    with closing(Coverage(model, [], show_progress=False).walk((x, torch.zeros(len(x), dtype=torch.long)))) as walk:
        parts = list(walk)
    layers = {name: torch.cat([part.layers[name] for part in parts]) for name in parts[0].layers}
    return Seen(layers, torch.cat([part.prediction for part in parts]))


def arrays(batches: Sequence[dict[str, Tensor]]) -> list[list[np.ndarray]]:
    "The same batches as dnn-tip takes them. On a CPU arrays share their memory with tensors."
    return [[rows.numpy() for rows in batch.values()] for batch in batches]


# -------------------------------------------------------------------------------------------------------- criteria

Facts = tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]  # smallest and largest values and spreads, by layer


def facts_of(train: Sequence[Sequence[np.ndarray]]) -> Facts:
    "What dnn-tip has to be told of the training data. It leaves this to the caller, so NumPy does it here."
    layers = [np.concatenate(rows) for rows in zip(*train, strict=True)]
    return [rows.min(0) for rows in layers], [rows.max(0) for rows in layers], [rows.std(0) for rows in layers]


def ranges_of(train: Sequence[dict[str, Tensor]]) -> Ranges:
    "What robustnb has to know of the training data."
    ranges = Ranges()
    for batch in train:
        ranges.update(batch)
    return ranges


@dataclass(frozen=True)
class Pair:
    "The same criterion twice. Either is made from what it has to know of the training data, which is nothing for some."

    ours: Callable[[Ranges | None], Criterion]
    theirs: Callable[[Facts | None], peer.CoverageMethod]
    learns: bool = True


def nc(threshold: float = 0.5) -> Pair:
    "Thresholds for raw values: dnn-tip scales nothing."
    return Pair(lambda _: NC(threshold, scale=None), lambda _: peer.NAC(threshold), learns=False)


def kmnc(k: int = 1000, ends: str = 'closed') -> Pair:
    return Pair(lambda r: KMNC(k, ends, train=r), lambda f: peer.KMNC(f[0], f[1], sections=k))


def nbc(sigma: float = 0.0) -> Pair:
    return Pair(lambda r: NBC(sigma, strict=False, train=r), lambda f: peer.NBC(*f, scaler=sigma))


def snac(sigma: float = 0.0) -> Pair:
    return Pair(lambda r: SNAC(sigma, strict=False, train=r), lambda f: peer.SNAC(f[1], f[2], scaler=sigma))


def tknc(k: int = 10) -> Pair:
    return Pair(lambda _: TKNC(k), lambda _: peer.TKNC(k), learns=False)


def covered(method: peer.CoverageMethod, batches: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    "What dnn-tip says that a suite covers, (units, ...) bool: it has profiles of samples, and their union is ours to take."
    found = None
    for batch in batches:
        union = method(batch)[1].any(0)
        found = union if found is None else found | union
    return found
