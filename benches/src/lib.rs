//! Measuring Ferry against other VMMs, from outside: what an operator and a guest notice.
//!
//! A [`scenario::Scenario`] says what the guest is and does, and how it moves. A [`vmm::Vmm`] is a
//! program that can run and migrate it; all [`contenders`] are measured in turn (A B A B …), so that a
//! busy machine hurts them alike, and compared pair by pair.
//!
//! [`migration`], [`start`], [`pause`] and [`disk`] each measure one thing once, a *run*: each yields
//! its [`figure::Figure`]s. Many runs make the rows of a [`report::Report`]. [`command`] is what users
//! call: `ferry bench`.
//!
//! The destination of a migration may be on another host, behind an agent there ([`remote`]); either
//! way it is an [`end::End`].
//!
//! How to run it and what each figure means is in `docs/benchmarks.md`.

pub mod command;
pub mod contenders;
pub mod disk;
pub mod end;
pub mod error;
pub mod figure;
pub mod interrupt;
pub mod machine;
pub mod migration;
pub mod network;
pub mod pause;
pub mod proc;
pub mod remote;
pub mod report;
pub mod scenario;
pub mod setting;
pub mod start;
pub mod summary;
pub mod tiny;
pub mod vmm;
