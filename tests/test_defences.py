"""Defences against literal re-implementations, and in every loop that may run them."""

import copy
import importlib.util
import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from robustnb.attacks import APGD, FGSM, LOSSES, PGD, Linf, WorstOf
from robustnb.data import Batch
from robustnb.defences import MART, TRADES, InputGradient, LogitPairing, WeightSize, _boosted, _doubt
from robustnb.devices import seeded
from robustnb.training import Adversarial, Standard, fit

KL, CE = PGD(0.1, steps=2, loss='kl'), PGD(0.1, steps=2)
EVERY = (WeightSize(1e-2), InputGradient(0.5), LogitPairing(0.5))
OBJECTIVES = [
    TRADES(KL), MART(CE), TRADES(KL, beta=1.5, regularizers=EVERY), MART(CE, regularizers=EVERY),
    Adversarial(CE, regularizers=(LogitPairing(),)), Standard(regularizers=(InputGradient(), WeightSize())),
]
every_objective = pytest.mark.parametrize('objective', OBJECTIVES, ids=lambda o: type(o).__name__ + 'R' * len(o.regularizers))


def make_net(classes=4, dropout=0.0, dtype=torch.float32):
    with seeded(0):
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(dropout), nn.Flatten(),
                             nn.Linear(144, classes)).to(dtype)


@pytest.fixture(scope='module')
def batch():
    generator = torch.Generator().manual_seed(1)
    return Batch(torch.rand(12, 1, 8, 8, generator=generator), torch.randint(0, 4, (12,), generator=generator), torch.arange(12))


def double(batch):
    return Batch(batch.x.double(), batch.y, batch.ids)


def binary(batch):
    return Batch(batch.x, batch.y % 2, batch.ids)


def gradients(loss, model):
    return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)


def alike(a, b, **tolerance):
    return all(torch.allclose(one, other, **tolerance) for one, other in zip(a, b, strict=True))


# ------------------------------------------------------------------------------------- literal forms, in NumPy


def np_forward(w, x):
    "Hidden units and logits of a network with one layer of tanh, a single logit z as (0, z)."
    hidden = np.tanh(x @ w[0].T + w[1])
    z = hidden @ w[2].T + w[3]
    return hidden, (np.concatenate([0 * z, z], 1) if z.shape[1] == 1 else z)


def np_p(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def np_loss(objective, w, x, x_adv, y):
    "One sample at a time, the formulas as they are printed."
    (hidden, z), (_, z_adv) = np_forward(w, x), np_forward(w, x_adv)
    p, q = np_p(z), np_p(z_adv)
    total = 0.0
    for i, true in enumerate(y):
        kl = sum(p[i, k] * np.log(p[i, k] / q[i, k]) for k in range(len(p[i])))
        if isinstance(objective, TRADES):
            total += -np.log(p[i, true]) + objective.beta * kl
        elif isinstance(objective, MART):
            rival = max(q[i, k] for k in range(len(q[i])) if k != true)
            total += -np.log(q[i, true]) - np.log(1 - rival) + objective.beta * kl * (1 - p[i, true])
        else:
            total += -np.log(p[i, true])
        for extra in objective.regularizers:
            if isinstance(extra, InputGradient):
                to_logits = p[i] - np.eye(len(p[i]))[true]
                to_logits = to_logits[1:] if len(w[2]) == 1 else to_logits
                slope = w[0].T @ ((1 - hidden[i] ** 2) * (w[2].T @ to_logits))
                total += extra.weight * (slope**2).sum()
            if isinstance(extra, LogitPairing):
                total += extra.weight * ((z[i] - z_adv[i]) ** 2).sum()
    sizes = [e.weight * sum((abs(m) ** e.power).sum() for m in (w[0], w[2])) for e in objective.regularizers
             if isinstance(e, WeightSize)]
    return total / len(y) + sum(sizes)


LITERAL = [
    TRADES(beta=6.0), TRADES(beta=0.3), MART(beta=5.0), MART(beta=0.0), Standard(regularizers=(WeightSize(0.3),)),
    Standard(regularizers=(WeightSize(0.3, power=1),)), Standard(regularizers=(InputGradient(0.7),)),
    TRADES(regularizers=(LogitPairing(0.5), InputGradient(0.2), WeightSize(0.1))),
]


@pytest.mark.parametrize('columns', [3, 1])
@pytest.mark.parametrize('objective', LITERAL, ids=repr)
def test_values_and_gradients_are_those_of_the_literal_form(objective, columns):
    with seeded(3):
        net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, columns)).double()
        x, x_adv = 2 * torch.randn(6, 3).double(), 2 * torch.randn(6, 3).double()
    batch = Batch(x, torch.arange(6) % max(2, columns), torch.arange(6))
    loss = sum((e(net, batch, x_adv, 0) for e in objective.regularizers), objective.risk(net, batch, x_adv))
    w = [p.detach().numpy().copy() for p in net.parameters()]
    literal = partial(np_loss, objective, w, x.numpy(), x_adv.numpy(), batch.y.tolist())
    if isinstance(objective, Standard):
        literal = partial(np_loss, objective, w, x_adv.numpy(), x_adv.numpy(), batch.y.tolist())
        batch = Batch(x_adv, *batch[1:])
        loss = objective.loss(net, batch, 0)
    assert loss.item() == pytest.approx(literal(), rel=1e-10)
    for found, values in zip(gradients(loss, net), w, strict=True):
        slope = np.zeros_like(values)
        for place in np.ndindex(values.shape):
            before, ends = values[place], []
            for values[place] in (before + 1e-6, before - 1e-6):
                ends.append(literal())
            values[place] = before
            slope[place] = (ends[0] - ends[1]) / 2e-6
        assert np.allclose(found.numpy(), slope, rtol=1e-5, atol=1e-7)


