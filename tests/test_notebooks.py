"""Every notebook runs, and leaves the process as it found it."""

import random
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from run_notebooks import NBS, ROOT, flags_to_skip, notebooks

# The module: its function, imported by name, would be collected as a test.
nbdev_test = pytest.importorskip('nbdev.test', reason='nbdev is not installed; tests/colab runs notebooks without it')


def global_state() -> dict:
    "What a notebook could leave behind for the next one."
    return {
        'default dtype': torch.get_default_dtype(),
        'default device': torch.get_default_device(),
        'gradients': torch.is_grad_enabled(),
        'inference mode': torch.is_inference_mode_enabled(),
        'deterministic algorithms': torch.are_deterministic_algorithms_enabled(),
        'threads': torch.get_num_threads(),
        'global hooks': [
            len(v) for k, v in vars(torch.nn.modules.module).items() if k.startswith('_global_') and isinstance(v, dict)
        ],
        'figure style': {k: v for k, v in plt.rcParams.items() if k not in ('backend', 'interactive')},
    }


@pytest.fixture
def process(monkeypatch):
    "The process as it was: import path, environment, figures and random generators."
    monkeypatch.setattr(sys, 'path', list(sys.path))
    monkeypatch.setenv('IN_TEST', '1')
    monkeypatch.setenv('ROBUSTNB_FAST', '1')
    python, numpy, pytorch = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    plt.close('all')
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(pytorch)


@pytest.mark.parametrize('path', notebooks(), ids=lambda path: path.relative_to(NBS).as_posix())
def test_notebook(path, process):
    before = global_state()
    passed, _ = nbdev_test.test_nb(path, skip_flags=flags_to_skip(), basepath=ROOT)
    after = global_state()
    assert passed, 'a cell failed: its traceback is on standard error, below'
    assert after == before, 'the notebook changed something for everybody in this process'
