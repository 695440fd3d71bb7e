"""3x3 convolutions on CPU in each of their forms: what `kernels.cpu.convolves` was made of.

`python benchmarks/convolutions.py` prints, for each shape, the time of the forms of
`jaxsd/kernels/cpu.py` as a share of the compiler's own, median [least, most] of interleaved rounds:
in a loop, as a sampler applies its network, and with the gradient, as a training. In front of it
stands what is chosen.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from layers import in_loop, seconds, step, transposed_conv

from jaxsd.kernels import cpu

FORMS: dict[str, Callable] = {"gathered": cpu.gathered, "winograd": cpu.winograd}
SHAPES = (
    *((8, 8, 8, 64), (16, 8, 8, 64), (64, 8, 8, 64), (64, 16, 16, 64), (64, 32, 32, 64)),
    *((64, 4, 4, 96), (16, 32, 32, 128), (1, 32, 32, 160), (1, 64, 64, 160)),
    *((2, 8, 8, 1280), (1, 16, 16, 320), (1, 16, 16, 640), (1, 16, 16, 1280), (2, 16, 16, 640)),
    *((2, 16, 16, 1280), (1, 32, 32, 320), (1, 32, 32, 640), (2, 32, 32, 640), (2, 64, 64, 320)),
)
ROUNDS = 5


def shares(shape: tuple[int, ...], use: Callable) -> dict[str, np.ndarray]:
    """[ROUNDS] for each form: its time, divided by that of the compiler's own in the same round."""
    keys, channels = jax.random.split(jax.random.key(0), 3), shape[-1]
    x, weight, bias = (
        jax.random.normal(key, size)
        for key, size in zip(keys, (shape, (channels, channels, 3, 3), (channels,)), strict=True)
    )
    given = x, weight * (9 * channels) ** -0.5, bias
    # A gradient finds what was given and nothing besides, as in `kernels.convolution`
    forms = {name: jax.checkpoint(form) for name, form in FORMS.items()}
    programs = {name: use(form) for name, form in {"own": transposed_conv, **forms}.items()}
    for program in programs.values():
        seconds(program, given)  # compiles
    rounds = [
        {n: seconds(program, given) for n, program in programs.items()} for _ in range(ROUNDS)
    ]
    return {n: np.array([times[n] / times["own"] for times in rounds]) for n in FORMS}


def cells(shape: tuple[int, ...], gradient: bool) -> list[str]:
    """What is chosen, and the share of each form."""
    chosen = cpu.convolves(shape, jnp.float32, shape[-1], gradient)
    found = shares(shape, step if gradient else in_loop)
    name = next((name for name, form in FORMS.items() if form is chosen), "own")
    return [name, *(f"{np.median(s):.2f} [{s.min():.2f}, {s.max():.2f}]" for s in found.values())]


def main() -> None:
    titles = ["in a loop", "pixels", "chosen", *FORMS, "with gradient, chosen", *FORMS]
    print("|", " | ".join(titles), "|\n" + "| --- " * len(titles) + "|")
    for shape in SHAPES:
        both = [*cells(shape, False), *cells(shape, True)]
        print("|", " | ".join([str(list(shape)), str(np.prod(shape[:3])), *both]), "|", flush=True)


if __name__ == "__main__":
    main()
