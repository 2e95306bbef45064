-- Roles with fewer rights than the owner of the schema, bound to one namespace or to all of them.
--
-- Queues are kept apart by GRANT, because each is a table of its own; the tables that namespaces share, by
-- row-level security. The owner is bound by neither, so a database with a single role pays nothing.
-- Nobody but the owner may update or delete in a whole shared table: who may, can also lock it, and stop
-- everybody else. Roles update column by column, and delete by functions that run as the owner.
--
-- A lock that any session can take by its number would let one tenant stop another. What serialized
-- registrations, new groups and new partitions by such a number goes by locks on rows and tables now.
--
-- Locks: ACCESS EXCLUSIVE on every table of the schema, briefly; the index of the key of
-- core.delayed_emits is made again. Workers of the previous release may keep running, as the owner.

-- Who is bound to what; '*' stands for all namespaces, also future ones. A role that is dropped leaves a
-- row that means nobody.
create table core.role_access (
    role regrole not null,
    namespace text not null check (namespace = '*' or core.check_queue_name(namespace, 'default')),
    -- 'app': all that an app does there. 'read': looks only.
    access text not null check (access in ('app', 'read')),
    granted_at timestamptz not null default core.now(),
    primary key (role, namespace)
);

comment on table core.role_access is
    'Which role may do what in which namespace. Changed by core.grant_namespace, core.revoke_namespace and core.create_roles.';

alter table core.role_access enable row level security;
create policy reading on core.role_access for select using (pg_has_role(role, 'usage'));

-- Who calls a function that runs as its owner: the session's role, or the one it has set since.
create function core.caller() returns name
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select case current_setting('role') when 'none' then session_user else current_setting('role')::name end
$$;

create function core.owner() returns oid
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select relowner from pg_class where oid = 'core.role_access'::regclass
$$;

-- Whether the caller has an access, 'app' or 'read', to a namespace.
create function core.caller_may(p_access text, p_namespace text) returns boolean
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select pg_has_role(core.caller(), core.owner(), 'usage') or exists (
        select from core.role_access a
        where a.namespace in (p_namespace, '*') and (a.access = 'app' or p_access = 'read')
          and pg_has_role(core.caller(), a.role, 'usage'))
$$;

-- Refuses callers that have not got the access. Functions that run as the owner begin with it.
create function core.require_access(p_access text, p_namespace text) returns void
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
    if core.caller_may(p_access, p_namespace) is not true then
        raise exception 'role "%" % namespace "%": as role "%", run select core.grant_namespace(%, %)',
            core.caller(),
            case when core.caller_may('read', p_namespace) then 'may only read in' else 'is not bound to' end,
            p_namespace, pg_get_userbyid(core.owner()), quote_literal(p_namespace), quote_literal(core.caller())
            using errcode = 'insufficient_privilege';
    end if;
end
$$;

-- Names sessions for a message.
create function core.name_sessions(p_pids integer[]) returns text
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select coalesce(string_agg(format('session %s of role "%s"', pid, usename), ', ' order by pid), 'another session')
    from pg_stat_activity where pid = any (p_pids)
$$;

-- The condition of a policy: what stands in `p_column` is a namespace that the current role has an access
-- to. Each of the two questions is asked once in a statement, not for each row. What they see of the table
-- are the role's own rows, by the policy above.
create function core.access_condition(p_access text, p_column text) returns text
language sql immutable
set search_path = pg_catalog, pg_temp
as $$
    select format(
        '(select count(*) > 0 from core.role_access a where a.namespace = ''*'' and %1$s)
         or %2$s = any (array(select a.namespace from core.role_access a where %1$s))',
        case p_access when 'app' then 'a.access = ''app''' else 'true' end, p_column)
$$;

-- Keeps the rows of a shared table apart. Every table of the schema goes through here, or says why not.
--
-- `p_column` is the namespace of a row. Where a row has none, `p_condition` is a condition around it, in
-- which %s stands for the check. Roles get the rights that there are policies for.
create function core.isolate(
    p_table regclass, p_may_insert boolean, p_may_update boolean,
    p_column text default 'namespace', p_condition text default '(%s)'
) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    readable text := format(p_condition, core.access_condition('read', p_column));
    writable text := format(p_condition, core.access_condition('app', p_column));
begin
    execute format('alter table %s enable row level security', p_table);
    execute format('create policy reading on %s for select using (%s)', p_table, readable);
    if p_may_insert then
        execute format('create policy inserting on %s for insert with check (%s)', p_table, writable);
    end if;
    if p_may_update then
        execute format('create policy updating on %s for update using (%s) with check (%s)',
                       p_table, writable, writable);
    end if;
