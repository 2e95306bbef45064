-- Dead letters: found by handler, event type, error and age, redriven and purged in bounded steps.
--
-- Locks: SHARE and then ACCESS EXCLUSIVE on each queue of dead letters, for as long as it takes to write
-- the new headers and four indexes: seconds for a hundred thousand letters. Queues of messages are not
-- touched. Workers of the previous release may keep running; giving a message up waits meanwhile.

-- An error without what differs from one occurrence to the next (quoted values, addresses, ids, numbers
-- with their units, white space), so that "timeout after 3s for user 17" and "… for user 18" are one.
create function core.normalize_error(p_error text) returns text
language plpgsql immutable strict parallel safe
set search_path = pg_catalog, pg_temp
as $$
declare
    e text := left(p_error, 2000);
begin
    e := regexp_replace(e, '"([^"\\]|\\.)*"', '?', 'g');
    -- Not the apostrophe of a word.
    e := regexp_replace(e, '(^|[^A-Za-z0-9_])''[^'']*''(?![A-Za-z0-9_])', '\1?', 'g');
    e := regexp_replace(e, '[A-Za-z0-9._%+-]+@[A-Za-z0-9.-]+', '?', 'g');
    e := regexp_replace(e, '[0-9A-Fa-f]{8}-?([0-9A-Fa-f]{4}-?){3}[0-9A-Fa-f]{12}', '?', 'g');
    -- Hexadecimal: marked as such, or eight digits and more of which one is no letter.
    e := regexp_replace(e, '\m(0[xX][0-9A-Fa-f]+|(?=[A-Fa-f]*[0-9])[0-9A-Fa-f]{8,})\M', '?', 'g');
    e := regexp_replace(e, '[0-9]+([.,:_][0-9]+)*((ns|us|µs|ms|s|min|m|h|d)(?![A-Za-z0-9_]))?', '?', 'g');
    e := btrim(regexp_replace(e, '\s+', ' ', 'g'));
    -- Lists of any length, dates, addresses.
    return regexp_replace(e, '\?([-+,;:/. ]*\?)+', '?', 'g');
end
$$;

-- What dead letters of one cause have in common: 16 hexadecimal digits.
create function core.error_fingerprint(p_reason text, p_error text) returns text
language sql immutable parallel safe
return left(md5(coalesce(p_reason, '') || chr(10) || coalesce(core.normalize_error(p_error), '')), 16);

-- As before; and for dead letters an index for each way to look for them, newest or oldest first. The
-- first one keeps the name of pgmq's index on vt, so that a repeated pgmq.create does not bring that one
-- back.
create or replace function core.tune_queue(p_queue text, p_claimed boolean) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    q text := 'q_' || p_queue;
begin
    execute format('drop index if exists pgmq.%I', q || '_vt_idx');
    if p_claimed then
        execute format(
            'create index %I on pgmq.%I ((headers ->> ''handler''), (headers ->> ''eventVersion''), vt, msg_id)',
            q || '_vt_idx', q);
        -- The few messages that lost their lease before and may have to be run alone.
        execute format(
            'create index if not exists %I on pgmq.%I (msg_id) where (headers ->> ''abandoned'')::int >= 1',
            q || '_suspect_idx', q);
        -- What core.adopt looks for, by the same predicate: no claim finds these.
        execute format(
            'create index if not exists %I on pgmq.%I (msg_id)
             where ((headers ->> ''handler'') is not null and (headers ->> ''eventVersion'') ~ ''^[1-9][0-9]*$'') is not true',
            q || '_foreign_idx', q);
        execute format(
            'alter table pgmq.%I set (fillfactor = 70, autovacuum_vacuum_scale_factor = 0,
                 autovacuum_vacuum_threshold = 5000, autovacuum_vacuum_cost_delay = 0,
                 autovacuum_vacuum_insert_scale_factor = 0, autovacuum_vacuum_insert_threshold = 100000)', q);
    else
        execute format('create index %I on pgmq.%I (enqueued_at, msg_id)', q || '_vt_idx', q);
        execute format('create index if not exists %I on pgmq.%I ((headers ->> ''handler''), enqueued_at, msg_id)',
                       q || '_handler_idx', q);
        execute format('create index if not exists %I on pgmq.%I ((headers ->> ''eventType''), enqueued_at, msg_id)',
                       q || '_type_idx', q);
        execute format('create index if not exists %I on pgmq.%I ((headers ->> ''fingerprint''), enqueued_at, msg_id)',
                       q || '_error_idx', q);
    end if;
    begin
        execute format('alter table pgmq.%I alter column message set compression lz4', q);
    exception when feature_not_supported then
        null; -- a server that was built without lz4 keeps its default
    end;
