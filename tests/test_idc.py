"""Importance-driven coverage against published values, a literal form, and laws that it has to keep.

This file is also the script that two processes run.
"""

import json
import logging
import math
import sys
import time
from collections import Counter
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from robustnb.attribution import Relevance, relevance, top_units
from robustnb.coverage import CRITERIA, Activations, Coverage, assess
from robustnb.devices import seeded
from robustnb.distributed import joined, rank
from robustnb.idc import IDC, Clustering, Clusters, Group, UnitTraces, _places, importance_coverage
from robustnb.results import Result, load_arrays, save_arrays

GOLDEN = {case['id']: case for case in json.loads((Path(__file__).parent / 'golden' / 'coverage.json').read_text())['cases']}
QUIET = {'show_progress': False}


def images(count, seed=0):
    "Images in [0, 1] that differ in where they are bright."
    with seeded(seed):
        x = torch.rand(count, 1, 8, 8) * torch.rand(count, 1, 1, 1)
        x[:, :, :4] *= torch.rand(count, 1, 1, 1)
        return x, torch.arange(count) % 4


@cache
def net():
    "Convolution, batch norm, two linear layers: 8 + 12 + 4 units, and predictions of every class."
    with seeded(3):
        model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.AvgPool2d(3), nn.Flatten(),
                              nn.Linear(32, 12), nn.ReLU(), nn.Linear(12, 4)).eval()
        with torch.no_grad():
            for layer in model[5], model[7]:
                layer.weight.mul_(3)
            model[7].bias.sub_(model(images(400)[0]).mean(0))
    return model


TRAIN, TEST = images(160), images(70, seed=1)


def taught(rows, units=None, **how):
    "An `IDC` of one layer 'a' that has seen these training activations."
    rows = torch.as_tensor(rows, dtype=torch.float64)
    idc = IDC(units={'a': list(range(rows.shape[1]))} if units is None else units, **how)
    idc.train = idc.learns()
    idc.train.update({'a': rows})
    return idc


def shown(idc, rows, batch=None):
    "The criterion after these test activations."
    rows = torch.as_tensor(rows, dtype=torch.float64)
    for part in rows.split(batch or max(len(rows), 1)):
        idc.update({'a': part})
    return idc


# --- published values -----------------------------------------------------------------------------------------------------


def test_two_neurons():
    case = GOLDEN['idc_two_neurons']
    inputs = case['inputs']
    idc = shown(taught(inputs['train_activations'], clustering=Clustering(k=2)), inputs['test_activations'])
    assert idc.fitted().clusters[0].sizes == [2, 2]
    clusters = Clusters(case['params']['centers'])
    keys = clusters.keys(clusters.assign(torch.tensor(inputs['test_activations'])))
    assert len(keys.unique()) / clusters.total == pytest.approx(case['expected']['WISDOM'])


def test_combinations():
    case = GOLDEN['idc_combos']
    clusters = Clusters(case['params']['centers'])
    codes = clusters.assign(torch.tensor(case['inputs']['test_activations']))
    found = [[clusters.centres[unit][code] for unit, code in enumerate(row)] for row in codes.tolist()]
    assert found == case['expected']['WISDOM'] == case['expected']['DeepImportance-TF']


def test_number_of_clusters():
    case = GOLDEN['idc_silhouette_k']
    values = np.array(case['inputs']['activations'])
    assert len(Clustering().centres(values)) == case['expected']['WISDOM']
    first = Clustering(ks=(2, 3, 4), decimals=2)
    assert len(first.centres(values)) == case['expected']['DeepImportance-TF']
    assert first.centres(values).tolist() == [0.09, 5.09, 10.01]


def test_maps_are_averaged_before_the_activation():
    case = GOLDEN['conv_spatial_mean']
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor(case['inputs']['conv_w']).view(2, 1, 1, 1))
        model[0].bias.copy_(torch.tensor(case['inputs']['conv_b']))
        model[3].weight.copy_(torch.arange(16.0).view(2, 8) / 10)
        model[3].bias.zero_()
    image = torch.tensor(case['inputs']['image']).view(1, 1, 2, 2)
    coverage = Coverage(model, IDC(units={'0': [0, 1], '3': [0, 1]}), **QUIET).learn((image, torch.zeros(1).long()))
    expected = case['expected']['NeuraL-Coverage']
    assert coverage.criteria['IDC'].train.state['rows'][0].tolist() == pytest.approx(
        expected['Conv2d-1'][0] + expected['Linear-1'][0], abs=1e-5)


def test_selection_over_all_layers():
    case = GOLDEN['select_top_all']
    assert top_units(case['inputs'], case['params']['m']) == case['expected']['WISDOM']


# --- a literal form -------------------------------------------------------------------------------------------------------


def nearest(value, centres):
    "The place of the nearest centre, the lower of two."
    return min(range(len(centres)), key=lambda i: (abs(value - centres[i]), i))


def literal(train, test, centres):
    "Covered combinations and their share, image by image."
    made, total = set(), 1
    for row in test:
        if not np.isnan(row).any():
            made.add(tuple(nearest(value, c) for value, c in zip(row, centres, strict=True)))
    for c in centres:
        total *= len(c)
    return made, len(made) / total


