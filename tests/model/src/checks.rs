//! Every state of the protocol, and a counterexample to each of its bugs.

use std::time::Instant;

use stateright::{Checker, Model};

use crate::protocol::{ALONE, ATTEMPTS, Bug, FENCE, Handler, LOSSES, ONCE, PLACES, Protocol};

fn protocol(handlers: &[Handler], faults: u8) -> Protocol {
    Protocol {
        handlers: handlers.to_vec(),
        nodes: 2,
        // Two who redrive the same dead letter; with two messages one is enough.
        operators: if handlers.len() == 1 { 2 } else { 1 },
        max_attempts: 2,
        most_losses: 3,
        faults,
        bug: None,
        only: None,
    }
}

/// Looks at every state; all properties must hold.
#[track_caller]
fn holds(what: &str, protocol: Protocol) {
    let began = Instant::now();
    let checker = protocol.checker().threads(2).spawn_bfs().join();
    checker.assert_properties();
    assert!(checker.is_done());
    println!(
        "{what}: {} states, {} of them different, {} steps deep, {:.1} s",
        checker.state_count(),
        checker.unique_state_count(),
        checker.max_depth(),
        began.elapsed().as_secs_f64()
    );
}

/// There must be a counterexample to `property`; being found breadth first, it is a shortest one.
#[track_caller]
fn finds(bug: Bug, property: &'static str, protocol: Protocol) {
    let protocol = Protocol {
        bug: Some(bug),
        only: Some(property),
        ..protocol
    };
    let checker = protocol.checker().spawn_bfs().join();
    let path = checker
        .discovery(property)
        .unwrap_or_else(|| panic!("{bug:?} was not found: {property}"));
    let steps = path.into_actions();
    println!(
        "{bug:?}: against \"{property}\" in {} steps: {steps:?}",
        steps.len()
    );
}

#[test]
fn a_handler_in_a_transaction() {
    holds(
        "in a transaction, 3 faults",
        protocol(&[Handler::InTransaction], 3),
    );
}

#[test]
fn a_handler_without_a_transaction() {
    holds("without one, 3 faults", protocol(&[Handler::Plain], 3));
}

#[test]
fn two_messages() {
    holds(
        "two messages, 2 faults",
        protocol(&[Handler::Sound, Handler::Plain], 2),
    );
}

#[test]
fn a_message_that_kills_its_process_beside_another() {
    holds(
        "a killer, no fault",
        protocol(&[Handler::Killer, Handler::Sound], 0),
    );
    holds(
        "a killer, 2 faults",
        protocol(&[Handler::Killer, Handler::Sound], 2),
    );
}

#[test]
fn a_verdict_that_ignores_read_ct_is_found() {
    let plain = || protocol(&[Handler::Plain], 2);
    finds(Bug::VerdictIgnoresReadCt, FENCE, plain());
    finds(Bug::VerdictIgnoresReadCt, ATTEMPTS, plain());
}

#[test]
fn a_completion_outside_of_the_transaction_is_found() {
    let in_transaction = protocol(&[Handler::InTransaction], 2);
    finds(Bug::CompletionOutsideTransaction, ONCE, in_transaction);
}

#[test]
fn redriving_in_two_steps_is_found() {
    finds(
        Bug::RedriveInTwoSteps,
        PLACES,
        protocol(&[Handler::Plain], 0),
    );
    let one = Protocol {
        operators: 1,
        ..protocol(&[Handler::Plain], 0)
    };
    finds(Bug::RedriveInTwoSteps, PLACES, one);
}

#[test]
fn redriving_under_the_same_id_is_found() {
    finds(
        Bug::RedriveKeepsTheId,
        FENCE,
        protocol(&[Handler::Plain], 2),
    );
}

#[test]
fn losses_that_are_not_counted_are_found() {
    finds(
        Bug::LossesAreNotCounted,
        LOSSES,
        protocol(&[Handler::Killer], 0),
    );
}

#[test]
fn giving_back_that_counts_as_a_loss_is_found() {
    finds(
        Bug::GivingBackLeavesNoNote,
        LOSSES,
        protocol(&[Handler::Plain], 1),
    );
}

#[test]
fn suspects_that_run_beside_others_are_found() {
    let beside = protocol(&[Handler::Killer, Handler::Sound], 0);
    finds(Bug::SuspectsRunBesideOthers, ALONE, beside);
}
