//! The macros of nexus. Use them through the package `nexus`, which re-exports them.
//!
//! - [`derive@Event`] makes a type an event,
//! - [`macro@handler`] makes a function run for each event of a type,
//! - [`macro@cron`] makes a function run, or an event be emitted, by the clock,
//! - [`app!`] makes an app of a list of these, instead of all that is linked.
//!
//! Each has a folder: `parse` reads what was written, `check` holds the rules, `model` is what was
//! meant, `expand` writes the code. Mistakes are reported all at once, each where it has to be
//! mended, and the item itself is always passed on, so that nothing else fails because of it.

mod app;
mod attr;
mod cron;
mod diagnostics;
mod duration;
mod event;
mod guard;
mod handler;
mod history;
mod misfire;
mod name;

use proc_macro::TokenStream;

/// Makes a struct or an enum an event: a fact that is stored under a stable name.
///
/// The type also has to derive `Serialize`, `Deserialize` and `JsonSchema`. Everything in
/// `#[event(…)]` is optional:
///
/// | option | meaning | if left out |
/// |---|---|---|
/// | `type = "user.created"` | the event type, by which the event is stored and found | the type's name: `UserCreated` is `user.created` |
/// | `version = 2` | the version of its schema, from 1 | 1 |
/// | `key = user_id` | the field that holds the entity the event is about; its type implements `Display`. In a tuple struct `key = 0`, in an enum a field of every variant | no key |
/// | `register = false` | the type is not collected by `App::discover()` and need not be the only one of its event type | `true` |
///
/// An event type is made of words of `a-z` and `0-9`, joined by single `_`, in segments joined by
/// `.`, each starting with a letter, and has at most 100 bytes. Events that are stored keep their
/// type: write it out before you rename the Rust type.
///
/// Two types of a crate with one event type and version do not compile. Tests that declare an event
/// once more, such as two modules with a `Ping` of their own, write `register = false`; what handlers
/// take works all the same. Across crates `App::validate` and [`app!`] find such pairs.
///
/// An enum is one event type. A generic type cannot be an event, because an event type has exactly
/// one JSON Schema.
///
/// # Examples
///
/// ```
/// use nexus::prelude::*;
///
/// /// A user has signed up.
/// #[derive(Serialize, Deserialize, JsonSchema, Event)]
/// #[event(type = "user.created", version = 2, key = user_id)]
/// struct UserCreated {
///     user_id: u64,
///     email: String,
/// }
///
/// let event = UserCreated { user_id: 7, email: "ada@example.org".to_owned() };
/// assert_eq!(UserCreated::EVENT_TYPE, "user.created");
/// assert_eq!(event.event_key().as_deref(), Some("7"));
/// ```
#[proc_macro_derive(Event, attributes(event))]
pub fn derive_event(input: TokenStream) -> TokenStream {
    event::derive(&syn::parse_macro_input!(input)).into()
}

