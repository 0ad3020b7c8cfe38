"""Responses of filtered networks against literal counts, and every figure of them."""

import math
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robustnb.plots import png
from robustnb.responses import Responses, _not_looked_at, _responses, joined
from robustnb.results import Result
from robustnb.stats import wilson


def step(layer='fc', filter='high', position=0.0, state=0, removed=0, size=10, threshold=None):
    "One step of a sweep."
    threshold = position - 0.5 if threshold is None else threshold
    return dict(
        layer=layer, filter=filter, position=position, threshold=threshold, state=state, removed=removed, size=size
    )


def right_ones(shares, labels, classes=10):
    "Predictions (state, response, sample) of which the first so many are right: `shares` (state, response)."
    predictions = _not_looked_at(*np.shape(shares), len(labels), classes)
    for i, j in np.ndindex(*np.shape(shares)):
        right = np.arange(len(labels)) < round(shares[i][j] * len(labels))
        predictions[i, j] = np.where(right, labels, (labels + 1) % classes)
    return predictions


LABELS = np.arange(40) % 10


def example(names=('FGSM 0.1', 'FGSM 0.2'), eps=(0.1, 0.2), **about):
    "Two layers, filters with different numbers of thresholds, one step that was not evaluated, one state for two steps."
    steps, shares = [], [[0.9, 0.6, 0.2]]
    for layer, channels in (('conv', 3), ('fc', 5)):
        for k, position in enumerate(np.linspace(0, 1, 5)):
            steps.append(step(layer, 'high', position, len(shares), removed=2 * k + 1))
            shares.append([0.9 - 0.2 * k, 0.6 - 0.1 * k, 0.2 - 0.02 * k])
        steps.append(step(layer, 'low', 0.0, len(shares) - 1, removed=9))  # where high ended
        steps.append(step(layer, 'low', 0.5, -1, removed=4))
        steps.append(step(layer, 'low', 1.0, 0, removed=0))
        for k in range(channels):
            steps.append(step(layer, 'channel', k / (channels - 1), len(shares), removed=2, threshold=k))
            shares.append([0.8, 0.5, 0.1 * (k % 2)])
    predictions = right_ones([row[: 1 + len(names)] for row in shares], LABELS)
    return _responses(steps, predictions, LABELS, None, names, eps, {'classes': list('0123456789')} | about)


# ------------------------------------------------------------------------------------------------------------ counts


def test_a_curve_counted_by_hand():
    predictions = np.array([[[0, 1, 2, 2]], [[0, 0, 2, 0]], [[1, 0, 0, 0]]], 'uint8')  # 3, 2 and 0 of 4 are right
    steps = [
        step(position=1.0, state=2, removed=10),
        step(position=0.2, removed=1),
        step(position=0.5, state=1, removed=4),
    ]
    rows = _responses(steps, predictions, [0, 1, 2, 3]).curve('fc', 'high')
    assert list(rows) == ['position', 'threshold', 'removed', 'share', 'n', 'accuracy', 'low', 'high', 'relative']
    assert rows.position.tolist() == [0.2, 0.5, 1.0] and rows.threshold.tolist() == [-0.3, 0.0, 0.5]
    assert rows.removed.tolist() == [1, 4, 10] and rows.share.tolist() == [0.1, 0.4, 1.0]
    assert rows.accuracy.tolist() == [0.75, 0.5, 0] and rows.n.tolist() == [4, 4, 4]
    assert rows.relative.tolist() == [1, 2 / 3, 0]
    value, low, high = wilson(np.array([3, 2, 0]), 4)
    assert rows.low.tolist() == low.tolist() and rows.high.tolist() == high.tolist()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_counts_are_those_of_plain_loops(data):
    classes = data.draw(st.sampled_from([3, 254, 300]))
    shape = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 6)))
    predictions = _not_looked_at(*shape, classes)
    unseen = predictions.max()
    number = st.integers(0, 2) | st.just(int(unseen))
    predictions[:] = np.reshape(
        data.draw(st.lists(number, min_size=predictions.size, max_size=predictions.size)), shape
    )
    labels = data.draw(st.lists(st.integers(-1, 2), min_size=shape[2], max_size=shape[2]))
    steps = [step(position=s / shape[0], state=s) for s in range(shape[0])]
    result = _responses(steps, predictions, labels, names=['a', 'b'][: shape[1] - 1])
    for r, response in enumerate(result.responses):
        rows = result.curve('fc', 'high', response).set_index('position')
        for s in range(shape[0]):
            seen = [i for i in range(shape[2]) if predictions[s, r, i] != unseen]
            right = [i for i in seen if predictions[s, r, i] == labels[i]]
            first = [i for i in seen if predictions[0, r, i] != unseen and predictions[0, r, i] == labels[i]]
            common = [i for i in right if predictions[0, r, i] != unseen]
            assert result.looked_at[s, r].sum() == len(seen) == np.isfinite(result.correct[s, r]).sum()
            assert np.nansum(result.correct[s, r]) == len(right)
            if not seen:
                assert s / shape[0] not in rows.index and math.isnan(result.accuracy[s, r])
                continue
            row = rows.loc[s / shape[0]]
            assert row.n == len(seen) and row.accuracy == result.accuracy[s, r] == len(right) / len(seen)
            assert (row.low, row.high) == wilson(len(right), len(seen))[1:]
            assert row.relative == len(common) / len(first) if first else math.isnan(row.relative)