end
$$;

-- The headers by which dead letters are looked for, of a message that is or was given up.
create function core.letter_headers(p_original jsonb, p_reason text, p_error text) returns jsonb
language sql immutable parallel safe
return jsonb_build_object('fingerprint', core.error_fingerprint(p_reason, p_error))
    -- Cut, because an index holds it and a foreign program may have sent anything.
    || case when jsonb_typeof(p_original -> 'eventType') = 'string'
            then jsonb_build_object('eventType', left(p_original ->> 'eventType', 100)) else '{}' end;

-- Moves one message to the dead letters of its queue. The body of a dead letter has the original
-- system's fields and who failed how often. Fenced by read_ct: false if the lease was lost.
create or replace function core.dead_letter(
    p_queue text, p_msg_id bigint, p_read_ct integer, p_reason text, p_error text,
    p_attempts integer, p_errors jsonb
) returns boolean
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    moved bigint;
begin
    execute format(
        'with d as (
             delete from pgmq.%1$I where msg_id = $1 and read_ct = $2 returning message, headers
         )
         insert into pgmq.%2$I (enqueued_at, vt, message, headers)
         select core.now(), core.now(),
                jsonb_build_object(''originalEvent'', message, ''reason'', $3,
                    ''failedAt'', core.iso_time(core.now()), ''error'', $4,
                    ''handler'', headers ->> ''handler'', ''attempts'', $5, ''errors'', $6),
                case when jsonb_typeof(headers) = ''object'' then headers - ''settled'' else ''{}'' end
                    || jsonb_build_object(''attempts'', $5, ''errors'', $6)
                    || core.letter_headers(message, $3, $4)
         from d
         returning msg_id',
        'q_' || p_queue, 'q_' || p_queue || '_dlq')
    into moved
    using p_msg_id, p_read_ct, p_reason, p_error, p_attempts, p_errors;
    return moved is not null;
end
$$;

do $$
declare
    letters text;
