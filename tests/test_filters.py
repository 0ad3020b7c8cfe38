"Traps of the filters and of their sweep: layers of other kinds, settings that mean nothing, records, what a plan promises."

import logging
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

from robustnb import synaptic
from robustnb.attacks import FGSM, PGD
from robustnb.data import DataSet, load_data
from robustnb.devices import seeded
from robustnb.filters import Channel, High, Low, Magnitude, Pool, Pulse, Random, filtered, pools
from robustnb.guard import Logits
from robustnb.results import Records
from robustnb.synaptic import plan, sweep
from robustnb.training import trained


def digits(count: int = 40) -> DataSet:
    return load_data('digits').test[:count]


def run(model, data, perturbations=None, **how):
    return sweep(model, data, perturbations, **{'thresholds': 3, 'batch_size': 13, 'show_progress': False} | how)


def equals_whole_passes(result, model, data, **how):
    "Each state's clean predictions are those of the whole network under `filtered`."
    found = result.dataset
    for step in range(found.sizes['step']):
        layer, kind, threshold, state = (found[name].values[step] for name in ('layer', 'filter', 'threshold', 'state'))
        with filtered(model, str(kind), float(threshold), str(layer), **how), torch.no_grad():
            expected = model(data.x).argmax(1)
        np.testing.assert_array_equal(found['prediction'].values[state, 0], expected, err_msg=f'{layer} {kind} {threshold}')


# --- layers ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('layer, x', [
    (nn.Conv2d(4, 6, 3, groups=2), torch.rand(2, 4, 5, 5)),
    (nn.ConvTranspose2d(4, 6, 2, groups=2), torch.rand(2, 4, 3, 3)),
    (nn.ConvTranspose1d(3, 5, 2), torch.rand(2, 3, 4)),
    (nn.Linear(4, 5), torch.rand(2, 4)),
    (nn.Bilinear(4, 4, 3), torch.rand(2, 4)),
    (nn.BatchNorm1d(4).eval(), torch.rand(2, 4)),
    (nn.Embedding(7, 3), torch.tensor([[1, 2], [6, 0]])),
], ids=lambda value: type(value).__name__)
def test_a_channel_is_switched_off_and_no_other(layer, x):
    inputs = (x, x) if isinstance(layer, nn.Bilinear) else (x,)
    axis = -1 if isinstance(layer, nn.Embedding) else 1
    pool = Pool({'layer': layer})
    steps = Channel().steps(pool)
    whole = layer(*inputs)
    assert len(steps.start) == whole.shape[axis]
    for channel, (start, stop) in enumerate(zip(steps.start, steps.stop, strict=True)):
        weights = {name.removeprefix('layer.'): w for name, w in pool.without(steps.key, int(start), int(stop)).items()}
        expected = whole.clone()
        expected.select(axis, channel).zero_()
        torch.testing.assert_close(torch.func.functional_call(layer, weights, inputs), expected)


@pytest.mark.parametrize('layer', [nn.LSTM(3, 4), nn.GRUCell(3, 4), nn.MultiheadAttention(8, 2, add_bias_kv=True)],
                         ids=lambda layer: type(layer).__name__)
def test_gates_and_projections_are_no_channels(layer):
    pool = Pool({'layer': layer})
    assert High().steps(pool).removed[-1] == pool.size
    with pytest.raises(ValueError, match='layer is a .* no output channels'):
        Channel().steps(pool)


def test_computed_weights_are_refused_under_any_name():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        recurrent = nn.utils.weight_norm(nn.LSTM(3, 4), 'weight_hh_l0')
    pruned = prune.random_unstructured(nn.Linear(3, 4), 'weight', 0.5)
    for layer in recurrent, pruned, nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)):
        with pytest.raises(ValueError, match='layer is computed from other parameters'):
            Pool({'layer': layer})
    assert Pool({'layer': prune.remove(pruned, 'weight')}).size == 12


