"""The numbers of nbs/experiments/parity.ipynb, for readers who do not have the other libraries: runs its cells, keeps its tables.

python tests/bench/parity.py        # in .venv-bench; about two minutes; writes data/results/parity.json
"""

import json
import re
from importlib.metadata import version
from pathlib import Path

import torch

from robustnb.results import provenance

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / 'nbs' / 'experiments' / 'parity.ipynb'
RESULTS = ROOT / 'data' / 'results' / 'parity.json'


def code(notebook: Path) -> list[str]:
    "The code cells of a notebook that are meant to run everywhere."
    cells = [''.join(cell['source']) for cell in json.loads(notebook.read_text())['cells'] if cell['cell_type'] == 'code']
    return [cell for cell in cells if '#| eval: false' not in cell]


def main() -> None:
    torch.set_num_threads(1)
    namespace: dict = {}
    for cell in code(NOTEBOOK):
        exec(compile(cell, NOTEBOOK.name, 'exec'), namespace)
    if not namespace['TOGETHER']:
        raise SystemExit('torchattacks, foolbox and ART are not all here: run this with the Python of .venv-bench')
    libraries = ('torchattacks', 'foolbox', 'adversarial-robustness-toolbox')
    about = {
        'command': 'python tests/bench/parity.py',
        'versions': provenance() | {library: version(library) for library in libraries},
        'seed': 0,
        'threads': 1,
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(about | {'tables': namespace['NUMBERS']}, indent=1)
    # Lists and objects that hold no other: a line each.
    text = re.sub(r'[\[{][^][{}]*[]}]', lambda found: ' '.join(found[0].split()), text)
    RESULTS.write_text(text + '\n')
    print(f'wrote {RESULTS.relative_to(ROOT)}')


if __name__ == '__main__':
    main()
