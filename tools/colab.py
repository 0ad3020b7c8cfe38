"""robustnb beside what Colab has, for `make test-colab`; run by the Python of that environment.

    python tools/colab.py record      # remember what is there, before robustnb is
    python tools/colab.py install     # the wheel of this working tree, as a user installs it: it may add, never move

`install` first takes away what it added the last time, so that every install is a first one. It stops before anything
changes if pip would move what was recorded.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PINS = ROOT / 'constraints-colab.txt'
RECORD = Path(sys.prefix) / 'colab-versions.json'
SOURCES = ('settings.ini', 'setup.py', 'pyproject.toml', 'README.md')


def canonical(name: str) -> str:
    "The one spelling of a distribution's name."
    return re.sub('[-_.]+', '-', name).lower()


def pins() -> dict[str, str]:
    "Colab's versions, as constraints-colab.txt has them."
    lines = [line.strip() for line in PINS.read_text(encoding='utf-8').splitlines()]
    return dict(line.split('==') for line in lines if line and not line.startswith('#'))


def versions() -> dict[str, str]:
    "The version of every distribution in this environment."
    return {canonical(d.name): d.version for d in distributions()}


def recorded() -> dict[str, str]:
    "What `versions` was before robustnb came."
    return json.loads(RECORD.read_text(encoding='utf-8'))


def moved(before: dict[str, str], after: dict[str, str]) -> list[str]:
    "What is not as it was: `numpy 2.1.3 -> 2.2.0`. What is new has not moved."
    return [f'{k} {v} -> {after.get(k, "nothing")}' for k, v in sorted(before.items()) if after.get(k) != v]


def pip(*args: str | Path) -> str:
    "Standard output of a pip command that must succeed."
    command = [sys.executable, '-m', 'pip', *map(str, args), '--disable-pip-version-check', '--quiet']
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def build(folder: Path) -> Path:
    "The wheel of the working tree, built in `folder` from a copy, where no earlier build has left anything."
    source = folder / 'source'
    shutil.copytree(ROOT / 'robustnb', source / 'robustnb', ignore=shutil.ignore_patterns('__pycache__'))
    for name in SOURCES:
        shutil.copy(ROOT / name, source)
    pip('wheel', '--no-deps', '--no-build-isolation', '--wheel-dir', folder, source)
    return next(folder.glob('*.whl'))


def install() -> None:
    "Install the wheel and what it asks for, with no constraint."
    before = recorded()
    added = sorted(versions().keys() - before.keys())
    if added:
        pip('uninstall', '--yes', *added)
    with tempfile.TemporaryDirectory() as folder:
        wheel = build(Path(folder))
        plan = json.loads(pip('install', '--dry-run', '--report', '-', wheel))['install']
        planned = {canonical(part['metadata']['name']): part['metadata']['version'] for part in plan}
        if found := moved(before, before | planned):
            sys.exit('pip install robustnb would move what Colab has:\n  ' + '\n  '.join(found))
        pip('install', wheel)
    print('robustnb on Colab adds:', ', '.join(f'{k} {v}' for k, v in sorted(versions().items()) if k not in before))


if __name__ == '__main__':
    match sys.argv[1:]:
        case ['record']:
            RECORD.write_text(json.dumps(versions(), indent=1), encoding='utf-8')
        case ['install']:
            install()
        case _:
            sys.exit(__doc__)