end
$$;

select core.isolate('core.namespaces', false, true),
       core.isolate('core.groups', false, false),
       core.isolate('core.event_log', true, false),
       core.isolate('core.builds', true, false),
       core.isolate('core.nodes', true, true),
       core.isolate('core.event_types', true, true),
       core.isolate('core.subscriptions', true, true),
       core.isolate('core.scheduled_tasks', true, true),
       core.isolate('core.ticks', true, false, 't.namespace',
                    'exists (select from core.scheduled_tasks t where t.task_id = ticks.task_id and (%s))'),
       core.isolate('core.idempotency_keys', true, true),
       core.isolate('core.renames', true, true),
       core.isolate('core.delayed_emits', true, true),
       core.isolate('core.replays', true, true),
       -- Made by core.give_up_subscription, so that none stands for a subscription of another namespace.
       core.isolate('core.retirements', false, true);

-- Who may use the schema at all may see its version.
alter table core.schema_migrations enable row level security;
create policy reading on core.schema_migrations for select using (true);

-- The log is read and written as a whole; without a policy, a partition by itself is nobody's.
do $$
declare
    partition regclass;
begin
    for partition in select inhrelid::regclass from pg_inherits where inhparent = 'core.event_log'::regclass loop
        execute format('alter table %s enable row level security', partition);
    end loop;
end
$$;

-- What is delivered goes where this names; a row that was written by hand must not name the queue of
-- another namespace.
alter table core.groups
    add constraint queue_of_the_group check (queue_name = core.queue_name(namespace, group_name));
alter table core.subscriptions
    add constraint queue_of_the_group check (
        core.check_queue_name(namespace, group_name) and queue_name = core.queue_name(namespace, group_name));
alter table core.replays
    add constraint queue_of_the_group check (
        core.check_queue_name(namespace, group_name) and queue_name = core.queue_name(namespace, group_name));
alter table core.retirements
    add constraint queue_of_the_group check (
        core.check_queue_name(namespace, group_name) and queue_name = core.queue_name(namespace, group_name));

-- Ids are drawn from a sequence, whose next numbers are known: one namespace must not be able to use up
-- those of another.
alter table core.delayed_emits drop constraint delayed_emits_pkey, add primary key (event_id, namespace);

-- Gives a role what its rows in core.role_access say, and takes away the rest.
create function core.set_privileges(p_role regrole) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    is_app boolean := exists (select from core.role_access where role = p_role and access = 'app');
    is_bound boolean := exists (select from core.role_access where role = p_role);
    t record;
begin
    execute format('revoke all on all tables in schema core from %s', p_role);
    execute format('revoke all on all sequences in schema core from %s', p_role);
    execute format('revoke all on schema core from %s', p_role);
    -- Each of them checks who calls it.
    for t in select p.oid::regprocedure as function from pg_proc p
             where p.pronamespace = 'core'::regnamespace and p.prosecdef loop
        execute format('revoke all on function %s from %s', t.function, p_role);
        if is_bound then
            execute format('grant execute on function %s to %s', t.function, p_role);
        end if;
    end loop;
    for t in select g.queue_name as queue, (
                 select case when bool_or(a.access = 'app') then 'app' else min(a.access) end
                 from core.role_access a
                 where a.role = p_role and a.namespace in (g.namespace, '*')) as access
             from core.groups g loop
        perform core.set_privileges_on_queue(t.queue, p_role, t.access);
    end loop;
    if not is_bound then
        -- Unless somebody else has given it something in there.
        if not exists (
            select from pg_class c cross join aclexplode(c.relacl) g
            where c.relnamespace = 'pgmq'::regnamespace and g.grantee = p_role
        ) then
            execute format('revoke usage on schema pgmq from %s', p_role);
        end if;
        return;
    end if;

    execute format('grant usage on schema core, pgmq to %s', p_role);
    -- Without the right to pass it on, nothing was granted, which is but a warning.
    if not has_schema_privilege(p_role, 'pgmq', 'usage') then
        raise exception 'role "%" cannot be given the use of schema pgmq, which belongs to "%": as that role, run grant usage on schema pgmq to %',
            pg_get_userbyid(p_role), (select pg_get_userbyid(nspowner) from pg_namespace where nspname = 'pgmq'), p_role
            using errcode = 'insufficient_privilege';
    end if;
    for t in
        select c.oid::regclass as relation, p.commands, columns.inserted, columns.updated
        from pg_class c
        left join lateral (select array_agg(polcmd) as commands from pg_policy where polrelid = c.oid) p on true
        -- Never: what the server counts or notes itself, and for updates the key and the namespace.
        cross join lateral (
            select string_agg(quote_ident(a.attname), ', ')
                       filter (where a.attidentity <> 'a' and a.atttypid <> 'xid8'::regtype) as inserted,
                   string_agg(quote_ident(a.attname), ', ')
                       filter (where a.attname <> 'namespace' and not exists (
                           select from pg_constraint k
                           where k.conrelid = c.oid and k.contype = 'p' and a.attnum = any (k.conkey))) as updated
            from pg_attribute a
            where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped) as columns
        where c.relnamespace = 'core'::regnamespace and (c.relkind = 'v' or p.commands is not null)
    loop
        execute format('grant select on %s to %s', t.relation, p_role);
        if is_app and 'a' = any (t.commands) then
            execute format('grant insert (%s) on %s to %s', t.inserted, t.relation, p_role);
        end if;
        if is_app and 'w' = any (t.commands) then
            execute format('grant update (%s) on %s to %s', t.updated, t.relation, p_role);
        end if;
    end loop;
    if is_app then
        -- To draw numbers, not to set them.
        execute format('grant usage on sequence core.event_log_event_id_seq, core.node_epochs to %s', p_role);
    end if;
