"""The site: how a notebook becomes a page, that none is forgotten, and that what workflows name is there."""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from run_notebooks import NBS, ROOT, notebooks

import docs
from docs import Place, adapt, contents, entries, escaped, front_page, full_name, group_of, page_name, rewrite

NAMES = {'robustnb.lsa', 'robustnb.lsa.explore', 'robustnb.lsa.compare', 'robustnb.idc.explore', 'robustnb.data.DataSet'}
PAGES = {'nbs/02_measures.ipynb': 'measures', 'nbs/tutorials/first.ipynb': 'tutorials/first', 'CHANGELOG.md': 'changelog'}
BADGE = '[![Open in Colab](https://x.org/colab-badge.svg)](https://x.org/nbs/02_measures.ipynb)'
WORKFLOWS = {p.name: yaml.safe_load(p.read_text('utf-8')) for p in sorted((ROOT / '.github/workflows').glob('*.yml'))}
COMPONENTS = {p.relative_to(NBS).as_posix(): json.loads(p.read_text('utf-8')) for p in notebooks()}


def page(*cells, names=NAMES) -> list:
    "The cells of the page of a component with these cells: code, markdown where it starts with `md:`, or a cell."
    made = ['#| default_exp measures', 'md:# Measures\n\n> How far\n> apart?', f'md:{BADGE}', *cells]
    made = [new_markdown_cell(c[3:]) if str(c).startswith('md:') else new_code_cell(c) if isinstance(c, str) else c for c in made]
    nb = new_notebook(cells=made)
    adapted = adapt(nb, Place('nbs/02_measures.ipynb', 'measures', PAGES), names, docs.known_classes({'a': nb}))
    nbformat.validate(adapted)
    return adapted.cells


def sources(*cells, **kwargs) -> list[str]:
    "What the cells of a page say, without its head."
    return [cell.source for cell in page(*cells, **kwargs)[2:]]


def label(cell) -> str:
    "Behind what the source of a cell is folded away."
    return cell.metadata['mystnb']['code_prompt_show']


# -------------------------------------------------------------------------------------------------------------- cells


def test_head():
    head, badge = page()
    assert head.source.startswith('# Measures\n\n```{py:module} robustnb.measures\n```\n\n{.lead}\nHow far apart?')
    assert BADGE in badge.source and '(https://github.com/robustnb/robustnb/blob/main/nbs/02_measures.ipynb)' in badge.source
    with pytest.raises(ValueError, match='first markdown cell'):
        page_of_no_title = new_notebook(cells=[new_markdown_cell('no title')])
        adapt(page_of_no_title, Place('nbs/a.ipynb', 'a', PAGES))


@pytest.mark.parametrize(
    'cell',
    [
        '#| hide\nx = 1',
        '#|hide\n#| eval: false\n! pip install robustnb',
        '#| export\nimport torch\nfrom torch import nn',
        "#| exporti\nlog = logging.getLogger(__name__)",
        '#| export',
    ],
)
def test_what_is_not_shown(cell):
    assert sources(cell) == []


def test_directives_are_stripped_and_outputs_stay():
    shown = new_output('execute_result', {'text/plain': '3'})
    cell = new_code_cell('#| slow\n#| eval: false\n1 + 2  #| not one', outputs=[shown], execution_count=7)
    (found,) = page(cell)[2:]
    assert found.source == '1 + 2  #| not one' and found.outputs == [shown] and found.execution_count is None
    assert not found.metadata


def test_helpers_are_folded_together():
    first, second = '#| exporti\ndef _a(): ...', '#| exporti\nb: int = 3\nc = 4'
    (cell,) = page(first, second)[2:]
    assert cell.source == 'def _a(): ...\n\nb: int = 3\nc = 4'
    assert cell.metadata.tags == ['hide-input'] and label(cell) == 'Helpers: _a, b, c'
    assert len(page(first, 'md:words', second)[2:]) == 3
    assert label(page('#| export\ndef _a(): ...')[2]) == 'Helper: _a' and label(page('#| exporti\na.b = c')[2]) == 'Helper'
    assert len(page('#| export\ndef quiet():\n    log = logging.getLogger("a")')[2:]) == 2, 'more than a logger'


FUNCTION = '''#| export
@contextmanager
def relative(
    a: 'Tensor',  # clean; *not* `pert`
    b: dict[str, float] = {},  # the other
    *rest,
    key: int = 3,  # sized
    **more,  # passed on
) -> Tensor:  # (batch,) in [0, 1]
    "How far `a` is from `b`: see `lsa.explore`."
    c = 1  # not a parameter
'''


