//! With which code the program ends, and what it says before. The codes are promised: see `docs/cli.md`.

use std::{fmt, io, process::ExitCode};

use nexus::{
    StartError,
    client::{
        ConnectError, EditError, EmitError, OperateError, PayloadError, ReplayError, RetireError,
        ScheduleError, SqlError, TokenError,
    },
};

use crate::console;

const REFUSED: u8 = 1;
const USAGE: u8 = 2;
const UNREACHABLE: u8 = 3;
const SCHEMA: u8 = 4;
pub(crate) const INTERRUPTED: u8 = 130;

/// The command line cannot be followed as it is.
#[derive(Debug)]
pub(crate) struct Usage(pub(crate) String);

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// Ctrl-C, by a command that has tidied up.
#[derive(Debug)]
pub(crate) struct Interrupted;

impl fmt::Display for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("interrupted")
    }
}

impl std::error::Error for Interrupted {}

pub(crate) fn usage(text: impl Into<String>) -> anyhow::Error {
    Usage(text.into()).into()
}

pub(crate) fn code(done: anyhow::Result<()>) -> ExitCode {
    let Err(error) = done else {
        return ExitCode::SUCCESS;
    };
    let is_closed = |cause: &(dyn std::error::Error + 'static)| {
        let error = cause.downcast_ref::<io::Error>();
        error.is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
    };
    if error.chain().next().is_some_and(is_closed) {
        // Whoever reads has read enough.
        return ExitCode::SUCCESS;
    }
    console::complain(&error);
    ExitCode::from(error.chain().find_map(code_of).unwrap_or(REFUSED))
}

/// What an error in the chain says of the code.
fn code_of(error: &(dyn std::error::Error + 'static)) -> Option<u8> {
    if error.is::<Usage>() {
        return Some(USAGE);
    }
    if error.is::<Interrupted>() {
        return Some(INTERRUPTED);
    }
    if let Some(StartError::Database { .. }) = error.downcast_ref() {
        return Some(UNREACHABLE);
    }
    if let Some(error) = error.downcast_ref::<ConnectError>() {
        return Some(match error {
            ConnectError::Url { .. } => USAGE,
            ConnectError::Schema(_) => SCHEMA,
            ConnectError::UnknownNamespace { .. } => REFUSED,
            _ => UNREACHABLE,
        });
    }
    if error.is::<nexus_embedded::Error>() {
        return Some(UNREACHABLE);
    }
    if let Some(error) = error.downcast_ref::<EmitError>() {
        let is_refused = matches!(
            error,
            EmitError::Encode(_) | EmitError::KeyUsedForAnotherEvent { .. }
        );
        return Some(if is_refused { REFUSED } else { UNREACHABLE });
    }
    if let Some(ScheduleError::Database { .. }) = error.downcast_ref() {
        return Some(UNREACHABLE);
    }
    let operate = error.downcast_ref::<OperateError>().or_else(|| {
        // Which show nothing but what is in them, so that the chain passes it by.
        if let Some(PayloadError::Operate(error)) = error.downcast_ref() {
            return Some(error);
        }
        if let Some(EditError::Operate(error)) = error.downcast_ref() {
            return Some(error);
        }
        if let Some(SqlError::Operate(error)) = error.downcast_ref() {
            return Some(error);
        }
        if let Some(TokenError::Operate(error)) = error.downcast_ref() {
            return Some(error);
        }
        if let Some(ReplayError::Operate(error)) = error.downcast_ref() {
            return Some(error);
        }
        match error.downcast_ref() {
            Some(RetireError::Operate(error)) => Some(error),
            _ => None,
        }
    });
    matches!(
        operate,
        Some(OperateError::Database { .. } | OperateError::Interrupted { .. })
    )
    .then_some(UNREACHABLE)
}
