"""Selective retraining: what is frozen keeps every bit, whatever the optimizer, and the arms are fair to each other."""

import copy
import importlib.util
import os
import subprocess
import sys
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from robustnb import selective
from robustnb.attacks import FGSM
from robustnb.data import Batch, DataSet, batches
from robustnb.devices import seeded
from robustnb.filters import Channel, Pulse, pools
from robustnb.fragility import LABELS
from robustnb.guard import Normalized
from robustnb.layerwise import LayerRegularizer, Refreshed
from robustnb.results import Result
from robustnb.selective import (
    ARMS,
    Only,
    Retraining,
    band_masks,
    complement,
    layer_masks,
    random_masks,
    retrain,
)
from robustnb.stats import mean_of_runs
from robustnb.training import Adversarial, Standard, fit

QUIET = {'show_progress': False}
OPTIMIZERS = {
    'momentum': partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
    'adam': partial(torch.optim.Adam, lr=1e-2, weight_decay=0.1),
    'adamw': partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1, amsgrad=True),
    'rmsprop': partial(torch.optim.RMSprop, lr=1e-2, momentum=0.9),
}


def make_net(seed: int = 0) -> nn.Sequential:
    with seeded(seed):
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 12), nn.BatchNorm1d(12),
            nn.ReLU(), nn.Linear(12, 4),
        )  # fmt: skip


def make_data(n: int = 60) -> DataSet:
    x = torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return DataSet(x, (4 * x[:, 0, :4].flatten(1).mean(1)).long() % 2 + torch.arange(n) % 2 * 2, tuple('abcd'))


def some(model, share: float = 0.5, seed: int = 0) -> dict[str, torch.Tensor]:
    "A mask for each weight with two axes or more."
    rng = np.random.default_rng(seed)
    return {
        name: torch.from_numpy(rng.random(tuple(p.shape)) < share)
        for name, p in model.named_parameters()
        if p.dim() > 1
    }


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().numpy().tobytes()


def state(model) -> dict[str, bytes]:
    return {name: bits(values) for name, values in model.state_dict().items()}


def changed(before, after) -> set[str]:
    "Names of what differs in at least one bit."
    before, after = state(before), state(after)
    return {name for name in before if before[name] != after[name]}


# ------------------------------------------------------------------------------------------------------------ Only


@pytest.mark.parametrize('rest', ['frozen', 'trained'])
@pytest.mark.parametrize('optimizer', OPTIMIZERS)
def test_what_is_frozen_keeps_every_bit(optimizer, rest):
    net, data = make_net(), make_data()
    net.get_parameter('4.weight').data[0, :5] = torch.tensor([0.0, -0.0, 1e-42, 1e-30, -1e-42])
    masks = some(net)
    masks['4.weight'][0, :5] = False
    after = fit(net, data, Only(Standard(), masks, rest), 3, 16, OPTIMIZERS[optimizer], **QUIET).model
    for name, mask in masks.items():
        old, new = net.get_parameter(name), after.get_parameter(name)
        assert bits(old[~mask]) == bits(new[~mask])
        assert (old[mask] != new[mask]).float().mean() > 0.5
    others = {name for name in net.state_dict() if name not in masks}
    assert changed(net, after) & others == (others if rest == 'trained' else set())


def test_free_weights_move_as_if_the_others_were_constants():
    "Against a loop in which only the free numbers are parameters."
    data, mask = make_data(), torch.rand(4, 64, generator=torch.Generator().manual_seed(1)) < 0.3
    with seeded(0):
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    after = fit(net, data, Only(Standard(), {'1.weight': mask}), 2, 16, OPTIMIZERS['adamw'], seed=3, **QUIET).model
    weight = net[1].weight.detach().clone()
    free = nn.Parameter(weight[mask].clone())
    optimizer = OPTIMIZERS['adamw']([free])
    for epoch in range(2):
        for x, y, _ in batches(data, 16, torch.device('cpu'), 3 * 1_000_003 + epoch):
            optimizer.zero_grad()
            F.cross_entropy(
                F.linear(x.flatten(1), weight.masked_scatter(mask, free), net[1].bias.detach()), y
            ).backward()
            optimizer.step()
    torch.testing.assert_close(after[1].weight[mask], free.data, rtol=1e-5, atol=1e-6)


