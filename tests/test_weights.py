"Weights of others: every kind of released file, `far weights`, broken lines, wrong files, and the ADE20K network written out plainly."
import fcntl
import hashlib
import json
import os
import sys
import threading
from argparse import Namespace
from dataclasses import replace
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

from far_nb.acr import ACR, ACRConfig
from far_nb.checkpoints import fetch_weights, load_released, to_released
from far_nb.cli import app, main
from far_nb.core import FarError, normalise
from far_nb.far import FAR
from far_nb.mae import MAE, MAEConfig
from far_nb.perceptual import WEIGHTS, HRFLoss, MissingWeights, WeightsFile, _from_segmentation_names, find_weights


def refused(capsys, monkeypatch, *arguments) -> str:
    "The one line that a mistake gets."
    monkeypatch.setattr(sys, "argv", ["far", *map(str, arguments)])
    with pytest.raises(SystemExit) as left: main()
    line, = (line for line in capsys.readouterr().err.strip().splitlines() if line.startswith("far:"))
    assert left.value.code == 2
    return line


# ---- released files

def small(masked_position: bool = True, partial: bool = False) -> FAR:
    torch.manual_seed(0)
    sizes = {"image_size": 64, "width": 48, "depth": 1, "decoder_width": 32, "decoder_depth": 2}      # patches and heads are the paper's
    mae = MAE(MAEConfig(partial=partial, **sizes))
    return FAR(mae, ACR(ACRConfig(width=8, blocks=1, prior_width=32, grid=4, masked_position=masked_position))).eval()


def part(far: FAR, prefix: str) -> dict:
    return {key.removeprefix(prefix): value for key, value in to_released(far).items() if key.startswith(prefix)}


def same(ours: torch.nn.Module, theirs: torch.nn.Module) -> bool:
    ours, theirs = ours.state_dict(), theirs.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.fixture
def files(tmp_path, monkeypatch):
    "The three kinds of file, with all that the authors' code and Lightning of that time put into them."
    far = small()
    callback = type("ModelCheckpoint", (), {"__module__": "pytorch_lightning.callbacks.model_checkpoint"})
    library = ModuleType(callback.__module__)
    library.ModelCheckpoint = callback
    with monkeypatch.context() as patch:                  # what pickle asks for when it writes a class
        for name in ("pytorch_lightning", "pytorch_lightning.callbacks"): patch.setitem(sys.modules, name, ModuleType(name))
        patch.setitem(sys.modules, callback.__module__, library)
        training = {f"{name}.weight": torch.zeros(2) for name in ("D.conv1.0", "acr_ema.G.conv1", "loss_resnet_pl.impl.conv1")}
        optimiser = torch.optim.Adam(far.acr.parameters())
        torch.save({"state_dict": to_released(far) | training, "callbacks": {callback: {"best_model_score": torch.tensor(1.0)}}, "epoch": 3,
                    "optimizer_states": [optimiser.state_dict()], "lr_schedulers": [{"last_epoch": 5}], "pytorch-lightning_version": "1.4.9"},
                   tmp_path / "last.ckpt")
    torch.save({"model": far.mae.state_dict(), "optimizer": optimiser.state_dict(), "epoch": 199, "scaler": {"scale": 65536.0},
                "args": Namespace(model="mae_vit_base_patch16", lr=1e-4, mask_path=["a.txt"])}, tmp_path / "checkpoint-last.pth")
    torch.save({"iteration": 7, "generator": part(far, "acr.G."), "gc_encoder": part(far, "acr.GCs."), "acr_opt": optimiser.state_dict()},
               tmp_path / "G_last.pth")
    torch.save({"discriminator": {"conv1.0.weight": torch.zeros(1)}, "d_opt": {}}, tmp_path / "D_last.pth")
    return far, tmp_path


def test_each_kind_of_file_gives_its_network(files):
    far, folder = files
    whole, mae = load_released(folder / "last.ckpt"), load_released(folder / "checkpoint-last.pth")
    both = load_released(folder / "G_last.pth", mae=folder / "checkpoint-last.pth")
    assert isinstance(whole, FAR) and isinstance(mae, MAE) and isinstance(both, FAR)
    assert same(whole, far) and same(mae, far.mae) and same(both, far)
    assert same(load_released(folder / "G_last.pth", mae=folder / "last.ckpt"), far)           # the MAE inside a Lightning checkpoint serves too
    assert not any(module.training for network in (whole, mae, both) for module in network.modules())


