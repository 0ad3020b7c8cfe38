"""Explorers without a browser. Runs on ipywidgets 7.7 and 8 alike; neither torch nor a kernel is needed."""

import asyncio
import json
import logging
import os
import selectors
import subprocess
import sys

import ipywidgets
import numpy as np
import pytest

from robustnb.plots import figure, png
from robustnb.widgets import Choice, Explorer, Slider, Toggle, nbytes

CONTROLS = [
    Choice('layer', ['conv1', 'conv2', 'fc'], value='conv2'),
    Slider('eps', np.linspace(0, 0.4, 5)),
    Toggle('signed', label='around zero'),
]


class Recorder:
    "A `draw` that remembers what it was asked for."

    def __init__(self):
        self.calls = []

    def __call__(self, **state):
        self.calls.append(state)
        fig, ax = figure(height=1)
        ax.set_title(str(sorted(state.items())))
        ax.set_axis_off()  # ticks are slow
        return fig


@pytest.fixture
def draw():
    return Recorder()


@pytest.fixture
def explorer(draw):
    return Explorer(CONTROLS, draw, lambda **state: f'{state["layer"]} < {state["eps"]:g}\nnext line', title='a < b')


def walk(widget) -> list:
    "A widget and everything inside it."
    return [widget, *(inner for child in getattr(widget, 'children', ()) for inner in walk(child))]


def part(explorer: Explorer, css: str):
    "The one widget with a CSS class."
    (found,) = [w for w in walk(explorer.widget) if css in getattr(w, '_dom_classes', ())]
    return found


# ---------------------------------------------------------------------------------------------------------- controls


@pytest.mark.parametrize(
    'control, start',
    [
        (Choice('a', ['x', 'y']), 'x'),
        (Choice('a', ('x', 'y'), 'y'), 'y'),
        (Choice('a', np.array(['x', 'y']), 'y'), 'y'),
        (Choice('a', [None, 'x']), None),
        (Slider('a', range(3, 9), 5), 5),
        (Slider('a', [0.1, 0.1 + 0.2], 0.3), 0.1 + 0.2),
        (Slider('a', np.arange(3, dtype='float32')), 0.0),
        (Slider('a', ['few', 'many'], 'many'), 'many'),
        (Toggle('a'), False),
        (Toggle('a', True), True),
    ],
)
def test_start(control, start):
    assert control.start == start and type(control.start) is type(start)
    assert Explorer([control], lambda a: None).state == {'a': start}


