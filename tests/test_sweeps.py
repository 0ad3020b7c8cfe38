"""Sweeps: every task once, the same bits wherever they are computed, and nothing lost but what was under way."""

import asyncio
import functools
import logging
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
import types
import warnings
from collections import deque
from pathlib import Path

import joblib
import numpy as np
import pytest
import torch
from torch import nn

from robustnb import sweeps
from robustnb.devices import seeded
from robustnb.results import Records
from robustnb.sweeps import Sweep, grid, sweep
from robustnb.training import fit

quiet = functools.partial(sweep, show_progress=False)
TASKS = grid(seed=range(3), width=[8, 16])
CALLS = deque()  # no part of what a function is; a list would be


@pytest.fixture(autouse=True)
def no_calls_yet():
    CALLS.clear()


def trained(seed, width):
    "A task in which every bit matters: a small net, trained and measured."
    with seeded(seed):
        net = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, 10))
    x = torch.rand(200, 64, generator=torch.Generator().manual_seed(0))
    y = x[:, :10].argmax(1)
    net = fit(net, (x, y), epochs=2, seed=seed, show_progress=False).model
    with torch.no_grad():
        logits = net(x)
    right = logits.argmax(1) == y
    return {'measured': {'mean': float(logits.mean()), 'right': int(right.sum())}, 'logits': logits, 'right': right}


def double(seed):
    return 2 * seed


def same(a: Sweep, b: Sweep) -> bool:
    "Equal tables and arrays, to the last bit, of one order."
    arrays = [[{n: (v.dtype, v.shape, v.tobytes()) for n, v in s.arrays(**t).items()} for t in s.tasks] for s in (a, b)]
    return a.tasks == b.tasks and a.values == b.values and a.table().equals(b.table()) and arrays[0] == arrays[1]


@pytest.fixture(scope='module')
def expected() -> Sweep:
    return quiet(trained, TASKS)


# ------------------------------------------------------------------------------------------------------------ grids


def test_every_combination_in_order():
    tasks = grid(seed=range(2), eps=np.array([0, 0.5]), layer=('fc', 'conv'), net='lenet5', top=None)
    assert len(tasks) == 8
    assert tasks[0] == {'seed': 0, 'eps': 0.0, 'layer': 'fc', 'net': 'lenet5', 'top': None}
    assert [t['layer'] for t in tasks[:2]] == ['fc', 'conv'] and [t['seed'] for t in tasks] == [0] * 4 + [1] * 4
    assert type(tasks[0]['eps']) is float


@pytest.mark.parametrize(
    'axis, values',
    [(3, [3]), ('ab', ['ab']), (True, [True]), ({'a': 1}, [{'a': 1}]), ([], []), (np.float32(0.5), [0.5])]
    + [(torch.arange(2), [0, 1]), (iter('ab'), ['a', 'b']), ([(1, 2)], [[1, 2]]), (None, [None])],
)
def test_axes(axis, values):
    assert grid(a=axis) == [{'a': value} for value in values]


def test_no_axes_are_one_task():
    assert grid() == [{}]
    assert quiet(lambda: 3, grid()).values == [{'value': 3}]


def test_unplain_values_are_named():
    with pytest.raises(TypeError, match=r'net\[1\] is a Linear, which cannot be saved'):
        grid(net=['a', nn.Linear(1, 1)])
    with pytest.raises(TypeError, match=r"tasks\[1\]\['net'\] is a Linear"):
        quiet(double, [{'seed': 0}, {'net': nn.Linear(1, 1)}])
    with pytest.raises(TypeError, match=r"tasks\[0\]\['a'\]\['b'\]\[1\] is a set"):
        quiet(double, [{'a': {'b': [0, {1}]}}])
    with pytest.raises(TypeError, match=r'tasks\[0\] is a int; it should be a dict'):
        quiet(double, range(3))
    with pytest.raises(TypeError, match='tasks is a single one'):
        quiet(double, {'seed': 0})


def test_what_is_no_function_and_no_way():
    with pytest.raises(TypeError, match='a sweep calls a function'):
        quiet('double', [])
    with pytest.raises(ValueError, match="errors is 'raise' or 'keep', got 'ignore'"):
        quiet(double, [], errors='ignore')
    with pytest.raises(TypeError, match='int'):
        quiet(double, [], records=3)
    for threads in (0, 'x', True, 1.5):
        with pytest.raises(ValueError, match='threads is a whole number of at least 1, or None'):
            quiet(double, grid(seed=1), threads=threads)
    assert not sweeps._before


