"""Noises against literal re-implementations and their distributions, and noise of the size of an attack."""

import copy
import json
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import numpy as np
import pytest
import torch
from scipy import ndimage, stats
from torch import nn

from robustnb.attacks import FGSM, PGD
from robustnb.devices import sample_uniform, seeded
from robustnb.evaluation import evaluate
from robustnb.lsa import layer_sustainability
from robustnb.noises import (
    Blur,
    Gaussian,
    Matched,
    Noise,
    Pepper,
    Perturbation,
    PixelNoise,
    Poisson,
    Salt,
    SaltPepper,
    Speckle,
    Uniform,
    _poisson_quantile,
    matched,
    named,
    perturb,
    settings_of,
)

NOISES = [Gaussian(0.2), Uniform(0.2), Speckle(0.3), Poisson(0.2), Salt(0.1), Pepper(0.1), SaltPepper(0.1), Blur(0.8)]
RANDOM = [n for n in NOISES if isinstance(n, PixelNoise)]
MATCHED = [matched(n, FGSM(0.05)) for n in NOISES] + [matched(Uniform(), PGD(0.05, steps=2, seed=4))]
ALL = NOISES + [replace(n, per_pixel=True) for n in RANDOM] + MATCHED

every_noise = pytest.mark.parametrize('noise', NOISES, ids=lambda n: n.name)


def a_function(model, x, y):
    return (x * 0.9).clamp(0, 1)


@pytest.fixture(scope='module')
def net():
    with seeded(0):
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(8 * 6 * 7, 4)
        )


@pytest.fixture(scope='module')
def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.rand(12, 3, 8, 9, generator=generator), torch.randint(0, 4, (12,), generator=generator)


def sizes(x_pert, x):
    return (x_pert.double() - x.double()).flatten(1).norm(dim=1)


@pytest.mark.parametrize('noise', ALL, ids=lambda n: n.name)
def test_what_holds_for_every_noise(noise, net, batch):
    x, y = batch
    x_pert = noise(net, x, y)
    assert x_pert.shape == x.shape and x_pert.dtype == x.dtype and not x_pert.requires_grad
    assert x_pert.min() >= 0 and x_pert.max() <= 1 and not torch.equal(x_pert, x)
    assert torch.equal(noise(net, x, y), x_pert), 'the same call twice gives the same result'
    assert torch.equal(noise.at(0.0)(net, x, y), x), 'no strength, no change'
    assert noise(net, x[:0], y[:0]).shape == (0, 3, 8, 9)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert torch.equal(noise(net, x.clone(), y.clone()), x_pert)


@pytest.mark.parametrize('noise', ALL, ids=lambda n: n.name)
def test_neither_batch_size_nor_order_matters(noise, net, batch):
    x, y = batch
    ids = torch.arange(100, 112)
    whole = noise(net, x, y, ids=ids)
    singles = torch.cat([noise(net, x[i : i + 1], y[i : i + 1], ids=ids[i : i + 1]) for i in (0, 5, 11)])
    order = torch.tensor([7, 3, 11, 0, 5, 1, 2, 10, 9, 4, 6, 8])
    assert torch.equal(whole[[0, 5, 11]], singles)
    assert torch.equal(whole[order], noise(net, x[order], y[order], ids=ids[order]))


@pytest.mark.parametrize('noise', [n for n in ALL if 'Blur' not in n.name], ids=lambda n: n.name)
def test_seed_and_id_decide(noise, net, batch):
    x, y = batch
    assert not torch.equal(replace(noise, seed=1)(net, x, y), noise(net, x, y))
    assert not torch.equal(noise(net, x, y, ids=torch.arange(50, 62)), noise(net, x, y))


@every_noise
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(noise, dtype, net, batch):
    x, y = batch[0].to(dtype), batch[1]
    for found in (noise(None, x), matched(noise, a_function)(net, x, y)):
        assert found.dtype == dtype and found.min() >= 0 and found.max() <= 1
    close = {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float64: 1e-6}[dtype]
    assert torch.allclose(noise(None, x).double(), noise(None, x.float()).double(), atol=close)


@every_noise
def test_a_strength_per_sample(noise, batch):
    x, _ = batch
    strengths = noise.strength * torch.linspace(0, 2, 12)
    each = torch.cat([noise.at(float(s))(None, x[i : i + 1], ids=torch.tensor([i])) for i, s in enumerate(strengths)])
    assert torch.allclose(noise.at(strengths.view(-1, 1, 1, 1))(None, x), each, atol=1e-6)