@pytest.mark.parametrize('classes, kind', [(2, 'uint8'), (254, 'uint8'), (255, 'int16'), (1000, 'int16')])
def test_the_mark_of_nothing_is_no_class(classes, kind):
    predictions = _not_looked_at(2, 1, 3, classes)
    assert predictions.dtype == kind and (predictions == np.iinfo(kind).max).all() and predictions.max() >= classes
    predictions[0] = 0
    result = _responses([step(), step(position=1.0, state=1)], predictions, [0, 0, int(predictions.max())])
    assert result.curve('fc', 'high').position.tolist() == [0] and math.isnan(result.accuracy[1, 0])
    assert result.accuracy[0, 0] == 2 / 3  # a label that is no class is never predicted
    assert result.correct.dtype == 'float32'


def test_steps_that_were_not_evaluated_are_left_out():
    result = example()
    assert result.curve('conv', 'low').position.tolist() == [0, 1]
    assert not (result.table().query('filter == "low"').position == 0.5).any()
    assert (result.dataset['state'].values == -1).sum() == 2 and len(result.steps('fc', 'low')) == 2


def test_two_steps_share_a_state():
    result = example()
    high, low = result.curve('fc', 'high', 'FGSM 0.1').iloc[-1], result.curve('fc', 'low', 'FGSM 0.1').iloc[0]
    assert high.accuracy == low.accuracy and high.removed == 9 == low.removed
    assert result.dataset.sizes['state'] < result.dataset.sizes['step']
    assert result.curve('fc', 'low').iloc[-1].relative == 1  # state 0


def test_filters_may_have_different_numbers_of_thresholds():
    result = example()
    assert result.layers == ['conv', 'fc'] and result.filters == ['high', 'low', 'channel']
    assert result.responses == ['clean', 'FGSM 0.1', 'FGSM 0.2']
    assert [len(result.curve(layer, 'channel')) for layer in result.layers] == [3, 5]
    rows = result.table()
    assert len(rows) == 3 * (2 * (5 + 2) + 3 + 5) and rows.eps.tolist()[:1] == [0]
    for (layer, filter, response), part in rows.groupby(['layer', 'filter', 'response']):
        same = part.drop(columns=['layer', 'filter', 'response', 'eps']).reset_index(drop=True)
        pd.testing.assert_frame_equal(same, result.curve(layer, filter, response))


def test_steps_come_in_any_form():
    steps, predictions = [step(), step(position=1.0, state=1)], right_ones([[0.5], [0.25]], LABELS)
    columns = {name: np.array([one[name] for one in steps]) for name in steps[0]}
    first, *others = (_responses(form, predictions, LABELS) for form in (steps, columns, pd.DataFrame(columns)))
    assert all(first.dataset.identical(other.dataset) for other in others)


