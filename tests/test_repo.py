"""The rules of the house. Each one is a small function that returns what it finds wrong, and is itself tested first."""

import ast
import io
import json
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path

import pytest
from colab import PINS, canonical, pins
from IPython.core.inputtransformer2 import TransformerManager
from packaging.requirements import Requirement
from run_notebooks import MACHINE_PATH, NBS, ROOT, directives, notebooks, size_limit

PACKAGE = ROOT / 'robustnb'
# A module imports only from those before it.
ORDER = (
    'devices stats measures guard probes plots widgets results data models checkpoints distributed noises attacks '
    'evaluation training sweeps minimal blackbox adapters paths masking defences lsa vulnerable inside '
    'amplification layerwise explorer coverage surprise suites uncovered attribution lrp voting idc combinations fuzzing '
    'cuts filters responses fragility synaptic selective histories links dropout suppression slimming pruning magnitudes '
    'bayesian plans thresholds anpvs studies report cli'
).split()
ONLY_WHERE_USED = {'torchvision', 'captum', 'xarray', 'seaborn', 'sklearn'}  # imported by the functions that need them
MAX_LINES, MEDIAN_LINES, MIN_WORDS = 40, 12, 400
BADGE = (
    '[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]'
    '(https://colab.research.google.com/github/robustnb/robustnb/blob/main/nbs/{})'
)
INSTALL = (
    '#| hide\n#| eval: false\n'
    '! [ -e /content ] && (pip install -q robustnb || pip install -q git+https://github.com/robustnb/robustnb)'
)

MODULES = {p.stem: p.read_text() for p in sorted(PACKAGE.glob('*.py')) if p.stem not in ('__init__', '_modidx')}
NOTEBOOKS = {p.relative_to(NBS).as_posix(): json.loads(p.read_text()) for p in notebooks()}
COMPONENT = re.compile(r'(\d\d)_(\w+)\.ipynb')

every_module = pytest.mark.parametrize('module', MODULES)
every_notebook = pytest.mark.parametrize('name', NOTEBOOKS)
every_component = pytest.mark.parametrize('name', [name for name in NOTEBOOKS if COMPONENT.fullmatch(name)])


def source(cell: dict) -> str:
    "The text of a notebook's cell."
    return ''.join(cell['source'])


def code(nb: dict) -> list[str]:
    "The code cells of a notebook."
    return [source(cell) for cell in nb['cells'] if cell['cell_type'] == 'code']


def exported(nb: dict) -> list[str]:
    "The cells of a notebook that become the package, without their directives."
    cells = [text for text in code(nb) if {'export', 'exporti', 'exports'} & directives(text).keys()]
    return [re.sub(r'^#\|.*\n?', '', text, flags=re.M).strip() for text in cells]


def notebook(*cells: str) -> dict:
    "A notebook for the tests of the rules: code cells, and markdown for what starts with `md:`."
    return {
        'cells': [
            {'cell_type': 'markdown', 'source': text[3:]}
            if text.startswith('md:')
            else {'cell_type': 'code', 'source': text, 'outputs': []}
            for text in cells
        ],
        'metadata': {},
    }


# ---------------------------------------------------------------------------------------------------------- imports


