"""Gaussian weights: draws and divergences against torch.distributions, and everything else that a network must still do."""

import copy
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from interruptions import stop_at
from masked_nets import Sum
from torch import nn
from torch.distributions import Normal, kl_divergence

from robustnb.attacks import PGD
from robustnb.bayesian import Ensemble, WeightPrior, gaussian_weights, mean_weights, one_draw, weight_kl, weight_mode
from robustnb.checkpoints import load_state
from robustnb.data import Batch, DataSet
from robustnb.defences import TRADES
from robustnb.devices import sample_normal, seeded
from robustnb.evaluation import accuracy
from robustnb.guard import Normalized
from robustnb.layerwise import LayerRegularizer
from robustnb.models import build, load, save
from robustnb.slimming import slim
from robustnb.training import Adversarial, fit

QUIET = {'show_progress': False, 'batch_size': 12}


def make_net():
    with seeded(0):
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 12), nn.ReLU(),
                             nn.Linear(12, 2))  # fmt: skip


def make_data(n: int = 60) -> DataSet:
    x = torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return DataSet(x, (x.flatten(1).mean(1) > 0.5).long(), ('dark', 'bright'))


def spread(model, seed=0):
    "Standard deviations of all sizes."
    with seeded(seed), torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith('.rho'):
                p.normal_(-2, 1.5)
    return model


def rhos(model):
    return [(name, p) for name, p in model.named_parameters() if name.endswith('.rho')]


def own(plain):
    "The parameters of the layers that have weights."
    return [p for m in plain.modules() if isinstance(m, nn.Conv2d | nn.Linear) for p in m.parameters()]


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_draw_is_the_literal_one():
    x, net = torch.rand(5, 6), spread(gaussian_weights(nn.Sequential(nn.Linear(6, 3))))
    linear = net[0].parametrizations
    with seeded(4):
        found = net(x)
    with seeded(4):
        parts = {}
        for name in ('weight', 'bias'):
            mean, rho = linear[name].original.detach().numpy(), linear[name][0].rho.detach().numpy()
            parts[name] = mean + np.log1p(np.exp(rho)) * torch.randn(mean.shape).numpy()
    np.testing.assert_allclose(found.detach().numpy(), x.numpy() @ parts['weight'].T + parts['bias'], rtol=1e-5, atol=1e-6)


def test_draws_have_the_mean_and_the_spread_that_they_should():
    net = spread(gaussian_weights(nn.Sequential(nn.Linear(4, 3))))
    with seeded(1), torch.no_grad():
        draws = torch.stack([net[0].weight for _ in range(4000)])
    each = net[0].parametrizations.weight
    std = F.softplus(each[0].rho.detach())
    assert ((draws.mean(0) - each.original).abs() < 5 * std / math.sqrt(4000)).all()
    torch.testing.assert_close(draws.std(0), std, rtol=0.06, atol=0)


@pytest.mark.parametrize('prior', [0.1, 1.0, 3.0])
def test_the_divergence_is_that_of_torch(prior):
    net = spread(gaussian_weights(make_net().double(), prior=prior))
    total, layers = 0, 0
    for module in net.modules():
        for each in getattr(module, 'parametrizations', {}).values():
            posterior = Normal(each.original, F.softplus(each[0].rho))
            total, layers = total + kl_divergence(posterior, Normal(0.0 * each.original, prior)).sum(), layers + 1
    assert layers == 6 and weight_kl(net).item() == pytest.approx(total.item(), rel=1e-12)
    found, expected = (torch.autograd.grad(of, [*net.parameters()], allow_unused=True) for of in (weight_kl(net), total))
    for (name, _), a, b in zip(net.named_parameters(), found, expected, strict=True):
        assert (a is None) == name.startswith('1.'), 'the term has to reach every layer'
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_the_divergence_is_zero_where_both_are_the_same_and_finite_at_the_ends():
    net = gaussian_weights(make_net(), start=math.log(math.expm1(0.3)), prior=0.3)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name.endswith('original'):
                p.zero_()
    assert weight_kl(net).item() == pytest.approx(0, abs=1e-3)
    for start in (-500.0, -30.0, -20.0, 30.0):
        far = gaussian_weights(make_net(), start=start)
        kl = weight_kl(far)
        kl.backward()
        assert kl.isfinite() and all(p.grad.isfinite().all() for n, p in far.named_parameters() if '0.rho' in n)
    near, other = (weight_kl(gaussian_weights(make_net().double(), start=s)).item() for s in (-20.0 + 1e-9, -20.0 - 1e-9))
    assert near == pytest.approx(other, rel=1e-6) and weight_kl(gaussian_weights(make_net().half())).dtype == torch.float32


