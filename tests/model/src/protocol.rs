//! States, steps and properties.

use stateright::{Model, Property};

/// What is left out of the protocol, for the check to find.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Bug {
    /// Verdicts ask for the message's id only.
    VerdictIgnoresReadCt,
    /// The handler's transaction commits first, and the completion follows by its own statement.
    CompletionOutsideTransaction,
    /// Redriving inserts what was listed, and deletes the dead letter by another statement.
    RedriveInTwoSteps,
    /// A redriven message keeps its id, and its count starts again.
    RedriveKeepsTheId,
    /// A claim does not count that the lease before it was lost.
    LossesAreNotCounted,
    /// Giving back does not note that a verdict was left.
    GivingBackLeavesNoNote,
    /// Messages that lost their lease twice are claimed beside others.
    SuspectsRunBesideOthers,
}

/// What the handler does for an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Handler {
    /// Takes `&mut Tx`; may succeed or fail.
    InTransaction,
    /// Takes no transaction and returns an event to emit; may succeed or fail.
    Plain,
    /// Takes `&mut Tx` and always succeeds.
    Sound,
    /// Kills its process each time.
    Killer,
}

/// One set-up.
#[derive(Debug, Clone)]
pub(crate) struct Protocol {
    /// What the handler of each event does; as many messages.
    pub(crate) handlers: Vec<Handler>,
    /// Nodes.
    pub(crate) nodes: usize,
    /// Operators, each of whom may redrive one dead letter.
    pub(crate) operators: usize,
    /// Attempts before a message is dead-lettered.
    pub(crate) max_attempts: u8,
    /// `MOST_ABANDONMENTS` of `runtime/worker.rs`.
    pub(crate) most_losses: u8,
    /// How much may go wrong.
    pub(crate) faults: u8,
    /// What is wrong with the protocol.
    pub(crate) bug: Option<Bug>,
    /// The only property to look at, so that the first counterexample ends the check; all of them if `None`.
    pub(crate) only: Option<&'static str>,
}

/// `SUSPECT_AFTER` of `store/queue.rs`.
const SUSPECT_AFTER: u8 = 2;

/// A row of the queue.
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a fact of its own about the row"
)]
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Row {
    /// `msg_id`.
    id: u8,
    event: usize,
    read_ct: u8,
    /// `vt` has passed.
    is_due: bool,
    /// Held by a transaction that has deleted the row and is not committed.
    is_locked: bool,
    /// Headers: `settled`, `abandoned` and `attempts`.
    is_settled: bool,
    abandoned: u8,
    attempts: u8,
    /// Not in the database: the last claim has left no verdict yet, whatever the headers say.
    is_open: bool,
    /// Not in the database: how often it became due, or was hidden again, under this claim.
    changes: u8,
    /// Not in the database: how often its event was redriven.
    life: u8,
}

impl Row {
    /// `LOSSES` of `store/queue.rs`.
    fn losses(&self) -> u8 {
        self.abandoned + u8::from(self.read_ct > 0 && !self.is_settled)
    }
}

/// Whether the row has been claimed, or redriven, since the attempt claimed it.
fn is_stale(row: &Row, attempt: &Attempt) -> bool {
    (row.life, row.read_ct) != (attempt.life, attempt.read_ct)
}

/// A row of the dead-letter queue.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Letter {
    id: u8,
    event: usize,
    attempts: u8,
    /// What `abandoned` will be when it is redriven: a message that ran alone goes on doing so.
    losses: u8,
}

/// A claimed message in a node, from the claim until its verdict is stored or it is lost.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Attempt {
    id: u8,
    read_ct: u8,
    event: usize,
    /// As the claim read them.
    attempts: u8,
    /// It holds the node's isolation for writing.
    is_alone: bool,
    phase: Phase,
    /// That of the row.
    life: u8,
}

/// How far an attempt is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Phase {
    /// In the worker's buffer.
    Held,
    /// In the handler, its transaction open.
    Running,
    /// The completion is stored in the handler's transaction, which is open.
    Stored,
    /// `COMMIT` is on its way.
    CommitSent,
    /// With the settler.
    Decided(Verdict),
}

