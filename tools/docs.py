"""The site from the notebooks: `python tools/docs.py` writes _docs/index.html.

Nothing is executed: pages show the committed outputs, and signatures are read from the source of the cells that define
them. _proc/ receives the pages as Sphinx takes them and all that is made on the way; nothing else in the project is written.

    nbs/02_measures.ipynb  ->  _proc/pages/measures.ipynb  ->  _docs/measures.html
"""

import argparse
import ast
import io
import json
import os
import re
import shutil
import sys
import tokenize
from collections.abc import Callable, Iterator
from configparser import ConfigParser
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell
from run_notebooks import NBS, ROOT, directives, notebooks

WORK, SITE = ROOT / '_proc', ROOT / '_docs'
PAGES = WORK / 'pages'
CONTENTS = '## Where to go'  # the section of nbs/index.ipynb that becomes the site's table of contents

# A component belongs to the last group whose number is not above its own; a notebook in a folder to the folder's group.
FOLDERS = {'tutorials': 'Start here', 'experiments': 'Experiments'}
SUBJECTS = {
    0: 'Ground',
    19: 'Noises, attacks and training',
    30: 'Layers',
    40: 'Test coverage',
    50: 'Weights',
    60: 'Pruning',
    70: 'Report',
}
PROJECT = {'CONTRIBUTING.md': 'contributing', 'CHANGELOG.md': 'changelog'}  # file -> page


@cache
def settings() -> dict[str, str]:
    "What settings.ini says."
    config = ConfigParser(delimiters=['='])
    config.read(ROOT / 'settings.ini', encoding='utf-8')
    return dict(config['DEFAULT'])


# ------------------------------------------------------------------------------------------------------------- pages


def page_name(notebook: str) -> str:
    "The page of a notebook, both relative to their roots: '02_measures.ipynb' -> 'measures', as nbdev names it."
    path = Path(notebook)
    return path.with_name(re.sub(r'^\d+[a-z]?_', '', path.stem)).as_posix()


def group_of(notebook: str) -> str | None:
    "The group of the table of contents in which a notebook stands; None for the front page."
    path = Path(notebook)
    if len(path.parts) > 1:
        if path.parts[0] not in FOLDERS:
            raise ValueError(f'{notebook}: name the group of the folder {path.parts[0]} in FOLDERS of tools/docs.py')
        return FOLDERS[path.parts[0]]
    if notebook == 'index.ipynb':
        return None
    number = re.match(r'\d+', path.name)
    if not number:
        raise ValueError(f'{notebook}: the name of a component begins with its number, and this one has none')
    return SUBJECTS[max(start for start in SUBJECTS if start <= int(number[0]))]


def contents(names: list[str], first: str = '') -> dict[str, list[str]]:
    "The notebooks of each group in reading order: by number, in folders as `first`, the front page, mentions them."
    groups = [FOLDERS['tutorials'], *SUBJECTS.values(), FOLDERS['experiments']]
    found = {name: group_of(name) for name in sorted(names)}
    names = sorted(found, key=lambda name: (first + name).find(name) if '/' in name else 0)  # a stable sort
    return {group: [name for name in names if found[name] == group] for group in groups if group in found.values()}


# ----------------------------------------------------------------------------------------------------- what is exported


@dataclass(frozen=True)
class Parameter:
    "One parameter of a function, or one field of a class."

    name: str  # with its stars
    annotation: str = ''
    default: str = ''
    comment: str = ''
    keyword: bool = False  # given by its name only

    def __str__(self) -> str:
        space = ' ' if self.annotation else ''
        default = f'{space}={space}{self.default}' if self.default else ''
        return self.name + (f': {self.annotation}' if self.annotation else '') + default


