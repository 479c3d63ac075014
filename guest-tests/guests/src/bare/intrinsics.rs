//! The memory functions that compiled code needs, in terms of string instructions.
#![allow(unsafe_code, reason = "works on raw memory")]

use core::arch::asm;

/// As C's `memcpy`.
///
/// # Safety
/// As C's `memcpy`.
#[inline]
pub unsafe fn copy(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    // SAFETY: the caller vouches for both ranges.
    unsafe {
        asm!("rep movsb", inout("rcx") count => _, inout("rdi") to => _, inout("rsi") from => _,
            options(nostack, preserves_flags));
    }
    to
}

/// As C's `memmove`.
///
/// # Safety
/// As C's `memmove`.
#[inline]
pub unsafe fn move_bytes(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    if (to as usize).wrapping_sub(from as usize) >= count {
        // SAFETY: a copy upwards never overwrites what it has yet to read.
        return unsafe { copy(to, from, count) };
    }
    // SAFETY: the caller vouches for both ranges; a copy downwards is right here.
    unsafe {
        asm!("std", "rep movsb", "cld", inout("rcx") count => _,
            inout("rdi") to.wrapping_add(count).wrapping_sub(1) => _,
            inout("rsi") from.wrapping_add(count).wrapping_sub(1) => _, options(nostack));
    }
    to
}

/// As C's `memset`.
///
/// # Safety
/// As C's `memset`.
#[inline]
pub unsafe fn set(to: *mut u8, byte: u8, count: usize) -> *mut u8 {
    // SAFETY: the caller vouches for the range.
    unsafe {
        asm!("rep stosb", inout("rcx") count => _, inout("rdi") to => _, in("al") byte,
            options(nostack, preserves_flags));
    }
    to
}

/// As C's `memcmp`.
///
/// # Safety
/// As C's `memcmp`.
#[inline]
pub unsafe fn compare(a: *const u8, b: *const u8, count: usize) -> i32 {
    for index in 0..count {
        // SAFETY: the caller vouches for both ranges.
        let (a, b) = unsafe { (a.add(index).read_volatile(), b.add(index).read_volatile()) };
        if a != b {
            return i32::from(a) - i32::from(b);
        }
    }
    0
}
