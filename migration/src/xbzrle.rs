//! Pages that are sent again as the difference to what was sent before: QEMU's `xbzrle`, in an
//! encoding of its own ([`delta`]) over a [`cache`] of what was sent.
//!
//! # Why the destination has what the difference is to
//!
//! A difference is of use only to the side that holds, byte by byte, the page that it was taken
//! from. What the cache has of a page is what the destination has, because:
//!
//! - A page that goes into the cache is copied out of the guest's memory once, and the copy is
//!   what is checksummed, sent and cached. What the guest writes in between is in none of them; it
//!   is in the dirty log, and comes with a later round.
//! - Frames of one connection are placed in their order, and a page comes once in a round. So
//!   when a difference arrives the copy before it has been placed, and nothing newer has.
//! - A page that is told to be zero, or sent in any other way, is forgotten by the cache at that
//!   moment, and goes whole the next time that it has contents.
//! - Nothing but the stream writes to the destination's memory before the guest runs there. Pages
//!   that come after the guest (post-copy) always come whole.
//! - The cache begins empty with every migration, so it never knows of a destination before.
//!
//! What is left is damage on the way. The destination applies a difference in a scratch page, and
//! places the outcome only if its checksum is that of the page at the source. Otherwise the page
//! stays as it was and is *suspect*, as any page whose checksum doesn't match: it needs to come again,
//! whole, before END. A difference to the damaged page doesn't clear the mark, as its outcome is
//! wrong too; so a damaged page can only fail the migration, never go unseen. A guest that writes
//! meanwhile, the usual cause of a suspect page, is none here, as the copy holds still. Where pages go
//! without checksums, damage is not noticed, here as elsewhere, and goes on in the differences to it.

pub mod cache;
pub mod delta;

/// A page's contents.
pub type Page = [u8; crate::layout::PAGE_SIZE as usize];

/// The cache's size in bytes that nobody has changed: QEMU's.
pub const DEFAULT_CACHE_SIZE: u64 = 64 << 20;

/// What the cache and the differences have done, as in QEMU's `XBZRLECacheStats`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Figures {
    /// The cache's size in bytes.
    pub cache_size: u64,
    /// Bytes sent as differences, with what each costs beside them.
    pub bytes: u64,
    /// Pages sent as differences.
    pub pages: u64,
    /// Pages that were not in the cache.
    pub cache_miss: u64,
    /// In the last round, how many of the pages with contents were not in the cache: 0 to 1.
    pub cache_miss_rate: f64,
    /// In the last round, how many times larger the pages were than their differences; 0 if none
    /// was sent.
    pub encoding_rate: f64,
    /// Pages in the cache that had changed too much, and were sent whole.
    pub overflow: u64,
}

impl Figures {
    /// Sets the rates to those since `before`, in which time `pages` pages with contents were sent
    /// in whatever way. They stay as they are if there were none.
    pub fn rate_since(&mut self, before: &Self, pages: u64) {
        if pages == 0 {
            return;
        }
        let missed = self.cache_miss - before.cache_miss;
        self.cache_miss_rate = missed as f64 / pages as f64;
        let (encoded, bytes) = (self.pages - before.pages, self.bytes - before.bytes);
        self.encoding_rate = match bytes {
            0 => 0.0,
            bytes => (encoded * crate::layout::PAGE_SIZE) as f64 / bytes as f64,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_of_the_last_round() {
        let before = Figures {
            bytes: 1000,
            pages: 10,
            cache_miss: 100,
            ..Figures::default()
        };
        let mut now = Figures {
            bytes: 1000 + 4096,
            pages: 10 + 16,
            cache_miss: 100 + 4,
            ..before
        };
        now.rate_since(&before, 20);
        assert_eq!((now.cache_miss_rate, now.encoding_rate), (0.2, 16.0));
        let same = now;
        now.rate_since(&same, 0);
        assert_eq!(now, same);
        now.rate_since(&same, 5);
        assert_eq!((now.cache_miss_rate, now.encoding_rate), (0.0, 0.0));
    }
}
