"""Tokens in the store."""

from __future__ import annotations

import pytest

from cortex.errors import Conflict, NotFound
from cortex.spec.tokens import Scope
from cortex.store import Store
from store.store_harness import with_store


def test_a_token_is_found_by_its_digest_until_it_is_revoked(store_url: str) -> None:
    async def work(store: Store) -> None:
        await store.create_token("b", Scope.READ, "digest b")
        await store.create_token("a", Scope.DEPLOY, "digest a")
        with pytest.raises(Conflict):
            await store.create_token("a", Scope.READ, "another digest")
        assert [token.name for token in await store.tokens()] == ["a", "b"]
        token = await store.token("digest a")
        assert token is not None
        assert (token.name, token.scope) == ("a", Scope.DEPLOY)
        assert await store.known_tokens(["digest a", "another digest"]) == {"digest a"}
        await store.revoke_token("a")
        assert await store.token("digest a") is None
        with pytest.raises(NotFound):
            await store.revoke_token("a")

    with_store(store_url, work)
