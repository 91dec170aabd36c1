"""The policy as Serve's controller runs it: Serve's own contexts, wrapper, metrics of replicas and serialisation."""

from __future__ import annotations

import statistics
import time
import warnings
from typing import Any

import pytest

from serving import config
from serving.control import Deploy
from serving.deployments.cluster import _autoscaling_config
from serving.deployments.document import POLICY, ReplicaArguments, autoscaling_config, serve_config
from serving.deployments.serve_policy import STATS, QueueDelayPolicy
from serving.errors import SettingsError
from serving.supervisor import _scaling as scaling_of

with warnings.catch_warnings(action="ignore"):  # Ray's own deprecations, at import
    from ray.serve._private.autoscaling_state import _resolve_policy_callable
    from ray.serve._private.common import DeploymentID, ReplicaID, TimeStampedValue
    from ray.serve.autoscaling_policy import _apply_autoscaling_config
    from ray.serve.config import AutoscalingConfig, AutoscalingContext
    from ray.serve.schema import ServeDeploySchema

SETTINGS = {"rows_per_replica": 4, "start_s": 5.0, "max_queue_delay_s": 1.0}
DEPLOYMENT = DeploymentID(name="Replica", app_name="model")


def replica(number: int) -> ReplicaID:
    return ReplicaID(f"r{number}", DEPLOYMENT)


class Controller:
    """What Serve keeps of one deployment, as its context shows it."""

    def __init__(self, policy: QueueDelayPolicy, num: int = 1) -> None:
        self.policy = policy
        self.target = num
        self.total = 0.0
        self.wall = 5_000_000.0
        self.stats: dict[ReplicaID, dict[str, float]] = {replica(at): self._stats() for at in range(num)}
        with warnings.catch_warnings(action="ignore"):
            self.config = AutoscalingConfig(**autoscaling_config(0, 8, SETTINGS))
        self._wrapped = _apply_autoscaling_config(policy)

    @staticmethod
    def _stats(**changes: float) -> dict[str, float]:
        values = dict.fromkeys(STATS, 0.0) | {"max_num_seqs": 4, "blocks_total": 100, "block_size": 16}
        return values | {"is_ready": 1.0, "mark": 1.0} | changes

    def tell(self, **changes: float) -> None:
        """Every replica tells anew."""
        for values in self.stats.values():
            values["mark"] += 1.0
            values.update(changes)

    def context(self) -> Any:
        raw: dict[str, dict[ReplicaID, list[TimeStampedValue]]] = {}
        for name, values in self.stats.items():
            for key, value in values.items():
                raw.setdefault(key, {})[name] = [
                    TimeStampedValue(self.wall - 1, -1.0),
                    TimeStampedValue(self.wall, value),
                ]
        raw["running_requests"] = {}  # Serve's own; not every replica has it

        def untouched() -> Any:
            raise AssertionError("the policy needs no aggregation")

        return AutoscalingContext(
            deployment_id=DEPLOYMENT,
            deployment_name=DEPLOYMENT.name,
            app_name=DEPLOYMENT.app_name,
            current_num_replicas=len(self.stats),
            target_num_replicas=self.target,
            running_replicas=list(self.stats),
            total_num_requests=self.total,
            total_queued_requests=self.total,
            aggregated_metrics=untouched,
            raw_metrics=lambda: raw,
            capacity_adjusted_min_replicas=0,
            capacity_adjusted_max_replicas=8,
            policy_state={},
            last_scale_up_time=None,
            last_scale_down_time=None,
            current_time=self.wall,
            config=self.config,
        )

    def decide(self) -> int:
        self.target, _ = self._wrapped(self.context())
        return self.target


class Clock:
    now = 50.0

    def __call__(self) -> float:
        return self.now


def test_serve_finds_and_builds_it() -> None:
    with warnings.catch_warnings(action="ignore"):
        config = AutoscalingConfig(**autoscaling_config(0, 8, SETTINGS))
    assert config.policy.policy_function == POLICY
    built = _resolve_policy_callable(config.policy)
    assert type(built).__name__ == "QueueDelayPolicy"
    controller = Controller(built, num=2)
    assert controller.decide() == 2


def test_what_replicas_tell_becomes_a_decision_through_serves_wrapper() -> None:
    clock = Clock()
    controller = Controller(QueueDelayPolicy(clock=clock, **SETTINGS))
    controller.decide()
    for _ in range(3):
        clock.now += 1.0
        controller.tell(running=4, demand_choices=20, demand_tokens=100, demand_age_s=0.2)
        controller.decide()
    assert controller.target == 6, "24 choices, 4 slots a replica, none finished yet"


