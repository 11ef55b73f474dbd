"""The model in the package: small, whole, documented, and still as good as when it was put there."""
from pathlib import Path

import pytest
import torch

from far_nb.core import read_json
from far_nb.data import test_set as fixed_pictures
from far_nb.evaluation import composite_uint8, psnr
from far_nb.export import export_model
from far_nb.far import DEFAULT_MODEL, FAR, shipped_models
from far_nb.inpaint import get_method, inpaint

FOLDER = Path(__file__).parent.parent / "far_nb" / "weights" / DEFAULT_MODEL


@pytest.fixture(scope="module")
def far(): return FAR.from_pretrained()


def test_the_package_brings_one_model_below_fourteen_megabytes(far):
    assert DEFAULT_MODEL in shipped_models() and far.mae is not None and not far.training
    assert (FOLDER / "model.safetensors").stat().st_size < 14_000_000
    assert {parameter.dtype for parameter in far.parameters()} == {torch.float32}
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    for word in ("8,207 photographs", "steps × batch", "HR scenes: FAR", "Limits", "surrogates"): assert word in card
    assert "/home" not in card and (FOLDER / "sample.jpg").exists()


def test_a_sample_photograph_comes_out_as_recorded(far):
    check = read_json(FOLDER / "check.json")
    found = fixed_pictures(check["source"], check["size"], check["picture"] + 1)
    assert found["names"][-1] == check["name"]                                               # its pixels differ a little between versions of Pillow
    image, mask = found["images"][-1:], found["masks"][-1:]
    filled = composite_uint8(image, mask, get_method(far)(image, mask))[0].movedim(0, -1).numpy()
    true = (image[0] * 255).round().byte().movedim(0, -1).numpy()
    assert psnr(filled, true, "standard") == pytest.approx(check["psnr"], abs=0.05)          # as the kernels of another machine do
    empty = (true * (mask[0, 0].numpy() == 0)[..., None]).astype("uint8")
    assert check["psnr"] > psnr(empty, true, "standard") + 5                                  # it does fill the hole


def test_inpaint_takes_it_by_default(far):
    check = read_json(FOLDER / "check.json")
    found = fixed_pictures(check["source"], 96, 1)
    image, mask = found["images"][0], found["masks"][0, 0]
    assert torch.equal(inpaint(image, mask), inpaint(image, mask, far))
    assert torch.equal(inpaint(image, mask)[:, mask == 0], image[:, mask == 0])


def test_as_torchscript_it_is_the_same(far, tmp_path):
    export_model(far, tmp_path / "far.pt")
    model, generator = torch.jit.load(tmp_path / "far.pt"), torch.Generator().manual_seed(0)
    for height, width in ((256, 256), (512, 512), (320, 448)):
        image, mask = torch.rand(1, 3, height, width, generator=generator), torch.zeros(1, 1, height, width)
        mask[..., height // 4:height // 2, width // 3:-width // 5] = 1
        with torch.no_grad(): assert (model(image, mask) - far(image, mask)).abs().max() < 1e-4
