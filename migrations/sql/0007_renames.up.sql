-- Handlers that have another name than before, and what still carries the old one.
--
-- A build that renames a handler changes its subscription at once. Messages and dead letters follow in
-- batches, because a queue may hold millions, and some of them are written after the rename by
-- transactions that began before it.
--
-- Locks: none that anybody could wait for; the table is new.
-- Workers of the previous release may keep running: they finish what they have claimed, and verdicts do not
-- go by the handler's name.

create table core.renames (
    namespace text not null references core.namespaces,
    group_name text not null,
    former text not null,
    handler text not null,
    -- Both names were subscribed when the rename came: an event that was fanned out under this
    -- version or a later one was sent to both, so what waits for the former name is left out. Null if
    -- only the former name was subscribed.
    both_since bigint,
    -- Dead letters up to this message have been looked at.
    letters_until bigint not null default 0,
    renamed_at timestamptz not null default core.now(),
    primary key (namespace, group_name, former),
    check (former <> handler)
);

comment on table core.renames is
    'Names that handlers had before. What waits for a former name is moved to the handler by its nodes.';
