"""Run by `make test-colab`, beside the other tests: robustnb on what Colab has, installed as a user installs it."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import nbformat
import pytest
from colab import moved, pins, recorded, versions
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_notebook
from packaging.specifiers import SpecifierSet
from run_notebooks import COLOUR, NBS, ROOT, execute, flags_to_skip, notebooks

import robustnb

# Colab's jupyter_client is older than its Python.
pytestmark = pytest.mark.filterwarnings('ignore:datetime.datetime.utcnow:DeprecationWarning')


@pytest.fixture
def play(tmp_path):
    "Runs a notebook as Colab does: a kernel of its own, live progress bars, and no project around, but for stored results."

    def run(nb: nbformat.NotebookNode, folder: str = '.') -> nbformat.NotebookNode:
        shutil.copytree(ROOT / 'data' / 'results', tmp_path / 'data' / 'results')
        here = tmp_path / 'nbs' / folder
        here.mkdir(parents=True)
        try:
            execute(nb, here, flags_to_skip(), {'PYTHONPATH': '', 'ROBUSTNB_PLAIN': '', 'ROBUSTNB_FAST': '1'})
        except CellExecutionError as error:
            pytest.fail(COLOUR.sub('', str(error)), pytrace=False)
        return nb

    return run


def printed(nb: nbformat.NotebookNode) -> list[str]:
    "The lines that a notebook printed."
    return [line for cell in nb.cells for out in cell.outputs if out.get('name') == 'stdout' for line in out.text.splitlines()]


# ------------------------------------------------------------------------------------------------- what is installed


def test_rule_of_moving_fires_and_is_quiet():
    before = {'numpy': '2.1.3', 'torch': '2.11.0'}
    assert moved(before, {'numpy': '2.2.0'}) == ['numpy 2.1.3 -> 2.2.0', 'torch 2.11.0 -> nothing']
    assert not moved(before, before | {'captum': '0.9.0'})


def test_this_is_what_colab_has():
    assert sys.version_info[:2] == (3, 13)
    there = versions()
    other = [f'{k} {there.get(k)}, not {v}' for k, v in pins().items() if there.get(k) not in SpecifierSet(f'=={v}')]
    assert not other
    assert 'nbdev' not in there


def test_installing_robustnb_moved_nothing():
    assert 'robustnb' not in recorded()
    assert not moved(recorded(), versions())


def test_the_wheel_is_tested():
    installed = Path(robustnb.__file__).parent
    assert installed == Path(sysconfig.get_path('purelib')) / 'robustnb'
    for path in (ROOT / 'robustnb').rglob('*'):
        if path.is_file() and '__pycache__' not in path.parts:
            assert (installed / path.relative_to(ROOT / 'robustnb')).read_bytes() == path.read_bytes(), path.name
    script = 'import robustnb; print(robustnb.__file__)'
    ran = subprocess.run([sys.executable, '-c', script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == robustnb.__file__


# --------------------------------------------------------------------------------------------------------- notebooks


def test_kernel(play):
    names = 'ipykernel', 'ipython', 'ipywidgets', 'torch'
    script = f'import importlib.metadata as m, robustnb\nprint(*map(m.version, {names}), robustnb.__file__, sep="\\n")'
    assert printed(play(new_notebook(cells=[new_code_cell(script)]))) == [
        *[versions()[name] for name in names],
        robustnb.__file__,
    ]


EXPLORE = """
from robustnb.plots import figure
from robustnb.widgets import Explorer, Slider

explorer = Explorer([Slider('size', range(5))], lambda size: figure(height=size + 1)[0], lambda size: f'size is {size}')
explorer
"""
# What the page sends to the kernel when a reader moves a slider.
MOVE = """
_, box, picture, words = explorer.widget.children
slider = box.children[0]
before = bytes(picture.value)
update = {'method': 'update', 'state': {'index': 3}, 'buffer_paths': []}
slider.comm.handle_msg({'content': {'comm_id': slider.comm.comm_id, 'data': update}, 'buffers': []})
"""
SEE = """
import asyncio
for _ in range(100):
    if 'size is 3' in words.value:
        break
    await asyncio.sleep(0.1)
print(type(slider.comm).__module__, explorer.state, 'size is 3' in words.value, bytes(picture.value) != before, sep='\\n')
"""


def test_explorer(play):
    nb = play(new_notebook(cells=[new_code_cell(text) for text in (EXPLORE, MOVE, SEE)]))
    assert 'application/vnd.jupyter.widget-view+json' in nb.cells[0].outputs[0].data
    assert printed(nb) == ['ipykernel.comm.comm', "{'size': 3}", 'True', 'True']


@pytest.mark.parametrize('path', notebooks(), ids=lambda path: path.relative_to(NBS).as_posix())
def test_notebook(path, play):
    play(nbformat.read(path, as_version=4), path.parent.relative_to(NBS).as_posix())
