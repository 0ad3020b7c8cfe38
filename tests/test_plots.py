"""Figures: what they accept and refuse, where things stand on them, and that nobody else notices."""

import hashlib
import io
import os
import subprocess
import sys
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import colors as mcolors
from matplotlib.figure import Figure
from matplotlib.image import imread

from robustnb import plots
from robustnb.plots import (
    COLORS,
    color_of,
    curves,
    feature_maps,
    figure,
    heatmap,
    html_image,
    image_strip,
    panels,
    png,
    spread,
    style,
)

EPS = np.array([0, 0.1, 0.2, 0.3])


def pixels(fig: Figure) -> np.ndarray:
    "The figure as an array (height, width, 4)."
    return imread(io.BytesIO(png(fig)), format='png')


def texts(fig: Figure) -> list:
    "Everything written on a figure that is drawn, with its box in pixels."
    fig.draw_without_rendering()
    axes = [axis for ax in fig.axes for axis in (ax.xaxis, ax.yaxis)]
    outside = {  # a label has a text and a place even where its tick lies beyond the end of the axis
        id(tick.label1)
        for axis in axes
        for tick in axis.get_major_ticks()
        if not min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())
    }
    found = fig.findobj(matplotlib.text.Text)
    return [t for t in found if t.get_text().strip() and t.get_visible() and id(t) not in outside]


def boxes(fig: Figure) -> dict[str, tuple]:
    "Words -> box of their letters, in pixels."
    return {t.get_text(): t.get_window_extent() for t in texts(fig)}


def assert_legible(fig: Figure) -> None:
    "No two words overlap, none leaves the figure, none is smaller than 10 points."
    written = [(t.get_text(), t.get_window_extent(), t.get_rotation(), t.get_fontsize()) for t in texts(fig)]
    width, height = fig.get_size_inches() * fig.dpi
    for i, (one, box, turned, size) in enumerate(written):
        assert size >= 10, one
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1, f'{one!r} is cut off'
        for other, other_box, other_turned, _ in written[i + 1 :]:
            if turned % 90 == other_turned % 90 == 0:  # the box of a slanted word is mostly empty
                apart = box.x1 <= other_box.x0 + 1 or other_box.x1 <= box.x0 + 1
                apart = apart or box.y1 <= other_box.y0 + 1 or other_box.y1 <= box.y0 + 1
                assert apart, f'{one!r} overlaps {other!r}'


# ------------------------------------------------------------------------------------------------------ the style


def test_global_state_is_untouched():
    before = dict(matplotlib.rcParams)
    figs = [
        curves(EPS, {'a': EPS}, 'x', 'y'),
        heatmap(np.eye(3)),
        image_strip(np.zeros((2, 4, 4))),
        feature_maps({'a': np.zeros((3, 4, 4)), 'b': np.ones((3, 4, 4))}),
        feature_maps({'a': np.zeros(3), 'b': np.ones(3)}),
        panels(EPS, {'one': {'a': EPS}}, 'x', 'y'),
        spread(['a', 'b'], {'PGD': np.eye(2)}, 'x', 'y'),
    ]
    for fig in figs:
        png(fig)
    assert dict(matplotlib.rcParams) == before
    with pytest.raises(ZeroDivisionError), style():
        1 / 0  # noqa: B018
    assert dict(matplotlib.rcParams) == before


def test_the_users_settings_do_not_reach_a_figure():
    ours = png(curves(EPS, {'PGD': (EPS, EPS - 0.1, EPS + 0.1)}, 'eps', 'error', 'title'))
    with matplotlib.rc_context({'font.size': 30, 'axes.grid': False, 'xtick.labelsize': 30, 'lines.linewidth': 9}):
        fig = curves(EPS, {'PGD': (EPS, EPS - 0.1, EPS + 0.1)}, 'eps', 'error', 'title')
        assert png(fig) == ours
    fig = curves(EPS, {'PGD': (EPS, EPS - 0.1, EPS + 0.1)}, 'eps', 'error', 'title')
    with matplotlib.rc_context({'font.size': 30, 'xtick.labelsize': 30}):
        assert png(fig) == ours, 'ticks are made when the figure is drawn, and must not take what is set then'


def test_pyplot_is_neither_needed_nor_filled():
    script = (
        'import sys, robustnb.plots as p\n'
        'fig = p.curves([1, 2], {"a": [1, 2]}, "x", "y"); assert fig._repr_png_()[:4] == b"\\x89PNG"\n'
        'assert "matplotlib.pyplot" not in sys.modules and "torch" not in sys.modules\n'
        'import matplotlib.pyplot as plt\n'
        'p.heatmap([[1]]); assert not plt.get_fignums()\n'
        'import hashlib\n'
        'print(hashlib.sha256(p.png(p.panels([1, 2], {"m": {"b": [1, 2], "a": [2, 1]}}, "x", "y", "t"))).hexdigest())\n'
    )
    ran = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, env=os.environ)
    assert ran.returncode == 0, ran.stderr
    again = png(panels([1, 2], {'m': {'b': [1, 2], 'a': [2, 1]}}, 'x', 'y', 't'))
    assert ran.stdout.strip() == hashlib.sha256(again).hexdigest(), 'the same figure is the same file in every process'


