"""What the layers compile to, and what they do in half precision."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsd import kernels, training
from jaxsd.eight_bits import quantised
from jaxsd.models.transformer import TransformerBlock
from jaxsd.nn import Conv2d, GroupNorm, Net, attention, rematerialise


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="looks at what the CPU backend does")
def test_a_convolution_in_a_loop_takes_the_fast_kernel():
    """Its input channels come last but one: XLA's Eigen convolution knows only this order."""
    net = Net(Conv2d(4, 4, 3, padding=1))

    @jax.jit
    def loop(params, x):
        return jax.lax.fori_loop(0, 3, lambda i, x: net(params, x), x)

    params, x = net.init(jax.random.key(0)), jax.numpy.ones((2, 8, 8, 4))
    program = loop.lower(params, x).compile().as_text()
    kernels = re.findall(r"convolution\(.*dim_labels=b01f_(\w+)->b01f", program)
    assert kernels and set(kernels) == {"01io"}, kernels


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="forms for CPU")
def test_a_training_convolves_in_the_form_whose_gradient_is_fast():
    """Of 512 pixels a pass alone is Winograd's; with its gradient the compiler's own."""
    net = Net(Conv2d(192, 192, 3, padding=1))
    shapes = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in net.shapes.items()}
    x = jax.ShapeDtypeStruct((2, 16, 16, 192), jnp.float32)
    assert "conv_general_dilated" not in str(jax.make_jaxpr(lambda *a: net(*a))(shapes, x))
    with rematerialise("none"):
        assert "conv_general_dilated" in str(jax.make_jaxpr(lambda *a: net(*a))(shapes, x))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="libraries for CPU")
def test_of_the_compilers_first_choices_all_but_convolutions_stay(monkeypatch):
    """These use one core; sums without theirs would be of squares written to memory."""
    net = Net(Conv2d(64, 64, 3, padding=1))
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in net.shapes.items()}
    x = jax.ShapeDtypeStruct((2, 8, 8, 64), jnp.float32)

    def network_and_sums(params, x):
        rows = x.reshape(-1, 64)
        return net(params, x), rows @ params["weight"][:, :, 0, 0], jnp.square(rows).sum()

    def chosen(program) -> set[str]:
        """What is computed by YNNPACK."""
        text = program.lower(params, x).compile().as_text()
        names = re.findall(r"fusion\(.*calls=%([\w.]+),.*__ynn_fusion", text)
        bodies = [text.split(f"\n%{name} (")[1].split("\n}")[0] for name in names]
        return {kind for kind in ("convolution", "dot", "reduce") if f" {kind}(" in str(bodies)}

    told = training.compiler_options(training.Options(8), "cpu")
    assert chosen(jax.jit(network_and_sums)) == {"convolution", "dot", "reduce"}, (
        "what is told is of no use"
    )
    monkeypatch.setattr(kernels.cpu, "pictures_alike", lambda: True)
    assert chosen(kernels.jit(network_and_sums)) == {"dot", "reduce"}
    monkeypatch.setattr(kernels.cpu, "pictures_alike", lambda: False)
    assert chosen(kernels.jit(network_and_sums)) == {"convolution", "dot", "reduce"}
    assert chosen(jax.jit(network_and_sums, compiler_options=told)) == {"dot", "reduce"}


def test_a_compiler_that_knows_no_such_choice_is_not_told(monkeypatch):
    monkeypatch.setattr(kernels.cpu, "PRODUCTS_AND_SUMS", {"xla_cpu_experimental_of_old": "no"})
    assert kernels.cpu.all_cores.__wrapped__() == {}


@pytest.mark.parametrize("causal", [False, True])
def test_attention_in_float16(causal):
    """XLA's CPU backend lacks the product that jax would ask for."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 6, 8)), jnp.float32) for _ in range(3))
    whole = attention(q, k, v, 2, causal)
    half = attention(*(x.astype(jnp.float16) for x in (q, k, v)), 2, causal)
    assert half.dtype == jnp.float16
    np.testing.assert_allclose(half.astype(jnp.float32), whole, atol=5e-3)


def test_the_gradient_of_a_norm_is_rounded_once():
    net = Net(GroupNorm(4, 16, 1e-5))
    params = net.init(jax.random.key(0))
    x, d = (jax.random.normal(jax.random.key(n), (2, 8, 8, 16), jnp.bfloat16) for n in (1, 2))
    ours = jax.vjp(lambda x: net(params, x), x)[1](d)[0].astype(jnp.float32)
    true = jax.vjp(lambda x: net(params, x), x.astype(jnp.float32))[1](d.astype(jnp.float32))[0]
    assert jnp.sqrt(((ours - true) ** 2).mean() / (true**2).mean()) <= 0.0025  # 2^-9, and a little


@pytest.mark.parametrize("form", [None, "int8"])
def test_what_is_known_of_an_input_takes_its_place(form):
    """The same to the last bit, and whatever else is given is not looked at."""
    net = Net(TransformerBlock(16, 8, 2, 0.0))
    params = {f"mid_block.{n}": p for n, p in net.init(jax.random.key(0)).items()}
    params = params if form is None else quantised(params, form)
    params = {name.removeprefix("mid_block."): p for name, p in params.items()}
    x, context, other = (
        jax.random.normal(jax.random.key(n), (2, *shape))
        for n, shape in enumerate([(6, 16), (5, 8), (5, 8)])
    )
    known = net.known(params, re.compile(r"attn2\.to_[kv]\."), context)
    assert sorted(known) == ["attn2.to_k.weight.known", "attn2.to_v.weight.known"]
    np.testing.assert_array_equal(net(params | known, x, other), net(params, x, context))
    assert net.known(params, re.compile("nowhere"), context) == {}
