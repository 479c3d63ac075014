//! Whole migrations between two machines that are nothing but memory, over real sockets.

mod cancelling;
mod cuts;
mod damage;
mod handover;
mod hostile;
mod machine;
mod proxy;
mod whole;