def test_numbers_that_do_not_change_grow_stale_whatever_the_clocks_of_hosts_say() -> None:
    clock = Clock()
    controller = Controller(QueueDelayPolicy(clock=clock, **SETTINGS))
    for _ in range(10):
        clock.now += 1.0
        controller.wall += 1.0  # time stamps go on, the numbers are the same reading
        controller.stats[replica(0)].update(running=4, demand_choices=20)
        assert controller.decide() == 1
    controller.tell(running=4, demand_choices=20, demand_age_s=0.2)
    controller.wall -= 3600.0
    assert controller.decide() == 6


def test_no_demand_heard_is_not_no_demand() -> None:
    clock = Clock()
    controller = Controller(QueueDelayPolicy(clock=clock, scale_to_zero_after_s=5.0, scale_in_window_s=5.0, **SETTINGS))
    for _ in range(60):
        clock.now += 1.0
        controller.tell(demand_age_s=-1.0)
        assert controller.decide() == 1
    for _ in range(60):
        clock.now += 1.0
        controller.tell(demand_age_s=0.3)
        controller.decide()
    assert controller.target == 0


def test_half_a_report_is_none() -> None:
    clock = Clock()
    controller = Controller(QueueDelayPolicy(clock=clock, **SETTINGS))
    del controller.stats[replica(0)]["finished"]
    for _ in range(5):
        clock.now += 1.0
        controller.tell(running=4, demand_choices=20, demand_age_s=0.2)
        assert controller.decide() == 1


def test_serves_cold_start_path_starts_the_first_replica_and_ours_leaves_it_alone() -> None:
    """The evidence for the directory's open call: with a queued call Serve asks for one replica, whatever we say."""
    controller = Controller(QueueDelayPolicy(**SETTINGS), num=0)
    assert controller.decide() == 0
    controller.total = 1.0
    assert controller.decide() == 1
    controller.total = 0.0
    assert controller.decide() == 1, "it loads; whoever asked has gone"


def test_a_decision_with_reading_costs_less_than_a_millisecond() -> None:
    controller = Controller(QueueDelayPolicy(**SETTINGS), num=8)
    times = []
    for _ in range(200):
        controller.tell(running=2)
        context = controller.context()
        begun = time.perf_counter()
        controller.policy(context)
        times.append(time.perf_counter() - begun)
    assert statistics.median(times) < 0.001, f"{statistics.median(times) * 1e6:.0f} us"


@pytest.mark.parametrize("min_replicas", [0, 2])
def test_what_argosy_serve_asks_for_is_what_serve_gets(min_replicas: int) -> None:
    settings = config.load({"min_replicas": min_replicas, "max_replicas": 4, "scale_in_window_s": 90}, environ={})
    order = Deploy(settings.engine, settings.replicas, scaling_of(settings))
    model = ReplicaArguments(engine=settings.engine, secret_file="s")
    document = serve_config(model, autoscaling=_autoscaling_config(order), secret_file="s")
    with warnings.catch_warnings(action="ignore"):
        ServeDeploySchema.model_validate(document)
    directory, replicas = document["applications"]
    assert directory["args"] == {"secret_file": "s"} == serve_config(None, secret_file="s")["applications"][0]["args"]
    [deployment] = replicas["deployments"]
    assert "num_replicas" not in deployment
    scaled = deployment["autoscaling_config"]
    assert (scaled["min_replicas"], scaled["initial_replicas"], scaled["max_replicas"]) == (
        min_replicas,
        max(min_replicas, 1),
        4,
    )
    assert scaled["policy"]["policy_kwargs"] == {
        "max_queue_delay_s": 2.0,
        "scale_in_window_s": 90.0,
        "scale_to_zero_after_s": 600.0,
        "rows_per_replica": 32,
    }
    QueueDelayPolicy(**scaled["policy"]["policy_kwargs"])


def test_a_fixed_number_is_not_autoscaled() -> None:
    settings = config.load({"replicas": 3}, environ={})
    assert scaling_of(settings) is None
    assert _autoscaling_config(Deploy(settings.engine, 3)) is None


def test_kwargs_that_are_no_settings_are_refused() -> None:
    with pytest.raises(SettingsError, match="start_s: -1 is outside"):
        QueueDelayPolicy(start_s=-1)
    with pytest.raises(TypeError, match="target_ongoing"):
        QueueDelayPolicy(target_ongoing=3)