@pytest.mark.parametrize('scope', ['local', 'global', 'together'])
@pytest.mark.parametrize('kind', ['high', 'channel', 'random'])
def test_one_weight_in_two_layers_in_every_scope(scope, kind):
    with seeded(0):
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64, bias=False), nn.ReLU(), nn.Linear(64, 64, bias=False),
                              nn.Linear(64, 10))
    model[3].weight = model[1].weight
    thresholds = [0, 5] if kind == 'channel' else 3
    result = run(model, digits(), FGSM(0.1), filters=kind, scope=scope, thresholds=thresholds)
    assert len(result.layers) == (3 if scope == 'local' else 1) and np.isfinite(result.accuracy).all()
    if scope != 'local' and kind == 'high':
        assert result.dataset['size'].values[0] == 64 * 64 + 640


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(50, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.embedding(x).mean(1))


class Sequences(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(8, 6, num_layers=2, batch_first=True, bidirectional=True)
        self.attention, self.head = nn.MultiheadAttention(12, 2, batch_first=True), nn.Linear(12, 10)

    def forward(self, x):
        out, _ = self.lstm(x.flatten(1).view(-1, 8, 8))
        return self.head(self.attention(out, out, out)[0].mean(1))


def test_numbers_of_words():
    with seeded(0):
        model = Words()
        data = DataSet(torch.randint(0, 50, (30, 7)), torch.arange(30) % 3)
    equals_whole_passes(run(model, data, where=(nn.Embedding, nn.Linear), filters=['high', 'channel']), model, data)


@pytest.mark.filterwarnings('ignore:There is a performance drop')
@pytest.mark.parametrize('stack', [1, 3])
def test_gates_and_attention(stack):
    with seeded(0):
        model = Sequences().eval()
    where = (nn.LSTM, nn.MultiheadAttention, nn.Linear)
    result = run(model, digits(), where=where, filters=['high', 'magnitude'], stack=stack)
    assert result.layers == ['lstm', 'attention', 'attention.out_proj', 'head']
    equals_whole_passes(result, model, digits())


# --- thresholds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('rule, beyond', [(High(), np.less_equal), (Low(), np.greater_equal), (Magnitude(), np.less_equal)],
                         ids=lambda value: getattr(value, 'name', ''))
def test_a_threshold_of_the_rank_grid_removes_what_it_says(rule, beyond):
    pool = pools(trained())['conv2']  # without equal weights
    steps = rule.steps(pool, 7, 'rank')
    said = [int(beyond(pool.sorted(rule.key), a).sum()) for a in steps.threshold]
    assert [n for n in steps.removed if n] == [n for n, there in zip(said, steps.removed, strict=True) if there]
    assert (np.diff(steps.threshold) >= 0).all() and sorted(steps.removed)[0] == 0


def test_settings_of_filters_that_mean_nothing():
    model = trained()
    assert Pulse(np.float32(0.5)).width == 0.5
    for bad in 0, -1, math.nan, 'wide', np.float32(0):
        with pytest.raises(ValueError, match='width is None'):
            Pulse(bad)
    for bad in -1, 0.5:
        with pytest.raises(ValueError, match='seed is a whole number'):
            Random(seed=bad)
    with pytest.raises(ValueError, match="no filter 'hihg'"):
        Random('hihg')
    for bad in 'many', None, math.inf:
        with pytest.raises(ValueError, match='list of finite numbers'), filtered(model, 'high', bad):
            pass
    with pytest.raises(ValueError, match='as wide as the range divided'), filtered(model, Pulse('published'), 0.1):
        pass


def test_strengths_that_mean_nothing():
    for perturbations, eps in (None, 0.1), (FGSM(0.1), []), (FGSM(0.1), [0.1, 0.1]):
        with pytest.raises(ValueError, match='eps= gives the perturbations several strengths'):
            run(trained(), digits(), perturbations, eps=eps)


def test_all_channels_are_asked():
    result = run(trained(), digits(), filters=['channel', 'high'], thresholds=33, refine=0.5, where='linear1')
    state = result.dataset['state'].values
    channel = result.dataset['filter'].values == 'channel'
    assert (state[channel] >= 0).all() and (state[~channel] < 0).any()


# --- images ---------------------------------------------------------------------------------------------------------------


