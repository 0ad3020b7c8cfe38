"Many defences, judged alike: what is left of a network, what it costs, comparisons that go on, and the published tables."

import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import nn

from robustnb import anpvs, training
from robustnb.anpvs import DefenceComparison, compare, judge, published, sizes, stronger
from robustnb.attacks import APGD, FGSM, PGD, WorstOf
from robustnb.data import DataSet, load_data
from robustnb.evaluation import evaluate, predict
from robustnb.magnitudes import prune_units
from robustnb.models import build
from robustnb.plans import PLANS, DefencePlan, Trained, train_method
from robustnb.pruning import Collapse
from robustnb.results import Result
from robustnb.stats import bootstrap_mean, mean_of_runs
from robustnb.suppression import vulnerability
from robustnb.training import trained

PLAN = DefencePlan(eps=0.1, attack_steps=2, epochs=3, tuning_epochs=1, batch_size=12, mask_lr=0.7, beta=0.2, start_epochs=4,
                   lr=3e-3, judge_steps=3,
            judge_step=0.04)
TRAIN, TEST = (part.take(n) for part, n in zip(load_data('digits'), (120, 40), strict=True))
CHEAP = WorstOf([FGSM(0.1), PGD(0.1, steps=2, loss='margin')])


def tiny(seed: int) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 10))


def side_by_side(methods=('AT', 'ANP-VS', 'AT + magnitude'), seeds=(0, 1), plan=PLAN, model=tiny, **more) -> DefenceComparison:
    return compare(model, TRAIN, TEST, methods, plan, seeds, **{'worst': CHEAP, 'show_progress': False} | more)


@pytest.fixture(scope='module')
def net() -> nn.Module:
    return trained('digits_cnn', 'digits')


@pytest.fixture(scope='module')
def whole(tmp_path_factory) -> tuple:
    "A comparison, and the folder in which it was made."
    folder = tmp_path_factory.mktemp('whole')
    return side_by_side(folder=folder), folder


@pytest.fixture
def no_training(monkeypatch):
    "Whoever takes a step fails."
    monkeypatch.setattr(training._Trainer, '__call__', lambda *args: pytest.fail('trained again'))
    monkeypatch.setattr(anpvs, 'train_method', lambda *args, **kwargs: pytest.fail('trained again'))


def equal(a: DefenceComparison, b: DefenceComparison) -> bool:
    one, other = (found.dataset.drop_vars('seconds of training', errors='ignore') for found in (a, b))  # others each time
    return one.identical(other) and a.settings == b.settings


# One network, judged


def test_the_judge_sees_what_evaluate_sees(net):
    before = [value.clone() for value in net.state_dict().values()]
    verdict = judge(net.train(), TEST, PLAN, CHEAP)
    assert net.training and all(map(torch.equal, before, net.state_dict().values()))
    net.eval()
    white = PGD(0.1, 3, 0.04)
    table = evaluate(net, TEST, white, show_progress=False).table()
    right = verdict['right']
    assert [*right] == ['clean', 'white box', 'worst'] and all(rows.dtype == bool for rows in right.values())
    assert [right['clean'].mean(), right['white box'].mean()] == pytest.approx(table.accuracy.tolist())
    row = vulnerability(net, TEST, {'white': white}, batch_size=25, show_progress=False).network().iloc[0]
    assert verdict['V white box'] == pytest.approx(row['mean'], rel=1e-5)
    assert verdict['V relative white box'] == pytest.approx(row['relative'], rel=1e-5)
    everywhere = predict(net, CHEAP(net, TEST.x, TEST.y, TEST.ids)) == TEST.y
    assert np.array_equal(right['worst'], right['clean'] & right['white box'] & everywhere.numpy())
    assert right['worst'].sum() < right['white box'].sum() < right['clean'].sum()


def test_the_judge_needs_no_batches(net):
    x_black = FGSM(0.1)(net, TEST.x, TEST.y, TEST.ids)
    one, two = (judge(net, TEST, PLAN, CHEAP, x_black, batch_size=size) for size in (7, 250))
    assert all(np.array_equal(one['right'][name], two['right'][name]) for name in two['right'])
    assert {**one, 'right': 0} == pytest.approx({**two, 'right': 0}, rel=1e-5)
    order = torch.randperm(len(TEST), generator=torch.Generator().manual_seed(0))
    mixed = judge(net, TEST[order], PLAN, CHEAP, x_black[order], batch_size=11)  # noise goes by ids
    assert all(np.array_equal(mixed['right'][name], two['right'][name][order]) for name in two['right'])
    pair = judge(net, (TEST.x, TEST.y), PLAN, CHEAP)
    assert np.array_equal(pair['right']['clean'], two['right']['clean'])


