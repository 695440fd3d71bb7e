"""A teacher is split over a mesh as its student is, and teaches there as on one device."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding
from test_sharding import OPTIONS, TOLERANCE, device_bytes, on_mesh, one_device

from jaxsd import families, kernels, sharding, training
from jaxsd.diffusion.denoise import guided
from jaxsd.diffusion.jumps import student_schedule
from jaxsd.diffusion.schedule import Schedule
from jaxsd.models import UNet
from jaxsd.nn import Net
from jaxsd.objectives.distillation import Teacher
from jaxsd.objectives.guided import Guided
from jaxsd.objectives.progressive import Progressive
from jaxsd.training.placement import compile_step, place_state, spread
from jaxsd.training.step import Aux

UNET = families.get_family("digits").unet
RANGE = (1.0, 9.0)
SCHEDULE = student_schedule(Schedule(beta_schedule="cosine", prediction_type="v_prediction"))
TOLD = dataclasses.replace(tiny.PIXEL_UNET, time_cond_proj_dim=8)


def test_a_device_holds_its_share_of_a_full_size_teacher():
    """And at most 4 % more, as of the student's parameters."""
    net = Net(UNet(families.get_family("sd1").unet))
    params = {n: jax.ShapeDtypeStruct(s, jnp.bfloat16) for n, s in net.shapes.items()}
    whole = 2 * net.size
    for fsdp in (1, 2, 4, 8):
        mesh = sharding.make_mesh(fsdp=fsdp)
        aux = spread(Aux({"teacher": params}, {}), training.Options(1), mesh)
        pieces = [x.sharding.shard_shape(x.shape) for x in jax.tree.leaves(aux)]
        held = 2 * sum(map(math.prod, pieces))
        assert whole / fsdp <= held < 1.04 * whole / fsdp


def test_guidance_sends_weights_about_and_no_pictures():
    """Nothing says where noise lies that is made inside, and what guidance puts side by side."""
    mesh, options, net = sharding.make_mesh(fsdp=8), training.Options(1), Net(UNet(UNET))
    params = {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in net.shapes.items()}
    text = jax.ShapeDtypeStruct((16, 7, UNET.cross_attention_dim), jnp.float32)
    rows = NamedSharding(mesh, sharding.ROWS)

    def ask(params, text, key):
        conditions = [{"encoder_hidden_states": text}] * 2
        x, scale = jax.random.normal(key, (16, 8, 8, 4)), jnp.full((1, 16), 3.0)
        denoise = guided(lambda *a, **told: net(params, *a, **told), conditions, scale, scale[0, 0])
        with kernels.compiling_for("cpu", NamedSharding(mesh, sharding.HEADS)):
            return denoise(x, jnp.full(16, 500.0))

    placed = spread(params, options, mesh)
    program = jax.jit(ask, in_shardings=({n: p.sharding for n, p in placed.items()}, rows, None))
    compiled = program.lower(params, text, jax.eval_shape(lambda: jax.random.key(0))).compile()
    sent = re.findall(r" = \(?\w+\[([\d,]*)\]\S* all-\w+(?:-start)?\(", compiled.as_text())
    sent = {tuple(map(int, shape.split(","))) for shape in sent}
    sizes = {math.prod(shape) for shape in net.shapes.values()}
    # Of kernels that Winograd's form transforms where they lie, sixteen matrices each
    matrices = {shape[:2] for shape in net.shapes.values() if len(shape) == 4}
    assert sent and not {s for s in sent if math.prod(s) not in sizes} - matrices
    convolved = re.findall(r" = \w+\[(\d+),\d+,\d+,\d+\]\S* convolution\(", compiled.as_text())
    assert set(convolved) == {"4"}  # of a device's own two pictures, with and without the text


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, unet, passes",
    [(Progressive, TOLD, 1), (Guided, tiny.PIXEL_UNET, 2)],
    ids=["progressive", "guided"],
)
def test_students_learn_on_a_mesh_what_they_learn_on_one_device(kind, unet, passes):
    """passes: of the teacher for each row. Progressive's is told the scale; guided's is not."""
    base = tiny.ddpm(unet=TOLD, schedule=SCHEDULE)
    base.initial = tiny.parameters(base.net, 1)
    net = tiny.ddpm(unet=unet).net
    objective = kind(base, Teacher(net, tiny.parameters(net), SCHEDULE), 2, RANGE)
    batches = [tiny.ddpm_batch(8)] * 2
    on_one, _ = on_mesh(objective, one_device(), batches)

    mesh, optimizer = sharding.make_mesh(2, 4), training.make_optimizer(OPTIONS)
    state, aux = place_state(objective, optimizer, OPTIONS, mesh)
    teacher = aux.objective["teacher"]
    for name, array in teacher.items():
        assert array.sharding == state.params[name].sharding
    split = {n: array for n, array in teacher.items() if not array.sharding.is_fully_replicated}
    nbytes = sum(array.nbytes for array in split.values())
    assert nbytes > 0.9 * sum(array.nbytes for array in teacher.values())
    assert set(device_bytes(split).values()) == {nbytes // 4}

    step = compile_step(training.make_step(objective, optimizer, OPTIONS), state, OPTIONS)
    rows = [sharding.split(batch, mesh) for batch in batches]
    compiled = step.lower(state, aux, rows[0]).compile()
    convolved = re.findall(r" = f32\[(\d+),8,8,\d+\]\S* convolution\(", compiled.as_text())
    assert set(map(int, convolved)) == {1, passes}  # of a device's own row: none does another's

    losses = []
    for batch in rows:
        state, metrics = compiled(state, aux, batch)
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses, on_one, atol=TOLERANCE)
    assert min(losses) > 1000 * TOLERANCE and losses[0] != losses[1]
