"""Two processes with gloo train the network that one process trains with the doubled batch.

This file is also the script that the processes run.
"""

import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from robustnb import training
from robustnb.attacks import PGD
from robustnb.checkpoints import load_state, save_state
from robustnb.data import DataSet
from robustnb.devices import seeded
from robustnb.distributed import joined, rank
from robustnb.training import Adversarial, Standard, fit

SGD = partial(torch.optim.SGD, lr=0.2, momentum=0.9)


def make_data(n: int = 61) -> DataSet:
    x = torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    return DataSet(x, (x.flatten(1).mean(1) > 0.5).long(), ('dark', 'bright'))


def make_net(*between) -> nn.Sequential:
    with seeded(0):
        return nn.Sequential(nn.Conv2d(1, 4, 3), *between, nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))


class Two:
    "Two groups with losses of their own."

    def groups(self, model):
        return {'features': model[0].parameters(), 'head': model[-1].parameters()}

    def loss(self, model, batch, step):
        loss = F.cross_entropy(model(batch.x), batch.y)
        return {'features': 2 * loss, 'head': loss}


CASES = {
    'standard': {'optimizer': SGD, 'schedule': 'cosine'},
    'adversarial': {'objective': Adversarial(PGD(0.1, steps=3)), 'optimizer': SGD},
    'groups': {'objective': Two(), 'optimizer': SGD},
    'chosen': {'optimizer': SGD, 'valid_attack': PGD(0.1, steps=2), 'choose': 'robust'},
}


def trained(case: str, batch_size: int, **more):
    how = {'epochs': 3, 'seed': 1, 'show_progress': False, 'batch_size': batch_size, 'valid': make_data(37)} | CASES[case]
    return fit(make_net(), make_data(), **how | more)


def flat(model) -> torch.Tensor:
    return torch.cat([v.detach().double().flatten() for v in model.state_dict().values()])


def resumed(folder: Path) -> list:
    "A training with dropout and batch norm, interrupted in the middle of its second epoch, and the same without."
    net, path = make_net(nn.BatchNorm2d(4), nn.Dropout(0.2)), folder / 'checkpoint'
    how = {'epochs': 3, 'batch_size': 8, 'seed': 2, 'every': 2, 'show_progress': False}
    straight = fit(net, make_data(), checkpoint=folder / 'whole', **how)
    take = training._Trainer.__call__

    def impatient(self, *args):
        if self.step == 7:
            raise KeyboardInterrupt
        return take(self, *args)

    training._Trainer.__call__ = impatient
    try:
        fit(net, make_data(), checkpoint=path, **how)
    except KeyboardInterrupt:
        stopped = load_state(path)['step']
    training._Trainer.__call__ = take
    if rank():  # only the start of the first process counts
        net = make_net(nn.BatchNorm2d(4), nn.Dropout(0.2)).requires_grad_(True)
        with torch.no_grad():
            net[0].weight += 1
    again = fit(net, make_data(), checkpoint=path, **how)
    losses = [[entry['loss'] for entry in result.history] for result in (straight, again)]
    return [stopped, flat(straight.model), flat(again.model), *losses]


def sampled():
    "A loader that divides the data by itself."
    data = make_data(64)
    pairs = TensorDataset(data.x, data.y)
    return fit(make_net(), DataLoader(pairs, 8, sampler=DistributedSampler(pairs, shuffle=False)), epochs=2, optimizer=SGD,
               show_progress=False)  # fmt: skip


class Drawn(Standard):
    "An objective that draws something in its set-up."

    def setup(self, model):
        object.__setattr__(self, 'target', model[0].weight.detach() + torch.rand(4, 1, 3, 3))


def drawn() -> torch.Tensor:
    "What the objective has built, from a network that each process starts with other weights."
    with seeded(rank()):
        net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    return fit(net, make_data(), Drawn(), epochs=1, show_progress=False).objective.target


def refused(data, **how) -> str:
    try:
        fit(make_net(), data, epochs=1, show_progress=False, **how)
    except ValueError as error:
        return str(error)
    return ''