def test_the_black_box_by_the_letter(net):
    x_black = FGSM(0.1)(tiny(0), TEST.x, TEST.y, TEST.ids)
    plain, verdict = (judge(net, TEST, PLAN, CHEAP, images) for images in (None, x_black))
    black = (predict(net, x_black) == TEST.y).numpy()
    assert np.array_equal(verdict['right']['black box'], black) and 'black box' not in plain['right']
    assert np.array_equal(verdict['right']['worst'], plain['right']['worst'] & black)
    row = vulnerability(net, TEST, {'b': lambda model, x, y: x_black}, show_progress=False).network().iloc[0]
    assert verdict['V black box'] == pytest.approx(row['mean'], rel=1e-5)
    assert verdict['V relative black box'] == pytest.approx(row['relative'], rel=1e-5)


class Stream:
    "Batches that can be walked over again, and that nobody has counted."

    def __iter__(self) -> Iterator:
        return ((x, y) for x, y in zip(TEST.x.split(9), TEST.y.split(9), strict=True))


def test_data_of_all_kinds(net):
    pair, x_black = (TEST.x, TEST.y), TEST.x.flip(-1)
    expected = judge(net, pair, PLAN, CHEAP, x_black)['right']
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*pair), 16)
    for test in (Stream(), loader):
        found = judge(net, test, PLAN, CHEAP, x_black)['right']
        assert all(np.array_equal(found[name], expected[name]) for name in expected)
    once = judge(net, iter(Stream()), PLAN, CHEAP)['right']
    assert np.array_equal(once['white box'], expected['white box'])
    with pytest.raises(ValueError, match='which a generator cannot'):
        judge(net, iter(Stream()), PLAN, CHEAP, x_black)


@pytest.mark.parametrize('test', [TEST, Stream()])
@pytest.mark.parametrize('x_black', [TEST.x[:39], TEST.x[:0], torch.cat([TEST.x, TEST.x[:1]]), TEST.x[:, :, :4]])
def test_images_of_another_black_box(net, test, x_black):
    with pytest.raises(ValueError, match='x_black is .* in their order'):
        judge(net, test, PLAN, CHEAP, x_black)


def test_hostile_things_to_judge(net):
    with pytest.raises(ValueError, match='the test data are empty'):
        judge(net, TEST[:0], PLAN, CHEAP)
    with pytest.raises(ValueError, match='labels run from 5 to 14'):
        judge(net, (TEST.x, TEST.y + 5), PLAN, CHEAP)
    with pytest.raises(TypeError, match='perturbation'):
        judge(net, TEST, PLAN, [FGSM(0.1)])
    same = judge(net, TEST, PLAN, PGD(0.1, 3, 0.04))['right']  # as the white box is: no name in the way
    assert np.array_equal(same['worst'], same['white box'])
    right = judge(net, DataSet(TEST.x, (TEST.y + 1) % 10), PLAN, CHEAP)['right']
    assert right['clean'].mean() < 0.1 and not right['worst'].any()  # where nothing stands, nothing is attacked


def test_the_range_of_the_data_is_that_of_the_attacks():
    seen = []

    def looks(model, x, y):
        seen.append(x)
        return x

    moved = DataSet(TEST.x * 4 - 2, TEST.y, bounds=(-2, 2))
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.ReLU())
    verdict = judge(model, moved, replace(PLAN, eps=1.0, judge_step=1.0), looks)
    reference = evaluate(model, moved, PGD(1.0, 3, 1.0, bounds=(-2, 2)), show_progress=False).table().accuracy
    assert verdict['right']['white box'].mean() == pytest.approx(reference[1])
    x_adv = WorstOf([APGD(1.0, steps=2)], bounds=(-2, 2))(model, moved.x, moved.y)
    assert x_adv.min() < -1 and stronger(PLAN).strength == 0.1


