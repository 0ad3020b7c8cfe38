"""Training: objectives against plain loops, seeds, interruptions, and the networks that travel with the package."""

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
