//! `--memory`: how much, and what stands behind it on this host. The names are those of QEMU's
//! memory back ends, and `hugepages` is cloud-hypervisor's.

use std::path::PathBuf;

use vmm::host_list::parse_list;
use vmm::memory::{Backing, Numa, Pages, Policy};

use super::values;

/// What stands behind the option.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Memory {
    /// In bytes; otherwise the default, or what an arriving guest has.
    pub(crate) size: Option<u64>,
    /// The rest.
    pub(crate) backing: Backing,
}

/// Reads the options. A comma in a path is written twice, as in QEMU.
pub(super) fn parse(text: &str) -> Result<Memory, String> {
    let mut memory = Memory::default();
    let mut hugepages = None;
    let mut hugepage_size = None;
    let mut shared = None;
    let (mut nodes, mut policy) = (None, None);
    for (index, option) in values::split_commas(text).iter().enumerate() {
        let Some((key, value)) = option.split_once('=') else {
            if index > 0 {
                return Err(format!("'{option}' is not KEY=VALUE"));
            }
            memory.size = Some(values::memory(option)?);
            continue;
        };
        match key {
            "size" => memory.size = Some(values::memory(value)?),
            "hugepages" => {
                hugepages = Some(match value {
                    "transparent" => Pages::Transparent,
                    _ if on_off(key, value, " or transparent")? => Pages::Huge(None),
                    _ => Pages::Host,
                });
            }
            "hugepage-size" => hugepage_size = Some(page_size(value)?),
            "shared" | "share" => shared = Some(on_off(key, value, "")?),
            "path" | "mem-path" => memory.backing.path = Some(directory(value)?),
            "prealloc" => memory.backing.prealloc = on_off(key, value, "")?,
            "host-nodes" => nodes = Some(parse_list(value).map_err(|e| format!("{key}: {e}"))?),
            "policy" => {
                policy = Some(match value {
                    "default" => None,
                    "preferred" => Some(Policy::Preferred),
                    "bind" => Some(Policy::Bind),
                    "interleave" => Some(Policy::Interleave),
                    _ => {
                        return Err(format!(
                            "policy is default, preferred, bind or interleave, not '{value}'"
                        ));
                    }
                });
            }
            "slots" | "maxmem" => {
                return Err(format!(
                    "'{option}' is not supported: memory cannot be added later"
                ));
            }
            _ => {
                return Err(format!(
                    "'{key}' is not known: expected SIZE, hugepages=, hugepage-size=, shared=, \
                     path=, prealloc=, host-nodes= or policy="
                ));
            }
        }
    }
    memory.backing.pages = pages(hugepages, hugepage_size)?;
    memory.backing.shared = match (&memory.backing.path, shared) {
        (Some(_), Some(false)) => {
            return Err("shared=off: memory in a file (path=) is shared".to_owned());
        }
        (path, shared) => shared.unwrap_or(path.is_some()),
    };
    memory.backing.numa = match (policy.flatten(), nodes) {
        (Some(policy), Some(nodes)) => Some(Numa { policy, nodes }),
        (Some(_), None) => {
            return Err("policy= needs to know which nodes: give host-nodes= too".to_owned());
        }
        (None, Some(_)) => {
            return Err(
                "host-nodes= is of no use without policy=preferred, bind or interleave".to_owned(),
            );
        }
        (None, None) => None,
    };
    Ok(memory)
}

/// The size alone implies huge pages.
fn pages(given: Option<Pages>, size: Option<u64>) -> Result<Pages, String> {
    match (given, size) {
        (None | Some(Pages::Huge(_)), Some(size)) => Ok(Pages::Huge(Some(size))),
        (Some(_), Some(_)) => {
            Err("hugepage-size= is for hugepages=on, not for off or transparent".to_owned())
        }
        (given, None) => Ok(given.unwrap_or_default()),
    }
}

fn page_size(value: &str) -> Result<u64, String> {
    // Which there are is the host's matter.
    match values::size(value)? {
        size if size.is_power_of_two() && size > 4096 => Ok(size),
        _ => Err(format!("hugepage-size is 2M or 1G, not '{value}'")),
    }
}

fn directory(value: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(value);
    match path.metadata() {
        Ok(metadata) if metadata.is_dir() => Ok(path),
        Ok(_) => Err(format!(
            "path={value} is a file: give the directory in which the file of guest memory shall \
             be (/dev/shm, a hugetlbfs); it has no name there, and goes with its guest"
        )),
        Err(error) => Err(format!("path={value}: {error}")),
    }
}

fn on_off(key: &str, value: &str, or: &str) -> Result<bool, String> {
    match value {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(format!("{key} is on or off{or}, not '{value}'")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_given_is_as_it_always_was() {
        for text in [
            "1G",
            "size=1G",
            "1024",
            "1G,hugepages=off,shared=off,prealloc=off,policy=default",
        ] {
            let expected = Memory {
                size: Some(1 << 30),
                backing: Backing::default(),
            };
            assert_eq!(parse(text).unwrap(), expected, "{text}");
        }
    }

    #[test]
    fn all_can_be_told() {
        let memory =
            parse("hugepages=on,hugepage-size=1G,path=/,prealloc=on,host-nodes=0-1,policy=bind");
        let expected = Backing {
            pages: Pages::Huge(Some(1 << 30)),
            shared: true,
            path: Some("/".into()),
            prealloc: true,
            numa: Some(Numa {
                policy: Policy::Bind,
                nodes: vec![0, 1],
            }),
        };
        let memory = memory.unwrap();
        assert_eq!(memory.size, None);
        assert_eq!(memory.backing, expected);
        let pages = |text: &str| parse(text).unwrap().backing.pages;
        assert_eq!(pages("1G,hugepages=on"), Pages::Huge(None));
        assert_eq!(pages("1G,hugepage-size=2M"), Pages::Huge(Some(2 << 20)));
        assert_eq!(pages("1G,hugepages=transparent"), Pages::Transparent);
        assert!(parse("1G,share=on").unwrap().backing.shared);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, part) in [
            ("", "'' is not a size"),
            ("prealloc", "'prealloc' is not a size"),
            ("1G,prealloc", "'prealloc' is not KEY=VALUE"),
            ("1G,prealloc=yes", "prealloc is on or off, not 'yes'"),
            (
                "1G,hugepages=maybe",
                "on or off or transparent, not 'maybe'",
            ),
            ("1G,hugepage-size=3M", "2M or 1G, not '3M'"),
            (
                "1G,hugepages=transparent,hugepage-size=2M",
                "is for hugepages=on",
            ),
            ("1G,path=/etc/passwd", "is a file: give the directory"),
            ("1G,path=/nowhere", "path=/nowhere: No such file"),
            ("1G,path=/,shared=off", "memory in a file (path=) is shared"),
            ("1G,host-nodes=0", "is of no use without policy"),
            ("1G,policy=bind", "give host-nodes= too"),
            (
                "1G,policy=bind,host-nodes=x",
                "host-nodes: 'x' is no number",
            ),
            ("1G,policy=best", "not 'best'"),
            ("1G,merge=on", "'merge' is not known: expected SIZE"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