def test_what_is_stronger():
    attack = stronger(DefencePlan(eps=0.2, judge_steps=7))
    assert attack.attacks == (APGD(0.2, steps=7, keep_going=False), APGD(0.2, steps=7, loss='dlr', keep_going=False),
                              PGD(0.2, 7, 0.02, loss='margin', keep_going=False))


# What a network costs


def lenet_costs(a: int, b: int, c: int) -> dict:
    "Counts of LeNet5-Caffe with so many units in its hidden layers, by hand."
    layers = [(a, 24 * 24, 25), (b, 8 * 8, 25 * a)]  # units, places, inputs of one unit
    flops = sum(n * places * (2 * reads - 1) + 2 * n * places for n, places, reads in layers) + 4 * a * 144 + 4 * b * 16
    flops += (2 * 16 * b - 1) * c + 2 * c + (2 * c - 1) * 10 + 2 * 10
    memory = sum(reads * (places + n) for n, places, reads in layers) + 16 * b * c + c + 10 * c + 10
    return {'flops': flops, 'memory': memory, 'units': a + b + c,
            'parameters': a * 26 + b * (25 * a + 1) + c * (16 * b + 1) + 10 * (c + 1),
            'operations': 2 * (a * 576 * 25 + b * 64 * 25 * a + 16 * b * c + 10 * c)}  # fmt: skip


@pytest.mark.parametrize('kept', [(20, 50, 500), (20, 49, 325), (5, 11, 60)])
def test_sizes_of_lenet_by_hand(kept):
    dense = build('lenet5_caffe')
    whole, part = lenet_costs(20, 50, 500), lenet_costs(*kept)
    assert (whole['flops'], whole['memory'], whole['parameters'], whole['operations']) == (
        4615940 + 10, 477410, 431080, 4586000)  # the paper counts no activation after the last layer
    names = anpvs.units_per_layer(dense)
    found = sizes(prune_units(dense, counts=dict(zip(names, kept, strict=True))), dense, torch.rand(1, 1, 28, 28))
    assert found == pytest.approx({
        'parameters': part['parameters'] / 431080, 'operations': part['operations'] / 4586000, 'weight sparsity': 0,
        'unit sparsity': 1 - part['units'] / 570, 'memory': part['memory'] / 477410, 'FLOPs x': 4615950 / part['flops']})


def test_sizes_where_there_is_nothing_to_count():
    flat = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    with torch.no_grad():
        flat[1].weight[0] = 0
    found = sizes(flat.train(), flat, torch.rand(1, 4))
    assert found == {'parameters': 1, 'operations': 1, 'unit sparsity': 0, 'weight sparsity': 0.5, 'memory': 1, 'FLOPs x': 1}
    assert flat.training
    narrow = nn.Sequential(nn.Conv1d(1, 2, 3), nn.ReLU())
    assert sizes(narrow, narrow, torch.rand(1, 1, 5))['FLOPs x'] == 1  # not in the published formulas


# Many networks, side by side


def test_a_comparison_is_its_trainings_and_judgements(whole):
    found, _ = whole
    sample = torch.rand(1, 1, 8, 8)
    for seed in (0, 1):
        start = training.fit(tiny(seed), TRAIN, training.Standard(), PLAN.start_epochs, PLAN.batch_size, partial(
            torch.optim.Adam, lr=PLAN.lr, weight_decay=1e-4), seed=seed, show_progress=False).model
        source = train_method('AT', training.fit(tiny(2), TRAIN, training.Standard(), PLAN.start_epochs, PLAN.batch_size, partial(
            torch.optim.Adam, lr=PLAN.lr, weight_decay=1e-4), seed=2, show_progress=False).model, TRAIN, PLAN, 2,
            show_progress=False).model
        x_black = PGD(0.1, 3, 0.04)(source, TEST.x, TEST.y, TEST.ids)
        share = float(found.dataset['parameters'].sel({'method': 'ANP-VS', 'seed': seed}))
        assert share < 1
        for name in found.methods:
            plan = replace(PLAN, parameters=share) if name == 'AT + magnitude' else PLAN
            one = train_method(name, start, TRAIN, plan, seed, show_progress=False).model
            verdict, row = judge(one, TEST, PLAN, CHEAP, x_black), found.dataset.sel({'method': name, 'seed': seed})
            for attack, right in verdict.pop('right').items():
                assert np.array_equal(row['right'].sel(attack=attack), right), (name, seed, attack)
            numbers = verdict | sizes(one, start, sample)
            assert {key: float(row[key]) for key in numbers} == pytest.approx(numbers, rel=1e-6)
        cut = float(found.dataset['parameters'].sel({'method': 'AT + magnitude', 'seed': seed}))
        assert share - 0.06 < cut <= share  # a unit has about 4 % of the parameters


