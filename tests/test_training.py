"""Training: objectives against plain loops, seeds, interruptions, and the networks that travel with the package."""

import math
import threading
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from robustnb import training
from robustnb.attacks import FGSM, PGD
from robustnb.data import Batch, DataSet, batches, digits
from robustnb.devices import seeded
from robustnb.evaluation import accuracy
from robustnb.training import Adversarial, Standard, fit, trained


@pytest.fixture(scope='module')
def data():
    x = torch.rand(50, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    return DataSet(x, (x.flatten(1).mean(1) > 0.5).long(), ('dark', 'bright'))


def make_net(dropout: float = 0.0) -> nn.Sequential:
    with seeded(0):
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 2))


def weights(net) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def test_fit_equals_a_plain_loop(data):
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for epoch in range(3):
        for x, y, _ in batches(data, 16, shuffle=5 * 1_000_003 + epoch):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
    found = fit(make_net(), data, epochs=3, batch_size=16, seed=5, show_progress=False,
                optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    assert torch.allclose(weights(found.model), weights(net), atol=1e-7)
    assert not found.model.training and len(found.history) == 3


def test_objectives_by_hand(data):
    net, batch = make_net(), Batch(data.x[:8], data.y[:8], torch.arange(8))
    clean = F.cross_entropy(net(batch.x), batch.y)
    attacked = F.cross_entropy(net(FGSM(0.1)(net, batch.x, batch.y)), batch.y)
    assert torch.allclose(Standard().loss(net, batch, 0), clean)
    assert torch.allclose(Adversarial(FGSM(0.1)).loss(net, batch, 0), attacked)
    assert torch.allclose(Adversarial(FGSM(0.1), clean_weight=0.25).loss(net, batch, 0), 0.25 * clean + 0.75 * attacked)
    assert net.training, 'the attack gives the model back in training mode'
    start = Adversarial(PGD(0.1, steps=1)).loss(net, batch, 0)
    assert not torch.equal(Adversarial(PGD(0.1, steps=1)).loss(net, batch, 1), start), 'random starts move with the step'


def test_the_seed_decides_and_the_global_generator_does_not(data):
    def train(seed):
        return weights(fit(make_net(0.5), data, epochs=2, seed=seed, show_progress=False).model)

    torch.manual_seed(1)
    first = train(3)
    before = torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(train(3), first)
    assert not torch.equal(train(4), first)
    torch.set_rng_state(before)


def test_a_loader_shuffles_by_itself(data):
    loader = DataLoader(data, batch_size=7, shuffle=True, generator=torch.Generator().manual_seed(0))
    assert len(fit(make_net(), loader, epochs=2, show_progress=False).history) == 2


def test_an_interruption_returns_what_there_is(data):
    def impatient(model, batch, step):
        if step == 5:
            raise KeyboardInterrupt
        return Standard().loss(model, batch, step)

    result = fit(make_net(), data, impatient, epochs=9, batch_size=16, show_progress=False)
    assert len(result.history) == 1 and not result.model.training
    assert not torch.equal(weights(result.model), weights(make_net()))


def test_empty_data(data):
    with pytest.raises(ValueError, match='empty'):
        fit(make_net(), (data.x[:0], data.y[:0]), epochs=1, show_progress=False)


@pytest.mark.parametrize('which', [('digits', 'standard'), ('digits', 'adversarial'), ('digits28', 'standard'),
                                   ('digits28', 'adversarial')])
def test_networks_in_the_package(which, monkeypatch, tmp_path):
    monkeypatch.setenv('ROBUSTNB_HOME', str(tmp_path))
    data, kind = which
    model = trained('digits_cnn', data, training=kind, show_progress=False)
    assert not (tmp_path / 'weights').exists(), 'it came from the package'
    test = digits(28 if data == 'digits28' else 8).test
    assert accuracy(model, test) > 0.9 and not model.training
    robust = 1 - float(PGD(0.1, steps=10).run(model, test.x[:200], test.y[:200]).success.float().mean())
    assert robust > (0.7 if data == 'digits' else 0.4) if kind == 'adversarial' else robust < 0.6


def test_a_network_is_trained_once_and_cached(monkeypatch, tmp_path, data):
    monkeypatch.setenv('ROBUSTNB_HOME', str(tmp_path))
    monkeypatch.setitem(training.RECIPES, ('digits', 'standard'), training.Recipe(epochs=1))
    first = trained('digits_cnn', 'digits', seed=77, show_progress=False)
    assert len(list((tmp_path / 'weights').iterdir())) == 1
    monkeypatch.setattr(training, 'fit', None)
    assert torch.equal(weights(trained('digits_cnn', 'digits', seed=77)), weights(first))


def test_an_interrupted_training_is_not_cached(monkeypatch, tmp_path):
    def interrupt(model, batch, step):
        raise KeyboardInterrupt

    monkeypatch.setenv('ROBUSTNB_HOME', str(tmp_path))
    monkeypatch.setitem(training.RECIPES, ('digits', 'standard'), training.Recipe(epochs=1, objective=interrupt))
    with pytest.raises(KeyboardInterrupt):
        trained('digits_cnn', 'digits', seed=99, show_progress=False)
    assert not (tmp_path / 'weights').exists()


def test_frozen_modules_stay_frozen(data):
    with seeded(0):
        net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.Linear(16, 2))
    net[1].eval()
    found = fit(net, data, epochs=1, show_progress=False).model
    assert torch.equal(found[1].running_mean, net[1].running_mean)
    net.eval()
    found = fit(net, data, epochs=1, show_progress=False).model
    assert not torch.equal(found[1].running_mean, net[1].running_mean), 'a net in evaluation mode is put into training mode'


