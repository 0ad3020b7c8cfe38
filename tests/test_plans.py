"Defences by name: equal starts and budgets, what each one minimises, trainings that go on, and the published settings."

import copy
import logging
import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from robustnb import plans, training
from robustnb.attacks import PGD
from robustnb.bayesian import WeightPrior
from robustnb.data import DataSet
from robustnb.defences import TRADES
from robustnb.dropout import BetaBernoulliDropout
from robustnb.magnitudes import ADMM, weight_sparsity
from robustnb.plans import (
    DEFENCES,
    PLANS,
    DefencePlan,
    published_cifar_attack,
    shift_and_flip,
    standardised,
    train_method,
)
from robustnb.pruning import AdversarialPruning, Balanced, BayesianPruning
from robustnb.suppression import suppress
from robustnb.training import Adversarial, Ramped, Standard

PLAN = DefencePlan(eps=0.1, attack_steps=2, epochs=3, tuning_epochs=1, batch_size=16, ramp=0.5, clean_weight=0.25, beta=2.0)
PER_EPOCH, CUTS = 3, {'BP', 'ANP', 'ANP-VS', 'AT + magnitude'}
MASKED = {'BP', 'ANP', 'ANP-VS'}


def small(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8), nn.ReLU(),
                         nn.Linear(8, 3))


def data(n: int = 40, **settings) -> DataSet:
    draw = torch.Generator().manual_seed(0)
    x = torch.rand(n, 1, 6, 6, generator=draw)
    return DataSet(x, (x.mean((1, 2, 3)) * 30).long() % 3, **settings)


def learn(name: str, plan: DefencePlan = PLAN, start: nn.Module | None = None, train=None, **how):
    start, train = small() if start is None else start, data() if train is None else train
    return train_method(name, start, train, plan, show_progress=False, **how)


def bits(net: nn.Module) -> list:
    return [value.clone() for value in net.state_dict().values()]


def same_bits(a: nn.Module, b: nn.Module) -> bool:
    return len(bits(a)) == len(bits(b)) and all(map(torch.equal, bits(a), bits(b)))


@pytest.fixture
def steps():
    "All steps of all optimizers: which one, its learning rate, its decay."
    found = []
    hook = register_optimizer_step_post_hook(lambda optimizer, args, kwargs: found.append(
        (type(optimizer), optimizer.param_groups[0]['lr'], optimizer.param_groups[0]['weight_decay'])))
    yield found
    hook.remove()


@pytest.fixture
def fits(monkeypatch):
    "All calls of `fit`: model, data, objective, and the rest."
    found, real = [], plans.fit

    def watched(model, train, objective, *args, **kwargs):
        found.append((copy.deepcopy(model), train, objective, *args))
        return real(model, train, objective, *args, **kwargs)

    monkeypatch.setattr(plans, 'fit', watched)
    return found


def test_the_names_are_those_of_the_table():
    assert list(DEFENCES) == ['Standard', 'BP', 'AT', 'AT-VS', 'TRADES', 'ANP', 'ANP-VS', 'ADMM', 'AT-BNN', 'AT + magnitude']
    assert {name for name, method in DEFENCES.items() if method.cuts} == CUTS


