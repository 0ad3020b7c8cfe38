"""Layer-wise regularised training against a literal re-implementation, at its edges, and in every loop that may run it."""

import copy
import importlib.util
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from interruptions import stop_at
from torch import nn

from robustnb.attacks import APGD, FGSM, PGD
from robustnb.checkpoints import load_state, save_state
from robustnb.data import Batch, DataSet
from robustnb.defences import TRADES, LogitPairing
from robustnb.devices import seeded
from robustnb.distributed import joined
from robustnb.layerwise import METHODS, LayerRegularizer, Refreshed, adversarial_training, constant_share
from robustnb.lsa import layer_sustainability
from robustnb.measures import MEASURES, as_measure
from robustnb.probes import Probe
from robustnb.training import Adversarial, Standard, fit
from robustnb.vulnerable import VulnerableLayers, most_vulnerable

SGD = partial(torch.optim.SGD, lr=0.2, momentum=0.9)
QUIET = {'show_progress': False}


def make_net(dtype=torch.float32, norm=True, dropout=0.0):
    with seeded(0):
        between = [nn.BatchNorm2d(4)] if norm else [nn.Identity()]
        return nn.Sequential(nn.Conv2d(1, 4, 3), *between, nn.ReLU(inplace=True), nn.Dropout(dropout), nn.Flatten(),
                             nn.Linear(144, 12), nn.ReLU(), nn.Linear(12, 4)).to(dtype)  # fmt: skip


def make_data(n: int = 60, side: int = 8) -> DataSet:
    x = torch.rand(n, 1, side, side, generator=torch.Generator().manual_seed(0))
    return DataSet(x, (4 * x[:, 0, :4].flatten(1).mean(1)).long() % 2 + torch.arange(n) % 2 * 2, tuple('abcd'))


@pytest.fixture(scope='module')
def batch():
    data = make_data(12)
    return Batch(data.x, data.y, torch.arange(12))


