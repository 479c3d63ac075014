//! A set of pages.

/// A set of page numbers from 0 up to a fixed number of pages, a bit each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageBitmap {
    words: Vec<u64>,
    pages: u64,
}