@pytest.mark.parametrize("masked_position, partial", [(False, False), (True, True)])
def test_options_are_read_off_the_tensors(tmp_path, masked_position, partial):
    far = small(masked_position, partial)
    torch.save({"state_dict": to_released(far)}, tmp_path / "last.ckpt")
    loaded = load_released(tmp_path / "last.ckpt")
    assert same(loaded, far) and loaded.acr.config == far.acr.config and loaded.mae.config == far.mae.config
    image, mask = torch.rand(1, 3, 64, 64), torch.zeros(1, 1, 64, 64)
    mask[..., 20:50, 20:50] = 1
    with torch.no_grad(): assert torch.equal(loaded(image, mask), far(image, mask))


def test_an_alpha_outside_its_range_means_what_the_released_code_makes_of_it(tmp_path):
    far = small(partial=True)
    torch.save({"model": far.mae.state_dict() | {"alpha": torch.tensor(1.3)}}, tmp_path / "mae.pth")
    assert load_released(tmp_path / "mae.pth").effective_alpha() == 1                           # clamped


@pytest.mark.parametrize("name, mae, said", [("G_last.pth", None, r"MAE is missing.*--mae FILE"),
                                             ("last.ckpt", "checkpoint-last.pth", "MAE of its own"),
                                             ("G_last.pth", "G_last.pth", "holds no MAE"), ("D_last.pth", None, "generator and gc_encoder"),
                                             ("absent.ckpt", None, "does not exist")])
def test_combinations_that_make_no_network(files, name, mae, said):
    with pytest.raises(FarError, match=said): load_released(files[1] / name, mae and files[1] / mae)


def test_wrong_keys_are_named_as_in_the_file_five_of_each_with_shapes(files):
    far, folder = files
    state = to_released(far)
    generator = [key for key in state if key.startswith("acr.G.middle.0.ffc1") and state[key].ndim]
    wrong = {key: value for key, value in state.items() if key not in generator[:7]} | {"acr.G.conv2.weight": torch.zeros(3, 2)}
    torch.save({"state_dict": wrong}, folder / "wrong.ckpt")
    with pytest.raises(FarError) as error: load_released(folder / "wrong.ckpt")
    message = str(error.value)
    assert message.startswith(f"{folder / 'wrong.ckpt'}: ") and "7 missing" in message and "\n" not in message
    assert all(f"{key} {tuple(state[key].shape)}" in message for key in generator[:5]) and not any(key in message for key in generator[5:])
    assert "1 mis-shaped: acr.G.conv2.weight (3, 2) instead of (16, 8, 3, 3)" in message
    for changed, said in (({"mae.cls_token": torch.zeros(1, 1, 48)}, r"1 extra: mae\.cls_token \(1, 1, 48\)"),
                          ({"head.bias": torch.zeros(4)}, r"head\.bias \(4,\)"), ({"mae.patch_embed.proj.weight": torch.zeros(3)}, "sizes")):
        torch.save({"state_dict": state | changed}, folder / "wrong.ckpt")
        with pytest.raises(FarError, match=said): load_released(folder / "wrong.ckpt")
    torch.save({"state_dict": {key: value for key, value in state.items() if key != "mae.mask_token"}}, folder / "wrong.ckpt")
    with pytest.raises(FarError, match=r"needs the key mae\.mask_token"): load_released(folder / "wrong.ckpt")


class Code:
    def __reduce__(self): return os.system, ("touch owned",)


def test_a_pickle_with_code_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": small().mae.state_dict(), "args": Code()}, "code.pth")
    line = refused(capsys, monkeypatch, "weights", "import", "code.pth", "-o", "model")
    assert "code.pth" in line and "system, which could run code" in line
    assert not os.path.exists("owned") and not os.path.exists("model")


def test_import_writes_what_from_pretrained_reads_and_says_what_it_found(files, monkeypatch, capsys):
    far, folder = files
    run = lambda *arguments: CliRunner().invoke(app, ["weights", "import", *map(str, arguments)])
    done = run(folder / "last.ckpt", "-o", folder / "far")
    assert done.exit_code == 0, done.output
    for said in ("FAR", "64 px", "with masked positions", f"{sum(p.numel() for p in far.mae.parameters()):,} parameters"): assert said in done.output
    assert same(FAR.from_pretrained(folder / "far"), far)
    source = json.loads((folder / "far/source.json").read_text())
    assert source["files"] == {"last.ckpt": hashlib.sha256((folder / "last.ckpt").read_bytes()).hexdigest()}
    line = refused(capsys, monkeypatch, "weights", "import", folder / "checkpoint-last.pth", "-o", folder / "far")
    assert "replace the model with --overwrite" in line
    assert same(FAR.from_pretrained(folder / "far"), far)
    assert run(folder / "checkpoint-last.pth", "-o", folder / "far", "--overwrite").output.startswith("MAE\n")
    assert same(MAE.from_pretrained(folder / "far"), far.mae)
    assert run(folder / "G_last.pth", "--mae", folder / "checkpoint-last.pth", "-o", folder / "both").exit_code == 0
    assert same(FAR.from_pretrained(folder / "both"), far)


