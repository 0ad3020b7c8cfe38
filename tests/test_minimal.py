"""Attacks that look for the smallest change, against distances that are known and literal re-implementations."""

import copy
from dataclasses import replace
from itertools import pairwise
from math import inf

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from robustnb.attacks import APGD, FGSM, L2, PGD, Linf, predictions
from robustnb.data import DataSet, moons
from robustnb.devices import seeded
from robustnb.evaluation import evaluate
from robustnb.minimal import CW, DeepFool, Smallest

MASK = torch.tensor([1.0, 0.0]).repeat(32).view(1, 8, 8)
ATTACKS = [
    DeepFool(),
    DeepFool(norm=L2()),
    DeepFool(candidates=1, halvings=0),
    DeepFool(target='runner-up'),
    DeepFool(norm=L2(scale=MASK)),
    CW(steps=20, searches=3),
    CW(steps=20, searches=2, confidence=0.1),
    CW(steps=20, searches=2, target='runner-up'),
    CW(steps=20, searches=2, norm=L2(scale=MASK)),
    Smallest(PGD(steps=3), tries=6),
    Smallest(PGD(1.0, steps=3, norm=L2(), keep_going=False), tries=6),
    Smallest(FGSM(norm=Linf(scale=MASK)), tries=6),
    Smallest(APGD(steps=4, loss='dlr', target='runner-up'), tries=5),
]
every_attack = pytest.mark.parametrize('attack', ATTACKS, ids=repr)
LINEAR = [
    DeepFool(),
    DeepFool(norm=L2()),
    CW(lr=0.05),
    Smallest(PGD(steps=5, random_start=False), tries=12),
    Smallest(PGD(1.0, steps=5, norm=L2(), random_start=False), tries=12),
]


@pytest.fixture(scope='module')
def batch(net):
    "Twelve images; the network is right about most of them."
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(12, 1, 8, 8, generator=generator)
    with torch.no_grad():
        y = copy.deepcopy(net).eval()(x).argmax(1)
    y[[2, 9]] = (y[[2, 9]] + 1) % 4
    return x, y


def linear(features: int, classes: int) -> nn.Sequential:
    "A linear network whose boundaries meet in the middle of the bounds."
    with seeded(3):
        net = nn.Sequential(nn.Flatten(), nn.Linear(features, classes))
    with torch.no_grad():
        net[1].bias.copy_(-net[1].weight.sum(1) / 2)
    return net