def test_function():
    entry, source = page(FUNCTION)[2:]
    lines = entry.source.splitlines()
    assert lines[0] == '<span id="relative"></span>'
    assert ':{py:function} relative(a: Tensor, b: dict[str, float] = {}, *rest, key: int = 3, **more) -> Tensor' in lines[2]
    assert 'How far `a` is from `b`: see {py:obj}`lsa.explore <robustnb.lsa.explore>`.' in lines
    assert r':param a: clean; \*not\* `pert`' in lines
    assert r':param \*\*more: passed on' in lines and not [line for line in lines if 'rest:' in line]
    assert r':returns: (batch,) in \[0, 1\]' in lines
    assert label(source) == 'Source' and source.source.startswith('@contextmanager')


CLASSES = '''
@dataclass(frozen=True)
class Base:
    "First."
    seed: int = field(default=0, kw_only=True)  # of the noise
    kind: ClassVar[str] = 'a'
    _hidden: int = 3
    made: list = field(init=False)

    @property
    def name(self) -> str:
        "Its name."

    def plain(self): ...

    def run(self, x: int) -> 'Base':  # again
        "Runs `Base`."

    def __call__(self, x):
        "Calls."

@dataclass
class Child(Base):
    "Second."
    eps: float = 0.1  # size
    rows: list = field(default_factory=list)  # some
    seed: int = field(default=1, kw_only=True)  # of another noise
'''


def test_classes():
    known = docs.known_classes({'a': new_notebook(cells=[new_code_cell('#| export' + CLASSES)])})
    base, child = entries(CLASSES, known)
    assert base.signature == '(*, seed: int = 0)'
    assert [(m.kind, m.name, m.signature) for m in base.members] == [
        ('property', 'name', '() -> str'), ('method', 'run', '(x: int) -> Base'), ('method', '__call__', '(x)')]
    assert child.signature == '(eps: float = 0.1, rows: list = [], *, seed: int = 1)' and child.bases == ('Base',)
    assert [p.comment for p in child.parameters] == ['size', 'some', 'of another noise']
    text = sources('#| export' + CLASSES, names=NAMES | {'robustnb.measures.Base'})[0]
    assert '*Extends* {py:obj}`Base <robustnb.measures.Base>`' in text and ':type: str' in text
    assert text.index('{py:class} Base') < text.index('{py:method} run') < text.index('{py:class} Child')


def test_other_classes_and_constants():
    given, plain, pair, named, table, bare = entries(
        'class Given:\n    def __init__(self, x: int = 1): # one\n        ...\n'
        'class Plain(nn.Module):\n    "Plain."\n'
        'class Pair(NamedTuple):\n    a: int  # left\n'
        '@dataclass(kw_only=True)\nclass Named:\n    a: int = 1\n'
        'TABLE: dict[str, int] = {}  # name -> *value*\nBARE = 3\n_PRIVATE = 4'
    )
    assert (given.signature, given.parameters[0].comment) == ('(x: int = 1)', 'one')
    assert (plain.signature, plain.bases) == ('', ('nn.Module',))
    assert (pair.signature, pair.bases) == ('(a: int)', ()) and named.signature == '(*, a: int = 1)'
    assert (table.kind, table.signature, table.words) == ('data', 'dict[str, int]', 'name -> *value*') and bare.words == ''


def test_signatures_are_python():
    known = docs.known_classes(COMPONENTS)
    found = [e for nb in COMPONENTS.values() for text in docs.exported_cells(nb) for e in entries(text, known)]
    assert len(found) > 100
    for entry in [*found, *(m for e in found for m in e.members)]:
        if entry.kind in ('function', 'class', 'method'):
            ast.parse(f'def f{entry.signature or "()"}: ...')


# -------------------------------------------------------------------------------------------------------------- links


@pytest.mark.parametrize(
    'name, full',
    [
        ('compare', 'robustnb.lsa.compare'),
        ('compare()', 'robustnb.lsa.compare'),
        ('lsa.compare', 'robustnb.lsa.compare'),
        ('robustnb.lsa', 'robustnb.lsa'),
        ('robustnb.data.DataSet', 'robustnb.data.DataSet'),
        ('explore', 'robustnb.idc.explore'),  # two have it, this page's own is meant
        ('lsa', None),
        ('nothing', None),
    ],
)
def test_full_name(name, full):
    assert full_name(name, NAMES, 'robustnb.idc') == full