/// `Verdict` of `runtime/settle.rs`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Verdict {
    Complete,
    /// A retry if an attempt has failed, else given back.
    Release {
        has_failed: bool,
    },
    DeadLetter {
        has_failed: bool,
    },
}

/// A transaction whose client does not wait for it any more.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Orphan {
    id: u8,
    event: usize,
    /// `COMMIT` was sent, and may still be read.
    may_commit: bool,
}

/// Somebody who redrives.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Operator {
    Idle,
    /// Has seen a dead letter in a list.
    Listed {
        letter: u8,
        event: usize,
    },
    /// Only with [`Bug::RedriveInTwoSteps`].
    Inserted {
        letter: u8,
    },
    Finished,
}

/// Database and nodes.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct State {
    rows: Vec<Row>,
    letters: Vec<Letter>,
    nodes: Vec<Vec<Attempt>>,
    orphans: Vec<Orphan>,
    operators: Vec<Operator>,
    next_id: u8,
    faults: u8,
    /// By event: completed messages, committed effects or stored emits, stored failures since it was
    /// redriven, claims that left no verdict since then.
    done: Vec<u8>,
    effects: Vec<u8>,
    failures: Vec<u8>,
    losses: Vec<u8>,
    /// By event: how often it was redriven.
    redriven: Vec<u8>,
    /// A verdict of a lease that was lost has changed something.
    stale_verdict: bool,
}

/// A step. `node` and `at` say which attempt of which node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    /// `queue::claim` with `Which::Ordinary`, and `Claimer::take_in`.
    Claim { node: usize, row: usize },
    /// `queue::claim` with `Which::Suspect`, by `Claimer::start_suspect`: nothing else runs in the node.
    ClaimAlone { node: usize, row: usize },
    /// `worker::start_attempts`, and `attempt::begin`.
    Start { node: usize, at: usize },
    /// The handler returns `Ok`; with a transaction `attempt::store_in` completes the message in it.
    Succeed { node: usize, at: usize },
    /// The handler returns `Err`: `attempt::failure`.
    Fail { node: usize, at: usize },
    /// `attempt::commit` sends `COMMIT`.
    SendCommit { node: usize, at: usize },
    /// It was committed, and the answer came.
    Commit { node: usize, at: usize },
    /// The settler stores a verdict: `settle::complete`, `release`, `dead_letter`, and the fenced statements
    /// of `store/queue.rs` and `core.dead_letter`.
    Settle { node: usize, at: usize },
    /// The node has noticed that the message is no longer its own, or that the lease could not be extended:
    /// `Leases::lose`, `End::Stolen`.
    NoticeLoss { node: usize, at: usize },
    /// `queue::extend`, of a lease that had ended and that nobody has claimed.
    Extend { node: usize, at: usize },
    /// A handler that kills its process.
    Kill { node: usize, at: usize },
    /// `vt` passes: of a lease whose holder is gone, or of a message that was given back.
    TimePasses { row: usize },
    /// The server reads a `COMMIT` whose sender is gone.
    OrphanCommits { orphan: usize },
    /// The server rolls back a transaction whose client is gone.
    OrphanEnds { orphan: usize },
    /// `dead_letters::redrive` of what was listed.
    Redrive { operator: usize },
    /// The second half of [`Bug::RedriveInTwoSteps`].
    DeleteLetter { operator: usize },
    /// `dead_letters::list`. May never happen.
    List { operator: usize, letter: usize },

    // From here on: what goes wrong.
    /// The process is killed and starts again.
    Crash { node: usize },
    /// A lease ends although its holder lives: it was paused, or its control connection hangs.
    LeaseEnds { row: usize },
    /// Not started, or stopped: `worker::give_back`, `End::Aborted`, a snooze.
    GiveBack { node: usize, at: usize },
    /// The server ends the handler's transaction: `End::Disturbed`.
    Disturb { node: usize, at: usize },
    /// No answer to `COMMIT`: `End::Disturbed`, whether or not it is committed in the end.
    LoseCommitAnswer { node: usize, at: usize },
    /// `COMMIT` takes longer than the handler may: `End::Failed`, whether or not it is committed in the end.
    TimeOutCommit { node: usize, at: usize },
    /// A verdict is stored, its answer is lost, and `settle::insist` sends it again.
    LoseVerdictAnswer { node: usize, at: usize },
    /// `settle::insist` gives up, because the lease has ended.
    StopInsisting { node: usize, at: usize },
    /// An attempt that runs alone does so for `ALONE_AT_MOST`; others may start beside it.
    GrowOld { node: usize, at: usize },
    /// The answer to a redrive is lost, and the operator repeats it.
    LoseRedriveAnswer { operator: usize },
}

