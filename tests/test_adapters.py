"""Adapters with stand-ins that follow the manners, good and bad, of torchattacks, foolbox and ART. The real ones: tests/bench."""

import json
import logging
import random
import sys
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from robustnb.adapters import ART, Foolbox, Foreign, Torchattacks, _norm
from robustnb.attacks import L2, PGD, Linf, WorstOf
from robustnb.devices import seeded
from robustnb.evaluation import evaluate
from robustnb.guard import _say_once
from robustnb.lsa import layer_sustainability
from robustnb.noises import Gaussian, matched


class Rude:
    "As torchattacks: built for a model, clips to [0, 1], uses global random numbers. It leaves train mode and gradients."

    def __init__(self, model, eps=8 / 255, alpha=2 / 255, steps=3, random_start=False):
        self.model, self.eps, self.alpha, self.steps, self.random_start = model, eps, alpha, steps, random_start
        self.device = next(model.parameters()).device
        self.sign = 1

    def set_mode_targeted_by_label(self, quiet=False):
        self.sign = -1

    def __call__(self, images, labels):
        assert images.min() >= 0 and images.max() <= 1, 'it knows nothing else than [0, 1]'
        x_adv = images.clone()
        if self.random_start:
            x_adv += self.eps * (2 * torch.rand_like(images) - 1) + 0 * (np.random.rand() + random.random())
            x_adv = x_adv.clamp(0, 1)
        for _ in range(self.steps):
            x_adv = x_adv.detach().requires_grad_()
            F.cross_entropy(self.model(x_adv), labels).backward()
            x_adv = x_adv + self.sign * self.alpha * x_adv.grad.sign()
            x_adv = (images + (x_adv - images).clamp(-self.eps, self.eps)).clamp(0, 1).detach()
        self.model.train()
        with torch.no_grad():
            self.model(images)  # changes the running statistics
        images.zero_()
        return x_adv


class Smallest:
    "A search for the smallest change, without eps: it brightens sample i by (i + 1) / 100."

    def __init__(self, model):
        self.model = model

    def __call__(self, images, labels):
        self.model(images)
        steps = torch.arange(1, len(images) + 1, device=images.device) / 100
        return images + steps.view(-1, *(1,) * (images.dim() - 1))


class FoolboxLike:
    "As an attack of foolbox: holds no model, is called with a model, images, a criterion and epsilons."

    def __init__(self, order=inf, overshoot=1.0):
        self.distance, self.overshoot = SimpleNamespace(p=order), overshoot

    def __call__(self, model, inputs, criterion, *, epsilons):
        assert inputs.min() >= model.bounds[0] and inputs.max() <= model.bounds[1]
        x = inputs.clone().requires_grad_()
        F.cross_entropy(model(x), criterion.labels).backward()
        eps = 0.3 if epsilons is None else epsilons
        x_adv = (inputs + criterion.sign * self.overshoot * eps * x.grad.sign()).clamp(*model.bounds).detach()
        return inputs, x_adv, None


class FixedEpsilonAttack(FoolboxLike):
    "By its name, one that needs an eps."


class ArtLike:
    "As an attack of ART: built for a classifier, NumPy in and out, one-hot labels, noise from NumPy."

    def __init__(self, estimator, norm=np.inf, eps=0.3, eps_step=0.1, targeted=False, batch_size=32, verbose=True):
        assert not verbose and estimator.device_type in ('cpu', 'gpu')
        self.estimator, self.eps, self.targeted, self.batch_size = estimator, eps, targeted, batch_size

    def generate(self, x, y):
        assert x.dtype == np.float32 and y.shape == (len(x), self.estimator.nb_classes) and (y.sum(1) == 1).all()
        rows = []
        for start in range(0, len(x), self.batch_size):
            part = torch.from_numpy(x[start : start + self.batch_size]).requires_grad_()
            loss = self.estimator.loss(self.estimator.model(part), torch.from_numpy(y).argmax(1)[start : start + len(part)])
            loss.backward()
            step = self.eps * (1 - 1e-4 * np.random.rand())
            rows.append(part + (-1 if self.targeted else 1) * step * part.grad.sign())
        return torch.cat(rows).detach().numpy().clip(*self.estimator.clip_values)