def test_an_ambiguous_name_links_nowhere():
    assert full_name('explore', NAMES, 'robustnb.data') is None


@pytest.mark.parametrize(
    'text, expected',
    [
        ('use `DataSet`, or `x`', 'use {py:obj}`DataSet <robustnb.data.DataSet>`, or `x`'),
        ('``DataSet``', '{py:obj}`DataSet <robustnb.data.DataSet>`'),
        ('# `DataSet`', '# `DataSet`'),
        ('```python\n`DataSet` [a](b.md)\n```', '```python\n`DataSet` [a](b.md)\n```'),
        ('$`DataSet`$', '$`DataSet`$'),
        ('`a [b](c)`', '`a [b](c)`'),
        ('[`DataSet`](a.md)', '[`DataSet`](to/a.md)'),
        ('[![b](c.svg)](d.md)', '[![b](to/c.svg)](to/d.md)'),
        ('an interval [0, 1] (see below)', 'an interval [0, 1] (see below)'),
    ],
)
def test_rewrite(text, expected):
    assert rewrite(text, NAMES, target=lambda address: f'to/{address}') == expected


def test_what_describes_itself_does_not_link_to_itself():
    assert rewrite('`DataSet`', NAMES, own='robustnb.data.DataSet') == '`DataSet`'


@pytest.mark.parametrize(
    'source, page, address, expected',
    [
        ('nbs/02_measures.ipynb', 'measures', 'tutorials/first.ipynb#The-Start', 'tutorials/first.ipynb#the-start'),
        ('nbs/tutorials/first.ipynb', 'tutorials/first', '../02_measures.ipynb', '../measures.ipynb'),
        ('nbs/02_measures.ipynb', 'measures', '../CHANGELOG.md', 'changelog.md'),
        ('CHANGELOG.md', 'changelog', 'nbs/02_measures.ipynb', 'measures.ipynb'),
        ('CHANGELOG.md', 'changelog', 'setup.py#L1', 'https://github.com/robustnb/robustnb/blob/main/setup.py#L1'),
        ('nbs/02_measures.ipynb', 'measures', '../data', 'https://github.com/robustnb/robustnb/tree/main/data'),
        ('CHANGELOG.md', 'changelog', 'https://a.org/nbs/x.ipynb', 'https://a.org/nbs/x.ipynb'),
        ('CHANGELOG.md', 'changelog', '#Added', '#added'),
    ],
)
def test_targets(source, page, address, expected):
    assert Place(source, page, PAGES).target(address) == expected


def test_images_move_to_the_site_and_dead_links_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(docs, 'PAGES', tmp_path)
    place = Place('nbs/index.ipynb', 'index', PAGES)
    assert place.target('images/overview.png') == '/nbs/images/overview.png'
    assert (tmp_path / 'nbs/images/overview.png').exists()
    with pytest.raises(ValueError, match='nbs/nowhere.ipynb is not there'):
        place.target('nowhere.ipynb')


def test_a_comment_is_plain_text():
    assert escaped('(n, *shape), x_adv < `a_b*` [0, inf) $') == r'(n, \*shape), x\_adv \< `a_b*` \[0, inf) \$'


def test_source_address():
    address = docs.source_address({'module': 'robustnb.devices', 'fullname': 'env'})
    first, last = map(int, re.fullmatch(r'https://github.com/.*/robustnb/devices\.py#L(\d+)-L(\d+)', address).groups())
    lines = (ROOT / 'robustnb/devices.py').read_text('utf-8').splitlines()
    assert lines[first - 1].startswith('def env(') and last > first
    assert docs.source_address({'module': 'robustnb.nothing', 'fullname': 'env'}) is None


# ----------------------------------------------------------------------------------------------------------- contents


def test_every_notebook_is_in_the_contents():
    shown = [name for members in contents(list(COMPONENTS)).values() for name in members]
    assert sorted([*shown, 'index.ipynb']) == sorted(COMPONENTS) and len(set(shown)) == len(shown)
    text = front_page(COMPONENTS, str)
    trees = re.findall(r'```\{toctree\}.*?\n\n(.*?)\n```', text, re.S)
    pages = [line for tree in trees for line in tree.splitlines()]
    assert sorted(pages) == sorted([*map(page_name, shown), *docs.PROJECT.values()])
    assert len({page_name(name) for name in COMPONENTS}) == len(COMPONENTS)


