//! Benchmarks of Ferry.
