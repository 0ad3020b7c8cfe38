"""What people do to attacks, row by row, over every attack that there is.

Each row is something that at least one of the well-known libraries gets wrong, or answers with an error that does not
help: a NaN pixel, images from 0 to 255, a model in training mode, a caller inside `torch.no_grad()`, and so on.
"""

import copy
from dataclasses import replace
from math import inf

import pytest
import torch
from test_adapters import ArtLike, FoolboxLike, Rude, peers  # noqa: F401
from torch import nn

from robustnb import adapters, attacks, blackbox, minimal
from robustnb.attacks import APGD, FGSM, L2, PGD, Attack, Linf, WorstOf
from robustnb.blackbox import Square, Transfer
from robustnb.devices import seeded
from robustnb.guard import Logits, Normalized, _say_once, usable
from robustnb.minimal import CW, DeepFool, Smallest
from robustnb.noises import Perturbation

CLASSES, EPS = 4, 0.1


def make_net(train: bool = False) -> nn.Sequential:
    "Convolution, batch norm, in-place ReLU and dropout, with statistics that are not the initial ones."
    with seeded(0):
        net = nn.Sequential(
            nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Flatten(), nn.Linear(216, CLASSES)
        )
        net.train()
        net(torch.rand(32, 1, 8, 8))
    return net.train(train)


def images(n: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(n, 1, 8, 8, generator=generator), torch.randint(0, CLASSES, (n,), generator=generator)


ATTACKS = {
    'FGSM': FGSM(EPS),
    'FGSM L2': FGSM(1.0, norm=L2()),
    'PGD': PGD(EPS, steps=3),
    'PGD L2': PGD(1.0, steps=3, norm=L2()),
    'PGD restarts': PGD(EPS, steps=2, restarts=2),
    'PGD stops': PGD(EPS, steps=3, keep_going=False),
    'PGD dlr': PGD(EPS, steps=3, loss='dlr'),
    'PGD targeted': PGD(EPS, steps=3, target='runner-up'),
    'PGD masked': PGD(EPS, steps=3, norm=Linf(scale=torch.linspace(0, 1, 8))),
    'APGD': APGD(EPS, steps=6),
    'APGD L2': APGD(1.0, steps=6, norm=L2()),
    'WorstOf': WorstOf([PGD(EPS, steps=2), APGD(EPS, steps=3, loss='dlr')]),
    'Square': Square(EPS, queries=12),
    'Square L2': Square(1.0, queries=12, norm=L2()),
    'Transfer': Transfer(make_net(), PGD(EPS, steps=2)),
    'DeepFool': DeepFool(steps=5),
    'DeepFool L2': DeepFool(steps=5, norm=L2()),
    'CW': CW(steps=40, searches=2),
    'Smallest': Smallest(PGD(EPS, steps=2)),
    'Torchattacks': adapters.Torchattacks(Rude, eps=EPS),
    'Foolbox': adapters.Foolbox(FoolboxLike(), eps=EPS),
    'ART': adapters.ART(ArtLike, eps=EPS),
}
every_attack = pytest.mark.parametrize('attack', ATTACKS.values(), ids=ATTACKS)


def test_every_attack_is_here():
    known = {
        symbol
        for module in (attacks, blackbox, minimal, adapters)
        for symbol in vars(module).values()
        if isinstance(symbol, type) and issubclass(symbol, Perturbation) and symbol.__module__ == module.__name__
    }
    bases = {Attack, adapters.Foreign, adapters._Built}
    assert known - bases == {type(attack) for attack in ATTACKS.values()}


def state_of(net: nn.Module) -> tuple:
    "All that must be as before: modes, values, flags and gradients."
    return (
        [m.training for m in net.modules()],
        {name: value.clone() for name, value in net.state_dict().items()},
        [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in net.parameters()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in net.modules()],
    )


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, list | tuple) else a == b


def expected_of(attack, x=None, y=None):
    return attack(make_net(), *(images() if x is None else (x, y)))


def attack_is_foreign(attack) -> bool:
    "Whether it draws its noise as another library does, for the batch as a whole."
    return isinstance(attack, adapters.Foreign)


@pytest.fixture
def notes(caplog):
    _say_once.cache_clear()
    caplog.set_level('WARNING')
    return caplog


# ----------------------------------------------------------------------------------------------------------- the data


