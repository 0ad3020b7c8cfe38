"""Adapters of the real torchattacks, foolbox and ART: parity with ours and with the bare peers, and a model that comes back."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

torchattacks = pytest.importorskip('torchattacks')
foolbox = pytest.importorskip('foolbox')
evasion = pytest.importorskip('art.attacks.evasion')

from robustnb.adapters import ART, Foolbox, Torchattacks, _lent_generators  # noqa: E402
from robustnb.attacks import FGSM, L2, PGD  # noqa: E402
from robustnb.data import digits  # noqa: E402
from robustnb.devices import sample_uniform, seeded  # noqa: E402
from robustnb.evaluation import evaluate  # noqa: E402
from robustnb.training import trained  # noqa: E402

fb = foolbox.attacks
PLAIN = dict(random_start=False)


@pytest.fixture(scope='module')
def trained_net():
    return trained()


@pytest.fixture(scope='module')
def batch():
    test = digits().test
    return test.x[:128], test.y[:128]


PAIRS = {
    'FGSM': [
        FGSM(0.1),
        Torchattacks(torchattacks.FGSM, 0.1),
        Foolbox(fb.LinfFastGradientAttack(), 0.1),
        ART(evasion.FastGradientMethod, 0.1),
    ],
    'PGD Linf': [
        PGD(0.1, steps=10, step=0.025, **PLAIN),
        Torchattacks(torchattacks.PGD, 0.1, dict(alpha=0.025, steps=10, **PLAIN)),
        Foolbox(fb.LinfPGD(rel_stepsize=0.25, steps=10, **PLAIN), 0.1),
        ART(evasion.ProjectedGradientDescent, 0.1, dict(eps_step=0.025, max_iter=10)),
    ],
    'PGD L2': [
        PGD(0.5, steps=10, step=0.125, norm=L2(), **PLAIN),
        Torchattacks(torchattacks.PGDL2, 0.5, dict(alpha=0.125, steps=10, **PLAIN)),
        Foolbox(fb.L2PGD(rel_stepsize=0.25, steps=10, **PLAIN), 0.5),
        ART(evasion.ProjectedGradientDescent, 0.5, dict(norm=2, eps_step=0.125, max_iter=10)),
    ],
    'targeted PGD': [
        PGD(0.2, steps=10, step=0.05, target=3, **PLAIN),
        Torchattacks(torchattacks.PGD, 0.2, dict(alpha=0.05, steps=10, **PLAIN), target=3),
        Foolbox(fb.LinfPGD(rel_stepsize=0.25, steps=10, **PLAIN), 0.2, target=3),
        ART(evasion.ProjectedGradientDescent, 0.2, dict(eps_step=0.05, max_iter=10), target=3),
    ],
}


@pytest.mark.parametrize('library', [1, 2, 3], ids=['torchattacks', 'foolbox', 'ART'])
@pytest.mark.parametrize('kind', PAIRS)
def test_ours_and_theirs_agree_within_one_sample(kind, library, trained_net, batch):
    ours, theirs = (PAIRS[kind][i].run(trained_net, *batch) for i in (0, library))
    assert abs(int(ours.success.sum()) - int(theirs.success.sum())) <= 1
    assert 0 < ours.success.sum()
    clips_first = (kind, library) == ('PGD L2', 3)  # into the bounds, and then into the ball
    assert torch.allclose(ours.size, theirs.size, atol=0.05 if clips_first else 1e-4)
    assert theirs.passes['backward'] == ours.passes['backward']
    assert theirs.passes['forward'] <= ours.passes['forward'] + 2


def on_pixels(attack):
    "The same attack for images from 0 to 255."
    return replace(attack.scaled(255), bounds=(0, 255))


@pytest.mark.parametrize('attack', PAIRS['PGD Linf'] + PAIRS['PGD L2'], ids=lambda a: a.name)
def test_images_from_0_to_255(attack, trained_net, batch):
    class Divided(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = trained_net

        def forward(self, x):
            return self.net(x / 255)

    x, y = batch
    plain, pixels = attack.run(trained_net, x, y), on_pixels(attack).run(Divided(), 255 * x, y)
    assert abs(int(plain.success.sum()) - int(pixels.success.sum())) <= 1
    assert torch.allclose(pixels.size / 255, plain.size, atol=1e-4)


def seed_of(seed=0):
    return int(sample_uniform((1,), torch.zeros(1, dtype=torch.int64), seed).item() * 2**24)


@pytest.mark.parametrize(
    ('kind', 'eps', 'options'),
    [
        (torchattacks.PGD, 0.1, dict(alpha=0.03, steps=5)),
        (torchattacks.CW, None, dict(c=1, steps=10)),
        (torchattacks.DeepFool, None, dict(steps=5)),
        (torchattacks.APGD, 0.1, dict(steps=5, seed=3)),
        (torchattacks.Square, 0.1, dict(n_queries=20, seed=3)),
        (torchattacks.OnePixel, None, dict(steps=1, popsize=4)),
    ],
    ids=lambda v: getattr(v, '__name__', ''),
)
def test_the_same_as_torchattacks_alone(kind, eps, options, batch):
    net, (x, y) = trained(), (batch[0][:16], batch[1][:16])
    given = {} if eps is None else dict(eps=eps)
    with _lent_generators(seed_of()):
        alone = kind(net, **given, **options)(x.clone(), y.clone())
    adapter = Torchattacks(kind, **given, options=options)
    assert torch.allclose(adapter(trained(), x, y), alone.detach(), atol=1e-6)


@pytest.mark.parametrize(
    ('attack', 'eps'),
    [
        (fb.LinfPGD(steps=5), 0.1),
        (fb.LinfDeepFoolAttack(steps=10), None),
        (fb.L2DeepFoolAttack(steps=10), 0.3),
        (fb.BoundaryAttack(steps=20, init_attack=fb.LinearSearchBlendedUniformNoiseAttack(steps=20)), None),
    ],
    ids=lambda v: type(v).__name__,
)
def test_the_same_as_foolbox_alone(attack, eps, batch):
    net, (x, y) = trained(), (batch[0][:16], batch[1][:16])
    with _lent_generators(seed_of()):
        alone = attack(foolbox.PyTorchModel(net, bounds=(0, 1)), x, y, epsilons=eps)[1]
    adapter = Foolbox(attack) if eps is None else Foolbox(attack, eps)
    assert torch.allclose(adapter(trained(), x, y), alone, atol=1e-6)


@pytest.mark.parametrize(
    ('kind', 'eps', 'options'),
    [
        (evasion.ProjectedGradientDescent, 0.1, dict(max_iter=5, num_random_init=1)),
        (evasion.FastGradientMethod, 0.1, {}),
        (evasion.SquareAttack, 0.1, dict(max_iter=10)),
        (evasion.DeepFool, None, dict(max_iter=3)),
    ],
    ids=lambda v: getattr(v, '__name__', ''),
)
def test_the_same_as_art_alone(kind, eps, options, batch):
    from art.estimators.classification import PyTorchClassifier

    net, (x, y) = trained(), (batch[0][:16], batch[1][:16])
    given = {} if eps is None else dict(eps=eps)
    classifier = PyTorchClassifier(
        net, nn.CrossEntropyLoss(), (1, 8, 8), 10, clip_values=(0.0, 1.0), device_type='cpu'
    )
    more = {} if kind is evasion.FastGradientMethod else dict(verbose=False)
    labels = F.one_hot(y, 10).float().numpy()
    with _lent_generators(seed_of()):
        alone = kind(classifier, **given, **options, **more, batch_size=16).generate(x.numpy(), y=labels)
    adapter = ART(kind, **given, options=options)
    assert torch.allclose(adapter(trained(), x, y), torch.from_numpy(alone), atol=1e-6)


ALL = [
    *PAIRS['FGSM'][1:],
    *PAIRS['PGD Linf'][1:],
    *PAIRS['PGD L2'][1:],
    *PAIRS['targeted PGD'][1:],
    Torchattacks(torchattacks.CW, options=dict(steps=3)),
    Torchattacks(torchattacks.DeepFool, options=dict(steps=2)),
    Torchattacks(torchattacks.AutoAttack, 0.1, dict(version='rand')),
    Torchattacks(torchattacks.Square, 0.1, dict(n_queries=10)),
    Foolbox(fb.LinfDeepFoolAttack(steps=2)),
    Foolbox(fb.EADAttack(steps=3, binary_search_steps=1)),
    Foolbox(fb.BoundaryAttack(steps=3, init_attack=fb.LinearSearchBlendedUniformNoiseAttack(steps=20))),
    ART(evasion.SquareAttack, 0.1, dict(max_iter=5)),
    ART(evasion.DeepFool, options=dict(max_iter=2)),
    ART(evasion.AutoProjectedGradientDescent, 0.1, dict(max_iter=3, nb_random_init=1)),
    ART(evasion.CarliniL2Method, options=dict(max_iter=1, binary_search_steps=1)),
]
every_attack = pytest.mark.parametrize('attack', ALL, ids=lambda a: f'{a.name} {type(a.norm).__name__}')


@pytest.fixture
def delicate():
    "Convolution, batch normalisation, dropout and an in-place ReLU, in training mode but for the batch normalisation."
    with seeded(0):
        net = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Dropout(), nn.Flatten(), nn.Linear(288, 10)
        )
    net[1].eval()
    net[5].weight.grad = torch.ones_like(net[5].weight)
    net[0].bias.requires_grad_(False)
    return net


def state(net):
    return (
        [m.training for m in net.modules()],
        [(p.requires_grad, p.grad if p.grad is None else p.grad.clone()) for p in net.parameters()],
        {name: value.clone() for name, value in net.state_dict().items()},
        [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in net.modules()],
    )


@every_attack
@pytest.mark.parametrize('wrapped', [False, True], ids=['', 'DataParallel'])
def test_the_model_comes_back(attack, wrapped, delicate, batch):
    x, y = batch[0][:8].clone(), batch[1][:8]
    with torch.no_grad():  # foolbox's boundary attack insists on a start that is misclassified
        delicate[5].weight.mul_(5)
    before, numbers = state(delicate), (torch.get_rng_state(), repr(np.random.get_state()), random.getstate())
    with torch.no_grad():
        result = attack.run(nn.DataParallel(delicate) if wrapped else delicate, x, y)
    torch.testing.assert_close(state(delicate), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), numbers[0])
    assert (repr(np.random.get_state()), random.getstate()) == numbers[1:]
    assert torch.equal(x, batch[0][:8])
    assert result.x_adv.min() >= 0 and result.x_adv.max() <= 1
    assert result.size.max() <= attack.eps + 1e-4


@every_attack
def test_twice_is_the_same(attack, delicate, batch):
    x, y = batch[0][:8], batch[1][:8]
    torch.rand(3), np.random.rand(3), random.random()
    first = attack(delicate, x, y)
    torch.rand(3), np.random.rand(3), random.random()
    assert torch.equal(attack(delicate, x, y), first)


@pytest.mark.parametrize('attack', [kinds[i] for kinds in PAIRS.values() for i in (1, 2, 3)], ids=lambda a: a.name)
def test_what_the_peers_do_not_take(attack, batch):
    class Odd(nn.Module):
        "One logit, in a dictionary, in half precision."

        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 1)).to(torch.bfloat16)

        def forward(self, x):
            return {'features': x, 'logits': self.net(x)}

    attack = replace(attack, target=None if attack.target is None else 1)
    x, y = batch[0][:8].double(), batch[1][:8].int() % 2
    odd = Odd()
    with torch.inference_mode():
        x_adv = attack(odd, x, y)
    assert x_adv.dtype == torch.float64 and not torch.equal(x_adv, x)
    assert attack(Odd(), x[:0], y[:0]).shape == (0, 1, 8, 8)
    with pytest.raises(ValueError, match='the model knows 0 to 1'):
        attack(Odd(), x, y + 2)


def test_a_curve_over_strengths(trained_net, batch):
    attacks = [*PAIRS['PGD Linf'], Torchattacks(torchattacks.DeepFool, norm=None, options=dict(steps=10))]
    x, y = batch[0][:32], batch[1][:32]
    table = evaluate(trained_net, (x, y), attacks, eps=[0.05, 0.1], show_progress=False).table()
    table = table[table.attack != 'clean'].pivot(index='eps', columns='attack', values='accuracy')
    assert (table.loc[0.05] >= table.loc[0.1]).all()
    ours = table.pop('PGD-10')
    assert (table.drop(columns='DeepFool (torchattacks)').sub(ours, axis=0).abs() <= 1 / 32 + 1e-9).all(axis=None)
