"""Students: what they are told and taught, on models small enough to know the answer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import jaxsd
from jaxsd.components import Component
from jaxsd.diffusion import jumps
from jaxsd.diffusion.schedule import Schedule
from jaxsd.errors import JaxsdError
from jaxsd.nn import Net
from jaxsd.objectives import Now
from jaxsd.objectives.consistency import Consistency
from jaxsd.objectives.denoising import Example
from jaxsd.objectives.distillation import Teacher, ask, ask_teacher
from jaxsd.objectives.guided import Guided
from jaxsd.objectives.progressive import Progressive
from jaxsd.pipeline import Pipeline
from jaxsd.training import Options, init_state, make_optimizer, make_step

COSINE = Schedule(beta_schedule="cosine", prediction_type="v_prediction")
NOW = Now(jax.random.key(3))
RANGE = (1.0, 9.0)


# --- In closed form ----------------------------------------------------------------------------


class Table(Net):
    """v = c(t) z, with a number c for each of `count` equal times: all that Gaussian data need."""

    def __init__(self, count: int = 64):
        self.config, self.count = tiny.PIXEL_UNET, count

    @property
    def shapes(self):
        return {"c": (self.count + 1,)}

    def __call__(self, params, z, t, dropout_key=None, **told):
        c = params["c"][jnp.round(t * (self.count / 1000)).astype(jnp.int32)]
        return c[:, None, None, None] * z


@dataclasses.dataclass
class Gaussian:
    """A denoiser of N(0, 1) pictures, of which v = 0 is the best prediction."""

    schedule: Schedule = dataclasses.field(default_factory=lambda: jumps.student_schedule(COSINE))

    def __post_init__(self):
        self.net, self.aux, self.preview_prompts = Table(), (), [""]

    def init(self, key):
        return {"c": jnp.zeros(65)}

    def example(self, params, aux, batch, key):
        return Example(jax.random.normal(key, (512, 2, 2, 1)), {}, {})

    def pipeline(self, params):
        raise NotImplementedError


def one_more_stage(params: dict, steps: int) -> dict:
    """The parameters for which the loss of a stage is zero, found by gradient descent."""
    base = Gaussian()
    student = Progressive(base, Teacher(base.net, params, base.schedule), steps)
    gradient = jax.jit(jax.value_and_grad(student.loss, has_aux=True))
    for i in range(60):
        now = Now(jax.random.fold_in(jax.random.key(steps), i))
        (loss, _), grads = gradient(params, student.aux, {}, now)
        # A rung has the share 1 / steps of the examples, and z a variance of one
        params = {"c": params["c"] - 0.45 * steps * grads["c"]}
    assert loss < 1e-9
    return params


def test_the_one_step_student_of_a_64_step_teacher_says_9809_z():
    params = {"c": jnp.zeros(65)}
    for steps in jumps.stages(64, 1):
        params = one_more_stage(params, steps)
    z = jnp.ones((1, 1, 1, 1))
    rungs = jumps.ladder(jumps.student_schedule(COSINE), 1)
    said = Table()(params, z, jnp.array([1000.0]))
    x = jumps.jump("v_prediction", said, z, *(rungs.at(jnp.array([i])) for i in (0, 1)))
    np.testing.assert_allclose(x.item(), 0.980906, atol=2e-4)


def test_a_consistency_student_of_gaussian_data():
    """It is right when it says where the rest of the teacher's path leads, and not before."""
    base = Gaussian(
        dataclasses.replace(
            jumps.student_schedule(COSINE, class_name="LCMScheduler"), original_inference_steps=64
        )
    )
    student = Consistency(base, Teacher(base.net, base.init(NOW.key), base.schedule), 4)
    angle = np.arange(65) / 64 * np.pi / 2
    # From rung i the teacher's path multiplies by cos(d)^i; x = cos(a) z - sin(a) c z says as much
    path = np.cos(np.pi / 128) ** np.arange(65)
    right = np.where(angle > 0, (np.cos(angle) - path) / np.maximum(np.sin(angle), 1e-9), 0)
    # The sampler's boundary mixes some z in: of no account but in the first timestep
    for c, low, high in ((right, 0.0, 1e-6), (np.zeros(65), 1e-4, 1.0)):
        params = {"c": jnp.asarray(c, jnp.float32)}
        loss, _ = student.loss(params, student.aux, {}, NOW._replace(ema=params))
        assert low <= loss < high
    params = {"c": jnp.asarray(right, jnp.float32)}
    wrong = {"c": params["c"] + 0.1}
    assert student.loss(params, student.aux, {}, NOW._replace(ema=wrong))[0] > 1e-3