def test_a_notebook_shows_a_figure_once():
    interactive = pytest.importorskip('IPython.core.interactiveshell')
    shell = interactive.InteractiveShell()
    data, _ = shell.display_formatter.format(curves(EPS, {'a': EPS}, 'x', 'y'))
    assert sorted(data) == ['image/png', 'text/plain']


def test_colors():
    assert len(set(COLORS)) == len(COLORS) == 7
    names = [f'm{i}' for i in range(9)]
    assert [color_of(n, names) for n in names] == [*COLORS, *COLORS[:2]]
    assert color_of('b', dict.fromkeys('abc')) == COLORS[1]
    with pytest.raises(ValueError, match="'z' is not one of the series"):
        color_of('z', names)


# How dichromats see a colour in linear RGB: two of Viénot, Brettel and Mollon (1999), three of Machado, Oliveira and
# Fernandes (2009, severity 1).
DICHROMAT = {
    'protanopia': [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    'deuteranopia': [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    'tritanopia': [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
    'protan': [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]],
    'deutan': [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]],
}


def lab(rgb: np.ndarray, vision: str | None) -> np.ndarray:
    "CIE L*a*b* of colours (n, 3), as a reader with `vision` sees them."
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    if vision:
        linear = np.clip(linear @ np.array(DICHROMAT[vision]).T, 0, 1)
    white = np.array([0.95047, 1, 1.08883])
    xyz = linear @ np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]).T / white
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz * (29 / 6) ** 2 / 3 + 4 / 29)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)


def distances(colors: np.ndarray) -> np.ndarray:
    "(n, n) distances of colours; a colour is far from itself."
    return np.linalg.norm(colors[:, None] - colors[None], axis=-1) + 1e3 * np.eye(len(colors))


@pytest.mark.parametrize('vision', [None, *DICHROMAT])
def test_colors_differ_for_every_reader(vision):
    seen = lab(np.array([mcolors.to_rgb(c) for c in COLORS]), vision)
    assert distances(seen).min() > 15  # 2.3 is a just noticeable difference
    assert distances(seen)[0, 1] > 85, 'most figures have two series'
    assert seen[:, 0].max() < 80, 'too light on white paper'


@pytest.mark.parametrize('vision', [None, *DICHROMAT])
def test_colour_maps_work_for_every_reader(vision):
    amount = lab(matplotlib.colormaps[plots._AMOUNT](np.linspace(0, 1, 33))[:, :3], vision)
    assert (np.diff(amount[:, 0]) < 0).all(), 'more is always darker'
    signed = lab(matplotlib.colormaps[plots._SIGNED](np.linspace(0, 1, 33))[:, :3], vision)
    lightness = signed[:, 0]
    assert lightness.argmax() == 16 and (np.diff(lightness[:17]) > 0).all() and (np.diff(lightness[16:]) < 0).all()
    assert np.linalg.norm(signed[4] - signed[-5]) > 25, 'less and more are not confused'


@pytest.mark.parametrize('rows, cols', [(1, 1), (1, 3), (2, 2), (3, 1)])
def test_figure(rows, cols):
    fig, axes = figure(rows, cols)
    assert fig.get_size_inches()[0] == 7.5 and fig.dpi == 80
    assert np.shape(axes) == ({1: ()}.get(rows * cols) or tuple(n for n in (rows, cols) if n > 1) or ())
    assert figure(width=4, height=2)[0].get_size_inches().tolist() == [4, 2]


@pytest.mark.parametrize('dpi', [40, 80, 160])
def test_png_has_the_size_of_the_figure(dpi):
    fig = curves(EPS, {'a long name that needs room': EPS}, 'x', 'y', 'A title')
    height, width, _ = imread(io.BytesIO(png(fig, dpi)), format='png').shape
    assert (width, height) == (int(7.5 * dpi), int(3.6 * dpi))
    assert png(fig, dpi) == png(fig, dpi)


@given(st.text(max_size=40))
@settings(max_examples=10, deadline=None)
def test_alt_text_is_safe(words):
    fig = figure(width=1, height=1)[0]
    found = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag, attrs):
            found.append((tag, dict(attrs)))

    element = html_image(fig, words)
    Parser(convert_charrefs=True).feed(element)
    ((tag, attrs),) = found
    assert tag == 'img' and set(attrs) == {'src', 'alt', 'style'}
    assert ''.join(attrs['alt'].split()) == ''.join(words.replace('\0', '�').split()) or not words.isprintable()


# --------------------------------------------------------------------------------------------------------- curves


def brute_force_spread(wanted, gap, low, high):
    "The same least-squares problem by projected gradient steps on a fine grid of positions: slow, and simple."
    from scipy.optimize import minimize

    wanted = np.asarray(wanted, float)
    room = [{'type': 'ineq', 'fun': lambda p, i=i: p[i + 1] - p[i] - gap} for i in range(len(wanted) - 1)]
    start = low + gap * np.arange(len(wanted))
    return minimize(
        lambda p: ((p - wanted) ** 2).sum(), start, bounds=[(low, high)] * len(wanted), constraints=room, tol=1e-12
    ).x


