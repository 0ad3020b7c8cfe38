"""The built wheel alone, in an empty environment and an empty folder, does what the README promises."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from run_notebooks import NBS, ROOT, flags_to_skip, left_out

LOADING_TAGS = {
    'script',
    'img',
    'iframe',
    'source',
    'video',
    'audio',
    'embed',
    'object',
    'link',
    'image',
    'use',
    'track',
}
# Runs code cells, given as a JSON list on standard input, as a notebook would.
RUN_CELLS = """
import json, sys
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
for number, cell in enumerate(json.load(sys.stdin)):
    if not shell.run_cell(cell, store_history=True).success:
        sys.exit(f'code cell {number} failed:\\n{cell}')
"""


class _Loads(HTMLParser):
    "Collects the addresses that a page loads by itself; a link that a reader may click is none."

    def __init__(self):
        super().__init__()
        self.addresses, self._in_style = [], False

    def handle_starttag(self, tag, attrs):
        self._in_style = tag == 'style'
        for name, value in attrs:
            if name == 'style':
                self._css(value or '')
            elif name in ('src', 'srcset', 'data', 'poster') or (name.endswith('href') and tag in LOADING_TAGS):
                self.addresses.append(value or '')

    def handle_endtag(self, tag):
        self._in_style = False

    def handle_data(self, data):
        if self._in_style:
            self._css(data)

    def _css(self, text):
        self.addresses += re.findall(r'url\(\s*[\'"]?([^\'")]+)', text) + re.findall(r'@import\s+[\'"]([^\'"]+)', text)


def loaded_from_elsewhere(page: str) -> list[str]:
    "What a page loads that is not in it."
    parser = _Loads()
    parser.feed(page)
    return [address for address in parser.addresses if not address.startswith(('data:', '#'))]


@pytest.mark.parametrize(
    'page',
    [
        '<script src="https://a.org/x.js"></script>',
        '<script src="//a.org/x.js">',
        '<link rel="stylesheet" href="style.css">',
        '<img src="figures/a.png">',
        '<style>@import "https://a.org/x.css";</style>',
        '<style>b { background: url(https://a.org/x.png) }</style>',
        '<p style="background: url(\'x.png\')">',
        '<svg><image xlink:href="https://a.org/x.png"/></svg>',
    ],
)
def test_self_containment_rule_fires(page):
    assert loaded_from_elsewhere(page)


def test_self_containment_rule_is_quiet():
    page = '<style>b { color: red }</style><img src="data:image/png;base64,AA"><a href="https://a.org">a</a>'
    assert not loaded_from_elsewhere(
        page + '<svg><use xlink:href="#m"/></svg><script>let url = "https://a.org"</script>'
    )


def run(*command, cwd: Path, env: dict[str, str], **kwargs) -> str:
    "Standard output of a command that must succeed."
    ran = subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, **kwargs)
    assert ran.returncode == 0, f'{command[:3]} failed\n{ran.stdout[-4000:]}\n{ran.stderr[-4000:]}'
    return ran.stdout


@pytest.fixture(scope='module')
def wheel(tmp_path_factory) -> Path:
    "The wheel, built from the source distribution, built from a copy of the project."
    copy = tmp_path_factory.mktemp('source') / 'robustnb'
    private = shutil.ignore_patterns('.*', '_docs', '_proc', 'build', 'dist', '*.egg-info', '__pycache__')
    shutil.copytree(ROOT, copy, ignore=private)
    run(sys.executable, '-m', 'build', '--outdir', 'dist', '.', cwd=copy, env=dict(os.environ))
    return next((copy / 'dist').glob('*.whl'))


@pytest.fixture(scope='module')
def installed(wheel, tmp_path_factory) -> Iterator[tuple[Path, dict[str, str]]]:
    """A new environment that holds the wheel and what it asks for, and the variables of a user who knows of no project.

    It is taken away afterwards: torch and CUDA are 7 GB, and pytest would keep those of its last three runs.
    """
    home = tmp_path_factory.mktemp('environment')
    env = {
        k: v for k, v in os.environ.items() if not k.startswith(('PYTHON', 'ROBUSTNB', 'VIRTUAL_ENV', 'PJRT', 'MPL'))
    }
    env['IPYTHONDIR'] = str(home / 'ipython')
    run(sys.executable, '-m', 'venv', home / 'venv', cwd=home, env=env)
    bin_folder = home / 'venv' / 'bin'
    index = ['--extra-index-url', env['TORCH_INDEX']] if env.get('TORCH_INDEX') else []
    pip = [bin_folder / 'python', '-m', 'pip', 'install', '--quiet', '--disable-pip-version-check', *index]
    try:
        run(*pip, '-c', ROOT / 'constraints.txt', wheel, cwd=home, env=env)
        yield bin_folder, env
    finally:
        shutil.rmtree(home / 'venv')


@pytest.mark.slow
def test_wheel_holds_the_package_only(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split('/')[0] for name in names if '.dist-info/' not in name} == {'robustnb'}
    tracked = {p.relative_to(ROOT).as_posix() for p in (ROOT / 'robustnb').rglob('*') if p.is_file()}
    packaged = {name for name in names if '.dist-info/' not in name}
    assert packaged == {name for name in tracked if '__pycache__' not in name}


@pytest.mark.slow
def test_only_the_wheel_is_there(installed, tmp_path):
    bin_folder, env = installed
    script = (
        'import importlib.util as u, robustnb\n'
        'print(robustnb.__file__)\n'
        'print([m for m in ("tests", "tools", "setup", "run_notebooks", "nbdev", "pytest") if u.find_spec(m)])'
    )
    where, others = run(bin_folder / 'python', '-c', script, cwd=tmp_path, env=env).splitlines()
    assert Path(where).is_relative_to(bin_folder.parent)
    assert others == '[]'


@pytest.mark.slow
def test_tour(installed, tmp_path):
    bin_folder, env = installed
    run(bin_folder / 'robustnb', 'tour', cwd=tmp_path, env=env)
    pages = list(tmp_path.rglob('*.html'))
    assert pages, f'no report among {list(tmp_path.rglob("*"))}'
    for page in pages:
        assert not loaded_from_elsewhere(page.read_text(encoding='utf-8')), page.name


@pytest.mark.slow
@pytest.mark.parametrize('name', sorted(path.stem for path in (NBS / 'tutorials').glob('*.ipynb')))
def test_tutorial(name, installed, tmp_path):
    bin_folder, env = installed
    nb = json.loads((NBS / 'tutorials' / f'{name}.ipynb').read_text(encoding='utf-8'))
    cells = [''.join(cell['source']) for cell in nb['cells'] if cell['cell_type'] == 'code']
    to_run = [text for text in cells if not left_out(text, flags_to_skip())]
    assert to_run
    run(bin_folder / 'python', '-c', RUN_CELLS, cwd=tmp_path, env=env, input=json.dumps(to_run))
