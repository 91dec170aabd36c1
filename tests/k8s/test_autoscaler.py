"""A RayCluster as Ray's own autoscaler reads it: what it believes a pod has decides which pods it asks for."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from k8s.amounts import num_bytes_of
from k8s.objects import WORKER
from k8s.serve_config import DIRECTORY_RESOURCE
from tests.k8s.manifests import OVERLAYS, manifests


def read_by_ray(overlay: str) -> dict[str, Any]:
    """Ray's autoscaling config of the overlay's cluster."""
    with warnings.catch_warnings(action="ignore"):  # Ray's own deprecations, at import
        from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    cluster = {"metadata": {"name": "argosy-x", "namespace": "argosy"}, "spec": manifests(overlay).ray}
    return _derive_autoscaling_config_from_ray_cr(cluster)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_ray_sees_the_pods_as_they_are(overlay: str) -> None:
    m = manifests(overlay)
    types = read_by_ray(overlay)["available_node_types"]
    [head] = [found for name, found in types.items() if "head" in name]
    assert head["resources"]["CPU"] == 0 and not head["resources"].get("GPU")
    workers = types["workers"]
    assert workers["resources"].get("GPU", 0) == m.sizing.gpus_per_pod
    limit = num_bytes_of(m.container(WORKER)["resources"]["limits"]["memory"])
    assert workers["resources"]["memory"] == limit
    hosts = m.sizing.hosts_per_replica
    assert (workers["min_workers"], workers["max_workers"]) == (
        m.spec.engine.min_replicas * hosts,
        m.sizing.max_groups * hosts,
    )
    # Whatever a replica asks for finds a place on the pods of one replica.
    bundles = m.replica.get("placement_group_bundles", [])
    asked = sum(bundle["CPU"] for bundle in bundles) or m.replica["ray_actor_options"]["num_cpus"]
    assert asked <= workers["resources"]["CPU"] * hosts


def test_the_directory_has_a_place_of_its_own_where_the_engine_may_have_none() -> None:
    m = manifests("prod-scale-to-zero")
    types = read_by_ray("prod-scale-to-zero")["available_node_types"]
    assert types["workers"]["min_workers"] == 0
    asked = m.serve["applications"][0]["deployments"][0]["ray_actor_options"]["resources"]
    assert set(asked) == {DIRECTORY_RESOURCE}
    assert types["directory"]["min_workers"] == 2
    assert types["directory"]["resources"][DIRECTORY_RESOURCE] >= asked[DIRECTORY_RESOURCE]
    assert types["directory"]["resources"]["CPU"] == 0
    assert DIRECTORY_RESOURCE not in types["workers"]["resources"]
