//! The guests with virtio drivers, in QEMU's microvm: that they work with devices that are not
//! Ferry's, and that they find what is wrong.

mod disk;
mod machine;
mod net;
mod virtio;
