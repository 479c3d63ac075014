//! What a benchmark tells in the end: as a table, as JSON, and as a page.

mod html;
pub mod plot;
mod table;

use std::fmt;

use serde_json::{Value, json};

use crate::figure::{Measured, Row};
use crate::machine::Machine;
use crate::summary::Spread;
use crate::vmm::Vmm;
use plot::Plot;
use table::Table;

/// All that was measured.
#[derive(Clone, Debug)]
pub struct Report {
    /// On what.
    pub machine: Machine,
    /// What the reader must know to judge it.
    pub notes: Vec<String>,
    /// What was measured, one after the other.
    pub sections: Vec<Section>,
}

/// One thing that was measured, of several VMMs.
#[derive(Clone, Debug)]
pub struct Section {
    /// A few words.
    pub title: String,
    /// What was done, in full.
    pub description: String,
    /// What the reader must know to judge it.
    pub notes: Vec<String>,
    /// The VMMs, in the order of each row's figures. The first is the one that the others are
    /// compared with.
    pub vmms: Vec<String>,
    /// Whether they were measured in turn, so that their runs can be compared pair by pair.
    pub in_turn: bool,
    /// The figures.
    pub rows: Vec<Row>,
    /// Pictures of them.
    pub plots: Vec<Plot>,
    /// All that went in, for machines.
    pub input: Value,
    /// All that came out, by VMM and run, for machines.
    pub runs: Value,
}

impl Section {
    /// Of runs that were made in turn: `runs` has those of each VMM.
    pub fn of<Run: Measured>(
        title: impl Into<String>,
        description: impl Into<String>,
        vmms: &[Box<dyn Vmm>],
        runs: &[Vec<Run>],
    ) -> Self {
        let named = vmms.iter().zip(runs);
        Self {
            title: title.into(),
            description: description.into(),
            notes: vec![],
            vmms: vmms.iter().map(|vmm| vmm.name().to_owned()).collect(),
            in_turn: true,
            rows: Row::all(runs),
            plots: vec![],
            input: Value::Null,
            runs: named
                .map(|(vmm, runs)| (vmm.name().to_owned(), json!(runs)))
                .collect(),
        }
    }

    /// The names of the VMMs that the first is compared with, each with its place in the rows.
    fn compared(&self) -> impl Iterator<Item = (usize, &str)> {
        let others = self.vmms.iter().enumerate().skip(1);
        others
            .filter(|_| self.in_turn)
            .map(|(index, name)| (index, name.as_str()))
    }

    /// The heads of the columns behind a figure's name.
    fn head(&self) -> Vec<String> {
        let first = self.vmms.first().map(String::as_str).unwrap_or_default();
        let ratios = self.compared().map(|(_, name)| format!("{first}/{name}"));
        self.vmms.iter().cloned().chain(ratios).collect()
    }

    /// What stands in those columns.
    fn cells(&self, row: &Row) -> Vec<String> {
        let text = |spread: Option<Spread>, digits: usize| match spread {
            Some(spread) => format!("{spread:.digits$}"),
            None => "-".to_owned(),
        };
        let figures = (0..self.vmms.len()).map(|vmm| text(row.spread(vmm), row.digits));
        let ratios = self.compared().map(|(vmm, _)| text(row.ratio(vmm), 2));
        figures.chain(ratios).collect()
    }

    fn json(&self) -> Value {
        let row = |row: &Row| {
            let spreads: Value = self
                .vmms
                .iter()
                .enumerate()
                .map(|(vmm, name)| (name.clone(), json!(row.spread(vmm))))
                .collect();
            let ratios: Value = self
                .compared()
                .map(|(vmm, name)| {
                    let (pairs, spread) = (row.ratios(vmm), row.ratio(vmm));
                    (name.to_owned(), json!({ "pairs": pairs, "spread": spread }))
                })
                .collect();
            json!({ "name": row.name.trim(), "unit": row.unit, "spread": spreads, "ratio": ratios })
        };
        json!({
            "title": self.title,
            "description": self.description,
            "notes": self.notes,
            "input": self.input,
            "summary": self.rows.iter().map(row).collect::<Vec<_>>(),
            "runs": self.runs,
        })
    }
}

impl fmt::Display for Section {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}: {}", self.title, self.description)?;
        let head = std::iter::once("median (min–max)".to_owned()).chain(self.head());
        let mut table = Table::new(head);
        for row in &self.rows {
            table.push(std::iter::once(row.label()).chain(self.cells(row)));
        }
        table.fmt(f)?;
        self.notes.iter().try_for_each(|note| writeln!(f, "{note}"))
    }
}

impl Report {
    /// All figures of all runs, and what they come to.
    pub fn json(&self) -> Value {
        json!({
            "machine": self.machine,
            "notes": self.notes,
            "sections": self.sections.iter().map(Section::json).collect::<Vec<_>>(),
        })
    }

    /// One page that needs nothing else.
    pub fn html(&self) -> Result<String, plot::PlotError> {
        html::page(self)
    }
}
