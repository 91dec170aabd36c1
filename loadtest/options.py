"""The flags of `argosy loadtest`."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

from loadtest.arrivals import KINDS
from loadtest.plan import Limits, WorkloadPlan
from loadtest.spec import SpecError

RECORD_NAME = "loadtest.jsonl"

EPILOG = """\
arrivals:
  poisson:5   constant:5   gamma:rate=5,cv=3   step:rates=1/2/4,every=30   ramp:from=1,to=20,over=60
  diurnal:rate=5,swing=0.8,period=3600   trace:requests.jsonl   trace:file=azure.csv,speed=2
lengths:
  64   lognormal:median=256,sigma=0.8,min=16,max=2048   uniform:min=16,max=64
exit code: 0 a valid run, 1 nothing succeeded or a comparison differed, 2 wrong input, 3 the run is not valid.
also: argosy loadtest report DIR | compare A B | knee ...
"""


class Asked(argparse.Namespace):
    """Parsed flags, with the plan's parts put together."""

    target: str
    model: str | None
    api_keys: str | None
    arrivals: Any  # str once parsed
    duration: float | None
    requests: int | None
    seed: int
    think: float
    drain: float
    timeout: float
    workload: WorkloadPlan
    limits: Limits
    verify: float
    max_verified: int
    out: Path
    has_report: bool
    slo_ttft: float | None
    slo_itl: float | None
    slo_itl_percentile: float
    slo_e2e: float | None
    share: float  # of the search for a knee, up to max_runs
    precision: float
    repeats: int
    cool_down: float
    max_rate: float
    max_runs: int
    ui: bool
    ui_host: str
    ui_port: int
    autostart: bool
    workers: int
    is_master: bool
    is_worker: bool
    master_host: str
    master_port: int
    locust: list[str]

    @property
    def record(self) -> Path:
        return self.out / RECORD_NAME


