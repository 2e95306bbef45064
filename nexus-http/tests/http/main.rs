//! The router as programs meet it: over a socket, on a real Postgres.

mod access;
mod description;
mod emit;
mod limits;
mod look;
mod metrics;
mod server;
mod steer;