def test_setup_and_after_step_are_called(data):
    class Clipped(Standard):
        calls = []

        def setup(self, model):
            self.calls.append('setup')

        def after_step(self, model):
            with torch.no_grad():
                model[1].weight.clamp_(-0.1, 0.1)
            self.calls.append('step')

    found = fit(make_net(), data, Clipped(), epochs=1, batch_size=25, show_progress=False)
    assert Clipped.calls == ['setup', 'step', 'step'] and found.model[1].weight.abs().max() <= 0.1


@pytest.mark.parametrize('caller', [torch.no_grad, torch.inference_mode])
def test_any_gradient_mode_of_the_caller(caller, data):
    with caller():
        found = fit(make_net(), data, epochs=1, show_progress=False).model
    assert torch.equal(weights(found), weights(fit(make_net(), data, epochs=1, show_progress=False).model))


def test_every_kind_of_data_is_shuffled_alike(data):
    from torch.utils.data import TensorDataset

    kinds = (data, (data.x, data.y), [data.x, data.y], TensorDataset(data.x, data.y))
    found = [weights(fit(make_net(), kind, epochs=2, batch_size=16, show_progress=False).model) for kind in kinds]
    assert all(torch.allclose(found[0], other) for other in found[1:])
    with pytest.raises(TypeError, match='scale them to'):
        fit(make_net(), ((data.x * 255).byte(), data.y), epochs=1, show_progress=False)


# ---------------------------------------------------------------------------------------- schedules, groups, precision


def rates(data, schedule, epochs: int = 2, optimizer=None, **more) -> list[float]:
    "The learning rates that the steps of a training had."
    seen = []

    def watched(parameters):
        made = (optimizer or (lambda p: torch.optim.SGD(p, lr=0.5)))(parameters)
        made.register_step_pre_hook(lambda o, *_: seen.append(float(o.param_groups[0]['lr'])))
        return made

    fit(make_net(), data, epochs=epochs, batch_size=10, optimizer=watched, schedule=schedule, show_progress=False, **more)
    return seen


