"""Everything about the package is said once, in settings.ini; this file hands it to setuptools."""

import shlex
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
config = ConfigParser(delimiters=['='])
config.read(ROOT / 'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
lib = cfg['lib_path']
extra_suffix = '_requirements'

setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    keywords=cfg['keywords'],
    author=cfg['author'],
    author_email=cfg['author_email'],
    license='Apache-2.0',
    url=cfg['git_url'],
    project_urls={'Documentation': cfg['doc_host'] + cfg['doc_baseurl'], 'Source': cfg['git_url']},
    classifiers=[
        'Development Status :: 3 - Alpha',
        f'Intended Audience :: {cfg["audience"]}',
        f'Natural Language :: {cfg["language"]}',
        'Programming Language :: Python :: 3',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
    python_requires=f'>={cfg["min_python"]}',
    install_requires=shlex.split(cfg['requirements']),
    extras_require={key.removesuffix(extra_suffix): shlex.split(cfg[key]) for key in cfg if key.endswith(extra_suffix)},
    packages=find_packages(include=[lib, f'{lib}.*']),
    package_data={lib: shlex.split(cfg['package_data'])},
    entry_points={
        'console_scripts': shlex.split(cfg['console_scripts']),
        # nbdev finds documentation links across packages through this one.
        'nbdev': [f'{lib}={lib}._modidx:d'],
    },
)