@given(st.lists(st.floats(-20, 120), min_size=1, max_size=6).map(sorted))
@settings(max_examples=60, deadline=None)
def test_spread_is_the_best_there_is(wanted):
    pytest.importorskip('scipy')
    got = plots._apart(wanted, 12, 0, 100)
    assert np.all(np.diff(got) >= 12 - 1e-9) and got.min() >= -1e-9 and got.max() <= 100 + 1e-9
    best = brute_force_spread(wanted, 12, 0, 100)
    assert ((got - wanted) ** 2).sum() <= ((best - wanted) ** 2).sum() + 1e-3


def test_spread_without_room_stays_in_order():
    assert np.all(np.diff(plots._apart([0, 1, 2], 40, 0, 50)) == 40)


LAYERS = [f'features.{i}' for i in range(14)]
MANY = [f'layer{i // 6}.{i % 6}.conv{i % 2}' for i in range(53)]
LONG = {f'a method with quite a long name {i}': EPS * i for i in range(10)}
DEEP = [f'features.denseblock{i}.denselayer12.norm1.running_mean' for i in range(6)]
AT_ZERO = {f'attack {i}': np.maximum(0.9 - (4 + i) * EPS, 0) for i in range(6)}


@pytest.mark.parametrize(
    'make',
    [
        lambda: curves(EPS, AT_ZERO, 'eps', 'accuracy', 'All end at zero', percent=True),
        lambda: curves(EPS, {'a': EPS, 'b': 1 - EPS}, 'eps', 'accuracy'),
        lambda: curves(EPS, {f'a method with a long name {i}': EPS * i for i in range(12)}, 'eps', 'y', 'Twelve'),
        lambda: curves(LAYERS, {'PGD': np.arange(14), 'noise': np.ones(14)}, 'layer', 'relative error', 'A profile'),
        lambda: curves(MANY, {'PGD': np.arange(53)}, 'layer', 'relative error'),
        lambda: curves([str(i) for i in range(60)], {'PGD': np.arange(60)}, 'unit', 'y'),
        lambda: curves(['conv1', 'conv2', 'fc'], {'PGD': [0.1, 0.2, 0.3]}, 'layer', 'y'),
        lambda: heatmap(np.random.default_rng(0).random((6, 11)), cols=LAYERS[:11], xlabel='layer', title='A table'),
        lambda: heatmap(np.random.default_rng(0).random((60, 40)), xlabel='x', ylabel='y', signed=True),
        lambda: image_strip(np.zeros((8, 8, 8)), titles=[f'a {i}' for i in range(8)], title='Eight digits'),
        lambda: image_strip({'clean': np.zeros((3, 8, 8)), 'an adversarial example': np.ones((3, 8, 8))}, title='Two'),
        lambda: image_strip(
            {'clean': np.zeros((6, 3, 8, 8)), 'PGD': np.ones((6, 3, 8, 8))},
            titles={'clean': ['automobile'] * 6, 'PGD': ['automobile → aeroplane'] * 6},
        ),
        lambda: feature_maps({'clean': np.zeros((9, 4, 4)), 'perturbed': np.ones((9, 4, 4))}, title='Nine'),
        lambda: feature_maps({'clean': np.zeros((2, 9, 4)), 'perturbed': np.ones((2, 9, 4))}, title='Tall'),
        lambda: feature_maps({'clean': np.zeros(10), 'FGSM': np.ones(10), 'PGD': -np.ones(10)}, title='Logits'),
        lambda: feature_maps({'clean': np.zeros(500), 'PGD': -np.ones(500)}, title='Many units'),
        lambda: panels(EPS, {'a model': AT_ZERO}, 'eps', 'accuracy', 'One panel', percent=True),
        lambda: panels(EPS, {f'model {i}': {'a': EPS} for i in range(5)}, 'eps', 'error', 'Numbers above a gap'),
        lambda: panels(
            LAYERS, {f'model {i}': {'a': range(14)} for i in range(7)}, 'layer', 'error', 'Names above a gap'
        ),
        lambda: panels(EPS, {f'layer{i // 4}.{i % 4}.bottleneck.conv{i}': {'a': EPS} for i in range(14)}, 'eps', 'y'),
        lambda: panels(EPS, {c: LONG for c in 'abcd'}, 'eps', 'y', 'A title of very many words ' * 4, percent=True),
        lambda: spread(LAYERS, {'noise': np.eye(14), 'PGD': np.eye(14) + 1}, 'layer', 'relative error', 'Spread'),
        lambda: spread(MANY, {name: np.eye(53) for name in list(LONG)[:3]}, 'layer', 'relative error', 'Many layers'),
        lambda: curves(EPS, LONG, 'eps', 'y', 'A title of very many words ' * 4),
        lambda: heatmap(np.eye(50, 40), MANY[:50], MANY[:40], 'attack', 'layer', 'Fifty by forty', label='error'),
        lambda: heatmap(np.eye(5, 6), DEEP[:5], DEEP[:6], title='Long names', signed=True, label='rank correlation'),
        lambda: heatmap(np.full((5, 9), 1e6), title='Numbers that find no room'),
        lambda: heatmap([[1.0, 2.0, 3.0]], ['one row'], list('abc'), label='error'),
        lambda: heatmap([[1.0], [2.0]], list('ab'), ['one column'], signed=True),
        lambda: image_strip(
            {'clean': np.eye(30).reshape(30, 1, 5, 6), 'PGD': np.zeros((30, 5, 6))}, LAYERS * 2 + ['a'] * 2
        ),
        lambda: image_strip({'signal': np.zeros((3, 1, 1, 784)), 'change': np.zeros((3, 1, 784))}, signed=['change']),
        lambda: image_strip({'a': np.zeros((1, 3, 64, 64)), 'b': np.zeros((1, 8, 8))}, {'a': ['3'], 'b': ['8 ' * 40]}),
        lambda: feature_maps({'clean': np.zeros((64, 7, 7)), 'PGD': np.ones((64, 7, 7))}, top=20, title='Twenty'),
        lambda: image_strip({'a row with a long name': np.zeros((2, 8, 8))}, title='A title of very many words ' * 4),
        lambda: feature_maps({'clean': np.zeros(10), 'PGD': np.ones(10)}, title='A title of very many words ' * 4),
        lambda: spread(LAYERS[:2], {'PGD': np.eye(2)}, 'layer', 'y', 'A title of very many words ' * 4),
    ],
)
def test_legible_at_600_pixels(make):
    fig = make()
    assert fig.get_size_inches()[0] * fig.dpi == 600
    assert_legible(fig)


