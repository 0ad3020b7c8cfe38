"""Evaluation against counting by hand; what a file of records gives back, and what it must not."""

import runpy
import subprocess
import sys
import time
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from robustnb.attacks import APGD, FGSM, L2, PGD, Attack, AttackResult, Linf, WorstOf
from robustnb.blackbox import Transfer
from robustnb.data import DataSet
from robustnb.devices import seeded
from robustnb.evaluation import Evaluation, _mean, accuracy, calibrate, evaluate
from robustnb.guard import usable
from robustnb.minimal import CW, DeepFool, Smallest
from robustnb.noises import Gaussian, Noise, Poisson, SaltPepper
from robustnb.results import Records


@pytest.fixture(scope='module')
def net():
    with seeded(0):
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3)).eval()


@pytest.fixture(scope='module')
def data(net):
    "Samples that the net classifies correctly, but for every fifth."
    x = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = net(x).argmax(1)
    y[::5] = (y[::5] + 1) % 3
    return DataSet(x, y, tuple('abc'))


def by_hand(net, data, attack) -> float:
    with torch.no_grad():
        return float((net(attack(net, data.x, data.y)).argmax(1) == data.y).float().mean())


def test_accuracy(net, data):
    assert accuracy(net, data) == 0.8
    assert accuracy(net, (data.x, data.y), batch_size=7) == 0.8
    assert accuracy(net, DataLoader(data, batch_size=9)) == 0.8
    with pytest.raises(ValueError, match='empty'):
        accuracy(net, (data.x[:0], data.y[:0]))


def test_table_equals_counting_by_hand(net, data):
    attacks, strengths = {'noise': Gaussian(), 'fgsm': FGSM(), 'pgd': PGD(steps=3)}, [0, 0.05, 0.1]
    table = evaluate(net, data, attacks, strengths, show_progress=False).table()
    assert list(table.columns) == ['attack', 'eps', 'accuracy', 'low', 'high', 'n']
    assert table.iloc[0].attack == 'clean' and table.iloc[0].accuracy == 0.8 and len(table) == 1 + 3 * 2
    for row in table.iloc[1:].itertuples():
        assert np.isclose(row.accuracy, by_hand(net, data, attacks[row.attack].at(row.eps)))
    assert ((table.low <= table.accuracy) & (table.accuracy <= table.high)).all() and (table.n == 40).all()


@pytest.mark.parametrize('batch_size', [1, 6, 100])
def test_batch_size_does_not_matter(net, data, batch_size):
    def run(size):
        return evaluate(net, data, [Gaussian(), PGD(steps=3)], [0.1], batch_size=size, show_progress=False)

    assert (run(batch_size).dataset['correct'] == run(40).dataset['correct']).all()


def test_own_strengths_and_functions(net, data):
    def mirror(model, x, y):
        return x.flip(-1)

    table = evaluate(net, data, [mirror, FGSM(0.07)], show_progress=False).table()
    assert list(table.attack) == ['clean', 'mirror', 'FGSM'] and np.isnan(table.eps[1]) and table.eps[2] == 0.07
    assert np.isclose(table.accuracy[1], by_hand(net, data, mirror))
    with pytest.raises(ValueError, match='plain function'):
        evaluate(net, data, mirror, eps=[0.1], show_progress=False)


def test_bounds_come_from_the_data(net):
    wide = DataSet(torch.randn(10, 1, 8, 8), torch.zeros(10, dtype=torch.long), tuple('abc'), bounds=None)
    assert len(evaluate(net, wide, FGSM(0.1), show_progress=False).table()) == 2
    with pytest.raises(ValueError, match='Normalized'):
        evaluate(net, (wide.x, wide.y), FGSM(0.1), show_progress=False)


def test_logits_are_found(data, net):
    class TwoHeads(nn.Module):
        def forward(self, x):
            return {'loss': torch.zeros(()), 'second': net(x)}

    model = TwoHeads()
    model.net = net
    assert evaluate(model, data, FGSM(0.1), logits='second', show_progress=False).table().accuracy[0] == 0.8


def test_saved_loaded_and_drawn(net, data, tmp_path):
    result = evaluate(net, data, [Gaussian(), FGSM()], [0.05, 0.1], show_progress=False)
    result.save(tmp_path / 'evaluation.safetensors')
    loaded = Evaluation.load(tmp_path / 'evaluation.safetensors')
    assert loaded.table().equals(result.table()) and loaded.dataset.identical(result.dataset)
    lines = result.plot().axes[0].get_lines()
    assert [line.get_label() for line in lines] == ['Gaussian', 'FGSM']
    assert lines[1].get_ydata().tolist() == pytest.approx([0.8, *result.table().accuracy[3:]])


