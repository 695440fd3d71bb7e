"""Tables and files of schedules against diffusers': noise levels, timesteps, JSON."""

import dataclasses

import diffusers
import numpy as np
import pytest
import torch
from scheduler_reference import CLASSES, DRAWING, THEIRS, reference

from jaxsd import weights
from jaxsd.diffusion.samplers import SAMPLERS, default_sampler, make_steps
from jaxsd.diffusion.schedule import Schedule
from jaxsd.diffusion.schedulers import SCHEDULER_CLASSES
from jaxsd.errors import JaxsdError
from jaxsd.families import FAMILIES

# Torch's tensors, as diffusers turns them into arrays and numbers, are not quite up to NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


SPACINGS = ("leading", "trailing", "linspace")
SD = FAMILIES["sd1"].schedule


@pytest.fixture(autouse=True, scope="module")
def quiet():
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("count", [1000, 1100, 37])
def test_noise_levels_are_the_same_to_the_last_bit(kind, count):
    options = {"beta_schedule": kind, "num_train_timesteps": count}
    theirs = diffusers.DDIMScheduler(**options).alphas_cumprod.numpy()
    np.testing.assert_array_equal(Schedule(**options).alphas_cumprod, theirs)


def test_trained_betas():
    betas = tuple(np.linspace(0.001, 0.03, 50) ** 1.3)
    options = {"trained_betas": betas, "num_train_timesteps": 50}
    theirs = diffusers.DDIMScheduler(**options).alphas_cumprod.numpy()
    np.testing.assert_array_equal(Schedule(**options).alphas_cumprod, theirs)


def test_sigmoid_betas():
    """Sigmoids and roots differ in the last bit between NumPy and torch's vector units."""
    theirs = diffusers.DDPMScheduler(beta_schedule="sigmoid").alphas_cumprod.numpy()
    ours = Schedule(beta_schedule="sigmoid").alphas_cumprod
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_noise_levels_of_zero_terminal_snr(kind):
    options = {"beta_schedule": kind, "rescale_betas_zero_snr": True}
    theirs = diffusers.DDIMScheduler(**options).alphas_cumprod.numpy()
    ours = Schedule(**options).alphas_cumprod
    # Torch's roots may be one bit off; that of a thousand factors is sqrt(1000) 2^-24 = 2e-6.
    np.testing.assert_allclose(np.sqrt(ours), np.sqrt(theirs), atol=2e-6)
    assert ours[-1] == theirs[-1] == 0


@pytest.mark.parametrize("name", [name for name in THEIRS if "_3m" not in name])
@pytest.mark.parametrize("offset", [0, 1])
def test_timesteps(name, offset):
    for spacing in SPACINGS:
        schedule = dataclasses.replace(SD, timestep_spacing=spacing, steps_offset=offset)
        # With 999 steps and more their leading timesteps, offset by 1, leave the table.
        for count in (*range(1, 31), 50, 99, 250, 333, 500, 998):
            if count > 50 and name.startswith(("lcm", "tcd", "dpm2", "heun")):
                continue  # students have 50 timesteps; the others take seconds for so many
            steps, theirs = make_steps(schedule, name, count), reference(name, schedule, count)
            times = theirs.timesteps.numpy()
            if name in ("heun", "dpm2", "dpm2_ancestral"):
                seen = np.stack([steps.t[:count], steps.mid_t[:count]], 1).ravel()[:-1]
                # the midpoints' come from an interpolation in float32
                np.testing.assert_allclose(seen, times, atol=1e-4 if name == "heun" else 0.01)
            else:
                # for 998 their trailing arange rounds its way to one timestep more, at -1
                seen = steps.t[: int(steps.count)]
                np.testing.assert_allclose(seen, times[: len(seen)], rtol=1e-6)
            ratio = float(theirs.sigmas[0]) if hasattr(theirs, "sigmas") else 0.0
            by_sigma = float(theirs.init_noise_sigma) != 1
            z_scale = theirs.init_noise_sigma / ((1 + ratio**2) ** 0.5 if by_sigma else 1)
            np.testing.assert_allclose(steps.init_scale, z_scale, rtol=1e-6)


# --- Files ------------------------------------------------------------------------------------


def test_our_table_of_their_classes():
    """Every class has the switches and defaults that diffusers gives it."""
    for name, known in SCHEDULER_CLASSES.items():
        theirs = dict(getattr(diffusers, name)().config)
        ours = {key: theirs.get(key) for key in known.defaults}
        assert known.defaults == ours, name
        beyond = set(theirs) - set(known.defaults) - {"_use_default_values"}
        assert beyond <= set(Schedule.NEUTRAL) | set(Schedule.IGNORED), (name, beyond)


@pytest.mark.parametrize("name", SCHEDULER_CLASSES)
def test_their_files_open(name, tmp_path):
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    theirs = getattr(diffusers, name)(**config)
    theirs.save_pretrained(tmp_path)
    values = weights.read_json(tmp_path / "scheduler_config.json")
    schedule = Schedule.from_json(values)
    assert schedule.class_name == name
    assert SAMPLERS[default_sampler(schedule)].scheduler == name
    for key in SCHEDULER_CLASSES[name].defaults:
        assert getattr(schedule, key) == values[key], key
    weights.write_json(tmp_path / "scheduler_config.json", schedule.to_json())
    again = getattr(diffusers, name).from_pretrained(tmp_path)
    for key, value in again.config.items():
        if key in values:
            assert value == values[key], key
    assert torch.equal(again.alphas_cumprod, theirs.alphas_cumprod)


@pytest.mark.parametrize("name", ["DEISMultistepScheduler", "EDMEulerScheduler"])
def test_other_classes_are_refused(name, tmp_path):
    getattr(diffusers, name)().save_pretrained(tmp_path)
    values = weights.read_json(tmp_path / "scheduler_config.json")
    with pytest.raises(JaxsdError, match=f"{name}|deis|unsupported"):
        Schedule.from_json(values)


def test_their_noise_is_drawn_where_ours_is(monkeypatch):
    """No scheduler draws noise that these tests would not have replaced."""
    for place in DRAWING:
        monkeypatch.setattr(place, None)  # there is one to replace
    drawing = {place.split("scheduling_")[1].split(".")[0] for place in DRAWING}
    import inspect

    for kind in set(CLASSES.values()):
        module = inspect.getmodule(kind)
        if "randn_tensor(" in inspect.getsource(kind) and "s_churn" not in inspect.getsource(kind):
            assert module.__name__.split("scheduling_")[1] in drawing, kind