# -------------------------------------------------------------------------------------- the published algorithms


def start_of(batch, eps, step):
    return Linf().start(batch.x, eps, batch.ids, seed=step, restart=0).clamp(0, 1)


def literal_climb(net, loss, x, x_adv, eps, step, steps):
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        (slope,) = torch.autograd.grad(loss(net(x_adv)), x_adv)
        x_adv = torch.min(torch.max(x_adv + step * slope.sign(), x - eps), x + eps).clamp(0, 1)
    return x_adv.detach()


@pytest.mark.parametrize('beta', [0.5, 6.0])
def test_trades_is_the_published_algorithm(beta, batch):
    "Zhang et al. 2019, algorithm 1, with the reductions of the published code, from our starting point."
    batch, net = double(batch), make_net(dtype=torch.float64)
    objective = TRADES(PGD(0.1, steps=4, step=0.03, loss='kl'), beta)
    loss = objective.loss(net.train(), batch, 7)
    x, other = batch.x, copy.deepcopy(make_net(dtype=torch.float64)).eval()

    def divergence(logits):
        return F.kl_div(F.log_softmax(logits, 1), F.softmax(other(x), 1), reduction='sum')

    x_adv = literal_climb(other, divergence, x, start_of(batch, 0.1, 7), 0.1, 0.03, 4)
    assert torch.allclose(objective.perturbed(make_net(dtype=torch.float64), batch, 7), x_adv, atol=1e-12)
    clean, attacked = other.train()(x), other(x_adv)
    kl = F.kl_div(F.log_softmax(attacked, 1), F.softmax(clean, 1), reduction='sum') / len(x)
    expected = F.cross_entropy(clean, batch.y) + beta * kl
    assert torch.allclose(loss, expected, atol=1e-12)
    assert alike(gradients(loss, net), gradients(expected, other), atol=1e-10)


def test_mart_is_the_published_algorithm_but_for_its_small_numbers(batch):
    "Wang et al. 2020; the published code adds up to 0.0001 inside its logarithms."
    batch, net = double(batch), make_net(dtype=torch.float64)
    objective = MART(PGD(0.1, steps=4, step=0.03), 5.0)
    loss = objective.loss(net.train(), batch, 7)
    x, y, other = batch.x, batch.y, make_net(dtype=torch.float64).eval()
    x_adv = literal_climb(other, lambda z: F.cross_entropy(z, y, reduction='sum'), x, start_of(batch, 0.1, 7), 0.1, 0.03, 4)
    p, q = other.train()(x).softmax(1), other(x_adv).softmax(1)

    def form(a, b, c):
        others = torch.where(F.one_hot(y, 4).bool(), -1.0, q)
        boosted = -q.gather(1, y[:, None]).log() - (a - others.amax(1, keepdim=True) + b).log()
        kl = (p * (p.log() - (q + b).log())).sum(1, keepdim=True)
        return (boosted + 5.0 * kl * (c - p.gather(1, y[:, None]))).mean()

    assert torch.allclose(loss, form(1, 0, 1), atol=1e-12)
    assert alike(gradients(loss, net), gradients(form(1, 0, 1), other), atol=1e-10)
    assert loss.item() == pytest.approx(form(1.0001, 1e-12, 1.0000001).item(), rel=1e-3)