def samples(net, shape, n=10):
    "Inputs in the middle of the bounds, where these do not bite, and the classes that the network sees."
    x = 0.4 + 0.2 * torch.rand(n, *shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return x, predictions(net(x))


def distance(net, x, y, norm):
    "The distance of each sample from the boundaries of a linear network, from the formula, one sample and class at a time."
    w, logits, found = net[1].weight.detach(), net(x).detach(), []
    if len(w) == 1:
        w, logits = torch.cat([0 * w, w]), torch.cat([0 * logits, logits], 1)
    scale = torch.as_tensor(norm.scale) * torch.ones(x.shape[1:])
    for i in range(len(x)):
        each = []
        for k in range(len(w)):
            if k != y[i]:
                slope = (w[k] - w[y[i]]) * scale.flatten()
                each.append((logits[i, y[i]] - logits[i, k]) / (slope.abs().sum() if isinstance(norm, Linf) else slope.norm()))
        found.append(min(each))
    return torch.stack(found)


# ------------------------------------------------------------------------------------------- distances that are known


@pytest.mark.parametrize(
    ('shape', 'classes'),
    [((6,), 2), ((6,), 5), ((3, 4), 1), ((1, 4, 4), 5)],
    ids=['table, two classes', 'table', 'sequences, one logit', 'images'],
)
@pytest.mark.parametrize('attack', LINEAR, ids=lambda a: a.name)
def test_the_distance_from_a_plane(attack, shape, classes):
    net = linear(torch.zeros(shape).numel(), classes)
    x, y = samples(net, shape)
    attack = replace(attack, bounds=None)
    result = attack.run(net, x, y)
    truth = distance(net, x, y, attack.norm)
    assert result.success.all() and (predictions(net(result.x_adv)) != y).all()
    assert (result.size >= 0.9999 * truth).all(), 'no wrong point is nearer than the boundary'
    excess = result.size - truth
    if isinstance(attack, CW):  # where classes meet, it may settle down at the wrong one
        assert (excess / truth).quantile(0.8) < 0.05 if classes > 2 else (excess < 0.02 * truth + 2e-4).all()
    elif classes < 3 or isinstance(attack, DeepFool):  # PGD does not aim at the nearest class
        assert (excess < 0.01 * truth + 1e-5).all()


@pytest.mark.parametrize('attack', LINEAR, ids=lambda a: a.name)
def test_the_distance_with_a_scale_and_a_mask(attack):
    net = linear(6, 2)
    x, y = samples(net, (6,))
    norm = type(attack.norm)(scale=torch.tensor([1.0, 0.0, 2.0, 0.5, 0.0, 1.0]))
    if isinstance(attack, Smallest):
        attack = replace(attack, attack=replace(attack.attack, norm=norm), bounds=None)
    else:
        attack = replace(attack, norm=norm, bounds=None)
    result, truth = attack.run(net, x, y), distance(net, x, y, norm)
    assert result.success.all() and torch.equal(result.x_adv[:, [1, 4]], x[:, [1, 4]])
    assert (result.size >= 0.9999 * truth).all() and (result.size <= 1.05 * truth + 1e-6).all()


def test_deepfool_without_its_end_goes_over_by_the_overshoot():
    net = linear(6, 3)
    x, y = samples(net, (6,))
    for norm in (Linf(), L2()):
        result = DeepFool(norm=norm, bounds=None, halvings=0, overshoot=0.1).run(net, x, y)
        assert torch.allclose(result.size, 1.1 * distance(net, x, y, norm), rtol=1e-3)
        assert result.passes == {'forward': 3, 'backward': 2}


class Ball(nn.Module):
    "One logit, positive outside of a circle of radius 1."

    def forward(self, x):
        return x.flatten(1).square().sum(1) - 1


class Ellipse(nn.Module):
    def forward(self, x):
        return (x[:, 0] / 2) ** 2 + x[:, 1] ** 2 - 1


@pytest.mark.parametrize('attack', [a for a in LINEAR if isinstance(a.norm, L2)], ids=lambda a: a.name)
def test_the_way_out_of_a_circle(attack):
    x = torch.tensor([[0.5, 0.2], [-0.3, 0.1], [0.2, -0.7], [1.2, 0.3]])
    result = replace(attack, bounds=None).run(Ball(), x, torch.zeros(4, dtype=torch.long))
    assert torch.allclose(result.size[:3], 1 - x[:3].norm(dim=1), rtol=0.02)
    assert result.success.all() and result.size[3] == 0 and torch.equal(result.x_adv[3], x[3])


def test_cw_finds_the_nearest_place_of_an_ellipse_and_deepfool_does_not():
    x, y = torch.tensor([[1.2, 0.1], [0.3, 0.35], [-0.9, 0.45]]), torch.zeros(3, dtype=torch.long)
    turn = torch.linspace(0, 2 * torch.pi, 100_000)
    truth = torch.cdist(x, torch.stack([2 * turn.cos(), turn.sin()], 1)).amin(1)
    cw, deepfool = CW(bounds=None).run(Ellipse(), x, y).size, DeepFool(norm=L2(), bounds=None).run(Ellipse(), x, y).size
    assert torch.allclose(cw, truth, rtol=0.01) and (deepfool >= 0.999 * truth).all() and deepfool.mean() > 1.02 * truth.mean()


# --------------------------------------------------------------------------------------------------- literal forms


def literal_deepfool(net, x, y, p, steps, overshoot):
    "One sample and one class at a time. Returns the points before they are shortened."
    rows = []
    for i in range(len(x)):
        x0 = adv = x[i : i + 1]
        for _ in range(steps):
            adv = adv.detach().requires_grad_()
            logits = net(adv)[0]
            if logits.argmax() != y[i]:
                break
            best, step = inf, None
            for k in range(len(logits)):
                if k == y[i]:
                    continue
                lead = logits[k] - logits[y[i]]
                w = torch.autograd.grad(lead, adv, retain_graph=True)[0]
                dual = w.abs().sum() if p == inf else w.norm()
                if -lead / dual < best:
                    best, step = -lead.detach() / dual, w.sign() if p == inf else w / w.norm()
            beyond = overshoot * (best + (adv.detach() - x0).flatten().norm(p=p))
            adv = (adv + (best + beyond) * step).clamp(0, 1)
        rows.append(adv.detach())
    return torch.cat(rows)


@pytest.mark.parametrize('norm', [Linf(), L2()])
def test_deepfool_equals_the_literal_form(norm, net, batch):
    x, y = batch
    expected = literal_deepfool(net.eval(), x, y, inf if isinstance(norm, Linf) else 2.0, 50, 0.02)
    found = DeepFool(norm=norm, halvings=0).run(net, x, y)
    assert found.success.all() and torch.allclose(found.x_adv, expected, atol=1e-5)
    shorter = DeepFool(norm=norm, halvings=10).run(net, x, y)
    for i in range(len(x)):  # the nearest wrong point on the line, by looking everywhere
        shares = torch.linspace(0, 1, 1025)[:, None, None, None]
        with torch.no_grad():
            wrong = net(x[i] + shares * (expected[i] - x[i])).argmax(1) != y[i]
        share = shares.flatten()[wrong][0]
        assert abs(shorter.size[i] - share * found.size[i]) <= 0.002 * found.size[i] + 1e-6


def literal_cw(net, x, y, steps, searches, c, lr, confidence):
    "One sample at a time, with autograd through the whole function and torch's Adam."
    rows = []
    for i in range(len(x)):
        x0, weight, low, high, best, size = x[i : i + 1], c, 0.0, inf, x[i : i + 1], inf
        with torch.no_grad():
            if net(x0).argmax(1) != y[i]:
                rows.append(x0)
                continue
        for _ in range(searches):
            start = torch.atanh((2 * x0 - 1) * 0.999999)
            w, fooled = start.clone().requires_grad_(), False
            adam = torch.optim.Adam([w], lr=lr)
            for step in range(steps + 1):
                adv = (torch.tanh(w) + 1) / 2
                logits = net(adv)[0]
                others = torch.cat([logits[: y[i]], logits[y[i] + 1 :]])
                lead, length = others.max() - logits[y[i]], (adv - x0).norm()
                if step and lead > 0 and lead >= confidence:
                    fooled = True
                    if length < size:
                        best, size = adv.detach(), float(length.detach())
                loss = (adv - x0).square().sum() + weight * torch.clamp(confidence - lead, min=0)
                adam.zero_grad()
                loss.backward()
                adam.step()
            low, high = (low, weight) if fooled else (weight, high)
            weight = 10 * low if high == inf else high / 10 if low == 0 else (low * high) ** 0.5
        rows.append(best)
    return torch.cat(rows)


@pytest.mark.parametrize('confidence', [0.0, 0.2])
def test_cw_equals_the_literal_form(confidence, net, batch):
    x, y = (t[:4] for t in batch)
    expected = literal_cw(net.eval(), x, y, 25, 3, 0.1, 0.03, confidence)
    net.zero_grad()
    found = CW(steps=25, searches=3, c=0.1, lr=0.03, decay=False, confidence=confidence)(net, x, y)
    assert torch.allclose(found, expected, atol=2e-4)


def literal_next(eps, failed, size, tries, most):
    "The strength after `eps`, for one sample, from the strengths that failed and the smallest change so far."
    low = max((f for f in failed if f < size), default=0.0)
    if size < inf:
        return (low * size) ** 0.5 if low else size / 8
    ratio, start = max(((b / a, a) for a, b in pairwise(sorted(failed))), key=lambda gap: gap[0], default=(1.0, 0.0))
    goes_back = ratio > 1 and (low >= most or tries in (3, 5, 7))
    return start * ratio**0.5 if goes_back else min(8 * low, most)


def literal_smallest(net, x, y, attack, tries):
    "One sample at a time, the strengths moved by hand."
    rows, stops = [], replace(attack, keep_going=False)
    for i in range(len(x)):
        one, label, ids = x[i : i + 1], y[i : i + 1], torch.tensor([i])
        with torch.no_grad():
            size = 0.0 if net(one).argmax(1) != label else inf
        best, eps, failed = one, attack.eps, []
        for k in range(tries):
            result = stops.at(eps).run(net, one, label, ids)
            if result.success and result.size < size:
                best, size = result.x_adv, float(result.size)
            failed += [] if result.success else [eps]
            eps = literal_next(eps, failed, size, k + 1, float(torch.maximum(one, 1 - one).max()))
        rows.append(best)
    return torch.cat(rows)


def test_smallest_equals_the_literal_form(net, batch):
    x, y = (t[:6] for t in batch)
    for attack in (PGD(steps=3), PGD(steps=3, step=0.02, keep_going=False), PGD(0.0005, steps=2)):
        expected = literal_smallest(net.eval(), x, y, attack, 7)
        assert torch.allclose(Smallest(attack, tries=7)(net, x, y), expected, atol=1e-5)


class Islands(nn.Module):
    "One logit, positive between 1 and 1.5 only."

    def forward(self, x):
        return 0.25 - (x[:, 0] - 1.25).abs()


def test_an_attack_that_jumps_over_is_asked_again_at_strengths_between():
    x, y = torch.zeros(1, 1), torch.zeros(1, dtype=torch.long)
    attack = FGSM(0.06, bounds=None)  # 0.48 is too little, 3.84 too much
    result = Smallest(attack).run(Islands(), x, y)
    assert result.success.all() and 1 <= result.size <= 1.2
    assert not Smallest(attack, tries=4).run(Islands(), x, y).success.any()


# ---------------------------------------------------------------------------------------- what holds for every attack


@every_attack
def test_what_holds_for_every_attack(attack, net, batch):
    x, y = batch
    result = attack.run(net, x, y)
    x_adv = result.x_adv
    assert x_adv.shape == x.shape and x_adv.dtype == x.dtype and not x_adv.requires_grad
    assert x_adv.min() >= 0 and x_adv.max() <= 1 and result.success.sum() > 6
    assert torch.equal(attack(net, x, y), x_adv), 'the same call twice gives the same result'
    assert torch.allclose(result.size, attack.norm.on(x).size(x_adv - x)), 'the size is that of what came back'
    assert torch.equal(x_adv[~result.success], x[~result.success])
    if attack.target is None:
        with torch.no_grad():
            logits = net.eval()(x_adv)
        assert torch.equal(result.success, logits.argmax(1) != y)
        assert torch.equal(x_adv[[2, 9]], x[[2, 9]]) and result.success[[2, 9]].all() and not result.size[[2, 9]].any()
    if isinstance(attack.norm.scale, torch.Tensor):
        assert torch.equal((x_adv - x)[..., 1::2], torch.zeros(12, 1, 8, 4))
    assert torch.equal(attack.at(0.0)(net, x, y), x), 'no strength, no change'
    assert attack(net, x[:0], y[:0]).shape == (0, 1, 8, 8)
    assert attack.minimal and attack.strength == inf


@every_attack
def test_only_what_is_small_enough_counts(attack, net, batch):
    x, y = batch
    whole = attack.run(net, x, y)
    limit = float(whole.size[whole.success].median())
    result = attack.at(limit).run(net, x, y)
    assert (result.size <= limit + 1e-6).all() and torch.equal(result.x_adv[~result.success], x[~result.success])
    if not isinstance(attack, Smallest):  # there, eps bounds the search itself
        assert torch.equal(result.success, whole.success & (whole.size <= limit))


@every_attack
def test_neither_batch_size_nor_order_matters(attack, net, batch):
    x, y = batch
    ids = torch.arange(100, 112)
    whole = attack(net, x, y, ids=ids)
    singles = torch.cat([attack(net, x[i : i + 1], y[i : i + 1], ids=ids[i : i + 1]) for i in range(0, 12, 3)])
    order = torch.tensor([7, 3, 11, 0, 5, 1, 2, 10, 9, 4, 6, 8])
    mixed = attack(net, x[order], y[order], ids=ids[order])
    # Rounding differs with the number of rows, and only a sign does not care.
    assert torch.allclose(whole[::3], singles, atol=1e-4) and torch.allclose(whole[order], mixed, atol=1e-4)


class Counter(nn.Module):
    "Counts the samples that go through, and those whose gradients reach the input."

    def __init__(self, net):
        super().__init__()
        self.net, self.rows = net, {'forward': 0, 'backward': 0}

    def forward(self, x):
        self.rows['forward'] += len(x)
        if x.requires_grad:
            x.register_hook(lambda gradient: self.rows.update(backward=self.rows['backward'] + len(gradient)))
        return self.net(x)


@every_attack
def test_passes_are_counted(attack, net, batch):
    counter = Counter(net)
    result = attack.run(counter, *batch)
    for kind, rows in counter.rows.items():
        assert result.passes[kind] == pytest.approx(rows / 12, abs=1e-3)


def test_how_many_passes(net, batch):
    x, y = batch
    assert CW(steps=7, searches=3).run(net, x, y).passes == {'forward': 22, 'backward': 19}
    hopeless = Smallest(PGD(1e-9, steps=3), tries=4, eps=1e-8).run(net, x, y).passes
    assert hopeless == {'forward': pytest.approx(1 + 16 * 10 / 12, abs=1e-3), 'backward': 10}, 'two are wrong already'
    passes = [Smallest(PGD(steps=3, keep_going=keep), tries=4).run(net, x, y).passes for keep in (True, False)]
    assert passes[0] == passes[1] and passes[0]['backward'] < 10, 'each try stops where it succeeds'


@every_attack
def test_the_model_comes_back_as_it_was(attack, net, batch):
    model = copy.deepcopy(net).train()
    model[1].eval()
    model[5].bias.requires_grad_(False)
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    with torch.no_grad():
        attack(model, *batch)
    assert [m.training for m in model.modules()] == modes and not model[5].bias.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@every_attack
def test_fixed_shapes_give_the_same(attack, net, batch, monkeypatch):
    "On XLA no row is left out and nobody waits for the device."
    expected = attack(net, *batch)
    monkeypatch.setattr('robustnb.attacks.is_xla', lambda device: True)
    monkeypatch.setattr(torch.Tensor, 'item', lambda self: pytest.fail('waited for the device'))
    assert torch.allclose(attack(net, *batch), expected, atol=1e-4)


# ----------------------------------------------------------------------------------------------- shapes and settings


@pytest.mark.parametrize('bounds', [(-1.0, 3.0), (torch.tensor([0.0, -2.0, 0.4]), torch.tensor([1.0, 2.0, 0.4])), (0.0, inf)])
@pytest.mark.parametrize('attack', LINEAR, ids=lambda a: a.name)
def test_bounds_of_every_kind(attack, bounds):
    net = linear(3, 3)
    x = torch.tensor([[0.2, 0.1, 0.4], [0.9, 0.9, 0.4], [0.5, 0.0, 0.4]])
    y = predictions(net(x).detach())
    result = replace(attack, bounds=bounds).run(net, x, y)
    low, high = (torch.as_tensor(b) for b in bounds)
    assert (result.x_adv >= low).all() and (result.x_adv <= high).all() and result.success.any()
    if low.dim():
        assert torch.equal(result.x_adv[:, 2], x[:, 2]), 'a value whose bounds meet cannot move'


def test_cw_means_the_same_in_any_unit():
    net = linear(6, 3)
    wide = copy.deepcopy(net)
    with torch.no_grad():
        wide[1].weight /= 255
    x, y = samples(net, (6,))
    small, large = CW(lr=0.05).run(net, x, y), CW(lr=0.05, bounds=(0.0, 255.0)).run(wide, 255 * x, y)
    assert torch.allclose(255 * small.size, large.size, rtol=0.01) and small.success.all()
    assert (small.size / distance(net, x, y, L2())).median() < 1.02


@pytest.mark.parametrize('attack', LINEAR, ids=lambda a: a.name)
def test_moons_have_no_bounds(attack):
    data = moons().test.take(30)
    with seeded(0):
        net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1))
        adam = torch.optim.Adam(net.parameters(), lr=0.05)
        for _ in range(40):
            adam.zero_grad()
            F.binary_cross_entropy_with_logits(net(data.x)[:, 0], data.y.float()).backward()
            adam.step()
    result = replace(attack, bounds=None).run(net, data.x, data.y)
    assert torch.equal((net(result.x_adv)[:, 0] > 0) != data.y, result.success) and result.success.float().mean() > 0.9
    assert result.x_adv.min() < 0


