"""Shortcuts: which steps compute less, what is left when none does, what they may not change."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from refusals import refused
from test_pipeline import CALL, NEGATIVE, PROMPT, compilations

from jaxsd import Shortcuts, denoising, kernels, shortcuts
from jaxsd.diffusion import samplers
from jaxsd.diffusion.steps import ROWS
from jaxsd.models import UNet, UNetConfig, branches, deep_shape
from jaxsd.nn import Net
from jaxsd.shortcuts import Way, plan_ways

ALL, NONE = (0.0, np.inf), (0.0, 0.0)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return tiny.pipeline(tiny.tokenizer(tmp_path_factory.mktemp("words") / "tokenizer"))


def latents(pipe, wanted=Shortcuts(), **changes):  # noqa: B008
    call = CALL | {"steps": 6, "guidance_scale": 3.0} | changes
    return np.asarray(pipe.sample(**call, shortcuts=wanted))


# --- Guidance on part of the noise levels ------------------------------------------------------


def test_guided_everywhere_is_guided_bit_for_bit(pipe):
    np.testing.assert_array_equal(latents(pipe, Shortcuts(ALL)), latents(pipe))


def test_guided_nowhere_is_the_prompt_alone_bit_for_bit(pipe):
    alone = latents(pipe, guidance_scale=1.0)
    np.testing.assert_array_equal(latents(pipe, Shortcuts(NONE)), alone)
    np.testing.assert_array_equal(latents(pipe, Shortcuts(NONE), guidance_scale=1.0), alone)


def test_a_part_of_the_interval_is_another_picture(pipe):
    some = latents(pipe, Shortcuts((0.3, 3.0)))
    for other in (latents(pipe), latents(pipe, guidance_scale=1.0)):
        assert np.abs(some - other).max() > 1e-3


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "heun", "pndm"])
def test_the_guided_steps_are_those_in_the_interval(pipe, sampler):
    grid = samplers.make_steps(pipe.schedule, sampler, 12)
    count = int(grid.count)
    ways, table = plan_ways(Shortcuts((0.5, 2.0)), grid, 0, count, 2)
    assert ways == (Way(True), Way(False))
    level = grid.sigma[:count] / grid.alpha[:count]
    np.testing.assert_array_equal(table[:count] == 0, (level >= 0.5) & (level <= 2.0))
    assert 0 < (table[:count] == 0).sum() < count


def test_from_pure_noise_the_level_is_infinite(pipe):
    schedule = dataclasses.replace(
        pipe.schedule, rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    grid = samplers.make_steps(schedule, "ddim", 4)
    assert grid.alpha[0] == 0
    for high, first in ((np.inf, 0), (1e9, 1)):
        assert plan_ways(Shortcuts((0.0, high)), grid, 0, 4, 2)[1][0] == first


def test_one_pass_where_there_is_no_guidance(pipe):
    """The interval's second loop convolves half of the rows."""
    rows = []

    def spy(params, x, t, **told):
        rows.append(len(x))
        return x

    class Spy(Net):
        def __init__(self):
            self.config, self.shapes = pipe.unet.config, {}

        __call__ = staticmethod(spy)

    other = tiny.pipeline(pipe.tokenizer)
    other.components["unet"] = dataclasses.replace(other.components["unet"], net=Spy())
    latents(other, Shortcuts((0.3, 3.0)), seeds=[1, 2, 3])
    assert sorted(set(rows)) == [3, 6]


def test_moving_what_is_a_value_compiles_nothing(pipe, untraced):
    latents(pipe, Shortcuts((0.3, 3.0), 2))
    with compilations() as count:
        for interval, every, steps in (((0.0, 1.0), 2, 6), (ALL, 3, 6), (NONE, 5, 9)):
            latents(pipe, Shortcuts(interval, every), steps=steps)
            assert not count, (interval, every, count)


# --- Kept features ------------------------------------------------------------------------------


DEEP = UNetConfig(
    sample_size=10,  # so that sizes are odd on the way down
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    block_out_channels=(4, 8, 12),
    layers_per_block=2,
    norm_num_groups=4,
    attention_head_dim=2,
    cross_attention_dim=8,
)


TIMES = [500.0, 20.0]


@pytest.fixture(scope="module")
def deep():
    net = Net(UNet(DEEP))
    key = jax.random.key(0)
    x = jax.random.normal(key, (2, 10, 6, 4))
    text = jax.random.normal(key, (2, 3, 8))
    return net, tiny.parameters(net), x, text


@pytest.fixture(scope="module")
def whole(deep):
    """What the network says at `TIMES`."""
    net, params, x, text = deep
    return net(params, x, jnp.asarray(TIMES), text)


