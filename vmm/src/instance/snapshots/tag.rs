//! The names of snapshots, and of the files that belong to them.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::path::{Path, PathBuf};

use time::OffsetDateTime;

/// The most bytes of a tag: behind an image's name there must be room for it and the rest.
const MAX_TAG: usize = 100;

/// A snapshot's name, which can be a part of a file's.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Tag(String);

/// It can't be a snapshot's name.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{}' can't be the name of a snapshot: it is a part of a file's name, and has up to {MAX_TAG} \
     letters, digits, '-', '_' and '.', not in the beginning",
    .0.escape_debug()
)]
pub(super) struct BadTag(String);

impl Tag {
    pub(super) fn new(text: &str) -> Result<Self, BadTag> {
        let fits = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if text.is_empty()
            || text.len() > MAX_TAG
            || text.starts_with('.')
            || !text.chars().all(fits)
        {
            return Err(BadTag(text.chars().take(MAX_TAG).collect()));
        }
        Ok(Self(text.to_owned()))
    }

    /// The name of a snapshot without one, as QEMU makes it, but in UTC.
    pub(super) fn of_time(now: OffsetDateTime) -> Self {
        let (year, month, day) = now.to_calendar_date();
        let (hour, minute, second) = now.to_hms();
        let month = u8::from(month);
        Self(format!(
            "vm-{year:04}{month:02}{day:02}{hour:02}{minute:02}{second:02}"
        ))
    }

    pub(super) fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a file beside an image is. Each time that a snapshot is saved, its files get a random
/// number: they never replace those of an older one, and belong together if it is the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum FileName {
    /// What makes a snapshot one: without it the others are nothing.
    Manifest(Tag),
    /// The guest's state.
    State(Tag, u64),
    /// A copy of the image.
    Copy(Tag, u64),
}

impl FileName {
    /// What it is for `image`; `None` for a file that belongs to no snapshot of it.
    pub(super) fn parse(image: &Path, name: &OsStr) -> Option<Self> {
        let rest = name.to_str()?.strip_prefix(image.file_name()?.to_str()?)?;
        let (rest, kind) = rest.strip_prefix('.')?.rsplit_once('.')?;
        if kind == "snapshot" {
            return Tag::new(rest).ok().map(Self::Manifest);
        }
        let (tag, id) = rest.rsplit_once('.')?;
        let digit = |c: char| matches!(c, '0'..='9' | 'a'..='f');
        if id.len() != 16 || !id.chars().all(digit) {
            return None;
        }
        let (tag, id) = (Tag::new(tag).ok()?, u64::from_str_radix(id, 16).ok()?);
        match kind {
            "state" => Some(Self::State(tag, id)),
            "disk" => Some(Self::Copy(tag, id)),
            _ => None,
        }
    }

    /// The snapshot that it belongs to.
    pub(super) fn tag(&self) -> &Tag {
        match self {
            Self::Manifest(tag) | Self::State(tag, _) | Self::Copy(tag, _) => tag,
        }
    }

    /// Where it is, beside `image`.
    pub(super) fn beside(&self, image: &Path) -> PathBuf {
        let mut path = OsString::from(image);
        path.push(match self {
            Self::Manifest(tag) => format!(".{tag}.snapshot"),
            Self::State(tag, id) => format!(".{tag}.{id:016x}.state"),
            Self::Copy(tag, id) => format!(".{tag}.{id:016x}.disk"),
        });
        path.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_can_do_no_harm_in_a_path() {
        for good in ["a", "before-update", "v1.2_3", "-x"] {
            assert_eq!(Tag::new(good).unwrap().as_str(), good);
        }
        let long = "x".repeat(101);
        for bad in ["", ".", "..", ".a", "a/b", "a b", "ä", "a\n", long.as_str()] {
            assert!(Tag::new(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn files_are_told_apart_by_their_names() {
        let image = Path::new("/images/disk.raw");
        let tag = |text| Tag::new(text).unwrap();
        for name in [
            FileName::Manifest(tag("a")),
            FileName::Manifest(tag("a.0123456789abcdef")),
            FileName::State(tag("a.b"), 1),
            FileName::Copy(tag("a.0123456789abcdef"), u64::MAX),
        ] {
            let path = name.beside(image);
            assert_eq!(path.parent(), image.parent());
            let parsed = FileName::parse(image, path.file_name().unwrap());
            assert_eq!(parsed.as_ref(), Some(&name), "{}", path.display());
        }
        for other in [
            "disk.raw",
            "disk.raw.a",
            "disk.raw2.a.snapshot",
            "disk.raw..snapshot",
            "disk.raw.a.state",
            "disk.raw.a.0123456789ABCDEF.state",
            "disk.raw.0123456789abcdef.disk",
        ] {
            assert_eq!(FileName::parse(image, OsStr::new(other)), None, "{other}");
        }
    }

    #[test]
    fn a_name_is_made_of_the_time() {
        let time = OffsetDateTime::from_unix_timestamp(1_709_210_096).unwrap();
        assert_eq!(Tag::of_time(time).as_str(), "vm-20240229123456");
    }
}
