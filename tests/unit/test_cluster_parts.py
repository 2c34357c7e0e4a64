"""The small parts of a cluster: restarts, run files, ports, merged reports, workers' settings, exact names."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from cluster import reaper, run_file
from cluster.config import load
from cluster.processes import PortInUse, hold_port, pick_port
from cluster.restarts import Restarts
from cluster.router_settings import RouterSettings
from cluster.run_file import NoCluster, RunFile, reachable
from cluster.served_model import describe
from cluster.worker_reports import ReportBuilder
from cluster.worker_settings import WorkerSettings, worker_environment, workers_of
from kv_transfer.actions import Piece, Report
from router.prefix_index import PrefixIndex
from tandem.messages import (
    BlockCounts,
    BlockEvents,
    CommitAsk,
    OwnerQuery,
    RequestFailed,
    Role,
    TransferStats,
    WorkerLoad,
)
from tandem.request import RequestId, Token, TransferId, WorkerId

RID, TID = RequestId("r"), TransferId("t")


def test_restarts_back_off_and_end() -> None:
    restarts = Restarts(restarts_max=4, window_ms=60_000, first_delay_ms=500, delay_max_ms=1500)
    delays = [restarts.died(now_ms, "w") for now_ms in (0, 1000, 2000, 4000, 6000, 7000)]
    assert delays == [0, 500, 1000, 1500, None, None]
    assert restarts.died(7000, "other") == 0
    assert restarts.died(63_000, "w") is not None, "old restarts are forgiven"


def test_no_restarts_at_all() -> None:
    assert Restarts(restarts_max=0).died(0, "w") is None


def running(port: int) -> RunFile:
    return RunFile(
        pid=os.getpid(), started_s=psutil.Process().create_time(), host="127.0.0.1", port=port, grpc_port=1, model="m",
        log_dir="l",
    )  # fmt: skip


def test_run_files_are_found_by_port_or_alone(tmp_path: Path) -> None:
    with pytest.raises(NoCluster, match="no cluster runs here"):
        run_file.find(tmp_path)
    run_file.write(tmp_path, running(8000))
    assert run_file.find(tmp_path) == run_file.find(tmp_path, 8000) == running(8000)
    run_file.write(tmp_path, running(9000))
    with pytest.raises(NoCluster, match="at ports 8000, 9000: choose one with --port"):
        run_file.find(tmp_path)
    with pytest.raises(NoCluster, match="at port 7000"):
        run_file.find(tmp_path, 7000)
    run_file.remove(tmp_path, running(8000))
    assert run_file.find(tmp_path).port == 9000


def test_run_files_of_the_dead_and_of_others_are_ignored(tmp_path: Path) -> None:
    run_file.write(tmp_path, replace(running(8000), started_s=1.0))  # the pid was used again
    (tmp_path / "1.json").write_text("{")
    (tmp_path / "2.json").write_text('{"pid": 1}')
    with pytest.raises(NoCluster):
        run_file.find(tmp_path)
    run_file.remove(tmp_path, replace(running(8000), pid=1))
    assert (tmp_path / "8000.json").exists(), "only the owner removes it"


def test_logs_of_the_last_few_clusters_are_kept(tmp_path: Path) -> None:
    for number in range(run_file.LOG_DIRS_KEPT + 3):
        folder = run_file.fresh_log_dir(tmp_path, 1000 + number)
        os.utime(folder, (number, number))
    run_file.write(tmp_path, running(1003))
    kept = {path.name for path in tmp_path.glob("*.logs")}
    assert "1000.logs" not in kept
    (run_file.log_dir_of(tmp_path, 1010) / "old.log").write_text("old")
    assert list(run_file.fresh_log_dir(tmp_path, 1010).iterdir()) == []
    for number in range(20):
        run_file.fresh_log_dir(tmp_path, 2000 + number)
    assert (tmp_path / "1003.logs").exists(), "that cluster still runs"
    assert len(list(tmp_path.glob("*.logs"))) <= run_file.LOG_DIRS_KEPT + 2


def test_folders_of_killed_supervisors_are_removed(tmp_path: Path) -> None:
    from cluster import ray_session  # brings Ray

    mine, left = tmp_path / "tandem-ray-a", tmp_path / "tandem-ray-b"
    for folder in (mine, left, tmp_path / "other"):
        folder.mkdir()
    code = "import fcntl, os, sys; fd = os.open(sys.argv[1], 0); fcntl.flock(fd, 2); print(1, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(mine)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        owner.stdout.readline()
        ray_session.sweep(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "tandem-ray-a"]
        owner.kill()
    ray_session.sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_only_their_owner_reads_the_logs(tmp_path: Path) -> None:
    run_file.fresh_log_dir(tmp_path / "run", 8000)
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o700


def test_the_reaper_survives_a_line_that_was_cut() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    known = [[child.pid, psutil.Process(child.pid).create_time()]]
    lines = json.dumps(known) + "\n" + json.dumps(known)[:-3]
    subprocess.run([sys.executable, "-m", "cluster.reaper"], input=lines, text=True, timeout=60, check=True)
    assert child.wait(10) == -signal.SIGKILL
    assert child.stdin is not None
    child.stdin.close()


def test_a_reaper_that_stands_still_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who tells it what runs looks after workers, too."""
    holder = reaper.Reaper()
    stopped = holder._process
    stopped.send_signal(signal.SIGSTOP)
    run = psutil.Process()
    looks = iter(range(10**6))
    monkeypatch.setattr(reaper, "descendants", lambda: [run] * (1_000 + next(looks) % 2))  # 20 KiB a line

    def tell() -> None:
        for _ in range(20):
            holder.update()
        holder.dismiss()

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    assert stopped.poll() == -signal.SIGKILL, "what it was told last must not be reaped"


