//! Whole migrations between two machines that are nothing but memory, over real sockets.

mod machine;
mod whole;