def test_chance_follows_from_the_classes():
    assert example().chance == 0.1
    assert _responses([step()], right_ones([[1]], np.array([0, 4, 4, 2]), 5), [0, 4, 4, 2]).chance == 1 / 3


def test_counting_makes_no_second_array_of_all_predictions():
    labels = np.arange(2000) % 10
    predictions = right_ones(np.linspace(1, 0, 200)[:, None] * [1, 0.5], labels)
    result = _responses([step(position=i / 199, state=i) for i in range(200)], predictions, labels, names=['a'])
    tracemalloc.start()
    result.table()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < predictions.nbytes / 2


def test_round_trip(tmp_path):
    result = example(against='original', filters={'high': {}})
    result.save(tmp_path / 'a.safetensors')
    again = Result.load(tmp_path / 'a.safetensors')
    assert type(again) is Responses and again.dataset.identical(result.dataset) and again.settings == result.settings
    assert again.dataset['prediction'].dtype == 'uint8' and again.dataset['state'].dtype == 'int32'
    pd.testing.assert_frame_equal(again.table(), result.table())
    assert (tmp_path / 'a.safetensors').stat().st_size < 40_000


def test_it_shows_itself_and_escapes_words():
    result = _responses([step(layer='<script>')], right_ones([[1]], LABELS), LABELS)
    page = result._repr_html_()
    assert '<script>' not in page and '&lt;script&gt;' in page and 'Responses' in page
    assert repr(example()) == 'Responses (step 24, state 19, response 3, sample 40)'


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    'call, words',
    [
        (lambda r: r.curve('conv9', 'high'), "no layer 'conv9' here; there are conv, fc"),
        (lambda r: r.curve('fc', 'band'), "no filter 'band' here; there are high, low, channel"),
        (lambda r: r.curve('fc', 'high', 'PGD'), "no response 'PGD' here; there are clean, FGSM 0.1, FGSM 0.2"),
        (lambda r: r.plot(layers=['a']), "no layer 'a' here"),
        (lambda r: r.plot('a'), "no response 'a' here"),
        (lambda r: r.plot([]), '1 to 4 responses'),
        (lambda r: r.plot(layers=[]), 'no layer to draw'),
        (lambda r: r.plot_layer('fc', 'a'), "no filter 'a' here"),
        (lambda r: r.compare_filters('a'), "no layer 'a' here"),
        (lambda r: r.compare_filters('fc', 'a'), "no response 'a' here"),
        (lambda r: r.compare_filters('fc', against='size'), "'position' or 'share'"),
        (lambda r: r.plot_surface('fc', 'high', responses=['clean']), 'at least two responses with strengths'),
        (lambda r: r.plot_surface('fc', 'high', responses=['clean', 'a']), "no response 'a' here"),
        (lambda r: r.plot(save='figure'), 'the end of the name'),
        (lambda r: r.plot_layer('fc', 'high', save='figure.doc'), '.pdf'),
        (lambda r: r.explore(), 'robustnb.links'),
    ],
)
def test_errors_say_what_there_is(call, words):
    with pytest.raises((KeyError, ValueError, TypeError)) as error:
        call(example())
    assert words in str(error.value)


def test_a_filter_that_one_layer_lacks():
    result = _responses([step('conv', 'channel'), step('fc')], right_ones([[1]], LABELS), LABELS)
    with pytest.raises(KeyError, match="no filter for 'fc' 'channel' here; there are high"):
        result.curve('fc', 'channel')
    png(result.plot())  # the panel of a layer shows the filters that it has


