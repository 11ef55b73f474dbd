"""Models that leave the package: on disk in float16, by name, on a hub, and as one file that runs without it."""
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import far_nb.far
from far_nb.acr import ACR, ACRConfig
from far_nb.core import FarError
from far_nb.far import DEFAULT_MODEL, FAR, shipped_models
from far_nb.mae import MAE, MAEConfig

SMALL = MAEConfig(image_size=64, patch_size=8, width=48, depth=2, heads=4, decoder_width=32, decoder_depth=2, decoder_heads=4)
PAINTER = ACRConfig(width=8, blocks=2, prior_width=32, prior_stride=8, grid=8)


def scramble(far: FAR, seed: int = 0) -> FAR:
    "Every weight and statistic off its start: pictures with contrast, to which each branch contributes (a fresh network paints grey)."
    torch.manual_seed(seed)
    for name, value in far.state_dict().items():
        if name.endswith(("pos_embed", "position.distance")) or not value.is_floating_point(): continue
        if name.endswith("running_var"): value.uniform_(0.5, 2)
        elif value.ndim <= 1: value.add_(0.3 * torch.randn_like(value))
        else: value.normal_(0, (2 / value[0].numel()) ** 0.5)
    return far.eval()


def small_far() -> FAR:
    torch.manual_seed(1)
    return scramble(FAR(MAE(SMALL), ACR(PAINTER)))


@pytest.fixture
def places(tmp_path, monkeypatch):
    "An empty current folder, and a package with one model in it."
    package = tmp_path / "package"
    small_far().save_pretrained(package / "weights" / DEFAULT_MODEL, half=True)
    monkeypatch.setattr(far_nb.far, "files", lambda name: package)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("socket.socket.connect", lambda *a, **k: pytest.fail("asked the network"))
    return tmp_path


def test_half_precision_keeps_the_picture_and_what_is_delicate(tmp_path):
    far, image = small_far(), torch.rand(1, 3, 64, 96)
    far.acr.stem_norm.running_var[0] = 1e6                                          # beyond float16, like a spectrum's
    with torch.no_grad(): far.acr.head.weight[0, 0, 0, 0] = 1e5                     # so is this kernel, which then stays whole
    mask = torch.zeros(1, 1, 64, 96); mask[..., 20:50, 30:70] = 1
    stored = load_file(far.save_pretrained(tmp_path, half=True) / "model.safetensors")
    for name, value in stored.items():
        expected = torch.int64 if name.endswith("tracked") else torch.float32 if value.ndim < 2 or name == "acr.head.weight" else torch.float16
        assert value.dtype == expected, name
    with torch.no_grad(): far.acr.head.weight[0, 0, 0, 0] = 0.01
    far.save_pretrained(tmp_path, half=True)
    again = FAR.from_pretrained(tmp_path)
    assert all(value.dtype != torch.float16 for value in again.state_dict().values())
    with torch.no_grad(): assert (again(image, mask) - far(image, mask)).abs().max() < 2e-3      # half a grey level


def test_names_of_models(places):
    far, shipped = small_far(), shipped_models()
    assert shipped == [DEFAULT_MODEL]
    same = lambda model: all(torch.allclose(value, far.state_dict()[name], atol=2e-3) for name, value in model.state_dict().items())
    assert same(FAR.from_pretrained()) and same(FAR.from_pretrained(DEFAULT_MODEL))
    other = scramble(FAR(None, ACR(replace(PAINTER, prior_width=None, attention="none"))))
    other.save_pretrained(DEFAULT_MODEL)                                             # a folder of that name wins
    assert FAR.from_pretrained(DEFAULT_MODEL).mae is None and FAR.from_pretrained().mae is not None
    (Path(DEFAULT_MODEL) / "config.json").unlink()
    with pytest.raises(FarError, match="has no config.json.*hides the shipped model"): FAR.from_pretrained(DEFAULT_MODEL)


