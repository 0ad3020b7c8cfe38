"""Evaluation against counting by hand."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from robustnb.attacks import FGSM, PGD
from robustnb.data import DataSet
from robustnb.devices import seeded
from robustnb.evaluation import Evaluation, accuracy, evaluate
from robustnb.noises import Gaussian


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