def test_nothing_to_evaluate(net, data):
    with pytest.raises(ValueError, match='empty'):
        evaluate(net, (data.x[:0], data.y[:0]), FGSM(), show_progress=False)


def test_strengths_are_sorted_and_interruptions_keep_what_is_done(net, data):
    table = evaluate(net, data, FGSM(), [0.1, 0, 0.05, 0.1], show_progress=False).table()
    assert table.eps.tolist() == [0, 0.05, 0.1]
    calls = []

    def impatient(model, x, y):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return x

    assert evaluate(net, data, impatient, batch_size=10, show_progress=False).table().n[0] == 20


def test_interrupted_before_anything_is_done(net, data):
    def at_once(model, x, y):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(net, data, at_once, show_progress=False)


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_broken_samples_are_named_before_anything_is_computed(net, data, value):
    x, calls = data.x.clone(), []
    x[33, 0, 2, 2], x[35] = value, value

    def counted(model, x, y):
        calls.append(1)
        return x

    for run in (
        lambda d: evaluate(net, d, counted, batch_size=10, show_progress=False),
        lambda d: calibrate(net, d, FGSM(), batch_size=10, show_progress=False),
    ):
        with pytest.raises(ValueError, match='in 2 of the samples 30 to 39: 33, 35. .*usable'):
            run(DataSet(x, data.y))
        assert not calls
        with pytest.raises(ValueError, match='in 2 of the samples 30 to 39: 33, 35'):
            run([(x[i : i + 10], data.y[i : i + 10]) for i in range(0, 40, 10)])
        calls.clear()
    keep = usable(x)
    assert evaluate(net, (x[keep], data.y[keep]), FGSM(0.1), show_progress=False).table().n[0] == 38


# ------------------------------------------------------------------------------------------------------ several models


@pytest.fixture(scope='module')
def nets(net):
    other = deepcopy(net)
    with torch.no_grad():
        other[1].weight.mul_(0.5)
    return {'net': net, 'other': other}


def test_several_models_stand_in_one_table(nets, data):
    attacks, eps = [FGSM(), PGD(steps=3)], [0.05, 0.1]
    table = evaluate(nets, data, attacks, eps, show_progress=False).table()
    assert list(table.columns) == ['model', 'attack', 'eps', 'accuracy', 'low', 'high', 'n']
    for name, net in nets.items():
        alone = evaluate(net, data, attacks, eps, show_progress=False).table()
        assert table[table.model == name].drop(columns='model').reset_index(drop=True).equals(alone)
    assert list(evaluate({'one': nets['net']}, data, FGSM(0.1), show_progress=False).table().model) == ['one', 'one']


def test_no_model_at_all(net, data):
    with pytest.raises(ValueError, match='no model'):
        evaluate({}, data, FGSM())
    with pytest.raises(TypeError, match='got list; several models go into a dictionary'):
        evaluate([net], data, FGSM())
    with pytest.raises(TypeError, match="got str for 'b'"):
        evaluate({'a': net, 'b': 'resnet'}, data, FGSM())


def labels(figure) -> list[list[str]]:
    return [[line.get_label() for line in ax.get_lines()] for ax in figure.axes]


def test_the_figure_of_several_models(nets, data, tmp_path):
    def mirror(model, x, y):
        return x.flip(-1)

    both = evaluate(nets, data, [FGSM(), Gaussian()], [0.05, 0.1], show_progress=False)
    both.save(tmp_path / 'both.safetensors')
    figure = Evaluation.load(tmp_path / 'both.safetensors').plot()
    assert [ax.get_title('left') for ax in figure.axes] == ['net', 'other']
    assert labels(figure) == [['FGSM', 'Gaussian']] * 2
    row = both.table().query("model == 'other' and (attack == 'FGSM' or attack == 'clean')")
    assert figure.axes[1].get_lines()[0].get_ydata().tolist() == row.accuracy.tolist()
    single = evaluate(nets, data, FGSM(), [0.05, 0.1], show_progress=False).plot()
    assert labels(single) == [['net', 'other']] and 'under FGSM' in single.axes[0].get_title('left')
    own = evaluate(nets, data, [mirror, Gaussian(0.1)], show_progress=False).plot()
    assert labels(own) == [['clean', 'mirror', 'Gaussian 0.1']]
    assert [tick.get_text() for tick in own.axes[0].get_xticklabels()] == ['net', 'other']
    zero = evaluate(nets['net'], data, FGSM(), [0], show_progress=False).plot().axes[0]
    assert [tick.get_text() for tick in zero.get_xticklabels()] == ['clean']


# --------------------------------------------------------------------------------------------------------------- scores