end
$$;

create function core.set_privileges_on_queue(p_queue text, p_role regrole, p_access text) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    t regclass;
begin
    for t in
        select r from unnest(array[p_queue, p_queue || '_dlq']) q,
                      unnest(array['q_' || q, 'a_' || q]) n,
                      to_regclass(format('pgmq.%I', n)) r
        where r is not null
    loop
        execute format('revoke all on %s from %s', t, p_role);
        if p_access = 'app' then
            execute format('grant select, insert, update, delete on %s to %s', t, p_role);
        elsif p_access = 'read' then
            execute format('grant select on %s to %s', t, p_role);
        end if;
    end loop;
    -- pgmq counts by it how many messages there have been.
    for t in
        select r from unnest(array[p_queue, p_queue || '_dlq']) q, to_regclass(format('pgmq.%I', 'q_' || q || '_msg_id_seq')) r
        where r is not null
    loop
        execute format('revoke all on sequence %s from %s', t, p_role);
        if p_access is not null then
            execute format('grant select on sequence %s to %s', t, p_role);
        end if;
    end loop;
end
$$;

-- The same for every role. What a later migration adds is granted by this.
create function core.refresh_roles() returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    perform core.set_privileges(r.role)
    from (select distinct a.role from core.role_access a join pg_roles on pg_roles.oid = a.role) r;
end
$$;

-- Serializes changes of core.role_access with each other, and with new groups, whose queues are granted to
-- the roles of the moment.
create function core.lock_role_access() returns void
language plpgsql
set search_path = pg_catalog, pg_temp
set lock_timeout = '10s'
as $$
declare
    owner name := pg_get_userbyid(core.owner());
begin
    if not pg_has_role(owner, 'usage') then
        raise exception 'role "%" may not give rights: run this as role "%", which owns schema core', current_user, owner
            using errcode = 'insufficient_privilege';
    end if;
    lock table core.role_access in share row exclusive mode;
exception when lock_not_available then
    raise exception 'roles cannot be changed while a new group is being made: % has held that up for %',
        core.name_sessions(array(
            select pid from pg_locks where relation = 'core.role_access'::regclass and granted and mode = 'RowExclusiveLock')),
        current_setting('lock_timeout')
        using errcode = 'lock_not_available';
end
$$;

-- Makes a role that cannot log in, unless it is there. False if it was.
create function core.ensure_role(p_role text) returns boolean
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    if exists (select from pg_roles where rolname = p_role) then
        return false;
    end if;
    if length(p_role::name) < length(p_role) or p_role is null or p_role = '' then
        raise exception 'the name of a role has from 1 to 63 bytes' using errcode = 'invalid_parameter_value';
    end if;
    begin
        execute format('create role %I nologin', p_role);
    exception
        when insufficient_privilege then
            raise exception 'role "%" does not exist, and role "%" may not make roles: as one that may, run create role %',
                p_role, current_user, quote_ident(p_role)
                using errcode = 'insufficient_privilege';
        -- Made in another database at the same time.
        when duplicate_object or unique_violation then
            return false;
    end;
    return true;
end
$$;

