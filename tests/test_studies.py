"""The studies against literal re-implementations, golden cases, and what a user can do wrong; and `robustnb run`."""

import json
import logging
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from robustnb import studies
from robustnb.attacks import FGSM, PGD
from robustnb.attribution import relevance
from robustnb.cli import example, main, run_study
from robustnb.coverage import CRITERIA, KMNC, assess
from robustnb.data import from_arrays
from robustnb.devices import sample_normal, seeded
from robustnb.idc import IDC
from robustnb.lrp import LRP
from robustnb.models import save
from robustnb.results import Result
from robustnb.stats import pielou
from robustnb.studies import (
    STUDIES,
    adversarial_pruning,
    correlation,
    critical_units,
    diversity,
    fragility,
    important_pixels,
    ncov,
    noisy_pixels,
    other_pixels,
    overhead,
    sensitivity,
    study_criteria,
)

GOLDEN = {
    case['id']: case for case in json.loads((Path(__file__).parent / 'golden' / 'coverage.json').read_text())['cases']
}
SILENT = {'show_progress': False}
BRIEF = {'eps': 0.1, 'attack_steps': 1, 'epochs': 2, 'tuning_epochs': 1, 'start_epochs': 1, 'judge_steps': 2,
         'batch_size': 32, 'mask_lr': 0.2}
FEW = ['NC', 'KMNC', 'TKNP', {'criterion': 'IDC', 'm': 4, 'k': 2}]