@pytest.fixture(scope='module')
def x_adv(batch):
    return (batch.x + 0.1 * torch.randn(batch.x.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)


def double(batch):
    return Batch(batch.x.double(), batch.y, batch.ids)


def hooks(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


def gradients(loss, model):
    return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)


def alike(a, b, **tolerance):
    return all(torch.allclose(one, other, **tolerance) for one, other in zip(a, b, strict=True))


# ------------------------------------------------------------------------------------- the literal form, in NumPy


def np_cm(name: str, a: np.ndarray, b: np.ndarray) -> float:
    "One layer over a batch, sample by sample and unit by unit."
    n, change, clean = len(a), [], []
    for m in range(n):
        change.append(sum((a[m, u] - b[m, u]) ** 2 for u in range(a.shape[1])))
        clean.append(sum(a[m, u] ** 2 for u in range(a.shape[1])))
    if name == 'relative_error':
        values = [0.0 if c == d == 0 else np.inf if c == 0 else np.sqrt(d / c) for c, d in zip(clean, change, strict=True)]
        defined = [v for v in values if np.isfinite(v)]
        return sum(defined) / len(defined) if defined else 0.0
    if name == 'mse':
        return sum(change) / n / a.shape[1]
    if name == 'energy_relative_error':
        return np.sqrt(sum(change) / sum(clean))
    if name == 'centred_error':
        mean = [sum(a[m, u] for m in range(n)) / n for u in range(a.shape[1])]
        spread = sum((a[m, u] - mean[u]) ** 2 for m in range(n) for u in range(a.shape[1]))
        return np.sqrt(sum(change) / spread)
    assert name == 'cosine_distance'
    return sum(1 - a[m] @ b[m] / np.linalg.norm(a[m]) / np.linalg.norm(b[m]) for m in range(n)) / n


def np_layers(w, x):
    one = np.maximum(x @ w[0].T + w[1], 0)
    two = np.tanh(one @ w[2].T + w[3])
    return {'1': one, '3': two, '4': two @ w[4].T + w[5]}


def np_lr(w, x, x_adv, gamma, name, fixed=None):
    "The formula as it is printed; `fixed` are the clean representations, if they are taken as given."
    clean, attacked = fixed or np_layers(w, x), np_layers(w, x_adv)
    return sum(g * np_cm(name, clean[layer], attacked[layer]) for layer, g in gamma.items())


@pytest.mark.parametrize('detach', ['none', 'clean'])
@pytest.mark.parametrize('name', ['relative_error', 'mse', 'cosine_distance', 'energy_relative_error', 'centred_error'])
@pytest.mark.parametrize('gamma', [{'1': 0.7}, {'1': 0.5, '3': 2.0, '4': 0.1}], ids=['one layer', 'three layers'])
def test_values_and_gradients_are_those_of_the_literal_form(gamma, name, detach):
    with seeded(3):
        net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        x, x_adv = torch.randn(6, 3).double(), torch.randn(6, 3).double()
    with torch.no_grad():
        net[0].bias += 0.5  # for each sample some unit is active
    loss = LayerRegularizer(list(gamma), gamma, name, detach)(net, Batch(x, None, None), x_adv, 0)
    w = [p.detach().numpy().copy() for p in net.parameters()]
    fixed = np_layers(w, x.numpy()) if detach == 'clean' else None
    literal = partial(np_lr, w, x.numpy(), x_adv.numpy(), gamma, name, fixed)
    assert loss.dtype == torch.float64 and loss.item() == pytest.approx(literal(), rel=1e-10)
    for found, values in zip(gradients(loss, net), w, strict=True):
        slope = np.zeros_like(values)
        for place in np.ndindex(values.shape):
            before, ends = values[place], []
            for values[place] in (before + 1e-6, before - 1e-6):
                ends.append(literal())
            values[place] = before
            slope[place] = (ends[0] - ends[1]) / 2e-6
        assert np.allclose(found.detach().numpy(), slope, rtol=1e-5, atol=1e-7)


def test_the_gradient_of_a_linear_layer_by_hand():
    "d/dW of |W d| / |W x| is (W d) d' / (|W d| |W x|) - |W d| (W x) x' / |W x|^3, in the mean over the samples."
    with seeded(1):
        net = nn.Sequential(nn.Linear(4, 3, bias=False)).double()
        x, d = torch.randn(5, 4).double(), 0.1 * torch.randn(5, 4).double()
    (found,) = gradients(LayerRegularizer('0')(net, Batch(x, None, None), x + d, 0), net)
    w, expected = net[0].weight.detach(), torch.zeros(3, 4).double()
    for a, b in zip(x, d, strict=True):
        wa, wb = w @ a, w @ b
        expected += torch.outer(wb, b) / (wb.norm() * wa.norm()) - wb.norm() * torch.outer(wa, a) / wa.norm() ** 3
    assert torch.allclose(found, expected / 5, atol=1e-12)


@pytest.mark.parametrize('name', ['relative_error', 'centred_error', 'linear_cka', 'cosine_distance'])
def test_it_is_the_number_of_the_analysis(name, batch, x_adv):
    net = make_net().eval()
    result = layer_sustainability(net, batch[:2], lambda model, x, y: x_adv, ['2', '6'], name, **QUIET)
    values = result.dataset['value'].values.reshape(2, -1).mean(1)
    expected = as_measure(name).damage(values) @ [0.5, 2.0]
    found = LayerRegularizer(['2', '6'], {'2': 0.5, '6': 2}, name)(net, batch, x_adv, 0)
    assert found.item() == pytest.approx(expected, rel=1e-4)


def test_own_measures(batch, x_adv):
    def distance(clean, pert):
        return (clean - pert).flatten(1).abs().sum(1)

    net = make_net().eval()
    with Probe(net, '6') as probe:
        clean, pert = ((net(x), probe['6'])[1] for x in (batch.x, x_adv))
    found = LayerRegularizer('6', measure=distance)(net, batch, x_adv, 0)
    assert found.item() == pytest.approx((clean - pert).abs().sum(1).mean().item(), rel=1e-6)
    steps = LayerRegularizer('6', measure=lambda clean, pert: ((clean > 0) != (pert > 0)).float().mean(1))
    with pytest.raises(ValueError, match='has no gradient at 6'):
        steps(net, batch, x_adv, 0)
    with torch.no_grad():
        steps(net, batch, x_adv, 0)  # to look at, not to learn from


# ------------------------------------------------------------------------------------------------------ the edges


SMOOTH = [name for name, measure in MEASURES.items() if measure.differentiable]


@pytest.mark.parametrize('name', SMOOTH)
def test_equal_inputs_give_zero_and_no_pull(name, batch):
    net = make_net(torch.float64).eval()
    loss = LayerRegularizer('activations', measure=name)(net, double(batch), batch.x.double(), 0)
    assert abs(loss.item()) < 1e-12
    assert all(g.isfinite().all() and g.abs().max() < 1e-6 for g in gradients(loss, net))


@pytest.mark.parametrize('where', ['1', '3'])
@pytest.mark.parametrize('name', [*SMOOTH, 'naive'])
def test_silent_layers_do_not_spoil_the_gradient(name, where):
    "Sample 0 is silent in both, 1 only when clean, 2 only when attacked, 3 and 4 never."

    def naive(clean, pert):
        return (clean - pert).norm(dim=1) / clean.norm(dim=1)

    with seeded(2):
        net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 3, bias=False), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        net[0].weight.abs_(), net[0].bias.fill_(-1), net[2].weight.abs_()
    clean = torch.tensor([[0.0, 0], [0, 0], [9, 9], [9, 2], [5, 6]])
    attacked = torch.tensor([[0.0, 0], [9, 9], [0, 0], [8, 3], [7, 6]])
    measure = naive if name == 'naive' else name
    loss = LayerRegularizer(where, measure=measure)(net, Batch(clean, None, None), attacked, 0)
    found = gradients(loss, net)
    assert loss.isfinite() and all(g.isfinite().all() for g in found) and found[0].abs().max() > 0
    if name in ('relative_error', 'naive'):
        rows = [0, 2, 3, 4] if name == 'relative_error' else [2, 3, 4]  # 0/0 of a measure of one's own is undefined
        rest = LayerRegularizer(where)(net, Batch(clean[rows], None, None), attacked[rows], 0)
        assert loss.item() == pytest.approx(rest.item(), rel=1e-6) and alike(found, gradients(rest, net), atol=1e-6)


