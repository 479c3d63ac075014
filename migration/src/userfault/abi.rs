//! The structures and numbers of linux/userfaultfd.h.

use std::mem::size_of;

/// `struct uffdio_api` of linux/userfaultfd.h.
#[repr(C)]
#[derive(Default)]
pub(super) struct Api {
    pub(super) api: u64,
    pub(super) features: u64,
    pub(super) ioctls: u64,
}

/// `struct uffdio_range`.
#[repr(C)]
#[derive(Default)]
pub(super) struct Range {
    pub(super) start: u64,
    pub(super) len: u64,
}

/// `struct uffdio_register`.
#[repr(C)]
#[derive(Default)]
pub(super) struct Register {
    pub(super) range: Range,
    pub(super) mode: u64,
    pub(super) ioctls: u64,
}

/// `struct uffdio_copy`.
#[repr(C)]
#[derive(Default)]
pub(super) struct Copy {
    pub(super) to: u64,
    pub(super) from: u64,
    pub(super) len: u64,
    pub(super) mode: u64,
    pub(super) copied: i64,
}

/// `struct uffdio_zeropage`.
#[repr(C)]
#[derive(Default)]
pub(super) struct ZeroPage {
    pub(super) range: Range,
    pub(super) mode: u64,
    pub(super) zeroed: i64,
}

const IOCTL: u64 = 0xaa;
const READ: u64 = 2;
const READ_WRITE: u64 = 3;

const fn request<T>(direction: u64, number: u64) -> libc::c_ulong {
    direction << 30 | (size_of::<T>() as u64) << 16 | IOCTL << 8 | number
}

pub(super) const USERFAULTFD_IOC_NEW: libc::c_ulong = IOCTL << 8;
pub(super) const UFFDIO_API: libc::c_ulong = request::<Api>(READ_WRITE, 0x3f);
pub(super) const UFFDIO_REGISTER: libc::c_ulong = request::<Register>(READ_WRITE, 0);
pub(super) const UFFDIO_UNREGISTER: libc::c_ulong = request::<Range>(READ, 1);
pub(super) const UFFDIO_WAKE: libc::c_ulong = request::<Range>(READ, 2);
pub(super) const UFFDIO_COPY: libc::c_ulong = request::<Copy>(READ_WRITE, 3);
pub(super) const UFFDIO_ZEROPAGE: libc::c_ulong = request::<ZeroPage>(READ_WRITE, 4);

const _: () = {
    assert!(UFFDIO_API == 0xc018_aa3f);
    assert!(UFFDIO_REGISTER == 0xc020_aa00);
    assert!(UFFDIO_WAKE == 0x8010_aa02);
    assert!(UFFDIO_COPY == 0xc028_aa03);
    assert!(UFFDIO_ZEROPAGE == 0xc020_aa04);
};

pub(super) const UFFD_API: u64 = 0xaa;
pub(super) const FEATURE_THREAD_ID: u64 = 1 << 8;
pub(super) const MODE_MISSING: u64 = 1;
/// What registered memory has to offer: `UFFDIO_WAKE`, `UFFDIO_COPY` and `UFFDIO_ZEROPAGE`.
pub(super) const RANGE_IOCTLS: u64 = 1 << 2 | 1 << 3 | 1 << 4;

pub(super) const EVENT_PAGEFAULT: u8 = 0x12;
/// The size of `struct uffd_msg`.
pub(super) const MESSAGE: usize = 32;
pub(super) const MESSAGES_PER_READ: usize = 64;