class ModelLike:
    "As foolbox.PyTorchModel."

    def __init__(self, model, bounds, device):
        self.model, self.bounds = model, bounds

    def __call__(self, x):
        return self.model(x)


def module(name, **content):
    made = ModuleType(name)
    vars(made).update(content)
    return made


@pytest.fixture(autouse=True)
def peers(monkeypatch):
    "Modules that stand for foolbox and ART."
    criteria = SimpleNamespace(
        Misclassification=lambda labels: SimpleNamespace(labels=labels, sign=1),
        TargetedMisclassification=lambda labels: SimpleNamespace(labels=labels, sign=-1),
    )

    def classifier(model, loss, input_shape, nb_classes, clip_values, device_type):
        model.eval().train()  # whatever it was
        return SimpleNamespace(
            model=model.eval(), loss=loss, nb_classes=nb_classes, clip_values=clip_values, device_type=device_type
        )

    monkeypatch.setitem(sys.modules, 'foolbox', module('foolbox', PyTorchModel=ModelLike, criteria=criteria))
    for name in ('art', 'art.estimators'):
        monkeypatch.setitem(sys.modules, name, module(name))
    name = 'art.estimators.classification'
    monkeypatch.setitem(sys.modules, name, module(name, PyTorchClassifier=classifier))
    _say_once.cache_clear()


ADAPTERS = [
    Torchattacks(Rude, eps=0.1, options=dict(alpha=0.05)),
    Torchattacks(Rude, eps=0.1, options=dict(random_start=True)),
    Torchattacks(Smallest),
    Foolbox(FoolboxLike(), eps=0.1),
    ART(ArtLike, eps=0.1),
]
every_adapter = pytest.mark.parametrize('attack', ADAPTERS, ids=lambda a: a.name)
with_eps = pytest.mark.parametrize('attack', [a for a in ADAPTERS if not a.minimal], ids=lambda a: a.name)


def make_net(outputs=4):
    with seeded(0):
        return nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Dropout(), nn.Flatten(), nn.Linear(288, outputs)
        )


@pytest.fixture
def net():
    "In training mode, but with a frozen batch normalisation."
    net = make_net()
    net[1].eval()
    return net


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.rand(12, 1, 8, 8, generator=generator), torch.randint(0, 4, (12,), generator=generator)


def snapshot(net):
    "Everything that must be as before."
    return (
        [m.training for m in net.modules()],
        [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in net.parameters()],
        {name: t.clone() for name, t in net.state_dict().items()},
        [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in net.modules()],
    )


def generators():
    return torch.get_rng_state().tolist(), repr(np.random.get_state()), random.getstate()


def same(a, b):
    return torch.testing.assert_close(a, b, rtol=0, atol=0) is None


@every_adapter
def test_nothing_is_left_behind(attack, net, batch):
    x, y = batch
    net[5].weight.grad = torch.ones_like(net[5].weight)
    net[0].weight.requires_grad_(False)
    before, numbers, images = snapshot(net), generators(), x.clone()
    attack(net, x, y)
    attack.run(net, x, y)
    assert same(snapshot(net), before) and generators() == numbers
    assert torch.equal(x, images), 'an attack that works in place gets a copy'


@every_adapter
def test_nothing_is_left_behind_by_an_error(attack, batch):
    class Breaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.calls = make_net(), 0

        def forward(self, x):
            self.calls += 1
            if self.calls > 1:
                self.net.train()
                raise KeyboardInterrupt
            return self.net(x)

    net = Breaks()
    net.net[1].eval()
    before, numbers = snapshot(net), generators()
    with pytest.raises(KeyboardInterrupt):
        attack(net, *batch)
    assert same(snapshot(net), before) and generators() == numbers


