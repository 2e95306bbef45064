-- Redriving and purging find the letters that they have locked by their place in the table.
--
-- By id, the planner took another index than the primary key where it believed the table to be empty, as it is
-- after a vacuum that found nothing in it, until the next analyze: with a million letters that were written since,
-- 500 took 67 s.
--
-- Locks: none. Workers of the previous release may keep running.

-- What core.redrive would do, and what it would leave (or has left) where it is. Changes nothing.
create or replace function core.plan_redrive(p_namespace text, p_group text, p_filter jsonb, p_limit bigint default null)
returns table (handler text, event_version text, outcome text, letters bigint, is_live boolean)
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
    -- Without a limit nothing has to be put in order, or kept.
    return query execute format(
        'select g.handler, g.version, g.outcome, g.letters,
                g.outcome in (''redrive'', ''adopt'') and core.is_run($1, $2, g.handler, g.version)
         from (
             select case l.outcome when ''adopt'' then null else l.handler end as handler,
                    case when l.outcome in (''redrive'', ''unsubscribed'') then l.version end as version,
                    l.outcome, count(*) as letters
             from (%s) l
             group by 1, 2, 3
         ) g
         order by g.letters desc, g.handler, g.version, g.outcome',
        format(
            case when p_limit is null then '%1$s'
                 else '(select * from (%1$s) a where a.outcome in (''redrive'', ''adopt'')
                        order by a.enqueued_at, a.msg_id limit $3)
                       union all
                       select * from (%1$s) a where a.outcome not in (''redrive'', ''adopt'')' end,
            format(
                'select q.enqueued_at, q.msg_id, coalesce(t.handler, q.headers ->> ''handler'') as handler,
                        q.headers ->> ''eventVersion'' as version,
                        core.letter_outcome(q.message, q.headers, t.name is not null) as outcome
                 from pgmq.%I q
                 left join core.letter_targets($1, $2) t on t.name = q.headers ->> ''handler''
                 where %s',
                core.letters_table(p_namespace, p_group), core.letter_condition(p_filter))))
    using p_namespace, p_group, p_limit;
end
$$;

-- Puts dead letters of a group back into its queue, the oldest first: at most `p_limit` and about 8 MB, by
-- one statement. Call it again until it returns no row. A letter keeps its identity and the history of its
-- errors; all attempts are before it. Returns a row for each handler and event version.
--
-- A letter is locked before it is moved, so of two calls at once one moves it. Message n becomes due
-- n * `p_pace` after `p_start`, which is now if it is not given; n counts from `p_done`. Only letters up to
-- id `p_until` are moved. `p_payload` replaces the payload of a single letter, and is not checked here:
-- Client::redrive_edited checks it. `p_by` is kept in the history; default is the session's user.
create or replace function core.redrive(
    p_namespace text, p_group text, p_filter jsonb, p_by text default null, p_pace interval default '0',
    p_limit integer default 500, p_until bigint default null, p_start timestamptz default null,
    p_done bigint default 0, p_payload jsonb default null
) returns table (handler text, event_version text, letters bigint, is_live boolean, last_due_at timestamptz)
language plpgsql
set search_path = pg_catalog, pg_temp
-- Somebody else's transaction that holds a letter must not hold this one for ever.
set lock_timeout = '10s'
set enable_seqscan = off
set enable_sort = off
-- The statement has many steps, which look worth compiling and are not.
set jit = off
as $$
declare
    letters_table text := core.letters_table(p_namespace, p_group);
    places tid[];