def undecided(values, centres):
    "Whether rounding decides which of two centres is nearer to one of the values."
    distances = np.sort(np.abs(values[:, None] - np.asarray(centres)), axis=1)
    gaps = np.diff(distances[:, :2], axis=1)
    return bool(((gaps > 0) & (gaps < 1e-9)).any())


rows_of = st.integers(1, 4).flatmap(lambda units: st.tuples(*(
    st.lists(st.lists(st.integers(-6, 6), min_size=units, max_size=units), min_size=1, max_size=12) for _ in range(2))))


@settings(max_examples=60, deadline=None)
@given(rows_of, st.sampled_from([1, 2, 3, 'silhouette']), st.integers(1, 5))
def test_equals_the_literal_form(rows, k, batch):
    train, test = (np.array(part, float) / 2 for part in rows)
    idc = shown(taught(train, k=k), test, batch)
    centres = [Clustering(k).centres(column) for column in train.T]
    assume(not any(undecided(np.concatenate([a, b]), c) for a, b, c in zip(train.T, test.T, centres, strict=True)))
    made, share = literal(train, test, centres)
    assert idc.compute() == pytest.approx(share)
    assert {tuple(row) for row in idc.covered()['all layers'].tolist()} == made
    assert idc.counts() == (len(made), math.prod(map(len, centres)))
    own, _ = literal(train, train, centres)
    codes = literal(train, test, centres)[0] & own
    assert idc.seen({'a': torch.tensor(test)}).tolist() == [bool(literal(train, row[None], centres)[0] & codes) for row in test]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=40), st.integers(0, 99))
def test_combinations_come_back_from_their_numbers(sizes, seed):
    clusters = Clusters([np.arange(size) for size in sizes])
    codes = torch.from_numpy(np.random.default_rng(seed).integers(0, sizes, (20, len(sizes))))
    assert clusters.codes(clusters.keys(codes)).equal(codes)
    assert clusters.assign(codes.float()).equal(codes)
    assert (clusters.keys(codes) >= 0).all() and clusters.total == math.prod(sizes)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=6), min_size=1, max_size=3), st.integers(0, 99))
def test_the_nearest_centre_is_exact_in_single_precision(centres, seed):
    clusters = Clusters(centres)
    with np.errstate(all='ignore'):
        values = np.concatenate([np.concatenate([c, (c[:-1] + c[1:]) / 2]) for c in clusters.centres])
    table = np.random.default_rng(seed).choice(values, (30, len(centres))).astype(np.float32)
    codes = clusters.assign(torch.from_numpy(table)).numpy()
    for column, found, c in zip(table.T, codes.T, clusters.centres, strict=True):
        distance = np.abs(column[:, None].astype(float) - c)
        assert (distance[np.arange(len(found)), found] <= distance.min(1) * (1 + 1e-12)).all()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(-2, 2)), max_size=12, unique=True),
       st.lists(st.tuples(st.integers(0, 3), st.integers(-2, 2)), max_size=12))
def test_places_in_a_table(table, rows):
    found = _places(torch.tensor(table).view(-1, 2), torch.tensor(rows).view(-1, 2).long())
    assert found.tolist() == [table.index(row) if row in table else -1 for row in rows]


# --- laws -----------------------------------------------------------------------------------------------------------------

SETTINGS = {'net': {'m': 6, 'k': 2}, 'layer': {'m': 3, 'per': 'layer'}, 'class': {'m': 3, 'by': 'prediction'},
            'class and layer': {'m': 2, 'by': 'label', 'per': 'layer', 'k': 3},
            'other units': {'m': 5, 'units': 'la', 'how': 'signed'},
            'correct': {'m': 5, 'target': 'label', 'correct_only': True}, 'wide': {'m': 20, 'k': 9}}


@cache
def learned(name):
    return Coverage(net(), IDC(**SETTINGS[name]), batch_size=64, **QUIET).learn(TRAIN)


def fresh(name, batch_size=64):
    "A coverage that has learned, and has seen no test."
    coverage = Coverage(net(), learned(name).criteria['IDC'], batch_size=batch_size, **QUIET)
    return coverage


@pytest.mark.parametrize('name', SETTINGS)
def test_laws(name):
    x, y = TEST
    whole = fresh(name).update(TEST)
    value, covered = whole.compute()['IDC'], whole.criteria['IDC'].counts()[0]
    with seeded(0):
        order = torch.randperm(len(x))
    assert fresh(name, batch_size=7).update((x[order], y[order])).compute()['IDC'] == value
    assert fresh(name).update(TEST).update(TEST).criteria['IDC'].counts()[0] == covered
    values = [fresh(name).update((x[:n], y[:n])).compute()['IDC'] for n in (1, 10, 30, 70)]
    assert all(before <= after for before, after in pairwise(values)) and values[-1] == value
    left, right = fresh(name).update((x[:30], y[:30])), fresh(name).update((x[20:], y[20:]))
    left.merge(right)
    assert left.compute()['IDC'] == value and left.samples == 80
    assert fresh(name).gain(TEST)['IDC'] == value and fresh(name).update(TEST).gain(TEST)['IDC'] == 0