# ----------------------------------------------------------------------------------------------- special cases


@pytest.mark.parametrize('make', [
    lambda: TRADES(PGD(0.0, steps=2, loss='kl')), lambda: TRADES(KL, beta=0), lambda: TRADES(lambda model, x, y: x.clone()),
    lambda: Adversarial(PGD(0.0, steps=2)),
])
@pytest.mark.parametrize('columns', [4, 1])
def test_trades_without_a_budget_or_a_weight_is_standard_training(make, columns, batch):
    batch = double(batch if columns > 1 else binary(batch))
    one, other = make_net(columns, dtype=torch.float64), make_net(columns, dtype=torch.float64)
    loss, plain = make().loss(one.train(), batch, 0), Standard().loss(other.train(), batch, 0)
    assert torch.allclose(loss, plain, atol=1e-14)
    assert alike(gradients(loss, one), gradients(plain, other), atol=1e-13)


def test_a_whole_training_without_a_weight_is_standard_training(batch):
    with seeded(0):
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    data = (batch.x, batch.y)
    trained = [fit(net, data, objective, epochs=2, batch_size=6, show_progress=False).model[1].weight.detach()
               for objective in (Standard(), TRADES(KL, beta=0))]
    assert torch.allclose(*trained, atol=1e-7)


def test_the_boosted_loss():
    generator = torch.Generator().manual_seed(0)
    two, y = torch.randn(20, 2, generator=generator), torch.arange(20) % 2
    assert torch.allclose(_boosted(two, y), 2 * F.cross_entropy(two, y, reduction='none'), atol=1e-6), 'two classes: twice'
    single = two[:, 1:] - two[:, :1]
    assert torch.allclose(_boosted(single, y), _boosted(two, y), atol=1e-6) and torch.allclose(_doubt(single, y), _doubt(two, y))
    tied = torch.zeros(1, 3)
    assert _boosted(tied, torch.tensor([0])).item() == pytest.approx(-np.log(1 / 3) - np.log(2 / 3), rel=1e-6)


