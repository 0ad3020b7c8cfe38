"""Run notebooks for their committed outputs. Two runs give the same bytes.

    python tools/run_notebooks.py                       # all of them
    python tools/run_notebooks.py nbs/30_lsa.ipynb      # some
    python tools/run_notebooks.py --flags data          # also the cells that need real data

A cell marked `#| eval: false`, or with one of the flags in settings.ini (`slow`, `data`, `gpu`, ...) that is not asked
for, is left as it stands, outputs included.
"""

import argparse
import os
import re
import sys
import tempfile
import time
from configparser import ConfigParser
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

os.environ.setdefault('OMP_WAIT_POLICY', 'passive')  # threads that spin while they wait slow down everybody on a busy machine

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / 'nbs'
KERNEL = 'python3'
CELL_TIMEOUT = 7200  # seconds; an experiment may be computed in one cell

# Widgets, styled tables and HTML reprs take their ids from uuid4.
STABLE_IDS = """
def _stable_ids():
    import random, uuid
    generator = random.Random(0)
    uuid.uuid4 = lambda: uuid.UUID(int=generator.getrandbits(128), version=4)
_stable_ids()
del _stable_ids
"""

DIRECTIVE = re.compile(r'^#\|\s*(\S+)[ \t]*(.*?)\s*$', re.M)
MACHINE_PATH = re.compile(r'(?<![\w+.])/(?:root|home|tmp|work|Users|var/folders)\b')
_PATH = re.compile(r'(?<![\w+.])(?:/[\w.+@~-]+)+')
_TEMPORARY_NAME = re.compile(r'\btmp[a-z0-9_]{8}\b')
COLOUR = re.compile(r'\x1b\[[\d;]*m')


def notebooks(folder: Path = NBS) -> list[Path]:
    "All notebooks under `folder`, in reading order, without checkpoints and private ones."
    return sorted(
        path
        for path in folder.rglob('*.ipynb')
        if not any(part.startswith(('.', '_')) for part in path.relative_to(folder).parts)
    )


def directives(source: str) -> dict[str, str]:
    "The `#| name value` lines of a cell: `{'eval:': 'false', 'export': ''}`."
    return dict(DIRECTIVE.findall(source))


def flags_to_skip() -> set[str]:
    "The flags of settings.ini that mark cells to leave out."
    config = ConfigParser(delimiters=['='])
    config.read(ROOT / 'settings.ini', encoding='utf-8')
    return set(config['DEFAULT']['tst_flags'].split())


def left_out(source: str, skip_flags: set[str]) -> bool:
    "Whether a cell is not to be run: `#| eval: false`, or one of `skip_flags`."
    marks = directives(source)
    return marks.get('eval:', '').lower() == 'false' or bool(skip_flags & marks.keys())


def size_limit(path: Path) -> int:
    "The most bytes a committed notebook may have: less for a component, which stands directly in nbs/."
    return 400_000 if path.parent == NBS else 1_000_000


class Runner(NotebookClient):
    "A notebook client that leaves out the cells that nbdev's tests leave out."

    skip_flags: set[str] = set()

    async def async_execute_cell(self, cell, cell_index, **kwargs):
        if cell.cell_type == 'code' and left_out(cell.source, self.skip_flags):
            return cell
        return await super().async_execute_cell(cell, cell_index, **kwargs)


def execute(nb: nbformat.NotebookNode, folder: Path, skip_flags: set[str], variables: dict[str, str]) -> None:
    "Run the cells of `nb` in a fresh kernel that stands in `folder` and has these environment variables."
    with tempfile.TemporaryDirectory() as ipython_dir:
        env = os.environ | {
            'IPYTHONDIR': ipython_dir,
            'PJRT_DEVICE': 'CPU',
            'PYTHONHASHSEED': '0',
            **variables,
        }
        runner = Runner(
            nb,
            timeout=CELL_TIMEOUT,
            kernel_name=KERNEL,
            coalesce_streams=True,
            store_widget_state=False,
            extra_arguments=['--log-level=ERROR'],
            resources={'metadata': {'path': str(folder)}},
        )
        runner.skip_flags = skip_flags
        nb.cells.insert(0, nbformat.v4.new_code_cell(STABLE_IDS))
        try:
            runner.execute(env=env)
        finally:
            nb.cells.pop(0)


def _without_folders(path: re.Match) -> str:
    "A path in the project relative to it, the last part of another path of this machine, any other path as it is."
    whole = Path(path[0])
    installed = 'site-packages' in whole.parts
    if whole.is_relative_to(ROOT) and not installed:
        return str(whole.relative_to(ROOT))
    return whole.name if installed or MACHINE_PATH.match(path[0]) else path[0]


def without_paths(text: str) -> str:
    "`text` without the folders of this machine and the random names of temporary ones."
    return _PATH.sub(_without_folders, _TEMPORARY_NAME.sub('tmp', text))


def _tidy(nb: nbformat.NotebookNode) -> None:
    "Drop from `nb` what differs between runs and machines, and what a page on GitHub cannot show."
    nb.metadata.pop('widgets', None)
    nb.metadata.pop('jupytext', None)
    nb.metadata.kernelspec = {'display_name': KERNEL, 'language': 'python', 'name': KERNEL}
    for cell in nb.cells:
        if cell.cell_type != 'code':
            continue
        cell.execution_count = None
        cell.outputs = [out for out in cell.outputs if not (out.output_type == 'stream' and out.name == 'stderr')]
        for out in cell.outputs:
            if 'text' in out:
                out.text = without_paths(out.text)
            data = out.get('data', {})
            for mime in [mime for mime in data if 'jupyter.widget' in mime]:
                del data[mime]
            for mime, value in data.items():
                if isinstance(value, str) and (mime.startswith('text/') or mime == 'image/svg+xml'):
                    data[mime] = without_paths(value)


def run(path: Path, skip_flags: set[str]) -> None:
    "Run the notebook at `path` and write its outputs into it. A cell that fails leaves the file as it was."
    from nbdev.clean import nbdev_clean

    nb = nbformat.read(path, as_version=4)
    execute(nb, path.parent, skip_flags, {'PYTHONPATH': str(ROOT), 'ROBUSTNB_PLAIN': '1'})
    _tidy(nb)
    nbformat.write(nb, path)
    nbdev_clean.__wrapped__(fname=str(path))  # the function itself: the decorated one reads the command line


def main() -> int:
    "Run what the command line names; the exit code says whether all is well."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('paths', nargs='*', type=Path, help='notebooks; all in nbs/ if none is named')
    parser.add_argument('--flags', default='', help='flags of cells to run too, separated by spaces')
    args = parser.parse_args()
    skip_flags = flags_to_skip() - set(args.flags.split())
    paths, failures = [path.resolve() for path in args.paths] or notebooks(), 0
    os.chdir(ROOT)  # where nbdev looks for settings.ini
    for path in paths:
        start, problem = time.perf_counter(), ''
        try:
            run(path, skip_flags)
        except CellExecutionError as error:
            problem = f'  FAILED\n{COLOUR.sub("", str(error))}'
        size = path.stat().st_size
        if not problem and size > size_limit(path):
            problem = f'  TOO LARGE: at most {size_limit(path) / 1000:.0f} kB'
        failures += bool(problem)
        name = os.path.relpath(path, ROOT)
        print(f'{name:44} {time.perf_counter() - start:6.1f} s {size / 1000:8.1f} kB{problem}', flush=True)
    return min(failures, 1)


if __name__ == '__main__':
    sys.exit(main())