@pytest.mark.parametrize('name', DEFENCES)
def test_each_method_takes_the_same_steps_and_gives_a_plain_network(name, steps):
    start = small().train()
    start[1].eval()
    start[0].weight.grad = torch.ones_like(start[0].weight)
    before, modes, noise = bits(start), [m.training for m in start.modules()], torch.get_rng_state()
    found = learn(name, start=start)
    net = found.model
    assert all(map(torch.equal, before, bits(start))) and modes == [m.training for m in start.modules()]
    assert (start[0].weight.grad == 1).all() and all(p.requires_grad for p in start.parameters())
    assert torch.equal(noise, torch.get_rng_state())
    assert not any(m.training or hasattr(m, 'parametrizations') or hasattr(m, 'mask') or m._forward_hooks
                   or isinstance(m, BetaBernoulliDropout) for m in net.modules())
    assert [type(m) for m in net.modules()] == [type(m) for m in start.modules()]
    assert torch.isfinite(net(data().x)).all() and not found.collapsed
    # The budget and the learning rate, over both stages.
    total = PLAN.epochs * PER_EPOCH
    rates = [1 - (step + 0.5) / total for step in range(total)]
    decay = 0.0 if name == 'AT-BNN' else PLAN.weight_decay
    assert {kind for kind, *_ in steps} == {torch.optim.Adam}
    masks = [lr for _, lr, own in steps if own == 0 and name in MASKED]
    weights = [lr for _, lr, own in steps if own == decay and not (own == 0 and name in MASKED)]
    assert len(weights) + len(masks) == len(steps)
    np.testing.assert_allclose(weights, [PLAN.lr * rate for rate in rates], rtol=1e-9)
    first = total - PER_EPOCH * PLAN.tuning_epochs
    np.testing.assert_allclose(masks, [PLAN.mask_lr * rate for rate in rates[:first]] if name in MASKED else [], rtol=1e-9)
    assert [entry['epoch'] for entry in found.history] == ([1, 2, 1] if name in CUTS else [1, 2, 3])
    assert [entry.get('stage', 1) for entry in found.history] == ([1, 1, 2] if name in CUTS else [1, 1, 1])
    assert len(found.table()) == 3 and repr(found) == f'Trained({name}, 3 epochs)'


ATTACK = PGD(0.1, 2, None, bounds=(0, 1))
GROWING = Ramped(ATTACK, round(0.5 * 9))  # the same for all, whether they cut or not


def expected(name: str) -> tuple:
    "Objectives of both stages, written out from the table."
    at, price = Adversarial(GROWING, 0.25), {'samples': 40, 'beta': 2.0, 'warm_up': 4}
    tuning = Adversarial(replace(ATTACK, seed=6), 0.25)  # its dice go on after the six steps of the first stage
    return {
        'Standard': (Standard(),),
        'BP': (BayesianPruning(**price), Standard()),
        'AT': (at,),
        'AT-VS': (replace(at, regularizers=suppress(0.5)),),
        'TRADES': (TRADES(Ramped(replace(ATTACK, loss='kl'), 4), 6.0),),
        'ANP': (AdversarialPruning(GROWING, clean_weight=0.25, **price), tuning),
        'ANP-VS': (AdversarialPruning(GROWING, clean_weight=0.25, suppression=suppress(0.5), **price),
                   replace(tuning, regularizers=suppress(0.5))),
        'ADMM': (at,),
        'AT-BNN': (replace(at, regularizers=WeightPrior(40, 0.01)),),
        'AT + magnitude': (at, tuning),
    }[name]


@pytest.mark.parametrize('name', DEFENCES)
def test_what_is_minimised_is_what_the_table_says(name, fits):
    learn(name, replace(PLAN, suppression=0.5))
    objectives = [call[2] for call in fits]
    if name == 'ADMM':
        admm = objectives[0]
        assert isinstance(admm, ADMM) and (admm.retrain_from, admm.sparsity, admm.every) == (4, 0.8, 1)
        objectives = [admm.objective]
    assert objectives == [*expected(name)]
    assert [call[3] for call in fits] == ([2, 1] if name in CUTS else [3]) and {call[4] for call in fits} == {16}
    if name in MASKED:
        keep = torch.cat([m.keep for m in fits[0][0].modules() if isinstance(m, BetaBernoulliDropout)])
        torch.testing.assert_close(keep, torch.full_like(keep, 0.75))