@pytest.mark.parametrize('name', SETTINGS)
def test_no_suite_covers_more_than_it_can_reach(name):
    found = importance_coverage(net(), TRAIN, {'a': TEST, 'b': (TEST[0][:9], TEST[1][:9])}, **SETTINGS[name], **QUIET)
    table = found.table()
    assert (table['coverage'] <= table['reachable']).all() and (table['covered'] <= table['samples']).all()
    assert (table['covered'] <= table['total']).all() and table['reachable'].max() <= 1
    assert (table.query('samples == 0')['seen'].isna()).all() and table.query('samples > 0')['seen'].between(0, 1).all()


@pytest.mark.parametrize('name', SETTINGS)
def test_the_result_says_what_the_criterion_says(name):
    found = importance_coverage(net(), TRAIN, {'a': TEST}, **SETTINGS[name], batch_size=64, **QUIET)
    coverage = fresh(name).update(TEST)
    idc = coverage.criteria['IDC']
    assert found.table()['coverage'].mean() == pytest.approx(coverage.compute()['IDC'])
    assert found.table()['covered'].sum() == idc.counts()[0] and found.table()['total'].sum() == idc.counts()[1]
    seen = torch.cat([idc.seen(batch) for batch in coverage.walk(TEST)])
    if found.settings['by'] == 'label':
        with pytest.raises(ValueError, match='label=...'):
            found.seen(net(), TEST[0])
    assert found.seen(net(), TEST[0], TEST[1]).equal(seen)
    assert found.seen(net(), *TRAIN).all() or name == 'correct'


def test_missing_combinations_are_those_of_the_training_data():
    found = importance_coverage(net(), TRAIN, {'a': TEST}, m=5, k=2, **QUIET)
    idc = Coverage(net(), IDC(m=5, k=2), **QUIET).learn(TRAIN).criteria['IDC']
    clusters = idc.fitted().clusters[0]
    count = Counter(map(tuple, clusters.assign(idc.train.state['rows']).tolist()))
    made = {tuple(row) for row in shown_codes(idc, TEST)}
    missing = found.missing(limit=None)
    listed = dict(zip(missing['clusters'], missing['training images'], strict=True))
    assert listed == {c: n for c, n in count.items() if c not in made}
    assert missing['training images'].is_monotonic_decreasing and len(found.missing('a', limit=2)) == 2
    row = found.table().iloc[0]
    assert row['training'] == len(count) and row['shared'] == pytest.approx(len(made & set(count)) / len(count))
    with pytest.raises(KeyError, match='no suite .b. here'):
        found.missing('b')


def test_missing_combinations_of_several_groups_and_words():
    units = {label: {'0': range(8), '5': range(12)} for label in range(4)}
    found = importance_coverage(net(), TRAIN, {'a': (TEST[0][:20], TEST[1][:20])}, units=units, by='label', k=12, **QUIET)
    assert max(len(clusters.words) for clusters in found.fitted.clusters) == 2
    missing = found.missing(limit=None)
    traces = Coverage(net(), IDC(units=units, by='label', k=12), **QUIET).learn(TRAIN).criteria['IDC'].train
    made = Counter()
    for group, clusters in zip(found.fitted.groups, found.fitted.clusters, strict=True):
        values = traces.state['rows'][TRAIN[1] == group.label]
        made.update((group.name, tuple(row)) for row in clusters.assign(values).tolist())
    listed = list(zip(missing['group'], missing['clusters'], strict=True))
    assert 0 < len(listed) == len(set(listed)) <= len(made) and all(key in made for key in listed)
    assert missing['training images'].tolist() == [made[key] for key in listed]
    assert len(made) - len(listed) == round((found.dataset['shared'] * found.dataset['training']).sum().item())


def test_a_plot_shows_the_smallest_shares():
    found = importance_coverage(net(), TRAIN, TEST, units={'0': range(8), '5': range(12)}, k=9, **QUIET)
    left, right = found.plot().axes[0].get_xlim()
    assert found.table()['reachable'][0] < 1e-9 and right == pytest.approx(1.03 * found.table()['reachable'][0])


def shown_codes(idc, data):
    "The combinations of a suite."
    coverage = Coverage(net(), idc, **QUIET).update(data)
    return coverage.criteria['IDC'].covered()['all layers'].tolist()


# --- stored, loaded, merged, shared by processes --------------------------------------------------------------------------


@pytest.mark.parametrize('name', SETTINGS)
def test_a_stored_state_needs_no_training_data(name, tmp_path):
    before = fresh(name).update((TEST[0][:40], TEST[1][:40]))
    save_arrays(tmp_path / 'state.safetensors', before.state_dict())
    after = Coverage(net(), IDC(**SETTINGS[name]), batch_size=64, **QUIET)
    after.load_state_dict(load_arrays(tmp_path / 'state.safetensors')[0])
    assert after.compute() == before.compute() and after.criteria['IDC'].counts() == before.criteria['IDC'].counts()
    rest = TEST[0][40:], TEST[1][40:]
    assert after.update(rest).compute() == before.update(rest).compute()
    assert after.criteria['IDC'].fitted().groups == before.criteria['IDC'].fitted().groups