@pytest.fixture(scope='module')
def data():
    "Four classes of 8x8 images: a bright quarter, in noise."
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(240) % 4
    x = 0.45 * torch.rand(240, 1, 8, 8, generator=generator)
    for i, label in enumerate(y.tolist()):
        x[i, 0, 4 * (label // 2) : 4 * (label // 2) + 4, 4 * (label % 2) : 4 * (label % 2) + 4] += 0.2
    return from_arrays(x, y, bounds=(0, 1))


@pytest.fixture(scope='module')
def model(data):
    "A small network that has learned them, with a batch normalisation."
    with seeded(1):
        net = nn.Sequential(
            nn.Conv2d(1, 5, 3),
            nn.BatchNorm2d(5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(45, 12),
            nn.ReLU(),
            nn.Linear(12, 4),
        )
        optimizer = torch.optim.Adam(net.parameters(), 0.02)
        for _ in range(60):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(data.x), data.y).backward()
            optimizer.step()
    return net.eval()


@pytest.fixture(scope='module')
def halves(data):
    return data[:120], data[120:]


# ------------------------------------------------------------------------------------------------------------- golden


def test_golden_mask():
    case = GOLDEN['rq2_mask']
    scores = torch.zeros(case['inputs']['shape'])
    for row, column, value in case['inputs']['attribution_nonzero']:
        scores[0, 0, row, column] = value
    mask = important_pixels(scores, case['params']['k'])
    assert mask.nonzero().tolist() == case['expected']['WISDOM']
    others = other_pixels(mask, torch.tensor([3]))
    assert others.sum() == 1 and not (mask & others).any()


def test_golden_ncov():
    case = GOLDEN['ncov']
    clean, suites = case['inputs']['clean'], np.array(case['inputs']['suites'])
    defined, published = case['expected'].values()
    assert ncov(clean, suites) == pytest.approx(defined)
    assert np.abs(suites - clean) / clean == pytest.approx(published)


@pytest.mark.parametrize('name', ['pielou_0', 'pielou_1', 'pielou_2'])
def test_golden_pielou(name):
    case = GOLDEN[name]
    published, defined = case['expected'].values()
    assert pielou(case['inputs'], case['params']['classes']) == pytest.approx(defined)
    assert pielou(case['inputs'], case['params']['classes'], present_only=True) == pytest.approx(published)


# ----------------------------------------------------------------------------------------------------------- the parts


def test_ncov_of_nothing_and_of_one():
    assert ncov(0.5, [0.5, 0.5]).tolist() == [0, 0]
    assert np.isnan(ncov(0.5, [0.6])).all(), 'a single change has no spread'
    assert ncov(0.5, [0.6, np.nan, 0.5])[[0, 2]].tolist() == [1, 0]


@pytest.mark.parametrize('share, count', [(0.02, 1), (0.1, 3), (0.3, 9), (0.31, 10), (0.5, 15)])
def test_masks_by_hand(share, count):
    scores = torch.randn(4, 3, 2, 5, generator=torch.Generator().manual_seed(0))
    mask = important_pixels(scores, share)
    others = other_pixels(mask, torch.arange(4), seed=1)
    for i in range(4):
        ranked = np.argsort(-np.abs(scores[i].numpy().ravel()), kind='stable')[:count]
        assert set(np.flatnonzero(mask[i].numpy())) == set(ranked)
    assert (others.sum((1, 2, 3)) == count).all() and not (others & mask).any()
    assert others.equal(torch.cat([other_pixels(mask[i : i + 1], torch.tensor([i]), seed=1) for i in range(4)]))
    assert share == 0.5 or not others.equal(other_pixels(mask, torch.arange(4), seed=2))


def test_masks_that_leave_too_little():
    with pytest.raises(ValueError, match='only 24 others are left'):
        important_pixels(torch.rand(2, 1, 7, 7), 0.5)
    uneven = torch.zeros(3, 1, 2, 4, dtype=torch.bool)
    uneven[0, 0, 0, :3], uneven[1, 0, 0, :1], uneven[2, 0, :, :3] = True, True, True
    others = other_pixels(uneven, torch.arange(3))
    assert others.sum((1, 2, 3)).tolist() == [3, 1, 2] and not (others & uneven).any()


def test_other_pixels_are_drawn_evenly():
    mask = torch.zeros(3000, 1, 1, 8, dtype=torch.bool)
    mask[..., :2] = True
    often = other_pixels(mask, torch.arange(3000)).float().mean(0).flatten()
    assert (often[:2] == 0).all() and (often[2:] - 1 / 3).abs().max() < 0.04


def test_noise_only_where_it_belongs(data):
    x, ids = data.x[:20], data.ids[:20]
    mask = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < 0.2
    noisy = noisy_pixels(x, mask, ids, sigma=0.5, seed=3, stream=2)
    assert noisy[~mask].equal(x[~mask])
    by_hand = (x + 0.5 * sample_normal((1, 8, 8), ids, 3, 2)).clamp(0, 1)
    assert noisy[mask].equal(by_hand[mask]) and 0 <= noisy.min() and noisy.max() <= 1
    assert noisy_pixels(x, mask, ids, bounds=None).min() < 0


def test_all_criteria_with_their_settings():
    found = study_criteria()
    assert set(CRITERIA) <= set(found) and {'IDC signed', 'IDC per layer'} <= set(found)
    assert found['IDC per layer'].per == 'layer' and found['IDC signed'].how == 'signed'


def test_a_pool_is_the_same_as_a_pass(model, halves):
    train, test = halves
    criteria = ['NC', 'KMNC', 'NBC', 'TKNC', 'TKNP', 'CC', 'NLC', 'LSC', 'DSC', 'MDSC', IDC(4, k=2)]
    coverage = studies._coverage(model, criteria, 'weights', 'mean', 32)
    coverage.learn(train)
    pool = studies._Pool(coverage)
    with studies.progress(None, '', show=False) as bar:
        pool.add(test, bar)
    rows = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[:70]
    direct = assess(model, train, test[rows], criteria, batch_size=32, **SILENT).dataset['value'].values[0]
    assert list(pool.values(rows).values()) == pytest.approx(direct, rel=1e-6)


# --------------------------------------------------------------------------------------------------------- the studies


def zeroed(model: nn.Module, units: dict) -> nn.Module:
    "The network with the rows of some units set to zero, as the published code does."
    other = deepcopy(model)
    for name, some in units.items():
        layer = other.get_submodule(name)
        layer.weight.data[some], layer.bias.data[some] = 0, 0
    return other


def literal_top(scores: dict, m: int) -> dict:
    "The best m units of all layers but the last."
    units = [(float(v), name, i) for name, values in list(scores.items())[:-1] for i, v in enumerate(values)]
    found: dict = {}
    for _, name, i in sorted(units, key=lambda unit: -unit[0])[:m]:
        found.setdefault(name, []).append(i)
    return found


def test_critical_units_literally(model, halves):
    train, test = halves
    found = critical_units(model, train, test, 'lrp', (2, 4), ('signed', 'relative'), draws=3, **SILENT)
    scored, table = relevance(model, train, 'lrp', **SILENT), found.table()
    before = (model(test.x).argmax(1) == test.y).double().mean()
    assert found.settings['accuracy'] == pytest.approx(float(before))
    for _, row in table.iterrows():
        units = literal_top(scored.scores(row['how']), row['m'])
        after = (zeroed(model, units)(test.x).argmax(1) == test.y).double().mean()
        assert row['drop'] == pytest.approx(float(before - after)) and row['low'] <= row['drop'] <= row['high']
        assert row['units'] == ', '.join(f'{name} {len(units[name])}' for name in scored.layers if name in units)
    assert not table['units'].str.contains('7').any(), 'the last layer is left out'


def test_controls(model, halves, monkeypatch):
    tried, whole = [], studies._Trials.measured
    monkeypatch.setattr(studies._Trials, 'measured', lambda self, units: tried.append(units) or whole(self, units))
    found = critical_units(model, *halves, 'lrp', (3, 6), 'relative', draws=4, **SILENT)
    assert len({repr(units) for units in tried}) == len(tried), 'each set of units is tried once'
    sizes = {'0': 5, '5': 12}
    for m in (3, 6):
        counts = {name: len(some) for name, some in found.settings['units']['lrp relative'][str(m)].items()}
        for draw in range(4):
            fair, free = studies._fair_units(sizes, counts, 0, draw), studies._random_units(sizes, m, 0, draw)
            assert {name: len(some) for name, some in fair.items()} == counts
            assert sum(map(len, free.values())) == m and all(max(some) < sizes[name] for name, some in free.items())
            after = (zeroed(model, fair)(halves[1].x).argmax(1) == halves[1].y).double().mean()
            drop = float(found.dataset['fair'].sel(choice='lrp relative', m=m)[draw])
            assert drop == pytest.approx(found.settings['accuracy'] - float(after))


def test_random_units_are_drawn_evenly():
    draws = [studies._random_units({'a': 3, 'b': 7}, 4, 0, draw) for draw in range(600)]
    often = np.array(
        [[i in d.get(name, ()) for name, size in (('a', 3), ('b', 7)) for i in range(size)] for d in draws]
    )
    assert np.abs(often.mean(0) - 0.4).max() < 0.08


def test_votes_and_their_file_are_methods(model, halves, tmp_path):
    from robustnb.voting import vote

    votes = vote(model, halves[0], ['lrp', 'lgxa'], m=4, batch_size=40, **SILENT)
    votes.to_csv(tmp_path / 'mine.csv')
    how = {'ms': (2, 3), 'draws': 2, **SILENT}
    one = critical_units(model, *halves, [votes, 'lgxa'], **how).table()
    two = critical_units(model, *halves, ['lgxa', str(tmp_path / 'mine.csv')], **how).table()
    assert set(one['method']) == {'lgxa', 'votes'} and set(two['method']) == {'lgxa', 'mine'}
    drops = [table[~table['method'].isin(['lgxa'])]['drop'].tolist() for table in (one, two)]
    assert drops[0] == drops[1]
    chosen = diversity(
        model,
        *halves,
        {'IDC votes': {'criterion': 'IDC', 'm': 3, 'k': 2, 'units': str(tmp_path / 'mine.csv')}},
        iterations=2,
        **SILENT,
    )
    assert chosen.table()['U_O'].item() > 0


def test_votes_of_one_name_are_not_lost(model, halves):
    from robustnb.voting import vote

    one, two = (vote(model, halves[0], [method], m=4, batch_size=40, **SILENT) for method in ('lrp', 'la'))
    how = {'ms': (2,), 'draws': 2, **SILENT}
    with pytest.raises(ValueError, match="two choices of units are called 'votes'"):
        critical_units(model, *halves, [one, two], **how)
    assert set(critical_units(model, *halves, {'one': one, 'two': two}, **how).table()['method']) == {'one', 'two'}


def test_fair_control_of_votes_for_the_last_layer(model, halves, tmp_path):
    (tmp_path / 'last.csv').write_text('LayerName,NeuronIndex,Score\n7,1,9\n5,3,8\n')
    found = critical_units(model, *halves, str(tmp_path / 'last.csv'), (2,), draws=5, **SILENT)
    sizes, counts = {'0': 5, '5': 12, '7': 4}, {'7': 1, '5': 1}
    for draw, drop in enumerate(found.dataset['fair'].values[0, 0]):
        units = studies._fair_units(sizes, counts, 0, draw)
        assert {name: len(some) for name, some in units.items()} == counts
        after = (zeroed(model, units)(halves[1].x).argmax(1) == halves[1].y).double().mean()
        assert drop == pytest.approx(found.settings['accuracy'] - float(after))


def test_critical_units_resume(model, halves, tmp_path, monkeypatch):
    how = {'methods': 'lrp', 'ms': (2,), 'draws': 2, 'records': tmp_path / 'done.jsonl', **SILENT}
    first = critical_units(model, *halves, **how)
    monkeypatch.setattr(studies._Trials, 'measured', lambda *_: pytest.fail('it was done already'))
    again = critical_units(model, *halves, **how)
    assert first.table().equals(again.table())


def test_interruption_keeps_what_was_done(model, halves, monkeypatch, caplog):
    whole, count = studies._Trials.right, []

    def right(self, units):
        count.append(units)
        if len(count) == 4:
            raise KeyboardInterrupt
        return whole(self, units)

    monkeypatch.setattr(studies._Trials, 'right', right)
    found = critical_units(model, *halves, 'lrp', (2, 3), 'signed', draws=2, **SILENT).table()
    assert found['drop'].notna().all() and found['random'].isna().all() and found['fair'].isna().all()
    assert 'interrupted; the result holds the 2 cases' in caplog.text


def test_diversity_literally(model, halves):
    train, test = halves
    found = diversity(model, train, test, [*FEW], share=0.05, sigma=0.4, iterations=2, seed=5, **SILENT)
    scores = LRP()(model, test.x, inputs=True)['inputs'].abs().flatten(1)
    mask = torch.zeros(len(test), 64, dtype=torch.bool)
    for i in range(len(test)):
        mask[i, np.argsort(-scores[i].numpy(), kind='stable')[:4]] = True  # 3.2, rounded up
    mask = mask.view(test.x.shape)
    suites = {}
    for number in range(2):
        noise = 0.4 * sample_normal((1, 8, 8), test.ids, 5, 2 * number)
        for name, where in (('U_IO', mask), ('U_RO', other_pixels(mask, test.ids, 5, 2 * number + 1))):
            x = torch.where(where, (test.x + noise).clamp(0, 1), test.x)
            suites[name, number] = torch.cat([test.x, x]), torch.cat([test.y, test.y])
    criteria = studies._criteria([*FEW])
    wanted = assess(model, train, {str(key): one for key, one in suites.items()} | {'U_O': test}, criteria, **SILENT)
    for (name, number), _ in suites.items():
        got = found.dataset['value'].sel(suite=name).isel(iteration=number).values
        assert got == pytest.approx(wanted.dataset['value'].sel(suite=str((name, number))).values)
    assert found.dataset['value'].sel(suite='U_O').isel(iteration=0).values == pytest.approx(
        wanted.dataset['value'].sel(suite='U_O').values
    )
    assert found.settings['pixels'] == 4
    table = found.table()
    assert table['difference'].values == pytest.approx((table['U_IO'] - table['U_RO']).values)
    assert set(table['U_IO > U_RO']) <= {'yes', 'no, less', 'undecided', 'no difference'}


def test_diversity_with_other_images_each_time(model, halves):
    value = diversity(model, *halves, ['KMNC'], iterations=3, size=30, **SILENT).dataset['value']
    assert len(set(value.sel(suite='U_O').values.ravel().tolist())) == 3


def test_sensitivity_literally(model, halves):
    train, test = halves
    attack = PGD(0.3, steps=5)
    found = sensitivity(model, train, test, [*FEW], (20, 40), (0.1, 0.25), {'PGD': attack}, runs=2, seed=3, **SILENT)
    right = test[model(test.x).argmax(1) == test.y]
    x_adv = attack(model, right.x, right.y, right.ids)
    fooled = model(x_adv).argmax(1) != right.y
    suites = {}
    for run in range(2):
        order = np.random.default_rng((3, run)).permutation(len(right))
        for size in (20, 40):
            rows = order[:size]
            suites[f'{run} {size} clean'] = right[rows]
            for rate in (0.1, 0.25):
                bad = [row for row in rows if fooled[row]][: round(rate * size)]
                assert len(bad) == round(rate * size), 'a strong attack'
                x = torch.stack([x_adv[row] if row in bad else right.x[row] for row in rows])
                suites[f'{run} {size} {rate}'] = x, right.y[rows]
    wanted = assess(model, train, suites, studies._criteria([*FEW]), **SILENT).dataset['value']
    data = found.dataset
    for run in range(2):
        for size in (20, 40):
            clean = wanted.sel(suite=f'{run} {size} clean').values
            assert data['clean'].isel(run=run).sel(size=size).values == pytest.approx(clean)
            mixed = np.stack([wanted.sel(suite=f'{run} {size} {rate}').values for rate in (0.1, 0.25)], axis=1)
            assert data['mixed'].isel(run=run, attack=0).sel(size=size).values == pytest.approx(mixed)
            for c, before in enumerate(clean):
                assert data['ncov'].isel(run=run, attack=0, criterion=c).sel(size=size).values == pytest.approx(
                    ncov(before, mixed[c]), nan_ok=True
                )
    table = found.table()
    one = table.query('criterion == "KMNC" and size == 40 and rate == 0.25').iloc[0]
    pair = data[['clean', 'mixed']].sel(criterion='KMNC', size=40).isel(attack=0, rate=1, missing_dims='ignore')
    assert one['published'] == pytest.approx(float((abs(pair['mixed'] - pair['clean']) / pair['clean']).mean()))


def test_weak_attacks_are_reported(model, halves, caplog):
    found = sensitivity(model, *halves, ['NC'], (40,), (0.1,), [FGSM(0.3), PGD(1e-4, steps=1)], runs=2, **SILENT)
    attacks, table = found.attacks().set_index('attack'), found.table().set_index('attack')
    assert attacks['suites without a value'].tolist() == [0, 2] and attacks.loc['PGD-1', 'fooled'] < 4
    assert np.isnan(table.loc['PGD-1', 'mixed']) and np.isfinite(table.loc['FGSM', 'mixed'])
    assert 'PGD-1 fools only' in caplog.text and 'in 2 of 2 runs' in caplog.text


def test_a_run_without_a_value_does_not_hide_the_others(model, halves, monkeypatch, caplog):
    whole = studies._replaced

    def replaced(victims, orders, plan, rates):
        found = whole(victims, orders, plan, rates)
        return found | {(1, 20, 'FGSM', 0.2): found[1, 20, 'FGSM', 0.2][:1]}

    how = CALLS['sensitivity'] | {'runs': 3}
    full = sensitivity(model, *halves, **how, **SILENT).table().query('rate == 0.2')
    monkeypatch.setattr(studies, '_replaced', replaced)
    found = sensitivity(model, *halves, **how, **SILENT)
    table = found.table().query('rate == 0.2')
    assert set(full['runs']) == {3} and set(table['runs']) == {2} and table['change'].notna().all()
    one = found.dataset.isel(run=[0, 2]).sel(criterion='KMNC', size=20, attack='FGSM', rate=0.2)
    gap = one['mixed'].values - one['clean'].values
    assert table.iloc[1]['change'] == pytest.approx(gap.mean()) and table.iloc[1]['low'] < gap.min()


def test_runs_that_share_images_are_named(model, halves, caplog):
    sensitivity(model, *halves, **CALLS['sensitivity'], **SILENT)
    assert 'share' not in caplog.text
    sensitivity(model, *halves, **CALLS['sensitivity'] | {'sizes': (90,)}, **SILENT)
    assert 'suites of 90 of the same' in caplog.text and 'too narrow' in caplog.text


def test_correlation_literally(model, halves):
    train, test = halves
    attack = FGSM(0.2)
    found = correlation(model, train, test, [*FEW], (20, 40), 6, attack, seed=2, **SILENT)
    x_adv, data = attack(model, test.x, test.y, test.ids), found.dataset
    suites, even = {}, []
    mixtures = studies._mixtures(test.y.numpy(), 4, [20, 40], 6, 2)
    for number, (size, mix, rows) in enumerate(mixtures):
        assert len(set(rows.tolist())) == len(rows) == size
        assert mix == 'mixed' or np.bincount(test.y[rows], minlength=4).tolist() == [size // 4] * 4
        for kind, x in (('clean', test.x), ('FGSM', x_adv)):
            suites[f'{number} {kind}'] = x[rows], test.y[rows]
            share = np.bincount(model(x[rows]).argmax(1).numpy(), minlength=4) / size
            even.append(-sum(p * np.log(p) for p in share if p) / np.log(4))
    wanted = assess(model, train, suites, studies._criteria([*FEW]), **SILENT).dataset['value'].values.T
    assert data['value'].values == pytest.approx(wanted) and data['evenness'].values == pytest.approx(even)
    for _, row in found.table().iterrows():
        some = (
            (data['kind'] == row['kind']).values
            & (data['size'] == row['size']).values
            & (data['mix'] == 'mixed').values
        )
        values = data['value'].sel(criterion=row['criterion']).values[some]
        if np.ptp(values):
            assert row['r'] == pytest.approx(np.corrcoef(values, np.array(even)[some])[0, 1])
        else:
            assert np.isnan(row['r'])
        assert row['suites'] == 6
    assert set(found.published()['suites']) == {2, 4}


def test_mixes_cover_the_range(data):
    y = data.y.numpy()
    even = [pielou(y[rows], 4) for _, mix, rows in studies._mixtures(y, 4, [50], 60, 0) if mix == 'mixed']
    assert min(even) < 0.35 and max(even) > 0.97
    rows = studies._mix(y, 200, np.array([1.0, 0, 0, 0]), np.random.default_rng(0))
    assert np.bincount(y[rows])[0] == 60 and len(set(rows)) == 200, 'others fill up where a class has too few'


def test_overhead(model, halves):
    given = IDC(4, k=2)
    found = overhead(model, *halves, ['KMNC', given], batch_sizes=(32, 64), **SILENT)
    table = found.table()
    assert table['batch_size'].tolist() == [32] * 3 + [64] * 3
    assert table['criterion'].tolist() == ['(forward pass)', 'KMNC', 'IDC'] * 2
    assert (table[['learn', 'assess', 'learn wall', 'assess wall']] >= 0).all(axis=None)
    learn = found.dataset['learn wall']
    assert (learn.sel(criterion='IDC') > 0.5 * learn.sel(criterion='KMNC')).all(), 'also at the second batch size'
    assert given.train is None, 'nothing is kept'


def timeless(table):
    "A table without the columns that a clock has measured."
    return table.drop(columns=[name for name in table if 'seconds' in name])


CALLS = {
    'critical_units': {'methods': 'lrp', 'ms': (2, 4), 'draws': 2},
    'diversity': {'criteria': FEW, 'iterations': 2},
    'sensitivity': {'criteria': FEW, 'sizes': (20,), 'rates': (0.1, 0.2), 'attacks': FGSM(0.3), 'runs': 2},
    'correlation': {'criteria': FEW, 'sizes': (20,), 'suites': 5, 'attack': None},
    'overhead': {'criteria': ['KMNC'], 'batch_sizes': (64,)},
    'fragility': {'attacks': FGSM(0.05), 'filters': ['high', 'pulse'], 'thresholds': 4},
    'adversarial_pruning': {'methods': ['AT', 'ANP-VS'], 'changes': BRIEF},
}


@pytest.mark.parametrize('name', STUDIES)
def test_each_study_is_a_whole_result(name, model, halves, tmp_path):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.train()
    first = STUDIES[name](model, *halves, **CALLS[name], **SILENT)
    assert model.training and not any(m._forward_hooks for m in model.modules())
    model.eval()
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())
    first.save(tmp_path / 'one.safetensors')
    again = Result.load(tmp_path / 'one.safetensors')
    assert type(again) is type(first) and again.table().equals(first.table())
    assert again.plot().axes
    if name != 'overhead':
        size = {} if name == 'adversarial_pruning' else {'batch_size': 50}  # there it is one of the plan, and of the training
        same = STUDIES[name](model, *halves, **CALLS[name], **size, **SILENT)
        assert np.allclose(*(timeless(r.table()).select_dtypes('number').values for r in (first, same)), equal_nan=True)
        other = STUDIES[name](model, *halves, **CALLS[name], seed=9, **SILENT)
        values = [timeless(r.table()).select_dtypes('number').values for r in (first, other)]
        assert not np.array_equal(*values, equal_nan=True)


def test_any_form_of_data(model, halves):
    train, test = halves
    forms = [(train.x, train.y), [(train.x[:50], train.y[:50]), (train.x[50:], train.y[50:])]]
    suites = [(test.x, test.y), torch.utils.data.DataLoader(torch.utils.data.TensorDataset(test.x, test.y), 33)]
    tables = [
        diversity(model, a, b, ['KMNC'], iterations=2, **SILENT).table() for a, b in zip(forms, suites, strict=True)
    ]
    assert tables[0].equals(tables[1])


@pytest.mark.parametrize(
    'name, wrong, words',
    [
        ('critical_units', {'ms': (900,)}, 'm=900'),
        ('critical_units', {'ms': ()}, 'ms holds whole numbers'),
        ('critical_units', {'ms': (2, 2)}, 'each of them once'),
        ('critical_units', {'ms': (2.7,)}, 'ms is a whole number'),
        ('critical_units', {'draws': 0}, 'draws is a whole number'),
        ('critical_units', {'methods': []}, 'at least one method'),
        ('critical_units', {'how': ['signed', 'signed']}, 'two choices of units'),
        ('critical_units', {'methods': 'nothing'}, 'no method'),
        ('critical_units', {'how': 'loud'}, 'how='),
        ('diversity', {'share': 0.7}, 'at most 0.5'),
        ('diversity', {'share': 0}, 'above 0'),
        ('diversity', {'iterations': 0}, 'iterations is a whole number'),
        ('diversity', {'size': 5000}, '120 images to choose from'),
        ('sensitivity', {'sizes': (5000,)}, 'classified correctly'),
        ('sensitivity', {'rates': (1.5,)}, 'rates are shares'),
        ('sensitivity', {'rates': (0.1, 0.1)}, 'each of them once'),
        ('sensitivity', {'sizes': (20, 20)}, 'each of them once'),
        ('correlation', {'sizes': ()}, 'sizes holds whole numbers'),
        ('correlation', {'suites': 4.5}, 'suites is a whole number'),
        ('overhead', {'batch_sizes': ()}, 'batch_sizes holds'),
        ('overhead', {'batch_sizes': (64, 64)}, 'each of them once'),
        ('sensitivity', {'runs': 0}, 'runs is a whole number'),
        ('sensitivity', {'attacks': 'PDG'}, 'no attack'),
        ('sensitivity', {'attacks': {'attack': 'PGD', 'epsilon': 1}}, 'no setting'),
        ('sensitivity', {'criteria': [{'k': 3}]}, "lacks 'criterion'"),
        ('correlation', {'suites': 2}, 'few points'),
        ('correlation', {'sizes': (5000,)}, 'from 1 to the 120'),
        ('overhead', {'rounds': 0}, 'rounds is a whole number'),
        ('overhead', {'criteria': ['XYZ']}, 'no criterion'),
        ('fragility', {'filters': ['hihg']}, 'no filter'),
        ('fragility', {'filters': {'filter': 'pulse', 'wide': 1}}, 'pulse has no setting'),
        ('fragility', {'attacks': 'PDG'}, 'no attack'),
        ('fragility', {'thresholds': 0}, 'thresholds'),
        ('fragility', {'baseline': 'round'}, 'baseline'),
        ('fragility', {'inits': 2}, 'each init begins anew'),
        ('fragility', {'attacks': None, 'calibrate_to': 0.5}, 'there are none; leave it out'),
        ('adversarial_pruning', {'methods': ['ANPVS']}, 'no method'),
        ('adversarial_pruning', {'methods': {'a': ['ANP', {'betta': 2}]}}, "a plan has no 'betta'"),
        ('adversarial_pruning', {'plan': 'minst'}, 'no plan'),
        ('adversarial_pruning', {'changes': {'epsilon': 0.1}}, "a plan has no 'epsilon'"),
        ('adversarial_pruning', {'changes': {'attack_steps': 0}}, 'attack_steps is a whole number'),
        ('adversarial_pruning', {'seeds': 0}, 'seeds are whole numbers'),
        ('adversarial_pruning', {'seeds': [1, 1]}, 'each once'),
        ('adversarial_pruning', {'seeds': 'all'}, 'seeds are whole numbers'),
        ('adversarial_pruning', {'seeds': 2, 'inits': 2}, 'leave seeds=2 out'),
        ('adversarial_pruning', {'inits': 2}, 'each init begins anew'),
    ],
)
def test_bad_settings(name, wrong, words, model, halves):
    with pytest.raises((ValueError, KeyError, TypeError), match=words):
        STUDIES[name](model, *halves, **CALLS[name] | wrong, **SILENT)


def test_fragility_is_the_sweep_and_its_scores(model, halves):
    from robustnb.filters import Random
    from robustnb.fragility import scores
    from robustnb.synaptic import sweep

    train, test = halves
    found = fragility(
        model, None, test, [{'attack': 'FGSM', 'eps': 0.05}], ['low', {'filter': 'random', 'like': 'low', 'seed': 3}], 5, seed=4,
        samples=60, baseline='density', **SILENT,
    )  # fmt: skip
    alone = sweep(model, test, FGSM(0.05, seed=4), ['low', Random('low', 3)], 5, samples=60, seed=4, **SILENT)
    assert found.table().equals(scores(alone, 'density', seed=4).table())
    clean = fragility(model, train, test, None, 'high', 3, **SILENT)
    assert clean.kinds == ['clean'] and clean.filters == ['high']
    eased = fragility(model, train, test, 'FGSM', 'high', 3, calibrate_to=0.5, **SILENT)
    assert 'eps=0.3' not in str(eased.settings['sweep']['perturbations'])


def test_settings_of_scores_are_checked_before_the_sweep(model, halves, monkeypatch):
    monkeypatch.setattr(studies, 'filtered', None)
    for wrong in ({'baseline': 'round'}, {'tolerance': -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            fragility(model, *halves, calibrate_to=0.5, **wrong, **SILENT)


def test_an_attack_that_leaves_nothing_is_refused_before_the_sweep(model, halves, monkeypatch):
    monkeypatch.setattr(studies, 'filtered', None)
    with pytest.raises(ValueError, match='none of 60 images right under far, .*calibrate_to'):
        fragility(model, *halves, {'near': FGSM(0.01), 'far': PGD(0.5)}, samples=60, **SILENT)


def test_fragility_from_birth(halves, tmp_path):
    from robustnb.histories import history, snapshots

    def make(init):
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 4))

    how, train, test = {'inits': 2, 'epochs': 2, 'every': 1, 'training': {'batch_size': 16}}, *halves
    found = fragility(make, *halves, FGSM(0.02), 'high', 3, **how, folder=tmp_path / 'kept', **SILENT)
    assert found.dataset.sizes['init'] == 2 and found.epochs == [0, 1, 2]
    born = snapshots(make, train, 2, 2, 1, tmp_path / 'kept', test, batch_size=16, **SILENT)
    scoring = {'baseline': 'flat', 'tolerance': None, 'seed': 0}
    again = history(born, test, FGSM(0.02), ['high'], None, scoring, thresholds=3, **SILENT)
    assert again.table().equals(found.table()) and len(list((tmp_path / 'kept').rglob('epoch*'))) == 6
    found = fragility(make, *halves, None, 'high', 3, **how | {'epochs': 1}, **SILENT)
    assert found.epochs == [0, 1], 'without a folder, nothing is left behind'


def test_adversarial_pruning_is_the_comparison(model, halves):
    from robustnb.anpvs import compare
    from robustnb.plans import DefencePlan

    methods = {'AT': 'AT', 'cheap': ['ANP', {'beta': 0.1}]}
    found = adversarial_pruning(model, *halves, methods, changes=BRIEF, seeds=2, seed=3, **SILENT)
    same = compare(model, *halves, {'AT': 'AT', 'cheap': ('ANP', {'beta': 0.1})}, DefencePlan(**BRIEF), (3, 4), **SILENT)
    assert timeless(found.runs()).equals(timeless(same.runs())) and found.runs().seed.tolist() == [3, 4, 3, 4]
    assert 'black box' not in found.runs() and found.settings['plan']['eps'] == 0.1
    listed = adversarial_pruning(model, *halves, 'AT', DefencePlan(**BRIEF), seeds=np.array([4]), **SILENT)
    assert timeless(listed.runs()).equals(timeless(same.runs())[1:2].reset_index(drop=True))
    with pytest.raises(TypeError, match='without `inits` the model is a network'):
        adversarial_pruning('digits_cnn', *halves, 'AT', **SILENT)


def test_adversarial_pruning_from_starts_of_its_own(halves, tmp_path, monkeypatch):
    from robustnb import anpvs

    def make(init):
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 4))

    how = {'methods': ('AT', 'ANP'), 'changes': BRIEF, 'inits': [5, 2], 'folder': tmp_path}
    found = adversarial_pruning(make, *halves, **how, **SILENT)
    assert found.dataset['seed'].values.tolist() == [5, 2] and 'black box' in found.runs()
    starts = sorted(file.name for file in tmp_path.glob('start-*'))
    assert starts == ['start-2.safetensors', 'start-5.safetensors', 'start-6.safetensors'], 'one more for the black box'
    monkeypatch.setattr(anpvs, 'train_method', None)
    assert adversarial_pruning(make, *halves, **how, **SILENT).runs().equals(found.runs()), 'all of it was kept'