def test_gradients_of_a_pass_are_those_by_hand():
    "d loss / d mean is that of the drawn weight, and d loss / d rho is that times the noise times sigmoid(rho)."
    net, x = spread(gaussian_weights(nn.Sequential(nn.Linear(6, 3)).double())), torch.rand(5, 6).double()
    each = net[0].parametrizations.weight
    with one_draw(net):
        noise = each[0].noise
        weight = (each.original + F.softplus(each[0].rho) * noise).detach().requires_grad_()
        bias = net[0].bias.detach()
        found = torch.autograd.grad(net(x).square().sum(), [each.original, each[0].rho])
    slope, = torch.autograd.grad((x @ weight.T + bias).square().sum(), weight)
    torch.testing.assert_close(found[0], slope)
    torch.testing.assert_close(found[1], slope * noise * torch.sigmoid(each[0].rho))


def test_evaluation_is_that_of_the_means():
    net, x = make_net().eval(), make_data().x
    before = state(net)
    bayesian = spread(gaussian_weights(net))
    with torch.no_grad():
        assert torch.equal(bayesian(x), net(x)) and torch.equal(bayesian(x), bayesian(x)) and same(before, state(net))
        with weight_mode(bayesian, 'sample'):
            assert not torch.equal(bayesian(x), bayesian(x))
        with weight_mode(bayesian.train(), 'mean'):
            assert torch.equal(bayesian(x), bayesian(x))
        assert not torch.equal(bayesian(x), bayesian(x))


def test_nothing_is_drawn_before_it_is_needed():
    before = torch.get_rng_state()
    net = gaussian_weights(make_net())
    weight_kl(net), mean_weights(net), copy.deepcopy(net), Ensemble(net)
    net.eval()(make_data(2).x), Ensemble(net)(make_data(2).x)
    assert torch.equal(before, torch.get_rng_state())


def test_modes_come_back():
    net, x = gaussian_weights(make_net()).eval(), make_data(3).x
    with pytest.raises(RuntimeError), weight_mode(net, 'sample'), one_draw(net):
        first = net(x)
        with one_draw(net):
            assert not torch.equal(net(x), first)
        assert torch.equal(net(x), first)
        with weight_mode(net, 'mean'):
            assert torch.equal(net(x), mean_weights(net)(x))
        raise RuntimeError
    assert torch.equal(net(x), net(x)) and net[0].parametrizations.weight[0].noise is None
    with pytest.raises(ValueError, match="'sample' or 'mean', or None; got 'off'"), weight_mode(net, 'off'):
        pass
    with pytest.raises(ValueError, match='no Gaussian weights'), one_draw(make_net()):
        pass


@pytest.mark.parametrize('make', [make_net, lambda: Normalized(make_net(), 0.5, 0.5), Sum,
                                  lambda: nn.Sequential(nn.ConvTranspose2d(1, 3, 2, bias=False), nn.Conv2d(3, 2, 1))])
def test_means_copies_and_files(make, tmp_path):
    with seeded(3):
        net = make().eval()
    bayesian, x = spread(gaussian_weights(net)), torch.rand(3, 1, 8, 8)
    twin = copy.deepcopy(bayesian)
    before = state(bayesian)
    plain = mean_weights(bayesian)
    assert same(state(plain), state(net)) and not any(hasattr(m, 'parametrizations') for m in plain.modules())
    assert [type(m) for m in plain.modules()] == [type(m) for m in net.modules()]
    with torch.no_grad():
        assert torch.equal(plain(x), bayesian(x)) and torch.equal(plain(x), twin(x)), 'the original still works'
        assert same(before, state(bayesian))
        next(plain.parameters()).add_(1)
        assert same(before, state(bayesian)) and same(before, state(twin))
    save(bayesian, tmp_path / 'net.safetensors')
    again = load(gaussian_weights(net), tmp_path / 'net.safetensors')
    assert same(before, state(again))
    slim(plain) if not isinstance(net, nn.Sequential) else None