@every_adapter
def test_what_holds_for_every_adapter(attack, net, batch):
    x, y = batch
    x_adv = attack(net, x, y)
    assert x_adv.shape == x.shape and x_adv.dtype == x.dtype and not x_adv.requires_grad
    assert torch.equal(attack(net, x, y), x_adv), 'the same call twice gives the same result'
    assert not torch.equal(x_adv, x)
    assert torch.equal(attack.at(0.0)(net, x, y), x), 'no strength, no change'
    assert attack(net, x[:0], y[:0]).shape == (0, 1, 8, 8)
    assert len(attack.run(net, x[:0], y[:0]).size) == 0
    result = attack.run(net, x, y)
    assert torch.equal(result.x_adv, x_adv) and torch.allclose(result.size, attack.norm.size(x_adv - x))
    with torch.no_grad():
        assert torch.equal(result.success, net.eval()(x_adv).argmax(1) != y)


@with_eps
def test_eps_and_bounds_hold(attack, net, batch):
    x, y = batch
    for strength in (0.03, 0.2):
        x_adv = attack.at(strength)(net, x, y)
        assert attack.norm.size(x_adv - x).max() <= strength + 1e-6
        assert x_adv.min() >= 0 and x_adv.max() <= 1


@pytest.mark.parametrize('attack', [ADAPTERS[0], ADAPTERS[3], ADAPTERS[4]], ids=lambda a: a.name)
def test_they_agree_with_ours(attack, net, batch):
    x, y = batch
    attack = replace(attack, options=dict(alpha=0.1, steps=1)) if isinstance(attack, Torchattacks) else attack
    ours = PGD(0.1, steps=1, step=0.1, random_start=False)
    assert (attack(net, x, y) - ours(net, x, y)).abs().max() <= 2e-5
    aimed = replace(attack, target=2)(net, x, y) - replace(ours, target=2)(net, x, y)
    assert aimed.abs().max() <= 2e-5


@with_eps
@pytest.mark.parametrize(('low', 'width'), [(-1, 2), (0, 255), (-3.7, 0.9)])
def test_other_bounds(attack, low, width, net, batch):
    x, y = batch

    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net((x - low) / width)

    if isinstance(attack, Torchattacks):
        attack = replace(attack, options={**attack.options, 'alpha': 0.05})
    plain = attack(net, x, y)
    there = replace(attack.scaled(width), bounds=(low, low + width))
    x_adv = there(Shifted(), low + width * x, y)
    assert ((x_adv - low) / width - plain).abs().mean() < 1e-4
    assert x_adv.min() >= low and x_adv.max() <= low + width


@with_eps
def test_without_bounds(attack, net, batch):
    x, y = batch[0] * 8 - 4, batch[1]
    if isinstance(attack, Torchattacks):
        attack = replace(attack, options=dict(alpha=0.05, steps=2))
    attack = replace(attack, bounds=None)
    x_adv = attack(net, x, y)
    change = (x_adv - x).abs()
    assert change.max() <= 0.1 + 1e-5 and (change > 0.09).float().mean() > 0.9, 'nothing is clipped'
    ours = PGD(0.1, steps=2, step=0.05, random_start=False, bounds=None)
    if isinstance(attack, Torchattacks):
        assert ((x_adv - ours(net, x, y)).abs() < 1e-4).float().mean() > 0.99


@every_adapter
@pytest.mark.parametrize('mode', [torch.no_grad, torch.inference_mode])
def test_callers_without_gradients(attack, mode, net, batch):
    expected = attack(net, *batch)
    with mode():
        found = attack(net, batch[0].clone(), batch[1].clone())
        result = attack.run(net, batch[0].clone(), batch[1].clone())
    assert torch.equal(found, expected) and torch.equal(result.x_adv, expected)
    assert torch.equal(attack(net, batch[0].clone().requires_grad_(), batch[1]), expected)


@every_adapter
@pytest.mark.parametrize('dtype', [torch.float64, torch.float16, torch.bfloat16])
def test_types_of_inputs_and_models(attack, dtype, net, batch):
    x, y = batch
    expected = attack(net, x, y)
    x_adv = attack(net, x.to(dtype), y.int())
    assert x_adv.dtype == dtype
    if dtype != torch.float64 or not getattr(attack, 'options', {}).get('random_start'):  # other numbers are drawn in double
        assert (x_adv.float() - expected).abs().mean() < 0.02
    if dtype != torch.float16:
        assert attack(make_net().to(dtype), x, y).dtype == torch.float32