begin
    if p_payload is not null and jsonb_array_length(p_filter -> 'ids') is distinct from 1 then
        raise exception 'a payload is for a single dead letter: the filter must hold "ids" with one id'
            using errcode = 'invalid_parameter_value';
    end if;
    execute format(
        'with picked as materialized (
             -- No join, which could cost the order of the index.
             select q.ctid as place, q.msg_id, q.enqueued_at, pg_column_size(q.message) as bytes
             from pgmq.%I q
             where %s and ($3 is null or q.msg_id <= $3)
               and core.letter_outcome(q.message, q.headers,
                       q.headers ->> ''handler'' in (select t.name from core.letter_targets($1, $2) t)) in (''redrive'', ''adopt'')
             order by q.enqueued_at, q.msg_id limit $4
             for update
         ), counted as (
             select p.*, sum(p.bytes) over w - p.bytes as bytes_before
             from picked p window w as (order by p.enqueued_at, p.msg_id)
         )
         select array_agg(c.place order by c.enqueued_at, c.msg_id) from counted c
         where c.bytes_before < 8 * 1024 * 1024',
        letters_table, core.letter_condition(p_filter))
    into places
    using p_namespace, p_group, p_until, p_limit;
    -- They are locked, so they stay where they are.
    return query execute format(
        'with d as (
             delete from pgmq.%1$I q where q.ctid = any ($3)
             returning q.ctid as place, q.enqueued_at, q.message, q.headers
         ), r as materialized (
             select b.n - 1 as n, d.message -> ''originalEvent'' as original, d.headers, t.handler, t.subscription_id,
                    core.letter_outcome(d.message, d.headers, t.handler is not null) = ''redrive'' as is_ours,
                    jsonb_build_object(
                        ''redriven'', case when d.headers ->> ''redriven'' ~ ''^[0-9]{1,8}$''
                                           then (d.headers ->> ''redriven'')::integer else 0 end + 1,
                        -- The newest ten: nine from before, and this one.
                        ''redrives'', case when jsonb_typeof(d.headers -> ''redrives'') = ''array''
                                then jsonb_path_query_array(d.headers -> ''redrives'', ''$[last - 8 to last]'') else ''[]'' end
                            || jsonb_strip_nulls(jsonb_build_object(
                                   ''at'', core.iso_time(core.now()), ''by'', left(coalesce($4, session_user), 100),
                                   ''attempts'', case when d.message ->> ''attempts'' ~ ''^[0-9]{1,8}$'' then (d.message ->> ''attempts'')::integer end,
                                   ''reason'', left(d.message ->> ''reason'', 100),
                                   ''error'', left(d.message ->> ''error'', 500), ''failedAt'', core.iso_time(d.enqueued_at),
                                   ''edited'', case when $5 is not null then true end)))
                    || case when $5 is null then ''{}''::jsonb else ''{"edited": true}'' end as history
             from d
             join unnest($3) with ordinality b (place, n) using (place)
             left join core.letter_targets($1, $2) t on t.name = d.headers ->> ''handler''
         ), sent as (
             insert into pgmq.%2$I (vt, message, headers)
             select coalesce($6, core.now()) + ($7 + r.n) * $8,
                    case when $5 is null then coalesce(r.original, ''null'') else jsonb_set(r.original, ''{payload}'', $5) end,
                    case when r.is_ours
                         then r.headers - ''{abandoned,settled,fingerprint,eventType}''::text[]
                             || jsonb_build_object(''attempts'', 0, ''handler'', r.handler, ''subscription'', r.subscription_id)
                             || case when r.headers ->> ''handler'' = r.handler then ''{}''
                                     else jsonb_build_object(''formerly'', coalesce(r.headers -> ''formerly'', r.headers -> ''handler'')) end
                             -- It may be killing its process: claimed alone from the start, with eight
                             -- more losses before it is given up.
                             || case when r.headers ->> ''abandoned'' ~ ''^([2-9]|[1-9][0-9]+)$'' then ''{"abandoned": 2}''::jsonb else ''{}'' end
                         else ''{}'' end || r.history
             from r order by r.n
             returning vt, headers
         ), g as (
             select s.headers ->> ''handler'' as handler, s.headers ->> ''eventVersion'' as version,
                    count(*) as letters, max(s.vt) as last_due_at
             from sent s group by 1, 2
         )
         select g.handler, g.version, g.letters, core.is_run($1, $2, g.handler, g.version), g.last_due_at
         from g order by g.letters desc, g.handler, g.version',
        letters_table, left(letters_table, -4))
    using p_namespace, p_group, places, p_by, p_payload, p_start, p_done, p_pace;
end
$$;

-- Deletes dead letters of a group for good, the oldest first, at most `p_limit`, up to id `p_until`.
-- Returns how many; call it again until it returns 0.
create or replace function core.purge_dead_letters(
    p_namespace text, p_group text, p_filter jsonb, p_limit integer default 1000, p_until bigint default null
) returns bigint
language plpgsql
set search_path = pg_catalog, pg_temp
set lock_timeout = '10s'
set enable_seqscan = off
set enable_sort = off
set jit = off
as $$
declare
    places tid[];
    purged bigint;
begin
    execute format(
        'select array_agg(l.place) from (
             select q.ctid as place from pgmq.%I q where %s and ($1 is null or q.msg_id <= $1)
             order by q.enqueued_at, q.msg_id limit $2
             for update
         ) l',
        core.letters_table(p_namespace, p_group), core.letter_condition(p_filter))
    into places
    using p_until, p_limit;
    execute format(
        'with d as (delete from pgmq.%I q where q.ctid = any ($1) returning 1) select count(*) from d',
        core.letters_table(p_namespace, p_group))
    into purged
    using places;
    return purged;
end
$$;
