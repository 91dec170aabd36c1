"""The Serve applications. Deployed only through `document.serve_config` (C19d): `serve.run` draws a new
version each time and replaces every replica."""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.schema import LoggingConfig

from serving.deployments.directory import Directory
from serving.deployments.document import DIRECTORY_DEPLOYMENT, MODEL_DEPLOYMENT
from serving.deployments.replica import Replica


def build(arguments: dict[str, Any]) -> Application:
    """The replicas of one model. arguments: `ReplicaArguments` as a mapping."""
    return serve.deployment(Replica, name=MODEL_DEPLOYMENT).bind(arguments)


def build_directory(arguments: dict[str, Any]) -> Application:
    """The directory. An application of its own, so that a new model config does not restart it.

    arguments: `secret_file`, by which gateways sign what waits in them; without it no replica is added for that.
    """
    quiet = LoggingConfig(enable_access_log=False)  # every gateway asks and tells once a second
    directory = serve.deployment(Directory, name=DIRECTORY_DEPLOYMENT, logging_config=quiet)
    return directory.bind(secret_file=arguments.get("secret_file", ""))
