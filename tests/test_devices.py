"""Devices without an accelerator: the choice of a processor, seeds, and noise that belongs to a sample."""

import logging
import math
import os
import random
import subprocess
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from robustnb import devices
from robustnb.devices import (
    compile_count,
    device_of,
    env,
    fallback_ops,
    is_xla,
    matmul_precision,
    pick_device,
    progress,
    sample_normal,
    sample_uniform,
    seed_everything,
    seeded,
    selfcheck,
    sync,
    xla_safe,
)

SAMPLERS = [sample_uniform, sample_normal]
any_int = st.integers(-(2**63), 2**63 - 1)
every_sampler = pytest.mark.parametrize('sample', SAMPLERS)


# The choice of a processor


@pytest.fixture
def no_accelerator(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: False)
    monkeypatch.setattr(devices, '_tpu_is_present', lambda: False)


@pytest.mark.parametrize(
    'tpu, cuda, mps, expected',
    [(0, 0, 0, 'cpu'), (0, 0, 1, 'mps'), (0, 1, 0, 'cuda'), (0, 1, 1, 'cuda'), (1, 1, 1, 'xla'), (1, 0, 0, 'xla')],
)
def test_order_of_preference(monkeypatch, tpu, cuda, mps, expected):
    monkeypatch.setattr(devices, '_tpu_is_present', lambda: bool(tpu))
    monkeypatch.setattr(devices, '_xla_device', lambda: torch.device('xla:0'))
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: bool(cuda))
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: bool(mps))
    assert pick_device().type == expected


@pytest.mark.parametrize('prefer', ['cpu', 'cuda', 'cuda:1', 'mps', torch.device('cpu'), torch.device('cuda', 3)])
def test_an_insisted_device_is_taken_at_its_word(prefer):
    assert pick_device(prefer) == torch.device(prefer)