@every_attack
@pytest.mark.parametrize('value', [float('nan'), inf, -inf])
def test_a_pixel_that_is_no_number(attack, value):
    x, y = images()
    x[3, 0, 2, 2] = value
    with pytest.raises(ValueError, match='NaN or infinity in sample 3'):
        attack(make_net(), x, y)
    keep, ids = usable(x), torch.arange(8)
    rest = attack(make_net(), x[keep], y[keep], ids=ids[keep])
    assert keep.sum() == 7 and (attack_is_foreign(attack) or torch.allclose(rest, expected_of(attack)[keep], atol=1e-4))


@every_attack
@pytest.mark.parametrize(
    ('spoil', 'error', 'words'),
    [
        (lambda x, y: ((x - 0.5) / 0.25, y), ValueError, r'Normalized\(model, mean, std\)'),
        (lambda x, y: (255 * x, y), ValueError, 'x / 255'),
        (lambda x, y: ((255 * x).byte(), y), TypeError, r'scale them to \[0, 1\]'),
        (lambda x, y: (x, y.float()), TypeError, 'integer class indices'),
        (lambda x, y: (x, torch.eye(CLASSES)[y]), TypeError, 'one-hot'),
        (lambda x, y: (x, y > 1), TypeError, 'integer class indices'),
        (lambda x, y: (x, y + CLASSES), ValueError, 'labels run from'),
        (lambda x, y: (x, y - CLASSES), ValueError, 'labels run from'),
        (lambda x, y: (x, y[:-1]), ValueError, 'one class index per sample'),
        (lambda x, y: (x.numpy(), y), TypeError, 'must be a tensor'),
    ],
    ids=['normalised', '0 to 255', 'uint8', 'float labels', 'one-hot', 'bool labels', 'large label', 'negative label', 'length',
         'array'],
)
def test_what_cannot_be_right_is_refused_in_words(attack, spoil, error, words):
    net = make_net()
    before = state_of(net)
    with pytest.raises(error, match=words):
        attack(net, *spoil(*images()))
    assert same(before, state_of(net))


class Asked(nn.Module):
    "Counts how often it is asked."

    def __init__(self, net):
        super().__init__()
        self.net, self.calls = net, [0]

    def forward(self, x):
        self.calls[0] += 1
        return self.net(x)


@every_attack
@pytest.mark.parametrize(
    ('spoil', 'calls'),
    [
        (lambda x, y: (x.fill_(torch.nan), y), 0),
        (lambda x, y: (x + 1, y), 0),
        (lambda x, y: (x, y[:-1]), 0),
        (lambda x, y: (x, y - CLASSES), 0),
        (lambda x, y: (x, y + CLASSES), 1),  # how many classes there are shows in the first answer
    ],
    ids=['NaN', 'outside', 'length', 'negative label', 'large label'],
)
def test_what_cannot_be_right_costs_no_passes(attack, spoil, calls):
    model = Asked(make_net())
    with pytest.raises(ValueError):
        attack(model, *spoil(*images()))
    assert model.calls[0] <= calls


@every_attack
def test_logits_of_another_name_are_selected(attack):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = make_net()

        def forward(self, x):
            logits = self.net(x)
            return {'hidden': -logits, 'scores': logits}

    assert torch.equal(attack(Logits(Two(), 'scores'), *images()), expected_of(attack))


@every_attack
def test_pixels_from_0_to_255_with_their_bounds(attack):
    if isinstance(attack, WorstOf | Transfer | Smallest):
        attack = ATTACKS['PGD'] if isinstance(attack, Transfer) else attack
    (x, y), net = images(), make_net()
    wide = replace(attack, bounds=(0.0, 255.0)) if not isinstance(attack, Transfer) else attack
    wide = wide.at(wide.strength * 255) if wide.strength == wide.strength and wide.strength < inf else wide
    x_adv = wide(Normalized(net, 0.0, 255.0), 255 * x, y)
    assert x_adv.min() >= 0 and x_adv.max() <= 255 and x_adv.max() > 2


@every_attack
def test_an_empty_batch(attack):
    x, y = images()
    x_adv = attack(make_net(), x[:0], y[:0])
    assert x_adv.shape == (0, 1, 8, 8) and x_adv.dtype == x.dtype
    result = attack.run(make_net(), x[:0], y[:0])
    assert [len(t) for t in (result.x_adv, result.success, result.size, result.loss)] == [0] * 4


@every_attack
def test_double_precision_images_for_a_single_precision_model(attack, notes):
    x, y = images()
    found = attack(make_net(), x.double(), y)
    assert found.dtype == torch.float64
    limit = 1e-3 if getattr(attack, 'keep_going', True) else 2e-2  # where it stops may be one step apart
    assert (found - expected_of(attack)).abs().mean() < limit
    assert len([r for r in notes.records if 'float64' in r.message]) == 1, 'one note'