@pytest.mark.parametrize(
    'change, words',
    [
        (dict(steps=[]), 'steps need the columns'),
        (dict(steps=[{'layer': 'a', 'state': 0}]), 'there is no filter, position, threshold, removed, size'),
        (dict(steps=[step(state=1)]), 'point at states 1 to 1, but there are 1'),
        (dict(steps=[step(state=-2)]), 'point at states -2'),
        (dict(steps=[step(position=1.5)]), 'positions lie'),
        (dict(steps=[step(position=math.nan, threshold=0.0)]), 'positions lie'),
        (dict(labels=[0, 1]), 'have the shape'),
        (dict(names=['FGSM']), 'have the shape'),
        (dict(ids=[1]), '1 ids'),
        (dict(predictions=np.zeros((1, 1, 40))), 'whole numbers'),
        (dict(predictions=np.zeros((1, 2, 40), int), names=['clean']), 'different names'),
    ],
)
def test_parts_that_do_not_fit(change, words):
    parts = dict(steps=[step()], predictions=right_ones([[1]], LABELS), labels=LABELS) | change
    with pytest.raises((ValueError, TypeError), match=words):
        _responses(**parts)


def test_too_many_classes():
    with pytest.raises(ValueError, match='1 to 32767 classes'):
        _not_looked_at(1, 1, 1, 2**15)


# ----------------------------------------------------------------------------------------------------------- figures

VIEWS = {
    'plot': lambda r, save: r.plot(save=save),
    'plot_layer': lambda r, save: r.plot_layer('conv', 'high', save=save),
    'compare_filters': lambda r, save: r.compare_filters('conv', 'FGSM 0.1', save=save),
    'share': lambda r, save: r.compare_filters('fc', against='share', save=save),
    'plot_surface': lambda r, save: r.plot_surface('fc', 'high', save=save),
    'three_d': lambda r, save: r.plot_surface('fc', 'high', three_d=True, save=save),
}
STARTS = {'.png': b'\x89PNG', '.pdf': b'%PDF', '.svg': b'<?xml'}


@pytest.mark.parametrize(
    'view, suffix', list(zip(VIEWS, ['.png', '.PDF', '.svg', '.png', '.pdf', '.svg'], strict=True))
)
def test_views_are_drawn_and_saved(view, suffix, tmp_path):
    path = tmp_path / 'new folder' / f'figure{suffix}'
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        warnings.filterwarnings('ignore', "'mode' parameter", DeprecationWarning)  # of Pillow, to the matplotlib that Colab has
        fig = VIEWS[view](example(), str(path))
    assert path.read_bytes().startswith(STARTS[suffix.lower()])
    width, height = fig.get_size_inches()
    assert width == 7.5 and 2 < height < 7


def lines_of(ax):
    "The drawn lines of a panel that are not level, as pairs of lists."
    found = [(list(map(float, line.get_xdata())), list(map(float, line.get_ydata()))) for line in ax.lines]
    return [(x, y) for x, y in found if len(x) > 2 or len(set(y)) > 1]


def test_small_panels_hold_the_curves():
    result = example()
    axes = {ax.get_title('left'): ax for ax in result.plot('clean').axes}
    rows = result.curve('conv', 'high')
    assert list(axes) == ['conv', 'fc']
    assert (rows.position.tolist(), rows.accuracy.tolist()) in lines_of(axes['conv'])
    assert all(0.5 not in x for x, y in lines_of(axes['fc']) if len(x) == 2)  # the step that was not evaluated
    assert '2 of 3 responses' in result.plot()._supxlabel.get_text()
    both = result.plot(['FGSM 0.1', 'FGSM 0.2'], layers='fc').axes[0]
    assert {line.get_linestyle() for line in both.lines} >= {'-', '--'}


def test_the_twin_axis_shows_removed_weights_and_thresholds():
    result = example()
    fig = result.plot_layer('conv', 'high')
    ax, behind = fig.axes
    assert [bar.get_height() for bar in behind.patches] == [1, 3, 5, 7, 9] and 'of 10' in behind.get_ylabel()
    assert ax.get_zorder() > behind.get_zorder() and len(lines_of(ax)) == 3
    assert [tick.get_text() for tick in ax.get_xticklabels() if '\n' in tick.get_text()] == ['0\n−0.5', '1\n0.5']
    many = _responses(
        [step(position=p, threshold=t) for p, t in ((0.0, 0.0), (1.0, 2047.0))], right_ones([[1]], LABELS), LABELS
    )
    ticks = [tick.get_text() for tick in many.plot_layer('fc', 'high').axes[0].get_xticklabels()]
    assert '0\n0' in ticks and '1\n2,047' in ticks  # the last of many channels
    rows, band = result.curve('conv', 'high'), ax.collections[0].get_paths()[0].vertices
    assert {round(v, 9) for v in rows.low} | {round(v, 9) for v in rows.high} <= {round(v, 9) for v in band[:, 1]}