@pytest.mark.parametrize('name', ['AT-VS', 'ANP-VS'])
def test_without_a_number_the_term_has_its_weight_by_ratio(name, fits):
    learn(name, replace(PLAN, ratio=0.3, form='relative'))
    balanced = fits[0][2]
    assert isinstance(balanced, Balanced) and balanced.ratio == 0.3
    inner = balanced.objective
    assert (inner.regularizers if name == 'AT-VS' else inner.suppression) == suppress(1.0, 'relative')
    assert inner.attack == GROWING and inner.clean_weight == 0.25
    fits.clear()
    learn(name, replace(PLAN, suppression=0.0))
    assert not isinstance(fits[0][2], Balanced)  # nothing is a number as well


def test_without_a_ramp_all_is_there_at_once(fits):
    for name in ('AT', 'ANP'):
        learn(name, replace(PLAN, ramp=0.0))
    assert [call[2].attack for call in fits] == [ATTACK, ATTACK, replace(ATTACK, seed=6)] and fits[1][2].warm_up == 0


def test_each_seed_has_dice_of_its_own(fits):
    for seed in (0, 1, 7):
        learn('AT', seed=seed)
    seeds = [call[2].attack.attack.seed for call in fits]
    assert seeds[0] == 0 and min(b - a for a, b in zip(seeds, seeds[1:], strict=False)) > 100_000  # of steps that follow


def test_the_attack_of_training_knows_the_range_of_the_data(fits):
    learn('ANP', train=DataSet(data().x * 2 - 1, data().y, bounds=(-1, 1)))
    assert [getattr(call[2].attack, 'attack', call[2].attack).bounds for call in fits] == [(-1, 1)] * 2


SEEN = []


def noting(x):
    SEEN.append(len(x))
    return x.flip(-1)


@pytest.mark.parametrize('name', DEFENCES)
def test_images_are_augmented_in_each_step(name):
    SEEN.clear()
    found = learn(name, replace(PLAN, augment=noting))
    assert SEEN == [16, 16, 8] * 3
    plain = learn(name)
    assert not (same_bits(found.model, plain.model) if name not in CUTS else same_bits(found.before, plain.before))


@pytest.mark.parametrize(('name', 'at'), [('ANP-VS', 4), ('ANP-VS', 10), ('ADMM', 4), ('AT-BNN', 5), ('AT + magnitude', 10),
                                          ('AT-VS', 4)])
def test_an_interrupted_training_goes_on_to_the_same_bits(name, at, tmp_path, monkeypatch):
    plan = replace(PLAN, epochs=4, tuning_epochs=2)
    whole, file, taken = learn(name, plan), tmp_path / 'run.safetensors', []
    real = training._Trainer.__call__

    def stopped(trainer, *args):
        taken.append(1)
        if len(taken) == at + 1:
            raise KeyboardInterrupt
        return real(trainer, *args)

    with monkeypatch.context() as patch:
        patch.setattr(training._Trainer, '__call__', stopped)
        with pytest.raises(KeyboardInterrupt):
            learn(name, plan, checkpoint=file)
    assert file.exists() and (tmp_path / 'run.tuned.safetensors').exists() == (at > 9 and name in CUTS)
    again = learn(name, plan, checkpoint=file)
    assert same_bits(whole.model, again.model)
    with monkeypatch.context() as patch:  # all is done already
        patch.setattr(training._Trainer, '__call__', lambda *args: pytest.fail('trained again'))
        assert same_bits(learn(name, plan, checkpoint=str(file)).model, again.model)
    with pytest.raises(ValueError, match='another training'):
        learn(name, replace(plan, clean_weight=0.5), checkpoint=file)


@pytest.mark.parametrize('name', ['Standard', 'TRADES', 'ANP-VS', 'AT-BNN'])
def test_the_seed_decides_everything(name):
    one, same, other = (learn(name, seed=seed) for seed in (3, 3, 4))
    torch.manual_seed(99)
    assert same_bits(one.model, same.model) and not same_bits(one.before, other.before)