impl Action {
    /// Whether it is bounded by [`Protocol::faults`].
    fn is_fault(&self) -> bool {
        matches!(
            self,
            Self::Crash { .. }
                | Self::LeaseEnds { .. }
                | Self::GiveBack { .. }
                | Self::Disturb { .. }
                | Self::LoseCommitAnswer { .. }
                | Self::TimeOutCommit { .. }
                | Self::LoseVerdictAnswer { .. }
                | Self::StopInsisting { .. }
                | Self::GrowOld { .. }
                | Self::LoseRedriveAnswer { .. }
        )
    }

    /// Whether it has to happen if nothing else does.
    fn is_progress(&self) -> bool {
        !self.is_fault() && !matches!(self, Self::List { .. })
    }
}

impl State {
    /// Grows with every step that has to happen, and is bounded as long as no fault and no operator
    /// intervenes: those steps come to an end.
    fn rank(&self) -> [i32; 7] {
        let operators = self.operators.iter().map(|operator| match operator {
            Operator::Idle => 0,
            Operator::Listed { .. } => 1,
            Operator::Inserted { .. } => 2,
            Operator::Finished => 3,
        });
        let ended = self.letters.len()
            + self
                .done
                .iter()
                .map(|&done| usize::from(done))
                .sum::<usize>();
        let attempts = self
            .nodes
            .iter()
            .flatten()
            .map(|attempt| match attempt.phase {
                Phase::Held => -5,
                Phase::Running => -4,
                Phase::Stored => -3,
                Phase::CommitSent => -2,
                Phase::Decided(_) => -1,
            });
        let small = |count: usize| i32::try_from(count).expect("the model is small");
        [
            operators.sum(),
            i32::from(self.faults),
            small(ended),
            self.rows.iter().map(|row| i32::from(row.read_ct)).sum(),
            self.rows.iter().map(|row| i32::from(row.changes)).sum(),
            attempts.sum(),
            -small(self.orphans.len()),
        ]
    }

    fn row_of(&self, id: u8) -> Option<usize> {
        self.rows.iter().position(|row| row.id == id)
    }

    /// The row that a statement about the attempt's message changes, by the fence (`msg_id`, `read_ct`).
    fn fenced(&self, attempt: &Attempt, bug: Option<Bug>) -> Option<usize> {
        self.rows.iter().position(|row| {
            row.id == attempt.id
                && (row.read_ct == attempt.read_ct || bug == Some(Bug::VerdictIgnoresReadCt))
        })
    }

    /// Whether a transaction holds the row: a statement about it waits.
    fn is_locked(&self, id: u8) -> bool {
        self.row_of(id).is_some_and(|row| self.rows[row].is_locked)
    }

    /// Whether the attempt is that of the newest claim, and its verdict is not stored.
    fn is_ours(&self, attempt: &Attempt) -> bool {
        self.rows
            .iter()
            .any(|row| row.id == attempt.id && row.read_ct == attempt.read_ct && !row.is_settled)
    }

    fn is_held(&self, row: &Row) -> bool {
        self.nodes
            .iter()
            .flatten()
            .any(|attempt| attempt.id == row.id && attempt.read_ct == row.read_ct)
    }

    /// The node is killed. Its transactions are on the server until that notices.
    fn crash(&mut self, node: usize) {
        for attempt in std::mem::take(&mut self.nodes[node]) {
            self.leave_transaction(&attempt);
        }
    }

    fn leave_transaction(&mut self, attempt: &Attempt) {
        if matches!(attempt.phase, Phase::Stored | Phase::CommitSent) {
            self.orphans.push(Orphan {
                id: attempt.id,
                event: attempt.event,
                may_commit: attempt.phase == Phase::CommitSent,
            });
        }
    }