def test_masks_of_true_change_nothing_and_of_false_everything():
    net, data, optimizer = make_net(), make_data(), OPTIMIZERS['momentum']
    usual = fit(net, data, Standard(), 2, 16, optimizer, **QUIET).model
    whole = dict.fromkeys(dict(net.named_parameters()), True)
    for masks, rest in ((whole, 'frozen'), ({}, 'trained')):
        assert not changed(usual, fit(net, data, Only(Standard(), masks, rest), 2, 16, optimizer, **QUIET).model)
    for masks, rest in (({}, 'frozen'), (dict.fromkeys(whole, False), 'trained')):
        assert not changed(net, fit(net, data, Only(Standard(), masks, rest), 2, 16, optimizer, **QUIET).model)


def test_a_norm_moves_as_a_whole_or_not_at_all():
    net, data = make_net(), make_data()
    after = fit(net, data, Only(Standard(), {'1.bias': True}), 1, 16, **QUIET).model
    assert changed(net, after) == {'1.bias', '1.running_mean', '1.running_var', '1.num_batches_tracked'}
    assert all(module.training for module in Only(Standard(), {}).objective and net.modules())


def test_a_norm_without_parameters_goes_with_the_rest():
    with seeded(0):
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8, affine=False), nn.Linear(8, 4))
    moving = {'2.running_mean', '2.running_var', '2.num_batches_tracked'}
    for rest in ('frozen', 'trained'):
        after = fit(net, make_data(), Only(Standard(), {'1.weight': True}, rest), 1, 16, **QUIET).model
        assert changed(net, after) & moving == (moving if rest == 'trained' else set())


def test_a_plain_loop_and_a_wrapper():
    "Names are those inside the wrapper, and train() in each epoch wakes no frozen normalisation."
    net, data = make_net(), make_data()
    model = Normalized(copy.deepcopy(net), [0.5], [0.2])
    goal, optimizer = Only(Standard(), {'7.weight': True}), OPTIMIZERS['adam'](model.parameters())
    goal.setup(model)
    for step, batch in enumerate(chain(*(batches(data, 16, torch.device('cpu'), seed) for seed in range(2)))):
        model.train()
        optimizer.zero_grad()
        goal.loss(model, batch, step).backward()
        assert all(module.training for module in model.modules())
        optimizer.step()
        goal.after_step(model)
    assert changed(net, model.model) == {'7.weight'}


class Halves:
    "Two groups with a loss each, a memory, and a step that moves what it should not."

    def __init__(self, factor: float = 2):
        self.calls, self.factor = ['made'], factor

    def setup(self, model):
        self.calls.append('setup')

    def groups(self, model):
        return {'body': model[:4].parameters(), 'head': model[4:].parameters()}

    def loss(self, model, batch, step):
        loss = F.cross_entropy(model(batch.x), batch.y)
        return {'body': loss, 'head': self.factor * loss}

    def after_step(self, model):
        self.calls.append('step')
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1e-3)

    def state_dict(self):
        return {'calls': list(self.calls)}

    def load_state_dict(self, state):
        self.calls = list(state['calls'])


def test_everything_else_is_asked_of_the_objective():
    net, data, masks = make_net(), make_data(32), some(make_net())
    run = fit(net, data, Only(Halves(), masks), 1, 16, **QUIET)
    assert run.objective.calls == ['made', 'setup', 'step', 'step']
    assert {'loss of body', 'loss of head'} < run.history[0].keys()
    assert all(bits(net.get_parameter(n)[~m]) == bits(run.model.get_parameter(n)[~m]) for n, m in masks.items())
    batch, goal = next(batches(data, 8)), Only(Adversarial(FGSM(0.1)), masks)
    assert torch.equal(goal.perturbed(net.eval(), batch, 0), Adversarial(FGSM(0.1)).perturbed(net, batch, 0))
    assert not hasattr(Only(Standard(), {}), 'groups') and hasattr(Only(Halves(), {}), 'groups')
    assert copy.deepcopy(goal).objective == goal.objective
    assert 'Adversarial' in repr(goal)


def test_an_objective_with_layers_of_the_moment_inside():
    net, data = make_net(), make_data(32)
    inner = Refreshed(
        Adversarial(FGSM(0.1)), data[:8], FGSM(0.1), every=1, regularizer=LayerRegularizer('weights', 0.1)
    )
    run = fit(net, data, Only(inner, {'4.weight': True}), 1, 16, **QUIET)
    assert changed(net, run.model) == {'4.weight'}
    assert [choice['step'] for choice in run.objective.choices] == [0, 1, 2]


