"""`far reproduce --profile`: what each profile asks of Snakemake, a GPU for each job, and a cluster that tells of its jobs only through Snakemake."""
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

import far_nb.cli as cli
from far_nb.cli import Profile, Progress, main, paper_notebooks, read_profile, snakemake_command
from far_nb.core import FarError, read_json
from far_nb.experiments import get_preset, write_plan

TARGETS = ["table1", "table6", "figure3"]
ON_GPU = {"pretrain_mae", "train_far", "finetune_hr", "evaluate", "measure_speed"}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    "An empty folder with the smoke plan in it."
    out = tmp_path_factory.mktemp("profiles")
    return out, read_json(write_plan(out / "runs/smoke", get_preset("smoke")))


def plan_jobs(written, profile: str) -> dict[str, str]:
    "What a dry run says of one job of each rule: inputs, threads, resources, shell command."
    command = snakemake_command(*written, TARGETS, None, 4, "--dry-run", "--printshellcmds", profile=read_profile(profile))
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "FAR_PARENT": str(os.getpid())})
    assert done.returncode == 0, done.stdout + done.stderr
    blocks = re.findall(r"^(?:local)?rule (\w+):\n((?:.+\n)+)", done.stdout, re.M)
    assert sorted(rule for rule, _ in blocks if rule != "all") == sorted(       # the same jobs everywhere
        ["pretrain_mae"] * 2 + ["train_far"] * 2 + ["evaluate"] * 2 + ["measure_speed"] + ["table"] * 2 + ["figure"])
    return {rule: block for rule, block in blocks if rule != "all"}


@pytest.mark.parametrize("profile", ["local", "gpu", "gpus", "slurm"])
def test_a_profile_plans_every_job(written, monkeypatch, profile):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    if profile == "slurm": pytest.importorskip("snakemake_executor_plugin_slurm", reason="pip install 'far_nb[slurm]'")
    jobs = plan_jobs(written, profile)
    for rule, block in jobs.items():
        assert ("gpu=1, gpu_share=25" in block) == (rule in ON_GPU), block
        if profile == "gpus": assert ("env FAR_GPUS=3,5 bash" if rule in ON_GPU else "env CUDA_VISIBLE_DEVICES= bash") in block
        else: assert "FAR_GPUS" not in block and "CUDA_VISIBLE_DEVICES" not in block
        if profile == "slurm": assert all(f"{resource}=" in block for resource in ("runtime", "mem_mb", "cpus_per_task")), block
    if profile == "slurm": assert "gpu" not in jobs["table"] and "slurm_extra=--exclusive" in jobs["measure_speed"]


def test_jobs_beside_a_profile_win_and_nothing_else_does(written):
    here, cluster = Profile(Path("p"), threads=3), Profile(Path("p"), remote=True)
    command = lambda *arguments: " ".join(snakemake_command(*written, ["table1"], *arguments[:1], 8, profile=arguments[1]))
    assert "--cores" not in command(None, here) and "--jobs" not in command(None, cluster) and "--config " not in command(None, here)
    assert "--cores 6 " in command(2, here) and "--jobs 2 " in command(2, cluster)
    assert "warm.py serve 3 " in command(None, here) and "warm.py" not in command(None, cluster)      # a zygote is no part of the allocation
    assert "--cores 8 " in command(2, None) and "--config threads=4 " in command(2, None)


@pytest.mark.parametrize("profile, said", [("cloud", "gpu, gpus, local, slurm"), ("", "--profile"), ("gpus", "no GPU"), ("{tmp}/torn", "no Snakemake profile"),
                                           ("{tmp}/other", "pip install snakemake-executor-plugin-no-such")])
def test_a_wrong_profile_is_one_line_and_exit_code_2(tmp_path, capsys, monkeypatch, profile, said):
    for name, text in {"torn": "cores: [", "other": "executor: no-such"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(text)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(sys, "argv", ["far", "reproduce", "--preset", "smoke", "--out", str(tmp_path / "out"), "--profile", profile.format(tmp=tmp_path)])
    with pytest.raises(SystemExit) as left: main()
    line, = capsys.readouterr().err.strip().splitlines()
    assert left.value.code == 2 and said in line and not (tmp_path / "out").exists()


def test_two_jobs_have_two_gpus_and_a_third_waits_for_one(tmp_path):
    python, told = tmp_path / "python", tmp_path / "told"
    python.write_text('#!/bin/bash\necho "$CUDA_VISIBLE_DEVICES" >told\nread <never\n')                # in place of papermill: hold the GPU
    python.chmod(0o755)
    for name in ("told", "never"): os.mkfifo(tmp_path / name)
    start = lambda name: subprocess.Popen(
        ["bash", paper_notebooks() / "execute.sh", python, "train_far", name, "n.ipynb", f"runs/smoke/{name}/train.ipynb"],
        cwd=tmp_path, env={**os.environ, "FAR_GPUS": "4,GPU-7"}, start_new_session=True, stdout=subprocess.DEVNULL)
    jobs, gpus = {}, open(os.open(told, os.O_RDWR), encoding="utf-8")
    try:
        for name in ("a", "b"): jobs[name] = start(name)
        holders = {gpus.readline().strip(), gpus.readline().strip()}
        assert holders == {"4", "GPU-7"}
        jobs["c"] = start("c")
        second = next(name for name in "ab" if b"CUDA_VISIBLE_DEVICES=GPU-7" in environment_below(jobs[name].pid))
        os.killpg(jobs[second].pid, signal.SIGKILL)
        assert gpus.readline().strip() == "GPU-7"                # without locks it would have taken the first, which is still held
    finally:
        for job in jobs.values():
            try: os.killpg(job.pid, signal.SIGKILL)
            except ProcessLookupError: pass
            job.wait()
        gpus.close()


def environment_below(pid: int) -> bytes:
    "The environment of the process that `pid` started."
    child = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0]
    return Path(f"/proc/{child}/environ").read_bytes()


