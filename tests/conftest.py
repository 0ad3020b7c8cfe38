"""What every test finds: a quiet, private environment, the project's folder, and real data where there are some."""

import atexit
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

# Before anything imports torch_xla, matplotlib or IPython. Its history file is one database that runs would share.
os.environ['PJRT_DEVICE'] = 'CPU'
# Hundreds of programs run once or twice each: to compile them well takes three times as long as all the rest.
os.environ.setdefault('XLA_FLAGS', '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true')
os.environ.setdefault('MPLBACKEND', 'Agg')
os.environ.setdefault('OMP_WAIT_POLICY', 'passive')  # threads that spin while they wait slow down everybody on a busy machine
if 'PYTEST_XDIST_WORKER' in os.environ:  # one of several processes: a core each, for them and for what they start
    os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ['IPYTHONDIR'] = tempfile.mkdtemp(prefix='robustnb-ipython-')
atexit.register(shutil.rmtree, os.environ['IPYTHONDIR'], ignore_errors=True)

if importlib.util.find_spec('hypothesis'):  # the environment of the benchmarks does without
    from hypothesis import settings

    settings.register_profile('seeded', derandomize=True)
    settings.load_profile('seeded')

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope='session')
def root() -> Path:
    "The project's folder."
    return ROOT


@pytest.fixture(scope='session')
def data_root() -> Path:
    "The folder of real data sets: `ROBUSTNB_DATA`, or shared/data beside the project."
    folder = Path(os.environ.get('ROBUSTNB_DATA') or ROOT.parent / 'shared' / 'data')
    if not folder.is_dir():
        pytest.skip(f'no real data: {folder} is not a folder (ROBUSTNB_DATA names another one)')
    return folder


@pytest.fixture(scope='module')
def in_two_processes(request, tmp_path_factory) -> Path:
    "The folder where two processes under torchrun, which ran the test's own file as a script, have left what they found."
    folder = tmp_path_factory.mktemp('processes')
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', request.path, folder]
    beside = {'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(Path(__file__).parent)}  # even if Python does not look beside scripts
    found = subprocess.run(command, env=os.environ | beside, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr[-4000:]
    return folder


@pytest.fixture(scope='module')
def net():
    "A small network for 8x8 images and four classes, with what makes attacks stumble: batch norm and dropout."
    from torch import nn

    from robustnb.devices import seeded

    with seeded(0):
        return nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(288, 4)
        )
