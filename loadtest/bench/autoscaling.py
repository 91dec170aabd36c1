"""A day of autoscaling in simulated time: our policy, Serve's own, fixed numbers, and an oracle.

A diurnal load with bursts, spikes and replicas that die (serving/sim/trace.py); replicas of 8 slots take about a minute
to start. On time = waited no longer than the objective. Replica-hours count from the moment of asking. Regret compares
the sum of replica time and `--late-cost-s` for every late choice with the oracle's, which knows the day beforehand.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

from loadtest.bench._report import line, report
from serving.deployments.autoscaling import Autoscaler, ScalingSettings
from serving.sim.day import Day, Outcome, Service
from serving.sim.oracle import oracle
from serving.sim.scalers import Fixed, OngoingRequests
from serving.sim.trace import Trace, day

UTILIZATION = 0.8
"""That every policy aims at."""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="argosy bench autoscaling", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--hours", type=float, default=24.0)
    parser.add_argument("--peak", type=float, default=1.4, help="choices per second at the day's highest")
    parser.add_argument("--start-s", type=float, default=60.0, help="median start-up time of a replica")
    parser.add_argument("--slo-s", type=float, default=2.0, help="a choice that waits longer is late")
    parser.add_argument("--late-cost-s", type=float, default=60.0, help="replica-seconds that a late choice costs")
    options = parser.parse_args(argv)
    service = Service(start_s=options.start_s, slo_s=options.slo_s)
    trace = day(options.seed, peak_per_s=options.peak, duration_s=options.hours * 3600.0)
    begun = time.perf_counter()
    outcomes = run(trace, service)
    seconds = time.perf_counter() - begun

    late_cost_s: float = options.late_cost_s
    best = cost(outcomes["oracle"], late_cost_s)
    rows, lines = [], []
    for name, outcome in outcomes.items():
        regret = cost(outcome, late_cost_s) / best - 1.0
        rows.append(
            [
                name,
                f"{outcome.attainment:.2%}",
                f"{outcome.wait_at(0.99):.1f}",
                f"{outcome.replica_hours:.1f}",
                f"{outcome.num_out} / {outcome.num_in}",
                str(outcome.most),
                f"{regret:+.0%}",
            ]
        )
        lines.append(
            line(
                bench=f"autoscaling {name}",
                value=round(outcome.replica_hours, 2),
                unit="replica-hours",
                attainment=round(outcome.attainment, 5),
                wait_p99_s=round(outcome.wait_at(0.99), 2),
                num_out=outcome.num_out,
                num_in=outcome.num_in,
                most=outcome.most,
                lost=outcome.num_lost,
                regret=round(regret, 4),
                choices=len(outcome.waits),
                seed=options.seed,
                start_s=options.start_s,
                slo_s=options.slo_s,
            )
        )
    title = (
        f"{len(trace.arrivals):,} choices in {options.hours:g} h, start-up {options.start_s:g} s, on time = waits "
        f"{options.slo_s:g} s at most; simulated in {seconds:.0f} s"
    )
    report(title, ["policy", "on time", "p99 wait, s", "replica-hours", "out / in", "most", "regret"], rows, lines)
    return 0


def cost(outcome: Outcome, late_cost_s: float) -> float:
    """In replica-seconds."""
    return outcome.replica_s + late_cost_s * (outcome.num_late + outcome.num_lost)


def run(trace: Trace, service: Service) -> dict[str, Outcome]:
    """By policy. The fixed numbers are the one that costs what ours does, and the one that meets 99 %, up to 12."""
    slots = service.engine.slots
    ours = ScalingSettings(
        max_queue_delay_s=service.slo_s,
        target_utilization=UTILIZATION,
        rows_per_replica=slots,
        start_s=service.start_s,
    )
    per_replica = UTILIZATION * slots
    scalers: dict[str, Callable[[], Autoscaler | OngoingRequests]] = {
        "argosy": lambda: Autoscaler(ours),
        "ongoing requests, Serve's delays": lambda: OngoingRequests(per_replica),
        "ongoing requests, 0 s up, 300 s down": lambda: quick(per_replica),
        "… with a quarter fewer on each": lambda: quick(0.75 * per_replica),
    }

    def quick(per_replica: float) -> OngoingRequests:
        return OngoingRequests(per_replica, look_back_s=5.0, up_delay_s=0.0, down_delay_s=300.0)

    outcomes = {name: Day(trace, service, make()).run() for name, make in scalers.items()}
    num = max(round(outcomes["argosy"].replica_s / trace.duration_s), 1)
    outcomes[f"fixed {num}, as many hours"] = Day(trace, service, Fixed(num), first=num).run()
    while num < service.max_replicas:
        num += 1
        outcome = Day(trace, service, Fixed(num), first=num).run()
        if outcome.attainment >= 0.99 or num == service.max_replicas:
            outcomes[f"fixed {num}, 99 % on time"] = outcome
            break
    outcomes["oracle"] = oracle(trace, service)
    return outcomes