def test_xla_is_never_chosen_by_itself_on_a_cpu():
    script = (
        'import os, sys; from robustnb.devices import compile_count, env, pick_device\n'
        'for _ in range(2):\n'
        '    assert pick_device().type != "xla", pick_device()\n'
        '    env(); assert compile_count() == 0\n'
        '    assert "torch_xla" not in sys.modules\n'
        '    os.environ.pop("PJRT_DEVICE", None)'
    )
    environment = os.environ | {'PJRT_DEVICE': 'CPU'}
    ran = subprocess.run([sys.executable, '-c', script], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize('prefer', ['xla', 'tpu', 'xla:0', torch.device('xla')])
def test_xla_where_it_is_not_installed(monkeypatch, prefer):
    monkeypatch.setattr(devices.importlib.util, 'find_spec', lambda name: None)
    assert not devices._tpu_is_present()
    with pytest.raises(ValueError, match=r'robustnb\[tpu\]'):
        pick_device(prefer)


def test_a_google_network_card_is_not_a_tpu(monkeypatch, tmp_path):
    (tmp_path / 'card').mkdir()
    (tmp_path / 'card' / 'vendor').write_text('0x1ae0\n')
    asked = []
    runtime = types.ModuleType('torch_xla.runtime')
    runtime.device_type = lambda: asked.append(1) or 'CPU'
    package = types.ModuleType('torch_xla')
    package.runtime = runtime
    monkeypatch.setitem(sys.modules, 'torch_xla', package)
    monkeypatch.setitem(sys.modules, 'torch_xla.runtime', runtime)
    monkeypatch.setattr(devices.importlib.util, 'find_spec', lambda name: object())
    monkeypatch.setattr(devices, 'Path', lambda path: tmp_path)
    monkeypatch.delenv('PJRT_DEVICE', raising=False)
    assert not devices._tpu_is_present() and asked
    runtime.device_type = lambda: 'TPU'
    assert devices._tpu_is_present()


class BuffersOnly(nn.Module):
    def __init__(self, device):
        super().__init__()
        self.register_buffer('table', torch.zeros(2, device=device))


@pytest.mark.parametrize(
    'model, expected',
    [
        (nn.ReLU(), 'cpu'),
        (nn.Linear(2, 2, device='meta'), 'meta'),
        (nn.Sequential(nn.ReLU(), nn.Linear(2, 2, device='meta')), 'meta'),
        (BuffersOnly('meta'), 'meta'),
        (nn.BatchNorm1d(3, affine=False), 'cpu'),
        (nn.LazyLinear(3), 'cpu'),
    ],
)
def test_device_of(model, expected):
    assert device_of(model) == torch.device(expected)


def test_is_xla_of_devices_and_tensors():
    assert is_xla(torch.device('xla')) and is_xla(torch.device('xla', 0))
    assert not is_xla(torch.device('cpu')) and not is_xla(torch.zeros(1)) and not is_xla(torch.zeros(1, device='meta'))


@pytest.mark.parametrize('wait', [False, True])
@pytest.mark.parametrize('device', [None, torch.device('cpu'), torch.device('meta')])
def test_sync_is_harmless_elsewhere(device, wait):
    assert sync(device, wait=wait) is None


def test_sync_waits_for_a_gpu_only_when_asked(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, 'synchronize', lambda: waited.append('cuda'))
    sync(torch.device('cuda'))
    assert not waited
    sync(torch.device('cuda'), wait=True)
    assert waited == ['cuda']


# Batch normalisation as arithmetic


def batch_norm(kind, affine, track):
    with seeded(4):
        layer = kind(5, affine=affine, track_running_stats=track)
        if affine:
            nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
        if track:
            nn.init.normal_(layer.running_mean), nn.init.uniform_(layer.running_var, 0.5, 2)
    return layer.eval()


@pytest.mark.parametrize('track', [True, False])
@pytest.mark.parametrize('affine', [True, False])
@pytest.mark.parametrize(
    'kind, shape',
    [(nn.BatchNorm1d, (5,)), (nn.BatchNorm1d, (5, 6)), (nn.BatchNorm2d, (5, 3, 2)), (nn.BatchNorm3d, (5, 2, 3, 2))],
)
def test_batch_norm_as_arithmetic_equals_batch_norm(kind, shape, affine, track):
    layer = batch_norm(kind, affine, track).double()
    x = sample_normal(shape, torch.arange(4)).double().requires_grad_()
    expected = layer(x)
    with devices._BatchNormAsArithmetic():
        arithmetic = layer(x)
    torch.testing.assert_close(arithmetic, expected, rtol=1e-10, atol=1e-12)
    inputs = (x, *layer.parameters())
    weights = torch.linspace(-1, 1, expected.numel(), dtype=x.dtype).view_as(expected)
    for a, b in zip(
        torch.autograd.grad((arithmetic * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_batch_norm_in_training_is_left_alone():
    a, b = batch_norm(nn.BatchNorm1d, True, True).train(), batch_norm(nn.BatchNorm1d, True, True).train()
    x = sample_normal((5,), torch.arange(8))
    with devices._BatchNormAsArithmetic():
        inside = a(x)
    assert torch.equal(inside, b(x))
    assert torch.equal(a.running_mean, b.running_mean) and a.num_batches_tracked == b.num_batches_tracked == 1


@pytest.mark.parametrize('by_keyword', [False, True])
def test_functional_batch_norm_is_caught(by_keyword):
    x, mean, var, weight, bias = sample_normal((5, 3), torch.arange(5))[:, :, 0].abs()[None], *torch.rand(4, 5)
    if by_keyword:
        call = lambda: F.batch_norm(  # noqa: E731
            input=x, running_mean=mean, running_var=var, weight=weight, bias=bias, training=False, eps=0.1
        )
    else:
        call = lambda: F.batch_norm(x, mean, var, weight, bias, False, 0.1, 0.1)  # noqa: E731
    expected = call()
    with devices._BatchNormAsArithmetic():
        assert torch.allclose(call(), expected, atol=1e-6)


def test_xla_safe_does_nothing_elsewhere():
    layer = batch_norm(nn.BatchNorm1d, True, True)
    x = torch.rand(3, 5)
    with xla_safe(layer):
        assert torch.overrides._len_torch_function_stack() == 0
        inside = layer(x)
    assert torch.equal(inside, layer(x))


def test_arithmetic_ends_with_its_block():
    with pytest.raises(KeyError), devices._BatchNormAsArithmetic():
        raise KeyError
    assert torch.overrides._len_torch_function_stack() == 0


# Seeds

SEEDS = [0, 1, -1, 313, 2**31, 2**32, 2**63 - 1, -(2**63), 2**64 - 1, 2**70 + 1, np.int64(7), np.uint8(7), True]


@pytest.fixture
def generators():
    "The global generators, given back after a test."
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(state[0]), np.random.set_state(state[1]), torch.set_rng_state(state[2])


def draws():
    return random.random(), np.random.rand(), float(torch.rand(()))


@pytest.mark.parametrize('seed', SEEDS)
def test_seed_everything_repeats(generators, seed):
    seed_everything(seed)
    first = draws()
    seed_everything(seed)
    assert draws() == first
    seed_everything(seed + 1 if seed is not True else 0)
    assert all(a != b for a, b in zip(draws(), first, strict=True))


def test_deterministic_only_when_asked(generators):
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    try:
        seed_everything(1)
        assert (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark) == before
        seed_everything(1, deterministic=True)
        assert torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


@pytest.mark.parametrize('seed', SEEDS)
def test_seeded_repeats_and_gives_the_generator_back(seed):
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    with seeded(seed):
        first = torch.rand(3)
        with seeded(1):
            torch.rand(100)
        second = torch.rand(3)
    with seeded(seed):
        assert torch.equal(torch.rand(6), torch.cat([first, second])), 'an inner block disturbs the outer one'
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all() and random.getstate() == before[2]


@pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt, StopIteration])
def test_seeded_gives_the_generator_back_after_an_error(error):
    before = torch.get_rng_state()
    with pytest.raises(error), seeded(3):
        torch.rand(5)
        raise error
    assert torch.equal(torch.get_rng_state(), before)


def test_threads_take_turns_with_the_generator():
    def draws(seed: int, pause: float = 0.0) -> torch.Tensor:
        with seeded(seed):
            first = torch.rand(3)
            time.sleep(pause)
            with seeded(seed + 10):  # the same thread may come in again
                inner = torch.rand(3)
            return torch.cat([first, inner, torch.rand(3)])

    before = torch.get_rng_state()
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(draws, range(8), [0.01] * 8))
    assert all(torch.equal(found, draws(seed)) for seed, found in enumerate(together))
    assert torch.equal(torch.get_rng_state(), before)


def test_seeded_as_a_decorator():
    make = seeded(5)(lambda: nn.Linear(3, 3).weight.detach())
    assert torch.equal(make(), make())


@pytest.mark.parametrize('seed', [1.5, '1', None])
def test_a_seed_is_an_integer(generators, seed):
    with pytest.raises(TypeError):
        seed_everything(seed)
    with pytest.raises(TypeError), seeded(seed):
        pass
    with pytest.raises(TypeError):
        sample_uniform((1,), torch.arange(2), seed=seed)


# Noise that belongs to a sample: literally


def mixed(z):
    "SplitMix64 with Python's unbounded integers, as published."
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return z ^ (z >> 31)


def literal_bits(shape, ids, seed, stream):
    golden = 0x9E3779B97F4A7C15
    out = []
    for i in ids:
        key = 0
        for part in (seed, stream, i):
            key = mixed(((key ^ (part % 2**64)) + golden) % 2**64)
        out.append([mixed((key + (k + 1) * golden) % 2**64) for k in range(math.prod(shape))])
    return out


@settings(max_examples=50, deadline=None)
@given(st.lists(any_int, min_size=0, max_size=4), st.sampled_from([(), (1,), (3,), (2, 3), (0,)]), any_int, any_int)
def test_noise_is_the_published_function(ids, shape, seed, stream):
    bits = literal_bits(shape, ids, seed, stream)
    tensor = torch.tensor(ids, dtype=torch.int64)
    uniform = torch.tensor([[(b >> 40) / 2**24 for b in row] for row in bits]).reshape(len(ids), *shape)
    assert torch.equal(sample_uniform(shape, tensor, seed, stream), uniform)
    normal = [
        [
            math.sqrt(-2 * math.log(((b >> 40) + 1) / 2**24)) * math.cos(2 * math.pi * ((b >> 16) % 2**24) / 2**24)
            for b in row
        ]
        for row in bits
    ]
    torch.testing.assert_close(
        sample_normal(shape, tensor, seed, stream), torch.tensor(normal).reshape(len(ids), *shape), rtol=1e-4, atol=2e-6
    )


def test_splitmix_first_values():
    "The first numbers of SplitMix64 for seed 1234567, as its reference implementation prints them."
    state, golden, expected = 1234567, devices._GOLDEN, [6457827717110365317, 3203168211198807973, 9817491932198370423]
    got = devices._mix(torch.tensor([state]) + torch.arange(1, 4) * golden)
    assert [int(v) % 2**64 for v in got] == expected


# Noise that belongs to a sample: promises


@every_sampler
@given(ids=st.lists(any_int, min_size=1, max_size=8), seed=any_int, stream=any_int, order=st.randoms())
@settings(max_examples=50, deadline=None)
def test_noise_depends_on_the_sample_alone(sample, ids, seed, stream, order):
    batch = sample((3, 2), torch.tensor(ids), seed, stream)
    assert batch.shape == (len(ids), 3, 2) and batch.dtype == torch.float32 and batch.is_contiguous()
    places = list(range(len(ids)))
    order.shuffle(places)
    shuffled = sample((3, 2), torch.tensor(ids)[places], seed, stream)
    assert torch.equal(shuffled, batch[places])
    for place, i in enumerate(ids):
        assert torch.equal(sample((3, 2), torch.tensor([i]), seed, stream)[0], batch[place])


@every_sampler
@pytest.mark.parametrize('dtype', [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_noise_for_ids_of_any_integer_type(sample, dtype):
    ids = torch.arange(20)
    assert torch.equal(sample((4,), ids.to(dtype)), sample((4,), ids))


@every_sampler
def test_noise_for_ids_in_any_layout(sample):
    table = torch.arange(24).view(4, 6)
    for ids in (table[:, 2], table.flatten()[::5], table.flatten().flip(0)[::2], table.t()[1].expand(4)):
        assert torch.equal(sample((4,), ids), sample((4,), ids.clone()))


@every_sampler
def test_noise_far_out(sample):
    ids = torch.tensor([0, 2**31, 2**32, 2**40, 2**40 + 1, 2**62, -1])
    noise = sample((64,), ids)
    assert noise.isfinite().all()
    assert len({tuple(row.tolist()) for row in noise}) == len(ids)


@every_sampler
@pytest.mark.parametrize('shape', [(), (1,), (0,), (2, 0, 3), (1, 2, 3)])
@pytest.mark.parametrize('batch', [0, 1, 3])
def test_noise_shapes(sample, shape, batch):
    assert sample(shape, torch.arange(batch)).shape == (batch, *shape)
    assert sample(torch.Size(shape), torch.arange(batch)).shape == (batch, *shape)


@every_sampler
@pytest.mark.parametrize(
    'ids', [[1, 2], range(3), np.arange(3), torch.tensor(3), torch.ones(2), torch.ones(2, 2).long()]
)
def test_ids_are_a_tensor_of_integers(sample, ids):
    with pytest.raises(TypeError, match=r'tensor of integers, \(batch,\)'):
        sample((2,), ids)


@every_sampler
def test_noise_leaves_the_generators_alone(sample):
    before = torch.get_rng_state()
    sample((100,), torch.arange(10))
    assert torch.equal(torch.get_rng_state(), before)


@every_sampler
def test_noise_in_a_thread_and_in_inference_mode(sample):
    expected, found = sample((5,), torch.arange(3)), []
    thread = threading.Thread(target=lambda: found.append(sample((5,), torch.arange(3))))
    thread.start(), thread.join()
    with torch.inference_mode():
        found.append(sample((5,), torch.arange(3)))
    assert all(torch.equal(f, expected) for f in found)


@every_sampler
def test_seed_stream_and_id_do_not_stand_for_each_other(sample):
    "Restart 1 of experiment 0 is not restart 0 of experiment 1, and so on for all small numbers."
    ids = torch.arange(8)
    rows = [row for seed in range(-4, 8) for stream in range(8) for row in sample((4,), ids, seed, stream).tolist()]
    assert len(set(map(tuple, rows))) == len(rows)


# Noise that belongs to a sample: quality. Seeds are fixed, so nothing here can fail by chance.

DRAWS = {
    'elements': lambda sample, seed: sample((40_000,), torch.tensor([5]), seed),
    'ids': lambda sample, seed: sample((1,), torch.arange(40_000), seed),
    'far ids': lambda sample, seed: sample((1,), torch.arange(40_000) * 2**20, seed),
    'negative ids': lambda sample, seed: sample((1,), -torch.arange(40_000), seed),
    'seeds': lambda sample, seed: torch.cat([sample((8,), torch.tensor([0]), seed + s) for s in range(600)]).t(),
    'streams': lambda sample, seed: torch.cat([sample((8,), torch.tensor([0]), seed, s) for s in range(600)]).t(),
}
every_draw = pytest.mark.parametrize(
    'kind, seed', [(k, s) for k in DRAWS for s in ((0,) if k in ('seeds', 'streams') else (0, 1, -7))]
)


@every_draw
def test_uniform_is_uniform(kind, seed):
    u = DRAWS[kind](sample_uniform, seed).flatten().double().numpy()
    assert u.min() >= 0 and u.max() < 1
    assert stats.chisquare(np.histogram(u, 64, (0, 1))[0]).pvalue > 1e-4
    assert stats.kstest(u, 'uniform').pvalue > 1e-4
    pairs = np.histogram2d(u[::2], u[1::2], 16, [(0, 1), (0, 1)])[0].ravel()
    assert stats.chisquare(pairs).pvalue > 1e-4, 'neighbours depend on each other'
    last_bits = (u * 2**24).astype(np.int64) % 16
    assert stats.chisquare(np.bincount(last_bits, minlength=16)).pvalue > 1e-4, 'low bits are not random'


@every_draw
def test_normal_is_normal(kind, seed):
    z = DRAWS[kind](sample_normal, seed).flatten().double().numpy()
    n = len(z)
    assert np.isfinite(z).all()
    assert stats.kstest(z, 'norm').pvalue > 1e-4
    assert abs(z.mean()) < 4 / math.sqrt(n) and abs(z.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs(np.corrcoef(z[:-1], z[1:])[0, 1]) < 4 / math.sqrt(n)
    assert abs(np.corrcoef(z[:-1] ** 2, z[1:] ** 2)[0, 1]) < 5 / math.sqrt(n), (
        'sizes of neighbours depend on each other'
    )


@every_sampler
@pytest.mark.parametrize(
    'other',
    [dict(seed=1), dict(seed=-1), dict(seed=2**40), dict(stream=1), dict(stream=2), dict(seed=1, stream=1)],
    ids=str,
)
def test_other_seeds_and_streams_are_uncorrelated(sample, other):
    ids = torch.arange(50)
    a, b = sample((1000,), ids).flatten().numpy(), sample((1000,), ids, **other).flatten().numpy()
    for lag in (0, 1, 1000):
        assert abs(np.corrcoef(a[lag:], b[: len(b) - lag])[0, 1]) < 4 / math.sqrt(len(a))


def test_uniform_and_normal_extremes_stay_finite():
    "The smallest and the largest radius that the bits allow."
    bits = torch.tensor([0, -1])
    radius = (-2 * ((devices._shift(bits, 40) + 1).float() * 2.0**-24).log()).sqrt()
    assert radius.isfinite().all() and radius[1] == 0 and 5 < radius[0] < 6


@pytest.mark.parametrize('places', [1, 16, 30, 40, 63])
def test_shift_fills_with_zeros(places):
    numbers = [0, 1, -1, 2**62, -(2**63), 2**63 - 1, -12345]
    expected = [(n % 2**64) >> places for n in numbers]
    assert devices._shift(torch.tensor(numbers), places).tolist() == expected


# Reports


@pytest.mark.parametrize('plain', [True, False])
@pytest.mark.parametrize('show', [True, False])
def test_progress_yields_the_items(monkeypatch, capsys, plain, show):
    monkeypatch.setenv('ROBUSTNB_PLAIN', '1' if plain else '')
    assert list(progress(range(4), 'counting', show=show)) == [0, 1, 2, 3]
    assert list(progress((i for i in 'ab'), 'letters', total=2, show=show)) == ['a', 'b']
    seen = capsys.readouterr()
    assert not seen.out
    assert ('counting' in seen.err) == show


def test_progress_ends_with_an_error(capsys):
    def broken():
        yield 1
        raise KeyError('here')

    with pytest.raises(KeyError, match='here'):
        list(progress(broken(), 'counting', show=False))


def test_env_is_one_line():
    line = env()
    assert '\n' not in line and len(line) < 250
    for word in ('robustnb', 'Python', f'torch {torch.__version__.split("+")[0]}', 'numpy', 'cpu'):
        assert word in line


def test_env_where_packages_are_absent(monkeypatch, no_accelerator):
    def absent(name):
        raise devices.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(devices.importlib.metadata, 'version', absent)
    assert 'torch_xla absent' in env() and 'cpu (' in env()


@pytest.mark.parametrize('device', [None, 'cpu', torch.device('cpu')])
def test_selfcheck_on_cpu(no_accelerator, device):
    before = torch.get_rng_state()
    table = selfcheck(device)
    assert list(table) == ['check', 'passed', 'seen', 'seconds'] and len(table) == 7
    assert table.passed.all(), table.to_string()
    assert (table.seen == 0).all(), 'the CPU differs from itself'
    assert torch.equal(torch.get_rng_state(), before)


def test_selfcheck_within_no_grad(no_accelerator):
    with torch.no_grad():
        assert selfcheck('cpu').passed.all()
        assert not torch.is_grad_enabled()


def test_selfcheck_reports_what_fails(monkeypatch, no_accelerator):
    def broken(device, images):
        raise RuntimeError('out of order')

    monkeypatch.setattr(devices, '_check_gradient', broken)
    monkeypatch.setattr(devices, '_difference', lambda a, b: float('nan'))
    table = selfcheck('cpu').set_index('check')
    assert table.seen['gradient through frozen batch norm'] == 'RuntimeError: out of order'
    counts = {name for name in table.index if 'compilations' in name or 'handed back' in name}
    assert len(counts) == 3 and table.passed.to_dict() == {name: name in counts for name in table.index}


def test_the_package_is_quiet(caplog, capsys):
    with caplog.at_level(logging.INFO):
        selfcheck('cpu')
    assert not capsys.readouterr().out and not caplog.records


def test_compile_count_is_a_count():
    assert isinstance(compile_count(), int) and compile_count() >= 0


def test_no_operation_falls_back_without_xla(no_xla):
    assert fallback_ops() == [] and compile_count() == 0


def test_a_read_is_no_fallback(monkeypatch):
    "XLA counts what Python reads, `float(x)`, among the operations that it did not do itself."
    seen = ['aten::nonzero', 'aten::_local_scalar_dense', 'aten::bincount']
    metrics = types.SimpleNamespace(executed_fallback_ops=lambda: seen, metric_data=lambda name: None)
    monkeypatch.setitem(sys.modules, 'torch_xla', types.ModuleType('torch_xla'))
    monkeypatch.setitem(sys.modules, 'torch_xla.debug', types.SimpleNamespace(metrics=metrics))
    assert fallback_ops() == ['aten::bincount', 'aten::nonzero'] and compile_count() == 0


@pytest.fixture
def no_xla(monkeypatch):
    monkeypatch.delitem(sys.modules, 'torch_xla', raising=False)


@pytest.mark.parametrize('level', [None, 'default', 'high', 'highest'])
def test_precision_is_left_alone_without_xla(no_accelerator, level):
    before = torch.get_float32_matmul_precision()
    assert matmul_precision(level) == before == torch.get_float32_matmul_precision()


@pytest.mark.parametrize('level', ['', 'medium', 'Highest', 3, True])
@pytest.mark.parametrize('device', ['cpu', 'xla'])
def test_a_level_has_three_names(level, device):
    with pytest.raises(ValueError, match="'default', 'high' or 'highest'"):
        matmul_precision(level, device)


@pytest.fixture
def pretended_xla(monkeypatch):
    "What `matmul_precision` says to an XLA that is not there: the levels that were set."
    said = []
    backends = types.SimpleNamespace(
        set_mat_mul_precision=said.append, get_mat_mul_precision=lambda: said[-1] if said else 'default'
    )
    package = types.ModuleType('torch_xla')
    package.backends = backends
    monkeypatch.setitem(sys.modules, 'torch_xla', package)
    monkeypatch.setattr(devices, '_xla_device', lambda: torch.device('xla:0'))
    monkeypatch.setattr(devices, 'compile_count', lambda: len(said) * 3)
    return said


def test_precision_is_set_once_and_before_the_first_program(pretended_xla, caplog):
    assert matmul_precision(device='xla') == 'default' == matmul_precision('default', 'tpu') and not pretended_xla
    assert matmul_precision('highest', 'xla') == 'highest' == matmul_precision('highest', 'xla') == matmul_precision(None, 'xla')
    assert pretended_xla == ['highest'] and not caplog.records
    assert matmul_precision('high', 'xla') == 'high' and '3 programs are compiled already' in caplog.text


def test_env_describes_the_device_that_is_named(monkeypatch, no_accelerator):
    assert env('cpu') == env() and env('cpu').endswith(f'cpu ({torch.get_num_threads()} threads)')
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: f'card {device.index}')
    assert env('cuda:1').endswith('cuda (card 1)')


@pytest.mark.parametrize('device', ['cpu', torch.device('cpu')])
def test_a_step_of_a_sweep_removes_what_it_says(device):
    images = sample_uniform((1, 8, 8), torch.arange(4))
    stacked, programs = devices._check_sweep(torch.device(device), images)
    net = devices._check_net(torch.device('cpu'))
    whole = net[0].weight.detach().clone()
    for row, stop in zip(stacked, range(1, 33), strict=True):
        with torch.no_grad():
            net[0].weight.copy_(whole).view(-1)[stop // 2:stop] = 0
            torch.testing.assert_close(row, net(images))
    assert programs == 0 and stacked.shape == (32, 4, 10)


def test_a_model_comes_first():
    with pytest.raises(TypeError, match='the model comes first'):
        device_of((torch.zeros(2), torch.zeros(2)))