-- Binds a role. Refuses those that nothing can be kept from.
create function core.bind_role(p_role text, p_namespace text, p_access text) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    r pg_roles;
    why text;
begin
    if p_access is null or p_access not in ('app', 'read') then
        raise exception 'an access is ''app'' or ''read'', found %', coalesce(quote_literal(p_access), 'null')
            using errcode = 'invalid_parameter_value';
    end if;
    select * into r from pg_roles where rolname = p_role;
    why := case
        when r.rolsuper then 'it is a superuser'
        when r.rolbypassrls then 'it has bypassrls'
        when pg_has_role(r.oid, core.owner(), 'member') then
            format('it is, or can become, role "%s", which owns schema core', pg_get_userbyid(core.owner()))
        when r.rolcreaterole and current_setting('server_version_num')::integer < 160000 then
            'it has createrole, and so can become any role'
        else (select format('it has the rights of %s, which reads or writes all tables', g.name)
              from unnest('{pg_read_all_data,pg_write_all_data,pg_read_server_files,pg_write_server_files,pg_execute_server_program}'::text[]) g (name)
              where pg_has_role(r.oid, g.name, 'member') limit 1)
    end;
    if why is null and p_namespace <> '*' and pg_has_role(r.oid, 'pg_monitor', 'member') then
        why := 'it has the rights of pg_monitor, to which pgmq shows all queues';
    end if;
    if why is not null then
        raise exception 'role "%" cannot be bound: %, and nothing can be kept from it', p_role, why
            using errcode = 'invalid_grant_operation';
    end if;
    insert into core.role_access as a (role, namespace, access) values (r.oid, p_namespace, p_access)
    on conflict (role, namespace) do update set access = excluded.access;
    perform core.set_privileges(r.oid);
end
$$;

-- Binds a role to a namespace: 'app' is all that an app does there, 'read' is to look. The role is made if
-- it is missing, so that it cannot log in; `alter role … login` and psql's \password let it, or be granted
-- to a role that can. The namespace is made if it is missing. Done again, it changes the access.
create function core.grant_namespace(p_namespace text, p_role text, p_access text default 'app') returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    perform core.lock_role_access();
    perform core.ensure_group(p_namespace, 'default');
    perform core.ensure_role(p_role);
    perform core.bind_role(p_role, p_namespace, p_access);
end
$$;

-- Takes that back. False if the role was not bound to the namespace. The role stays.
create function core.revoke_namespace(p_namespace text, p_role text) returns boolean
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    bound regrole;
begin
    perform core.lock_role_access();
    delete from core.role_access a using pg_roles r
    where r.oid = a.role and r.rolname = p_role and a.namespace = p_namespace
    returning a.role into bound;
    if bound is null then
        return false;
    end if;
    perform core.set_privileges(bound);
    return true;
end
$$;

-- Makes the roles <prefix>_admin, <prefix>_app and <prefix>_read, unless they are there, and gives them what
-- they may do in this database. A note says what is left to do for somebody who may.
create function core.create_roles(p_prefix text default 'nexus')
returns table (role_name text, may text, note text)
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    owner name := pg_get_userbyid(core.owner());
    admin text := p_prefix || '_admin';
begin
    perform core.lock_role_access();
    perform core.ensure_role(r) from unnest(array[admin, p_prefix || '_app', p_prefix || '_read']) r;
    perform core.bind_role(p_prefix || '_app', '*', 'app');
    perform core.bind_role(p_prefix || '_read', '*', 'read');

    role_name := admin;
    may := format('what role "%s" may, which owns schema core: migrate, drop, give rights', owner);
    if pg_has_role(admin, core.owner(), 'member') then
        note := null;
    elsif (select rolsuper from pg_roles where rolname = owner) then
        note := format('has no rights: role "%s", which owns schema core, is a superuser, and who is its member can be one; let another role own the schema', owner);
    else
        begin
            execute format('grant %I to %I', owner, admin);
        -- Or the owner is a member of the other one, here or by another database.
        exception when insufficient_privilege or invalid_grant_operation then
            note := format('has no rights yet: as a superuser, run grant %I to %I', owner, admin);
        end;
    end if;
    return next;
    role_name := p_prefix || '_app';
    may := 'emit, handle, schedule and register in all namespaces';
    note := null;
    return next;
    role_name := p_prefix || '_read';
    may := 'see all namespaces';
    return next;
end
$$;

