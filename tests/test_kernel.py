"""nbs/paper/warm.py: a job forked from the zygote is what `python -m` would have made of it, and no process outlives what it belongs to."""
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import nbformat
import psutil
import pytest

from far_nb.cli import _kernels, paper_notebooks

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere every job imports for itself")
WARM = paper_notebooks() / "warm.py"
THREADS = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
PROBE = """
import json, os, signal, sys, time
def tell(**more):
    state = {"argv": sys.argv, "folder": os.getcwd(), "path": sys.path, "environment": {k: v for k, v in os.environ.items() if k.startswith(("PROBE", "OMP"))},
             "signals": [str(signal.getsignal(number)) for number in (2, 15, 17)], "main": __name__, "file": __file__}
    print(json.dumps({"state": state, "pid": os.getpid(), "forked": "numpy" in sys.modules, **more}), flush=True)
if sys.argv[1] == "tell": tell(said=sys.stdin.read())
elif sys.argv[1] == "exit": sys.exit(eval(sys.argv[2]))
elif sys.argv[1] == "raise": raise RuntimeError("an error of ours")
elif sys.argv[1] == "die": os.kill(os.getpid(), signal.SIGKILL)
elif sys.argv[1] == "random": import numpy, random, torch; print(numpy.random.random(), random.random(), torch.initial_seed())
elif sys.argv[1] == "wait":
    for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, lambda number, frame: sys.exit(40 + number))
    tell(); time.sleep(60)
"""


@contextmanager
def serving(warm: Path, folder: Path, threads: str = "1", command: str = "exec sleep 600"):
    "A command with a zygote beside it; gives the command's process and the environment of its jobs."
    script = f'echo "$FAR_WARM"; echo "$JUPYTER_PATH"; {command}'
    process = subprocess.Popen([sys.executable, warm, "serve", threads, "sh", "-c", script], cwd=folder, stdout=subprocess.PIPE, text=True,
                               env=os.environ | THREADS, start_new_session=True)
    try:
        name, path = (process.stdout.readline().strip() for _ in range(2))
        yield process, os.environ | THREADS | {"FAR_WARM": name, "JUPYTER_PATH": path}
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture
def light(tmp_path):
    "warm.py with one library, so that its zygote is there at once, and a module to run."
    (tmp_path / "probe.py").write_text(PROBE)
    (tmp_path / "warm.py").write_text(re.sub(r"^LIBRARIES = \(.*?\)$", 'LIBRARIES = ("numpy",)', WARM.read_text(), count=1, flags=re.M | re.S))
    return tmp_path / "warm.py"


def job(warm: Path | None, environment: dict[str, str], *arguments: str, **options) -> subprocess.CompletedProcess:
    "The probe run by warm.py, or by `python -m` when that is None."
    before = [sys.executable, str(warm)] if warm else [sys.executable, "-m"]
    return subprocess.run([*before, "probe", *arguments], env=environment, capture_output=True, text=True, timeout=60, **options)


@contextmanager
def waiting(warm: Path, environment: dict[str, str], **options):
    "A probe that waits for signals: the process that stands for it, and its own pid."
    process = subprocess.Popen([sys.executable, warm, "probe", "wait"], env=environment, cwd=warm.parent, stdout=subprocess.PIPE, text=True, **options)
    try:
        told = json.loads(process.stdout.readline())
        assert told["forked"] and told["pid"] != process.pid
        yield process, told["pid"]
    finally:
        process.kill()
        process.communicate()


def ends(*pids: int, within: float = 10) -> bool:
    deadline = time.monotonic() + within
    alive = lambda pid: psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    while any(map(alive, pids)):
        if time.monotonic() > deadline: return False
        time.sleep(0.05)
    return True


def test_a_forked_job_has_what_python_would_have_given_it(light):
    with serving(light, light.parent) as (_, environment):
        elsewhere = light.parent / "elsewhere"
        elsewhere.mkdir()
        (elsewhere / "probe.py").write_text(PROBE)
        environment |= {"PROBE": "a value\nwith ünicode and \udcff"}
        forked, ordinary = (json.loads(job(warm, environment, "tell", "x y", cwd=elsewhere, input="some input").stdout) for warm in (light, None))
        assert forked["forked"] and not ordinary["forked"]
        assert forked["state"] == ordinary["state"] and forked["said"] == "some input"