# --- Of a small model, in pixels ---------------------------------------------------------------


@pytest.fixture(scope="module")
def pixels():
    """A teacher with random weights, and what its students are built on."""
    base = tiny.ddpm(schedule=jumps.student_schedule(COSINE))
    params = tiny.parameters(base.net)
    base.initial = params
    batch = jax.tree.map(jnp.asarray, tiny.ddpm_batch(4))
    return base, Teacher(base.net, params, base.schedule), batch


def scaled(base, **changes):
    """The same denoiser with a network that is told the guidance scale."""
    unet = dataclasses.replace(base.unet, time_cond_proj_dim=8, **changes)
    return dataclasses.replace(base, unet=unet)


@pytest.mark.parametrize("told", [False, True], ids=["plain", "told the scale"])
@pytest.mark.parametrize("factor", [2, 5])
def test_a_stage_teaches_what_the_sampler_does_in_its_steps(pixels, factor, told):
    """Of the last stage: noise in, and the picture that the teacher draws in so many steps."""
    base, teacher, batch = pixels
    if told:
        base = scaled(base)
        teacher = Teacher(base.net, tiny.parameters(base.net), base.schedule)
    guidance = (3.0, 3.0) if told else None
    said = {}

    class Spy(Net):
        def __init__(self):
            self.config = base.net.config

        def __call__(self, params, z, t, dropout_key=None, **told):
            told.pop("timestep_cond", None)
            said.update(z=z, t=t, told=told)
            return jnp.zeros_like(z)

    spied = dataclasses.replace(base)
    spied.net = Spy()
    student = Progressive(spied, teacher, 1, guidance, factor=factor, weighting="snr+1")
    loss, _ = student.loss(teacher.params, student.aux, batch, NOW)
    assert (said["t"] == 1000).all()
    pipe = Pipeline(Component(base.net, teacher.params), base.schedule)
    drawn = pipe.denoise(
        said["z"], said["told"], None, steps=factor, sampler="ddim", guidance_scale=3.0
    )
    # x = alpha z - sigma v with alpha = 0, and SNR + 1 times the error in x is that in v
    np.testing.assert_allclose(loss, jnp.square(drawn).mean(), rtol=1e-5)


def test_guidance_is_followed_as_it_is_sampled(pixels):
    base, teacher, batch = pixels
    example = base.example({}, (), batch, NOW.key)
    z, t = jax.random.normal(NOW.key, (4, 8, 8, 1)), jnp.array([1000.0, 700.0, 400.0, 10.0])
    scale = jnp.array([1.0, 2.0, 3.5, 9.0])
    said = ask_teacher(teacher, teacher.params, z, t, example, scale)
    c, u = (teacher.net(teacher.params, z, t, **told) for told in (example.cond, example.uncond))
    # Rounding, too, counts as often as the scale says
    s = scale[:, None, None, None]
    np.testing.assert_allclose((said - u) / s, c - u, rtol=1e-5, atol=1e-5)


def test_guidance_of_a_network_that_says_nothing_is_nothing(pixels):
    """As of an untrained one, whose last layer is zero."""
    base, teacher, batch = pixels
    params = jax.tree.map(jnp.zeros_like, teacher.params)
    example = base.example({}, (), batch, NOW.key)
    said = ask_teacher(teacher, params, example.x0, jnp.full(4, 500.0), example, jnp.full(4, 3.0))
    np.testing.assert_array_equal(said, jnp.zeros_like(example.x0))


