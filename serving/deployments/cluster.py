"""The Ray runtime: a private Ray cluster on loopback with Serve on it (`python -m serving.deployments.cluster`).

A process of its own, because a Ray driver may be ended by Ray; the supervisor, which owns the
listening port, must not be. All of Ray's variables are set here and nowhere else.
"""

from __future__ import annotations

import contextlib
import http.client
import logging
import os
import secrets
import select
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any, Final

import msgspec

from serving import config, logs
from serving.control import Deploy, Event, Failed, Loading, Note, Phase, Ready, RuntimeEnd, RuntimeSettings
from serving.deployments.document import MODEL_APP, ReplicaArguments, autoscaling_config, serve_config
from serving.deployments.placement import cpu_share, room_for

OBJECT_STORE_BYTES: Final = 100 << 20  # no tensor and no token ever passes through it
WATCH_STARTING_S: Final = 0.1
WATCH_STEADY_S: Final = 1.0
PLACEMENT_S: Final = 20.0  # a placement group is pending for moments whenever a gang starts


def ray_environment(session: Path, token_file: Path) -> dict[str, str]:
    """Ray's variables of every process of a local cluster. session: private folder of this start."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        # The only switch that lets a node listen on loopback; without it 127.0.0.1 is replaced by the
        # machine's address, and GCS, raylet and workers bind every interface.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        # With the default of 60 s every process ends itself a minute after GCS did (design, section 1).
        "RAY_gcs_rpc_server_reconnect_timeout_s": "86400",
        "RAY_gcs_storage": "rocksdb",
        "RAY_gcs_storage_path": str(session / "gcs"),
        "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
        # Replicas read their load four times a second, of a look-back of 5 s, and push it each second: with Serve's 0.2
        # what a decision rests on may be two seconds old.
        "RAY_SERVE_AUTOSCALING_METRIC_RECORD_INTERVAL_FACTOR": "0.05",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }


def start_cluster(session: Path, *, cores: int, directory_port: int, tell: Any = lambda name, seconds: None) -> None:
    """A Ray head and Serve's controller and proxy, in this process's charge. Must run in the main thread.

    tell: (name of the phase, seconds)
    """
    session.mkdir(mode=0o700, exist_ok=True)
    token_file = session / "token"
    token_file.touch(0o600)
    token_file.write_text(secrets.token_hex(32))
    config.set_environment(ray_environment(session, token_file))

    begun = time.monotonic()
    import ray

    tell("import", time.monotonic() - begun)
    begun = time.monotonic()
    ray.init(
        address="local",  # never a cluster that RAY_ADDRESS or a file names
        num_cpus=cores,
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        namespace="serve",
        _node_ip_address="127.0.0.1",
        _temp_dir=str(session),
    )
    tell("cluster", time.monotonic() - begun)
    begun = time.monotonic()
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": directory_port})
    tell("serve", time.monotonic() - begun)


def deploy(document: dict[str, Any]) -> None:
    """Make the document (`document.serve_config`) what runs. Returns at once; Serve reconciles."""
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    with warnings.catch_warnings():
        # Serve wants it in a variable of every process some day; only here it is said for our replicas alone.
        warnings.filterwarnings("ignore", message="The `metrics_interval_s` field", category=DeprecationWarning)
        _get_global_client().deploy_apps(ServeDeploySchema.model_validate(document))


def deploy_failure(application: str) -> str:
    """Why Serve gave an application up, in one line; "" while it has not."""
    from ray.serve.context import _get_global_client

    status = _get_global_client().get_serve_status(application)
    if status.app_status.status != "DEPLOY_FAILED":
        return ""
    told = [status.app_status.message, *(deployment.message for deployment in status.deployment_statuses)]
    lines = [line.strip() for text in told for line in (text or "").splitlines() if line.strip()]
    return f"Ray Serve gave up on the {application}: {lines[-1] if lines else 'no reason told'}"


def waiting_gang() -> str:
    """Why a gang has no place, in one line; "" when none waits. This cluster never grows: waiting is in vain."""
    from serving.deployments.ranks import waiting_placement

    described = waiting_placement()
    return f"a replica's gang finds no place: {described}" if described else ""


def num_gpus() -> int:
    """GPUs of the cluster."""
    import ray

    return int(ray.cluster_resources().get("GPU", 0))


class Decisions:
    """What our policy has written into the log of Serve's controller: why there are as many replicas as there are."""

    MARK: Final = "autoscaling of "
    MAX_BYTES: Final = 1 << 16  # read at once

    def __init__(self, session: Path) -> None:
        self._folder = session / "session_latest" / "logs" / "serve"
        self._read: dict[Path, int] = {}

    def news(self) -> list[str]:
        """Decisions since the last call, in one line each."""
        found = []
        for path in sorted(self._folder.glob("controller_[0-9]*.log")):
            with contextlib.suppress(OSError), path.open("rb") as file:
                begin = self._read.get(path, 0)
                file.seek(begin)
                data = file.read(self.MAX_BYTES)
                end = data.rfind(b"\n") + 1 or (len(data) if len(data) == self.MAX_BYTES else 0)
                self._read[path] = begin + end
                lines = data[:end].decode(errors="replace").splitlines()
                texts = [line.partition(self.MARK)[2] for line in lines]
                found += [self.MARK + text for text in texts if text]
        return found


