//! Apps that are made of lists.

use nexus::prelude::*;

mod billing {
    pub(crate) mod invoices {
        use nexus::prelude::*;

        #[derive(Serialize, Deserialize, JsonSchema, Event)]
        #[event(type = "lists.order_paid")]
        pub(crate) struct OrderPaid;

        #[handler(group = "lists-billing")]
        pub(crate) async fn invoice(_: OrderPaid) {}

        #[handler]
        pub(in crate::lists) async fn r#yield(_: OrderPaid) {}
    }

    pub(crate) use invoices::*;
}

#[cron("@hourly")]
#[derive(Serialize, Deserialize, JsonSchema, Event, Default)]
#[event(type = "lists.tick")]
struct ListTick;

#[cron("@daily")]
const LIST_DIGEST: ListTick = ListTick;

#[cron("@daily")]
#[cron("@weekly", name = "tidy_up_weekly")]
async fn tidy_up(_: Tick) {}

#[handler]
async fn on_tick(_: ListTick) {}

#[derive(Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "lists.never_handled")]
struct NeverHandled;

#[test]
fn an_app_has_what_is_listed() {
    let app = nexus::app! {
        events: [NeverHandled],
        handlers: [billing::invoices::invoice, self::billing::r#yield, on_tick,],
        crons: [tidy_up, crate::lists::ListTick, LIST_DIGEST],
    };
    app.name("lists").validate().unwrap();
}

#[test]
fn what_is_in_another_crate_can_be_listed() {
    mod reexported {
        pub(super) use nexus_test_elsewhere::*;
    }

    let app = nexus::app! {
        handlers: [nexus_test_elsewhere::pack, on_tick],
        crons: [
            ::nexus_test_elsewhere::sweep_elsewhere,
            nexus_test_elsewhere::OrderPlaced,
            reexported::TEST_ORDER,
        ],
        events: [reexported::OrderPlaced],
    };
    app.validate().unwrap();
}

#[test]
fn an_app_can_be_of_nothing() {
    nexus::app! {}.validate().unwrap();
    nexus::app!(handlers: [],).validate().unwrap();
}

#[test]
fn handlers_local_to_a_function_can_be_listed() {
    #[handler]
    async fn local_to_the_list(_: NeverHandled) {}

    #[cron("@daily")]
    async fn local_cron_of_the_list() {}

    let app = nexus::app! { handlers: [local_to_the_list], crons: [local_cron_of_the_list] };
    app.validate().unwrap();
}

/// The list comes from an outer macro.
macro_rules! app_of {
    ($($handler:ident),*) => { nexus::app! { handlers: [$($handler),*] } };
}

#[test]
fn a_list_can_come_from_a_macro() {
    app_of!(on_tick).validate().unwrap();
}