revoke all on function
    core.isolate(regclass, boolean, boolean, text, text), core.set_privileges(regrole),
    core.set_privileges_on_queue(text, regrole, text), core.refresh_roles(), core.ensure_role(text),
    core.bind_role(text, text, text)
from public;

-- Serializes registrations in a namespace until the transaction ends. Emits only read the row, and are
-- not held up.
create function core.lock_registrations(p_namespace text) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
set lock_timeout = '30s'
as $$
begin
    perform from core.namespaces where namespace = p_namespace for no key update skip locked;
    if found or not exists (select from core.namespaces where namespace = p_namespace) then
        return;
    end if;
    -- Only now, because a lock that was taken in such a block does not tell whose it is.
    begin
        perform from core.namespaces where namespace = p_namespace for no key update;
    exception when lock_not_available then
        raise exception 'registrations in namespace "%" are locked: % has held them up for %', p_namespace,
            core.name_sessions(array(
                select l.pid from pg_locks l
                join core.namespaces n on n.xmax = l.transactionid
                where n.namespace = p_namespace and l.granted)),
            current_setting('lock_timeout')
            using errcode = 'lock_not_available';
    end;
end
$$;

create or replace function core.ensure_partitions(p_months_ahead integer default 12) returns integer
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '5s'
set timezone = 'UTC'
set default_tablespace = ''
set default_table_access_method = 'heap'
as $$
declare
    first_month timestamptz := date_trunc('month', core.now());
    month timestamptz;
    name text;
    -- Who is not the owner could make more tables than the server can bear.
    ahead integer := case when pg_has_role(core.caller(), core.owner(), 'usage') then p_months_ahead
                          else least(p_months_ahead, 12) end;
    created integer := 0;
