//! What stands behind guest memory on this host. It never travels: each side of a migration has
//! its own.

use std::path::PathBuf;

/// `--memory`, but for the size.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Backing {
    /// `hugepages`.
    pub pages: Pages,
    /// `shared`: another process could map it; otherwise it is private.
    pub shared: bool,
    /// `path`: the directory whose file system has the memory, in a file without a name. Memory in
    /// a file is shared.
    pub path: Option<PathBuf>,
    /// `prealloc`: all of it is there before the guest is.
    pub prealloc: bool,
    /// `policy` and `host-nodes`: which nodes it comes from; the host's choice otherwise.
    pub numa: Option<Numa>,
}

/// What pages the host uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pages {
    /// As the host is set up.
    #[default]
    Host,
    /// Huge ones wherever the host finds some (madvise(2), MADV_HUGEPAGE).
    Transparent,
    /// From the host's pool of huge pages, of this many bytes each; otherwise of its default size.
    Huge(Option<u64>),
}

/// Which nodes memory comes from: see set_mempolicy(2).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Numa {
    /// How they are used.
    pub policy: Policy,
    /// The nodes by their numbers; not empty.
    pub nodes: Vec<usize>,
}

/// How nodes are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// These as long as they have memory, then others.
    Preferred,
    /// These only.
    Bind,
    /// These in turn.
    Interleave,
}
