"""The promise: whatever robustnb does with a model, the model comes back exactly as it was given.

Every public callable with a parameter named `model` is found by itself. One without a case here fails, so nobody can
forget to say how a new function is held to the promise.
"""

import copy
import importlib
import inspect
import pkgutil
import random

import numpy as np
import pytest
import torch
from torch import nn

import robustnb
from robustnb import attacks, evaluation, guard, lsa, models, report, training


class Bomb(nn.Module):
    "Does nothing, or raises at a chosen call."

    fuse = None

    def forward(self, x):
        if self.fuse is not None:
            if self.fuse == 0:
                raise RuntimeError('boom')
            object.__setattr__(self, 'fuse', self.fuse - 1)
        return x


def make_net(state: str) -> nn.Sequential:
    "Convolution, batch norm, in-place ReLU and dropout, with a gradient, a frozen weight and a hook of its owner."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            Bomb(),
            nn.Conv2d(4, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.Flatten(),
            nn.Linear(144, 3),
        )
        net(torch.rand(16, 1, 8, 8))  # statistics that are not the initial ones
    net.train(state != 'eval')
    if state == 'frozen batch norm':
        net[1].eval()
    net[0].weight.grad = torch.full_like(net[0].weight, 0.25)
    net[5].bias.requires_grad_(False)
    net[7].register_forward_hook(owners_hook)
    return net


def owners_hook(module, args, output):
    pass


def snapshot(net: nn.Module) -> dict:
    return {
        'modes': [m.training for m in net.modules()],
        'modules': [id(m) for m in net.modules()],
        'values': {k: v.clone() for k, v in net.state_dict().items()},
        'parameters': [id(p) for p in net.parameters()],
        'flags': [p.requires_grad for p in net.parameters()],
        'grads': [None if p.grad is None else (id(p.grad), p.grad.clone()) for p in net.parameters()],
        'hooks': [[(k, list(v.items())) for k, v in vars(m).items() if 'hooks' in k] for m in net.modules()],
        'forward': [vars(m).get('forward') for m in net.modules()],
    }


def rng_state() -> list:
    return [torch.get_rng_state().tolist(), random.getstate(), [str(part) for part in np.random.get_state()]]


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_untouched(before: dict, net: nn.Module):
    for what, now in snapshot(net).items():
        assert same(before[what], now), f'{what} changed'


X = torch.linspace(0, 1, 6 * 64).view(6, 1, 8, 8)
Y = torch.tensor([0, 1, 2, 0, 1, 2])
DATA = (X, Y)


def careless(model, x, y):
    "A perturbation by somebody who does everything wrong."
    model.train()
    model(x).sum().backward()
    model[2].register_forward_hook(owners_hook)
    model[9].weight.requires_grad_(False)
    return (x + 0.01).clamp(0, 1)


def settings_for(cls):
    return cls(**{k: v for k, v in {'steps': 2, 'restarts': 2}.items() if k in cls.__dataclass_fields__})


def probe_case(model):
    with importlib.import_module('robustnb.probes').Probe(model):
        model.eval()
        try:
            with torch.no_grad():
                model(X)
        finally:
            model.train(probe_case.mode)
            if probe_case.frozen:
                model[1].eval()


CASES = {
    'devices.device_of': lambda m: importlib.import_module('robustnb.devices').device_of(m),
    'devices.xla_safe': lambda m: importlib.import_module('robustnb.devices').xla_safe(m).__enter__(),
    'guard.untouched': lambda m: careless_block(m),
    'guard.unwrap': lambda m: guard.unwrap(m),
    'guard.match_dtype': lambda m: guard.match_dtype(X.double(), m),
    'guard.Normalized.__init__': lambda m: guard.Normalized(m, 0.5, 0.5),
    'guard.Logits.__init__': lambda m: guard.Logits(m),
    'probes.select': lambda m: importlib.import_module('robustnb.probes').select(m),
    'probes.Probe.__init__': probe_case,
    'models.describe': lambda m: models.describe(m, X),
    'models.save_weights': None,  # set below: needs a folder
    'attacks.perturb': lambda m: attacks.perturb(careless, m, X, Y),
    'evaluation.accuracy': lambda m: evaluation.accuracy(m, DATA),
    'evaluation.evaluate': lambda m: evaluation.evaluate(
        m, DATA, [attacks.PGD(steps=2), careless], show_progress=False
    ),
    'training.fit': lambda m: training.fit(
        m, DATA, training.Adversarial(attacks.PGD(steps=1)), epochs=2, valid=DATA, show_progress=False
    ),
    'lsa.layer_sustainability': lambda m: lsa.layer_sustainability(
        m, DATA, [attacks.PGD(steps=2), careless], show_progress=False
    ),
    'lsa.compare': lambda m: lsa.compare(m, X, X.flip(0)),
    'lsa.explore': lambda m: lsa.explore(
        m, DATA, [attacks.Gaussian(), careless], factors=[0.5, 1], show_progress=False
    ),
    'report.full_report': lambda m: report.full_report(m, DATA, attacks.PGD(steps=2), eps=[0.1], show_progress=False),
}
# Their purpose is to change the model that they are given.
BY_DESIGN = {
    'models.load_weights': 'writes weights into the model',
    'training.Standard.loss': 'one step of training, on the model in training',
    'training.Adversarial.loss': 'one step of training, on the model in training',
}