def test_two_criteria_are_stored_side_by_side():
    criteria = {'two': IDC(m=4, k=2), 'three': IDC(m=4, k=3), 'other': IDC(m=3, by='prediction')}
    before = Coverage(net(), criteria, **QUIET).learn(TRAIN).update(TEST)
    after = Coverage(net(), criteria, **QUIET)
    after.load_state_dict(before.state_dict())
    assert after.compute() == before.compute()


@pytest.mark.parametrize('name', SETTINGS)
def test_a_result_is_stored(name, tmp_path):
    found = importance_coverage(net(), TRAIN, {'a': TEST, 'b': TRAIN}, **SETTINGS[name], **QUIET)
    found.save(tmp_path / 'found.safetensors')
    again = Result.load(tmp_path / 'found.safetensors')
    assert type(again).__name__ == 'ImportanceCoverage' and again.table().equals(found.table()) and again.units == found.units
    assert again.seen(net(), *TEST).equal(found.seen(net(), *TEST)) and again.missing('a').equals(found.missing('a'))
    assert {group: {unit: c.tolist() for unit, c in of.items()} for group, of in again.centres.items()} == {
        group: {unit: c.tolist() for unit, c in of.items()} for group, of in found.centres.items()}
    assert found.plot('a title') is not None and repr(found).startswith('ImportanceCoverage') and found._repr_html_()


def test_learning_again_forgets_what_was_chosen():
    other = TRAIN[0].flip(2), TRAIN[1].flip(0)
    coverage = Coverage(net(), IDC(m=6), **QUIET).learn(TRAIN)
    first = coverage.criteria['IDC'].fitted()
    second = coverage.learn(other).criteria['IDC'].fitted()
    assert second.groups == Coverage(net(), IDC(m=6), **QUIET).learn(other).criteria['IDC'].fitted().groups
    assert [c.tolist() for c in second.clusters[0].centres] != [c.tolist() for c in first.clusters[0].centres]


def test_parts_of_the_training_data_merge():
    parts = [UnitTraces([Group((('a', 0), ('a', 1)))]) for _ in range(3)]
    rows, ids = torch.rand(20, 2), torch.arange(20)
    for traces, part in zip(parts, (slice(0, 20), slice(12, 20), slice(0, 12)), strict=True):
        traces.update(Activations({'a': rows[part]}, ids=ids[part]))
    parts[1].merge(parts[2])
    assert parts[1].compute()['rows'].equal(parts[0].compute()['rows'])
    other = UnitTraces([Group((('a', 1),))])
    other.update({'a': rows})
    with pytest.raises(ValueError, match='different units'):
        other.merge(parts[0])


SHARED = 'net', 'class and layer', 'correct'


def found_by(name):
    "Values and counts of a setting, the units, and a result, as this process sees them."
    coverage = Coverage(net(), IDC(**SETTINGS[name]), batch_size=16, **QUIET).learn(TRAIN).update(TEST)
    coverage.gather()
    idc = coverage.criteria['IDC']
    suites = {'a': TEST, 'one': (TEST[0][:1], TEST[1][:1])}
    result = importance_coverage(net(), TRAIN, suites, **SETTINGS[name], batch_size=16, **QUIET)
    tables = [table.to_csv() for table in (result.table(), result.missing())]
    return [coverage.compute()['IDC'], idc.counts(), repr(idc.fitted().groups), *tables]


def test_two_processes_equal_one(in_two_processes):
    first, second = (json.loads((in_two_processes / f'found{number}.json').read_text()) for number in (0, 1))
    assert first == second
    assert first == json.loads(json.dumps({name: found_by(name) for name in SHARED}))


# --- the units ------------------------------------------------------------------------------------------------------------


def test_settings_are_words_and_compare(caplog):
    found = relevance(net(), TRAIN, target='prediction', **QUIET)
    again = relevance(net(), TRAIN, target='prediction', **QUIET)
    one, two = (Coverage(net(), IDC(4, units), **QUIET).learn(TRAIN).update(TEST) for units in (found, again))
    one.merge(two)
    assert one.criteria['IDC'].settings == two.criteria['IDC'].settings
    text = repr(IDC(4, found))
    assert 'Relevance' not in text and '\n' not in text and repr(found.top(4)) in text
    by_name = Coverage(net(), IDC(4), **QUIET).learn(TRAIN).update(TEST)
    assert by_name.compute() == Coverage(net(), IDC(4, found), **QUIET).learn(TRAIN).update(TEST).compute()
    with pytest.raises(ValueError, match='settings differ'):
        one.criteria['IDC'].merge(by_name.criteria['IDC'])


def test_units_come_from_anything_with_a_top():
    class Votes:
        def top(self, m, per='net'):
            return {'5': list(range(m))} if per == 'net' else {'0': [1], '5': list(range(m))}
    assert IDC(3, Votes()).units == {'5': [0, 1, 2]}
    assert [group.name for group in IDC(2, Votes(), per='layer')._groups] == ['0', '5']
    with pytest.raises(ValueError, match='by_class=True'):
        IDC(3, Votes(), by='label')


