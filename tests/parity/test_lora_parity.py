"""LoRAs that we write, in diffusers: merged and running, several at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from lora_reference import (
    OUTPUTS,
    TEXT,
    UNET,
    XL,
    assert_fuses_alike,
    loaded,
    pipeline,
    random_lora,
    weights,
)
from torch_reference import nchw, nhwc, relative_error

from jaxsd.models import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    UNet,
    UNetConfig,
)
from jaxsd.nn import Net
from jaxsd.weights import lora, lora_files
from jaxsd.weights.lora_extract import extract

# peft, about the second adapter of a model
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")


@pytest.fixture
def sd1():
    return pipeline("sd1")


@pytest.fixture
def sdxl():
    return pipeline("sdxl")


# --- What we write ---------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["peft", "kohya"])
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_what_we_write_changes_theirs_alike(tmp_path, family, form):
    pipe = pipeline(family)
    # diffusers 0.42 does not know XL's add_embedding under these names of kohya's.
    made = random_lora(pipe, without="embedding")
    file = lora_files.save(made, tmp_path, form)
    assert_fuses_alike(pipe, (file, 0.7), changed=sum(map(len, made.layers.values())))


def test_several_at_once(sdxl, tmp_path):
    """Each with a rank, an alpha, a scale and layers of its own."""
    a = random_lora(sdxl, rank=2, alpha=2.0, seed=1, layers="attn2|self_attn")
    b = random_lora(sdxl, rank=4, alpha=1.0, seed=2, layers="to_k|conv1|mlp")
    files = [
        lora_files.save(a, tmp_path / "a.safetensors", "peft"),
        lora_files.save(b, tmp_path / "b.safetensors", "kohya"),
    ]
    changed = {(c, name) for one in (a, b) for c, names in one.layers.items() for name in names}
    assert_fuses_alike(sdxl, (files[0], 0.5), (files[1], -1.5), changed=len(changed))


def test_ranks_and_alphas_of_their_own(sdxl, tmp_path):
    """In PEFT's form; of kohya's, diffusers 0.42 mixes alphas up."""
    made = random_lora(sdxl, rank=4, alpha=2.0)
    other = random_lora(sdxl, rank=3, alpha=1.1, seed=1, layers="to_k|conv1|mlp|mid_block")
    for component, layers in other.layers.items():
        made.layers[component].update(layers)
    file = lora_files.save(made, tmp_path)
    assert_fuses_alike(sdxl, (file, 0.7), changed=sum(map(len, made.layers.values())))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(sd1, tmp_path, dtype):
    """Factors in half precision, summed in float32 by both."""
    made = random_lora(sd1, layers="attn|ff|conv1")
    file = lora_files.save(made, tmp_path, "peft", dtype)
    assert_fuses_alike(sd1, (file, 1.0), changed=sum(map(len, made.layers.values())))


@pytest.mark.parametrize("form", ["peft", "kohya"])
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_what_we_extract_leads_them_to_the_tuned_model(tmp_path, family, form):
    """1e-5 of each weight's size: the factors of a sum are found to that."""
    pipe = pipeline(family)
    base = weights(pipe)
    made = random_lora(pipe, rank=2, alpha=1.0, without="embedding")
    tuned = lora.merge(base, [(made, 0.7)])
    found = extract(tuned, base, 2, form)
    assert found.kept > 1 - 1e-6
    assert {c: set(n) for c, n in found.lora.layers.items()} == {
        c: set(n) for c, n in made.layers.items()
    }
    theirs = loaded(pipe, (lora_files.save(found.lora, tmp_path, form), 1.0))
    theirs.fuse_lora(components=list(base))
    for component, params in weights(theirs).items():
        for name, value in params.items():
            assert relative_error(tuned[component][name], np.asarray(value)) <= 1e-5, name


# --- Running models --------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd1", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_live_in_a_running_model(tmp_path, family):
    """The scales are values of one compiled program; diffusers' adapters are live, too."""
    pipe = pipeline(family)
    made = [random_lora(pipe, rank, alpha, seed=rank) for rank, alpha in ((2, 1.0), (3, 3.0))]
    files = [lora_files.save(one, tmp_path / f"{i}.safetensors") for i, one in enumerate(made)]
    nets = {"unet": Net(UNet(UNetConfig(**(UNET if family == "sd1" else XL))))}
    nets["text_encoder"] = Net(CLIPTextModel(CLIPTextConfig(**TEXT)))
    if family == "sdxl":
        nets["text_encoder_2"] = Net(CLIPTextModelWithProjection(CLIPTextConfig(**TEXT)))
    base = weights(pipe)
    loras = [lora_files.read(file, nets) for file in files]

    @jax.jit
    def run(base, changes, scales, x, t, ids, **added):
        params = {name: lora.apply(base[name], changes[name], scales) for name in nets}
        if family == "sd1":
            text = nets["text_encoder"](params["text_encoder"], ids)
        else:
            towers = [name for name in nets if name != "unet"]
            states = [nets[name](params[name], ids, method="penultimate") for name in towers]
            text = jnp.concatenate([state for state, _ in states], -1)
            added["text_embeds"] = states[-1][1]
        return text, nets["unet"](params["unet"], x, t, encoder_hidden_states=text, **added)

    rng = np.random.default_rng(0)
    x, t = rng.normal(size=(2, 8, 8, 4)).astype(np.float32), np.asarray([10, 700])
    ids = rng.integers(0, 97, (2, 16))
    sizes = {"time_ids": rng.integers(0, 64, (2, 6))} if family == "sdxl" else {}
    changes = {name: lora.live(loras, name) for name in nets}
    plain = their_text(pipe, ids)[0]
    for scales in ([0.02, 0.05], [0.1, 0.0], [-0.05, 0.03]):
        theirs = loaded(pipe, *zip(files, scales, strict=True))
        text, pooled = their_text(theirs, ids)
        added = (
            {"text_embeds": pooled, "time_ids": torch.from_numpy(sizes["time_ids"])}
            if sizes
            else None
        )
        with torch.no_grad():
            noise = theirs.unet(nchw(x), torch.from_numpy(t), text, added_cond_kwargs=added).sample
        ours = run(base, changes, jnp.asarray(scales), x, t, ids, **sizes)
        errors = relative_error(ours[0], text), relative_error(ours[1], nhwc(noise))
        print(scales, *errors)
        assert max(errors) <= OUTPUTS
        assert relative_error(plain.numpy(), text) > 100 * OUTPUTS  # the LoRAs do something here
    assert run._cache_size() == 1


def their_text(pipe, ids) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What the UNet is told, as the pipelines of 1.x and of XL put it together."""
    with torch.no_grad():
        first = pipe.text_encoder(torch.from_numpy(ids), output_hidden_states=True)
        if not hasattr(pipe, "text_encoder_2"):
            return first.last_hidden_state, None
        second = pipe.text_encoder_2(torch.from_numpy(ids), output_hidden_states=True)
        states = [first.hidden_states[-2], second.hidden_states[-2]]
        return torch.cat(states, -1), second.text_embeds
