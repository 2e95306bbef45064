-- An idempotency key is a text of 1 to 1,000 bytes, however it comes in. The empty one was a key like any
-- other: all who gave it by mistake shared one event.
--
-- Locks: core.idempotency_keys for a moment; rows that are there are not looked at, they expire.
-- Workers of the previous release keep running; an emit of theirs with the empty key fails.

-- Returns true, so that it can stand in a CHECK.
create function core.check_idempotency_key(p_key text) returns boolean
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
begin
    if p_key = '' then
        raise exception 'the idempotency key is empty: leave it out for an event that needs none'
            using errcode = 'invalid_parameter_value';
    end if;
    -- More does not fit into a row of the index.
    if octet_length(p_key) > 1000 then
        raise exception 'the idempotency key has % bytes, the limit is 1000: use a hash of it', octet_length(p_key)
            using errcode = 'invalid_parameter_value';
    end if;
    return true;
end
$$;

alter table core.idempotency_keys
    add constraint idempotency_key check (core.check_idempotency_key(key)) not valid;