@pytest.mark.parametrize('attack', [DeepFool(), DeepFool(norm=L2()), CW(steps=20)], ids=lambda a: a.name)
def test_values_a_rounding_outside_of_the_bounds(attack):
    "Inputs are accepted up to 1e-6 beyond the bounds; what may not move stays there, and what is wrong already as a whole."
    net = linear(6, 3)
    x, y = samples(net, (6,), n=4)
    x[:, 1], x[:, 4] = 1 + 5e-7, -5e-7
    y = predictions(net(x).detach())
    result = replace(attack, norm=type(attack.norm)(scale=torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0]))).run(net, x, y)
    stays = torch.allclose(result.x_adv[:, [1, 4]], x[:, [1, 4]], atol=1e-6)
    assert result.size.isfinite().all() and stays and result.success.any()
    wrong = replace(attack, eps=0.0).run(net, x, (y + 1) % 3)
    assert wrong.success.all() and not wrong.size.any() and torch.allclose(wrong.x_adv, x, atol=1e-6)


def test_deepfool_leaves_alone_what_cannot_get_on():
    net = linear(6, 3)
    x, y = samples(net, (6,))
    with torch.no_grad():
        net[1].weight.zero_()
        y = predictions(net(x))
    assert DeepFool(halvings=0).run(net, x, y).passes == {'forward': 3, 'backward': 2}, 'no gradient, no second step'
    net = linear(6, 3)
    y = predictions(net(x).detach())
    assert DeepFool(halvings=0, target=y).run(net, x, y).passes['backward'] == 0, 'their own targets'
    met = (x.amin(0) * 0 + 0.3, x.amin(0) * 0 + 0.3)
    assert DeepFool(halvings=0, bounds=met).run(net, 0 * x + 0.3, predictions(net(0 * x + 0.3).detach())).passes['forward'] == 3