@dataclass(frozen=True)
class Entry:
    "What the site says about one function, class, method or constant."

    kind: str  # a directive of Sphinx's Python domain: function, class, method, property, data
    name: str
    signature: str = ''  # with parentheses, and with what is returned
    parameters: tuple[Parameter, ...] = ()
    returns: str = ''  # the comment beside it
    words: str = ''  # the docstring
    bases: tuple[str, ...] = ()
    members: tuple['Entry', ...] = ()


def comments(text: str) -> dict[int, str]:
    "The comment on each line that has one."
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return {t.start[0]: t.string.lstrip('# ').strip() for t in tokens if t.type == tokenize.COMMENT}


def _beside(notes: dict[int, str], first: int, last: int) -> str:
    "Takes the comment on one of these lines out of `notes`: it belongs to the first parameter that stands there."
    return ' '.join(notes.pop(line) for line in range(first, last + 1) if line in notes)


def _type(node: ast.expr | None) -> str:
    "An annotation as one reads it: what is written as a string, because it is defined later, without its quotes."
    return '' if node is None else node.value if isinstance(getattr(node, 'value', None), str) else ast.unparse(node)


def _parameters(args: ast.arguments, notes: dict[int, str]) -> tuple[Parameter, ...]:
    "The parameters of a function, without `self` and `cls`."
    positional = args.posonlyargs + args.args
    defaults = [None] * (len(positional) - len(args.defaults)) + args.defaults
    every = [
        *((p, d, '', False) for p, d in zip(positional, defaults, strict=True)),
        *([(args.vararg, None, '*', False)] if args.vararg else []),
        *((p, d, '', True) for p, d in zip(args.kwonlyargs, args.kw_defaults, strict=True)),
        *([(args.kwarg, None, '**', True)] if args.kwarg else []),
    ]
    return tuple(
        Parameter(
            stars + p.arg,
            _type(p.annotation),
            ast.unparse(default) if default else '',
            _beside(notes, p.lineno, (default or p).end_lineno),
            keyword,
        )
        for p, default, stars, keyword in every
        if p.arg not in ('self', 'cls')
    )


def _signature(parameters: tuple[Parameter, ...], returns: ast.expr | None = None) -> str:
    "As one writes it: `(x: Tensor, *, seed: int = 0) -> Tensor`."
    words, starred = [], False
    for p in parameters:
        if p.keyword and not starred and not p.name.startswith('**'):
            words.append('*')
        starred = starred or p.keyword or p.name.startswith('*')
        words.append(str(p))
    return f'({", ".join(words)})' + (f' -> {_type(returns)}' if returns else '')


def _function(node: ast.FunctionDef, notes: dict[int, str], kind: str = 'function') -> Entry:
    "The entry of a function or method."
    parameters = _parameters(node.args, notes)
    returns = _beside(notes, node.returns.lineno, node.returns.end_lineno) if node.returns else ''
    words = ast.get_docstring(node) or ''
    return Entry(kind, node.name, _signature(parameters, node.returns), parameters, returns, words)


def _decorators(node: ast.AST) -> set[str]:
    "The names of the decorators of a function or class, without what they are given."
    return {ast.unparse(d).split('(')[0].split('.')[-1] for d in node.decorator_list}


def _field_settings(value: ast.expr | None) -> dict[str, ast.expr]:
    "What `field(...)` of dataclasses is given; a plain default is `default`."
    if isinstance(value, ast.Call) and ast.unparse(value.func) in ('field', 'dataclasses.field'):
        return {k.arg: k.value for k in value.keywords}
    return {'default': value} if value else {}


def _fields(node: ast.ClassDef, notes: dict[int, str]) -> Iterator[Parameter]:
    "The public fields that a dataclass or named tuple declares itself."
    by_name = any('kw_only=True' in ast.unparse(d) for d in node.decorator_list)
    for statement in node.body:
        if not isinstance(statement, ast.AnnAssign) or 'ClassVar' in ast.unparse(statement.annotation):
            continue
        given = {k: ast.unparse(v) for k, v in _field_settings(statement.value).items()}
        if statement.target.id.startswith('_') or given.get('init') == 'False':
            continue
        empty = {'list': '[]', 'dict': '{}'}.get(given.get('default_factory'), '...' if 'default_factory' in given else '')
        comment = _beside(notes, statement.lineno, statement.end_lineno)
        default, keyword = given.get('default', empty), given.get('kw_only', str(by_name)) == 'True'
        yield Parameter(statement.target.id, _type(statement.annotation), default, comment, keyword)