    /// A handler's transaction commits: its effect, and the deletion of the row.
    fn commit(&mut self, id: u8, event: usize) {
        self.rows.retain(|row| row.id != id);
        self.done[event] += 1;
        self.effects[event] += 1;
    }

    fn unlock(&mut self, id: u8) {
        if let Some(row) = self.row_of(id) {
            self.rows[row].is_locked = false;
        }
    }

    fn places(&self, event: usize) -> usize {
        self.rows.iter().filter(|row| row.event == event).count()
            + self
                .letters
                .iter()
                .filter(|letter| letter.event == event)
                .count()
            + usize::from(self.done[event])
    }
}

impl Protocol {
    /// `core.dead_letter`, `queue::release` and `queue::complete`, each by one statement.
    fn store_verdict(&self, state: &mut State, attempt: &Attempt, verdict: Verdict) {
        let Some(at) = state.fenced(attempt, self.bug) else {
            return;
        };
        // A verdict that is repeated finds itself stored; that is no loss.
        let is_stale = is_stale(&state.rows[at], attempt);
        state.stale_verdict |= is_stale;
        let is_repeated = !is_stale && !state.rows[at].is_open;
        let has_failed = matches!(
            verdict,
            Verdict::Release { has_failed: true } | Verdict::DeadLetter { has_failed: true }
        );
        if has_failed && !is_repeated {
            state.failures[attempt.event] += 1;
        }
        let attempts = attempt.attempts + u8::from(has_failed);
        match verdict {
            Verdict::Complete => {
                state.rows.remove(at);
                state.done[attempt.event] += 1;
                // The emit is part of the statement; a handler's transaction has committed before.
                if self.handlers[attempt.event] == Handler::Plain {
                    state.effects[attempt.event] += 1;
                }
            }
            Verdict::Release { has_failed } => {
                let row = &mut state.rows[at];
                // A retry waits, what was given back is due at once.
                row.is_due = !has_failed;
                row.changes += 1;
                row.is_settled = has_failed || self.bug != Some(Bug::GivingBackLeavesNoNote);
                row.is_open = false;
                if has_failed {
                    row.attempts = attempts;
                }
            }
            Verdict::DeadLetter { .. } => {
                let row = state.rows.remove(at);
                let id = if self.bug == Some(Bug::RedriveKeepsTheId) {
                    row.id
                } else {
                    state.next_id += 1;
                    state.next_id
                };
                state.letters.push(Letter {
                    id,
                    event: row.event,
                    attempts,
                    losses: if row.abandoned >= SUSPECT_AFTER {
                        SUSPECT_AFTER
                    } else {
                        0
                    },
                });
            }
        }
    }

    /// `queue::claim` and `Claimer::take_in`.
    fn claim(&self, state: &mut State, node: usize, at: usize, is_alone: bool) {
        let row = &mut state.rows[at];
        if row.read_ct > 0 {
            if row.is_open {
                state.losses[row.event] += 1;
            }
            if row.is_settled {
                row.is_settled = false;
            } else if self.bug != Some(Bug::LossesAreNotCounted) {
                row.abandoned += 1;
            }
        }
        row.read_ct += 1;
        row.is_due = false;
        row.is_open = true;
        row.changes = 0;
        let phase = if row.abandoned >= self.most_losses {
            Phase::Decided(Verdict::DeadLetter { has_failed: false })
        } else {
            Phase::Held
        };
        let attempt = Attempt {
            id: row.id,
            read_ct: row.read_ct,
            event: row.event,
            attempts: row.attempts,
            is_alone: is_alone && phase == Phase::Held,
            phase,
            life: row.life,
        };
        state.nodes[node].push(attempt);
    }

    /// `attempt::failure`.
    fn failure(&self, attempt: &Attempt) -> Phase {
        Phase::Decided(if attempt.attempts + 1 >= self.max_attempts {
            Verdict::DeadLetter { has_failed: true }
        } else {
            Verdict::Release { has_failed: true }
        })
    }