def test_a_comparison_goes_on_from_its_folder(whole, no_training, tmp_path):
    found, folder = whole
    assert equal(side_by_side(folder=folder), found)
    elsewhere = tmp_path / 'moved'
    shutil.copytree(folder, elsewhere)
    assert equal(side_by_side(folder=str(elsewhere)), found)
    fewer = side_by_side(('ANP-VS',), (0, 1), folder=folder).dataset
    assert np.array_equal(fewer['right'], found.dataset['right'].sel({'method': ['ANP-VS']}))


def test_other_judges_need_no_training(whole, monkeypatch):
    found, folder = whole
    monkeypatch.setattr(training._Trainer, '__call__', lambda *args: pytest.fail('trained again'))
    other = side_by_side(folder=folder, plan=replace(PLAN, judge_steps=1), worst=FGSM(0.1)).dataset
    assert np.array_equal(other['right'].sel(attack='clean'), found.dataset['right'].sel(attack='clean'))
    assert other['right'].sel(attack='white box').sum() > found.dataset['right'].sel(attack='white box').sum()


def test_a_folder_of_another_comparison(whole):
    _, folder = whole
    with pytest.raises(RuntimeError, match='belongs to another training'):
        side_by_side(folder=folder, plan=replace(PLAN, lr=1e-2))
    with pytest.raises(RuntimeError, match='belongs to another training'):
        side_by_side({'AT': ('AT', {'clean_weight': 0.0})}, folder=folder)


def test_an_interrupted_comparison_goes_on(whole, tmp_path, monkeypatch):
    found, _ = whole
    taken, real = [], training._Trainer.__call__

    def stopped(trainer, *args):
        taken.append(1)
        if len(taken) == 200:
            raise KeyboardInterrupt
        return real(trainer, *args)

    with monkeypatch.context() as patch:
        patch.setattr(training._Trainer, '__call__', stopped)
        with pytest.raises(KeyboardInterrupt):
            side_by_side(folder=tmp_path)
    assert equal(side_by_side(folder=tmp_path), found)


def test_frames_of_a_comparison(whole):
    found, _ = whole
    data, runs, table = found.dataset, found.runs(), found.table()
    assert found.methods == ['AT', 'ANP-VS', 'AT + magnitude'] and dict(data.sizes) == {
        'method': 3, 'seed': 2, 'attack': 4, 'sample': 40}
    assert runs[['method', 'seed']].values.tolist() == [[name, seed] for name in found.methods for seed in (0, 1)]
    for _, row in runs.iterrows():
        one = data.sel({'method': row.method, 'seed': row.seed})
        for attack in ('clean', 'black box', 'white box', 'worst'):
            assert row[attack] == pytest.approx(one['right'].sel(attack=attack).values.mean())
        assert row['V white box'] == float(one['V white box']) and row.collapsed == ''
    for name in found.methods:
        values = data.sel({'method': name})
        for attack in ('clean', 'black box', 'white box', 'worst'):
            each = values['right'].sel(attack=attack).values.mean(1)
            assert table.loc[name, attack] == pytest.approx(each.mean())
            assert table.loc[name, f'± {attack}'] == pytest.approx(each.std(ddof=1), abs=1e-7)
        assert table.loc[name, 'memory'] == pytest.approx(float(values['memory'].mean())) and table.loc[name, 'collapsed'] == 0
    laid_out = found.as_published()
    head = [*published().columns]
    assert [*laid_out.columns][:len(head)] == head and [*laid_out.index] == found.methods
    for new, old, factor in (('clean', 'clean', 100), ('black box', 'black box', 100), ('V white', 'V white box', 1),
                             ('V black', 'V black box', 1), ('memory %', 'memory', 100), ('FLOPs x', 'FLOPs x', 1),
                             ('sparsity %', 'unit sparsity', 100), ('worst', 'worst', 100), ('parameters %', 'parameters', 100)):
        np.testing.assert_allclose(laid_out[new], factor * table[old])
    assert laid_out.loc['AT', ['memory %', 'FLOPs x', 'sparsity %', 'parameters %']].tolist() == [100, 1, 0, 100]