# ------------------------------------------------------------------------------------------------- values and arrays


def test_an_empty_sweep(tmp_path):
    empty = quiet(double, [], tmp_path / 'r.jsonl')
    assert len(empty) == 0 and empty.table().empty and not empty.missing and not (tmp_path / 'r.jsonl').exists()
    assert 'Sweep (0 of 0 tasks)' in empty._repr_html_()


def test_a_number_is_a_value():
    for number in (1, 1.5, True, np.float32(1.5), np.int8(1), float('inf')):
        (values,) = quiet(lambda seed, number=number: number, [{'seed': 0}]).values
        assert values == {'value': number} and type(values['value']) in (int, float, bool)


def test_duplicates_are_computed_once():
    calls = []
    result = quiet(
        lambda **task: calls.append(task) or 1, [{'a': 1, 'b': (1, 2)}, {'b': [1, 2], 'a': np.int64(1)}, {'a': 2}]
    )
    assert calls == result.tasks == [{'a': 1, 'b': [1, 2]}, {'a': 2}]


def test_of_equal_tasks_the_first_one_is_done():
    (task,) = quiet(lambda eps: repr(eps) == '1', [{'eps': 1}, {'eps': 1.0}]).tasks
    assert type(task['eps']) is int
    assert len(quiet(lambda eps: 1, grid(eps=[0.0, -0.0, 1, True, '1']))) == 4  # True is no number, and '1' is a word


ARRAYS = {
    'bits': np.random.default_rng(0).random((3, 5)) < 0.5,
    'none': np.empty((0, 4), np.float32),
    'no bits': np.empty((2, 0), bool),
    'number': np.array(3.5),
    'one bit': np.array(True),
    'small': np.arange(6, dtype=np.int8).reshape(2, 3).T,
}


@pytest.mark.parametrize('kept', [True, False])
@pytest.mark.parametrize('as_tensor', [True, False])
def test_arrays_come_back(tmp_path, kept, as_tensor):
    def function(seed):
        return {'n': seed} | {k: torch.from_numpy(v.copy()) if as_tensor else v for k, v in ARRAYS.items()}

    for _ in range(2):  # computed, then read
        result = quiet(function, [{'seed': 0}], tmp_path / 'r.jsonl' if kept else None)
        found = result.arrays(seed=0)
        assert list(found) == list(ARRAYS) and list(result.table()) == ['seed', 'n']
        for name, array in ARRAYS.items():
            assert found[name].dtype == array.dtype and np.array_equal(found[name], array), name
    files = list(tmp_path.glob('r.arrays/??/*.safetensors'))
    assert len(files) == kept and all(file.stem.startswith(file.parent.name) for file in files)


def test_an_array_that_the_function_uses_again_is_copied():
    buffer = torch.zeros(2)

    def function(seed):
        return {'b': buffer.add_(1)}

    result = quiet(function, grid(seed=range(2)))
    assert [result.arrays(seed=seed)['b'].tolist() for seed in range(2)] == [[1, 1], [2, 2]]


def test_arrays_of_what_is_not_there():
    result = quiet(lambda a, b: 1 / a, grid(a=[0, 1], b=2), errors='keep')
    assert result.arrays(b=2, a=1) == {}
    for task in ({'a': 1}, {'a': 0, 'b': 2}, {'a': 3, 'b': 2}):
        with pytest.raises(KeyError, match='is not a task of this sweep that is done'):
            result.arrays(**task)


def test_thrown_away_arrays_are_computed_again(tmp_path):
    def function(seed):
        CALLS.append(seed)
        return {'a': torch.ones(seed), 'time': time.perf_counter()}  # another value each time

    quiet(function, grid(seed=range(3)), tmp_path / 'r.jsonl')
    next(tmp_path.glob('r.arrays/*/*')).unlink()
    result = quiet(function, grid(seed=range(3)), tmp_path / 'r.jsonl')
    assert len(CALLS) == 4 and len(result) == 3 and len(result.arrays(seed=2)['a']) == 2
    assert quiet(function, grid(seed=range(3)), tmp_path / 'r.jsonl').values == result.values