def test_schedules_by_hand(data):
    middle = [(step + 0.5) / 10 for step in range(10)]
    wanted = {
        'constant': [0.5] * 10,
        'linear': [0.5 * (1 - t) for t in middle],
        'cosine': [0.25 * (1 + math.cos(math.pi * t)) for t in middle],
        'steps': [0.5 if t < 0.5 else 0.05 if t < 0.75 else 0.005 for t in middle],
        'one cycle': [0.5 * min(t / 0.4, (1 - t) / 0.6) for t in middle],
    }
    assert wanted.keys() == training.SCHEDULES.keys()
    for name, values in wanted.items():
        assert rates(data, name) == pytest.approx(values)
        assert all(0 <= training.SCHEDULES[name](t) <= 1 for t in (0, 0.3, 1))
    assert rates(data, lambda done: done**2) == pytest.approx([0.5 * t**2 for t in middle])
    tensor = rates(data, 'linear', optimizer=lambda p: torch.optim.Adam(p, lr=torch.tensor(0.5)))
    assert tensor == pytest.approx(wanted['linear']), 'a learning rate may be a tensor'


def test_what_is_no_schedule(data):
    with pytest.raises(ValueError, match="no schedule 'slow'; there are 'constant'"):
        rates(data, 'slow')
    with pytest.raises(ValueError, match='no length'):
        fit(make_net(), iter([(data.x, data.y)]), epochs=1, schedule='linear', show_progress=False)


class Apart:
    "One loss for the first layer and another for the last."

    def groups(self, model):
        return {'first': model[1].parameters(), 'last': [*model[4].parameters()]}

    def loss(self, model, batch, step):
        loss = F.cross_entropy(model(batch.x), batch.y)
        return {'last': loss, 'first': -loss + model[1].weight.square().sum()}


def test_groups_equal_two_plain_optimizers(data):
    net = make_net()
    makers = {'first': lambda p: torch.optim.SGD(p, lr=0.1), 'last': lambda p: torch.optim.Adam(p, lr=0.01)}
    first, last = makers['first'](net[1].parameters()), makers['last'](net[4].parameters())
    for epoch in range(2):
        for x, y, _ in batches(data, 16, shuffle=epoch):
            grads = []
            for which in ('first', 'last'):
                net.zero_grad()
                loss = F.cross_entropy(net(x), y)
                (loss if which == 'last' else -loss + net[1].weight.square().sum()).backward()
                grads.append([p.grad.clone() for p in (net[1] if which == 'first' else net[4]).parameters()])
            for layer, found in zip((net[1], net[4]), grads, strict=True):
                for p, g in zip(layer.parameters(), found, strict=True):
                    p.grad = g
            first.step(), last.step()
    found = fit(make_net(), data, Apart(), epochs=2, batch_size=16, optimizer=makers, show_progress=False)
    assert torch.allclose(weights(found.model), weights(net), atol=1e-6)
    assert {'loss of first', 'loss of last'} < set(found.history[0])
    found.plot()


def test_one_loss_for_all_groups(data):
    class Together(Apart):
        def loss(self, model, batch, step):
            return F.cross_entropy(model(batch.x), batch.y)

    found, plain = (fit(make_net(), data, o, epochs=1, show_progress=False).model for o in (Together(), Standard()))
    assert torch.allclose(weights(found), weights(plain))