def test_differences_on_the_same_images(whole):
    found, _ = whole
    rows = found.difference('ANP-VS', 'AT', 'white box', level=0.9)
    right = found.dataset['right'].sel(attack='white box').astype('float64')
    gaps = (right.sel({'method': 'ANP-VS'}) - right.sel({'method': 'AT'})).values
    assert rows.seed.tolist() == ['0', '1', 'all']
    np.testing.assert_allclose(rows.difference, [gaps[0].mean(), gaps[1].mean(), gaps.mean()], atol=1e-7)
    for row, values in enumerate((*gaps, gaps.mean(0))):
        np.testing.assert_allclose(rows.loc[row, ['low', 'high']].astype(float), bootstrap_mean(values, 0.9)[1:], atol=1e-7)
    np.testing.assert_allclose(rows.loc[2, ['low over seeds', 'high over seeds']].astype(float),
                               mean_of_runs(gaps.mean(1), 0.9)[1:], atol=1e-7)
    assert rows.loc[:1, 'low over seeds'].isna().all()
    for a, b, attack in (('ANP', 'AT', 'worst'), ('AT', 'nobody', 'worst'), ('AT', 'AT', 'best')):
        with pytest.raises(KeyError, match='there are'):
            found.difference(a, b, attack)


def test_a_comparison_in_a_file_and_in_a_figure(whole, tmp_path):
    found, _ = whole
    found.save(tmp_path / 'comparison.safetensors')
    for kind in (DefenceComparison, Result):
        again = kind.load(tmp_path / 'comparison.safetensors')
        assert isinstance(again, DefenceComparison) and equal(again, found) and again.runs().equals(found.runs())
    assert found.settings['methods']['AT + magnitude'] == ['AT + magnitude', {'parameters': 'ANP-VS'}]
    assert found.settings['plan']['eps'] == 0.1 and 'clean' in found._repr_html_()
    fig = found.plot()
    assert [label.get_text() for label in fig.axes[0].get_yticklabels()] == [*reversed(found.methods)]
    plt.close(fig)


def test_collapses_are_told():
    dead = ('ANP', {'keep': 5e-4})
    late = 'ANP', {'keep': 1.1e-3, 'mask_lr': 0.2, 'beta': 100.0, 'ramp': 0.0}
    mag = 'AT + magnitude', {'parameters': 'dead'}
    found = side_by_side({'fine': 'AT', 'dead': dead, 'late': late, 'mag': mag}, (3,))
    runs, table = found.runs().set_index('method'), found.table()
    assert runs.collapsed['mag'] == 'dead, which it was to follow, collapsed'
    assert 'at step 0 ' in runs.collapsed['dead'] and 'at step 20 ' in runs.collapsed['late'] and runs.collapsed['fine'] == ''
    assert table.collapsed.tolist() == [0, 1, 1, 1] and np.isnan(table.loc['dead', 'clean']) and np.isnan(table.memory['late'])
    assert found.as_published().loc['dead'].isna().all()
    assert found.settings['collapsed'].keys() == {'dead, seed 3', 'late, seed 3', 'mag, seed 3'}
    with pytest.raises(ValueError, match='no seed in which neither collapsed'):
        found.difference('fine', 'dead')
    plt.close(found.plot())
    with pytest.raises(Collapse, match='every training collapsed, such as at step 0'):
        side_by_side({'dead': dead})


def test_labels_with_strange_characters_keep_apart(tmp_path):
    strange = ['a/b', 'a:b', 'a_b', 'A_b', '../up', 'ü' * 200, ' ', 'AT.tuned', 'start-0']
    methods = {label: ('AT', {'lr': 1e-3 * (1 + number), 'epochs': 1, 'tuning_epochs': 0})
               for number, label in enumerate(strange)}
    start, source = tiny(5), tiny(6)
    found = side_by_side(methods, (0,), model=start, source=source, folder=tmp_path / 'kept')
    assert [*tmp_path.iterdir()] == [tmp_path / 'kept']
    x_black = PGD(0.1, 3, 0.04)(source, TEST.x, TEST.y, TEST.ids)
    for label, (name, changes) in methods.items():
        one = train_method(name, start, TRAIN, replace(PLAN, **changes), 0, show_progress=False).model
        right = found.dataset['right'].sel({'method': label, 'seed': 0})
        assert np.array_equal(right.sel(attack='black box'), (predict(one, x_black) == TEST.y).numpy()), label
        assert np.array_equal(right.sel(attack='clean'), (predict(one, TEST.x) == TEST.y).numpy()), label
    names = [file.name.casefold() for file in (tmp_path / 'kept').glob('*-net.safetensors')]
    assert len(names) == len({*names}) == len(strange) and max(map(len, names)) < 200


