"""Snapshots that survive a kill bit for bit, inits that differ, and histories that say what single sweeps say."""

import json
import logging
import os
import signal
import sys
from concurrent.futures.process import BrokenProcessPool
from functools import partial, wraps
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from robustnb import histories
from robustnb.attacks import FGSM, PGD
from robustnb.data import load_data
from robustnb.devices import seeded
from robustnb.evaluation import accuracy
from robustnb.fragility import scores
from robustnb.histories import History, Snapshots, history, snapshots
from robustnb.models import build, save
from robustnb.results import Result, load_arrays
from robustnb.synaptic import sweep
from robustnb.training import fit

SILENT = {'show_progress': False}
QUICK = partial(torch.optim.Adam, lr=0.01)


def data():
    "A few digits to learn from, and a few to be asked about."
    train, test = load_data('digits')
    return train.take(200), test.take(60)


def tiny(init):
    "Two layers for the digits, with a dropout between them."
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Dropout(0.1), nn.Linear(12, 10))


def deadly(model, batch, step, marker):
    "Cross entropy, by a process that is killed the first time that a training comes to the third epoch."
    if step == 30 and not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return nn.functional.cross_entropy(model(batch.x), batch.y)


def trained(folder, **how):
    "Three snapshots of two inits of the tiny network."
    train, test = data()
    how = {
        'inits': 2,
        'epochs': 4,
        'every': 2,
        'test': test,
        'batch_size': 16,
        'optimizer': QUICK,
        'device': 'cpu',
    } | how
    return snapshots(tiny, train, folder=folder, **how, **SILENT)


def files(folder: Path) -> dict[str, bytes]:
    "All files of a folder, by their names in it."
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob('*')) if file.is_file()}


def same(a, b) -> bool:
    return a.table().equals(b.table()) and a.totals().equals(b.totals()) and a.dataset.equals(b.dataset)


@pytest.fixture(scope='module')
def born(tmp_path_factory):
    return trained(tmp_path_factory.mktemp('born'))


ASKED = {'filters': ['high', 'pulse'], 'thresholds': 5, 'scoring': {'resamples': 50}} | SILENT


@pytest.fixture(scope='module')
def found(born):
    return history(born, data()[1], FGSM(0.05), **ASKED)


# --------------------------------------------------------------------------------------------------------- snapshots


def test_birth_and_the_last_epoch_are_there(born):
    assert [(row['init'], row['epoch']) for row in born.rows] == [(i, e) for i in (0, 1) for e in (0, 2, 4)]
    table, (_, test) = born.table(), data()
    assert table.columns.tolist() == ['init', 'epoch', 'accuracy', 'file'] and len(born) == 6
    for row in born.rows:
        assert row['accuracy'] == accuracy(born.load(row['init'], row['epoch']), test)
        arrays, note = load_arrays(row['file'])
        assert arrays and note['init'] == row['init'] and note['epoch'] == row['epoch']
    with seeded(1):
        assert tiny(1)[1].weight.equal(born.load(1, 0)[1].weight), 'epoch 0 is before the first step'
    assert table[table['epoch'] == 4]['accuracy'].min() > 0.5 > table[table['epoch'] == 0]['accuracy'].max()
    assert not born.load(0, 4).training and born.plot().axes and 'file' not in born._repr_html_()


def test_stops_on_the_way_change_nothing(born):
    with seeded(1):
        net = tiny(1)
    straight = fit(net, data()[0], epochs=4, batch_size=16, optimizer=QUICK, seed=1, **SILENT).model
    assert all(a.equal(b) for a, b in zip(straight.parameters(), born.load(1, 4).parameters(), strict=True))


def test_every_epoch_number_and_the_last_one(tmp_path):
    found = trained(tmp_path, inits=[7], epochs=3, every=2)
    assert [(row['init'], row['epoch']) for row in found.rows] == [(7, 0), (7, 2), (7, 3)]
    assert [row['epoch'] for row in trained(tmp_path / 'b', inits=1, epochs=0).rows] == [0]