# ---- fetching

class Server(ThreadingHTTPServer):
    "One file at one address, with ranges; `cut` breaks the line after so many bytes of an answer."

    def __init__(self, content: bytes):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.cut, self.ranges, self.modified, self.asked = content, None, True, formatdate(1.5e9, usegmt=True), []
        self.url = f"http://127.0.0.1:{self.server_port}/models/net.pth"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *arguments): pass

    def do_GET(self):
        server, wanted = self.server, self.headers["Range"]
        server.asked.append(wanted)
        if not self.path.endswith("net.pth"): return self.send_error(404)
        start = int(wanted[6:-1]) if wanted and server.ranges and self.headers["If-Range"] in (None, server.modified) else 0
        if start >= len(server.content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(server.content)}")
            return self.end_headers()
        body = server.content[start:]
        self.send_response(206 if start else 200)
        for name, value in {"Content-Length": len(body), "Last-Modified": server.modified}.items(): self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body[:server.cut])


@pytest.fixture
def server():
    server = Server(bytes(range(256)) * 40_000)            # 10 MB: several pieces
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown(), server.server_close(), thread.join()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    "Where weights go; empty."
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("FAR_NB_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path / "weights"


@pytest.fixture
def net(server, folder, monkeypatch):
    "A network of a known SHA-256 in the table."
    weights = WeightsFile("a network", server.url, hashlib.sha256(server.content).hexdigest(), len(server.content))
    monkeypatch.setitem(WEIGHTS, "net", weights)
    return weights


def test_fetched_once_then_only_checked(server, net, folder):
    path = fetch_weights("net")
    assert path == folder / "net.pth" == find_weights("net.pth", "a network's") and path.read_bytes() == server.content
    assert [file.name for file in folder.iterdir()] == ["net.pth"]
    assert fetch_weights("net") == path and server.asked == [None]
    path.write_bytes(b"torn")
    with pytest.raises(FarError, match="SHA-256.*delete it"): fetch_weights("net")


def test_a_broken_download_goes_on_where_it_stopped(server, net, folder, capsys, monkeypatch):
    server.cut = 3_000_000
    line = refused(capsys, monkeypatch, "weights", "fetch", "net")
    assert server.url in line and "3,000,000 of 10,240,000" in line and "--from" in line and not (folder / "net.pth").exists()
    with pytest.raises(FarError, match="6,000,000 of 10,240,000"): fetch_weights("net")
    server.cut = None
    assert fetch_weights("net").read_bytes() == server.content
    assert server.asked == [None, "bytes=3000000-", "bytes=6000000-"]


@pytest.mark.parametrize("change", ["file", "ranges"])
def test_a_first_part_of_no_use_is_fetched_again(server, net, change):
    server.cut = 3_000_000
    with pytest.raises(FarError): fetch_weights("net")
    server.cut, server.asked = None, []
    if change == "file": server.content, server.modified = server.content[::-1], formatdate(1.6e9, usegmt=True)
    else: server.ranges = False
    WEIGHTS["net"] = replace(net, sha256=hashlib.sha256(server.content).hexdigest())
    assert fetch_weights("net").read_bytes() == server.content and server.asked == ["bytes=3000000-"]


def test_killed_between_the_last_byte_and_the_check(server, net, folder):
    folder.mkdir()
    (folder / ".net.pth.part").write_bytes(server.content)
    os.utime(folder / ".net.pth.part", (1.5e9, 1.5e9))
    assert fetch_weights("net").read_bytes() == server.content and server.asked == [f"bytes={len(server.content)}-"]
    (folder / "net.pth").rename(folder / ".net.pth.part")
    with open(folder / ".net.pth.part", "ab") as file: file.write(b"more than there is")
    os.utime(folder / ".net.pth.part", (1.5e9, 1.5e9))
    with pytest.raises(FarError, match="the same command"): fetch_weights("net")
    assert fetch_weights("net").read_bytes() == server.content


def test_a_wrong_file_is_not_kept(server, net, folder):
    server.content = server.content[:-1] + b"?"
    with pytest.raises(FarError, match="SHA-256.*official.*nothing was kept"): fetch_weights("net")
    assert not list(folder.iterdir())


def test_no_answer_is_one_line(server, net, folder, capsys, monkeypatch):
    monkeypatch.setitem(WEIGHTS, "net", replace(net, url=server.url + "x"))
    assert "Not Found" in refused(capsys, monkeypatch, "weights", "fetch", "net")
    silent = Server(b"")
    silent.server_close()                                   # nobody listens there any more
    monkeypatch.setitem(WEIGHTS, "net", replace(net, url=silent.url))
    line = refused(capsys, monkeypatch, "weights", "fetch", "net")
    assert silent.url in line and "refused" in line and "--from PATH" in line
    assert not list(folder.iterdir())


def test_two_at_a_time_are_refused(net, folder):
    folder.mkdir()
    with open(folder / ".net.pth.part", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(FarError, match="another process"): fetch_weights("net")


def test_a_local_copy_gets_the_same_checks(server, net, folder, tmp_path, capsys, monkeypatch):
    for place in ("net.pth", "folder/net.pth", "mirror/models/net.pth"):
        copy = tmp_path / "copies" / place
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(server.content)
    for given in ("net.pth", "folder", "mirror"):
        done = CliRunner().invoke(app, ["weights", "fetch", "net", "--from", str(tmp_path / "copies" / given)])
        assert done.exit_code == 0 and (folder / "net.pth").read_bytes() == server.content
        (folder / "net.pth").unlink()
    (tmp_path / "copies/net.pth").write_bytes(b"another file")
    assert "SHA-256" in refused(capsys, monkeypatch, "weights", "fetch", "net", "--from", tmp_path / "copies/net.pth")
    assert "there is no" in refused(capsys, monkeypatch, "weights", "fetch", "net", "--from", tmp_path / "nowhere")
    assert "one file" in refused(capsys, monkeypatch, "weights", "fetch", "all", "--from", tmp_path / "copies/net.pth")
    assert "ade20k, alexnet, all, inception" in refused(capsys, monkeypatch, "weights", "fetch", "vgg").replace(", net", "")
    assert not list(folder.iterdir()) and not server.asked


def test_the_table_and_the_hints(folder):
    for weights in WEIGHTS.values():
        prefix = weights.filename.removesuffix(".pth").rpartition("-")[2]
        assert weights.sha256 is None or len(weights.sha256) == 64 and weights.sha256.startswith(prefix)
    with pytest.raises(MissingWeights, match=f"run far weights fetch ade20k, or put encoder_epoch_20.pth into {folder}"): HRFLoss()
    with pytest.raises(MissingWeights, match="absent: put other.pth"): find_weights("other.pth", "another network's")
    folder.mkdir()
    (folder / WEIGHTS["alexnet"].filename).write_bytes(b"")
    listed = CliRunner().invoke(app, ["weights", "list"]).output.splitlines()
    assert str(folder) in listed[0] and "absent; 96 MB at https://" in listed[1] and "size unknown" in listed[2]


# ---- the ADE20K network

BLOCKS = (3, 4, 6, 3)


def encoder_shapes() -> dict[str, tuple[int, ...]]:
    "Names and shapes of the released encoder: a ResNet50 whose stem has three convolutions."
    shapes, channels = {}, 128
    def layer(convolution, norm, out, into, kernel):
        shapes[f"{convolution}.weight"] = (out, into, kernel, kernel)
        for name in ("weight", "bias", "running_mean", "running_var"): shapes[f"{norm}.{name}"] = (out,)
    for number, (out, into) in enumerate([(64, 3), (64, 64), (128, 64)], start=1): layer(f"conv{number}", f"bn{number}", out, into, 3)
    for stage, count in enumerate(BLOCKS, start=1):
        width = 32 << stage
        for index in range(count):
            name = f"layer{stage}.{index}"
            for number, (out, into, kernel) in enumerate([(width, channels, 1), (width, width, 3), (4 * width, width, 1)], start=1):
                layer(f"{name}.conv{number}", f"{name}.bn{number}", out, into, kernel)
            if index == 0: layer(f"{name}.downsample.0", f"{name}.downsample.1", 4 * width, channels, 1)
            channels = 4 * width
    return shapes


@pytest.fixture(scope="module")
def encoder() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, shape in encoder_shapes().items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 4: state[key] = noise * (2 / noise[0].numel()) ** 0.5
        else: state[key] = 1 + 0.1 * noise.abs() if key.endswith(("running_var", "weight")) else 0.1 * noise
        if ".bn3.weight" in key: state[key] *= 0.3          # 16 residual branches: keep their sum tame
    return state


def plain_features(state: dict[str, torch.Tensor], x: torch.Tensor) -> list[torch.Tensor]:
    "The released network's four maps: strides 1, 2, 1, 1 and, instead of the last two strides, dilations 2 and 4."
    def layer(x, convolution, norm, stride=1, dilation=1):
        weight = state[f"{convolution}.weight"]
        x = F.conv2d(x, weight, stride=stride, padding=dilation * (weight.shape[-1] // 2), dilation=dilation)
        return F.batch_norm(x, *(state[f"{norm}.{name}"] for name in ("running_mean", "running_var", "weight", "bias")))
    for number in (1, 2, 3): x = layer(x, f"conv{number}", f"bn{number}", stride=2 if number == 1 else 1).relu()
    x, maps = F.max_pool2d(x, 3, 2, 1), []
    for stage, (count, stride, dilations) in enumerate(zip(BLOCKS, (1, 2, 1, 1), ((1, 1), (1, 1), (1, 2), (2, 4))), start=1):
        for index in range(count):                          # a stage's first block: its stride, and the dilation before it
            name, first = f"layer{stage}.{index}", index == 0
            inner = layer(x, f"{name}.conv1", f"{name}.bn1").relu()
            inner = layer(inner, f"{name}.conv2", f"{name}.bn2", stride if first else 1, dilations[0] if first else dilations[1]).relu()
            inner = layer(inner, f"{name}.conv3", f"{name}.bn3")
            x = (inner + (layer(x, f"{name}.downsample.0", f"{name}.downsample.1", stride) if first else x)).relu()
        maps.append(x)
    return maps


def test_hrf_network_is_the_released_one(encoder):
    loss = HRFLoss(encoder)
    ours = {key for key in loss.network.state_dict() if not key.endswith("num_batches_tracked")}
    assert set(_from_segmentation_names(encoder)) == ours and len(ours) == len(encoder) == 275       # each tensor has one place, none is left
    image = torch.rand(1, 3, 72, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(): pairs = list(zip(loss.network(normalise(image)), plain_features(encoder, normalise(image))))
    assert [theirs.shape[1] for _, theirs in pairs] == [256, 512, 1024, 2048]
    for map_, theirs in pairs: assert torch.allclose(map_, theirs, atol=1e-4 * float(theirs.abs().max()))      # fifty layers of float32


def test_without_a_known_hash_the_first_file_is_remembered(encoder, folder, tmp_path, monkeypatch):
    assert WEIGHTS["ade20k"].sha256 is None
    copy = tmp_path / "copies/ade20k-resnet50dilated-ppm_deepsup/encoder_epoch_20.pth"        # as wget leaves it for LaMa
    copy.parent.mkdir(parents=True)
    copy.write_bytes(b"<html>log in first</html>")
    with pytest.raises(FarError, match="not a readable state dict.*nothing was kept"): fetch_weights("ade20k", tmp_path / "copies")
    torch.save({"conv1.weight": torch.zeros(1)}, copy)
    with pytest.raises(FarError, match="not an ADE20K.*nothing was kept"): fetch_weights("ade20k", tmp_path / "copies")
    assert not list(folder.iterdir())
    torch.save(encoder, copy)
    done = CliRunner().invoke(app, ["weights", "fetch", "ade20k", "--from", str(tmp_path / "copies")])
    assert done.exit_code == 0 and "no official SHA-256 is known" in done.output
    path = folder / "encoder_epoch_20.pth"
    assert (folder / "encoder_epoch_20.pth.sha256").read_text() == f"{hashlib.sha256(path.read_bytes()).hexdigest()}  encoder_epoch_20.pth\n"
    HRFLoss()                                               # found where it was put
    path.unlink()
    torch.save(encoder | {"conv1.weight": encoder["conv1.weight"] + 1}, copy)
    with pytest.raises(FarError, match="the one in .*sha256.*nothing was kept"): fetch_weights("ade20k", tmp_path / "copies")
    assert not path.exists()