def test_what_to_dial() -> None:
    assert [reachable(host) for host in ("0.0.0.0", "::", "::1", "10.0.0.1")] == [
        "127.0.0.1", "[::1]", "[::1]", "10.0.0.1",
    ]  # fmt: skip


def test_ports() -> None:
    free = pick_port("127.0.0.1", 0, "--port")
    assert pick_port("127.0.0.1", free, "--port") == free
    with (
        socket.create_server(("127.0.0.1", free)),
        pytest.raises(PortInUse, match=f"port {free} at 127.0.0.1: Address already in use; choose another with --port"),
    ):
        pick_port("127.0.0.1", free, "--port")
    with pytest.raises(PortInUse, match="choose another with --grpc-port"):
        pick_port("203.0.113.1", 1234, "--grpc-port")


def test_pieces_of_one_step_become_one_report_a_session() -> None:
    builder = ReportBuilder(worker_id=WorkerId("w"), incarnation=3)
    token = Token(request_id=RID, epoch=1, index=0, token_id=5)
    failed = RequestFailed(request_id=RID, epoch=1, code="c", message="m", retryable=True)
    ask = CommitAsk(request_id=RID, transfer_id=TID, from_epoch=1, next_index=1, tokens=())
    query = OwnerQuery(request_id=RID, transfer_id=TID, epoch=1)
    stats = TransferStats(request_id=RID, transfer_id=TID)
    blocks = BlockEvents(sequence=1)
    load_ = WorkerLoad(
        running=0, waiting=0, blocks=BlockCounts(total=1, free=1), prefill_backlog_tokens=0, steps=0, last_step_ms=0
    )
    pieces: list[Piece] = [token, failed, ask, query, stats, blocks, load_]
    merged = builder.merge([*(Report(session=7, piece=piece) for piece in pieces), Report(session=8, piece=token)])
    assert [session for session, _ in merged] == [7, 8]
    report = merged[0][1]
    assert (report.worker_id, report.incarnation, report.sequence) == ("w", 3, 1)
    assert (report.tokens, report.failed, report.commit_asks) == ((token,), (failed,), (ask,))
    assert (report.owner_queries, report.transfers) == ((query,), (stats,))
    assert (report.blocks, report.load) == (blocks, load_)
    again = builder.merge([Report(session=7, piece=token), Report(session=7, piece=token)])
    assert [(session, each.sequence, each.tokens) for session, each in again] == [(7, 2, (token, token))]
    builder.keep({8})
    assert builder.num_sessions == 1
    sequences = {s: each.sequence for s, each in builder.merge([Report(session=s, piece=token) for s in (7, 8)])}
    assert sequences == {7: 1, 8: 2}


def test_each_block_event_has_a_report_of_its_own_and_nothing_changes_its_place() -> None:
    builder = ReportBuilder(worker_id=WorkerId("w"), incarnation=3)
    tokens = [Token(request_id=RID, epoch=1, index=index, token_id=5) for index in range(3)]
    stored = [BlockEvents(sequence=sequence, stored=(bytes([sequence]),)) for sequence in (1, 2, 3)]
    pieces: list[Piece] = [tokens[0], stored[0], tokens[1], stored[1], stored[2], tokens[2]]
    merged = builder.merge([Report(session=session, piece=piece) for piece in pieces for session in (7, 8)])
    assert [session for session, _ in merged] == [7, 7, 7, 8, 8, 8]
    assert [report.sequence for _, report in merged] == [1, 2, 3] * 2
    assert [report.blocks for _, report in merged] == stored * 2
    assert [report.tokens for _, report in merged] == [(tokens[0], tokens[1]), (), (tokens[2],)] * 2
    index = PrefixIndex()
    index.join(0, 3)
    for _, report in merged[:3]:
        assert report.blocks is not None
        index.apply(0, 3, report.blocks)
    assert (index.num_blocks(0), index.num_gaps) == (3, 0)


