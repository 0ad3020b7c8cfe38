"""The election of units against what the published code computes, a slow literal form, and laws that it has to keep."""

import csv
import json
import sys
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from robustnb import voting
from robustnb.attribution import as_method
from robustnb.data import Batch
from robustnb.devices import seeded
from robustnb.distributed import joined, rank
from robustnb.guard import Normalized, untouched
from robustnb.probes import Probe
from robustnb.results import Result
from robustnb.voting import Votes, loss_gain, pruned, read_votes, unit_scores, vote, votes_of, weights_of

GOLDEN = {case['id']: case for case in json.loads((Path(__file__).parent / 'golden' / 'coverage.json').read_text())['cases']}
METHODS = ['la', 'lgxa', 'lrp', 'random']


def tiny() -> nn.Sequential:
    "A convolution with batch normalisation, two linear layers, three classes."
    with seeded(0):
        net = nn.Sequential(
            nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(80, 7), nn.ReLU(), nn.Linear(7, 3)
        )
        for p in net.parameters():
            p.data = torch.randn(p.shape) * 0.5
        return net.eval()


def images(n: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.rand(n, 1, 6, 6, generator=g), torch.randint(0, 3, (n,), generator=g)


def with_zeros(net: nn.Module, units: dict[str, list[int]]) -> nn.Module:
    "A copy with zeros in the weights and biases of these units, as the published studies prune."
    net = deepcopy(net)
    for name, of in units.items():
        layer = net.get_submodule(name)
        for unit in of:
            axis = 1 if isinstance(layer, nn.modules.conv._ConvTransposeNd) else 0
            layer.weight.data.select(axis, unit).zero_()
            layer.bias.data[unit] = 0
    return net


# --- what the published code computes ---------------------------------------------------------------------------------------


def test_golden_vote():
    case = GOLDEN['wisdom_vote']
    important = {
        method: {(layer, unit): score for layer, score, unit in named} for method, named in case['inputs']['important'].items()
    }
    expected = case['expected']['WISDOM']
    weights = weights_of(case['inputs']['loss_gain'], 'published')
    scores = unit_scores(important, weights)
    for (unit, score), (theirs, their_score) in zip(
        sorted(scores.items(), key=lambda p: -p[1]), expected['ranked'], strict=True
    ):
        assert list(unit) == theirs and score == pytest.approx(their_score, abs=case['tol'])
    for form in ('published', 'corrected'):
        found = votes_of(scores, case['params']['top_k'], form)
        table = {layer: [found.get((layer, unit), 0) for unit in range(2)] for layer in expected['votes']}
        assert table == expected['votes'], form


def slow_election(net, x, y, methods, m, batch_size):
    "The published election, in words of one syllable: votes of each unit of all layers but the last."
    layers = [name for name, layer in net.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    votes = {name: [0] * net.get_submodule(name).weight.shape[0] for name in layers}
    for start in range(0, len(x), batch_size):
        bx, by = x[start : start + batch_size], y[start : start + batch_size]
        important, gain = {}, {}
        for method in methods:
            triples = []
            for name, values in as_method(method)(net, bx, by, ids=torch.arange(start, start + len(bx))).items():
                sums = values.double().sum(tuple(d for d in range(values.dim()) if d != 1))
                triples += [(name, float(score), unit) for unit, score in enumerate(sums) if name != layers[-1]]
            triples.sort(key=lambda t: t[1], reverse=True)
            important[method] = triples[:m]
            units = {}
            for name, _, unit in triples[:m]:
                units.setdefault(name, []).append(unit)
            with torch.no_grad():
                missed = F.cross_entropy(with_zeros(net, units)(bx), by) - F.cross_entropy(net(bx), by)
            gain[method] = float(missed) * len(bx)
        ranking = {}
        for method, triples in important.items():
            for name, score, unit in triples:
                ranking[name, unit] = ranking.get((name, unit), 0) + score * gain[method] / sum(gain.values())
        best = sorted(ranking.items(), key=lambda pair: pair[1], reverse=True)[:10]
        for place, ((name, unit), _) in enumerate(best):
            votes[name][unit] += len(best) - place
    return votes


@pytest.mark.parametrize('m', [3, 9])
def test_published_form_is_the_literal_one(m):
    net, (x, y) = tiny(), images()
    found = vote(net, (x, y), METHODS, m=m, form='published', shuffle=False, batch_size=16, show_progress=False)
    slow = slow_election(net, x, y, METHODS, m, 16)
    assert {name: values.tolist() for name, values in found.scores().items()} == slow


def test_published_votes_are_whole_and_fifty_five():
    found = vote(tiny(), images(), METHODS, m=10, form='published', batch_size=10, show_progress=False)
    values = found.dataset['votes'].values
    assert (values == values.astype(int)).all() and values.sum() == 55 * found.dataset.sizes['batch']
    assert found.settings['skip'] == ['6'] and not found.scores()['6'].any()


# --- pruning ----------------------------------------------------------------------------------------------------------------


class Shapes(nn.Module):
    "Layers whose units lie on different axes."

    def __init__(self):
        super().__init__()
        self.up, self.signal, self.tokens = nn.ConvTranspose2d(1, 6, 2, stride=2), nn.Conv1d(6, 4, 3), nn.Linear(10, 5)
        self.grid, self.out = nn.Linear(5, 8), nn.Linear(32, 3)

    def forward(self, x):
        x = torch.tanh(self.up(x))  # (batch, 6, 12, 12)
        x = self.signal(x.mean(2))  # (batch, 4, 10)
        x = torch.tanh(self.tokens(x))  # (batch, 4, 5)
        x = self.grid(x[:, None])[:, 0]  # (batch, 1, 4, 8)
        return self.out(x.flatten(1))


@pytest.mark.parametrize('units', [{'up': [0, 5]}, {'signal': [1]}, {'tokens': [4, 0]}, {'grid': [7]}, {'up': [1], 'grid': [2]}])
def test_a_silent_unit_is_one_with_zeros_for_weights(units):
    with seeded(0):
        net = Shapes()
    x = images(4)[0]
    expected, before = with_zeros(net, units)(x), net(x)
    with untouched(net), pruned(net, units):
        torch.testing.assert_close(net(x), expected)
        assert not torch.equal(expected, before)
    assert torch.equal(net(x), before)


def test_pruned_undoes_itself_after_an_error_and_can_be_nested():
    net, x = tiny(), images(4)[0]
    before = net(x)
    with pytest.raises(KeyError), pruned(net, {'0': [0]}):
        raise KeyError
    assert torch.equal(net(x), before)
    with pruned(net, {'0': [0]}), pruned(net, {'0': [3], '4': [1]}):
        torch.testing.assert_close(net(x), with_zeros(net, {'0': [0, 3], '4': [1]})(x))
    assert torch.equal(net(x), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_shift_behind_a_pruned_unit():
    net, x = tiny(), images(4)[0]
    with Probe(net, '1') as probe:
        with pruned(net, {'0': [2]}):
            net(x)
        shift = probe['1'][:, 2]
        assert shift.unique().numel() == 1 and shift.abs().max() > 0
        with pruned(net, {'0': [2]}, with_norm=True):
            net(x)
        assert not probe['1'][:, 2].any() and probe['1'][:, 1].any()


class Shortcut(nn.Module):
    "A residual sum in place, and a normalisation behind it."

    def __init__(self):
        super().__init__()
        self.a, self.c, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x):
        a = self.a(x)
        out = self.c(a)
        out += a
        return self.norm(input=out) if len(x) == 3 else self.norm(out)


@pytest.mark.parametrize('quiet', [torch.no_grad, torch.inference_mode])
def test_a_sum_in_place_is_no_pruned_unit_any_more(quiet):
    with seeded(0):
        net, x = Shortcut().eval(), images(4)[0]
    expected = with_zeros(net, {'c': [1]})
    for rows in (x, x[:3]):
        with quiet(), pruned(net, {'c': [1]}, with_norm=True):
            torch.testing.assert_close(net(rows), expected(rows))
    net, x = tiny(), images(4)[0]
    with quiet(), pruned(net, {'0': [2]}, with_norm=True), pruned(net, {'0': [3]}, with_norm=True), Probe(net, '1') as probe:
        net(x)
        assert not probe['1'][:, 2:4].any() and probe['1'][:, 1].any(), 'both blocks count'


def test_shared_weights_wrappers_and_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(torch.relu(self.fc(x)))

    with seeded(0):
        net, x = Twice(), torch.rand(3, 4)
    with pruned(net, {'fc': [1]}):
        torch.testing.assert_close(net(x), with_zeros(net, {'fc': [1]})(x))
    with pruned(net, {'fc#0': [1], 'fc#1': [2]}):
        for _ in range(2):  # the calls are counted anew in each pass
            hidden = torch.relu(net.fc.weight @ x.T + net.fc.bias[:, None])
            hidden[1] = 0
            expected = (net.fc.weight @ hidden + net.fc.bias[:, None]).T.clone()
            expected[:, 2] = 0
            torch.testing.assert_close(net(x), expected)
    outer = Normalized(net, 0.5, 0.5)
    with pruned(outer, {'fc': [1]}):
        torch.testing.assert_close(outer(x), with_zeros(net, {'fc': [1]})((x - 0.5) / 0.5))


def test_pruned_under_torch_compile():
    net, x = tiny(), images(4)[0]
    compiled = torch.compile(net, backend='eager')
    compiled(x)
    with pruned(compiled, {'0': [0], '4': [1]}):
        torch.testing.assert_close(compiled(x), with_zeros(net, {'0': [0], '4': [1]})(x))


def test_layers_that_cannot_be_pruned_are_named():
    net, x = tiny(), images(4)[0]
    for units, words in (
        ({'nowhere': [0]}, "'nowhere' is no layer"), ({'': [0]}, 'is no layer'), ({'relu()': [0]}, 'call of a function'),
        ({'0': [-1]}, 'units of 0 are a list of numbers'), ({'0': [0.5]}, 'units of 0 are a list of numbers'),
    ):
        with pytest.raises(ValueError, match=words.replace('(', r'\(').replace(')', r'\)')), pruned(net, units):
            pass
    with pytest.raises(ValueError, match='7 units, 0 to 6, so there is no unit 7'), pruned(net, {'4': [7]}):
        net(x)
    attention = nn.MultiheadAttention(4, 1, batch_first=True)
    with pytest.raises(ValueError, match='out_proj did not run'), pruned(attention, {'out_proj': [0]}):
        attention(*[torch.rand(2, 3, 4)] * 3)
    with pytest.raises(TypeError, match='returns a tuple'), pruned(nn.Sequential(nn.LSTM(3, 4)), {'0': [1]}) as lstm:
        lstm(torch.rand(2, 3))
    for units, words in (({'4#x': [0]}, "'4#x' is no layer"), ({'4#': [0]}, "'4#' is no layer"), ({'4': 1}, 'a list of numbers')):
        with pytest.raises(ValueError, match=words), pruned(net, units):
            pass
    with pytest.raises(ValueError, match='4#1 did not run'), pruned(net, {'4#1': [0], '4#0': [1]}):
        net(x)
    assert torch.isfinite(net(x)).all()


def test_loss_gain():
    net, (x, y) = tiny(), images(12)
    units = {'0': [1], '4': [0, 6]}
    with torch.no_grad():
        expected = F.cross_entropy(with_zeros(net, units)(x), y) - F.cross_entropy(net(x), y)
    assert loss_gain(net, x, y, units) == pytest.approx(float(expected), abs=1e-6)
    assert loss_gain(net, x, y, {}) == loss_gain(net, x, y, {'0': []}) == 0
    net.train()
    loss_gain(net, x, y, units)
    assert net.training
    one = nn.Sequential(nn.Flatten(), nn.Linear(36, 1))
    expected = F.binary_cross_entropy_with_logits(torch.zeros(12), (y > 0).float()) - F.binary_cross_entropy_with_logits(
        one(x).flatten(), (y > 0).float())
    assert loss_gain(one, x, (y > 0).long(), {'1': [0]}) == pytest.approx(expected.item(), abs=1e-6)


# --- weights and votes ------------------------------------------------------------------------------------------------------


def test_weights():
    assert weights_of({'a': -1.0, 'b': 3.0}, 'published') == {'a': -0.5, 'b': 1.5}
    assert weights_of({'a': -1.0, 'b': 1.0}, 'published') == {'a': 0.5, 'b': 0.5}, 'the published code divides by zero'
    assert weights_of({'a': -1.0, 'b': 3.0}) == {'a': 0, 'b': 1}
    assert weights_of({'a': -1.0, 'b': 0.0}) == weights_of({'a': -1.0, 'b': 0.0}, leader=True) == {'a': 0.5, 'b': 0.5}
    assert weights_of({'a': 2.0, 'b': 3.0}, leader=True) == {'a': 0, 'b': 1}
    assert weights_of({'a': 2.0, 'b': 1.0, 'c': 2.0}, leader=True) == {'a': 0.5, 'b': 0, 'c': 0.5}, 'no order among equals'
    assert weights_of({'a': 2.0, 'b': 1.0, 'c': 2.0}, 'published', leader=True) == {'a': 1, 'b': 0, 'c': 0}
    assert weights_of({'a': -2.0, 'b': -3.0}, 'published', leader=True) == {'a': 1, 'b': 0}
    for gains in ({}, {'a': float('nan')}, {'a': float('inf'), 'b': 1.0}):
        with pytest.raises(ValueError, match='finite'):
            weights_of(gains)
    with pytest.raises(ValueError, match="'published' or 'corrected'"):
        weights_of({'a': 1.0}, 'other')


def test_votes_of_equals():
    scores = {'a': 1.0, 'b': 2.0, 'c': 1.0, 'd': 1.0, 'e': -1.0, 'f': 0.0}
    assert votes_of(scores, 3, 'published') == {'b': 3, 'a': 2, 'c': 1}
    assert votes_of(scores, 3) == {'b': 3, 'a': 1, 'c': 1, 'd': 1}
    assert votes_of(scores, 10) == {'b': 4, 'a': 2, 'c': 2, 'd': 2}, 'of four units that have a score, the best gets four'
    assert votes_of(scores, 1) == {'b': 1}
    assert votes_of({}) == votes_of({'a': 0.0}) == {}
    backwards = dict(reversed(scores.items()))
    assert votes_of(backwards, 3) == votes_of(scores, 3), 'the order in which units are named does not matter'


# --- the corrected form -----------------------------------------------------------------------------------------------------


def elected(data, methods=METHODS, **how):
    return vote(tiny(), data, methods, **{'m': 4, 'batch_size': 10, 'show_progress': False} | how)


def test_the_model_comes_back_as_it_was():
    net, data = tiny().train(), images()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    for form in ('published', 'corrected'):
        vote(net, data, METHODS, m=3, form=form, show_progress=False)
    assert net.training and all(p.requires_grad and p.grad is None for p in net.parameters())
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_scale_of_a_method_does_not_matter():
    def loud(model, x, target, layers):
        return {name: 1024 * values for name, values in as_method('lrp')(model, x, target).items()}

    a = elected(images(), {'la': 'la', 'lrp': 'lrp'}).dataset
    b = elected(images(), {'la': 'la', 'lrp': loud}).dataset
    assert np.array_equal(a['votes'], b['votes']) and np.allclose(a['weight'], b['weight'])
    a = elected(images(), {'la': 'la', 'lrp': 'lrp'}, form='published').dataset
    b = elected(images(), {'la': 'la', 'lrp': loud}, form='published').dataset
    assert not np.array_equal(a['votes'], b['votes'])


def test_order_within_a_batch_and_order_of_batches_do_not_matter():
    (x, y), ids = images(), torch.arange(40)
    batches = [Batch(x[rows], y[rows], ids[rows]) for rows in ids.split(10)]
    mixed = torch.randperm(10, generator=torch.Generator().manual_seed(3))
    one = elected(batches).dataset
    other = elected([Batch(*(part[mixed] for part in batch)) for batch in reversed(batches)]).dataset
    assert np.array_equal(one['votes'], other['votes'])
    np.testing.assert_allclose(one['gain'], other['gain'][::-1], atol=1e-6)


def test_the_seed_decides():
    a, b, c = (elected(images(), seed=seed) for seed in (0, 0, 1))
    assert a.dataset.equals(b.dataset) and not a.dataset.equals(c.dataset)


def test_nobody_judges_in_his_own_case(monkeypatch):
    seen = []
    monkeypatch.setattr(voting, '_missed', lambda election, x, y, units, before: seen.append(x) or torch.zeros(()))
    x, y = images(10)
    rows = voting._halves(torch.arange(10), 0)
    elected((x, y), ['la'], shuffle=False)
    assert sorted(torch.cat(rows).tolist()) == list(range(10)) and [len(part) for part in rows] == [5, 5]
    assert torch.equal(seen[0], x[rows[1]]) and torch.equal(seen[1], x[rows[0]])


def test_corrected_gain_is_that_of_each_half_on_the_other():
    net, (x, y) = tiny(), images(11)
    found = vote(net, (x, y), ['la'], m=3, how='absolute', batch_size=11, shuffle=False, show_progress=False)
    first, second = voting._halves(torch.arange(11), 0)
    total = 0.0
    for finders, judges in ((first, second), (second, first)):
        rows = {name: value.abs() if value.dim() == 2 else value.sum((2, 3)).abs()
                for name, value in as_method('la')(net, x[finders], y[finders]).items()}
        scores = {(name, unit): float(value) for name, of in rows.items() if name != '6' for unit, value in enumerate(of.sum(0))}
        best = sorted(scores, key=scores.get, reverse=True)[:3]
        units = {name: [unit for layer, unit in best if layer == name] for name, _ in best}
        total += len(judges) * loss_gain(net, x[judges], y[judges], units, with_norm=True)
    assert found.dataset['gain'].item() == pytest.approx(total / 11, abs=1e-5)


def test_equal_methods_of_any_number_change_nothing():
    def again(model, x, target, layers):
        return as_method('lrp')(model, x, target)

    one, two = elected(images(), ['lrp']), elected(images(), {'a': 'lrp', 'b': again})
    assert np.array_equal(one.dataset['votes'], two.dataset['votes'])


def test_leader_decides_alone():
    found = elected(images(), leader=True).dataset
    weight, gain = found['weight'].values, found['gain'].values
    for one, missed in zip(weight, gain, strict=True):
        best = missed == missed.max()
        assert one.tolist() == ([0.25] * 4 if missed.max() <= 0 else (best / best.sum()).tolist())


def test_no_gain_at_all():
    net = tiny()
    for p in net[6].parameters():
        p.data.zero_()  # the classes do not depend on anything
    for form in ('published', 'corrected'):
        found = vote(net, images(), METHODS, m=3, form=form, show_progress=False)
        assert found.trust == dict.fromkeys(METHODS, 0.25) and not found.dataset['gain'].any()


@pytest.mark.parametrize('how', ['relative', 'rank', 'share', 'signed', lambda signed, absolute: -signed])
def test_scores_of_every_kind(how):
    votes = elected(images(), how=how).dataset['votes'].values
    assert (votes >= 0).all() and 0 < votes.sum() <= 10 * 4


def test_scores_that_are_none():
    def ratio(signed, absolute):  # 0/0 for a unit that says nothing
        with np.errstate(invalid='ignore'):
            return np.where(absolute > absolute.min(), signed / absolute, np.nan)

    with pytest.raises(ValueError, match='5 units of 0; got some that are infinite or no number'):
        elected(images(10), how=ratio)
    with pytest.raises(ValueError, match=r'5 units of 0; got the shape \(2,\)'):
        elected(images(10), how=lambda signed, absolute: signed[:2])


# --- the result -------------------------------------------------------------------------------------------------------------


def test_top_leaves_out_units_without_votes(caplog):
    votes = Votes(voting._dataset({'votes': np.array([0, 3, 5, 0, 0, 1, 0.0])}, {'a': 4, 'b': 2, 'c': 1}, []),
                  {'layers': {'a': 4, 'b': 2, 'c': 1}, 'skip': []})
    assert votes.top(2) == {'a': [2, 1]} and votes.top(3) == {'a': [2, 1], 'b': [1]}
    assert not caplog.records
    assert votes.top(7) == {'a': [2, 1], 'b': [1]} and 'has 3 units with votes, fewer than m=7' in caplog.text
    assert votes.top(2, per='layer') == {'a': [2, 1], 'b': [1]}
    assert votes.table()['votes'].tolist() == [5, 3, 1] and votes.trust == {}
    votes.plot()
    for m, per, words in ((0, 'net', 'at least 1'), (1.5, 'net', 'at least 1'), (2, 'neither', "'net' or 'layer'")):
        with pytest.raises(ValueError, match=words):
            votes.top(m, per)


def test_save_and_load(tmp_path):
    found = elected(images(), how=lambda signed, absolute: absolute)
    found.save(tmp_path / 'v.safetensors')
    back = Result.load(tmp_path / 'v.safetensors')
    assert type(back).__name__ == 'Votes' and back.dataset.equals(found.dataset) and back.settings == found.settings
    assert back.top(3) == found.top(3) and back.trust == found.trust
    assert back.plot() is not None and '<b>Votes</b>' in back._repr_html_()


def test_votes_add_up():
    (x, y), one = images(), elected(images(), shuffle=False)
    parts = [elected((x[rows], y[rows]), shuffle=False) for rows in (slice(0, 20), slice(20, 40))]
    both = parts[0] + parts[1]
    assert both.settings['images'] == 40 and both.dataset.sizes == one.dataset.sizes
    assert both.dataset['named'].values.sum() == one.dataset['named'].values.sum()
    with pytest.raises(ValueError, match='by different rules.*: form'):
        _ = one + elected((x, y), form='published')
    with pytest.raises(TypeError, match='not to a int'):
        _ = one + 1


def test_interrupted(monkeypatch, caplog):
    held, real = [], voting._hold

    def hold(*args):
        if len(held) == 2:
            raise KeyboardInterrupt
        held.append(1)
        return real(*args)

    monkeypatch.setattr(voting, '_hold', hold)
    assert elected(images()).dataset.sizes['batch'] == 2 and '2 batches that were done' in caplog.text
    monkeypatch.setattr(voting, '_hold', lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        elected(images())


def test_records_go_on_where_they_were(tmp_path, monkeypatch):
    path, (x, y) = tmp_path / 'votes.jsonl', images()
    elected((x[:20], y[:20]), shuffle=False, records=path)
    calls, real = [], voting._hold
    monkeypatch.setattr(voting, '_hold', lambda *args: calls.append(1) or real(*args))
    found = elected((x, y), shuffle=False, records=path)
    assert len(calls) == 2, 'two of four batches were there already'
    assert found.dataset.equals(elected((x, y), shuffle=False, records=path).dataset) and len(calls) == 2
    assert found.dataset.equals(elected((x, y), shuffle=False).dataset)
    calls.clear()
    elected((x, y), shuffle=False, records=path, m=3)
    assert len(calls) == 4, 'other rules are another election'


# --- tables -----------------------------------------------------------------------------------------------------------------

HEAD = 'LayerName,NeuronIndex,Score\n'
SIZES = {'conv1': 2, 'fc1': 3, 'fc2': 2}


@pytest.mark.parametrize('form', ['published', 'corrected'])
def test_table_round_trip(form, tmp_path):
    found, path = elected(images(), form=form, m=3), tmp_path / 'deep' / 'votes.csv'
    found.to_csv(path)
    rows = [*csv.reader(path.open(newline=''))]
    assert rows[0] == ['LayerName', 'NeuronIndex', 'Score'] and len(rows) == 1 + 5 + 7, 'not the last layer'
    if form == 'published':
        assert all(score == str(int(score)) for _, _, score in rows[1:])
    for layers in (None, found.layers, tiny()):
        back = read_votes(path, layers)
        assert all(np.array_equal(back.scores()[name], found.scores()[name]) for name in ('0', '4'))
        assert back.top(2) == found.top(2)
        again = tmp_path / 'again.csv'
        back.to_csv(again)
        assert again.read_bytes() == path.read_bytes()


def test_table_of_a_layer_that_runs_twice(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.out = nn.Linear(36, 36), nn.Linear(36, 3)

        def forward(self, x):
            return self.out(torch.relu(self.fc(torch.relu(self.fc(x.flatten(1))))))

    with seeded(0):
        net = Twice()
    found = vote(net, images(), ['la', 'lrp'], m=4, show_progress=False)
    found.to_csv(tmp_path / 'v.csv')
    back = read_votes(tmp_path / 'v.csv', net)
    assert [*back.layers] == ['fc#0', 'fc#1', 'out'] and back.top(4) == found.top(4)
    (tmp_path / 'v.csv').write_text(HEAD + 'fc#0,36,1\n')
    with pytest.raises(ValueError, match='fc#0 has 36 units'):
        read_votes(tmp_path / 'v.csv', net)


def test_tables_as_spreadsheets_save_them(tmp_path):
    path = tmp_path / 'v.csv'
    path.write_bytes(b'\xef\xbb\xbf,Score,LayerName,NeuronIndex\r\n0,3.0, fc1 ,1.0\r\n\r\n1,2,conv1,0\r\n')
    found = read_votes(path, SIZES)
    assert found.scores()['fc1'].tolist() == [0, 3, 0] and found.scores()['conv1'].tolist() == [2, 0]
    assert found.settings['skip'] == ['fc2'] and not found.scores()['fc2'].any()
    assert read_votes(path).layers == {'fc1': 2, 'conv1': 1}


@pytest.mark.parametrize(('text', 'words'), [
    ('', 'begins with the line LayerName,NeuronIndex,Score, and this one with nothing'),
    ('layer,unit,votes\nfc1,0,1\n', 'no column LayerName, NeuronIndex, Score'),
    ('LayerName;NeuronIndex;Score\nfc1;0;1\n', 'no column'),
    (HEAD, 'holds no votes'),
    (HEAD + 'fc1,0,1\nfc1,0,2\n', 'line 3: fc1 0 has a row already'),
    (HEAD + 'fc1,3,1\n', 'line 2: fc1 has 3 units, 0 to 2; got 3'),
    (HEAD + 'fc9,0,1\n', "no layer 'fc9'; there are conv1, fc1, fc2"),
    (HEAD + 'fc1,-1,1\n', 'units are counted 0, 1, 2'),
    (HEAD + 'fc1,0.5,1\n', 'units are counted 0, 1, 2'),
    (HEAD + 'fc1,nan,1\n', 'units are counted 0, 1, 2'),
    (HEAD + 'fc1,2000000000,1\n', 'units are counted 0, 1, 2'),
    (HEAD + 'fc1,one,1\n', "are numbers, got 'one' and '1'"),
    (HEAD + 'fc1,0,-1\n', 'has no, or some votes; got -1'),
    (HEAD + 'fc1,0,nan\n', 'has no, or some votes; got nan'),
    (HEAD + 'fc1,0\n', 'line 2: as many values as there are columns'),
    (HEAD + 'fc1,0,1,2\n', 'line 2: as many values as there are columns'),
])
def test_tables_that_are_wrong(text, words, tmp_path):
    path = tmp_path / 'v.csv'
    path.write_text(text)
    with pytest.raises(ValueError, match='v.csv') as error:
        read_votes(path, SIZES)
    assert words in str(error.value)


def test_table_in_another_alphabet(tmp_path):
    path = tmp_path / 'v.csv'
    path.write_bytes((HEAD + 'fc1,0,1\n').encode('utf-16'))
    with pytest.raises(ValueError, match='no UTF-8 text'):
        read_votes(path)
    with pytest.raises(FileNotFoundError):
        read_votes(tmp_path / 'nothing.csv')


# --- bad inputs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(('how', 'words'), [
    ({'m': 0}, 'at least 1'), ({'m': 13}, 'm=13, and the layers 0, 4 have 12 units'),
    ({'form': 'own'}, "'published' or 'corrected'"),
    ({'how': 'loud'}, "how='loud'"), ({'skip': ['nowhere']}, "no layer 'nowhere'"), ({'skip': 3}, 'no layer is left'),
    ({'target': 9}, 'number of a class'),
])
def test_rules_that_there_are_not(how, words):
    with pytest.raises(ValueError, match=words):
        elected(images(10), **how)


def test_data_that_cannot_vote(caplog):
    x, y = images(11)
    with pytest.raises(ValueError, match='the data set is empty'):
        elected((x[:0], y[:0]))
    with pytest.raises(ValueError, match='every batch holds one image'):
        elected((x, y), batch_size=1)
    assert elected((x, y), batch_size=1, form='published').dataset.sizes['batch'] == 11
    caplog.clear()
    assert elected((x, y), batch_size=10).settings['images'] == 10 and '1 images were alone' in caplog.text
    with pytest.raises(ValueError, match='NaN or infinity'):
        elected((x * torch.inf, y))
    with pytest.raises(ValueError, match='labels'):
        elected((x, y + 5))


def test_methods_and_networks_that_say_nothing_finite():
    def broken(model, x, target, layers):
        return {name: value * torch.nan for name, value in as_method('la')(model, x, target).items()}

    with pytest.raises(ValueError, match='broken: the relevance of some units'):
        elected(images(), ['la', broken])


def test_wrappers_half_precision_and_a_single_logit():
    x, y = images()
    outer = Normalized(tiny(), 0.5, 0.5)
    inner = vote(tiny(), ((x - 0.5) / 0.5, y), ['la', 'lrp'], m=3, show_progress=False)
    assert np.array_equal(vote(outer, (x, y), ['la', 'lrp'], m=3, show_progress=False).dataset['votes'], inner.dataset['votes'])
    assert vote(tiny().bfloat16(), (x, y), ['la', 'lrp'], m=3, show_progress=False).dataset['votes'].sum() > 0
    with seeded(0):
        one = nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.ReLU(), nn.Linear(4, 1))
    assert vote(one, (x, (y > 0).long()), ['la', 'lrp'], m=2, show_progress=False).dataset['votes'].sum() > 0


def test_every_layer_may_vote():
    found = elected(images(), skip=0)
    assert found.settings['skip'] == []
    assert not elected(images(), skip=['0']).scores()['0'].any()


# --- two processes ----------------------------------------------------------------------------------------------------------

SUITES = {'even': 40, 'one process has none': 8}


def found_in(n: int) -> dict:
    found = elected(images(n), batch_size=10)
    return {'votes': found.dataset['votes'].values.tolist(), 'named': found.dataset['named'].values.tolist(),
            'gain': sorted(found.dataset['gain'].values.tolist()), 'images': found.settings['images']}


def main(folder: str) -> None:
    "What each of the two processes does."
    with joined('cpu', timeout=60):
        Path(folder, f'found{rank()}.json').write_text(json.dumps({name: found_in(n) for name, n in SUITES.items()}))


def test_two_processes_equal_one(in_two_processes):
    first, second = (json.loads((in_two_processes / f'found{number}.json').read_text()) for number in (0, 1))
    assert first == second
    assert first['even'] == found_in(40)


if __name__ == '__main__':
    main(sys.argv[1])
