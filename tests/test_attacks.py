"""Attacks against literal re-implementations, counted passes, and inputs that go wrong."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from robustnb.attacks import FGSM, LOSSES, PGD, Linf, Problem, predictions
from robustnb.devices import seeded

ATTACKS = [
    FGSM(0.1),
    PGD(0.1, steps=3),
    PGD(0.1, steps=3, random_start=False),
    PGD(0.1, steps=2, restarts=3),
    PGD(0.1, steps=3, loss='margin'),
    PGD(0.1, steps=3, loss=lambda logits, y: -logits.gather(1, y[:, None])[:, 0]),
]


@pytest.fixture(scope='module')
def net():
    with seeded(0):
        return nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(288, 4)
        )


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


@pytest.mark.parametrize('attack', ATTACKS, ids=repr)
def test_what_holds_for_every_attack(attack, net, batch):
    x, y = batch
    x_adv = attack(net, x, y)
    assert x_adv.shape == x.shape and x_adv.dtype == x.dtype and not x_adv.requires_grad
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    assert attack.norm.size(x_adv - x).max() <= attack.eps + 1e-6
    assert torch.equal(attack(net, x, y), x_adv), 'the same call twice gives the same result'
    assert torch.equal(attack.at(0.0)(net, x, y), x), 'no strength, no change'
    assert not torch.equal(x_adv, x)
    assert attack(net, x[:0], y[:0]).shape == (0, 1, 8, 8)


@pytest.mark.parametrize('attack', ATTACKS, ids=repr)
def test_neither_batch_size_nor_order_matters(attack, net, batch):
    x, y = batch
    ids = torch.arange(100, 112)
    whole = attack(net, x, y, ids=ids)
    singles = torch.cat([attack(net, x[i : i + 1], y[i : i + 1], ids=ids[i : i + 1]) for i in range(12)])
    order = torch.tensor([7, 3, 11, 0, 5, 1, 2, 10, 9, 4, 6, 8])
    mixed = attack(net, x[order], y[order], ids=ids[order])
    assert torch.equal(whole, singles)
    assert torch.equal(whole[order], mixed)


@pytest.mark.parametrize('attack', [a for a in ATTACKS[1:] if a.random_start], ids=repr)
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
    [(PGD(0.1, steps=40), 40, 40), (FGSM(0.1), 1, 1), (PGD(0.1, steps=4, restarts=3), 15, 12)],
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
    for wrong in (lambda: PGD(steps=0), lambda: PGD(restarts=0), lambda: FGSM(-0.1), lambda: FGSM(float('nan'))):
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


@pytest.mark.parametrize('norm', ['l2', 2, Linf])
def test_a_norm_is_an_object(norm):
    with pytest.raises(TypeError, match=r'Linf\(\)'):
        PGD(norm=norm)


def test_an_output_without_a_gradient_is_named():
    class Decided(nn.Module):
        def forward(self, x):
            return nn.functional.one_hot(x.flatten(1).argmax(1) % 3, 3).float()

    with pytest.raises(ValueError, match='not differentiable'):
        FGSM()(Decided(), torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.long))