/// Makes an async function run for each event of a type.
///
/// The first argument is the event, by value: `E`, `Envelope<E>` with its metadata, or `Batch<E>`
/// for many at once. After it come, in any order, `State<T>`, `Ctx`, `Client`, types of your own
/// that implement `FromContext`, and at most one `&mut Tx`: the transaction in which the event is
/// completed. The function returns `()`, `Emit<E>`, `Option<Emit<E>>`, or a `Result` of these whose
/// error is `nexus::Error` or can become one.
///
/// The function stays as it is and can be called, for instance in tests.
///
/// | option | meaning | if left out |
/// |---|---|---|
/// | `group = "billing"` | the nodes that share the work, and their queue | the app's own group |
/// | `name = "send_welcome"` | identity within the group; deliveries are stored under it | the function's name |
/// | `formerly = "greet"`, `formerly = ["greet", "welcome"]` | names that the handler had before in its group, so that what still waits under them is not lost | none |
/// | `from = "beginning"`, `from = "2026-01-31T00:00:00Z"` | what a *new* handler is delivered of the event log: all of it, or what was emitted at that time or later. A handler that is subscribed already ignores it | what is emitted from its registration on |
/// | `max_attempts = 5` | attempts until an event is dead-lettered | 10 |
/// | `backoff = "exponential(1s..10m)"` | the wait between attempts: doubled each time, from the first up to the second; or `"fixed(5s)"`; ±20 % of jitter is added | `exponential(1s..10m)` |
/// | `timeout = "30s"` | the longest that an attempt may take, at most `24d` | `30s` |
/// | `concurrency = 16` | attempts of this handler that run at once on a node | 16 |
///
/// A duration is whole numbers with the units `d`, `h`, `m`, `s`, `ms`, the longest first: `"30s"`,
/// `"1m 30s"`. A single one needs no quotes: `timeout = 30s`. Group and name are made of letters,
/// digits, `_` and `-`, starting with a letter. Two handlers of a crate with one name in one group do
/// not compile.
///
/// # Examples
///
/// ```
/// # use nexus::prelude::*;
/// # #[derive(Serialize, Deserialize, JsonSchema, Event)]
/// # struct UserCreated { user_id: u64 }
/// # #[derive(Serialize, Deserialize, JsonSchema, Event)]
/// # struct AccountOpened { user_id: u64 }
/// # struct Plans;
/// #[handler(group = "billing", max_attempts = 5, backoff = "exponential(1s..10m)", timeout = "30s")]
/// async fn open_account(
///     event: UserCreated,
///     plans: State<Plans>,
///     tx: &mut Tx,
/// ) -> nexus::Result<Emit<AccountOpened>> {
///     // … what is written with `tx` commits together with the completion …
///     Ok(Emit(AccountOpened { user_id: event.user_id }))
/// }
/// ```
///
/// A function that was renamed, while messages may still wait for it under the name it had:
///
/// ```
/// # use nexus::prelude::*;
/// # #[derive(Serialize, Deserialize, JsonSchema, Event)]
/// # struct UserCreated { user_id: u64 }
/// #[handler(formerly = "greet")]
/// async fn send_welcome(event: UserCreated) {
///     println!("welcome, {}", event.user_id);
/// }
/// ```
#[proc_macro_attribute]
pub fn handler(arguments: TokenStream, item: TokenStream) -> TokenStream {
    handler::handler(arguments.into(), &item.into()).into()
}