def test_a_part_of_sorted_data_has_all_classes():
    data = load_data('digits').test
    order = data.y.argsort(stable=True)
    x, y = data.x[order], data.y[order]
    how = {'where': 'linear2', 'filters': 'high', 'samples': 60}
    mixed = run(trained(), TensorDataset(x, y), **how).dataset
    assert len(np.unique(mixed['label'].values)) == 10 and mixed.sizes['sample'] == 60
    np.testing.assert_array_equal(mixed['label'].values, y[mixed['sample'].values.tolist()])
    first = run(trained(), DataLoader(TensorDataset(x, y), 25), **how).dataset
    np.testing.assert_array_equal(first['label'].values, y[:60])


def test_image_files_are_drawn_by_class(tmp_path):
    from PIL import Image

    from robustnb.data import from_folder
    for kind in range(3):
        (tmp_path / str(kind)).mkdir()
        for i in range(6):
            image = Image.fromarray((digits().x[6 * kind + i, 0].numpy() * 255).astype('uint8'))
            image.convert('RGB').save(tmp_path / f'{kind}/{i}.png')
    with seeded(0):
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    files = from_folder(tmp_path, size=8)
    files = getattr(files, 'test', files)
    assert np.bincount(run(model, files, samples=6).dataset['label'].values).tolist() == [2, 2, 2]
    assert run(model, files).dataset.sizes['sample'] == 18


# --- how images are judged ------------------------------------------------------------------------------------------------


def test_the_interval_that_stops_a_state_holds():
    rng, n, whole_right = np.random.default_rng(0), 500, 0.5
    found = object.__new__(synaptic._Found)
    found.nothing, found.y = 255, np.zeros(n, int)
    for more in True, False:
        ratios, widths = [], []
        for _ in range(400):
            whole = rng.random(n) < whole_right
            ours = whole | (rng.random(n) < 0.9) if more else rng.random(n) < 0.1
            found.predictions = (~np.stack([whole, ours]))[:, None].astype('uint8')
            ratios.append(ours.mean() / whole.mean())
            low, high = 0.0, 1.0
            for _ in range(9):  # the half width, by what settles it
                middle = (low + high) / 2
                low, high = (low, middle) if found.settled(1, 0, middle) else (middle, high)
            widths.append(high)
        assert np.mean(widths) == pytest.approx(1.96 * np.std(ratios), rel=0.12)


def test_half_precision_inside_an_attack_on_filtered_networks():
    attack = FGSM(0.1, autocast=torch.bfloat16)
    result = run(trained(), digits(), attack, against='filtered', where='linear1', filters='high')
    data, model = digits(), trained()
    for step in range(3):
        threshold, state = (result.dataset[name].values[step] for name in ('threshold', 'state'))
        with filtered(model, 'high', threshold, 'linear1'):
            x_adv = attack(model, data.x, data.y)
            with torch.no_grad():
                np.testing.assert_array_equal(result.dataset['prediction'].values[state, 1], model(x_adv).argmax(1))


def test_a_note_that_was_kept_back_can_be_given_later(caplog):
    model, data = trained(), digits(20)
    attack = PGD(0.1, steps=2, random_start=False)
    with caplog.at_level(logging.WARNING, 'robustnb'):
        run(model, data, attack, against='filtered', where='linear2', filters='high')
        assert 'exactly zero' not in caplog.text
        with filtered(model, 'high', 99.0, where='linear2'):
            attack(model, data.x, data.y)
    assert 'exactly zero' in caplog.text