def test_groups_that_do_not_fit(data):
    class Twice(Apart):
        def groups(self, model):
            return {'first': model.parameters(), 'last': model[4].parameters()}

    class Half(Apart):
        def loss(self, model, batch, step):
            return {'first': super().loss(model, batch, step)['first']}

    quiet = {'epochs': 1, 'show_progress': False}
    with pytest.raises(ValueError, match="is in the groups 'first' and 'last'"):
        fit(make_net(), data, Twice(), **quiet)
    with pytest.raises(ValueError, match=r"losses for \['first'\], but its groups are \['first', 'last'\]"):
        fit(make_net(), data, Half(), **quiet)
    with pytest.raises(ValueError, match='optimizers for'):
        fit(make_net(), data, Apart(), optimizer={'first': torch.optim.SGD}, **quiet)
    with pytest.raises(TypeError, match='function of the parameters'):
        fit(make_net(), data, optimizer=torch.optim.SGD(make_net().parameters()), **quiet)
    with pytest.raises(ValueError, match='one number for a batch.* got float'):
        fit(make_net(), data, lambda model, batch, step: 0.5, **quiet)
    with pytest.raises(ValueError, match='take the mean'):
        fit(make_net(), data, lambda model, batch, step: model(batch.x), **quiet)


def test_gradients_that_an_objective_leaves_behind_do_not_count(data):
    def untidy(model, batch, step):
        model(batch.x).sum().backward()
        return Standard().loss(model, batch, step)

    found, plain = (fit(make_net(), data, o, epochs=1, show_progress=False).model for o in (untidy, Standard()))
    assert torch.equal(weights(found), weights(plain))
    assert all(p.grad is None for p in found.parameters())


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast(dtype, data):
    seen = []

    def watching(model, batch, step):
        with torch.no_grad():
            model(batch.x)  # a cast that must not be used again where gradients are wanted
        x_adv = training.attacked(PGD(0.1, steps=2), model, batch, step)
        assert x_adv.dtype == torch.float32 and (x_adv - batch.x).abs().max() <= 0.1 + 1e-6
        logits = model(x_adv)
        seen.append(logits.dtype)
        return F.cross_entropy(logits.float(), batch.y)

    found = fit(make_net(), data, watching, epochs=3, autocast=dtype, show_progress=False)
    assert set(seen) == {dtype} and all(p.dtype == torch.float32 for p in found.model.parameters())
    plain = fit(make_net(), data, Adversarial(PGD(0.1, steps=2)), epochs=3, show_progress=False)
    moved, wanted = (weights(r.model) - weights(make_net()) for r in (found, plain))
    assert F.cosine_similarity(moved, wanted, dim=0) > 0.9


def test_float16_losses_are_scaled(data):
    scales = []

    class Watching(Standard):
        def loss(self, model, batch, step):
            loss = super().loss(model, batch, step)
            loss.register_hook(lambda gradient: scales.append(float(gradient)))
            return loss * (torch.inf if step == 2 else 1)

    fit(make_net(), data, Watching(), epochs=1, batch_size=10, autocast=torch.float16, show_progress=False)
    assert scales[:2] == [2.0**16, 2.0**16] and scales[3] == 2.0**15, 'an overflow halves the scale'


# ------------------------------------------------------------------------------------------------- the choice of the epoch


def test_the_best_epoch_is_taken(data):
    accuracies = iter([0.5, 0.9, 0.9, 0.7])
    kept = []

    def fake(model, valid, attack):
        kept.append(weights(model).clone())
        return {'accuracy': next(accuracies)}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, '_measured', fake)
        found = fit(make_net(), data, epochs=4, valid=data, choose='accuracy', show_progress=False)
    assert found.epoch == 2 and torch.equal(weights(found.model), kept[1]), 'the first of the best'
    assert len(found.history) == 4


def test_robust_accuracy_is_measured_along_the_way(data):
    attack = PGD(0.2, steps=3)
    found = fit(make_net(), data, epochs=3, valid=data, valid_attack=attack, show_progress=False)
    right = 1 - attack.run(found.model, data.x, data.y).success.float().mean()
    assert found.history[-1]['robust'] == pytest.approx(float(right)) and found.epoch == 3
    assert found.history[-1]['accuracy'] == accuracy(found.model, data)
    found.plot()


@pytest.mark.parametrize(
    'how', [{'choose': 'accuracy'}, {'choose': 'robust', 'valid': 1}, {'valid_attack': PGD()}, {'choose': 'loss'}]
)
def test_a_choice_that_nothing_decides(how, data):
    how = how | ({'valid': data} if 'valid' in how else {})
    with pytest.raises(ValueError, match='needs valid='):
        fit(make_net(), data, epochs=1, show_progress=False, **how)