def test_names_stand_beside_the_lines_and_not_on_them():
    fig = curves(EPS, AT_ZERO, 'eps', 'accuracy', percent=True)
    found = boxes(fig)
    panel = fig.axes[0].get_window_extent()
    heights = [found[name].y0 for name in AT_ZERO]
    assert all(found[name].x0 > panel.x1 for name in AT_ZERO)
    assert heights == sorted(heights, reverse=True), 'names that end together stand in their own order'
    colors = {t.get_text(): t.get_color() for t in texts(fig)}
    assert [colors[name] for name in AT_ZERO] == list(COLORS[:6])


def test_a_name_follows_its_line():
    fig = curves(EPS, {'low': EPS * 0, 'high': EPS * 0 + 1}, 'x', 'y', ylim=(-1, 2))
    fig.axes[0].set_ylim(-9, 10)
    found, to_pixels = boxes(fig), fig.axes[0].transData.transform
    for name, value in (('low', 0), ('high', 1)):
        box = found[name]
        assert abs((box.y0 + box.y1) / 2 - to_pixels((0, value))[1]) < 3


def line_data(fig):
    "Label -> (x, y) of each line of the first panel."
    return {line.get_label(): line.get_data() for line in fig.axes[0].lines}


def test_curves_draw_what_they_are_given():
    banded = ([1, 2, np.nan, 4], [0, 1, 2, 3], [2, 3, 4, 5])
    fig = curves(EPS, {'plain': [1, 2, 3, 4], 'banded': banded}, 'eps', 'y', 't')
    data = line_data(fig)
    assert np.array_equal(data['plain'], [EPS, [1, 2, 3, 4]])
    assert np.array_equal(data['banded'][1], [1, 2, np.nan, 4], equal_nan=True)
    band = fig.axes[0].collections[1].get_paths()[0].vertices
    assert {0, 5} <= set(band[:, 1])
    assert (fig.axes[0].get_xlabel(), fig.axes[0].get_ylabel(), fig.axes[0].get_title('left')) == ('eps', 'y', 't')


def test_a_tuple_of_three_numbers_is_a_series():
    fig = curves([1, 2, 3], {'a': (7, 8, 9)}, 'x', 'y')
    assert line_data(fig)['a'][1].tolist() == [7, 8, 9]


def test_intervals_of_stats_can_be_passed():
    pytest.importorskip('torch')
    from robustnb.stats import wilson

    interval = wilson(np.array([90, 50, 3]), np.array([100, 100, 100]))
    band = curves([1, 2, 3], {'PGD': interval}, 'eps', 'accuracy', percent=True).axes[0].collections[0]
    heights = band.get_paths()[0].vertices[:, 1]
    assert np.isclose(heights.min(), np.min(interval[1])) and np.isclose(heights.max(), np.max(interval[2]))


def test_curves_on_a_panel_of_yours():
    fig, axes = figure(1, 2)
    assert curves(EPS, {'a': EPS}, 'x', 'y', ax=axes[1]) is fig
    assert not axes[0].lines and len(axes[1].lines) == 1


def test_percent():
    ax = curves(EPS, {'a': EPS}, 'x', 'y', percent=True).axes[0]
    assert [t.get_text() for t in texts(ax.figure) if '%' in t.get_text()] == ['0%', '20%', '40%', '60%', '80%', '100%']
    assert curves(EPS, {'a': EPS}, 'x', 'y', percent=True, ylim=(0, 0.4)).axes[0].get_ylim() == (0, 0.4)


@pytest.mark.parametrize('values', [[np.nan] * 4, [np.inf] * 4, [1, np.inf, np.nan, 2]])
def test_curves_without_finite_values(values, recwarn):
    png(curves(EPS, {'a': values, 'b': EPS}, 'x', 'y'))
    assert not recwarn.list


def test_no_points_and_no_series():
    png(curves([], {'a': []}, 'x', 'y'))
    png(curves(EPS, {}, 'x', 'y'))


