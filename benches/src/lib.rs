//! Measuring Ferry against other VMMs, from outside: what an operator and a guest notice.
//!
//! A [`scenario::Scenario`] says what the guest is and does. A [`vmm::Vmm`] is a program that can
//! run and migrate it; all are measured in turn (A B A B …), so that a busy machine hurts them alike,
//! and compared pair by pair. [`migration`], [`start`], [`pause`] and [`disk`] each measure one thing once;
//! [`summary`] makes medians and tables of many.
//!
//! How to read the figures is in `docs/performance.md`.

pub mod disk;
pub mod error;
pub mod migration;
pub mod network;
pub mod pause;
pub mod proc;
pub mod scenario;
pub mod start;
pub mod summary;
pub mod tiny;
pub mod vmm;
