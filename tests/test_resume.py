"""A training that was interrupted, or killed, ends as if it had not been: the same bits."""

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from interruptions import stop_at
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from robustnb.attacks import PGD
from robustnb.checkpoints import load_state, save_state
from robustnb.data import DataSet
from robustnb.defences import WeightSize
from robustnb.devices import seeded
from robustnb.training import Adversarial, Standard, fit


def make_data(n: int = 50) -> DataSet:
    x = torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    return DataSet(x, (x.flatten(1).mean(1) > 0.5).long(), ('dark', 'bright'))


def make_net() -> nn.Sequential:
    with seeded(0):
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(16, 2)
        )


def outcome(result) -> list:
    "Everything about a trained network that has to be the same."
    history = [{k: v for k, v in entry.items() if k != 'seconds'} for entry in result.history]
    return [history, result.epoch, *(v.numpy().tobytes() for v in result.model.state_dict().values())]


class Averaged:
    "Standard training that also keeps a running mean of the weights and pulls towards it: an objective with a memory."

    def setup(self, model):
        self.mean = [p.detach().clone() for p in model.parameters()]

    def loss(self, model, batch, step):
        pull = sum((p - m).square().sum() for p, m in zip(model.parameters(), self.mean, strict=True))
        return F.cross_entropy(model(batch.x), batch.y) + 0.1 * pull

    def after_step(self, model):
        for m, p in zip(self.mean, model.parameters(), strict=True):
            m.lerp_(p.detach(), 0.1)

    def state_dict(self):
        return {'mean': self.mean}

    def load_state_dict(self, state):
        self.mean = state['mean']


class Two:
    "Two groups with losses of their own."

    def groups(self, model):
        return {'features': model[0].parameters(), 'head': model[5].parameters()}

    def loss(self, model, batch, step):
        loss = F.cross_entropy(model(batch.x), batch.y)
        return {'features': loss + 0.1 * model[0].weight.square().sum(), 'head': 2 * loss}


SGD, ADAM = partial(torch.optim.SGD, lr=0.1, momentum=0.9), partial(torch.optim.AdamW, lr=1e-2, amsgrad=True)
HOW = {
    'plain': {},
    'sgd, linear': {'optimizer': SGD, 'schedule': 'linear'},
    'amsgrad, chosen': {'optimizer': ADAM, 'schedule': 'cosine', 'choose': 'accuracy'},
    'adversarial': {'objective': Adversarial(PGD(0.1, steps=2)), 'choose': 'robust', 'valid_attack': PGD(0.1, steps=3)},
    'own state': {'objective': Averaged()},
    'groups': {'objective': Two(), 'optimizer': {'features': SGD, 'head': ADAM}, 'schedule': 'steps'},
    'float16': {'autocast': torch.float16},
    'bfloat16': {'autocast': torch.bfloat16, 'objective': Adversarial(PGD(0.1, steps=2))},
    'momentum of a group': {'optimizer': partial(torch.optim.RMSprop, momentum=0.5)},
}


@pytest.mark.parametrize('every', [None, 3])
@pytest.mark.parametrize('how', HOW)
def test_an_interruption_leaves_no_trace(how, every, monkeypatch, tmp_path):
    data, how = make_data(), HOW[how]
    how = {'epochs': 4, 'batch_size': 8, 'seed': 5, 'valid': data, 'show_progress': False, 'every': every} | how
    straight = fit(make_net(), data, **how)
    path = tmp_path / 'run.safetensors'
    with monkeypatch.context() as patch:
        stop_at(patch, 18)
        stopped = fit(make_net(), data, checkpoint=path, **how)
    assert stopped.interrupted and len(stopped.history) == 2
    assert load_state(path)['step'] == (14 if every is None else 17)
    torch.rand(3)  # what happens in between does not matter
    resumed = fit(make_net(), data, checkpoint=path, **how)
    assert outcome(resumed) == outcome(straight) and not resumed.interrupted
    assert outcome(fit(make_net(), data, checkpoint=path, **how)) == outcome(straight), 'nothing is left to do'