def test_workers_are_named_by_role_and_number() -> None:
    config = load({"prefill": 1, "decode": 2, "mixed": 1}, {}).config
    assert workers_of(config) == [
        ("prefill-0", Role.PREFILL), ("decode-0", Role.DECODE), ("decode-1", Role.DECODE), ("mixed-0", Role.MIXED),
    ]  # fmt: skip


def test_settings_of_a_worker_travel_as_text() -> None:
    settings = WorkerSettings(
        worker_id=WorkerId("mixed-0"),
        incarnation=2,
        role=Role.MIXED,
        config=load({"kv_memory": "64MiB", "exact": False}, {}).config,
        threads=3,
        registries={"router-0": "127.0.0.1:1", "router-1": "127.0.0.1:2"},
        bind_host="0.0.0.0",
        advertised_host="10.0.0.9",
        log_file="/tmp/x.log",
    )
    assert WorkerSettings.from_json(settings.to_json()) == settings
    assert settings.reachable_host == "10.0.0.9"
    assert replace(settings, advertised_host="").reachable_host == "0.0.0.0"


def test_settings_of_a_router_travel_as_one_line() -> None:
    config = load({"routers": 2, "redis": "redis://:secret@h", "model": "fake"}, {}).config
    internal = {"router-0": "127.0.0.1:71", "router-1": "[::1]:72"}
    settings = RouterSettings(router_id="router-1", config=config, listener=5, join_token="t", internal=internal)
    assert "\n" not in settings.to_json()
    assert RouterSettings.from_json(settings.to_json()) == settings
    assert (settings.number, settings.internal_port) == (1, 72)


def test_workers_threads_do_not_spin() -> None:
    environment = worker_environment(2)
    assert environment["OMP_NUM_THREADS"] == "2"
    assert environment["OMP_WAIT_POLICY"] == "passive"


def test_the_fake_model_speaks_bytes() -> None:
    model = describe(load({"model": "fake"}, {}).config)
    ids = model.tokenizer.encode("Grüße, \n\x00!")
    assert model.tokenizer.decode(ids) == "Grüße, \n\x00!"
    assert len(ids) == len("Grüße, \n\x00!".encode())
    assert (model.context_tokens, model.tokenizer.vocab_size) == (8192, 256)
    assert "user: hi" in model.tokenizer.render_chat([{"role": "user", "content": "hi"}])


def test_a_ray_that_does_not_start_is_told_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that is much too busy Ray gives up on its own node with a bare Exception."""
    from cluster.ray_session import RayError, RaySession  # brings Ray

    def gives_up(**_: object) -> None:
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr("cluster.ray_session.ray.init", gives_up)
    monkeypatch.setattr("cluster.ray_session.TEMP_ROOT", tmp_path)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    session = RaySession(load({"model": "fake"}, {}).config, threads=1, log_file=tmp_path / "ray.log")
    with pytest.raises(RayError, match=r"^Ray did not start: The current node timed out during startup\.$"):
        session.open(is_again=False)
    session.close()
    assert not list(tmp_path.iterdir())


def test_orphans_that_ended_are_buried_and_own_children_left_to_those_who_wait() -> None:
    """In a process of its own, since it adopts."""
    code = """
import os, subprocess, sys, time
import psutil
from cluster.processes import adopt_orphans, bury_orphans
adopt_orphans()
orphan = "import os, subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'input()'], stdin=0).pid)"
pid = int(subprocess.run([sys.executable, "-c", orphan], capture_output=True, check=True).stdout)
os.kill(pid, 9)
def until_zombie(pid):
    while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
until_zombie(pid)
seen = bury_orphans(set())
assert pid in seen and psutil.pid_exists(pid)
own = subprocess.Popen(["false"])
until_zombie(own.pid)
seen = bury_orphans(seen)
assert not psutil.pid_exists(pid)
assert own.wait() == 1
assert bury_orphans(seen) == set()
print("well")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == ("well\n", "")


def test_a_port_that_is_held_is_free_for_servers_that_share_it_and_for_nobody_else() -> None:
    with hold_port("127.0.0.1", 0, "--host") as held:
        port = held.getsockname()[1]
        for take in (pick_port, hold_port):
            with pytest.raises(PortInUse, match=f"port {port} at 127.0.0.1: Address already in use; .* --grpc-port"):
                take("127.0.0.1", port, "--grpc-port")
        with socket.socket() as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            server.bind(("127.0.0.1", port))
            server.listen()
            for _ in range(20):  # the one that holds takes none of them
                with socket.create_connection(("127.0.0.1", port), timeout=5):
                    server.settimeout(5)
                    server.accept()[0].close()