begin
    if not pg_has_role(core.caller(), core.owner(), 'usage') and not exists (
        select from core.role_access a where a.access = 'app' and pg_has_role(core.caller(), a.role, 'usage'))
    then
        raise exception 'role "%" may not add partitions to core.event_log', core.caller()
            using errcode = 'insufficient_privilege';
    end if;
    -- Most often all are there, and nothing has to be locked.
    perform from generate_series(0, ahead) as i
    where to_regclass('core.event_log_' || to_char(first_month + make_interval(months => i), 'YYYY_MM')) is null;
    if not found then
        return 0;
    end if;
    begin
        lock table core.event_log in share update exclusive mode;
    exception when lock_not_available then
        raise exception 'no partition can be added to core.event_log: % has held that up for %',
            core.name_sessions(array(
                select pid from pg_locks
                where relation = 'core.event_log'::regclass and granted
                  and mode not in ('AccessShareLock', 'RowShareLock', 'RowExclusiveLock'))),
            current_setting('lock_timeout')
            using errcode = 'lock_not_available';
    end;
    for i in 0 .. ahead loop
        month := first_month + make_interval(months => i);
        name := 'event_log_' || to_char(month, 'YYYY_MM');
        if to_regclass('core.' || name) is null then
            execute format('create table core.%I (like core.event_log including all)', name);
            execute format(
                'create trigger append_only before update or delete or truncate on core.%I
                     for each statement execute function core.refuse_change_of_event_log()', name);
            execute format('alter table core.%I enable always trigger append_only', name);
            execute format('alter table core.%I enable row level security', name);
            execute format('alter table core.event_log attach partition core.%I for values from (%L) to (%L)',
                name, month, month + interval '1 month');
            created := created + 1;
        end if;
    end loop;
    return created;
end
$$;

create or replace function core.ensure_group(p_namespace text, p_group text) returns text
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '30s'
set default_tablespace = ''
set default_table_access_method = 'heap'
as $$
declare
    queue text;
    other text;
begin
    perform core.check_queue_name(p_namespace, p_group);
    queue := core.queue_name(p_namespace, p_group);
    perform core.require_access('read', p_namespace);
    -- Most often all is there, and nothing has to be locked.
    if exists (select from core.groups where namespace = p_namespace and group_name = p_group)
        and to_regclass(format('pgmq.%I', 'q_' || queue)) is not null
        and to_regclass(format('pgmq.%I', 'q_' || queue || '_dlq')) is not null
    then
        return queue;
    end if;
    perform core.require_access('app', p_namespace);

    begin
        -- So that no role is bound between here and the commit, and left out.
        lock table core.role_access in row exclusive mode;
    exception when lock_not_available then
        raise exception 'group "%" of namespace "%" cannot be made while roles are being changed: % has held that up for %',
            p_group, p_namespace,
            core.name_sessions(array(
                select pid from pg_locks
                where relation = 'core.role_access'::regclass and granted and mode = 'ShareRowExclusiveLock')),
            current_setting('lock_timeout')
            using errcode = 'lock_not_available';
    end;
    -- One at a time in the namespace: two nodes that start together would both create the queue, or
    -- two spellings of the namespace. Who adds a spelling waits for the other one's row.
    insert into core.namespaces (namespace) values (p_namespace) on conflict do nothing;
    perform core.lock_registrations(p_namespace);
    select namespace into other from core.namespaces
    where core.queue_part(namespace) = core.queue_part(p_namespace) and namespace <> p_namespace;
    if found then
        raise exception 'namespace "%" is refused: it differs from the existing "%" only in case or in - and _',
            p_namespace, other using errcode = 'unique_violation';
    end if;

    select group_name into other from core.groups
    where queue_name = queue and (namespace, group_name) <> (p_namespace, p_group);
    if found then
        raise exception 'group "%" is refused: it differs from the existing "%" only in case or in - and _',
            p_group, other using errcode = 'unique_violation';
    end if;
    insert into core.groups (namespace, group_name, queue_name)
    values (p_namespace, p_group, queue) on conflict do nothing;

    begin
        if to_regclass(format('pgmq.%I', 'q_' || queue)) is null then
            perform pgmq.create(queue);
            perform core.tune_queue(queue, true);
        end if;
        if to_regclass(format('pgmq.%I', 'q_' || queue || '_dlq')) is null then
            perform pgmq.create(queue || '_dlq');
            perform core.tune_queue(queue || '_dlq', false);
        end if;
    exception when lock_not_available then
        raise exception 'the queue of group "%" in namespace "%" cannot be made: % has held that up for %',
            p_group, p_namespace,
            core.name_sessions(array(
                select pid from pg_locks
                -- pgmq takes these, and any session can.
                where granted and locktype = 'advisory'
                  and database = (select oid from pg_database where datname = current_database())
                  and (classid::bigint << 32 | objid::bigint) in (
                      hashtext('pgmq.queue_' || queue), hashtext('pgmq.queue_' || queue || '_dlq')))),
            current_setting('lock_timeout')
            using errcode = 'lock_not_available';
    end;
    perform core.set_privileges_on_queue(
        queue, a.role, case when bool_or(a.access = 'app') then 'app' else 'read' end)
    from core.role_access a join pg_roles on pg_roles.oid = a.role
    where a.namespace in (p_namespace, '*')
    group by a.role;
    return queue;
end
$$;

-- What follows is deleted by functions, because who may delete in a table may lock it.

-- Forgets what has expired in a namespace.
create function core.forget_expired(p_namespace text) returns void
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    perform core.require_access('app', p_namespace);
    delete from core.idempotency_keys where namespace = p_namespace and expires_at <= core.now();
    delete from core.nodes where namespace = p_namespace and last_heartbeat < core.now() - interval '1 day';
    delete from core.ticks t using core.scheduled_tasks s
    where t.task_id = s.task_id and s.namespace = p_namespace and t.fired_at < core.now() - interval '30 days';
end
$$;

create or replace function core.maintain(p_namespace text) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    perform core.ensure_partitions();
    perform core.settle_subscriptions(p_namespace);
    perform core.forget_expired(p_namespace);
end
$$;

-- Forgets a node that has stopped, unless a newer boot has taken its id.
create function core.remove_node(p_node_id text, p_epoch bigint) returns void
language sql
security definer
set search_path = pg_catalog, pg_temp
as $$
    delete from core.nodes n
    where n.node_id = p_node_id and n.epoch = p_epoch and core.caller_may('app', n.namespace)
$$;

-- Forgets a dead node of another namespace that had this id.
create function core.free_node_id(p_node_id text, p_namespace text) returns void
language sql
security definer
set search_path = pg_catalog, pg_temp
as $$
    delete from core.nodes n
    where n.node_id = p_node_id and n.namespace <> p_namespace and not core.is_live(n.last_heartbeat)
      and core.caller_may('app', n.namespace)
$$;

create function core.remove_subscription(p_namespace text, p_group text, p_handler text) returns void
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    perform core.require_access('app', p_namespace);
    delete from core.subscriptions
    where namespace = p_namespace and group_name = p_group and handler = p_handler;
end
$$;

-- Deletes a subscription for core.retire, and notes what its messages are to become.
create function core.give_up_subscription(
    p_namespace text, p_group text, p_handler text, p_fate text, p_version bigint
) returns void
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    perform core.require_access('app', p_namespace);
    with gone as (
        delete from core.subscriptions
        where namespace = p_namespace and group_name = p_group and handler = p_handler
        returning *
    )
    insert into core.retirements
        (subscription_id, namespace, group_name, handler, names, event_type, queue_name, fate, version)
    select g.subscription_id, g.namespace, g.group_name, g.handler,
           array(select g.handler
                 union
                 select r.former from core.renames r
                 where (r.namespace, r.group_name, r.handler) = (g.namespace, g.group_name, g.handler)),
           g.event_type, g.queue_name, p_fate, p_version
    from gone g;
end
$$;

create function core.forget_replays(p_namespace text) returns void
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    perform core.require_access('app', p_namespace);
    delete from core.replays
    where namespace = p_namespace and finished_at < core.now() - interval '30 days';
end
$$;

-- Names that are handlers of their own stand for no others. `p_handlers` is [{"group", "handler"}].
create function core.forget_renames(p_namespace text, p_handlers jsonb) returns void
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    perform core.require_access('app', p_namespace);
    delete from core.renames r using jsonb_array_elements(p_handlers) h
    where r.namespace = p_namespace and r.group_name = h ->> 'group' and r.former = h ->> 'handler';
end
$$;

-- Removes a task with its history, unless an app declares it; false if there is none of this name.
create function core.remove_task(p_namespace text, p_name text) returns boolean
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    perform core.require_access('app', p_namespace);
    delete from core.scheduled_tasks
    where namespace = p_namespace and name = p_name and (app is null or removed_at is not null);
    return found;
end
$$;

create or replace function core.cancel(p_event_id bigint) returns boolean
language sql
security definer
set search_path = pg_catalog, pg_temp
as $$
    with cancelled as (
        delete from core.delayed_emits d
        where d.event_id = p_event_id and core.caller_may('app', d.namespace)
        returning d.namespace, d.idempotency_key, d.event_id
    ), released as (
        delete from core.idempotency_keys i using cancelled c
        where (i.namespace, i.key, i.event_id) = (c.namespace, c.idempotency_key, c.event_id)
    )
    select exists (select from cancelled);
$$;

-- Takes delayed events out of the table, for core.emit_delayed.
create function core.take_delayed(p_namespace text, p_event_ids bigint[]) returns setof core.delayed_emits
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    perform core.require_access('app', p_namespace);
    return query
        delete from core.delayed_emits where event_id = any (p_event_ids) and namespace = p_namespace
        returning *;
end
$$;

create or replace function core.emit_delayed(p_namespace text, p_event_ids bigint[]) returns text[]
language plpgsql
set search_path = pg_catalog, pg_temp
-- The statement has many steps, which look worth compiling and are not.
set jit = off
as $$
declare
    plan core.fan_out_plan;
    queues text[];
    taken text := case
        when has_table_privilege('core.delayed_emits', 'delete') then
            'delete from core.delayed_emits where event_id = any ($1) and namespace = $4 returning *'
        else 'select * from core.take_delayed($4, $1)' end;
begin
    -- One statement, as in core.plan_fan_out, for many event types.
    select n.subscriptions_version, coalesce((
            select jsonb_agg(jsonb_build_object('id', s.subscription_id, 'queue', s.queue_name,
                                                'handler', s.handler, 'type', s.event_type,
                                                'others', s.other_versions))
            from core.subscriptions s
            where s.namespace = n.namespace
              and s.event_type in (select d.event_type from core.delayed_emits d
                                   where d.event_id = any (p_event_ids) and d.namespace = p_namespace)), '[]')
    into plan.version, plan.targets
    from core.namespaces n
    where n.namespace = p_namespace;
    if plan.version is null then
        raise exception 'namespace "%" is not known', p_namespace using errcode = 'foreign_key_violation';
    end if;
    queues := array(select distinct t ->> 'queue' from jsonb_array_elements(plan.targets) t order by 1);

    execute
        'with taken as (' || taken || '), d as materialized (
             select *, jsonb_strip_nulls(jsonb_build_object(
                 ''traceparent'', metadata -> ''traceparent'', ''tracestate'', metadata -> ''tracestate'')) as trace
             from taken
         ), l as (
             insert into core.event_log
                 (event_id, namespace, event_type, payload, emitted_at, producer_node_id, metadata,
                  event_version, key, correlation_id, causation_id, subscriptions_version)
             select d.event_id, d.namespace, d.event_type, d.payload, core.now(), d.producer_node_id,
                    d.metadata || jsonb_build_object(''requestedAt'', core.iso_time(d.requested_at),
                                                     ''dueAt'', core.iso_time(d.due_at)),
                    d.event_version, d.key, d.correlation_id, d.causation_id, $3
             from d
         ), b as materialized (
             select d.event_id, d.event_type, d.event_version, d.due_at, d.trace,
                    core.envelope(d.namespace, d.event_type, d.payload, core.now(), d.producer_node_id,
                                  d.event_version, d.key, d.correlation_id, d.causation_id) as body
             from d
         ), t as materialized (
             select * from jsonb_to_recordset($2) as t (id bigint, queue text, handler text, type text, others jsonb)
         )'
        || coalesce((
            select string_agg(format(
                ', q%s as (
                     insert into pgmq.%I (vt, message, headers)
                     select core.now(), b.body, core.headers(b.event_id, b.event_version, t.id, t.handler, b.trace)
                     from b join t on t.type = b.event_type and t.queue = %L
                         and (t.others @> to_jsonb(b.event_version)) is not true
                     order by b.due_at, b.event_id
                 )', q.n, 'q_' || q.queue, q.queue), '')
            from unnest(queues) with ordinality as q (queue, n)), '')
        || ' select'
    using p_event_ids, plan.targets, plan.version, p_namespace;
    return queues;
end
$$;

-- plpgsql keeps the plan, in which the policies of a bound role have their part.
create or replace function core.plan_fan_out(p_namespace text, p_event_type text) returns core.fan_out_plan
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
    plan core.fan_out_plan;
begin
    select n.subscriptions_version, coalesce((
        select jsonb_agg(jsonb_build_object('id', s.subscription_id, 'queue', s.queue_name, 'handler', s.handler,
                                            'others', s.other_versions))
        from core.subscriptions s
        where s.namespace = n.namespace and s.event_type = p_event_type), '[]')
    into plan
    from core.namespaces n
    where n.namespace = p_namespace;
    return plan;
end
$$;

-- The queues that the role may read.
create or replace view core.queue_metrics with (security_invoker = true) as
select m.queue_name, m.queue_length, m.newest_msg_age_sec as newest_msg_age_seconds,
       m.oldest_msg_age_sec as oldest_msg_age_seconds, m.total_messages
from core.groups g
cross join lateral unnest(array[g.queue_name, g.queue_name || '_dlq']) as q (queue_name)
cross join lateral pgmq.metrics(q.queue_name) m
where has_table_privilege(to_regclass(format('pgmq.%I', 'q_' || q.queue_name))::oid, 'select');

-- Of the next three only these passages change.
create function core.replace_in(p_function regprocedure, p_passage text, p_by text) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    definition text := pg_get_functiondef(p_function);
begin
    if strpos(definition, p_passage) = 0 then
        raise exception '% does not hold: %', p_function, p_passage;
    end if;
    execute replace(definition, p_passage, p_by);
end
$$;

select core.replace_in(f, 'perform pg_advisory_xact_lock(hashtextextended(''nexus: register '' || p_namespace, 0));',
                       'perform core.lock_registrations(p_namespace);')
from unnest('{"core.retire(text, text, text, text)",
              "core.retire_version(text, text, text, integer, text, integer)"}'::regprocedure[]) f;
select core.replace_in(
    'core.retire(text, text, text, text)',
    $$    delete from core.subscriptions where subscription_id = s.subscription_id;
    insert into core.retirements
        (subscription_id, namespace, group_name, handler, names, event_type, queue_name, fate, version)
    values (s.subscription_id, p_namespace, p_group, p_handler,
            array(select p_handler
                  union
                  select q.former from core.renames q
                  where (q.namespace, q.group_name, q.handler) = (p_namespace, p_group, p_handler)),
            s.event_type, s.queue_name, p_fate, in_force);
$$,
    $$    perform core.give_up_subscription(p_namespace, p_group, p_handler, p_fate, in_force);
$$);
-- Its ids may have been written by hand.
select core.replace_in('core.drive_replay(uuid, integer)',
                       'where s.subscription_id = any (r.subscription_ids)',
                       'where s.subscription_id = any (r.subscription_ids) and s.namespace = r.namespace');
drop function core.replace_in(regprocedure, text, text);

-- Each of them checks who calls it; roles that are bound get the right to.
do $$
declare
    function regprocedure;
begin
    for function in select oid from pg_proc where pronamespace = 'core'::regnamespace and prosecdef loop
        execute format('revoke all on function %s from public', function);
    end loop;
end
$$;