def test_a_network_that_cannot_be_stacked_is_tried_once(monkeypatch):
    class Capricious(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(64, 8), nn.Linear(8, 10)

        def forward(self, x):
            x = self.first(x.flatten(1))
            return self.last(x.relu() if float(x.detach().sum()) > 1e9 else x.tanh())

    tried, vmap = [], torch.func.vmap
    monkeypatch.setattr(torch.func, 'vmap', lambda *args, **how: tried.append(1) or vmap(*args, **how))
    with seeded(0):
        model = Capricious()
    result = run(model, digits(), filters='high', where='first', thresholds=9, stack=4)
    assert len(tried) == 1
    equals_whole_passes(result, model, digits())


def test_a_wrapped_network_is_the_network():
    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = trained()

        def forward(self, x):
            return x, self.net(x)

    how = {'where': 'net.conv2', 'against': 'filtered', 'filters': 'high'}
    one, other = run(Several(), digits(), FGSM(0.1), logits=1, **how), run(Logits(Several(), 1), digits(), FGSM(0.1), **how)
    np.testing.assert_array_equal(one.dataset['prediction'].values, other.dataset['prediction'].values)
    assert one.layers == other.layers == ['net.conv2']


# --- records --------------------------------------------------------------------------------------------------------------


class Counted(Records):
    "Records that know how much was new."
    new = 0

    def add(self, *args, **how):
        self.new += 1
        super().add(*args, **how)


def done(path, **how) -> int:
    records = Counted(path)
    usual = {'model': trained(), 'data': digits(13), 'perturbations': FGSM(0.1), 'where': 'linear2'}
    run(**usual | how, records=records)
    return records.new


def test_the_same_call_goes_on_and_others_do_not_mix(tmp_path):
    path, other = tmp_path / 'run.jsonl', trained().double()
    assert (done(path), done(path)) == (1, 0)
    with torch.no_grad():
        touched = trained()
        touched.linear2.bias[0] += 1e-3
    for how in [{'perturbations': FGSM(0.2)}, {'perturbations': PGD(0.1, steps=1)}, {'against': 'filtered'},
                {'norms': 'batch'}, {'model': other}, {'model': touched}, {'data': digits(12)}, {'thresholds': 4},
                {'filters': 'high'}, {'bias': True},
                {'scope': 'global'}, {'seed': 1, 'samples': 10}, {'where': 'conv1'}]:
        assert (done(path, **how), done(path, **how)) == (1, 0), how
    assert done(path) == 0


def test_images_of_a_function_with_luck_are_made_once(tmp_path, monkeypatch):
    def lucky(model, x, y):
        return (x + 0.1 * torch.randn_like(x)).clamp(0, 1)

    def go():
        return run(trained(), digits(), lucky, where='linear1', records=tmp_path / 'run.jsonl').dataset['prediction'].values

    first = go()
    monkeypatch.setattr(synaptic, '_perturbed', None)
    np.testing.assert_array_equal(go(), first)


def test_an_interrupt_before_anything_was_done_says_so(monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(synaptic._Work, '__call__', stop)
    with pytest.raises(KeyboardInterrupt, match='before the first filtered network'):
        run(trained(), digits())


# --- plans ----------------------------------------------------------------------------------------------------------------


def test_a_plan_counts_the_making_of_attacks():
    how = {'where': 'linear2', 'thresholds': 3, 'batch_size': 20}
    few, many = (plan(trained(), digits(), PGD(0.1, steps=steps), **how) for steps in (1, 40))
    assert many.making > 5 * few.making and many.seconds >= many.making > 0
    assert plan(trained(), digits(), **how).making == 0 == plan(trained(), digits(), FGSM(0.1), against='filtered', **how).making
    assert 'at most' not in repr(few) and 'at most' in repr(plan(trained(), digits(), tolerance=0.1, **how))
    assert 'to make the perturbed images' in repr(many)


def test_the_memory_of_a_plan_holds_what_is_kept():
    data, model = digits(), trained()
    one = plan(model, data, where=['conv1', 'linear1'], filters=['high', 'magnitude'], thresholds=5, batch_size=20)
    size = sum(pool.size for pool in pools(model, ['conv1', 'linear1']).values())
    assert one.nbytes >= data.x.nbytes + one.passes + 2 * 12 * size + data.x[:20].nbytes
    more = plan(model, data, FGSM(0.1), where=['conv1', 'linear1'], filters=['high', 'magnitude'], thresholds=5, batch_size=20)
    assert more.nbytes - one.nbytes >= data.x.nbytes + one.passes


def test_a_plan_for_filters_that_remove_nothing():
    nothing = plan(trained(), digits(), filters='high', thresholds=[-99, -98], where='linear2')
    assert nothing.layers[0]['states'] == 0 and nothing.passes == 40
    assert (nothing.run(show_progress=False).dataset['state'].values == 0).all()


def test_a_block_is_told_how_to_name_what_is_inside():
    model = nn.Sequential()
    model.block = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    with pytest.raises(ValueError, match=r"where='block\.\*' those inside"):
        pools(model, 'block')
    assert list(pools(model, 'block.*')) == ['block.0']