def test_seeds_give_other_networks_and_other_orders(data):
    from robustnb.models import build

    starts = [weights(build('digits_cnn', seed=seed)) for seed in range(5)]
    assert all(not torch.equal(a, b) for i, a in enumerate(starts) for b in starts[:i])
    orders = []

    def noting(model, batch, step):
        orders.append(tuple(batch.ids.tolist()))
        return Standard().loss(model, batch, step)

    for seed in range(3):
        fit(make_net(), data, noting, epochs=2, seed=seed, batch_size=50, show_progress=False)
    assert len(set(orders)) == 6, 'each seed and each epoch has an order of its own'


# ------------------------------------------------------------------------------------------------------------- bad inputs


def with_pixel(data, value: float) -> DataSet:
    x = data.x.clone()
    x[3, 0, 1, 1] = value
    return DataSet(x, data.y)


@pytest.mark.parametrize('objective', [Standard(), Adversarial(PGD(0.1, steps=1))], ids=['standard', 'adversarial'])
def test_bad_inputs_are_named(objective, data):
    def train(bad, **more):
        fit(make_net(), bad, objective, epochs=1, show_progress=False, **more)

    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match='NaN or infinity in 1 of the samples 0 to 49: 3'):
            train(with_pixel(data, value))
        with pytest.raises(ValueError, match='NaN or infinity in 1 of the samples 0 to 49: 3'):
            train(data, valid=with_pixel(data, value))
    with pytest.raises(TypeError, match=r'scale them to \[0, 1\]'):
        train(DataSet((data.x * 255).byte(), data.y))
    with pytest.raises(TypeError, match='labels are torch.float32; expected integer class indices'):
        train(DataSet(data.x, data.y.float()))
    with pytest.raises(ValueError, match=r'labels have shape \(50, 2\)'):
        train(DataSet(data.x, F.one_hot(data.y, 2)))
    with pytest.raises(ValueError, match='labels run from 1 to 2, the model knows 0 to 1'):
        train(DataSet(data.x, data.y + 1))
    with pytest.raises(ValueError, match='labels run from -1 to 0'):
        train(DataSet(data.x, data.y - 1))
    train(DataSet(data.x, data.y.int()))
    train(DataSet(data.x.double(), data.y))


@pytest.mark.parametrize('how', [{'epochs': -1}, {'batch_size': 0}, {'every': 0}, {'every': -2}])
def test_numbers_that_count_nothing(how, data):
    with pytest.raises(ValueError, match=f'`{next(iter(how))}` is a whole number, at least'):
        fit(make_net(), data, **how)


def test_other_arguments_that_teach(data, tmp_path):
    quiet = {'epochs': 1, 'show_progress': False}
    with pytest.raises(TypeError):
        fit(make_net(), data, epochs=2.5)
    with pytest.raises(ValueError, match='autocast= is torch.bfloat16, torch.float16 or None'):
        fit(make_net(), data, autocast=True, **quiet)
    with pytest.raises(ValueError, match="no loss 'cross'; there are 'ce'"):
        fit(make_net(), data, Standard('cross'), **quiet)
    with pytest.raises(ValueError, match='validation data are empty'):
        fit(make_net(), data, valid=data[:0], choose='accuracy', **quiet)
    with pytest.raises(ValueError, match='validation data are empty'):
        fit(make_net(), data, valid=iter([]), **quiet)
    with pytest.raises(IsADirectoryError, match='is a folder; checkpoint= names a file'):
        fit(make_net(), data, checkpoint=tmp_path, **quiet)
    with pytest.raises(ValueError, match='depends on no parameter that is trained'):
        fit(make_net().requires_grad_(False), data, **quiet)
    with pytest.raises(ValueError, match='no epoch was finished'):
        fit(make_net(), data, epochs=0, show_progress=False).plot()