@pytest.mark.parametrize('name', SMOOTH)
def test_a_dead_network_and_a_batch_of_one(name, batch, x_adv):
    dead = make_net(norm=False)
    with torch.no_grad():
        dead[0].weight.zero_(), dead[0].bias.fill_(-1)
    loss = LayerRegularizer('2', measure=name)(dead, batch, x_adv, 0)
    assert loss.item() == 0 and all((g == 0).all() for g in gradients(loss, dead))
    net, single = make_net().eval(), Batch(*(part[:1] for part in batch))
    loss = LayerRegularizer('activations', measure=name)(net, single, x_adv[:1], 0)
    assert loss.isfinite() and all(g.isfinite().all() for g in gradients(loss, net))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('name', ['relative_error', 'centred_error', 'linear_cka'])
def test_in_mixed_precision_and_in_half(dtype, name, batch, x_adv):
    regularizer, full = LayerRegularizer(['2', '6'], measure=name), make_net(norm=False)
    expected = regularizer(full, batch, x_adv, 0)
    flat = torch.cat([g.flatten() for g in gradients(expected, full)])
    mixed, half = make_net(norm=False), make_net(dtype, norm=False)
    with torch.autocast('cpu', dtype):
        loss = regularizer(mixed, batch, x_adv, 0)
    for found, net in ((loss, mixed), (regularizer(half, batch, x_adv, 0), half)):
        assert found.dtype == torch.float32 and found.item() == pytest.approx(expected.item(), rel=0.1)
        slopes = gradients(found, net)
        assert all(g.isfinite().all() for g in slopes)
        assert F.cosine_similarity(torch.cat([g.float().flatten() for g in slopes]), flat, dim=0) > 0.9


def test_what_overflows_is_left_out():
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU()).half()
    with torch.no_grad():
        net[0].weight.fill_(300.0)
    x = torch.tensor([[1.0, 1], [200, 200]])
    loss = LayerRegularizer('1')(net, Batch(x, None, None), x + torch.tensor([0.5, 0.25]), 0)
    assert loss.isfinite() and loss > 0 and all(g.isfinite().all() for g in gradients(loss, net))


def test_the_weight_grows(batch, x_adv):
    net = make_net().eval()
    full = LayerRegularizer('2', 2.0)(net, batch, x_adv, 0).item()
    grown = [LayerRegularizer('2', 2.0, warm_up=4)(net, batch, x_adv, step).item() for step in (0, 1, 2, 4, 9)]
    assert grown == pytest.approx([0, full / 4, full / 2, full, full], rel=1e-6)


@pytest.mark.parametrize('batch_norm', ['separate', 'joint'])
def test_batch_norm(batch_norm, batch, x_adv):
    "In training mode the two ways differ, and each is what it says; in evaluation mode they are the same."
    net, plain, regularizer = make_net(), make_net(), LayerRegularizer('2', batch_norm=batch_norm)
    loss = regularizer(net.train(), batch, x_adv, 0)
    if batch_norm == 'joint':
        clean, pert = plain[:3](torch.cat([batch.x, x_adv])).chunk(2)
    else:
        clean, pert = plain[:3](batch.x), plain[:3](x_adv)
    assert loss.item() == pytest.approx(as_measure('relative_error')(clean, pert).mean().item(), rel=1e-5)
    assert alike(net.buffers(), plain.buffers()) and net.training
    still = regularizer(net.eval(), batch, x_adv, 0)
    assert torch.allclose(still, LayerRegularizer('2')(net, batch, x_adv, 0))


@pytest.mark.parametrize('start', [False, True], ids=['dropout', 'noise'])
def test_what_is_drawn_inside_the_network_is_no_damage(start, batch, x_adv):
    "Both passes draw the same; the training around them goes on as after one pass, and the next call draws anew."

    class Noisy(nn.Module):
        def forward(self, x):
            return x * (1 + 0.5 * torch.randn_like(x))

    net = make_net(norm=False, dropout=0.5).train()
    if start:
        net[3] = Noisy()
    assert LayerRegularizer('6')(net, batch, batch.x.clone(), 0) == 0
    with seeded(5):
        with Probe(net, '6') as probe:
            net(batch.x)
            clean = probe['6']
        after = torch.get_rng_state()
    with seeded(5):
        with Probe(net, '6') as probe:
            net(x_adv)
            expected = as_measure('relative_error')(clean, probe['6']).mean()
    with seeded(5):
        found = [LayerRegularizer('6')(net, batch, x_adv, 0).item()]
        assert torch.equal(torch.get_rng_state(), after)
        found.append(LayerRegularizer('6')(net, batch, x_adv, 0).item())
    assert found[0] == pytest.approx(expected.item(), rel=1e-6) and found[0] != found[1]