def loader(kind: str):
    data = make_data()
    pairs = TensorDataset(data.x, data.y)
    if kind == 'own generator':
        return DataLoader(pairs, 8, shuffle=True, generator=torch.Generator().manual_seed(3))
    if kind == 'sampler':
        generator = torch.Generator().manual_seed(3)
        return DataLoader(pairs, 8, sampler=torch.utils.data.RandomSampler(pairs, generator=generator))
    if kind == 'list':
        return [(data.x[:20], data.y[:20]), (data.x[20:], data.y[20:])] * 3
    if kind == 'batch sampler':
        mixed = torch.utils.data.RandomSampler(pairs, generator=torch.Generator().manual_seed(3))
        return DataLoader(pairs, batch_sampler=torch.utils.data.BatchSampler(mixed, 8, False))
    if kind == 'persistent workers':
        return DataLoader(pairs, 8, shuffle=True, num_workers=1, persistent_workers=True)
    return DataLoader(pairs, 8, shuffle=True)


@pytest.mark.parametrize('every', [None, 3])
@pytest.mark.parametrize(
    'kind', ['own generator', 'sampler', 'batch sampler', 'persistent workers', 'list', 'global generator']
)
def test_loaders_go_on_too(kind, every, monkeypatch, tmp_path):
    how = {'epochs': 3, 'every': every, 'show_progress': False}
    straight = fit(make_net(), loader(kind), **how)
    with monkeypatch.context() as patch:
        stop_at(patch, 11)
        fit(make_net(), loader(kind), checkpoint=tmp_path / 'run', **how)
    assert outcome(fit(make_net(), loader(kind), checkpoint=tmp_path / 'run', **how)) == outcome(straight)


class Centred(nn.Module):
    "Takes off a running mean that its `state_dict` leaves out, and keeps a count that is no tensor."

    def __init__(self):
        super().__init__()
        self.register_buffer('mean', torch.zeros(4, 1, 1), persistent=False)
        self.calls = 0

    def get_extra_state(self):
        return {'calls': self.calls}

    def set_extra_state(self, state):
        self.calls = state['calls']

    def forward(self, x):
        if self.training:
            self.calls += 1
            self.mean.mul_(0.5).add_(x.detach().mean((0, 2, 3))[:, None, None], alpha=0.5)
        return x - self.mean / self.calls if self.calls else x