def _constructor(node: ast.ClassDef, text: str, known: dict) -> tuple[Parameter, ...] | None:
    "What a class is made from: parameters of its `__init__`, or fields with inherited ones; None if neither is there."
    for statement in node.body:
        if isinstance(statement, ast.FunctionDef) and statement.name == '__init__':
            return _parameters(statement.args, comments(text))
    bases = [ast.unparse(b) for b in node.bases]
    if 'dataclass' in _decorators(node) or 'NamedTuple' in bases:
        found = {}
        for base in (known[b] for b in reversed(bases) if b in known):
            found |= {p.name: p for p in _constructor(*base, known) or ()}
        found |= {p.name: p for p in _fields(node, comments(text))}
        return tuple(sorted(found.values(), key=lambda p: p.keyword))  # a stable sort: those by position first
    return None


def _class(node: ast.ClassDef, text: str, known: dict) -> Entry:
    "The entry of a class with its documented public methods."
    parameters, notes, members = _constructor(node, text, known), comments(text), []
    for method in node.body:
        if not isinstance(method, ast.FunctionDef) or not ast.get_docstring(method):
            continue
        if method.name == '__call__' or not method.name.startswith('_'):
            kind = 'property' if _decorators(method) & {'property', 'cached_property'} else 'method'
            members.append(_function(method, notes, kind))
    bases = tuple(ast.unparse(b) for b in node.bases if ast.unparse(b) != 'NamedTuple')
    signature = '' if parameters is None else _signature(parameters)
    words = ast.get_docstring(node) or ''
    return Entry('class', node.name, signature, parameters or (), '', words, bases, tuple(members))


def _named(statement: ast.stmt) -> str:
    "The name that a statement at the top of a module defines, or ''."
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return statement.name
    targets = getattr(statement, 'targets', [getattr(statement, 'target', None)])
    return targets[0].id if isinstance(targets[0], ast.Name) else ''


def exported_cells(nb: dict) -> list[str]:
    "The code that a notebook exports with a public name, cell by cell."
    cells = [''.join(c['source']) for c in nb['cells'] if c['cell_type'] == 'code']
    return [without_directives(text) for text in cells if {'export', 'exports'} & directives(text).keys()]


def known_classes(nbs: dict[str, dict]) -> dict[str, tuple[ast.ClassDef, str]]:
    "Every exported class by its name, with the text of its cell."
    cells = [text for nb in nbs.values() for text in exported_cells(nb)]
    return {n.name: (n, text) for text in cells for n in ast.parse(text).body if isinstance(n, ast.ClassDef)}


def entries(text: str, known: dict | None = None) -> list[Entry]:
    "What one exported cell adds to the API: nothing for imports and for names that begin with an underscore."
    found = []
    for node in ast.parse(text).body:
        name = _named(node)
        if not name or name.startswith('_'):
            continue
        if isinstance(node, ast.FunctionDef):
            found.append(_function(node, comments(text)))
        elif isinstance(node, ast.ClassDef):
            found.append(_class(node, text, known or {}))
        else:
            annotation = _type(getattr(node, 'annotation', None))
            words = _beside(comments(text), node.lineno, node.end_lineno) if node.lineno == node.end_lineno else ''
            found.append(Entry('data', name, annotation, words=words))
    return found