def test_arrays_are_found_without_a_search(tmp_path, monkeypatch):
    def function(seed):
        return {'a': np.full(1, seed)}

    for records in (None, tmp_path / 'r.jsonl', tmp_path / 'r.jsonl'):  # kept here, just written, read again
        result = quiet(function, grid(seed=range(50)), records)
        CALLS.clear()
        with monkeypatch.context() as patch:
            patch.setattr(sweeps, 'task_key', lambda task, key=sweeps.task_key: CALLS.append(task) or key(task))
            assert result.arrays(seed=49)['a'] == 49 and len(CALLS) == 1


@pytest.mark.parametrize(
    'returned, words',
    [
        (None, 'returned a NoneType; it should be a number'),
        (torch.ones(()), r'returned a Tensor; it should be a number, float\(...\) of a tensor'),
        ('word', 'returned a str'),
        ({'a': {1}}, r"returned\['a'\] is a set"),
        ({'a': {'b': torch.ones(1)}}, r"returned\['a'\]\['b'\] is a Tensor"),
        ({1: 2}, 'returned has the key 1; keys are words'),
        ({'a': np.array(['x'])}, "array 'a' has the type <U1"),
        ({'seed': 3}, "'seed' is in the task and in what the function returned"),
    ],
)
def test_what_cannot_be_kept(returned, words):
    with pytest.raises(RuntimeError, match=r"1 of 1 tasks failed, the first of them \{'seed': 7\}(.|\n)*" + words):
        quiet(lambda seed: returned, [{'seed': 7}])


def test_tables_have_dots():
    tasks = [{'attack': {'name': 'PGD', 'eps': eps}, 'layers': ['a', 'b'], 'none': {}} for eps in (0.1, 0.2)]
    table = quiet(lambda attack, layers, none: {'x': {'y': {'z': attack['eps']}}, 'w': [1]}, tasks).table()
    assert list(table) == ['attack.name', 'attack.eps', 'layers', 'none', 'x.y.z', 'w']
    assert table['x.y.z'].tolist() == [0.1, 0.2] and table.layers.tolist() == [['a', 'b']] * 2


def test_html_is_escaped():
    result = quiet(lambda word: {'n': '<script>'}, grid(word=['<img>', 'b']))
    assert '<script>' not in result._repr_html_() and '<img>' not in result._repr_html_()
    assert repr(result) == 'Sweep (2 of 2 tasks)' and len(result) == 2


# -------------------------------------------------------------------------------------------------- which function


def test_records_go_on(tmp_path):
    def function(seed):
        CALLS.append(seed)
        return {'v': seed / 3}

    first = quiet(function, grid(seed=range(3)), tmp_path / 'deep' / 'r.jsonl')
    second = quiet(function, grid(seed=[4, 2, 0]), Records(tmp_path / 'deep' / 'r.jsonl'))
    assert list(CALLS) == [0, 1, 2, 4] and second.tasks == [{'seed': 4}, {'seed': 2}, {'seed': 0}]
    assert second.values == [{'v': 4 / 3}, *first.values[:0:-2], first.values[0]]
    task, values = next(iter(Records(tmp_path / 'deep' / 'r.jsonl')))
    assert task['task'] == {'seed': 0} and set(task['sweep']) == {'function', 'code'}
    assert values == {'values': {'v': 0}, 'arrays': []}


def made(source: str, **known):
    "A function from its source, as a notebook's cell would define it."
    module = types.ModuleType('__main__')
    vars(module).update(known)
    exec(source, vars(module))
    return module.f


A, LENGTH = 'class A: pass', 'def f(seed): return len(a)'


@pytest.mark.parametrize(
    'one, other, equal',
    [
        ('def f(seed): return seed + 1', 'def f(seed):\n    # a comment\n\n    return seed + 1', True),
        ('def f(seed): return seed + 1', 'def f(seed): return seed + 2', False),
        ('def f(seed): return seed + 1', 'def f(seed): return seed - 1', False),
        ('def f(seed, a=1): return seed + a', 'def f(seed, a=2): return seed + a', False),
        ('def f(seed, a=3): return seed - a', 'def f(a=3, *, seed): return a - seed', False),
        (
            'def f(seed): return g(seed)\ndef g(x): return x',
            'def f(seed): return g(seed)\ndef g(x): return 2 * x',
            False,
        ),
        ('a = 1\ndef f(seed): return seed + a', 'a = 2\ndef f(seed): return seed + a', False),
        ('f = lambda seed: 1', 'f = lambda seed: 2', False),
        (f'{A}\na = {{A()}}\n{LENGTH}', f'{A}\na = {{A()}}\n{LENGTH}', True),  # at another place in memory
        (f'{A}\na = {{A(): 1}}\n{LENGTH}', f'{A}\na = {{A(): 1}}\n{LENGTH}', True),
        ('f = lambda seed: 1', 'f = lambda seed: 1', True),
    ],
)
def test_other_code_has_other_records(tmp_path, one, other, equal):
    for source in (one, other, one):
        (values,) = quiet(made(source), [{'seed': 1}], tmp_path / 'r.jsonl').values
        assert values['value'] == made(source)(seed=1)
    assert len(Records(tmp_path / 'r.jsonl')) == (1 if equal else 2)