@every_noise
def test_size_grows_with_strength(noise, batch):
    x, _ = batch
    strengths = [0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1]
    grown = torch.stack([sizes(noise.at(s)(None, x), x) for s in strengths])
    slack = 0.1 if isinstance(noise, Poisson) else 1e-6  # counts are whole: they go up in a sawtooth
    assert (grown.diff(dim=0) >= -slack).all() and (grown[-1] > grown[1]).all()


def test_noise_has_the_size_it_claims():
    grey = torch.full((200, 1, 16, 16), 0.5)
    for noise, std in ((Gaussian(0.1), 0.1), (Uniform(0.2), 0.2 / 3**0.5), (Speckle(0.1), 0.05)):
        change = noise(None, grey) - grey
        assert abs(float(change.std()) - std) < 1e-3 and abs(float(change.mean())) < 1e-3
    assert (Uniform(0.2)(None, grey) - grey).abs().max() <= 0.2
    both = SaltPepper(0.2)(None, grey)
    assert abs(float((both == 1).float().mean()) - 0.1) < 5e-3 and abs(float((both == 0).float().mean()) - 0.1) < 5e-3
    assert abs(float((Pepper(0.3)(None, grey) == 0).float().mean()) - 0.3) < 5e-3
    assert abs(float((Salt(0.3)(None, grey) == 1).float().mean()) - 0.3) < 5e-3


@pytest.mark.parametrize('noise', RANDOM, ids=lambda n: n.name)
def test_one_draw_per_pixel(noise):
    grey = torch.full((4, 3, 16, 16), 0.5)
    together, apart = replace(noise, per_pixel=True)(None, grey), noise(None, grey)
    assert (together == together[:, :1]).all() and not (apart == apart[:, :1]).all()
    assert replace(noise, per_pixel=True).name == f'{noise.name} per pixel'
    with pytest.raises(ValueError, match='per_pixel needs images'):
        replace(noise, per_pixel=True)(None, grey[:, 0])


@pytest.mark.parametrize('rate', [0, 1e-4, 0.01, 0.3, 1, 2.5, 7, 12, 31, 100, 1e3, 1e4, 1e6])
def test_poisson_inverts_the_distribution_function(rate):
    middle = sample_uniform((5000,), torch.tensor([0]))[0].double() + 2**-25
    tails = 2.0**-25 + 2.0**-24 * torch.cat([torch.arange(50), 2**24 - 1 - torch.arange(50)]).double()
    share = torch.cat([middle, tails])
    expected = stats.poisson.ppf(share.numpy(), rate)
    assert np.array_equal(_poisson_quantile(share, torch.full_like(share, rate)).numpy(), expected)


def test_poisson_one_value_at_a_time(batch):
    x = batch[0][:3]
    share = sample_uniform(x.shape[1:], torch.arange(3), seed=5).double() + 2**-25
    for (low, high), scale in (((0, 1), 0.1), ((-1, 3), 0.3), ((0, 255), 0.02)):
        values = low + (high - low) * x
        literal = [
            low + (high - low) * scale**2 * stats.poisson.ppf(u, (v - low) / (high - low) / scale**2)
            for u, v in zip(share.flatten().tolist(), values.double().flatten().tolist(), strict=True)
        ]
        literal = torch.tensor(literal).view_as(x).clamp(low, high)
        found = Poisson(scale, bounds=(low, high), seed=5)(None, values)
        assert torch.allclose(found, literal.float(), atol=1e-6 * (high - low))


def test_mean_and_variance_of_poisson_counts_are_the_rate():
    for value, scale in ((0.1, 0.1), (0.25, 0.2), (0.5, 0.05)):
        counts = Poisson(scale)(None, torch.full((100, 1, 28, 28), value)) / scale**2
        assert abs(float(counts.mean()) / (value / scale**2) - 1) < 0.01
        assert abs(float(counts.var()) / (value / scale**2) - 1) < 0.02
    white = Poisson(0.1, bounds=(0, 1))(None, torch.ones(50, 1, 28, 28))
    assert abs(float((white - 1).clamp(max=0).square().mean().sqrt()) - 0.1 / 2**0.5) < 5e-3, 'half of it is clipped away'
    assert torch.equal(Poisson(0.0)(None, white), white) and torch.equal(Poisson(0.5)(None, white * 0), white * 0)


