//! State in transit: named, versioned, opaque bytes.

use std::collections::BTreeMap;

/// The state of one part of the machine. What the bytes mean is known to the part alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    /// Stable and unique within one stream, such as `vcpu.0` or `serial`.
    pub name: String,
    /// The version of the body's format.
    pub version: u32,
    /// The body, encoded by its owner.
    pub body: Vec<u8>,
}

/// What is wrong with the set of sections that arrived.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum SectionError {
    /// The same name twice.
    #[error("state section '{0}' came twice")]
    Duplicate(String),
    /// A section that the machine needs is not there.
    #[error("state section '{0}' is missing")]
    Missing(String),
    /// Sections that nothing in the machine asked for.
    #[error("unknown state section(s): {}", .0.join(", "))]
    Unknown(Vec<String>),
    /// A version that this build does not read.
    #[error(
        "state section '{name}' has version {found}, but this build reads versions {oldest} to {newest}"
    )]
    Version {
        /// The section.
        name: String,
        /// The version that came.
        found: u32,
        /// The oldest version that is read.
        oldest: u32,
        /// The newest version that is read.
        newest: u32,
    },
}

/// Sections on arrival: each is taken exactly once by its owner, and at the end none is left.
#[derive(Debug)]
pub struct Sections(BTreeMap<String, Section>);

impl Sections {
    /// Sorts the sections by name; the same name twice is an error.
    pub fn new(sections: Vec<Section>) -> Result<Self, SectionError> {
        let mut by_name = BTreeMap::new();
        for section in sections {
            if by_name.contains_key(&section.name) {
                return Err(SectionError::Duplicate(section.name));
            }
            by_name.insert(section.name.clone(), section);
        }
        Ok(Self(by_name))
    }

    /// Takes the section `name`, which must be of a version from `oldest` to `newest`.
    pub fn take(&mut self, name: &str, oldest: u32, newest: u32) -> Result<Section, SectionError> {
        let section = self
            .0
            .remove(name)
            .ok_or_else(|| SectionError::Missing(name.to_owned()))?;
        if (oldest..=newest).contains(&section.version) {
            Ok(section)
        } else {
            Err(SectionError::Version {
                name: section.name,
                found: section.version,
                oldest,
                newest,
            })
        }
    }

    /// Ends the loading: sections that nobody took are an error that names them.
    pub fn finish(self) -> Result<(), SectionError> {
        if self.0.is_empty() {
            Ok(())
        } else {
            Err(SectionError::Unknown(self.0.into_keys().collect()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn section(name: &str, version: u32) -> Section {
        Section {
            name: name.to_owned(),
            version,
            body: vec![1, 2, 3],
        }
    }

    #[test]
    fn each_section_is_taken_once_and_none_is_left() {
        let mut sections = Sections::new(vec![section("serial", 1), section("pit", 2)]).unwrap();
        assert_eq!(sections.take("pit", 1, 2).unwrap(), section("pit", 2));
        assert_eq!(
            sections.take("pit", 1, 2),
            Err(SectionError::Missing("pit".to_owned()))
        );
        sections.take("serial", 1, 1).unwrap();
        sections.finish().unwrap();
    }

    #[test]
    fn what_is_wrong_is_named() {
        assert_eq!(
            Sections::new(vec![section("pit", 1), section("pit", 1)]).unwrap_err(),
            SectionError::Duplicate("pit".to_owned())
        );
        let mut sections = Sections::new(vec![section("pit", 3), section("tpm", 1)]).unwrap();
        assert_eq!(
            sections.take("pit", 1, 2).unwrap_err().to_string(),
            "state section 'pit' has version 3, but this build reads versions 1 to 2"
        );
        assert_eq!(
            sections.finish(),
            Err(SectionError::Unknown(vec!["tpm".to_owned()]))
        );
    }
}