@pytest.mark.parametrize("arguments, status", [(["exit", "0"], 0), (["exit", "None"], 0), (["exit", "3"], 3), (["exit", "'why'"], 1), (["raise"], 1)])
def test_exit_status_and_messages(light, arguments, status):
    with serving(light, light.parent) as (_, environment):
        forked, ordinary = (job(warm, environment, *arguments, cwd=light.parent) for warm in (light, None))
        assert forked.returncode == ordinary.returncode == status and forked.stdout == ordinary.stdout
        assert forked.stderr.splitlines()[-1:] == ordinary.stderr.splitlines()[-1:]
        assert job(light, environment, "die", cwd=light.parent).returncode != 0


def test_signals_reach_the_forked_job(light):
    with serving(light, light.parent) as (_, environment):
        for number in (signal.SIGINT, signal.SIGTERM):
            with waiting(light, environment) as (process, pid):
                process.send_signal(number)
                assert process.wait(10) == 40 + number and ends(pid)


def test_a_job_ends_with_the_process_that_stands_for_it_and_with_its_parent(light):
    with serving(light, light.parent) as (_, environment):
        with waiting(light, environment) as (process, pid):
            process.kill()
            assert ends(pid)
        parent = subprocess.Popen([sys.executable, "-c", "import subprocess, sys; subprocess.Popen(sys.argv[1:], start_new_session=True).wait()",
                                   sys.executable, light, "probe", "wait"], env=environment, cwd=light.parent, stdout=subprocess.PIPE, text=True)
        pid, between = json.loads(parent.stdout.readline())["pid"], psutil.Process(parent.pid).children()[0].pid
        parent.kill()
        assert ends(pid, between)
        parent.communicate()


def test_nothing_outlives_the_command(light):
    with serving(light, light.parent) as (command, environment):
        zygote, = psutil.Process(command.pid).children()
        with waiting(light, environment, start_new_session=True) as (process, pid):          # as Jupyter starts a kernel
            os.killpg(command.pid, signal.SIGKILL)                                           # as the Snakefile does when `far` is gone
            assert ends(zygote.pid, pid, process.pid)
    with serving(light, light.parent) as (command, environment):
        zygote, = psutil.Process(command.pid).children()
        command.kill()
        assert ends(zygote.pid)


def test_a_lost_zygote_fails_no_job(light):
    with serving(light, light.parent) as (command, environment):
        with waiting(light, environment) as (process, pid):
            psutil.Process(command.pid).children()[0].kill()
            late = json.loads(job(light, environment, "tell", cwd=light.parent, input="").stdout)
            assert not late["forked"]
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 40 + signal.SIGTERM           # the one that had begun goes on to its own end


def test_jobs_that_the_zygote_must_not_take_run_by_themselves(light):
    with serving(light, light.parent) as (_, environment):
        without = {key: value for key, value in environment.items() if key != "FAR_WARM"}
        for other in (without, environment | {"FAR_WARM": "nobody"}, environment | {"OMP_NUM_THREADS": "2"}, environment | {"PROBE": "x" * 100_000, "PROBE2": "x" * 120_000}):
            told = job(light, other, "tell", cwd=light.parent, input="")
            assert told.returncode == 0 and not json.loads(told.stdout)["forked"], told.stderr
        assert json.loads(job(light, environment, "tell", cwd=light.parent, input="").stdout)["forked"]


def test_a_library_that_fails_leaves_the_jobs_as_they_were(light):
    light.write_text(light.read_text().replace('LIBRARIES = ("numpy",)', 'LIBRARIES = ("numpy", "no_such_library")'))
    with serving(light, light.parent) as (_, environment):
        for _ in range(2): assert not json.loads(job(light, environment, "tell", cwd=light.parent, input="").stdout)["forked"]


def test_ctrl_c_finds_the_kernels(light):
    (light.parent / "ipykernel_launcher.py").write_text(PROBE)
    with serving(light, light.parent, command=f'setsid "{sys.executable}" "{light}" ipykernel_launcher wait; exit') as (command, _):
        told = json.loads(command.stdout.readline())
        found, = _kernels(command.pid)
        os.kill(found, signal.SIGTERM)
        assert told["forked"] and ends(told["pid"], found)


# With the real libraries.

@pytest.fixture(scope="module")
def zygote(tmp_path_factory):
    with serving(WARM, tmp_path_factory.mktemp("zygote")) as (_, environment): yield environment


def test_forks_do_not_share_their_random_numbers(zygote, light):
    drawn = [number for _ in range(2) for number in job(WARM, zygote, "random", cwd=light.parent).stdout.split()]
    assert len(set(drawn)) == 6