def test_units_of_each_class(caplog):
    found = relevance(net(), TRAIN, by_class=True, **QUIET)
    named = {label: found.top(3, label=label) for label in range(4)}
    a, b, c = (Coverage(net(), IDC(3, units, by='label'), **QUIET).learn(TRAIN).update(TEST) for units in (found, named, 'lrp'))
    assert a.compute() == b.compute() == c.compute()
    assert [group.name for group in a.criteria['IDC'].fitted().groups] == [f'class {label}' for label in range(4)]
    with pytest.raises(ValueError, match='by_class=True'):
        IDC(3, relevance(net(), TRAIN, **QUIET), by='label')


def test_a_class_that_training_never_shows_makes_no_combination(caplog):
    x, y = TRAIN[0][TRAIN[1] != 2], TRAIN[1][TRAIN[1] != 2]
    found = importance_coverage(net(), (x, y), {'a': TEST}, m=3, by='label', **QUIET)
    table = found.table()
    assert table['group'].tolist() == ['class 0', 'class 1', 'class 3'] and table['samples'].sum() == int((TEST[1] != 2).sum())
    assert 'no training sample belongs to class 2' in caplog.text
    assert not found.seen(net(), TEST[0], TEST[1])[TEST[1] == 2].any()
    only = TEST[0][TEST[1] == 1], TEST[1][TEST[1] == 1]
    table = importance_coverage(net(), TRAIN, only, m=3, by='label', **QUIET).table().set_index('group')
    assert table.loc['class 0', 'coverage'] == 0 < table.loc['class 1', 'coverage'] and math.isnan(table.loc['class 0', 'seen'])


def test_correct_only_leaves_the_others_out():
    correct = net()(TRAIN[0]).argmax(1) == TRAIN[1]
    ours = Coverage(net(), IDC(4, target='label', correct_only=True), **QUIET).learn(TRAIN).criteria['IDC']
    theirs = Coverage(net(), IDC(4, target='label'), **QUIET).learn((TRAIN[0][correct], TRAIN[1][correct])).criteria['IDC']
    assert ours.train.state['rows'].equal(theirs.train.state['rows']) and ours.fitted().groups == theirs.fitted().groups
    wrong = TRAIN[0][~correct], TRAIN[1][~correct]
    for units in 'lrp', {'5': [0]}:
        with pytest.raises(ValueError, match='classified correctly'):
            Coverage(net(), IDC(1, units, correct_only=True), **QUIET).learn(wrong).update(TEST)


def test_targets_decide_the_units():
    labels = Coverage(net(), IDC(4, target='label'), **QUIET).learn(TRAIN).criteria['IDC']
    zero = Coverage(net(), IDC(4, target=0), **QUIET).learn(TRAIN).criteria['IDC']
    expected = [relevance(net(), TRAIN, target=target, **QUIET).top(4) for target in ('label', 0)]
    for idc, units in zip((labels, zero), expected, strict=True):
        assert {unit for unit in idc.fitted().units} == {(layer, unit) for layer, found in units.items() for unit in found}
    with pytest.raises(ValueError, match='explains the prediction'):
        IDC(by='prediction', target='label')


def test_every_place_of_a_map_may_be_a_unit():
    found = importance_coverage(net(), TRAIN, TEST, m=6, k=2, reduce='all', **QUIET)
    assert found.settings['layers'] == {'0': 288, '5': 12, '7': 4}
    assert found.seen(net(), TRAIN[0]).all()


@pytest.mark.parametrize('units,by', [({0: {'5': [0, 1]}, 1: {'5': [2]}}, None), ({'5': [0, 1]}, 'label'),
                                      ({'5': [0, 1]}, 'prediction')])
def test_units_class_by_class_want_something_that_tells_classes_apart(units, by):
    with pytest.raises(ValueError, match=f'class by class.*got by={by!r}'):
        IDC(units=units, by=by)


def test_a_group_without_training_samples_is_left_out(caplog):
    named = {0: {'5': [0, 1]}, 9: {'0': [3], '5': [1]}}
    strange = torch.where(TEST[1] == 0, 0, 9)
    suites = {'a': TEST, 'strange': (TEST[0], strange)}
    found = importance_coverage(net(), TRAIN, suites, units=named, by='label', k=2, **QUIET)
    only = importance_coverage(net(), TRAIN, suites, units={0: named[0]}, by='label', k=2, **QUIET)
    assert found.table().equals(only.table()) and found.table()['group'].unique().tolist() == ['class 0']
    assert found.settings['notes'] == {'class 9': 'is left out: no training sample belongs to it'}
    assert 'IDC: class 9 is left out' in caplog.text and 'no training sample belongs to class 9' in caplog.text
    assert found.seen(net(), TEST[0], strange).tolist() == only.seen(net(), TEST[0], strange).tolist()
    assert not found.seen(net(), TEST[0], strange)[strange == 9].any()
    coverage = Coverage(net(), IDC(units=named, by='label', k=2), **QUIET).learn(TRAIN).update(suites['strange'])
    assert coverage.compute()['IDC'] == found.table()['coverage'][1]
    again = Coverage(net(), IDC(units=named, by='label', k=2), **QUIET)
    again.load_state_dict(coverage.state_dict())
    assert again.compute() == coverage.compute() and again.criteria['IDC'].counts() == coverage.criteria['IDC'].counts()
    with pytest.raises(ValueError, match='no training sample belongs to class 9, so there are no clusters'):
        importance_coverage(net(), TRAIN, TEST, units={9: {'5': [1]}}, by='label', **QUIET)