/// Makes a function run, or an event be emitted, by the clock: once per due time in the whole
/// cluster.
///
/// | on | at each due time |
/// |---|---|
/// | an `async fn` | the function runs |
/// | an event type, whose derives may stand above or below | its `Default` is emitted |
/// | a `const` of an event type | its value is emitted |
///
/// The arguments of a function are those of a [`macro@handler`] without the event; by convention
/// `Tick`, which knows when the run was due, comes first. Results are the same. What is emitted goes to
/// every handler of the event, like any other event.
///
/// The expression has five fields (minute, hour, day of the month, month, day of the week), six with
/// seconds in front, or is one of `@yearly`, `@annually`, `@monthly`, `@weekly`, `@daily` and
/// `@hourly`. It is checked while compiling, and so is the time zone.
///
/// | in a field | meaning |
/// |---|---|
/// | `*`, `*/5` | any value; every fifth |
/// | `5`, `1-5`, `10-50/10`, `1,15` | a value, a range, a range with steps, a list of these |
/// | `JAN` to `DEC`, `SUN` to `SAT` | names, in any case; as a number Sunday is 0 or 7 |
/// | `L`, `LW`, `15W` | day of the month: the last, the last from Monday to Friday, the one from Monday to Friday nearest to the 15th |
/// | `FRI#2`, `FRIL` | day of the week: the second Friday of the month, the last |
///
/// If day of the month and day of the week are both restricted, a day that fits one of them is due.
///
/// | option | meaning | if left out |
/// |---|---|---|
/// | `tz = "Europe/Berlin"` | the IANA time zone in which the expression is read | UTC |
/// | `misfire = "fire_once"` | what becomes of due times that passed while no node ran: `"skip"` leaves them out, `"fire_once"` fires the newest of them, `"fire_all(10)"` each of them, but at most the newest 10 | `fire_once` |
/// | `grace = "60s"` | how late a due time may be fired without being one that was missed | `60s` |
/// | `name = "cleanup"` | identity of the schedule; words of `a-z` and `0-9`, joined by single `_` | the name of the function; that of a type or constant in snake case: `MorningTick` is `morning_tick` |
/// | `formerly = "clean_up"` | names that it had before, also several in brackets | none |
///
/// On a function also `group`, `max_attempts`, `backoff`, `timeout` and `concurrency` of
/// [`macro@handler`]. Where an event is emitted, they belong to its handlers.
///
/// An item may have several of these attributes; each is a schedule with a name of its own. Two
/// schedules of a crate with one name do not compile.
///
/// # Examples
///
/// A function:
///
/// ```
/// # use nexus::prelude::*;
/// #[cron("0 9 * * MON-FRI", tz = "Europe/Berlin")]
/// async fn send_report(tick: Tick, tx: &mut Tx) -> nexus::Result {
///     println!("report of {}", tick.due_at());
///     Ok(())
/// }
/// ```
///
/// An event type, and a handler of it:
///
/// ```
/// # use nexus::prelude::*;
/// #[cron("0 7 * * *", tz = "Europe/Berlin", misfire = "skip")]
/// #[derive(Serialize, Deserialize, JsonSchema, Event, Default)]
/// struct MorningCame;
///
/// #[handler]
/// async fn make_coffee(_: MorningCame) {}
/// ```
///
/// Constants, one of them with two schedules:
///
/// ```
/// # use nexus::prelude::*;
/// #[derive(Serialize, Deserialize, JsonSchema, Event)]
/// struct DigestDue {
///     full: bool,
/// }
///
/// #[cron("@hourly")]
/// const SHORT_DIGEST: DigestDue = DigestDue { full: false };
///
/// #[cron("@daily", name = "daily_digest")]
/// #[cron("@monthly", name = "monthly_digest", misfire = "fire_all(3)", grace = "10m")]
/// const FULL_DIGEST: DigestDue = DigestDue { full: true };
/// ```
#[proc_macro_attribute]
pub fn cron(arguments: TokenStream, item: TokenStream) -> TokenStream {
    cron::cron(arguments.into(), &item.into()).into()
}

/// Makes an app of what a list names, instead of everything that is linked.
///
/// For libraries and tests, for several apps in one program, and for targets on which the linker
/// collects nothing. `App::discover()` needs no list.
///
/// | key | lists |
/// |---|---|
/// | `handlers` | functions with [`macro@handler`] |
/// | `crons` | functions, types and constants with [`macro@cron`] |
/// | `events` | event types that no handler takes and no schedule emits, such as those that are only emitted; the others come along by themselves |
///
/// Each may be left out, and they come in any order. An item is named by a path to where it is
/// declared, also in another crate, or to a `pub use declared::*` of it. A `use` of the item's name
/// alone is not enough, because beside the item its macro has left a constant, which `app!` looks
/// for.
///
/// What is listed is checked while compiling, across crates: two types of one event type and version,
/// two handlers of one name in a group, two scheduled tasks of one name, anything listed twice.
///
/// # Examples
///
/// ```
/// use nexus::prelude::*;
///
/// mod billing {
///     use nexus::prelude::*;
///
///     #[derive(Serialize, Deserialize, JsonSchema, Event)]
///     pub struct OrderPaid {
///         pub order_id: u64,
///     }
///
///     #[handler]
///     pub async fn invoice(order: OrderPaid) {
///         println!("invoice for {}", order.order_id);
///     }
/// }
///
/// #[cron("@hourly")]
/// #[derive(Serialize, Deserialize, JsonSchema, Event, Default)]
/// struct HourPassed;
///
/// #[cron("@daily")]
/// async fn clean_up() {}
///
/// let app = nexus::app! {
///     handlers: [billing::invoice],
///     crons: [HourPassed, clean_up],
/// };
/// app.name("billing").validate().unwrap();
/// ```
#[proc_macro]
pub fn app(arguments: TokenStream) -> TokenStream {
    app::app(arguments.into()).into()
}