def test_chosen_layers_and_frozen_weights():
    net = make_net()
    net[4].bias.requires_grad_(False)
    bayesian = gaussian_weights(net, where='4')
    found = [name for name, _ in bayesian.named_parameters() if name.endswith('rho')]
    assert found == ['4.parametrizations.weight.0.rho', '4.parametrizations.bias.0.rho']
    assert not bayesian[4].parametrizations.bias[0].rho.requires_grad and bayesian[4].parametrizations.weight[0].rho.requires_grad
    net[0].eval()
    frozen = gaussian_weights(net)
    assert not frozen[0].parametrizations.weight[0].training and frozen[4].parametrizations.weight[0].training


# --------------------------------------------------------------------------------------------------------- training


AT_BNN = Adversarial(PGD(0.1, steps=1), clean_weight=1 / 3, regularizers=WeightPrior(60, 0.01))


def test_the_published_loss_by_hand():
    net, data = gaussian_weights(make_net()), make_data(12)
    batch = Batch(data.x, data.y, torch.arange(12))
    with seeded(7):
        found = AT_BNN.loss(copy.deepcopy(net), batch, 0)  # batch normalisation counts, and the attack sees it
    with seeded(7):
        x_adv = AT_BNN.perturbed(net, batch, 0)
        assert torch.equal(x_adv, PGD(0.1, steps=1)(mean_weights(net), batch.x, batch.y)), 'it attacks the means'
        attacked, clean = F.cross_entropy(net(x_adv), batch.y), F.cross_entropy(net(batch.x), batch.y)
    assert found.item() == pytest.approx(((clean + 2 * attacked) / 3 + weight_kl(net) / 6000).item(), rel=1e-6)


def test_draws_of_a_step():
    "Two passes, two draws; those that are compared share theirs, or can be made to."
    net, data = gaussian_weights(make_net(), start=0.0).eval(), make_data(12)
    batch = Batch(data.x, data.y, torch.arange(12))

    class Still(PGD):
        def __call__(self, model, x, y, ids=None):
            return x.clone()

    trades = TRADES(Still(0.1, steps=1, loss='kl'), beta=1.0)
    with weight_mode(net, 'sample'), torch.no_grad():
        assert (net(batch.x) - net(batch.x)).abs().max() > 0.1
        assert LayerRegularizer('2')(net, batch, batch.x.clone(), 0) == 0
        with one_draw(net):
            expected = F.cross_entropy(net(batch.x), batch.y)
            assert trades.loss(net, batch, 0).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize('every', [None, 3])
def test_an_interruption_leaves_no_trace(every, monkeypatch, tmp_path):
    settings = {'epochs': 3, 'every': every, 'optimizer': partial(torch.optim.Adam, lr=0.01)} | QUIET
    net, path = gaussian_weights(make_net()), tmp_path / 'run.safetensors'
    before = state(net)
    straight = fit(net, make_data(), AT_BNN, **settings)
    assert same(before, state(net)), 'the model was changed'
    assert straight.history[-1]['loss'] < straight.history[0]['loss']
    assert all(not torch.equal(a, b) for a, b in zip(before.values(), state(straight.model).values(), strict=True))
    with monkeypatch.context() as patch:
        stop_at(patch, 8)
        assert fit(net, make_data(), AT_BNN, checkpoint=path, **settings).interrupted
    again = fit(net, make_data(), AT_BNN, checkpoint=path, **settings)
    assert load_state(path)['step'] == 15 and again.history[-1]['loss'] == straight.history[-1]['loss']
    assert same(state(straight.model), state(again.model))


def test_the_prior_pulls():
    settings = {'epochs': 3, 'optimizer': partial(torch.optim.SGD, lr=0.01)} | QUIET
    net = gaussian_weights(make_net(), start=-4.0)
    weak, strong = (fit(net, make_data(), Adversarial(PGD(0.1, steps=1), regularizers=WeightPrior(60, factor)), **settings).model
                    for factor in (0.0, 1.0))  # fmt: skip
    assert weight_kl(strong) < weight_kl(weak)


# ---------------------------------------------------------------------------------------------------------- attacks


