"""Where a model is found, and which of a repository's files are fetched for it."""

import huggingface_hub
import pytest

from jaxsd.errors import JaxsdError
from jaxsd.hub import find, needed_files

# As in the repositories of Stable Diffusion 1.x, which hold everything in several forms.
FILES = """model_index.json README.md v1-5-pruned.ckpt v1-5-pruned.safetensors
scheduler/scheduler_config.json tokenizer/vocab.json tokenizer/merges.txt
text_encoder/config.json text_encoder/model.safetensors text_encoder/model.fp16.safetensors
text_encoder/pytorch_model.bin
unet/config.json unet/diffusion_pytorch_model.bin unet/diffusion_pytorch_model.safetensors
unet/diffusion_pytorch_model.fp16.safetensors unet/diffusion_pytorch_model.non_ema.safetensors
vae/config.json vae/diffusion_pytorch_model.bin vae/diffusion_pytorch_model.fp16.bin
vae/diffusion_pytorch_model.safetensors.index.json
vae/diffusion_pytorch_model-00001-of-00002.safetensors
vae/diffusion_pytorch_model-00002-of-00002.safetensors
safety_checker/model.safetensors""".split()
SMALL = {
    "model_index.json",
    "scheduler/scheduler_config.json",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "text_encoder/config.json",
    "unet/config.json",
    "vae/config.json",
}
SHARDS = {f for f in FILES if f.startswith("vae/") and ("index" in f or "-of-" in f)}


@pytest.mark.parametrize(
    "variant, text_encoder, unet, vae",
    [
        (None, "model", "diffusion_pytorch_model", SHARDS),
        ("fp16", "model.fp16", "diffusion_pytorch_model.fp16", "diffusion_pytorch_model.fp16.bin"),
        ("non_ema", "model", "diffusion_pytorch_model.non_ema", SHARDS),
    ],
)
def test_one_form_of_each_component(variant, text_encoder, unet, vae):
    expected = {f"text_encoder/{text_encoder}.safetensors", f"unet/{unet}.safetensors"}
    expected |= {f"vae/{vae}"} if isinstance(vae, str) else vae
    assert set(needed_files(FILES, variant)) == SMALL | expected


def test_the_hub(tmp_path, monkeypatch):
    asked = {}

    def download(repo, allow_patterns=None, local_files_only=False):
        asked.update(patterns=allow_patterns, local=local_files_only)
        if local_files_only and repo != "a/fetched":
            raise FileNotFoundError("not in the cache")
        return str(tmp_path)

    def list_files(self, repo):
        if repo != "a/model":
            raise ConnectionError("no network\nat all")
        return FILES

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", list_files)
    assert find("a/model", "fp16") == tmp_path
    assert asked == {"patterns": needed_files(FILES, "fp16"), "local": False}
    assert find("a/fetched") == tmp_path and asked["local"]
    with pytest.raises(JaxsdError, match=r"no folder or file 'a/none' here.*\(no network\)"):
        find("a/none")