def notebook(path: Path, *cells: str) -> Path:
    tagged = nbformat.v4.new_code_cell("number = 1", metadata={"tags": ["parameters"]})
    kernel = {"kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=[tagged, *map(nbformat.v4.new_code_cell, cells)], metadata=kernel), path)
    return path


def execute(notebook: Path, executed: Path, environment: dict[str, str], *parameters: str) -> subprocess.CompletedProcess:
    command = ["bash", WARM.parent / "execute.sh", sys.executable, "rule", "name", notebook, executed, *parameters]
    return subprocess.run(command, env=environment | {"JUPYTER_PREFER_ENV_PATH": "1"}, cwd=executed.parent, capture_output=True, text=True, timeout=240)


def outputs(path: Path) -> list:
    return [output for cell in nbformat.read(path, 4).cells for output in cell.get("outputs", [])]


def test_a_notebook_in_a_forked_kernel(zygote, tmp_path):
    source = notebook(tmp_path / "source.ipynb", "import sys; before = set(sys.modules)", "import torch, matplotlib.pyplot as plt\nplt.plot([number]);",
                      "print('torch' in before, torch.get_num_threads(), number)", "import threadpoolctl\n{pool['num_threads'] for pool in threadpoolctl.threadpool_info()}",
                      "int(torch.ones(500, 500).mm(torch.ones(500, 500)).sum())")
    done = execute(source, tmp_path / "forked.ipynb", zygote, "-p", "number", "7")
    assert done.returncode == 0 and "@far end rule name 0" in done.stdout and not list(tmp_path.glob("*.log"))
    executed = nbformat.read(tmp_path / "forked.ipynb", 4)
    assert executed.metadata.kernelspec.name == "python3"                # so that it opens anywhere
    shown = outputs(tmp_path / "forked.ipynb")
    assert any("image/png" in output.get("data", {}) for output in shown)
    assert [output.text.split() for output in shown if output.output_type == "stream"] == [["True", "1", "7"]]
    assert [output.data["text/plain"] for output in shown if output.output_type == "execute_result"] == ["{1}", "125000000"]


def test_a_failing_notebook_tells_as_much_as_ever(zygote, tmp_path):
    source = notebook(tmp_path / "source.ipynb", "import os; os.write(1, b'from the kernel itself'); raise ValueError('on purpose')")
    done = execute(source, tmp_path / "failed.ipynb", zygote)
    assert done.returncode == 1 and "@far end rule name 1" in done.stdout
    assert [output.evalue for output in outputs(tmp_path / "failed.ipynb") if output.output_type == "error"] == ["on purpose"]
    log = (tmp_path / "failed.ipynb.log").read_text()
    assert "from the kernel itself" in log and "ValueError: on purpose" in log
    died = execute(notebook(tmp_path / "source.ipynb", "import os; os._exit(0)"), tmp_path / "died.ipynb", zygote)
    assert died.returncode == 138 and "DeadKernelError" in (tmp_path / "died.ipynb.log").read_text()       # papermill's own status for it


def test_a_kernel_ends_with_its_papermill(zygote, tmp_path):
    source = notebook(tmp_path / "source.ipynb", "import os, pathlib, time; pathlib.Path('pid').write_text(str(os.getpid())); time.sleep(60)")
    command = [sys.executable, WARM, "papermill", source, tmp_path / "never.ipynb", "--kernel", "python3"]
    papermill = subprocess.Popen(command, env=zygote, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text(): assert time.monotonic() < deadline; time.sleep(0.1)
    papermill.kill()
    papermill.wait()
    assert ends(int((tmp_path / "pid").read_text()))


def test_weights_are_the_same_bit_by_bit(zygote, tmp_path):
    "A whole training of the smoke scale, its kernel forked and not."
    written = []
    for name, environment in (("forked", zygote), ("ordinary", {key: value for key, value in zygote.items() if key not in ("FAR_WARM", "JUPYTER_PATH")})):
        (tmp_path / name).mkdir()
        done = execute(WARM.parent / "pretrain_mae.ipynb", tmp_path / name / "train.ipynb", environment, "-r", "preset", "smoke")
        assert done.returncode == 0, (tmp_path / name / "train.ipynb.log").read_text()
        written.append((tmp_path / name / "runs/smoke/mae-mixed-s0/model/model.safetensors").read_bytes())
    assert written[0] == written[1]
