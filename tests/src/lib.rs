//! Fault helpers of the nexus test suites.
