"""The same on XLA as without it, tested on XLA's CPU device.

Every `check_...` below runs in one process of its own, see xla_process.py, and has a test here that reports it.
"""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from xla_process import checks_of, outcomes, run_checks

from robustnb.devices import (
    compile_count,
    device_of,
    env,
    is_xla,
    pick_device,
    sample_normal,
    sample_uniform,
    seed_everything,
    seeded,
    selfcheck,
    sync,
    xla_safe,
)
from robustnb.guard import Normalized, check_inputs, check_labels, match_dtype, untouched
from robustnb.measures import MEASURES
from robustnb.probes import Probe


def xla():
    return pick_device('xla')


def close(on_xla, expected, tol=1e-5):
    assert is_xla(on_xla)
    torch.testing.assert_close(on_xla.detach().cpu(), expected.detach(), rtol=tol, atol=tol)


def conv_net(inplace=True):
    with seeded(0):
        net = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=inplace), nn.Flatten(), nn.Linear(144, 3)
        )
        for t in (net[1].weight, net[1].bias, net[1].running_mean):
            nn.init.normal_(t)
        nn.init.uniform_(net[1].running_var, 0.5, 2)
    return net.eval()


IMAGES = sample_uniform((1, 8, 8), torch.arange(6))


# Devices


def check_choice():
    assert is_xla(xla()) and pick_device('tpu') == pick_device('xla:0') == xla()
    assert pick_device().type != 'xla', 'XLA on a CPU must never be chosen by itself'
    assert 'xla' not in env().rpartition('|')[2]
    assert is_xla(conv_net().to(xla())[0].weight) and device_of(conv_net().to(xla())) == xla()


def check_selfcheck():
    table = selfcheck('xla')
    assert table.passed.all(), table.to_string()


def check_noise_bit_for_bit():
    ids = torch.tensor([0, 1, 17, 2**31, 2**40, 2**62, -1])
    for seed, stream in ((0, 0), (1, 0), (0, 1), (-5, 3), (2**63, 2**40), (313, 7)):
        for shape in ((), (5,), (2, 3, 4)):
            expected = sample_uniform(shape, ids, seed, stream)
            got = sample_uniform(shape, ids.to(xla()), seed, stream)
            assert is_xla(got) and torch.equal(got.cpu(), expected)
            close(sample_normal(shape, ids.to(xla()), seed, stream), sample_normal(shape, ids, seed, stream))
    got = sample_uniform((4,), torch.arange(20).to(xla())[::3])
    assert torch.equal(got.cpu(), sample_uniform((4,), torch.arange(20)[::3]))


def check_noise_does_not_compile_again():
    ids = torch.arange(8).to(xla())
    counts = []
    for k in range(8):
        sample_uniform((7,), ids + k, seed=2 + k, stream=2 + 3 * k)
        sync(xla())
        counts.append(compile_count())
    assert counts[-1] == counts[2], counts


def check_seeds():
    for seed in (0, 5, -1, 2**63, -(2**63)):
        seed_everything(seed)
        first = torch.rand(3, device=xla()).cpu()
        seed_everything(seed)
        assert torch.equal(torch.rand(3, device=xla()).cpu(), first)


BATCH_NORMS = [
    (kind, shape, affine, track)
    for kind, shape in (
        (nn.BatchNorm1d, (5,)),
        (nn.BatchNorm1d, (5, 6)),
        (nn.BatchNorm2d, (5, 3, 2)),
        (nn.BatchNorm3d, (5, 2, 3, 2)),
    )
    for affine in (True, False)
    for track in (True, False)
]


def check_gradients_through_frozen_batch_norm():
    for kind, shape, affine, track in BATCH_NORMS:
        with seeded(1):
            layer = kind(5, affine=affine, track_running_stats=track).eval()
            for t in layer.state_dict().values():
                if t.is_floating_point():
                    nn.init.uniform_(t, 0.5, 2)
        x = sample_normal(shape, torch.arange(4))
        weight = sample_normal(shape, torch.arange(4), seed=1)
        results = {}
        for device in (torch.device('cpu'), xla()):
            layer = layer.to(device)
            inner = x.to(device).requires_grad_()
            inputs = (inner, *layer.parameters()) if device.type == 'cpu' else (inner, *layer.parameters())
            with xla_safe(layer) if track else torch.enable_grad():
                out = layer(inner)
            results[device.type] = (out, *torch.autograd.grad((out * weight.to(device)).sum(), inputs))
        for got, expected in zip(results['xla'], results['cpu'], strict=True):
            close(got, expected, 1e-4)