@pytest.mark.parametrize(
    'make, message',
    [
        (lambda: Choice('a', []), 'nothing to choose from'),
        (lambda: Slider('a', [1, 2], 3), 'a can be one of 1, 2; got 3'),
        (lambda: Choice('a', ['1'], 1), "one of '1'; got 1"),
        (lambda: Slider('a b', [1]), 'keyword argument'),
        (lambda: Toggle('a', 'yes'), "False, True; got 'yes'"),
        (lambda: Slider('a', range(100), -1), '6, 7, ...; got -1'),
    ],
)
def test_bad_controls(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_rounding_is_forgiven_and_nothing_else():
    eps = Slider('eps', np.linspace(0, 0.4, 5))
    assert eps.position(0.3) == 3
    for wrong in (0.3001, -0.0001, np.nan, '0.3', None):
        with pytest.raises(ValueError, match='eps can be one of'):
            eps.position(wrong)


def test_nbytes():
    bundle = {'a': np.zeros((3, 4)), 'b': [np.zeros(5, 'uint8'), (np.zeros(2, 'float32'), 'words', None)]}
    assert nbytes(bundle) == 3 * 4 * 8 + 5 + 2 * 4
    assert nbytes({}) == 0


def test_nbytes_of_tensors():
    torch = pytest.importorskip('torch')
    assert nbytes([torch.zeros(3, dtype=torch.float16)]) == 6


# ------------------------------------------------------------------------------------------------------------ state


def test_state_round_trip(explorer, draw):
    explorer.update(layer='fc', eps=0.3, signed=True)
    assert explorer.state == {'layer': 'fc', 'eps': pytest.approx(0.3), 'signed': True}
    copy = Explorer(CONTROLS, draw)
    copy.update(**json.loads(json.dumps(explorer.state)))
    assert copy.state == explorer.state


def test_state_is_a_copy(explorer):
    explorer.state['layer'] = 'fc'
    assert explorer.state['layer'] == 'conv2'


@pytest.mark.parametrize('shown', [False, True])
@pytest.mark.parametrize(
    'change, message',
    [
        ({'strength': 1}, r"no control is called 'strength'; this explorer has \['layer', 'eps', 'signed'\]"),
        ({'layer': 'conv9'}, "layer can be one of 'conv1', 'conv2', 'fc'; got 'conv9'"),
        ({'eps': 0.37}, 'eps can be one of 0.0, 0.1, 0.2'),
        ({'layer': 'fc', 'eps': 7}, 'got 7'),
        ({'signed': 'on'}, "got 'on'"),
    ],
)
def test_a_bad_change_changes_nothing(explorer, draw, shown, change, message):
    if shown:
        explorer.widget  # noqa: B018
    before, drawn = explorer.state, len(draw.calls)
    for act in (explorer.update, explorer.static):
        with pytest.raises(ValueError, match=message):
            act(**change)
    assert explorer.state == before and len(draw.calls) == drawn


def test_static_leaves_the_state(explorer, draw):
    before = explorer.state
    fig = explorer.static(eps=0.2)
    assert png(fig).startswith(b'\x89PNG')
    assert draw.calls == [before | {'eps': pytest.approx(0.2)}]
    assert explorer.state == before


def test_bad_explorers(draw):
    with pytest.raises(ValueError, match='two controls have the same name'):
        Explorer([Toggle('a'), Slider('a', [1])], draw)
    with pytest.raises(ValueError, match='holds 20.0 MB, and at most 20 MB are allowed: keep fewer samples'):
        Explorer([], draw, bundle_bytes=20_000_001)
    Explorer([], draw, bundle_bytes=20_000_000)


# ---------------------------------------------------------------------------------------------------------- widgets


def test_nothing_is_drawn_before_somebody_looks(explorer, draw):
    explorer.update(eps=0.1)
    assert not draw.calls
    explorer.widget  # noqa: B018
    assert draw.calls == [explorer.state]
    assert explorer.widget is explorer.widget and len(draw.calls) == 1


def test_the_widget_opens_in_the_present_state(explorer):
    explorer.update(layer='fc', eps=0.3, signed=True)
    assert [part(explorer, f'rnb-{name}').value for name in ('layer', 'eps', 'signed')] == [2, 3, True]


def test_a_hand_moves_a_control(explorer, draw):
    slider, picture = part(explorer, 'rnb-eps'), part(explorer, 'rnb-picture')
    before = picture.value
    slider.value = 4
    assert explorer.state['eps'] == pytest.approx(0.4)
    assert picture.value != before and picture.value == png(explorer.static())
    part(explorer, 'rnb-layer').value = 0
    part(explorer, 'rnb-signed').value = True
    assert explorer.state == {'layer': 'conv1', 'eps': pytest.approx(0.4), 'signed': True}


def test_a_program_moves_several_controls_with_one_drawing(explorer, draw):
    explorer.widget  # noqa: B018
    draw.calls.clear()
    explorer.update(layer='fc', eps=0.3, signed=True)
    assert draw.calls == [explorer.state]
    assert [part(explorer, f'rnb-{name}').value for name in ('layer', 'eps', 'signed')] == [2, 3, True]
    explorer.update(layer='fc', eps=0.1 + 0.2)
    assert len(draw.calls) == 1


def test_words_are_escaped(explorer):
    words = part(explorer, 'rnb-words')
    assert 'conv2 &lt; 0<br>next line' in words.value
    assert '<b>a &lt; b</b>' in walk(explorer.widget)[1].value


@pytest.mark.parametrize('attack', ['<script>alert(1)</script>', '"><img src=x onerror=alert(1)>', "'&<b>"])
def test_no_word_runs_as_code(draw, attack):
    explorer = Explorer([Choice('name', [attack])], draw, lambda name: name, title=attack)
    html = ''.join(w.value for w in walk(explorer.widget) if isinstance(w, ipywidgets.HTML))
    for tag in ('<script', '<img', "<b>'", "'&<"):
        assert tag not in html


def test_an_object_with_html_is_shown_as_it_is(draw):
    pd = pytest.importorskip('pandas')
    explorer = Explorer([], draw, lambda: pd.DataFrame({'<i>': ['<b>']}))
    html = part(explorer, 'rnb-words').value
    assert '<table' in html and '&lt;b&gt;' in html and '<b>' not in html


def test_an_error_is_seen_and_passes(caplog, draw):
    def fragile(n):
        if n == 1:
            raise RuntimeError('no <bundle> for 1')
        return draw(n=n)

    explorer = Explorer([Slider('n', [0, 1, 2])], fragile, lambda n: f'n is {n}')
    picture, words = part(explorer, 'rnb-picture'), part(explorer, 'rnb-words')
    with caplog.at_level(logging.ERROR, logger='robustnb.widgets'):
        explorer.update(n=1)
    assert 'could not be drawn. RuntimeError: no &lt;bundle&gt; for 1' in words.value
    assert picture.layout.visibility == 'hidden'  # an old picture would be a lie
    assert 'RuntimeError' in caplog.text and "{'n': 1}" in caplog.text
    with pytest.raises(RuntimeError):
        explorer.static()
    explorer.update(n=2)
    assert 'n is 2' in words.value and picture.layout.visibility == 'visible'


def test_an_error_in_describe_is_seen(draw):
    explorer = Explorer([], draw, lambda: 1 / 0)
    assert 'ZeroDivisionError' in part(explorer, 'rnb-words').value


def test_sliders_answer_when_they_are_let_go(explorer):
    assert part(explorer, 'rnb-eps').continuous_update is False


# ---------------------------------------------------------------------------------------------------------- waiting


class SkippingLoop(asyncio.SelectorEventLoop):
    "An event loop whose clock jumps over every wait, so that nothing depends on how fast the machine is."

    def __init__(self):
        self.now, selector = 0.0, selectors.SelectSelector()
        wait = selector.select

        def skip(timeout=None):
            self.now += timeout or 0
            return wait(0)

        selector.select = skip
        super().__init__(selector)

    def time(self) -> float:
        return self.now


def in_a_loop(draw, moves, wait: float = 0.03, describe=None) -> Explorer:
    "Let the coroutine `moves(explorer, slider)` run in an event loop, as a kernel has one, with nothing drawn so far."

    async def live():
        explorer = Explorer([Slider('n', range(9))], draw, describe or (lambda n: f'n is {n}'), wait=wait)
        slider = part(explorer, 'rnb-n')
        draw.calls.clear()
        await moves(explorer, slider)
        return explorer

    with asyncio.Runner(loop_factory=SkippingLoop) as runner:
        return runner.run(live())


def test_quick_moves_are_drawn_once(draw):
    async def moves(explorer, slider):
        for n in range(1, 9):
            slider.value = n
            assert explorer.state == {'n': n}, 'the state does not wait'
            await asyncio.sleep(0.005)
        assert not draw.calls
        await asyncio.sleep(0.1)

    explorer = in_a_loop(draw, moves, wait=0.05)
    assert draw.calls == [{'n': 8}]
    assert part(explorer, 'rnb-words').value.endswith('n is 8</div>')
    assert part(explorer, 'rnb-picture').value == png(explorer.static())


def test_slow_moves_are_drawn_one_by_one(draw):
    async def moves(explorer, slider):
        for n in (3, 5):
            slider.value = n
            await asyncio.sleep(0.15)

    in_a_loop(draw, moves, wait=0.001)
    assert draw.calls == [{'n': 3}, {'n': 5}]


@pytest.mark.parametrize('change', [{'n': 4}, {'n': 2}, {}])
def test_a_program_does_not_wait(draw, change):
    async def moves(explorer, slider):
        slider.value = 2
        explorer.update(**change)
        assert draw.calls == [{'n': 2} | change], 'drawn at once, also when a drawing was still to come'
        await asyncio.sleep(0.08)

    in_a_loop(draw, moves)
    assert len(draw.calls) == 1, 'and not a second time'


def test_no_wait(draw):
    async def moves(explorer, slider):
        slider.value = 2
        slider.value = 5
        assert draw.calls == [{'n': 2}, {'n': 5}]

    in_a_loop(draw, moves, wait=0)


def test_without_a_loop_nothing_waits(draw):
    explorer = Explorer([Slider('n', range(9))], draw, wait=60)
    part(explorer, 'rnb-n').value = 3
    assert draw.calls == [{'n': 0}, {'n': 3}]


def test_an_error_that_comes_later_is_seen(draw, caplog):
    async def moves(explorer, slider):
        slider.value = 3
        await asyncio.sleep(0.08)

    with caplog.at_level(logging.ERROR):
        explorer = in_a_loop(draw, moves, describe=lambda n: 1 // (n - 3))
    assert 'could not be drawn. ZeroDivisionError' in part(explorer, 'rnb-words').value
    assert {record.name for record in caplog.records} == {'robustnb.widgets'}, 'the loop itself has nothing to report'


@pytest.mark.parametrize('wait', [-0.1, float('nan'), float('inf')])
def test_bad_wait(draw, wait):
    with pytest.raises(ValueError, match='number of seconds, 0 to draw at once; got'):
        Explorer([], draw, wait=wait)


# ------------------------------------------------------------------------------------------------------- appearance


def test_bundle_size_is_shown(draw):
    def headline(size):
        return Explorer([], draw, bundle_bytes=size).widget.children[0].value

    assert '12.3 MB' in headline(12_345_678) and '53.3 kB' in headline(53_280) and 'B' not in headline(0)


def test_core_widgets_only(explorer):
    assert {type(w).__module__.split('.')[0] for w in walk(explorer.widget)} == {'ipywidgets'}


def test_two_explorers_do_not_share(draw):
    one, other = Explorer(CONTROLS, draw), Explorer(CONTROLS, draw)
    part(one, 'rnb-eps').value = 2
    assert other.state['eps'] == 0 and part(other, 'rnb-eps').value == 0


def test_display(explorer, monkeypatch):
    import IPython.display

    shown = []
    monkeypatch.setattr(IPython.display, 'display', lambda data, raw: shown.append((data, raw)))
    explorer._ipython_display_()
    ((data, raw),) = shown
    assert raw and data['application/vnd.jupyter.widget-view+json']['model_id'] == explorer.widget.model_id
    assert data['text/plain'] == 'An explorer with the controls layer, eps, signed: run this notebook to move them.'


# ------------------------------------------------------------------------------------------------- without a front end


def test_static_needs_no_ipywidgets():
    script = (
        'import sys; sys.modules["ipywidgets"] = None\n'
        'from robustnb.widgets import Explorer, Slider\n'
        'from robustnb.plots import figure, png\n'
        'e = Explorer([Slider("n", [1, 2])], lambda n: figure()[0])\n'
        'e.update(n=2); png(e.static())\n'
        'print([m for m in ("torch", "matplotlib.pyplot", "xarray") if m in sys.modules])\n'
    )
    ran = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, env=os.environ)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == '[]', 'a figure or an explorer loads more than it needs'


def test_a_slider_can_write_its_values_in_words():
    explorer = Explorer([Slider('eps', [0.1, 0.2], 0.2, readout=['a | b', 'c | d'])], lambda eps: figure()[0])
    slider = part(explorer, 'rnb-eps')
    assert slider.options == (('a | b', 0), ('c | d', 1)) and slider.label == 'c | d'
    slider.value = 0
    assert explorer.state == {'eps': 0.1}
    with pytest.raises(ValueError, match='eps has 2 values, and a readout for 1'):
        Slider('eps', [0.1, 0.2], readout=['a'])