def test_windows_are_not_joined_against_the_share():
    ax = example().compare_filters('fc', against='share').axes[0]
    assert {line.get_label(): line.get_linestyle() for line in ax.lines if 'filter' in line.get_label()}[
        'high filter'
    ] == '-'
    steps = [step(filter='pulse', position=p, state=0, removed=r) for p, r in ((0, 1), (0.5, 8), (1, 1))]
    ax = _responses(steps, right_ones([[1]], LABELS), LABELS).compare_filters('fc', against='share').axes[0]
    assert [line.get_linestyle() for line in ax.lines if 'filter' in line.get_label()] == ['None']


def test_a_surface_has_a_row_for_each_strength():
    result = example()
    cells = result.plot_surface('fc', 'high').axes[0].collections[0].get_array().reshape(3, 5)
    wanted = [result.curve('fc', 'high', name).accuracy for name in result.responses]
    assert np.array_equal(cells, wanted)
    assert 'strength' in result.plot_surface('fc', 'high', responses=['FGSM 0.2', 'clean']).axes[0].get_ylabel()
    twice = example(names=['FGSM', 'PGD'], eps=[0.1, 0.1])
    with pytest.raises(ValueError, match=r'choose with responses= among clean \(0\), FGSM \(0.1\), PGD \(0.1\)'):
        twice.plot_surface('fc', 'high')
    png(twice.plot_surface('fc', 'high', responses=['clean', 'PGD']))


def test_nothing_evaluated_is_drawn_as_such():
    result = _responses(
        [step(state=-1), step('conv', state=0)], right_ones([[1, 1]], LABELS), LABELS, names=['a'], eps=[0.1]
    )
    assert len(result.curve('fc', 'high')) == 0 and len(result.table()) == 2
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        fig = result.plot()
        for view in (
            fig,
            result.plot_layer('fc', 'high'),
            result.compare_filters('fc'),
            result.plot_layer('conv', 'high'),
        ):
            png(view)
    assert [text.get_text() for text in fig.axes[0].texts] == ['not evaluated'] and not fig.axes[1].texts
    with pytest.raises(ValueError, match="no step of layer 'fc' and filter 'high' was evaluated"):
        result.plot_surface('fc', 'high')


def many_layers(count):
    "A network with many layers of long names."
    names = [f'stage{i // 10}.{i}.branch{i % 3}.conv' for i in range(count)]
    grid = np.linspace(0, 1, 5)
    steps = [step(name, filter, x, state=k) for name in names for filter in ('high', 'low') for k, x in enumerate(grid)]
    return _responses(steps, right_ones([[0.9 - 0.1 * k, 0.5] for k in range(5)], LABELS), LABELS, names=['PGD'])


def test_57_layers_are_readable():
    result = many_layers(57)
    fig = result.plot()
    titles = [ax.get_title('left') for ax in fig.axes]
    assert len(titles) == len(set(titles)) == 20 and titles[0][:8] == 'stage0.0' and titles[-1][:9] == 'stage5.56'
    assert '20 of 57 layers' in fig._supxlabel.get_text() and '± ' in fig._supxlabel.get_text()
    every = result.plot('clean', layers=result.layers)
    assert len(every.axes) == 57 and 'layers=' not in every._supxlabel.get_text()
    png(fig)
    assert 10 < every.get_size_inches()[1] < 25


def test_a_legend_of_many_filters_fits():
    names = [f'random {i} like magnitude' for i in range(9)]
    result = _responses([step(filter=name) for name in names], right_ones([[1]], LABELS), LABELS)
    fig = result.plot()
    fig.canvas.draw()
    assert fig.legends[0].get_window_extent().x1 <= fig.bbox.x1
    keys = [text.get_text().replace('\n', ' ') for text in fig.legends[0].get_texts() if text.get_text().strip()]
    assert sorted(keys) == sorted([*(f'{name} filter' for name in names), 'clean', 'untouched', 'chance'])