def test_a_function_is_an_objective_too():
    net = make_net()
    goal = Only(lambda model, batch, step: F.cross_entropy(model(batch.x), batch.y), {'7.bias': True})
    assert changed(net, fit(net, make_data(), goal, 1, 16, **QUIET).model) == {'7.bias'}
    assert goal.state_dict() == {}


class Counted(Standard):
    "Stops a process at some step, as a power cut would."

    def loss(self, model, batch, step):
        if step == int(os.environ.get('STOP_AT', -1)):
            os._exit(9)
        return super().loss(model, batch, step)


def resumed(path, result: Path) -> None:
    "A training that a process may not live to finish."
    net = make_net()
    goal = Only(Counted(), some(net), 'trained')
    after = fit(net, make_data(), goal, 3, 16, OPTIMIZERS['adamw'], checkpoint=path, every=1, **QUIET).model
    torch.save(after.state_dict(), result)


def test_killed_and_resumed_it_ends_with_the_same_bits(tmp_path):
    resumed(None, tmp_path / 'whole')
    for stop, code in (('6', 9), ('-1', 0)):
        ran = subprocess.run([sys.executable, __file__, tmp_path / 'c.safetensors', tmp_path / 'parts'],
                             env=os.environ | {'STOP_AT': stop}, timeout=120)  # fmt: skip
        assert ran.returncode == code and (tmp_path / 'parts').exists() == (code == 0)
    whole, parts = (torch.load(tmp_path / name, weights_only=True) for name in ('whole', 'parts'))
    assert {n: bits(v) for n, v in whole.items()} == {n: bits(v) for n, v in parts.items()}


def test_a_checkpoint_knows_its_masks_and_its_objective(tmp_path, caplog):
    net, data, masks, path = make_net(), make_data(), some(make_net()), tmp_path / 'c.safetensors'
    fit(net, data, Only(Halves(), masks), 1, 16, checkpoint=path, **QUIET)
    assert not caplog.records  # the memory of the objective is in the file
    others = Only(Halves(3), masks), Only(Halves(), complement(masks)), Only(Halves(), masks, 'trained')
    for goal in (*others, Only(Standard(), masks)):
        with pytest.raises(ValueError, match='another objective'):
            fit(net, data, goal, 2, 16, checkpoint=path, **QUIET)


def test_tied_parameters():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
            self.b.weight, self.out = self.a.weight, nn.Linear(64, 4)

        def forward(self, x):
            return self.out(self.b(self.a(x.flatten(1)).relu()))

    with seeded(0):
        net = Tied()
    mask = torch.eye(64, dtype=torch.bool)
    after = fit(net, make_data(), Only(Standard(), {'b.weight': mask}), 1, 16, **QUIET).model
    moved = net.a.weight != after.a.weight
    assert moved[mask].all() and not moved[~mask].any()
    with pytest.raises(ValueError, match='two names'):
        Only(Standard(), {'a.weight': ~mask, 'b.weight': mask}).setup(net)


@pytest.mark.parametrize('masks, error, words', [
    ({'conv.weight': True}, KeyError, 'no parameter'),
    ({'7.weight': torch.ones(4, 12)}, ValueError, 'tensor of bools'),
    ({'7.weight': torch.ones(12, 4, dtype=torch.bool)}, ValueError, r'\(4, 12\)'),
    ({'7.weight': 1}, ValueError, 'got 1'),
])  # fmt: skip
def test_masks_that_are_none(masks, error, words):
    with pytest.raises(error, match=words):
        fit(make_net(), make_data(), Only(Standard(), masks), 1, **QUIET)


def test_other_mistakes():
    with pytest.raises(TypeError, match='objective'):
        Only(Standard, {})
    with pytest.raises(ValueError, match="'frozen' or 'trained'"):
        Only(Standard(), {}, rest='free').setup(make_net())
    with pytest.raises(RuntimeError, match=r'setup\(model\)'):
        Only(Standard(), {}).loss(make_net(), Batch(*next(batches(make_data(), 4))), 0)


# ----------------------------------------------------------------------------------------------------------- masks