def made(correct, models=None, eps=(0.1, 0.2), names=('FGSM',)) -> Evaluation:
    "An evaluation with these answers, (case, sample)."
    import xarray as xr

    cases = [('clean', 0.0), *((name, e) for name in names for e in eps)]
    columns = [(m, *case) for m in models or [''] for case in cases]
    coords = {k: ('case', [c[i] for c in columns]) for i, k in enumerate(('model', 'attack', 'eps')) if models or i}
    correct = np.array(correct, dtype=bool)
    return Evaluation(xr.Dataset({'correct': (('case', 'sample'), correct)}, coords))


def test_score_by_hand():
    rows = [[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]]  # 75, 50 and 25 %
    score = made(rows).rg()
    assert list(score.columns) == ['attack', 'sum', 'mean', 'low', 'high', 'strengths']
    assert np.isclose(score['sum'], 150) and np.isclose(score['mean'], 50) and score.strengths[0] == 3
    each = np.array([100, 200 / 3, 100 / 3, 0, 0, 100])  # the last two are imagined
    reach = 1.96 * each.std() / np.sqrt(6)
    assert np.isclose(score.low, 50 - reach) and np.isclose(score.high, 50 + reach)
    two = made(rows + [[1, 1, 1, 1]] * 3, ['a', 'b']).rg()
    assert list(two.model) == ['a', 'b'] and np.allclose(two['sum'], [150, 300]) and two.low[1] < two.high[1] == 100


def test_published_score():
    published = np.array([88.78, 86.93, 81.25, 77.01, 72.81, 66.58])
    correct = np.arange(10_000) < published[:, None] * 100 - 0.5
    score = made(correct, eps=(0.1, 0.2, 0.3, 0.4, 0.5)).rg()
    assert round(score['sum'][0], 2) == 473.36 and score.low[0] < 473.36 / 6 < score.high[0]


def covered(table, truth) -> float:
    "How often intervals (low, high) hold the truth."
    return np.mean((table[1] <= truth + 1e-9) & (truth <= table[2] + 1e-9))


@pytest.mark.parametrize(
    ('first', 'second', 'n'), [(0.02, 0.0, 50), (0.03, 0.01, 100), (0.1, 0.1, 200), (0.4, 0.1, 30)]
)
def test_intervals_of_differences_hold_what_they_promise(first, second, n):
    draw = np.random.default_rng(0)
    values = draw.choice([1.0, -1.0, 0.0], p=[first, second, 1 - first - second], size=(n, 4000))
    assert covered(_mean(values, (-1, 1)), first - second) > 0.93


@pytest.mark.parametrize(('curve', 'n'), [((1.0, 0.99, 0.98), 50), ((0.95, 0.5, 0.1), 100), ((0.03, 0.01, 0.0), 40)])
def test_intervals_of_scores_hold_what_they_promise(curve, n):
    level = np.random.default_rng(0).random((n, 4000))
    values = sum(100.0 * (level < accuracy) for accuracy in curve) / len(curve)
    found = _mean(values, (0, 100))
    assert covered(found, 100 * np.mean(curve)) > 0.93
    assert (found.low >= 0).all() and (found.high <= 100).all()
    assert ((found.low <= found.value) & (found.value <= found.high)).all()


def test_no_score_without_strengths(net, data):
    def mirror(model, x, y):
        return x.flip(-1)

    with pytest.raises(ValueError, match='mirror has none'):
        evaluate(net, data, [FGSM(0.1), mirror], show_progress=False).rg()
    with pytest.raises(ValueError, match='only 0'):
        evaluate(net, data, FGSM(), [0], show_progress=False).rg()


def test_difference_is_paired():
    a, b = [[1] * 50 + [0] * 50, [1] * 30 + [0] * 70], [[1] * 50 + [0] * 50, [1] * 20 + [0] * 80]
    gap = made([*a, *b], ['a', 'b'], eps=(0.1,)).difference('a', 'b')
    assert list(gap.columns) == ['attack', 'eps', 'difference', 'low', 'high'] and list(gap.attack) == ['clean', 'FGSM']
    assert gap.difference[0] == 0 and np.isclose(gap.low[0], -gap.high[0]), 'the same samples are right, yet only 100'
    assert np.isclose(gap.high[0], 1.96 * np.sqrt(2 / 102 / 102))
    assert np.isclose(gap.difference[1], 0.1) and 0.03 < gap.low[1] < gap.high[1] < 0.18
    attacks = made([a[0], a[1], b[1]], eps=(0.1,), names=('FGSM', 'PGD'))
    assert list(attacks.difference('FGSM', 'PGD').columns) == ['eps', 'difference', 'low', 'high']
    assert np.isclose(attacks.difference('PGD', 'FGSM').difference[0], -0.1)
    with pytest.raises(KeyError, match="no attack 'CW' here; there are clean, FGSM, PGD"):
        attacks.difference('FGSM', 'CW')
    with pytest.raises(ValueError, match='share no strength'):
        attacks.difference('clean', 'PGD')