def test_tensors_of_inference_mode(data):
    with torch.inference_mode():
        inside = [(data.x * 1, data.y * 1)]
        found = fit(make_net(), inside, epochs=1, show_progress=False).model
    assert torch.equal(weights(found), weights(fit(make_net(), [(data.x, data.y)], epochs=1, show_progress=False).model))
    assert inside[0][0].is_inference()


def test_an_interruption_while_validating_ends_the_training(data):
    left = [2]

    def late(model, x, y):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return x

    valid = [(data.x, data.y)] * 3  # the second batch is interrupted: what `evaluate` has by then is not the accuracy
    found = fit(make_net(), data, epochs=3, valid=valid, valid_attack=late, show_progress=False)
    assert found.interrupted and not found.history


# ------------------------------------------------------------------------------------------- frozen groups, half precision


@pytest.mark.parametrize('autocast', [None, torch.float16, torch.bfloat16])
def test_groups_may_be_frozen_or_without_a_gradient(autocast, data):
    class Unused(Apart):
        def loss(self, model, batch, step):
            loss = F.cross_entropy(model(batch.x).detach() + model[4].bias, batch.y)
            return {'first': loss, 'last': loss}

    frozen = make_net()
    frozen[1].requires_grad_(False)
    for net, objective in ((frozen, Apart()), (make_net(), Unused())):
        found = fit(net, data, objective, epochs=1, autocast=autocast, show_progress=False).model
        assert torch.equal(found[1].weight, net[1].weight) and not torch.equal(found[4].bias, net[4].bias)


def test_the_mean_loss_of_a_network_in_half_precision(data):
    many = DataSet(data.x.repeat(40, 1, 1, 1), data.y.repeat(40))
    found = fit(make_net().bfloat16(), many, epochs=1, batch_size=2, show_progress=False,
                optimizer=lambda p: torch.optim.SGD(p, lr=0.0))  # fmt: skip
    assert found.history[0]['loss'] == pytest.approx(F.cross_entropy(make_net()(data.x), data.y).item(), rel=1e-2)


def test_samplers_are_told_the_epoch(data):
    from torch.utils.data.distributed import DistributedSampler

    seen = []

    def noting(model, batch, step):
        seen.append(batch.x.sum().item())
        return Standard().loss(model, batch, step)

    fit(make_net(), DataLoader(data, 25, sampler=DistributedSampler(data, 1, 0)), noting, epochs=2, show_progress=False)
    assert seen[:2] != seen[2:], 'each epoch has an order of its own'


def test_a_step_costs_little_more_than_that_of_a_plain_loop():
    import time

    x, y = torch.rand(2400, 16), torch.arange(2400) % 2

    def net():
        return nn.Sequential(*(nn.Linear(16, 16) for _ in range(6)), nn.Linear(16, 2))

    def plain():
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for batch in batches((x, y), 8, shuffle=0):
            optimizer.zero_grad()
            F.cross_entropy(model(batch.x), batch.y).backward()
            optimizer.step()

    def ours():
        fit(net(), (x, y), epochs=1, batch_size=8, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), show_progress=False)

    def seconds(work):
        start = time.process_time()
        work()
        return time.process_time() - start

    with torch.random.fork_rng():
        assert min(seconds(ours) / seconds(plain) for _ in range(3)) < 2


# ------------------------------------------------------------------------------------------- objectives that learn


class Teacher:
    "A running mean of the weights, to which the network is drawn."

    def setup(self, model):
        self.mean = [p.detach().clone() for p in model.parameters()]

    def loss(self, model, batch, step):
        pull = sum((p - m).square().sum() for p, m in zip(model.parameters(), self.mean, strict=True))
        return F.cross_entropy(model(batch.x), batch.y) + pull

    def after_step(self, model):
        for m, p in zip(self.mean, model.parameters(), strict=True):
            m.lerp_(p.detach(), 0.1)


