"""Learned dropout against integrals and a literal form of it, and masks in networks of all kinds."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from masked_nets import NETS, mlp
from scipy import integrate, special
from torch import nn
from xla_process import checks_of, outcomes, run_checks

from robustnb import training
from robustnb.data import digits
from robustnb.devices import fallback_ops, pick_device, seeded, sync
from robustnb.dropout import (
    MODES,
    BetaBernoulliDropout,
    _divergence,
    _mean_keep,
    _relaxed,
    insert_masks,
    kept_units,
    mask_groups,
    mask_kl,
    mask_mode,
    paired,
)
from robustnb.guard import Normalized
from robustnb.models import build, load, save
from robustnb.training import fit

NUMBERS = [(a, b) for a in (0.05, 0.3, 1.0, 2.5, 9.0) for b in (0.3, 1.0, 4.0)]


def kumaraswamy(a, b):
    "Its log density at log pi = -t, as a function of t, times pi: the integral over t has no pole."
    return lambda t: math.log(a * b) - a * t + (b - 1) * math.log(-math.expm1(-a * t))


@pytest.mark.parametrize('a, b', NUMBERS)
def test_divergence_and_mean_are_integrals(a, b):
    alpha, log_q = 1e-2, kumaraswamy(a, b)  # log q(pi) + log pi

    def terms(s):  # t = s / a, and the prior is alpha pi^(alpha - 1)
        t = s / a
        return math.exp(log_q(t)) / a * (log_q(t) - math.log(alpha) + alpha * t)

    found = sum(integrate.quad(terms, *ends, limit=400)[0] for ends in ((0, 1e-3), (1e-3, 1), (1, 60)))
    mean = sum(integrate.quad(lambda s: math.exp(log_q(s / a) - s / a) / a, *ends, limit=400)[0] for ends in ((0, 1), (1, 60)))
    pair = torch.tensor([a, b], dtype=torch.float64)
    assert _divergence(*pair, alpha).item() == pytest.approx(found, rel=2e-3, abs=2e-4)
    assert _mean_keep(*pair).item() == pytest.approx(mean, rel=2e-3)
    assert _mean_keep(*pair).item() == pytest.approx(b * special.beta(1 + 1 / a, b), rel=1e-9)


def test_divergence_is_never_below_zero_and_zero_at_the_prior():
    a, b = (grid.flatten() for grid in torch.meshgrid(*[torch.logspace(-4, 1, 60).double()] * 2, indexing='ij'))
    assert _divergence(a, b, 1e-4).min() > -1e-9
    assert _divergence(torch.tensor(1e-4).double(), torch.tensor(1.0).double(), 1e-4).abs() < 1e-9


@pytest.mark.parametrize('a, b', NUMBERS)
def test_masks_are_those_of_the_plain_formula(a, b):
    a, b = torch.full((7,), a).double(), torch.full((7,), b).double()
    with seeded(3):
        found = _relaxed(a, b, 5, 0.1)
    with seeded(3):
        u, v = torch.rand_like(a), torch.rand(5, 7, dtype=torch.float64)
    pi = (1 - u ** (1 / b)) ** (1 / a)
    coin = torch.log(v / (1 - v)) + torch.log(pi / (1 - pi))
    torch.testing.assert_close(found, torch.sigmoid(coin / 0.1), rtol=1e-5, atol=1e-9)


def test_everything_is_finite_at_the_ends():
    layer = BetaBernoulliDropout(9 * 7)
    ends = torch.meshgrid(
        torch.tensor([-1e6, -10, -7, -3, 0, 3, 8, 20, 80.0]), torch.tensor([-1e6, -10, -1, 0, 3, 50, 1e6]), indexing='ij'
    )
    with torch.no_grad():
        for raw, values in zip((layer.a_raw, layer.b_raw), ends, strict=True):
            raw.copy_(values.flatten())
    for seed in range(30):
        layer.zero_grad()
        with seeded(seed):
            z = layer(torch.ones(4, 63))
        (z.sum() + layer.kl() + layer.keep.sum()).backward()
        assert ((z >= 0) & (z <= 1)).all() and layer.kl().isfinite()
        assert layer.a_raw.grad.isfinite().all() and layer.b_raw.grad.isfinite().all()


def test_masks_keep_units_as_often_as_they_say():
    with seeded(0):
        layer = BetaBernoulliDropout(60, start=0.4)
        with torch.no_grad():
            layer.a_raw.uniform_(-2, 3), layer.b_raw.uniform_(-1, 2)
        drawn = torch.stack([layer.mask(4) for _ in range(3000)]).detach()
    # A little off: the relaxed coin is no coin.
    assert (drawn.mean((0, 1)) - layer.keep.detach()).abs().max() < 0.04
    assert ((drawn < 0.02) | (drawn > 0.98)).float().mean() > 0.75
    within, across = drawn[0].std(0), drawn.mean(1).std(0)
    assert within.shape == across.shape and not torch.equal(drawn[0, 0], drawn[0, 1]), 'each sample has a coin of its own'


def test_modes():
    layer, x = BetaBernoulliDropout(4, start=0.5), torch.rand(6, 4, 3, 3)
    with torch.no_grad():
        layer.a_raw[0] = -9.0
    keep = layer.keep
    assert layer.alive.tolist() == [False, True, True, True]
    expected = {
        'mean': torch.where(keep > 1e-3, keep, 0), 'hard': torch.tensor([0.0, 1, 1, 1]), 'off': torch.ones(4),
    }  # fmt: skip
    for learning in (True, False):
        layer.train(learning)
        for mode, mask in expected.items():
            layer.mode = mode
            torch.testing.assert_close(layer(x), x * mask[:, None, None])
        layer.mode = 'sample'
        assert not torch.equal(layer(x), layer(x))
    layer.mode = None
    assert torch.equal(layer.eval()(x), layer(x)) and not torch.equal(layer.train()(x), layer(x))


def test_half_precision_stays_half():
    layer, x = BetaBernoulliDropout(4), torch.rand(6, 4).bfloat16()
    assert layer(x).dtype == layer.eval()(x).dtype == torch.bfloat16
    with torch.autocast('cpu', torch.bfloat16):
        assert layer.train().mask(6).dtype == torch.float32 and layer.kl().dtype == torch.float32


@pytest.mark.parametrize('name', [pytest.param(n, marks=[pytest.mark.slow] * n.endswith(('vit', 'vgg11'))) for n in NETS])
def test_where_masks_stand(name):
    make, shape, expected = NETS[name]
    model, x = make().eval(), torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    masked = insert_masks(model, x)
    hosts = list(dict.fromkeys(kept_units(masked)['layer']))
    assert hosts == expected
    assert all(name.endswith(('.mask.a_raw', '.mask.b_raw')) for name in masked.state_dict().keys() - model.state_dict().keys())
    with torch.no_grad(), mask_mode(masked, 'off'):
        torch.testing.assert_close(masked(x), model(x), rtol=0, atol=0)
    for host in hosts if len(hosts) < 9 else hosts[::5]:
        assert_gone(masked, host, x)


def assert_gone(masked, host, x):
    "Where a unit is off, all that the first weights behind it read of it is zero."
    weighted = [m for m in masked.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    mask = masked.get_submodule(host).mask

    def inputs():
        seen, hooks = [], []
        for module in weighted:
            hooks.append(module.register_forward_pre_hook(lambda module, args: seen.append((id(module), args[0].clone()))))
        with torch.no_grad():
            masked(x)
        for hook in hooks:
            hook.remove()
        return seen

    before = mask.a_raw.data.clone()
    with mask_mode(masked, 'hard'):
        whole = inputs()
        for unit in (0, len(before) - 1):
            mask.a_raw.data[unit] = -20.0
            part = inputs()
            mask.a_raw.data.copy_(before)
            readers = next(([a, b] for (_, a), (_, b) in zip(whole, part, strict=True) if not torch.equal(a, b)), None)
            if readers is not None:  # else the unit was silent before
                changed = readers[0] != readers[1]
                assert (readers[1][changed] == 0).all()


def test_a_wrapped_network_and_a_place_by_name():
    model = Normalized(mlp(), [0.5], [0.5])
    masked = insert_masks(model, torch.rand(3, 1, 8, 8), where=['0', '1'], start=0.9, threshold=0.1)
    table = kept_units(masked)
    assert table.groupby('layer', sort=False).size().to_dict() == {'0': 64, '1': 12}
    assert table['keep'].to_numpy() == pytest.approx(0.9) and type(masked) is Normalized
    assert masked.model[1].mask.threshold == 0.1 if hasattr(masked, 'model') else True


def test_masks_before_a_normalisation():
    with seeded(0):
        model = nn.Sequential(nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(180, 4))
        model[1].running_mean.normal_(), model[1].bias.data.normal_()
        x = torch.rand(6, 1, 8, 8)
    masked = insert_masks(model, x, where=['0']).eval()
    mask = masked[0].mask
    mask.a_raw.data[1:3] = -20.0
    kept = mask(torch.ones(1, 5, 1, 1)).detach()
    assert kept.flatten()[1:3].tolist() == [0, 0] and (kept.flatten()[[0, 3, 4]] > 0.5).all()
    model.eval()
    with torch.no_grad():
        expected = model[2:](model[1](kept * model[0](x)))
        torch.testing.assert_close(masked(x), expected)
        assert (model[1](kept * model[0](x))[:, 1] != 0).all()  # what is off before it is a constant behind it, not nothing


def test_units_of_tokens_and_of_sequences():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.act, self.down = nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 3)

        def forward(self, x):
            return self.down(self.act(self.up(x))).mean(1)

    masked = insert_masks(Tokens(), torch.rand(2, 5, 6))
    assert len(kept_units(masked)) == 10 and masked(torch.rand(4, 5, 6)).shape == (4, 3)
    series = nn.Sequential(nn.Conv1d(2, 7, 3), nn.ReLU(), nn.Flatten(), nn.Linear(42, 3))
    assert len(kept_units(insert_masks(series, torch.rand(2, 2, 8), where='1', dim=1))) == 7


def test_pairs_share_their_masks():
    masked, x = insert_masks(mlp(), torch.rand(2, 1, 8, 8)).train(), torch.rand(6, 1, 8, 8)
    with paired(masked):
        one, two = masked(torch.cat([x, x])).chunk(2)
        assert torch.equal(one, two) and not torch.equal(one[0], masked(torch.cat([x, x]))[0])
        with paired(masked, 3), pytest.raises(ValueError, match='3 copies'):
            masked(x[:4])
        assert masked[2].mask.copies == 2
    assert masked[2].mask.copies == 1
    with pytest.raises(RuntimeError), mask_mode(masked, 'off'):
        raise RuntimeError
    assert masked[2].mask.mode is None


class Pruning:
    def groups(self, model):
        return mask_groups(model)

    def loss(self, model, batch, step):
        return F.cross_entropy(model(batch.x), batch.y) + mask_kl(model) / 100


RATES = {'weights': lambda p: torch.optim.Adam(p, 1e-3), 'masks': lambda p: torch.optim.Adam(p, 0.1)}


def test_training_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    data = digits(8).train[:200]
    masked = insert_masks(build('digits_cnn', 0), data.x[:2])
    how = {'optimizer': RATES, 'batch_size': 50, 'epochs': 4, 'show_progress': False}
    whole = fit(masked, data, Pruning(), **how).model
    path = tmp_path / 'run.safetensors'
    calls, descend = [], training._descend

    def impatient(*args):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return descend(*args)

    with monkeypatch.context() as patch:
        patch.setattr(training, '_descend', impatient)
        assert fit(masked, data, Pruning(), **how, checkpoint=path, every=3).interrupted
    again = fit(masked, data, Pruning(), **how, checkpoint=path, every=3).model
    for one, two in zip(whole.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(one, two)
    assert kept_units(whole)['keep'].max() < 0.75, 'the divergence pulls all units down'
    save(whole, tmp_path / 'net.safetensors')
    loaded = load(insert_masks(build('digits_cnn', 1), data.x[:2]), tmp_path / 'net.safetensors')
    assert torch.equal(loaded.eval()(data.x), whole.eval()(data.x))


def test_weights_and_masks_are_two_groups():
    masked = insert_masks(mlp(), torch.rand(2, 1, 8, 8))
    parts = mask_groups(masked)
    assert [len(group) for group in parts.values()] == [4, 2]
    assert {id(p) for group in parts.values() for p in group} == {id(p) for p in masked.parameters()}


@pytest.mark.parametrize(
    'wrong, words',
    [
        ({'units': 0}, 'from 1'), ({'units': 2.0}, 'whole number'), ({'start': 0.0}, 'between 0 and 1'),
        ({'start': 1}, 'between 0 and 1'), ({'prior': 0}, 'above 0'), ({'temperature': -1}, 'above 0'),
        ({'threshold': 1}, 'below 1'), ({'dim': 0}, 'dim=0 is the batch'), ({'start': math.nan}, 'between 0 and 1'),
    ],
)  # fmt: skip
def test_settings_that_mean_nothing(wrong, words):
    with pytest.raises(ValueError, match=words):
        BetaBernoulliDropout(**{'units': 3} | wrong)


def test_networks_that_take_no_masks():
    x = torch.rand(2, 1, 8, 8)
    masked = insert_masks(mlp(), x)
    with pytest.raises(ValueError, match='masks already, such as 2.mask'):
        insert_masks(masked, x)
    with pytest.raises(ValueError, match='no unit .* alone'):
        insert_masks(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), x)
    with pytest.raises(ValueError, match='chooses no layer'):
        insert_masks(mlp(), x, where='conv*')
    with pytest.raises(ValueError, match='called 0 times'):
        net = mlp()
        net.unused = nn.ReLU()
        net.forward = lambda x: net[3](net[2](net[1](net[0](x))))
        insert_masks(net, x, where='unused')

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.mask = nn.Linear(64, 4), None

        def forward(self, x):
            return self.fc(x.flatten(1)) if x.sum() > 0 else x

    with pytest.raises(ValueError, match='cannot be followed .*where='):
        insert_masks(Branches(), x)
    assert len(kept_units(insert_masks(Branches(), x, where='fc'))) == 4
    for use in (mask_kl, mask_groups, kept_units):
        with pytest.raises(ValueError, match='has no masks'):
            use(mlp())
    with pytest.raises(ValueError, match='one of sample, mean, hard, off'), mask_mode(masked, 'soft'):
        pass
    with pytest.raises(ValueError, match='copies'), paired(masked, 0):
        pass
    with pytest.raises(ValueError, match='for 12 units'):
        masked[2].mask(torch.rand(2, 5))
    assert MODES == ('sample', 'mean', 'hard', 'off')


def check_xla_equals_the_cpu():
    model = insert_masks(mlp(), torch.rand(2, 1, 8, 8))
    x, there = torch.rand(6, 1, 8, 8), pick_device('xla')
    expected = model.eval()(x), mask_kl(model)
    moved = insert_masks(mlp().to(there), torch.rand(2, 1, 8, 8)).eval()
    sync(there)
    before = fallback_ops()
    found = moved(x.to(there)), mask_kl(moved)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.detach().cpu(), b.detach(), rtol=1e-4, atol=1e-4)
    loss = moved.train()(x.to(there)).square().sum() + mask_kl(moved)
    loss.backward()
    for parameter in moved.parameters():
        assert parameter.grad.cpu().isfinite().all()
    assert fallback_ops() == before, fallback_ops()


CHECKS = checks_of(globals(), __name__)


@pytest.mark.slow
@pytest.mark.parametrize('check', CHECKS)
def test_on_xla(check, tmp_path):
    found = outcomes(Path(__file__), [check], tmp_path)[check]
    assert not found, found


def test_the_seed_decides():
    masked, x = insert_masks(mlp(), torch.rand(2, 1, 8, 8)).train(), torch.rand(6, 1, 8, 8)
    found = []
    for seed in (1, 1, 2):
        with seeded(seed):
            found.append(masked(x).detach().numpy())
    assert np.array_equal(found[0], found[1]) and not np.array_equal(found[0], found[2])


if __name__ == '__main__':
    run_checks(CHECKS, *sys.argv[1:])