def closure(weight):
    return lambda seed: {'sum': float(weight.sum()) + seed}


def partially(weight):
    return functools.partial(weighed, weight=weight)


def weighed(seed, weight):
    return {'sum': float(weight.sum()) + seed}


class Callable:
    def __init__(self, weight):
        self.weight = weight

    def __call__(self, seed):
        return weighed(seed, self.weight)

    def method(self, seed):
        return weighed(seed, self.weight)


@pytest.mark.parametrize('make', [closure, partially, Callable, lambda weight: Callable(weight).method])
def test_a_tensor_that_a_function_carries_decides(tmp_path, make):
    sums = [
        quiet(make(torch.full((2,), w)), [{'seed': 0}], tmp_path / 'r.jsonl').values[0]['sum'] for w in (1.0, 2.0, 1.0)
    ]
    assert sums == [2, 4, 2] and len(Records(tmp_path / 'r.jsonl')) == 2


# --------------------------------------------------------------------------------------------------------- backends


@pytest.mark.parametrize('backend', ['threading', 'loky'])
def test_the_backend_changes_no_bit(tmp_path, expected, backend):
    before = torch.get_num_threads()
    with joblib.parallel_config(backend, n_jobs=2):
        found = quiet(trained, TASKS, tmp_path / 'r.jsonl')
    assert same(found, expected) and same(quiet(trained, TASKS, tmp_path / 'r.jsonl'), expected)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize('make', [closure, partially, Callable])
def test_processes_get_functions_of_any_kind(make):
    assert [v['sum'] for v in quiet(make(torch.ones(2)), grid(seed=range(3)), jobs=2).values] == [2, 3, 4]


@pytest.mark.parametrize('backend', ['sequential', 'threading', 'loky'])
def test_threads_of_torch(backend):
    def function(seed):
        time.sleep(0.05)
        return torch.get_num_threads()

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with joblib.parallel_config(backend, n_jobs=1 if backend == 'sequential' else 2):
            assert {v['value'] for v in quiet(function, grid(seed=range(4))).values} == {1}
            assert {v['value'] for v in quiet(function, grid(seed=range(4)), threads=2).values} == {2}
            if backend != 'loky':
                assert {v['value'] for v in quiet(function, grid(seed=range(4)), threads=None).values} == {3}
        assert torch.get_num_threads() == 3 and not sweeps._before
    finally:
        torch.set_num_threads(before)


def test_one_bar_that_starts_at_what_is_there(tmp_path, monkeypatch):
    bars = []

    class Bar:
        n = 0

        def __init__(self, items, desc, total, show):
            bars.append((self, total, show))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.closed = True

        def refresh(self):
            self.began = self.n

        def update(self):
            self.n += 1

    monkeypatch.setattr(sweeps, 'progress', Bar)
    sweep(double, grid(seed=range(2)), tmp_path / 'r.jsonl')
    quiet(double, grid(seed=range(5)), tmp_path / 'r.jsonl')
    assert [(bar.began, bar.n, total, show) for bar, total, show in bars] == [(0, 2, 2, True), (2, 5, 5, False)]