def test_a_relevance_says_what_it_explains():
    found = relevance(net(), TRAIN, target='label', by_class=True, **QUIET)
    assert IDC(3, found).target == 'label' == importance_coverage(net(), TRAIN, TEST, 3, units=found, **QUIET).settings['target']
    assert IDC(3, found, by='label', target='label').target == 'label' and IDC(3, 'lrp').target == 'prediction'
    assert IDC(3, 'lrp', target=0).target == 0 and IDC(3, 'lrp', by='label').target == 'label'
    for how in {'by': 'prediction'}, {'target': 0}:
        with pytest.raises(ValueError, match="the relevance explains target='label'"):
            IDC(3, found, **how)


# --- clusters -------------------------------------------------------------------------------------------------------------


def test_published_conventions():
    with seeded(0):
        values = torch.randn(200).relu().numpy()
    first = Clustering(ks=(2, 3, 4), drop_zeros=True, least=10, decimals=2)
    plain = Clustering(ks=(2, 3, 4)).centres(values[values != 0])
    assert first.centres(values).tolist() == plain.round(2).tolist()
    assert first.centres(np.r_[np.zeros(50), np.arange(1, 10)]).tolist() == [0]
    assert first.centres(np.zeros(30)).tolist() == [0] and Clustering(2).centres(values).shape == (2,)


def test_units_that_say_nothing_have_one_cluster(caplog):
    rows = torch.tensor([[1.0, 2, 5], [1, 3, 5], [1, 4, 5], [1, 9, 5]])
    idc = taught(rows, k=2)
    assert idc.fitted().clusters[0].sizes == [1, 2, 1] and shown(idc, rows).compute() == 1
    assert 'a 0 says the same to all training samples' in caplog.text and '1 more' in caplog.text
    assert set(idc.fitted().notes) == {'a 0', 'a 2'}
    assert taught([[1.0], [2.0]], k=9).fitted().clusters[0].sizes == [2], 'fewer distinct values than clusters'


def test_values_that_are_no_numbers():
    idc = taught([[0.0, 0], [1, 1], [0, 1]], k=2)
    rows = torch.tensor([[math.nan, 0], [math.inf, -math.inf], [-math.inf, math.inf], [0, math.nan]])
    assert shown(idc, rows).covered()['all layers'].tolist() == [[1, 0], [0, 1]] or idc.counts() == (2, 4)
    assert idc.seen({'a': rows}).tolist() == [False, False, True, False]


ESTIMATORS = {'MiniBatchKMeans': {'n_clusters': 3, 'random_state': 0, 'n_init': 3},
              'BisectingKMeans': {'n_clusters': 3, 'random_state': 0},
              'KMeans': {'n_clusters': 3, 'random_state': 0, 'n_init': 10}, 'MeanShift': {'bandwidth': 1.0},
              'AffinityPropagation': {'random_state': 0, 'damping': 0.9}}


@pytest.mark.parametrize('name', ESTIMATORS)
def test_estimators_of_scikit_learn(name):
    cluster = pytest.importorskip('sklearn.cluster')
    clustering = Clustering(estimator=getattr(cluster, name)(**ESTIMATORS[name]))
    with seeded(0):
        values = (torch.tensor([0.0, 5, 10]).repeat(20) + 0.1 * torch.randn(60)).numpy()
    centres = clustering.centres(values)
    assert np.abs(centres - [0, 5, 10]).max() < 0.2 and clustering.centres(values[::-1]).tolist() == centres.tolist()
    assert clustering.centres(np.ones(30)).tolist() == [1] and name in repr(clustering)
    assert clustering == Clustering(estimator=getattr(cluster, name)(**ESTIMATORS[name])) != Clustering()
    found = importance_coverage(net(), TRAIN, TEST, m=3, clustering=clustering, **QUIET)
    assert 0 < found.table()['coverage'][0] <= found.table()['reachable'][0] and name in found.settings['clustering']


def test_an_estimator_that_starts_at_random_is_told_of(caplog):
    cluster = pytest.importorskip('sklearn.cluster')
    Clustering(estimator=cluster.MeanShift())
    assert not caplog.text
    Clustering(estimator=cluster.MiniBatchKMeans())
    assert 'random_state' in caplog.text
    with pytest.raises(ValueError, match='no centres'):
        Clustering(estimator=cluster.DBSCAN()).centres(np.arange(5.0))