def symbols(nbs: dict[str, dict]) -> set[str]:
    "The full names that pages describe: modules, what they export, and methods of classes."
    known, found = known_classes(nbs), set()
    for nb in nbs.values():
        if module := module_of(nb):
            found.add(module)
            for entry in (e for text in exported_cells(nb) for e in entries(text, known)):
                found |= {f'{module}.{entry.name}', *(f'{module}.{entry.name}.{m.name}' for m in entry.members)}
    return found


def module_of(nb: dict) -> str | None:
    "The module that a notebook defines, with the package's name in front."
    marks = [directives(''.join(c['source'])) for c in nb['cells'] if c['cell_type'] == 'code']
    return next((f'robustnb.{m["default_exp"]}' for m in marks if 'default_exp' in m), None)


# ------------------------------------------------------------------------------------------------------------ markdown

# What is left as it is: fenced code, headings, formulas. Then links, whose words may hold an image. Then code spans.
_TOKEN = re.compile(
    r'^(?P<fence>`{3,}|~{3,}).*?^(?P=fence)[`~]*[ \t]*$|^\#{1,6}[ ].*?$|\$\$.+?\$\$|\$[^$\n]+\$'
    r'|(?P<mark>!?)\[(?P<words>(?:[^\[\]]|\[[^\[\]]*\])*)\]\((?P<address>[^()\s]+)\)'
    r'|(?<!`)(?P<ticks>`+)(?!`)(?P<code>.+?)(?<!`)(?P=ticks)(?!`)',
    re.M | re.S,
)
_NAME = re.compile(r'[A-Za-z_][\w.]*(?:\(\))?')


def without_directives(text: str) -> str:
    "The source of a cell without its `#| ...` lines."
    return re.sub(r'^#\|.*\n?', '', text, flags=re.M).strip('\n')


def full_name(name: str, names: set[str], module: str | None = None) -> str | None:
    "The one thing that `name` can mean on the page of `module`: what is its own, then what only one module has."
    name = name.removesuffix('()')
    modules = {full for full in names if full.count('.') == 1}
    things = names - modules
    certain = [full for full in (f'{module}.{name}', f'robustnb.{name}', name) if full in things]
    possible = [full for full in things if full.split('.', 2)[2] == name]
    if name in modules:
        return name
    return certain[0] if certain else possible[0] if len(possible) == 1 else None


def rewrite(text: str, names: set[str] = frozenset(), module: str | None = None, own: str = '', target: Callable = str) -> str:
    "Markdown whose code spans link to what they name (but `own`), and whose links go through `target`."

    def in_link(match: re.Match) -> str:
        return one(match) if match['address'] else match[0]

    def one(match: re.Match) -> str:
        if match['address']:
            return f'{match["mark"]}[{_TOKEN.sub(in_link, match["words"])}]({target(match["address"])})'
        name = (match['code'] or '').strip()
        full = full_name(name, names, module) if _NAME.fullmatch(name) else None
        return match[0] if full in (None, own) else f'{{py:obj}}`{name} <{full}>`'

    return _TOKEN.sub(one, text)


def escaped(text: str) -> str:
    "Plain text as markdown, code spans left as they are: a comment means its stars and brackets."
    parts = re.split(r'(`[^`]+`)', text)
    return ''.join(part if i % 2 else re.sub(r'([\\*_<>\[\]$#])', r'\\\1', part) for i, part in enumerate(parts))


@dataclass(frozen=True)
class Place:
    "A file of the project and the page that it becomes, to find where its links lead on the site."

    source: str  # relative to the project
    page: str
    pages: dict[str, str]  # source -> page, of everything on the site

    def target(self, address: str) -> str:
        "An address in this file as it is on the site: pages stay relative, other files are shown by GitHub."
        if re.match(r'[a-z]+:|/', address):
            return address
        if address.startswith('#'):
            return address.lower()  # Jupyter keeps the capitals of a heading in its anchor, Sphinx does not
        path, _, anchor = address.partition('#')
        file = os.path.normpath(Path(self.source).parent / path)
        anchor = f'#{anchor}' if anchor else ''
        if file in self.pages:
            page = os.path.relpath(self.pages[file], Path(self.page).parent)
            return f'{page}{Path(file).suffix}{anchor.lower()}'
        if not (ROOT / file).exists():
            raise ValueError(f'{self.source} links to {address}, and {file} is not there')
        if Path(file).suffix in ('.png', '.svg', '.jpg', '.gif'):
            return '/' + _image(file)
        return on_github(file, 'tree' if (ROOT / file).is_dir() else 'blob') + anchor