def test_a_new_notebook_cannot_be_forgotten():
    names = ['index.ipynb', '02_a.ipynb', '45_b.ipynb', '99_c.ipynb', 'experiments/d.ipynb', 'tutorials/e.ipynb']
    assert contents(names) == {
        'Start here': ['tutorials/e.ipynb'], 'Ground': ['02_a.ipynb'], 'Test coverage': ['45_b.ipynb'],
        'Report': ['99_c.ipynb'], 'Experiments': ['experiments/d.ipynb']}
    names = ['02_a.ipynb', '01_b.ipynb', 'tutorials/a.ipynb', 'tutorials/b.ipynb', 'tutorials/c.ipynb']
    found = contents(names, 'First [c](tutorials/c.ipynb), then [b](tutorials/b.ipynb), [2](02_a.ipynb), [1](01_b.ipynb).')
    assert found == {
        'Start here': [f'tutorials/{n}.ipynb' for n in 'cba'], 'Ground': ['01_b.ipynb', '02_a.ipynb']}
    with pytest.raises(ValueError, match='FOLDERS'):
        group_of('elsewhere/f.ipynb')
    with pytest.raises(ValueError, match='number'):
        group_of('f.ipynb')


def test_the_front_page_has_a_place_for_the_contents():
    nb = new_notebook(cells=[new_markdown_cell(f'{docs.CONTENTS}\n\n| old |\n\n## After\n\nwords')])
    assert docs.with_contents(nb, 'NEW').cells[0].source == 'NEW\n\n## After\n\nwords'
    with pytest.raises(ValueError, match='Where to go'):
        docs.with_contents(new_notebook(), 'NEW')
    cells = COMPONENTS['index.ipynb']['cells']
    assert sum(''.join(cell['source']).startswith(docs.CONTENTS + '\n') for cell in cells) == 1


def test_the_site_is_replaced_by_a_whole_one_only(tmp_path, monkeypatch):
    results = iter([0, 1])

    def build(arguments: list[str]) -> int:
        site = Path(arguments[-1])
        site.mkdir(parents=True)
        (site / 'index.html').write_text(result := str(next(results)))
        (site.parent / 'jupyter_execute').mkdir()  # as myst-nb does
        return int(result)

    monkeypatch.setitem(sys.modules, 'sphinx.cmd.build', SimpleNamespace(main=build))
    monkeypatch.setattr(docs, 'write_pages', lambda: shutil.rmtree(docs.WORK, ignore_errors=True))
    monkeypatch.setattr(docs, 'WORK', tmp_path / '_proc')
    monkeypatch.setattr(docs, 'SITE', tmp_path / '_docs')
    monkeypatch.setattr(sys, 'argv', ['docs.py'])
    assert [docs.main(), docs.main()] == [0, 1]
    assert (tmp_path / '_docs/index.html').read_text() == '0'
    assert sorted(p.name for p in tmp_path.iterdir()) == ['_docs', '_proc'], 'both of them are ignored by git'


# -------------------------------------------------------------------------------------------- workflows, and the rest


def steps(workflow: dict) -> list[dict]:
    "All steps of a workflow."
    return [step for job in workflow['jobs'].values() for step in job['steps']]


@pytest.mark.parametrize('name', WORKFLOWS)
def test_workflow(name):
    workflow = WORKFLOWS[name]
    assert {'name', 'permissions', 'jobs'} < workflow.keys() and True in workflow  # YAML 1.1 reads the key `on` as true
    for job in workflow['jobs'].values():
        assert job['timeout-minutes'] and job['runs-on'] == 'ubuntu-latest'
        assert set([job['needs']] if 'needs' in job else []) <= workflow['jobs'].keys()
    for step in steps(workflow):
        assert len({'uses', 'run'} & step.keys()) == 1
        assert re.fullmatch(r'[\w-]+/[\w-]+@(v\d+|release/v\d+)', step.get('uses', 'a/b@v1')), 'pinned by major version'
        assert '${{' not in step.get('run', ''), 'an expression in a script is a way to inject one'


