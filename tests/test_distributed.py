"""Two processes and three: everything is computed in them once, and compared with plain NumPy here.

This file is also the script that the processes run; see `work`.
"""

import json
import math
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from robustnb import distributed
from robustnb.distributed import (
    add_up,
    from_first,
    gathered,
    joined,
    mean_buffers,
    mean_gradients,
    my_rows,
    rank,
    same_start,
    world_size,
)

SIZES = [0, 1, 2, 3, 7, 8, 100]
WEIGHTS = {2: [5, 3], 3: [1, 0, 4]}
PLAIN = {
    'floats': [0.1, -0.0, 1e-323, math.inf, -math.inf, math.nan, 1 / 3],
    'others': [None, True, False, 3, -(10**30), 'zwölf\n"', '', [], {}],
    'nested': {'a': [{'b': [1.5]}]},
}


def tensors_of(number: int) -> dict[str, torch.Tensor]:
    "What process `number` holds: every type and awkward shapes."
    g = torch.Generator().manual_seed(number)
    normal = torch.randn(6, 4, generator=g, dtype=torch.float64)
    return {
        'float64': normal.clone(),
        'float32': normal.float(),
        'transposed': normal.float().t(),
        'scalar': normal[0, 0].float(),
        'none': torch.zeros(0, 3),
        'float16': torch.tensor([2048.0, 1.0, 6e-8, 1.0]).half() * (1 if number == 0 else 0.5),
        'bfloat16': normal.bfloat16(),
        'int64': torch.tensor([2**53 + 1, -number, number]),
        'int32': torch.full((2,), number + 1, dtype=torch.int32),
        'int16': torch.full((2, 2), 100 * number, dtype=torch.int16),
        'uint8': torch.tensor([number, 7], dtype=torch.uint8),
        'complex64': torch.complex(normal.float(), -normal.float()),
    }


def model() -> nn.Sequential:
    "A small network that is the same wherever it is built."
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    g = torch.Generator().manual_seed(3)
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=g) / 2
    return net


