"""Networks into which masks are put: name -> (how to make it, shape of its inputs, where masks stand by default)."""

import torch.nn.functional as F
from torch import nn

from robustnb.devices import seeded
from robustnb.models import build


def mlp():
    with seeded(0):
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 4))


class Functional(nn.Module):
    "Activations and pooling as functions, one of them used twice; nothing after the second of the linear layers."

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.second = nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.Conv2d(5, 6, 3)
        self.act, self.fc, self.head = nn.ReLU(), nn.Linear(24, 8), nn.Linear(8, 4)

    def forward(self, x):
        x = F.max_pool2d(self.act(self.norm(self.conv(x))), 2)
        x = self.act(self.second(x))
        x = F.relu(F.adaptive_avg_pool2d(x, 2)).flatten(1)
        return self.head(F.dropout(F.gelu(self.fc(x)), 0.5, self.training))


class Sum(nn.Module):
    "A residual block, a depthwise convolution and a normalisation after the activation."

    def __init__(self):
        super().__init__()
        self.inside, self.relu, self.out = nn.Conv2d(1, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 6, 3, padding=1)
        self.around, self.deep = nn.Conv2d(1, 6, 1), nn.Conv2d(6, 6, 3, groups=6)
        self.point, self.tanh, self.norm = nn.Conv2d(6, 7, 1), nn.Tanh(), nn.BatchNorm2d(7)
        self.sigmoid, self.drop, self.head = nn.Sigmoid(), nn.Dropout(0.2), nn.Linear(7, 4)
        self.late = nn.Linear(7, 7)

    def forward(self, x):
        x = self.deep(self.out(self.relu(self.inside(x))) + self.around(x))
        x = self.norm(self.tanh(self.point(x))).mean((2, 3))
        return self.head(self.drop(self.sigmoid(self.late(x))))


def torchvision_net(name, **how):
    return build('torchvision', 0, arch=name, classes=10, channels=3, **how)


NETS = {
    'mlp': (mlp, (1, 8, 8), ['2']),
    'functional': (Functional, (1, 10, 10), ['norm', 'second']),
    'sum': (Sum, (1, 8, 8), ['relu', 'norm', 'sigmoid']),
    'lenet5': (lambda: build('lenet5', 0), (1, 28, 28), ['relu1', 'relu2', 'relu3', 'relu4']),
    'lenet5_caffe': (lambda: build('lenet5_caffe', 0), (1, 28, 28), ['relu1', 'relu2', 'relu3']),
    'vgg16': (lambda: build('vgg16', 0, width=0.1), (3, 32, 32), [f'relu{i}' for i in range(1, 14)]),
    'resnet18': (
        lambda: build('resnet18', 0, width=0.125), (3, 32, 32),
        [f'layer{s}.{b}.relu1' for s in range(1, 5) for b in range(2)],
    ),
    'torchvision resnet18': (
        lambda: torchvision_net('resnet18'), (3, 64, 64), [f'layer{s}.{b}.bn1' for s in range(1, 5) for b in range(2)]
    ),
    'torchvision vgg11': (
        lambda: torchvision_net('vgg11'), (3, 64, 64),
        [f'features.{i}' for i in (1, 4, 7, 9, 12, 14, 17, 19)] + ['classifier.1', 'classifier.4'],
    ),
    'torchvision vit': (
        lambda: torchvision_net('vit_b_16'), (3, 224, 224), [f'encoder.layers.encoder_layer_{i}.mlp.1' for i in range(12)]
    ),
}  # fmt: skip
