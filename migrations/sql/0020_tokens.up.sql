-- Tokens, which programs show that come over HTTP.
--
-- Of a token's secret, which is 244 random bits, only the SHA-256 is kept: nobody guesses it, so nothing slower
-- is needed, and who reads the table cannot make a token of what stands there.
--
-- Locks: SHARE ROW EXCLUSIVE on core.namespaces, briefly, for the foreign key. Workers of the previous
-- release may keep running.

create table core.tokens (
    -- The part of the token that is no secret.
    token_id uuid primary key,
    namespace text not null references core.namespaces,
    name text not null check (char_length(name) between 1 and 100),
    -- 'emit', 'read': looks at everything. 'operate': steers.
    scopes text[] not null check (cardinality(scopes) > 0 and scopes <@ '{emit,read,operate}'),
    secret_sha256 bytea not null check (octet_length(secret_sha256) = 32),
    created_at timestamptz not null default core.now(),
    expires_at timestamptz,
    revoked_at timestamptz,
    -- Within a minute.
    last_used_at timestamptz
);

create index tokens_namespace_idx on core.tokens (namespace, created_at);

comment on table core.tokens is
    'Tokens of programs that come over HTTP. Made and revoked by the client, or by setting revoked_at.';

select core.isolate('core.tokens', true, true);