class Labelled:
    "What `layer_masks` asks of the scores of a sweep."

    layers = ['0', '4', '7']

    def chosen(self, label, filter, kind):
        assert (filter, kind) == ('high', 'FGSM')
        return [layer for layer, own in zip(self.layers, LABELS, strict=True) if own in label]


@pytest.mark.parametrize(
    'keep, free', [('robust', {'4'}), (('robust', 'antifragile'), {'4', '7'}), (['fragile'], {'0'})]
)
def test_masks_of_layers(keep, free):
    net = make_net()
    for masks in (layer_masks(net, Labelled(), keep, 'high', 'FGSM'),
                  layer_masks(Normalized(net, [0.0], [1.0]), dict(zip('047', LABELS, strict=True)), keep)):  # fmt: skip
        assert masks.keys() == {f'{layer}.{part}' for layer in '047' for part in ('weight', 'bias')}
        assert all(mask.all() if name.split('.')[0] in free else not mask.any() for name, mask in masks.items())
    with pytest.raises(ValueError, match='no label'):
        layer_masks(net, {'0': 'weak'})


def bands_of(net, filter, thresholds, grid, rng) -> pd.DataFrame:
    "A table as that of `fragility.labels`, with labels at random."
    parts = []
    for layer, pool in pools(net).items():
        steps = filter.steps(pool, thresholds, grid)
        columns = {'position': steps.position, 'threshold': steps.threshold, 'removed': steps.removed}
        parts.append(pd.DataFrame({'layer': layer, 'filter': filter.name, 'response': 'clean'} | columns))
    table = pd.concat(parts, ignore_index=True)
    return table.assign(label=rng.choice(['fragile', 'robust', 'antifragile'], len(table)))


@pytest.mark.parametrize('grid', ['value', 'quantile', 'rank'])
def test_masks_of_bands(grid):
    net, rng = make_net(), np.random.default_rng(0)
    table = bands_of(net, Pulse(), 7, grid, rng)
    free = band_masks(net, table, 'robust', thresholds=7, grid=grid)
    kept = band_masks(net, table, ('fragile', 'antifragile'), thresholds=7, grid=grid)
    assert all(torch.equal(free[name], ~kept[name]) for name in free)  # each weight is in one window
    for layer, pool in pools(net).items():
        rows = table[(table.layer == layer) & (table.label == 'robust')]
        assert int(free[f'{layer}.weight'].sum()) == rows.removed.sum()
        if grid == 'value':
            flat, edges = pool.values, np.linspace(pool.values.min(), pool.values.max(), 8)
            window = np.clip(np.searchsorted(edges, flat, 'right') - 1, 0, 6)
            robust = table[table.layer == layer].label.to_numpy()[window] == 'robust'
            assert (free[f'{layer}.weight'].flatten().numpy() == robust).all()


def test_bands_that_were_not_evaluated_stay():
    net = make_net()
    table = bands_of(net, Pulse(), 5, 'value', np.random.default_rng(0)).assign(label='robust')
    part = table.drop(table[(table.layer == '4') & (table.position > 0.5)].index)
    mask = band_masks(net, part, thresholds=5)['4.weight']
    assert int(mask.sum()) == part[part.layer == '4'].removed.sum() < mask.numel()


def test_masks_of_channels_take_the_bias_along():
    net = make_net()
    table = bands_of(net, Channel(), 25, 'value', np.random.default_rng(0))
    table['label'] = np.where(table.threshold == 2, 'robust', 'fragile')
    masks = band_masks(net, table, filter='channel')
    for name in ('0', '4', '7'):
        free = torch.arange(len(masks[f'{name}.bias'])) == 2
        assert torch.equal(masks[f'{name}.bias'], free)
        assert torch.equal(masks[f'{name}.weight'].flatten(1).all(1), free)


def test_bands_of_another_network_or_grid():
    net = make_net()
    table = bands_of(net, Pulse(), 5, 'value', np.random.default_rng(0))
    for call in (lambda: band_masks(make_net(1), table, thresholds=5), lambda: band_masks(net, table),
                 lambda: band_masks(net, table, thresholds=5, grid='rank')):  # fmt: skip
        with pytest.raises(ValueError, match='not those of these weights'):
            call()
    with pytest.raises(ValueError, match='no row'):
        band_masks(net, table, response='FGSM', thresholds=5)