@pytest.mark.parametrize(
    'entry, shape',
    [([1, 2], r'\(2,\)'), (([1] * 4, [1] * 4, [1] * 3), r'\(4,\), \(4,\), \(3,\)'), (np.ones((4, 2)), r'\(4, 2\)')],
)
def test_wrong_lengths(entry, shape):
    with pytest.raises(ValueError, match=f"series 'PGD' has shape .*{shape}.*, but x has 4 entries"):
        curves(EPS, {'PGD': entry}, 'x', 'y')


# ---------------------------------------------------------------------------------------------- panels and spread


@given(st.text('ab ._/', max_size=60), st.integers(4, 30))
@settings(max_examples=60, deadline=None)
def test_folded_names_lose_no_letter(name, width):
    folded = plots._fold(name, width)
    assert max(map(len, folded.split('\n'))) <= width
    assert ''.join(folded.split()) == ''.join(name.split())


@given(st.lists(st.text('ab.', max_size=12), max_size=5), st.integers(5, 9))
@settings(max_examples=60, deadline=None)
def test_short_names_stay_different(names, width):
    short = plots._short(names, width)
    assert [a == b for a in names for b in names] == [a == b for a in short for b in short]
    assert short == names or max(map(len, short)) <= width
    assert all(new == old for new, old in zip(short, names, strict=True) if len(old) <= width)


@pytest.mark.parametrize('count', [1, 5])
def test_panels_share_axes_and_colours(count):
    series = {f's{i}': EPS * (i + 1) for i in range(9)}
    tables = {
        f'p{i}': {name: v for j, (name, v) in enumerate(series.items()) if i == 0 or (i + j) % 3} for i in range(count)
    }
    fig = panels(EPS, tables, 'x', 'y', 'title')
    assert [ax.get_title('left') for ax in fig.axes] == list(tables)
    assert len({(ax.get_xlim(), ax.get_ylim()) for ax in fig.axes}) == 1
    for ax, table in zip(fig.axes, tables.values(), strict=True):
        drawn = {line.get_label(): (line.get_color(), line.get_linestyle()) for line in ax.lines}
        assert drawn == {name: (color_of(name, series), '-' if name < 's7' else '--') for name in table}
    (legend,) = fig.legends
    assert [t.get_text() for t in legend.get_texts()] == list(series) and legend.get_title().get_text() == 'title'


def test_panels_write_numbers_at_the_outer_edge_only():
    fig = panels(EPS, {c: {'a': EPS} for c in 'abcde'}, 'x', 'y')
    fig.draw_without_rendering()
    shown = [
        (any(t.get_visible() for t in ax.get_xticklabels()), any(t.get_visible() for t in ax.get_yticklabels()))
        for ax in fig.axes
    ]
    assert shown == [(False, True), (False, False), (True, False), (True, True), (True, False)]


def test_panels_draw_what_curves_draw():
    entry = ([1, 2, np.nan, 4], [0, 1, 2, 3], [2, 3, 4, 5])
    ours, theirs = panels(EPS, {'m': {'a': entry}}, 'x', 'y'), curves(EPS, {'a': entry}, 'x', 'y')
    assert np.array_equal(line_data(ours)['a'], line_data(theirs)['a'], equal_nan=True)
    bands = [fig.axes[0].collections[0].get_paths()[0].vertices for fig in (ours, theirs)]
    assert np.array_equal(*bands)


def test_panels_at_the_edge(recwarn):
    png(panels(EPS, {'empty': {}}, 'x', 'y'))
    png(panels([], {'m': {'a': []}}, 'x', 'y', 'No points'))
    png(panels(EPS, {'m': {'a': EPS * np.nan}, 'n': {}}, 'x', 'y', percent=True))
    assert not recwarn.list
    with pytest.raises(ValueError, match='no panel to draw'):
        panels(EPS, {}, 'x', 'y')
    with pytest.raises(ValueError, match="series 'PGD' has shape"):
        panels(EPS, {'m': {'PGD': [1]}}, 'x', 'y')


def test_spread_draws_five_quantiles():
    sets = [np.arange(101.0), [7, np.nan, np.inf], []]
    ax = spread(['a', 'b', 'c'], {'one': sets, 'two': sets}, 'x', 'y').axes[0]
    boxes = [(bar.get_y(), bar.get_y() + bar.get_height()) for bar in ax.patches]
    assert boxes[:2] == [(25, 75), (7, 7)] and np.isnan(boxes[2]).all()
    lines = [[path[:, 1].tolist() for path in lines.get_segments() if len(path)] for lines in ax.collections[:2]]
    assert [5, 25] in lines[0] and [75, 95] in lines[0] and lines[1][0] == [50, 50]
    centres = np.array([bar.get_x() + bar.get_width() / 2 for bar in ax.patches]).reshape(2, 3)
    assert np.allclose(centres.mean(0), [0, 1, 2]) and (centres[0] < centres[1]).all()


def test_spread_at_the_edge(recwarn):
    png(spread(['a'], {'x': [[]]}, 'x', 'y'))
    png(spread([], {'x': []}, 'x', 'y'))
    png(spread(['a'], {}, 'x', 'y'))
    assert not recwarn.list
    with pytest.raises(ValueError, match="series 'x' has 1 sets of values, but x has 2 entries"):
        spread(['a', 'b'], {'x': [[1, 2]]}, 'x', 'y')


# -------------------------------------------------------------------------------------------------------- heatmap