# --- what can go wrong ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('how,words', [
    ({'per': 'class'}, "per is 'net' or 'layer'"), ({'by': 'class'}, "by is 'prediction'"),
    ({'k': 0}, 'k is a number of clusters'), ({'k': True}, 'k is a number of clusters'),
    ({'k': 2.0}, 'k is a number of clusters'),
    ({'units': {'a': [0.7]}}, 'whole numbers'), ({'units': {'a': torch.tensor([True, False])}}, 'no masks'),
    ({'units': {'a': ['0']}}, 'whole numbers'), ({'k': 'best'}, 'k is a number of clusters'),
    ({'units': {}}, 'no units'), ({'units': {'a': []}}, 'a group needs units'),
    ({'units': {'a': [1, 1]}}, 'each of them once')])
def test_settings_that_make_no_sense(how, words):
    with pytest.raises(ValueError, match=words):
        IDC(**how)


def test_numbers_of_any_whole_type():
    rows = np.random.default_rng(0).normal(size=(30, 3))
    expected = shown(taught(rows, k=2), rows).covered()
    for units in np.arange(3), torch.arange(3), range(3), (np.int64(0), 1, 2):
        assert shown(taught(rows, {'a': units}, k=np.int64(2)), rows).covered()['all layers'].equal(expected['all layers'])


@pytest.mark.parametrize('how,words', [
    ({'m': 0}, 'at least 1'), ({'units': {'9': [0]}}, "no layer '9' here"),
    ({'units': {'5': [12]}}, '5 has 12 units'), ({'skip': 3}, 'no layer is left'), ({'units': 'xyz'}, 'no method')])
def test_units_that_are_not_there(how, words):
    with pytest.raises((ValueError, KeyError), match=words):
        Coverage(net(), IDC(**how), **QUIET).learn(TRAIN)


def test_a_layer_with_fewer_units_is_taken_whole(caplog):
    coverage = Coverage(net(), IDC(10, per='layer'), **QUIET).learn(TRAIN)
    assert '0 has 8 units, fewer than m=10' in caplog.text
    assert [len(group.units) for group in coverage.criteria['IDC'].fitted().groups] == [8, 10]


def test_data_that_do_not_do():
    batches = [(TRAIN[0][i:i + 40], TRAIN[1][i:i + 40]) for i in range(0, 160, 40)]
    with pytest.raises(ValueError, match='twice'):
        Coverage(net(), IDC(), **QUIET).learn(iter(batches))
    from_list = Coverage(net(), IDC(), **QUIET).learn(batches).criteria['IDC'].fitted().groups
    assert from_list == Coverage(net(), IDC(), **QUIET).learn(TRAIN).criteria['IDC'].fitted().groups
    units = from_list[0].units
    named = {layer: [u for name, u in units if name == layer] for layer, _ in units}
    assert Coverage(net(), IDC(units=named), **QUIET).learn(iter(batches)).criteria['IDC'].fitted().units
    with pytest.raises(ValueError, match='empty'):
        importance_coverage(net(), TRAIN, (TEST[0][:0], TEST[1][:0]), **QUIET)
    with pytest.raises(ValueError, match='empty'):
        importance_coverage(net(), (TEST[0][:0], TEST[1][:0]), TEST, **QUIET)
    with pytest.raises(ValueError, match='no suite'):
        importance_coverage(net(), TRAIN, {}, **QUIET)


def test_before_anything_was_learned():
    with pytest.raises(ValueError, match='no units have been chosen'):
        IDC().learns().update({'a': torch.rand(3, 2)})
    with pytest.raises(ValueError, match='has not seen'):
        IDC(units={'a': [0]}).update({'a': torch.rand(3, 2)})
    assert IDC().compute() == 0 and IDC().counts() == (0, 0)


def test_labels_of_any_whole_type_and_none_at_all():
    plain = importance_coverage(net(), TRAIN, TEST, m=4, by='label', **QUIET).table()
    for dtype in torch.int32, torch.uint8:
        assert importance_coverage(net(), (TRAIN[0], TRAIN[1].to(dtype)), (TEST[0], TEST[1].to(dtype)), m=4, by='label', **QUIET
                                   ).table().equals(plain)
    without = [torch.full_like(y, -1) for y in (TRAIN[1], TEST[1])]
    assert importance_coverage(net(), (TRAIN[0], without[0]), (TEST[0], without[1]), m=4, **QUIET).table().equals(
        importance_coverage(net(), TRAIN, TEST, m=4, **QUIET).table()), 'predictions are explained, so labels do not matter'


def test_a_network_that_attribution_cannot_explain():
    maps = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 1))
    with pytest.raises(ValueError, match='IDC asks for the relevance of all units'):
        Coverage(maps, ['NC', 'IDC'], **QUIET).learn(TRAIN)
    named = Coverage(maps, IDC(units={'0': [0, 1]}), **QUIET).learn(TRAIN).update(TEST)
    assert named.compute()['IDC'] > 0
    regression = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 1))
    assert assess(regression, TRAIN, TEST, IDC(4, k=2), **QUIET).table()['value'][0] > 0