def test_random_masks_have_as_many():
    masks = some(make_net(), 0.3)
    drawn, again, other = (random_masks(masks, seed) for seed in (1, 1, 2))
    for name, mask in masks.items():
        assert drawn[name].sum() == mask.sum() and drawn[name].shape == mask.shape
        assert torch.equal(drawn[name], again[name])
        assert not torch.equal(drawn[name], other[name]) and not torch.equal(drawn[name], mask)
    whole = layer_masks(make_net(), {'0': 'robust', '4': 'fragile', '7': 'robust'})
    spread = random_masks(whole)
    assert sum(m.sum() for m in spread.values()) == sum(m.sum() for m in whole.values())
    assert 0 < spread['4.weight'].sum() < spread['4.weight'].numel()
    assert all(torch.equal(whole[name], mask) for name, mask in random_masks(whole, among='parameter').items())
    assert random_masks({}) == {}
    with pytest.raises(ValueError, match='among'):
        random_masks(masks, among='layer')


def test_lots_are_fair():
    "Each place is drawn about equally often."
    mask = {'w': torch.arange(10) < 3}
    counts = sum(random_masks(mask, seed)['w'].long() for seed in range(600))
    assert counts.sum() == 1800 and (counts - 180).abs().max() < 50


# --------------------------------------------------------------------------------------------------------- retrain


@pytest.fixture(scope='module')
def retrained():
    net, data = make_net(), make_data()
    before = state(net)
    found = retrain(net, some(net, 0.3), data, data, FGSM(0.1), rest='trained', epochs=1, batch_size=16,
                    optimizer=OPTIMIZERS['adam'], **QUIET)  # fmt: skip
    assert state(net) == before and net.training
    return net, data, found


def test_arms_are_what_they_say(retrained):
    net, data, found = retrained
    masks, total = some(net, 0.3), sum(p.numel() for p in net.parameters())
    judged, chosen = sum(m.numel() for m in masks.values()), int(sum(m.sum() for m in masks.values()))
    free = found.dataset['free'].sel(seed=0).to_series().to_dict()
    rest = total - judged
    assert free == {'all': total, 'chosen': rest + chosen, 'fragile only': total - chosen, 'random': rest + chosen}
    for arm, goal in {'all': Standard(), 'chosen': Only(Standard(), masks, 'trained'),
                      'fragile only': Only(Standard(), complement(masks), 'trained'),
                      'random': Only(Standard(), random_masks(masks, 1), 'trained')}.items():  # fmt: skip
        run = fit(net, data, goal, 1, 16, OPTIMIZERS['adam'], seed=1, **QUIET)
        own = found.dataset.sel(arm=arm, seed=1)
        assert own['after'].values.tolist() == list(selective._judged(run.model, data, FGSM(0.1)).values())


def test_the_lot_of_an_arm_depends_on_the_seed():
    masks = some(make_net(), 0.3)
    for seed in (1, 2):
        expected = random_masks(masks, seed)
        assert all(torch.equal(mask, expected[name]) for name, mask in ARMS['random'](masks, seed).items())


def test_tables(retrained):
    found = retrained[2]
    table, summary, differences = found.table(), found.summary(), found.differences('all')
    assert len(table) == 4 * 3 * 2 and np.allclose(table.gain, table.after - table.before)
    own = table[(table.arm == 'chosen') & (table.response == 'clean')]
    row = summary[(summary.arm == 'chosen') & (summary.response == 'clean')].iloc[0]
    assert np.allclose(row[['gain', 'gain_low', 'gain_high']].tolist(), mean_of_runs(own.gain.to_numpy()))
    whole = table[(table.arm == 'all') & (table.response == 'clean')].after.to_numpy()
    row = differences[(differences.arm == 'chosen') & (differences.response == 'clean')].iloc[0]
    assert np.allclose(row[['difference', 'difference_low', 'difference_high']].tolist(),
                       mean_of_runs(own.after.to_numpy() - whole))  # fmt: skip
    assert 'all' not in set(differences.arm) and set(differences.to) == {'all'} and set(differences.runs) == {3}
    with pytest.raises(KeyError, match='no arm'):
        found.differences('none')