def test_bad_data(model, halves):
    train, test = halves
    for name, study in STUDIES.items():
        with pytest.raises(ValueError, match='empty'):
            study(model, train, (test.x[:0], test.y[:0]), **CALLS[name], **SILENT)
    with pytest.raises(ValueError, match='no test image is classified correctly'):
        sensitivity(model, train, (test.x, (model(test.x).argmax(1) + 1) % 4), **CALLS['sensitivity'], **SILENT)
    with pytest.raises(ValueError, match='knows 4 classes'):
        correlation(model, train, (test.x, test.y + 3), **CALLS['correlation'], **SILENT)
    with pytest.raises(ValueError, match='NaN'):
        diversity(model, train, (test.x * float('nan'), test.y), **CALLS['diversity'], **SILENT)


# ------------------------------------------------------------------------------------------------------------ the shell


def robustnb(*words, cwd) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, '-c', 'import sys; from robustnb.cli import main; sys.exit(main())', *map(str, words)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_run_from_the_shell(tmp_path):
    config = example('critical_units')
    config['data'] |= {'train': 200, 'test': 100}
    config['arguments'] |= {'ms': [2], 'draws': 2, 'methods': ['lrp']}
    (tmp_path / 'f.json').write_text(json.dumps(config))
    ran = robustnb('run', 'critical_units', '--config', 'f.json', '--log', 'logs/run.log', '--out', 'out', cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    found = json.loads((tmp_path / 'out' / 'critical_units.json').read_text())
    assert len(found['table']) == 2 and found['config']['seed'] == 0 and found['versions']['torch']
    assert (tmp_path / 'out' / 'critical_units.png').read_bytes()[1:4] == b'PNG'
    assert len(Result.load(tmp_path / 'out' / 'critical_units.safetensors').table()) == 2
    lines = (tmp_path / 'logs' / 'run.log').read_text().splitlines()
    assert len(lines) >= 3 and all(line[:2] == '20' and line[4] == '-' and ' INFO ' in line for line in lines)
    assert 'done after' in ran.stdout and '100 to test' in ran.stdout


def test_a_published_plan_by_its_name():
    config = example('adversarial_pruning')
    config['data'] |= {'train': 60, 'test': 40}
    brief = {'eps': 0.1, 'attack_steps': 1, 'epochs': 2, 'start_epochs': 1, 'judge_steps': 2}
    config['arguments'] |= {'methods': ['ANP-VS'], 'plan': 'mnist bbd', 'changes': brief}
    found = run_study('adversarial_pruning', config, **SILENT)
    plan = found.settings['plan']
    assert [plan[name] for name in brief] == [*brief.values()]
    assert example('adversarial_pruning')['arguments']['plan'] == 'mnist', 'an example is a copy'
    assert [plan[name] for name in ('beta', 'suppression', 'keep', 'mask_lr', 'tuning_epochs')] == [4.0, 1e-3, 0.239, 0.01, 0]


def test_help_lists_the_studies(capsys):
    with pytest.raises(SystemExit):
        main(['run', '--help'])
    words = capsys.readouterr().out
    assert all(name in words for name in STUDIES) and '--config' in words and '--log' in words


@pytest.mark.parametrize('name', STUDIES)
def test_each_example_fits_its_study(name, capsys):
    assert main(['run', name, '--example']) == 0
    config = json.loads(capsys.readouterr().out)
    assert config == example(name)
    config['data'] |= {'train': 100, 'test': 100}
    config['arguments'] |= {'sizes': [20]} if 'sizes' in config['arguments'] else {}
    config['arguments'] |= {'attack': 'FGSM'} if name == 'correlation' else {}
    assert len(run_study(name, config, **SILENT).table())


@pytest.mark.parametrize(
    'change, words',
    [
        ({'modle': 'x'}, "Did you mean 'model'"),
        ({'model': {'name': 'digits_cnn', 'weight': 'a'}}, "Did you mean 'weights'"),
        ({'model': {'name': 'cats'}}, 'cats'),
        ({'data': {'name': 'digits', 'tset': 3}}, "Did you mean 'test'"),
        ({'data': {'name': 'cats'}}, 'no data set'),
        ({'arguments': {'iteration': 3}}, "Did you mean 'iterations'"),
        ({'arguments': {'criteria': ['ABC']}}, 'no criterion'),
        ({'arguments': 7}, 'is a dictionary'),
        ({'seed': 'a'}, 'seed is a whole number'),
        ({'seed': None}, 'seed is a whole number'),
        ({'seed': -1}, 'seed is a whole number'),
        ({'data': {'name': 'digits', 'train': 'many'}}, 'train of the data is a whole number'),
        ({'data': {'name': 'digits', 'test': 1.5}}, 'test of the data is a whole number'),
        ({'model': {'name': 'digits_cnn', 'epochs': 0}}, 'epochs of the model'),
        ({'model': {'name': 'digits_cnn', 'epochs': 1, 'weights': 'a.pt'}}, 'has `weights` and `epochs`'),
        ({'model': {'name': 'digits_cnn', 'std': [0.5]}}, "belongs to 'mean'"),
        ({'model': {'name': 'digits_cnn', 'entry': 'state'}}, "belongs to 'weights'"),
        ({'model': {'name': 'digits_cnn', 'epochs': 1, 'settings': [1]}}, 'settings of the model is a dictionary'),
        ({'model': {'name': 'lenet5', 'epochs': 1}}, 'Kernel size'),
    ],
)
def test_a_wrong_word_is_an_error(change, words, tmp_path, capsys):
    (tmp_path / 'f.json').write_text(json.dumps(example('diversity') | change))
    assert (
        main(['run', 'diversity', '--config', str(tmp_path / 'f.json'), '--out', str(tmp_path / 'o'), '--quiet']) == 2
    )
    assert words in capsys.readouterr().out
    assert not (tmp_path / 'o' / 'diversity.json').exists()


def test_wrong_files(tmp_path, capsys):
    (tmp_path / 'f.json').write_text('{"model": ')
    assert main(['run', 'diversity', '--config', str(tmp_path / 'f.json')]) == 2
    assert main(['run', 'diversity', '--config', str(tmp_path / 'g.json')]) == 2
    assert main(['run', 'diversity']) == 2
    words = capsys.readouterr().out
    assert 'is no JSON' in words and 'g.json' in words and '--example' in words
    assert not logging.getLogger('robustnb').handlers


def test_files_that_cannot_be_read_or_written(tmp_path, capsys):
    config = example('overhead') | {'arguments': {'criteria': ['NC']}}
    config['data'] |= {'train': 20, 'test': 20}
    (tmp_path / 'f.json').write_bytes(b'\xef\xbb\xbf' + json.dumps(config).encode())
    words = ['run', 'overhead', '--config', str(tmp_path / 'f.json'), '--out', str(tmp_path / 'o'), '--quiet']
    assert main(words) == 0, 'a mark that some editors write in front'
    for log in (tmp_path, tmp_path / 'f.json' / 'run.log'):
        with pytest.raises(SystemExit):
            main([*words, '--log', str(log)])
        assert 'cannot be written' in capsys.readouterr().err
    (tmp_path / 'f.json').write_bytes('{}'.encode('utf-16'))
    assert main(words) == 2
    assert 'is no JSON' in capsys.readouterr().out


def test_weights_from_a_file_and_from_a_checkpoint(tmp_path):
    from robustnb.checkpoints import save_state
    from robustnb.models import build

    net = build('digits_cnn', seed=3, size=8)
    save(net, tmp_path / 'a.safetensors')
    save_state(tmp_path / 'b.safetensors', {'model': {'state': net.state_dict(), 'left out': {}}, 'step': 3})
    torch.save(net.state_dict(), tmp_path / 'c.pt')
    config = example('overhead') | {'arguments': {'criteria': ['NC']}}
    config['data'] |= {'train': 20, 'test': 20}
    for file in ('a.safetensors', 'b.safetensors', 'c.pt'):
        from robustnb import cli

        config['model'] = {'name': 'digits_cnn', 'settings': {'size': 8}, 'weights': str(tmp_path / file)}
        got = cli._network(cli._configuration('overhead', config), None, None, False)
        assert all(value.equal(net.state_dict()[key]) for key, value in got.state_dict().items())
    wrong = {'name': 'lenet5', 'weights': str(tmp_path / 'b.safetensors')}
    with pytest.raises(ValueError, match='does not fit'):
        run_study('overhead', config | {'model': wrong}, **SILENT)


def test_a_network_is_trained_on_the_way(tmp_path):
    config = example('overhead') | {
        'arguments': {'criteria': ['NC']},
        'model': {'name': 'digits_cnn', 'epochs': 1, 'settings': {'size': 8}},
    }
    config['data'] |= {'train': 20, 'test': 20}
    run_study('overhead', config, tmp_path, **SILENT)
    assert (tmp_path / 'training.safetensors').exists() and (tmp_path / 'overhead.json').exists()


def test_full_takes_everything():
    config = example('overhead') | {'arguments': {'criteria': [{'criterion': 'KMNC', 'k': 10}], 'batch_sizes': [512]}}
    found = run_study('overhead', config, full=True, **SILENT)
    assert found.settings['test images'] > 300 and KMNC(10).code in found.settings['criteria']


def test_fragility_from_the_shell_and_from_python(tmp_path):
    config = example('fragility')
    config['data'] |= {'train': 100, 'test': 60}
    config['arguments'] |= {'thresholds': 4, 'filters': ['high'], 'attacks': 'FGSM'}
    (tmp_path / 'f.json').write_text(json.dumps(config))
    words = ['run', 'fragility', '--config', str(tmp_path / 'f.json'), '--out', str(tmp_path / 'out'), '--quiet']
    assert main(words) == 0 and main(words) == 0, 'the second time it reads its records'
    kept = Result.load(tmp_path / 'out' / 'fragility.safetensors')
    assert kept.table().equals(run_study('fragility', config, **SILENT).table())
    found = json.loads((tmp_path / 'out' / 'fragility.json').read_text())
    assert len(found['table']) == 4 * 3 and len(found['totals']) == 3
    assert (tmp_path / 'out' / 'fragility-records.jsonl').exists()


def test_an_interrupted_study_does_not_say_that_it_is_done(tmp_path, monkeypatch, caplog):
    from robustnb import synaptic

    calls, asked = [], synaptic._Study.__call__

    def stops(self, *args, **how):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return asked(self, *args, **how)

    config = example('fragility')
    config['data'] |= {'train': 100, 'test': 60}
    config['arguments'] |= {'thresholds': 4, 'filters': ['high'], 'attacks': None, 'calibrate_to': None}
    with monkeypatch.context() as patch, caplog.at_level('INFO'):
        patch.setattr(synaptic._Study, '__call__', stops)
        part = run_study('fragility', config, tmp_path, **SILENT)
    assert 'fragility: stopped after' in caplog.text and 'done' not in caplog.text
    assert part.table()['value'].isna().any()
    assert run_study('fragility', config, tmp_path, **SILENT).table()['value'].notna().all(), 'it goes on'


def test_adversarial_pruning_by_its_configuration(tmp_path):
    config = example('adversarial_pruning') | {'model': {'name': 'digits_cnn', 'settings': {'size': 8}}}
    config['data'] |= {'train': 60, 'test': 40}
    config['arguments'] = config['arguments'] | {'methods': ['AT', 'ANP-VS'], 'inits': 1, 'changes': BRIEF}
    (tmp_path / 'f.json').write_text(json.dumps(config))
    words = ['run', 'adversarial_pruning', '--config', str(tmp_path / 'f.json'), '--out', str(tmp_path), '--quiet']
    assert main(words) == 0
    kept = Result.load(tmp_path / 'adversarial_pruning.safetensors')
    found = json.loads((tmp_path / 'adversarial_pruning.json').read_text())
    for name in ('table', 'runs', 'as_published'):
        assert [row['method'] for row in found[name]] == ['AT', 'ANP-VS'] == kept.methods, 'rows with their names'
    assert found['as_published'][1]['clean'] == pytest.approx(100 * found['runs'][1]['clean'])
    assert (tmp_path / 'trainings' / 'ANP-VS-0-net.safetensors').exists(), 'a network that can be loaded'
    config['arguments']['changes'] = BRIEF | {'lr': 1e-4}
    with pytest.raises(RuntimeError, match='belongs to another training'):
        run_study('adversarial_pruning', config, tmp_path, **SILENT)


def test_fragility_from_birth_by_its_configuration(tmp_path):
    config = example('fragility') | {
        'model': {'name': 'digits_cnn', 'settings': {'size': 8}, 'mean': [0.3], 'std': [0.4]}
    }
    config['data'] |= {'train': 100, 'test': 60}
    config['arguments'] |= {
        'thresholds': 3, 'filters': 'high', 'attacks': None, 'calibrate_to': None, 'inits': [3, 5], 'epochs': 1, 'every': 1
    }  # fmt: skip
    found = run_study('fragility', config, tmp_path, **SILENT)
    assert (found.inits, found.epochs) == ([3, 5], [0, 1])
    assert sorted(file.name for file in (tmp_path / 'snapshots').iterdir()) == ['init-3', 'init-5']
    assert len(json.loads((tmp_path / 'fragility.json').read_text())['agreement']) == 2 + 1
    config['arguments']['epochs'] = 2
    assert run_study('fragility', config, tmp_path, **SILENT).epochs == [0, 1, 2]
    config['model'] = {'name': 'digits_cnn', 'epochs': 3}
    with pytest.raises(ValueError, match="the model has 'epochs', but with `inits`"):
        run_study('fragility', config, **SILENT)
