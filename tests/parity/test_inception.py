"""Inception-v3's features against torch's, and the file of weights that pytorch-fid reads."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch_reference import names_and_shapes, nchw, randomise, relative_error

from jaxsd import weights
from jaxsd.errors import JaxsdError
from jaxsd.evaluation.features import load_inception
from jaxsd.models.inception import CLASSIFIER, InceptionV3
from jaxsd.nn import Net

TOLERANCE = 1e-4
NET = Net(InceptionV3())


class Conv(nn.Module):
    def __init__(self, inputs, outputs, kernel, **kwargs):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, bias=False, **kwargs)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


def same(inputs, outputs, kernel):
    sides = (kernel, kernel) if isinstance(kernel, int) else kernel
    return Conv(inputs, outputs, sides, padding=tuple(side // 2 for side in sides))


def halving(inputs, outputs):
    return Conv(inputs, outputs, 3, stride=2)


def averages(x):
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def maxima(x):
    return F.max_pool2d(x, 3, stride=1, padding=1)


def halves(x):
    return F.max_pool2d(x, 3, stride=2)


class Mixed(nn.Module):
    """Branches of named layers, each from the last of another branch or from the input."""

    def __init__(self, layers: dict[str, nn.Module], paths: list[str], pool):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.paths, self.pool = paths, pool

    def forward(self, x):
        outputs = []
        for path in self.paths:
            y = x
            for name in path.split():
                y = self.pool(y) if name == "pool" else getattr(self, name)(y)
            outputs.append(y)
        return torch.cat(outputs, 1)


def mixed_a(c, pooled):
    layers = {
        "branch1x1": same(c, 64, 1),
        "branch5x5_1": same(c, 48, 1),
        "branch5x5_2": same(48, 64, 5),
        "branch3x3dbl_1": same(c, 64, 1),
        "branch3x3dbl_2": same(64, 96, 3),
        "branch3x3dbl_3": same(96, 96, 3),
        "branch_pool": same(c, pooled, 1),
    }
    double = "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3"
    paths = ["branch1x1", "branch5x5_1 branch5x5_2", double, "pool branch_pool"]
    return Mixed(layers, paths, averages)


def mixed_b(c):
    layers = {
        "branch3x3": halving(c, 384),
        "branch3x3dbl_1": same(c, 64, 1),
        "branch3x3dbl_2": same(64, 96, 3),
        "branch3x3dbl_3": halving(96, 96),
    }
    return Mixed(
        layers, ["branch3x3", "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3", "pool"], halves
    )


def mixed_c(c, m):
    row, column = (1, 7), (7, 1)
    layers = {"branch1x1": same(c, 192, 1)}
    widths = [(c, m, 1), (m, m, row), (m, 192, column)]
    layers |= {f"branch7x7_{i}": same(*width) for i, width in enumerate(widths, 1)}
    widths = [(c, m, 1), (m, m, column), (m, m, row), (m, m, column), (m, 192, row)]
    layers |= {f"branch7x7dbl_{i}": same(*width) for i, width in enumerate(widths, 1)}
    layers["branch_pool"] = same(c, 192, 1)
    single = " ".join(f"branch7x7_{i}" for i in range(1, 4))
    double = " ".join(f"branch7x7dbl_{i}" for i in range(1, 6))
    return Mixed(layers, ["branch1x1", single, double, "pool branch_pool"], averages)


def mixed_d(c):
    layers = {
        "branch3x3_1": same(c, 192, 1),
        "branch3x3_2": halving(192, 320),
        "branch7x7x3_1": same(c, 192, 1),
        "branch7x7x3_2": same(192, 192, (1, 7)),
        "branch7x7x3_3": same(192, 192, (7, 1)),
        "branch7x7x3_4": halving(192, 192),
    }
    wide = " ".join(f"branch7x7x3_{i}" for i in range(1, 5))
    return Mixed(layers, ["branch3x3_1 branch3x3_2", wide, "pool"], halves)


def mixed_e(c, pool):
    layers = {
        "branch1x1": same(c, 320, 1),
        "branch3x3_1": same(c, 384, 1),
        "branch3x3_2a": same(384, 384, (1, 3)),
        "branch3x3_2b": same(384, 384, (3, 1)),
        "branch3x3dbl_1": same(c, 448, 1),
        "branch3x3dbl_2": same(448, 384, 3),
        "branch3x3dbl_3a": same(384, 384, (1, 3)),
        "branch3x3dbl_3b": same(384, 384, (3, 1)),
        "branch_pool": same(c, 192, 1),
    }
    single = [f"branch3x3_1 branch3x3_2{fork}" for fork in "ab"]
    double = [f"branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3{fork}" for fork in "ab"]
    return Mixed(layers, ["branch1x1", *single, *double, "pool branch_pool"], pool)


class Inception(nn.Module):
    """torchvision's names, with the pooling of the network that the FID was defined by."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = halving(3, 32)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = same(32, 64, 3)
        self.maxpool1 = nn.MaxPool2d(3, 2)
        self.Conv2d_3b_1x1 = same(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        self.maxpool2 = nn.MaxPool2d(3, 2)
        self.Mixed_5b = mixed_a(192, 32)
        self.Mixed_5c = mixed_a(256, 64)
        self.Mixed_5d = mixed_a(288, 64)
        self.Mixed_6a = mixed_b(288)
        self.Mixed_6b = mixed_c(768, 128)
        self.Mixed_6c = mixed_c(768, 160)
        self.Mixed_6d = mixed_c(768, 160)
        self.Mixed_6e = mixed_c(768, 192)
        self.Mixed_7a = mixed_d(768)
        self.Mixed_7b = mixed_e(1280, averages)
        self.Mixed_7c = mixed_e(2048, maxima)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x):
        for layer in list(self.children())[:-1]:
            x = layer(x)
        return x.mean((2, 3))