@pytest.mark.parametrize('scale', [1e2, 1e4, 1e30])
def test_extreme_logits_are_no_trouble(scale):
    signs = torch.tensor([[1.0, -1, 0], [-1, 1, 0], [0, 0, 1], [1, 1, 1]])
    net = nn.Sequential(nn.Linear(3, 3, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(scale * torch.eye(3))
    batch = Batch(signs, torch.tensor([0, 0, 0, 1]), torch.arange(4))
    for objective in (TRADES(), MART()):
        loss = objective.risk(net, batch, signs.flip(0))
        assert loss.isfinite() and all(g.isfinite().all() for g in gradients(loss, net))
    assert _doubt(scale * signs, batch.y)[0] < 1e-30 and _boosted(scale * signs, batch.y)[0] == 0


def test_mart_leaves_a_sample_alone_that_is_safely_right():
    "1 - p_y is what is not given to the true class, also where that is less than a rounding of 1."
    logits = torch.tensor([[20.0, 0.0, 0.0]])
    assert _doubt(logits, torch.tensor([0])).item() == pytest.approx(2 * np.exp(-20.0), rel=1e-3)


# ------------------------------------------------------------------------------------------------ in every loop


@every_objective
@pytest.mark.parametrize('columns', [4, 1])
def test_one_step(objective, columns, batch):
    batch, net = batch if columns > 1 else binary(batch), make_net(columns, dropout=0.5).train()
    net[3].eval()
    inside = {name: t.clone() for name, t in net.state_dict().items()}
    x_adv = objective.perturbed(net, batch, 3)
    assert all(torch.equal(t, inside[name]) for name, t in net.state_dict().items()), 'the attack leaves no trace'
    assert net.training and not net[3].training and all(p.grad is None for p in net.parameters())
    assert torch.equal(objective.perturbed(net, batch, 3), x_adv)
    if not isinstance(objective, Standard):
        assert not torch.equal(objective.perturbed(net, batch, 4), x_adv), 'another step, another start'
    loss = objective.loss(net, batch, 3)
    assert loss.shape == () and loss.isfinite() and net.training and not net[3].training
    loss.backward()
    assert all(p.grad.isfinite().all() for p in net.parameters()) and net[0].weight.grad.abs().max() > 0
    passes = 1 + isinstance(objective, TRADES | MART) + sum(
        {InputGradient: 1, LogitPairing: 2}.get(type(e), 0) for e in objective.regularizers)
    assert net[1].num_batches_tracked == passes


@every_objective
def test_in_fit_and_in_a_plain_loop(objective, batch):
    net = make_net(dropout=0.2)
    result = fit(net, (batch.x, batch.y), objective, epochs=6, batch_size=6, optimizer=partial(torch.optim.Adam, lr=0.01),
                 show_progress=False)
    assert result.history[-1]['loss'] < result.history[0]['loss']
    model, losses = make_net().train(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(5):
        loss = objective.loss(model, batch, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.fixture
def alone_in_a_group(tmp_path):
    import torch.distributed as dist

    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@every_objective
def test_in_a_distributed_model(objective, batch, alone_in_a_group):
    plain, inside = make_net().train(), make_net().train()
    wrapped = nn.parallel.DistributedDataParallel(inside)
    for step in range(2):
        objective.loss(plain, batch, step).backward()
        objective.loss(wrapped, batch, step).backward()
    assert alike([p.grad for p in inside.parameters()], [p.grad for p in plain.parameters()], atol=1e-6)
    assert alike(inside.buffers(), plain.buffers())


@every_objective
def test_in_mixed_precision(objective, batch):
    net, full = make_net().train(), make_net().train()
    with torch.autocast('cpu', torch.bfloat16):
        loss = objective.loss(net, batch, 0)
    loss.backward()
    objective.loss(full, batch, 0).backward()
    assert loss.dtype == torch.float32 and all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    a, b = (torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (net, full))
    assert F.cosine_similarity(a, b, dim=0) > 0.9


@pytest.mark.parametrize('attack', [
    WorstOf([FGSM(0.1)]), PGD(0.1, steps=2, loss='kl', restarts=2), APGD(0.1, steps=2, loss='kl'),
])
def test_an_attack_does_not_stop_training_in_mixed_precision(attack, batch):
    net = make_net().train()
    with torch.autocast('cpu', torch.bfloat16):
        loss = TRADES(attack).loss(net, batch, 0)
    loss.backward()
    assert all(p.grad.abs().max() > 0 for p in (net[0].weight, net[5].weight))


def test_robustness_is_bought(batch):
    "On data that a network can learn, TRADES moves the prediction less than standard training does."
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(200, 8, generator=generator)
    y = (x[:, 0] + 0.2 * x[:, 1:].sum(1) > 1.2).long()
    with seeded(0):
        net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
    stands = {}
    for name, objective in {'plain': Standard(), 'trades': TRADES(KL), 'mart': MART(CE)}.items():
        model = fit(net, (x, y), objective, epochs=15, batch_size=50, optimizer=partial(torch.optim.Adam, lr=0.01),
                    show_progress=False).model
        stands[name] = PGD(0.1, steps=10, loss='kl').run(model, x, y).loss.mean()
    assert stands['trades'] < 0.5 * stands['plain'] and stands['mart'] < stands['plain']


# ---------------------------------------------------------------------------------------- settings, regularizers


def test_settings_are_checked(batch, caplog):
    from robustnb.guard import _say_once

    for wrong in (lambda: TRADES(beta=-1), lambda: MART(beta=float('nan')), lambda: WeightSize(-1.0),
                  lambda: InputGradient(float('inf')), lambda: LogitPairing(-0.1)):
        with pytest.raises(ValueError, match='at least 0'):
            wrong()
    with pytest.raises(ValueError, match='power is 1 or 2'):
        WeightSize(power=3)
    with pytest.raises(ValueError, match='attacks none'):
        Standard(regularizers=(LogitPairing(),)).loss(make_net(), batch, 0)
    _say_once.cache_clear()
    with caplog.at_level('WARNING'):
        TRADES(KL), MART(CE), TRADES(lambda model, x, y: x)
        assert not caplog.text
        TRADES(PGD(0.3))
    assert "loss='kl'" in caplog.text
    assert repr(TRADES()) != repr(TRADES(beta=1)) and TRADES() == TRADES() and hash(MART()) == hash(MART())


def test_what_is_no_attack_and_no_criterion():
    for objective in (TRADES, MART):
        for wrong in ('pgd', None, PGD):
            with pytest.raises(TypeError, match=f'attack of {objective.__name__} is a perturbation'):
                objective(wrong)
        with pytest.raises(ValueError, match="beta of .* got '6'"):
            objective(beta='6')
    for wrong in ('nonsense', 'kl', None, LOSSES['kl']):
        with pytest.raises(ValueError, match="criterion is 'ce', 'margin', 'dlr' or a function"):
            InputGradient(criterion=wrong)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inward, self.outward = nn.Linear(8, 24), nn.Linear(64, 4)

    def forward(self, x):
        q, k, v = self.inward(x).chunk(3, -1)
        return self.outward(F.scaled_dot_product_attention(q, k, v).flatten(1))


@pytest.mark.parametrize('net', [
    Attention(), nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(),
                               nn.Linear(36, 4)),
], ids=['attention', 'pool'])
def test_input_gradients_through_layers_of_many_kinds(net, batch):
    regularizer = InputGradient(1.0)
    loss = regularizer(net.double().eval(), double(batch), batch.x, 0)
    (found,) = torch.autograd.grad(loss, net[0].weight if isinstance(net, nn.Sequential) else net.inward.weight)
    weight, ends = next(net.parameters()), []
    place = int(found.abs().argmax())
    for move in (1e-5, -2e-5):
        with torch.no_grad():
            weight.view(-1)[place] += move
            ends.append(regularizer(net, double(batch), batch.x, 0).item())  # also where no gradient is wanted
    assert found.flatten()[place].item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-4)


def test_the_size_of_weights_counts_what_is_trained():
    net = make_net()
    net[5].requires_grad_(False)
    assert WeightSize(2.0)(net, None, None, 0).item() == pytest.approx(2 * net[0].weight.square().sum().item())
    assert WeightSize(2.0, power=1)(net, None, None, 0).item() == pytest.approx(2 * net[0].weight.abs().sum().item())


def test_regularizers_of_your_own_add_up(batch):
    def constant(model, batch, x_adv, step):
        return torch.tensor(float(step))

    net = make_net().eval()
    plain, more = TRADES(KL), TRADES(KL, regularizers=(constant, constant))
    assert more.loss(net, batch, 2).item() == pytest.approx(plain.loss(net, batch, 2).item() + 4, rel=1e-6)


def test_a_criterion_of_your_own_for_the_input_gradient(batch):
    with seeded(0):
        regression = nn.Sequential(nn.Flatten(), nn.Linear(64, 1))

    def squared(output, y):
        return (output[:, 0] - y) ** 2

    target = Batch(batch.x, torch.rand(12, generator=torch.Generator().manual_seed(0)), batch.ids)
    found = InputGradient(1.0, squared)(regression, target, target.x, 0)
    error = regression(target.x)[:, 0] - target.y
    assert found.item() == pytest.approx((4 * error**2).mean().item() * regression[1].weight.square().sum().item(), rel=1e-5)


# -------------------------------------------------------------------------------------------------------- on XLA


SCRIPT = """
import torch_xla, torch, copy
from torch import nn
from robustnb.attacks import L2, PGD
from robustnb.data import Batch
from robustnb.defences import MART, TRADES, InputGradient, LogitPairing, WeightSize
from robustnb.devices import compile_count, pick_device, seeded, sync

device = pick_device('xla')
x, y, ids = torch.rand(8, 16, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 4, torch.arange(8)
every = (WeightSize(1e-2), InputGradient(0.5), LogitPairing(0.5))
for objective in (TRADES(PGD(0.5, steps=1, loss='kl', norm=L2()), regularizers=every), MART(PGD(0.5, steps=1, norm=L2()))):
    with seeded(0):
        here = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
    there, seen = copy.deepcopy(here).to(device), []
    for step in range(2):
        losses = []
        for net, to in ((here, 'cpu'), (there, device)):
            net.zero_grad()
            loss = objective.loss(net.train(), Batch(x.to(to), y.to(to), ids.to(to)), step)
            loss.backward()
            sync(torch.device(to))
            losses.append(float(loss.detach()))
        apart = max(float((a.grad - b.grad.cpu()).abs().max()) for a, b in zip(here.parameters(), there.parameters()))
        seen.append(compile_count())
        print('step', abs(losses[0] - losses[1]) / losses[0], apart, seen[-1] - seen[0])
"""


@pytest.mark.skipif(importlib.util.find_spec('torch_xla') is None, reason='torch_xla is not installed')
def test_one_step_on_xla_equals_the_cpu(tmp_path):
    ran = subprocess.run([sys.executable, '-c', SCRIPT], capture_output=True, text=True, timeout=300, cwd=tmp_path,
                         env=os.environ | {'PJRT_DEVICE': 'CPU'})
    assert ran.returncode == 0, ran.stderr[-3000:]
    steps = [line.split()[1:] for line in ran.stdout.splitlines() if line.startswith('step')]
    assert len(steps) == 4, ran.stdout
    for loss, gradient, compilations in steps:
        assert float(loss) < 1e-3 and float(gradient) < 1e-2 and int(compilations) <= 1, ran.stdout