def test_one_logit_is_two_classes(batch):
    x, y = batch[0], batch[1] % 2
    one, two = linear(64, 1), linear(64, 2)
    with torch.no_grad():
        two[1].weight.copy_(torch.cat([0 * one[1].weight, one[1].weight]))
        two[1].bias.copy_(torch.cat([0 * one[1].bias, one[1].bias]))
    for attack in [DeepFool(), CW(steps=20), Smallest(PGD(steps=3)), DeepFool(target=1), CW(steps=20, target=0)]:
        a, b = attack.run(one, x, y), attack.run(two, x, y)
        assert torch.allclose(a.x_adv, b.x_adv, atol=1e-4) and torch.equal(a.success, b.success)
        assert torch.equal(attack.run(nn.Sequential(one, nn.Flatten(0)), x, y).success, a.success)


@pytest.mark.parametrize(
    'attack', [DeepFool(norm=L2()), CW(steps=40), Smallest(PGD(1.0, steps=10, norm=L2()))], ids=lambda a: a.name
)
def test_targets(attack, net, batch):
    x, y = batch
    targets = (y + torch.arange(12) % 2 + 1) % 4
    targets[5] = y[5]

    def aimed(target):
        inner = {'attack': replace(attack.attack, target=target)} if isinstance(attack, Smallest) else {'target': target}
        return replace(attack, **inner)

    result = aimed(targets).run(net, x, y)
    seen = net.eval()(result.x_adv).argmax(1)
    other = targets != y
    assert torch.equal(result.success, (seen == targets) & other) and result.success.sum() >= 10
    assert torch.equal(result.x_adv[5], x[5]) and not result.success[5]
    if not isinstance(attack, Smallest):  # the cross entropy of the true class leads PGD to other places than that of the target
        either = aimed(None).run(net, x, y)
        assert (result.size >= 0.9 * either.size)[result.success].all(), 'one class is not easier to reach than any'
    assert 'to 3' in aimed(3).name