def test_a_result_is_saved_drawn_and_joined(retrained, tmp_path):
    found = retrained[2]
    found.save(tmp_path / 'r.safetensors')
    loaded = Result.load(tmp_path / 'r.safetensors')
    pd.testing.assert_frame_equal(loaded.table(), found.table())
    assert type(loaded) is Retraining and loaded.settings == found.settings
    ticks = [tick.get_text() for tick in found.plot().axes[0].get_yticklabels()]
    assert ticks == found.arms
    net, data, _ = retrained
    more = retrain(net, {'7.weight': True}, data, data, FGSM(0.1), seeds=[7], **QUIET)
    both = Retraining.joined(found, more)
    assert both.dataset['seed'].values.tolist() == [0, 1, 2, 7] and both.arms == found.arms
    assert np.isnan(more.summary().after_low).all()  # one run has no interval
    more.plot()
    for wrong in ((found, found), (found, retrain(net, {}, data, data, arms=['all'], seeds=[9], **QUIET)), ()):
        with pytest.raises(ValueError, match='seeds of its own'):
            Retraining.joined(*wrong)


def test_arms_of_ones_own_without_an_attack(retrained):
    net, data, _ = retrained
    arms = {'none': lambda masks, seed: {}, 'last': lambda masks, seed: {'7.weight': True}}
    found = retrain(net, {}, data, data, arms=arms, seeds=[0], **QUIET)
    assert found.dataset['response'].values.tolist() == ['clean']
    table = found.table().set_index('arm')
    assert table.free.to_dict() == {'none': 0, 'last': 48} and table.gain['none'] == 0


def test_records_are_not_done_again(retrained, tmp_path, monkeypatch):
    net, data, _ = retrained
    calls, fit_once = [], selective.fit
    monkeypatch.setattr(
        selective, 'fit', lambda *args, **kwargs: calls.append(kwargs['seed']) or fit_once(*args, **kwargs)
    )
    call = partial(
        retrain, net, some(net), data, data, arms=['chosen', 'random'], records=tmp_path / 'r.jsonl', **QUIET
    )
    first = call(seeds=[0])
    assert calls == [0, 0]
    second = call(seeds=[0, 1])
    assert calls == [0, 0, 1, 1]
    assert second.dataset.sel(seed=0)['after'].equals(first.dataset.sel(seed=0)['after'])
    call(seeds=[0], epochs=2)
    call(seeds=[0], rest='trained')
    assert len(calls) == 8


def test_what_retrain_refuses(retrained):
    net, data, _ = retrained
    with pytest.raises(KeyError, match="no arm 'best'"):
        retrain(net, {}, data, data, arms=['best'], **QUIET)
    with pytest.raises(KeyError, match='at least one arm'):
        retrain(net, {}, data, data, arms=[], **QUIET)
    with pytest.raises(KeyError, match='no parameter'):
        retrain(net, {'weight': True}, data, data, **QUIET)
    with pytest.raises(ValueError, match='frozen'):
        retrain(net, {}, data, data, rest='kept', **QUIET)


SCRIPT = """
import torch_xla, torch, sys
sys.path.insert(0, sys.argv[1])
from test_selective import make_data, make_net, some
from robustnb.attacks import FGSM
from robustnb.devices import compile_count, pick_device
from robustnb.selective import Only
from robustnb.training import Adversarial, fit
net, device = make_net(), pick_device('xla')
goal = Only(Adversarial(FGSM(0.1)), some(net))
runs = [fit(model, make_data(64), goal, epochs, 16, show_progress=False).model.cpu()
        for model, epochs in ((net, 2), (make_net().to(device), 2))]
for (name, a), b in zip(runs[0].named_parameters(), runs[1].parameters()):
    assert torch.allclose(a, b, atol=1e-4), name
    mask = goal.masks.get(name, torch.zeros_like(a, dtype=torch.bool))
    assert torch.equal(b[~mask], net.get_parameter(name)[~mask]), name
many = compile_count()
fit(make_net().to(device), make_data(64), goal, 3, 16, show_progress=False)
assert compile_count() - many <= 3, compile_count() - many
"""


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec('torch_xla'), reason='needs torch_xla')
def test_on_xla_it_equals_the_cpu(tmp_path):
    ran = subprocess.run([sys.executable, '-c', SCRIPT, Path(__file__).parent], capture_output=True, text=True, timeout=300,
                         cwd=tmp_path, env=os.environ | {'PJRT_DEVICE': 'CPU', 'CPU_NUM_DEVICES': '1'})  # fmt: skip
    assert ran.returncode == 0, ran.stderr


if __name__ == '__main__':
    resumed(Path(sys.argv[1]), Path(sys.argv[2]))