def test_inits_differ_in_weights_and_in_order(born, tmp_path, caplog):
    first, second = (born.load(init, 0) for init in (0, 1))
    assert not any(a.equal(b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not caplog.records
    with seeded(0):
        fixed = tiny(0)
    state = fixed.state_dict()

    def alike(init):
        net = tiny(init)
        net.load_state_dict(state)
        return net

    train, _ = data()
    found = snapshots(alike, train, 2, 1, 1, tmp_path, batch_size=16, device='cpu', **SILENT)
    assert 'begin with the same weights' in caplog.text
    start, end = ([found.load(init, epoch)[1].weight for init in (0, 1)] for epoch in (0, 1))
    assert start[0].equal(start[1]) and not end[0].equal(end[1]), 'the order of the images is another one'


def test_the_order_of_the_images_changes_from_epoch_to_epoch(tmp_path):
    seen = []

    def watch(model, batch, step):
        seen.append(batch.ids.tolist())
        return nn.functional.cross_entropy(model(batch.x), batch.y)

    snapshots(tiny, data()[0], 2, 2, 2, tmp_path, objective=watch, batch_size=200, device='cpu', **SILENT)
    assert len(seen) == 4 and len({tuple(ids) for ids in seen}) == 4
    assert len({tuple(sorted(ids)) for ids in seen}) == 1


def test_a_second_call_reads_and_more_epochs_go_on(tmp_path, monkeypatch):
    trained(tmp_path / 'a')
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / 'a').rglob('epoch*')}
    monkeypatch.setattr(histories, 'accuracy', None)
    monkeypatch.setattr(histories, 'fit', None)
    assert len(trained(tmp_path / 'a')) == 6
    monkeypatch.undo()
    longer = trained(tmp_path / 'a', epochs=6)
    assert [row['epoch'] for row in longer.rows] == [0, 2, 4, 6] * 2
    assert {file: file.stat().st_mtime_ns for file in before} == before
    trained(tmp_path / 'b', epochs=6)
    assert _without_time(files(tmp_path / 'a')) == _without_time(files(tmp_path / 'b'))


def test_a_deleted_snapshot_comes_back(tmp_path, caplog):
    rows = trained(tmp_path).rows
    before = files(tmp_path)
    Path(rows[1]['file']).unlink()
    assert [row['accuracy'] for row in trained(tmp_path).rows] == [row['accuracy'] for row in rows]
    names = [name for name in before if 'epoch' in name]
    assert all(files(tmp_path)[name] == before[name] for name in names) and 'begins again' in caplog.text


def test_another_training_is_refused_and_other_images_are_measured(tmp_path, born):
    trained(tmp_path, inits=1)
    before = files(tmp_path)
    for other in ({'batch_size': 8}, {'optimizer': partial(torch.optim.SGD, lr=0.1)}):
        with pytest.raises(ValueError, match='belongs to another training, with another'):
            trained(tmp_path, inits=2, **other)
    train, test = data()
    rows = trained(tmp_path, inits=1, test=test[:20]).rows
    assert [row['accuracy'] for row in rows] == [accuracy(born.load(0, e), test[:20]) for e in (0, 2, 4)]
    assert files(tmp_path) == before, 'nothing of the other training was made, not even of init 1'
    save(tiny(1), tmp_path / 'init-1' / 'epoch-0002.safetensors')
    with pytest.raises(ValueError, match='was not written by `snapshots`'):
        trained(tmp_path)


def _without_time(found: dict[str, bytes]) -> dict[str, bytes]:
    "The snapshots; the checkpoints beside them know how long an epoch took."
    return {name: content for name, content in found.items() if 'epoch' in name}


