"""The page: what to draw on one side, the pictures as they come on the other (Gradio)."""

import asyncio
import logging
import os
import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # it is read at the import

import gradio as gr
from fastapi import FastAPI
from gradio.themes import Default
from PIL import Image

from jaxsd.errors import JaxsdError
from jaxsd.seeds import SEEDS
from jaxsd.serving import uploads
from jaxsd.serving.limits import Limits
from jaxsd.serving.models import Served
from jaxsd.serving.panels import EMPTY, Panel, escape, together
from jaxsd.serving.service import Service

logger = logging.getLogger(__name__)
ALONE = "nothing"
CSS = Path(__file__).with_name("page.css")
FONTS = ["system-ui", "sans-serif"]  # those of the reader's machine: none is fetched
BEAT = 1.0  # seconds: Gradio sees that a reader has gone when something is yielded
KEPT = 600  # seconds that an upload stays in Gradio's temporary folder


def mount(app: FastAPI, service: Service) -> FastAPI:
    """The application with the page at its root."""
    theme = Default(primary_hue="indigo", font=FONTS, font_mono=["ui-monospace", "monospace"]).set(
        body_text_color_subdued="*neutral_500",  # what it has else is hard to read on white
        block_info_text_color="*neutral_500",
        block_info_text_color_dark="*neutral_400",
    )
    return gr.mount_gradio_app(
        app,
        make_page(service),
        path="/",
        theme=theme,
        css_paths=CSS,
        footer_links=[],
        run_history=False,
        mcp_server=False,
        enable_monitoring=False,
        pwa=False,
        ssr_mode=False,
        show_error=False,
        max_file_size=service.limits.upload_bytes,
    )


def make_page(service: Service) -> gr.Blocks:
    first, limits = service.first, service.limits
    with gr.Blocks(title="jaxsd", analytics_enabled=False, delete_cache=(KEPT, KEPT)) as page:
        gr.HTML(f'<h1 class="jaxsd-title">jaxsd<small>{escape(first.name)}</small></h1>')
        with gr.Row(elem_id="jaxsd-page"):  # three parts, which page.css places
            with gr.Column(elem_id="jaxsd-ask", min_width=0):
                prompt, draw, stop = _prompt(first, limits)
            with gr.Column(elem_id="jaxsd-shown", min_width=0):
                shown = gr.HTML(EMPTY, elem_id="pictures")
            with gr.Column(elem_id="jaxsd-settings", min_width=0):
                settings, new_seed = _settings(service)
        inputs = {"prompt": prompt} | settings
        names = [*inputs]

        async def run(*values: Any) -> AsyncIterator[Any]:
            async for seen in follow(service, dict(zip(names, values, strict=True))):
                yield seen

        private: Any = {"api_visibility": "private", "show_progress": "hidden"}
        drawing = gr.on(
            [draw.click, prompt.submit],
            run,
            list(inputs.values()),
            shown,
            concurrency_limit=None,  # the worker's queue is the one that counts
            **private,
        )
        stop.click(None, None, None, cancels=[drawing])
        new_seed.click(lambda: secrets.randbelow(SEEDS), None, inputs["seed"], **private)
    page.queue(max_size=4 * limits.waiting)
    return page


def _prompt(first: Served, limits: Limits) -> tuple[gr.Textbox, gr.Button, gr.Button]:
    words = "a red seven on a white background" if first.pipe.tokenizers else "7"
    prompt = gr.Textbox(
        words,
        label="Prompt",
        lines=2,
        max_lines=6,
        elem_id="prompt",
        max_length=limits.prompt_length,
        visible=first.pipe.takes_prompts,
    )
    with gr.Row():
        draw = gr.Button("Draw", variant="primary", elem_id="draw", min_width=100)
        stop = gr.Button("Stop", elem_id="stop", min_width=80)
    return prompt, draw, stop