def test_smallest_takes_over_what_its_attack_says():
    inner = PGD(0.5, steps=7, norm=L2(), loss='dlr', seed=4, target=2, bounds=None)
    attack = Smallest(inner, eps=3.0)
    assert (attack.norm, attack.loss, attack.seed, attack.target, attack.keep_going) == (L2(), 'dlr', 4, 2, False)
    assert attack.bounds is None and attack.strength == 3.0 and attack.name == 'smallest PGD-7 L2 dlr to 2'
    assert replace(attack, attack=FGSM()).norm == Linf()
    assert Smallest(PGD(), bounds=(0, 2)).bounds == (0, 2)
    assert attack.at(1.0).attack == inner and attack.settings['attack']['steps'] == 7


def test_the_seed_and_the_ids_of_smallest_decide(net, batch):
    attack = Smallest(PGD(steps=3), tries=5)
    found = attack(net, *batch)
    assert not torch.equal(Smallest(PGD(steps=3, seed=1), tries=5)(net, *batch), found)
    assert not torch.equal(attack(net, *batch, ids=torch.arange(50, 62)), found)


def test_what_fooled_once_is_not_forgotten():
    "An attack that works at small strengths only: bisection is led astray, but what it met is kept."

    class Shy(FGSM):
        def search(self, problem):
            reached = torch.as_tensor(problem.eps) < 0.05
            return torch.where(reached, super().search(problem)[0], problem.x), None

    net = linear(6, 2)
    x, y = samples(net, (6,))
    near = distance(net, x, y, Linf()) < 0.012
    result = Smallest(Shy(0.04), tries=6).run(net, x, y)
    assert near.any() and result.success[near].all() and (result.size[result.success] < 0.05).all()


