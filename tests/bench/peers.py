"""The same attack in four libraries, each called the way its own documentation does."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import foolbox
import numpy as np
import torch
import torchattacks
from art.attacks.evasion import CarliniL2Method, FastGradientMethod, ProjectedGradientDescentPyTorch
from art.estimators.classification import PyTorchClassifier
from torch import Tensor, nn

from robustnb import attacks
from robustnb.data import DataSet, digits, mnist
from robustnb.minimal import CW
from robustnb.training import trained

ROOT = Path(__file__).resolve().parents[2]
Call = Callable[[Tensor, Tensor], Tensor]  # (x, y) -> x_adv


# ------------------------------------------------------------------------------------------------ networks and data


def data_root() -> Path | None:
    "The folder of real data sets, `ROBUSTNB_DATA` or shared/data beside the project, if there is one."
    folder = Path(os.environ.get('ROBUSTNB_DATA') or ROOT.parent / 'shared' / 'data')
    return folder if (folder / 'MNIST').is_dir() else None


def lenet() -> tuple[nn.Module, DataSet]:
    "LeNet-5 and the test images of MNIST; trained once, in two minutes, and kept in the user's cache."
    root = data_root()
    return trained('lenet5', 'mnist', root=root), mnist(root, download=False).test


def packaged(data: str, training: str = 'standard') -> tuple[nn.Module, DataSet]:
    "The small network that comes with robustnb, and the test images of its digits."
    return trained('digits_cnn', data, training=training), digits(int(data[6:] or 8)).test


# --------------------------------------------------------------------------------------------------------- attacks


@dataclass(frozen=True)
class Setting:
    "What is asked of every library, in the units of the images. No random start: all begin at the clean image."

    kind: str  # 'fgsm', 'pgd' or 'cw'
    norm: str = 'linf'  # or 'l2'
    eps: float | None = None  # strength; CW has none
    steps: int = 1  # gradient steps
    step: float | None = None  # size of a step; CW: the learning rate of Adam
    c: float = 1.0  # CW: weight of the misclassification

    @classmethod
    def pgd(cls, steps: int, eps: float, norm: str = 'linf') -> 'Setting':
        "PGD with the step size that is robustnb's default, 2.5 * eps / steps, given to all."
        return cls('pgd', norm, eps, steps, 2.5 * eps / steps)


def robustnb_call(s: Setting, model: nn.Module, **more) -> Call:
    "The attack in robustnb. `more` are options that the others do not have, such as `keep_going`."
    norm = {'linf': attacks.Linf(), 'l2': attacks.L2()}[s.norm]
    if s.kind == 'fgsm':
        attack = attacks.FGSM(s.eps, norm=norm, **more)
    elif s.kind == 'pgd':
        attack = attacks.PGD(s.eps, steps=s.steps, step=s.step, random_start=False, norm=norm, **more)
    else:
        attack = CW(steps=s.steps, searches=1, lr=s.step, c=s.c, decay=False, **more)
    return lambda x, y: attack(model, x, y)


def torchattacks_call(s: Setting, model: nn.Module) -> Call:
    "The attack in torchattacks."
    if s.kind == 'fgsm':
        return torchattacks.FGSM(model, eps=s.eps)
    if s.kind == 'cw':
        return torchattacks.CW(model, c=s.c, kappa=0, steps=s.steps, lr=s.step)
    attack = {'linf': torchattacks.PGD, 'l2': torchattacks.PGDL2}[s.norm]
    return attack(model, eps=s.eps, alpha=s.step, steps=s.steps, random_start=False)


def foolbox_call(s: Setting, model: nn.Module) -> Call:
    "The attack in foolbox; the second of its three results is the one that keeps to eps."
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1))
    if s.kind == 'fgsm':
        attack = foolbox.attacks.LinfFastGradientAttack(random_start=False)
    elif s.kind == 'cw':
        attack = foolbox.attacks.L2CarliniWagnerAttack(
            binary_search_steps=1, steps=s.steps, stepsize=s.step, confidence=0, initial_const=s.c, abort_early=False
        )
    else:
        kind = {'linf': foolbox.attacks.LinfPGD, 'l2': foolbox.attacks.L2PGD}[s.norm]
        attack = kind(abs_stepsize=s.step, steps=s.steps, random_start=False)
    return lambda x, y: attack(wrapped, x, y, epsilons=s.eps)[1]


def art_call(s: Setting, model: nn.Module) -> Call:
    "The attack in ART, which takes and returns NumPy arrays; on a CPU they share their memory with the tensors."
    estimator = PyTorchClassifier(
        model, nn.CrossEntropyLoss(), input_shape=(1, 28, 28), nb_classes=10, clip_values=(0, 1), device_type='cpu'
    )
    norm = {'linf': np.inf, 'l2': 2}[s.norm]
    if s.kind == 'fgsm':
        attack = FastGradientMethod(estimator, norm=norm, eps=s.eps, batch_size=128)
    elif s.kind == 'cw':
        attack = CarliniL2Method(
            estimator, learning_rate=s.step, binary_search_steps=1, max_iter=s.steps, initial_const=s.c, batch_size=128,
            verbose=False,
        )  # fmt: skip
    else:
        attack = ProjectedGradientDescentPyTorch(
            estimator, norm=norm, eps=s.eps, eps_step=s.step, max_iter=s.steps, batch_size=128, verbose=False
        )
    return lambda x, y: torch.from_numpy(attack.generate(x.numpy(), y.numpy()))


LIBRARIES = {'robustnb': robustnb_call, 'torchattacks': torchattacks_call, 'foolbox': foolbox_call, 'ART': art_call}


# --------------------------------------------------------------------------------------------------------- outcomes


@torch.no_grad()
def robust_accuracy(model: nn.Module, x_adv: Tensor, y: Tensor) -> float:
    "Share of the samples that are still classified correctly."
    return float((model(x_adv).argmax(1) == y).float().mean())


def sizes(change: Tensor, norm: str) -> Tensor:
    "Size of each sample's change, (batch,)."
    return change.flatten(1).norm(p=float('inf') if norm == 'linf' else 2, dim=1)


class Counted(nn.Module):
    "A model that counts how many samples are run forward, and for how many a gradient comes back to its output."

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.samples = model, {'forward': 0, 'backward': 0}
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.samples['forward'] += len(x)
        logits = self.model(x)
        if logits.requires_grad:
            logits.register_hook(self._backward)
        return logits

    def _backward(self, gradient: Tensor) -> None:
        self.samples['backward'] += len(gradient)

    def passes(self, batch: int) -> dict[str, float]:
        "Passes over a batch of this size."
        return {kind: round(n / batch, 1) for kind, n in self.samples.items()}