def test_heatmap_of_a_table_and_of_an_array():
    pd = pytest.importorskip('pandas')
    table = pd.DataFrame([[0.25, -1.0], [np.nan, 2.0]], ['r1', 'r2'], ['c1', 'c2'])
    for fig in (heatmap(table), heatmap(table.to_numpy(), ['r1', 'r2'], ['c1', 'c2']), heatmap(table.values.tolist())):
        words = [t.get_text() for t in texts(fig)]
        assert {'0.25', '-1.00', '2.00', '–'} <= set(words)
    assert {'r1', 'r2', 'c1', 'c2'} <= {t.get_text() for t in texts(heatmap(table))}
    assert '25%' in [t.get_text() for t in texts(heatmap(table, write='{:.0%}'))]


def test_a_label_stands_beside_the_colours():
    small, large = heatmap(np.eye(2), label='error (%)'), heatmap(np.eye(30), label='error (%)')
    assert [fig.axes[1].get_ylabel() for fig in (small, large)] == ['error (%)'] * 2
    assert len(heatmap(np.eye(2)).axes) == 1 and len(heatmap(np.eye(30)).axes) == 2
    assert '1.00' in boxes(small), 'the numbers stay in their cells'
    assert not heatmap(np.full((5, 9), 1e6)).axes[0].texts, 'numbers that find no room are left to the colours'


def test_zero_is_white_when_signed():
    fig = heatmap([[-1.0, 0.0, 3.0]], signed=True)
    rgba = fig.axes[0].images[0].to_rgba(np.array([[-1.0, 0.0, 3.0]]))[0]
    assert rgba[1, :3].min() > 0.96
    assert rgba[0, 2] > rgba[0, 0] and rgba[2, 0] > rgba[2, 2]  # blue below, red above
    assert fig.axes[0].images[0].get_clim() == (-3, 3)


def test_numbers_are_legible_on_their_cells():
    values = np.linspace(0, 1, 11)[None]
    fig = heatmap(values)
    background = fig.axes[0].images[0].to_rgba(values)[0, :, :3] @ [0.2126, 0.7152, 0.0722]
    ink = np.array([mcolors.to_rgb(t.get_color()) for t in fig.axes[0].texts]) @ [0.2126, 0.7152, 0.0722]
    assert (np.abs(background - ink) > 0.35).all()


@pytest.mark.parametrize('table', [np.full((2, 2), np.nan), [[np.inf, 1]], [[5]], np.zeros((3, 3))])
@pytest.mark.parametrize('signed', [False, True])
def test_heatmaps_at_the_edge(table, signed, recwarn):
    png(heatmap(table, signed=signed))
    assert not recwarn.list


def test_what_is_not_finite_is_grey_and_legible():
    fig = heatmap([[np.inf, -np.inf, np.nan, 1, 2]])
    assert [(t.get_text(), t.get_color()) for t in fig.axes[0].texts][:3] == [('–', plots._INK)] * 3


@pytest.mark.parametrize(
    'call, message',
    [
        (lambda: heatmap(np.zeros(3)), 'two-dimensional'),
        (lambda: heatmap(np.zeros((0, 3))), r'with entries, got shape \(0, 3\)'),
        (lambda: heatmap(np.zeros((2, 3)), rows=['a']), 'rows has 1 names, but the table has 2 rows'),
        (lambda: heatmap(np.zeros((2, 3)), cols='abcd'), 'cols has 4 names, but the table has 3 cols'),
    ],
)
def test_bad_tables(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --------------------------------------------------------------------------------------------------------- images


def tiles(fig: Figure) -> list[np.ndarray]:
    "The images of a figure, in the order of drawing."
    return [np.asarray(image.get_array()) for image in fig.axes[0].images]


def test_grey_and_colour():
    rng = np.random.default_rng(0)
    grey, colour = rng.random((2, 1, 4, 5)), rng.random((2, 3, 4, 5))
    for images in (grey, grey[:, 0]):
        shown = tiles(image_strip(images))
        assert np.allclose(shown[1], np.repeat(grey[1].transpose(1, 2, 0), 3, 2), atol=1 / 128)
    assert np.allclose(tiles(image_strip(colour))[1], colour[1].transpose(1, 2, 0))


def test_rows_share_one_scale():
    shown = tiles(image_strip({name: np.full((1, 2, 2), value) for name, value in [('a', -1), ('b', 3), ('c', 1)]}))
    assert shown[0].max() == 0 and shown[1].min() == 1 and abs(shown[2].mean() - 0.5) < 0.01
    dark = tiles(image_strip(np.full((1, 2, 2), 0.2)))[0]
    assert abs(dark.mean() - 0.2) < 0.01, 'pixels in [0, 1] are not stretched'


def test_differences():
    change = np.array([[[0.0, 0.1], [-0.1, 0.05]]])
    fig = image_strip({'x': np.zeros((1, 2, 2)), 'change': change}, signed=['change'])
    shown = tiles(fig)[1]
    assert shown[0, 0].min() > 0.96
    assert shown[0, 1, 0] > shown[0, 1, 2] and shown[1, 0, 2] > shown[1, 0, 0]
    assert 'change\n(±0.1)' in boxes(fig)
    assert np.array_equal(tiles(image_strip(change, signed=True))[0], shown)


def test_differences_of_colours_are_drawn_around_grey():
    change = np.zeros((1, 3, 2, 2))
    change[0, 0, 0, 0] = 0.1
    shown = tiles(image_strip({'d': change}, signed=['d']))[0]
    assert shown[0, 0].tolist() == [1, 0.5, 0.5] and (shown[1] == 0.5).all()


def test_titles_of_each_row():
    fig = image_strip({'a': np.zeros((2, 4, 4)), 'b': np.zeros((2, 4, 4))}, titles={'a': ['3', '4'], 'b': ['8', '9']})
    found = boxes(fig)
    assert found['3'].y0 > found['8'].y0 and abs(found['3'].x0 - found['8'].x0) < 3


def test_rows_of_different_length():
    assert len(tiles(image_strip({'a': np.zeros((3, 4, 4)), 'b': np.zeros((1, 4, 4))}))) == 4


def test_many_images_are_broken_into_lines():
    rows = {'clean': np.arange(30.0)[:, None, None] * np.ones((2, 2)) / 30, 'PGD': np.zeros((25, 2, 2))}
    fig = image_strip(rows, titles=[str(i) for i in range(30)])
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()] == ['clean', 'PGD'] * 3
    left, top = np.array([image.get_extent()[::3] for image in fig.axes[0].images]).T
    assert len(left) == 55 and left.max() < 10
    assert np.allclose([tile.mean() for tile in tiles(fig)[20:30]], np.arange(10, 20) / 30, atol=1 / 128)
    assert (np.diff(top) >= 0).all(), 'line by line, row by row'
    assert {str(i) for i in range(30)} <= set(boxes(fig))