def imports(tree: ast.AST, where: str = 'module') -> Iterator[tuple[str, str]]:
    "Each dotted name that is imported below `tree`, and where: 'module', 'function', or 'typing' (never executed)."
    for node in ast.iter_child_nodes(tree):
        inner = where
        if isinstance(node, ast.Import):
            yield from ((alias.name, where) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = '.'.join(filter(None, ['robustnb' if node.level else '', node.module]))
            yield from ((f'{base}.{alias.name}', where) for alias in node.names)
        elif isinstance(node, ast.Call) and 'import' in ast.unparse(node.func) and node.args:
            yield from ((str(arg.value), where) for arg in node.args[:1] if isinstance(arg, ast.Constant))
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            inner = 'function'
        elif isinstance(node, ast.If) and 'TYPE_CHECKING' in ast.unparse(node.test):
            inner = 'typing'
        yield from imports(node, inner)


def import_problems(module: str, text: str) -> list[str]:
    "Imports of `module` that go up, or that belong elsewhere."
    found = []
    for name, where in imports(ast.parse(text)):
        top, *rest = name.split('.')
        if (
            top == 'robustnb'
            and rest != ['__version__']
            and rest[:1] not in [[m] for m in ORDER[: ORDER.index(module)]]
        ):
            found.append(f'{module} imports {name}, which does not come before it')
        if top == 'torch_xla' and (module != 'devices' or where != 'function'):
            found.append(f'{name}: only functions of devices import torch_xla')
        if top == 'ipywidgets' and module != 'widgets':
            found.append(f'{name}: only widgets imports ipywidgets')
        if top in ONLY_WHERE_USED and where == 'module':
            found.append(f'{name} is imported when {module} is; import it inside the function that needs it')
    return found


@pytest.mark.parametrize(
    'module, text',
    [
        ('probes', 'from .lsa import x'),
        ('probes', 'from robustnb.lsa import x'),
        ('probes', 'from . import lsa'),
        ('probes', 'import robustnb.lsa'),
        ('probes', 'def f():\n    from robustnb.probes import x'),
        ('probes', 'def f():\n    from .nowhere import x'),
        ('probes', "def f(): return importlib.import_module('robustnb.lsa')"),
        ('devices', 'import torch_xla'),
        ('devices', 'try:\n    import torch_xla.runtime as xr\nexcept ImportError: pass'),
        ('lsa', 'def f():\n    import torch_xla'),
        ('lsa', 'def f():\n    from ipywidgets import HTML'),
        ('lsa', 'import xarray as xr'),
        ('lsa', 'class A:\n    from sklearn.cluster import KMeans'),
        ('lsa', 'if True:\n    import torchvision.transforms'),
    ],
)
def test_import_rule_fires(module, text):
    assert import_problems(module, text)


@pytest.mark.parametrize(
    'module, text',
    [
        ('devices', 'def f():\n    import torch_xla'),
        ('widgets', 'import ipywidgets'),
        ('lsa', 'from .probes import Probe\nfrom robustnb.measures import x\ndef f():\n    import xarray as xr'),
        ('lsa', 'if TYPE_CHECKING:\n    import xarray as xr'),
        ('cli', 'from robustnb import __version__'),
    ],
)
def test_import_rule_is_quiet(module, text):
    assert not import_problems(module, text)


@every_module
def test_imports(module):
    assert module in ORDER, f'{module} has no place in the order of modules'
    assert not import_problems(module, MODULES[module])


def test_import_is_light():
    watched = sorted(ONLY_WHERE_USED | {'torch_xla'})
    script = (
        'import importlib, sys\n'
        f'for name in {sorted(MODULES, key=ORDER.index)}:\n'
        '    importlib.import_module(f"robustnb.{name}")\n'
        f'    loaded = [m for m in {watched} if m in sys.modules]\n'
        '    if loaded: sys.exit(f"import robustnb.{name} also imports {loaded}")\n'
    )
    assert 'lsa' in MODULES
    ran = subprocess.run([sys.executable, '-c', script], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


# ------------------------------------------------------------------------------------------------------ the package


def test_init_holds_the_version_only():
    statements = ast.parse((PACKAGE / '__init__.py').read_text()).body
    assert [ast.unparse(s) for s in statements] == [f"__version__ = '{settings()['version']}'"]


def settings() -> dict[str, str]:
    "What settings.ini says."
    config = ConfigParser(delimiters=['='])
    config.read(ROOT / 'settings.ini', encoding='utf-8')
    return dict(config['DEFAULT'])


def test_run_time_requirements_move_nothing():
    assert not [r for r in shlex.split(settings()['requirements']) if re.search('<|==|~=', r)]


def unmet(requirements: str, pins: dict[str, str]) -> list[str]:
    "Requirements that exact versions do not meet."
    wanted = [Requirement(r) for r in shlex.split(requirements)]
    return [str(r) for r in wanted if canonical(r.name) not in pins or pins[canonical(r.name)] not in r.specifier]


def test_colab_rule_fires_and_is_quiet():
    assert unmet('torch>=2.9 numpy', {'torch': '2.8.0', 'numpy': '2.1.3'}) == ['torch>=2.9']
    assert unmet('numpy', {}) == ['numpy']
    assert not unmet('torch>=2.9 scikit_learn', {'torch': '2.11.0', 'scikit-learn': '1.6.1'})


def test_colab_meets_run_time_requirements():
    lines = [line for line in PINS.read_text().splitlines() if line and not line.startswith('#')]
    assert all(re.fullmatch(r'[a-z0-9-]+==[\w.]+', line) for line in lines), 'exact versions of what is there'
    assert len(pins()) == len(lines), 'each once'
    assert [Requirement(r).name for r in unmet(settings()['requirements'], pins())] == ['captum'], 'Colab lacks captum only'
    assert 'nbdev' not in pins(), 'Colab has no nbdev'


def public_names(tree: ast.Module) -> list[str]:
    "The names in a module's `__all__`."
    values = [s.value for s in tree.body if isinstance(s, ast.Assign) and ast.unparse(s.targets[0]) == '__all__']
    return [name for value in values for name in ast.literal_eval(value)]


@every_module
def test_no_public_name_is_the_name_of_its_module(module):
    names = public_names(ast.parse(MODULES[module]))
    assert names, f'{module} exports nothing'
    assert module not in names


def bare_parameters(fn: ast.FunctionDef, comments: set[int]) -> list[str]:
    "Parameters of `fn` without a comment of their own."
    a = fn.args
    positional = a.posonlyargs + a.args
    defaults = [None] * (len(positional) - len(a.defaults)) + a.defaults + [None, *a.kw_defaults, None]
    parameters = [*positional, a.vararg, *a.kwonlyargs, a.kwarg]
    free, bare = set(comments), []
    for parameter, default in zip(parameters, defaults, strict=True):
        if parameter is None or parameter.arg in ('self', 'cls'):
            continue
        lines = free & set(range(parameter.lineno, (default or parameter).end_lineno + 1))
        free -= lines
        if not lines:
            bare.append(f'{fn.name}: no comment for {parameter.arg}')
    return bare


def bare_fields(cls: ast.ClassDef, comments: set[int]) -> list[str]:
    "Public fields of a dataclass without a comment."
    fields = [s for s in cls.body if isinstance(s, ast.AnnAssign) and 'ClassVar' not in ast.unparse(s.annotation)]
    return [
        f'{cls.name}: no comment for {f.target.id}'
        for f in fields
        if not f.target.id.startswith('_') and not comments & set(range(f.lineno, f.end_lineno + 1))
    ]


def classes(text: str) -> dict[str, ast.ClassDef]:
    "The classes of a module by name."
    return {node.name: node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)}


LIBRARY = {name: cls for text in MODULES.values() for name, cls in classes(text).items()}


def overrides(cls: ast.ClassDef, method: ast.FunctionDef, known: dict[str, ast.ClassDef]) -> bool:
    "Whether `method` takes the place of one that is documented where it comes from."
    if method.name == 'forward' or f'super().{method.name}(' in ast.unparse(method):
        return True
    bases = [known[name] for name in map(ast.unparse, cls.bases) if name in known]
    return any(
        overrides(base, method, known)
        or any(getattr(m, 'name', '') == method.name and ast.get_docstring(m) for m in base.body)
        for base in bases
    )


def bare_class(cls: ast.ClassDef, comments: set[int], known: dict[str, ast.ClassDef]) -> list[str]:
    "Fields and parameters of a class without a comment, and public methods without a docstring."
    methods = [m for m in cls.body if isinstance(m, ast.FunctionDef)]
    found = [problem for m in methods if m.name == '__init__' for problem in bare_parameters(m, comments)]
    if any('dataclass' in ast.unparse(d) for d in cls.decorator_list):
        found += bare_fields(cls, comments)
    for m in methods:
        again = any(ast.unparse(d).endswith(('.setter', 'overload')) for d in m.decorator_list)
        if not m.name.startswith('_') and not again and not ast.get_docstring(m) and not overrides(cls, m, known):
            found.append(f'{cls.name}.{m.name}: no docstring')
    return found


def undocumented(text: str) -> list[str]:
    "What a module exports without a docstring or without a comment beside each parameter."
    tree, found = ast.parse(text), []
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = {token.start[0] for token in tokens if token.type == tokenize.COMMENT and token.string.strip('# ')}
    public = set(public_names(tree))
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name not in public:
            continue
        if not ast.get_docstring(node):
            found.append(f'{node.name}: no docstring')
        if isinstance(node, ast.FunctionDef):
            found += bare_parameters(node, comments)
        else:
            found += bare_class(node, comments, LIBRARY | classes(text))
    return found


GOOD_FUNCTION = """
def f(
    a: int,  # first
    b: dict = dict(
        c=1,
    ),  # second
    *rest: int,  # more
    key: int = 3,  # third
) -> int:  # sum
    "Adds."
"""


@pytest.mark.parametrize(
    'text',
    [
        GOOD_FUNCTION.replace('    "Adds."', '    return a'),
        GOOD_FUNCTION.replace('  # first', ''),
        GOOD_FUNCTION.replace('  # second', ''),
        GOOD_FUNCTION.replace('  # more', '  #'),
        GOOD_FUNCTION.replace('  # third', ''),
        'def f(a, b):  # both\n    "Adds."',
        'class f:\n    x: int = 3  # size',
        '@dataclass(frozen=True)\nclass f:\n    "A pair."\n    x: int  # size\n    y: int',
        'class f:\n    "A pair."\n    def __init__(self, x): ...',
        'class f:\n    "A pair."\n    def g(self): ...',
        'class Base:\n    def g(self): ...\nclass f(Base):\n    "A pair."\n    def g(self): ...',
    ],
)
def test_documentation_rule_fires(text):
    assert undocumented(f"__all__ = ['f']\n{text}")


@pytest.mark.parametrize(
    'text',
    [
        GOOD_FUNCTION,
        'def _g(a): ...',
        '@dataclass\nclass f:\n    "A pair."\n    x: int = 3  # size\n    _y: int = 4\n    kinds: ClassVar[int] = 3',
        'class f:\n    "A pair."\n    def __init__(self, x=1): # size\n        ...\n    def _g(self): ...',
        'class Base:\n    def g(self):\n        "Does."\nclass f(Base):\n    "A pair."\n    def g(self): ...',
        'class f(Figure):\n    "A pair."\n    def draw(self): super().draw()',
    ],
)
def test_documentation_rule_is_quiet(text):
    assert not undocumented(f"__all__ = ['f']\n{text}")


@every_module
def test_documentation(module):
    assert not undocumented(MODULES[module])


UNFINISHED = re.compile(r'\b(NotImplementedError|TODO|FIXME)\b')


@pytest.mark.parametrize('text', ['raise NotImplementedError', '# TODO: later', 'x = 1  # FIXME'])
def test_unfinished_rule_fires(text):
    assert UNFINISHED.search(text)


@every_module
def test_nothing_is_unfinished(module):
    assert not UNFINISHED.findall(MODULES[module])


def unsafe_loads(text: str) -> list[str]:
    "Calls in `text` that would run code found in a file."
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module in ('pickle', 'joblib', 'dill', 'cloudpickle'):
            found += [f'from {node.module} import {a.name}' for a in node.names if a.name in ('load', 'loads')]
        if not isinstance(node, ast.Call):
            continue
        call, values = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        if (
            re.fullmatch(
                r'(\w+\.)*(pickle|joblib|dill|cloudpickle)\.loads?|(\w+\.)+read_pickle|(\w+\.)*Unpickler', call
            )
            or (call.endswith('torch.load') and values.get('weights_only') != 'True')
            or values.get('allow_pickle') == 'True'
        ):
            found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize(
    'text',
    [
        'torch.load(path)',
        'torch.load(path, weights_only=False)',
        'torch.load(path, weights_only=flag)',
        'pickle.load(file)',
        'pickle.loads(data)',
        'joblib.load(path)',
        'from joblib import load',
        'pd.read_pickle(path)',
        'np.load(path, allow_pickle=True)',
    ],
)
def test_loading_rule_fires(text):
    assert unsafe_loads(text)


def test_loading_rule_is_quiet():
    assert not unsafe_loads('torch.load(path, weights_only=True); np.load(path); json.load(file); load_file(path)')


@pytest.mark.parametrize(
    'path',
    sorted(p for d in ('robustnb', 'tests', 'tools') for p in (ROOT / d).rglob('*.py')),
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_files_are_loaded_safely(path):
    assert not unsafe_loads(path.read_text())


# -------------------------------------------------------------------------------------------------------- notebooks


def test_every_component_has_its_module():
    found = [COMPONENT.fullmatch(name) for name in NOTEBOOKS]
    in_reading_order = [match[2] for match in found if match]
    assert in_reading_order == [module for module in ORDER if module in in_reading_order]
    assert sorted(in_reading_order) == sorted(MODULES)


def default_exp_problems(name: str, nb: dict) -> list[str]:
    "A component's first cell names its module; other notebooks name none."
    component = COMPONENT.fullmatch(name)
    expected = [f'#| default_exp {component[2]}'] if component else []
    got = [text for text in code(nb) if 'default_exp' in directives(text)]
    in_place = not expected or source(nb['cells'][0]) == expected[0]
    return [] if got == expected and in_place else [f'{name}: expected {expected} in front, got {got}']


@pytest.mark.parametrize(
    'name, cells',
    [
        ('30_lsa.ipynb', ['#| default_exp probes']),
        ('30_lsa.ipynb', ['md:# LSA', '#| default_exp lsa']),
        ('30_lsa.ipynb', ['1 + 1']),
        ('tutorials/a.ipynb', ['#| default_exp a']),
    ],
)
def test_default_exp_rule_fires(name, cells):
    assert default_exp_problems(name, notebook(*cells))


@every_notebook
def test_default_exp(name):
    assert not default_exp_problems(name, NOTEBOOKS[name])


def badge_problems(name: str, nb: dict) -> list[str]:
    "The badge stands alone in one cell, after the title, and opens this notebook."
    badges = [source(cell) for cell in nb['cells'] if 'colab-badge' in source(cell)]
    markdown = [source(cell) for cell in nb['cells'] if cell['cell_type'] == 'markdown']
    titled = markdown[:1] != badges[:1] and markdown[1:2] == badges[:1]
    return [] if badges == [BADGE.format(name)] and titled else [f'{name}: {badges}']


@pytest.mark.parametrize(
    'cells',
    [
        ['md:# Title'],
        ['md:# Title', f'md:{BADGE.format("30_lsa.ipynb")}'],
        ['md:# Title', f'md:{BADGE.format("a.ipynb")} and more'],
        [f'md:# Title\n{BADGE.format("a.ipynb")}'],
        [f'md:{BADGE.format("a.ipynb")}', 'md:# Title'],
        ['md:# Title', f'md:{BADGE.format("a.ipynb")}', f'md:{BADGE.format("a.ipynb")}'],
    ],
)
def test_badge_rule_fires(cells):
    assert badge_problems('a.ipynb', notebook(*cells))


@every_notebook
def test_badge(name):
    assert not badge_problems(name, NOTEBOOKS[name])


@every_notebook
def test_install_cell(name):
    assert code(NOTEBOOKS[name]).count(INSTALL) == 1


def code_lines(text: str) -> int:
    "Lines of code in a cell: neither blank, nor a comment, nor a docstring, nor a signature, which documents its parameters."
    skip = {n for n, line in enumerate(text.splitlines(), 1) if not line.strip() or line.strip().startswith('#')}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            body = node.body
            if isinstance(node, ast.FunctionDef):
                skip |= set(range(node.lineno + 1, body[0].lineno))
            if ast.get_docstring(node) is not None:
                skip |= set(range(body[0].lineno, body[0].end_lineno + 1))
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):  # a long text is not code
            skip |= set(range(node.lineno + 1, node.end_lineno + 1))
    return len(text.splitlines()) - len(skip)


def only_imports(text: str) -> bool:
    "Whether a cell holds nothing but imports."
    return all(isinstance(statement, ast.Import | ast.ImportFrom) for statement in ast.parse(text).body)


def export_size_problems(nb: dict) -> list[str]:
    "Exported cells are small: none is long, counting everything, and most have few lines of code."
    whole = [len(list(filter(str.strip, text.splitlines()))) for text in exported(nb)]
    found = [f'a cell of {n} lines, at most {MAX_LINES}' for n in whole if n > MAX_LINES]
    code = [code_lines(text) for text in exported(nb) if not only_imports(text)]
    if code and statistics.median(code) > MEDIAN_LINES:
        found.append(f'the median of {code} lines of code is over {MEDIAN_LINES}')
    return found


def mixed_imports(nb: dict) -> list[str]:
    "Exported cells that hold imports and something else."
    found = []
    for text in exported(nb):
        kinds = {isinstance(statement, ast.Import | ast.ImportFrom) for statement in ast.parse(text).body}
        if len(kinds) > 1:
            found.append(text)
    return found


def prose_words(nb: dict) -> int:
    "The number of words of prose: markdown without code blocks and the badge."
    cells = [source(cell) for cell in nb['cells'] if cell['cell_type'] == 'markdown']
    prose = re.sub(r'```.*?```', '', '\n'.join(text for text in cells if 'colab-badge' not in text), flags=re.S)
    return len(re.findall(r"[A-Za-z][\w'-]*", prose))


def lines(n: int) -> str:
    "An exported cell of `n` lines."
    return '\n'.join(['#| export', *['x = 1'] * n])


def test_cell_rules_fire_and_are_quiet():
    assert export_size_problems(notebook(lines(41), lines(1), lines(1)))
    assert export_size_problems(notebook(lines(13)))
    assert export_size_problems(notebook(lines(13).replace('export', 'exporti')))
    assert not export_size_problems(notebook(lines(40), lines(12), lines(1), 'x = 1\n' * 50))
    assert code_lines('def f(\n    a: int,  # one\n    b: int,  # two\n) -> int:\n    "Doc."\n\n    # why\n    return a\n') == 2
    assert mixed_imports(notebook('#| export\nimport a\nx = 1'))
    assert not mixed_imports(
        notebook('#| export\nimport a\nfrom b import c', '#| export\ndef f():\n    import a', 'import a\nx = 1')
    )
    assert prose_words(notebook('md:# Two words', 'md:```python\nnone here\n```', 'nor here', f'md:{BADGE}')) == 2


@every_component
def test_exported_cells_are_small(name):
    assert not export_size_problems(NOTEBOOKS[name])


@every_component
def test_imports_are_in_cells_of_their_own(name):
    assert not mixed_imports(NOTEBOOKS[name])


@every_component
def test_prose(name):
    assert prose_words(NOTEBOOKS[name]) >= MIN_WORDS


@every_notebook
def test_cells_load_safely(name):
    to_python = TransformerManager().transform_cell
    assert not [problem for text in code(NOTEBOOKS[name]) for problem in unsafe_loads(to_python(text))]


def output_text(output: dict) -> str:
    "What an output says in words, pictures left out."
    data = [value for mime, value in output.get('data', {}).items() if mime not in ('image/png', 'image/jpeg')]
    return '\n'.join(v if isinstance(v, str) else ''.join(map(str, v)) for v in [output.get('text', ''), *data])


def output_problems(nb: dict) -> list[str]:
    "What must not be committed: errors, standard error, widget state, and folders of the machine that made it."
    found = ['metadata.widgets: GitHub shows no such notebook'] if 'widgets' in nb['metadata'] else []
    for output in (output for cell in nb['cells'] for output in cell.get('outputs', [])):
        text = output_text(output)
        if output['output_type'] == 'error' or output.get('name') == 'stderr' or 'Traceback' in text:
            found.append(f'an error: {output}')
        if any('jupyter.widget' in mime for mime in output.get('data', {})):
            found.append(f'a widget without its state: {output}')
        if MACHINE_PATH.search(text) or 'site-packages' in text:
            found.append(f'a path of the machine: {text}')
    return found


def stream(text: str) -> dict:
    "Printed text, as notebooks hold it."
    return {'output_type': 'stream', 'name': 'stdout', 'text': [text]}


@pytest.mark.parametrize(
    'output',
    [
        {'output_type': 'error', 'ename': 'ValueError', 'evalue': '', 'traceback': []},
        {'output_type': 'stream', 'name': 'stderr', 'text': ['slow']},
        {'output_type': 'display_data', 'data': {'application/vnd.jupyter.widget-view+json': {'model_id': '1'}}},
        {'output_type': 'display_data', 'data': {'text/html': ['<a href="file:///home/me/x">']}},
        stream('Traceback (most recent call last)'),
        stream('wrote /tmp/x.html'),
        stream('in /work'),
        stream('lib/site-packages/torch'),
    ],
)
def test_output_rule_fires(output):
    nb = notebook('x')
    nb['cells'][0]['outputs'] = [output]
    assert output_problems(nb)


def test_output_rule_sees_widget_state_and_is_quiet_otherwise():
    assert output_problems(notebook() | {'metadata': {'widgets': {}}})
    nb = notebook('x')
    nb['cells'][0]['outputs'] = [stream('https://a.org/home/x'), stream('nbs/tmp/x'), stream('3/4')]
    assert not output_problems(nb)


@every_notebook
def test_outputs(name):
    assert not output_problems(NOTEBOOKS[name])


@every_notebook
def test_notebook_size(name):
    path = NBS / name
    assert path.stat().st_size <= size_limit(path)


def test_size_limits():
    assert size_limit(NBS / '30_lsa.ipynb') < size_limit(NBS / 'tutorials' / 'first_look.ipynb') <= 1_000_000


# ------------------------------------------------------------------------------------- the package equals its notebooks


def export(project: Path) -> None:
    "Export the notebooks of `project` as nbdev_export does."
    script = 'from nbdev.doclinks import nbdev_export; nbdev_export.__wrapped__()'
    subprocess.run([sys.executable, '-c', script], cwd=project, check=True, capture_output=True)


def differing(one: Path, other: Path) -> list[str]:
    "Python files that are not the same in both folders."
    files = {p.relative_to(folder) for folder in (one, other) for p in folder.rglob('*.py')}
    text = {f: [(d / f).read_text() if (d / f).exists() else None for d in (one, other)] for f in files}
    return sorted(str(f) for f, (a, b) in text.items() if a != b)


def test_package_equals_notebooks(tmp_path):
    pytest.importorskip('nbdev', reason='nbdev is not installed')
    shutil.copy(ROOT / 'settings.ini', tmp_path)
    shutil.copytree(NBS, tmp_path / 'nbs', ignore=shutil.ignore_patterns('.*'))
    export(tmp_path)
    assert (tmp_path / 'pyproject.toml').read_text() == (ROOT / 'pyproject.toml').read_text()
    assert not differing(tmp_path / 'robustnb', PACKAGE), 'edit the notebooks, then run nbdev_export'

    module = next((tmp_path / 'robustnb').glob('[a-z]*.py'))
    module.write_text(module.read_text() + '\n')
    (tmp_path / 'robustnb' / 'by_hand.py').touch()
    assert differing(tmp_path / 'robustnb', PACKAGE) == sorted(['by_hand.py', module.name]), 'the comparison is blind'


def test_ruff():
    pytest.importorskip('ruff', reason='ruff is not installed')
    command = [sys.executable, '-m', 'ruff', 'check', '--quiet', '--output-format=concise', '.']
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, f'\n{ran.stdout}{ran.stderr}'
