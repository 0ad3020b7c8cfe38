"""Sweeps over filtered weights on XLA's CPU device: few programs, and the answers of the plain CPU.

In a process of its own, see xla_process.py; every `check_...` below has a test here that reports it.
"""

import copy
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from xla_process import checks_of, outcomes, run_checks

from robustnb.attacks import FGSM
from robustnb.data import digits
from robustnb.devices import (
    compile_count,
    device_of,
    env,
    fallback_ops,
    is_xla,
    matmul_precision,
    pick_device,
    seeded,
    selfcheck,
)
from robustnb.filters import pools
from robustnb.noises import Gaussian
from robustnb.synaptic import plan, sweep
from robustnb.training import trained


def digits_net():
    return trained('digits_cnn', 'digits')


class Block(nn.Module):
    "A residual block as torchvision writes it: the sum is made in place, and so is the activation."

    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, 2, bias=False), nn.BatchNorm2d(outputs))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += self.shortcut(x)
        return self.relu(out)


def residual_net():
    "Normalisations that have seen something, and are frozen."
    with seeded(0):
        first = nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True)
        net = nn.Sequential(*first, Block(6, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
        net(torch.rand(64, 1, 8, 8))
    return net.eval()


NETS = {'digits': digits_net, 'residual': residual_net}


def images(n=50):
    return digits()[1].take(n)


def programs(run):
    "What a call returns, and how many programs XLA compiled meanwhile."
    before = compile_count()
    return run(), compile_count() - before


def swept(net, data=None, *perturbations, device='xla', **how):
    how = {'batch_size': 20, 'show_progress': False} | how
    return sweep(net, images() if data is None else data, list(perturbations) or None, device=device, **how)


def same(there, here):
    "Responses from XLA and from the plain CPU: the same steps, the same accuracies."
    assert (there.layers, there.filters, there.responses) == (here.layers, here.filters, here.responses)
    for name in ('state', 'removed', 'size', 'label'):
        assert np.array_equal(there.dataset[name], here.dataset[name]), name
    for name in ('position', 'threshold', 'sample', 'eps'):
        assert np.array_equal(there.dataset[name], here.dataset[name], equal_nan=True), name
    assert np.array_equal(there.looked_at, here.looked_at)
    assert np.nanmax(np.abs(there.accuracy - here.accuracy)) <= 1e-4


@cache
def on_xla(name):
    "A net on XLA, the same one for all checks."
    return NETS[name]().to(pick_device('xla'))


# Few programs


def check_programs_of_a_layer():
    "The part before it, and one for all thresholds of the three filters."
    for name, make in NETS.items():
        swept(on_xla(name), where=[next(iter(pools(make())))], thresholds=2)  # what the first sweep of a process compiles
        for layer in pools(make()):
            there, count = programs(lambda name=name, layer=layer: swept(on_xla(name), where=[layer]))
            assert count <= 3, f'{name}: {count} programs for {layer}'
            same(there, swept(make(), where=[layer], device=None))


def check_nothing_new_for_other_thresholds():
    for name in NETS:
        swept(on_xla(name), thresholds=2)
        for how in (
            {'thresholds': 30}, {'thresholds': [0.0, 0.01, 1.0], 'filters': ['high', 'low']},
            {'grid': 'quantile', 'filters': ['magnitude', 'random']},
        ):
            count = programs(lambda name=name, how=how: swept(on_xla(name), **how))[1]
            assert count == 0, f'{name}, {how}: {count} programs'


def check_nothing_new_for_other_images_and_weights():
    swept(on_xla('digits'), thresholds=2)
    other = copy.deepcopy(on_xla('digits'))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(1.1 * parameter.cpu())
    swept(other, where=['linear2'], thresholds=2)
    assert programs(lambda: swept(other, images(90)[50:]))[1] == 0
    assert programs(lambda: swept(other, images(30)))[1] == 0
    assert swept(other, images(1)).dataset.sizes['sample'] == 1


def check_strengths_of_an_attack():
    "The attack is compiled once, not once for the last batch as well, and another strength changes nothing."
    layers = len(pools(residual_net()))
    there, count = programs(lambda: swept(on_xla('residual'), None, FGSM(0.1)))
    assert count <= 3 * layers + 12, f'{count} programs'
    same(there, swept(residual_net(), None, FGSM(0.1), device=None))
    for eps in (0.05, 0.2):
        count = programs(lambda eps=eps: swept(on_xla('residual'), None, FGSM(eps)))[1]
        assert count == 0, f'eps {eps}: {count} programs'


def check_against_each_filtered_network():
    how = {'against': 'filtered', 'thresholds': 3, 'filters': ['high', 'pulse'], 'where': ['3.conv1', '6']}
    there, count = programs(lambda: swept(on_xla('residual'), images(20), FGSM(0.1), **how))
    assert count <= 24, f'{count} programs'  # 11 of them for the attack and its checks, if nobody has attacked before
    same(there, swept(residual_net(), images(20), FGSM(0.1), device=None, **how))
    for other in ({}, {'thresholds': 4}, {'thresholds': 5}):  # the first may still compile what only happens now and then
        count = programs(lambda other=other: swept(on_xla('residual'), images(20), FGSM(0.05), **how | other))[1]
    assert count == 0, f'{count} programs'


# The answers of the plain CPU


def check_channels():
    there, count = programs(lambda: swept(on_xla('digits'), filters='channel'))
    assert count <= 3 * len(there.layers), f'{count} programs'
    same(there, swept(digits_net(), filters='channel', device=None))


def check_all_layers_at_once():
    how = {'thresholds': 9}
    for scope, most in (('global', 4), ('together', 0)):
        there, count = programs(lambda scope=scope: swept(on_xla('digits'), scope=scope, **how))
        assert count <= most, f'{scope}: {count} programs'
        same(there, swept(digits_net(), scope=scope, device=None, **how))


def check_last_batch_and_stacks():
    how = {'where': ['linear2'], 'thresholds': 5}
    expected = swept(digits_net(), device=None, **how).dataset['prediction'].values
    for batch_size, stack in ((50, None), (49, None), (64, None), (20, 1), (20, 32)):
        found = swept(on_xla('digits'), batch_size=batch_size, stack=stack, **how)
        assert np.array_equal(found.dataset['prediction'], expected), (batch_size, stack)


def check_several_strengths_of_a_noise():
    how = {'where': ['linear2'], 'eps': [0.0, 0.1], 'thresholds': 5}
    same(swept(on_xla('digits'), None, Gaussian(), **how), swept(digits_net(), None, Gaussian(), device=None, **how))


def check_stopping_and_refining():
    for how in ({'tolerance': 0.05}, {'refine': 0.05}):
        how |= {'where': ['linear2'], 'filters': 'high', 'batch_size': 100}
        same(swept(on_xla('digits'), images(500), **how), swept(digits_net(), images(500), device=None, **how))


# What is left behind


def check_network_is_left_alone():
    net = residual_net().train()
    before = {name: (t, t.detach().clone()) for name, t in net.state_dict(keep_vars=True).items()}
    swept(net, thresholds=3)
    assert net.training and device_of(net).type == 'cpu'
    for name, t in net.state_dict(keep_vars=True).items():
        assert t is before[name][0] and torch.equal(t, before[name][1]), name
    for name, t in on_xla('residual').state_dict().items():  # after all the checks above
        assert is_xla(t) and torch.equal(t.cpu(), residual_net().state_dict()[name]), name


def check_where_the_network_is():
    found = swept(on_xla('digits'), device=None, thresholds=5)
    same(found, swept(digits_net(), thresholds=5))
    assert found.settings['device'] == 'xla'
    assert all(isinstance(v.values, np.ndarray) for v in found.dataset.variables.values())


def check_file_needs_no_xla():
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'found.safetensors'
        found = swept(on_xla('digits'), thresholds=3)
        found.save(path)
        script = (
            'import sys; sys.modules["torch_xla"] = None\n'
            'from robustnb.responses import Responses; from robustnb.results import Result\n'
            f'print(Result.load({str(path)!r}).accuracy.sum())'
        )
        ran = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        assert float(ran.stdout) == float(found.accuracy.sum())


def check_going_on_from_a_file():
    with tempfile.TemporaryDirectory() as folder:
        how = {'records': Path(folder) / 'records', 'thresholds': 5}
        same(swept(on_xla('digits'), **how), swept(on_xla('digits'), **how))


def check_plan():
    found = plan(on_xla('digits'), images(), batch_size=20)
    assert len(found.table()) == len(pools(digits_net())) and found.seconds > 0 and 'evaluations' in repr(found)


# The parts of devices that only a process with XLA can show


def check_selfcheck_knows_sweeps():
    table = selfcheck('xla').set_index('check')
    assert table.passed.all(), table.to_string()
    assert {'compilations after the first thresholds', 'operations handed back to the CPU'} <= set(table.index)


def check_env_says_what_xla_is():
    line = env('xla')
    assert '\n' not in line and len(line) < 250
    assert line.endswith('| xla (cpu, 1 in all, bf16, matmul default)')


def check_precision():
    assert matmul_precision(device='xla') == 'default'
    try:
        assert matmul_precision('highest', 'xla') == 'highest' == matmul_precision(None, 'xla')
    finally:
        assert matmul_precision('default', 'xla') == 'default'


def check_fallbacks():
    "Last, because a name stays in the list: until here nothing went back to the CPU."
    assert fallback_ops() == []
    x = torch.arange(4.0).to(pick_device('xla'))
    float(x.sum())
    assert fallback_ops() == [], 'a read is no fallback'
    x[x > 1]
    assert fallback_ops() == ['aten::nonzero']


# What runs them

CHECKS = checks_of(globals(), __name__)
SLOW = {
    'check_channels', 'check_several_strengths_of_a_noise', 'check_stopping_and_refining', 'check_going_on_from_a_file',
    'check_plan', 'check_all_layers_at_once',
}  # fmt: skip


@pytest.fixture(scope='module')
def found(tmp_path_factory):
    "What each check of a group found: the slow ones, or the others."

    @cache
    def of(slow):
        names = [name for name in CHECKS if (name in SLOW) == slow]
        return outcomes(Path(__file__), names, tmp_path_factory.mktemp('xla'))

    return of


@pytest.mark.parametrize('check', [pytest.param(c, marks=[pytest.mark.slow] * (c in SLOW)) for c in CHECKS])
def test_on_xla(check, found):
    outcome = found(check in SLOW)[check]
    assert not outcome, outcome


if __name__ == '__main__':
    run_checks(CHECKS, *sys.argv[1:])