def test_more_combinations_than_a_float_can_say():
    with seeded(0):
        wide = nn.Sequential(nn.Flatten(), nn.Linear(64, 330), nn.ReLU(), nn.Linear(330, 4))
    idc = IDC(units={'1': range(330)}, k=9)
    found = assess(wide, TRAIN, TEST, idc, **QUIET).table().iloc[0]
    assert found['total'] == math.inf and 60 < found['covered'] <= 70 and found['value'] < 1e-300
    result = importance_coverage(wide, TRAIN, TEST, k=9, units={'1': range(330)}, **QUIET)
    assert result.table()['total'][0] == math.inf and result.seen(wide, TRAIN[0]).all()


LARGE = {'vgg16': 16, 'convnext_tiny': 59, 'mobilenet_v3_small': 54, 'vit_b_16': 26}  # name -> layers that run


@pytest.mark.slow
@pytest.mark.parametrize('name', LARGE)
def test_large_networks_with_random_weights(name, caplog):
    "All at 224 px: by themselves 2 to 21 seconds of one processor, and 0.8 to 1.9 GB."
    torchvision = pytest.importorskip('torchvision')
    with seeded(0):
        model = getattr(torchvision.models, name)(num_classes=10).eval()
        if name == 'vit_b_16':  # its head starts at zero, and then nothing matters
            nn.init.normal_(model.heads.head.weight, std=0.05)
        x, y = torch.rand(4, 3, 224, 224), torch.arange(4)
    found = importance_coverage(model, (x, y), {'all': (x, y), 'half': (x[:2], y[:2])}, k=2, batch_size=2, **QUIET)
    table = found.table()
    assert len(found.settings['layers']) == LARGE[name] and sum(map(len, found.units.values())) == 10
    assert table['total'].tolist() == [1024] * 2 and table['training'][0] == table['covered'][0] > 1
    assert table['shared'][0] == 1 and table['seen'].tolist() == [1, 1] and 0 < table['covered'][1] <= 2
    assert 'score that is a number' not in caplog.text and found.seen(model, x).all()


def test_it_is_registered():
    assert 'IDC' in CRITERIA
    found = assess(net(), TRAIN, {'a': TEST}, **QUIET).table().set_index('criterion')
    assert found.loc['IDC', 'value'] == Coverage(net(), IDC(), **QUIET).learn(TRAIN).update(TEST).compute()['IDC']
    assert 'IDC' in assess(net(), TRAIN, {'a': TEST}, **QUIET).settings['notes']


def test_a_relevance_is_a_result_of_its_own(tmp_path):
    found = relevance(net(), TRAIN, target='prediction', **QUIET)
    found.save(tmp_path / 'relevance.safetensors')
    again = Relevance.load(tmp_path / 'relevance.safetensors')
    assert importance_coverage(net(), TRAIN, TEST, 5, units=again, **QUIET).table().equals(
        importance_coverage(net(), TRAIN, TEST, 5, **QUIET).table())


def test_functions_are_asked_for_once_more(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, x):
            return {'scores': self.net(x)}

    def widest(name, rep):
        return rep.flatten(2).amax(2) if rep.dim() > 2 else rep

    def logits(out):
        return out['scores']

    how = {'m': 3, 'by': 'prediction', 'reduce': widest, 'logits': logits}
    found = importance_coverage(Two(), TRAIN, TEST, **how, **QUIET)
    with pytest.raises(ValueError, match='logits=...'):
        found.seen(Two(), TEST[0])
    with pytest.raises(ValueError, match='give a function'):
        found.seen(Two(), TEST[0], logits=logits)
    assert found.seen(Two(), TRAIN[0], reduce=widest, logits=logits).all()
    with pytest.raises(ValueError, match='no layer|nothing|not chosen|no module'):
        found.seen(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), TEST[0], reduce=widest, logits=logits)


def test_assignment_is_fast():
    with seeded(0):
        clusters = Clusters(torch.randn(10, 9).tolist())
        values = torch.randn(100_000, 10)
    spent = []
    for _ in range(3):
        start = time.process_time()
        clusters.keys(clusters.assign(values))
        spent.append(time.process_time() - start)
    assert min(spent) < 1, 'at least 100,000 samples in a second of one processor'


def test_warnings_name_the_room(caplog):
    with caplog.at_level(logging.WARNING):
        Coverage(net(), IDC(m=8), **QUIET).learn(TRAIN).update(TEST)
    assert '70 samples make 70 combinations at most' in caplog.text


if __name__ == '__main__':
    torch.set_num_threads(1)
    with joined('cpu', timeout=60):
        found = {name: found_by(name) for name in SHARED}
        (Path(sys.argv[1]) / f'found{rank()}.json').write_text(json.dumps(found))


def test_a_small_net_gives_all_of_its_units(caplog):
    net, x = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2)).eval(), torch.rand(40, 2)
    data = x, torch.zeros(40, dtype=torch.long)
    table = assess(net, data, data, ['NC', 'IDC'], show_progress=False).table().set_index('criterion')
    assert 'm=10, and there are 4 units' in caplog.text and 0 < table.loc['IDC', 'value'] <= 1
    learned = Coverage(net, IDC(99, k=2), **QUIET).learn(data).criteria['IDC']
    assert 'm=99, and there are 4 units' in caplog.text and [len(group.units) for group in learned.fitted().groups] == [4]