def test_a_network_is_the_start_of_all_seeds():
    start = tiny(1).train()
    before = [value.clone() for value in start.state_dict().values()]
    found = side_by_side(('AT', 'BP'), (0, 1), model=start)
    assert found.dataset['attack'].values.tolist() == ['clean', 'white box', 'worst']  # no source, no black box
    assert start.training and all(map(torch.equal, before, start.state_dict().values()))
    assert 'black box' not in found.as_published() and 'V black' not in found.as_published()
    one = train_method('AT', start, TRAIN, PLAN, 1, show_progress=False).model
    right = found.dataset['right'].sel({'method': 'AT', 'seed': 1, 'attack': 'clean'}).values
    assert np.array_equal(right, (predict(one, TEST.x) == TEST.y).numpy())
    plt.close(found.plot())


def test_one_arm_follows_another_by_label():
    methods = {'mag': ('AT + magnitude', {'parameters': 'dear'}), 'dear': ('ANP-VS', {'beta': 0.3}), 'own': 'AT + magnitude',
               'cheap': ('ANP-VS', {'beta': 0.0})}
    share = side_by_side(methods, (0,)).table().parameters
    assert [*share.index] == [*methods]
    assert share['dear'] - 0.06 < share['mag'] <= share['dear'] and share['own'] <= PLAN.parameters < share['cheap']


@pytest.mark.slow
def test_two_processes_find_the_same():
    how = dict(model=partial(build, 'digits_cnn'), plan=replace(PLAN, epochs=2, start_epochs=1),
               methods=('AT', 'ANP-VS'), seeds=(0, 1))
    one, two = (side_by_side(jobs=jobs, **how) for jobs in (1, 2))
    assert equal(one, two)


@pytest.mark.parametrize(('settings', 'kind', 'words'), [
    ({'methods': ()}, ValueError, 'methods are empty'), ({'methods': {}}, ValueError, 'methods are empty'),
    ({'methods': ('AT', 'AT')}, ValueError, 'there twice'), ({'methods': ('AT', 'anp')}, KeyError, "no method 'anp'"),
    ({'methods': 'anp'}, KeyError, "no method 'anp'"), ({'methods': {'a': 'anp'}}, KeyError, "no method 'anp'"),
    ({'methods': {'a': ('AT',)}}, TypeError, 'a method is a name, or a pair'), ({'methods': {'a': None}}, TypeError, 'pair'),
    ({'methods': {'a': ('AT', 3)}}, TypeError, 'pair'), ({'methods': {1: 'AT'}}, ValueError, 'a label is a word'),
    ({'methods': {'': 'AT'}}, ValueError, 'a label is a word'),
    ({'methods': {'source of the black box': 'AT'}}, ValueError, 'other than'),
    ({'methods': {'a': ('AT', {'gamma': 1})}}, ValueError, "a plan has no 'gamma'"),
    ({'methods': {'a': ('AT', {'start_epochs': 0})}}, ValueError, 'all methods share'),
    ({'methods': {'a': ('AT', {'judge_step': 0.1})}}, ValueError, 'all methods share'),
    ({'methods': {'a': ('AT', {'epochs': 0})}}, ValueError, 'epochs is a whole'),
    ({'methods': {'a': ('AT + magnitude', {'parameters': 'b'})}}, ValueError, 'no other method here'),
    ({'methods': {'a': ('AT + magnitude', {'parameters': 'a'})}}, ValueError, 'no other method here'),
    ({'seeds': ()}, ValueError, 'seeds are'), ({'seeds': (0, 0)}, ValueError, 'seeds are'), ({'seeds': 3}, ValueError, 'range'),
    ({'seeds': (0.5,)}, ValueError, 'seeds are'), ({'seeds': (True,)}, ValueError, 'seeds are'),
    ({'seeds': '01'}, ValueError, '01'),
    ({'plan': 'minst'}, KeyError, 'there are mnist'), ({'plan': None}, TypeError, 'a name in PLANS'),
    ({'worst': [FGSM(0.1)]}, TypeError, 'perturbation'),
])  # fmt: skip
def test_what_cannot_be_compared_is_told_before_anything_is_trained(settings, kind, words, no_training, tmp_path):
    with pytest.raises(kind, match=words or None):
        side_by_side(**settings, folder=tmp_path / 'none')
    assert not (tmp_path / 'none').exists()


