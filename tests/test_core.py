"""What a result file says about its origin."""
import subprocess

from far_nb import core


def test_figures_that_a_run_makes_are_no_uncommitted_changes(tmp_path, monkeypatch):
    git = lambda *arguments: subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *arguments], check=True, capture_output=True)
    for name in ("far_nb/core.py", "nbs/a.ipynb", "figures/tiny/table1.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    git("init", "-q"); git("add", "."); git("commit", "-qm", "all")
    monkeypatch.setattr(core, "__file__", str(tmp_path / "far_nb" / "core.py"))
    state = lambda: core.provenance()["git_dirty"]
    assert state() is False
    (tmp_path / "figures/tiny/table1.csv").write_text("2")
    assert state() is False
    (tmp_path / "nbs/a.ipynb").write_text("2")
    assert state() is True
