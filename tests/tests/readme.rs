//! What the README and `docs/` show works as printed: the test, and every query; and the tests that
//! the README and `docs/reliability.md` name exist.

use nexus::{
    prelude::*,
    testing::{TestApp, TestDatabase},
};
use nexus_tests::until;

/// Somebody has signed up.
#[derive(Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "user.signed_up", key = user_id)]
struct SignedUp {
    user_id: i64,
    email: String,
}

/// An account has been opened for a user.
#[derive(Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "account.opened", key = user_id)]
struct AccountOpened {
    user_id: i64,
}

/// With the transaction: the row, the event that follows and the completion commit together.
#[handler]
async fn open_account(user: SignedUp, tx: &mut Tx) -> nexus::Result<Emit<AccountOpened>> {
    sqlx::query("insert into accounts (user_id) values ($1)")
        .bind(user.user_id)
        .execute(&mut *tx)
        .await?;
    Ok(Emit(AccountOpened {
        user_id: user.user_id,
    }))
}

/// The program's own tables, before a handler runs. With files: `sqlx::migrate!().run(&pool).await?`.
async fn create_tables(pool: sqlx::PgPool) -> nexus::Result {
    sqlx::query("create table if not exists accounts (user_id bigint)")
        .execute(&pool)
        .await?;
    Ok(())
}

#[tokio::test]
async fn an_account_is_opened_once() -> nexus::Result {
    let app = App::discover().only(["open_account"]);
    let app = TestApp::start(app.before_start(create_tables)).await;

    let user = SignedUp {
        user_id: 7,
        email: "ada@example.com".to_owned(),
    };
    app.client().emit(&user).await?;
    app.settled().await;

    assert_eq!(app.only_emitted::<AccountOpened>().await.user_id, 7);
    let accounts: Vec<i64> = sqlx::query_scalar("select user_id from accounts")
        .fetch_all(app.pool())
        .await?;
    assert_eq!(accounts, [7]);
    Ok(())
}

const README: &str = include_str!("../../README.md");
const RELIABILITY: &str = include_str!("../../docs/reliability.md");
const ENVELOPE: &str = include_str!("../../docs/envelope.md");
const GUIDE: [&str; 8] = [
    include_str!("../../nexus/src/guide/events.md"),
    include_str!("../../nexus/src/guide/handlers.md"),
    include_str!("../../nexus/src/guide/transactions.md"),
    include_str!("../../nexus/src/guide/retries.md"),
    include_str!("../../nexus/src/guide/dead_letters.md"),
    include_str!("../../nexus/src/guide/schedules.md"),
    include_str!("../../nexus/src/guide/testing.md"),
    include_str!("../../nexus/src/guide/deploying.md"),
];

#[test]
fn the_readme_shows_the_items_of_this_file() {
    let this = include_str!("readme.rs");
    let items = this
        .split("\n\n")
        .filter(|item| item.contains("user_id") && item.starts_with("/// "));
    let test = this
        .split_once("#[tokio::test]\nasync fn an_account")
        .and_then(|(_, rest)| rest.split_once("\n}\n"))
        .map(|(test, _)| test)
        .expect("the test stands above");
    for shown in items.chain([test]) {
        assert!(README.contains(shown), "the README does not show\n{shown}");
    }
}

#[test]
fn the_tests_that_hold_the_promises_exist() {
    check_held(README, "## What is promised");
    check_held(RELIABILITY, "## Promises");
}

/// Each row of the table in that section ends with the names of tests.
fn check_held(document: &str, section: &str) {
    let (_, promises) = document
        .split_once(section)
        .expect("the document has the section");
    let rows = promises
        .lines()
        .skip_while(|line| !line.starts_with("|---"))
        .skip(1)
        .take_while(|line| line.starts_with('|'));
    let mut held = 0;
    for row in rows {
        // The last cell: `file`: `test`, `test`; `file`: `test`
        let cell = row.trim_end_matches(['|', ' ']).rsplit(" | ").next();
        for tests in cell.unwrap_or_default().split("; ") {
            let mut names = tests.split('`').skip(1).step_by(2);
            let file = names.next().unwrap_or_default();
            let path = format!("{}/tests/{file}.rs", env!("CARGO_MANIFEST_DIR"));
            let source = std::fs::read_to_string(&path)
                .unwrap_or_else(|error| panic!("{path}: {error}, in\n{row}"));
            for name in names {
                assert!(
                    source.contains(&format!("fn {name}(")),
                    "{file}.rs has no test {name}, in\n{row}"
                );
                held += 1;
            }
        }
    }
    assert!(held > 15, "found only {held} names of tests");
}

/// The blocks of a document that are marked as SQL.
fn sql_blocks(document: &str) -> Vec<&str> {
    document
        .split("```sql\n")
        .skip(1)
        .filter_map(|rest| rest.split_once("```").map(|(block, _)| block))
        .collect()
}

#[tokio::test]
async fn every_query_runs_and_what_it_emits_is_handled() -> nexus::Result {
    let database = TestDatabase::new().await;
    let pool = database.pool().await;
    sqlx::query("create table accounts (user_id bigint)")
        .execute(&pool)
        .await?;
    let app = App::discover()
        .only(["open_account"])
        .name("accounts")
        .namespace("shop")
        .database_url(database.url());
    let app = nexus::start(app).await?;

    let blocks: Vec<&str> = [README, ENVELOPE]
        .into_iter()
        .chain(GUIDE)
        .flat_map(sql_blocks)
        .collect();
    assert!(blocks.len() >= 6, "{} blocks", blocks.len());
    for block in blocks {
        let text = sqlx::AssertSqlSafe(block.to_owned());
        if let Err(error) = sqlx::raw_sql(text).execute(&pool).await {
            panic!("{error} in\n{block}");
        }
    }
    // From SQL, three times, and from a program that knows nothing of nexus, whose message waits in the main
    // queue until it is adopted.
    let opened = until("four accounts are opened", || async {
        let opened: Vec<i64> = sqlx::query_scalar("select user_id from accounts order by 1")
            .fetch_all(&pool)
            .await
            .unwrap();
        (opened.len() == 4).then_some(opened)
    });
    assert_eq!(opened.await, [7, 8, 9, 17]);
    app.shutdown().await;
    Ok(())
}