class RayRuntime:
    """Has Serve keep the replicas, and tells the supervisor what happens."""

    def __init__(self, settings: RuntimeSettings) -> None:
        self._settings = settings
        self._supervisor = RuntimeEnd(settings.control_fd)
        self._order: Deploy | None = None
        self._was_ready = False
        self._num_reports = 0
        self._members: set[str] = set()
        self._asked_s = 0.0
        self._placed_s = 0.0  # when no gang was seen waiting for a place
        self._session = Path(settings.run_dir) / f"ray-{os.getpid()}"
        self._decisions = Decisions(self._session)

    def run(self) -> None:
        """Returns when told to stop, with the cluster gone."""
        settings = self._settings
        try:
            start_cluster(
                self._session,
                cores=settings.cores,
                directory_port=settings.directory_port,
                tell=lambda name, seconds: self._tell(Phase("ray", name, seconds)),
            )
            signal.signal(signal.SIGTERM, _exit)  # Ray has put its own handler there
            deploy(
                serve_config(None, secret_file=settings.secret_file)
            )  # its worker starts while the model is verified
            while True:
                wait_s = WATCH_STEADY_S if self._was_ready else WATCH_STARTING_S
                if select.select([self._supervisor.socket], [], [], wait_s)[0]:
                    orders = self._supervisor.receive()
                    if orders is None:
                        return
                    for order in orders:
                        self._deploy(order)
                self._watch()
        finally:
            import ray

            ray.shutdown()

    def _deploy(self, order: Deploy) -> None:
        self._order, self._was_ready, self._num_reports = order, False, 0
        surge, problem = room_for(order.engine, order.replicas, num_gpus())
        if problem:
            self._tell(Failed(problem))
            return
        if surge == 0:
            self._tell(Note("an update will stop a replica before it starts its successor: no GPUs are left for both"))
        arguments = ReplicaArguments(
            engine=order.engine,
            secret_file=self._settings.secret_file,
            drain_timeout_s=self._settings.drain_timeout_s,
            server=self._settings.server,
        )
        share = cpu_share(self._settings.cores, order.replicas, order.engine)
        deploy(
            serve_config(
                arguments,
                num_replicas=order.replicas,
                num_cpus=share,
                max_surge_percent=surge,
                autoscaling=_autoscaling_config(order),
                secret_file=self._settings.secret_file,
            )
        )
        self._placed_s = time.monotonic()

    def _watch(self) -> None:
        listing = self._fetch("/directory?since=-1")
        starts = self._fetch("/directory/starts")
        if self._order is None or listing is None or starts is None:
            return
        for report in starts["reports"]:
            if report["number"] > self._num_reports:
                self._num_reports = report["number"]
                self._hear(report)
        if self._order.scaling is not None:
            for text in self._decisions.news():
                self._tell(Note(text))
        members = {entry["id"] for entry in listing["replicas"] if entry["state"] == "ready"}
        if not self._was_ready and len(members) >= _num_initial(self._order):
            self._was_ready, self._members = True, members
            self._tell(Ready())
        elif not self._was_ready:
            self._look_for_failure()
        elif members != self._members:
            for gone in sorted(self._members - members):
                self._tell(Note(f"replica {gone} is gone"))
            for new in sorted(members - self._members):
                self._tell(Note(f"replica {new} is ready"))
            self._members = members

    def _look_for_failure(self) -> None:
        """Serve gives up on an application whose replicas die before they can tell anybody why."""
        now = time.monotonic()
        if now - self._asked_s < WATCH_STEADY_S:
            return
        self._asked_s = now
        problem = deploy_failure(MODEL_APP)
        waits = waiting_gang()
        if not waits:
            self._placed_s = now
        elif now - self._placed_s > PLACEMENT_S:
            problem = problem or waits
        if problem:
            self._tell(Failed(problem))

    def _hear(self, report: dict[str, Any]) -> None:
        if report["failure"]:
            self._tell(Failed(report["failure"]))
        elif self._was_ready:
            return
        elif report["total_bytes"]:
            who = f"replica {report['replica']}"
            self._tell(Loading(who, report["done_bytes"], report["total_bytes"], report["seconds"]))
        else:
            self._tell(Phase(f"replica {report['replica']}", report["phase"], report["seconds"]))

    def _fetch(self, path: str) -> Any:
        """The directory's answer; None while it is not there."""
        connection = http.client.HTTPConnection("127.0.0.1", self._settings.directory_port, timeout=2.0)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            body = response.read()
            return msgspec.json.decode(body) if response.status == 200 else None
        except (OSError, http.client.HTTPException, msgspec.MsgspecError):
            return None
        finally:
            connection.close()

    def _tell(self, event: Event) -> None:
        self._supervisor.tell(event)


def _num_initial(order: Deploy) -> int:
    """Replicas to begin with: at least one, to see that the model loads, even where none may be left later."""
    return order.replicas if order.scaling is None else max(order.scaling.min_replicas, 1)


def _autoscaling_config(order: Deploy) -> dict[str, Any] | None:
    scaling = order.scaling
    if scaling is None:
        return None
    settings: dict[str, float] = msgspec.to_builtins(scaling)
    return autoscaling_config(
        int(settings.pop("min_replicas")),
        order.replicas,
        settings | {"rows_per_replica": order.engine.max_num_seqs},
        initial_replicas=_num_initial(order),
    )


def _exit(*_: object) -> None:
    sys.exit(0)  # leaves `run` through its `finally`


def main(argument: str) -> None:
    """argument: RuntimeSettings as JSON."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the supervisor's to handle
    signal.signal(signal.SIGTERM, _exit)
    settings = msgspec.json.decode(argument, type=RuntimeSettings)
    if settings.log_format == "json":
        logs.set_up("ray", "json")
    RayRuntime(settings).run()


if __name__ == "__main__":
    main(sys.argv[1])
