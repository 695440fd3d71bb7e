"""Component folders and whole models, written and read."""

import dataclasses

import pytest
import tiny

from jaxsd.components import (
    load_component,
    make_net,
    read_config,
    save_component,
)
from jaxsd.errors import JaxsdError
from jaxsd.models import (
    AutoencoderKL,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTextProjectionConfig,
    UNet,
)
from jaxsd.nn import Net


def test_the_class_of_a_component_is_what_its_config_says(tmp_path):
    config = dataclasses.asdict(tiny.TEXT)
    projected = CLIPTextProjectionConfig(**config)
    for kind, net in (
        ("text_encoder", Net(CLIPTextModel(tiny.TEXT))),
        ("text_encoder_2", Net(CLIPTextModelWithProjection(projected))),
        ("unet", Net(UNet(tiny.PIXEL_UNET))),
        ("vae", Net(AutoencoderKL(tiny.VAE_CONFIG))),
    ):
        params = tiny.parameters(net)
        save_component(tmp_path / kind, net, params)
        found = load_component(tmp_path / kind)
        assert found.net.config == net.config and type(found.net.config) is type(net.config)
        assert found.params.keys() == params.keys() == make_net(net.config).shapes.keys()
        # A folder may have any name if one says what it is.
        assert load_component(tmp_path / kind, kind=kind).net.config == net.config
    assert (tmp_path / "text_encoder_2" / "model.safetensors").is_file()


def test_a_class_that_a_component_cannot_have():
    for values in ({"_class_name": "VQModel"}, {"architectures": ["T5EncoderModel"]}):
        name = str(next(iter(values.values()))).strip("[']")
        with pytest.raises(JaxsdError, match=f"{name}' is not a class that a vae can have"):
            read_config(values, "vae", "here/config.json")
    for value in ([1], 3, {}):
        with pytest.raises(JaxsdError, match="is not a class"):
            read_config({"_class_name": value}, "unet")
    # Old files, and those of early transformers, name none.
    values = {k: v for k, v in tiny.VAE_CONFIG.to_json().items() if k != "_class_name"}
    assert read_config(values, "vae") == tiny.VAE_CONFIG