# ------------------------------------------------------------------------------------------------------ minimal attacks


@dataclass(frozen=True)
class OverTheLine(Attack):
    "The smallest change, in the maximum norm, that takes a sample over the line of a linear model."

    eps: float = np.inf
    minimal: ClassVar[bool] = True
    runs: ClassVar[list] = []

    def run(self, model, x, y, ids=None):
        self.runs.append((len(x), self.eps))
        w, logit = model.weight.detach()[0], model(x)[:, 0].detach()
        wrong = (logit > 0) != y
        size = torch.where(wrong, 0, 1.00001 * logit.abs() / w.abs().sum())
        reached = size <= self.eps
        x_adv = torch.where(reached[:, None], x - (size * logit.sign())[:, None] * w.sign(), x)
        return AttackResult(x_adv, wrong | reached, torch.where(reached, size, 0), -size, {'forward': 1})


@pytest.fixture(scope='module')
def line():
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[2.0, 1.0]]))
        model.bias.fill_(-2.1)
    return model


@pytest.fixture(scope='module')
def plane():
    y = torch.arange(60) % 2
    x = torch.rand(60, 2, generator=torch.Generator().manual_seed(0))
    x[:, 0] += 0.6 * y
    return DataSet(x, y, tuple('ab'), bounds=None)


@pytest.fixture(scope='module')
def distance(line, plane):
    "From the line; negative where a sample is on the wrong side."
    return ((2 * plane.y - 1) * line(plane.x)[:, 0].detach() / 3).numpy()


def test_a_minimal_attack_runs_once_for_all_strengths(line, plane, distance):
    OverTheLine.runs.clear()
    result = evaluate(line, plane, [OverTheLine(), FGSM()], [0, 0.2, 0.05, 0.1], batch_size=25, show_progress=False)
    assert OverTheLine.runs == [(25, 0.2), (25, 0.2), (10, 0.2)]
    table = result.table()
    assert table.accuracy[:4].tolist() == [np.mean(distance > eps) for eps in (0, 0.05, 0.1, 0.2)]
    for row in table[1:4].itertuples():
        assert (result.dataset['correct'].values[row.Index] == (distance > row.eps)).all()
    assert len({line.get_xdata().tolist() == [0, 0.05, 0.1, 0.2] for line in result.plot().axes[0].get_lines()}) == 1


def test_a_minimal_attack_at_its_own_strength(line, plane, distance):
    table = evaluate(line, plane, [OverTheLine(), OverTheLine(0.1)], show_progress=False).table()
    assert table.accuracy[1:].tolist() == [0, np.mean(distance > 0.1)]
    assert len(evaluate(line, plane, OverTheLine(), [0], show_progress=False).table()) == 1


def test_what_a_minimal_attack_claims_is_not_believed(line, plane, distance):
    class Boaster(OverTheLine):
        def run(self, model, x, y, ids=None):
            return AttackResult(x, torch.ones(len(x), dtype=bool), torch.zeros(len(x)), torch.zeros(len(x)), {})

    table = evaluate(line, plane, Boaster(), [0.1], show_progress=False).table()
    assert table.accuracy[1] == table.accuracy[0] == np.mean(distance > 0)


MINIMAL = [DeepFool(), DeepFool(norm=L2()), DeepFool(target=1), CW(steps=20, searches=3), Smallest(PGD(steps=5))]


@pytest.mark.parametrize('attack', MINIMAL, ids=lambda attack: attack.name)
def test_the_minimal_attacks_that_there_are(net, data, attack):
    eps = [0.02, 0.05, 0.1, 0.3] if not isinstance(attack.norm, L2) else [0.1, 0.3, 0.6, 1.5]
    right = evaluate(net, data, attack, eps, show_progress=False).dataset['correct'].values
    assert right[0].mean() == 0.8 and (right[1:] <= right[:-1]).all() and right[1].mean() > right[-1].mean()
    found = attack.run(net, data.x, data.y, data.ids)
    for at, row in zip(eps, right[1:], strict=True):
        small = net(found.x_adv).argmax(1) != data.y
        small &= attack.norm.size(found.x_adv - data.x) <= 1.0001 * at
        if not isinstance(attack, Smallest):  # its search depends on the largest strength
            assert (row == ~(small | (net(data.x).argmax(1) != data.y)).numpy()).all()
            alone = evaluate(net, data, attack, [at], show_progress=False).dataset['correct'].values[-1]
            assert (alone == row).mean() >= 0.95
    at = calibrate(net, data, attack, 0.6, show_progress=False)
    share = evaluate(net, data, at, show_progress=False).table().accuracy[1]
    assert abs(share - 0.6) <= (2.001 if isinstance(attack, Smallest) else 1.001) / 40