    fn insert_redriven(&self, state: &mut State, letter: u8, event: usize) {
        let known = state.letters.iter().find(|other| other.id == letter);
        let losses = known.map_or(0, |known| known.losses);
        state
            .letters
            .retain(|other| other.id != letter || self.bug == Some(Bug::RedriveInTwoSteps));
        let id = if self.bug == Some(Bug::RedriveKeepsTheId) {
            letter
        } else {
            state.next_id += 1;
            state.next_id
        };
        state.redriven[event] += 1;
        state.rows.push(Row {
            id,
            event,
            read_ct: 0,
            is_due: true,
            is_locked: false,
            is_settled: false,
            abandoned: losses,
            attempts: 0,
            is_open: false,
            changes: 0,
            life: state.redriven[event],
        });
        state.failures[event] = 0;
        state.losses[event] = losses;
    }

    fn attempt_actions(&self, state: &State, node: usize, at: usize, actions: &mut Vec<Action>) {
        let attempt = &state.nodes[node][at];
        let row = state
            .rows
            .iter()
            .find(|row| row.id == attempt.id && row.read_ct == attempt.read_ct);
        let has_ended = row.is_none_or(|row| row.is_due || row.is_settled);
        let may_go_wrong = state.faults < self.faults;
        let in_transaction = self.handlers[attempt.event] != Handler::Plain;
        match attempt.phase {
            Phase::Held => {
                actions.push(Action::Start { node, at });
                if may_go_wrong {
                    actions.push(Action::GiveBack { node, at });
                }
            }
            Phase::Running => {
                let handler = self.handlers[attempt.event];
                if handler == Handler::Killer {
                    actions.push(Action::Kill { node, at });
                } else {
                    // The completion waits for a transaction that holds the row.
                    if !in_transaction || !state.is_locked(attempt.id) {
                        actions.push(Action::Succeed { node, at });
                    }
                    if handler != Handler::Sound {
                        actions.push(Action::Fail { node, at });
                    }
                }
                if may_go_wrong {
                    actions.push(Action::GiveBack { node, at });
                }
            }
            Phase::Stored => {
                actions.push(Action::SendCommit { node, at });
                if may_go_wrong {
                    actions.push(Action::Disturb { node, at });
                }
            }
            Phase::CommitSent => {
                actions.push(Action::Commit { node, at });
                if may_go_wrong {
                    actions.push(Action::LoseCommitAnswer { node, at });
                    actions.push(Action::TimeOutCommit { node, at });
                }
            }
            Phase::Decided(_) => {
                if !state.is_locked(attempt.id) {
                    actions.push(Action::Settle { node, at });
                    if may_go_wrong {
                        actions.push(Action::LoseVerdictAnswer { node, at });
                    }
                }
                if may_go_wrong && has_ended {
                    actions.push(Action::StopInsisting { node, at });
                }
            }
        }
        if has_ended && matches!(attempt.phase, Phase::Held | Phase::Running | Phase::Stored) {
            actions.push(Action::NoticeLoss { node, at });
        }
        if row.is_some_and(|row| row.is_due && !row.is_locked) && state.is_ours(attempt) {
            actions.push(Action::Extend { node, at });
        }
        if may_go_wrong && attempt.is_alone {
            actions.push(Action::GrowOld { node, at });
        }
    }

    fn claims(&self, state: &State, node: usize, actions: &mut Vec<Action>) {
        // What holds the isolation: from the claim until the handler has returned and its transaction has
        // ended.
        let guards = state.nodes[node]
            .iter()
            .filter(|attempt| !matches!(attempt.phase, Phase::Decided(_)));
        let (mut others, mut alone) = (0, 0);
        for attempt in guards {
            if attempt.is_alone {
                alone += 1;
            } else {
                others += 1;
            }
        }
        for (index, row) in state.rows.iter().enumerate() {
            if !row.is_due || row.is_locked {
                continue;
            }
            let is_suspect =
                row.losses() >= SUSPECT_AFTER && self.bug != Some(Bug::SuspectsRunBesideOthers);
            if !is_suspect && alone == 0 {
                actions.push(Action::Claim { node, row: index });
            }
            if is_suspect && alone + others == 0 {
                actions.push(Action::ClaimAlone { node, row: index });
            }
        }
    }
}

