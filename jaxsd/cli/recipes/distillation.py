"""What the recipes of students share: the teacher, what both are shown, and the options."""

import dataclasses
from typing import Annotated, Any, Literal

from jaxsd.cli.recipes.common import MakeBatches, remembering, share
from jaxsd.cli.recipes.evaluation import DenoisingEvaluation
from jaxsd.cli.recipes.latent_data import LatentData
from jaxsd.cli.recipes.low_rank import LoRAOptions
from jaxsd.cli.recipes.models import ModelOptions
from jaxsd.diffusion.weighting import WEIGHTINGS
from jaxsd.errors import JaxsdError
from jaxsd.training.options import one_of

DROPOUT = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distillation(LatentData, DenoisingEvaluation, ModelOptions, LoRAOptions):
    """Options of the recipes that make a student of a teacher, `--model`, of any kind."""

    data: str = ""
    """As of text-to-image. By default the digits: scans for a model of pixels, else coloured."""
    prediction_type: Literal["epsilon", "sample", "v_prediction", "both"] | None = None
    """What the student predicts; by default what its teacher does. both: the picture and the noise,
    which diffusers does not know."""
    weighting: Annotated[str, one_of(*WEIGHTINGS)] = "truncated-snr"
    """What noise levels count: the error of the picture times max(SNR, 1) or SNR + 1 (Salimans &
    Ho 2022), or min(SNR, 5); none: the error of the prediction as it is."""
    initial: str | None = None
    """A model whose UNet the student begins as, in place of its teacher: one that `guided` has
    taught to hear the scale, for a `progressive` that follows the guided teacher itself."""
    guidance_range: tuple[float, float] | None = None
    """The guidance scales, least and most, at which the teacher is followed. By default those on
    which a teacher was trained that is told the scale; for any other, none."""
    default_guidance_scale: float | None = None
    """The scale at which the student is drawn where none is named; by default 7.5, as elsewhere."""
    condition_dropout: float = DROPOUT
    """Without guidance: the share of examples whose caption or class is left out, so that the
    student can be guided."""
    learning_rate: float = 3e-4
    warmup_steps: int = 0
    decay: Annotated[str, one_of("cosine", "linear", "constant")] = "linear"
    ema_decay: float = 0.0
    """Of the averaged parameters, which are what is exported; 0 for the last ones."""

    def teacher_and_base(
        self,
        steps: int | None,
        told: bool | None = None,
        class_name: str = "DDIMScheduler",
        *,
        turned: bool = False,
        taught: bool = False,
        **own: Any,
    ) -> tuple[Any, Any, MakeBatches]:
        """The teacher, the denoiser that gives the student's network, and batches.

        steps: those that the student is made for. told: whether it is told the guidance scale;
        None: as its teacher is. turned: whether it may predict what its teacher does not. taught:
        whether it learns to hear the scale. own: what else its schedule says.
        """
        from jaxsd.diffusion.jumps import student_schedule
        from jaxsd.hub import FOLDERS
        from jaxsd.objectives.distillation import Teacher, takes_scale

        if self.model is None:
            raise JaxsdError("give the teacher with --model")
        parts = self.load(None, FOLDERS, latent=False)
        unet = parts.components["unet"]
        # What the network computes in; vectors stay, as those of the student do
        params = {n: p.astype(self.dtype) if p.ndim > 1 else p for n, p in unet.params.items()}
        teacher = Teacher(unet.net, params, parts.schedule)
        begun = self._begun(unet.net.config, parts.schedule.prediction_type) or unet
        told = takes_scale(begun.net) if told is None else told
        schedule = dataclasses.replace(
            student_schedule(parts.schedule, self.prediction_type, class_name),
            default_steps=steps,
            default_guidance_scale=self.default_guidance_scale,
            **own,
        )
        kinds = parts.schedule.prediction_type, schedule.prediction_type
        more, rest = divmod(schedule.pictures_predicted, parts.schedule.pictures_predicted)
        if rest or (kinds[0] != kinds[1] and not turned):
            raise JaxsdError(
                f"the teacher predicts {kinds[0]}, and its student would start from its weights to "
                f"predict {kinds[1]}"
                + ("" if rest else ": turn it first, with progressive's --convert-steps")
            )
        if taught and takes_scale(unet.net):
            raise JaxsdError(
                f"{self.model} is told the guidance scale already: `progressive` makes it faster"
            )
        scales = self._checked(unet.net.config, told)
        if scales is not None and not told and self.default_guidance_scale is None:
            schedule = dataclasses.replace(schedule, default_guidance_scale=1.0)  # it is in already
        config = self._student(begun.net.config, scales if told else None)
        config = dataclasses.replace(config, out_channels=config.out_channels * more)
        return teacher, *self._base(parts, config, schedule, begun.params)

    def _begun(self, teacher: Any, kind: str) -> Any:
        """The UNet that the student begins as, if it is not its teacher's (of that config)."""
        from jaxsd.components import load_parts

        if self.initial is None:
            return None
        parts = load_parts(self.initial, "float32", only=("unet",))
        unet, own = parts.components["unet"], parts.schedule.prediction_type
        free = {"time_cond_proj_dim", "guidance_range"}
        differ = {
            name
            for name, value in {**vars(unet.net.config), "prediction_type": own}.items()
            if name not in free and value != {**vars(teacher), "prediction_type": kind}.get(name)
        }
        if differ:
            raise JaxsdError(
                f"{self.initial} is no student of {self.model}: they differ in "
                f"{', '.join(sorted(differ))}"
            )
        return unet

    def _checked(self, teacher: Any, told: bool) -> tuple[float, float] | None:
        """The range of guidance scales, if it suits the teacher and the student."""
        taught, scales = getattr(teacher, "guidance_range", None), self.scales(teacher)
        if scales is not None and taught and not taught[0] <= scales[0] <= scales[1] <= taught[1]:
            raise JaxsdError(
                f"guidance_range {scales[0]:g} to {scales[1]:g} is beyond {taught[0]:g} to "
                f"{taught[1]:g}, which the teacher was taught"
            )
        if scales is not None and not told and scales[0] != scales[1]:
            raise JaxsdError(
                "a student that is not told the guidance scale learns one: give it twice as the "
                f"guidance_range, such as {scales[1]:g} {scales[1]:g}"
            )
        if scales is not None and self.condition_dropout != DROPOUT:
            raise JaxsdError("condition_dropout is for students without guidance")
        return scales

    def scales(self, config: Any) -> tuple[float, float] | None:
        """The least and the most guidance scale: as asked for, or those a network was taught."""
        if self.guidance_range is None:
            return getattr(config, "guidance_range", None)
        low, high = self.guidance_range
        if not 1 <= low <= high:
            raise JaxsdError(f"guidance_range is from 1 on and rising, not {low:g} to {high:g}")
        return low, high

    def _student(self, config: Any, scales: tuple[float, float] | None) -> Any:
        """The config of the student's UNet; scales: that it is told of."""
        from jaxsd.models import UNetConfig
        from jaxsd.objectives.distillation import SCALE_CHANNELS

        if scales is None:
            return config
        if not isinstance(config, UNetConfig):
            raise JaxsdError(
                f"a {config.CLASS_NAME} cannot be told the guidance scale: only a "
                f"{UNetConfig.CLASS_NAME} can"
            )
        size = config.time_cond_proj_dim or SCALE_CHANNELS
        return dataclasses.replace(config, time_cond_proj_dim=size, guidance_range=scales)

    def _base(
        self, parts: Any, config: Any, schedule: Any, initial: Any
    ) -> tuple[Any, MakeBatches]:
        from jaxsd import data
        from jaxsd.objectives.ddpm import DDPM

        own = self._named(latent="vae" in parts.components)
        if "vae" in parts.components:
            return own.text_to_image(parts, config, schedule, initial=initial)
        dataset = data.elements(own.data, "train", self.seed)
        return DDPM(config, schedule, initial=initial), lambda start, stop: data.batches(
            dataset, self.batch_size, start, stop, shard=self.rows()
        )

    def _named(self, latent: bool) -> "Distillation":
        """These options with a word for the data."""
        default = "digits" if latent else "digit-scans"
        return dataclasses.replace(self, data=self.data or default)

    def shared(self, base: Any) -> dict[str, Any]:
        """The fields that every student has."""
        return {
            "guidance": self.scales(base.net.config),
            "weighting": self.weighting,
            "dropout": share("condition_dropout", self.condition_dropout),
            "dtype": self.dtype,
        }

    def evaluators(self, objective: Any) -> list[Any]:
        """Pictures that the student draws in its own steps."""
        if not self.evaluates():
            return []
        if not self.eval_samples:
            raise JaxsdError("a student is measured by what it draws: give --eval-samples")
        student = self.plain(objective)
        if getattr(student, "encoder", False):
            raise JaxsdError("an encoder draws nothing that could be measured: leave --eval-every")
        towers = getattr(student.base, "towers", None)
        own = self._named(latent=towers is not None)
        if student.guidance_within:
            own = dataclasses.replace(own, eval_guidance_scale=1.0)
        held_out = own.held_out(remembering(towers.tokenize) if towers else None)
        drawn = own.drawn(objective, held_out, student.steps, student.sampler)
        return [self.evaluator("drawn", drawn)]