@pytest.mark.parametrize("profile, places", [("gpu", "4 shares"), ("gpus", "GPUs 0,1")])
def test_no_more_runs_than_places_on_the_gpus(tmp_path, monkeypatch, profile, places):
    "The real Snakefile, scheduler and execute.sh; only papermill is a stub, which fails when it finds no place and makes the files."
    notebooks, out = tmp_path / "paper", tmp_path / "out"
    shutil.copytree(paper_notebooks(), notebooks)
    (notebooks / "warm.py").write_text(STUB)
    settings = notebooks / "profiles" / profile / "config.yaml"
    settings.write_text(re.sub("^cores: all", "cores: 8", re.sub("threads: .*", "threads: 1", settings.read_text()), flags=re.M))
    monkeypatch.setattr(cli, "paper_notebooks", lambda: notebooks)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    plan = read_json(write_plan(out / "runs/smoke", get_preset("smoke")))
    progress = Progress(out, Console(quiet=True))
    command = snakemake_command(out, plan, ["table4"], None, 4, profile=read_profile(profile))
    assert cli._run(command, progress, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    told = [line.split() for line in (out / "told").read_text().splitlines()]
    assert len(told) == progress.done == 11 and not progress.failed                        # 2 MAEs, 4 networks, 4 evaluations, the table
    used = {place for name, place in told if name != "table4"}
    assert used == ({"0", "1"} if profile == "gpus" else {"a", "b", "c", "d"}), used
    if profile == "gpus": assert ["table4", "-"] in told


STUB = '''"""What warm.py and papermill are to Snakefile and execute.sh, with a file for each place on the GPUs while a job holds it."""
import os, sys, time
from pathlib import Path

if sys.argv[1] == "serve": os.execvp(sys.argv[3], sys.argv[3:])
executed = Path(sys.argv[3].removesuffix(".part"))                       # papermill NOTEBOOK EXECUTED.part ...
figures, visible = executed.parent.name == "figures", os.environ["CUDA_VISIBLE_DEVICES"]
for place in "-" if figures and visible != "0,1" else "a" if figures else "abcd" if visible == "0,1" else [visible]:
    try: os.close(os.open(f"held-{place}", os.O_CREAT | os.O_EXCL)); break
    except FileExistsError: pass
else: sys.exit("no place is free")
time.sleep(0.5)                                                          # long enough that jobs overlap
with open("told", "a") as file: file.write(f"{executed.stem if figures else executed.parent.name} {place}\\n")
made = [Path("figures/smoke", f"{executed.stem}.{end}") for end in ("csv", "md", "tex")] if figures else \\
    [executed.parent / ("train.json" if executed.stem == "train" else "metrics.json")]
for path in made: path.parent.mkdir(parents=True, exist_ok=True); path.touch()
os.unlink(f"held-{place}")
'''


def test_a_clusters_jobs_are_told_by_snakemakes_lines(tmp_path, capsys):
    "Submitted, failed, submitted again, finished: as Snakemake 9 with the executor slurm says it."
    job = lambda attempt: ["rule train_far:", "    input: runs/smoke/far-s0/options.json", "    jobid: 7", "    wildcards: run=far-s0",
        "Shell command: bash '/a b/execute.sh' /bin/python 'train_far' 'far-s0' '/a b/train_far.ipynb' 'runs/smoke/far-s0/train.ipynb' -r preset smoke",
        f"Job 7 has been submitted with SLURM jobid {100 + attempt} (log: x.log)."]
    progress = Progress(tmp_path, Console(quiet=True), remote=True)
    for line in ["total    2", *job(1)]: progress.read(line + "\n")
    assert progress.running == ["far-s0"] and progress.total == 2
    for line in ["Error in rule train_far:", "    message: SLURM-job '101' failed", "    jobid: 7", "    shell:", "        bash '/a b/execute.sh' …"]:
        progress.read(line + "\n")
    assert progress.failed == {"far-s0": "runs/smoke/far-s0/train.ipynb"} and not progress.running
    assert "far-s0: train_far failed" in capsys.readouterr().err
    for line in [*job(2), "Finished jobid: 7 (Rule: train_far)"]: progress.read(line + "\n")
    assert (progress.done, progress.failed, progress.running) == (1, {}, [])


def test_a_jobs_line_counts_behind_half_a_line_of_snakemake(tmp_path):
    "Snakemake writes a line and its end one after the other, and a job that ends in between writes there."
    progress = Progress(tmp_path, Console(quiet=True), running=["far-s0"])
    progress.read("    resources: tmpdir=/tmp, gpu=1@far end train_far far-s0 0 1 runs/smoke/far-s0/train.ipynb\n")
    assert progress.done == 1 and not progress.running
