"""The routes of an operator: one module for each kind of resource, and what their paths match."""

from __future__ import annotations

from starlette.convertors import StringConvertor, register_url_convertor

from cortex.spec.yaml_fields import RESERVED_ENDPOINTS


class _Endpoint(StringConvertor):
    """A path segment that can be an API's endpoint: no own route of the operator begins with it."""

    regex = rf"(?!(?:-|{'|'.join(sorted(RESERVED_ENDPOINTS))})(?:/|$))[^/]+"


class _ApiName(StringConvertor):
    """A path segment that is the name of an API. No job's id matches: ids begin with a digit."""

    regex = "[a-z][a-z0-9-]*"


register_url_convertor("endpoint", _Endpoint())
register_url_convertor("api_name", _ApiName())