@pytest.mark.parametrize(
    "branch", [pytest.param(n, marks=[] if n in (0, 4, 8) else pytest.mark.slow) for n in range(9)]
)
def test_features_taken_out_and_put_back_change_nothing(deep, whole, branch):
    net, params, x, text = deep
    t = jnp.asarray(TIMES)
    said, kept = net(params, x, t, text, branch=branch, method="and_deep")
    again = net(params, x, t, text, branch=branch, deep=kept, method="around_deep")
    assert branches(DEEP) == 9 and kept.shape == (2, *deep_shape(DEEP, branch, 10, 6))
    np.testing.assert_array_equal(said, whole)
    np.testing.assert_array_equal(again, whole)
    later = net(params, x + 1, t, text, branch=branch, deep=kept, method="around_deep")
    assert np.abs(later - whole).max() > 1e-3


def test_less_is_computed_around_kept_features(deep):
    net, params, x, text = deep
    t = jnp.asarray(TIMES)

    def flops(ask):
        return jax.jit(ask).lower(x).cost_analysis()["flops"]

    costs = [flops(lambda x: net(params, x, t, text))]
    for branch in reversed(range(9)):
        kept = jnp.zeros((2, *deep_shape(DEEP, branch, 10, 6)))
        told = {"branch": branch, "deep": kept, "method": "around_deep"}
        costs.append(flops(lambda x, told=told: net(params, x, t, text, **told)))
    assert all(less < more for more, less in itertools.pairwise(costs))


def test_kept_for_one_step_is_not_kept(pipe):
    np.testing.assert_array_equal(latents(pipe, Shortcuts(None, 1)), latents(pipe))
    # Of one step there is nothing to keep for, though another program draws it
    one = latents(pipe, Shortcuts(None, 3), steps=1)
    np.testing.assert_array_equal(one, latents(pipe, steps=1))


@pytest.mark.parametrize("interval", [pytest.param(None, marks=pytest.mark.slow), (0.3, 3.0)])
def test_an_image_depends_on_its_seed_alone_and_comes_again(pipe, interval):
    wanted = Shortcuts(interval, 3, 1)
    together = latents(pipe, wanted, seeds=[7, 0, 9])
    np.testing.assert_array_equal(together, latents(pipe, wanted, seeds=[7, 0, 9]))
    for i, seed in enumerate([7, 0, 9]):
        np.testing.assert_allclose(latents(pipe, wanted, seeds=seed)[0], together[i], atol=1e-5)
    assert np.abs(together - latents(pipe, seeds=[7, 0, 9])).max() > 1e-3


@pytest.mark.parametrize("interval", [None, (0.3, 3.0)])
def test_kept_features_are_there_after_a_look_at_the_latents(pipe, interval):
    wanted = Shortcuts(interval, 3)
    seen = latents(pipe, wanted, callback=lambda i, t, x: None)
    np.testing.assert_array_equal(seen, latents(pipe, wanted))


def test_features_are_new_after_every_few_steps_and_where_guidance_begins(pipe):
    grid = samplers.make_steps(pipe.schedule, "ddim", 8)
    ways, table = plan_ways(Shortcuts(None, 3), grid, 2, 8, 2)
    assert [ways[w].fresh for w in table[2:8]] == [True, False, False, True, False, False]
    level = float(grid.sigma[3]) / float(grid.alpha[3])
    ways, table = plan_ways(Shortcuts((0.0, level), 5), grid, 0, 8, 2)
    taken = [ways[w] for w in table[:8]]
    assert [way.guided for way in taken] == [False] * 3 + [True] * 5
    assert [way.fresh for way in taken] == [True, False, False, True, False, True, False, False]


def test_unguided_steps_read_the_features_of_the_prompt(pipe):
    """Guided at first, then not: the features that stay are those that the prompt alone gives."""
    grid = samplers.make_steps(pipe.schedule, "ddim", 6)
    level = float(grid.sigma[1]) / float(grid.alpha[1])
    cond, uncond = pipe.encode([PROMPT]), pipe.encode([NEGATIVE])
    how = {"steps": 6, "sampler": "ddim", "guidance_scale": 3.0}
    wanted = Shortcuts((level, np.inf), 6)  # steps 0 and 1 are guided, step 0 alone is whole
    seen = []
    pipe.denoise(
        pipe.noise([5]),
        cond,
        uncond,
        **how,
        shortcuts=wanted,
        callback=lambda *now: seen.append(now),
    )
    start, (after_two, after_three) = pipe.noise([5]), (seen[1][2], seen[2][2])
    branch = {"branch": 0, **cond}
    t = jnp.asarray(grid.t)[jnp.asarray([0, 2])]
    params = pipe.params["unet"]
    _, kept = pipe.unet(params, start, t[:1], method="and_deep", **branch)
    said = pipe.unet(params, after_two, t[1:], method="around_deep", deep=kept, **branch)
    a, s, a2, s2 = (
        jnp.float32(row[2]) for row in (grid.alpha, grid.sigma, grid.next_alpha, grid.next_sigma)
    )
    x0, eps = a * after_two - s * said, a * said + s * after_two  # of v
    np.testing.assert_allclose(a2 * x0 + s2 * eps, after_three, atol=1e-5)