def check_functional_batch_norm():
    x = IMAGES[:, 0].requires_grad_(False)
    mean, var = x.mean((0, 2)), x.var((0, 2))
    expected = F.batch_norm(x, mean, var, eps=0.1)
    inner = x.to(xla()).requires_grad_()
    model = nn.Linear(1, 1).to(xla())
    with xla_safe(model):
        out = F.batch_norm(inner, mean.to(xla()), running_var=var.to(xla()), eps=0.1)
    close(out, expected)
    grad = torch.autograd.grad(out.sum(), inner)[0]
    close(grad, (var + 0.1).rsqrt().view(1, -1, 1).expand_as(x))


def check_training_batch_norm_is_left_alone():
    a, b = conv_net().train(), conv_net().train().to(xla())
    expected = a(IMAGES)
    with xla_safe(b):
        close(b(IMAGES.to(xla())), expected, 1e-4)
    close(b[1].running_mean, a[1].running_mean, 1e-4)


def ascend(net, x, y, eps, step, steps):
    "A small PGD, without a Python branch on values."
    delta = torch.zeros_like(x)
    with xla_safe(net):
        for _ in range(steps):
            delta.requires_grad_()
            grad = torch.autograd.grad(F.cross_entropy(net(x + delta), y), delta)[0]
            delta = (delta.detach() + step * grad.sign()).clamp(-eps, eps)
            delta = (x + delta).clamp(0, 1) - x
            sync(x.device)
    return x + delta


def check_attack_like_loop_stops_compiling():
    net, y = conv_net(), torch.arange(6) % 3
    expected = ascend(net, IMAGES, y, torch.tensor(0.1), torch.tensor(0.02), 6)
    on_xla, x, y = net.to(xla()), IMAGES.to(xla()), y.to(xla())
    counts, results = [], []
    for eps in (0.1, 0.05, 0.2, 0.3):
        eps = torch.tensor(eps).to(xla())
        results.append(ascend(on_xla, x, y, eps, eps / 5, 6))
        sync(xla())
        counts.append(compile_count())
    close(results[0], expected, 1e-4)
    assert counts[-1] == counts[1], f'programs after each strength: {counts}'


# Guard


def check_untouched():
    for training in (False, True, None):
        net = conv_net().train().to(xla())
        net[1].eval()
        net[0].weight.grad = torch.ones_like(net[0].weight)
        before = {k: v.cpu() for k, v in net.state_dict().items()}
        x = IMAGES.to(xla()).requires_grad_()
        with untouched(net, training), xla_safe(net):
            net(x).sum().backward()
            net[1].train()
            net(x)
            sync(xla())
            net.requires_grad_(False)
            net.register_forward_hook(print)
        sync(xla())
        assert all(torch.equal(before[k], v.cpu()) for k, v in net.state_dict().items())
        assert net.training and not net[1].training and not net._forward_hooks
        assert net[0].weight.grad.cpu().eq(1).all() and net[4].weight.grad is None and net[4].weight.requires_grad


def check_moving_a_model_inside_is_undone():
    net = conv_net()
    with untouched(net):
        net.to(xla())
    assert device_of(net).type == 'cpu' and all(isinstance(p, nn.Parameter) for p in net.parameters())
    net(IMAGES).sum().backward()
    on_xla = conv_net().to(xla())
    with untouched(on_xla):
        on_xla.cpu()
    assert all(is_xla(t) for t in (*on_xla.parameters(), *on_xla.buffers()))
    close(on_xla(IMAGES.to(xla())), net(IMAGES))


def check_a_changed_parameter_is_reported():
    net = conv_net().to(xla())
    with pytest.raises(RuntimeError, match='4.bias'), untouched(net), torch.no_grad():
        net[4].bias.add_(1)


def check_normalized_and_inputs():
    net = Normalized(conv_net(), 0.1, 0.3)
    expected = net(IMAGES)
    on_xla = net.to(xla())
    close(on_xla(check_inputs(match_dtype(IMAGES.double(), on_xla))), expected)
    assert check_labels(torch.arange(3, dtype=torch.int32).to(xla()), 3, 3).tolist() == [0, 1, 2]
    bad = IMAGES.clone()
    bad[3] = float('nan')
    with pytest.raises(ValueError, match='sample 3'):
        check_inputs(bad.to(xla()))


# Measures