def work(folder: Path) -> None:
    "What each of the two processes does."
    torch.set_num_threads(1)
    with joined('cpu'):
        found = {}
        for case in CASES:
            result = trained(case, 8)
            found[case] = {'weights': flat(result.model), 'history': json.dumps(result.history), 'epoch': result.epoch}
        found['resumed'] = resumed(folder)
        found['sampled'] = flat(sampled().model)
        found['teacher'] = drawn()
        found['few'] = refused(make_data(1))
        pairs = [(make_data(8).x, make_data(8).y)]
        found['uneven'] = refused(pairs * (2 + rank()))
        save_state(folder / f'found{rank()}', found)


@pytest.fixture(scope='module')
def both(in_two_processes):
    return [load_state(in_two_processes / f'found{i}') for i in (0, 1)]


@pytest.mark.parametrize('case', CASES)
def test_two_processes_equal_one_with_the_doubled_batch(case, both):
    one = trained(case, 16)
    first, second = (process[case] for process in both)
    assert torch.equal(first['weights'], second['weights']), 'both processes end with the same bits'
    assert torch.allclose(first['weights'], flat(one.model), atol=1e-5)
    assert not torch.allclose(flat(one.model), flat(make_net()), atol=1e-2), 'it has learnt something'
    assert first['epoch'] == second['epoch'] == one.epoch
    for here, there in zip(json.loads(first['history']), one.history, strict=True):
        assert here.keys() == there.keys()
        assert here['loss' if 'loss' in here else 'loss of head'] == pytest.approx(
            there['loss' if 'loss' in there else 'loss of head'], abs=1e-5)  # fmt: skip
        assert here['accuracy'] == pytest.approx(there['accuracy'], abs=1e-9), 'shares of the validation data add up'


def test_two_processes_go_on_together(both):
    for stopped, straight, again, *losses in (process['resumed'] for process in both):
        assert stopped == 6 and torch.equal(straight, again)
        assert losses[0] == losses[1], 'each process goes on with its own sums'
    assert torch.equal(both[0]['resumed'][1], both[1]['resumed'][1])


def test_a_loader_divides_by_itself(both):
    data = make_data(64)
    order = torch.arange(64).view(-1, 8, 2).transpose(1, 2).flatten()  # as DistributedSampler deals: 0, 2, 4 ... and 1, 3, 5 ...
    one = fit(make_net(), [(data.x[rows], data.y[rows]) for rows in order.view(-1, 16)], epochs=2, optimizer=SGD,
              show_progress=False)  # fmt: skip
    assert torch.equal(both[0]['sampled'], both[1]['sampled'])
    assert torch.allclose(both[0]['sampled'], flat(one.model), atol=1e-5)


def test_objectives_are_set_up_alike(both):
    assert torch.equal(both[0]['teacher'], both[1]['teacher'])


def test_what_processes_cannot_share(both):
    assert all('1 samples cannot be shared by 2 processes' in process['few'] for process in both)
    assert all('a loader needs a length, and the same one' in process['uneven'] for process in both)


def test_objectives_work_on_wrapped_models(tmp_path):
    "Somebody else's loop, with PyTorch's own wrapper."
    torch.distributed.init_process_group('gloo', store=torch.distributed.FileStore(str(tmp_path / 'store')), rank=0, world_size=1)
    try:
        net, plain, batch = make_net(), make_net(), next(iter(training.batches(make_data(), 16)))
        wrapped = nn.parallel.DistributedDataParallel(net)
        for objective in (Standard(), Adversarial(PGD(0.1, steps=3)), Adversarial(PGD(0.1, steps=3), clean_weight=0.5)):
            for model in (wrapped, plain):
                model.zero_grad()
                objective.loss(model, batch, 0).backward()
            for a, b in zip(net.parameters(), plain.parameters(), strict=True):
                assert torch.allclose(a.grad, b.grad, atol=1e-6)
    finally:
        torch.distributed.destroy_process_group()


if __name__ == '__main__':
    work(Path(sys.argv[1]))