def test_transferred_and_joined_minimal_attacks_keep_to_each_strength(nets, data):
    for attack in (Transfer(nets['other'], DeepFool()), WorstOf([DeepFool(), FGSM()])):
        table = evaluate(nets['net'], data, attack, [0.01, 0.3], show_progress=False).table()
        assert table.accuracy[1] > table.accuracy[2], attack.name


# ---------------------------------------------------------------------------------------------------------- calibration


@pytest.mark.parametrize('wanted', [0.7, 0.5, 0.2, 0.0])
def test_calibrated_on_a_line(line, plane, distance, wanted):
    for attack in (FGSM(bounds=None), FGSM(0.001), FGSM(3.0, bounds=None), OverTheLine()):
        found = calibrate(line, plane, attack, wanted, show_progress=False)
        assert abs(np.mean(distance > found.eps) - wanted) <= 1.001 / 60 and type(found) is type(attack)
    OverTheLine.runs.clear()
    assert calibrate(line, plane, OverTheLine(), wanted, batch_size=60, show_progress=False).eps == found.eps
    assert len(OverTheLine.runs) == 1


@pytest.mark.parametrize('attack', [Gaussian(), SaltPepper(), PGD(steps=3), PGD(0.5, steps=3, norm=L2())])
def test_calibrated_attacks_do_what_was_wanted(net, data, attack):
    forms = (
        data,
        (data.x, data.y),
        [(data.x[:15], data.y[:15]), (data.x[15:], data.y[15:])],
        DataLoader(data, batch_size=9),
    )
    found = [calibrate(net, form, attack, 0.7, batch_size=16, show_progress=False) for form in forms]
    assert found[0] == found[1] == found[2] == found[3]
    assert abs(evaluate(net, data, found[0], show_progress=False).table().accuracy[1] - 0.7) <= 1.001 / 40


def test_calibration_in_units_of_a_scale(net, data):
    "With a scale of a twentieth the strength may go up to 20, the whole range."
    scale = torch.full((1, 8, 8), 0.05)
    scale[0, 0] = 0
    for norm in (Linf(0.05), Linf(scale)):
        found = calibrate(net, data, PGD(steps=5, norm=norm), 0.2, show_progress=False)
        assert 1 < found.eps < 20


def test_calibration_takes_the_nearest_that_it_has_seen(line):
    "An accuracy that jumps up and down: 0.55 at 0.1, 0.9 a little above, 0.15 from 0.16 on."

    @dataclass(frozen=True)
    class Fickle(Noise):
        eps: float = 0.1

        def draw(self, x, ids):
            wrong = 9 if abs(self.eps - 0.1) < 1e-6 else 2 if self.eps < 0.16 else 17
            return torch.where(ids[:, None] < wrong, 1 - x, x)

    data = (torch.tensor([[1.0, 1.0], [0.0, 0.0]] * 10), torch.tensor([1, 0] * 10))
    assert calibrate(line, data, Fickle(), 0.48, show_progress=False).eps == pytest.approx(0.1)


@pytest.mark.parametrize('attack', [Poisson(), SaltPepper(0.9), WorstOf([FGSM(), Gaussian()])], ids=lambda a: a.name)
def test_other_fields_of_strength(net, data, attack):
    found = calibrate(net, data, attack, 0.6, show_progress=False)
    assert abs(evaluate(net, data, found, show_progress=False).table().accuracy[1] - 0.6) <= 1.001 / 40


def test_wanted_accuracies_that_cannot_be_had(net, data, line, plane):
    quiet = {'show_progress': False}
    for attack in (FGSM(), OverTheLine()):
        with pytest.raises(ValueError, match='accuracy=0.95 is more than the .* at strength 0'):
            calibrate(*((line, plane) if attack.minimal else (net, data)), attack, 0.95, **quiet)
    with pytest.raises(ValueError, match='more than the .* at strength 0.5'):
        calibrate(net, data, FGSM(), 0.75, low=0.5, **quiet)
    with pytest.raises(ValueError, match='is still .* at strength 0.001'):
        calibrate(net, data, FGSM(), 0.1, high=0.001, **quiet)
    with pytest.raises(ValueError, match='is still .* after the whole search'):
        calibrate(line, plane, OverTheLine(), 0.1, high=0.01, **quiet)
    with pytest.raises(ValueError, match='is still 0.8 at strength'):
        calibrate(net, data, Nothing(), **quiet)