def check_measures():
    clean, pert = sample_normal((3, 5), torch.arange(7)), sample_normal((3, 5), torch.arange(7), seed=1)
    clean[2] = pert[2] = clean[3] = 0
    for measure in MEASURES.values():
        close(measure(clean.to(xla()), pert.to(xla())), measure(clean, pert))
        inner = pert.to(xla()).requires_grad_()
        value = measure(clean.to(xla()), inner)
        if measure.differentiable:
            grad = torch.autograd.grad(torch.where(value.isinf(), 0, value).sum(), inner)[0]
            assert grad.cpu().isfinite().all(), measure.name


def check_accumulators():
    clean, pert = sample_normal((5,), torch.arange(40)), sample_normal((5,), torch.arange(40), seed=1)
    for kind in (measure.fn for measure in MEASURES.values() if measure.stream):
        here, there, counts = kind(), kind(), []
        for a, b in zip(clean.split(4), pert.split(4), strict=True):
            here.update(a, b)
            there.update(a.to(xla()), b.to(xla()))
            sync(xla())
            counts.append(compile_count())
        close(there.compute(), here.compute())
        assert counts[-1] == counts[1], (kind.__name__, counts)
        other = kind()
        other.merge(there)
        close(other.compute(), here.compute())


# Probes


def check_probe():
    for inplace in (True, False):
        net = conv_net(inplace)
        with torch.no_grad(), Probe(net, ['0', '1', '2', '4']) as expected:
            net(IMAGES)
        on_xla = conv_net(inplace).to(xla())
        for mode in (torch.no_grad, torch.enable_grad):  # XLA itself cannot run a linear layer in inference mode
            for detach in (True, False):
                with mode(), Probe(on_xla, ['0', '1', '2', '4'], detach=detach) as probe:
                    on_xla(IMAGES.to(xla()))
                    sync(xla())
                assert list(probe) == list(expected)
                for name in probe:
                    close(probe[name], expected[name], 1e-4)


def check_probe_views_and_sums_in_place():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.flat = nn.Linear(4, 4), nn.Flatten()

        def forward(self, x):
            h = self.layer(x)
            f = self.flat(h)
            f.view(-1)[1:].relu_()
            h += x
            h[0] = 7
            return F.relu(h, inplace=True)

    with seeded(0):
        net = Net()
    x = sample_normal((4,), torch.arange(3))
    with torch.no_grad(), Probe(net, ['layer', 'flat', 'activations']) as expected:
        net(x)
    on_xla = net.to(xla())
    with torch.no_grad(), Probe(on_xla, ['layer', 'flat', 'activations']) as probe:
        on_xla(x.to(xla()))
    for name in expected:
        close(probe[name], expected[name], 1e-5)
    assert probe['layer'].cpu().min() < 0


def check_streaming_probe_compiles_once():
    net = conv_net().to(xla())
    counts = []
    with torch.no_grad():
        for k in range(6):
            with Probe(net, ['weights', 'activations'], reduce=lambda name, rep: rep.flatten(1).norm(dim=1)):
                net(sample_uniform((1, 8, 8), torch.arange(6 * k, 6 * k + 6)).to(xla()))
            sync(xla())
            counts.append(compile_count())
    assert counts[-1] == counts[0], counts


def check_probe_within_xla_safe():
    net = conv_net()
    x = IMAGES.clone().requires_grad_()
    with Probe(net, ['1', '2'], detach=False) as probe:
        net(x)
    expected = torch.autograd.grad(probe['1'].square().sum() + probe['2'].sum(), x)[0]
    on_xla, inner = conv_net().to(xla()), IMAGES.to(xla()).requires_grad_()
    with xla_safe(on_xla), Probe(on_xla, ['1', '2'], detach=False) as probe:
        on_xla(inner)
    close(torch.autograd.grad(probe['1'].square().sum() + probe['2'].sum(), inner)[0], expected, 1e-4)
    with Probe(on_xla, ['1', '2'], detach=False) as probe, xla_safe(on_xla):
        on_xla(inner)
    close(torch.autograd.grad(probe['1'].square().sum() + probe['2'].sum(), inner)[0], expected, 1e-4)


# What runs them

CHECKS = checks_of(globals(), __name__)


@pytest.fixture(scope='module')
def found(tmp_path_factory):
    "What each check found."
    return outcomes(Path(__file__), CHECKS, tmp_path_factory.mktemp('xla'))


@pytest.mark.parametrize('check', CHECKS)
def test_on_xla(check, found):
    assert not found[check], found[check]


if __name__ == '__main__':
    run_checks(CHECKS, *sys.argv[1:])
