"""Models that leave the package: on disk in float16, by name, on a hub, and as one file that runs without it."""
import hashlib
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file
from typer.testing import CliRunner

import far_nb.export
import far_nb.far
from far_nb.acr import ACR, ACRConfig
from far_nb.cli import app, main
from far_nb.core import FarError
from far_nb.export import PortableFAR, export_model
from far_nb.far import DEFAULT_MODEL, FAR, composite, shipped_models
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
    with torch.no_grad(): assert (again(image, mask) - far(image, mask)).abs().mean() < 0.1 / 255      # weights of 11 bits


def test_names_of_models(places):
    far, shipped = small_far(), shipped_models()
    assert shipped == [DEFAULT_MODEL]
    same = lambda model: all(torch.allclose(value, far.state_dict()[name], rtol=1e-3, atol=1e-6) for name, value in model.state_dict().items())
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


# ---- one file that runs without the package

LAMA = replace(PAINTER, prior_width=None, attention="none")
MODELS = {
    "far": lambda: FAR(MAE(SMALL), ACR(PAINTER)),
    "lama": lambda: FAR(None, ACR(LAMA)),
    "partial, raw positions, no alpha": lambda: FAR(MAE(replace(SMALL, partial=True)), ACR(replace(PAINTER, masked_position=False, alpha="none"))),
    "contextual": lambda: FAR(None, ACR(replace(LAMA, attention="contextual"))),
    "16 tokens, earlier layer, no coordinates": lambda: FAR(MAE(replace(SMALL, patch_size=4, feature_layer=1)),
                                                            ACR(replace(PAINTER, grid=16, prior_stride=16, coordinates=False))),
}


def build(name: str) -> FAR:
    torch.manual_seed(1)
    return scramble(MODELS[name]())