def test_inference_tensors_and_modes(batch, x_adv):
    net = make_net(norm=False)
    expected = LayerRegularizer('6')(net, batch, x_adv, 0)
    with torch.inference_mode():
        loaded = Batch(*(part.clone() for part in batch))
        assert LayerRegularizer('6')(net, loaded, x_adv, 0).item() == pytest.approx(expected.item(), rel=1e-6)
    slopes = gradients(expected, net)
    for how in ('separate', 'joint'):
        assert alike(gradients(LayerRegularizer('6', batch_norm=how)(net, loaded, x_adv, 0), net), slopes, atol=1e-6)


def test_checkpointed_and_functional_networks(batch, x_adv):
    class Frugal(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.net, x, use_reentrant=False)

    class Term(Frugal):
        def forward(self, x, x_adv):
            return LayerRegularizer('6')(self.net, Batch(x, None, None), x_adv, 0)

    net = make_net(norm=False)
    expected = gradients(LayerRegularizer('6')(net, batch, x_adv, 0), net)
    assert alike(gradients(LayerRegularizer('net.6')(Frugal(net), batch, x_adv, 0), net), expected, atol=1e-6)
    values = {name: p.detach() for name, p in net.named_parameters()}
    found = torch.func.grad(lambda v: torch.func.functional_call(Term(net), {f'net.{n}': p for n, p in v.items()},
                                                                 (batch.x, x_adv)))(values)  # fmt: skip
    assert alike(found.values(), expected, atol=1e-6)


class Recurrent(nn.Module):
    "One layer that runs three times, and an activation that is a function."

    def __init__(self):
        super().__init__()
        self.enter, self.again, self.leave = nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        h = F.relu(self.enter(x.flatten(1)[:, :8]))
        for _ in range(3):
            h = torch.tanh(self.again(h))
        return self.leave(h)


def test_layers_that_run_again_and_functions(batch, x_adv):
    net = Recurrent()
    each = [LayerRegularizer(f'again#{i}')(net, batch, x_adv, 0).item() for i in range(3)]
    assert LayerRegularizer('again')(net, batch, x_adv, 0).item() == pytest.approx(sum(each), rel=1e-6)
    assert LayerRegularizer('again', {'again': 2})(net, batch, x_adv, 0).item() == pytest.approx(2 * sum(each), rel=1e-6)
    one = LayerRegularizer(['again#0', 'again#2'], {'again#0': 1, 'again#2': 3})(net, batch, x_adv, 0).item()
    assert one == pytest.approx(each[0] + 3 * each[2], rel=1e-6)
    assert LayerRegularizer('relu()')(net, batch, x_adv, 0) > 0


def test_what_is_refused(batch, x_adv):
    net = make_net()
    for settings, words in (
        ({'gamma': -1}, 'gamma is a number'),
        ({'gamma': float('nan')}, 'gamma is a number'),
        ({'gamma': '1'}, 'gamma is a number'),
        ({'gamma': {'2': -1}}, 'gamma is a number'),
        ({'gamma': {}}, 'empty dictionary'),
        ({'detach': 'both'}, "detach is 'none'"),
        ({'batch_norm': 'no'}, "batch_norm is 'separate'"),
        ({'warm_up': -1}, 'number of steps'),
        ({'warm_up': 0.5}, 'number of steps'),
        ({'measure': 'sign_flip'}, 'no gradient to train with'),
        ({'measure': 'topk_overlap'}, 'no gradient to train with'),
    ):
        with pytest.raises(ValueError, match=words):
            LayerRegularizer('2', **settings)
    with pytest.raises(KeyError, match="no measure 'mes'"):
        LayerRegularizer('2', measure='mes')
    for gamma in ({'2': 1}, {'2': 1, '6': 1, '7': 1}, {'2': 1, 'relu': 1}):
        with pytest.raises(ValueError, match='to each of them, and to no other'):
            LayerRegularizer(['2', '6'], gamma)(net, batch, x_adv, 0)
    with pytest.raises(ValueError, match='chooses no layer'):
        LayerRegularizer(['2', 'rleu'])(net, batch, x_adv, 0)
    with pytest.raises(ValueError, match='attacks none'):
        Standard(regularizers=LayerRegularizer('2')).loss(net, batch, 0)
    for batch_norm in ('separate', 'joint'):
        with pytest.raises(ValueError, match='come in pairs'):
            LayerRegularizer('2', batch_norm=batch_norm)(net, batch, x_adv[:4], 0)
    wide = nn.Sequential(nn.Flatten(0, 1), nn.ReLU())
    with pytest.raises(ValueError, match="or take batch_norm='separate'"):
        LayerRegularizer('1', batch_norm='joint')(wide, Batch(torch.rand(3, 2, 2), None, None), torch.rand(3, 2, 2), 0)
    assert LayerRegularizer('2') == LayerRegularizer('2') and hash(LayerRegularizer('2')) == hash(LayerRegularizer('2'))
    assert hooks(net) == 0


def test_the_layers_of_a_rule(batch):
    net = make_net().eval()
    result = layer_sustainability(net, batch[:2], FGSM(0.1), **QUIET)
    chosen = most_vulnerable(result)
    assert isinstance(chosen, VulnerableLayers) and LayerRegularizer(chosen) == LayerRegularizer(chosen.layers)
    with pytest.raises(ValueError, match='the rule chose no layer'):
        LayerRegularizer(most_vulnerable(result, 'joint', eta=50))


