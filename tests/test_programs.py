"""Programs made ahead of time: the same pictures, nothing traced, and refused where they differ."""

import contextlib
import dataclasses
import gc
import json
import os
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax import export
from PIL import Image
from refusals import refused

from jaxsd import ahead, facts, kernels, nn, previews, programs, sharding
from jaxsd.cli import run_command
from jaxsd.cli.sample import Options
from jaxsd.cli.sampling import model
from jaxsd.compilation_cache import prune, use_compilation_cache
from jaxsd.components import Component, make_net
from jaxsd.pipeline import Pipeline
from jaxsd.weights.lora import Layer, LoRA

PROMPTS = ["a red seven", "nine"]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return tiny.tokenizer(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def folder(words, tmp_path_factory):
    """The programs of two pictures with guidance, from pictures too."""
    folder = tmp_path_factory.mktemp("compiled")
    ahead.compile_ahead(tiny.pipeline(words), folder, batch_size=2, image=True)
    return folder


def ready(words, folder, **changes):
    """A pipeline that has the programs of a folder."""
    pipe = tiny.pipeline(words, **changes)
    pipe.programs.read(folder, pipe.compiled_for)
    return pipe


def traced(pipe) -> list[int]:
    """How many kinds of arguments the parts of sampling know, of this model and others."""
    parts = (pipe._compiled_denoise, pipe._compiled_decode, pipe._compiled_encode)
    return [part.traced._cache_size() for part in (*parts, pipe._text._compiled)]


def test_pictures_are_the_same_and_nothing_is_traced(words, folder, untraced):
    white = np.full((8, 8, 3), 255, np.uint8)
    asked = ({"steps": 3}, {"steps": 5, "image": white}, {"guidance_scale": 2.0})
    drawn = []
    for pipe, count in ((ready(words, folder), 0), (tiny.pipeline(words), 1)):
        latents = [pipe.sample(PROMPTS, [5, 6], **options) for options in asked]
        drawn.append([*latents, pipe.decode_array(latents[-1])])
        assert traced(pipe) == [count] * 4
    for pair in zip(*drawn, strict=True):
        np.testing.assert_array_equal(*pair)


def test_models_of_the_same_networks_share_what_was_traced(words, untraced):
    def draw(pipe: Pipeline) -> np.ndarray:
        image = np.full((8, 8, 3), 255, np.uint8)
        return pipe.decode_pixels(pipe.sample(PROMPTS, [5, 6], steps=2, image=image))

    one, two = (tiny.pipeline(words) for _ in range(2))
    others = {name: value + np.float32(0.1) for name, value in two.params["unet"].items()}
    two.components["unet"] = Component(two.unet, others)
    with _traces() as first:
        drawn = draw(one)
    with _traces() as second:
        assert not np.array_equal(drawn, draw(two))
    assert first and not second and traced(one) == [1, 1, 1, 1]
    # Other networks do not: what was traced for these would be wrong there
    two.components["unet"] = one.components["unet"]
    config = dataclasses.replace(two.vae.config, scaling_factor=0.5)
    two.components["vae"] = Component(make_net(config), one.params["vae"])
    assert not np.array_equal(drawn, draw(two)) and traced(one) == [1, 2, 2, 1]


def test_what_is_traced_elsewhere_is_not_shared(words, untraced):
    pipe = tiny.pipeline(words)
    latents = pipe.noise([5, 6])
    part = pipe._compiled_decode
    here = pipe.decode_pixels(latents)
    for context in (kernels.compiling_for("any"), nn.rematerialise("full")):
        with context:
            np.testing.assert_allclose(pipe.decode_pixels(latents), here, atol=1e-5)
            assert part.traced._cache_size() == 1
    for devices in (jax.devices()[:2], jax.devices()[2:4]):
        pipe.spread(sharding.make_mesh(devices=devices))
        with _traces() as found:
            np.testing.assert_allclose(pipe.decode_pixels(pipe.noise([5, 6])), here, atol=1e-5)
        assert "_decode" in found


def test_a_model_that_nobody_holds_is_gone_at_once(words):
    """With its weights: trainings make one for each preview."""
    pipe = tiny.pipeline(words)
    pipe(PROMPTS, [5, 6], steps=2)
    parts = [pipe, *(array for params in pipe.params.values() for array in params.values())]
    gone = [weakref.ref(part) for part in parts]
    gc.disable()
    try:
        del pipe, parts
        assert not any(ref() is not None for ref in gone)
    finally:
        gc.enable()


@contextlib.contextmanager
def _traces() -> Iterator[list[str]]:
    """What is traced inside."""
    found = []

    def listen(event: str, _: float, **known) -> None:
        if event == "/jax/core/compile/jaxpr_trace_duration":
            found.append(str(known.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_a_callback_runs_the_same_programs(words, folder):
    seen = []
    ready(words, folder)(PROMPTS, [5, 6], steps=3, callback=lambda i, t, x: seen.append(i))
    assert seen == [0, 1, 2]


def test_parts_within_a_caller_s_program(words):
    """Which alone may have compiler options; here constants are traced, too."""
    pipe = tiny.pipeline(words)
    cond, uncond = pipe.encode(PROMPTS[:1]), pipe.encode([None])
    x = pipe.noise([5])

    def predict(x):
        return pipe.predict(x, 500.0, cond, uncond, 4.0)

    np.testing.assert_allclose(jax.jit(predict)(x), predict(x), atol=1e-5)
    assert np.isfinite(jax.grad(lambda x: predict(x).sum())(x)).all()
    drawn = jax.jit(lambda x: pipe.denoise(x, cond, uncond, steps=2))(x)
    np.testing.assert_allclose(drawn, pipe.denoise(x, cond, uncond, steps=2), atol=1e-5)
    added = jax.jit(lambda y: y + pipe.start_decoding(x))(jnp.float32(0))
    np.testing.assert_allclose(added, pipe.start_decoding(x), atol=1e-5)


def test_programs_of_a_folder_within_a_caller_s_program(words, folder):
    pipe = ready(words, folder)
    cond, uncond = pipe.encode(PROMPTS), pipe.encode([None, None])
    x = pipe.noise([5, 6])
    drawn = jax.jit(lambda x: pipe.denoise(x, cond, uncond, steps=2))(x)
    np.testing.assert_allclose(drawn, pipe.denoise(x, cond, uncond, steps=2), atol=1e-5)


def test_compiler_options_are_asked_for_at_the_first_call():
    asked = []

    def options() -> dict:
        asked.append(kernels.platform())
        return {}

    part = programs.Programs().jit("part", lambda x: x + 1, (), options)
    assert not asked
    with kernels.compiling_for("any"):
        part(np.float32(1))
    part(np.float32(2))
    part(np.float32(3))
    assert asked == ["any", kernels.platform()]


def test_a_linear_preview_beside_programs(words, folder):
    """Which is fitted to more pictures than the programs are of."""
    pair = [tiny.pipeline(words), ready(words, folder)]
    x = pair[0].noise([5, 6])
    usual, compiled = (previews.previewer(pipe, "linear")(x) for pipe in pair)
    np.testing.assert_array_equal(usual, compiled)


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_facts_name_the_card(platform, monkeypatch):
    assert "device" not in facts.facts({})
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    assert facts.facts({})["device"] == jax.devices()[0].device_kind


def test_no_chunks_are_refused(words, tmp_path):
    pipe = tiny.pipeline(words)
    for chunks in (0, -1):
        assert "chunks" in refused(pipe, PROMPTS, [5, 6], chunks=chunks)
        assert "chunks" in refused(ahead.compile_ahead, pipe, tmp_path, chunks=chunks)


@pytest.fixture
def all_kept():
    """Programs are kept for other processes however little time they take to compile."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, 0)
    jax.clear_caches()
    yield
    jax.config.update(name, before)


def test_a_second_start_compiles_nothing(words, folder, all_kept):
    compiled = []

    def listen(event: str, **_) -> None:
        if event == "/jax/compilation_cache/cache_misses":
            compiled.append(event)

    ready(words, folder)(PROMPTS, [5, 6], steps=3)
    jax.clear_caches()  # as another process would find it
    jax.monitoring.register_event_listener(listen)
    try:
        ready(words, folder)(PROMPTS, [7, 8], steps=4)
    finally:
        jax.monitoring.unregister_event_listener(listen)
    assert not compiled


def test_what_was_not_compiled_is_refused_with_what_differs(words, folder):
    pipe = ready(words, folder)
    said = refused(pipe, PROMPTS[:1], [5])
    parts = ("batch_size 2", "height 8", "quantize no", "shortcuts no", "jaxsd compile")
    for part in (*parts, "key<fry>[2]", "key<fry>[1]"):
        assert part in said, said
    assert "euler" in refused(pipe, PROMPTS, [5, 6], sampler="euler")
    assert "[8, 8, 4]" in refused(pipe, PROMPTS, [5, 6], height=16, width=16)
    assert "inputs.conditions" in refused(pipe, PROMPTS, [5, 6], guidance_scale=1.0)
    pipe.schedule = dataclasses.replace(pipe.schedule, prediction_type="epsilon")
    assert "prediction_type" in refused(pipe, PROMPTS, [5, 6])
    pipe = ready(words, folder)
    white, mask = np.full((8, 8, 3), 255, np.uint8), np.full((8, 8), 255, np.uint8)
    assert "inputs.blend" in refused(pipe, PROMPTS, [5, 6], image=white, mask=mask)


def test_a_part_that_was_not_compiled_is_named(words, tmp_path):
    ahead.compile_ahead(tiny.pipeline(words), tmp_path, batch_size=1)
    white = np.full((8, 8, 3), 255, np.uint8)
    assert "encode" in refused(ready(words, tmp_path), PROMPTS[:1], [5], image=white)


def test_another_model_dtype_or_machine_is_refused(words, folder, monkeypatch):
    pipe = tiny.pipeline(words)
    config = dataclasses.replace(tiny.LATENT_UNET, norm_eps=1e-3)
    pipe.components["unet"] = Component(make_net(config), pipe.params["unet"])
    said = refused(pipe.programs.read, folder, pipe.compiled_for)
    assert "unet.norm_eps 1e-05" in said and "0.001" in said and "jaxsd compile" in said

    pipe = tiny.pipeline(words)
    here = pipe.compiled_for
    for name, other in (("jaxlib", "0.0.1"), ("platform", "tpu"), ("jax", "9.9")):
        said = refused(pipe.programs.read, folder, {**here, name: other})
        assert f"{name} {here[name]}" in said and other in said

    half = ready(words, folder)
    params = {n: p.astype(jnp.bfloat16) for n, p in half.params["unet"].items()}
    half.components["unet"] = dataclasses.replace(half.components["unet"], params=params)
    assert "float32[" in (said := refused(half, PROMPTS, [5, 6])) and "bfloat16[" in said


def test_the_scale_of_a_lora_is_free_and_its_shape_is_not(words, tmp_path):
    name = next(n for n in tiny.pipeline(words).unet.shapes if n.endswith("to_q.weight"))

    def taught(rank: int, folder=None):
        pipe = tiny.pipeline(words) if folder is None else ready(words, folder)
        shape = pipe.unet.shapes[name]
        rng = np.random.default_rng(0)
        down, up = rng.normal(size=(rank, shape[1])), rng.normal(size=(shape[0], rank))
        layer = Layer(np.float32(down), np.float32(up), 1.0)
        pipe.add_lora(LoRA({"unet": {name: layer}}), 0.5)
        return pipe

    ahead.compile_ahead(taught(2), tmp_path, batch_size=2)
    pipe, usual = taught(2, tmp_path), taught(2)
    pipe.lora_scales = usual.lora_scales = [0.25]
    pair = [each.sample(PROMPTS, [5, 6], steps=2) for each in (pipe, usual)]
    np.testing.assert_array_equal(*pair)
    watched = pipe.sample(PROMPTS, [5, 6], steps=2, callback=lambda i, t, x: None)
    np.testing.assert_allclose(watched, pair[0], atol=1e-5)
    assert "inputs.loras" in refused(taught(3, tmp_path), PROMPTS, [5, 6], steps=2)


@pytest.mark.slow
def test_weights_in_pieces_on_several_devices(words, tmp_path):
    def spread(devices: int):
        pipe = tiny.pipeline(words)
        mesh = sharding.make_mesh(fsdp=devices, devices=jax.devices()[:devices])
        for name, part in pipe.components.items():
            placement = sharding.shardings(part.params, mesh, smallest=1)
            params = sharding.place(part.params, placement)
            pipe.components[name] = dataclasses.replace(part, params=params)
        return pipe

    ahead.compile_ahead(spread(2), tmp_path, batch_size=2)
    pipe, usual = spread(2), spread(2)
    pipe.programs.read(tmp_path, pipe.compiled_for)
    pair = [each.sample(PROMPTS, [5, 6], steps=2) for each in (pipe, usual)]
    np.testing.assert_array_equal(*pair)
    pipe = spread(4)
    pipe.programs.read(tmp_path, pipe.compiled_for)
    assert "{'fsdp': 4}" in refused(pipe, PROMPTS, [5, 6], steps=2)


@pytest.mark.parametrize("harm", ["cut", "gone", "other", "no list", "half a list", "odd list"])
def test_a_damaged_folder_is_refused(words, folder, tmp_path, harm):
    pipe = tiny.pipeline(words)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    file = next(tmp_path.glob("denoise-*"))
    if harm == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif harm == "gone":
        file.unlink()
    elif harm == "other":
        file.write_bytes(next(tmp_path.glob("noise-*")).read_bytes())
    elif harm == "no list":
        (tmp_path / programs.FILE).unlink()
    else:
        listed = json.loads((tmp_path / programs.FILE).read_text())
        if harm == "half a list":
            del listed["programs"][1]["static"]
        else:
            listed["programs"][1] |= {"static": [1], "inputs": {"x": 3}}
        (tmp_path / programs.FILE).write_text(json.dumps(listed))
    said = refused(pipe.programs.read, tmp_path, pipe.compiled_for)
    assert (programs.FILE if "list" in harm else "denoise-") in said


def test_a_program_that_calls_into_the_process_is_refused(words, tmp_path):
    """As somebody might write one who wants other people's machines to run his code."""

    def ask(x):
        return jax.ffi.ffi_call("xla_ffi_python_cpu_callback", x)(x, index=np.uint64(0))

    checks = [export.DisabledSafetyCheck.custom_call("xla_ffi_python_cpu_callback")]
    x = jax.ShapeDtypeStruct((2,), jnp.float32)
    data = export.export(jax.jit(ask), disabled_checks=checks)(x).serialize()
    said = refused(programs.Program, "decode", {}, {}, bytes(data))
    assert "xla_ffi_python_cpu_callback" in said
    assert "no program" in refused(programs.Program, "decode", {}, {}, b"\x80\x04pickle")


def test_what_others_keep_in_the_folder_stays(tmp_path):
    x = jax.ShapeDtypeStruct((2,), jnp.float32)
    data = [bytes(export.export(jax.jit(f))(x).serialize()) for f in (jnp.sin, jnp.cos)]
    sin, cos = (programs.Program(name, {}, {}, each) for name, each in zip("sc", data, strict=True))
    (tmp_path / "mine.stablehlo").write_bytes(b"mine")
    for program in (sin, cos):
        programs.save([program], tmp_path, {}, {})
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"mine.stablehlo", cos.file, programs.FILE}


def test_writing_leaves_the_old_folder_or_the_new_one(words, tmp_path, monkeypatch):
    pipe = tiny.pipeline(words)
    ahead.compile_ahead(pipe, tmp_path, batch_size=1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(programs, "write_json", full)
        with pytest.raises(OSError):
            ahead.compile_ahead(pipe, tmp_path, batch_size=2)
    assert all((tmp_path / name).read_bytes() == data for name, data in before.items())
    ready(words, tmp_path)(PROMPTS[:1], [5], steps=2)
    ahead.compile_ahead(pipe, tmp_path, batch_size=2)
    listed = json.loads((tmp_path / programs.FILE).read_text())["programs"]
    assert {path.name for path in tmp_path.glob("*.stablehlo")} == {row["file"] for row in listed}


def test_compiled_on_the_command_line(tmp_path, capsys):
    which = ("--model", "digits-ddpm")
    run_command(
        "compile", [*which[1:], "--batch-size", "2", "--out", str(tmp_path / "f"), "--json"]
    )
    made = json.loads(capsys.readouterr().out)
    assert len(made["programs"]) == 3  # of a pixel model: noise, denoise, decode
    wanted = ["7", *which, "--steps", "3", "--batch-size", "2", "--json", "--out"]
    paths = []
    for options in ([], ["--compiled", str(tmp_path / "f")]):
        run_command("sample", [*wanted, str(tmp_path / f"out{len(options)}"), *options])
        paths += json.loads(capsys.readouterr().out)["images"]
    one, other = (Path(path).read_bytes() for path in paths)
    assert one == other
    with pytest.raises(SystemExit):
        run_command(
            "sample", ["7", *which, "--compiled", str(tmp_path / "f"), "--out", str(tmp_path)]
        )
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and "batch_size 2" in said


@pytest.mark.slow
def test_options_of_sampling_are_options_of_compile(words, tmp_path, capsys):
    """Eight bits, what is left out to be faster, and with them a preview."""
    tiny.pipeline(words).save(tmp_path / "model")
    told = [str(tmp_path / "model"), "--batch-size", "1", "--quantize", "int8"]
    told += ["--guidance-interval", "0", "2", "--cache-every", "2"]
    folder = str(tmp_path / "f")
    run_command("compile", [*told, "--out", folder])
    wanted = ["nine", "--model", *told, "--steps", "3", "--json", "--preview-every", "2"]
    found = []
    for options in ([], ["--compiled", folder, "--preview-with", "linear"]):
        capsys.readouterr()
        run_command("sample", [*wanted, "--out", str(tmp_path / f"out{len(options)}"), *options])
        paths = json.loads(capsys.readouterr().out)["images"]
        found.append(Image.open(paths[0]).tobytes())
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "command, options, said",
    [
        ("sample", ["seven", "--compiled", "f", "--refiner", "r"], "refiner"),
        ("sample", ["--compiled", "f", "--prompts-file", "{file}"], "8 devices"),
        ("sample", ["seven", "--out", "{file}/x"], "cannot write to"),
        ("compile", ["m", "--out", "{file}/x"], "cannot write to"),
    ],
)
def test_refused_before_a_model_is_opened(tmp_path, monkeypatch, capsys, command, options, said):
    monkeypatch.setattr("jaxsd.pipeline.load", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").write_text("a prompt\n")
    with pytest.raises(SystemExit):
        run_command(command, [text.format(file=tmp_path / "file.txt") for text in options])
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error


def test_a_refiner_is_in_eight_bits_too(words, monkeypatch):
    def load(name, quantize=None, **_):
        pipe = tiny.pipeline(words)
        if quantize:
            pipe.quantize(quantize)
        return pipe

    monkeypatch.setattr("jaxsd.pipeline.load", load)
    options = Options(prompts=("nine",), model="base", refiner="refiner", quantize="int8")
    session = model.load(options)
    assert session.pipe.quantised and session.refiner.quantised


# --- The cache of compiled programs -----------------------------------------------------------


def test_what_was_not_read_for_longest_goes_first(tmp_path):
    for age, name in enumerate("abcd"):
        (tmp_path / name).write_bytes(b"x" * 10)
        os.utime(tmp_path / name, (1000 - age, 500))
    prune(tmp_path, 25)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    prune(tmp_path / "missing", 25)


def test_the_cache_is_the_user_s_unless_he_says_where(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = (
        jax.config.jax_compilation_cache_dir,
        jax.config.jax_persistent_cache_min_compile_time_secs,
    )
    try:
        use_compilation_cache()  # tests say where
        assert jax.config.jax_compilation_cache_dir == before[0]
        monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
        use_compilation_cache()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "jaxsd" / "programs")
        use_compilation_cache(tmp_path / "mine")
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine")
    finally:
        jax.config.update("jax_compilation_cache_dir", before[0])
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before[1])