@pytest.mark.parametrize(('plan', 'when'), [
    (replace(PLAN, keep=5e-4), 'at step 0'),  # all are off from the start
    (replace(PLAN, keep=1.1e-3, mask_lr=0.2, beta=100.0, ramp=0.0), 'at step 6'),  # after the only step at which training looks
])
def test_a_collapse_is_told_and_not_raised(plan, when, caplog):
    with caplog.at_level(logging.WARNING, 'robustnb.plans'):
        found = learn('ANP', plan)
    assert found.model is None and when in found.collapsed and 'smaller beta' in found.collapsed
    assert 'ANP: at step' in caplog.text and 'all units' in repr(found)
    assert learn('AT', plan).model is not None


def test_without_tuning_the_cut_network_is_what_comes_out(fits):
    found = learn('AT + magnitude', replace(PLAN, tuning_epochs=0))
    assert len(fits) == 1 and fits[0][3] == 3
    before, after = (sum(p.numel() for p in net.parameters()) for net in (found.before, found.model))
    assert after <= 0.6 * before and not found.model.training
    whole = learn('AT + magnitude', replace(PLAN, tuning_epochs=0, parameters=1)).model  # a share, and not one parameter
    assert sum(p.numel() for p in whole.parameters()) == before


def test_admm_leaves_the_share_of_zeros():
    zeros = weight_sparsity(learn('ADMM', replace(PLAN, admm_sparsity=0.75)).model)
    assert zeros.sparsity.iloc[-1] == pytest.approx(0.75, abs=0.02)


def test_weights_with_a_prior_begin_at_the_start_and_have_the_plans(fits):
    start = small()
    found = learn('AT-BNN', replace(PLAN, prior_deviation=0.3), start=start)
    first = fits[0][0]
    weight = first[0].parametrizations.weight
    assert torch.equal(weight.original, start[0].weight) and weight[0].prior == 0.3 and weight[0].rho.unique().tolist() == [-3]
    assert torch.equal(found.model[0].weight, found.before[0].parametrizations.weight.original)


def test_other_layouts_data_and_networks():
    volumes = torch.rand(20, 1, 4, 4, 4)
    net = nn.Sequential(nn.Conv3d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    assert learn('AT', start=net, train=(volumes, torch.arange(20) % 2)).model is not None
    assert learn('AT').model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert learn('AT', replace(PLAN, channels_last=False)).model[0].weight.is_contiguous()
    start = small()
    torch.manual_seed(5)
    noise = torch.get_rng_state()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(data().x, data().y), 16, shuffle=True)
    assert same_bits(*(learn('ANP', start=start, train=loader).model for _ in range(2)))
    assert torch.equal(noise, torch.get_rng_state())


def test_errors_that_teach():
    for name in ('Pretrained AT', 'anp', None):
        with pytest.raises(KeyError, match='AT from a start of yours'):
            learn(name)
    with pytest.raises(ValueError, match='must have a length'):
        learn('AT', train=((x, y) for x, y in [(data().x, data().y)]))
    with pytest.raises(ValueError, match='not be empty'):
        learn('AT', train=data()[:0])


