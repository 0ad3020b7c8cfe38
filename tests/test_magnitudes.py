"""Pruning by magnitude against literal forms: the steps of ADMM by hand, units taken out one by one, and sizes counted."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from interruptions import stop_at
from masked_nets import NETS, Sum, mlp
from torch import nn

from robustnb.attacks import PGD
from robustnb.checkpoints import load_state
from robustnb.data import Batch, DataSet
from robustnb.defences import TRADES
from robustnb.devices import seeded
from robustnb.dropout import insert_masks
from robustnb.guard import Normalized
from robustnb.layerwise import LayerRegularizer, Refreshed
from robustnb.magnitudes import ADMM, _scores, prune_units, units_per_layer, weight_sparsity
from robustnb.models import build
from robustnb.slimming import _layers, slim
from robustnb.training import Adversarial, Standard, fit

SGD = partial(torch.optim.SGD, lr=0.2, momentum=0.9, weight_decay=0.01)
ADAM = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
QUIET = {'show_progress': False, 'batch_size': 12}


def make_net():
    with seeded(0):
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2),
                             nn.Linear(144, 12), nn.ReLU(), nn.Linear(12, 2))  # fmt: skip


def make_data(n: int = 60) -> DataSet:
    x = torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return DataSet(x, (x.flatten(1).mean(1) > 0.5).long(), ('dark', 'bright'))


def zeros(model):
    return {name: (m.weight == 0) for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ------------------------------------------------------------------------------------------------------ ADMM by hand


def projected(values: np.ndarray, share: float) -> np.ndarray:
    "The smallest entries set to zero, one after the other."
    found = values.copy()
    for _ in range(round(share * values.size)):
        left = [place for place in np.ndindex(values.shape) if found[place] != 0]
        found[min(left, key=lambda place: abs(found[place]))] = 0
    return found


def by_hand(w, x, y, steps, retrain_from, share, rho, growth, every, lr):
    "Plain gradient descent on a linear regression, in float64."
    z, u, mask, gaps = projected(w, share), np.zeros_like(w), None, []
    if retrain_from == 0:
        gaps.append(np.linalg.norm(w - z) / np.linalg.norm(w))
        mask, w = z != 0, z
    for step in range(1, steps + 1):
        slope = 2 * (x @ w.T - y).T @ x / y.size
        if mask is None:
            slope = slope + rho * (w - z + u)
        w = w - lr * slope
        if step < retrain_from and step % every == 0:
            z = projected(w + u, share)
            u = (u + w - z) / growth
            rho *= growth
        if step == retrain_from or step < retrain_from and step % every == 0:
            gaps.append(np.linalg.norm(w - projected(w, share)) / np.linalg.norm(w))
        if step == retrain_from:
            mask = projected(w, share) != 0
        w = w if mask is None else w * mask
    return w, gaps


@pytest.mark.parametrize('retrain_from', [0, 9, 10, 100])
def test_admm_is_the_one_by_hand(retrain_from):
    with seeded(1):
        net = nn.Sequential(nn.Linear(6, 4, bias=False)).double()
        x, y = torch.randn(30, 6).double(), torch.randn(30, 4).double()
    settings = {'retrain_from': retrain_from, 'rho': 0.3, 'growth': 1.2, 'every': 3}
    literal, gaps = by_hand(net[0].weight.detach().numpy(), x.numpy(), y.numpy(), 14, share=0.6, lr=0.1, **settings)
    objective = ADMM(lambda model, batch, step: F.mse_loss(model(batch.x), y), sparsity=0.6, **settings)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    objective.setup(net)
    for step in range(14):
        sgd.zero_grad()
        objective.loss(net, Batch(x, None, None), step).backward()
        sgd.step()
        objective.after_step(net)
    np.testing.assert_allclose(net[0].weight.detach().numpy(), literal, rtol=1e-10, atol=1e-12)
    assert [one['gap'] for one in objective.gaps] == pytest.approx(gaps, rel=1e-10)
    assert (literal == 0).sum() == (0 if retrain_from == 100 else 14)


@pytest.mark.parametrize('optimizer', [SGD, ADAM])
@pytest.mark.parametrize('retrain_from', [0, 7])
def test_zeros_stay_zero(optimizer, retrain_from):
    net, seen = make_net(), []

    class Watched(ADMM):
        def after_step(self, model):
            super().after_step(model)
            seen.append(zeros(model))

    watched = Watched(Adversarial(PGD(0.1, steps=1)), retrain_from, 0.75, every=2)
    before = state(net)
    result = fit(net, make_data(), watched, epochs=4, optimizer=optimizer, **QUIET)
    assert same(before, state(net)), 'the model was changed'
    first = max(retrain_from - 1, 0)
    assert all(torch.equal(one[name], seen[first][name]) for one in seen[first:] for name in one)
    assert not any(mask.any() for one in seen[:first] for mask in one.values())
    counts = {name: int(mask.sum()) for name, mask in zeros(result.model).items()}
    assert counts == {'0': 27, '5': 1296, '7': 18}
    moved = [not torch.equal(a, b) for a, b in zip(result.model.state_dict().values(), before.values(), strict=True)]
    assert all(moved), 'what is left is trained'


def test_shares_of_their_own_and_chosen_layers():
    net = make_net()
    objective = ADMM(Standard(), 3, {'0': 0.5, '5': 0.9}, every=2)
    table = weight_sparsity(fit(net, make_data(), objective, epochs=1, **QUIET).model).set_index('layer')
    assert table.zeros.to_dict() == {'0': 18, '5': 1555, '7': 0, 'all': 1573}
    assert table.weights['all'] == 36 + 1728 + 24 and table.sparsity['5'] == 1555 / 1728
    net[5].weight.requires_grad_(False)  # what is frozen is not pruned
    only = fit(net, make_data(), ADMM(Standard(), 3, 0.5, where=nn.Linear), epochs=1, **QUIET).model
    assert weight_sparsity(only, nn.Linear).zeros.tolist() == [0, 12, 12]


def test_one_weight_stays_and_none_goes():
    net = make_net()
    most = fit(net, make_data(), ADMM(Standard(), 0, 0.999), epochs=1, **QUIET).model
    assert {name: int((~mask).sum()) for name, mask in zeros(most).items()} == {'0': 1, '5': 2, '7': 1}
    none = fit(net, make_data(), ADMM(Standard(), 2, 0.0, every=1), epochs=1, optimizer=SGD, **QUIET)
    assert not any(mask.any() for mask in zeros(none.model).values())
    plain = fit(net, make_data(), Standard(), epochs=1, optimizer=SGD, **QUIET)  # with nothing to give up, nothing pulls at first
    assert none.objective.gaps == [{'step': 1, 'gap': 0.0}, {'step': 2, 'gap': 0.0}]
    assert plain.history[0]['loss'] == pytest.approx(none.history[0]['loss'], rel=0.05)


def test_a_training_that_ends_too_early_has_no_zeros():
    result = fit(make_net(), make_data(), ADMM(Standard(), 6), epochs=1, **QUIET)
    assert weight_sparsity(result.model).sparsity.tolist()[-1] == 0 and not result.objective.masks


def with_a_memory():
    inner = Refreshed(Adversarial(PGD(0.1, steps=1)), make_data(10), PGD(0.1, steps=1), every=3, k=1,
                      regularizer=LayerRegularizer(['2', '6']))  # fmt: skip
    return ADMM(inner, 9, 0.7, every=2)


HOW = {
    'pulling': lambda: ADMM(TRADES(PGD(0.1, steps=1, loss='kl')), 14, 0.7, every=2),
    'retraining': lambda: ADMM(Adversarial(PGD(0.1, steps=1)), 5, {'0': 0.5, '5': 0.9}, every=2),
    'a memory inside': with_a_memory,
}


@pytest.mark.parametrize('every', [None, 3])
@pytest.mark.parametrize('how', HOW)
def test_an_interruption_leaves_no_trace(how, every, monkeypatch, tmp_path):
    settings = {'epochs': 3, 'every': every, 'optimizer': SGD} | QUIET
    net, path = make_net(), tmp_path / 'run.safetensors'
    straight = fit(net, make_data(), HOW[how](), **settings)
    with monkeypatch.context() as patch:
        stop_at(patch, 8)
        assert fit(net, make_data(), HOW[how](), checkpoint=path, **settings).interrupted
    again = fit(net, make_data(), HOW[how](), checkpoint=path, **settings)
    assert load_state(path)['step'] == 15 and again.history[-1]['loss'] == straight.history[-1]['loss']
    assert same(state(straight.model), state(again.model)) and again.objective.gaps == straight.objective.gaps
    with pytest.raises(ValueError, match='belongs to another training'):
        fit(net, make_data(), ADMM(Standard(), 14, 0.6, every=2), checkpoint=path, **settings)


def test_groups_of_parameters():
    class Two:
        def groups(self, model):
            return {'features': model[0].parameters(), 'head': [*model[5].parameters(), *model[7].parameters()]}

        def loss(self, model, batch, step):
            loss = F.cross_entropy(model(batch.x), batch.y)
            return {'features': loss, 'head': 2 * loss}

    result = fit(make_net(), make_data(), ADMM(Two(), 4, 0.5, every=2), epochs=1, **QUIET)
    assert weight_sparsity(result.model).sparsity.tolist() == [0.5] * 4


@pytest.mark.parametrize('wrong, match', [
    ({'retrain_from': 2.5}, 'retrain_from is a number of steps'), ({'retrain_from': None}, 'retrain_from is a number'),
    ({'retrain_from': True}, 'retrain_from is a number'), ({'retrain_from': -1}, 'at least 0'),
    ({'sparsity': 1.0}, 'from 0 to below 1'), ({'sparsity': -0.1}, 'from 0 to below 1'), ({'sparsity': {}}, 'from 0 to below'),
    ({'sparsity': {'0': 2}}, 'from 0 to below 1'), ({'every': 0}, 'every is a number of steps'), ({'rho': -1}, 'rho is a finite'),
    ({'rho': float('nan')}, 'rho is a finite'), ({'growth': 0.5}, 'growth is a finite'),
])  # fmt: skip
def test_settings_that_mean_nothing(wrong, match):
    with pytest.raises(ValueError, match=match):
        ADMM(**{'objective': Standard(), 'retrain_from': 5} | wrong)


def test_networks_without_weights_to_prune():
    with pytest.raises(TypeError, match='retrain_from'):
        ADMM(Standard())
    with pytest.raises(TypeError, match='an objective is an object'):
        ADMM('standard', 5)
    with pytest.raises(ValueError, match='no layer with weights to prune'):
        ADMM(Standard(), 5, where=nn.BatchNorm2d).setup(make_net())
    with pytest.raises((KeyError, ValueError), match='weights'):
        ADMM(Standard(), 5).setup(nn.Sequential(nn.ReLU()))
    with pytest.raises((KeyError, ValueError), match='nowhere'):
        ADMM(Standard(), 5, {'nowhere': 0.5}).setup(make_net())
    with pytest.raises(KeyError, match='without weights to prune; there are 0'):
        ADMM(Standard(), 5, {'0': 0.5, '1': 0.5}).setup(make_net())
    with pytest.raises(ValueError, match='computed anew'):
        ADMM(Standard(), 5).setup(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))))
    with pytest.raises(RuntimeError, match='setup'):
        ADMM(Standard(), 5).loss(make_net(), None, 0)


def test_shared_weights_are_pruned_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 2)
            self.two.weight = self.one.weight

        def forward(self, x):
            return self.head(self.two(self.one(x.flatten(1)).relu()).relu())

    objective = ADMM(Standard(), 3, 0.5, every=1)
    result = fit(Tied(), make_data(), objective, epochs=1, **QUIET)
    assert list(result.objective.masks) == ['one', 'head'] and weight_sparsity(result.model).sparsity.tolist() == [0.5] * 4


# ------------------------------------------------------------------------------------------------ units, one by one


def np_scores(weight, norm):
    "The norm of each row, divided by the root mean square of all."
    sizes = np.array([(np.abs(row) ** norm).sum() ** (1 / norm) for row in weight.reshape(len(weight), -1)])
    return sizes / np.sqrt((sizes**2).mean())


def one_by_one(sizes, scores, shapes, wanted):
    "Take the smallest unit of all that is not the last of its layer, until the count is small enough."
    gone = {layer: [] for layer in scores}
    while sizes({layer: shapes[layer] - len(units) for layer, units in gone.items()}) > wanted:
        left = [(scores[layer][unit], layer, unit) for layer in scores for unit in range(shapes[layer])
                if unit not in gone[layer] and len(gone[layer]) < shapes[layer] - 1]  # fmt: skip
        _, layer, unit = min(left)
        gone[layer].append(unit)
    return gone


@pytest.mark.parametrize('norm', [1, 2])
@pytest.mark.parametrize('share', [0.9, 0.5, 0.2, 0.08])
def test_units_are_those_of_brute_force(share, norm):
    with seeded(2):
        net = nn.Sequential(nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 7, 3), nn.ReLU(), nn.MaxPool2d(2),
                            nn.Flatten(), nn.Linear(28, 9), nn.ReLU(), nn.Linear(9, 3)).double().eval()  # fmt: skip
        net[1].running_mean.normal_(), net[1].weight.data.uniform_(0.5, 2), net[1].bias.data.normal_()
        x = torch.rand(6, 1, 8, 8).double()
    makers = {'0': net[0], '3': net[3], '7': net[7]}
    scores = {name: np_scores(m.weight.detach().numpy(), norm) for name, m in makers.items()}
    shapes, total = {'0': 5, '3': 7, '7': 9}, parameters(net)

    def sizes(k):
        return (k['0'] * (9 + 1 + 2) + k['3'] * (9 * k['0'] + 1) + k['7'] * (4 * k['3'] + 1) + 3 * (k['7'] + 1))

    assert sizes(shapes) == total
    gone = one_by_one(sizes, scores, shapes, int(share * total))
    zeroed, before = copy.deepcopy(net), state(net)
    with torch.no_grad():  # a unit that nobody reads
        zeroed[3].weight[:, gone['0']] = 0
        zeroed[7].weight.view(9, 7, 4)[:, gone['3']] = 0
        zeroed[9].weight[:, gone['7']] = 0
    small = prune_units(net, share, norm=norm)
    assert units_per_layer(small) == {layer: shapes[layer] - len(units) for layer, units in gone.items()}
    torch.testing.assert_close(small(x), zeroed(x), rtol=1e-10, atol=1e-12)
    assert parameters(small) == sizes(units_per_layer(small)) <= share * total and same(before, state(net))
    assert units_per_layer(prune_units(net, int(share * total), norm=norm)) == units_per_layer(small)
    by_count = prune_units(net, counts=units_per_layer(small), norm=norm)
    assert same(state(by_count), state(small)) and not small.training


ARCHITECTURES = ['lenet5_caffe', 'vgg16', 'resnet18', 'functional', 'sum']


@pytest.mark.parametrize('name', ARCHITECTURES)
def test_architectures(name):
    make, shape, _ = NETS[name]
    x, net = torch.rand(3, *shape, generator=torch.Generator().manual_seed(0)), make().double().eval()
    full, before = units_per_layer(net), state(net)
    for share in (0.95, 0.8):
        small = prune_units(net, share)
        left = units_per_layer(small)
        assert parameters(small) <= share * parameters(net) and min(left.values()) >= 1
        one_more = [dict(left, **{layer: left[layer] + 1}) for layer in left if left[layer] < full[layer]]
        assert max(parameters(prune_units(net, counts=more)) for more in one_more) > share * parameters(net)
        with torch.no_grad():
            torch.testing.assert_close(small(x.double()), unread(net, left)(x.double()), rtol=1e-8, atol=1e-9)
    assert same(before, state(net))
    assert all(n == 1 for n in units_per_layer(prune_units(net, counts=dict.fromkeys(full, 1))).values())


def unread(net, left):
    "The full network, in which nobody reads the smallest units of each layer."
    found = copy.deepcopy(net)
    names = {id(m): name for name, m in found.named_modules()}
    layers = _layers(found)
    for layer, score in [(layer, _scores(layer, 2)) for layer in layers]:  # all scores first: columns of one are rows of another
        gone = score.argsort()[: layer.units - left[names[id(layer.maker)]]]
        for reader in layer.readers:
            weight = reader.weight.data
            weight.view(len(weight), layer.units, -1)[:, gone] = 0
    return found


def test_after_all_of_it_the_largest_unit_is_left():
    net = mlp()
    small = prune_units(net, counts={'1': 1})
    assert torch.equal(small[1].weight[0], net[1].weight[net[1].weight.norm(dim=1).argmax()])
    least = parameters(small)
    assert parameters(prune_units(net, least)) == least
    with pytest.raises(ValueError, match=f'{least - 1} parameters are wanted, and {least} are left'):
        prune_units(net, least - 1)


def test_dead_layers_masks_and_wrappers():
    net, x = mlp(), torch.rand(3, 1, 8, 8)
    with torch.no_grad():
        net[1].weight.zero_()
    assert units_per_layer(prune_units(net, 0.5)) == {'1': 5}  # 12 * 65 + 52 parameters, of which 416 may stay
    masked = insert_masks(Normalized(mlp(), 0.5, 0.5), x).eval()
    with torch.no_grad():
        masked.model[2].mask.a_raw[:4] = -9
    small = prune_units(masked, 1.0)
    torch.testing.assert_close(small(x), slim(masked)(x)), type(small) is Normalized
    assert units_per_layer(small) == {'1': 8} and units_per_layer(prune_units(masked, counts={'1': 3})) == {'1': 3}


@pytest.mark.parametrize('wrong, match', [
    ({'parameters': 0}, 'from above 0'), ({'parameters': -0.5}, 'from above 0'), ({'parameters': 1.5}, 'at most 1'),
    ({'parameters': True}, 'from above 0'), ({'parameters': 'half'}, 'from above 0'), ({'norm': 0}, 'norm is a number'),
    ({'counts': {'1': 0}}, '1 to 12 can stay'), ({'counts': {'1': 13}}, '1 to 12'), ({'counts': {'1': 2.0}}, '1 to 12 can'),
    ({'counts': {'3': 2}}, 'no units can be taken out of 3; there are 1'),
])  # fmt: skip
def test_requests_that_cannot_be_met(wrong, match):
    with pytest.raises((ValueError, KeyError), match=match):
        prune_units(mlp(), **wrong)


def test_networks_without_units_to_take_out():
    with pytest.raises(ValueError, match='no unit of this Sequential'):
        prune_units(nn.Sequential(nn.Linear(4, 3)))
    assert units_per_layer(nn.Sequential(nn.Linear(4, 3))) == {}
    assert units_per_layer(Sum()) and build('digits_cnn', 0) is not None


# ---------------------------------------------------------------------------------------------------------- sparsity


def test_sparsity_is_counted_by_hand():
    net = make_net()
    with torch.no_grad():
        net[0].weight[0], net[5].weight[:, 0], net[7].bias[:] = 0, 0, 0
    before = state(net)
    table = weight_sparsity(net)
    assert table.columns.tolist() == ['layer', 'weights', 'zeros', 'sparsity'] and table.layer.tolist() == ['0', '5', '7', 'all']
    assert table.zeros.tolist() == [9, 12, 0, 21] and table.sparsity.tolist() == [9 / 36, 12 / 1728, 0, 21 / 1788]
    assert weight_sparsity(net, '5').zeros.tolist() == [12, 12] and same(before, state(net))