@pytest.mark.parametrize('shape', [(1, 784), (784, 1), (1, 1), (16, 64)])
def test_images_of_every_shape_can_be_seen(shape):
    fig = image_strip(np.zeros((3, *shape)))
    assert fig.get_size_inches()[1] < 8
    fig.draw_without_rendering()
    assert all(min(image.get_window_extent().size) > 15 for image in fig.axes[0].images)


def test_a_large_image_is_averaged_and_not_sampled():
    stripes = np.tile([0.0, 1.0], (8, 1, 224, 112))
    shown = pixels(image_strip(stripes))[..., :3].mean(-1)
    line = shown[shown.shape[0] // 2, 20:60]
    assert line.min() > 0.2 and line.max() < 0.8


def test_pixels_that_are_not_finite(recwarn):
    images = np.array([[[0.0, np.nan], [np.inf, 1.0]]])
    png(image_strip(images))
    png(image_strip(images, signed=True))
    assert not recwarn.list


@pytest.mark.parametrize(
    'call, message',
    [
        (lambda: image_strip(np.zeros((2, 5, 4, 4))), r"row '' needs images .* got \(2, 5, 4, 4\)"),
        (lambda: image_strip({'a': np.zeros((4, 4))}), "row 'a' needs images"),
        (lambda: image_strip(np.zeros((0, 4, 4))), 'needs images'),
        (lambda: image_strip({}), 'no row of images'),
        (lambda: image_strip({'a': np.zeros((1, 4, 4))}, signed=['b']), r"no such row: \['b'\]; the rows are \['a'\]"),
        (lambda: image_strip({'a': np.zeros((1, 4, 4))}, signed='bc'), r"no such row: \['bc'\]; the rows are \['a'\]"),
        (lambda: image_strip({'a': np.zeros((1, 4, 4))}, titles={'b': ['3']}), 'no such row: '),
        (lambda: image_strip(np.zeros((2, 4, 4)), titles='abc'), "row '' has 2 images, but 3 titles"),
    ],
)
def test_bad_images(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --------------------------------------------------------------------------------------------------- feature maps


def test_channels_that_changed_most():
    rng = np.random.default_rng(0)
    clean = rng.random((6, 3, 3))
    pert = clean + np.array([0, 3, 1, 5, 2, 4])[:, None, None] * 0.1
    naive = sorted(range(6), key=lambda c: -abs(pert[c] - clean[c]).mean())
    assert plots._changed_most(clean, pert, 4).tolist() == naive[:4] == [3, 5, 1, 4]
    fig = feature_maps({'clean': clean, 'perturbed': pert}, top=4)
    assert [t.get_text() for t in fig.axes[0].texts] == ['channel 3', 'channel 5', 'channel 1', 'channel 4']
    assert len(tiles(fig)) == 12


def test_one_scale_for_each_channel():
    clean = np.stack([np.linspace(0, 1, 4).reshape(2, 2), np.linspace(0, 100, 4).reshape(2, 2)])
    pert = clean.copy()
    pert[:, 0, 0] = clean[:, 1, 1]  # the darkest becomes the brightest of its own channel
    first_clean, second_clean, first_pert, second_pert, *changes = tiles(feature_maps({'a': clean, 'b': pert}))
    assert np.allclose(first_clean, second_clean) and np.allclose(first_pert, second_pert)
    assert np.allclose(first_pert[0, 0], first_clean[1, 1])
    assert changes[0][0, 0].min() < 0.5 and changes[1][0, 0].min() > 0.9, 'differences of all channels share one scale'


def test_a_single_representation_shows_its_strongest_channels():
    stack = np.stack([np.full((2, 2), v) for v in (1.0, 5.0, 3.0)])
    fig = feature_maps({'clean': stack}, top=2)
    assert [t.get_text() for t in fig.axes[0].texts] == ['channel 1', 'channel 2'] and len(tiles(fig)) == 2


def test_vectors_become_outlines():
    rows = {'clean': np.arange(10.0), 'FGSM': np.arange(10.0) + 1, 'PGD': np.arange(10.0) - 1}
    patches = feature_maps(rows).axes[0].patches
    assert [p.get_data().values.tolist() for p in patches] == [row.tolist() for row in rows.values()]
    wide = np.zeros(500)
    wide[100:228] = 1
    ax = feature_maps({'clean': np.zeros(500), 'PGD': wide}).axes[0]
    assert ax.get_xlabel() == 'unit (the 128 that changed most)'
    assert ax.patches[1].get_data().values.tolist() == [1] * 128


def test_numbers_of_channels_that_were_chosen_before():
    clean, pert = np.zeros((3, 2, 2)), np.stack([np.full((2, 2), v) for v in (1.0, 3.0, 2.0)])
    fig = feature_maps({'clean': clean, 'PGD': pert}, numbers=[7, 40, 12])
    assert [t.get_text() for t in fig.axes[0].texts] == ['channel 40', 'channel 12', 'channel 7']
    ax = feature_maps({'clean': clean[:, 0, 0], 'PGD': pert[:, 0, 0]}, numbers=[7, 40, 12]).axes[0]
    assert ax.patches[1].get_data().values.tolist() == [1, 2, 3], 'units stand in the order of their numbers'
    assert [t.get_text() for t in ax.get_xticklabels()] == ['7', '12', '40'] and 'changed most' in ax.get_xlabel()
    with pytest.raises(ValueError, match='2 numbers for 3 channels'):
        feature_maps({'clean': clean, 'PGD': pert}, numbers=[1, 2])


def test_a_map_without_channels():
    assert len(tiles(feature_maps({'clean': np.zeros((7, 5)), 'PGD': np.ones((7, 5))}))) == 3


@pytest.mark.parametrize(
    'rows',
    [
        {},
        {'a': np.zeros((2, 3, 3)), 'b': np.zeros((2, 3, 4))},
        {'a': np.zeros((1, 2, 3, 3))},
        {'a': np.zeros(())},
        {'a': np.zeros((0, 3, 3))},
    ],
)
def test_bad_feature_maps(rows):
    with pytest.raises(ValueError, match='all rows need one shape'):
        feature_maps(rows)


@pytest.mark.parametrize('value', [0, np.nan, np.inf])
def test_feature_maps_at_the_edge(value, recwarn):
    rows = {'clean': np.full((3, 2, 2), value), 'PGD': np.ones((3, 2, 2))}
    png(feature_maps(rows))
    png(feature_maps({name: row[:, 0, 0] for name, row in rows.items()}))
    assert not recwarn.list


# -------------------------------------------------------------------------------------------------------- tensors


def test_tensors_draw_as_arrays_do():
    torch = pytest.importorskip('torch')
    x = torch.linspace(0, 1, 2 * 3 * 4 * 4).view(2, 3, 4, 4).requires_grad_()
    row, values = x[0, 0, 0], x[0, 0, 0].tolist()
    pairs = [
        (curves(row, {'a': row}, 'x', 'y'), curves(values, {'a': values}, 'x', 'y')),
        (heatmap(x[0, 0]), heatmap(x[0, 0].detach().numpy())),
        (image_strip(x), image_strip(x.detach().numpy())),
        (feature_maps({'a': x[0], 'b': x[1]}), feature_maps({'a': x[0].detach().numpy(), 'b': x[1].detach().numpy()})),
    ]
    for ours, theirs in pairs:
        assert png(ours) == png(theirs)
    assert plots._array(x.to(torch.bfloat16)).dtype == np.float32
    assert plots._array(torch.arange(3)).dtype == np.int64
    assert x.requires_grad and x.grad is None


# ---------------------------------------------------------------------------------------------------------- stack


def test_nothing_to_stack():
    with pytest.raises(ValueError, match='no figure to stack'):
        plots.stack([])


def test_stack_keeps_every_pixel():
    parts = [curves(EPS, {'a': EPS}, 'x', 'y'), figure(width=4, height=1)[0], heatmap(np.eye(2))]
    whole, y = pixels(plots.stack(parts)), 0
    assert whole.shape[:2] == (sum(pixels(p).shape[0] for p in parts), 600)
    for part in map(pixels, parts):
        height, width, _ = part.shape
        assert np.allclose(whole[y : y + height, :width], part, atol=0.5 / 255)
        assert (whole[y : y + height, width:] == 1).all()
        y += height
    assert imread(io.BytesIO(png(plots.stack(parts), 160)), format='png').shape == (2 * len(whole), 1200, 4)


def test_points_without_an_order_are_not_joined():
    x, entry = ['clean', 'shift'], ([0.9, 0.4], [0.85, 0.3], [0.95, 0.5])
    joined, apart = (plots.curves(x, {'accuracy': entry}, xlabel='', ylabel='accuracy', joined=j).axes[0] for j in (True, False))
    assert joined.lines[0].get_linestyle() == '-' and apart.lines[0].get_linestyle() == 'None'
    assert len(apart.collections) == 1 and len(apart.collections[0].get_segments()) == 2