@pytest.mark.parametrize(('settings', 'words'), [
    ({'epochs': 0}, 'epochs is a whole'), ({'epochs': True}, 'epochs is a whole'), ({'epochs': 2.0}, 'epochs is a whole'),
    ({'attack_steps': 0}, 'attack_steps is'), ({'tuning_epochs': -1}, 'tuning_epochs is'),
    ({'tuning_epochs': 10}, 'fewer than epochs=10'), ({'start_epochs': -1}, 'start_epochs is'),
    ({'batch_size': 0}, 'batch_size'), ({'judge_steps': 0}, 'judge_steps'), ({'ramp': 1.1}, 'ramp is a share'),
    ({'ramp': math.nan}, 'ramp is a share'), ({'ramp': '1'}, 'ramp is a share'), ({'keep': 0}, 'keep is a share'),
    ({'keep': 1}, 'keep is a share'), ({'admm_sparsity': 1}, 'admm_sparsity is a share'),
    ({'parameters': 0}, 'parameters is a share'),
    ({'parameters': True}, 'parameters is a share'), ({'clean_weight': -0.1}, 'clean_weight'), ({'eps': -1}, 'eps'),
    ({'lr': 0}, 'lr is'), ({'mask_lr': math.inf}, 'mask_lr is'), ({'beta': -1}, 'beta is'), ({'ratio': None}, 'ratio is'),
    ({'prior_deviation': 0}, 'prior_deviation is'), ({'trades_weight': math.nan}, 'trades_weight'),
    ({'weight_decay': -1}, 'weight_decay'),
    ({'form': 'max'}, 'form'), ({'schedule': 'lineal'}, 'no schedule'), ({'suppression': -1.0}, '-1'),
    ({'attack_step': -1.0}, 'step'),
    ({'judge_step': -1.0}, 'step'),
])  # fmt: skip
def test_plans_that_mean_nothing(settings, words):
    with pytest.raises(ValueError, match=words):
        DefencePlan(**settings)
    with pytest.raises(ValueError, match=words):
        replace(DefencePlan(), **settings)


PUBLISHED = {  # spec 1.5 and 1.2, written out
    'mnist': dict(beta=4, suppression=1e-3, attack_steps=20, eps=0.3, attack_step=0.01, judge_steps=40, judge_step=0.01,
                  augment=None),
    'cifar10': dict(beta=2, suppression=1e-4, attack_steps=10, eps=0.03, attack_step=0.007, judge_steps=40, judge_step=0.007,
                    augment=shift_and_flip),
    'cifar100': dict(beta=1, suppression=0.1, attack_steps=10, eps=0.03, attack_step=0.007, judge_steps=40, judge_step=0.007,
                     augment=shift_and_flip),
}  # fmt: skip
FOR_ALL = dict(epochs=200, batch_size=64, lr=1e-3, mask_lr=1e-2, weight_decay=1e-4, clean_weight=1 / 3, ramp=0, tuning_epochs=0,
               form='mean', autocast=None)  # fmt: skip


@pytest.mark.parametrize('mode', ['base', 'bbd'])
@pytest.mark.parametrize('name', PUBLISHED)
def test_published_settings(name, mode):
    plan = PLANS[f'{name} {mode}']
    for key, value in {**PUBLISHED[name], **FOR_ALL}.items():
        assert getattr(plan, key) == value, key
    assert plan.start_epochs == (200 if mode == 'bbd' else 0)  # with masks, from a standard network
    a = math.log1p(math.exp(-1 if name == 'mnist' else 2))  # softplus of a_raw; b is 1
    assert plan.keep == pytest.approx(a / (1 + a), abs=1e-3)
    assert plan.prior_deviation == (1.0 if name == 'mnist' else 0.1)
    second = 0.7 if name == 'mnist' else 0.8
    for done, factor in ((0, 1), (0.4999, 1), (0.5, 0.1), (second - 1e-4, 0.1), (second, 0.01), (1, 0.01)):
        assert plan.schedule(done) == pytest.approx(factor)


def test_the_plans():
    assert list(PLANS) == ['mnist', 'cifar', *(f'{name} {mode}' for name in PUBLISHED for mode in ('base', 'bbd'))]
    assert PLANS['mnist'] == DefencePlan() and {f.name for f in fields(DefencePlan)} == set(vars(DefencePlan()))
    cifar = PLANS['cifar']
    assert (cifar.eps, cifar.judge_step, cifar.augment, cifar.autocast) == (8 / 255, 2 / 255, shift_and_flip, torch.bfloat16)