def parse(args: list[str], prog: str = "argosy loadtest") -> Asked:
    """Raises SpecError for values that cannot be; argparse's own SystemExit(2) for flags that are not."""
    asked = _parser(prog).parse_args(args, namespace=Asked())
    asked.locust = shlex.split(asked.locust_flags)
    if sum(value is not None for value in (asked.arrivals, asked.rate, asked.users)) > 1:
        raise SpecError("--arrivals, --rate and --users exclude one another")
    if asked.users is not None:
        asked.arrivals = f"closed:users={asked.users},think={asked.think:g}"
    elif asked.arrivals is None:
        asked.arrivals = f"poisson:{1.0 if asked.rate is None else asked.rate:g}"
    elif asked.arrivals.startswith("closed"):
        raise SpecError("--arrivals: closed loops are --users N")
    for name in ("duration", "requests", "workers", "timeout", "turns", "num_prefixes", "max_in_flight"):
        value = getattr(asked, name)
        if value is not None and not 0 < value < float("inf"):
            raise SpecError(f"--{name.replace('_', '-')} must be above 0, got {value}")
    for name in ("stream_share", "prefix_hit", "intruder_share", "verify"):
        if not 0 <= getattr(asked, name) <= 1:
            raise SpecError(f"--{name.replace('_', '-')} must be from 0 to 1, got {getattr(asked, name)}")
    if asked.is_master and asked.is_worker:
        raise SpecError("--master and --worker exclude one another")
    asked.workload = WorkloadPlan(
        endpoint=asked.endpoint,
        stream_share=0.0 if asked.whole else asked.stream_share,
        prompt=asked.prompt_tokens,
        output=asked.output_tokens,
        data=asked.data,
        prefix_tokens=asked.prefix_tokens,
        prefix_hit=asked.prefix_hit,
        num_prefixes=asked.num_prefixes,
        turns=asked.turns,
        replies=asked.replies,
        intruder_share=asked.intruder_share,
        intruder_tokens=asked.intruder_tokens,
        sampling=asked.sampling,
        ignore_eos=asked.ignore_eos,
        prompt_format=asked.prompt_format,
        token_ids=_range(asked.token_ids),
        extra_body=_object(asked.extra_body),
    )
    asked.limits = Limits(
        max_send_lag_s=asked.max_send_lag,
        max_loop_lag_s=asked.max_loop_lag,
        max_cpu=asked.max_cpu,
        max_in_flight=asked.max_in_flight,
    )
    return asked


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Put load on an OpenAI-compatible server and measure what its clients see.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument_group("server").add_argument
    add("--target", default="http://127.0.0.1:8000", metavar="URL", help="[%(default)s]")
    add("--model", metavar="NAME", help="[the first of /v1/models]")
    add("--api-keys", metavar="FILE", help="tenants, a line each: name key [weight]")
    add("--timeout", type=float, default=600.0, metavar="S", help="longest wait for any next byte [%(default)g]")

    add = parser.add_argument_group("when").add_argument
    add("--rate", type=float, metavar="R", help="open loop, R Poisson arrivals per second [1]")
    add("--arrivals", metavar="SPEC", help=f"open loop: {', '.join(kind for kind in KINDS if kind != 'closed')}")
    add("--users", type=int, metavar="N", help="closed loop: N clients, each waiting for its answer")
    add("--think", type=float, default=0.0, metavar="S", help="pause of a user, or between turns [0]")
    add("--duration", type=float, metavar="S", help="requests are sent for so long")
    add("--requests", type=int, metavar="N", help="so many requests (conversations, with --turns)")
    add("--drain", type=float, default=120.0, metavar="S", help="wait for answers after that [%(default)g]")
    add("--seed", type=int, default=0, metavar="N", help="the same seed sends the same requests [0]")

    add = parser.add_argument_group("what").add_argument
    add("--endpoint", choices=("completions", "chat", "mixed"), default="completions", help="[%(default)s]")
    add("--whole", action="store_true", help="no streams")
    add("--stream-share", type=float, default=1.0, metavar="P", help="of requests that stream [1]")
    add("--prompt-tokens", default="128", metavar="LENGTH", help="[%(default)s]")
    add("--output-tokens", default="64", metavar="LENGTH", help="[%(default)s]")
    add("--no-ignore-eos", dest="ignore_eos", action="store_false", help="outputs may end early; hosted APIs need it")
    add("--data", metavar="FILE", help="JSON lines: prompt or messages, and output_tokens")
    add("--prefix-tokens", type=int, default=0, metavar="N", help="of every prompt that may be shared [0]")
    add("--prefix-hit", type=float, default=1.0, metavar="P", help="share of prompts that share [1]")
    add("--num-prefixes", type=int, default=1, metavar="N", help="different ones [1]")
    add("--turns", type=int, default=1, metavar="N", help="of each conversation [1]")
    add("--replies", choices=("drawn", "server"), default="drawn", help="what later turns quote [%(default)s]")
    add("--intruder-share", type=float, default=0.0, metavar="P", help="of requests with a long prompt [0]")
    add("--intruder-tokens", type=int, default=4096, metavar="N", help="how long [%(default)s]")
    add("--sampling", choices=("greedy", "default", "mixed"), default="greedy", help="[%(default)s]")
    add("--prompt-format", choices=("ids", "text"), default="ids", help="of completions [%(default)s]")
    add("--token-ids", default="32:256", metavar="LOW:HIGH", help="that prompts are made of [%(default)s]")
    add("--extra-body", default="{}", metavar="JSON", help="merged into every body; null takes a field away")
    add("--verify", type=float, default=0.0, metavar="P", help="share to send again alone, and compare [0]")
    add("--max-verified", type=int, default=64, metavar="N", help="at most so many [%(default)s]")

    add = parser.add_argument_group("result").add_argument
    add(
        "--out",
        type=Path,
        default=Path("loadtest-out"),
        metavar="DIR",
        help=f"for {RECORD_NAME} and report [%(default)s]",
    )
    add("--locust", dest="locust_flags", default="", metavar="FLAGS", help="for locust, e.g. '--csv out/locust'")
    add("--no-report", dest="has_report", action="store_false", help="write the record alone")
    add("--slo-ttft", type=float, metavar="S", help="promise: first token within so many seconds")
    add("--slo-itl", type=float, metavar="S", help="promise: gaps between tokens")
    add(
        "--slo-itl-percentile",
        type=float,
        default=99.0,
        metavar="P",
        help="of a request's own gaps, how many must keep it; 100 = all [%(default)g]",
    )
    add("--slo-e2e", type=float, metavar="S", help="promise: last byte")

    if prog.endswith("knee"):
        add = parser.add_argument_group("search").add_argument
        add(
            "--share",
            type=float,
            default=0.99,
            metavar="P",
            help="of requests that must keep the promise [%(default)g]",
        )
        add("--precision", type=float, default=0.05, metavar="P", help="of the rate found [%(default)g]")
        add("--repeats", type=int, default=1, metavar="N", help="runs at a rate, odd; most decide [%(default)s]")
        add("--cool-down", type=float, default=2.0, metavar="S", help="rest between runs [%(default)g]")
        add("--max-rate", type=float, default=10_000.0, metavar="R", help="requests/s [%(default)g]")
        add("--max-runs", type=int, default=40, metavar="N", help="[%(default)s]")

    add = parser.add_argument_group("generator").add_argument
    limits = Limits()
    add("--max-send-lag", type=float, default=limits.max_send_lag_s, metavar="S", help="99th percentile [%(default)g]")
    add("--max-loop-lag", type=float, default=limits.max_loop_lag_s, metavar="S", help="99th percentile [%(default)g]")
    add("--max-cpu", type=float, default=limits.max_cpu, metavar="P", help="of a core, over any 2 s [%(default)g]")
    add("--max-in-flight", type=int, default=limits.max_in_flight, metavar="N", help="of a worker [%(default)s]")
    add("--workers", type=int, default=1, metavar="N", help="processes; with --master, workers to wait for [1]")
    add("--master", dest="is_master", action="store_true", help="wait for workers on other machines")
    add("--worker", dest="is_worker", action="store_true", help="be one of them")
    add("--master-host", default="127.0.0.1", metavar="HOST", help="where the master is, or binds [%(default)s]")
    add("--master-port", type=int, default=5557, metavar="PORT", help="[%(default)s]")
    add("--ui", action="store_true", help="locust's web page instead of --headless, which is the default")
    add("--headless", action="store_true", help=argparse.SUPPRESS)
    add("--ui-host", default="127.0.0.1", metavar="HOST", help="[%(default)s]")
    add("--ui-port", type=int, default=8089, metavar="PORT", help="[%(default)s]")
    add("--autostart", action="store_true", help="with --ui, do not wait for its button")
    return parser


def _range(text: str) -> tuple[int, int]:
    low, colon, high = text.partition(":")
    if not colon or not low.isdigit() or not high.isdigit():
        raise SpecError(f"--token-ids must be LOW:HIGH, got {text!r}")
    return int(low), int(high)


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise SpecError(f"--extra-body: {error}") from None
    if not isinstance(value, dict):
        raise SpecError(f"--extra-body must be a JSON object, got {text[:60]!r}")
    return value
