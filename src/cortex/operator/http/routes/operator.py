"""The operator's own routes: APIs, cluster, audit, health and metrics.

Most are under `/-/`, where no API's endpoint can be.
"""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, File, Form, Request, UploadFile
from pydantic import JsonValue
from starlette.responses import Response

import cortex
from cortex.engines.base import Capacity
from cortex.errors import InvalidSpec, NotFound
from cortex.operator.deploy.deployer import Deployer, safe_name
from cortex.operator.http.answers import Answer, json_answer
from cortex.operator.http.context import actor, context
from cortex.operator.http.gate import UPLOAD_PATH
from cortex.operator.http.routes.jobs import Cursor, Limit
from cortex.operator.http.views import json_array
from cortex.operator.metrics import MEDIA_TYPE
from cortex.spec.job import with_texts
from cortex.spec.quantities import MILLI
from cortex.spec.times import rfc3339

router = APIRouter(default_response_class=Answer, tags=["operator"])

_MAX_CONFIG_BYTES = 1024 * 1024
_PAGE_SIZE = 50


@router.get("/healthz")
async def healthz() -> Answer:
    """Check that the process answers."""
    return Answer({"status": "ok"})


@router.get("/readyz")
async def readyz(request: Request) -> Answer:
    """Check that jobs can be stored: 503 if the store cannot be written. `problem` says why the
    leader's engine cannot start jobs now; jobs wait then."""
    ctx = context(request)
    await ctx.store.ping()
    problem = None if (engine := ctx.jobs.engine) is None else engine.capabilities.problem
    if problem is None:
        return Answer({"status": "ready"})
    if ctx.settings.require_token:  # this route needs none, and the problem names an address
        problem = "the engine cannot start jobs now; `cortex cluster info` says why"
    return Answer({"status": "ready", "problem": problem})


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(request: Request) -> Response:
    """Get metrics of this operator's jobs, engine and process, in Prometheus' text format."""
    ctx = context(request)
    ctx.metrics.drop_all_but({api.name for api in ctx.catalogue.all()})
    live_jobs, engine = ctx.jobs.all_live(), ctx.jobs.engine
    nodes = () if engine is None else engine.ledger.nodes()
    name = ctx.settings.engine_name
    text = await asyncio.to_thread(ctx.metrics.text, name, live_jobs, nodes)
    return Response(text, media_type=MEDIA_TYPE)


@router.get("/-/info")
async def info(request: Request) -> Response:
    """Describe this operator: version, engine and capacity. CPU in cores, memory in bytes."""
    ctx = context(request)
    if (answer := await ctx.forwarded_or_fail(request)) is not None:
        return answer
    capabilities = ctx.engine().capabilities
    return Answer(
        {
            "version": cortex.__version__,
            "engine": capabilities.name,
            "capacity": _amounts(capabilities.total),
            "memory_limit": capabilities.memory_limit,
            "own_folder": capabilities.own_folder,
        }
    )


@router.get("/-/cluster")
async def cluster(request: Request) -> Response:
    """List the machines that jobs run on, with their free capacity, and the problem if the engine
    reaches none of them. CPU in cores, memory in bytes."""
    ctx = context(request)
    if (answer := await ctx.forwarded_or_fail(request)) is not None:
        return answer
    engine = ctx.engine()
    capabilities = engine.capabilities
    return Answer(
        {
            "engine": capabilities.name,
            "problem": capabilities.problem,
            "nodes": [
                {
                    "name": node.name,
                    "is_ready": node.is_ready,
                    "problem": node.problem,
                    "total": _amounts(node.total),
                    "free": _amounts(node.free),
                    "labels": dict(node.labels),
                }
                for node in engine.ledger.nodes()
            ],
        }
    )


@router.post(UPLOAD_PATH)
async def deploy(
    request: Request,
    config: Annotated[UploadFile, File(description="The file cortex.yaml.")],
    project: Annotated[UploadFile, File(description="The project's files, as tar.gz.")],
    force: Annotated[bool, Form(description="Replace APIs that are already deployed.")] = True,
) -> Response:
    """Deploy all APIs of a cortex.yaml, or none if one has a mistake."""
    ctx = context(request)
    file = safe_name(config.filename)
    content = await config.read(_MAX_CONFIG_BYTES + 1)
    if len(content) > _MAX_CONFIG_BYTES:
        raise InvalidSpec(f"{file}: the file is over the limit of 1 MiB")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise InvalidSpec(f"{file}: the file is not UTF-8 ({error}); save it as UTF-8") from error
    deployed = await _deployer(request).deploy(
        file=file, text=text, archive=project.file, replace=force, actor=actor(request)
    )
    answers = [
        with_texts(
            {"message": each.message, "warnings": list[JsonValue](each.warnings), "error": ""},
            api=await ctx.renderer.api(each.deployment, request),
        )
        for each in deployed
    ]
    return json_answer(json_array(answers))


@router.get("/-/apis")
async def list_apis(request: Request) -> Response:
    """List all deployed APIs, with their jobs in progress and recent jobs."""
    ctx = context(request)
    if (answer := await ctx.forwarded(request)) is not None:
        return answer
    deployments = await ctx.store.deployments()
    apis = [await ctx.renderer.api(each, request) for each in deployments]
    return json_answer(json_array(apis))


@router.get("/-/apis/{name}")
async def get_api(request: Request, name: str) -> Response:
    """Get one deployed API, as a list of one."""
    ctx = context(request)
    if (answer := await ctx.forwarded(request)) is not None:
        return answer
    for deployment in await ctx.store.deployments():
        if deployment.name == name:
            return json_answer(json_array([await ctx.renderer.api(deployment, request)]))
    raise NotFound(f"there is no API {name!r}; `cortex get` lists all")


@router.get("/-/audit")
async def audit(request: Request, limit: Limit = _PAGE_SIZE, cursor: Cursor = None) -> Answer:
    """List audit entries, newest first: deploys, deletes, stops, changes of tokens, and requests
    refused for their token."""
    page = await context(request).store.audit(limit, cursor)
    return Answer(
        {
            "entries": [
                {"time": rfc3339(entry.time_ns), "by": entry.actor.name, **entry.facts()}
                for entry in page.entries
            ],
            "next_cursor": page.next_cursor,
        }
    )


@router.delete("/-/apis/{name}")
async def delete_api(request: Request, name: str) -> Answer:
    """Delete an API. Its jobs in progress are stopped."""
    stopped = await _deployer(request).undeploy(name, actor(request))
    jobs = f", and stopped {stopped} of its jobs" if stopped else ""
    return Answer({"message": f"deleted API {name}{jobs}"})


def _amounts(capacity: Capacity) -> dict[str, float]:
    return {"cpu": capacity.cpu_m / MILLI, "mem": capacity.mem, "gpu": capacity.gpu}


def _deployer(request: Request) -> Deployer:
    deployer = request.app.state.deployer
    assert isinstance(deployer, Deployer)
    return deployer