def batch(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    "`n` samples for it."
    g = torch.Generator().manual_seed(4)
    return torch.randn(n, 4, generator=g), torch.randint(0, 3, (n,), generator=g)


def train(sizes: list[int]) -> nn.Sequential:
    "Steps of gradient descent on batches of `sizes` samples, of which this process takes its rows."
    net = model()
    for n in sizes:
        x, y = (t[my_rows(n)] for t in batch(n))
        if len(x):
            F.cross_entropy(net(x), y).backward()
        mean_gradients(net.parameters(), len(x))
        for p in net.parameters():  # by hand: importing torch.optim takes longer than all the rest
            p.data -= 0.3 * p.grad
            p.grad = None
    return net


# ---------------------------------------------------------------------------------------------- inside the processes


def flat(**groups) -> dict[str, torch.Tensor]:
    "Tensors in dicts and lists under one name each, without those that are None."
    named = {f'{k}/{i}': t for k, v in groups.items() for i, t in (v.items() if isinstance(v, dict) else enumerate(v))}
    return {k: t.detach().contiguous().clone() for k, t in named.items() if t is not None}


def error_of(function) -> str:
    "The type and the words of the error that `function` raises."
    try:
        function()
    except Exception as error:
        return f'{type(error).__name__}: {error}'
    return 'none'


def counted(function) -> int:
    "How many messages `function` sends."
    calls, original = [], dist.all_reduce
    dist.all_reduce = lambda *args, **kwargs: (calls.append(1), original(*args, **kwargs))
    try:
        function()
    finally:
        dist.all_reduce = original
    return len(calls)


def gradients_of(number: int) -> dict[str, torch.Tensor | None]:
    "Gradients of process `number`: everywhere, in one process only, nowhere, half precision, of two types."
    g = torch.Generator().manual_seed(10 + number)
    return {
        'everywhere': torch.randn(3, 2, generator=g),
        'first only': torch.randn(4, generator=g) if number == 0 else None,
        'last only': torch.randn(4, generator=g) if number == len(WEIGHTS[world_size()]) - 1 else None,
        'nowhere': None,
        'half': torch.randn(5, generator=g).half() * 1e-3,
        'double': torch.randn(2, generator=g, dtype=torch.float64),
        'weightless': torch.full((2,), math.nan) if WEIGHTS[world_size()][number] == 0 else None,
    }


def parameters_of(number: int) -> dict[str, nn.Parameter]:
    "Parameters with these gradients."
    shapes = {'everywhere': (3, 2), 'half': 5, 'double': 2, 'weightless': 2}
    kinds = {'half': torch.float16, 'double': torch.float64}
    found = {}
    for name, gradient in gradients_of(number).items():
        found[name] = nn.Parameter(torch.zeros(shapes.get(name, 4), dtype=kinds.get(name, torch.float32)))
        found[name].grad = gradient
    return found


def gradients() -> dict:
    "Weighted means, and what happens without any weight."
    parameters, untouched = parameters_of(rank()), parameters_of(rank())
    mean_gradients(parameters.values(), WEIGHTS[world_size()][rank()])
    mean_gradients(untouched.values(), 0)
    again = {'held': parameters['everywhere'], 'graph': nn.Parameter(torch.ones(3))}
    held = again['held'].grad
    again['graph'].grad = (again['graph'] * again['graph']).clone()
    mean_gradients(again.values(), 1)
    assert held is again['held'].grad and again['graph'].grad.grad_fn is None
    return flat(
        mean={k: p.grad for k, p in parameters.items()},
        untouched={k: p.grad for k, p in untouched.items()},
        graph=[again['graph'].grad],
    )


def starts() -> dict:
    "The first process's values, in tensors of every type, in parameters and in views."
    tensors = {k: t.clone() for k, t in tensors_of(rank()).items()} | {'bool': torch.tensor([rank() == 0, rank() != 0])}
    tensors['nan'] = torch.tensor([0x7FC00001 + rank(), -1], dtype=torch.int32).view(torch.float32)
    tensors['parameter'] = nn.Parameter(torch.full((2, 2), float(rank() + 5)))
    wide = torch.full((4, 4), float(rank()))
    same_start([*tensors.values(), wide[:, 1]])
    return flat(start=tensors, wide=[wide])


def buffers() -> dict:
    "The statistics of a batch norm, a constant, a mask with infinity, and whole numbers."
    net = nn.BatchNorm2d(3)
    net.running_mean += torch.arange(3) + 10 * rank()
    net.num_batches_tracked += rank() + 4
    net.register_buffer('constant', torch.tensor([0.1, 0.3, 1 / 3]))
    net.register_buffer('mask', torch.tensor([-math.inf, 0]))
    net.register_buffer('flag', torch.tensor([rank() == 0]))
    if WEIGHTS[world_size()][rank()] == 0:
        net.running_var.fill_(math.nan)
    mean_buffers(net, WEIGHTS[world_size()][rank()])
    mean_buffers(nn.Linear(1, 1))
    return flat(buffer=dict(net.named_buffers()))


def collections() -> dict:
    "Every process's tensors; some have another number of rows."
    rows = {k: t for k, t in tensors_of(rank()).items()} | {'bool': torch.tensor([rank() == 0])}
    same = {f'{k}/{i}': t for k, t in rows.items() for i, t in enumerate(gathered(t))}
    uneven = gathered(torch.arange(rank() * 2.0).view(rank(), 2).requires_grad_())
    assert not any(t.requires_grad for t in uneven)
    return flat(same=same, uneven=uneven, shares=gathered(torch.arange(7)[my_rows(7)]))


def facts() -> dict:
    "What is not a tensor."
    many = [torch.ones(i) for i in range(1, 9)]
    trained = model()
    F.cross_entropy(trained(batch(2)[0]), batch(2)[1]).backward()
    found = {
        'rank': [rank(), world_size()],
        'rows': [[my_rows(n).start, my_rows(n).stop] for n in SIZES],
        'messages': [counted(lambda: add_up(many)), counted(lambda: add_up(t for t in many))],
        'gradient messages': counted(lambda: mean_gradients(trained.parameters(), 1)),
        'plain': from_first(PLAIN if rank() == 0 else object()),
        'not plain': error_of(lambda: from_first({'a': [1, (2, 3)]} if rank() == 0 else None)),
        'shapes': error_of(lambda: add_up([torch.ones(2 + rank())])),
        'numbers': error_of(lambda: mean_gradients([nn.Parameter(torch.ones(2))] * (1 + (rank() == 0)), 1)),
        'types': error_of(lambda: same_start([torch.ones(2, dtype=[torch.float32, torch.int32][rank() % 2])])),
        'columns': error_of(lambda: gathered(torch.ones(2, 2 + rank()))),
        'xla': error_of(lambda: distributed._road(torch.device('xla', 0))),
    }
    with joined('cpu') as device:  # there is a group: this is not ours to end
        found['inner device'] = str(device)
    return found | {'still there': world_size()}


def summed() -> dict:
    "Sums of every type."
    tensors = {k: t.clone() for k, t in tensors_of(rank()).items()}
    add_up(tensors.values())
    weight = nn.Parameter(torch.ones(2))
    add_up([weight])
    return flat(sum=tensors, weight=[weight])


def failing() -> None:
    "The last process fails at once, in the second group of this script; the others are waiting for it."
    with joined('cpu', timeout=60):
        if rank() == world_size() - 1:
            raise RuntimeError('out of luck')
        add_up([torch.ones(3)])


def work() -> None:
    "What each process does, and leaves in the folder."
    by_hand = dist.is_initialized()
    with joined('cpu', timeout=60) as device:
        number = rank()
        found = {'device': str(device)} | facts()
        tensors = summed() | gradients() | starts() | buffers() | collections()
        tensors |= flat(trained=dict(train([8, 8, 2, 1, 5]).named_parameters()))
    found['group left'] = dist.is_initialized()
    if not by_hand:
        found['failure'], found['group left after it'] = error_of(failing), dist.is_initialized()
    folder = Path(os.environ['FOLDER'])
    save_file(tensors, folder / f'{number}.safetensors')
    (folder / f'{number}.json').write_text(json.dumps(found))


def work_by_hand(number: int, processes: int) -> None:
    "The same in a group that is there already, as launchers other than torchrun make it."
    file = Path(os.environ['FOLDER']) / 'store'
    dist.init_process_group('gloo', init_method=f'file://{file}', rank=number, world_size=processes)
    work()
    dist.destroy_process_group()


# --------------------------------------------------------------------------------------------------- outside of them


ENV = os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(Path(distributed.__file__).parents[1])}


