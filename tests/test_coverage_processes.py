"""Two processes with gloo assess a test suite as one process does: each takes its share, and what they find is put together.

The network and the images are such that every sum is exact in floating point, whatever the order and the size of the
batches. So what is counted has to agree to the last bit. This file is also the script that the processes run.
"""

import json
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from robustnb.coverage import CC, CRITERIA, KMNC, NBC, NC, NLC, SNAC, TKNC, TKNP, Coverage, assess
from robustnb.distributed import joined, rank
from robustnb.surprise import DSC, LSC, MDSC

EVERY = {
    'NC': NC(),
    'NC raw': NC(1.0, scale=None),
    'KMNC': KMNC(50),
    'NBC': NBC(),
    'NBC sigma': NBC(0.5, strict=False),
    'SNAC': SNAC(),
    'TKNC': TKNC(3),
    'TKNP': TKNP(3),
    'TKNP ordered': TKNP(3, ordered=True),
    'NLC': NLC(),
    'LSC': LSC(upper=50.0),
    'LSC minimum': LSC(upper=50.0, convention='minimum'),
    'DSC': DSC(),
    'DSC limit': DSC(limit=40, seed=1),
    'DSC label': DSC(by='label'),
    'MDSC': MDSC(),
    'MDSC label': MDSC(by='label', convention='width', width=0.5),
}
COUNTED = [name for name in EVERY if name.split()[0] not in ('NLC', 'LSC', 'DSC', 'MDSC')]


def net() -> nn.Sequential:
    "Whole numbers as weights, and maps of 16 places: no rounding anywhere."
    g = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 8), nn.ReLU(), nn.Linear(8, 3))
    for p in net.parameters():
        p.data = torch.randint(-3, 4, p.shape, generator=g).float()
    return net


def data(n: int, seed: int, third: range | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    "`n` images in steps of 1/16, of three classes. The third one stands in `third` only, if that is given."
    g = torch.Generator().manual_seed(seed)
    x, number = torch.randint(0, 17, (n, 1, 6, 6), generator=g) / 16, torch.arange(n)
    if third is None:
        return x, number % 3
    return x, torch.where((number >= third.start) & (number < third.stop), 2, number % 2)


# name -> (training data, suite). With batches of 8, the first process takes 0 to 7, the second 8 to 15, and so on.
CASES = {
    'even': (data(96, 0), data(64, 1)),
    'uneven': (data(61, 0), data(37, 1)),
    'one sample': (data(61, 0), data(1, 1)),
    'one training sample': (data(1, 0), data(37, 1)),
    'a class that one process sees': (data(61, 0, range(0, 8)), data(37, 1, range(8, 16))),
    'a class without training data': (data(61, 0, range(0, 0)), data(37, 1)),
}


def criteria_of(case: str) -> dict:
    "All of them; a single training sample has no spread and no other class to compare with."
    return {name: criterion for name, criterion in EVERY.items() if case != 'one training sample' or name in [*COUNTED, 'NLC']}


@cache
def assessed(case: str, batch_size: int) -> dict:
    "Value, how much is covered, and out of how much, for each criterion; and the number of samples."
    train, suite = CASES[case]
    found = assess(net(), train, {'suite': suite}, criteria_of(case), batch_size=batch_size, show_progress=False).dataset
    numbers = {name: [float(found[which].sel(suite='suite', criterion=name)) for which in ('value', 'covered', 'total')]
               for name in found['criterion'].values.tolist()}  # fmt: skip
    return numbers | {'samples': int(found['samples'][0])}


def clusters() -> list[dict]:
    "Cluster coverage, twice, and how many vectors of each layer are stored."
    found = []
    for _ in range(2):
        coverage = Coverage(net(), CC(20.0), batch_size=8, show_progress=False)
        coverage.update(CASES['uneven'][1]).gather()
        found.append(coverage.compute() | {name: len(rows) for name, rows in coverage.criteria['CC'].state.items()})
    return found


def in_turn() -> list[float]:
    "Several suites in one call, the second one smaller than the number of processes."
    train, suite = CASES['uneven']
    found = assess(net(), train, {'a': suite, 'one': data(1, 1), 'again': suite}, ['NC', 'KMNC', 'TKNP'], batch_size=8,
                   show_progress=False)  # fmt: skip
    return found.dataset['value'].values.tolist()


def work(folder: Path) -> None:
    "What each of the two processes does."
    torch.set_num_threads(1)
    with joined('cpu', timeout=60):  # waiting for a process that sends nothing ends in an error
        found = {case: assessed(case, 8) for case in CASES}
        found |= {'clusters': clusters(), 'in turn': in_turn()}
        (folder / f'found{rank()}.json').write_text(json.dumps(found))


@pytest.fixture(scope='module')
def both(in_two_processes):
    return [json.loads((in_two_processes / f'found{number}.json').read_text()) for number in (0, 1)]


@pytest.mark.parametrize('case', CASES)
def test_two_processes_equal_one(case, both):
    one, (first, second) = assessed(case, 16), (process[case] for process in both)
    assert json.dumps(first) == json.dumps(second), 'both processes know the whole'
    assert first.keys() == one.keys() and first['samples'] == one['samples'] == len(CASES[case][1][0])
    for name in COUNTED:
        assert json.dumps(first[name]) == json.dumps(one[name]), name
    for name in criteria_of(case):
        assert first[name] == pytest.approx(one[name], rel=1e-6, abs=1e-9, nan_ok=True), name


def test_the_cases_have_something_to_tell():
    assert {name.split()[0] for name in EVERY} | {'CC', 'IDC'} == set(CRITERIA), 'every criterion has a case here'
    found = {case: assessed(case, 16) for case in CASES}
    for name in EVERY:
        assert found['uneven'][name] != found['one sample'][name] and found['uneven'][name][0] > 0, name
        if 'label' in name:
            assert found['uneven'][name] != found['a class that one process sees'][name], name


def test_clusters_are_the_same_in_every_process_and_every_time(both):
    """Which vectors are stored depends on the order of the samples, and shares change the order. So the number need not
    be that of one process; it is the same in all processes and every time, and close."""
    first, second = (process['clusters'] for process in both)
    assert first == second and first[0] == first[1]
    alone = Coverage(net(), CC(20.0), batch_size=16, show_progress=False).update(CASES['uneven'][1]).compute()
    assert first[0]['CC'] == pytest.approx(alone['CC'], rel=0.2)


def test_suites_follow_each_other(both):
    first, second = (process['in turn'] for process in both)
    assert first == second == in_turn() and first[0] == first[2], 'nothing is left of the suite before'


if __name__ == '__main__':
    work(Path(sys.argv[1]))