def on_github(file: str, view: str = 'blob') -> str:
    "The address of a file of the project on GitHub."
    config = settings()
    return f'{config["git_url"]}/{view}/{config["branch"]}/{file}'


def _image(file: str) -> str:
    "Puts an image of the project beside the pages, under the same name."
    (PAGES / file).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(ROOT / file, PAGES / file)
    return file


# --------------------------------------------------------------------------------------------------------------- cells


def _fence(level: int) -> str:
    return ':' * (7 - level)


def described(entry: Entry, link: Callable[[str, str], str], module: str, level: int = 0, parent: str = '') -> str:
    "The markdown of an entry: a directive of Sphinx's Python domain, with the methods of a class inside."
    own = '.'.join(filter(None, [module, parent, entry.name]))
    options, body = [], []
    if entry.kind == 'data':
        options += [f':type: {entry.signature}'] if entry.signature else []
    elif entry.kind == 'property':
        options += [f':type: {entry.signature.partition(" -> ")[2]}'] if ' -> ' in entry.signature else []
    if parent:
        options.append(':no-contents-entry:')
    if entry.bases:
        body.append('*Extends* ' + ', '.join(link(f'`{base}`', own) for base in entry.bases))
    words = escaped(entry.words) if entry.kind == 'data' else entry.words
    body += [link(words, own)] if words else []
    fields = [f':param {p.name}: {link(escaped(p.comment), own)}' for p in entry.parameters if p.comment]
    fields += [f':returns: {link(escaped(entry.returns), own)}'] if entry.returns else []
    body += ['\n'.join(fields).replace(':param **', r':param \*\*').replace(':param *', r':param \*')] if fields else []
    body += [described(member, link, module, level + 1, entry.name) for member in entry.members]
    signature = entry.signature if entry.kind in ('function', 'class', 'method') else ''
    opening = f'{_fence(level)}{{py:{entry.kind}}} {entry.name}{signature}'
    return '\n'.join([opening, *options, '', '\n\n'.join(body), _fence(level)])


def _folded(cell: NotebookNode, label: str) -> NotebookNode:
    "A code cell whose source is folded away behind `label`."
    cell.metadata = NotebookNode(tags=['hide-input'], mystnb={'code_prompt_show': label, 'code_prompt_hide': label})
    cell.outputs = []  # a definition shows nothing
    return cell


def _helpers(cell: NotebookNode) -> NotebookNode:
    "A cell of helpers, folded away behind their names."
    names = list(filter(None, map(_named, ast.parse(cell.source).body)))
    label = f'Helper{"s" * (len(names) > 1)}'
    cell = _folded(cell, f'{label}: {", ".join(names)}' if names else label)
    cell.metadata['helpers'] = True
    return cell


def merged_helpers(cells: list[NotebookNode]) -> list[NotebookNode]:
    "Cells of helpers that follow each other as one."
    found = []
    for cell in cells:
        if found and 'helpers' in cell.metadata and 'helpers' in found[-1].metadata:
            found[-1] = _helpers(NotebookNode(cell, source=f'{found[-1].source}\n\n{cell.source}'))
        else:
            found.append(cell)
    return found


def _plumbing(text: str) -> bool:
    "Whether a cell holds only what every module begins with: imports and its logger."
    return all(
        isinstance(s, ast.Import | ast.ImportFrom) or isinstance(s, ast.Assign) and 'getLogger' in ast.unparse(s.value)
        for s in ast.parse(text).body
    )