impl Model for Protocol {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let events = self.handlers.len();
        let rows = (0_u8..).zip(0..events).map(|(id, event)| Row {
            id,
            event,
            read_ct: 0,
            is_due: true,
            is_locked: false,
            is_settled: false,
            abandoned: 0,
            attempts: 0,
            is_open: false,
            changes: 0,
            life: 0,
        });
        vec![State {
            rows: rows.collect(),
            letters: Vec::new(),
            nodes: vec![Vec::new(); self.nodes],
            orphans: Vec::new(),
            operators: vec![Operator::Idle; self.operators],
            next_id: 10,
            faults: 0,
            done: vec![0; events],
            effects: vec![0; events],
            failures: vec![0; events],
            losses: vec![0; events],
            redriven: vec![0; events],
            stale_verdict: false,
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        let may_go_wrong = state.faults < self.faults;
        for (node, attempts) in state.nodes.iter().enumerate() {
            self.claims(state, node, actions);
            for at in 0..attempts.len() {
                self.attempt_actions(state, node, at, actions);
            }
            if may_go_wrong && !attempts.is_empty() {
                actions.push(Action::Crash { node });
            }
        }
        for (index, row) in state.rows.iter().enumerate() {
            if row.is_due {
                continue;
            }
            if row.is_settled || !state.is_held(row) {
                actions.push(Action::TimePasses { row: index });
            } else if may_go_wrong {
                actions.push(Action::LeaseEnds { row: index });
            }
        }
        for (index, orphan) in state.orphans.iter().enumerate() {
            actions.push(Action::OrphanEnds { orphan: index });
            if orphan.may_commit {
                actions.push(Action::OrphanCommits { orphan: index });
            }
        }
        for (index, operator) in state.operators.iter().enumerate() {
            match operator {
                Operator::Idle => {
                    let letters = 0..state.letters.len();
                    actions.extend(letters.map(|letter| Action::List {
                        operator: index,
                        letter,
                    }));
                }
                Operator::Listed { .. } => {
                    actions.push(Action::Redrive { operator: index });
                    if may_go_wrong {
                        actions.push(Action::LoseRedriveAnswer { operator: index });
                    }
                }
                Operator::Inserted { .. } => {
                    actions.push(Action::DeleteLetter { operator: index });
                }
                Operator::Finished => {}
            }
        }
    }

    fn next_state(&self, before: &State, action: Action) -> Option<State> {
        let mut state = before.clone();
        let is_progress = action.is_progress();
        state.faults += u8::from(action.is_fault());
        self.apply(&mut state, action);
        assert!(
            !is_progress || state.rank() > before.rank(),
            "a step that has to happen must lead on: {before:#?} {state:#?}"
        );
        // Which node is the first one makes no difference, nor who came first in it.
        for attempts in &mut state.nodes {
            attempts.sort_unstable();
        }
        state.nodes.sort_unstable();
        state.operators.sort_unstable();
        state.orphans.sort_unstable();
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties = vec![
            Property::always(PLACES, |protocol: &Self, state: &State| {
                (0..protocol.handlers.len()).all(|event| state.places(event) == 1)
            }),
            Property::always(ONCE, |_, state: &State| {
                state.effects.iter().all(|&effects| effects <= 1)
            }),
            Property::always(TOGETHER, |_, state: &State| state.effects == state.done),
            Property::always(FENCE, |_, state: &State| !state.stale_verdict),
            Property::always(ATTEMPTS, |protocol: &Self, state: &State| {
                let rows = state
                    .rows
                    .iter()
                    .map(|row| (row.event, row.attempts, protocol.max_attempts - 1));
                let letters = state
                    .letters
                    .iter()
                    .map(|letter| (letter.event, letter.attempts, protocol.max_attempts));
                rows.chain(letters).all(|(event, attempts, most)| {
                    attempts == state.failures[event] && attempts <= most
                })
            }),
            Property::always(LOSSES, |protocol: &Self, state: &State| {
                // The claim that dead-letters a message at the cap may be lost as well, and is counted.
                let may_run = |attempt: &Attempt| {
                    let row = state
                        .rows
                        .iter()
                        .find(|row| !is_stale(row, attempt) && row.id == attempt.id);
                    row.is_none_or(|row| row.abandoned < protocol.most_losses)
                };
                let mut attempts = state.nodes.iter().flatten();
                state
                    .rows
                    .iter()
                    .all(|row| row.abandoned == state.losses[row.event])
                    && attempts.all(|attempt| {
                        matches!(attempt.phase, Phase::Decided(_)) || may_run(attempt)
                    })
            }),
            Property::always(ALONE, |protocol: &Self, state: &State| {
                state.nodes.iter().all(|attempts| {
                    let runs = attempts
                        .iter()
                        .filter(|attempt| !matches!(attempt.phase, Phase::Decided(_)));
                    let runs: Vec<&Attempt> = runs.collect();
                    runs.len() < 2 || runs.iter().all(|attempt| !attempt.is_alone)
                }) && (protocol.faults > 0
                    || (0..protocol.handlers.len()).all(|event| {
                        protocol.handlers[event] == Handler::Killer
                            || state.losses[event] <= SUSPECT_AFTER
                    }))
            }),
            Property::always(END, |protocol: &Self, state: &State| {
                let mut actions = Vec::new();
                protocol.actions(state, &mut actions);
                actions.iter().any(Action::is_progress)
                    || state.rows.is_empty()
                        && (0..protocol.handlers.len()).all(|event| {
                            protocol.handlers[event] != Handler::Sound
                                || protocol.faults > 0
                                || state.done[event] == 1
                        })
            }),
            // The model reaches what it is for.
            Property::sometimes("all is done", |protocol: &Self, state: &State| {
                let mut handlers = protocol.handlers.iter().zip(&state.done);
                handlers.all(|(&handler, &done)| handler == Handler::Killer || done == 1)
            }),
            Property::sometimes("a message is dead-lettered", |_, state: &State| {
                !state.letters.is_empty()
            }),
            Property::sometimes(
                "a redriven message is done",
                |protocol: &Self, state: &State| {
                    let mut events = 0..protocol.handlers.len();
                    protocol.operators == 0
                        || protocol.handlers.contains(&Handler::Killer)
                        || events.any(|event| state.redriven[event] > 0 && state.done[event] == 1)
                },
            ),
        ];
        properties.retain(|property| self.only.is_none_or(|only| only == property.name));
        properties
    }
}

// The properties by name.
pub(crate) const PLACES: &str = "a message is in exactly one of queue, dead letters and done";
pub(crate) const ONCE: &str =
    "what the transaction did, or a plain handler emits, is there at most once";
pub(crate) const TOGETHER: &str = "it is there if and only if the message is done";
pub(crate) const FENCE: &str = "a verdict of a lost lease changes nothing";
pub(crate) const ATTEMPTS: &str =
    "attempts are the stored failures, and at most as many as allowed";
pub(crate) const LOSSES: &str =
    "each loss of the lease is counted once, and at the cap a message is not run";
pub(crate) const ALONE: &str =
    "a suspect runs alone in its process, and takes neighbours along at most twice";
pub(crate) const END: &str =
    "when nothing is left to happen, every message is done or a dead letter";

impl Protocol {
    fn apply(&self, state: &mut State, action: Action) {
        match action {
            Action::Claim { node, row } => self.claim(state, node, row, false),
            Action::ClaimAlone { node, row } => self.claim(state, node, row, true),
            Action::Start { node, at } => state.nodes[node][at].phase = Phase::Running,
            Action::Succeed { node, at } => self.succeed(state, node, at),
            Action::Fail { node, at } => {
                state.nodes[node][at].phase = self.failure(&state.nodes[node][at]);
            }
            Action::SendCommit { node, at } => state.nodes[node][at].phase = Phase::CommitSent,
            Action::Commit { node, at } => {
                let attempt = state.nodes[node].remove(at);
                state.commit(attempt.id, attempt.event);
            }
            Action::Settle { node, at } => {
                let attempt = state.nodes[node].remove(at);
                if let Phase::Decided(verdict) = attempt.phase {
                    self.store_verdict(state, &attempt, verdict);
                }
            }
            Action::LoseVerdictAnswer { node, at } => {
                let attempt = state.nodes[node][at].clone();
                if let Phase::Decided(verdict) = attempt.phase {
                    self.store_verdict(state, &attempt, verdict);
                }
            }
            Action::StopInsisting { node, at } => {
                state.nodes[node].remove(at);
            }
            Action::NoticeLoss { node, at } => {
                let attempt = state.nodes[node].remove(at);
                state.leave_transaction(&attempt);
            }
            Action::Extend { node, at } => {
                let id = state.nodes[node][at].id;
                if let Some(row) = state.row_of(id) {
                    state.rows[row].is_due = false;
                    state.rows[row].changes += 1;
                }
            }
            Action::Kill { node, .. } | Action::Crash { node } => state.crash(node),
            Action::TimePasses { row } | Action::LeaseEnds { row } => {
                state.rows[row].is_due = true;
                state.rows[row].changes += 1;
            }
            Action::OrphanCommits { orphan } => {
                let orphan = state.orphans.remove(orphan);
                state.commit(orphan.id, orphan.event);
            }
            Action::OrphanEnds { orphan } => {
                let orphan = state.orphans.remove(orphan);
                state.unlock(orphan.id);
            }
            Action::GiveBack { node, at } => {
                // The handler's future is dropped, and with it the transaction.
                state.nodes[node][at].phase =
                    Phase::Decided(Verdict::Release { has_failed: false });
            }
            Action::Disturb { node, at } => {
                let attempt = &mut state.nodes[node][at];
                attempt.phase = Phase::Decided(Verdict::Release { has_failed: false });
                let id = attempt.id;
                state.unlock(id);
            }
            Action::LoseCommitAnswer { node, at } => {
                let attempt = state.nodes[node][at].clone();
                state.leave_transaction(&attempt);
                state.nodes[node][at].phase =
                    Phase::Decided(Verdict::Release { has_failed: false });
            }
            Action::TimeOutCommit { node, at } => {
                let attempt = state.nodes[node][at].clone();
                state.leave_transaction(&attempt);
                state.nodes[node][at].phase = self.failure(&attempt);
            }
            Action::GrowOld { node, at } => state.nodes[node][at].is_alone = false,
            Action::List { operator, letter } => {
                let Letter { id, event, .. } = state.letters[letter];
                state.operators[operator] = Operator::Listed { letter: id, event };
            }
            Action::Redrive { operator } | Action::LoseRedriveAnswer { operator } => {
                let is_repeated = matches!(action, Action::LoseRedriveAnswer { .. });
                self.redrive(state, operator, is_repeated);
            }
            Action::DeleteLetter { operator } => {
                if let Operator::Inserted { letter } = state.operators[operator] {
                    state.letters.retain(|other| other.id != letter);
                }
                state.operators[operator] = Operator::Finished;
            }
        }
    }

