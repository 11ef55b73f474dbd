"""Many processes train the network that one would have trained, and none of them waits for one that is gone."""
import multiprocessing, os, re, signal, socket, subprocess, sys, time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from accelerate import PartialState
from hypothesis import given, strategies as st

from far_nb import evaluation, training
from far_nb.acr import ACR, ACRConfig
from far_nb.core import FarError
from far_nb.data import InpaintingDataset
from far_nb.discriminator import PatchDiscriminator
from far_nb.evaluation import evaluate, quick_evaluate, share_of
from far_nb.far import FAR
from far_nb.mae import MAE
from far_nb.training import TrainConfig, _Peer, _verdict, finetune_hr, pretrain_mae, train_far
from test_training import dataset, newest, small_mae, tensors

MAE_RUN = TrainConfig(steps=10, batch_size=4, betas=(0.9, 0.95), weight_decay=0.05, log_every=1, save_every=5)
FAR_RUN = TrainConfig(steps=10, batch_size=4, log_every=1, save_every=5, ema=0.9)
RUNS = {"mae": MAE_RUN, "partial": replace(MAE_RUN, gradient_accumulation=2), "far": FAR_RUN, "hr": replace(FAR_RUN, gradient_accumulation=2)}


class Double(InpaintingDataset):
    def __getitem__(self, address): return {name: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
                                            for name, value in super().__getitem__(address).items()}


@contextmanager
def precisely():
    "In double precision: whether two computations are the same is not to be seen in float32, where adversaries magnify one rounding to a percent in ten steps."
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double
    try: yield
    finally:
        del torch.Tensor.float
        torch.set_default_dtype(torch.float32)


def train(kind, out, config=None, hook=None, **options):
    "One of the four trainings; returns its terms (steps, terms), unrounded. `hook` is called before each pass of the network."
    config, seen, checked = config or RUNS[kind], [], training._Run.checked
    training._Run.checked = lambda run, step: (seen.append(checked(run, step)), seen[-1])[1]
    data = dataset("mae" if kind in ("mae", "partial") else "far", **options)
    if torch.get_default_dtype() == torch.float64: data.__class__ = Double
    mae = small_mae()
    if hook: mae.register_forward_pre_hook(lambda *_: hook())
    try:
        if kind in ("mae", "partial"):
            if kind == "partial":
                mae = MAE(replace(mae.config, partial=True))
                mae.alpha.data.fill_(0.5)
            pretrain_mae(mae, data, config, out)
        else:
            acr, discriminator = ACR(ACRConfig(width=8, blocks=1, prior_width=16, prior_stride=8, grid=4, alpha="one")), PatchDiscriminator(8)
            begin, more = (finetune_hr, {"sizes": (40, 32)}) if kind == "hr" else (train_far, {})
            begin(FAR(mae, acr), data, config, out, discriminator=discriminator, perceptual=None, **more)
    finally: training._Run.checked = checked
    return torch.cat(seen) if seen else None


FORKS = multiprocessing.get_context("forkserver")       # imports once, and has no GPU in use that its forks could not share
FORKS.set_forkserver_preload(["far_nb.training", "pytest", "hypothesis", "pandas", "tensorboard.summary.writer.event_file_writer"])