@every_attack
@pytest.mark.parametrize('kind', [torch.int32, torch.int16, torch.int8, torch.uint8])
def test_any_integer_label(attack, kind):
    x, y = images()
    assert torch.equal(attack(make_net(), x, y.to(kind)), expected_of(attack))


@every_attack
def test_images_that_want_a_gradient_and_are_not_contiguous(attack):
    x, y = images()
    found = attack(make_net(), x.clone().requires_grad_(), y)
    assert not found.requires_grad and torch.equal(found, expected_of(attack))
    strided = torch.stack([x, x], dim=-1)[..., 0]
    assert not strided.is_contiguous() and torch.allclose(attack(make_net(), strided, y), expected_of(attack), atol=1e-5)


@every_attack
def test_the_inputs_stay_as_they_are(attack):
    x, y = images()
    attack(make_net(), x, y)
    assert torch.equal(x, images()[0]) and torch.equal(y, images()[1])


# ---------------------------------------------------------------------------------------------------------- the model


def half_frozen(net):
    net.train()
    net[1].eval()
    return net


def owned(net):
    "A gradient and a frozen weight of its owner."
    net[0].weight.grad = torch.full_like(net[0].weight, 0.25)
    net[5].bias.requires_grad_(False)
    return net


MODELS = {
    'in training mode': lambda net: net.train(),
    'batch norm frozen': half_frozen,
    'an evaluated model inside Sequential': lambda net: nn.Sequential(nn.Identity(), net),
    'inside DataParallel': nn.DataParallel,
    'inside Normalized': lambda net: Normalized(net, 0.0, 1.0),
    'with frozen parameters': lambda net: net.requires_grad_(False),
    'with a gradient of its owner': owned,
    'compiled': lambda net: torch.compile(net, backend='eager'),
}


@every_attack
@pytest.mark.parametrize('row', MODELS)
def test_the_model_comes_back_as_it_was(attack, row):
    model = MODELS[row](make_net())
    before = state_of(model)
    assert torch.allclose(attack(model, *images()), expected_of(attack), atol=1e-5)
    assert same(before, state_of(model))


class Fuse(nn.Module):
    "Raises after so many calls."

    def __init__(self, net, calls):
        super().__init__()
        self.net, self.left = net, [calls]

    def forward(self, x):
        self.left[0] -= 1
        if self.left[0] < 0:
            raise RuntimeError('boom')
        return self.net(x)


@every_attack
@pytest.mark.parametrize('calls', [0, 1])
def test_an_exception_in_the_middle(attack, calls):
    model = Fuse(half_frozen(make_net()), 0 if isinstance(attack, FGSM | Transfer) else calls)
    before = state_of(model)
    with pytest.raises(RuntimeError, match='boom'):
        attack.run(model, *images())
    assert same(before, state_of(model))


@every_attack
@pytest.mark.parametrize('output', ['tuple', 'dict', 'list', 'object'])
def test_outputs_that_are_no_tensor(attack, output):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = make_net()

        def forward(self, x):
            logits = self.net(x)
            if output == 'object':
                return type('Output', (), {'logits': logits})()
            return {'tuple': (logits, None), 'dict': {'hidden': x, 'logits': logits}, 'list': [logits]}[output]

    assert torch.equal(attack(Wrapped(), *images()), expected_of(attack))


@every_attack
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_keeps_eps(attack, dtype):
    x, y = images()
    model = make_net().to(dtype)
    if isinstance(attack, Transfer):
        attack = replace(attack, surrogate=make_net().to(dtype))
    result = attack.run(model, x.to(dtype), y)
    assert result.x_adv.dtype == dtype and result.x_adv.isfinite().all()
    change = (result.x_adv.double() - x.to(dtype).double()).flatten(1)
    limit = attack.strength if attack.strength == attack.strength else EPS
    length = change.norm(dim=1) if isinstance(getattr(attack, 'norm', None), L2) else change.abs().amax(1)
    assert length.max() <= limit + 1e-6 and result.x_adv.min() >= 0 and result.x_adv.max() <= 1


@every_attack
@pytest.mark.parametrize('dtype', [torch.float64])
def test_a_model_in_double_precision(attack, dtype):
    x, y = images()
    found = attack(make_net().to(dtype), x.to(dtype), y)
    assert found.dtype == dtype and (found - expected_of(attack)).abs().mean() < 1e-3