def pair(height: int, width: int, batch: int = 1, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    "Noise (B,3,H,W) and masks (B,1,H,W): a rectangle and three specks, elsewhere in each (more specks would leave the MAE no token to see)."
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(batch, 1, height, width)
    for index in range(batch):
        place = lambda side: int(torch.randint(0, side, (), generator=generator))
        top, left = place(height // 2), place(width // 2)
        mask[index, :, top:top + height // 3, left:left + width // 2] = 1
        for _ in range(3): mask[index, 0, place(height), place(width)] = 1
    return torch.rand(batch, 3, height, width, generator=generator), mask


def difference(run, far: FAR, image: torch.Tensor, mask: torch.Tensor, given: torch.Tensor | None = None) -> float:
    with torch.no_grad(): return (run(image, mask if given is None else given) - far(image, mask)).abs().max().item()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    "The small FAR, and its TorchScript file."
    far, path = build("far"), tmp_path_factory.mktemp("exported") / "far.pt"
    assert export_model(far, path) < 1e-4
    return far, path


@pytest.fixture(scope="module")
def loaded(exported):
    return exported[0], torch.jit.load(exported[1])


def test_pictures_of_the_test_networks_have_contrast():
    "Else equality would mean little: each branch must show in the picture."
    far, (image, mask) = build("far"), pair(64, 96)
    with torch.no_grad():
        picture = far(image, mask)
        assert picture.std() > 0.1
        for name, alpha in far.acr.named_parameters():
            if name.endswith("alpha.value") or "alphas" in name or ".alpha_" in name:
                before = alpha.clone()
                alpha.zero_()
                assert (far(image, mask) - picture).abs().max() > 0.01, name
                alpha.copy_(before)


@pytest.mark.parametrize("size", [(256, 256), (512, 512), (320, 448), (64, 1024), (16, 24)], ids=str)
def test_torchscript_equals_far(loaded, size):
    far, model = loaded
    assert difference(model, far, *pair(*size)) < 1e-4


@settings(max_examples=10)
@given(st.integers(2, 16), st.integers(2, 16), st.integers(1, 2), st.integers(0, 999), st.sampled_from([torch.float32, torch.int64, torch.bool, torch.uint8]))
def test_torchscript_equals_far_for_every_size_mask_and_batch(loaded, rows, columns, batch, seed, kind):
    far, model = loaded
    image, mask = pair(8 * rows, 8 * columns, batch, seed)
    assert difference(model, far, image, mask, mask.to(kind)) < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_network_is_portable(name):
    far = build(name)
    for size in ((64, 96), (48, 160), (144, 80)):
        for matrices in (False, True):
            assert difference(PortableFAR(far, matrices=matrices), far, *pair(*size, batch=2)) < 1e-4, (size, matrices)


@pytest.mark.parametrize("name", ["lama", "16 tokens, earlier layer, no coordinates"])
def test_other_networks_become_torchscript_too(tmp_path, name):
    far = build(name)
    export_model(far, tmp_path / "far.pt")
    assert difference(torch.jit.load(tmp_path / "far.pt"), far, *pair(96, 176)) < 1e-4


def test_onnx_equals_far_in_onnxruntime(tmp_path):
    "One file for all sizes; square and not, odd and even rates of the prior attention, no hole, all hole."
    import onnxruntime
    far = build("far")
    assert export_model(far, tmp_path / "far.onnx", "onnx") < 1e-4
    session = onnxruntime.InferenceSession(tmp_path / "far.onnx", providers=["CPUExecutionProvider"])
    run = lambda *inputs: torch.from_numpy(session.run(None, dict(zip(("image", "mask"), (each.numpy() for each in inputs))))[0])
    for size in ((256, 256), (320, 448), (40, 56), (192, 64)): assert difference(run, far, *pair(*size)) < 1e-4, size
    image, mask = pair(64, 48)
    assert difference(run, far, image, mask * 0) < 1e-4 and run(image, mask * 0 + 1).isfinite().all()
    assert run(*pair(8, 8)).shape == (1, 3, 8, 8)


def test_any_mask_and_any_size_get_a_picture(loaded):
    "A host sends what it has: nothing masked, everything masked, 8 pixels, sides that do not divide."
    far, model = loaded
    image, _ = pair(64, 48)
    assert difference(model, far, image, torch.zeros(1, 1, 64, 48)) < 1e-4
    with torch.no_grad():
        for height, width, value in ((64, 48, 1), (8, 8, 0), (8, 8, 1), (8, 64, 0), (37, 50, 0), (1, 1, 1)):
            picture = model(torch.rand(1, 3, height, width), torch.full((1, 1, height, width), value))
            assert picture.shape == (1, 3, height, width) and picture.isfinite().all() and 0 <= picture.min() and picture.max() <= 1


def test_the_file_is_bound_to_no_device(exported):
    _, path = exported
    archive = zipfile.ZipFile(path)
    assert not any(b"torch.device" in archive.read(name) for name in archive.namelist() if name.endswith(".py"))
    if torch.cuda.is_available():
        far, (image, mask) = exported[0], pair(64, 96)
        assert difference(lambda *x: torch.jit.load(path).to("cuda")(*(each.cuda() for each in x)).cpu(), far, image, mask) < 1e-3


def test_the_file_can_be_optimised_and_says_what_it_is(exported):
    far, path = exported
    about = {"far.json": ""}
    model = torch.jit.load(path, _extra_files=about).eval()
    assert json.loads(about["far.json"])["config"]["acr"]["width"] == 8
    fast = torch.jit.optimize_for_inference(model)
    for size in ((64, 96), (96, 64)): assert difference(fast, far, *pair(*size)) < 1e-4


def test_the_call_of_iopaint(exported):
    "As its LaMa loader does it: integers for the mask, mirrored to multiples of 8, times 255, clipped, truncated; 1 grey level for the truncation."
    far, path = exported
    generator = np.random.default_rng(0)
    picture, mask = generator.integers(0, 256, (75, 101, 3), dtype=np.uint8), np.zeros((75, 101), np.uint8)
    mask[20:50, 30:90] = 200
    mirrored = lambda array: np.pad(array, ((0, 5), (0, 3), *[(0, 0)] * (array.ndim - 2)), mode="symmetric")
    image = torch.from_numpy(mirrored(picture).transpose(2, 0, 1).astype("float32") / 255)[None]
    hole = torch.from_numpy((mirrored(mask)[None].astype("float32") / 255 > 0) * 1)[None]
    assert hole.dtype == torch.int64 and image.shape[-2:] == (80, 104)
    with torch.inference_mode():
        answer = torch.jit.load(str(path), map_location="cpu").to("cpu").eval()(image, hole)
    answer = np.clip(answer[0].permute(1, 2, 0).numpy() * 255, 0, 255).astype("uint8")[:75, :101]
    with torch.no_grad(): expected = far(image, hole.float())[0].permute(1, 2, 0).numpy()[:75, :101] * 255
    assert answer.shape == picture.shape and np.abs(answer - expected).max() < 1.05


def test_known_pixels_on_request(tmp_path):
    far, (image, mask) = build("lama"), pair(48, 64)
    export_model(far, tmp_path / "far.pt", known=True)
    with torch.no_grad(): assert torch.allclose(torch.jit.load(tmp_path / "far.pt")(image, mask), composite(image, mask, far(image, mask)), atol=1e-4)


def test_a_file_that_differs_is_not_written(tmp_path, monkeypatch):
    "A plain trace of FAR is such a file: it has the number of visible tokens in it."
    far = build("far")
    def plain(portable, path, about):
        torch.jit.save(torch.jit.trace(far, pair(96, 64), check_trace=False), str(path))
        return torch.jit.load(str(path))
    monkeypatch.setitem(far_nb.export.FORMATS, "torchscript", plain)
    with pytest.raises(FarError, match="would differ from the model by|can't be written"): export_model(far, tmp_path / "far.pt")
    assert not list(tmp_path.iterdir())


def test_mistakes_are_named_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(far_nb.export, "PortableFAR", lambda *a, **k: pytest.fail("began to work"))
    with pytest.raises(FarError, match="unknown format 'gguf': choose one of"): export_model(build("lama"), tmp_path / "far.pt", "gguf")
    with pytest.raises(FarError, match="is a folder: name the file"): export_model(build("lama"), tmp_path)
    with pytest.raises(FarError, match="adaptive_max_pool2d"): export_model(build("contextual"), tmp_path / "far.onnx", "onnx")


def test_the_command(tmp_path, monkeypatch, capsys):
    build("lama").save_pretrained(tmp_path / "model")
    shown = CliRunner().invoke(app, ["export", "-o", str(tmp_path / "far.pt"), "--model", str(tmp_path / "model")])
    assert shown.exit_code == 0 and (tmp_path / "far.pt").is_file()
    md5 = hashlib.md5((tmp_path / "far.pt").read_bytes()).hexdigest()
    assert f"LAMA_MODEL_URL={(tmp_path / 'far.pt').as_uri()} LAMA_MODEL_MD5={md5} iopaint start --model lama" in shown.stdout
    monkeypatch.setattr("sys.argv", ["far", "export", "-o", str(tmp_path / "x.pt"), "--model", str(tmp_path / "nothing")])
    with pytest.raises(SystemExit) as left: main()
    line, = capsys.readouterr().err.splitlines()
    assert left.value.code == 2 and "does not exist" in line