class Broken(nn.Module):
    def forward(self, x):
        raise RuntimeError('broken')


def test_no_hook_stays(batch, x_adv):
    net = make_net()
    LayerRegularizer('activations')(net, batch, x_adv, 0).backward()
    assert hooks(net) == 0
    net[5] = Broken()
    with pytest.raises(RuntimeError, match='broken'):
        LayerRegularizer('2')(net, batch, x_adv, 0)
    assert hooks(net) == 0
    net[5] = nn.Linear(144, 12)
    with pytest.raises(ValueError, match='must return one value per sample'):
        LayerRegularizer('2', measure=lambda clean, pert: clean)(net, batch, x_adv, 0)
    assert hooks(net) == 0 and net.training


def test_layers_that_do_not_always_run(batch, x_adv):
    class Sometimes(Recurrent):
        def forward(self, x):
            h = self.enter(x.flatten(1)[:, :8])
            return self.leave(self.again(h) if x is batch.x else h)

    with pytest.raises(ValueError, match='so there is nothing to compare'):
        LayerRegularizer('weights')(Sometimes(), batch, x_adv, 0)


# -------------------------------------------------------------------------------------------------------- recipes


ATTACKS = {'AT-FGSM': FGSM, 'AT-FAST': PGD, 'AT-PGD': PGD, 'AT-APGD': APGD, 'AT-TRADES': PGD}


@pytest.mark.parametrize('end', ['', '-LR'])
@pytest.mark.parametrize('method', METHODS)
def test_each_recipe_trains(method, end, batch):
    net = make_net().train()
    objective = adversarial_training(method + end, 0.1, '2' if end else None, 0.5, steps=2, seed=3)
    assert type(objective.attack) is ATTACKS[method] and objective.attack.eps == 0.1 and objective.attack.seed == 3
    assert isinstance(objective, TRADES if method == 'AT-TRADES' else Adversarial)
    optimizer, before = torch.optim.SGD(net.parameters(), lr=0.05), copy.deepcopy(net.state_dict())
    for step in range(2):
        optimizer.zero_grad()
        objective.loss(net, batch, step).backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in net.parameters()) and hooks(net) == 0
    assert not torch.equal(net[0].weight, before['0.weight'])


@pytest.mark.parametrize('method', METHODS)
def test_the_term_is_added_to_the_loss_of_the_method(method, batch):
    net = make_net().eval()
    plain, more = adversarial_training(method, 0.1, steps=2), adversarial_training(method + '-LR', 0.1, '2', 0.7, steps=2)
    x_adv = plain.perturbed(net, batch, 5)
    expected = plain.loss(net, batch, 5) + LayerRegularizer('2', 0.7)(net, batch, x_adv, 5)
    assert torch.allclose(more.loss(net, batch, 5), expected)


def test_settings_of_recipes():
    assert adversarial_training('AT-FAST', 0.2).attack == PGD(0.2, steps=1, step=0.25)
    assert adversarial_training('AT-TRADES', 0.2, beta=2.0) == TRADES(PGD(0.2, steps=10, loss='kl'), 2.0)
    assert adversarial_training('AT-PGD', 0.2, step=0.01, bounds=None).attack == PGD(0.2, steps=10, step=0.01, bounds=None)
    (term,) = adversarial_training('AT-APGD-LR', 0.2, ['2', '6'], {'2': 1, '6': 2}, 'centred_error').regularizers
    assert term == LayerRegularizer(['2', '6'], {'2': 1, '6': 2}, 'centred_error')
    wrong = ('AT-CW', None, 'no method'), ('AT-PGD', '2', 'was AT-PGD-LR meant'), ('AT-PGD-LR', None, 'needs layers')
    for name, layers, words in wrong:
        with pytest.raises((KeyError, ValueError), match=words):
            adversarial_training(name, 0.1, layers)


def test_the_term_does_what_it_is_told():
    data = make_data(120)
    moved = {}
    for gamma in (0, 3):
        objective = adversarial_training('AT-FGSM-LR', 0.1, '2', gamma, 'centred_error')
        model = fit(make_net(), data, objective, epochs=6, batch_size=40, optimizer=SGD, **QUIET).model
        result = layer_sustainability(model, data, FGSM(0.1), '2', 'centred_error', **QUIET)
        moved[gamma] = float(result.dataset['value'].values.item())
    assert moved[3] < 0.9 * moved[0]


# ------------------------------------------------------------------------------------------- sets of layers anew


def refreshed(every=3, **more):
    return Refreshed(Adversarial(PGD(0.1, steps=2)), make_data(16), FGSM(0.1), every=every,
                     regularizer=LayerRegularizer('activations', 0.5, 'centred_error', warm_up=4), **more)  # fmt: skip