# --------------------------------------------------------------------------------------------------------- the caller


@every_attack
@pytest.mark.parametrize('caller', [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_it_does_not_matter_who_calls(attack, caller):
    net, expected = make_net(), expected_of(attack)
    with caller():
        x, y = images()  # inference tensors, inside inference mode
        found = attack(net, x, y)
        assert torch.is_grad_enabled() is (caller is torch.enable_grad)
    assert torch.equal(found, expected)


@every_attack
def test_no_global_random_generator_is_used_and_the_same_call_gives_the_same(attack):
    state = torch.get_rng_state()
    first, second = expected_of(attack), expected_of(attack)
    assert torch.equal(first, second) and torch.equal(state, torch.get_rng_state())


@every_attack
def test_one_by_one_is_the_same_as_all_at_once(attack):
    (x, y), net, ids = images(), make_net(), torch.arange(8) + 30
    together = attack(net, x, y, ids=ids)
    alone = torch.cat([attack(net, x[i : i + 1], y[i : i + 1], ids=ids[i : i + 1]) for i in range(8)])
    assert torch.allclose(together, alone, atol=1e-4)


# --------------------------------------------------------------------------------------------- what cannot work, told


class Sick(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = make_net()

    def forward(self, x):
        return self.net(x) * torch.nan


class Flat(nn.Module):
    "Decides as a network does, and has no gradient."

    def __init__(self):
        super().__init__()
        self.net = make_net()

    def forward(self, x):
        return self.net((4 * x).round() / 4) + 0 * x.flatten(1).sum(1, keepdim=True)


@every_attack
def test_nan_logits_are_told(attack, notes):
    result = attack.run(Sick(), *images())
    assert result.x_adv.isfinite().all() and 'NaN' in notes.text and 'exactly zero' not in notes.text


@every_attack
def test_a_missing_gradient_is_told(attack, notes):
    x, _ = images()
    model = Flat().eval()
    attack(model, x, model(x).argmax(1))
    needs_none = isinstance(attack, Square | Transfer)
    assert ('exactly zero' in notes.text) is not needs_none


@every_attack
def test_a_healthy_model_causes_no_note(attack, notes):
    attack(make_net(), *images())
    assert not notes.records


# --------------------------------------------------------------------------------------------------------- any shape


@every_attack
@pytest.mark.parametrize('shape', [(5,), (3, 7), (2, 3, 4, 5)], ids=['a table', 'sequences', 'volumes'])
def test_any_shape(attack, shape):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(6, *shape, generator=generator), torch.arange(6) % 3
    with seeded(0):
        net = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 8), nn.Tanh(), nn.Linear(8, 3))
    if getattr(attack, 'norm', None) is not None and isinstance(attack.norm.scale, torch.Tensor):
        attack = replace(attack, norm=Linf(scale=torch.linspace(0, 1, shape[-1])))
    if isinstance(attack, Transfer):
        attack = replace(attack, surrogate=copy.deepcopy(net))
    result = attack.run(net, x, y)
    assert result.x_adv.shape == x.shape and result.x_adv.min() >= 0 and result.x_adv.max() <= 1


@every_attack
def test_inputs_without_bounds(attack):
    from robustnb.data import moons

    data = moons().test.take(12)
    with seeded(0):
        net = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 2))
    if getattr(attack, 'norm', None) is not None and isinstance(attack.norm.scale, torch.Tensor):
        attack = replace(attack, norm=Linf(scale=torch.tensor([1.0, 0.5])))
    if isinstance(attack, Transfer):
        attack = replace(attack, surrogate=copy.deepcopy(net))
    x_adv = replace(attack, bounds=None)(net, data.x, data.y)
    assert x_adv.isfinite().all() and x_adv.shape == data.x.shape and not torch.equal(x_adv, data.x)


@every_attack
@pytest.mark.parametrize('squeezed', [False, True])
def test_one_logit(attack, squeezed):
    x, y = images()[0], images()[1] % 2
    with seeded(0):
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 1))
    model = nn.Sequential(net, nn.Flatten(0)) if squeezed else net
    if isinstance(attack, Transfer):
        attack = replace(attack, surrogate=copy.deepcopy(net))
    result = attack.run(model, x, y)
    seen = (net(result.x_adv)[:, 0] > 0).long()
    assert torch.equal(result.success, seen != y)


@every_attack
def test_a_batch_of_one_with_batch_norm(attack):
    x, y = images(1)
    assert attack(make_net(train=True), x, y).shape == x.shape