def test_the_real_bar(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv('ROBUSTNB_PLAIN', '1')
    sweep(double, grid(seed=range(2)), tmp_path / 'r.jsonl')
    sweep(double, grid(seed=range(4)), tmp_path / 'r.jsonl')
    assert '2/4' in capfd.readouterr().err


# --------------------------------------------------------------------------------------------------------- failures


def sometimes(seed):
    if seed % 3 == 1:
        raise ValueError(f'no {seed}')
    if seed % 3 == 2:
        sys.exit('enough')
    return {'v': seed}


@pytest.mark.parametrize('jobs', [1, 2])
def test_failures_do_not_stop_the_others(tmp_path, caplog, jobs):
    with pytest.raises(RuntimeError, match=r"4 of 6 tasks failed, the first of them \{'seed': 1\}") as caught:
        quiet(sometimes, grid(seed=range(6)), tmp_path / 'r.jsonl', jobs=jobs)
    assert (
        'ValueError: no 1' in str(caught.value)
        and 'def ' not in str(caught.value)
        and 'in sometimes' in str(caught.value)
    )
    assert str(tmp_path / 'r.jsonl') in str(caught.value)
    kept = caught.value.sweep
    assert [v and v['v'] for v in kept.values] == [0, None, None, 3, None, None] and len(kept.table()) == 2
    assert kept.failed[:2] == [({'seed': 1}, 'ValueError: no 1'), ({'seed': 2}, 'SystemExit: enough')]
    assert kept.missing == [{'seed': seed} for seed in (1, 2, 4, 5)]
    assert len([r for r in caplog.records if 'failed' in r.message]) == 4 and "task {'seed': 1} failed" in caplog.text
    again = quiet(sometimes, grid(seed=range(6)), tmp_path / 'r.jsonl', jobs=jobs, errors='keep')
    assert again.failed == kept.failed and again.values == kept.values and '4 failed' in repr(again)


class Mute(Exception):
    def __str__(self):
        raise ValueError


@pytest.mark.parametrize('jobs', [1, 2])
@pytest.mark.parametrize('error', [asyncio.CancelledError, GeneratorExit, Mute, RecursionError])
def test_no_error_of_a_task_is_one_of_the_sweep(error, jobs):
    def function(seed):
        if seed == 1:
            raise error
        return seed

    result = quiet(function, grid(seed=range(4)), errors='keep', jobs=jobs)
    assert [task for task, _ in result.failed] == [{'seed': 1}] and len(result) == 3 and not result.interrupted
    assert error.__name__ in result.failed[0][1]


def test_failed_tasks_are_tried_again(tmp_path):
    def function(seed):
        if seed and not CALLS:
            raise ValueError
        return seed

    with pytest.raises(RuntimeError, match='2 of 3'):
        quiet(function, grid(seed=range(3)), tmp_path / 'r.jsonl')
    CALLS.append(True)
    assert len(quiet(function, grid(seed=range(3)), tmp_path / 'r.jsonl')) == 3


def test_all_of_them_failed(tmp_path):
    with pytest.raises(RuntimeError, match=r'2 of 2(.|\n)*and in .*r.jsonl'):
        quiet(sometimes, grid(seed=[1, 2]), tmp_path / 'r.jsonl')


def test_a_function_that_changes_its_task(tmp_path):
    for _ in range(2):
        result = quiet(lambda layers: layers.pop() and 1, grid(layers=[['a', 'b']]), tmp_path / 'r.jsonl')
        assert result.tasks == [{'layers': ['a', 'b']}]
    assert [task['task'] for task, _ in Records(tmp_path / 'r.jsonl')] == result.tasks


def test_a_full_disk_ends_the_sweep_with_words(tmp_path, monkeypatch):
    def full(store, task, *_, **__):
        if task['task'] == {'seed': 2}:
            raise OSError(28, 'No space left on device')
        return add(store, task, *_, **__)

    add = Records.add
    monkeypatch.setattr(Records, 'add', full)
    with pytest.raises(OSError, match='No space') as caught:
        quiet(double, grid(seed=range(4)), tmp_path / 'r.jsonl')
    assert '2 of its 4 tasks are done and kept in' in caught.value.__notes__[0]


def test_a_file_that_cannot_be_written_is_told_before_the_first_task(tmp_path, monkeypatch):
    def read_only(path, flags, *rest):
        raise PermissionError(13, 'Permission denied', str(path))

    function = functools.partial(lambda seed: CALLS.append(seed) or seed)
    quiet(function, grid(seed=range(2)), tmp_path / 'r.jsonl')
    monkeypatch.setattr(os, 'open', read_only)
    assert len(quiet(function, grid(seed=range(2)), tmp_path / 'r.jsonl')) == 2  # which is only read
    with pytest.raises(PermissionError):
        quiet(function, grid(seed=range(3)), tmp_path / 'r.jsonl')
    assert list(CALLS) == [0, 1]


def deadly(seed):
    if seed == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return seed


@pytest.mark.slow
def test_a_dead_worker_is_told(tmp_path):
    with pytest.raises(Exception, match='terminated') as caught:
        quiet(deadly, grid(seed=range(6)), tmp_path / 'r.jsonl', jobs=2)
    assert 'the same call goes on from there' in caught.value.__notes__[-1]
    assert len(quiet(double, grid(seed=range(4)), jobs=2)) == 4  # and the next sweep gets new workers


# ---------------------------------------------------------------------------------------------- kill -9, and again

NIGHT = """
import sys, time
from pathlib import Path
import numpy as np
from robustnb.sweeps import grid, sweep

def task(seed, eps):
    with open(began, 'a') as file:  # one write, at the end of the file
        file.write(f'{seed} {eps}\\n')
    time.sleep(0.15)
    draws = np.random.default_rng(seed).normal(size=500) * eps
    return {'mean': float(draws.mean()), 'draws': draws, 'large': draws > 0.1}

folder, jobs = Path(sys.argv[1]), int(sys.argv[2])
began = str(folder / 'began')
if __name__ == '__main__':
    tasks = grid(seed=range(6), eps=[0.1, 0.3])
    result = sweep(task, tasks, folder / 'r.jsonl', jobs, show_progress=False)
    for one in tasks:
        print(one, result.arrays(**one)['draws'].tobytes().hex(), result.arrays(**one)['large'].tobytes().hex())
    print(result.table().to_json(double_precision=15))
"""


def begun(folder: Path) -> list[str]:
    "Each start of a task so far."
    return (folder / 'began').read_text().splitlines() if (folder / 'began').exists() else []


def lines(file: Path) -> list[bytes]:
    "The whole lines of a record store, without its header."
    return file.read_bytes().split(b'\n')[1:-1] if file.exists() else []


def swept(script: Path, folder: Path, jobs: int, capsys, monkeypatch) -> str:
    "What the script prints when it is run to its end."
    monkeypatch.setattr(sys, 'argv', ['night.py', str(folder), str(jobs)])
    capsys.readouterr()
    runpy.run_path(str(script), run_name='__main__')
    return capsys.readouterr().out


@pytest.mark.skipif(sys.platform == 'win32', reason='Windows has no kill -9')
@pytest.mark.parametrize('jobs', [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_in_the_middle(tmp_path, jobs, capsys, monkeypatch):
    script, folder, undisturbed = tmp_path / 'night.py', tmp_path / 'killed', tmp_path / 'undisturbed'
    script.write_text(NIGHT)
    folder.mkdir(), undisturbed.mkdir()
    command = [sys.executable, str(script), str(folder), str(jobs)]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    while len(lines(folder / 'r.jsonl')) < 5:
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.04)  # within the next tasks
    os.killpg(process.pid, signal.SIGKILL)  # the workers too
    process.wait()
    done, first = len(lines(folder / 'r.jsonl')), begun(folder)
    lost = jobs if jobs == 1 else 2 * jobs  # under way; with workers also what has ended in this moment and is not written yet
    assert 5 <= done < 12 and len(first) - done <= lost
    found = swept(script, folder, jobs, capsys, monkeypatch)
    again = begun(folder)[len(first) :]
    assert len(again) == len(set(again)) == 12 - done  # nothing that was recorded is computed again
    assert len(set(again) & set(first)) <= lost  # and nothing else
    assert found == swept(script, undisturbed, 1, capsys, monkeypatch) and len(begun(undisturbed)) == 12


def test_a_torn_last_line_is_one_task_to_do_again(tmp_path):
    def function(seed):
        CALLS.append(seed)
        return {'v': seed / 3, 'a': np.arange(seed)}

    first = quiet(function, grid(seed=range(4)), tmp_path / 'r.jsonl')
    whole = (tmp_path / 'r.jsonl').read_bytes()
    (tmp_path / 'r.jsonl').write_bytes(whole[:-20])
    assert same(quiet(function, grid(seed=range(4)), tmp_path / 'r.jsonl'), first)
    assert list(CALLS) == [0, 1, 2, 3, 3] and (tmp_path / 'r.jsonl').read_bytes() == whole


# ------------------------------------------------------------------------------------------------------- interrupts


def stopped(seed):
    if seed == 3:
        raise KeyboardInterrupt
    return {'v': seed, 'a': np.arange(seed)}


@pytest.mark.parametrize('backend', ['sequential', 'threading', 'loky'])
def test_an_interrupt_in_a_task_keeps_the_others(tmp_path, caplog, backend):
    with joblib.parallel_config(backend, n_jobs=1 if backend == 'sequential' else 2), warnings.catch_warnings():
        warnings.simplefilter('error')
        part = quiet(stopped, grid(seed=range(20)), tmp_path / 'r.jsonl')
    assert part.interrupted and 'interrupted' in repr(part) and 'interrupted after' in caplog.text
    assert 2 <= len(part) < 20 and {'seed': 3} in part.missing and not part.failed
    assert len(part.table()) == len(Records(tmp_path / 'r.jsonl')) == len(part)


@pytest.mark.parametrize('backend', ['sequential', 'threading'])
def test_an_interrupt_of_the_consumer_keeps_the_partial_result(tmp_path, monkeypatch, backend):
    keep = sweeps._keep

    def interrupted(store, record, *rest):
        keep(store, record, *rest)
        if len(store) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(sweeps, '_keep', interrupted)
    with joblib.parallel_config(backend, n_jobs=1 if backend == 'sequential' else 2):
        part = quiet(double, grid(seed=range(20)), tmp_path / 'r.jsonl')
        assert part.interrupted and len(part) == 1  # the second is in the file, and found next time
        monkeypatch.setattr(sweeps, '_keep', keep)
        whole = quiet(double, grid(seed=range(20)), tmp_path / 'r.jsonl')
    assert not whole.interrupted and whole.values == [{'value': 2 * seed} for seed in range(20)]


def test_an_interrupt_that_a_task_swallows_is_seen():
    def swallows(seed):
        try:
            if seed == 2:
                signal.raise_signal(signal.SIGINT)
            return 1
        except KeyboardInterrupt:
            return 0  # half of it

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it from the start
    try:
        part = quiet(swallows, grid(seed=range(5)))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert part.interrupted and part.values == [{'value': 1}] * 2 + [None] * 3


def test_an_exit_of_the_program_is_an_exit(tmp_path, monkeypatch):
    monkeypatch.setattr(sweeps, '_keep', lambda *_: sys.exit(3))
    with pytest.raises(SystemExit):
        quiet(double, grid(seed=range(3)), tmp_path / 'r.jsonl')


# ------------------------------------------------------------------------------------------------------------- Dask


@pytest.fixture(scope='module')
def cluster():
    "A Dask cluster of two processes on this machine."
    pytest.importorskip('distributed', reason='the extra `cluster` is not installed: no Dask')
    from distributed import Client, LocalCluster

    with (
        LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=logging.CRITICAL
        ) as local,
        Client(local) as client,
    ):
        yield client


def test_a_cluster_changes_no_bit_and_survives_a_killed_worker(tmp_path, cluster, expected):
    marker = tmp_path / 'killed'

    def kills_once(seed, width):
        if seed == 1 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return trained(seed, width)

    cluster.wait_for_workers(2)
    with joblib.parallel_config('dask'):
        found = quiet(kills_once, TASKS, tmp_path / 'r.jsonl')
    assert marker.exists() and same(found, expected)


def test_what_cannot_be_sent_to_a_cluster_is_told(cluster):
    lock = threading.Lock()
    cluster.wait_for_workers(2)
    with joblib.parallel_config('dask'), pytest.raises(TypeError, match='cannot be sent to the workers'):
        quiet(lambda seed: lock and seed, grid(seed=range(4)))


@pytest.mark.slow
def test_a_task_that_the_cluster_gives_up_has_failed(cluster):
    cluster.wait_for_workers(2)
    cluster.cluster.scheduler.allowed_failures = 0
    with joblib.parallel_config('dask'):
        found = quiet(deadly, grid(seed=range(6)), errors='keep')
        assert [task for task, _ in found.failed] == [{'seed': 3}] and 'KilledWorker' in found.failed[0][1]
        assert len(found) == 5
        backend = joblib.parallel.get_active_backend()[0]
        assert 'submit' not in vars(backend)  # the user's backend as it was


def test_records_of_the_sweeps_of_one_file_as_a_table(tmp_path):
    quiet(double, grid(seed=range(2)), tmp_path / 'r.jsonl')
    quiet(closure(torch.ones(1)), grid(seed=range(2)), tmp_path / 'r.jsonl')
    assert len(Records(tmp_path / 'r.jsonl').table()) == 4
