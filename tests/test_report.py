"""The page, its words, and the command that writes it."""

import re

import pandas as pd
import pytest
import torch
from torch import nn

from robustnb import cli
from robustnb.attacks import PGD
from robustnb.cli import STOPS, Stop, main, tour
from robustnb.data import DataSet
from robustnb.devices import seeded
from robustnb.report import Report, Section, _masking_words, full_report


@pytest.fixture(scope='module')
def report():
    with seeded(0):
        net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3), nn.ReLU(), nn.Linear(3, 3))
    x = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    data = DataSet(x, torch.arange(20) % 3, ('<b>cat</b>', 'dog', 'eel'))
    return full_report(net, data, PGD(0.1, steps=2), eps=[0.05, 0.1], title='A & B', show_progress=False)


def test_page_is_whole_and_self_contained(report, tmp_path):
    page = report.save(tmp_path / 'deep' / 'page.html').read_text('utf-8')
    assert page.count('<img ') == page.count('src="data:image/png;base64,') == 3
    assert not re.search(r'https?://|<script|<link|@import|url\(', page)
    assert '<h1>A &amp; B</h1>' in page and '<b>cat' not in page
    assert [p.name for p in (tmp_path / 'deep').iterdir()] == ['page.html'], 'no draft is left'
    assert all(alt for alt in re.findall(r'alt="([^"]*)"', page))


def test_every_number_in_the_words_is_in_a_table(report):
    accuracy, profile = report.results['accuracy'].table(), report.results['profile'].table()
    shares = {f'{v:.1%}' for column in ('accuracy', 'low', 'high') for v in accuracy[column]}
    words = ' '.join(report.sections[0].words)
    assert set(re.findall(r'\d+\.\d%', words)) <= shares
    heights = {f'{v:.2f}' for v in profile['mean']} | {f'{v:.2f}' for v in report.results['profile'].sizes().input_change}
    words = ' '.join(report.sections[2].words[1:2])
    assert set(re.findall(r'\d\.\d\d', words)) <= heights


def test_masked_gradients_are_named():
    def table(pgd):
        rows = [('FGSM', 0.1, 0.2, 0.15, 0.25), ('PGD-20', 0.1, pgd, pgd - 0.05, pgd + 0.05)]
        return pd.DataFrame(rows, columns=['attack', 'eps', 'accuracy', 'low', 'high'])

    assert 'masked gradients' in _masking_words(table(0.6))[0]
    assert _masking_words(table(0.1)) == [] and _masking_words(table(0.22)) == []


def test_vectors_have_no_pictures():
    with seeded(0):
        net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    found = full_report(net, (torch.rand(12, 4), torch.arange(12) % 2), PGD(0.1, steps=1), eps=[0.1], show_progress=False)
    assert [s.title for s in found.sections] == ['Where it breaks', 'Which layers let it through', 'Settings']


def test_sections_are_escaped():
    table = pd.DataFrame({'<i>': ['<u>']})
    page = Report('t', [Section('<b>', ['a < b'], tables=[table])]).html()
    assert '<b>' not in page and '<u>' not in page and 'a &lt; b' in page


def test_command(tmp_path, capsys, monkeypatch):
    assert main(['env']) == 0 and 'torch' in capsys.readouterr().out
    monkeypatch.setitem(STOPS, 'digits', Stop('digits_cnn', {'size': 28}, train=200, test=20, epochs=1, eps=0.1))
    assert main(['tour', '--out', str(tmp_path)]) == 0
    assert 'Where it breaks' in capsys.readouterr().out
    assert {p.name for p in tmp_path.iterdir()} == {'digits.html', 'digits-accuracy.safetensors', 'digits-profile.safetensors'}
    assert main(['tour', '--out', str(tmp_path), '--quiet']) == 0 and capsys.readouterr().out == ''
    assert not cli.logging.getLogger('robustnb').handlers, 'the logger is as before'
    with pytest.raises(SystemExit):
        main(['walk'])


@pytest.mark.data
def test_tour_on_mnist(data_root, monkeypatch):
    monkeypatch.setitem(STOPS, 'mnist', Stop('lsa_model_b', {}, train=500, test=20, epochs=1, eps=0.2))
    assert len(tour('mnist', data_root, show_progress=False).sections) == 4


@pytest.mark.parametrize(('noise', 'attack'), [('Gaussian(0.1)', 'FGSM(0.1)'), ('SaltPepper(0.1)', 'PGD(0.1, steps=1)')])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_any_pair_and_precision(noise, attack, dtype):
    from robustnb import attacks, noises

    with seeded(0):
        net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).to(dtype)
    noise, attack = (eval(p, vars(noises) | vars(attacks)) for p in (noise, attack))
    data = DataSet(torch.rand(9, 1, 8, 8), torch.arange(9) % 3, ('a', '$b$', r'$\c'))  # fewer names than outputs
    found = full_report(net, data, attack, noise, eps=[0.1], show_progress=False)
    assert set(found.results['profile'].perturbations) == {noise.name, attack.name, 'FGSM', 'SaltPepper'}
    with pytest.raises(TypeError, match='takes perturbations'):
        full_report(net, data, attack=lambda m, x, y: x, show_progress=False)
