"""Configs from files that lie: absurd numbers and wrong types end in one line, and at once."""

import copy
import json
import math
import random
import time

import pytest
import tiny

from jaxsd.components import COMPONENTS, make_net, read_config
from jaxsd.errors import JaxsdError
from jaxsd.families import FAMILIES
from jaxsd.models import TinyVAEConfig, UNet, UNet2DConfig
from jaxsd.models.config import MOST_BLOCKS
from jaxsd.nn import Net

SMALL = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4}
CONFIGS = {
    "unet": [
        tiny.LATENT_UNET,
        FAMILIES["sdxl"].unet,
        UNet2DConfig(
            sample_size=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            **SMALL,
        ),
    ],
    "vae": [tiny.VAE_CONFIG, TinyVAEConfig()],
    "text_encoder": [tiny.TEXT],
    "controlnet": [FAMILIES["sdxl"].controlnet],
}
ABSURD = [
    *(-1, 0, 3, 7, 10**9, 2**63, 10**400, -(10**9), 0.5, -0.5, math.nan, math.inf, -math.inf),
    *(True, False, None, "", "many", "a\nb" * 1000, [], {}, [1], [None], [[8, 8]], ["DownBlock2D"]),
    *([10**9] * 2, [-4, 8], [8] * 100_000, ["x"] * 3, {"a": 1}),
]


def mutated(values, rng):
    """One to three fields changed, now and then one dropped or added."""
    values = json.loads(json.dumps(values))
    for _ in range(rng.randint(1, 3)):
        name = rng.choice(sorted(values))
        old, kind = values[name], rng.random()
        if kind < 0.05:
            del values[name]
        elif kind < 0.1:
            values[f"{name}_of_tomorrow\n"] = rng.choice(ABSURD)
        elif isinstance(old, list) and old and kind < 0.4:
            old[rng.randrange(len(old))] = rng.choice(ABSURD)
        elif isinstance(old, list) and kind < 0.5:
            values[name] = old * rng.choice([0, 2, 10_000])
        else:
            values[name] = rng.choice(ABSURD)
    return values


@pytest.mark.parametrize("kind", CONFIGS)
def test_absurd_configs(kind):
    rng, refused, slowest = random.Random(0), 0, 0.0
    for i in range(200):
        config = rng.choice(CONFIGS[kind])
        start = time.process_time()
        try:
            found = read_config(mutated(config.to_json(), rng), kind, "here/config.json")
        except JaxsdError as error:
            text = str(error)
            assert "\n" not in text and len(text) < 1000 and "here/config.json: " in text, (i, text)
            refused += 1
        else:
            make_net(found)  # what is accepted can be built
        slowest = max(slowest, time.process_time() - start)
    assert 100 < refused < 200 and slowest < 5


def seconds_an_array(config):
    """To build a UNet, not one built before."""
    start = time.process_time()
    net = Net(UNet(config))
    return (time.process_time() - start) / len(net.shapes)


@pytest.mark.slow
def test_the_largest_that_is_accepted_is_built_in_seconds():
    values = FAMILIES["sdxl"].unet.to_json() | {
        "down_block_types": ["CrossAttnDownBlock2D"] * MOST_BLOCKS,
        "up_block_types": ["CrossAttnUpBlock2D"] * MOST_BLOCKS,
        "block_out_channels": [1 << 16] * MOST_BLOCKS,
        "attention_head_dim": 1,
        "layers_per_block": 10,
        "transformer_layers_per_block": 4,
    }
    largest = read_config(values, "unet")
    assert make_net(largest).size > 1e13
    # In seconds, as SDXL's is in one: were it quadratic, an array would take ten times as long.
    sdxl = FAMILIES["sdxl"].unet
    assert len(make_net(largest).shapes) < 10 * len(make_net(sdxl).shapes)
    assert seconds_an_array(largest) < 3 * min(seconds_an_array(sdxl) for _ in range(3))
    with pytest.raises(JaxsdError, match="transformer_layers_per_block: over 40"):
        read_config(values | {"transformer_layers_per_block": 5}, "unet")


def test_lists_do_for_tuples():
    """In code, where no types are checked; what is traced of a network is found by its config."""
    config = copy.copy(tiny.LATENT_UNET)
    object.__setattr__(config, "block_out_channels", list(config.block_out_channels))
    config.__post_init__()
    assert config == tiny.LATENT_UNET and hash(config) == hash(tiny.LATENT_UNET)
    assert make_net(config) is make_net(tiny.LATENT_UNET)


def test_every_component_is_tried():
    assert CONFIGS.keys() | {"text_encoder_2"} == COMPONENTS.keys()