def adapt_code(cell: NotebookNode, link: Callable[[str, str], str], module: str | None, known: dict) -> list[NotebookNode]:
    "The cells that one code cell becomes on its page."
    marks, text = directives(cell.source), without_directives(cell.source)
    if not text or {'hide', 'default_exp'} & marks.keys():
        return []
    cell = NotebookNode(cell, source=text, execution_count=None, metadata=NotebookNode())
    if not {'export', 'exporti', 'exports'} & marks.keys():
        return [cell]
    if _plumbing(text):
        return []
    found = [] if 'exporti' in marks else entries(text, known)
    if not found:
        return [_helpers(cell)]
    # Addresses of nbdev's own documentation, measures.html#relative_error, work here too.
    anchors = ''.join(f'<span id="{entry.name.lower()}"></span>' for entry in found)
    texts = [anchors, *(described(entry, link, module) for entry in found)]
    return [new_markdown_cell('\n\n'.join(texts)), _folded(cell, 'Source')]


def _head(title: str, source: str, module: str | None) -> list[NotebookNode]:
    "The first cells of a page: title and subtitle in one cell, and the names that the page defines."
    match = re.match(r'#\s+(.+?)\s*(?:\n+>\s*(.+?))?\s*(?:\n\n(.*))?\Z', title, re.S)
    if not match:
        raise ValueError(f'{source}: the first markdown cell is `# Title` and `> subtitle`, got {title!r}')
    name, lead, rest = match.groups()
    parts = [f'# {name}', f'```{{py:module}} {module}\n```' if module else '']
    parts += [f'{{.lead}}\n{re.sub(chr(10) + r">? *", " ", lead)}' if lead else '', rest or '']
    return [new_markdown_cell('\n\n'.join(filter(None, parts)))]


def adapt(nb: NotebookNode, place: Place, names: set[str] = frozenset(), known: dict | None = None) -> NotebookNode:
    "A notebook as a page: entries for what it exports, no directives, no hidden cells, links that work on the site."
    module, cells, titled = module_of(nb), [], False

    def link(text: str, own: str = '') -> str:
        return rewrite(text, names, module, own, place.target)

    for cell in nb.cells:
        if cell.cell_type == 'code':
            cells += adapt_code(cell, link, module, known or {})
        elif cell.cell_type != 'markdown':
            continue
        elif not titled:
            titled = True
            cells += _head(link(cell.source), place.source, module)
        elif 'colab-badge' in cell.source:
            parts = [cell.source, f'[Notebook on GitHub]({on_github(place.source)})']
            cells.append(new_markdown_cell('{.badges}\n' + ' '.join(parts)))
        else:
            cells.append(new_markdown_cell(link(cell.source)))
    cells = merged_helpers(cells)
    language = {'name': 'python', 'pygments_lexer': 'ipython3'}
    kernel = {'display_name': 'python3', 'language': 'python', 'name': 'python3'}
    for number, cell in enumerate(cells):
        cell.id = f'cell-{number}'
    return nbformat.v4.new_notebook(cells=cells, metadata={'kernelspec': kernel, 'language_info': language})


# --------------------------------------------------------------------------------------------------------------- build


def heading(nb: dict) -> tuple[str, str]:
    "Title and subtitle of a notebook."
    first = next(''.join(c['source']) for c in nb['cells'] if c['cell_type'] == 'markdown')
    title, _, lead = first.partition('\n')
    return title.lstrip('# ').strip(), re.sub(r'\s*\n>?\s*', ' ', lead.strip().removeprefix('>')).strip()


