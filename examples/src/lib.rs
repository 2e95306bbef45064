//! The examples of nexus; run one with `cargo run --example NAME`.
