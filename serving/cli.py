"""The command `argosy`, a function per subcommand. Heavy imports wait until a command needs them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from serving.errors import SettingsError

EXIT_USAGE = 2

app = typer.Typer(
    name="argosy",
    help="Serve large language models over OpenAI's HTTP API.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _flag(help_text: str, metavar: str) -> typer.models.OptionInfo:
    # Always text: serving/config.py parses and refuses, in the same words for flags, variables and files.
    option = typer.Option(help=help_text, metavar=metavar, show_default=False)
    assert isinstance(option, typer.models.OptionInfo)
    return option


@app.command()
def serve(
    model: Annotated[
        str | None, _flag("Alias, model folder, GGUF file or hub id. [smollm2-135m-instruct]", "MODEL")
    ] = None,
    served_model_name: Annotated[str | None, _flag("Name that clients use. [derived from --model]", "NAME")] = None,
    host: Annotated[str | None, _flag("Address to listen on. [127.0.0.1]", "HOST")] = None,
    port: Annotated[str | None, _flag("Port to listen on; 0 takes any free one. [8000]", "PORT")] = None,
    runtime: Annotated[
        str | None, _flag("What places replicas: Ray Serve, or plain processes. [ray]", "ray|local")
    ] = None,
    replicas: Annotated[str | None, _flag("Copies of the model. [1]", "N")] = None,
    min_replicas: Annotated[
        str | None, _flag("Autoscaling: never fewer; 0 = none while nobody asks. [off]", "N")
    ] = None,
    max_replicas: Annotated[str | None, _flag("Autoscaling: never more. [off]", "N")] = None,
    max_queue_delay_s: Annotated[
        str | None, _flag("Autoscaling: a longer predicted wait adds replicas. [2]", "SECONDS")
    ] = None,
    gateways: Annotated[str | None, _flag("Gateway processes; more than 1 comes later. [1]", "N")] = None,
    tensor_parallel_size: Annotated[str | None, _flag("Ranks that share every layer. [1]", "N")] = None,
    pipeline_parallel_size: Annotated[str | None, _flag("Stages that share out the layers. [1]", "N")] = None,
    collectives: Annotated[
        str | None, _flag("What moves tensors among ranks. [auto]", "auto|shared-memory|gloo|nccl")
    ] = None,
    dtype: Annotated[str | None, _flag("Type of weights. [bfloat16]", "bfloat16|float16|float32")] = None,
    quantization: Annotated[
        str | None, _flag("Format of linear layers; auto takes the model's. [auto]", "auto|none|int8|int4")
    ] = None,
    device: Annotated[str | None, _flag("Where the model computes. [cpu]", "cpu|cuda")] = None,
    max_model_len: Annotated[str | None, _flag("Prompt and output tokens of one request. [the model's]", "N")] = None,
    max_num_seqs: Annotated[str | None, _flag("Rows that a replica runs at once. [32]", "N")] = None,
    max_num_batched_tokens: Annotated[str | None, _flag("Tokens of one engine step. [256; 2048 on cuda]", "N")] = None,
    kv_cache_bytes: Annotated[
        str | None, _flag("KV cache of each rank, e.g. 512MiB. [from free memory]", "SIZE")
    ] = None,
    weight_cache: Annotated[
        str | None,
        _flag("Where packed weights are kept for the next start. [in the store, for int8 and int4]", "DIR|off"),
    ] = None,
    seed: Annotated[str | None, _flag("Seed of the engine. [0]", "N")] = None,
    log_format: Annotated[str | None, _flag("Lines for people, or one JSON object a line. [text]", "text|json")] = None,
    trace_endpoint: Annotated[
        str | None, _flag("OTLP/HTTP collector that gets spans of requests. [off]", "URL")
    ] = None,
    trace_sample: Annotated[
        str | None, _flag("Share of requests traced; a caller's own decision wins. [1]", "SHARE")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file of settings; flags and ARGOSY_* win over it.", metavar="FILE")
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Show what was asked and what was found, and exit.")
    ] = False,
) -> None:
    """Serve a model; Ctrl-C stops it and leaves nothing behind."""
    flags = {key: value for key, value in locals().items() if key not in ("config", "print_config")}
    from serving import config as settings_of
    from serving import found, launch
    from serving.secret_file import SecretFile

    try:
        settings = settings_of.load(flags, config=config)
        facts = found.find(settings)
        if settings.gateway.operator_token_file:
            SecretFile(settings.gateway.operator_token_file).check("operator_token_file")
        if settings.engine.device == "cuda" and not facts.has_cuda:
            raise SettingsError(f"--device cuda: no NVIDIA device that torch {facts.torch} could use; leave it at cpu")
        found.check_tracing(settings)
    except SettingsError as error:
        _refuse(str(error))
    if print_config:
        import yaml

        typer.echo(yaml.safe_dump(found.shown(settings, facts), sort_keys=False), nl=False)
        return
    raise typer.Exit(launch.serve(settings, facts))


@app.command()
def gateway(
    directory_url: Annotated[
        str, typer.Option(help="Where replicas are told: http://…/directory of Ray Serve's proxy.", metavar="URL")
    ],
    secret_file: Annotated[
        str,
        typer.Option(help="What replicas know, too; hexadecimal lines, read again when they change.", metavar="FILE"),
    ],
    host: Annotated[str | None, _flag("Address to listen on. [127.0.0.1]", "HOST")] = None,
    port: Annotated[str | None, _flag("Port to listen on; 0 takes any free one. [8000]", "PORT")] = None,
    served_model_name: Annotated[str | None, _flag("Name that clients use. [derived from the model]", "NAME")] = None,
    log_format: Annotated[str | None, _flag("Lines for people, or one JSON object a line. [text]", "text|json")] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file of settings; flags and ARGOSY_* win over it.", metavar="FILE")
    ] = None,
) -> None:
    """Serve HTTP for replicas that a Ray cluster keeps; needs neither torch nor Ray."""
    flags = {"host": host, "port": port, "served_model_name": served_model_name, "log_format": log_format}
    from serving import config as settings_of
    from serving import found, gateway_alone
    from serving.secret_file import SecretFile

    try:
        settings = settings_of.load(flags, config=config)
        if settings.gateway.operator_token_file:
            SecretFile(settings.gateway.operator_token_file).check("operator_token_file", may_come=True)
        found.check_tracing(settings)
        if not directory_url.startswith(("http://", "https://")):
            raise SettingsError(f"--directory-url: {directory_url!r} does not begin with http:// or https://")
    except SettingsError as error:
        _refuse(str(error))
    raise typer.Exit(gateway_alone.serve(settings, directory_url, secret_file))


@app.command()
def pull(
    model: Annotated[str, typer.Argument(help="Alias, model folder, GGUF file or hub id.")] = "smollm2-135m-instruct",
    quantization: Annotated[
        str | None, typer.Option(help="int4 keeps the 4-bit linears of a GGUF file.", show_default=False)
    ] = None,
) -> None:
    """Bring a model into the local store, converted and verified."""
    from serving import config as settings_of
    from serving import launch

    try:
        settings = settings_of.load({"model": model, "quantization": quantization})
    except SettingsError as error:
        _refuse(str(error))
    raise typer.Exit(launch.pull(settings))


@app.command()
def plan(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Shape such as gpt3-175b, config.json, folder, GGUF file, alias or hub id; none lists names."
        ),
    ] = None,
    gpu: Annotated[str | None, _flag("Device by name; cpu is one, too. [h100-80gb]", "NAME")] = None,
    gpus: Annotated[str | None, _flag("Devices in all. [1]", "N")] = None,
    gpus_per_node: Annotated[str | None, _flag("Devices of one machine. [8; 1 for cpu]", "N")] = None,
    dtype: Annotated[str | None, _flag("Type of weights. [bfloat16]", "bfloat16|float16|float32")] = None,
    quantization: Annotated[
        str | None, _flag("Format of linear layers; auto takes the model's. [auto]", "auto|none|int8|int4")
    ] = None,
    kv_dtype: Annotated[
        str | None, _flag("Type of the KV cache; auto takes that of weights. [auto]", "auto|bfloat16|float16|float32")
    ] = None,
    context: Annotated[str | None, _flag("Tokens of one request. [8192, or the model's limit]", "N")] = None,
    max_num_seqs: Annotated[str | None, _flag("Rows that a replica runs at once. [32]", "N")] = None,
    max_num_batched_tokens: Annotated[str | None, _flag("Tokens of one engine step. [256; 2048 on cuda]", "N")] = None,
    memory: Annotated[str | None, _flag("Of one device, in place of what --gpu says: 80GB.", "SIZE")] = None,
    bandwidth: Annotated[str | None, _flag("Likewise: 3.0TB/s.", "RATE")] = None,
    flops: Annotated[str | None, _flag("Likewise, of linears: 798T.", "RATE")] = None,
    link: Annotated[str | None, _flag("Likewise, to its neighbours, one direction: 450GB/s.", "RATE")] = None,
    output: Annotated[str | None, typer.Option("-o", "--output", help="[table]", metavar="table|json")] = None,
) -> None:
    """Say what a model needs, how it fits devices, and how fast it could be; 1 when nothing fits."""
    flags = {key: value for key, value in locals().items() if key != "model"}
    from rich.console import Console

    from serving import config as settings_of
    from serving.planning import command
    from serving.planning.demand import PlanError

    try:
        code = command.run(model, flags, Path(settings_of.load({}).store), Console())
    except (PlanError, SettingsError) as error:
        _refuse(str(error))
    raise typer.Exit(code)


@app.command()
def chat(
    url: Annotated[str, typer.Option(help="Where the server answers.")] = "http://127.0.0.1:8000",
    model: Annotated[
        str | None, typer.Option(help="Served model name. [the server's first]", show_default=False)
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.", show_default=False)] = None,
) -> None:
    """Chat in the terminal with a running server."""
    from serving import chat as terminal_chat

    raise typer.Exit(terminal_chat.main(url, model, system))


@app.command()
def explain(
    request: Annotated[
        str | None,
        typer.Argument(help="Id of the reply or its x-request-id; none lists the latest.", show_default=False),
    ] = None,
    url: Annotated[str, typer.Option(help="Where the server answers.")] = "http://127.0.0.1:8000",
    operator_token_file: Annotated[
        str, typer.Option(help="Operator token, for a server on another machine.", metavar="FILE", show_default=False)
    ] = "",
    chrome: Annotated[
        Path | None, typer.Option(help="Write Chrome's trace format here instead.", metavar="FILE", show_default=False)
    ] = None,
    output: Annotated[str, typer.Option("-o", "--output", metavar="table|json")] = "table",
) -> None:
    """Say where the time of a request went: queue, chunks, tokens, and every long gap with its cause."""
    from rich.console import Console

    from serving.explain import Explainer, ExplainFailed, run

    if output not in ("table", "json"):
        _refuse(f"--output: {output!r} is not one of table, json")
    try:
        run(Explainer(url, operator_token_file), request, output, chrome, Console(highlight=False))
    except (ExplainFailed, SettingsError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def bench(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(help="Which benchmark; none lists them.", show_default=False)] = None,
) -> None:
    """Run a benchmark of loadtest/bench; what follows its name is passed on."""
    import importlib
    import importlib.util
    import pkgutil

    names: list[str] = []
    if importlib.util.find_spec("loadtest.bench") is not None:
        package = importlib.import_module("loadtest.bench")
        names = sorted(found.name for found in pkgutil.iter_modules(package.__path__) if not found.name.startswith("_"))
    if name in (None, "-h", "--help"):
        typer.echo("benchmarks: " + (", ".join(names) or "none"))
        return
    if name not in names:
        _refuse(f"no benchmark {name!r}; there are: {', '.join(names) or 'none'}")
    code = importlib.import_module(f"loadtest.bench.{name}").main(list(context.args))
    raise typer.Exit(code or 0)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def loadtest(context: typer.Context) -> None:
    """Put load on a server and measure what its clients see; --help lists the flags."""
    import importlib

    try:
        command = importlib.import_module("loadtest.command")
    except ModuleNotFoundError as missing:
        package = str(missing.name).partition(".")[0]
        if package == "loadtest":
            raise
        _refuse(
            f"{package} is not installed, which the load generator needs: pip install 'argosy[loadtest]', "
            "or in a checkout .venv/bin/python -m pip install -e '.[loadtest]'"
        )
    raise typer.Exit(command.main(list(context.args)))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def k8s(context: typer.Context) -> None:
    """Deploy to a Kubernetes cluster and operate it; --help lists the commands."""
    import importlib

    raise typer.Exit(importlib.import_module("k8s.tool.main").main(list(context.args)))


@app.command()
def metrics(
    kind: Annotated[
        str,
        typer.Argument(help="rules (Prometheus), dashboard (Grafana), docs (Markdown); write: all, into a checkout."),
    ],
    ttft: Annotated[float, typer.Option(help="Objective for the first token, in seconds.")] = 2.0,
    inter_token: Annotated[float, typer.Option(help="Objective between tokens, in seconds.")] = 0.15,
    target: Annotated[float, typer.Option(help="Share of requests and tokens that must meet it.")] = 0.99,
) -> None:
    """Print what is made from the description of all metrics."""
    from serving.metrics import command
    from serving.metrics.rules import Objective, ObjectiveError

    if kind == "write":
        try:
            command.write_all(Path.cwd())
        except (OSError, ValueError) as error:
            _refuse(f"this folder is no checkout of the project: {error}")
        return
    if kind not in command.KINDS:
        _refuse(f"no {kind!r}; there are: {', '.join(command.KINDS)}, write")
    try:
        objective = Objective(ttft, inter_token, target)
    except ObjectiveError as error:
        _refuse(str(error))
    typer.echo(command.KINDS[kind](objective), nl=False)


def _refuse(message: str) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(EXIT_USAGE)


def main() -> None:
    """Console script."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