def literal_blur(image, sigma):
    "One pixel at a time, with weights that sum to one over the image."
    found = np.zeros_like(image)
    h, w = image.shape
    for i in range(h):
        for j in range(w):
            weights = np.exp(-((np.arange(h)[:, None] - i) ** 2 + (np.arange(w) - j) ** 2) / (2 * sigma**2))
            found[i, j] = (weights * image).sum() / weights.sum()
    return found


@pytest.mark.parametrize('sigma', [0.3, 1.0, 4.0, 100.0])
def test_blur_equals_the_literal_form(sigma, batch):
    image = batch[0][0, 0].double()
    blurred = Blur(sigma)(None, image[None, None])[0, 0]
    assert np.allclose(blurred, literal_blur(image.numpy(), sigma), atol=1e-12)


def test_blur_equals_scipy_away_from_the_edges():
    image = torch.rand(40, 50, generator=torch.Generator().manual_seed(2)).double()
    expected = ndimage.gaussian_filter(image.numpy(), 1.5, truncate=8)
    found = Blur(1.5)(None, image[None])[0].numpy()
    assert np.allclose(found[12:-12, 12:-12], expected[12:-12, 12:-12], atol=1e-12)


def test_blur_by_hand():
    image, e = torch.tensor([[[[1.0, 0.0, 0.0]]]]), np.exp(-0.5)
    expected = [1 / (1 + e + e**4), e / (1 + 2 * e), e**4 / (1 + e + e**4)]
    assert np.allclose(Blur(1.0)(None, image)[0, 0, 0], expected, atol=1e-7), 'at the edge the weights that are there sum to 1'
    with pytest.raises(ValueError, match='height, width'):
        Blur()(None, torch.rand(4, 5))


@pytest.mark.parametrize('name', ['Salt', 'Pepper', 'SaltPepper', 'Poisson'])
def test_black_and_white_are_needed(name):
    noise = {n.name: n for n in NOISES}[name]
    with pytest.raises(ValueError, match=r'black and white: bounds=\(low, high\)'):
        replace(noise, bounds=None)(None, torch.randn(3, 5))


def test_your_own_noise(net, batch):
    @dataclass(frozen=True)
    class Dim(Noise):
        factor: float = 0.5
        strength_field: ClassVar[str] = 'factor'

        def draw(self, x, ids):
            return x * (1 - self.factor)

    assert torch.allclose(Dim()(net, *batch), batch[0] / 2) and isinstance(Dim(), Perturbation)
    assert Dim().scaled(0.5).factor == 0.25
    x_pert = matched(Dim(), a_function)(net, *batch)
    assert torch.allclose(x_pert, batch[0] * 0.9, atol=1e-5), 'the attack is found again'
    assert np.isinf(Gaussian.strongest) and Gaussian(7).std == 7
    for base in (Noise(), PixelNoise()):
        with pytest.raises(TypeError, match='base class'):
            base(None, batch[0])


def test_settings_are_checked(batch):
    for wrong in (lambda: Gaussian(float('nan')), lambda: Uniform(-0.1), lambda: Poisson(-1), lambda: Blur(-1)):
        with pytest.raises(ValueError, match='at least'):
            wrong()
    for noise in NOISES:
        if noise.strongest == 1:
            noise.at(1)
            with pytest.raises(ValueError, match=f'{noise.strength_field} of {noise.name} must be .* at most 1, got 5'):
                noise.at(5)
        with pytest.raises(ValueError, match='Normalized'):
            noise(None, batch[0] * 3)
        with pytest.raises(ValueError, match='5 ids for 12 samples'):
            noise(None, batch[0], ids=torch.arange(5))


# ------------------------------------------------------------------------------------------- functions, and names


def test_callables_in_a_perturbations_place(net, batch):
    x, y = batch
    with torch.no_grad():
        found = perturb(
            lambda model, x, y: x - torch.autograd.grad(model(x := x.requires_grad_()).sum(), x)[0] * 0,
            net,
            x.clone(),
            y,
        )
    assert torch.equal(found, x) and not found.requires_grad
    for bad in (lambda m, x, y: x[:3], lambda m, x, y: None, lambda m, x, y: x.numpy()):
        with pytest.raises(ValueError, match='must return a tensor'):
            perturb(bad, net, x, y)
    with pytest.raises(ValueError, match='NaN or infinity in sample'):
        perturb(lambda m, x, y: x * float('nan'), net, x, y)