def random_inception() -> Inception:
    """Weights of a size that keeps activations near one, and statistics that are not 0 and 1."""
    torch.manual_seed(0)
    module = randomise(Inception(), scale=0.01)
    generator = torch.Generator().manual_seed(1)
    for name, buffer in module.named_buffers():
        noise = torch.rand(buffer.shape, generator=generator)
        if name.endswith("running_mean"):
            buffer.copy_(0.2 * noise - 0.1)
        elif name.endswith("running_var"):
            buffer.copy_(0.1 + 0.2 * noise)
    return module


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """A module of torch's and its weights, read from a file as pytorch-fid has it."""
    module = random_inception()
    file = tmp_path_factory.mktemp("inception") / "pt_inception-2015-12-05-6726825d.pth"
    torch.save(module.state_dict(), file)
    return module, load_inception(file)


def test_names_and_shapes_are_those_of_the_file(inception):
    module, component = inception
    counters = {n for n in module.state_dict() if n.endswith("num_batches_tracked")}
    theirs = {n: s for n, s in names_and_shapes(module).items() if n not in counters}
    assert theirs == NET.shapes | CLASSIFIER
    assert component.params.keys() == NET.shapes.keys()
    assert len(counters) == 94


@pytest.mark.slow
def test_features(inception, report):
    module, component = inception
    pixels = np.random.default_rng(0).integers(0, 256, (1, 90, 80, 3), np.uint8)
    with torch.no_grad():
        resized = F.interpolate(
            nchw(pixels / np.float32(255)), (299, 299), mode="bilinear", align_corners=False
        )
        expected = module(2 * resized - 1)
    ours = component.net(component.params, jnp.asarray(pixels / np.float32(127.5) - 1))
    assert expected.std() > 0.01 * expected.abs().max()  # something to compare
    report(relative_error(ours, expected), TOLERANCE)


@pytest.mark.parametrize("size", [(512, 400), (32, 32), (299, 299)])
def test_pictures_are_resized_without_antialiasing(size):
    class Seen(InceptionV3):
        def features(self, x):
            return x.reshape(len(x), -1)[:, :2048]

    x = np.random.default_rng(0).uniform(-1, 1, (1, *size, 3)).astype(np.float32)
    expected = F.interpolate(nchw(x), (299, 299), mode="bilinear", align_corners=False)
    expected = expected.movedim(1, -1).reshape(1, -1)[:, :2048]
    net = Net(Seen())
    ours = net({n: jnp.zeros(s) for n, s in net.shapes.items()}, jnp.asarray(x))
    assert relative_error(ours, expected) <= TOLERANCE


def test_other_weights_are_refused(tmp_path):
    weights.save({"fc.weight": jnp.zeros((1000, 2048))}, tmp_path / "torchvision.safetensors")
    with pytest.raises(JaxsdError, match="missing"):
        load_inception(tmp_path / "torchvision.safetensors")