TORCHRUN = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', __file__]
BY_HAND = [__file__, '3']


@pytest.fixture(scope='module', params=[2, 3])
def ran(request, tmp_path_factory):
    "For each process what it found: facts and tensors."
    folder = tmp_path_factory.mktemp('processes')
    command = [sys.executable, *(TORCHRUN if request.param == 2 else BY_HAND)]
    process = subprocess.run(command, env=ENV | {'FOLDER': str(folder)}, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    return [
        (json.loads((folder / f'{i}.json').read_text()), load_file(folder / f'{i}.safetensors'))
        for i in range(request.param)
    ]


def part(tensors: dict, name: str) -> dict:
    "The tensors of one group, by their own names."
    return {k.removeprefix(f'{name}/'): t for k, t in tensors.items() if k.startswith(f'{name}/')}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = (t.detach().contiguous().reshape(-1) for t in (a, b))
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_every_process_knows_its_place(ran):
    assert [found['rank'] for found, _ in ran] == [[i, len(ran)] for i in range(len(ran))]


@pytest.mark.parametrize('n', SIZES)
def test_shares_are_all_rows_once_in_order_and_even(ran, n):
    shares = [found['rows'][SIZES.index(n)] for found, _ in ran]
    assert [i for a, b in shares for i in range(a, b)] == list(range(n))
    sizes = [b - a for a, b in shares]
    assert max(sizes) - min(sizes) <= 1


def test_what_all_processes_end_with_has_the_same_bits(ran):
    (_, first), *others = ran
    shared = [k for k in first if k.split('/')[0] in ('sum', 'mean', 'start', 'buffer', 'trained', 'same', 'uneven')]
    assert len(shared) > 50
    for _, tensors in others:
        assert [k for k in shared if not same_bits(first[k], tensors[k])] == []


def test_sums(ran):
    theirs = [tensors_of(i) for i in range(len(ran))]
    for _, tensors in ran:
        for name, total in part(tensors, 'sum').items():
            wide = [t[name].float() if total.dtype in (torch.float16, torch.bfloat16) else t[name] for t in theirs]
            expected = torch.from_numpy(np.asarray(sum(t.numpy() for t in wide))).to(total.dtype)
            assert total.shape == theirs[0][name].shape
            torch.testing.assert_close(total, expected, rtol=1e-6, atol=1e-6)
        assert tensors['weight/0'].tolist() == [len(ran)] * 2


def test_half_precision_is_summed_in_single(ran):
    wide = torch.stack([tensors_of(i)['float16'].float() for i in range(len(ran))])
    assert same_bits(ran[0][1]['sum/float16'], wide.sum(0).half())
    if len(ran) == 3:  # 2048 + 1024 + 1024 is easy; a sum of small numbers in steps is not
        assert ran[0][1]['sum/float16'][2] > 0


def test_one_message_for_all_tensors(ran):
    assert all(found['messages'] == [2, 2] for found, _ in ran)  # one small comparison, one for all values
    assert all(found['gradient messages'] == 2 for found, _ in ran)


def test_mean_gradients(ran):
    processes, weights = len(ran), WEIGHTS[len(ran)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], 'world_size', lambda: processes)
        theirs = [gradients_of(i) for i in range(processes)]
    for _, tensors in ran:
        means = part(tensors, 'mean')
        for name in theirs[0]:
            seen = [(w, t[name]) for w, t in zip(weights, theirs, strict=True) if w and t[name] is not None]
            assert (name in means) == bool(seen), name
            if seen:
                expected = sum(w * g.double().numpy() for w, g in seen) / sum(weights)
                tolerance = {'half': 1e-3, 'double': 1e-15}.get(name, 1e-6)
                np.testing.assert_allclose(means[name].double().numpy(), expected, rtol=tolerance, atol=1e-7)
        assert 'nowhere' not in means and 'weightless' not in means
        assert tensors['graph/0'].tolist() == [1, 1, 1]