def test_attacks_on_means_and_on_draws_leave_the_network_alone():
    net, data = spread(gaussian_weights(make_net())), make_data(20)
    before, modes = state(net), [m.training for m in net.modules()]
    on_means = PGD(0.1, steps=5)(net, data.x, data.y)
    assert torch.equal(on_means, PGD(0.1, steps=5)(mean_weights(net), data.x, data.y))
    many = Ensemble(net, 4)
    found = PGD(0.1, steps=5).run(many, data.x, data.y)
    assert (found.x_adv - data.x).abs().max() <= 0.1 + 1e-6 and not torch.equal(found.x_adv, on_means)
    with torch.no_grad():
        losses = [F.cross_entropy(many.eval()(x), data.y) for x in (data.x, found.x_adv)]
    assert losses[1] > losses[0] and found.loss.mean().item() == pytest.approx(losses[1].item(), rel=1e-5)
    net.train(), many.train()
    assert same(before, state(net)) and modes == [m.training for m in net.modules()]
    assert all(each[0].mode is None for m in net.modules() for each in getattr(m, 'parametrizations', {}).values())


def test_an_ensemble_is_the_mean_of_its_draws():
    net, x = spread(gaussian_weights(make_net())).eval(), make_data(9).x
    expected = 0
    for draw in range(6):
        plain = mean_weights(net)
        for number, (p, (_, rho)) in enumerate(zip(own(plain), rhos(net), strict=True)):
            p.data += F.softplus(rho.detach()) * sample_normal(p.shape, torch.tensor([number]), 5, 10**6 + draw)[0]
        expected = expected + plain(x).detach().softmax(1) / 6
    ensemble = Ensemble(net, 6, seed=5)
    with torch.no_grad():
        torch.testing.assert_close(ensemble(x).exp(), expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(ensemble(x), ensemble(x)) and not torch.equal(ensemble(x), Ensemble(net, 6, seed=6)(x))
        torch.testing.assert_close(torch.cat([ensemble(part) for part in x.split(2)]), ensemble(x), rtol=1e-4, atol=1e-5)
    assert 0 <= accuracy(ensemble, make_data()) <= 1


def test_a_single_logit():
    with seeded(0):
        net = gaussian_weights(nn.Sequential(nn.Flatten(), nn.Linear(64, 1)), start=-60.0).eval()
    x = make_data(9).x
    with torch.no_grad():
        p = Ensemble(net, 3)(x).exp()
        torch.testing.assert_close(p[:, 1], torch.sigmoid(net(x))[:, 0]), torch.testing.assert_close(p.sum(1), torch.ones(9))


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize('wrong, match', [
    ({'start': None}, 'start is rho'), ({'start': math.inf}, 'start is rho'), ({'prior': 0}, 'prior is a standard deviation'),
    ({'prior': -1.0}, 'prior is a'), ({'prior': math.nan}, 'prior is a'), ({'where': 'activations'}, 'no Gaussian weights'),
])  # fmt: skip
def test_settings_that_mean_nothing(wrong, match):
    with pytest.raises(ValueError, match=match):
        gaussian_weights(make_net(), **wrong)


def test_weights_of_which_no_distribution_can_be_made():
    with pytest.raises(ValueError, match='computed anew in each pass already'):
        gaussian_weights(gaussian_weights(make_net()))
    with pytest.raises(ValueError, match='computed anew'):
        gaussian_weights(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))))
    tied = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    tied[2].weight = tied[0].weight
    with pytest.raises(ValueError, match='0 shares its weights'):
        gaussian_weights(tied)
    for use in (weight_kl, mean_weights, Ensemble):
        with pytest.raises(ValueError, match='no Gaussian weights'):
            use(make_net())
    assert build('digits_cnn', 0) is not None


@pytest.mark.parametrize('samples, factor', [(0, 1), (2.5, 1), (True, 1), (10, -1), (10, math.inf), (10, None)])
def test_priors_that_mean_nothing(samples, factor):
    with pytest.raises(ValueError, match='samples is|factor is'):
        WeightPrior(samples, factor)


@pytest.mark.parametrize('draws', [0, 1.5, True, None])
def test_ensembles_of_nothing(draws):
    with pytest.raises(ValueError, match='draws is a whole number'):
        Ensemble(gaussian_weights(make_net()), draws)