# --- The loop ----------------------------------------------------------------------------------


def test_every_step_is_taken_in_order():
    bodies = [
        lambda i, carry, w=w: (carry[0].at[carry[1]].set(10 * i + w), carry[1] + 1)
        for w in (0, 1, 2)
    ]
    table = jnp.zeros(ROWS, jnp.int32).at[:8].set(jnp.asarray([0, 2, 2, 0, 1, 0, 2, 1]))
    run = jax.jit(
        lambda start, stop: shortcuts.run(bodies, table, start, stop, (jnp.full(8, -1), 0))
    )
    seen, count = run(1, 7)
    assert count == 6 and list(seen[:6]) == [12, 22, 30, 41, 50, 62]
    assert run(4, 4)[1] == 0


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("side, before", [(64, True), (32, False)])
def test_what_does_not_change_is_computed_before_the_loop(side, before, count):
    """A kernel's transform, on CPU, of few pixels not: so much would have to be kept.

    In a branch of `lax.cond` XLA leaves all of it inside the loop.
    """

    def program(weight, table, x):
        def convolve(i, x):
            return kernels.convolution(x, weight, None, 1, ((1, 1), (1, 1)))

        if count == 1:
            return jax.lax.fori_loop(0, 9, convolve, x)
        bodies = [convolve, lambda i, x: 2 * x]
        return shortcuts.run(bodies, table, jnp.int32(0), jnp.int32(9), x)

    weight, x = jnp.ones((192, 192, 3, 3)), jnp.ones((1, side, side, 192))
    lowered = jax.jit(program).lower(weight, jnp.zeros(ROWS, jnp.int32), x)
    text = lowered.compile({"xla_backend_optimization_level": "3"}).as_text()
    assert "f32[16,36864]" in text
    assert ("f32[16,36864]" in text[text.index("ENTRY") :]) == before


@pytest.mark.parametrize("ways", [(Way(),), (Way(), Way(guided=False))])
def test_keys_and_values_are_computed_before_the_loop(pipe, ways):
    """Loops do not even see the weights that make them; XLA for GPUs would leave them inside."""
    unet = pipe.components["unet"]
    states = jnp.ones((1, 7, unet.net.config.cross_attention_dim))
    inputs = denoising.Inputs(
        params=(unet.params, []),
        loras={},
        lora_scales=np.zeros(0, np.float32),
        conditions=[{"encoder_hidden_states": states}] * 2,
        scales=np.full((1, 1), 3.0, np.float32),
        guidance_rescale=np.float32(0),
        control_scales=np.zeros(0, np.float32),
        blend=None,
        keys=jax.vmap(jax.random.key)(jnp.zeros(1, jnp.uint32)),
        grid=samplers.make_steps(pipe.schedule, "ddim", 4),
        eta=np.float32(0),
        table=None if len(ways) == 1 else np.zeros(ROWS, np.int32),
    )

    def loop(inputs, x):
        run = (unet.net, [], pipe.schedule.for_run(), "ddim", ways, inputs, x, ())
        return denoising.loop(*run, jnp.int32(0), jnp.int32(4))[0]

    program = jax.make_jaxpr(loop)(inputs, jnp.zeros((1, 8, 8, 4))).jaxpr
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(inputs)]
    given = dict(zip(map(id, program.invars), names, strict=False))
    loops = [equation for equation in program.eqns if equation.primitive.name == "while"]
    seen = {given[id(v)] for equation in loops for v in equation.invars if id(v) in given}
    assert [name for name in seen if "attn1.to_k.weight" in name]
    assert not [name for name in seen if "attn2.to_k.weight" in name or "attn2.to_v" in name]


# --- What is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wanted, changes, said",
    [
        (Shortcuts((3.0, 0.3)), {}, "a lowest and a highest noise level"),
        (Shortcuts((-1.0, 0.3)), {}, "not -1 and 0.3"),
        (Shortcuts((np.nan, 0.3)), {}, "from 0 to inf"),
        (Shortcuts(None, 0), {}, "cache_every must be at least 1"),
        (Shortcuts(None, 2, 4), {}, "cache_branch must be from 0 to 3"),
        (Shortcuts(None, 2, -1), {}, "not -1"),
        (Shortcuts(None, 2), {"sampler": "heun"}, "take a sampler that looks once"),
        (Shortcuts(None, 2), {"sampler": "lcm"}, "lcm noises a new picture in each step"),
    ],
)
def test_shortcuts_that_cannot_be_taken(pipe, wanted, changes, said):
    assert said in refused(pipe.sample, **CALL | changes, shortcuts=wanted)


def test_students_keep_nothing(pipe):
    other = tiny.pipeline(pipe.tokenizer)
    other.schedule = dataclasses.replace(other.schedule, default_steps=4)
    said = refused(other.sample, PROMPT, shortcuts=Shortcuts(None, 2))
    assert "distilled to 4 steps" in said
