//! Who is measured, and in which order.

use std::path::{Path, PathBuf};

use crate::error::Error;
use crate::vmm::{Ferry, Qemu, Vmm};

/// Who takes part.
#[derive(Clone, Debug)]
pub struct Choice<'a> {
    /// The build of Ferry to measure.
    pub ferry: &'a Path,
    /// Another one to compare with.
    pub before: Option<&'a Path>,
    /// Whether QEMU takes part, if it is there.
    pub qemu: bool,
}

/// Who is there.
pub struct Found {
    /// Ferry first.
    pub vmms: Vec<Box<dyn Vmm>>,
    /// What is to be said about one that is missing.
    pub notes: Vec<String>,
}

/// Looks for them.
pub fn find(choice: &Choice<'_>) -> Result<Found, Error> {
    let build = |name: &str, program: &Path| -> Result<Box<dyn Vmm>, Error> {
        Ok(Box::new(Ferry {
            name: name.to_owned(),
            program: present(program)?,
        }))
    };
    let (mut vmms, mut notes) = (vec![build("ferry", choice.ferry)?], Vec::new());
    if let Some(before) = choice.before {
        vmms.push(build("before", before)?);
    }
    if choice.qemu {
        match Qemu::find() {
            Some(qemu) => vmms.push(Box::new(qemu)),
            None => notes.push(format!(
                "WARNING: there is no {} on the search path (package qemu-system-x86): FERRY IS \
                 MEASURED ALONE",
                Qemu::PROGRAM
            )),
        }
    }
    Ok(Found { vmms, notes })
}

fn present(program: &Path) -> Result<PathBuf, Error> {
    program.canonicalize().map_err(Error::io(format!(
        "{} (build it with `cargo build --release`, or say --ferry FILE)",
        program.display()
    )))
}

/// Measures all in turn, so often; the outcomes of each. `before_each` is told what comes.
pub fn in_turn<T>(
    runs: u16,
    vmms: &[Box<dyn Vmm>],
    mut before_each: impl FnMut(&str),
    mut measure: impl FnMut(&dyn Vmm) -> Result<T, Error>,
) -> Result<Vec<Vec<T>>, Error> {
    let mut outcomes: Vec<Vec<T>> = vmms.iter().map(|_| Vec::new()).collect();
    for run in 1..=runs {
        for (vmm, outcomes) in vmms.iter().zip(&mut outcomes) {
            before_each(&format!("run {run} of {runs}: {}", vmm.name()));
            outcomes.push(measure(vmm.as_ref())?);
        }
    }
    Ok(outcomes)
}
