"""LPIPS by its definition, in plain torch: the same bits as those of the `lpips` package."""

import torch

SMALL = (4, 6, 8, 10, 12)  # channels of stages that are not VGG16's


def vgg(channels):
    """torchvision's `vgg16().features`, whose ReLUs and poolings count in the numbering."""
    layers, inputs = [], 3
    for count, outputs in zip((2, 2, 3, 3, 3), channels, strict=True):
        for _ in range(count):
            layers += [torch.nn.Conv2d(inputs, outputs, 3, padding=1), torch.nn.ReLU()]
            inputs = outputs
        layers.append(torch.nn.MaxPool2d(2))
    return torch.nn.Sequential(*layers)


class Reference(torch.nn.Module):
    def __init__(self, channels=SMALL):
        super().__init__()
        self.features = vgg(channels)
        for i, count in enumerate(channels):
            head = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Conv2d(count, 1, 1, bias=False))
            setattr(self, f"lin{i}", torch.nn.ModuleDict({"model": head}))

    def forward(self, *pair):
        ends = (3, 8, 15, 22, 29)
        shift = torch.tensor([-0.030, -0.088, -0.188]).reshape(1, 3, 1, 1)
        scale = torch.tensor([0.458, 0.448, 0.450]).reshape(1, 3, 1, 1)
        units = []
        for x in pair:
            x, found = (x - shift) / scale, []
            for i, layer in enumerate(self.features[:30]):
                x = layer(x)
                if i in ends:
                    found.append(x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-10))
            units.append(found)
        heads = [getattr(self, f"lin{i}")["model"] for i in range(5)]
        return sum(
            head((a - b) ** 2).mean((1, 2, 3)) for head, a, b in zip(heads, *units, strict=True)
        )