def test_without_any_weight_gradients_stay(ran):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], 'world_size', lambda: len(ran))
        for i, (_, tensors) in enumerate(ran):
            mine = {k: g for k, g in gradients_of(i).items() if g is not None}
            assert part(tensors, 'untouched').keys() == mine.keys()
            assert all(same_bits(tensors[f'untouched/{k}'], g) for k, g in mine.items())


def test_training_in_shares_is_training_on_the_whole_batch(ran):
    whole = train([8, 8, 2, 1, 5])  # in this one process; two batches have fewer samples than there are processes
    for name, p in whole.named_parameters():
        torch.testing.assert_close(ran[0][1][f'trained/{name}'], p.data, rtol=1e-5, atol=1e-6)


def test_same_start(ran):
    for _, tensors in ran:
        start = part(tensors, 'start')
        assert all(same_bits(start[k], t) for k, t in tensors_of(0).items())
        assert start['bool'].tolist() == [True, False]
        assert start['nan'].view(torch.int32).tolist() == [0x7FC00001, -1]
        assert start['parameter'].tolist() == [[5, 5], [5, 5]]
    for i, (_, tensors) in enumerate(ran):
        assert tensors['wide/0'].tolist() == [[i, 0, i, i]] * 4  # only the column that was handed over


def test_mean_buffers(ran):
    weights = np.array(WEIGHTS[len(ran)])
    for _, tensors in ran:
        found = part(tensors, 'buffer')
        expected = np.arange(3) + 10 * (weights @ np.arange(len(ran))) / weights.sum()
        np.testing.assert_allclose(found['running_mean'], expected, rtol=1e-6)
        assert found['running_var'].tolist() == [1, 1, 1]  # the nan of a process without samples does not matter
        assert same_bits(found['constant'], torch.tensor([0.1, 0.3, 1 / 3]))
        assert found['mask'].tolist() == [-math.inf, 0]
        assert found['num_batches_tracked'] == 4 and found['flag'].tolist() == [True]


def test_gathered(ran):
    for _, tensors in ran:
        for i in range(len(ran)):
            for name, t in tensors_of(i).items():
                assert same_bits(tensors[f'same/{name}/{i}'], t) and tensors[f'same/{name}/{i}'].shape == t.shape
            assert tensors[f'same/bool/{i}'].tolist() == [i == 0]
            assert tensors[f'uneven/{i}'].tolist() == torch.arange(i * 2.0).view(i, 2).tolist()
        assert torch.cat(list(part(tensors, 'shares').values())).tolist() == list(range(7))


def test_from_first(ran):
    for found, _ in ran:
        floats = [found['plain'].pop('floats'), PLAIN['floats']]
        assert struct.pack('7d', *floats[0]) == struct.pack('7d', *floats[1])
        assert found['plain'] == {k: v for k, v in PLAIN.items() if k != 'floats'}


def test_errors_reach_every_process(ran):
    errors = [found['not plain'] for found, _ in ran]
    assert "['a'][1] is of type tuple" in errors[0] and all(e.startswith('TypeError') for e in errors)
    for what in ('shapes', 'numbers', 'types', 'columns'):
        assert all(found[what].startswith('ValueError: the processes disagree') for found, _ in ran), what
    assert all('torch_xla.launch' in found['xla'] for found, _ in ran)