    fn succeed(&self, state: &mut State, node: usize, at: usize) {
        let attempt = state.nodes[node][at].clone();
        if self.handlers[attempt.event] == Handler::Plain {
            state.nodes[node][at].phase = Phase::Decided(Verdict::Complete);
        } else if self.bug == Some(Bug::CompletionOutsideTransaction) {
            state.effects[attempt.event] += 1;
            state.nodes[node][at].phase = Phase::Decided(Verdict::Complete);
        } else if let Some(row) = state.fenced(&attempt, self.bug) {
            state.stale_verdict |= is_stale(&state.rows[row], &attempt);
            state.rows[row].is_locked = true;
            state.nodes[node][at].phase = Phase::Stored;
        } else {
            // Nothing was deleted: rolled back, `End::Stolen`.
            state.nodes[node].remove(at);
        }
    }

    fn redrive(&self, state: &mut State, operator: usize, is_repeated: bool) {
        let Operator::Listed { letter, event } = state.operators[operator] else {
            return;
        };
        let is_there = state.letters.iter().any(|other| other.id == letter);
        if self.bug == Some(Bug::RedriveInTwoSteps) {
            self.insert_redriven(state, letter, event);
            state.operators[operator] = Operator::Inserted { letter };
            return;
        }
        if is_there {
            self.insert_redriven(state, letter, event);
        }
        if !is_repeated {
            state.operators[operator] = Operator::Finished;
        }
    }
}