def test_figures_leave_no_state(tmp_path):
    import matplotlib
    import matplotlib.pyplot as plt

    before, names = dict(matplotlib.rcParams), plt.get_fignums()
    for view in ('plot', 'three_d'):
        VIEWS[view](example(), tmp_path / 'a.svg')
    assert dict(matplotlib.rcParams) == before and plt.get_fignums() == names


# ------------------------------------------------------------------------------------------------------------ joined


def parts_of(result, settings=({}, {})):
    "A result as two, the first with the first layer."
    data, parts = result.dataset, []
    for layer, about in zip(result.layers, settings, strict=True):
        table = data[['state', 'removed', 'size']].to_dataframe()
        table = table[table['layer'] == layer]
        states = sorted({0, *table['state']} - {-1})
        table['state'] = [-1 if s < 0 else states.index(s) for s in table['state']]
        parts.append(
            _responses(
                table,
                data['prediction'].values[states],
                LABELS,
                data['sample'].values,
                result.responses[1:],
                data['eps'].values[1:],
                result.settings | about,
            )
        )
    return parts


def test_joined_parts_are_the_whole():
    result = example(seconds=3.0)
    whole = joined(*parts_of(result, ({'seconds': 1.0}, {'seconds': 2.0})))
    assert whole.dataset.identical(result.dataset)
    assert whole.settings == result.settings | {'parts': [{'seconds': 1.0}, {'seconds': 2.0}]}
    assert joined(result).dataset.identical(result.dataset)
    assert joined(*parts_of(example())).settings == example().settings


def test_three_parts_are_joined_in_their_order():
    parts = [example(names=(), eps=())]
    for number in (1, 2):
        data = parts[0].dataset
        table = data[['state', 'removed', 'size']].to_dataframe().reset_index()
        table['layer'] += f' {number}'
        values = data['prediction'].values.copy()
        values[1:] = (values[1:] + number) % 10
        parts.append(_responses(table, values, LABELS, settings=parts[0].settings))
    whole = joined(*parts)
    assert whole.layers == ['conv', 'fc', 'conv 1', 'fc 1', 'conv 2', 'fc 2']
    for part in parts:
        for layer in part.layers:
            for filter in part.filters:
                pd.testing.assert_frame_equal(whole.curve(layer, filter), part.curve(layer, filter))


@pytest.mark.parametrize(
    'change, words',
    [
        (lambda d: d.assign_coords(sample=d['sample'] + 1), 'other samples than the first'),
        (lambda d: d.assign(label=d['label'] + 1), 'other labels'),
        (lambda d: d.assign_coords(response=['clean', 'a', 'b']), 'other responses'),
        (lambda d: d.assign_coords(eps=('response', [0.0, 0.1, np.nan])), 'other strengths'),
        (lambda d: d.assign(prediction=d['prediction'] + 1), 'other predictions of the untouched network'),
        (lambda d: d.assign(prediction=d['prediction'].astype('int16')), 'other predictions of the untouched network'),
    ],
)
def test_only_sweeps_of_one_network_are_joined(change, words):
    first, second = parts_of(example())
    with pytest.raises(ValueError, match=f'result 2 has {words}'):
        joined(first, Responses(change(second.dataset), second.settings))


def test_joined_refuses_what_cannot_be_compared():
    first, second = parts_of(example(), ({'against': 'original'}, {'against': 'filtered'}))
    with pytest.raises(ValueError, match=r'other settings \(against\)'):
        joined(first, second)
    with pytest.raises(ValueError, match="layer 'conv' with filter 'high' is in more than one result"):
        joined(first, first)
    with pytest.raises(ValueError, match='no responses to join'):
        joined()


def test_files_join(tmp_path):
    for number, part in enumerate(parts_of(example())):
        part.save(tmp_path / f'{number}.safetensors')
    whole = joined(*map(Responses.load, sorted(Path(tmp_path).iterdir())))
    assert whole.dataset.identical(example().dataset)