def test_the_images_of_the_caller_are_safe(net, batch):
    x, y = batch
    kept = x.clone()
    perturb(lambda m, x, y: x.mul_(0), net, x, y)
    with torch.inference_mode():
        perturb(lambda m, x, y: (x + torch.autograd.grad(m(x.requires_grad_()).sum(), x)[0]).clamp(0, 1), net, x, y)
    assert torch.equal(x, kept) and not x.requires_grad


def test_names():
    assert list(named({'mine': FGSM()})) == ['mine']
    assert list(named([PGD(), PGD(restarts=2)])) == ['PGD-40', 'PGD-40x2']
    assert list(named([Gaussian(0.1), Gaussian(0.2)])) == ['Gaussian 0.1', 'Gaussian 0.2']
    with pytest.raises(ValueError, match='pass a dictionary'):
        named([FGSM(0.1), FGSM(0.1)])
    with pytest.raises(ValueError, match='pass a dictionary'):
        named([a_function, a_function])
    for nothing in ([], {}, {'clean': FGSM()}):
        with pytest.raises(ValueError, match='at least one perturbation'):
            named(nothing)
    assert named(FGSM(bounds=(0, 255)), bounds=(-1, 1))['FGSM'].bounds == (0, 255), 'chosen bounds stay'
    assert named(FGSM(), bounds=(-1, 1))['FGSM'].bounds == (-1, 1)


# ------------------------------------------------------------------------------------ noise of the size of an attack


@every_noise
@pytest.mark.parametrize('attack', [FGSM(0.03), PGD(0.1, steps=2), a_function], ids=['FGSM', 'PGD', 'function'])
def test_matched_sizes(noise, attack, net, batch):
    x, y = batch
    wanted = sizes(perturb(attack, net, x, y), x)
    gap = (sizes(matched(noise, attack)(net, x, y), x) - wanted).abs()
    # Of one value a step: the squared size moves by at most 1, and the nearer side is taken. Counts are in between.
    allowed = 1 / (4 * wanted) if 'p' in vars(noise) else 0.02 if isinstance(noise, Poisson) else 1e-5
    assert (gap <= allowed + 1e-5).all(), gap


def test_the_closest_where_there_is_no_such_size(net):
    x, y = torch.full((3, 3, 8, 9), 0.75), torch.zeros(3).long()
    x[1] = 0

    def to_black(model, x, y):
        return x * torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1, 1)

    salted = matched(Salt(), to_black)(net, x, y)
    assert torch.equal(salted[0], torch.ones(3, 8, 9)), 'everything is salted, and that is all that salt can do'
    assert torch.equal(salted[1:], x[1:]), 'nothing was changed, so nothing is'
    assert torch.equal(matched(Pepper(), to_black)(net, x, y)[0], torch.zeros(3, 8, 9))
    assert torch.allclose(matched(Blur(), to_black)(net, x, y), x, atol=1e-6), 'there is nothing to blur'
    assert torch.equal(matched(Speckle(), to_black)(net, x, y)[1], x[1]), 'black stays black'


def test_only_values_that_can_move_count(net, batch):
    "The size is that after clipping: half of the values are at the bounds already."
    x, y = (batch[0] > 0.5).float(), batch[1]
    attack = PGD(0.1, steps=2)
    wanted = sizes(attack(net, x, y), x)
    assert torch.allclose(sizes(matched(Gaussian(), attack)(net, x, y), x), wanted, rtol=1e-5)


def test_matched_is_a_perturbation_like_others(net, batch):
    x, y = batch
    fair = matched(Gaussian(0.5, seed=3), PGD(0.1, steps=4, seed=7))
    assert isinstance(fair, Matched) and (fair.name, fair.strength, fair.seed) == ('Gaussian as PGD-4', 0.1, 3)
    assert fair.at(0.2).attack == PGD(0.2, steps=4, seed=7) and fair.scaled(0.5).strength == 0.05
    assert torch.equal(matched(Gaussian(9.0, seed=3), fair.attack)(net, x, y), fair(net, x, y)), 'its own strength is not used'
    assert matched(Salt(per_pixel=True), a_function).name == 'Salt per pixel as a_function'
    names = list(named([fair, fair.at(0.2), a_function, PGD(steps=4)]))
    assert names == ['Gaussian as PGD-4 0.1', 'Gaussian as PGD-4 0.2', 'a_function', 'PGD-4 0.1']
    of_a_function = matched(Gaussian(), a_function)
    assert np.isnan(of_a_function.strength)
    with pytest.raises(ValueError, match='a_function is a plain function'):
        of_a_function.scaled(2)
    again = matched(Uniform(), of_a_function)
    assert torch.allclose(sizes(again(net, x, y), x), sizes(a_function(net, x, y), x), rtol=1e-5)