@dataclass(frozen=True)
class Nothing(Noise):
    "A noise that changes nothing, whatever its strength."

    eps: float = 0.1

    def draw(self, x, ids):
        return x


@dataclass(frozen=True)
class Cliff(Noise):
    "Nothing up to a strength of 0.3, and all of it beyond."

    eps: float = 0.1

    def draw(self, x, ids):
        return torch.where(torch.as_tensor(self.eps) > 0.3, 1 - x, x)


def test_calibration_ends_at_a_cliff(line):
    data = (torch.tensor([[1.0, 1.0], [0.0, 0.0]] * 10), torch.tensor([1, 0] * 10))
    found = calibrate(line, data, Cliff(), 0.5, tolerance=0.01, show_progress=False)
    assert abs(found.eps - 0.3) <= 0.01


def test_what_cannot_be_calibrated(net, data):
    def mirror(model, x, y):
        return x.flip(-1)

    for attack, kind, words in [
        (mirror, TypeError, 'strength of a perturbation'),
        (PGD, TypeError, 'strength of a perturbation'),
        (Gaussian(torch.tensor([0.1, 0.2])), TypeError, 'a strength for each value'),
    ]:
        with pytest.raises(kind, match=words):
            calibrate(net, data, attack)
    with pytest.raises(TypeError, match='once for each strength'):
        calibrate(net, iter([(data.x, data.y)]), FGSM())
    for wrong in ({'accuracy': 50}, {'low': -1}, {'low': 0.2, 'high': 0.1}):
        with pytest.raises(ValueError, match='share between|strengths run from'):
            calibrate(net, data, FGSM(), **wrong)
    with pytest.raises(ValueError, match='empty'):
        calibrate(net, (data.x[:0], data.y[:0]), FGSM(), show_progress=False)


# -------------------------------------------------------------------------------------------------------------- records


@dataclass(frozen=True)
class Counted(Gaussian):
    "A noise that counts how often it is drawn."

    calls: ClassVar[list] = []

    def draw(self, x, ids):
        self.calls.append((len(x), self.std))
        return super().draw(x, ids)


@pytest.fixture
def calls():
    Counted.calls.clear()
    return Counted.calls


def recorded(net, data, path, attacks=None, eps=(0.1, 0.2), batch_size=10, **kw):
    attacks = Counted() if attacks is None else attacks
    return evaluate(net, data, attacks, eps, batch_size=batch_size, records=path, show_progress=False, **kw)


def test_nothing_is_computed_twice(nets, data, calls, tmp_path):
    plain = evaluate(nets, data, Counted(), [0.1, 0.2], show_progress=False)
    calls.clear()
    first = recorded(nets, data, tmp_path / 'run.jsonl')
    assert len(calls) == 2 * 2 * 4 and len(Records(tmp_path / 'run.jsonl')) == 2 * 3 * 4
    for store in (tmp_path / 'run.jsonl', str(tmp_path / 'run.jsonl'), Records(tmp_path / 'run.jsonl')):
        again = recorded(nets, data, store)
        assert again.dataset.identical(first.dataset) and again.settings == first.settings and len(calls) == 16
    assert first.dataset.identical(plain.dataset)
    recorded(nets, data, tmp_path / 'run.jsonl', eps=[0.1, 0.2, 0.3])
    assert calls[16:] == [(10, 0.3)] * 8, 'a strength more costs only itself'
    recorded({'new name': nets['other']}, data, tmp_path / 'run.jsonl')
    assert len(calls) == 24, 'a model is known by what it is'


def test_minimal_attacks_are_kept_as_well(line, plane, distance, tmp_path):
    OverTheLine.runs.clear()
    results = [recorded(line, plane, tmp_path / 'run.jsonl', OverTheLine(), batch_size=7) for _ in range(2)]
    assert len(OverTheLine.runs) == 9 and results[0].dataset.identical(results[1].dataset)
    assert results[1].table().accuracy.tolist() == [np.mean(distance > eps) for eps in (0, 0.1, 0.2)]


def change_weight(net, data):
    net[1].weight.data[0, 0] += 1e-6


def change_bias(net, data):
    net[3].bias.data[0] = torch.nextafter(net[3].bias.data[0], torch.tensor(9.0))


def change_activation(net, data):
    net[2] = nn.Tanh()


def change_slope(net, data):
    net[2].slope = 0.5


def add_buffer(net, data):
    net[2].register_buffer('mean', torch.zeros(()), persistent=False)


def add_hook(net, data):
    net[2].register_forward_hook(lambda module, args, output: 2 * output)


def change_image(net, data):
    data.x[3, 0, 0, 0] += 1e-6


def change_label(net, data):
    data.y[3] = (data.y[3] + 1) % 3


def change_id(net, data):
    data.ids[3] = 77