def test_a_student_told_the_scale_begins_as_the_conditional_teacher(pixels):
    base, teacher, batch = pixels
    student = Guided(scaled(base), teacher, 4, RANGE)
    params = student.init(jax.random.key(0))
    name = "time_embedding.cond_proj.weight"
    assert params.keys() - teacher.params.keys() == {name} and not params[name].any()
    example = base.example({}, (), batch, NOW.key)
    z, t = jax.random.normal(NOW.key, (4, 8, 8, 1)), jnp.array([1000.0, 700.0, 400.0, 10.0])
    for scale in (1.0, 5.5):
        said = ask(student.net, params, z, t, example.cond, jnp.full(4, scale))
        want = teacher.net(teacher.params, z, t, **example.cond)
        np.testing.assert_array_equal(said, want)
    # At scale 1 there is nothing to learn; at others there is, and the scale's own weights learn it
    still = dataclasses.replace(student, guidance=(1.0, 1.0))
    assert jax.jit(still.loss)(params, still.aux, batch, NOW)[0] < 1e-10
    learn = jax.jit(jax.value_and_grad(lambda p: student.loss(p, student.aux, batch, NOW)[0]))
    loss, grads = learn(params)
    assert loss > 1e-3 and jnp.abs(grads[name]).max() > 0


def test_an_eps_teacher_becomes_a_v_student(pixels):
    """Whose network says the same in another form is without loss."""
    base, teacher, batch = pixels
    eps = dataclasses.replace(teacher.schedule, prediction_type="epsilon")

    class Turned(Net):
        """v of a network that says eps: alpha eps - sigma x, x = (z - sigma eps) / alpha."""

        def __init__(self):
            self.config = base.net.config

        def __call__(self, params, z, t, dropout_key=None, **told):
            said = teacher.net(params, z, t, **told)
            alpha, sigma = (a[:, None, None, None] for a in base.schedule.alpha_sigma(t))
            return alpha * said - sigma * (z - sigma * said) / jnp.maximum(alpha, 1e-3)

    turned = dataclasses.replace(base)
    turned.net = Turned()
    student = Guided(turned, dataclasses.replace(teacher, schedule=eps), 4)
    assert student.loss(teacher.params, student.aux, batch, NOW)[0] < 1e-6
    straight = Guided(base, dataclasses.replace(teacher, schedule=eps), 4)
    assert straight.loss(teacher.params, straight.aux, batch, NOW)[0] > 1e-2


def test_consistency_losses(pixels):
    """Both against their formulas, on what the network was asked for."""
    base, teacher, batch = pixels
    schedule = dataclasses.replace(
        jumps.student_schedule(COSINE, class_name="LCMScheduler"), original_inference_steps=10
    )
    base = scaled(dataclasses.replace(base, schedule=schedule))
    student = Consistency(base, teacher, 4, RANGE)
    params = student.init(NOW.key)
    ema = {name: value * 1.01 for name, value in params.items()}
    asked = []
    whole = student._end

    def spy(net, params, z, level, *rest):
        asked.append((level.t, z, whole(net, params, z, level, *rest)))
        return asked[-1][2]

    student._end = spy
    found = {}
    for kind in ("huber", "l2"):
        student.loss_type = kind
        asked.clear()
        found[kind] = student.loss(params, student.aux, batch, NOW._replace(ema=ema))[0]
    (near_t, _, goal), (t, _, said) = asked
    np.testing.assert_allclose(t - near_t, 100, rtol=1e-6)
    d = np.asarray(said - goal, np.float64)
    np.testing.assert_allclose(found["l2"], np.mean(d**2), rtol=1e-5)
    np.testing.assert_allclose(found["huber"], np.mean(np.sqrt(d**2 + 1e-6) - 1e-3), rtol=1e-5)
    zero = jumps.Level(*(jnp.full(4, value) for value in (0.0, 1.0, 0.0)))
    example = base.example({}, (), batch, NOW.key)
    z = jax.random.normal(NOW.key, (4, 8, 8, 1))
    end = whole(student.net, params, z, zero, example, jnp.full(4, 3.0))
    np.testing.assert_array_equal(end, z)


# --- Of Stable Diffusion's kind, and through the loop -------------------------------------------

KINDS = {
    "progressive": lambda base, teacher: Progressive(base, teacher, 2, RANGE),
    "encoder": lambda base, teacher: Progressive(base, teacher, 2, RANGE, encoder=True),
    "guided": lambda base, teacher: Guided(base, teacher, 4, RANGE),
    "consistency": lambda base, teacher: Consistency(base, teacher, 4, RANGE),
}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return tiny.tokenizer(tmp_path_factory.mktemp("tokenizer"))