def problems(script: str) -> list[str]:
    "Files and make targets that a script names and the project does not have."
    targets = re.findall(r'^([a-z-]+):', (ROOT / 'Makefile').read_text('utf-8'), re.M)
    files = re.findall(r'(?:bash|python|<) ((?:[\w.-]+/)*\.?[\w.-]+(?:/[\w-]+|\.\w+))', script)
    files += re.findall(r'(?<![\w/$}".*-])((?:[\w-]+)\.(?:ini|cff|md|txt|toml))\b', script)
    missing = [file for file in files if not (ROOT / file).exists()]
    return missing + [t for t in re.findall(r'^\s*make ([a-z-]+)', script, re.M) if t not in targets]


def test_script_rule_fires_and_is_quiet():
    assert problems('bash .ci/nothing') == ['.ci/nothing']
    assert problems('sed -n 1p nothing.ini') == ['nothing.ini']
    assert problems('make nothing') == ['nothing']
    assert problems('python tools/nothing.py') == ['tools/nothing.py']
    assert not problems('bash .ci/run; python -m build; grep x CHANGELOG.md settings.ini\nmake docs')


@pytest.mark.parametrize('name', [*WORKFLOWS, '.ci/run', 'Dockerfile'])
def test_what_is_named_is_there(name):
    scripts = [s.get('run', '') for s in steps(WORKFLOWS[name])] if name in WORKFLOWS else [(ROOT / name).read_text('utf-8')]
    assert not [problem for script in scripts for problem in problems(script.replace('RUN ', ''))]
    caches = [s['with'] for s in steps(WORKFLOWS.get(name, {'jobs': {}})) if 'cache-dependency-path' in s.get('with', {})]
    assert all((ROOT / file).exists() for given in caches for file in given['cache-dependency-path'].split())


def test_the_release_checks_its_version(tmp_path):
    (script,) = [s['run'] for s in steps(WORKFLOWS['release.yml']) if 'GITHUB_REF_NAME' in s.get('run', '')]

    def passes(tag='v1.2.0', setting='1.2.0', cited='1.2.0', changed='1.2.0') -> bool:
        (tmp_path / 'settings.ini').write_text(f'[DEFAULT]\nversion = {setting}\nmin_python = 3.11\n')
        (tmp_path / 'CITATION.cff').write_text(f'cff-version: 1.2.0\nversion: {cited}\n')
        (tmp_path / 'CHANGELOG.md').write_text(f'## [Unreleased]\n\n## [{changed}] - 2030-01-01\n')
        command = ['bash', '-eo', 'pipefail', '-c', script]  # as GitHub runs it
        return subprocess.run(command, cwd=tmp_path, env={'GITHUB_REF_NAME': tag, 'PATH': '/usr/bin:/bin'}).returncode == 0

    assert passes()
    assert not any([passes(tag='v1.3.0'), passes(tag='1.2.0'), passes(cited='1.1.0'), passes(changed='1.1.0'), passes('v1', '1')])


def test_permissions_of_what_publishes():
    for name, job, more in [('docs.yml', 'publish', {'pages': 'write'}), ('release.yml', 'publish', {})]:
        assert WORKFLOWS[name]['jobs'][job]['permissions'] == {'id-token': 'write', **more}
        assert WORKFLOWS[name]['permissions'] == {'contents': 'read'}
    assert WORKFLOWS['release.yml']['jobs']['publish']['environment']['name'] == 'pypi'


def test_citation():
    cff = yaml.safe_load((ROOT / 'CITATION.cff').read_text('utf-8'))
    assert {'message', 'title', 'authors', 'abstract', 'keywords', 'license', 'url', 'repository-code'} <= cff.keys()
    assert (cff['cff-version'], cff['type'], str(cff['version'])) == ('1.2.0', 'software', docs.settings()['version'])
    assert 'date-released' not in cff or f'## [{cff["version"]}]' in (ROOT / 'CHANGELOG.md').read_text('utf-8')
    assert len(cff['references']) == 4
    for reference in cff['references']:
        assert {'type', 'title', 'authors', 'year', 'url', 'identifiers'} <= reference.keys()
        assert all({'family-names', 'given-names'} == author.keys() for author in reference['authors'])
        assert reference['type'] != 'conference-paper' or reference['conference']['name']


def test_dockerfile_is_short():
    lines = (ROOT / 'Dockerfile').read_text('utf-8').splitlines()
    assert len(lines) <= 12 and lines.index('USER reader') < len(lines) - 1
    ignored = (ROOT / '.dockerignore').read_text('utf-8').split()
    assert {'.git', '.venv*', '_docs', '_proc'} <= set(ignored)
