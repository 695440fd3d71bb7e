"""Low-rank training of any objective (LoRA, Hu et al. 2021): the weights stay, factors are trained.

A weight W [out, in] or [out, in, kh, kw] becomes W + alpha / r up down, as `weights.lora` adds it
up. The objective inside is given whole parameters and need not know.
"""

import dataclasses
import difflib
import fnmatch
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsd.errors import JaxsdError
from jaxsd.nn import Net, Params, fan_in_uniform
from jaxsd.objectives import Batch, Now
from jaxsd.sharding import on_host
from jaxsd.weights import lora, lora_files
from jaxsd.weights.lora import Factors, Layer, LoRA
from jaxsd.weights.lora_names import COMPONENTS

# How the names of the factors end, as PEFT has it
DOWN, UP = ".lora_A.weight", ".lora_B.weight"
# What is usually changed. The first four together are the layers of the LCM-LoRAs.
GROUPS = {
    "attention": ("*.to_[qkv].weight", "*.to_out.0.weight"),
    "feed-forward": ("*.ff.net.0.proj.weight", "*.ff.net.2.weight"),
    "convs": ("*.conv[12].weight", "*.conv_shortcut.weight", "*samplers.0.conv.weight"),
    "projections": ("*.proj_in.weight", "*.proj_out.weight", "*.time_emb_proj.weight"),
    "text-encoders": (
        "*.self_attn.[qkv]_proj.weight",
        "*.self_attn.out_proj.weight",
        "*.mlp.fc[12].weight",
    ),
}


def targeted(targets: Sequence[str], params: Mapping[str, Any]) -> list[str]:
    """The weights of linear layers and convolutions that are chosen, in the parameters' order.

    targets: names of GROUPS, and patterns as of a shell that fit a parameter's whole name.
    JaxsdError for one that fits nothing.
    """
    able = [
        name
        for name, value in params.items()
        if name.endswith(".weight") and value.ndim in (2, 4)
        if not name.endswith("_embedding.weight")  # tables, and a picture tower's patches
    ]
    found: set[str] = set()
    for target in targets:
        patterns = GROUPS.get(target, (target,))
        fitting = {n for n in able if any(fnmatch.fnmatchcase(n, pattern) for pattern in patterns)}
        if not fitting:
            near = difflib.get_close_matches(target, [*GROUPS, *able], 3, cutoff=0.0)
            raise JaxsdError(
                f"lora_targets: {target!r} fits no linear layer or convolution of this model; near "
                f"is {near}"
            )
        found |= fitting
    if not found:
        raise JaxsdError(f"lora_targets: name at least one of {', '.join(GROUPS)}, or a pattern")
    return [name for name in able if name in found]