begin
    for letters in
        select queue_name || '_dlq' from core.groups
        where to_regclass(format('pgmq.%I', 'q_' || queue_name || '_dlq')) is not null
    loop
        execute format(
            'update pgmq.%I
             set headers = case when jsonb_typeof(headers) = ''object'' then headers else ''{}'' end
                 || core.letter_headers(message -> ''originalEvent'', message ->> ''reason'', message ->> ''error'')
             where jsonb_typeof(message) = ''object'' and message ? ''originalEvent''', 'q_' || letters);
        perform core.tune_queue(letters, false);
    end loop;
end
$$;

-- The table of a group's dead letters.
create function core.letters_table(p_namespace text, p_group text) returns text
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
    queue text;
begin
    select queue_name into queue from core.groups where namespace = p_namespace and group_name = p_group;
    if not found then
        raise exception 'namespace "%" has no group "%"', p_namespace, p_group
            using errcode = 'undefined_object',
                  hint = 'select group_name from core.groups where namespace = … lists them';
    end if;
    return 'q_' || queue || '_dlq';
end
$$;

-- A filter of dead letters as a condition on the table q. `{}` is all of them. Keys: "ids" (an array),
-- "handler", "withoutHandler" (true), "eventType", "fingerprint", "reason", "olderThan", "newerThan"
-- (intervals such as "2 hours"), "from", "until" (times).
create function core.letter_condition(p_filter jsonb) returns text
language plpgsql stable
set search_path = pg_catalog, pg_temp
-- For a time without a zone.
set timezone = 'UTC'
as $$
declare
    condition text := 'true';
    name text;
    value jsonb;
    word text;
    expected text;
begin
    if jsonb_typeof(p_filter) is distinct from 'object' then
        raise exception 'a filter of dead letters is a JSON object, found %', coalesce(p_filter::text, 'null')
            using errcode = 'invalid_parameter_value', hint = '{} is all dead letters of the group';
    end if;
    for name, value in select * from jsonb_each(p_filter) loop
        word := value #>> '{}';
        expected := case
            when name = 'ids' then
                case when jsonb_typeof(value) = 'array' and not jsonb_path_exists(value, '$[*] ? (@.type() != "number")')
                     then null else 'an array of ids' end
            when name = 'withoutHandler' then
                case when value = 'true' then null else 'true' end
            when name in ('handler', 'eventType', 'fingerprint', 'reason') then
                case when jsonb_typeof(value) = 'string' then null else 'a text' end
            when name in ('olderThan', 'newerThan') then
                case when jsonb_typeof(value) = 'string' and word ~ '[a-zA-Z:]'
                     then null else 'an interval such as "2 hours"' end
            when name in ('from', 'until') then
                case when jsonb_typeof(value) = 'string' and word ~ '^[0-9]{4}-[0-9]{2}-[0-9]{2}[T ][0-9]{2}:[0-9]{2}'
                     then null else 'a time such as "2030-01-31T12:00:00Z"' end
            else 'none of this name: ids, handler, withoutHandler, eventType, fingerprint, reason, olderThan, newerThan, from, until are known'
        end;
        if expected is not null then
            raise exception 'filter "%" of dead letters is %, expected %', name, value, expected
                using errcode = 'invalid_parameter_value';
        end if;
        condition := condition || ' and ' || case name
            when 'ids' then format('q.msg_id = any (%L::bigint[])',
                                   array(select id::bigint from jsonb_array_elements_text(value) id))
            when 'handler' then format('q.headers ->> ''handler'' = %L', word)
            when 'withoutHandler' then 'q.headers ->> ''handler'' is null'
            when 'eventType' then format('q.headers ->> ''eventType'' = %L', word)
            when 'fingerprint' then format('q.headers ->> ''fingerprint'' = %L', word)
            when 'reason' then format('q.message ->> ''reason'' = %L', word)
            when 'olderThan' then format('q.enqueued_at <= %L::timestamptz', core.now() - word::interval)
            when 'newerThan' then format('q.enqueued_at > %L::timestamptz', core.now() - word::interval)
            when 'from' then format('q.enqueued_at >= %L::timestamptz', word::timestamptz)
            when 'until' then format('q.enqueued_at <= %L::timestamptz', word::timestamptz)
        end;
    end loop;
    return condition;
end
$$;

-- The dead letters of a group, newest first; those before a letter that was shown as the last one.
-- Changes nothing.
create function core.dead_letters(
    p_namespace text, p_group text, p_filter jsonb default '{}', p_limit integer default 100,
    p_before_at timestamptz default null, p_before_id bigint default null
) returns table (
    id bigint, failed_at timestamptz, handler text, event_type text, event_id bigint, fingerprint text,
    reason text, error text, attempts text, redriven text, letter jsonb, headers jsonb
)
language plpgsql stable
set search_path = pg_catalog, pg_temp
-- Walks an index in order, also where the table was filled since it was analyzed.
set enable_seqscan = off
set enable_sort = off
set jit = off
as $$
begin
    return query execute format(
        'select q.msg_id, q.enqueued_at, q.headers ->> ''handler'', q.headers ->> ''eventType'',
                case when q.headers ->> ''eventId'' ~ ''^[0-9]{1,18}$'' then (q.headers ->> ''eventId'')::bigint end,
                q.headers ->> ''fingerprint'', q.message ->> ''reason'', q.message ->> ''error'',
                q.message ->> ''attempts'', coalesce(q.headers ->> ''redriven'', ''0''), q.message, q.headers
         from pgmq.%I q
         -- Of two upper bounds the first one is where a walk begins.
         where ($1 is null or (q.enqueued_at, q.msg_id) < ($1, coalesce($2, 0))) and %s
         order by q.enqueued_at desc, q.msg_id desc limit $3',
        core.letters_table(p_namespace, p_group), core.letter_condition(p_filter))
    using p_before_at, p_before_id, p_limit;
end
$$;

-- What died of what: the dead letters of the namespace, or of one group, by handler, event type and
-- fingerprint, the largest number first; the newest letter is the sample.
create function core.dead_letter_summary(
    p_namespace text, p_filter jsonb default '{}', p_group text default null, p_limit integer default 100
) returns table (
    group_name text, handler text, event_type text, fingerprint text, letters bigint,
    first_failed_at timestamptz, last_failed_at timestamptz, sample_id bigint,
    sample_reason text, sample_error text
)
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
    g record;
    query text;
begin
    for g in
        select c.group_name, core.letters_table(p_namespace, c.group_name) as letters from core.groups c
        where c.namespace = p_namespace and (p_group is null or c.group_name = p_group)
        order by c.group_name
    loop
        -- The text of the errors is read for the samples only: bodies are large.
        query := concat_ws(' union all ', query, format(
            'select %1$L::text as group_name, s.handler, s.event_type, s.fingerprint, s.letters, s.first_at, s.last_at,
                    s.sample_id, (select q.message ->> ''reason'' from pgmq.%2$I q where q.msg_id = s.sample_id),
                    (select q.message ->> ''error'' from pgmq.%2$I q where q.msg_id = s.sample_id)
             from (select q.headers ->> ''handler'' as handler, q.headers ->> ''eventType'' as event_type,
                          q.headers ->> ''fingerprint'' as fingerprint, count(*) as letters,
                          min(q.enqueued_at) as first_at, max(q.enqueued_at) as last_at, max(q.msg_id) as sample_id
                   from pgmq.%2$I q where %3$s
                   group by 1, 2, 3
                   order by letters desc, sample_id desc limit $1) s', g.group_name, g.letters, core.letter_condition(p_filter)));
    end loop;
    if query is not null then
        return query execute format('select * from (%s) a order by letters desc, last_at desc, sample_id desc limit $1', query)
            using p_limit;
    elsif p_group is not null then
        perform core.letters_table(p_namespace, p_group);
    end if;
end
$$;

-- Which handler of a group a name stands for, its former names included.
create function core.letter_targets(p_namespace text, p_group text)
returns table (name text, handler text, subscription_id bigint)
language sql stable
begin atomic
    select s.handler, s.handler, s.subscription_id from core.subscriptions s
    where s.namespace = p_namespace and s.group_name = p_group
    union all
    select r.former, s.handler, s.subscription_id
    from core.renames r
    join core.subscriptions s using (namespace, group_name, handler)
    where r.namespace = p_namespace and r.group_name = p_group
      and not exists (select from core.subscriptions o
                      where o.namespace = p_namespace and o.group_name = p_group and o.handler = r.former);
end;

-- What becomes of a dead letter that is redriven: "redrive" to its handler; "adopt", because it names no
-- handler and was a foreign program's; or it stays, "unsubscribed" or "no original".
create function core.letter_outcome(p_message jsonb, p_headers jsonb, p_is_subscribed boolean) returns text
language sql immutable parallel safe
return case
    -- The header is one that only we write, beside an original; looking into the body is dear.
    when p_headers -> 'fingerprint' is null
         and (jsonb_typeof(p_message) = 'object' and p_message ? 'originalEvent') is not true then 'no original'
    when ((p_headers ->> 'handler') is not null and (p_headers ->> 'eventVersion') ~ '^[1-9][0-9]*$') is not true then 'adopt'
    when p_is_subscribed then 'redrive'
    else 'unsubscribed' end;

-- Whether a live node can run what is redriven to a handler; without one, whether one could adopt it.
create function core.is_run(p_namespace text, p_group text, p_handler text, p_version text) returns boolean
language sql stable
begin atomic
    select exists (
        select from core.nodes n
        where n.namespace = p_namespace and core.is_live(n.last_heartbeat)
          and (p_handler is null
               or n.handlers @> jsonb_build_array(jsonb_build_object(
                      'group', p_group, 'handler', p_handler, 'eventVersion', p_version::numeric))));
end;

-- What core.redrive would do, and what it would leave (or has left) where it is. Changes nothing.
create function core.plan_redrive(p_namespace text, p_group text, p_filter jsonb, p_limit bigint default null)
returns table (handler text, event_version text, outcome text, letters bigint, is_live boolean)
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
    return query execute format(
        'with l as (
             select q.enqueued_at, q.msg_id, coalesce(t.handler, q.headers ->> ''handler'') as handler, q.headers,
                    core.letter_outcome(q.message, q.headers, t.name is not null) as outcome
             from pgmq.%I q
             left join core.letter_targets($1, $2) t on t.name = q.headers ->> ''handler''
             where %s
         ), g as (
             select case o.outcome when ''adopt'' then null else o.handler end as handler,
                    case when o.outcome in (''redrive'', ''unsubscribed'') then o.headers ->> ''eventVersion'' end as version,
                    o.outcome, count(*) as letters
             from ((select * from l where l.outcome in (''redrive'', ''adopt'') order by l.enqueued_at, l.msg_id limit $3)
                   union all
                   select * from l where l.outcome not in (''redrive'', ''adopt'')) o
             group by 1, 2, 3
         )
         select g.handler, g.version, g.outcome, g.letters,
                g.outcome in (''redrive'', ''adopt'') and core.is_run($1, $2, g.handler, g.version)
         from g order by g.letters desc, g.handler, g.version, g.outcome',
        core.letters_table(p_namespace, p_group), core.letter_condition(p_filter))
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
create function core.redrive(
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
begin
    if p_payload is not null and jsonb_array_length(p_filter -> 'ids') is distinct from 1 then
        raise exception 'a payload is for a single dead letter: the filter must hold "ids" with one id'
            using errcode = 'invalid_parameter_value';
    end if;
    return query execute format(
        'with picked as materialized (
             -- No join, which could cost the order of the index.
             select q.msg_id, q.enqueued_at, pg_column_size(q.message) as bytes
             from pgmq.%1$I q
             where %3$s and ($3 is null or q.msg_id <= $3)
               and core.letter_outcome(q.message, q.headers,
                       q.headers ->> ''handler'' in (select t.name from core.letter_targets($1, $2) t)) in (''redrive'', ''adopt'')
             order by q.enqueued_at, q.msg_id limit $4
             for update
         ), counted as materialized (
             select p.*, row_number() over w - 1 as n, sum(p.bytes) over w - p.bytes as bytes_before
             from picked p window w as (order by p.enqueued_at, p.msg_id)
         ), bounded as materialized (
             select * from counted c where c.bytes_before < 8 * 1024 * 1024
         ), d as (
             delete from pgmq.%1$I q where q.msg_id = any (array(select b.msg_id from bounded b))
             returning q.msg_id, q.enqueued_at, q.message, q.headers
         ), r as materialized (
             select b.n, d.message -> ''originalEvent'' as original, d.headers, t.handler, t.subscription_id,
                    core.letter_outcome(d.message, d.headers, t.handler is not null) = ''redrive'' as is_ours,
                    jsonb_build_object(
                        ''redriven'', case when d.headers ->> ''redriven'' ~ ''^[0-9]{1,8}$''
                                           then (d.headers ->> ''redriven'')::integer else 0 end + 1,
                        -- The newest ten: nine from before, and this one.
                        ''redrives'', case when jsonb_typeof(d.headers -> ''redrives'') = ''array''
                                then jsonb_path_query_array(d.headers -> ''redrives'', ''$[last - 8 to last]'') else ''[]'' end
                            || jsonb_strip_nulls(jsonb_build_object(
                                   ''at'', core.iso_time(core.now()), ''by'', left(coalesce($5, session_user), 100),
                                   ''attempts'', case when d.message ->> ''attempts'' ~ ''^[0-9]{1,8}$'' then (d.message ->> ''attempts'')::integer end,
                                   ''reason'', left(d.message ->> ''reason'', 100),
                                   ''error'', left(d.message ->> ''error'', 500), ''failedAt'', core.iso_time(d.enqueued_at),
                                   ''edited'', case when $6 is not null then true end)))
                    || case when $6 is null then ''{}''::jsonb else ''{"edited": true}'' end as history
             from d
             join bounded b using (msg_id)
             left join core.letter_targets($1, $2) t on t.name = d.headers ->> ''handler''
         ), sent as (
             insert into pgmq.%2$I (vt, message, headers)
             select coalesce($7, core.now()) + ($8 + r.n) * $9,
                    case when $6 is null then coalesce(r.original, ''null'') else jsonb_set(r.original, ''{payload}'', $6) end,
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
        letters_table, left(letters_table, -4), core.letter_condition(p_filter))
    using p_namespace, p_group, p_until, p_limit, p_by, p_payload, p_start, p_done, p_pace;
end
$$;

-- Deletes dead letters of a group for good, the oldest first, at most `p_limit`, up to id `p_until`.
-- Returns how many; call it again until it returns 0.
create function core.purge_dead_letters(
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
    purged bigint;
begin
    execute format(
        'with d as (
             delete from pgmq.%1$I d where d.msg_id = any (array(
                 select q.msg_id from pgmq.%1$I q where %2$s and ($1 is null or q.msg_id <= $1)
                 order by q.enqueued_at, q.msg_id limit $2
                 for update))
             returning 1
         )
         select count(*) from d',
        core.letters_table(p_namespace, p_group), core.letter_condition(p_filter))
    into purged
    using p_until, p_limit;
    return purged;
end
$$;