def latents(words, xl):
    """As `pixels`, of a latent model; the student is told the guidance scale."""
    teacher = tiny.text_to_image(words, xl=xl)
    params = tiny.parameters(teacher.net)
    unet = dataclasses.replace(teacher.unet, time_cond_proj_dim=8)
    schedule = jumps.student_schedule(teacher.schedule, class_name="LCMScheduler")
    base = dataclasses.replace(teacher, unet=unet, schedule=schedule, initial=params)
    ids = teacher.towers.tokenize(tiny.CAPTIONS * 2)
    batch = {"image": jnp.asarray(tiny.pictures(8)), "input_ids": jnp.asarray(ids)}
    return base, Teacher(teacher.net, params, teacher.schedule), batch


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "xl", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["sd", "xl"]
)
def test_every_student_of_every_model(words, xl, kind):
    base, teacher, batch = latents(words, xl)
    student = KINDS[kind](base, teacher)
    params = student.init(NOW.key)
    loss, metrics = jax.jit(student.loss)(params, student.aux, batch, NOW._replace(ema=params))
    assert loss > 0 and sum(metrics.values()) == pytest.approx(4 * float(loss), rel=1e-5)


@pytest.mark.slow
def test_from_cached_latents_in_bfloat16_and_in_parts(words):
    """What `encode` writes serves students as pictures do, whatever saves memory on the way."""
    base, teacher, batch = latents(words, xl=False)
    mean, logvar = base.towers.moments(base.towers.params["vae"], batch["image"])
    told = base.towers.states(base.towers.params, batch["input_ids"])
    cached = dataclasses.replace(base, cached=True)
    student = Progressive(cached, teacher, 2, RANGE)
    kept = {"mean": mean, "logvar": logvar, **told}
    params = student.init(NOW.key)
    loss = {"cached": student.loss(params, student.aux, kept, NOW)[0]}
    pictures = Progressive(base, teacher, 2, RANGE)
    loss["pictures"] = pictures.loss(params, pictures.aux, batch, NOW)[0]
    np.testing.assert_allclose(loss["cached"], loss["pictures"], rtol=1e-5)

    half = {n: p.astype(jnp.bfloat16) if p.ndim > 1 else p for n, p in teacher.params.items()}
    low = Progressive(cached, dataclasses.replace(teacher, params=half), 2, RANGE, dtype="bfloat16")
    options = Options(2, batch_size=8, accumulate=2, remat="full", dtype="bfloat16", ema_decay=0.0)
    optimizer = make_optimizer(options)
    state, aux = init_state(low, optimizer, options)
    step = jax.jit(make_step(low, optimizer, options))
    # jax's attention adds bfloat16's scores up in float32, and is traced again for the gradient of
    # what is computed twice: outside of the exception that `nn.attention` makes for it
    with jax.numpy_dtype_promotion("standard"):
        new, metrics = step(state, aux, kept)
    assert metrics["finite"] == 1 and metrics["loss"] > 0
    assert all(value.dtype == jnp.float32 for value in new.params.values())


def test_a_student_is_exported_and_sampled(words, tmp_path):
    base, teacher, _ = latents(words, xl=False)
    student = Guided(base, teacher, 2, RANGE)
    params = tiny.parameters(student.net, seed=1)
    student.export(params, tmp_path / "model")
    pipe = jaxsd.load(tmp_path / "model")
    assert pipe.guidance_embedded and pipe.default_sampler == "lcm"
    for name, value in params.items():
        np.testing.assert_array_equal(pipe.params["unet"][name], value, name)
    assert pipe("a red seven", 0, steps=2, guidance_scale=3.0)[0].size == (8, 8)
    assert student.preview(params).shape == (9 - 1, 4 * 9 - 1, 3)


def test_what_does_not_go_together_is_refused(pixels):
    base, teacher, _ = pixels
    with pytest.raises(JaxsdError, match="give the range of scales"):
        Progressive(scaled(base), teacher, 4)
    told = Teacher(scaled(base).net, {}, base.schedule)
    with pytest.raises(JaxsdError, match="is told it, too"):
        Progressive(base, told, 4, RANGE)
    with pytest.raises(JaxsdError, match="from 1 on and rising, not 3 to 2"):
        Progressive(base, teacher, 4, (3.0, 2.0))
    with pytest.raises(JaxsdError, match="loss_type is one of huber, l2"):
        Consistency(base, teacher, 4, loss_type="l1")
