"""Attacks against literal re-implementations, counted passes, and inputs that go wrong."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from robustnb.attacks import APGD, FGSM, L2, LOSSES, PGD, TARGETS, Linf, Problem, WorstOf, _ask_open_rows, predictions
from robustnb.devices import seeded

ATTACKS = [
    FGSM(0.1),
    PGD(0.1, steps=3),
    PGD(0.1, steps=3, random_start=False),
    PGD(0.1, steps=2, restarts=3),
    PGD(0.1, steps=3, loss='margin'),
    PGD(0.1, steps=3, loss=lambda logits, y: -logits.gather(1, y[:, None])[:, 0]),
    PGD(0.1, steps=3, loss='dlr'),
    PGD(0.1, steps=3, loss='kl'),
    PGD(0.1, steps=3, keep_going=False),
    PGD(0.1, steps=2, restarts=3, keep_going=False),
    PGD(0.1, steps=2, restarts=3, loss='kl', keep_going=False),
    PGD(0.1, steps=3, target='least likely'),
    PGD(0.1, steps=3, target=2, loss='dlr'),
    PGD(0.1, steps=3, norm=Linf(scale=torch.linspace(0, 1, 8))),
    FGSM(1.0, norm=L2()),
    PGD(1.0, steps=3, norm=L2()),
    PGD(1.0, steps=3, norm=L2(scale=torch.linspace(0, 2, 64).view(1, 8, 8))),
    PGD(1.0, steps=3, norm=L2(), keep_going=False),
    PGD(1.0, steps=3, norm=L2(), loss='kl'),
    APGD(0.1, steps=7),
    APGD(0.1, steps=7, loss='dlr', restarts=2),
    APGD(0.1, steps=7, keep_going=False),
    APGD(1.0, steps=7, norm=L2()),
    WorstOf([FGSM(0.1), PGD(0.1, steps=3)]),
    WorstOf([PGD(0.5, steps=2), APGD(0.5, steps=3, loss='dlr')], eps=0.1),
]


def spelled(attack):
    "Its repr, the same in every process: the tests of one run are shared out among several."
    return re.sub(' at 0x[0-9a-f]+', '', repr(attack))


def norm_of(attack):
    return attack.attacks[0].norm if isinstance(attack, WorstOf) else attack.norm


@pytest.fixture(scope='module')
def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.rand(12, 1, 8, 8, generator=generator), torch.randint(0, 4, (12,), generator=generator)


def literal_pgd(net, x, y, eps, step, steps, start):
    "Madry et al. 2018, one sample at a time, one line a formula."
    rows = []
    for i in range(len(x)):
        x0, adv = x[i : i + 1], start[i : i + 1].clamp(0, 1)
        for _ in range(steps):
            adv = adv.detach().requires_grad_()
            F.cross_entropy(net(adv), y[i : i + 1]).backward()
            adv = adv + step * adv.grad.sign()
            adv = torch.max(torch.min(adv, x0 + eps), x0 - eps).clamp(0, 1)
        rows.append(adv.detach())
    return torch.cat(rows)


def test_pgd_equals_the_literal_form(net, batch):
    x, y = batch
    net.eval()
    expected = literal_pgd(net, x, y, 0.1, 0.03, 5, x)
    net.zero_grad()
    assert torch.allclose(PGD(0.1, steps=5, step=0.03, random_start=False)(net, x, y), expected, atol=1e-7)
    start = Linf().start(x, 0.1, torch.arange(12), seed=5, restart=0)
    expected = literal_pgd(net, x, y, 0.1, 2.5 * 0.1 / 5, 5, start)
    net.zero_grad()
    assert torch.allclose(PGD(0.1, steps=5, seed=5)(net, x, y), expected, atol=1e-7)


def test_fgsm_equals_the_literal_form(net, batch):
    x, y = batch
    x_grad = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(net.eval()(x_grad), y), x_grad)
    assert torch.allclose(FGSM(0.1)(net, x, y), (x + 0.1 * gradient.sign()).clamp(0, 1), atol=1e-7)


@pytest.mark.parametrize('attack', ATTACKS, ids=spelled)
def test_what_holds_for_every_attack(attack, net, batch):
    x, y = batch
    x_adv = attack(net, x, y)
    assert x_adv.shape == x.shape and x_adv.dtype == x.dtype and not x_adv.requires_grad
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    assert norm_of(attack).on(x).size(x_adv - x).max() <= attack.strength * (1 + 1e-6) + 1e-6
    assert torch.equal(attack(net, x, y), x_adv), 'the same call twice gives the same result'
    assert torch.equal(attack.at(0.0)(net, x, y), x), 'no strength, no change'
    assert not torch.equal(x_adv, x)
    assert attack(net, x[:0], y[:0]).shape == (0, 1, 8, 8)


@pytest.mark.parametrize('attack', ATTACKS, ids=spelled)
def test_neither_batch_size_nor_order_matters(attack, net, batch):
    x, y = batch
    ids = torch.arange(100, 112)
    whole = attack(net, x, y, ids=ids)
    singles = torch.cat([attack(net, x[i : i + 1], y[i : i + 1], ids=ids[i : i + 1]) for i in range(12)])
    order = torch.tensor([7, 3, 11, 0, 5, 1, 2, 10, 9, 4, 6, 8])
    mixed = attack(net, x[order], y[order], ids=ids[order])
    if isinstance(norm_of(attack), L2):  # a gradient's last digits depend on the size of the batch, and only the sign hides them
        assert torch.allclose(whole, singles, atol=1e-5) and torch.allclose(whole[order], mixed, atol=1e-5)
    else:
        assert torch.equal(whole, singles)
        assert torch.equal(whole[order], mixed)


@pytest.mark.parametrize('attack', [a for a in ATTACKS if isinstance(a, APGD) or getattr(a, 'random_start', False)], ids=spelled)
def test_seed_and_id_decide(attack, net, batch):
    x, y = batch
    from dataclasses import replace

    assert not torch.equal(replace(attack, seed=1)(net, x, y), attack(net, x, y))
    assert not torch.equal(attack(net, x, y, ids=torch.arange(50, 62)), attack(net, x, y))


class Counter(nn.Module):
    "Counts forward passes, and backward passes that reach the input."

    def __init__(self, net):
        super().__init__()
        self.net, self.forwards, self.backwards = net, 0, 0

    def forward(self, x):
        self.forwards += 1
        if x.requires_grad:
            x.register_hook(lambda gradient: setattr(self, 'backwards', self.backwards + 1))
        return self.net(x)


@pytest.mark.parametrize(
    ('attack', 'forwards', 'backwards'),
    [
        (PGD(0.1, steps=40), 40, 40), (FGSM(0.1), 1, 1), (PGD(0.1, steps=4, restarts=3), 15, 12),
        (PGD(0.1, steps=4, norm=L2(), loss='dlr'), 4, 4), (PGD(0.1, steps=4, target=1), 4, 4),
        (PGD(0.1, steps=4, target='runner-up'), 5, 4), (PGD(0.1, steps=4, loss='kl'), 5, 4),
        (PGD(0.1, steps=4, restarts=3, loss='kl'), 16, 12),
    ],
)
def test_passes_are_counted(attack, forwards, backwards, net, batch):
    counter = Counter(net)
    attack(counter, *batch)
    assert (counter.forwards, counter.backwards) == (forwards, backwards)
    counter = Counter(net)
    result = attack.run(counter, *batch)
    assert result.passes == {'forward': counter.forwards, 'backward': counter.backwards}
    assert counter.forwards == forwards + (getattr(attack, 'restarts', 1) == 1), 'one more pass for the verdict'


def test_no_parameter_gradient_is_computed(net, batch):
    net.zero_grad()
    reached = []
    handle = net[5].weight.register_hook(lambda gradient: reached.append(1))
    PGD(0.1, steps=3)(net, *batch)
    handle.remove()
    assert not reached and all(p.grad is None for p in net.parameters())


def test_verdict(net, batch):
    x, y = batch
    result = PGD(0.3, steps=10).run(net, x, y)
    with torch.no_grad():
        logits = net.eval()(result.x_adv)
    assert torch.equal(result.success, logits.argmax(1) != y)
    assert torch.allclose(result.loss, F.cross_entropy(logits, y, reduction='none'), atol=1e-6)
    assert torch.allclose(result.size, (result.x_adv - x).abs().flatten(1).amax(1), atol=1e-7)
    assert result.success.sum() >= (net(x).argmax(1) != y).sum()


def test_restarts_keep_the_worst_of_each_sample(net, batch):
    x, y = batch
    best = PGD(0.05, steps=3, restarts=4).run(net, x, y)
    attack, singles = PGD(0.05, steps=3), []
    for restart in range(4):
        adv = attack.climb(Problem(attack, net.eval(), x, y, torch.arange(12)), restart)
        with torch.no_grad():
            logits = net(adv)
        singles.append((F.cross_entropy(logits, y, reduction='none'), logits.argmax(1) != y))
    wrong = torch.stack([w for _, w in singles])
    loss = torch.stack([torch.where(w, value + 1e3, value) for value, w in singles]).amax(0)
    assert torch.equal(best.success, wrong.any(0))
    assert torch.allclose(best.loss, torch.where(best.success, loss - 1e3, loss), atol=1e-3)


@pytest.mark.parametrize('caller', [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_any_gradient_mode_of_the_caller(caller, net, batch):
    x, y = batch
    expected = PGD(0.1, steps=2)(net, x, y)
    with caller():
        assert torch.equal(PGD(0.1, steps=2)(net, x.clone(), y.clone()), expected)


def test_single_logit_means_two_classes(batch):
    x, y = batch[0], batch[1] % 2
    with seeded(0):
        one = nn.Sequential(nn.Flatten(), nn.Linear(64, 1))
        two = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    with torch.no_grad():
        two[1].weight.copy_(torch.cat([torch.zeros(1, 64), one[1].weight]))
        two[1].bias.copy_(torch.cat([torch.zeros(1), one[1].bias]))
    for loss in LOSSES:
        a, b = PGD(0.1, steps=3, loss=loss).run(one, x, y), PGD(0.1, steps=3, loss=loss).run(two, x, y)
        assert torch.allclose(a.x_adv, b.x_adv) and torch.equal(a.success, b.success)
    squeezed = nn.Sequential(one, nn.Flatten(0))
    assert torch.allclose(FGSM()(squeezed, x, y), FGSM()(one, x, y))


def test_tabular_and_unbounded_inputs():
    with seeded(0):
        net, x = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 2)), 3 * torch.randn(20, 2)
    y = (x[:, 0] > 0).long()
    x_adv = PGD(0.5, steps=5, bounds=None)(net, x, y)
    assert (x_adv - x).abs().max() <= 0.5 + 1e-6 and x_adv.min() < 0


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype, net, batch):
    x, y = batch
    import copy

    model = copy.deepcopy(net).to(dtype)
    x_adv = PGD(0.1, steps=3)(model, x.to(dtype), y)
    assert x_adv.dtype == dtype and (x_adv.double() - x.to(dtype).double()).abs().max() <= 0.1 + 4e-3
    assert PGD(0.1, steps=3)(net, x.double(), y).dtype == torch.float64, 'float64 inputs, float32 model'


@pytest.mark.parametrize(
    ('spoil', 'message'),
    [
        (lambda x, y: (x.masked_fill(torch.arange(12)[:, None, None, None] == 3, float('nan')), y), 'sample 3'),
        (lambda x, y: (x.masked_fill(torch.arange(12)[:, None, None, None] == 4, float('inf')), y), 'sample 4'),
        (lambda x, y: ((x - 0.13) / 0.31, y), 'Normalized'),
        (lambda x, y: ((x * 255).byte(), y), 'x.float'),
        (lambda x, y: (x, y.float()), 'integer class indices'),
        (lambda x, y: (x, F.one_hot(y, 4)), 'expected \\(12,\\)'),
        (lambda x, y: (x, y + 4), 'the model knows 0 to 3'),
        (lambda x, y: (x, y - 1), 'labels run from'),
        (lambda x, y: (x, y[:5]), 'expected \\(12,\\)'),
        (lambda x, y: (x.numpy(), y), 'from_arrays'),
    ],
)
@pytest.mark.parametrize('attack', ATTACKS[:2], ids=repr)
def test_bad_inputs_are_named(attack, spoil, message, net, batch):
    with pytest.raises((ValueError, TypeError), match=message):
        attack(net, *spoil(*batch))


@pytest.mark.parametrize('kind', [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_any_integer_label(kind, net, batch):
    x, y = batch
    assert torch.equal(FGSM()(net, x, y.to(kind)), FGSM()(net, x, y))


def test_non_contiguous_frozen_and_requires_grad(net, batch):
    import copy

    x, y = batch
    expected = FGSM()(net, x, y)
    strided = torch.stack([x, x], dim=-1)[..., 0]
    assert not strided.is_contiguous() and torch.equal(FGSM()(net, strided, y), expected)
    assert torch.equal(FGSM()(net, x.clone().requires_grad_(), y), expected)
    assert torch.equal(FGSM()(copy.deepcopy(net).requires_grad_(False), x, y), expected)
    assert torch.equal(FGSM()(torch.compile(net, backend='eager'), x, y), expected)


@pytest.mark.parametrize('output', [lambda o: (o, None), lambda o: {'logits': o}, lambda o: [o]])
def test_models_with_other_outputs(output, net, batch):
    class Wrapped(nn.Module):
        def forward(self, x):
            return output(net(x))

    model = Wrapped()
    model.net = net
    assert torch.equal(FGSM()(model, *batch), FGSM()(net, *batch))


def test_predictions():
    assert predictions(torch.tensor([[0.1, 0.9], [2.0, 1.0]])).tolist() == [1, 0]
    assert predictions(torch.tensor([0.3, -0.3])).tolist() == [1, 0]
    assert predictions(torch.tensor([[0.3], [-0.3]])).tolist() == [1, 0]


def test_eps_is_kept_when_the_model_is_coarser_than_the_images(net, batch):
    import copy

    x, y = batch
    result = PGD(8 / 255, steps=3).run(copy.deepcopy(net).bfloat16(), x, y)
    assert (result.x_adv - x).abs().max() <= 8 / 255 + 1e-6
    assert torch.equal(result.size, (result.x_adv - x).flatten(1).abs().amax(1))


def test_settings_are_checked(net, batch):
    wrongs = (lambda: PGD(steps=0), lambda: PGD(restarts=0), lambda: FGSM(-0.1), lambda: FGSM(float('nan')),
              lambda: APGD(steps=0), lambda: WorstOf(eps=-1), lambda: Linf(scale=-1.0), lambda: L2(scale=torch.zeros(3)))
    for wrong in wrongs:
        with pytest.raises(ValueError, match='at least'):
            wrong()
    with pytest.raises(ValueError, match='one value per sample'):
        PGD(loss=F.cross_entropy)(net, *batch)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 1), nn.Flatten(0))
    with pytest.raises(ValueError, match='the model knows 0 to 1'):
        FGSM()(flat, batch[0], batch[1] + 5)


def test_a_given_step_grows_with_the_strength():
    assert PGD(0.1, step=0.02).at(0.5).step == pytest.approx(0.1) and PGD(0.1).at(0.5).step is None


def test_a_loss_of_your_own_may_have_its_own_targets():
    with seeded(0):
        regression = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    x, y = torch.rand(6, 4), torch.rand(6)

    def squared_error(output, y):
        return (output[:, 0] - y) ** 2

    x_adv = PGD(0.1, steps=5, loss=squared_error)(regression, x, y)
    assert (squared_error(regression(x_adv), y) > squared_error(regression(x), y)).all()


@pytest.mark.parametrize('norm', ['l2', 2, Linf, L2])
def test_a_norm_is_an_object(norm):
    with pytest.raises(TypeError, match=r'Linf\(\)'):
        PGD(norm=norm)


def test_an_output_without_a_gradient_is_named():
    class Decided(nn.Module):
        def forward(self, x):
            return nn.functional.one_hot(x.flatten(1).argmax(1) % 3, 3).float()

    with pytest.raises(ValueError, match='not differentiable'):
        FGSM()(Decided(), torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.long))


# --------------------------------------------------------------------------------------------- norms, losses, targets


def literal_l2_pgd(net, x, y, eps, step, steps):
    "One sample at a time, in double precision lengths."
    rows = []
    for i in range(len(x)):
        x0 = adv = x[i : i + 1]
        for _ in range(steps):
            adv = adv.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(F.cross_entropy(net(adv), y[i : i + 1]), adv)
            adv = adv + step * gradient / gradient.double().norm().float()
            change = adv - x0
            length = float(change.detach().double().norm())
            adv = (x0 + change * min(1.0, eps / length)).clamp(0, 1)
        rows.append(adv.detach())
    return torch.cat(rows)


def test_l2_pgd_equals_the_literal_form(net, batch):
    x, y = batch
    expected = literal_l2_pgd(net.eval(), x, y, 0.8, 0.3, 6)
    found = PGD(0.8, steps=6, step=0.3, random_start=False, norm=L2())(net, x, y)
    assert torch.allclose(found, expected, atol=2e-5)


def test_l2_starts_fill_the_ball():
    x, ids = torch.zeros(4000, 3), torch.arange(4000)
    start = L2().start(x, 2.0, ids, seed=0, restart=0)
    radius = start.norm(dim=1) / 2
    assert radius.max() <= 1 + 1e-6
    assert ((radius**3).sort().values - torch.linspace(0, 1, 4000)).abs().max() < 0.03, 'uniform in volume'
    assert start.mean(0).abs().max() < 0.05 and not torch.equal(start, L2().start(x, 2.0, ids, seed=0, restart=1))


@pytest.mark.parametrize('tiny', [1e-12, 1e-25, 1e-37])
def test_a_tiny_gradient_still_has_a_direction(tiny):
    x = torch.zeros(1, 2)
    step = L2().ascend(x, tiny * torch.tensor([[3.0, 4.0]]), 1.0)
    assert torch.allclose(step, torch.tensor([[0.6, 0.8]]), atol=1e-3)
    assert torch.equal(L2().ascend(x, torch.zeros(1, 2), 1.0), x)


@pytest.mark.parametrize('shape', [Linf, L2])
def test_masks_and_scales(shape, net, batch):
    x, y = batch
    scale = torch.linspace(0, 1, 64).view(1, 8, 8)
    x_adv = PGD(0.3, steps=5, norm=shape(scale=scale))(net, x, y)
    change = x_adv - x
    assert (change[..., 0, 0] == 0).all() and change[..., 7, 7].abs().max() > 0
    assert shape(scale=scale).size(change).max() <= 0.3 + 1e-5
    half, doubled = PGD(0.3, steps=5, norm=shape(scale=0.5)), PGD(0.15, steps=5, norm=shape())
    assert torch.allclose(half(net, x, y), doubled(net, x, y), atol=1e-6)
    assert shape(scale=torch.tensor([1.0, 0.0])).size(torch.tensor([[0.0, 1.0]])).item() == float('inf')
    with pytest.raises(ValueError, match='does not fit samples'):
        PGD(norm=shape(scale=torch.ones(5)))(net, x, y)


def test_an_eps_for_each_feature_on_a_table():
    with seeded(0):
        net = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 2))
        x = torch.randn(20, 3) * torch.tensor([1.0, 10.0, 100.0])
    y, each = (x[:, 0] > 0).long(), torch.tensor([0.1, 1.0, 0.0])
    change = PGD(1.0, steps=5, bounds=None, norm=Linf(scale=each))(net, x, y) - x
    assert (change.abs() <= each + 1e-5).all() and (change.abs().amax(0)[:2] > each[:2] * 0.99).all()
    low, high = x.amin(0), x.amax(0)  # bounds for each feature, too
    x_adv = PGD(1.0, steps=5, bounds=(low, high), norm=Linf(scale=torch.tensor([9.0, 90.0, 900.0])))(net, x, y)
    assert (x_adv >= low).all() and (x_adv <= high).all() and (x_adv - x).abs().max() > 1
    with pytest.raises(ValueError, match=r'norm=Linf\(scale=eps\)'):
        PGD(each, bounds=None)(net, x, y)


@pytest.mark.parametrize('attack', [PGD(0.1, steps=3), APGD(0.1, steps=7), PGD(0.1, steps=3, norm=L2())], ids=repr)
def test_an_eps_for_each_sample(attack, net, batch):
    x, y = batch
    each = torch.linspace(0, 0.3, len(x))
    together = attack.at(each.view(-1, 1, 1, 1))(net, x, y)
    for i, eps in enumerate(each.tolist()):
        ids = torch.tensor([i])
        assert torch.allclose(attack.at(eps)(net, x[i : i + 1], y[i : i + 1], ids=ids), together[i : i + 1], atol=1e-6)


def test_dlr_is_the_published_formula():
    "Croce and Hein 2020, equations 6 and 7."
    logits = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    y, target = torch.arange(50) % 6, (torch.arange(50) + 1) % 6
    from robustnb.attacks import _dlr_towards

    for row, (z, true, aim) in enumerate(zip(logits.tolist(), y.tolist(), target.tolist(), strict=True)):
        ordered = sorted(z, reverse=True)
        best_wrong = max(v for k, v in enumerate(z) if k != true)
        dlr = -(z[true] - best_wrong) / (ordered[0] - ordered[2])
        towards = -(z[true] - z[aim]) / (ordered[0] - (ordered[2] + ordered[3]) / 2)
        assert LOSSES['dlr'](logits, y)[row].item() == pytest.approx(dlr, rel=1e-4)
        assert _dlr_towards(logits, y, target)[row].item() == pytest.approx(towards, rel=1e-4)
    three = logits[:, :3]
    assert torch.equal(LOSSES['dlr'](three, y % 3), LOSSES['margin'](three, y % 3)), 'below four classes: the margin'


def test_targets(net, batch):
    x, y = batch
    with torch.no_grad():
        logits = net.eval()(x)
    for name, choose in (('runner-up', max), ('least likely', min)):
        wrong = [[k for k in range(4) if k != true] for true in y.tolist()]
        expected = [choose(ks, key=lambda k, i=i: logits[i, k]) for i, ks in enumerate(wrong)]
        assert TARGETS[name](logits, y).tolist() == expected
    named, given = PGD(0.2, steps=5, target='least likely'), TARGETS['least likely'](logits, y)
    by_id = torch.zeros(40, dtype=torch.long)
    ids = torch.arange(12) + 20
    by_id[ids] = given
    assert torch.equal(named(net, x, y, ids=ids), PGD(0.2, steps=5, target=by_id)(net, x, y, ids=ids))
    own = PGD(0.2, steps=5, target=lambda logits, y: TARGETS['least likely'](logits, y))
    assert torch.equal(named(net, x, y), own(net, x, y))
    result = PGD(0.4, steps=20, target=given).run(net, x, y)
    with torch.no_grad():
        assert torch.equal(result.success, net(result.x_adv).argmax(1) == given) and result.success.any()
    same = PGD(0.4, steps=3, target=2).run(net, x, y)
    assert torch.equal(same.x_adv[y == 2], x[y == 2]) and not same.success[y == 2].any(), 'its own target: left alone'
    for wrong, error in ((by_id[:3], ValueError), (9, (ValueError, IndexError)), ('nearest', KeyError)):
        with pytest.raises(error):
            PGD(target=wrong)(net, x, y, ids=ids)


# --------------------------------------------------------------------------------------- stopping where it is fooled


STOPPING = [PGD(0.1, steps=8), PGD(0.1, steps=4, restarts=3), APGD(0.1, steps=9), APGD(0.8, steps=9, norm=L2()),
            PGD(0.1, steps=8, target='runner-up'), PGD(0.1, steps=8, loss='kl')]


@pytest.mark.parametrize('attack', STOPPING, ids=repr)
def test_stopping_early_is_as_strong_and_costs_less(attack, net, batch):
    from dataclasses import replace

    x, y = batch
    brief, full = replace(attack, keep_going=False).run(net, x, y), attack.run(net, x, y)
    assert (brief.success | ~full.success).all(), 'whatever is fooled at the end was fooled'
    assert brief.passes['backward'] < full.passes['backward']
    with torch.no_grad():
        wrong = net.eval()(brief.x_adv).argmax(1)
    if attack.target is None:
        assert torch.equal(brief.success, wrong != y)
    assert torch.equal(replace(attack, keep_going=False)(net, x, y), brief.x_adv)


@pytest.mark.parametrize('attack', STOPPING, ids=repr)
def test_masks_of_a_fixed_shape_give_what_a_shrinking_batch_gives(attack, net, batch):
    from dataclasses import replace

    x, y = batch
    attack, outcomes, net = replace(attack, keep_going=False), [], net.eval()
    for fixed in (False, True):
        problem = Problem(attack, net, x, y, torch.arange(12))
        problem.fixed_shape = fixed
        x_adv, verdict = attack.search(problem)
        verdict or problem.judge(x_adv)
        outcomes.append((torch.where(problem.done[:, None, None, None], problem.found[0], x_adv), problem.done))
    assert torch.equal(outcomes[0][1], outcomes[1][1]) and torch.allclose(outcomes[0][0], outcomes[1][0], atol=1e-6)
    assert _ask_open_rows(problem, x, True)[1][problem.done].eq(-float('inf')).all()


# --------------------------------------------------------------------------------------------------- APGD and WorstOf


def literal_apgd(net, x, y, eps, steps, start):
    "Croce and Hein 2020, algorithm 1, one sample at a time, in the maximum norm."
    rows, checkpoints = [], []
    p = [0.0, 0.22]
    while p[-1] < 1:
        p.append(p[-1] + max(p[-1] - p[-2] - 0.03, 0.06))
    import math
    checkpoints = [math.ceil(round(q, 6) * steps) for q in p[1:] if q < 1]

    for i in range(len(x)):
        x0, label = x[i : i + 1], y[i : i + 1]

        def project(z, x0=x0):
            return torch.max(torch.min(z, x0 + eps), x0 - eps).clamp(0, 1)

        def value(z, label=label):
            z = z.detach().requires_grad_()
            logits = net(z)
            loss = F.cross_entropy(logits, label)
            (gradient,) = torch.autograd.grad(loss, z)
            return float(loss.detach()), gradient, bool(logits.argmax(1) != label)

        old = now = project(start[i : i + 1])
        loss, gradient, wrong = value(now)
        step, visited = 2 * eps, [(wrong, loss, now)]
        top, rose, last = (loss, now, gradient), 0, 0
        top_then, halved_then = loss, False
        for k in range(1, steps + 1):
            z = project(now + step * gradient.sign())
            new = z if k == 1 else project(now + 0.75 * (z - now) + 0.25 * (now - old))
            old, now, before = now, new, loss
            loss, gradient, wrong = value(now)
            visited.append((wrong, loss, now))
            rose += loss > before
            if loss > top[0]:
                top = (loss, now, gradient)
            if k in checkpoints:
                halved = rose < 0.75 * (k - last) or (not halved_then and top_then >= top[0])
                if halved:
                    step /= 2
                    loss, now, gradient = top
                top_then, halved_then, rose, last = top[0], halved, 0, k
        rows.append(max(visited, key=lambda v: v[:2])[2])
    return torch.cat(rows)


def test_apgd_equals_the_literal_form(net, batch):
    import copy

    (x, y), net = batch, copy.deepcopy(net).double().eval()  # in single precision a tie may fall otherwise
    x = x.double()
    for eps, steps in ((0.1, 30), (0.02, 17), (0.05, 100)):
        start = Linf().start(x, eps, torch.arange(12), seed=0, restart=0)
        expected = literal_apgd(net, x, y, eps, steps, start)
        assert (APGD(eps, steps=steps)(net, x, y) - expected).abs().max() < 1e-9


def test_apgd_climbs_at_least_as_high_as_pgd(net, batch):
    x, y = batch
    for norm, eps in ((Linf(), 0.05), (L2(), 0.5)):
        auto, plain = APGD(eps, steps=50, norm=norm).run(net, x, y), PGD(eps, steps=50, norm=norm).run(net, x, y)
        assert auto.loss.mean() >= plain.loss.mean() - 1e-3 and auto.passes == {'forward': 51, 'backward': 50}


def test_worst_of_is_the_worst_of_its_members(net, batch):
    x, y = batch
    members = [FGSM(0.03), PGD(0.03, steps=5), APGD(0.03, steps=10, loss='dlr')]
    together, alone = WorstOf(members).run(net, x, y), [a.run(net, x, y).success for a in members]
    assert torch.equal(together.success, torch.stack(alone).any(0))
    standing = (~together.success).nonzero()[:, 0]
    with torch.no_grad():
        clean = net.eval()(x)
        margins = torch.stack([LOSSES['margin'](net(a(net, x, y)), y) for a in members] + [LOSSES['margin'](clean, y)]).amax(0)
    assert len(standing) and torch.allclose(together.loss[standing], margins[standing], atol=1e-5)
    assert torch.equal(together.x_adv[clean.argmax(1) != y], x[clean.argmax(1) != y]), 'wrong already: nothing to do'


def test_worst_of_asks_only_about_what_stands(net, batch):
    asked = []

    def watching(model, x, y):
        asked.append(len(x))
        return x

    x, y = batch
    result = WorstOf([PGD(0.05, steps=5), watching, FGSM(0.05)]).run(net, x, y)
    fooled = PGD(0.05, steps=5).run(net, x, y).success.sum()
    assert asked == [12 - int(fooled)] and result.passes['forward'] < 9
    counter = Counter(net)
    counted = WorstOf([PGD(0.05, steps=5), FGSM(0.05)]).run(counter, x, y).passes
    assert counted['backward'] > 0 and counter.forwards == 1 + 5 + 1 + 1 + 1
    assert not [h for m in net.modules() for h in m._forward_hooks], 'the counter is gone'


def test_worst_of_strengths():
    several = WorstOf([PGD(0.1), APGD(0.2)])
    import math

    assert math.isnan(several.strength) and several.at(0.3).strength == 0.3 and WorstOf([PGD(0.1), APGD(0.1)]).strength == 0.1
    assert [a.eps for a in several.scaled(2).attacks] == [0.2, 0.4] and several.name == 'worst of PGD-40, APGD-100'
    with pytest.raises(ValueError, match='plain function'):
        WorstOf([lambda model, x, y: x], eps=0.1)
    for wrong in ([], [PGD], [3]):
        with pytest.raises(TypeError, match='takes attacks'):
            WorstOf(wrong)


# ------------------------------------------------------------------------------------------------------- what is told


def told(caplog, run):
    from robustnb.guard import _say_once

    _say_once.cache_clear()
    caplog.clear()
    with caplog.at_level('WARNING'):
        run()
    return caplog.text


def test_a_gradient_that_is_not_there_is_told(caplog, net, batch):
    x, y = batch

    class Rounded(nn.Module):
        def forward(self, x):
            return net(x.round()) + 0 * x.sum()

    y_seen = net.eval()(x.round()).argmax(1)
    assert 'exactly zero' in told(caplog, lambda: PGD(0.1, steps=2)(Rounded(), x, y_seen))
    assert 'exactly zero' not in told(caplog, lambda: [a(net, x, y) for a in ATTACKS])


def test_nan_logits_are_told_and_do_no_harm(caplog, net, batch):
    x, y = batch

    class Sick(nn.Module):
        def forward(self, x):
            return net(x) + torch.where(torch.arange(len(x)) == 2, torch.nan, 0.0)[:, None]

    found = []
    assert 'NaN' in told(caplog, lambda: found.append(PGD(0.1, steps=2).run(Sick(), x, y)))
    assert found[0].x_adv.isfinite().all()


@pytest.mark.parametrize('attack', [PGD(0.1, steps=3), APGD(0.1, steps=5), FGSM(0.1)], ids=repr)
def test_mixed_precision(attack, net, batch):
    from dataclasses import replace

    x, y = batch
    full, mixed = attack.run(net, x, y), replace(attack, autocast=torch.bfloat16).run(net, x, y)
    assert mixed.x_adv.dtype == torch.float32 and (mixed.x_adv - x).abs().max() <= 0.1 + 1e-6
    assert not torch.equal(mixed.x_adv, full.x_adv) and abs(int(mixed.success.sum()) - int(full.success.sum())) <= 2


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('norm', [Linf(), L2()])
def test_rounding_does_not_leave_the_ball(dtype, norm, net, batch):
    import copy

    x, y = batch[0].to(dtype), batch[1]
    result = PGD(0.1, steps=5, norm=norm).run(copy.deepcopy(net).to(dtype), x, y)
    assert norm.size(result.x_adv.double() - x.double()).max() <= 0.1 + 1e-6
    assert result.x_adv.min() >= 0 and result.x_adv.max() <= 1 and result.size.max() > 0.05


def test_the_default_bounds_give_way_to_those_of_the_data_and_given_ones_do_not():
    from robustnb.noises import named

    assert named(PGD(), bounds=None)['PGD-40'].bounds is None
    assert named(PGD(bounds=(0.0, 1.0)), bounds=None)['PGD-40'].bounds == (0.0, 1.0)
    assert named(PGD().at(0.2), bounds=(-1, 1))['PGD-40'].bounds == (-1, 1)


# ------------------------------------------------------------------------------------------------ what a review found


def test_l2_starts_fill_the_ball_of_what_may_change():
    x, ids = torch.zeros(3000, 50), torch.arange(3000)
    scale = torch.zeros(50)
    scale[[3, 7]] = torch.tensor([1.0, 0.5])
    norm = L2(scale=scale).on(x)
    start = norm.start(x, 2.0, ids, seed=0, restart=0)
    assert (start[:, scale == 0] == 0).all()
    radius = norm.size(start) / 2
    assert radius.max() <= 1 + 1e-6
    assert ((radius**2).sort().values - torch.linspace(0, 1, 3000)).abs().max() < 0.04, 'two dimensions, uniform in area'


@pytest.mark.parametrize('eps', [0.05, 1.0])
def test_l2_steps_in_a_scaled_ball_are_the_steepest(eps):
    "In coordinates divided by the scale the ball is round, and there the step is the plain one."
    scale, gradient = torch.tensor([1.0, 0.5, 2.0]), torch.tensor([[1.0, -2.0, 0.5]])
    step = L2(scale=scale).ascend(torch.zeros(1, 3), gradient, eps)
    plain = L2().ascend(torch.zeros(1, 3), scale * gradient, eps)
    assert torch.allclose(step / scale, plain, atol=1e-6)
    assert L2(scale=scale).size(step).item() == pytest.approx(eps, rel=1e-5)
    assert (step * gradient).sum().item() == pytest.approx(eps * L2(scale=scale).dual(gradient).item(), rel=1e-5)


@pytest.mark.parametrize('shape', [Linf, L2])
def test_a_gradient_that_is_not_finite_does_not_lead_astray(shape):
    gradient = torch.full((1, 67), 1.0)
    gradient[0, :3] = torch.tensor([float('nan'), float('inf'), -float('inf')])
    x_adv = shape().ascend(torch.zeros(1, 67), gradient, 1.0)
    assert x_adv.isfinite().all() and x_adv[0, 0] == 0 and x_adv[0, 1] > 0 > x_adv[0, 2]


class Deaf(nn.Module):
    "Looks at a copy of its input that has no gradient, though its parameters have one."

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x.detach())


def test_an_input_that_the_graph_does_not_reach_is_named(net, batch):
    with pytest.raises(ValueError, match='not differentiable'):
        PGD()(Deaf(net), *batch)


@pytest.mark.parametrize('wrong', [9, -1, -100, torch.tensor(4), lambda logits, y: 0 * y + 7, lambda logits, y: y[:3]])
@pytest.mark.parametrize('loss', ['ce', 'margin', 'dlr'])
def test_targets_that_the_model_does_not_know(wrong, loss, net, batch):
    with pytest.raises(ValueError, match='the model knows 0 to 3|expected \\(12,\\)'):
        PGD(steps=2, target=wrong, loss=loss)(net, *batch)


def test_targets_of_other_kinds(net, batch):
    import numpy as np

    x, y = batch
    plain = PGD(steps=2, target=2)(net, x, y)
    for same in (np.int64(2), torch.tensor(2), torch.full((12,), 2)):
        assert torch.equal(PGD(steps=2, target=same)(net, x, y), plain)
    assert PGD(target=torch.full((12,), 2))(net, x[:0], y[:0]).shape == (0, 1, 8, 8)
    for wrong in (2.0, [2] * 12):
        with pytest.raises(TypeError, match='target takes'):
            PGD(target=wrong)


@pytest.mark.parametrize('attack', [
    PGD(0.3, steps=5, target=2), PGD(0.3, steps=3, restarts=2, target=2), PGD(0.3, steps=5, target=2, keep_going=False),
    APGD(0.3, steps=5, target=2),
], ids=repr)
def test_the_loss_is_that_of_the_inputs_that_come_back(attack, net, batch):
    x, y = batch
    result = attack.run(net, x, y)
    with torch.no_grad():
        logits = net.eval()(result.x_adv)
    assert torch.allclose(result.loss, -F.cross_entropy(logits, torch.full_like(y, 2), reduction='none'), atol=1e-5)
    assert torch.equal(result.success, (logits.argmax(1) == 2) & (y != 2)) and (y == 2).any()


def test_an_attack_that_returns_nan_is_judged_on_what_comes_back(net, batch):
    from dataclasses import dataclass

    from robustnb.attacks import Attack

    @dataclass(frozen=True)
    class Broken(Attack):
        eps: float = 0.1

        def search(self, problem):
            return problem.x + torch.tensor(float('nan')), None

    x = batch[0]
    y = net.eval()(x).argmax(1)
    result = Broken().run(net, x, y)
    assert torch.equal(result.x_adv, x) and not result.success.any() and result.loss.isfinite().all()


def test_infinite_losses_are_not_taken_for_nan(caplog, net, batch):
    def extreme(logits, y):
        return logits.sum(1) + torch.where(torch.arange(len(y)) % 2 == 0, float('inf'), -float('inf'))

    assert 'NaN' not in told(caplog, lambda: PGD(0.1, steps=2, loss=extreme)(net, *batch))


@pytest.mark.parametrize('make', [FGSM, PGD, APGD])
def test_an_eps_without_end_is_refused(make):
    with pytest.raises(ValueError, match='finite'):
        make(float('inf'))
    with pytest.raises(ValueError, match='finite'):
        make(norm=L2(scale=float('inf')))


def test_a_scale_shows_in_the_name():
    assert PGD(norm=L2(scale=torch.ones(3))).name == 'PGD-40 L2 scaled' and FGSM(norm=Linf(scale=0.5)).name == 'FGSM scaled'
    assert PGD(norm=L2()).name == 'PGD-40 L2' and PGD(norm=Linf(scale=1)).name == 'PGD-40'


def test_outputs_that_no_verdict_fits_are_named(net, batch):
    x, y = batch
    with pytest.raises(ValueError, match=r'output of shape \(12, 4, 8, 8\)'):
        FGSM()(nn.Conv2d(1, 4, 1), x, y)
    with pytest.raises(ValueError, match=r'output of shape \(768, 4\) for 12 samples'):
        FGSM(loss=lambda logits, y: logits.sum(1))(nn.Sequential(nn.Flatten(), nn.Unflatten(1, (64, 1)), nn.Flatten(0, 1),
                                                                 nn.Linear(1, 4)), x, y)


def test_a_model_that_writes_into_its_inputs_is_named(net, batch):
    class Greedy(nn.Module):
        def forward(self, x):
            x -= 0.5
            return net(x)

    with pytest.raises(ValueError, match='writes into its inputs'):
        WorstOf([FGSM()])(Greedy(), *batch)


@pytest.mark.parametrize(('x_type', 'net_type'), [(torch.float32, torch.float64), (torch.float64, torch.float32)])
@pytest.mark.parametrize('attack', [a for a in ATTACKS if not getattr(a, 'keep_going', True) or isinstance(a, WorstOf)], ids=repr)
def test_stopping_with_a_model_of_another_precision(attack, x_type, net_type, net, batch):
    import copy

    x, y = batch
    result = attack.run(copy.deepcopy(net).to(net_type), x.to(x_type), y)
    assert result.x_adv.dtype == x_type and torch.equal(result.success, attack.run(net, x, y).success)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_a_verdict_after_rounding_is_that_of_the_rounded(dtype, net, batch):
    import copy

    x, y, coarse = batch[0].to(dtype), batch[1], copy.deepcopy(net).to(dtype).eval()
    several = WorstOf([FGSM(0.03), PGD(0.3, norm=L2())])
    for attack in (PGD(0.03, steps=5, keep_going=False), APGD(0.03, steps=5, restarts=2), several):
        result = attack.run(coarse, x, y)
        with torch.no_grad():
            assert torch.equal(result.success, coarse(result.x_adv).argmax(1) != y)
        exact = norm_of(attack).size(result.x_adv.float() - x.float())
        assert torch.equal(result.size, exact), 'sizes are in single precision'


def test_worst_of_takes_the_bounds_of_its_members(net, batch):
    x, y = 3 * batch[0] - 1, batch[1]
    several = WorstOf([PGD(0.1, steps=2, bounds=None), FGSM(0.1)])
    assert several.bounds is None and several(net, x, y).min() < 0
    assert WorstOf([PGD(0.1, bounds=None)], bounds=(-1, 2)).bounds == (-1, 2)
    assert WorstOf([FGSM()], bounds=(-1, 2)).run(net, x, y).x_adv.min() >= -1


def test_worst_of_with_mixed_norms_targets_and_functions(caplog, net, batch):
    x, y = batch

    def doubled(model, x, y):
        return x.double() + 0.5

    several = WorstOf([PGD(0.3, norm=L2(), target='least likely'), PGD(0.02, steps=3), doubled])
    found = []
    assert 'leaves the range' in told(caplog, lambda: found.append(several.run(net, x, y)))
    with torch.no_grad():
        assert torch.equal(found[0].success, net.eval()(found[0].x_adv).argmax(1) != y) and found[0].x_adv.dtype == x.dtype
    assert torch.allclose(found[0].size, (found[0].x_adv - x).flatten(1).norm(dim=1)), "in the first attack's norm"
    for eps in (WorstOf, lambda members: WorstOf(members, eps=torch.full((12, 1, 1, 1), 0.1))):
        with pytest.raises(ValueError, match='one number'):
            eps([PGD(torch.full((12, 1, 1, 1), 0.1))])


@pytest.mark.parametrize('output', [lambda o: (o, o[:1]), lambda o: {'features': o[:, :2], 'logits': o}, lambda o: [o]])
def test_worst_of_counts_models_with_other_outputs(output, net, batch):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return output(self.net(x))

    members = [PGD(0.05, steps=2), FGSM(0.05)]
    assert WorstOf(members).run(Wrapped(), *batch).passes == WorstOf(members).run(net, *batch).passes


def test_a_step_grows_with_a_strength_for_each_sample(net, batch):
    each = torch.linspace(0.1, 0.2, 12).view(-1, 1, 1, 1)
    assert torch.allclose(PGD(each, step=0.01).at(0.3).step, 0.003 / each)
    assert PGD(0.1, step=0.0).at(0.3).step == 0 and PGD(0.0, step=0.1).at(0.3).step == 0.1


def test_checkpoints_are_those_of_the_paper():
    "Croce and Hein 2020, equation 4 and below, in exact fractions."
    import math
    from fractions import Fraction

    from robustnb.attacks import _checkpoints

    for steps in (1, 2, 7, 30, 50, 100, 250, 1000):
        p = [Fraction(0), Fraction(22, 100)]
        while p[-1] < 1:
            p.append(p[-1] + max(p[-1] - p[-2] - Fraction(3, 100), Fraction(6, 100)))
        assert _checkpoints(steps) == sorted({math.ceil(share * steps) for share in p[1:-1]})


def test_apgd_in_l2_equals_the_literal_form(net, batch):
    "The steps before the first checkpoint, one sample at a time."
    import copy

    (x, y), net = batch, copy.deepcopy(net).double().eval()
    x, eps = x.double(), 0.5
    start = L2().start(x, eps, torch.arange(12), seed=0, restart=0).clamp(0, 1)

    def project(z, x0):
        change = z - x0
        return (x0 + change * min(1.0, eps / float(change.norm()))).clamp(0, 1)

    for i in range(12):
        x0, now, visited = x[i : i + 1], start[i : i + 1], []
        old = now
        for k in range(5):
            z = now.detach().requires_grad_()
            logits = net(z)
            loss = F.cross_entropy(logits, y[i : i + 1])
            (gradient,) = torch.autograd.grad(loss, z)
            visited.append(now)
            z = project(now + 2 * eps * gradient / gradient.norm(), x0)
            now, old = z if k == 0 else project(now + 0.75 * (z - now) + 0.25 * (now - old), x0), now
        problem, asked = Problem(APGD(eps, norm=L2()), net, x0, y[i : i + 1], torch.tensor([i])), []
        problem.listen = lambda point, logits, asked=asked: asked.append(point)
        APGD(eps, norm=L2(), steps=23).climb(problem)
        assert all((a - b).abs().max() < 1e-9 for a, b in zip(asked[:5], visited, strict=True))


def test_a_step_that_was_just_halved_gets_another_chance():
    "The second condition of Croce and Hein 2020, section 3.2, holds only if the step did not change at the last look."
    from robustnb.attacks import _StepSize

    pace, best = _StepSize(torch.ones(1, 1), torch.zeros(1)), torch.zeros(1)
    for expected in (True, False, True):  # rising three times of four, and never above the best
        for loss in (-4.0, -3.0, -2.0, -1.0):
            pace.note(torch.tensor([loss]))
        assert pace.look(best, 4).item() is expected
        pace.last = best
    assert pace.step.item() == 0.25


@pytest.mark.parametrize('attack', [PGD(1e-4, steps=3), PGD(1e-4, steps=3, keep_going=False), APGD(1e-4, steps=3)], ids=repr)
def test_a_success_that_rounding_takes_away_is_none(attack):
    "At 0.5 the next number of bfloat16 is 0.002 away, so nothing is left of a change of 0.0001."
    class Line(nn.Module):
        def forward(self, x):
            return torch.stack([0 * x[:, 0], x[:, 0] - 0.50005], 1)

    x, y = torch.full((4, 1), 0.5), torch.zeros(4, dtype=torch.long)
    assert attack.run(Line(), x, y).success.all()
    result = attack.run(Line(), x.bfloat16(), y)
    assert torch.equal(result.x_adv, x.bfloat16()) and not result.success.any() and (result.size == 0).all()


@pytest.mark.parametrize('norm', [Linf(), L2()])
def test_each_restart_starts_elsewhere(norm, net, batch):
    problem = Problem(PGD(0.1, norm=norm), net.eval(), *batch, torch.arange(12))
    assert not torch.equal(problem.start(0), problem.start(1)) and torch.equal(problem.start(1), problem.start(1))


def test_a_targeted_dlr_attack_climbs_the_targeted_form(net, batch):
    from robustnb.attacks import _dlr_towards

    x, y = batch
    result = PGD(0.1, steps=3, target=2, loss='dlr').run(net, x, y)
    with torch.no_grad():
        expected = _dlr_towards(net.eval()(result.x_adv), y, torch.full_like(y, 2))
    assert torch.allclose(result.loss, expected, atol=1e-6)


@pytest.mark.parametrize('norm', [Linf, L2])
def test_inputs_a_rounding_beyond_the_bounds_under_a_mask(norm, net, batch):
    x, y = batch
    result = PGD(0.1, steps=2, norm=norm(scale=torch.linspace(0, 1, 8))).run(net, x * (1 + 2e-6) - 5e-7, y)
    assert result.size.max() <= 0.1 + 1e-5


# ------------------------------------------------------------------------------- losses that compare with the clean output


def literal_kl(clean, logits):
    "Zhang et al. 2019, equation 5, one sample and class at a time."
    import numpy as np

    values = []
    for a, b in zip(clean.double().numpy(), logits.double().numpy(), strict=True):
        p, q = np.exp(a - a.max()) / np.exp(a - a.max()).sum(), np.exp(b - b.max()) / np.exp(b - b.max()).sum()
        values.append(sum(float(p[k] * (np.log(p[k]) - np.log(q[k]))) for k in range(len(p))))
    return torch.tensor(values, dtype=torch.float64)


def test_the_divergence_is_the_published_formula():
    generator = torch.Generator().manual_seed(0)
    clean, logits = (3 * torch.randn(40, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    kl = LOSSES['kl'](logits, None, clean)
    assert torch.allclose(kl, literal_kl(clean, logits), rtol=1e-12)
    theirs = F.kl_div(logits.log_softmax(1), clean.softmax(1), reduction='none').sum(1)
    assert torch.allclose(kl, theirs, rtol=1e-10) and kl.min() > 0
    one, other = clean[:, 0], logits[:, 0]
    two = torch.stack([0 * one, one], 1), torch.stack([0 * other, other], 1)
    assert torch.allclose(LOSSES['kl'](other, None, one), literal_kl(*two), rtol=1e-12), 'a single logit means two classes'
    assert torch.equal(LOSSES['kl'](other[:, None], None, one[:, None]), LOSSES['kl'](other, None, one))


def test_the_gradient_of_the_divergence():
    generator = torch.Generator().manual_seed(1)
    clean, logits = (torch.randn(6, 4, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def kl(logits, clean):
        return LOSSES['kl'](logits, None, clean)

    torch.autograd.gradcheck(kl, (logits, clean))
    torch.autograd.gradgradcheck(kl, (logits, clean))
    (slope,) = torch.autograd.grad(kl(logits, clean).sum(), logits)
    assert torch.allclose(slope, logits.softmax(1) - clean.softmax(1), atol=1e-14)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('scale', [1, 1e3, 1e30])
@pytest.mark.parametrize('columns', [1, 2, 10, 1000])
def test_the_divergence_from_itself_is_nothing_and_leads_nowhere(columns, scale, dtype):
    clean = scale * torch.randn(200, columns, generator=torch.Generator().manual_seed(2)).to(dtype)
    logits = clean.clone().requires_grad_()
    kl = LOSSES['kl'](logits, None, clean)
    (slope,) = torch.autograd.grad(kl.sum(), logits)
    assert (kl == 0).all() and (slope == 0).all(), 'exactly'


def test_the_divergence_of_extreme_logits():
    inf = float('inf')
    clean = torch.tensor([[1e4, -1e4, 0.0], [0.0, -inf, 1.0], [3e38, 0.0, -3e38], [0.0, -inf, 0.0]], requires_grad=True)
    logits = torch.tensor([[-1e4, 1e4, 0.0], [1.0, -inf, 0.0], [0.0, 0.0, 3e38], [0.0, 0.0, 0.0]], requires_grad=True)
    kl = LOSSES['kl'](logits, None, clean)
    assert kl[0] == 2e4 and kl[2] == 3e38 and kl[3].item() == pytest.approx(torch.tensor(1.5).log().item())
    assert kl[1].item() == pytest.approx(torch.tensor([0.0, 1.0]).softmax(0).diff().item())
    for slope in torch.autograd.grad(kl.sum(), (logits, clean)):
        assert not slope.isnan().any()


@pytest.mark.parametrize('norm', [Linf(), L2()])
@pytest.mark.parametrize('columns', [4, 1])
def test_an_attack_climbs_the_divergence(norm, columns, net, batch):
    x, y = batch[0], batch[1] % 2
    with seeded(0):
        model = nn.Sequential(net, nn.Linear(4, 1)) if columns == 1 else net
    with torch.no_grad():
        clean = model.eval()(x)
    eps = 0.1 if norm == Linf() else 1.0
    noise = norm.ball(x, eps, (0, 1))(norm.start(x, eps, torch.arange(12), 0, 0))
    for attack in (PGD(eps, steps=10, loss='kl', norm=norm), APGD(eps, steps=10, loss='kl', norm=norm)):
        result = attack.run(model, x, y)
        with torch.no_grad():
            reached, chance = (LOSSES['kl'](model(z), None, clean) for z in (result.x_adv, noise))
        assert torch.allclose(result.loss, reached, atol=1e-5)
        assert (reached >= chance).all() and reached.mean() > 2 * chance.mean()
        if isinstance(attack, PGD):  # APGD returns the worst point of its way, and what is misclassified is worse
            assert torch.equal(attack(model, x, 1 - y), result.x_adv), 'the labels do not matter'


def test_pgd_with_the_divergence_equals_the_literal_form(net, batch):
    "Zhang et al. 2019, algorithm 1, with our start and our step."
    import copy

    (x, y), net = batch, copy.deepcopy(net).double().eval()
    x = x.double()
    x_adv = Linf().start(x, 0.1, torch.arange(12), seed=0, restart=0).clamp(0, 1)
    for _ in range(5):
        x_adv = x_adv.detach().requires_grad_()
        kl = F.kl_div(net(x_adv).log_softmax(1), net(x).softmax(1).detach(), reduction='sum')
        (slope,) = torch.autograd.grad(kl, x_adv)
        x_adv = torch.min(torch.max(x_adv + 0.03 * slope.sign(), x - 0.1), x + 0.1).clamp(0, 1)
    assert torch.allclose(PGD(0.1, steps=5, step=0.03, loss='kl')(net, x, y), x_adv, atol=1e-12)


def moved(logits, y, clean):
    return (logits - clean).square().flatten(1).sum(1)


moved.relative = True


@pytest.mark.parametrize('loss', ['kl', moved])
def test_what_starts_at_the_clean_input_says_that_it_cannot_move(loss, caplog, net, batch):
    from dataclasses import dataclass

    from robustnb.attacks import Attack

    @dataclass(frozen=True)
    class OneStep(Attack):
        eps: float = 0.1

        def search(self, problem):
            gradient, _, _ = problem.gradient(problem.x)
            return problem.project(problem.norm.ascend(problem.x, gradient, self.eps)), None

    found, seen = [], net.eval()(batch[0]).argmax(1)
    said = told(caplog, lambda: found.append(OneStep(loss=loss)(net, batch[0], seen)))
    assert torch.equal(found[0], batch[0]) and 'start at random' in said
    assert 'exactly zero' not in told(caplog, lambda: PGD(0.1, steps=2, loss=loss)(net, batch[0], seen))
    if loss == 'kl':
        for make in (FGSM, lambda loss: PGD(loss=loss, random_start=False), lambda loss: FGSM(loss=LOSSES[loss])):
            with pytest.raises(ValueError, match='would not move'):
                make(loss=loss)


@pytest.mark.parametrize('loss', ['kl', moved])
def test_what_compares_with_the_clean_output_aims_at_no_class(loss):
    with pytest.raises(ValueError, match='leave target out'):
        PGD(loss=loss, target=1)


@pytest.mark.parametrize('loss', ['kl', moved])
def test_relative_losses_everywhere(loss, net, batch):
    from robustnb.blackbox import Square, Transfer
    from robustnb.masking import check_masking
    from robustnb.minimal import Smallest
    from robustnb.paths import trace

    x, y = batch
    attack = PGD(0.1, steps=3, loss=loss)
    with torch.no_grad():
        clean = net.eval()(x)
    way = trace(net, x, y, attack).dataset
    assert way.sizes['point'] == 4 and (way['clean_loss'] == 0).all()
    expected = (LOSSES['kl'] if loss == 'kl' else moved)(net(attack(net, x, y)), None, clean).detach()
    assert torch.allclose(torch.as_tensor(way['loss'].values[-1]), expected, atol=1e-5)
    square = Square(0.1, queries=20, loss=loss).run(net, x, y)
    assert square.passes == {'forward': 22, 'backward': 0} and (square.loss > 0).all()
    assert WorstOf([attack]).run(net, x, y).success.sum() >= Smallest(attack, eps=0.1, tries=2).run(net, x, y).success.sum()
    assert torch.equal(Transfer(net, attack)(net, x, y), attack(net, x, y))
    assert torch.equal(PGD(0.1, steps=2, loss=loss, autocast=torch.bfloat16)(net, x, y), PGD(
        0.1, steps=2, loss=loss, autocast=torch.bfloat16)(net, x, y))
    with pytest.raises(ValueError, match='does not know what would be wrong'):
        check_masking(net, (x, y), attack)


def test_a_loss_of_your_own_may_compare_dense_outputs():
    with seeded(0):
        dense = nn.Conv2d(1, 2, 3)
    x = torch.rand(4, 1, 6, 6)
    x_adv = PGD(0.1, steps=4, loss=moved)(dense, x, torch.zeros(4, 4, 4))
    assert (moved(dense(x_adv), None, dense(x)) > 0).all()


@pytest.mark.parametrize('attack', [PGD(0.1, steps=2, loss='kl'), WorstOf([FGSM(0.1)])], ids=repr)
def test_an_attack_leaves_no_weights_without_a_gradient_behind(attack, net, batch):
    "Autocast keeps the weights that it has converted, and those of a pass without gradients would stop a training step."
    x, y = batch
    with torch.autocast('cpu', torch.bfloat16):
        x_adv = attack(net, x, y)
        loss = F.cross_entropy(net(x_adv).float(), y)
    loss.backward()
    assert net[0].weight.grad.abs().max() > 0 and net[5].weight.grad.abs().max() > 0
    net.zero_grad()
