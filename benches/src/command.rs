//! The command line of `ferry bench`.

mod measure;
mod options;
mod tune;

use std::io::{self, IsTerminal};
use std::path::Path;

use crate::contenders::{self, Choice, Found};
use crate::error::Error;
use crate::interrupt;
use crate::machine::Machine;
use crate::proc;
use crate::remote::Connection;
use crate::remote::agent::Agent;
use crate::remote::token::Token;
use crate::report::{Report, Section};
use crate::vmm::{self, Vmm};

pub use options::Options;
use options::{Common, OtherHost, What};

/// Does what the options say; `own` is the build of Ferry that is measured unless they name another.
pub fn run(options: &Options, own: &Path) -> Result<(), Error> {
    interrupt::watch().map_err(Error::io("watching for signals"))?;
    // What a process that was killed did not do is not the reason.
    carry_out(options, own).map_err(|err| interrupt::check().err().unwrap_or(err))
}

fn carry_out(options: &Options, own: &Path) -> Result<(), Error> {
    let common = &options.common;
    let Found { vmms, notes } = contenders::find(&Choice {
        ferry: common.ferry.as_deref().unwrap_or(own),
        before: common.before.as_deref(),
        qemu: !common.without_qemu,
    })?;
    let mut machine = Machine::this();
    if common.no_huge_pages {
        // Children inherit it.
        rustix::thread::disable_transparent_huge_pages(true)
            .map_err(|err| Error::io("PR_SET_THP_DISABLE")(err.into()))?;
        "forbidden".clone_into(&mut machine.huge_pages);
    }
    machine.vmms = versions(&vmms);
    let mut output = Output {
        common,
        report: Report {
            machine,
            notes: vec![],
            sections: vec![],
        },
    };
    for note in notes {
        output.note(note);
    }
    match &options.what {
        What::Agent { listen, token_file } => return serve(listen, token_file, vmms),
        What::Suite {
            scenario,
            best,
            other,
        } => {
            let agent = connect(other, &mut output)?;
            measure::suite(scenario, *best, agent, &vmms, &mut output)?;
        }
        What::Migration(options) => {
            let mut agent = connect(&options.other, &mut output)?;
            let (scenario, best) = (options.scenario(), options.best);
            let section = measure::migration(scenario, best, agent.as_mut(), &vmms, &output)?;
            output.add(section)?;
        }
        What::Start(work) => {
            let section = measure::start(&work.scenario(), &vmms, &output)?;
            output.add(section)?;
        }
        What::Pause { times } => output.add(measure::pause(*times, &vmms)?)?,
        What::Disk(options) => measure::disk(options, vmms, &mut output)?,
    }
    let Machine {
        load: [before, after],
        ..
    } = &output.report.machine;
    println!("Load average: {before} before, {after} after.");
    Ok(())
}

fn connect(other: &OtherHost, output: &mut Output<'_>) -> Result<Option<Connection>, Error> {
    let agent = other.connect()?;
    if let Some(agent) = &agent {
        output.note(agent.describe());
    }
    Ok(agent)
}

/// Serves one benchmark after the other.
fn serve(listen: &str, token_file: &Path, vmms: Vec<Box<dyn Vmm>>) -> Result<(), Error> {
    let agent = Agent::bind(listen, Token::read(token_file)?, vmms)?;
    println!("Listening at {}.", agent.address()?);
    loop {
        agent.serve_one(&mut |what| println!("{what}"))?;
    }
}

fn versions(vmms: &[Box<dyn Vmm>]) -> Vec<(String, String)> {
    let each = vmms.iter();
    each.map(|vmm| (vmm.name().to_owned(), vmm::version(vmm.as_ref())))
        .collect()
}

/// Where the figures go. What was asked for is written after each section, so that a long benchmark
/// that fails has not been for nothing.
struct Output<'a> {
    common: &'a Common,
    report: Report,
}

impl Output<'_> {
    /// Something that the reader must know.
    fn note(&mut self, note: String) {
        self.progress("");
        println!("{note}");
        self.report.notes.push(note);
    }

    fn add(&mut self, section: Section) -> Result<(), Error> {
        self.progress("");
        print!("{section}");
        self.report.sections.push(section);
        let [_, after] = &mut self.report.machine.load;
        *after = proc::load();
        if let Some(path) = &self.common.json {
            write(path, &format!("{:#}\n", self.report.json()))?;
        }
        if let Some(path) = &self.common.html {
            write(path, &self.report.html()?)?;
        }
        Ok(())
    }

    /// What is going on, for who is watching: over what was said of that before.
    fn progress(&self, what: &str) {
        if io::stderr().is_terminal() {
            eprint!("\r\x1b[K{what}");
        }
    }
}

fn write(path: &Path, text: &str) -> Result<(), Error> {
    std::fs::write(path, text).map_err(Error::io(path.display().to_string()))
}
