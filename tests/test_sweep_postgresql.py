"""Sweeps in processes of their own, on PostgreSQL and on a journal: shared out, killed, and nothing lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from rlboard.sweep.ledger import SLOT
from rlboard.sweep.storage import open_storage
from tests.browser import chromium, eventually, get, open_tab, tensorboard
from tests.conftest import ROOT
from tests.postgresql import postgresql
from tests.sweeping import facts, zoo

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("postgresql")]

BOTH = {"hparam/best", "hparam/final"}
SCRIPT = """
import json, sys
from pathlib import Path
from rlboard.errors import RlboardError
from rlboard.registry import Track
from rlboard.sweep import sweep
if __name__ == "__main__":
    options = json.loads(sys.argv[2])
    try:
        sys.exit(sweep("hill", tracks=[Track("zoo", root=Path(sys.argv[1]))], **options))
    except RlboardError as error:
        sys.exit(str(error))
"""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with postgresql() as address:
        yield address


def begun(root: Path, space: str, **options: object) -> subprocess.Popen[str]:
    """A sweep of `hill` in a process group of its own."""
    script = root / "sweeping.py"
    if not script.exists():  # or a process that has just begun reads it while it is written
        zoo(root)
        script.write_text(SCRIPT)
    chosen = {"space": [space], "method": "grid", "study": "peak", "log_dir": str(root / "logs")} | options
    return subprocess.Popen(
        [sys.executable, str(script), str(root), json.dumps(chosen)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def finished(*processes: subprocess.Popen[str]) -> str:
    """What processes that end well have printed."""
    outputs = [process.communicate(timeout=900)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    return "".join(outputs)


def trials_of(storage: str, study: str) -> list[FrozenTrial]:
    """The trials of a study, none where it is not there yet."""
    opened = open_storage(storage)
    try:
        return optuna.load_study(study_name=study, storage=opened).trials
    except KeyError:
        return []
    finally:
        if isinstance(opened, optuna.storages.RDBStorage):
            opened.remove_session()
            opened.engine.dispose()


def completed(trials: list[FrozenTrial]) -> Counter[int]:
    """How often the trial of each slot was run to its end."""
    return Counter(trial.user_attrs[SLOT] for trial in trials if trial.state == TrialState.COMPLETE)


@pytest.mark.parametrize("jobs", [2, 8])
def test_processes_share_a_study(jobs: int, server: str, tmp_path: Path) -> None:
    study = f"jobs{jobs}"
    output = finished(begun(tmp_path, "x=0..1:10 kind=a,b", storage=server, study=study, jobs=jobs))
    assert "(20 of 20)" in output
    trials = trials_of(server, study)
    assert (completed(trials), len(trials)) == (Counter(range(20)), 20)
    runs = sorted((tmp_path / f"logs/HILL/{study}").glob("trial*"))
    assert [facts(run)["sweep"]["trial"] for run in runs] == list(range(20))


def test_machines_share_a_study(server: str, tmp_path: Path) -> None:
    machines = [
        begun(
            tmp_path, "x=0..1:30", storage=server, study="shared", log_dir=str(tmp_path / name), settings=["pause=0.2"]
        )
        for name in ("one", "two", "three")
    ]
    output = finished(*machines)
    assert output.count("score 1 in trial 9") == 0
    assert output.count("run it alone with") == 3
    assert completed(trials_of(server, "shared")) == Counter(range(30))
    here = {name: len(list((tmp_path / name / "HILL/shared").glob("trial*"))) for name in ("one", "two", "three")}
    assert sum(here.values()) == 30
    assert all(here.values())


@pytest.mark.parametrize("place", ["postgresql", "journal", "sqlite"])
def test_the_trial_of_a_killed_worker_is_run_again(place: str, server: str, tmp_path: Path) -> None:
    addresses = {
        "postgresql": server,
        "journal": str(tmp_path / "study.log"),
        "sqlite": f"sqlite:///{tmp_path}/study.db",
    }
    storage, study = addresses[place], f"killed-{place}"
    process = begun(tmp_path, "x=0..1:8", storage=storage, study=study, jobs=2, settings=["pause=0.5"])
    root = tmp_path / f"logs/HILL/{study}"

    def running() -> list[int]:
        """The processes of the workers, once both train."""
        if sum(facts(path)["status"] == "running" for path in root.glob("trial*") if (path / "run.json").exists()) < 2:
            return []
        return workers_of(process.pid)

    victim = eventually(running)[0]
    os.kill(victim, signal.SIGKILL)
    finished(process)
    trials = trials_of(storage, study)
    assert completed(trials) == Counter(range(8))
    (dead,) = [trial for trial in trials if trial.state == TrialState.FAIL]
    (again,) = [trial for trial in trials if trial.state == TrialState.COMPLETE and trial.params == dead.params]
    assert again.user_attrs[SLOT] == dead.user_attrs[SLOT]
    assert len(list(root.glob("trial*"))) == 8
    assert {facts(path)["status"] for path in root.glob("trial*")} == {"completed"}


def workers_of(parent: int) -> list[int]:
    """The processes that a process has started to run trials."""
    listed = subprocess.run(
        ["ps", "-o", "pid=,args=", "--ppid", str(parent)], capture_output=True, text=True, check=True
    )
    return [int(line.split()[0]) for line in listed.stdout.splitlines() if "spawn_main" in line]


def test_a_killed_sweep_goes_on(server: str, tmp_path: Path) -> None:
    """Killed with all of its processes: what ran is taken up when it has given no sign of life for a minute."""
    options = {"storage": server, "study": "dead", "jobs": 2, "settings": ["pause=0.5"]}
    process = begun(tmp_path, "x=0..1:6", **options)
    eventually(lambda: sum(trial.state == TrialState.RUNNING for trial in trials_of(server, "dead")) == 2)
    os.kill(process.pid, signal.SIGKILL)  # its workers see it, and stop
    process.communicate(timeout=60)
    output = finished(begun(tmp_path, "x=0..1:6", **options))
    assert "going on with the study: " in output
    assert completed(trials_of(server, "dead")) == Counter(range(6))


def test_ctrl_c_stops_all_in_order(tmp_path: Path) -> None:
    options = {"jobs": 2, "settings": ["pause=0.3"]}
    process = begun(tmp_path, "x=0..1:6", **options)
    root = tmp_path / "logs/HILL/peak"
    eventually(lambda: len(list(root.glob("trial*/run.json"))) >= 2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to all of them
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "trials: the same command goes on" in output
    assert "Traceback" not in output
    assert "running" not in {facts(path)["status"] for path in root.glob("trial*")}
    finished(begun(tmp_path, "x=0..1:6", **options))
    assert {facts(path)["status"] for path in root.glob("trial*")} == {"completed"}
    assert len(list(root.glob("trial*"))) == 6


def test_a_thousand_trials(server: str, tmp_path: Path) -> None:
    output = finished(begun(tmp_path, "x=0..1:1000", storage=server, study="thousand", jobs=8))
    assert "(1,000 of 1,000)" in output
    trials = trials_of(server, "thousand")
    assert (completed(trials), len(trials)) == (Counter(range(1000)), 1000)


@pytest.mark.browser
def test_the_hparams_tab_has_a_row_for_each_trial(tmp_path: Path) -> None:
    """In all of its three views, and no cell is blank, though some trials have failed."""
    finished(begun(tmp_path, "x=0,0.5,1 kind=a,b,nan steps=4,8"))
    with tensorboard(tmp_path / "logs") as address, chromium() as page:
        open_tab(page, address, "HParams")
        rows = page.locator("tf-hparams-table-view vaadin-grid")
        eventually(lambda: rows.inner_text().count("trial") == 18)
        asked = {
            "experimentName": "",
            "allowedStatuses": ["STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING", "STATUS_UNKNOWN"],
            "colParams": [{"metric": {"tag": tag}} for tag in ("hparam/best", "hparam/final")],
            "startIndex": 0,
            "sliceSize": 100,
        }
        groups = get(address, "plugin/hparams/session_groups", asked)["sessionGroups"]
        assert len(groups) == 18
        assert all({"x", "kind", "steps"} <= group["hparams"].keys() for group in groups)
        assert all(len(group["metricValues"]) >= 2 for group in groups)
        assert {metric["name"]["tag"] for group in groups for metric in group["metricValues"]} >= BOTH
        page.locator("tf-hparams-table-view vaadin-grid paper-checkbox:visible").first.click()
        curves = page.locator(
            "tf-hparams-session-group-details tf-scalar-card, tf-hparams-session-group-details vz-line-chart2"
        )
        curves.first.wait_for(state="attached")
        page.get_by_text("PARALLEL COORDINATES VIEW").click()
        eventually(lambda: page.locator("tf-hparams-parallel-coords-plot g.foreground path").count() >= 18)
        page.get_by_text("SCATTER PLOT MATRIX VIEW").click()
        eventually(lambda: page.locator("tf-hparams-scatter-plot-matrix-plot svg circle").count() >= 18)
