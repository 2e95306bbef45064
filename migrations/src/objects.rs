//! What the schema consists of, and what of it somebody has dropped or changed by hand.

use std::collections::HashMap;

use sqlx::PgConnection;

use crate::{MIGRATIONS, pin_search_path};

/// The objects of schema `core` in a database that was just migrated, as [`objects`] writes them: one a line, its
/// kind and name, a tab, and what is to be the same of it.
pub const OBJECTS: &str = include_str!("../sql/objects.txt");

/// An object of schema `core` that is not there, or not as this build makes it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Drift {
    /// Its kind and name, such as `index core.event_log.event_log_type`.
    pub object: String,
    /// What it is to be; of a function the checksum of its text is a part.
    pub expected: &'static str,
    /// What it is; `None` if it is not there.
    pub found: Option<String>,
    /// The last file that speaks of it, without `.up.sql`, as far as its name tells.
    pub file: Option<&'static str>,
}

/// Compares schema `core`, which has the version of this build, with what this build makes. Changes nothing. What is
/// there beside it is left out, and of a table that is missing all that belongs to it. To be called in a
/// transaction, as [`objects`].
///
/// # Errors
///
/// The database could not be asked.
pub async fn drift(connection: &mut PgConnection) -> sqlx::Result<Vec<Drift>> {
    let found = objects(connection).await?;
    let found: HashMap<&str, &str> = lines(&found).collect();
    let mut drift: Vec<Drift> = Vec::new();
    for (object, expected) in lines(OBJECTS) {
        let is = found.get(object).copied();
        let belongs_to_missing = |known: &Drift| {
            known.found.is_none()
                && known.object.split_once(' ').is_some_and(|(_, table)| {
                    let name = object.split_once(' ').map(|(_, name)| name);
                    name.and_then(|name| name.strip_prefix(table))
                        .is_some_and(|rest| rest.starts_with('.'))
                })
        };
        if is != Some(expected) && !drift.iter().any(belongs_to_missing) {
            drift.push(Drift {
                object: object.to_owned(),
                expected,
                found: is.map(str::to_owned),
                file: last_file(object),
            });
        }
    }
    Ok(drift)
}

fn lines(text: &str) -> impl Iterator<Item = (&str, &str)> {
    text.lines().filter_map(|line| line.split_once('\t'))
}

fn last_file(object: &str) -> Option<&'static str> {
    let name = object.split('(').next().unwrap_or_default();
    let name = name.rsplit('.').next().unwrap_or_default();
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let speaks_of_it = |sql: &str| sql.split(|c| !is_part(c)).any(|word| word == name);
    let steps = MIGRATIONS.iter().rev();
    steps
        .filter(|step| speaks_of_it(step.up))
        .map(|step| step.name)
        .next()
}

/// The objects of schema `core`, tables first. Partitions of the log are left out, which come and go. So is what
/// servers of different versions tell differently: bodies that are kept as parsed, and expressions of checks.
///
/// To be called in a transaction, for the rest of which it sets `search_path`: names depend on it.
///
/// # Errors
///
/// The database could not be asked.
pub async fn objects(connection: &mut PgConnection) -> sqlx::Result<String> {
    pin_search_path(connection).await?;
    let lines: Vec<String> = sqlx::query_scalar(
        "with relation as materialized (
             select c.oid, c.relname::text collate pg_catalog.\"C\" as name, c.relkind, c.relrowsecurity
             from pg_catalog.pg_class c
             where c.relnamespace = (select oid from pg_catalog.pg_namespace where nspname = 'core')
               and c.relkind in ('r', 'p', 'v') and not c.relispartition
               and c.relname !~ '^event_log_[0-9]{4}_[0-9]{2}$'
         ), object (rank, kind, name, definition) as (
             select 1, case relkind when 'v' then 'view' else 'table' end, name,
                    concat_ws(', ', case relkind when 'p' then 'partitioned' end,
                              case when relrowsecurity then 'row-level security' end)
             from relation
             union all
             select 2, 'column', concat(r.name, '.', a.attname),
                    concat_ws(' ', pg_catalog.format_type(a.atttypid, a.atttypmod), case when a.attnotnull then 'not null' end)
             from relation r join pg_catalog.pg_attribute a on a.attrelid = r.oid
             where a.attnum > 0 and not a.attisdropped
             union all
             select 3, 'index', concat(r.name, '.', c.relname),
                    concat_ws(' ', substring(pg_catalog.pg_get_indexdef(c.oid) from 'USING .*'),
                              case when x.indisunique then 'unique' end, case when not x.indisvalid then 'invalid' end)
             from relation r
             join pg_catalog.pg_index x on x.indrelid = r.oid
             join pg_catalog.pg_class c on c.oid = x.indexrelid
             union all
             select 4, 'constraint', concat(r.name, '.', c.conname), c.contype::text
             from relation r join pg_catalog.pg_constraint c on c.conrelid = r.oid
             where c.contype in ('p', 'u', 'f', 'c')
             union all
             -- Whether it fires in every session, or is turned off, is a part of it.
             select 5, 'trigger', concat(r.name, '.', t.tgname), t.tgenabled::text
             from relation r join pg_catalog.pg_trigger t on t.tgrelid = r.oid
             where not t.tgisinternal
             union all
             select 6, 'policy', concat(r.name, '.', p.polname), p.polcmd::text
             from relation r join pg_catalog.pg_policy p on p.polrelid = r.oid
             union all
             select 7, 'function',
                    pg_catalog.format('%s(%s)', p.proname, pg_catalog.pg_get_function_identity_arguments(p.oid)),
                    concat_ws(' ', nullif(pg_catalog.md5(p.prosrc), pg_catalog.md5('')), case when p.prosecdef then 'security definer' end,
                              pg_catalog.array_to_string(p.proconfig, ' '))
             from pg_catalog.pg_proc p
             where p.pronamespace = (select oid from pg_catalog.pg_namespace where nspname = 'core')
         )
         select concat(kind, ' core.', name, chr(9), definition)
         from object
         order by rank, name collate pg_catalog.\"C\", definition collate pg_catalog.\"C\"",
    )
    .fetch_all(connection)
    .await?;
    Ok(lines.into_iter().map(|line| line + "\n").collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_is_found_that_speaks_of_an_object_last() {
        assert_eq!(
            last_file("function core.set_paused(p_namespace text)"),
            Some("0019_paused_groups")
        );
        assert_eq!(
            last_file("column core.tokens.secret_sha256"),
            Some("0020_tokens")
        );
        assert_eq!(last_file("index core.tokens.nobody_made_this"), None);
    }
}