def test_the_choice_is_made_anew(batch):
    objective, net = refreshed(), make_net().train()
    with pytest.raises(RuntimeError, match='call it once before the first step'):
        objective.loss(net, batch, 0)
    objective.setup(net)
    assert [c['step'] for c in objective.choices] == [0] and len(objective.layers) == 1
    x_adv = objective.objective.perturbed(net, batch, 9)
    term = LayerRegularizer(objective.layers, 0.5, 'centred_error')
    expected = objective.objective.risk(net.eval(), batch, x_adv) + term(net, batch, x_adv, 9)
    assert torch.allclose(objective.loss(net, batch, 9), expected)
    before = copy.deepcopy(net.state_dict())
    for _ in range(7):
        objective.after_step(net)
    assert [c['step'] for c in objective.choices] == [0, 3, 6] and hooks(net) == 0
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items()), 'to choose changes nothing'
    result = layer_sustainability(net, make_data(16), FGSM(0.1), measure='centred_error', **QUIET)
    assert objective.layers == most_vulnerable(result).layers
    other, state = refreshed(), objective.state_dict()
    other.load_state_dict(state)
    assert (other.step, other.layers) == (7, objective.layers)
    for one in (objective, other):
        one.after_step(net), one.after_step(net)
    assert [c['step'] for c in state['choices']] == [0, 3, 6], 'a state that was taken stays as it was'


def test_weights_and_rules_of_a_choice(batch, caplog):
    net = make_net().eval()
    more = Refreshed(Adversarial(FGSM(0.1), regularizers=LogitPairing(0.1)), make_data(16), FGSM(0.1), k=2,
                     regularizer=LayerRegularizer('activations', {'2': 1.0, '6': 3.0}))  # fmt: skip
    more.setup(net)
    assert more.layers == ['2', '6']
    weighted = LayerRegularizer(['2', '6'], {'2': 1.0, '6': 3.0})
    one = Refreshed(Adversarial(FGSM(0.1)), make_data(16), FGSM(0.1), regularizer=weighted)
    one.setup(net)
    assert len(one.layers) == 1 and one.loss(net, batch, 0).isfinite()
    full = Adversarial(FGSM(0.1), regularizers=(LogitPairing(0.1), weighted))
    assert torch.allclose(more.loss(net, batch, 0), full.loss(net, batch, 0))
    short = Refreshed(Adversarial(FGSM(0.1)), make_data(16), FGSM(0.1), regularizer=LayerRegularizer('activations', {'2': 1.0}))
    with pytest.raises(ValueError, match='the regularised layers are 2, 6'):
        short.setup(net)  # at once, not when layer 6 is chosen
    none = Refreshed(Adversarial(FGSM(0.1)), make_data(16), FGSM(0.1), 'joint', eta=50)
    with caplog.at_level('WARNING'):
        none.setup(net)
    assert none.layers == [] and 'no layer is regularised from step 0 on' in caplog.text
    assert torch.allclose(none.loss(net, batch, 0), Adversarial(FGSM(0.1)).loss(net, batch, 0))
    with pytest.raises(TypeError, match='Refreshed takes an objective'):
        Refreshed(refreshed(), make_data(16), FGSM(0.1))
    with pytest.raises(TypeError, match='Refreshed takes an objective'):
        Refreshed(lambda model, batch, step: 0, make_data(16), FGSM(0.1))
    with pytest.raises(ValueError, match='every is a number of steps'):
        refreshed(every=0)


def test_weights_of_calls_that_were_chosen(batch):
    net, gamma = Recurrent(), {'again': 2.0, 'again#0': 5.0}
    own = Refreshed(Adversarial(FGSM(0.1)), make_data(16), FGSM(0.1), regularizer=LayerRegularizer('again', gamma))
    own.setup(net)
    x_adv = own.objective.perturbed(net, batch, 0)
    for layer, weight in (('again#0', 5.0), ('again#2', 2.0)):
        own.choices[-1]['layers'] = [layer]
        term = LayerRegularizer(layer, weight)(net, batch, x_adv, 0)
        assert torch.allclose(own.loss(net, batch, 0), own.objective.loss(net, batch, 0) + term)


HOW = {
    'names': lambda: adversarial_training('AT-PGD-LR', 0.1, ['2', '6'], {'2': 1, '6': 0.5}, steps=2),
    'refreshed': refreshed,
}