@pytest.mark.parametrize('every', [None, 3])
def test_all_that_a_model_holds_goes_on(every, monkeypatch, tmp_path):
    def net():
        with seeded(0):
            return nn.Sequential(nn.Conv2d(1, 4, 3), Centred(), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))

    how = {'epochs': 4, 'batch_size': 8, 'valid': make_data(), 'choose': 'accuracy', 'every': every, 'show_progress': False}
    straight = fit(net(), make_data(), **how)
    with monkeypatch.context() as patch:
        stop_at(patch, 18)
        fit(net(), make_data(), checkpoint=tmp_path / 'run', **how)
    resumed = fit(net(), make_data(), checkpoint=tmp_path / 'run', **how)
    for one, other in zip(straight.model.state_dict().values(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    assert torch.equal(straight.model[1].mean, resumed.model[1].mean) and straight.epoch == resumed.epoch
    with torch.no_grad():
        right = (resumed.model(make_data().x).argmax(1) == make_data().y).float().mean()
    assert float(right) == pytest.approx(resumed.history[resumed.epoch - 1]['accuracy']), 'the best buffers came back too'


def test_the_order_of_validation_data_goes_on(monkeypatch, tmp_path):
    def noting(model, x, y):
        return x + (0.5 * (torch.arange(len(x)) % 3 == 0))[:, None, None, None]  # depends on the place in the batch

    def how():
        return {'epochs': 4, 'batch_size': 8, 'valid': loader('own generator'), 'valid_attack': noting, 'show_progress': False}

    straight = fit(make_net(), make_data(), **how())
    with monkeypatch.context() as patch:
        stop_at(patch, 18)
        fit(make_net(), make_data(), checkpoint=tmp_path / 'run', **how())
    assert outcome(fit(make_net(), make_data(), checkpoint=tmp_path / 'run', **how())) == outcome(straight)


def test_nothing_moves_where_nothing_is_left_to_do(tmp_path):
    import random

    how = {'epochs': 1, 'checkpoint': tmp_path / 'run', 'show_progress': False}
    fit(make_net(), make_data(), **how)
    before = random.getstate()
    random.random()
    moved, bits = random.getstate(), torch.get_rng_state()
    fit(make_net(), make_data(), **how)
    assert random.getstate() == moved and torch.equal(torch.get_rng_state(), bits)
    random.setstate(before)


def test_transforms_that_use_the_generators_of_python_and_numpy(monkeypatch, tmp_path):
    import random

    import numpy as np

    class Noisy(TensorDataset):
        def __getitem__(self, i):
            x, y = super().__getitem__(i)
            return x * random.random() + float(np.random.rand()) * torch.rand(()), y

    def started():
        random.seed(1), np.random.seed(2)
        data = make_data()
        return Noisy(data.x, data.y)

    before = random.getstate(), np.random.get_state()
    how = {'epochs': 3, 'batch_size': 8, 'every': 2, 'show_progress': False}
    straight = fit(make_net(), started(), **how)
    with monkeypatch.context() as patch:
        stop_at(patch, 11)
        fit(make_net(), started(), checkpoint=tmp_path / 'run', **how)
    assert outcome(fit(make_net(), started(), checkpoint=tmp_path / 'run', **how)) == outcome(straight)
    random.setstate(before[0]), np.random.set_state(before[1])


def test_more_epochs_go_on_and_fewer_are_refused(tmp_path):
    data, how = make_data(), {'checkpoint': tmp_path / 'run', 'show_progress': False}
    fit(make_net(), data, epochs=2, **how)
    more = fit(make_net(), data, epochs=4, **how)
    assert outcome(more) == outcome(fit(make_net(), data, epochs=4, show_progress=False))
    with pytest.raises(ValueError, match='4 epochs behind it, and epochs=3'):
        fit(make_net(), data, epochs=3, **how)
    cosine = {'checkpoint': tmp_path / 'other', 'schedule': 'cosine', 'show_progress': False}
    fit(make_net(), data, epochs=2, **cosine)
    with pytest.raises(ValueError, match=r'another epochs \(2, now 4\)'):
        fit(make_net(), data, epochs=4, **cosine)


@pytest.mark.parametrize(
    'change',
    [
        {'batch_size': 16},
        {'seed': 1},
        {'objective': Adversarial(PGD(0.1, steps=1))},
        {'optimizer': SGD},
        {'schedule': 'linear'},
        {'autocast': torch.bfloat16},
        {'valid': make_data(20)},
        {'data': make_data(49)},
        {'model': nn.Sequential(nn.Flatten(), nn.Linear(16, 2))},
        {'objective': lambda model, batch, step: F.cross_entropy(model(batch.x), batch.y)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_file_is_not_taken_up_by_another_training(change, tmp_path):
    how = {'model': make_net(), 'data': make_data(), 'epochs': 1, 'checkpoint': tmp_path / 'run', 'show_progress': False}
    fit(**how)
    before = (tmp_path / 'run').read_bytes()
    with pytest.raises(ValueError, match='belongs to another training, with another'):
        fit(**how | change)
    assert (tmp_path / 'run').read_bytes() == before


def test_the_refusal_names_the_setting_of_one_of_several_regularizers(tmp_path):
    how = {'model': make_net(), 'data': make_data(), 'epochs': 1, 'checkpoint': tmp_path / 'run', 'show_progress': False}
    fit(**how, objective=Standard(regularizers=(WeightSize(), WeightSize(power=1))))
    with pytest.raises(ValueError, match=r'with another objective regularizers 1 .*power \(1, now 2\)'):
        fit(**how, objective=Standard(regularizers=(WeightSize(), WeightSize(power=2))))


class Weighted:
    "An objective that is no dataclass."

    def __init__(self, weight: float):
        self.weight, self.seen = weight, 0

    def loss(self, model, batch, step):
        self.seen += 1
        return self.weight * F.cross_entropy(model(batch.x), batch.y)

    def state_dict(self):
        return {'seen': self.seen}

    def load_state_dict(self, state):
        self.seen = state['seen']


def frozen() -> nn.Sequential:
    net = make_net()
    net[0].requires_grad_(False)
    return net


def still() -> nn.Sequential:
    net = make_net()
    net[1].eval()
    return net


def pairs(n: int = 50, add: float = 0) -> TensorDataset:
    return TensorDataset(make_data(n).x + add, make_data(n).y)


@pytest.mark.parametrize(
    ('first', 'then', 'words'),
    [
        ({'objective': Weighted(1)}, {'objective': Weighted(2)}, r'another objective weight \(1, now 2\)'),
        ({}, {'model': frozen()}, r"frozen parts \(\[\], now \['0.weight', '0.bias'\]\)"),
        ({}, {'model': still()}, r"frozen parts \(\[\], now \['1'\]\)"),
        ({'data': DataLoader(pairs(), 10)}, {'data': DataLoader(pairs(), 25)}, r'data batches \(5, now 2\)'),
        ({'data': DataLoader(pairs(), 10)}, {'data': DataLoader(pairs(), 10, shuffle=True)}, 'data samplers'),
        ({'data': pairs()}, {'data': pairs(add=0.1)}, 'data tensors'),
        ({'data': DataLoader(pairs(), 10)}, {'data': DataLoader(pairs(add=0.1), 10)}, 'data of tensors'),
        (
            {'data': DataLoader(pairs(), 10, shuffle=True)},
            {'data': DataLoader(pairs(), 10, shuffle=True, generator=torch.Generator())},
            r'generators \(0, now 1\)',
        ),
    ],
    ids=['objective', 'frozen', 'evaluation mode', 'batches', 'order', 'tensors', 'loaded tensors', 'generator'],
)
def test_what_else_makes_another_training(first, then, words, tmp_path):
    how = {'model': make_net(), 'data': make_data(), 'epochs': 1, 'checkpoint': tmp_path / 'run', 'show_progress': False}
    fit(**how | first)
    fit(**how | first)  # also with an objective that has counted meanwhile
    with pytest.raises(ValueError, match=words):
        fit(**how | first | then)


def test_what_is_no_checkpoint(tmp_path):
    path = tmp_path / 'run'
    path.write_bytes(b'nothing of the kind')
    with pytest.raises(ValueError, match='run'):
        fit(make_net(), make_data(), epochs=1, checkpoint=path, show_progress=False)
    save_state(path, {'step': 3})
    with pytest.raises(ValueError, match='is no checkpoint of `fit`'):
        fit(make_net(), make_data(), epochs=1, checkpoint=path, show_progress=False)


def test_an_interruption_in_the_first_epoch_leaves_no_file(monkeypatch, tmp_path):
    stop_at(monkeypatch, 2)
    assert fit(make_net(), make_data(), checkpoint=tmp_path / 'run', batch_size=8, show_progress=False).interrupted
    assert not list(tmp_path.iterdir())


def slow_training(path: Path, **more):
    "A training of some seconds, for killing."
    return fit(
        make_net(), make_data(160), Adversarial(PGD(0.1, steps=2)), epochs=4, batch_size=8, schedule='cosine', every=4,
        checkpoint=path, valid=make_data(40), choose='accuracy', show_progress=False, **more,
    )  # fmt: skip


def killed_again_and_again(path: Path) -> None:
    "Start the training in a process that is killed after a while, until it comes to its end; count the starts."
    starts, patience = 0, 0.25
    while True:
        starts += 1
        child = os.fork()
        if not child:
            signal.setitimer(signal.ITIMER_REAL, patience)  # nobody handles the alarm: made into a kill below
            signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            save_state(path.with_name('result'), {'outcome': [v for v in slow_training(path).model.state_dict().values()]})
            os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            break
        patience *= 1.15
    print(starts)


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='this system has no fork')
def test_killed_again_and_again(tmp_path):
    environment = os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(Path(__file__).parent)}
    found = subprocess.run(
        [sys.executable, __file__, str(tmp_path / 'run')], env=environment, capture_output=True, text=True, timeout=300
    )
    assert found.returncode == 0, found.stderr
    assert int(found.stdout) > 2, 'it was killed at least twice'
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    straight = slow_training(None).model.state_dict()
    torch.set_num_threads(threads)
    for a, b in zip(load_state(tmp_path / 'result')['outcome'], straight.values(), strict=True):
        assert torch.equal(a, b)
    assert len(list(tmp_path.glob('run'))) == 1


if __name__ == '__main__':
    torch.set_num_threads(1)
    killed_again_and_again(Path(sys.argv[1]))