def change_precision(net, data):
    net.double()


CHANGES = [change_weight, change_bias, change_activation, change_slope, add_buffer, add_hook, change_image, change_label,
           change_id, change_precision]  # fmt: skip


@pytest.mark.parametrize('change', CHANGES)
def test_a_change_is_noticed(net, data, calls, tmp_path, change):
    net, data = deepcopy(net), data[:10].to('cpu')
    data = DataSet(data.x.clone(), data.y.clone(), data.classes, ids=data.ids.clone())
    recorded(net, data, tmp_path / 'run.jsonl')
    recorded(deepcopy(net), data, tmp_path / 'run.jsonl')
    assert len(calls) == 2
    change(net, data)
    assert recorded(net, data, tmp_path / 'run.jsonl').dataset.identical(recorded(net, data, None).dataset)
    assert len(calls) == 6


def test_other_settings_are_other_tasks(net, data, calls, tmp_path):
    file, few = tmp_path / 'run.jsonl', data[:10]
    wide = DataSet(few.x, few.y, few.classes, bounds=(0, 2))
    recorded(net, few, file)
    for changed in ({'attacks': Counted(seed=1)}, {'eps': [0.11, 0.21]}, {'attacks': Counted(per_pixel=True)},
                    {'attacks': Counted(bounds=None)}, {'data': wide}, {'logits': 0}):  # fmt: skip
        calls.clear()
        net_and_data = Tuple(net) if 'logits' in changed else net, changed.pop('data', few)
        recorded(*net_and_data, file, **changed)
        assert len(calls) == 2, changed
    net.train()
    net[1].weight.grad = torch.zeros_like(net[1].weight)
    calls.clear()
    recorded(net, few, file)
    net.eval()
    assert not calls, 'mode and gradient do not matter'


class Own(nn.Sequential):
    "A net with a method of its own."

    def forward(self, x):
        return self.twist(super().forward(x))

    def twist(self, z):
        return z


def test_a_method_that_does_something_else_is_noticed(net, data, calls, tmp_path, monkeypatch):
    model, few = Own(*deepcopy(net)), data[:10]
    first = recorded(model, few, tmp_path / 'run.jsonl')
    monkeypatch.setattr(Own, 'twist', lambda self, z: -z)
    assert not recorded(model, few, tmp_path / 'run.jsonl').dataset.identical(first.dataset) and len(calls) == 4

    class Child(Own):
        pass

    recorded(Child(*deepcopy(net)), few, tmp_path / 'run.jsonl')
    assert len(calls) == 6, 'another class is another model'


def slope(model):
    model.slope = 0.5


def buffer(model):
    model.register_buffer('mean', torch.ones(()), persistent=False)


def hook(model):
    model.register_forward_hook(lambda module, args, output: -output)


def blended(surrogate, model, x, y):
    return FGSM(0.1)(surrogate, x, y)


@pytest.mark.parametrize('change', [slope, buffer, hook])
def test_a_change_of_a_surrogate_is_noticed(net, data, tmp_path, change):
    def inside(surrogate):
        return lambda model, x, y: FGSM(0.1)(surrogate, x, y)

    for place, made in enumerate(
        (
            lambda net: Transfer(net, FGSM(0.1)),
            lambda net: WorstOf([Transfer(net, FGSM(0.1)), FGSM(0.1)]),
            inside,
            lambda net: partial(blended, net),
        )
    ):
        surrogate, file = deepcopy(net), tmp_path / f'{place}.jsonl'
        attack = made(surrogate)
        for _ in range(2):
            recorded(net, data[:10], file, {'it': attack}, eps=None)
            assert len(Records(file)) == 2
        change(surrogate)
        recorded(net, data[:10], file, {'it': attack}, eps=None)
        assert len(Records(file)) == 3


@pytest.mark.parametrize(
    ('attack', 'other'),
    [
        (Smallest(PGD(steps=2), tries=2), Smallest(PGD(steps=2, seed=1), tries=2)),
        (Smallest(PGD(steps=2), tries=2), Smallest(PGD(steps=3), tries=2)),
        (WorstOf([FGSM(), Gaussian()]), WorstOf([FGSM(), Gaussian(seed=1)])),
        (WorstOf([FGSM(), Gaussian()]), WorstOf([FGSM(loss='margin'), Gaussian()])),
        (PGD(steps=2), PGD(steps=2, random_start=False)),
        (APGD(steps=2), APGD(steps=2, norm=Linf(0.5))),
    ],
)
def test_settings_inside_settings_count(net, data, tmp_path, attack, other):
    for tried, lines in ((attack, 2), (attack, 2), (other, 3)):
        recorded(net, data[:10], tmp_path / 'run.jsonl', tried, eps=[0.1])
        assert len(Records(tmp_path / 'run.jsonl')) == lines