@pytest.mark.parametrize(
    ('wrong', 'error', 'words'),
    [
        (lambda: DeepFool(loss='ce'), ValueError, "its loss is 'margin'"),
        (lambda: CW(loss='ce'), ValueError, "its loss is 'margin'"),
        (lambda: DeepFool(keep_going=False), ValueError, 'leave keep_going on'),
        (lambda: DeepFool(steps=0), ValueError, 'steps of DeepFool must be at least 1'),
        (lambda: DeepFool(-0.1), ValueError, 'at least 0'),
        (lambda: CW(searches=0), ValueError, 'searches of CW must be at least 1'),
        (lambda: CW(confidence=-1.0), ValueError, 'at least 0'),
        (lambda: CW(norm=Linf()), ValueError, 'Euclidean'),
        (lambda: Smallest(CW()), TypeError, 'of a given strength'),
        (lambda: Smallest(lambda model, x, y: x), TypeError, 'of a given strength'),
        (lambda: Smallest(PGD(0.0)), ValueError, 'a number above 0'),
        (lambda: Smallest(PGD(), tries=0), ValueError, 'at least one try'),
        (lambda: Smallest(PGD(), norm=L2()), TypeError, 'norm'),
    ],
)
def test_settings_are_checked(wrong, error, words):
    with pytest.raises(error, match=words):
        wrong()


def test_an_output_without_a_gradient_is_named(batch):
    class Decided(nn.Module):
        def forward(self, x):
            return F.one_hot(x.flatten(1).argmax(1) % 3, 3).float()

    for attack in (DeepFool(), CW(), Smallest(PGD())):
        with pytest.raises(ValueError, match='not differentiable'):
            attack(Decided(), batch[0], torch.zeros(12, dtype=torch.long))


# ------------------------------------------------------------------------------------------------------------ together


def test_one_run_gives_the_curve_that_many_runs_give():
    net = linear(6, 2)
    x, y = samples(net, (6,), n=40)
    data = DataSet(x, y, tuple('abc'))
    truth = distance(net, x, y, Linf())
    grid = [float(q) for q in truth.quantile(torch.tensor([0.2, 0.5, 0.8]))]
    for attack in (DeepFool(), Smallest(PGD(steps=5, random_start=False), tries=12), PGD(steps=5, random_start=False)):
        accuracy = evaluate(net, data, attack, grid, show_progress=False).table().accuracy[1:]
        for found, eps in zip(accuracy, grid, strict=True):
            assert abs(found - float((truth > eps).float().mean())) <= 1.001 / 40