@every_adapter
def test_outputs_of_all_kinds(attack, batch):
    x, y = batch

    class Wrapped(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.net, self.kind = make_net(), kind

        def forward(self, x):
            out = self.net(x)
            return {'tuple': (out, [out.sum(0)]), 'dict': {'features': x, 'logits': out}}[self.kind]

    expected = attack(make_net(), x, y)
    for kind in ('tuple', 'dict'):
        assert torch.equal(attack(Wrapped(kind), x, y), expected)
    assert torch.equal(attack(nn.DataParallel(make_net()), x, y), expected)


@every_adapter
@pytest.mark.parametrize('squeeze', [False, True])
def test_one_logit(attack, squeeze, batch):
    x, y = batch[0], batch[1] % 2
    net = nn.Sequential(make_net(1), nn.Flatten(0)) if squeeze else make_net(1)
    result = attack.run(net, x, y)
    two = nn.Sequential(make_net(1), nn.Linear(1, 2))
    with torch.no_grad():
        two[1].weight.copy_(torch.tensor([[0.0], [1.0]]))
        two[1].bias.zero_()
    expected = attack.run(two, x, y)
    assert (result.x_adv - expected.x_adv).abs().max() < 1e-5 and torch.equal(result.success, expected.success)
    assert torch.allclose(result.loss, expected.loss, atol=1e-5)


@every_adapter
def test_bad_inputs(attack, net, batch):
    x, y = batch
    spoilt = x.clone()
    spoilt[3] = torch.nan
    calls = []
    handle = net.register_forward_pre_hook(lambda *_: calls.append(1))
    for bad, labels, error, words in [
        (spoilt, y, ValueError, 'sample 3'),
        (x - 0.5, y, ValueError, 'outside the bounds'),
        ((255 * x).byte(), y, TypeError, 'x.float\\(\\) / 255'),
        (x, y.float(), TypeError, 'integer class indices'),
        (x, y[:5], ValueError, 'labels have shape'),
    ]:
        with pytest.raises(error, match=words):
            attack(net, bad, labels)
    assert not calls, 'nothing went through the model'
    with pytest.raises(ValueError, match='the model knows 0 to 3'):
        attack(net, x, y + 4)
    assert len(calls) == 1, 'only the sample that tells how many classes there are'
    handle.remove()


def test_passes_are_counted(net, batch):
    x, y = batch
    rude = Torchattacks(Rude, 0.1, dict(steps=7))
    assert rude.run(net, x, y).passes == {'forward': 9, 'backward': 7}  # its last one in training mode, and the verdict
    assert ART(ArtLike, 0.1).run(net, x, y).passes == {'forward': 2, 'backward': 1}
    assert ART(ArtLike, 0.1, dict(batch_size=5)).run(net, x, y).passes == {'forward': 2, 'backward': 1}
    assert Foolbox(FoolboxLike(), 0.1).run(net, x, y).passes == {'forward': 2, 'backward': 1}


def test_no_gradient_of_a_parameter_is_computed(net, batch):
    reached = []
    handle = net[5].weight.register_hook(lambda gradient: reached.append(1))
    for attack in ADAPTERS:
        attack(net, *batch)
    handle.remove()
    assert not reached


def test_the_smallest_change(net, batch, caplog):
    x, y = batch[0] * 0.8, batch[1]
    size = Torchattacks(Smallest).run(net, x, y).size
    assert torch.allclose(size, torch.arange(1, 13) / 100, atol=1e-6)
    counted = Torchattacks(Smallest, eps=0.0601).run(net, x, y)
    assert (counted.size[:6] > 0).all() and (counted.size[6:] == 0).all()
    assert torch.equal(counted.x_adv[6:], x[6:])
    with pytest.raises(ValueError, match='say which, bounds'):
        Torchattacks(Smallest, bounds=None)(net, x, y)
    anyhow = Foolbox(FoolboxLike())
    assert anyhow.minimal and not anyhow.at(0.1).minimal and anyhow.run(net, x, y).size.max() > 0.29
    assert Own(lambda x: x + 0.1).run(net, x, y).size.max() > 0.09, 'one of your own, without a strength'


@dataclass(frozen=True)
class Own(Foreign):
    library = 'own'

    def find(self, problem, x, y, bounds):
        return self.attack(x)


def test_what_comes_back_is_checked(net, batch, caplog):
    x, y = batch
    for bad, words in [
        (lambda x: x[:3], 'must return a tensor of shape'),
        (lambda x: None, 'NoneType'),
        (lambda x: x / 0, 'returned what no model should get'),
    ]:
        with pytest.raises(ValueError, match=words):
            Own(bad, 0.1)(net, x, y)
    caplog.set_level(logging.WARNING)
    Own(lambda x: x + 1e-7, 0.1)(net, x, y)
    assert not caplog.messages
    assert Own(lambda x: x + 1e-7, 0.1)(net, torch.ones_like(x), y).max() == 1
    found = Own(lambda x: x + 0.2, 0.1)(net, x / 2, y)
    assert 'left its eps of 0.1, measured in Linf()' in caplog.messages[0] and torch.allclose(found, x / 2 + 0.2)
    Own(lambda x: x + 0.2, 0.3)(net, x, y)
    assert 'leaves the range of the inputs' in caplog.messages[1] and len(caplog.messages) == 2
    with pytest.raises(TypeError, match='base class'):
        Foreign(lambda x: x, 0.1)(net, x, y)


def test_settings_that_cannot_be_meant(net):
    for wrong, error, words in [
        (lambda: Torchattacks(Rude(net), 0.1), TypeError, 'give the class, Rude'),
        (lambda: Torchattacks(Rude), ValueError, 'say which one, eps=...'),
        (lambda: Torchattacks(Rude, 0.1, dict(setps=3)), ValueError, 'takes no setps; it takes eps, alpha, steps'),
        (lambda: Torchattacks(Rude, 0.1, dict(eps=3)), ValueError, 'give it as eps=3'),
        (lambda: Torchattacks(Rude, 0.1, eps_as='epsilon'), ValueError, 'takes no epsilon'),
        (lambda: Torchattacks(Rude, 0.1, 3), TypeError, 'options are a dictionary'),
        (lambda: Torchattacks(Rude, -0.1), ValueError, 'at least 0'),
        (lambda: Torchattacks(Rude, torch.tensor([0.1, 0.2])), TypeError, 'one eps for all samples'),
        (lambda: Foolbox(FoolboxLike, 0.1), TypeError, r'FoolboxLike\(\)'),
        (lambda: Foolbox(FixedEpsilonAttack()), ValueError, 'say which one, eps=...'),
        (lambda: Torchattacks(Rude, 0.1, norm='L2'), TypeError, 'norm takes an object'),
    ]:
        with pytest.raises(error, match=words):
            wrong()


def test_bounds_for_each_feature_are_an_error(net, batch):
    x, y = batch
    attack = replace(ADAPTERS[0], bounds=(torch.zeros(1, 8, 8), torch.ones(1, 8, 8)))
    with pytest.raises(ValueError, match='one range for all features'):
        attack(net, x, y)


def test_what_is_missing_is_named(net, batch, monkeypatch):
    monkeypatch.setitem(sys.modules, 'foolbox', None)
    monkeypatch.setitem(sys.modules, 'art.estimators.classification', None)
    with pytest.raises(ModuleNotFoundError, match='pip install foolbox'):
        Foolbox(FoolboxLike(), 0.1)(net, *batch)
    with pytest.raises(ModuleNotFoundError, match='pip install adversarial-robustness-toolbox'):
        ART(ArtLike, 0.1)(net, *batch)


def test_norms_are_read_from_the_attack():
    assert isinstance(Torchattacks(Rude, 0.1).norm, Linf)
    assert isinstance(ART(ArtLike, 0.1).norm, Linf) and isinstance(ART(ArtLike, 0.1, dict(norm=2)).norm, L2)
    assert isinstance(Foolbox(FoolboxLike(2), 0.1).norm, L2) and repr(Foolbox(FoolboxLike(1), 0.1).norm) == 'L1'
    assert isinstance(Torchattacks(type('PGDL2', (Rude,), {}), 0.1).norm, L2)
    assert isinstance(Torchattacks(type('CW', (Smallest,), {})).norm, L2)
    assert isinstance(Torchattacks(Rude, 0.1, norm=L2()).norm, L2)
    orders = {
        'Linf()': ('CarliniLInfMethod', 'FeatureAdversariesPyTorch', 'CompositeAdversarialAttackPyTorch', 'PIFGSM', 'Square'),
        'L2()': ('ZooAttack', 'SimBA', 'HopSkipJump', 'SignOPTAttack', 'CarliniL2Method', 'VirtualAdversarialMethod', 'PGDL2'),
        'L1': ('EADEN', 'EADL1', 'ElasticNet'),
        'L0': ('SparseFool', 'PixelAttack', 'OnePixel', 'JSMA', 'SaliencyMapMethod', 'Pixle', 'CarliniL0Method'),
    }
    for norm, names in orders.items():
        assert {repr(Torchattacks(type(name, (Smallest,), {})).norm) for name in names} == {norm}, names
    with pytest.raises(ValueError, match="measures by 'wasserstein', .* such as norm=L2"):
        ART(ArtLike, 0.1, dict(norm='wasserstein'))
    assert isinstance(ART(ArtLike, 0.1, dict(norm='wasserstein'), norm=L2()).norm, L2)
    assert isinstance(_norm('Linf'), Linf) and isinstance(_norm('inf'), Linf) and isinstance(_norm('L2'), L2)
    assert float(_norm(0).size(torch.tensor([[0.0, 3.0, -1.0]]))) == 2


def test_steps_grow_with_eps():
    assert Torchattacks(Rude, 0.1, dict(alpha=0.02)).at(0.2).options['alpha'] == pytest.approx(0.04)
    assert Torchattacks(Rude, 8 / 255).at(4 / 255).options['alpha'] == pytest.approx(1 / 255)
    assert ART(ArtLike, 0.3).scaled(0.1).options['eps_step'] == pytest.approx(0.01)
    assert Torchattacks(Smallest).at(0.1).options == {}


def test_builders_and_names(net, batch):
    attack = Torchattacks(lambda model, eps: Rude(model, eps=eps, steps=2), 0.1)
    part = Torchattacks(partial(Rude, steps=2), 0.1)
    assert torch.equal(attack(net, *batch), part(net, *batch))
    assert ADAPTERS[0].name == 'Rude (torchattacks)' and ADAPTERS[4].name == 'ArtLike (ART)'


def test_seed_and_ids_decide(net, batch):
    x, y = batch
    attack = ADAPTERS[1]
    assert not torch.equal(replace(attack, seed=1)(net, x, y), attack(net, x, y))
    assert not torch.equal(attack(net, x, y, ids=torch.arange(50, 62)), attack(net, x, y))


def test_seed_and_classes_are_filled_in(net, batch):
    told = []

    class Asks(Smallest):
        def __init__(self, model, seed=None, n_classes=10):
            super().__init__(model)
            told.append((seed, n_classes))

    Torchattacks(Asks)(net, *batch)
    Torchattacks(Asks, options=dict(seed=5, n_classes=3))(net, *batch)
    assert told[0][0] is not None and told[0][1] == 4 and told[1] == (5, 3)


def test_they_go_where_ours_go(net, batch):
    attacks = {a.name + str(n): a for n, a in enumerate(ADAPTERS)}
    table = evaluate(net, batch, attacks, eps=[0.05, 0.1], show_progress=False).table()
    assert len(table) == 1 + 2 * len(ADAPTERS)
    assert layer_sustainability(net, batch, ADAPTERS[0], show_progress=False).table() is not None
    members = [PGD(0.1, steps=3), *(a for a in ADAPTERS if not a.minimal)]
    together = WorstOf(members).run(net, *batch)
    alone = torch.stack([a.run(net, *batch).success for a in members])
    assert (together.success >= alone[0]).all() and together.size.max() <= 0.1 + 1e-6
    assert WorstOf(members).at(0.02).run(net, *batch).size.max() <= 0.02 + 1e-6
    noisy = matched(Gaussian(), ADAPTERS[0])(net, *batch)
    size = L2().size(ADAPTERS[0](net, *batch) - batch[0])
    assert torch.allclose(L2().size(noisy - batch[0]), size, rtol=1e-3)


@every_adapter
def test_settings_are_plain(attack):
    assert json.loads(json.dumps(attack.settings)) == attack.settings
    hash(attack)
