"""Sphinx's settings. `make docs` builds the site; tools/docs.py prepares the pages."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / 'tools'))
from docs import ROOT, settings, source_address  # noqa: E402

config = settings()
project, author, copyright = config['title'], config['author'], config['copyright']
version = release = config['version']

extensions = ['myst_nb', 'sphinx.ext.linkcode', 'sphinx_copybutton']
highlight_language = 'text'  # of code in prose that names none
html_theme, html_title, html_baseurl = 'furo', project, f'{config["doc_host"]}{config["doc_baseurl"]}/'
html_static_path, html_css_files = [str(ROOT / 'docs' / '_static')], ['site.css']
html_copy_source = html_show_sphinx = False
html_theme_options = {
    'top_of_page_buttons': [],  # each page has its own line of links
    'footer_icons': [{'name': 'GitHub', 'url': config['git_url'], 'html': 'GitHub', 'class': ''}],
}

nb_execution_mode = 'off'
nb_merge_streams = True
myst_enable_extensions = ['amsmath', 'attrs_block', 'colon_fence', 'deflist', 'dollarmath', 'fieldlist']
myst_heading_anchors = 4
suppress_warnings = ['myst.header']  # a section may begin at the third level

add_module_names = False
python_maximum_signature_line_length = 76
python_use_unqualified_type_names = True
toc_object_entries_show_parents = 'hide'
copybutton_exclude = '.linenos, .gp, .go'


def linkcode_resolve(domain: str, info: dict[str, str]) -> str | None:
    "The address of the [source] link beside a name."
    return source_address(info) if domain == 'py' else None