def test_bounds_of_a_matched_noise(net, batch):
    x, y = batch
    assert matched(Gaussian(), FGSM(bounds=(0, 255))).bounds == (0, 255) == matched(Salt(bounds=(0, 255)), FGSM()).bounds
    assert matched(Gaussian(bounds=None), a_function).bounds is None
    with pytest.raises(ValueError, match='give both the same'):
        matched(Gaussian(bounds=(-1, 1)), FGSM(bounds=None))
    wide = named(matched(Gaussian(), PGD(0.2, steps=2)), bounds=(-1, 1))['Gaussian as PGD-2']
    x_pert, x_adv = wide(net, 2 * x - 1, y), PGD(0.2, steps=2, bounds=(-1, 1))(net, 2 * x - 1, y)
    assert torch.allclose(sizes(x_pert, 2 * x - 1), sizes(x_adv, 2 * x - 1), rtol=1e-5)
    assert -1 <= x_pert.min() < -0.99 and 0.99 < x_pert.max() <= 1


def test_tabular_and_unbounded_inputs():
    with seeded(0):
        net, x = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 2)), 30 * torch.randn(20, 2)
    y = (x[:, 0] > 0).long()
    for noise in (Gaussian(), Uniform(), Speckle()):
        (fair,) = named(matched(noise, PGD(5.0, steps=3)), bounds=None).values()
        wanted = sizes(PGD(5.0, steps=3, bounds=None)(net, x, y), x)
        assert torch.allclose(sizes(fair(net, x, y), x), wanted, rtol=1e-4)
    with pytest.raises(ValueError, match='height, width'):
        matched(Blur(), a_function)(net, x.abs() / x.abs().max(), y)
    line = torch.rand(7)
    assert matched(Gaussian(), lambda m, x, y: x * 0.9)(nn.Flatten(), line, y[:7]).shape == (7,)


def test_inside_an_evaluation_and_a_profile(net, batch):
    fair = [PGD(0.1, steps=2), matched(Gaussian(), PGD(0.1, steps=2)), matched(Salt(), a_function)]
    table = evaluate(net, batch, fair, show_progress=False).table()
    assert table.attack.tolist() == ['clean', 'PGD-2', 'Gaussian as PGD-2', 'Salt as a_function']
    table = evaluate(net, batch, fair[:2], eps=[0.05, 0.1], show_progress=False).table()
    assert table.eps.tolist() == [0, 0.05, 0.1, 0.05, 0.1]
    profile = layer_sustainability(net, batch, fair, batch_size=5, show_progress=False)
    change = profile.dataset['input_change']
    assert np.allclose(change[0], change[1], rtol=1e-4)


def test_what_cannot_be_matched():
    for wrong in (lambda: matched(FGSM(), Gaussian()), lambda: matched(Gaussian, FGSM()), lambda: matched(Gaussian(), FGSM)):
        with pytest.raises(TypeError, match='argument is'):
            wrong()


# ---------------------------------------------------------------------------------------------------------- settings


def keyword_one(model, x, y, *, k=1):
    return x + k


def keyword_two(model, x, y, *, k=2):
    return x + k


class Adding:
    def __init__(self, amount):
        self.amount = amount

    def __call__(self, model, x, y):
        return x + self.amount

    def method(self, model, x, y):
        return x + self.amount


AMOUNT = 0.1


def deep(x):
    return [x + AMOUNT for _ in range(1)][0]


def reads_a_global(model, x, y):
    return deep(x)


def even(model, x, y):
    return x if y == 0 else odd(model, x, y - 1)


def odd(model, x, y):
    return even(model, x, y)