def test_an_objective_learns_in_a_copy_that_comes_back(data):
    objective = Teacher()
    found = fit(make_net(), data, objective, epochs=2, show_progress=False)
    assert vars(objective) == {}, 'that of the caller stays as it is'
    mean = torch.cat([m.flatten() for m in found.objective.mean])
    assert not torch.equal(mean, weights(make_net())) and not torch.equal(mean, weights(found.model))
    assert torch.equal(weights(fit(make_net(), data, objective, epochs=2, show_progress=False).model), weights(found.model))


def test_an_objective_that_holds_the_model_holds_the_copy(data):
    class Holding(Standard):
        pass

    net, objective = make_net(), Holding()
    object.__setattr__(objective, 'layer', net[1])
    found = fit(net, data, objective, epochs=1, show_progress=False)
    assert found.objective.layer is found.model[1] and objective.layer is net[1]


def test_an_objective_that_cannot_be_copied_is_used_as_it_is(data):
    class Random(Standard):
        pass

    objective = Random()
    object.__setattr__(objective, 'lock', threading.Lock())
    assert fit(make_net(), data, objective, epochs=1, show_progress=False).objective is objective


def test_what_an_objective_learns_and_does_not_keep_is_told(data, tmp_path, caplog):
    fit(make_net(), data, Teacher(), epochs=1, checkpoint=tmp_path / 'a', show_progress=False)
    assert 'has no state_dict() that says how' in caplog.text
    caplog.clear()

    class Kept(Teacher):
        def state_dict(self):
            return {'mean': self.mean}

        def load_state_dict(self, state):
            self.mean = state['mean']

    for objective in (Kept(), Standard(), Adversarial(PGD(0.1, steps=1)), Apart()):
        fit(make_net(), data, objective, epochs=1, checkpoint=tmp_path / type(objective).__name__, show_progress=False)
    assert 'state_dict' not in caplog.text


def test_of_equally_robust_epochs_the_more_accurate_one_is_taken(data):
    measured = iter([{'accuracy': a, 'robust': r} for a, r in ((0.5, 0.0), (0.9, 0.0), (0.8, 0.0), (0.9, 0.0))])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, '_measured', lambda *_: next(measured))
        found = fit(make_net(), data, epochs=4, valid=data, valid_attack=PGD(), choose='robust', show_progress=False)
    assert found.epoch == 2


def test_more_words(data, tmp_path):
    quiet = {'epochs': 1, 'show_progress': False}

    class Listed(Apart):
        def groups(self, model):
            return [model.parameters()]

    with pytest.raises(TypeError, match='a dictionary, name of a group'):
        fit(make_net(), data, Listed(), **quiet)
    with pytest.raises(ValueError, match='has no groups; give one optimizer'):
        fit(make_net(), data, optimizer={'all': torch.optim.SGD}, **quiet)
    for schedule in (torch.optim.lr_scheduler.CosineAnnealingLR, partial(torch.optim.lr_scheduler.StepLR, step_size=1)):
        with pytest.raises(TypeError, match="'cosine' is CosineAnnealingLR"):
            fit(make_net(), data, schedule=schedule, **quiet)
    fit(make_net(), data, checkpoint=tmp_path / 'run', **quiet)
    with pytest.raises(ValueError, match='build the model with a seed'):
        fit(nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Dropout(0.0), nn.Linear(8, 2)), data,
            checkpoint=tmp_path / 'run', **quiet)  # fmt: skip


def test_one_regularizer_needs_no_tuple(data):
    batch = Batch(data.x[:8], data.y[:8], torch.arange(8))

    def half(model, batch, x_adv, step):
        return torch.tensor(0.5)

    one, several = (Standard(regularizers=r).loss(make_net(), batch, 0) for r in (half, (half, half)))
    assert torch.allclose(one + 0.5, several)
