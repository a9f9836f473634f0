"""``cluster/README.md``, followed step by step, and the configurations beside it."""

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import dask
import psutil
import pytest
import yaml

from cluster import PATIENCE, listening, wait_until
from lcnn_utils.experiments import results
from lcnn_utils.lab import PROJECT

PAGE = PROJECT / "cluster" / "README.md"
BIN = Path(sys.executable).parent


def commands(heading: str) -> list[str]:
    """The shell commands of a part of the page, in order, without their comments."""
    part = PAGE.read_text(encoding="utf-8").split(f"## {heading}")[1].split("\n## ")[0]
    blocks = re.findall(r"```sh\n(.*?)```", part, re.DOTALL)
    return [line.split("  #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.mark.skipif(os.name != "posix", reason="a POSIX shell")
def test_by_hand(tmp_path):
    """Every command of the page's first part, in a shell, with other ports and another store."""
    export, scheduler, worker, plan, sweep = commands("By hand, on one machine first")
    ports = {"8786": free_port(), "8787": free_port()}
    environment = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "LCNN_DEVICE": "cpu"}

    def changed(command: str) -> str:
        assert "$HOME/lcnn-store" in export
        command = export.replace("$HOME/lcnn-store", shlex.quote(str(tmp_path / "store"))) + "; exec env " + command
        return re.sub("878[67]", lambda found: ports[found[0]], command)

    def start(command: str) -> subprocess.Popen:
        log = (tmp_path / "log").open("a")
        return subprocess.Popen(["sh", "-c", changed(command)], env=environment, cwd=PROJECT, stdout=log, stderr=log)

    def done(command: str) -> str:
        found = subprocess.run(["sh", "-c", changed(command)], env=environment, cwd=PROJECT, capture_output=True,
                               text=True, timeout=PATIENCE)  # fmt: skip
        assert found.returncode == 0, found.stderr
        return found.stdout

    running = [start(scheduler), start(worker), start(worker)]
    try:
        wait_until(lambda: (tmp_path / "log").read_text().count("Registered to:") == 2, "both workers")
        assert listening(*(psutil.Process(process.pid) for process in running)) == {"127.0.0.1"}
        planned = done(plan)
        assert planned.count("epochs 1–4 of 4") == 6, "as many as the page says"
        swept = done(sweep)
        assert f"6 runs on 2 workers, dashboard: http://127.0.0.1:{ports['8787']}/status" in swept
        assert "6 of 6 runs done" in swept
    finally:
        for process in reversed(running):
            process.terminate()
        for process in reversed(running):
            process.wait(PATIENCE)
    frame = results((tmp_path / "store" / "runs",))
    assert sorted(zip(frame.method, frame.seed, frame.lambda_beta, strict=True)) == [
        ("lcnn", 0, 1e-4), ("lcnn", 0, 1e-3), ("lcnn", 1, 1e-4), ("lcnn", 1, 1e-3),
        ("standard", 0, 0.01), ("standard", 1, 0.01),
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["dask.yaml", "slurm.yaml"])
def test_dask_knows_every_setting(name):
    """A misspelt setting would be ignored in silence."""
    import dask_jobqueue  # noqa: F401 its defaults

    def check(ours, known, path):
        for key, value in ours.items():
            if path.endswith("environ."):
                continue  # variables of anybody's
            assert key in known, f"{path}{key} is no setting of Dask's"
            if isinstance(value, dict):
                check(value, known[key], f"{path}{key}.")

    check(yaml.safe_load((PROJECT / "cluster" / name).read_text()), dask.config.config, "")


def test_the_job_that_slurm_would_get():
    environment = os.environ | {"DASK_CONFIG": str(PROJECT / "cluster" / "slurm.yaml")}
    command = [sys.executable, PROJECT / "cluster" / "slurm.py", "--host", "127.0.0.1", "--show"]
    script = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60).stdout
    for line in ("#SBATCH -p gpu", "#SBATCH --gres=gpu:1", "#SBATCH -t 04:00:00", "#SBATCH --cpus-per-task=4"):
        assert line in script
    assert re.search(r"distributed.cli.dask_worker tcp://127.0.0.1:\d+ .*--nthreads 1 .*--memory-limit 0", script)


def test_the_manifest_of_kubernetes():
    documents = list(yaml.safe_load_all((PROJECT / "cluster" / "kubernetes.yaml").read_text()))
    kinds = {(one["kind"], one["metadata"]["name"]): one["spec"] for one in documents}
    assert [kind for kind, _ in kinds] == [
        "PersistentVolumeClaim", "Deployment", "Service", "NetworkPolicy", "Deployment"
    ]  # fmt: skip
    service = kinds["Service", "lcnn-scheduler"]
    assert service["type"] == "ClusterIP", "not reachable from outside"
    for name in ("lcnn-scheduler", "lcnn-worker"):
        spec = kinds["Deployment", name]
        assert spec["selector"]["matchLabels"] == spec["template"]["metadata"]["labels"]
    both = {"matchExpressions": [{"key": "app", "operator": "In", "values": ["lcnn-scheduler", "lcnn-worker"]}]}
    policy = kinds["NetworkPolicy", "lcnn"]
    assert policy == {"podSelector": both, "ingress": [{"from": [{"podSelector": both}]}]}, "nobody else gets in"
    (worker,) = kinds["Deployment", "lcnn-worker"]["template"]["spec"]["containers"]
    assert f"tcp://lcnn-scheduler:{service['ports'][0]['port']}" in worker["args"]


def test_every_option_on_the_page_exists():
    """``dask scheduler`` and ``dask worker`` know the options that the page gives them."""
    text = PAGE.read_text(encoding="utf-8") + (PROJECT / "cluster" / "kubernetes.yaml").read_text()
    for what, module in (("scheduler", "dask_scheduler"), ("worker", "dask_worker")):
        known = subprocess.run([sys.executable, "-m", f"distributed.cli.{module}", "--help"], capture_output=True,
                               text=True, check=True, timeout=60).stdout  # fmt: skip
        for line in text.splitlines():
            if f"dask {what}" in line or f"[dask, {what}," in line:
                for option in re.findall(r"--[a-z-]+", line.split("  #")[0]):
                    assert option in known, (what, option)