def test_numpys_seeds_and_plans_by_name():
    assert anpvs._seeds(np.arange(2)) == [0, 1] and anpvs._plan('cifar10 bbd') is PLANS['cifar10 bbd']


# The published tables

README = {  # spec 4: clean, white box, black box, V white, V black, memory %, FLOPs x, sparsity %
    'Standard': ((99.29, 0.00, 8.02, .129, .113, 100, 1, 0), (92.76, 13.79, 41.65, .077, .065, 100, 1, 0),
                 (67.44, 2.81, 14.94, .143, .119, 100, 1, 0)),
    'BP': ((99.34, 0.00, 12.99, .091, .078, 4.14, 9.68, 83.48), (92.91, 14.30, 42.88, .037, .033, 12.41, 2.34, 75.92),
           (69.40, 3.12, 16.39, .067, .059, 18.59, 1.95, 63.48)),
    'AT': ((99.14, 88.03, 94.18, .045, .040, 100, 1, 0), (87.50, 49.85, 63.70, .050, .047, 100, 1, 0),
           (57.79, 19.07, 32.47, .079, .071, 100, 1, 0)),
    'AT-BNN': ((99.16, 88.44, 94.87, .364, .199, 200, 0.5, 0), (86.69, 51.87, 64.92, .267, .238, 200, 0.5, 0),
               (53.75, 19.40, 30.38, .446, .385, 200, 0.5, 0)),
    'Pretrained AT': ((99.18, 88.26, 94.49, .412, .381, 100, 1, 0), (87.50, 52.25, 66.10, .041, .036, 100, 1, 0),
                      (57.14, 19.86, 35.42, .071, .065, 100, 1, 0)),
    'ADMM': ((99.01, 88.47, 94.61, .041, .038, 100, 1, 80), (78.15, 47.37, 62.15, .034, .030, 100, 1, 75),
             (52.52, 19.65, 31.30, .060, .056, 100, 1, 75)),
    'TRADES': ((99.07, 89.67, 95.04, .037, .033, 100, 1, 0), (80.33, 52.08, 64.80, .045, .042, 100, 1, 0),
               (56.70, 21.21, 32.81, .065, .060, 100, 1, 0)),
    'ANP-VS': ((99.05, 91.31, 95.43, .017, .015, 6.81, 10.57, 84.16), (88.18, 56.21, 71.44, .019, .016, 12.27, 2.41, 76.53),
               (59.15, 22.35, 37.01, .035, .030, 16.74, 2.02, 66.80)),
}  # fmt: skip


@pytest.mark.parametrize(('place', 'name'), [(0, 'mnist'), (1, 'cifar10'), (2, 'cifar100')])
def test_published_tables(place, name):
    table = published(name)
    assert [*table.columns] == ['clean', 'white box', 'black box', 'V white', 'V black', 'memory %', 'FLOPs x', 'sparsity %']
    assert {method: tuple(row) for method, row in zip(table.index, table.values.tolist(), strict=True)} == {
        method: tables[place] for method, tables in README.items()}


def test_no_such_table():
    with pytest.raises(KeyError, match='there are mnist, cifar10, cifar100'):
        published('imagenet')


def test_without_its_source_there_is_no_black_box(monkeypatch, caplog):
    real = anpvs.train_method

    def fails_once(name, start, train, plan, seed, *args, **kwargs):
        if seed == 1:
            return Trained(name, None, collapsed='no reason')
        return real(name, start, train, plan, seed, *args, **kwargs)

    monkeypatch.setattr(anpvs, 'train_method', fails_once)
    found = side_by_side(('AT',), (0,))
    assert 'black box' not in found.as_published() and 'AT with seed 1, collapsed' in caplog.text