def careless_block(model):
    with guard.untouched(model):
        careless(model, X, Y)


def public_callables_with_a_model() -> list[str]:
    found = []
    for info in pkgutil.iter_modules(robustnb.__path__):
        if info.name.startswith('_'):
            continue
        module = importlib.import_module(f'robustnb.{info.name}')
        for name in getattr(module, '__all__', []):
            symbol = getattr(module, name)
            if inspect.isclass(symbol):
                methods = {
                    m: f
                    for m, f in inspect.getmembers(symbol, inspect.isfunction)
                    if m[0] != '_' or m in ('__init__', '__call__')
                }
                found += [
                    f'{info.name}.{name}.{m}'
                    for m, f in methods.items()
                    if takes_model(f) and not is_dataclass_init(symbol, m)
                ]
            elif callable(symbol) and takes_model(symbol):
                found.append(f'{info.name}.{name}')
    return found


def takes_model(function) -> bool:
    try:
        return 'model' in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


def is_dataclass_init(cls, method: str) -> bool:
    return method == '__init__' and hasattr(cls, '__dataclass_fields__')  # holds a result, runs nothing


FOUND = public_callables_with_a_model()


def case_of(name: str, folder):
    if name == 'models.save_weights':
        return lambda m: models.save_weights(m, folder / 'weights.safetensors')
    if name in CASES:
        return CASES[name]
    module, cls, method = (*name.split('.'), '')[:3]
    cls = getattr(importlib.import_module(f'robustnb.{module}'), cls)
    if module == 'attacks' and cls in (attacks.Noise, attacks.Attack):
        pytest.skip('a base class; its subclasses have cases')
    if module == 'attacks' and issubclass(cls, attacks.Perturbation) and method in ('__call__', 'run'):
        return lambda m: getattr(settings_for(cls), method)(m, X, Y)
    pytest.fail(f'{name} takes a model and has no case here: say how it is held to the promise')


def test_the_search_finds_what_it_should():
    assert {
        'evaluation.evaluate',
        'lsa.layer_sustainability',
        'attacks.PGD.run',
        'guard.untouched',
        'training.fit',
    } <= set(FOUND)


@pytest.mark.parametrize('state', ['train', 'eval', 'frozen batch norm'])
@pytest.mark.parametrize('name', [n for n in FOUND if n not in BY_DESIGN])
def test_model_comes_back_untouched(name, state, tmp_path):
    case, net = case_of(name, tmp_path), make_net(state)
    probe_case.mode, probe_case.frozen = state != 'eval', state == 'frozen batch norm'
    before, noise = snapshot(net), rng_state()
    case(net)
    assert_untouched(before, net)
    if 'careless' not in inspect.getsource(case) and name not in ('attacks.perturb', 'evaluation.evaluate'):
        assert same(noise, rng_state()), 'a global random generator was used'
    copy.deepcopy(net)


@pytest.mark.parametrize('fuse', [0, 1, 3])
@pytest.mark.parametrize('name', [n for n in FOUND if n not in BY_DESIGN])
def test_model_comes_back_untouched_after_an_exception(name, fuse, tmp_path):
    case, net = case_of(name, tmp_path), make_net('frozen batch norm')
    probe_case.mode, probe_case.frozen = True, True
    before = snapshot(net)
    object.__setattr__(net[4], 'fuse', fuse)
    try:
        case(net)
    except RuntimeError as error:
        assert 'boom' in str(error)
    object.__setattr__(net[4], 'fuse', None)
    assert_untouched(before, net)


def test_the_check_notices_a_difference():
    for spoil in (
        lambda n: n.eval(),
        lambda n: n[1].running_mean.add_(1),
        lambda n: n[0].weight.grad.add_(1),
        lambda n: n[2].register_forward_hook(owners_hook),
        lambda n: n[9].weight.requires_grad_(False),
        lambda n: n[9].weight.data.add_(1),
    ):
        net = make_net('train')
        before = snapshot(net)
        spoil(net)
        with pytest.raises(AssertionError):
            assert_untouched(before, net)