@dataclasses.dataclass
class LowRank:
    """Trains, for each chosen weight of `base`, two factors in the place of the weight.

    inner: any objective, with what else it offers (`loss_by_bucket`, `pipeline`). base: all of its
    parameters, as its `init` gives them. targets: see `targeted`.
    component: what LoRA files call parameters that do not stand behind the name of a text encoder.
    initial: factors to start from. dtype: in which networks compute. form: of `lora_files.save`.

    The parameters are the factors alone: down, "NAME.lora_A.weight" [r, in] or [r, in, kh, kw], and
    up, "NAME.lora_B.weight" [out, r] or [out, r, 1, 1]. At first down is as PEFT and the authors'
    loralib draw it, U(-1, 1) / sqrt(fan-in), and up is zero: step 0 is the base, to the bit.

    Exports the folder of the objective inside, with the changed weights, and in it the factors
    alone as diffusers names them, to be loaded on the base: not on the folder's own weights, which
    hold them already.
    """

    inner: Any
    base: Params
    rank: int
    alpha: float
    targets: Sequence[str] = ("attention",)
    component: str = "unet"
    initial: Params | None = None
    dtype: str = "float32"
    form: str = "peft"

    def __post_init__(self):
        if self.rank < 1:
            raise JaxsdError(f"lora_rank must be at least 1, not {self.rank}")
        if not 0 < self.alpha < math.inf:
            raise JaxsdError(f"lora_alpha must be above 0, not {self.alpha}")
        self.changed = targeted(self.targets, self.base)
        lora_files.check_form(self.form, {self._place(name)[0] for name in self.changed})
        stay = self.base.keys() - set(self.changed)
        with on_host():
            base = {n: self._computed_in(v) if n in stay else v for n, v in self.base.items()}
        self.aux: Any = {"inner": self.inner.aux, "base": base}
        self._sum = jax.jit(self._summed)

    @property
    def net(self) -> Net:
        return self.inner.net

    def init(self, key: jax.Array) -> Params:
        return self._drawn(key) if self.initial is None else self.initial

    def _drawn(self, key: jax.Array) -> Params:
        """Each factor by the key and its name only."""

        def draw(key: jax.Array) -> Params:
            params = {}
            for name in self.changed:
                out, *inside = self.base[name].shape
                down, up = factor_names(name)
                own = jax.random.fold_in(key, zlib.crc32(down.encode()))
                params[down] = fan_in_uniform(own, (self.rank, *inside))
                params[up] = jnp.zeros((out, self.rank, *[1] * (len(inside) - 1)))
            return params

        return jax.jit(draw)(key)  # as one program: op by op, every new shape compiles

    # --- Whole parameters ---

    def whole(self, params: Params) -> Params:
        """All parameters of the objective inside, float32, on the devices where the factors lie."""
        where = next(iter(params.values())).sharding
        return self._sum(params, jax.device_put(self.base, where))

    def _summed(self, params: Params, base: Params) -> Params:
        live = {}
        for name in self.changed:
            down, up = (params[factor] for factor in factor_names(name))
            gain = jnp.float32(self.alpha / self.rank)
            live[name] = {0: Factors(down, up.reshape(up.shape[:2]), gain, None)}
        return lora.apply(base, live, jnp.ones(1))

    def _computed(self, params: Params, base: Params) -> Params:
        """As `whole`, inside a program, in what networks compute in: sums are still float32."""
        whole = self._summed(params, base)
        return whole | {name: self._computed_in(whole[name]) for name in self.changed}

    def _computed_in(self, value: jax.Array) -> jax.Array:
        """As the training step has whole parameters: norms compute in float32 anyway."""
        return value.astype(jnp.dtype(self.dtype)) if value.ndim > 1 else value

    # --- What the objective inside does with them ---

    def loss(self, params: Params, aux: Any, batch: Batch, now: Now):
        """The inner objective's, of the base's weights with the factors added."""
        base = aux["base"]
        if now.ema is not None:
            now = now._replace(ema=self._computed(now.ema, base))
        return self.inner.loss(self._computed(params, base), aux["inner"], batch, now)

    def loss_by_bucket(self, params: Params, aux: Any, batch: Batch, keys: jax.Array) -> jax.Array:
        whole = self._computed(params, aux["base"])
        return self.inner.loss_by_bucket(whole, aux["inner"], batch, keys)

    def pipeline(self, params: Params) -> Any:
        return self.inner.pipeline(self.whole(params))

    def preview(self, params: Params) -> np.ndarray | None:
        return self.inner.preview(self.whole(params))

    def export(self, params: Params, folder: str | Path) -> None:
        lora_files.save(self.lora(params), Path(folder) / lora_files.DIFFUSERS_FILE, self.form)
        self.inner.export(self.whole(params), folder)  # which says at its end that all is there

    def lora(self, params: Params) -> LoRA:
        """The factors as a LoRA, for `lora_files.save` and `Pipeline.add_lora`."""
        layers: dict[str, dict[str, Layer]] = {}
        for name in self.changed:
            down, up = (np.asarray(params[factor]) for factor in factor_names(name))
            component, own = self._place(name)
            layer = Layer(down, up.reshape(up.shape[:2]), float(self.alpha))
            layers.setdefault(component, {})[own] = layer
        return LoRA(layers)

    def _place(self, name: str) -> tuple[str, str]:
        """The component of a parameter, and its name there."""
        head, _, rest = name.partition(".")
        return (head, rest) if head in COMPONENTS else (self.component, name)


def factor_names(name: str) -> tuple[str, str]:
    """What the factors of a weight are called: down, up."""
    module = name.removesuffix(".weight")
    return module + DOWN, module + UP