def _child(function, rank, environment, out, arguments):
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    for number, name in ((1, "stdout"), (2, "stderr")): os.dup2(os.open(out / f"{name}{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    function(rank, *arguments)


class Launch:
    "`function(rank, *arguments)` in two processes, without a launcher that would end them."

    def __init__(self, out, function, *arguments, **environment):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                        "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
        self.out = out
        out.mkdir(parents=True, exist_ok=True)
        self.children = [FORKS.Process(target=_child, args=(function, rank, environment, out, arguments)) for rank in range(2)]
        for child in self.children: child.start()

    def codes(self, seconds):
        "Exit codes, within a deadline."
        deadline = time.monotonic() + seconds
        for child in self.children: child.join(max(deadline - time.monotonic(), 0))
        late = [child for child in self.children if child.is_alive()]
        for child in late: child.kill()
        assert not late, f"{len(late)} of 2 still there after {seconds} s: {self.read('stderr')}"
        return [child.exitcode for child in self.children]

    def read(self, name): return "".join((self.out / f"{name}{rank}").read_text() for rank in range(2))

    @property
    def told(self): return [line for line in self.read("stderr").splitlines() if "far: " in line]


# ---- the same network

def compared(rank, out):
    "What the two processes do whose results are held against those of one."
    with precisely():
        for kind in RUNS:
            terms = train(kind, out / kind)
            if rank == 0: torch.save(terms, out / f"{kind}.pt")
        train("far", out / "shrinks", replace(FAR_RUN, steps=5))
        terms = train("far", out / "grows", FAR_RUN)
        if rank == 0: torch.save(terms, out / "grows.pt")
    torch.save(judged(True), out / f"judged{rank}.pt")

    def judge(part):
        if part.start == 32: raise FarError("the 33rd picture is bad")
        return {"PSNR": [0.0] * 32}
    with pytest.raises(FarError, match="the 33rd picture is bad"): evaluation._in_shares(judge, 33, 16, shared=True)      # in both processes


def judged(shared):
    "Evaluations of 37 pictures (32 for the first process, 5 for the second) and of 3 (none for the second)."
    if shared: PartialState()
    torch.manual_seed(1)
    far = FAR(None, ACR(ACRConfig(width=4, blocks=1, prior_width=None, attention="none")))
    images = torch.rand(37, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    masks = (images[:, :1] > 0.6).float()
    result = evaluate(far, images[:3], masks[:3], names=["a", "b", "c"], shared=shared)
    return quick_evaluate(far, images, masks, shared=shared), result["metrics"], result["per_image"]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    "All four trainings by one process."
    out = tmp_path_factory.mktemp("one")
    with precisely(): return out, {kind: train(kind, out / kind) for kind in RUNS}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    "The same by two processes, who also go on where one has begun."
    out = tmp_path_factory.mktemp("two")
    with precisely(): train("far", out / "grows", replace(FAR_RUN, steps=5))
    launch = Launch(out, compared, out)
    assert launch.codes(300) == [0, 0], launch.read("stderr")
    return launch


@pytest.mark.parametrize("kind", RUNS)
def test_two_processes_are_one(kind, one, two):
    "Losses of ten steps, and all weights, averages, running statistics and optimiser states; of micro-batches too."
    torch.testing.assert_close(torch.load(two.out / f"{kind}.pt"), one[1][kind], rtol=1e-5, atol=0)
    left, right = (tensors(newest(out / kind)["task"]) for out in (one[0], two.out))
    assert left.keys() == right.keys() and len(left) > 20
    torch.testing.assert_close(right, left, rtol=1e-5, atol=1e-7)


def test_number_of_processes_may_change_on_the_way(one, two, capsys):
    torch.testing.assert_close(torch.load(two.out / "grows.pt"), one[1]["far"][5:], rtol=1e-5, atol=0)
    assert "grows goes on after step 5 with 2 instead of 1 processes (the random numbers of process 1 begin with the seed); the order of the pictures stays\n" \
        in two.read("stdout") and two.read("stdout").count("goes on") == 1
    with precisely(): terms = train("far", two.out / "shrinks")
    torch.testing.assert_close(terms, one[1]["far"][5:], rtol=1e-5, atol=0)
    assert "shrinks goes on after step 5 with 1 instead of 2 processes (the random numbers of process 1 are dropped); the order" in capsys.readouterr().out


def test_number_of_micro_batches_may_change_on_the_way(one, tmp_path, capsys):
    with precisely():
        train("mae", tmp_path / "mae", replace(MAE_RUN, steps=5))
        terms = train("mae", tmp_path / "mae", replace(MAE_RUN, gradient_accumulation=2))
        train("far", tmp_path / "far", replace(FAR_RUN, steps=1))
        train("far", tmp_path / "far", replace(FAR_RUN, steps=2, gradient_accumulation=4))
    torch.testing.assert_close(terms, one[1]["mae"][5:], rtol=1e-5, atol=0)
    out = capsys.readouterr().out
    assert "mae goes on after step 5 with 2 instead of 1 micro-batches a step; the order" in out
    assert "far goes on after step 1 with 4 instead of 1 micro-batches a step (batch norm sees 1 instead of 4 pictures at a time); the order" in out


def test_evaluation_is_shared_and_stays_the_same(two):
    alone = judged(False)
    assert [torch.load(two.out / f"judged{rank}.pt") for rank in range(2)] == [alone, alone]
    assert len(alone[2]["PSNR/standard"]) == 3


@given(count=st.integers(1, 200), unit=st.integers(1, 40), world=st.integers(1, 9))
def test_shares_are_whole_batches_of_neighbours_and_together_all(count, unit, world):
    state, parts = PartialState(), []
    try:
        for rank in range(world):
            state.num_processes, state.process_index = world, rank
            parts.append(range(count)[share_of(count, unit)])
    finally: state.num_processes, state.process_index = 1, 0
    assert [index for part in parts for index in part] == list(range(count))
    batches = -(-count // unit)
    assert all(part.start % unit == 0 for part in parts if part) and max(map(len, parts)) <= -(-batches // world) * unit


def test_the_user_s_networks_come_back_as_they_were():
    far = FAR(None, ACR(ACRConfig(width=4, blocks=1, prior_width=None, attention="none")))
    before = {name: type(layer) for name, layer in far.named_modules()}
    with training._global_batch_norms([far], 2): assert any(type(layer) is training._GlobalBatchNorm for layer in far.modules())
    assert before == {name: type(layer) for name, layer in far.named_modules()}
    with training._global_batch_norms([far], 1): assert before == {name: type(layer) for name, layer in far.named_modules()}


# ---- bad luck

def unlucky(rank, out, what):
    "A training in which something happens to one process, in step 4."
    config, calls, interrupt = replace(MAE_RUN, save_every=3, workers=int(what == "worker")), [], None
    who = {"first killed": 0}.get(what, 1)

    def happens():
        calls.append(what)
        if len(calls) < 4 or rank != who: return
        if "killed" in what: os.kill(os.getpid(), signal.SIGKILL)
        if what == "mistake": raise FarError("there is no such picture: choose another")
        if what == "bug": raise ValueError("boom")
    if what == "every": config = replace(config, batch_size=5)
    if what == "worker" and rank: interrupt = 8, signal.SIGKILL
    if what == "stuck" and rank: interrupt = 8, signal.SIGALRM          # the eighth picture, in step 4, is long in coming
    signal.signal(signal.SIGALRM, lambda *_: time.sleep(1000))
    train("mae", out / "run", config, hook=happens, interrupt=interrupt)


AGAIN = r"run again, it goes on from \S+step-00000003\.pt"


@pytest.mark.parametrize("what, codes, line", [
    ("first killed", [-9, 1], "process 0 of 2 is gone, and with it the place where all meet; " + AGAIN),
    ("mistake", [2, 2], "process 1 of 2 has ended: there is no such picture: choose another; " + AGAIN),
    ("bug", [1, 1], "process 1 of 2 has ended: ValueError: boom; " + AGAIN),
    ("worker", [2, 2], r"process 1 of 2 has ended: \S+: a data worker died \(.+\): .*it goes on from .+"),
    ("stuck", [1, 1], r"process 1 of 2 \(.*\) has not come further than the pictures of step 4 for 8 s; " + AGAIN),
    ("every", [2, 2], "batch_size 5 does not split over 2 processes with 1 micro-batches each: choose a multiple")])
def test_nobody_waits_for_one_that_is_gone(what, codes, line, tmp_path):
    "One line, from one process, within a minute, and no exit code 0."
    launch = Launch(tmp_path, unlucky, tmp_path, what, **({"FAR_NB_PATIENCE": "8"} if what == "stuck" else {}))
    assert launch.codes(60) == codes, launch.read("stderr")
    assert len(launch.told) == 1 and re.fullmatch("far: " + line, launch.told[0]), launch.read("stderr")
    assert not (tmp_path / "run/train.json").exists() and (what != "mistake" or "Traceback" not in launch.read("stderr"))


def test_killed_stopped_and_brought_to_its_end(tmp_path, capsys):
    "kill -9 of a process, SIGTERM to the launcher of the next two, and one process at last: the losses are those of a run that nobody disturbed."
    whole, out = train("mae", tmp_path / "whole"), tmp_path / "run"
    launch = Launch(tmp_path, unlucky, tmp_path, "killed")
    assert launch.codes(60) == [1, -9], launch.read("stderr")
    assert len(launch.told) == 1 and re.fullmatch(r"far: process 1 of 2 \(pid \d+ on \S+\) is gone without a word, last heard of at (the start|.*step [1-4]) "
                                                  r"\(killed, or out of memory\?\); " + AGAIN, launch.told[0]), launch.read("stderr")
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000003.pt"]

    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", __file__, str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    told = [line for line in ended.stderr.splitlines() if line.startswith("far: ")]
    assert ended.returncode != 0 and len(told) == 1 and re.match("far: SIGTERM after step [67] of 10; run again to go on from", told[0]), ended.stderr
    assert "goes on after" not in ended.stdout, "as many processes as before"
    stopped = newest(out)["step"]
    assert f"after step {stopped} of 10" in told[0] and sorted(path.name for path in (out / "checkpoints").iterdir())[-1] == f"step-{stopped:08d}.pt"

    terms = train("mae", out)
    assert f"goes on after step {stopped} with 1 instead of 2 processes" in capsys.readouterr().out
    torch.testing.assert_close(terms, whole[stopped:], rtol=1e-5, atol=0)
    logged = [pd.read_csv(folder / "log.csv").loss.tolist() for folder in (tmp_path / "whole", out)]
    assert logged[0] == pytest.approx(logged[1], rel=1e-5) and len(logged[0]) == 10


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 900), st.sampled_from([None, None, None, 0, 1, 2])), min_size=1, max_size=6))
def test_verdict(told):
    "Silent for `heard` seconds, in one place for `moved`, ended with `code`: blamed is one who deserves it, and nobody when all is well."
    peers = [_Peer(beat=1, moves=number, heard=1000 - heard, moved=1000 - max(heard, moved), code=code) for number, (heard, moved, code) in enumerate(told)]
    running = [peer for peer in peers if peer.code is None]
    guilty = [peer for peer in peers if peer.code] + [peer for peer in running if peer.heard < 980] + [peer for peer in running[:1] if peer.moved < 400]
    found = _verdict(peers, 1000, silence=20, patience=600)
    assert (found is None) == (not guilty) and (found is None or peers[found[0]] in guilty and found[2] > 0)


if __name__ == "__main__":                  # the launcher's program: in its third step the launcher is told to stop
    torch.set_num_threads(1)
    passes = []

    def happens():
        passes.append(1)
        if len(passes) == 3 and os.environ["RANK"] == "0":
            os.kill(os.getppid(), signal.SIGTERM)
            time.sleep(3)                   # until it has passed the signal on
    train("mae", Path(sys.argv[1]), hook=happens)
