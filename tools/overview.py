"""Draw the picture of the README: `python tools/overview.py` writes nbs/images/overview.png."""

from pathlib import Path

import numpy as np

from robustnb.attacks import FGSM, PGD
from robustnb.data import digits
from robustnb.evaluation import evaluate
from robustnb.lsa import layer_sustainability
from robustnb.noises import Gaussian
from robustnb.plots import curves, figure, style
from robustnb.training import trained

EPS = [0, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2]
test, model = digits(28).test, trained('digits_cnn', 'digits28')
table = evaluate(model, test, [Gaussian(), FGSM(), PGD()], EPS).table()
profile = layer_sustainability(model, test, [Gaussian(0.1), FGSM(0.1), PGD(0.1)])
size = profile.sizes().set_index('perturbation').input_change

with style():
    fig, (left, right) = figure(1, 2, width=12, height=3.6)
    curves(
        EPS,
        {name: tuple(np.r_[table[c][0], rows[c]] for c in ('accuracy', 'low', 'high'))
         for name, rows in table[table.attack != 'clean'].groupby('attack', sort=False)},
        xlabel='strength (pixels are in [0, 1])', ylabel='accuracy', ylim=(0, 1), percent=True, ax=left,
        title=f'Where does it break? ({len(test)} digits, 95 % bands)',
    )
    curves(
        ['input', *profile.layers],
        {name: tuple(np.r_[size[name], rows[c]] for c in ('mean', 'low', 'high'))
         for name, rows in profile.table().groupby('perturbation', sort=False)},
        xlabel='layer', ylabel='relative error', ax=right, ylim=(0, 0.35), title='Which layer lets it through? (strength 0.1)',
    )
fig.savefig(Path(__file__).parents[1] / 'nbs' / 'images' / 'overview.png', dpi=100)