@pytest.mark.parametrize("name", ["scene", "runs/tiny/far-s0", "/nowhere/model", "./a/b", "here/model", Path("user/name"), "user name/x"])
def test_what_is_no_model_does_not_reach_the_network(places, name, monkeypatch):
    monkeypatch.setattr(far_nb.far, "hf_hub_download", lambda *a, **k: pytest.fail("asked the hub"))
    Path("here").mkdir()                                                             # so here/model is a path
    with pytest.raises(FarError, match="does not exist: give the folder") as caught: FAR.from_pretrained(name)
    assert "\n" not in str(caught.value) and DEFAULT_MODEL in str(caught.value)


def test_a_package_without_weights_says_so(places):
    (places / "package/weights" / DEFAULT_MODEL / "config.json").unlink()
    with pytest.raises(FarError, match="no weights in .*give the folder of a trained model"): FAR.from_pretrained()
    assert shipped_models() == []


@pytest.mark.parametrize("break_it, message", [
    (lambda folder: (folder / "model.safetensors").write_bytes(b"torn"), "no sound FAR"),
    (lambda folder: (folder / "model.safetensors").unlink(), "no sound FAR"),
    (lambda folder: (folder / "config.json").write_text('{"acr": {"width": 8, "colour": 1}, "mae": null}'), "no sound FAR"),
    (lambda folder: (folder / "config.json").write_text('["acr"]'), "holds no FAR"),
    (lambda folder: (folder / "config.json").write_text('{"acr'), "not readable JSON")])
def test_unsound_folders_are_one_line(tmp_path, break_it, message):
    break_it(small_far().save_pretrained(tmp_path))
    with pytest.raises(FarError, match=message) as caught: FAR.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_the_hub_gives_what_push_to_hub_gave(places, monkeypatch):
    "The hub is a folder: what the mixin uploads is what from_pretrained finds."
    import huggingface_hub.hub_mixin as mixin
    hub = places / "hub"

    class Api:
        def __init__(self, token=None): pass
        def create_repo(self, repo_id, **options): return type("Repo", (), {"repo_id": repo_id})
        def upload_folder(self, repo_id, folder_path, **options):
            Path(folder_path).rename(hub / repo_id.replace("/", "--"))
            return f"https://huggingface.co/{repo_id}/commit/1"
    hub.mkdir()
    monkeypatch.setattr(mixin, "HfApi", Api)
    monkeypatch.setattr(far_nb.far, "hf_hub_download", lambda repo, file, revision="main", local_files_only=False: str(hub / repo.replace("/", "--") / file))
    far = small_far()
    assert far.push_to_hub("someone/far").endswith("/commit/1")
    pushed = hub / "someone--far"
    assert {path.name for path in pushed.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    assert json.loads((pushed / "config.json").read_text()).keys() == {"mae", "acr"}
    card = (pushed / "README.md").read_text()
    assert "library_name: far_nb" in card and "FAR.from_pretrained" in card and "{{" not in card
    again = FAR.from_pretrained("someone/far", revision="main")
    assert all(torch.equal(value, far.state_dict()[name]) for name, value in again.state_dict().items())
    with pytest.raises(TypeError): FAR.from_pretrained("someone/far", colour=1)


def test_an_unreachable_hub_is_one_line(places, monkeypatch):
    "HF_HUB_OFFLINE is set for all tests: the real client refuses before it opens a socket."
    with pytest.raises(FarError, match="^there is no folder someone/absent, and the Hugging Face hub gives no such model") as caught:
        FAR.from_pretrained("someone/absent")
    assert "\n" not in str(caught.value)
    with pytest.raises(FarError, match="hub gives no such model .HFValidationError"): FAR.from_pretrained("some--one/far")
    with pytest.raises(FarError, match="^someone/far can't be uploaded") as caught: small_far().push_to_hub("someone/far")
    assert "\n" not in str(caught.value)