def _settings(service: Service) -> tuple[dict[str, Any], gr.Button]:
    """The rest of the form, by the names of `Served.request`'s arguments; and "New seed"."""
    first, limits, pipe = service.first, service.limits, service.first.pipe
    students = [model for model in service.models.values() if model is not first]
    nearest = max(students, key=lambda model: model.pipe.default_steps, default=None)
    other = gr.Dropdown(
        [ALONE, *(model.name for model in students)],
        label="Beside it",
        value=nearest.name if nearest else ALONE,
        visible=bool(students),
        info="A student, with the same prompt and seed",
        elem_id="beside",
    )
    negative = gr.Textbox(
        label="Negative prompt",
        info="What to stay away from",
        max_length=limits.prompt_length,
        elem_id="negative_prompt",
        visible=first.takes_negative_prompts,
    )
    with gr.Row(equal_height=False, elem_id="jaxsd-seed"):
        seed = gr.Number(
            0,
            label="Seed",
            precision=0,
            minimum=0,
            maximum=SEEDS - 1,
            elem_id="seed",
            min_width=140,
        )
        new_seed = gr.Button("New seed", elem_id="new_seed", min_width=100, size="sm")
    steps = gr.Slider(1, limits.steps, pipe.default_steps, step=1, label="Steps", elem_id="steps")
    scale = gr.Slider(
        0,
        20,
        pipe.default_guidance_scale,
        step=0.5,
        label="Guidance scale",
        info="How hard to follow the prompt; 1 is as trained",
        elem_id="guidance_scale",
        visible=pipe.takes_prompts,
    )
    sampler = gr.Dropdown(
        first.samplers, value=pipe.default_sampler, label="Sampler", elem_id="sampler"
    )
    sizes = [f"{width} x {height}" for width, height in first.sizes]
    size = gr.Dropdown(
        list(zip(sizes, range(len(sizes)), strict=True)),
        value=0,
        label="Size",
        elem_id="size",
        visible=len(sizes) > 1,
    )
    with gr.Accordion("Start from a picture", open=False, elem_id="from_picture"):
        image = _upload("Picture", "image")
        strength = gr.Slider(
            0.05,
            1,
            0.8,
            step=0.05,
            label="Strength",
            elem_id="strength",
            info="How far to leave it",
            visible=first.takes_strength,
        )
        mask = _upload("Mask: light where it is painted anew", "mask")
    form = dict(beside=other, negative_prompt=negative, seed=seed, steps=steps, size=size)
    form |= dict(guidance_scale=scale, sampler=sampler, image=image, mask=mask, strength=strength)
    return form, new_seed


def _upload(label: str, name: str) -> gr.Image:
    picture = gr.Image(
        label=label,
        type="filepath",
        image_mode=None,
        height=160,
        elem_id=name,
        sources=["upload", "clipboard"],
        buttons=[],
    )
    # The file as it is: Gradio would open it before `uploads` has looked how large it is, and a
    # broken one would be an error without a sentence. That it is an upload Gradio has checked.
    picture.preprocess = lambda payload: payload and payload.path
    return picture


async def follow(service: Service, form: dict[str, Any]) -> AsyncIterator[Any]:
    """What the page shows, again whenever something is new, until all pictures are there.

    Where nothing is new for a while, Gradio's word for it.
    """
    models = [service.first]
    if (other := form.pop("beside", ALONE)) != ALONE:
        models.append(service.model(other))
    panels = [Panel(model.name) for model in models]
    changed = asyncio.Event()
    try:
        asked = await asyncio.to_thread(_read_form, service, form)
    except JaxsdError as error:
        panels[0].said = str(error)
        yield together(panels[:1])
        return
    tasks = [
        asyncio.create_task(
            _draw(service, model, panel, asked, changed, teacher=model is models[0])
        )
        for model, panel in zip(models, panels, strict=True)
    ]
    try:
        while not all(task.done() for task in tasks):
            try:
                async with asyncio.timeout(BEAT):
                    await changed.wait()
            except TimeoutError:
                yield gr.skip()
                continue
            changed.clear()
            yield together(panels)
        yield together(panels)
    finally:  # also where the reader has gone
        for task in tasks:
            task.cancel()


async def _draw(
    service: Service,
    model: Served,
    panel: Panel,
    asked: dict[str, Any],
    changed: asyncio.Event,
    teacher: bool,
) -> None:
    loop = asyncio.get_running_loop()

    def on_frame(step: int, count: int, picture: Any) -> None:  # in the worker's thread
        panel.look(step, count, picture)
        loop.call_soon_threadsafe(changed.set)

    if not teacher:
        asked = {n: value for n, value in asked.items() if n not in made_for(model)}
    try:
        panel.request = await asyncio.to_thread(lambda: model.request(**asked))
        changed.set()
        (picture,) = await service.draw(model, [panel.request], on_frame)
        await asyncio.to_thread(panel.finish, model, picture)  # it compresses
    except JaxsdError as error:
        panel.said = str(error)
    except Exception:
        logger.exception("the page could not draw")
        panel.said = "the server failed at this; its log says why"
    finally:
        changed.set()


def made_for(model: Served) -> set[str]:
    """What a student has of its own, and is not asked for beside its teacher."""
    schedule = model.pipe.schedule
    if schedule.default_steps is None:
        return set()
    taught = schedule.default_guidance_scale is not None and not model.pipe.guidance_embedded
    return {"steps", "sampler"} | ({"guidance_scale"} if taught else set())


def _read_form(service: Service, form: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `Served.request`; Refused for a picture that is none."""
    asked = dict(form)
    asked["prompt"] = form["prompt"] or ""
    asked["seed"], asked["steps"] = int(form["seed"] or 0), int(form["steps"])
    asked["guidance_scale"] = float(form["guidance_scale"])
    asked["size"] = service.first.sizes[int(form["size"] or 0)]
    for name in ("image", "mask"):
        asked[name] = _picture(form[name], name, service.limits)
    if asked["image"] is None or not service.first.takes_strength:
        asked["strength"] = None
    return asked


def _picture(path: str | None, name: str, limits: Limits) -> Image.Image | None:
    return None if path is None else uploads.read(Path(path).read_bytes(), limits, name)