def test_a_scripted_model_is_known_again(net, data, calls, tmp_path):
    scripted = torch.jit.script(net)
    for _ in range(2):
        recorded(scripted, data[:10], tmp_path / 'run.jsonl')
    assert len(calls) == 2


class Tuple(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x), self.net(x).flip(1)


def test_which_output_is_part_of_the_model(net, data, tmp_path):
    results = [recorded(Tuple(net), data, tmp_path / 'run.jsonl', FGSM(), logits=i).table().accuracy[0] for i in (0, 1)]
    assert results[0] == 0.8 and results[0] != results[1]


@pytest.mark.parametrize('batch_size', [1, 7, 40])
def test_batch_size_does_not_matter_with_records(net, data, tmp_path, batch_size):
    first = recorded(net, data, tmp_path / 'run.jsonl', eps=[0.3])
    again = recorded(net, data, tmp_path / 'run.jsonl', eps=[0.3], batch_size=batch_size)
    assert first.dataset.identical(again.dataset)


def dice(model, x, y):
    "A function without a seed, in a process that is slower than another one."
    if not NOW.thrown:
        NOW.thrown.append(None)
        NOW.thrown.append(again())
    NOW.thrown.append(None)
    return x if len(NOW.thrown) > 2 else 1 - x


NOW = SimpleNamespace(thrown=[], on_file=[])  # lists of their own would be a part of what `dice` is


def again():
    return recorded(*NOW.on_file, dice, eps=None)


def test_functions_with_dice_agree_with_the_file(net, data, tmp_path):
    NOW.on_file, NOW.thrown = [net, data[:10], tmp_path / 'run.jsonl'], []
    outer = again()
    inner = next(found for found in NOW.thrown if found is not None)
    assert outer.dataset.identical(inner.dataset) and len(Records(tmp_path / 'run.jsonl')) == 2
    assert outer.table().accuracy[1] != outer.table().accuracy[0], (
        'the faster one turned the images round, and that holds'
    )


RUN = """
import sys, time
from pathlib import Path
import torch
from torch import nn
from robustnb.data import DataSet
from robustnb.devices import seeded
from robustnb.evaluation import evaluate
from robustnb.noises import Gaussian

def slowly(model, x, y):
    with (FOLDER / 'calls').open('a') as file:
        file.write('.')
    time.sleep(float(sys.argv[2]))  # read here, since a global value would belong to the settings
    return x.flip(-1)

with seeded(0):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3))
x = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(1))
data = DataSet(x, torch.arange(40) % 3, tuple('abc'))
FOLDER = Path(sys.argv[1])
result = evaluate(net, data, {'slowly': slowly, 'noise': Gaussian(0.5)}, batch_size=4, records=FOLDER / 'run.jsonl',
                  show_progress=False)
print(result.dataset['correct'].values.astype(int).tolist())
"""


def start(folder, pause: float) -> subprocess.Popen:
    (folder / 'run.py').write_text(RUN)
    return subprocess.Popen([sys.executable, 'run.py', '.', str(pause)], cwd=folder, text=True, stdout=subprocess.PIPE)


def here(folder, pause: float, monkeypatch) -> str:
    "The same in this process."
    (folder / 'run.py').write_text(RUN)
    monkeypatch.setattr(sys, 'argv', ['run.py', str(folder), str(pause)])
    return str(
        runpy.run_path(str(folder / 'run.py'), run_name='__main__')['result']
        .dataset['correct']
        .values.astype(int)
        .tolist()
    )


def test_killed_and_started_again(tmp_path, monkeypatch):
    calls, whole = tmp_path / 'calls', tmp_path / 'whole'
    whole.mkdir()
    process, deadline = start(tmp_path, 0.2), time.monotonic() + 60
    undisturbed = here(whole, 0, monkeypatch)
    while not (calls.exists() and calls.stat().st_size >= 4) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    killed, kept = calls.stat().st_size, len(Records(tmp_path / 'run.jsonl'))
    assert 4 <= killed < 10 and kept >= 3 * (killed - 1)
    two = [start(tmp_path, 0.01), start(tmp_path, 0.01)]  # at once on one file
    for process in two:
        words, _ = process.communicate(timeout=120)
        assert process.returncode == 0 and words.strip() == undisturbed
    assert len(Records(tmp_path / 'run.jsonl')) == 3 * 10
    assert calls.stat().st_size - killed <= 2 * (10 - (killed - 1)), 'no batch that was kept is attacked again'
    before = calls.stat().st_size
    assert here(tmp_path, 5, monkeypatch) == undisturbed and calls.stat().st_size == before
