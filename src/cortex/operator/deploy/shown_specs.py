"""The spec of a version as answers show it. Called by the views and by `versions`, its cache."""

from __future__ import annotations

from dataclasses import dataclass

from cortex.spec.api import MASK, Api, ApiSpec
from cortex.spec.job import Json


@dataclass(frozen=True)
class ShownSpec:
    """The spec of a version as answers show it."""

    endpoint: str
    text: str
    """As JSON."""


def shown_spec(spec: ApiSpec) -> Json:
    """The spec of a version, with the keys that Cortex had beside ours, and without secrets: every
    token may read it, and answers end in logs."""
    answer = spec.model_dump(mode="json")
    submitted = answer["submitted_api_spec"] or _submitted_entry(spec)
    compute = submitted.get("compute")
    written = compute.get("cpu") if isinstance(compute, dict) else None
    answer["definition"]["env"] = dict.fromkeys(spec.definition.env, MASK)
    answer["compute"]["cpu"] = f"{spec.compute.cpu_m}m" if written is None else str(written)
    return {
        **answer,
        "id": spec.api_id,
        # A deploy that changes nothing makes no version: this id also identifies one API spec.
        "spec_id": spec.api_id,
        "submitted_api_spec": submitted,
    }


def _submitted_entry(spec: ApiSpec) -> Json:
    """The entry of `cortex.yaml`, for a version whose entry was not stored."""
    entry = spec.model_dump(mode="json", include=set(Api.model_fields), exclude_defaults=True)
    if spec.definition.env:
        entry["definition"]["env"] = dict.fromkeys(spec.definition.env, MASK)
    if "cpu_m" in entry.get("compute", {}):
        entry["compute"]["cpu"] = f"{entry['compute'].pop('cpu_m')}m"
    return {**entry, "kind": spec.kind}