@pytest.mark.parametrize(
    'wrong, words',
    [
        ({'inits': 0}, 'at least 1'),
        ({'inits': [1, 1]}, 'different whole numbers'),
        ({'inits': '3'}, 'different whole numbers'),
        ({'every': 0}, '`every` at least 1'),
        ({'epochs': -1}, '`epochs` is at least 0'),
        ({'settings': {'size': 8}}, '`settings` belong to the name'),
    ],
)
def test_wrong_words(wrong, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        trained(tmp_path, **wrong)
    assert not list(tmp_path.iterdir())


def test_wrong_builds(tmp_path, born):
    train, _ = data()
    with pytest.raises(TypeError, match='since each init begins anew'):
        snapshots(tiny(0), train, folder=tmp_path, **SILENT)
    for how, words in (('digits_cmn', 'no model'), (lambda init: 7, 'returned a int')):
        with pytest.raises((TypeError, ValueError), match=words):
            snapshots(how, train, folder=tmp_path, **SILENT)
    with pytest.raises(KeyError, match='no snapshot of init 0 after epoch 3'):
        born.load(0, 3)
    for rows, words in (
        ([{'epoch': 1, 'file': 'x'}], "'init' is missing"),
        (born.rows[:1] * 2, 'two rows .* are of init 0'),
    ):
        with pytest.raises(ValueError, match=words):
            Snapshots(tiny, rows)


def test_an_interruption_leaves_what_is_there(tmp_path, monkeypatch):
    def stop(*args, seed, **how):
        if seed:
            raise KeyboardInterrupt
        return fit(*args, seed=seed, **how)

    monkeypatch.setattr(histories, 'fit', stop)
    found = trained(tmp_path)
    assert found.interrupted and [row['init'] for row in found.rows] == [0] * 3 and 'interrupted' in repr(found)
    monkeypatch.undo()
    assert len(trained(tmp_path)) == 6


# --------------------------------------------------------------------------------------------------------- histories


def test_a_history_is_its_single_sweeps(born, found):
    _, test = data()
    assert (found.inits, found.epochs, found.filters) == ([0, 1], [0, 2, 4], ['high', 'pulse'])
    assert found.layers == ['1', '4'] and found.kinds == ['clean', 'FGSM', 'FGSM - clean']
    for init, epoch in ((0, 4), (1, 2)):
        responses = sweep(born.load(init, epoch), test, FGSM(0.05), ['high', 'pulse'], 5, **SILENT)
        alone, one = scores(responses, resamples=50), found.scores(init, epoch)
        assert one.table().equals(alone.table()) and one.totals().equals(alone.totals())
        rows = found.table().query(f'init == {init} and epoch == {epoch}')
        both = rows.merge(alone.table(), on=['layer', 'filter', 'kind'])
        assert len(both) == 12 and np.array_equal(both['value_x'], both['value_y'])
        for response in ('clean', 'FGSM'):
            curve = responses.curve('4', 'high', response)
            mine = found.curve('4', 'high', response, init, epoch)
            for name in ('position', 'threshold', 'removed', 'accuracy'):
                assert np.array_equal(mine[name], curve[name]), name
            assert np.array_equal(mine['relative'], curve['relative'])
    untouched = found.dataset['untouched'].sel(response='clean').values.ravel().tolist()
    assert untouched == born.table()['accuracy'].tolist()


def test_two_processes_say_the_same_and_one_may_be_killed(born, found, tmp_path):
    "All that needs other processes, which take long to start."
    assert same(history(born, data()[1], FGSM(0.05), **ASKED, jobs=2), found)
    folder = Path(born.rows[0]['file']).parents[1]
    assert trained(tmp_path / 'two', jobs=2).table()['accuracy'].equals(born.table()['accuracy'])
    assert _without_time(files(tmp_path / 'two')) == _without_time(files(folder))
    if sys.platform == 'win32':
        return
    killed, how = tmp_path / 'killed', {'objective': partial(deadly, marker=str(tmp_path / 'marker'))}
    with pytest.raises(BrokenProcessPool):
        trained(killed, jobs=2, **how)
    before = _without_time(files(killed))
    assert 2 <= len(before) < 6 and any(killed.glob('*/training.safetensors'))
    trained(killed, **how)
    after = _without_time(files(killed))
    assert len(after) == 6 and before.items() <= after.items()
    trained(tmp_path / 'whole', **how)
    assert after == _without_time(files(tmp_path / 'whole'))


def test_saved_and_loaded(found, tmp_path):
    found.save(tmp_path / 'h.safetensors')
    again = Result.load(tmp_path / 'h.safetensors')
    assert (
        isinstance(again, History)
        and same(again, found)
        and again.scores(1, 4).table().equals(found.scores(1, 4).table())
    )
    assert again.settings == found.settings


def test_it_goes_on_where_it_was_stopped(born, found, tmp_path, monkeypatch):
    asked, calls = partial(history, born, data()[1], FGSM(0.05), **ASKED, records=tmp_path / 'r.jsonl'), []

    @wraps(sweep)
    def stops(*args, **how):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return sweep(*args, **how)

    monkeypatch.setattr(histories, 'filtered', stops)
    part = asked()
    assert part.settings['interrupted'] and len(part.table()) == 3 * 12 and part.inits == [0]
    assert repr(part) == 'History (3 snapshots of 1 inits, 2 layers, 2 filters, interrupted)'
    assert same(asked(), found) and len(calls) == 4 + 3
    moved = tmp_path / 'moved'
    moved.mkdir()
    rows = [row | {'file': moved / f'{n}.safetensors'} for n, row in enumerate(born.rows)]
    for row, old in zip(rows, born.rows, strict=True):
        row['file'].write_bytes(Path(old['file']).read_bytes())
    assert same(history(Snapshots(tiny, rows), *asked.args[1:], **asked.keywords), found)
    assert len(calls) == 7, 'files that were moved are the same snapshots'


def test_other_scores_need_no_other_pass(born, tmp_path, monkeypatch):
    from robustnb import synaptic

    one = Snapshots(tiny, born.rows[:1])
    ask = partial(history, one, data()[1], filters='high', thresholds=5, records=tmp_path / 'r.jsonl', **SILENT)
    first = ask(scoring={'resamples': 50})
    monkeypatch.setattr(synaptic._Study, '__call__', None)
    second = ask(scoring={'resamples': 50, 'baseline': 'density'})
    assert not np.array_equal(first.table()['value'], second.table()['value'])


def test_calibrated_once_for_all(born, tmp_path):
    _, test = data()
    ask = partial(
        history, born, test, [FGSM(), PGD(0.02, steps=2)], calibrate_to=0.4, **ASKED, records=tmp_path / 'r.jsonl'
    )
    found = ask()
    eps = [one['eps'] for one in found.settings['perturbations'].values()]
    attacked = found.dataset['untouched'].sel(epoch=4, response='FGSM').values
    assert 0 < eps[0] != eps[1] > 0 and 0.2 < attacked.mean() < 0.6
    lines = (tmp_path / 'r.jsonl').read_text().splitlines()
    sizes = [json.loads(line)['values']['strength'] for line in lines if '"calibrated"' in line]
    assert len(sizes) == 4 and eps == [np.median(sizes[:2]), np.median(sizes[2:])]
    assert same(ask(), found) and len((tmp_path / 'r.jsonl').read_text().splitlines()) == len(lines)
    with pytest.raises(ValueError, match='calibrate_to=0.99, for init 0 after epoch 4'):
        history(born, test, FGSM(), calibrate_to=0.99, **ASKED)


def test_a_network_with_nothing_right_has_no_score(born, tmp_path):
    net = tiny(0)
    _, test = data()
    test = test[test.y != 3]
    nn.init.zeros_(net[4].weight)
    net[4].bias.data = nn.functional.one_hot(torch.tensor(3), 10).float()

    save(net, tmp_path / 'blind.safetensors')
    rows = [{'init': 0, 'epoch': 0, 'file': tmp_path / 'blind.safetensors'}, *born.rows[1:3]]
    found = history(Snapshots(tiny, rows), test, FGSM(0.05), **ASKED)
    with pytest.raises(ValueError, match='no snapshot has a single image right'):
        history(Snapshots(tiny, rows[:1]), test, **ASKED)
    table = found.table()
    early = table[table['epoch'] == 0]
    assert early['value'].isna().all() and set(early['label']) == {'unknown'}
    assert table[table['epoch'] > 0]['value'].notna().all()
    assert found.plot('FGSM').axes and found.plot_map().axes and len(found.agreement())


def deeper(init):
    "Another layer with each init."
    more = [part for _ in range(init) for part in (nn.Linear(12, 12), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), *more, nn.Linear(12, 10))


def test_networks_of_different_depth(tmp_path, monkeypatch):
    rows = [{'init': init, 'epoch': 0, 'file': tmp_path / f'{init}.safetensors'} for init in (0, 1)]
    for row in rows:
        save(deeper(row['init']), row['file'])
    with monkeypatch.context() as patch:
        patch.setattr(histories, 'sweep', None)
        with pytest.raises(
            ValueError, match='init 0 has the layers 1, 3, and init 1 1, 3, 5: ask networks of different'
        ):
            history(Snapshots(deeper, rows), data()[1], **ASKED)
    found = history({str(row['init']): Snapshots(deeper, [row]) for row in rows}, data()[1], **ASKED)
    assert [one.layers for one in found.values()] == [['1', '3'], ['1', '3', '5']]


@pytest.mark.parametrize(
    'wrong, words',
    [
        ({'filters': 'hihg'}, "no filter 'hihg'"),
        ({'threshold': 5}, "history has no argument 'threshold'"),
        ({'grid': 'log'}, 'grid'),
        ({'scoring': {'baselin': 'flat'}}, "scoring has no argument 'baselin'"),
        ({'scoring': {'baseline': 'round'}}, 'baseline is one of'),
        ({'scoring': {'resamples': 0}}, 'resamples'),
        ({'calibrate_to': 0.5}, 'there are none; leave it out'),
        ({'calibrate_to': 0.5, 'perturbations': FGSM(), 'eps': 0.1}, 'leave one of them out'),
    ],
)
def test_wrong_questions_are_told_before_anything_is_computed(born, wrong, words, monkeypatch):
    monkeypatch.setattr(histories, 'sweep', None)
    with pytest.raises((TypeError, ValueError), match=words):
        history(born, data()[1], **ASKED | wrong)
    with pytest.raises(TypeError, match='asks what `snapshots` returns'):
        history(tiny(0), data()[1], **ASKED)


def test_data_that_can_be_read_once(born):
    _, test = data()
    few = Snapshots(tiny, born.rows[:2])
    once = ((test.x[at : at + 20], test.y[at : at + 20]) for at in range(0, 60, 20))
    assert same(history(few, once, **ASKED), history(few, (test.x, test.y), **ASKED))


def test_remarks(born, caplog):
    "What is true of each snapshot is said once; that a network guesses, of the last epoch."
    scoring = {'resamples': 50, 'baseline': 'density'}
    strong = history(born, data()[1], FGSM(0.15), **ASKED | {'scoring': scoring})
    assert len(caplog.records) == 2 and 'each step removes a small window' in caplog.text
    assert 'FGSM: after epoch 4 the networks have no more right than one class' in caplog.text
    assert strong.settings['one answer'] == data()[1].y.bincount().max().item() / 60
    assert strong.plot_map('FGSM').axes[0].get_title('left').replace('\n', ' ').endswith('one answer at epoch 0, 2, 4')
    assert not logging.getLogger('robustnb.fragility').filters


def test_an_interrupted_history_is_drawn_as_far_as_it_goes(born):
    some = history(Snapshots(tiny, born.rows[:5]), data()[1], **ASKED)
    values = some.dataset['value'].sel(layer='4', filter='high', kind='clean').values
    (line,) = some.plot(layers=['4']).axes[0].lines[:1]
    assert np.array_equal(line.get_xdata(), [0, 2, 4])
    assert np.allclose(line.get_ydata(), [*values[:, :2].mean(0), values[0, 2]])
    image = some.plot_map(filter='high').axes[0].images[0].get_array()
    assert np.allclose(image[1], line.get_ydata())
    assert np.array_equal(Snapshots(tiny, born.rows[:5]).plot().axes[0].lines[0].get_xdata(), [0, 2, 4])


def test_several_networks(born, monkeypatch):
    found = history({'a': born, 'b': Snapshots(born.build, born.rows[:3])}, data()[1], **ASKED)
    assert list(found) == ['a', 'b'] and found['b'].inits == [0]
    assert found['b'].table().equals(found['a'].table().query('init == 0'))
    calls = []

    @wraps(sweep)
    def stops(*args, **how):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return sweep(*args, **how)

    monkeypatch.setattr(histories, 'filtered', stops)
    part = history({'a': born, 'b': born}, data()[1], **ASKED)
    assert list(part) == ['a'] and part['a'].settings['interrupted'] and len(calls) == 2


def test_own_checkpoints(tmp_path):
    net = build('digits_cnn', seed=3)
    torch.save(net.state_dict(), tmp_path / '10.pt')
    own = Snapshots(partial(build, 'digits_cnn'), [{'init': 0, 'epoch': 10, 'file': tmp_path / '10.pt'}])
    assert np.isnan(own.table()['accuracy'].iloc[0]) and own.load(0, 10).conv1.weight.equal(net.conv1.weight)
    found = history(own, data()[1], **ASKED, where=['linear1'])
    assert found.layers == ['linear1'] and len(found.agreement()) == 0 and found.plot().axes


# ------------------------------------------------------------------------------------------------------------ views


def test_agreement(found):
    table = found.agreement()
    assert table.groupby('compared').size().to_dict() == {'epochs': 2 * 2 * 3, 'inits': 3 * 2 * 3}
    assert (
        table[table['compared'] == 'inits']['pairs'].max() == 1
        and table[table['compared'] == 'epochs']['pairs'].max() == 2
    )
    for _, row in table.iterrows():
        if row['compared'] == 'inits' and row['pairs']:
            a, b = (
                found.dataset['value'].sel(init=i, epoch=row['epoch'], filter=row['filter'], kind=row['kind'])
                for i in (0, 1)
            )
            expected = 1.0 if (np.diff(a) * np.diff(b)).item() > 0 else -1.0
            assert row['spearman'] == pytest.approx(expected), 'two layers are in the same order or not'


def test_figures(found, tmp_path):
    for view, name in ((found.plot, 'a.svg'), (found.plot_map, 'b.png'), (found.plot_agreement, 'c.svg')):
        assert view(save=tmp_path / name).axes and (tmp_path / name).stat().st_size > 5000
    assert len(found.plot('FGSM - clean', ['4']).axes) == 2
    image = found.plot_map('FGSM', 'pulse').axes[0].images[0]
    assert image.get_array().shape == (2, 3) and image.norm.vmin == -image.norm.vmax
    expected = found.dataset['value'].sel(kind='FGSM', filter='pulse').mean('init').transpose('layer', 'epoch')
    assert np.allclose(image.get_array(), expected)
    for wrong in ({'kind': 'PGD'}, {'layers': ['2']}):
        with pytest.raises(KeyError, match='there are'):
            found.plot(**wrong)
    with pytest.raises(KeyError, match="no filter 'low'"):
        found.plot_map(filter='low')
    with pytest.raises(KeyError, match='no epoch 3'):
        found.scores(0, 3)
    with pytest.raises(KeyError, match='no response'):
        found.curve('4', 'high', 'PGD')


def test_nothing_to_ask():
    with pytest.raises(ValueError, match='there is no snapshot'):
        history(Snapshots(tiny, []), data()[1])