@pytest.mark.parametrize('pixels', [0, 1, 3])
def test_shift_and_flip_image_by_image(pixels):
    x = torch.rand(12, 2, 5, 4)
    torch.manual_seed(1)
    found = shift_and_flip(x, pixels)
    torch.manual_seed(1)
    top, left = (torch.randint(2 * pixels + 1, (12, 1, 1)).flatten() for _ in range(2))
    mirrored = torch.rand(12, 1, 1).flatten() < 0.5
    expected = torch.zeros_like(x)
    for image in range(12):
        for row in range(5):
            for column in range(4):
                from_row = row + top[image] - pixels
                from_column = (3 - column if mirrored[image] else column) + left[image] - pixels
                if 0 <= from_row < 5 and 0 <= from_column < 4:
                    expected[image, :, row, column] = x[image, :, from_row, from_column]
    assert torch.equal(found, expected) and 0 < mirrored.sum() < 12 and found.is_contiguous()
    wide = shift_and_flip(torch.ones(3000, 1, 1, 1), 1)
    assert wide.mean() == pytest.approx(1 / 9, abs=0.02)  # both shifts are even over all places


def test_standardised_by_the_formula():
    x = torch.rand(5, 3, 4, 4)
    x[0], x[1] = 0.7, 0.7  # constant, and nearly so
    x[1, 0, 0, 0] = 0.701
    rows = x.double().numpy().reshape(5, -1)
    spread = np.maximum(rows.std(1), 1 / np.sqrt(48))
    expected = (rows - rows.mean(1)[:, None]) / spread[:, None]
    np.testing.assert_allclose(standardised(x).numpy().reshape(5, -1), expected, atol=2e-5)
    assert standardised(x)[0].abs().max() < 1e-5 and standardised(x).shape == x.shape
    assert np.allclose(standardised(x)[2:].flatten(1).std(1, correction=0), 1, atol=1e-5)


def test_the_published_attack_by_the_letter():
    torch.manual_seed(0)
    x, y = standardised(torch.rand(6, 3, 4, 4, dtype=torch.float64)), torch.tensor([0, 1, 2, 0, 1, 2])
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 3)).double()
    found = published_cifar_attack(model, x, y, 0.03, 0.007, 9)
    weight, bias, rows = model[1].weight.detach().numpy(), model[1].bias.detach().numpy(), x.numpy().reshape(6, -1)
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)).double().numpy().reshape(6, -1)
    at = rows + 0.03 * (2 * noise - 1)
    for _ in range(9):
        logits = at @ weight.T + bias
        p = np.exp(logits - logits.max(1, keepdims=True))
        p = p / p.sum(1, keepdims=True) - np.eye(3)[y.numpy()]
        at = np.clip(rows + np.clip(at + 0.007 * np.sign(p @ weight) - rows, -0.03, 0.03), 0, 1)
    np.testing.assert_allclose(found.numpy().reshape(6, -1), at, atol=1e-12)
    assert found.min() == 0 and found.max() == 1 and not found.requires_grad
    assert (found - x).abs().max() > 1 and ((found - x).abs() > 0.0301).double().mean() > 0.5  # no ball of radius 0.03


def test_the_published_attack_leaves_the_model_alone():
    model = small().train()
    before, x = bits(model), data().x
    with torch.no_grad():
        published_cifar_attack(model, x, data().y, steps=2)
    assert all(map(torch.equal, before, bits(model))) and model.training and all(p.grad is None for p in model.parameters())


def test_a_network_that_says_the_same_for_all_is_none(caplog):
    start = small()
    with torch.no_grad():
        start[-1].weight.zero_()
        start[-1].bias.copy_(torch.tensor([0.0, 9.0, 0.0]))
    still = replace(PLAN, lr=1e-9, epochs=1, tuning_epochs=0)
    found = learn('AT', still, start, data(80))
    assert found.model is None and 'says class 1 for all of 80' in found.collapsed and 'class 1' in caplog.text
    of_one = data(80)
    assert learn('AT', still, start, DataSet(of_one.x, torch.ones(80).long())).model is not None  # as it should