def front_page(nbs: dict[str, dict], link: Callable[[str], str]) -> str:
    "The table of contents that the front page shows, and the hidden ones from which Sphinx makes its side bar."
    shown, hidden = [CONTENTS], []
    first = '\n'.join(''.join(cell['source']) for cell in nbs['index.ipynb']['cells'])
    for group, members in contents(list(nbs), first).items():
        lines = [f'[{title}]({page_name(m)}.ipynb)\n: {link(lead)}' for m in members for title, lead in [heading(nbs[m])]]
        shown.append(f'### {group}\n\n{{.pages}}\n' + '\n\n'.join(lines))
        hidden.append((group, [page_name(m) for m in members]))
    hidden.append(('Project', list(PROJECT.values())))
    trees = [f'```{{toctree}}\n:hidden:\n:caption: {group}\n\n' + '\n'.join(pages) + '\n```' for group, pages in hidden]
    return '\n\n'.join([*shown, *trees])


def with_contents(nb: NotebookNode, text: str) -> NotebookNode:
    "The front page with `text` in the place of its section of contents."
    places = [cell for cell in nb.cells if cell.cell_type == 'markdown' and cell.source.startswith(CONTENTS + '\n')]
    if len(places) != 1:
        raise ValueError(f'nbs/index.ipynb needs one cell that starts with {CONTENTS!r}, and has {len(places)}')
    _, *rest = re.split(r'^(?=## )', places[0].source.removeprefix(CONTENTS), flags=re.M)
    places[0].source = '\n\n'.join([text, *map(str.strip, rest)])
    return nb


def write_pages() -> None:
    "Everything that Sphinx takes, freshly into _proc/."
    shutil.rmtree(WORK, ignore_errors=True)
    nbs = {p.relative_to(NBS).as_posix(): nbformat.read(p, as_version=4) for p in notebooks()}
    names, known = symbols(nbs), known_classes(nbs)
    pages = {f'nbs/{name}': page_name(name) for name in nbs} | PROJECT
    if len(set(pages.values())) < len(pages):
        raise ValueError(f'two notebooks would become one page: {sorted(pages.values())}')
    for name, nb in nbs.items():
        place = Place(f'nbs/{name}', page_name(name), pages)
        page = adapt(nb, place, names, known)
        if name == 'index.ipynb':
            page = with_contents(page, front_page(nbs, lambda text: rewrite(text, names)))
        file = PAGES / f'{place.page}.ipynb'
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(page, indent=1), encoding='utf-8')
    for name, page in PROJECT.items():
        place = Place(name, page, pages)
        text = (ROOT / name).read_text(encoding='utf-8')
        (PAGES / f'{page}.md').write_text(rewrite(text, names, target=place.target), encoding='utf-8')


def source_address(info: dict[str, str]) -> str | None:
    "Where GitHub shows the code of what Sphinx describes: `info` holds its module and its full name."
    file = ROOT / (info['module'].replace('.', '/') + '.py')
    if not file.exists():
        return None
    nodes = [ast.parse(file.read_text(encoding='utf-8'))]
    for part in info['fullname'].split('.'):
        nodes = [n for node in nodes for n in node.body if _named(n) == part]
    lines = f'#L{nodes[0].lineno}-L{nodes[0].end_lineno}' if nodes else ''
    return on_github(file.relative_to(ROOT).as_posix()) + lines


def main() -> int:
    "Build the site; a warning is a failure."
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    from sphinx.cmd.build import main as sphinx_build

    write_pages()
    built = WORK / 'site'  # not at once in its place: myst-nb leaves a folder of its own beside it
    options = ['-q', '-E', '-W', '--keep-going', '-b', 'html', '-c', str(ROOT / 'docs'), '-d', str(WORK / 'doctrees')]
    failed = sphinx_build([*options, str(PAGES), str(built)])
    if not failed:
        shutil.rmtree(SITE, ignore_errors=True)
        built.rename(SITE)
        print(f'The site is in {os.path.relpath(SITE / "index.html")}')
    return failed


if __name__ == '__main__':
    sys.exit(main())