@pytest.mark.parametrize('every', [None, 3])
@pytest.mark.parametrize('how', HOW)
def test_an_interruption_leaves_no_trace(how, every, monkeypatch, tmp_path):
    settings = {'epochs': 3, 'batch_size': 12, 'every': every, 'optimizer': SGD} | QUIET
    net, path = make_net(dropout=0.2), tmp_path / 'run.safetensors'
    straight = fit(net, make_data(), HOW[how](), **settings)
    with monkeypatch.context() as patch:
        stop_at(patch, 8)
        assert fit(net, make_data(), HOW[how](), checkpoint=path, **settings).interrupted
    again = fit(net, make_data(), HOW[how](), checkpoint=path, **settings)
    assert load_state(path)['step'] == 15 and again.history[-1]['loss'] == straight.history[-1]['loss']
    for a, b in zip(straight.model.state_dict().values(), again.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    if how == 'refreshed':
        assert again.objective.choices == straight.objective.choices
        assert [c['step'] for c in again.objective.choices] == [0, 3, 6, 9, 12, 15]
        with pytest.raises(ValueError, match='belongs to another training'):
            fit(net, make_data(), refreshed(every=4), checkpoint=path, **settings)


# ------------------------------------------------------------------------------------------------ constant share


def test_the_constant_share_is_the_literal_one(batch):
    net, x = make_net(torch.float64), make_data(50).x.double()
    with torch.no_grad():
        rep = net.eval()[:3](x).flatten(1).numpy()
    literal = sum(np.mean(rep[:, u]) ** 2 for u in range(rep.shape[1])) / np.mean([(row**2).sum() for row in rep])
    for data in (x, DataSet(x, torch.zeros(50).long()), [(part, torch.zeros(len(part)).long()) for part in x.split(13)]):
        for size in (1, 7, 128):
            assert constant_share(net, data, '2', batch_size=size)['2'] == pytest.approx(literal, rel=1e-10)
    assert list(constant_share(net.train(), x)) == ['2', '6'] and net.training and hooks(net) == 0


def test_the_ends_of_the_constant_share():
    class Fixed(nn.Module):
        def forward(self, x):
            return torch.ones_like(x)

    x = torch.cat([torch.eye(4), -torch.eye(4)])
    net = nn.Sequential(nn.Identity(), Fixed(), nn.Hardtanh(0, 1e-30), nn.Identity())
    assert constant_share(net, x, ['0', '1']) == {'0': 0.0, '1': pytest.approx(1.0)}
    assert constant_share(nn.Sequential(nn.ReLU()), -x.abs(), '0') == {'0': 0.0}, 'silence is no constant'
    with pytest.raises(ValueError, match='the data are empty'):
        constant_share(net, x[:0], '0')


def test_a_constant_lowers_the_relative_error_only(batch, x_adv):
    "The shortcut, and the measure that does not fall for it."
    net, louder = make_net(norm=False), make_net(norm=False)
    with torch.no_grad():
        net[0].bias += 5  # no unit is cut off, so that another 5 move nothing else
        louder[0].bias += 10
    term = {name: [LayerRegularizer('2', measure=name)(m, batch, x_adv, 0).item() for m in (net, louder)]
            for name in ('relative_error', 'energy_relative_error', 'centred_error')}  # fmt: skip
    assert term['relative_error'][1] < 0.6 * term['relative_error'][0]
    assert term['centred_error'][1] == pytest.approx(term['centred_error'][0], rel=1e-3)
    share = constant_share(net, batch.x, '2')['2']
    expected = (1 - share) ** 0.5 * term['centred_error'][0]
    assert term['energy_relative_error'][0] == pytest.approx(expected, rel=1e-3)


# ---------------------------------------------------------------------------------------------- several processes


CASES = {
    'relative': lambda: adversarial_training('AT-PGD-LR', 0.1, ['2', '6'], {'2': 1, '6': 0.5}, steps=2),
    'joint': lambda: Adversarial(PGD(0.1, steps=2), regularizers=LayerRegularizer('2', batch_norm='joint', detach='clean')),
    'refreshed': lambda: Refreshed(Adversarial(PGD(0.1, steps=2)), make_data(16), FGSM(0.1), every=3),
}


def trained(case: str, batch_size: int):
    net = make_net(norm=False)
    optimizer = partial(torch.optim.SGD, lr=0.05)
    return fit(net, make_data(61), CASES[case](), epochs=2, batch_size=batch_size, optimizer=optimizer, seed=1, **QUIET)


def flat(model) -> torch.Tensor:
    return torch.cat([v.detach().double().flatten() for v in model.state_dict().values()])


def wrapped_steps(folder: Path) -> torch.Tensor:
    "Somebody else's loop around PyTorch's own wrapper: each process has half of the batch."
    net, data, half = make_net(norm=False), make_data(24), slice(*((0, 12) if torch.distributed.get_rank() == 0 else (12, 24)))
    return plain_steps(nn.parallel.DistributedDataParallel(net), net, Batch(data.x[half], data.y[half], torch.arange(24)[half]))


def plain_steps(model, net, batch) -> torch.Tensor:
    optimizer, term, attack = torch.optim.SGD(net.parameters(), lr=0.1), LayerRegularizer(['2', '6']), FGSM(0.1)
    for step in range(3):
        x_adv = attack(net, batch.x, batch.y, batch.ids)
        loss = F.cross_entropy(model(x_adv), batch.y) + term(model, batch, x_adv, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return flat(net)


def work(folder: Path) -> None:
    "What each of the two processes does."
    torch.set_num_threads(1)
    with joined('cpu'):
        found = {case: flat(trained(case, 8).model) for case in CASES} | {'wrapped': wrapped_steps(folder)}
        save_state(folder / f'found{torch.distributed.get_rank()}', found)


@pytest.fixture(scope='module')
def both(in_two_processes):
    return [load_state(in_two_processes / f'found{i}') for i in (0, 1)]


@pytest.mark.parametrize('case', CASES)
def test_two_processes_equal_one_with_the_doubled_batch(case, both):
    one = flat(trained(case, 16).model)
    assert torch.equal(both[0][case], both[1][case]), 'both processes end with the same bits'
    assert torch.allclose(both[0][case], one, atol=1e-5)
    assert not torch.allclose(one, flat(make_net(norm=False)), atol=1e-3), 'it has learnt something'


def test_a_wrapped_model_in_a_plain_loop(both):
    net, data = make_net(norm=False), make_data(24)
    one = plain_steps(net, net, Batch(data.x, data.y, torch.arange(24)))
    assert torch.equal(both[0]['wrapped'], both[1]['wrapped']) and torch.allclose(both[0]['wrapped'], one, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ XLA


SCRIPT = """
import copy
import torch_xla, torch
from torch import nn
from robustnb.attacks import PGD
from robustnb.data import Batch
from robustnb.devices import compile_count, pick_device, seeded, sync
from robustnb.layerwise import LayerRegularizer, Refreshed, constant_share
from robustnb.training import Adversarial

with seeded(0):
    net = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    x, x_adv, y = torch.rand(16, 8), torch.rand(16, 8), torch.arange(16) % 4
device = pick_device('xla')
there = copy.deepcopy(net).to(device)
here, yonder = Batch(x, y, torch.arange(16)), Batch(x.to(device), y.to(device), torch.arange(16).to(device))

def compared(name, mode, **settings):
    term, found = LayerRegularizer(['2', '4'], **settings), []
    for model, batch, pert in ((net, here, x_adv), (there, yonder, x_adv.to(device))):
        model.train(mode)
        loss = term(model, batch, pert, 3)
        found.append([part.detach().cpu() for part in (loss, *torch.autograd.grad(loss, [model[0].weight, model[3].bias]))])
    print('term', max(float((a - b).abs().max()) for a, b in zip(*found)), name, mode)

compared('relative_error', True)
compared('joint', True, batch_norm='joint', detach='clean', warm_up=7)
compared('centred_error', False, measure='centred_error')

def losses(model, batch, pert, term):
    optimizer, seen = torch.optim.SGD(model.parameters(), lr=0.1), []
    model.train()
    for step in range(7):
        loss = nn.functional.cross_entropy(model(pert), batch.y) + term(model, batch, pert, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        sync(batch.x.device)
        seen.append(compile_count())
    return seen

term = LayerRegularizer(['2', '4'], {'2': 1.0, '4': 0.5}, warm_up=5)
one, two = copy.deepcopy(net), copy.deepcopy(net).to(device)
losses(one, here, x_adv, term)
seen = losses(two, yonder, x_adv.to(device), term)
apart = max(float((a.detach() - b.detach().cpu()).abs().max()) for a, b in zip(one.parameters(), two.parameters()))
print('loop', apart, seen[4] - seen[1], seen[-1] - seen[4], seen)

term, thinned = LayerRegularizer('1'), nn.Sequential(nn.Linear(8, 6), nn.Dropout(0.5)).to(device).train()
found = [float(term(thinned, yonder, yonder.x.clone() + more, 0)) for more in (0, 0.1, 0.1)]
print('dropout', found[0], found[1] > 0, found[1] != found[2])

found = []
for model, batch in ((net, here), (there, yonder)):
    objective = Refreshed(Adversarial(PGD(0.1, steps=2)), batch[:2], lambda model, x, y: (x + 0.1).clamp(0, 1))
    objective.setup(model)
    found.append((objective.choices, constant_share(model, batch.x)))
(here, share), (yonder, other) = found
print('chosen', here == yonder, max(abs(share[name] - other[name]) for name in share))
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec('torch_xla') is None, reason='torch_xla is not installed')
def test_on_xla_it_equals_the_cpu(tmp_path):
    ran = subprocess.run([sys.executable, '-c', SCRIPT], capture_output=True, text=True, timeout=300, cwd=tmp_path,
                         env=os.environ | {'PJRT_DEVICE': 'CPU'})  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    lines = [line.split() for line in ran.stdout.splitlines() if line.strip()]
    terms = [line for line in lines if line[0] == 'term']
    assert len(terms) == 3 and all(float(line[1]) < 1e-3 for line in terms), ran.stdout
    found = {line[0]: line[1:] for line in lines}
    assert float(found['loop'][0]) < 1e-3 and found['loop'][1] == '0', 'the warm-up compiles nothing from step to step'
    assert int(found['loop'][2]) <= 1, 'and after it at most the program for the full weight'
    assert found['dropout'] == ['0.0', 'True', 'True'], 'the same masks for clean and attacked inputs, and others in each call'
    assert found['chosen'][0] == 'True' and float(found['chosen'][1]) < 1e-3


if __name__ == '__main__':
    work(Path(sys.argv[1]))


def test_a_pair_will_do_for_a_batch(batch, x_adv):
    net, term = make_net().eval(), LayerRegularizer('activations')
    expected = term(net, batch, x_adv, 0)
    assert term(net, (batch.x, batch.y), x_adv, 0) == term(net, [batch.x, batch.y], x_adv, 0) == expected > 0
    with pytest.raises(ValueError, match='in pairs'):
        term(net, batch.x, x_adv, 0)


def test_a_misspelt_rule_is_an_error_before_the_training():
    with pytest.raises(KeyError, match="no rule 'topq'; there are joint"):
        Refreshed(Adversarial(PGD(0.1)), (torch.rand(4, 4), torch.zeros(4).long()), PGD(0.1), rule='topq')