def test_group_ends_with_its_block_and_only_there(ran):
    for found, _ in ran:
        assert found['device'] == found['inner device'] == 'cpu' and found['still there'] == len(ran)
        assert found['group left'] == (len(ran) == 3)  # those three had made their group themselves


def test_failure_in_one_process_ends_the_group(ran):
    if len(ran) == 3:
        return  # tried under torchrun only
    *waiting, failed = [found for found, _ in ran]
    assert failed['failure'] == 'RuntimeError: out of luck'
    assert all(found['failure'].startswith(('RuntimeError: ', 'DistBackendError: ')) for found in waiting)
    assert not any(found['group left after it'] for found, _ in ran)


# ------------------------------------------------------------------------------------------------------ one process


def test_alone_nothing_happens():
    assert (rank(), world_size(), my_rows(5)) == (0, 1, slice(0, 5))
    t, p, net = torch.tensor([1.5]), nn.Parameter(torch.ones(2)), nn.BatchNorm1d(2)
    p.grad = gradient = torch.ones(2)
    add_up([t])
    mean_gradients([p], 0)
    same_start([t, p])
    mean_buffers(net)
    assert t.tolist() == [1.5] and p.grad is gradient and gradient.tolist() == [1, 1]
    value = {'a': [1]}
    assert from_first(value) is value
    (copy,) = gathered(t)
    assert torch.equal(copy, t) and copy.data_ptr() != t.data_ptr()
    with joined() as device:
        assert isinstance(device, torch.device) and not dist.is_initialized()


def test_mistakes_show_in_one_process_too():
    with pytest.raises(TypeError, match=r"\['a'\] is of type Tensor.*same_start"):
        from_first({'a': torch.ones(2)})
    with pytest.raises(TypeError, match='the key 3; keys are words'):
        from_first([{3: 'a'}])
    with pytest.raises(TypeError, match='bool has no sum'):
        add_up([torch.tensor([True])])
    with pytest.raises(ValueError, match='cannot be -1 rows'):
        my_rows(-1)
    for weight in (-1, math.nan, math.inf):
        with pytest.raises(ValueError, match='number of samples'):
            mean_gradients([], weight)


def test_a_group_of_one(tmp_path):
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        t = torch.ones(2)
        add_up([t])
        same_start([t])
        assert (rank(), world_size(), from_first('a')) == (0, 1, 'a') and t.tolist() == [1, 1] and len(gathered(t)) == 1
    finally:
        dist.destroy_process_group()


# --------------------------------------------------------------------------------------------------------- devices


def test_each_process_has_its_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    assert distributed._own_device('cuda') == torch.device('cuda')
    monkeypatch.setenv('LOCAL_RANK', '1')
    assert distributed._own_device('cuda') == torch.device('cuda:1')
    assert distributed._own_device('cuda:0') == torch.device('cuda:0')
    assert distributed._own_device('cpu') == torch.device('cpu')
    monkeypatch.setenv('LOCAL_RANK', '2')
    with pytest.raises(ValueError, match='would take GPU 2, but 2 can be seen'):
        distributed._own_device('cuda')


@pytest.mark.parametrize('kind', ['xla', 'mps'])
def test_devices_that_cannot_be_shared(monkeypatch, kind):
    monkeypatch.setattr(distributed, 'pick_device', lambda prefer: torch.device(kind, 0))
    assert distributed._own_device(None).type == kind
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(ValueError, match='torch_xla.launch'):
        distributed._own_device(None)


@pytest.mark.parametrize(
    'config, device, road',
    [
        ('cpu:gloo,cuda:nccl', 'cuda:1', 'cuda:1'),
        ('cpu:gloo,cuda:nccl', 'cpu', 'cpu'),
        ('cuda:nccl', 'cpu', 'cuda'),
        ('cuda:nccl', 'cuda:1', 'cuda:1'),
        ('cpu:gloo', 'cuda:1', 'cpu'),
    ],
)
def test_tensors_go_where_the_group_can_carry_them(monkeypatch, config, device, road):
    monkeypatch.setattr(dist, 'get_backend_config', lambda: config)
    assert distributed._road(torch.device(device)) == torch.device(road)


if __name__ == '__main__':
    torch.set_num_threads(1)
    if len(sys.argv) == 1:
        work()
    else:  # forks, so that PyTorch is loaded once
        fork = torch.multiprocessing.get_context('fork')
        children = [fork.Process(target=work_by_hand, args=(i, int(sys.argv[1]))) for i in range(int(sys.argv[1]))]
        for child in children:
            child.start()
        for child in children:
            child.join()
        sys.exit(any(child.exitcode for child in children))
