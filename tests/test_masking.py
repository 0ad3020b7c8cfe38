"""Masking that is known by construction is named, honest nets pass, and attacks of equal cost are compared."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn

from robustnb.attacks import APGD, FGSM, L2, PGD, Linf, WorstOf
from robustnb.blackbox import Square
from robustnb.data import DataSet, batches, digits, moons
from robustnb.masking import (
    CHECKS,
    Finding,
    Trial,
    _against,
    _attack_of,
    _chance,
    _on_trial,
    _stronger,
    _within_reach,
    check_masking,
)
from robustnb.minimal import DeepFool
from robustnb.noises import Gaussian
from robustnb.results import Result
from robustnb.training import trained


class Changed(nn.Module):
    "A model with something before and after it."

    def __init__(self, model, before=lambda x: x, after=lambda logits: logits):
        super().__init__()
        self.model, self.before, self.after = model, before, after

    def forward(self, x):
        return self.after(self.model(self.before(x)))


class Elsewhere(torch.autograd.Function):
    "Hands `x` on as it is; the gradient comes back mirrored."

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return -gradient.flip(-1)


class Straight(torch.autograd.Function):
    "Rounds to nine levels; the gradient comes back as if it did not."

    @staticmethod
    def forward(ctx, x):
        return (8 * x).round() / 8

    @staticmethod
    def backward(ctx, gradient):
        return gradient


@pytest.fixture(scope='module')
def data():
    return digits().test.take(100)


@pytest.fixture(scope='module')
def honest():
    return trained('digits_cnn', 'digits', training='adversarial')


MASKED = {  # name -> what is done to the net, and checks that must fail
    'sharp': ({'after': lambda z: 1000 * z}, {'outputs', 'zero gradient', 'loss', 'largest eps'}),
    'rounded': ({'before': lambda x: (8 * x).round() / 8}, {'zero gradient', 'largest eps', 'black box'}),
    'ripples': ({'before': lambda x: x + 0.02 * torch.sin(500 * x)}, {'slope', 'largest eps', 'black box'}),
    'noisy': ({'before': lambda x: x + 0.1 * torch.randn_like(x)}, {'dice'}),
    'probabilities': ({'after': lambda z: z.softmax(1)}, {'outputs'}),
    'elsewhere': ({'before': Elsewhere.apply}, {'slope', 'largest eps', 'black box'}),
}


def quick(model, data, attack=None, eps=0.15, **settings):
    attack = attack or PGD(steps=10)
    return check_masking(model, data, attack, eps, **({'queries': 100, 'show_progress': False} | settings))


@pytest.mark.parametrize('name', MASKED)
def test_what_is_masked_by_construction_is_named(name, honest, data):
    change, signs = MASKED[name]
    report = quick(Changed(honest, **change).eval(), data, n=70)
    assert signs <= set(report.signs), report.table().to_string()


def test_dice_that_fall_alike_at_every_call_are_seen(honest, data):
    def reseeded(x):
        return x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))

    assert quick(Changed(honest, before=reseeded).eval(), data, checks=['dice']).signs == ['dice']


def test_a_sigmoid_at_the_end_is_seen_and_a_log_softmax_is_fine(honest, data):
    line = nn.Sequential(nn.Linear(2, 1), nn.Sigmoid()).eval()
    points = moons().test.take(60)
    points = replace(points, y=torch.ones_like(points.y))  # what a positive output stands for
    assert quick(line, points, checks=['outputs']).signs == ['outputs']
    assert not quick(Changed(honest, after=lambda z: z.log_softmax(1)).eval(), data, checks=['outputs', 'loss']).signs


def idle(x):
    "No gradient at all, but the values."
    return x.detach() + 0 * x


class Weak(FGSM):
    "An attack that loses its way at large strengths."

    def search(self, problem):
        return problem.project(problem.norm.ascend(problem.x, -problem.gradient(problem.x)[0], problem.eps)) if (
            problem.eps > 0.2
        ) else super().search(problem)[0], None


CAN_FAIL = {  # check -> what is done to the net, and the attack, for which it must fail
    'outputs': ({'after': lambda z: z.softmax(1)}, PGD(steps=5)),
    'dice': ({'before': lambda x: x + 0.1 * torch.randn_like(x)}, PGD(steps=5)),
    'zero gradient': ({'before': idle}, PGD(steps=5)),
    'slope': ({'before': Elsewhere.apply}, PGD(steps=5)),
    'one step': ({}, PGD(steps=2, step=0.001, random_start=False)),
    'noise': ({'before': lambda x: (4 * x).round() / 4}, PGD(steps=2, step=0.001, random_start=False)),
    'loss': ({'after': lambda z: z / 50}, PGD(steps=10)),
    'rising eps': ({}, Weak()),
    'largest eps': ({'before': idle}, PGD(steps=5, random_start=False)),
    'black box': ({'before': lambda x: x.clamp(0.1, 0.9)}, PGD(steps=10)),
    'transfer': ({'before': idle}, PGD(steps=10)),
}


def test_every_check_can_fail():
    assert CAN_FAIL.keys() == CHECKS.keys()


@pytest.mark.parametrize('check', CAN_FAIL)
def test_a_check_can_fail_and_leaves_the_plain_net_alone(check, honest, data):
    change, attack = CAN_FAIL[check]
    others = {'surrogates': {'plain': honest}, 'checks': [check], 'queries': 300}
    found = quick(Changed(honest, **change).eval(), data, attack, **others).table()
    assert found.verdict[0] == 'failed' and found.advice[0]
    assert not quick(honest, data, **others).signs


def test_the_advice_names_a_loss_that_helps(honest, data):
    "And a loss that is not used is not to blame."
    sharp = Changed(honest, after=lambda z: 1000 * z).eval()
    clipped = Changed(honest, after=lambda z: z.clamp(-2, 2)).eval()
    names = ['outputs', 'zero gradient', 'loss']
    for model, bad, good in ((sharp, 'ce', 'margin'), (clipped, 'margin', 'ce')):
        report = quick(model, data, PGD(steps=10, loss=bad), checks=names).table().set_index('check')
        assert report.verdict['zero gradient'] == 'failed' and f"loss='{good}'" in report.advice['zero gradient']
        assert 'zero gradient' not in quick(model, data, PGD(steps=10, loss=good), checks=names).signs
    assert not quick(sharp, data, PGD(steps=10, loss='dlr'), checks=names).signs
    nothing = quick(Changed(honest, before=idle).eval(), data, PGD(steps=2, loss='dlr'), checks=names).table()
    assert 'Nothing flows' in nothing.advice[1]


def test_only_certain_success_counts_at_the_largest_strength(honest, data):
    "What the net calls grey anyway may withstand everything; the rest may not."
    grey = int(honest(torch.full((1, 1, 8, 8), 0.5)).argmax())

    @dataclass(frozen=True)
    class Shielded(FGSM):
        shielded: int = grey

        def search(self, problem):
            return torch.where((problem.y == self.shielded)[:, None, None, None], problem.x, 0.5), None

    found = {
        who: quick(honest, data, Shielded(0.1, who), checks=['largest eps']).table() for who in (grey, (grey + 1) % 10)
    }
    assert [table.verdict[0] for table in found.values()] == ['passed', 'failed']
    assert 'and 0 of these are still right' in found[grey].seen[0]


def test_ranges_with_an_open_end_have_no_middle():
    points = DataSet(torch.rand(40, 2) * 5, torch.arange(40) % 2, bounds=(0.0, float('inf')))
    points.x[:, 0] += 10 * points.y
    line = nn.Linear(2, 1).eval()
    with torch.no_grad():
        line.weight.copy_(torch.tensor([[1.0, 0.0]]))
        line.bias.fill_(-7.5)
    report = quick(line, points, PGD(steps=20), eps=4.0, checks=['rising eps', 'largest eps'])
    assert set(report.table().verdict) == {'passed'} and 'nearest sample' in report.table().seen[1]
    alike = DataSet(points.x[1::2], points.y[1::2], bounds=None)
    found = quick(line, alike, eps=4.0, checks=['largest eps']).table()
    assert found.verdict[0] == 'not applicable' and 'of one class' in found.seen[0]


def test_logits_that_are_not_finite(honest, data):
    masked = Changed(honest, after=lambda z: z.index_fill(1, torch.tensor([9]), -torch.inf)).eval()
    few = data[data.y != 9]
    assert not quick(masked, few, checks=['dice']).signs, 'a class that is ruled out is ruled out both times'
    calls = []

    def sometimes(z):
        calls.append(1)
        return z * (torch.nan if len(calls) == 3 else 1)

    trial = _on_trial(Changed(honest, after=sometimes).eval(), few, _attack_of(PGD(), (0, 1), 0.1))  # one pass
    assert CHECKS['dice'](trial).passed is False


def test_attacks_of_one_name_are_told_apart(honest, data):
    trial = _on_trial(honest, data, _attack_of(PGD(steps=3), (0, 1), 0.15))
    still = replace(trial.attack, step=1e-6, random_start=False)
    assert still.name == trial.attack.name
    assert trial.fooled(trial.attack).sum() > trial.fooled(still).sum() == 0

    def mirror(model, x, y):
        return x.flip(-1)

    assert trial.fooled(mirror).sum() > 0
    assert [name for name, *_ in trial.known] == ['PGD-3', 'PGD-3', 'mirror']


def test_interrupted_checks_leave_a_report(honest, data):
    def impatient(trial):
        raise KeyboardInterrupt

    made = quick(honest, data, checks={'dice': CHECKS['dice'], 'impatient': impatient, 'noise': CHECKS['noise']})
    assert made.table().check.tolist() == ['dice']
    with pytest.raises(KeyboardInterrupt):
        quick(honest, data, checks={'impatient': impatient})
    trial = _on_trial(honest, data, _attack_of(PGD(steps=2), (0, 1), 0.15), batch_size=20)
    calls = []

    def tired(model, x, y):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return x

    with pytest.raises(KeyboardInterrupt):
        trial.fooled(tired)
    assert not trial.known


HONEST = [  # architecture, training, image size, eps, seed of the choice of samples
    ('adversarial', 8, 0.15, 0),
    ('standard', 8, 0.05, 2),
    pytest.param('standard', 28, 0.05, 0, marks=pytest.mark.slow),
    pytest.param('adversarial', 28, 0.1, 0, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(('training', 'size', 'eps', 'seed'), HONEST)
def test_honest_nets_pass(training, size, eps, seed):
    model = trained('digits_cnn', 'digits' if size == 8 else f'digits{size}', training=training)
    report = check_masking(model, digits(size).test, PGD(steps=20), eps, seed=seed, show_progress=False)
    assert not report.signs, report.table().to_string()
    assert (report.table().verdict == 'passed').sum() == len(CHECKS) - 1, 'all but transfer apply'


def test_what_lets_the_gradient_through_is_no_masking(honest, data):
    assert not quick(Changed(honest, before=Straight.apply).eval(), data, n=70).signs


def nearest_mean(sharpness):
    "A linear model by hand: the logits are minus the squared distances to the means of the classes, times a sharpness."
    train = digits().train
    means = torch.stack([train.x[train.y == label].flatten(1).mean(0) for label in range(10)])
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    with torch.no_grad():
        model[1].weight.copy_(2 * sharpness * means)
        model[1].bias.copy_(-sharpness * (means**2).sum(1))
    return model


def test_one_linear_model_at_three_scales():
    "The decisions are the same. Never sure, the cross entropy misleads; too sure, it is flat far away."
    found = [quick(nearest_mean(scale), digits().test, PGD(steps=20), eps=0.1, n=128).signs for scale in (0.3, 3, 10)]
    assert found == [['loss'], [], ['largest eps']]


@pytest.mark.parametrize('outputs', [1, 2])
@pytest.mark.parametrize('norm', [Linf(), L2()], ids=repr)
def test_linear_models_on_unbounded_points_pass(outputs, norm):
    line = nn.Linear(2, outputs).eval()
    weight = torch.tensor([[0.7, -2.0]])
    with torch.no_grad():
        line.weight.copy_(weight if outputs == 1 else torch.cat([-weight, weight]) / 2)
        line.bias.copy_(torch.tensor([0.1] if outputs == 1 else [-0.05, 0.05]))
    report = quick(line, moons().test.take(80), PGD(steps=20, norm=norm), eps=0.4)
    assert not report.signs, report.table().to_string()
    assert set(report.table().verdict[:-1]) == {'passed'}


def test_tables_with_a_bound_for_each_feature_pass():
    generator = torch.Generator().manual_seed(0)
    high = torch.tensor([1.0, 10.0, 100.0])
    x = torch.rand(80, 3, generator=generator) * high
    data = DataSet(x, ((x / high).sum(1) > 1.5).long(), bounds=None)
    line = nn.Linear(3, 1).eval()
    with torch.no_grad():
        line.weight.copy_(1 / high[None])
        line.bias.fill_(-1.5)
    report = quick(line, data, PGD(steps=20, bounds=(torch.zeros(3), high), norm=Linf(scale=high)), eps=0.1)
    assert not report.signs, report.table().to_string()
    found = report.table().set_index('check')
    assert 'at eps 0.499' in found.seen['largest eps'], 'the middle of each range, in units of the scale'


def test_values_that_must_not_change(honest, data):
    scale = torch.ones(1, 8, 8)
    scale[:, :, 0] = 0
    found = quick(honest, data, PGD(steps=5, norm=Linf(scale)), checks=['largest eps', 'rising eps']).table()
    assert found.verdict.tolist() == ['not applicable', 'passed']


def test_what_does_not_apply_says_so(honest, data):
    found = quick(honest, data, FGSM(), checks=['one step', 'transfer']).table()
    assert found.verdict.tolist() == ['not applicable'] * 2
    tiny = quick(honest, data, PGD(steps=2), eps=1e-5, checks=['one step', 'noise', 'loss', 'black box'])
    assert set(tiny.table().verdict) == {'not applicable'} and not tiny.signs
    assert 'a larger eps' in tiny.table().seen[0]


def test_the_tolerance_equals_counting_all_tosses():
    for a, b in [(0, 0), (3, 1), (7, 0), (5, 6)]:
        tosses = [bin(t).count('1') for t in range(2 ** (a + b))]
        assert _chance(a, b) == pytest.approx(np.mean([heads >= a for heads in tosses]))

    def pair(a, b, n):
        return np.arange(n) < a, (np.arange(n) >= a) & (np.arange(n) < a + b)

    assert _stronger(*pair(7, 0, 100)) and not _stronger(*pair(6, 0, 100))
    assert not _stronger(*pair(300, 200, 10_000)), 'certain, but too small to matter'
    assert not _stronger(*pair(0, 50, 100)) and not _stronger(*pair(1, 0, 1))


def test_a_change_within_reach_is_one_that_works(honest, data):
    trial = _on_trial(honest, data, _attack_of(PGD(), (0, 1), 0.1))
    eps, works = _within_reach(trial)
    grey = torch.full_like(trial.data.x, 0.5)
    assert eps == pytest.approx(0.5, rel=1e-3) and (trial.data.x - grey).abs().max() <= eps
    assert np.array_equal(works, (honest(grey).argmax(1) != trial.data.y).numpy())
    assert _within_reach(replace(trial, attack=PGD(norm=L2())))[0] <= 0.5 * 8 * 1.001

    points = DataSet(torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([0, 1, 1]), bounds=None)
    apart = Trial(nn.Linear(1, 2), points, PGD(bounds=None))
    assert _within_reach(apart)[0] == pytest.approx(1, rel=1e-3), 'the median of 1, 1 and 3 to the next of the other class'


def test_neither_batch_size_nor_a_loader_matters(honest, data):
    small = data[:20]
    whole, parts = (quick(honest, small, PGD(steps=5), queries=20, batch_size=size).table() for size in (256, 7))
    assert whole[['check', 'verdict', 'seen']].equals(parts[['check', 'verdict', 'seen']])
    assert np.allclose(whole.forward, parts.forward), 'passes do not depend on it either'
    names = ['outputs', 'dice', 'noise']
    loader = [(batch.x, batch.y) for batch in batches(data, 8)]
    first = quick(honest, loader, n=20, checks=names)
    assert first.settings['samples'] == 20
    right = honest(data.x[:20]).argmax(1) == data.y[:20]
    assert first.dataset.sample.values.tolist() == right.nonzero()[:, 0].tolist()


def test_the_seed_chooses_the_samples(honest):
    ids = [
        quick(honest, digits().test, n=50, seed=seed, checks=['dice']).dataset.sample.values.tolist()
        for seed in (0, 0, 1)
    ]
    assert ids[0] == ids[1] != ids[2]


def test_passes_are_counted_and_bounded(honest, data):
    steps, draws, queries = 10, 20, 100
    report = quick(Changed(honest, after=lambda z: 1000 * z).eval(), data)
    cost = report.table().set_index('check')
    assert cost.forward['dice'] == 2 and cost.backward['dice'] == 0
    assert (cost.forward['slope'], cost.backward['slope']) == (3, 1)
    own = report.settings['passes of the attack']
    assert cost.forward.sum() + own['forward'] <= 6 * steps + draws + queries + 30
    assert cost.backward.sum() + own['backward'] <= 6 * steps + 6


def test_the_model_comes_back(honest, data):
    model = nn.Sequential(nn.Dropout(), Changed(honest)).train()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    quick(model, data[:20], checks=['outputs', 'noise', 'slope'])
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
    assert all(m.training for m in (model, model[0])) and not model._forward_hooks
    assert all(p.grad is None for p in model.parameters())

    def broken(trial):
        raise RuntimeError('on purpose')

    with pytest.raises(RuntimeError, match='on purpose'):
        quick(model, data[:20], checks={'broken': broken})
    assert not model._forward_hooks and model.training


def test_a_report_is_a_result(honest, data, tmp_path):
    def luck(trial):
        return Finding(False, '<b>3</b> of 4', 'try & see')

    report = quick(honest, data, checks={'luck': luck, 'noise': CHECKS['noise']})
    assert report.signs == ['luck'] and 'failed: luck; 1 passed' in repr(report)
    report.save(tmp_path / 'report.safetensors')
    back = Result.load(tmp_path / 'report.safetensors')
    assert type(back).__name__ == 'MaskingReport' and back.signs == report.signs and back.table().equals(report.table())
    assert back.settings['attack']['kind'] == 'PGD'
    assert '&lt;b&gt;3' in report._repr_html_() and '&amp; see' in report._repr_html_()
    figure = report.plot()
    assert 'luck' in figure.axes[0].get_title('left')
    assert set(report.dataset.attack.values) == {'PGD-10', 'noise, best of 20'}


@pytest.mark.parametrize(
    ('settings', 'error', 'words'),
    [
        ({'attack': WorstOf([PGD(), APGD()])}, TypeError, 'follows the gradient'),
        ({'attack': Gaussian()}, TypeError, 'follows the gradient'),
        ({'attack': Square()}, TypeError, 'follows the gradient'),
        ({'attack': DeepFool()}, TypeError, 'at a given strength'),
        ({'attack': PGD(target=3)}, ValueError, 'without target='),
        ({'eps': 0.0}, ValueError, 'above 0'),
        ({'checks': ['luck']}, KeyError, 'there are outputs, dice'),
    ],
)
def test_errors_say_what_to_do(honest, data, settings, error, words):
    with pytest.raises(error, match=words):
        quick(honest, data, **settings)


def test_wrong_labels_and_no_data(honest, data):
    with pytest.raises(ValueError, match='none of the 100 samples'):
        quick(honest, (data.x, (data.y + 1) % 10))
    with pytest.raises(ValueError, match='empty'):
        quick(honest, [])


def test_a_surrogate_gets_across_to_a_masked_net_only(honest, data):
    rounded = Changed(honest, before=lambda x: (8 * x).round() / 8).eval()
    others = {'not rounded': honest, 'standard': trained('digits_cnn', 'digits')}
    report = quick(rounded, data, surrogates=others, checks=['transfer'])
    assert report.signs == ['transfer'] and 'from not rounded' in report.table().seen[0]
    assert not quick(honest, data, surrogates={'standard': others['standard']}, checks=['transfer']).signs


def test_a_rival_is_judged_on_the_same_samples(honest, data):
    trial = _on_trial(honest, data, _attack_of(PGD(steps=5), (0, 1), 0.15))
    rival = FGSM(0.15)
    found = _against(trial, rival, 'advice')
    fooled = [
        honest(a(honest, trial.data.x, trial.data.y, trial.data.ids)).argmax(1) != trial.data.y
        for a in (trial.attack, rival)
    ]
    assert f'FGSM fools {int(fooled[1].sum())} of {len(trial.data)}, PGD-5 {int(fooled[0].sum())}' in found.seen


def robust(attack, model, data):
    "How many samples an attack leaves right, and how many gradients it took for each."
    result = attack.run(model, data.x, data.y, data.ids)
    return int((~result.success).sum()), result.passes['backward']


EQUAL_BUDGET = [  # image size, what the logits are multiplied by, eps
    (8, 1, 0.15),
    (8, 1000, 0.15),
    pytest.param(28, 1, 0.1, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(('size', 'factor', 'eps'), EQUAL_BUDGET)
def test_at_an_equal_budget_apgd_and_the_worst_of_two_are_not_behind_pgd(size, factor, eps):
    "250 gradients for each of 128 samples. One net is masked: there PGD and APGD fail alike, and the checks say so."
    net = trained('digits_cnn', 'digits' if size == 8 else f'digits{size}', training='adversarial')
    model, data = Changed(net, after=lambda z: factor * z).eval(), digits(size).test.take(128)
    # Two of an attack's members at half the steps each; a climb of APGD takes one gradient more than it has steps.
    pgd = PGD(eps, steps=50, restarts=5, keep_going=False)
    apgd = APGD(eps, steps=249, keep_going=False)
    several = WorstOf([APGD(steps=124, keep_going=False), APGD(steps=124, loss='dlr', keep_going=False)], eps=eps)
    (plain, spent), (adaptive, cost), (worst, total) = (robust(a, model, data) for a in (pgd, apgd, several))
    assert max(spent, cost, total) <= 250
    assert adaptive <= plain + 1 and worst <= plain + 1
    assert 0.2 <= worst / len(data) <= 0.8
    signs = quick(
        model, data, PGD(steps=20), eps, checks=['outputs', 'zero gradient', 'loss', 'one step', 'noise']
    ).signs
    assert signs == (['outputs', 'zero gradient', 'loss'] if factor > 1 else [])
    assert factor == 1 or plain - worst > 0.3 * len(data), 'what the masking had hidden'