def test_settings_tell_functions_apart(monkeypatch):
    keyword_two.__qualname__ = keyword_one.__qualname__
    assert settings_of(keyword_one) != settings_of(keyword_two), 'keyword defaults count'
    makes = Adding, lambda a: Adding(a).method, lambda a: partial(Adding(a)), lambda a: partial(keyword_one, k=a)
    for make in makes:
        assert settings_of(make(1)) == settings_of(make(1)) != settings_of(make(2))
    before = settings_of(reads_a_global)
    assert before == settings_of(reads_a_global)
    monkeypatch.setitem(globals(), 'AMOUNT', 0.2)
    assert settings_of(reads_a_global) != before, 'a global number, read by a function of the same file'


def test_settings_tell_classes_of_your_own_apart():
    def make(sign):
        @dataclass(frozen=True)
        class Mine(Perturbation):
            eps: float = 0.1

            if sign > 0:
                def __call__(self, model, x, y, ids=None):
                    return x + self.eps
            else:
                def __call__(self, model, x, y, ids=None):
                    return x - self.eps

        return Mine()

    assert settings_of(make(1)) == settings_of(make(1)) != settings_of(make(-1))
    assert 'code' not in settings_of(Gaussian(0.1))


def test_settings_of_what_refers_to_itself():
    def makes():
        def a(model, x, y):
            return b

        def b(model, x, y):
            return a

        return a

    def unbound():
        def a(model, x, y):
            return later

        if a is None:
            later = 1
        return a

    loop, own = [1], Adding(1)
    loop.append(loop)
    own.me = own
    for strange in (makes(), unbound(), even, own, partial(keyword_one, k=loop), len, torch.sign):
        assert settings_of(strange) == settings_of(strange)
        json.dumps(settings_of(strange))


@pytest.mark.parametrize('value', [
    np.float32(0.5), np.int64(3), np.array(['a', None], dtype=object), np.zeros((2, 3)), {3, 1}, frozenset('ab'), int,
    float('nan'), torch.empty(0), torch.tensor(1.0), torch.zeros(2, dtype=torch.bool), torch.zeros(4)[::2],
    torch.zeros(3, dtype=torch.bfloat16), np.longdouble(0.1), np.ones(2, np.longdouble), np.arange(3)[::-1],
    np.arange(3, dtype='>i4'), np.broadcast_to(1.0, 3), torch.tensor([1j]).conj(), torch.tensor([1j]).conj().imag,
    torch.eye(2).to_sparse(), torch.ones(2, device='meta'), torch.ones(2, requires_grad=True), {keyword_one: 1},
])
def test_settings_of_any_value_are_plain(value):
    assert json.dumps(settings_of(partial(keyword_one, k=value)))


@pytest.mark.parametrize('one, other', [
    (np.arange(3), np.arange(3)[::-1]), (np.arange(3, dtype='>i4'), np.arange(3, dtype='<i4')), (np.zeros(2), np.zeros((1, 2))),
    (torch.tensor([1j]), torch.tensor([1j]).conj()), (torch.eye(2).to_sparse(), 2 * torch.eye(2).to_sparse()),
    (np.longdouble(1), np.longdouble(2)),
])
def test_settings_tell_arrays_apart(one, other):
    of = [settings_of(partial(keyword_one, k=value)) for value in (one, other, copy.deepcopy(one))]
    assert of[0] != of[1] and of[0] == of[2]


def test_settings_tell_the_order_of_arguments():
    "Compiled code knows arguments by their places; a caller may know them by their names."
    def minus(x, y):
        return x - y

    def other(y, x):
        return y - x

    other.__qualname__ = minus.__qualname__
    assert minus.__code__.co_code == other.__code__.co_code and settings_of(minus) != settings_of(other)


def test_a_set_in_the_code_has_no_order():
    "The order of a set of words is another in each process."
    from robustnb.noises import _constants

    def among(model, x, y):
        return x if y in {'b', 'a', 'c'} else y

    assert ["'a'", "'b'", "'c'"] in _constants(among.__code__)


def test_bounds_of_tensors_can_be_matched():
    low, high = torch.zeros(8), torch.ones(8)
    together = matched(Gaussian(bounds=(low, high)), PGD(0.1, bounds=(low.clone(), high)))
    assert together.bounds[0] is low
    with pytest.raises(ValueError, match='give both the same'):
        matched(Gaussian(bounds=(low, high)), PGD(0.1, bounds=(low - 1, high)))
